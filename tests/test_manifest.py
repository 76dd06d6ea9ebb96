"""manifest.py: rows, cards and folders of prepared data sets are whole, or what is wrong with them is named."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

from af_min import cli, manifest
from af_min.cli import UserError

ROW = {"audio": "audio/x.flac", "task": "AQA", "prompt": "how many?", "answer": "two"}


def test_rows_survive_writing_and_reading(tmp_path):
    rows = [ROW, ROW | {"start": 1.5, "seconds": 2, "extra": {"kept": [1]}, "answer": "zwei ≤ drei \u2028 \n"},
            {"audio": "a.wav", "task": "Dialogue", "turns": [{"user": "hi", "assistant": "yes"}]},
            {"audio": "a.wav", "task": "T", "prompt": "p", "answers": ["a", "b"], "shots": [ROW]}]
    assert manifest.write_rows(tmp_path / "x.jsonl", rows) == 4
    assert manifest.read_rows(tmp_path / "x.jsonl") == [{"start": 0.0} | row for row in rows]
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


@pytest.mark.parametrize("change, words", [
    ({"audio": ""}, "audio: expected a path"), ({"audio": "/etc/x.wav"}, "audio"), ({"audio": "../x.wav"}, "audio"), ({"audio": 3}, "audio"),
    ({"audio": None}, "audio"), ({"task": " "}, "task"), ({"prompt": ""}, "prompt: expected text, got ''"), ({"prompt": None}, "prompt"),
    ({"answer": ""}, "answer"), ({"answer": 5}, "answer: expected text, got 5"), ({"answer": ["x"]}, "answer"), ({"answers": ["x"]}, "exactly one of"),
    ({"start": -1}, "start: expected a number of seconds"), ({"start": "0"}, "start"), ({"start": True}, "start"), ({"start": float("nan")}, "start"),
    ({"seconds": float("inf")}, "seconds"), ({"shots": "x"}, "shots"), ({"shots": [1]}, "shots: expected a list of rows"),
    ({"shots": [{"audio": "a.wav", "answer": "x"}]}, "shots"), ({"pool": [ROW | {"start": "0"}]}, "pool"),
    ({"answer": "\ud800"}, "answer"), ({"group": 3}, "group")])
def test_a_wrong_field_is_named_with_its_line(tmp_path, change, words):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(ROW) + "\n\n" + json.dumps(ROW | change) + "\n")
    with pytest.raises(UserError) as error:
        manifest.read_rows(path)
    assert str(error.value).startswith(f"{path}:3: ") and words in str(error.value)
    with pytest.raises(UserError):
        manifest.write_rows(tmp_path / "y.jsonl", [ROW | change])
    assert not (tmp_path / "y.jsonl").exists()


@pytest.mark.parametrize("line", ["", "{", "[1]", "3", '"x"', "null", "[" * 100_000, '{"audio": "x"} trailing', "\x00", '{"turns": [], "audio": "x", "task": "T"}',
                                  '{"turns": [{"user": "x"}], "audio": "x", "task": "T"}', '{"answers": [], "prompt": "p", "audio": "x", "task": "T"}'])
def test_malformed_lines(tmp_path, line):
    (tmp_path / "x.jsonl").write_text(json.dumps(ROW) + "\n" + line + "\n")
    if not line:
        assert len(manifest.read_rows(tmp_path / "x.jsonl")) == 1
        return
    with pytest.raises(UserError) as error:
        manifest.read_rows(tmp_path / "x.jsonl")
    assert "x.jsonl:2: " in str(error.value) and len(str(error.value)) < 400


def test_what_is_no_manifest(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        manifest.read_rows(tmp_path / "no.jsonl")
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        manifest.read_rows(tmp_path / "x.jsonl")
    with pytest.raises(UserError, match="no prepared data set"):
        manifest.read_card(tmp_path)
    (tmp_path / "card.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        manifest.read_card(tmp_path)


def test_the_card_counts_and_its_hash_sees_every_byte_and_name(tmp_path):
    def make(name, rows, audio=b"abc", file="x.flac"):
        with manifest.dataset_folder(tmp_path / name) as folder:
            (folder / "audio").mkdir()
            (folder / "audio" / file).write_bytes(audio)
            manifest.write_rows(folder / "train.jsonl", rows)
            return manifest.write_card(folder, source="here", name=name)

    long = ROW | {"seconds": 1800}
    card = make("a", [long, long | {"answer": "three"}, long | {"start": 1800.0, "task": "Other"}])
    assert card["splits"]["train"] == {"rows": 3, "tasks": {"AQA": 2, "Other": 1}} and card["splits"]["val"]["rows"] == 0
    assert card["hours"] == 1.0, "two questions about one span are one span of audio"
    assert card["source"] == "here" and card == manifest.read_card(tmp_path / "a")
    assert len({make(name, *what)["sha256"] for name, what in {
        "b": ([ROW],), "c": ([ROW],), "d": ([ROW, ROW],), "e": ([ROW], b"abd"), "f": ([ROW], b"abc", "y.flac")}.items()}) == 4


def test_a_link_leads_to_the_data_set(tmp_path):
    (tmp_path / "big disk").mkdir()
    (tmp_path / "a").symlink_to(tmp_path / "big disk")
    for source in ("old", "new"):
        with manifest.dataset_folder(tmp_path / "a") as folder:
            manifest.write_card(folder, source=source)
        assert manifest.read_card(tmp_path / "big disk")["source"] == source
    assert (tmp_path / "a").is_symlink() and {path.name for path in tmp_path.iterdir()} == {"a", "big disk"}


def test_a_lock_that_was_removed_before_it_was_taken_locks_nothing(tmp_path, monkeypatch):
    lockf = cli.fcntl.lockf
    monkeypatch.setattr(cli.fcntl, "lockf", lambda *args: ((tmp_path / ".a.lock").unlink(), lockf(*args)))
    with pytest.raises(UserError, match="another process is writing there"), cli.alone(tmp_path / "a", "--out"):
        pass


def test_two_processes_do_not_make_one_data_set(tmp_path):
    """The second is refused, and takes nothing from the first."""
    start = f"from af_min import manifest\nwith manifest.dataset_folder({str(tmp_path / 'a')!r}): pass"
    with manifest.dataset_folder(tmp_path / "a") as folder:
        (folder / "x").touch()
        second = subprocess.run([sys.executable, "-c", start], cwd=Path(manifest.__file__).parents[1], capture_output=True, text=True)
        assert "another process is writing there" in second.stderr
        manifest.write_card(folder, source="first")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"x", "card.json"} and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_data_set_cannot_lie_in_a_file(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(UserError, match="a/b: cannot be written"):
        with manifest.dataset_folder(tmp_path / "a" / "b"):
            pass


def test_a_data_set_that_breaks_half_way_leaves_the_old_one(tmp_path):
    with manifest.dataset_folder(tmp_path / "a") as folder:
        manifest.write_card(folder, source="old")
    with pytest.raises(KeyboardInterrupt):
        with manifest.dataset_folder(tmp_path / "a") as folder:
            manifest.write_card(folder, source="new")
            raise KeyboardInterrupt
    assert manifest.read_card(tmp_path / "a")["source"] == "old" and [path.name for path in tmp_path.iterdir()] == ["a"]

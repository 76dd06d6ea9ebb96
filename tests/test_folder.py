"""Importing one's own recordings: everything usable is used once, everything else is counted and named, nothing is half-written."""
import errno
import os
import shutil
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile

from af_min import cli, folder, manifest
from af_min.cli import UserError
from af_min.folder import import_folder, walk
from conftest import rows_of

RATE = 16_000


def sound(path, seed: int, rate: int = RATE, seconds: float = 0.2, channels: int = 1, **kind):
    path.parent.mkdir(parents=True, exist_ok=True)
    x = np.random.default_rng(seed).standard_normal((round(seconds * rate), channels)) * 0.1
    soundfile.write(path, x, rate, **kind)
    return path


def csv(folder, text: str, encoding: str = "utf-8", name: str = "labels.csv"):
    (folder / name).write_bytes(text.encode(encoding))


@pytest.fixture
def src(tmp_path):
    folder = tmp_path / "my sounds"
    folder.mkdir()
    return folder


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def three_classes(src, each: int = 10) -> None:
    lines = ["file,answer"]
    for n in range(3 * each):
        extension = ("wav", "flac", "ogg", "mp3")[n % 4]
        sound(src / f"{n}.{extension}", n, (8_000, 22_050, 44_100)[n % 3], channels=1 + n % 2)
        lines.append(f"{n}.{extension},{('dog', 'bell', 'cat')[n % 3]}")
    csv(src, "\n".join(lines))


# ---------------------------------------------------------------------- what a good folder becomes

def test_a_folder_of_every_format(src, out):
    three_classes(src)
    report = import_folder(src, out, RATE)
    rows = rows_of(out)
    assert len(rows) == 30 and report.problems == {} and report.card == manifest.read_card(out)
    for row in rows:
        samples, rate = soundfile.read(out / row["audio"])
        assert rate == RATE and samples.ndim == 1 and abs(len(samples) / rate - row["seconds"]) < 1e-3 and row["seconds"] > 0.15
        assert row["answer"] == ("dog", "bell", "cat")[int(row["file"].split(".")[0]) % 3]
        assert (row["task"], row["prompt"], row["start"]) == ("AudioClassification", "classify this sound.", 0.0)
    assert report.card["classes"] == 3 and report.card["recordings"] == 30 and 0.0015 < report.card["hours"] < 0.0025
    assert {path.name for path in out.iterdir()} == {"train.jsonl", "val.jsonl", "test.jsonl", "audio", "card.json"}
    assert "30 recordings" in str(report) and report.card["sha256"] in str(report)


def test_splits_are_stratified_disjoint_and_the_same_every_time(src, out, tmp_path):
    three_classes(src)
    first, again, other = (import_folder(src, tmp_path / name, RATE, seed=seed).card for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert first["sha256"] == again["sha256"] != other["sha256"]
    assert [first["splits"][split]["rows"] for split in manifest.SPLITS] == [21, 3, 6]
    rows = rows_of(tmp_path / "a")
    for answer in ("dog", "bell", "cat"):
        assert sum(row["answer"] == answer and row["split"] == "test" for row in rows) == 2
    where = {}
    for row in rows:
        assert where.setdefault(row["audio"], row["split"]) == row["split"]


def test_copies_of_a_sound_never_stand_in_two_splits(src, out):
    """Thirty sounds, each also as a copy under another name and container with another answer."""
    lines = ["file,answer"]
    for n in range(30):
        sound(src / f"{n}.wav", n, subtype="PCM_16")
        samples, rate = soundfile.read(src / f"{n}.wav", dtype="int16")
        soundfile.write(src / f"copy{n}.flac", samples, rate)
        lines += [f"{n}.wav,{'ab'[n % 2]}", f"copy{n}.flac,c"]
    csv(src, "\n".join(lines))
    report = import_folder(src, out, RATE)
    rows, where = rows_of(out), {}
    assert sum(len(row.get("answers", [1])) for row in rows) == 60 and report.card["recordings"] == 30
    for row in rows:
        assert where.setdefault(row["audio"], row["split"]) == row["split"]
        assert ("answers" in row) == (row["split"] != "train"), "one question with two right answers is scored once"


def test_what_lies_in_a_prepared_set_is_no_recording_of_the_folders(src, out):
    """A first import into the folder itself must not become a class "audio" of the second; nor may one of two names that read alike vanish."""
    for kind in ("dog", "cat"):
        for n in range(3):
            sound(src / kind / f"{n}.wav", n + 3 * (kind == "cat"))
    import_folder(src, src / "prepared", RATE)
    sound(src / "dog" / unicodedata.normalize("NFC", "ü.wav"), 8)
    sound(src / "dog" / unicodedata.normalize("NFD", "ü.wav"), 9)
    report = import_folder(src, out, RATE)
    assert {row["answer"] for row in rows_of(out)} == {"dog", "cat"} and report.card["recordings"] == 7
    assert len(report.problems["inside of a prepared data set"]) == 6 + 4 and sum(map(len, report.problems.values())) == 11


def test_classes_are_counted_as_answers_are_scored(src, out):
    """Capitals and full stops make neither another class nor another answer to the same sound."""
    for n in range(12):
        sound(src / f"{n}.wav", n)
    csv(src, "file,answer\n" + "".join(f"{n}.wav,{('dog', 'Dog', 'DOG.', 'cat')[n % 4]}\n" for n in range(12)) + "0.wav,DOG\n")
    report = import_folder(src, out, RATE)
    assert report.card["classes"] == 2 and report.problems == {"the same sound and answer again": ["0.wav (as 0.wav)"]}


def test_a_table_may_name_its_files_from_the_root(src, out):
    for n in range(4):
        sound(src / f"{n}.wav", n)
    csv(src, "file,answer\n" + "".join(f"{src.resolve()}/{n}.wav,a\n" for n in range(4)) + "/elsewhere/0.wav,a\n")
    report = import_folder(src, out, RATE)
    assert len(rows_of(out)) == 4 and report.problems == {"row naming a file that is not there": ["labels.csv:6 (/elsewhere/0.wav)"]}


def test_captions_questions_and_given_splits(src, out):
    for n in range(6):
        sound(src / "deep" / "er" / f"{n}.wav", n)
    csv(src, "File,Prompt,Answer,Split,Task\n" + "".join(
        f'deep/er/{n}.wav,,"a sound, number {n}",{("train", "Validation", "TEST")[n % 3]},\n' for n in range(6))
        + "deep\\er\\0.wav,how loud?,very loud,train,\n" + "deep/er/1.wav,which?,that one,val,Special\n")
    import_folder(src, out, RATE)
    rows = rows_of(out)
    assert len(rows) == 8 and [sum(row["split"] == split for row in rows) for split in manifest.SPLITS] == [3, 3, 2]
    assert {row["task"] for row in rows if row["answer"].startswith("a sound, number")} == {"AudioCaptioning"}
    by_answer = {row["answer"]: row for row in rows}
    assert by_answer["very loud"]["task"] == "AQA" and by_answer["very loud"]["prompt"] == "how loud?"
    assert by_answer["that one"]["task"] == "Special"
    assert by_answer["a sound, number 2"]["prompt"] == "describe the sound in a sentence."


def test_a_class_with_one_recording_stays_in_training(src, out):
    for n in range(11):
        sound(src / f"{n}.wav", n)
    csv(src, "file,answer\n" + "".join(f"{n}.wav,{'often' if n else 'once'}\n" for n in range(11)))
    import_folder(src, out, RATE)
    assert [row["split"] for row in rows_of(out) if row["answer"] == "once"] == ["train"]


def test_captions_of_which_two_are_alike_have_every_split(src, out):
    for n in range(40):
        sound(src / f"{n}.wav", n)
    csv(src, "file,answer\n" + "".join(f"{n}.wav,number {max(1, n)}\n" for n in range(40)))
    assert [facts["rows"] for facts in import_folder(src, out, RATE).card["splits"].values()] == [28, 4, 8]


def test_labels_from_folders_and_from_names(src, out, tmp_path):
    for n in range(4):
        sound(src / "church_bell" / f"x{n}.wav", n)
        sound(src / "dog" / f"Loud-dog_{n:03}(2).wav", 10 + n)
    import_folder(src, out, RATE)
    assert {row["answer"] for row in rows_of(out)} == {"church bell", "dog"}
    import_folder(src, tmp_path / "names", RATE, labels_from_names=True)
    assert {row["answer"] for row in rows_of(tmp_path / "names")} == {"x", "Loud dog"}


def test_links_to_folders_are_followed_but_not_in_a_circle(src, out):
    sound(src / "cat" / "a.wav", 0), sound(src.parent / "elsewhere" / "b.wav", 1), sound(src.parent / "elsewhere" / "far" / "c.wav", 2)
    (src / "dog").symlink_to(src.parent / "elsewhere")
    (src.parent / "elsewhere" / "back").symlink_to(src)
    assert import_folder(src, out, RATE).problems == {} and {row["file"] for row in rows_of(out)} == {"cat/a.wav", "dog/b.wav", "dog/far/c.wav"}


def test_folders_that_all_lead_to_each_other_have_an_end(src):
    for n in range(12):
        sound(src / f"{n}/x.wav", n)
        for other in range(12):
            (src / f"{n}/to {other}").symlink_to(src / f"{other}")
    assert len(list(walk(src))) == 12 + 12 * 11


def test_long_recordings_are_cut_and_reported(src, out, monkeypatch):
    monkeypatch.setattr(folder, "MAX_SECONDS", 1.5)
    sound(src / "long.wav", 0, seconds=2.0)
    csv(src, "file,answer\nlong.wav,noise\n")
    report = import_folder(src, out, RATE)
    assert rows_of(out)[0]["seconds"] == 1.5
    assert report.problems == {"what lies beyond 1.5 s of a recording": ["long.wav (0.5 s)"]}


def test_a_group_is_never_divided_and_foreign_columns_are_left_alone(src, out):
    lines = ["file,answer,group,answers,turns"]
    for n in range(40):
        sound(src / f"{n}.wav", n)
        lines.append(f"{n}.wav,{'ab'[n % 2]},speaker {n // 4},7,x")
    csv(src, "\n".join(lines))
    import_folder(src, out, RATE)
    where = {}
    for row in rows_of(out):
        assert where.setdefault(row["group"], row["split"]) == row["split"] and not {"answers", "turns"} & set(row)
    assert len(where) == 10 and set(where.values()) == set(manifest.SPLITS) and manifest.check(out) == []


def test_a_sound_that_two_groups_share_divides_neither(src, out):
    """Ten speakers of four sounds each, and a copy of one sound of each under another speaker."""
    lines = ["file,answer,group"]
    for n in range(40):
        sound(src / f"{n}.wav", n)
        lines.append(f"{n}.wav,{'ab'[n % 2]},speaker {n // 4}")
        if n % 4 == 0:
            shutil.copy(src / f"{n}.wav", src / f"copy{n}.wav")
            lines.append(f"copy{n}.wav,c,speaker {(n // 4 + 3) % 10}")
    csv(src, "\n".join(lines))
    report = import_folder(src, out, RATE)
    assert manifest.check(out) == [] and set(report.problems) == {"its sound or group is in another split"}
    assert len(rows_of(out)) + len(report.problems["its sound or group is in another split"]) == 50


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are Unicode")
def test_a_name_that_is_latin_1_on_disk(src, out):
    """As old archives leave them: found by a table in UTF-8, and written as UTF-8."""
    os.rename(sound(src / "a.wav", 0), os.fsencode(src) + b"/m\xfcde.wav")
    (src / os.fsdecode(b"\xff.wav")).touch()
    csv(src, "file,answer\nm\u00fcde.wav,bell\n")
    report = import_folder(src, out, RATE)
    assert [row["file"] for row in rows_of(out)] == ["m\u00fcde.wav"] and report.problems == {"no usable row in the CSV": ["\u00ff.wav"]}
    assert "\u00ff.wav" in str(report)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_every_kind_of_csv(src, out, encoding, newline, delimiter):
    decomposed = unicodedata.normalize("NFD", "müde Glocke.wav")               # as macOS stores it
    sound(src / decomposed, 0)
    sound(src / "b.WAV", 1)
    csv(src, newline.join(["file;answer;;", '"müde Glocke.wav";"eine ""müde"", alte Glocke";;', "", " ./b.WAV ;  bell ;;", ";;;"]).replace(";", delimiter), encoding)
    report = import_folder(src, out, RATE)
    assert {row["answer"] for row in rows_of(out)} == {'eine "müde", alte Glocke', "bell"} and not report.problems


# ---------------------------------------------------------------------- what cannot be used

def test_every_bad_file_and_row_is_counted_and_named(src, out):
    three_classes(src, each=4)
    sound(src / "good.flac", 99)
    content = (src / "good.flac").read_bytes()
    (src / "cut.flac").write_bytes(content[:len(content) // 2])
    (src / "zero.wav").touch()
    (src / "text.wav").write_text("this is not audio")
    soundfile.write(src / "silent.wav", np.zeros(8000), RATE)
    soundfile.write(src / "short.wav", np.ones(100) * 0.5, RATE)
    soundfile.write(src / "nan.wav", np.full(8000, np.nan), RATE, subtype="FLOAT")
    sound(src / "nobody.wav", 98)
    (src / "._good.flac").write_text("macOS leaves these")
    (src / "phone.m4a").touch()
    table = (src / "labels.csv").read_text()
    csv(src, table + "\ngood.flac,dog\ncut.flac,dog\nzero.wav,dog\ntext.wav,cat\nsilent.wav,cat\nshort.wav,bell\nnan.wav,bell\n"
        "missing.wav,dog\n../outside.wav,dog\n/etc/passwd,dog\ngood.flac\ngood.flac,dog,more\ngood.flac,\ngood.flac,dog\n")
    report = import_folder(src, out, RATE)
    found = {reason: names for reason, names in report.problems.items()}
    assert found.pop("truncated") == ["cut.flac"] and found.pop("empty") == ["zero.wav"] and found.pop("unreadable") == ["text.wav"]
    assert found.pop("silent (the first channel, the only one heard)") == ["silent.wav"] and found.pop("too short") == ["short.wav"] and found.pop("NaN") == ["nan.wav"]
    assert found.pop("no usable row in the CSV") == ["nobody.wav"] and found.pop("not a wav, flac, ogg or mp3") == ["phone.m4a"]
    assert found.pop("row naming a file that is not there") == ["labels.csv:21 (missing.wav)", "labels.csv:22 (../outside.wav)", "labels.csv:23 (/etc/passwd)"]
    assert found.pop("row with too many or too few fields") == ["labels.csv:24", "labels.csv:25"]
    assert found.pop("row without an answer") == ["labels.csv:26"]
    assert found.pop("the same sound and answer again") == ["good.flac (as good.flac)"]
    assert not found and len(rows_of(out)) == 13
    assert manifest.read_card(out)["not_used"] == report.problems and "cut.flac" in str(report)


def test_a_split_that_does_not_exist_and_one_that_contradicts(src, out):
    sound(src / "a.wav", 0), sound(src / "b.wav", 1)
    csv(src, "file,answer,split\na.wav,x,train\na.wav,y,test\nb.wav,z,later\n")
    report = import_folder(src, out, RATE)
    assert report.problems["row with a split that is not train, val or test"] == ["labels.csv:4 (later)"]
    assert report.problems["its sound or group is in another split"] == ["a.wav"]
    assert [(row["split"], row["answer"]) for row in rows_of(out)] == [("train", "x")]


def refused(src, out, *expected):
    with pytest.raises(UserError) as error:
        import_folder(src, out, RATE)
    assert all(words in str(error.value) for words in expected) and "\n" not in str(error.value), str(error.value)
    assert not out.exists() and not [path for path in out.parent.iterdir() if path.name.startswith(".")]


def test_nothing_is_left_behind_by_an_import_that_fails(src, out, monkeypatch):
    refused(src / "no", out, "no such folder")
    refused(src, out, "no wav, flac, ogg or mp3")
    sound(src / "a.wav", 0)
    refused(src, out, "file,answer", "--labels-from-names")
    (src / "labels.csv").touch()
    refused(src, out, "labels.csv:1", "got nothing")
    csv(src, "name,label\na.wav,dog\n")
    refused(src, out, "labels.csv:1", "got name, label")
    csv(src, "file,answer\na.wav,Glöckchen\n", "latin-1")
    refused(src, out, "not UTF-8")
    csv(src, "file,answer\nb.wav,dog\n")
    refused(src, out, "no usable recording", "labels.csv:2 (b.wav)")
    for swallowed in ("b.wav,bell", 'b.wav,"bell"', "x" * 200_000):
        csv(src, f'file,answer\n"a.wav",cat\na.wav,"dog\n{swallowed}\n')
        refused(src, out, "labels.csv:3", "not a CSV", "quotation marks")
    csv(src, "file,answer\n", name="second.csv")
    refused(src, out, "2 CSV files")
    (src / "second.csv").unlink()
    csv(src, "file,answer\na.wav,dog\n")
    monkeypatch.setattr(soundfile, "write", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        import_folder(src, out, RATE)
    assert not out.exists() and not [path for path in out.parent.iterdir() if path.name.startswith(".")]


def test_a_folder_that_is_no_data_set_is_never_overwritten(src, out):
    three_classes(src, each=1)
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not a prepared data set"):
        import_folder(src, out, RATE)
    assert (out / "thesis.txt").read_text() == "precious"
    (out / "thesis.txt").unlink()
    import_folder(src, out, RATE)
    import_folder(src, out, RATE)                          # an older data set is replaced
    assert len(rows_of(out)) == 3


def test_the_source_is_never_replaced_by_the_data_set(src, out):
    three_classes(src, each=1)
    import_folder(src, out, RATE)
    before = manifest.read_card(out)
    for source in (out, out / "audio"):
        with pytest.raises(UserError, match="holds the recordings themselves"):
            import_folder(source, out, RATE)
    assert manifest.read_card(out) == before and manifest.check(out) == []


def test_the_data_set_may_lie_inside_the_source(src):
    sound(src / "dog" / "a.wav", 0), sound(src / "dog" / "b.wav", 1)
    first = import_folder(src, src / "prepared", RATE).card
    assert import_folder(src, src / "prepared", RATE).card == first


def test_sixty_broken_tables_end_in_a_report_or_one_line(src, out):
    """Random bytes put into a good CSV: rows are used, or named, or the table is refused by name; never anything else."""
    rng = np.random.default_rng(0)
    sound(src / "a.wav", 0), sound(src / "b.wav", 1)
    good = "file,prompt,answer\na.wav,what is it?,a dog\nb.wav,\"what, then?\",a bell\n".encode()
    alphabet = [b'"', b",", b"\n", b"\r", b";", b"\0", b"\xff", "ü\u2028".encode(), b"../", b" ", b"a.wav"]
    outcomes = set()
    for _ in range(60):
        content = bytearray(good)
        for _ in range(int(rng.integers(1, 5))):
            at = int(rng.integers(0, len(content)))
            content[at:at + int(rng.integers(0, 3))] = alphabet[int(rng.integers(len(alphabet)))]
        (src / "labels.csv").write_bytes(content)
        try:
            report = import_folder(src, out, RATE)
            used = {row["file"] for row in rows_of(out)}
            named = {name for found in report.problems.values() for name in found}
            assert used | {name for name in ("a.wav", "b.wav") if name in named} == {"a.wav", "b.wav"}
            outcomes.add("imported with problems" if report.problems else "imported")
        except UserError as error:
            assert "my sounds" in str(error) and "\n" not in str(error)
            outcomes.add("refused")
        shutil.rmtree(out, ignore_errors=True)
    assert len(outcomes) == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that takes nothing")
def test_a_recording_that_finds_the_disk_full_is_the_systems_own_error(src, tmp_path, monkeypatch):
    sound(src / "a.wav", 0)
    monkeypatch.setattr(folder, "stored_as", lambda recording: (np.zeros(RATE, np.int16), "full"))
    monkeypatch.setattr(Path, "exists", lambda path: False)
    (tmp_path / "full.flac").symlink_to("/dev/full")
    with pytest.raises(OSError) as error:
        folder._store(src / "a.wav", tmp_path, RATE, folder.Report(), "a.wav")
    assert error.value.errno == errno.ENOSPC


@pytest.mark.parametrize("number, code", [(errno.ENOSPC, 2), (errno.EACCES, 2), (errno.EIO, None)])
def test_a_full_disk_is_one_line(capsys, number, code):
    def main():
        raise OSError(number, os.strerror(number), "data/x")
    with pytest.raises(SystemExit if code else OSError) as stop:
        cli.run(main)
    assert not code or stop.value.code == code and capsys.readouterr().err == f"error: data/x: {os.strerror(number)}\n"

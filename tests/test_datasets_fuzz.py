"""datasets.py, folder.py, manifest.py under damage: 500 recordings, 500 manifests, the tables of 15 sets; each is named or read."""
import json

import numpy as np
import pytest
import soundfile

import published
from af_min import datasets, manifest, readers
from af_min.cli import UserError
from af_min.folder import Report, import_folder
from test_datasets import RATE, home, rows_of          # noqa: F401 (a fixture)


def damaged(rng, content: bytes) -> bytes:
    """Bytes changed, taken out, put in or cut off, at one to eight random places."""
    content = bytearray(content)
    for _ in range(int(rng.integers(1, 9))):
        at, length = int(rng.integers(0, len(content))), int(2 ** rng.uniform(0, 10))
        junk = rng.integers(0, 256, length, dtype=np.uint8).tobytes()
        match int(rng.integers(0, 4)):
            case 0: content[at:at + length] = junk
            case 1: del content[at:at + length]
            case 2: content[at:at] = junk
            case _: content = content[:max(1, at)]
        content = content or bytearray(b"\0")
    return bytes(content)


def test_five_hundred_malformed_recordings_are_named(home):
    """Random damage to 540 wav, flac, ogg and mp3 files: no traceback, and every file is either in a row or in the report, by name.

    At least 500 are in the report; the others, in which samples alone are hit, still decode to their end."""
    rng, good = np.random.default_rng(0), {}
    (home / "mine").mkdir()
    for extension in ("wav", "flac", "ogg", "mp3"):
        soundfile.write(home / f"x.{extension}", rng.standard_normal(8_000) * 0.1, RATE)
        good[extension] = (home / f"x.{extension}").read_bytes()
    for n in range(540):
        extension = list(good)[n % 4]
        bad = damaged(rng, good[extension])
        assert bad != good[extension]
        (home / "mine" / f"dog-{n}.{extension}").write_bytes(bad)
    (home / "mine" / "dog-good.wav").write_bytes(good["wav"])
    report = import_folder("mine", home / "out", RATE, labels_from_names=True)
    used = {row["file"] for row in rows_of(home / "out")}
    named = {name.split(" (")[0] for names in report.problems.values() for name in names}
    assert used | named == {path.name for path in (home / "mine").iterdir()} and len(used | named) == 541 and "dog-good.wav" in used
    assert len(named - used) >= 500, {reason: len(names) for reason, names in report.problems.items()}
    assert manifest.check(home / "out") == []


def test_five_hundred_malformed_manifests_are_read_or_named_by_line(tmp_path):
    """`read_rows` stops at the first bad line by its number, `check` names every one: the others are rows, and none is lost."""
    rng, path, named = np.random.default_rng(1), tmp_path / "train.jsonl", 0
    rows = [{"audio": f"audio/{n}.flac", "start": 0.5, "task": "AQA", "prompt": "what is it?", "answer": "a d\u00f6g"} for n in range(5)]
    manifest.write_rows(path, rows + [{"audio": "a.flac", "task": "Dialogue", "turns": [{"user": "hi", "assistant": "yes"}], "shots": [rows[0]]}])
    manifest.write_card(tmp_path)
    good = path.read_bytes()
    trials = 0
    while named < 500:
        trials += 1
        path.write_bytes(bad := damaged(rng, good))
        wrong = manifest.check(tmp_path)                               # the recordings are missing, too
        assert path.read_bytes() == bad and any("test.jsonl: cannot be read" in line for line in wrong)
        try:
            lines = bad.decode("utf-8-sig").split("\n")
        except UnicodeDecodeError:
            lines = []
            assert any(line.startswith(f"{path}: not UTF-8") for line in wrong)
        known = {number: line for number, line in enumerate(lines, 1)
                 if any(said.startswith(f"{path}:{number}: ") for said in wrong)}
        left = [json.loads(line) for number, line in enumerate(lines, 1) if line.strip() and number not in known]
        assert all(isinstance(row, dict) and row["task"] and (row.get("answer") or row.get("turns")) for row in left)
        try:
            assert all(row.items() >= whole.items() for row, whole in zip(manifest.read_rows(path), left, strict=True)) and not known
        except UserError as error:
            first = f"{path}:{min(known)}: " if lines else f"{path}: not UTF-8"
            assert str(error).startswith(first) and "\n" not in str(error)
            named += 1
    assert trials < 600, "most of the damage is real"


def leaves(value, where=()):
    """The places of all values inside a JSON value."""
    yield where
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from leaves(value[key], (*where, key))


@pytest.mark.parametrize("name", [name for name, entry in datasets.TABLE.items() if name not in ("ravdess", "crema_d", "gtzan", "cochlscene")])
def test_malformed_tables_are_read_or_named(name, tmp_path):
    """Forty damaged copies of every set's tables (600 in all): bytes, and in JSON a value of another kind. Entries are whole ones."""
    rng, folder, refused = np.random.default_rng(2), tmp_path / "source", 0
    content, brought = getattr(published, name)()
    files = {}
    for path, what in (content | brought).items():
        files |= what if isinstance(what, dict) else {path: what}
    for path, what in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(what)
    tables = [path for path in files if path.endswith((".csv", ".json", ".yaml", ".txt")) and files[path][:1] != b"#"]
    for trial in range(40):
        path = tables[trial % len(tables)]
        bad = damaged(rng, files[path])
        if path.endswith(".json") and trial % 3:
            value = json.loads(files[path])
            *where, last = list(leaves(value))[int(rng.integers(1, len(list(leaves(value)))))]
            spot = value
            for key in where:
                spot = spot[key]
            spot[last] = [None, 7, "", "\ud800", [], {}, [[1]], True, {"a": 1}, 1.5][trial % 10]
            bad = json.dumps(value).encode()
        (folder / path).write_bytes(bad)
        try:
            entries = datasets._resolved(name, datasets.TABLE[name].read(found := readers.Source([folder], Report())), found)
            for entry in entries:
                manifest.check_row({**entry, "audio": entry["file"]}, "entry")
                assert (folder / found.paths[entry["file"]]).is_file() and entry["split"] in ("", *manifest.SPLITS)
            json.dumps(found.report.problems, ensure_ascii=False).encode()
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and (name in str(error) or path.rsplit("/")[-1] in str(error)), error
        (folder / path).write_bytes(files[path])

"""Prepared data sets on disk: rows (one sample a line), a card that says what they hold, and folders that are whole or absent.

    data/<name>/train.jsonl  val.jsonl  test.jsonl  audio/  card.json

A row is a JSON object. `audio` is a path inside the data set, `start` the second at which the sample begins:

    {"audio": "audio/x.flac", "start": 0.0, "task": "AudioCaptioning", "prompt": "...", "answer": "..."}

Instead of `answer` it may have `answers` (several references, all right) or, without `prompt`, a dialogue in `turns`
([{"user": "...", "assistant": "..."}, ...]). `shots` holds other rows, as examples before the question (retrieval.py writes
them). `group` names the origin (a speaker, a source recording) of what must stand in one split. Further fields pass through
untouched; `seconds` (length of the sample) is added up into the card's hours.
"""
from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from . import audio, audio_files
from .cli import UserError, alone

SPLITS = ("train", "val", "test")
CARD, COUNTED = "card.json", ("splits", "hours", "sha256")
HALF_LETTER = re.compile("[\ud800-\udfff]")             # half of a pair of UTF-16, which no file can hold


@contextlib.contextmanager
def nothing_is_garbage() -> Iterator[None]:
    """Python looks among many new objects for cycles that nobody holds. Of a data set's rows all stay, and looking them through
    takes time for nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def write_rows(path, rows: Iterable[dict]) -> int:
    """One JSON object a line, checked as in `read_rows`; the file appears under its name when it is complete. Returns the count."""
    path, count = Path(path), 0
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8", newline="\n") as file:
        for count, row in enumerate(rows, 1):
            check_row(row, f"{path}:{count}")
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(partial, path)
    return count


@nothing_is_garbage()
def read_rows(path) -> list[dict]:
    """The rows of a manifest with `start` filled in. UserError names file:line, the field and what was expected."""
    return [_row(line, where) for where, line in _lines(path)]


def _lines(path) -> Iterator[tuple[str, str]]:
    """(file:number, line) of all that are not empty."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from ((f"{path}:{number}", line) for number, line in enumerate(file, 1) if line.strip())
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; a manifest is one JSON object a line") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); prepare_data.py writes it") from None


def _row(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        raise UserError(f"{where}: not a JSON object: {line.strip()[:60]!r}") from None
    check_row(row, where)
    return {**row, "start": float(row.get("start", 0.0))}


def whole_lines(path: Path) -> Iterator[tuple[dict, int]]:
    """JSON objects of a file that grows line by line, each with the byte where its line ends, up to one that is cut off or none."""
    end = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            return
        if not (isinstance(entry, dict) and line.endswith(b"\n")):
            return
        end += len(line)
        yield entry, end


def text(value) -> bool:
    return isinstance(value, str) and bool(value.strip()) and (value.isascii() or not HALF_LETTER.search(value))


def number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")


def inside(path) -> bool:
    return text(path) and not path.startswith("/") and ".." not in path.split("/")


def example(row) -> bool:
    return (isinstance(row, dict) and (row.get("audio") is None or inside(row["audio"])) and number(row.get("start", 0))
            and text(row.get("prompt")) and text(row.get("answer")))


def check_row(row, where: str) -> None:
    """Every rule of the format for one row. UserError: `where: field: expected ..., got ...`."""
    def need(good: bool, name: str, expected: str):
        if not good:
            got = repr(row.get(name, "nothing"))[:60] if isinstance(row, dict) else repr(row)[:60]
            raise UserError(f"{where}: {name}: expected {expected}, got {got}")

    need(isinstance(row, dict), "row", "a JSON object")
    audio = row.get("audio")
    need(inside(audio) or audio is None and text(row.get("description")),
         "audio", "a path inside the data set (or none, with a description: text for the language model alone)")
    need(text(row.get("task")), "task", "a name such as AudioCaptioning")
    for name in ("start", "seconds"):
        need(number(row.get(name, 0)), name, "a number of seconds, 0 or more")
    forms = [name for name in ("answer", "answers", "turns") if name in row]
    need(len(forms) == 1, "answer", "exactly one of answer, answers, turns")
    if forms == ["turns"]:
        turns = row["turns"]
        need(isinstance(turns, list) and turns and all(
            isinstance(turn, dict) and text(turn.get("user")) and text(turn.get("assistant")) for turn in turns),
            "turns", 'a list of {"user": text, "assistant": text}')
    else:
        need(text(row.get("prompt")), "prompt", "text")
        answers = row["answers"] if forms == ["answers"] else [row["answer"]]
        need(isinstance(answers, list) and answers and all(map(text, answers)), forms[0],
             "text" if forms == ["answer"] else "a list of texts")
    for name in ("shots", "pool"):
        examples = row.get(name, [])
        need(isinstance(examples, list) and all(map(example, examples)), name, 'a list of rows, each with "prompt" and "answer"')
    need("group" not in row or text(row["group"]), "group", "text")


def recordings(rows: Iterable[dict]) -> list[tuple[str, float]]:
    """(file, start) of every recording that the rows, their shots and their pools name."""
    parts = (part for row in rows for part in [row, *row.get("shots", []), *row.get("pool", [])])
    return [(p["audio"], p.get("start", 0.0)) for p in parts if p.get("audio")]


def check_replaceable(out) -> None:
    """UserError if `out` is there and is no prepared data set: nothing else is ever overwritten."""
    out = Path(out)
    if out.exists() and not (out / CARD).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not a prepared data set; give another --out or move it away")


@contextlib.contextmanager
def dataset_folder(out) -> Iterator[Path]:
    """A new folder to fill; it gets the name `out` when the block ends well, and vanishes otherwise.

    An older data set of that name is replaced; a folder that is no data set (no card.json) is never touched: UserError.
    Where `out` is a link, what it leads to is meant.
    """
    check_replaceable(out)
    out = Path(out).resolve()
    partial, old = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    with alone(out, "--out"):
        for left_over in (partial, old):
            shutil.rmtree(left_over, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            assert (partial / CARD).is_file(), f"got no {CARD} in {partial}, expected write_card to be called last"
            if out.exists():
                os.replace(out, old)
            os.replace(partial, out)
        finally:
            for left_over in (partial, old):
                shutil.rmtree(left_over, ignore_errors=True)


def write_card(folder, **facts) -> dict:
    """Write card.json, last of all: `facts` (source, licence, ...), rows per split and task, hours, and the hash of all files."""
    folder = Path(folder)
    splits, spans = {}, {}
    for split in SPLITS:
        rows = read_rows(folder / f"{split}.jsonl") if (folder / f"{split}.jsonl").is_file() else []
        splits[split] = {"rows": len(rows), "tasks": dict(sorted(Counter(row["task"] for row in rows).items()))}
        spans |= {(row["audio"], row["start"]): row["seconds"] for row in rows if "seconds" in row}
    card = {**facts, "splits": splits, "hours": round(sum(spans.values()) / 3600, 4), "sha256": dataset_hash(folder)}
    partial = folder / (CARD + ".partial")
    partial.write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, folder / CARD)
    return card


def read_card(folder) -> dict:
    """The card of a whole data set; UserError where there is none."""
    path = Path(folder) / CARD
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{folder}: no prepared data set there ({CARD} is missing); run prepare_data.py first") from None
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise UserError(f"{path}: not JSON; run prepare_data.py again") from None


def update_card(folder, **facts) -> dict:
    """The card of a data set whose rows have changed: its facts stay, `facts` join, all else is counted anew."""
    return write_card(folder, **{name: fact for name, fact in read_card(folder).items() if name not in COUNTED} | facts)


def dataset_hash(folder) -> str:
    """sha256 over (name, size, bytes) of every file but card.json and the embeddings, in the order of their names."""
    folder, digest = Path(folder), hashlib.sha256()
    files = sorted((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if path.is_file())
    for name, path in files:
        if name not in (CARD, CARD + ".partial") and not name.startswith("embeddings/"):
            digest.update(f"{name}\0{path.stat().st_size}\0".encode())
            with open(path, "rb") as file:
                hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def check(folder) -> list[str]:
    """All that is wrong with a prepared data set, each with its file or line; [] if nothing is.

    The rows are as many as the card says, every row has its fields, every recording (of rows, shots and pools) opens and decodes
    to its end, `start` lies inside of it, and no group and no recording stands in two splits, the latter neither by name nor by
    its decoded samples.
    """
    folder, wrong = Path(folder), []
    starts, splits, groups = {}, defaultdict(dict), defaultdict(dict)   # recording -> latest start; recording, group -> {split: a row}
    counted = read_card(folder).get("splits", {})
    for split in SPLITS:
        path = folder / f"{split}.jsonl"
        try:
            lines = list(_lines(path))
        except UserError as error:
            wrong.append(str(error))
            continue
        if len(lines) != (told := counted.get(split, {}).get("rows", len(lines))):
            wrong.append(f"{path}: {len(lines)} rows, {CARD} tells of {told}")
        for where, line in lines:
            try:
                row = _row(line, where)
            except UserError as error:
                wrong.append(str(error))
                continue
            for name, start in recordings([row]):
                starts[name] = max(starts.get(name, 0.0), start)
            if row.get("audio"):
                splits[row["audio"]].setdefault(split, Path(where).name)
                groups[row.get("group")].setdefault(split, Path(where).name)
    together = [(f"group {group!r:.60}", of) for group, of in groups.items() if group]
    sounds = defaultdict(list)                             # hash of the samples, or the name of what cannot be read -> names
    for name in tqdm(sorted(starts), "recordings", unit="file", mininterval=0.5):
        sound = name
        try:
            seconds = audio_files.inspect(folder / name)
            with audio_files.opened(folder / name) as file:
                rate = file.samplerate
            samples = audio.load(folder / name, rate).samples
            sound = hashlib.sha256(samples.tobytes()).digest()
            if not starts[name] < seconds:
                wrong.append(f"{folder / name}: start {starts[name]} s lies outside its {seconds:.2f} s")
        except audio_files.AudioError as error:
            wrong.append(str(error))
        if name in splits:                                 # not in shots and pools alone
            sounds[sound].append(name)
    together += [("the sound of " + ", ".join(names), {split: row for name in names for split, row in splits[name].items()})
                 for names in sounds.values()]
    return wrong + [f"{folder}: {what}: in the splits {' and '.join(of)} ({', '.join(of.values())})"
                    for what, of in together if len(of) > 1]

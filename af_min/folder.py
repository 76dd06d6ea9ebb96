"""A user's own recordings -> a prepared data set (format: manifest.py).

    my_sounds/                  file,answer                          file,prompt,answer,split
      labels.csv                dogs/rex.wav,dog                     rex.wav,how many barks?,three,train
      dogs/rex.wav              bell.mp3,"a bell, far away"          rex.wav,is it near?,yes,train

Columns `prompt`, `split` (train, val, test), `task` and `group` are optional; a file may have several rows. What is of one group
(a speaker, a source recording) stands in one split and never is an example beside its own questions. Without a CSV a file's
answer is the name of its folder or, on request, its own name without digits and separators (dog-012.wav -> dog).

Nothing is dropped silently: every file and row that cannot be used is counted and named in the report, with the reason.
Recordings become mono 16-bit flac, named by their content, so that the same sound never stands in two splits.
"""
from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from . import audio, audio_files, manifest
from .audio_files import AudioError
from .cli import UserError
from .metrics import normalized

PROMPTS = {"AudioClassification": "classify this sound.", "AudioCaptioning": "describe the sound in a sentence."}
SPLIT_NAMES = {"": "", "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
               "test": "test", "testing": "test", "eval": "test"}
COLUMNS = ("file", "answer", "prompt", "split", "task", "group")
FORM = ("task", "prompt", "answer", "answers", "turns", "group", "seconds", "file")      # fields of a row that an entry brings
MAX_SECONDS = 60.0         # of a recording that are kept
ADVICE = "put a CSV with the header file,answer (or file,prompt,answer) into it"


@dataclass
class Report:
    """What was imported and what was not. `problems`: reason -> names of files or CSV rows."""
    card: dict = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def __str__(self) -> str:
        card, names = self.card, 5
        rows = ", ".join(f"{split} {facts['rows']}" for split, facts in card["splits"].items())
        lines = [f"{card['recordings']} recordings, {card['hours']:.2f} h, {card['classes']} different answers; rows: {rows}",
                 f"sha256 {card['sha256']}"]
        for reason, found in sorted(self.problems.items()):
            more = f" and {len(found) - names} more (all in card.json)" if len(found) > names else ""
            lines.append(f"not used, {reason}: {len(found)}: {', '.join(found[:names])}{more}")
        return "\n".join(lines)


def import_folder(source, out, sample_rate: int, seed: int = 0, labels_from_names: bool = False) -> Report:
    """Write the data set `out` from the folder `source`. Longer recordings keep their first MAX_SECONDS (and are reported).

    The same folder and seed give the same files, byte for byte. UserError: no such folder, no answers to be had, a CSV
    without its columns, or nothing usable.
    """
    source, report = Path(source), Report()
    if not source.is_dir():
        raise UserError(f"{source}: there is no such folder")
    if Path(out).resolve() in (source.resolve(), *source.resolve().parents):
        raise UserError(f"{out}: holds the recordings themselves; give another --out")
    files = _audio_files(source, Path(out), report)
    table = _find_csv(source)
    if table and not labels_from_names:
        entries = _from_csv(table, files, report)
        named = {entry["file"] for entry in entries}
        report.problems["no usable row in the CSV"] += [name for name in files if name not in named]
    else:
        entries = _from_names(source, files, labels_from_names, report)
    return write_dataset(out, entries, files, report, sample_rate, str(source), seed,
                         source=f"imported from the folder {source.resolve().name}", licence="its owner's")


def write_dataset(out, entries: list[dict], paths: dict[str, Path], report: Report, sample_rate: int, where: str, seed: int,
                  val: float = 0.1, test: float = 0.2, **facts) -> Report:
    """Write the data set `out`: the one way for every recording that comes in.

    An entry is {"file"} and "answer", "answers" or "turns", and where wanted "task", "prompt", "split" (train, val, test) and "group"
    (what must not be in two splits; a recording by itself if not given). `paths`: where each file lies. `where`: what an error names.
    `val`, `test`: shares of what has no split. `facts` go into the card.
    """
    with manifest.dataset_folder(out) as folder:
        (folder / "audio").mkdir()
        stored = {}                                        # file -> {"content": a hash, "seconds"}
        for name in tqdm(sorted({entry["file"] for entry in entries}), "recordings", unit="file", mininterval=0.5):
            try:
                stored[name] = _store(paths[name], folder / "audio", sample_rate, report, name)
            except AudioError as error:
                report.problems["silent (the first channel, the only one heard)" if error.reason == "silent" else error.reason].append(name)
        entries = _distinct([entry | stored[entry["file"]] for entry in entries if entry["file"] in stored], report)
        if not entries:
            found = "; ".join(f"{reason}: {len(names)}, e.g. {names[0]}" for reason, names in report.problems.items() if names)
            nothing = "none has a name, or stands in a table, as expected" if paths else "no wav, flac, ogg or mp3 in it"
            raise UserError(f"{where}: no usable recording ({found or nothing})")
        _fill_in(entries)
        entries = _split(entries, seed, val, test, report)
        rows, asked = defaultdict(list), {}
        for entry in entries:
            row = {"audio": f"audio/{entry['content']}.flac", "start": 0.0} | {name: entry[name] for name in FORM if entry.get(name)}
            same = asked.setdefault((entry["content"], entry["task"], entry.get("prompt")), row)
            if entry["split"] == "train" or same is row or "turns" in row or "turns" in same:
                rows[entry["split"]].append(row)
            else:                                          # a further answer to a question that is scored: any of them is right
                same["answers"] = list(dict.fromkeys(answer for of in (same, row) for answer in of.get("answers") or [of["answer"]]))
                same.pop("answer", None)
        used = {entry["content"] for entry in entries}
        for path in (folder / "audio").iterdir():
            if path.stem not in used:
                path.unlink()
        for split in manifest.SPLITS:
            manifest.write_rows(folder / f"{split}.jsonl", rows[split])
        report.problems = {reason: found for reason, found in report.problems.items() if found}
        report.card = manifest.write_card(
            folder, name=Path(out).name, **facts, sample_rate=sample_rate, seed=seed, recordings=len(used),
            classes=len({_said(entry) for entry in entries}), not_used=report.problems)
    return report


def readable(name: str) -> str:
    """A file's name as a table spells it: letters composed (macOS stores them in parts)."""
    return unicodedata.normalize("NFC", decoded(os.fsencode(name), "utf-8"))


def decoded(data: bytes, encoding: str = "utf-8-sig") -> str:
    """What is not UTF-8 is read as Latin-1."""
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return data.decode("latin-1")


def walk(root, *apart) -> Iterator[Path]:
    """Every file below `root`, in the order of names, also behind links to folders, but for hidden ones, the folders `apart`, links
    that lead back up and, behind a link, links to what was seen before: folders that lead to each other would have no end."""
    above, seen = {str(root): (list(map(os.path.realpath, (root, *apart))), False)}, set()       # is a folder behind a link?
    for folder, inner, names in os.walk(root, followlinks=True):
        closed, behind = above.pop(folder)
        found, inner[:] = sorted(name for name in inner if not name.startswith((".", "__MACOSX"))), []
        for name in found:
            path = os.path.join(folder, name)
            real, link = os.path.realpath(path), os.path.islink(path)
            if real not in closed and not (behind and link and real in seen):
                inner.append(name)
                above[path] = [*closed, real], behind or link
                seen.add(real)
        yield from (Path(folder) / name for name in sorted(names) if not name.startswith("."))


def _audio_files(source: Path, out: Path, report: Report) -> dict[str, Path]:
    """Readable name, relative to `source` with forward slashes -> file."""
    prepared = functools.cache(lambda folder: (folder / manifest.CARD).is_file())
    found = {}
    for path in walk(source, out):
        name = readable(path.relative_to(source).as_posix())
        if any(prepared(source / home) for home in path.relative_to(source).parents if home.name):
            report.problems["inside of a prepared data set"].append(name)
        elif name in found:
            report.problems["a second file of this name (its letters stored in another way)"].append(name)
        elif name.lower().endswith(audio_files.EXTENSIONS):
            found[name] = path
        elif not name.lower().endswith(".csv"):
            report.problems["not a wav, flac, ogg or mp3"].append(name)
    return found


def _find_csv(source: Path) -> Path | None:
    tables = sorted(path for path in source.iterdir() if path.suffix.lower() == ".csv" and not path.name.startswith("."))
    if len(tables) > 1:
        raise UserError(f"{source}: {len(tables)} CSV files ({', '.join(path.name for path in tables[:4])}); leave one")
    return tables[0] if tables else None


def _from_csv(table: Path, files: dict[str, Path], report: Report) -> list[dict]:
    """Rows of the CSV as entries; what is wrong goes into the report."""
    try:
        text = table.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{table}: not UTF-8; save it as 'CSV UTF-8'") from None
    lines = csv.reader(io.StringIO(text.replace("\0", ""), newline=""), delimiter=_delimiter(text), strict=True)
    home = f"{readable(table.parent.resolve().as_posix())}/"
    entries, at = [], 0                                    # at: the last line of the row before
    try:
        header = [name.strip().lower() for name in next(lines, [])]
        if not {"file", "answer"} <= set(header) or any(header.count(name) > 1 for name in COLUMNS):
            raise UserError(f"{table}:1: expected the columns file, answer and optionally prompt, split, task, "
                            f"group, each once; got {', '.join(header)[:80] or 'nothing'}")
        at = lines.line_num
        for cells in lines:
            at = lines.line_num
            if not any(cell.strip() for cell in cells):
                continue
            where = f"{table.name}:{at}"
            entry = {"split": "", **{name: " ".join(cell.split()) for name, cell in zip(header, cells) if name in COLUMNS}}
            split = SPLIT_NAMES.get(entry["split"].lower())
            if len(cells) != len(header):
                report.problems["row with too many or too few fields"].append(where)
            elif not entry["answer"]:
                report.problems["row without an answer"].append(where)
            elif split is None:
                report.problems["row with a split that is not train, val or test"].append(f"{where} ({entry['split'][:20]})")
            else:
                raw = cells[header.index("file")].strip().replace("\\", "/")
                name = unicodedata.normalize("NFC", str(PurePosixPath(raw))).removeprefix(home)
                if name in files:
                    entries.append({**entry, "file": name, "split": split})
                else:
                    report.problems["row naming a file that is not there"].append(f"{where} ({raw[:60]})")
    except csv.Error as error:
        raise UserError(f"{table}:{at + 1}: not a CSV ({error}): are quotation marks closed, and doubled inside of a text?") from None
    return entries


def _delimiter(text: str) -> str:
    """Semicolons are what spreadsheets write where the comma is the decimal sign; tabs are what is copied out of them."""
    header = re.split("[\r\n]", text, maxsplit=1)[0]
    return next((other for other in ";\t" if other in header and "," not in header), ",")


def _from_names(source: Path, files: dict[str, Path], by_file: bool, report: Report) -> list[dict]:
    entries = []
    for name in files:
        path = PurePosixPath(name)
        label = re.sub(r"[\W\d_]+" if by_file else r"[\s_-]+", " ", path.stem if by_file else path.parent.name).strip()
        if label:
            entries.append({"file": name, "answer": label})
        else:
            report.problems["no label in its name" if by_file else "not in a folder that names it"].append(name)
    if files and not entries:
        raise UserError(f"{source}: no CSV and no names to take answers from; {ADVICE}, sort the files into folders "
                        "named after their answers, or use --labels-from-names")
    return entries


def stored_as(recording: audio.Recording) -> tuple[np.ndarray, str]:
    """16-bit samples, and the name that their file has in a data set."""
    samples = np.round(recording.samples * 32767).astype(np.int16)
    return samples, hashlib.sha256(samples.tobytes()).hexdigest()[:24]


def _store(path: Path, folder: Path, sample_rate: int, report: Report, name: str) -> dict:
    """Check and convert one recording. AudioError says what is wrong with it."""
    import soundfile                           # as late as in audio_files.py
    audio_files.inspect(path)
    recording = audio.load(path, sample_rate, max_seconds=MAX_SECONDS)
    if recording.silent:
        raise AudioError(path, "silent", f"its first {MAX_SECONDS} s hold nothing but zeros")
    if recording.dropped_seconds > 0:
        report.problems[f"what lies beyond {MAX_SECONDS:g} s of a recording"].append(f"{name} ({recording.dropped_seconds:.1f} s)")
    samples, content = stored_as(recording)
    if not (folder / f"{content}.flac").exists():
        file = io.BytesIO()                                # of a full disk soundfile would say "System error" and no more
        soundfile.write(file, samples, sample_rate, format="FLAC", subtype="PCM_16")
        (folder / f"{content}.flac").write_bytes(file.getvalue())
    return {"content": content, "seconds": round(recording.seconds, 4)}


def _distinct(entries: list[dict], report: Report) -> list[dict]:
    """Entries without exact repetitions (a row given twice, or a copy of a file with the same answer)."""
    seen, kept = {}, []
    for entry in entries:
        key = (entry["content"], entry.get("prompt", ""), _said(entry))
        if key in seen:
            report.problems["the same sound and answer again"].append(f"{entry['file']} (as {seen[key]})")
        else:
            seen[key] = entry["file"]
            kept.append(entry)
    return kept


def _said(entry: dict) -> str:
    """What the entry answers, as one text; capitals and a full stop make no other answer, as in scoring."""
    return normalized(entry["answer"]) if entry.get("answer") else json.dumps(entry.get("answers") or entry["turns"], ensure_ascii=False)


def _fill_in(entries: list[dict]) -> None:
    """Task and prompt where the CSV has none: a question with its own prompt is AQA; otherwise answers that repeat
    (on average at least twice) are class names, and answers that differ are captions."""
    answers = [entry["answer"] for entry in entries if entry.get("answer") and not entry.get("prompt")]
    default = "AudioClassification" if len(answers) >= 2 * len(set(answers)) else "AudioCaptioning"
    for entry in entries:
        entry["task"] = entry.get("task") or ("AQA" if entry.get("prompt") else default)
        if "turns" not in entry:
            entry["prompt"] = entry.get("prompt") or PROMPTS.get(entry["task"], PROMPTS[default])


def _split(entries: list[dict], seed: int, val: float, test: float, report: Report) -> list[dict]:
    """The entries, each with its split, without those that contradict. A sound is of the first group that has it. A given split wins, the
    first one if a sound has two; the rest is sampled so that every answer gets its share of every split.

    Groups are sorted by answer and, inside an answer, by a hash with the seed; every (1 / share)-th goes to the split. An
    answer that only one group has stays in training, unless most groups are like that (captions).
    """
    given, answer_of, group_of = {}, {}, {}
    for entry in entries:
        group = group_of.setdefault(entry["content"], entry.get("group") or entry["content"])
        answer_of.setdefault(group, _said(entry))
        if entry.get("split"):
            given.setdefault(group, entry["split"])

    def shuffled(group: str) -> str:
        return hashlib.sha256(f"{seed} {group}".encode()).hexdigest()

    count = Counter(answer_of.values())
    repeats = 2 * sum(number > 1 for number in map(count.get, answer_of.values())) >= len(answer_of)
    free = sorted((group for group, answer in answer_of.items() if group not in given and (count[answer] > 1 or not repeats)),
                  key=lambda group: (answer_of[group] if repeats else "", shuffled(group)))
    splits = dict.fromkeys(answer_of, "train") | given
    for split, share in (("test", test), ("val", val / (1 - test))):
        offset = int(shuffled(split)[:8], 16) / 2 ** 32
        chosen = {group for i, group in enumerate(free) if int((i + 1) * share + offset) > int(i * share + offset)}
        splits |= dict.fromkeys(chosen, split)
        free = [group for group in free if group not in chosen]
    kept = []
    for entry in entries:
        split = splits[group_of[entry["content"]]]
        if (entry.get("split") or split) == split == splits.setdefault(entry.get("group") or entry["content"], split):
            kept.append({**entry, "split": split})
        else:
            report.problems["its sound or group is in another split"].append(entry["file"])
    return kept

"""Published layouts of public data sets -> entries of folder.write_dataset, one short reader a set (the table: datasets.py).

Prompts are those of the released Audio Flamingo. Files are looked up by the last parts of their path, so that an archive, an
unpacked copy and a folder that one sorted oneself are read alike. Splits are the published ones; where there are none, speakers
or source recordings are never divided (ESC-50: fold 4 val, 5 test; UrbanSound8K: 9 and 10). Cuts of one recording are a group. The
test split is read first: a sound that is published in two splits stays in the test split.
"""
from __future__ import annotations

import csv
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from . import audio_files, text
from .cli import UserError
from .folder import PROMPTS, Report, decoded, readable, walk

CAPTION, CLASSIFY = PROMPTS["AudioCaptioning"], PROMPTS["AudioClassification"]
EMOTION, INSTRUMENT = "what is the emotion of this speech?", "what is the instrument of this music?"
EXTENSIONS = (*audio_files.EXTENSIONS, ".au")
AGAIN = "If it was downloaded, remove it: it is then fetched again"


class Source:
    """The files below some folders, found by name; what a table lacks goes into the report."""

    def __init__(self, folders: Iterable[Path], report: Report):
        self.report, self.paths, self.close = report, {}, defaultdict(list)
        for root in folders:
            for path in walk(root):
                self.paths.setdefault(_plain(path.relative_to(root).as_posix()), path)
        for name in self.paths:
            self.close[_letters(name)].append(name)

    def find(self, name: str) -> str | None:
        """The file whose path ends in `name`, or the only one of its last part, or the only one with its letters and digits.

        A name without an extension is a recording's; one that begins with "/" must have its folder, too."""
        if Path(name).suffix.lower() not in (*EXTENSIONS, ".csv", ".json", ".txt", ".yaml"):
            return next(filter(None, (self.find(name + extension) for extension in EXTENSIONS)), None)
        strict, name = name.startswith("/"), _plain(name.lstrip("/"))
        if name in self.paths:
            return name
        alike = self.close.get(_letters(name), [])
        exact = [path for path in alike if f"/{path}".endswith(f"/{name}")]
        named = [path for path in alike if path.rsplit("/")[-1] == name.rsplit("/")[-1]]
        best = exact or (named or alike if not strict else [])
        return best[0] if exact or len(best) == 1 else None

    def meant(self, name: str, table: str) -> list[str]:
        """Recordings that a user's own table may mean by a name: the one beside the table, else the one below the folder, else all whose
        path ends so. Never one of a similar name."""
        names = [_plain(name)] if name.lower().endswith(EXTENSIONS) else [_plain(name) + extension for extension in EXTENSIONS]
        for path in (f"{place}/{plain}".lstrip("/") for place in (table.rpartition("/")[0], "") for plain in names):
            if path in self.paths:
                return [path]
        return [path for path in self.recordings() if f"/{path}".endswith(tuple(f"/{plain}" for plain in names))]

    def recordings(self) -> list[str]:
        return [name for name in self.paths if name.lower().endswith(EXTENSIONS)]

    def text(self, name: str) -> str:
        """Of a table, whatever its encoding; "" where it is not there, which is reported."""
        found = self.find(name)
        if not found:
            self.report.problems["table that is not there"].append(name)
            return ""
        return decoded(self.paths[found].read_bytes())

    def csv(self, name: str, *columns: str) -> Iterator[dict[str, str]]:
        """Rows by the letters and digits of the header's names; `columns` must be there and filled."""
        where = self.paths.get(self.find(name), name)
        lines = csv.reader(io.StringIO(self.text(name).replace("\0", ""), newline=""))
        try:
            header = [_letters(cell) for cell in next(lines, columns)]
            if not set(columns) <= set(header):
                raise UserError(f"{where}: expected the columns {', '.join(columns)}; got {', '.join(header)[:80]}. {AGAIN}")
            for cells in lines:
                row = dict(zip(header, map(str.strip, cells)))
                if all(row.get(column) for column in columns):
                    yield row
                elif cells:
                    self.report.problems["row with an empty field"].append(f"{name}:{lines.line_num}")
        except csv.Error as error:
            raise UserError(f"{where}:{lines.line_num}: not a CSV ({error}). {AGAIN}") from None

    def json(self, name: str, empty):
        content = self.text(name)
        try:
            return json.loads(content) if content else empty
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.paths[self.find(name)]}: not JSON ({error}). {AGAIN}") from None


def _plain(name: str) -> str:
    """Names as they should be: composed letters, forward slashes, single blanks, none before the extension."""
    return re.sub(r"\s+(?=\.\w+$)", "", " ".join(readable(name.replace("\\", "/")).split()))


def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.rsplit("/")[-1].lower())


def row(file: str, task: str, prompt: str, answers: str | list[str], split: str = "", group: str = "",
        options: Iterable[str] = ()) -> dict:
    """An entry; several different answers are references, all right. Options are listed in the order of the alphabet."""
    answers = [answers] if isinstance(answers, str) else answers
    entry = {**text.question(task, prompt, sorted(options)), "answer": answers[0], "file": file, "split": split}
    if len(set(answers)) > 1:
        del entry["answer"]
        entry["answers"] = answers
    return entry | ({"group": group} if group else {})


def question(asked: str, answers: list[str]) -> str:
    return f"please answer this question: {asked}" + ("\noptions:\nyes.\nno." if set(answers) <= {"yes", "no"} else "")


def references(lines: Iterable[tuple]) -> dict:
    """{key: [reference, ...]} of (key, reference)."""
    found = defaultdict(list)
    for key, reference in lines:
        found[key].append(reference)
    return found


# ---------------------------------------------------------------------- one reader a data set

def clotho(s: Source) -> Iterator[dict]:
    for name, split in (("evaluation", "test"), ("validation", "val"), ("development", "train")):
        columns = [f"caption{i}" for i in range(1, 6)]
        for line in s.csv(f"clotho_captions_{name}.csv", "filename", *columns):
            yield row(f"{name}/{line['filename']}", "AudioCaptioning", CAPTION, [line[column] for column in columns], split)


def clotho_aqa(s: Source) -> Iterator[dict]:
    for split in ("test", "val", "train"):
        lines = s.csv(f"clotho_aqa_{split}.csv", "filename", "questiontext", "answer")
        for (file, asked), answers in references(((x["filename"], x["questiontext"]), x["answer"].lower()) for x in lines).items():
            yield row(file, "AQA", question(asked, answers), answers, split)


def esc50(s: Source) -> Iterator[dict]:
    lines = list(s.csv("esc50.csv", "filename", "fold", "category", "srcfile"))
    options = {line["category"].replace("_", " ") for line in lines}
    for line in sorted(lines, key=lambda line: line["fold"], reverse=True):
        yield row("audio/" + line["filename"], "EventClassification", CLASSIFY, line["category"].replace("_", " "),
                  {"5": "test", "4": "val"}.get(line["fold"], "train"), line["srcfile"], options)


def urbansound8k(s: Source) -> Iterator[dict]:
    lines = list(s.csv("UrbanSound8K.csv", "slicefilename", "fsid", "fold", "class"))
    options = {line["class"].replace("_", " ") for line in lines}
    for line in sorted(lines, key=lambda line: line["fold"].zfill(2), reverse=True):
        yield row(f"fold{line['fold']}/{line['slicefilename']}", "EventClassification", CLASSIFY, line["class"].replace("_", " "),
                  {"10": "test", "9": "val"}.get(line["fold"], "train"), line["fsid"], options)


def fsd50k(s: Source) -> Iterator[dict]:
    """Several labels a clip, from specific to general as in the tables."""
    for part, columns in (("eval", ()), ("dev", ("split",))):
        for line in s.csv(f"FSD50K.ground_truth/{part}.csv", "fname", "labels", *columns):
            labels = ", ".join(label.strip().replace("_", " ") for label in line["labels"].split(","))
            yield row(f"FSD50K.{part}_audio/{line['fname']}.wav", "EventClassification",
                      "describe this sound in the order from specific to general.", labels, line["split"] if columns else "test")


def nsynth(s: Source) -> Iterator[dict]:
    families = ("bass", "brass", "flute", "guitar", "keyboard", "mallet", "organ", "reed", "string", "synth_lead", "vocal")
    for part, split in (("test", "test"), ("valid", "val"), ("train", "train")):
        for name, note in s.json(f"nsynth-{part}/examples.json", {}).items():
            file = f"nsynth-{part}/audio/{name}.wav"
            yield row(file, "InstrumentClassification", INSTRUMENT, note["instrument_family_str"], split, options=families)
            yield row(file, "SourceClassification", "what is the source of this music?", note["instrument_source_str"], split,
                      options=("acoustic", "electronic", "synthetic"))
            if qualities := ", ".join(note["qualities_str"]):
                yield row(file, "QualityClassification", "what are the qualities of the music?", qualities, split)


def ravdess(s: Source) -> Iterator[dict]:
    emotions = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgusted", "surprised")
    for name in s.recordings():                    # modality-channel-emotion-intensity-statement-repetition-actor
        if found := re.search(r"(?:^|/)03-01-0([1-8])-\d\d-\d\d-\d\d-(\d\d)\.wav$", name):
            yield row(name, "EmotionClassification", EMOTION, emotions[int(found[1]) - 1], "", "actor " + found[2], emotions)


def crema_d(s: Source) -> Iterator[dict]:
    emotions = {"ANG": "angry", "DIS": "disgusted", "FEA": "fearful", "HAP": "happy", "NEU": "neutral", "SAD": "sad"}
    for name in s.recordings():
        if found := re.search(r"(?:^|/)(\d{4})_[A-Z]{3}_(ANG|DIS|FEA|HAP|NEU|SAD)_\w+\.wav$", name):
            yield row(name, "EmotionClassification", EMOTION, emotions[found[2]], "", "actor " + found[1], emotions.values())


def medley_solos(s: Source) -> Iterator[dict]:
    lines = list(s.csv("Medley-solos-DB_metadata.csv", "subset", "instrument", "instrumentid", "songid", "uuid4"))
    options = {line["instrument"].lower() for line in lines}
    for line in sorted(lines, key=lambda line: line["subset"] != "test"):
        yield row(f"Medley-solos-DB_{line['subset']}-{line['instrumentid']}_{line['uuid4']}.wav", "InstrumentClassification",
                  INSTRUMENT, line["instrument"].lower(), line["subset"], f"{line['subset']} song {line['songid']}", options)


def macs(s: Source) -> Iterator[dict]:
    import yaml
    try:
        content = yaml.load(s.text("MACS.yaml"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {"files": []}
    except yaml.YAMLError as error:
        raise UserError(f"{s.paths[s.find('MACS.yaml')]}: not YAML ({' '.join(str(error).split())[:200]}). {AGAIN}") from None
    for file in content["files"]:
        yield row(file["filename"], "AudioCaptioning", CAPTION, [a["sentence"] for a in file["annotations"]], "train")


def cochlscene(s: Source) -> Iterator[dict]:
    scenes = ("bus", "cafe", "car", "crowdedindoor", "elevator", "kitchen", "park", "residentialarea", "restaurant", "restroom",
              "street", "subway", "subwaystation")
    for split in ("Test", "Val", "Train"):
        for name in s.recordings():
            parts = name.split("/")
            if len(parts) >= 3 and parts[-3] == split and parts[-2].lower() in scenes:
                group = parts[-1].rpartition("_")[0]       # class_user_submission of class_user_submission_segment.wav
                yield row(name, "SceneClassification", CLASSIFY, parts[-2].lower(), split, group, scenes)


def nonspeech7k(s: Source) -> Iterator[dict]:
    """Cuts of a test recording that are published as training clips are left out; val is sampled by recording."""
    classes, tested = ("breath", "cough", "crying", "laugh", "screaming", "sneeze", "yawn"), set()
    for split, table in (("test", "metadata of test set.csv"), ("train", "metadata of train set .csv")):
        for line in s.csv(table, "filename", "fileid", "classname"):
            name = line["classname"].lower().replace("yawm", "yawn")
            if split == "test":
                tested.add(line["fileid"])
            elif line["fileid"] in tested:
                s.report.problems["cut of a recording that is in the test split"].append(line["filename"])
                continue
            yield row(f"{split}/{line['filename']}", "EventClassification", CLASSIFY, name, split if split == "test" else "",
                      line["fileid"], classes)


def gtzan(s: Source) -> Iterator[dict]:
    genres = ("blues", "classical", "country", "disco", "hiphop", "jazz", "metal", "pop", "reggae", "rock")
    for name in s.recordings():
        if found := re.search(rf"(?:^|/)({'|'.join(genres)})\.\d{{5}}\.(?:wav|au)$", name):
            yield row(name, "GenreClassification", "what is the genre of this music?", found[1], options=genres)


def tut2017(s: Source) -> Iterator[dict]:
    lines = [line.split() for line in s.text("TUT-acoustic-scenes-2017-evaluation/meta.txt").splitlines() if line.strip()]
    scenes = {line[1].replace("_", " ") for line in lines}
    for line in lines:
        yield row(line[0], "SceneClassification", CLASSIFY, line[1].replace("_", " "), "test", options=scenes)


def audiocaps(s: Source) -> Iterator[dict]:
    for split in ("test", "val", "train"):
        lines = s.csv(f"{split}.csv", "youtubeid", "starttime", "caption")
        found = references(((line["youtubeid"], line["starttime"]), line["caption"]) for line in lines)
        for (video, start), captions in found.items():
            yield row(f"{video}_{start}", "AudioCaptioning", CAPTION, captions, split, video)


def musiccaps(s: Source) -> Iterator[dict]:
    lines = s.csv("musiccaps-public.csv", "ytid", "caption", "isaudioseteval")
    for line in sorted(lines, key=lambda line: line["isaudioseteval"] != "True"):
        yield row(line["ytid"], "MusicCaptioning", "describe the music in a paragraph.", line["caption"],
                  "test" if line["isaudioseteval"] == "True" else "train")


def wavcaps(s: Source) -> Iterator[dict]:
    """Without what stands in val and test of AudioCaps and Clotho. The sources share numbers: folders must be right."""
    for folder, table, out in (("AudioSet_SL", "as_final", "audiocaps"), ("FreeSound", "fsd_final", "clotho"),
                               ("BBC_Sound_Effects", "bbc_final", ""), ("SoundBible", "sb_final", "")):
        left_out = {line["id"] for line in s.csv(f"blacklist_{out}.full.csv", "id")} if out else ()
        for item in s.json(f"{table}.json", {"data": []})["data"]:
            if item["id"] in left_out:
                s.report.problems[f"in an evaluation split of {out}"].append(item["id"])
            else:
                yield row(f"/{folder}/{item['id'].removesuffix('.wav')}", "AudioCaptioning", CAPTION, item["caption"], "train")


def music_avqa(s: Source) -> Iterator[dict]:
    """Questions that can be answered by listening (type "Audio")."""
    for split in ("test", "val", "train"):
        for item in s.json(f"avqa-{split}.json", []):
            if json.loads(item["type"])[0] == "Audio" and not item.get("question_deleted"):
                values = iter(json.loads(item["templ_values"]))
                asked = re.sub(r"<\w+>", lambda slot: str(next(values, slot[0])), item["question_content"])
                yield row(str(item["video_id"]), "AQA", question(asked, [item["anser"]]), item["anser"], split)


def dialogues(s: Source) -> Iterator[dict]:
    """Every .json: a list of {"audio", "turns": [{"user", "assistant"}, ...], "split"?}, or with the names that the dialogues of
    the released Audio Flamingo have: "audio_id" (or "name") and "dialogue"."""
    tables = [name for name in s.paths if name.endswith(".json")]
    if not tables:
        s.report.problems["table that is not there"].append("a .json of dialogues")
    for table in tables:
        items = s.json(table, [])
        for number, item in enumerate(items if isinstance(items, list) else [items]):
            item = item if isinstance(item, dict) else {}
            name = item.get("audio") or item.get("audio_id") or item.get("name")
            if isinstance(name, str) and name.strip():
                means = s.meant(name, table)
                if len(means) > 1:
                    s.report.problems["name that several recordings have"].append(f"{table} item {number} ({name})")
                    continue
                name = f"/{(means or [name.lstrip('/')])[0]}"                    # "/": no recording of a similar name
            yield {"file": name, "task": "Dialogue",
                   "split": item.get("split") or "", "turns": item.get("turns") or item.get("dialogue"), "where": f"{table} item {number}"}

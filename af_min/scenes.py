"""The embedded data set `scenes`: recordings whose content is known exactly, and every kind of question about them.

A scene is one to five sound events (synth.py) in a known order, with pauses and background noise. A clip is one event alone. A
texture is a scene of unnamed sounds that only the window encoder's training hears. Written are, for each split,

    WindowText               captions of single windows, for `train.py --stage clap`
    AudioCaptioning, ...     questions about scenes (the table `QUESTIONS`)
    Interview                several independent questions about one scene, as a dialogue (training only); some have a description
                             and no recording: text for the language model alone. Glossary: likewise
    Dialogue                 two to four turns, in which "it" is the sound named last
    FewShot                  clips named with made-up words: only the shots tell which word is which sound

Made-up words of the test split and six sound classes occur nowhere in training. Where an answer could be had by a shortcut the
test is built against it: answers are balanced, "what comes after X" has neither the first nor the last sound as its answer.
"""
from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import soundfile

from .synth import CLASSES, RATE, SOURCES, TRAIN_CLASSES, UNSEEN_CLASSES, Patch, describe, random_patch, render

NUMBERS = ("zero", "one", "two", "three", "four", "five")
MAX_SECONDS = 5.3           # of a scene: 33 windows of 0.6 s, 0.15 s apart, reach 5.4 s
LEAD = 0.43                 # seconds before the first sound of a scene: its onset is in four windows, as every other
PITCH = {"low": 0.67, "high": 1.5}
LENGTH = {"short": (0.2, 0.32), "long": (0.5, 0.7)}  # seconds
WINDOW = 0.6                # seconds of a captioned window
REAL_WORDS = {*NUMBERS, *SOURCES, *CLASSES, "before"}  # made of syllables too, but with a meaning: five, zero, tone


@dataclass(frozen=True)
class Event:
    name: str               # class, or "" for a texture
    words: str              # what it sounds like, without the name
    pitch: str
    length: str
    start: float            # seconds
    end: float


# ---------------------------------------------------------------------- recordings

def compose(sounds: list[tuple[str, Patch]], rng: np.random.Generator, lead: float = 0.0) -> tuple[np.ndarray, list[Event]]:
    """Sounds in their order, after `lead` seconds -> waveform float32 (samples,), events. Too long a draw is drawn again."""
    while True:
        at, events, pieces = lead + rng.uniform(0.02, 0.25), [], []
        for name, patch in sounds:
            pitch, length = str(rng.choice(list(PITCH))), str(rng.choice(list(LENGTH)))
            seconds = rng.uniform(*LENGTH[length])
            events.append(Event(name, describe(patch, PITCH[pitch]), pitch, length, at, at + seconds))
            pieces.append((patch, seconds, PITCH[pitch]))
            at += seconds + rng.uniform(0.2, 0.45)
        if events[-1].end + 0.1 <= MAX_SECONDS:
            break
    wave = np.zeros(round(max(at, 0.5) * RATE) + 1, np.float32)
    for event, piece in zip(events, pieces):
        first = round(event.start * RATE)
        sound = render(*piece, rng) * 10 ** (-rng.uniform(0, 10) / 20)
        wave[first:first + len(sound)] += sound[:len(wave) - first]
    wave += 10 ** (-rng.uniform(30, 42) / 20) * rng.standard_normal(len(wave)).astype(np.float32)
    return wave / np.abs(wave).max(), events


def draw_names(count: int, rng: np.random.Generator) -> list[str]:
    """Two scenes of five hold every class at most once, three repeat one or two of them."""
    names = list(TRAIN_CLASSES)
    if rng.random() < 0.4:
        return [str(n) for n in rng.choice(names, count, replace=False)]
    return [str(n) for n in rng.choice(rng.choice(names, 2, replace=False), count)]


def window_text(events: list[Event], start: float, rng: np.random.Generator) -> str:
    """Caption of one window: its events in order, by name or by what they sound like, and whether the window cuts them."""
    parts = []
    for e in events:
        if min(e.end, start + WINDOW) - max(e.start, start) < 0.06:
            continue
        cut = {(True, True): e.length, (True, False): "start of", (False, True): "end of", (False, False): "middle of"}[
            e.start >= start - 0.03, e.end <= start + WINDOW + 0.03]
        parts.append(f"{cut} {e.pitch} {e.name}" if e.name and rng.random() < 0.5 else f"{cut} {e.words}")
    return ", ".join(parts) or "silence"


# ---------------------------------------------------------------------- questions about scenes

def description(events: list[Event]) -> str:
    """What a text-only reader is told in the place of <audio>."""
    return " then ".join(f"{e.length} {e.pitch} {e.name}" if e.name else f"{e.length} {e.words}" for e in events)


def once(events: list[Event]) -> list[int]:
    """Positions of the events whose class occurs once: "the bell" then means one thing."""
    names = [e.name for e in events]
    return [i for i, name in enumerate(names) if names.count(name) == 1]


def ask_caption(events, rng):
    yield "describe the sounds.", " then ".join(e.name for e in events)


def ask_presence(events, rng):
    present = sorted({e.name for e in events})
    yield f"is there a {rng.choice(present)}?", "yes"
    yield f"is there a {rng.choice([n for n in TRAIN_CLASSES if n not in present])}?", "no"


def ask_count(events, rng):
    yield "how many sounds are there?", NUMBERS[len(events)]


def ask_count_of(events, rng):
    names = [e.name for e in events]
    by_count = defaultdict(list)                    # asked for every count, or the commonest sound's would be a good guess
    for name in sorted(set(names)):
        by_count[names.count(name)].append(name)
    if rng.random() < 1 / 3:
        by_count[0] = [n for n in TRAIN_CLASSES if n not in names]
    for count in by_count:
        if count <= 3:
            yield f"how many times does the {rng.choice(by_count[count])} occur?", NUMBERS[count]


def ask_after(events, rng):
    for i in once(events[:-1]) if len(events) > 1 else []:
        if events[i].name != events[-1].name:
            yield f"what comes after the {events[i].name}?", events[i + 1].name


def ask_before(events, rng):
    for i in once(events):
        if i:
            yield f"what comes before the {events[i].name}?", events[i - 1].name


def ask_pitch(events, rng):
    for i in once(events):
        yield f"is the {events[i].name} high or low?", events[i].pitch


def ask_length(events, rng):
    for i in once(events):
        yield f"is the {events[i].name} short or long?", events[i].length


QUESTIONS = {  # task: (question maker, at most so many a training scene)
    "AudioCaptioning": (ask_caption, 1), "Presence": (ask_presence, 1), "Count": (ask_count, 1), "CountOf": (ask_count_of, 2),
    "After": (ask_after, 2), "Before": (ask_before, 2), "Pitch": (ask_pitch, 1), "Length": (ask_length, 1)}


def dialogue(events: list[Event], rng: np.random.Generator) -> list[dict]:
    """Two to four turns; "it" is the sound that was named last."""
    turns, unique = [], once(events)
    start = int(rng.integers(3))
    if start == 0:
        at, question = 0, "what is the first sound?"
    elif start == 1:
        at, question = len(events) - 1, "what is the last sound?"
    else:
        turns.append(("how many sounds are there?", NUMBERS[len(events)]))
        at, question = 0, "which comes first?"
    turns.append((question, events[at].name))
    for _ in range(int(rng.integers(1, 4))):
        choices = []
        if at in unique:
            choices += [("is it high or low?", events[at].pitch, at), ("is it short or long?", events[at].length, at)]
            if at + 1 < len(events):
                choices += [("what comes after it?", events[at + 1].name, at + 1)] * 2
            if at > 0:
                choices += [("what comes before it?", events[at - 1].name, at - 1)] * 2
        choices += [("how many times does it occur?", NUMBERS[[e.name for e in events].count(events[at].name)], at)]
        choices = [c for c in choices if all(c[0] != q for q, _ in turns) or c[2] != at]
        if not choices:
            break
        question, answer, at = choices[int(rng.integers(len(choices)))]
        turns.append((question, answer))
    return [{"user": q, "assistant": a} for q, a in turns[:4]]


def interview(events: list[Event], rng: np.random.Generator, most: int = 7) -> list[dict]:
    """A dialogue of independent questions: several answers to learn from for one recording heard."""
    asked = [qa for task, (make, _) in QUESTIONS.items() if task != "AudioCaptioning" for qa in make(events, rng)]
    return [{"user": asked[i][0], "assistant": asked[i][1]} for i in rng.permutation(len(asked))[:most]]


# ---------------------------------------------------------------------- text for the language model alone

def told_scene(rng: np.random.Generator) -> dict:
    """An interview about a scene that exists as its description only."""
    events = [Event(name, "", str(rng.choice(list(PITCH))), str(rng.choice(list(LENGTH))), 0.0, 0.0)
              for name in draw_names(int(rng.integers(1, 6)), rng)]
    return {"description": description(events), "task": "Interview", "turns": interview(events, rng, 10)}


def glossary(rng: np.random.Generator) -> dict:
    """Made-up words told for some sounds, then asked for in both directions: matching, with an answer every few tokens."""
    count, words = int(rng.integers(2, 6)), {}
    while len(words) < count:
        word = made_up_word("train", rng)
        words[word] = str(rng.choice(list(TRAIN_CLASSES))) if rng.random() < 0.5 else describe(random_patch(rng), 1.0)
    asked = [str(w) for w in rng.choice(list(words), 8)]
    return {"description": " then ".join(f"{sound} {word}" for word, sound in words.items()), "task": "Glossary",
            "turns": [{"user": f"{words[w]}?", "assistant": w} for w in asked]}


# ---------------------------------------------------------------------- few-shot episodes

def made_up_word(split: str, rng: np.random.Generator) -> str:
    """Two or three syllables, no word of a question or an answer. A hash assigns each to one split and no other."""
    while True:
        word = "".join("bdfgklmnprstvz"[rng.integers(14)] + "aeiou"[rng.integers(5)] for _ in range(2 + (rng.random() < 0.3)))
        hashed = hashlib.sha256(word.encode()).digest()[0]
        if word not in REAL_WORDS and split == ("test" if hashed < 51 else "val" if hashed < 77 else "train"):
            return word


def episode(clips: dict[str, list[dict]], names: list[str], extra: int, split: str, rng: np.random.Generator) -> dict:
    """Shots of the given classes (each once, then `extra` more at random), a query of one of them, made-up words as names.

    A word that no earlier shot has introduced cannot be inferred: its shot carries "loss": false. In half of the episodes the
    text-only description names no class, so that the LM learns to match any words, not the names that it knows.
    """
    told = dict.fromkeys(names, {}) if rng.random() < 0.5 else {
        n: {"description": describe(random_patch(rng), 1.0)} for n in names}
    words: dict[str, str] = {}
    for name in names:
        while (word := made_up_word(split, rng)) in words.values():
            pass
        words[name] = word
    order = list(rng.permutation(list(names))) + [str(rng.choice(names)) for _ in range(extra + 1)]
    used = {n: [clips[n][i] for i in rng.permutation(len(clips[n]))] for n in names}
    shots, known = [], set()
    for name in order:
        shots.append({**used[name].pop(), **told[name], "prompt": "classify this sound.", "answer": words[name],
                      "loss": name in known})
        known.add(name)
    return {**shots.pop(), "task": "FewShot", "shots": shots}


# ---------------------------------------------------------------------- the data set

@dataclass(frozen=True)
class Sizes:
    train: int = 8000       # scenes
    val: int = 300
    test: int = 2100
    textures: int = 1500
    clips: int = 40         # of every class, in train (20 classes), val (20) and test (26)
    kinds: int = 150        # classes without a name, that few-shot training draws from too
    kind_clips: int = 8     # of each of those
    val_kinds: int = 12     # as many more, never heard in training
    episodes: int = 5000    # in train
    examples: int = 1500    # training questions with examples before them
    told: int = 24_000      # interviews about scenes that nobody hears, for the language model alone
    glossaries: int = 10_000  # likewise
    val_items: int = 300    # of every question in val
    test_items: int = 1050  # of every question in test


class Writer:
    """Writes recordings into `folder`/audio; every recording has its own random generator, so that any order gives the same."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder, seed
        (folder / "audio").mkdir(parents=True, exist_ok=True)

    def rng(self, kind: str, index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *hashlib.sha256(kind.encode()).digest()[:8], index])

    def save(self, name: str, wave: np.ndarray) -> str:
        soundfile.write(self.folder / "audio" / f"{name}.wav", wave, RATE, subtype="PCM_16")
        return f"audio/{name}.wav"


def scene_rows(writer: Writer, split: str, index: int) -> list[dict]:
    rng = writer.rng(f"{split}-scene", index)
    wave, events = compose([(n, CLASSES[n]) for n in draw_names(1 + index % 5, rng)], rng, LEAD)
    head = {"audio": writer.save(f"{split}-{index:05d}", wave), "start": 0.0, "seconds": round(len(wave) / RATE, 3)}
    rows = []
    for task, (make, most) in QUESTIONS.items():
        asked = list(make(events, rng))
        if split == "train" and len(asked) > most:
            asked = [asked[i] for i in rng.choice(len(asked), most, replace=False)]
        if split != "train" and task == "After":
            ends = {events[0].name, events[-1].name}
            asked = [(q, a) for q, a in asked if a not in ends]
        rows += [{**head, "description": description(events), "task": task, "prompt": q, "answer": a} for q, a in asked]
    for _ in range(2 if split == "train" else 1):
        rows.append({**head, "description": description(events), "task": "Dialogue", "turns": dialogue(events, rng)})
    if split == "train":
        rows.append({**rows[-1], "task": "Interview", "turns": interview(events, rng)})
        rows += window_rows(head, events, 2, rng)
    return rows


def window_rows(head: dict, events: list[Event], count: int, rng: np.random.Generator) -> list[dict]:
    """Captions of `count` windows of one recording, at random places of at least one window's length."""
    starts = np.sort(rng.uniform(0, max(0.0, head["seconds"] - WINDOW), count)).round(3)
    return [{**head, "start": float(s), "seconds": WINDOW, "task": "WindowText", "prompt": "what is heard?",
             "answer": window_text(events, float(s), rng)} for s in starts]


def texture_rows(writer: Writer, index: int) -> list[dict]:
    rng = writer.rng("texture", index)
    wave, events = compose([("", random_patch(rng)) for _ in range(1 + index % 4)], rng)
    head = {"audio": writer.save(f"texture-{index:05d}", wave), "start": 0.0, "seconds": round(len(wave) / RATE, 3)}
    return window_rows(head, events, 4, rng)


def balanced(rows: list[dict], count: int, rng: np.random.Generator, even: bool) -> list[dict]:
    """`count` rows, at most; with `even`, as many of each answer."""
    rows = [rows[i] for i in rng.permutation(len(rows))]
    if not even:
        return rows[:count]
    groups = defaultdict(list)
    for row in rows:
        groups[row["answer"]].append(row)
    each = min(min(map(len, groups.values())), -(-count // len(groups)))
    return [row for answer in sorted(groups) for row in groups[answer][:each]]


def clip_row(writer: Writer, split: str, name: str, index: int) -> dict:
    """One recording of a class, or of a kind that has no name, as the beginning of a row."""
    rng = writer.rng(f"{split}-{name}", index)
    patch = CLASSES[name] if name in CLASSES else random_patch(writer.rng("kind", int(name.removeprefix("kind"))))
    wave, events = compose([(name if name in CLASSES else "", patch)], rng)
    return {"audio": writer.save(f"{split}-{name}-{index:03d}", wave), "start": 0.0, "seconds": round(len(wave) / RATE, 3),
            "description": description(events)}


def record(writer: Writer, job: tuple) -> list[dict]:
    """Make one recording, with a random generator of its own, and its rows. Runs in a worker process."""
    make, *arguments = job
    return make(writer, *arguments)


def example_rows(rows: list[dict], count: int, rng: np.random.Generator) -> list[dict]:
    """Questions about scenes with one to four other scenes, asked the same, before them: the form of `sample.py --shots`."""
    groups = defaultdict(list)
    for row in rows:
        if row["task"] in ("AudioCaptioning", "Count"):
            groups[row["task"]].append(row)
    out = []
    for number in range(count):
        group = groups["Count" if number % 3 == 2 else "AudioCaptioning"]
        *shots, row = (group[i] for i in rng.choice(len(group), int(rng.integers(2, 6)), replace=False))
        out.append({**row, "shots": [{k: v for k, v in shot.items() if k != "task"} for shot in shots]})
    return out


def pool_rows(clips: dict[str, list[dict]], split: str, count: int, rng: np.random.Generator) -> list[dict]:
    """Queries with a pool of twelve named clips, one a class, to draw shots from: eleven of the twelve are distractors."""
    rows = []
    for _ in range(count):
        drawn = [str(n) for n in rng.choice(list(clips), 12, replace=False)]
        row = episode(clips, drawn, 0, split, rng)
        rows.append({**{k: v for k, v in row.items() if k != "shots"}, "task": "Pool", "pool": row["shots"]})
    return rows


def held_out(questions: list[dict], clips: dict[str, list[dict]], split: str, count: int, rng: np.random.Generator) -> list[dict]:
    """At most `count` rows of every task: balanced questions, dialogues, few-shot episodes of 4 classes, pools."""
    tasks = defaultdict(list)
    for row in questions:
        tasks[row["task"]].append(row)
    even = {"Presence", "Count", "CountOf", "Pitch", "Length"}
    rows = [r for task in tasks for r in balanced(tasks[task], count, rng, task in even)]
    for task, seen in (("FewShotSeen", True), ("FewShotUnseen", False)):
        classes = [name for name in clips if (name in TRAIN_CLASSES) == seen]
        for _ in range(count):
            names = [str(n) for n in rng.choice(classes, 4, replace=False)]
            rows.append({**episode(clips, names, 0, split, rng), "task": task})
    return rows + pool_rows(clips, split, count, rng)


def build(folder: Path, seed: int = 0, sizes: Sizes = Sizes(), progress=lambda rows: rows) -> dict[str, list[dict]]:
    """Write all recordings below `folder` and return the rows of each split. `progress` wraps the loop over recordings.

    Unseen in val are other sounds than in test: choices that are made by looking at val do not touch the test.
    """
    writer, rng = Writer(folder, seed), np.random.default_rng([seed, 1])
    kinds = [f"kind{i:03d}" for i in range(sizes.kinds + sizes.val_kinds)]
    heard = {("train", "named"): (list(TRAIN_CLASSES), sizes.clips), ("train", "kinds"): (kinds[:sizes.kinds], sizes.kind_clips),
             ("val", "all"): ([*TRAIN_CLASSES, *kinds[sizes.kinds:]], sizes.clips), ("test", "all"): (list(CLASSES), sizes.clips)}
    jobs = [(scene_rows, split, i) for split in ("train", "val", "test") for i in range(getattr(sizes, split))]
    jobs += [(texture_rows, i) for i in range(sizes.textures)]
    jobs += [(clip_row, split, name, i) for (split, _), (names, count) in heard.items() for name in names for i in range(count)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        made = dict(zip(progress(jobs), pool.map(partial(record, writer), jobs, chunksize=32)))
    rows = {split: [row for i in range(getattr(sizes, split)) for row in made[scene_rows, split, i]] for split in ("train", "val", "test")}
    clips = {key: {name: [made[clip_row, key[0], name, i] for i in range(count)] for name in names}
             for key, (names, count) in heard.items()}
    rows["train"] += [row for i in range(sizes.textures) for row in made[texture_rows, i]]
    rows["train"] += example_rows(rows["train"], sizes.examples, rng)
    for number in range(sizes.episodes):
        pool = clips["train", "named" if number % 5 < 3 else "kinds"]
        ways = int(rng.integers(2, 6))
        names = [str(n) for n in rng.choice(list(pool), ways, replace=False)]
        rows["train"].append(episode(pool, names, int(rng.integers(0, 9 - ways)), "train", rng))
    rows["train"] += [{**clip, "task": "AudioClassification", "prompt": options_prompt(name, rng), "answer": name}
                      for name, of_name in clips["train", "named"].items() for clip in of_name]
    rows["train"] += [told_scene(rng) for _ in range(sizes.told)] + [glossary(rng) for _ in range(sizes.glossaries)]
    rows["val"] = held_out(rows["val"], clips["val", "all"], "val", sizes.val_items, rng)
    rows["test"] = held_out(rows["test"], clips["test", "all"], "test", sizes.test_items, rng)
    return rows


def options_prompt(answer: str, rng: np.random.Generator) -> str:
    """A closed-set question in the paper's form: four options, the answer among them."""
    others = rng.choice([n for n in TRAIN_CLASSES if n != answer], 3, replace=False)
    options = [str(n) for n in rng.permutation([answer, *others])]
    return "classify this sound.\noptions:\n" + "\n".join(f" - {o}." for o in options)

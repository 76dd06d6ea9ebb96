"""The embedded data set `scenes`: recordings whose content is known exactly, and every kind of question about them.

A scene is one to five sound events (synth.py) in a known order, with pauses and background noise. A clip is one event alone. A
texture is a scene of unnamed sounds that only the window encoder's training hears. Written are, for each split,

    WindowText               captions of single windows, for `train.py --stage clap`
    AudioCaptioning, ...     questions about scenes (the table `QUESTIONS`)
    Interview                several independent questions about one scene, as a dialogue (training only); some have a description
                             and no recording: text for the language model alone. Glossary: likewise
    RollCall                 many questions in a row that take finding a named sound, for the stages lm and pretrain
    Dialogue                 two to four turns, in which "it" is the sound named last
    FewShot, Pool            clips named with made-up words: only the shots tell which word is which sound
    AudioClassification      clips, four names to choose from (training only)

Made-up words of the test split and six sound classes occur nowhere in training. Where an answer could be had by a shortcut the
test is built against it: answers are balanced, "what comes after X" has neither the first nor the last sound as its answer.
"""
from __future__ import annotations

import hashlib
import io
import os
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from .questions import (LENGTH, PITCH, QUESTIONS, WINDOW, Event, description, dialogue, draw_names, glossary, interview, made_up_word,
                        roll_call, told_scene, window_text)
from .synth import CLASSES, RATE, TRAIN_CLASSES, Patch, describe, random_patch, render
from .text import question

MAX_SECONDS = 5.3           # of a scene: 33 windows of 0.6 s, 0.15 s apart, reach 5.4 s
TOLD = 100                  # rows without a recording that one job makes
LEAD = 0.43                 # seconds before the first sound of a scene: its onset is in four windows, as every other


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


# ---------------------------------------------------------------------- few-shot episodes

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
    train: int = 7000       # scenes
    val: int = 300
    test: int = 2100
    textures: int = 1500
    clips: int = 40         # of every class, in train (20 classes), val (20) and test (26)
    kinds: int = 150        # classes without a name, that few-shot training draws from too
    kind_clips: int = 8     # of each of those
    val_kinds: int = 12     # as many more, never heard in training
    episodes: int = 7500    # in train
    examples: int = 1500    # training questions with examples before them
    told: int = 21_000      # interviews about scenes that nobody hears, for the language model alone
    glossaries: int = 9000  # likewise
    val_items: int = 300    # of every question in val
    test_items: int = 1050  # of every question in test


class Writer:
    """Writes recordings into `folder`/audio; every recording has its own random generator, so that any order gives the same."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder, seed
        (folder / "audio").mkdir(parents=True, exist_ok=True)

    def rng(self, kind: str, index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *hashlib.sha256(kind.encode()).digest()[:8], index])

    def save(self, name: str, wave: np.ndarray) -> dict:
        """Write a recording -> the beginning of the rows about it."""
        import soundfile                             # as late as in audio_files.py
        file = io.BytesIO()                          # soundfile waits for the disk after every file that it writes itself
        soundfile.write(file, wave, RATE, format="WAV", subtype="PCM_16")
        (self.folder / "audio" / f"{name}.wav").write_bytes(file.getvalue())
        return {"audio": f"audio/{name}.wav", "start": 0.0, "seconds": round(len(wave) / RATE, 3)}


def scene_rows(writer: Writer, split: str, index: int) -> list[dict]:
    rng = writer.rng(f"{split}-scene", index)
    wave, events = compose([(n, CLASSES[n]) for n in draw_names(1 + index % 5, rng)], rng, LEAD)
    head = writer.save(f"{split}-{index:05d}", wave)
    rows = []
    for task, (make, share, most) in QUESTIONS.items():
        if split != "train" and task == "CountOf":
            make = partial(make, most=3)             # of four and five there are too few for balanced answers
        asked = list(make(events, rng))
        if split == "train":
            asked = [asked[i] for i in rng.permutation(len(asked))[:most]] if rng.random() < share else []
        if split != "train" and task == "After":
            ends = {events[0].name, events[-1].name}
            asked = [(q, a) for q, a in asked if a not in ends]
        rows += [{**head, "description": description(events), "task": task, "prompt": q, "answer": a} for q, a in asked]
    for _ in range(2 if split == "train" else 1):
        rows.append({**head, "description": description(events), "task": "Dialogue", "turns": dialogue(events, rng)})
    if split == "train":
        for task, make in (("Interview", interview), ("RollCall", roll_call)):
            rows += [{**rows[-1], "task": task, "turns": make(events, rng)} for _ in range(2)]
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
    return window_rows(writer.save(f"texture-{index:05d}", wave), events, 4, rng)


def by(name: str, rows: list[dict]) -> dict[str, list[dict]]:
    """Rows in groups of the same `name`."""
    groups = defaultdict(list)
    for row in rows:
        groups[row[name]].append(row)
    return groups


def balanced(rows: list[dict], count: int, rng: np.random.Generator, even: bool) -> list[dict]:
    """`count` rows, at most; with `even`, as many of each answer."""
    rows = [rows[i] for i in rng.permutation(len(rows))]
    if not even:
        return rows[:count]
    groups = by("answer", rows)
    each = min(min(map(len, groups.values())), -(-count // len(groups)))
    return [row for answer in sorted(groups) for row in groups[answer][:each]]


def clip_row(writer: Writer, split: str, name: str, index: int) -> dict:
    """One recording of a class, or of a kind that has no name, as the beginning of a row."""
    rng = writer.rng(f"{split}-{name}", index)
    patch = CLASSES[name] if name in CLASSES else random_patch(writer.rng("kind", int(name.removeprefix("kind"))))
    wave, events = compose([(name if name in CLASSES else "", patch)], rng)
    return writer.save(f"{split}-{name}-{index:03d}", wave) | {"description": description(events)}


def told_rows(writer: Writer, make: Callable, first: int, count: int) -> list[dict]:
    """Rows about what exists as a description only."""
    rng = writer.rng(make.__name__, first)
    return [make(rng) for _ in range(count)]


def record(writer: Writer, job: tuple) -> list[dict]:
    """Make one recording, or rows without one, with a random generator of its own. Runs in a worker process."""
    make, *arguments = job
    return make(writer, *arguments)


def example_rows(rows: list[dict], count: int, rng: np.random.Generator) -> list[dict]:
    """Questions about scenes with one to four other scenes, asked the same, before them: the form of `sample.py --shots`."""
    groups, out = by("task", rows), []
    for number in range(count):
        group = groups["Count" if number % 3 == 2 else "AudioCaptioning"]
        *shots, row = (group[i] for i in rng.choice(len(group), int(rng.integers(2, 6)), replace=False))
        out.append({**row, "shots": [{k: v for k, v in shot.items() if k != "task"} for shot in shots]})
    return out


def held_out(questions: list[dict], clips: dict[str, list[dict]], split: str, count: int, rng: np.random.Generator) -> list[dict]:
    """At most `count` rows of every task: balanced questions, dialogues, few-shot episodes of 4 classes, and pools to draw shots from:
    twelve named clips, one a class, of which eleven are distractors."""
    even = {"Presence", "Count", "CountOf", "Pitch", "Length"}
    rows = [r for task, of_task in by("task", questions).items() for r in balanced(of_task, count, rng, task in even)]
    seen, unseen = ([name for name in clips if (name in TRAIN_CLASSES) == known] for known in (True, False))
    for task, classes, ways in (("FewShotSeen", seen, 4), ("FewShotUnseen", unseen, 4), ("Pool", list(clips), 12)):
        for _ in range(count):
            names = [str(n) for n in rng.choice(classes, ways, replace=False)]
            rows.append(episode(clips, names, 0, split, rng) | {"task": task})
            if task == "Pool":
                rows[-1]["pool"] = rows[-1].pop("shots")
    return rows


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
    told = [(told_rows, make, i, min(TOLD, count - i))
            for make, count in ((told_scene, sizes.told), (glossary, sizes.glossaries)) for i in range(0, count, TOLD)]
    jobs += told
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        made = dict(zip(progress(jobs), pool.map(partial(record, writer), jobs, chunksize=32)))
    rows = {split: [row for i in range(getattr(sizes, split)) for row in made[scene_rows, split, i]] for split in ("train", "val", "test")}
    clips = {key: {name: [made[clip_row, key[0], name, i] for i in range(count)] for name in names}
             for key, (names, count) in heard.items()}
    rows["train"] += [row for i in range(sizes.textures) for row in made[texture_rows, i]]
    rows["train"] += example_rows(rows["train"], sizes.examples, rng)
    for number in range(sizes.episodes):
        pool = clips["train", "named" if number % 2 else "kinds"]
        ways = int(rng.integers(2, 6))
        names = [str(n) for n in rng.choice(list(pool), ways, replace=False)]
        rows["train"].append(episode(pool, names, int(rng.integers(0, 9 - ways)), "train", rng))
    rows["train"] += [{**clip, **question("AudioClassification", "classify this sound.", options(name, rng)), "answer": name}
                      for name, of_name in clips["train", "named"].items() for clip in of_name]
    rows["train"] += [row for job in told for row in made[job]]
    rows["val"] = held_out(rows["val"], clips["val", "all"], "val", sizes.val_items, rng)
    rows["test"] = held_out(rows["test"], clips["test", "all"], "test", sizes.test_items, rng)
    return rows


def options(answer: str, rng: np.random.Generator) -> list[str]:
    """Four classes, the answer among them."""
    others = rng.choice([n for n in TRAIN_CLASSES if n != answer], 3, replace=False)
    return [str(n) for n in rng.permutation([answer, *others])]

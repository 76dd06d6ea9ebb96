"""What is asked about a scene, and the right answer: the embedded data set's words (scenes.py makes the sounds).

Every question maker takes the events of a scene in their order and gives (question, answer) pairs.
"""
from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .synth import CLASSES, SOURCES, TRAIN_CLASSES, describe, random_patch

NUMBERS = ("zero", "one", "two", "three", "four", "five")
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


def ask_count_of(events, rng, most=5):
    names = [e.name for e in events]
    by_count = defaultdict(list)                    # asked for every count, or the commonest sound's would be a good guess
    for name in sorted(set(names)):
        by_count[names.count(name)].append(name)
    if rng.random() < 1 / 3:
        by_count[0] = [n for n in TRAIN_CLASSES if n not in names]
    for count in by_count:
        if count <= most:
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


QUESTIONS = {  # task: (question maker, in training asked alone about this share of the scenes, and at most so often)
    "AudioCaptioning": (ask_caption, 0.75, 1), "Presence": (ask_presence, 0.4, 1), "Count": (ask_count, 0.4, 1),
    "CountOf": (ask_count_of, 0.7, 3), "After": (ask_after, 1.0, 2), "Before": (ask_before, 1.0, 2), "Pitch": (ask_pitch, 0.7, 1),
    "Length": (ask_length, 0.7, 1)}


def dialogue(events: list[Event], rng: np.random.Generator) -> list[dict]:
    """Two to four turns; "it" is the sound that was named last."""
    turns, unique = [], once(events)
    start = int(rng.integers(3))
    if start == 2:
        turns.append(("how many sounds are there?", NUMBERS[len(events)]))
    at, question = [(0, "what is the first sound?"), (len(events) - 1, "what is the last sound?"), (0, "which comes first?")][start]
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


# ---------------------------------------------------------------------- for training alone

def in_a_row(makers: list[Callable], events: list[Event], rng: np.random.Generator, most: int) -> list[dict]:
    """Independent questions as the turns of a dialogue: several answers to learn from for one recording heard."""
    asked = [qa for make in makers for qa in make(events, rng)]
    return [{"user": asked[i][0], "assistant": asked[i][1]} for i in rng.permutation(len(asked))[:most]]


def interview(events: list[Event], rng: np.random.Generator, most: int = 7) -> list[dict]:
    return in_a_row([make for task, (make, *_) in QUESTIONS.items() if task != "AudioCaptioning"], events, rng, most)


def roll_call(events: list[Event], rng: np.random.Generator, most: int = 10) -> list[dict]:
    """Is X there, and how often: for many X. Each answer takes finding X in what is heard, which all other questions need too."""
    return in_a_row([ask_presence, ask_count_of] * 3, events, rng, most)


# ---------------------------------------------------------------------- text for the language model alone

def told_scene(rng: np.random.Generator) -> dict:
    """An interview or a roll call about a scene that exists as its description only."""
    events = [Event(name, "", str(rng.choice(list(PITCH))), str(rng.choice(list(LENGTH))), 0.0, 0.0)
              for name in draw_names(int(rng.integers(1, 6)), rng)]
    ask = roll_call if rng.random() < 0.5 else interview
    return {"description": description(events), "task": "Interview", "turns": ask(events, rng, 10)}


def glossary(rng: np.random.Generator) -> dict:
    """Made-up words told for some sounds, then asked for in both directions: matching, with an answer every few tokens."""
    count, words = int(rng.integers(2, 6)), {}
    while len(words) < count:
        word = made_up_word("train", rng)
        words[word] = str(rng.choice(list(TRAIN_CLASSES))) if rng.random() < 0.5 else describe(random_patch(rng), 1.0)
    asked = [str(w) for w in rng.choice(list(words), 8)]
    return {"description": " then ".join(f"{sound} {word}" for word, sound in words.items()), "task": "Glossary",
            "turns": [{"user": f"{words[w]}?", "assistant": w} for w in asked]}


def made_up_word(split: str, rng: np.random.Generator) -> str:
    """Two or three syllables, no word of a question or an answer. A hash assigns each to one split and no other.

    Training has as many of three as of two: where a word ends must be read, not guessed."""
    while True:
        syllables = 2 + (rng.random() < (0.5 if split == "train" else 0.3))
        word = "".join("bdfgklmnprstvz"[rng.integers(14)] + "aeiou"[rng.integers(5)] for _ in range(syllables))
        hashed = hashlib.sha256(word.encode()).digest()[0]
        if word not in REAL_WORDS and split == ("test" if hashed < 51 else "val" if hashed < 77 else "train"):
            return word

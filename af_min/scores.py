"""The embedded data set's scores, each beside what can be had without listening: the table of the README.

`chance`: uniform over the possible answers. `blind`: the best answer that ignores the audio, always the one that the training
rows give most often to this question, and for few-shot one of the words in the prompt. `swapped`: the same model and items, but
each item gets the audio of another one; a score that needs listening falls to the blind level.
"""
from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from . import metrics, retrieval
from .answering import Answerer
from .store import Store


# ---------------------------------------------------------------------- items

def some(rows: list, items: int) -> list:
    """`items` of the rows (0: all) at even distances: a test split may be sorted by answer."""
    count = min(items, len(rows)) if items else len(rows)
    return [rows[i * len(rows) // count] for i in range(count)]


def dialogue_items(rows: list[dict], answerer: Answerer) -> Iterator[tuple[dict, str]]:
    """Second and later turns, the model's own earlier answers before them: (row up to the question, right answer)."""
    said: list[list[str]] = [[] for _ in rows]
    for turn in range(max(len(r["turns"]) for r in rows)):
        live = [i for i, r in enumerate(rows) if len(r["turns"]) > turn]
        asked = [{**rows[i], "turns": [
            {"user": t["user"], "assistant": s} for t, s in zip(rows[i]["turns"], [*said[i], ""])]} for i in live]
        for i, row, answer in zip(live, asked, answerer.answer(asked)):
            said[i].append(answer or "?")
            if turn:
                yield {**row, "answer": answer}, rows[i]["turns"][turn]["assistant"]


def with_pool_shots(rows: list[dict], store: Store, how: str, shots: int = 4, seed: int = 0) -> list[dict]:
    """Rows with a pool -> rows with the `shots` pool recordings nearest to the query, nearest last, or as many at random."""
    def vector(row):
        return retrieval.pooled(store[row["audio"], row["start"]])

    out, rng = [], random.Random(seed)
    for row in rows:
        pool = row["pool"]
        if how == "random":
            chosen = rng.sample(pool, shots)
        else:
            near = retrieval.nearest(vector(row), np.stack([vector(p) for p in pool]), shots)
            chosen = [pool[i] for i in reversed(near)]
        out.append({**{k: v for k, v in row.items() if k != "pool"}, "shots": chosen})
    return out


def swapped(rows: list[dict]) -> list[dict]:
    """Each row with the audio of the one half the list away, or of the first one after that which is about another; shots keep theirs."""
    sounds, out = [(r["audio"], r["start"]) for r in rows], []
    for i, own in enumerate(sounds):
        away = (sounds[(i + len(rows) // 2 + j) % len(rows)] for j in range(len(rows)))
        audio, start = next((place for place in away if place != own), own)
        out.append({**rows[i], "audio": audio, "start": start})
    return out


# ---------------------------------------------------------------------- scores

def blind_answers(rows: list[dict], train: list[dict]) -> list[str]:
    """For each row the answer that the training rows give most often to its prompt, or else to its task."""
    by_prompt, by_task = defaultdict(Counter), defaultdict(Counter)
    for row in train:
        for answer in row.get("answers", [row["answer"]] if "answer" in row else []):
            by_prompt[row["task"], row["prompt"]][answer] += 1
            by_task[row["task"]][answer] += 1
    return [(by_prompt.get((r["task"], r["prompt"])) or by_task[r["task"]]).most_common(1)[0][0] if by_task[r["task"]] else ""
            for r in rows]


def blind_dialogue(rows: list[dict], train: list[dict]) -> float:
    counts = defaultdict(Counter)
    for row in train:
        for turn in row.get("turns", []):
            counts[turn["user"]][turn["assistant"]] += 1
    turns = [t for r in rows for t in r["turns"][1:]]
    return sum(counts[t["user"]].most_common(1)[0][0] == t["assistant"] for t in turns) / len(turns)


def accuracy(answers: list[str], truths: list[str]) -> float:
    return exactly(answers, truths)(np.arange(len(truths))) if truths else 0.0


Measure = Callable[[np.ndarray], float]                # numbers of items -> score


def exactly(answers: list[str], truths: list[str]) -> Measure:
    right = np.array([metrics.exact(answer, [truth]) for answer, truth in zip(answers, truths)])
    return lambda i: float(right[i].mean())


def by_events(answers: list[str], truths: list[str]) -> Measure:
    counts = np.array([metrics.event_counts(answer, truth) for answer, truth in zip(answers, truths)])
    return lambda i: metrics.f1(counts[i].sum(0))


@dataclass
class Score:
    name: str
    items: int
    score: float
    low: float                     # 95 % by bootstrap over the items
    high: float
    chance: float | None
    blind: float
    swapped: float | None


def scored(name: str, said: list[str], truths: list[str], chance: float | None, blind: list[str] | float,
           moved: list[str] | None = None, of: Callable[[list[str], list[str]], Measure] = exactly) -> Score:
    """The score of answers, of those without listening (or what these would get) and of those to another recording."""
    measure, everything = of(said, truths), np.arange(len(truths))
    return Score(name, len(truths), measure(everything), *metrics.interval(measure, len(truths)), chance,
                 blind if isinstance(blind, float) else of(blind, truths)(everything),
                 of(moved, truths)(everything) if moved is not None else None)


QUESTION_SCORES = {  # task: (name in the table, chance)
    "Presence": ("yes / no", 1 / 2), "Count": ("count all", 1 / 5), "CountOf": ("count of X", 1 / 4),
    "After": ("what comes after X", 1 / 20), "Before": ("what comes before X", 1 / 20),
    "Pitch": ("pitch of X", 1 / 2), "Length": ("length of X", 1 / 2)}


def scores(answerer: Answerer, test: list[dict], train: list[dict], items: int = 0) -> Iterator[Score]:
    """All scores of the embedded data set, one after the other."""
    tasks = defaultdict(list)
    for row in test:
        tasks[row["task"]].append(row)
    tasks = {task: some(rows, items) for task, rows in tasks.items()}

    def both(rows: list[dict]) -> tuple[list[str], list[str], list[str]]:
        """Answers, right answers, answers about another recording."""
        return answerer.answer(rows), [row["answer"] for row in rows], answerer.answer(swapped(rows))

    rows = tasks["AudioCaptioning"]
    said, truths, moved = both(rows)
    for name, of in (("caption: event F1", by_events), ("caption: all events in order", exactly)):
        yield scored(name, said, truths, None, blind_answers(rows, train), moved, of)
    for task, (name, chance) in QUESTION_SCORES.items():
        said, truths, moved = both(tasks[task])
        yield scored(name, said, truths, chance, blind_answers(tasks[task], train), moved)
    rows = tasks["Dialogue"]
    (said, truths), (moved, _) = (zip(*((row["answer"], truth) for row, truth in dialogue_items(of, answerer)))
                                  for of in (rows, swapped(rows)))
    yield scored("dialogue, turns 2 to 4", said, truths, None, blind_dialogue(rows, train), moved)
    for task, classes in (("FewShotSeen", "classes seen"), ("FewShotUnseen", "classes never seen")):
        said, truths, moved = both(tasks[task])
        yield scored(f"4-way, 4 shots, {classes}", said, truths, 1 / 4, 1 / 4, moved)
        bare = answerer.answer([{k: v for k, v in row.items() if k != "shots"} for row in tasks[task]])
        yield scored(f"4-way, 0 shots, {classes}", bare, truths, 1 / 4, 0.0)
    for how in ("nearest", "random"):
        said, truths, moved = both(with_pool_shots(tasks["Pool"], answerer.store, how))
        yield scored(f"pool of 12, 4 {how} shots", said, truths, 1 / 12, 1 / 12, moved)


def table(results: list[Score]) -> str:
    def cell(value):
        return "   -  " if value is None else f"{value:6.3f}"
    lines = [f"{'task':36s} {'items':>6s} {'score':>7s}  {'[95 %]':14s} {'chance':>7s} {'blind':>7s} {'swapped':>8s}"]
    lines += [f"{s.name:36s} {s.items:6d}  {cell(s.score)}  [{s.low:.3f}, {s.high:.3f}]  {cell(s.chance)}  {cell(s.blind)}   "
              f"{cell(s.swapped)}" for s in results]
    return "\n".join(lines)


def transcript(answerer: Answerer, test: list[dict]) -> str:
    """One dialogue, in which the model's own answers stand, and one few-shot episode, beside the right answers."""
    row = next(r for r in test if r["task"] == "Dialogue" and len(r["turns"]) >= 3)
    turns, lines = [], [f"A dialogue about {row['audio']} ({row['description']}):"]
    for turn in row["turns"]:
        answer = answerer.answer([{**row, "turns": [*turns, {**turn, "assistant": ""}]}])[0]
        turns.append({"user": turn["user"], "assistant": answer or "?"})
        lines.append(f"    {turn['user']:34s} {answer:12s} (right: {turn['assistant']})")
    row = next(r for r in test if r["task"] == "FewShotUnseen")
    lines.append("A few-shot episode, made-up words for sounds that no stage of training has heard:")
    lines += [f"    {s['audio']:34s} {s['answer']}" for s in row["shots"]]
    lines.append(f"    {row['audio']:34s} {answerer.answer([row])[0]:12s} (right: {row['answer']})")
    return "\n".join(lines)

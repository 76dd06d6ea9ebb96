"""The embedded data set's scores, each beside what can be had without listening: the table of the README.

`chance`: uniform over the possible answers. `blind`: the best answer that ignores the audio, always the one that the training
rows give most often to this question, and for few-shot one of the words in the prompt. `swapped`: the same model and items, but
each item gets the audio of another one; a score that needs listening falls to the blind level.
"""
from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator
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
    """Each row with the audio of another one; shots keep theirs."""
    sounds = [(r["audio"], r["start"]) for r in rows]
    moved = sounds[len(sounds) // 2:] + sounds[:len(sounds) // 2]
    return [{**row, "audio": audio, "start": start} for row, (audio, start) in zip(rows, moved)]


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
    return sum(metrics.exact(a, [t]) for a, t in zip(answers, truths)) / max(1, len(truths))


@dataclass
class Score:
    name: str
    items: int
    score: float
    chance: float | None
    blind: float
    swapped: float | None


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

    def run(rows):
        return answerer.answer(rows)

    rows = tasks["AudioCaptioning"]
    truths, blind = [r["answer"] for r in rows], blind_answers(rows, train)
    said, moved = run(rows), run(swapped(rows))
    yield Score("caption: event F1", len(rows), metrics.event_f1(said, truths), None, metrics.event_f1(blind, truths),
                metrics.event_f1(moved, truths))
    yield Score("caption: all events in order", len(rows), accuracy(said, truths), None, accuracy(blind, truths),
                accuracy(moved, truths))
    for task, (name, chance) in QUESTION_SCORES.items():
        rows = tasks[task]
        truths = [r["answer"] for r in rows]
        yield Score(name, len(rows), accuracy(run(rows), truths), chance, accuracy(blind_answers(rows, train), truths),
                    accuracy(run(swapped(rows)), truths))
    rows = tasks["Dialogue"]
    right = [metrics.exact(row["answer"], [truth]) for row, truth in dialogue_items(rows, answerer)]
    wrong = [metrics.exact(row["answer"], [truth]) for row, truth in dialogue_items(swapped(rows), answerer)]
    yield Score("dialogue, turns 2 to 4", len(right), sum(right) / len(right), None, blind_dialogue(rows, train),
                sum(wrong) / len(wrong))
    for task, name in (("FewShotSeen", "4-way, 4 shots, classes seen"), ("FewShotUnseen", "4-way, 4 shots, classes never seen")):
        rows = tasks[task]
        truths = [r["answer"] for r in rows]
        yield Score(name, len(rows), accuracy(run(rows), truths), 1 / 4, 1 / 4, accuracy(run(swapped(rows)), truths))
        bare = [{k: v for k, v in r.items() if k != "shots"} for r in rows]
        yield Score(name.replace("4 shots", "0 shots"), len(rows), accuracy(run(bare), truths), 1 / 4, 0.0, None)
    rows = tasks["Pool"]
    truths = [r["answer"] for r in rows]
    for how in ("nearest", "random"):
        shot = with_pool_shots(rows, answerer.store, how)
        yield Score(f"pool of 12, 4 {how} shots", len(rows), accuracy(run(shot), truths), 1 / 12, 1 / 12,
                    accuracy(run(swapped(shot)), truths))


def table(results: list[Score]) -> str:
    def cell(value):
        return "   -  " if value is None else f"{value:6.3f}"
    lines = [f"{'task':36s} {'items':>6s} {'score':>7s} {'chance':>7s} {'blind':>7s} {'swapped':>8s}"]
    lines += [f"{s.name:36s} {s.items:6d}  {cell(s.score)}  {cell(s.chance)}  {cell(s.blind)}   {cell(s.swapped)}" for s in results]
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

"""Scores with what stands beside them, and those of the embedded data set, each beside what can be had without listening: the table of the README.

`chance`: uniform over the possible answers. `blind`: the best answer that ignores the audio, always the one that the training
rows give most often to this question, and for few-shot one of the words in the prompt. `swapped`: the same model and items, but
each item gets the audio of another one; a score that needs listening falls to the blind level.
"""
from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np

from . import metrics, retrieval
from .store import Store

Ask = Callable[[list[dict]], list[str]]                # rows that end with their question -> answers
Measure = Callable[[np.ndarray], float]                # numbers of items -> score


# ---------------------------------------------------------------------- items

def by_task(rows: Iterable[dict], items: int = 0) -> dict[str, list[dict]]:
    """Rows of each task, `items` of them (0: all) at even distances: a test split may be sorted by answer."""
    tasks = defaultdict(list)
    for row in rows:
        tasks[row["task"]].append(row)
    counts = {task: min(items or len(rows), len(rows)) for task, rows in tasks.items()}
    return {task: [rows[i * len(rows) // counts[task]] for i in range(counts[task])] for task, rows in sorted(tasks.items())}


def dialogue_items(rows: list[dict], ask: Ask, first: int = 1) -> Iterator[tuple[dict, str]]:
    """Turns from number `first` on, the model's own answers before them: (row with "prompt" and the right "answer", its answer)."""
    said: list[list[str]] = [[] for _ in rows]
    for turn in range(max(len(r["turns"]) for r in rows)):
        live = [i for i, r in enumerate(rows) if len(r["turns"]) > turn]
        asked = [{**rows[i], "turns": [
            {"user": t["user"], "assistant": s} for t, s in zip(rows[i]["turns"], [*said[i], ""])]} for i in live]
        for i, row, answer in zip(live, asked, ask(asked)):
            said[i].append(answer or "?")
            if turn >= first:
                yield {**row, "prompt": row["turns"][-1]["user"], "answer": rows[i]["turns"][turn]["assistant"]}, answer


def with_pool_shots(rows: list[dict], store: Store, how: str, shots: int = 4, seed: int = 0) -> list[dict]:
    """Rows with a pool -> rows with the `shots` pool recordings nearest to the query, nearest last, or as many at random."""
    out, rng = [], random.Random(seed)
    for row in rows:
        *vectors, query = (retrieval.pooled(store[part["audio"], part["start"]]) for part in [*row["pool"], row])
        chosen = rng.sample(row["pool"], shots) if how == "random" else \
            [row["pool"][i] for i in reversed(retrieval.nearest(query, np.stack(vectors), shots))]
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
            answer = metrics.normalized(answer)
            by_prompt[row["task"], row["prompt"].lower()][answer] += 1
            by_task[row["task"]][answer] += 1
    return [(by_prompt.get((r["task"], r["prompt"].lower())) or by_task[r["task"]]).most_common(1)[0][0] if by_task[r["task"]] else ""
            for r in rows]


def exactly(answers: list[str], references: list[list[str]]) -> Measure:
    right = np.array([metrics.exact(answer, refs) for answer, refs in zip(answers, references)])
    return lambda i: float(right[i].mean())


def by_events(answers: list[str], references: list[list[str]]) -> Measure:
    counts = np.array([metrics.event_counts(answer, refs[0]) for answer, refs in zip(answers, references)])
    return lambda i: metrics.f1(counts[i].sum(0))


def figures(measure: Measure, items: int, draws: int = 1000, **beside: Measure | float | None) -> dict[str, float | None]:
    """Score, 95 % by bootstrap over the items, and what stands beside it: the same measure of other answers, or a number."""
    everything = np.arange(items)
    low, high = metrics.interval(measure, items, draws)
    return {"score": float(measure(everything)), "low": low, "high": high,
            **{name: float(other(everything)) if callable(other) else other for name, other in beside.items()}}


QUESTION_SCORES = {  # task: (name in the table, chance)
    "Presence": ("yes / no", 1 / 2), "Count": ("count all", 1 / 5), "CountOf": ("count of X", 1 / 4),
    "After": ("what comes after X", 1 / 20), "Before": ("what comes before X", 1 / 20),
    "Pitch": ("pitch of X", 1 / 2), "Length": ("length of X", 1 / 2)}


def scored(name: str, rows: list[dict], said: list[str], moved: list[str] | None, chance: float | None, blind: list[str] | float,
           of: Callable[[list[str], list[list[str]]], Measure] = exactly) -> dict:
    """The score of answers, of those without listening (or what these would get) and of those to another recording."""
    measure = partial(of, references=[[row["answer"]] for row in rows])
    blind, moved = (measure(answers) if isinstance(answers, (list, tuple)) else answers for answers in (blind, moved))
    return {"name": name, "items": len(rows), **figures(measure(said), len(rows), chance=chance, blind=blind, swapped=moved)}


def scores(ask: Ask, store: Store, test: list[dict], train: list[dict], items: int = 0) -> Iterator[dict]:
    """All scores of the embedded data set, one after the other."""
    tasks = by_task(test, items)
    turns = [{"task": "Dialogue", "prompt": turn["user"], "answer": turn["assistant"]} for row in train for turn in row.get("turns", [])]

    def both(rows: list[dict]) -> tuple[list[dict], list[str], list[str]]:
        """Rows, answers, answers about another recording."""
        return rows, ask(rows), ask(swapped(rows))

    rows, *answers = both(tasks["AudioCaptioning"])
    for name, of in (("caption: event F1", by_events), ("caption: all events in order", exactly)):
        yield scored(name, rows, *answers, None, blind_answers(rows, train), of)
    for task, (name, chance) in QUESTION_SCORES.items():
        yield scored(name, *both(tasks[task]), chance, blind_answers(tasks[task], train))
    (rows, said), (_, moved) = (zip(*dialogue_items(of, ask)) for of in (tasks["Dialogue"], swapped(tasks["Dialogue"])))
    yield scored("dialogue, turns 2 to 4", rows, said, moved, None, blind_answers(rows, turns))
    for task, classes in (("FewShotSeen", "classes seen"), ("FewShotUnseen", "classes never seen")):
        yield scored(f"4-way, 4 shots, {classes}", *both(tasks[task]), 1 / 4, 1 / 4)
        bare = ask([{k: v for k, v in row.items() if k != "shots"} for row in tasks[task]])
        yield scored(f"4-way, 0 shots, {classes}", tasks[task], bare, None, 1 / 4, 0.0)
    for how in ("nearest", "random"):
        yield scored(f"pool of 12, 4 {how} shots", *both(with_pool_shots(tasks["Pool"], store, how)), 1 / 12, 1 / 12)


def table(results: list[dict], head: str, line: str) -> str:
    """`line` is filled from a result; score, interval and what stands beside them follow."""
    def cell(value):
        return "   -  " if value is None else f"{value:6.3f}"
    beside = {name: width for name, width in (("chance", 8), ("blind", 8), ("swapped", 9)) if name in results[0]}
    lines = [f"{head} {'score':>7s}  {'[95 %]':14s}" + "".join(f"{name:>{width}s}" for name, width in beside.items())]
    lines += [f"{line.format(**r)}  {cell(r['score'])}  [{r['low']:.3f}, {r['high']:.3f}]"
              + "".join(f"{cell(r[name]):>{width}s}" for name, width in beside.items()) for r in results]
    return "\n".join(lines)


def transcript(ask: Ask, test: list[dict]) -> str:
    """One dialogue, in which the model's own answers stand, and one few-shot episode, beside the right answers."""
    row = next(r for r in test if r["task"] == "Dialogue" and len(r["turns"]) >= 3)
    lines = [f"A dialogue about {row['audio']} ({row['description']}):"]
    lines += [f"    {turn['prompt']:34s} {said:12s} (right: {turn['answer']})" for turn, said in dialogue_items([row], ask, first=0)]
    row = next(r for r in test if r["task"] == "FewShotUnseen")
    lines.append("A few-shot episode, made-up words for sounds that no stage of training has heard:")
    lines += [f"    {s['audio']:34s} {s['answer']}" for s in row["shots"]]
    lines.append(f"    {row['audio']:34s} {ask([row])[0]:12s} (right: {row['answer']})")
    return "\n".join(lines)

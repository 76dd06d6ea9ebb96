"""Scores of answers: exact match, and for captions that list events, how many and whether in order."""
from __future__ import annotations

from collections import Counter


def normalized(answer: str) -> str:
    """Lower case, single spaces, no full stop at the end."""
    return " ".join(answer.lower().split()).rstrip(".").strip()


def exact(answer: str, references: list[str]) -> float:
    """1 if the answer equals one of the references after `normalized`."""
    return float(normalized(answer) in {normalized(r) for r in references})


def events(caption: str) -> list[str]:
    """'bell then dog' -> ['bell', 'dog']."""
    return [e for e in normalized(caption).split(" then ") if e]


def event_counts(answer: str, reference: str) -> tuple[int, int, int]:
    """(events in both, events in the answer, events in the reference), as multisets; order does not count."""
    said, true = Counter(events(answer)), Counter(events(reference))
    return sum((said & true).values()), sum(said.values()), sum(true.values())


def event_f1(answers: list[str], references: list[str]) -> float:
    """Micro-averaged F1 over all events of all captions: 2 hits / (events said + events true)."""
    hits, said, true = (sum(n) for n in zip(*(event_counts(a, r) for a, r in zip(answers, references))))
    return 2 * hits / max(1, said + true)

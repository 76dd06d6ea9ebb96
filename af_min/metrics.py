"""Scores of answers. Captions, for words w of an answer and of its references (one or several), n-grams g, n = 1..4:

    BLEU-n     (prod_m p_m)^(1/n) exp(min(0, 1 - r / c))        p_m: clipped m-gram precision of all captions together;
                                                                c, r: words said, words of the references nearest in length
    ROUGE-L    (1 + b^2) P R / (R + b^2 P), b = 1.2             P, R: longest common subsequence / length, each the best
                                                                of the references
    CIDEr-D    10 mean_n mean_ref exp(-(l - l_ref)^2 / 2 s^2) sum_g min(v_g, v'_g) v'_g / |v||v'|,  s = 6
               v_g = (count of g) log(items / items in whose references g occurs)

All three equal pycocoevalcap's on the same words (tests/test_metrics.py). **Which words**: `words` below: lower case, punctuation
dropped, "n't" and "'s" split off. The published figures come from Stanford's tokenizer, which treats captions so, but numbers
with commas and abbreviations otherwise: a second reason, beside decoding, why the last digit may differ.

Sound tags ("dog, bark"): exact F1, and **F1-approx**, micro-averaged: a tag said counts for a true one if they share at least half
of their words (2 |both| / (|a| + |b|) >= 0.5), each tag once, the likest pairs first. This is our definition: the paper reports
an approximate F1 on FSD50K, and we could not verify how it matched.
"""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import numpy as np

Words = list[str]
SIGMA, BETA, SMALL, TINY = 6.0, 1.2, 1e-9, 1e-15       # the last two: pycocoevalcap's guards against 0 / 0


def normalized(answer: str) -> str:
    """Lower case, single spaces, no full stop at the end."""
    return " ".join(answer.lower().split()).rstrip(".").strip()


def exact(answer: str, references: list[str]) -> float:
    """1 if the answer equals one of the references after `normalized`."""
    return float(normalized(answer) in {normalized(r) for r in references})


def words(text: str) -> Words:
    """'A dog doesn't bark, twice.' -> a dog does n't bark twice. Inner hyphens stay."""
    text = re.sub(r"(n't|'(?:s|re|ve|ll|d|m))\b", r" \1 ", text.lower().replace("\u2019", "'"))
    return re.findall(r"(?<!\w)n't|(?<!\w)'(?:s|re|ve|ll|d|m)\b|\w+(?:-\w+)*", text)


# ---------------------------------------------------------------------- captions

def ngrams(caption: Words, n: int) -> Counter:
    return Counter(tuple(caption[i:i + n]) for i in range(len(caption) - n + 1))


def cider_d(said: list[Words], references: list[list[Words]]) -> np.ndarray:
    """CIDEr-D of every item, (N,); their mean is the score. Rarity is counted over these references: one item alone gets 0."""
    def vector(caption: Words) -> list[dict]:
        return [{g: count * (np.log(len(said)) - np.log(max(1, documents[g]))) for g, count in ngrams(caption, n).items()}
                for n in range(1, 5)]

    def length(v: dict) -> float:
        return sum(value * value for value in v.values()) ** 0.5

    documents = Counter(g for refs in references for g in {g for ref in refs for n in range(1, 5) for g in ngrams(ref, n)})
    scores = []
    for answer, refs in zip(said, references):
        ours, total = vector(answer), 0.0
        for ref in refs:
            shorter = max(0, len(answer) - 1) - max(0, len(ref) - 1)         # lengths are counted in 2-grams
            theirs = vector(ref)
            for a, b in zip(ours, theirs):
                both = sum(min(value, b[g]) * b[g] for g, value in a.items() if g in b)
                total += both / (length(a) * length(b) or 1.0) * np.exp(-shorter ** 2 / (2 * SIGMA ** 2))
        scores.append(10 * total / 4 / len(refs))
    return np.array(scores)


def bleu_counts(said: list[Words], references: list[list[Words]]) -> np.ndarray:
    """What `bleu` adds up, of every item, (N, 10): clipped matches, n-grams said (n = 1..4), words said, those of the nearest."""
    counts = []
    for answer, refs in zip(said, references):
        matches = []
        for n in range(1, 5):
            most = Counter()
            for ref in refs:
                most |= ngrams(ref, n)
            matches.append(sum((ngrams(answer, n) & most).values()))
        nearest = min((abs(len(ref) - len(answer)), len(ref)) for ref in refs)[1]
        counts.append([*matches, *(max(0, len(answer) - n) for n in range(4)), len(answer), nearest])
    return np.array(counts, np.float64)


def bleu(total: np.ndarray) -> np.ndarray:
    """Sum of `bleu_counts` (10,) -> BLEU-1 .. BLEU-4."""
    precision = (total[:4] + TINY) / (total[4:8] + SMALL)
    ratio = (total[8] + TINY) / (total[9] + SMALL)
    return np.cumprod(precision) ** (1 / np.arange(1, 5)) * min(1.0, np.exp(1 - 1 / ratio))


def common(a: Words, b: Words) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(said: list[Words], references: list[list[Words]]) -> np.ndarray:
    """ROUGE-L of every item, (N,)."""
    scores = []
    for answer, refs in zip(said, references):
        shared = [(common(answer, ref), max(1, len(ref))) for ref in refs]
        precision = max(n for n, _ in shared) / max(1, len(answer))
        recall = max(n / length for n, length in shared)
        scores.append((1 + BETA ** 2) * precision * recall / (recall + BETA ** 2 * precision) if precision else 0.0)
    return np.array(scores)


# ---------------------------------------------------------------------- tags

def tags(answer: str) -> list[str]:
    """'dog, door bell.' -> ['dog', 'door bell']."""
    return [tag for part in answer.split(",") if (tag := normalized(part))]


def alike(a: str, b: str) -> float:
    """Share of common words, 2 |both| / (|a| + |b|): 1 for equal tags, 2/3 for 'guitar' and 'acoustic guitar'."""
    a, b = set(words(a)), set(words(b))
    return 2 * len(a & b) / max(1, len(a) + len(b))


def tag_counts(answer: str, reference: str, least: float = 1.0) -> tuple[int, int, int]:
    """(pairs, tags said, true tags): every tag in one pair at most, the likest pairs first, none less alike than `least`."""
    said, true = tags(answer), tags(reference)
    pairs = sorted(((alike(a, b), i, j) for i, a in enumerate(said) for j, b in enumerate(true)), key=lambda p: (-p[0], p[1:]))
    used: set[tuple[str, int]] = set()
    hits = 0
    for likeness, i, j in pairs:
        if likeness >= least and not used & {("said", i), ("true", j)}:
            used |= {("said", i), ("true", j)}
            hits += 1
    return hits, len(said), len(true)


def f1(total: np.ndarray) -> float:
    """Sum of counts (hits, said, true) -> 2 hits / (said + true), the micro-averaged F1."""
    return float(2 * total[0] / max(1, total[1] + total[2]))


def mean_average_precision(scores_NC: np.ndarray, true_NC: np.ndarray) -> float:
    """Mean over the classes that occur of AP = sum_k (recall_k - recall_k-1) precision_k, items by falling score.

    (N items, C classes) each; items of equal score are one step k."""
    values = []
    for scores, true in zip(np.asarray(scores_NC).T, np.asarray(true_NC, bool).T):
        if true.any():
            order = np.argsort(-scores, kind="stable")
            last = np.append(np.diff(scores[order]) != 0, True)               # where the next score is another
            hits = np.cumsum(true[order])[last]
            precision = hits / (np.flatnonzero(last) + 1)
            values.append((np.diff(hits, prepend=0) * precision).sum() / true.sum())
    return float(np.mean(values)) if values else 0.0


# ---------------------------------------------------------------------- captions that list events

def events(caption: str) -> list[str]:
    """'bell then dog' -> ['bell', 'dog']."""
    return [e for e in normalized(caption).split(" then ") if e]


def event_counts(answer: str, reference: str) -> tuple[int, int, int]:
    """(events in both, events in the answer, events in the reference), as multisets; order does not count."""
    said, true = Counter(events(answer)), Counter(events(reference))
    return sum((said & true).values()), sum(said.values()), sum(true.values())


# ---------------------------------------------------------------------- how sure

def interval(score: Callable[[np.ndarray], float], items: int, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Bootstrap 95 % interval: quantiles .025 and .975 of `score(numbers of items)` over `draws` samples with replacement."""
    rng = np.random.default_rng(seed)
    low, high = np.quantile([score(rng.integers(items, size=items)) for _ in range(draws)], (0.025, 0.975))
    return float(low), float(high)

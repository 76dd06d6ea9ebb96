"""Manifests -> weighted mixture -> batches. The order of training is a function of (seed, step) alone.

Every data set is an endless stream: its rows in a new random order on each pass. A virtual epoch takes from each stream its
share by weight, sorts what it took by length and cuts it into parts of similar length; a batch is a few parts drawn at random, so
that little is padded and yet every gradient sees long and short samples. Batch number `step` is therefore known without running
the steps before it, and a resumed run sees what the interrupted one would have seen.
"""
from __future__ import annotations

import bisect
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from . import manifest
from .cli import UserError
from .store import Store
from .text import IGNORE, Sample, Tokenizer, write_sample

PARTS = 4           # of a batch, at most, each padded for itself
PART_TOKENS = 1280  # of a part, at least: fewer are not worth a pass of their own
EPOCH_BATCHES = 16  # batches of a virtual epoch: enough to sort by length, few enough to mix


@dataclass
class Dataset:
    """Rows of one split of a prepared data set, tokenized, with the store that holds its window embeddings."""
    name: str
    samples: list[Sample]
    tasks: list[str] = field(default_factory=list)      # of each sample, for the log
    store: Store | None = None
    weight: float = 1.0


def parse_data(specs: list[str]) -> list[tuple[Path, float]]:
    """`folder` or `folder:weight` -> (folder, weight). UserError for a folder without card.json or a bad weight."""
    parsed = []
    for spec in specs:
        folder, weight = re.fullmatch(r"(.*?)(?::(\d+\.?\d*|\.\d+))?", spec, re.DOTALL).groups("1")
        manifest.read_card(folder)
        if not float(weight) > 0:
            raise UserError(f"--data {spec}: the weight must be above 0")
        parsed.append((Path(folder), float(weight)))
    return parsed


def rows_of(folder: Path, split: str, stage: str) -> list[dict]:
    """The rows that a stage learns from. clap: the window captions; lm: all others; pretrain: those of them that have a recording; sft: the
    same without roll calls, which would take the place of what the model is asked for."""
    rows = [r for r in manifest.read_rows(folder / f"{split}.jsonl") if (r["task"] == "WindowText") == (stage == "clap")]
    if stage != "lm":
        rows = [r for r in rows if r.get("audio")]
    return [r for r in rows if stage != "sft" or r["task"] != "RollCall"]


@manifest.nothing_is_garbage()
def tokenized(rows: list[dict], tokenizer: Tokenizer, max_tokens: int, described: bool = False) -> tuple[list[Sample], list[str]]:
    """-> samples of rows, the task of each; several references make several samples; what has no supervised token left is dropped."""
    flat = [{**row, "answer": answer} for row in rows for answer in row.get("answers", [row.get("answer", "")])]
    samples = [(write_sample(tokenizer, row, described, max_tokens=max_tokens), row["task"]) for row in flat]
    kept = [(s, task) for s, task in samples if any(label != IGNORE for label in s.labels[1:])]
    return [s for s, _ in kept], [task for _, task in kept]


def padded(rows: list[list[int]], fill: int = 0, left: bool = False) -> torch.Tensor:
    """Rows of whole numbers -> (B, T), each with `fill` behind it, or before it."""
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=fill,
                        padding_side="left" if left else "right")


@dataclass
class Batch:
    ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    mask_BT: torch.Tensor
    windows_AWD: torch.Tensor      # embeddings of all audios, sample after sample; float32
    n_windows_BN: torch.Tensor     # 0 where a sample has fewer audios

    def to(self, device) -> "Batch":
        return Batch(*(t.to(device, non_blocking=True) for t in vars(self).values()))


def collate(samples: list[tuple[Sample, Store | None]], pad_id: int, width: int, left: bool = False) -> Batch:
    """Pad samples to one batch, on the right for training, on the left for generation."""
    ids, labels, real = zip(*((s.ids, s.labels, [1] * len(s.ids)) for s, _ in samples))
    audios = [[store[place] for place in s.audios] for s, store in samples]
    flat = [torch.from_numpy(np.asarray(a, np.float32)) for of_sample in audios for a in of_sample]
    windows = pad_sequence(flat, batch_first=True) if flat else torch.zeros(0, 0, width)
    return Batch(padded(ids, pad_id, left), padded(labels, IGNORE, left), padded(real, 0, left).bool(), windows,
                 padded([[len(a) for a in of_sample] for of_sample in audios]))


def stream(size: int, first: int, count: int, *seed: int) -> list[int]:
    """Elements first .. first + count - 1 of an endless stream: the numbers below `size` in a new random order on each pass."""
    out = []
    while len(out) < count:
        turn, place = divmod(first + len(out), size)
        out += np.random.default_rng([*seed, turn]).permutation(size)[place:place + count - len(out)].tolist()
    return out


class Mixture:
    """The weighted mixture of data sets: `batch(step)` is a list of parts, a part a list of (data set number, sample number)."""

    def __init__(self, datasets: list[Dataset], max_samples: int, max_tokens: int, seed: int):
        self.datasets, self.seed = datasets, seed
        self.parts = max(1, min(PARTS, max_samples, max_tokens // PART_TOKENS))
        self.max_samples, self.max_tokens = max_samples // self.parts, max_tokens // self.parts    # of a part
        if not any(d.samples for d in datasets):
            raise UserError(f"nothing to train on in {', '.join(d.name for d in datasets)}: no row of this stage's kind")
        self.lengths = [np.array([len(s.ids) for s in d.samples]) for d in datasets]
        total = sum(d.weight for d in datasets if d.samples)
        mean = sum(d.weight / total * n.mean() for d, n in zip(datasets, self.lengths) if len(n))
        epoch = EPOCH_BATCHES * min(max_samples, max(1, int(max_tokens / mean)))
        self.takes = [max(1, round(epoch * d.weight / total)) if d.samples else 0 for d in datasets]
        self._ends: list[int] = []     # of each virtual epoch met so far: the step after its last; the batches of the latest alone are kept
        self._latest: tuple[int, list] = -1, []

    def epoch(self, number: int) -> list[list[list[tuple[int, int]]]]:
        """The batches of one virtual epoch."""
        rng = np.random.default_rng([self.seed, 1 << 20, number])
        drawn = [(d, i) for d, take in enumerate(self.takes) for i in stream(len(self.lengths[d]), number * take, take, self.seed, d)]
        drawn = [drawn[i] for i in rng.permutation(len(drawn))]
        drawn.sort(key=lambda place: self.lengths[place[0]][place[1]])
        parts, part = [], []
        for d, i in drawn:  # ascending length: the newcomer is the longest, all are padded to it
            if part and (len(part) == self.max_samples or (len(part) + 1) * self.lengths[d][i] > self.max_tokens):
                parts.append(part)
                part = []
            part.append((d, i))
        parts.append(part)
        parts = [parts[i] for i in rng.permutation(len(parts))]
        return [parts[i:i + self.parts] for i in range(0, len(parts), self.parts)]

    def batch(self, step: int) -> list[list[tuple[int, int]]]:
        """The global batch of a step (0, 1, ...), the same on every process."""
        while not self._ends or self._ends[-1] <= step:
            self._latest = len(self._ends), self.epoch(len(self._ends))
            self._ends.append(sum(self._ends[-1:]) + len(self._latest[1]))
        number = bisect.bisect(self._ends, step)
        if number != self._latest[0]:
            self._latest = number, self.epoch(number)
        return self._latest[1][step - self._ends[number]]      # counted from the end

    def collate(self, places: list[tuple[int, int]], pad_id: int, width: int) -> Batch:
        return collate([(self.datasets[d].samples[i], self.datasets[d].store) for d, i in places], pad_id, width)


class WindowCaptions:
    """Batches for contrastive training: a few windows of each of many recordings, so that neighbours are told apart too."""

    def __init__(self, rows: list[dict], size: int, seed: int, each: int = 4):
        groups = defaultdict(list)
        for row in rows:
            groups[row["audio"]].append(row)
        self.groups = list(groups.values())
        if not self.groups:
            raise UserError("nothing to train the window encoder on: no row has the task WindowText; your own recordings teach a trained model: "
                            "--stage sft --init RUN")
        self.size, self.seed, self.each = size, seed, each

    def batch(self, step: int) -> list[dict]:
        """`size` rows, the same on every process."""
        count = self.size // self.each
        groups = (self.groups[i] for i in stream(len(self.groups), step * count, count, self.seed, 1 << 21))
        return [group[j % len(group)] for group in groups for j in range(self.each)]

"""Nearest recordings: which examples to show before a question (paper section 4: few-shot samples by nearest audio embedding).

A recording's vector is the mean of its window embeddings at length 1; two recordings are as near as their vectors' cosine:

    v = m / |m|,   m = (1/W) sum_w e_w            nearest(x) = the k recordings with the largest v . v_x, never x itself

"Itself" goes by content (the hash of the file's bytes and of where listening starts): a copy under another name is no example.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from . import audio, data
from .cli import UserError
from .flamingo import AudioFlamingo
from .store import Store, recording_key
from .text import SAME_AS

Place = tuple[str, float]                  # file, second at which listening starts


@dataclass(frozen=True)
class Heard:
    """One recording as the model hears it."""
    path: str
    key: str                               # content: `store.recording_key`
    recording: audio.Recording
    windows_WD: np.ndarray                 # (W, D) float16, what a Store would hold


def hear(model: AudioFlamingo, path, start: float = 0.0) -> Heard:
    """Read and encode one file from second `start` on. AudioError (a UserError) names what is wrong with it."""
    config = model.config.audio
    recording = audio.load(path, config.sample_rate, start, config.max_seconds)
    windows_WS = audio.windows(torch.from_numpy(recording.samples), config)
    windows_WD = model.encode(windows_WS.to(next(model.parameters()).device)).half().cpu().numpy()
    return Heard(str(path), recording_key(path, start), recording, windows_WD)


def pooled(windows_WD: np.ndarray) -> np.ndarray:
    """Window embeddings (W, D) -> one vector (D,) float32 of length 1."""
    mean_D = np.asarray(windows_WD, np.float32).mean(0)
    return mean_D / max(np.linalg.norm(mean_D), 1e-12)


def nearest(query_D: np.ndarray, vectors_ND: np.ndarray, k: int, chunk: int = 1 << 16) -> np.ndarray:
    """Rows of the k largest dot products with the query, largest first, equal ones in their order; exact. (min(k, N),) int64.

    The product is made `chunk` rows at a time: vectors_ND may be a float16 file in memory-mapping.
    """
    cosine_N = np.zeros(len(vectors_ND), np.float32)
    for first in range(0, len(vectors_ND), chunk):
        cosine_N[first:first + chunk] = np.asarray(vectors_ND[first:first + chunk], np.float32) @ np.asarray(query_D, np.float32)
    return np.argsort(-cosine_N, kind="stable")[:k]


def answers_task(row: dict, task: str) -> bool:
    """Whether a row can be a shot of the task: of that name, or asked under its prefix (Count is an AQA), with one answer."""
    return task in (row["task"], SAME_AS.get(row["task"])) and "turns" not in row


class Library:
    """Training rows of one task from prepared data sets: the examples that questions can be given."""

    def __init__(self, model: AudioFlamingo, specs: list[str], task: str, progress: Callable = lambda items: items):
        """specs: `folder` or `folder:weight`, as train.py takes them. Recordings that were never encoded are now.

        UserError: no data set there, or none of its training rows is of the task.
        """
        self.rows: dict[Place, list[dict]] = {}
        self.windows: dict[Place, np.ndarray] = {}
        self.stored: list[tuple[Store, Place]] = []        # of recording n
        known: set[str] = set()
        for folder, _ in data.parse_data(specs):
            rows = data.rows_of(folder, "train", "sft")
            known |= {row["task"] for row in rows if "turns" not in row}
            rows = [row for row in rows if answers_task(row, task)]
            store = Store(folder, model.encoder, model.config.audio, model.config.clap.out_width)
            own = {(row["audio"], row["start"]) for row in rows}
            store.add(own, progress)
            self.stored += [(store, place) for place in sorted(own)]
            for row in rows:
                file = str(folder / row["audio"])
                self.rows.setdefault((file, row["start"]), []).append(
                    {"audio": file, "start": row["start"], "prompt": row["prompt"], "answer": row.get("answer") or row["answers"][0]})
        if not self.rows:
            raise UserError(f"--shots: no training row of {', '.join(specs)} is of the task {task}; --task can be "
                            f"{', '.join(sorted(known)) or 'nothing there'}")
        self.places = [(str(store.folder / file), start) for store, (file, start) in self.stored]
        self.vectors_ND = np.stack([pooled(store[place]) for store, place in self.stored])

    def shots(self, heard: Heard, k: int, choice: str, prompt: str, seed: int = 0) -> list[dict]:
        """k rows as shots for a recording, the nearest last, beside the question (or k at random by seed and content).

        Of several questions about one recording the one that is asked like `prompt` is taken, else the first.
        UserError if there are fewer than k other recordings.
        """
        same = {n for n, (store, place) in enumerate(self.stored) if store.places[place] == store.index.get(heard.key)}
        if len(self.stored) - len(same) < k:
            raise UserError(f"--shots {k}: there are only {len(self.stored) - len(same)} other recordings of this task")
        if choice == "nearest":
            order = nearest(pooled(heard.windows_WD), self.vectors_ND, k + len(same))
        else:
            order = np.random.default_rng([seed, int(heard.key, 16)]).permutation(len(self.stored))
        chosen = [int(n) for n in order if n not in same][:k]
        shots = []
        for n in reversed(chosen):
            store, place = self.stored[n]
            self.windows[self.places[n]] = store[place]
            rows = self.rows[self.places[n]]
            shots.append(next((row for row in rows if row["prompt"].lower() == prompt.lower()), rows[0]))
        return shots

"""Window embeddings of whole data sets, computed once: the encoder is frozen, so a recording is encoded one time only.

    <data set>/embeddings/<encoder hash>/vectors.f16    rows of D float16, appended, memory-mapped for reading
    <data set>/embeddings/<encoder hash>/index.jsonl    one line a recording: {"key", "first", "count"}

A recording's key is the hash of its file's bytes and the place where listening starts. A line of the index is written after
its vectors: what an interruption leaves behind is a tail of vectors that no line names and half a line, and the next run
overwrites both. A line whose vectors are not there (a copy that was cut off) counts for nothing, like all that follow it.

Several processes share the work: each encodes every n-th recording into a shelf of its own (vectors-<rank>.f16 and its index),
and process 0 takes the shelves over; those that an interrupted run left are taken over by the next one.

Measured, the encoder at `af1` size (random weights, tests/bench_retrieval.py) on one busy CPU core: 2.5 recordings of 10 s, 7.5
windows, a second. On paper, the paper's 5.9 M pairs as such clips: 17.7 M windows, 36 GB of vectors, 0.4 GB of index, 12 GB of
pooled vectors; 14.1 GFLOP a window make 2.5e17 FLOP, 27 days of that core, or 0.7 h at 100 TFLOP/s, where reading and
decoding 16 400 h of audio sets the pace; the nearest of all for all (7e16 FLOP) are 0.2 h at 100 TFLOP/s.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from . import audio
from .clap import WindowEncoder
from .cli import UserError, fcntl, return_freed_memory
from .config import AudioConfig
from .lanes import side_by_side
from .manifest import whole_lines

Place = tuple[str, float]                          # file, second at which listening starts


def encoder_hash(encoder: WindowEncoder, config: AudioConfig) -> str:
    """Changes with any weight or dimension of the encoder, and with how recordings are cut into windows."""
    digest = hashlib.sha256(repr(config).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def recording_key(path: Path, start: float) -> str:
    """`<hash of the file's bytes>@<second>`: cuts of one recording differ behind the @ alone."""
    try:
        digest = hashlib.blake2b(Path(path).read_bytes(), digest_size=12)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); the manifest names it, so prepare the data set again") from None
    return f"{digest.hexdigest()}@{start:.3f}"


def content(key: str) -> str:
    """The part of a key that all cuts and copies of one recording share."""
    return key.partition("@")[0]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time in here: two that append at the same place would spoil each other's vectors."""
    with open(path, "w") as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)       # released when the file is closed, by a kill too
        yield


class Shelf:
    """One vectors file and its index. `entries`: key -> (first row, count); `end`: rows in all; `whole`: bytes of the index that count."""

    def __init__(self, home: Path, width: int, suffix: str = ""):
        self.vectors, self.index, self.width = home / f"vectors{suffix}.f16", home / f"index{suffix}.jsonl", width
        self.entries: dict[str, tuple[int, int]] = {}
        self.end = self.whole = 0

    def read(self) -> None:
        """Note what is stored."""
        held = self.vectors.stat().st_size // (2 * self.width) if self.vectors.exists() else 0
        self.entries, self.end, self.whole = {}, 0, 0
        for entry, whole in whole_lines(self.index):
            end = entry["first"] + entry["count"]
            if end > held:
                break
            self.entries[entry["key"]] = (entry["first"], entry["count"])
            self.end, self.whole = max(self.end, end), whole

    def map(self) -> np.ndarray:
        """All vectors, (rows, D) float16, memory-mapped."""
        return np.memmap(self.vectors, np.float16, "r", shape=(self.end, self.width)) if self.end else \
            np.zeros((0, self.width), np.float16)

    def append(self, recordings: list[tuple[str, np.ndarray]]) -> None:
        """Add the (W, D) float16 vectors of some keys in place of what is behind the last whole line."""
        self.vectors.touch()
        with open(self.vectors, "r+b") as vectors:
            vectors.seek(self.end * self.width * 2)
            vectors.write(b"".join(windows_WD.tobytes() for _, windows_WD in recordings))
        with open(self.index, "ab") as index:
            index.truncate(self.whole)
            for key, windows_WD in recordings:
                self.whole += index.write(json.dumps({"key": key, "first": self.end, "count": len(windows_WD)}).encode() + b"\n")
                self.entries[key] = (self.end, len(windows_WD))
                self.end += len(windows_WD)


class Store:
    """Embeddings of the recordings of one data set folder under one encoder: `store["audio/x.wav", 0.0]` is (W, D) float16."""

    def __init__(self, folder: Path, encoder: WindowEncoder, config: AudioConfig, width: int):
        self.folder, self.encoder, self.config, self.width = Path(folder), encoder, config, width
        self.home = self.folder / "embeddings" / encoder_hash(encoder, config)
        self.home.mkdir(parents=True, exist_ok=True)
        self.shelf = Shelf(self.home, width)
        self.keys: dict[Place, str] = {}
        self.vectors = self.shelf.map()

    def add(self, recordings: Iterable[Place], name: str = "", batch: int = 128, rank: int = 0, size: int = 1,
            wait: Callable[[], None] = lambda: None) -> int:
        """Encode the recordings (file, start) that are not yet stored, showing a bar called `name`; returns how many windows this process encoded.

        Over `size` processes: all call it with the same recordings, their rank, and a `wait` that returns when all are there.
        """
        with locked(self.home / "lock") if rank == 0 else contextlib.nullcontext():
            if rank == 0:
                self._take_over()
            wait()
            self.shelf.read()
            new = {place: recording_key(self.folder / place[0], place[1]) for place in sorted(set(recordings) - set(self.keys))}
            todo = {key: place for place, key in reversed(new.items()) if key not in self.shelf.entries}     # copies are one
            mine = [(key, todo[key]) for key in reversed(todo)][rank::size]
            done = self._encode(mine, self.shelf if size == 1 else Shelf(self.home, self.width, f"-{rank}"), name * (rank == 0), batch)
            wait()
            if rank == 0 and size > 1:
                self._take_over()
            wait()
        self.shelf.read()
        self.keys |= new
        self.vectors = self.shelf.map()
        return done

    def _take_over(self) -> None:
        """Append other processes' shelves to the main one and remove them."""
        for index in sorted(self.home.glob("index-*.jsonl")):
            part = Shelf(self.home, self.width, index.stem.removeprefix("index"))
            part.read()
            self.shelf.read()
            vectors = part.map()
            new = [(key, vectors[first:first + count]) for key, (first, count) in part.entries.items() if key not in self.shelf.entries]
            for n in range(0, len(new), 256):
                self.shelf.append(new[n:n + 256])
            part.index.unlink()
            part.vectors.unlink(missing_ok=True)

    def _encode(self, recordings: list[tuple[str, Place]], shelf: Shelf, name: str, batch: int) -> int:
        """Read, cut into windows and encode, about `batch` windows at a time, on a CPU in pieces side by side; returns their number."""
        device, before, long = next(self.encoder.parameters()).device, shelf.end, 0
        count = max(1, min(torch.get_num_threads(), batch // 32)) if device.type == "cpu" else 1

        def pieces() -> Iterator[list[tuple[str, torch.Tensor]]]:
            nonlocal long
            waiting = []
            for n, (key, (file, start)) in enumerate(tqdm(recordings, name, unit="rec", disable=not name), 1):
                recording = audio.load(self.folder / file, self.config.sample_rate, start, self.config.max_seconds)
                long += recording.dropped_seconds > 0.1
                waiting.append((key, audio.windows(torch.from_numpy(recording.samples), self.config)))
                if sum(len(w) for _, w in waiting) >= batch // count or n == len(recordings):
                    yield waiting
                    waiting = []

        @torch.no_grad()
        def encode(piece: list[tuple[str, torch.Tensor]]) -> list[tuple[str, np.ndarray]]:
            embedded = self.encoder(torch.cat([w for _, w in piece]).to(device)).half().cpu()
            return [(key, part.numpy()) for (key, _), part in zip(piece, embedded.split([len(w) for _, w in piece]))]

        if not recordings:
            return 0
        for embedded in side_by_side(encode, pieces(), count):
            shelf.append(embedded)
        if long and name:
            print(f"warning: {self.folder}: {long} of {len(recordings)} recordings are longer than the {self.config.max_seconds:g} s that the model "
                  "hears; what follows has no effect", file=sys.stderr)
        if count > 1:
            return_freed_memory()                          # each thread keeps what it has freed
        return shelf.end - before

    def __getitem__(self, place: Place) -> np.ndarray:
        first, count = self.shelf.entries[self.keys[place]]
        return self.vectors[first:first + count]

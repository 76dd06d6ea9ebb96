"""Window embeddings of whole data sets, computed once: the encoder is frozen, so a recording is encoded one time only.

    <data set>/embeddings/<encoder hash>/vectors.f16    rows of D float16, appended, memory-mapped for reading
    <data set>/embeddings/<encoder hash>/index.jsonl    one line a recording: {"key", "first", "count"}

A recording's key is the hash of its file's bytes and of the place where listening starts. A line of the index is written after
its vectors: what an interruption leaves behind is a tail of vectors that no line names and half a line, and the next run
overwrites both. A line whose vectors are not there (a copy that was cut off) counts for nothing, like all that follow it.
"""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from . import audio
from .clap import WindowEncoder
from .cli import UserError
from .config import AudioConfig


def encoder_hash(encoder: WindowEncoder) -> str:
    """Changes with any weight or dimension of the encoder."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def recording_key(path: Path, start: float) -> str:
    try:
        digest = hashlib.blake2b(Path(path).read_bytes(), digest_size=12)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); the manifest names it, so prepare the data set again") from None
    digest.update(f"{start:.3f}".encode())
    return digest.hexdigest()


class Store:
    """Embeddings of the recordings of one data set folder under one encoder: `store["audio/x.wav"]` is (W, D) float16."""

    def __init__(self, folder: Path, encoder: WindowEncoder, config: AudioConfig, width: int):
        self.folder, self.encoder, self.config, self.width = Path(folder), encoder, config, width
        self.home = self.folder / "embeddings" / encoder_hash(encoder)
        self.home.mkdir(parents=True, exist_ok=True)
        self.index: dict[str, tuple[int, int]] = {}          # key -> first row, count
        self.places: dict[tuple[str, float], tuple[int, int]] = {}
        self.vectors = np.zeros((0, width), np.float16)

    def _read_index(self) -> int:
        """Note what is stored; returns how many bytes of index.jsonl are whole."""
        index, vectors = self.home / "index.jsonl", self.home / "vectors.f16"
        held = vectors.stat().st_size // (2 * self.width) if vectors.exists() else 0
        self.index, whole = {}, 0
        for line in index.read_bytes().splitlines(keepends=True) if index.exists() else []:
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or entry["first"] + entry["count"] > held:
                break
            self.index[entry["key"]] = (entry["first"], entry["count"])
            whole += len(line)
        return whole

    def add(self, recordings: Iterable[tuple[str, float]], progress: Callable = lambda items: items, batch: int = 128) -> int:
        """Encode the recordings (file, start) that are not yet stored; returns how many windows were encoded."""
        todo, keys, whole = [], {}, self._read_index()
        for place in sorted(set(recordings) - set(self.places)):
            keys[place] = recording_key(self.folder / place[0], place[1])
            if keys[place] not in self.index:
                todo.append(place)
        end = max((first + count for first, count in self.index.values()), default=0)
        device = next(self.encoder.parameters()).device
        done = 0
        if todo:
            for name in ("vectors.f16", "index.jsonl"):
                (self.home / name).touch()
            os.truncate(self.home / "index.jsonl", whole)
        with open(self.home / "vectors.f16" if todo else os.devnull, "r+b") as vectors, \
                open(self.home / "index.jsonl" if todo else os.devnull, "a") as index:
            waiting: list[tuple[str, torch.Tensor]] = []

            def flush():
                nonlocal end, done, waiting
                if not waiting:
                    return
                with torch.no_grad():
                    embedded = self.encoder(torch.cat([w for _, w in waiting]).to(device)).half().cpu().numpy()
                vectors.seek(end * self.width * 2)
                vectors.write(embedded.tobytes())
                vectors.flush()
                for key, windows in waiting:
                    self.index[key] = (end, len(windows))
                    index.write(json.dumps({"key": key, "first": end, "count": len(windows)}) + "\n")
                    end, done = end + len(windows), done + len(windows)
                index.flush()
                waiting = []

            for file, start in progress(todo):
                recording = audio.load(self.folder / file, self.config.sample_rate, start, self.config.max_seconds)
                windows = audio.windows(torch.from_numpy(recording.samples), self.config)
                if keys[file, start] not in self.index and all(keys[file, start] != k for k, _ in waiting):
                    waiting.append((keys[file, start], windows))
                if sum(len(w) for _, w in waiting) >= batch:
                    flush()
            flush()
        for place, key in keys.items():
            self.places[place] = self.index[key]
        if end:
            self.vectors = np.memmap(self.home / "vectors.f16", np.float16, "r", shape=(end, self.width))
        return done

    def __getitem__(self, place: tuple[str, float]) -> np.ndarray:
        first, count = self.places[place]
        return self.vectors[first:first + count]

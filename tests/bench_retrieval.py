"""Measures retrieval and embedding: the figures in af_min/retrieval.py and af_min/store.py.

    python tests/bench_retrieval.py --sizes 10000 100000 1000000        search, D = 1024, k = 8; memory-mapped float16, 2 GB at 10^6
    python tests/bench_retrieval.py --sizes --clips 12                  recordings/s of the encoder at af1 size, random weights

Vectors come in clusters of about fifty around random centres of random spread, a query being one of them with noise: pure noise would have no
neighbours to find. Recall: share of the exact 8 nearest that the inverted file finds.
"""
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import soundfile
import torch

from af_min import cli, retrieval
from af_min.clap import WindowEncoder
from af_min.cli import flag
from af_min.config import AF1
from af_min.store import Store


@dataclass(frozen=True)
class Args:
    sizes: list[int] = flag([10_000, 100_000], "numbers of vectors", nargs="*")
    queries: int = flag(256, "asked at once")
    probes: list[int] = flag([8, 32, 128], "cells of the inverted file that a search looks into", nargs="+")
    device: str = flag("cpu", "of the exact search")
    clips: int = flag(0, "recordings of 10 s to encode (0: none)")


def make_vectors(path: Path, count: int, width: int = 1024) -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((max(1, count // 50), width)).astype(np.float32)
    vectors = np.memmap(path, np.float16, "w+", shape=(count, width))
    for first in range(0, count, 1 << 14):
        part = rng.standard_normal((min(1 << 14, count - first), width), dtype=np.float32) * rng.uniform(0.3, 1.5, (1, 1))
        part += centres[rng.integers(len(centres), size=len(part))]
        vectors[first:first + len(part)] = part / np.linalg.norm(part, axis=1, keepdims=True)
    return vectors


def timed(work):
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


def search(args: Args) -> None:
    print(f"{'vectors':>9s}  {'exact, ms a query':>18s}   inverted file: built in s; probes: ms a query, recall of 8")
    for count in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            vectors = make_vectors(Path(folder) / "vectors.f16", count)
            rng = np.random.default_rng(1)
            queries = vectors[np.sort(rng.choice(count, min(count, args.queries), replace=False))].astype(np.float32)
            queries += 0.01 * rng.standard_normal(queries.shape)
            exact, seconds = timed(lambda: retrieval.nearest(queries, vectors, 8, device=args.device))
            line = f"{count:9d}  {1000 * seconds / len(queries):18.2f}"
            try:
                index, built = timed(lambda: retrieval.inverted_file(vectors))
            except ImportError:
                print(line + "   faiss-cpu is not installed")
                continue
            line += f"   {built:.1f} s;"
            for probes in args.probes:
                index.nprobe = probes
                (_, found), seconds = timed(lambda: index.search(queries.astype(np.float32), 8))
                recall = np.mean([len({*a} & {*b}) / 8 for a, b in zip(exact, found)])
                line += f"  {probes}: {1000 * seconds / len(queries):.2f} ms, {recall:.3f}"
            print(line, flush=True)


def encode(clips: int) -> None:
    torch.manual_seed(0)
    encoder, rate = WindowEncoder(AF1.audio, AF1.clap).eval(), AF1.audio.sample_rate
    with tempfile.TemporaryDirectory() as folder:
        for n in range(clips):
            soundfile.write(f"{folder}/{n}.wav", 0.1 * np.random.default_rng(n).standard_normal(10 * rate), rate)
        store = Store(Path(folder), encoder, AF1.audio, AF1.clap.out_width)
        store.add([("0.wav", 0.0)])
        windows, seconds = timed(lambda: store.add([(f"{n}.wav", 0.0) for n in range(clips)], batch=12))
    print(f"{clips - 1} recordings of 10 s, {windows} windows, in {seconds:.1f} s: {(clips - 1) / seconds:.2f} recordings/s, "
          f"{windows / seconds:.2f} windows/s, {torch.get_num_threads()} threads")


def main() -> None:
    args = cli.parse(Args, description=__doc__)
    search(args)
    if args.clips:
        encode(args.clips)


if __name__ == "__main__":
    cli.run(main)

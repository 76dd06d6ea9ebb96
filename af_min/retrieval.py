"""Nearest recordings: which examples to show before a question (paper section 4.1, there by LAION-CLAP embeddings).

    python -m af_min.retrieval --run runs/tiny --data data/mine --shots 4        interleaved rows for the train split
    python -m af_min.retrieval --run runs/tiny --data data/mine --shots 0        window embeddings of all its recordings, no rows

Under `torchrun --nproc_per_node N -m --` the processes share the encoding (the first one alone does the rest). Its `--` is needed:
without it torchrun takes --run for a flag of its own.

A recording's vector is the mean of its window embeddings at length 1; two recordings are as near as their vectors' cosine:

    v = m / |m|,   m = (1/W) sum_w e_w            nearest(x) = the k recordings with the largest v . v_x, never x itself

"Itself" goes by content (the hash of the file's bytes) and by `group`, where rows have one: neither a copy under another name nor
another cut of the same recording is an example. Examples come from the train split alone.

The command gives every training row without turns 1 to J examples of its task, nearest last, and writes the result as further
rows of train.jsonl ("shots", and "retrieved": nearest or random); those of an earlier call are replaced. With --device cuda, or up
to FAISS_ABOVE recordings, the search is exact; beyond that, on a CPU, with faiss-cpu installed, it is an inverted file (IVF),
which looks at a part of the vectors. Measured (tests/bench_retrieval.py) on one busy core, D = 1024, k = 8, 256 queries at once:

    vectors                   10^4        10^5        10^6 (2 GB, memory-mapped)
    exact, a query            0.26 ms     2.4 ms      62 ms
    inverted file, built in   0.6 s       10 s        224 s
    ... 32 cells, a query     0.08 ms     0.56 ms     3.6 ms      recall: 1.00, 1.00, .97 (clustered random vectors)
"""
from __future__ import annotations

import importlib.util
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from . import audio, checkpoint, cli, data, manifest
from .cli import UserError, flag
from .engine import World, chosen_device
from .flamingo import AudioFlamingo
from .folder import MAX_SECONDS, stored_as
from .stages import embed
from .store import Place, Store, content, recording_key
from .text import SAME_AS

FAISS_ABOVE = 100_000                      # queries and vectors, beyond which the exact search of all for all takes over 4 minutes


@dataclass(frozen=True)
class Args:
    run: str = flag("runs/tiny", "run folder whose encoder says what is near")
    data: str = flag("data/scenes", "prepared data set; its train.jsonl gets the new rows")
    shots: int = flag(4, "examples of a row, at most; their number is drawn between 1 and this (0: embed all splits and stop)")
    shots_from: list[str] = flag(["nearest", "random"], "one new row for each of these", choices=("nearest", "random"), nargs="+")
    rows: int = flag(0, "draw only so many training rows (0: all)")
    seed: int = flag(0, "seed of what is drawn")
    device: str = flag("cpu", "where to search: cpu or cuda", choices=("cpu", "cuda"))


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


# ---------------------------------------------------------------------- search

def pooled(windows_WD: np.ndarray) -> np.ndarray:
    """Window embeddings (W, D) -> one vector (D,) float32 of length 1."""
    mean_D = np.asarray(windows_WD, np.float32).mean(0)
    return mean_D / max(np.linalg.norm(mean_D), 1e-12)


def nearest(queries: np.ndarray, vectors_ND: np.ndarray, k: int, chunk: int = 1 << 16, device: str = "cpu") -> np.ndarray:
    """Rows of the k largest dot products, largest first, equal ones in their order; exact. (D,) -> (k,), (Q, D) -> (Q, k); int64.

    min(k, N) if there are fewer. Products are made `chunk` vectors and 256 queries at a time: vectors_ND may be a float16 file
    in memory-mapping, and no (Q, N) matrix is ever held.
    """
    if queries.ndim == 1:
        return nearest(queries[None], vectors_ND, k, chunk, device)[0]
    k, found = min(k, len(vectors_ND)), []
    for start in range(0, len(queries), 256):
        part_QD = torch.as_tensor(np.array(queries[start:start + 256], np.float32), device=device)
        query, row, dot = np.zeros(0, int), np.zeros(0, int), np.zeros(0, np.float32)
        for first in range(0, len(vectors_ND), chunk):
            dot_QC = part_QD @ torch.as_tensor(np.array(vectors_ND[first:first + chunk]), device=device).float().T
            least_Q1 = dot_QC.topk(min(k, dot_QC.shape[1])).values[:, -1:]
            q, c = (dot_QC >= least_Q1).nonzero(as_tuple=True)               # k of each query, more if the last ones are equal
            query, row = np.append(query, q.cpu().numpy()), np.append(row, c.cpu().numpy() + first)
            dot = np.append(dot, dot_QC[q, c].cpu().numpy())
            order = np.lexsort((row, -dot, query))
            rank = np.arange(len(order)) - np.searchsorted(query[order], query[order])
            query, row, dot = query[order][rank < k], row[order][rank < k], dot[order][rank < k]
        found.append(row.reshape(len(part_QD), k))
    return np.concatenate(found) if found else np.zeros((0, k), np.int64)


def inverted_file(vectors_ND: np.ndarray, probes: int = 32, chunk: int = 1 << 16):
    """A FAISS index: vectors in 4 sqrt(N) cells around k-means centres, as float16; a search looks into the nearest `probes`."""
    import faiss
    count, width = vectors_ND.shape
    cells = round(4 * count ** 0.5)
    index = faiss.index_factory(width, f"IVF{cells},SQfp16", faiss.METRIC_INNER_PRODUCT)
    rng = np.random.default_rng(0)
    index.train(np.array(vectors_ND[np.sort(rng.choice(count, min(count, 40 * cells), replace=False))], np.float32))
    for first in range(0, count, chunk):
        index.add(np.array(vectors_ND[first:first + chunk], np.float32))
    index.nprobe = probes
    return index


def neighbours(queries_QD: np.ndarray, vectors_ND: np.ndarray, k: int, device: str = "cpu") -> np.ndarray:
    """`nearest`, or FAISS where that pays; (Q, k), -1 where the inverted file found fewer."""
    if device == "cpu" and min(len(queries_QD), len(vectors_ND)) > FAISS_ABOVE and importlib.util.find_spec("faiss"):
        return inverted_file(vectors_ND).search(np.array(queries_QD, np.float32), k)[1]
    return nearest(queries_QD, vectors_ND, k, device=device)


# ---------------------------------------------------------------------- examples

def answers_task(row: dict, task: str) -> bool:
    """Whether a row can be a shot of the task: of that name, or asked under its prefix (Count is an AQA), with one answer."""
    return task in (row["task"], SAME_AS.get(row["task"])) and "turns" not in row


class Library:
    """Training rows of one task from prepared data sets: the examples that questions can be given."""

    def __init__(self, model: AudioFlamingo, specs: list[str], task: str, name: str = "", stores: dict[Path, Store] | None = None,
                 device: str = "cpu"):
        """specs: `folder` or `folder:weight`, as train.py takes them. Recordings that were never encoded are now (`name`: of the bar).

        stores: those that several libraries share. UserError: no data set there, or none of its training rows is of the task.
        """
        self.task = task
        self.rows: dict[Place, list[dict]] = {}
        self.windows: dict[Place, np.ndarray] = {}
        self.stored: list[tuple[Store, Place]] = []        # of recording n
        self.origin_of: dict[str, str] = {}                # content -> group, of what shares one with a recording here
        self.device, stores, known = device, {} if stores is None else stores, set()
        for folder, _ in data.parse_data(specs):
            everything = data.rows_of(folder, "train", "sft")
            known |= {row["task"] for row in everything if "turns" not in row}
            rows = [row for row in everything if answers_task(row, task) and "retrieved" not in row]
            groups = {row["group"] for row in rows if "group" in row}
            group_of = {(row["audio"], row["start"]): row["group"] for row in everything if row.get("group") in groups}
            if folder not in stores:
                stores[folder] = Store(folder, model.encoder, model.config.audio, model.config.clap.out_width)
            own = {(row["audio"], row["start"]) for row in rows}
            stores[folder].add(own | set(group_of), name)
            self.origin_of |= {content(stores[folder].keys[place]): f"{folder}: {group}" for place, group in group_of.items()}
            self.stored += [(stores[folder], place) for place in sorted(own)]
            for row in rows:
                shot = {name: row[name] for name in ("start", "prompt", "description") if name in row}
                shot |= {"audio": str(folder / row["audio"]), "answer": row.get("answer") or row["answers"][0]}
                self.rows.setdefault((shot["audio"], row["start"]), []).append(shot)
        if not self.rows:
            raise UserError(f"--shots: no training row of {', '.join(specs)} is of the task {task}; --task can be "
                            f"{', '.join(sorted(known)) or 'nothing there'}")
        self.places = [(str(store.folder / file), start) for store, (file, start) in self.stored]
        self.origins = [self.origin(store.keys[place]) for store, place in self.stored]     # what no example shares with its question
        self.vectors_ND = np.stack([pooled(store[place]) for store, place in self.stored]).astype(np.float16)

    def origin(self, key: str) -> str:
        return self.origin_of.get(content(key), content(key))

    def choose(self, keys: list[str], vectors_QD: np.ndarray, k: int, choice: str, seed: int = 0) -> list[list[int]]:
        """Numbers of k others for each recording with these keys and pooled vectors: the nearest first, or drawn by seed and key.

        UserError if there are fewer than k other recordings.
        """
        own, alike = list(map(self.origin, keys)), Counter(self.origins)
        most = max((alike[origin] for origin in own), default=0)
        if len(self.stored) - most < k:
            raise UserError(f"--shots {k}: there are only {len(self.stored) - most} other recordings of the task {self.task} (copies and the "
                            "question's own group left out)")
        if choice == "nearest":
            order = neighbours(vectors_QD, self.vectors_ND, k + most, self.device)
        else:
            order = [np.random.default_rng([seed, *key.encode()]).choice(len(self.stored), k + most, replace=False) for key in keys]
        return [[int(n) for n in row if n >= 0 and self.origins[n] != origin][:k] for origin, row in zip(own, order)]

    def example(self, n: int, prompt: str) -> dict:
        """Recording n as a shot: the row that is asked like `prompt`, else its first; its embedding stands in `windows`."""
        store, place = self.stored[n]
        self.windows[self.places[n]] = store[place]
        rows = self.rows[self.places[n]]
        return next((row for row in rows if row["prompt"].lower() == prompt.lower()), rows[0])

    def with_shots(self, rows: list[dict], store: Store, k: int, choice: str, seed: int = 0) -> list[dict]:
        """Each row, whose recordings `store` holds, with k examples before it, the nearest last."""
        places = sorted({(row["audio"], row["start"]) for row in rows})
        vectors_QD = np.stack([pooled(store[place]) for place in places])
        chosen = dict(zip(places, self.choose([store.keys[place] for place in places], vectors_QD, k, choice, seed)))
        return [{**row, "shots": [self.example(n, row["prompt"]) for n in reversed(chosen[row["audio"], row["start"]])]} for row in rows]

    def own_copy(self, heard: Heard) -> str | None:
        """The key of this very recording in a data set that was imported from it (folder.py), whatever its file was."""
        for store in {id(store): store for store, _ in self.stored}.values():
            if rate := manifest.read_card(store.folder).get("sample_rate"):
                _, content = stored_as(audio.load(heard.path, rate, max_seconds=MAX_SECONDS))
                if key := store.keys.get((f"audio/{content}.flac", 0.0)):
                    return key
        return None

    def shots(self, heard: Heard, k: int, choice: str, prompt: str, seed: int = 0) -> list[dict]:
        """k rows as shots for a recording, the nearest last, beside the question (or k at random by seed and content)."""
        chosen = self.choose([self.own_copy(heard) or heard.key], pooled(heard.windows_WD)[None], k, choice, seed)[0]
        return [self.example(n, prompt) for n in reversed(chosen)]


# ---------------------------------------------------------------------- interleaved rows

def interleaved(model: AudioFlamingo, rows: list[dict], args: Args) -> list[dict]:
    """Each of the rows with 1 to args.shots examples before it, once for each of args.shots_from."""
    rng, stores, out = np.random.default_rng(args.seed), {}, []
    for task in sorted({row["task"] for row in rows}):
        library = Library(model, [args.data], task, stores=stores, device=args.device)
        store, = stores.values()
        group = [row for row in rows if row["task"] == task]
        for choice in args.shots_from:
            for row in library.with_shots(group, store, args.shots, choice, args.seed):
                shots = [{**shot, "audio": Path(shot["audio"]).relative_to(args.data).as_posix()} for shot in row["shots"]]
                out.append({**row, "shots": shots[-int(rng.integers(1, args.shots + 1)):], "retrieved": choice})
    return out


def main() -> None:
    args = cli.parse(Args, description=__doc__)
    cli.at_least(args, shots=0, rows=0, seed=0)
    where, folder = chosen_device(args.device), Path(args.data)
    manifest.read_card(folder)
    world = World.start() if "RANK" in os.environ else World(0, 1, torch.device(where))
    model, _ = checkpoint.load_run(Path(args.run), str(world.device))
    if args.shots >= model.config.representation.max_audios:
        raise UserError(f"--shots {args.shots}: this model takes {model.config.representation.max_audios} audios, "
                        "the question's included")
    kept = [row for row in manifest.read_rows(folder / "train.jsonl") if "retrieved" not in row]
    rows = [row for row in kept if row["task"] != "WindowText" and not {"turns", "shots", "pool"} & set(row)]
    if args.rows:
        rows = [rows[i] for i in np.sort(np.random.default_rng(args.seed).permutation(len(rows))[:args.rows])]
    splits = ("train",) if args.shots else manifest.SPLITS
    store = embed(model, folder, [row for split in splits for row in data.rows_of(folder, split, "sft")], world)
    if world.size > 1:
        torch.distributed.destroy_process_group()
    if world.rank or not args.shots:
        if not world.rank:
            print(f"{store.home}: {len(store.vectors)} windows of {len(store.shelf.entries)} recordings")
        return
    new = interleaved(model, rows, args)
    manifest.write_rows(folder / "train.jsonl", kept + new)
    manifest.update_card(folder)
    print(f"{folder / 'train.jsonl'}: {len(new)} interleaved rows beside {len(kept)} others, "
          f"{sum(len(row['shots']) for row in new) / max(1, len(new)):.2f} examples each")


if __name__ == "__main__":
    cli.run(main)

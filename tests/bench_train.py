"""What a training step costs, and what each thing that we do otherwise than the released code saves. One thread is enough.

    python tests/bench_train.py --run runs/tiny --data data/scenes
    python tests/bench_train.py --threads 2         something else: train.py's step, its parts side by side and one after the other

One step is forward, backward and AdamW of sft on the same global batches. "The released way": every audio slot of every sample is encoded and
attended, up to the largest number of audios in the data; a dense mask is built for every cross-attention block; the head runs on all
positions; the batch is one, padded to its longest sample (or to 512 tokens). Ours: stored embeddings of the windows that exist, one integer
a token, the head on supervised positions, parts of similar length. They take turns; the median of their steps is printed. Data loading
(choosing a batch, reading its embeddings, padding it) goes on between steps: what is lost to it is its share of the time. The command fails
where the released way is less than 4 times as slow, where loading costs more than 5 %, or where a tenth of the tokens is padding.
"""
import dataclasses
import os
import statistics
import sys
import time
import types
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from tqdm import tqdm

from af_min import checkpoint, cli, config, data, xattn
from af_min.cli import UserError, flag
from af_min.engine import Trainer, World
from af_min.stages import Everything, TextStage

RELEASED = ("encode", "slots", "dense", "head", "pad")


@dataclasses.dataclass(frozen=True)
class Args:
    run: str = flag("runs/tiny", "whose model and tokenizer")
    data: str = flag("data/scenes", "prepared data set")
    rounds: int = flag(17, "steps of ours and of each part alone; of all parts together two")
    threads: int = flag(1, "above 1: compare what several cores make of the parts of a batch")


def dense_attention(q, k, v, kv_len_BT):
    """Cross-attention under a mask (B, 1, T, L) built for this block."""
    mask = torch.arange(k.shape[2], device=q.device) < kv_len_BT[:, None, :, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Bench:
    def __init__(self, args: Args):
        model, tokenizer = checkpoint.load_run(Path(args.run))
        everything = Everything(model.config)
        everything.model = model.float()
        c = config.STAGES["tiny"]["sft"]
        settings = types.SimpleNamespace(seed=0, accumulate=1, shard=False, float32=False, checkpoint_activations=False, compile=False)
        world = World(0, 1, torch.device("cpu"))
        self.stage = TextStage("sft", everything, [(Path(args.data), 1.0)], tokenizer, c, settings, world)
        self.trainer = Trainer("sft", everything, self.stage, dataclasses.replace(c, lr=0.0), settings, world)
        self.model, self.mixture, self.pad_id = model, self.stage.mixture, tokenizer.pad_id
        self.optimizer = torch.optim.AdamW([p for p in everything.parameters() if p.requires_grad], lr=0.0, fused=True)
        self.slots = max(len(s.audios) for d in self.mixture.datasets for s in d.samples)
        self.max_tokens, self.noise = c.max_tokens, torch.randn(1, model.config.audio.window_samples) * 0.1

    def collate(self, parts):
        return [self.mixture.collate(part, self.pad_id, self.model.config.clap.out_width) for part in parts]

    def step(self, number: int, released=()) -> tuple[float, float, float]:
        """-> (loss, seconds, of these for loading) of one step; `released`: which of RELEASED are done their way."""
        m, ours = self.model, xattn.kernels.masked_cross_attention
        began, nll = time.perf_counter(), []
        parts = self.mixture.batch(number)
        if "pad" in released or "max" in released:
            parts = [[place for part in parts for place in part]]
        batches = self.collate(parts)
        loading = time.perf_counter() - began
        total = sum(int((b.labels_BT[:, 1:] != data.IGNORE).sum()) for b in batches)
        self.optimizer.zero_grad()
        if "dense" in released:
            xattn.kernels.masked_cross_attention = dense_attention
        try:
            for b in batches:
                ids, labels, windows, counts = b.ids_BT, b.labels_BT, b.windows_AWD, b.n_windows_BN
                if "max" in released:
                    room = self.max_tokens - ids.shape[1]
                    ids, labels = F.pad(ids, (0, room), value=self.pad_id), F.pad(labels, (0, room), value=data.IGNORE)
                if "encode" in released:
                    m.encode(self.noise.expand(len(ids) * self.slots * m.config.audio.max_windows, -1))
                if "slots" in released:
                    windows = torch.randn(len(ids) * self.slots, m.config.audio.max_windows, windows.shape[-1])
                    counts = torch.full((len(ids), self.slots), m.config.audio.max_windows)
                heard = m.listen(windows, counts)
                if "head" in released:
                    logits = m.lm.logits(m.hidden(ids, heard))[:, :-1]
                    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=data.IGNORE, reduction="sum")
                else:
                    loss = m(ids, labels, heard).sum()
                (loss / total).backward()
                nll.append(float(loss.detach()))
        finally:
            xattn.kernels.masked_cross_attention = ours
        torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], 1.0)
        self.optimizer.step()
        return sum(nll) / total, time.perf_counter() - began, loading


def compare_threads(args: Args) -> None:
    torch.set_num_threads(args.threads)
    trainer, seconds = Bench(args).trainer, {True: [], False: []}
    for n in tqdm(range(args.rounds), unit="round"):
        for trainer.side_by_side in seconds:
            began = time.perf_counter()
            trainer.step(n, types.SimpleNamespace(signal=0))
            seconds[trainer.side_by_side].append(time.perf_counter() - began)
    side, after = (1000 * statistics.median(seconds[kind][1:]) for kind in (True, False))
    print(f"{args.threads} threads: parts side by side {side:.0f} ms a step, one after the other {after:.0f} ms ({after / side:.2f} times)")


def main() -> None:
    args = cli.parse(Args, description=__doc__)
    cli.at_least(args, rounds=2, threads=1)
    if args.threads > 1:
        return compare_threads(args)
    torch.set_num_threads(1)
    bench, kinds = Bench(args), {"ours": (), **{name: (name,) for name in RELEASED}, "all of these": RELEASED}
    kinds["all, 512 tokens"] = (*RELEASED, "max")
    seconds = {name: [] for name in kinds}
    loading = tokens = padded = 0
    for n in tqdm(range(args.rounds), unit="round"):
        for name, released in kinds.items():                                        # ours first: it is the one that chooses the batch
            if n >= 2 and "encode" in released:                                     # the slow ones twice
                continue
            loss, spent, of_loading = bench.step(n, released)
            seconds[name].append(spent)
            if name == "ours":
                expected, loading = loss, loading + of_loading
            elif "slots" not in released:
                assert abs(loss - expected) < 1e-4 * expected, f"{name}: loss {loss}, ours {expected}"
        lengths = [[bench.mixture.lengths[d][i] for d, i in part] for part in bench.mixture.batch(n)]
        tokens, padded = tokens + sum(map(sum, lengths)), padded + sum(max(part) * len(part) for part in lengths)
    samples = sum(map(len, bench.mixture.batch(0)))
    print(f"{samples} samples in the first batch, {bench.slots} slots of {bench.model.config.audio.max_windows} windows, "
          f"{torch.get_num_threads()} thread, torch {torch.__version__}")
    median = {name: statistics.median(spent) for name, spent in seconds.items()}
    for name in kinds:
        print(f"{name:16s} {1000 * median[name]:9.0f} ms   {median[name] / median['ours']:7.2f} x ours")
    kept, padding = 1 - loading / sum(seconds["ours"]), 1 - tokens / padded
    print(f"throughput with data loading: {kept:.1%} of that with data in memory; padding {padding:.1%} of tokens")
    if median["all of these"] < 4 * median["ours"] or kept < 0.95 or padding > 0.1:
        raise UserError("expected 4 x ours or more with all of these, 95.0% or more, and padding of 10.0% or less")


if __name__ == "__main__":
    cli.run(main)

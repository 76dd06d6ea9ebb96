"""What a training step costs, and what each thing that we do otherwise than the released code saves. One thread is enough.

    python tests/bench_train.py --run runs/tiny --data data/scenes

One step is forward, backward and AdamW of sft on the same global batches. "The released way": every audio slot of every sample is encoded and
attended, up to the largest number of audios in the data; a dense mask is built for every cross-attention block; the head runs on all
positions; the batch is one, padded to its longest sample (or to 512 tokens). Ours: stored embeddings of the windows that exist, one integer
a token, the head on supervised positions, parts of similar length. The two take turns; the median of their steps is printed.
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

from af_min import checkpoint, cli, config, data, xattn
from af_min.cli import flag
from af_min.engine import World
from af_min.stages import Everything, TextStage

RELEASED = ("encode", "slots", "dense", "head", "pad")


@dataclasses.dataclass(frozen=True)
class Args:
    run: str = flag("runs/tiny", "whose model and tokenizer")
    data: str = flag("data/scenes", "prepared data set")
    rounds: int = flag(7, "steps of each kind")


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
        settings = types.SimpleNamespace(seed=0, accumulate=1, shard=False)
        self.stage = TextStage("sft", everything, [(Path(args.data), 1.0)], tokenizer, c, settings, World(0, 1, torch.device("cpu")))
        self.model, self.mixture, self.pad_id = model, self.stage.mixture, tokenizer.pad_id
        self.optimizer = torch.optim.AdamW([p for p in everything.parameters() if p.requires_grad], lr=0.0, fused=True)
        self.slots = max(len(s.audios) for d in self.mixture.datasets for s in d.samples)
        self.max_tokens = c.max_tokens

    def collate(self, parts):
        return [self.mixture.collate(part, self.pad_id, self.model.config.clap.out_width) for part in parts]

    def step(self, parts, released=(), batches=None) -> tuple[float, float]:
        """-> (loss, seconds) of one step on `parts`; `released`: which of RELEASED are done their way; `batches`: collated already."""
        m, ours = self.model, xattn.kernels.masked_cross_attention
        began, total, nll = time.perf_counter(), 0, []
        if released and ("pad" in released or "max" in released):
            parts = [[place for part in parts for place in part]]
        batches = batches or self.collate(parts)
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
                    m.encode(torch.randn(len(ids) * self.slots * m.config.audio.max_windows, m.config.audio.window_samples) * 0.1)
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
        return sum(nll) / total, time.perf_counter() - began


def main() -> None:
    args = cli.parse(Args, description=__doc__)
    torch.set_num_threads(1)
    bench, kinds = Bench(args), {"ours": (), **{name: (name,) for name in RELEASED}, "all of these": RELEASED}
    kinds["all, 512 tokens"] = (*RELEASED, "max")
    seconds = {name: [] for name in kinds} | {"loaded": [], "in memory": []}
    samples = sum(map(len, bench.mixture.batch(0)))
    print(f"{samples} samples a batch, {bench.slots} slots of {bench.model.config.audio.max_windows} windows, {torch.get_num_threads()} thread")
    for n in range(args.rounds):
        parts = bench.mixture.batch(n)
        for name, released in kinds.items():
            if len(released) < 2 and "encode" not in released or n < 2:            # the slow ones twice
                loss, spent = bench.step(parts, released)
                seconds[name].append(spent)
                if name == "ours":
                    expected = loss
                elif "slots" not in released:
                    assert abs(loss - expected) < 1e-4 * expected, f"{name}: loss {loss}, ours {expected}"
        batches = bench.collate(parts)
        for _ in range(3):
            seconds["loaded"].append(bench.step(parts)[1])
            seconds["in memory"].append(bench.step(parts, batches=batches)[1])
    median = {name: statistics.median(spent) for name, spent in seconds.items()}
    for name in kinds:
        print(f"{name:16s} {1000 * median[name]:9.0f} ms   {median[name] / median['ours']:7.2f} x ours")
    ratio = statistics.median(b / a for a, b in zip(seconds["loaded"], seconds["in memory"]))
    print(f"throughput with data loading: {ratio:.1%} of that with data in memory")


if __name__ == "__main__":
    cli.run(main)

"""What a stage of training needs on one GPU, before one is rented.

    python -m af_min.memory --preset af1 --processes 8 --micro-batch 4

    fixed   =  4 P  +  4 P_learn (gradients)  +  8 P_learn (AdamW)  +  4 P_learn if N > 1 (the message that sums the gradients)
    --shard =  4 P_frozen ears  +  (4 P_rest  +  12 P_learn) / N                              bytes, P parameters in float32
    batch   =  a  +  b layers  +  samples (c  +  d layers)                                     what the backward pass waits for

a, b, c, d are no formulas: the model's own forward pass runs on this CPU in full width and bfloat16 autocast, with one and two
layers, one and two samples, and every tensor that autograd keeps is counted once. A sample is the longest one: all its tokens, all
its audios, a quarter of the tokens supervised; the clap stage takes its windows at once, a share of them on each GPU. With
--checkpoint-activations a layer keeps its inputs, and one layer at a time is whole again. Not counted: what a kernel needs while it
runs, and what the allocator and the driver keep; `CARDS` leaves 10 % for that. Muon keeps 4 bytes of a matrix's number where AdamW
keeps 8: for `tiny` the table is an upper bound.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import nn

from . import cli, data, text
from .cli import flag
from .config import PRESETS, STAGES, Config, StageConfig
from .engine import large_layers, lighten
from .stages import Everything

CARDS = (24, 40, 48, 80, 141)                # GB, of which 90 % are planned with
CAPTION = 64                                 # tokens of a window's caption in the clap stage


@dataclass(frozen=True)
class Args:
    preset: str = flag("af1", "dimensions", choices=tuple(PRESETS))
    processes: int = flag(8, "GPUs, for --shard")
    micro_batch: int = flag(4, "samples of one forward pass on one GPU (clap does not split: its windows, shared among the GPUs)")


def fixed(everything: Everything, stage: str, processes: int, shard: bool) -> int:
    """Bytes of weights, gradients and optimizer state on one process (the module may be on the meta device)."""
    learned = sum(p.numel() for p in everything.freeze_but(stage))
    whole = sum(p.numel() for p in everything.parameters())
    if not shard or stage == "clap":
        return 4 * whole + (12 + 4 * (processes > 1)) * learned
    ears = sum(p.numel() for module in (everything.model.encoder, everything.text_tower) for p in module.parameters()) + 1
    return 4 * ears + (4 * (whole - ears) + 12 * learned) // processes


def kept(everything: Everything, run: Callable[[], object], inputs: bool = False) -> int:
    """Bytes that autograd keeps of a forward pass, weights left out, each storage once; `inputs`: those of the large layers too."""
    weights, found, alive = {p.untyped_storage().data_ptr() for p in everything.parameters()}, {}, []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage, held = tensor.untyped_storage(), tensor.detach()      # detached: a graph that holds its own output is never freed
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(held)                                      # or its address would be given away again
        return held

    def entered(layer: nn.Module, values) -> None:
        for value in values:
            if isinstance(value, torch.Tensor):
                note(value)

    for layer in large_layers(everything) if inputs else []:
        layer.register_forward_pre_hook(entered)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        run()
    return sum(found.values())


def longest(config: Config, stage: str, samples: int, tokens: int) -> data.Batch:
    """A batch of samples that are as long as a stage lets them be."""
    ids = torch.zeros(samples, min(tokens, config.lm.max_positions), dtype=torch.long)
    labels = ids.clone()
    labels[:, ids.shape[1] // 4:] = text.IGNORE
    n, w = config.representation.max_audios, config.audio.max_windows
    if stage != "lm":
        ids[:, :n] = config.audio_id
    return data.Batch(ids, labels, torch.ones_like(ids, dtype=torch.bool), torch.randn(samples * n, w, config.clap.out_width),
                      torch.full((samples, n), w))


def batch_bytes(config: Config, stage: str, tokens: int, checkpointed: bool) -> Callable[[int], float]:
    """Samples -> bytes of what a forward pass leaves for the backward pass, from four small passes."""
    checkpointed = checkpointed and stage != "clap"

    def measured(layers: int, samples: int, checkpointed: bool) -> int:
        small = replace(config, lm=replace(config.lm, layers=layers * config.xattn.every),
                        audio_id=min(config.audio_id, config.lm.vocab_size - 1))     # tiny gets its ids from its tokenizer
        everything = Everything(small)
        everything.freeze_but(stage)
        lighten(everything, SimpleNamespace(checkpoint_activations=checkpointed, compile=False))
        if stage == "clap":
            ids = torch.zeros(samples, CAPTION, dtype=torch.long)
            windows = torch.randn(samples, config.audio.window_samples)
            return kept(everything, lambda: (everything.model.encoder(windows), everything.text_tower(ids, torch.ones_like(ids))))
        batch = longest(small, stage, samples, tokens)
        return kept(everything, lambda: everything(batch, stage != "lm"), checkpointed)

    def line(checkpointed: bool) -> tuple[float, float, float, float]:
        one, two = ([measured(layers, samples, checkpointed) for samples in (1, 2)] for layers in (1, 2))
        grows = two[0] - one[0], two[1] - one[1]                    # with a layer, at one and at two samples
        d = grows[1] - grows[0]
        b, c = grows[0] - d, one[1] - one[0] - d
        return one[0] - b - c - d, b, c, d

    layers = config.lm.layers // config.xattn.every
    a, b, c, d = line(checkpointed)
    _, again_b, _, again_d = line(False) if checkpointed else (0, 0, 0, 0)
    return lambda samples: a + b * layers + samples * (c + d * layers) + again_b + samples * again_d


def pieces(c: StageConfig, processes: int, micro_batch: int) -> int:
    """--accumulate, with which no forward pass has more samples than `micro_batch`: each part of a batch is split for itself."""
    parts = max(1, min(data.PARTS, c.batch, c.batch_tokens // data.PART_TOKENS))
    return math.ceil(c.batch // parts / processes / micro_batch)


def card(need: float) -> str:
    return next((f"{size} GB" for size in CARDS if need <= 0.9 * size * 1e9), "-")


def main() -> None:
    args = cli.parse(Args, description=__doc__)
    cli.at_least(args, processes=1, micro_batch=1)
    config, n, m = PRESETS[args.preset], args.processes, args.micro_batch
    with torch.device("meta"):
        everything = Everything(config)
    print(f"{'stage':10s}{'M learn':>9s} of M{'fixed':>11s}{'--shard':>9s}{'batch of':>13s}{'checkpointed':>19s}"
          "   fits a card of   with both   --accumulate")
    for stage, c in STAGES[args.preset].items():
        samples, accumulate = (m, pieces(c, n, m)) if stage != "clap" else (math.ceil(c.batch / n), "-")
        whole, shared = (fixed(everything, stage, n, shard) for shard in (False, True))
        learned = sum(p.numel() for p in everything.freeze_but(stage))
        kept_all, kept_few = (batch_bytes(config, stage, c.max_tokens, few)(samples) for few in (False, True))
        print(f"{stage:10s}{learned / 1e6:9.0f}{sum(p.numel() for p in everything.parameters()) / 1e6:5.0f}{whole / 1e9:11.1f}{shared / 1e9:9.1f}"
              f"{samples:7d}: {kept_all / 1e9:10.1f}{kept_few / 1e9:13.1f}   {card(whole + kept_all):14s}   {card(shared + kept_few):9s}   "
              f"{accumulate}", flush=True)
    print(f"GB a process; {n} processes; T = {c.max_tokens} tokens, {config.representation.max_audios} audios of {config.audio.max_windows} windows; "
          "--accumulate: for the preset's batch")


if __name__ == "__main__":
    cli.run(main)

"""A training step at full size, on a GPU: samples/s, model FLOP utilisation, peak memory; kernels on and off.

    python tests/bench_step.py                                  af1, pretrain and sft, 4 samples of 512 tokens and 8 audios, random weights
    python tests/bench_step.py --preset tiny --rounds 1         does it run at all?

The step is train.py's own (engine.py): bfloat16 by autocast, weights, gradients and AdamW in float32; window embeddings are random. The
first step, which compiles, is not counted. Each line is the footer's; what fails is told, and the others are measured.
"""
import dataclasses
import gc
import os
import sys
import time
import traceback
import types
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from af_min import cli, config, data, memory
from af_min.cli import flag
from af_min.engine import Meter, Trainer, World, lighten
from af_min.stages import Everything, Step, flops


@dataclasses.dataclass(frozen=True)
class Args:
    preset: str = flag("af1", "dimensions", choices=tuple(config.PRESETS))
    batch: int = flag(4, "samples of a step")
    rounds: int = flag(10, "steps that are measured")
    checkpoint_activations: bool = flag(False, "as in train.py")
    compile: bool = flag(False, "as in train.py")


class Longest:
    """A stage whose every batch is the same, of samples as long as they may be."""
    tasks = ["longest"]

    def __init__(self, stage: str, everything: Everything, samples: int, tokens: int, device: torch.device):
        everything.freeze_but(stage)
        everything.train()
        everything.model.encoder.eval()
        batch = memory.longest(everything.model.config, stage, samples, tokens).to(device)
        total, supervised = batch.ids_BT.numel(), int((batch.labels_BT[:, 1:] != data.IGNORE).sum())
        reading, saying = flops(everything, True)

        def loss() -> tuple[torch.Tensor, torch.Tensor]:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                nll = everything(batch, True)
            return nll.sum() / supervised, nll.detach().sum()[None]
        self.whole = Step([(["random"], loss)], [supervised], samples, total, total, total * reading + supervised * saying)

    def step(self, number: int) -> Step:
        return self.whole


def measure(args: Args, stage: str, world: World) -> str:
    c = config.PRESETS[args.preset]
    settings = dataclasses.replace(config.STAGES[args.preset][stage], warmup=1, decay=False)
    with world.device:
        everything = Everything(dataclasses.replace(c, audio_id=min(c.audio_id, c.lm.vocab_size - 1)))
    lighten(everything, args)
    objective = Longest(stage, everything, args.batch, settings.max_tokens, world.device)
    flags = types.SimpleNamespace(shard=False, seed=0, float32=False, checkpoint_activations=args.checkpoint_activations, compile=args.compile)
    trainer = Trainer(stage, everything, objective, settings, flags, world)
    meter = Meter(stage)
    for number in range(1 + args.rounds):
        began = time.perf_counter()
        step, _, _ = trainer.step(number, types.SimpleNamespace(signal=0))
        if number:
            meter.add(step, time.perf_counter() - began)
    return meter.line(sum(p.numel() for p in trainer.parameters), world)


def main() -> None:
    args = cli.parse(Args, description=__doc__)
    cli.at_least(args, batch=1, rounds=1)
    world, failed = World.start(), []
    for stage in ("pretrain", "sft"):
        for kernels in ("triton", "reference") if world.device.type == "cuda" else ("reference",):
            os.environ["AF_MIN_KERNELS"] = kernels
            try:
                print(f"{kernels:10s}{measure(args, stage, world)}", flush=True)
            except Exception:                                   # time on a GPU is dear: the others are measured all the same
                failed += [f"{kernels} {stage}"]
                traceback.print_exc()
            gc.collect()
            if world.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}")


if __name__ == "__main__":
    cli.run(main)

"""The loop that every stage runs in: the same steps on one process or many, resumed or not.

    g = sum over processes and parts of d loss / d weights,   g <- g min(1, clip / |g|),   one step of AdamW or Muon

A part is a piece of the batch whose samples are of like length and padded together (data.py). Its loss is the sum over this
process's share of it, divided by a count over the whole batch (stages.py): gradients are added up, never averaged. Without --shard
each process has all weights; gradients are added up once per step, in one message, whatever the number of parts. With --shard
(FSDP2) each process keeps a slice of every weight that text passes through, its gradient and its optimizer state, and fetches a
layer's weights when it needs them; encoder and text tower stay whole, and so does all in the clap stage.
"""
from __future__ import annotations

import functools
import json
import math
import os
import platform
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import nn
from tqdm import tqdm

from kernels.linear import as_now

from . import checkpoint
from .cli import UserError, resource
from .config import StageConfig
from .lanes import side_by_side
from .muon import Muon, whole
from .stages import Everything, Step, in_half

SMALL = 1 << 24          # weights; the products of a smaller model are too small to be divided among cores
PEAK = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L40": 181e12, "4090": 165e12}   # bf16 FLOP/s, dense


def chosen_device(asked: str) -> str:
    """--device auto, cpu or cuda -> cpu or cuda. UserError for a GPU that is not there."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is visible to torch; use --device cpu")
    return "cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class World:
    """The processes of this training: which one this is, how many there are, where this one computes."""
    rank: int
    size: int
    device: torch.device

    @classmethod
    def start(cls) -> "World":
        """One process alone, or one of those that torchrun started."""
        cuda = torch.cuda.is_available()
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads()))))
        if size > 1:
            # torchrun restarts processes but keeps its store, with the addresses of the dead ones: each attempt gets a prefix of its own.
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", next(dist.rendezvous("env://"))[0])
            dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size)
        return cls(rank, size, device)

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Add up gradients over processes, in one message; a parameter that took no part counts as 0.

        So that a batch in several parts needs no message for each; not measured beside DistributedDataParallel on GPUs.
        """
        if self.size == 1:
            return
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])
        dist.all_reduce(flat)
        for p, g in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad = g.view_as(p).clone()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, names: list[str]) -> list[str]:
        """The names that the processes hold, all of them on every process."""
        held = [names] * self.size
        if self.size > 1:
            dist.all_gather_object(held, names)
        return [name for of_process in held for name in of_process]

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


def shard(everything: Everything, world: World, float32: bool) -> None:
    """FSDP2: every layer's weights are spread over all processes. Encoder and text tower, frozen here, stay whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    m, mesh = everything.model, init_device_mesh(world.device.type, (world.size,))
    half = torch.bfloat16 if world.device.type == "cuda" and not float32 else None
    split = functools.partial(fully_shard, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half and torch.float32))
    for block in m.xattn.values():
        split(block)
        register_fsdp_forward_method(block, "keys_values")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")     # keys and values, which nothing changes in place
    for layer in [m.representation, *m.lm.layers]:
        split(layer)
    split(everything, ignored_params={*m.encoder.parameters(), *everything.text_tower.parameters(), everything.log_scale})


def unsharded(everything: Everything, fresh: Everything) -> Everything:
    """`fresh`, with the weights of a sharded model, whole on every process; one at a time is put together."""
    held = fresh.state_dict()
    for name, tensor in everything.state_dict().items():
        held[name].copy_(whole(tensor))
    return fresh


def large_layers(everything: Everything) -> list[nn.Module]:
    return [*everything.model.xattn.values(), *everything.model.lm.layers]


def lighten(everything: Everything, args) -> None:
    """--checkpoint-activations and --compile, applied to each large layer."""
    for layer in large_layers(everything):
        if args.checkpoint_activations:                          # keep a layer's input alone; compute the rest again for the backward pass
            layer.forward = functools.partial(torch.utils.checkpoint.checkpoint, layer.forward, use_reentrant=False,
                                              context_fn=lambda: (nullcontext(), as_now()))
        if args.compile:
            layer.compile()


def rate(step: int, c: StageConfig) -> float:
    """Learning rate of a step (0, 1, ...): linear warm-up, then constant, or linear down to a twentieth."""
    if step < c.warmup:
        return c.lr * (step + 1) / c.warmup
    if not c.decay:
        return c.lr
    return c.lr * (1 - 0.95 * (step - c.warmup) / max(1, c.steps - c.warmup))


class Stop:
    """SIGTERM or Ctrl-C during training takes effect at the end of the step; a second Ctrl-C takes effect at once.

    One that comes after the last step, while its checkpoint is written, takes effect as soon as that is done."""

    def __enter__(self) -> "Stop":
        self.signal = 0
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)
                       if signal.getsignal(number) != signal.SIG_IGN}                       # as a script's `command &` has Ctrl-C
        return self

    def note(self, number: int, frame) -> None:
        if self.signal == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def __exit__(self, kind, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.signal and kind is None:
            signal.raise_signal(self.signal)


def peak_memory(device: torch.device) -> float:
    """Most memory that this process has held since it began, in GB (of the GPU, if there is one); 0 where the system does not tell (Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if not resource:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def gates(everything: Everything) -> list[float]:
    """tanh(attn_gate) of every cross-attention block; FSDP2 puts the one number of each on process 0."""
    raw = [b.attn_gate.detach() for b in everything.model.xattn.values()]
    return [round(g, 4) for g in torch.cat([g.to_local() if hasattr(g, "to_local") else g for g in raw]).float().tanh().tolist()]


class Meter:
    """What a stage has done since it began or was resumed."""

    def __init__(self, stage: str):
        self.stage, self.total = stage, Counter()

    def add(self, step: Step, seconds: float) -> None:
        self.total.update(steps=1, seconds=seconds, samples=step.samples, tokens=step.tokens, padded=step.padded, flops=step.flops)

    def line(self, moving: int, world: World) -> str:
        """One line of the final footer."""
        total, seconds = self.total, max(self.total["seconds"], 1e-9)
        speed = total["flops"] / seconds / world.size
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
        peak = next((peak for card, peak in PEAK.items() if card in name), 0)
        used = (f", {speed / 1e9:.0f} GFLOP/s" + (f" (MFU {speed / peak:.1%} of {name})" if peak else "")) if speed else ""
        return (f"  {self.stage:8s} {moving / 1e6:.2f} M learn, {total['steps']} steps of {1000 * seconds / max(1, total['steps']):.0f} ms, "
                f"{total['samples'] / seconds:.0f} samples/s, {total['tokens'] / seconds:.0f} tokens/s, "
                f"padding {1 - total['tokens'] / max(1, total['padded']):.1%}{used}, {peak_memory(world.device):.2f} GB")


def footer(everything: Everything, lines: list[str], seconds: float, world: World) -> str:
    total = sum(p.numel() for p in everything.model.parameters())
    return "\n".join([f"{total / 1e6:.2f} M parameters, {seconds:.0f} s on {world.size} x {world.device.type}, {torch.get_num_threads()} "
                      f"threads, torch {torch.__version__}, Python {platform.python_version()}", *lines])


class Trainer:
    """One stage: its optimizer, its steps, its log."""

    def __init__(self, stage: str, everything: Everything, objective, c: StageConfig, args, world: World):
        self.stage, self.everything, self.objective, self.c, self.args, self.world = stage, everything, objective, c, args, world
        self.sharded = args.shard and stage != "clap"
        everything.freeze_but(stage)
        if self.sharded:
            shard(everything, world, args.float32)
        self.parameters = everything.freeze_but(stage)           # sharding has replaced the first ones
        self.optimizer = self.make_optimizer()
        self.side_by_side = (world.device.type == "cpu" and not (self.sharded or args.checkpoint_activations or args.compile)
                             and not any(isinstance(m, nn.Dropout) for m in everything.modules())      # threads would share its random numbers
                             and sum(p.numel() for p in everything.parameters()) < SMALL)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Weight decay on matrices, not on vectors (biases, norms, gates). Muon moves the weights of linear layers except the head's."""
        everything, c, groups = self.everything, self.c, {}
        of_lm = {id(p) for p in everything.model.lm.parameters()}
        of_layers = {id(layer.weight) for name, layer in everything.named_modules()
                     if c.optimizer == "muon" and isinstance(layer, nn.Linear) and name != "model.lm.head"}
        for p in self.parameters:
            kind = c.weight_decay if p.ndim > 1 else 0.0, c.lm_rate if id(p) in of_lm else 1.0, id(p) in of_layers
            groups.setdefault(kind, []).append(p)
        groups = [{"params": parameters, "weight_decay": decay, "rate": times, "matrices": matrices}
                  for (decay, times, matrices), parameters in groups.items()]
        settings = {"lr": c.lr, "betas": (0.9, 0.95), "fused": True}
        if c.optimizer == "adamw":
            return torch.optim.AdamW(groups, **settings)
        return Muon(groups, products=torch.bfloat16 if in_half(self.world.device, self.args.float32) else None, **settings)

    def compute(self, step: Step) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield loss and sums per task of every part; after the last one, `grad` of the parameters holds the sum over all parts.

        A CPU computes the parts of a small model's batch in parallel, each on its share of the cores, and adds them up in their order, as
        if one after the other. `tiny` on two cores, a step of sft: 207 ms, not 257 (tests/bench_train.py --threads 2)."""
        count = min(torch.get_num_threads(), len(step.parts)) if self.side_by_side else 1
        if count < 2:                                              # 0: a batch so small that nothing of it is this process's
            for i, (_, loss) in enumerate(step.parts):
                if self.sharded:
                    self.everything.set_requires_gradient_sync(i + 1 == len(step.parts))          # one message per layer and step
                value, sums = loss()
                (value * self.world.size if self.sharded else value).backward()                   # FSDP2 averages; we add up
                yield value.detach(), sums
            return

        def part(loss: Callable) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor | None, ...]]:
            value, sums = loss()
            return value.detach(), sums, torch.autograd.grad(value, self.parameters, allow_unused=True)

        for value, sums, gradients in side_by_side(part, [loss for _, loss in step.parts], count):
            for p, g in zip(self.parameters, gradients):
                if g is not None:
                    p.grad = torch.empty_like(p).copy_(g) if p.grad is None else p.grad.add_(g)
            yield value, sums

    def step(self, number: int, stop: Stop) -> tuple[Step, dict, int]:
        """-> the batch, its losses and gradient norm, the sum of the processes' signals (0: go on)."""
        torch.manual_seed(self.args.seed * 1_000_003 + number)  # what dropout draws depends on the step alone
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * rate(number, self.c)
        self.optimizer.zero_grad(set_to_none=True)
        step, world = self.objective.step(number), self.world
        totals = torch.zeros(2 + len(step.counts), dtype=torch.float64, device=world.device)
        losses = []
        for value, sums in self.compute(step):
            losses.append(value)
            totals[0] += value
            totals[2:] += sums
        totals[1] = stop.signal
        total, stopped, *sums = world.sum(totals).tolist()
        if not self.sharded:
            world.sum_gradients(self.parameters)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.c.clip)
        norm = float(norm.full_tensor() if self.sharded else norm)
        if not (math.isfinite(total) and math.isfinite(norm)):
            bad = [name for (names, _), value in zip(step.parts, losses) if not math.isfinite(value) for name in names]
            bad = world.gather(bad) or world.gather([name for names, _ in step.parts for name in names])
            raise UserError(f"{self.stage} step {number}: loss {total}, gradient norm {norm}; --resume goes on from the last checkpoint, "
                            f"with a lower --lr, or without these samples: {'; '.join(bad)}")
        self.optimizer.step()
        tasks = {task: round(s / n, 4) for task, s, n in zip(self.objective.tasks, sums, step.counts) if n}
        return step, {"loss": round(total, 7), "tasks": tasks, "lr": rate(number, self.c), "grad_norm": round(norm, 4)}, int(stopped)

    def run(self, first: int, run: Path, found: Path | None, on_checkpoint: Callable[[], None] = lambda: None) -> Meter:
        """Steps first .. c.steps - 1: a line in log.jsonl each, a checkpoint every --checkpoint-every; SystemExit after a signal."""
        c, world, meter, smooth, started = self.c, self.world, Meter(self.stage), None, time.time()
        if first and found:
            checkpoint.load_training(found, self.everything, self.optimizer, world.device, self.sharded)
        bar = tqdm(range(first, c.steps), f"{self.stage:8s} ({sum(p.numel() for p in self.parameters) / 1e6:.2f} M learn)", initial=first,
                   total=c.steps, disable=world.rank > 0, unit="step", mininterval=0.5, smoothing=0.05)
        log_file = run / "log.jsonl" if world.rank == 0 else os.devnull
        with checkpoint.writing(run), bar, Stop() as stop, open(log_file, "a", buffering=1) as log:
            for number in bar:
                began = time.perf_counter()
                step, entry, stopped = self.step(number, stop)
                seconds = time.perf_counter() - began
                meter.add(step, seconds)
                smooth = entry["loss"] if smooth is None else 0.95 * smooth + 0.05 * entry["loss"]
                bar.set_postfix_str(f"loss {smooth:.3f}", refresh=False)
                log.write(json.dumps({"stage": self.stage, "step": number, **entry, "gates": gates(self.everything),
                                      "tokens_per_s": round(step.tokens / seconds), "samples_per_s": round(step.samples / seconds, 1),
                                      "padding": round(1 - step.tokens / max(1, step.padded), 3),
                                      "memory_gb": round(peak_memory(world.device), 3), "seconds": round(time.time() - started, 2)}) + "\n")
                if stopped or (number + 1) % self.args.checkpoint_every == 0 or number + 1 == c.steps:
                    checkpoint.save_checkpoint(run, self.everything, self.optimizer, {"stage": self.stage, "step": number + 1},
                                               world.rank, self.sharded, world.wait)
                    on_checkpoint()
                if stopped:
                    caught = signal.Signals(stop.signal or signal.SIGTERM)                # or by another process
                    if world.rank == 0:
                        bar.close()
                        print(f"stopped by {caught.name} after step {number + 1} of {self.stage}; --resume goes on from there",
                              file=sys.stderr)
                    sys.exit(128 + caught)
        return meter

"""The whole model, kernels on and off: a training step, reading a prompt, decoding with and without a CUDA graph; profiles.

`af1` (2.2 B parameters) with random weights: the speed does not depend on what they are. Called by benchmark.py.
Training is train.py's: float32 weights, bf16 by autocast, everything but the encoder learns, AdamW. Decoding is greedy, with
weights in bf16; a step reads one token into the caches and picks the next, an answer is af_min's own loop around such steps.
"""
from __future__ import annotations

import dataclasses
import gc
import os

import torch

from af_min.config import PRESETS
from af_min.decoding import FixedStep
from af_min.flamingo import AudioFlamingo

SHOTS = 8


def batch(model: AudioFlamingo, B: int, T: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Windows (A, W, D), n_windows (B, N) and ids (B, T): SHOTS audios a sample, <audio> at equal distances."""
    device, config = model.lm.embed.weight.device, model.config
    W = config.audio.max_windows
    ids = torch.randint(4, 500, (B, T), device=device)
    ids[:, ::T // SHOTS] = config.audio_id
    return torch.randn(B * SHOTS, W, config.clap.out_width, device=device), torch.full((B, SHOTS), W, device=device), ids


def profile(run, bench, name: str) -> dict:
    """Where the time of one call goes, the twenty dearest operators."""
    from torch.profiler import ProfilerActivity
    os.environ |= {"DISABLE_CUPTI_LAZY_REINIT": "1", "TEARDOWN_CUPTI": "0"}       # as torch sets where it replays CUDA graphs of its own
    with torch.profiler.profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (not bench.dry)) as record:
        run()
        if not bench.dry:
            torch.cuda.synchronize()
    order = "self_cpu_time_total" if bench.dry else "self_device_time_total"
    bench.write(f"profile-{name}.txt".replace(", ", "-").replace(" ", "-"), record.key_averages().table(sort_by=order, row_limit=20))
    return {}


def training(model: AudioFlamingo, B: int, T: int):
    """One step, as train.py takes it."""
    model.encoder.requires_grad_(False)
    windows, n_windows, ids = batch(model, B, T)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step():
        with torch.autocast(windows.device.type, torch.bfloat16):
            loss = model(ids, ids, model.listen(windows, n_windows)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


@torch.no_grad()
def decoding(model: AudioFlamingo, B: int, T: int, new: int, graph: bool) -> dict:
    """Reading the prompt, one more token behind it, an answer of `new` tokens. All is forgotten again: every call does the same.

    graph: single tokens by FixedStep, which must give the logits of the ordinary step (to 3 % of the largest: bf16)."""
    windows, n_windows, ids = batch(model, B, T)
    state = model.start(model.listen(windows, n_windows), T + new)

    def rewind(length):
        state.cache.length, state.seen_B = length, torch.full((B,), min(length, SHOTS), device=ids.device)

    def prompt():
        model.listen(windows, n_windows)
        rewind(0)
        for recent in state.cache.recent:            # which rewinding leaves as it is
            recent.zero_()
        return model.read(ids, state)

    def step():
        rewind(T)
        return state.step(token, state)

    def answer():
        rewind(T)
        return sum(1 for _ in model.generate(first, state, -1, 0, new))
    first, state.step = prompt(), model.read
    token = first.argmax(-1)[:, None]
    if graph:
        plain, _ = step(), prompt()
        state.step = FixedStep(model, state)
        error = (step() - plain).abs().max() / plain.abs().max()
        assert error <= 0.03, f"got logits {error:.1%} from those of the ordinary step, expected at most 3 %"
    runs = {"prompt": prompt, "step": lambda: step().argmax(-1), f"{new} tokens": answer}
    return {part: run for part, run in runs.items() if not (graph and part == "prompt")}


def table(bench, profiled: bool = False) -> None:
    """Rows of the table `model`; or, `profiled`, profile-*.txt with the kernels on, late in a run: what the profiler leaves in the
    process may slow later launches, and under it replayed graphs have crashed CUDA before (torch/profiler/profiler.py)."""
    config, T, new, batches = PRESETS["af1"], 512, 16, (4, 1, 8)
    if bench.dry:
        tiny = PRESETS["tiny"]
        config, T, new, batches = dataclasses.replace(tiny, lm=dataclasses.replace(tiny.lm, layers=1, width=32)), 8, 2, (1, 1)
    with torch.device(bench.device):
        model = AudioFlamingo(dataclasses.replace(config, audio_id=config.lm.vocab_size - 1))
    for i, B in enumerate(batches):
        train, shape = i == 0, f"{'decoding' if i else 'training'} B{B} T{T}"
        if not train:
            model = model.to(torch.bfloat16).eval()
        for name, which in (("kernels", "triton"), ("PyTorch", "reference"), ("released form", "released"),
                            *[("kernels, CUDA graph", "triton")] * (not train)):
            if profiled and which != "triton":
                continue

            def measure():
                runs = {"step": training(model, B, T)} if train else decoding(model, B, T, new, name.endswith("graph"))
                for run in runs.values():
                    run()
                if not profiled:
                    return {part: bench.time(run, 1000, ahead=False) for part, run in runs.items()}
                for part in [part for part in ("prompt", "step") if part in runs]:
                    bench.attempt("profile", shape, f"{name}, {part}", lambda: profile(runs[part], bench, f"{shape} {name} {part}"))
                return {}
            gc.collect()                              # a profile keeps the optimizer of the step that it saw, 18 GB of numbers
            with bench.backend(which), torch.set_grad_enabled(train):
                bench.attempt("profile" if profiled else "model", shape, name, measure)

"""The whole model, kernels on and off: a training step, reading a prompt, one-token decoding, and a profile of each.

`af1` (2.2 B parameters) with random weights: the speed does not depend on what they are. Called by benchmark.py.
Training is train.py's: float32 weights, bf16 by autocast, everything but the encoder learns, AdamW. Decoding is greedy, with
weights in bf16; a step reads one token into the caches and picks the next.
"""
from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from af_min.config import PRESETS
from af_min.flamingo import AudioFlamingo

SHOTS = 8


def batch(model: AudioFlamingo, B: int, T: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Windows (A, W, D), n_windows (B, N) and ids (B, T): SHOTS audios a sample, <audio> at equal distances."""
    device, config = model.lm.embed.weight.device, model.config
    W = config.audio.max_windows
    ids = torch.randint(4, 500, (B, T), device=device)
    ids[:, ::T // SHOTS] = config.audio_id
    return torch.randn(B * SHOTS, W, config.clap.out_width, device=device), torch.full((B, SHOTS), W, device=device), ids


def profile(run, file: Path, device: str) -> None:
    """Where the time of one call goes, the twenty dearest operators."""
    from torch.profiler import ProfilerActivity
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with torch.profiler.profile(activities=activities) as record:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    order = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(record.key_averages().table(sort_by=order, row_limit=20))


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


def decoding(model: AudioFlamingo, B: int, T: int):
    """(reading the prompt, reading one more token behind it). The token is forgotten again, so every call does the same."""
    windows, n_windows, ids = batch(model, B, T)
    state = model.start(model.listen(windows, n_windows), T + 1)

    def read(ids_BT, length):
        state.cache.length, state.seen_B = length, torch.full((B,), min(length, SHOTS), device=ids.device)
        return model.read(ids_BT, state).argmax(-1)

    def prompt():
        model.listen(windows, n_windows)
        return read(ids, 0)
    token = prompt()[:, None]
    return prompt, lambda: read(token, T)


def table(bench, folder: Path) -> None:
    """Rows of the table `model`, and profile-*.txt with the kernels on."""
    config, T, batches = PRESETS["af1"], 512, (4, 1, 8)
    if bench.dry:
        tiny = PRESETS["tiny"]
        config, T, batches = dataclasses.replace(tiny, lm=dataclasses.replace(tiny.lm, layers=1, width=32)), 8, (1, 1)
    with torch.device(bench.device):
        model = AudioFlamingo(dataclasses.replace(config, audio_id=config.lm.vocab_size - 1))
    for i, B in enumerate(batches):
        train, shape = i == 0, f"{'decoding' if i else 'training'} B{B} T{T}"
        if not train:
            model = model.to(torch.bfloat16).eval()
        for name, which in (("released form", "released"), ("PyTorch", "reference"), ("kernels", "triton")):
            def measure():
                if train:
                    runs = {"step": training(model, B, T)}
                else:
                    runs = dict(zip(("prompt", "step"), decoding(model, B, T)))
                for run in runs.values():
                    run()
                if name == "kernels":
                    for part, run in runs.items():
                        profile(run, folder / f"profile-{shape.replace(' ', '-')}-{part}.txt", bench.device)
                return {part: bench.time(run, 3000) for part, run in runs.items()}
            with bench.backend(which), torch.set_grad_enabled(train):
                bench.attempt("model", shape, name, measure)

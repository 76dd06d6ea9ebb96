"""The published HTSAT (package msclap) beside ours: throughput, and the stored figures that test_clap.py checks.

    pip install --no-deps msclap torchlibrosa
    OMP_NUM_THREADS=2 python -m tests.bench_clap                  windows/s of either, float32 and bf16, and tiny's; fails below the bounds
    python -m tests.bench_clap --write-golden                     writes tests/golden/clap.npz from the peers
"""
from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
import time
import types
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from af_min.clap import WindowEncoder
from af_min.config import AF1, TINY
from af_min.pretrained_clap import IMAGINARY, REAL, TABLE, load_clap
from af_min.pretrained_files import expand

INSTALL = "pip install --no-deps msclap torchlibrosa"
GOLDEN = Path(__file__).parent / "golden" / "clap.npz"
AT_LEAST = {"float32": 1.2} | ({"bf16": 2.0} if torch.cpu._is_avx512_bf16_supported() else {})   # times the published encoder's rate


def peer():
    """The modules msclap.models.clap and .htsat, entered without msclap's __init__ (it wants torchaudio); None if absent."""
    found = importlib.util.find_spec("msclap") if "msclap" not in sys.modules else True
    if not found or not importlib.util.find_spec("torchlibrosa"):
        return None
    if found is not True:
        package = types.ModuleType("msclap")
        package.__path__ = list(found.submodule_search_locations)
        sys.modules["msclap"] = package
    stub = None
    if importlib.util.find_spec("transformers") is None:                       # only its text tower would use it
        stub = types.ModuleType("transformers")
        stub.AutoModel = None
        sys.modules["transformers"] = stub
    try:
        return types.SimpleNamespace(clap=importlib.import_module("msclap.models.clap"),
                                     htsat=importlib.import_module("msclap.models.htsat"))
    except ImportError:
        return None
    finally:
        if stub:
            del sys.modules["transformers"]


def published_encoder(modules):
    """msclap's AudioEncoder as its configuration file makes it."""
    return modules.clap.AudioEncoder("HTSAT", 768, 1024, 44100, 1024, 320, 64, 50, 8000, 527).eval()


def random_checkpoint(encoder: WindowEncoder, seed: int = 0) -> dict[str, torch.Tensor]:
    """Published names -> random weights, norms and statistics, drawn key by key: nothing stays at 0 or 1."""
    made, table = {}, expand(TABLE, encoder.state_dict())
    for name, value in encoder.state_dict().items():
        if name.startswith("log_mel"):
            continue
        key, rng = table[name], np.random.default_rng([seed, zlib.crc32(name.encode())])
        x = rng.standard_normal(value.shape, dtype=np.float32) if value.is_floating_point() else np.array(7)
        if key.endswith("running_mean"):
            x = 5 * x - 30
        elif key.endswith("running_var"):
            x = 100 + 20 * x
        elif "norm" in key or "bn0" in key:
            x = 0.3 * x + key.endswith("weight")
        elif key.endswith("bias"):
            x = 0.1 * x
        elif key.endswith("weight"):
            x = 3 * x / np.sqrt(value.shape[1])            # 3: so that the output depends on the input, not on biases
        made[key] = torch.tensor(x, dtype=value.dtype)
    made["base.htsat.patch_embed.proj.weight"] = made["base.htsat.patch_embed.proj.weight"].unflatten(
        1, (1, encoder.clap.patch, encoder.clap.patch))
    made["base.htsat.logmel_extractor.melW"] = encoder.log_mel.filters.clone()
    made[REAL], made[IMAGINARY] = stft_kernels(encoder.log_mel.window)
    made["base.htsat.head.weight"] = torch.zeros(2, 2)
    made["base.htsat.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(2, 2, dtype=torch.long)
    return made


def stft_kernels(window: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A window (n_fft,) -> (n_fft/2 + 1, 1, n_fft) x 2: the discrete Fourier transform as convolution kernels."""
    n_fft = len(window)
    turns = (torch.arange(n_fft // 2 + 1)[:, None] * torch.arange(n_fft) % n_fft).double() / n_fft
    real, imaginary = (2 * torch.pi * turns).cos() * window, -(2 * torch.pi * turns).sin() * window
    return real.to(window.dtype)[:, None], imaginary.to(window.dtype)[:, None]


def waves(count: int, samples: int) -> torch.Tensor:
    """(count, samples) in [-1, 1]: sweeps over noise, growing and fading; the same on every machine."""
    rng, t = np.random.default_rng(1), np.arange(samples) / samples
    rows = [np.sin(2 * np.pi * (200 + 300 * i + 900 * t) * 5 * t) * (t if i % 2 else 1 - t) * 0.6
            + 0.05 * rng.standard_normal(samples) for i in range(count)]
    return torch.tensor(np.stack(rows), dtype=torch.float32).clamp(-1, 1)


def stages(encoder: WindowEncoder, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs of ours by stage: mel (A, F, M), patches, stage0 .. (A, tokens, D), out (A, out_width)."""
    seen, hooks = {}, []

    def keep(module, name):
        hooks.append(module.register_forward_hook(lambda _, __, out: seen.__setitem__(name, out if out.ndim < 4 else out.flatten(1, 2))))

    keep(encoder.log_mel, "mel")
    keep(encoder.patch_norm, "patches")
    for n, stage in enumerate(encoder.stages):
        keep(stage, f"stage{n}")
    with torch.inference_mode():
        seen["out"] = encoder(windows)
    for hook in hooks:
        hook.remove()
    return seen


def published_stages(published, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same of the published encoder."""
    seen, hooks, htsat = {}, [], published.base.htsat

    def keep(module, name, pick):
        hooks.append(module.register_forward_hook(lambda _, __, out: seen.__setitem__(name, pick(out))))

    keep(htsat.logmel_extractor, "mel", lambda out: out[:, 0])
    keep(htsat.patch_embed, "patches", lambda out: out)
    for n, layer in enumerate(htsat.layers):
        keep(layer, f"stage{n}", lambda out: out[0])
    with torch.inference_mode():
        seen["out"] = published.projection(htsat(windows)["latent_output"])
    for hook in hooks:
        hook.remove()
    return seen


def excerpt(tensor: torch.Tensor) -> np.ndarray:
    """257 numbers spread over a tensor."""
    flat = tensor.flatten()
    return flat[torch.linspace(0, len(flat) - 1, 257).long()].numpy()


def write_golden(modules) -> None:
    import librosa
    figures = {}
    for name, config in (("tiny", TINY), ("af1", AF1)):
        a = config.audio
        figures[f"mel_{name}"] = librosa.filters.mel(sr=a.mel_sample_rate, n_fft=a.n_fft, n_mels=a.n_mels, fmin=a.fmin, fmax=a.fmax).T
    encoder = published_encoder(modules)
    encoder.load_state_dict({key: value for key, value in random_checkpoint(WindowEncoder(AF1.audio, AF1.clap)).items()
                             if "head" not in key and "index" not in key}, strict=False)
    for name, value in published_stages(encoder, waves(2, AF1.audio.window_samples)).items():
        figures[name] = value.numpy() if name == "out" else excerpt(value)
    np.savez_compressed(GOLDEN, **figures)


def rate(run, count: int, seconds: float = 4.0) -> float:
    """Windows/s of the best of several calls."""
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return count / best


def bench(modules, count: int = 8, seconds: float = 4.0) -> dict[str, float]:
    """Windows/s of the published encoder and of ours on the same weights and windows, one after the other."""
    published, ours, half = published_encoder(modules), *(WindowEncoder(AF1.audio, AF1.clap).eval() for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clap.pth"
        torch.save({"model": {f"clap.{key}": value for key, value in published.state_dict().items()}}, path)
        load_clap(path, ours), load_clap(path, half)
    half.bfloat16()
    x = waves(count, AF1.audio.window_samples)
    with torch.inference_mode():
        figures = {"msclap": rate(lambda: published(x), count, seconds), "float32": rate(lambda: ours(x), count, seconds),
                   "bf16": rate(lambda: half(x), count, seconds)}
        figures["bf16 cosine distance"] = (1 - F.cosine_similarity(ours(x).double(), half(x).double())).max().item()
    return figures


def bench_tiny(count: int = 64) -> dict[str, float]:
    """Windows/s of the tiny encoder: forward, and forward with backward."""
    encoder, x = WindowEncoder(TINY.audio, TINY.clap), waves(count, TINY.audio.window_samples)
    with torch.inference_mode():
        encoder.eval()
        forward = rate(lambda: encoder(x), count)
    encoder.train()
    return {"forward": forward, "forward + backward": rate(lambda: encoder(x).sum().backward(), count)}


if __name__ == "__main__":
    peers = peer()
    if not peers:
        sys.exit(f"the peer is not installed: {INSTALL}")
    if "--write-golden" in sys.argv:
        write_golden(peers)
    else:
        figures = bench(peers)
        print(f"af1, windows/s on {torch.get_num_threads()} threads: " + ", ".join(f"{k} {v:.3g}" for k, v in figures.items()))
        print(f"ratios: float32 {figures['float32'] / figures['msclap']:.2f}x, bf16 {figures['bf16'] / figures['msclap']:.2f}x")
        print("tiny, windows/s: " + ", ".join(f"{k} {v:.0f}" for k, v in bench_tiny().items()))
        for kind, least in AT_LEAST.items():
            if figures[kind] < least * figures["msclap"]:
                sys.exit(f"{kind}: got {figures[kind] / figures['msclap']:.2f} times msclap's rate, expected at least {least}")

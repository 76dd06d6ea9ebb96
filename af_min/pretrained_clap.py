"""Published CLAP weights -> our window encoder (clap.py).

Read are the audio towers of MS-CLAP 2023 (`CLAP_weights_2023.pth`, keys `audio_encoder.*`) and of ClapCap, which Audio
Flamingo uses (`clapcap_weights_2023.pth`, keys `clap.*`), as torch.save or safetensors files. Loading is strict both ways:
every weight of ours is filled, every weight of the tower is used or stands in `UNUSED`.

The checkpoints also hold the front end: the mel matrix, which replaces the computed one, and the STFT as convolution kernels

    real[k, n] = window[n] cos(2 pi k n / n_fft)        imaginary[k, n] = -window[n] sin(2 pi k n / n_fft)

so window[n] = real[0, n]. The kernels are checked to have this form; then an FFT with that window is the same and 20x faster.
"""
from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from .clap import WindowEncoder
from .cli import UserError
from .pretrained_files import expand, open_file, read_table, seems, shapes_of

REAL = "base.htsat.spectrogram_extractor.stft.conv_real.weight"
IMAGINARY = "base.htsat.spectrogram_extractor.stft.conv_imag.weight"
# ours -> theirs, without their prefix; {n} stage, {m} block, {p} weight, bias or a statistic
TABLE = {
    "mel_norm.{p}": "base.htsat.bn0.{p}",
    "log_mel.window": REAL,
    "log_mel.filters": "base.htsat.logmel_extractor.melW",
    "patches.{p}": "base.htsat.patch_embed.proj.{p}",
    "patch_norm.{p}": "base.htsat.patch_embed.norm.{p}",
    "stages.{n}.blocks.{m}.bias_table": "base.htsat.layers.{n}.blocks.{m}.attn.relative_position_bias_table",
    "stages.{n}.blocks.{m}.block.norm1.{p}": "base.htsat.layers.{n}.blocks.{m}.norm1.{p}",
    "stages.{n}.blocks.{m}.block.norm2.{p}": "base.htsat.layers.{n}.blocks.{m}.norm2.{p}",
    "stages.{n}.blocks.{m}.block.qkv.{p}": "base.htsat.layers.{n}.blocks.{m}.attn.qkv.{p}",
    "stages.{n}.blocks.{m}.block.proj.{p}": "base.htsat.layers.{n}.blocks.{m}.attn.proj.{p}",
    "stages.{n}.blocks.{m}.block.fc1.{p}": "base.htsat.layers.{n}.blocks.{m}.mlp.fc1.{p}",
    "stages.{n}.blocks.{m}.block.fc2.{p}": "base.htsat.layers.{n}.blocks.{m}.mlp.fc2.{p}",
    "stages.{n}.merge.norm.{p}": "base.htsat.layers.{n}.downsample.norm.{p}",
    "stages.{n}.merge.reduction.{p}": "base.htsat.layers.{n}.downsample.reduction.{p}",
    "norm.{p}": "base.htsat.norm.{p}",
    "projection.linear1.{p}": "projection.linear1.{p}",
    "projection.linear2.{p}": "projection.linear2.{p}",
    "projection.norm.{p}": "projection.layer_norm.{p}",
}
UNUSED = re.compile(r"base\.htsat\.(tscam_conv\.|head\.)"                      # AudioSet classifier
                    r"|.*\.(attn_mask|relative_position_index)$")              # computed from the configuration
ANCHOR = "base.htsat.bn0.weight"                                               # tells the prefix


def load_clap(path: Path, encoder: WindowEncoder) -> str:
    """Fill `encoder` from a checkpoint in place; a line that says what was loaded and what was left.

    UserError names the file, what was found and what was expected: a wrong file, a cut-off file, a key or a shape.
    """
    entries, shapes = open_file(path), shapes_of(encoder)
    c = encoder.clap
    wanted = f"the encoder of a ClapCap or MS-CLAP 2023 checkpoint, {c.depths} blocks of width {c.width} (published: preset af1)"
    prefixes = [name.removesuffix(ANCHOR) for name in entries if name.endswith(ANCHOR)]
    if len(prefixes) != 1:
        raise UserError(f"{path}: expected {wanted}, but {seems(entries)}")
    prefix = prefixes[0]                                   # a bare tower has none: whatever else is there is not part of it
    tower = {name: entry for name, entry in entries.items() if name.startswith(prefix or ("base.", "projection."))}
    table = {ours: prefix + theirs for ours, theirs in {**expand(TABLE, shapes), "imaginary": IMAGINARY}.items()}
    n_fft = shapes["log_mel.window"][0]
    shapes["log_mel.window"] = shapes["imaginary"] = n_fft // 2 + 1, 1, n_fft
    shapes["patches.weight"] = c.width, 1, c.patch, c.patch
    state = read_table(tower, table, shapes, str(path), wanted, torch.float32,
                       ignore=lambda name: bool(UNUSED.match(name.removeprefix(prefix))))
    state["log_mel.window"] = _stft_window(state["log_mel.window"], state.pop("imaginary"), path)
    state["patches.weight"] = state["patches.weight"].flatten(1)               # convolution (D, 1, p, q) -> linear (D, p q)
    encoder.load_state_dict(state)
    count = sum(value.numel() for value in state.values())
    return f"{path}: {len(state)} tensors ({count / 1e6:.1f} M numbers) loaded, {len(entries) - len(table)} not needed"


def _stft_window(real: Tensor, imaginary: Tensor, path) -> Tensor:
    """Kernels (n_fft/2 + 1, 1, n_fft) -> window (n_fft,); UserError where they are not a windowed DFT."""
    window, (bins, _, n_fft) = real[0, 0].double(), real.shape
    k, n = torch.arange(bins)[:, None], torch.arange(n_fft)
    angle = 2 * torch.pi * (k * n % n_fft).double() / n_fft
    error = max((real[:, 0] - window * angle.cos()).abs().max(), (imaginary[:, 0] + window * angle.sin()).abs().max())
    if not error < 1e-4:
        raise UserError(f"{path}: {REAL}: found kernels that differ from a windowed Fourier transform by {error:.1e}, "
                        "expected below 1e-4")
    return window.float()

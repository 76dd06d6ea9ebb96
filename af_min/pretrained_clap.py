"""Published CLAP weights -> our window encoder (clap.py).

Read are the audio towers of MS-CLAP 2023 (`CLAP_weights_2023.pth`, keys `audio_encoder.*`) and of ClapCap, which Audio
Flamingo uses (`clapcap_weights_2023.pth`, keys `clap.*`), as torch.save or safetensors files. Loading is strict both ways:
every weight of ours is filled, every weight of the tower is used or stands in `UNUSED`.

The checkpoints also hold the front end: the mel matrix, which replaces the computed one, and the STFT as convolution kernels

    real[k, n] = window[n] cos(2 pi k n / n_fft)        imaginary[k, n] = -window[n] sin(2 pi k n / n_fft)

so window[n] = real[0, n]. The kernels are checked to have this form; then an FFT with that window is the same and 20x faster.
"""
from __future__ import annotations

import json
import pickle
import re
import struct
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from .clap import WindowEncoder
from .cli import UserError

# ours -> theirs, without their prefix; {n} stage, {m} block, {} weight, bias or a statistic
TABLE = {
    "mel_norm.{}": "base.htsat.bn0.{}",
    "log_mel.filters": "base.htsat.logmel_extractor.melW",
    "patches.{}": "base.htsat.patch_embed.proj.{}",
    "patch_norm.{}": "base.htsat.patch_embed.norm.{}",
    "stages.{n}.blocks.{m}.bias_table": "base.htsat.layers.{n}.blocks.{m}.attn.relative_position_bias_table",
    "stages.{n}.blocks.{m}.block.norm1.{}": "base.htsat.layers.{n}.blocks.{m}.norm1.{}",
    "stages.{n}.blocks.{m}.block.norm2.{}": "base.htsat.layers.{n}.blocks.{m}.norm2.{}",
    "stages.{n}.blocks.{m}.block.qkv.{}": "base.htsat.layers.{n}.blocks.{m}.attn.qkv.{}",
    "stages.{n}.blocks.{m}.block.proj.{}": "base.htsat.layers.{n}.blocks.{m}.attn.proj.{}",
    "stages.{n}.blocks.{m}.block.fc1.{}": "base.htsat.layers.{n}.blocks.{m}.mlp.fc1.{}",
    "stages.{n}.blocks.{m}.block.fc2.{}": "base.htsat.layers.{n}.blocks.{m}.mlp.fc2.{}",
    "stages.{n}.merge.norm.{}": "base.htsat.layers.{n}.downsample.norm.{}",
    "stages.{n}.merge.reduction.{}": "base.htsat.layers.{n}.downsample.reduction.{}",
    "norm.{}": "base.htsat.norm.{}",
    "projection.linear1.{}": "projection.linear1.{}",
    "projection.linear2.{}": "projection.linear2.{}",
    "projection.norm.{}": "projection.layer_norm.{}",
}
REAL = "base.htsat.spectrogram_extractor.stft.conv_real.weight"
IMAGINARY = "base.htsat.spectrogram_extractor.stft.conv_imag.weight"
UNUSED = re.compile(r"base\.htsat\.(tscam_conv\.|head\.)"                      # AudioSet classifier
                    r"|.*\.(attn_mask|relative_position_index)$")              # computed from the configuration
ANCHOR = "base.htsat.bn0.weight"                                               # tells the prefix
EXPECTED = f"expected an MS-CLAP 2023 or ClapCap checkpoint with keys such as clap.{ANCHOR}"


def load_clap(path, encoder: WindowEncoder) -> str:
    """Fill `encoder` from a checkpoint in place; a line that says what was loaded and what was left.

    UserError names the file, what was found and what was expected: a wrong file, a cut-off file, a key or a shape.
    """
    stored = read_checkpoint(path)
    prefixes = [key.removesuffix(ANCHOR) for key in stored if key.endswith(ANCHOR)]
    if len(prefixes) != 1:
        kind = " (the CNN14 of MS-CLAP 2022)" if any("base.conv_block1" in key for key in stored) else ""
        some = ", ".join(sorted(stored)[:3]) or "no weights"
        raise UserError(f"{path}: found {len(stored)} weights ({some}){kind}; {EXPECTED}")
    tower = {key.removeprefix(prefixes[0]): value for key, value in stored.items() if key.startswith(prefixes[0])}
    if not prefixes[0]:                                    # a bare tower: whatever else is there is not part of it
        tower = {key: value for key, value in tower.items() if key.startswith(("base.", "projection."))}

    wanted = encoder.state_dict()
    names = {ours: _theirs(ours) for ours in wanted if ours != "log_mel.window"}
    found = {ours: tower[theirs] for ours, theirs in names.items() if theirs in tower}
    if {REAL, IMAGINARY} <= set(tower):
        found["log_mel.window"] = _stft_window(tower[REAL], tower[IMAGINARY], path)
    if missing := sorted(names.get(ours, REAL) for ours in wanted if ours not in found):
        raise UserError(f"{path}: {len(missing)} weights are missing, first {prefixes[0]}{missing[0]}; {EXPECTED}")
    used = {*names.values(), REAL, IMAGINARY}
    if unexpected := sorted(key for key in tower if key not in used and not UNUSED.match(key)):
        raise UserError(f"{path}: {len(unexpected)} weights do not fit, first {prefixes[0]}{unexpected[0]}; {EXPECTED} "
                        f"and {len(encoder.stages)} stages of {encoder.clap.depths} blocks")
    found["patches.weight"] = found["patches.weight"].flatten(1)               # convolution (D, 1, p, q) -> linear (D, p q)
    for ours, value in found.items():
        if value.shape != wanted[ours].shape:
            raise UserError(f"{path}: {names.get(ours, REAL)}: found shape {tuple(value.shape)}, expected "
                            f"{tuple(wanted[ours].shape)}; is this preset's encoder the published one (preset af1)?")
    encoder.load_state_dict(found)
    count = sum(value.numel() for value in found.values())
    return f"{path}: {len(found)} tensors ({count / 1e6:.1f} M numbers) loaded, {len(stored) - len(used & set(tower))} not needed"


def _theirs(ours: str) -> str | None:
    """The published name of one of our weights, by TABLE."""
    for mine, theirs in TABLE.items():
        pattern = re.escape(mine).replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{m\}", r"(?P<m>\d+)").replace(r"\{\}", r"(?P<leaf>\w+)")
        if match := re.fullmatch(pattern, ours):
            parts = match.groupdict()
            return theirs.format(parts.pop("leaf", ""), **parts)
    return None


def _stft_window(real: Tensor, imaginary: Tensor, path) -> Tensor:
    """Kernels (n_fft/2 + 1, 1, n_fft) -> window (n_fft,); UserError where they are not a windowed DFT."""
    window, (bins, _, n_fft) = real[0, 0].double(), real.shape
    k, n = torch.arange(bins)[:, None], torch.arange(n_fft)
    angle = 2 * torch.pi * (k * n % n_fft).double() / n_fft
    error = max((real[:, 0] - window * angle.cos()).abs().max(), (imaginary[:, 0] + window * angle.sin()).abs().max())
    if not error < 1e-4:
        raise UserError(f"{path}: {REAL}: found kernels that differ from a windowed Fourier transform by {error:.1e}, expected below 1e-4")
    return window.float()


def read_checkpoint(path) -> dict[str, Tensor]:
    """The tensors of a .pth / .pt (memory-mapped, nothing unpickled but tensors) or .safetensors file, by name."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; {EXPECTED}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            stored = load_file(path)
        else:
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        known = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, struct.error, json.JSONDecodeError)
        if not isinstance(error, known) and type(error).__module__.split(".")[0] != "safetensors":
            raise
        reason = str(error).strip().split("\n")[0][:120]
        raise UserError(f"{path}: not a checkpoint, or cut off ({reason or type(error).__name__}); {EXPECTED}") from None
    if isinstance(stored, dict) and isinstance(stored.get("model"), dict):
        stored = stored["model"]
    if not isinstance(stored, dict):
        raise UserError(f"{path}: found a {type(stored).__name__}, expected a dictionary of weights; {EXPECTED}")
    return {str(key).removeprefix("module."): value for key, value in stored.items() if isinstance(value, Tensor)}

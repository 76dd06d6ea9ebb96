"""Step 1 of the walk: a recording becomes overlapping windows, and every window a log-mel spectrogram. Next: clap.py.

A CLAP encoder hears a few seconds at a time. Long recordings are therefore cut into overlapping windows (paper section
3.1 i), each of which becomes one embedding; the order of events survives as the order of windows. s seconds make

    W = 1                                 if s <= window
    W = 1 + ceil((s - window) / hop)      otherwise, at most max_windows; the last one is padded with zeros

The encoder looks at the power spectrum on the mel scale, in decibels. With frames f, frequencies k and mel bins m:

    X[f, k]   = sum_n hann[n] x[f stft_hop + n - n_fft/2] exp(-2 pi i k n / n_fft)       (x is reflected at its edges)
    mel[f, m] = 10 log10 max(sum_k |X[f, k]|^2 filters[k, m], 1e-10)                     (0 dB = power 1)
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .audio_files import SILENT_PEAK, AudioError, check_truncation, opened, read
from .config import AudioConfig

POWER_FLOOR = 1e-10        # -100 dB


@dataclass(frozen=True)
class Recording:
    samples: np.ndarray        # (S,) float32 in [-1, 1], on the grid of 16-bit integers
    sample_rate: int           # Hz
    dropped_seconds: float     # length of what the file holds beyond start + max_seconds

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.sample_rate

    @property
    def silent(self) -> bool:
        return not self.samples.any()


def load(path, sample_rate: int, start: float = 0.0, max_seconds: float | None = None) -> Recording:
    """The seconds start .. start + max_seconds of channel 0 at `sample_rate` Hz, its peak scaled to 1; no random crop.

    As in the published system only channel 0 is heard, the peak is normalised after resampling, and samples are rounded
    towards zero to the 16-bit grid. Silence stays silence. AudioError says what is wrong with a file.
    """
    with opened(path) as file:
        rate, first = file.samplerate, round(start * file.samplerate)
        if not 0 <= first < file.frames:
            raise AudioError(path, "empty", f"start = {start} s lies outside its {file.frames / rate:.2f} s")
        left = file.frames - first
        wanted = left if max_seconds is None else min(left, round(max_seconds * rate))
        x_S = read(file, path, first, wanted)
        check_truncation(path, file)
    if rate != sample_rate:
        import soxr                                                    # as late as soundfile: audio_files.py
        length = -(-len(x_S) * sample_rate // rate)                    # ceil
        x_S = soxr.resample(x_S, rate, sample_rate, quality="HQ")[:length]
        x_S = np.pad(x_S, (0, length - len(x_S)))
    peak = np.abs(x_S).max()
    x_S = x_S / peak if peak >= SILENT_PEAK else np.zeros_like(x_S)
    x_S = np.trunc(x_S * 32767 * (1 + 1e-9)) / 32767                   # 1e-9: what lies on the grid stays on it
    return Recording(x_S.astype(np.float32), sample_rate, (left - wanted) / rate)


def count_windows(samples: int, config: AudioConfig) -> int:
    """W of a recording of `samples` samples at config.sample_rate."""
    beyond = max(0, samples - config.window_samples)
    return min(config.max_windows, 1 + -(-beyond // config.hop_samples))


def windows(samples_S, config: AudioConfig) -> Tensor:
    """(S,) samples at config.sample_rate -> (W, window_samples): a view of one zero-padded copy, not W copies."""
    x_S = torch.as_tensor(samples_S)
    W = count_windows(len(x_S), config)
    span = config.window_samples + (W - 1) * config.hop_samples
    return F.pad(x_S[:span], (0, max(0, span - len(x_S)))).unfold(0, config.window_samples, config.hop_samples)


def mel_filters(config: AudioConfig) -> Tensor:
    """(n_fft/2 + 1, M) triangular filters of area 1 (in Hz), evenly spaced on the mel scale of Slaney's Auditory Toolbox (librosa's default).

    The scale is linear up to 1000 Hz (15 mel), logarithmic above (27 mel for a factor of 6.4). Of edges equally far apart on it, filter m rises from
    edge m to edge m + 1 and falls to edge m + 2; its height 2 / (width in Hz) makes its area 1.
    """
    def mel_of(hz):
        return np.where(hz < 1000, hz * 3 / 200, 15 + 27 * np.log(np.maximum(hz, 1000) / 1000) / np.log(6.4))

    def hz_of(mel):
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp(np.log(6.4) * (mel - 15) / 27))

    frequency_k = np.linspace(0, config.mel_sample_rate / 2, config.n_fft // 2 + 1)[:, None]
    edges = hz_of(np.linspace(mel_of(config.fmin), mel_of(config.fmax), config.n_mels + 2))
    low, mid, high = edges[:-2], edges[1:-1], edges[2:]
    rise, fall = (frequency_k - low) / (mid - low), (high - frequency_k) / (high - mid)
    return torch.tensor(np.maximum(0, np.minimum(rise, fall)) * 2 / (high - low), dtype=torch.float32)


class Float32(nn.Module):
    """A module that moves between devices but stays float32: in bf16, of 8 bits, rounding hides what is 50 dB below the loudest."""

    def _apply(self, fn, recurse=True):
        return super()._apply(lambda t: fn(t) if fn(t).dtype == t.dtype else t.to(fn(t).device), recurse)


class LogMel(Float32):
    """Windows (A, S) in [-1, 1] -> log-mel (A, F, M) in dB, F = 1 + S // stft_hop.

    `filters` (n_fft/2 + 1, M) and `window` (n_fft,) are buffers: those of a published checkpoint replace them.
    """

    def __init__(self, config: AudioConfig):
        super().__init__()
        self.config = config
        self.register_buffer("filters", mel_filters(config))
        self.register_buffer("window", torch.hann_window(config.n_fft))

    def forward(self, windows_AS: Tensor) -> Tensor:
        n_fft = self.config.n_fft
        with torch.autocast(windows_AS.device.type, enabled=False):
            x_AS, edge = windows_AS.float(), n_fft // 2
            x_AS = torch.cat([x_AS[:, 1:edge + 1].flip(1), x_AS, x_AS[:, -edge - 1:-1].flip(1)], 1)
            frames = x_AS.unfold(1, n_fft, self.config.stft_hop) * self.window           # (A, F, n_fft)
            parts = torch.view_as_real(torch.fft.rfft(frames)).flatten(-2)               # re, im, re, im, ...
            power = (parts * parts) @ self.filters.repeat_interleave(2, 0)               # |X|^2 = re^2 + im^2
            return power.clamp_min(POWER_FLOOR).log10() * 10

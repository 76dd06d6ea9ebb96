"""Step 1 of the walk: a recording becomes overlapping windows, and every window a log-mel picture. Next: clap.py.

A CLAP encoder hears a few seconds at a time. Long recordings are therefore cut into overlapping windows (paper section
3.1), each of which becomes one embedding; what happened when survives as the order of the windows:

    W = 1                                 if T <= window
    W = 1 + ceil((T - window) / hop)      otherwise, at most max_windows; the tail is padded with zeros

The encoder looks at the power spectrum on the mel scale, in decibels. With frames f, frequencies k and mel bins m:

    X[f, k]   = sum_n hann[n] x[f stft_hop + n - n_fft/2] exp(-2 pi i k n / n_fft)       (edges reflected)
    mel[f, m] = 10 log10 max(sum_k |X[f, k]|^2 filters[k, m], 1e-10)                     (0 dB = power 1)
"""
from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cli import UserError
from .config import AudioConfig

EXTENSIONS = (".wav", ".flac", ".ogg", ".oga", ".mp3")
MIN_SECONDS = 0.1          # shorter recordings hold nothing that a window could show
SILENT_PEAK = 2.0 ** -16   # of full scale: half a step of a 16-bit file
UNKNOWN_FRAMES = 2 ** 63 - 1     # what libsndfile says of a flac whose header names no length
POWER_FLOOR = 1e-10        # -100 dB
NOT_UTF8 = re.compile("[\udc80-\udcff]")     # how Python spells such bytes in the name of a file


class AudioError(UserError):
    """A recording that cannot be used. `reason`: missing, unreadable, empty, NaN, truncated, silent or too short."""

    def __init__(self, path, reason: str, advice: str):
        super().__init__(f"{path}: {reason}: {advice}")
        self.reason = reason


@dataclass(frozen=True)
class Recording:
    samples: np.ndarray        # (S,) float32 in [-1, 1], on the grid of 16-bit integers
    sample_rate: int           # Hz
    dropped_seconds: float     # what the file holds beyond start + max_seconds

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.sample_rate

    @property
    def silent(self) -> bool:
        return not self.samples.any()


def load(path, sample_rate: int, start: float = 0.0, max_seconds: float | None = None) -> Recording:
    """The span [start, start + max_seconds) of channel 0 at `sample_rate` Hz, its peak scaled to 1. Always the same span.

    As in the published system only channel 0 is heard, the peak is normalised after resampling, and samples are cut
    (towards zero) to the 16-bit grid. Silence stays silence. AudioError says what is wrong with a file.
    """
    with _open(path) as file:
        rate, first = file.samplerate, round(start * file.samplerate)
        if not 0 <= first < file.frames:
            raise AudioError(path, "empty", f"start = {start} s lies outside its {file.frames / rate:.2f} s")
        left = file.frames - first
        wanted = left if max_seconds is None else min(left, round(max_seconds * rate))
        x_S = _read(file, path, first, wanted)
        _check_truncation(path, file)
    if rate != sample_rate:
        length = -(-len(x_S) * sample_rate // rate)                    # ceil
        x_S = soxr.resample(x_S, rate, sample_rate, quality="HQ")[:length]
        x_S = np.pad(x_S, (0, length - len(x_S)))
    peak = np.abs(x_S).max()
    x_S = x_S / peak if peak >= SILENT_PEAK else np.zeros_like(x_S)
    x_S = np.trunc(x_S * 32767 * (1 + 1e-9)) / 32767                   # 1e-9: what lies on the grid stays on it
    return Recording(x_S.astype(np.float32), sample_rate, (left - wanted) / rate)


def inspect(path) -> float:
    """Seconds of a file after reading all of it in small blocks. AudioError also for silence and below MIN_SECONDS."""
    with _open(path) as file:
        seconds, peak = file.frames / file.samplerate, 0.0
        for first in range(0, file.frames, 1 << 20):
            peak = max(peak, np.abs(_read(file, path, first, min(1 << 20, file.frames - first))).max())
        _check_truncation(path, file)
    if seconds < MIN_SECONDS:
        raise AudioError(path, "too short", f"{seconds:.3f} s; at least {MIN_SECONDS} s are needed")
    if peak < SILENT_PEAK:
        raise AudioError(path, "silent", "channel 0 holds nothing but zeros")
    return seconds


def _open(path) -> soundfile.SoundFile:
    if not os.path.isfile(path):                                # False too where a name is too long to be one
        raise AudioError(path, "missing", "a folder; name the recordings in it" if os.path.isdir(path) else "there is no such file")
    if Path(path).stat().st_size == 0:
        raise AudioError(path, "empty", "the file has 0 bytes")
    try:
        with open(path, "rb") as head:
            if head.read(23) == b"version https://git-lfs":
                raise AudioError(path, "unreadable", "a Git LFS pointer in place of the recording; get it with `git lfs pull`")
        file = soundfile.SoundFile(os.fsencode(path) if NOT_UTF8.search(str(path)) else path)
        if file.format == "RAW":                                # any bytes, for libsndfile, where the name ends in .au
            raise TypeError("no header")
    except (soundfile.SoundFileError, TypeError, OSError) as error:      # TypeError: a headerless format by its name
        raise AudioError(path, "unreadable", f"not an audio file that libsndfile knows ({error})") from None
    if file.frames == UNKNOWN_FRAMES:
        raise AudioError(path, "unreadable", "its header does not say how long it is, as a program writes it into a pipe; make the file again")
    if file.frames == 0:
        _check_truncation(path, file)
        raise AudioError(path, "empty", "it holds no samples")
    return file


def _read(file: soundfile.SoundFile, path, first: int, count: int) -> np.ndarray:
    """Samples first .. first + count - 1 of channel 0, (count,) float64, full scale = 1."""
    try:
        file.seek(first)
        x_SC = file.read(count, dtype="float64", always_2d=True)
    except soundfile.SoundFileError as error:
        raise AudioError(path, "truncated", f"decoding stops early ({error}); make the file again") from None
    if len(x_SC) < count:
        raise AudioError(path, "truncated", f"{first + len(x_SC)} samples, its header says {first + count}; make the file again")
    if not np.isfinite(x_SC[:, 0]).all():
        raise AudioError(path, "NaN", "it holds samples that are not numbers; write it again as 16-bit audio")
    return x_SC[:, 0]


def _check_truncation(path, file: soundfile.SoundFile) -> None:
    """Decoders read a cut-off wav, ogg or mp3 as a shorter one without a word: compare what the headers promise."""
    log = file.extra_info
    found = None
    if cut := re.search(r"^(?:data|SSND) *: (\d+) \(should be (\d+)\)", log, re.MULTILINE):
        said, held = map(int, cut.groups())
        if held < said < 0x7FFF0000:                       # larger: "unknown", as streaming programs write it
            found = f"{held} bytes of sound, its header says {said}"
    elif re.search("Ogg *: (File ended|Last page lacks|Junk after)", log):
        found = "its last Ogg page is missing or cut off"
    elif file.format == "MP3":
        said, held = _mp3_bytes(Path(path))
        if held < said:
            found = f"{held} bytes of sound, its header says {said}"
    if found:
        raise AudioError(path, "truncated", f"{found}; make the file again")


def _mp3_bytes(path: Path) -> tuple[int, int]:
    """(bytes that the Xing header promises or 0, bytes of the stream held)."""
    with open(path, "rb") as file:
        head = file.read(10)
        tag = 0                                            # an ID3v2 tag: 10 bytes and a length in 4 x 7 bits
        if head[:3] == b"ID3":
            tag = 10 + sum(byte << 7 * (3 - i) for i, byte in enumerate(head[6:10]))
        file.seek(tag)
        frame = file.read(200)
    at = max(frame.find(b"Xing"), frame.find(b"Info"))
    if at < 0 or not frame[at + 7] & 2:                    # bit 1 of the flags: the byte count is given
        return 0, 0
    field = at + (12 if frame[at + 7] & 1 else 8)          # bit 0: a frame count stands before it
    return int.from_bytes(frame[field:field + 4], "big"), path.stat().st_size - tag


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
    """(n_fft/2 + 1, M) triangular filters of equal area on the mel scale of Slaney's Auditory Toolbox (librosa's default).

    The scale is linear up to 1000 Hz (15 mel) and logarithmic above (27 mel for a factor of 6.4). Filter m rises from
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
    """A module that moves between devices but stays float32: 100 dB of dynamics do not fit into bf16's 8 bits."""

    def _apply(self, fn, recurse=True):
        return super()._apply(lambda t: fn(t) if fn(t).dtype == t.dtype else t.to(fn(t).device), recurse)


class LogMel(Float32):
    """Windows (A, S) in [-1, 1] -> log-mel (A, F, M) in dB, F = 1 + S // stft_hop.

    `filters` (n_fft/2 + 1, M) and `window` (n_fft,) are buffers: a published checkpoint brings its own, and they win.
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

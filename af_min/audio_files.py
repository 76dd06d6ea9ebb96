"""Files of recordings: opened, read, and refused in one line where what is heard would not be what was recorded.

libsndfile reads a cut-off file as a shorter one without a word, so what the headers promise is compared with what is there. How long
an mp3 is it takes from its Xing or Info header; where a file has none it guesses by the bitrate of the first frame, and half of a file
of variable bitrate is lost, or a whole one is called cut off. Here the frames are counted, and a header is put before them.
"""
from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .cli import UserError

if TYPE_CHECKING:          # elsewhere imported where a file is read: what only computes (kernels/benchmark.py) does without
    import soundfile

EXTENSIONS = (".wav", ".flac", ".ogg", ".oga", ".mp3")
MIN_SECONDS = 0.1          # shorter recordings hold nothing that a window could show
SILENT_PEAK = 2.0 ** -16   # of full scale: half a step of a 16-bit file
UNKNOWN_FRAMES = 2 ** 63 - 1     # what libsndfile says of a flac whose header names no length
NOT_UTF8 = re.compile("[\udc80-\udcff]")     # how Python spells such bytes in the name of a file
KBITS = {1: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),         # of MPEG-1 layer III, and of MPEG-2 and 2.5
         2: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)}


class AudioError(UserError):
    """A recording that cannot be used. `reason`: missing, unreadable, empty, NaN, truncated, silent or too short."""

    def __init__(self, path, reason: str, advice: str):
        super().__init__(f"{path}: {reason}: {advice}")
        self.reason = reason


def inspect(path) -> float:
    """Seconds of a file after reading all of it in small blocks. AudioError also for silence and below MIN_SECONDS."""
    with opened(path) as file:
        seconds, peak = file.frames / file.samplerate, 0.0
        for first in range(0, file.frames, 1 << 20):
            peak = max(peak, np.abs(read(file, path, first, min(1 << 20, file.frames - first))).max())
        check_truncation(path, file)
    if seconds < MIN_SECONDS:
        raise AudioError(path, "too short", f"{seconds:.3f} s; at least {MIN_SECONDS} s are needed")
    if peak < SILENT_PEAK:
        raise AudioError(path, "silent", "channel 0 holds nothing but zeros")
    return seconds


def opened(path) -> soundfile.SoundFile:
    """The file, at its beginning. AudioError where there is none, or nothing in it that libsndfile knows."""
    import soundfile
    if not os.path.isfile(path):                                # False too where a name is too long to be one
        raise AudioError(path, "missing", "a folder; name the recordings in it" if os.path.isdir(path) else "there is no such file")
    if Path(path).stat().st_size == 0:
        raise AudioError(path, "empty", "the file has 0 bytes")
    try:
        with open(path, "rb") as head:
            if head.read(23) == b"version https://git-lfs":
                raise AudioError(path, "unreadable", "a Git LFS pointer in place of the recording; get it with `git lfs pull`")
        file = soundfile.SoundFile(os.fsencode(path) if NOT_UTF8.search(str(path)) else path)
        if file.format == "MP3":
            file = soundfile.SoundFile(io.BytesIO(mp3_with_length(path)))
        if file.format == "RAW":                                # any bytes, for libsndfile, where the name ends in .au
            raise TypeError("no header")
    except (soundfile.SoundFileError, TypeError, OSError) as error:      # TypeError: a headerless format by its name
        raise AudioError(path, "unreadable", f"not an audio file that libsndfile knows ({error})") from None
    if file.frames == UNKNOWN_FRAMES:
        raise AudioError(path, "unreadable", "its header does not say how long it is, as a program writes it into a pipe; make the file again")
    if file.frames == 0:
        check_truncation(path, file)
        raise AudioError(path, "empty", "it holds no samples")
    return file


def read(file: soundfile.SoundFile, path, first: int, count: int) -> np.ndarray:
    """Samples first .. first + count - 1 of channel 0, (count,) float64, full scale = 1."""
    import soundfile
    try:
        file.seek(first)
        x_SC = file.read(count, dtype="float64", always_2d=True)
    except soundfile.SoundFileError as error:
        raise cut_off(path, f"decoding stops early ({error})") from None
    if len(x_SC) < count:
        raise cut_off(path, f"{first + len(x_SC)} samples, its header says {first + count}")
    if not np.isfinite(x_SC[:, 0]).all():
        raise AudioError(path, "NaN", "it holds samples that are not numbers; write it again as 16-bit audio")
    return x_SC[:, 0]


def cut_off(path, found: str) -> AudioError:
    return AudioError(path, "truncated", f"{found}; make the file again")


def check_truncation(path, file: soundfile.SoundFile) -> None:
    """Decoders read a cut-off wav or ogg as a shorter one without a word: compare what the headers promise."""
    if cut := re.search(r"^(?:data|SSND) *: (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE):
        said, held = map(int, cut.groups())
        if held < said < 0x7FFF0000:                       # larger: "unknown", as streaming programs write it
            raise cut_off(path, f"{held} bytes of sound, its header says {said}")
    elif re.search("Ogg *: (File ended|Last page lacks|Junk after)", file.extra_info):
        raise cut_off(path, "its last Ogg page is missing or cut off")


def frame_length(header: bytes) -> int:
    """Bytes of the MPEG layer III frame that begins with these four, 0 if none does: 144 or 72 times bits a second over Hz, and padding."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:
        return 0
    version, bitrate, rate = header[1] >> 3 & 3, header[2] >> 4, header[2] >> 2 & 3
    if version == 1 or bitrate in (0, 15) or rate == 3:
        return 0
    hertz = (44_100, 48_000, 32_000)[rate] >> {3: 0, 2: 1, 0: 2}[version]               # MPEG-1, 2, 2.5
    return 1000 * KBITS[1 if version == 3 else 2][bitrate - 1] * (144 if version == 3 else 72) // hertz + (header[2] >> 1 & 1)


def mp3_frames(data: bytes) -> Iterator[int]:
    """Where each whole frame begins. Tags between them are stepped over: where no frame nor the first tag has just ended, two make a beginning."""
    at = 0
    if data[:3] == b"ID3":                                 # an ID3v2 tag: 10 bytes and a length in 4 x 7 bits
        at = 10 + sum(byte << 7 * (3 - i) for i, byte in enumerate(data[6:10]))
    ended = True
    while 0 <= at < len(data):
        length = frame_length(data[at:at + 4])
        if ended and length or length and frame_length(data[at + length:at + length + 4]):
            if at + length <= len(data):
                yield at
            at, ended = at + length, True
        else:
            at, ended = data.find(b"\xff", at + 1), False


def mp3_with_length(path) -> bytes:
    """The file, with a header that tells how many frames follow where it has none or one that tells of less. AudioError for more."""
    data = Path(path).read_bytes()
    frames = list(mp3_frames(data))
    if not frames:
        return data
    first = frames[0]
    tag = max(data.find(name, first, first + 64) for name in (b"Xing", b"Info"))
    if tag > 0:
        flags, *numbers = struct.unpack(">3I", data[tag + 4:tag + 16].ljust(12, b"\0"))
        count = numbers.pop(0) if flags & 1 else 0
        size = numbers.pop(0) if flags & 2 else 0
        if len(frames) < count or len(data) - first < size:
            raise cut_off(path, f"{len(frames)} mp3 frames in {len(data) - first} bytes, its header says {count} in {size or '?'}")
        if len(frames) - 1 <= count:                       # one of them is the header's own, which some count
            return data
    version, rate, mode = data[first + 1] | 1, data[first + 2] & 0x0C, data[first + 3]                          # | 1: without a checksum
    header = bytes([0xFF, version, 0x90 | rate, mode])     # a bitrate that gives it room
    side = {(True, False): 32, (False, True): 9}.get((version & 0x18 == 0x18, mode >> 6 == 3), 17)              # bytes of side information
    info = header + bytes(side) + b"Xing" + bytes([0, 0, 0, 1]) + len(frames).to_bytes(4, "big")
    return info.ljust(frame_length(header), b"\0") + data[first:]

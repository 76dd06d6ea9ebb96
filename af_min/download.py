"""Published archives -> files on disk. Nothing half-written ever stands under its own name.

A file is received as `name.part`, continued from there after an interruption (of the line or of the program), compared with its
checksum and only then renamed. An archive (7z, tar, tar.gz, zip, zip in parts) is unpacked into a folder that is renamed when it
is whole. Members that would leave that folder, links, devices and archive bombs are refused before anything of them is written.
"""
from __future__ import annotations

import bisect
import contextlib
import errno
import hashlib
import http.client
import io
import itertools
import lzma
import os
import re
import shutil
import stat
import struct
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from .cli import UserError

TRIES, PAUSE = 5, 2.0       # attempts that bring not one byte before giving up; seconds before the second, doubled each time
TIMEOUT = 60.0              # s without a byte
RESERVE = 1 << 28           # bytes of a disk that are left alone
BOMB_FLOOR, BOMB_RATIO = 1 << 29, 100      # bytes that any archive may hold, and beyond that how many times its own size
PART = re.compile(r"\.z\d\d+")            # of a zip in parts, the last of which ends in .zip
ARCHIVES = (".zip", ".7z", ".tar", ".tar.gz", ".tgz")
DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError, RuntimeError,
           ValueError)
ENTRY = "<4s6H3I5H2I"       # of a zip's central directory, without name, extra fields and comment
ALL32, ALL16 = 0xFFFFFFFF, 0xFFFF          # zip: "the value stands in the 64-bit field"


@dataclass(frozen=True)
class File:
    """One published file. `checksum`: its md5 or sha256 in hexadecimal, "" where none is published. `saved_as`: the name that the
    server gives it where the address has another one."""
    url: str
    checksum: str = ""
    saved_as: str = ""

    @property
    def name(self) -> str:
        return self.saved_as or urllib.parse.unquote(self.url.rsplit("/", 1)[1])

    @property
    def packed(self) -> bool:
        return is_archive(self.name) or bool(PART.fullmatch(Path(self.name).suffix))


class WrongChecksum(UserError):
    """A file that is not the published one."""


def is_archive(name: str) -> bool:
    return name.lower().endswith(ARCHIVES)


def verify(path: Path, checksum: str) -> None:
    if checksum:
        with open(path, "rb") as file:
            got = hashlib.file_digest(file, "md5" if len(checksum) == 32 else "sha256").hexdigest()
        if got != checksum:
            raise WrongChecksum(f"{path}: checksum {got}, published as {checksum}: damaged, or published anew since; remove it "
                                "and run again, and if that does not help get the file by other means (--source, --mirror)")


def need_space(folder: Path, count: float, what: str) -> None:
    """UserError unless `count` bytes fit beside RESERVE."""
    free = shutil.disk_usage(folder).free
    if count + RESERVE > free:
        raise UserError(f"{folder}: {what} needs {count / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; make room, or use --out")


def fetch(file: File, folder: Path, mirror: str = "", quiet: bool = False) -> Path:
    """`file` in `folder`, downloaded if it is not there yet. A mirror has the same file names below another address.

    What fails on the way is tried again and continued; an attempt that brought something does not count. Where no checksum is
    published, that a continued file did not change in between shows when it is unpacked. UserError: dead address, no connection,
    wrong checksum, full disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, part = folder / file.name, folder / (file.name + ".part")
    url = f"{mirror.rstrip('/')}/{urllib.parse.quote(file.name)}" if mirror else file.url
    failures = 0
    while not path.exists():
        before = _size(part)
        try:
            _receive(url, part, quiet)
            verify(part, file.checksum)
            os.replace(part, path)
        except WrongChecksum:
            part.unlink()
            raise
        except UserError:
            raise
        except (OSError, ValueError, http.client.HTTPException) as error:
            code = getattr(error, "code", 0)                           # HTTP status
            if getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
                raise UserError(f"{part}: cannot be written ({error.strerror}); what is there will be continued") from None
            failures = 0 if _size(part) > before else failures + 1
            if failures == TRIES or isinstance(error, ValueError) or 400 <= code < 500 and code not in (408, 416, 429):
                raise UserError(f"{url}: not to be had ({error}). Has the address moved? Get {file.name} from the data set's page "
                                "and give its folder as --source, or try a --mirror. What was received is kept") from None
            time.sleep(PAUSE * 2 ** max(0, failures - 1))
    return path


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _receive(url: str, part: Path, quiet: bool) -> None:
    """One request: the rest of the file, or all of it where the server cannot continue. OSError if less than promised came."""
    have = _size(part)
    request = urllib.request.Request(url, headers={"User-Agent": "af-min"} | ({"Range": f"bytes={have}-"} if have else {}))
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range", "").endswith(f"/{have}"):
            return                                                     # nothing is left to send
        if error.code == 416:
            part.unlink()
        raise
    with answer:
        if answer.status != 206 or not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            if answer.status == 206:
                raise ConnectionError("the server continues at another place")
            have = 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        need_space(part.parent, int(length or 0), f"{part.name.removesuffix('.part')} from {url}")
        with open(part, "ab" if have else "wb") as out, tqdm(desc=part.stem, total=total, initial=have, unit="B", unit_scale=True,
                                                             leave=False, disable=quiet, mininterval=0.5) as bar:
            while block := answer.read1(1 << 18):                      # what is there, not only when all of it is
                out.write(block)
                bar.update(len(block))
    if total is not None and _size(part) != total:
        raise ConnectionError(f"{_size(part)} of {total} bytes came")


def unpack(archive: Path, folder: Path) -> Path:
    """All of `archive` in a new folder inside `folder`, which appears when it is whole. Of a zip in parts, the last is meant."""
    home = folder / re.sub(r"(\.tar)?\.\w+$", "", archive.name)
    part = home.with_name(home.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        (_unpack_7z if archive.name.lower().endswith(".7z") else _unpack_members)(archive, part)
        os.replace(part, home)
    except UserError:
        raise
    except DAMAGED as error:
        raise UserError(f"{archive}: cannot be unpacked ({error}); if it is damaged, remove it and run again") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return home


@dataclass
class _Guard:
    """Says where a member goes, or why it goes nowhere."""
    archive: Path
    folder: Path
    size: int
    held: int = 0

    def target(self, name: str, size: int, plain: bool) -> Path:
        target = (self.folder / name.replace("\\", "/")).resolve()
        if not target.is_relative_to(self.folder.resolve()):
            raise UserError(f"{self.archive}: refused: its member {name!r} would be written outside of the folder")
        if not plain:
            raise UserError(f"{self.archive}: refused: its member {name!r} is a link or a device, not a file")
        self.held += size
        if self.held > max(BOMB_FLOOR, BOMB_RATIO * self.size):
            raise UserError(f"{self.archive}: refused: {self.size} bytes would unpack to {self.held} or more: an archive bomb?")
        need_space(self.folder, size, f"unpacking {self.archive.name}")
        return target


def _unpack_members(archive: Path, folder: Path) -> None:
    with contextlib.ExitStack() as stack:
        if archive.name.lower().endswith(".zip"):
            parts = sorted((path for path in archive.parent.iterdir() if path.stem == archive.stem and PART.fullmatch(path.suffix)),
                           key=lambda path: int(path.suffix[2:]))
            size = sum(map(_size, [*parts, archive]))
            file = _join([stack.enter_context(open(path, "rb")) for path in [*parts, archive]])
            members = list(_zip_members(stack.enter_context(zipfile.ZipFile(file))))
            guard = _Guard(archive, folder, size)
            for member in members:                                     # a zip tells all sizes beforehand
                guard.target(*member[:3])
            need_space(folder, guard.held, f"unpacking {archive.name}")
        else:
            size, members = _size(archive), _tar_members(stack.enter_context(tarfile.open(archive)))
        guard = _Guard(archive, folder, size)
        for *member, read in tqdm(members, f"unpacking {archive.name}", unit="file", leave=False, mininterval=0.5):
            target = guard.target(*member)
            if read:
                target.parent.mkdir(parents=True, exist_ok=True)
                with read() as stream, open(target, "wb") as out:
                    shutil.copyfileobj(stream, out, 1 << 20)


Members = Iterator[tuple[str, int, bool, Callable[[], BinaryIO] | None]]    # name, bytes, neither link nor device, None of a folder


def _tar_members(tar: tarfile.TarFile) -> Members:
    for member in tar:
        read = partial(tar.extractfile, member) if member.isfile() else None
        yield member.name, member.size, member.isfile() or member.isdir(), read


def _zip_members(archive: zipfile.ZipFile) -> Members:
    for info in archive.infolist():
        name, kind = info.filename, stat.S_IFMT(info.external_attr >> 16)
        if not info.flag_bits & 0x800:                                 # "names are UTF-8": programs forget to say so
            with contextlib.suppress(UnicodeError):
                name = name.encode("cp437").decode("utf-8")
        yield name, info.file_size, kind in (0, stat.S_IFREG, stat.S_IFDIR), None if info.is_dir() else partial(archive.open, info)


def _unpack_7z(archive: Path, folder: Path) -> None:
    try:
        import py7zr
    except ImportError:
        raise UserError(f"{archive}: a 7z archive needs the package py7zr (pip install py7zr), or unpack it yourself "
                        "and give the folder as --source") from None
    try:
        with py7zr.SevenZipFile(archive) as members:
            guard = _Guard(archive, folder, _size(archive))
            for info in members.list():
                guard.target(info.filename, info.uncompressed or 0, info.is_directory or info.is_file)
            need_space(folder, guard.held, f"unpacking {archive.name}")
            members.extractall(folder)
    except py7zr.exceptions.ArchiveError as error:
        raise ValueError(error) from None


class _Joined(io.RawIOBase):
    """Several (file, size) read as one."""

    def __init__(self, pieces: list[tuple[BinaryIO, int]]):
        self.pieces, self.at = pieces, 0
        self.ends = list(itertools.accumulate(size for _, size in pieces))

    def readable(self) -> bool:
        return True

    seekable = readable

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.ends[-1])[whence]
        return self.at

    def readinto(self, buffer) -> int:
        i = bisect.bisect_right(self.ends, self.at)
        if i == len(self.ends):
            return 0
        file, size = self.pieces[i]
        file.seek(self.at - (self.ends[i] - size))
        count = file.readinto(memoryview(buffer)[:self.ends[i] - self.at])
        self.at += count
        return count


def _join(parts: list[BinaryIO]) -> BinaryIO:
    """A zip in parts (x.z01, x.z02, ..., x.zip) as one that zipfile reads; a whole zip as it is.

    The members lie in the parts one after the other, but the central directory at the end counts each one's place from the
    beginning of its part. So: all bytes before the directory, then the same directory with places in the whole, written into
    the 64-bit fields (names and layouts of the records: APPNOTE.TXT of the zip format, 4.3.12 to 4.3.16 and 4.5.3).
    """
    sizes = [part.seek(0, 2) for part in parts]
    starts = [0, *itertools.accumulate(sizes)]
    whole = io.BufferedReader(_Joined(list(zip(parts, sizes))))
    whole.seek(max(0, starts[-1] - 66_000))
    tail = whole.read()
    end = tail.rfind(b"PK\5\6")
    disk, first, _, count, length, offset = struct.unpack_from("<4H2I", tail, end + 4) if end >= 0 else (0,) * 6
    if end >= 20 and tail[end - 20:end - 16] == b"PK\6\7":
        at_disk, at, disks = struct.unpack_from("<IQI", tail, end - 16)
        disk = disks - 1
        if disks == len(parts) > at_disk:
            whole.seek(starts[at_disk] + at)
            disk, first, _, count, length, offset = struct.unpack_from("<2I4Q", whole.read(56), 16)
    if disk + 1 != len(parts) and end >= 0:
        raise ValueError(f"it consists of {disk + 1} parts (.z01, .z02, ..., .zip) and {len(parts)} are there")
    if disk <= 0:
        return parts[-1]
    begin = starts[first] + offset
    whole.seek(begin)
    old, new, at = whole.read(length), bytearray(), 0
    for _ in range(count):
        head = list(struct.unpack_from(ENTRY, old, at))
        name_end = at + 46 + head[10]
        extra_end = name_end + head[11]
        fields, other, wide = old[name_end:extra_end], b"", b""
        while len(fields) >= 4:
            kind, span = struct.unpack_from("<2H", fields)
            wide, other = (fields[4:4 + span], other) if kind == 1 else (wide, other + fields[:4 + span])
            fields = fields[4 + span:]
        sizes64 = 8 * ((head[8] == ALL32) + (head[9] == ALL32))        # of members above 4 GB; they stay
        place = starts[head[13]] + (struct.unpack_from("<Q", wide, sizes64)[0] if head[16] == ALL32 else head[16])
        other += struct.pack("<2H", 1, sizes64 + 8) + wide[:sizes64] + struct.pack("<Q", place)
        head[11], head[13], head[16] = len(other), 0, ALL32            # bytes of extra fields, disk, place
        new += struct.pack(ENTRY, *head) + old[at + 46:name_end] + other + old[extra_end:extra_end + head[12]]
        at = extra_end + head[12]
    record = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(new), begin)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, begin + len(new), 1)
    new += record + locator + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, ALL16, ALL16, ALL32, ALL32, 0)
    pieces = [*zip(parts[:first], sizes), (parts[first], offset), (io.BytesIO(new), len(new))]
    return io.BufferedReader(_Joined(pieces))

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
from collections.abc import Callable, Iterable, Iterator
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
           ValueError, IndexError)


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


def need_space(folder: Path, count: float, what: str, free: int | None = None) -> None:
    """UserError unless `count` bytes fit beside RESERVE, into `free` bytes if that is given."""
    if free is None:
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
        if answer.status != 206:
            have = 0
        elif not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise ConnectionError("the server continues at another place")
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


Read = Callable[[], BinaryIO] | None                        # opens a member; None of a folder
Members = Iterable[tuple[str, int, bool, Read]]             # name, bytes, is it a file or a folder, not a link or a device?


def _placed(archive: Path, folder: Path, size: int, members: Members) -> Iterator[tuple[Path, Read]]:
    """Where each member of an archive of `size` bytes goes; UserError for one that goes nowhere."""
    held, free = 0, shutil.disk_usage(folder).free
    for name, count, plain, read in members:
        target = (folder / name.replace("\\", "/")).resolve()
        held += count
        if not target.is_relative_to(folder.resolve()):
            raise UserError(f"{archive}: refused: its member {name!r} would be written outside of the folder")
        if not plain:
            raise UserError(f"{archive}: refused: its member {name!r} is a link or a device, not a file")
        if held > max(BOMB_FLOOR, BOMB_RATIO * size):
            raise UserError(f"{archive}: refused: {size} bytes would unpack to {held} or more: an archive bomb?")
        need_space(folder, held, f"unpacking {archive.name}", free)
        yield target, read


def _unpack_members(archive: Path, folder: Path) -> None:
    with contextlib.ExitStack() as stack:
        if archive.name.lower().endswith(".zip"):
            parts = sorted((path for path in archive.parent.iterdir() if path.stem == archive.stem and PART.fullmatch(path.suffix)),
                           key=lambda path: int(path.suffix[2:])) + [archive]
            members = _zip_members([stack.enter_context(open(path, "rb")) for path in parts])
            placed = list(_placed(archive, folder, sum(map(_size, parts)), members))       # a zip tells all sizes beforehand
        else:
            placed = _placed(archive, folder, _size(archive), _tar_members(stack.enter_context(tarfile.open(archive))))
        for target, read in tqdm(placed, f"unpacking {archive.name}", unit="file", leave=False, mininterval=0.5):
            if read:
                target.parent.mkdir(parents=True, exist_ok=True)
                with read() as stream, open(target, "wb") as out:
                    shutil.copyfileobj(stream, out, 1 << 20)


def _tar_members(tar: tarfile.TarFile) -> Members:
    for member in tar:
        read = partial(tar.extractfile, member) if member.isfile() else None
        yield member.name, member.size, member.isfile() or member.isdir(), read


def _zip_members(parts: list[BinaryIO]) -> Members:
    """Of a zip, or of one in parts (x.z01, x.z02, ..., x.zip), joined.

    The members lie in the parts one after the other, but the directory at the end counts each one's place from the beginning of its
    part; zipfile, from that of the part where the directory begins. The locator of a 64-bit end record counts so, too, and zipfile
    refuses one that tells of several parts (layouts: APPNOTE.TXT of the zip format, 4.3.14 to 4.3.16).
    """
    sizes = [part.seek(0, 2) for part in parts]
    starts = [0, *itertools.accumulate(sizes)]
    parts[-1].seek(max(0, sizes[-1] - 66_000))
    tail = io.BytesIO(parts[-1].read())
    records, length = tail.getbuffer(), len(tail.getvalue())
    whole = io.BufferedReader(_Joined([*zip(parts, [*sizes[:-1], sizes[-1] - length]), (tail, length)]))
    end = tail.getvalue().rfind(b"PK\5\6")
    if end < 0:
        raise zipfile.BadZipFile("no end of its directory")
    last, first = struct.unpack_from("<2H", records, end + 4)          # parts: of this record, of the directory's beginning
    if wide := bytes(records[max(0, end - 20):end]).startswith(b"PK\6\7"):
        part, place, count = struct.unpack_from("<IQI", records, end - 16)
        last = count - 1
    if last + 1 != len(parts):
        raise ValueError(f"it consists of {last + 1} parts (.z01, .z02, ..., .zip) and {len(parts)} are there")
    if wide:
        struct.pack_into("<IQI", records, end - 16, 0, starts[part] + place, 1)
        whole.seek(starts[part] + place + 20)
        first, = struct.unpack("<I", whole.read(4))
    archive = zipfile.ZipFile(whole)
    for info in archive.infolist():
        name, kind = info.filename, stat.S_IFMT(info.external_attr >> 16)
        if not info.flag_bits & 0x800:                                 # "names are UTF-8": programs forget to say so
            with contextlib.suppress(UnicodeError):
                name = name.encode("cp437").decode("utf-8")
        found = _moved(info, starts[info.volume] - starts[first]) if last else info
        yield name, info.file_size, kind in (0, stat.S_IFREG, stat.S_IFDIR), None if info.is_dir() else partial(archive.open, found)


def _moved(info: zipfile.ZipInfo, by: int) -> zipfile.ZipInfo:
    """A member at another place. A new object: in the old one zipfile has noted, as a guard, where it believes it to end."""
    moved = zipfile.ZipInfo(info.orig_filename)
    moved.header_offset = info.header_offset + by
    for field in ("flag_bits", "compress_type", "CRC", "compress_size", "file_size"):
        setattr(moved, field, getattr(info, field))
    return moved


def _unpack_7z(archive: Path, folder: Path) -> None:
    try:
        import py7zr
    except ImportError:
        raise UserError(f"{archive}: a 7z archive needs the package py7zr (pip install py7zr), or unpack it yourself "
                        "and give the folder as --source") from None
    try:
        with py7zr.SevenZipFile(archive) as members:
            list(_placed(archive, folder, _size(archive), (
                (info.filename, info.uncompressed or 0, info.is_directory or info.is_file, None) for info in members.list())))
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

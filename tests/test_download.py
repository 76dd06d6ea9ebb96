"""Downloads are continued, compared and renamed when whole; archives are unpacked whole or not at all, and never outside their folder."""
import errno
import hashlib
import io
import random
import shutil
import stat
import subprocess
import tarfile
import zipfile

import pytest

from af_min import download
from af_min.cli import UserError
from af_min.download import File, fetch, unpack
from local_server import serve, split_zip

DATA = random.Random(0).randbytes(300_000)
MD5 = hashlib.md5(DATA).hexdigest()


@pytest.fixture
def site(tmp_path, monkeypatch):
    """(address, server state, folder for downloads); the server has `a file.bin`."""
    monkeypatch.setattr(download, "PAUSE", 0.0)
    monkeypatch.setattr(download, "RESERVE", 0)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "a file.bin").write_bytes(DATA)
    with serve(tmp_path / "site") as (address, state):
        yield address + "/a%20file.bin", state, tmp_path / "got"


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("checksum", ["", MD5, hashlib.sha256(DATA).hexdigest()])
def test_a_file_arrives_once(site, checksum):
    url, state, folder = site
    for _ in range(2):
        assert fetch(File(url, checksum), folder).read_bytes() == DATA
    assert names(folder) == ["a file.bin"] and len(state.requests) == 1


def test_ten_breaks_of_the_line_are_continued(site):
    url, state, folder = site
    state.cut = [20_000 + 100 * i for i in range(10)]
    assert fetch(File(url, MD5), folder).read_bytes() == DATA
    starts = [0, *(sum(20_000 + 100 * i for i in range(n)) for n in range(1, 11))]
    assert state.requests == [("/a%20file.bin", f"bytes={start}-" if start else None) for start in starts]


def test_ten_breaks_of_the_program_leave_nothing_that_looks_whole(site, monkeypatch):
    """TRIES = 1 ends the program at every break that brings nothing: between two of them lies the broken file of the first."""
    url, state, folder = site
    monkeypatch.setattr(download, "TRIES", 1)
    for n in range(10):
        state.cut = [20_000, 0]
        with pytest.raises(UserError, match="not to be had"):
            fetch(File(url, MD5), folder)
        assert names(folder) == ["a file.bin.part"] and (folder / "a file.bin.part").read_bytes() == DATA[:20_000 * (n + 1)]
    assert fetch(File(url, MD5), folder).read_bytes() == DATA and names(folder) == ["a file.bin"]


def test_a_server_that_cannot_continue_sends_everything_again(site):
    url, state, folder = site
    state.ranges, state.cut = False, [100_000]
    assert fetch(File(url, MD5), folder).read_bytes() == DATA


def test_a_part_that_is_whole_and_one_that_is_too_long(site):
    url, state, folder = site
    folder.mkdir()
    (folder / "a file.bin.part").write_bytes(DATA)
    assert fetch(File(url, MD5), folder).read_bytes() == DATA
    (folder / "a file.bin").rename(folder / "a file.bin.part")
    with open(folder / "a file.bin.part", "ab") as part:
        part.write(b"more")
    assert fetch(File(url, MD5), folder).read_bytes() == DATA


def test_a_changed_file_is_refused_and_fetched_anew_the_next_time(site):
    url, state, folder = site
    folder.mkdir()
    (folder / "a file.bin.part").write_bytes(b"x" * 1000)
    with pytest.raises(UserError, match="checksum"):
        fetch(File(url, MD5), folder)
    assert names(folder) == []
    assert fetch(File(url, MD5), folder).read_bytes() == DATA


def test_errors_of_the_server(site):
    url, state, folder = site
    state.status = [503, 500, 429]
    assert fetch(File(url, MD5), folder).read_bytes() == DATA
    with pytest.raises(UserError, match="gone.zip: not to be had .*404.*--source.*--mirror"):
        fetch(File(url.replace("a%20file.bin", "gone.zip")), folder)
    assert len(state.requests) == 5, "a dead address is asked once"
    with pytest.raises(UserError, match="not to be had"):
        fetch(File("http://127.0.0.1:9/nobody.zip"), folder)


def test_pauses_double_until_something_comes_and_a_silent_server_is_left(site, monkeypatch):
    url, state, folder = site
    pauses = []
    monkeypatch.setattr(download, "PAUSE", 2.0)
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    monkeypatch.setattr(download.time, "sleep", pauses.append)
    state.status, state.stall = [503, 503, 503], 1.0
    assert fetch(File(url, MD5), folder).read_bytes() == DATA
    assert pauses == [2, 4, 8, 2] and [request[1] for request in state.requests] == [None] * 4 + ["bytes=100-"]
    state.status, pauses[:] = [503] * 9, []
    with pytest.raises(UserError, match="not to be had"):
        fetch(File(url), folder / "again")
    assert pauses == [2, 4, 8, 16]


def test_progress_is_shown(site, capsys):
    url, _, folder = site
    fetch(File(url, MD5), folder)
    assert "a file.bin" in (shown := capsys.readouterr().err) and "300k" in shown


def test_a_mirror(site):
    url, state, folder = site
    assert fetch(File("https://example.invalid/x/a%20file.bin", MD5), folder, url.rsplit("/", 1)[0] + "/").read_bytes() == DATA


def test_a_full_disk_is_told_before_the_first_byte(site, monkeypatch):
    url, state, folder = site
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 299_999}))
    with pytest.raises(UserError, match="needs 0.00 GB"):
        fetch(File(url, MD5), folder)
    assert names(folder) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_is_no_fault_of_the_address(site, monkeypatch, number):
    def broken(path, mode="r"):
        raise OSError(number, "no room")
    url, state, folder = site
    monkeypatch.setattr(download, "open", broken, raising=False)
    with pytest.raises(UserError, match="part: cannot be written .no room"):
        fetch(File(url, MD5), folder)
    assert len(state.requests) == 1


# ---------------------------------------------------------------------- archives

CONTENT = {"top.csv": b"a,b\n", "deep/\u00fcn\u00ef.wav": DATA[:70_000], "deep/er/x.wav": DATA[:50_000], "empty.wav": b""}


def make_zip(path, content):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def make_tar(path, content):
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def make_7z(path, content):
    py7zr = pytest.importorskip("py7zr")
    with py7zr.SevenZipFile(path, "w", filters=[{"id": py7zr.FILTER_LZMA2, "preset": 0}]) as archive:
        for name, data in content.items():
            archive.writestr(data, name)


def unpacked(home):
    return {path.relative_to(home).as_posix(): path.read_bytes() for path in home.rglob("*") if path.is_file()}


MAKE = {"x.zip": make_zip, "x.tar.gz": make_tar, "x.tar": make_tar, "x.tgz": make_tar, "x.7z": make_7z}


@pytest.mark.parametrize("name", MAKE)
def test_archives_are_unpacked_whole_or_not_at_all(tmp_path, name):
    archive = tmp_path / name
    MAKE[name](archive, CONTENT)
    assert unpacked(unpack(archive, tmp_path / "to")) == CONTENT and names(tmp_path / "to") == ["x"]
    shutil.rmtree(tmp_path / "to")
    whole = archive.read_bytes()
    for damaged in (whole[:len(whole) // 2], b"", b"no archive" * 100):
        archive.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{name}: cannot be unpacked"):
            unpack(archive, tmp_path / "to")
        assert names(tmp_path / "to") == []


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("part_bytes", [10_007, 66_000, 10 ** 6])
def test_zips_in_parts(tmp_path, wide, part_bytes):
    make_zip(tmp_path / "x.zip", CONTENT)
    parts = split_zip(tmp_path / "x.zip", part_bytes, wide)
    assert len(parts) == {10_007: 13, 66_000: 2, 10 ** 6: 1}[part_bytes]
    assert unpacked(unpack(tmp_path / "x.zip", tmp_path / "to")) == CONTENT
    if len(parts) > 1:
        parts[0].unlink()
        with pytest.raises(UserError, match=f"consists of {len(parts)} parts .* and {len(parts) - 1} are there"):
            unpack(tmp_path / "x.zip", tmp_path / "again")


def test_a_zip_whose_directory_tells_of_a_part_that_is_none(tmp_path):
    make_zip(tmp_path / "x.zip", CONTENT)
    last = split_zip(tmp_path / "x.zip", 66_000)[-1]
    data = bytearray(last.read_bytes())
    data[data.index(b"PK\1\2") + 34] = 9
    last.write_bytes(data)
    with pytest.raises(UserError, match="x.zip: cannot be unpacked"):
        unpack(last, tmp_path / "to")


@pytest.mark.skipif(not shutil.which("zip"), reason="the program zip is not there")
def test_zips_in_parts_as_info_zip_writes_them(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(12):
        (tmp_path / "in" / f"{i}.wav").write_bytes(random.Random(i).randbytes(20_000))
    for flags in ([], ["-fz"]):
        subprocess.run(["zip", "-qr", "-s", "64k", *flags, f"../x{len(flags)}.zip", "."], cwd=tmp_path / "in", check=True)
        assert (tmp_path / f"x{len(flags)}.z03").exists()
        assert unpacked(unpack(tmp_path / f"x{len(flags)}.zip", tmp_path / "to")) == unpacked(tmp_path / "in")


def test_names_of_a_zip_that_are_utf8_without_saying_so(tmp_path):
    make_zip(tmp_path / "x.zip", {"\u00fc.wav": b"1"})
    data = bytearray((tmp_path / "x.zip").read_bytes())
    for at in (data.index(b"PK\3\4") + 6, data.index(b"PK\1\2") + 8):
        assert data[at + 1] == 8
        data[at + 1] = 0                                               # bit 11 of the flags
    (tmp_path / "x.zip").write_bytes(data)
    assert list(unpacked(unpack(tmp_path / "x.zip", tmp_path / "to"))) == ["\u00fc.wav"]


def linked_zip(path):
    info = zipfile.ZipInfo("link.wav")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(info, "/etc/passwd")


def linked_tar(kind):
    def make(path):
        with tarfile.open(path, "w:gz") as archive:
            info = tarfile.TarInfo("link.wav")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    return make


def linked_7z(path):
    py7zr = pytest.importorskip("py7zr")
    (path.parent / "in").mkdir()
    (path.parent / "in" / "a.wav").write_bytes(b"x")
    (path.parent / "in" / "link.wav").symlink_to("a.wav")
    with py7zr.SevenZipFile(path, "w", filters=[{"id": py7zr.FILTER_LZMA2, "preset": 0}]) as archive:
        archive.writeall(path.parent / "in", "in")


@pytest.mark.parametrize("name, make, reason", [
    *((name, lambda path, bad=bad, make=make: make(path, {"good.wav": b"x", bad: b"y"}), "outside")
      for name, make in (("x.zip", make_zip), ("x.tar.gz", make_tar)) for bad in ("../evil.wav", "/evil.wav", "a/../../evil.wav", "..\\evil.wav")),
    ("x.zip", linked_zip, "a link"), ("x.7z", linked_7z, "a link"),
    *(("x.tar.gz", linked_tar(kind), "a link or a device") for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)),
    *((name, lambda path, make=make: make(path, {f"{i}.wav": b"\0" * 10 ** 6 for i in range(4)}), "bomb")
      for name, make in (("x.zip", make_zip), ("x.tar.gz", make_tar), ("x.7z", make_7z)))])
def test_what_is_refused(tmp_path, monkeypatch, name, make, reason):
    monkeypatch.setattr(download, "BOMB_FLOOR", 2 * 10 ** 6)
    (tmp_path / "home").mkdir()
    archive = tmp_path / "home" / name
    make(archive)
    with pytest.raises(UserError, match=f"{name}: refused: .*{reason}"):
        unpack(archive, tmp_path / "home" / "to")
    assert names(tmp_path / "home" / "to") == [] and not list(tmp_path.rglob("evil.wav"))


def test_a_zip_that_lies_about_its_size_writes_no_more_than_it_says(tmp_path):
    make_zip(tmp_path / "x.zip", {"a.wav": b"\0" * 10 ** 6})
    data = bytearray((tmp_path / "x.zip").read_bytes())
    at = data.index(b"PK\1\2") + 24
    data[at:at + 4] = (100).to_bytes(4, "little")
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack(tmp_path / "x.zip", tmp_path / "to")

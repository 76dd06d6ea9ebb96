"""A web server for tests: serves a folder on 127.0.0.1, continues files (Range), and misbehaves on request."""
import contextlib
import functools
import http.server
import re
import threading
from pathlib import Path


class Handler(http.server.BaseHTTPRequestHandler):
    """`cut`: after how many bytes the line breaks, request by request; `status`: answer with that instead; `ranges`: can continue;
    `stall`: fall silent for so many seconds after 100 bytes, once."""

    def __init__(self, *args, folder: Path, state: "State", **kwargs):
        self.folder, self.state = folder, state
        super().__init__(*args, **kwargs)

    def do_GET(self):
        state, path = self.state, self.folder / http.server.urllib.parse.unquote(self.path.lstrip("/"))
        state.requests.append((self.path, self.headers.get("Range")))
        if state.status:
            return self.send_error(state.status.pop(0))
        if not path.is_file():
            return self.send_error(404)
        data, first = path.read_bytes(), 0
        if state.ranges and (wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))):
            first = int(wanted[1])
            if first >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        if state.stall:
            self.wfile.write(data[first:first + 100])
            threading.Event().wait(state.__dict__.pop("stall"))
            return
        self.wfile.write(data[first:][:state.cut.pop(0)] if state.cut else data[first:])

    def log_message(self, *args):
        pass


class State:
    stall = 0.0

    def __init__(self):
        self.cut, self.status, self.ranges, self.requests = [], [], True, []


@contextlib.contextmanager
def serve(folder: Path):
    """(address, State) while the block runs."""
    state = State()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, folder=Path(folder), state=state))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def split_zip(whole: Path, part_bytes: int, wide: bool = False) -> list[Path]:
    """Cut a zip into .z01, .z02, ..., .zip as the zip format's specification has it (4.3.12: disk numbers and places in their disk).

    `wide`: with the 64-bit end record that sets of more than 65 535 members have. Members must be below 4 GB."""
    import struct
    data = b"PK\7\x08" + whole.read_bytes()                            # the mark of a spanned zip shifts every member by 4
    end = data.rindex(b"PK\5\6")
    count, length, offset = struct.unpack_from("<H2I", data, end + 10)
    begin = offset + 4
    last = begin // part_bytes                                         # the directory stays in one piece, in the last part
    directory, at = bytearray(data[begin:begin + length]), 0
    for _ in range(count):
        place = struct.unpack_from("<I", directory, at + 42)[0] + 4
        struct.pack_into("<H", directory, at + 34, place // part_bytes)
        struct.pack_into("<I", directory, at + 42, place % part_bytes)
        at += 46 + sum(struct.unpack_from("<3H", directory, at + 28))
    tail, inner = bytes(directory), begin % part_bytes
    if wide:
        tail += struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, last, last, count, count, length, inner)
        tail += struct.pack("<4sIQI", b"PK\6\7", last, inner + length, last + 1)
        tail += struct.pack("<4s4H2IH", b"PK\5\6", *(0xFFFF,) * 4, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    else:
        tail += struct.pack("<4s4H2IH", b"PK\5\6", last, last, count, count, length, inner, 0)
    pieces = [data[i * part_bytes:min((i + 1) * part_bytes, begin)] for i in range(last + 1)]
    pieces[-1] += tail
    whole.unlink()
    paths = [whole.with_suffix(f".z{i + 1:02}") for i in range(last)] + [whole]
    for path, piece in zip(paths, pieces):
        path.write_bytes(piece)
    return paths

"""Command lines from dataclasses: each field is a flag with its type, default and help; a mistake is one line, exit code 2."""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import errno
import gc
import math
import os
import sys
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl                                   # Linux and macOS
    import resource
except ImportError:
    fcntl = resource = None


class UserError(ValueError):
    """A mistake in what a user gave (path, file, flag, row). Its text names it and says how to mend it."""


def flag(default, help: str, **more):
    """A dataclass field that is also a command-line flag. `more`: argparse's keywords, such as choices=("a", "b"), nargs=2, action="append"."""
    given = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return dataclasses.field(**given, metadata={"help": help, **more})


class Parser(argparse.ArgumentParser):
    """Answers a wrong flag in one line, without the whole usage before it."""

    def error(self, message: str):
        dashed = next((f"write the file {word} as ./{word}; " for word in sys.argv[1:] if word.startswith("-") and os.path.exists(word)), "")
        self.exit(2, f"error: {textwrap.shorten(message, 1000)}; {dashed}{self.prog} -h lists the flags\n")


def parse(cls, description: str | None = None, saved: dict | None = None):
    """An instance of the dataclass `cls` from the command line; `--some-field value`, bools as `--some-field / --no-some-field`.

    saved: values of an earlier command line, which hold for the flags that this one does not name.
    """
    module = getattr(sys.modules["__main__"], "__spec__", None)              # of `python -m`
    parser = Parser(prog=f"python -m {module.name}" if module else None, description=description or cls.__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    types, defaults = typing.get_type_hints(cls), vars(cls()) | (saved or {})
    for f in dataclasses.fields(cls):
        keywords, default = dict(f.metadata), defaults[f.name]
        kind = (typing.get_args(types[f.name]) or (types[f.name],))[0]                   # of list[int]: int
        if kind is bool:
            keywords["action"] = argparse.BooleanOptionalAction
        else:
            keywords["type"] = kind if kind in (str, int, float) else str
        if default not in ("", []):
            keywords["help"] += f" (default: {default})"
        parser.add_argument("--" + f.name.replace("_", "-"), default=default, **keywords)
    return cls(**vars(parser.parse_args()))


def at_least(args, **limits: float) -> None:
    """UserError for a number on the command line that is below its limit, infinite or not a number."""
    for name, limit in limits.items():
        if not limit <= getattr(args, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {limit} or more")


@contextlib.contextmanager
def alone(folder: Path, option: str) -> Iterator[None]:
    """UserError where another process writes to `folder`: two would mix their files. `option` names another folder."""
    lock = folder.with_name(f".{folder.name}.lock")
    made = not lock.parent.exists()
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "w")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); give another {option}") from None
    with file:
        try:
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)       # released by a kill too; a fork does not hold it
            if not os.path.samestat(os.fstat(file.fileno()), lock.stat()):     # the one before removed it in between: others lock a new one
                raise BlockingIOError
        except (BlockingIOError, PermissionError, FileNotFoundError):
            raise UserError(f"{folder}: another process is writing there; wait until it has ended, or give another {option}") from None
        except OSError:                                                # a file system without locks
            pass
        try:
            yield
        finally:
            with contextlib.suppress(OSError):                         # Windows keeps what is open
                lock.unlink()
                if made:
                    lock.parent.rmdir()                                # which fails where something is in it


def glibc(function: str, *numbers: int) -> None:
    """Call a function of the C library, where it has it."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), function):
        getattr(library, function)(*numbers)


def keep_freed_memory() -> None:
    """Let glibc keep what was freed, 128 MB at the end of its heap and blocks of up to 32 MB. As a rule it gives large blocks back at once,
    and the next tensor of that size pays for its pages anew, zeroed one by one: encoding windows spends a good part of its time so.
    `return_freed_memory` gives back what is still held when another piece of work begins."""
    glibc("mallopt", -3, 32 << 20)       # M_MMAP_THRESHOLD, the most that every version takes
    glibc("mallopt", -1, 128 << 20)      # M_TRIM_THRESHOLD


def return_freed_memory() -> None:
    gc.collect()
    glibc("malloc_trim", 0)


def run(main) -> None:
    """Call `main()`; a UserError, a full disk, a missing permission and the end of another process become one line and exit code 2,
    Ctrl-C exit code 130, a closed pipe silence."""
    keep_freed_memory()
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")         # in one piece: torchrun's processes share it, unbuffered, where print writes the end apart
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        sys.stderr.write(f"error: {error.filename or 'writing'}: {error.strerror}\n")
        sys.exit(2)
    except RuntimeError as error:
        if "closed by peer" not in str(error) and "reset by peer" not in str(error):                       # gloo's words
            raise
        sys.stderr.write("error: another process of this run has ended; what it said tells why\n")
        sys.exit(2)

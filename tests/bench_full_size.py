"""The whole way of a user with the published files, at full size: 2.3 B random weights in the released format, converted, loaded, asked.

    python -m tests.bench_full_size [FOLDER]          10 GB of disk and of memory; FOLDER (default: a temporary one) is emptied again

Runs the three commands of a user, each in a process of its own; fails where converting or asking takes more memory than 1.25 times the
written weights and 1 GB. On two CPU cores (AMD EPYC with bfloat16 instructions), torch 2.13:

    write                                                8.78 GiB, float32
    convert    10 s   peak memory 4.81 GiB               4.39 GiB, bfloat16; 691 + 182 tensors, 2354 M numbers
    sample.py   9 s   peak memory 4.88 GiB               first word 1.3 s after loading, 8 tokens at 5.6/s
"""
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

ROOT = Path(__file__).parent.parent
COMMANDS = ("tests/released_format.py {0}",
            "-m af_min.pretrained --audio-flamingo {0}/foundation.pt --clap {0}/clap.pth --lm {0}/opt --out {0}/run",
            "sample.py --run {0}/run --audio {0}/noise.wav --prompt 'Describe the sound in a sentence.' --max-new 8")


def run(command: str, folder: Path) -> None:
    """One command in a process of its own; its output, seconds and peak memory."""
    print(f"$ python {command.format(folder.name)}", flush=True)
    began, done = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, *shlex.split(command.format(folder))], cwd=ROOT)
    while not done:
        done, status, usage = os.wait4(process.pid, os.WNOHANG)
        if (folder / "run" / "config.json").exists():
            (folder / "foundation.pt").unlink(missing_ok=True)             # has been read; with what follows it would be 14 GB
        time.sleep(0.05)
    size, weights = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()), folder / "run" / "model.safetensors"
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"  {time.perf_counter() - began:.0f} s, peak memory {peak / 2 ** 30:.2f} GiB, {size / 2 ** 30:.2f} GiB on disk\n", flush=True)
    if status:
        sys.exit(f"the command failed ({os.waitstatus_to_exitcode(status)})")
    if weights.exists() and peak > (most := 1.25 * weights.stat().st_size + 1e9):
        sys.exit(f"peak memory: got {peak / 1e9:.2f} GB, expected at most {most / 1e9:.2f} GB")


def main(parent: str | None = None) -> None:
    with tempfile.TemporaryDirectory(prefix="full-", dir=parent) as folder:
        rng = np.random.default_rng(0)
        soundfile.write(Path(folder) / "noise.wav", 0.1 * rng.standard_normal(44_100 * 10), 44_100)     # 10 s: 3 windows
        for command in COMMANDS:
            run(command, Path(folder))


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(*sys.argv[1:2])

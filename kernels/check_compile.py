"""Compile every shipped kernel for real GPUs, without having one, and fail on what would make it slow.

    python -m kernels.check_compile                 all kernels, sm_80 and sm_90, bf16, fp16 and fp32: 193 compilations,
                                                    152 s on one core, much less when repeated (Triton caches)
    python -m kernels.check_compile --quick         head width 64 and bf16 alone

The launch code itself is run, on CPU tensors of the model's shapes, with a recorder in place of each kernel, so what is
compiled is what a GPU would be asked for: the same tiles, warps and stages, and arguments specialised by Triton's JIT (an integer 1
becomes a constant; multiples of 16 and aligned pointers are marked so; except those that a kernel lists in `do_not_specialize`). Left out,
as they spill: dk and dv of one token (float32, head width 128), projections of odd width. From the PTX, ptxas reports:

    registers, spills     a spill (registers kept in memory) fails
    shared memory         a program must fit 99 KiB for sm_80 (what its smaller relatives sm_86, sm_89 have), 227 KiB for sm_90
    wgmma                 16-bit tiles of 64 rows and more must use Hopper's warp-group product on sm_90; "serialized": each waits for
                          the one before, which costs time and is no fault (triton 3.6, residual_forward on a float32 x)

Only a GPU can exercise what follows: loading the binary and running it.
"""
from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from af_min import cli

SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024}      # bytes of shared memory a program may take
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32"}


@dataclass(frozen=True)
class Settings:
    """Ahead-of-time compilation of the kernels; exit code 1 if one of them spills or does not fit."""
    quick: bool = cli.flag(False, "head width 64 and bf16 alone")


@dataclass(frozen=True)
class Launch:
    """One compilation: a kernel, its arguments as the launch code gave them, and its constants."""
    kernel: object
    args: tuple
    constants: dict
    options: dict
    label: str


class Recorder:
    """Stands in for a Triton kernel: `recorder[grid](...)` notes the launch and computes nothing."""

    def __init__(self, kernel, launches: list, label: str):
        self.kernel, self.launches, self.label = kernel, launches, label

    def __getitem__(self, grid):
        return self.note

    def note(self, *args, **named):
        options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
        self.launches.append(Launch(self.kernel, args, named, options, self.label))


def recorded(module, label: str, run) -> list[Launch]:
    """The launches that `run()` makes through the kernels of `module`."""
    kernels = {name: value for name, value in vars(module).items()
               if name.startswith(("xattn_", "residual_")) and hasattr(value, "arg_names")}
    launches = []
    for name, kernel in kernels.items():
        setattr(module, name, Recorder(kernel, launches, label))
    try:
        run()
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)
    return launches


def every_launch(quick: bool) -> list[Launch]:
    """AF1's shapes, odd ones, long audio and one-token decoding, at every head width and precision."""
    from . import masked_xattn, residual
    found = []
    for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float16, torch.float32):
        for K in (64,) if quick else (32, 64, 128):
            def attention(T, L):
                q, k, v = (torch.empty(1, n, 8, K, dtype=dtype).transpose(1, 2) for n in (T, L, L))
                kv_len = torch.zeros(1, T, dtype=torch.int32)
                o, lse = masked_xattn.forward_op(q, k, v, kv_len)
                if 1 < T and L <= 128:
                    masked_xattn.backward_op(o, q, k, v, kv_len, o, lse)
            for T, L in ((512, 128), (509, 113), (512, masked_xattn.LONG), (1, 128), (1, 4 * masked_xattn.SPLIT)):
                found += recorded(masked_xattn, f"K {K} T {T} L {L}", lambda: attention(T, L))
        for rows in (512, 1):
            for outer in dict.fromkeys((dtype, torch.float32)):         # under autocast the residual stream is float32
                x, gate = torch.empty(rows, 2048, dtype=outer), torch.empty(1, dtype=outer)
                a, w = torch.empty(rows, 512, dtype=dtype), torch.empty(2048, 512, dtype=dtype)
                found += recorded(residual, f"rows {rows} x {NAMES[outer]}", lambda: residual.forward_op(x, a, w, gate))
    return found


def specialised(launch: Launch, capability: int) -> tuple[dict, dict, dict]:
    """(types, constants, divisibility by 16) of the arguments, by the code that Triton's JIT itself asks at a launch."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature
    kernel, backend = launch.kernel, make_backend(GPUTarget("cuda", capability, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    return kernel._pack_args(backend, launch.options, *bind(*launch.args, **launch.constants, **launch.options))[1:]


def compile_for(launch: Launch, capability: int):
    """Triton's compilation of one launch for compute capability 8.0 or 9.0."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    source, target = ASTSource(launch.kernel, *specialised(launch, capability)), GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=launch.options)


def ptxas_report(ptx: str) -> tuple[int, int, bool]:
    """(registers a thread, bytes spilled, must each wgmma wait for the one before?), by the assembler that comes with Triton."""
    import triton
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    target = re.search(r"\.target (sm_\w+)", ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        done = subprocess.run([ptxas, "-v", f"--gpu-name={target}", file, "-o", Path(folder, "kernel.cubin")],
                              capture_output=True, text=True)
    assert done.returncode == 0, f"got exit code {done.returncode} from ptxas, expected 0: {done.stderr}"
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr))
    return int(re.search(r"Used (\d+) registers", done.stderr)[1]), spilled, "wgmma.mma_async instructions are serialized" in done.stderr


def check(launch: Launch, capability: int) -> tuple[str, list[str]]:
    """A line of the table, and what is wrong."""
    compiled = compile_for(launch, capability)
    registers, spilled, serialized = ptxas_report(compiled.asm["ptx"])
    shared, wgmma = compiled.metadata.shared, "wgmma.mma_async" in compiled.asm["ptx"]
    constants, dtype = launch.constants, launch.args[1].dtype
    rows = constants.get("BLOCK_L" if launch.kernel.__name__ == "xattn_dkv" else "BLOCK_T", constants.get("BLOCK_R", 0))
    wrong = []
    if spilled:
        wrong.append(f"spills {spilled} bytes")
    if shared > SHARED_LIMIT[capability]:
        wrong.append(f"takes {shared} bytes of shared memory, the limit is {SHARED_LIMIT[capability]}")
    if capability == 90 and rows >= 64 and dtype != torch.float32 and not wgmma:
        wrong.append("does not use wgmma")
    tile = " ".join(f"{name[6:].lower()}{constants[name]}" for name in constants if name.startswith("BLOCK"))
    line = (f"{launch.kernel.__name__:17} {launch.label:18} {NAMES[dtype]:5} sm_{capability}  {tile:16} "
            f"warps {launch.options.get('num_warps', 4)}  registers {registers:3}  spilled {spilled:3}  shared {shared:6}"
            f"{'  wgmma' if wgmma else ''}{', serialized' if serialized else ''}")
    return line, wrong


def main() -> None:
    settings = cli.parse(Settings)
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise cli.UserError("TRITON_INTERPRET=1 interprets the kernels instead of compiling them; unset it")
    started, seen, faults = time.time(), set(), 0
    for launch in every_launch(settings.quick):
        for capability in SHARED_LIMIT:
            line, wrong = check(launch, capability)
            if line not in seen:
                print(line + "".join(f"  FAIL: {fault}" for fault in wrong), flush=True)
            seen.add(line)
            faults += len(wrong)
    print(f"{len(seen)} compilations in {time.time() - started:.0f} s: {faults or 'no'} faults", flush=True)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    cli.run(main)

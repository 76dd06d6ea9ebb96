"""How fast the kernels are, against everything that PyTorch has for the same job.

    python -m kernels.benchmark            on a GPU: correctness, 250 equal repetitions, the tables, profiles, the tests
    python -m kernels.benchmark --dry      the same code on a CPU, tiny and interpreted: are there mistakes? (half a minute)

The first takes --minutes and at most one more: what has not begun by then becomes a line that says so, the dearest to compile
comes last. benchmark.csv, with device and versions in its first line, is replaced as a whole after every measurement,
benchmark.png after every table: a run that is killed leaves what it had measured. What fails, be it the correctness, becomes a line
too, its traceback goes into errors.txt, the rest goes on, and the exit code is 2.

Core: q (B, 8, T, 64) against L audio tokens, kv_len in equal shots, forward / backward / both. Baselines get the same tensors in
the same run: einsum with a (T, L) mask built on every call, as the released code does; SDPA with a boolean mask, cuDNN and
memory-efficient; SDPA flash, which takes no mask, where all see all; FlexAttention compiled, its BlockMask ready or made on every
call; flash-attn varlen, if installed, on keys copied for every shot beforehand. Block: the whole gated cross-attention block of
AF1 (width 2048), where the core is under 1 % of the arithmetic at L = 128: its speed-up is the one that training feels.
Projection: x + tanh(g) a Wᵀ, fused and folded; the keys and values of all 24 blocks, by one product or by 24. Model: training
step, prompt and one-token decoding of `af1` with random weights, kernels and CUDA graph on and off (benchmark_model.py).

TFLOP/s count visible keys only: 4·K·H·sum(kv_len) forward, 2.5 times that backward. The roofline is measured in the same run
(a large copy, a large matrix product). peak_mib is the memory that one run takes at most. What `--dry` cannot try: __init__.py says.
"""
from __future__ import annotations

import contextlib
import copy
import csv
import functools
import io
import math
import os
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import kernels
from af_min import cli

from . import reference
from .baselines import ATTENTION, check, einsum, make

CORE = [(8, 512, 128, 1), (8, 512, 128, 8), (8, 2560, 128, 8), (8, 2560, 4096, 8), (1, 2560, 16384, 8)]   # B, T, L, shots
BLOCK = [(8, 512, 128, 1), (8, 2560, 128, 8)]
HEADER = ("table", "shape", "implementation", "pass", "median_us", "p20_us", "p80_us", "visible_tflops", "roofline_share", "peak_mib")


@dataclass(frozen=True)
class Settings:
    """Times the kernels and their baselines on a GPU."""
    dry: bool = cli.flag(False, "every measurement once, with tiny shapes, on the CPU: are there mistakes? no figures")
    out: str = cli.flag("kernels/results", "folder for benchmark.csv, benchmark.png, profiles, tests.txt, errors.txt (--dry: a folder in it)")
    minutes: float = cli.flag(8.0, "begin no measurement after so long")


@dataclass
class Bench:
    """What is measured where: the device, how to time and to compile on it, and the rows so far, always saved."""
    folder: Path
    title: str
    dry: bool = False
    deadline: float = math.inf                               # time.monotonic() from which nothing begins
    rows: list = field(default_factory=list)
    roof: tuple[float, float] = (math.inf, math.inf)         # bytes/s, bf16 FLOP/s
    errors: str = ""

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def write(self, name: str, text: str) -> None:
        """A file of the results; it is there whole or not at all."""
        partial = self.folder / (name + ".partial")
        partial.write_text(text)
        os.replace(partial, self.folder / name)

    def keep(self, *rows) -> None:
        """Add lines to benchmark.csv."""
        self.rows += rows
        text = io.StringIO(newline="")
        csv.writer(text).writerows([HEADER, *self.rows])
        self.write("benchmark.csv", f"# {self.title}\n{text.getvalue()}")

    @staticmethod
    @contextlib.contextmanager
    def backend(name: str):
        """AF_MIN_KERNELS=name; "released": PyTorch, with the attention as the released code writes it."""
        with contextlib.ExitStack() as patched:
            patched.enter_context(mock.patch.dict(os.environ, AF_MIN_KERNELS="triton" if name == "triton" else "reference"))
            if name == "released":
                patched.enter_context(mock.patch.object(kernels, "masked_cross_attention", lambda *tensors: einsum(*tensors)()))
            yield

    def compile(self, function):
        return torch.compile(function, dynamic=False, backend="aot_eager" if self.dry else "inductor")

    @functools.cached_property
    def gigabyte(self) -> torch.Tensor:
        return torch.empty(2**10 if self.dry else 2**30, dtype=torch.uint8, device=self.device)

    def time(self, run, milliseconds: int = 100, ahead: bool = True) -> tuple[float, float, float, float]:
        """Median, 20th and 80th percentile in microseconds; the MiB that a run takes at most beyond what it finds.

        ahead: before every repetition the GPU fills 1 GiB so often, a third of a millisecond each, that Python has launched all of a
        short run by then: it is the GPU's work alone, with an empty L2 cache. Otherwise waiting for Python counts, as in the model."""
        if self.dry:
            started = time.perf_counter()
            run()
            return (*[(time.perf_counter() - started) * 1e6] * 3, 0.0)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        found, started = torch.cuda.memory_allocated(), time.perf_counter()
        run()
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - started                  # Python's launches take no longer than that
        repeats, fills = int(milliseconds / 1000 / elapsed), 1 + min(5, int(elapsed / 300e-6))
        peak = torch.cuda.max_memory_allocated() - found
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(min(max(5, repeats), 200))]
        for begin, end in events:
            for _ in range(fills if ahead else 0):
                self.gigabyte.zero_()
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return (*np.quantile([1000 * begin.elapsed_time(end) for begin, end in events], (0.5, 0.2, 0.8)), peak / 2**20)

    def passes(self, run, inputs, do) -> dict:
        """The times of forward, backward and both; the first call, which compiles, is not timed."""
        def both():
            torch.autograd.grad(run(), inputs, do)

        def forward():
            with torch.no_grad():
                run()
        forward(), both()
        out = run()
        timed = {"forward": forward, "backward": lambda: torch.autograd.grad(out, inputs, do, retain_graph=True), "both": both}
        return {name: self.time(function) for name, function in timed.items()}

    def measure_roof(self) -> None:
        """A 1 GiB copy and an 8192³ product."""
        target, side = torch.empty_like(self.gigabyte), 64 if self.dry else 8192
        square = torch.randn(side, side, dtype=torch.bfloat16, device=self.device)
        copied, multiplied = self.time(lambda: target.copy_(self.gigabyte))[0], self.time(lambda: square @ square)[0]
        self.roof = 2e6 * target.nbytes / copied, 2e6 * side**3 / multiplied
        print(f"copy {self.roof[0] / 1e12:.2f} TB/s, matrix product {self.roof[1] / 1e12:.0f} TFLOP/s", flush=True)

    def add(self, table, shape, name, times, flop=None, moved=None) -> None:
        """Keep and print a line for each pass. flop, moved: visible FLOP and necessary bytes of the forward pass."""
        factors, rows = {"forward": (1, 1), "backward": (2.5, 2), "both": (3.5, 3)}, []
        for which, (median, low, high, peak) in times.items():
            tflops = share = ""
            if flop:
                work, traffic = (x * y for x, y in zip(factors[which], (flop, moved)))
                tflops = f"{work / median / 1e6:.1f}"
                share = f"{max(work / self.roof[1], traffic / self.roof[0]) * 1e6 / median:.2f}"
            rows.append((table, shape, name, which, f"{median:.1f}", f"{low:.1f}", f"{high:.1f}", tflops, share, f"{peak:.1f}"))
            print(f"{table:10} {shape:24} {name:32} {which:9} {median:10.1f} us  [{low:.1f}, {high:.1f}]  {tflops:>7} {share:>5}  "
                  f"{peak:.1f} MiB", flush=True)
        self.keep(*rows)

    def missing(self, table, shape, name, reason: str) -> None:
        print(f"{table:10} {shape:24} {name:32} not run: {reason}", flush=True)
        self.keep((table, shape, name, "not run: " + reason, *[""] * 6))

    @contextlib.contextmanager
    def surviving(self, table, shape="all", name="kernels"):
        """What fails within it becomes a line that says so, and a traceback in errors.txt; the rest goes on."""
        try:
            yield
        except (RuntimeError, ImportError) if self.dry else Exception as error:
            self.missing(table, shape, name, (str(error).strip() or type(error).__name__).splitlines()[0][:100])
            self.errors += f"{table}, {shape}, {name}\n{traceback.format_exc()}\n"
            self.write("errors.txt", self.errors)

    def attempt(self, table, shape, name, run, **work) -> None:
        """One implementation, if there is time; a missing baseline is visible."""
        if time.monotonic() > self.deadline:
            return self.missing(table, shape, name, "no time left")
        with self.surviving(table, shape, name):
            self.add(table, shape, name, run(), **work)


# --- tables ----------------------------------------------------------------------------------------------------------------

def core_table(bench: Bench, shapes=CORE, compiled: bool = False) -> None:
    """Those that take tens of seconds to compile (FlexAttention), or the others."""
    for B, T, L, shots in shapes:
        q, k, v, kv_len, do = make(B, T, L, shots, device=bench.device)
        work = {"flop": 4 * 64 * 8 * int(kv_len.sum()), "moved": q.element_size() * 2 * (q.numel() + k.numel())}
        exact = reference.attend(*(x.detach().float() for x in (q, k, v)), kv_len)
        for name in [name for name in ATTENTION if name.startswith("Flex") == compiled]:
            def measured():
                run = ATTENTION[name](q, k, v, kv_len)
                error = float((run().detach() - exact).abs().max())
                if not error < 0.1:                       # bf16 scores cost less, another mask more
                    raise RuntimeError(f"computes something else: off by {error:.2f}")
                return bench.passes(run, (q, k, v), do)
            bench.attempt("core", f"B{B} T{T} L{L} shots {shots}", name, measured, **work)
        torch.compiler.reset()


def block_table(bench: Bench, shapes=BLOCK, width=2048, dtype=torch.bfloat16) -> None:
    """AF1's gated cross-attention block on PyTorch, compiled PyTorch, the kernels, and the kernels inside torch.compile."""
    from af_min.config import XattnConfig
    from af_min.xattn import GatedCrossAttention
    original = GatedCrossAttention(XattnConfig(gate_init=0.5), width, width // 2, 8).to(bench.device, dtype)
    for B, T, L, shots in shapes:
        x, audio = (torch.randn(B, *shape, device=bench.device, dtype=dtype) for shape in ((T, width), (L, width // 2)))
        number = torch.ones(B, T, dtype=torch.long, device=bench.device)
        kv_len = make(B, T, L, shots, 1, 32, dtype, bench.device)[3]
        x.requires_grad_()
        for name, which, compiled in (("released form", "released", False), ("PyTorch", "reference", False),
                                      ("PyTorch, torch.compile", "reference", True), ("kernels", "triton", False),
                                      ("kernels, torch.compile", "triton", True)):
            block = copy.deepcopy(original)

            def forward():
                return block(x, *block.keys_values(audio, number[:, :1].expand(-1, L)), kv_len, number)
            with bench.backend(which):
                bench.attempt("block", f"B{B} T{T} L{L} shots {shots}", name, lambda: bench.passes(
                    bench.compile(forward) if compiled else forward, (x, *block.parameters()), torch.randn_like(x)))
            torch.compiler.reset()


@torch.no_grad()
def projection_table(bench: Bench, shapes=((4096, 512), (20480, 512), (4096, 8192), (20480, 8192), (8, 512), (8, 8192)), D=2048,
                     blocks=24, heard=(16, 128, 1024)) -> None:
    """Forward of x + tanh(g) a Wᵀ for the attention's output (E = 512) and the feed-forward (E = 8192), in training and in decoding
    (8 rows); keys and values of all blocks from `heard` audio tokens, a product a block and at once (af_min/xattn.py)."""
    from af_min.config import XattnConfig
    from af_min.xattn import GatedCrossAttention, keys_values_at_once

    from . import residual

    def random(*shape):
        return torch.randn(*shape, device=bench.device, dtype=torch.bfloat16)

    def measure(shape, name, run, ahead=True):
        bench.attempt("projection", shape, name, lambda: run() is None or {"forward": bench.time(run, ahead=ahead)})   # once: it compiles
    for R, E in shapes:
        x, a, w, g = random(R, D), random(R, E), random(D, E), random(1)
        for name, function in (("fused", residual.fused), ("folded, cuBLAS", residual.folded),
                               ("PyTorch", reference.gated_residual),
                               ("PyTorch, torch.compile", bench.compile(reference.gated_residual))):
            measure(f"rows {R} E {E}", name, lambda: function(x, a, w, g))
    every = [GatedCrossAttention(XattnConfig(), 8, D // 2, 1).to(bench.device, torch.bfloat16) for _ in range(blocks)]
    stacked = torch.cat([block.kv.weight for block in every])
    for rows in heard:
        x, number = random(1, rows, D // 2), torch.ones(1, rows, dtype=torch.long, device=bench.device)
        for name, run in (("a product a block", lambda: [block.keys_values(x, number) for block in every]),
                          ("at once", lambda: keys_values_at_once(every, x, number)),
                          ("at once, weights kept stacked", lambda: F.linear(x, stacked))):
            measure(f"kv of {blocks} blocks, L {rows}", name, run, ahead=False)         # the launches are what one product saves


def plot(bench: Bench) -> None:
    """benchmark.png, for core, block and model: time of every implementation over ours."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(3, 1, figsize=(11, 13), layout="constrained")
    for axis, table, mine, which in zip(axes, ("core", "block", "model"), ("ours", "kernels", "kernels"), ("both", "both", "step")):
        times = {(shape, name): float(row[0]) for kind, shape, name, part, *row in bench.rows if kind == table and part == which}
        shapes, names = (list(dict.fromkeys(key[i] for key in times)) for i in (0, 1))
        for n, name in enumerate(names):
            heights = [times.get((s, name), math.nan) / times.get((s, mine), math.nan) for s in shapes]
            axis.bar([i + n / (len(names) + 1) for i in range(len(shapes))], heights, 1 / (len(names) + 1), label=name)
        axis.set_xticks([i + 0.4 for i in range(len(shapes))], shapes)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=f"{table}: {which}, time over that of {mine} (higher: slower)", yscale="log")
        axis.legend(fontsize=7) if names else None
    figure.suptitle(bench.title, fontsize=9)
    figure.savefig(bench.folder / "benchmark.png.partial", dpi=120, format="png")
    pyplot.close(figure)
    os.replace(bench.folder / "benchmark.png.partial", bench.folder / "benchmark.png")


def run_tests(bench: Bench) -> None:
    """test_kernels_interpreted.py on the device, long cases too, by four processes; what they print goes into tests.txt.

    Without triton's cache most of the time is compilation, hence the four. RuntimeError where a test fails or time runs out."""
    parts = ["no_audio_in_the_batch"] if bench.dry else ["fp32", "fp16", "bf16", "not fp32 and not fp16 and not bf16"]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-m", "", "-p", "no:cacheprovider", "tests/test_kernels_interpreted.py", "-k"]
    running = [subprocess.Popen([*command, part], cwd=Path(__file__).parents[1], text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT) for part in parts]
    end, told = min(time.monotonic() + 150, bench.deadline + 60), []
    for process in running:
        try:
            told.append(process.communicate(timeout=max(1.0, end - time.monotonic()))[0])
        except subprocess.TimeoutExpired:
            process.kill()
            told.append(process.communicate()[0] + "\nstopped: no time left\n")
    bench.write("tests.txt", "".join(f"{bench.title}\n-k {part!r}:\n{text}" for part, text in zip(parts, told)))
    wrong = [part for part, process in zip(parts, running) if process.returncode]
    if wrong:
        raise RuntimeError(f"tests -k {wrong[0]!r} failed or ran out of time: see tests.txt")
    bench.keep(("tests", "all", "kernels", "; ".join(text.splitlines()[-1].strip("= ") for text in told), *[""] * 6))


def model_table(bench: Bench, profiled: bool = False) -> None:
    from . import benchmark_model                 # wants packages that the kernels do without
    benchmark_model.table(bench, profiled)


def measure(bench: Bench) -> None:
    """Correctness, then table after table."""
    print(bench.title, flush=True)
    bench.keep()
    core = [[(1, 4, 8, 1), (1, 4, 8, 2)]] * bench.dry
    small = ([(5, 9), (1, 12)], ((1, 4, 8, 2),), 1, "cpu", [(5, 9, 7), (20, 9, 7), (2, 16, 2056)]) * bench.dry
    for name, table in (("check", lambda: check(*small)),
                        ("roofline", bench.measure_roof),
                        ("core", lambda: core_table(bench, *core)),
                        ("model", lambda: model_table(bench)),
                        ("block", lambda: block_table(bench, *([(1, 4, 8, 2)], 64) * bench.dry)),
                        ("projection", lambda: projection_table(bench, *([(3, 8)], 64, 2, [4]) * bench.dry)),
                        ("tests", lambda: bench.attempt("tests", "all", "kernels", lambda: run_tests(bench) or {})),
                        ("profile", lambda: model_table(bench, profiled=True)),
                        ("core", lambda: core_table(bench, *core, compiled=True))):
        with bench.surviving(name):
            table()
        with bench.surviving("memory"):           # the tests are processes of their own, which need memory too, and run even where
            torch.cuda.empty_cache()              # a kernel's illegal access makes every further call of this process fail
        with bench.surviving("plot"):
            plot(bench)


def main() -> None:
    settings, started = cli.parse(Settings), time.monotonic()
    torch.manual_seed(0)
    if settings.dry:
        os.environ["TRITON_INTERPRET"] = "1"                  # before masked_xattn.py is imported
        title = f"dry run, no figures; torch {torch.__version__}"
    elif torch.cuda.is_available():
        import triton
        title = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, " \
                f"CUDA {torch.version.cuda}, bf16"
    else:
        raise cli.UserError("no CUDA GPU here, so nothing to time; `--dry` tries every measurement, `python -m kernels.check_compile` compiles the "
                            "kernels without a GPU, `python -m tests.bench_linear` times the CPU path")
    from torch._functorch import config as autograd_config
    autograd_config.donated_buffer = False            # the backward pass is timed alone, on a graph that is kept
    bench = Bench(Path(settings.out, "dry" if settings.dry else ""), title, settings.dry, started + 60 * settings.minutes)
    bench.folder.mkdir(parents=True, exist_ok=True)
    (bench.folder / "errors.txt").unlink(missing_ok=True)
    measure(bench)
    failed = [row for row in bench.rows
              if row[3].startswith("not run") and row[2].startswith(("ours", "kernels", "fused", "folded"))]
    print(f"{len(bench.rows)} lines in {bench.folder}/benchmark.csv after {time.monotonic() - started:.0f} s")
    if failed:
        raise cli.UserError(f"{len(failed)} measurements or tests of our own kernels did not succeed: {failed[0]}")


if __name__ == "__main__":
    cli.run(main)

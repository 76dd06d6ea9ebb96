"""How fast the kernels are, against everything that PyTorch has for the same job.

    python -m kernels.benchmark            on a GPU: correctness, 250 equal repetitions, then the tables -> kernels/results/
    python -m kernels.benchmark --cpu      the CPU path against PyTorch's fused attention with a ready-made mask (under a minute)

Core: q (B, 8, T, 64) against L audio tokens, kv_len in equal shots, forward / backward / both. Baselines get the same tensors in
the same run: einsum with a (T, L) mask built on every call, as the released code does; SDPA with a boolean mask, cuDNN and
memory-efficient; FlexAttention compiled, its BlockMask ready or made on every call; flash-attn varlen, if installed, on keys
copied for every shot beforehand. Block: the whole gated cross-attention block of AF1 (width 2048), where the core is under
1 % of the arithmetic at L = 128: its speed-up is the one that training feels. Projection: x + tanh(g) a Wᵀ, fused and folded.

TFLOP/s count visible keys only: 4·K·H·sum(kv_len) forward, 2.5 times that backward. The roofline is measured in the same run
(a large copy, a large matrix product). Only a GPU can exercise anything here but `--cpu` and `check`.
"""
from __future__ import annotations

import contextlib
import copy
import csv
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from af_min import cli

from . import reference

CORE = [(8, 512, 128, 1), (8, 512, 128, 8), (8, 2560, 128, 8), (8, 2560, 4096, 8), (1, 2560, 16384, 8)]   # B, T, L, shots
BLOCK = [(8, 512, 128, 1), (8, 2560, 128, 8)]
ODD = [(113, 203), (128, 217), (113, 211), (108, 256), (256, 512), (1023, 1024), (1024, 1023), (1, 128), (1, 4096), (17, 1)]
HEADER = ("table", "shape", "implementation", "pass", "median_us", "p20_us", "p80_us", "visible_tflops", "roofline_share")


@dataclass(frozen=True)
class Settings:
    """Times the kernels and their baselines on a GPU; `--cpu` compares the CPU path with PyTorch's fused attention."""
    cpu: bool = cli.flag(False, "report the CPU path's time over that of SDPA with a ready-made mask")
    out: str = cli.flag("kernels/results", "folder for benchmark.csv and benchmark.png")


def make(B, T, L, shots, H=8, K=64, dtype=torch.bfloat16, device="cuda"):
    """q, k, v (views of (B, X, H, K)), kv_len of `shots` equal shots, and a gradient of the output."""
    q, k, v = (torch.randn(B, n, H, K, dtype=dtype, device=device).transpose(1, 2).requires_grad_() for n in (T, L, L))
    shot = torch.arange(T, device=device) * shots // T + 1
    return q, k, v, (shot * L // shots).to(torch.int32).expand(B, T).contiguous(), torch.randn_like(q)


# --- baselines: each takes (q, k, v, kv_len) and gives a function of no arguments -----------------------------------------

def einsum(q, k, v, kv_len):
    """The definition as the released code writes it: scores, mask and weights all in memory, the mask made every time."""
    def run():
        scores = torch.einsum("bhtk,bhlk->bhtl", q * q.shape[-1] ** -0.5, k)
        scores = scores.masked_fill(~reference.visible(kv_len, k.shape[2]), -torch.finfo(scores.dtype).max)
        weights = (scores - scores.amax(-1, keepdim=True).detach()).softmax(-1)
        return torch.einsum("bhtl,bhlk->bhtk", weights.masked_fill((kv_len == 0)[:, None, :, None], 0), v)
    return run


def sdpa(backend):
    def prepare(q, k, v, kv_len):
        mask = reference.visible(kv_len, k.shape[2])

        def run():
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return run
    return prepare


def flex(ready: bool):
    def prepare(q, k, v, kv_len):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        attend = torch.compile(flex_attention, dynamic=False)

        def block_mask():
            return create_block_mask(lambda b, h, t, j: j < kv_len[b, t], q.shape[0], None, q.shape[2], k.shape[2],
                                     device=q.device, _compile=True)
        made = block_mask()
        return lambda: attend(q, k, v, block_mask=made if ready else block_mask())
    return prepare


def flash_varlen(q, k, v, kv_len):
    """flash-attn has no such mask, but every run of equal kv_len is a sequence with keys of its own (copied beforehand)."""
    from flash_attn import flash_attn_varlen_func
    runs = [torch.unique_consecutive(row, return_counts=True) for row in kv_len]
    lengths = torch.cat([values for values, _ in runs]).tolist()
    rows = torch.cat([counts for _, counts in runs]).tolist()
    owner = [b for b, (values, _) in enumerate(runs) for _ in values]
    keys, values = (torch.cat([x[b, :, :n].transpose(0, 1) for b, n in zip(owner, lengths)]) for x in (k, v))
    ends = [torch.tensor([0, *n], device=q.device).cumsum(0).to(torch.int32) for n in (rows, lengths)]
    return lambda: flash_attn_varlen_func(q.transpose(1, 2).flatten(0, 1), keys, values, *ends, max(rows), max(lengths)) \
        .unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)


def ours(q, k, v, kv_len):
    return lambda: kernels.masked_cross_attention(q, k, v, kv_len, backend="triton")


ATTENTION = {"ours": ours, "einsum, mask every call": einsum, "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
             "SDPA memory-efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION), "FlexAttention, mask ready": flex(True),
             "FlexAttention, mask every call": flex(False), "flash-attn varlen": flash_varlen}


# --- correctness, before anything is timed ---------------------------------------------------------------------------------

def check(shapes=ODD, repeats=250, device="cuda") -> None:
    """Kernels against float64 (bounds of tests/test_kernels_interpreted.py), then bitwise equal repetitions; raises AssertionError."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for T, L in shapes:
            *inputs, kv_len, do = make(2, T, L, min(4, L), 2, dtype=dtype, device=device)
            kv_len[1, : T // 2] = 0
            found, peer, exact = (results(function, x, kv_len, do.to(x[0].dtype)) for function, x in (
                (lambda *a: kernels.masked_cross_attention(*a, backend="triton"), inputs), (reference.attend, inputs),
                (reference.attend, [x.detach().double().requires_grad_() for x in inputs])))
            for i, name in enumerate(("out", "dq", "dk", "dv")):
                rounded = exact[i].to(dtype)
                bound = (3 if i else 2) * (peer[i].double() - exact[i]).abs().max() \
                    + 2 * (rounded + 0.3 - 0.3 - rounded).abs().max() + 32 * torch.finfo(torch.float32).eps
                error = (found[i].double() - exact[i]).abs().max()
                assert error <= bound, f"{name} at T {T}, L {L}, {dtype}: got error {float(error):.2e}, expected <= {float(bound):.2e}"
    first = found
    for _ in range(repeats):
        again = results(lambda *a: kernels.masked_cross_attention(*a, backend="triton"), inputs, kv_len, do)
        assert all(torch.equal(a, b) for a, b in zip(first, again)), "a repetition differs"
    print(f"correct on {len(shapes)} shapes in 3 precisions; {repeats} repetitions equal bit by bit")


def results(function, inputs, kv_len, do):
    out = function(*inputs, kv_len)
    return [x.detach() for x in (out, *torch.autograd.grad(out, inputs, do))]


# --- tables ----------------------------------------------------------------------------------------------------------------

def bench(run, inputs, do):
    """{pass: (median, 20th, 80th percentile)} in microseconds; Triton's timer empties the L2 cache between repetitions."""
    from triton.testing import do_bench

    def both():
        torch.autograd.grad(run(), inputs, do)
    with torch.no_grad():
        run()
    both()
    out = run()
    timed = {"both": both, "backward": lambda: torch.autograd.grad(out, inputs, do, retain_graph=True)}
    times = {name: do_bench(function, quantiles=[0.5, 0.2, 0.8]) for name, function in timed.items()}
    with torch.no_grad():
        times["forward"] = do_bench(run, quantiles=[0.5, 0.2, 0.8])
    return {name: tuple(1000 * t for t in times[name]) for name in ("forward", "backward", "both")}


def roofline(device="cuda") -> tuple[float, float]:
    """(bytes/s, bf16 FLOP/s) that this device reaches: a 1 GiB copy and an 8192³ product."""
    from triton.testing import do_bench
    big, square = torch.empty(2**30, dtype=torch.uint8, device=device), torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(big)
    return 2 * 2**30 / (do_bench(lambda: target.copy_(big)) / 1000), 2 * 8192**3 / (do_bench(lambda: square @ square) / 1000)


def add(rows, table, shape, name, times, flop=None, moved=None, roof=None) -> None:
    """Append and print a line for each pass. flop, moved: visible FLOP and necessary bytes of the forward pass."""
    factors = {"forward": (1, 1), "backward": (2.5, 2), "both": (3.5, 3)}
    for which, (median, low, high) in times.items():
        tflops = share = ""
        if flop:
            work, traffic = (x * y for x, y in zip(factors[which], (flop, moved)))
            tflops = f"{work / median / 1e6:.1f}"
            share = f"{max(work / roof[1], traffic / roof[0]) * 1e6 / median:.2f}"
        rows.append((table, shape, name, which, f"{median:.1f}", f"{low:.1f}", f"{high:.1f}", tflops, share))
        print(f"{table:10} {shape:24} {name:32} {which:9} {median:10.1f} us  [{low:.1f}, {high:.1f}]  {tflops:>7} {share:>5}", flush=True)


def attempt(rows, table, shape, name, run, **work) -> None:
    """One implementation; what it cannot do becomes a line that says so, so that a missing baseline is visible."""
    try:
        add(rows, table, shape, name, run(), **work)
    except (RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0][:100]
        rows.append((table, shape, name, "not run: " + reason, "", "", "", "", ""))
        print(f"{table:10} {shape:24} {name:32} not run: {reason}", flush=True)


def core_table(rows, roof, shapes=CORE, device="cuda") -> None:
    for B, T, L, shots in shapes:
        q, k, v, kv_len, do = make(B, T, L, shots, device=device)
        work = {"flop": 4 * 64 * 8 * int(kv_len.sum()), "moved": q.element_size() * 2 * (q.numel() + k.numel()), "roof": roof}
        for name, prepare in ATTENTION.items():
            attempt(rows, "core", f"B{B} T{T} L{L} shots {shots}", name,
                    lambda: bench(prepare(q, k, v, kv_len), (q, k, v), do), **work)
            torch.compiler.reset()


def block_table(rows, shapes=BLOCK, width=2048, device="cuda", dtype=torch.bfloat16) -> None:
    """AF1's gated cross-attention block on PyTorch, compiled PyTorch, the kernels, and the kernels inside torch.compile."""
    from unittest import mock

    from af_min.config import XattnConfig
    from af_min.xattn import GatedCrossAttention

    def released(q, k, v, kv_len, backend=None):
        return einsum(q, k, v, kv_len)()
    original = GatedCrossAttention(XattnConfig(gate_init=0.5), width, width, 8).to(device, dtype)
    for B, T, L, shots in shapes:
        audio, number = torch.randn(B, L, width, device=device, dtype=dtype), torch.ones(B, T, dtype=torch.long, device=device)
        kv_len = make(B, T, L, shots, 1, 32, dtype, device)[3]
        x = torch.randn(B, T, width, device=device, dtype=dtype, requires_grad=True)
        do = torch.randn_like(x)
        for name, backend, compiled in (("released form", "reference", False), ("PyTorch", "reference", False),
                                        ("PyTorch, torch.compile", "reference", True), ("kernels", "triton", False),
                                        ("kernels, torch.compile", "triton", True)):
            block = copy.deepcopy(original)

            def forward(x, audio, kv_len, number):
                k, v = block.keys_values(audio, number[:, :1].expand(-1, L))
                return block(x, k, v, kv_len, number)
            run = torch.compile(forward) if compiled else forward
            patches = [mock.patch.dict("os.environ", AF_MIN_KERNELS=backend)]
            if name == "released form":
                patches.append(mock.patch.object(kernels, "masked_cross_attention", released))
            with contextlib.ExitStack() as patched:
                for patch in patches:
                    patched.enter_context(patch)
                attempt(rows, "block", f"B{B} T{T} L{L} shots {shots}", name,
                        lambda: bench(lambda: run(x, audio, kv_len, number), (x, *block.parameters()), do))
            torch.compiler.reset()


def projection_table(rows, shapes=((4096, 512), (20480, 512), (4096, 8192), (8, 512)), D=2048, device="cuda") -> None:
    """x + tanh(g) a Wᵀ for the attention's output (E = 512), the feed-forward (E = 8192) and decoding (8 rows), forward."""
    from triton.testing import do_bench

    from . import residual
    for R, E in shapes:
        x, a, w, g = (torch.randn(*s, device=device, dtype=torch.bfloat16) for s in ((R, D), (R, E), (D, E), (1,)))
        compiled = torch.compile(reference.gated_residual)
        for name, run in (("fused", residual.fused), ("folded, cuBLAS", residual.folded), ("PyTorch", reference.gated_residual),
                          ("PyTorch, torch.compile", compiled)):
            attempt(rows, "projection", f"rows {R} E {E}", name, lambda: {
                "forward": tuple(1000 * t for t in do_bench(lambda: run(x, a, w, g), quantiles=[0.5, 0.2, 0.8]))})


def save(rows, folder: Path, title: str) -> None:
    """benchmark.csv and, for core and block, benchmark.png: time of every implementation over ours."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "benchmark.csv", "w", newline="") as file:
        file.write(f"# {title}\n")
        csv.writer(file).writerows([HEADER, *rows])
    figure, axes = pyplot.subplots(2, 1, figsize=(11, 9), layout="constrained")
    for axis, table, mine in zip(axes, ("core", "block"), ("ours", "kernels")):
        times = {(shape, name): float(median) for kind, shape, name, which, median, *_ in rows if kind == table and which == "both"}
        shapes, names = (list(dict.fromkeys(key[i] for key in times)) for i in (0, 1))
        for n, name in enumerate(names):
            heights = [times.get((s, name), math.nan) / times.get((s, mine), math.nan) for s in shapes]
            axis.bar([i + n / (len(names) + 1) for i in range(len(shapes))], heights, 1 / (len(names) + 1), label=name)
        axis.set_xticks([i + 0.4 for i in range(len(shapes))], shapes)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=f"{table}: forward + backward, time over that of {mine} (higher: slower)", yscale="log")
        axis.legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.savefig(folder / "benchmark.png", dpi=120)
    print(f"saved {folder}/benchmark.csv and benchmark.png")


def cpu_ratio(repeats: int = 25) -> None:
    """Reference against SDPA with a ready-made mask, alternating; a ratio of medians below 1 means that ours is faster."""
    for B, T, L, H, K, shots in ((32, 64, 48, 4, 32, 2), (8, 512, 128, 8, 64, 8), (8, 512, 16, 8, 64, 1), (1, 1, 48, 4, 32, 1)):
        q, k, v, kv_len, do = make(B, T, L, shots, H, K, torch.float32, "cpu")
        if B > 1:
            kv_len[0] //= 2
        mask = reference.visible(kv_len, L)
        rivals = {"ours": lambda: kernels.masked_cross_attention(q, k, v, kv_len, backend="reference"),
                  "SDPA": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)}

        def forward(attend):
            with torch.no_grad():
                attend()

        def both(attend):
            torch.autograd.grad(attend(), (q, k, v), do)
        times = {}
        inner = max(1, 2_000_000 // (B * T * L * H))          # calls a repetition: short ones are timed in bulk
        for step in (forward, both):                          # one after the other: they leave memory in different states
            for _ in range(repeats + 1):
                for name, attend in rivals.items():
                    started = time.perf_counter()
                    for _ in range(inner):
                        step(attend)
                    times.setdefault((name, step.__name__), []).append((time.perf_counter() - started) / inner * 1e6)
        middle = {key: statistics.median(values[1:]) for key, values in times.items()}
        print(f"B {B:2} T {T:3} L {L:3} heads {H} x {K}  " + "  ".join(
            f"{which}: ours {middle['ours', which]:9.1f} us, SDPA {middle['SDPA', which]:9.1f} us, ratio "
            f"{middle['ours', which] / middle['SDPA', which]:.2f}" for which in ("forward", "both")), flush=True)


def main() -> None:
    settings = cli.parse(Settings)
    versions = f"torch {torch.__version__}"
    if settings.cpu:
        cpu_ratio()
        print(f"CPU, {torch.get_num_threads()} threads, float32, {versions}")
        return
    if not torch.cuda.is_available():
        raise cli.UserError("no CUDA GPU here, so nothing to time; `--cpu` reports the CPU path, `python -m kernels.check_compile` "
                            "compiles the kernels without a GPU")
    from torch._functorch import config as autograd_config
    import triton
    autograd_config.donated_buffer = False            # the backward pass is timed alone, on a graph that is kept
    title = f"{torch.cuda.get_device_name()}, {versions}, triton {triton.__version__}, CUDA {torch.version.cuda}, bf16"
    torch.manual_seed(0)
    check()
    roof, rows = roofline(), []
    print(f"{title}; copy {roof[0] / 1e12:.2f} TB/s, matrix product {roof[1] / 1e12:.0f} TFLOP/s")
    core_table(rows, roof)
    block_table(rows)
    projection_table(rows)
    save(rows, Path(settings.out), title)


if __name__ == "__main__":
    cli.run(main)

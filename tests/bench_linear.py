"""What the model asks a CPU for: products by MKL and by oneDNN, with a packed weight and in bfloat16, in GFLOP/s (the table of
kernels/linear.py), short attention, torch's and ours, in ms (the table of kernels/attention.py), and masked cross-attention beside
torch's with a ready-made mask.

    OMP_NUM_THREADS=1 python -m tests.bench_linear
"""
from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F

import kernels
from af_min import cli
from kernels import attention, linear, reference
from kernels.baselines import make

SHAPES = [(1280, 128, 512), (1280, 512, 128), (1280, 128, 128), (1, 576, 1536), (8, 576, 1536), (8, 1536, 576), (8, 576, 49152)]
TEXTS = [(64, 20, 20), (40, 32, 26), (12, 110, 110), (12, 110, 80), (8, 160, 60), (512, 16, 16)]     # samples, tokens, keys
MASKED = [(32, 64, 48, 4, 32, 2), (8, 512, 128, 8, 64, 8), (8, 512, 16, 8, 64, 1), (8, 1, 48, 4, 32, 1), (1, 1, 48, 4, 32, 1)]  # and H, K, shots


def rate(work, flops: float, repeats: int = 40) -> float:
    """GFLOP/s, median."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return flops / statistics.median(seconds[2:]) / 1e9


def report() -> None:
    print(f"float32, {torch.get_num_threads()} threads, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
    print("rows x n_in -> n_out        MKL   oneDNN   packed / bfloat16, GFLOP/s")
    for rows, n_in, n_out in SHAPES:
        copies = 1 if rows > 100 else max(1, (1 << 26) // (n_in * n_out))          # of W: 256 MB, so that none stays in the cache
        x, weights, flops = torch.randn(rows, n_in), [torch.randn(n_out, n_in) for _ in range(copies)], 2 * copies * rows * n_in * n_out
        packed = [torch.ops.mkldnn._reorder_linear_weight(w) for w in weights]
        with torch.no_grad():
            got = [rate(lambda: [product(x, w) for w in many], flops) for product, many in
                   ((F.linear, weights), (linear.multiply, weights), (linear.multiply, packed))]
        print(f"{f'{rows} x {n_in} -> {n_out}':24s} {got[0]:6.0f}   {got[1]:6.0f}   {got[2]:6.0f}")
        if rows > 100:
            of, dy = [x.requires_grad_(), weights[0].requires_grad_()], torch.randn(rows, n_out)
            got = [rate(lambda: torch.autograd.grad(product(*of), of, dy), 3 * flops) for product in (F.linear, linear.linear)]
            with linear.bfloat16_products():
                got.append(rate(lambda: torch.autograd.grad(linear.linear(*of), of, dy), 3 * flops))
            print(f"  and both gradients     {got[0]:6.0f}   {got[1]:6.0f}   {got[2]:6.0f}")
    print("samples x tokens x keys, 4 heads of 32      torch     ours, ms forward and backward")
    for B, T, L in TEXTS:
        of = [torch.randn(B, n, 4, 32).transpose(1, 2).requires_grad_() for n in (T, L, L)]
        dy, bias = torch.randn(B, 4, T, 32), torch.zeros(B, 1, T, L).masked_fill(torch.rand(B, 1, T, L) < 0.2, -10.0)
        ways = (lambda: F.scaled_dot_product_attention(*of, attn_mask=bias), lambda: attention.attention(*of, bias))
        got = [1 / rate(lambda: torch.autograd.grad(way(), of, dy), 1e6, 100) for way in ways]
        print(f"{f'{B} x {T} x {L}':24s} {got[0]:24.2f} {got[1]:8.2f}")
    for shape in MASKED:
        masked(*shape)


def masked(B: int, T: int, L: int, H: int, K: int, shots: int, repeats: int = 25) -> None:
    """Ours and torch's in turn; a ratio of medians below 1 means that ours is faster."""
    q, k, v, kv_len, do = make(B, T, L, shots, H, K, torch.float32, "cpu")
    if B > 1:
        kv_len[0] //= 2
    mask, took = reference.visible(kv_len, L), {}
    ways = {"ours": lambda: kernels.masked_cross_attention(q, k, v, kv_len, backend="reference"),
            "SDPA": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)}

    def forward(attend):
        with torch.no_grad():
            attend()

    def both(attend):
        torch.autograd.grad(attend(), (q, k, v), do)
    inner = max(1, 2_000_000 // (B * T * L * H))              # calls a repetition: short ones are timed in bulk
    for step in (forward, both):                              # one after the other: they leave memory in different states
        for _ in range(repeats + 1):
            for name, attend in ways.items():
                began = time.perf_counter()
                for _ in range(inner):
                    step(attend)
                took.setdefault((step.__name__, name), []).append((time.perf_counter() - began) / inner * 1e6)
    took = {key: statistics.median(values[1:]) for key, values in took.items()}
    print(f"masked, {B} x {T} x {L}, {H} heads of {K}: " + "; ".join(
        f"{step} {took[step, 'SDPA']:.1f} us, ours {took[step, 'ours']:.1f}, ratio {took[step, 'ours'] / took[step, 'SDPA']:.2f}"
        for step in ("forward", "both")), flush=True)


if __name__ == "__main__":
    cli.keep_freed_memory()                                   # as every command does
    report()

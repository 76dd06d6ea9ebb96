"""What the model asks a CPU for: products by MKL and by oneDNN, with a packed weight and in bfloat16, in GFLOP/s (the table of
kernels/linear.py), and short attention, torch's and ours, in ms (the table of kernels/attention.py).

    OMP_NUM_THREADS=1 python -m tests.bench_linear
"""
from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F

from kernels import attention, linear

SHAPES = [(1280, 128, 512), (1280, 512, 128), (1280, 128, 128), (1, 576, 1536), (8, 576, 1536), (8, 1536, 576), (8, 576, 49152)]
TEXTS = [(64, 20, 20), (40, 32, 26), (12, 110, 110), (12, 110, 80), (8, 160, 60), (512, 16, 16)]     # samples, tokens, keys


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


if __name__ == "__main__":
    report()

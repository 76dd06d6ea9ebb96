"""Products on a CPU: MKL, oneDNN, and oneDNN with a packed weight, in GFLOP/s (the table of kernels/linear.py).

    OMP_NUM_THREADS=1 python -m tests.bench_linear
"""
from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F

from kernels import linear

SHAPES = [(1280, 128, 512), (1280, 512, 128), (1280, 128, 128), (1, 576, 1536), (8, 576, 1536), (8, 1536, 576), (8, 576, 49152)]


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
    print("rows x n_in -> n_out        MKL   oneDNN   packed, GFLOP/s")
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
            print(f"  and both gradients     {got[0]:6.0f}   {got[1]:6.0f}")


if __name__ == "__main__":
    report()

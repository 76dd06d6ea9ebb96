"""Masked cross-attention and the gated residual: one interface, two backends, chosen here.

    masked_cross_attention(q, k, v, kv_len)     softmax(q[t] · k[:kv_len[t]] / sqrt(K)) v[:kv_len[t]]
    gated_residual(x, a, weight, gate)          x + tanh(gate) · a Wᵀ

The backend is the argument `backend`, else the environment variable AF_MIN_KERNELS (`reference` or `triton`), else Triton for
CUDA tensors that the kernels support and PyTorch for the rest. A backend that was asked for and cannot run is an error that says why.

Without a GPU, Triton's interpreter shows that the kernels compute the right numbers (tests/test_kernels_interpreted.py), its compiler
that they fit into registers and shared memory (check_compile.py), and a pretended GPU that training, answering and scoring leave no
tensor on the wrong device, choose the kernels there, and record and replay a graph (tests/pretend_gpu.py). No GPU figure has been
measured yet. What only a GPU can exercise:
    by `python -m kernels.benchmark`
        the compiled binaries: their results (wgmma, bf16 products), and that 250 repetitions give the same bits
        their speed: tiles, warps and stages in CONFIGS, SPLIT, LONG, WIDE, torch.compile's code around them
        SDPA's backends, and the baselines that `--dry` lists as not run
        CUDA's own recording and replay: streams, memory that a graph keeps (af_min/decoding.py)
        the keys and values of all blocks by one product (`keys_values_at_once` in af_min/xattn.py): its speed and memory
        the benchmark's profiler, and what its clock says
    by using the model there
        a recording that fails; NCCL; tensors on another GPU than the current one (the device guards)

Tried with triton 3.7 (torch 2.13) and 3.6 (torch 2.11); the interpreter of 3.6 wants numpy below 2.4.

Read on: reference.py (PyTorch), masked_xattn.py and residual.py (Triton), check_compile.py, benchmark.py with
baselines.py and benchmark_model.py. linear.py and attention.py are apart from these: products with weights and short attention on a CPU.
"""
from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from af_min.cli import UserError

from . import reference

__all__ = ["masked_cross_attention", "gated_residual"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (32, 64, 128)
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def why_no_triton(tensor: Tensor) -> str | None:
    """The reason why Triton cannot work on this tensor, or None."""
    if not TRITON_INSTALLED:
        return "the package triton is not installed"
    if tensor.dtype not in DTYPES:
        return f"the kernels take float32, bfloat16 and float16, not {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the tensors are on the CPU (TRITON_INTERPRET=1, set before Python starts, runs the kernels there, slowly)"
    if tensor.device.type not in ("cpu", "cuda"):
        return f"the tensors are on {tensor.device.type}, the kernels need a CUDA GPU"
    if tensor.device.type == "cuda" and torch.cuda.get_device_capability(tensor.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


def use_triton(backend: str | None, tensor: Tensor, head_dim: int | None = None) -> bool:
    """Argument, then environment, then device. Raises UserError if Triton is asked for and cannot run."""
    wanted = backend if backend is not None else os.environ.get("AF_MIN_KERNELS") or "default"
    if wanted == "reference" or (wanted == "default" and not tensor.is_cuda):
        return False
    source = "backend" if backend is not None else "AF_MIN_KERNELS"
    if wanted not in ("default", "triton"):
        raise UserError(f"{source}={wanted}: unknown backend; choose reference or triton")
    reason = why_no_triton(tensor)
    if reason is None and head_dim not in (None, *HEAD_DIMS):
        reason = f"head width {head_dim} has no kernel, only {', '.join(map(str, HEAD_DIMS))}"
    if wanted == "triton" and reason:
        raise UserError(f"{source}=triton cannot run: {reason}; unset it or choose {source}=reference")
    return reason is None


def masked_cross_attention(q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor, backend: str | None = None) -> Tensor:
    """q (B, H, T, K), k and v (B, H, L, K) of any strides, kv_len (B, T) int32, 0 to L, non-decreasing in t -> (B, H, T, K).

    Token t sees the keys 0 .. kv_len[t]-1; kv_len[t] = 0 gives an exact 0 and zero gradients. L may be 0. Keys that no token
    sees are never used, whatever they hold. Raises UserError for a backend that cannot run. A kv_len beyond L is an error on a CPU; on a
    GPU, where checking would mean waiting for it, the kernel then reads memory behind the keys."""
    (B, H, T, K), L = q.shape, k.shape[2]
    assert k.shape == v.shape == (B, H, L, K) and kv_len.shape == (B, T), \
        f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, kv_len {tuple(kv_len.shape)}, " \
        "expected (B, H, T, K), (B, H, L, K), (B, H, L, K), (B, T)"
    if use_triton(backend, q, K):
        from . import masked_xattn
        return masked_xattn.masked_cross_attention(q, k, v, kv_len)
    return reference.masked_cross_attention(q, k, v, kv_len)


def gated_residual(x: Tensor, a: Tensor, weight: Tensor, gate: Tensor, backend: str | None = None) -> Tensor:
    """x (..., D), a (..., E), weight (D, E), gate of one element -> x + tanh(gate) · a Wᵀ, (..., D)."""
    assert x.shape[:-1] == a.shape[:-1] and weight.shape == (x.shape[-1], a.shape[-1]) and gate.numel() == 1, \
        f"got x {tuple(x.shape)}, a {tuple(a.shape)}, weight {tuple(weight.shape)}, gate {tuple(gate.shape)}, " \
        "expected (..., D), (..., E), (D, E), one element"
    if use_triton(backend, x):
        from . import residual
        return residual.gated_residual(x, a, weight, gate)
    return reference.gated_residual(x, a, weight, gate)

"""The two operations in plain PyTorch: the reference for the Triton kernels, and what runs without a GPU.

    masked cross-attention    out[t] = softmax(q[t] · k[:n] / sqrt(K)) v[:n],  n = kv_len[t];  n = 0 gives 0
    gated residual            out    = x + tanh(gate) · a Wᵀ

(Audio Flamingo, arXiv 2402.01831: the masks section 3.2 ii, the residual 3.1 iv; Flamingo, arXiv 2204.14198, section 2.2.)
Shapes as in af_min/config.py: B batch, H heads, T text tokens, L audio tokens, K width of a head, D width; here also E inner width
(of a, the branch before its last product). Next: masked_xattn.py.
"""
from __future__ import annotations

import math
import threading
import weakref

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import attention
from .linear import linear


def visible(kv_len: Tensor, length: int) -> Tensor:
    """(B, T) -> (B, 1, T, length) bool: True where token t may look at key j, that is j < kv_len[t]."""
    return (torch.arange(length, dtype=torch.int32, device=kv_len.device) < kv_len[..., None])[:, None]


def zero_unused(x_BHLK: Tensor, kv_len: Tensor) -> Tensor:
    """Keys (or values) that no token of their sample sees become 0, so that a NaN in an unused slot cannot leak as 0 · NaN.

    kv_len never decreases along t, so the last token sees all that any token sees."""
    unused = torch.arange(x_BHLK.shape[2], device=kv_len.device) >= kv_len[:, -1:]
    return x_BHLK.masked_fill(unused[:, None, :, None], 0)


def attend(q_BHTK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, kv_len: Tensor) -> Tensor:
    """Masked cross-attention by its definition, on any device and in any precision, the (T, L) scores in memory."""
    k_BHLK, v_BHLK = zero_unused(k_BHLK, kv_len), zero_unused(v_BHLK, kv_len)
    mask = visible(kv_len, k_BHLK.shape[2])
    scores = (q_BHTK @ k_BHLK.transpose(-1, -2)) / math.sqrt(q_BHTK.shape[-1])
    lowest = torch.finfo(scores.dtype).min                     # finite: a row without keys would compute inf - inf
    weights = scores.masked_fill(~mask, lowest).softmax(-1).masked_fill(~mask, 0)
    return weights @ v_BHLK


_kept = threading.local()        # .last of each thread: a weak reference to the last kv_len, what its mask was made for, the mask


def additive_mask(kv_len: Tensor, dtype: torch.dtype) -> tuple[int, int, Tensor | None]:
    """The smallest and largest kv_len, and a mask of 0 and -inf, (B, 1, T, largest), or None if all tokens of the batch see the same.

    Every layer of a forward pass gives the same tensor kv_len, so the last mask is kept until another tensor comes or this one
    is written to."""
    made_for = None if kv_len.is_inference() else (kv_len._version, dtype)
    last, last_for, last_mask = getattr(_kept, "last", (lambda: None, None, None))
    if made_for is not None and last() is kv_len and last_for == made_for:
        return last_mask
    low, longest = (int(n) for n in kv_len.aminmax())
    mask = None if low == longest else torch.where(visible(kv_len, longest), 0.0, -math.inf).to(dtype)
    _kept.last = (weakref.ref(kv_len), made_for, (low, longest, mask))
    return low, longest, mask


def attend_cpu(q_BHTK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, kv_len: Tensor) -> Tensor:
    """`attend` by what is fast on a CPU: attention.py; for one token, and where a row sees no key, PyTorch's fused kernel, which gives 0 there.

    Keys beyond the largest kv_len are cut off. A NaN or inf among the others shows in one sum, which reads but copies nothing: of
    the output, or, where the backward pass multiplies by them again, of keys and values. Only then are unused ones set to 0."""
    low, longest, mask = additive_mask(kv_len, q_BHTK.dtype)
    assert longest <= k_BHLK.shape[2], f"got a kv_len of {longest}, expected at most L = {k_BHLK.shape[2]}"
    if longest == 0:
        return attend(q_BHTK, k_BHLK[:, :, :0], v_BHLK[:, :, :0], kv_len)
    if longest < k_BHLK.shape[2]:                              # for one token a slice would cost as much as the attention
        k_BHLK, v_BHLK = k_BHLK[:, :, :longest], v_BHLK[:, :, :longest]
    attend_all = attention if low and q_BHTK.shape[2] > 1 else F.scaled_dot_product_attention
    out = attend_all(q_BHTK, k_BHLK, v_BHLK, mask)
    if mask is None or math.isfinite(k_BHLK.detach().sum() + v_BHLK.detach().sum() if out.requires_grad else out.sum()):
        return out
    k_BHLK, v_BHLK = zero_unused(k_BHLK, kv_len), zero_unused(v_BHLK, kv_len)
    return attend_all(q_BHTK, k_BHLK, v_BHLK, mask)


def masked_cross_attention(q_BHTK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, kv_len: Tensor) -> Tensor:
    """The PyTorch implementation: `attend_cpu` on a CPU, the definition elsewhere (GPU, torch.compile)."""
    if q_BHTK.numel() == 0:
        return q_BHTK.clone()
    on_cpu = q_BHTK.device.type == "cpu" and not torch.compiler.is_compiling()
    return (attend_cpu if on_cpu else attend)(q_BHTK, k_BHLK, v_BHLK, kv_len)


def gated_residual(x: Tensor, a: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    """x (..., D) + tanh(gate) · a (..., E) Wᵀ with weight (D, E) and a gate of one element, in the dtype of x."""
    return x + (torch.tanh(gate) * linear(a, weight)).to(x.dtype)

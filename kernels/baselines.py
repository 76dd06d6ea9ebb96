"""What the kernels are timed against (benchmark.py): each takes (q, k, v, kv_len), prepares what may be prepared beforehand, and
gives a function of no arguments that computes the attention."""
from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels

from . import reference


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
        everything = backend == SDPBackend.FLASH_ATTENTION and int(kv_len.min()) == k.shape[2]
        mask = None if everything else reference.visible(kv_len, k.shape[2])

        def run():
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return run
    return prepare


@functools.cache
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention
    return torch.compile(flex_attention, dynamic=False)


def flex(ready: bool):
    def prepare(q, k, v, kv_len):
        from torch.nn.attention.flex_attention import create_block_mask
        attend = compiled_flex()

        def block_mask():
            return create_block_mask(lambda b, h, t, j: j < kv_len[b, t], q.shape[0], None, q.shape[2], k.shape[2],
                                     device=q.device, _compile=q.is_cuda)
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
             "SDPA memory-efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION), "SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION),
             "FlexAttention, mask ready": flex(True), "FlexAttention, mask every call": flex(False),
             "flash-attn varlen": flash_varlen}

"""What the kernels are timed against (benchmark.py), on what, and that they are right before.

Each form of attention takes (q, k, v, kv_len), prepares what may be prepared beforehand, and gives a function of no arguments that
computes it."""
from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels

from . import reference

RESIDUAL = [(1, 2048, 512), (512, 2048, 512), (2500, 257, 70), (40, 2048, 8192), (1, 2048, 8192)]      # rows, D, E
ODD = [(113, 203), (128, 217), (113, 211), (108, 256), (256, 512), (1023, 1024), (1024, 1023), (1, 128), (1, 4096), (17, 1)]


def make(B, T, L, shots, H=8, K=64, dtype=torch.bfloat16, device="cuda"):
    """q, k, v (views of (B, X, H, K)), kv_len of `shots` equal shots, and a gradient of the output."""
    q, k, v = (torch.randn(B, n, H, K, dtype=dtype, device=device).transpose(1, 2).requires_grad_() for n in (T, L, L))
    shot = torch.arange(T, device=device) * shots // T + 1
    return q, k, v, (shot * L // shots).to(torch.int32).expand(B, T).contiguous(), torch.randn_like(q)


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


def check(shapes=ODD, repeated=((8, 512, 128, 8), (1, 1023, 1024, 4)), repeats=250, device="cuda", residuals=RESIDUAL) -> None:
    """Kernels against float64 (bounds of test_kernels_interpreted.py), then bitwise equal repetitions; raises AssertionError."""
    def kernel(*tensors):
        return ours(*tensors)()

    cut = 2 if device == "cpu" else 1             # the interpreter cuts bfloat16 off where a GPU rounds it: up to twice the error

    def compare(function, peers, inputs, kv_len, do, names, where):
        dtype = inputs[0].dtype
        found, peer, exact = (results(f, x, kv_len, do.to(x[0].dtype)) for f, x in (
            (function, inputs), (peers, inputs), (peers, [x.detach().double().requires_grad_() for x in inputs])))
        for i, name in enumerate(names):
            rounded = exact[i].to(dtype)
            bound = (3 if i else 2) * (peer[i].double() - exact[i]).abs().max() \
                + 2 * (rounded + 0.3 - 0.3 - rounded).abs().max() + 32 * torch.finfo(torch.float32).eps
            error = (found[i].double() - exact[i]).abs().max()
            assert error <= cut * bound, f"{name} at {where}, {dtype}: got error {error:.2e}, expected <= {cut * bound:.2e}"
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for R, D, E in residuals:
            x, a, w, gate = (torch.randn(*s, device=device) for s in ((R, D), (R, E), (D, E), (1,)))
            inputs = [y.to(dtype).requires_grad_() for y in (x, a, w / E ** 0.5, gate)]
            compare(lambda *y: kernels.gated_residual(*y[:4], backend="triton"), lambda *y: reference.gated_residual(*y[:4]),
                    inputs, None, torch.randn(R, D, device=device), ("out", "dx", "da", "dweight"), f"rows {R}, D {D}, E {E}")
        for T, L in shapes:
            *inputs, kv_len, do = make(2, T, L, min(4, L), 2, dtype=dtype, device=device)
            kv_len[1, : T // 2] = 0
            compare(kernel, reference.attend, inputs, kv_len, do, ("out", "dq", "dk", "dv"), f"T {T}, L {L}")
    for shape in repeated:
        *inputs, kv_len, do = make(*shape, device=device)
        first = results(kernel, inputs, kv_len, do)
        for _ in range(repeats):
            again = results(kernel, inputs, kv_len, do)
            assert all(torch.equal(a, b) for a, b in zip(first, again)), f"a repetition at B, T, L, shots = {shape} differs"
    print(f"correct on {len(shapes) + len(residuals)} shapes in 3 precisions; {repeats} repetitions of {len(repeated)} equal bit by bit", flush=True)


def results(function, inputs, kv_len, do):
    out = function(*inputs, kv_len)
    return [x.detach() for x in (out, *torch.autograd.grad(out, inputs, do))]

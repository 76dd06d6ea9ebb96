"""The gated residual in Triton: out = x + tanh(g) · a Wᵀ in one pass over the output.

PyTorch without fusion writes the branch y = a Wᵀ, multiplies it by tanh(g), adds it: at (B·T, D) = (20480, 2048) in bf16 six reads
or writes of 84 MB each, besides the product's own reads. Here gate and residual are applied to the product's float32 accumulator
before anything is stored. a (..., E) is what enters the branch's last product, W (D, E) its weight, g the gate; R = B·T rows.

**The gate is a factor of the weight**, x + a (tanh(g) W)ᵀ, so the backward pass never needs y. With M = doᵀ a (D, E):

    dx = do        da = do (tanh(g) W)        dW = tanh(g) M        dg = (1 - tanh²(g)) sum_{d,e} M W

do, a and W are enough: the branch output y is not saved (84 MB per layer at that shape). Both products of the backward pass are
plain matrix products, which cuBLAS does best; there are no atomics, so every run gives the same bits. Instead of W the gate may
scale the other factor of a product, a or do: it scales the smaller of the two.

**Who multiplies.** For a narrow inner width (the attention's output projection, E = 512) the pass is bound by memory and the
fused kernel saves traffic. For a wide one (the feed-forward, E = 8192) it is bound by arithmetic: there cuBLAS multiplies, with
the gate folded into a factor and the residual added by `addmm`; only the branch's separate passes are saved. WIDE is the border.

LayerNorm and GELU have no kernel here: PyTorch's already read and write their tensor once, and fusing them with their neighbours
is what torch.compile does. The best WIDE has to be measured on a GPU: `python -m kernels.benchmark` times both forms.

Read before: masked_xattn.py; next: check_compile.py, benchmark.py.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .masked_xattn import product

WIDE = 2048                   # inner widths E above it are left to cuBLAS; not measured yet
GROUP = tl.constexpr(8)       # row blocks that share columns of W while those are in the L2 cache

# (BLOCK_R rows, BLOCK_D columns, BLOCK_E, warps, pipeline stages) by (at most FEW_ROWS rows, as in decoding; bytes of an element).
CONFIGS = {(False, 2): (128, 128, 64, 8, 3), (False, 4): (64, 64, 32, 4, 1),
           (True, 2): (16, 16, 128, 4, 3), (True, 4): (16, 16, 64, 4, 1)}
FEW_ROWS = 16


@triton.jit(do_not_specialize=["R"])
def residual_forward(x_ptr, a_ptr, w_ptr, gate_ptr, out_ptr, R, D, E, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
                     BLOCK_E: tl.constexpr):
    """Grid (tiles of the output). x, out (R, D); a (R, E); w (D, E); gate (1); all contiguous."""
    tile, columns = tl.program_id(0), tl.cdiv(D, BLOCK_D)
    band = tile // (GROUP * columns)                                   # GROUP row blocks, walked column by column
    height = tl.minimum(tl.cdiv(R, BLOCK_R) - band * GROUP, GROUP)
    r = (band * GROUP + tile % height) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tile % (GROUP * columns) // height * BLOCK_D + tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    a_ptr += r.to(tl.int64)[:, None] * E + e[None, :]
    w_ptr += c.to(tl.int64)[:, None] * E + e[None, :]
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(0, E, BLOCK_E):
        a = tl.load(a_ptr + start, mask=(r[:, None] < R) & (e[None, :] < E - start), other=0.0)
        w = tl.load(w_ptr + start, mask=(c[:, None] < D) & (e[None, :] < E - start), other=0.0)
        acc = product(a, tl.trans(w), acc)
    g = tl.load(gate_ptr).to(tl.float32)
    u = tl.exp(-2.0 * tl.abs(g))                                       # tanh without overflow: (1 - u) / (1 + u), sign of g
    tanh = tl.where(g < 0, -1.0, 1.0) * (1.0 - u) / (1.0 + u)
    offset = r.to(tl.int64)[:, None] * D + c[None, :]
    inside = (r[:, None] < R) & (c[None, :] < D)
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + offset, (x + tanh * acc).to(out_ptr.dtype.element_ty), mask=inside)


def fused(x: Tensor, a: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    """x (R, D), a (R, E), weight (D, E), gate (1) -> (R, D), by the kernel."""
    (R, D), E = x.shape, a.shape[1]
    out = torch.empty_like(x)
    block_r, block_d, block_e, warps, stages = CONFIGS[R <= FEW_ROWS, a.element_size()]
    with torch.cuda.device_of(x):
        residual_forward[triton.cdiv(R, block_r) * triton.cdiv(D, block_d),](
            x, a, weight, gate, out, R, D, E, BLOCK_R=block_r, BLOCK_D=block_d, BLOCK_E=block_e,
            num_warps=warps, num_stages=stages)
    return out


def scaled(tanh: Tensor, y: Tensor) -> Tensor:
    """tanh · y, multiplied in float32 and rounded once; tanh * y would first be a whole float32 tensor."""
    return torch.mul(y, tanh, out=torch.empty_like(y))


def gated_product(tanh: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of tanh · a b, the smaller of them scaled."""
    return (scaled(tanh, a), b) if a.numel() < b.numel() else (a, scaled(tanh, b))


def folded(x: Tensor, a: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    """The same by cuBLAS: the gate folded into a factor, the residual as the product's starting value."""
    a, b = gated_product(torch.tanh(gate.float()), a, weight.t())
    return torch.addmm(x, a, b) if x.dtype == a.dtype else x + a @ b


@torch.library.custom_op("af_min::gated_residual", mutates_args=())
def forward_op(x: Tensor, a: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    x, a, weight = x.contiguous(), a.contiguous(), weight.contiguous()
    if x.numel() == 0 or a.shape[1] == 0:
        return x.clone()
    return (fused if a.shape[1] <= WIDE else folded)(x, a, weight, gate)


@forward_op.register_fake
def _(x, a, weight, gate):
    return x.new_empty(x.shape)


def save_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:])


def backward(ctx, do):
    """dx, da, dW, dg by the equations above; the two products are left to cuBLAS, sums are taken in float32."""
    a, weight, gate = ctx.saved_tensors
    tanh, branch_do = torch.tanh(gate.float()), do.to(a.dtype)
    left, right = gated_product(tanh, branch_do, weight)
    m = branch_do.t() @ a
    dgate = (1 - tanh * tanh) * torch.sum(m * weight, dtype=torch.float32)
    return do, left @ right, scaled(tanh, m), dgate.to(gate.dtype).reshape(gate.shape)


forward_op.register_autograd(backward, setup_context=save_for_backward)


def gated_residual(x: Tensor, a: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    """x (..., D) + tanh(gate) · a (..., E) Wᵀ. Under autocast a and weight are cast as in any linear layer; x keeps its dtype."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        a, weight = (y.to(torch.get_autocast_dtype(device)) for y in (a, weight))
    assert a.dtype == weight.dtype, f"got a {a.dtype}, weight {weight.dtype}, expected one dtype"
    out = forward_op(x.reshape(-1, x.shape[-1]), a.reshape(-1, a.shape[-1]), weight, gate)
    return out.view(x.shape)

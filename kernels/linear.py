"""y = x Wᵀ + b on a CPU, by whichever of torch's two libraries is fast: every product of the model with a weight goes through here.

torch multiplies float32 matrices with MKL, which leaves the wide registers of another maker's processor unused and copies W
before it multiplies a few rows with it. oneDNN, which torch has for convolutions, does neither. GFLOP/s on one core of an AMD
EPYC with AVX-512, torch 2.13 (`python -m tests.bench_linear`; where rows are few, W comes from memory, not from a cache):

    rows x n_in -> n_out       MKL   oneDNN   W packed
    1280 x 128 -> 512          113      252        261
      and both gradients       104      231
    1 x 576 -> 1536              8       13         17
    8 x 576 -> 1536             38       61         94
    8 x 576 -> 49152            34       64        104

`linear` asks oneDNN wherever the product is large enough to be worth 10 µs of call. `pack` lays the weights of a model out as
oneDNN reads them, once, for a model that will only answer. Elsewhere (a GPU, half precision, macOS, torch.compile, which has its
own ways) torch chooses. Nothing here is part of Audio Flamingo, and everything works without it.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGE = 1 << 20                      # multiplications in a product; below, the call itself is what costs
LARGE_WEIGHT = 1 << 18               # numbers in a weight that is worth packing, for the same reason
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b by oneDNN, without gradients. It takes any strides, and copies a transposed x."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def in_rows(x: Tensor) -> Tensor:
    """(..., n) -> (R, n): the rows of x, then zeros up to a multiple of 64 and of about a sixteenth of their number.

    oneDNN writes machine code for every shape that it has not met, half a millisecond each time, and keeps 1024 of them."""
    x_RN = x.flatten(0, -2)
    more = -len(x_RN) % (1 << max(6, len(x_RN).bit_length() - 4))
    if not more:
        return x_RN
    out = x_RN.new_empty(len(x_RN) + more, x_RN.shape[1])          # F.pad would first fill all of it with zeros
    out[:-more], out[-more:] = x_RN, 0
    return out


class Product(torch.autograd.Function):
    """y = x Wᵀ + b:  dx = dy W,  dW = dyᵀ x,  db = the sum of dy over rows."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x_RN, ctx.shape = in_rows(x), x.shape
        ctx.save_for_backward(x_RN, weight)
        return multiply(x_RN, weight, bias)[:x.shape[:-1].numel()].view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (x_RN, weight), dy_RN = ctx.saved_tensors, in_rows(dy)
        dx = dW = db = None
        if ctx.needs_input_grad[0]:
            dx = multiply(dy_RN, weight.t())[:ctx.shape[:-1].numel()].view(ctx.shape)
        if ctx.needs_input_grad[1]:                                # the narrower of the two is the one that is copied
            narrow = x_RN.shape[1] < dy_RN.shape[1]
            dW = multiply(x_RN.t(), dy_RN.t()).t() if narrow else multiply(dy_RN.t(), x_RN.t())
        if ctx.needs_input_grad[2]:
            db = dy_RN.sum(0)
        return dx, dW, db


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., n_in), weight (n_out, n_in), packed or not, bias (n_out) -> x Wᵀ + b (..., n_out)."""
    if weight.is_mkldnn:
        return multiply(x, weight, bias)
    if not fits(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return Product.apply(x, weight, bias)
    return multiply(x, weight, bias)


def fits(x: Tensor, weight: Tensor) -> bool:
    return (ONEDNN and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.ndim > 1
            and not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")
            and x.shape[:-1].numel() * weight.numel() >= LARGE)


class Linear(nn.Linear):
    """nn.Linear in all but the library that multiplies."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


@torch.no_grad()
def pack(model: nn.Module) -> None:
    """Lay the large float32 weights of a model on a CPU out as oneDNN reads them. From then on it can answer, but neither learn
    nor be saved. One weight at a time is in memory twice."""
    for layer in model.modules():
        if ONEDNN and isinstance(layer, Linear) and not layer.weight.is_mkldnn and layer.weight.is_cpu \
                and layer.weight.dtype == torch.float32 and layer.weight.numel() >= LARGE_WEIGHT:
            layer.weight = nn.Parameter(torch.ops.mkldnn._reorder_linear_weight(layer.weight), requires_grad=False)

"""y = x Wᵀ + b on a CPU, by whichever of torch's two libraries is fast: every product of the model with a weight goes through here.

torch multiplies float32 matrices with MKL, which leaves the wide registers of another maker's processor unused and copies W
before it multiplies a few rows with it. oneDNN, which torch has for convolutions, does neither. GFLOP/s on one core of an AMD
EPYC with AVX-512, torch 2.13 (`python -m tests.bench_linear`; where rows are few, W comes from memory, not from a cache):

    rows x n_in -> n_out       MKL   oneDNN   W packed   bfloat16
    1280 x 128 -> 512          113      252        261
      and both gradients       104      231                   367
    1 x 576 -> 1536              8       13         17
    8 x 576 -> 1536             38       61         94
    8 x 576 -> 49152            34       64        104

`linear` asks oneDNN wherever the product is large enough to be worth 10 µs of call. `pack` lays the weights of a model out as
oneDNN reads them, once, for a model that will only answer. Within `bfloat16_products` the factors are rounded to bfloat16, sums stay
float32, and so does everything between two products: training on a processor that has such products (`HAS_BFLOAT16`). torch's
autocast would take attention and all else to bfloat16 too, and lose on copies what it wins on products.

Elsewhere (a GPU, half precision, macOS, torch.compile, which has its own ways) torch chooses. Nothing here is part of
Audio Flamingo, and everything works without it.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGE = 1 << 20                      # multiplications in a product; below, the call itself is what costs
LARGE_WEIGHT = 1 << 18               # numbers in a weight that is worth packing, for the same reason
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
HAS_BFLOAT16 = ONEDNN and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
_factors = ContextVar("factors", default=torch.float32)      # what the factors of a product are rounded to, in this thread


@contextmanager
def bfloat16_products(enabled: bool = True) -> Iterator[None]:
    """Within it, `linear` multiplies float32 on a CPU in bfloat16; the backward pass of such a product does so wherever it runs."""
    before = _factors.set(torch.bfloat16 if enabled else _factors.get())
    try:
        yield
    finally:
        _factors.reset(before)


def as_now():
    """A context for later: within it, `linear` multiplies in bfloat16 if it does so at this moment. Recomputing activations needs it."""
    return bfloat16_products(_factors.get() == torch.bfloat16)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b by oneDNN, without gradients. It takes any strides, and copies a transposed x of float32."""
    if x.dtype == torch.bfloat16:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def in_rows(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(..., n) -> (R, n): the rows of x, then zeros up to a multiple of 64 and of a sixteenth to an eighth of their number.

    oneDNN writes machine code for every shape that it has not met, half a millisecond each time, and keeps 1024 of them."""
    x_RN = x.flatten(0, -2)
    more = -len(x_RN) % (1 << max(6, len(x_RN).bit_length() - 4))
    if not more:
        return x_RN.to(dtype)
    out = x_RN.new_empty(len(x_RN) + more, x_RN.shape[1], dtype=dtype)          # F.pad would first fill all of it with zeros
    out[:-more], out[-more:] = x_RN, 0
    return out


class Product(torch.autograd.Function):
    """y = x Wᵀ + b:  dx = dy W,  dW = dyᵀ x,  db = the sum of dy over rows."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        factors = _factors.get()
        x_RN, weight, bias = in_rows(x, factors), weight.to(factors), None if bias is None else bias.to(factors)
        ctx.shape = x.shape
        ctx.save_for_backward(x_RN, weight)
        return multiply(x_RN, weight, bias)[:x.shape[:-1].numel()].float().view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_RN, weight = ctx.saved_tensors
        dy_RN = in_rows(dy, weight.dtype)
        dx = dW = db = None
        if ctx.needs_input_grad[0]:
            dx = multiply(dy_RN, weight.t())[:ctx.shape[:-1].numel()].float().view(ctx.shape)
        if ctx.needs_input_grad[1]:                                # the narrower of the two is the one that is copied
            narrow = x_RN.shape[1] < dy_RN.shape[1]
            dW = (multiply(x_RN.t(), dy_RN.t()).t() if narrow else multiply(dy_RN.t(), x_RN.t())).float()
        if ctx.needs_input_grad[2]:
            db = dy.flatten(0, -2).sum(0)
        return dx, dW, db


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., n_in), weight (n_out, n_in), packed or not, bias (n_out) -> x Wᵀ + b (..., n_out)."""
    if weight.is_mkldnn:
        return multiply(x, weight, bias)
    if not fits(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad) or _factors.get() != x.dtype:
        return Product.apply(x, weight, bias)
    return multiply(x, weight, bias)


def together(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """What each of several layers makes of x. While they learn it is one product with all their weights: one pass over x, and of three layers two
    copies fewer. Where nothing is learned the weights are not put together for every call."""
    if not torch.is_grad_enabled() or not all(fits(x, layer.weight) for layer in layers):
        return tuple(layer(x) for layer in layers)
    bias = torch.cat([layer.bias for layer in layers]) if layers[0].bias is not None else None
    return linear(x, torch.cat([layer.weight for layer in layers]), bias).split([layer.out_features for layer in layers], -1)


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

"""Matrix products of few rows on a CPU: what decoding does, a token of every row of the batch at a time.

    y = x W^T        x (rows, n_in), W (n_out, n_in)

Every weight is read once a token, so the memory's bandwidth is the limit: 1 / (bytes of all weights / bytes a second)
tokens a second. Two things keep a library's product of few rows away from it (torch 2.13 with MKL, one core of a Sapphire
Rapids, the 0.54 GB of SmolLM2-135M in float32; reading them alone would be 31 times a second):

    rows                         1      2      4      8     12     16
    as it comes                 26     25     15     11      9     11     times a second
    64 columns of y at a time   26     25     21     19     17     11     MKL does not copy such a small W into another layout
    W column by column          30     19     16     13     11     10     consecutive memory for a sum of columns of W

`linear` takes the second way between 4 and 12 rows. `lay_out` rearranges the weights of a model that will read one row for
long enough, as a chat does: it takes as long as a few dozen tokens.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW = range(4, 13)                   # rows for which blocks are faster
BLOCK = 64                           # columns of y
LARGE = 1 << 16                      # numbers; a smaller W stays in the cache, and the call itself is what costs


def linear(x: Tensor, layer: nn.Linear | nn.Embedding) -> Tensor:
    """x (..., n_in) -> x W^T + bias (..., n_out), with the weight of a linear layer, or of an embedding that is the head too."""
    weight, bias, n_rows = layer.weight, getattr(layer, "bias", None), x.shape[:-1].numel()
    if not fits(x, weight) or n_rows not in FEW:                   # in this order: torch.compile does not know the rows
        return F.linear(x, weight, bias)
    rows, whole = x.reshape(n_rows, -1), len(weight) // BLOCK * BLOCK
    parts = [(rows @ weight[:whole].unflatten(0, (-1, BLOCK)).mT).transpose(0, 1).flatten(1)]      # (n_out / 64, rows, 64) before
    if whole < len(weight):
        parts.append(F.linear(rows, weight[whole:]))
    y = torch.cat(parts, 1).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def fits(x: Tensor, weight: Tensor) -> bool:
    return (x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and weight.numel() >= LARGE
            and weight.is_contiguous() and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"))


@torch.no_grad()
def lay_out(model: nn.Module, rows: int) -> None:
    """Rearrange the large float32 weights of linear layers in memory, for inference on a CPU: by column for one row a step.

    Values, shapes and names stay. One weight at a time is in memory twice.
    """
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        if isinstance(layer, (nn.Linear, nn.Embedding)) and weight.numel() >= LARGE and weight.dtype == torch.float32:
            layer.weight.data = weight.data.t().contiguous().t() if rows == 1 and weight.is_cpu else weight.data.contiguous()

"""The optimizer of `tiny`: Muon for the weights of layers, AdamW for all else (embeddings, norms, biases, gates).

AdamW scales every number of a gradient for itself. Muon (K. Jordan, 2024, https://kellerjordan.github.io/posts/muon/) takes a weight
(N_out, N_in) for the matrix that it is. A gradient is mostly a few large directions, which examples of the common kind gave it; what
rare ones teach is in the many small ones. Muon makes all directions of a step equally large (not in the paper, which has AdamW, as
`af1` has; README sets the two beside each other on `tiny`):

    M <- μ M + (1 - μ) G                       momentum
    X =  U Vᵀ  of  (1 - μ) G + μ M = U S Vᵀ    Nesterov's look ahead, its singular values set to 1
    W <- W - lr (0.2 √max(N_out, N_in) X + decay W)

The factor gives a step the size that AdamW's have (arXiv 2502.16982, section 2.2): one learning rate serves both. U Vᵀ needs no
decomposition. Of a matrix with singular values s, Newton and Schulz's  X <- a X + b (X Xᵀ) X + c (X Xᵀ)² X  has  a s + b s³ + c s⁵  and
the same U and V; with Jordan's a, b, c three iterations carry s from .018 up to between .68 and 1.20, and smaller ones to 40 times
what they were.
"""
from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

MOMENTUM = 0.95
A, B, C = 3.4445, -4.7750, 2.0315
ITERATIONS = 3           # he makes 5; each takes time, and README's scores were reached with 3


def orthogonal(g_RNM: Tensor, products: torch.dtype | None = None) -> Tensor:
    """R matrices (N, M), N <= M -> about U Vᵀ of each, (R, N, M), multiplied in the type `products`, or their own. One of zeros stays so."""
    x = (g_RNM / g_RNM.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(products or g_RNM.dtype)       # no singular value above 1
    for _ in range(ITERATIONS):
        square_RNN = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square_RNN, square_RNN, square_RNN, beta=B, alpha=C), x, beta=A)
    return x.to(g_RNM.dtype)


class Muon(torch.optim.AdamW):
    """AdamW, but for groups with "matrices": True, whose parameters all have two dimensions. Sharded ones (FSDP2) are put together for
    the iteration, on every process. products: the type that it multiplies in (None: the weights' own)."""

    def __init__(self, groups: list[dict], lr: float, products: torch.dtype | None = None, **of_adamw):
        super().__init__(groups, lr=lr, **of_adamw)
        self.products = products

    @torch.no_grad()
    def step(self, closure=None) -> None:
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["matrices"]]
        super().step()
        self.param_groups = groups
        of_shape = defaultdict(list)                                 # matrices of one shape are multiplied together
        for group in groups:
            for p in group["params"] if group["matrices"] else []:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=torch.tensor(0.0), momentum=torch.zeros_like(p))           # AdamW expects a count when it is loaded
                state["step"] += 1
                momentum = state["momentum"].lerp_(p.grad, 1 - MOMENTUM)
                of_shape[p.shape].append((p, whole(p.grad.lerp(momentum, MOMENTUM)), group))
        for (rows, columns), matrices in of_shape.items():
            ahead = torch.stack([x for _, x, _ in matrices])
            found = orthogonal(ahead if rows <= columns else ahead.mT, self.products)
            for (p, _, group), x in zip(matrices, found if rows <= columns else found.mT):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(placed(x, p), alpha=-group["lr"] * 0.2 * max(rows, columns) ** 0.5)


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def placed(x: Tensor, p: Tensor) -> Tensor:
    """x, which every process holds, spread as p is."""
    if not hasattr(p, "device_mesh"):
        return x
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None)

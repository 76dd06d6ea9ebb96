"""Step 3 of the walk. Reads window embeddings (clap.py), gives audio tokens; next: xattn.py.

The encoder hears each window alone. The audio representation transformation layers (paper section 3.1) let the windows
of one recording see each other before the language model looks at them: self-attention over the window sequence, so
that order and repetition over the whole recording can be told. Post-norm transformer layers (Vaswani et al.,
arXiv 1706.03762) without a final norm:

    y_0 = LN(sqrt(D) x + pos)        a_n = LN(MHA(y_n) + y_n)        y_{n+1} = LN(W_2 relu(W_1 a_n) + a_n)

The position of window w of audio n is n * max_windows + w, as in the published model, unless the model numbers its
audios otherwise (XattnConfig.audio_index); then every audio starts at 0.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from kernels.linear import Linear

from .config import RepresentationConfig


def sinusoid_table(rows: int, width: int) -> torch.Tensor:
    """(rows, width): sine and cosine interleaved, pos / 10000^(2i/D) (arXiv 1706.03762 section 3.5). Float64 inside."""
    i = torch.arange(width, dtype=torch.float64)
    angle = torch.arange(rows, dtype=torch.float64)[:, None] / 10_000 ** (2 * (i // 2) / width)
    return torch.where(i.long() % 2 == 0, angle.sin(), angle.cos()).float()


class SelfAttention(nn.Module):
    """Post-norm multi-head self-attention, no biases: LN(out(MHA(y)) + y)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = Linear(width, width, bias=False)
        self.k = Linear(width, width, bias=False)
        self.v = Linear(width, width, bias=False)
        self.out = Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, y_AWD: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
        q, k, v = (rearrange(project(y_AWD), "a w (h k) -> a h w k", h=self.heads) for project in (self.q, self.k, self.v))
        heads_out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.norm(self.out(rearrange(heads_out, "a h w k -> a w (h k)")) + y_AWD)


class FeedForward(nn.Module):
    """Post-norm feed-forward: LN(W_2 relu(W_1 y) + y)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.up = Linear(width, inner)
        self.down = Linear(inner, width)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, y_AWD: torch.Tensor) -> torch.Tensor:
        return self.norm(self.down(F.relu(self.up(y_AWD))) + y_AWD)


class Representation(nn.Module):
    """Window embeddings -> audio tokens, each recording for itself: (A, W, D) -> (A, W, D)."""

    def __init__(self, config: RepresentationConfig, width: int, max_windows: int):
        super().__init__()
        self.max_positions, self.scale = config.max_audios * max_windows, config.scale
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.layers = nn.ModuleList(
            nn.ModuleList([SelfAttention(width, config.heads), FeedForward(width, config.inner)]) for _ in range(config.layers))
        self.register_buffer("positions", sinusoid_table(self.max_positions, width), persistent=False)

    def forward(self, windows_AWD: torch.Tensor, n_windows_A: torch.Tensor | None = None,
                first_A: torch.Tensor | None = None) -> torch.Tensor:
        """windows_AWD: embeddings of A recordings, padded to W; n_windows_A: how many are real (None: all);
        first_A: position of each recording's first window (None: 0). Returns (A, W, D); padded rows are meaningless."""
        a, w, d = windows_AWD.shape
        position = torch.arange(w, device=windows_AWD.device).expand(a, w)
        if first_A is not None:
            position = position + first_A[:, None]
        # A padded slot may lie beyond the table; nobody reads its output.
        table = self.positions[position.clamp(max=self.max_positions - 1)]
        y = self.norm(windows_AWD * (self.scale or d ** 0.5) + table.to(windows_AWD.dtype))
        visible = None
        if n_windows_A is not None:  # (A, 1, 1, W): padded windows are nobody's key
            visible = rearrange(torch.arange(w, device=y.device) < n_windows_A.clamp(min=1)[:, None], "a w -> a 1 1 w")
        for attend, feed_forward in self.layers:
            y = feed_forward(attend(y, visible))
        return y

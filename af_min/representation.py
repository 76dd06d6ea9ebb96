"""Step 3 of the walk. Reads window embeddings (clap.py), gives audio tokens; next: xattn.py.

The encoder hears each window alone. The audio representation transformation layers (paper section 3.1 ii) let the
windows of a recording attend to each other, so that order and repetition over all of it can be told. (In the paper all
audios of a sample attend to each other; here that is `attend_padding`. With each recording by itself, a later one does
not change an earlier one's tokens.) Post-norm transformer layers (arXiv 1706.03762) without a final norm:

    y_0 = LN(scale x + pos)        a_n = LN(MHA(y_n) + y_n)        y_{n+1} = LN(W_2 relu(W_1 a_n) + a_n)

scale is sqrt(D), if not set otherwise. The position of window w of audio n = 0, 1, ... is n * max_windows + w, as in the
published model; with XattnConfig.audio_index, which numbers audios in another way, it is w.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from kernels.attention import attention
from kernels.linear import Linear, together

from .config import RepresentationConfig


def sinusoid_table(rows: int, width: int) -> torch.Tensor:
    """(rows, width): sine and cosine interleaved, pos / 10000^(2i/D) (arXiv 1706.03762, section 3.5). Computed in float64."""
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

    def forward(self, y_PSD: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
        q, k, v = (rearrange(part, "p s (h k) -> p h s k", h=self.heads) for part in together(y_PSD, self.q, self.k, self.v))
        heads_out = attention(q, k, v, visible)
        return self.norm(self.out(rearrange(heads_out, "p h s k -> p s (h k)")) + y_PSD)


class FeedForward(nn.Module):
    """Post-norm feed-forward: LN(W_2 relu(W_1 y) + y)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.up = Linear(width, inner)
        self.down = Linear(inner, width)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, y_PSD: torch.Tensor) -> torch.Tensor:
        return self.norm(self.down(F.relu(self.up(y_PSD))) + y_PSD)


class Representation(nn.Module):
    """Window embeddings -> audio tokens. The legend is config.py's, and here also:  P  sequences of S windows (not samples)."""

    def __init__(self, config: RepresentationConfig, width: int, max_windows: int):
        super().__init__()
        self.scale = config.scale
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.layers = nn.ModuleList(
            nn.ModuleList([SelfAttention(width, config.heads), FeedForward(width, config.inner)]) for _ in range(config.layers))
        self.register_buffer("positions", sinusoid_table(config.max_audios * max_windows, width), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """What a layer adds starts at a tenth of its usual size. At full size it would mix every window with the mean of its
        recording before anything has been learned; this way a window is at first what the encoder heard in it."""
        for attend, feed_forward in self.layers:
            for parameter in (attend.out.weight, feed_forward.down.weight, feed_forward.down.bias):
                parameter *= 0.1

    def forward(self, windows_PSD: torch.Tensor, position_PS: torch.Tensor | None = None,
                recording_PS: torch.Tensor | None = None) -> torch.Tensor:
        """Window embeddings -> audio tokens, both (P, S, D). position_PS: position of each window (None: 0, 1, ... in its sequence).
        recording_PS: number of each window's recording, where a sequence holds several; a window attends to those of the same
        number (None: to all of its sequence)."""
        p, s, d = windows_PSD.shape
        if position_PS is None:
            position_PS = torch.arange(s, device=windows_PSD.device).expand(p, s)
        y = self.norm(windows_PSD * (self.scale or d ** 0.5) + self.positions[position_PS].to(windows_PSD.dtype))
        visible = None
        if recording_PS is not None:
            visible = (recording_PS[:, :, None] == recording_PS[:, None, :])[:, None]
        for attend, feed_forward in self.layers:
            y = feed_forward(attend(y, visible))
        return y


def packed(lengths: list[int]) -> tuple[list[int], int]:
    """First-fit packing: recordings of `lengths` windows, one after the other, in sequences as long as the longest of them.
    -> where each starts, counted in windows over all sequences; the number of sequences. If each recording were padded to the
    longest instead, half to two thirds of a batch of the embedded data would be padding."""
    longest, filled, starts = max(lengths), [], []
    for length in lengths:
        sequence = next((i for i, used in enumerate(filled) if used + length <= longest), len(filled))
        filled += [0] * (sequence == len(filled))
        starts.append(sequence * longest + filled[sequence])
        filled[sequence] += length
    return starts, len(filled)

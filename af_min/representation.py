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

from kernels.attention import attention
from kernels.linear import Linear, together

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
    """Window embeddings -> audio tokens, each recording for itself."""

    def __init__(self, config: RepresentationConfig, width: int, max_windows: int):
        super().__init__()
        self.max_positions, self.scale = config.max_audios * max_windows, config.scale
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.layers = nn.ModuleList(
            nn.ModuleList([SelfAttention(width, config.heads), FeedForward(width, config.inner)]) for _ in range(config.layers))
        self.register_buffer("positions", sinusoid_table(self.max_positions, width), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """What a layer adds starts out at a tenth. At full size it would mix every window with the mean of its recording before
        anything has been learned; so a window is at first what the encoder heard in it."""
        for attend, feed_forward in self.layers:
            for parameter in (attend.out.weight, feed_forward.down.weight, feed_forward.down.bias):
                parameter *= 0.1

    def forward(self, windows_PSD: torch.Tensor, position_PS: torch.Tensor | None = None,
                recording_PS: torch.Tensor | None = None) -> torch.Tensor:
        """windows_PSD: P sequences of S window embeddings; position_PS: of each in its recording (None: 0, 1, ...); recording_PS: a
        number of the recording that each is of, where a sequence holds several: a window sees those of its own (None: all).
        Returns (P, S, D)."""
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
    """Recordings put one behind the other into sequences as long as the longest, each into the first that has room
    -> where each starts, counted over all sequences; how many sequences. To pad each recording to the longest instead would be
    to compute padding for the most part: half to two thirds of a batch of the embedded data."""
    longest, filled, starts = max(lengths), [], []
    for length in lengths:
        sequence = next((i for i, used in enumerate(filled) if used + length <= longest), len(filled))
        filled += [0] * (sequence == len(filled))
        starts.append(sequence * longest + filled[sequence])
        filled[sequence] += length
    return starts, len(filled)

"""Step 4 of the walk. Reads audio tokens (representation.py) and text states (lm.py); next: lm.py.

**The mask.** Text after the n-th <audio> may look at audios 1..n: a block-triangular mask over [audio blocks x text
blocks] (paper section 3.2 and figure 3; classic Flamingo shows only audio n). We pack the valid windows of all audios of a
sample one after the other, so that what token t may see is always a prefix of the keys, and the mask is one integer:

    kv_len[t] = number of windows of audios 1 .. max(1, number of <audio> tokens at positions <= t)

An <audio> token already sees its own audio; text before the first one sees audio 1; without any audio kv_len is 0.

**The block** (Flamingo, arXiv 2204.14198, section 2.4) stands before an LM layer. Both gates start at tanh(0) = 0, so that
training starts from the unchanged language model:

    x <- x + tanh(g_attn) * W_out softmax(q k^T / sqrt(K), keys < kv_len) v        q = W_q LN(x),  [k; v] = W_kv audio
    x <- x + tanh(g_ff)   * W_2 gelu(W_1 LN(x))

**Not in the paper: `audio_index`.** From pointing at *all* audios so far a small model is slow to learn which of them a
text belongs to. With this setting, query and key carry the number of their audio as a learned vector, E_q[n] and E_k[n],
that starts out so that text prefers its own audio; the operation stays the same dot product.

**Nor is `null_key`**: a key and a value of zeros that all text sees. A mean over what is heard cannot tell one bell from two;
beside a constant it can: n bells of weight e^s have the share n e^s / (1 + n e^s).
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import kernels
from kernels.linear import Linear

from .config import XattnConfig

OWN_AUDIO_LOGIT = 4.0  # initial advantage, in logits, of a text's own audio under `audio_index`


def audio_number(ids_BT: torch.Tensor, audio_id: int, seen_B: torch.Tensor | None = None) -> torch.Tensor:
    """(B, T): the number of <audio> tokens at positions <= t, at least 1. `seen_B`: how many came before these tokens."""
    count = (ids_BT == audio_id).cumsum(1)
    if seen_B is not None:
        count = count + seen_B[:, None]
    return count.clamp(min=1)


def visible_windows(number_BT: torch.Tensor, n_windows_BN: torch.Tensor) -> torch.Tensor:
    """kv_len (B, T) int32, from the number of the last audio and the windows of each (0 where a sample has fewer)."""
    ends = F.pad(n_windows_BN.cumsum(1), (1, 0))                       # (B, N + 1): windows of the first n audios
    return ends.gather(1, number_BT.clamp(max=n_windows_BN.shape[1])).to(torch.int32)


class GatedCrossAttention(nn.Module):
    """One block. Keys and values come from `keys_values`, once per audio; nothing is kept on the module."""

    def __init__(self, config: XattnConfig, width: int, audio_width: int, max_audios: int):
        super().__init__()
        self.heads, inner, self.null_key = config.heads, config.heads * config.head_dim, int(config.null_key)
        self.norm = nn.LayerNorm(width)
        self.q = Linear(width, inner, bias=False)
        self.kv = Linear(audio_width, 2 * inner, bias=False)        # rows [K; V]
        self.out = Linear(inner, width, bias=False)
        self.attn_gate = nn.Parameter(torch.full((1,), config.gate_init))
        self.ff_norm = nn.LayerNorm(width)
        self.up = Linear(width, config.ff_mult * width, bias=False)
        self.down = Linear(config.ff_mult * width, width, bias=False)
        self.ff_gate = nn.Parameter(torch.zeros(1))
        self.index_q = self.index_k = None
        if config.audio_index:
            own = torch.zeros(max_audios, config.heads, config.head_dim)
            for n in range(max_audios):  # one orthogonal direction an audio, as long as there are that many
                own[n, :, n % config.head_dim] = (OWN_AUDIO_LOGIT * config.head_dim ** 0.5) ** 0.5
            self.index_q = nn.Parameter(own.reshape(max_audios, inner).clone())
            self.index_k = nn.Parameter(own.reshape(max_audios, inner).clone())

    def keys_values(self, audio_BLD: torch.Tensor, number_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Audio tokens and the number (1, 2, ...) of the audio that each is of -> k, v (B, H, L, K), the null key before them."""
        return self.split(self.kv(audio_BLD), number_BL)

    def split(self, kv_BLI: torch.Tensor, number_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What follows the product in `keys_values`."""
        k, v = kv_BLI.chunk(2, dim=-1)
        if self.index_k is not None:
            k = k + F.embedding((number_BL - 1).clamp(0, len(self.index_k) - 1), self.index_k).to(k.dtype)
        padded = (F.pad(x, (0, 0, self.null_key, 0)) if self.null_key else x for x in (k, v))
        return tuple(rearrange(x, "b l (h k) -> b h l k", h=self.heads) for x in padded)

    def queries(self, x_BTD: torch.Tensor, number_BT: torch.Tensor) -> torch.Tensor:
        """Text states -> q (B, H, T, K)."""
        q = self.q(self.norm(x_BTD))
        if self.index_q is not None:
            q = q + F.embedding((number_BT - 1).clamp(0, len(self.index_q) - 1), self.index_q).to(q.dtype)
        return rearrange(q, "b t (h k) -> b h t k", h=self.heads)

    def forward(self, x_BTD: torch.Tensor, k_BHLK: torch.Tensor, v_BHLK: torch.Tensor, kv_len_BT: torch.Tensor,
                number_BT: torch.Tensor, first_BT: torch.Tensor | None = None) -> torch.Tensor:
        """kv_len_BT: how many keys each token sees, the null key included: one tensor for all blocks, which the kernels know again.
        first_BT: the first window that each token sees, where that is not 0 (the ablation `mask = "last"`)."""
        if first_BT is None:
            heard = kernels.masked_cross_attention(self.queries(x_BTD, number_BT), k_BHLK, v_BHLK, kv_len_BT)
        else:
            heard = self.attention(x_BTD, k_BHLK, kv_len_BT, number_BT, first_BT).to(v_BHLK.dtype) @ v_BHLK[:, :, self.null_key:]
        heard = rearrange(heard, "b h t k -> b t (h k)")
        x_BTD = kernels.gated_residual(x_BTD, heard, self.out.weight, self.attn_gate)
        inner = F.gelu(self.up(self.ff_norm(x_BTD)))
        return kernels.gated_residual(x_BTD, inner, self.down.weight, self.ff_gate)

    def attention(self, x_BTD: torch.Tensor, k_BHLK: torch.Tensor, kv_len_BT: torch.Tensor, number_BT: torch.Tensor,
                  first_BT: torch.Tensor | None = None) -> torch.Tensor:
        """The attention weights themselves on the windows, (B, H, T, L), for pictures; the forward pass does not build them."""
        q = self.queries(x_BTD, number_BT)
        scores = q.float() @ k_BHLK.float().mT / q.shape[-1] ** 0.5
        slot_L = torch.arange(scores.shape[-1], device=q.device)
        hidden = slot_L >= kv_len_BT[:, None, :, None]
        if first_BT is not None:
            window_L = slot_L - self.null_key                                              # -1: the null key
            hidden = hidden | (window_L < first_BT[:, None, :, None]) & (window_L >= 0)
        return scores.masked_fill(hidden, float("-inf")).softmax(-1)[..., self.null_key:].nan_to_num(0.0)


def keys_values_at_once(blocks: list[GatedCrossAttention], audio_BLD: torch.Tensor,
                        number_BL: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`keys_values` of every block, by one product: on a GPU one launch instead of one a block, and a full one where L is short.

    The weights are stacked for the call, a copy that is freed behind it (af1: 24 blocks of 1024 x 1024, in bf16 50 MB). A CPU waits
    for no launch and would only pay for that copy. `python -m kernels.benchmark` times both ways and what memory they take."""
    weights = torch.stack([block.kv.weight for block in blocks])
    kv = torch.bmm(audio_BLD.flatten(0, 1).expand(len(blocks), -1, -1), weights.mT)      # every block's as its own product lays it out
    return [block.split(part, number_BL) for block, part in zip(blocks, kv.unflatten(1, audio_BLD.shape[:2]))]

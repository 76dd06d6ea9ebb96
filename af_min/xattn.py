"""Step 4 of the walk. Reads audio tokens (representation.py) and the language model's hidden states x; next: lm.py.

**The mask.** Text after the n-th <audio> token, which marks the place of audio n, may look at audios 1..n: a mask that is
triangular in blocks of text x audio (paper section 3.2 ii, figure 3; Flamingo, section 2.3, shows audio n alone). The valid
windows of a sample's audios are packed one after the other, so that token t sees a prefix of the keys: one integer,

    kv_len[t] = number of windows of audios 1 .. max(1, number of <audio> tokens at positions <= t)

An <audio> token already sees its own audio; text before the first one sees audio 1; without any audio kv_len is 0.

**The block** (paper section 3.1 iv; Flamingo, arXiv 2204.14198, section 2.2) stands before an LM layer. Both gates g start
at 0 (in `tiny` g_attn does not: gate_init), so tanh(g) = 0 and training starts from the unchanged language model:

    x <- x + tanh(g_attn) * W_out softmax(q k^T / sqrt(K), keys < kv_len) v        q = W_q LN(x),  [k; v] = W_kv audio
    x <- x + tanh(g_ff)   * W_2 gelu(W_1 LN(x))

**Not in the paper: `audio_index`.** Where text may look at *all* audios so far, a small model is slow to learn which of
them it belongs to. With this setting a learned vector of the audio's number n is added to query and key, E_q[n] and
E_k[n]. They start equal, so that text prefers its own audio; the operation stays the same dot product.

**Nor is `null_key`**: a key and a value of zeros that all text sees, of weight e^0 = 1. A softmax over windows alone gives
one bell and two the same mean; beside the null key, n bells of weight e^s get the share n e^s / (1 + n e^s).
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
    """(B, T): the number of <audio> tokens at positions <= t, at least 1. `seen_B`: how many came before ids_BT."""
    count = (ids_BT == audio_id).cumsum(1)
    if seen_B is not None:
        count = count + seen_B[:, None]
    return count.clamp(min=1)


def visible_windows(number_BT: torch.Tensor, n_windows_BN: torch.Tensor) -> torch.Tensor:
    """kv_len (B, T) int32: windows of audios 1 .. number_BT. n_windows_BN: windows of each audio, 0 where a sample has fewer."""
    ends = F.pad(n_windows_BN.cumsum(1), (1, 0))                       # (B, N + 1): windows of the first n audios
    return ends.gather(1, number_BT.clamp(max=n_windows_BN.shape[1])).to(torch.int32)


class GatedCrossAttention(nn.Module):
    """One block. Keys and values come from `keys_values`, computed once per audio; the module keeps no state of them."""

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
            for n in range(max_audios):  # one orthogonal direction per audio, as long as n < head_dim
                own[n, :, n % config.head_dim] = (OWN_AUDIO_LOGIT * config.head_dim ** 0.5) ** 0.5
            self.index_q = nn.Parameter(own.reshape(max_audios, inner).clone())
            self.index_k = nn.Parameter(own.reshape(max_audios, inner).clone())

    def keys_values(self, audio_BLD: torch.Tensor, number_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Audio tokens and the number (1, 2, ...) of the audio of each -> k, v (B, H, L, K), or L + 1 with the null key first."""
        return self.split(self.kv(audio_BLD), number_BL)

    def split(self, kv_BLI: torch.Tensor, number_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rest of `keys_values`, from the product kv (B, L, 2 H K)."""
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
        """x (B, T, D) -> (B, T, D). kv_len_BT: keys that each token sees, the null key included; the same tensor for all blocks, so that
        a CPU makes its mask once. first_BT: first window that each token sees, where that is not 0 (the ablation `mask = "last"`)."""
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
        """Attention weights on the windows, (B, H, T, L), without the null key's: for pictures and the ablation "last"."""
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
    """`keys_values` of every block in one batched product: on a GPU one launch instead of one per block, with work for all of it.

    The weights are stacked for the call, a copy that is freed after it (af1: 24 blocks of 1024 x 1024, in bf16 50 MB). A CPU has no
    launch to save and would only pay for that copy. `python -m kernels.benchmark` measures time and memory of both ways."""
    weights = torch.stack([block.kv.weight for block in blocks])
    kv = torch.bmm(audio_BLD.flatten(0, 1).expand(len(blocks), -1, -1), weights.mT)      # (blocks, B L, 2 H K)
    return [block.split(part, number_BL) for block, part in zip(blocks, kv.unflatten(1, audio_BLD.shape[:2]))]

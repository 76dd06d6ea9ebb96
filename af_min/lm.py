"""Step 5 of the walk: the decoder-only language model. Reads token ids; gives hidden states and logits. Next: flamingo.py.

An Audio Flamingo is a language model that was taught to listen: this file is the part that only reads. One class serves
two published families, told apart by `LMConfig` alone (OPT: arXiv 2205.01068; Llama: 2302.13971; Qwen2: 2407.10671):

                 OPT                                       Llama, Qwen2
    position     table row added to the embedding          q and k rotated by an angle that grows with the position
    norm         LayerNorm                                 RMSNorm:  x / sqrt(mean(x^2) + eps) * w
    MLP          W2 relu(W1 x)                             W2 (silu(Wg x) * W1 x)
    heads        a key and value head per query head       query heads may share one (grouped-query attention, 2305.13245)

Either way a layer is   x <- x + attention(norm(x));   x <- x + mlp(norm(x)),   and
attention = softmax(q k^T / sqrt(K), over valid tokens up to itself) v.  The gated cross-attention blocks, which let the text
look at the audio, are not known here: `forward` lets its caller act before each layer (`before_layer`).

The legend is config.py's, and here also:   C  tokens so far, cached and new      G  key/value heads
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kernels.attention import attention
from kernels.linear import Linear, linear, pack, together

from .config import LMConfig

POSITION_OFFSET = 2      # OPT's table starts with two rows that no token uses: 0, and 1 for padding


@dataclass
class KVCache:
    """The keys and values of the tokens read so far, so that the next token costs one row of attention instead of the whole text.

    It belongs to the caller and is an argument of `LM.forward`, which writes the new tokens behind the old ones and
    advances `length` once, after the last layer. Setting `length` back forgets the tokens behind it, except in `recent`,
    which a short convolution reads.
    """
    k: list[Tensor]                  # one per layer: (B, G, max_length, K)
    v: list[Tensor]
    recent: list[Tensor]             # one per layer, with LMConfig.conv: (B, conv - 1, D), inputs of its convolution at the last tokens
    mask_BT: Tensor                  # (B, max_length) bool: False where the token is padding
    length: int = 0                  # tokens held, padding included
    padded: bool = False             # some token may be padding; otherwise no mask has to be built

    @property
    def max_length(self) -> int:
        return self.mask_BT.shape[1]

    def append(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values behind `length` -> all of that layer's so far, (B, G, C, K) each."""
        end = self.length + k_BGTK.shape[2]
        self.k[layer][:, :, self.length:end] = k_BGTK
        self.v[layer][:, :, self.length:end] = v_BGTK
        return self.k[layer][:, :, :end].to(k_BGTK.dtype), self.v[layer][:, :, :end].to(v_BGTK.dtype)


def rotary_angles(position_BT: Tensor, head_dim: int, theta: float, scaling: tuple[float, ...] = ()) -> tuple[Tensor, Tensor]:
    """[cos a, cos a], [-sin a, sin a] (B, 1, T, K) of a = position * theta^(-2i/K), i < K/2 (arXiv 2104.09864, eq. 15)."""
    inverse = theta ** (-torch.arange(0, head_dim, 2, device=position_BT.device, dtype=torch.float32) / head_dim)
    if scaling:      # Llama 3.1: pairs that make few turns in `length` tokens turn more slowly, by up to `factor`
        factor, low, high, length = scaling
        kept = ((inverse * length / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        inverse = inverse * (kept + (1 - kept) / factor)
    angle = position_BT[:, None, :, None].float() * inverse
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x_BHTK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i+K/2}) by its angle: then the positions enter q·k only through their difference."""
    return x_BHTK * cos.to(x_BHTK.dtype) + x_BHTK.roll(x_BHTK.shape[-1] // 2, -1) * sin.to(x_BHTK.dtype)


class Attention(nn.Module):
    """Causal self-attention with G <= H key/value heads."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.q = Linear(config.width, config.heads * config.head_dim, bias=config.qkv_bias)
        self.k = Linear(config.width, config.kv_heads * config.head_dim, bias=config.qkv_bias)
        self.v = Linear(config.width, config.kv_heads * config.head_dim, bias=config.qkv_bias)
        self.out = Linear(config.heads * config.head_dim, config.width, bias=config.bias)

    def forward(self, x_BTD: Tensor, layer: int, seen: Tensor | None, angles, cache: KVCache | None) -> Tensor:
        """seen: (B or 1, 1, T, C) bool, or None where plain causal attention says the same; angles: `rotary_angles`, or None (OPT)."""
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in together(x_BTD, self.q, self.k, self.v))
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        y = attention(q, k, v, seen, causal=seen is None and q.shape[2] > 1)
        return self.out(rearrange(y, "b h t k -> b t (h k)"))


class ShortConvolution(nn.Module):
    """Causal and depthwise: y_t = x_t + sum_{i < taps} w_i x_{t-i}. Not in the paper; `LMConfig.conv` says why."""

    def __init__(self, width: int, taps: int):
        super().__init__()
        self.weight = nn.Parameter(0.5 * torch.randn(taps, width))     # row i: the weight of the token i places back

    def forward(self, x_BTD: Tensor, layer: int, valid_BT: Tensor | None, cache: KVCache | None) -> Tensor:
        """valid_BT: False at padding, which counts as 0; a cache gives the taps - 1 inputs before x_BTD and takes the last ones."""
        taps, length = len(self.weight), x_BTD.shape[1]
        if valid_BT is not None:
            x_BTD = x_BTD * valid_BT[..., None]
        before = x_BTD.new_zeros(len(x_BTD), taps - 1, x_BTD.shape[2]) if cache is None else cache.recent[layer].to(x_BTD.dtype)
        padded = torch.cat([before, x_BTD], dim=1)
        if cache is not None:
            keep = padded[:, length:]
            if valid_BT is not None:                                    # padding on the right: a row keeps its last real tokens
                place = (torch.arange(1, length + 1, device=x_BTD.device) * valid_BT).amax(1)
                keep = padded.gather(1, (place[:, None] + torch.arange(taps - 1, device=x_BTD.device))[..., None].expand_as(keep))
            cache.recent[layer].copy_(keep)
        return x_BTD + sum(w * padded[:, taps - 1 - i:taps - 1 - i + length] for i, w in enumerate(self.weight))


class MLP(nn.Module):
    """relu: W2 relu(W1 x).  swiglu: W2 (silu(Wg x) * W1 x)."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.gate = Linear(config.width, config.inner, bias=config.bias) if config.mlp == "swiglu" else None
        self.up = Linear(config.width, config.inner, bias=config.bias)
        self.down = Linear(config.inner, config.width, bias=config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(F.relu(self.up(x_BTD)))
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


def make_norm(config: LMConfig) -> nn.Module:
    return {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[config.norm](config.width, eps=config.norm_eps)


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): the pre-norm residual layer of both families."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)
        self.conv = ShortConvolution(config.width, config.conv) if config.conv else None
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, x_BTD: Tensor, layer: int, seen: Tensor | None, angles, valid_BT: Tensor | None,
                cache: KVCache | None) -> Tensor:
        read_BTD = self.attention_norm(x_BTD)
        if self.conv is not None:
            read_BTD = self.conv(read_BTD, layer, valid_BT, cache)
        x_BTD = x_BTD + self.dropout(self.attention(read_BTD, layer, seen, angles, cache))
        return x_BTD + self.dropout(self.mlp(self.mlp_norm(x_BTD)))


class LM(nn.Module):
    """Token ids -> hidden states (`forward`) -> logits (`logits`)."""

    def __init__(self, config: LMConfig):
        super().__init__()
        check(config)
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.max_positions + POSITION_OFFSET, config.width) \
            if config.positions == "learned" else None
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = make_norm(config)
        self.head = None if config.tied_head else Linear(config.width, config.vocab_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal with variance 1 / width, biases 0; smaller where the residual stream is written to: it sums 2 x layers branches.

        At OPT's width of 2048 that is about its standard deviation of 0.02, which at a width of 128 would start layers near zero.
        Attention starts out copying: W_out is a multiple of W_v transposed, so that a head adds to a token what it attends to
        (on average W_v^T W_v is a multiple of the identity), and in half of the heads W_k = W_q, so that a token attends to its like.
        Both are there to let a tiny model repeat and match sooner what it has read. Heads that share keys and values start as they come.
        """
        std = self.config.width ** -0.5
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                branch_end = name.endswith(("attention.out", "mlp.down"))
                module.weight.normal_(0.0, std / math.sqrt(2 * self.config.layers) if branch_end else std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        for layer in self.layers:
            if layer.attention.v.weight.shape == layer.attention.out.weight.T.shape:
                layer.attention.out.weight.copy_(layer.attention.v.weight.T).mul_(0.4)
                half = layer.attention.q.weight.shape[0] // 2
                layer.attention.k.weight[:half] = layer.attention.q.weight[:half]

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        """An empty cache for `batch` rows of up to `max_length` tokens, in the weights' dtype and on their device."""
        zeros, c = self.embed.weight.new_zeros, self.config
        k, v = ([zeros(batch, c.kv_heads, max_length, c.head_dim) for _ in self.layers] for _ in range(2))
        recent = [zeros(batch, c.conv - 1, c.width) for _ in self.layers if c.conv]
        return KVCache(k, v, recent, zeros(batch, max_length, dtype=torch.bool))

    def forward(self, ids_BT: Tensor, mask_BT: Tensor | None = None, cache: KVCache | None = None,
                before_layer: Callable[[int, Tensor], Tensor] | None = None) -> Tensor:
        """-> hidden (B, T, D), after the final norm.

        ids_BT        int64. With a cache: the tokens that follow those in the cache, one or many
        mask_BT       True (or 1) at real tokens of ids_BT, False at padding; None = nothing here is padding
        cache         read, written, and advanced by T
        before_layer  x = before_layer(i, x) is called before layer i: the gated cross-attention blocks stand here

        A real token's position is the number of real tokens before it, so padding on either side changes no real token's
        result. What comes out at padding is finite and means nothing.
        """
        start, length = (cache.length if cache is not None else 0), ids_BT.shape[1]
        self._check_length(start + length, cache)
        valid_BC = self._valid(ids_BT, mask_BT, cache)
        if valid_BC is None:
            position_BT = torch.arange(start, start + length, device=ids_BT.device)[None]
        else:
            position_BT = (valid_BC.cumsum(1) - 1).masked_fill(~valid_BC, -1)[:, start:]
        x_BTD = self.embed(ids_BT)
        angles = None
        if self.positions is not None:
            x_BTD = x_BTD + self.positions(position_BT + POSITION_OFFSET)
        else:
            angles = rotary_angles(position_BT, self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        seen = seen_keys(valid_BC, start, length, ids_BT.device)
        for i, layer in enumerate(self.layers):
            if before_layer is not None:
                x_BTD = before_layer(i, x_BTD)
            x_BTD = layer(x_BTD, i, seen, angles, None if valid_BC is None else valid_BC[:, start:], cache)
        if cache is not None:
            cache.length += length
        return self.norm(x_BTD)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V). Apart from `forward`, so that training runs this, the widest product, at labelled positions alone."""
        return linear(hidden, (self.head or self.embed).weight)

    def pack(self) -> None:
        """Lay the weights out for inference on a CPU, and nothing else (kernels/linear.py). A head tied to the embedding becomes a copy."""
        if self.head is None:
            self.head = Linear(self.config.width, self.config.vocab_size, bias=False, device="meta")
            self.head.weight = self.embed.weight
        pack(self)
        if self.config.tied_head:                    # a copy of the embedding: no parameter of its own
            weight = self.head.weight.detach()
            del self.head.weight
            self.head.weight = weight

    def _valid(self, ids_BT: Tensor, mask_BT: Tensor | None, cache: KVCache | None) -> Tensor | None:
        """Which of the C tokens so far are real, (B, C) bool; None if all are. Notes the new tokens' mask in the cache."""
        if cache is None:
            return None if mask_BT is None else mask_BT.bool()
        end = cache.length + ids_BT.shape[1]
        cache.mask_BT[:, cache.length:end] = True if mask_BT is None else mask_BT.bool()
        cache.padded = cache.padded or mask_BT is not None
        return cache.mask_BT[:, :end] if cache.padded else None

    def _check_length(self, length: int, cache: KVCache | None) -> None:
        if self.positions is not None and length > self.config.max_positions:
            raise ValueError(f"text of {length} tokens, but the position table holds {self.config.max_positions}")
        if cache is not None and length > cache.max_length:
            raise ValueError(f"text of {length} tokens, but the cache was made for {cache.max_length}")


def seen_keys(valid_BC: Tensor | None, start: int, length: int, device) -> Tensor | None:
    """(B or 1, 1, T, C) bool: the tokens that each new token attends to. None where plain causal attention says the same.

    Token t sees the valid tokens up to itself, and itself even if it is padding: a softmax over nothing would be NaN.
    """
    if valid_BC is None and (start == 0 or length == 1):
        return None
    query, key = torch.arange(start, start + length, device=device)[:, None], torch.arange(start + length, device=device)
    seen_TC = key <= query
    if valid_BC is None:
        return seen_TC[None, None]
    return ((seen_TC & valid_BC[:, None, :]) | (key == query))[:, None]


def check(config: LMConfig) -> None:
    """ValueError for settings that describe no model."""
    for name, known in (("positions", ("learned", "rope")), ("norm", ("layer", "rms")), ("mlp", ("relu", "swiglu"))):
        if getattr(config, name) not in known:
            raise ValueError(f"lm.{name} is {getattr(config, name)!r}; it can be {' or '.join(known)}")
    if config.heads % config.kv_heads:
        raise ValueError(f"lm.heads = {config.heads} is not a multiple of lm.kv_heads = {config.kv_heads}")
    if config.positions == "rope" and config.head_dim % 2:
        raise ValueError(f"lm.head_dim = {config.head_dim} is odd; rope turns pairs")

"""Step 2 of the walk: a window becomes one vector. Reads windows and log-mel of audio.py; next: representation.py.

CLAP trains an audio tower and a text tower so that a sound and its caption get similar vectors. Audio Flamingo takes the
audio tower of ClapCap (arXiv 2309.05767) alone, frozen. It is HTSAT (arXiv 2202.00874): a Swin transformer (arXiv
2103.14030), which reads square images: the log-mel is cut into r pieces of time that are stacked along frequency.

    x = BatchNorm(log-mel), stretched in time to r * image_size frames            (F, M) -> (r image_size, M)
    image[i M + m, t] = x[i image_size + t, m],   i < r = image_size / M          patch x patch pixels make a token
    stages of blocks   x += Attention(LN(x)),  x += MLP(LN(x))                    attention inside squares of w x w tokens
    between stages     2 x 2 tokens merge into one of twice the width
    latent = mean over tokens of LN(x)
    embedding = LN(e + W2 GELU(e)),  e = W1 latent                                not L2-normalised

Swin calls the squares windows. Every second block shifts them by half their side, so that neighbours meet. Position is
known through a learned bias on the attention logits, one number per head and offset between two tokens.

Our own training (`train.py --stage clap`) needs the text tower too. Its loss, for B pairs with unit vectors a_i, t_j:

    p_ij = exp(s a_i . t_j) / sum_k exp(s a_i . t_k)         loss = (rows + columns) / 2,  rows = -mean_i sum_j y_ij log p_ij

y_ij = 1 / (number of captions in the batch equal to caption i) where caption j equals caption i, else 0; columns is the same of
the transposed logits.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from kernels.attention import attention
from kernels.linear import Linear

from .audio import Float32, LogMel
from .config import AudioConfig, ClapConfig


class Block(nn.Module):
    """Pre-norm transformer block: x += proj(softmax(q k^T / sqrt(K) + bias) v), then x += fc2(GELU(fc1 x))."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = Linear(width, 3 * width), Linear(width, width)
        self.fc1, self.fc2 = Linear(width, 4 * width), Linear(4 * width, width)

    def forward(self, x_BTD: Tensor, bias: Tensor) -> Tensor:
        """x (B, T, D) -> (B, T, D). bias (n, 1 or H, T, T) is added to the logits, n a divisor of B: sample b takes that of b % n."""
        q, k, v = rearrange(self.qkv(self.norm1(x_BTD)), "b t (three h k) -> three b h t k", three=3, h=self.heads)
        heard = attention(q, k, v, bias.to(q.dtype))
        x_BTD = x_BTD + self.proj(rearrange(heard, "b h t k -> b t (h k)"))
        return x_BTD + self.fc2(F.gelu(self.fc1(self.norm2(x_BTD))))


class SwinBlock(nn.Module):
    """A block whose attention stays inside squares of w x w tokens of a (side x side) grid. A shifted one first rolls the grid by `shift`
    tokens, wrapping around, and afterwards rolls it back."""

    def __init__(self, width: int, heads: int, side: int, window: int, shifted: bool):
        super().__init__()
        self.window = min(window, side)
        self.shift = self.window // 2 if shifted and side > window else 0
        self.block = Block(width, heads)
        self.bias_table = nn.Parameter(torch.randn((2 * self.window - 1) ** 2, heads) * 0.02)
        row, column = (grid.flatten() for grid in torch.meshgrid(*[torch.arange(self.window)] * 2, indexing="ij"))
        offset = lambda place: place[:, None] - place[None, :] + self.window - 1       # 0 .. 2 w - 2
        self.register_buffer("offsets", offset(row) * (2 * self.window - 1) + offset(column), persistent=False)
        self.register_buffer("wrapped", self._wrapped(side), persistent=False)

    def _wrapped(self, side: int) -> Tensor | None:
        """(windows, 1, w w, w w): -100, a weight of 0, between tokens that only the wrap-around has brought together."""
        if not self.shift:
            return None
        place = torch.arange(side)
        part = (place >= side - self.window).int() + (place >= side - self.shift).int()
        region = rearrange(3 * part[:, None] + part, "(i y) (j x) -> (i j) (y x)", y=self.window, x=self.window)
        return -100.0 * (region[:, None, :, None] != region[:, None, None, :])

    def forward(self, x_AYXD: Tensor) -> Tensor:
        """(A, Y, X, D) -> (A, Y, X, D)."""
        A, side, w = len(x_AYXD), x_AYXD.shape[1], self.window
        bias = rearrange(self.bias_table[self.offsets], "t u h -> 1 h t u")
        if self.shift:
            x_AYXD = x_AYXD.roll((-self.shift, -self.shift), (1, 2))
            bias = bias + self.wrapped
        x = rearrange(x_AYXD, "a (i y) (j x) d -> (a i j) (y x) d", y=w, x=w)
        x = rearrange(self.block(x, bias), "(a i j) (y x) d -> a (i y) (j x) d", a=A, i=side // w, y=w)
        return x.roll((self.shift, self.shift), (1, 2)) if self.shift else x


class Merge(nn.Module):
    """2 x 2 neighbours become one token of twice the width: (A, Y, X, D) -> (A, Y/2, X/2, 2 D)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = Linear(4 * width, 2 * width, bias=False)

    def forward(self, x_AYXD: Tensor) -> Tensor:
        return self.reduction(self.norm(rearrange(x_AYXD, "a (y p) (x q) d -> a y x (q p d)", p=2, q=2)))


class Stage(nn.Module):
    """`depth` blocks on a (side x side) grid, every second one shifted; then a merge, except in the last stage."""

    def __init__(self, width: int, heads: int, depth: int, side: int, window: int, last: bool):
        super().__init__()
        self.blocks = nn.ModuleList(SwinBlock(width, heads, side, window, shifted=n % 2 == 1) for n in range(depth))
        self.merge = nn.Identity() if last else Merge(width)

    def forward(self, x_AYXD: Tensor) -> Tensor:
        for block in self.blocks:
            x_AYXD = block(x_AYXD)
        return self.merge(x_AYXD)


class Projection(nn.Module):
    """The head of either tower: e = W1 x; LN(e + W2 GELU(e))."""

    def __init__(self, width: int, out_width: int):
        super().__init__()
        self.linear1, self.linear2 = Linear(width, out_width, bias=False), Linear(out_width, out_width, bias=False)
        self.norm = nn.LayerNorm(out_width)

    def forward(self, x: Tensor) -> Tensor:
        e = self.linear1(x)
        return self.norm(e + self.linear2(F.gelu(e)))


class MelNorm(Float32, nn.BatchNorm1d):
    """BatchNorm of every mel bin over windows and frames: (A, F, M) -> (A, F, M), in float32."""

    def forward(self, mel_AFM: Tensor) -> Tensor:
        with torch.autocast(mel_AFM.device.type, enabled=False):
            return super().forward(mel_AFM.flatten(0, 1)).view_as(mel_AFM)


class WindowEncoder(nn.Module):
    """Audio windows (A, S) -> embeddings (A, out_width). Exactly ClapCap's HTSAT under the default configuration."""

    def __init__(self, audio: AudioConfig, clap: ClapConfig):
        super().__init__()
        self.clap = clap
        pieces, last = clap.image_size // audio.n_mels, len(clap.depths) - 1
        frames, wanted = 1 + audio.window_samples // audio.stft_hop, pieces * clap.image_size
        assert clap.image_size % audio.n_mels == 0 and frames <= wanted, \
            f"got {frames} frames x {audio.n_mels} mel bins, expected bins that divide {clap.image_size} and at most {wanted} frames"
        self.log_mel = LogMel(audio)
        self.mel_norm = MelNorm(audio.n_mels)
        stretch = F.interpolate(torch.eye(frames)[None, None], (wanted, frames), mode="bicubic", align_corners=True)[0, 0]
        self.register_buffer("stretch", stretch, persistent=False)             # (wanted, frames): bicubic is linear in x
        self.patches = Linear(clap.patch ** 2, clap.width)
        self.patch_norm = nn.LayerNorm(clap.width)
        self.stages = nn.ModuleList(
            Stage(clap.width << n, heads, depth, clap.image_size // clap.patch >> n, clap.attention_window, n == last)
            for n, (depth, heads) in enumerate(zip(clap.depths, clap.heads)))
        self.norm = nn.LayerNorm(clap.width << last)
        self.projection = Projection(clap.width << last, clap.out_width)

    def forward(self, windows_AS: Tensor) -> Tensor:
        mel_AFM = self.stretch.float() @ self.mel_norm(self.log_mel(windows_AS))
        pixels = rearrange(mel_AFM, "a (r x q) (y p) -> a (r y) x (p q)", x=self.clap.image_size // self.clap.patch,
                           p=self.clap.patch, q=self.clap.patch).to(self.patches.weight.dtype)
        x_AYXD = self.patch_norm(self.patches(pixels))
        for stage in self.stages:
            x_AYXD = stage(x_AYXD)
        return self.projection(reduce(self.norm(x_AYXD), "a y x d -> a d", "mean"))


class TextTower(nn.Module):
    """Token ids (B, T) and their mask -> (B, out_width): blocks without a causal mask, then the mean over real tokens."""

    def __init__(self, clap: ClapConfig, vocab_size: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, clap.text_width)
        self.blocks = nn.ModuleList(Block(clap.text_width, clap.text_heads) for _ in range(clap.text_layers))
        self.norm = nn.LayerNorm(clap.text_width)
        self.projection = Projection(clap.text_width, clap.out_width)
        nn.init.normal_(self.embed.weight, std=0.5)

    def forward(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """mask: 1 or True at real tokens, at least one per row. Word order enters through `sines` of the position."""
        place = mask_BT.cumsum(1) - 1                                          # left and right padding give the same
        x_BTD = self.embed(ids_BT) + sines(place, self.embed.embedding_dim).to(self.embed.weight.dtype)
        bias = torch.zeros_like(mask_BT, dtype=x_BTD.dtype).masked_fill(mask_BT == 0, -1e4)[:, None, None, :]
        bias = bias.expand(-1, 1, ids_BT.shape[1], -1)
        for block in self.blocks:
            x_BTD = block(x_BTD, bias)
        real = mask_BT[..., None].to(x_BTD.dtype)
        return self.projection((self.norm(x_BTD) * real).sum(1) / real.sum(1))


def sines(place_BT: Tensor, width: int) -> Tensor:
    """Positions (B, T) -> (B, T, width): first sin, then cos of place / 10000^(2 d / width), d < width / 2."""
    rate = torch.exp(torch.arange(0, width, 2, device=place_BT.device) * (-math.log(10_000) / width))
    angle = place_BT[..., None] * rate
    return torch.cat([angle.sin(), angle.cos()], -1)


def contrastive_loss(audio_BD: Tensor, text_BD: Tensor, log_scale: Tensor, labels_B: Tensor) -> Tensor:
    """Symmetric InfoNCE of B pairs (module docstring); s = exp(log_scale). Equal labels (the same caption) are all positives."""
    logits = log_scale.exp() * F.normalize(audio_BD.float(), dim=-1) @ F.normalize(text_BD.float(), dim=-1).T
    same = (labels_B[:, None] == labels_B[None, :]).to(logits.dtype)
    target = same / same.sum(1, keepdim=True)                                  # symmetric: equal captions share a row sum
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

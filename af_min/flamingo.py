"""Step 6 of the walk: the whole model. Reads window embeddings and token ids, gives a loss or words; next: text.py.

    log p(y | x, i) = sum_t log p(y_t | y_<t, i, x)                   audio x, instruction i, answer y  (paper equation 1)
    interleaved:      sum_j log p(y_j | x_1..j, i_1..j, y_1..j-1)     J triples (x_j, i_j, y_j) in one text  (equation 2)

    windows -> clap.WindowEncoder -> representation.Representation -> keys and values, once per audio
    ids -> lm.LM; before its layers an xattn.GatedCrossAttention attends to those keys and values

State is explicit: `Audio` is what text may look at, `State` adds the LM's key-value cache. Both are arguments and results.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .clap import WindowEncoder
from .cli import UserError
from .config import IGNORE, Config
from .decoding import reader
from .lm import LM, KVCache
from .representation import Representation, packed
from .xattn import GatedCrossAttention, audio_number, keys_values_at_once, visible_windows

LEAST = 1e-30  # least temperature and top-p, and 1 / LEAST the largest temperature, that `draw` uses: beyond, float32 would round to 0 or inf


@dataclass
class Audio:
    """All audios of a batch, encoded: keys and values (B, H, L, K), with the null key L + 1, of every block; the windows of each audio."""
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    n_windows_BN: torch.Tensor


@dataclass
class State:
    """Texts in progress: their audios, the LM's cache, the number of <audio> tokens read (B,). `read` advances it in place."""
    audio: Audio
    cache: KVCache
    seen_B: torch.Tensor
    step: Callable | None = None    # reads one token per row, once decoding has begun (decoding.py)


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. temperature 0 is greedy; top_k 0 and top_p 1 keep every token."""
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


class AudioFlamingo(nn.Module):
    """All of Audio Flamingo: encoder, representation layers, gated cross-attention blocks, language model."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        width, max_audios = config.clap.out_width, config.representation.max_audios
        self.encoder = WindowEncoder(config.audio, config.clap)
        self.representation = Representation(config.representation, width, config.audio.max_windows)
        self.xattn = nn.ModuleDict({  # key: the LM layer that the block stands before
            str(i): GatedCrossAttention(config.xattn, config.lm.width, width, max_audios)
            for i in range(0, config.lm.layers, config.xattn.every)})
        self.lm = LM(config.lm)
        if config.representation.attend_padding:  # embedding of silence, which fills the published model's unused slots
            self.register_buffer("silence", torch.zeros(width))

    # ------------------------------------------------------------------ hearing

    @torch.no_grad()
    def encode(self, windows_AS: torch.Tensor, chunk: int = 64) -> torch.Tensor:
        """Waveform windows (A, S) -> window embeddings (A, D) in float32, by the frozen encoder, `chunk` at a time."""
        return torch.cat([self.encoder(part).float() for part in windows_AS.split(chunk)])

    def represent(self, windows_AWD: torch.Tensor, n_windows_BN: torch.Tensor) -> torch.Tensor:
        """Audio tokens (R, D) of all R windows of the batch, without padding; A: the audios of all samples in order."""
        row_A, number_A = (n_windows_BN > 0).nonzero(as_tuple=True)
        n_windows_A, most, published = n_windows_BN[row_A, number_A], self.config.audio.max_windows, self.config.representation.attend_padding
        window_AW = torch.arange(windows_AWD.shape[1], device=row_A.device).expand(windows_AWD.shape[:2])
        real_AW = window_AW < n_windows_A[:, None]
        if published:                              # one sequence per sample, of all slots, silence in the unused ones; no mask
            shape = len(n_windows_BN), self.config.representation.max_audios * most
            start_A = row_A * shape[1] + number_A * most
        else:
            starts, sequences = packed(n_windows_A.tolist())
            start_A, shape = torch.tensor(starts, device=row_A.device), (sequences, int(n_windows_A.max()))
        place_R = (start_A[:, None] + window_AW)[real_AW]

        def placed(x_R: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
            return empty.expand(math.prod(shape), *x_R.shape[1:]).index_copy(0, place_R, x_R).unflatten(0, shape)

        zero = row_A.new_zeros(1)
        windows_PSD = placed(windows_AWD[real_AW], (self.silence if published else zero).to(windows_AWD.dtype))
        if published:
            heard_PSD = self.representation(windows_PSD)
        else:
            first_A = zero if self.config.xattn.audio_index else number_A * most
            recording_AW = 1 + torch.arange(len(row_A), device=row_A.device)[:, None].expand_as(window_AW)
            heard_PSD = self.representation(windows_PSD, placed((first_A[:, None] + window_AW)[real_AW], zero),
                                            placed(recording_AW[real_AW], zero))
        return heard_PSD.flatten(0, 1)[place_R]

    def listen(self, windows_AWD: torch.Tensor, n_windows_BN: torch.Tensor) -> Audio:
        """Window embeddings of all audios of the batch -> keys and values for every cross-attention block.

        windows_AWD: (A, W, D), the audios of sample 0, then of sample 1, ..., padded to W windows.
        n_windows_BN: (B, N) windows of each audio, 0 where a sample has fewer than N audios. UserError for more than the model takes.
        """
        most, given = self.config.representation.max_audios, n_windows_BN.shape[1]
        if given > most:
            raise UserError(f"a sample with {given} audios, its shots included: this model takes {most} at most; give fewer --shots")
        windows_AWD = windows_AWD.to(self.lm.embed.weight.dtype)
        if self.config.pool_windows and len(windows_AWD):
            real = torch.arange(windows_AWD.shape[1], device=windows_AWD.device) < n_windows_BN[n_windows_BN > 0][:, None]
            windows_AWD = (windows_AWD * real[..., None]).sum(1, keepdim=True) / real.sum(1)[:, None, None]
            n_windows_BN = n_windows_BN.clamp(max=1)
        length_B = n_windows_BN.sum(1)
        longest = int(length_B.max()) if len(length_B) else 0
        slot_L = torch.arange(longest, device=n_windows_BN.device)
        audio_BLD = windows_AWD.new_zeros(len(n_windows_BN), longest, windows_AWD.shape[-1])
        if longest:
            heard_RD = self.represent(windows_AWD, n_windows_BN)
            audio_BLD = audio_BLD.to(heard_RD.dtype).masked_scatter((slot_L < length_B[:, None])[..., None], heard_RD)
        number_BL = (slot_L[:, None] >= n_windows_BN.cumsum(1)[:, None]).sum(-1) + 1
        blocks = [*self.xattn.values()]
        whole = all(type(block.kv.weight) is nn.Parameter for block in blocks)       # sharded ones (FSDP) are not
        if whole and audio_BLD.is_cuda and not torch.is_grad_enabled():
            pairs = keys_values_at_once(blocks, audio_BLD, number_BL)
        else:
            pairs = [block.keys_values(audio_BLD, number_BL) for block in blocks]
        return Audio([k for k, _ in pairs], [v for _, v in pairs], n_windows_BN)

    # ------------------------------------------------------------------ reading

    def hidden(self, ids_BT: torch.Tensor, audio: Audio, mask_BT: torch.Tensor | None = None,
               state: State | None = None) -> torch.Tensor:
        """Text states after the last LM layer, (B, T, D). With a `state` the ids continue what was read before."""
        number_BT = audio_number(ids_BT, self.config.audio_id, state.seen_B if state else None)
        mask, most = self.config.xattn.mask, audio.n_windows_BN.shape[1]
        kv_len_BT = visible_windows(number_BT if mask != "full" else torch.full_like(number_BT, most), audio.n_windows_BN)
        kv_len_BT = kv_len_BT + int(self.config.xattn.null_key)
        first_BT = visible_windows(number_BT - 1, audio.n_windows_BN) if mask == "last" else None
        blocks = {int(layer): (block, k, v) for (layer, block), k, v in zip(self.xattn.items(), audio.keys, audio.values)}

        def look(layer: int, x_BTD: torch.Tensor) -> torch.Tensor:
            if layer not in blocks:
                return x_BTD
            block, k, v = blocks[layer]
            return block(x_BTD, k, v, kv_len_BT, number_BT, first_BT)

        return self.lm(ids_BT, mask_BT, cache=state.cache if state else None, before_layer=look)

    def forward(self, ids_BT: torch.Tensor, labels_BT: torch.Tensor, audio: Audio | None,
                mask_BT: torch.Tensor | None = None) -> torch.Tensor:
        """Negative log-likelihood of every supervised token, (n,): label t + 1 is predicted at t, where it is not IGNORE.

        audio: what `listen` returned, or None: the language model alone, without its cross-attention blocks.
        The head runs on supervised positions alone. Padding on the right needs no mask_BT: causal attention never looks there. The
        caller takes the mean over the *global* batch, so that a token weighs the same on whatever process it was.
        """
        hidden_BTD = self.lm(ids_BT, mask_BT) if audio is None else self.hidden(ids_BT, audio, mask_BT)
        target_BT = labels_BT[:, 1:]
        keep = target_BT != IGNORE
        logits = self.lm.logits(hidden_BTD[:, :-1][keep])
        return F.cross_entropy(logits.float(), target_BT[keep], reduction="none")

    # ------------------------------------------------------------------ answering

    def start(self, audio: Audio, max_length: int) -> State:
        """State of empty texts, of at most `max_length` tokens each, about `audio`."""
        cache = self.lm.new_cache(len(audio.n_windows_BN), max_length)
        return State(audio, cache, torch.zeros(len(cache.mask_BT), dtype=torch.long, device=cache.mask_BT.device))

    @torch.no_grad()
    def read(self, ids_BT: torch.Tensor, state: State, mask_BT: torch.Tensor | None = None) -> torch.Tensor:
        """Read more text (left-padded where mask_BT is False) and return the logits of what follows, (B, V)."""
        hidden_BTD = self.hidden(ids_BT, state.audio, mask_BT, state)
        state.seen_B = state.seen_B + (ids_BT == self.config.audio_id).sum(1)
        return self.lm.logits(hidden_BTD[:, -1]).float()

    @torch.no_grad()
    def generate(self, logits_BV: torch.Tensor, state: State, stop_id: int, pad_id: int, max_new: int,
                 sampling: Sampling = Sampling(), banned: tuple[int, ...] = ()) -> Iterator[torch.Tensor]:
        """Yield one token per row, (B,), until every row has said `stop_id`, or max_new times; rows that have ended yield `pad_id`.

        Every yielded token, the last ones included, is read into `state`, so that a dialogue can go on from it.
        """
        random, read = torch.Generator(device="cpu").manual_seed(sampling.seed), reader(self, state, max_new)
        never = torch.tensor(banned, dtype=torch.long, device=logits_BV.device)
        alive_B = torch.ones(len(logits_BV), dtype=torch.bool, device=logits_BV.device)
        for _ in range(max_new):
            logits_BV = logits_BV.index_fill(1, never, float("-inf"))
            token_B = torch.where(alive_B, draw(logits_BV, sampling, random), pad_id)
            logits_BV = read(token_B[:, None], state, None if alive_B.all() else alive_B[:, None])
            yield token_B
            alive_B = alive_B & (token_B != stop_id)
            if not alive_B.any():
                return


def draw(logits_BV: torch.Tensor, sampling: Sampling, random: torch.Generator) -> torch.Tensor:
    """Next token of every row, (B,): greedy, or from the softmax at `temperature`, cut to top-k, then to the nucleus (1904.09751)."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    temperature = min(max(sampling.temperature, LEAST), 1 / LEAST)
    sorted_BV, order_BV = (logits_BV.cpu() / temperature).sort(-1, descending=True)
    if sampling.top_k:
        sorted_BV[:, sampling.top_k:] = float("-inf")
    probability_BV = sorted_BV.softmax(-1)
    before = probability_BV.cumsum(-1) - probability_BV             # probability of all likelier tokens: the first is always kept
    probability_BV[before >= max(sampling.top_p, LEAST)] = 0.0
    return order_BV.gather(1, torch.multinomial(probability_BV, 1, generator=random))[:, 0].to(logits_BV.device)

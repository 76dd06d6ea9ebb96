"""Questions in batches: what sample.py and evaluate.py have in common.

`read` listens and reads all prompts as one batch, padded on the left; then `answer` generates, or `score` gives the likelihood of
each of some answers:

    log p(option | audio, prompt) = sum_t log p(option_t | option_<t, audio, prompt), <|endofchunk|> included
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from . import checkpoint, data, manifest
from .cli import UserError
from .flamingo import AudioFlamingo, Sampling, State
from .retrieval import Place
from .store import Store
from .text import Sample, Tokenizer, unspeakable, write_sample

MAX_NEW = 24           # tokens of an answer, at most
BATCH_TOKENS = 8000    # padded tokens of one batch: 1.5 GB of cache with `af1` in bfloat16


def grouped(items: Iterable, length: Callable, limit: float = math.inf) -> Iterator[list]:
    """Items in their order, as many together as make BATCH_TOKENS tokens when all are padded to the longest (at least one).

    One longer than `limit`, the tokens that the model holds, only with others as long: padding would cut the shorter ones' answers."""
    batch, longest = [], 0
    for item in items:
        own = length(item)
        most = max(longest, own)
        if batch and ((len(batch) + 1) * most > BATCH_TOKENS or most > limit and own != longest):
            yield batch
            batch, most = [], own
        longest = most
        batch.append(item)
    if batch:
        yield batch


@torch.no_grad()
def read(model: AudioFlamingo, tokenizer: Tokenizer, samples: list[Sample], embeddings: dict[Place, np.ndarray],
         room: int | None = None) -> tuple[State, torch.Tensor]:
    """Listen to all audios and read all prompts, as one batch padded on the left -> state, logits (B, V) of the first token.

    room: tokens that may follow, at most (None: as many as the model can hold). UserError if the prompt fills the model.
    """
    batch = data.collate([(sample, embeddings) for sample in samples], tokenizer.pad_id, model.config.clap.out_width, left=True)
    batch = batch.to(next(model.parameters()).device)
    length, limit = batch.ids_BT.shape[1], model.config.lm.max_positions
    if length >= limit:
        raise UserError(f"the question is {length} tokens long, shots included; this model holds {limit}: shorten it")
    state = model.start(model.listen(batch.windows_AWD, batch.n_windows_BN), limit if room is None else min(limit, length + room))
    logits_BV = model.read(batch.ids_BT, state, None if batch.mask_BT.all() else batch.mask_BT)
    if logits_BV.isnan().any():
        kind = str(model.lm.embed.weight.dtype).removeprefix("torch.")
        raise UserError(f"the model computes NaN: its weights hold one, or its numbers do not fit {kind} (convert it again with another --dtype)")
    return state, logits_BV


def answer(model: AudioFlamingo, tokenizer: Tokenizer, state: State, logits_BV: torch.Tensor, sampling: Sampling, max_new: int,
           told: Callable[[int], None] | None = None) -> list[list[int]]:
    """Tokens of each row's answer, <|endofchunk|> last where it was reached; `told` is told those of row 0 at once."""
    max_new = min(max_new, state.cache.max_length - state.cache.length)
    answers: list[list[int]] = [[] for _ in logits_BV]
    for token_B in model.generate(logits_BV, state, tokenizer.eoc_id, tokenizer.pad_id, max_new, sampling,
                                  unspeakable(tokenizer)):
        for row, (tokens, token) in enumerate(zip(answers, token_B.tolist())):
            if tokens[-1:] != [tokenizer.eoc_id]:
                tokens.append(token)
                if told and row == 0:
                    told(token)
    return answers


@torch.no_grad()
def score(model: AudioFlamingo, tokenizer: Tokenizer, state: State, logits_BV: torch.Tensor, options: list[str]) -> torch.Tensor:
    """log p(option <|endofchunk|> | audio, prompt) of every option, (B, options): the sum over its tokens.

    Each option is read behind the same cached prompt and then forgotten again. UserError if one does not fit.
    """
    first_BV, cache, columns = logits_BV.log_softmax(-1), state.cache, []
    start, recent = cache.length, [x_BTD.clone() for x_BTD in cache.recent]
    for option in options:
        ids = torch.tensor(tokenizer.encode(option) + [tokenizer.eoc_id], device=logits_BV.device)
        if start + len(ids) > cache.max_length:
            raise UserError(f"--options: {option[:40]!r} does not fit behind the question: {cache.max_length} tokens at most")
        hidden_BTD = model.hidden(ids[:-1].expand(len(logits_BV), -1), state.audio, state=state)
        cache.length = start
        for now_BTD, before_BTD in zip(cache.recent, recent):
            now_BTD.copy_(before_BTD)
        later_BTV = model.lm.logits(hidden_BTD).float().log_softmax(-1)
        columns.append(first_BV[:, ids[0]] + later_BTV[:, torch.arange(len(ids) - 1, device=ids.device), ids[1:]].sum(1))
    return torch.stack(columns, 1)


class Answerer:
    """A model with its tokenizer and the window embeddings of a data set: rows in, greedy answers out."""

    def __init__(self, model: AudioFlamingo, tokenizer: Tokenizer, store: Store | dict[Place, np.ndarray], max_new: int = MAX_NEW):
        self.model, self.tokenizer, self.store, self.max_new = model, tokenizer, store, max_new

    @classmethod
    def open(cls, run: Path, folder: Path, rows: list[dict], name: str = "", max_new: int = MAX_NEW, device: str = "cpu") -> "Answerer":
        """The model of a run folder, and the embeddings of all recordings that rows of a data set name (`name`: of the bar)."""
        model, tokenizer = checkpoint.load_run(run, device)
        store = Store(folder, model.encoder, model.config.audio, model.config.clap.out_width)
        store.add(manifest.recordings(rows), name)
        return cls(model, tokenizer, store, max_new)

    def _read(self, rows: list[dict], room: int) -> tuple[State, torch.Tensor]:
        samples = [write_sample(self.tokenizer, row, complete=False) for row in rows]
        return read(self.model, self.tokenizer, samples, self.store, room)

    def batch(self, rows: list[dict]) -> list[str]:
        """Answers to rows that end with their question, as one batch."""
        tokens = answer(self.model, self.tokenizer, *self._read(rows, self.max_new), Sampling(), self.max_new)
        return [self.tokenizer.decode(ids) for ids in tokens]

    def likelihoods(self, rows: list[dict], options: list[str]) -> np.ndarray:
        """log p of every option as the answer, (rows, options), as one batch."""
        longest = max(len(self.tokenizer.encode(option)) + 1 for option in options)
        return score(self.model, self.tokenizer, *self._read(rows, longest), options).cpu().numpy()

    def batches(self, rows: list[dict]) -> Iterator[list[int]]:
        """The numbers of the rows in batches, each of rows of similar length."""
        lengths = [len(write_sample(self.tokenizer, row, complete=False).ids) for row in rows]
        return grouped(sorted(range(len(rows)), key=lengths.__getitem__), lengths.__getitem__,
                       self.model.config.lm.max_positions - self.max_new)

    def answer(self, rows: list[dict]) -> list[str]:
        """Answers in the order of `rows`."""
        answers = [""] * len(rows)
        for batch in self.batches(rows):
            for i, said in zip(batch, self.batch([rows[i] for i in batch])):
                answers[i] = said
        return answers

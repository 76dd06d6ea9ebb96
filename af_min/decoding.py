"""One token a row at fixed shapes: what decoding repeats, recorded on a GPU as one CUDA graph. Used by flamingo.generate.

A token of `af1` at batch 1 takes 600 kernels, most of them too short to hide the launch of the next. A CUDA graph launches them
together, but as they were recorded: addresses, shapes and what Python computed stay; only numbers in memory may change.
`AudioFlamingo.read` writes a token to slot `length` of the cache and lets it attend to `length + 1` slots, which Python computes.
Here, with C slots in all,

    the token is always read at the last slot, C - 1, and attends to all C, masked by which of them hold a real token;
    then its key and value are moved to slot `place`, a number in memory.

A position is the number of real tokens before, so the slot itself means nothing. The price is the bandwidth of slots still
empty. Padding changes no state; hence it serves to warm up before the recording.

No GPU has recorded it yet. The same step runs unrecorded on a CPU (tests/test_decoding.py), and recorded on a pretended GPU
(tests/pretend_gpu.py), which refuses what a recording refuses and replays with the numbers of the recording.
"""
from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

WORTH = 8     # tokens from which a recording, which costs as much as a few of them, is made


class FixedStep:
    """`model.read` of one token a row, for the caches of one `State`; to be called as step(ids_B1, state, mask_B1)."""

    def __init__(self, model, state):
        """On a GPU this records the graph; RuntimeError where that fails. The cache must not be full; `state` stands for the
        same texts as before, its cache consists of views of two tensors from now on."""
        self.model, cache = model, state.cache
        self.state = dataclasses.replace(state, seen_B=state.seen_B.clone(), step=None)
        self.k, self.v = torch.stack(cache.k), torch.stack(cache.v)              # (layers, B, G, C, K): moved in one go
        cache.k, cache.v = [*self.k], [*self.v]
        self.token_B1 = torch.full_like(state.seen_B, 0)[:, None]
        self.real_B1 = torch.zeros_like(self.token_B1, dtype=torch.bool)
        self.place = torch.full_like(self.token_B1[0], cache.length)
        self.slot_C = torch.arange(cache.max_length, device=self.place.device)
        self.launch = self.record() if self.place.is_cuda else self.step

    def step(self) -> Tensor:
        """What is recorded: token_B1 is read -> logits (B, V)."""
        cache, state = self.state.cache, self.state
        length, padded = cache.length, cache.padded
        cache.mask_BT &= self.slot_C < self.place
        cache.length = cache.max_length - 1
        try:
            hidden_BTD = self.model.hidden(self.token_B1, state.audio, self.real_B1, state)
        finally:
            cache.length, cache.padded = length, padded
        for kept in (self.k, self.v):
            kept.index_copy_(3, self.place, kept[:, :, :, -1:].clone())
        cache.mask_BT.index_copy_(1, self.place, self.real_B1)
        state.seen_B += ((self.token_B1 == self.model.config.audio_id) & self.real_B1).sum(1)
        return self.model.lm.logits(hidden_BTD[:, -1]).float()

    def record(self) -> Callable[[], Tensor]:
        """Two steps beforehand let kernels compile and libraries set themselves up, which no recording may contain."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step(), self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits_BV = self.step()

        def replay() -> Tensor:
            graph.replay()
            return logits_BV
        return replay

    def __call__(self, ids_B1: Tensor, state, mask_B1: Tensor | None = None) -> Tensor:
        """Logits (B, V) of what follows; the next call writes over them."""
        cache = state.cache
        if cache.length >= cache.max_length:
            return self.model.read(ids_B1, state, mask_B1)                        # which says what is wrong
        self.token_B1.copy_(ids_B1)
        self.real_B1.fill_(True) if mask_B1 is None else self.real_B1.copy_(mask_B1)
        self.place.fill_(cache.length)
        self.state.seen_B.copy_(state.seen_B)
        logits_BV = self.launch()
        state.seen_B = self.state.seen_B
        cache.length += 1
        cache.padded = cache.padded or mask_B1 is not None
        return logits_BV


def reader(model, state, max_new: int) -> Callable[..., Tensor]:
    """What reads the tokens of an answer: on a GPU a `FixedStep`, kept in the state for later turns; elsewhere `model.read`.

    AF_MIN_KERNELS=reference means plain PyTorch, which includes no graph. A recording that fails is a warning with its reason."""
    room = min(max_new, state.cache.max_length - state.cache.length)
    if state.step is None and room >= WORTH and state.seen_B.is_cuda and os.environ.get("AF_MIN_KERNELS") != "reference":
        try:
            state.step = FixedStep(model, state)
        except (RuntimeError, ValueError) as error:
            while error.__context__:                   # a recording that breaks off fails again where it ends, without the reason
                error = error.__context__
            warnings.warn(f"decoding without a CUDA graph: {(str(error).strip() or type(error).__name__).splitlines()[0]}")
            state.step = model.read
    return state.step or model.read

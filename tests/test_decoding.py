"""decoding.py: the step of fixed shape says what the ordinary loop says and leaves the same state (recorded: test_on_a_gpu.py)."""
import dataclasses

import pytest
import torch

from af_min import decoding
from af_min.flamingo import AudioFlamingo, Sampling
from conftest import shake

PAD, END = 0, 3
LMS = {"learned positions": {}, "rope, convolution": dict(positions="rope", conv=3), "shared keys": dict(norm="rms", mlp="swiglu", kv_heads=1)}


@pytest.fixture(scope="module", params=LMS.values(), ids=LMS)
def model(request, micro_config):
    xattn = dataclasses.replace(micro_config.xattn, audio_index=True)
    return shake(AudioFlamingo(dataclasses.replace(micro_config, lm=dataclasses.replace(micro_config.lm, **request.param), xattn=xattn)),
                 scale=0.2)


def begin(model, room=40):
    """Three samples of two, one and no audios, padded on the left -> state, logits."""
    draws = torch.Generator().manual_seed(0)
    n_windows = torch.tensor([[3, 2], [5, 0], [0, 0]])
    ids = torch.randint(10, 300, (3, 9), generator=draws)
    ids[0, [1, 5]] = ids[1, 4] = model.config.audio_id
    mask = torch.arange(9) >= torch.tensor([[0], [3], [5]])
    windows = torch.randn(3, 5, model.config.clap.out_width, generator=draws)
    state = model.start(model.listen(windows, n_windows), 9 + room)
    return state, model.read(ids, state, mask)


def assert_same_state(got, want):
    length = want.cache.length
    assert got.cache.length == length and got.cache.padded == want.cache.padded and torch.equal(got.seen_B, want.seen_B)
    assert torch.equal(got.cache.mask_BT[:, :length], want.cache.mask_BT[:, :length])
    for a, b in zip((*got.cache.k, *got.cache.v, *got.cache.recent), (*want.cache.k, *want.cache.v, *want.cache.recent)):
        cut = slice(None) if a.ndim == 3 else (..., slice(length), slice(None))
        torch.testing.assert_close(a[cut], b[cut], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_fixed_steps_say_what_the_ordinary_loop_says(model):
    """Two turns, rows that end at different times, the cache full at the last token."""
    said, states = {}, {}
    for fixed in (False, True):
        state, logits = begin(model, room=30)
        state.step = decoding.FixedStep(model, state) if fixed else None
        first = [token.tolist() for token in model.generate(logits, state, END, PAD, 12, Sampling(1.5, seed=5))]
        question = torch.tensor([[20, model.config.audio_id, 21]] * 3)
        state.cache.length -= 1                                        # a token forgotten: what lies behind `length` means nothing
        logits = model.read(question, state)
        room = state.cache.max_length - state.cache.length
        second = [token.tolist() for token in model.generate(logits, state, END, PAD, room, Sampling(1.5, seed=6))]
        said[fixed], states[fixed] = first + second, state
    assert said[True] == said[False] and len(said[True]) > 15
    assert_same_state(states[True], states[False])


@torch.no_grad()
def test_warming_up_changes_nothing_and_a_full_cache_is_the_ordinary_error(model):
    """Steps of padding, as before a recording; then the same logits until the cache is full."""
    state, plain = begin(model, 3)[0], begin(model, 3)[0]
    step = decoding.FixedStep(model, state)
    step.step(), step.step()
    assert_same_state(state, plain)
    for token in torch.randint(10, 300, (3, 3, 1)):
        torch.testing.assert_close(step(token, state), model.read(token, plain), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="the cache was made for"):
        step(torch.full((3, 1), 20), state)
    assert_same_state(state, plain)


@torch.no_grad()
def test_a_recording_that_fails_is_a_warning_and_the_ordinary_loop(micro_config, monkeypatch):
    """The reason is told once, the answer is the same; without a GPU nobody tries, nor with AF_MIN_KERNELS=reference."""
    model = shake(AudioFlamingo(micro_config), scale=0.2)
    state, logits = begin(model)
    wanted = [token.tolist() for token in model.generate(logits, state, -1, PAD, 10)]
    assert state.step is None

    class Fails:
        def __init__(self, model, state):
            try:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")         # as torch.cuda.graph ends
    monkeypatch.setattr(decoding, "FixedStep", Fails)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.delenv("AF_MIN_KERNELS", raising=False)
    state, logits = begin(model)
    with pytest.warns(UserWarning, match="^decoding without a CUDA graph: operation not permitted when stream is capturing$"):
        read = decoding.reader(model, state, 10)
    assert decoding.reader(model, state, 10) == read == model.read
    monkeypatch.undo()
    assert [token.tolist() for token in model.generate(logits, state, -1, PAD, 10)] == wanted

"""representation.py: the equations of its docstring, computed again in numpy float64, one recording at a time."""
import dataclasses
import math

import numpy as np
import pytest
import torch

from af_min.cli import UserError
from af_min.config import RepresentationConfig
from af_min.flamingo import AudioFlamingo
from af_min.representation import Representation, packed, sinusoid_table
from conftest import array, layer_norm, shake

WIDTH, MAX_WINDOWS = 12, 6
CONFIG = RepresentationConfig(layers=3, heads=4, inner=20, max_audios=3)


def position_row(position, width):
    return [(math.cos if i % 2 else math.sin)(position / 10_000 ** (2 * (i // 2) / width)) for i in range(width)]


def by_formula(module, windows_WD, positions, real=None):
    """y0 = LN(sqrt(D) x + pos); then LN(MHA(y) + y) and LN(W2 relu(W1 a) + a) a layer. `real`: windows that are keys (None: all)."""
    x = np.asarray(windows_WD, np.float64)
    width = x.shape[1]
    y = layer_norm(math.sqrt(width) * x + np.array([position_row(p, width) for p in positions]), module.norm, 1e-6)
    for attend, feed_forward in module.layers:
        q, k, v = (y @ array(linear.weight).T for linear in (attend.q, attend.k, attend.v))
        size, heads = width // attend.heads, []
        for h in range(attend.heads):
            part = slice(h * size, (h + 1) * size)
            scores = q[:, part] @ k[:, part].T / math.sqrt(size)
            if real is not None:
                scores[:, ~real] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, part])
        a = layer_norm(np.concatenate(heads, 1) @ array(attend.out.weight).T + y, attend.norm, 1e-6)
        inner = np.maximum(a @ array(feed_forward.up.weight).T + array(feed_forward.up.bias), 0)
        y = layer_norm(inner @ array(feed_forward.down.weight).T + array(feed_forward.down.bias) + a, feed_forward.norm, 1e-6)
    return y


def windows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def module():
    return shake(Representation(CONFIG, WIDTH, MAX_WINDOWS), scale=0.3)


# ---------------------------------------------------------------------- positions

def test_the_position_table_is_sine_and_cosine_interleaved():
    table = sinusoid_table(129, 6)
    assert table.shape == (129, 6)
    assert table[0].tolist() == [0, 1, 0, 1, 0, 1]
    expected = [math.sin(128), math.cos(128), math.sin(128 / 10_000 ** (2 / 6)), math.cos(128 / 10_000 ** (2 / 6)),
                math.sin(128 / 10_000 ** (4 / 6)), math.cos(128 / 10_000 ** (4 / 6))]
    assert table[128].tolist() == pytest.approx(expected, abs=1e-7)
    assert all(table[p].tolist() == pytest.approx(position_row(p, 6), abs=1e-7) for p in range(129))


# ---------------------------------------------------------------------- the layers

@torch.no_grad()
def test_the_layers_are_their_equations(module):
    x = windows(2, MAX_WINDOWS, WIDTH)
    for one, got in zip(x, module(x)):
        assert np.abs(got.numpy() - by_formula(module, one, range(MAX_WINDOWS))).max() < 1e-5


@torch.no_grad()
def test_recordings_of_one_sequence_do_not_hear_each_other(module):
    """Nor what stands in unused slots; each has its own positions, which can begin anywhere."""
    x = windows(1, 9, WIDTH)
    recording, position = torch.tensor([[1, 1, 1, 0, 2, 2, 2, 2, 0]]), torch.tensor([[0, 1, 2, 0, 12, 13, 14, 15, 0]])
    got = module(x, position, recording)
    for part, places in ((slice(0, 3), range(3)), (slice(4, 8), range(12, 16))):
        assert np.abs(got[0, part].numpy() - by_formula(module, x[0, part], places)).max() < 1e-5
    x[0, [3, 8]] = 1e3
    again = module(x, position, recording)
    assert torch.equal(again[0, :3], got[0, :3]) and torch.equal(again[0, 4:8], got[0, 4:8])


@pytest.mark.parametrize("lengths, sequences", [([4], 1), ([1, 5, 3, 2, 2, 2], 4), ([2, 2, 2], 3), ([3, 1, 1, 1], 2), ([1] * 7, 7)])
def test_recordings_are_packed_without_overlap(lengths, sequences):
    starts, count = packed(lengths)
    slots = [slot for start, length in zip(starts, lengths) for slot in range(start, start + length)]
    assert count == sequences and len(set(slots)) == sum(lengths) and max(slots) < count * max(lengths)
    assert all(start // max(lengths) == (start + length - 1) // max(lengths) for start, length in zip(starts, lengths))


@torch.no_grad()
def test_the_order_of_windows_matters(module):
    x = windows(1, 4, WIDTH)
    assert (module(x).flip(1) - module(x.flip(1))).abs().max() > 0.1


# ---------------------------------------------------------------------- several audios in a sample

N_WINDOWS = torch.tensor([[3, 6, 0], [2, 0, 0], [0, 0, 0], [1, 4, 5]])       # audios of four samples
NUMBERS = [0, 1, 0, 0, 1, 2]                                               # of each audio within its sample


def flamingo(micro_config, attend_padding, audio_index):
    config = dataclasses.replace(
        micro_config, audio=dataclasses.replace(micro_config.audio, max_windows=MAX_WINDOWS),
        clap=dataclasses.replace(micro_config.clap, out_width=WIDTH),
        representation=dataclasses.replace(CONFIG, attend_padding=attend_padding),
        xattn=dataclasses.replace(micro_config.xattn, audio_index=audio_index))
    return shake(AudioFlamingo(config), scale=0.3)


@pytest.mark.parametrize("audio_index", [False, True], ids=["paper", "audio_index"])
@torch.no_grad()
def test_every_audio_is_heard_for_itself_at_its_slots_positions(micro_config, audio_index):
    """Window w of audio n stands at n * max_windows + w; where the blocks number audios themselves, every audio begins at 0."""
    model, x = flamingo(micro_config, False, audio_index), windows(6, 6, WIDTH)
    got = model.represent(x, N_WINDOWS).split(N_WINDOWS[N_WINDOWS > 0].tolist())
    for a, (number, n) in enumerate(zip(NUMBERS, N_WINDOWS[N_WINDOWS > 0].tolist())):
        first = 0 if audio_index else number * MAX_WINDOWS
        assert np.abs(got[a].numpy() - by_formula(model.representation, x[a, :n], range(first, first + n))).max() < 1e-5


@torch.no_grad()
def test_attend_padding_is_one_sequence_of_all_slots_filled_with_silence(micro_config):
    """The published layout: max_audios slots of max_windows; silence where no window is; nothing masked."""
    model, x = flamingo(micro_config, True, False), windows(6, 6, WIDTH)
    model.silence.copy_(windows(WIDTH, seed=7))
    got, a = model.represent(x, N_WINDOWS).split(N_WINDOWS[N_WINDOWS > 0].tolist()), 0
    for counts in N_WINDOWS.tolist():
        slots = np.tile(array(model.silence), (CONFIG.max_audios * MAX_WINDOWS, 1))
        own = range(a, a + sum(n > 0 for n in counts))
        for slot, audio in enumerate(own):
            slots[slot * MAX_WINDOWS:slot * MAX_WINDOWS + counts[slot]] = x[audio, :counts[slot]].numpy()
        expected = by_formula(model.representation, slots, range(len(slots)))
        for slot, audio in enumerate(own):
            first = slot * MAX_WINDOWS
            assert np.abs(got[audio].numpy() - expected[first:first + counts[slot]]).max() < 1e-5
        a += len(own)
    assert a == 6


@pytest.mark.parametrize("attend_padding", [False, True])
def test_more_audios_than_the_model_takes_are_refused(micro_config, attend_padding):
    """They would stand in the slots of the next sample, or behind the position table."""
    with pytest.raises(UserError, match="a sample with 4 audios, its shots included: this model takes 3 at most"):
        flamingo(micro_config, attend_padding, False).listen(windows(5, 2, WIDTH), torch.tensor([[2, 2, 2, 2], [1, 0, 0, 0]]))


def test_a_new_model_hears_what_its_encoder_heard():
    """Before training an audio token is its own window and place, to a tenth; layers that began at full size would change more."""
    torch.manual_seed(0)
    width = 128
    module, heard = Representation(dataclasses.replace(CONFIG, inner=256), width, 20), windows(8, 20, width)
    place = np.array([position_row(p, width) for p in range(20)])
    expected = np.stack([layer_norm(math.sqrt(width) * array(x) + place, module.norm, 1e-6) for x in heard])

    def changed():
        return np.linalg.norm(array(module(heard)) - expected) / np.linalg.norm(expected)
    assert 0.001 < changed() < 0.1
    with torch.no_grad():
        for attend, feed_forward in module.layers:
            for parameter in (attend.out.weight, feed_forward.down.weight, feed_forward.down.bias):
                parameter *= 10
    assert changed() > 0.3

"""xattn.py: who may hear what, counted by hand; the gated block against a dense float64 computation with the mask written out."""
import dataclasses
import math

import numpy as np
import pytest
import torch

from af_min.config import XattnConfig
from af_min.xattn import OWN_AUDIO_LOGIT, GatedCrossAttention, audio_number, visible_windows
from conftest import array, layer_norm, shake

A, t = 9, 1             # ids: <audio>, and any text


def kv_len(ids, n_windows, seen=None):
    number = audio_number(torch.tensor([ids]), A, None if seen is None else torch.tensor([seen]))
    return visible_windows(number, torch.tensor([n_windows]).reshape(1, -1))[0].tolist()


# ---------------------------------------------------------------------- kv_len

@pytest.mark.parametrize("ids, n_windows, expected", [
    ([A, t, t], [5], [5, 5, 5]),                                    # <audio> sees its own audio
    ([t, t, A, t], [5], [5, 5, 5, 5]),                              # text before the first <audio> sees audio 1
    ([t, A, t, A, t], [5, 3], [5, 5, 5, 8, 8]),                     # ... and never audio 2
    ([A, A, t, A, t], [1, 16, 2], [1, 17, 17, 19, 19]),
    ([t, A, t], [5, 0, 0], [5, 5, 5]),                              # slots that the sample does not use
    ([t, t, t], [0, 0], [0, 0, 0]),                                 # no audio
    ([t, t, t], [], [0, 0, 0]),                                     # nobody in the batch has one
    ([t, A, t], [4, 6], [4, 4, 4]),                                 # an audio whose <audio> was cut off stays unheard
])
def test_kv_len_by_hand(ids, n_windows, expected):
    assert kv_len(ids, n_windows) == expected


@pytest.mark.parametrize("cut", range(1, 6))
def test_kv_len_of_a_text_read_in_two_parts(cut):
    ids, n_windows = [t, A, t, A, t, t], [5, 3]
    first, second = ids[:cut], ids[cut:]
    assert kv_len(first, n_windows, seen=0) + kv_len(second, n_windows, seen=first.count(A)) == [5, 5, 5, 8, 8, 8]


def test_kv_len_never_decreases_and_is_int32():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 4, (50, 40), generator=generator)
    n_windows = torch.randint(1, 17, (50, int((ids == 0).sum(1).max())), generator=generator)
    got = visible_windows(audio_number(ids, 0), n_windows)
    assert got.dtype == torch.int32 and (got.diff(dim=1) >= 0).all()
    for row, counts, lengths in zip(ids.tolist(), n_windows.tolist(), got.tolist()):
        assert lengths == [sum(counts[:max(1, row[:i + 1].count(0))]) for i in range(len(row))]


# ---------------------------------------------------------------------- the block

WIDTH, AUDIO_WIDTH = 12, 10
CONFIG = XattnConfig(heads=3, head_dim=4, ff_mult=2, gate_init=0.7)
SAMPLES = [  # ids, windows of each audio: three audios, one, none
    ([t, t, A, t, A, A, t], [2, 3, 1]),
    ([A, t, t, t, t, t, t], [4, 0, 0]),
    ([t, t, t, t, t, t, t], [0, 0, 0])]


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def block_triangular(ids, n_windows):
    """(T, L) bool, block by block: text after the n-th <audio> against the windows of audio m: m <= n."""
    owner = [m + 1 for m, n in enumerate(n_windows) for _ in range(n)]
    return np.array([[m <= max(1, ids[:i + 1].count(A)) for m in owner] for i in range(len(ids))]).reshape(len(ids), len(owner))


def attention_by_formula(block, x, audio, ids, n_windows):
    """-> the attention weights (H, T, L) and what is heard (T, H K), of one sample."""
    mask, inner = block_triangular(ids, n_windows), CONFIG.heads * CONFIG.head_dim
    q = layer_norm(x, block.norm) @ array(block.q.weight).T
    k, v = audio @ array(block.kv.weight[:inner]).T, audio @ array(block.kv.weight[inner:]).T
    if block.index_q is not None:
        q = q + array(block.index_q)[[max(1, ids[:i + 1].count(A)) - 1 for i in range(len(ids))]]
        k = k + array(block.index_k)[[m for m, n in enumerate(n_windows) for _ in range(n)]]
    weights, heads = [], []
    for h in range(CONFIG.heads):
        part = slice(h * CONFIG.head_dim, (h + 1) * CONFIG.head_dim)
        e = np.where(mask, np.exp(q[:, part] @ k[:, part].T / math.sqrt(CONFIG.head_dim)), 0.0)
        weights.append(e / np.maximum(e.sum(-1, keepdims=True) + block.null_key, 1e-300))          # the null key's share: e^0
        heads.append(weights[-1] @ v[:, part])
    return np.stack(weights), np.concatenate(heads, 1)


def block_by_formula(block, x, audio, ids, n_windows):
    heard = attention_by_formula(block, x, audio, ids, n_windows)[1]
    x = x + math.tanh(float(block.attn_gate)) * heard @ array(block.out.weight).T
    return x + math.tanh(float(block.ff_gate)) * gelu(layer_norm(x, block.ff_norm) @ array(block.up.weight).T) @ array(block.down.weight).T


@pytest.fixture(params=[{}, {"audio_index": True}, {"null_key": True}, {"audio_index": True, "null_key": True}], ids=lambda s: "+".join(s) or "paper")
def block(request):
    return shake(GatedCrossAttention(dataclasses.replace(CONFIG, **request.param), WIDTH, AUDIO_WIDTH, 4), scale=0.4)


def a_batch():
    """Text states, packed audio tokens with rubbish behind each sample's own, kv_len, and the numbers of audios on both sides."""
    generator = torch.Generator().manual_seed(3)
    ids, n_windows = (torch.tensor([sample[i] for sample in SAMPLES]) for i in (0, 1))
    longest = int(n_windows.sum(1).max())
    x, audio = torch.randn(3, 7, WIDTH, generator=generator), torch.randn(3, longest, AUDIO_WIDTH, generator=generator) * 2
    number_BT = audio_number(ids, A)
    number_BL = torch.tensor([(o := [m + 1 for m, n in enumerate(s[1]) for _ in range(n)]) + [len(s[1])] * (longest - len(o))
                              for s in SAMPLES])
    return x, audio, visible_windows(number_BT, n_windows), number_BT, number_BL


@torch.no_grad()
def test_the_block_is_its_equations_under_the_block_triangular_mask(block):
    x, audio, lengths, number_BT, number_BL = a_batch()
    got = block(x, *block.keys_values(audio, number_BL), lengths + block.null_key, number_BT)
    for b, (ids, n_windows) in enumerate(SAMPLES):
        expected = block_by_formula(block, array(x[b]), array(audio[b, :sum(n_windows)]), ids, n_windows)
        assert np.abs(got[b].numpy() - expected).max() < 1e-5


@torch.no_grad()
def test_the_weights_drawn_in_pictures_are_those_of_the_equation(block):
    x, audio, lengths, number_BT, number_BL = a_batch()
    got = block.attention(x, block.keys_values(audio, number_BL)[0], lengths + block.null_key, number_BT).numpy()
    for b, (ids, n_windows) in enumerate(SAMPLES):
        own = sum(n_windows)
        expected = attention_by_formula(block, array(x[b]), array(audio[b, :own]), ids, n_windows)[0]
        assert (got[b, :, :, own:] == 0).all() and np.abs(got[b, :, :, :own] - expected).max(initial=0) < 1e-6
    assert block.null_key or np.abs(got[:2].sum(-1) - 1).max() < 1e-6


@torch.no_grad()
def test_a_gate_of_zero_leaves_the_text_bit_for_bit_and_can_open():
    closed = shake(GatedCrossAttention(CONFIG, WIDTH, AUDIO_WIDTH, 4), scale=0.4)
    closed.attn_gate.zero_(), closed.ff_gate.zero_()
    x, audio, lengths, number_BT, number_BL = a_batch()
    assert torch.equal(closed(x, *closed.keys_values(audio, number_BL), lengths, number_BT), x)
    with torch.enable_grad():
        closed(x, *closed.keys_values(audio, number_BL), lengths, number_BT).square().sum().backward()
    assert closed.attn_gate.grad.abs() > 1e-3 and closed.ff_gate.grad.abs() > 1e-3
    assert (closed.kv.weight.grad == 0).all(), "a closed gate lets nothing through, gradients neither"


@torch.no_grad()
@pytest.mark.parametrize("config", [XattnConfig(), CONFIG], ids=["paper", "open"])
def test_gates_start_where_the_setting_says(config):
    """The attention's at tanh(gate_init), the feed-forward's closed; in the paper's setting both are closed."""
    new = GatedCrossAttention(config, 8, 8, 2)
    assert float(new.attn_gate) == pytest.approx(config.gate_init) and float(new.ff_gate) == XattnConfig().gate_init == 0


def test_inner_width_and_biases_are_the_published_ones():
    """8 heads of 64 whatever the LM's width; q, kv, out and the feed-forward without bias; both norms with."""
    shapes = {name: tuple(p.shape) for name, p in GatedCrossAttention(XattnConfig(), 48, 40, 2).named_parameters()}
    assert shapes == {"attn_gate": (1,), "ff_gate": (1,), "norm.weight": (48,), "norm.bias": (48,), "q.weight": (512, 48),
                      "kv.weight": (1024, 40), "out.weight": (48, 512), "ff_norm.weight": (48,), "ff_norm.bias": (48,),
                      "up.weight": (192, 48), "down.weight": (48, 192)}


def test_audio_index_starts_as_a_preference_for_the_own_audio():
    """Between text under audio n and keys of audio m the logit q·k / sqrt(K) gains OWN_AUDIO_LOGIT if n = m, else nothing."""
    block = GatedCrossAttention(XattnConfig(heads=2, head_dim=8, audio_index=True), 6, 6, 5)
    q, k = (array(e).reshape(5, 2, 8) for e in (block.index_q, block.index_k))
    for h in range(2):
        assert np.allclose(q[:, h] @ k[:, h].T / math.sqrt(8), OWN_AUDIO_LOGIT * np.eye(5), atol=1e-5)

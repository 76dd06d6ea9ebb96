"""lm.py: the same logits as the published families, whatever the padding and however the text is cut into reads."""
import dataclasses
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from af_min.config import TINY, LMConfig
from af_min.lm import LM, rotary_angles, rotate
from af_min.pretrained_lm import TABLES, expand, lm_config, load_lm, shapes_of

OPT = LMConfig(vocab_size=61, width=32, layers=3, heads=4, kv_heads=4, head_dim=8, inner=48, max_positions=40)
LLAMA = LMConfig(vocab_size=61, width=32, layers=3, heads=4, kv_heads=2, head_dim=8, inner=48, max_positions=40, positions="rope",
                 norm="rms", mlp="swiglu", qkv_bias=False, bias=False, tied_head=False)
QWEN = dataclasses.replace(LLAMA, heads=6, kv_heads=3, qkv_bias=True, tied_head=True)
MIXED = dataclasses.replace(TINY.lm, vocab_size=61)          # rope with LayerNorm and ReLU
FAMILIES = pytest.mark.parametrize("config", [OPT, LLAMA, QWEN, MIXED], ids=["opt", "llama", "qwen2", "tiny"])


def shaken(module, seed=0, scale=0.1):
    """Random weights large enough that attention, norms and biases all matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return module.eval()


def some_ids(batch=3, length=12, vocab=61, seed=1):
    return torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(ids_BT, lengths, side):
    """ids cut to `lengths` and padded with 1 on one side, with their mask."""
    longest = max(lengths)
    ids, mask = torch.ones(len(lengths), longest, dtype=torch.long), torch.zeros(len(lengths), longest, dtype=torch.bool)
    for b, n in enumerate(lengths):
        where = slice(longest - n, longest) if side == "left" else slice(0, n)
        ids[b, where], mask[b, where] = ids_BT[b, :n], True
    return ids, mask


def relative(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


# ------------------------------------------------------------------ what must hold without a peer

@FAMILIES
@torch.no_grad()
def test_cut_into_reads_of_any_length_the_result_is_the_same(config):
    lm, ids = shaken(LM(config)), some_ids()
    whole = lm(ids)
    for cuts in ([12], [1] * 12, [5, 1, 1, 5], [1, 7, 4]):
        cache = lm.new_cache(3, 20)
        parts = torch.cat([lm(part, cache=cache) for part in ids.split(cuts, dim=1)], dim=1)
        assert cache.length == 12
        assert relative(parts, whole) < 1e-5


@FAMILIES
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_no_real_token(config, side):
    lm, all_ids, lengths = shaken(LM(config)), some_ids(), [12, 5, 9]
    ids, mask = padded(all_ids, lengths, side)
    together = lm(ids, mask)
    assert together.isfinite().all(), "a padding row gave NaN"
    for b, n in enumerate(lengths):
        assert relative(together[b][mask[b]], lm(all_ids[b:b + 1, :n])[0]) < 1e-5


@FAMILIES
@torch.no_grad()
def test_a_left_padded_batch_goes_on_as_each_row_alone(config):
    lm, prompts, more = shaken(LM(config)), some_ids(), some_ids(length=4, seed=2)
    ids, mask = padded(prompts, [12, 5, 9], "left")
    cache = lm.new_cache(3, 16)
    lm(ids, mask, cache=cache)
    got = torch.cat([lm(more[:, :3], cache=cache), lm(more[:, 3:], torch.ones(3, 1), cache=cache)], dim=1)
    for b, n in enumerate([12, 5, 9]):
        alone = lm(torch.cat([prompts[b:b + 1, :n], more[b:b + 1]], dim=1))[0, n:]
        assert relative(got[b], alone) < 1e-5


@FAMILIES
@torch.no_grad()
def test_padding_between_two_reads_changes_nothing(config):
    """Rows that have ended read padding while others go on; what they read afterwards is as if there were none."""
    lm, prompts, more = shaken(LM(config)), some_ids(), some_ids(length=4, seed=2)
    ids, mask = padded(prompts, [12, 5, 9], "right")
    cache = lm.new_cache(3, 18)
    for part, part_mask in zip(ids.split([7, 4, 1], 1), mask.split([7, 4, 1], 1)):
        lm(part, part_mask, cache=cache)
    got = torch.cat([lm(part, cache=cache) for part in more.split([1, 3], 1)], dim=1)
    for b, n in enumerate([12, 5, 9]):
        alone = lm(torch.cat([prompts[b:b + 1, :n], more[b:b + 1]], dim=1))[0, n:]
        assert relative(got[b], alone) < 1e-5


@FAMILIES
@torch.no_grad()
def test_a_token_reaches_itself_and_later_tokens_only(config):
    lm, ids = shaken(LM(config)), some_ids(batch=1)
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1 - 3) % 58 + 3
    difference = (lm(ids) - lm(changed)).abs().amax(-1)[0]
    assert (difference[:6] == 0).all() and (difference[6:] > 1e-6).all()


@torch.no_grad()
def test_a_cache_can_forget():
    lm, ids = shaken(LM(LLAMA)), some_ids()
    cache = lm.new_cache(3, 16)
    lm(ids[:, :8], cache=cache)
    lm(ids[:, 8:], cache=cache)
    cache.length = 8
    assert relative(lm(ids[:, 8:], cache=cache), lm(ids)[:, 8:]) < 1e-5


def test_rope_turns_each_pair_by_its_position_times_its_frequency():
    x = torch.randn(1, 1, 5, 6, dtype=torch.float64)
    position = torch.tensor([[0, 1, 2, 7, 30]])
    turned = rotate(x, *rotary_angles(position, 6, 100.0))
    for t, p in enumerate(position[0].tolist()):
        for i in range(3):
            angle = p * 100.0 ** (-2 * i / 6)
            a, b = x[0, 0, t, i].item(), x[0, 0, t, i + 3].item()
            assert turned[0, 0, t, i].item() == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=1e-5)
            assert turned[0, 0, t, i + 3].item() == pytest.approx(b * math.cos(angle) + a * math.sin(angle), abs=1e-5)


@torch.no_grad()
def test_one_layer_by_hand_in_float64():
    """Grouped-query attention, RMSNorm and SwiGLU written out with loops over heads."""
    config = dataclasses.replace(LLAMA, layers=1, rope_theta=50.0)
    lm, ids = shaken(LM(config)).double(), some_ids(batch=1, length=5)
    layer, x = lm.layers[0], lm.embed.weight[ids[0]]

    def norm(v, weight):
        return v / (v.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight

    y, heads = norm(x, layer.attention_norm.weight), []
    cos, sin = (a[0, 0].double() for a in rotary_angles(torch.arange(5)[None], 8, 50.0))
    for h in range(4):
        rows, shared = slice(8 * h, 8 * h + 8), slice(8 * (h // 2), 8 * (h // 2) + 8)
        q, k, v = y @ layer.attention.q.weight[rows].T, y @ layer.attention.k.weight[shared].T, y @ layer.attention.v.weight[shared].T
        q, k = (a * cos + torch.cat([a[:, 4:], a[:, :4]], -1) * sin for a in (q, k))
        scores = (q @ k.T / 8 ** 0.5).masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
        heads.append(scores.softmax(-1) @ v)
    x = x + torch.cat(heads, -1) @ layer.attention.out.weight.T
    y = norm(x, layer.mlp_norm.weight)
    gate = y @ layer.mlp.gate.weight.T
    x = x + (gate * torch.sigmoid(gate) * (y @ layer.mlp.up.weight.T)) @ layer.mlp.down.weight.T
    assert relative(lm(ids)[0], norm(x, lm.norm.weight)) < 1e-6


@torch.no_grad()
def test_before_layer_stands_before_every_layer_and_dropout_is_for_training():
    lm, ids, calls = LM(dataclasses.replace(OPT, dropout=0.5)), some_ids(), []

    def note(i, x):
        calls.append((i, tuple(x.shape)))
        return x

    assert torch.equal(lm.eval()(ids), lm(ids, before_layer=note))
    assert calls == [(0, (3, 12, 32)), (1, (3, 12, 32)), (2, (3, 12, 32))]
    assert not torch.equal(lm.train()(ids), lm(ids))


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match="lm.norm is 'batch'; it can be layer or rms"):
        LM(dataclasses.replace(OPT, norm="batch"))
    with pytest.raises(ValueError, match="not a multiple of lm.kv_heads"):
        LM(dataclasses.replace(LLAMA, kv_heads=3))
    with pytest.raises(ValueError, match="41 tokens, but the position table holds 40"):
        LM(OPT)(some_ids(length=41))
    lm = LM(LLAMA)
    with pytest.raises(ValueError, match="12 tokens, but the cache was made for 10"):
        lm(some_ids(), cache=lm.new_cache(3, 10))


def test_the_published_size_is_that_of_opt_1_3b():
    """OPT-1.3B has 1 315 758 080 parameters with 50272 rows in its embedding; Audio Flamingo's has 50268."""
    with torch.device("meta"):
        counted = sum(p.numel() for p in LM(LMConfig()).parameters())
    assert counted == 1_315_758_080 - 4 * 2048


# ------------------------------------------------------------------ against transformers, and stored figures of it

SMALL = dict(vocab_size=61, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, max_position_embeddings=40)
OPTS = dict(SMALL, model_type="opt", ffn_dim=80, word_embed_proj_dim=48)
LLAMAS = dict(SMALL, model_type="llama", intermediate_size=80, rms_norm_eps=1e-5)
QWENS = dict(LLAMAS, model_type="qwen2", rms_norm_eps=1e-6)
PEERS = {                                                                     # config.json of small models
    "opt": OPTS,
    "opt-untied": dict(OPTS, tie_word_embeddings=False),
    "llama": LLAMAS,
    "llama-gqa-tied": dict(LLAMAS, num_key_value_heads=2, tie_word_embeddings=True),
    "llama-bias-wide-heads": dict(LLAMAS, num_key_value_heads=3, head_dim=16, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-4),
    "llama-3.1": dict(LLAMAS, head_dim=16, rope_parameters={
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256}),                   # of 8 frequencies 3 stay, 2 lie between, 3 are slowed down by 8
    "qwen2": dict(QWENS, num_key_value_heads=2),
    "qwen2-tied": dict(QWENS, num_key_value_heads=3, tie_word_embeddings=True),
}
STORED = Path(__file__).parent / "golden" / "lm_logits.safetensors"           # written by `python tests/test_lm.py`


def weight(name, shape):
    """Random numbers that depend on the published name alone."""
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
    return torch.tensor(1 + 0.2 * x if "norm.weight" in name else 0.2 * x)


def transformers_model(name):
    """transformers' own model of PEERS[name], with these weights."""
    transformers = pytest.importorskip("transformers", reason="pip install -r tests/requirements.txt")
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**PEERS[name])).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(weight(key, parameter.shape))
    return model


def their_logits(model, ids, mask, **more):
    """Of transformers, which counts positions through padding unless it is told them; OPT sees to that itself."""
    position = {} if model.config.model_type == "opt" else {"position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]}
    return model(ids, attention_mask=mask.long(), **position, **more)


@pytest.mark.parametrize("name", PEERS)
@torch.no_grad()
def test_logits_are_the_stored_ones_of_transformers(name):
    lm = LM(lm_config(PEERS[name], name)).eval()
    shapes = shapes_of(lm)
    table = expand(TABLES[PEERS[name]["model_type"]], shapes)
    lm.load_state_dict({ours: weight(theirs, shapes[ours]) for ours, theirs in table.items()})
    ids, mask = padded(some_ids(), [12, 5, 9], "left")
    assert relative(lm.logits(lm(ids, mask))[mask], load_file(STORED)[name]) < 1e-5


@pytest.fixture(scope="module", params=PEERS)
def peer(request, tmp_path_factory):
    """A small random model of transformers', and ours read from the folder that it saves."""
    theirs, folder = transformers_model(request.param), tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, load_lm(folder)


@torch.no_grad()
def test_logits_are_those_of_transformers(peer):
    theirs, ours = peer
    ids = some_ids()
    assert relative(ours.logits(ours(ids)), theirs(ids).logits) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_and_cached_logits_are_those_of_transformers(peer, side):
    """A padded batch, then four tokens one at a time behind it."""
    theirs, ours = peer
    ids, mask = padded(some_ids(), [12, 5, 9], side)
    cache, past, more = ours.new_cache(3, 16), None, some_ids(length=4, seed=3)
    assert relative(ours.logits(ours(ids, mask))[mask], their_logits(theirs, ids, mask).logits[mask]) < 1e-5
    for part in (ids, *more.split(1, 1)):
        new = mask if past is None else torch.ones(3, 1).bool()
        seen = mask if past is None else torch.cat([seen, new], 1)
        out = their_logits(theirs, part, seen, past_key_values=past, use_cache=True)
        past = out.past_key_values
        assert relative(ours.logits(ours(part, new, cache=cache))[new], out.logits[new]) < 1e-5


if __name__ == "__main__":
    inputs, real = padded(some_ids(), [12, 5, 9], "left")
    with torch.no_grad():
        save_file({name: their_logits(transformers_model(name), inputs, real).logits[real].contiguous() for name in PEERS}, STORED)

"""pretrained.py: a checkpoint in the released format gives what the released code computed from it (tests/golden/af1_tiny).

The golden folder holds a tiny random model in that format, and inputs and outputs of the released code for three texts of
1, 3 and 4 audios; the windows in its unused slots are random too, where real ones are silence.
"""
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from af_min import pretrained
from af_min.cli import UserError
from af_min.config import Config, LMConfig, RepresentationConfig, TINY
from af_min.pretrained import build, released_state
from af_min.text import IGNORE, Writer

GOLDEN = Path(__file__).parent / "golden" / "af1_tiny"
SIZES = json.loads((GOLDEN / "config.json").read_text())


def golden_config(**lm):
    """The golden model's dimensions. Its window encoder is not part of it: a small one stands in."""
    return Config(
        audio=dataclasses.replace(TINY.audio, max_windows=SIZES["windows"]),
        clap=dataclasses.replace(TINY.clap, out_width=SIZES["audio_dim"]),
        representation=RepresentationConfig(layers=SIZES["n_layers"], heads=SIZES["n_head"], inner=SIZES["d_inner"],
                                            max_audios=SIZES["shots"], attend_padding=True),
        lm=LMConfig(vocab_size=SIZES["vocab_size"], width=SIZES["hidden_size"], layers=SIZES["num_layers"],
                    heads=SIZES["num_heads"], kv_heads=SIZES["num_heads"], head_dim=SIZES["hidden_size"] // SIZES["num_heads"],
                    inner=SIZES["ffn_dim"], max_positions=SIZES["max_position"], tied_head=False, **lm),
        audio_id=SIZES["audio"])


def golden_model(path=GOLDEN / "official_checkpoint.pt", dtype=torch.float32):
    config = golden_config()
    state = released_state(path, config, dtype)
    encoder = pretrained.WindowEncoder(config.audio, config.clap).state_dict()
    return build(config, {**state, **{"encoder." + k: v for k, v in encoder.items()}, "silence": torch.zeros(SIZES["audio_dim"])})


@pytest.fixture(scope="module")
def expected():
    return load_file(GOLDEN / "expected.safetensors")


@pytest.fixture(scope="module")
def model():
    return golden_model()


def packed(expected):
    """Valid windows of every audio (A, W, D) and their number (B, N), out of the golden slots."""
    mask_BNW = expected["window_mask"].bool().unflatten(1, (SIZES["shots"], SIZES["windows"]))
    n_windows_BN = mask_BNW.sum(-1)
    slots_BNWD = expected["window_embeddings"].unflatten(1, (SIZES["shots"], SIZES["windows"]))
    return slots_BNWD[n_windows_BN > 0], n_windows_BN


def listen(model, expected, monkeypatch):
    """`model.listen`, with the golden windows instead of silence in unused slots."""
    windows_AWD, n_windows_BN = packed(expected)

    def represent(windows, n_windows):
        heard = model.representation(expected["window_embeddings"])
        return heard.unflatten(1, (SIZES["shots"], SIZES["windows"]))[n_windows > 0]

    monkeypatch.setattr(model, "represent", represent)
    return model.listen(windows_AWD, n_windows_BN)


@torch.no_grad()
def test_representation_is_the_released_codes(model, expected):
    difference = (model.representation(expected["window_embeddings"]) - expected["audio_transformer_out"]).abs().max()
    assert difference < 1e-5


@torch.no_grad()
def test_logits_are_the_released_codes(model, expected, monkeypatch):
    ids, mask = expected["input_ids"], expected["attention_mask"]
    logits = model.lm.logits(model.hidden(ids, listen(model, expected, monkeypatch), mask.bool()))
    assert (logits - expected["logits"])[mask.bool()].abs().max() < 1e-5


@torch.no_grad()
def test_loss_is_the_released_codes(model, expected, monkeypatch):
    windows_AWD, n_windows_BN = packed(expected)
    listen(model, expected, monkeypatch)
    nll = model(expected["input_ids"], expected["labels"], windows_AWD, n_windows_BN, expected["attention_mask"].bool())
    assert abs(nll.mean() - expected["loss"][0]) < 1e-5


def test_labels_are_the_released_codes(expected):
    """text.Writer, given the golden texts piece by piece, supervises the same tokens."""
    class Tokens:
        bos_id, eos_id, audio_id, eoc_id, sep_id = (SIZES[k] for k in ("bos", "eos", "audio", "eoc", "sep"))
        start_ids = [bos_id]

        def encode(self, text):
            return [int(word) for word in text.split()]

    for ids, labels, mask in zip(*(expected[k] for k in ("input_ids", "labels", "attention_mask"))):
        ids, labels = ids[mask.bool()].tolist(), labels[mask.bool()].tolist()
        writer, rest = Writer(Tokens()), ids[1:]
        while rest:
            token = rest.pop(0)
            if token == Tokens.sep_id:
                end = rest.index(Tokens.eoc_id)
                writer.answer(" ".join(map(str, rest[:end])))
                rest = rest[end + 1:]
            elif token in (Tokens.audio_id, Tokens.eos_id):
                writer.special(token, supervised=token == Tokens.eos_id)
            else:
                writer.prompt(str(token))
        assert writer.ids == ids
        assert writer.labels == labels and IGNORE == -100


@torch.no_grad()
def test_cached_reading_gives_the_released_logits_with_several_audios(model, expected, monkeypatch):
    """The released code's own cached decoding looks at the first audio only; its uncached logits are the truth."""
    audio = listen(model, expected, monkeypatch)
    ids, mask = expected["input_ids"], expected["attention_mask"].bool()
    state = model.start(audio, ids.shape[1])
    for t in range(ids.shape[1]):
        logits = model.read(ids[:, t:t + 1], state, mask[:, t:t + 1])
        if mask[:, t].any():
            assert (logits - expected["logits"][:, t])[mask[:, t]].abs().max() < 1e-5


@torch.no_grad()
def test_unused_slots_hold_silence_and_only_real_windows_are_needed(model, expected):
    """`represent` on valid windows alone equals the representation of all slots, silence in the unused ones."""
    windows_AWD, n_windows_BN = packed(expected)
    model.silence.copy_(torch.linspace(-1, 1, SIZES["audio_dim"]))
    slots = torch.where(expected["window_mask"].bool()[..., None], expected["window_embeddings"], model.silence)
    whole = model.representation(slots).unflatten(1, (SIZES["shots"], SIZES["windows"]))[n_windows_BN > 0]
    got = model.represent(windows_AWD, n_windows_BN)
    real = torch.arange(SIZES["windows"]) < n_windows_BN[n_windows_BN > 0][:, None]
    assert (got - whole)[real].abs().max() < 1e-6

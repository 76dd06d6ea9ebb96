"""pretrained.py: a checkpoint in the released format gives what the released code computed from it (tests/golden/af1_tiny).

The golden folder holds a tiny random model in that format, and inputs and outputs of the released code for three texts of
1, 3 and 4 audios; the windows in its unused slots are random too, where real ones are silence.
"""
import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

import released_format
import sample
import test_sample
import training
from af_min import checkpoint, pretrained
from af_min.cli import UserError
from af_min.config import Config, LMConfig, RepresentationConfig, TINY
from af_min.flamingo import AudioFlamingo
from af_min.lm import LM
from af_min.pretrained import released_state
from af_min.pretrained_lm import expand
from af_min.retrieval import hear
from af_min.text import IGNORE, Writer, write_sample
from test_pretrained_lm import measured

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


def build(config, state):
    model = AudioFlamingo(config)
    model.load_state_dict(state, assign=True)
    return model.eval()


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
        return heard[expected["window_mask"].bool()]

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
    nll = model(expected["input_ids"], expected["labels"], listen(model, expected, monkeypatch))
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
    whole = model.representation(slots)[expected["window_mask"].bool()]
    assert (model.represent(windows_AWD, n_windows_BN) - whole).abs().max() < 1e-6


# ------------------------------------------------------------------ strictness

def released():
    return torch.load(GOLDEN / "official_checkpoint.pt", weights_only=True)["model_state_dict"]


def test_the_prefix_of_data_parallel_training_is_taken_off(model, tmp_path):
    torch.save({"model_state_dict": {"module." + k: v for k, v in released().items()}}, tmp_path / "x.pt")
    again = golden_model(tmp_path / "x.pt")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items() if not k.startswith(("encoder", "silence")))


def test_the_head_is_the_files_own_and_duplicates_are_not_needed(model, tmp_path):
    state = released()
    assert torch.equal(model.lm.head.weight, state["lang_encoder.lm_head.weight"])
    kept = {k: v for k, v in state.items() if "old_decoder_blocks" not in k and "lang_encoder.gated_cross_attn_layers" not in k}
    torch.save(kept, tmp_path / "x.pt")
    assert len(kept) < len(state) and golden_model(tmp_path / "x.pt")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_target_dtypes(expected, dtype, monkeypatch):
    """Weights in half precision, read so and never widened; logits stay near."""
    model, mask = golden_model(dtype=dtype), expected["attention_mask"].bool()
    assert {p.dtype for name, p in model.named_parameters() if not name.startswith("encoder.")} == {dtype}
    monkeypatch.setitem(expected, "window_embeddings", expected["window_embeddings"].to(dtype))
    logits = model.lm.logits(model.hidden(expected["input_ids"], listen(model, expected, monkeypatch), mask))
    assert (logits - expected["logits"])[mask].abs().max() < 0.1 * expected["logits"][mask].std()


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path):
    key = "lang_encoder.model.decoder.layers.1.gated_cross_attn_layer.attn.to_kv.weight"
    state = released()
    cases = (({k: v for k, v in state.items() if k != key}, f"'{key}' is missing; expected Audio Flamingo of 2 layers"),
             ({**state, "audio_transformer.layer_stack.2.pos_ffn.w_1.bias": torch.ones(24)}, "w_1.bias' is unexpected"),
             ({**state, key: state[key][:-1]}, rf"{key}' has shape \(1023, 16\), expected \(1024, 16\)"),
             ({**state, pretrained.POSITIONS: torch.zeros(1, 20, 16)}, "is not the sinusoid table"),
             ({**state, pretrained.POSITIONS: torch.zeros(1, 15, 16)}, r"has shape \(15, 16\); expected \(16 or more, 16\)"),
             ({"clap.base.htsat.bn0.weight": torch.ones(2)}, "expected a released Audio Flamingo .* seems to be a CLAP checkpoint"))
    for changed, message in cases:
        torch.save({"model_state_dict": changed}, tmp_path / "x.pt")
        with pytest.raises(UserError, match=message):
            golden_model(tmp_path / "x.pt")


# ------------------------------------------------------------------ the command

SMALL = dataclasses.replace(
    TINY, clap=dataclasses.replace(TINY.clap, image_size=32, width=8, depths=(2, 1), heads=(2, 2), out_width=16),
    audio=dataclasses.replace(TINY.audio, window=0.1, hop=0.05, n_mels=16, max_windows=4),
    representation=RepresentationConfig(layers=2, heads=2, inner=24, max_audios=3),
    xattn=dataclasses.replace(TINY.xattn, audio_index=False),
    lm=LMConfig(vocab_size=300, width=32, layers=2, heads=4, kv_heads=4, head_dim=8, inner=64, max_positions=160))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint, a CLAP checkpoint and an OPT folder in the published formats, all small."""
    return released_format.write_all(tmp_path_factory.mktemp("published"), SMALL)


def test_a_released_checkpoint_becomes_a_run_folder(files, tmp_path):
    config, tokenizer, state = pretrained.released_model(*files, torch.float32, slots=2, base=SMALL)
    assert config.representation.attend_padding and config.representation.max_audios == 2 and not config.lm.tied_head
    assert (tokenizer.audio_id, tokenizer.eoc_id, tokenizer.sep_id) == (297, 298, 299) and config.audio_id == 297
    pretrained.write_run(tmp_path, config, tokenizer, state, {})
    again, read_back = checkpoint.load_run(tmp_path)
    assert again.config == config and read_back.encode("a dog") == tokenizer.encode("a dog")
    silent = again.encode(torch.zeros(1, SMALL.audio.window_samples))[0]
    assert (again.silence - silent).abs().max() < 1e-6 and silent.std() > 0.1
    assert all(torch.equal(t, state[name]) for name, t in again.state_dict().items())


def test_a_new_model_starts_from_published_parts(files, tmp_path):
    """Zero gates: its logits are the language model's own, whatever it hears; new tokens have rows of their own."""
    lm = LM(dataclasses.replace(SMALL.lm, vocab_size=297)).eval()
    table = expand(pretrained.OPT_TABLE, lm.state_dict())
    folder = tmp_path / "opt"
    released_format.write_opt_folder(folder, SMALL)
    save_file({theirs: lm.state_dict()[ours] for ours, theirs in table.items()}, folder / "model.safetensors")
    zero = dataclasses.replace(SMALL, xattn=dataclasses.replace(SMALL.xattn, gate_init=0.0))
    config, tokenizer, state = pretrained.new_model(files[1], folder, base=zero)
    assert config.lm.vocab_size == tokenizer.vocab_size == 300 and config.lm.tied_head
    distance = torch.cdist(state["lm.embed.weight"][297:], state["lm.embed.weight"])
    assert (distance[:, 297:] + 9 * torch.eye(3)).min() > 0.3 and distance[1, :298].argmin() == tokenizer.eos_id
    model = build(config, state)
    released_format.write_opt_folder(folder, dataclasses.replace(SMALL, lm=dataclasses.replace(SMALL.lm, vocab_size=301)))
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"vocab_size": 298', '"vocab_size": 297'))
    with pytest.raises(UserError, match="opt: its vocabulary has 298 tokens, its weights have 297; expected the vocabulary that"):
        pretrained.new_model(files[1], folder, base=zero)
    ids = torch.tensor([[2, 297, 40, 41, 42]])
    with torch.no_grad():
        heard = model.listen(model.encode(torch.rand(2, SMALL.audio.window_samples))[None], torch.tensor([[2]]))
        ours, alone = model.lm.logits(model.hidden(ids[:, 2:], heard))[..., :297], lm.logits(lm(ids[:, 2:]))
        assert (ours - alone).abs().max() < 1e-5 * alone.abs().max()


FRONT_END = [f"encoder.{name}" for name in ("log_mel.filters", "log_mel.window", "mel_norm.weight", "mel_norm.bias",
                                            "mel_norm.running_mean", "mel_norm.running_var")]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_two_commands_of_a_user_with_published_files(files, tmp_path, monkeypatch, capsys, dtype):
    """Convert, then ask sample.py: it says what reading the whole text again for every token says."""
    foundation, clap, lm = map(str, files)
    monkeypatch.setattr(pretrained, "released_model", functools.partial(pretrained.released_model, base=SMALL))
    soundfile.write(tmp_path / "x.wav", 0.3 * torch.randn(3000, generator=torch.Generator().manual_seed(0)).numpy(), 16_000)
    flags = [] if dtype == "bfloat16" else ["--dtype", dtype]
    command = ["--audio-flamingo", foundation, "--clap", clap, "--lm", lm, "--out", tmp_path / "run", "--slots", 2, *flags]
    training.run_main(pretrained, tmp_path, command)
    assert f"({dtype}), vocabulary 300" in capsys.readouterr().out
    training.run_main(sample, tmp_path, ["--run", "run", "--audio", "x.wav", "--prompt", "What is it?", "--max-new", 6])
    answer = capsys.readouterr().out.rstrip("\n")
    model, tokenizer = checkpoint.load_run(tmp_path / "run")
    row = {"task": "AQA", "audio": str(tmp_path / "x.wav"), "prompt": "What is it?"}
    question, heard = write_sample(tokenizer, row, complete=False), hear(model, row["audio"]).windows_WD
    wide = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    assert wide == {"silence", *FRONT_END} if dtype != "float32" else "lm.embed.weight" in wide
    assert model.lm.embed.weight.dtype == getattr(torch, dtype) and heard.shape == (3, 16)
    said = test_sample.reread(model, tokenizer, question.ids, question.audios, {(row["audio"], 0.0): heard}, 6)
    assert answer == tokenizer.decode(said) and len(said) > 1


def test_the_command_and_its_mistakes(files, tmp_path, monkeypatch):
    foundation, clap, lm = files
    trained = lm.with_name("trained")
    trained.mkdir()
    (trained / "log.jsonl").touch()
    for arguments, message in (
            ((), "--lm is missing"),
            (("--audio-flamingo", foundation, "--lm", lm), "--clap is missing"),
            (("--lm", lm), "--clap is missing: .* train.py --lm DIR makes a new model that trains its own"),
            (("--audio-flamingo", foundation, "--clap", clap, "--lm", lm, "--slots", "0"), "--slots 0"),
            (("--audio-flamingo", tmp_path / "no.pt", "--clap", clap, "--lm", lm), "no.pt: no such file"),
            (("--audio-flamingo", clap, "--clap", clap, "--lm", lm), "clap.pth: expected a released Audio Flamingo checkpoint"),
            (("--audio-flamingo", foundation, "--clap", clap, "--lm", tmp_path), "no tokenizer: found nothing; expected tokenizer.json"),
            (("--clap", clap, "--lm", tmp_path / "none"), "none: no such folder"),
            (("--clap", clap, "--lm", tmp_path / "none", "--out", tmp_path), "none: no such folder"),
            (("--clap", clap, "--lm", lm, "--out", trained), "--out .*trained: this is a run that has been trained"),
            (("--clap", lm, "--lm", lm, "--audio-flamingo", foundation), "opt: a folder; expected a file of weights"),
            (("--clap", clap, "--lm", lm, "--out", lm), "--out .*opt: this is the folder of the language model"),
            (("--clap", clap, "--lm", lm, "--out", clap), "--out .*clap.pth: this is a file"),
            (("--audio-flamingo", foundation, "--clap", clap, "--lm", lm), "clap.pth: tensor .* is missing")):
        monkeypatch.setattr(sys, "argv", ["pretrained", *map(str, arguments)])
        with pytest.raises(UserError, match=message):
            pretrained.main()
    done = subprocess.run([sys.executable, "-m", "af_min.pretrained", "--lm", str(tmp_path)], capture_output=True, text=True,
                          cwd=Path(__file__).parent.parent)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# ------------------------------------------------------------------ memory

@pytest.mark.slow
def test_converting_and_opening_hold_the_target_alone(tmp_path):
    """60 M float32 numbers (0.24 GB) as bfloat16, 0.12 GB, and 30 MB for the rest: no second copy, and never in float32."""
    large = dataclasses.replace(SMALL, lm=LMConfig(vocab_size=8000, width=512, layers=12, heads=8, kv_heads=8, head_dim=64,
                                                   inner=2048, max_positions=160))
    files = [str(path) for path in released_format.write_all(tmp_path, large)]
    convert = (f"import test_pretrained\nrun, base = {str(tmp_path / 'run')!r}, test_pretrained.SMALL\nbefore = peak()\n"
               f"made = pretrained.released_model(*{files!r}, torch.bfloat16, slots=3, base=base)\nstate = made[-1]\n"
               "pretrained.write_run(Path(run), *made, {})")
    opened = f"from af_min import checkpoint\nbefore = peak()\nstate = checkpoint.load_run({str(tmp_path / 'run')!r})[0].state_dict()"
    for code in (convert, opened):
        target, extra = measured(code)
        assert 0.9 * target < extra < 1.1 * target + 3e7, f"{extra / 1e6:.0f} MB more for {target / 1e6:.0f} MB"

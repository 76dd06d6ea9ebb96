"""pretrained_lm.py, pretrained_files.py: every layout of a published folder is read, and every mistake is named.

Tests marked `peer` need a real model and are not in the default run:

    pip install transformers gguf accelerate && python tests/get_smollm2.py smollm2
    AF_MIN_SMOLLM2=smollm2 python -m pytest -m peer tests/test_pretrained_lm.py -s
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import bench_decode
from af_min.cli import UserError
from af_min.lm import LM
from af_min.pretrained_files import open_file, parameters_on_meta
from af_min.pretrained_lm import LLAMA_TABLE, OPT_TABLE, expand, load_lm, lm_config, shapes_of

LLAMA = {"model_type": "llama", "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 40, "rms_norm_eps": 1e-6}
OPT = {"model_type": "opt", "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48,
       "max_position_embeddings": 40, "do_layer_norm_before": True, "word_embed_proj_dim": 32, "activation_function": "relu"}
WRITTEN = {"llama": LLAMA_TABLE, "qwen2": LLAMA_TABLE, "opt": OPT_TABLE}


def state_of(values, seed=0):
    """Random weights under the published names, and our model that holds the same."""
    torch.manual_seed(seed)
    lm = LM(lm_config(values, "test")).eval()
    table = expand(WRITTEN[values["model_type"]], shapes_of(lm))
    return {theirs: lm.state_dict()[ours].clone() for ours, theirs in table.items()}, lm


def write_folder(folder, values, state=None):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    if state is not None:
        save_file(state, folder / "model.safetensors")
    return folder


def same(a, b):
    return a.state_dict().keys() == b.state_dict().keys() and all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@pytest.fixture
def llama(tmp_path):
    state, lm = state_of(LLAMA)
    return write_folder(tmp_path / "llama", LLAMA, state), state, lm


# ------------------------------------------------------------------ layouts

@pytest.mark.parametrize("values", [LLAMA, OPT, {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": True}], ids=lambda v: v["model_type"])
def test_one_safetensors_file(tmp_path, values):
    state, lm = state_of(values)
    assert same(load_lm(write_folder(tmp_path / "x", values, state)), lm)


def test_shards_and_torch_files(llama):
    folder, state, lm = llama
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: state[name] for name in held}, folder / shard)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(load_lm(folder), lm)
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match="model-2.safetensors: no such file; expected a file of weights"):
        load_lm(folder)
    (folder / "model.safetensors.index.json").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert same(load_lm(folder), lm)
    torch.save({k: v.t().contiguous().t() if v.ndim == 2 else v for k, v in state.items()}, folder / "pytorch_model.bin",
               _use_new_zipfile_serialization=False)
    assert same(load_lm(folder), lm), "torch's old layout, and tensors that are not contiguous"


def test_opt_files_without_the_outer_prefix_and_with_buffers(tmp_path):
    state, lm = state_of(OPT)
    state = {name.removeprefix("model."): value for name, value in state.items()}
    state["lm_head.weight"] = state["decoder.embed_tokens.weight"].clone()
    state["decoder.version"] = torch.tensor([3.0])
    assert same(load_lm(write_folder(tmp_path / "x", OPT, state)), lm)


def test_a_tied_model_whose_file_has_another_head_is_untied(tmp_path):
    state, _ = state_of({**LLAMA, "tie_word_embeddings": True})
    state["lm_head.weight"] = torch.randn(61, 32)
    lm = load_lm(write_folder(tmp_path / "x", {**LLAMA, "tie_word_embeddings": True}, state))
    assert not lm.config.tied_head and torch.equal(lm.head.weight, state["lm_head.weight"])


@pytest.mark.parametrize("spelling", [{"rope_theta": 500.0}, {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
                                      {"rope_theta": 500.0, "rope_scaling": None}])
def test_old_and_new_spellings_of_rope(spelling):
    assert lm_config({**LLAMA, **spelling}, "x").rope_theta == 500.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_target_dtypes(llama, dtype):
    folder, state, _ = llama
    lm = load_lm(folder, dtype)
    assert all(torch.equal(p, state[expand(LLAMA_TABLE, shapes_of(lm))[n]].to(dtype)) for n, p in lm.named_parameters())


def test_parameters_on_meta_keeps_buffers():
    with parameters_on_meta():
        norm = torch.nn.BatchNorm1d(3)
    assert norm.weight.is_meta and not norm.running_mean.is_meta and not torch.nn.Linear(2, 2).weight.is_meta


def test_a_run_is_opened_without_torchs_compiler():
    """Its import takes 0.6 s and 0.1 GB, with every command."""
    code = ("import sys\nfrom af_min import config, flamingo, pretrained_files\nwith pretrained_files.parameters_on_meta():\n"
            "    flamingo.AudioFlamingo(config.TINY)\nassert 'torch._dynamo' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


# ------------------------------------------------------------------ mistakes

@pytest.mark.parametrize("change, message", [
    ({"model_type": "mamba"}, "config.json: model_type is 'mamba'; supported are opt, llama, qwen2"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "config.json: setting 'low_freq_factor' is missing"),
    ({"rope_scaling": {"type": "linear", "factor": 8.0}}, "rope_type is 'linear'; supported is 'default' or 'llama3'"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 8.0}}, "rope_type is 'yarn'; supported is 'default' or 'llama3'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "keep one of them"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported is 'silu'"),
    ({"attention_bias": True}, "attention_bias is True and mlp_bias is False; supported is both or neither"),
    ({"vocab_size": None}, "vocab_size is None, expected a positive whole number"),
    ({"num_attention_heads": 0}, "config.json: a setting has an unusable value"),
    ({"rms_norm_eps": None}, "config.json: a setting has an unusable value"),
    ({"num_key_value_heads": 3}, "config.json: .*lm.heads = 4 is not a multiple of lm.kv_heads = 3"),
])
def test_settings_that_are_not_supported_are_named(llama, change, message):
    folder, state, _ = llama
    with pytest.raises(UserError, match=message):
        load_lm(write_folder(folder, {**LLAMA, **change}))


def test_opts_that_are_built_otherwise_are_named(tmp_path):
    state, _ = state_of(OPT)
    for change, message in (({"do_layer_norm_before": False}, "do_layer_norm_before is False; supported is True"),
                            ({"word_embed_proj_dim": 16}, "word_embed_proj_dim is 16; supported is 32")):
        with pytest.raises(UserError, match=message):
            load_lm(write_folder(tmp_path / "x", {**OPT, **change}, state))


def test_missing_unexpected_and_misshapen_tensors_are_named(llama):
    folder, state, _ = llama
    key = "model.layers.1.mlp.up_proj.weight"
    for changed, message in (
            ({k: v for k, v in state.items() if k != key}, f"tensor '{key}' is missing; expected a llama model of 2 layers"),
            ({**state, "model.layers.2.mlp.up_proj.weight": state[key].clone()}, "'model.layers.2.mlp.up_proj.weight' is unexpected"),
            ({**state, key: state[key][:-1].clone()}, rf"'{key}' has shape \(47, 32\), expected \(48, 32\)"),
            ({**state, key: (50 * state[key]).to(torch.int8)}, f"'{key}' holds int8; expected floating-point numbers"),
            (state_of(OPT)[0], "is missing .*but it seems to be an OPT language model"),
            ({"bert.encoder.layer.0.attention.self.query.weight": torch.ones(2)}, "it seems to be a BERT"),
            ({"a": torch.ones(1)}, "it holds 1 tensors, such as a")):
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(UserError, match=message):
            load_lm(folder)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_what_a_file_is_does_not_hang_on_the_length_of_its_header(tmp_path, suffix):
    """A header of 0x80 bytes, or 0x80 more than a multiple of 256, begins with the byte that a pickle begins with."""
    begun = set()
    for padding in range(0, 512, 4):
        save_file({"x": torch.arange(3.0)}, tmp_path / f"a.{suffix}", {"padding": "-" * padding})
        begun.add((tmp_path / f"a.{suffix}").read_bytes()[0])
        assert open_file(tmp_path / f"a.{suffix}")["x"].read().tolist() == [0, 1, 2]
    assert 0x80 in begun
    torch.save({"x": torch.arange(3.0)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert open_file(tmp_path / "old.bin")["x"].read().tolist() == [0, 1, 2]


def test_a_file_that_is_larger_than_memory_is_opened(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}).encode()
    with open(tmp_path / "x.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 40))                   # 1 TB of nothing
    assert open_file(tmp_path / "x.safetensors")["a"].shape == (1 << 38,)


def test_damaged_files_are_named(llama, tmp_path):
    folder, state, _ = llama
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for content in (whole[:-100], whole[:50], b"", b"<html>no such page</html>" * 9, whole[:8] + b"x" * (len(whole) - 8),
                    *(whole.replace(*change, 1) for change in ((b'"F32"', b'"F16"'), (b'"dtype"', b'"dtipe"'), (b'"F32"', b'"I99"')))):
        path.write_bytes(content)
        with pytest.raises(UserError, match="model.safetensors: not a whole safetensors file .*; copy or download it again"):
            load_lm(folder)
    path.write_bytes(whole.replace(b'"F32"', b'"U32"', 1))
    with pytest.raises(UserError, match="holds numbers of type U32; expected F64"):
        load_lm(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"llama: no weights: found config.json; expected model.safetensors or"):
        load_lm(folder)
    torch.save(state, folder / "pytorch_model.bin")
    data = (folder / "pytorch_model.bin").read_bytes()
    for content, message in ((data[:len(data) // 2], "truncated: the end of torch.save's zip archive is missing"),
                             (b"nothing", "begins with b'noth'; expected weights"), (b"", "empty; expected weights")):
        (folder / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(UserError, match=f"pytorch_model.bin: {message}"):
            load_lm(folder)
    torch.save([1, 2], folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin: holds no tensors"):
        load_lm(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: not JSON"):
        load_lm(folder)
    with pytest.raises(UserError, match="no config.json; expected the folder of a Hugging Face language model"):
        load_lm(tmp_path)


def test_nothing_in_a_torch_file_is_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.write_text, (tmp_path / "executed", "!"))

    torch.save({"x": torch.ones(2), "bomb": Bomb()}, tmp_path / "evil.bin")
    with pytest.raises(UserError, match="evil.bin: torch.load .*: Unsupported global: GLOBAL getattr; expected .* tensors only"):
        open_file(tmp_path / "evil.bin")
    assert not (tmp_path / "executed").exists()


# ------------------------------------------------------------------ memory

def measured(code):
    """(bytes of the dictionary `state` that the code makes, bytes by which the peak of a process that runs it rises above `before`).

    VmHWM where there is one: on Linux ru_maxrss of a new process begins with what its parent held.
    """
    start = ("import re, resource, sys, torch\nfrom pathlib import Path\nsys.path.insert(0, 'tests')\nfrom af_min import config, pretrained\n"
             "status = Path('/proc/self/status')\n"
             "peak = lambda: 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', status.read_text())[1]) if status.exists() else \\\n"
             "    resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
             "with torch.device('meta'):\n    pretrained.AudioFlamingo(config.TINY)\n")         # 110 MB of torch's modules
    end = "print(sum(tensor.nbytes for tensor in state.values()), peak() - before)"
    out = subprocess.run([sys.executable, "-c", f"{start}{code}\n{end}"], capture_output=True, text=True, check=True,
                         cwd=Path(__file__).parent.parent)
    return map(int, out.stdout.split()[-2:])


def test_loading_holds_the_target_alone(tmp_path):
    """100 M float32 numbers (400 MB) as bfloat16: 200 MB, and no second copy, no page of the file."""
    values = {**LLAMA, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 8, "head_dim": 64,
              "num_key_value_heads": 8}
    with torch.device("meta"):
        lm = LM(lm_config(values, "test"))
    table = expand(LLAMA_TABLE, shapes_of(lm))
    write_folder(tmp_path / "x", values, {theirs: torch.zeros(shapes_of(lm)[ours]) for ours, theirs in table.items()})
    target, extra = measured(f"from af_min.pretrained_lm import load_lm\nbefore = peak()\n"
                             f"state = load_lm({str(tmp_path / 'x')!r}, torch.bfloat16).state_dict()")
    assert 0.9 * target < extra < 1.1 * target + 1e7, f"{extra / 1e6:.0f} MB more for a model of {target / 1e6:.0f} MB"


# ------------------------------------------------------------------ a real model

TEXT = ("The sound of rain on a tin roof grows louder, then a dog barks twice and a door slams. Question: what happened first? "
        "Answer: it was raining. In 1969, engineers measured 3.14 volts; naïve café owners said “日本語” 🎉.\n\ndef f(x):\n    return x ** 2\n")


@pytest.fixture(scope="module")
def smollm2():
    transformers = pytest.importorskip("transformers", reason="pip install -r tests/requirements.txt")
    folder = os.environ.get("AF_MIN_SMOLLM2")
    if not folder:
        pytest.skip("python tests/get_smollm2.py smollm2, then AF_MIN_SMOLLM2=smollm2 python -m pytest -m peer")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None       # 64 tokens, whatever they say
    return theirs, load_lm(Path(folder)), Path(folder), transformers


@pytest.mark.peer
@torch.no_grad()
def test_smollm2_logits_and_greedy_tokens_are_those_of_transformers(smollm2):
    theirs, ours, folder, _ = smollm2
    from af_min.pretrained_text import published_tokenizer
    ids = torch.tensor([published_tokenizer(folder).encode(TEXT)])
    expected = theirs(ids).logits
    relative = ((ours.logits(ours(ids)) - expected).abs().max() / expected.abs().max()).item()
    print(f"\nSmolLM2-135M, {ids.shape[1]} tokens: largest difference of logits {relative:.1e} of the largest logit")
    assert relative < 1e-4
    prompt = ids[:, :24]
    greedy = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False)
    assert torch.equal(bench_decode.generate(ours, prompt, 64), greedy[:, 24:])


@pytest.mark.peer
def test_smollm2_ids_are_those_of_transformers(smollm2):
    from af_min.pretrained_text import published_tokenizer
    from test_pretrained_text import lines
    _, _, folder, transformers = smollm2
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), published_tokenizer(folder)
    for line in lines():
        assert ours.encode(line) == theirs.encode(line, add_special_tokens=False), repr(line)


@pytest.mark.peer
@pytest.mark.parametrize("batch", [1, 8])
def test_smollm2_decodes_faster_than_transformers(smollm2, batch):
    """Greedy, 24 + 64 tokens, float32, alternating runs, the same tokens."""
    theirs, ours, _, transformers = smollm2
    ours.pack()
    speed, peer = bench_decode.compare(ours, theirs, batch)
    print(f"\nSmolLM2-135M, CPU float32, {torch.get_num_threads()} threads, batch {batch}: ours {speed:.1f} tokens/s, "
          f"transformers {transformers.__version__} {peer:.1f}: {speed / peer:.2f}x")
    assert speed > bench_decode.AT_LEAST * peer

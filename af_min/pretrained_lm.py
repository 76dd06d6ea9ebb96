"""Hugging Face folders of language models -> lm.LM, without transformers. Part of pretrained.py.

A folder holds config.json and the weights: model.safetensors, or shards of it listed in model.safetensors.index.json, or
the same as pytorch_model.bin. Two families are read: OPT, and Llama with Qwen2. What their settings can say and `lm.LM`
cannot do (rotary angles scaled otherwise than Llama 3.1's, sliding windows, post-norm layers) is an error here, not a wrong
logit later.
"""
from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from .cli import UserError
from .config import LMConfig
from .lm import LM, check
from .pretrained_files import Entry, expand, open_file, read_table, shapes_of
from .pretrained_text import read_json

# Our name -> the name in the file. {i} stands for the layer, {p} for weight and bias.
OPT_TABLE = {
    "embed.weight": "model.decoder.embed_tokens.weight",
    "positions.weight": "model.decoder.embed_positions.weight",
    "norm.{p}": "model.decoder.final_layer_norm.{p}",
    "head.weight": "lm_head.weight",
    "layers.{i}.attention_norm.{p}": "model.decoder.layers.{i}.self_attn_layer_norm.{p}",
    "layers.{i}.attention.q.{p}": "model.decoder.layers.{i}.self_attn.q_proj.{p}",
    "layers.{i}.attention.k.{p}": "model.decoder.layers.{i}.self_attn.k_proj.{p}",
    "layers.{i}.attention.v.{p}": "model.decoder.layers.{i}.self_attn.v_proj.{p}",
    "layers.{i}.attention.out.{p}": "model.decoder.layers.{i}.self_attn.out_proj.{p}",
    "layers.{i}.mlp_norm.{p}": "model.decoder.layers.{i}.final_layer_norm.{p}",
    "layers.{i}.mlp.up.{p}": "model.decoder.layers.{i}.fc1.{p}",
    "layers.{i}.mlp.down.{p}": "model.decoder.layers.{i}.fc2.{p}",
}
LLAMA_TABLE = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.{p}": "model.norm.{p}",
    "head.weight": "lm_head.weight",
    "layers.{i}.attention_norm.{p}": "model.layers.{i}.input_layernorm.{p}",
    "layers.{i}.attention.q.{p}": "model.layers.{i}.self_attn.q_proj.{p}",
    "layers.{i}.attention.k.{p}": "model.layers.{i}.self_attn.k_proj.{p}",
    "layers.{i}.attention.v.{p}": "model.layers.{i}.self_attn.v_proj.{p}",
    "layers.{i}.attention.out.{p}": "model.layers.{i}.self_attn.o_proj.{p}",
    "layers.{i}.mlp_norm.{p}": "model.layers.{i}.post_attention_layernorm.{p}",
    "layers.{i}.mlp.gate.{p}": "model.layers.{i}.mlp.gate_proj.{p}",
    "layers.{i}.mlp.up.{p}": "model.layers.{i}.mlp.up_proj.{p}",
    "layers.{i}.mlp.down.{p}": "model.layers.{i}.mlp.down_proj.{p}",
}
TABLES = {"opt": OPT_TABLE, "llama": LLAMA_TABLE, "qwen2": LLAMA_TABLE}
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
BUFFERS = ("rotary_emb.inv_freq", "decoder.version")       # in old files; computed here

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def load_lm(folder: Path, dtype: torch.dtype = torch.float32) -> LM:
    """The language model of a Hugging Face folder, in evaluation mode."""
    config, state = lm_state(folder, dtype)
    with torch.device("meta"):
        lm = LM(config)
    lm.load_state_dict(state, strict=True, assign=True)
    return lm.eval()


def lm_state(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[LMConfig, dict[str, Tensor]]:
    """Settings and state dict (for lm.LM) of a Hugging Face folder."""
    folder = Path(folder)
    values = read_config(folder)
    entries = open_folder(folder)
    config = lm_config(values, str(folder / "config.json"))
    if values["model_type"] == "opt" and not any(name.startswith("model.") for name in entries):
        entries = {name if name == "lm_head.weight" else "model." + name: entry for name, entry in entries.items()}
    if config.tied_head and "lm_head.weight" in entries:     # a copy of the embedding, or an untied head after all
        embedding = entries.get(TABLES[values["model_type"]]["embed.weight"])
        if embedding is not None and torch.equal(embedding.read(), entries["lm_head.weight"].read()):
            del entries["lm_head.weight"]
        else:
            config = dataclasses.replace(config, tied_head=False)
    with torch.device("meta"):
        shapes = shapes_of(LM(config))
    table = expand(TABLES[values["model_type"]], shapes)
    wanted = f"a {values['model_type']} model of {config.layers} layers"
    return config, read_table(entries, table, shapes, str(folder), wanted, dtype, ignore=lambda name: name.endswith(BUFFERS))


def read_config(folder: Path) -> dict:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json; expected the folder of a Hugging Face language model")
    values = read_json(path)
    family = values.get("model_type")
    if family not in TABLES:
        raise UserError(f"{path}: model_type is {family!r}; supported are {', '.join(TABLES)}")
    return values


def open_folder(folder: Path) -> dict[str, Entry]:
    """All tensors of a folder, whichever way its weights are stored."""
    name = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if name is None:
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
        raise UserError(f"{folder}: no weights: found {found}; expected {' or '.join(WEIGHT_FILES)}")
    if not name.endswith(".index.json"):
        return open_file(folder / name)
    weight_map = read_json(folder / name).get("weight_map")
    if not (isinstance(weight_map, dict) and all(isinstance(shard, str) for shard in weight_map.values())):
        raise UserError(f"{folder / name}: no usable weight_map; expected {{tensor name: file name}}")
    entries = {}
    for shard in sorted(set(weight_map.values())):
        entries |= open_file(folder / shard)
    lost = sorted(set(weight_map) - set(entries))
    if lost:
        raise UserError(f"{folder / weight_map[lost[0]]}: tensor {lost[0]!r} is missing; {name} says it is here")
    return entries


def require(values: dict, where: str, **only) -> None:
    """UserError unless each setting is absent or has one of the values that lm.LM implements."""
    for key, allowed in only.items():
        if key in values and values[key] not in allowed:
            raise UserError(f"{where}: {key} is {values[key]!r}; supported is {' or '.join(map(repr, allowed))}")


def lm_config(values: dict, where: str) -> LMConfig:
    """Our settings from a Hugging Face config.json, old and new spellings."""
    try:
        config = opt_config(values, where) if values["model_type"] == "opt" else llama_config(values, where)
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "inner", "max_positions"):
            value = getattr(config, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a positive whole number")
        check(config)
    except KeyError as error:
        raise UserError(f"{where}: setting {error} is missing") from None
    except UserError:
        raise
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{where}: a setting has an unusable value ({error})") from None
    return config


def opt_config(values: dict, where: str) -> LMConfig:
    width, heads = values["hidden_size"], values["num_attention_heads"]
    require(values, where, do_layer_norm_before=(True,), word_embed_proj_dim=(width,), activation_function=("relu",),
            layer_norm_elementwise_affine=(True,), _remove_final_layer_norm=(False,))
    bias = values.get("enable_bias", True)
    return LMConfig(vocab_size=values["vocab_size"], width=width, layers=values["num_hidden_layers"], heads=heads, kv_heads=heads,
                    head_dim=width // heads, inner=values["ffn_dim"], max_positions=values["max_position_embeddings"],
                    positions="learned", norm="layer", mlp="relu", qkv_bias=bias, bias=bias,
                    tied_head=values.get("tie_word_embeddings", True))


def llama_config(values: dict, where: str) -> LMConfig:
    width, heads, qwen = values["hidden_size"], values["num_attention_heads"], values["model_type"] == "qwen2"
    old, new = values.get("rope_scaling") or {}, values.get("rope_parameters") or {}           # the old and the new place
    if old and new and old.get("rope_type", old.get("type", "default")) != new.get("rope_type", new.get("type", "default")):
        raise UserError(f"{where}: rope_scaling says {old}, rope_parameters says {new}; keep one of them")
    rope = {**old, **new}
    kind = rope.get("rope_type", rope.get("type", "default"))
    require({"rope_type": kind}, where, rope_type=("default", "llama3"))
    scaling = tuple(float(rope[name]) for name in LLAMA3_ROPE) if kind == "llama3" else ()
    require(values, where, hidden_act=("silu",), use_sliding_window=(False,))
    qkv_bias, mlp_bias = values.get("attention_bias", False), values.get("mlp_bias", False)
    if not qwen and qkv_bias != mlp_bias:
        raise UserError(f"{where}: attention_bias is {qkv_bias} and mlp_bias is {mlp_bias}; supported is both or neither")
    return LMConfig(vocab_size=values["vocab_size"], width=width, layers=values["num_hidden_layers"], heads=heads,
                    kv_heads=values.get("num_key_value_heads") or heads, head_dim=values.get("head_dim") or width // heads,
                    inner=values["intermediate_size"], max_positions=values["max_position_embeddings"],
                    positions="rope", rope_theta=float(rope.get("rope_theta") or values.get("rope_theta") or 10_000.0),
                    rope_scaling=scaling,
                    norm="rms", norm_eps=float(values["rms_norm_eps"]), mlp="swiglu", qkv_bias=True if qwen else qkv_bias,
                    bias=False if qwen else mlp_bias, tied_head=values.get("tie_word_embeddings", False))

"""Checkpoints in the released format with random weights, as any test may want them small; here at full size (9 GB):

    python tests/released_format.py FOLDER             FOLDER/{foundation.pt,clap.pth,opt/}; bench_full_size.py goes on with them
"""
import dataclasses
import json
import sys
from pathlib import Path

import tokenizers
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from af_min.clap import WindowEncoder                                       # noqa: E402
from af_min.config import AF1, Config                                       # noqa: E402
from af_min.flamingo import AudioFlamingo                                   # noqa: E402
from af_min.pretrained import POSITIONS, TABLE                              # noqa: E402
from af_min.pretrained_lm import expand                                     # noqa: E402
from af_min.representation import sinusoid_table                            # noqa: E402
from bench_clap import random_checkpoint                                    # noqa: E402


def write_checkpoint(path: Path, config: Config) -> None:
    """The released keys, duplicates and `module.` prefix included. A tensor and its duplicate share their numbers."""
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in AudioFlamingo(config).state_dict().items()
                  if name.startswith(("representation.", "xattn.", "lm."))}
    state = {}
    for ours, theirs in expand(TABLE, shapes).items():
        norm = "norm.weight" in ours
        state[theirs] = torch.full(shapes[ours], 0.3) if "gate" in ours else torch.empty(shapes[ours]).normal_(float(norm), 0.02)
    for name in list(state):
        layer, _, rest = name.removeprefix("lang_encoder.model.decoder.layers.").partition(".")
        kind, _, leaf = rest.partition(".")
        second = {"decoder_layer": "old_decoder_blocks", "gated_cross_attn_layer": "gated_cross_attn_layers"}.get(kind)
        if second:
            state[f"lang_encoder.{second}.{layer}.{leaf}"] = state[name]
    state[POSITIONS] = sinusoid_table(config.representation.max_audios * config.audio.max_windows, config.clap.out_width)[None]
    torch.save({"epoch": 0, "model_state_dict": {"module." + name: value for name, value in state.items()}}, path)


def write_opt_folder(folder: Path, config: Config) -> None:
    """config.json and a byte-level vocabulary of as many tokens as the model has, less Audio Flamingo's three."""
    folder.mkdir(parents=True, exist_ok=True)
    lm, special = config.lm, ["<s>", "<pad>", "</s>", "<unk>"]
    tokens = special + sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens += [f"unreachable{i}" for i in range(lm.vocab_size - 3 - len(tokens))]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}))
    (folder / "config.json").write_text(json.dumps({
        "model_type": "opt", "vocab_size": lm.vocab_size - 3, "hidden_size": lm.width, "num_hidden_layers": lm.layers,
        "num_attention_heads": lm.heads, "ffn_dim": lm.inner, "max_position_embeddings": lm.max_positions, "do_layer_norm_before": True,
        "word_embed_proj_dim": lm.width, "activation_function": "relu", "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}))


def write_all(folder: Path, config: Config) -> tuple[Path, Path, Path]:
    """-> checkpoint, CLAP checkpoint, LM folder."""
    folder.mkdir(parents=True, exist_ok=True)
    released = dataclasses.replace(config, lm=dataclasses.replace(config.lm, tied_head=False))
    write_checkpoint(folder / "foundation.pt", released)
    torch.manual_seed(1)
    weights = random_checkpoint(WindowEncoder(config.audio, config.clap))
    torch.save({"model": {"clap." + name: value for name, value in weights.items()}}, folder / "clap.pth")
    write_opt_folder(folder / "opt", released)
    return folder / "foundation.pt", folder / "clap.pth", folder / "opt"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/released_format.py FOLDER")
    for written in write_all(Path(sys.argv[1]), AF1):
        print(written)

"""Published weights -> a run folder of ours: the released Audio Flamingo checkpoints, and new models on published parts.

    python -m af_min.pretrained --audio-flamingo foundation.pt --clap clapcap_weights_2023.pth --lm DIR --out runs/af1

reads the released checkpoint (representation layers, cross-attention blocks, language model), its window encoder, and the
folder of its language model (facebook/opt-iml-max-1.3b: config.json and the vocabulary; its weights are not needed), and
writes a folder for `python sample.py --run runs/af1`. Without --audio-flamingo it makes a new, untrained Audio Flamingo on
that encoder and that language model (OPT, Llama or Qwen2), for `python train.py --stage pretrain`.

The readers of the parts: pretrained_lm.py, pretrained_clap.py, pretrained_text.py; pretrained_files.py opens the files.
"""
from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from . import cli
from .checkpoint import save_settings, write_tensors, writing
from .clap import WindowEncoder
from .cli import UserError
from .config import AF1, Config
from .engine import peak_memory
from .flamingo import AudioFlamingo
from .pretrained_clap import load_clap
from .pretrained_files import Entry, expand, open_file, read_table, seems, shapes_of
from .pretrained_lm import OPT_TABLE, lm_config, lm_state, read_config
from .pretrained_text import PublishedTokenizer, published_tokenizer
from .representation import Representation, sinusoid_table
from .xattn import GatedCrossAttention

# Our name -> the name in a released checkpoint. {i} stands for the layer, {p} for weight and bias.
LAYER, BLOCK = "lang_encoder.model.decoder.layers.{i}.", "lang_encoder.model.decoder.layers.{i}.gated_cross_attn_layer."
TABLE = {
    "representation.norm.{p}": "audio_transformer.layer_norm.{p}",
    "representation.layers.{i}.0.q.{p}": "audio_transformer.layer_stack.{i}.slf_attn.w_qs.{p}",
    "representation.layers.{i}.0.k.{p}": "audio_transformer.layer_stack.{i}.slf_attn.w_ks.{p}",
    "representation.layers.{i}.0.v.{p}": "audio_transformer.layer_stack.{i}.slf_attn.w_vs.{p}",
    "representation.layers.{i}.0.out.{p}": "audio_transformer.layer_stack.{i}.slf_attn.fc.{p}",
    "representation.layers.{i}.0.norm.{p}": "audio_transformer.layer_stack.{i}.slf_attn.layer_norm.{p}",
    "representation.layers.{i}.1.up.{p}": "audio_transformer.layer_stack.{i}.pos_ffn.w_1.{p}",
    "representation.layers.{i}.1.down.{p}": "audio_transformer.layer_stack.{i}.pos_ffn.w_2.{p}",
    "representation.layers.{i}.1.norm.{p}": "audio_transformer.layer_stack.{i}.pos_ffn.layer_norm.{p}",
    "xattn.{i}.norm.{p}": BLOCK + "attn.norm.{p}",
    "xattn.{i}.q.{p}": BLOCK + "attn.to_q.{p}",
    "xattn.{i}.kv.{p}": BLOCK + "attn.to_kv.{p}",
    "xattn.{i}.out.{p}": BLOCK + "attn.to_out.{p}",
    "xattn.{i}.attn_gate": BLOCK + "attn_gate",
    "xattn.{i}.ff_norm.{p}": BLOCK + "ff.0.{p}",
    "xattn.{i}.up.{p}": BLOCK + "ff.1.{p}",
    "xattn.{i}.down.{p}": BLOCK + "ff.3.{p}",
    "xattn.{i}.ff_gate": BLOCK + "ff_gate",
    **{"lm." + ours: "lang_encoder." + theirs.replace("layers.{i}.", "layers.{i}.decoder_layer.")
       for ours, theirs in OPT_TABLE.items()},
}
POSITIONS = "audio_transformer.position_enc.pos_table"                  # computed by ours, and compared with the file's
EMBEDDING = "lang_encoder.model.decoder.embed_tokens.weight"
DUPLICATE = re.compile(r"lang_encoder\.(old_decoder_blocks|gated_cross_attn_layers)\.")  # the same layers under a second name


@dataclass(frozen=True)
class Arguments:
    audio_flamingo: str = cli.flag("", "released checkpoint, such as foundation.pt; without it a new model is made")
    clap: str = cli.flag("", "clapcap_weights_2023.pth or another MS-CLAP 2023 checkpoint")
    lm: str = cli.flag("", "folder of the language model (config.json, vocabulary; for a new model also its weights)")
    out: str = cli.flag("runs/af1", "run folder to write")
    slots: int = cli.flag(8, "audios a text has room for; of the released checkpoints: the number they were fine-tuned with "
                             "(1 without examples, 4 the chat model, 4 or 8 with examples), as empty slots are attended")
    dtype: str = cli.flag("", "numbers of the written weights (default: bfloat16; of a new model, which is to be trained, float32)",
                          choices=("bfloat16", "float16", "float32"))
    seed: int = cli.flag(0, "of the layers of a new model that are not published")


def open_released(path: Path) -> dict[str, Entry]:
    """The tensors of a released checkpoint, without the `module.` of data parallel training."""
    entries = {name.removeprefix("module."): entry for name, entry in open_file(path).items()}
    if EMBEDDING not in entries or POSITIONS not in entries:
        raise UserError(f"{path}: expected a released Audio Flamingo checkpoint (foundation.pt, chat.pt), but {seems(entries)}")
    return entries


def released_state(path: Path, config: Config, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """State dict of a released checkpoint, for AudioFlamingo(config) less its encoder and its `silence`."""
    entries = open_released(path)
    with torch.device("meta"):
        model = AudioFlamingo(config)
    shapes = {name: shape for name, shape in shapes_of(model).items() if name.startswith(("representation.", "xattn.", "lm."))}
    rows = config.representation.max_audios * config.audio.max_windows
    theirs = entries[POSITIONS].read(torch.float32)[0]
    if len(theirs) < rows or theirs.shape[1] != config.clap.out_width:
        raise UserError(f"{path}: {POSITIONS} has shape {tuple(theirs.shape)}; expected ({rows} or more, {config.clap.out_width}) "
                        f"for {config.representation.max_audios} audios of {config.audio.max_windows} windows")
    if (theirs[:rows] - sinusoid_table(rows, config.clap.out_width)).abs().max() > 1e-5:
        raise UserError(f"{path}: {POSITIONS} is not the sinusoid table; expected pos / 10000^(2i/D), sine and cosine in turn")
    return read_table(entries, expand(TABLE, shapes), shapes, str(path), f"Audio Flamingo of {config.lm.layers} layers", dtype,
                      ignore=lambda name: name == POSITIONS or bool(DUPLICATE.match(name)))


def add_tokens(state: dict[str, Tensor], tokenizer: PublishedTokenizer, rows: int, seed: int) -> None:
    """Give the LM's embedding (and an untied head) `rows` rows, in place. A new special token starts as the mean of what is there,
    <|endofchunk|> as the end of text, with a little noise: to a frozen language model equal rows would be one token."""
    random = torch.Generator().manual_seed(seed)
    for name in ("embed.weight", "head.weight"):
        if name in state:
            old, spread, mean = state[name], *torch.std_mean(state[name].float(), 0)
            state[name] = torch.cat([old, mean.to(old.dtype).expand(max(0, rows - len(old)), -1)])
            for i in sorted(i for i in tokenizer.special_ids if i >= tokenizer.vocabulary.size):
                like = old[tokenizer.eos_id].float() if i == tokenizer.eoc_id else mean
                state[name][i] = like + 0.3 * spread * torch.randn(len(mean), generator=random)


def encoder_state(config: Config, clap: Path, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor, str]:
    """The window encoder's state dict from a CLAP checkpoint (its front end stays float32), its embedding of silence, a report."""
    encoder = WindowEncoder(config.audio, config.clap).eval()
    report = load_clap(clap, encoder)
    with torch.no_grad():
        silence = encoder(torch.zeros(1, config.audio.window_samples))[0]
    return {"encoder." + name: value for name, value in encoder.to(dtype).state_dict().items()}, silence, report


def released_model(audio_flamingo: Path, clap: Path, lm: Path, dtype: torch.dtype, slots: int = 8,
                   base: Config = AF1) -> tuple[Config, PublishedTokenizer, dict[str, Tensor]]:
    """Settings, tokenizer and whole state dict of a released checkpoint. `base` says what no file tells (heads, windows)."""
    tokenizer = published_tokenizer(lm)
    values = read_config(Path(lm))
    if values["model_type"] != "opt":
        raise UserError(f"{lm}: a {values['model_type']} model; the released Audio Flamingo checkpoints are built on an OPT, "
                        "facebook/opt-iml-max-1.3b")
    rows = open_released(audio_flamingo)[EMBEDDING].shape[0]
    if rows != tokenizer.vocab_size:
        raise UserError(f"{audio_flamingo}: its vocabulary has {rows} tokens, that of {lm} with the special tokens "
                        f"{tokenizer.vocab_size}; expected the language model that the checkpoint was trained on")
    config = replace(base, audio_id=tokenizer.audio_id, lm=replace(lm_config(values, str(lm)), vocab_size=rows, tied_head=False),
                     representation=replace(base.representation, attend_padding=True, max_audios=slots))
    encoder, silence, report = encoder_state(config, clap, dtype)              # the smaller file first: a wrong one is soon told
    state = released_state(audio_flamingo, config, dtype)
    print(f"{audio_flamingo}: {len(state)} tensors ({sum(t.numel() for t in state.values()) / 1e6:.1f} M numbers)\n{report}")
    return config, tokenizer, {**state, **encoder, "silence": silence}


def new_model(clap: Path | None, lm: Path, dtype: torch.dtype = torch.float32, slots: int = 8, seed: int = 0,
              base: Config = AF1) -> tuple[Config, PublishedTokenizer, dict[str, Tensor]]:
    """An untrained Audio Flamingo on a published language model and, unless `clap` is None, a published encoder."""
    tokenizer = published_tokenizer(lm)
    lm_settings, weights = lm_state(lm, dtype)
    if tokenizer.vocabulary.text_size > lm_settings.vocab_size:
        raise UserError(f"{lm}: its vocabulary has {tokenizer.vocabulary.text_size} tokens, its weights have {lm_settings.vocab_size}; "
                        "expected the vocabulary that the model was trained with")
    rows = max(tokenizer.vocab_size, lm_settings.vocab_size)
    add_tokens(weights, tokenizer, rows, seed)
    config = replace(base, audio_id=tokenizer.audio_id, lm=replace(lm_settings, vocab_size=rows),
                     representation=replace(base.representation, max_audios=slots))
    torch.manual_seed(seed)
    width, heard = config.lm.width, config.clap.out_width
    parts = {"representation.": Representation(config.representation, heard, config.audio.max_windows)}
    for i in range(0, config.lm.layers, config.xattn.every):
        parts[f"xattn.{i}."] = GatedCrossAttention(config.xattn, width, heard, slots)
    if clap is None:
        encoder = {"encoder." + name: value for name, value in WindowEncoder(config.audio, config.clap).state_dict().items()}
    else:
        encoder, _, report = encoder_state(config, clap, dtype)
        print(report)
    state = {prefix + name: value.to(dtype) for prefix, part in parts.items() for name, value in part.state_dict().items()}
    return config, tokenizer, {**state, **encoder, **{"lm." + name: value for name, value in weights.items()}}


def write_run(out: Path, config: Config, tokenizer: PublishedTokenizer, state: dict[str, Tensor], origin: dict) -> None:
    """A run folder (checkpoint.py). model.safetensors is written last: a folder that has it is whole."""
    with writing(out, "make room, or name another --out"):
        (out / "model.safetensors").unlink(missing_ok=True)
        save_settings(out, config, tokenizer, {"converted_from": origin})
        write_tensors(out / "model.safetensors", state)


def main() -> None:
    args, began = cli.parse(Arguments, description=__doc__), time.time()
    if not args.lm:
        raise UserError("--lm is missing: the folder of the language model (config.json and its vocabulary)")
    if not args.clap:
        raise UserError("--clap is missing: the window encoder, clapcap_weights_2023.pth, which no other file holds; "
                        "train.py --lm DIR makes a new model that trains its own")
    cli.at_least(args, slots=1)
    out, kind = Path(args.out), args.dtype or ("bfloat16" if args.audio_flamingo else "float32")
    dtype = getattr(torch, kind)
    for what, found in (("a file", out.exists() and not out.is_dir()), ("a run that has been trained", (out / "log.jsonl").exists()),
                        ("the folder of the language model", out.resolve() == Path(args.lm).resolve())):
        if found:
            raise UserError(f"--out {out}: this is {what}; name a new folder")
    if args.audio_flamingo:
        config, tokenizer, state = released_model(args.audio_flamingo, args.clap, args.lm, dtype, args.slots)
    else:
        config, tokenizer, state = new_model(args.clap, args.lm, dtype, args.slots, args.seed)
    write_run(out, config, tokenizer, state, {name: getattr(args, name) for name in ("audio_flamingo", "clap", "lm")})
    count, size = sum(t.numel() for t in state.values()), sum(t.nbytes for t in state.values())
    print(f"{args.out}: {count / 1e6:.1f} M numbers, {size / 1e9:.2f} GB ({kind}), vocabulary {tokenizer.vocab_size}; "
          f"{time.time() - began:.0f} s, peak memory {peak_memory(torch.device('cpu')):.2f} GB")


if __name__ == "__main__":
    cli.run(main)

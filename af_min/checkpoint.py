"""Run folders: everything that sample.py needs, readable by a person, movable to another machine.

    runs/<name>/config.json          dimensions of the model and settings of its training
                model.safetensors    weights
                tokenizer.model      sentencepiece; or a published vocabulary and special_tokens.json
                log.jsonl            one line a training step
                text_tower.safetensors    CLAP's other half, where the clap stage was trained (dialogue_filter.py)
                scores.json  report.png
                checkpoint/          the state of an unfinished training: `--resume` goes on from there

Files are written under a temporary name and renamed: one that has its name is whole.
"""
from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from . import config as settings
from .cli import UserError
from .config import Config
from .pretrained_text import IDS_FILE, PublishedTokenizer
from .text import Tokenizer


TEXT_TOWER = "text_tower.safetensors"
UMASK = os.umask(0o022)
os.umask(UMASK)


def write_json(path: Path, value) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)


def read_json(path: Path) -> dict:
    try:
        return json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); is this a run folder made by train.py?") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    partial = path.with_name(path.name + ".partial")
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, partial)
    partial.chmod(0o666 & ~UMASK)                            # safetensors writes files that only their owner may read
    os.replace(partial, path)


def read_tensors(path: Path, device="cpu") -> dict[str, torch.Tensor]:
    try:
        return load_file(path, device=str(device))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); copy or write it again") from None


def load_strictly(module: nn.Module, tensors: dict[str, torch.Tensor], where) -> None:
    """Every tensor of the module, none else, each of its shape; UserError names the first that differs."""
    own = module.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        got, expected = (tuple(d[name].shape) if name in d else None for d in (tensors, own))
        if got != expected:
            raise UserError(f"{where}: {name}: got shape {got or 'nothing'}, expected {expected or 'nothing'}")
    module.load_state_dict(tensors)


def save_settings(run: Path, config: Config, tokenizer: Tokenizer, training: dict) -> None:
    """config.json and the tokenizer."""
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "config.json", {"model": settings.to_dict(config), "training": training})
    if isinstance(tokenizer, PublishedTokenizer):
        return tokenizer.save(run)
    (run / IDS_FILE).unlink(missing_ok=True)               # of an earlier run of this name
    tokenizer.save(run / "tokenizer.model")


def load_tokenizer(run: Path) -> Tokenizer | PublishedTokenizer:
    return PublishedTokenizer.load(run) if (run / IDS_FILE).exists() else Tokenizer.load(run / "tokenizer.model")


def load_config(run: Path) -> Config:
    path = Path(run) / "config.json"
    values = read_json(path)
    if not isinstance(values, dict) or "model" not in values:
        raise UserError(f'{path}: expected the dimensions of a model under "model"; is this a run folder made by train.py?')
    return settings.from_dict(Config, values["model"], str(path))


def save_run(run: Path, model: nn.Module, config: Config, tokenizer: Tokenizer, training: dict) -> None:
    """A whole run folder: settings first, weights last."""
    save_settings(run, config, tokenizer, training)
    write_tensors(run / "model.safetensors", model.state_dict())


def load_run(run: Path, device="cpu", dtype: torch.dtype = torch.float32):
    """-> (AudioFlamingo in eval mode, Tokenizer). UserError names the file that is missing or damaged."""
    from .flamingo import AudioFlamingo
    run = Path(run)
    if not (run / "model.safetensors").exists():
        raise UserError(f"{run}: no trained model there (model.safetensors is missing); run `python train.py` first, "
                        "or name its folder with --run")
    if (run / IDS_FILE).exists():                            # built on published weights, with a published vocabulary
        from .pretrained import open_run
        model, tokenizer = open_run(run)
        return model.to(device), tokenizer
    config = load_config(run)
    model = AudioFlamingo(config).to(device, dtype)
    load_strictly(model, read_tensors(run / "model.safetensors", device), run / "model.safetensors")
    return model.eval(), load_tokenizer(run)


# ---------------------------------------------------------------------- training state

def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's state as named tensors: `<parameter number>.<name>`."""
    return {f"{number}.{name}": value for number, state in optimizer.state_dict()["state"].items()
            for name, value in state.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    state: dict[int, dict] = {}
    for key, value in tensors.items():
        number, name = key.split(".")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_checkpoint(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """The state of a training after a step, as one folder that appears whole: checkpoint/{model,optimizer}.safetensors, state.json."""
    new, final, old = run / "checkpoint.partial", run / "checkpoint", run / "checkpoint.old"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    write_tensors(new / "model.safetensors", model.state_dict())
    write_tensors(new / "optimizer.safetensors", optimizer_tensors(optimizer))
    write_json(new / "state.json", state)
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(new, final)
    shutil.rmtree(old, ignore_errors=True)


def forget(run: Path) -> None:
    """Remove the log and the checkpoints of an earlier training of this name: `--resume` must not find them."""
    (run / "log.jsonl").unlink(missing_ok=True)
    for name in ("checkpoint", "checkpoint.old", "checkpoint.partial"):
        shutil.rmtree(run / name, ignore_errors=True)


def cut_log(run: Path, stages: tuple[str, ...], state: dict) -> None:
    """Leave in log.jsonl what lies before the checkpoint: steps after it are done again, and a kill may leave half a line."""
    reached, kept = (stages.index(state["stage"]), state["step"]), ""
    for line in (run / "log.jsonl").read_text().splitlines(keepends=True) if (run / "log.jsonl").exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if (stages.index(entry["stage"]), entry["step"]) >= reached:
            break
        kept += line
    (run / "log.jsonl.partial").write_text(kept)
    os.replace(run / "log.jsonl.partial", run / "log.jsonl")


def find_checkpoint(run: Path) -> Path | None:
    """The last whole checkpoint; the older one if a kill fell between the two renames."""
    for name in ("checkpoint", "checkpoint.old"):
        if (run / name / "state.json").exists():
            return run / name
    return None


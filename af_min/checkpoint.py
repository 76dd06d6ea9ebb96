"""Run folders: everything that sample.py needs, readable by a person, movable to another machine.

    runs/<name>/config.json          dimensions of the model and settings of its training
                model.safetensors    weights
                tokenizer.model      sentencepiece; or a published vocabulary and special_tokens.json
                log.jsonl            one line a training step
                text_tower.safetensors    CLAP's other half, where the clap stage was trained (dialogue_filter.py)
                scores.json  report.png
                checkpoint/          the state of the training: `--resume` goes on from there; of no use to a finished one
                checkpoint.old/      the one before it, in case that this one is damaged

Files are written under a temporary name and renamed: one that has its name is whole.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict, set_optimizer_state_dict

from .cli import UserError
from .config import Config, from_dict
from .flamingo import AudioFlamingo
from .manifest import whole_lines
from .pretrained_files import open_file, parameters_on_meta, read_table, shapes_of
from .pretrained_text import IDS_FILE, PublishedTokenizer, read_json
from .text import Tokenizer


TEXT_TOWER = "text_tower.safetensors"
CHECKPOINTS = "checkpoint", "checkpoint.old"              # the last, and the one before it
UMASK = os.umask(0o022)
os.umask(UMASK)


@contextlib.contextmanager
def writing(run: Path, advice: str = "") -> Iterator[None]:
    """A disk that is full, or that takes no more files for another reason, is told in one line."""
    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as error:
        said = next((str(e) for e, _ in error.failures.values()), "") if isinstance(error, CheckpointException) else error
        whole = any((run / name).exists() for name in CHECKPOINTS)
        go_on = "the last checkpoint is whole: make room, then --resume" if whole else "make room, then start again"
        raise UserError(f"{run}: cannot be written ({said}); {advice or go_on}") from None


def write_json(path: Path, value) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    partial = path.with_name(path.name + ".partial")
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, partial)
    partial.chmod(0o666 & ~UMASK)                            # safetensors writes files that only their owner may read
    os.replace(partial, path)


def read_tensors(path: Path, device="cpu") -> dict[str, torch.Tensor]:
    """All of a file, memory-mapped: what is copied into a module or to a GPU takes no memory of its own."""
    try:
        return load_file(path, device=str(device))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); copy or write it again") from None


def load_strictly(module: nn.Module, tensors: dict[str, torch.Tensor], where) -> None:
    """Every tensor of the module, none else, each of its shape; UserError names the first that differs."""
    own, given = shapes_of(module), {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(own | given):
        got, expected = given.get(name, "nothing"), own.get(name, "nothing")
        if got != expected:
            raise UserError(f"{where}: {name}: got shape {got}, expected {expected}")
    module.load_state_dict(tensors)


def save_settings(run: Path, config: Config, tokenizer: Tokenizer, training: dict) -> None:
    """config.json and the tokenizer."""
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "config.json", {"model": asdict(config), "training": training})
    if isinstance(tokenizer, PublishedTokenizer):
        return tokenizer.save(run)
    (run / IDS_FILE).unlink(missing_ok=True)               # of an earlier run of this name
    tokenizer.save(run / "tokenizer.model")


def load_tokenizer(run: Path) -> Tokenizer | PublishedTokenizer:
    return PublishedTokenizer.load(run) if (run / IDS_FILE).exists() else Tokenizer.load(run / "tokenizer.model")


def load_config(run: Path) -> Config:
    path = Path(run) / "config.json"
    values = read_json(path)
    if "model" not in values:
        raise UserError(f'{path}: expected the dimensions of a model under "model"; is this a run folder made by train.py?')
    return from_dict(Config, values["model"], str(path))


def save_run(run: Path, model: nn.Module, config: Config, tokenizer: Tokenizer, training: dict) -> None:
    """A whole run folder: settings first, weights last."""
    save_settings(run, config, tokenizer, training)
    write_tensors(run / "model.safetensors", model.state_dict())


def load_run(run: Path, device="cpu") -> tuple[AudioFlamingo, Tokenizer | PublishedTokenizer]:
    """The model, for answering, and its tokenizer. One weight at a time is read, into its place, as float32 or, built on published weights,
    in its own dtype. UserError names the file that is missing or damaged."""
    run = Path(run)
    path = run / "model.safetensors"
    if not path.exists():
        begun = any((run / name).exists() for name in CHECKPOINTS)
        way_out = f"go on with its training: `python train.py --name {run.name} --resume`" if begun else \
            "run `python train.py` first, or name its folder with --run"
        raise UserError(f"{run}: no trained model there (model.safetensors is missing); {way_out}")
    with parameters_on_meta():
        model = AudioFlamingo(load_config(run))
    shapes = shapes_of(model)
    tensors = read_table(open_file(path), {name: name for name in shapes}, shapes, str(path), f"the model of {run / 'config.json'}",
                         None if (run / IDS_FILE).exists() else torch.float32)
    model.load_state_dict(tensors, assign=True)
    return model.to(device).eval(), load_tokenizer(run)


# ---------------------------------------------------------------------- training state

def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The state of AdamW or Muon as named tensors: `<parameter number>.<name>`."""
    return {f"{number}.{name}": value for number, state in optimizer.state_dict()["state"].items()
            for name, value in state.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    state, groups = defaultdict(dict), optimizer.state_dict()["param_groups"]
    for key, value in tensors.items():
        number, name = key.split(".")
        state[int(number)][name] = value
    for group in groups:
        if any(number in state and group.get("matrices", False) != ("momentum" in state[number]) for number in group["params"]):
            raise UserError("--optimizer: the checkpoint is another optimizer's; --resume goes on with the one that the stage began with")
    optimizer.load_state_dict({"state": dict(state), "param_groups": groups})


def save_checkpoint(run: Path, everything: nn.Module, optimizer: torch.optim.Optimizer, state: dict, rank: int = 0,
                    sharded: bool = False, wait: Callable[[], None] = lambda: None) -> None:
    """The state of a training after a step: checkpoint/, which appears whole; the one before it stays as checkpoint.old/.

    {model,optimizer}.safetensors, or the processes' own files if the weights are sharded; state.json with the SHA-256 of each.
    """
    new, final, old = (run / name for name in ("checkpoint.partial", *CHECKPOINTS))
    if rank == 0:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    wait()
    if sharded:
        model, adam = get_state_dict(everything, optimizer)
        dcp.save({"model": model, "optimizer": adam}, checkpoint_id=new)
    elif rank == 0:
        write_tensors(new / "model.safetensors", everything.state_dict())
        write_tensors(new / "optimizer.safetensors", optimizer_tensors(optimizer))
    wait()
    if rank == 0:
        write_json(new / "state.json", {**state, "sha256": {path.name: sha256(path) for path in sorted(new.iterdir())}})
        if final.exists():                                   # else a kill fell between these renames: `old` is the last whole one
            shutil.rmtree(old, ignore_errors=True)
            os.replace(final, old)
        os.replace(new, final)
    wait()


def load_weights(found: Path, everything: nn.Module, device) -> None:
    """The weights of a checkpoint, of sharded processes or not, into a whole model."""
    if (found / "model.safetensors").exists():
        return load_strictly(everything, read_tensors(found / "model.safetensors", device), found)
    dcp.load({"model": everything.state_dict()}, checkpoint_id=found)


def load_training(found: Path, everything: nn.Module, optimizer: torch.optim.Optimizer, device, sharded: bool = False) -> None:
    """The state of the optimizer; `sharded`: by processes that may be fewer or more than those that wrote it."""
    if sharded != (found / ".metadata").exists():
        raise UserError(f"{found}: written {'without' if sharded else 'with'} --shard; --resume goes on likewise")
    if not sharded:
        return load_optimizer(optimizer, read_tensors(found / "optimizer.safetensors", device))
    adam = get_optimizer_state_dict(everything, optimizer)
    dcp.load({"optimizer": adam}, checkpoint_id=found)
    set_optimizer_state_dict(everything, optimizer, adam)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def forget(run: Path, but_weights: bool) -> None:
    """Remove what an earlier training of this name left and the new one's settings would not fit, or `--resume` would find.

    but_weights: the new one begins with the weights that are there.
    """
    for name in ("log.jsonl", "scores.json", "report.png", *("model.safetensors", TEXT_TOWER) * (not but_weights)):
        (run / name).unlink(missing_ok=True)
    for path in (*run.glob("scores-*.json"), *run.glob("similarity-*.png")):
        path.unlink()
    for name in (*CHECKPOINTS, "checkpoint.partial"):
        shutil.rmtree(run / name, ignore_errors=True)


def cut_log(run: Path, stages: tuple[str, ...], state: dict) -> None:
    """Leave in log.jsonl what lies before the checkpoint: steps after it are done again, and a kill may leave half a line."""
    reached, kept = (stages.index(state["stage"]), state["step"]), 0
    for entry, end in whole_lines(run / "log.jsonl"):
        if (stages.index(entry["stage"]), entry["step"]) >= reached:
            break
        kept = end
    with open(run / "log.jsonl", "ab") as log:
        log.truncate(kept)


def find_checkpoint(run: Path, stages: tuple[str, ...], warn: bool = True) -> tuple[Path, dict] | None:
    """The last whole checkpoint with its stage and step; for a damaged one a warning, and the one before it."""
    problem = None
    for path in (run / name for name in CHECKPOINTS):
        if not path.exists():
            continue
        try:
            state = read_json(path / "state.json")
            if state.get("stage") not in stages or not isinstance(state.get("step"), int):
                raise UserError(f"{path / 'state.json'}: got {state}, expected a stage and a step")
            for name, digest in state.pop("sha256", {}).items():
                if not (path / name).exists() or sha256(path / name) != digest:
                    raise UserError(f"{path / name}: damaged: not what was written (SHA-256)")
        except UserError as error:
            problem = problem or error
            continue
        if problem and warn:
            print(f"warning: {problem}; going on from the checkpoint before it: {state['stage']} step {state['step']}", file=sys.stderr)
        return path, state
    if problem:
        raise UserError(f"{problem}; leave out --resume to start anew")
    return None

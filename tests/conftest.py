"""Shared by the tests: one thread, a small prepared data set, a tokenizer, a model of a few thousand weights."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")        # before torch is imported: small tensors, and the same sums on every machine
os.environ.setdefault("MKL_NUM_THREADS", "1")

import dataclasses
import signal
import sys

import numpy as np
import pytest
import torch

import micro
import training
from af_min import cli, engine, manifest, scenes
from af_min.text import Tokenizer

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
signal.signal(signal.SIGINT, signal.default_int_handler)      # which a script that starts the tests with & has turned off

SIZES = scenes.Sizes(train=60, val=5, test=80, textures=10, clips=8, kinds=8, kind_clips=8, episodes=100, examples=40, told=30, glossaries=20, val_items=5, test_items=30)
LINES = ["The task is audio captioning. ", "The task is sound classification. ", "The task is audio question answering. ",
         "The task is dialog. ", "Here are similar examples. ", "\nAnswer:", "user: ", " \nassistant: ", "describe the sounds.",
         "what comes after the bell?", "bell then dog then horn", "is it high or low?", "classify this sound.", "no"] * 3


@pytest.fixture(scope="session")
def scenes_data(tmp_path_factory):
    """The embedded data set, small, as prepare_data.py writes it. Read it; nothing but `embeddings/` may be added."""
    import prepare_data
    folder = tmp_path_factory.mktemp("data") / "scenes"
    prepare_data.prepare_scenes(folder, 0, SIZES)
    return folder


@pytest.fixture(scope="session")
def scenes_rows(scenes_data):
    """{split: rows} of it."""
    return {split: manifest.read_rows(scenes_data / f"{split}.jsonl") for split in manifest.SPLITS}


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train(LINES, 400)


@pytest.fixture(scope="session")
def micro_config(tokenizer):
    """The micro preset with this tokenizer's ids, without dropout."""
    lm = dataclasses.replace(micro.MICRO.lm, vocab_size=tokenizer.vocab_size, dropout=0.0)
    return dataclasses.replace(micro.MICRO, lm=lm, audio_id=tokenizer.audio_id)


def shake(module: torch.nn.Module, seed: int = 0, scale: float = 0.15) -> torch.nn.Module:
    """Random weights, always the same, large enough that every branch, norm and gate matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            middle = parameter.mean() if parameter.ndim < 2 else 0.0           # gains stay about 1, biases about 0, gates open
            parameter.copy_(middle + scale * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def array(tensor):
    return tensor.detach().double().numpy()


def layer_norm(x, norm, eps=1e-5):
    """In float64, by hand."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred ** 2).mean(-1, keepdims=True) + eps) * array(norm.weight) + array(norm.bias)


def rows_of(out) -> list[dict]:
    """Of a prepared data set, each with its split."""
    return [row | {"split": split} for split in manifest.SPLITS for row in manifest.read_rows(out / f"{split}.jsonl")]


@pytest.fixture
def run_command(monkeypatch, capsys):
    """A command inside this process: run_command(main, *flags) -> (exit code, standard output, standard error)."""
    def run(main, *flags):
        monkeypatch.setattr(sys, "argv", ["x.py", *map(str, flags)])
        code = 0
        try:
            cli.run(main)
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory, scenes_data):
    """All stages at once, without a break: (folder of the run, {stage: (state before, state after)})."""
    folder, seen = tmp_path_factory.mktemp("trained"), {}

    def spy(patch):
        real = engine.Trainer.run

        def copy(module):
            return {name: value.detach().clone() for name, value in module.state_dict().items()}

        def watched(self, *rest):
            before = copy(self.everything)
            meter = real(self, *rest)
            seen[self.stage] = before, copy(self.everything)
            return meter
        patch.setattr(engine.Trainer, "run", watched)
    training.train(folder, scenes_data, "--name", "whole", before=spy)
    return folder / "runs" / "whole", seen

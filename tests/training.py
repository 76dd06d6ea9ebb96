"""Running train.py in tests: inside this process or in one of its own; what it wrote."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import micro
from af_min import cli

ROOT = Path(__file__).parents[1]
TRAIN = micro.train_module()
STAGES = TRAIN.ALL_STAGES


def run_main(module, folder, flags, before=None):
    """`python MODULE.py FLAGS` in `folder`, inside this process. `before` may patch the module first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["x.py", *map(str, flags)])
        if before:
            before(patch)
        try:
            cli.run(module.main)
        finally:
            torch.use_deterministic_algorithms(False)


def train(folder, data, *flags, before=None):
    run_main(TRAIN, folder, ["--preset", "micro", "--no-evaluate", "--data", data, "--checkpoint-every", 2, *flags], before)


def spawn(folder, *command):
    """A command in a process of its own -> (exit code, what it printed)."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          timeout=240, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return done.returncode, done.stdout


def log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses(run):
    return [(line["stage"], line["step"], line["loss"]) for line in log(run)]


def weights(path):
    return {name: value.clone() for name, value in load_file(path).items()}

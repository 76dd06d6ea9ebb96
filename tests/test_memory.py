"""memory.py against a training step's own tensors, and against arithmetic by hand."""
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import micro
from af_min import data, memory
from af_min.config import STAGES, StageConfig
from af_min.engine import Trainer, World
from af_min.stages import Everything, Step, TextStage

MICRO = replace(micro.STILL, audio_id=micro.STILL.lm.vocab_size - 1)
STAGE = StageConfig(steps=1, lr=1e-3, warmup=1, batch=2, batch_tokens=128)


@pytest.mark.parametrize("stage", ["lm", "pretrain", "sft"])
def test_fixed_bytes_are_those_of_a_step(stage):
    everything = Everything(MICRO)
    batch = memory.longest(MICRO, stage, 2, 32)

    def loss():
        return everything(batch, stage != "lm").sum(), torch.zeros(1)
    objective = SimpleNamespace(step=lambda number: Step([(["x"], loss)], [1], 2), tasks=["x"])
    trainer = Trainer(stage, everything, objective, STAGE, micro.flags(), World(0, 1, torch.device("cpu")))
    trainer.step(0, SimpleNamespace(signal=0))
    learned = trainer.parameters
    held = sum(p.nbytes for p in everything.parameters()) + sum(p.grad.nbytes for p in learned if p.grad is not None)
    held += sum(p.nbytes for p in learned if p.grad is None)                      # got no gradient in this one batch
    held += sum(v.nbytes for state in trainer.optimizer.state.values() for v in state.values() if v.ndim) + sum(
        2 * p.nbytes for p in learned if p.grad is None)
    assert memory.fixed(everything, stage, 1, shard=False) == held


def test_shares_of_sharded_processes_by_hand():
    everything = Everything(MICRO)
    ears = sum(p.numel() for part in (everything.model.encoder, everything.text_tower) for p in part.parameters()) + 1
    rest = sum(p.numel() for p in everything.parameters()) - ears
    assert memory.fixed(everything, "sft", 4, shard=True) == pytest.approx(4 * ears + 4 * rest / 4 + 12 * rest / 4, abs=4)
    assert memory.fixed(everything, "sft", 4, shard=False) == 4 * ears + 20 * rest


def test_kept_tensors_by_hand():
    """relu(x W) keeps x for the gradient of W and its own output; in bfloat16 autocast x and W are copied, 2 bytes each."""
    layer, x = nn.Linear(8, 16, bias=False), torch.randn(4, 8)
    everything = SimpleNamespace(parameters=layer.parameters, model=SimpleNamespace(xattn={}, lm=SimpleNamespace(layers=[])))
    got = memory.kept(everything, lambda: torch.relu(layer(x)))
    assert got == 2 * 4 * 8 + 2 * 4 * 16                                           # no gradient of x: W is not kept


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_line_through_small_models_meets_a_larger_one(checkpointed):
    config = replace(MICRO, lm=replace(MICRO.lm, layers=4))
    everything = Everything(config)
    everything.freeze_but("sft")
    memory.lighten(everything, SimpleNamespace(checkpoint_activations=checkpointed, compile=False))
    whole = memory.kept(everything, lambda: everything(memory.longest(config, "sft", 3, 64), True), checkpointed)
    line = memory.batch_bytes(config, "sft", 64, checkpointed)(3)
    if checkpointed:                                                               # and one layer that is computed again
        layer = (memory.batch_bytes(config, "sft", 64, False)(3)
                 - memory.batch_bytes(replace(config, lm=replace(config.lm, layers=3)), "sft", 64, False)(3))
        line -= layer
    assert line == pytest.approx(whole, rel=0.02)


@pytest.mark.parametrize("stage, processes, micro_batch, expected", [
    ("pretrain", 8, 4, 3), ("sft", 8, 4, 1), ("sft", 8, 1, 4), ("pretrain", 3, 5, 7), ("pretrain", 1, 1000, 1)])
def test_accumulate_holds_every_forward_pass_to_its_samples(stage, processes, micro_batch, expected):
    """Against the pieces that TextStage makes of a batch of the mixture."""
    c = STAGES["af1"][stage]
    assert memory.pieces(c, processes, micro_batch) == expected

    def largest(accumulate):
        samples = [data.Sample([0] * 512, [1] * 512, ())] * (20 * c.batch)
        mixture = data.Mixture([data.Dataset("x", samples, ["x"] * len(samples))], c.batch, c.batch_tokens, 0)
        stage = TextStage.__new__(TextStage)
        vars(stage).update(mixture=mixture, world=World(0, processes, None), accumulate=accumulate, in_step=False, tasks=["x"], flops=(0, 0),
                           task_of=[np.zeros(len(samples), int)], answers_of=[np.ones(len(samples), int)])
        return max(len(names) for names, _ in stage.step(0).parts)
    assert largest(expected) <= micro_batch and (expected == 1 or largest(expected - 1) > micro_batch)


def test_cards():
    assert [memory.card(x * 1e9) for x in (1, 22, 36, 70, 120, 130)] == ["24 GB", "40 GB", "40 GB", "80 GB", "141 GB", "-"]


def test_the_command_prints_every_stage(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["memory", "--preset", "tiny", "--micro-batch", "2"])
    memory.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["clap", "lm", "pretrain", "sft"]
    monkeypatch.setattr("sys.argv", ["memory", "--micro-batch", "0"])
    with pytest.raises(memory.cli.UserError, match="--micro-batch 0: expected 1 or more"):
        memory.main()

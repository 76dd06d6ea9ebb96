"""train.py: each stage moves its own weights and begins with what the one before it left; processes and parts change nothing."""
import dataclasses
import json
import math

import pytest
import torch

import micro
from af_min import checkpoint, engine
from af_min.config import StageConfig
from training import ROOT, STAGES, log, losses, spawn, train, weights

# ---------------------------------------------------------------------- stages

OWN = {"clap": ("model.encoder.", "text_tower.", "log_scale"), "lm": ("model.lm.",), "pretrain": ("model.representation.", "model.xattn."),
       "sft": ("model.representation.", "model.xattn.", "model.lm.")}


FIXED = ["model.encoder.log_mel." + name for name in ("window", "filters")] + \
    ["model.encoder.mel_norm." + name for name in ("running_mean", "running_var", "num_batches_tracked")]


@pytest.mark.parametrize("stage", STAGES)
def test_the_weights_that_move_are_exactly_the_stages(trained, stage):
    """All of them, and no other. (log_mel and the statistics of the mel bins are no weights: fixed, and measured once.)"""
    before, after = trained[1][stage]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith(OWN[stage])} - set(FIXED)


def test_a_stage_begins_with_what_the_one_before_it_left(trained):
    for earlier, later in zip(STAGES, STAGES[1:]):
        left, found = trained[1][earlier][1], trained[1][later][0]
        assert all(torch.equal(left[name], found[name]) for name in left)
    final = weights(trained[0] / "model.safetensors")
    left = trained[1]["sft"][1]
    assert all(torch.equal(value, left["model." + name]) for name, value in final.items())


def test_the_log_has_every_step_with_its_rate(trained):
    lines = log(trained[0])
    assert [(line["stage"], line["step"]) for line in lines] == [(stage, step) for stage in STAGES for step in range(micro.STEPS)]
    for line in lines:
        assert math.isfinite(line["loss"]) and line["grad_norm"] > 0 and len(line["gates"]) == 2
        assert line["tokens_per_s"] > line["samples_per_s"] > 0 and 0 <= line["padding"] < 1 and 0.05 < line["memory_gb"] < 50
        assert min(line["tasks"].values()) - 1e-3 <= line["loss"] <= max(line["tasks"].values()) + 1e-3, "a mean of the tasks"
        assert line["lr"] == pytest.approx(engine.rate(line["step"], micro.STAGES[line["stage"]]))


def test_the_run_folder_holds_all_that_it_needs(trained):
    run = trained[0]
    assert {"config.json", "model.safetensors", "tokenizer.model", "log.jsonl"} <= {path.name for path in run.iterdir()}
    assert not list(run.rglob("*.partial"))
    model, tokenizer = checkpoint.load_run(run)
    assert not model.training and model.config.audio_id == tokenizer.audio_id and model.config.lm.vocab_size == tokenizer.vocab_size
    assert json.loads((run / "config.json").read_text())["training"]["args"]["preset"] == "micro"


@pytest.mark.parametrize("decay, expected", [
    (False, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]), (True, [0.25, 0.5, 0.75, 1, 1, 1 - 0.95 / 4, 1 - 0.95 / 2, 1 - 0.95 * 3 / 4])])
def test_the_learning_rate_by_hand(decay, expected):
    """Linear warm-up, then constant, or in a line to a twentieth."""
    c = StageConfig(steps=8, lr=3.0, warmup=4, batch=1, batch_tokens=1, decay=decay)
    assert [engine.rate(step, c) / 3.0 for step in range(8)] == pytest.approx(expected)
    assert engine.rate(8, dataclasses.replace(c, decay=True)) / 3.0 == pytest.approx(0.05)


def test_init_starts_from_another_runs_weights_and_tokenizer(trained, scenes_data, tmp_path):
    train(tmp_path, scenes_data, "--stage", "sft", "--init", trained[0], "--name", "new", "--steps", 1)
    new = tmp_path / "runs" / "new"
    before, after = weights(trained[0] / "model.safetensors"), weights(new / "model.safetensors")
    assert (new / "tokenizer.model").read_bytes() == (trained[0] / "tokenizer.model").read_bytes()
    assert all(torch.equal(before[n], after[n]) for n in before if n.startswith("encoder."))
    rate = engine.rate(0, dataclasses.replace(micro.STAGES["sft"], warmup=1))
    for name in before:                                    # one AdamW step moves no weight by much more than the learning rate
        assert (after[name] - before[name]).abs().max() <= 1.2 * rate
    assert [(line["stage"], line["step"]) for line in log(new)] == [("sft", 0)]


# ---------------------------------------------------------------------- processes, parts of a batch

@pytest.fixture(scope="module")
def alone(tmp_path_factory, scenes_data):
    """One process, without dropout."""
    folder = tmp_path_factory.mktemp("alone")
    train(folder, scenes_data, "--preset", "micro-still", "--name", "run")
    return folder / "runs" / "run"


def same_curve(run, expected):
    got, expected = losses(run), losses(expected)
    assert [line[:2] for line in got] == [line[:2] for line in expected]
    for (stage, step, loss), (_, _, wanted) in zip(got, expected):
        assert loss == pytest.approx(wanted, rel=1e-5, abs=1e-5), (stage, step)


@pytest.fixture(scope="module")
def pair(tmp_path_factory, scenes_data):
    """The same by two processes."""
    folder = tmp_path_factory.mktemp("pair")
    torchrun(folder, 2, scenes_data, "--name", "run", "--checkpoint-every", 2)
    return folder / "runs" / "run"


def test_two_processes_learn_what_one_learns(alone, pair):
    same_curve(pair, alone)


def torchrun(folder, processes, data, *flags, script=(), restarts=0):
    """train.py by several processes; `script`: flags of micro.py itself."""
    code, printed = spawn(folder, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, "--max-restarts", restarts,
                          ROOT / "tests" / "micro.py", *script, "--preset", "micro-still", "--data", data, *flags)
    assert code == 0, printed
    return printed


def one(folder, data, *flags):
    code, printed = spawn(folder, ROOT / "tests" / "micro.py", "--double", "--preset", "micro-still", "--data", data, *flags)
    assert code == 0, printed


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_sharded_processes_move_the_same_weights_by_the_same_amount(alone, scenes_data, tmp_path, stage):
    """FSDP2, float64: every weight of the stage (in sft every layer of the LM), no other; the run folder is a whole one."""
    flags = ["--init", alone, "--stage", stage, "--steps", 2]
    one(tmp_path, scenes_data, *flags, "--name", "one")
    torchrun(tmp_path, 2, scenes_data, *flags, "--name", "two", "--shard", script=["--double"])
    start, one_process, two = (weights(run / "model.safetensors") for run in (alone, tmp_path / "runs" / "one", tmp_path / "runs" / "two"))
    for name, value in one_process.items():
        own = ("model." + name).startswith(OWN[stage]) and "model." + name not in FIXED
        assert torch.allclose(two[name].to(value), value, rtol=0, atol=1e-6), name
        moved = not torch.equal(two[name].to(start[name]), start[name])
        # A bias of the keys shifts all scores of a query alike: its gradient is 0, and only rounding may move it.
        assert moved == own or own and name.endswith("attention.k.bias"), name
    same_curve(tmp_path / "runs" / "two", tmp_path / "runs" / "one")


@pytest.mark.slow
def test_curves_of_one_two_and_three_processes_sharded_or_not(alone, scenes_data, tmp_path):
    """100 steps of sft in float64, the same global batch: equal to 1e-6."""
    flags = ["--init", alone, "--stage", "sft", "--steps", 100, "--checkpoint-every", 50]
    one(tmp_path, scenes_data, *flags, "--name", "one")
    for processes in (2, 3):
        for kind in ([], ["--shard"]):
            name = f"{processes}{''.join(kind)}"
            torchrun(tmp_path, processes, scenes_data, *flags, "--name", name, *kind, script=["--double"])
            got, expected = losses(tmp_path / "runs" / name), losses(tmp_path / "runs" / "one")
            assert len(got) == 100 and max(abs(a[2] - b[2]) for a, b in zip(got, expected)) <= 1e-6, name


def test_torchrun_begins_again_at_the_last_checkpoint_when_a_process_dies(pair, scenes_data, tmp_path):
    """--max-restarts: the last process is killed before a step; the weights are those of two processes that lived, bit for bit."""
    printed = torchrun(tmp_path, 2, scenes_data, "--name", "run", "--checkpoint-every", 2, script=["--die-at", "sft:3"], restarts=1)
    whole, restarted = (weights(run / "model.safetensors") for run in (pair, tmp_path / "runs" / "run"))
    assert "exitcode: -9" in printed and all(torch.equal(value, restarted[name]) for name, value in whole.items())
    assert losses(tmp_path / "runs" / "run") == losses(pair)


def test_sharded_processes_begin_again_too(alone, scenes_data, tmp_path):
    flags = ["--init", alone, "--stage", "sft", "--checkpoint-every", 2]
    printed = torchrun(tmp_path, 2, scenes_data, *flags, "--name", "run", "--shard", script=["--die-at", "sft:3"], restarts=1)
    train(tmp_path, scenes_data, "--preset", "micro-still", *flags, "--name", "whole")
    assert "exitcode: -9" in printed
    same_curve(tmp_path / "runs" / "run", tmp_path / "runs" / "whole")


def test_recomputed_activations_change_nothing(alone, scenes_data, tmp_path):
    train(tmp_path, scenes_data, "--preset", "micro-still", "--name", "run", "--checkpoint-activations")
    assert losses(tmp_path / "runs" / "run") == losses(alone)


@pytest.mark.slow
def test_compiled_layers_learn_the_same(alone, scenes_data, tmp_path):
    train(tmp_path, scenes_data, "--preset", "micro-still", "--name", "run", "--compile")
    same_curve(tmp_path / "runs" / "run", alone)


def test_a_batch_in_two_parts_is_the_batch(alone, scenes_data, tmp_path):
    train(tmp_path, scenes_data, "--preset", "micro-still", "--name", "run", "--accumulate", 2)
    same_curve(tmp_path / "runs" / "run", alone)


def test_padding_is_under_a_tenth_of_the_mixed_data(alone):
    """Single, few-shot and dialogue samples in the batches of the stages that read them."""
    lines = [line["padding"] for line in log(alone) if line["stage"] != "clap"]
    assert sum(lines) / len(lines) < 0.1

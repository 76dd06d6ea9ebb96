"""checkpoint.py, train.py --resume: a kill at any moment costs nothing but time."""
import contextlib
import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import micro
from af_min import checkpoint, engine, muon
from af_min.cli import UserError
from af_min.flamingo import AudioFlamingo
from training import ROOT, STAGES, log, losses, spawn, train, weights


# ---------------------------------------------------------------------- interruptions

def test_a_restart_behind_the_last_step_does_not_train_again(scenes_data, tmp_path, monkeypatch):
    """torchrun --max-restarts, killed while the finished model is scored: the run's own model is no --init of another training."""
    train(tmp_path, scenes_data, "--stage", "lm", "--name", "run", "--steps", 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    for more, resumes in ([], True), (["--steps", "2"], False):
        monkeypatch.setattr(sys, "argv", ["train.py", "--preset", "micro", "--no-evaluate", "--data", str(scenes_data), "--stage", "lm",
                                          "--checkpoint-every", "2", "--name", "run", "--steps", "1", *more])
        assert micro.train_module().parse_arguments().resume == resumes


def test_killed_and_resumed_is_never_interrupted(trained, scenes_data, tmp_path):
    """kill -9 in the middle of two stages, between checkpoints: the same weights bit for bit, the same log."""
    flags = ["--data", scenes_data, "--checkpoint-every", 2, "--name", "cut"]
    for stage, more in (("clap:3", []), ("sft:3", ["--resume"])):
        code, printed = spawn(tmp_path, ROOT / "tests" / "micro.py", "--kill", stage, *flags, *more)
        assert code == -signal.SIGKILL, printed
    run = tmp_path / "runs" / "cut"
    assert checkpoint.find_checkpoint(run, STAGES)[1] == {"stage": "sft", "step": 2}
    assert not (run / "model.safetensors").exists()
    with open(run / "log.jsonl", "a") as file:             # what a kill may leave: steps that are to be done again, half a line
        file.write(json.dumps({"stage": "sft", "step": 2, "loss": 9.9}) + '\n{"stage": "sft", "st')
    train(tmp_path, scenes_data, "--name", "cut", "--resume")
    whole, resumed = (weights(r / "model.safetensors") for r in (trained[0], run))
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert losses(run) == losses(trained[0])
    for name in ("model", "optimizer"):
        whole, resumed = (weights(r / "checkpoint" / f"{name}.safetensors") for r in (trained[0], run))
        assert all(torch.equal(whole[key], resumed[key]) for key in whole.keys() | resumed.keys())


def test_a_stage_ends_with_the_optimizer_that_it_began_with(trained, tmp_path, capsys):
    shutil.copytree(trained[0], tmp_path / "runs" / "run")
    with pytest.raises(SystemExit):
        train(tmp_path, json.loads((trained[0] / "config.json").read_text())["training"]["args"]["data"][0],
              "--name", "run", "--resume", "--steps", 6, "--optimizer", "adamw")
    assert "the checkpoint is another optimizer's" in capsys.readouterr().err


def test_resuming_a_finished_run_changes_nothing(trained, scenes_data, tmp_path, capsys):
    """Nor does a batch matter that a stage behind it could not have taken."""
    run = shutil.copytree(trained[0], tmp_path / "runs" / "run")
    train(tmp_path, scenes_data, "--name", "run", "--resume", "--batch", 6)
    assert "run: all steps were done before, nothing was trained" in capsys.readouterr().out
    before, after = (weights(r / "model.safetensors") for r in (trained[0], run))
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in ("log.jsonl", "config.json"):              # flags that nothing was trained with are none of its settings
        assert (run / name).read_text() == (trained[0] / name).read_text()


def test_a_new_training_does_not_resume_an_older_one_of_its_name(trained, scenes_data, tmp_path, capsys):
    """Begun anew and killed before its first checkpoint: --resume must not bring back what was there before."""
    train(tmp_path, scenes_data, "--name", "x", "--stage", "lm", "--steps", 2)

    class Killed(Exception):
        pass

    def kill(patch):
        def now(*_):
            raise Killed
        patch.setattr(engine, "rate", now)
    with pytest.raises(Killed):
        train(tmp_path, scenes_data, "--name", "x", "--stage", "lm", "--steps", 2, "--seed", 1, before=kill)
    with pytest.raises(SystemExit):
        train(tmp_path, scenes_data, "--name", "x", "--stage", "lm", "--steps", 2, "--resume")
    assert "holds no checkpoint" in capsys.readouterr().err


@pytest.mark.slow
def test_twenty_kills_at_random_moments(scenes_data, tmp_path):
    """Ten at any moment, ten while a checkpoint is written, which is after every step."""
    rng, run, kills, torn = random.Random(0), tmp_path / "runs" / "cut", 0, 0
    train(tmp_path, scenes_data, "--name", "whole", "--steps", 25)
    flags = ["--name", "cut", "--preset", "micro", "--no-evaluate", "--data", str(scenes_data), "--checkpoint-every", "1", "--steps", "25"]
    command = [sys.executable, str(ROOT / "tests" / "micro.py"), *flags]
    while kills < 20:
        reached = len(log(run)) if checkpoint.find_checkpoint(run, STAGES) else 0
        process = subprocess.Popen(command + ["--resume"] * bool(reached), cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                                   stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while not (run / "checkpoint").exists() and process.poll() is None:
            time.sleep(0.01)
        seen = (run / "checkpoint" / "state.json").read_bytes() if reached else b""
        while process.poll() is None:                      # a step more, so that twenty kills end; then at any moment
            with contextlib.suppress(FileNotFoundError):
                if (run / "checkpoint" / "state.json").read_bytes() != seen:
                    break
            time.sleep(0.002)
        while kills % 2 and not (run / "checkpoint.partial").exists() and process.poll() is None:
            pass
        time.sleep(rng.uniform(0, 0.002 if kills % 2 else 0.05))
        assert process.poll() is None, f"the run ended before it was killed the {kills + 1}th time"
        process.kill()
        process.wait()
        kills, torn = kills + 1, torn + (run / "checkpoint.partial").exists()
    assert torn, "no kill fell into the writing of a checkpoint"
    train(tmp_path, scenes_data, "--name", "cut", "--resume")
    whole, resumed = (weights(r / "model.safetensors") for r in (tmp_path / "runs" / "whole", run))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole) and losses(run) == losses(tmp_path / "runs" / "whole")


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_used(trained, scenes_data, tmp_path, capsys):
    """One bit of a weight: found by its checksum; the run ends where it would have ended."""
    shutil.copytree(trained[0], tmp_path / "runs" / "run")
    run = tmp_path / "runs" / "run"
    for name in ("model.safetensors", "checkpoint/model.safetensors"):
        damaged = bytearray((run / name).read_bytes())
        damaged[-1] ^= 1
        (run / name).write_bytes(damaged)
    train(tmp_path, scenes_data, "--name", "run", "--resume")
    assert "checkpoint/model.safetensors: damaged" in (said := capsys.readouterr().err) and "sft step 4" in said
    whole, resumed = (weights(r / "model.safetensors") for r in (trained[0], run))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole) and losses(run) == losses(trained[0])


@pytest.mark.parametrize("number, step", [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, micro.STEPS - 1)])
def test_a_signal_stops_after_the_step_with_a_checkpoint(trained, scenes_data, tmp_path, capsys, number, step):
    """Also after the last step of a stage that is not the last."""
    def before(patch):
        rate = engine.rate

        def signalled(now, c):
            if now == step and not (tmp_path / "sent").exists():
                (tmp_path / "sent").touch()
                os.kill(os.getpid(), number)
            return rate(now, c)
        patch.setattr(engine, "rate", signalled)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, scenes_data, "--name", "x", "--checkpoint-every", 100, before=before)
    lines = [line for line in capsys.readouterr().err.splitlines() if "stopped" in line]
    assert stop.value.code == 128 + number and len(lines) == 1 and f"after step {step + 1} of clap" in lines[0]
    assert checkpoint.find_checkpoint(tmp_path / "runs" / "x", STAGES)[1] == {"stage": "clap", "step": step + 1}
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(tmp_path, scenes_data, "--name", "x", "--resume")
    whole, resumed = (weights(r / "model.safetensors") for r in (trained[0], tmp_path / "runs" / "x"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_signal_while_the_last_checkpoint_of_a_stage_is_written_is_not_lost(scenes_data, tmp_path, capsys):
    def before(patch):
        save = checkpoint.save_checkpoint
        patch.setattr(checkpoint, "save_checkpoint", lambda *rest: os.kill(os.getpid(), signal.SIGINT) or save(*rest))
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, scenes_data, "--name", "x", "--checkpoint-every", 100, before=before)
    assert stop.value.code == 130 and "interrupted" in capsys.readouterr().err
    assert checkpoint.find_checkpoint(tmp_path / "runs" / "x", STAGES)[1] == {"stage": "clap", "step": micro.STEPS}


def test_a_signal_that_is_ignored_stays_so():
    """Ctrl-C, for what a script has started in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with engine.Stop() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
        assert stop.signal == 0 and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("largest, reached", [(40_000, 2), (600, 2), (200_000, 5)], ids=["checkpoint", "log", "final weights"])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(scenes_data, tmp_path, capsys, largest, reached):
    """From step 3 on, or when training is done, files may not grow beyond a size: what a full disk looks like to those who write."""
    def fill(*_):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))

    def before(patch):
        rate, save = engine.rate, checkpoint.save_run
        patch.setattr(engine, "rate", lambda step, c: (fill() if step == reached else None) or rate(step, c))
        patch.setattr(checkpoint, "save_run", lambda *rest: fill() or save(*rest))
    try:
        with pytest.raises(SystemExit) as stop:
            train(tmp_path, scenes_data, "--name", "x", "--stage", "clap", "--steps", 5, before=before)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert stop.value.code == 2 and len(errors) == 1 and "runs/x: cannot be written" in errors[0]
    assert checkpoint.find_checkpoint(tmp_path / "runs" / "x", STAGES)[1]["step"] == reached
    train(tmp_path, scenes_data, "--name", "x", "--resume")
    assert [line["step"] for line in log(tmp_path / "runs" / "x")] == list(range(5))
    assert (tmp_path / "runs" / "x" / "model.safetensors").exists()


@pytest.mark.parametrize("begun, says", [(False, "make room, then start again"), (True, "checkpoint is whole: make room, then --resume")])
def test_a_full_disk_before_the_first_checkpoint_promises_none(tmp_path, begun, says):
    if begun:
        (tmp_path / "checkpoint.old").mkdir()
    with pytest.raises(UserError, match=says), checkpoint.writing(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_loss_that_is_no_number_names_the_samples(trained, scenes_data, tmp_path, capsys):
    """One recording's embedding is NaN: the line names it, and not the whole data set."""
    from af_min import data
    victims = []

    def before(patch):
        collate = data.Mixture.collate

        def poisoned(self, places, *rest):
            batch = collate(self, places, *rest)
            if not victims:
                victims.extend(self.datasets[d].samples[i].audios[0][0] for d, i in places)
                batch.windows_AWD[:] = float("nan")
            return batch
        patch.setattr(data.Mixture, "collate", poisoned)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, scenes_data, "--init", trained[0], "--stage", "sft", "--name", "x", before=before)
    said = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "sft step 0: loss nan" in said and all(name in said for name in victims)
    assert said.count("audio/") < 40


# ---------------------------------------------------------------------- saving

def test_a_file_has_its_name_only_when_it_is_whole(tmp_path):
    """A writer that dies in the middle leaves the old file as it was."""
    checkpoint.write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(3)})
    checkpoint.write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(Exception):
        checkpoint.write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(3), "y": "no tensor"})
    with pytest.raises(TypeError):
        checkpoint.write_json(tmp_path / "a.json", {"x": {1, 2}})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], torch.ones(3)) and json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_a_run_whose_weights_somebody_has_halved_is_opened_as_float32(tmp_path, micro_config, tokenizer):
    checkpoint.save_run(tmp_path, AudioFlamingo(micro_config).bfloat16(), micro_config, tokenizer, {})
    assert {weight.dtype for weight in checkpoint.load_run(tmp_path)[0].parameters()} == {torch.float32}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells there what memory is a process's own")
def test_a_checkpoint_is_mapped_until_it_is_copied_into_its_place(tmp_path):
    def held():
        return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e3
    checkpoint.write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(1 << 24)})
    before, tensors = held(), checkpoint.read_tensors(tmp_path / "a.safetensors")
    assert tensors["x"].sum() == 1 << 24 and held() - before < 30


@pytest.mark.parametrize("tensors, says", [
    ({}, r"a: got shape nothing, expected \(\)"), ({"a": torch.ones(2)}, r"a: got shape \(2,\), expected \(\)"),
    ({"a": torch.ones(()), "b": torch.ones(())}, r"b: got shape \(\), expected nothing")])
def test_weights_that_differ_are_named_with_both_shapes(tensors, says):
    """A single number has the shape (), which is not the same as none."""
    module = torch.nn.Module()
    module.a = torch.nn.Parameter(torch.zeros(()))
    with pytest.raises(UserError, match=f"x: {says}"):
        checkpoint.load_strictly(module, tensors, "x")


@pytest.mark.parametrize("calls", range(1, 12))
def test_a_kill_at_any_moment_of_saving_leaves_a_whole_checkpoint(tmp_path, monkeypatch, calls):
    """Stopped at its n-th step on the disk, saving leaves the old checkpoint or the new one to be found, never a mixture."""
    class Killed(BaseException):
        pass

    def values(number):
        model = torch.nn.Linear(2, 2)
        torch.nn.init.constant_(model.weight, number), torch.nn.init.constant_(model.bias, number)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return model, optimizer, {"stage": "sft", "step": number}

    def dies_at(name, where, count=[0]):
        real = getattr(where, name)

        def call(*args, **keywords):
            count[0] += 1
            if count[0] == calls:
                raise Killed
            return real(*args, **keywords)
        monkeypatch.setattr(where, name, call)
    checkpoint.save_checkpoint(tmp_path, *values(1))
    expected = {1: values(1)[0].state_dict(), 2: values(2)[0].state_dict()}
    for name, where in (("replace", checkpoint.os), ("rmtree", checkpoint.shutil), ("save_file", checkpoint)):
        dies_at(name, where)
    try:
        checkpoint.save_checkpoint(tmp_path, *values(2))
    except Killed:
        pass
    found, state = checkpoint.find_checkpoint(tmp_path, STAGES)
    number = state["step"]
    got = checkpoint.read_tensors(found / "model.safetensors")
    assert all(torch.equal(got[name], value) for name, value in expected[number].items())
    assert (found / "optimizer.safetensors").exists()
    monkeypatch.undo()
    checkpoint.save_checkpoint(tmp_path, *values(2))                          # and the next save goes well
    assert checkpoint.find_checkpoint(tmp_path, STAGES)[1]["step"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "checkpoint.old"]


@pytest.mark.parametrize("matrices", [False, True])
def test_the_optimizer_goes_on_from_its_saved_state(tmp_path, matrices):
    """Two steps, saved and loaded, one more: the same as three."""
    def steps(model, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.ones(4, 3)).square().sum().backward()
            optimizer.step()

    def fresh():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        groups = [{"params": [model.weight], "matrices": matrices}, {"params": [model.bias], "matrices": False}]
        return model, muon.Muon(groups, lr=0.1, betas=(0.9, 0.95), fused=True)
    whole, optimizer = fresh()
    steps(whole, optimizer, 3)
    first, optimizer = fresh()
    steps(first, optimizer, 2)
    checkpoint.save_checkpoint(tmp_path, first, optimizer, {"stage": "lm", "step": 2})
    second, optimizer = fresh()
    checkpoint.load_strictly(second, checkpoint.read_tensors(tmp_path / "checkpoint" / "model.safetensors"), tmp_path)
    checkpoint.load_optimizer(optimizer, checkpoint.read_tensors(tmp_path / "checkpoint" / "optimizer.safetensors"))
    steps(second, optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters()))

"""checkpoint.py, train.py --resume: a kill at any moment costs nothing but time."""
import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from af_min import checkpoint
from training import ROOT, TRAIN, log, losses, spawn, train, weights


# ---------------------------------------------------------------------- interruptions

def test_killed_and_resumed_is_never_interrupted(trained, scenes_data, tmp_path):
    """kill -9 in the middle of two stages, between checkpoints: the same weights bit for bit, the same log."""
    flags = ["--data", scenes_data, "--checkpoint-every", 2, "--name", "cut"]
    for stage, more in (("clap:3", []), ("sft:3", ["--resume"])):
        code, printed = spawn(tmp_path, ROOT / "tests" / "micro.py", "--die-at", stage, *flags, *more)
        assert code == -signal.SIGKILL, printed
    run = tmp_path / "runs" / "cut"
    assert json.loads((run / "checkpoint" / "state.json").read_text()) == {"stage": "sft", "step": 2}
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


def test_resuming_a_finished_run_changes_nothing(trained, scenes_data):
    before, lines = weights(trained[0] / "model.safetensors"), (trained[0] / "log.jsonl").read_text()
    train(trained[0].parents[1], scenes_data, "--name", "whole", "--resume")
    after = weights(trained[0] / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before) and (trained[0] / "log.jsonl").read_text() == lines


def test_a_new_training_does_not_resume_an_older_one_of_its_name(trained, scenes_data, tmp_path, capsys):
    """Begun anew and killed before its first checkpoint: --resume must not bring back what was there before."""
    train(tmp_path, scenes_data, "--name", "x", "--stage", "lm", "--steps", 2)

    class Killed(Exception):
        pass

    def kill(patch):
        def now(*_):
            raise Killed
        patch.setattr(TRAIN, "rate", now)
    with pytest.raises(Killed):
        train(tmp_path, scenes_data, "--name", "x", "--stage", "lm", "--steps", 2, "--seed", 1, before=kill)
    with pytest.raises(SystemExit):
        train(tmp_path, scenes_data, "--name", "x", "--stage", "lm", "--steps", 2, "--resume")
    assert "holds no checkpoint" in capsys.readouterr().err


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
    found = checkpoint.find_checkpoint(tmp_path)
    number = checkpoint.read_json(found / "state.json")["step"]
    got = checkpoint.read_tensors(found / "model.safetensors")
    assert all(torch.equal(got[name], value) for name, value in expected[number].items())
    assert (found / "optimizer.safetensors").exists()
    monkeypatch.undo()
    checkpoint.save_checkpoint(tmp_path, *values(2))                          # and the next save goes well
    assert checkpoint.read_json(checkpoint.find_checkpoint(tmp_path) / "state.json")["step"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_the_optimizer_goes_on_from_its_saved_state(tmp_path):
    """Two steps, saved and loaded, one more: the same as three."""
    def steps(model, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.ones(4, 3)).square().sum().backward()
            optimizer.step()

    def fresh():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.9, 0.95), fused=True)
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

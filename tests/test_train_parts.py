"""Parts of a batch side by side on the cores of a CPU (engine.Trainer.compute, lanes.py)."""
import pytest
import torch

import micro
from af_min import data, engine, lanes, stages
from af_min.stages import Step
from training import losses, train, weights


@pytest.mark.parametrize("stage", ["lm", "pretrain", "sft"])
def test_parts_side_by_side_are_those_one_after_the_other(stage, scenes_data, tmp_path, monkeypatch):
    """Bit for bit: two parts on three threads, one each, against one thread for both."""
    used, pool = set(), lanes.pool
    monkeypatch.setattr(lanes, "pool", lambda *numbers: used.add(numbers) or pool(*numbers))
    for threads in (1, 3):
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
        train(tmp_path, scenes_data, "--preset", "micro-still", "--stage", stage, "--name", threads, "--accumulate", 2)
        assert used == ({(2, 1)} if threads == 3 else set()) and torch.get_num_threads() == threads
    torch.set_num_threads(1)
    one, side = (weights(tmp_path / "runs" / name / "model.safetensors") for name in "13")
    assert losses(tmp_path / "runs" / "1") == losses(tmp_path / "runs" / "3") and all(torch.equal(one[name], side[name]) for name in one)


@pytest.mark.parametrize("preset, changed, expected", [
    (micro.STILL, {}, True), (micro.MICRO, {}, False), (micro.STILL, {"compile": True}, False), (micro.STILL, {"checkpoint_activations": True}, False)])
def test_parts_come_one_after_the_other_where_they_must(preset, changed, expected, monkeypatch):
    """With dropout, whose draws come from one generator, and where memory or a compiler is at stake; a model that is large."""
    def trainer():
        return engine.Trainer("sft", stages.Everything(preset), None, micro.STAGES["sft"], micro.flags(**changed),
                              engine.World(0, 1, torch.device("cpu")))
    assert trainer().side_by_side == expected
    monkeypatch.setattr(engine, "SMALL", 1000)
    assert not trainer().side_by_side


def test_a_part_that_fails_is_told_and_leaves_the_threads_as_they_were():
    def bad():
        raise data.UserError("row 3 is not there")
    trainer = engine.Trainer("lm", stages.Everything(micro.STILL), None, micro.STAGES["lm"], micro.flags(), engine.World(0, 1, torch.device("cpu")))
    torch.set_num_threads(2)
    try:
        with pytest.raises(data.UserError, match="row 3"):
            list(trainer.compute(Step([(["x"], bad)] * 2, [1], 2)))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_a_batch_so_small_that_a_process_has_nothing_of_it():
    """One sample for two processes: the other one only adds up."""
    trainer = engine.Trainer("lm", stages.Everything(micro.STILL), None, micro.STAGES["lm"], micro.flags(), engine.World(1, 2, torch.device("cpu")))
    assert trainer.side_by_side and list(trainer.compute(Step([], [1], 1))) == []

"""train.py, checkpoint.py, prepare_data.py: each stage moves its own weights; a kill costs nothing but time; neither do processes."""
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import micro
from af_min import checkpoint, cli, config, manifest
from af_min.cli import UserError
from af_min.config import TINY, Config, StageConfig
from af_min.text import Tokenizer

ROOT = Path(__file__).parents[1]
STAGES = ("clap", "lm", "pretrain", "sft")
TRAIN = micro.train_module()


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


@pytest.fixture(scope="module")
def trained(tmp_path_factory, scenes_data):
    """All stages at once, without a break: (folder of the run, {stage: (state before, state after)})."""
    folder, seen = tmp_path_factory.mktemp("trained"), {}

    def spy(patch):
        stage_of_train = TRAIN.train_stage

        def copy(module):
            return {name: value.detach().clone() for name, value in module.state_dict().items()}

        def watched(stage, first_step, everything, *rest):
            before = copy(everything)
            stage_of_train(stage, first_step, everything, *rest)
            seen[stage] = before, copy(everything)
        patch.setattr(TRAIN, "train_stage", watched)
    train(folder, scenes_data, "--name", "whole", before=spy)
    return folder / "runs" / "whole", seen


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
        assert line["lr"] == pytest.approx(TRAIN.rate(line["step"], micro.STAGES[line["stage"]]))


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
    assert [TRAIN.rate(step, c) / 3.0 for step in range(8)] == pytest.approx(expected)
    assert TRAIN.rate(8, dataclasses.replace(c, decay=True)) / 3.0 == pytest.approx(0.05)


def test_init_starts_from_another_runs_weights_and_tokenizer(trained, scenes_data, tmp_path):
    train(tmp_path, scenes_data, "--stage", "sft", "--init", trained[0], "--name", "new", "--steps", 1)
    new = tmp_path / "runs" / "new"
    before, after = weights(trained[0] / "model.safetensors"), weights(new / "model.safetensors")
    assert (new / "tokenizer.model").read_bytes() == (trained[0] / "tokenizer.model").read_bytes()
    assert all(torch.equal(before[n], after[n]) for n in before if n.startswith("encoder."))
    rate = TRAIN.rate(0, dataclasses.replace(micro.STAGES["sft"], warmup=1))
    for name in before:                                    # one AdamW step moves no weight by much more than the learning rate
        assert (after[name] - before[name]).abs().max() <= 1.2 * rate
    assert [(line["stage"], line["step"]) for line in log(new)] == [("sft", 0)]


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
        assert loss == pytest.approx(wanted, rel=1e-5, abs=1.01e-5), (stage, step)      # the log has 5 decimals


def test_two_processes_learn_what_one_learns(alone, scenes_data, tmp_path):
    code, printed = spawn(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, ROOT / "tests" / "micro.py",
                          "--preset", "micro-still", "--data", scenes_data, "--checkpoint-every", 2, "--name", "run")
    assert code == 0, printed
    same_curve(tmp_path / "runs" / "run", alone)


def test_a_batch_in_two_parts_is_the_batch(alone, scenes_data, tmp_path):
    train(tmp_path, scenes_data, "--preset", "micro-still", "--name", "run", "--accumulate", 2)
    same_curve(tmp_path / "runs" / "run", alone)


# ---------------------------------------------------------------------- mistakes at the command line

def mistake(capsys, module, folder, *flags):
    """The one line that a user's mistake is answered with; exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_main(module, folder, flags)
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if "error: " in line]
    assert stop.value.code == 2 and "Traceback" not in error and len(lines) == 1, error
    assert len([line for line in error.splitlines() if line.strip() and "it/s" not in line and "%|" not in line]) == 1 or "usage:" in error, error
    return lines[0]


def a_data_set(folder, rows):
    folder.mkdir(parents=True)
    manifest.write_rows(folder / "train.jsonl", rows)
    manifest.write_card(folder, name="x")
    return folder


ROW = {"audio": "audio/a.wav", "task": "AQA", "prompt": "is there a bell?", "answer": "no"}


@pytest.mark.parametrize("flags, says", [
    (["--data", "nowhere"], "nowhere: no prepared data set there"),
    (["--data", "data/x:0"], "the weight must be above 0"),
    (["--data", "data/x:\u00b2"], "data/x:\u00b2"),
    (["--data", "data/x", "--resume"], "holds no checkpoint"),
    (["--data", "data/x", "--init", "runs/none"], "runs/none"),
    (["--data", "data/x", "--stage", "clap"], "no row has the task WindowText"),
    (["--data", "data/x", "--stage", "sft"], "audio/a.wav"),
    (["--data", "data/broken"], "train.jsonl:1"),
    (["--data", "data/empty"], "train.jsonl"),
    (["--data", "data/x", "--accumulate", "0"], "--accumulate 0"),
    (["--data", "data/x", "--checkpoint-every", "0"], "--checkpoint-every 0"),
    (["--data", "data/x", "--steps", "-1"], "--steps -1"),
    (["--data", "data/x", "--batch", "-4"], "--batch -4"),
    (["--data", "data/x", "--lr", "-1"], "--lr -1"),
    (["--data", "data/x", "--lr", "nan"], "--lr nan"),
    (["--stage", "evaluate"], "--stage"), (["--preset", "huge"], "--preset"), (["--steps", "many"], "--steps"),
    (["--colour", "red"], "--colour"), (["--step", "5"], "--step")])
def test_mistakes_at_train_py(tmp_path, capsys, flags, says):
    a_data_set(tmp_path / "data" / "x", [ROW] * 3)
    (a_data_set(tmp_path / "data" / "broken", [ROW]) / "train.jsonl").write_text("{not json\n")
    (a_data_set(tmp_path / "data" / "empty", [ROW]) / "train.jsonl").unlink()
    assert says in mistake(capsys, TRAIN, tmp_path, "--preset", "micro", "--no-evaluate", *flags)


def test_resuming_with_another_stage_is_a_mistake_that_is_explained(trained, scenes_data, capsys):
    said = mistake(capsys, TRAIN, trained[0].parents[1], "--preset", "micro", "--data", scenes_data, "--name", "whole", "--resume", "--stage", "lm")
    assert "sft" in said and "--stage" in said


@pytest.mark.parametrize("flags, says", [
    (["--dataset", "folder", "--source", "nowhere"], "nowhere"), (["--dataset", "folder"], "--source"), (["--dataset", "clothes"], "--dataset"),
    (["--dataset", "scenes", "--out", "mine"], "is not a prepared data set"), (["--seed", "x"], "--seed"), (["--seed", "-1"], "--seed -1")])
def test_mistakes_at_prepare_data_py(tmp_path, capsys, flags, says):
    import prepare_data
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not delete")
    assert says in mistake(capsys, prepare_data, tmp_path, *flags)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "do not delete"


def test_a_folder_of_recordings_becomes_a_data_set_that_trains(tmp_path, capsys):
    """prepare_data.py --dataset folder, then train.py --stage sft on it."""
    import numpy as np
    import prepare_data
    import soundfile
    (tmp_path / "mine").mkdir()
    names = [f"{kind}_{i}.wav" for kind in ("low", "high") for i in range(10)]
    for i, name in enumerate(names):
        wave = np.sin((300 if "low" in name else 2000) * (1 + i / 100) * np.arange(16_000) * 2 * np.pi / 16_000)
        soundfile.write(tmp_path / "mine" / name, wave * 0.5, 16_000)
    (tmp_path / "mine" / "answers.csv").write_text("file,answer\n" + "".join(f"{n},{n.split('_')[0]}\n" for n in names))
    run_main(prepare_data, tmp_path, ["--dataset", "folder", "--source", "mine", "--sample-rate", 16_000, "--out", "data/mine"])
    assert "20 recordings" in capsys.readouterr().out
    train(tmp_path, "data/mine", "--stage", "sft", "--steps", 2, "--name", "mine")
    assert len(log(tmp_path / "runs" / "mine")) == 2


def test_the_real_command_line_answers_a_mistake_with_one_line(tmp_path):
    for script, flags in (("train.py", ["--data", "nowhere"]), ("prepare_data.py", ["--dataset", "scenes", "--out", __file__])):
        code, printed = spawn(tmp_path, ROOT / script, *flags)
        assert code == 2 and printed.startswith("error: ") and printed.count("\n") == 1, printed


# ---------------------------------------------------------------------- run folders

@pytest.fixture
def run(trained, tmp_path):
    """A run folder of one's own, to be damaged."""
    import shutil
    shutil.copytree(trained[0], tmp_path / "run")
    return tmp_path / "run"


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


DAMAGES = {
    "weights missing": (lambda run: (run / "model.safetensors").unlink(), "no trained model there"),
    "weights empty": (lambda run: cut(run / "model.safetensors", 0), "model.safetensors: not a whole safetensors file"),
    "weights cut in the header": (lambda run: cut(run / "model.safetensors", 100), "model.safetensors: not a whole safetensors file"),
    "weights cut at the end": (lambda run: cut(run / "model.safetensors", -1), "model.safetensors: not a whole safetensors file"),
    "not weights": (lambda run: (run / "model.safetensors").write_text("version https://git-lfs"), "model.safetensors: not a whole safetensors"),
    "a tensor is missing": (lambda run: drop(run, "lm.norm.weight"), r"lm.norm.weight: got shape nothing, expected \(32,\)"),
    "a tensor too many": (lambda run: drop(run, "lm.norm.weight", "extra"), "extra: got shape"),
    "config missing": (lambda run: (run / "config.json").unlink(), "config.json: cannot be read"),
    "config cut": (lambda run: cut(run / "config.json", 50), "config.json: not JSON"),
    "config without a model": (lambda run: (run / "config.json").write_text("{}"), "config.json"),
    "config that is a list": (lambda run: (run / "config.json").write_text("[]"), "config.json"),
    "unknown setting": (lambda run: edit(run, lambda c: c["model"]["lm"].update(colour=1)), "config.json: lm: unknown setting 'colour'"),
    "a part that is a number": (lambda run: edit(run, lambda c: c["model"].update(lm=3)), "config.json: lm"),
    "other dimensions": (lambda run: edit(run, lambda c: c["model"]["lm"].update(width=64)), "got shape .*, expected"),
    "tokenizer missing": (lambda run: (run / "tokenizer.model").unlink(), "tokenizer.model: not a sentencepiece model"),
    "tokenizer cut": (lambda run: cut(run / "tokenizer.model", 300), "tokenizer.model"),
}


def drop(run, name, instead=None):
    tensors = weights(run / "model.safetensors")
    value = tensors.pop(name) if not instead else tensors[name].clone()
    save_file(tensors | ({instead: value} if instead else {}), run / "model.safetensors")


def edit(run, change):
    values = json.loads((run / "config.json").read_text())
    change(values)
    (run / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_named_in_one_line(run, damage):
    harm, says = DAMAGES[damage]
    harm(run)
    with pytest.raises(UserError, match=says) as error:
        checkpoint.load_run(run)
    assert "\n" not in str(error.value) and str(run) in str(error.value)


@pytest.mark.parametrize("file, content", [("state.json", "{}"), ("state.json", "[1"), ("model.safetensors", ""), ("optimizer.safetensors", "x")])
def test_a_damaged_checkpoint_is_named_in_one_line(run, scenes_data, capsys, file, content):
    folder = run.parent / "runs"
    folder.mkdir()
    run.rename(folder / "run")
    state = folder / "run" / "checkpoint"
    (state / "state.json").write_text('{"stage": "sft", "step": 2}')
    (state / file).write_text(content)
    said = mistake(capsys, TRAIN, run.parent, "--preset", "micro", "--no-evaluate", "--data", scenes_data, "--name", "run", "--resume")
    assert file in said


def test_a_configuration_survives_the_way_to_disk_and_back(tmp_path, tokenizer):
    for model in (TINY, micro.MICRO, Config()):
        checkpoint.save_settings(tmp_path / "run", model, tokenizer, {})
        assert checkpoint.load_config(tmp_path / "run") == model
    assert Tokenizer.load(tmp_path / "run" / "tokenizer.model").model == tokenizer.model
    assert config.from_dict(Config, {}) == Config(), "what an older run does not say has its default"


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

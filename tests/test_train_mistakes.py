"""train.py, prepare_data.py, checkpoint.py: a user's mistake, or a damaged file, is told in one line."""
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from safetensors.torch import save_file

import micro
from af_min import checkpoint, cli, config, manifest
from af_min.cli import UserError
from af_min.config import TINY, Config
from af_min.text import Tokenizer
from training import ROOT, TRAIN, log, run_main, spawn, train, weights


# ---------------------------------------------------------------------- mistakes at the command line

def mistake(capsys, module, folder, *flags):
    """The one line that a user's mistake is answered with; exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_main(module, folder, flags)
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if "error: " in line]
    assert stop.value.code == 2 and "Traceback" not in error and len(lines) == 1, error
    others = [line for line in error.splitlines() if line.strip() and line not in lines and not line.startswith("warning: ")]
    assert all("it/s" in line or "%|" in line for line in others), error
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
    (["--data", "data/x", "--lr", "nan"], "--lr nan"), (["--data", "data/x", "--seed", str(10**18)], "--seed 1000000000000000000"),
    (["--stage", "evaluate"], "--stage"), (["--preset", "huge"], "--preset"), (["--steps", "many"], "--steps"),
    (["--data", "data/x", "--shard"], "torchrun"),
    (["--colour", "red"], "--colour"), (["--step", "5"], "--step")])
def test_mistakes_at_train_py(tmp_path, capsys, flags, says):
    a_data_set(tmp_path / "data" / "x", [ROW] * 3)
    (a_data_set(tmp_path / "data" / "broken", [ROW]) / "train.jsonl").write_text("{not json\n")
    (a_data_set(tmp_path / "data" / "empty", [ROW]) / "train.jsonl").unlink()
    assert says in mistake(capsys, TRAIN, tmp_path, "--preset", "micro", "--no-evaluate", *flags)


@pytest.mark.parametrize("flags, says", [
    (["--data", "x"], "--stage clap: no row of its kind in x"), (["--data", "x", "--stage", "sft"], "x/audio/a.wav: is not there"),
    (["--batch", 6], "--batch 6: the clap stage needs a multiple of 4")])
def test_a_mistake_costs_no_model_of_that_name(trained, scenes_data, tmp_path, capsys, flags, says):
    a_data_set(tmp_path / "x", [ROW] * 3)
    shutil.copytree(trained[0], tmp_path / "runs" / "run")
    assert says in mistake(capsys, TRAIN, tmp_path, "--preset", "micro", "--name", "run", "--data", scenes_data, *flags)
    assert weights(tmp_path / "runs" / "run" / "model.safetensors") and (tmp_path / "runs" / "run" / "checkpoint").exists()


def test_a_mistake_that_the_tokenizer_shows_costs_no_model_either(trained, scenes_data, tmp_path, capsys):
    """Every answer too long; or another data set under the name that nobody gave, that of the model which it starts from."""
    rows = [{**row, "answer": "bell " * 600} for row in manifest.read_rows(scenes_data / "train.jsonl") if row["task"] == "AudioCaptioning"][:3]
    (a_data_set(tmp_path / "x", rows) / "audio").symlink_to(scenes_data / "audio")
    flags = ["--preset", "micro", "--stage", "sft", "--data", "x"]
    for name, more, says in (("run", ["--name", "run"], "x: every answer ends beyond the"),
                             ("tiny", ["--init", "runs/tiny"], "runs/tiny holds a model trained on")):
        shutil.copytree(trained[0], tmp_path / "runs" / name)
        assert says in mistake(capsys, TRAIN, tmp_path, *flags, *more)
        assert weights(tmp_path / "runs" / name / "model.safetensors") and (tmp_path / "runs" / name / "checkpoint").exists()


def test_what_is_not_learned_from_is_told(scenes_data, tmp_path, capsys):
    """Answers beyond the last token that fits, the end of long recordings; without test rows nothing is scored, and that is no error."""
    rows = [row for row in manifest.read_rows(scenes_data / "train.jsonl") if row["task"] == "AudioCaptioning"][:6]
    rows[0]["answer"] = "bell " * 600
    (a_data_set(tmp_path / "x", rows) / "audio").mkdir()
    for row in rows:
        wave, rate = soundfile.read(scenes_data / row["audio"])
        soundfile.write(tmp_path / "x" / row["audio"], wave if row is not rows[1] else np.tile(wave, 30), rate)
    manifest.write_rows(tmp_path / "x" / "test.jsonl", [])
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "scores-x.json").write_text("of an earlier model")
    run_main(TRAIN, tmp_path, ["--preset", "micro", "--stage", "sft", "--data", "x", "--steps", 1, "--name", "run"])
    said = capsys.readouterr().err
    assert "x: 1 of 6 answers end beyond" in said and "x: 1 of 6 recordings are longer than the 5.2 s" in said and "not scored" in said
    assert (tmp_path / "runs/run/model.safetensors").exists() and not (tmp_path / "runs/run/scores-x.json").exists()


def test_what_reads_no_recordings_needs_none(trained, scenes_data, tmp_path):
    rows = manifest.read_rows(scenes_data / "train.jsonl")
    a_data_set(tmp_path / "x", [row for row in rows if row["task"] == "AudioCaptioning"][:20])
    shutil.copytree(trained[0], tmp_path / "runs" / "run")
    train(tmp_path, "x", "--name", "run", "--stage", "lm", "--steps", 1)


def test_a_row_with_more_recordings_than_the_model_takes_is_told(scenes_data, tmp_path, capsys):
    rows = manifest.read_rows(scenes_data / "train.jsonl")[:3]
    rows[0] = {**ROW, "audio": rows[1]["audio"], "shots": [{**ROW, "audio": rows[1]["audio"]}] * 9}
    (a_data_set(tmp_path / "x", rows) / "audio").symlink_to(scenes_data / "audio")
    assert "x: a row with 10 recordings, its shots included; this model takes 9" in mistake(
        capsys, TRAIN, tmp_path, "--preset", "micro", "--data", "x", "--stage", "sft")


@pytest.mark.parametrize("command, said", [([ROOT / "train.py"], "train.py -h"), (["-m", "af_min.memory"], "python -m af_min.memory -h")])
def test_a_wrong_flag_is_answered_with_the_command_that_was_given(command, said):
    done = subprocess.run([sys.executable, *command, "--nope"], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2 and done.stderr == f"error: unrecognized arguments: --nope; {said} lists the flags\n"


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_two_trainings_do_not_write_to_one_run(trained, scenes_data, capsys, flags):
    """The second is told; what the first has written stays."""
    before = sorted(trained[0].rglob("*"))
    first = f"import pathlib, sys; from af_min.cli import alone\nwith alone(pathlib.Path({str(trained[0])!r}), '-'): print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", first], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as held:
        held.stdout.readline()
        said = mistake(capsys, TRAIN, trained[0].parents[1], "--preset", "micro", "--data", scenes_data, "--name", "whole", *flags)
        held.communicate(b"\n")
    assert "runs/whole: another process is writing there" in said and sorted(trained[0].rglob("*")) == before


def test_a_mistake_that_one_process_meets_is_no_traceback_of_the_others(trained, scenes_data, tmp_path):
    """Process 0 alone looks whether the run is free."""
    with cli.alone(tmp_path / "runs" / "run", "-"):
        code, printed = spawn(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, ROOT / "tests" / "micro.py",
                              "--data", scenes_data, "--init", trained[0], "--stage", "sft", "--name", "run")
    assert code == 1 and "runs/run: another process is writing there" in printed and "[rank1]" not in printed, printed


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
    import prepare_data
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
    """And where `*.wav` holds a name that begins with a dash, the line says how to write it."""
    (tmp_path / "-x.wav").touch()
    for script, flags, says in (("train.py", ["--data", "nowhere"], "nowhere"),
                                ("prepare_data.py", ["--dataset", "scenes", "--out", __file__], __file__),
                                ("sample.py", ["--audio", "-x.wav", "a\nb.wav"], "./-x.wav"), ("sample.py", ["--audio", "a", "-x.wav"], "./-x.wav")):
        code, printed = spawn(tmp_path, ROOT / script, *flags)
        assert code == 2 and printed.startswith("error: ") and printed.count("\n") == 1 and says in printed, printed


def test_every_command_starts_where_modules_of_unix_are_missing(tmp_path):
    """On Windows there is no fcntl and no resource."""
    modules = "train, sample, prepare_data, af_min.evaluate, af_min.retrieval, af_min.pretrained, af_min.engine as engine, torch"
    code, printed = spawn(tmp_path, "-c", f"import sys; sys.modules |= dict(fcntl=None, resource=None); import {modules}\n"
                          "print(engine.peak_memory(torch.device('cpu')))")
    assert code == 0 and printed == "0.0\n", printed


# ---------------------------------------------------------------------- run folders

@pytest.fixture
def run(trained, tmp_path):
    """A run folder of one's own, to be damaged."""
    shutil.copytree(trained[0], tmp_path / "run")
    return tmp_path / "run"


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


DAMAGES = {
    "weights missing": (lambda run: (run / "model.safetensors").unlink(), "no trained model there .* --name run --resume"),
    "nothing there": (lambda run: shutil.rmtree(run), "no trained model there .* run `python train.py` first"),
    "weights empty": (lambda run: cut(run / "model.safetensors", 0), "model.safetensors: not a whole safetensors file"),
    "weights cut in the header": (lambda run: cut(run / "model.safetensors", 100), "model.safetensors: not a whole safetensors file"),
    "weights cut at the end": (lambda run: cut(run / "model.safetensors", -1), "model.safetensors: not a whole safetensors file"),
    "not weights": (lambda run: (run / "model.safetensors").write_text("version https://git-lfs"), "model.safetensors: not a whole safetensors"),
    "a tensor is missing": (lambda run: drop(run, "lm.norm.weight"), "tensor 'lm.norm.weight' is missing"),
    "a tensor too many": (lambda run: drop(run, "lm.norm.weight", "extra"), "tensor 'extra' is unexpected"),
    "config missing": (lambda run: (run / "config.json").unlink(), "config.json: cannot be read"),
    "config cut": (lambda run: cut(run / "config.json", 50), "config.json: not JSON"),
    "config without a model": (lambda run: (run / "config.json").write_text("{}"), "config.json"),
    "config that is a list": (lambda run: (run / "config.json").write_text("[]"), "config.json"),
    "unknown setting": (lambda run: edit(run, lambda c: c["model"]["lm"].update(colour=1)), "config.json: lm: unknown setting 'colour'"),
    "a part that is a number": (lambda run: edit(run, lambda c: c["model"].update(lm=3)), "config.json: lm"),
    "other dimensions": (lambda run: edit(run, lambda c: c["model"]["lm"].update(width=64)), "has shape .*, expected"),
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
def test_damaged_checkpoints_are_named_in_one_line(run, scenes_data, capsys, file, content):
    """Both the last and the one before it."""
    folder = run.parent / "runs"
    folder.mkdir()
    run.rename(folder / "run")
    for name in checkpoint.CHECKPOINTS:
        (folder / "run" / name / file).write_text(content)
    said = mistake(capsys, TRAIN, run.parent, "--preset", "micro", "--no-evaluate", "--data", scenes_data, "--name", "run", "--resume")
    assert file in said and "leave out --resume" in said


def test_a_configuration_survives_the_way_to_disk_and_back(tmp_path, tokenizer):
    for model in (TINY, micro.MICRO, Config()):
        checkpoint.save_settings(tmp_path / "run", model, tokenizer, {})
        assert checkpoint.load_config(tmp_path / "run") == model
    assert Tokenizer.load(tmp_path / "run" / "tokenizer.model").model == tokenizer.model
    assert config.from_dict(Config, {}) == Config(), "what an older run does not say has its default"


def test_an_error_is_written_in_one_piece():
    """Processes of torchrun share stderr and do not buffer: in two pieces two lines became one."""
    code = "import os, sys; from af_min import cli; sys.stderr.write = lambda piece: os.write(1, repr(piece).encode())\n" \
           "def main(): raise cli.UserError('x: y')\ncli.run(main)"
    done = subprocess.run([sys.executable, "-u", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == repr("error: x: y\n")

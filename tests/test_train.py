"""train.py: each stage moves its own weights and begins with what the one before it left; processes and parts change nothing."""
import dataclasses
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

import micro
from af_min import checkpoint, config, data, engine, manifest, stages
from af_min.config import StageConfig
from af_min.stages import Step
from kernels import linear
from training import ROOT, STAGES, TRAIN, log, losses, spawn, train, weights

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


def test_a_window_with_several_captions_is_told_by_the_first(scenes_data, tmp_path):
    rows = [row for row in manifest.read_rows(scenes_data / "train.jsonl") if row["task"] == "WindowText"]
    rows = [row | {"answers": [row.pop("answer"), "x"]} for row in rows]
    (tmp_path / "several").mkdir()
    manifest.write_rows(tmp_path / "several" / "train.jsonl", rows)
    manifest.write_card(tmp_path / "several", name="x")
    (tmp_path / "several" / "audio").symlink_to(scenes_data / "audio")
    train(tmp_path, "several", "--stage", "clap", "--name", "run", "--steps", 1)
    assert len(log(tmp_path / "runs" / "run")) == 1


def test_init_starts_from_another_runs_weights_and_tokenizer(trained, scenes_data, tmp_path):
    train(tmp_path, scenes_data, "--stage", "sft", "--init", trained[0], "--name", "new", "--steps", 1)
    new = tmp_path / "runs" / "new"
    before, after = weights(trained[0] / "model.safetensors"), weights(new / "model.safetensors")
    assert (new / "tokenizer.model").read_bytes() == (trained[0] / "tokenizer.model").read_bytes()
    assert all(torch.equal(before[n], after[n]) for n in before if n.startswith("encoder."))
    rate = engine.rate(0, dataclasses.replace(micro.STAGES["sft"], warmup=1))
    train(tmp_path, scenes_data, "--stage", "clap", "--init", trained[0], "--name", "ears", "--steps", 1, "--lr", 1e-9, "--seed", 1)
    towers = [weights(run / checkpoint.TEXT_TOWER) for run in (trained[0], tmp_path / "runs" / "ears")]
    assert all(torch.allclose(value, towers[1][name], atol=1e-7) for name, value in towers[0].items())
    for name in before:                                    # one step moves no weight by much more than the learning rate
        assert (after[name] - before[name]).abs().max() <= 1.2 * rate
    assert [(line["stage"], line["step"]) for line in log(new)] == [("sft", 0)]


def test_a_stage_alone_goes_on_with_what_its_run_holds(trained, scenes_data, tmp_path, capsys):
    """`--stage` after `--stage`, one name: the same as all at once. A run that holds nothing begins anew, and that is said."""
    for stage in STAGES:
        train(tmp_path, scenes_data, "--name", "run", "--stage", stage)
    whole, run = trained[0], tmp_path / "runs" / "run"
    assert all(torch.equal(value, weights(run / "model.safetensors")[name]) for name, value in weights(whole / "model.safetensors").items())
    tower = weights(run / checkpoint.TEXT_TOWER)
    assert all(torch.equal(tower[name], value) for name, value in weights(whole / checkpoint.TEXT_TOWER).items())
    assert "learned nothing" not in capsys.readouterr().err
    train(tmp_path, scenes_data, "--name", "other", "--stage", "sft", "--steps", 1)
    assert "--stage sft without --init, and runs/other holds no model" in capsys.readouterr().err


def test_a_new_training_leaves_nothing_of_an_older_one_of_its_name(trained, scenes_data, tmp_path):
    """Else an old model would stand beside a new tokenizer, until the new one is done."""
    train(tmp_path, scenes_data, "--name", "run", "--steps", 1)
    run = tmp_path / "runs" / "run"
    (run / "scores.json").touch()

    def look(patch):
        begin = engine.Trainer.__init__

        def looking(self, *rest):
            assert {path.name for path in run.iterdir()} <= {"config.json", "tokenizer.model", "log.jsonl"}
            patch.setattr(engine.Trainer, "__init__", begin)
            begin(self, *rest)
        patch.setattr(engine.Trainer, "__init__", looking)
    train(tmp_path, scenes_data, "--name", "run", "--steps", 1, before=look)


@pytest.mark.parametrize("flags, preset, optimizer", [
    ([], "tiny", "muon"), (["--init", "own"], "micro", "muon"), (["--init", "converted"], "af1", "adamw"),
    (["--init", "own", "--preset", "tiny"], "tiny", "muon"), (["--init", "on_lm"], "tiny", "adamw"), (["--optimizer", "adamw"], "tiny", "adamw"),
    (["--init", "on_lm", "--optimizer", "muon"], "tiny", "muon"), (["--lm", "x", "--clap", "y"], "af1", "adamw"),
    (["--lm", "x", "--encoder", "own"], "tiny", "adamw")])
def test_training_settings_are_those_of_the_model_that_goes_on(tmp_path, monkeypatch, flags, preset, optimizer):
    """A converted checkpoint must not be tuned at the learning rate of the tiny preset, nor a published language model by its optimizer."""
    for name, training in (("own", {"args": {"preset": "micro"}}), ("converted", {"converted_from": "foundation.pt"}),
                           ("on_lm", {"args": {"preset": "tiny", "optimizer": "adamw"}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
        checkpoint.write_json(tmp_path / name / "config.json", {"model": {}, "training": training})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    args = TRAIN.parse_arguments()
    assert args.preset == preset and TRAIN.stage_settings(args, "sft").optimizer == optimizer


def test_af1_is_trained_as_released():
    """Learning rate, global batch and its tokens, warm-up, then constant; AdamW's decay, clipping, tokens of a sample."""
    for stage, lr, batch in (("pretrain", 1e-4, 384), ("sft", 2e-5, 128)):
        c = config.STAGES["af1"][stage]
        assert (c.optimizer, c.lr, c.batch, c.batch_tokens, c.warmup, c.decay) == ("adamw", lr, batch, batch * 512, 1875, False)
        assert (c.weight_decay, c.clip, c.max_tokens) == (0.1, 1.0, 512)
        samples = [data.Sample([0] * 512, [1] * 512, ())] * (20 * batch)
        sizes = [sum(map(len, b)) for b in data.Mixture([data.Dataset("x", samples)], c.batch, c.batch_tokens, 0).epoch(0)]
        assert sizes == [batch] * len(sizes), "samples of full length fill a batch"


# ---------------------------------------------------------------------- what is told

def test_the_footer_by_hand(monkeypatch):
    """Two processes on an H100 took 4 s for two steps of 8e14 FLOP: 200 TFLOP/s each, of 989."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(engine, "peak_memory", lambda device: 61.25)
    world, meter = engine.World(0, 2, torch.device("cuda")), engine.Meter("sft")
    for _ in range(2):
        meter.add(Step([], [1], samples=128, tokens=45_000, padded=50_000, flops=8e14), 2.0)
    assert meter.line(2_222_000_000, world).strip() == (
        "sft      2222.00 M learn, 2 steps of 2000 ms, 64 samples/s, 22500 tokens/s, padding 10.0%, 200000 GFLOP/s "
        "(MFU 20.2% of NVIDIA H100 80GB HBM3), 61.25 GB")
    everything = SimpleNamespace(model=torch.nn.Linear(999, 1000))
    said = engine.footer(everything, ["a", "b"], 12.3, world).splitlines()
    assert said[0].startswith("1.00 M parameters, 12 s on 2 x cuda") and f"torch {torch.__version__}, Python" in said[0] and said[1:] == ["a", "b"]


def test_the_picture_is_drawn_while_training_goes_on(scenes_data, tmp_path):
    """report.png is there before the last stage has begun."""
    picture = tmp_path / "runs" / "run" / "report.png"

    def before(patch):
        patch.setattr(TRAIN.Drawing, "every", 0.0)
        begin = engine.Trainer.__init__

        def looking(self, stage, *rest):
            assert picture.exists() == (stage != "clap")
            begin(self, stage, *rest)
        patch.setattr(engine.Trainer, "__init__", looking)
    train(tmp_path, scenes_data, "--name", "run", "--steps", 1, before=before)
    assert picture.stat().st_size > 10_000


@pytest.mark.skipif(not linear.ONEDNN, reason="torch was built without oneDNN")
@pytest.mark.parametrize("flags, has, takes", [((), True, True), ((), False, False), (("--float32",), True, False)])
@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_is_taken_where_the_processor_has_it_and_nobody_forbids_it(stage, flags, has, takes, tmp_path, scenes_data):
    taken = set()

    def before(patch):
        patch.setattr(stages, "HAS_BFLOAT16", has)
        patch.setattr(linear, "LARGE", 1)
        multiply = linear.multiply
        patch.setattr(linear, "multiply", lambda x, *rest: taken.add(x.dtype) or multiply(x, *rest))
    train(tmp_path, scenes_data, "--name", "run", "--stage", stage, "--steps", 1, *flags, before=before)
    assert taken and (torch.bfloat16 in taken) == takes
    assert all(value.dtype != torch.bfloat16 for value in weights(tmp_path / "runs" / "run" / "model.safetensors").values())


# ---------------------------------------------------------------------- processes, parts of a batch

@pytest.fixture(scope="module")
def alone(tmp_path_factory, scenes_data):
    """One process, without dropout."""
    folder = tmp_path_factory.mktemp("alone")
    train(folder, scenes_data, "--preset", "micro-still", "--float32", "--name", "run")
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
                          ROOT / "tests" / "micro.py", *script, "--preset", "micro-still", "--float32", "--data", data, *flags)
    assert code == 0, printed
    return printed


def one(folder, data, *flags):
    code, printed = spawn(folder, ROOT / "tests" / "micro.py", "--double", "--preset", "micro-still", "--data", data, *flags)
    assert code == 0, printed


@pytest.mark.parametrize("stage", [pytest.param("pretrain", marks=pytest.mark.slow), "sft"])
def test_sharded_processes_move_the_same_weights_by_the_same_amount(alone, scenes_data, tmp_path, stage):
    """FSDP2, float64: every weight of the stage (in sft every layer of the LM), no other; the run folder is a whole one."""
    flags = ["--init", alone, "--stage", stage, "--steps", 2]
    one(tmp_path, scenes_data, *flags, "--name", "one")
    printed = torchrun(tmp_path, 2, scenes_data, *flags, "--name", "two", "--shard", *["--checkpoint-activations"] * (stage == "sft"),
                       script=["--double"])
    assert "wrong gradients" not in printed, "FSDP2 warns of views that are changed in place; ours are not"
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
    printed = torchrun(tmp_path, 2, scenes_data, "--name", "run", "--checkpoint-every", 2, script=["--kill", "sft:3"], restarts=1)
    whole, restarted = (weights(run / "model.safetensors") for run in (pair, tmp_path / "runs" / "run"))
    assert "exitcode: -9" in printed and all(torch.equal(value, restarted[name]) for name, value in whole.items())
    assert losses(tmp_path / "runs" / "run") == losses(pair)


@pytest.mark.slow
def test_sharded_processes_begin_again_too(alone, scenes_data, tmp_path):
    flags = ["--init", alone, "--stage", "sft", "--checkpoint-every", 2]
    printed = torchrun(tmp_path, 2, scenes_data, *flags, "--name", "run", "--shard", script=["--kill", "sft:3"], restarts=1)
    train(tmp_path, scenes_data, "--preset", "micro-still", "--float32", *flags, "--name", "whole")
    assert "exitcode: -9" in printed
    same_curve(tmp_path / "runs" / "run", tmp_path / "runs" / "whole")


@pytest.mark.slow
def test_sharded_processes_that_are_stopped_go_on_as_others(alone, scenes_data, tmp_path):
    """One of three gets SIGTERM: all stop after that step with a checkpoint. Two go on from it; without --shard it is no use."""
    flags = ["--init", alone, "--stage", "sft", "--name", "run"]
    command = ["--preset", "micro-still", "--float32", "--data", scenes_data, *flags, "--shard"]
    code, printed = spawn(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 3, ROOT / "tests" / "micro.py",
                          "--stop", "sft:2", *command)
    assert code == 1 and "stopped by SIGTERM after step 3 of sft" in printed and "exitcode  : 143" in printed, printed
    assert checkpoint.find_checkpoint(tmp_path / "runs" / "run", STAGES)[1] == {"stage": "sft", "step": 3}
    code, printed = spawn(tmp_path, ROOT / "tests" / "micro.py", *command, "--no-shard", "--resume")
    assert code == 2 and "written with --shard; --resume goes on likewise" in printed.splitlines()[-1], printed
    torchrun(tmp_path, 2, scenes_data, *flags, "--shard", "--resume")
    train(tmp_path, scenes_data, "--preset", "micro-still", "--float32", *flags[:4], "--name", "whole")
    same_curve(tmp_path / "runs" / "run", tmp_path / "runs" / "whole")


def test_a_loss_that_is_no_number_names_the_samples_of_the_process_that_met_it(alone, scenes_data, tmp_path):
    code, printed = spawn(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, ROOT / "tests" / "micro.py",
                          "--spoil", "sft:1", "--preset", "micro-still", "--data", scenes_data, "--init", alone, "--stage", "sft")
    told = {line for line in printed.splitlines() if line.startswith("error: ")}
    assert code == 1 and len(told) == 1, printed
    before, names = told.pop().split("without these samples: ")
    assert "sft step 1: loss nan" in before and len(names.split("; ")) <= micro.STAGES["sft"].batch / 2, "the other half is not to blame"


@pytest.mark.parametrize("sharded", [False, True])
def test_gradients_are_sent_once_a_step(monkeypatch, sharded):
    """Whatever the number of parts: one message with the losses and, if not sharded, one with all gradients."""
    everything, sent, synced = torch.nn.Linear(3, 2), [], []
    everything.model = SimpleNamespace(lm=torch.nn.Identity())
    everything.freeze_but, everything.set_requires_gradient_sync = lambda stage: list(everything.parameters()), synced.append
    monkeypatch.setattr(engine.dist, "all_reduce", lambda values: sent.append(values.numel()))
    monkeypatch.setattr(engine, "shard", lambda *_: None)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: SimpleNamespace(full_tensor=lambda: 1.0) if sharded else 1.0)

    def loss():
        value = everything(torch.ones(3)).sum()
        return value, value.detach()[None]
    objective = SimpleNamespace(step=lambda number: Step([(["x"], loss)] * 4, [1], 4), tasks=["AQA"])
    trainer = engine.Trainer("sft", everything, objective, micro.STAGES["sft"], micro.flags(shard=sharded),
                             engine.World(0, 2, torch.device("cpu")))
    trainer.step(0, SimpleNamespace(signal=0))
    assert sent == ([3] if sharded else [3, 8]) and synced == ([False] * 3 + [True] if sharded else [])


def test_the_language_model_learns_at_its_own_rate():
    """AdamW's first step moves every weight by its learning rate, whatever the gradient."""
    everything = torch.nn.Module()
    everything.model = torch.nn.ModuleDict({"lm": torch.nn.Linear(3, 2), "xattn": torch.nn.Linear(3, 2)})
    everything.freeze_but = lambda stage: list(everything.parameters())
    before = {name: p.detach().clone() for name, p in everything.named_parameters()}

    def loss():
        value = everything.model["lm"](torch.ones(3)).sum() + everything.model["xattn"](torch.ones(3)).sum()
        return value, value.detach()[None]
    c = dataclasses.replace(micro.STAGES["sft"], optimizer="adamw", lr=0.01, warmup=0, weight_decay=0.0, lm_rate=0.25)
    trainer = engine.Trainer("sft", everything, SimpleNamespace(step=lambda number: Step([(["x"], loss)], [1], 1), tasks=["AQA"]), c,
                             micro.flags(), engine.World(0, 1, torch.device("cpu")))
    trainer.step(0, SimpleNamespace(signal=0))
    for name, p in everything.named_parameters():
        assert torch.allclose(before[name] - p, torch.tensor(0.0025 if "lm" in name else 0.01), rtol=1e-3), name


def test_recomputed_activations_change_nothing(alone, scenes_data, tmp_path):
    """In bfloat16 too, where the processor has it: what is computed again is multiplied as it was."""
    for flags, expected in ((["--float32"], alone), ([], tmp_path / "runs" / "stored")):
        train(tmp_path, scenes_data, "--preset", "micro-still", *flags, "--name", "run", "--checkpoint-activations")
        if not flags:
            train(tmp_path, scenes_data, "--preset", "micro-still", "--name", "stored")
        assert losses(tmp_path / "runs" / "run") == losses(expected)


@pytest.mark.slow
def test_compiled_layers_learn_the_same(alone, scenes_data, tmp_path):
    train(tmp_path, scenes_data, "--preset", "micro-still", "--name", "run", "--float32", "--compile")
    same_curve(tmp_path / "runs" / "run", alone)


def test_a_batch_in_two_parts_is_the_batch(alone, scenes_data, tmp_path):
    train(tmp_path, scenes_data, "--preset", "micro-still", "--float32", "--name", "run", "--accumulate", 2)
    same_curve(tmp_path / "runs" / "run", alone)


@pytest.mark.parametrize("stage", ["lm", "pretrain", "sft"])
def test_padding_is_under_a_tenth_of_the_mixed_data(scenes_data, stage):
    """Single, few-shot and dialogue samples, in the batches that the tiny preset makes of them."""
    c, folders = config.STAGES["tiny"][stage], [(scenes_data, 1.0)]
    tokenizer = TRAIN.make_tokenizer(folders, config.TINY.lm.vocab_size)
    samples, tasks = data.tokenized(data.rows_of(scenes_data, "train", stage), tokenizer, c.max_tokens, stage == "lm")
    mixture = data.Mixture([data.Dataset("x", samples, tasks)], c.batch, c.batch_tokens, seed=0)
    parts = [[len(samples[i].ids) for _, i in part] for step in range(64) for part in mixture.batch(step)]
    assert len(set(tasks)) > 5 and max(map(max, parts)) > 5 * min(map(min, parts))
    assert sum(map(sum, parts)) > 0.9 * sum(len(part) * max(part) for part in parts)


def test_the_tokenizer_has_read_every_reference(tmp_path):
    manifest.write_rows(tmp_path / "train.jsonl", [{"audio": "x.wav", "task": "AudioCaptioning", "prompt": "?", "answers": ["no", "Zebra"]}] * 20)
    assert len(micro.train_module().make_tokenizer([(tmp_path, 1.0)], 400).encode("zebra")) < 3

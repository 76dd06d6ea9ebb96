"""claims.py and the masks that it compares: what they see, what the verdicts say, and the whole family at a micro size (slow)."""
import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from af_min import claims, cli
from af_min.flamingo import AudioFlamingo
from conftest import shake


def masked(config, mask):
    torch.manual_seed(0)
    return shake(AudioFlamingo(dataclasses.replace(config, xattn=dataclasses.replace(config.xattn, mask=mask))))


@pytest.mark.parametrize("mask, seen", [("block", {1: "all", 2: "from its own on"}), ("last", {1: "its own part", 2: "from its own on"}),
                                        ("full", {1: "all", 2: "all"})])
def test_which_text_an_audio_reaches_directly(micro_config, mask, seen):
    """Two audios of 2 and 3 windows; text 1 at 0..3, text 2 at 4..7. One block, before the first layer, so that nothing reaches on through text."""
    model = masked(dataclasses.replace(micro_config, lm=dataclasses.replace(micro_config.lm, layers=1)), mask)
    a, ids = micro_config.audio_id, torch.randint(5, 200, (1, 8))
    ids[0, [0, 4]] = a
    windows, counts = torch.randn(2, 3, micro_config.clap.out_width), torch.tensor([[2, 3]])

    def looked(windows):
        audio, out = model.listen(windows, counts), []
        block = model.xattn["0"]
        hook = block.register_forward_hook(lambda module, inputs, output: out.append(output - inputs[0]))
        with torch.no_grad():
            model.hidden(ids, audio)
        hook.remove()
        return out[0][0]
    before = looked(windows)
    for number in (1, 2):
        other = windows.clone()
        other[number - 1, 0] = torch.randn(windows.shape[-1])
        changed = ((looked(other) - before).abs().amax(-1) > 1e-6).tolist()
        assert changed == {"all": [True] * 8, "from its own on": [False] * 4 + [True] * 4, "its own part": [True] * 4 + [False] * 4}[seen[number]]


@pytest.mark.parametrize("mask", ["last", "full"])
def test_step_by_step_reading_gives_what_reading_at_once_does(micro_config, mask):
    model = masked(micro_config, mask)
    ids = torch.randint(5, 200, (2, 9))
    ids[:, [1, 4]] = micro_config.audio_id
    audio = model.listen(torch.randn(4, 3, micro_config.clap.out_width), torch.tensor([[2, 3], [3, 1]]))
    with torch.no_grad():
        expected = model.lm.logits(model.hidden(ids, audio))
        state = model.start(audio, 9)
        got = torch.stack([model.read(ids[:, t:t + 1], state) for t in range(9)], 1)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_a_difference_is_claimed_only_where_no_seed_contradicts_it():
    assert claims.verdict({"a": [0.5, 0.6, 0.7], "b": [0.1, 0.4, 0.2]}) == "a above b"
    assert claims.verdict({"a": [0.1, 0.2, 0.3], "b": [0.4, 0.5, 0.6]}) == "b above a"
    assert claims.verdict({"a": [0.5, 0.6, 0.7], "b": [0.1, 0.5, 0.2]}) == "no difference found between a and b"
    assert claims.verdict({"a": [0.9], "b": [0.1]}) == "one seed: no verdict"
    assert claims.verdict({"0": [0.1, 0.2], "1": [0.3, 0.4], "2": [0.1, 0.3]}) == "1 above 0; no difference found between 0 and 2"


def test_seeds_that_only_one_side_has_are_left_out():
    found = {"windows": [{"count all": 0.5}, {"count all": 0.6}], "pooled": [{"count all": 0.2}]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "CLAIMS", [c for c in claims.CLAIMS if c[:2] in (("sliding windows", "count all"), ("mask", "4 shots, classes seen"))])
        assert claims.comparisons(found) == [("sliding windows", "count all", {"windows": [0.5], "pooled": [0.2]})]


def test_the_table_gives_mean_and_range_over_seeds():
    line = claims.row("masks", "pool", {"block": [0.5, 0.7], "last": [0.25, 0.35]})
    assert "block 0.600 [0.500, 0.700]" in line and "last 0.300 [0.250, 0.350]" in line and line.endswith("block above last")


@pytest.mark.parametrize("left, resumes", [("checkpoint", True), ("checkpoint.old", True), ("checkpoint.partial", False)])
def test_a_training_goes_on_where_it_left_a_whole_checkpoint(tmp_path, monkeypatch, left, resumes):
    """And begins anew where a kill fell into the writing of its first one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/claims/x" / left).mkdir(parents=True)
    (tmp_path / "runs/claims/x" / left / "state.json").touch()
    commands = []
    monkeypatch.setattr(claims.subprocess, "run", lambda command: commands.append(command) or claims.subprocess.CompletedProcess(command, 0))
    claims.train(claims.Args(), "x", "lm", 2, 0, tmp_path)
    assert ("--resume" in commands[0]) == resumes


@pytest.mark.slow
def test_a_micro_family_is_trained_scored_and_not_trained_twice(scenes_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    flags = ["--trainer", str(Path(__file__).with_name("micro.py")), "--preset", "micro", "--data", str(scenes_data), "--seeds", "2", "--items", "3",
             "--steps", "2", "2", "2", "2", "2"]
    monkeypatch.setattr(sys, "argv", ["evaluate", "--claims", *flags])
    real, calls = claims.measured, []

    def killed(*rest):
        calls.append(rest)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*rest)
    monkeypatch.setattr(claims, "measured", killed)
    with pytest.raises(SystemExit):
        cli.run(claims.main)
    table = (tmp_path / "runs/claims/claims.txt").read_text()
    assert "sliding windows" in table and "number of shots" in table and "dialogue" not in table, "windows and pooled are finished"
    monkeypatch.setattr(claims, "measured", real)
    capsys.readouterr()
    cli.run(claims.main)
    first = capsys.readouterr().out
    assert first.count("[") >= 2 * 15 and (tmp_path / "runs/claims/claims.png").exists()
    assert (tmp_path / "runs/claims/claims.txt").read_text().rstrip() in first
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs/claims").rglob("model.safetensors")}
    assert len(stamps) == 2 * 15
    cli.run(claims.main)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert (tmp_path / "runs/claims/claims.txt").read_text() in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["evaluate", "--claims", *flags[:-1], "3"])
    with pytest.raises(SystemExit):
        cli.run(claims.main)
    assert "runs/claims: holds models of other steps" in capsys.readouterr().err

"""plots.py: the numbers behind the pictures, and that every picture is drawn."""
import dataclasses
import errno
import json

import numpy as np
import pytest
import soundfile
import torch
from matplotlib import image
from matplotlib import pyplot as plt

from af_min import data, manifest, plots
from af_min.flamingo import AudioFlamingo
from af_min.retrieval import hear
from af_min.text import write_sample
from conftest import shake

RATE = 16_000


def make_model(config, **xattn):
    torch.manual_seed(0)
    return shake(AudioFlamingo(dataclasses.replace(config, xattn=dataclasses.replace(config.xattn, **xattn))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prepared data set of four recordings: captions and one few-shot row."""
    folder = tmp_path_factory.mktemp("plots") / "tones"
    (folder / "audio").mkdir(parents=True)
    rows = []
    for n in range(4):
        wave = 0.5 * np.sin(2 * np.pi * 300 * (n + 1) * np.arange(RATE * (n + 2) // 2) / RATE)
        soundfile.write(folder / f"audio/{n}.wav", wave, RATE)
        rows.append({"audio": f"audio/{n}.wav", "start": 0.0, "task": "AudioCaptioning", "prompt": "describe the sounds.",
                     "answer": " then ".join(["bell"] * (n + 1))})
    rows.append({**rows[0], "task": "FewShotSeen", "answer": "zub", "shots": [{**rows[1], "answer": "kip"}, {**rows[3], "answer": "zub"}]})
    for split in manifest.SPLITS:
        manifest.write_rows(folder / f"{split}.jsonl", rows)
    manifest.write_card(folder, name="tones")
    return folder


def listen(model, tokenizer, folder, row):
    sample = write_sample(tokenizer, row)
    places = {place: hear(model, folder / place[0]).windows_WD for place in sample.audios}
    batch = data.collate([(sample, places)], tokenizer.pad_id, model.config.clap.out_width)
    with torch.no_grad():
        return sample.ids, model.listen(batch.windows_AWD, batch.n_windows_BN)


def test_attention_is_the_softmax_over_the_visible_windows(micro_config, tokenizer, folder):
    """One block, before the first layer, recomputed in float64 from its weights."""
    model = make_model(micro_config, every=micro_config.lm.layers)
    row = manifest.read_rows(folder / "test.jsonl")[-1]
    ids, audio = listen(model, tokenizer, folder, row)
    got = plots.attention(model, ids, audio)
    block, c = model.xattn["0"], micro_config.xattn
    x = model.lm.embed(torch.tensor(ids)).detach().double()
    if model.lm.positions is not None:
        x = x + model.lm.positions(torch.arange(len(ids)) + 2).detach().double()
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    q = (x * block.norm.weight.double() + block.norm.bias.double()) @ block.q.weight.double().T
    ends = audio.n_windows_BN[0].cumsum(0).tolist()
    expected = np.zeros_like(got, dtype=np.float64)
    for t in range(len(ids)):
        seen = ends[max(1, ids[:t + 1].count(tokenizer.audio_id)) - 1]
        for h in range(c.heads):
            key = audio.keys[0][0, h, :seen].detach().double()
            score = key @ q[t, h * c.head_dim:(h + 1) * c.head_dim] / c.head_dim ** 0.5
            expected[t, :seen] += score.softmax(0).detach().numpy() / c.heads
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(got.sum(1), 1, atol=1e-5)


def test_a_words_share_is_that_of_the_states_that_chose_its_tokens(micro_config, tokenizer, folder):
    model = make_model(micro_config)
    row = manifest.read_rows(folder / "test.jsonl")[0]
    prompt = write_sample(tokenizer, {**row, "answer": ""}, complete=False).ids
    _, audio = listen(model, tokenizer, folder, row)
    answer = tokenizer.encode("bell then dog")
    spoken, share = plots.word_attention(model, tokenizer, prompt, answer, audio)
    assert spoken == ["bell", "then", "dog"]
    whole = plots.attention(model, prompt + answer, audio)
    first = plots.words(tokenizer, answer)[0][1]
    np.testing.assert_allclose(share[0], whole[[len(prompt) - 1 + t for t in first]].mean(0), atol=1e-6)


def test_words_hold_every_token_once_and_whole_characters(tokenizer):
    ids = tokenizer.encode("dog ☃☃ bell\nhorn é")
    groups = plots.words(tokenizer, ids)
    assert [word for word, _ in groups] == ["dog", "☃☃", "bell", "horn", "é"]
    assert sum((places for _, places in groups), []) == list(range(len(ids)))


def test_labels_are_short_and_never_formulas():
    assert plots.plain("a $x$\n b") == r"a \$x\$ b" and len(plots.plain("x" * 99)) == 24
    assert plots.plain("caf\udce9") == "caf?"


def test_names_of_many_words_do_not_overlap(micro_config):
    figure, axes = plt.subplots(figsize=(9, 2.7))
    plots.draw_attention(axes, micro_config.audio, [f"word{n}" for n in range(64)], np.full((64, 4), 0.25), "", 2.0)
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert len(boxes) > 20 and all(above.y0 >= below.y1 for above, below in zip(boxes, boxes[1:]))
    assert [label.get_text() for label in axes.get_yticklabels()][:2] == ["word0", "word3"]
    plt.close(figure)


SHARED = [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]]      # windows of audio 1, 1, 2; text 1 is 4 tokens, text 2 two


@pytest.mark.parametrize("xattn, expected", [
    ({}, SHARED), ({"mask": "last"}, [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]), ({"mask": "full"}, [[1] * 6] * 3),
    ({"null_key": True, "audio_index": True}, SHARED)], ids=["block", "last", "full", "null key"])
def test_the_mask_that_is_drawn_is_the_one_that_the_model_uses(micro_config, xattn, expected):
    model, a = make_model(micro_config, **xattn), micro_config.audio_id
    with torch.no_grad():
        audio = model.listen(torch.randn(2, 2, micro_config.clap.out_width), torch.tensor([[2, 1]]))
    figure, axes = plt.subplots()
    plots.draw_mask(axes, model, [1, a, 1, 1, a, 1], audio, ["x", "y"])
    assert (axes.images[0].get_array() == np.array(expected)).all()
    assert axes.get_title(loc="left").endswith({"last": "its own audio", "full": "every audio"}.get(xattn.get("mask"), "all before it"))
    assert not any(block._forward_pre_hooks for block in model.xattn.values())
    plt.close(figure)


def test_the_log_mel_axis_is_in_hertz_and_the_windows_span_is_in_seconds(micro_config):
    model = AudioFlamingo(micro_config).eval()
    tone = np.sin(2 * np.pi * 2000 * np.arange(RATE) / RATE).astype(np.float32)
    mel, seconds, hertz = plots.log_mel(model, tone)
    loudest = hertz[mel[10:40].mean(0).argmax()]
    assert abs(loudest - 2000) < np.diff(hertz).max() and seconds == pytest.approx(1.2)   # 0.8 s and one hop of 0.4 s


def test_loss_curves_survive_a_resume_and_a_half_written_line(tmp_path):
    lines = [{"stage": "lm", "step": s, "loss": 5.0 - s} for s in (0, 1, 2)] + [{"stage": "lm", "step": 2, "loss": 2.5}] + \
            [{"stage": "sft", "step": 0, "loss": 1.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"stage": "sf')
    figure, axes = plt.subplots()
    plots.draw_losses(axes, tmp_path / "log.jsonl")
    raw = axes.lines[0]
    assert raw.get_xdata().tolist() == [0, 1, 2] and raw.get_ydata().tolist() == [5.0, 4.0, 2.5]
    assert axes.lines[2].get_xdata().tolist() == [3] and len(axes.get_legend().get_texts()) == 2
    plots.draw_losses(axes, tmp_path / "none.jsonl")
    plt.close(figure)


@pytest.mark.parametrize("steps, end", [(20, 2.0), (400, 19.5)])
def test_the_smooth_curve_of_a_short_training_is_a_line_that_ends_where_the_loss_does(tmp_path, steps, end):
    """The loss falls by one a step, to 0 at the last: the mean of the last quarter, of 40 steps at most."""
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({"stage": "sft", "step": s, "loss": steps - 1.0 - s}) + "\n" for s in range(steps)))
    figure, axes = plt.subplots()
    plots.draw_losses(axes, tmp_path / "log.jsonl")
    smooth = axes.lines[1]
    assert len(smooth.get_xdata()) > steps / 2 and smooth.get_ydata()[-1] == pytest.approx(end)
    assert f"ends at {end:.2f}" in smooth.get_label()
    plt.close(figure)


@pytest.mark.parametrize("pooled", [False, True], ids=["windows", "pooled"])
def test_a_report_is_one_picture_of_a_run(micro_config, tokenizer, folder, tmp_path, pooled):
    model = make_model(dataclasses.replace(micro_config, pool_windows=pooled))
    (tmp_path / "log.jsonl").write_text(json.dumps({"stage": "lm", "step": 0, "loss": 5.0}) + "\n")
    path = plots.report(tmp_path, model, tokenizer, folder)
    assert path == tmp_path / "report.png" and image.imread(path).shape[:2] == (990, 1760)
    assert image.imread(path).std() > 0.1 and not list(tmp_path.glob(".report*"))


def test_a_picture_that_finds_the_disk_full_is_named_and_leaves_nothing(tmp_path):
    figure = plt.figure()

    def half(partial, dpi):
        partial.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")     # as from a write: it names no file
    figure.savefig = half
    with pytest.raises(OSError) as error:
        plots.save(figure, tmp_path / "x.png")
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path / "x.png")) and not list(tmp_path.iterdir())


def test_a_data_set_without_few_shot_rows_or_long_scenes_still_gives_rows_to_draw():
    rows = [{"audio": "a", "task": "AQA", "prompt": "p", "answers": ["x", "y"]}, {"audio": "b", "task": "AQA", "prompt": "p", "answer": "z"}]
    assert plots.scene_row(plots.questions(rows))["audio"] == "a"
    row = plots.few_shot_row(plots.questions(rows))
    assert row["answer"] == "z" and [shot["answer"] for shot in row["shots"]] == ["x"]
    talk = [{"audio": "a", "task": "Dialogue", "turns": [{"user": "what?", "assistant": "bell"}, {"user": "high?", "assistant": "no"}]}]
    for row in (plots.scene_row(plots.questions(talk)), plots.few_shot_row(plots.questions(talk))):
        assert (row["prompt"], row["answer"], len(row["turns"]), row.get("shots", [])) == ("what?", "bell", 1, [])


def test_examples_that_together_are_longer_than_the_model_holds_are_drawn(micro_config, tokenizer, folder, tmp_path, monkeypatch):
    rows = [{**row, "answer": "bell " * 300} for row in manifest.read_rows(folder / "test.jsonl")[:3]]
    monkeypatch.setattr(manifest, "read_rows", lambda path: rows)
    model = make_model(dataclasses.replace(micro_config, lm=dataclasses.replace(micro_config.lm, positions="rope")))
    assert plots.report(tmp_path, model, tokenizer, folder).exists()


def test_a_picture_behind_a_link_is_written_where_the_link_points(tmp_path):
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    plots.save(plt.figure(), tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink() and image.imread(tmp_path / "real.png").size

"""evaluate.py: what the table says follows from the answers in the file; interrupted or not, batched or not."""
import json
import shutil

import numpy as np
import pytest
import soundfile
import torch

from af_min import answering, checkpoint, evaluate, manifest, metrics, scores
from af_min.answering import Answerer
from af_min.flamingo import AudioFlamingo
from af_min.store import Store
from conftest import shake

OPTIONS = "classify this sound.\noptions:\n - bell.\n - dog."


@pytest.fixture(scope="module")
def model(micro_config):
    torch.manual_seed(0)
    return shake(AudioFlamingo(micro_config), scale=0.3)


@pytest.fixture(scope="module")
def place(tmp_path_factory, model, micro_config, tokenizer):
    """data/mixed: captions with two references, classes with and without listed options, tags, a dialogue. runs/r: random weights."""
    place, rng = tmp_path_factory.mktemp("evaluate"), np.random.default_rng(0)
    (place / "data/mixed/audio").mkdir(parents=True)
    for split, count in (("train", 6), ("val", 3), ("test", 4)):
        rows = []
        for n in range(count):
            file = f"audio/{split}{n}.wav"
            wave = rng.uniform(-0.5, 0.5, 9_000 * (n + 1)) * np.sin(np.arange(9_000 * (n + 1)) / (n + 3))
            soundfile.write(place / "data/mixed" / file, wave, 16_000)
            name = ["bell", "dog", "horn"][n % 3]
            rows += [{"audio": file, "task": "AudioCaptioning", "prompt": "describe the sounds.", "answers": [f"{name} then dog", "bell then horn"]},
                     {"audio": file, "task": "Presence", "prompt": "is there a dog?", "answer": ["yes", "no"][n % 2]},
                     {"audio": file, "task": "AudioClassification", "prompt": OPTIONS if n else "classify this sound.", "answer": name},
                     {"audio": file, "task": "WindowText", "prompt": "what is heard?", "answer": name},
                     {"audio": file, "task": "Dialogue", "turns": [{"user": "what is it?", "assistant": name},
                                                                   {"user": "is it high or low?", "assistant": "low"}]}]
        if split == "test":
            rows.append({**rows[1], "shots": [{**rows[6], "answer": "no"}]})
        manifest.write_rows(place / f"data/mixed/{split}.jsonl", rows)
    manifest.write_card(place / "data/mixed", name="mixed")
    checkpoint.save_run(place / "runs/r", model, micro_config, tokenizer, {})
    return place


@pytest.fixture
def command(place, monkeypatch, run_command):
    def run(*flags):
        for path in (place / "runs/r").glob("predictions*" if "--fresh" in flags else "nothing"):
            path.unlink()
        monkeypatch.chdir(place)
        return run_command(evaluate.main, "--run", "runs/r", "--dataset", "mixed", "--device", "cpu", "--max-new", "6",
                           *[f for f in flags if f != "--fresh"])
    return run


def lines(place, condition):
    header, *entries = [json.loads(line) for line in (place / f"runs/r/predictions-mixed-test-{condition}.jsonl").read_text().splitlines()]
    return header, entries


def saved(place):
    return {(r["task"], r["shots"], r["measure"]): r for r in json.loads((place / "runs/r/scores-mixed.json").read_text())}


def test_the_table_follows_from_the_answers_in_the_file(command, place):
    code, out, _ = command("--fresh")
    assert code == 0
    header, entries = lines(place, "0")
    _, moved = lines(place, "swapped")
    results = saved(place)
    assert header["decoding"] == {"temperature": 0, "max_new": 6} and not header["swapped"]
    assert len(entries) == len(moved) == 4 * 5 + 1, "a question a row, two a dialogue, none about windows"
    for task, measure, of in (("AudioCaptioning", "CIDEr-D", metrics.cider_d), ("Dialogue", "ROUGE-L", metrics.rouge_l)):
        for part, column in ((entries, "score"), (moved, "swapped")):
            part = sorted((e for e in part if e["task"] == task), key=lambda e: e["id"])
            said, refs = [metrics.words(e["answer"]) for e in part], [[metrics.words(r) for r in e["references"]] for e in part]
            assert results[task, "0", measure][column] == pytest.approx(of(said, refs).mean())
    row = results["AudioCaptioning", "0", "CIDEr-D"]
    assert row["items"] == 4 and row["references"] == 2 and row["low"] <= row["score"] <= row["high"]
    assert {m for t, _, m in results if t == "AudioCaptioning"} == {"CIDEr-D", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"}
    assert results["Presence", "0", "exact"]["items"] == 5 and results["Presence", "0", "exact"]["blind"] in (2 / 5, 3 / 5)
    for r in results.values():
        assert f"{r['task']:20s} {r['shots']:10s} {r['measure']:16s}" in out and f"{r['score']:.3f}" in out
    assert "greedy decoding, at most 6 tokens" in out and "The task is audio captioning. describe the sounds." in out


def test_an_interrupted_evaluation_ends_as_an_uninterrupted_one_and_answers_nothing_twice(command, place, monkeypatch):
    monkeypatch.setattr(answering, "BATCH_TOKENS", 60)
    command("--fresh", "--no-swapped")
    _, whole = lines(place, "0")
    expected, path = saved(place), place / "runs/r/predictions-mixed-test-0.jsonl"
    text = path.read_text()
    asked = []
    batch = Answerer.batch
    monkeypatch.setattr(Answerer, "batch", lambda self, rows: asked.append(len(rows)) or batch(self, rows))
    ends = [i + 1 for i, c in enumerate(text) if c == "\n"]
    for cut, left, more in ((ends[3], 18, ""), (ends[3] + 40, 18, ""), (ends[4] - 1, 18, ""), (ends[-1], 0, ""), (ends[0] - 5, 21, ""),
                            (ends[3], 18, "5\n")):
        path.write_text(text[:cut] + more)
        asked.clear()
        command("--no-swapped")
        assert sum(asked) == left and saved(place) == expected
        assert sorted(map(str, lines(place, "0")[1])) == sorted(map(str, whole))


def test_swapped_answers_are_those_about_the_recording_that_the_number_of_items_gives(command, place):
    command("--fresh")
    expected = saved(place)
    command("--fresh", "--items", "3")
    command()
    heard = {tuple(entry["id"]): entry["audio"] for entry in lines(place, "swapped")[1]}
    assert saved(place) == expected and heard[0, 0] == "audio/test2.wav", "of 3 items it would be the second"


def test_other_weights_data_or_settings_begin_anew(command, place, model, micro_config, tokenizer):
    command("--fresh", "--no-swapped")
    first, _ = lines(place, "0")
    command("--no-swapped", "--max-new", "5")
    second, entries = lines(place, "0")
    assert first != second and len(entries) == 21
    other = AudioFlamingo(micro_config)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.lm.embed.weight[0, 0] += 1
    checkpoint.save_run(place / "runs/r", other, micro_config, tokenizer, {})
    command("--no-swapped")
    third, _ = lines(place, "0")
    checkpoint.save_run(place / "runs/r", model, micro_config, tokenizer, {})
    assert third["weights"] != second["weights"] and third["data"] == second["data"]


def test_shots_come_from_training_rows_of_the_task_and_rows_keep_their_own(command, place):
    code, out, err = command("--fresh", "--no-swapped", "--shots", "0", "2", "--shots-from", "nearest", "random")
    assert code == 0, err
    answers = {task: {a for r in manifest.read_rows(place / "data/mixed/train.jsonl") if r["task"] == task
                      for a in r.get("answers", [r.get("answer")])} for task in ("AudioCaptioning", "Presence", "AudioClassification")}
    for condition in ("2-nearest", "2-random"):
        _, entries = lines(place, condition)
        assert len(entries) == 12 and {e["task"] for e in entries} == set(answers)
        for entry in entries:
            assert len(entry["shots"]) == 2
            assert all("/train" in file and answer in answers[entry["task"]] for file, answer in entry["shots"])
    _, entries = lines(place, "0")
    assert sum(bool(e["shots"]) for e in entries) == 1
    assert ("AudioCaptioning", "2 random", "CIDEr-D") in saved(place)


def test_a_data_set_whose_questions_can_have_no_shots_is_named(command, place):
    shutil.copytree(place / "data/mixed", place / "data/talk")
    for split in manifest.SPLITS:
        manifest.write_rows(place / f"data/talk/{split}.jsonl", [r for r in manifest.read_rows(place / f"data/mixed/{split}.jsonl") if "turns" in r])
    code, _, err = command("--no-swapped", "--dataset", "talk", "--shots", "2")
    assert code == 2 and err.splitlines()[-1].startswith("error: --shots: data/talk: no question there can have examples")


def test_batches_answer_as_single_questions_do_and_likelihoods_too(model, tokenizer, place):
    store = Store(place / "data/mixed", model.encoder, model.config.audio, model.config.clap.out_width)
    tasks = evaluate.questions(manifest.read_rows(place / "data/mixed/test.jsonl"))
    rows = [row for task in tasks for row in tasks[task]]
    store.add([(row["audio"], row["start"]) for row in rows])
    answerer = Answerer(model, tokenizer, store, 6)
    assert answerer.answer(rows) == [answerer.batch([row])[0] for row in rows]
    together = answerer.likelihoods(rows, ["no", "bell then dog", "horn"])
    alone = np.concatenate([answerer.likelihoods([row], ["no", "bell then dog", "horn"]) for row in rows])
    np.testing.assert_allclose(together, alone, atol=1e-4)
    assert (together < 0).all()


def test_the_likeliest_of_the_listed_or_else_of_the_known_answers_is_taken(command, place):
    command("--fresh", "--no-swapped", "--options", "AudioClassification")
    _, entries = lines(place, "0")
    entries = [e for e in entries if e["task"] == "AudioClassification"]
    assert [sorted(e["likelihoods"]) for e in sorted(entries, key=lambda e: e["id"])] == [["bell", "dog", "horn"]] + 3 * [["bell", "dog"]]
    right = [max(e["likelihoods"], key=e["likelihoods"].get) == e["references"][0] for e in entries]
    assert saved(place)["AudioClassification", "0", "likeliest option"]["score"] == pytest.approx(np.mean(right))


def test_any_annotators_answer_is_right_and_unanimous_questions_are_scored_apart():
    measures = evaluate.measures("AQA", ["yes", "no", "two", "No."], [["yes", "no"], ["yes"], ["two"], ["no", "No"]])
    assert {name: measure(np.arange(4)) for name, measure in measures.items()} == pytest.approx({"exact": 3 / 4, "exact, unanimous": 2 / 3})
    assert measures["exact, unanimous"](np.zeros(3, int)) == 0
    assert set(evaluate.measures("AQA", ["yes"], [["yes"]])) == {"exact"}


def test_the_commonest_answer_is_counted_as_answers_are_scored():
    """Capitals and full stops make no other answer."""
    train = [{"task": "AQA", "prompt": "Which?", "answer": answer} for answer in ("Dog", "dog.", "DOG", "cat", "cat")]
    assert scores.blind_answers([{"task": "AQA", "prompt": "which?"}], train) == ["dog"]


def test_captions_of_music_are_captions_too():
    said, references = ["a dog", "rain"], [["a dog"], ["a bell"]]
    expected = evaluate.measures("AudioCaptioning", said, references)
    assert set(evaluate.measures("MusicCaptioning", said, references)) == set(expected) and "CIDEr-D" in expected


def test_tags_get_f1_and_average_precision():
    entries = [{"references": ["dog, bark"], "likelihoods": {"bark": -1.0, "bell": -3.0, "dog": -2.0}},
               {"references": ["bell"], "likelihoods": {"bark": -2.0, "bell": -4.0, "dog": -3.0}}]
    measures = evaluate.measures("AudioClassification", ["dog, loud bark", "horn"], [e["references"] for e in entries])
    everything = np.arange(2)
    assert measures["F1"](everything) == pytest.approx(2 * 1 / 6) and measures["F1-approx"](everything) == pytest.approx(2 * 2 / 6)
    assert evaluate.option_measures("AudioClassification", entries)["mAP"](everything) == pytest.approx((1 + 1 / 2 + 1) / 3)


def test_the_embedded_sets_table_has_its_rows_and_goes_on_where_it_stopped(scenes_data, model, micro_config, tokenizer, tmp_path, capsys, monkeypatch):
    checkpoint.save_run(tmp_path / "run", model, micro_config, tokenizer, {})
    results = evaluate.report(tmp_path / "run", [(scenes_data, 1.0)], items=4)
    assert [r["name"] for r in results] == [
        "caption: event F1", "caption: all events in order", *(name for name, _ in scores.QUESTION_SCORES.values()), "dialogue, turns 2 to 4",
        "4-way, 4 shots, classes seen", "4-way, 0 shots, classes seen", "4-way, 4 shots, classes never seen",
        "4-way, 0 shots, classes never seen", "pool of 12, 4 nearest shots", "pool of 12, 4 random shots"]
    assert all(r["low"] <= r["score"] <= r["high"] <= 1 for r in results)
    path = tmp_path / "run" / f"predictions-{scenes_data.name}-test-table.jsonl"
    whole, asked, batch = path.read_text(), [], Answerer.batch
    monkeypatch.setattr(Answerer, "batch", lambda self, rows: asked.append(len(rows)) or batch(self, rows))
    for kept in (whole.count("\n"), 20):
        path.write_text("\n".join(whole.splitlines()[:kept]) + "\n{")
        asked.clear()
        assert evaluate.report(tmp_path / "run", [(scenes_data, 1.0)], items=4) == results
        assert sum(asked) == whole.count("\n") - kept, "an interrupted table asks what is left, a finished one nothing"
        assert sorted(path.read_text().splitlines()) == sorted(whole.splitlines())
    assert (tmp_path / "run/report.png").exists() and json.loads((tmp_path / "run/scores.json").read_text()) == results
    assert "swapped" in capsys.readouterr().out


def test_of_several_data_sets_those_that_are_not_scored_are_named(place, capsys):
    folders = [(place / "data/mixed", 1.0), (place / "data/other", 2.0)]
    assert evaluate.report(place / "runs/r", folders, items=1, device="cpu")
    assert [line for line in capsys.readouterr().out.splitlines() if "not scored" in line] == [
        f"not scored: {place}/data/other; python -m af_min.evaluate --run {place}/runs/r --dataset {place}/data/other"]


def test_a_flag_that_the_embedded_sets_table_does_not_take_is_heeded(scenes_data, model, micro_config, tokenizer, tmp_path, run_command):
    checkpoint.save_run(tmp_path / "run", model, micro_config, tokenizer, {})
    code, out, _ = run_command(evaluate.main, "--run", tmp_path / "run", "--dataset", scenes_data, "--items", 1, "--max-new", 2, "--no-swapped")
    assert code == 0 and "at most 2 tokens" in out and not list((tmp_path / "run").glob("*swapped*"))


def test_every_item_is_swapped_with_another_recording():
    """Also where all recordings are asked about one thing and then, in the same order, about another."""
    rows = [{"audio": f"{n}.wav", "start": 0.0, "prompt": prompt} for prompt in "ab" for n in range(6)]
    moved = scores.swapped(rows)
    assert [row["prompt"] for row in moved] == ["a"] * 6 + ["b"] * 6
    assert all(row["audio"] != other["audio"] for row, other in zip(rows, moved)) and len({row["audio"] for row in moved}) == 6
    assert [row["audio"] for row in scores.swapped(rows[:6])] == [f"{n}.wav" for n in (3, 4, 5, 0, 1, 2)]


def test_a_row_of_the_embedded_table_is_what_its_answers_make_it():
    said, rows = ["bell then dog", "dog", "horn", "horn"] * 50, [{"answer": a} for a in ["dog then bell", "dog", "bell", "horn"] * 50]
    score = scores.scored("x", rows, said, ["horn"] * 200, 0.25, ["dog"] * 200)
    low, high = score.pop("low"), score.pop("high")
    assert score == {"name": "x", "items": 200, "score": 0.5, "chance": 0.25, "blind": 0.25, "swapped": 0.25}
    assert (low, high) == pytest.approx((0.5 - 1.96 * (0.25 / 200) ** 0.5, 0.5 + 1.96 * (0.25 / 200) ** 0.5), abs=0.01)
    events = scores.scored("x", rows, said, None, None, 0.0, scores.by_events)
    assert events["score"] == pytest.approx(0.8) and events["low"] < 0.8 < events["high"] and events["blind"] == 0 and events["swapped"] is None


@pytest.mark.parametrize("flags, says", [
    (["--shots", "9"], "--shots 9: this model takes 9 audios"), (["--shots", "-1"], "--shots -1"),
    (["--shots", "7"], "--shots 7: there are only 6 other"), (["--options", "Nope"], "--options Nope: no such task"), (["--dataset", "nowhere"], "data/nowhere"),
    (["--run", "runs/none"], "runs/none: no trained model"), (["--max-new", "0"], "--max-new 0"),
    pytest.param(["--device", "cuda"], "--device cuda: no GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU"))])
def test_mistakes_are_one_line(command, flags, says):
    code, _, err = command(*flags)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and says in errors[0] and "Traceback" not in err

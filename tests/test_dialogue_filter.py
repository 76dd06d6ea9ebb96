"""dialogue_filter.py: turns below the threshold go, and what is similar is said by the text tower alone."""
import numpy as np
import pytest
import soundfile
import torch

from af_min import checkpoint, dialogue_filter, manifest
from af_min.clap import TextTower
from af_min.flamingo import AudioFlamingo
from af_min.store import Store
from conftest import shake


@pytest.fixture
def place(tmp_path, tokenizer, micro_config):
    """Six recordings with two-turn dialogues, a run, and a text tower: random weights. What is no dialogue about a recording stays."""
    torch.manual_seed(0)
    model, tower = shake(AudioFlamingo(micro_config), scale=0.3), shake(TextTower(micro_config.clap, micro_config.lm.vocab_size), 1, 0.5)
    checkpoint.save_run(tmp_path / "run", model, micro_config, tokenizer, {})
    checkpoint.write_tensors(tmp_path / "run" / checkpoint.TEXT_TOWER, tower.state_dict())
    (tmp_path / "data/audio").mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = [{"audio": "audio/0.wav", "task": "AudioCaptioning", "prompt": "describe the sounds.", "answer": "a bell"},
            {"description": "a bell", "task": "Interview", "turns": [{"user": "what is it?", "assistant": "bell"}]},
            {"audio": "audio/0.wav", "task": "RollCall", "turns": [{"user": "dog?", "assistant": "no"}]}]
    for n in range(6):
        soundfile.write(tmp_path / f"data/audio/{n}.wav", rng.uniform(-0.5, 0.5, 12_000 * (n + 1)) * np.sin(np.arange(12_000 * (n + 1)) / (n + 2)), 16_000)
        rows.append({"audio": f"audio/{n}.wav", "task": "Dialogue", "turns": [
            {"user": "what is it?", "assistant": ["bell", "dog", "horn"][n % 3]}, {"user": "and then?", "assistant": f"no {n}"}]})
    for split in manifest.SPLITS:
        manifest.write_rows(tmp_path / f"data/{split}.jsonl", rows)
    manifest.write_card(tmp_path / "data", name="talk", licence="MIT")
    return tmp_path, model, tower


@pytest.fixture
def command(place, run_command):
    def run(*flags):
        _, *said = run_command(dialogue_filter.main, "--run", place[0] / "run", "--data", place[0] / "data", *flags)
        return said, manifest.read_rows(place[0] / "data/train.jsonl")
    return run


def test_a_turns_similarity_is_the_best_cosine_of_its_answer_and_a_window(place, tokenizer):
    folder, model, tower = place
    rows = manifest.read_rows(folder / "data/train.jsonl")[3:]
    store = Store(folder / "data", model.encoder, model.config.audio, model.config.clap.out_width)
    store.add([(row["audio"], 0.0) for row in rows])
    own, other = dialogue_filter.similarities(tower, tokenizer, store, rows)
    for n, row in enumerate(rows):
        for scores, heard in ((own, row), (other, rows[(n + 3) % 6])):
            for s, turn in zip(scores[n], row["turns"]):
                ids = torch.tensor([tokenizer.encode(turn["assistant"])])
                with torch.no_grad():
                    text = tower(ids, torch.ones_like(ids))[0].double().numpy()
                windows = store[heard["audio"], 0.0].astype(np.float64)
                assert s == pytest.approx((windows @ text / np.linalg.norm(windows, axis=1) / np.linalg.norm(text)).max(), abs=1e-5)


def test_turns_below_the_threshold_go_and_nothing_else_does(command, place):
    (said, _), before = command()
    assert before == manifest.read_rows(place[0] / "data/val.jsonl") and (place[0] / "run/similarity-data.png").stat().st_size > 5000
    folder, model, tower = place
    store = Store(folder / "data", model.encoder, model.config.audio, model.config.clap.out_width)
    dialogues = before[3:]
    store.add([(row["audio"], 0.0) for row in dialogues])
    own, _ = dialogue_filter.similarities(tower, checkpoint.load_run(folder / "run")[1], store, dialogues)
    threshold = float(np.median(np.concatenate(own)))
    _, after = command("--threshold", str(threshold))
    assert after[:3] == before[:3]
    left = {row["audio"]: [turn["assistant"] for turn in row["turns"]] for row in after[3:]}
    assert left == {row["audio"]: answers for row, of_row in zip(dialogues, own)
                    if (answers := [t["assistant"] for t, s in zip(row["turns"], of_row) if s >= threshold])}
    assert 0 < sum(map(len, left.values())) < 12
    card = manifest.read_card(folder / "data")
    assert card["dialogue_filter"] == threshold and card["licence"] == "MIT" and card["splits"]["train"]["rows"] == len(after)


def test_mistakes_are_named_and_change_nothing(command, place):
    for flags, says in ((["--plot", "x.txt"], "--plot x.txt"), (["--threshold", "nan"], "--threshold nan: expected -1"),
                        (["--data", str(place[0])], "no prepared data set"), (["--run", "none"], "none: no trained model")):
        (_, said), _ = command(*flags)
        assert said.startswith("error: ") and says in said
    (_, said), rows = command("--threshold", "0.9999")
    assert "--threshold 0.9999: no turn fits" in said and len(rows) == 9
    (place[0] / "run" / checkpoint.TEXT_TOWER).unlink()
    (_, said), rows = command("--threshold", "0.9")
    assert "text_tower.safetensors: missing" in said and len(rows) == 9

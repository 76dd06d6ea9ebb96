"""retrieval.py: the nearest recordings by exact cosine, never the recording itself."""
import shutil

import numpy as np
import pytest
import soundfile
import torch

from af_min import manifest
from af_min.cli import UserError
from af_min.flamingo import AudioFlamingo
from af_min.retrieval import Library, answers_task, hear, nearest, pooled
from af_min.store import Store
from conftest import shake

RATE = 16_000


def tone(path, hertz, seconds=1.0, noise=0.05, seed=0):
    wave = np.sin(2 * np.pi * hertz * np.arange(round(RATE * seconds)) / RATE)
    soundfile.write(path, 0.5 * wave + noise * np.random.default_rng(seed).standard_normal(len(wave)), RATE)
    return path


@pytest.fixture(scope="module")
def model(micro_config):
    torch.manual_seed(0)
    return shake(AudioFlamingo(micro_config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight recordings; two questions about each, and one dialogue."""
    folder = tmp_path_factory.mktemp("library") / "tones"
    (folder / "audio").mkdir(parents=True)
    rows = []
    for n in range(8):
        file = f"audio/{n}.wav"
        tone(folder / file, 200 * 1.5 ** n, 0.7 + 0.3 * (n % 3), seed=n)
        rows += [{"audio": file, "task": "AudioCaptioning", "prompt": "describe the sounds.", "answer": f"tone {n}"},
                 {"audio": file, "task": "Presence", "prompt": "is there a dog?", "answer": "no"},
                 {"audio": file, "task": "Count", "prompt": "how many sounds are there?", "answers": ["one", "a single one"]},
                 {"audio": file, "task": "Dialogue", "turns": [{"user": "what is it?", "assistant": "a tone"}]}]
    for split in manifest.SPLITS:
        manifest.write_rows(folder / f"{split}.jsonl", rows if split == "train" else rows[:4])
    manifest.write_card(folder, name="tones")
    return folder


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_nearest_is_the_exact_order_of_float64_cosines(chunk):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((50, 12))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    query = vectors[3]
    expected = sorted(range(50), key=lambda n: -float(vectors[n].astype(np.float64) @ query.astype(np.float64)))[:9]
    assert nearest(query, vectors, 9, chunk).tolist() == expected


def test_equally_near_recordings_keep_their_order_and_k_may_exceed_them():
    vectors = np.eye(3, dtype=np.float16)[[0, 1, 1, 2]]
    assert nearest(np.array([0, 1, 0]), vectors, 10).tolist() == [1, 2, 0, 3]


def test_a_recordings_vector_is_its_mean_window_at_length_one():
    windows = np.array([[3, 0], [3, 8]], np.float16)
    np.testing.assert_allclose(pooled(windows), [0.6, 0.8], atol=1e-6)
    assert not pooled(np.zeros((2, 4), np.float16)).any()


def test_a_file_heard_alone_has_the_embedding_that_a_store_holds(model, folder):
    store = Store(folder, model.encoder, model.config.audio, model.config.clap.out_width)
    store.add([("audio/2.wav", 0.0), ("audio/5.wav", 0.25)])
    for file, start in (("audio/2.wav", 0.0), ("audio/5.wav", 0.25)):
        heard = hear(model, folder / file, start)
        np.testing.assert_allclose(heard.windows_WD.astype(np.float32), store[file, start].astype(np.float32), atol=2e-3)
        assert store.index[heard.key] == store.places[file, start]


def test_shots_are_the_nearest_others_with_the_nearest_last(model, folder, tmp_path):
    library = Library(model, [str(folder)], "AudioCaptioning")
    heard = hear(model, tone(tmp_path / "new.wav", 700, 1.1, seed=99))
    vectors = {n: hear(model, folder / f"audio/{n}.wav").windows_WD.astype(np.float64).mean(0) for n in range(8)}
    mean = heard.windows_WD.astype(np.float64).mean(0)
    cosine = {n: v @ mean / np.linalg.norm(v) / np.linalg.norm(mean) for n, v in vectors.items()}
    expected = [f"tone {n}" for n in sorted(cosine, key=cosine.get)[-3:]]
    shots = library.shots(heard, 3, "nearest", "describe the sounds.")
    assert [shot["answer"] for shot in shots] == expected
    for shot in shots:
        assert library.windows[shot["audio"], 0.0].shape == hear(model, shot["audio"]).windows_WD.shape


@pytest.mark.parametrize("choice", ["nearest", "random"])
def test_a_recording_is_never_its_own_shot_even_under_another_name(model, folder, tmp_path, choice):
    library = Library(model, [str(folder)], "AudioCaptioning")
    shutil.copy(folder / "audio/4.wav", tmp_path / "renamed.wav")
    for path in (folder / "audio/4.wav", tmp_path / "renamed.wav"):
        answers = {shot["answer"] for shot in library.shots(hear(model, path), 7, choice, "describe the sounds.")}
        assert answers == {f"tone {n}" for n in range(8)} - {"tone 4"}


def test_random_shots_depend_on_the_seed_and_the_recording_alone(model, folder, tmp_path):
    heard = [hear(model, tone(tmp_path / f"{n}.wav", 300 + n, seed=n)) for n in range(2)]

    def draw(of, seed):
        library = Library(model, [str(folder)], "AudioCaptioning")
        return [[shot["answer"] for shot in library.shots(h, 4, "random", "", seed)] for h in of]
    assert draw(heard, 0) == draw(heard, 0)
    assert draw(heard, 0)[1] == draw(heard[1:], 0)[0]
    assert len({str(draw(heard[:1], seed)) for seed in range(5)}) > 1


def test_a_task_takes_the_rows_asked_under_its_prefix_but_no_dialogue(model, folder):
    row = {"task": "Count", "prompt": "how many?", "answer": "one"}
    assert answers_task(row, "Count") and answers_task(row, "AQA") and not answers_task(row, "AudioCaptioning")
    assert not answers_task({"task": "Dialogue", "turns": []}, "Dialogue")
    library = Library(model, [str(folder)], "AQA")
    heard = hear(model, folder / "audio/0.wav")
    assert {s["answer"] for s in library.shots(heard, 3, "nearest", "How many sounds are there?")} == {"one"}
    assert {s["prompt"] for s in library.shots(heard, 3, "nearest", "something else")} == {"is there a dog?"}


def test_mistakes_are_named(model, folder, tmp_path):
    with pytest.raises(UserError, match="no prepared data set"):
        Library(model, [str(tmp_path)], "AQA")
    with pytest.raises(UserError, match="Nope.*AudioCaptioning, Count, Presence"):
        Library(model, [str(folder)], "Nope")
    with pytest.raises(UserError, match="--shots 8: there are only 7"):
        Library(model, [str(folder)], "AudioCaptioning").shots(hear(model, folder / "audio/0.wav"), 8, "nearest", "")

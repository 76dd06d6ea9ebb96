"""retrieval.py: the nearest recordings by exact cosine, never the recording itself."""
import json
import shutil

import numpy as np
import pytest
import soundfile
import torch

from af_min import checkpoint, manifest, retrieval
from af_min.cli import UserError
from af_min.flamingo import AudioFlamingo
from af_min.folder import import_folder
from af_min.retrieval import Library, answers_task, hear, nearest, pooled
from af_min.store import Store
from conftest import shake
from training import spawn

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
        assert heard.key == store.keys[file, start]


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


def test_a_recording_is_not_its_own_shot_in_the_form_that_an_import_gave_it(model, tmp_path):
    """At another rate, in another container; the group of the imported one is left out, too."""
    rng = np.random.default_rng(0)
    (tmp_path / "mine").mkdir()
    for n in range(8):
        soundfile.write(tmp_path / f"mine/{n}.wav", rng.uniform(-0.5, 0.5, 22_050), 22_050)
    (tmp_path / "mine/a.csv").write_text("file,answer,group,split\n" + "".join(f"{n}.wav,tone {n},{n // 2},train\n" for n in range(8)))
    import_folder(tmp_path / "mine", tmp_path / "data", 16_000)
    library = Library(model, [str(tmp_path / "data")], "AudioCaptioning")
    shots = library.shots(hear(model, tmp_path / "mine/4.wav"), 6, "nearest", "describe the sounds.")
    assert {shot["answer"] for shot in shots} == {f"tone {n}" for n in range(8)} - {"tone 4", "tone 5"}


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


# ---------------------------------------------------------------------- many queries

def test_many_queries_find_what_each_finds_alone_whatever_the_chunk():
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((300, 8)).round(0).astype(np.float16)                # small integers: many equal products
    queries = rng.standard_normal((300, 8)).round(0)
    exact = [sorted(range(300), key=lambda n: (-float(vectors[n].astype(np.float64) @ q), n))[:5] for q in queries]
    for chunk in (1, 64, 1000):
        assert nearest(queries, vectors, 5, chunk).tolist() == exact
    assert nearest(queries[:0], vectors, 5).shape == (0, 5) and nearest(queries, vectors[:3], 5).shape == (300, 3)


def test_the_inverted_file_finds_nearly_all_of_them(monkeypatch):
    pytest.importorskip("faiss")
    rng = np.random.default_rng(2)
    centres = rng.standard_normal((40, 16))
    vectors = (centres[rng.integers(40, size=4000)] + 0.3 * rng.standard_normal((4000, 16))).astype(np.float16)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    monkeypatch.setattr(retrieval, "FAISS_ABOVE", 100)
    found = retrieval.neighbours(vectors[:200], vectors, 4)
    assert np.mean([len({*a} & {*b}) / 4 for a, b in zip(found, nearest(vectors[:200], vectors, 4))]) > 0.95


def test_neither_another_cut_nor_a_copy_of_the_query_is_a_shot(model, folder, tmp_path):
    heard = hear(model, folder / "audio/2.wav", 0.3)
    library = Library(model, [str(folder)], "AudioCaptioning")
    for choice in ("nearest", "random"):
        assert len(library.shots(heard, 7, choice, "")) == 7
        assert all(shot["answer"] != "tone 2" for shot in library.shots(heard, 7, choice, ""))


def test_nothing_of_the_questions_own_group_is_a_shot(model, folder, tmp_path):
    """Recordings 0, 1 and 2 are cuts of one source, in files of their own; a question about one of them sees none of them, be it that
    nothing of the task is asked about it (1)."""
    shutil.copytree(folder, tmp_path / "cut")
    rows = [row | ({"group": "source 7"} if row["audio"][6] in "012" else {}) for row in manifest.read_rows(folder / "train.jsonl")]
    del rows[4]
    manifest.write_rows(tmp_path / "cut/train.jsonl", rows)
    library = Library(model, [str(tmp_path / "cut")], "AudioCaptioning")
    for choice in ("nearest", "random"):
        for n, others in ((1, {3, 4, 5, 6, 7}), (5, {0, 2, 3, 4, 6, 7})):
            shots = library.shots(hear(model, folder / f"audio/{n}.wav"), len(others), choice, "")
            assert {shot["answer"] for shot in shots} == {f"tone {other}" for other in others}
    with pytest.raises(UserError, match="--shots 6: there are only 5"):
        library.shots(hear(model, folder / "audio/0.wav"), 6, "nearest", "")


# ---------------------------------------------------------------------- interleaved rows

@pytest.fixture
def command(model, folder, tokenizer, micro_config, tmp_path, run_command):
    """`python -m af_min.retrieval FLAGS` on a copy of the data set that also holds a second cut and a copy of recording 3."""
    data = tmp_path / "tones"
    shutil.copytree(folder, data, ignore=shutil.ignore_patterns("embeddings"))
    shutil.copy(data / "audio/3.wav", data / "audio/again.wav")
    rows = manifest.read_rows(data / "train.jsonl")
    more = [{**rows[12], "start": 0.2, "answer": "late 3"}, {**rows[12], "audio": "audio/again.wav", "answer": "copy 3"}]
    manifest.write_rows(data / "train.jsonl", rows + more)
    checkpoint.save_run(tmp_path / "run", model, micro_config, tokenizer, {})

    def run(*flags):
        _, *said = run_command(retrieval.main, "--run", tmp_path / "run", "--data", data, *flags)
        return manifest.read_rows(data / "train.jsonl"), data, said
    return run


def test_every_question_gets_examples_of_its_task_from_other_training_recordings(command):
    rows, data, _ = command("--shots", "3")
    new = [row for row in rows if "shots" in row]
    plain = [row for row in rows if "shots" not in row]
    assert len(plain) == 34 and len(new) == 2 * 26 and {len(row["shots"]) for row in new} == {1, 2, 3}
    own = {json.dumps(row, sort_keys=True) for row in plain}
    threes = {"audio/3.wav", "audio/again.wav"}
    for row in new:
        bare = {k: v for k, v in row.items() if k not in ("shots", "retrieved")}
        assert json.dumps(bare, sort_keys=True) in own and row["task"] != "Dialogue"
        for shot in row["shots"]:
            assert shot["prompt"] == row["prompt"] and (data / shot["audio"]).exists()
            assert shot["audio"] != row["audio"] and not {shot["audio"], row["audio"]} <= threes
    assert manifest.read_card(data)["splits"]["train"]["rows"] == len(rows)
    assert manifest.read_card(data)["sha256"] == manifest.dataset_hash(data)


def test_nearest_examples_are_those_that_a_question_would_be_given(command, model):
    rows, data, _ = command("--shots", "8", "--shots-from", "nearest")
    library = Library(model, [str(data)], "Presence")
    for row in [row for row in rows if row.get("retrieved") and row["task"] == "Presence"]:
        expected = library.shots(hear(model, data / row["audio"]), 7, "nearest", "")
        shown = [str(data / shot["audio"]) for shot in row["shots"]]
        assert shown == [shot["audio"] for shot in expected][-len(shown):]


def test_a_second_call_replaces_the_rows_of_the_first(command):
    first, _, _ = command("--shots", "2")
    again, _, _ = command("--shots", "2")
    assert first == again
    few, _, _ = command("--shots", "2", "--rows", "5", "--shots-from", "random")
    assert len(few) == 34 + 5
    embedded, data, said = command("--shots", "0")
    assert embedded == few and "of 9 recordings" in said[0], "eight recordings and another cut of one; a copy is no further one"
    unchanged, _, said = command("--shots", "9")
    assert unchanged == few and "--shots 9: this model takes 9 audios" in said[1] and "Traceback" not in said[1]


def test_torchrun_of_one_process_needs_no_number_of_threads(command, tmp_path, monkeypatch):
    """It sets OMP_NUM_THREADS for two or more alone."""
    _, data, _ = command("--shots", "0")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code, printed = spawn(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 1, "-m", "--", "af_min.retrieval",
                          "--run", tmp_path / "run", "--data", data, "--shots", 0)
    assert code == 0, printed


def test_two_processes_share_the_encoding_and_write_what_one_writes(command, tmp_path):
    """torchrun over the command itself; the embeddings that it leaves are all that one process needs."""
    alone, data, _ = command("--shots", "2")
    before = {path.relative_to(data): path.read_bytes() for path in data.rglob("vectors.f16")}
    for path in (data / "embeddings").rglob("*.*"):
        path.unlink()
    code, printed = spawn(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "--", "af_min.retrieval",
                          "--run", tmp_path / "run", "--data", data, "--shots", 2)
    assert code == 0, printed
    assert manifest.read_rows(data / "train.jsonl") == alone
    assert {path: len(content) for path, content in before.items()} == {path.relative_to(data): path.stat().st_size for path in data.rglob("vectors*")}

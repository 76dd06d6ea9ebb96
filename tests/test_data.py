"""data.py: the mixture's order depends on the seed and the step alone, weights are respected, a batch is what its samples are."""
import contextlib
import gc
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from af_min import manifest
from af_min.cli import UserError
from af_min.data import Dataset, Mixture, WindowCaptions, collate, parse_data, rows_of, stream, tokenized
from af_min.text import IGNORE, Sample


def sample(length):
    return Sample(list(range(length)), [IGNORE] * length, ())


def dataset(name, count, weight=1.0, seed=0):
    lengths = np.random.default_rng(seed).integers(5, 60, count)
    return Dataset(name, [sample(int(n)) for n in lengths], weight=weight)


def batches(mixture, count):
    return [mixture.batch(step) for step in range(count)]


def samples_of(batch):
    """(data set, sample) of all parts of a batch."""
    return [place for part in batch for place in part]


# ---------------------------------------------------------------------- order

def test_a_batch_depends_on_the_seed_and_the_step_alone():
    """Whatever was asked before, in whatever order: what a resumed run sees is what the interrupted one would have seen."""
    sets = [dataset("a", 300), dataset("b", 40, weight=0.2)]
    walked = batches(Mixture(sets, 16, 400, seed=3), 150)
    for step in (149, 0, 77, 31, 32, 33):
        assert Mixture(sets, 16, 400, seed=3).batch(step) == walked[step]
    other = Mixture(sets, 16, 400, seed=3)
    assert [other.batch(step) for step in reversed(range(150))] == walked[::-1]
    torch.rand(1), np.random.rand(1)
    assert batches(Mixture(sets, 16, 400, seed=3), 150) == walked
    assert batches(Mixture(sets, 16, 400, seed=4), 20) != walked[:20]


def test_a_long_training_does_not_keep_the_batches_behind_it():
    """100 000 batches of 384 samples would be gigabytes."""
    mixture = Mixture([dataset("a", 300)], 16, 400, seed=0)
    held = [len(pickle.dumps(mixture)) for step in range(400) if mixture.batch(step)]
    assert max(held) < 1.1 * held[0]


@pytest.mark.parametrize("count, max_samples, max_tokens", [(300, 16, 10**9), (37, 4, 10**9), (1, 8, 400), (500, 1000, 400), (7, 64, 10**9)])
def test_every_row_once_in_a_pass(count, max_samples, max_tokens):
    mixture = Mixture([dataset("a", count)], max_samples, max_tokens, seed=0)
    drawn = [i for number in range(6) for batch in mixture.epoch(number) for _, i in samples_of(batch)]
    seen, passes = Counter(drawn), len(drawn) // count
    assert {seen[i] for i in range(count)} <= {passes, passes + 1}


def test_rows_come_in_another_order_on_every_pass():
    passes = [stream(50, turn * 50, 50, 0) for turn in range(3)]
    assert all(sorted(p) == list(range(50)) for p in passes) and passes[0] != passes[1] != passes[2]
    assert stream(50, 20, 70, 0) == passes[0][20:] + passes[1][:40]


# ---------------------------------------------------------------------- weights

def test_data_sets_appear_by_their_weights_not_by_their_sizes():
    sets = [dataset("large", 2000, weight=1.0), dataset("small", 20, weight=2.0, seed=1), dataset("third", 300, weight=0.5, seed=2)]
    mixture = Mixture(sets, 32, 1000, seed=0)
    count = Counter(d for batch in batches(mixture, 400) for d, _ in samples_of(batch))
    for d, weight in enumerate([1.0, 2.0, 0.5]):
        assert count[d] / sum(count.values()) == pytest.approx(weight / 3.5, rel=0.03)


def test_a_tiny_weight_is_not_rounded_away_and_an_empty_data_set_is_left_out():
    mixture = Mixture([dataset("a", 100), dataset("b", 100, weight=1e-6), dataset("none", 0)], 8, 10**9, seed=0)
    count = Counter(d for number in range(3) for batch in mixture.epoch(number) for d, _ in samples_of(batch))
    assert count[1] >= 3 and set(count) == {0, 1}


# ---------------------------------------------------------------------- batch size and padding

@pytest.mark.parametrize("max_samples, max_tokens", [(24, 600), (1, 600), (3, 10**9), (10, 10**9), (256, 4096), (10**6, 1000)])
def test_limits_of_a_batch_hold_and_batches_have_little_padding(max_samples, max_tokens):
    """A batch is a few parts of samples of like length, each part padded for itself."""
    sets = [dataset("a", 3000), dataset("b", 500, seed=1)]
    mixture = Mixture(sets, max_samples, max_tokens, seed=0)
    real = padded = 0
    for batch in batches(mixture, 300):
        parts = [[len(sets[d].samples[i].ids) for d, i in part] for part in batch]
        in_batch = sum(len(lengths) * max(lengths) for lengths in parts)
        assert 1 <= len(samples_of(batch)) <= max_samples and in_batch <= max_tokens
        real, padded = real + sum(map(sum, parts)), padded + in_batch
    assert real / padded > 0.85, f"{1 - real / padded:.0%} of all tokens are padding"


def test_a_batch_holds_short_and_long_samples():
    """Else one step would learn from captions alone and the next from single words."""
    sets = [dataset("a", 3000)]
    spread = [np.ptp([len(sets[d].samples[i].ids) for d, i in samples_of(batch)]) for batch in batches(Mixture(sets, 64, 10**9, 0), 100)]
    assert np.mean(spread) > 20                            # lengths lie between 5 and 59


def test_a_sample_longer_than_the_limit_is_a_part_of_its_own():
    long = Dataset("a", [sample(500), sample(10), sample(12)])
    for batch in batches(Mixture([long], 8, 100, seed=0), 12):
        assert all(len(part) == 1 or 0 not in [i for _, i in part] for part in batch)


def test_batches_of_one_virtual_epoch_are_not_in_the_order_of_their_length():
    mixture = Mixture([dataset("a", 3000)], 16, 10**9, seed=0)
    longest = [max(len(mixture.datasets[d].samples[i].ids) for d, i in part) for batch in mixture.epoch(0) for part in batch]
    assert longest != sorted(longest) and abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.6


def test_nothing_to_train_on_is_said():
    with pytest.raises(UserError, match="nothing to train on in a, b"):
        Mixture([dataset("a", 0), dataset("b", 0)], 8, 100, seed=0)


# ---------------------------------------------------------------------- collate

class Shelf(dict):
    """A store by hand: {(file, start): array (W, D)}."""


A, B, C = (np.full((n, 3), value, np.float16) for n, value in ((2, 1.5), (1, 2.5), (4, 3.5)))
SHELF = Shelf({("a", 0.0): A, ("b", 0.0): B, ("c", 1.0): C})
SAMPLES = [Sample([5, 6, 7], [IGNORE, 6, 7], (("a", 0.0), ("c", 1.0))), Sample([8], [IGNORE], ()),
           Sample([1, 2], [IGNORE, 2], (("b", 0.0),))]


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_collate_by_hand(left):
    batch = collate([(s, SHELF) for s in SAMPLES], pad_id=99, width=3, left=left)
    side = (lambda row, pad: [pad] * (3 - len(row)) + row) if left else (lambda row, pad: row + [pad] * (3 - len(row)))
    assert batch.ids_BT.tolist() == [[5, 6, 7], side([8], 99), side([1, 2], 99)]
    assert batch.labels_BT.tolist() == [[IGNORE, 6, 7], [IGNORE] * 3, side([IGNORE, 2], IGNORE)]
    assert batch.mask_BT.tolist() == [[True] * 3, side([True], False), side([True] * 2, False)]
    assert batch.n_windows_BN.tolist() == [[2, 4], [0, 0], [1, 0]]
    assert batch.windows_AWD.dtype == torch.float32 and batch.windows_AWD[:, :, 0].tolist() == [
        [1.5, 1.5, 0, 0], [3.5] * 4, [2.5, 0, 0, 0]]


def test_collate_without_any_audio():
    batch = collate([(SAMPLES[1], None)], pad_id=0, width=3)
    assert batch.windows_AWD.shape == (0, 0, 3) and batch.n_windows_BN.shape == (1, 0)


# ---------------------------------------------------------------------- rows

ROWS = [
    {"audio": "a.wav", "task": "AQA", "prompt": "bell?", "answers": ["no", "never"]},
    {"audio": "b.wav", "start": 2.5, "task": "WindowText", "prompt": "what is heard?", "answer": "bell"},
    {"audio": "c.wav", "task": "FewShot", "prompt": "classify this sound.", "answer": "dog",
     "shots": [{"audio": "a.wav", "start": 1.0, "prompt": "classify this sound.", "answer": "bell"}]},
    {"audio": "d.wav", "task": "Dialogue", "turns": [{"user": "bell?", "assistant": "no"}]},
    {"audio": "e.wav", "task": "Pool", "prompt": "bell?", "answer": "no", "pool": [{"audio": "f.wav", "prompt": "bell?", "answer": "x"}]},
    {"audio": "c.wav", "task": "RollCall", "turns": [{"user": "bell?", "assistant": "yes"}]}]


@pytest.fixture
def prepared(tmp_path):
    manifest.write_rows(tmp_path / "train.jsonl", ROWS)
    manifest.write_card(tmp_path, name="x")
    return tmp_path


@pytest.mark.parametrize("stage, tasks", [("clap", ["WindowText"]), ("lm", ["AQA", "FewShot", "Dialogue", "Pool", "RollCall"]),
                                          ("pretrain", ["AQA", "FewShot", "Dialogue", "Pool", "RollCall"]), ("sft", ["AQA", "FewShot", "Dialogue", "Pool"])])
def test_every_stage_has_its_rows(prepared, stage, tasks):
    assert [row["task"] for row in rows_of(prepared, "train", stage)] == tasks


def test_each_reference_is_a_sample_and_what_cannot_be_learned_is_dropped(tokenizer):
    samples, tasks = tokenized(ROWS[:1], tokenizer, 100)
    assert tasks == ["AQA", "AQA"]
    assert [tokenizer.decode(s.ids).split("Answer:")[1].strip() for s in samples] == ["no", "never"]
    assert tokenized(ROWS[:1], tokenizer, 8) == ([], []), "cut before its answer"
    assert tokenized([{**ROWS[3], "turns": [{"user": "a", "assistant": "b", "loss": False}]}], tokenizer, 100) == ([], [])


def test_recordings_of_rows_of_their_shots_and_of_their_pools():
    got = manifest.recordings([{"start": 0.0, **row} for row in ROWS])
    assert set(got) == {("a.wav", 0.0), ("b.wav", 2.5), ("c.wav", 0.0), ("a.wav", 1.0), ("d.wav", 0.0), ("e.wav", 0.0), ("f.wav", 0.0)}


def test_folders_and_weights(prepared, monkeypatch):
    assert parse_data([str(prepared), f"{prepared}:2", f"{prepared}:0.25"]) == [(prepared, 1), (prepared, 2), (prepared, 0.25)]
    monkeypatch.chdir(prepared.parent)
    prepared.rename("2024")
    assert parse_data(["2024", "2024:.5"]) == [(Path("2024"), 1), (Path("2024"), 0.5)]
    prepared = Path("2024").rename(prepared)
    with pytest.raises(UserError, match="weight must be above 0"):
        parse_data([f"{prepared}:0"])
    with pytest.raises(UserError, match="no prepared data set there"):
        parse_data([str(prepared / "nowhere")])


# ---------------------------------------------------------------------- contrastive batches

def test_window_captions_a_few_windows_of_each_of_many_recordings():
    rows = [{"audio": f"{i}.wav", "start": float(j), "answer": f"{i} {j}"} for i in range(10) for j in range(4)]
    captions = WindowCaptions(rows, size=8, seed=0)
    steps = [captions.batch(step) for step in range(10)]
    for batch in steps:
        assert len(batch) == 8 and sorted(Counter(row["audio"] for row in batch).values()) == [4, 4]
        assert len({row["answer"] for row in batch}) == 8
    for turn in (steps[:5], steps[5:]):
        assert len({row["audio"] for batch in turn for row in batch}) == 10, "each recording once in a pass"
    assert WindowCaptions(rows, 8, 0).batch(7) == steps[7] and WindowCaptions(rows, 8, 1).batch(0) != steps[0]
    with pytest.raises(UserError, match="nothing to train the window encoder on"):
        WindowCaptions([], 8, 0)


def test_garbage_is_collected_again_when_rows_are_read_or_are_none(prepared):
    (prepared / "bad.jsonl").write_text("{}\n")
    for name in ("train", "bad"):
        with contextlib.suppress(UserError):
            manifest.read_rows(prepared / f"{name}.jsonl")
        assert gc.isenabled()
    seen = []
    with manifest.nothing_is_garbage():
        seen.append(gc.isenabled())
        manifest.read_rows(prepared / "train.jsonl")
        seen.append(gc.isenabled())
    assert seen == [False, False] and gc.isenabled()

"""store.py: what is read is what the encoder said, to float16; nothing is encoded twice, whatever happened in between."""
import dataclasses
import json
import shutil
import threading

import numpy as np
import pytest
import soundfile
import torch

from af_min.audio_files import AudioError
from af_min.clap import WindowEncoder
from af_min.cli import UserError
from af_min.store import Store, encoder_hash, recording_key
from conftest import shake
from micro import MICRO

SECONDS = {"a.wav": 0.3, "b.wav": 1.7, "c.wav": 3.0, "d.wav": 9.0}        # 1, 4, 7 and 12 windows: the last is cut
PLACES = [(name, 0.0) for name in SECONDS] + [("c.wav", 1.0)]
COUNTS = {("a.wav", 0.0): 1, ("b.wav", 0.0): 4, ("c.wav", 0.0): 7, ("d.wav", 0.0): 12, ("c.wav", 1.0): 4}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return shake(WindowEncoder(MICRO.audio, MICRO.clap), scale=0.05)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, seconds in SECONDS.items():
        soundfile.write(tmp_path / name, rng.uniform(-0.5, 0.5, round(seconds * 16_000)), 16_000)
    return tmp_path


def a_store(folder, encoder):
    return Store(folder, encoder, MICRO.audio, MICRO.clap.out_width)


def direct(folder, encoder, place):
    """Cut into windows and encoded one window at a time, by hand."""
    wave, rate = soundfile.read(folder / place[0], dtype="float64")
    wave = wave[round(place[1] * rate):]
    wave = np.round(wave / np.abs(wave).max() * 32767) / 32767
    rows = []
    for w in range(COUNTS[place]):
        window = torch.zeros(12_800)
        part = wave[w * 6_400:w * 6_400 + 12_800]
        window[:len(part)] = torch.tensor(part)
        with torch.no_grad():
            rows.append(encoder(window[None])[0].numpy())
    return np.stack(rows)


def exact(store, place, expected):
    got = store[place]
    assert got.dtype == np.float16 and got.shape == expected.shape
    assert np.abs(got.astype(np.float64) - expected).max() <= 2 ** -11 * np.abs(expected).max() + 1e-4


@pytest.mark.parametrize("batch", [1, 5, 128])
def test_embeddings_are_the_encoders_to_float16(folder, encoder, batch):
    store = a_store(folder, encoder)
    assert store.add(PLACES, batch=batch) == sum(COUNTS.values())
    for place in PLACES:
        exact(store, place, direct(folder, encoder, place))
    assert store.vectors.shape == (28, 16) and (store.home / "vectors.f16").stat().st_size == 28 * 16 * 2


def test_nothing_is_encoded_twice(folder, encoder):
    store = a_store(folder, encoder)
    assert store.add(PLACES[:2]) == 5 and store.add(PLACES[:2]) == 0
    shutil.copy(folder / "b.wav", folder / "copy of b.wav")
    again = a_store(folder, encoder)
    assert again.add([*PLACES[:3], ("copy of b.wav", 0.0)]) == 7, "expected c.wav alone to be encoded"
    assert np.array_equal(again["copy of b.wav", 0.0], again["b.wav", 0.0])
    exact(again, PLACES[2], direct(folder, encoder, PLACES[2]))


def test_copies_within_one_call_are_encoded_once(folder, encoder):
    for n in range(5):
        shutil.copy(folder / "b.wav", folder / f"b{n}.wav")
    store = a_store(folder, encoder)
    assert store.add([(f"b{n}.wav", 0.0) for n in range(5)], batch=3) == 4
    assert all(np.array_equal(store[f"b{n}.wav", 0.0], store["b0.wav", 0.0]) for n in range(5))


def test_the_key_is_the_content_and_the_beginning(folder):
    key = recording_key(folder / "a.wav", 0.0)
    shutil.copy(folder / "a.wav", folder / "z.wav")
    assert recording_key(folder / "z.wav", 0.0) == key != recording_key(folder / "a.wav", 0.5)
    content = bytearray((folder / "z.wav").read_bytes())
    content[-1] ^= 1
    (folder / "z.wav").write_bytes(content)
    assert recording_key(folder / "z.wav", 0.0) != key


def test_a_recording_that_was_replaced_is_encoded_anew(folder, encoder):
    a_store(folder, encoder).add(PLACES)
    shutil.copy(folder / "b.wav", folder / "a.wav")
    store = a_store(folder, encoder)
    assert store.add(PLACES) == 0 and np.array_equal(store["a.wav", 0.0], store["b.wav", 0.0])


def test_every_encoder_has_its_own_embeddings(folder, encoder):
    other = WindowEncoder(MICRO.audio, MICRO.clap).eval()
    other.load_state_dict(encoder.state_dict())
    assert encoder_hash(other, MICRO.audio) == encoder_hash(encoder, MICRO.audio)
    assert encoder_hash(other, MICRO.audio) != encoder_hash(other, dataclasses.replace(MICRO.audio, hop=0.2)), "cuts other windows"
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3
    assert encoder_hash(other, MICRO.audio) != encoder_hash(encoder, MICRO.audio)
    first, second = a_store(folder, encoder), a_store(folder, other)
    assert first.add(PLACES[:1]) == second.add(PLACES[:1]) == 1 and first.home != second.home


# ---------------------------------------------------------------------- interruptions

def test_a_new_run_goes_on_wherever_the_last_one_was_cut(folder, encoder, tmp_path):
    """Cut both files anywhere that an interruption can: vectors without a line, half a line, both."""
    whole = a_store(folder, encoder)
    whole.add(PLACES, batch=1)
    index, vectors = whole.home / "index.jsonl", whole.home / "vectors.f16"
    lines, data = index.read_text().splitlines(keepends=True), vectors.read_bytes()
    expected = {place: np.array(whole[place]) for place in PLACES}
    ends = [0] + [(json.loads(line)["first"] + json.loads(line)["count"]) * 32 for line in lines]
    for kept in range(len(lines)):
        for half_line in ("", lines[kept][:9], lines[kept][:-1]):
            for more in (0, 1, 33):
                if half_line and more < ends[kept + 1] - ends[kept]:
                    more = ends[kept + 1] - ends[kept]          # a line is written after its vectors
                index.write_text("".join(lines[:kept]) + half_line)
                vectors.write_bytes(data[:ends[kept] + more])
                store = a_store(folder, encoder)
                done = store.add(PLACES)
                assert done == sum(json.loads(line)["count"] for line in lines[kept:]), "a line without its end is none"
                assert all(np.array_equal(store[p], expected[p]) or np.abs(store[p] - expected[p]).max() < 2e-3 for p in PLACES)
                assert a_store(folder, encoder).add(PLACES) == 0, "what was added after the cut must be found again"


def test_a_folder_of_which_nothing_is_named_begins_anew(folder, encoder):
    store = a_store(folder, encoder)
    (store.home / "vectors.f16").write_bytes(b"rubbish")
    assert store.add(PLACES[:2]) == 5
    exact(store, PLACES[1], direct(folder, encoder, PLACES[1]))


def test_vectors_that_are_shorter_than_the_index_says_are_not_believed(folder, encoder):
    """A copy that was cut off: encoded again, or named. Never zeros, never a crash."""
    store = a_store(folder, encoder)
    store.add(PLACES, batch=1)
    path = store.home / "vectors.f16"
    path.write_bytes(path.read_bytes()[:-100])
    store = a_store(folder, encoder)
    store.add(PLACES)
    for place in PLACES:
        exact(store, place, direct(folder, encoder, place))


def test_stores_of_one_folder_can_be_filled_by_turns(folder, encoder):
    first, second = a_store(folder, encoder), a_store(folder, encoder)
    assert [s.add([p]) for s, p in zip([first, second, first, second], PLACES)] == [1, 4, 7, 12]
    for store, place in [(first, PLACES[0]), (second, PLACES[1]), (first, PLACES[2]), (second, PLACES[3])]:
        exact(store, place, direct(folder, encoder, place))
    assert a_store(folder, encoder).add(PLACES[:4]) == 0


# ---------------------------------------------------------------------- mistakes

def test_a_recording_that_is_missing_is_named(folder, encoder):
    with pytest.raises(UserError, match="gone.wav"):
        a_store(folder, encoder).add([("gone.wav", 0.0)])


def test_a_recording_that_cannot_be_read_is_named(folder, encoder):
    (folder / "bad.wav").write_bytes(b"no sound")
    with pytest.raises(AudioError, match="bad.wav"):
        a_store(folder, encoder).add([*PLACES[:1], ("bad.wav", 0.0)])
    store = a_store(folder, encoder)
    assert store.add(PLACES[:1]) in (0, 1)
    exact(store, PLACES[0], direct(folder, encoder, PLACES[0]))


# ---------------------------------------------------------------------- several processes

def together(folder, encoder, size, stop=lambda rank, calls: None, places=PLACES):
    """`add` in `size` threads that wait for each other as processes do; `stop` may raise in one of them, which ends them all."""
    barrier, errors, done = threading.Barrier(size), [], [0] * size

    def work(rank):
        calls = iter(range(9))

        def wait():
            stop(rank, next(calls))
            barrier.wait(30)
        try:
            done[rank] = a_store(folder, encoder).add(places, batch=3, rank=rank, size=size, wait=wait)
        except Exception as error:
            errors.append(error)
            barrier.abort()
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done, errors


@pytest.mark.parametrize("size", [2, 3, 7])
def test_several_processes_share_the_work_and_one_store_results(folder, encoder, size):
    shutil.copy(folder / "c.wav", folder / "copy.wav")
    done, errors = together(folder, encoder, size, places=[*PLACES, ("copy.wav", 0.0)])
    assert not errors and sum(done) == 28 and sum(n > 0 for n in done) == min(size, 5)
    store = a_store(folder, encoder)
    assert store.add(PLACES) == 0 and not list(store.home.glob("*-*"))
    for place in PLACES:
        exact(store, place, direct(folder, encoder, place))


def test_what_interrupted_processes_have_encoded_is_taken_over(folder, encoder):
    encoded = threading.Event()

    def stop(rank, calls):
        if calls == 1 and rank == 0:
            encoded.set()
        if calls == 1 and rank == 1:                       # both have encoded their share and not yet handed it over
            assert encoded.wait(30)
            raise KeyError("killed")
    done, errors = together(folder, encoder, 2, stop)
    home = a_store(folder, encoder).home
    left = sorted(path.name for path in home.glob("index-*"))
    assert errors and left and not (home / "index.jsonl").exists()
    with open(home / "index-1.jsonl", "a") as index:
        index.write('{"key": "half a li')
    store = a_store(folder, encoder)
    assert store.add(PLACES) == 0, "both had finished their share"
    for place in PLACES:
        exact(store, place, direct(folder, encoder, place))
    assert not list(home.glob("*-*"))


def test_two_trainings_at_once_do_not_spoil_each_others_vectors(folder, encoder):
    stores = [a_store(folder, encoder) for _ in range(2)]
    threads = [threading.Thread(target=store.add, args=(places,), kwargs={"batch": 1})
               for store, places in zip(stores, (PLACES[:3], PLACES[2:]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = a_store(folder, encoder)
    assert store.add(PLACES) == 0
    for place in PLACES:
        exact(store, place, direct(folder, encoder, place))

"""sample.py on many recordings: batches in order, what has no answer named, one line each."""
import dataclasses
import weakref

import torch

import sample
from af_min import answering, audio, text
from af_min.flamingo import AudioFlamingo
from test_sample import NAMES, command, config, model, place          # fixtures, too


def test_a_thousand_recordings_are_answered_in_batches_in_their_order(command, monkeypatch):
    """The same lines whatever a batch holds, no batch above its bound, and no recording is kept once it was heard."""
    sizes, heard, read, load = [], [], sample.read, audio.load

    def counted(model, tokenizer, samples, windows, room):
        sizes.append(len(samples) * (max(len(one.ids) for one in samples) + room))
        assert sum(ref() is not None for ref in heard) <= 2, "waveforms pile up"
        return read(model, tokenizer, samples, windows, room)

    def watched(*args):
        heard.append(weakref.ref(recording := load(*args)))
        return recording
    monkeypatch.setattr(sample, "read", counted)
    monkeypatch.setattr(audio, "load", watched)
    files = [f"{name}.wav" for name in NAMES] * 4
    for flags in ((), ("--shots", "2"), ("--options", "bell,dog")):
        sizes.clear()
        _, together, _ = command("--audio", *files, "--max-new", "5", *flags)
        assert len(sizes) == 1
        with monkeypatch.context() as patch:
            patch.setattr(answering, "BATCH_TOKENS", sizes[0] // 3)
            _, parted, _ = command("--audio", *files, "--max-new", "5", *flags)
        assert parted == together and len(sizes) > 3 and max(sizes[1:]) <= sizes[0] // 3


def test_one_of_several_that_cannot_be_heard_is_named_and_the_others_are_answered(command):
    _, alone, _ = command("--audio", "dog.wav", "bell.wav")
    code, out, err = command("--audio", "dog.wav", "none.wav", "data/card.json", "bell.wav")
    assert (code, out) == (2, alone)
    assert "warning: none.wav: missing" in err and "warning: data/card.json: unreadable" in err
    assert err.splitlines()[-1] == "error: 2 of 4 recordings have no answer, see above: none.wav, data/card.json"
    code, out, err = command("--audio", "none.wav", "none.wav")
    assert (code, out) == (2, "") and "2 of 2 recordings" in err


def test_padding_never_takes_the_room_of_an_answer():
    """Beyond what the model holds rows stand beside rows of their own length alone; below it they are mixed."""
    assert list(answering.grouped([5, 9, 9, 5, 7, 8, 10], int, 8)) == [[5], [9, 9], [5, 7, 8], [10]]


def test_a_recording_whose_examples_are_too_long_is_left_out_and_named(command, monkeypatch):
    def longer(tokenizer, row, **others):
        one = text.write_sample(tokenizer, row, **others)
        return dataclasses.replace(one, ids=one.ids * 40) if row["audio"] == "dog.wav" else one
    _, alone, _ = command("--audio", "bell.wav", "horn.wav", "--shots", 1)
    monkeypatch.setattr(sample, "write_sample", longer)
    code, out, err = command("--audio", "bell.wav", "dog.wav", "horn.wav", "--shots", 1)
    assert (code, out) == (2, alone) and "warning: dog.wav: with its examples the question is" in err and "1 of 3 recordings" in err


def test_every_recording_has_one_line_whatever_the_model_says(command, monkeypatch):
    monkeypatch.setattr(text.Tokenizer, "decode", lambda self, ids: " a\n\nlist\r\n of")
    assert command("--audio", "bell.wav", "dog.wav")[1] == "bell.wav:  a  list  of\ndog.wav:  a  list  of\n"


def test_a_model_that_computes_nan_says_so(command, monkeypatch):
    monkeypatch.setattr(AudioFlamingo, "read", lambda self, ids, *rest: torch.full((len(ids), 400), float("nan")))
    for flags in ([], ["--options", "a,b"], ["--temperature", 1]):
        code, out, err = command("--audio", "bell.wav", *flags)
        assert (code, out) == (2, "") and "error: the model computes NaN" in err and "float32" in err

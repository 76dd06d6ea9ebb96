"""sample.py: what the command prints is what a plain, uncached reading of the same text says; mistakes are one clear line."""
import dataclasses
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import sample
from af_min import checkpoint, data, manifest, text
from af_min.cli import UserError
from af_min.flamingo import AudioFlamingo, Sampling
from af_min.retrieval import hear
from af_min.text import write_sample
from conftest import shake

RATE, GREEDY = 16_000, Sampling()
NAMES = ["bell", "dog", "horn"]


@pytest.fixture(scope="module")
def config(micro_config):
    """With a head of its own: random tied weights would say one token for ever. And with the convolution of `tiny`, a second cache."""
    return dataclasses.replace(micro_config, lm=dataclasses.replace(micro_config.lm, tied_head=False, conv=3))


@pytest.fixture(scope="module")
def model(config, tokenizer):
    """Random weights of which some answers end: <|endofchunk|> has a long vector in the head."""
    torch.manual_seed(0)
    model = shake(AudioFlamingo(config), seed=2, scale=0.25)
    with torch.no_grad():
        model.lm.head.weight[tokenizer.eoc_id] *= 2
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory, model, config, tokenizer):
    """A folder with recordings of different lengths, a data set and a run."""
    place = tmp_path_factory.mktemp("sample")
    rng = np.random.default_rng(0)
    for n, (name, seconds) in enumerate(zip(NAMES, (0.5, 1.9, 3.3))):
        wave = np.sin(2 * np.pi * 250 * 2 ** n * np.arange(round(RATE * seconds)) / RATE)
        soundfile.write(place / f"{name}.wav", 0.4 * wave + 0.1 * rng.standard_normal(len(wave)), RATE)
    (place / "data" / "audio").mkdir(parents=True)
    (place / "folder.png").mkdir()
    rows = []
    for n in range(5):
        soundfile.write(place / f"data/audio/{n}.wav", 0.3 * rng.standard_normal(RATE // 2 * (n + 1)), RATE)
        rows.append({"audio": f"audio/{n}.wav", "task": "AudioCaptioning", "prompt": "describe the sounds.", "answer": f"horn {n}"})
    for split in manifest.SPLITS:
        manifest.write_rows(place / f"data/{split}.jsonl", rows)
    manifest.write_card(place / "data", name="noise")
    checkpoint.save_run(place / "run", model, config, tokenizer, {"args": {"data": [str(place / "data")]}})
    return place


@pytest.fixture
def command(place, monkeypatch, run_command):
    """Runs sample.py in the folder."""
    monkeypatch.chdir(place)

    def run(*argv, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        return run_command(sample.main, "--run", "run", "--device", "cpu", *argv)
    return run


def row_about(place, name, task="AudioCaptioning", prompt="describe the sounds.", shots=()):
    return {"task": task, "audio": str(place / f"{name}.wav"), "prompt": prompt, "answer": "",
            "shots": [{"audio": str(place / f"{shot}.wav"), "prompt": prompt, "answer": f"a {shot}"} for shot in shots]}


def heard_places(model, row):
    return {(part["audio"], 0.0): hear(model, part["audio"]).windows_WD for part in [row, *row.get("shots", [])]}


def uncached(model, tokenizer, ids, audios, embeddings):
    """Logits (T, V) of a whole text, read at once, without caches and padding."""
    batch = data.collate([(text.Sample(ids, ids, audios), embeddings)], tokenizer.pad_id, model.config.clap.out_width)
    with torch.no_grad():
        return model.lm.logits(model.hidden(batch.ids_BT, model.listen(batch.windows_AWD, batch.n_windows_BN)))[0]


def reread(model, tokenizer, ids, audios, embeddings, max_new):
    """Greedy answer by reading the whole text again for every token."""
    said = []
    while len(said) < max_new and said[-1:] != [tokenizer.eoc_id]:
        logits = uncached(model, tokenizer, ids + said, audios, embeddings)[-1]
        logits[list(text.unspeakable(tokenizer))] = float("-inf")
        said.append(int(logits.argmax()))
    return said


# ---------------------------------------------------------------------- one answer

def test_a_batch_answers_as_its_members_do_alone_and_as_rereading_does(model, tokenizer, place):
    """Recordings of 1, 4 and 8 windows, with 0, 2 and 1 shots, prompts of different lengths."""
    rows = [row_about(place, "bell", prompt="no"), row_about(place, "dog", "AQA", "is it high or low?", ("horn", "bell")),
            row_about(place, "horn", shots=("dog",))]
    samples = [write_sample(tokenizer, row, complete=False) for row in rows]
    embeddings = {k: v for row in rows for k, v in heard_places(model, row).items()}
    together = sample.answer(model, tokenizer, *sample.read(model, tokenizer, samples, embeddings, 12), GREEDY, 12)
    for one, answer in zip(samples, together):
        alone = sample.answer(model, tokenizer, *sample.read(model, tokenizer, [one], embeddings, 12), GREEDY, 12)[0]
        assert answer == alone == reread(model, tokenizer, one.ids, one.audios, embeddings, 12)
    assert len({len(answer) for answer in together}) > 1, "some row should end before another"


def test_several_recordings_print_what_each_prints_alone(command):
    _, alone, _ = command("--audio", "dog.wav")
    _, together, _ = command("--audio", *(f"{name}.wav" for name in NAMES))
    lines = together.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"{name}.wav" for name in NAMES]
    assert lines[1] == "dog.wav: " + alone.rstrip("\n")


def test_top_1_is_greedy_and_a_seed_gives_the_same_draw(command):
    _, greedy, _ = command("--audio", "horn.wav")
    assert command("--audio", "horn.wav", "--temperature", "3", "--top-k", "1")[1] == greedy
    draws = [command("--audio", "horn.wav", "--temperature", "3", "--seed", str(seed))[1] for seed in (0, 0, 1, 2)]
    assert draws[0] == draws[1] and len(set(draws)) > 1


def test_no_special_token_but_the_last_is_ever_said(model, tokenizer, place):
    row = row_about(place, "bell")
    one = write_sample(tokenizer, row, complete=False)
    state, logits = sample.read(model, tokenizer, [one] * 4, heard_places(model, row), 100)
    answers = sample.answer(model, tokenizer, state, logits, Sampling(temperature=50.0), 100)
    specials = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.audio_id, tokenizer.sep_id}
    assert not specials & {token for answer in answers for token in answer}
    assert all(tokenizer.eoc_id not in answer[:-1] for answer in answers)


# ---------------------------------------------------------------------- options

def test_an_options_likelihood_is_that_of_the_full_text(model, tokenizer, place):
    rows = [row_about(place, "bell", "AQA", "what comes after the bell?", ("dog",)), row_about(place, "horn")]
    options = ["dog", "bell then dog then horn", "é☃"]
    samples = [write_sample(tokenizer, row, complete=False) for row in rows]
    embeddings = {k: v for row in rows for k, v in heard_places(model, row).items()}
    got = sample.score(model, tokenizer, *sample.read(model, tokenizer, samples, embeddings), options)
    for b, one in enumerate(samples):
        for i, option in enumerate(options):
            ids = tokenizer.encode(option) + [tokenizer.eoc_id]
            logp = uncached(model, tokenizer, one.ids + ids, one.audios, embeddings).double().log_softmax(-1)
            expected = sum(logp[len(one.ids) - 1 + t, token] for t, token in enumerate(ids))
            assert got[b, i].item() == pytest.approx(expected.item(), abs=1e-3)


def test_scoring_forgets_every_option_again(model, tokenizer, place):
    row = row_about(place, "dog")
    state, logits = sample.read(model, tokenizer, [write_sample(tokenizer, row, complete=False)], heard_places(model, row))
    length = state.cache.length
    first = sample.score(model, tokenizer, state, logits, ["dog", "bell then dog"])
    again = sample.score(model, tokenizer, state, logits, ["bell then dog", "dog"])
    torch.testing.assert_close(first, again.flip(1))
    assert state.cache.length == length


def test_options_are_printed_likeliest_first_with_shares_that_add_up(command):
    code, out, _ = command("--audio", "dog.wav", "--options", "bell, Dog ,horn")
    lines = [line.split() for line in out.splitlines()[1:]]
    assert code == 0 and {line[2] for line in lines} == set(NAMES)
    probabilities = [float(line[0]) for line in lines]
    assert probabilities == sorted(probabilities, reverse=True) and 0 < sum(probabilities) < 1
    assert sum(float(line[1].rstrip("%")) for line in lines) == pytest.approx(100, abs=0.2)


def test_a_classification_lists_its_options_as_in_training(model, tokenizer, place):
    for task, listed in (("AudioClassification", True), ("AQA", False)):
        args = sample.Args(audio=[str(place / "dog.wav")], task=task, options="bell,dog", run=str(place / "run"))
        one, _ = sample.Question(args, model, tokenizer).about(hear(model, place / "dog.wav"))
        assert ("\noptions:\n - bell.\n - dog." in tokenizer.decode(one.ids)) == listed


# ---------------------------------------------------------------------- shots

def test_shots_by_hand_stand_before_the_question_in_their_order(model, tokenizer, place):
    args = sample.Args(audio=[str(place / "horn.wav")], task="FewShot", prompt="Classify this sound.", run=str(place / "run"),
                       shot=[[str(place / "dog.wav"), "Zub"], [str(place / "bell.wav"), "kip"]])
    one, embeddings = sample.Question(args, model, tokenizer).about(hear(model, place / "horn.wav"))
    expected = write_sample(tokenizer, {"task": "FewShot", "audio": str(place / "horn.wav"), "prompt": "classify this sound.", "answer": "",
                            "shots": [{"audio": str(place / f"{name}.wav"), "prompt": "classify this sound.", "answer": answer}
                                      for name, answer in (("dog", "zub"), ("bell", "kip"))]}, complete=False)
    assert one == expected and set(expected.audios) == set(embeddings)


@pytest.mark.parametrize("how", ["nearest", "random"])
def test_shots_come_from_the_data_that_the_run_was_trained_on(command, how):
    code, out, err = command("--audio", "dog.wav", "bell.wav", "--shots", "3", "--shots-from", how)
    shown = [line for line in err.splitlines() if line.startswith("shot for dog.wav")]
    assert code == 0 and len(shown) == 3 and all("describe the sounds. horn" in line for line in shown)
    assert len(out.splitlines()) == 2


def test_the_question_mark_chooses_the_prefix_unless_a_task_is_given():
    assert sample.Args().task_name == "AudioCaptioning"
    assert sample.Args(prompt="is there a dog? ").task_name == "AQA"
    assert sample.Args(prompt="is there a dog?", task="After").task_name == "After"


# ---------------------------------------------------------------------- dialogue

@pytest.mark.parametrize("max_new", [2, 40], ids=["cut off", "longer"])
def test_a_dialogue_says_what_rereading_all_of_it_says(model, tokenizer, place, max_new):
    heard = hear(model, place / "dog.wav")
    dialogue, audios, embeddings = sample.Dialogue(model, tokenizer, heard), ((heard.path, 0.0),), {(heard.path, 0.0): heard.windows_WD}
    turns = []
    for question in ("How many sounds?", "is it high or low?", "<audio> and </s>?"):
        before = list(dialogue.ids)
        turns.append({"user": question, "assistant": dialogue.ask(question, GREEDY, max_new)})
        start = len(before) + dialogue.ids[len(before):].index(tokenizer.sep_id) + 1
        assert dialogue.ids[start:] == reread(model, tokenizer, dialogue.ids[:start], audios, embeddings, max_new)
        assert dialogue.state.cache.length == len(dialogue.ids)
    assert dialogue.ids.count(tokenizer.audio_id) == 1
    # The text is the dialogue template: every answer ends with <|endofchunk|></s> before the next question.
    expected = write_sample(tokenizer, {"task": "Dialogue", "audio": heard.path, "turns": turns}, complete=False).ids
    specials = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.audio_id, tokenizer.sep_id, tokenizer.eoc_id}
    got = dialogue.ids[:len(dialogue.ids) - dialogue.ids[::-1].index(tokenizer.sep_id)]
    assert [t for t in got if t in specials] == [t for t in expected if t in specials]
    asked = [part.split(" \nassistant:")[0] for part in tokenizer.decode(got).split("user: ")[1:]]
    assert asked == [turn["user"].lower() for turn in turns]


def test_a_dialogue_hears_the_recording_and_reads_every_token_once(model, tokenizer, place, monkeypatch):
    dialogue = sample.Dialogue(model, tokenizer, hear(model, place / "dog.wav"))
    read, listened = [], []
    hidden, listen = model.hidden, model.listen
    monkeypatch.setattr(model, "hidden", lambda ids_BT, *rest: (read.append(ids_BT.shape[1]), hidden(ids_BT, *rest))[1])
    monkeypatch.setattr(model, "listen", lambda *rest: (listened.append(1), listen(*rest))[1])
    monkeypatch.setattr(model, "encode", None)
    for question in ("what is it?", "is it high or low?"):
        dialogue.ask(question, GREEDY, 6)
    assert sum(read) == len(dialogue.ids) and len(listened) == 1


def test_a_dialogue_that_is_full_says_so_and_is_unchanged(model, tokenizer, place):
    dialogue = sample.Dialogue(model, tokenizer, hear(model, place / "bell.wav"))
    with pytest.raises(UserError, match="512"):
        for _ in range(60):
            before = list(dialogue.ids)
            dialogue.ask("is it high or low and what comes after the bell?", GREEDY, 15)
    assert dialogue.ids == before and len(before) <= 512 and dialogue.state.cache.length == len(before)


def test_a_dialogue_takes_no_more_of_the_cache_than_it_may_need(config, tokenizer, place):
    """A model that holds 100,000 tokens, as Llama 3.1 does: a place for each would be gigabytes."""
    torch.manual_seed(0)
    long = AudioFlamingo(dataclasses.replace(config, lm=dataclasses.replace(config.lm, positions="rope", max_positions=100_000))).eval()
    dialogue = sample.Dialogue(long, tokenizer, hear(long, place / "bell.wav"))
    dialogue.ask("what is it?", GREEDY, 2)
    assert dialogue.state.cache.max_length < 4200


def test_chat_reads_lines_until_exit(command):
    code, out, err = command("--audio", "dog.wav", "--chat", "--max-new", "5", stdin="what is it?\n\nis it low?\nexit\nnever\n")
    assert code == 0 and out.count("assistant: ") == 2 and err.count("tokens at") <= 2
    assert command("--audio", "dog.wav", "--chat", "--max-new", "5", stdin="what is it?\n")[1].count("assistant: ") == 1
    code, out, err = command("--audio", "dog.wav", "--chat", "--max-new", "5", stdin="what is it?\n\udce9\n")
    assert code == 2 and out.count("assistant: ") == 1 and err.endswith("error: the question is not UTF-8 text\n")


# ---------------------------------------------------------------------- printing

@pytest.mark.parametrize("words", ["bell then dog", "é☃\n日本 dog  x", " a"])
def test_streamed_words_are_the_decoded_answer_and_whole_characters(tokenizer, words, capsys):
    printer, shown = sample.Printer(tokenizer), []
    for token in tokenizer.encode(words) + [tokenizer.eoc_id]:
        printer(token)
        shown.append(capsys.readouterr().out)
    assert "\ufffd" not in "".join(shown)
    printer.close()
    assert "".join(shown) + capsys.readouterr().out == tokenizer.decode(tokenizer.encode(words))
    assert sum(map(bool, shown)) > 1 or words == " a"


def test_half_a_character_is_shown_only_when_nothing_follows(tokenizer, capsys):
    printer = sample.Printer(tokenizer)
    for token in tokenizer.encode("☃")[-3:-1]:
        printer(token)
    assert capsys.readouterr().out == ""
    printer.close()
    assert "\ufffd" in capsys.readouterr().out


def test_answers_go_to_standard_output_and_what_was_measured_to_standard_error(command, model):
    code, out, err = command("--audio", "horn.wav")
    assert code == 0 and len(out.splitlines()) >= 1 and "M parameters" not in out
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, cpu" in err.splitlines()[-1]


def test_a_plot_is_drawn(command, place):
    assert command("--audio", "horn.wav", "--shot", "dog.wav", "a dog", "--plot", "out.png")[0] == 0
    assert (place / "out.png").read_bytes()[:4] == b"\x89PNG"


# ---------------------------------------------------------------------- warnings and mistakes

def test_what_is_dropped_silent_or_too_short_is_warned_about(command, place, model):
    limit = model.config.audio.max_seconds
    for name, wave in (("long", np.random.default_rng(0).standard_normal(round((limit + 1.5) * RATE)) * 0.1),
                       ("silent", np.zeros(RATE)), ("short", np.full(RATE // 50, 0.5))):
        soundfile.write(place / f"{name}.wav", wave, RATE)
    code, out, err = command("--audio", "long.wav", "silent.wav", "short.wav")
    assert code == 0 and len(out.splitlines()) >= 3
    assert f"long.wav: the last 1.50 s are dropped: the model hears {limit:g} s" in err
    assert "silent.wav: silent" in err and "short.wav: only 0.020 s" in err
    assert not [line for line in command("--audio", "dog.wav")[2].splitlines() if "warning" in line]


def test_typed_special_tokens_are_text(model, tokenizer, place):
    args = sample.Args(audio=[str(place / "dog.wav")], prompt="<audio><|endofchunk|></s>", run=str(place / "run"))
    one, _ = sample.Question(args, model, tokenizer).about(hear(model, place / "dog.wav"))
    assert one.ids.count(tokenizer.audio_id) == 1 and tokenizer.eoc_id not in one.ids


@pytest.mark.parametrize("argv, told", [
    ([], "--audio is missing"), (["--audio", "none.wav"], "none.wav: missing"), (["--audio", "data/card.json"], "card.json: unreadable"),
    (["--audio", "dog.wav", "--run", "nowhere"], "nowhere: no trained model"), (["--audio", "dog.wav", "--prompt", " "], "--prompt is empty"),
    (["--audio", "dog.wav", "--prompt", "caf\udce9?"], r"--prompt 'caf\udce9?': not UTF-8 text"),
    (["--audio", "dog.wav", "--options", "a,\udce9"], "--options 'a,"), (["--audio", "dog.wav", "--shot", "bell.wav", "\udce9"], "--shot '"),
    (["--audio", "dog.wav", "--shots", "2", "--shots-from", "random", "--seed", "-1"], "--seed -1"),
    (["--audio", "dog.wav", "--temperature", "-1"], "--temperature -1.0"), (["--audio", "dog.wav", "--seed", str(1 << 63)], "--seed 9223"),
    *((["--audio", "dog.wav", "--temperature", wrong], f"--temperature {wrong}") for wrong in ("nan", "inf")),
    (["--audio", "dog.wav", "--top-p", "0"], "--top-p 0.0"),
    (["--audio", "dog.wav", "--max-new", "0"], "--max-new 0"), (["--audio", "dog.wav", "--options", "dog"], "two or more different answers"),
    (["--audio", "dog.wav", "--options", "dog,Dog"], "two or more different answers"),
    (["--audio", "dog.wav", "--options", f"dog,{'horn then dog ' * 300}"], "does not fit"),
    (["--audio", "dog.wav", "--prompt", "bell " * 600], "tokens long"),
    (["--audio", "dog.wav", "bell.wav", "--chat"], "--chat and --plot take one recording"),
    (["--audio", "dog.wav", "--chat", "--task", "AQA"], "--chat and --task"),
    (["--audio", "dog.wav", "--chat", "--options", "a,b"], "--chat and --options"), (["--audio", "x", "--chat", "--prompt", "y"], "--chat and --pr"),
    (["--audio", "dog.wav", "--shots", "2", "--shot", "bell.wav", "x"], "use one of the two"),
    (["--audio", "dog.wav", "--shot", "none.wav", "x"], "none.wav: missing"), (["--audio", "dog.wav", "--shots", "9"], "9 audios at most"),
    (["--audio", "dog.wav", "--shots", "6"], "--shots 6: there are only 5 other recordings of the task AudioCaptioning"), (["--audio", "dog.wav", "--shots", "1", "--task", "Nope"], "Nope"),
    (["--audio", "dog.wav", "--shots", "1", "--data", "nowhere"], "nowhere: no prepared data set"),
    *((["--audio", "dog.wav", "--plot", path], f"--plot {path}: expected") for path in ("out.txt", "nowhere/out.png", "folder.png")),
])
def test_a_mistake_is_one_line_and_exit_code_2(command, argv, told):
    code, out, err = command(*argv)
    lines = [line for line in err.splitlines() if line and not line.startswith(("shot for", "encoding"))]
    assert code == 2 and out == "" and len(lines) == 1 and lines[0].startswith("error: ") and told in lines[0]


def test_a_run_folder_alone_answers_from_the_command_line(place, tmp_path):
    """A process of its own, elsewhere, without the data set; names of any bytes come out as they went in; an unknown flag is an error."""
    script, name = Path(sample.__file__), os.fsencode(place / "caf") + b"\xe9.wav"
    shutil.copy(place / "dog.wav", name)
    done = subprocess.run([sys.executable, script, "--run", place / "run", "--audio", place / "dog.wav", name], cwd=tmp_path,
                          env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"}, capture_output=True)
    assert done.returncode == 0 and b"\n" + name + b": " in done.stdout and b"Traceback" not in done.stderr
    done = subprocess.run([sys.executable, script, "--audios", "x.wav"], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 2 and "--audios" in done.stderr and "Traceback" not in done.stderr

"""scenes.py, synth.py: recordings hold what their rows say; nothing of the test is known from training; no shortcuts."""
import hashlib
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
import soundfile

from af_min import data, manifest, scenes, synth
from af_min.questions import NUMBERS, WINDOW, Event
from af_min.scenes import Sizes, compose
from af_min.synth import CLASSES, RATE, TRAIN_CLASSES, UNSEEN_CLASSES, Patch, render

HELD_OUT_WORDS = re.compile(r"\b(" + "|".join(UNSEEN_CLASSES) + r")\b")


def by_task(rows):
    groups = defaultdict(list)
    for row in rows:
        groups[row["task"]].append(row)
    return groups


def parts(row):
    """The recordings of a row; text for the language model alone has none."""
    return [part for part in (row, *row.get("shots", []), *row.get("pool", [])) if "audio" in part]


def told(row):
    """The events of a scene, (length, pitch, name), out of its description."""
    return [tuple(event.split()) for event in row["description"].split(" then ")]


# ---------------------------------------------------------------------- the same, always

TINY_SIZES = Sizes(train=5, val=5, test=15, textures=3, clips=5, kinds=1, kind_clips=1, episodes=0, examples=0, told=2, glossaries=2,
                   val_items=2, test_items=3)


def test_the_seed_decides_everything(tmp_path, scenes_data):
    def written(name, seed):
        rows = scenes.build(tmp_path / name, seed, TINY_SIZES)
        for split in rows:
            manifest.write_rows(tmp_path / name / f"{split}.jsonl", rows[split])
        return manifest.dataset_hash(tmp_path / name), rows
    (first, rows), (again, same_rows), (other, other_rows) = written("a", 0), written("b", 0), written("c", 1)
    assert first == again and rows == same_rows
    assert first != other and rows["train"] != other_rows["train"]
    # Every recording has its own random generator: a larger set holds the smaller one's recordings.
    for name in ("train-00003.wav", "test-00011.wav", "texture-00002.wav", "train-bell-001.wav", "test-owl-000.wav"):
        assert (tmp_path / "a" / "audio" / name).read_bytes() == (scenes_data / "audio" / name).read_bytes()


# ---------------------------------------------------------------------- recordings hold what is said of them

def energy(wave, start, end):
    part = wave[round(start * RATE):round(end * RATE)].astype(np.float64)
    return float((part ** 2).mean())


@pytest.mark.parametrize("seed", range(12))
def test_events_are_heard_in_their_spans_and_only_there(seed):
    """Each event is louder than the noise of the gaps; a span and the gap after it are told apart by energy alone."""
    rng = np.random.default_rng(seed)
    names = [str(n) for n in rng.choice(list(CLASSES), 1 + seed % 5)]
    wave, events = compose([(n, CLASSES[n]) for n in names], rng)
    assert [e.name for e in events] == names
    edges = [(a.end, b.start) for a, b in zip(events, events[1:])] + [(0.0, events[0].start), (events[-1].end, len(wave) / RATE)]
    noise = max(energy(wave, a, b) for a, b in edges if b - a > 0.02)
    for event in events:
        assert energy(wave, event.start, event.end) > 3 * noise, event
        low, high = scenes.LENGTH[event.length]
        assert low <= event.end - event.start <= high
    assert all(b.start - a.end >= 0.0999 for a, b in zip(events, events[1:])), "events must not overlap"
    assert np.abs(wave).max() == 1 and wave.dtype == np.float32 and len(wave) / RATE <= scenes.MAX_SECONDS + 0.4


@pytest.mark.parametrize("pitch, factor", [("low", 0.67), ("high", 1.5)])
def test_high_and_low_are_where_the_patch_puts_them(pitch, factor):
    for base in (300, 900, 1900):
        sound = render(Patch("tone", "steady", "held", base), 0.5, scenes.PITCH[pitch], np.random.default_rng(1))
        hertz = np.abs(np.fft.rfft(sound)).argmax() * RATE / len(sound)
        assert abs(hertz / (base * factor) - 1) < 0.06


def test_every_class_renders_a_sound_without_clicks_or_overflow():
    for name, patch in CLASSES.items():
        for seed in range(3):
            sound = render(patch, 0.4, 1.0, np.random.default_rng(seed))
            assert len(sound) == 6_400 and np.isfinite(sound).all() and np.abs(sound).max() == pytest.approx(1, abs=1e-6), name
            assert abs(sound[0]) < 0.05 and abs(sound[-1]) < 0.05


def test_classes_differ():
    assert len({(p.source, p.contour, p.envelope, p.base) for p in CLASSES.values()}) == len(CLASSES)
    assert not set(TRAIN_CLASSES) & set(UNSEEN_CLASSES) and len(UNSEEN_CLASSES) >= 4 and len(TRAIN_CLASSES) >= 12


def test_captions_name_the_events_that_are_audible(scenes_data, scenes_rows):
    """The number of events counted in the waveform, by energy alone, is the number that the caption names (1 to 5: chance is a fifth)."""
    right = total = 0
    for row in by_task(scenes_rows["test"])["AudioCaptioning"]:
        assert [name for _, _, name in told(row)] == row["answer"].split(" then ")
        wave, _ = soundfile.read(scenes_data / row["audio"])
        level = np.sqrt(np.convolve(wave ** 2, np.ones(1600) / 1600, "same"))       # 0.1 s: fills the gaps within pulsed sounds
        loud = level > 2.2 * np.quantile(level, 0.03)
        right += np.count_nonzero(np.diff(loud.astype(int)) == 1) + loud[0] == len(told(row))
        total += 1
    assert total >= 20 and right / total > 0.6


def test_every_recording_exists_and_has_the_length_that_its_rows_say(scenes_data, scenes_rows):
    seconds = {}
    for rows in scenes_rows.values():
        for row in rows:
            for part in parts(row):
                if row["task"] != "WindowText":
                    seconds[part["audio"]] = part["seconds"]
    assert len(seconds) > 200
    for name, expected in seconds.items():
        info = soundfile.info(scenes_data / name)
        assert (info.samplerate, info.channels) == (RATE, 1) and abs(info.duration - expected) < 1e-3 and info.duration <= 5.4 + 0.15


# ---------------------------------------------------------------------- answers follow from the description

def check_answer(task, prompt, answer, events):
    names = [name for _, _, name in events]
    asked = next((n for n in CLASSES if re.search(rf"\b{n}\b", prompt)), None)
    at = names.index(asked) if asked in names else None
    expected = {
        "AudioCaptioning": lambda: " then ".join(names), "Presence": lambda: "yes" if asked in names else "no",
        "Count": lambda: NUMBERS[len(names)], "CountOf": lambda: NUMBERS[names.count(asked)], "After": lambda: names[at + 1],
        "Before": lambda: names[at - 1], "Pitch": lambda: events[at][1], "Length": lambda: events[at][0]}[task]()
    assert answer == expected, (prompt, events)
    if task in ("After", "Before", "Pitch", "Length"):
        assert names.count(asked) == 1, "the sound that is asked about must be one"


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_answers_are_right(scenes_rows, split):
    checked = Counter()
    for row in scenes_rows[split]:
        if row["task"] in scenes.QUESTIONS:
            check_answer(row["task"], row["prompt"], row["answer"], told(row))
            checked[row["task"]] += 1
    assert set(checked) == set(scenes.QUESTIONS)


def test_examples_are_asked_the_same_as_their_question(scenes_rows):
    """Rows with examples before them are scenes' own questions: the shots' answers are right, no recording stands twice."""
    rows = [r for r in scenes_rows["train"] if "shots" in r and r["task"] in scenes.QUESTIONS]
    for row in rows:
        for part in parts(row):
            assert part["prompt"] == row["prompt"]
            check_answer(row["task"], part["prompt"], part["answer"], told(part))
        assert len({p["audio"] for p in parts(row)}) == 1 + len(row["shots"])
    assert len(rows) == 40 and {len(r["shots"]) for r in rows} == {1, 2, 3, 4}


@pytest.mark.parametrize("kind", ["Interview", "RollCall"])
def test_interviews_are_right_and_training_only(scenes_rows, kind):
    kinds = {"is there": "Presence", "how many sounds": "Count", "how many times": "CountOf", "what comes after": "After",
             "what comes before": "Before", "high or low?": "Pitch", "short or long?": "Length"}
    interviews = by_task(scenes_rows["train"])[kind]
    for row in interviews:
        for turn in row["turns"]:
            task = next(task for words, task in kinds.items() if words in turn["user"])
            check_answer(task, turn["user"], turn["assistant"], told(row))
    assert len(interviews) >= 20 and not any(by_task(scenes_rows[split])[kind] for split in ("val", "test"))


def test_a_glossary_is_answered_by_its_own_description(scenes_rows):
    rows = by_task(scenes_rows["train"])["Glossary"]
    for row in rows:
        for turn in row["turns"]:
            assert f"{turn['user'].removesuffix('?')} {turn['assistant']}" in row["description"].split(" then ")
    assert len(rows) == 20 and all(len({t["assistant"] for t in row["turns"]}) > 1 for row in rows)


def test_text_without_a_recording_is_for_the_language_model_alone(scenes_data, scenes_rows):
    assert {row["task"] for row in scenes_rows["train"] if "audio" not in row} == {"Interview", "Glossary"}
    assert sum("audio" not in row for row in data.rows_of(scenes_data, "train", "lm")) == 50
    assert all("audio" in row for stage in ("clap", "pretrain", "sft") for row in data.rows_of(scenes_data, "train", stage))
    assert all("audio" in row for split in ("val", "test") for row in scenes_rows[split])


@pytest.mark.parametrize("split", ["train", "test"])
def test_dialogues_are_right_whatever_it_means(scenes_rows, split):
    """A reader who follows "it" through the turns comes to the same answers."""
    dialogues = by_task(scenes_rows[split])["Dialogue"]
    for row in dialogues:
        events = told(row)
        names, at = [name for _, _, name in events], None
        assert 2 <= len(row["turns"]) <= 4
        for turn in row["turns"]:
            question, answer = turn["user"], turn["assistant"]
            if question in ("what is the first sound?", "which comes first?"):
                at = 0
            elif question == "what is the last sound?":
                at = len(names) - 1
            elif "after it" in question or "before it" in question:
                at += 1 if "after" in question else -1
                assert names.count(names[at - 1 if "after" in question else at + 1]) == 1
            expected = {"how many sounds are there?": lambda: NUMBERS[len(names)], "is it high or low?": lambda: events[at][1],
                        "is it short or long?": lambda: events[at][0],
                        "how many times does it occur?": lambda: NUMBERS[names.count(names[at])]}.get(question, lambda: names[at])()
            assert answer == expected, (row["turns"], events)
    assert len(dialogues) >= 20 and len({len(r["turns"]) for r in dialogues}) > 1


def test_few_shot_words_mean_what_the_shots_say(scenes_rows):
    """A word and a sound class belong together within an episode; only a word that was said before is supervised."""
    clip_class = re.compile(r"audio/(?:train|test)-(\w+?)-\d+\.wav")
    for row in by_task(scenes_rows["train"])["FewShot"] + by_task(scenes_rows["test"])["FewShotSeen"] + by_task(scenes_rows["test"])["FewShotUnseen"]:
        meaning, sequence = {}, [*row["shots"], row]
        for part in sequence:
            name = clip_class.match(part["audio"])[1]
            assert part.get("loss", True) == (part["answer"] in meaning), "a word that no shot has introduced cannot be inferred"
            assert meaning.setdefault(part["answer"], name) == name
        assert len(set(meaning.values())) == len(meaning) and row["answer"] in [s["answer"] for s in row["shots"]]
        assert len({p["audio"] for p in sequence}) == len(sequence), "the question's recording is among the shots"
        assert len(sequence) <= 9


def test_pools_hold_one_recording_of_the_right_class_among_distractors(scenes_rows):
    rows = by_task(scenes_rows["test"])["Pool"]
    for row in rows:
        assert "shots" not in row and len(row["pool"]) == 12 and [p["answer"] for p in row["pool"]].count(row["answer"]) == 1
        right = next(p for p in row["pool"] if p["answer"] == row["answer"])
        assert right["audio"] != row["audio"] and right["audio"].rsplit("-", 1)[0] == row["audio"].rsplit("-", 1)[0]
    assert len(rows) == 30


# ---------------------------------------------------------------------- what training must not know

def test_made_up_words_of_the_test_occur_nowhere_in_training(scenes_rows):
    def words(rows, tasks):
        return {p["answer"] for row in rows if row["task"] in tasks for p in parts(row)}
    test = words(scenes_rows["test"], {"FewShotSeen", "FewShotUnseen", "Pool"})
    train = words(scenes_rows["train"], {"FewShot"})
    assert len(test) > 50 and len(train) > 50 and not test & train
    assert not test & {word for split in ("train", "val") for row in scenes_rows[split] for word in re.findall(r"\w+", str(row))}


def test_a_made_up_word_has_no_meaning_yet(scenes_rows):
    """"five", "zero", "tone" and "before" are made of the same syllables."""
    rng, told = np.random.default_rng(0), {"prompt", "description", "user", "assistant", "answer"}
    made = {scenes.made_up_word(split, rng) for split in ("train", "test") for _ in range(10_000)}
    said = {word for row in scenes_rows["train"] + scenes_rows["test"] if not row["task"].startswith(("FewShot", "Pool", "Glossary"))
            for part in [row, *row.get("turns", [])] for key in told & set(part) for word in re.findall(r"\w+", part[key])}
    assert len(made) > 3000 and len(said) > 80 and not made & said


def test_a_made_up_word_belongs_to_one_split():
    rng = np.random.default_rng(0)
    train, val, test = ({scenes.made_up_word(split, rng) for _ in range(400)} for split in ("train", "val", "test"))
    assert not (train & test or train & val or val & test) and min(len(train), len(val), len(test)) > 150
    assert all((hashlib.sha256(w.encode()).digest()[0] < 51) == (w in test) for w in train | test)


def test_unseen_classes_are_neither_heard_nor_named_before_the_test(scenes_rows):
    for split in ("train", "val"):
        for row in scenes_rows[split]:
            assert not HELD_OUT_WORDS.search(str(row)), row
    rows = by_task(scenes_rows["test"])
    assert all(re.search("test-(" + "|".join(UNSEEN_CLASSES) + ")-", p["audio"]) for row in rows["FewShotUnseen"] for p in parts(row))
    assert not any(HELD_OUT_WORDS.search(p["audio"]) for row in rows["FewShotSeen"] for p in parts(row))


def test_nameless_sounds_of_training_are_never_an_unseen_class():
    """A texture may share two of source, contour and envelope with an unseen class, never all three."""
    taken = {(p.source, p.contour, p.envelope) for p in UNSEEN_CLASSES.values()}
    rng = np.random.default_rng(0)
    drawn = [synth.random_patch(rng) for _ in range(2000)]
    assert not taken & {(p.source, p.contour, p.envelope) for p in drawn}
    assert len({(p.source, p.contour, p.envelope) for p in drawn}) == 5 * 6 * 5 - len(taken)


def test_no_recording_is_in_two_splits(scenes_rows):
    heard = {split: {p["audio"] for row in rows for p in parts(row)} for split, rows in scenes_rows.items()}
    assert not heard["train"] & heard["test"] and not heard["train"] & heard["val"] and not heard["val"] & heard["test"]


# ---------------------------------------------------------------------- no shortcuts

@pytest.mark.parametrize("task, count", [("Presence", 2), ("Count", 5), ("CountOf", 4), ("Pitch", 2), ("Length", 2)])
def test_test_answers_are_balanced(scenes_rows, task, count):
    got = Counter(row["answer"] for row in by_task(scenes_rows["test"])[task])
    assert len(got) == count and len(set(got.values())) == 1, got


def test_what_comes_after_is_never_the_first_or_the_last_sound(scenes_rows):
    rows = by_task(scenes_rows["test"])["After"]
    for row in rows:
        names = [name for _, _, name in told(row)]
        assert row["answer"] not in (names[0], names[-1])
    assert len(rows) == 30


def test_every_task_has_the_items_asked_for(scenes_rows):
    rows = by_task(scenes_rows["test"])
    assert {task: len(rows[task]) for task in ("After", "FewShotSeen", "FewShotUnseen", "Pool")} == dict.fromkeys(
        ("After", "FewShotSeen", "FewShotUnseen", "Pool"), 30)
    assert all(15 <= len(group) <= 32 for group in rows.values()), {task: len(group) for task, group in rows.items()}


def test_the_question_is_at_any_place_of_the_shots(scenes_rows):
    """In a few-shot test neither the first nor the last shot is the answer more often than chance lets it."""
    for task in ("FewShotSeen", "FewShotUnseen"):
        place = Counter([s["answer"] for s in row["shots"]].index(row["answer"]) for row in by_task(scenes_rows["test"])[task])
        assert all(len(row["shots"]) == 4 for row in by_task(scenes_rows["test"])[task])
        assert set(place) == {0, 1, 2, 3} and max(place.values()) <= 16           # of 30; p < 0.001


# ---------------------------------------------------------------------- captions of windows

def event(start, end, length="long"):
    return Event("bell", "shrill fading steady chime", "high", length, start, end)


@pytest.mark.parametrize("span, expected", [((0.1, 0.6), "long"), ((0.1, 1.0), "start of"), ((-0.5, 0.4), "end of"), ((-0.5, 1.3), "middle of"),
                                            ((0.59, 1.1), "silence"), ((-0.5, 0.05), "silence")])
def test_window_captions_say_whether_the_window_cuts_an_event(span, expected):
    texts = {scenes.window_text([event(1 + span[0], 1 + span[1])], 1.0, np.random.default_rng(seed)) for seed in range(20)}
    assert texts == ({"silence"} if expected == "silence" else {f"{expected} high bell", f"{expected} shrill fading steady chime"})


def test_window_captions_lie_inside_their_recording(scenes_rows):
    rows = by_task(scenes_rows["train"])["WindowText"]
    assert len(rows) == 60 * 2 + 10 * 4 and all(row["start"] >= 0 and row["seconds"] == WINDOW for row in rows)


def test_the_card_counts_what_was_written(scenes_data, scenes_rows):
    card = manifest.read_card(scenes_data)
    assert {split: card["splits"][split]["rows"] for split in manifest.SPLITS} == {s: len(r) for s, r in scenes_rows.items()}
    assert card["hours"] > 0 and card["licence"] == "MIT" and card["seed"] == 0 and set(card["classes"]) == set(CLASSES)

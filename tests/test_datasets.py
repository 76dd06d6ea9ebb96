"""Every public data set: its published layout, served by a web server on this machine, goes through the real download code, is
prepared, checked, and trained on. Everything usable is used in its split; everything else is named."""
import dataclasses
import hashlib
import json
import shutil

import numpy as np
import pytest
import soundfile

import prepare_data
import published
import real_sounds
from af_min import audio, audio_files, data, datasets, download, evaluate, manifest, retrieval
from af_min.cli import UserError
from conftest import rows_of
from local_server import serve, split_zip
from test_download import make_7z, make_tar, make_zip
from training import TRAIN, run_main

RATE = 16_000
EVENTS, OPTIONS = "classify this sound.\noptions:\n - ", ".\n - "
CAPTION = "describe the sound in a sentence."
# Rows of train, val and test; one row of them (its split, task, prompt, answer or answers); what is not used, and why.
EXPECTED = {
    "clotho": ((2, 1, 2), ("train", "AudioCaptioning", CAPTION, [f"Rain, heard {i} times" for i in range(5)]),
               {"its sound or group is in another split": ["development/again.wav"], "recording that is not there": ["development/gone.wav"],
                "row with an empty field": ["clotho_captions_validation.csv:3"]}),
    "clotho_aqa": ((1, 1, 1), ("train", "AQA", "please answer this question: Are there waves?\noptions:\nyes.\nno.",
                               ["yes", "yes", "no", "yes", "yes", "yes"]), {}),
    "esc50": ((6, 2, 2), ("test", "EventClassification", f"{EVENTS}crackling fire{OPTIONS}dog.", "dog"), {}),
    "nsynth": ((5, 2, 2), ("train", "QualityClassification", "what are the qualities of the music?", "dark, long_release"), {}),
    "urbansound8k": ((1, 2, 2), ("test", "EventClassification", f"{EVENTS}dog bark{OPTIONS}siren.", "siren"),
                     {"truncated": ["UrbanSound8K/audio/fold1/11-1-0-0.wav"]}),
    "fsd50k": ((1, 1, 2), ("train", "EventClassification", "describe this sound in the order from specific to general.",
                           "Electric guitar, Guitar, Music"),
               {"row with a split that is not train, val or test": ["FSD50K.dev_audio/12.wav (later)"]}),
    "ravdess": (20, (None, "EmotionClassification", "what is the emotion of this speech?\noptions:\n - angry.\n - calm.\n - disgusted.\n"
                     " - fearful.\n - happy.\n - neutral.\n - sad.\n - surprised.", "disgusted"), {}),
    "crema_d": (20, (None, "EmotionClassification", "what is the emotion of this speech?\noptions:\n - angry.\n - disgusted.\n"
                     " - fearful.\n - happy.\n - neutral.\n - sad.", "angry"), {}),
    "medley_solos": ((2, 1, 1), ("val", "InstrumentClassification", "what is the instrument of this music?\noptions:\n - clarinet.\n"
                                 " - flute.\n - tenor saxophone.", "flute"), {}),
    "macs": ((8, 0, 0), ("train", "AudioCaptioning", CAPTION, ["birds sing and a car 10 passes", "it's a park 10"]), {}),
    "cochlscene": ((2, 2, 2), ("val", "SceneClassification", "classify this sound.\noptions:\n - bus.\n - cafe.\n - car.\n"
                               " - crowdedindoor.\n - elevator.\n - kitchen.\n - park.\n - residentialarea.\n - restaurant.\n"
                               " - restroom.\n - street.\n - subway.\n - subwaystation.", "subwaystation"), {}),
    "nonspeech7k": ((18, 2, 1), ("test", "EventClassification", "classify this sound.\noptions:\n - breath.\n - cough.\n - crying.\n"
                                 " - laugh.\n - screaming.\n - sneeze.\n - yawn.", "laugh"),
                    {"cut of a recording that is in the test split": ["x.wav"],
                     "row with an empty field": ["metadata of train set .csv:23"]}),
    "gtzan": (20, (None, "GenreClassification", "what is the genre of this music?\noptions:\n - blues.\n - classical.\n - country.\n"
                   " - disco.\n - hiphop.\n - jazz.\n - metal.\n - pop.\n - reggae.\n - rock.", "rock"),
              {"unreadable": ["genres/jazz/jazz.00054.au"]}),
    "tut2017": ((0, 0, 4), ("test", "SceneClassification", f"{EVENTS}bus{OPTIONS}cafe/restaurant{OPTIONS}forest path.", "forest path"), {}),
    "audiocaps": ((1, 1, 1), ("val", "AudioCaptioning", CAPTION, ["Wind", "It blows"]), {"recording that is not there": ["gone_0"]}),
    "musiccaps": ((1, 0, 1), ("train", "MusicCaptioning", "describe the music in a paragraph.", "A song.\nIt is slow."), {}),
    "wavcaps": ((4, 0, 0), ("train", "AudioCaptioning", CAPTION, "A gong."),
                {"recording that is not there": ["FreeSound/3"], "row that is malformed": ["/FreeSound/4: answer: expected text, got ''"],
                 "in an evaluation split of audiocaps": ["Yb.wav"], "in an evaluation split of clotho": ["2"]}),
    "music_avqa": ((1, 0, 1), ("train", "AQA", "please answer this question: Is the flute louder than the piano?\noptions:\nyes.\nno.",
                               "yes"), {}),
    "dialogues": ((1, 0, 2), None, {"row that is malformed": [f"chat.json item {n}: {reason}" for n, reason in (
        (2, "turns: expected a list of"), (3, "audio: expected a path inside the data set (or none"), (4, "turns: expected"),
        (6, "audio: expected a path inside the data set"))], "row with a split that is not train, val or test": ["chat.json item 5 (7)"]}),
}


def publish(site, content: dict) -> None:
    """Write what a set's authors publish: archives of any kind, cut into parts where `name/number` says so."""
    site.mkdir(parents=True, exist_ok=True)
    for name, what in content.items():
        name, _, extra = name.partition("/")
        if isinstance(what, bytes):
            (site / name).write_bytes(what)
        else:
            (make_7z if name.endswith("7z") else make_zip if name.endswith("zip") else make_tar)(site / name, what)
        if extra:
            whole = (site / name).read_bytes()
            directory = int.from_bytes(whole[-6:-2], "little") + 4
            assert len(split_zip(site / name, directory // int(extra))) == int(extra) + 1


def lay_out(name: str, folder, patch) -> str:
    """Publish a set in folder/site, put the user's files into folder/mine; the table gets the checksums of this copy."""
    content, brought = getattr(published, name)()
    publish(folder / "site", content)
    for path, what in brought.items():
        (folder / "mine" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "mine" / path).write_bytes(what)
    entry = datasets.TABLE[name]
    files = tuple(dataclasses.replace(file, checksum=file.checksum and hashlib.new(
        "md5" if len(file.checksum) == 32 else "sha256", (folder / "site" / file.name).read_bytes()).hexdigest()) for file in entry.files)
    patch.setitem(datasets.TABLE, name, dataclasses.replace(entry, files=files, gigabytes=0.0))
    patch.setattr(download, "PAUSE", 0.0)
    return str(folder / "mine") if brought else ""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """{name: (folder of the data set, report)} of all sets, downloaded once through a line that breaks."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in datasets.TABLE:
            folder = tmp_path_factory.mktemp(name)
            source = lay_out(name, folder, patch)
            with serve(folder / "site") as (address, state):
                state.cut = [100, 200]
                found[name] = folder / "data" / name, datasets.prepare(name, folder / "data" / name, source, address, sample_rate=RATE)
    return found


def test_a_dialogue_is_about_the_recording_that_it_names_and_no_similar_one(tmp_path):
    """Beside its table first, then below the folder, then the only path that ends so; else it is not there, or told to be unclear."""
    talk = [{"user": "what is it?", "assistant": "a bell."}]
    for n, (folder, files, names) in enumerate([("anna", ["000", "d10"], ["000.wav", "d1-0.wav"]), ("bert", ["000"], ["000.wav"]),
                                                (".", ["only/here"], ["carl/000.wav", "000", "bert/000", "here.wav"])]):
        for m, file in enumerate(files):
            (tmp_path / "in" / folder / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "in" / folder / f"{file}.wav").write_bytes(published.wav(10 * n + m))
        (tmp_path / "in" / folder / f"{n}.json").write_text(json.dumps([{"audio": name, "turns": talk} for name in names]))
    report = datasets.prepare("dialogues", tmp_path / "out", str(tmp_path / "in"), sample_rate=RATE)
    assert sorted(row["file"] for row in rows_of(tmp_path / "out")) == ["anna/000.wav", "bert/000.wav", "only/here.wav"]
    assert report.problems["recording that is not there"] == ["carl/000.wav", "d1-0.wav"]
    assert report.problems["name that several recordings have"] == ["2.json item 1 (000)"]


def test_recordings_without_a_json_of_dialogues_are_told_what_is_missing(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.wav").write_bytes(published.wav(0))
    with pytest.raises(UserError, match="no usable recording .table that is not there: 1, e.g. a .json of dialogues"):
        datasets.prepare("dialogues", tmp_path / "out", str(tmp_path / "in"), sample_rate=RATE)


@pytest.mark.parametrize("name", datasets.TABLE)
def test_the_published_layout_becomes_rows(prepared, name, tokenizer):
    out, report = prepared[name]
    counts, example, problems = EXPECTED[name]
    rows = rows_of(out)
    if isinstance(counts, int):                                        # sampled splits
        assert len(rows) == counts and {row["split"] for row in rows} == set(manifest.SPLITS)
    else:
        assert tuple(report.card["splits"][split]["rows"] for split in manifest.SPLITS) == counts
    if example:
        split, task, prompt, answer = example
        form = "answer" if isinstance(answer, str) else "answers"
        assert any((split in (None, row["split"]), row["task"], row["prompt"], row.get(form)) == (True, task, prompt, answer) for row in rows)
    assert {reason: len(names) for reason, names in report.problems.items()} == {reason: len(names) for reason, names in problems.items()}
    for reason, names in problems.items():
        assert all(got.split("unpacked/")[-1].endswith(want) or want in got for got, want in zip(report.problems[reason], names)), report.problems
    assert report.card["licence"] == datasets.TABLE[name].licence and report.card == manifest.read_card(out)
    assert manifest.check(out) == []
    assert len(data.tokenized(rows, tokenizer, 512)[0]) == sum(len(row.get("answers", [0])) for row in rows)
    assert not (out.parent / "downloads" / name / "unpacked").exists() and not list(out.parent.rglob("*.part"))


def test_speakers_stand_in_one_split(prepared):
    for name in ("ravdess", "crema_d"):
        where = {}
        for row in rows_of(prepared[name][0]):
            actor = row["file"][-6:-4] if name == "ravdess" else row["file"].rsplit("/")[-1][:4]
            assert where.setdefault(actor, row["split"]) == row["split"]
        assert len(where) == 10 and set(where.values()) == set(manifest.SPLITS)


def test_the_right_file_of_several_with_its_name(prepared, tmp_path):
    """nonspeech7k has x.wav in both archives, fsd50k 10.wav in both folders, clotho b.wav in two, wavcaps 1.flac."""
    for name, file, split, seed, rate in (("nonspeech7k", "/x.wav", "test", 51, 32_000), ("fsd50k", "/10.wav", "test", 100, RATE),
                                          ("fsd50k", "/10.wav", "train", 10, RATE), ("clotho", "/b.wav", "test", 3, RATE),
                                          ("clotho", "/b.wav", "train", 1, RATE), ("wavcaps", "SoundBible/1.flac", "train", 5, 32_000)):
        row, = (row for row in rows_of(prepared[name][0]) if row["file"].endswith(file) and row["split"] == split)
        (tmp_path / "x.wav").write_bytes(published.wav(seed, rate))
        want, got = (audio.load(path, RATE).samples for path in (tmp_path / "x.wav", prepared[name][0] / row["audio"]))
        assert np.abs(want - got).max() < 1e-3, (name, file, split)


def test_all_of_them_train_together(prepared, trained, tmp_path):
    """A few steps of train.py on every data set that has training rows."""
    folders = [out for out, report in prepared.values() if report.card["splits"]["train"]["rows"]]
    assert len(folders) == 18, "all but tut2017, which is a test split"
    before, seen = [path.read_bytes() for path in trained[0].glob("model.safetensors")], set()

    def watch(patch):
        real = data.Mixture.collate
        patch.setattr(data.Mixture, "collate", lambda self, places, *rest: seen.update(d for d, _ in places) or real(self, places, *rest))
    run_main(TRAIN, tmp_path, ["--preset", "micro", "--no-evaluate", "--stage", "sft", "--init", trained[0], "--name", "real", "--steps", 24,
                               "--data", *folders], before=watch)
    assert seen == set(range(18)), "every data set has its share of these steps"
    log = [json.loads(line) for line in (tmp_path / "runs" / "real" / "log.jsonl").read_text().splitlines()]
    assert len(log) >= 3 and all(np.isfinite(line["loss"]) for line in log if "loss" in line)
    assert before != [path.read_bytes() for path in (tmp_path / "runs" / "real").glob("model.safetensors")]


@pytest.mark.parametrize("name, flags, expected", [
    ("fsd50k", ["--options", "EventClassification"], {"F1", "F1-approx", "exact", "mAP"}),
    ("tut2017", [], {"exact"}), ("macs", ["--split", "val"], None), ("clotho_aqa", ["--shots", 0, 1], {"exact"})])
def test_prepared_sets_are_scored(prepared, trained, tmp_path, capsys, name, flags, expected):
    """Several labels a clip get F1 and mAP; a set without training rows is scored; one without the split says so."""
    try:
        run_main(evaluate, tmp_path, ["--run", trained[0], "--dataset", prepared[name][0], "--max-new", 4, *flags])
    except SystemExit:
        assert expected is None and f"{name}: its val split is empty" in capsys.readouterr().err
        return
    assert {r["measure"] for r in json.loads((trained[0] / f"scores-{name}.json").read_text())} == expected


def test_cuts_of_one_recording_know_it(prepared):
    groups = {name: {row.get("group") for row in rows_of(prepared[name][0])} for name in prepared}
    assert groups["esc50"] == {str(100 + fold) for fold in range(1, 6)} and "777" in groups["nonspeech7k"] and "Bus_user0_1" in groups["cochlscene"]
    assert groups["audiocaps"] == {"-abc_D", "val", "test"} and "actor 1" + "000" in groups["crema_d"] and groups["clotho"] == {None}
    assert "training song 1" in groups["medley_solos"]


def test_pointers_of_git_lfs_are_named(home):
    """What a clone of CREMA-D without git-lfs holds."""
    (home / "clone/AudioWAV").mkdir(parents=True)
    (home / "clone/AudioWAV/1001_DFA_ANG_XX.wav").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(audio_files.AudioError, match="1001_DFA_ANG_XX.wav: unreadable: a Git LFS pointer"):
        audio_files.inspect("clone/AudioWAV/1001_DFA_ANG_XX.wav")


# ---------------------------------------------------------------------- source, limit, command line

@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(capsys, *flags) -> tuple[int, str, str]:
    """python prepare_data.py FLAGS -> exit code, stdout, stderr."""
    code = 0
    try:
        run_main(prepare_data, ".", flags)
    except SystemExit as stop:
        code = stop.code
    return (code, *capsys.readouterr())


def test_archives_at_hand_and_an_unpacked_copy_give_the_same(home, monkeypatch, capsys):
    lay_out("esc50", home, monkeypatch)
    make = ("--dataset", "esc50", "--sample-rate", RATE)
    code, printed, _ = command(capsys, *make, "--source", "site", "--out", "a/esc50")
    assert code == 0 and "CC BY-NC 3.0" in printed.splitlines()[0] and "Piczak" in printed and "10 recordings" in printed
    shutil.copytree(download.unpack(home / "site" / "ESC-50-master.zip", home / "un"), home / "my copy" / "x")
    assert command(capsys, *make, "--source", "my copy", "--out", "b/esc50")[0] == 0
    first, second = (manifest.read_card(folder) for folder in ("a/esc50", "b/esc50"))
    assert first["splits"] == second["splits"] and first["recordings"] == second["recordings"] == 10
    assert [row["audio"] for row in rows_of(home / "a/esc50")] == [row["audio"] for row in rows_of(home / "b/esc50")]
    assert command(capsys, *make, "--source", "site", "--out", "c/esc50", "--limit", 1)[0] == 0
    assert [manifest.read_card("c/esc50")["splits"][split]["rows"] for split in manifest.SPLITS] == [1, 1, 1]


def test_a_clone_of_crema_d_needs_no_list_of_addresses(home, monkeypatch):
    lay_out("crema_d", home, monkeypatch)
    (home / "site/crema_d.txt").unlink()
    report = datasets.prepare("crema_d", "data/crema_d", "site", "http://127.0.0.1:9", sample_rate=RATE)
    assert report.card["recordings"] == 20 and not report.problems


def test_mistakes_and_what_to_do(home, monkeypatch, capsys):
    def says(*flags):
        code, _, error = command(capsys, *flags)
        assert code == 2 and "Traceback" not in error and not list(home.glob("data/*/card.json"))
        return error.splitlines()[-1]

    lay_out("gtzan", home, monkeypatch)
    assert "{youtube_id}_{start_time}.flac" in says("--dataset", "audiocaps")
    assert "there is no such folder" in says("--dataset", "gtzan", "--source", "none")
    (home / "empty").mkdir()
    (home / "empty/genres.tar.gz").symlink_to("gone")
    assert "empty: no usable recording" in says("--dataset", "gtzan", "--source", "empty")
    soundfile.write(home / "empty/x.wav", np.ones(8), RATE)
    assert "empty: no usable recording (none has a name" in says("--dataset", "ravdess", "--source", "empty")
    (home / "empty/x.wav").unlink()
    (home / "empty/genres.tar.gz").unlink()
    assert "table that is not there: 1, e.g. esc50.csv" in says("--dataset", "esc50", "--source", "empty")
    with serve(home / "empty") as (address, _):
        assert "genres.tar.gz: not to be had (HTTP Error 404" in says("--dataset", "gtzan", "--mirror", address)
    (home / "site" / "genres.tar.gz").write_bytes(b"something else")
    assert "genres.tar.gz: checksum" in says("--dataset", "gtzan", "--source", "site")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10 ** 9}))
    monkeypatch.setitem(datasets.TABLE, "gtzan", dataclasses.replace(datasets.TABLE["gtzan"], gigabytes=1.2))
    assert "needs 3.60 GB" in says("--dataset", "gtzan")
    (home / "data/esc50/meta").mkdir(parents=True)
    assert "exists and is not a prepared data set" in says("--dataset", "esc50"), "before anything is fetched"
    assert "--source means nothing to --dataset scenes" in says("--source", "empty", "--out", "data/mine")
    assert "--limit means nothing to --dataset folder" in says("--dataset", "folder", "--source", "empty", "--limit", 5)
    assert "--sample-rate 700000: expected 655350 or less" in says("--dataset", "esc50", "--sample-rate", 700_000)


def test_a_folder_of_ones_own_in_clothos_layout_is_trained_on_and_scored_with_shots(home, trained, capsys):
    """README's walk on real recordings, with noises under the packages' names and a micro model."""
    names = [f"{start}_{n}.flac" for start in ("bd", "tabla", "guit") for n in range(6)] + ["glitch_robot1.flac", "unknown.flac", "sneaky.oga"]
    for seed, name in enumerate(names):
        (home / "packages/usr").mkdir(parents=True, exist_ok=True)
        (home / "packages/usr" / name).write_bytes(published.wav(seed, RATE, 1, "FLAC"))
    real_sounds.main(home / "packages", home / "sounds")
    assert "left out: sneaky.oga, unknown.flac" in capsys.readouterr().out
    assert real_sounds.caption("glitch_robot1.flac")[0] == "a robot speaks" and real_sounds.caption("sneaky.oga") is None
    assert all(len(set(captions)) == 5 for captions in real_sounds.BY_NAME.values())
    code, out, _ = command(capsys, "--dataset", "clotho", "--source", "sounds", "--out", "data/real", "--sample-rate", RATE)
    assert code == 0 and out.count("not the published table (checksum)") == 3
    assert manifest.read_card("data/real")["licence"] == "its owner's" and manifest.check("data/real") == []
    assert [len(manifest.read_rows(f"data/real/{split}.jsonl")) for split in manifest.SPLITS] == [13, 2, 4]
    assert all(row["answers"] == real_sounds.caption(row["file"].split("/")[1]) for row in rows_of(home / "data/real"))
    run_main(retrieval, home, ["--run", trained[0], "--data", "data/real", "--shots", 4])
    run_main(TRAIN, home, ["--preset", "micro", "--stage", "sft", "--init", trained[0], "--data", "data/real", "--name", "real", "--steps", 2,
                           "--no-evaluate"])
    run_main(evaluate, home, ["--run", "runs/real", "--dataset", "real", "--shots", 0, 4, "--max-new", 8])
    results = json.loads((home / "runs/real/scores-real.json").read_text())
    assert {(r["shots"], r["items"], r["references"]) for r in results} == {("0", 4, 5.0), ("4 nearest", 4, 5.0)}


@pytest.mark.parametrize("name, table, content, words", [
    ("nsynth", "nsynth-test/examples.json", b'{"a": {}}', "nsynth: a table is not laid out as published"),
    ("nsynth", "nsynth-test/examples.json", b"[" * 100_000, "not JSON"),
    ("nsynth", "nsynth-test/examples.json", b"[1]", "not laid out"),
    ("esc50", "meta/esc50.csv", b"name,label\n", "esc50.csv: expected the columns filename, fold, category, srcfile; got name, label"),
    ("esc50", "meta/esc50.csv", b'filename,fold,category,src_file\n"' + b"x" * 200_000, "esc50.csv:2: not a CSV"),
    ("macs", "MACS.yaml", b"files: [a: b: c", "MACS.yaml: not YAML"), ("macs", "MACS.yaml", b"files: [1]", "not laid out")])
def test_tables_that_are_not_as_published(home, monkeypatch, name, table, content, words):
    monkeypatch.setitem(datasets.TABLE, name, dataclasses.replace(datasets.TABLE[name], files=()))
    (home / "mine" / table).parent.mkdir(parents=True)
    (home / "mine" / table).write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        datasets.prepare(name, home / "data" / name, "mine")
    assert ("mine/" + table in str(error.value) or "not laid out" in words) and "remove it" in str(error.value)
    assert not (home / "data" / name).exists()


def test_the_list_says_what_is_there(home, prepared, capsys):
    shutil.copytree(prepared["esc50"][0].parent, home / "data")
    code, printed, _ = command(capsys, "--list")
    lines = {line.split()[0]: line for line in printed.splitlines()}
    assert code == 0 and set(datasets.TABLE) <= set(lines)
    assert "10 recordings prepared, 1 of 1 files" in lines["esc50"] and "CC BY-NC 3.0" in lines["esc50"] and "2000" in lines["esc50"]
    assert "zenodo.org/records/4783391" in lines["clotho"] and "recordings: yours" in lines["wavcaps"]


def test_check_names_what_is_wrong(home, prepared, capsys):
    out = home / "esc50"
    shutil.copytree(prepared["esc50"][0], out)
    assert command(capsys, "--check", out)[0] == 0
    rows = {split: manifest.read_rows(out / f"{split}.jsonl") for split in manifest.SPLITS}
    train, test = rows["train"], rows["test"]
    (out / train[0]["audio"]).write_bytes(b"x" * 100)
    (out / train[1]["audio"]).unlink()
    shutil.copy(out / train[2]["audio"], out / "audio" / "copy.flac")
    test += [test[0] | {"audio": train[3]["audio"]}, test[0] | {"audio": "audio/copy.flac"}, test[0] | {"start": 7.0}]
    manifest.write_rows(out / "test.jsonl", test)
    with open(out / "val.jsonl", "a") as file:
        file.write('{"audio": "x.wav"}\nnot json\n')
    code, printed, error = command(capsys, "--check", out)
    assert code == 2 and "9 things are wrong" in error
    for words in ("test.jsonl: 5 rows, card.json tells of 2", f"{train[0]['audio']}: unreadable", f"{train[1]['audio']}: missing",
                  f"the sound of {train[3]['audio']}: in the splits train and test",
                  f"the sound of {', '.join(sorted([train[2]['audio'], 'audio/copy.flac']))}: in the splits train and test",
                  "start 7.0 s lies outside", "val.jsonl:3: task: expected", "val.jsonl:4: not a JSON object"):
        assert words in printed, words
    assert "no prepared data set" in command(capsys, "--check", home / "nothing")[2]


def test_check_sees_through_shots_groups_and_rows_without_a_recording(home):
    """One sound under three names: in a shot alone, in training, in test; a group in two splits; a text without a recording."""
    (home / "audio").mkdir()
    for name in "abc":
        soundfile.write(home / "audio" / f"{name}.flac", np.random.default_rng(0).standard_normal(8_000) * 0.1, RATE)
    soundfile.write(home / "audio/d.flac", np.random.default_rng(1).standard_normal(8_000) * 0.1, RATE)
    row = {"task": "AQA", "prompt": "what?", "answer": "a dog"}
    shot = row | {"audio": "audio/a.flac", "start": 0.0}
    told = row | {"description": "a dog"}
    manifest.write_rows("train.jsonl", [row | {"audio": "audio/b.flac", "shots": [shot], "group": "street"}, told])
    manifest.write_rows("val.jsonl", [told])
    manifest.write_rows("test.jsonl", [row | {"audio": "audio/c.flac"}, row | {"audio": "audio/d.flac", "group": "street"}])
    manifest.write_card(home)
    assert [line.split(": ", 1)[-1] for line in manifest.check(home)] == [
        "group 'street': in the splits train and test (train.jsonl:1, test.jsonl:2)",
        "the sound of audio/b.flac, audio/c.flac: in the splits train and test (train.jsonl:1, test.jsonl:1)"]

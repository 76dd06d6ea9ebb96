"""Small copies of the public data sets in their published layouts, with their traps, for tests.

A builder returns what the set's authors publish, {name: bytes, or {member: bytes} of an archive}, and {path: bytes} of what a
user brings. Written from descriptions of the layouts; no file of any data set is in here.
"""
import hashlib
import io
import json
import unicodedata

import numpy as np
import soundfile


def wav(seed: int, rate: int = 16_000, channels: int = 1, format: str = "WAV") -> bytes:
    x = np.random.default_rng(seed).standard_normal((rate // 5, channels)) * 0.1
    out = io.BytesIO()
    soundfile.write(out, x, rate, format=format, subtype="PCM_16")
    return out.getvalue()


def table(*lines: str, encoding: str = "utf-8") -> bytes:
    return "\r\n".join(lines).encode(encoding)


def clotho():
    """Names composed and decomposed, doubled blanks, one before the extension; Latin-1; a clip of the test split again in training."""
    header = "file_name," + ",".join(f"caption_{i}" for i in range(1, 6))

    def line(name, start):
        return f"{name}," + ",".join(f'"{start}, heard {i} times"' for i in range(5))

    decomposed = unicodedata.normalize("NFD", "Gl\u00f6ckchen.wav")
    return {
        "clotho_captions_development.csv": table(header, line("Rain  on a roof .wav", "Rain"), line("b.wav", "A dog"), line("again.wav", "Steps"),
                                                 line("gone.wav", "Nothing")),
        "clotho_captions_validation.csv": table(header, line("Gl\u00f6ckchen.wav", "A bell"), "short.wav,one", encoding="latin-1"),
        "clotho_captions_evaluation.csv": table(header, line("b.wav", "A horn"), line("c.wav", "It")),
        "clotho_audio_development.7z": {"development/Rain on a roof.wav": wav(0), "development/b.wav": wav(1), "development/again.wav": wav(4)},
        "clotho_audio_validation.7z": {f"validation/{decomposed}": wav(2)},
        "clotho_audio_evaluation.7z": {"evaluation/b.wav": wav(3), "evaluation/c.wav": wav(4)}}, {}


def clotho_aqa():
    """A byte order mark; a name that table and archive spell differently; a question that is asked twice."""
    header = "\ufefffile_name,QuestionText,answer,confidence"

    def asked(name, question, *answers):
        return [f"{name},{question},{answer},yes" for answer in answers]

    return {
        "audio_files.zip": {"audio_files/souffle_me.tallique.wav": wav(0), "audio_files/a.wav": wav(1), "audio_files/b.wav": wav(2)},
        "clotho_aqa_train.csv": table(header, *asked("souffle_me_tallique.wav", "Are there waves?", "Yes", "yes", "no", "yes", "yes", "yes")),
        "clotho_aqa_val.csv": table(header, *asked("a.wav", "Is it near?", "no", "no", "no")),
        "clotho_aqa_test.csv": table(header, *asked("b.wav", "How many birds?", "two", "two", "three"))}, {}


def esc50():
    """The archive of a repository: everything below a folder that is named after the branch."""
    lines = [f"{fold}-{100 + fold}-A-{n}.wav,{fold},{n},{category},False,{100 + fold},A"
             for fold in range(1, 6) for n, category in enumerate(("dog", "crackling_fire"))]
    return {"ESC-50-master.zip": {"ESC-50-master/meta/esc50.csv": table("filename,fold,target,category,esc10,src_file,take", *lines),
                           **{f"ESC-50-master/audio/{line.split(',')[0]}": wav(i) for i, line in enumerate(lines)}}}, {}


def nsynth():
    def note(family, source, *qualities):
        return {"instrument_family_str": family, "instrument_source_str": source, "qualities_str": qualities, "pitch": 60}

    notes = {"train": {"bass_synthetic_000-060-100": note("bass", "synthetic", "dark", "long_release"), "synth_lead_synthetic_1-060-100": note("synth_lead", "synthetic")},
             "valid": {"flute_acoustic_000-060-100": note("flute", "acoustic")}, "test": {"organ_electronic_000-060-100": note("organ", "electronic")}}
    return {f"nsynth-{split}.jsonwav.tar.gz": {
        f"nsynth-{split}/examples.json": json.dumps(content).encode(),
        **{f"nsynth-{split}/audio/{name}.wav": wav(10 * len(split) + i + (split == "train")) for i, name in enumerate(content)}}
        for split, content in notes.items()}, {}


def urbansound8k():
    """Any rate, any number of channels; what macOS leaves in archives; one file cut off in the middle."""
    lines = [f"{fold}{n}-{n}-0-0.wav,{fold}{n},0.0,0.2,1,{fold},{n},{label}" for fold in (1, 9, 10) for n, label in enumerate(("dog_bark", "siren"))]
    files = {f"UrbanSound8K/audio/fold{line.split(',')[5]}/{line.split(',')[0]}": wav(i, (8_000, 22_050, 96_000)[i % 3], 1 + i % 2)
             for i, line in enumerate(lines)}
    files["UrbanSound8K/audio/fold1/11-1-0-0.wav"] = files["UrbanSound8K/audio/fold1/11-1-0-0.wav"][:400]
    return {"UrbanSound8K.tar.gz": {
        "UrbanSound8K/metadata/UrbanSound8K.csv": table("slice_file_name,fsID,start,end,salience,fold,classID,class", *lines),
        "UrbanSound8K/audio/fold1/._10-0-0-0.wav": b"Mac OS X", "UrbanSound8K/.DS_Store": b"\0", **files}}, {}


def fsd50k():
    """Audio in zips of six and of two parts; labels with commas; an evaluation clip with the number of a development clip."""
    dev = {f"FSD50K.dev_audio/{n}.wav": wav(n) for n in (10, 11, 12)}
    test = {f"FSD50K.eval_audio/{n}.wav": wav(90 + n) for n in (10, 20)}
    return {"FSD50K.dev_audio.zip/5": dev, "FSD50K.eval_audio.zip/1": test, "FSD50K.ground_truth.zip": {
        "FSD50K.ground_truth/dev.csv": table("fname,labels,mids,split", '10,"Electric_guitar,Guitar,Music","/m/1,/m/2,/m/3",train', "11,Bark,/m/4,val",
                                             "12,Bark,/m/4,later"),
        "FSD50K.ground_truth/eval.csv": table("fname,labels,mids", '10,"Bark,Dog","/m/4,/m/5"', "20,Bark,/m/4"),
        "FSD50K.ground_truth/vocabulary.csv": table("0,Bark,/m/4")}}, {}


def ravdess():
    """No wrapper folder; some files in two channels; songs (02) beside speech (01)."""
    return {"Audio_Speech_Actors_01-24.zip": {
        f"Actor_{actor:02}/03-0{kind}-0{emotion}-01-01-01-{actor:02}.wav": wav(100 * actor + 10 * kind + emotion, 48_000, 1 + actor % 2)
        for actor in range(1, 11) for kind, emotion in ((1, 5), (1, 7), (2, 3))}}, {}


def crema_d():
    """A list of addresses, sizes and checksums instead of an archive."""
    files = {f"{1000 + actor}_IEO_{emotion}_HI.wav": wav(10 * actor + n) for actor in range(10) for n, emotion in enumerate(("ANG", "SAD"))}
    lines = [f"https://media.example.invalid/AudioWAV/{name} {len(data)} {hashlib.sha256(data).hexdigest()}" for name, data in files.items()]
    return {"crema_d.txt": "\n".join(["https://example.invalid/summaryTable.csv 3 " + "0" * 64, *lines]).encode(), **files}, {}


def medley_solos():
    lines = [f"{subset},{instrument},{n},{n},{uuid}" for n, (subset, instrument, uuid) in enumerate((
        ("training", "clarinet", "aa"), ("training", "tenor saxophone", "bb"), ("validation", "flute", "cc"), ("test", "clarinet", "dd")))]
    return {"Medley-solos-DB_metadata.csv": table("subset,instrument,instrument_id,song_id,uuid4", *lines),
            "Medley-solos-DB.tar.gz": {"Medley-solos-DB_{0}-{2}_{4}.wav".format(*line.split(",")): wav(i, 44_100) for i, line in enumerate(lines)}}, {}


def macs():
    """Captions wrapped over lines, two to five a clip; recordings in eight of the archives of another set."""
    home, parts = "TAU-urban-acoustic-scenes-2019-development", (1, 2, 3, 9, 10, 11, 12, 13)
    clips = "".join(f"- filename: park-oslo-{n}-1-a.wav\n  annotations:\n  - annotator_id: 1\n    sentence: birds sing and a\n      car {n} passes\n"
                    f"    tags:\n    - birds\n  - annotator_id: 2\n    sentence: 'it''s a park {n}'\n    tags: []\n" for n in parts)
    return {"MACS.yaml": f"files:\n{clips}".encode(),
            **{f"{home}.audio.{n}.zip": {f"{home}/audio/park-oslo-{n}-1-a.wav": wav(n, 48_000, 2)} for n in parts}}, {}


def cochlscene():
    """No table; a zip in six parts."""
    return {"CochlScene.zip/5": {f"CochlScene/{split}/{scene}/{scene}_user{10 * i + n}_1_00{n}.wav": wav(10 * i + n)
                                 for i, split in enumerate(("Train", "Val", "Test")) for n, scene in enumerate(("Bus", "SubwayStation"))}}, {}


def nonspeech7k():
    """A blank before .csv, other headers in train than in test, "yawm", cuts of a test recording in training, the same name in both."""
    train = [f"t{n}.wav,{n},200,1,{'yawm' if n % 2 else 'cough'},0,orignal,freesound" for n in range(20)]
    return {
        "train.zip": {**{f"t{n}.wav": wav(n, 32_000) for n in range(20)}, "x.wav": wav(50), "y.wav": wav(52)},
        "test.zip": {"x.wav": wav(51, 32_000)},
        "metadata of train set .csv": table("Filename,File ID,Duration in ms,Class ID,Classname,augmentation  id,Augmentation  type,source",
                                            *train, "x.wav,777,200,1,laugh,0,original,caf\u00e9", "y.wav,778,200,1,,0,original,x", encoding="latin-1"),
        "metadata of test set.csv": table("Filename,File_ID,Durationin ms,Class_id,Classname,Augment Id,Augmentation type,source",
                                          "x.wav,777,200,1,laugh,0,original,z")}, {}


def gtzan():
    """Sun's .au; one recording that cannot be read."""
    files = {f"genres/{genre}/{genre}.{n:05}.au": wav(10 * i + n, 22_050, format="AU") for i, genre in enumerate(("blues", "rock")) for n in range(10)}
    return {"genres.tar.gz": {**files, "genres/jazz/jazz.00054.au": b"<html>" * 2000, "genres/bextract_single.mf": b"x"}}, {}


def tut2017():
    home = "TUT-acoustic-scenes-2017-evaluation"
    """Columns apart by tabs or by blanks."""
    lines = [f"audio/{n}.wav{' ' if n % 2 else chr(9)}{scene}" for n, scene in enumerate(("cafe/restaurant", "forest_path", "bus", "bus"))]
    return {f"{home}.meta.zip": {f"{home}/meta.txt": table(*lines)},
            **{f"{home}.audio.{n + 1}.zip": {f"{home}/audio/{n}.wav": wav(n, 44_100, 2)} for n in range(4)}}, {}


def audiocaps():
    header = "audiocap_id,youtube_id,start_time,caption"
    return {"train.csv": table(header, "1,-abc_D,30,A dog barks", "2,gone,0,Removed"), "val.csv": table(header, "3,val,10,Wind", "4,val,10,It blows"),
            "test.csv": table(header, '5,test,0,"Rain, then wind"')}, \
        {"-abc_D_30.flac": wav(0, format="FLAC"), "sub/val_10.wav": wav(1), "test_0.wav": wav(2)}


def musiccaps():
    header = "ytid,start_s,end_s,audioset_positive_labels,aspect_list,caption,author_id,is_balanced_subset,is_audioset_eval"
    return {"musiccaps-public.csv": table(header, '-a,30,40,"/m/1,/m/2","[\'pop\', \'low\']","A song.\nIt is slow.",4,False,False',
                                          "b,0,10,/m/1,['x'],A flute.,4,False,True")}, {"-a.wav": wav(0), "b.wav": wav(1)}


def wavcaps():
    """Numbers that two sources share; recordings of evaluation splits, which are left out; one without a caption."""
    def items(*pairs):
        return json.dumps({"data": [{"id": name, "caption": caption, "duration": 1.0} for name, caption in pairs]}).encode()

    return {"as_final.json": items(("Ya.wav", "A dog."), ("Yb.wav", "A cat.")), "fsd_final.json": items(("1", "Rain."), ("2", "Wind."), ("3", "Snow."), ("4", "")),
            "bbc_final.json": items(("07", "A door.")), "sb_final.json": items(("1", "A gong.")),
            "blacklist_audiocaps.full.csv": table("id", "Yb.wav"), "blacklist_clotho.full.csv": table("id", "2")}, \
        {f"{name}.flac": wav(i, 32_000, format="FLAC") for i, name in enumerate((
            "AudioSet_SL/Ya", "AudioSet_SL/Yb", "FreeSound/1", "FreeSound/2", "BBC_Sound_Effects/07", "SoundBible/1", "SoundBible/3", "FreeSound/4"))}


def music_avqa():
    """The answer's field is misspelt; questions have slots; some are withdrawn, some are about the picture."""
    def item(video, kind, content, values, answer, deleted=0):
        return {"video_id": video, "question_id": 1, "type": json.dumps(kind), "question_content": content, "templ_values": json.dumps(values),
                "question_deleted": deleted, "anser": answer}

    count, picture = ["Audio", "Counting"], ["Visual", "Location"]
    return {"avqa-train.json": json.dumps([item("00001", count, "Is the <Object> louder than the <Object>?", ["flute", "piano"], "yes"),
                                           item("00001", picture, "Where is it?", [], "left")]).encode(),
            "avqa-val.json": json.dumps([item("2", count, "Withdrawn?", [], "no", 1)]).encode(),
            "avqa-test.json": json.dumps([item("sim3", count, "How many <Object> are there?", ["violins"], "two")]).encode()}, \
        {"00001.wav": wav(0), "2.wav": wav(1), "sim3.wav": wav(2)}


def dialogues():
    good = {"audio": "a.wav", "turns": [{"user": "What is it?", "assistant": "A bell."}, {"user": "Is it near?", "assistant": "No."}]}
    return {}, {"chat.json": json.dumps([good, {"name": "sub/b.wav", "dialogue": good["turns"][:1], "split": "test"}, {"audio": "a.wav"}, 3,
                                         good | {"turns": "hi"}, good | {"split": 7}, good | {"audio": "../a.wav"},
                                         {"audio_id": "sub/b.wav", "dialogue": good["turns"]}]).encode(),
                "a.wav": wav(0), "sub/b.wav": wav(1)}

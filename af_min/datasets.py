"""Public data sets: what each is, where it lies, whose it is (the table), and the way from there to data/<name>.

Recordings of audiocaps, musiccaps, wavcaps and music_avqa are not published by these sets' authors, or in parts that add up to a
terabyte: bring them, named as the table says (--source). Sources of addresses, checksums and sizes: the loaders aac-datasets
0.7.0, soundata 1.0.1, mirdata 1.0.0 and tensorflow-datasets 4.9.10, and the sets' own pages. A number that none of them states
is left out; hours are clips times their length where that is fixed.
"""
from __future__ import annotations

import hashlib
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from tqdm import tqdm

from . import folder, manifest, readers
from .cli import UserError, alone
from .download import File, WrongChecksum, fetch, is_archive, need_space, unpack, verify

ASK_PAGE = "see the data set's page"


@dataclass(frozen=True)
class DataSet:
    read: Callable[[readers.Source], Iterator[dict]]
    task: str
    licence: str
    cite: str
    page: str
    files: tuple[File, ...] = ()
    clips: int = 0              # 0: not stated
    hours: float = 0.0
    gigabytes: float = 0.0      # of the archives
    bring: str = ""             # how recordings that are not published are named


def _files(address: str, *lines: str) -> tuple[File, ...]:
    """Lines are `checksum name`, `-` where none is published."""
    return tuple(File(f"{address}/{quote(name)}", checksum.strip("-")) for checksum, name in (line.split(" ", 1) for line in lines))


def _zenodo(record: int, *lines: str) -> tuple[str, tuple[File, ...]]:
    """Page and files."""
    page = f"https://zenodo.org/records/{record}"
    return page, _files(f"{page}/files", *lines)


TABLE = {
    "clotho": DataSet(
        readers.clotho, "captioning", "clips: each its own Creative Commons licence; captions: Tampere University, non-commercial",
        "Drossos et al., Clotho: an audio captioning dataset, ICASSP 2020",
        *_zenodo(4783391, "c8b05bc7acdb13895bb3c6a29608667e clotho_audio_development.7z",
                 "7dba730be08bada48bd15dc4e668df59 clotho_audio_validation.7z",
                 "4569624ccadf96223f19cb59fe4f849f clotho_audio_evaluation.7z",
                 "d4090b39ce9f2491908eebf4d5b09bae clotho_captions_development.csv",
                 "5879e023032b22a2c930aaa0528bead4 clotho_captions_validation.csv",
                 "1b16b9e57cf7bdb7f13a13802aeb57e2 clotho_captions_evaluation.csv"), 5929, gigabytes=8.9),
    "clotho_aqa": DataSet(
        readers.clotho_aqa, "questions", ASK_PAGE, "Lipping et al., Clotho-AQA, EUSIPCO 2022, arXiv 2204.09634",
        *_zenodo(6473207, "- audio_files.zip", "- clotho_aqa_train.csv", "- clotho_aqa_val.csv", "- clotho_aqa_test.csv"),
        1991, gigabytes=3.1),
    "esc50": DataSet(
        readers.esc50, "sound events", "CC BY-NC 3.0", "Piczak, ESC: dataset for environmental sound classification, ACM MM 2015",
        "https://github.com/karolpiczak/ESC-50",
        (File("https://github.com/karolpiczak/ESC-50/archive/master.zip", saved_as="ESC-50-master.zip"),),
        2000, 2.8, 0.6),
    "nsynth": DataSet(
        readers.nsynth, "instruments, sources, qualities", "CC BY 4.0",
        "Engel et al., Neural audio synthesis of musical notes, ICML 2017",
        "https://magenta.tensorflow.org/datasets/nsynth",
        _files("http://download.magenta.tensorflow.org/datasets/nsynth", "- nsynth-train.jsonwav.tar.gz",
               "- nsynth-valid.jsonwav.tar.gz", "- nsynth-test.jsonwav.tar.gz"), 305_979, 340.0, 25.2),
    "urbansound8k": DataSet(
        readers.urbansound8k, "sound events", "CC BY-NC (3.0 or 4.0: its sources differ)",
        "Salamon et al., A dataset and taxonomy for urban sound research, ACM MM 2014",
        *_zenodo(1203745, "9aa69802bbf37fb986f71ec1483a196e UrbanSound8K.tar.gz"), 8732, gigabytes=6.0),
    "fsd50k": DataSet(
        readers.fsd50k, "sound events, several a clip", "CC BY 4.0; clips: each its own Creative Commons licence",
        "Fonseca et al., FSD50K: an open dataset of human-labeled sound events, IEEE/ACM TASLP 2022",
        *_zenodo(4060432, *(f"{md5} FSD50K.{name}" for name, md5 in {
            "dev_audio.zip": "c480d119b8f7a7e32fdb58f3ea4d6c5a", "dev_audio.z01": "faa7cf4cc076fc34a44a479a5ed862a3",
            "dev_audio.z02": "8f9b66153e68571164fb1315d00bc7bc", "dev_audio.z03": "1196ef47d267a993d30fa98af54b7159",
            "dev_audio.z04": "d088ac4e11ba53daf9f7574c11cccac9", "dev_audio.z05": "81356521aa159accd3c35de22da28c7f",
            "eval_audio.zip": "6fa47636c3a3ad5c7dfeba99f2637982", "eval_audio.z01": "3090670eaeecc013ca1ff84fe4442aeb",
            "ground_truth.zip": "ca27382c195e37d2269c4c866dd73485"}.items())), 51_197, 108.3, 24.0),
    "ravdess": DataSet(
        readers.ravdess, "emotions", "CC BY-NC-SA 4.0",
        "Livingstone and Russo, The Ryerson audio-visual database, PLoS ONE 13(5), 2018",
        *_zenodo(1188976, "bc696df654c87fed845eb13823edef8a Audio_Speech_Actors_01-24.zip"), 1440, gigabytes=0.2),
    "crema_d": DataSet(
        readers.crema_d, "emotions", ASK_PAGE,
        "Cao et al., CREMA-D: crowd-sourced emotional multimodal actors dataset, IEEE TAC 2014",
        "https://github.com/CheyneyComputerScience/CREMA-D",
        _files("https://storage.googleapis.com/tfds-data/manual_checksums",
               "66b5d959dcee997321baf9080c80022a6937279419446db3a9d4827d839b0abb crema_d.txt"), 7442),
    "medley_solos": DataSet(
        readers.medley_solos, "instruments", "CC BY 4.0",
        "Lostanlen and Cella, Deep convolutional networks on the pitch spiral, ISMIR 2016",
        *_zenodo(3464194, "f5facf398793ef5c1f80c013afdf3e5f Medley-solos-DB.tar.gz",
                 "fda6a589c56785f2195c9227809c521a Medley-solos-DB_metadata.csv")),
    "macs": DataSet(
        readers.macs, "captioning", f"{ASK_PAGE} (LICENSE.txt)", "Martin-Morato and Mesaros, MACS, DCASE 2021",
        "https://zenodo.org/records/5114771", _zenodo(5114771, "23fcb2ebd0b109094034ef9e87972256 MACS.yaml")[1] + _zenodo(2589280, *(
            f"{md5} TAU-urban-acoustic-scenes-2019-development.audio.{part}.zip" for part, md5 in {
                1: "aca4ebfd9ed03d5f747d6ba8c24bc728", 2: "c4f170408ce77c8c70c532bf268d7be0",
                3: "c7214a07211f10f3250290d05e72c37e", 9: "3c32a693a6b111ffb957be3c1dd22e9b",
                10: "0ffbf60006da520cc761fb74c878b98b", 11: "599055d93b4c11057c29be2df54538d4",
                12: "98b8d162ff3665695c4c910e6c372cc8", 13: "a356c08b1a5a21d433eba37ef87587f4"}.items()))[1], 3930, 10.9, 13.0),
    "cochlscene": DataSet(
        readers.cochlscene, "scenes", ASK_PAGE, "Jeong and Park, CochlScene, APSIPA 2022, arXiv 2211.02289",
        *_zenodo(7080122, *(f"- CochlScene.{part}" for part in ("z01", "z02", "z03", "z04", "z05", "zip"))), 76_000, 211.0, 53.9),
    "nonspeech7k": DataSet(
        readers.nonspeech7k, "sound events", ASK_PAGE, "Rashid et al., Nonspeech7k dataset, IET Signal Processing 2023",
        *_zenodo(6967442, "- train.zip", "- test.zip", "- metadata of train set .csv", "- metadata of test set.csv")),
    "gtzan": DataSet(
        readers.gtzan, "genres", "unknown", "Tzanetakis and Cook, Musical genre classification of audio signals, IEEE TSAP 2002",
        "https://web.archive.org/web/20220328223413/http://opihi.cs.uvic.ca/sound/ (the original host is gone)", _files(
            "https://web.archive.org/web/20220328223413/http://opihi.cs.uvic.ca/sound",
            "24347e0223d2ba798e0a558c4c172d9d4a19c00bb7963fe055d183dadb4ef2c6 genres.tar.gz"), 1000, 8.3, 1.2),
    "tut2017": DataSet(
        readers.tut2017, "scenes", "TUT licence (EULA.pdf in its archives)", "Mesaros et al., TUT acoustic scenes 2017, DCASE 2017",
        *_zenodo(1040168, *(
            f"- TUT-acoustic-scenes-2017-evaluation.{part}.zip" for part in ("audio.1", "audio.2", "audio.3", "audio.4", "meta")))),
    "audiocaps": DataSet(
        readers.audiocaps, "captioning", ASK_PAGE, "Kim et al., AudioCaps, NAACL 2019", "https://github.com/cdjkim/audiocaps",
        _files("https://raw.githubusercontent.com/cdjkim/audiocaps/master/dataset", "- train.csv", "- val.csv", "- test.csv"),
        51_308, 142.5, bring="{youtube_id}_{start_time}.flac (or wav, ogg, mp3), 10 s from start_time of each video in the tables"),
    "musiccaps": DataSet(
        readers.musiccaps, "captioning of music", ASK_PAGE, "Agostinelli et al., MusicLM, arXiv 2301.11325",
        "https://huggingface.co/datasets/google/MusicCaps",
        _files("https://huggingface.co/datasets/google/MusicCaps/resolve/main", "- musiccaps-public.csv"), 5521, 15.3,
        bring="{ytid}.wav (or flac, ogg, mp3), start_s to end_s of each video in the table"),
    "wavcaps": DataSet(
        readers.wavcaps, "captioning", "academic use only; clips: each its source's", "Mei et al., WavCaps, arXiv 2303.17395",
        "https://huggingface.co/datasets/cvssp/WavCaps", sum((_files(
            f"https://huggingface.co/datasets/cvssp/WavCaps/resolve/85a0c21e26fa7696a5a74ce54fada99a9b43c6de/json_files/{name}",
            f"- {table}_final.json") for name, table in (
                ("AudioSet_SL", "as"), ("BBC_Sound_Effects", "bbc"), ("FreeSound", "fsd"), ("SoundBible", "sb"))), ())
        + _files("https://raw.githubusercontent.com/Labbeti/aac-datasets/main/data/wavcaps", "- blacklist_audiocaps.full.csv",
                 "- blacklist_clotho.full.csv"), 403_050, 7563.3, 941.0,
        bring="{AudioSet_SL,BBC_Sound_Effects,FreeSound,SoundBible}/{id}.flac, from the zips at its page (zip -s 0 joins parts)"),
    "music_avqa": DataSet(
        readers.music_avqa, "questions about music", ASK_PAGE, "Li et al., MUSIC-AVQA, CVPR 2022, arXiv 2203.14072",
        "https://github.com/GeWu-Lab/MUSIC-AVQA",
        _files("https://raw.githubusercontent.com/GeWu-Lab/MUSIC-AVQA/main/data/json", "- avqa-train.json", "- avqa-val.json",
               "- avqa-test.json"),
        bring="{video_id}.wav (ffmpeg -i {video_id}.mp4 -vn {video_id}.wav)"),
    "dialogues": DataSet(
        readers.dialogues, "dialogue", "its owner's", "its owner", "your own",
        bring='any name, with a .json beside them: [{"audio": "x.wav", "turns": [{"user": "...", "assistant": "..."}]}, ...]'),
}


def prepare(name: str, out, source: str = "", mirror: str = "", limit: int = 0, sample_rate: int = 44_100,
            seed: int = 0) -> folder.Report:
    """Write the data set `name` to `out`. Archives stay in downloads/<name> beside it, so that the next time nothing is fetched.

    source: a folder with archives, or with an unpacked copy; what it holds is not fetched, and no archive is fetched then.
    limit: that many recordings of each split, chosen by the seed. UserError for what is missing and how to get it.
    """
    entry, report, out = TABLE[name], folder.Report(), Path(out)
    work = out.parent / "downloads" / name
    if entry.files:
        print(f"{name}: licence: {entry.licence}; please cite: {entry.cite}; {entry.page}", flush=True)
    manifest.check_replaceable(out)
    if entry.bring and not source:
        raise UserError(f"--dataset {name}: its recordings are not published with it ({entry.page}); give the folder of yours as "
                        f"--source. Names: {entry.bring}")
    if source and not Path(source).is_dir():
        raise UserError(f"--source {source}: there is no such folder")
    with alone(work, "--out"):
        try:
            archives, published = _gather(entry, work, source, mirror)
            facts = {"source": entry.page, "licence": entry.licence, "cite": entry.cite} if published else {
                "source": f"recordings of {Path(source).resolve().name}, laid out as {name}", "licence": "its owner's"}
            for archive in archives:
                unpack(archive, work / "unpacked")
            found = readers.Source([*filter(None, [source]), work], report)
            entries = _resolved(name, entry.read(found), found)
            given = {item["split"] for item in entries}
            shares = {"val": 0.0 if "val" in given or given == {"train"} else 0.1, "test": 0.0 if given & {"train", "test"} else 0.2}
            if limit:
                entries = _limited(entries, limit, seed)
            return folder.write_dataset(out, entries, found.paths, report, sample_rate, source or str(work), seed, **shares, **facts)
        finally:
            shutil.rmtree(work / "unpacked", ignore_errors=True)


def _gather(entry: DataSet, work: Path, source: str, mirror: str) -> tuple[list[Path], bool]:
    """The set's files in `source` (verified) or `work` (fetched) -> the archives to unpack; are its tables as published?"""
    shutil.rmtree(work / "unpacked", ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    files = {file.name: file for file in entry.files}
    held = {files[path.name]: path for path in folder.walk(source) if path.name in files and path.is_file()} if source else {}
    listed = entry.read is readers.crema_d             # its one file lists the others: address, size, sha256
    missing = [file for file in entry.files if file not in held and not (source and (file.packed or listed))]
    published = True
    for file, path in held.items():
        try:
            verify(path, file.checksum)
        except WrongChecksum:
            if file.packed:
                raise
            published = False
            print(f"{path}: not the published table (checksum), but one of your own: read all the same")
    absent = [file for file in missing if not (work / file.name).exists()]
    if absent and not entry.bring:                     # the archives, what they hold, and the recordings made of it
        need_space(work, 3e9 * entry.gigabytes * len(absent) / len(entry.files), "this data set")
    paths = [*held.values(), *(fetch(file, work, mirror) for file in missing)]
    if listed and not source:
        lines = [line.split() for line in paths[0].read_text("utf-8", "replace").splitlines()]
        for line in tqdm([line for line in lines if len(line) > 2 and line[0].endswith(".wav")], "files", unit="file", mininterval=0.5):
            fetch(File(line[0], line[2]), work, mirror, quiet=True)
    return [path for path in paths if is_archive(path.name)], published


def _resolved(dataset: str, entries: Iterator[dict], found: readers.Source) -> list[dict]:
    """The entries with `file` as it is on disk; those without a file go into the report."""
    kept, missing, problems = [], {}, found.report.problems
    try:
        for item in entries:
            where, name = item.pop("where", item["file"]), item["file"]
            split = folder.SPLIT_NAMES.get(str(item["split"]).lower())
            try:
                manifest.check_row({**item, "audio": name[1:] if str(name).startswith("/") else name}, where)
            except UserError as error:
                problems["row that is malformed"].append(str(error))
                continue
            file = found.find(name)
            if not file:
                missing[name.removeprefix("/")] = True
            elif split is None:
                problems["row with a split that is not train, val or test"].append(f"{where} ({item['split']!s:.20})")
            else:
                kept.append({**item, "file": file, "split": split})
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{dataset}: a table is not laid out as published ({type(error).__name__}: {error}). {readers.AGAIN}") from None
    problems["recording that is not there"] += missing
    return kept


def _limited(entries: list[dict], limit: int, seed: int) -> list[dict]:
    """The entries of `limit` files a split, drawn by a hash."""
    chosen = defaultdict(set)
    for file, split in sorted({(item["file"], item["split"]) for item in entries},
                              key=lambda pair: hashlib.sha256(f"{seed} {pair[0]}".encode()).digest()):
        if len(chosen[split]) < limit:
            chosen[split].add(file)
    return [item for item in entries if item["file"] in chosen[item["split"]]]


def listing(data: Path) -> str:
    """A table of all sets: task, clips, hours, size, licence, address, and what is on disk below `data`."""
    lines = [f"{'data set':14s}{'clips':>9s}{'hours':>8s}{'GB':>7s}  {'on disk':34s}task; licence; address (-: not stated)"]
    for name, entry in TABLE.items():
        on_disk = []
        if (data / name / manifest.CARD).is_file():
            on_disk.append(f"{manifest.read_card(data / name).get('recordings', '?')} recordings prepared")
        if there := sum((data / "downloads" / name / file.name).exists() for file in entry.files):
            on_disk.append(f"{there} of {len(entry.files)} files")
        lines.append(f"{name:14s}{entry.clips or '-':>9}{entry.hours or '-':>8}{entry.gigabytes or '-':>7}  {', '.join(on_disk) or '-':34s}"
                     f"{entry.task}; {entry.licence}; {entry.page}" + ("; recordings: yours" if entry.bring else ""))
    return "\n".join(lines)

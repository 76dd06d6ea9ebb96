"""Real recordings in Clotho's layout: five captions a clip, a table and a folder for each split.

    apt download sonic-pi-samples sound-theme-freedesktop          # Debian's; 22 MB; licences: usr/share/doc/*/copyright
    for package in *.deb; do dpkg-deb -x $package packages; done
    python tests/real_sounds.py packages sounds

**The captions are made from file names**, nobody listened: a name has a class by its beginning, a class has five captions. A score
on them says how well a kind of sound is recognised and spelled out; it is no score on Clotho. Names that the table
lacks are left out and told. Of each class, every fifth file in the order of a hash is for evaluation, another tenth for validation.
"""
import csv
import hashlib
import re
import shutil
import sys
from pathlib import Path

CAPTIONS = {  # beginnings of names: captions; the longest beginning counts
    "ambi": "a slow ambient sound; a soft hum fills the room; a long sound without a beat; a drone that rises and fades; calm background sound",
    "bass glitch_bass": "a synthetic bass note; a deep bass tone; a low electronic note; a bass synthesizer plays; one heavy low tone",
    "bd drum_bass drum_heavy elec_hollow elec_soft":
        "a bass drum is hit; one beat of a kick drum; a low thud of a drum; a kick drum; a deep drum beat",
    "drum_cymbal drum_splash elec_cymbal": "a cymbal is struck; a cymbal rings; a metallic crash; one hit on a cymbal; the cymbal of a drum kit",
    "drum_snare drum_roll sn elec_filt elec_hi elec_lo elec_mid elec_snare":
        "a snare drum is hit; one beat of a snare; a sharp rattling drum; a snare drum; a short crisp drum beat",
    "drum_tom elec_fuzz": "a tom drum is hit; one beat of a tom; a round tuned drum; a tom of a drum kit; a hollow drum beat",
    "bell perc_bell drum_cowbell elec_bell elec_bong elec_chime elec_ping elec_triangle":
        "a bell rings; one stroke of a bell; something metallic chimes; a clear ringing tone; a bell is struck",
    "elec glitch_perc": "a short electronic sound; an electronic blip; one brief synthetic noise; a machine beeps or clicks; a tiny digital sound",
    "perc": "something is struck or moved; a short percussive sound; one knock or rattle; percussion; a brief noise of an object",
    "tabla": "a tabla is played; one stroke on a tabla; a hand drum from india; fingers tap a tabla; a hand drum",
    "guit": "a guitar is played; strings of a guitar ring; a guitar chord; someone plucks a guitar; an electric guitar",
    "loop": "a rhythm loop; a beat goes on and on; drums play a repeated pattern; a loop of rhythmic sounds; several beats in a row",
    "glitch_robot mehackit_robot": "a robot speaks; a robotic voice; the voice of a machine; a distorted synthetic voice; a robot makes sounds",
    "phone mehackit_phone": "a telephone; tones of a telephone; a phone rings or dials; the sound of a phone call; a telephone line",
    "vinyl": "a record is scratched; noise of a vinyl record; a turntable; someone moves a record by hand; a record player",
    "audio-channel": "a voice names a loudspeaker; someone speaks a few words; a person talks; a short announcement; a spoken test",
    "alarm complete device dialog message network power service suspend trash window":
        "a computer gives a signal; a sound of a desktop computer; a short notification; an alert chimes; the computer reports something",
}
BY_NAME = {start: captions.split("; ") for starts, captions in CAPTIONS.items() for start in starts.split()}
HEADER = ["file_name", *(f"caption_{i}" for i in range(1, 6))]


def caption(name: str) -> list[str] | None:
    start = max((start for start in BY_NAME if re.match(start + "(?![a-z])", name)), key=len, default=None)
    return BY_NAME.get(start)


def main(source: Path, out: Path) -> None:
    files = {path.name: path for path in sorted(source.rglob("*")) if path.suffix in (".flac", ".oga") and path.is_file()}
    known = {name: caption(name) for name in files if caption(name)}
    order = sorted(known, key=lambda name: (known[name], hashlib.sha256(name.encode()).digest()))
    for split, places in (("evaluation", (2, 7)), ("validation", (4,)), ("development", (0, 1, 3, 5, 6, 8, 9))):
        (out / split).mkdir(parents=True)
        names = [name for n, name in enumerate(order) if n % 10 in places]
        for name in names:
            shutil.copyfile(files[name], out / split / name)
        with open(out / f"clotho_captions_{split}.csv", "w", newline="") as file:
            csv.writer(file).writerows([HEADER, *([name, *known[name]] for name in names)])
        print(f"{split}: {len(names)} recordings")
    print(f"left out: {', '.join(sorted(set(files) - set(known))) or 'none'}")


if __name__ == "__main__":
    if len(sys.argv) != 3 or not Path(sys.argv[1]).is_dir() or Path(sys.argv[2]).exists():
        sys.exit("python tests/real_sounds.py FOLDER_OF_THE_UNPACKED_PACKAGES NEW_FOLDER")
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""Recordings: every format is read right or refused with its reason; windows and log-mel are what the formulas say."""
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from af_min import audio_files
from af_min.audio import LogMel, count_windows, load, mel_filters, windows
from af_min.audio_files import AudioError, inspect
from af_min.cli import UserError
from af_min.config import AF1, TINY, AudioConfig

GOLDEN = Path(__file__).parent / "golden" / "clap.npz"
PRESETS = pytest.mark.parametrize("config", [TINY.audio, AF1.audio], ids=["tiny", "af1"])


def tone(hz: float, rate: int, seconds: float = 0.5, peak: float = 0.5) -> np.ndarray:
    return peak * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)


def loudest_hz(recording) -> float:
    power = np.abs(np.fft.rfft(recording.samples * np.hanning(len(recording.samples)), 1 << 16))
    return power.argmax() * recording.sample_rate / (1 << 16)


# ---------------------------------------------------------------------- log-mel

@PRESETS
def test_mel_filters_are_librosas(config):
    name = "tiny" if config is TINY.audio else "af1"
    assert np.abs(mel_filters(config).numpy() - np.load(GOLDEN)[f"mel_{name}"]).max() < 1e-8


@pytest.mark.slow                # librosa compiles itself for a quarter of a minute
@PRESETS
def test_log_mel_is_librosas(config):
    librosa = pytest.importorskip("librosa", reason="pip install librosa")
    x = np.random.default_rng(0).standard_normal(config.window_samples).astype(np.float32) * 0.1
    power = librosa.feature.melspectrogram(y=x.astype(np.float64), sr=config.mel_sample_rate, n_fft=config.n_fft, hop_length=config.stft_hop,
                                           n_mels=config.n_mels, fmin=config.fmin, fmax=config.fmax, pad_mode="reflect")
    expected = librosa.power_to_db(power, ref=1.0, amin=1e-10, top_db=None).T
    assert np.abs(LogMel(config)(torch.from_numpy(x)[None])[0].numpy() - expected).max() < 1e-3


def test_log_mel_is_its_formula_in_float64():
    c = AudioConfig(sample_rate=1000, window=0.1, n_fft=32, stft_hop=10, n_mels=4, fmin=0, fmax=500, mel_sample_rate=1000)
    x = np.random.default_rng(0).standard_normal(100)
    got = LogMel(c)(torch.tensor(x)[None])[0]
    padded = np.concatenate([x[16:0:-1], x, x[-2:-18:-1]])
    n = np.arange(32)
    for f in range(11):
        frame = padded[10 * f:10 * f + 32] * (0.5 - 0.5 * np.cos(2 * np.pi * n / 32))
        power = [abs(sum(frame * np.exp(-2j * np.pi * k * n / 32))) ** 2 for k in range(17)]
        expected = 10 * np.log10(np.maximum(power @ mel_filters(c).double().numpy(), 1e-10))
        assert np.abs(got[f].numpy() - expected).max() < 1e-4
    assert got.shape == (11, 4)


def test_silence_is_the_floor_of_minus_100_db():
    assert (LogMel(TINY.audio)(torch.zeros(1, TINY.audio.window_samples)) == -100).all()


def test_log_mel_stays_float32_in_a_half_precision_model():
    x = torch.rand(1, TINY.audio.window_samples)
    expected = LogMel(TINY.audio)(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(LogMel(TINY.audio).bfloat16()(x), expected)


# ---------------------------------------------------------------------- windows

@pytest.mark.parametrize("samples, expected", [
    (1, 1), (308_700, 1), (308_701, 2), (308_700 + 77_175, 2), (308_700 + 77_176, 3), (10 * 44_100, 3),
    (308_700 + 15 * 77_175, 16), (308_700 + 14 * 77_175 + 1, 16), (100 * 44_100, 16)])
def test_number_of_windows_by_hand(samples, expected):
    assert count_windows(samples, AF1.audio) == expected


@pytest.mark.parametrize("samples", [1, 7, 8, 9, 10, 11, 13, 14, 20, 100])
def test_windows_are_spans_of_the_recording_padded_with_zeros(samples):
    c = AudioConfig(sample_rate=1, window=8, hop=3, max_windows=4)
    got = windows(np.arange(1, samples + 1, dtype=np.float32), c)
    assert got.shape == (count_windows(samples, c), 8)
    for w, row in enumerate(got):
        assert row.tolist() == [s + 1 if s < samples else 0 for s in range(3 * w, 3 * w + 8)]
    covered = 8 + 3 * (len(got) - 1)
    assert covered >= samples or len(got) == c.max_windows, "what fits into the windows must not be lost"


def test_an_empty_recording_has_one_window_of_silence():
    assert windows(np.zeros(0, np.float32), TINY.audio).shape == (1, TINY.audio.window_samples)


# ---------------------------------------------------------------------- reading

FORMATS = [("wav", s, e) for s, e in [("PCM_U8", 1), ("PCM_16", 1), ("PCM_24", 1), ("PCM_32", 1), ("FLOAT", 1), ("DOUBLE", 1),
                                      ("ULAW", 1), ("ALAW", 1), ("IMA_ADPCM", 2)]] + [
    ("flac", "PCM_S8", 1), ("flac", "PCM_16", 1), ("flac", "PCM_24", 1), ("ogg", "VORBIS", 3), ("ogg", "OPUS", 3), ("mp3", "MPEG_LAYER_III", 3)]


@pytest.mark.parametrize("extension, subtype, hertz_off", FORMATS)
@pytest.mark.parametrize("channels, rate", [(1, 16_000), (2, 48_000)])
def test_every_format_and_depth(tmp_path, extension, subtype, hertz_off, channels, rate):
    """Channel 0 is heard, the others are not; the pitch survives resampling; the peak is 1; the length is right."""
    path = tmp_path / f"x.{extension}"
    x = np.stack([tone(500, rate)] + [tone(2000, rate)] * (channels - 1), 1)
    soundfile.write(path, x, rate, subtype=subtype)
    recording = load(path, 22_050)
    assert abs(loudest_hz(recording) - 500) < hertz_off
    assert np.abs(recording.samples).max() == 1 and recording.samples.dtype == np.float32
    assert abs(recording.seconds - 0.5) < 0.03 and recording.dropped_seconds == 0 and not recording.silent
    assert abs(inspect(path) - 0.5) < 0.03


@pytest.mark.parametrize("channels", [3, 6, 8, 16])
def test_many_channels(tmp_path, channels):
    soundfile.write(tmp_path / "x.wav", np.stack([tone(300 * (c + 1), 16_000) for c in range(channels)], 1), 16_000)
    assert abs(loudest_hz(load(tmp_path / "x.wav", 16_000)) - 300) < 1


@pytest.mark.parametrize("rate", [8_000, 11_025, 32_000, 44_100, 96_000, 192_000])
def test_every_rate(tmp_path, rate):
    soundfile.write(tmp_path / "x.wav", tone(700, rate), rate)
    recording = load(tmp_path / "x.wav", 44_100)
    assert abs(loudest_hz(recording) - 700) < 1 and len(recording.samples) == -(-round(0.5 * rate) * 44_100 // rate)


def test_samples_lie_on_the_16_bit_grid_and_stay_there(tmp_path):
    """What load gives, written as 16-bit audio, is read again unchanged: the same embedding for the same sound, always."""
    soundfile.write(tmp_path / "x.wav", np.random.default_rng(0).standard_normal(5000) * 0.1, 16_000, subtype="FLOAT")
    first = load(tmp_path / "x.wav", 16_000).samples
    steps = first.astype(np.float64) * 32767
    assert np.abs(steps - np.round(steps)).max() < 1e-2
    soundfile.write(tmp_path / "y.flac", np.round(steps).astype(np.int16), 16_000)
    assert np.array_equal(load(tmp_path / "y.flac", 16_000).samples, first)
    assert np.array_equal(load(tmp_path / "x.wav", 16_000).samples, first)


def test_only_the_span_asked_for(tmp_path):
    x = np.random.default_rng(0).uniform(-1, 1, 16_000)
    x[8000], x[4000] = 1.0, -1.0                           # the peak of the whole and of the span
    soundfile.write(tmp_path / "x.wav", x, 16_000, subtype="FLOAT")
    whole, part = load(tmp_path / "x.wav", 16_000), load(tmp_path / "x.wav", 16_000, start=0.125, max_seconds=0.25)
    assert np.array_equal(part.samples, whole.samples[2000:6000])
    assert part.dropped_seconds == 1 - 0.375 and whole.dropped_seconds == 0
    with pytest.raises(AudioError, match="start = 3.0 s lies outside its 1.00 s"):
        load(tmp_path / "x.wav", 16_000, start=3.0)


def test_the_bias_of_a_recording_that_is_positive_throughout_does_not_matter(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.full(4000, 0.25), 16_000)
    assert (load(tmp_path / "x.wav", 16_000).samples == 1).all()


# ---------------------------------------------------------------------- what cannot be used

def test_silence_stays_silence(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.zeros(8000), 16_000)
    recording = load(tmp_path / "x.wav", 44_100)
    assert recording.silent and not recording.samples.any()
    with pytest.raises(AudioError) as error:
        inspect(tmp_path / "x.wav")
    assert error.value.reason == "silent"


def refused(path, reason: str):
    """Both load and inspect name the file and the reason."""
    for read in (inspect, lambda path: load(path, 16_000)):
        with pytest.raises(UserError) as error:
            read(path)
        assert error.value.reason == reason and str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"not audio at all", b"RIFF\x00\x00", b"RIFF" + bytes(200), b"OggS" + bytes(100), b"fLaC" + bytes(40), bytes(1000), b"\xff\xfb" + bytes(50)])
@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3"])
def test_what_is_no_audio_is_refused(tmp_path, content, extension):
    path = tmp_path / f"x.{extension}"
    path.write_bytes(content)
    with pytest.raises(AudioError) as error:
        inspect(path)
    assert error.value.reason in ("unreadable", "empty", "truncated", "silent", "too short")


def test_missing_empty_and_folder(tmp_path):
    refused(tmp_path / "no.wav", "missing")
    refused(tmp_path, "missing")
    refused(tmp_path / ("x" * 300), "missing")                     # longer than any name may be
    with pytest.raises(AudioError, match="a folder"):
        load(tmp_path, 16_000)
    (tmp_path / "x.wav").touch()
    refused(tmp_path / "x.wav", "empty")
    soundfile.write(tmp_path / "y.wav", np.zeros(0), 16_000)
    refused(tmp_path / "y.wav", "empty")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_numbers(tmp_path, value):
    x = tone(500, 16_000)
    x[5000] = value
    soundfile.write(tmp_path / "x.wav", x, 16_000, subtype="FLOAT")
    refused(tmp_path / "x.wav", "NaN")


def test_too_short(tmp_path):
    soundfile.write(tmp_path / "x.wav", tone(500, 16_000, 0.09), 16_000)
    with pytest.raises(AudioError, match="too short"):
        inspect(tmp_path / "x.wav")


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
@pytest.mark.parametrize("rate, channels", [(44_100, 1), (44_100, 2), (22_050, 1), (22_050, 2), (8000, 1)])
def test_an_mp3_without_a_length_in_it_is_heard_whole(tmp_path, mode, rate, channels):
    """As libsndfile reads it with its own header, behind the 576 samples of delay that the header would have told of. So is one behind another."""
    x = np.zeros((5 * rate, channels))
    x[2 * rate:] = np.random.default_rng(0).standard_normal((3 * rate, channels)) / 5
    with soundfile.SoundFile(tmp_path / "a.mp3", "w", rate, channels, format="MP3", bitrate_mode=mode) as file:
        file.write(x)
    data = (tmp_path / "a.mp3").read_bytes()
    expected, frames = soundfile.read(tmp_path / "a.mp3", always_2d=True)[0][:, 0], list(audio_files.mp3_frames(data))
    sound = data[frames[1]:]                                       # the first frame is the header
    tag = b"ID3\x03\0\0" + bytes([0, 0, 1, 0])
    for content in (sound, tag + bytes(128) + sound + b"TAG" + bytes(125)):
        (tmp_path / "b.mp3").write_bytes(content)
        with audio_files.opened(tmp_path / "b.mp3") as file:
            got = audio_files.read(file, "b.mp3", 0, file.frames)
        assert np.abs(got[576:576 + len(expected)] - expected).max() < 1e-6 and len(got) - len(expected) < 2400
    (tmp_path / "c.mp3").write_bytes(data + sound)
    assert inspect(tmp_path / "c.mp3") == pytest.approx(10, abs=0.5)
    (tmp_path / "d.mp3").write_bytes(data[:frames[len(frames) // 2]])
    refused(tmp_path / "d.mp3", "truncated")


def test_a_flac_behind_an_id3_tag_is_no_mp3_whatever_is_in_it(tmp_path):
    soundfile.write(tmp_path / "x.flac", tone(500, 16_000, 1), 16_000)
    data = (tmp_path / "x.flac").read_bytes()
    block = b"like" + b"\xff\xfb\x90\x00".ljust(417, b"\0") * 2                               # of an application: two frames of an mp3
    data = data[:42] + b"\2" + len(block).to_bytes(3, "big") + block + data[42:]
    (tmp_path / "x.flac").write_bytes(b"ID3\4\0\0\0\0\0\x0a" + bytes(10) + data)
    assert list(audio_files.mp3_frames(data)) and inspect(tmp_path / "x.flac") == 1


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("kept", [0.5, 0.9, 0.97])
def test_truncated_recordings_are_noticed(tmp_path, extension, kept):
    """A decoder gives a cut-off file as a shorter one without a word; the headers know better."""
    path = tmp_path / f"x.{extension}"
    soundfile.write(path, np.random.default_rng(0).standard_normal(48_000) * 0.1, 16_000)
    inspect(path)
    content = path.read_bytes()
    path.write_bytes(content[:int(kept * len(content))])
    refused(path, "truncated")


def test_a_wav_from_a_pipe_is_not_truncated(tmp_path):
    """Programs that cannot seek write 0xFFFFFFFF as the length."""
    path = tmp_path / "x.wav"
    soundfile.write(path, tone(500, 16_000), 16_000)
    content = bytearray(path.read_bytes())
    content[4:8] = content[40:44] = b"\xff" * 4
    path.write_bytes(content)
    assert inspect(path) == 0.5


def test_a_flac_from_a_pipe_does_not_say_how_long_it_is(tmp_path):
    """Its number of samples, 36 bits of which the first 4 share a byte with the depth, is 0; libsndfile gives 2^63 - 1 in its place."""
    path = tmp_path / "x.flac"
    soundfile.write(path, tone(500, 16_000, 7), 16_000)
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    path.write_bytes(content)
    refused(path, "unreadable")
    with pytest.raises(AudioError, match="does not say how long"):
        load(path, 16_000, max_seconds=5)


def test_damaged_files_never_end_in_anything_but_an_audio_error(tmp_path):
    """Sixty files with random bytes overwritten, cut or put in: each is read or refused with its reason."""
    rng, reasons = np.random.default_rng(0), set()
    for trial in range(60):
        extension = ("wav", "flac", "ogg", "mp3")[trial % 4]
        path = tmp_path / f"{trial}.{extension}"
        soundfile.write(path, rng.standard_normal((4000, 1 + trial % 2)) * 0.1, 16_000)
        content = bytearray(path.read_bytes())
        for _ in range(1 + trial % 5):
            at = int(rng.integers(0, 80 if trial % 3 else len(content)))
            content[at:at + int(rng.integers(0, 6))] = rng.bytes(int(rng.integers(0, 6)))
        path.write_bytes(content)
        try:
            assert inspect(path) > 0
            assert np.isfinite(load(path, 16_000, max_seconds=5).samples).all()
        except AudioError as error:
            reasons.add(error.reason)
    assert len(reasons) > 1, "the damage must be real"


def test_config_of_the_windows():
    assert AF1.audio.max_seconds == 33.25 and AF1.audio.window_samples == 308_700 and AF1.audio.hop_samples == 77_175
    assert dataclasses.replace(AF1.audio, max_windows=1).max_seconds == 7
    assert set(audio_files.EXTENSIONS) == {".wav", ".flac", ".ogg", ".oga", ".mp3"}

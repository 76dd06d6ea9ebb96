"""The sounds of the embedded data set: a small synthesiser, deterministic by random generator, numpy alone.

A sound is a `Patch`: a source (what vibrates), a contour (how its pitch moves), an envelope (how its loudness moves), a base
frequency and a rate. A sound *class* is a named patch; its events vary in pitch, length, loudness, rate and brightness.
Classes share the same few sources, contours and envelopes, so that an encoder that has learned those can tell apart classes
that it has never heard: that is what the held-out classes test.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RATE = 16_000  # Hz, of everything here

SOURCES = ("tone", "reed", "buzz", "chime", "noise")          # sine; odd harmonics; all harmonics; inharmonic partials; noise band
CONTOURS = ("steady", "rising", "falling", "wobbling", "arched", "stepped")
ENVELOPES = ("held", "fading", "swelling", "pulsed", "trembling")


@dataclass(frozen=True)
class Patch:
    source: str
    contour: str
    envelope: str
    base: float       # Hz, the middle between this class's low and high events
    rate: float = 6.0  # Hz, of wobble, steps, pulses or tremble


TRAIN_CLASSES: dict[str, Patch] = {
    "bell": Patch("chime", "steady", "fading", 900),
    "drum": Patch("noise", "falling", "fading", 220),
    "whistle": Patch("tone", "steady", "held", 1900),
    "siren": Patch("buzz", "arched", "held", 650),
    "bird": Patch("tone", "wobbling", "pulsed", 2400, 9),
    "dog": Patch("buzz", "falling", "pulsed", 330, 5),
    "cat": Patch("reed", "arched", "swelling", 560),
    "horn": Patch("buzz", "steady", "held", 240),
    "phone": Patch("reed", "stepped", "trembling", 1300, 12),
    "clock": Patch("chime", "steady", "pulsed", 2100, 7),
    "wind": Patch("noise", "arched", "swelling", 600),
    "rain": Patch("noise", "steady", "held", 2600),
    "engine": Patch("buzz", "rising", "trembling", 120, 22),
    "frog": Patch("reed", "falling", "trembling", 260, 16),
    "laser": Patch("tone", "falling", "fading", 1500),
    "rocket": Patch("noise", "rising", "swelling", 1100),
    "flute": Patch("tone", "wobbling", "swelling", 1000, 6),
    "alarm": Patch("reed", "steady", "pulsed", 950, 6),
    "train": Patch("noise", "steady", "pulsed", 900, 8),
    "harp": Patch("chime", "rising", "fading", 420),
}
UNSEEN_CLASSES: dict[str, Patch] = {   # never heard or named in any stage of training
    "cricket": Patch("chime", "wobbling", "trembling", 1700, 18),
    "owl": Patch("tone", "arched", "pulsed", 450, 4),
    "robot": Patch("buzz", "stepped", "held", 420, 8),
    "wave": Patch("noise", "wobbling", "held", 1500, 4),
    "goose": Patch("reed", "rising", "fading", 700),
    "ufo": Patch("tone", "rising", "trembling", 800, 14),
}
CLASSES = TRAIN_CLASSES | UNSEEN_CLASSES


def random_patch(rng: np.random.Generator) -> Patch:
    """A patch that is no class's name: any combination but those of the unseen classes."""
    taken = {(p.source, p.contour, p.envelope) for p in UNSEEN_CLASSES.values()}
    while True:
        source, contour, envelope = rng.choice(SOURCES), rng.choice(CONTOURS), rng.choice(ENVELOPES)
        if (source, contour, envelope) not in taken:
            return Patch(str(source), str(contour), str(envelope), float(np.exp(rng.uniform(np.log(130), np.log(2600)))),
                         float(rng.uniform(4, 20)))


def describe(patch: Patch, pitch: float) -> str:
    """Words for what is heard, without the name of a class: 'shrill pulsed wobbling tone'. `pitch` as in `render`."""
    frequency = patch.base * pitch
    register = "deep" if frequency < 350 else "middle" if frequency < 1100 else "shrill"
    return f"{register} {patch.envelope} {patch.contour} {patch.source}"


def render(patch: Patch, seconds: float, pitch: float, rng: np.random.Generator) -> np.ndarray:
    """One event, float32 (samples,), peak about 1. `pitch` multiplies the base frequency."""
    n = round(seconds * RATE)
    t = np.arange(n) / RATE
    u = t / seconds                                              # 0 .. 1 over the event
    rate = patch.rate * rng.uniform(0.9, 1.1)
    bend = {"steady": lambda: 0 * u, "rising": lambda: 1.2 * (u - 0.5), "falling": lambda: 1.2 * (0.5 - u),
            "arched": lambda: 0.9 * np.sin(np.pi * u) - 0.45, "wobbling": lambda: 0.35 * np.sin(2 * np.pi * rate * t),
            "stepped": lambda: 0.5 * np.sign(np.sin(2 * np.pi * rate * 0.5 * t + 0.01))}[patch.contour]  # octaves
    frequency = patch.base * pitch * rng.uniform(0.95, 1.05) * 2 ** bend()
    phase = 2 * np.pi * np.cumsum(frequency) / RATE + rng.uniform(0, 2 * np.pi)
    if patch.source == "noise":  # noise heard through a moving band: amplitude noise on a carrier of random phase walk
        walk = np.cumsum(rng.standard_normal(n)) * 2 * np.pi * 0.25 * frequency / RATE ** 0.5 * 0.04
        sound = np.sin(phase + walk) + 0.25 * rng.standard_normal(n)
    else:
        partials = {"tone": [(1, 1.0), (2, 0.08)],
                    "reed": [(k, 1 / k) for k in (1, 3, 5, 7, 9)],
                    "buzz": [(k, 1 / k ** 0.7) for k in range(1, 13)],
                    "chime": [(1, 1.0), (2.76, 0.7), (5.4, 0.45), (8.9, 0.25)]}[patch.source]
        tilt = rng.uniform(0.8, 1.25)
        top = 0.45 * RATE
        sound = sum(a ** tilt * np.sin(k * phase + rng.uniform(0, 6.28)) * (k * frequency < top) for k, a in partials)
    beat = np.cos(2 * np.pi * rate * t)
    envelope = {"held": lambda: 1 + 0 * u, "fading": lambda: np.exp(-4.5 * u), "swelling": lambda: np.sin(np.pi * u ** 1.5) ** 1.5,
                "pulsed": lambda: (beat > -0.1) * 1.0, "trembling": lambda: 0.625 + 0.375 * beat}[patch.envelope]()
    if patch.envelope == "pulsed":
        envelope = np.convolve(envelope, np.hanning(81) / np.hanning(81).sum(), mode="same")
    ramp = np.minimum(1, np.minimum(t, seconds - t) / 0.008)     # 8 ms fades: no clicks
    sound = sound * envelope * ramp
    return (sound / max(1e-9, np.abs(sound).max())).astype(np.float32)

"""Step 0 of the walk: every number of the system, in one place. Next: audio.py.

One frozen dataclass per part. A preset is one instance of `Config`: `tiny` trains on two CPU cores in minutes, `af1`
has the paper's dimensions ("paper" is arXiv 2402.01831 throughout; section 3.1; 2.2 B parameters). Both run the same
classes. Settings that the paper's architecture does not have say so, give their reason, and are off in `af1`.

The shape legend of the whole project, used as a suffix (`x_BTD`) or in a comment:

    B  samples of a batch   N  audios of a sample             W  windows of an audio            S  waveform samples
    T  text tokens          L  audio tokens of all N audios   A  windows or audios of a batch   V  vocabulary
    D  width                H  attention heads                K  width of one head              M  mel bins    F  STFT frames
"""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from .cli import UserError

IGNORE = -100                        # label of a position that is not supervised


@dataclass(frozen=True)
class AudioConfig:
    """Waveform -> windows -> log-mel (paper section 3.1 i: 7 s windows, 75 % overlap, at most 16 of them)."""
    sample_rate: int = 44_100        # Hz
    window: float = 7.0              # seconds of one window
    hop: float = 1.75                # seconds from the start of one window to that of the next
    max_windows: int = 16            # 7 + 15 * 1.75 = 33.25 s; what lies beyond is cut, with a warning
    n_fft: int = 1024                # waveform samples of one STFT frame
    stft_hop: int = 320              # waveform samples from one STFT frame to the next
    n_mels: int = 64
    fmin: float = 50.0               # Hz
    fmax: float = 14_000.0           # Hz
    mel_sample_rate: int = 32_000    # Hz, the rate the mel filters are made for: ClapCap applies 32 kHz filters to 44.1 kHz audio

    @property
    def window_samples(self) -> int:
        return round(self.window * self.sample_rate)

    @property
    def hop_samples(self) -> int:
        return round(self.hop * self.sample_rate)

    @property
    def max_seconds(self) -> float:
        return self.window + (self.max_windows - 1) * self.hop


@dataclass(frozen=True)
class ClapConfig:
    """Window encoder (HTSAT, the audio tower of ClapCap) and, for `train.py --stage clap`, its text tower."""
    image_size: int = 256            # pixels a side of the square image that the log-mel is folded into
    patch: int = 4                   # pixels a side of a patch, which becomes one token
    width: int = 96                  # channels of the first stage; doubles with every stage
    depths: tuple[int, ...] = (2, 2, 6, 2)       # blocks of each stage
    heads: tuple[int, ...] = (4, 8, 16, 32)      # attention heads of each stage
    attention_window: int = 8        # tokens a side of a window that attention stays within (Swin's; not of audio)
    out_width: int = 1024            # width of a window embedding
    text_width: int = 768            # text tower (ours: a small bidirectional transformer; published weights do not need it)
    text_layers: int = 2
    text_heads: int = 8


@dataclass(frozen=True)
class RepresentationConfig:
    """Audio representation transformation layers (paper section 3.1 ii: 3 layers, 8 heads, inner width 2048)."""
    layers: int = 3
    heads: int = 8
    inner: int = 2048                # feed-forward width
    max_audios: int = 8              # size of the position table: max_audios * max_windows rows
    scale: float = 0.0               # factor of the embeddings before positions are added; 0: sqrt(D), as published, which leaves positions
                                     # about 1/(2 D) of the power; tiny uses 1, to show the order of windows. Not measured apart
    attend_padding: bool = False     # True = the published model: all slots of a sample in one sequence, later audios and silence attended too


@dataclass(frozen=True)
class XattnConfig:
    """Gated cross-attention dense blocks (paper section 3.1 iv; Flamingo, arXiv 2204.14198, section 2.2)."""
    heads: int = 8
    head_dim: int = 64
    ff_mult: int = 4                 # feed-forward width, in widths of the LM
    every: int = 1                   # a block before LM layers 0, every, 2 every, ...
    gate_init: float = 0.0           # the attention gate starts at tanh(gate_init), the feed-forward's at 0; 0 leaves the LM unchanged
    audio_index: bool = False        # not in the paper: xattn.py says why
    null_key: bool = False           # likewise
    mask: str = "block"              # ablations: "last" = a text's own audio alone (without a kernel), "full" = later audios too


@dataclass(frozen=True)
class LMConfig:
    """Decoder-only LM. The OPT family and the Llama / Qwen2 family are the same class under different settings."""
    vocab_size: int = 50_268
    width: int = 2048
    layers: int = 24
    heads: int = 32
    kv_heads: int = 32               # < heads: grouped-query attention
    head_dim: int = 64
    inner: int = 8192                # feed-forward width
    max_positions: int = 2048
    positions: str = "learned"       # learned (OPT: table with an offset of 2) | rope (Llama)
    rope_theta: float = 10_000.0
    rope_scaling: tuple[float, ...] = ()     # Llama 3.1: factor, low and high frequency factor, original context length
    norm: str = "layer"              # layer (OPT) | rms (Llama)
    norm_eps: float = 1e-5
    mlp: str = "relu"                # relu (OPT) | swiglu (Llama)
    qkv_bias: bool = True            # OPT and Qwen2: True; Llama: False
    bias: bool = True                # of every other linear layer. OPT: True; Llama family: False
    tied_head: bool = True           # the published Audio Flamingo checkpoints untie it
    dropout: float = 0.0             # active in training mode only
    conv: int = 0                    # taps of a causal convolution before attention; 0 = none. Not in the paper: a small model
                                     # should learn to match ("A B ... A" -> B) sooner if a key holds its left neighbours; not measured apart


@dataclass(frozen=True)
class Config:
    """A whole model; saved as config.json in every run folder."""
    audio: AudioConfig = AudioConfig()
    clap: ClapConfig = ClapConfig()
    representation: RepresentationConfig = RepresentationConfig()
    xattn: XattnConfig = XattnConfig()
    lm: LMConfig = LMConfig()
    audio_id: int = 50_265           # id of the <audio> token
    pool_windows: bool = False       # ablation: one mean vector an audio instead of its windows (what the paper improves on)


AF1 = Config()

TINY = Config(
    audio=AudioConfig(sample_rate=16_000, window=0.6, hop=0.15, max_windows=33, n_fft=512, stft_hop=128, n_mels=32,
                      fmin=50.0, fmax=8_000.0, mel_sample_rate=16_000),
    clap=ClapConfig(image_size=64, patch=8, width=64, depths=(1, 2), heads=(4, 8), attention_window=4, out_width=128,
                    text_width=128, text_layers=2, text_heads=4),
    representation=RepresentationConfig(layers=3, heads=4, inner=256, max_audios=16, scale=1.0),
    xattn=XattnConfig(heads=4, head_dim=32, ff_mult=2, gate_init=0.5, audio_index=True, null_key=True),
    lm=LMConfig(vocab_size=672, width=128, layers=4, heads=4, kv_heads=4, head_dim=32, inner=256, max_positions=512,
                positions="rope", conv=3),
)

PRESETS = {"tiny": TINY, "af1": AF1}


@dataclass(frozen=True)
class StageConfig:
    """How one stage of training runs (AdamW with betas .9 and .95, or Muon; gradient norm clipped)."""
    steps: int
    lr: float
    warmup: int                      # steps of linear warm-up
    batch: int                       # samples of the global batch, at most (clap: windows)
    batch_tokens: int                # padded text tokens of the global batch, at most (clap: not used)
    optimizer: str = "adamw"         # adamw | muon: muon.py
    lm_rate: float = 1.0             # learning rate of the language model / lr; below 1 it changes more slowly than the layers that listen for it
    decay: bool = False              # after the warm-up: False = constant (released settings), True = linear to a twentieth
    weight_decay: float = 0.1
    clip: float = 1.0                # largest norm of the gradient
    max_tokens: int = 512            # a longer sample is cut


STAGES = {
    "tiny": {
        "clap": StageConfig(steps=400, lr=4e-3, warmup=40, optimizer="muon", batch=128, batch_tokens=1 << 20, decay=True, weight_decay=0.05),
        "lm": StageConfig(steps=700, lr=3e-3, warmup=40, optimizer="muon", batch=256, batch_tokens=2560, decay=True, weight_decay=0.05),
        "pretrain": StageConfig(steps=300, lr=4e-3, warmup=30, optimizer="muon", batch=256, batch_tokens=2560, decay=True, weight_decay=0.05),
        "sft": StageConfig(steps=1150, lr=2.5e-3, warmup=100, optimizer="muon", lm_rate=0.75, batch=256, batch_tokens=2560, decay=True,
                           weight_decay=0.05),
    },
    "af1": {  # pretrain, sft: batches and rates of paper section 5.1, warm-up of the released code; clap, lm: ours (the paper's come trained)
        "clap": StageConfig(steps=100_000, lr=1e-4, warmup=1875, batch=512, batch_tokens=1 << 30),
        "lm": StageConfig(steps=100_000, lr=1e-4, warmup=1875, batch=384, batch_tokens=384 * 512),
        "pretrain": StageConfig(steps=100_000, lr=1e-4, warmup=1875, batch=384, batch_tokens=384 * 512),
        "sft": StageConfig(steps=50_000, lr=2e-5, warmup=1875, batch=128, batch_tokens=128 * 512),
    },
}


def from_dict(cls, values: dict, where: str = "config.json"):
    """The inverse of `dataclasses.asdict`, nested dataclasses included. UserError names a key that `cls` does not have."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: got {values!r}, expected settings of {cls.__name__}")
    defaults, made = {f.name: f.default for f in dataclasses.fields(cls)}, {}
    for name, value in values.items():
        if name not in defaults:
            raise UserError(f"{where}: unknown setting {name!r}; {cls.__name__} has {', '.join(defaults)}")
        if dataclasses.is_dataclass(defaults[name]):
            value = from_dict(type(defaults[name]), value, f"{where}: {name}")
        made[name] = tuple(value) if isinstance(value, list) else value
    return cls(**made)


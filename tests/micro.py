"""A preset that trains in seconds, for tests alone; as a script it is train.py with that preset and without evaluation.

    python tests/micro.py [--double] [--kill STAGE:STEP | --stop STAGE:STEP | --spoil STAGE:STEP] FLAGS OF TRAIN.PY

--kill sends it (of several processes the last) SIGKILL before that step, --stop SIGTERM, --spoil makes that process's loss NaN from there
on; --double computes in float64.

`micro-still` is `micro` without dropout: what is dropped depends on how a batch is shared out.
"""
import dataclasses
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

from af_min import config
from af_min.config import AudioConfig, ClapConfig, Config, LMConfig, RepresentationConfig, StageConfig, XattnConfig

MICRO = Config(
    audio=AudioConfig(sample_rate=16_000, window=0.8, hop=0.4, max_windows=12, n_fft=512, stft_hop=256, n_mels=16, fmin=50.0,
                      fmax=8_000.0, mel_sample_rate=16_000),
    clap=ClapConfig(image_size=32, patch=4, width=8, depths=(1, 1), heads=(2, 2), attention_window=4, out_width=16, text_width=16,
                    text_layers=1, text_heads=2),
    representation=RepresentationConfig(layers=2, heads=2, inner=24, max_audios=9),
    xattn=XattnConfig(heads=2, head_dim=8, ff_mult=2, gate_init=0.5),
    lm=LMConfig(vocab_size=400, width=32, layers=2, heads=2, kv_heads=2, head_dim=16, inner=48, max_positions=512, dropout=0.1))

STILL = dataclasses.replace(MICRO, lm=dataclasses.replace(MICRO.lm, dropout=0.0))

STEPS = 5
STAGES = {stage: StageConfig(steps=STEPS, lr=lr, warmup=1, batch=8, batch_tokens=2048, decay=stage != "sft")
          for stage, lr in (("clap", 1e-3), ("lm", 2e-3), ("pretrain", 3e-3), ("sft", 4e-3))}
STAGES["lm"] = dataclasses.replace(STAGES["lm"], optimizer="muon")          # both optimizers, alone and one after the other
STAGES["sft"] = dataclasses.replace(STAGES["sft"], optimizer="muon", lm_rate=0.5)


def flags(**others) -> SimpleNamespace:
    """Those of train.py that a Trainer looks at."""
    return SimpleNamespace(**{"shard": False, "seed": 0, "float32": True, "checkpoint_activations": False, "compile": False} | others)


def train_module():
    """train.py, knowing both presets."""
    config.PRESETS |= {"micro": MICRO, "micro-still": STILL}
    config.STAGES |= {"micro": STAGES, "micro-still": STAGES}
    import train
    return train


def trouble(train, kind: str, stage: str, step: int) -> None:
    """When step number `step` of `stage` wants to know its learning rate, on the last process, in its first attempt."""
    from af_min import engine, stages
    rate, loss = engine.rate, stages.TextStage.loss

    def troubled(now, settings):
        last = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
        first_attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if settings == train.STAGES["micro"][stage] and now == step and last and first_attempt:
            if kind == "--spoil":
                stages.TextStage.loss = lambda *rest: tuple(value * float("nan") for value in loss(*rest))
            else:
                engine.rate = rate                                                  # a step asks twice
                os.kill(os.getpid(), {"--kill": signal.SIGKILL, "--stop": signal.SIGTERM}[kind])
        return rate(now, settings)
    engine.rate = troubled


def in_double() -> None:
    """Train in float64, so that rounding cannot hide or excuse a difference; the encoder's embeddings are what they are."""
    import torch
    from af_min import engine
    begin = engine.Trainer.__init__

    def double(self, stage, everything, *rest):
        torch.Tensor.float = torch.Tensor.double                       # the loss, which is computed in float32 at least
        begin(self, stage, everything.double(), *rest)
    engine.Trainer.__init__ = double


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    train = train_module()
    settings = ["--preset", "micro", "--no-evaluate"]
    if sys.argv[1] == "--double":
        in_double()
        del sys.argv[1]
        settings.append("--float32")                                           # no product in bfloat16, the optimizer's neither
    if sys.argv[1] in ("--kill", "--stop", "--spoil"):
        stage, step = sys.argv[2].split(":")
        trouble(train, sys.argv[1], stage, int(step))
        del sys.argv[1:3]
    sys.argv[1:1] = settings
    train.cli.run(train.main)

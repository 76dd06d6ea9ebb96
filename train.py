"""Train Audio Flamingo, every stage.

    python train.py                          everything from nothing: embedded data, preset tiny, all stages, scores
                                             (the README tells its time on two CPU cores and shows the table that it ends with)
    python train.py --resume                 go on where an interrupted training stopped, with the flags it was started with
    python train.py --stage sft --init runs/tiny --data data/mine --name mine
    python train.py --lm smollm2 --encoder runs/tiny --name smol            on a published language model; or with --clap FILE
    torchrun --nproc_per_node 2 train.py     the same on several processes (gloo on CPUs, nccl on GPUs)

Stages, each from the weights that the one before it left (pretrain and sft: paper section 3.2 iii; the paper takes the other two
trained, ClapCap and OPT-IML):
    clap      contrastive audio-text training of the window encoder                 (left out with --clap or --encoder)
    lm        text-only training of the language model, sounds described in words   (left out with --lm)
    pretrain  representation and cross-attention layers learn, encoder and LM are frozen
    sft       everything but the encoder learns: single, few-shot and dialogue samples
"""
from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # before torch starts its thread pools: more threads than cores hinder each other
    os.environ.setdefault(variable, str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")        # on a GPU: cuBLAS gives the same bits in every run

import torch
import torch.distributed as dist

from af_min import checkpoint, cli, data, manifest, text
from af_min.cli import UserError, flag
from af_min.config import PRESETS, STAGES, StageConfig
from af_min.engine import Trainer, World, footer, lighten, unsharded
from af_min.stages import ClapStage, Everything, TextStage

ALL_STAGES = ("clap", "lm", "pretrain", "sft")


@dataclass(frozen=True)
class Args:
    stage: str = flag("all", "which stage to train", choices=(*ALL_STAGES, "all"))
    preset: str = flag("", "dimensions and training settings (default: tiny; with --clap af1; with --init those of that run)",
                       choices=tuple(PRESETS))
    data: list[str] = flag(["data/scenes"], "prepared data sets, folder or folder:weight", nargs="+")
    name: str = flag("tiny", "the run is written to runs/NAME")
    init: str = flag("", "start from the weights and tokenizer of this run folder (with one --stage: runs/NAME, if it holds a model)")
    lm: str = flag("", "new model on this published language model: folder of an OPT, Llama or Qwen2")
    clap: str = flag("", "with --lm: published window encoder, clapcap_weights_2023.pth")
    encoder: str = flag("", "with --lm: window encoder, representation layers and dimensions of all but the language model, of this run folder")
    resume: bool = flag(False, "go on from the last checkpoint of runs/NAME")
    seed: int = flag(0, "seed of weights and data order")
    steps: int = flag(0, "training steps of the stage (0: the preset's)")
    lr: float = flag(0.0, "peak learning rate of the stage (0: the preset's)")
    optimizer: str = flag("", "default: the preset's; with --lm adamw, with --init that of the run", choices=("adamw", "muon"))
    batch: int = flag(0, "samples of the global batch (0: the preset's)")
    batch_tokens: int = flag(0, "padded tokens of the global batch, at most (0: the preset's)")
    accumulate: int = flag(1, "to save memory: pieces that a process splits its share of each part of a batch into (a large batch has 4 parts)")
    shard: bool = flag(False, "with torchrun: spread weights, gradients and optimizer over the processes (FSDP2)")
    checkpoint_activations: bool = flag(False, "compute a layer's activations again in the backward pass, to save memory")
    float32: bool = flag(False, "float32 throughout, on a device that would multiply in bfloat16")
    compile: bool = flag(False, "torch.compile the layers")
    pool_windows: bool = flag(False, "ablation: one mean vector an audio instead of its windows")
    checkpoint_every: int = flag(100, "steps from one checkpoint to the next")
    evaluate: bool = flag(True, "score the result on the test split (of several data sets the first one's) and draw report.png")


def make_tokenizer(folders, vocab_size: int) -> text.Tokenizer:
    """A tokenizer trained on what the model is to read and write: prompts, answers, descriptions and turns of the training rows."""
    lines = []
    for folder, _ in folders:
        for row in manifest.read_rows(folder / "train.jsonl"):
            turns = row.get("turns", []) if row.get("audio") else []
            parts = [row, *row.get("shots", [])[:1], *turns]     # one shot per row: the made-up words of all would fill the vocabulary
            lines += [part[k].lower() for part in parts for k in ("prompt", "answer", "description", "user", "assistant") if k in part]
            lines += [answer.lower() for answer in row.get("answers", [])]
    return text.Tokenizer.train(lines, vocab_size)


def stage_settings(args: Args, stage: str) -> StageConfig:
    c = STAGES[args.preset][stage]
    return replace(c, steps=args.steps or c.steps, lr=args.lr or c.lr, optimizer=args.optimizer or c.optimizer, batch=args.batch or c.batch,
                   batch_tokens=args.batch_tokens or c.batch_tokens, warmup=min(c.warmup, max(1, (args.steps or c.steps) // 5)))


def training_of(run: Path) -> dict:
    """The flags that a run was trained with; {} if there is no such run, or if it was converted (pretrained.py), not trained."""
    return checkpoint.read_json(run / "config.json", optional=True).get("training", {}).get("args", {})


def with_defaults(args: Args) -> Args:
    """Preset and optimizer, where they are not named: those of the run that --init names, or what fits a new model."""
    before = training_of(Path(args.init)) if args.init else {}
    preset = args.preset or (before.get("preset", "af1") if args.init else "af1" if args.clap else "tiny")
    return replace(args, preset=preset, optimizer=args.optimizer or before.get("optimizer", "adamw" if args.lm else ""))


def parse_arguments() -> Args:
    """The command line; with --resume, flags that are not named have the values that the run was started with."""
    args = asked = cli.parse(Args, description=__doc__)
    run = Path("runs") / args.name
    if args.stage != "all" and not (args.init or args.lm) and (run / "model.safetensors").exists():
        args = replace(args, init=str(run))
    saved = training_of(run)
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and (run / "checkpoint").exists()     # torchrun --max-restarts
    args = with_defaults(args)
    if args.resume or again and saved in (asdict(args), asdict(with_defaults(asked))):        # its own model may be there by now
        args = with_defaults(cli.parse(Args, description=__doc__, saved={**saved, "resume": True}))
    named = any(word.split("=")[0] == "--name" for word in sys.argv)
    if not (args.resume or named) and saved.get("data", args.data) != args.data and (run / "model.safetensors").exists():
        raise UserError(f"{run} holds a model trained on {' '.join(saved['data'])}, which this training would replace: give the new one "
                        f"another --name (or --name {args.name} to replace it)")
    if args.seed >= 1 << 43:
        raise UserError(f"--seed {args.seed}: expected less than 2**43; every step makes its own of it")
    cli.at_least(args, seed=0, steps=0, lr=0, batch=0, batch_tokens=0, accumulate=1, checkpoint_every=1)
    if args.shard and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        raise UserError("--shard spreads the model over processes: start them with torchrun --nproc_per_node N train.py --shard")
    for flag_name in ("init", "encoder"):
        folder = getattr(args, flag_name)
        if folder and not args.resume and not (Path(folder) / "model.safetensors").exists():
            raise UserError(f"--{flag_name} {folder}: no trained model there (model.safetensors is missing)")
    if (args.clap or args.encoder) and not args.lm:
        raise UserError("--clap and --encoder are the ears of a new model on --lm DIR; with --init RUN a whole model goes on learning")
    if args.lm and args.init:
        raise UserError("--lm makes a new model and --init goes on with one: use one of the two")
    if args.clap and args.encoder:
        raise UserError("--clap and --encoder both name the window encoder: use one of the two")
    if args.lm and args.stage in ("pretrain", "sft") and not (args.clap or args.encoder):
        raise UserError(f"--lm {args.lm} --stage {args.stage}: name a trained window encoder, --clap FILE or --encoder RUN; "
                        "without --stage one is trained first")
    return args


def stages_of(args: Args) -> tuple[str, ...]:
    """The stage asked for, or all but those that the given published or trained parts make superfluous."""
    if args.stage != "all":
        return (args.stage,)
    return tuple(s for s in ALL_STAGES if not (s == "lm" and args.lm or s == "clap" and (args.clap or args.encoder)))


def main() -> None:
    args, world = parse_arguments(), World.start()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False    # nothing reads it, and filling it takes time
    scenes = Path("data/scenes")
    if str(scenes) in args.data and not (scenes / "card.json").exists() and world.rank == 0:
        from prepare_data import prepare_scenes
        prepare_scenes(scenes)
    world.wait()
    folders, run = data.parse_data(args.data), Path("runs") / args.name
    with cli.alone(run, "--name") if world.rank == 0 else contextlib.nullcontext():
        train(args, world, folders, run)


def train(args: Args, world: World, folders, run: Path) -> None:
    """All stages, the run folder, its scores."""
    stages = stages_of(args)
    found, state = where_to_go_on(args, run) if args.resume else (None, {"stage": stages[0], "step": 0})
    left = stages[stages.index(state["stage"]):]
    if "clap" in left and (batch := stage_settings(args, "clap").batch) % (4 * world.size):
        raise UserError(f"--batch {batch}: the clap stage needs a multiple of 4 windows a process ({world.size} processes)")
    tokenizer, config, weights = start_from(args, folders, run, world)
    torch.manual_seed(args.seed)
    everything = Everything(config).to(world.device)
    if found:
        if world.rank == 0:
            checkpoint.cut_log(run, ALL_STAGES, state)
            if found.name != "checkpoint":
                shutil.rmtree(run / "checkpoint", ignore_errors=True)        # damaged: --resume uses an older one
        checkpoint.load_weights(found, everything, world.device)
    elif weights:
        checkpoint.load_strictly(everything.model, weights, args.init or args.lm)
        if args.init and (tower := Path(args.init) / checkpoint.TEXT_TOWER).exists():
            checkpoint.load_strictly(everything.text_tower, checkpoint.read_tensors(tower, world.device), tower)
    del weights
    lighten(everything, args)
    draw, started, lines = Drawing(run), time.time(), []
    for stage in left:
        first = state["step"] if stage == state["stage"] else 0
        c = stage_settings(args, stage)
        if first < c.steps:
            objective = (ClapStage(everything, folders, tokenizer, c, args, world) if stage == "clap" else
                         TextStage(stage, everything, folders, tokenizer, c, args, world))
            trainer = Trainer(stage, everything, objective, c, args, world)
            meter = trainer.run(first, run, found, draw if world.rank == 0 else lambda: None)
            lines.append(meter.line(sum(p.numel() for p in trainer.parameters), world))
            if trainer.sharded:                                    # the next stage trains other weights: gather them, shard anew
                everything = unsharded(everything, Everything(config).to(world.device))
                lighten(everything, args)
            objective = trainer = None                             # before the next stage reads its rows
            cli.return_freed_memory()
    if world.size > 1:
        dist.destroy_process_group()
    if world.rank > 0:
        return
    with checkpoint.writing(run):
        if "clap" in stages:
            checkpoint.write_tensors(run / checkpoint.TEXT_TOWER, everything.text_tower.state_dict())
        checkpoint.save_run(run, everything.model, config, tokenizer, {"args": asdict(args) if lines else training_of(run)})
    print(f"{run}: " + (footer(everything, lines, time.time() - started, world) if lines else "all steps were done before, nothing was trained"))
    if args.evaluate:
        everything = None                                          # scoring needs its memory
        cli.return_freed_memory()
        from af_min import evaluate
        evaluate.report(run, folders)


class Drawing:
    """Draws report.png with the loss curves so far, when `every` seconds have passed."""
    every = 300.0                                                  # seconds

    def __init__(self, run: Path):
        self.run, self.last = run, time.time()

    def __call__(self) -> None:
        if time.time() - self.last > self.every:
            from af_min import plots
            plots.losses(self.run)
            self.last = time.time()


def where_to_go_on(args: Args, run: Path) -> tuple[Path, dict]:
    """The run's last checkpoint, and the stage and step that it stands at."""
    last = checkpoint.find_checkpoint(run, ALL_STAGES, warn=int(os.environ.get("RANK", 0)) == 0)
    if not last:
        raise UserError(f"--resume: {run} holds no checkpoint; leave out --resume to start")
    found, state = last
    if state["stage"] not in stages_of(args):
        raise UserError(f"--resume --stage {args.stage}: {run} stopped in stage {state['stage']}; go on with that --stage, or with all")
    return found, state


def check_rows(folders, args: Args, tokenizer, config) -> None:
    """UserError for missing rows or recordings, and where every answer is too long, before an earlier run of this name is removed. What
    serves sft serves lm and pretrain."""
    stages = stages_of(args)
    for stage in dict.fromkeys((stages[0], stages[-1])):
        rows = {folder: data.rows_of(folder, "train", stage) for folder, _ in folders}
        if not any(rows.values()):
            raise UserError(f"--stage {stage}: no row of its kind in {', '.join(map(str, rows))}; your own recordings teach a trained model: "
                            "--stage sft --init RUN")
        for folder in rows:
            for file in dict.fromkeys(file for file, _ in manifest.recordings(rows[folder])):
                if stage != "lm" and not (folder / file).exists():         # lm reads what they sound like
                    raise UserError(f"{folder / file}: is not there; the manifest names it, so prepare the data set again")
        limit = min(stage_settings(args, stage).max_tokens, config.lm.max_positions)
        if stage != "clap" and not any(data.tokenized([row], tokenizer, limit, stage == "lm")[0] for of in rows.values() for row in of):
            raise UserError(f"{', '.join(map(str, rows))}: every answer ends beyond the {limit} tokens of a sample: shorten them")


def start_from(args: Args, folders, run: Path, world: World):
    """-> tokenizer, configuration, weights (None: random, or in the checkpoint): of the interrupted run, of --init, of --lm, or new."""
    weights, home = None, run if args.resume else Path(args.init) if args.init else None
    if home:
        tokenizer, config = checkpoint.load_tokenizer(home), checkpoint.load_config(home)
        config = replace(config, pool_windows=config.pool_windows or args.pool_windows)
        if not args.resume:
            weights = checkpoint.read_tensors(home / "model.safetensors", world.device)
    elif args.lm:
        config, tokenizer, weights = published_parts(args)
    else:
        tokenizer, config = make_tokenizer(folders, PRESETS[args.preset].lm.vocab_size), PRESETS[args.preset]
        config = replace(config, lm=replace(config.lm, vocab_size=tokenizer.vocab_size), audio_id=tokenizer.audio_id,
                         pool_windows=args.pool_windows)
    if world.rank == 0 and not args.resume:
        if not home and args.stage in ("pretrain", "sft") and not args.lm:
            print(f"warning: --stage {args.stage} without --init, and {run} holds no model: it begins with an encoder and a language "
                  "model that have learned nothing; without --stage they are trained first", file=sys.stderr)
        if (run / "config.json").exists():
            check_rows(folders, args, tokenizer, config)
        with checkpoint.writing(run):
            run.mkdir(parents=True, exist_ok=True)
            checkpoint.forget(run, but_weights=bool(home) and home.resolve() == run.resolve())
            checkpoint.save_settings(run, config, tokenizer, {"args": asdict(args)})
            if home and not (run / checkpoint.TEXT_TOWER).exists() and (home / checkpoint.TEXT_TOWER).exists():
                shutil.copy(home / checkpoint.TEXT_TOWER, run)
    world.wait()
    return tokenizer, config, weights


def published_parts(args: Args):
    """A new model on a published language model: configuration, tokenizer, state dict. Its ears: --clap's, --encoder's, or random.

    Its attention gates start nearly closed, at tanh(0.1), and not at 0 as in the paper: what is heard then has a gradient from the first step.
    """
    from af_min.pretrained import new_model
    base = checkpoint.load_config(Path(args.encoder)) if args.encoder else PRESETS[args.preset]
    base = replace(base, pool_windows=args.pool_windows, representation=replace(base.representation, attend_padding=False),
                   xattn=replace(base.xattn, gate_init=0.1))
    config, tokenizer, weights = new_model(args.clap or None, args.lm, slots=base.representation.max_audios, seed=args.seed, base=base)
    if args.encoder:
        heard = checkpoint.read_tensors(Path(args.encoder) / "model.safetensors")
        weights |= {name: value for name, value in heard.items() if name.startswith(("encoder.", "representation."))}
    return config, tokenizer, weights


if __name__ == "__main__":
    cli.run(main)

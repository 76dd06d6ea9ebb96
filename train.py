"""Train Audio Flamingo, every stage.

    python train.py                          everything from nothing: embedded data, preset tiny, all stages, scores
    python train.py --resume                 go on where an interrupted training stopped, with the flags it was started with
    python train.py --stage sft --init runs/tiny --data data/mine --name mine
    python train.py --lm smollm2 --encoder runs/tiny --name smol            on a published language model; or with --clap FILE
    torchrun --nproc_per_node 2 train.py     the same on several processes (gloo on CPUs, nccl on GPUs)

Stages (paper section 4), each on what the one before it left:
    clap      contrastive audio-text training of the window encoder        (not needed with published CLAP weights)
    lm        text-only training of the language model, sounds described in words      (nor with a published LM)
    pretrain  representation and cross-attention layers learn, encoder and LM are frozen
    sft       everything but the encoder learns: single, few-shot and dialogue samples
"""
from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # before torch starts its pools: two pools at once cost 2 to 3 times
    os.environ.setdefault(variable, str(max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)))

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from af_min import audio, checkpoint, cli, data, manifest, text
from af_min.cli import UserError, flag
from af_min.clap import TextTower, contrastive_loss
from af_min.config import PRESETS, STAGES, StageConfig
from af_min.flamingo import AudioFlamingo
from af_min.store import Store

ALL_STAGES = ("clap", "lm", "pretrain", "sft")


@dataclass(frozen=True)
class Args:
    stage: str = flag("all", "which stage to train", choices=(*ALL_STAGES, "all"))
    preset: str = flag("", "dimensions and training settings (default: tiny; with --clap af1)", choices=tuple(PRESETS))
    data: list[str] = flag(["data/scenes"], "prepared data sets, folder or folder:weight", nargs="+")
    name: str = flag("tiny", "the run is written to runs/NAME")
    init: str = flag("", "start from the weights and tokenizer of this run folder")
    lm: str = flag("", "new model on this published language model: folder of an OPT, Llama or Qwen2")
    clap: str = flag("", "with --lm: published window encoder, clapcap_weights_2023.pth")
    encoder: str = flag("", "with --lm: window encoder, and dimensions of all but the language model, of this run folder")
    resume: bool = flag(False, "go on from the last checkpoint of runs/NAME")
    seed: int = flag(0, "seed of weights and data order")
    steps: int = flag(0, "training steps of the stage (0: the preset's)")
    lr: float = flag(0.0, "peak learning rate of the stage (0: the preset's)")
    batch: int = flag(0, "samples of the global batch (0: the preset's)")
    batch_tokens: int = flag(0, "padded tokens of the global batch, at most (0: the preset's)")
    accumulate: int = flag(1, "parts that a process splits its share of the batch into, to save memory")
    pool_windows: bool = flag(False, "ablation: one mean vector an audio instead of its windows")
    checkpoint_every: int = flag(100, "steps from one checkpoint to the next")
    evaluate: bool = flag(True, "score the result on the test split and draw report.png")


class Everything(nn.Module):
    """What training keeps: the model, and the text tower that only the clap stage and text retrieval need."""

    def __init__(self, config):
        super().__init__()
        self.model = AudioFlamingo(config)
        self.text_tower = TextTower(config.clap, config.lm.vocab_size)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def learns(self, stage: str) -> list[nn.Module]:
        """The modules whose parameters move in a stage."""
        m = self.model
        return {"clap": [m.encoder, self.text_tower, self], "lm": [m.lm], "pretrain": [m.representation, m.xattn],
                "sft": [m.representation, m.xattn, m.lm]}[stage]

    def freeze_but(self, stage: str) -> list[nn.Parameter]:
        chosen = [p for module in self.learns(stage) if module is not self for p in module.parameters()]
        chosen += [self.log_scale] * (stage == "clap")
        moving = {id(p) for p in chosen}
        for p in self.parameters():
            p.requires_grad_(id(p) in moving)
        return chosen


# ---------------------------------------------------------------------- processes

@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @classmethod
    def start(cls) -> "World":
        """One process alone, or one of those that torchrun started."""
        cuda = torch.cuda.is_available()
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(max(1, int(os.environ["OMP_NUM_THREADS"])))
        if size > 1:
            dist.init_process_group("nccl" if cuda else "gloo")
        return cls(rank, size, device)

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Add up gradients over processes, in one message; a parameter that took no part counts as 0."""
        if self.size == 1:
            return
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])
        dist.all_reduce(flat)
        for p, g in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad = g.view_as(p).clone()

    def sum(self, value: float) -> float:
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device="cpu" if self.device.type == "cpu" else self.device)
        dist.all_reduce(total)
        return float(total)

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


def rate(step: int, c: StageConfig) -> float:
    """Learning rate of a step (0, 1, ...): linear warm-up, then constant, or linear down to a twentieth."""
    if step < c.warmup:
        return c.lr * (step + 1) / c.warmup
    if not c.decay:
        return c.lr
    return c.lr * (1 - 0.95 * (step - c.warmup) / max(1, c.steps - c.warmup))


# ---------------------------------------------------------------------- losses

class ClapStage:
    """Windows and their captions; every process encodes its share, the loss compares all with all."""

    def __init__(self, everything: Everything, folders, tokenizer, c: StageConfig, args: Args, world: World):
        self.everything, self.tokenizer, self.world = everything, tokenizer, world
        self.config = everything.model.config.audio
        rows = [{**row, "audio": str(folder / row["audio"])} for folder, _ in folders
                for row in data.rows_of(folder, "train", "clap")]
        self.captions = data.WindowCaptions(rows, c.batch, args.seed)
        if c.batch % (4 * world.size):
            raise UserError(f"--batch {c.batch}: the clap stage needs a multiple of 4 windows a process ({world.size} processes)")
        self.waves = {path: (audio.load(path, self.config.sample_rate).samples * 32767).astype(np.int16)
                      for path in tqdm(sorted({r["audio"] for r in rows}), "reading recordings", disable=world.rank > 0)}
        everything.model.encoder.train()
        self._measure_mel_statistics(rows)

    @torch.no_grad()
    def _measure_mel_statistics(self, rows: list[dict]) -> None:
        """Mean and variance of every mel bin, measured once, so that no batch and no process has its own."""
        encoder = self.everything.model.encoder
        mel = encoder.log_mel(self.windows(rows[:: max(1, len(rows) // 1024)]).to(self.world.device)).flatten(0, 1)
        encoder.mel_norm.running_mean.copy_(mel.mean(0))
        encoder.mel_norm.running_var.copy_(mel.var(0))
        encoder.mel_norm.eval()

    def windows(self, rows: list[dict]) -> torch.Tensor:
        out = torch.zeros(len(rows), self.config.window_samples)
        for i, row in enumerate(rows):
            first = round(row["start"] * self.config.sample_rate)
            wave = self.waves[row["audio"]][first:first + self.config.window_samples]
            out[i, :len(wave)] = torch.from_numpy(wave.astype(np.float32) / 32767)
        return out

    def parts(self, step: int):
        """One part: contrastive loss does not split into parts of a batch."""
        rows = self.captions.batch(step)
        ids = [self.tokenizer.encode(r["answer"]) for r in rows]
        labels = {answer: i for i, answer in enumerate(sorted({r["answer"] for r in rows}))}
        label_B = torch.tensor([labels[r["answer"]] for r in rows], device=self.world.device)
        mine = slice(self.world.rank * len(rows) // self.world.size, (self.world.rank + 1) * len(rows) // self.world.size)
        longest = max(map(len, ids))
        ids_BT = torch.tensor([i + [0] * (longest - len(i)) for i in ids[mine]], device=self.world.device)
        mask_BT = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i in ids[mine]], device=self.world.device)

        def loss():
            e = self.everything
            heard = e.model.encoder(self.windows(rows[mine]).to(self.world.device))
            read = e.text_tower(ids_BT, mask_BT)
            if self.world.size > 1:
                from torch.distributed.nn.functional import all_gather
                heard, read = torch.cat(all_gather(heard)), torch.cat(all_gather(read))
            return contrastive_loss(heard, read, e.log_scale.clamp(max=math.log(100)), label_B) / self.world.size
        yield loss


class TextStage:
    """lm, pretrain and sft: mean negative log-likelihood of the supervised tokens of the global batch."""

    def __init__(self, stage: str, everything: Everything, folders, tokenizer, c: StageConfig, args: Args, world: World):
        self.model, self.tokenizer, self.world, self.accumulate = everything.model, tokenizer, world, args.accumulate
        self.stage, self.width = stage, self.model.config.clap.out_width
        datasets = []
        for folder, weight in folders:
            rows = data.rows_of(folder, "train", stage)
            store = None if stage == "lm" else embed(self.model, folder, rows, world)
            samples = data.tokenized(rows, tokenizer, min(c.max_tokens, self.model.config.lm.max_positions), stage == "lm")
            datasets.append(data.Dataset(str(folder), samples, store, weight))
        self.mixture = data.Mixture(datasets, c.batch, c.batch_tokens, args.seed)
        everything.train()
        self.model.encoder.eval()

    def parts(self, step: int):
        batch = self.mixture.batch(step)
        total = sum(label != text.IGNORE for part in batch for d, i in part for label in self.mixture.datasets[d].samples[i].labels[1:])
        for part in batch:
            mine = part[self.world.rank::self.world.size]
            for n in range(self.accumulate):
                if places := mine[n::self.accumulate]:
                    yield lambda places=places: self.loss(places, total)

    def loss(self, places, total: int) -> torch.Tensor:
        batch = self.mixture.collate(places, self.tokenizer.pad_id, self.width).to(self.world.device)
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.world.device.type == "cuda"):
            heard = None if self.stage == "lm" else self.model.listen(batch.windows_AWD, batch.n_windows_BN)
            nll = self.model(batch.ids_BT, batch.labels_BT, heard)
        return nll.sum() / total


def embed(model: AudioFlamingo, folder: Path, rows: list[dict], world: World) -> Store:
    """The store of a data set's window embeddings; process 0 computes what is missing."""
    model.encoder.eval()
    config = model.config
    if world.rank == 0:
        Store(folder, model.encoder, config.audio, config.clap.out_width).add(
            data.recordings(rows), lambda todo: tqdm(todo, f"encoding {folder}", unit="rec", disable=not todo))
    world.wait()
    store = Store(folder, model.encoder, config.audio, config.clap.out_width)
    store.add(data.recordings(rows))
    return store


# ---------------------------------------------------------------------- the loop

def train_stage(stage: str, first_step: int, everything: Everything, objective, c: StageConfig, args: Args, world: World,
                run: Path, state: dict) -> None:
    """Steps first_step .. c.steps of one stage: gradients summed over parts and processes, clipped, one AdamW step."""
    parameters = everything.freeze_but(stage)
    matrices, vectors = ([p for p in parameters if (p.ndim > 1) == many] for many in (True, False))
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": c.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
                                  lr=c.lr, betas=(0.9, 0.95), fused=True)
    if first_step and (found := checkpoint.find_checkpoint(run)):
        checkpoint.load_optimizer(optimizer, checkpoint.read_tensors(found / "optimizer.safetensors", world.device))
    moving = sum(p.numel() for p in parameters)
    bar = tqdm(range(first_step, c.steps), f"{stage:8s} ({moving / 1e6:.2f} M learn)", initial=first_step, total=c.steps,
               disable=world.rank > 0, unit="step", mininterval=0.5, smoothing=0.05)
    smooth, started = None, time.time()
    with open(run / "log.jsonl", "a") if world.rank == 0 else open(os.devnull, "w") as log:
        for step in bar:
            torch.manual_seed(args.seed * 1_000_003 + step)  # what dropout draws depends on the step alone
            for group in optimizer.param_groups:
                group["lr"] = rate(step, c)
            optimizer.zero_grad(set_to_none=True)
            loss = 0.0
            for part in objective.parts(step):
                part_loss = part()
                part_loss.backward()
                loss += float(part_loss.detach())
            loss = world.sum(loss)
            world.sum_gradients(parameters)
            norm = float(nn.utils.clip_grad_norm_(parameters, c.clip))
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise UserError(f"{stage} step {step}: loss {loss}, gradient norm {norm}; the last checkpoint is whole: "
                                "--resume with a lower --lr")
            optimizer.step()
            smooth = loss if smooth is None else 0.95 * smooth + 0.05 * loss
            bar.set_postfix_str(f"loss {smooth:.3f}", refresh=False)
            gates = [round(float(b.attn_gate.detach().tanh()), 4) for b in everything.model.xattn.values()]
            log.write(json.dumps({"stage": stage, "step": step, "loss": round(loss, 5), "lr": rate(step, c), "grad_norm": round(norm, 4),
                                  "gates": gates, "seconds": round(time.time() - started, 2)}) + "\n")
            if (step + 1) % args.checkpoint_every == 0 or step + 1 == c.steps:
                log.flush()
                if world.rank == 0:
                    checkpoint.save_checkpoint(run, everything, optimizer, {**state, "stage": stage, "step": step + 1})
                world.wait()


def make_tokenizer(folders, vocab_size: int) -> text.Tokenizer:
    """Trained on what the model is to read and write: prompts, answers, descriptions and turns of the training rows."""
    lines = []
    for folder, _ in folders:
        for row in manifest.read_rows(folder / "train.jsonl"):
            parts = [row, *row.get("shots", [])[:1], *row.get("turns", [])]  # one made-up word a row is enough
            lines += [part[k].lower() for part in parts for k in ("prompt", "answer", "description", "user", "assistant") if k in part]
    return text.Tokenizer.train(lines, vocab_size)


def stage_settings(args: Args, stage: str) -> StageConfig:
    c = STAGES[args.preset][stage]
    return replace(c, steps=args.steps or c.steps, lr=args.lr or c.lr, batch=args.batch or c.batch,
                   batch_tokens=args.batch_tokens or c.batch_tokens, warmup=min(c.warmup, max(1, (args.steps or c.steps) // 5)))


def prepare(args: Args, world: World) -> None:
    """The embedded data set is made where it is asked for and missing."""
    if "data/scenes" in args.data and not Path("data/scenes/card.json").exists() and world.rank == 0:
        from prepare_data import prepare_scenes
        prepare_scenes(Path("data/scenes"))
    world.wait()


def parse_arguments() -> Args:
    """The command line; with --resume, flags that are not named have the values that the run was started with."""
    args = cli.parse(Args, description=__doc__)
    started = Path("runs") / args.name / "config.json"
    if args.resume and started.exists():
        saved = {**checkpoint.read_json(started).get("training", {}).get("args", {}), "resume": True}
        args = cli.parse(Args, description=__doc__, saved=saved)
    args = replace(args, preset=args.preset or ("af1" if args.clap else "tiny"))
    cli.at_least(args, seed=0, steps=0, lr=0, batch=0, batch_tokens=0, accumulate=1, checkpoint_every=1)
    for flag_name in ("init", "encoder"):
        folder = getattr(args, flag_name)
        if folder and not (Path(folder) / "model.safetensors").exists():
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
    """The stage asked for, or all but those whose work the given parts have behind them."""
    if args.stage != "all":
        return (args.stage,)
    return tuple(s for s in ALL_STAGES if not (s == "lm" and args.lm or s == "clap" and (args.clap or args.encoder)))


def main() -> None:
    args, world = parse_arguments(), World.start()
    torch.use_deterministic_algorithms(True, warn_only=True)
    prepare(args, world)
    folders, run, stages = data.parse_data(args.data), Path("runs") / args.name, stages_of(args)
    found, state = where_to_go_on(args, run) if args.resume else (None, {"stage": stages[0], "step": 0})
    tokenizer, config, weights = start_from(args, folders, run, world)
    torch.manual_seed(args.seed)
    everything = Everything(config).to(world.device)
    if found:
        if world.rank == 0:
            checkpoint.cut_log(run, ALL_STAGES, state)
        checkpoint.load_strictly(everything, checkpoint.read_tensors(found / "model.safetensors", world.device), found)
    elif weights:
        checkpoint.load_strictly(everything.model, weights, args.init or args.lm)
    del weights
    started = time.time()
    for stage in stages[stages.index(state["stage"]):]:
        first = state["step"] if stage == state["stage"] else 0
        c = stage_settings(args, stage)
        if first < c.steps:
            objective = (ClapStage(everything, folders, tokenizer, c, args, world) if stage == "clap" else
                         TextStage(stage, everything, folders, tokenizer, c, args, world))
            train_stage(stage, first, everything, objective, c, args, world, run, {})
    if world.rank == 0:
        if "clap" in stages:
            checkpoint.write_tensors(run / checkpoint.TEXT_TOWER, everything.text_tower.state_dict())
        checkpoint.save_run(run, everything.model, config, tokenizer, {"args": asdict(args)})
        total = sum(p.numel() for p in everything.model.parameters())
        print(f"{run}: {total / 1e6:.2f} M parameters, trained in {time.time() - started:.0f} s on {world.size} x {world.device}, "
              f"torch {torch.__version__}")
        if args.evaluate:
            from af_min import evaluate
            evaluate.report(run, folders)
    if world.size > 1:
        dist.destroy_process_group()


def where_to_go_on(args: Args, run: Path) -> tuple[Path, dict]:
    """The run's last checkpoint, and the stage and step that it stands at."""
    found = checkpoint.find_checkpoint(run)
    if not found:
        raise UserError(f"--resume: {run} holds no checkpoint; leave the flag away to start")
    state = checkpoint.read_json(found / "state.json")
    if not isinstance(state, dict) or state.get("stage") not in ALL_STAGES or not isinstance(state.get("step"), int):
        raise UserError(f"{found / 'state.json'}: got {state}, expected a stage and a step; leave --resume away to start anew")
    if state["stage"] not in stages_of(args):
        raise UserError(f"--resume --stage {args.stage}: {run} stopped in stage {state['stage']}; go on with that --stage, or with all")
    return found, state


def start_from(args: Args, folders, run: Path, world: World):
    """-> tokenizer, configuration, weights (None: random, or in the checkpoint), of the interrupted run, --init, --lm, or new ones."""
    weights, home = None, run if args.resume else Path(args.init) if args.init else None
    if home:
        tokenizer, config = checkpoint.load_tokenizer(home), checkpoint.load_config(home)
        if not args.resume:
            weights = checkpoint.read_tensors(home / "model.safetensors", world.device)
    elif args.lm:
        config, tokenizer, weights = published_parts(args)
    else:
        tokenizer, config = make_tokenizer(folders, PRESETS[args.preset].lm.vocab_size), PRESETS[args.preset]
        config = replace(config, lm=replace(config.lm, vocab_size=tokenizer.vocab_size), audio_id=tokenizer.audio_id,
                         pool_windows=args.pool_windows)
    if world.rank == 0 and not args.resume:
        run.mkdir(parents=True, exist_ok=True)
        checkpoint.forget(run)
        checkpoint.save_settings(run, config, tokenizer, {"args": asdict(args)})
        if not home or home.resolve() != run.resolve():
            (run / checkpoint.TEXT_TOWER).unlink(missing_ok=True)
            if args.init and (home / checkpoint.TEXT_TOWER).exists():
                shutil.copy(home / checkpoint.TEXT_TOWER, run)
    world.wait()
    return tokenizer, config, weights


def published_parts(args: Args):
    """A new model on a published language model: configuration, tokenizer, state dict. Its encoder: --clap's, --encoder's, or random."""
    from af_min.pretrained import new_model
    base = checkpoint.load_config(Path(args.encoder)) if args.encoder else PRESETS[args.preset]
    base = replace(base, pool_windows=args.pool_windows, representation=replace(base.representation, attend_padding=False),
                   xattn=replace(base.xattn, gate_init=0.0))         # training starts from the unchanged language model
    config, tokenizer, weights = new_model(args.clap or None, args.lm, slots=base.representation.max_audios, seed=args.seed, base=base)
    if args.encoder:
        heard = checkpoint.read_tensors(Path(args.encoder) / "model.safetensors")
        weights |= {name: value for name, value in heard.items() if name.startswith("encoder.")}
    return config, tokenizer, weights


if __name__ == "__main__":
    cli.run(main)

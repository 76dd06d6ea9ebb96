"""What each stage of training learns, and its loss. engine.py runs the steps; train.py says in which order.

    clap                symmetric cross-entropy over cosine similarities of windows and captions (clap.py)
    lm, pretrain, sft   - sum log p(supervised token) / number of supervised tokens of the *global* batch

so that a token weighs the same on whatever process and in whatever part of the batch it is. (Paper, equations 1 to 3: the weights of
its data sets are shares of the samples drawn here, data.py.)
"""
from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from kernels.linear import HAS_BFLOAT16, bfloat16_products

from . import audio, data, manifest, text
from .clap import TextTower, contrastive_loss
from .cli import UserError
from .config import StageConfig
from .flamingo import AudioFlamingo
from .store import Store


class Everything(nn.Module):
    """All that is trained: the model; the text tower, which only the clap stage and dialogue_filter.py need; that stage's scale."""

    def __init__(self, config):
        super().__init__()
        self.model = AudioFlamingo(config)
        self.text_tower = TextTower(config.clap, config.lm.vocab_size)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))        # start and bound (below): CLIP's, arXiv 2103.00020

    def freeze_but(self, stage: str) -> list[nn.Parameter]:
        """The parameters that learn in a stage; the others get no gradient."""
        m = self.model
        modules = {"clap": [m.encoder, self.text_tower], "lm": [m.lm], "pretrain": [m.representation, m.xattn],
                   "sft": [m.representation, m.xattn, m.lm]}[stage]
        chosen = [p for module in modules for p in module.parameters()] + [self.log_scale] * (stage == "clap")
        moving = {id(p) for p in chosen}
        for p in self.parameters():
            p.requires_grad_(id(p) in moving)
        return chosen

    def forward(self, batch: data.Batch, listening: bool) -> torch.Tensor:
        """Negative log-likelihood of every supervised token; without listening, of the language model alone."""
        heard = self.model.listen(batch.windows_AWD, batch.n_windows_BN) if listening else None
        return self.model(batch.ids_BT, batch.labels_BT, heard)


def in_half(device: torch.device, float32: bool) -> bool:
    """Training multiplies in bfloat16 where the device has it and nobody has asked for --float32."""
    return not float32 and (device.type == "cuda" or device.type == "cpu" and HAS_BFLOAT16)


def half_precision(device: torch.device, float32: bool):
    """Context of a forward pass: autocast to bfloat16 on a GPU, products alone in bfloat16 on a CPU (kernels/linear.py)."""
    half = in_half(device, float32)
    return bfloat16_products(half) if device.type == "cpu" else torch.autocast(device.type, torch.bfloat16, enabled=half)


@dataclass
class Step:
    """One global batch: this process's share of the work, and sizes of the whole."""
    parts: list[tuple[list[str], Callable[[], tuple[torch.Tensor, torch.Tensor]]]]    # names of samples; () -> loss, its sums per task
    counts: list[int]        # per task: supervised tokens, by which its sum is divided
    samples: int
    tokens: int = 0          # without padding
    padded: int = 0          # with padding
    flops: float = 0.0       # of forward and backward: products with weights alone, padding not counted


class ClapStage:
    """Windows and their captions. Every process encodes its share; the loss compares every window with every caption."""
    tasks = ["WindowText"]

    def __init__(self, everything: Everything, folders, tokenizer, c: StageConfig, args, world):
        self.everything, self.tokenizer, self.world, self.float32 = everything, tokenizer, world, args.float32
        self.config = everything.model.config.audio
        rows = [{**row, "audio": str(folder / row["audio"]), "answer": row.get("answer") or row["answers"][0]} for folder, _ in folders
                for row in data.rows_of(folder, "train", "clap")]
        self.captions = data.WindowCaptions(rows, c.batch, args.seed)
        self.waves = {path: (audio.load(path, self.config.sample_rate).samples * 32767).astype(np.int16)
                      for path in tqdm(sorted({r["audio"] for r in rows}), "reading recordings", disable=world.rank > 0)}
        everything.model.encoder.train()
        self._measure_mel_statistics(rows)

    @torch.no_grad()
    def _measure_mel_statistics(self, rows: list[dict]) -> None:
        """Mean and variance of every mel bin, measured once, on 1024 to 2047 windows if there are so many; equal for all batches and processes."""
        encoder = self.everything.model.encoder
        mel = encoder.log_mel(self.windows(rows[:: max(1, len(rows) // 1024)]).to(self.world.device)).flatten(0, 1)
        encoder.mel_norm.running_mean.copy_(mel.mean(0))
        encoder.mel_norm.running_var.copy_(mel.var(0))
        encoder.mel_norm.eval()

    def windows(self, rows: list[dict]) -> torch.Tensor:
        """(A, S): the window of every row, padded with zeros."""
        out = torch.zeros(len(rows), self.config.window_samples)
        for i, row in enumerate(rows):
            first = round(row["start"] * self.config.sample_rate)
            wave = self.waves[row["audio"]][first:first + self.config.window_samples]
            out[i, :len(wave)] = torch.from_numpy(wave.astype(np.float32) / 32767)
        return out

    def step(self, number: int) -> Step:
        """A batch in one part: a contrastive loss needs all pairs at once."""
        rows, world = self.captions.batch(number), self.world
        ids = [self.tokenizer.encode(r["answer"]) for r in rows]
        labels = {answer: i for i, answer in enumerate(sorted({r["answer"] for r in rows}))}
        label_B = torch.tensor([labels[r["answer"]] for r in rows], device=world.device)
        mine = slice(world.rank * len(rows) // world.size, (world.rank + 1) * len(rows) // world.size)
        ids_BT, mask_BT = data.padded(ids), data.padded([[1] * len(row) for row in ids])

        def loss():
            e = self.everything
            with half_precision(world.device, self.float32):
                heard = e.model.encoder(self.windows(rows[mine]).to(world.device)).float()
                read = e.text_tower(ids_BT[mine].to(world.device), mask_BT[mine].to(world.device)).float()
            if world.size > 1:
                from torch.distributed.nn.functional import all_gather
                heard, read = torch.cat(all_gather(heard)), torch.cat(all_gather(read))
            value = contrastive_loss(heard, read, e.log_scale.clamp(max=math.log(100)), label_B) / world.size
            return value, value.detach()[None]
        names = [f"{r['audio']} from {r['start']:g} s" for r in rows[mine]]
        return Step([(names, loss)], [1], len(rows), sum(map(len, ids)), ids_BT.numel())


class TextStage:
    """lm, pretrain and sft: mean negative log-likelihood of the supervised tokens of the global batch."""

    def __init__(self, stage: str, everything: Everything, folders, tokenizer, c: StageConfig, args, world):
        self.everything, self.tokenizer, self.world = everything, tokenizer, world
        self.accumulate, self.in_step, self.listening, self.float32 = args.accumulate, args.shard, stage != "lm", args.float32
        model, datasets = everything.model, []
        for folder, weight in folders:
            rows = data.rows_of(folder, "train", stage)
            store = embed(model, folder, rows, world) if self.listening else None
            limit = min(c.max_tokens, model.config.lm.max_positions)
            datasets.append(data.Dataset(str(folder), *data.tokenized(rows, tokenizer, limit, stage == "lm"), store, weight))
            answers = sum(len(row.get("answers", [0])) for row in rows)
            if (lost := answers - len(datasets[-1].samples)) and world.rank == 0:
                print(f"warning: {folder}: {lost} of {answers} answers end beyond {limit} tokens: nothing is learned from them", file=sys.stderr)
            most, slots = max((len(s.audios) for s in datasets[-1].samples), default=0), model.config.representation.max_audios
            if most > slots:
                raise UserError(f"{folder}: a row with {most} recordings, its shots included; this model takes {slots}: "
                                "write the shots again with af_min.retrieval")
        self.mixture = data.Mixture(datasets, c.batch, c.batch_tokens, args.seed)
        if self.in_step and self.listening and not all(s.audios for d in datasets for s in d.samples):
            raise UserError("--shard: a row without a recording: sharded processes must all listen; train on it without --shard")
        self.tasks = sorted({task for d in datasets for task in d.tasks})
        number = {task: i for i, task in enumerate(self.tasks)}
        self.task_of = [np.array([number[task] for task in d.tasks], np.int64) for d in datasets]
        self.answers_of = [np.array([sum(label != text.IGNORE for label in s.labels[1:]) for s in d.samples]) for d in datasets]
        everything.freeze_but(stage)
        self.flops = flops(everything, self.listening)
        everything.train()
        model.encoder.eval()

    def step(self, number: int) -> Step:
        """This process's share of every part of the batch, each in `accumulate` pieces."""
        batch, parts, size = self.mixture.batch(number), [], self.world.size
        places = [place for part in batch for place in part]
        counts = np.bincount(self.task_of_tokens(places), minlength=len(self.tasks))
        for part in batch:
            for n in range(self.accumulate):
                share = part[self.world.rank::size][n::self.accumulate]
                if share or self.in_step:        # sharded processes work in step: one without a share computes a piece of weight 0
                    piece, weight = (share, 1.0) if share else (part[:1], 0.0)
                    parts.append(([self.name(*place) for place in piece],
                                  lambda piece=piece, weight=weight: self.loss(piece, weight, int(counts.sum()))))
        lengths = [[self.mixture.lengths[d][i] for d, i in part] for part in batch]
        tokens = int(sum(map(sum, lengths)))
        return Step(parts, counts.tolist(), len(places), tokens, int(sum(max(part) * len(part) for part in lengths)),
                    tokens * self.flops[0] + int(counts.sum()) * self.flops[1])

    def task_of_tokens(self, places) -> np.ndarray:
        """The number of the task of every supervised token, sample after sample."""
        return np.repeat([self.task_of[d][i] for d, i in places], [self.answers_of[d][i] for d, i in places])

    def name(self, d: int, i: int) -> str:
        dataset = self.mixture.datasets[d]
        return f"{dataset.tasks[i]} {' '.join(file for file, _ in dataset.samples[i].audios)}"

    def loss(self, places, weight: float, total: int) -> tuple[torch.Tensor, torch.Tensor]:
        config, device = self.everything.model.config, self.world.device
        batch = self.mixture.collate(places, self.tokenizer.pad_id, config.clap.out_width).to(device)
        with half_precision(device, self.float32):
            nll = self.everything(batch, self.listening)
        sums = torch.zeros(len(self.tasks), dtype=nll.dtype, device=device)
        sums.index_add_(0, torch.from_numpy(self.task_of_tokens(places)).to(device), nll.detach())
        return nll.sum() / total * weight, sums * weight


def flops(everything: Everything, listening: bool) -> tuple[float, float]:
    """FLOPs per text token, and more per supervised token (the head): for each weight 2 forward, 2 backward, 2 more where it learns."""
    def cost(*parameters: nn.Parameter) -> float:
        return sum(p.numel() * (6 if p.requires_grad else 4) for p in parameters if p.ndim == 2)
    m = everything.model
    reading = cost(*m.lm.layers.parameters()) + (cost(*m.xattn.parameters()) if listening else 0)
    return reading, cost((m.lm.head or m.lm.embed).weight)


def embed(model: AudioFlamingo, folder: Path, rows: list[dict], world) -> Store:
    """The store of a data set's window embeddings; the processes share the encoding of those still missing. Always in float32, so that
    embeddings of the same encoder are the same in every stage."""
    model.encoder.eval()
    store = Store(folder, model.encoder, model.config.audio, model.config.clap.out_width)
    store.add(manifest.recordings(rows), f"encoding {folder}", rank=world.rank, size=world.size, wait=world.wait)
    return store

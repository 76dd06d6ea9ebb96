"""The paper's claims, measured on a family of small models.

    OMP_NUM_THREADS=1 python -m af_min.evaluate --claims               99 minutes on one core of a busy machine

The table stands in runs/claims/claims.txt from the first finished model on. What is finished is not trained again when the command
is given again, what was interrupted goes on.

Per seed one window encoder and one language model (stages clap, lm), and from there, on everything but dialogues:

    windows        pretrain, sft                                        the model of the other comparisons
    pooled         the same with one mean vector an audio               does the order of windows matter?
    last, full     the same with another cross-attention mask           is seeing all audios so far better?
    straight       sft alone, for as many steps as both stages          does the pre-training stage help?
    chat           windows, then sft on the dialogues                   does dialogue fine-tuning make a chat model?

and `windows` is asked with 0 to 8 shots, nearest or random. The table gives mean and [lowest, highest] over the seeds; "above":
that every seed of the one scores higher than every seed of the other, else no difference was found. With few steps and small
models a missing difference says little about the paper's, and one that is found holds for this data set.
"""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import checkpoint, cli, manifest, metrics, scores
from .answering import Answerer
from .cli import UserError, flag

SCENES = {"AudioCaptioning": "caption in exact order", "After": "what comes after X", "Before": "what comes before X",
          "Count": "count all"}
EPISODES = {"FewShotSeen": "4 shots, classes seen", "FewShotUnseen": "4 shots, classes never seen"}
CLAIMS = [  # claim, {label: (model, measure)}; the first label is what the others are compared with
    *(("sliding windows", name, {"windows": ("windows", name), "pooled": ("pooled", name)}) for name in SCENES.values()),
    ("number of shots", "pool of 12, nearest", {str(k): ("windows", f"{k} nearest") for k in (0, 1, 2, 4, 8)}),
    ("retrieval", "pool of 12, 4 shots", {"nearest": ("windows", "4 nearest"), "random": ("windows", "4 random")}),
    *(("mask", name, {"block": ("windows", measure), "last": ("last", measure), "full": ("full", measure)})
      for name, measure in [*((name, name) for name in EPISODES.values()), ("pool of 12, 4 nearest", "4 nearest")]),
    *(("pre-training stage", name, {"with": ("windows", name), "without": ("straight", name)})
      for name in (*SCENES.values(), *EPISODES.values())),
    ("dialogue fine-tuning", "turns 2 to 4", {"before": ("windows", "dialogue"), "after": ("chat", "dialogue")}),
]


@dataclass(frozen=True)
class Args:
    claims: bool = flag(True, "this table")
    data: str = flag("data/scenes", "the embedded data set; made if it is missing")
    seeds: int = flag(3, "models of each kind")
    steps: list[int] = flag([300, 600, 150, 450, 100], "steps of clap, lm, pretrain, sft, chat; all else as in the preset", nargs=5)
    preset: str = flag("tiny", "dimensions and settings of train.py")
    items: int = flag(200, "items of each task (0: all)")
    out: str = flag("claims", "everything is written to runs/OUT")
    trainer: str = flag(str(Path(__file__).parents[1] / "train.py"), "script that trains; its tests have another one")


# ---------------------------------------------------------------------- training

def view(source: Path, target: Path, dialogues: bool, embeddings: Path) -> Path:
    """A data set of the source's recordings with its training rows that are dialogues, or are not. Embeddings are shared."""
    if not (target / manifest.CARD).exists():
        for folder in (target, embeddings):
            folder.mkdir(parents=True, exist_ok=True)
        for original in (source / "audio", source / "val.jsonl", source / "test.jsonl", embeddings):
            (target / original.name).unlink(missing_ok=True)
            os.symlink(original.resolve(), target / original.name)
        manifest.write_rows(target / "train.jsonl", (row for row in manifest.read_rows(source / "train.jsonl")
                                                     if row["task"] == "WindowText" or ("turns" in row) == dialogues))
        shutil.copy(source / manifest.CARD, target / manifest.CARD)
    return target


def train(args: Args, name: str, stage: str, steps: int, seed: int, folder: Path, start: str = "") -> str:
    """One stage as a run of its own, unless that run is finished -> its name below runs/OUT."""
    run = Path("runs") / args.out / name
    if (run / "model.safetensors").exists():
        return name
    command = [sys.executable, args.trainer, "--preset", args.preset, "--stage", stage, "--steps", str(steps), "--seed", str(seed),
               "--data", str(folder), "--name", f"{args.out}/{name}", "--no-evaluate"]
    command += ["--init", f"runs/{args.out}/{start}"] if start else []
    command += ["--resume"] if any((run / name).exists() for name in checkpoint.CHECKPOINTS) else []
    print(f"{name}: {steps} steps of {stage}", flush=True)
    if subprocess.run(command).returncode:
        raise UserError(f"runs/{args.out}/{name}: training failed (see above); the command goes on there when it is given again")
    for checkpoints in run.glob("checkpoint*"):
        shutil.rmtree(checkpoints)
    return name


def changed(args: Args, start: str, name: str, mask: str = "block", pool_windows: bool = False) -> str:
    """A copy of a run under another configuration with the same weights."""
    source, run = (Path("runs") / args.out / n for n in (start, name))
    if not (run / "model.safetensors").exists():
        run.mkdir(parents=True, exist_ok=True)
        values = checkpoint.read_json(source / "config.json")
        values["model"]["pool_windows"], values["model"]["xattn"]["mask"] = pool_windows, mask
        checkpoint.write_json(run / "config.json", values)
        shutil.copy(source / "tokenizer.model", run)
        shutil.copy(source / "model.safetensors", run / "partial")
        os.replace(run / "partial", run / "model.safetensors")
    return name


def family(args: Args, seed: int, single: Path, dialogues: Path) -> Iterator[tuple[str, str]]:
    """(model, its run) of one seed, each when it is trained."""
    clap, lm, pretrain, sft, chat = args.steps

    def go(name, stage, steps, start="", folder=single):
        return train(args, f"{seed}-{name}", stage, steps, seed, folder, start)

    base = go("lm", "lm", lm, go("clap", "clap", clap))
    variants = {"windows": {}, "pooled": {"pool_windows": True}, "last": {"mask": "last"}, "full": {"mask": "full"}}
    for name, settings in variants.items():
        start = changed(args, base, f"{seed}-{name}-start", **settings) if settings else base
        yield name, go(name, "sft", sft, go(f"{name}-pretrain", "pretrain", pretrain, start))
    yield "straight", go("straight", "sft", pretrain + sft, base)
    yield "chat", go("chat", "sft", chat, f"{seed}-windows", dialogues)


# ---------------------------------------------------------------------- scoring

def measured(args: Args, run: Path, folder: Path, wanted: set[str]) -> dict[str, float]:
    """The wanted measures of a run, from its claims.json where they stand for these items."""
    path = run / "claims.json"
    found = checkpoint.read_json(path, optional=True)
    found = found["scores"] if found.get("items") == args.items else {}
    if wanted <= set(found):
        return found
    tasks = scores.by_task(manifest.read_rows(folder / "test.jsonl"), args.items)
    answerer = Answerer.open(run, folder, [row for rows in tasks.values() for row in rows])
    task_of = {name: task for task, name in {**SCENES, **EPISODES}.items()}
    for measure in sorted(wanted - set(found)):
        if measure == "dialogue":
            rows, said = zip(*scores.dialogue_items(tasks["Dialogue"], answerer.answer))
        else:
            k, _, choice = measure.partition(" ")
            rows = tasks[task_of[measure]] if measure in task_of else \
                scores.with_pool_shots(tasks["Pool"], answerer.store, choice if k != "0" else "random", int(k))
            said = answerer.answer(rows)
        found[measure] = float(np.mean([metrics.exact(answer, [row["answer"]]) for row, answer in zip(rows, said)]))
    checkpoint.write_json(path, {"items": args.items, "scores": found})
    return found


def comparisons(found: dict[str, list[dict]]) -> list[tuple[str, str, dict[str, list[float]]]]:
    """(claim, name, {label: a score of each seed}) of the claims whose models are there, over the seeds that all of them have."""
    results = []
    for claim, name, cells in CLAIMS:
        if seeds := min(len(found.get(model, [])) for model, _ in cells.values()):
            results.append((claim, name, {label: [scored[measure] for scored in found[model][:seeds]]
                                          for label, (model, measure) in cells.items()}))
    return results


def verdict(values: dict[str, list[float]]) -> str:
    """The first label against each other one: `above` if the ranges over seeds do not meet."""
    first, *others = values
    if len(values[first]) == 1:
        return "one seed: no verdict"
    said = []
    for other in others:
        a, b = values[first], values[other]
        said.append(f"{first} above {other}" if min(a) > max(b) else f"{other} above {first}" if min(b) > max(a) else
                    f"no difference found between {first} and {other}")
    return "; ".join(said)


def row(claim: str, name: str, values: dict[str, list[float]]) -> str:
    cells = "  ".join(f"{label} {np.mean(v):.3f} [{min(v):.3f}, {max(v):.3f}]" for label, v in values.items())
    return f"{claim:21s} {name:27s} {cells}\n{'':22s}{'':28s}-> {verdict(values)}"


def draw(path: Path, results: list[tuple[str, str, dict[str, list[float]]]]) -> None:
    """A panel a comparison: a bar is the mean over seeds, a dot one seed."""
    from .plots import COLOURS, plt, save
    rows = -(-len(results) // 4)
    figure, panels = plt.subplots(rows, 4, figsize=(15, 2.6 * rows), layout="constrained", squeeze=False)
    for axes, (claim, name, values) in zip(panels.flat, results):
        for n, (label, v) in enumerate(values.items()):
            axes.bar(n, np.mean(v), color=COLOURS[n % len(COLOURS)], alpha=0.5)
            axes.scatter([n] * len(v), v, color="black", s=12, zorder=3)
        axes.set(ylim=(0, 1), title=f"{claim}: {name}")
        axes.title.set_fontsize(9)
        axes.set_xticks(range(len(values)), values)
    for axes in panels.flat[len(results):]:
        axes.axis("off")
    save(figure, path)


def main() -> None:
    args, started = cli.parse(Args, description=__doc__), time.time()
    cli.at_least(args, seeds=1, items=0)
    source, home = Path(args.data), Path("runs") / args.out
    if source == Path("data/scenes") and not (source / manifest.CARD).exists():
        subprocess.run([sys.executable, Path(__file__).parents[1] / "prepare_data.py"], check=True)
    settings = {"steps": args.steps, "preset": args.preset, "data": manifest.read_card(source)["sha256"]}
    if not any(r["task"] == "Pool" for r in manifest.read_rows(source / "test.jsonl")):
        raise UserError(f"--data {source}: the claims are measured on the embedded data set (python prepare_data.py)")
    home.mkdir(parents=True, exist_ok=True)
    if (home / "settings.json").exists() and checkpoint.read_json(home / "settings.json") != settings:
        raise UserError(f"{home}: holds models of other steps, preset or data; give another --out, or remove it")
    checkpoint.write_json(home / "settings.json", settings)
    single = view(source, home / "single", False, home / "embeddings")
    dialogues = view(source, home / "dialogues", True, home / "embeddings")
    found: dict[str, list[dict]] = defaultdict(list)
    for seed in range(args.seeds):
        for model, run in family(args, seed, single, dialogues):
            wanted = {measure for _, _, cells in CLAIMS for name, measure in cells.values() if name == model}
            found[model].append(measured(args, home / run, single, wanted))
            table = "\n".join(row(*result) for result in comparisons(found))
            (home / "claims.txt.partial").write_text(table + "\n")
            os.replace(home / "claims.txt.partial", home / "claims.txt")
            print(f"{home / run}: {found[model][-1]}; {home}/claims.txt, {time.time() - started:.0f} s", flush=True)
    print(table)
    draw(home / "claims.png", comparisons(found))
    print(f"{args.seeds} seeds, steps {args.steps}, {args.items or 'all'} items a task, greedy decoding, "
          f"{time.time() - started:.0f} s; {home}/claims.png")

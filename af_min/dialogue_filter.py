"""Keep the turns of dialogues that fit their recording (paper section 4.3: generated dialogues are filtered by CLAP similarity).

    python -m af_min.dialogue_filter --run runs/tiny --data data/mine                    the picture alone
    python -m af_min.dialogue_filter --run runs/tiny --data data/mine --threshold 0.2    and train.jsonl without the turns below

A turn fits as well as its answer a and the window w that suits it best:

    s = max_w cos(text tower(a), encoder(w))

The picture shows s of all turns beside s of the same turns with another recording: where the two part is a place for the threshold.
A turn that refers back to a dropped one stays if it fits by itself.

The text tower is trained in the clap stage and kept in <run>/text_tower.safetensors; runs made from published weights have none.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

from . import checkpoint, cli, manifest, plots
from .clap import TextTower
from .cli import UserError, flag
from .config import Config
from .data import padded
from .scores import swapped
from .store import Store


@dataclass(frozen=True)
class Args:
    run: str = flag("runs/tiny", "run folder with a text tower")
    data: str = flag("data/scenes", "prepared data set with dialogues")
    threshold: float = flag(-1.0, "drop training turns of less similarity (-1: drop none)")
    plot: str = flag("", "picture of the similarities (default: RUN/similarity-DATA.png)")


def load_text_tower(run: Path, config: Config) -> TextTower:
    """UserError if the run has none, or one of other dimensions."""
    path = Path(run) / checkpoint.TEXT_TOWER
    if not path.exists():
        raise UserError(f"{path}: missing: this run's window encoder was not trained here, or before text towers were kept; "
                        "train.py --stage clap writes it")
    tower = TextTower(config.clap, config.lm.vocab_size)
    checkpoint.load_strictly(tower, checkpoint.read_tensors(path), path)
    return tower.eval()


@torch.no_grad()
def read(tower: TextTower, tokenizer, texts: list[str], batch: int = 256) -> np.ndarray:
    """Texts -> vectors (N, D) of length 1."""
    out = []
    for first in range(0, len(texts), batch):
        ids = [tokenizer.encode(text.lower()) for text in texts[first:first + batch]]
        out.append(normalize(tower(padded(ids), padded([[1] * len(row) for row in ids])), dim=-1).numpy())
    return np.concatenate(out)


def similarities(tower: TextTower, tokenizer, store: Store, rows: list[dict]) -> tuple[list[list[float]], list[list[float]]]:
    """For every turn of every row s with the row's own recording, and with another one's."""
    answers = sorted({turn["assistant"] for row in rows for turn in row["turns"]})
    vector = dict(zip(answers, read(tower, tokenizer, answers)))

    def of(row: dict, other: dict) -> list[float]:
        windows_WD = np.asarray(store[other["audio"], other["start"]], np.float32)
        windows_WD /= np.linalg.norm(windows_WD, axis=1, keepdims=True).clip(1e-12)
        return [float((windows_WD @ vector[turn["assistant"]]).max()) for turn in row["turns"]]

    return [of(row, row) for row in rows], [of(row, other) for row, other in zip(rows, swapped(rows))]


def filtered(row: dict) -> bool:
    """Whether a row is a dialogue about a recording: no text for the language model alone, and no roll call of yes and no."""
    return "turns" in row and bool(row.get("audio")) and row["task"] != "RollCall"


def kept(rows: list[dict], own: list[list[float]], threshold: float) -> list[dict]:
    """Rows without the turns below the threshold; a row of which no turn is left is dropped."""
    turns = [[turn for turn, s in zip(row["turns"], of_row) if s >= threshold] for row, of_row in zip(rows, own)]
    return [{**row, "turns": left} for row, left in zip(rows, turns) if left]


def draw(path: Path, own: np.ndarray, other: np.ndarray, threshold: float) -> None:
    figure, axes = plots.plt.subplots(figsize=(7, 4), layout="constrained")
    bins = np.linspace(min(own.min(), other.min()), max(own.max(), other.max()), 60)
    axes.hist(other, bins, color=plots.COLOURS[1], alpha=0.6, label="with another recording")
    axes.hist(own, bins, color=plots.COLOURS[0], alpha=0.6, label="with its own recording")
    if threshold > -1:
        axes.axvline(threshold, color="black", linestyle="--", label=f"threshold: {np.mean(own >= threshold):.0%} of turns stay")
    axes.set(xlabel="similarity of a turn's answer and its best window (cosine)", ylabel="turns")
    axes.legend(frameon=False)
    plots.save(figure, path, 120)


def main() -> None:
    args = cli.parse(Args, description=__doc__)
    cli.at_least(args, threshold=-1)
    folder, run = Path(args.data), Path(args.run)
    manifest.read_card(folder)
    model, tokenizer = checkpoint.load_run(run)
    picture = Path(args.plot or run / f"similarity-{folder.name}.png")
    plots.check_path(picture)
    tower = load_text_tower(run, model.config)
    rows = manifest.read_rows(folder / "train.jsonl")
    dialogues = [row for row in rows if filtered(row)]
    if not dialogues:
        raise UserError(f"{folder}: no training row is a dialogue (\"turns\") about a recording: nothing to filter")
    store = Store(folder, model.encoder, model.config.audio, model.config.clap.out_width)
    store.add(manifest.recordings(dialogues), "encoding")
    own, other = similarities(tower, tokenizer, store, dialogues)
    flat_own, flat_other = np.concatenate(own), np.concatenate(other)
    draw(picture, flat_own, flat_other, args.threshold)
    print(f"{len(flat_own)} turns: similarity {np.mean(flat_own):.3f} on average, {np.mean(flat_other):.3f} with another "
          f"recording; {picture}")
    if args.threshold > -1:
        good = kept(dialogues, own, args.threshold)
        if not good:
            raise UserError(f"--threshold {args.threshold}: no turn fits so well; train.jsonl is left as it is")
        manifest.write_rows(folder / "train.jsonl", [row for row in rows if not filtered(row)] + good)
        manifest.update_card(folder, dialogue_filter=args.threshold)
        print(f"{sum(len(row['turns']) for row in good)} turns of {len(good)} dialogues stay; "
              f"{len(dialogues) - len(good)} dialogues are dropped whole; {np.mean(flat_other >= args.threshold):.0%} would stay "
              "with another recording")


if __name__ == "__main__":
    cli.run(main)

"""Scores of a run on a test split.

    python -m af_min.evaluate --run runs/tiny                                      the table of README (scores.py), scores.json
    python -m af_min.evaluate --run runs/mine --dataset data/mine                  every task of any prepared data set
    python -m af_min.evaluate --run runs/tiny --dataset scenes --shots 0 4 8 --shots-from nearest random
    python -m af_min.evaluate --claims                                             the paper's claims, measured (claims.py)

Captions and dialogues get CIDEr-D, BLEU and ROUGE-L, tags F1, all else the share of exact answers; --options TASK adds the share
that is right when the likeliest of the answers known from training, or of those that the prompt lists, is taken (tags: mAP).
"unanimous": of the questions alone about which all annotators say the same (the paper's measure on ClothoAQA), where some disagree.
`[..]`: 95 % by bootstrap over the items (CIDEr-D: how rare an n-gram is stays fixed). `blind`: the commonest training answer to the
same question. `swapped`: the same items, each with the audio of another one. Shots come from the train split, never the recording
itself; rows that bring their own keep them. A dialogue's turn is asked with the true answers to the turns before it.

Decoding is greedy. Every answer stands in <run>/predictions-<data set>-<condition>.jsonl; an interrupted evaluation goes on from
there, and one of other weights, data or settings begins anew.
"""
from __future__ import annotations

import sys
import time
from collections import ChainMap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from . import checkpoint, cli, data, manifest, metrics, scores, text
from .answering import Answerer
from .cli import UserError, flag
from .engine import chosen_device
from .predictions import Predictions, header, predict, remembered
from .retrieval import Library
from .scores import Measure


@dataclass(frozen=True)
class Args:
    run: str = flag("runs/tiny", "run folder")
    dataset: str = flag("data/scenes", "prepared data set; a bare name is looked for in data/")
    split: str = flag("test", "rows to score", choices=("val", "test"))
    items: int = flag(0, "score only so many items of each task (0: all)")
    shots: list[int] = flag([], "examples before each question; several numbers, several rows of the table", nargs="+")
    shots_from: list[str] = flag(["nearest"], "how they are chosen", choices=("nearest", "random"), nargs="+")
    options: list[str] = flag([], "tasks whose answer is also chosen by likelihood, such as AudioClassification", nargs="+",
                              metavar="TASK")
    max_new: int = flag(64, "tokens of an answer, at most")
    swapped: bool = flag(True, "also ask about another recording, without shots")
    seed: int = flag(0, "seed of random shots")
    device: str = flag("auto", "where to compute", choices=("auto", "cpu", "cuda"))


# ---------------------------------------------------------------------- questions

def questions(rows: list[dict], items: int = 0) -> dict[str, list[dict]]:
    """Rows of a split by task, as questions with "id" and "answers"; of a dialogue each turn, after the true ones before it."""
    asked = []
    for number, row in enumerate(rows):
        if row["task"] == "WindowText" or "pool" in row:                     # not questions to this model, or not without shots
            continue
        for n, turn in enumerate(row.get("turns", [None])):
            own = {"turns": [*row["turns"][:n], {**turn, "assistant": ""}], "prompt": turn["user"],
                   "answers": [turn["assistant"]]} if turn else {"answers": row.get("answers") or [row["answer"]]}
            asked.append({**row, "id": [number, n], **own})
    return scores.by_task(asked, items)


def fitting(row: dict, answerer: Answerer) -> dict:
    """The row without the first of its shots where all would not leave room for an answer."""
    room = answerer.model.config.lm.max_positions - answerer.max_new
    while row["shots"] and len(text.write_sample(answerer.tokenizer, row, complete=False).ids) > room:
        row = {**row, "shots": row["shots"][1:]}
    return row


# ---------------------------------------------------------------------- scores

def measures(task: str, answers: list[str], references: list[list[str]]) -> dict[str, Measure]:
    """What is measured of a task's answers, by name."""
    found: dict[str, Measure] = {}
    words = text.prefix(task).endswith((" captioning. ", text.PREFIXES["Dialogue"]))
    if words:
        said, refs = [metrics.words(a) for a in answers], [[metrics.words(r) for r in rs] for rs in references]
        cider, rouge, counts = metrics.cider_d(said, refs), metrics.rouge_l(said, refs), metrics.bleu_counts(said, refs)
        found["CIDEr-D"] = lambda i: cider[i].mean()
        found |= {f"BLEU-{n}": lambda i, n=n: metrics.bleu(counts[i].sum(0))[n - 1] for n in range(1, 5)}
        found["ROUGE-L"] = lambda i: rouge[i].mean()
    elif is_tags(task, references):
        for name, least in (("F1", 1.0), ("F1-approx", 0.5)):
            pairs = np.array([metrics.tag_counts(a, rs[0], least) for a, rs in zip(answers, references)])
            found[name] = lambda i, pairs=pairs: metrics.f1(pairs[i].sum(0))
    if not words or task == "Dialogue":
        right = found["exact"] = scores.exactly(answers, references)
        agreed = np.array([len(set(map(metrics.normalized, rs))) == 1 for rs in references])
        if task == "AQA" and 0 < agreed.sum() < len(agreed):
            found["exact, unanimous"] = lambda i: right(i[agreed[i]]) if agreed[i].any() else 0.0
    return found


def is_tags(task: str, references: list[list[str]]) -> bool:
    """Several labels an answer: FSD50K and its like."""
    return task.endswith("Classification") and any("," in answers[0] for answers in references)


def option_measures(task: str, entries: list[dict]) -> dict[str, Measure]:
    references = [entry["references"] for entry in entries]
    if not is_tags(task, references):
        return {"likeliest option": scores.exactly([entry["option"] for entry in entries], references)}
    options = sorted({option for entry in entries for option in entry["likelihoods"]})
    likelihood = np.array([[entry["likelihoods"].get(option, -np.inf) for option in options] for entry in entries])
    true = np.array([[option in metrics.tags(refs[0]) for option in options] for refs in references])
    return {"mAP": lambda i: metrics.mean_average_precision(likelihood[i], true[i])}


class Evaluation:
    """One run on one split of a prepared data set. UserError for a data set, a task or a number of shots that will not do."""

    def __init__(self, args: Args):
        self.args, self.folder = args, Path(args.dataset)
        manifest.read_card(self.folder)
        rows, train = (manifest.read_rows(self.folder / f"{split}.jsonl") for split in (args.split, "train"))
        self.tasks, trained = questions(rows, args.items), questions([row for row in train if "retrieved" not in row])
        if not self.tasks:
            raise UserError(f"{self.folder}: its {args.split} split is empty: nothing to score (train.py --no-evaluate)")
        self.known = {task: sorted({option.lower() for row in rows for answer in row["answers"]
                                    for option in (metrics.tags(answer) if is_tags(task, [[answer]]) else [answer])})
                      for task, rows in trained.items()}                       # answers that training has seen
        both = sorted(set(self.tasks) & set(self.known))
        for task in args.options:
            if task not in both:
                raise UserError(f"--options {task}: no such task in both {args.split} and train; there are {', '.join(both)}")
        self.answerer = Answerer.open(Path(args.run), self.folder, [row for rows in self.tasks.values() for row in rows],
                                      f"encoding {args.split} split", args.max_new, args.device)
        most = self.answerer.model.config.representation.max_audios
        if max(args.shots, default=0) >= most:
            raise UserError(f"--shots {max(args.shots)}: this model takes {most} audios, the question's included")
        self.stores = {self.folder: self.answerer.store}
        self.header = header(Path(args.run), self.folder, args.split, args.max_new) | {"options": sorted(args.options)}
        self.blind = {tuple(row["id"]): answer for task, rows in self.tasks.items()
                      for row, answer in zip(rows, scores.blind_answers(rows, trained.get(task, [])))}
        self.moved = self.answers(moved=True) if args.swapped else {}

    def answers(self, k: int = 0, choice: str = "", moved: bool = False) -> dict[str, list[dict]]:
        """Entries of every task under one number and choice of shots, or about another recording (`moved`)."""
        args, name, out = self.args, f"{k}-{choice}" if k else "swapped" if moved else "0", {}
        predictions = Predictions(Path(args.run) / f"predictions-{self.folder.name}-{args.split}-{name}.jsonl",
                                  self.header | {"shots": k, "shots_from": choice, "seed": args.seed if k else 0, "swapped": moved})
        for task, rows in self.tasks.items():
            reader, store = self.answerer, self.answerer.store
            if k:
                rows = [row for row in rows if not {"shots", "turns"} & set(row)]
                if not rows or task not in self.known:
                    continue
                library = Library(reader.model, [args.dataset], task, "encoding train split", self.stores, args.device)
                rows = [fitting(row, reader) for row in library.with_shots(rows, store, k, choice, args.seed)]
                if short := sum(len(row["shots"]) < k for row in rows):
                    print(f"{task}: {short} of {len(rows)} questions had room for fewer than {k} shots", file=sys.stderr)
                reader = Answerer(reader.model, reader.tokenizer, ChainMap(library.windows, store), args.max_new)
            options = self.known[task] if task in args.options and not moved else []
            out[task] = predict(reader, scores.swapped(rows) if moved else rows, predictions, options, f"{task}, {name}")
        return out

    def results(self, k: int, choice: str) -> Iterator[dict]:
        """Every measure of every task under one condition."""
        for task, entries in self.answers(k, choice).items():
            references = [entry["references"] for entry in entries]
            found = measures(task, [entry["answer"] for entry in entries], references)
            guessed = measures(task, [self.blind[tuple(entry["id"])] for entry in entries], references)
            moved = self.moved.get(task) if not k else None
            wrong = measures(task, [entry["answer"] for entry in moved], references) if moved else {}
            if task in self.args.options:
                found |= option_measures(task, entries)
            own = "own" if not k and entries[0]["shots"] else f"{k} {choice}".strip()
            for name, measure in found.items():
                yield {"task": task, "shots": own, "measure": name, "items": len(entries),
                       "references": round(float(np.mean([len(r) for r in references])), 2),      # an item, on average
                       **scores.figures(measure, len(entries), 100 if name == "mAP" else 1000,
                                        blind=guessed.get(name), swapped=wrong.get(name))}


def general(args: Args) -> list[dict]:
    """Score any prepared data set; print the table and what it was measured with; write scores-<data set>.json."""
    started = time.time()
    evaluation = Evaluation(args)
    conditions = [(k, choice) for k in args.shots or [0] for choice in (args.shots_from if k else [""])]
    results = [result for k, choice in conditions for result in evaluation.results(k, choice)]
    if not results:
        raise UserError(f"--shots: {args.dataset}: no question there can have examples: all are turns of dialogues, bring their own, or are of "
                        "tasks that training does not have")
    print(scores.table(results, f"{'task':20s} {'shots':10s} {'measure':16s} {'items':>6s} {'refs':>5s}",
                       "{task:20s} {shots:10s} {measure:16s} {items:6d} {references:5.2f}"))
    for task, asked in evaluation.tasks.items():
        prompts = sorted({row["prompt"] for row in asked})
        print(f"{task}: {text.prefix(task) + prompts[0]!r}" + (f" and {len(prompts) - 1} other prompts" if prompts[1:] else ""))
    print(f"greedy decoding, at most {args.max_new} tokens, {time.time() - started:.0f} s; "
          f"answers: {args.run}/predictions-{evaluation.folder.name}-*.jsonl")
    checkpoint.write_json(Path(args.run) / f"scores-{evaluation.folder.name}.json", results)
    return results


def embedded(run: Path, folder: Path, items: int, device: str) -> list[dict]:
    """The table of the README and two transcripts; writes scores.json."""
    started, (test, train) = time.time(), (manifest.read_rows(folder / f"{split}.jsonl") for split in ("test", "train"))
    answerer = Answerer.open(run, folder, test, "encoding test split", device=device)
    path = run / f"predictions-{folder.name}-test-table.jsonl"
    ask = partial(remembered, answerer, Predictions(path, header(run, folder, "test", answerer.max_new)))
    results = list(tqdm(scores.scores(ask, answerer.store, test, train, items), "scoring", unit="task"))
    print(scores.table(results, f"{'task':36s} {'items':>6s}", "{name:36s} {items:6d}"), scores.transcript(ask, test), sep="\n")
    print(f"greedy decoding, at most {answerer.max_new} tokens, prompts of af_min/text.py, one reference an item, "
          f"{sum(r['items'] for r in results)} items, {time.time() - started:.0f} s; answers: {path}")
    checkpoint.write_json(run / "scores.json", results)
    return results


def is_embedded(test: list[dict]) -> bool:
    """Are these the test rows of the embedded data set?"""
    return any(row["task"] == "FewShotSeen" for row in test)


def report(run: Path, folders, items: int = 0, device: str = "auto") -> list:
    """Score a run on the first data set's test split, print the table, draw report.png: what train.py ends with."""
    run, folder = Path(run), Path(folders[0][0])
    device, test = chosen_device(device), manifest.read_rows(folder / "test.jsonl")
    if not test:
        print(f"warning: {folder}: its test split is empty: not scored, no report.png", file=sys.stderr)
        return []
    results = embedded(run, folder, items, device) if is_embedded(test) else \
        general(Args(run=str(run), dataset=str(folder), items=items, device=device))
    from . import plots  # matplotlib is slow to import, and only this function draws
    plots.report(run, *checkpoint.load_run(run), folder)
    for other, _ in folders[1:]:
        print(f"not scored: {other}; python -m af_min.evaluate --run {run} --dataset {other}")
    return results


def main() -> None:
    if "--claims" in sys.argv:
        from . import claims
        return claims.main()
    args = cli.parse(Args, description=__doc__)
    cli.at_least(args, items=0, max_new=1, seed=0)
    args = replace(args, device=chosen_device(args.device))
    if min(args.shots, default=0) < 0:
        raise UserError(f"--shots {min(args.shots)}: expected 0 or more")
    if "/" not in args.dataset and not Path(args.dataset).exists():
        args = replace(args, dataset=f"data/{args.dataset}")
    folders = data.parse_data([args.dataset])
    table = Args(run=args.run, dataset=args.dataset, items=args.items, device=args.device)          # which no other flag changes
    if args == table and is_embedded(manifest.read_rows(folders[0][0] / "test.jsonl")):
        report(Path(args.run), folders, args.items, args.device)
    else:
        general(args)


if __name__ == "__main__":
    cli.run(main)

"""Answers of a run on disk: a JSONL file that says what they are answers of; an interrupted evaluation goes on from there."""
from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tqdm import tqdm

from .answering import Answerer
from .manifest import whole_lines


def listed(prompt: str) -> list[str]:
    """The options that a prompt names in the form of text.question."""
    lines = prompt.lower().partition("\noptions:\n")[2].splitlines()
    return [line.removeprefix(" - ").removesuffix(".") for line in lines if line.startswith(" - ")]


class Predictions:
    """A JSONL file of answers: a first line that says what they are answers of, then one line a question.

    Only whole lines count; a file with another first line is begun anew. `said`: question id -> its line.
    """

    def __init__(self, path: Path, header: dict):
        self.path, self.said, whole = path, {}, 0
        for entry, end in whole_lines(path):
            if not ("id" in entry if whole else entry == header):
                break
            if whole:
                self.said[tuple(entry["id"])] = entry
            whole = end
        with open(path, "ab") as file:
            file.truncate(whole)
            if not whole:
                file.write(json.dumps(header).encode() + b"\n")

    def put(self, entries: list[dict]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in entries))
        self.said |= {tuple(entry["id"]): entry for entry in entries}


def header(run: Path, folder: Path, split: str, max_new: int) -> dict:
    """What all answers of a run on a split depend on."""
    with open(run / "model.safetensors", "rb") as weights:
        digest = hashlib.file_digest(weights, "sha256").hexdigest()[:16]
    manifests = b"".join((folder / f"{name}.jsonl").read_bytes() for name in (split, "train"))
    return {"weights": digest, "data": hashlib.sha256(manifests).hexdigest()[:16],
            "decoding": {"temperature": 0, "max_new": max_new}}


def predict(answerer: Answerer, rows: list[dict], predictions: Predictions, options: list[str], name: str) -> list[dict]:
    """An entry {"id", "answer", ...} of every row, from the file or new; with options also "likelihoods" and the likeliest."""
    said = predictions.said                         # of a swapped question the recording depends on how many items there were
    todo = [row for row in rows if said.get(tuple(row["id"]), {}).get("audio") != row["audio"]]
    with tqdm(total=len(todo), desc=name, unit="item", disable=not (todo and name)) as bar:
        for batch in answerer.batches(todo):
            part = [todo[i] for i in batch]
            entries = [{"id": r["id"], "task": r["task"], "audio": r["audio"], "prompt": r["prompt"], "references": r["answers"],
                        "shots": [[s["audio"], s["answer"]] for s in r.get("shots", [])], "answer": answer}
                       for r, answer in zip(part, answerer.batch(part))]
            if options:
                allowed = [listed(row["prompt"]) or options for row in part]
                union = sorted({option for own in allowed for option in own})
                for entry, own, likelihood in zip(entries, allowed, answerer.likelihoods(part, union)):
                    entry["likelihoods"] = {o: round(float(likelihood[union.index(o)]), 4) for o in own}
                    entry["option"] = max(own, key=entry["likelihoods"].get)
            predictions.put(entries)
            bar.update(len(batch))
    return [said[tuple(row["id"])] for row in rows]


def remembered(answerer: Answerer, predictions: Predictions, rows: list[dict]) -> list[str]:
    """Answers out of the file, and into it: what stands there is not asked again."""
    asked = [{**row, "id": [hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16]],
              "prompt": row["turns"][-1]["user"] if "turns" in row else row["prompt"],
              "answers": [row["answer"]] if "answer" in row else []} for row in rows]
    return [entry["answer"] for entry in predict(answerer, asked, predictions, [], "")]

"""Ask a trained model about recordings.

    python sample.py --audio x.wav                                        describe the sounds
    python sample.py --audio *.wav --prompt "is there a siren?"           one question about each of many recordings, in batches
    python sample.py --audio x.wav --options dog,bell,siren               which of these answers is the most likely
    python sample.py --audio x.wav --shots 4                              the nearest four training recordings as examples
    python sample.py --audio x.wav --task FewShot --prompt "classify this sound." --shot dog.wav zub --shot bell.wav kip
    python sample.py --audio x.wav --chat                                 a dialogue about one recording
    python sample.py --audio x.wav --plot out.png                         where the model looked for each word

Only the run folder is needed; --shots also reads the data set that the run was trained on. Answers go to standard output, all
else to standard error. With a `tiny` run on one CPU core the first command takes 2 s, with --shots 4 it takes 4 s. Last lines:
    bird then bird then bell
    [first word after 0.06 s, 6 tokens at 208/s; 2.08 M parameters, cpu, 1 threads, torch 2.13.0+cpu]
"""
from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from af_min import checkpoint, cli, text
from af_min.answering import answer, grouped, read, score
from af_min.audio_files import MIN_SECONDS, AudioError
from af_min.cli import UserError, flag
from af_min.engine import chosen_device
from af_min.flamingo import AudioFlamingo, Sampling, State
from af_min.manifest import HALF_LETTER
from af_min.retrieval import Heard, Library, Place, hear
from af_min.text import Sample, Tokenizer, write_sample

DIALOGUE = 4096     # tokens after the first question (fewer if the model's positions end before): the cache is allocated for them at once


@dataclass(frozen=True)
class Args:
    audio: list[str] = flag([], "recordings to ask about; several are answered in batches", nargs="+")
    run: str = flag("runs/tiny", "folder of the trained model")
    prompt: str = flag("describe the sounds.", "what to ask")
    task: str = flag("", "whose prefix begins the text, and which rows --shots takes (default: AudioCaptioning; AQA if the prompt "
                         "ends with a question mark)")
    options: str = flag("", "a,b,c: the only answers allowed; their probabilities are printed (the task AudioClassification also "
                            "lists them in its prompt, as the embedded and the public data sets do; a folder of your own does not)")
    shots: int = flag(0, "show so many training recordings with their answers first")
    shots_from: str = flag("nearest", "how they are chosen", choices=("nearest", "random"))
    data: list[str] = flag([], "prepared data sets that --shots come from (default: those that the run was trained on)", nargs="+")
    shot: list[list[str]] = flag([], "an example of your own, shown first; repeat for more", nargs=2, action="append",
                                 metavar=("FILE", "ANSWER"))
    chat: bool = flag(False, "a dialogue about one recording; exit or the end of input ends it")
    temperature: float = flag(0.0, "0: always the likeliest token; above: draw, the more evenly the higher (what a recording draws "
                                    "then depends on its place among those of the command)")
    top_k: int = flag(0, "draw among the k likeliest tokens (0: all)")
    top_p: float = flag(1.0, "draw among the likeliest tokens that hold this much probability")
    seed: int = flag(0, "seed of drawing and of random shots")
    max_new: int = flag(64, "tokens of an answer, at most")
    plot: str = flag("", "draw the recording, its windows and where each word looked into this file (.png, .pdf, .svg)")
    device: str = flag("auto", "where to compute", choices=("auto", "cpu", "cuda"))

    @property
    def task_name(self) -> str:
        return self.task or ("AQA" if self.prompt.rstrip().endswith("?") else "AudioCaptioning")

    @property
    def choices(self) -> list[str]:
        return [option.strip().lower() for option in self.options.split(",") if option.strip()]


def check(args: Args) -> None:
    """UserError for flags that do not make sense, before anything is loaded."""
    def need(good: bool, message: str):
        if not good:
            raise UserError(message)

    need(bool(args.audio), "--audio is missing: name at least one recording")
    need(bool(args.prompt.strip()), "--prompt is empty: ask something")
    for name, words in (("prompt", args.prompt), ("task", args.task), ("options", args.options), *(("shot", said) for _, said in args.shot)):
        need(not HALF_LETTER.search(words), f"--{name} {words!r}: not UTF-8 text")
    cli.at_least(args, temperature=0, top_k=0, max_new=1, shots=0, seed=0)
    need(args.seed < 1 << 63, f"--seed {args.seed}: expected less than 2**63")
    need(0 < args.top_p <= 1, f"--top-p {args.top_p}: expected above 0 and at most 1")
    need(all(answer.strip() for _, answer in args.shot), "--shot FILE ANSWER: the answer is empty")
    need(not (args.shots and args.shot), "--shots chooses examples and --shot gives them: use one of the two")
    need(not args.options or len(set(args.choices)) == len(args.choices) >= 2,
         f"--options {args.options!r}: expected two or more different answers with commas between them")
    need(len(args.audio) == 1 or not (args.chat or args.plot), f"--chat and --plot take one recording, got {len(args.audio)}")
    for name in ("prompt", "options", "shots", "shot", "plot", "task", "data"):
        need(not args.chat or getattr(args, name) in (getattr(Args, name, None), []), f"--chat and --{name} do not go together")
    if args.plot:
        from af_min import plots  # matplotlib is slow to import
        plots.check_path(Path(args.plot))


def note(message: str) -> None:
    tqdm.write(message, file=sys.stderr)                           # above a progress bar, if there is one


# ---------------------------------------------------------------------- hearing

def hear_or_warn(model: AudioFlamingo, file: str) -> Heard:
    """One recording; a warning if it is longer than the model hears, very short, or silent."""
    heard, limit = hear(model, file), model.config.audio.max_seconds
    if heard.recording.dropped_seconds >= 0.005:
        note(f"warning: {file}: the last {heard.recording.dropped_seconds:.2f} s are dropped: the model hears {limit:g} s at most")
    if heard.recording.seconds < MIN_SECONDS:
        note(f"warning: {file}: only {heard.recording.seconds:.3f} s long: there is hardly anything to hear")
    if heard.recording.silent:
        note(f"warning: {file}: silent: channel 0 holds nothing but zeros, the answer means nothing")
    return heard


class TooLong(UserError):
    """The examples that were found for one recording leave no room for an answer; those of another one may."""


class Question:
    """The question of the command line, to be asked about any recording, behind the examples of --shot or --shots."""

    def __init__(self, args: Args, model: AudioFlamingo, tokenizer: Tokenizer):
        self.args, self.model, self.tokenizer = args, model, tokenizer
        limit, count = model.config.representation.max_audios, len(args.shot) + args.shots
        if count + 1 > limit:
            raise UserError(f"{count} shots and the recording itself: this model takes {limit} audios at most")
        self.asked = text.question(args.task_name, args.prompt, args.choices if args.task_name == "AudioClassification" else None)
        self.windows = {(file, 0.0): hear_or_warn(model, file).windows_WD for file, _ in args.shot}

    @functools.cached_property
    def library(self) -> Library:
        """What --shots chooses from, --data or what the run was trained on; opened when the first recording needs it."""
        run = self.args.run
        data = self.args.data or checkpoint.read_json(Path(run) / "config.json").get("training", {}).get("args", {}).get("data")
        if not data:
            raise UserError(f"--shots: {run}/config.json does not say what the run was trained on; name it with --data")
        return Library(self.model, data, self.args.task_name, "encoding")

    def about(self, heard: Heard) -> tuple[Sample, Mapping[Place, np.ndarray]]:
        """-> the text, which ends where the answer begins; window embeddings (W, D) of every audio in it."""
        args, windows = self.args, self.windows
        shots = [{**self.asked, "audio": file, "answer": answer} for file, answer in args.shot]
        if args.shots:
            shots = self.library.shots(heard, args.shots, args.shots_from, args.prompt, args.seed)
            windows = self.library.windows
        for shot in shots:
            note(f"shot for {heard.path}: {shot['audio']}: {shot['prompt']} {shot['answer']}")
        sample = write_sample(self.tokenizer, {**self.asked, "audio": heard.path, "shots": shots}, complete=False)
        if args.shots and len(sample.ids) >= self.model.config.lm.max_positions:
            raise TooLong(f"{heard.path}: with its examples the question is {len(sample.ids)} tokens long; this model holds "
                          f"{self.model.config.lm.max_positions}: take fewer --shots")
        return sample, ChainMap({(heard.path, 0.0): heard.windows_WD}, windows)


def listen(question: Question, files: list[str], left_out: list[str]) -> Iterator[tuple[Sample, Mapping[Place, np.ndarray]]]:
    """The question about every file, with a progress bar if there are several; of several, one that cannot be read, or whose examples are too
    long, is warned of and added to `left_out`."""
    for file in tqdm(files, unit="rec", disable=len(files) == 1):
        try:
            yield question.about(hear_or_warn(question.model, file))
        except (AudioError, TooLong) as error:
            if len(files) == 1:
                raise
            note(f"warning: {error}")
            left_out.append(file)


# ---------------------------------------------------------------------- answering

class Printer:
    """Writes the text of tokens as they come: an incomplete multi-byte character waits for its remaining bytes."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.ids, self.shown = tokenizer, [], 0
        self.begun, self.first = time.perf_counter(), None     # when generation began and when the first text was shown

    def __call__(self, token: int) -> None:
        self.ids.append(token)
        self._show(self.tokenizer.decode(self.ids).rstrip("\ufffd"))

    def close(self) -> None:
        """Write what is left when no token follows, complete or not."""
        self._show(self.tokenizer.decode(self.ids))

    def speed(self, started: float) -> str:
        """Seconds from `started` (before the recording was read, or a turn's question was given) to the first word; tokens per second."""
        rate = len(self.ids) / (time.perf_counter() - self.begun)
        return f"first word after {(self.first or self.begun) - started:.2f} s, {len(self.ids)} tokens at {rate:.4g}/s"

    def _show(self, known: str) -> None:
        if len(known) > self.shown:
            self.first = self.first or time.perf_counter()
            print(known[self.shown:], end="", flush=True)
            self.shown = len(known)


class Dialogue:
    """Turns about one recording. The caches grow from turn to turn: nothing is encoded or read twice.

    `ids` is the whole text so far, as one sample of the dialogue template in text.py.
    """

    def __init__(self, model: AudioFlamingo, tokenizer: Tokenizer, heard: Heard):
        self.model, self.tokenizer, self.heard = model, tokenizer, heard
        self.ids: list[int] = []
        self.state: State | None = None

    def _write(self, *turns: dict) -> Sample:
        return write_sample(self.tokenizer, {"task": "Dialogue", "audio": self.heard.path, "turns": turns}, complete=False)

    def _question(self, question: str) -> list[int]:
        """What a later turn adds: `</s>\\nuser: ... \\nassistant: <SEP>`, after a <|endofchunk|> if the last answer was cut off."""
        ids = self._write({"user": "-", "assistant": "-"}, {"user": question}).ids
        end_of_first = len(ids) - 1 - ids[::-1].index(self.tokenizer.eos_id)
        missing = [] if self.ids[-1] == self.tokenizer.eoc_id else [self.tokenizer.eoc_id]
        return missing + ids[end_of_first:]

    def ask(self, question: str, sampling: Sampling, max_new: int, told: Callable[[int], None] | None = None) -> str:
        """The answer. UserError if the cache has no room for the question; the dialogue is unchanged then."""
        if self.state is None:
            sample = self._write({"user": question})
            new = sample.ids
            windows = {(self.heard.path, 0.0): self.heard.windows_WD}
            self.state, logits = read(self.model, self.tokenizer, [sample], windows, DIALOGUE)
        else:
            new, cache = self._question(question), self.state.cache
            if cache.length + len(new) >= cache.max_length:
                raise UserError(f"the dialogue has reached the {cache.max_length} tokens that there is room for; start a new one")
            logits = self.model.read(torch.tensor([new], device=cache.mask_BT.device), self.state)
        tokens = answer(self.model, self.tokenizer, self.state, logits, sampling, max_new, told)[0]
        self.ids += new + tokens
        return self.tokenizer.decode(tokens)


# ---------------------------------------------------------------------- the command

def questions() -> Iterator[str]:
    """Lines of standard input until `exit` or its end; empty ones are skipped. UserError for what is not UTF-8."""
    try:
        while (line := input("user: " if sys.stdin.isatty() else "").strip()).lower() != "exit":
            line.encode()
            if line:
                yield line
    except EOFError:
        return
    except UnicodeError:
        raise UserError("the question is not UTF-8 text") from None


def chat(args: Args, model: AudioFlamingo, tokenizer: Tokenizer, sampling: Sampling) -> None:
    """Read questions, write each answer word by word, and after it the rate on standard error."""
    heard = hear_or_warn(model, args.audio[0])
    note(f"a dialogue about {heard.path} ({heard.recording.seconds:.2f} s); exit ends it")
    dialogue = Dialogue(model, tokenizer, heard)
    for question in questions():
        printer, started = Printer(tokenizer), time.perf_counter()
        print("assistant: ", end="", flush=True)
        try:
            dialogue.ask(question, sampling, args.max_new, printer)
        finally:
            printer.close()
            print(flush=True)
        footer(model, printer.speed(started))


def choose(model: AudioFlamingo, tokenizer: Tokenizer, state: State, logits_BV: torch.Tensor,
           options: list[str]) -> tuple[list[list[int]], list[str]]:
    """-> per recording: the most likely option's tokens; a table of all options, most likely first: probability, share among options."""
    best, tables = [], []
    for logp in score(model, tokenizer, state, logits_BV, options):
        order, share = logp.argsort(descending=True).tolist(), logp.softmax(0)
        best.append(tokenizer.encode(options[order[0]]))
        tables.append("\n".join(["probability   share  answer",
                                 *(f"{logp[i].exp():11.3g}  {share[i]:6.1%}  {options[i]}" for i in order)]))
    return best, tables


def footer(model: AudioFlamingo, measured: str) -> None:
    """What was measured, and on what."""
    device = next(model.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    note(f"[{measured}; {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {name}, torch {torch.__version__}]")


def ask(args: Args, model: AudioFlamingo, tokenizer: Tokenizer, sampling: Sampling) -> None:
    """One question about all recordings: a single answer word by word, several in batches, in their order.

    UserError, when all else is answered, if some of several recordings have none.
    """
    started, alone, done, left_out = time.perf_counter(), len(args.audio) == 1, 0, []
    question = Question(args, model, tokenizer)
    room = max(len(tokenizer.encode(option)) + 1 for option in args.choices) if args.options else args.max_new
    asked = listen(question, args.audio, left_out)
    for batch in grouped(asked, lambda pair: len(pair[0].ids) + room, model.config.lm.max_positions):
        samples = [sample for sample, _ in batch]
        state, logits_BV = read(model, tokenizer, samples, ChainMap(*(windows for _, windows in batch)), room)
        printer = Printer(tokenizer)
        if args.options:
            answers, said = choose(model, tokenizer, state, logits_BV, args.choices)
        else:
            draw = dataclasses.replace(sampling, seed=sampling.seed + done)
            answers = answer(model, tokenizer, state, logits_BV, draw, args.max_new, printer if alone else None)
            if alone:
                printer.close()
            said = ["" if alone else " ".join(tokenizer.decode(ids).splitlines()) for ids in answers]     # a line for each recording
        for sample, words in zip(samples, said):
            tqdm.write(words if alone else f"{sample.audios[-1][0]}:" + ("\n" if args.options else " ") + words)
        sys.stdout.flush()
        done += len(batch)
    seconds = time.perf_counter() - started
    footer(model, printer.speed(started) if alone and not args.options else f"{done} recordings in {seconds:.2f} s, {done / seconds:.3g}/s")
    if args.plot:
        from af_min import plots
        words = [token for token in answers[0] if token != tokenizer.eoc_id]
        plots.answer_picture(Path(args.plot), model, tokenizer, hear(model, args.audio[0]), samples[0].ids, words, state.audio)
    if left_out:
        more = f" and {len(left_out) - 5} more" if len(left_out) > 5 else ""
        raise UserError(f"{len(left_out)} of {len(args.audio)} recordings have no answer, see above: {', '.join(left_out[:5])}{more}")


def main() -> None:
    args = cli.parse(Args, description=__doc__)
    check(args)
    sys.stdout.reconfigure(errors="surrogateescape")       # the name of a file may hold bytes that are not UTF-8
    model, tokenizer = checkpoint.load_run(Path(args.run), chosen_device(args.device))
    model.lm.pack()
    (chat if args.chat else ask)(args, model, tokenizer, Sampling(args.temperature, args.top_k, args.top_p, args.seed))


if __name__ == "__main__":
    cli.run(main)

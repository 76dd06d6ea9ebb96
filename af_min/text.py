"""Step 7 of the walk, the last: text in, token ids and labels out. Tokenizer, special tokens, the released templates.

    single       <s>{prefix}<audio>{instruction}\\nAnswer:<SEP>{answer}<|endofchunk|></s>
    interleaved  <s>Here are similar examples. {prefix}<audio>{i_1}\\nAnswer:<SEP>{y_1}<|endofchunk|><audio>{i_2}...<|endofchunk|></s>
    dialogue     <s>{prefix}<audio>user: {q_1} \\nassistant: <SEP>{a_1}<|endofchunk|></s>\\nuser: {q_2} \\nassistant: <SEP>...

The paper's templates (section 4.2) have the same parts in slightly other words and order. Supervised (figure 3, right) are the
tokens after each <SEP> through <|endofchunk|>, and </s>; never the first two tokens, a prompt, <audio> or <SEP>. Special tokens are
added as ids, between pieces of text that are tokenized by themselves: whatever a user types, "<audio>" included, stays text.
"""
from __future__ import annotations

import functools
import io
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from .cli import UserError
from .config import IGNORE

PREFIXES = {                         # the paper's {task description}; training, evaluation and sample.py read this one table
    "AudioCaptioning": "The task is audio captioning. ",
    "AQA": "The task is audio question answering. ",
    "AudioClassification": "The task is sound classification. ",
    "Dialogue": "The task is dialog. ",
    "FewShot": "The task is sound classification. ",
}
SAME_AS = {                          # tasks that take another one's prefix
    **dict.fromkeys(("Presence", "Count", "CountOf", "After", "Before", "Pitch", "Length"), "AQA"),
    **dict.fromkeys(("FewShotSeen", "FewShotUnseen", "Pool"), "FewShot"), "Interview": "Dialogue",
}
SHOTS_PREFIX = "Here are similar examples. "
ANSWER, USER, ASSISTANT = "\nAnswer:", "user: ", " \nassistant: "


@functools.cache
def prefix(task: str) -> str:
    """The task's prefix. A further task named "...Classification" or "...Captioning" spells its own; other ones have none."""
    own = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", task).lower()
    return PREFIXES.get(SAME_AS.get(task, task), f"The task is {own}. " if re.search("[a-z] (classification|captioning)$", own) else "")


class Tokenizer:
    """sentencepiece for text; ids of the special tokens lie beyond its vocabulary, where no text can reach them."""

    def __init__(self, model: bytes):
        self.model = model
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.pad_id, self.bos_id, self.eos_id = (self.pieces.vocab_size() + i for i in range(3))
        self.audio_id, self.eoc_id, self.sep_id = (self.pieces.vocab_size() + i for i in range(3, 6))
        self.vocab_size = self.pieces.vocab_size() + 6
        self.start_ids = [self.bos_id]                       # what every text begins with
        self._ids = functools.lru_cache(1 << 16)(self.pieces.encode)      # a data set asks the same questions again and again

    @classmethod
    def train(cls, lines: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A BPE tokenizer of `vocab_size` ids, special ones included. Every byte has a piece, so that no text is unknown; half
        of the ids that are left go to the most frequent characters, all others are spelt in bytes.

        Each phrase of the templates is one token: short sequences are fast.
        """
        phrases = ["\n", ANSWER, "\n" + USER, USER, ASSISTANT, " " + SHOTS_PREFIX, *(f" {p}" for p in PREFIXES.values()),
                   *(p for p in PREFIXES.values())]
        symbols, lines, out = sorted({p.replace(" ", "\u2581") for p in phrases}), [spaced(line) for line in lines], io.BytesIO()
        room = max(1, (vocab_size - 6 - 256 - len(symbols)) // 2)
        if rare := Counter("".join(lines)).most_common()[room:]:
            lines = [part for line in lines for part in re.split(f"[{re.escape(''.join(c for c, _ in rare))}]", line)]
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=out, vocab_size=vocab_size - 6, model_type="bpe", byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
            user_defined_symbols=symbols, bos_id=-1, eos_id=-1, pad_id=-1,
            hard_vocab_limit=False, num_threads=1, split_digits=True, minloglevel=2)
        return cls(out.getvalue())

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        try:
            model = Path(path).read_bytes()
            if not model:
                raise RuntimeError("the file is empty")
            return cls(model)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path}: not a sentencepiece model ({error}); every run folder holds its tokenizer.model") from None

    def save(self, path: Path) -> None:
        partial = Path(path).with_name(Path(path).name + ".partial")
        partial.write_bytes(self.model)
        partial.replace(path)

    def encode(self, text: str) -> list[int]:
        """A first word is the same token as after a space, so that an answer is spelt as in the prompt that names it."""
        return list(self._ids(spaced(text)))

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, without the first space; special tokens are left out."""
        return self.pieces.decode([i for i in ids if i < self.pieces.vocab_size()]).removeprefix(" ")


def spaced(text: str) -> str:
    """With a space before a first word, and "?" in place of half a surrogate pair or a byte that is not UTF-8."""
    text = text.encode("utf-8", "replace").decode()
    return " " + text if text[:1].isalnum() else text


def unspeakable(tokenizer) -> tuple[int, ...]:
    """The special tokens that an answer must not hold: all but <|endofchunk|>, which ends it."""
    t = tokenizer
    return tuple(sorted({t.pad_id, t.bos_id, t.eos_id, t.audio_id, t.sep_id} - {t.eoc_id}))


@dataclass(frozen=True)
class Sample:
    """One training sequence: token ids, their labels (IGNORE where nothing is supervised), the audio of each <audio>."""
    ids: list[int]
    labels: list[int]
    audios: tuple[tuple[str, float], ...]   # file, start in seconds


class Writer:
    """Builds a sequence piece by piece; what is added as an answer is supervised."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.ids = tokenizer, list(tokenizer.start_ids)
        self.labels = [IGNORE] * len(self.ids)

    def special(self, token: int, supervised: bool = False) -> None:
        self.ids.append(token)
        self.labels.append(token if supervised and len(self.ids) > 2 else IGNORE)

    def prompt(self, text: str) -> None:
        ids = self.tokenizer.encode(text)
        self.ids += ids
        self.labels += [IGNORE] * len(ids)

    def answer(self, text: str, supervised: bool = True) -> None:
        self.special(self.tokenizer.sep_id)
        ids = self.tokenizer.encode(text) + [self.tokenizer.eoc_id]
        self.ids += ids
        self.labels += ids if supervised else [IGNORE] * len(ids)

    def sound(self, audio: str | None, described: bool, row: dict) -> None:
        """<audio> if there is a recording, or, for text-only training, the description of what is heard."""
        if described and row.get("description"):
            self.prompt(row["description"] + ".\n")
        elif audio and not described:
            self.special(self.tokenizer.audio_id)


def write_sample(tokenizer: Tokenizer, row: dict, described: bool = False, complete: bool = True,
                 max_tokens: int | None = None) -> Sample:
    """One manifest row -> one sequence by the templates above.

    described: write the sounds' descriptions in the place of <audio> (text-only training of the LM).
    complete:  False ends after the last <SEP>: the model is to answer.
    max_tokens: cut there; an answer that is cut is not supervised at all.
    """
    w = Writer(tokenizer)
    shots = [] if "turns" in row else row.get("shots", [])
    w.prompt((SHOTS_PREFIX if shots else "") + prefix(row.get("task", "")))
    if "turns" in row:
        w.sound(row.get("audio"), described, row)
        for i, turn in enumerate(row["turns"]):
            w.prompt(("\n" if i else "") + f"{USER}{turn['user'].lower()}{ASSISTANT}")
            if i + 1 == len(row["turns"]) and not complete:
                w.special(tokenizer.sep_id)
                break
            w.answer(turn["assistant"].lower(), turn.get("loss", True))
            w.special(tokenizer.eos_id, supervised=turn.get("loss", True))
    else:
        for part in [*shots, row]:
            w.sound(part.get("audio"), described, part)
            w.prompt(part["prompt"].lower() + ANSWER)
            if part is row and not complete:
                w.special(tokenizer.sep_id)
                break
            w.answer(part["answer"].lower(), part.get("loss", True))
        if complete:
            w.special(tokenizer.eos_id, supervised=True)
    audios = () if described else tuple((p["audio"], p.get("start", 0.0)) for p in [*shots, row] if p.get("audio"))
    ids, labels = cut(w.ids, w.labels, (tokenizer.eoc_id, tokenizer.eos_id), max_tokens)
    return Sample(ids, labels, audios[:ids.count(tokenizer.audio_id)])


def cut(ids: list[int], labels: list[int], ends: tuple[int, int], max_tokens: int | None) -> tuple[list[int], list[int]]:
    """The first `max_tokens`; an answer whose <|endofchunk|> fell off is masked whole. `ends`: <|endofchunk|> and </s>."""
    if max_tokens is None or len(ids) <= max_tokens:
        return ids, labels
    ids, labels, last = ids[:max_tokens], labels[:max_tokens], max_tokens - 1
    if labels[last] not in ends:
        while labels[last] != IGNORE:  # back to <SEP>, which is never supervised
            labels[last] = IGNORE
            last -= 1
    return ids, labels


def question(task: str, prompt: str, options: list[str] | None = None) -> dict:
    """A row that asks `prompt`; closed-set questions list their options (paper section 4.2)."""
    if options:
        prompt += "\noptions:\n" + "\n".join(f" - {option}." for option in options)
    return {"task": task, "prompt": prompt, "answer": ""}

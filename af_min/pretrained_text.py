"""Published vocabularies with Audio Flamingo's special tokens on top. Part of pretrained.py.

`PublishedTokenizer` has the interface of text.Tokenizer, so templates, training and sampling know no difference. Three
layouts of a Hugging Face folder are read:

    tokenizer.json            any vocabulary of the tokenizers package (Llama 3, Qwen2, SmolLM2, ...)
    vocab.json, merges.txt    byte-level BPE as GPT-2 has it (OPT)
    tokenizer.model           sentencepiece (Llama 1 and 2)

The released checkpoints number <audio>, <|endofchunk|>, <SEP> behind the V tokens of the vocabulary: V, V + 1, V + 2
(50265, 50266, 50267 on OPT). A text starts with the beginning-of-text token once, with OPT twice: its tokenizer puts one in
front of a text that already begins with one, and the published model was trained so.

Text is always encoded with special tokens switched off: a user who types "<audio>" or "</s>" has typed letters.
(A Unigram vocabulary, which none of the models that we read has, would take "</s>" for its own piece.)
"""
from __future__ import annotations

import json
from pathlib import Path

import sentencepiece
import tokenizers

from .cli import UserError

LAYOUTS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))
SPECIAL = {"audio_id": "<audio>", "eoc_id": "<|endofchunk|>", "sep_id": "<SEP>"}
IDS = ("pad_id", "bos_id", "eos_id", *SPECIAL)
IDS_FILE = "special_tokens.json"     # what `save` writes beside the vocabulary


class PublishedTokenizer:
    """encode and decode of a published vocabulary; ids of the special tokens; `start_ids` begin every text."""

    def __init__(self, vocabulary: "BPE | SentencePiece", ids: dict[str, int], start_ids: list[int]):
        self.vocabulary = vocabulary
        self.pad_id, self.bos_id, self.eos_id, self.audio_id, self.eoc_id, self.sep_id = (ids[name] for name in IDS)
        self.start_ids = list(start_ids)
        self.special_ids = frozenset(ids.values())
        self.vocab_size = max(vocabulary.size, 1 + max(self.special_ids))

    def encode(self, text: str) -> list[int]:
        # A lone surrogate, as errors="surrogateescape" leaves it, is no character: it becomes a question mark.
        return self.vocabulary.encode(text.encode("utf-8", "replace").decode())

    def decode(self, ids: list[int]) -> str:
        """Text of the ids; special tokens are left out."""
        return self.vocabulary.decode([i for i in ids if i not in self.special_ids and i < self.vocabulary.size])

    def save(self, folder: Path) -> None:
        """Write the vocabulary and special_tokens.json into `folder`; `load` reads them without the published folder."""
        ids = {**{name: getattr(self, name) for name in IDS}, "start_ids": self.start_ids}
        files = {self.vocabulary.file: self.vocabulary.content(), IDS_FILE: (json.dumps(ids, indent=1) + "\n").encode()}
        for name, content in files.items():
            partial = Path(folder) / (name + ".partial")
            partial.write_bytes(content)
            partial.replace(Path(folder) / name)
        for name in {name for layout in LAYOUTS for name in layout} - files.keys():
            (Path(folder) / name).unlink(missing_ok=True)        # of an earlier run of this name

    @classmethod
    def load(cls, folder: Path) -> "PublishedTokenizer":
        values = read_json(Path(folder) / IDS_FILE)
        lost = [name for name in (*IDS, "start_ids") if name not in values]
        if lost:
            raise UserError(f"{Path(folder) / IDS_FILE}: {lost[0]} is missing; copy the run folder again")
        return cls(open_vocabulary(Path(folder), []), {name: values[name] for name in IDS}, values["start_ids"])


class BPE:
    """A vocabulary of the tokenizers package."""

    file = "tokenizer.json"

    def __init__(self, engine: tokenizers.Tokenizer):
        engine.encode_special_tokens = True              # special tokens that are typed are text
        engine.no_truncation()
        engine.no_padding()
        self.engine = engine
        self.size, self.text_size = (1 + max(engine.get_vocab(with_added_tokens=added).values()) for added in (True, False))

    def encode(self, text: str) -> list[int]:
        return self.engine.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.engine.decode(ids, skip_special_tokens=True)

    def id_of(self, token: str) -> int | None:
        return self.engine.token_to_id(token)

    def content(self) -> bytes:
        return self.engine.to_str(pretty=True).encode()


class SentencePiece:
    """A vocabulary of sentencepiece. Its control symbols never come out of text."""

    file = "tokenizer.model"

    def __init__(self, model: bytes):
        if not model:
            raise ValueError("the file is empty")
        self.model, self.engine = model, sentencepiece.SentencePieceProcessor(model_proto=model)
        self.size = self.text_size = self.engine.vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.engine.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.engine.decode(ids)

    def id_of(self, token: str) -> int | None:
        i = self.engine.piece_to_id(token)
        return i if self.engine.id_to_piece(i) == token else None

    def content(self) -> bytes:
        return self.model


def read_json(path: Path, optional: bool = False) -> dict:
    """A JSON object; {} for an optional file that does not exist."""
    try:
        values = {} if optional and not path.is_file() else json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); is this a run folder made by train.py?") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a {type(values).__name__}, expected an object")
    return values


def open_vocabulary(folder: Path, special: list[str]) -> BPE | SentencePiece:
    """The vocabulary of a folder, in the first layout that it has. `special`: tokens that text must never become."""
    layout = next((names for names in LAYOUTS if all((folder / name).is_file() for name in names)), None)
    if layout is None:
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
        raise UserError(f"{folder}: no tokenizer: found {found}; expected tokenizer.json, or vocab.json with "
                        "merges.txt, or tokenizer.model")
    path = folder / layout[0]
    if layout[0] == "vocab.json" and read_json(folder / "config.json", True).get("model_type", "opt") != "opt":
        raise UserError(f"{path}: this family splits words by a rule of its own; expected its tokenizer.json in {folder}")
    try:
        if layout[0] == "tokenizer.model":
            return SentencePiece(path.read_bytes())
        if layout[0] == "tokenizer.json":
            values = read_json(path)
            for token in values.get("added_tokens", []):
                token["special"] = token["special"] or token["content"] in special
            return BPE(tokenizers.Tokenizer.from_str(json.dumps(values)))
        engine = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(path), str(folder / "merges.txt")))
    except UserError:
        raise
    except Exception as error:  # both packages raise bare exceptions
        raise UserError(f"{path}: not a usable vocabulary ({str(error).strip()[:150]})") from None
    spaced = bool(read_json(folder / "tokenizer_config.json", True).get("add_prefix_space"))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    engine.decoder = tokenizers.decoders.ByteLevel()
    return BPE(engine)


def published_tokenizer(folder: Path) -> PublishedTokenizer:
    """The tokenizer of a Hugging Face folder, with Audio Flamingo's three special tokens numbered behind its own."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected that of a Hugging Face language model")
    config = read_json(folder / "config.json", optional=True)
    named = {**read_json(folder / "special_tokens_map.json", True), **read_json(folder / "tokenizer_config.json", True)}

    def content(role: str) -> str | None:
        value = named.get(f"{role}_token")
        value = value.get("content") if isinstance(value, dict) else value
        return value if isinstance(value, str) else None

    names = {role: content(role) for role in ("pad", "bos", "eos")}
    vocabulary = open_vocabulary(folder, [name for name in names.values() if name] + list(SPECIAL.values()))

    def id_of(role: str) -> int | None:
        found = vocabulary.id_of(names[role]) if names[role] else None
        value = config.get(f"{role}_token_id") if found is None else found
        value = value[0] if isinstance(value, list) and value else value
        return value if isinstance(value, int) and 0 <= value < vocabulary.size else None    # -1, or a token that only the model has

    eos = id_of("eos")
    if eos is None:
        raise UserError(f"{folder}: no end-of-text token: neither tokenizer_config.json (eos_token) nor config.json "
                        "(eos_token_id) names one that the vocabulary has")
    ids, following = {f"{role}_id": eos if id_of(role) is None else id_of(role) for role in names}, vocabulary.size
    for name, token in SPECIAL.items():
        ids[name] = vocabulary.id_of(token)
        if ids[name] is None:
            ids[name], following = following, following + 1
    start_ids = [ids["bos_id"]] * (2 if config.get("model_type") == "opt" else 1)
    return PublishedTokenizer(vocabulary, ids, start_ids)

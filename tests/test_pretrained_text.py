"""pretrained_text.py: published vocabularies give the ids that transformers gives, and typed special tokens stay text."""
import errno
import functools
import io
import json
import random
import tempfile
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers

from af_min.cli import UserError
from af_min.pretrained_text import PublishedTokenizer, published_tokenizer
from af_min.text import write_sample

STORED = Path(__file__).parent / "golden" / "tokenizer_ids.npz"     # written by `python tests/test_pretrained_text.py`
RANGES = ((0x20, 0x7F), (0xA0, 0x24F), (0x370, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F), (0x1100, 0x11FF), (0x2000, 0x22FF),
          (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1F6FF), (0x1F900, 0x1F9FF), (0x0, 0x20), (0x7F, 0xA0),
          (0xE000, 0xE010), (0xFFF0, 0xFFFE), (0x10000, 0x10FFFF))
WORDS = ("the", "a dog barks", "Rain", "don't", "we'll", "I'M", "1234567", "3.14", "e\u0301", "\u00e9", "naïve", "Ω", "👩‍👩‍👧", "🏳️‍🌈",
         "\u200b", "\u00a0", "  ", "\t", "\r\n", "\n\n", "   \n ", "...", "?!", "<tag>", "http://x.y/z?q=1", "ﬁ", "日本語", "한국어",
         "עברית", "हिन्दी", "ไทย", "Straße", "İstanbul", "\ufeff")


def lines(count=10_000, seed=0):
    """Varied lines: words and odd characters of many scripts, emoji, control characters, runs of white space."""
    rng = random.Random(seed)

    def piece():
        kind = rng.random()
        if kind < 0.45:
            return rng.choice(WORDS)
        if kind < 0.6:
            return " " * rng.randint(1, 4)
        low, high = rng.choice(RANGES)
        return "".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 6)))

    return ["".join(piece() for _ in range(rng.randint(0, 12))) for _ in range(count)]


def byte_level(special=()):
    """A byte-level BPE vocabulary trained on such lines."""
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=1200, special_tokens=list(special), show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    engine.train_from_iterator(lines(2000, seed=9), trainer)
    return engine


def write_opt(folder):
    """The layout of facebook/opt-*: vocab.json, merges.txt, special tokens named in tokenizer_config.json."""
    byte_level(("<s>", "<pad>", "</s>", "<unk>")).model.save(str(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": "opt", "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "add_prefix_space": False, "errors": "replace",
        "bos_token": {"__type": "AddedToken", "content": "</s>"}, "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>"}))


def write_llama(folder):
    """The layout of Llama 2: sentencepiece BPE with bytes as fallback."""
    out, rng = io.BytesIO(), random.Random(9)
    text = ["".join(chr(rng.randrange(97, 123)) for _ in range(6)) + " " + rng.choice(WORDS).strip() for _ in range(3000)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=out, vocab_size=1000, model_type="bpe", byte_fallback=True, character_coverage=0.999,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, minloglevel=2, num_threads=1)
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2}))


def write_qwen2(folder):
    """The layout of SmolLM2 and Qwen2: tokenizer.json with a split rule, a normalizer, and tokens that text may not become."""
    engine = byte_level(("<|endoftext|>", "<|im_end|>"))
    engine.normalizer = tokenizers.normalizers.NFC()
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    engine.add_tokens([tokenizers.AddedToken("<|chat|>", special=False)])
    engine.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "eos_token_id": [1, 0]}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>",
                                                              "pad_token": "<|chat|>"}))


def write_folders(parent):
    """{name: folder} of each layout."""
    folders = {}
    for write in (write_opt, write_llama, write_qwen2):
        folder = parent / write.__name__.removeprefix("write_")
        folder.mkdir()
        write(folder)
        folders[folder.name] = folder
    return folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("vocabularies"))


@pytest.fixture(params=("opt", "llama", "qwen2"))
def folder(request, folders):
    return folders[request.param]


def transformers_encode(folder):
    """transformers' own `encode` of a folder."""
    transformers = pytest.importorskip("transformers", reason="pip install -r tests/requirements.txt")
    if folder.name == "llama":
        pytest.importorskip("google.protobuf", reason="pip install -r tests/requirements.txt")     # reads sentencepiece models for it
    kind = {"opt": "AutoTokenizer", "qwen2": "PreTrainedTokenizerFast", "llama": "LlamaTokenizer"}[folder.name]
    return functools.partial(getattr(transformers, kind).from_pretrained(folder).encode, add_special_tokens=False)


def peer_lines(folder):
    """transformers drops one of the spaces that begin a text for Llama 2; sentencepiece, with which Llama was trained, does not."""
    return [line.lstrip(" ") if folder.name == "llama" else line for line in lines()]


def checksums(encode, folder):
    """A number for the ids of every ten of the 10,000 lines."""
    ids = [encode(line) for line in peer_lines(folder)]
    return np.array([zlib.crc32(str(ids[i:i + 10]).encode()) for i in range(0, len(ids), 10)], np.uint32)


def test_ids_are_those_of_transformers(folder):
    theirs, ours = transformers_encode(folder), published_tokenizer(folder)
    for line in peer_lines(folder):
        assert ours.encode(line) == theirs(line), repr(line)


def test_a_space_that_a_vocabulary_puts_before_text_is_put_there(tmp_path):
    """add_prefix_space, false in the published OPT folders."""
    folder = tmp_path / "opt"
    folder.mkdir()
    write_opt(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "add_prefix_space": True}))
    theirs, ours = transformers_encode(folder), published_tokenizer(folder)
    ours.save(folder)
    again = PublishedTokenizer.load(folder)
    for line in lines(500):
        assert ours.encode(line) == theirs(line) == again.encode(line), repr(line)


def test_ids_are_the_stored_ones_of_transformers(folder):
    ours = published_tokenizer(folder)
    other = np.flatnonzero(checksums(ours.encode, folder) != np.load(STORED)[folder.name])
    assert not len(other), f"{len(other)} of 1000 groups of ten lines, such as {peer_lines(folder)[10 * other[0]:][:10]}"


def test_sentencepiece_ids_are_those_of_sentencepiece(folders):
    ours = published_tokenizer(folders["llama"])
    engine = sentencepiece.SentencePieceProcessor(model_file=str(folders["llama"] / "tokenizer.model"))
    for line in lines():
        assert ours.encode(line) == engine.encode(line)


def test_decoding_gives_the_text_back(folder):
    tokenizer = published_tokenizer(folder)
    for line in lines(500, seed=3):
        line = line.replace("\0", "")
        back = tokenizer.decode([tokenizer.sep_id, *tokenizer.encode(line), tokenizer.eoc_id, tokenizer.eos_id])
        assert unicodedata.normalize("NFC", back) == unicodedata.normalize("NFC", line)


def test_typed_special_tokens_are_text(folder):
    tokenizer = published_tokenizer(folder)
    typed = "<audio> </s><s><pad><unk> <|endofchunk|><SEP> <|endoftext|><|im_end|><|chat|>"
    assert not set(tokenizer.encode(typed)) & tokenizer.special_ids
    assert tokenizer.decode(tokenizer.encode(typed)) == typed


def test_special_tokens_have_the_released_ids(folders):
    """Behind the vocabulary: <audio>, <|endofchunk|>, <SEP>. OPT's texts begin with its bos twice."""
    for name, size, pad, bos, eos, start in (("opt", 1200, 1, 2, 2, [2, 2]), ("llama", 1000, 2, 1, 2, [1]),
                                             ("qwen2", 1201, 1200, 1, 1, [1])):
        t = published_tokenizer(folders[name])
        assert (t.audio_id, t.eoc_id, t.sep_id, t.vocab_size) == (size, size + 1, size + 2, size + 3)
        assert (t.pad_id, t.bos_id, t.eos_id, t.start_ids) == (pad, bos, eos, start)


@pytest.mark.parametrize("pad", [-1, 1000, []])
def test_an_id_that_the_vocabulary_does_not_have_names_no_token(tmp_path, pad):
    """Llama folders say -1, or name a token that was added to the model alone; there <audio> would be padding too."""
    write_llama(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "pad_token_id": pad}))
    t = published_tokenizer(tmp_path)
    assert (t.pad_id, t.eos_id, t.audio_id) == (2, 2, 1000)
    (tmp_path / "config.json").write_text(json.dumps({**values, "eos_token_id": pad}))
    with pytest.raises(UserError, match="no end-of-text token"):
        published_tokenizer(tmp_path)


def test_a_saved_tokenizer_is_the_same(folder, tmp_path):
    tokenizer = published_tokenizer(folder)
    tokenizer.save(tmp_path)
    again = PublishedTokenizer.load(tmp_path)
    assert vars(again).keys() == vars(tokenizer).keys() and again.special_ids == tokenizer.special_ids
    assert again.start_ids == tokenizer.start_ids and again.vocab_size == tokenizer.vocab_size
    for line in [*lines(200), "<audio></s><|im_end|><|chat|>"]:
        assert again.encode(line) == tokenizer.encode(line)


def test_a_save_that_the_disk_has_no_room_for_leaves_the_last_one(folder, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    tokenizer = published_tokenizer(folder)
    tokenizer.save(tmp_path)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError):
        tokenizer.save(tmp_path)
    assert PublishedTokenizer.load(tmp_path).encode("a dog barks") == tokenizer.encode("a dog barks")


def test_a_run_folder_that_is_used_again_holds_the_new_vocabulary_alone(folders, tmp_path):
    for name in ("qwen2", "llama", "opt"):
        tokenizer = published_tokenizer(folders[name])
        tokenizer.save(tmp_path)
        assert PublishedTokenizer.load(tmp_path).encode("a dog barks") == tokenizer.encode("a dog barks")
    (tmp_path / "special_tokens.json").write_text('{"pad_id": 1}')
    with pytest.raises(UserError, match="special_tokens.json: bos_id is missing"):
        PublishedTokenizer.load(tmp_path)


def test_the_templates_take_it(folders):
    t = published_tokenizer(folders["opt"])
    sample = write_sample(t, {"audio": "x.wav", "task": "AudioCaptioning", "prompt": "what?", "answer": "a dog </s>"})
    assert [i for i in sample.ids if i in t.special_ids][-4:] == [t.audio_id, t.sep_id, t.eoc_id, t.eos_id]
    assert t.decode(sample.ids).endswith("Answer:a dog </s>")


def test_bad_folders_are_named(tmp_path, folders):
    with pytest.raises(UserError, match="no tokenizer: found nothing; expected tokenizer.json, or vocab.json with merges.txt"):
        published_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{ not json")
    with pytest.raises(UserError, match="tokenizer.json: not JSON"):
        published_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(UserError, match="tokenizer.json: not a usable vocabulary"):
        published_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    for content in (b"nothing", b""):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(UserError, match="tokenizer.model: not a usable vocabulary"):
            published_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((folders["opt"] / name).read_bytes())
    with pytest.raises(UserError, match="no end-of-text token"):
        published_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "eos_token_id": 2}')
    with pytest.raises(UserError, match="expected its tokenizer.json"):
        published_tokenizer(tmp_path)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        np.savez_compressed(STORED, **{name: checksums(transformers_encode(folder), folder)
                                       for name, folder in write_folders(Path(scratch)).items()})

"""text.py: ids and labels of every template written out by hand; what a user types is text and stays text."""
import random
import sys

import pytest

from af_min import text
from af_min.cli import UserError
from af_min.text import IGNORE, Tokenizer, question, write_sample


def sequence(tokenizer, *pieces):
    """Pieces of a sequence -> ids, labels. "text" is not supervised, ["text"] is; special tokens by their letters, (token,) if supervised."""
    special = {"<s>": tokenizer.bos_id, "</s>": tokenizer.eos_id, "<audio>": tokenizer.audio_id, "<SEP>": tokenizer.sep_id,
               "<eoc>": tokenizer.eoc_id}
    ids, labels = [], []
    for piece in pieces:
        supervised, words = not isinstance(piece, str), piece if isinstance(piece, str) else piece[0]
        new = [special[words]] if words in special else tokenizer.encode(words)
        ids += new
        labels += new if supervised else [IGNORE] * len(new)
    return ids, labels


def both(sample):
    return sample.ids, sample.labels


BELL = {"audio": "bell.wav", "start": 1.5, "task": "AudioCaptioning", "prompt": "Describe the SOUNDS.", "answer": "Bell then dog"}


# ---------------------------------------------------------------------- the three templates

def test_single(tokenizer):
    sample = write_sample(tokenizer, BELL)
    assert both(sample) == sequence(tokenizer, "<s>", "The task is audio captioning. ", "<audio>", "describe the sounds.\nAnswer:", "<SEP>",
                                    ["bell then dog"], ["<eoc>"], ["</s>"])
    assert sample.audios == (("bell.wav", 1.5),)


def test_interleaved_every_answer_is_supervised(tokenizer):
    row = {"audio": "q.wav", "task": "FewShot", "prompt": "classify this sound.", "answer": "no",
           "shots": [{"audio": "a.wav", "start": 2.0, "prompt": "Classify this sound.", "answer": "bell"},
                     {"audio": "b.wav", "prompt": "classify this sound.", "answer": "Horn", "loss": False}]}
    sample, asked = write_sample(tokenizer, row), "classify this sound.\nAnswer:"
    assert both(sample) == sequence(
        tokenizer, "<s>", "Here are similar examples. The task is sound classification. ", "<audio>", asked, "<SEP>", ["bell"], ["<eoc>"],
        "<audio>", asked, "<SEP>", "horn", "<eoc>",                               # "loss": false
        "<audio>", asked, "<SEP>", ["no"], ["<eoc>"], ["</s>"])
    assert sample.audios == (("a.wav", 2.0), ("b.wav", 0.0), ("q.wav", 0.0))


def test_dialogue_has_one_audio_and_an_end_after_every_turn(tokenizer):
    row = {"audio": "d.wav", "task": "Dialogue", "turns": [
        {"user": "What comes after the bell?", "assistant": "Dog"}, {"user": "is it HIGH?", "assistant": "low", "loss": False},
        {"user": "bell?", "assistant": "no"}]}
    sample = write_sample(tokenizer, row)
    assert both(sample) == sequence(
        tokenizer, "<s>", "The task is dialog. ", "<audio>",
        "user: what comes after the bell? \nassistant: ", "<SEP>", ["dog"], ["<eoc>"], ["</s>"],
        "\nuser: is it high? \nassistant: ", "<SEP>", "low", "<eoc>", "</s>",
        "\nuser: bell? \nassistant: ", "<SEP>", ["no"], ["<eoc>"], ["</s>"])
    assert sample.audios == (("d.wav", 0.0),)


def test_an_open_sample_ends_where_the_answer_begins(tokenizer):
    dialogue = {"audio": "d.wav", "task": "Dialogue", "turns": [{"user": "bell?", "assistant": "no"}, {"user": "dog?", "assistant": "?"}]}
    assert both(write_sample(tokenizer, BELL, complete=False)) == sequence(
        tokenizer, "<s>", "The task is audio captioning. ", "<audio>", "describe the sounds.\nAnswer:", "<SEP>")
    assert both(write_sample(tokenizer, {**BELL, "shots": [BELL]}, complete=False)) == sequence(
        tokenizer, "<s>", "Here are similar examples. The task is audio captioning. ", "<audio>", "describe the sounds.\nAnswer:", "<SEP>",
        ["bell then dog"], ["<eoc>"], "<audio>", "describe the sounds.\nAnswer:", "<SEP>")
    assert both(write_sample(tokenizer, dialogue, complete=False)) == sequence(
        tokenizer, "<s>", "The task is dialog. ", "<audio>", "user: bell? \nassistant: ", "<SEP>", ["no"], ["<eoc>"], ["</s>"],
        "\nuser: dog? \nassistant: ", "<SEP>")


def test_described_samples_have_words_in_the_place_of_audio(tokenizer):
    sample = write_sample(tokenizer, {**BELL, "description": "bell then dog", "shots": [BELL]}, described=True)
    asked = "describe the sounds.\nAnswer:"
    assert both(sample) == sequence(
        tokenizer, "<s>", "Here are similar examples. The task is audio captioning. ", asked, "<SEP>", ["bell then dog"], ["<eoc>"],
        "bell then dog.\n", asked, "<SEP>", ["bell then dog"], ["<eoc>"], ["</s>"])
    assert sample.audios == ()


def test_where_there_is_no_recording_there_is_no_audio_token(tokenizer):
    """Else the audios of later shots would be counted wrong. A task without a prefix begins with the question."""
    row = {"task": "?", "prompt": "bell?", "answer": "no", "shots": [{"prompt": "dog?", "answer": "no"}, {**BELL, "answer": "bell"}]}
    sample = write_sample(tokenizer, row)
    assert both(sample) == sequence(
        tokenizer, "<s>", "Here are similar examples. ", "dog?\nAnswer:", "<SEP>", ["no"], ["<eoc>"], "<audio>", "describe the sounds.\nAnswer:",
        "<SEP>", ["bell"], ["<eoc>"], "bell?\nAnswer:", "<SEP>", ["no"], ["<eoc>"], ["</s>"])
    assert sample.audios == (("bell.wav", 1.5),)
    assert both(write_sample(tokenizer, {"task": "?", "prompt": "bell?", "answer": "no"})) == sequence(
        tokenizer, "<s>", "bell?\nAnswer:", "<SEP>", ["no"], ["<eoc>"], ["</s>"])


@pytest.mark.parametrize("task, expected", [
    ("AudioCaptioning", "The task is audio captioning. "), ("AQA", "The task is audio question answering. "),
    ("Count", "The task is audio question answering. "), ("FewShotUnseen", "The task is sound classification. "), ("?", ""),
    ("InstrumentClassification", "The task is instrument classification. "), ("MusicCaptioning", "The task is music captioning. ")])
def test_prefixes(task, expected):
    assert text.prefix(task) == expected


def test_options_are_listed_as_the_paper_lists_them():
    assert question("AudioClassification", "what is it?", ["a", "b c"])["prompt"] == "what is it?\noptions:\n - a.\n - b c."
    assert question("AQA", "what is it?")["prompt"] == "what is it?"


def test_the_first_two_tokens_are_never_labels(tokenizer):
    """OPT's own bos and the text's: what stands there is no answer, an </s> no more than anything else."""
    for words_before in range(3):
        writer = text.Writer(tokenizer)
        for _ in range(words_before):
            writer.special(tokenizer.audio_id)
        writer.special(tokenizer.eos_id, supervised=True)
        assert writer.labels[-1] == (tokenizer.eos_id if len(writer.ids) - 1 >= 2 else IGNORE)


# ---------------------------------------------------------------------- the length limit

def cut_by_hand(ids, labels, limit, tokenizer):
    """Label runs are answers: from behind a <SEP> to the next thing that is not supervised. Whole in, or out."""
    kept = labels[:limit]
    answer = []                                        # positions of the answer in progress
    for position, token in enumerate(ids):
        if token == tokenizer.sep_id:
            answer = []
        answer.append(position)
        if token == tokenizer.eoc_id:
            if position >= limit:
                for p in answer:
                    if p < limit:
                        kept[p] = IGNORE
            answer = []
    return ids[:limit], kept


def test_an_answer_that_is_cut_is_not_supervised_at_all(tokenizer):
    """At every possible limit. What stands before the cut answer, an </s> that closes a turn included, keeps its labels."""
    rows = [{**BELL, "shots": [BELL, BELL]}, {"audio": "d.wav", "task": "Dialogue", "turns": [
        {"user": "what is it?", "assistant": "bell then dog then horn"}, {"user": "and then?", "assistant": "horn then bell"}]}]
    for row in rows:
        whole = write_sample(tokenizer, row)
        for limit in range(1, len(whole.ids) + 2):
            got = write_sample(tokenizer, row, max_tokens=limit)
            assert both(got) == cut_by_hand(whole.ids, whole.labels, limit, tokenizer), f"max_tokens={limit}"
            assert got.audios == whole.audios[:got.ids.count(tokenizer.audio_id)]


# ---------------------------------------------------------------------- typed special tokens

TYPED = ["<audio>", "<SEP>", "</s>", "<s>", "<|endofchunk|>", "<pad>", "<unk>", "<0x41>"]


@pytest.mark.parametrize("typed", TYPED)
def test_a_typed_special_token_stays_text(tokenizer, typed):
    ids = tokenizer.encode(f"say {typed} and {typed}")
    assert max(ids) < tokenizer.vocab_size - 6 and tokenizer.decode(ids) == f"say {typed} and {typed}"


@pytest.mark.parametrize("typed", TYPED)
def test_a_typed_special_token_adds_no_audio_and_no_end(tokenizer, typed):
    row = {"audio": "x.wav", "task": "AQA", "prompt": typed, "answer": typed, "shots": [{"audio": "y.wav", "prompt": typed, "answer": typed}]}
    ids = write_sample(tokenizer, row).ids
    assert [ids.count(i) for i in (tokenizer.audio_id, tokenizer.sep_id, tokenizer.eoc_id, tokenizer.eos_id, tokenizer.bos_id)] == [2, 2, 2, 1, 1]


def test_training_text_that_holds_special_tokens_makes_no_such_piece():
    tokenizer = Tokenizer.train(TYPED * 50 + ["the bell rings"] * 50, 330)
    for typed in TYPED:
        assert max(tokenizer.encode(typed)) < tokenizer.vocab_size - 6 and tokenizer.decode(tokenizer.encode(typed)) == typed


# ---------------------------------------------------------------------- the tokenizer

def test_special_tokens_lie_behind_the_vocabulary(tokenizer):
    special = [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.audio_id, tokenizer.eoc_id, tokenizer.sep_id]
    assert sorted(special) == list(range(tokenizer.vocab_size - 6, tokenizer.vocab_size))
    assert tokenizer.pieces.vocab_size() == tokenizer.vocab_size - 6 and tokenizer.vocab_size <= 400


def test_special_tokens_are_left_out_of_what_is_read(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("bell then dog"), tokenizer.eoc_id, tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode(ids) == "bell then dog"


def test_any_text_comes_back(tokenizer):
    """Every writing system, control characters, runs of spaces and line ends. One space at the very beginning may go."""
    draws = random.Random(0)
    points = [c for c in range(1, sys.maxunicode + 1) if not 0xD800 <= c < 0xE000 and c != 0x2581]    # ▁ is how the tokenizer writes a space
    texts = ["", "\n", " ", "   x", "a  b ", "tab\tand\r\nline", "e\u0301 \ufb01 \u00a0 \u2028", "\U0001f514 bell", "ALL caps", "0123 9.75"]
    texts += ["".join(chr(draws.choice(points)) for _ in range(draws.randint(1, 30))) for _ in range(200)]
    texts += ["".join(draws.choice(" \n\tabcé漢-.,?<>|/") for _ in range(draws.randint(1, 40))) for _ in range(300)]
    for given in texts:
        assert tokenizer.decode(tokenizer.encode(given)) == given.removeprefix(" "), repr(given)


def test_half_a_character_is_a_question_mark(tokenizer):
    """As for published vocabularies: a terminal's bytes that are no UTF-8, a torn emoji in JSON. Also in what a tokenizer learns from."""
    for one in (tokenizer, Tokenizer.train(["bell \udcff"] * 9, 400)):
        assert one.decode(one.encode("bell \udcff \ud83d")) == "bell ? ?"


def test_a_writing_with_more_characters_than_ids_is_learned_too():
    """Frequent ones get a piece of their own, rare ones are spelt in bytes."""
    draws = random.Random(0)
    lines = ["的" + "".join(chr(draws.randrange(0x4E00, 0x5A00)) for _ in range(20)) for _ in range(500)]
    tokenizer = Tokenizer.train(lines, 400)
    assert tokenizer.vocab_size <= 400 and len(tokenizer.encode("的的")) < 6
    assert all(tokenizer.decode(tokenizer.encode(line)) == line for line in lines)


def test_the_same_lines_make_the_same_tokenizer(tokenizer, tmp_path):
    from conftest import LINES
    assert Tokenizer.train(LINES, 400).model == tokenizer.model
    tokenizer.save(tmp_path / "tokenizer.model")
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.model"]
    assert Tokenizer.load(tmp_path / "tokenizer.model").encode("bell then dog") == tokenizer.encode("bell then dog")


@pytest.mark.parametrize("content", [None, b"", b"not a model" * 99], ids=["missing", "empty", "other"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match="tokenizer.model: not a sentencepiece model"):
        Tokenizer.load(tmp_path / "tokenizer.model")

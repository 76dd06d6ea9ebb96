"""metrics.py: equal to pycocoevalcap, scikit-learn and arithmetic by hand."""
import functools
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from af_min import metrics

STORED = Path(__file__).parent / "golden" / "caption_scores.npz"        # written by `python tests/test_metrics.py`
VOCABULARY = "a the dog cat bird bell rain wind car barks sings rings falls passes loudly softly twice near far and then while".split()


def caption_sets(count, seed):
    """Random captions: answers are a reference with words replaced, dropped and repeated, or have nothing to do with it."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        refs = [[*rng.choice(VOCABULARY, rng.integers(1, 15))] for _ in range(rng.integers(1, 6))]
        said = [w for w in refs[0] if rng.random() < 0.8] + [*rng.choice(VOCABULARY, rng.integers(0, 4))]
        yield [str(w) for w in said] or ["a"], [[str(w) for w in ref] for ref in refs]


@functools.cache
def sets():
    """1000 items in 40 sets of 1 to 49."""
    items, sizes = list(caption_sets(1000, 0)), [*range(1, 50, 2), *range(1, 51, 2)][:40]
    ends = np.minimum(np.cumsum(sizes), 1000)
    ends[-1] = 1000
    return [tuple(map(list, zip(*items[end - size:end]))) for end, size in zip(ends, np.diff(ends, prepend=0))]


def ours():
    counts = [metrics.bleu_counts(said, refs) for said, refs in sets()]
    return {"cider": np.concatenate([metrics.cider_d(said, refs) for said, refs in sets()]),
            "rouge": np.concatenate([metrics.rouge_l(said, refs) for said, refs in sets()]),
            "bleu": np.stack([metrics.bleu(count.sum(0)) for count in counts]),
            "bleu_each": np.stack([metrics.bleu(one) for count in counts for one in count])}


def pycocoevalcaps():
    pytest.importorskip("pycocoevalcap", reason="pip install -r tests/requirements.txt")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    scores = {"cider": [], "rouge": [], "bleu": [], "bleu_each": []}
    for said, refs in sets():
        gts = {i: [" ".join(r) for r in ref] for i, ref in enumerate(refs)}
        res = {i: [" ".join(s)] for i, s in enumerate(said)}
        mean, each = Bleu(4).compute_score(gts, res, verbose=0)
        scores["bleu"].append(mean)
        scores["bleu_each"] += zip(*each)
        scores["cider"] += list(Cider().compute_score(gts, res)[1])
        scores["rouge"] += list(Rouge().compute_score(gts, res)[1])
    return {name: np.array(values) for name, values in scores.items()}


@pytest.mark.parametrize("peer", [pycocoevalcaps, lambda: np.load(STORED)], ids=["installed", "stored"])
def test_cider_d_rouge_l_and_bleu_are_pycocoevalcaps(peer):
    """CIDEr-D and ROUGE-L of every item, BLEU-1 to 4 of every set and of every item; installed, and the stored figures of it."""
    expected = peer()
    for name, values in ours().items():
        np.testing.assert_allclose(values, expected[name], atol=1e-6, err_msg=name)


def test_caption_scores_by_hand():
    said, refs = ["a dog barks".split()], [["a dog barks loudly".split(), "rain".split()]]
    assert metrics.bleu(metrics.bleu_counts(said, refs).sum(0))[:3] == pytest.approx([np.exp(1 - 4 / 3)] * 3)   # 1 word short
    assert metrics.rouge_l(said, refs)[0] == pytest.approx(2.44 * 0.75 / (0.75 + 1.44))
    two = metrics.cider_d(["dog".split(), "rain".split()], [["dog".split()], ["wind".split()]])
    assert two.tolist() == pytest.approx([10 / 4, 0.0])                      # 1-grams alone, weight cancels


def test_an_empty_answer_scores_zero_and_breaks_nothing():
    said, refs = [[], "dog".split()], [["a dog barks".split()], ["dog".split()]]
    assert metrics.cider_d(said, refs)[0] == metrics.rouge_l(said, refs)[0] == 0
    assert metrics.bleu(metrics.bleu_counts(said[:1], refs[:1]).sum(0)) == pytest.approx([0, 0, 0, 0], abs=1e-6)


def test_words_drop_case_and_punctuation_and_split_contractions():
    assert metrics.words('A dog\'s bark; it DOESN\u2019T stop ("loud"), at 5-second steps.') == \
        "a dog 's bark it does n't stop loud at 5-second steps".split()
    assert metrics.words("they're 'here'. ...") == ["they", "'re", "here"]


def test_tags_pair_once_the_likest_first():
    assert metrics.tag_counts("dog, Bark.", "bark,cat,dog") == (2, 2, 3)
    assert metrics.tag_counts("guitar", "acoustic guitar, guitar", 0.5) == (1, 1, 2)
    assert metrics.tag_counts("guitar, acoustic guitar", "acoustic guitar, electric guitar", 0.5) == (2, 2, 2)
    assert metrics.tag_counts("guitar, acoustic guitar", "acoustic guitar, electric guitar") == (1, 2, 2)
    assert metrics.tag_counts("dog, dog", "dog") == (1, 2, 1), "a tag said twice counts once"
    assert metrics.f1(np.array([2, 2, 3])) == pytest.approx(0.8)


def test_mean_average_precision_is_scikit_learns_with_ties_and_absent_classes():
    """Many equal scores, and hardly any; beside scikit-learn, where it is installed, what it said (1.9.1)."""
    rng = np.random.default_rng(0)
    for levels, stored in ((3, 0.25690947482506615), (1000, 0.3090118356747292)):
        scores, true = rng.integers(levels, size=(60, 7)) / levels, rng.random((60, 7)) < 0.3
        true[:, 2] = False
        got = metrics.mean_average_precision(scores, true)
        assert got == pytest.approx(stored, abs=1e-12)
        if importlib.util.find_spec("sklearn"):
            from sklearn.metrics import average_precision_score
            expected = np.mean([average_precision_score(true[:, c], scores[:, c]) for c in range(7) if c != 2])
            assert got == pytest.approx(expected, abs=1e-12)


def test_events_count_as_multisets():
    assert metrics.event_counts("bell then dog then bell.", "dog then bell then cat") == (2, 3, 3)
    counts = [metrics.event_counts(*pair) for pair in (("bell then dog", "dog then bell"), ("cat", "bell"))]
    assert metrics.f1(np.sum(counts, 0)) == pytest.approx(4 / 6)


def test_the_interval_of_a_mean_is_the_normal_one_and_covers_it_as_often_as_it_says():
    rng = np.random.default_rng(1)
    x = rng.random(400) < 0.3
    low, high = metrics.interval(lambda i: x[i].mean(), len(x))
    wide = 1.96 * np.sqrt(x.mean() * (1 - x.mean()) / len(x))
    assert (low, high) == pytest.approx((x.mean() - wide, x.mean() + wide), abs=0.008)
    samples = rng.random((200, 100)) < 0.3
    spans = [metrics.interval(lambda i: s[i].mean(), 100, 200) for s in samples]
    assert 0.88 <= np.mean([low <= 0.3 <= high for low, high in spans]) <= 0.98


if __name__ == "__main__":
    np.savez_compressed(STORED, **pycocoevalcaps())

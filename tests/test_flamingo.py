"""flamingo.py: caches, padding and batches change nothing; text hears the audios that it may and no other; 2.2 B parameters."""
import dataclasses
import math

import numpy as np
import pytest
import torch

from af_min.config import AF1, PRESETS
from af_min.flamingo import AudioFlamingo, Sampling, draw
from conftest import shake

TEXT, END, PAD = 5, 3, 0       # an id of plain text; what ends an answer; padding


def model_of(config, **xattn):
    return shake(AudioFlamingo(dataclasses.replace(config, xattn=dataclasses.replace(config.xattn, **xattn))), scale=0.2)


@pytest.fixture(scope="module", params=["paper", "audio_index", "tiny"])
def model(request, micro_config):
    more = {"positions": "rope", "conv": 3} if request.param == "tiny" else {}         # all that `tiny` has beside the paper's
    config = dataclasses.replace(micro_config, lm=dataclasses.replace(micro_config.lm, **more))
    return model_of(config, audio_index=request.param != "paper", null_key=request.param == "tiny")


def some_text(model, audios, seed=0, words=4):
    """A few words, then for each audio <audio> and a few words. (1, T)"""
    draws = torch.Generator().manual_seed(seed)
    pieces = [torch.randint(4, 300, (words,), generator=draws)]
    for _ in range(audios):
        pieces += [torch.tensor([model.config.audio_id]), torch.randint(4, 300, (words,), generator=draws)]
    return torch.cat(pieces)[None]


def some_audios(model, counts, seed=0):
    """Window embeddings of one sample's audios of `counts` windows each -> (A, W, D), (1, N)."""
    draws = torch.Generator().manual_seed(100 + seed)
    windows = torch.randn(len(counts), max(counts, default=0), model.config.clap.out_width, generator=draws)
    for a, n in enumerate(counts):
        windows[a, n:] = 0
    return windows, torch.tensor([counts], dtype=torch.long).reshape(1, len(counts))


def logits_of(model, ids, windows, n_windows, mask=None):
    return model.lm.logits(model.hidden(ids, model.listen(windows, n_windows), mask))


def far(got, expected):
    """Largest difference, relative to the largest logit."""
    return ((got - expected).abs().max() / expected.abs().max()).item()


def join(samples):
    """Samples (ids, windows, n_windows), padded on the right -> one batch's windows and n_windows."""
    n = torch.zeros(len(samples), max(s[2].shape[1] for s in samples), dtype=torch.long)
    windows = torch.zeros(sum(len(s[1]) for s in samples), max(s[1].shape[1] for s in samples), samples[0][1].shape[2])
    a = 0
    for b, (_, own, counts) in enumerate(samples):
        n[b, :counts.shape[1]] = counts
        windows[a:a + len(own), :own.shape[1]] = own
        a += len(own)
    return windows, n


def pad(texts, side):
    longest = max(x.shape[1] for x in texts)
    ids, mask = torch.full((len(texts), longest), PAD), torch.zeros(len(texts), longest, dtype=torch.bool)
    for b, x in enumerate(texts):
        span = slice(longest - x.shape[1], longest) if side == "left" else slice(0, x.shape[1])
        ids[b, span], mask[b, span] = x[0], True
    return ids, mask


SAMPLES = [[3], [2, 5, 1, 4], [], [6, 1], [1, 1, 7]]       # windows of each audio


# ---------------------------------------------------------------------- cached == uncached

@pytest.mark.parametrize("counts", [[4], [3, 1], [2, 6, 1], [1, 2, 3, 4]], ids=lambda c: f"{len(c)} audios")
@torch.no_grad()
def test_cached_generation_is_uncached_generation(model, counts):
    windows, n_windows = some_audios(model, counts)
    ids = some_text(model, len(counts))
    state = model.start(model.listen(windows, n_windows), 60)
    cached = [model.read(ids, state)]
    tokens = []
    for token in model.generate(cached[0].clone(), state, -1, PAD, 12, Sampling(temperature=1.0, seed=4)):
        tokens.append(token)
    grown = torch.cat([ids, torch.stack(tokens, 1)], 1)
    expected = logits_of(model, grown, windows, n_windows)[:, ids.shape[1] - 1:]
    assert len(tokens) == 12
    draws = torch.Generator().manual_seed(4)
    for i, token in enumerate(tokens):             # each token is what the uncached logits give
        assert torch.equal(draw(expected[:, i].float(), Sampling(temperature=1.0, seed=4), draws), token)
    again = model.read(torch.tensor([[TEXT]]), state)             # and the cache has read them all, the last one too
    whole = logits_of(model, torch.cat([grown, torch.tensor([[TEXT]])], 1), windows, n_windows)[:, -1]
    assert far(cached[0], expected[:, 0]) < 1e-5 and far(again, whole) < 1e-5


@pytest.mark.parametrize("cuts", [[1] * 19, [4, 1, 14], [5, 5, 9], [7, 2, 9, 1], [18, 1]])
@torch.no_grad()
def test_a_text_read_in_parts_is_the_text_read_at_once(model, cuts):
    """Also where an <audio> begins, ends or stands alone in a part; a dialogue goes on from what was read."""
    windows, n_windows = some_audios(model, [3, 2, 5])
    ids = some_text(model, 3)
    state = model.start(model.listen(windows, n_windows), 19)
    expected, end = logits_of(model, ids, windows, n_windows), 0
    for part in ids.split(cuts, 1):
        end += part.shape[1]
        assert far(model.read(part, state), expected[:, end - 1]) < 1e-5
    assert state.seen_B.tolist() == [3] and state.cache.length == 19


# ---------------------------------------------------------------------- batch == single

@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_in_a_batch_each_sample_has_the_logits_that_it_has_alone(model, side):
    samples = [(some_text(model, len(c), seed=i, words=2 + i), *some_audios(model, c, seed=i)) for i, c in enumerate(SAMPLES)]
    ids, mask = pad([s[0] for s in samples], side)
    windows, n_windows = join(samples)
    windows[0, 3:] = 9.0                                           # what stands in unused windows does not matter
    got = logits_of(model, ids, windows, n_windows, mask)
    for b, sample in enumerate(samples):
        assert far(got[b][mask[b]][None], logits_of(model, *sample)) < 1e-5


@torch.no_grad()
def test_in_a_batch_each_sample_gets_the_answer_that_it_gets_alone(model):
    samples = [(some_text(model, len(c), seed=i, words=2 + i), *some_audios(model, c, seed=i)) for i, c in enumerate(SAMPLES)]

    def answers(samples, stop):
        ids, mask = pad([s[0] for s in samples], "left")
        state = model.start(model.listen(*join(samples)), 80)
        steps = torch.stack(list(model.generate(model.read(ids, state, mask), state, stop, PAD, 10, banned=(PAD,))), 1)
        return [row[:row.index(PAD)] if PAD in row else row for row in steps.tolist()], state

    stop = answers(samples[1:2], END)[0][0][3]                     # a word that some row says in the middle of its answer
    together, state = answers(samples, stop)
    alone = [answers([s], stop)[0][0] for s in samples]
    assert together == alone
    assert len({len(a) for a in alone}) > 1, "expected rows of different lengths"
    ids, mask = pad([torch.tensor([[TEXT, TEXT + 1]])] * len(samples), "left")
    more = model.read(ids, state, mask)                            # the dialogue goes on in rows that ended early, too
    for b, (sample, answer) in enumerate(zip(samples, alone)):
        text = torch.cat([sample[0], torch.tensor([answer + [TEXT, TEXT + 1]])], 1)
        assert far(more[b], logits_of(model, text, *sample[1:])[0, -1]) < 1e-5


# ---------------------------------------------------------------------- is it listening, and to whom

@pytest.mark.parametrize("changed", [0, 1, 2])
@torch.no_grad()
def test_a_text_changes_if_and_only_if_an_audio_that_it_may_hear_changes(model, changed):
    windows, n_windows = some_audios(model, [3, 2, 4])
    ids = some_text(model, 3)                                      # 4 words, then three times <audio> and 4 words
    before = logits_of(model, ids, windows, n_windows)
    windows[changed, n_windows[0, changed] - 1] *= -1               # its last window
    moved = (logits_of(model, ids, windows, n_windows) - before).abs().amax(-1)[0]
    first = 0 if changed == 0 else 4 + 5 * changed                 # the words before the first <audio> hear audio 1
    assert (moved[:first] == 0).all(), "an audio was heard before its <audio>"
    assert (moved[first:] > 1e-4).all(), "an audio was not heard after its <audio>"


@torch.no_grad()
def test_exchanged_audios_change_the_text(model):
    windows, n_windows = some_audios(model, [4, 4])
    ids = some_text(model, 2)
    assert far(logits_of(model, ids, windows.flip(0), n_windows), logits_of(model, ids, windows, n_windows)) > 1e-3


@torch.no_grad()
def test_closed_gates_leave_the_language_models_logits_untouched(micro_config):
    model = model_of(micro_config, audio_index=False)
    for block in model.xattn.values():
        block.attn_gate.zero_(), block.ff_gate.zero_()
    ids = some_text(model, 2)
    assert torch.equal(logits_of(model, ids, *some_audios(model, [3, 5])), model.lm.logits(model.lm(ids)))


def test_the_papers_preset_starts_with_closed_gates():
    assert AF1.xattn.gate_init == 0 and not AF1.xattn.audio_index and not AF1.representation.attend_padding


@torch.no_grad()
def test_a_sample_without_audio(model):
    """It hears nothing: the attention branch is 0, the feed-forward branch stays. Alone or beside samples with audio."""
    ids = some_text(model, 0)

    def deaf(layer, x):
        block = model.xattn[str(layer)]
        return x + block.ff_gate.tanh() * block.down(torch.nn.functional.gelu(block.up(block.ff_norm(x))))

    expected = model.lm.logits(model.lm(ids, before_layer=deaf))
    nothing = torch.zeros(0, 0, model.config.clap.out_width)
    for n_windows in (torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long)):
        assert far(logits_of(model, ids, nothing, n_windows), expected) < 1e-5
    windows, n_windows = join([(ids, *some_audios(model, [3, 2])), (ids, nothing, torch.zeros(1, 0, dtype=torch.long))])
    assert far(logits_of(model, ids.expand(2, -1), windows, n_windows)[1:], expected) < 1e-5
    state = model.start(model.listen(nothing, torch.zeros(1, 0, dtype=torch.long)), 20)
    assert far(model.read(ids, state), expected[:, -1]) < 1e-5
    assert len(list(model.generate(model.read(ids[:, :1], state), state, END, PAD, 3))) >= 1


@torch.no_grad()
def test_blocks_stand_before_every_nth_layer(micro_config):
    config = dataclasses.replace(micro_config, lm=dataclasses.replace(micro_config.lm, layers=5))
    model = model_of(config, every=2)
    assert list(model.xattn) == ["0", "2", "4"]
    ids, windows = some_text(model, 1), some_audios(model, [3])
    assert far(logits_of(model, ids, *windows), logits_of(model, ids, -windows[0], windows[1])) > 1e-3


@torch.no_grad()
def test_pooling_is_one_window_that_is_the_mean(micro_config):
    pooled = shake(AudioFlamingo(dataclasses.replace(micro_config, pool_windows=True)), scale=0.2)
    plain = AudioFlamingo(micro_config).eval()
    plain.load_state_dict(pooled.state_dict())
    windows, n_windows = some_audios(plain, [3, 1, 5])
    windows[0, 3:], windows[1, 1:] = 7.0, 7.0
    means = torch.stack([torch.tensor(windows[a, :n].double().numpy().mean(0)).float() for a, n in enumerate([3, 1, 5])])[:, None]
    ids = some_text(plain, 3)
    assert far(logits_of(pooled, ids, windows, n_windows), logits_of(plain, ids, means, torch.ones(1, 3, dtype=torch.long))) < 1e-5


# ---------------------------------------------------------------------- loss

@torch.no_grad()
def test_the_loss_is_the_cross_entropy_of_the_next_token_where_there_is_a_label(model):
    samples = [(some_text(model, len(c), seed=i, words=3), *some_audios(model, c, seed=i)) for i, c in enumerate(SAMPLES[:3])]
    ids, mask = pad([s[0] for s in samples], "right")
    labels = torch.where(mask & (torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.5), ids, -100)
    got = model(ids, labels, model.listen(*join(samples)), mask)
    expected = []
    for b, sample in enumerate(samples):
        logits = logits_of(model, *sample)[0].double().numpy()
        for i in range(1, len(logits)):
            if labels[b, i] != -100:
                row = logits[i - 1]
                expected.append(math.log(np.exp(row - row.max()).sum()) + row.max() - row[labels[b, i]])
    assert len(expected) > 10 and np.abs(got.numpy() - expected).max() < 1e-4


def test_one_batch_overfits_and_exchanged_audio_is_noticed(micro_config):
    """Eight samples whose texts are the same up to the answer: only the audio tells which answer is right."""
    torch.manual_seed(0)
    model = AudioFlamingo(micro_config)
    windows, n_windows = torch.randn(16, 4, micro_config.clap.out_width), torch.full((8, 2), 4)
    ids = some_text(model, 2).repeat(8, 1)
    ids[:, -3:] = torch.stack([torch.randint(4, 300, (3,)) for _ in range(8)])
    labels = torch.where(torch.arange(ids.shape[1]) >= ids.shape[1] - 3, ids, -100)
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if not n.startswith("encoder.")], lr=3e-3)
    for step in range(300):
        loss = model(ids, labels, model.listen(windows, n_windows)).mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        if loss < 0.02:
            break
    assert model(ids, labels, model.listen(windows, n_windows)).mean() < 0.05
    assert model(ids, labels, model.listen(windows.roll(2, 0), n_windows)).mean() > 1.0, "the answer must depend on the audio"


# ---------------------------------------------------------------------- sampling

ODDS = torch.tensor([[0.05, 0.5, 0.15, 0.3]])


def frequencies(sampling, count=40_000):
    picks = draw(ODDS.log().expand(count, -1), sampling, torch.Generator().manual_seed(sampling.seed))
    return np.bincount(picks.numpy(), minlength=4) / count


@pytest.mark.parametrize("sampling, expected", [
    (Sampling(temperature=1.0), [0.05, 0.5, 0.15, 0.3]),
    (Sampling(temperature=2.0), [math.sqrt(p) / sum(map(math.sqrt, [0.05, 0.5, 0.15, 0.3])) for p in [0.05, 0.5, 0.15, 0.3]]),
    (Sampling(temperature=0.5), [p * p / 0.365 for p in [0.05, 0.5, 0.15, 0.3]]),
    (Sampling(temperature=1.0, top_k=2), [0, 0.625, 0, 0.375]),
    (Sampling(temperature=1.0, top_k=1), [0, 1, 0, 0]),
    (Sampling(temperature=1.0, top_k=99), [0.05, 0.5, 0.15, 0.3]),
    (Sampling(temperature=1.0, top_p=0.4), [0, 1, 0, 0]),                      # the likeliest stays, however small top_p is
    (Sampling(temperature=1.0, top_p=0.7), [0, 0.625, 0, 0.375]),              # .5 < .7: the token that crosses the line stays
    (Sampling(temperature=1.0, top_p=0.9), [0, 0.5 / 0.95, 0.15 / 0.95, 0.3 / 0.95]),
    (Sampling(temperature=1.0, top_k=3, top_p=0.7), [0, 0.625, 0, 0.375]),     # .5 / .95 and .8 / .95: top-p of what top-k left
    (Sampling(), [0, 1, 0, 0]),
    (Sampling(temperature=5e-324), [0, 1, 0, 0]),                              # no number of float32
    (Sampling(temperature=1.0, top_p=5e-324), [0, 1, 0, 0]),
    (Sampling(temperature=0.5, top_p=0.6), [0, 1, 0, 0]),                      # temperature first: .25 / .365 > .6
], ids=str)
def test_draws_follow_the_distribution_worked_out_by_hand(sampling, expected):
    error = 4.5 * np.sqrt(np.array(expected) * (1 - np.array(expected)) / 40_000)
    assert (np.abs(frequencies(sampling) - expected) <= error + 1e-12).all()


@torch.no_grad()
def test_the_seed_alone_decides_what_is_drawn(model):
    windows, n_windows = some_audios(model, [3])

    def answer(seed):
        state = model.start(model.listen(windows, n_windows), 60)
        return [int(t) for t in model.generate(model.read(some_text(model, 1), state), state, END, PAD, 20, Sampling(2.0, seed=seed))]
    first = answer(1)
    torch.rand(3)                                  # the global generator is not asked
    assert answer(1) == first and answer(2) != first


@torch.no_grad()
def test_generation_ends_at_the_stop_token_or_the_limit_and_never_says_what_is_banned(model):
    windows, n_windows = some_audios(model, [3])

    def answer(limit, stop=END, banned=()):
        state = model.start(model.listen(windows, n_windows), 60)
        return [int(t) for t in model.generate(model.read(some_text(model, 1), state), state, stop, PAD, limit, banned=banned)]
    free = answer(8, stop=-1)
    assert len(free) == 8 and answer(0) == []
    assert answer(8, stop=free[2]) == free[:free.index(free[2]) + 1]
    assert not set(answer(8, stop=-1, banned=tuple(set(free)))) & set(free)


# ---------------------------------------------------------------------- size

def linear(n_in, n_out, bias=True):
    return n_in * n_out + n_out * bias


def test_preset_af1_has_2_2_billion_parameters():
    """The paper's dimensions, counted by hand and on the meta device, where no memory is needed."""
    with torch.device("meta"):
        model = AudioFlamingo(PRESETS["af1"])
    got = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    lm_layer = 4 * linear(2048, 2048) + linear(2048, 8192) + linear(8192, 2048) + 2 * 2 * 2048
    block = linear(2048, 512, False) + linear(1024, 1024, False) + linear(512, 2048, False) \
        + 2 * linear(2048, 8192, False) + 2 * 2 * 2048 + 2
    heard = 4 * linear(1024, 1024, False) + linear(1024, 2048) + linear(2048, 1024) + 2 * 2 * 1024
    swin = sum(depth * (linear(d, 3 * d) + linear(d, d) + linear(d, 4 * d) + linear(4 * d, d) + 4 * d + 15 ** 2 * heads)
               for d, depth, heads in [(96, 2, 4), (192, 2, 8), (384, 6, 16), (768, 2, 32)])
    merges = sum(linear(4 * d, 2 * d, False) + 8 * d for d in (96, 192, 384))
    ends = 2 * 64 + linear(16, 96) + 2 * 96 + 2 * 768 + linear(768, 1024, False) + linear(1024, 1024, False) + 2 * 1024
    expected = {"encoder": swin + merges + ends, "lm": 50_268 * 2048 + 2050 * 2048 + 24 * lm_layer + 2 * 2048, "xattn": 24 * block, "representation": 3 * heard + 2 * 1024}
    total = sum(got.values())
    print(", ".join(f"{name} {n / 1e6:.1f} M" for name, n in got.items()), f"total {total / 1e9:.3f} B")
    assert got == expected
    assert all(p.is_meta for p in model.parameters())
    assert 2.2e9 <= total < 2.3e9

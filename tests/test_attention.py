"""kernels/attention.py: by whichever way, output and gradients are those of float64."""
import pytest
import torch

from kernels import attention as module
from kernels.attention import attention, fits
from test_lm import relative

B, T, L, K = 6, 7, 5, 16


def exact(q, k, v, bias, causal):
    """The definition, in float64, bias and groups of heads spread out by hand."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("bhtk,bhlk->bhtl", q, k) / K ** 0.5
    if causal:
        scores = scores + torch.full(scores.shape[-2:], -torch.inf, dtype=q.dtype).triu(1)
    elif bias is not None:
        bias = bias if len(bias) == 1 else torch.stack([bias[b % len(bias)] for b in range(len(q))])
        scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias
    return torch.einsum("bhtl,bhlk->bhtk", scores.softmax(-1), v)


def some(heads=4, groups=4, keys=L):
    """Strides as the model has them: heads beside each other."""
    return [torch.randn(B, n, h, K).transpose(1, 2).requires_grad_() for n, h in ((T, heads), (keys, groups), (keys, groups))]


BIASES = {"none": None, "one": (1, 1, T, L), "of heads": (1, 4, T, L), "of samples": (B, 1, T, L), "of three samples": (3, 4, T, L)}


WAYS = pytest.mark.parametrize("most", [0, 4 * 4 * T * T, 1 << 19], ids=["torch", "four at a time", "ours"])


@WAYS
@pytest.mark.parametrize("name", BIASES)
def test_output_and_all_gradients_are_those_of_float64(name, most, monkeypatch):
    monkeypatch.setattr(module, "MOST", most)
    torch.manual_seed(0)
    bias = None if name == "none" else torch.randn(BIASES[name]).requires_grad_()
    of = some() + [bias] * (bias is not None)
    y, dy = attention(*of), torch.randn(B, 4, T, K)
    doubled = [x.detach().double().requires_grad_() for x in of]
    expected = exact(*doubled, *[None] * (4 - len(doubled)), causal=False)
    assert y.shape == expected.shape and relative(y, expected) < 1e-6
    for ours, theirs in zip(torch.autograd.grad(y, of, dy), torch.autograd.grad(expected, doubled, dy.double()), strict=True):
        assert ours.shape == theirs.shape and relative(ours, theirs) < 2e-6
    with torch.no_grad():
        assert relative(attention(*of), expected) < 1e-6


@WAYS
@pytest.mark.parametrize("shape", [(1, 1), (B, 1), (2, 4), "causal"])
def test_what_is_hidden_has_no_part_in_it(shape, most, monkeypatch):
    monkeypatch.setattr(module, "MOST", most)
    torch.manual_seed(1)
    of, causal = some(keys=T if shape == "causal" else L), shape == "causal"
    seen = None if causal else torch.rand(*shape, T, L) < 0.5
    if seen is not None:
        seen[..., 0] = True
    y, dy = attention(*of, seen, causal), torch.randn(B, 4, T, K)
    doubled = [x.detach().double().requires_grad_() for x in of]
    expected = exact(*doubled, seen, causal)
    assert relative(y, expected) < 1e-6
    for ours, theirs in zip(torch.autograd.grad(y, of, dy), torch.autograd.grad(expected, doubled, dy.double())):
        assert relative(ours, theirs) < 2e-6
    if causal:
        k = of[1].detach().clone()
        k[:, :, 3:] += 1
        assert torch.equal(attention(of[0], k, of[2], causal=True)[:, :, :3], y[:, :, :3])


def test_who_does_the_work(monkeypatch):
    """Short texts in float32 on a CPU are ours; what is long, in half precision, of one token or of grouped heads is torch's."""
    q, k, _ = some()
    half, one, (_, grouped, _) = q.to(torch.bfloat16), q[:, :, :1], some(groups=2)
    assert fits(q, k) and not fits(half, k.to(torch.bfloat16)) and not fits(one, k) and not fits(q, grouped) and not fits(q.double(), k.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not fits(q, k)
    monkeypatch.setattr(module, "MOST", 4 * 4 * T * L)
    assert fits(q, k) and not fits(q, k.repeat(1, 1, 2, 1))


def test_heads_in_groups():
    torch.manual_seed(2)
    of = some(groups=2)
    assert relative(attention(*of), exact(*(x.detach().double() for x in of), None, False)) < 1e-6

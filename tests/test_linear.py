"""kernels/linear.py: whoever multiplies, product and gradients are those of float64, and a packed model is the same model."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from af_min.lm import LM
from kernels import linear as module
from kernels.linear import Linear, bfloat16_products, fits, in_rows, linear, pack, together
from test_lm import FAMILIES, relative, shaken, some_ids

pytestmark = pytest.mark.skipif(not module.ONEDNN, reason="torch was built without oneDNN: its own product is used everywhere")


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch):
    monkeypatch.setattr(module, "LARGE", 1)
    monkeypatch.setattr(module, "LARGE_WEIGHT", 1)


@pytest.mark.parametrize("shape", [(1, 96), (5, 96), (64, 96), (3, 67, 96), (2, 1, 33, 96), (1100, 96)])
@pytest.mark.parametrize("n_out, bias", [(40, True), (96, False), (203, True)])
def test_product_and_gradients_are_those_of_float64(shape, n_out, bias):
    torch.manual_seed(0)
    layer, x = Linear(96, n_out, bias=bias), torch.randn(shape, requires_grad=True)
    dy = torch.randn(*shape[:-1], n_out)
    of = [x, *layer.parameters()]
    y = layer(x)
    got = torch.autograd.grad(y, of, dy)
    exact = [p.detach().double().requires_grad_() for p in of]
    expected = F.linear(*exact)
    assert y.shape == expected.shape and relative(y, expected) < 1e-6
    for ours, theirs in zip(got, torch.autograd.grad(expected, exact, dy.double())):
        assert ours.shape == theirs.shape and relative(ours, theirs) < 3e-6          # sums of up to 1100 terms
    with torch.no_grad():
        assert relative(layer(x), expected) < 1e-6


def test_only_the_gradients_that_are_asked_for_are_computed(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "multiply", lambda x, w, b=None: asked.append(tuple(x.shape)) or F.linear(x, w, b))
    x, weight = torch.randn(64, 8), torch.randn(16, 8)
    linear(x.requires_grad_(), weight).sum().backward()
    linear(x.detach(), weight.requires_grad_()).sum().backward()
    assert asked == [(64, 8), (64, 16), (64, 8), (8, 64)]


def test_any_strides():
    torch.manual_seed(0)
    x, weight, dy = torch.randn(32, 5, 7).transpose(0, 2), torch.randn(32, 12).t(), torch.randn(12, 5, 7).transpose(0, 2)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    y = linear(x, weight)
    exact = [p.detach().double().requires_grad_() for p in (x, weight)]
    assert relative(y, F.linear(*exact)) < 1e-6
    for ours, theirs in zip(torch.autograd.grad(y, [x, weight], dy), torch.autograd.grad(F.linear(*exact), exact, dy.double())):
        assert relative(ours, theirs) < 1e-6


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 640, 1000, 1025, 20_000])
def test_rows_are_padded_with_few_zeros_to_few_numbers(rows):
    x = torch.randn(rows, 3)
    padded = in_rows(x)
    assert torch.equal(padded[:rows], x) and not padded[rows:].any()
    assert len(padded) % 64 == 0 and len(padded) - rows < max(64, rows / 8)
    assert len({len(in_rows(torch.empty(n, 1))) for n in range(1024, 2049)}) <= 9


def test_elsewhere_torch_chooses():
    x, weight = torch.randn(8, 256), torch.randn(256, 256)
    assert fits(x, weight)
    assert not fits(x.bfloat16(), weight.bfloat16()) and not fits(x.double(), weight.double()) and not fits(x[0], weight)
    assert not fits(x[:0], weight) and not fits(x.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not fits(x, weight) and linear(x, weight).dtype == torch.bfloat16


@FAMILIES
@pytest.mark.parametrize("batch", [1, 8])
@torch.no_grad()
def test_a_packed_language_model_decodes_the_same(config, batch):
    """Cached, token by token, against one reading by torch's own products."""
    lm, ids = shaken(LM(config)), some_ids(batch=batch)
    size = sum(p.numel() for p in lm.parameters())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ONEDNN", False)
        whole = lm.logits(lm(ids))
    lm.pack()
    assert all(layer.weight.is_mkldnn for layer in lm.modules() if isinstance(layer, Linear)) and lm.head.weight.is_mkldnn
    assert not lm.embed.weight.is_mkldnn and sum(p.numel() for p in lm.parameters()) == size
    lm.pack()                                                                        # a second time changes nothing
    cache = lm.new_cache(batch, 12)
    parts = torch.cat([lm.logits(lm(token, cache=cache)) for token in ids.split(1, 1)], 1)
    assert relative(parts, whole) < 1e-5


def test_packing_leaves_alone_what_it_does_not_help(monkeypatch):
    monkeypatch.setattr(module, "LARGE_WEIGHT", 1 << 10)
    model = nn.Sequential(Linear(8, 8), Linear(64, 64).bfloat16(), nn.Linear(64, 64), Linear(64, 64), Linear(64, 64, device="meta"))
    pack(model)
    assert [layer.weight.is_mkldnn for layer in model] == [False, False, False, True, False]


def test_bfloat16_products_round_the_factors_and_nothing_else():
    """Against float64 products of rounded factors: what is left is the rounding of a result, 2^-9 at most. Backward too, outside the context."""
    torch.manual_seed(0)
    layer, x, dy = Linear(96, 40), torch.randn(3, 67, 96, requires_grad=True), torch.randn(3, 67, 40)
    with bfloat16_products():
        y = layer(x)
        with torch.no_grad():
            assert torch.equal(layer(x), y)
    dx, dW, db = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    rounded = lambda t: t.detach().bfloat16().double()
    exact = {"y": (y, F.linear(*map(rounded, (x, layer.weight, layer.bias)))), "dx": (dx, rounded(dy) @ rounded(layer.weight)),
             "dW": (dW, rounded(dy).flatten(0, 1).t() @ rounded(x).flatten(0, 1))}
    for name, (ours, theirs) in exact.items():
        error = (ours.double() - theirs).abs().max() / theirs.abs().max()
        assert ours.dtype == torch.float32 and 1e-5 < error < 2 ** -8, (name, error)
    assert relative(db, dy.double().sum((0, 1))) < 1e-6


def test_bfloat16_ends_with_its_context():
    layer, x = Linear(64, 64), torch.randn(64, 64)
    whole = layer(x)
    with pytest.raises(KeyError), bfloat16_products():
        assert not torch.equal(layer(x), whole)
        with bfloat16_products(False):                    # not asked for here, which takes nothing from the one around it
            assert not torch.equal(layer(x), whole)
        raise KeyError
    assert torch.equal(layer(x), whole)
    with bfloat16_products(False):
        assert torch.equal(layer(x), whole)


@pytest.mark.parametrize("bias", [True, False])
def test_layers_together_are_each_by_itself(bias):
    torch.manual_seed(0)
    layers, x = [Linear(32, n, bias=bias) for n in (16, 8, 8)], torch.randn(5, 7, 32, requires_grad=True)
    of = [x, *(p for layer in layers for p in layer.parameters())]
    dy = [torch.randn(5, 7, n) for n in (16, 8, 8)]
    exact = [p.detach().double().requires_grad_() for p in of]
    weights = exact[1::2] if bias else exact[1:]
    biases = exact[2::2] if bias else [None] * 3
    apart = [F.linear(exact[0], w, b) for w, b in zip(weights, biases)]
    ours = together(x, *layers)
    for y, one in zip(ours, apart, strict=True):
        assert relative(y, one) < 1e-6
    for got, wanted in zip(torch.autograd.grad(ours, of, dy), torch.autograd.grad(apart, exact, [d.double() for d in dy]), strict=True):
        assert relative(got, wanted) < 2e-6
    with torch.no_grad():
        assert all(torch.equal(y, layer(x)) for y, layer in zip(together(x, *layers), layers))

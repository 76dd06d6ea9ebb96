"""few_rows.py: whatever way is taken, the product is that of float64, and a model rearranged in memory is the same model."""
import pytest
import torch
from torch import nn

from af_min import few_rows
from af_min.few_rows import lay_out, linear
from af_min.lm import LM
from test_lm import FAMILIES, relative, shaken, some_ids


@pytest.mark.parametrize("rows", [1, 3, 4, 8, 12, 13])
@pytest.mark.parametrize("n_out, bias", [(640, True), (643, False), (64, True), (63, True)])
@pytest.mark.parametrize("by_column", [False, True])
@torch.no_grad()
def test_the_product_is_that_of_float64(rows, n_out, bias, by_column, monkeypatch):
    monkeypatch.setattr(few_rows, "LARGE", 1)
    torch.manual_seed(0)
    layer, x = nn.Linear(96, n_out, bias=bias), torch.randn(1, rows, 96)
    lay_out(layer, 1 if by_column else 8)
    expected = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
    assert linear(x, layer).shape == (1, rows, n_out) and relative(linear(x, layer), expected) < 1e-6
    assert relative(linear(x.transpose(0, 1), layer), expected.transpose(0, 1)) < 1e-6


def test_training_half_precision_and_small_weights_take_the_library_s_way(monkeypatch):
    x, layer = torch.randn(8, 256), nn.Linear(256, 256)
    assert not few_rows.fits(x, layer.weight)                                       # with gradients
    with torch.no_grad():
        assert few_rows.fits(x, layer.weight)
        assert not few_rows.fits(x.bfloat16(), layer.weight.bfloat16()) and not few_rows.fits(x[:, :128], layer.weight[:128, :128])
        with torch.autocast("cpu", torch.bfloat16):
            assert not few_rows.fits(x, layer.weight) and linear(x, layer).dtype == torch.bfloat16


@FAMILIES
@pytest.mark.parametrize("rows", [1, 8])
@torch.no_grad()
def test_decoding_is_the_same_in_either_layout(config, rows, monkeypatch):
    """Cached, token by token, against one reading by torch's own products."""
    lm, ids = shaken(LM(config)), some_ids(batch=rows)
    whole, before = lm.logits(lm(ids)), {name: value.clone() for name, value in lm.state_dict().items()}
    monkeypatch.setattr(few_rows, "LARGE", 1)
    monkeypatch.setattr(few_rows, "BLOCK", 16)
    for layout in (rows, 9 - rows, rows):                                            # there and back again
        lay_out(lm, layout)
        cache = lm.new_cache(rows, 12)
        parts = torch.cat([lm.logits(lm(token, cache=cache)) for token in ids.split(1, 1)], 1)
        assert relative(parts, whole) < 1e-5
        assert lm.embed.weight.is_contiguous() == (layout != 1)
    assert all(torch.equal(value, before[name]) for name, value in lm.state_dict().items())

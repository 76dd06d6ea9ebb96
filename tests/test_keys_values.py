"""flamingo.py and xattn.py: keys and values of all blocks, by one product on a GPU; one kv_len for all of them."""
import dataclasses

import pytest
import torch

from test_flamingo import far, model_of, some_audios


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Every tensor says that it is on one: the choice of `listen` alone is under test, its arithmetic runs on the CPU."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)


def count_products(model, monkeypatch):
    """The blocks that multiply for themselves, as they do it."""
    own = []
    for block in model.xattn.values():
        monkeypatch.setattr(block.kv, "forward", lambda x, weight=block.kv.weight: (own.append(1), x @ weight.mT)[1])
    return own


@pytest.mark.parametrize("setting", [{}, {"audio_index": True}, {"null_key": True}, {"audio_index": True, "null_key": True},
                                     {"every": 2}, {"attend_padding": True}], ids=lambda s: "+".join(s) or "paper")
@pytest.mark.parametrize("counts", [[[3, 0], [2, 6], [0, 0]], [[0], [0]], [[]]], ids=["audios", "none", "no slots"])
@torch.no_grad()
def test_on_a_gpu_one_product_gives_what_a_product_a_block_gives(micro_config, monkeypatch, request, setting, counts):
    """Equal numbers in an equal layout, which the kernels see; every block has its own."""
    padding = {k: v for k, v in setting.items() if k == "attend_padding"}
    config = dataclasses.replace(micro_config, lm=dataclasses.replace(micro_config.lm, layers=5),
                                 representation=dataclasses.replace(micro_config.representation, **padding))
    model = model_of(config, **{k: v for k, v in setting.items() if k not in padding})
    n_windows = torch.tensor(counts, dtype=torch.long)
    windows = torch.randn(int((n_windows > 0).sum()), 6, config.clap.out_width, generator=torch.Generator().manual_seed(0))
    own = count_products(model, monkeypatch)
    want = model.listen(windows, n_windows)
    assert len(own) == len(model.xattn) == len(want.keys) == (3 if "every" in setting else 5)
    request.getfixturevalue("on_a_gpu")
    got = model.listen(windows, n_windows)
    assert len(own) == len(model.xattn), "a block multiplied for itself"
    for name in ("keys", "values"):
        for a, b in zip(getattr(got, name), getattr(want, name), strict=True):
            assert a.stride() == b.stride()
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    if windows.numel():
        assert all(far(a, b) > 0.1 for a, b in zip(want.keys, want.keys[1:]))


@pytest.mark.parametrize("why", ["gradients", "weights split over processes"])
def test_in_training_every_block_multiplies_for_itself(micro_config, monkeypatch, on_a_gpu, why):
    """There a block's weights are together only while its own forward or `keys_values` runs (FSDP)."""
    model = model_of(micro_config)
    if why != "gradients":
        class Split(torch.Tensor):
            """As FSDP's DTensor: a parameter of another type."""
        for block in model.xattn.values():
            block.kv.weight = torch.nn.Parameter(block.kv.weight.detach().as_subclass(Split), requires_grad=False)
    own = count_products(model, monkeypatch)
    with torch.set_grad_enabled(why == "gradients"):
        model.listen(*some_audios(model, [3, 2]))
    assert len(own) == len(model.xattn)


@pytest.mark.parametrize("null_key", [False, True])
@torch.no_grad()
def test_all_blocks_see_by_one_kv_len(micro_config, null_key):
    """One tensor, whose mask is made once; a null key is counted in it."""
    model, seen = model_of(micro_config, null_key=null_key), []
    for block in model.xattn.values():
        block.register_forward_pre_hook(lambda block, inputs: seen.append(inputs[3]))
    model.hidden(torch.tensor([[3, model.config.audio_id, 5]]), model.listen(torch.randn(1, 2, model.config.clap.out_width), torch.tensor([[2]])))
    assert len(seen) == len(model.xattn) > 1 and all(kv_len is seen[0] for kv_len in seen)
    assert seen[0].tolist() == [[2 + null_key] * 3]

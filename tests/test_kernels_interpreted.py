"""What the Triton kernels must give, on odd sizes and in three precisions. Runs on a GPU, or without one under
TRITON_INTERPRET=1: tests/test_kernels.py starts it that way in a process of its own; elsewhere this file holds no tests."""
import dataclasses
import itertools
import math
import os

import pytest
import torch

import kernels
from kernels import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
__test__ = kernels.TRITON_INSTALLED and (INTERPRETED or torch.cuda.is_available())
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NAN = float("nan")

SMALL = list(itertools.product((1, 2, 15, 17), (1, 16, 64, 128)))
ODD = [(113, 203), (128, 217), (113, 211), (108, 256)]
LARGE = [(256, 512), (1023, 1024), (1024, 1023)]
CASES = [(t, l, (32, 64, 128)[i % 3], name) for i, (t, l) in enumerate(SMALL) for name in DTYPES]
CASES += [(t, l, 64, name) for (t, l), name in zip(ODD, ("fp32", "fp16", "bf16", "fp16"))]
CASES += [(1, 1030, 64, "bf16"), (17, 1030, 32, "fp16")]      # several decoding splits; the long-audio tiles
CASES += [pytest.param(t, l, k, name, marks=pytest.mark.slow)
          for t, l in ODD + LARGE for k in (32, 64, 128) for name in DTYPES]


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    """Every buffer that the launch code allocates holds NaN until a kernel writes to it."""
    for owner, name in ((torch, "empty_like"), (torch.Tensor, "new_empty")):
        def poisoned(*args, real=getattr(owner, name), **named):
            made = real(*args, **named)
            return made.fill_(NAN) if made.is_floating_point() else made
        monkeypatch.setattr(owner, name, poisoned)


def make(T, L, K, dtype, heads=2, seed=0):
    """q, k, v as (B, X, H, K) views and kv_len. Sample 0 is ragged, 1 has no audio, 2 sees all; unused keys hold NaN."""
    generator = torch.Generator().manual_seed(seed + 1000 * T + L)
    q, k, v = (torch.randn(3, n, heads, K, generator=generator).to(dtype).transpose(1, 2) for n in (T, L, L))
    kv_len = torch.randint(0, L + 1, (3, T), generator=generator).sort(1).values.to(torch.int32)
    kv_len[1], kv_len[2] = 0, L
    for b in range(3):
        k[b, :, kv_len[b, -1]:] = NAN
        v[b, :, kv_len[b, -1]:] = NAN
    return [x.to(DEVICE).requires_grad_() for x in (q, k, v)] + [kv_len.to(DEVICE)]


def value_and_grads(function, inputs, do):
    out = function(*inputs)
    wanted = [x for x in inputs if x.requires_grad]
    return [x.detach() for x in (out, *torch.autograd.grad(out, wanted, do.to(out.dtype)))]


def double(inputs):
    return [x.detach().double().requires_grad_() if x.requires_grad else x for x in inputs]


def assert_close(found, same_precision, exact, names):
    """Error at most 2x (gradients 3x) that of PyTorch in the same precision, plus the rounding of values around 0.3."""
    for i, name in enumerate(names):
        got, peer, want = (x[i].double() for x in (found, same_precision, exact))
        assert got.isfinite().all(), f"{name}: not finite"
        rounded = exact[i].to(found[i].dtype)
        slack = 2 * float((rounded + 0.3 - 0.3 - rounded).abs().max()) + 32 * torch.finfo(torch.float32).eps
        bound = (3 if i else 2) * float((peer - want).abs().max()) + slack
        error = float((got - want).abs().max())
        assert error <= bound, f"{name}: error {error:.2e}, bound {bound:.2e}"


@pytest.mark.parametrize("T, L, K, name", CASES)
def test_attention_and_gradients(T, L, K, name):
    """Within flash-attention's bounds of float64, whatever unused keys and fresh buffers hold; empty rows exactly 0."""
    inputs = make(T, L, K, DTYPES[name], heads=1 if T * L > 4096 else 2)
    do = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = value_and_grads(lambda *x: kernels.masked_cross_attention(*x, backend="triton"), inputs, do)
    peer = value_and_grads(reference.attend, inputs, do)
    exact = value_and_grads(reference.attend, double(inputs), do)
    assert_close(found, peer, exact, ("out", "dq", "dk", "dv"))
    blind = (inputs[3] == 0)[:, None, :].expand(found[0].shape[:3])
    assert (found[0][blind] == 0).all() and (found[1][blind] == 0).all()
    assert all((x[1] == 0).all() for x in found), "a sample without audio gives zero output and zero gradients"


@pytest.mark.parametrize("T, L", [(17, 33), (1, 40), (1, 1030)])
def test_saved_log_sum_exp(T, L):
    """log2 sum_j 2^(s log2 e) of every row, one token in several splits included; +inf where nothing is visible."""
    from kernels import masked_xattn
    q, k, v, kv_len = make(T, L, 32, torch.float32)
    lse = masked_xattn.forward_op(q, k, v, kv_len)[1]
    scores = (q @ k.nan_to_num().mT / 32 ** 0.5).masked_fill(~reference.visible(kv_len, L), -torch.inf)
    exact = (scores.logsumexp(-1) / math.log(2)).masked_fill((kv_len == 0)[:, None], torch.inf)
    torch.testing.assert_close(lse, exact, rtol=1e-5, atol=1e-5)


def test_backward_fills_no_gradient_of_the_log_sum_exp():
    """Of the operators that a backward pass calls, one is a kernel, and none makes zeros."""
    from torch.utils._python_dispatch import TorchDispatchMode
    called = []

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(str(function))
            return function(*args, **(kwargs or {}))
    q, k, v, kv_len = make(5, 9, 32, torch.float32)
    out = kernels.masked_cross_attention(q, k, v, kv_len, backend="triton")
    with Note():
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert called.count("af_min.masked_xattn_backward.default") == 1 and not [name for name in called if "zeros" in name], called


def test_no_audio_in_the_batch():
    """L = 0: zeros, and zero (not missing) gradients."""
    q, k, v, kv_len = make(3, 0, 32, torch.float32)
    found = value_and_grads(lambda *x: kernels.masked_cross_attention(*x, backend="triton"), (q, k, v, kv_len), torch.ones_like(q))
    assert all((x == 0).all() for x in found) and found[2].shape == k.shape


def test_any_layout():
    """Halves of one kv-projection, unlike strides of k and v, a strided last axis, an expanded gradient."""
    B, T, L, H, K = 2, 17, 33, 2, 32
    torch.manual_seed(0)
    both = torch.randn(B, L, 2 * H * K, device=DEVICE)
    k, v = (x.unflatten(2, (H, K)).transpose(1, 2) for x in both.chunk(2, 2))
    q = torch.randn(B, H, K, T, device=DEVICE).transpose(2, 3)
    kv_len = torch.tensor([[5] * 8 + [20] * 9, [33] * 17], dtype=torch.int32, device=DEVICE)
    exact = value_and_grads(lambda *x: reference.attend(*x, kv_len).sum(), [x.double().requires_grad_() for x in (q, k, v)],
                            torch.tensor(1.0, device=DEVICE))
    for keys, values in ((k, v), (k, v.contiguous()), (k.transpose(2, 3).contiguous().transpose(2, 3), v)):
        inputs = [x.detach().requires_grad_() for x in (q, keys, values)]
        found = value_and_grads(lambda *x: kernels.masked_cross_attention(*x, kv_len, backend="triton").sum(), inputs,
                                torch.tensor(1.0, device=DEVICE))
        for got, want in zip(found, exact):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DTYPES)
def test_repeats_are_equal_bit_by_bit(name):
    inputs = make(70, 70, 32, DTYPES[name])
    do = torch.randn(inputs[0].shape).to(DEVICE)
    runs = [value_and_grads(lambda *x: kernels.masked_cross_attention(*x, backend="triton"), inputs, do)
            for _ in range(2 if INTERPRETED else 250)]
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0]))


def test_custom_operators_are_well_formed():
    """Schema, fake tensors, autograd registration and AOT dispatch, as torch.compile needs them."""
    from kernels import masked_xattn, residual
    for T in (1, 5):
        q, k, v, kv_len = make(T, 9, 32, torch.float32)
        k, v = (x.detach().nan_to_num().requires_grad_() for x in (k, v))
        torch.library.opcheck(masked_xattn.forward_op, (q, k, v, kv_len))
        o, lse = masked_xattn.forward_op(q, k, v, kv_len)
        torch.library.opcheck(masked_xattn.backward_op, tuple(x.detach() for x in (o, q, k, v, kv_len, o, lse)))
    torch.library.opcheck(residual.forward_op, residual_inputs(3, 20, 40, torch.float32))


def test_torch_compile_takes_it_whole():
    """One graph without a break, equal to eager."""
    inputs = make(5, 9, 32, torch.float32)
    compiled = torch.compile(lambda *x: kernels.masked_cross_attention(*x, backend="triton"), backend="aot_eager", fullgraph=True)
    do = torch.ones_like(inputs[0])
    for a, b in zip(value_and_grads(compiled, inputs, do), value_and_grads(reference.attend, inputs, do)):
        torch.testing.assert_close(a, b)


def residual_inputs(rows, D, E, dtype, gate=0.7):
    generator = torch.Generator().manual_seed(rows + D)
    parts = (torch.randn(rows, D, generator=generator), torch.randn(rows, E, generator=generator),
             torch.randn(D, E, generator=generator) / E ** 0.5, torch.tensor([gate]))
    return tuple(x.to(DEVICE, dtype).requires_grad_() for x in parts)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("rows, D, E, gate", [(1, 48, 33, 0.7), (16, 100, 70, -0.3), (17, 100, 70, 0.0), (130, 257, 128, -30.0),
                                              (1200, 40, 64, 30.0), (3, 16, 2056, 0.5), (40, 16, 2056, 0.5)])
def test_gated_residual_and_gradients(rows, D, E, gate, name):
    """x + tanh(gate) · a Wᵀ, fused and folded into a or W; a gate of 0 leaves x as it is; large gates do not overflow."""
    inputs = residual_inputs(rows, D, E, DTYPES[name], gate)
    do = torch.randn(rows, D, generator=torch.Generator().manual_seed(1)).to(DEVICE, DTYPES[name])
    found = value_and_grads(lambda *x: kernels.gated_residual(*x, backend="triton"), inputs, do)
    peer = value_and_grads(reference.gated_residual, inputs, do)
    exact = value_and_grads(reference.gated_residual, double(inputs), do)
    assert_close(found, peer, exact, ("out", "dx", "da", "dweight"))
    _, a, weight, _ = double(inputs)                    # dgate is one number, and its peer's error may be small by chance:
    terms = do.double() * (a @ weight.t())              # what counts is what the rounding of all its terms may add up to
    bound = torch.finfo(DTYPES[name]).eps * (2 * terms.norm() + exact[4].abs())
    assert (found[4].double() - exact[4]).abs() <= bound, f"dgate: got {float(found[4])}, expected {float(exact[4])} +- {float(bound):.1e}"
    if gate == 0:
        assert torch.equal(found[0], inputs[0])


@pytest.mark.parametrize("E", [64, 2056], ids=["fused", "folded"])
def test_gated_residual_under_autocast(E):
    """a and weight are cast as a linear layer's would be; x, and with it the residual stream, stays float32."""
    inputs = residual_inputs(17, 32, E, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        found, peer = ([out, *torch.autograd.grad(out.sum(), inputs)] for out in
                       (kernels.gated_residual(*inputs, backend=b) for b in ("triton", "reference")))
    for a, b in zip(found, peer):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_block_is_the_same_on_both_backends(monkeypatch):
    """A whole gated cross-attention block: outputs and the gradient of every parameter."""
    from af_min.config import XattnConfig
    from af_min.xattn import GatedCrossAttention
    torch.manual_seed(0)
    block = GatedCrossAttention(XattnConfig(heads=2, head_dim=32, gate_init=0.5, audio_index=True), 48, 40, 4).to(DEVICE)
    x, audio = torch.randn(2, 19, 48, device=DEVICE), torch.randn(2, 12, 40, device=DEVICE)
    kv_len = torch.tensor([[6] * 10 + [12] * 9, [0] * 19], dtype=torch.int32, device=DEVICE)
    number = torch.ones(2, 19, dtype=torch.long, device=DEVICE)
    found = {}
    for backend in ("reference", "triton"):
        monkeypatch.setenv("AF_MIN_KERNELS", backend)
        k, v = block.keys_values(audio, number[:, :12])
        out = block(x, k, v, kv_len, number)
        found[backend] = [out, *torch.autograd.grad(out.square().sum(), list(block.parameters()))]
    for a, b in zip(found["triton"], found["reference"]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def whole_model():
    """A micro AudioFlamingo with a head width that has kernels, and four samples of three, two, one and no audios."""
    from af_min.flamingo import AudioFlamingo
    from conftest import shake
    from micro import STILL
    xattn = dataclasses.replace(STILL.xattn, head_dim=32, audio_index=True)
    model = shake(AudioFlamingo(dataclasses.replace(STILL, xattn=xattn, audio_id=9)), scale=0.2).to(DEVICE)
    n_windows = torch.tensor([[3, 12, 1], [5, 7, 0], [9, 0, 0], [0, 0, 0]])
    ids = torch.randint(10, 400, (4, 21), generator=torch.Generator().manual_seed(1))
    ids[0, [2, 8, 9]] = ids[1, [0, 11]] = ids[2, 5] = 9
    windows = torch.randn(6, 12, STILL.clap.out_width, generator=torch.Generator().manual_seed(2))
    return model, windows.to(DEVICE), n_windows.to(DEVICE), ids.to(DEVICE)


def assert_same_model(found):
    """Every tensor to 1e-5 of its largest value: float32, summed in another order. A bias of all keys alike changes no softmax: its
    gradient is 0, and what is found in its place the rounding of others."""
    reference = found.pop("reference")
    for (name, want), tensors in itertools.product(reference.items(), found.values()):
        assert tensors.keys() == reference.keys()
        error, size, zero = float((tensors[name] - want).abs().max()), float(want.abs().max()), name.endswith("attention.k.bias")
        assert error <= 1e-5 * size + (1e-6 if zero else 1e-8), f"{name}: error {error:.1e} of {size:.1e}"
        assert zero or size > 1e-6, f"{name}: nothing to compare, all 0"


def test_whole_model_has_the_same_loss_and_gradients_on_both_backends(monkeypatch):
    """AF_MIN_KERNELS=triton: the loss, and the gradient of every weight that learns, with several audios, one and none."""
    model, windows, n_windows, ids = whole_model()
    model.encoder.requires_grad_(False)
    found = {}
    for backend in ("reference", "triton"):
        monkeypatch.setenv("AF_MIN_KERNELS", backend)
        model.zero_grad()
        loss = model(ids, ids, model.listen(windows, n_windows)).mean()
        loss.backward()
        found[backend] = {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert_same_model(found)


@torch.no_grad()
def test_decoding_token_by_token_is_the_same_on_both_backends(monkeypatch):
    """A prompt in one piece, then single tokens, <audio> among them, through the one-token kernel; on a GPU also as a graph."""
    from af_min.decoding import FixedStep
    model, windows, n_windows, ids = whole_model()
    found = {}
    for way in ("reference", "triton", "triton, graph"):
        monkeypatch.setenv("AF_MIN_KERNELS", way.split(",")[0])
        state = model.start(model.listen(windows, n_windows), 21)
        found[way] = {"prompt": model.read(ids[:, :7], state)}
        read = FixedStep(model, state) if way.endswith("graph") else model.read
        found[way] |= {f"token {t}": read(ids[:, t:t + 1], state).clone() for t in range(7, 21)}
    assert_same_model(found)


@torch.no_grad()
def test_keys_and_values_of_all_blocks_at_once():
    """What `listen` calls on a GPU gives, there too, what a product a block gives."""
    from af_min.xattn import keys_values_at_once
    model = whole_model()[0]
    blocks, audio = [*model.xattn.values()], torch.randn(2, 7, model.config.clap.out_width, device=DEVICE)
    number = torch.tensor([[1, 1, 2, 2, 2, 3, 3], [1] * 7], device=DEVICE)
    for block, (k, v) in zip(blocks, keys_values_at_once(blocks, audio, number), strict=True):
        for got, want in zip((k, v), block.keys_values(audio, number)):
            assert got.stride() == want.stride()
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_more_heads_than_a_launch_can_hold_are_named():
    q = torch.empty(1 << 13, 8, 1, 32, device=DEVICE)
    with pytest.raises(AssertionError, match="got B·H = 65536, expected at most 65535"):
        kernels.masked_cross_attention(q, q, q, torch.ones(len(q), 1, dtype=torch.int32, device=DEVICE), "triton")

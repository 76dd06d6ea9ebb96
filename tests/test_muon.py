"""muon.py against numpy's singular value decomposition, torch's own Muon and torch's AdamW."""
import copy

import numpy as np
import pytest
import torch
from torch import nn

import micro
from af_min import engine, muon
from af_min.config import StageConfig
from af_min.stages import Everything


def by_decomposition(g, iterations):
    """U p(p(p(S))) Vᵀ in float64."""
    u, s, v = np.linalg.svd(g, full_matrices=False)
    s = s / np.linalg.norm(g)
    for _ in range(iterations):
        s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
    return u * s @ v, s


@pytest.mark.parametrize("shape", [(8, 8), (5, 24), (1, 7)])
def test_the_iteration_changes_singular_values_alone(shape):
    g = np.random.default_rng(0).standard_normal((3, *shape)) * np.array([1e-6, 1, 1e4])[:, None, None]
    got = muon.orthogonal(torch.from_numpy(g))
    for x, one in zip(got, g):
        np.testing.assert_allclose(x.numpy(), by_decomposition(one, muon.ITERATIONS)[0], atol=1e-9)
    assert muon.orthogonal(torch.zeros(1, *shape)).eq(0).all()


def test_singular_values_come_near_one():
    """Of a random square matrix, whose smallest are near zero: all but those end between 0.7 and 1.2."""
    g = np.random.default_rng(1).standard_normal((128, 128))
    x = muon.orthogonal(torch.from_numpy(g)[None])[0].numpy()
    before, after = np.linalg.svd(g, compute_uv=False) / np.linalg.norm(g), np.linalg.svd(x, compute_uv=False)
    assert after.max() < 1.21 and (after > 0.66).mean() > 0.75 and (before > 0.06).mean() < 0.75


def test_bfloat16_products_are_near():
    g = torch.randn(2, 64, 128, generator=torch.Generator().manual_seed(2))
    got, exact = muon.orthogonal(g, torch.bfloat16), muon.orthogonal(g.double())
    assert got.dtype == torch.float32 and (got - exact).norm() < 0.02 * exact.norm()


def fresh():
    torch.manual_seed(3)
    return nn.ModuleList([nn.Linear(24, 8), nn.Linear(8, 40), nn.Linear(40, 24)])


def steps(model, optimizers, count):
    random = torch.Generator().manual_seed(4)
    for _ in range(count):
        x = torch.randn(16, 24, generator=random)
        y = x
        for layer in model:
            y = torch.tanh(layer(y))
        model.zero_grad()
        (y - x.roll(1, -1)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()


def groups_of(model, decay=0.1):
    return [{"params": [layer.weight for layer in model], "weight_decay": decay, "matrices": True},
            {"params": [layer.bias for layer in model], "weight_decay": 0.0, "matrices": False}]


def test_steps_are_those_of_torch():
    """torch's Muon, with as many iterations, which multiplies in bfloat16; biases: torch's AdamW, given the same weights bit for bit."""
    ours, theirs = fresh(), fresh()
    before = copy.deepcopy(ours)
    weights, biases = groups_of(theirs)
    steps(ours, [muon.Muon(groups_of(ours), lr=0.01, products=torch.bfloat16)], 4)
    peer = torch.optim.Muon(weights["params"], lr=0.01, weight_decay=0.1, momentum=0.95, nesterov=True, ns_steps=muon.ITERATIONS,
                            adjust_lr_fn="match_rms_adamw")
    steps(theirs, [peer, torch.optim.AdamW(biases["params"], lr=0.01, weight_decay=0.0)], 4)
    for a, b, start in zip(ours.parameters(), theirs.parameters(), before.parameters()):
        assert (a - b).norm() < 0.03 * (b - start).norm() and (b - start).norm() > 0


def test_two_steps_by_hand():
    """Momentum, the look ahead, decay and the size of a step, in float64."""
    W = nn.Parameter(torch.from_numpy(np.random.default_rng(5).standard_normal((6, 3))))
    optimizer = muon.Muon([{"params": [W], "weight_decay": 0.5, "matrices": True}], lr=0.1)
    expected, M = W.detach().numpy().copy(), np.zeros((6, 3))
    for seed in (6, 7):
        G = np.random.default_rng(seed).standard_normal((6, 3))
        M = 0.95 * M + 0.05 * G
        X, _ = by_decomposition((0.05 * G + 0.95 * M).T, muon.ITERATIONS)
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 6 ** 0.5 * X.T
        W.grad = torch.from_numpy(G)
        optimizer.step()
    np.testing.assert_allclose(W.detach().numpy(), expected, atol=1e-12)


def test_what_got_no_gradient_stays():
    model = fresh()
    before = copy.deepcopy(model)
    optimizer = muon.Muon(groups_of(model), lr=0.1)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters())) and not optimizer.state


@pytest.mark.parametrize("chosen", ["adamw", "muon"])
def test_which_parameters_are_matrices(chosen):
    """The weights of linear layers; no embedding, no head, no norm, no table, nothing that is frozen."""
    model = Everything(micro.MICRO)
    c = StageConfig(steps=1, lr=1e-3, warmup=1, batch=2, batch_tokens=128, optimizer=chosen, lm_rate=0.5)
    trainer = engine.Trainer("sft", model, None, c, micro.flags(), engine.World(0, 1, torch.device("cpu")))
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)] for group in trainer.optimizer.param_groups if group["matrices"] for p in group["params"]}
    ends = (".q.weight", ".k.weight", ".v.weight", ".kv.weight", ".out.weight", ".up.weight", ".down.weight")
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert found == ({name for name in learned if name.endswith(ends)} if chosen == "muon" else set())
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(learned)
    assert {(group["rate"], group["weight_decay"]) for group in trainer.optimizer.param_groups if group["matrices"]} == (
        {(1.0, 0.1), (0.5, 0.1)} if chosen == "muon" else set())

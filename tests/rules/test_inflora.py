"""InfLoRA against its equations in fp64, DualGPM against the algorithm as published, and what old outputs do."""

from __future__ import annotations

import math

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import perpetune as pt
from perpetune.recipes import make_recipe
from perpetune.rules import InfLoRA, TaskContext, attach, lora_pairs
from perpetune.rules.dual_gpm import DualBasis

D, RANK = 24, 3


class Net(nn.Module):
    """Two layers that share an input, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v, self.out = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        return self.out(torch.tanh(self.k(x)) + self.v(x))


def fresh(model: nn.Module, seed: int) -> peft.PeftModel:
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=RANK, target_modules=["k", "v", "out"])
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def inputs(seed: int, dims: int, n: int = 40, dtype=torch.float64) -> torch.Tensor:
    """n tokens in `dims` directions."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return (draw(n, dims) * torch.linspace(1, 3, dims, dtype=torch.float64) @ draw(dims, D)).to(dtype)


def learn(model, rule, index, X, steps=40, optimizer=torch.optim.AdamW):
    """One task with a fresh LoRA that is merged; the merged model, what A was, and what was measured."""
    tuned = fresh(model, index)
    rule.begin_task(TaskContext(tuned, index, lambda: iter([{"x": X}])))
    A = {pair.name.rpartition(".")[2]: pair.A.detach().clone() for pair in lora_pairs(tuned)}
    chosen = optimizer([p for p in tuned.parameters()], lr=1e-2, weight_decay=0.1)
    attached = attach(tuned, chosen, [rule], begin=False)
    target = torch.randn(len(X), D, generator=torch.Generator().manual_seed(index)).to(X)
    for _ in range(steps):
        chosen.zero_grad()
        (tuned(X) - target).square().mean().backward()
        chosen.step()
    attached.remove()
    assert all(torch.equal(A[p.name.rpartition(".")[2]], p.A) for p in lora_pairs(tuned))  # frozen
    measured = rule.guarantee()
    rule.end_task(TaskContext(tuned, index, lambda: iter([{"x": X}])))
    return tuned.merge_and_unload(), A, measured


def published(past, X, epsilon):
    """DualGPM as the paper writes it, on X (d x n): past is (basis, "remove" or "retain"), or None."""
    basis, kind = past or (np.zeros((len(X), 0)), "remove")
    total = (X**2).sum()
    if kind == "remove":
        outside = X - basis @ (basis.T @ X)
        U, S, _ = np.linalg.svd(outside, full_matrices=False)
        k = 0
        while total - (S**2).sum() + (S[:k] ** 2).sum() < epsilon * total:
            k += 1
        basis = np.hstack([basis, U[:, :k]])
    else:
        outside = basis @ (basis.T @ X)
        U, S, _ = np.linalg.svd(outside, full_matrices=False)
        k = 0
        while (S[k:] ** 2).sum() > (1 - epsilon) * total:
            k += 1
        left = basis - U[:, :k] @ (U[:, :k].T @ basis)
        basis = np.linalg.svd(left)[0][:, : basis.shape[1] - k]
    if kind == "remove" and basis.shape[1] > len(X) / 2:
        return np.linalg.svd(basis)[0][:, basis.shape[1] :], "retain"
    return basis, kind


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    dims=st.lists(st.integers(1, 16), min_size=1, max_size=6),
    first=st.sampled_from([0.5, 0.9, 0.98]),
)
def test_the_bases_are_those_of_dual_gpm(seed, dims, first):
    rule, known, past = InfLoRA(first, 1.0, sessions=len(dims)), DualBasis.empty(D), None
    for task, dim in enumerate(dims):
        rule._tasks = task
        assert rule.epsilon == pytest.approx(first + (1 - first) * task / len(dims))
        X = inputs(seed + task, dim).T
        known = known.grown(X @ X.T / X.square().sum(), rule.epsilon)
        past = published(past, X.numpy(), rule.epsilon)
        theirs = torch.from_numpy(past[0])
        assert known.complement == (past[1] == "retain") and known.basis.shape == theirs.shape
        assert known.basis.shape[1] <= D / 2
        torch.testing.assert_close(known.basis @ known.basis.T, theirs @ theirs.T, rtol=0, atol=1e-7)
        assert float(known.inside(X).square().sum() / X.square().sum()) >= rule.epsilon - 1e-12


def test_a_spans_the_leading_directions_of_what_is_left_of_the_new_inputs():
    rule, model = InfLoRA(0.9, 0.9), Net().double()
    model, _, _ = learn(model, rule, 0, inputs(0, 6))
    X = inputs(1, 9)
    old = rule._old[rule._reads["base_model.model.k.A"]]
    _, A, _ = learn(model, rule, 1, X)
    left = old.outside(X.T)
    U = torch.linalg.svd(left)[0][:, :RANK]
    for name in ("k", "v"):  # one input, one design
        torch.testing.assert_close(A[name].T @ A[name], U @ U.T / 3, rtol=0, atol=1e-12)
        assert old.inside(A[name].T).abs().max() < 1e-12
    assert not torch.allclose(A["out"].T @ A["out"], U @ U.T / 3, atol=1e-3)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_old_outputs_stay_whatever_the_optimizer_does(optimizer, dtype, tolerance):
    rule, model, old = InfLoRA(1.0, 1.0), Net().to(dtype), []
    for task in range(3):
        X = inputs(task, 6, dtype=dtype)
        before = model(X).detach()
        model, _, measured = learn(model, rule, task, X, optimizer=optimizer)
        assert (model(X) - before).norm() > 1e-2 * before.norm()  # it has learned
        for seen, then in old:
            assert (model(seen) - then).norm() < tolerance * then.norm()
        assert [m.holds for m in measured] == ([] if task == 0 else [True, None, None])
        old.append((X, model(X).detach()))


def test_without_it_old_outputs_move():
    model, X = Net().double(), inputs(0, 6)
    model, _, _ = learn(model, InfLoRA(1.0, 1.0), 0, X)
    then = model(X).detach()
    model, _, _ = learn(model, InfLoRA(1.0, 1.0), 0, inputs(1, 6))  # one that knows nothing of the first task
    assert (model(X) - then).norm() > 1e-2 * then.norm()


def test_where_old_inputs_span_everything_nothing_is_learned_and_said():
    rule, said = InfLoRA(1.0, 1.0), []
    model, _, _ = learn(Net().double(), rule, 0, inputs(0, D, n=200))
    tuned = fresh(model, 1)
    rule.begin_task(TaskContext(tuned, 1, lambda: iter([{"x": inputs(1, 6)}]), say=said.append))
    assert all(not pair.A.any() for pair in lora_pairs(tuned)) and "learn nothing" in said[0]


def test_fewer_directions_than_the_rank_leave_rows_of_zeros():
    rule, model = InfLoRA(1.0, 1.0), Net().double()
    tuned = fresh(model, 0)
    rule.begin_task(TaskContext(tuned, 0, lambda: iter([{"x": inputs(0, 2)}])))
    rows = next(pair.A for pair in lora_pairs(tuned) if pair.name.endswith("k")).norm(dim=1)
    assert rows[:2].tolist() == pytest.approx([1 / math.sqrt(3)] * 2) and rows[2] == 0


def test_what_it_cannot_keep_is_refused():
    for wrong in ({"first": 0}, {"first": 0.9, "last": 0.8}, {"sessions": 0}, {"unprotected": "freeze"}):
        with pytest.raises(pt.ConfigError):
            InfLoRA(**wrong)
    batches = lambda: iter([{"x": inputs(0, 6)}])  # noqa: E731
    tuned = fresh(Net().double(), 0)
    for context, text in (
        (TaskContext(tuned, 0), "give `batches`"),
        (TaskContext(tuned, 1, batches), "knows no past"),
    ):
        with pytest.raises(pt.RuleError, match=text):
            InfLoRA().begin_task(context)
    rule = InfLoRA()
    learn(Net().double(), rule, 0, inputs(0, 6))
    other = peft.get_peft_model(
        Net().double(), peft.LoraConfig(r=2, target_modules=["k"]), autocast_adapter_dtype=False
    )
    with pytest.raises(pt.RuleError, match="other layers"):
        rule.begin_task(TaskContext(other, 1, batches))
    other = fresh(Net().double(), 0)
    other.base_model.model.out.base_layer.bias.requires_grad_(True)
    with pytest.raises(pt.RuleError, match=r"cannot protect `.*out.*bias`"):
        InfLoRA().begin_task(TaskContext(other, 0, batches))
    InfLoRA(unprotected="allow").begin_task(TaskContext(other, 0, batches))


def test_the_recipe_is_a_row_as_published(word_stream, tiny_bert, tmp_path):
    recipe = make_recipe("inflora")
    assert recipe.tuner.config.r == 10 and recipe.tuner.config.lora_alpha == 10
    stream = pt.load_stream(word_stream)
    learner = pt.Learner(
        tiny_bert(), {"name": "inflora", "rank": 2, "first": 1.0}, tmp_path / "run", training={"num_train_epochs": 1}
    )
    result = learner.learn(stream)
    promised = [g for g in result.guarantees if g["source"] == "InfLoRA" and g["holds"] is not None]
    assert len(promised) == 2 * (len(stream) - 1) and all(g["holds"] for g in promised)  # A, and buffers
    tuned = {n for n, m in learner.backbone.model.named_modules() if n.endswith(("key", "value"))}
    config = result.commits[-1].json("adapter_config.json")
    assert set(config["target_modules"]) == {n for n in tuned if "attention" in n}

"""Weights that keep their leading singular triples: OSF and OPLoRA against their equations in fp64."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import perpetune as pt
from perpetune.core.errors import ConfigError, RuleError
from perpetune.recipes import make_recipe
from perpetune.rules import TaskContext, WeightProjection, attach, lora_pairs
from perpetune.rules.weight_bases import WeightBasis, count, layer_importance, ratios
from perpetune.rules.weight_parts import adapted, matrices

WIDE, NARROW, KEPT = 12, 8, 3


class Net(nn.Module):
    """A wide and a narrow matrix, a norm and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(NARROW, WIDE), nn.LayerNorm(WIDE), nn.Linear(WIDE, NARROW)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.norm(self.up(x))))


def net(seed: int = 0, dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype)


def lora(model: nn.Module, targets=("up", "down"), seed: int = 0) -> peft.PeftModel:
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=list(targets))
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def learn(model, rule, index=0, steps=25, optimizer=torch.optim.AdamW, end=True, begin=True, **how):
    """One task; what was measured of it."""
    p = next(model.parameters())
    x, y = (draw(s + index, 40, NARROW).to(p.dtype) for s in (10, 20))
    params = [p for p in model.parameters() if p.requires_grad]
    chosen = optimizer(params, **({"lr": 1e-2, "weight_decay": 0.1} | how))
    attached = attach(model, chosen, [rule], index=index, batches=lambda: [{"x": x}], begin=begin)
    for _ in range(steps):
        chosen.zero_grad()
        (model(x) - y).square().mean().backward()
        chosen.step()
    attached.remove()
    measured = rule.guarantee()
    if end:
        rule.end_task(TaskContext(model, index))
    return measured


def leading(W: Tensor, k: int = KEPT) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vt = torch.linalg.svd(W.detach(), full_matrices=False)
    return U[:, :k], S[:k], Vt[:k].T


def projectors(W: Tensor, k: int = KEPT) -> tuple[Tensor, Tensor]:
    U, _, V = leading(W, k)
    return torch.eye(len(U)).to(W) - U @ U.T, torch.eye(len(V)).to(W) - V @ V.T


def leak(W: Tensor, D: Tensor, k: int = KEPT) -> float:
    U, _, V = leading(W, k)
    return float(max((U.T @ D).norm(), (D @ V).norm()) / D.norm())


# ---- the equations ----


def test_a_step_is_the_projected_gradient():
    """W - lr (I - U U^T) G (I - V V^T), whatever is projected: update, gradient or both."""
    for on in ("update", "gradient", "both"):
        model = net()
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        rule = WeightProjection(KEPT, on=on)
        x, y = draw(10, 40, NARROW), draw(20, 40, NARROW)
        (model(x) - y).square().mean().backward()
        G = {n: getattr(model, n).weight.grad.clone() for n in ("up", "down")}
        learn(model, rule, steps=1, optimizer=torch.optim.SGD, lr=0.5, weight_decay=0.0)
        for name in G:
            W = start[f"{name}.weight"]
            L, R = projectors(W)
            torch.testing.assert_close(
                getattr(model, name).weight.detach(), W - 0.5 * L @ G[name] @ R, rtol=0, atol=1e-14
            )


def test_oplora_makes_the_steps_of_the_published_form():
    """W + s P_L B A P_R in the forward pass and AdamW on free A and B: the same change after every step."""
    for targets in (("up",), ("up", "down")):
        model, published = lora(net(), targets), lora(net(), targets)
        frozen = {pair.name: projectors(pair.weight) for pair in lora_pairs(published)}
        learn(model, WeightProjection(KEPT, branch="fresh"), end=False)
        modules = dict(published.named_modules())

        def forward(layer, args, output, projected):
            (x,), (L, R) = args, projected
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            return layer.base_layer(x) + layer.scaling["default"] * x @ (L @ B @ A @ R).T

        for name, projected in frozen.items():
            modules[name].register_forward_hook(
                lambda layer, args, output, projected=projected: forward(layer, args, output, projected)
            )
        learn(published, pt.rules.Rule(), end=False)
        for ours, theirs in zip(lora_pairs(model), lora_pairs(published), strict=True):
            L, R = frozen[theirs.name]
            change = (L @ theirs.B @ theirs.A @ R).detach()
            assert change.norm() > 0.1
            torch.testing.assert_close((ours.B @ ours.A).detach(), change, rtol=1e-10, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), out=st.integers(1, 9), d=st.integers(1, 9), k=st.integers(1, 9))
def test_the_factors_of_osf_reach_what_a_projected_weight_reaches(seed, out, d, k):
    """Every (I - U U^T) Z (I - V V^T) is U_low S_low V_low of min(out, d) - k terms orthogonal to the kept ones."""
    W, k = draw(seed, out, d), min(k, out, d)
    basis = WeightBasis.of(W, k)
    Z = basis.outside(draw(seed + 1, out, d))
    U, S, Vt = torch.linalg.svd(Z, full_matrices=False)
    terms = min(out, d) - k
    assert (S[terms:] < 1e-12).all() and basis.full == (terms == 0)
    assert (basis.U.T @ U[:, :terms]).abs().max() < 1e-6 if terms and S[:terms].min() > 1e-6 else True
    if basis.full:
        assert not Z.any()


class Masked(Net):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(x)


def test_a_layer_keeps_what_its_importance_says():
    torch.manual_seed(0)
    model, x = Masked().double(), draw(3, 2, 25, NARROW)
    mask = torch.ones(2, 25)
    mask[:, 15:] = 0
    batches = [{"x": x[:1], "attention_mask": mask[:1]}, {"x": x[1:], "attention_mask": mask[1:]}]
    found = layer_importance(model, matrices(model), lambda: batches)
    read = x[:, :15].reshape(-1, NARROW)
    for name, inputs in {"up": read, "down": torch.tanh(model.norm(model.up(read)))}.items():
        outputs = inputs @ getattr(model, name).weight.T  # both cut to the first entries, as in the released code
        cosines = torch.nn.functional.cosine_similarity(inputs[:, :NARROW], outputs[:, :NARROW])
        assert found[name] == pytest.approx(cosines.mean().item(), abs=1e-12)
    shares = ratios({"a": 0.5, "b": 0.25, "c": 0.0}, 0.1, 0.8)
    assert shares == pytest.approx({"a": 1.0, "b": 0.1 + 0.7, "c": 0.1})  # 2, 1 and 0 times the mean
    assert ratios({"a": -0.5, "b": 0.1}, 0.1, 0.8) == {"a": 0.8, "b": 0.8}
    assert (count(0.8, (8, 12)), count(0.01, (8, 12)), count(30, (8, 12)), count(1.0, (8, 12))) == (6, 1, 8, 8)


def test_layers_that_cannot_be_told_by_importance_keep_one_share():
    model, said = net(), []
    rule = WeightProjection(target=0.5)
    rule.begin_task(TaskContext(model, 0, None, None, said.append))
    assert [len(part.basis.S) for part in rule._parts] == [4, 4] and "each keeps 50%" in said[0]


def test_weights_that_importance_keeps_whole_are_counted():
    said, rule = [], WeightProjection()
    rule.load_state({"importance.up": torch.tensor(0.3), "importance.down": torch.tensor(-0.2)})
    rule.begin_task(TaskContext(net(), 1, None, None, said.append))
    assert [len(part.basis.S) for part in rule._parts] == [NARROW, 1]
    assert len(said) == 1 and "1 of 2 weights are kept whole" in said[0]


def test_the_rank_of_the_next_task_is_measured_on_the_task_before():
    model, rule = net(), WeightProjection(least=0.2, target=0.6)
    learn(model, rule, 0)
    x = draw(10, 40, NARROW)
    shares = ratios(layer_importance(model, matrices(model), lambda: [{"x": x}]), 0.2, 0.6)
    rule.begin_task(TaskContext(model, 1, lambda: [{"x": draw(11, 40, NARROW)}]))
    kept = {part.site.name: len(part.basis.S) for part in rule._parts}
    assert kept == {name: count(share, (WIDE, NARROW)) for name, share in shares.items()}


# ---- the promise ----


@pytest.mark.parametrize("branch", ["kept", "fresh"])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_the_leading_triples_stay_whatever_the_optimizer_does(branch, optimizer):
    """Three tasks, each with bases anew of what is merged so far."""
    model, rule = net(), WeightProjection(KEPT, branch=branch)
    for index in range(3):
        tuned = lora(model, seed=index) if branch == "fresh" else model
        before = {n: getattr(model, n).weight.detach().clone() for n in ("up", "down")} if branch == "kept" else {
            pair.name.rpartition(".")[2]: pair.weight.detach().clone() for pair in lora_pairs(tuned)
        }  # fmt: skip
        measured = learn(tuned, rule, index, optimizer=optimizer)
        assert [m.holds for m in measured] == [True, True, True, None, None]
        model = tuned.merge_and_unload() if branch == "fresh" else model
        for name, W in before.items():
            now = getattr(model, name).weight.detach()
            U, S, V = leading(W)
            assert leak(W, now - W) < 1e-12 and (now - W).norm() > 1e-3
            assert (now @ V - U * S).norm() < 1e-12 and (U.T @ now - S[:, None] * V.T).norm() < 1e-12
            if measured[3].value < 1:  # nothing learned has overtaken them: they are the leading ones of the new weight
                U2, S2, V2 = leading(now)
                torch.testing.assert_close(S2, S, rtol=1e-10, atol=0)
                torch.testing.assert_close(U2 @ V2.T, U @ V.T, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("branch", ["kept", "fresh"])
def test_it_holds_to_rounding_in_lower_precision(branch, dtype):
    model = net(dtype=dtype)
    tuned = lora(model) if branch == "fresh" else model
    measured = learn(tuned, WeightProjection(KEPT, branch=branch))
    assert [m.holds for m in measured[:3]] == [True] * 3
    assert all(p.dtype == dtype for p in model.parameters())


def test_the_gradient_alone_keeps_them_under_sgd_and_not_under_adam():
    for optimizer, kept in ((torch.optim.SGD, True), (torch.optim.AdamW, False)):
        model = net()
        W = model.up.weight.detach().clone()
        measured = learn(model, WeightProjection(KEPT, on="gradient"), optimizer=optimizer, weight_decay=0.0)
        assert all(m.holds is None for m in measured)
        assert (leak(W, model.up.weight.detach() - W) < 1e-12) == kept
        assert (measured[0].value < 1e-12) == kept


def test_osf_of_peft_leaves_the_directions_under_adam():
    """Its gradients are projected and then scaled by Adam entry by entry; ours stays (the share of dW that leaks)."""
    leaks = {}
    for optimizer in (torch.optim.SGD, torch.optim.AdamW):
        model = peft.get_peft_model(net(), peft.OSFConfig(effective_rank=KEPT, target_modules=["up", "down"]))
        W = model.base_model.model.up.base_layer.weight.detach().clone()
        learn(model, pt.rules.Rule(), optimizer=optimizer, weight_decay=0.0, lr=1e-2)
        D = model.base_model.model.up.get_delta_weight("default").detach().to(W)
        assert D.norm() > 1e-3
        leaks[optimizer] = leak(W, D)
    assert leaks[torch.optim.SGD] < 1e-5 and leaks[torch.optim.AdamW] > 0.05


def test_what_overtakes_the_kept_directions_is_measured():
    model, rule = net(), WeightProjection(KEPT)
    learn(model, rule, steps=0, end=False)
    quiet = {m.name: m.value for m in rule.guarantee()}
    part = rule._parts[0]
    Z = part.basis.outside(draw(5, WIDE, NARROW))
    with torch.no_grad():  # a direction outside, twice as strong as the weakest that is kept
        model.up.weight += 2 * part.basis.S[-1] * Z / torch.linalg.matrix_norm(Z, 2)
    loud = {m.name: m.value for m in rule.guarantee()}
    name = "strongest direction that is not kept, against the weakest kept"
    assert quiet[name] < 1 < loud[name]
    assert all(m.holds is not False for m in rule.guarantee())


def test_all_else_is_frozen_or_free_or_refused():
    model = net()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    learn(model, WeightProjection(KEPT))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"up.weight", "down.weight"}
    model = net()
    learn(model, WeightProjection(KEPT, unprotected="allow"))
    assert not torch.equal(model.norm.weight, before["norm.weight"])
    with pytest.raises(RuleError, match=r"`up.bias` \(4 such"):
        learn(net(), WeightProjection(KEPT, unprotected="error"))


def test_a_weight_that_is_kept_whole_stays_to_the_bit():
    model = net()
    before = model.up.weight.detach().clone()
    with pytest.warns(UserWarning, match="can learn nothing"):
        learn(model, WeightProjection(1.0))
    assert torch.equal(model.up.weight, before)


# ---- where weights are, and what survives ----


def test_frozen_adapters_beside_count_as_part_of_the_weight():
    model = lora(net(), ("up",))
    with torch.no_grad():
        lora_pairs(model)[0].B.normal_()
    model.add_adapter("next", peft.LoraConfig(r=2, target_modules=["up"]))
    model.base_model.set_adapter(["default", "next"])
    layer = model.base_model.model.up
    for factors in (layer.lora_A, layer.lora_B):
        factors["default"].requires_grad_(False)
    ((pair, W),) = adapted(model, lora_pairs(model))
    assert pair.A is layer.lora_A["next"].weight
    torch.testing.assert_close(W, layer.base_layer.weight + layer.get_delta_weight("default"))


@pytest.mark.parametrize("branch", ["kept", "fresh"])
def test_weights_that_are_stored_transposed(branch):
    torch.manual_seed(0)
    plain = nn.Sequential(Conv1D(WIDE, NARROW), nn.Tanh(), Conv1D(NARROW, WIDE)).double()
    W = plain[0].weight.detach().T.clone()
    if branch == "fresh":
        config = peft.LoraConfig(r=2, target_modules=["0", "2"], fan_in_fan_out=True)
        model = peft.get_peft_model(plain, config, autocast_adapter_dtype=False)
    else:
        model = plain
    rule, x = WeightProjection(KEPT, branch=branch), draw(1, 40, NARROW)
    chosen = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    attach(model, chosen, [rule], batches=lambda: [{"input": x}])
    for _ in range(10):
        model(x).square().mean().backward()
        chosen.step()
    assert all(m.holds is not False for m in rule.guarantee())
    model = model.merge_and_unload() if branch == "fresh" else model
    D = model[0].weight.detach().T - W
    assert D.norm() > 1e-3 and leak(W, D) < 1e-12


@pytest.mark.filterwarnings("ignore:WeightProjection")
def test_a_task_in_progress_goes_on_from_its_state():
    """W_ref and the bases are those of the start of the task, not of the weights when it was stopped."""
    results = []
    for stopped in (False, True):
        model, rule = net(), WeightProjection(least=0.2, target=0.6)
        learn(model, rule, 0)
        learn(model, rule, 1, steps=5, end=False, optimizer=torch.optim.SGD)
        if stopped:
            state, rule = rule.state(), WeightProjection(least=0.2, target=0.6)
            rule.load_state(state)
        measured = learn(model, rule, 1, steps=5, begin=stopped, optimizer=torch.optim.SGD, end=False)
        assert measured[0].holds and measured[2].holds
        results.append(model.up.weight.detach().clone())
    assert torch.equal(*results)
    with pytest.raises(RuleError, match="no state of WeightProjection"):
        rule.load_state({"basis.0": torch.ones(1)})


@pytest.mark.parametrize("branch", ["kept", "fresh"])
def test_what_it_will_hold_is_what_it_holds(branch):
    model = net(dtype=torch.float32)
    model = lora(model) if branch == "fresh" else model
    rule = WeightProjection(KEPT, branch=branch)
    said = rule.bytes_held(model)
    rule.begin_task(TaskContext(model, 0))
    held = [t for part in rule._parts for t in (part.basis.U, part.basis.S, part.basis.V)]
    held += [part.W_ref for part in rule._parts if branch == "kept"]
    assert said == sum(t.nbytes for t in held)


def test_a_model_of_the_other_branch_is_refused():
    with pytest.raises(RuleError, match="branch `kept`.*not LoRA"):
        learn(lora(net()), WeightProjection(KEPT))
    with pytest.raises(RuleError, match="branch `fresh`.*LoRA of linear layers"):
        learn(net(), WeightProjection(KEPT, branch="fresh"))
    with pytest.raises(ConfigError, match="does not fit Continue"):
        pt.Recipe(peft.LoraConfig(), [WeightProjection(KEPT, branch="fresh")], pt.Continue())


@pytest.mark.parametrize(
    "wrong", [{"rank": 0}, {"rank": 1.5}, {"on": "step"}, {"least": 0.9, "target": 0.5}, {"branch": "fresh"}]
)
def test_settings_out_of_range(wrong):
    with pytest.raises(ConfigError, match="WeightProjection"):
        WeightProjection(**wrong)


def test_the_recipes_are_these_pieces():
    osf, oplora = make_recipe("osf"), make_recipe({"name": "oplora", "kept": 4})
    assert osf.rules == (WeightProjection(),) and oplora.rules == (WeightProjection(4, branch="fresh"),)
    assert pt.Recipe.from_dict(osf.to_dict()).to_dict() == osf.to_dict()
    assert math.isclose(osf.training["learning_rate"], 1e-4)

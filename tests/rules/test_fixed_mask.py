from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from perpetune.core.errors import ConfigError, RuleError
from perpetune.rules import FixedMask, TaskContext, attach
from perpetune.rules.mask_selection import largest, pack, unpack

GRADIENT_SCORES = ("fisher", "gradient", "absolute")


class Net(nn.Module):
    """A table of words, two layers and a dropout; reads token ids (N x T), gives features (N x 5)."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(11, 8, dtype=dtype)
        self.first = nn.Linear(8, 16, dtype=dtype)
        self.norm = nn.BatchNorm1d(16, dtype=dtype)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(16, 5, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(self.drop(self.norm(self.first(self.words(ids).mean(1)).tanh())))


IDS = torch.randint(0, 11, (24, 6), generator=torch.Generator().manual_seed(3))
LABELS = IDS.sum(1) % 5


def losses(model: nn.Module) -> Callable[[int], Iterator[Tensor]]:
    return lambda n: (F.cross_entropy(model(x), y) for x, y in zip(IDS.split(n), LABELS.split(n), strict=True))


def begun(model: nn.Module, index: int = 0, **settings) -> FixedMask:
    rule = FixedMask(**settings)
    rule.begin_task(TaskContext(model, index, losses=losses(model)))
    return rule


def mask(rule: FixedMask) -> Tensor:
    return torch.cat([~outside.flatten() for _, outside, _ in rule._masked])


def masks(rule: FixedMask, model: nn.Module) -> dict[str, Tensor]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: ~outside for p, outside, _ in rule._masked}


def train(model: nn.Module, rule: FixedMask, steps: int, index: int = 0, **settings) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), **{"lr": 1e-2, "weight_decay": 0.01, **settings})
    attached = attach(model, optimizer, [rule], index=index, losses=losses(model))
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(IDS), LABELS).backward()
        optimizer.step()
    attached.remove()


def by_sorting(scores: list[Tensor], k: int) -> list[Tensor]:
    """The k largest, ties by flat index, by a stable sort of everything."""
    flat = torch.cat([s.flatten() for s in scores])
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[torch.sort(flat, descending=True, stable=True).indices[:k]] = True
    return [m.view(s.shape) for m, s in zip(kept.split([s.numel() for s in scores]), scores, strict=True)]


# ---- which entries ----


@pytest.mark.parametrize("score", [*GRADIENT_SCORES, "magnitude"])
@pytest.mark.parametrize("batch", [1, 5])
def test_mask_is_that_of_the_equation(score, batch):
    """The scores written out one example (or batch) at a time, cut by sorting; in eval mode."""
    model = Net(torch.float64).train()
    reference = copy.deepcopy(model).eval()
    params = list(reference.parameters())
    gradients = [torch.autograd.grad(loss, params) for loss in losses(reference)(batch)]
    stacked = [torch.stack(g) for g in zip(*gradients, strict=True)]
    scores = {
        "fisher": [g.square().sum(0) for g in stacked],
        "gradient": [g.sum(0).abs() for g in stacked],
        "absolute": [g.abs().sum(0) for g in stacked],
        "magnitude": [p.detach().abs() for p in params],
    }
    settings = {"batch": batch} if score != "magnitude" else {}
    rule = begun(model, keep=0.2, score=score, **settings)
    expected = by_sorting(scores[score], int(0.2 * sum(p.numel() for p in params)))
    assert all(torch.equal(m, e) for m, e in zip(masks(rule, model).values(), expected, strict=True))


def test_first_examples_only():
    model = Net().eval()
    some = begun(model, examples=7, batch=4)
    context = TaskContext(model, 0, losses=lambda n: list(losses(model)(n))[:2])  # 7 examples: 2 batches of 4
    rule = FixedMask(batch=4)
    rule.begin_task(context)
    assert torch.equal(mask(some), mask(rule))
    assert not torch.equal(mask(some), mask(begun(model, batch=4)))


values = st.floats(0, 2.0**100, width=32) | st.sampled_from([0.0, 1.0, 2.0])


@settings(max_examples=50)
@given(
    tensors=st.lists(st.lists(values, min_size=1, max_size=40), min_size=1, max_size=4),
    share=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_largest_is_a_sort(tensors, share, dtype):
    scores = [torch.tensor(t, dtype=dtype) for t in tensors]
    k = int(share * sum(map(len, tensors)))
    found = largest(scores, k)
    assert sum(int(m.sum()) for m in found) == k
    assert all(torch.equal(m, e) for m, e in zip(found, by_sorting(scores, k), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_largest_of_many_that_differ_in_the_last_bits(dtype):
    step = torch.finfo(dtype).eps
    scores = [1 + step * torch.randperm(5000).to(dtype).view(50, 100), 1 + step * torch.randperm(3000).to(dtype)]
    for k in (1, 2500, 7999, 8000):
        assert all(torch.equal(m, e) for m, e in zip(largest(scores, k), by_sorting(scores, k), strict=True))


@given(st.integers(1, 70))
def test_packed_bits_come_back(n):
    flags = torch.rand(n) < 0.5
    assert len(pack(flags)) == math.ceil(n / 8)
    assert torch.equal(unpack(pack(flags), like=flags), flags)


class Bag(nn.Module):
    """Weights on which the loss is linear, so that the gradients are what they are told to be."""

    def __init__(self, *gradients: Tensor) -> None:
        super().__init__()
        self.gradients = gradients
        self.weights = nn.ParameterList(torch.ones(g.shape) for g in gradients)

    def begin(self, **settings) -> FixedMask:
        rule = FixedMask(**settings)
        loss = lambda n: iter([sum((w * g).sum() for w, g in zip(self.weights, self.gradients, strict=True))])  # noqa: E731
        rule.begin_task(TaskContext(self, 0, losses=loss))
        return rule

    def kept(self, **settings) -> list[int]:
        return [int(m.sum()) for m in masks(self.begin(**settings), self).values()]


@pytest.mark.parametrize("score", [*GRADIENT_SCORES, "magnitude", "random"])
def test_global_budget_is_exact_with_ties(score):
    """Check 4: the weights are all equal, half of the gradients too."""
    bag = Bag(torch.ones(13, 7), torch.cat([torch.ones(50), torch.randn(50)]), torch.zeros(11))
    for keep in (0.005, 0.3, 0.77, 1.0):
        assert sum(bag.kept(keep=keep, score=score)) == math.floor(keep * (13 * 7 + 100 + 11))


def test_of_ties_the_first_are_kept():
    bag = Bag(torch.ones(5), torch.ones(5))
    assert mask(bag.begin(keep=0.7)).tolist() == [True] * 7 + [False] * 3


@pytest.mark.parametrize("score", [*GRADIENT_SCORES, "magnitude", "random"])
def test_budget_of_each_tensor(score):
    """Check 4: 0.5 % are 3 entries of 768 and none of 199."""
    bag = Bag(torch.randn(768), torch.randn(199), torch.randn(200), torch.randn(40, 30))
    assert bag.kept(keep=0.005, score=score, scope="per_tensor") == [3, 0, 1, 6]


def test_scope_and_clipping_decide():
    """Check 5: two tensors whose gradients differ in scale."""
    bag = Bag(100 * torch.rand(20) + 50, torch.rand(20))
    assert bag.kept(keep=0.5) == [20, 0]
    assert bag.kept(keep=0.5, scope="per_tensor") == [10, 10]
    clipped = bag.begin(keep=0.5, clip="per_tensor")
    large, small = (g / max(float(g.norm()), 1) for g in bag.gradients)
    expected = by_sorting([large, small], 20)
    assert all(torch.equal(m, e) for m, e in zip(masks(clipped, bag).values(), expected, strict=True))
    assert sum(bag.kept(keep=0.5, clip="per_tensor")) == 20
    assert bag.kept(keep=0.5, clip="per_tensor") != [20, 0]
    assert bag.kept(keep=0.5, clip="global") == [20, 0]


def test_global_clipping_weighs_batches():
    """A batch of large gradients counts as much as one of small ones: clipped to norm 1 before they are added."""
    weights = nn.ParameterList([torch.zeros(4)])
    first, second = torch.tensor([100.0, 0, 0, 0]), torch.tensor([-3.0, 0, 3.9, 0])
    rules = {}
    for clip in ("none", "global"):
        rules[clip] = FixedMask(0.25, "gradient", clip=clip)
        rules[clip].begin_task(
            TaskContext(weights, 0, losses=lambda n: ((weights[0] * g).sum() for g in (first, second)))
        )
    assert mask(rules["none"]).tolist() == [True, False, False, False]  # 97 against 3.9
    assert mask(rules["global"]).tolist() == [False, False, True, False]  # 1 - 0.61 against 0.79


def test_random_masks_follow_the_seed():
    model = Net()
    one, again, other = (mask(begun(model, score="random", seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


# ---- embeddings, architectures ----


def test_embeddings():
    models = {way: Net() for way in ("masked", "free", "frozen")}
    rules, moved = {}, {}
    for way, model in models.items():
        words = model.words.weight.detach().clone()
        rules[way] = FixedMask(0.9, embeddings=way)
        train(model, rules[way], 3)
        moved[way] = model.words.weight != words
    inside = masks(rules["masked"], models["masked"])["words.weight"]
    assert inside.any() and torch.equal(moved["masked"], inside)
    assert moved["free"].all() and not moved["frozen"].any()
    others = sum(p.numel() for name, p in models["free"].named_parameters() if name != "words.weight")
    assert len(mask(rules["free"])) == len(mask(rules["frozen"])) == others
    assert int(mask(rules["free"]).sum()) == int(mask(rules["frozen"]).sum()) == int(0.9 * others)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=8)
    return transformers.GPT2Model(config)


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(config)


@pytest.mark.parametrize("make", [gpt2, t5])
@pytest.mark.parametrize("embeddings", ["masked", "free", "frozen"])
def test_models_without_a_layer_in_their_names(make, embeddings):
    """Check 6: masks go by module."""
    model, ids = make(), torch.randint(0, 20, (4, 6))
    rule = FixedMask(0.3, embeddings=embeddings)
    rule.begin_task(
        TaskContext(model, 0, losses=lambda n: (model(x).last_hidden_state.square().mean() for x in ids.split(n)))
    )
    found = masks(rule, model)
    tables = {n for n in found if any(t in n for t in ("wte", "wpe", "shared", "relative_attention_bias"))}
    assert bool(tables) == (embeddings == "masked")
    assert sum(int(m.sum()) for m in found.values()) == int(0.3 * sum(m.numel() for m in found.values())) > 0


# ---- what moves ----


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({"score": "fisher", "embeddings": "free"}, torch.float32),
        ({"score": "gradient", "keep": 0.02}, torch.bfloat16),
    ],
)
def test_outside_the_mask_no_bit_moves(settings, dtype):
    """Check 3: steps of AdamW with decay."""
    model = Net().to(dtype)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    rule = FixedMask(**settings)
    train(model, rule, 300, lr=1e-3, weight_decay=0.1)
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    for name, m in masks(rule, model).items():
        changed = dict(model.named_parameters())[name].detach().view(kind) != start[name].view(kind)
        assert not (changed & ~m).any()
        assert not m.any() or (changed & m).any()
    kept, escaped, moved = rule.guarantee()
    assert kept.value == kept.bound == int(mask(rule).sum())
    assert escaped.value == escaped.bound == 0
    assert 0 < moved.value <= kept.value / len(mask(rule))


def test_without_the_rule_decay_moves_what_gets_no_gradient():
    """The control of check 3: the drift of the released optimizer, -4.2e-4 after 1000 steps from 1."""
    weights = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weights], lr=4e-5, weight_decay=0.01)
    for _ in range(1000):
        weights.grad = torch.zeros(3)
        optimizer.step()
    assert weights[0].item() - 1 == pytest.approx(-4.2e-4, abs=5e-5)


def test_guarantee_sees_what_escapes():
    model = Net()
    rule = begun(model, keep=0.3, score="magnitude")
    with torch.no_grad():
        model.first.bias += 1
        model.last.weight[model.last.weight == 0] = -0.0
    escaped = rule.guarantee()[1]
    assert escaped.value == int((~masks(rule, model)["first.bias"]).sum()) > 0 and escaped.holds is False


def test_moments_of_masked_entries_stay_0():
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    rule = FixedMask(0.3)
    attach(model, optimizer, [rule], losses=losses(model))
    F.cross_entropy(model(IDS), LABELS).backward()
    optimizer.step()
    for p, outside, _ in rule._masked:
        assert not optimizer.state[p]["exp_avg"][outside].any()


# ---- looking leaves no trace ----


@pytest.mark.parametrize("score", GRADIENT_SCORES)
@pytest.mark.parametrize("dropout", [False, True])
def test_burn_in_leaves_no_trace(score, dropout):
    """Check 9: weights, buffers, gradients, optimizer, random state and modes, which differ from module to module."""
    model = Net().train()
    model.norm.eval()
    optimizer = torch.optim.AdamW(model.parameters())
    F.cross_entropy(model(IDS), LABELS).backward()
    optimizer.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()]))
    random_state = torch.get_rng_state()
    begun(model, score=score, dropout=dropout, batch=4)
    after = (model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training and model.drop.training and not model.norm.training


def test_a_failing_loss_leaves_no_trace_either():
    model = Net().train()
    rule = FixedMask()
    with pytest.raises(ZeroDivisionError):
        rule.begin_task(TaskContext(model, 0, losses=lambda n: (1 / 0 for _ in range(1))))
    assert model.drop.training and rule.state() == {}


def test_dropout_is_on_only_when_asked_for_and_follows_the_seed():
    model = Net().train()
    model.norm.eval()
    plain = [mask(begun(model, batch=4, seed=seed)) for seed in (0, 1)]
    noisy = [mask(begun(model, batch=4, dropout=True, seed=seed)) for seed in (0, 0, 1)]
    assert torch.equal(*plain) and torch.equal(noisy[0], noisy[1])
    assert not torch.equal(plain[0], noisy[0]) and not torch.equal(noisy[0], noisy[2])


# ---- what survives ----


def test_resume_gives_the_same_mask_bit_for_bit():
    """Check 7: and what is outside stays through the tasks, although tuned weights would give another mask."""
    model, rule = Net(), FixedMask(0.2)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, rule, 20)
    first = masks(rule, model)
    rule.end_task(TaskContext(model, 0))
    resumed = FixedMask(0.2)
    resumed.load_state(load(save(rule.state())))
    train(model, resumed, 20, index=1)
    assert all(torch.equal(m, first[name]) for name, m in masks(resumed, model).items())
    assert not torch.equal(mask(begun(model, keep=0.2)), mask(resumed))
    assert all(torch.equal(p[~first[name]], start[name][~first[name]]) for name, p in model.named_parameters())
    assert sum(bits.numel() for bits in rule.state().values()) <= sum(p.numel() for p in model.parameters()) / 8 + 8


def test_no_mask_is_made_of_tuned_weights():
    with pytest.raises(RuleError, match="tuned already"):
        begun(Net(), index=1)


def test_anew_before_each_task():
    model, rule = Net(), FixedMask(0.2, each_task=True)
    train(model, rule, 20)
    first = mask(rule)
    rule.end_task(TaskContext(model, 0))
    train(model, rule, 5, index=1)
    second = mask(rule)
    assert not torch.equal(first, second)
    resumed = FixedMask(0.2, each_task=True)
    resumed.load_state(rule.state())
    resumed.begin_task(TaskContext(model, 1))  # within the task: without losses, so nothing can be chosen again
    assert torch.equal(mask(resumed), second)


def test_mask_of_another_model():
    rule = begun(Net(), keep=0.2)
    other = Net()
    other.last = nn.Linear(16, 50)
    with pytest.raises(RuleError, match="last"):
        rule.begin_task(TaskContext(other, 1))


@pytest.mark.parametrize("key", ["masks", "mask.first.bias"])
def test_foreign_state(key):
    with pytest.raises(RuleError, match="no state of FixedMask"):
        FixedMask().load_state({key: torch.zeros(3)})


# ---- errors ----


@pytest.mark.parametrize(
    "settings",
    [
        {"keep": 0.0}, {"keep": 1.5}, {"score": "hessian"}, {"scope": "layer"}, {"embeddings": "half"}, {"clip": "one"},
        {"examples": 0}, {"batch": 0}, {"seed": -1}, {"score": "magnitude", "dropout": True},
        {"score": "random", "batch": 16},
    ],
)  # fmt: skip
def test_settings_out_of_range(settings):
    with pytest.raises(ConfigError):
        FixedMask(**settings)


def test_empty_mask():
    """Check 6: also where the share of each single tensor is below one entry."""
    with pytest.raises(RuleError, match="none"):
        begun(Net(), keep=1e-4)
    with pytest.raises(RuleError, match="none"):
        begun(Net(), keep=0.005, scope="per_tensor")


def test_nothing_to_mask():
    with pytest.raises(RuleError, match="none to mask"):
        begun(Net().requires_grad_(False))
    with pytest.raises(RuleError, match="none to mask"):
        begun(nn.Embedding(3, 4), embeddings="free")


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (None, "give `losses`"),
        (lambda n: [], "no training example"),
        (lambda n: [torch.zeros((), requires_grad=True) * 1], "all scores"),
        (lambda n: [Net.broken.sum() * math.inf], "not finite"),
    ],
)
def test_losses_that_say_nothing(losses, message, monkeypatch):
    model = Net()
    monkeypatch.setattr(Net, "broken", model.last.weight, raising=False)
    rule = FixedMask()
    with pytest.raises(RuleError, match=message):
        rule.begin_task(TaskContext(model, 0, losses=losses))
    assert rule.state() == {}


def test_end_without_begin():
    with pytest.raises(RuleError, match="begin_task"):
        FixedMask().end_task(TaskContext(Net(), 0))

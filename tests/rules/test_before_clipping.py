"""Penalties of the released forms are clipped together with the loss, as their trainers do."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from perpetune.core.errors import RuleError
from perpetune.recipes import lora_family
from perpetune.recipes.recipe import Recipe
from perpetune.rules import FactorL1, OrthogonalToPast, ProductL1, ReleasedProductL1, TaskContext, attach, lora_pairs

RULES = {
    "olora": lambda **k: OrthogonalToPast(50.0, "absolute", norm_strength=0.3, **k),
    "olora, squared": lambda **k: OrthogonalToPast(50.0, **k),
    "nlora": lambda **k: ReleasedProductL1(20.0, **k),
    "product": lambda **k: ProductL1(5.0, **k),
    "factors": lambda **k: FactorL1(3.0, **k),
}
X = torch.randn(8, 8, generator=torch.Generator().manual_seed(3)).double()


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return (self.layers[1](self.layers[0](x).tanh()) - 1).square().mean()


def model_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, target_modules=r"layers\.\d+")
    model = peft.get_peft_model(Two(), config, autocast_adapter_dtype=False).double()
    for pair in lora_pairs(model):
        nn.init.normal_(pair.B, std=0.1)
    return model


def with_a_past(make, **settings):
    rule = make(**settings)
    rule.begin_task(TaskContext(model_of(0), 0))
    rule.end_task(TaskContext(model_of(0), 0))
    return rule


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def expected(rule, steps: int = 1) -> list[Tensor]:
    """Steps of SGD on the sum of loss and penalty, clipped to 1."""
    model = model_of(1)
    rule.begin_task(TaskContext(model, 1))
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).backward()
        for p, value in rule.gradients():
            p.grad += value
        nn.utils.clip_grad_norm_(trained(model), 1.0)
        optimizer.step()
    return [p.detach() for p in trained(model)]


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("name", RULES)
def test_a_step_is_that_of_the_clipped_sum(name, parts):
    model, rule = model_of(1), with_a_past(RULES[name], before_clipping=True)
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    attached = attach(model, optimizer, [rule], index=1)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).backward()
        optimizer.zero_grad()  # a pass that is thrown away
        for x in X.chunk(parts):
            (model(x) / parts).backward()
        norm = nn.utils.clip_grad_norm_(trained(model), 1.0)
        assert norm > 2  # the penalty is seen
        optimizer.step()
    attached.remove()
    for p, q in zip(trained(model), expected(with_a_past(RULES[name]), 3), strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-10, atol=1e-12)
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in trained(model))


@pytest.mark.parametrize("early, wanted", [(True, 9.3 / 16.3), (False, 9.3)])
def test_how_much_larger_the_penalty_is_than_the_loss_in_a_step(early, wanted):
    """Gradients of norm 9.3 and 16.3, clipped to 1: 0.57 if clipped together, 9.3 if only the loss is."""
    model, rule = model_of(1), with_a_past(RULES["olora"], before_clipping=early)
    rule.begin_task(TaskContext(model, 1))
    params = trained(model)
    task = torch.cat([g.flatten() for g in torch.autograd.grad(model(X), params)])
    rule.strength, rule.norm_strength = 1.0, 0.0
    slopes = {id(p): v for p, v in rule.gradients()}
    penalty = torch.cat([slopes.get(id(p), torch.zeros_like(p)).flatten() for p in params])
    rule.strength = float(9.3 / penalty.norm())
    optimizer = torch.optim.SGD(params, lr=1.0)
    attach(model, optimizer, [rule], index=1, begin=False)
    before = torch.cat([p.detach().flatten() for p in params]).clone()
    (model(X) * 16.3 / task.norm()).backward()
    nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step()
    step = before - torch.cat([p.detach().flatten() for p in params])
    unit = torch.stack([task / task.norm(), penalty / penalty.norm()], dim=1)
    of_task, of_penalty = torch.linalg.lstsq(unit, step[:, None]).solution.flatten()
    assert float(of_penalty / of_task) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_with_a_loss_scale(fused):
    model, rule = model_of(1), with_a_past(RULES["olora"], before_clipping=True)
    optimizer = torch.optim.SGD(trained(model), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    attach(model, optimizer, [rule], index=1, scaler=scaler)
    scaler.scale(model(X)).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(trained(model), 1.0)
    scaler.step(optimizer)
    for p, q in zip(trained(model), expected(with_a_past(RULES["olora"])), strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-7, atol=1e-9)


def test_a_loss_scale_that_is_not_known_is_refused():
    model, rule = model_of(1), with_a_past(RULES["olora"], before_clipping=True)
    optimizer = torch.optim.SGD(trained(model), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    attach(model, optimizer, [rule], index=1)
    scaler.scale(model(X)).backward()
    with pytest.raises(RuleError, match="scaler"):
        scaler.step(optimizer)


def test_what_the_loss_does_not_reach_is_shaped_too():
    model, rule = model_of(1), with_a_past(RULES["factors"], before_clipping=True)
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    attach(model, optimizer, [rule], index=1)
    before = [p.detach().clone() for p in trained(model)]
    optimizer.step()
    for p, b in zip(trained(model), before, strict=True):
        torch.testing.assert_close(p.detach(), b - 0.3 * b.sign())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_inside_transformers_trainer(tmp_path, accumulation):
    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(X)

        def __getitem__(self, i: int) -> dict[str, Tensor]:
            return {"x": X[i]}

    class Loss(transformers.Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return model(inputs["x"])

    model, rule = model_of(1), with_a_past(RULES["olora"], before_clipping=True)
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    attach(model, optimizer, [rule], index=1)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=8 // accumulation, max_steps=1, report_to=[],
        gradient_accumulation_steps=accumulation, save_strategy="no", lr_scheduler_type="constant", use_cpu=True,
        disable_tqdm=True, max_grad_norm=1.0, logging_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    trainer = Loss(model=model, args=arguments, train_dataset=Rows(), optimizers=(optimizer, None))
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    for p, q in zip(trained(model), expected(with_a_past(RULES["olora"])), strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-5, atol=1e-6)


def test_released_recipes_clip_the_sum_and_others_do_not():
    for name in ("olora_released", "nlora_released", "olora", "nlora"):
        recipe = getattr(lora_family, name)()
        assert recipe.rules[0].before_clipping == name.endswith("released")
        data = recipe.to_dict()
        assert ("before_clipping" in data["rules"][0]) == name.endswith("released")
        assert Recipe.from_dict(data).to_dict() == data

"""Every rule on two processes, under DDP and on the shards of FSDP2: what one process learns, to rounding."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from perpetune.core.errors import RuleError
from perpetune.rules import (
    FixedMask,
    InfLoRA,
    OrthogonalToPast,
    ProductL1,
    Rule,
    StepMask,
    SubspaceProjection,
    TaskContext,
    attach,
)
from tests.rules.conftest import make
from tests.rules.ranks import RANKS
from tests.rules.test_rule_contract import CASES as CONTRACT
from tests.rules.test_rule_contract import SHAPES, Case

STEPS, EXAMPLES = 3, 8
KINDS = ("ddp", "fsdp")
CASES = {
    **CONTRACT,
    "ProductL1 before clipping": Case(lambda: ProductL1(0.5, before_clipping=True)),
    "OrthogonalToPast before clipping": Case(lambda: OrthogonalToPast(5.0, before_clipping=True)),
    "SubspaceProjection in part": Case(lambda: SubspaceProjection(0.9, strength=0.5)),
    "FixedMask of some": Case(lambda: FixedMask(0.3, "gradient", examples=4, clip="global"), any_weights=True),
    "FixedMask by size": Case(lambda: FixedMask(0.3, "magnitude"), any_weights=True),
    "FixedMask random": Case(lambda: FixedMask(0.3, "random"), any_weights=True),
}
# each rule in each form, but for one that decomposes whole weights, and refuses shards
BOTH = [(name, kind) for name in CASES for kind in KINDS if (name, kind) != ("WeightProjection", "fsdp")]
# two sketches in one keep their promise, and are not the sketch of all
OTHERWISE = {"SubspaceProjection sketched"}


def model_of(case: Case, index: int) -> nn.Module:
    model = make(SHAPES, seed=index, dtype=torch.float64)
    if case.config is not None:
        model = peft.get_peft_model(model.unload(), case.config(), autocast_adapter_dtype=False)
        for p in (p for p in model.parameters() if p.requires_grad):
            p.data += 0.3 * torch.randn_like(p)
    return model.double()


def examples(seed: int) -> Tensor:
    return torch.randn(EXAMPLES, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spread(model: nn.Module, kind: str | None, freezes: bool = False) -> nn.Module:
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=freezes)
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for layer in model.base_model.model.layers[:2]:
            fully_shard(layer)
        fully_shard(model)
    return model


def learn(name: str, kind: str | None, rank: int) -> tuple[dict[str, Tensor], list[dict]]:
    """Two tasks as one process (`kind` None) or as one of two, each of which sees every other example."""
    case = CASES[name]
    rule, tensors, measured = case.make(), {}, []
    for index in range(2):
        model = spread(model_of(case, index), kind, freezes=name == "InfLoRA")
        mine = slice(rank, None, RANKS) if kind else slice(None)

        def losses(n: int, model=model, index=index, mine=mine) -> Iterator[Tensor]:
            return (model(x) for x in examples(index).split(n)[mine])

        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=1e-2)
        batches: Callable = lambda index=index, mine=mine: iter([{"x": examples(index)[mine]}])  # noqa: E731
        attached = attach(model, optimizer, [rule], index=index, batches=batches, losses=losses)
        for step in range(STEPS):
            optimizer.zero_grad()
            for part in [rank] if kind else range(RANKS):
                loss = model(examples(100 * index + step)[part::RANKS])
                (loss if kind else loss / RANKS).backward()
            nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
        attached.remove()
        measured += [m.to_dict() for m in rule.guarantee()]
        rule.end_task(TaskContext(model, index, batches, losses))
        state = getattr(model, "module", model).state_dict()
        whole = {key: p.full_tensor() if hasattr(p, "full_tensor") else p for key, p in state.items()}
        tensors |= {f"{index}.{key}": p.detach().clone().contiguous() for key, p in whole.items()}
    return tensors | {f"rule.{key}": value.contiguous() for key, value in rule.state().items()}, measured


def refused(rank: int) -> list[str]:
    """What is said where a rule would do nothing: begun before the model is sharded, or sharded by columns."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    model, rule = model_of(CASES["ProductL1"], 0), ProductL1(1.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    spread(model, "fsdp")
    found = []
    try:
        attach(model, optimizer, [rule])
    except RuleError as error:
        found.append(str(error))
    model = spread(model_of(CASES["InfLoRA"], 0), "ddp")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    try:
        attach(model, optimizer, [InfLoRA()], batches=lambda: iter([{"x": examples(0)}]))
    except RuleError as error:
        found.append(str(error))
    try:
        learn("WeightProjection", "fsdp", rank)
    except RuleError as error:
        found.append(str(error))
    lone = nn.Linear(8, 8)
    lone.weight = nn.Parameter(distribute_tensor(lone.weight.data, init_device_mesh("cpu", (RANKS,)), [Shard(1)]))
    optimizer = torch.optim.SGD(lone.parameters(), lr=0.1)
    attach(lone, optimizer, [StepMask(0.5)])
    lone.weight.grad = torch.ones_like(lone.weight)
    try:
        optimizer.step()
    except RuleError as error:
        found.append(str(error))
    return found


def work(rank: int, folder: Path) -> None:
    for name, kind in BOTH:
        tensors, measured = learn(name, kind, rank)
        save_file(tensors, folder / f"{name} {kind} {rank}.safetensors")
        (folder / f"{name} {kind} {rank}.json").write_text(json.dumps(measured))
    (folder / f"refused {rank}.json").write_text(json.dumps(refused(rank)))


@pytest.fixture
def ran(two_ranks) -> Path:
    return two_ranks


@pytest.fixture(scope="module")
def alone() -> Callable[[str], tuple[dict[str, Tensor], list[dict]]]:
    found: dict = {}

    def learned(name: str) -> tuple[dict[str, Tensor], list[dict]]:
        if name not in found:
            found[name] = learn(name, None, 0)
        return found[name]

    return learned


@pytest.mark.parametrize(("name", "kind"), BOTH)
def test_two_processes_learn_what_one_does(name, kind, ran, alone):
    expected, measured = alone(name)
    for rank in range(RANKS):
        tensors = load_file(ran / f"{name} {kind} {rank}.safetensors")
        seen = json.loads((ran / f"{name} {kind} {rank}.json").read_text())
        assert tensors.keys() == expected.keys()
        assert [(m["name"], m["holds"]) for m in seen] == [(m["name"], m["holds"]) for m in measured]
        if name in OTHERWISE:
            continue
        for key, value in expected.items():
            assert torch.allclose(tensors[key].double(), value.double(), rtol=1e-8, atol=1e-11), key
        for m, known in zip(seen, measured, strict=True):
            assert m["value"] == pytest.approx(known["value"], rel=1e-6, abs=1e-9)
    first, second = (load_file(ran / f"{name} {kind} {rank}.safetensors") for rank in range(RANKS))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_rule_acted(kind, ran):
    plain = learn_without_rule()
    for name, case in CASES.items():
        if case.config is None and case.hooks and (name, kind) in BOTH:
            tensors = load_file(ran / f"{name} {kind} 0.safetensors")
            assert any(not torch.allclose(tensors[f"1.{key}"], value, atol=1e-7) for key, value in plain.items()), name


def learn_without_rule() -> dict[str, Tensor]:
    CASES["nothing"] = Case(Rule)
    try:
        tensors, _ = learn("nothing", None, 0)
    finally:
        del CASES["nothing"]
    return {key[2:]: value for key, value in tensors.items() if key.startswith("1.")}


def test_what_would_not_act_is_refused(ran):
    for rank in range(RANKS):
        inert, frozen, whole, columns = json.loads((ran / f"refused {rank}.json").read_text())
        assert "the optimizer does not" in inert and "then attach" in inert
        assert "find_unused_parameters" in frozen and "train without sharding" in whole
        assert "sharded by columns" in columns and "FSDP2" in columns


# ---- one process ----


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.hooks])
def test_an_optimizer_of_other_tensors_is_an_error(name):
    case = CASES[name]
    rule = case.make()
    for index in range(2):
        model = model_of(case, index)
        x = examples(index)
        context = {
            "batches": lambda x=x: iter([{"x": x}]),
            "losses": lambda n, m=model, x=x: (m(r) for r in x.split(n)),
        }
        if index == 0:
            params = [p for p in model.parameters() if p.requires_grad]
            attach(model, torch.optim.SGD(params), [rule], **context)
            rule.end_task(TaskContext(model, index, **context))
    other = torch.optim.SGD([p for p in model_of(case, 1).parameters() if p.requires_grad])
    with pytest.raises(RuleError, match="the optimizer does not"):
        attach(model, other, [rule], index=1, **context)


def test_compiled_and_prepared_models_have_the_names_of_plain_ones():
    states = []
    for wrap in (
        lambda m, o: (m, o),
        lambda m, o: (torch.compile(m, backend="eager"), o),
        Accelerator(cpu=True).prepare,
    ):
        rule, model = OrthogonalToPast(1.0), model_of(CASES["ProductL1"], 0)
        model, optimizer = wrap(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad]))
        attach(model, optimizer, [rule])
        rule.end_task(TaskContext(model, 0))
        states.append(rule.state().keys())
    assert states[0] == states[1] == states[2] != set()


@pytest.mark.parametrize("compiled", ["model", "step"])
def test_compiled_code_takes_the_rules_along(compiled):
    """To the rounding of compiled code; `eager` traces it, and makes no machine code of it."""

    def learned(model: nn.Module, wraps: bool, rule: Rule) -> list[Tensor]:
        params, x = [p for p in model.parameters() if p.requires_grad], examples(0)
        optimizer = torch.optim.AdamW(params, lr=1e-2)
        network = torch.compile(model, backend="eager") if wraps and compiled == "model" else model
        attach(network, optimizer, [rule])
        step = (
            torch.compile(lambda: optimizer.step(), backend="eager") if wraps and compiled == "step" else optimizer.step
        )
        for _ in range(3):
            optimizer.zero_grad()
            network(x).backward()
            step()
        return [p.detach().clone() for p in params]

    torch._dynamo.reset()
    plain, other, without = (
        learned(model_of(CASES["ProductL1"], 0), wraps, rule)
        for wraps, rule in ((False, StepMask(0.3, "update")), (True, StepMask(0.3, "update")), (False, Rule()))
    )
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(plain, other, strict=True))
    assert not any(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(plain, without, strict=True))


class DeepSpeedEngine(nn.Linear):
    """Called as DeepSpeed calls its model."""


def test_deepspeed_is_refused():
    model = DeepSpeedEngine(2, 2)
    with pytest.raises(RuleError, match="use DDP or FSDP2") as refused:
        attach(model, torch.optim.SGD(model.parameters()), [StepMask(0.5)])
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("form", [nn.DataParallel])
def test_data_parallel_is_refused(form):
    model = form(nn.Linear(2, 2))
    with pytest.raises(RuleError, match="torchrun"):
        attach(model, torch.optim.SGD(model.parameters()), [StepMask(0.5)])

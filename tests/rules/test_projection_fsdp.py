"""FSDP2: two processes, each with half of the rows of every weight, learn and measure what one process does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from perpetune.rules.base import TaskContext, attach
from perpetune.rules.projection import SubspaceProjection
from tests.rules.course import data, lora, network, trained
from tests.rules.ranks import RANKS

STEPS = 6
CASES = {
    "kept": ("lora", {"branch": "kept"}),
    "fresh": ("lora", {"branch": "fresh"}),
    "all weights": ("all", {"unprotected": "freeze"}),
}


def learn(case: str, rank: int | None) -> tuple[dict[str, Tensor], dict]:
    """Two tasks as one process (rank None) or as one of two; weights and memory, whole, and what was seen on the way.

    A rank trains on its half of each batch, and reads it for the memory; one process takes both halves in turn.
    """
    tuner, settings = CASES[case]
    rule = SubspaceProjection(energy=1, probes=2, **settings)
    model, seen = shard(network(tuner), rank), {}
    for index, (x, y) in enumerate((data(16, 1, torch.float64), data(32, 2, torch.float64))):
        parts = range(RANKS) if rank is None else [rank]
        context = TaskContext(model, index, lambda x=x, parts=parts: [{"x": x[part::RANKS]} for part in parts])
        before = whole(model)
        optimizer = torch.optim.AdamW(trained(model), lr=3e-3, weight_decay=0.01)
        attached = attach(model, optimizer, [rule], index=index, batches=context.batches)
        for _ in range(STEPS):
            optimizer.zero_grad()
            for half in parts:
                loss = F.mse_loss(model(x[half::RANKS])[:, : y.shape[1]], y[half::RANKS])
                (loss / RANKS if rank is None else loss).backward()  # FSDP2 takes the mean over ranks
            optimizer.step()
        attached.remove()
        after = whole(model)
        seen = {
            "guarantee": [measured.to_dict() for measured in rule.guarantee()],
            "held": sum(rows(p).numel() for p in model.parameters()),
            "moved": [key for key, value in after.items() if not torch.equal(value, before[key])],
        }
        rule.end_task(context)
        if case == "fresh" and index == 0:
            plain = network(tuner)
            plain.load_state_dict(after)
            torch.manual_seed(1)
            model = shard(lora(plain.merge_and_unload()), rank)
    return {**after, **{f"rule.{key}": value for key, value in rule.state().items()}}, seen


def shard(model: nn.Module, rank: int | None) -> nn.Module:
    if rank is None:
        return model
    from torch.distributed.fsdp import fully_shard

    for block in getattr(model, "base_model", model).blocks:
        fully_shard(block)
    return fully_shard(model)


def rows(p: Tensor) -> Tensor:
    return p.to_local() if hasattr(p, "to_local") else p


def whole(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    return {key: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for key, p in state.items()}


def work(rank: int, folder: Path) -> None:
    for case in CASES:
        tensors, seen = learn(case, rank)
        save_file(tensors, folder / f"{case} {rank}.safetensors")
        (folder / f"{case} {rank}.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def found(two_ranks) -> dict[str, list[tuple[dict[str, Tensor], dict]]]:
    """What each rank found in each case."""
    folder = two_ranks
    return {
        case: [
            (load_file(folder / f"{case} {rank}.safetensors"), json.loads((folder / f"{case} {rank}.json").read_text()))
            for rank in range(RANKS)
        ]
        for case in CASES
    }


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_learn_what_one_process_learns(case, found):
    """Weights and memory after two tasks; measured: 0.0 in fp64. Old outputs stay, and the new task moved something."""
    expected, alone = learn(case, None)
    for tensors, seen in found[case]:
        assert 2 * seen["held"] == alone["held"]  # it was sharded
        assert seen["moved"] == alone["moved"] != []
        assert tensors.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(tensors[key].isfinite(), value.isfinite())
            assert (tensors[key].double() - value.double()).abs().max() <= 1e-12 * value.double().abs().max(), key
        assert [m["holds"] for m in seen["guarantee"]] == [m["holds"] for m in alone["guarantee"]]
        probes = seen["guarantee"][-1]
        assert probes["value"] <= probes["bound"] == 1e-13
    assert all(torch.equal(value, found[case][1][0][key]) for key, value in found[case][0][0].items())


@pytest.mark.parametrize("case", CASES)
def test_every_rank_measures_the_same(case, found):
    """The figures are those of the whole weights: the same on all ranks and, but for rounding, in one process."""
    first, second = (seen["guarantee"] for _, seen in found[case])
    assert first == second
    for measured, expected in zip(first, learn(case, None)[1]["guarantee"], strict=True):
        assert measured["name"] == expected["name"] and measured["holds"] == expected["holds"]
        assert measured["value"] == pytest.approx(expected["value"], rel=1e-6, abs=1e-9)
        assert measured["bound"] == (expected["bound"] and pytest.approx(expected["bound"], rel=1e-6))

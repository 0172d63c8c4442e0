"""LoRAs tuned from the base, merged outside of what was merged (OPCM)."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import perpetune as pt
from perpetune.consolidation import ProjectedMerge
from perpetune.consolidation.low_rank import LowRank, filtered
from perpetune.consolidation.projected_merge import changes
from perpetune.core.errors import ConfigError

TRAINING = {"max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 5e-3}


def low_rank(m: int, n: int, rank: int) -> tuple[LowRank, Tensor]:
    B, A = torch.randn(m, rank, dtype=torch.float64), torch.randn(rank, n, dtype=torch.float64)
    return LowRank.product(B, A), B @ A


def dense(x: LowRank) -> Tensor:
    return x.U @ x.C @ x.V.T


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_filter_clears_the_leading_block_and_the_diagonal():
    (merged, M), (D, task) = low_rank(9, 7, 4), low_rank(9, 7, 3)
    found, p = filtered(D, merged, 0.85)
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    shares = (S.cumsum(0) / S.sum())[:4]
    assert p == int((shares <= 0.85).sum()) > 1
    expected = task.clone()
    for i in range(4):
        for j in range(4):
            if i == j or (i < p and j < p):
                expected -= (U[:, i] @ task @ Vh[j]) * torch.outer(U[:, i], Vh[j])
    close(dense(found), expected)
    block = U[:, :p].T @ dense(found) @ Vh[:p].T
    assert block.abs().max() < 1e-12
    assert filtered(D, merged, 0)[1] == 0


def test_three_tasks_are_merged_as_the_released_code_does():
    """Its dense form, on updates of full rank, where no basis is arbitrary; two weights that share lambda."""
    opened, shapes = ProjectedMerge(0.5), {"a": (5, 5), "b": (6, 6)}
    tasks = [{name: low_rank(*shape, shape[0]) for name, shape in shapes.items()} for _ in range(3)]
    merged: dict[str, Tensor] = {}
    norms, scale = [], 1.0
    for task in tasks:
        opened._add({name: D for name, (D, _) in task.items()})
        norms.append(torch.cat([T.flatten() for _, T in task.values()]).norm())
        raw = {}
        for name, (_, T) in task.items():
            if name not in merged:
                raw[name] = T
                continue
            U, S, Vh = torch.linalg.svd(merged[name])
            split = int((S.cumsum(0) / S.sum() > 0.5).float().argmax())
            projected = U.T @ T @ Vh.T
            projected.diagonal().zero_()
            projected[:split, :split] = 0
            raw[name] = scale * merged[name] + U @ projected @ Vh
        scale = float(torch.cat([w.flatten() for w in raw.values()]).norm() / torch.stack(norms).mean())
        merged = {name: w / scale for name, w in raw.items()}
        for name in shapes:
            close(dense(opened._update[name]), merged[name])
        assert opened._scale == pytest.approx(scale, rel=1e-12)
        assert all(m.holds is not False for m in opened.guarantee())


def test_ranks_add_up_and_never_pass_those_of_the_weight():
    opened = ProjectedMerge()
    ranks = []
    for _ in range(5):
        opened._add({"w": low_rank(6, 8, 2)[0]})
        ranks.append(opened._update["w"].U.shape[1])
    assert ranks == [2, 4, 6, 6, 6]


def test_a_task_that_changes_nothing_is_merged():
    opened = ProjectedMerge()
    nothing = LowRank.product(torch.zeros(4, 2, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64))
    opened._add({"w": nothing})
    opened._add({"w": low_rank(4, 5, 2)[0]})
    assert opened._update["w"].dense().isfinite().all() and opened._update["w"].U.shape[1] == 2


def test_changes_are_those_that_peft_adds_in_either_layout():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.transposed = nn.Linear(6, 4), Conv1D(4, 4)  # square: its shape does not tell

        def forward(self, x):
            return self.transposed(self.linear(x))

    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["linear", "transposed"], init_lora_weights=False)
    model = peft.get_peft_model(Two(), config)
    before = {name: w.detach().clone() for name, w in Two.named_parameters(model.get_base_model())}
    found = changes(model)
    merged = dict(model.merge_and_unload().named_parameters())
    assert found.keys() == {"linear.weight", "transposed.weight"}
    for name, change in found.items():
        old = before[name.replace(".weight", ".base_layer.weight")]
        torch.testing.assert_close(old + change.dense(), merged[name].detach())


@pytest.fixture(scope="module")
def run(model, stream, tmp_path_factory):
    learner = pt.Learner(model, "opcm", tmp_path_factory.mktemp("opcm") / "run", training=TRAINING, max_length=16)
    return learner, learner.learn(stream)


def weights(learner: pt.Learner) -> dict[str, Tensor]:
    return {name: w.detach().clone() for name, w in learner.backbone.model.named_parameters()}


def test_every_task_is_tuned_from_the_base_and_its_adapter_is_in_its_commit(run, model, stream):
    _, result = run
    alone = pt.Learner(model, "opcm", training=TRAINING, max_length=16).learn(stream.select([stream.tasks[1].name]))
    ours, theirs = (c.tensors("adapter_model.safetensors") for c in (result.commits[2], alone.commits[1]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(g["holds"] is not False for g in result.guarantees if g["source"] == "ProjectedMerge")


def test_a_task_taken_out_or_left_out_has_never_been(run, model, stream, tmp_path):
    learner, _ = run
    out = stream.tasks[0].name
    rest = stream.select([task.name for task in stream if task.name != out])
    never = pt.Learner(model, "opcm", training=TRAINING, max_length=16)
    never.learn(rest)
    expected = weights(never)
    learner.export(tmp_path / "without", without=[out], head=False)
    from transformers import AutoModel

    left_out = dict(AutoModel.from_pretrained(tmp_path / "without").named_parameters())
    assert all(torch.equal(left_out[name], w) for name, w in expected.items() if name in left_out)
    with pytest.raises(ConfigError, match="no scales"):
        learner.export(tmp_path / "scaled", scales={out: 0.5})
    learner.revert(rest, out)
    found = weights(learner)
    assert all(torch.equal(found[name], w) for name, w in expected.items())


def test_other_tuners_and_shares_are_refused(model, stream):
    with pytest.raises(ConfigError, match="plain LoRA"):
        pt.Learner(model, pt.Recipe(pt.AllWeights(), [], ProjectedMerge()), training=TRAINING).learn(stream)
    for kept in (-0.1, 1.0):
        with pytest.raises(ConfigError, match="kept"):
            ProjectedMerge(kept)

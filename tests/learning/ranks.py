"""`torchrun --nproc-per-node 2 -m tests.learning.ranks FOUND COMMANDS.json`: commands of perpetune, one after another,
in processes that are started once; writes the exit code of each, what the process said, and how many examples it read
without gradients. A command that begins with `dies TASK STEP` ends in the middle of a task."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from safetensors.torch import save_file


class Died(BaseException):
    pass


@contextlib.contextmanager
def dying(task: str, step: int) -> Iterator[None]:
    from transformers import TrainerCallback

    from perpetune.learning import session

    class Dies(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                raise Died

    train = session.train_task

    def to_its_end(*args: Any, **kwargs: Any) -> Any:
        if kwargs["task"] == task:
            kwargs["callbacks"] = [*kwargs["callbacks"], Dies()]
        return train(*args, **kwargs)

    with mock.patch.object(session, "train_task", to_its_end), contextlib.suppress(Died):
        yield


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """How many examples each forward pass of features has, where these are divided."""
    from perpetune.core import processes
    from perpetune.models.backbone import Backbone

    read, found = Backbone.read, []

    def counting(self: Any, examples: Any) -> Any:
        found.append(len(examples) if processes._dividing.get() else 0)
        return read(self, examples)

    with mock.patch.object(Backbone, "read", counting):
        yield found


def sharded_steps(model: str, stream_folder: str, shards: bool) -> dict[str, Any]:
    """The steps of the learner's loop for one task of `nlora`, on a model that FSDP2 shards after the tuner is attached
    and before the rules begin: what was trained, whole, and the largest of what the rule promises or measures."""
    import torch
    from torch import distributed
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard
    from transformers.trainer_utils import set_seed

    from perpetune import Learner, load_stream
    from perpetune.learning.session import Training
    from perpetune.learning.state import LearnerState
    from perpetune.learning.trainer import TaskModel
    from perpetune.rules import TaskContext, attach

    stream, setup = load_stream(stream_folder, tasks=["films"]), Learner(model, "nlora", "unused", device="cpu").setup
    state = LearnerState(setup, setup.load_backbone("text"), stream.labels, stream.inputs)
    (session,) = state.consolidation.schedule(stream)
    set_seed(0)
    state.consolidation.begin_task(session)
    training = Training(state, session)
    training.open_heads()
    whole = TaskModel(state.backbone, state.training_head)
    names = [name for name, p in whole.named_parameters() if p.requires_grad]
    rank, of = (distributed.get_rank(), distributed.get_world_size()) if shards else (0, 1)
    if shards:
        for layer in state.backbone.model.base_model.model.encoder.layer:
            fully_shard(layer)
        fully_shard(whole)
    optimizer = torch.optim.SGD([p for p in whole.parameters() if p.requires_grad], lr=0.5)
    attached = attach(whole, optimizer, state.recipe.rules, batches=training.batches, losses=training.losses)
    for start in range(0, 40, 8):
        mine = training.examples[start : start + 8][rank::of]
        optimizer.zero_grad()
        whole(**state.backbone.collate(mine))["loss"].backward()
        optimizer.step()
    attached.remove()
    measured = [m.value for rule in state.recipe.rules for m in rule.guarantee()]
    for rule in state.recipe.rules:
        rule.end_task(TaskContext(state.backbone, 0, training.batches, training.losses))
    held = get_model_state_dict(whole, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {"tensors": {name: held[name] for name in names if name in held}, "measured": measured}


def engine_of_fsdp() -> str:
    """What Accelerate makes of a plugin for FSDP2 here."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    made = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
    return str(made.distributed_type.value)


def main(found: Path, commands: list[list[str]]) -> None:
    from perpetune.cli import main as perpetune

    told = []
    for command in commands:
        out, err = io.StringIO(), io.StringIO()
        code: object = 0
        dies = contextlib.nullcontext()
        if command[0] == "dies":
            dies, command = dying(command[1], int(command[2])), command[3:]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), counted() as read, dies:
            try:
                perpetune(command)
            except SystemExit as end:
                code = end.code
        told.append({"code": code, "out": out.getvalue(), "err": err.getvalue(), "read": sum(read)})
    model, stream = (told_of[told_of.index(name) + 1] for told_of in commands[:1] for name in ("--model", "--stream"))
    sharded = sharded_steps(model, stream, shards=True)
    if os.environ.get("RANK", "0") == "0":
        save_file(
            {key: value.contiguous() for key, value in sharded["tensors"].items()}, f"{found}.sharded.safetensors"
        )
    told[-1]["measured"] = sharded["measured"]
    told[-1]["engine"] = engine_of_fsdp()  # which leaves its mark in the environment
    found.with_name(f"{found.name}.{os.environ.get('RANK', 0)}").write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))

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
    """How many examples each forward pass of features has."""
    from perpetune.models.backbone import Backbone

    read, found = Backbone.read, []

    def counting(self: Any, examples: Any) -> Any:
        found.append(len(examples))
        return read(self, examples)

    with mock.patch.object(Backbone, "read", counting):
        yield found


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
    told[-1]["engine"] = engine_of_fsdp()
    found.with_name(f"{found.name}.{os.environ.get('RANK', 0)}").write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))

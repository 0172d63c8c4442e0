"""Checkpoints inside a task, in safetensors and JSON: what training goes on from to the bits of an undisturbed one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers.trainer_utils import rotate_checkpoints

from ..consolidation import Session
from ..core.errors import ConfigError, RunError
from ..core.files import file_digest, plain, sync, write_file, write_text, writing
from ..core.processes import by_first, first, from_first, launched
from ..core.progress import Progress
from ..rules import Rule
from ..runs.config_check import SAVING
from ..runs.directory import UNFINISHED, Run
from ..streams import fingerprint
from .packing import packed, unpacked

MANIFEST, TENSORS, TRAINER = "checkpoint.json", "tensors.safetensors", "trainer_state.json"
KEPT = 1  # checkpoints of a task, where the user does not say


def saving(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Training settings on checkpoints, complete: `save_steps` alone is enough.

    Raises:
        ConfigError: a value that has no meaning here.
    """
    given = {name: settings[name] for name in SAVING if settings.get(name) is not None}
    given.setdefault("save_strategy", "steps" if "save_steps" in given else "no")
    if given["save_strategy"] not in ("no", "steps", "epoch"):
        raise ConfigError(f"save_strategy must be no, steps or epoch, not {given['save_strategy']!r}")
    for name in ("save_steps", "save_total_limit"):
        value = given.get(name, 1)
        share = name == "save_steps" and isinstance(value, float) and 0 < value < 1
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 1 and not share:
            raise ConfigError(f"`{name}` must be a number above 0, not {value!r}")
    return given


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk, whole.

    Attributes:
        step: optimizer steps made; values: everything but tensors, by part.
    """

    path: Path
    task: str
    key: str
    step: int
    values: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """
        Raises:
            RunError: it is not as it was written.
        """
        try:
            found = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            if any(file_digest(path / file) != digest for file, digest in found["files"].items()):
                raise RunError(f"{path} has changed since it was written")
            return cls(path, found["task"], found["key"], found["step"], found["values"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} is no whole checkpoint") from error

    def part(self, name: str) -> Any:
        """What `Checkpoints.save` was given under this name."""
        with safe_open(self.path / TENSORS, "pt") as file:
            return unpacked(self.values[name], file.get_tensor)


class Checkpoints:
    """Those of one task.

    Args:
        run: into whose directory they go; key: stands for all that decides the training's bits.
    """

    def __init__(self, run: Run, task: str, key: str, rules: Sequence[Rule]) -> None:
        self.folder = run.path / UNFINISHED / f"{task}-{key[:8]}"
        self.task, self.key, self.rules = task, key, rules
        self.found: Checkpoint | None = None  # what training goes on from

    def look(self, learned: Sequence[str], progress: Progress) -> None:
        """Find the newest whole checkpoint, on every process, and give the rules what they held. A collective call.

        Args:
            learned: tasks that are committed, of which nothing is left to go on from.
        """
        path = from_first(self._newest(learned, progress) if first() else None)
        if path is None:
            return
        self.found = Checkpoint.read(path)
        progress.say(f"task `{self.task}` goes on after step {self.found.step}, its last checkpoint")
        for rule, state in zip(self.rules, self.found.part("rules"), strict=True):
            rule.load_state(state)

    def _newest(self, learned: Sequence[str], progress: Progress) -> Path | None:
        found: list[Checkpoint] = []
        for path in sorted(self.folder.parent.glob("*/checkpoint-*")):
            try:
                one = Checkpoint.read(path)
            except RunError as error:
                progress.say(f"{error}: it is not used")
                continue
            if one.task in learned:  # its commit was written, and what it began with not removed yet
                shutil.rmtree(path.parent, ignore_errors=True)
            elif one.task == self.task:
                found.append(one)
        mine = [one for one in found if one.key == self.key]
        for one in found if not mine else ():
            progress.say(
                f"task `{self.task}`: the checkpoint at step {one.step} in {one.path} was made with other settings, "
                "data or processes, and is not used; it goes once the task is learned"
            )
        return max(mine, key=lambda one: one.step).path if mine else None

    def save(self, step: int, parts: Mapping[str, Any], trainer_state: Any, keep: int) -> None:
        """Write a checkpoint aside, sync it, and rename it into place; the oldest go. A collective call.

        Raises:
            TrainingError: something in it is neither a tensor nor JSON; the disk is full.
        """
        tensors: dict[str, Tensor] = {}
        values = {name: packed(value, name, tensors) for name, value in parts.items()}
        by_first(lambda: self._write(step, values, tensors, trainer_state, keep))

    def _write(self, step: int, values: dict[str, Any], tensors: dict[str, Tensor], state: Any, keep: int) -> None:
        final = self.folder / f"checkpoint-{step}"
        aside = self.folder / f".{final.name}"
        with writing(final):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            try:
                write_file(aside / TENSORS, tensors)
                state.save_to_json(str(aside / TRAINER))
                sync(aside / TRAINER)
                files = {file: file_digest(aside / file) for file in (TENSORS, TRAINER)}
                facts = {"task": self.task, "key": self.key, "step": step, "values": values, "files": files}
                write_text(aside / MANIFEST, json.dumps(facts))
                shutil.rmtree(final, ignore_errors=True)  # it had changed since it was written
                os.rename(aside, final)
                sync(self.folder)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise
        rotate_checkpoints(str(self.folder), keep)

    @property
    def size(self) -> int:
        """Bytes of the newest on disk; 0 while there is none."""
        found = [sum(f.stat().st_size for f in p.iterdir()) for p in self.folder.glob("checkpoint-*")]
        return max(found, default=0)


def key_of(run: Run, session: Session, settings: Mapping[str, Any], steps: int, told: frozenset[str]) -> str:
    """A hash of all that decides the bits of a session's training: what was learned before, its data, its settings.

    Args:
        told: settings that decide nothing.
    """
    decided = {
        **{name: run.config.get(name) for name in ("model", "recipe", "seed", "trainer")},
        "before": run.commits[-1].digest,
        "tasks": [[task.name, fingerprint(task)] for task in session.tasks],
        "training": {name: value for name, value in settings.items() if name not in told | {*SAVING}},
        "steps": steps,
        "processes": launched(),
    }
    return hashlib.sha256(json.dumps(plain(decided), sort_keys=True, default=str).encode()).hexdigest()

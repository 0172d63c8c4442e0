"""Adapters that plain peft loads onto the base model by name, and that vLLM serves as LoRA modules."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..core.errors import ConfigError
from ..core.files import write_file, write_text
from ..heads.readout import Readout
from ..models.backbone import Backbone
from ..models.gguf import located
from ..runs.commit import Commit, active
from ..runs.directory import Run, write_folder
from .export import Choice, fresh, plain
from .export_head import base_of, chosen_head, linear_head, write_beside
from .lora_factors import Change, adapter_files, found_factors, joined, stored_factors
from .model_card import CARD, about_adapters, model_card, note_of
from .routes import ROUTER, ROUTES, Served, routed, routes
from .setup import Setup
from .state import LearnerState

WHOLE = "all"  # the adapter of the model after all tasks


@dataclass(frozen=True)
class Wanted:
    """An adapter that is to be written: what it answers for, and of which commits its change is made, with factors."""

    served: Served
    parts: tuple[tuple[Commit, float], ...]


def export_adapters(setup: Setup, state: LearnerState, folder: Path, choice: Choice) -> tuple[Path, str]:
    """See `Learner.export`, with `format="adapters"`; also what was written, in words.

    Raises:
        ConfigError: a recipe without adapters, a change that is no LoRA of small rank, or an unknown choice.
    """
    commits = active(Run.read(setup.path).commits)
    if choice.cumulative and state.consolidation.adapters == "each":
        raise ConfigError(
            "every task has an adapter of its own, so there is none that accumulates: leave out cumulative"
        )
    wanted = _wanted(state, commits, choice)
    (base, source, file), task_type = _base(setup), _task_type(state.backbone)
    model, found = base_of(state.backbone), []
    for each in wanted:
        change = _cast(_change(setup, state, commits, each), choice.dtype)
        served = replace(each.served, rank=max(factors.rank for factors in change.values()))
        found.append((served, adapter_files(change, source, task_type, model)))
    told, tensors = routes(state, [served for served, _ in found], base)
    headed = [served for served, _ in found if choice.everything or served.index >= 0]
    heads = {served.name: _head(state, served, choice.head) for served in headed}

    summed = state.consolidation.adapters == "sum" and not choice.everything
    note = note_of(choice.of(list(state.known.tasks))) if summed else ""

    def write(aside: Path) -> None:
        for served, files in found:
            (aside / served.name).mkdir()
            for name, content in files.items():
                write_file(aside / served.name / name, content)
            if (readout := heads.get(served.name)) is not None:
                write_beside(aside / served.name, readout, served.labels, state.backbone)
        write_text(aside / ROUTES, json.dumps(told, indent=1, ensure_ascii=False))
        if tensors:
            write_file(aside / ROUTER, tensors)
        about = about_adapters(state.backbone, (source, file), told, heads, choice.command, note)
        write_text(aside / CARD, model_card(setup, state, about))

    earlier = _names(folder)
    write_folder(folder, write)
    for name in earlier - {served.name for served, _ in found}:
        shutil.rmtree(folder / name, ignore_errors=True)
    if not tensors:
        (folder / ROUTER).unlink(missing_ok=True)
    names = [f"{served.name} (rank {served.rank})" for served, _ in found]
    router = f"; {routed(told['router'])}" if told["router"] else ""
    return folder, f"LoRA of {', '.join(names)} for {base}{router}"


def _wanted(state: LearnerState, commits: Sequence[Commit], choice: Choice) -> list[Wanted]:
    consolidation, learned = state.consolidation, list(state.known.tasks)
    chosen = choice.of(learned)
    if consolidation.adapters == "each":
        if choice.scales:
            raise ConfigError("every task has an adapter of its own, which a scale would spoil: leave out the scale")
        states: Any = consolidation.states
        of: dict[int, list[str]] = {}
        for index, task in enumerate(learned):
            of.setdefault(consolidation.reads(index, len(learned) - 1), []).append(task)
        names = _unique([learned[index] for index in of])
        return [
            Wanted(
                Served(name, tuple(tasks), tuple(state.known.labels[c] for c in states.task_classes(index)), index, 0),
                ((commits[index], 1.0),),
            )
            for name, (index, tasks) in zip(names, of.items(), strict=True)
            if set(tasks) & chosen.keys()
        ]
    if consolidation.adapters is None:
        kind = type(consolidation).__name__
        raise ConfigError(f"{kind} leaves no adapters that could be served: use --format merged")
    if consolidation.adapters == "newest":
        if not choice.everything:
            raise ConfigError("one adapter was trained on all tasks, so none can be chosen, left out or scaled")
        steps: list[tuple[list[str], tuple[tuple[Commit, float], ...]]]
        steps = [(list(commit.manifest["learned"]), ((commit, 1.0),)) for commit in commits]
    else:
        by_task = {commit.manifest["task"]: commit for commit in commits}
        parts = [(by_task[task], factor) for task, factor in chosen.items()]
        steps = [(list(chosen)[: n + 1], tuple(parts[: n + 1])) for n in range(len(parts))]
    names = [*(f"after-{name}" for name in _unique([tasks[-1] for tasks, _ in steps[:-1]])), WHOLE]
    found = [
        Wanted(Served(name, tuple(t for t in tasks if t in learned), _labels(state, parts[-1][0]), -1, 0), parts)
        for name, (tasks, parts) in zip(names, steps, strict=True)
    ]
    return found if choice.cumulative else found[-1:]


def _labels(state: LearnerState, commit: Commit) -> tuple[str, ...]:
    """The label texts that were known after a commit, and are still."""
    return tuple(state.known.labels[c] for c in sorted({*commit.manifest["classes"]} & {*state.known.classes}))


def _unique(tasks: Sequence[str]) -> list[str]:
    """Names of adapters after tasks: what peft takes for a name (no dots), each once."""
    names = [re.sub(r"[^\w-]+", "_", task) for task in tasks]
    return [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]


def _change(setup: Setup, state: LearnerState, commits: Sequence[Commit], wanted: Wanted) -> Change:
    """
    Raises:
        ConfigError: what the tasks left is no LoRA of small rank.
    """
    stored = [(stored_factors(commit), factor) for commit, factor in wanted.parts]
    changes = [(change, factor) for change, factor in stored if not isinstance(change, str)]
    if len(changes) == len(stored):
        return joined(changes)
    why = next(change for change, _ in stored if isinstance(change, str))
    backbone, consolidation = fresh(setup, state)
    last = wanted.parts[-1][0]
    until = [c for c in commits if c.manifest["index"] <= last.manifest["index"]]
    summed = consolidation.adapters == "sum"
    if consolidation.adapters == "each" or (summed and [(c, 1.0) for c in until] != list(wanted.parts)):
        by_task = {commit.manifest["task"]: commit for commit in commits}
        consolidation.compose(by_task, {commit.manifest["task"]: factor for commit, factor in wanted.parts})
    else:
        consolidation.restore(until)
    found = found_factors(plain(backbone.model, last.path), fresh(setup, state)[0].model)
    if isinstance(found, str):
        raise ConfigError(
            f"what `{last.manifest['task']}` left {why} and {found}, which no LoRA of small rank does: use "
            f"--format merged{' --only TASK' if consolidation.adapters == 'each' else ''}"
        )
    if not found:
        raise ConfigError(f"what `{last.manifest['task']}` left changes nothing: there is no adapter to write")
    return found


def _head(state: LearnerState, served: Served, name: bool | str) -> Readout | None:
    """The head of an adapter of one task, or of the whole, as a linear map; None where it is none."""
    if not name or (served.index < 0 and served.name != WHOLE):
        return None
    labels = list(state.known.labels)
    task = served.index if served.index >= 0 else None
    return linear_head(state, chosen_head(state, name), [labels.index(label) for label in served.labels], task)


def _cast(change: Change, dtype: str) -> Change:
    if dtype == "float32":  # as they were trained
        return change
    to = getattr(torch, dtype)
    return {name: replace(f, A=f.A.to(to), B=f.B.to(to)) for name, f in change.items()}


def _base(setup: Setup) -> tuple[str | None, str | None, str | None]:
    """Where the base model is, what `from_pretrained` takes of it, and the GGUF file there. A path is absolute, to be
    found from elsewhere; None for a model in memory, and where there is no such file."""
    name: Any = setup.model
    if not isinstance(name, str):
        return None, None, None
    base = os.path.abspath(name) if Path(name).exists() else name  # a link of the Hub's cache stays one
    return base, *located(base, setup.loading)


def _task_type(backbone: Backbone) -> str | None:
    if backbone.modality != "language":
        return None
    encoder: bool = getattr(base_of(backbone).config, "is_encoder_decoder", False)
    return "SEQ_2_SEQ_LM" if encoder else "CAUSAL_LM"


def _names(folder: Path) -> set[str]:
    """The folders of the adapters of an earlier export here."""
    try:
        told = json.loads((folder / ROUTES).read_text(encoding="utf-8"))
        return {each["folder"] for each in told["adapters"] if re.fullmatch(r"[\w-]+", each["folder"])}
    except (OSError, ValueError, KeyError, TypeError):
        return set()

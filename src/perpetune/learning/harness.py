"""General ability of a language model on tasks of lm-evaluation-harness, before the first task and after each.

The figures are the harness's own (`lm_eval.simple_evaluate`): of the model as it is, adapters on, without a chat
template, with the number of examples in the context that each of its tasks has.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from ..core.errors import ConfigError
from ..core.measurement import Measurement
from ..core.meeting import patient
from ..core.processes import by_first, from_first
from .resumable import random_state, set_random_state
from .training_settings import one_line

if TYPE_CHECKING:
    from ..models.language_model import LanguageBackbone
    from ..runs.commit import Commit

SOURCE = "lm-eval"
YAML = (".yaml", ".yml")


class Figure(NamedTuple):
    """One metric of one task of the harness; `error` its standard error, `examples` over so many."""

    name: str
    value: float
    error: float | None
    examples: int


def parsed(given: str) -> tuple[str, int | None]:
    """A task of the harness and how many of its examples are taken: `arc_easy:100`, or `arc_easy` for all.

    Raises:
        ConfigError: it is written in another way.
    """
    name, colon, count = given.rpartition(":")
    if not colon or not count.isdigit():
        name, count = given, ""
    if not name or (count and not int(count)):
        raise ConfigError(f"lm_eval: `{given}` names no task: write arc_easy, or arc_easy:100 for 100 examples")
    return name, int(count) if count else None


@dataclass
class Harness:
    """Tasks of the harness, and what the untouched model reached.

    Attributes:
        tasks: as they were given, see `parsed`: names of tasks, groups and tags, or YAML files.
        untouched: figures before the first task, by name.
    """

    tasks: tuple[str, ...]
    known: Any  # its TaskManager, which takes long to make
    untouched: dict[str, float]

    @classmethod
    def of(cls, tasks: Sequence[str], backbone: LanguageBackbone, batch_size: int, begun: Sequence[Commit]) -> Harness:
        """Read by the untouched model, unless a run wrote down what that reached.

        Args:
            begun: the commits of the run.

        Raises:
            ConfigError: the harness is not installed, knows no such task, or cannot have its data.
        """
        if find_spec("lm_eval") is None:
            raise ConfigError("lm_eval needs lm-evaluation-harness: pip install 'perpetune[lm-eval]'")
        names = [parsed(each)[0] for each in tasks]
        with one_line("lm_eval"), _quiet():
            from lm_eval.tasks import TaskManager

            known = TaskManager(include_defaults=any(not name.endswith(YAML) for name in names))
        written = begun[0].manifest.get("lm_eval") if begun else None
        found = cls(tuple(tasks), known, {})
        if written is not None and written["tasks"] == list(tasks):
            found.untouched = written["figures"]
        else:
            found.untouched = {each.name: each.value for each in found.figures(backbone, batch_size)}
        return found

    def facts(self) -> dict[str, Any]:
        """What the first commit of a run holds of them."""
        return {"tasks": list(self.tasks), "figures": self.untouched}

    def measure(self, backbone: LanguageBackbone, batch_size: int) -> list[Measurement]:
        """The model as it is now, and in the notes the untouched one."""
        found = []
        for each in self.figures(backbone, batch_size):
            before = self.untouched.get(each.name)
            notes = [] if before is None else [f"{before:.4g} before the first task"]
            notes += [] if each.error is None else [f"standard error {each.error:.2g}"]
            note = "; ".join([*notes, f"{each.examples} examples"])
            found.append(Measurement(each.name, each.value, None, "", SOURCE, note))
        return found

    def figures(self, backbone: LanguageBackbone, batch_size: int) -> list[Figure]:
        """What the model reaches now. A collective call: one process evaluates, for all of them."""
        found: list[Figure] = []

        def evaluate() -> None:
            with one_line("lm_eval"):
                found.extend(self._figures(backbone, batch_size))

        with patient():
            by_first(evaluate)
        return from_first(found)

    def _figures(self, backbone: LanguageBackbone, batch_size: int) -> list[Figure]:
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        tokenizer = copy.deepcopy(getattr(backbone.processor, "tokenizer", backbone.processor))  # it is changed
        found: list[Figure] = []
        drawn = random_state()
        try:
            with backbone.asked(), _quiet():
                model = HFLM(pretrained=backbone.model, tokenizer=tokenizer, batch_size=batch_size)
                for name, limit in map(parsed, self.tasks):
                    said = lm_eval.simple_evaluate(
                        model, tasks=[name], task_manager=self.known, limit=limit, log_samples=False
                    )
                    found += figures_of(said)
        finally:
            set_random_state(drawn)
        return found


def figures_of(said: dict[str, Any]) -> list[Figure]:
    """The figures of what `simple_evaluate` returns: of groups, and of tasks that are in none."""
    members = {name for names in said.get("group_subtasks", {}).values() for name in names}
    found = []
    for task, row in {**said["results"], **(said.get("groups") or {})}.items():
        for key, value in row.items() if task not in members else ():
            metric, comma, filtered = key.partition(",")  # "acc,none", "exact_match,strict-match"
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = row.get(f"{metric}_stderr,{filtered}")
            name = f"{task}, {metric}" + ("" if filtered == "none" else f" ({filtered})")
            count = said["n-samples"].get(task, {}).get("effective") or row.get("sample_len", 0)
            found.append(Figure(name, float(value), error if isinstance(error, float) else None, int(count)))
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's bars and log: perpetune has a display of its own."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)

"""A recipe: four slots. To and from plain data, so that it can stand in a YAML file."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

from ..consolidation import CONSOLIDATIONS, Consolidation, Continue
from ..core.errors import ConfigError, first_line, nearest
from ..core.plugins import with_installed
from ..core.validation import as_written, call_checked, number
from ..deltas.combination import Combination
from ..deltas.keep import Keep
from ..heads import Head, LinearHead, make_head
from ..routers import Router
from ..rules import RULES, Rule
from ..tuners import OWN_CONFIGS, TUNERS, NoNetwork, PeftTuner, Tuner, as_tuner
from ..tuners.peft_tuner import peft_dict
from .user_pieces import RESERVED, below, check_fields, check_head, imported, named

INNER = {"router": Router, "keep": Keep, "combine": Combination}  # settings of a piece that are pieces themselves


class Recipe:
    """Where the change lives, how steps are shaped, what a finished task leaves behind, how a prediction is read off.

    Every slot takes a piece of your own, too (docs/how-to/own-rule.md). A run that was made with one is opened again
    where its module is imported already, or with the recipe itself: `Learner.open(run, recipe=recipe)`.

    Args:
        tuner: a `peft.PeftConfig` or one of `perpetune.tuners`.
        rules: in the order in which they act on a step.
        consolidation: default `Continue()`.
        head: one head or several. The first shapes the features in training; the others read along: they see the same
            features and never influence them.
        training: default training arguments of this recipe, names of `transformers.TrainingArguments`, and
            `head_learning_rate`; a run's own settings win.
        name: for tables and run directories.

    Raises:
        ConfigError: pieces that do not fit together, or one that could not be made again from its settings.
    """

    def __init__(
        self,
        tuner: Any,
        rules: Sequence[Rule] = (),
        consolidation: Consolidation | None = None,
        head: Head | Sequence[Head] | None = None,
        *,
        training: dict[str, Any] | None = None,
        name: str = "custom",
    ) -> None:
        self.tuner: Tuner = as_tuner(tuner)
        self.rules = tuple(rules)
        self.consolidation = consolidation if consolidation is not None else Continue()
        heads = (head,) if isinstance(head, Head) else tuple(head or (LinearHead(),))
        self.heads: tuple[Head, ...] = heads
        # as the learner reads them, so that one value, `2e-3` or 0.002, is one recipe
        self.training = {key: number(value) for key, value in (training or {}).items()}
        self.name = name
        for piece in (*self.rules, self.consolidation, getattr(self.tuner, "config", self.tuner)):
            check_fields(piece)
        for head in heads:
            check_head(head)
        if self.rules and not self.tuner.trains:
            names = ", ".join(type(r).__name__ for r in self.rules)
            raise ConfigError(
                f"{names} shape optimizer steps, but {type(self.tuner).__name__} trains nothing: remove one"
            )
        for rule in self.rules:
            if rule.needs_branch not in (None, self.consolidation.branch):
                way = {"kept": "trains one tuner all the way", "fresh": "starts every task with a new tuner"}
                name, given = type(rule).__name__, self.consolidation.branch
                raise ConfigError(
                    f"{name} with branch `{rule.needs_branch}` does not fit {type(self.consolidation).__name__}, which "
                    f"{way[given]}: set branch to `{given}`, or use another consolidation"
                )
        anew = [h.name for h in heads if h.refresh or h.carries]
        if anew and self.consolidation.states is not None:
            name = anew[0].removesuffix("_refresh").removesuffix("_carried")
            raise ConfigError(f"features under a task's own adapter do not grow stale: read `{name}`, not `{anew[0]}`")
        titles = [h.name for h in heads]
        if len(set(titles)) < len(titles):
            raise ConfigError(f"a recipe reads each head once, not {', '.join(titles)}")
        late = [h.name for h in heads[1:] if isinstance(h, LinearHead)]
        if late:
            raise ConfigError(f"head `{late[0]}` is trained only where it stands first: put it first, or run it alone")
        if isinstance(self.tuner, NoNetwork) and isinstance(heads[0], LinearHead):
            raise ConfigError("NoNetwork gives features to heads that gather statistics: use ridge or ncm")

    def with_heads(self, heads: Sequence[Head]) -> Recipe:
        return Recipe(self.tuner, self.rules, self.consolidation, tuple(heads), training=self.training, name=self.name)

    def to_dict(self) -> dict[str, Any]:
        """Plain data from which `Recipe.from_dict` makes the same recipe."""
        tuner = (
            {**named(self.tuner.config), **_changed(self.tuner.config)}
            if isinstance(self.tuner, PeftTuner)
            else _fields(self.tuner)
        )
        return {
            "name": self.name,
            "tuner": tuner,
            "rules": [_fields(rule) for rule in self.rules],
            "consolidation": _fields(self.consolidation),
            "heads": [{**named(h), **h.config()} for h in self.heads],
            "training": self.training,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recipe:
        """
        Raises:
            ConfigError: an unknown slot, piece or setting, with the nearest known; or a piece of a user's own (one with
                a `module`) that is not imported.
        """
        known = ("name", "tuner", "rules", "consolidation", "heads", "head", "training")
        for key in data:
            if key not in known:
                raise ConfigError(f"a recipe has no slot `{key}`: {nearest(key, known)}")
        for slot, kind in (("rules", list), ("heads", list), ("training", dict), ("name", str)):
            if not isinstance(data.get(slot) or kind(), (kind, tuple) if kind is list else kind):
                told = {list: "a list", dict: "a mapping", str: "a text"}[kind]
                raise ConfigError(f"`{slot}` of a recipe is {told}, not {data[slot]!r}")
        if "tuner" not in data:
            raise ConfigError("a recipe needs a `tuner`, for instance {type: LoraConfig, r: 8}")
        by_class = {rule.__name__: rule for rule in RULES.values()}
        heads = data.get("heads") or ([data["head"]] if data.get("head") else [])
        return cls(
            _make_tuner(data["tuner"]),
            [_make(rule, {**RULES, **by_class}, Rule, "rule") for rule in data.get("rules") or ()],
            _make(data["consolidation"], CONSOLIDATIONS, Consolidation, "consolidation")
            if data.get("consolidation")
            else None,
            [_make(head, {}, Head, "head") if _own(head) else make_head(head) for head in heads],
            training=data.get("training"),
            name=data.get("name", "custom"),
        )


def _fields(piece: Any) -> dict[str, Any]:
    # a setting that came later is left out where it says what was so before: runs made then are the same
    old = {f.name: f.metadata["unwritten"] for f in dataclasses.fields(piece) if "unwritten" in f.metadata}
    values = {f.name: getattr(piece, f.name) for f in dataclasses.fields(piece) if f.init}
    values = {k: v for k, v in values.items() if k not in old or v != old[k]}
    inner = {k: _fields(v) if dataclasses.is_dataclass(v) else v for k, v in values.items()}  # a router, a hook
    return {**named(piece), **inner}


def _changed(config: Any) -> dict[str, Any]:
    """The settings of a peft configuration that differ from its defaults."""
    default, now = peft_dict(type(config)()), peft_dict(config)
    skip = ("inference_mode", "peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path")
    return {k: v for k, v in now.items() if v != default.get(k) and k not in skip}


def _make_tuner(data: Any) -> Any:
    kind, written = as_written("tuner", data)
    if kind in TUNERS and not _own(data):
        return _make(data, TUNERS, Tuner, "tuner")
    import peft

    from .. import tuners

    found = getattr(tuners if kind in OWN_CONFIGS else peft, kind, None)
    known = {kind: found} if inspect.isclass(found) and issubclass(found, peft.PeftConfig) else {}
    config = None if _own(data) else with_installed(known, kind, Tuner, peft.PeftConfig).get(kind)
    if config is None:
        config = imported(lambda: [*below(Tuner), *below(peft.PeftConfig)], kind, written.get("module"))
    if config is None:
        configs = [n for n in dir(peft) if n.endswith("Config")]
        raise ConfigError(f"no tuner is called `{kind}`: {nearest(kind, [*TUNERS, *OWN_CONFIGS, *configs])}")
    settings = _settings(written)
    names = {f.name for f in dataclasses.fields(config)}
    for key in settings:
        if key not in names:
            raise ConfigError(f"{kind} has no setting `{key}`: {nearest(key, names)}")
    try:
        return config(**settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"peft refuses the settings of {kind} ({first_line(error)}): mend them") from error


def _own(data: Any) -> bool:
    return isinstance(data, dict) and "module" in data


def _settings(data: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in data.items() if k not in RESERVED}


def _make(data: Any, known: dict[str, Any], base: type, slot: str) -> Any:
    """One piece from its plain data; types of settings are checked by pydantic."""
    kind, written = as_written(slot, data)
    own = _own(data)
    target = imported(lambda: below(base), kind, data["module"]) if own else with_installed(known, kind, base).get(kind)
    if target is None:
        raise ConfigError(f"no {slot} is called `{kind}`: {nearest(kind, known)}")
    settings = {k: _make(v, {}, INNER[k], k) if k in INNER and _own(v) else v for k, v in _settings(written).items()}
    accepted = list(inspect.signature(target).parameters)
    for key in settings:
        if key not in accepted:
            raise ConfigError(f"{kind} has no setting `{key}`: {nearest(key, accepted) if accepted else 'it has none'}")
    return call_checked(kind, target, settings)

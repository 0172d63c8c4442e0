"""A recipe: four slots. To and from plain data, so that it can stand in a YAML file."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

from .checked import call_checked
from .consolidation import CONSOLIDATIONS, Consolidation, Continue
from .errors import ConfigError, nearest
from .heads import Head, LinearHead, make_head
from .rules import RULES, Rule
from .tuners import OWN_CONFIGS, TUNERS, NoNetwork, PeftTuner, Tuner, as_tuner
from .tuners.base import peft_dict


class Recipe:
    """Where the change lives, how steps are shaped, what a finished task leaves behind, how a prediction is read off.

    Args:
        tuner: a `peft.PeftConfig` or one of `perpetune.tuners`.
        rules: in the order in which they act on a step.
        consolidation: default `Continue()`.
        head: one head or several. The first shapes the features in training; the others read along: they see the same
            features and never influence them.
        training: default training arguments of this recipe, names of `transformers.TrainingArguments`, and
            `head_learning_rate`; a run's own settings win.
        name: for tables and run directories.
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
        self.training = dict(training or {})
        self.name = name
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
        anew = [h.name for h in heads if h.refresh]
        if anew and self.consolidation.routed:
            name = anew[0].removesuffix("_refresh")
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
            {"type": type(self.tuner.config).__name__, **_changed(self.tuner.config)}
            if isinstance(self.tuner, PeftTuner)
            else _fields(self.tuner)
        )
        return {
            "name": self.name,
            "tuner": tuner,
            "rules": [_fields(rule) for rule in self.rules],
            "consolidation": _fields(self.consolidation),
            "heads": [{"type": type(h).__name__, **h.config()} for h in self.heads],
            "training": self.training,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recipe:
        """
        Raises:
            ConfigError: an unknown slot, piece or setting; names the nearest known.
        """
        known = ("name", "tuner", "rules", "consolidation", "heads", "head", "training")
        for key in data:
            if key not in known:
                raise ConfigError(f"a recipe has no slot `{key}`: {nearest(key, known)}")
        if "tuner" not in data:
            raise ConfigError("a recipe needs a `tuner`, for instance {type: LoraConfig, r: 8}")
        by_class = {rule.__name__: rule for rule in RULES.values()}
        heads = data.get("heads") or ([data["head"]] if data.get("head") else [])
        return cls(
            _make_tuner(data["tuner"]),
            [_make(rule, {**RULES, **by_class}, "rule") for rule in data.get("rules") or ()],
            _make(data["consolidation"], CONSOLIDATIONS, "consolidation") if data.get("consolidation") else None,
            [make_head(head) for head in heads],
            training=data.get("training"),
            name=data.get("name", "custom"),
        )


def _fields(piece: Any) -> dict[str, Any]:
    values = {f.name: getattr(piece, f.name) for f in dataclasses.fields(piece) if f.init}
    inner = {k: _fields(v) if dataclasses.is_dataclass(v) else v for k, v in values.items()}  # a router
    return {"type": type(piece).__name__, **inner}


def _changed(config: Any) -> dict[str, Any]:
    """The settings of a peft configuration that differ from its defaults."""
    default, now = peft_dict(type(config)()), peft_dict(config)
    skip = ("inference_mode", "peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path")
    return {k: v for k, v in now.items() if v != default.get(k) and k not in skip}


def _make_tuner(data: Any) -> Any:
    if isinstance(data, str):
        data = {"type": data}
    kind = _kind(data, "tuner")
    if kind in TUNERS:
        return _make(data, TUNERS, "tuner")
    import peft

    from . import tuners

    config = getattr(tuners if kind in OWN_CONFIGS else peft, kind, None)
    if not (inspect.isclass(config) and issubclass(config, peft.PeftConfig)):
        configs = [n for n in dir(peft) if n.endswith("Config")]
        raise ConfigError(f"no tuner is called `{kind}`: {nearest(kind, [*TUNERS, *OWN_CONFIGS, *configs])}")
    settings = {k: v for k, v in data.items() if k != "type"}
    names = {f.name for f in dataclasses.fields(config)}
    for key in settings:
        if key not in names:
            raise ConfigError(f"{kind} has no setting `{key}`: {nearest(key, names)}")
    return config(**settings)


def _kind(data: Any, slot: str) -> str:
    if not isinstance(data, dict) or "type" not in data:
        raise ConfigError(f"a {slot} is written as {{type: NAME, setting: value, ...}}, not {data!r}")
    return str(data["type"])


def _make(data: Any, known: dict[str, Any], slot: str) -> Any:
    """One piece from its plain data; types of settings are checked by pydantic."""
    if isinstance(data, str):
        data = {"type": data}
    kind = _kind(data, slot)
    if kind not in known:
        raise ConfigError(f"no {slot} is called `{kind}`: {nearest(kind, known)}")
    settings = {k: v for k, v in data.items() if k != "type"}
    target = known[kind]
    accepted = list(inspect.signature(target).parameters)
    for key in settings:
        if key not in accepted:
            raise ConfigError(f"{kind} has no setting `{key}`: {nearest(key, accepted) if accepted else 'it has none'}")
    return call_checked(kind, target, settings)

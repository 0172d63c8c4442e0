"""What subspace projection protects of a model, and what trains beside it unprotected."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, RuleError
from ..tuners.adapter import AdapterLinear
from ..tuners.linear_map import LinearMap
from ..tuners.token_attention import TokenLayer
from .bases import check_energy
from .linear_sites import linear_sites
from .lora_sites import lora_pairs
from .running_statistics import moving_modules

CHOICES = {
    "on": ("update", "gradient", "both"),
    "branch": ("kept", "fresh"),
    "prompts": ("per_head", "published"),
    "unprotected": ("error", "freeze", "allow"),
}


def check_settings(rule: Any) -> None:
    """The settings of a `SubspaceProjection`.

    Raises:
        ConfigError: one is out of range.
    """
    check_energy(rule.energy, rule.cap)
    if rule.cap is not None and rule.cap > 1:
        raise ConfigError(f"SubspaceProjection: cap={rule.cap} is a share of a layer's inputs: at most 1")
    if not 0 <= rule.strength <= 1:
        raise ConfigError(f"SubspaceProjection: strength={rule.strength} must be between 0 and 1")
    for name, known in CHOICES.items():
        if getattr(rule, name) not in known:
            raise ConfigError(f"SubspaceProjection: {name}=`{getattr(rule, name)}` must be {', '.join(known)}")
    if rule.sketch_rows < 1:
        raise ConfigError(f"SubspaceProjection: sketch_rows={rule.sketch_rows} must be at least 1")
    if rule.probes < 0:
        raise ConfigError(f"SubspaceProjection: probes={rule.probes} is a number of inputs: 0 keeps none")


@dataclass(frozen=True)
class Protected:
    """The trained parameters of a model, sorted.

    Attributes:
        sites: protected, in the order of the modules.
        loose: no projection can protect them.
        free: the published conditions leave them free: the values of prefixes.
        moving: modules whose buffers move in training mode.
        sufficient: whether the conditions on the sites suffice for old outputs to stay; the published ones on prompts
            and prefixes do not.
    """

    sites: list[LinearMap]
    loose: dict[str, nn.Parameter]
    free: dict[str, nn.Parameter] = field(default_factory=dict)
    moving: dict[str, nn.Module] = field(default_factory=dict)
    sufficient: bool = True

    def check(self, rule: str, refuse: bool) -> None:
        """
        Args:
            rule: name for the message.
            refuse: whether loose parameters are refused.

        Raises:
            RuleError: nothing is protected, or something loose is refused.
        """
        if not self.sites:
            raise RuleError(
                f"{rule} acts on weights of linear layers (all weights, LoRA, adapters), and this model trains none: "
                "use another tuner, or take the rule out"
            )
        if self.loose and refuse:
            raise RuleError(
                f"{rule} cannot protect `{next(iter(self.loose))}` ({len(self.loose)} such parameters train): freeze "
                "them (LoRA without biases does), or set unprotected to `freeze` or `allow`"
            )


def protected(model: nn.Module, branch: str, prompts: str) -> Protected:
    """Sort what trains; of a fresh branch B may do as it likes, since A reads nothing of old inputs.

    Args:
        branch, prompts: see `SubspaceProjection`.
    """
    sites, loose = linear_sites(model, prompts)
    layers = [m for m in model.modules() if isinstance(m, TokenLayer) and m.trained() is not None]
    tokens = {id(p) for m in layers for name in m.adapter_layer_names for p in getattr(m, name).values()}
    free = {name: p for name, p in loose.items() if id(p) in tokens}
    loose = {name: p for name, p in loose.items() if id(p) not in tokens}
    if branch == "fresh":
        pairs = lora_pairs(model)
        A, B = {id(pair.A) for pair in pairs}, {id(pair.B) for pair in pairs}
        loose |= {site.name: site.weight for site in sites if id(site.weight) not in A | B}
        sites = [site for site in sites if id(site.weight) in A]
    return Protected(sites, loose, free, moving_modules(model), not (layers and prompts == "published"))


@torch.no_grad()
def unused_products(model: nn.Module, sites: Sequence[LinearMap]) -> list[tuple[LinearMap, LinearMap]]:
    """The pairs (A, B) of these sites with B = 0, as LoRA and adapters start: B act(A x) is 0, whatever A reads.

    Such a B has computed nothing yet. To keep it so for old x, A alone can be kept from reading them; protecting what
    B reads, r numbers that span everything after r tokens, would freeze B at 0.
    """
    by_weight = {id(site.weight): site for site in sites}
    pairs = [(pair.A, pair.B) for pair in lora_pairs(model)]
    pairs += [pair for m in model.modules() if isinstance(m, AdapterLinear) for pair in m.factors()]
    found = [(by_weight.get(id(A)), by_weight.get(id(B))) for A, B in pairs]
    return [(A, B) for A, B in found if A and B and not bool(B.whole(B.matrix(B.weight)).any())]


def limits(full: Sequence[Sequence[tuple[LinearMap, Tensor]]], held: int, free: int) -> Iterator[str]:
    """What will not be learned in the coming task, or not be kept, for the user.

    Args:
        full: for each group of maps, those whose every input direction is protected, each with its W_ref.
        held: modules whose running statistics stay.
        free: parameters that the published conditions leave free.
    """
    stuck = [site.name for maps in full for site, W_ref in maps if not bool(W_ref.any())]
    if full and all(full):
        yield (
            "SubspaceProjection: every direction of every input is protected, so this task can learn nothing in these "
            "weights: lower energy or cap"
        )
    elif stuck:
        yield (
            f"SubspaceProjection: `{stuck[0]}` is 0 and every direction of its input is protected, so that it stays 0 "
            f"({len(stuck)} such weights): show fewer inputs before the first task, or lower energy or cap"
        )
    if held:
        yield f"SubspaceProjection: {held} modules with running statistics keep them, and train as in eval mode"
    if free:
        yield (
            f"SubspaceProjection: the published conditions leave {free} trained parameters free, the values of "
            "prefixes: old outputs move"
        )

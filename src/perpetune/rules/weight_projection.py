"""Projection away from what the weights themselves hold most strongly: their leading singular directions stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, RuleError
from ..core.measurement import Measurement
from ..tuners.linear_map import LinearMap
from .base import Rule, TaskContext
from .certificate import LEAK
from .linear_sites import Batches
from .lora_penalty import work
from .lora_sites import LoraPair, lora_pairs
from .weight_bases import WeightBasis, count, exact, layer_importance, ratios
from .weight_parts import TINY, Factors, Whole, adapted, matrices

CHOICES = {
    "on": ("update", "gradient", "both"),
    "branch": ("kept", "fresh"),
    "unprotected": ("error", "freeze", "allow"),
}


@dataclass
class WeightProjection(Rule):
    """Keeps every change dW of a weight W (out x d) away from its k leading singular triples (u_i, sigma_i, v_i):

        U^T dW = 0 and dW V = 0,   so that   (W + dW) v_i = sigma_i u_i   and   u_i^T (W + dW) = sigma_i v_i^T.

    No data is kept: what a matrix does most strongly stands for what the model knows. Nothing is promised of outputs on
    old inputs, which lie in other directions, too (`SubspaceProjection` promises that).

    "update"    after every optimizer step, on the weights: Adam's scaling, decay and momentum do not matter.
    "gradient"  before every step, as OSF is released and as peft's `OSFConfig` does: exact for SGD alone.
    "both"      the update, and the gradient too, so that Adam's moments see only what may be learned.

    Bases are made anew of the weights as they are when a task begins, with what earlier tasks have changed.

    branch="kept"   the weights themselves train (`Continue`): OSF. Its factors U_low S_low V_low of the rest of W can
                    become every matrix of the form (I - U U^T) Z (I - V V^T), and no other: so can W here, without
                    factors to train.
    branch="fresh"  a new LoRA for every task, merged afterwards (`Merge`, `Stack`): OPLoRA, whose factors start with
                    A V = 0 and keep to it, so that what is merged is a plain LoRA. With "both" the steps are those of
                    the published form W + s P_L B A P_R, under any optimizer.

    A layer keeps k = floor(r min(out, d)) directions, r = least + I (target - least), with the importance I = mean of
    cos(x, W x) over the tokens x of the task before (the first task: its own), scaled to a mean of 1 over the layers.

    Where layers turn their inputs anywhere, all I are near 0, and so is their mean: then a layer keeps all or the least
    (docs/explanation/projection.md), and `rank` is the better choice.

    Sources: Nayak et al., OSF (2504.07097), whose code takes one share for all layers and has I commented out (shares
    1/2 and 1 there), and trains embeddings, norms and biases beside; peft's keeps half of every matrix and freezes
    all else. Xiong and Xie, OPLoRA (2510.13003), one task.

    Args:
        rank: k, as a number or (a float) as a share of min(out, d); None: by importance, for branch "kept".
        least, target: minimum and target retention ratio.
        on: "update", "gradient" or "both".
        branch: "kept" or "fresh"; must match the recipe's consolidation.
        unprotected: trained parameters that are no matrix of a linear layer (norms, embeddings, biases): "freeze",
            "error", or "allow".

    Raises:
        ConfigError: a setting is out of range.
        RuleError: (from `begin_task`) nothing to act on, something else that trains, weights that are quantised or
            sharded.
    """

    keeps_outputs = True  # along V: an initialisation that takes a part of W away is refused
    rank: int | float | None = None
    least: float = 0.1
    target: float = 0.8
    on: Literal["update", "gradient", "both"] = "both"
    branch: Literal["kept", "fresh"] = "kept"
    unprotected: Literal["error", "freeze", "allow"] = "freeze"
    _parts: list[Whole | Factors] = field(init=False, repr=False, compare=False, default_factory=list)
    _importance: dict[str, float] = field(init=False, repr=False, compare=False, default_factory=dict)
    _references: dict[str, Tensor] = field(init=False, repr=False, compare=False, default_factory=dict)
    _batches: Batches | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"WeightProjection: {name}=`{getattr(self, name)}` must be {', '.join(known)}")
        if not 0 <= self.least <= self.target <= 1:
            raise ConfigError(f"WeightProjection: least={self.least}, target={self.target} must rise in [0, 1]")
        if self.rank is None and self.branch == "fresh":
            raise ConfigError("WeightProjection: branch `fresh` needs a rank, the directions to keep of every weight")
        if self.rank is not None and (self.rank <= 0 or (isinstance(self.rank, float) and self.rank > 1)):
            raise ConfigError(f"WeightProjection: rank={self.rank} must be 1 or more, or a share (0.5) of at most 1.0")

    @property
    def needs_branch(self) -> Literal["kept", "fresh"]:
        return self.branch

    # ---- the task ----

    @torch.no_grad()
    def begin_task(self, task: TaskContext) -> None:
        pairs = lora_pairs(task.model) if self.branch == "fresh" else []
        sites = matrices(task.model) if self.branch == "kept" else []
        own = {id(p) for pair in pairs for p in (pair.A, pair.B)} | {id(site.weight) for site in sites}
        if not own:
            kind = {"fresh": "LoRA of linear layers", "kept": "weights of linear layers (all weights, and not LoRA)"}
            raise RuleError(
                f"WeightProjection with branch `{self.branch}` acts on {kind[self.branch]}, and this model trains "
                "none: use another tuner or branch, or take the rule out"
            )
        loose = {n: p for n, p in task.model.named_parameters() if p.requires_grad and id(p) not in own}
        if loose and self.unprotected == "error":
            raise RuleError(
                f"WeightProjection cannot protect `{next(iter(loose))}` ({len(loose)} such parameters train): freeze "
                "them, or set unprotected to `freeze` or `allow`"
            )
        self._opened(task)
        for p in loose.values() if self.unprotected == "freeze" else ():
            p.requires_grad_(False)
            p.grad = None  # an optimizer that holds it leaves it alone, decay included
        self._batches = task.batches
        self._parts = [*self._factors(task, pairs), *self._wholes(task, sites)]
        full = sum(part.basis.full for part in self._parts)
        if full == len(self._parts):
            task.say("WeightProjection: every direction of every weight is kept, so this task can learn nothing")
        elif full:
            task.say(
                f"WeightProjection: {full} of {len(self._parts)} weights are kept whole and learn nothing; rank=0.5 "
                "keeps half of each"
            )
        self._references = {}

    def _factors(self, task: TaskContext, pairs: Sequence[LoraPair]) -> Iterator[Factors]:
        for pair, W in adapted(task.model, pairs):
            part = Factors(pair, WeightBasis.of(W, count(self.rank or 1, W.shape)), W)
            if self.on != "gradient":
                part.update()  # A V = 0 from the start
            yield part

    def _wholes(self, task: TaskContext, sites: Sequence[LinearMap]) -> Iterator[Whole]:
        if not sites:
            return
        shares: dict[str, float] = {}
        if self.rank is None:
            if not self._importance and task.batches is not None:
                self._importance = layer_importance(task.model, sites, task.batches)
            shares = ratios(self._importance, self.least, self.target)
            if not self._importance or sum(self._importance.values()) <= 0:
                task.say(f"WeightProjection: the layers cannot be told by importance, each keeps {self.target:.0%}")
        for site in sites:
            W = work(site.matrix(site.weight)).clone()
            stored = self._references.get(site.name)
            if stored is not None:
                if stored.shape != W.shape:
                    raise RuleError(
                        f"the reference of `{site.name}` in the state of WeightProjection has another shape"
                    )
                W = stored.to(W)
            rank = shares.get(site.name, self.target) if self.rank is None else self.rank
            yield Whole(site, WeightBasis.of(W, count(rank, W.shape)), W)

    def bytes_held(self, model: nn.Module) -> int:
        """What the rule will hold beside such a model, tuner attached: bases, and W_ref of weights that train."""
        if self.branch == "fresh":
            shapes, copied = [pair.shape for pair in lora_pairs(model)], 0
        else:
            weights = [site.matrix(site.weight) for site in matrices(model)]
            shapes = [(len(W), W.shape[1]) for W in weights]
            copied = 4
        rank = self.target if self.rank is None else self.rank
        return sum(copied * out * d + 4 * count(rank, (out, d)) * (out + d + 1) for out, d in shapes)

    # ---- the step ----

    def parameters(self) -> Sequence[nn.Parameter]:
        return [p for part in self._parts for p in part.parameters]

    @torch.no_grad()
    def on_gradient(self) -> None:
        for part in self._parts if self.on != "update" else ():
            part.gradient()

    @torch.no_grad()
    def on_update(self, before: Sequence[Tensor]) -> None:
        for part in self._parts if self.on != "gradient" else ():
            part.update()

    # ---- what survives, what is promised ----

    def end_task(self, task: TaskContext) -> None:
        batches, sites = task.batches or self._batches, [p.site for p in self._parts if isinstance(p, Whole)]
        self._closed()
        if sites and self.rank is None and batches is not None:
            self._importance = layer_importance(task.model, sites, batches)
        self._parts, self._batches, self._references = [], None, {}

    def state(self) -> dict[str, Tensor]:
        """`importance.<layer>`; within a task W_ref as `reference.<layer>`."""
        kept = {f"reference.{p.site.name}": p.W_ref.cpu().clone() for p in self._parts if isinstance(p, Whole)}
        return {
            **{f"importance.{k}": torch.tensor(v, dtype=torch.float64) for k, v in self._importance.items()},
            **kept,
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """
        Raises:
            RuleError: tensors that are not this rule's.
        """
        self._importance, self._references, self._parts, self._batches, self._open = {}, {}, [], None, None
        for key, value in state.items():
            kind, _, name = key.partition(".")
            if kind == "importance":
                self._importance[name] = float(value)
            elif kind == "reference":
                self._references[name] = value.clone()
            else:
                raise RuleError(f"`{key}` is no state of WeightProjection: expected importance. or reference.")

    @torch.no_grad()
    def guarantee(self) -> list[Measurement]:
        """That dW neither reads nor writes the kept directions, and that the kept triples are those of the new weight.
        Promised unless the gradient alone is projected."""
        if not self._parts:
            return []
        rows = []
        for part in self._parts:
            basis, D = part.basis.exact(), part.change()
            left, right, size = part.leaks()
            leak, norm = LEAK.get(part.dtype, LEAK[torch.bfloat16]), max(basis.norm, TINY)
            moved = max(float((D @ basis.V).norm()), float((basis.U.mT @ D).norm())) / norm
            rest = torch.linalg.matrix_norm(basis.outside(exact(part.W_ref) + D), 2) / basis.S[-1].clamp_min(TINY)
            rows.append((left, right, leak, moved, leak * size / norm, float(rest)))
        moved, bound = max(((r[3], r[4]) for r in rows), key=lambda pair: pair[0] / max(pair[1], TINY))
        leak, promised, source = max(r[2] for r in rows), self.on != "gradient", type(self).__name__
        kept = [part.basis.S.numel() / min(len(part.basis.U), len(part.basis.V)) for part in self._parts]
        return [
            Measurement(
                "change written into kept directions |U^T dW| / |W|", max(r[0] for r in rows),
                leak if promised else None, "relative", source, "0 but for rounding; of LoRA, |U^T B| / |B|.",
            ),
            Measurement(
                "change read from kept directions |dW V| / |W|", max(r[1] for r in rows),
                leak if promised else None, "relative", source, "0 but for rounding; of LoRA, |A V| / |A|.",
            ),
            Measurement(
                "change of the kept singular triples", moved, bound if promised else None, "relative", source,
                "|(W + dW) V - U S| or |U^T (W + dW) - S V^T|, the larger, over |W|, in the worst layer.",
            ),
            Measurement(
                "strongest direction that is not kept, against the weakest kept", max(r[5] for r in rows), None, "",
                source, "Above 1 the kept triples still are singular triples of the weight, but not its largest.",
            ),
            Measurement(
                "directions kept", sum(kept) / len(kept), None, "share", source, "Of min(out, d); mean over layers.",
            ),
        ]  # fmt: skip

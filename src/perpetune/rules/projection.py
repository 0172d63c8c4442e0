"""Subspace projection: what layers computed of old inputs stays, to rounding, whatever the optimizer does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError, RuleError
from ..measurement import Measurement
from ..subspace import check_energy
from .base import Rule, TaskContext
from .layer_memory import LayerMemory
from .linear_sites import Batches, LinearSite, linear_sites
from .lora_penalty import work

# |dW M| / |W| that one projection and one rounding to the type of the weights leave.
LEAK = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
BUCKET = 64  # bases of as many columns, rounded up to this, are padded with zeros and multiplied at once


@dataclass
class _Group:
    """n inputs of one width d, read by R rows of weights each: W_ref (n x R x d), M (n x d x k).

    `sites` lists those of the first input, then those of the second, and so on: their rows laid end to end are W.
    """

    sites: list[LinearSite]
    W_ref: Tensor
    M: Tensor

    def stacked(self, values: Sequence[Tensor | None]) -> Tensor:
        """(n x R x d) of the weights, or of as many tensors of their shapes; None counts as zeros."""
        rows = [
            s.matrix(torch.zeros_like(s.weight) if v is None else v) for s, v in zip(self.sites, values, strict=True)
        ]
        return work(torch.cat(rows)).view(self.W_ref.shape)

    def write(self, targets: Sequence[Tensor | None], values: Tensor) -> None:
        """values (n x R x d) back to where they came from, rounded once where that is half precision."""
        places = [None if t is None else s.matrix(t) for s, t in zip(self.sites, targets, strict=True)]
        sizes = [len(s.matrix(s.weight)) for s in self.sites]
        pairs = zip(places, values.flatten(0, 1).split(sizes), strict=True)
        chosen = [(place, v) for place, v in pairs if place is not None]
        if chosen:
            torch._foreach_copy_([place for place, _ in chosen], [v for _, v in chosen])


@dataclass(frozen=True)
class _Certificate:
    """What was measured at one weight: leak = |dW M| / |W|, drift = |dW X| / |X|, and what they cannot pass."""

    name: str
    leak: float
    leak_bound: float
    drift: float
    drift_bound: float


@dataclass
class SubspaceProjection(Rule):
    """Keeps every change dW of a linear layer out of the space of its old inputs: dW M = 0, so W x stays.

    "update"    after every optimizer step, with D = W - W_ref the whole change since the task began:
                    W <- W_ref + D - strength * (D M) M^T.
                Nothing that the optimizer does before it matters (Adam's scaling, weight decay, momentum of an earlier
                task, clipping), and no rounding adds up. This is what the guarantee rests on.
    "gradient"  before every step g <- g - strength * (g M) M^T, as published. Exact for SGD without decay and with
                fresh momentum alone: Adam divides by a diagonal that does not commute with M M^T, decay shrinks W M.
    "both"      the update, and the gradient too, so that Adam's moments see only what may be learned.

    M (d x k) spans the old inputs of the layer, all their tokens: the leading eigenvectors of C = sum_t C_t / tr C_t,
    gathered from the task's training inputs after it is learned, in eval mode, padding left out. They hold at least the
    share `energy` of sum sigma^2. Then, for layer inputs that did not move,
        sum_old |dW x|^2 <= ||dW||_2^2 (1 - kept share) sum_old |x|^2,
    and with energy=1, where nothing that trains is unprotected, old outputs do not move at all, layer after layer.

    All trained weights of linear layers are protected: `nn.Linear`, `Conv1D`, and both factors of LoRA (A reads x, B
    reads A x, so that B runs full after a few tokens and is frozen from the second task on). The tuner must be the same
    from task to task (`Continue`): W_ref has to be what the old outputs were made with. Memory and time per step do not
    grow with the number of tasks.

    Sources: PEGP (2405.13383), PGP (ICLR 2024) for the condition; the form "update" is ours. GPM (2103.09762) is
    on="gradient" on all weights, with plain SGD.

    Args:
        energy: share of sum sigma^2 of the old inputs that is protected; 1: every direction they have.
        on: "update", "gradient" or "both".
        strength: below 1, only this share of the protected part is taken back at each step. With "update" a protected
            step fades as (1 - strength)^n over n further steps: 0.01 is soft, from 0.5 on it is almost 1. No guarantee.
        cap: largest share of a layer's d directions to protect, 0.5 leaves half to learn with; None: no limit.
        unprotected: trained parameters that no projection can protect (biases, norms, embeddings, heads' bare
            parameters): "error"; "freeze", as soon as there is something to protect; or "allow", without a guarantee.
        wide: layers of more inputs d than this keep a sketch (Frequent Directions) in place of C.
        sketch_rows: rows of such a sketch.

    Raises:
        ConfigError: a setting is out of range.
        RuleError: (from `begin_task`) nothing to act on; parameters that cannot be protected; a task after the first
            without a memory, or with one of other layers. (From `end_task`) no batches, or layers that were not called.
    """

    energy: float = 0.99
    on: Literal["update", "gradient", "both"] = "update"
    strength: float = 1.0
    cap: float | None = None
    unprotected: Literal["error", "freeze", "allow"] = "error"
    wide: int = 4096
    sketch_rows: int = 256
    _memory: LayerMemory = field(init=False, repr=False, compare=False)
    _references: dict[str, Tensor] = field(init=False, repr=False, compare=False, default_factory=dict)
    _groups: list[_Group] = field(init=False, repr=False, compare=False, default_factory=list)
    _begun: bool = field(init=False, repr=False, compare=False, default=False)
    _loose: int = field(init=False, repr=False, compare=False, default=0)
    _batches: Batches | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        check_energy(self.energy, self.cap)
        if self.cap is not None and self.cap > 1:
            raise ConfigError(f"SubspaceProjection: cap={self.cap} is a share of a layer's inputs: at most 1")
        if not 0 <= self.strength <= 1:
            raise ConfigError(f"SubspaceProjection: strength={self.strength} must be between 0 and 1")
        for name, known in (("on", ("update", "gradient", "both")), ("unprotected", ("error", "freeze", "allow"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"SubspaceProjection: {name}=`{getattr(self, name)}` must be {', '.join(known)}")
        if self.sketch_rows < 1:
            raise ConfigError(f"SubspaceProjection: sketch_rows={self.sketch_rows} must be at least 1")
        self._memory = LayerMemory(self.wide, self.sketch_rows)

    @property
    def promises(self) -> bool:
        """Whether dW M = 0 is enforced, and not merely hoped for."""
        return self.on != "gradient" and self.strength == 1

    # ---- the task ----

    def begin_task(self, task: TaskContext) -> None:
        sites, loose = linear_sites(task.model)
        if not sites:
            raise RuleError(
                "SubspaceProjection acts on weights of linear layers (all weights, LoRA, adapters), and this model "
                "trains none: use another tuner, or take the rule out"
            )
        if loose and self.unprotected == "error":
            raise RuleError(
                f"SubspaceProjection cannot protect `{next(iter(loose))}` ({len(loose)} such parameters train): freeze "
                "them (LoRA without biases does), or set unprotected to `freeze` or `allow`"
            )
        if not self._memory.inputs and task.index > 0:
            raise RuleError(
                f"SubspaceProjection knows no past at task index {task.index}: "
                "keep the same rule for all tasks and call its end_task after each, or load its state"
            )
        self._begun, self._batches, self._groups, self._loose = True, task.batches, [], len(loose)
        if self._memory.inputs:
            self._memory.check(sites)
            for p in loose.values() if self.unprotected == "freeze" else ():
                p.requires_grad_(False)
                p.grad = None  # an optimizer that holds it leaves it alone, decay included
            self._group(sites)

    @torch.no_grad()
    def _group(self, sites: Sequence[LinearSite]) -> None:
        """Weights that read one input share its M; inputs of like shapes are multiplied at once."""
        readers: dict[tuple, list[LinearSite]] = {}
        for site in sites:
            readers.setdefault((self._memory.reads[site.name], site.weight.dtype, site.weight.device), []).append(site)
        alike: dict[tuple, list[tuple[Tensor, list[LinearSite]]]] = {}
        for (index, *kind), members in readers.items():
            M = self._memory.inputs[index].M
            if M.shape[1]:  # nothing to protect where all inputs were 0
                R = sum(len(site.matrix(site.weight)) for site in members)
                alike.setdefault((*kind, R, len(M), -(-M.shape[1] // BUCKET)), []).append((M, members))
        for inputs in alike.values():
            members = [site for _, group in inputs for site in group]
            W = work(torch.cat([self._reference(site) for site in members]))
            k = max(M.shape[1] for M, _ in inputs)
            padded = [nn.functional.pad(M, (0, k - M.shape[1])).to(W.device, W.dtype) for M, _ in inputs]
            self._groups.append(_Group(members, W.view(len(inputs), -1, W.shape[1]), torch.stack(padded)))
        self._references = {}

    def _reference(self, site: LinearSite) -> Tensor:
        """W_ref: what the state of a task in progress brought along, else the weight as it is."""
        W = site.matrix(site.weight)
        stored = self._references.get(site.name)
        if stored is None:
            return work(W)
        if stored.shape != W.shape:
            raise RuleError(f"the reference of `{site.name}` in the state of SubspaceProjection has another shape")
        return stored.to(W.device)

    # ---- the step ----

    @torch.no_grad()
    def on_gradient(self) -> None:
        for group in self._groups if self.on != "update" else ():
            gradients = [site.weight.grad for site in group.sites]
            g = group.stacked(gradients)
            group.write(gradients, g.baddbmm_(torch.bmm(g, group.M), group.M.mT, alpha=-self.strength))

    @torch.no_grad()
    def on_update(self, before: Sequence[Tensor]) -> None:
        for group in self._groups if self.on != "gradient" else ():
            weights = [site.weight for site in group.sites]
            W = group.stacked(weights)
            DM = torch.bmm(W - group.W_ref, group.M)  # n x R x k
            group.write(weights, W.baddbmm_(DM, group.M.mT, alpha=-self.strength))

    # ---- the memory ----

    def end_task(self, task: TaskContext) -> None:
        if not self._begun:
            raise RuleError("SubspaceProjection: end_task without a begin_task before it")
        batches = task.batches or self._batches
        if batches is None:
            raise RuleError("SubspaceProjection reads the task's inputs when it ends: give `batches` to attach()")
        self._begun, self._batches, self._groups = False, None, []
        self.observe(task.model, batches)

    def observe(self, model: nn.Module, batches: Batches) -> None:
        """Protect what the model computes of these inputs from now on; called by `end_task`.

        Called before the first task with inputs of another kind (generic text, image-text pairs), it protects what the
        model could do before. The tuner must be attached. Where several processes train one model, each must be given
        all batches.

        Raises:
            RuleError: no batches, a layer that is not called, or layers that shared an input and no longer do.
        """
        self._memory.observe(model, batches, self.energy, self.cap)

    # ---- what survives, what is promised ----

    def state(self) -> dict[str, Tensor]:
        """The memory (`LayerMemory.state`), and within a task W_ref as `reference.<layer>`."""
        references = {f"reference.{site.name}": W.cpu().clone() for site, W in self._split_references()}
        return {**self._memory.state(), **references}

    def _split_references(self) -> list[tuple[LinearSite, Tensor]]:
        pairs = []
        for group in self._groups:
            sizes = [len(site.matrix(site.weight)) for site in group.sites]
            pairs += list(zip(group.sites, group.W_ref.flatten(0, 1).split(sizes), strict=True))
        return pairs

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`. Loaded within a task, `begin_task` takes its W_ref from it and not from the weights.

        Raises:
            RuleError: tensors that are not this rule's.
        """
        prefix = "reference."
        self._memory.load_state({k: v for k, v in state.items() if not k.startswith(prefix)})
        self._references = {k[len(prefix) :]: v.clone() for k, v in state.items() if k.startswith(prefix)}
        self._begun, self._batches, self._groups = False, None, []

    @torch.no_grad()
    def _certificates(self) -> list[_Certificate]:
        found = []
        for site, W_ref in self._split_references():
            kept = self._memory.of(site)
            memory, M = kept.memory, kept.M
            W = site.matrix(site.weight).to("cpu", torch.float64)
            D = W - W_ref.to(W)  # rows x d
            norm, leak = W.norm(), (D @ M).norm()
            promised = LEAK.get(site.weight.dtype, LEAK[torch.bfloat16])
            # D = D (I - M M^T) + D M M^T: the bound holds for the first term, the promised leak for the second. The
            # sums that C is made of round, too.
            rounding = torch.finfo(M.dtype).eps * len(M) * memory.total * D.square().sum()
            bound = (memory.bound(D, M).sqrt() + promised * norm * memory.total.sqrt()).square() + rounding
            found.append(
                _Certificate(
                    site.name,
                    (leak / norm.clamp_min(torch.finfo(norm.dtype).tiny)).item(),
                    promised,
                    (memory.drift(D) / memory.total).sqrt().item(),
                    (bound / memory.total).sqrt().item(),
                )
            )
        return found

    @torch.no_grad()
    def guarantee(self) -> list[Measurement]:
        """Leak and drift of the layer that is worst off, and how full the memory is. Empty for the first task.

        Promised with "update" or "both" at strength 1; observed figures otherwise.
        """
        found = self._certificates()
        if not found:
            return []
        source = type(self).__name__
        leak = max(found, key=lambda c: _ratio(c.leak, c.leak_bound))
        drift = max(found, key=lambda c: _ratio(c.drift, c.drift_bound))
        residuals = [float(kept.memory.residual(kept.M)) for kept in self._memory.inputs]
        exact = self.cap is None and self._memory.exact
        used = [kept.M.shape[1] / len(kept.M) for kept in self._memory.inputs]
        full = sum(share == 1 for share in used)
        loose = (
            f" {self._loose} trained parameters are not protected."
            if self._loose and self.unprotected == "allow"
            else ""
        )
        return [
            Measurement(
                "change inside the protected space |dW M| / |W|", leak.leak,
                leak.leak_bound if self.promises else None, "relative", source,
                f"Worst layer: `{leak.name}`. 0 but for rounding: what old inputs read of the weights has not changed.",
            ),
            Measurement(
                "drift of a layer on old inputs |dW X| / |X|", drift.drift,
                drift.drift_bound if self.promises else None, "relative", source,
                f"Worst layer: `{drift.name}`. The bound is that of the directions left unprotected.{loose}",
            ),
            Measurement(
                "old inputs left unprotected", max(residuals), 1 - self.energy + 1e-9 if exact else None, "share",
                source, "Share of the squared length of old inputs that later tasks may change, in the worst layer.",
            ),
            Measurement(
                "input directions in use", sum(used) / len(used), None, "share", source,
                f"1: nothing more can be learned. {full} of {len(used)} inputs are full.",
            ),
        ]  # fmt: skip


def _ratio(value: float, bound: float) -> float:
    return math.inf if math.isnan(value) else value / bound if bound else value

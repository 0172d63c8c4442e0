"""Subspace projection: what layers computed of old inputs stays, to rounding, whatever the optimizer does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, RuleError
from ..core.measurement import Measurement
from ..tuners.linear_map import LinearMap
from .base import Rule, TaskContext
from .bases import check_energy
from .certificate import SOURCE, certificates, measurements, worst
from .layer_memory import LayerMemory
from .linear_sites import Batches, linear_sites
from .lora_penalty import work
from .lora_sites import lora_pairs
from .probes import Probes
from .stacked_maps import StackedMaps, stack

CHOICES = {
    "on": ("update", "gradient", "both"),
    "branch": ("kept", "fresh"),
    "prompts": ("per_head", "published"),
    "unprotected": ("error", "freeze", "allow"),
}


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
    and with energy=1, where nothing that trains is unprotected, old outputs do not move at all, layer after layer. The
    bound is that of one task's dW; with energy < 1 the drifts of many tasks add up (docs/results/certificate.md).

    All trained weights that act through linear maps are protected: `nn.Linear`, `Conv1D`, both factors of LoRA (A reads
    x, B reads A x), adapters, the queries' side and the values' side of prompts and prefixes, IA3's vectors and biases
    (which read y element by element, and the constant 1: hardly any room, and none, see docs/projection.md). Memory and
    time per step do not grow with the number of tasks.

    branch="kept"   one tuner all the way (`Continue`): W_ref is what the old outputs were made with. LoRA's B reads r
                    inputs only, runs full after a few tokens and is frozen from the second task on.
    branch="fresh"  a new LoRA for every task, merged afterwards (`Merge`, `Stack`): A M = 0 from the start, so that
                    B A x = 0 for old x whatever B does; the rank is new with every task.

    Sources: PEGP (2405.13383), PGP (ICLR 2024) for the condition; the form "update" is ours. GPM (2103.09762) is
    on="gradient" on all weights, with plain SGD.

    Args:
        energy: share of sum sigma^2 of the old inputs that is protected; 1: every direction they have.
        on: "update", "gradient" or "both".
        branch: "kept" or "fresh"; must match the recipe's consolidation.
        prompts: conditions for prompts and prefixes: "per_head", sufficient; "published" (PEGP), not sufficient.
        strength: below 1, only this share of the protected part of each step is taken back. No guarantee.
        cap: largest share of a layer's d directions to protect, 0.5 leaves half to learn with; None: no limit.
        unprotected: trained parameters that no projection can protect (norms, embeddings, bare parameters): "error";
            "freeze", as soon as there is something to protect; or "allow", without a guarantee.
        probes: how many raw inputs of every task are kept with their outputs, to measure what became of them; they are
            data of the user, and stored with every commit: 0 unless asked for.
        wide: layers of more inputs d than this keep a sketch (Frequent Directions) in place of C.
        sketch_rows: rows of such a sketch.

    Raises:
        ConfigError: a setting is out of range.
        RuleError: (from `begin_task`) nothing to act on; parameters that cannot be protected; a task after the first
            without a memory, or with one of other layers. (From `end_task`) no batches, or layers that were not called.
    """

    keeps_outputs = True
    energy: float = 0.99
    on: Literal["update", "gradient", "both"] = "update"
    branch: Literal["kept", "fresh"] = "kept"
    prompts: Literal["per_head", "published"] = "per_head"
    strength: float = 1.0
    cap: float | None = None
    unprotected: Literal["error", "freeze", "allow"] = "error"
    probes: int = 0
    wide: int = 4096
    sketch_rows: int = 256
    _memory: LayerMemory = field(init=False, repr=False, compare=False)
    _references: dict[str, Tensor] = field(init=False, repr=False, compare=False, default_factory=dict)
    _groups: list[StackedMaps] = field(init=False, repr=False, compare=False, default_factory=list)
    _begun: bool = field(init=False, repr=False, compare=False, default=False)
    _loose: int = field(init=False, repr=False, compare=False, default=0)
    _batches: Batches | None = field(init=False, repr=False, compare=False, default=None)
    _model: nn.Module | None = field(init=False, repr=False, compare=False, default=None)
    _probes: Probes = field(init=False, repr=False, compare=False, default_factory=Probes)

    def __post_init__(self) -> None:
        check_energy(self.energy, self.cap)
        if self.cap is not None and self.cap > 1:
            raise ConfigError(f"SubspaceProjection: cap={self.cap} is a share of a layer's inputs: at most 1")
        if not 0 <= self.strength <= 1:
            raise ConfigError(f"SubspaceProjection: strength={self.strength} must be between 0 and 1")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"SubspaceProjection: {name}=`{getattr(self, name)}` must be {', '.join(known)}")
        if self.sketch_rows < 1:
            raise ConfigError(f"SubspaceProjection: sketch_rows={self.sketch_rows} must be at least 1")
        if self.probes < 0:
            raise ConfigError(f"SubspaceProjection: probes={self.probes} is a number of inputs: 0 keeps none")
        self._memory = LayerMemory(self.energy, self.cap, self.wide, self.sketch_rows)

    @property
    def needs_branch(self) -> Literal["kept", "fresh"]:
        return self.branch

    @property
    def promises(self) -> bool:
        """Whether dW M = 0 is enforced, and enough for what is trained, and not merely hoped for."""
        return self.on != "gradient" and self.strength == 1

    def _sites(self, model: nn.Module) -> tuple[list[LinearMap], dict[str, nn.Parameter]]:
        """What is protected, and what trains and is not; a fresh branch's B may do as it likes."""
        sites, loose = linear_sites(model, self.prompts)
        if self.branch == "kept":
            return sites, loose
        pairs = lora_pairs(model)
        A, B = {id(pair.A) for pair in pairs}, {id(pair.B) for pair in pairs}
        other = {site.name: site.weight for site in sites if id(site.weight) not in A | B}
        return [site for site in sites if id(site.weight) in A], {**loose, **other}

    # ---- the task ----

    def begin_task(self, task: TaskContext) -> None:
        sites, loose = self._sites(task.model)
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
        self._model = task.model
        if self._memory.inputs:
            self._memory.check(sites)
            for p in loose.values() if self.unprotected == "freeze" else ():
                p.requires_grad_(False)
                p.grad = None  # an optimizer that holds it leaves it alone, decay included
            with torch.no_grad():
                self._groups = stack(sites, self._memory, self._reference)
                for group in self._groups if self.branch == "fresh" else ():
                    self._project(group, group.W_ref)
            self._references = {}
            if self._groups and all(group.full for group in self._groups) and self.strength == 1:
                task.say(
                    "SubspaceProjection: every direction of every input is protected, so this task can learn nothing "
                    "in these weights: lower energy or cap"
                )

    def _reference(self, site: LinearMap) -> Tensor:
        """W_ref: what the state of a task in progress brought along, else the weight as it is; 0 for a fresh branch."""
        W = site.matrix(site.weight)
        if self.branch == "fresh":
            return work(torch.zeros_like(W))
        stored = self._references.get(site.name)
        if stored is None:
            return work(W)
        rows = site.here(stored.to(W.device))
        if rows.shape != W.shape:
            raise RuleError(f"the reference of `{site.name}` in the state of SubspaceProjection has another shape")
        return rows

    # ---- the step ----

    @torch.no_grad()
    def on_gradient(self) -> None:
        for group in self._groups if self.on != "update" else ():
            gradients = [site.weight.grad for site in group.sites]
            g = group.stacked(gradients)
            group.write(gradients, self._projected(group, g))

    def watches(self) -> Sequence[nn.Parameter]:
        soft = self.strength < 1 and self.on != "gradient"
        return [site.weight for group in self._groups for site in group.sites] if soft else ()

    @torch.no_grad()
    def on_update(self, before: Sequence[Tensor]) -> None:
        if self.on == "gradient":
            return
        for group in self._groups:
            start = group.W_ref
            if self.strength < 1:
                start, before = group.stacked(before[: len(group.sites)]), before[len(group.sites) :]
            self._project(group, start)

    def _project(self, group: StackedMaps, start: Tensor) -> None:
        weights = [site.weight for site in group.sites]
        W = group.stacked(weights)
        group.write(weights, self._projected(group, W, start))

    def _projected(self, group: StackedMaps, W: Tensor, start: Tensor | None = None) -> Tensor:
        """W - strength * (W - start) M M^T; without `start` from 0."""
        if group.full and self.strength == 1:  # M M^T = I: Adam would make whole steps of what rounding leaves
            return torch.zeros_like(W) if start is None else start
        D = W if start is None else W - start
        DM = torch.bmm(D, group.M)  # n x R x k
        return W.baddbmm_(DM, group.M.mT, alpha=-self.strength)

    # ---- the memory ----

    def end_task(self, task: TaskContext) -> None:
        if not self._begun:
            raise RuleError("SubspaceProjection: end_task without a begin_task before it")
        batches = task.batches or self._batches
        if batches is None:
            raise RuleError("SubspaceProjection reads the task's inputs when it ends: give `batches` to attach()")
        self._begun, self._batches, self._groups, self._model = False, None, [], None
        self.observe(task.model, batches)
        if self.probes:
            self._probes.add(task.model, batches(), self.probes)

    def observe(self, model: nn.Module, batches: Batches) -> None:
        """Protect what the model computes of these inputs from now on; called by `end_task`.

        Called before the first task with inputs of another kind (generic text, image-text pairs), it protects what the
        model could do before. The tuner must be attached. Where several processes train one model, each must be given
        all batches.

        Raises:
            RuleError: no batches, a layer that is not called, or layers that shared an input and no longer do.
        """
        self._memory.observe(model, self._sites(model)[0], batches)

    # ---- what survives, what is promised ----

    def state(self) -> dict[str, Tensor]:
        """The memory (`LayerMemory.state`), `probe.*`, and within a task W_ref as `reference.<layer>`."""
        references = {f"reference.{site.name}": site.whole(W).cpu().clone() for site, W in self._split_references()}
        probes = {f"probe.{key}": value for key, value in self._probes.state().items()}
        return {**self._memory.state(), **probes, **references}

    def _split_references(self) -> list[tuple[LinearMap, Tensor]]:
        return [pair for group in self._groups for pair in group.references()]

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`. Loaded within a task, `begin_task` takes its W_ref from it and not from the weights.

        Raises:
            RuleError: tensors that are not this rule's.
        """
        parts: dict[str, dict[str, Tensor]] = {"reference": {}, "probe": {}, "memory": {}}
        for key, value in state.items():
            kind, _, rest = key.partition(".")
            own = kind in ("reference", "probe")
            parts[kind if own else "memory"][rest if own else key] = value
        self._memory.load_state(parts["memory"])
        self._references = {key: value.clone() for key, value in parts["reference"].items()}
        self._probes = Probes.restore(parts["probe"])
        self._begun, self._batches, self._groups, self._model = False, None, [], None

    @torch.no_grad()
    def guarantee(self) -> list[Measurement]:
        """Leak and drift of the layer that is worst off, and how full the memory is. Empty for the first task.

        Promised with "update" or "both" at strength 1; observed figures otherwise.
        """
        found = certificates(self._memory, self._split_references())
        if not found:
            return []
        unsafe = self._loose if self.unprotected == "allow" else 0
        measured = measurements(found, self._memory, self.energy, self.cap, self.promises, unsafe)
        if self._probes.tasks and self._model is not None:
            exact = self.cap is None and self._memory.exact
            sufficient = self.prompts == "per_head" and not unsafe
            whole = self.promises and self.energy == 1 and exact and sufficient
            bound = 10 * worst(found)[0].leak_bound if whole else None
            measured.append(self._probes.measurement(self._model, bound, SOURCE))
        return measured

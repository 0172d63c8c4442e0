"""Subspace projection: what layers computed of old inputs stays, to rounding, whatever the optimizer does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.errors import RuleError
from ..core.measurement import Measurement
from ..tuners.linear_map import LinearMap
from .base import Rule, TaskContext
from .certificate import SOURCE, certificates, measurements, unseen_changes, worst
from .layer_memory import LayerMemory
from .linear_sites import Batches
from .lora_penalty import work
from .probes import Probes
from .protected import Protected, check_settings, limits, protected, unused_products
from .running_statistics import buffer_digests, changed_buffers
from .stacked_maps import StackedMaps, stack

UNIT_TOKENS = True  # by the table of benchmarks/token_weights.py


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
    (which read y element by element, and the constant 1: hardly any room, and none; docs/explanation/projection.md).
    Memory and time per step do not grow with the number of tasks.

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
        prompts: conditions for prompts and prefixes: "per_head", sufficient; "published" (PEGP), not sufficient and
            without a guarantee: the values of prefixes are free.
        strength: below 1, only this share of the protected part of each step is taken back. No guarantee.
        cap: largest share of a layer's d directions to protect, 0.5 leaves half to learn with; None: no limit.
        unprotected: trained parameters that no projection can protect (norms, embeddings, bare parameters): "error";
            "freeze", as soon as there is something to protect; or "allow", without a guarantee. Unless "allow", running
            statistics (BatchNorm) stay from then on and are used in training; other buffers are compared afterwards.
        probes: how many raw inputs of every task are kept with their outputs, to measure what became of them; they are
            data of the user, and stored with every commit: 0 unless asked for.
        wide: layers of more inputs d than this keep a sketch (Frequent Directions) in place of C.
        sketch_rows: rows of such a sketch.
        unit_tokens: whether tokens count alike, C = sum x x^T / |x|^2, or by their squared length, so that a first
            token a hundred times as long as the others is all that an energy protects; None: as the memory has it that
            is loaded, else alike (benchmarks/token_weights.py).

    Raises:
        ConfigError: a setting is out of range.
        RuleError: (from `begin_task`) nothing to act on; parameters that cannot be protected; a task after the first
            without a memory, or with one of other layers; the task before was not ended. (From `end_task`) no batches,
            or layers that were not called.
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
    unit_tokens: bool | None = field(default=None, metadata={"unwritten": None})
    _memory: LayerMemory = field(init=False, repr=False, compare=False)
    _references: dict[str, Tensor] = field(init=False, repr=False, compare=False, default_factory=dict)
    _groups: list[StackedMaps] = field(init=False, repr=False, compare=False, default_factory=list)
    _found: Protected = field(init=False, repr=False, compare=False, default=Protected([], {}))
    _buffers: dict[str, str] = field(init=False, repr=False, compare=False, default_factory=dict)
    _batches: Batches | None = field(init=False, repr=False, compare=False, default=None)
    _model: nn.Module | None = field(init=False, repr=False, compare=False, default=None)
    _probes: Probes = field(init=False, repr=False, compare=False, default_factory=Probes)

    def __post_init__(self) -> None:
        check_settings(self)
        unit = UNIT_TOKENS if self.unit_tokens is None else self.unit_tokens
        self._memory = LayerMemory(self.energy, self.cap, self.wide, self.sketch_rows, unit)

    @property
    def needs_branch(self) -> Literal["kept", "fresh"]:
        return self.branch

    @property
    def promises(self) -> bool:
        """Whether dW M = 0 is enforced, and enough for all that trains, and not merely hoped for."""
        enforced = self.on != "gradient" and self.strength == 1
        still = self.unprotected != "allow" or not self._found.moving
        return enforced and still and self._found.sufficient and not self._unprotected

    @property
    def _unprotected(self) -> int:
        """How many trained parameters may change what old inputs give, in the task that goes on."""
        return len(self._found.free) + (len(self._found.loose) if self.unprotected == "allow" else 0)

    # ---- the task ----

    def begin_task(self, task: TaskContext) -> None:
        found = protected(task.model, self.branch, self.prompts)
        found.check("SubspaceProjection", refuse=self.unprotected == "error")
        self._opened(task)
        if not self._memory.inputs and task.index > 0:
            raise RuleError(
                f"SubspaceProjection knows no past at task index {task.index}: "
                "keep the same rule for all tasks and call its end_task after each, or load its state"
            )
        self._batches, self._groups, self._found, self._model = task.batches, [], found, task.model
        if self._memory.inputs:
            self._memory.check(found.sites)
            for p in {**found.loose, **found.free}.values() if self.unprotected == "freeze" else ():
                p.requires_grad_(False)
                p.grad = None  # an optimizer that holds it leaves it alone, decay included
            self._begin_projecting(task.model)
            self._buffers = buffer_digests(task.model)
            full = [group.references() if group.full and self.strength == 1 else [] for group in self._groups]
            for text in limits(full, len(self.held_modules()), len(found.free)):
                task.say(text)

    @torch.no_grad()
    def _begin_projecting(self, model: nn.Module) -> None:
        sites = self._found.sites
        fresh = sites if self.branch == "fresh" else [A for A, _ in unused_products(model, sites)]
        starts_at_0 = {site.name for site in fresh}  # W_ref = 0: all of A counts as change, since B gave it no effect
        self._groups = stack(sites, self._memory, lambda site: self._reference(site, site.name in starts_at_0))
        for group in self._groups if fresh else ():
            self._project(group, group.W_ref)
        self._references = {}

    def held_modules(self) -> Sequence[nn.Module]:
        held = self._memory.inputs and self._open is not None and self.unprotected != "allow"
        return list(self._found.moving.values()) if held else ()

    def _reference(self, site: LinearMap, starts_at_0: bool) -> Tensor:
        """W_ref: what the state of a task in progress brought along, else the weight as it is, or 0."""
        W = site.matrix(site.weight)
        stored = None if self.branch == "fresh" else self._references.get(site.name)
        if stored is None:
            return work(torch.zeros_like(W) if starts_at_0 else W)
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

    def parameters(self) -> Sequence[nn.Parameter]:
        return [site.weight for group in self._groups for site in group.sites]

    def watches(self) -> Sequence[nn.Parameter]:
        soft = self.strength < 1 and self.on != "gradient"
        return self.parameters() if soft else ()

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
        batches = task.batches or self._batches
        if batches is None and self._open is not None:
            raise RuleError("SubspaceProjection reads the task's inputs when it ends: give `batches` to attach()")
        self._closed()
        self._forget_task()
        assert batches is not None
        self.observe(task.model, batches)
        if self.probes:
            self._probes.add(task.model, batches(), self.probes)

    def _forget_task(self) -> None:
        self._batches, self._groups, self._model, self._buffers = None, [], None, {}

    def observe(self, model: nn.Module, batches: Batches) -> None:
        """Protect what the model computes of these inputs from now on; called by `end_task`.

        Called before the first task with inputs of another kind (generic text, image-text pairs), it protects what the
        model could do before. LoRA and adapters, whose B is 0 then, are kept from reading these inputs: A M = 0 from
        the next `begin_task` on, and B is free in the first task. The tuner must be attached. Where several processes
        train one model, each may give its own: what they see is added up.

        Raises:
            RuleError: no batches, a layer that is not called, or layers that shared an input and no longer do.
        """
        sites = protected(model, self.branch, self.prompts).sites
        unread = {B.name for _, B in unused_products(model, sites)}
        self._memory.observe(model, sites, batches, unread)

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
        if self.unit_tokens not in (None, self._memory.unit):
            raise RuleError(
                f"the memory of old inputs was made with unit_tokens={self._memory.unit}: leave the setting out, or "
                "set it so"
            )
        self._references = {key: value.clone() for key, value in parts["reference"].items()}
        self._probes = Probes.restore(parts["probe"])
        self._open = None
        self._forget_task()

    @torch.no_grad()
    def guarantee(self) -> list[Measurement]:
        """Leak and drift of the layer that is worst off, and how full the memory is. Empty for the first task.

        Promised with "update" or "both" at strength 1; observed figures otherwise.
        """
        found = certificates(self._memory, self._split_references())
        if not found or self._model is None:
            return []
        measured = measurements(found, self._memory, self.energy, self.cap, self.promises, self._unprotected)
        if self._buffers:
            measured.append(unseen_changes(changed_buffers(self._model, self._buffers), self.promises))
        if self._probes.tasks:
            whole = self.promises and self.energy == 1 and self.cap is None and self._memory.exact
            bound = 10 * worst(found)[0].leak_bound if whole else None
            measured.append(self._probes.measurement(self._model, bound, SOURCE))
        return measured

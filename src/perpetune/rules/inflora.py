"""InfLoRA: what a new LoRA reads is designed before training and frozen, outside of what old inputs span."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, RuleError
from ..core.measurement import Measurement
from ..tuners.linear_map import LinearMap
from .base import Rule, TaskContext
from .certificate import LEAK, unseen_changes
from .dual_gpm import DualBasis
from .linear_sites import Batches, linear_sites, see_inputs, shared_inputs
from .lora_penalty import work
from .lora_sites import lora_pairs
from .running_statistics import buffer_digests, changed_buffers, moving_modules
from .second_moments import SecondMoment
from .shards import cut, local


@dataclass
class InfLoRA(Rule):
    """Designs A of every new LoRA from the inputs X of its task, outside of the space span(M) of old inputs:

        rows of A = the leading r left singular vectors of (I - M M^T) X, over sqrt(3);

    only B is trained, so s B A x = 0 for old x in span(M), whatever the optimizer does to B. Where fewer than r
    directions are left, the other rows are 0. X is every token of the task's training inputs (d x n, in eval mode,
    padding left out), of which X X^T is gathered alone.

    M grows after every task t = 0, 1, ... by the fewest directions of that task's inputs such that
        |M M^T X|_F^2 >= epsilon_t |X|_F^2,   epsilon_t = first + (last - first) t / sessions   (DualGPM),
    and is kept as a basis of its complement once it has more than d / 2 columns. Layers that read one input share it.

    Source: Liang and Li, InfLoRA (2404.00228), whose B is our A. Its released code squares X X^T once more: its shares
    are those of sigma^4, of the first task it keeps one direction less, and it takes the singular vectors of
    (I - M M^T) X X^T, with any r of them where fewer are left.

    Args:
        first, last, sessions: see above; sessions is the number of tasks, and later ones stay at `last`.
        unprotected: what trains beside A and B (norms, embeddings, a head in the model): "error", or "allow", without a
            guarantee.

    Raises:
        ConfigError: a setting is out of range.
        RuleError: (from `begin_task`) no LoRA to act on, something else that trains, or no `batches`; a task after the
            first without a memory, or with one of other layers.
    """

    keeps_outputs = True
    first: float = 0.95
    last: float = 1.0
    sessions: int = 10
    unprotected: Literal["error", "allow"] = "error"
    _old: list[DualBasis] = field(init=False, repr=False, compare=False, default_factory=list)
    _reads: dict[str, int] = field(init=False, repr=False, compare=False, default_factory=dict)
    _tasks: int = field(init=False, repr=False, compare=False, default=0)
    _sites: list[LinearMap] = field(init=False, repr=False, compare=False, default_factory=list)
    _batches: Batches | None = field(init=False, repr=False, compare=False, default=None)
    _loose: bool = field(init=False, repr=False, compare=False, default=False)
    _read: float = field(init=False, repr=False, compare=False, default=1.0)
    _model: nn.Module | None = field(init=False, repr=False, compare=False, default=None)
    _buffers: dict[str, str] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.first <= self.last <= 1:
            raise ConfigError(f"InfLoRA: first={self.first}, last={self.last} must rise in (0, 1]")
        if self.unprotected not in ("error", "allow"):
            raise ConfigError(f"InfLoRA: unprotected=`{self.unprotected}` must be error or allow")
        if self.sessions < 1:
            raise ConfigError(f"InfLoRA: sessions={self.sessions} is the number of tasks: at least 1")

    @property
    def needs_branch(self) -> Literal["fresh"]:
        return "fresh"

    @property
    def epsilon(self) -> float:
        """Of the task in progress."""
        return self.first + (self.last - self.first) * min(1.0, self._tasks / self.sessions)

    def begin_task(self, task: TaskContext) -> None:
        pairs = lora_pairs(task.model)
        for pair in pairs:
            pair.A.requires_grad_(True)  # a model that goes on from the last task has it frozen
        A, own = {id(pair.A) for pair in pairs}, {id(p) for pair in pairs for p in (pair.A, pair.B)}
        self._sites = [site for site in linear_sites(task.model)[0] if id(site.weight) in A]
        loose = [name for name, p in task.model.named_parameters() if p.requires_grad and id(p) not in own]
        self._loose = bool(loose)
        if not self._sites:
            raise RuleError("InfLoRA designs A of LoRA in linear layers, and this model trains none: use a LoRA tuner")
        if loose and self.unprotected == "error":
            raise RuleError(
                f"InfLoRA cannot protect `{loose[0]}` ({len(loose)} such parameters train): freeze them, or set "
                "unprotected to `allow`"
            )
        if task.batches is None:
            raise RuleError("InfLoRA reads the task's inputs before it is learned: give `batches` to attach()")
        if not self._old and task.index > 0:
            raise RuleError(
                f"InfLoRA knows no past at task index {task.index}: keep the same rule for all tasks and call its "
                "end_task after each, or load its state"
            )
        self._opened(task)
        self._batches, shares = task.batches, []
        for old, (sites, C) in zip(*self._seen(task.model, task.batches), strict=True):
            values, U = old.spectrum(C)
            for site in sites:
                r = len(site.weight)
                designed = nn.functional.pad(U[:, :r], (0, r - U[:, :r].shape[1])) / math.sqrt(3)
                with torch.no_grad():
                    local(site.weight).copy_(cut(designed.mT, site.weight))
                site.weight.requires_grad_(False)
                site.weight.grad = None  # an optimizer that holds it leaves it alone, decay included
                shares.append(float(values[:r].sum() / C.trace().clamp_min(torch.finfo(C.dtype).tiny)))
        self._read, self._model = min(shares), task.model
        self._buffers = buffer_digests(task.model) if self._old else {}
        if not max(shares) > 0:
            task.say("InfLoRA: old inputs span all that this task reads, so it can learn nothing: lower first and last")

    def held_modules(self) -> Sequence[nn.Module]:
        held = self._old and self._model is not None and self.unprotected != "allow"
        return list(moving_modules(self._model).values()) if held and self._model is not None else ()

    def _seen(self, model: nn.Module, batches: Batches) -> tuple[list[DualBasis], list[tuple[list[LinearMap], Tensor]]]:
        """What is known of each input, and the layers that read it with X X^T (d x d, fp64, trace 1) as it is now."""
        shared = shared_inputs(model, self._sites, batches)
        reads = {site.name: i for i, group in enumerate(shared) for site in group}
        old = self._old or [DualBasis.empty(group[0].width) for group in shared]
        widths = [group[0].width for group in shared]
        if self._old and (reads != self._reads or widths != [len(known.basis) for known in old]):
            raise RuleError("the past of InfLoRA is of other layers or inputs: adapt the same layers in all tasks")
        moments = [SecondMoment(d, device=_exact(group[0].weight)) for d, group in zip(widths, shared, strict=True)]

        def see(site: LinearMap, X: Tensor, mask: Tensor | None) -> None:
            moments[reads[site.name]].add(X, mask)

        see_inputs(model, [group[0] for group in shared], batches(), see)
        self._reads = reads
        for moment in moments:
            moment.gather()
        seen = [moment.unit().C.cpu() for moment in moments]  # type: ignore[attr-defined]
        return old, list(zip(shared, seen, strict=True))

    @torch.no_grad()
    def guarantee(self) -> list[Measurement]:
        """That A reads nothing of the protected space, and how much there is left to read."""
        if not self._old or not self._sites:
            return []
        leaks = []
        for site in self._sites:
            A = work(site.weight).to("cpu", torch.float64)
            leaks.append(float(self._old[self._reads[site.name]].inside(A.mT).norm() / A.norm().clamp_min(1e-30)))
        source = type(self).__name__
        bound = None if self._loose else max(LEAK.get(site.weight.dtype, LEAK[torch.bfloat16]) for site in self._sites)
        used = [known.k / len(known.basis) for known in self._old]
        changed = changed_buffers(self._model, self._buffers) if self._model is not None else []
        return [
            Measurement(
                "old inputs that A reads |A M| / |A|", max(leaks), bound, "relative", source,
                "0 but for rounding: s B A x = 0 in the protected space, whatever B is",
            ),
            Measurement(
                "new inputs that A reads", self._read, None, "share", source,
                "share of the squared length of the task's inputs along the rows of A, in the worst layer",
            ),
            Measurement(
                "input directions in use", sum(used) / len(used), None, "share", source,
                "1: nothing more can be learned",
            ),
            *([unseen_changes(changed, not self._loose, source)] if self._buffers else []),
        ]  # fmt: skip

    def end_task(self, task: TaskContext) -> None:
        """
        Raises:
            RuleError: no task is begun.
        """
        batches = task.batches or self._batches
        if not self._sites or batches is None:
            raise RuleError("InfLoRA: end_task without a begin_task before it")
        old, seen = self._seen(task.model, batches)
        self._old = [known.grown(C, self.epsilon) for known, (_, C) in zip(old, seen, strict=True)]
        self._closed()
        self._tasks, self._sites, self._batches, self._model = self._tasks + 1, [], None, None

    def state(self) -> dict[str, Tensor]:
        """`tasks`, `reads.<layer>` (number of its input), `basis.<number>` or `complement.<number>`."""
        kept = {f"{'complement' if b.complement else 'basis'}.{i}": b.basis.clone() for i, b in enumerate(self._old)}
        reads = {f"reads.{name}": torch.tensor(index) for name, index in self._reads.items() if self._old}
        return {"tasks": torch.tensor(self._tasks), **reads, **kept}

    def load_state(self, state: dict[str, Tensor]) -> None:
        found: dict[int, DualBasis] = {}
        self._reads = {}
        for key, value in state.items():
            kind, _, rest = key.partition(".")
            if kind == "tasks":
                self._tasks = int(value)
            elif kind == "reads":
                self._reads[rest] = int(value)
            elif kind in ("basis", "complement") and rest.isdigit():
                found[int(rest)] = DualBasis(value.detach().clone(), kind == "complement")
            else:
                raise RuleError(f"`{key}` is no state of InfLoRA: expected tasks, reads., basis. or complement.")
        self._old = [found[i] for i in sorted(found)]
        self._sites, self._batches, self._model, self._open = [], None, None, None


def _exact(weight: Tensor) -> torch.device:
    return torch.device("cpu") if weight.device.type == "mps" else weight.device  # mps has no fp64

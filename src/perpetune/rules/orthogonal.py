"""O-LoRA: the new A is pushed away from all past A, at a cost that does not grow with the number of tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, RuleError
from ..core.measurement import Measurement
from .base import TaskContext
from .lora_penalty import LoraPenalty, check_strength, same_shape, stack, work


@dataclass
class Past:
    """What is kept of one layer's past A: K, either all their rows (R x d_in) or their Gram matrix (d_in x d_in)."""

    K: Tensor
    gram: bool = False

    def with_rows(self, A: Tensor, compress: bool) -> Past:
        """The past with one more A; `compress`: as a Gram matrix as soon as that makes the penalty cheaper."""
        if self.gram:
            return Past(torch.addmm(self.K, A.T, A), gram=True)
        rows = torch.cat([self.K, A])
        # (A K^T) K takes 2 r R d_in products, A K with the Gram matrix r d_in^2.
        if compress and rows.shape[0] > rows.shape[1] / 2:
            return Past(rows.T @ rows, gram=True)
        return Past(rows)

    def cosines(self, A: Tensor) -> Tensor:
        """(r,) cosine of the angle between each row of A and the span of all past rows, in fp64."""
        K, A = self.K.to("cpu", torch.float64), A.to("cpu", torch.float64)
        # Gram: eigenvectors V of K span the past. Rows: V = K^T U / sqrt(values), with U, values of the small K K^T.
        values, U = torch.linalg.eigh(K if self.gram else K @ K.T)
        kept = values > values[-1] * 1e-6  # rounding of K in fp32 makes smaller ones
        V = U[:, kept] if self.gram else (K.T @ U[:, kept]) / values[kept].sqrt()
        return (A @ V).norm(dim=1) / A.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)


@dataclass
class _Group:
    """Layers of one shape, for batched products: n factors A_t (r x d_in), K (n x R x d_in, or n x d_in x d_in)."""

    params: list[nn.Parameter]
    K: Tensor
    gram: bool


@dataclass
class OrthogonalToPast(LoraPenalty):
    """O-LoRA: a term that is 0 when the rows of the new A_t are orthogonal to those of all past A_i, i < t.

    "squared"   strength * sum over layers, i < t of ||A_i A_t^T||_F^2;   dA_t = 2 A_t G,  G = sum_i A_i^T A_i.
                Either the rows of all A_i are kept, A_past (R x d_in), or G (d_in x d_in) once R > d_in / 2:
                cost and memory are bounded, however many tasks there are.
    "absolute"  strength * sum over layers of |A_past A_t^T|, entrywise;   dA_t = sign(A_t A_past^T) A_past.
                The signs need every past row: nothing smaller will do, cost and memory grow linearly with the tasks.

    `norm_strength` adds norm_strength * (||A_t||_F + ||B_t||_F) per layer, not squared, in every task. Without it the
    term is also made small by shrinking A_t, for which B_t compensates. The scaling s is in none of the terms.
    In the first task (index 0) there is no past and the first term is nothing at all: gradients keep their bits.

    Sources: O-LoRA (2310.14152) for "squared"; its released code for "absolute" (published strength 0.5) and for
    `norm_strength` (its lambda_2, published default 0). The strengths of the two forms are not interchangeable.

    Args:
        strength: lambda of the orthogonality term.
        form: "squared" or "absolute".
        norm_strength: see above.
        before_clipping: see `LoraPenalty`; as released.

    Raises:
        ConfigError: a strength is negative or not finite, or the form is unknown.
        RuleError: (from `begin_task`) no LoRA to act on; a task after the first without a past, or with a past of other
            layers; a first task with a past; a term that is exactly 0 after the first task, so that it cannot act.
    """

    form: Literal["squared", "absolute"] = "squared"
    norm_strength: float = 0.0
    _past: dict[str, Past] = field(init=False, repr=False, compare=False, default_factory=dict)
    _groups: list[_Group] = field(init=False, repr=False, compare=False, default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_strength(self, "norm_strength")
        if self.form not in ("squared", "absolute"):
            raise ConfigError(f"OrthogonalToPast: form=`{self.form}` must be `squared` or `absolute`")

    @property
    def active(self) -> bool:
        return self.strength > 0 or self.norm_strength > 0

    def begin_task(self, task: TaskContext) -> None:
        super().begin_task(task)
        self._groups = []
        if self.strength == 0:
            return
        self._opened(task)
        if task.index == 0:
            if self._past:
                raise RuleError(
                    "OrthogonalToPast remembers earlier tasks, yet begins task index 0: "
                    "use a new rule for a new stream, or pass the task's index"
                )
            return
        if not self._past:
            raise RuleError(
                f"OrthogonalToPast knows no past at task index {task.index}: "
                "keep the same rule for all tasks and call its end_task after each, or load its state"
            )
        self._check_layers()
        self._stack_past()
        if not self._overlap().item() > 0:
            raise RuleError("OrthogonalToPast: A of this task or all past A are exactly 0, so the term cannot act")

    def _check_layers(self) -> None:
        now = {pair.name: pair.A.shape[1] for pair in self._pairs}
        past = {name: p.K.shape[1] for name, p in self._past.items()}
        wrong = sorted(name for name in now.keys() | past.keys() if now.get(name) != past.get(name))
        if wrong:
            name = wrong[0]
            has, had = (f"d_in = {d[name]}" if name in d else "no LoRA" for d in (now, past))
            raise RuleError(
                f"the past of OrthogonalToPast is of other layers: `{name}` has {has}, in earlier tasks {had} "
                f"({len(wrong)} of {len(now | past)} layers differ): adapt the same layers in all tasks"
            )
        if any(not pair.A.requires_grad for pair in self._pairs):
            raise RuleError("OrthogonalToPast shapes A, which this tuner keeps frozen: take the rule out")

    def _stack_past(self) -> None:
        for pairs in same_shape(self._pairs):
            kinds: dict[tuple, list] = {}
            for pair in pairs:
                past = self._past[pair.name]
                kinds.setdefault((past.gram, past.K.shape), []).append(pair)
            for (gram, _), members in kinds.items():
                like = work(members[0].A)
                K = torch.stack([self._past[p.name].K.to(like.device, like.dtype) for p in members])
                self._groups.append(_Group([p.A for p in members], K, gram))
                for pair, layer in zip(members, K, strict=True):  # views: the past is held once
                    self._past[pair.name] = Past(layer, gram)

    def terms(self) -> Iterator[tuple[Sequence[nn.Parameter], Sequence[Tensor], float]]:
        for group in self._groups:
            A = stack(group.params)  # n x r x d_in
            if self.form == "absolute":
                dA = torch.bmm(torch.bmm(A, group.K.mT).sign_(), group.K)
                yield group.params, dA.unbind(), self.strength
            else:
                dA = torch.bmm(A if group.gram else torch.bmm(A, group.K.mT), group.K)
                yield group.params, dA.unbind(), 2 * self.strength
        if self.norm_strength:
            params = [p for pair in self._pairs for p in (pair.A, pair.B)]
            values = [work(p) for p in params]
            norms = torch._foreach_norm(values)
            torch._foreach_clamp_min_(norms, torch.finfo(torch.float32).tiny)  # B begins at 0, where the slope is 0 too
            yield params, torch._foreach_div(values, norms), self.norm_strength

    @torch.no_grad()
    def _overlap(self) -> Tensor:
        """The orthogonality term without its strength."""
        total = torch.zeros((), dtype=torch.float64)
        for group in self._groups:
            A = stack(group.params)
            M = torch.bmm(A, group.K if group.gram else group.K.mT)  # A G or A A_past^T
            term = (M * A).sum() if group.gram else M.abs().sum() if self.form == "absolute" else M.square().sum()
            total += term.to("cpu", torch.float64)
        return total

    @torch.no_grad()
    def penalty(self) -> Tensor:
        norms = sum((work(p).norm().cpu() for pair in self._pairs for p in (pair.A, pair.B)), torch.zeros(()))
        return self.strength * self._overlap() + self.norm_strength * norms

    @torch.no_grad()
    def guarantee(self) -> list[Measurement]:
        """How orthogonal A_t became: observed figures, a penalty promises none of them. Empty for the first task."""
        if not self._groups:
            return []
        largest = max(self._past[pair.name].cosines(work(pair.A)).max().item() for pair in self._pairs)
        what = "||A_i A_t^T||_F^2" if self.form == "squared" else "|A_i A_t^T|, entrywise,"
        return [
            Measurement(
                "largest |cosine| of a row of A to the span of past A", largest, None, "", type(self).__name__,
                "0: no direction that an earlier task reads is read again. 1: one is shared entirely.",
            ),
            Measurement(
                "overlap of A with past A", self._overlap().item(), None, "", type(self).__name__,
                f"Sum over layers and past tasks of {what} scaling s not included.",
            ),
        ]  # fmt: skip

    @torch.no_grad()
    def end_task(self, task: TaskContext) -> None:
        if self.strength == 0:
            return
        self._closed()
        for pair in self._pairs:
            A = work(pair.A)
            past = self._past.get(pair.name, Past(A.new_empty(0, A.shape[1])))
            self._past[pair.name] = past.with_rows(A, compress=self.form == "squared")
        self._pairs, self._groups = [], []

    def state(self) -> dict[str, Tensor]:
        """`<layer>.gram` or `<layer>.rows` for each layer, on the CPU."""
        return {
            f"{name}.{'gram' if past.gram else 'rows'}": past.K.detach().cpu().clone()
            for name, past in self._past.items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`; whether the layers are those of the model is checked when the next task begins.

        Raises:
            RuleError: tensors that are not this rule's, or Gram matrices for the absolute form, which needs rows.
        """
        past = {}
        for key, K in state.items():
            name, _, kind = key.rpartition(".")
            if kind not in ("rows", "gram") or K.ndim != 2 or (kind == "gram" and K.shape[0] != K.shape[1]):
                raise RuleError(
                    f"`{key}` {tuple(K.shape)} is no state of OrthogonalToPast: expected `<layer>.rows` or `.gram`"
                )
            if kind == "gram" and self.form == "absolute":
                raise RuleError(f"`{key}`: the absolute form needs all past rows, this state is of the squared form")
            past[name] = Past(K.detach().clone(), gram=kind == "gram")
        self._past, self._pairs, self._groups, self._open = past, [], [], None

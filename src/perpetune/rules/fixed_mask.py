"""Child-Tuning-D and SAM: a mask chosen by the task's own gradients before it begins; what lies outside never moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, RuleError
from ..core.measurement import Measurement
from ..core.processes import together
from .base import Rule, TaskContext
from .lora_penalty import work
from .mask_bits import as_bits, pieces, restore
from .mask_scores import Clip, burn_in, gradient_scores, leaves
from .mask_selection import check_keep, largest, mixed, pack, unpack
from .shards import cut, gathered, local, plain_name

CHOICES = {
    "score": ("fisher", "gradient", "absolute", "magnitude", "random"),
    "scope": ("global", "per_tensor"),
    "embeddings": ("masked", "free", "frozen"),
    "clip": ("none", "per_tensor", "global"),
}


@dataclass
class FixedMask(Rule):
    """Only the share `keep` of the entries with the highest scores may move; all others keep their bits.

    The mask M is chosen once, before the first task, at the weights as they are then:
        "fisher"     sum_j (d loss_j / d w)^2   the diagonal of the empirical Fisher information, up to a factor
        "gradient"   |sum_j d loss_j / d w|     the gradient of all examples together
        "absolute"   sum_j |d loss_j / d w|
        "magnitude"  |w|
        "random"     the same chance for every entry
    with loss_j the mean loss of the j-th `batch` examples. "global" keeps int(keep * m) of all m entries, "per_tensor"
    int(keep * numel) of each tensor, none of a small one. The numbers are exact: of equal scores the first are kept.

    In training g <- M * g before each step, and what lies outside M returns to the values that it had when the task
    began, after it: neither weight decay, Adam's moments nor rounding can move it.

    It acts on all weights of the model that train, and on no head: in your own loop, give `attach` the encoder alone.
    It says which entries may move, and protects nothing that earlier tasks wrote into them. The mask is stored, not
    chosen again, for scores of weights that are tuned already are others.

    Sources: Child-Tuning-D, Xu et al., 2109.05687 ("fisher"); SAM, second-order approximation method, Fu et al.,
    2211.15583 ("gradient": as it is run, the method is of first order).

    Args:
        keep: share of the entries that may move.
        score, scope: see above.
        embeddings: weights of `nn.Embedding`: "masked" as all others, "free" (trained without a mask, not counted), or
            "frozen".
        each_task: choose anew before every task. The change of all tasks together is then less sparse than keep.
        examples: look at the first so many only, of several processes each at its part of them; None looks at all,
            once.
        batch: examples to a gradient; 1 is what the Fisher information means, and takes a backward pass for each.
        clip: scale gradients down to norm 1 before they are added up: "per_tensor", "global" (over the weights that
            are scored) or "none".
        dropout: leave dropout on while looking.
        seed: what random scores, and dropout while looking, are drawn from.

    Raises:
        ConfigError: a setting is out of range, or would have no effect.
        RuleError: (from `begin_task`) nothing to act on, no losses, scores that are all 0 or not finite, an empty mask;
            a task after the first without a mask, or with one of another model.
    """

    keep: float = 0.3
    score: Literal["fisher", "gradient", "absolute", "magnitude", "random"] = "fisher"
    scope: Literal["global", "per_tensor"] = "global"
    embeddings: Literal["masked", "free", "frozen"] = "masked"
    each_task: bool = False
    examples: int | None = None
    batch: int = 1
    clip: Clip = "none"
    dropout: bool = False
    seed: int = 0
    _bits: dict[str, Tensor] = field(init=False, repr=False, compare=False, default_factory=dict)
    _chosen_at: int = field(init=False, repr=False, compare=False, default=0)
    # while a task goes on: parameter, what lies outside the mask (bool), values when the task began
    _masked: list[tuple[nn.Parameter, Tensor, Tensor]] = field(
        init=False, repr=False, compare=False, default_factory=list
    )

    def __post_init__(self) -> None:
        check_keep(self, self.keep, self.seed)
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"FixedMask: {name}=`{getattr(self, name)}` must be {', '.join(known)}")
        if self.batch < 1 or (self.examples is not None and self.examples < 1):
            raise ConfigError(f"FixedMask: examples={self.examples}, batch={self.batch} must be at least 1")
        looks = (self.examples, self.batch, self.clip, self.dropout)
        if not self.needs_losses and looks != (None, 1, "none", False):
            raise ConfigError(
                f"FixedMask: score=`{self.score}` looks at no gradients: leave examples, batch, clip and dropout out"
            )

    @property
    def needs_losses(self) -> bool:
        return self.score in ("fisher", "gradient", "absolute")

    # ---- the task ----

    def begin_task(self, task: TaskContext) -> None:
        params = self._parameters(task.model)
        stale = self.each_task and self._chosen_at != task.index
        if not self._bits or stale:
            if task.index > 0 and not self.each_task:
                raise RuleError(
                    f"FixedMask has no mask at task index {task.index}, and chooses none by weights that are tuned "
                    "already: keep the same rule for all tasks, load its state, or set each_task"
                )
            masks = self._choose(task, params)
            self._bits = {name: pack(mask) for name, mask in zip(params, masks, strict=True)}
            self._chosen_at = task.index
        sizes = {name: -(-p.numel() // 8) for name, p in params.items()}
        if sizes != {name: len(bits) for name, bits in self._bits.items()}:
            name = next(iter({*sizes.items()} ^ {(name, len(bits)) for name, bits in self._bits.items()}))[0]
            raise RuleError(
                f"the mask of FixedMask is of another model: `{name}` differs; use the model it was made with"
            )
        self._open = task.index
        self._masked = [
            (p, cut(~unpack(self._bits[name], like=p.detach()), p), local(p.detach()).clone())
            for name, p in params.items()
        ]

    def _parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """What is masked, by name; embeddings are frozen here where they are to be."""
        tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
        found = {}
        for full_name, p in model.named_parameters():
            name = plain_name(full_name)
            if not p.requires_grad:
                continue
            if self.embeddings == "masked" or id(p) not in tables:
                found[name] = p
            elif self.embeddings == "frozen":
                p.requires_grad_(False)
                p.grad = None  # an optimizer that holds it leaves it alone, decay included
        if not found:
            raise RuleError(
                "FixedMask acts on weights that train, and this model has none to mask: use a tuner that trains some "
                "(AllWeights, LoRA), or take the rule out"
            )
        return found

    def _choose(self, task: TaskContext, params: dict[str, nn.Parameter]) -> list[Tensor]:
        groups = self._groups([p.numel() for p in params.values()])
        if not any(k for _, k in groups):
            raise RuleError(f"FixedMask: keep={self.keep} of so few entries is none: raise it, or use scope `global`")
        scores = self._scores(task, list(params.values()))
        if not all(s.isfinite().all() for s in scores):
            raise RuleError("FixedMask: scores are not finite: look at the weights and at the loss of the first batch")
        if not any(s.any() for s in scores):
            raise RuleError(
                f"FixedMask: all scores `{self.score}` are 0, the loss does not reach the weights: look at the head"
            )
        return [mask for part, k in groups for mask in largest(scores[part], k)]

    def _groups(self, sizes: Sequence[int]) -> list[tuple[slice, int]]:
        """Tensors that compete with one another, and how many of their entries are kept."""
        if self.scope == "global":
            return [(slice(None), int(self.keep * sum(sizes)))]
        return [(slice(i, i + 1), int(self.keep * n)) for i, n in enumerate(sizes)]

    def _scores(self, task: TaskContext, params: Sequence[nn.Parameter]) -> list[Tensor]:
        seed = mixed(self.seed, task.index)
        if self.score == "magnitude":
            scores = [work(p).abs() for p in params]
        elif self.score == "random":
            draw = torch.Generator().manual_seed(seed)
            scores = [torch.rand(p.shape, generator=draw).to(p.device) for p in params]
        else:
            if task.losses is None:
                raise RuleError(f"FixedMask: score `{self.score}` looks at gradients: give `losses` to attach()")
            at_most = None if self.examples is None else -(-self.examples // (self.batch * together()))
            with burn_in(task.model, dropout=self.dropout, seed=seed):
                found = gradient_scores(
                    task.losses(self.batch), leaves(task.model, params), self.score, self.clip, at_most
                )
            if found is None:
                raise RuleError("FixedMask: the task has no training example to choose a mask by")
            scores = found
        double = any(s.dtype == torch.float64 for s in scores)
        return [s.double() for s in scores] if double else scores

    def parameters(self) -> Sequence[nn.Parameter]:
        return [p for p, _, _ in self._masked]

    # ---- the step ----

    @torch.no_grad()
    def on_gradient(self) -> None:
        for p, outside, _ in self._masked:
            for g, out in () if p.grad is None else zip(pieces(p.grad), pieces(outside), strict=True):
                as_bits(g).bitwise_and_(_inside(out))

    @torch.no_grad()
    def on_update(self, before: Sequence[Tensor]) -> None:
        for p, outside, start in self._masked:
            for w, w_start, out in zip(pieces(p), pieces(start), pieces(outside), strict=True):
                restore(w, w_start, _inside(out))

    def end_task(self, task: TaskContext) -> None:
        self._closed()
        self._masked = []

    # ---- what survives, what is promised ----

    def state(self) -> dict[str, Tensor]:
        """`mask.<parameter>`: one bit an entry (uint8); `chosen_at`: the number of the task that it was chosen for."""
        if not self._bits:
            return {}
        masks = {f"mask.{name}": bits.clone() for name, bits in self._bits.items()}
        return {**masks, "chosen_at": torch.tensor(self._chosen_at)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`; whether the mask fits the model is checked when the next task begins.

        Raises:
            RuleError: tensors that are not this rule's.
        """
        bits, rest = {}, dict(state)
        chosen_at = int(rest.pop("chosen_at", torch.tensor(0)))
        for key, value in rest.items():
            kind, _, name = key.partition(".")
            if kind != "mask" or value.dtype != torch.uint8 or value.ndim != 1:
                raise RuleError(f"`{key}` {tuple(value.shape)} is no state of FixedMask: expected `mask.<parameter>`")
            bits[name] = value.cpu().clone()
        self._bits, self._chosen_at, self._masked, self._open = bits, chosen_at, [], None

    @torch.no_grad()
    def guarantee(self) -> list[Measurement]:
        """How many entries the mask holds, how many outside it are not what they were, how many moved at all."""
        if not self._masked:
            return []
        entries = kept = moved = escaped = 0
        for p, out, start in self._masked:
            changed = gathered(as_bits(local(p.detach())) != as_bits(start), p)  # so that -0 is not 0
            outside = gathered(out, p)
            entries += p.numel()
            kept += p.numel() - int(outside.sum())
            moved += int(changed.sum())
            escaped += int((changed & outside).sum())
        budget = sum(k for _, k in self._groups([p.numel() for p, _, _ in self._masked]))
        source = type(self).__name__
        return [
            Measurement(
                "entries in the mask", kept, budget, "", source,
                f"Of {entries} entries of the weights that are masked; the others keep their values to the bit.",
            ),
            Measurement(
                "entries outside the mask that changed", escaped, 0, "", source, "Compared bit by bit.",
            ),
            Measurement(
                "entries that moved", moved / entries, None, "share", source,
                "Of all entries that are masked, in the task just trained.",
            ),
        ]  # fmt: skip


def _inside(outside: Tensor) -> Tensor:
    """True -> 0, False -> -1, a byte each."""
    return outside.view(torch.int8) - 1

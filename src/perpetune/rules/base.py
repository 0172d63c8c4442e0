"""The rule slot: how each optimizer step is shaped, and how a rule hangs on any torch optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.errors import RuleError
from ..core.measurement import Measurement
from ..tuners.peft_tuner import changes_base
from .before_clipping import BeforeClipping
from .running_statistics import in_eval_mode
from .shards import check_frozen, check_parallel, local, reshard, unwrapped

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class TaskContext:
    """What a rule is told when a task begins.

    Attributes:
        model: the module that is trained, tuner attached; out of DDP and `torch.compile`, if it is given in them.
        index: 0-based number of the task.
        batches: call it for an iterator over the task's training inputs, as keyword arguments of `model`
            (eval-time preprocessing, no augmentation), for rules that look at data; None where there is none to give.
            Of several processes, each may give those that it trains on: what they find is added up.
        losses: `losses(n)` iterates over the task's training loss, as the mean over n examples at a time, ready for
            `backward()`; for rules that look at gradients before the task begins. None where there is none to give.
        say: tells the user something about this task.
    """

    model: nn.Module
    index: int
    batches: Callable[[], Iterable[dict[str, Tensor]]] | None = None
    losses: Callable[[int], Iterable[Tensor]] | None = None
    say: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", unwrapped(self.model))


@dataclass
class Rule:
    """One rule. Subclasses are dataclasses whose fields are its settings; state lives in `init=False` fields.

    A rule names the parameters that it acts on in `begin_task`; nothing is looked up by name during a step.
    `on_gradient` runs before every optimizer step and edits `.grad` in place; `on_update(before)` runs after it, with
    the values that the parameters listed by `watches()` had before the step: of sharded ones (FSDP2), the rows that
    this process holds.
    """

    # number of the task that has begun and not ended, and whether a step was made in it
    _open: int | None = field(init=False, repr=False, compare=False, default=None)
    _stepped: bool = field(init=False, repr=False, compare=False, default=False)
    keeps_outputs: ClassVar[bool] = False  # it promises that what W computes of old inputs stays

    @property
    def needs_branch(self) -> Literal["kept", "fresh"] | None:
        """What is taken for granted: that tasks share one tuner ("kept"), that each starts with a new one which is
        merged or stacked afterwards ("fresh"), or nothing (None)."""
        return None

    def begin_task(self, task: TaskContext) -> None:
        """Find the parameters to act on.

        Raises:
            RuleError: there is nothing to act on; the message says why and what to do.
        """

    def _opened(self, task: TaskContext) -> None:
        """Note that a task begins; called by the `begin_task` of rules that remember.

        Raises:
            RuleError: the task before was trained and never ended, so that nothing of it would be remembered.
        """
        if self._open is not None and self._stepped:
            name = type(self).__name__
            raise RuleError(
                f"{name}: task index {self._open} was trained and not ended, so nothing of it is remembered: call "
                f"end_task(pt.TaskContext(model, {self._open})) of the rule after each task; to go on with the same "
                "task, attach with begin=False"
            )
        self._open, self._stepped = task.index, False

    def _closed(self) -> None:
        """Note that the task ends.

        Raises:
            RuleError: none has begun.
        """
        if self._open is None:
            raise RuleError(f"{type(self).__name__}: end_task without a begin_task before it")
        self._open, self._stepped = None, False

    def held_modules(self) -> Sequence[nn.Module]:
        """Modules that stay in eval mode while the rule acts, since training mode changes their buffers."""
        return ()

    def on_gradient(self) -> None:
        """Edit gradients in place, before the step."""

    def parameters(self) -> Sequence[nn.Parameter]:
        """What the rule acts on while this task is trained. Whatever of it trains must be in the optimizer."""
        return self.watches()

    def watches(self) -> Sequence[nn.Parameter]:
        """Parameters whose values before the step `on_update` needs. Empty: no copies are kept."""
        return ()

    def on_update(self, before: Sequence[Tensor]) -> None:
        """Edit parameters in place, after the step; `before` matches `watches()`."""

    def end_task(self, task: TaskContext) -> None:
        """Remember what later tasks will need. Called with the trained tuner still attached."""

    def state(self) -> dict[str, Tensor]:
        """What must survive the process, tensors only."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`."""

    def guarantee(self) -> list[Measurement]:
        """What the rule promises of the task just trained, measured. Called after training, before `end_task`."""
        return []


@dataclass
class Attached:
    """Rules that hang on an optimizer; `remove()` takes them off again."""

    rules: Sequence[Rule]
    handles: list[RemovableHandle] = field(default_factory=list)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rules: Sequence[Rule],
    *,
    index: int = 0,
    batches: Callable[[], Iterable[dict[str, Tensor]]] | None = None,
    losses: Callable[[int], Iterable[Tensor]] | None = None,
    begin: bool = True,
    scaler: Any = None,
) -> Attached:
    """Hang rules on an optimizer, in any training loop: plain PyTorch, Trainer, TRL, Accelerate, Lightning.

    Works through the optimizer's own step hooks, so penalties are added once per optimizer step whatever the gradient
    accumulation, and what a rule does to the update is done after Adam's scaling, momentum and weight decay.

    Args:
        model: the model that is trained, tuner attached.
        optimizer: its optimizer (the torch one; a wrapper that has `.optimizer` is unwrapped).
        rules: in the order in which they act.
        index: 0-based number of the task.
        batches, losses: see `TaskContext`.
        begin: call each rule's `begin_task` first; False where the caller has done so.
        scaler: the loop's `torch.amp.GradScaler`, if there is one; needed by rules with `before_clipping`.

    Returns:
        A handle whose `remove()` detaches the rules.

    Raises:
        RuleError: a rule finds nothing to act on, or promises that old outputs stay while the adapter's initialisation
            has changed the base; what a rule holds is not in the optimizer; DeepSpeed, FSDP1 or DataParallel. (From a
            step) a `scaler` is missing.

    Example:
        >>> attached = pt.attach(model, optimizer, [pt.ProductL1(1e-5)])
        >>> ...                                       # any loop that calls optimizer.step()
        >>> attached.remove()
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    check_parallel(model, optimizer)
    _check_base_kept(model, rules)
    reshard(model)  # so that rules hold the shards that train
    if begin:
        said: list[str] = []
        trained = [p for p in model.parameters() if p.requires_grad]
        context = TaskContext(model, index, batches, losses, said.append)
        for rule in rules:
            rule.begin_task(context)
        for text in said:
            warnings.warn(text, stacklevel=2)
        check_frozen(model, trained)
    _check_held(model, inner, rules)
    updating = [rule for rule in rules if type(rule).on_update is not Rule.on_update]
    watched: list[tuple[Rule, list[Tensor]]] = [(rule, list(rule.watches())) for rule in updating]
    penalties: list[Any] = [rule for rule in rules if getattr(rule, "before_clipping", False)]
    early = BeforeClipping(penalties, scaler) if penalties else None
    before: list[list[Tensor]] = [[torch.empty_like(local(p)) for p in params] for _, params in watched]

    @torch.no_grad()
    def shape_gradient() -> None:
        if early is not None and early.added and scaler is None and getattr(inner, "grad_scale", None) is not None:
            raise RuleError(
                "penalties before clipping must know the loss scale: give attach() the `scaler` of the loop"
            )
        _unscale(inner)
        if early is not None:
            early.rest()
        for rule in rules:
            rule._stepped = True
            rule.on_gradient()

    @torch.no_grad()
    def pre_step(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for (_rule, params), copies in zip(watched, before, strict=True):
            if params:
                torch._foreach_copy_(copies, [local(p) for p in params])
        # step(closure) computes the gradients inside the step (Lightning, L-BFGS): rules must act after that
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            shape_gradient()
            return args, kwargs

        def shaped() -> Any:
            with torch.enable_grad():
                loss = closure()
            shape_gradient()
            return loss

        if len(args) > 1:
            return (args[0], shaped, *args[2:]), kwargs
        return args, {**kwargs, "closure": shaped}

    @torch.no_grad()
    def post_step(*_: object) -> None:
        for (rule, _params), copies in zip(watched, before, strict=True):
            rule.on_update(copies)
        if early is not None:
            early.stepped()

    handles = [inner.register_step_pre_hook(pre_step)]
    handles += in_eval_mode(module for rule in rules for module in rule.held_modules())
    if watched or early is not None:
        handles.append(inner.register_step_post_hook(post_step))
    handles += early.handles if early is not None else []
    return Attached(rules, handles)


def _unscale(optimizer: Any) -> None:
    """Divide gradients by the loss scale where the step itself would: what rules add must not be divided.

    A fused optimizer gets the scale of `torch.amp.GradScaler` as its attribute `grad_scale`, None after `unscale_`.
    """
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                p.grad.mul_(scale.double().reciprocal().to(p.grad.device, torch.float32))
    optimizer.grad_scale = None


def _check_held(model: nn.Module, optimizer: torch.optim.Optimizer, rules: Sequence[Rule]) -> None:
    """
    Raises:
        RuleError: a rule would be without effect, for the optimizer steps on other tensors than the rule holds.
    """
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = {id(p): name for name, p in model.named_parameters()}
    for rule in rules:
        held = [p for p in rule.parameters() if p.requires_grad]
        lost = [p for p in held if id(p) not in stepped]
        if lost:
            name = names.get(id(lost[0]))
            what = f"`{name}`" if name else "a tensor that is no longer in the model"
            raise RuleError(
                f"{type(rule).__name__} holds {what} ({len(lost)} of {len(held)} tensors), and the optimizer does not, "
                "so the rule could not act: prepare, shard or compile the model, then make the optimizer, then attach"
            )


def _check_base_kept(model: nn.Module, rules: Sequence[Rule]) -> None:
    keeping = [type(rule).__name__ for rule in rules if rule.keeps_outputs]
    configs = [c for m in model.modules() for c in (getattr(m, "peft_config", None) or {}).values() if changes_base(c)]
    if keeping and configs:
        raise RuleError(
            f"{keeping[0]} keeps what the base computes of old inputs, and init_lora_weights="
            f"`{configs[0].init_lora_weights}` takes a part of the base away for every new adapter: make the adapter "
            "with init_lora_weights=True"
        )

"""LoRA over a sequence of tasks, and the regularisers that keep its updates apart."""

from __future__ import annotations

from typing import Any, Literal

from ..consolidation import Continue, Merge, Stack
from ..rules import OrthogonalToPast, ProductL1, ReleasedProductL1
from ..tuners import QUERY_VALUE
from .recipe import Recipe

SQUARED_STRENGTH = 0.5  # of OrthogonalToPast's squared form: docs/results/strengths_text.md


def lora_config(rank: int, alpha: float | None, target: str | list[str], dropout: float) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=alpha if alpha is not None else 4 * rank,  # type: ignore[arg-type]
        target_modules=target,
        lora_dropout=dropout,
    )


def sequential_lora(
    rank: int = 8, alpha: float | None = None, target: str | list[str] = QUERY_VALUE, dropout: float = 0.0
) -> Recipe:
    """One LoRA all the way: nothing against forgetting.

    LoRA: Hu et al., 2106.09685. `alpha` defaults to 4 * rank, the scale s = 4 of the O-LoRA and N-LoRA scripts.
    """
    return Recipe(lora_config(rank, alpha, target, dropout), [], Continue(), training=LORA_TRAINING)


def lora(
    rank: int = 8, alpha: float | None = None, target: str | list[str] = QUERY_VALUE, dropout: float = 0.0
) -> Recipe:
    """A fresh LoRA for every task, merged: nothing against forgetting ("IncLoRA" in the O-LoRA paper)."""
    return Recipe(lora_config(rank, alpha, target, dropout), [], Merge(), training=LORA_TRAINING)


def olora(
    rank: int = 8,
    alpha: float | None = None,
    target: str | list[str] = QUERY_VALUE,
    dropout: float = 0.0,
    strength: float = SQUARED_STRENGTH,
) -> Recipe:
    """O-LoRA: the new A orthogonal to all past A; past adapters merged, as in the paper.

    Wang et al., Orthogonal Subspace Learning for Language Model Continual Learning, 2310.14152 (EMNLP Findings 2023).
    Published: r = 8, alpha = 32, dropout 0.1 (ours 0), learning rate 1e-3 (ours 5e-4), and strength (lambda_1) 0.5 for
    most tasks, 5 for some, of the absolute form (`olora_released`). The squared form is our reading of the paper's
    norm, and its slope is 27 (d = 384) to 84 (d = 4096) times less. Its default is from a table of strengths in
    decades: larger ones bring A no further from past A, and move old features more.
    """
    return Recipe(
        lora_config(rank, alpha, target, dropout), [OrthogonalToPast(strength)], Merge(), training=LORA_TRAINING
    )


def olora_released(
    rank: int = 8,
    alpha: float | None = None,
    target: str | list[str] = QUERY_VALUE,
    dropout: float = 0.1,
    strength: float = 0.5,
    norm_strength: float = 0.0,
) -> Recipe:
    """O-LoRA as its code computes it: sum of absolute values, past adapters concatenated and never merged.

    As in its trainer, gradients of loss and penalty are clipped together (`max_grad_norm`, 1 by default and as
    published): a large penalty leaves little of the loss in a step. Published: r = 8, alpha = 32, dropout 0.1, learning
    rate 1e-3 (ours 5e-4), no weight decay (ours that of the run), strength 0.5 for most tasks, 0 and 5 for some.

    One difference remains: the released code drops out past and new branch with one mask, peft draws one for each.
    """
    form: Literal["absolute"] = "absolute"
    rule = OrthogonalToPast(strength, form=form, norm_strength=norm_strength, before_clipping=True)
    return Recipe(lora_config(rank, alpha, target, dropout), [rule], Stack(), training=LORA_TRAINING)


def nlora(
    rank: int = 8,
    alpha: float | None = None,
    target: str | list[str] = QUERY_VALUE,
    dropout: float = 0.0,
    strength: float = 1e-4,
) -> Recipe:
    """N-LoRA: l1 on the change itself, ||B A||_1, so that the changes of different tasks collide in few entries.

    Yang et al., Is Parameter Collision Hindering Continual Learning in LLMs?, 2410.10179. The published 0.4 belongs to
    the r x r product of the released code; this form sums d_out * d_in entries and needs a smaller strength, to be
    chosen on validation data.
    """
    return Recipe(lora_config(rank, alpha, target, dropout), [ProductL1(strength)], Merge(), training=LORA_TRAINING)


def nlora_released(
    rank: int = 8,
    alpha: float | None = None,
    target: str | list[str] = QUERY_VALUE,
    dropout: float = 0.1,
    strength: float = 0.4,
) -> Recipe:
    """N-LoRA as its code computes it: l1 on the r x r product A B (square layers only), past adapters concatenated.

    As in its trainer, gradients of loss and penalty are clipped together (`max_grad_norm`, 1 by default and as
    published). Published: r = 8, alpha = 32, dropout 0.1, learning rate 5e-4 to 1e-3 (ours 5e-4), no weight decay (ours
    that of the run), 10 epochs, strength 0.4 to 1.8.
    """
    rule = ReleasedProductL1(strength, before_clipping=True)
    return Recipe(lora_config(rank, alpha, target, dropout), [rule], Stack(), training=LORA_TRAINING)


def olora_nlora(
    rank: int = 8,
    alpha: float | None = None,
    target: str | list[str] = QUERY_VALUE,
    dropout: float = 0.0,
    orthogonal: float = SQUARED_STRENGTH,
    sparse: float = 1e-4,
) -> Recipe:
    """O-LoRA and N-LoRA together (section "combination" of 2410.10179; no code and no per-order figures published)."""
    rules = [OrthogonalToPast(orthogonal), ProductL1(sparse)]
    return Recipe(lora_config(rank, alpha, target, dropout), rules, Merge(), training=LORA_TRAINING)


LORA_TRAINING = {"learning_rate": 5e-4}

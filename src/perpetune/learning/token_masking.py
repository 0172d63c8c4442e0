"""Selective token masking (STM, 2501.14315): what the untouched model finds hardest to say carries no loss."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch

from ..models.backbone import Examples
from ..models.language_model import IGNORED, LanguageBackbone

if TYPE_CHECKING:
    from .state import LearnerState

STM = "stm"  # the training setting: the perplexity from which on a token is masked; 2.5 in the paper


def mask_tokens(state: LearnerState, task: str, examples: Examples, threshold: float) -> str:
    """Give examples `targets`: the tokens of their responses, -100 where exp(-log p_0(token | what is before)) is above
    the threshold. p_0 is the model as it was loaded, read once more from its files.

    Returns:
        What to say of it: how many tokens carry no loss.
    """
    backbone = state.setup.load_base("language", state.backbone.fingerprint)
    found = masked(cast(LanguageBackbone, backbone), examples, threshold, state.setup.batch_size)
    total, lost = sum(map(len, found)), sum(t == IGNORED for targets in found for t in targets)
    for example, targets in zip(examples, found, strict=True):
        example["targets"] = targets
    return (
        f"task `{task}`: {lost} of {total} tokens of responses ({lost / max(1, total):.1%}) have a perplexity above "
        f"{threshold:g} under the untouched model, and carry no loss (stm)"
    )


@torch.inference_mode()
def masked(backbone: LanguageBackbone, examples: Examples, threshold: float, batch_size: int) -> list[tuple[int, ...]]:
    """The targets of each example, see `mask_tokens`."""
    found: list[Any] = [()] * len(examples)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    backbone.eval()
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        log_p = backbone.token_log_p(**backbone.batch([examples[i] for i in rows])).cpu()
        for i, row in zip(rows, log_p, strict=True):
            answer = examples[i]["answer"]
            own = row[-len(answer) :] if backbone.start is None else row[: len(answer)]  # padded left, or right
            hard = (-own > math.log(threshold)).tolist()
            found[i] = tuple(IGNORED if skip else token for token, skip in zip(answer, hard, strict=True))
    return found

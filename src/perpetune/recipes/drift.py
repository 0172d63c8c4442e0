"""Sequential tuning whose statistics of earlier classes are carried along."""

from __future__ import annotations

from ..consolidation import Continue
from ..heads import Carried
from ..tuners import QUERY_VALUE
from .lora_family import LORA_TRAINING, lora_config
from .recipe import Recipe


def sequential_sldc(
    rank: int = 8,
    alpha: float | None = None,
    target: str | list[str] = QUERY_VALUE,
    dropout: float = 0.0,
    head: str = "lda",
    strength: float = 1e-4,
    temperature: float = 1.0,
    normalise: bool = True,
) -> Recipe:
    """SLDC, linear: one LoRA all the way; what was summed of earlier classes follows the drift of the new task.

    Rao et al., Compensating Distribution Drifts in Class-incremental Learning of Pre-trained Vision Transformers,
    2511.09926 (AAAI 2026), its form alpha_1. Published: a Gaussian for every class, and a linear classifier trained on
    samples of all of them; here discriminant analysis with one covariance, ridge, or class means (`head`), from the
    carried moments alone. Its weakly nonlinear form, distillation and auxiliary data are not here.
    """
    made = Carried(head, strength, temperature, normalise)
    return Recipe(lora_config(rank, alpha, target, dropout), [], Continue(), made, training=LORA_TRAINING)

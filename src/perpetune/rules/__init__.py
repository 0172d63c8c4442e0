"""What shapes an optimizer step."""

from __future__ import annotations

from .base import Attached, Rule, TaskContext, attach
from .fixed_mask import FixedMask
from .inflora import InfLoRA
from .lora_sites import LoraPair, lora_pairs
from .orthogonal import OrthogonalToPast
from .product_l1 import FactorL1, ProductL1, ReleasedProductL1
from .projection import SubspaceProjection
from .rotation_ball import RotationBall
from .soft_orthogonal import SoftOrthogonal
from .step_mask import StepMask
from .weight_projection import WeightProjection

RULES: dict[str, type[Rule]] = {
    "product_l1": ProductL1,
    "released_product_l1": ReleasedProductL1,
    "factor_l1": FactorL1,
    "orthogonal_to_past": OrthogonalToPast,
    "subspace_projection": SubspaceProjection,
    "step_mask": StepMask,
    "fixed_mask": FixedMask,
    "rotation_ball": RotationBall,
    "soft_orthogonal": SoftOrthogonal,
    "inflora": InfLoRA,
    "weight_projection": WeightProjection,
}

__all__ = [
    "RULES",
    "Attached",
    "FactorL1",
    "FixedMask",
    "InfLoRA",
    "LoraPair",
    "OrthogonalToPast",
    "ProductL1",
    "ReleasedProductL1",
    "RotationBall",
    "Rule",
    "SoftOrthogonal",
    "StepMask",
    "SubspaceProjection",
    "TaskContext",
    "WeightProjection",
    "attach",
    "lora_pairs",
]

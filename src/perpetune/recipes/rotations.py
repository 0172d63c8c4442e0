"""Rotations of what layers read: angles between neurons stay, and with strict forms their lengths.

A fresh rotation for every task, merged: W_t = W_{t-1} R_t^T. They keep the geometry of a layer's weights, not what it
computed of old inputs; nobody has shown that they retain earlier tasks of a stream.
"""

from __future__ import annotations

from typing import Any, Literal

from ..consolidation import Merge
from ..rules import RotationBall, SoftOrthogonal
from .recipe import Recipe

ALL_LINEAR = "all-linear"


def oft(block_size: int = 32, blocks: int | None = None, target: str | list[str] = ALL_LINEAR) -> Recipe:
    """OFT: block-diagonal rotations R = (I - Q)(I + Q)^-1, by the exact Cayley transform.

    Qiu et al., Controlling Text-to-Image Diffusion by Orthogonal Finetuning, 2306.07280. Published: 4 blocks to a layer
    (`blocks=4` instead of a size; fewer are better), in attention only. Their cost grows with the cube of the width:
    per layer 1.5 times LoRA's at 768 inputs and 4 times at 3072, against 1.04 and 1.1 with blocks of 32. Blocks of 16
    are published for DeBERTaV3 (2311.06243, 2404.04316). Learning rate: ours.
    """
    return Recipe(_oft(block_size, blocks, target), [], Merge(), training=ROTATION_TRAINING)


def coft(
    radius: float = 1e-3, block_size: int = 32, blocks: int | None = None, target: str | list[str] = ALL_LINEAR
) -> Recipe:
    """COFT: the same in a ball around the identity, |Q|_F <= radius b^2 / sqrt(r) for each of r blocks of width b.

    2306.07280, with the radius of its released layer code. Published: radius 6e-5 (subject-driven) and 1e-3
    (controllable generation), both with 4 blocks to a layer, b = 80 to 320. Because of b^2, 6e-5 leaves blocks of 32
    next to no room: with them it belongs to `blocks=4`.
    """
    return Recipe(_oft(block_size, blocks, target), [RotationBall(radius)], Merge(), training=ROTATION_TRAINING)


def goft(target: str | list[str] = ALL_LINEAR) -> Recipe:
    """GOFT: a tree of d - 1 Givens rotations at every layer of d inputs.

    Ma et al., Parameter Efficient Quasi-Orthogonal Fine-Tuning via Givens Rotation, 2404.04316 (ICML 2024). Published:
    all linear layers of DeBERTaV3 and ViT, learning rate 5e-4 to 2e-3; attention only and 1e-4 for LLaMA2. The angles
    are the parameters, as in the paper. Advised by its authors for decoders.
    """
    return Recipe(_givens("strict", target), [], Merge(), training=ROTATION_TRAINING)


def goft_norm(target: str | list[str] = ALL_LINEAR) -> Recipe:
    """GOFT*: the same with a factor for every input, 2d - 1 numbers; what the released configuration does by default.

    2404.04316. Neither lengths nor angles of neurons stay.
    """
    return Recipe(_givens("norm", target), [], Merge(), training=ROTATION_TRAINING)


def qgoft(strength: float = 1e-3, target: str | list[str] = ALL_LINEAR) -> Recipe:
    """qGOFT: free 2 x 2 blocks in place of the rotations, 4(d - 1) numbers, and a penalty on their columns' products.

    2404.04316. Published: strength (lambda) 0.001 for large tasks, 0.01 for SST-2, MRPC and LLaMA2, 0.05 for CoLA and
    RTE; 0.5 is too strong. Advised by its authors for encoders. The penalty is in neither version of their code.
    """
    return Recipe(_givens("quasi", target), [SoftOrthogonal(strength)], Merge(), training=ROTATION_TRAINING)


def _oft(block_size: int, blocks: int | None, target: str | list[str]) -> Any:
    from peft import OFTConfig

    r, width = (0, block_size) if blocks is None else (blocks, 0)
    # the default of peft 0.21 is five terms of a Neumann series, far from a rotation once |Q| is about 1
    return OFTConfig(r=r, oft_block_size=width, use_cayley_neumann=False, target_modules=target)


def _givens(form: Literal["strict", "norm", "quasi"], target: str | list[str]) -> Any:
    from ..tuners import GivensConfig

    return GivensConfig(form=form, target_modules=target)


ROTATION_TRAINING = {"learning_rate": 1e-3}

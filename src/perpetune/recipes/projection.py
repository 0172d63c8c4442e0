"""Projection: tuning that leaves alone what the layers computed of old inputs.

PEGP: Qiao et al., Gradient Projection For Continual Parameter-Efficient Tuning, 2405.13383. What holds of it, and what
its released code computes instead, is measured in docs/explanation/projection.md. Published energies are shares of
sigma^4 (0.5 to 0.999); ours are of sigma^2. The second training of every later task, interpolated with weight beta, is
left out: it breaks the projection.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from ..consolidation import Continue, Merge
from ..rules import InfLoRA, SubspaceProjection
from ..tuners import KEY_VALUE, KEY_VALUE_FFN, QUERY_KEY_VALUE, QUERY_VALUE, AllWeights
from .lora_family import LORA_TRAINING, lora_config
from .recipe import Recipe

Targets = str | list[str]


def pegp_adapter(
    bottleneck: int = 10, form: Literal["sequential", "parallel"] = "sequential", energy: float = 0.99
) -> Recipe:
    """PEGP on bottleneck adapters: changes of W_d and of W_u kept out of what they read of old inputs.

    Ours, where it differs from what is published (`pegp_adapter_released`): sequential ones behind attention and
    feed-forward network of every block, which read d inputs everywhere (parallel ones up to 4 d), learning rate 1e-3.
    """
    from ..tuners import AdapterConfig

    config = AdapterConfig(bottleneck=bottleneck, form=form)
    return Recipe(config, [SubspaceProjection(energy)], Continue(), training=ADAPTER_TRAINING)


def pegp_adapter_released(bottleneck: int = 5, blocks: int | None = 5, energy: float = 0.99) -> Recipe:
    """PEGP's adapters where its code has them: one beside the whole attention, reading what that reads, in the first
    `blocks` blocks (None: all), with the gradient projected before Adam, which guarantees nothing.

    Published: widths 5 and 10, five blocks (38,400 numbers in ViT-B/16 at width 5), Adam with learning rate 2.8e-3 or
    4.7e-4 (ours 1e-3) and without decay, energy 0.999 of sigma^4 in features that are another subspace (ours is right).
    """
    from ..tuners import ATTENTIONS, AdapterConfig

    config = AdapterConfig(
        bottleneck=bottleneck, target_modules=ATTENTIONS, layers_to_transform=_first(blocks), kaiming_a=math.sqrt(5)
    )
    return Recipe(config, [SubspaceProjection(energy, "gradient")], Continue(), training=ADAPTER_TRAINING)


def pegp_lora(rank: int = 8, alpha: float | None = None, target: Targets = QUERY_VALUE, energy: float = 0.99) -> Recipe:
    """PEGP on LoRA: one LoRA all the way, changes of A and of B kept out of what they read of old inputs.

    B reads r inputs only and is all but frozen from the second task on: `pegp_lora_fresh` is free of that. Ours, where
    it differs from what is published (`pegp_lora_released`): rank 8, s = 4, on query and value of every block, each
    with an A of its own, learning rate 5e-4.
    """
    config = lora_config(rank, alpha, target, 0.0)
    return Recipe(config, [SubspaceProjection(energy)], Continue(), training=LORA_TRAINING)


def pegp_lora_released(
    rank: int = 5,
    alpha: float | None = None,
    target: Targets = QUERY_KEY_VALUE,
    blocks: int | None = 5,
    energy: float = 0.99,
) -> Recipe:
    """PEGP's LoRA where its code has it: one on query, key and value as one layer, in the first `blocks` blocks (None:
    all), with the gradient projected before Adam, which guarantees nothing.

    Published: ranks 5 and 10, five blocks (76,800 numbers in ViT-B/16 at rank 5), Adam with learning rate 2.8e-3 or
    4.7e-4 (ours 5e-4) and without decay. `alpha` defaults to the rank, s = 1.
    """
    from ..tuners import FusedLoraConfig

    config: Any = FusedLoraConfig(
        r=rank,
        lora_alpha=alpha if alpha is not None else rank,
        target_modules=target,
        blocks=blocks,
    )
    return Recipe(config, [SubspaceProjection(energy, "gradient")], Continue(), training=LORA_TRAINING)


def pegp_lora_fresh(
    rank: int = 8, alpha: float | None = None, target: Targets = QUERY_VALUE, energy: float = 0.99
) -> Recipe:
    """A fresh LoRA for every task whose A reads nothing of old inputs, merged: dW x = s B A x = 0 for any B.

    PEGP's condition (2405.13383) on the product; with A frozen as well it is InfLoRA (2404.00228).
    """
    config = lora_config(rank, alpha, target, 0.0)
    return Recipe(config, [SubspaceProjection(energy, branch="fresh")], Merge(), training=LORA_TRAINING)


def inflora(
    rank: int = 10,
    alpha: float | None = None,
    target: Targets = KEY_VALUE,
    first: float = 0.95,
    last: float = 1.0,
    sessions: int = 10,
) -> Recipe:
    """InfLoRA: A of a fresh LoRA designed from the task's inputs outside of old ones, and frozen; B trained; merged.

    Liang and Li, InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning, 2404.00228 (CVPR 2024).
    Published for ViT-B/16: keys and values, r = 10, s = 1 (`alpha` defaults to rank), Adam 5e-4 without decay, DualGPM
    from 0.95 (CIFAR-100) or 0.98 (ImageNet-R) to 1 over `sessions` tasks, a head for each task's classes. The shares
    here are of sigma^2, as in the paper; its code takes those of sigma^4, of which 0.95 protects much less.
    """
    config = lora_config(rank, alpha if alpha is not None else rank, target, 0.0)
    training = {**LORA_TRAINING, "weight_decay": 0.0}
    return Recipe(config, [InfLoRA(first, last, sessions)], Merge(), training=training)


def pegp_prompt(tokens: int = 8, energy: float = 0.99) -> Recipe:
    """PEGP's idea on prompts of every layer, under conditions that suffice: for each head, and on both sides.

    Published: 10 and 20 tokens (ours 8) in the first five blocks, learning rate 2.8e-3 or 4.7e-4 (ours 1e-2).
    """
    return Recipe(_prompt(tokens), [SubspaceProjection(energy)], Continue(), training=TOKEN_TRAINING)


def pegp_prompt_released(tokens: int = 10, blocks: int | None = 5, energy: float = 0.99) -> Recipe:
    """PEGP on prompts under the published conditions, x dp = 0 and p dp = 0, on the gradient: no guarantee.

    Published: 10 and 20 tokens, in the first five blocks, learning rate 2.8e-3 or 4.7e-4 (ours 1e-2).
    """
    rule = SubspaceProjection(energy, "gradient", prompts="published")
    return Recipe(_prompt(tokens, blocks), [rule], Continue(), training=TOKEN_TRAINING)


def pegp_prefix(tokens: int = 8, energy: float = 0.99) -> Recipe:
    """PEGP's idea on prefixes of every layer, under conditions that suffice: for each head, keys and values.

    Published: 10 and 20 tokens (ours 8) in the first five blocks, learning rate 2.8e-3 or 4.7e-4 (ours 1e-2).
    """
    return Recipe(_prefix(tokens), [SubspaceProjection(energy)], Continue(), training=TOKEN_TRAINING)


def pegp_prefix_released(tokens: int = 10, blocks: int | None = 5, energy: float = 0.99) -> Recipe:
    """PEGP on prefixes as its code has it: keys against queries of full width, values free, on the gradient.

    Published: 10 and 20 tokens, in the first five blocks, learning rate 2.8e-3 or 4.7e-4 (ours 1e-2).
    """
    rule = SubspaceProjection(energy, "gradient", prompts="published")
    return Recipe(_prefix(tokens, blocks), [rule], Continue(), training=TOKEN_TRAINING)


def pegp_bias(energy: float = 0.99) -> Recipe:
    """PEGP's condition on biases (BitFit, 2106.10199): they read the constant 1, so all freeze after the first task.

    Not in the paper (2405.13383), which leaves open whether its condition carries over. It does not: nothing is left to
    learn with.
    """
    from ..tuners import BiasConfig

    return Recipe(BiasConfig(), [SubspaceProjection(energy)], Continue(), training={"learning_rate": 5e-3})


def pegp_ia3(energy: float = 0.99) -> Recipe:
    """PEGP's condition on IA3 (2205.05638): dl * y = 0, so only elements that old inputs hardly use can be scaled.

    Not in the paper (2405.13383), which leaves open whether its condition carries over. It does, with next to no room.
    """
    from peft import IA3Config

    config: Any = IA3Config(target_modules=KEY_VALUE_FFN, feedforward_modules=KEY_VALUE_FFN)
    return Recipe(config, [SubspaceProjection(energy)], Continue(), training={"learning_rate": 1e-2})


def gpm(energy: float = 0.97) -> Recipe:
    """All weights of linear layers kept out of what they read of old inputs; all else frozen after the first task.

    Saha et al., Gradient Projection Memory, 2103.09762, with the update projected, so that it holds under AdamW.
    Published: energy 0.97 + 0.003 t.
    """
    rule = SubspaceProjection(energy, unprotected="freeze")
    return Recipe(AllWeights(), [rule], Continue(), training={"learning_rate": 1e-4})


def gpm_released(energy: float = 0.97) -> Recipe:
    """GPM as published: the gradient is projected, and the optimizer is plain SGD (without decay it holds, too)."""
    rule = SubspaceProjection(energy, "gradient", unprotected="freeze")
    training = {"optim": "sgd", "weight_decay": 0.0, "learning_rate": 0.05, "head_learning_rate": 0.5}
    return Recipe(AllWeights(), [rule], Continue(), training=training)


def _first(blocks: int | None) -> list[int] | None:
    return None if blocks is None else list(range(blocks))


def _prompt(tokens: int, blocks: int | None = None) -> Any:
    from ..tuners import DeepPromptConfig

    return DeepPromptConfig(num_virtual_tokens=tokens, layers_to_transform=_first(blocks))


def _prefix(tokens: int, blocks: int | None = None) -> Any:
    from ..tuners import PrefixConfig

    return PrefixConfig(num_virtual_tokens=tokens, layers_to_transform=_first(blocks))


ADAPTER_TRAINING = {"learning_rate": 1e-3}
TOKEN_TRAINING = {"learning_rate": 1e-2}

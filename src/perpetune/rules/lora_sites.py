"""Where the LoRA pairs of a model are: found once per task by module type, never by parameter names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from ..core.errors import RuleError
from .shards import plain_name


@dataclass(frozen=True)
class LoraPair:
    """The two factors of one trainable LoRA: the layer computes y = W x + s B A x.

    Attributes:
        name: the layer's name in the model, without the adapter's: the same for every task's adapter.
        A: r x d_in, the down-projection (`lora_A.weight`).
        B: d_out x r, the up-projection (`lora_B.weight`).
        scaling: s.
        weight: W of the adapted layer, in its own layout (`Conv1D` keeps it transposed); None where the layer keeps it
            under another name.
    """

    name: str
    A: nn.Parameter
    B: nn.Parameter
    scaling: float
    weight: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in), read off the factors, so that the layout of W does not matter."""
        return self.B.shape[0], self.A.shape[1]


def lora_pairs(model: nn.Module) -> list[LoraPair]:
    """The active LoRA pairs of a peft model of which at least one factor is trained, in the order of its modules.

    Adapters of linear layers (also `Conv1D` and quantised ones) are found; those of embeddings and convolutions are
    not. Frozen adapters (earlier tasks that were stacked) and disabled ones are left out.

    Raises:
        RuleError: a layer trains two active adapters at once, so that "the" change of the layer has no one pair.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    pairs = []
    for name, layer in ((plain_name(name), layer) for name, layer in model.named_modules()):
        # ParamWrapper stores the factors of many experts in one matrix: B A is not the change there.
        if not isinstance(layer, LoraLayer) or isinstance(layer, ParamWrapper) or layer.disable_adapters:
            continue
        live = []
        for adapter in layer.active_adapters:
            # AdaLoRA's and embeddings' factors are bare parameters, convolutions' have four dimensions.
            if adapter in layer.lora_A and isinstance(layer.lora_A[adapter], nn.Linear):
                A, B = (cast(nn.Parameter, factors[adapter].weight) for factors in (layer.lora_A, layer.lora_B))
                if A.requires_grad or B.requires_grad:
                    live.append(
                        LoraPair(name, A, B, layer.scaling[adapter], getattr(layer.get_base_layer(), "weight", None))
                    )
        if len(live) > 1:
            raise RuleError(
                f"layer `{name}` trains {len(live)} LoRA adapters at once: freeze all but the current task's"
            )
        pairs += live
    return pairs

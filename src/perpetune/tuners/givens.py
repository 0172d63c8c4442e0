"""Givens rotations of what a linear layer reads: GOFT, GOFT* and qGOFT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.errors import ConfigError, ModelError
from .givens_rotations import dense, from_identity, rotate, rotate_back, strict_blocks
from .peft_plugin import OwnConfig, OwnLayer, OwnTuner, register

# Where no gradient is asked for, the weight is rotated instead of the tokens if these are more than twice its rows:
# at 768 x 768 and 2,048 tokens 0.91 instead of 1.02 of the time of LoRA. In training it never is: dL/dW is one more
# product of full size (8,192 tokens: 1.21 of LoRA, the tokens 0.98), whatever the number of tokens.
TOKENS_PER_ROW = 2


@dataclass
class GivensConfig(OwnConfig):
    """A rotation R of the inputs of every targeted layer: y = f(x R), R = I at the start, from d - 1 planes of a tree.

    "strict"  d - 1 angles: R is orthogonal, the angles and lengths of the rows of the weight stay      (GOFT)
    "norm"    y = f(x R diag(c)), c = 1 at the start: 2d - 1 numbers                                    (GOFT*)
    "quasi"   any 2 x 2 matrix for each plane, 4(d - 1) numbers: orthogonal only if a penalty keeps it  (qGOFT)

    Kept are the changes of c and of the 2 x 2 matrices since the start, which are 0 at first as angles are: weight
    decay pulls to the model as it was, and not to weights of 0.

    As a weight (out x d): W R^T, W diag(c) R^T. Of several active adapters the first turns what the layer reads and the
    next what that puts out: x R_1 R_2, W R_2^T R_1^T. The tree, and what such an R cannot do: see
    `perpetune.tuners.givens_rotations`.

    Source: Ma et al. (2404.04316); the diagonal's place is that of their first released version.

    Raises:
        ConfigError: an unknown form, or a radix that is no power of two.
    """

    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={"help": "Ends of the names of modules, or a regular expression for whole names; None: all linear."},
    )
    form: Literal["strict", "norm", "quasi"] = field(
        default="strict", metadata={"help": "Angles, angles and a diagonal, or free 2 x 2 blocks."}
    )
    radix: int = field(
        default=32, metadata={"help": "Width of the dense blocks of the lower stages: speed only. 1: no blocks."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "perpetune_givens"
        if self.form not in ("strict", "norm", "quasi"):
            raise ConfigError(f'GivensConfig: `form` = {self.form!r}: use "strict", "norm" or "quasi"')
        if not isinstance(self.radix, int) or self.radix < 1 or self.radix & (self.radix - 1):
            raise ConfigError(f"GivensConfig: `radix` = {self.radix!r}: give a power of two, such as 32")


class GivensLinear(OwnLayer):
    """f(x R) of a linear layer with its rotations; see `GivensConfig`."""

    adapter_layer_names = (
        "perpetune_givens_angles",
        "perpetune_givens_block_change",
        "perpetune_givens_diagonal_change",
    )
    other_param_names = ("perpetune_givens_radix",)

    def _containers(self) -> None:
        self.perpetune_givens_angles = nn.ParameterDict()  # (d-1,)
        self.perpetune_givens_block_change = nn.ParameterDict()  # g - I, (d-1) x 2 x 2
        self.perpetune_givens_diagonal_change = nn.ParameterDict()  # c - 1, (d,)
        self.perpetune_givens_radix: Any = {}
        self._unmerged: Tensor | None = None  # the weight before merging

    def _new(self, adapter_name: str, config: GivensConfig) -> None:
        d = self._weight().shape[1]
        if config.form == "quasi":
            self.perpetune_givens_block_change[adapter_name] = nn.Parameter(torch.zeros(d - 1, 2, 2))
        else:
            self.perpetune_givens_angles[adapter_name] = nn.Parameter(torch.zeros(d - 1))
        if config.form == "norm":
            self.perpetune_givens_diagonal_change[adapter_name] = nn.Parameter(torch.zeros(d))
        self.perpetune_givens_radix[adapter_name] = config.radix

    @property
    def in_features(self) -> int:
        return self._weight().shape[1]

    @property
    def out_features(self) -> int:
        return self._weight().shape[0]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        live = self._live(self.perpetune_givens_radix)
        if not live:
            return self.base_layer(x, *args, **kwargs)
        weight = self._weight()
        with torch.autocast(x.device.type, enabled=False):  # a rotation rounded to 8 bits is none
            if not (torch.is_grad_enabled() or self.training) and x.numel() > TOKENS_PER_ROW * weight.numel():
                turned = self._all_turned(live, weight).to(weight.dtype)
            else:
                turned = None
                for name in live:
                    x = rotate(x.to(self._wide(x)), *self._parts(name, self._wide(x))).to(x.dtype)
        if turned is None:
            return self.base_layer(x, *args, **kwargs)
        return nn.functional.linear(x, turned, self.get_base_layer().bias)  # type: ignore[arg-type]

    @torch.no_grad()
    def get_turned_weight(self, adapter_name: str, weight: Tensor) -> Tensor:
        """W R^T, or W diag(c) R^T, of any weight W (out x d), in fp32 or the type of W where that is wider."""
        return rotate_back(weight.to(self._wide(weight)), *self._parts(adapter_name, self._wide(weight)))

    @torch.no_grad()
    def get_rotation(self, adapter_name: str) -> Tensor:
        """R (d x d) in fp64, without the diagonal."""
        return dense(self._parts(adapter_name, torch.float64)[0])

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """W <- W R_n^T ... R_1^T for the adapters 1 ... n, the last one first, in fp32 and rounded once.

        Raises:
            ModelError: (with `safe_merge`) the product is not finite.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.perpetune_givens_radix]
        if not names:
            return
        before = self._weight().clone() if self._unmerged is None else self._unmerged
        turned = self._all_turned([*self.merged_adapters, *names], before)
        if safe_merge and not turned.isfinite().all():
            raise ModelError(f"the merged weight would not be finite: adapter {', '.join(names)} is broken")
        self._weight().copy_(turned)
        self._unmerged = before
        self.merged_adapters += names

    @torch.no_grad()
    def unmerge(self) -> None:
        """The weight as it was, to the bit."""
        if self._unmerged is not None:
            self._weight().copy_(self._unmerged)
        self._unmerged = None
        self.merged_adapters.clear()

    def _all_turned(self, names: Sequence[str], weight: Tensor) -> Tensor:
        for name in reversed(names):  # what meets the tokens last is next to the weight
            weight = self.get_turned_weight(name, weight)
        return weight

    def _weight(self) -> Tensor:
        """W (out x d), a view."""
        base: Any = self.get_base_layer()
        weight: Tensor = base.weight.detach()
        return weight.T if isinstance(base, Conv1D) else weight

    def _parts(self, name: str, dtype: torch.dtype) -> tuple[Tensor, int, Tensor | None]:
        """Blocks, radix and diagonal, for `rotate`."""
        change, c = self.perpetune_givens_block_change, None
        if name in change:
            blocks = from_identity(change[name].to(dtype))
        else:
            blocks = strict_blocks(self.perpetune_givens_angles[name].to(dtype))
        if name in self.perpetune_givens_diagonal_change:
            c = 1 + self.perpetune_givens_diagonal_change[name].to(dtype)
        return blocks, self.perpetune_givens_radix[name], c

    @staticmethod
    def _wide(tensor: Tensor) -> torch.dtype:
        return torch.promote_types(tensor.dtype, torch.float32)


class GivensModel(OwnTuner):
    """A model with rotated inputs."""

    prefix = "perpetune_givens_"
    tuner_layer_cls = GivensLinear

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Adapters of earlier versions hold g and c themselves, and not their changes."""
        state = {}
        for key, value in state_dict.items():
            if key.endswith("perpetune_givens_blocks"):
                key, value = f"{key.removesuffix('s')}_change", value - torch.eye(2).to(value)
            elif key.endswith("perpetune_givens_diagonal"):
                key, value = f"{key}_change", value - 1
            state[key] = value
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        if peft_config.target_modules in (None, "all-linear"):
            linear = (nn.Linear, Conv1D, GivensLinear)
            ends = {n.rpartition(".")[2] for n, m in self.model.named_modules() if isinstance(m, linear)}
            # peft does not count layers where it looks for all linear ones itself.
            peft_config.target_modules = "all-linear" if peft_config.layers_to_transform is None else ends
        return peft_config

    def _new_layer(self, config: GivensConfig, adapter_name: str, target: nn.Module, key: str) -> nn.Module:
        if not isinstance(target, nn.Linear | Conv1D) or not target.weight.is_floating_point():
            kind = f"{type(target).__name__} of {getattr(target, 'weight', torch.empty(0)).dtype}"
            raise ModelError(f"`{key}` is a {kind}: rotations stand at linear layers of real numbers, leave it out")
        return super()._new_layer(config, adapter_name, target, key)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise ModelError(
            "a weighted sum of rotations is no rotation: make several active, or merge them one after the other"
        )


register("perpetune_givens", GivensConfig, GivensModel)

"""The tuner slot: where the change lives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..core.errors import ModelError
from ..core.measurement import Measurement
from ..streams.task import Modality

if TYPE_CHECKING:
    from ..models.backbone import Backbone


class Tuner:
    """Makes a model trainable, hands out what was trained, and takes it off again."""

    trains: bool = True
    wraps_model: bool = True  # False: what is kept lives on the backbone itself

    def own_backbone(self, modality: Modality) -> Backbone | None:
        """What takes the place of a pre-trained model; None where there is one to tune."""
        return None

    def attach(self, model: nn.Module) -> nn.Module:
        """The model with exactly this tuner's parameters trainable (the same object, or a wrapper around it)."""
        raise NotImplementedError

    def detach(self, model: nn.Module) -> nn.Module:
        """The model without what `attach` put around it; weights as they were before `attach`, where they were kept."""
        return model

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """What was trained, for a commit."""
        raise NotImplementedError

    def load(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Inverse of `tensors`, on an attached model."""
        raise NotImplementedError

    def files(self, model: nn.Module) -> dict[str, Any]:
        """What a commit stores, by file name: dicts of tensors, and JSON-able dicts that other libraries read."""
        tensors = self.tensors(model)
        return {"weights.safetensors": tensors} if tensors else {}

    @property
    def additive(self) -> bool:
        """Whether the change is a sum that `deltas` can hand out."""
        return False

    def deltas(self, model: nn.Module) -> dict[str, Tensor]:
        """Change of every touched weight of the base model, by parameter name, fp32.

        Raises:
            ModelError: the change of this tuner is not a sum.
        """
        raise ModelError(
            f"{type(self).__name__} has no additive change to merge: use another consolidation (`Continue`)"
        )

    @property
    def multiplicative(self) -> bool:
        """Whether the change is a product W <- W R^T that `turn` can carry out."""
        return False

    def turn(self, model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """W R^T of every rotated weight of the base model, by parameter name, fp32.

        Args:
            weights: W, by the same names; where one is missing, it is the model's own.

        Raises:
            ModelError: the change of this tuner is not a product.
        """
        raise ModelError(f"{type(self).__name__} does not rotate weights: use another consolidation (`Continue`)")

    def guarantee(self, model: nn.Module, since: Mapping[str, Tensor]) -> list[Measurement]:
        """What the tuner promises of the task just trained, measured on the attached model.

        Args:
            since: weights before the first task, by parameter name, where they are not those under the tuner.
        """
        return []


@dataclass
class Frozen(Tuner):
    """Nothing is trained: the pre-trained features as they are."""

    trains = False

    def attach(self, model: nn.Module) -> nn.Module:
        return model.requires_grad_(False)

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        return {}

    def load(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        pass


@dataclass
class NoNetwork(Tuner):
    """No network at all: hashed TF-IDF `words`, or grey pixels of `side` x `side` (see `FixedFeatures`). A control."""

    words: int = 2048
    side: int = 28
    trains = False
    wraps_model = False

    def own_backbone(self, modality: Modality) -> Backbone:
        from ..models.fixed_features import FixedFeatures

        return FixedFeatures(modality, words=self.words, side=self.side)

    def attach(self, model: nn.Module) -> nn.Module:
        return model

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: t for name, t in model.state_dict().items() if t.numel()}

    def load(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            setattr(model, name, tensor.clone())


@dataclass
class AllWeights(Tuner):
    """Every weight is trained, embeddings included."""

    def attach(self, model: nn.Module) -> nn.Module:
        return model.requires_grad_(True)

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        return dict(model.state_dict())

    def load(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        model.load_state_dict(tensors)

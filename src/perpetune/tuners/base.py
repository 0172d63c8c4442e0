"""The tuner slot: where the change lives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..core.errors import ConfigError
from ..core.measurement import Measurement
from ..models.views import check_views, read_views
from ..streams.task import Modality

if TYPE_CHECKING:
    from ..models.backbone import Backbone


@dataclass(frozen=True)
class Additive:
    """W + dW. `deltas()` gives dW of every touched weight of the base model by parameter name, fp32; it does not depend
    on W."""

    deltas: Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class Multiplicative:
    """W R^T. `turn(weights)` gives it for every rotated weight of the base model by parameter name, fp32; `weights` has
    W by the same names, and where one is missing, it is the model's own."""

    turn: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


Change = Additive | Multiplicative


class Tuner:
    """Makes a model trainable, hands out what was trained, and takes it off again."""

    trains: bool = True
    wraps_model: bool = True  # False: what is kept lives on the backbone itself

    def check(self, model: nn.Module) -> None:
        """Before anything is learned or written: whether `attach` will find on the model what it needs.

        Raises:
            ModelError: it will not.
        """

    def own_backbone(self, modality: Modality) -> Backbone | None:
        """What takes the place of a pre-trained model; None where there is one to tune."""
        return None

    def reads(self, backbone: Backbone) -> None:
        """Tell an untouched model how inputs are to be read under this tuner."""

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

    def change(self, model: nn.Module) -> Change | None:
        """What the tuner does to the weights of the base model: a sum, a product, or neither.

        Args:
            model: attached.
        """
        return None

    @property
    def rotates(self) -> bool:
        """Whether the change is a product, as far as can be told without a model."""
        return False

    @property
    def changes_base(self) -> bool:
        """Whether `attach` changes weights under the tuner, so that W + dW starts at W and the base alone does not."""
        return False

    def guarantee(self, model: nn.Module, since: Mapping[str, Tensor]) -> list[Measurement]:
        """What the tuner promises of the task just trained, measured on the attached model.

        Args:
            since: weights before the first task, by parameter name, where they are not those under the tuner.
        """
        return []


@dataclass
class Frozen(Tuner):
    """Nothing is trained: the pre-trained features as they are.

    Args:
        views: of pictures, the mean over their features and those of so many views is read (0, 4 or 8; see
            `read_views`). A head that is trained by gradients learns from the pictures alone.

    Raises:
        ConfigError: another number of views.
    """

    views: int = field(default=0, kw_only=True, metadata={"unwritten": 0})
    trains = False

    def __post_init__(self) -> None:
        check_views(self.views)

    def reads(self, backbone: Backbone) -> None:
        read_views(backbone, self.views, features=True)

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


def base_names(model: Any) -> dict[int, str]:
    """The weights of an attached model by `id`, with the names that they have on the model without its tuner."""
    return {id(p): n.replace(".base_layer.", ".") for n, p in model.get_base_model().named_parameters()}


def check_base_kept(tuner: Tuner, user: str) -> None:
    """Refuse a tuner whose initialisation changes the base, for whoever attaches a new one for every task.

    Raises:
        ConfigError: it does.
    """
    if tuner.changes_base:
        init = getattr(getattr(tuner, "config", tuner), "init_lora_weights", None)
        raise ConfigError(
            f"{user} starts every task with a new adapter on the base, and init_lora_weights=`{init}` changes the base "
            "for each of them, so that what old adapters computed moves: set init_lora_weights to true, or use Continue"
        )

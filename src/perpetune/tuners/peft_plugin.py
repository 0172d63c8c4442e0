"""What all tuners of ours share: how peft comes to know them, their layers and models, and loading checked to the end.

peft 0.21 has no plug-in mechanism. Its dictionaries of tuners are keyed by an enum of strings, and a plain string is
equal to such a member: a tuner put there under a string key is created, saved and loaded as peft's own are.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from os import PathLike
from typing import Any

import peft
import peft.mapping
import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import load_peft_weights
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..core.errors import ConfigError, ModelError, first_line
from . import OWN_CONFIGS
from .targets import ATTENTIONS, BLOCK_OUTPUTS, KEY_VALUE, KEY_VALUE_FFN, QUERY_VALUE, UNCALLED_PARTS


def register(name: str, config_cls: type[peft.PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Make a tuner known to peft; once or again.

    Args:
        name: the `peft_type` of `config_cls`: lower case, beginning with `perpetune_`.
        config_cls: its configuration.
        model_cls: its model, whose `prefix` is `name + "_"`: so begin the attributes in which layers keep weights.

    Raises:
        ModelError: another peft than 0.21, which keeps its tuners elsewhere.
    """
    names = ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING")
    mappings: list[Any] = [getattr(peft.mapping, key, None) for key in names]
    for key, mapping in zip(names, mappings, strict=True):
        if not isinstance(mapping, dict):
            raise ModelError(f"peft {peft.__version__} has no dictionary `peft.mapping.{key}`: install peft 0.21")
    for mapping, value in zip(mappings, (config_cls, model_cls, model_cls.prefix), strict=True):
        mapping[name] = value


def check_adapter_name(model: nn.Module, name: str) -> None:
    """Refuse a name of an adapter under which peft 0.21 saves too few tensors without saying so.

    peft tells the adapters of a model apart by `.name.` anywhere in the name of a tensor. If `name` is also that of a
    part of the model ("encoder", "0", "weight"), tensors of one adapter pass for another's and are left out of files.

    Raises:
        ModelError: such a name, or one that contains what the names of our weights begin with.
    """
    advice = "use a name such as `task_0007`"
    if name in {"base_model", "model", "base_layer", *_parts(model)}:
        raise ModelError(
            f"an adapter cannot be called `{name}`: so is a part of this {type(model).__name__}, and peft would leave "
            f"tensors out of its checkpoint: {advice}"
        )
    for prefix in peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING.values():
        if prefix.startswith("perpetune_") and prefix in name:
            raise ModelError(
                f"an adapter cannot be called `{name}`: so begin names of weights, `{prefix}...`: {advice}"
            )


def _parts(module: nn.Module) -> Iterator[str]:
    """Names of the parts of a module at every depth; those in containers of adapters are left out."""
    own = {BaseTunerLayer: "base_layer", AuxiliaryTrainingWrapper: "original_module"}
    base = next((attribute for kind, attribute in own.items() if isinstance(module, kind)), None)
    yield from (key for key, _ in module.named_parameters(recurse=False))
    yield from (key for key, _ in module.named_buffers(recurse=False))
    for key, child in module.named_children():
        yield key
        if base is None or key == base:
            yield from _parts(child)


@dataclass
class OwnConfig(peft.PeftConfig):
    """Where the layers of a tuner are: the fields that peft reads in every configuration. A tuner sets `peft_type`.

    Raises:
        ConfigError: fields that contradict each other, of which peft would pass over one.
    """

    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Ends of the names of modules, or a regular expression for whole names."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "What to leave out, written as `target_modules` is."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Numbers of the layers to change; None: all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the list of layers that `layers_to_transform` counts, if not the first."},
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules outside the tuner that are trained and stored as a whole: heads."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.target_modules = _as_set(self.target_modules)
        self.exclude_modules = _as_set(self.exclude_modules)
        kind = type(self).__name__
        words = (ATTENTIONS, BLOCK_OUTPUTS, KEY_VALUE, KEY_VALUE_FFN, QUERY_VALUE, "all-linear")
        expression = isinstance(self.target_modules, str) and self.target_modules not in words
        if expression and self.layers_to_transform is not None:
            raise ConfigError(
                f"{kind}: a regular expression in `target_modules` chooses layers itself: remove `layers_to_transform`"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(f"{kind}: `layers_pattern` says where to count `layers_to_transform`: give both or none")


def _as_set(names: Any) -> Any:
    return set(names) if isinstance(names, (list, tuple)) else names


class OwnLayer(nn.Module, BaseTunerLayer):
    """A layer with its adapters. A tuner adds `adapter_layer_names`, `_containers`, `_new` and `forward`.

    Whatever is not kept by adapter name in one of `adapter_layer_names` would be saved with every adapter.

    Args:
        base_layer: what is adapted.
        adapter_name: of the first adapter.
        config: its settings.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self._containers()
        self.update_layer(adapter_name, config)

    def _containers(self) -> None:
        """Make the attributes named in `adapter_layer_names`, empty."""
        raise NotImplementedError

    def _new(self, adapter_name: str, config: Any) -> None:
        """Put the weights of a new adapter into the containers."""
        raise NotImplementedError

    def update_layer(self, adapter_name: str, config: Any) -> None:
        """Add an adapter, on the device and in the type of the base layer, frozen unless it is active."""
        self._new(adapter_name, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _live(self, container: nn.ModuleDict | nn.ParameterDict) -> list[str]:
        """The adapters that act in this forward pass: active, present here, neither disabled nor merged.

        To be asked before the base layer is called, as disabled ones are unmerged here.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in container]


class OwnTuner(BaseTuner):
    """A model with layers of ours. A tuner adds `prefix` and `tuner_layer_cls`, built as (layer, name, config)."""

    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # Not `_pre_injection_hook`, which peft calls for the first adapter only.
        check_adapter_name(model, adapter_name)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _new_layer(self, config: Any, adapter_name: str, target: nn.Module, key: str) -> nn.Module:
        """The layer that replaces `target`, whose name in the model is `key`."""
        return self.tuner_layer_cls(target, adapter_name, config)  # type: ignore[call-arg,return-value]

    def _adapts(self, target: nn.Module, key: str) -> bool:
        """Whether a targeted module is adapted, and not passed over; `key` is its name in the model."""
        return True

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if not self._adapts(target, current_key):
            return
        if isinstance(parent, UNCALLED_PARTS):
            kind = type(parent).__name__
            raise ModelError(
                f"`{current_key}` may never be called, as {kind} reads its weights itself: add it to `exclude_modules`"
            )
        if isinstance(target, self.tuner_layer_cls):
            ours: Any = target
            ours.update_layer(adapter_name, peft_config)
            return
        layer = self._new_layer(peft_config, adapter_name, target, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def register_all() -> None:
    """Make all tuners of ours known to peft."""
    for module in sorted(set(OWN_CONFIGS.values())):
        import_module(f".{module}", __package__)


def load_adapter(model: nn.Module, folder: str | PathLike[str], **kwargs: Any) -> peft.PeftModel:
    """`peft.PeftModel.from_pretrained`, for tuners of ours too, which peft alone does not know, and checked.

    peft passes over tensors of the file that have no place, and only warns of tensors that the file lacks.

    Args:
        model: the base model; it is changed in place.
        folder: of `save_pretrained` or of a commit: `adapter_config.json` and `adapter_model.safetensors`.
        kwargs: those of `from_pretrained`: `is_trainable=True` to go on training, `adapter_name`, ...

    Raises:
        ModelError: no adapter there, one of an unknown type, one that does not fit this model, or one that is
            incomplete.
    """
    register_all()
    name = kwargs.get("adapter_name", "default")
    check_adapter_name(model, name)
    with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 for a name that is about to change
        warnings.simplefilter("ignore", FutureWarning)
        try:
            loaded = peft.PeftModel.from_pretrained(model, folder, **kwargs)
            missing, unexpected = _misfits(loaded, folder, name, kwargs)
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            reason = first_line(error)
            if reason.startswith("'perpetune_"):  # the key that peft did not find
                reason = f"no tuner {reason} is registered with peft: import the module that does it first"
            kind = type(model).__name__
            raise ModelError(f"cannot load the adapter in {folder} into this {kind}: {reason}") from error
    if missing or unexpected:
        text = [f"lacks {len(missing)} tensors ({missing[0]}, ...)"] if missing else []
        text += [f"has {len(unexpected)} that this model has no place for ({unexpected[0]}, ...)"] if unexpected else []
        raise ModelError(f"the adapter in {folder} {' and '.join(text)}: {_advice(missing, unexpected)}")
    return loaded


def _advice(missing: list[str], unexpected: list[str]) -> str:
    if all(".pooler." in name for name in [*missing, *unexpected]):
        made = "without a pooler" if missing else "with a pooler"
        return f"it was made on a model {made}: load the model so (add_pooling_layer={not missing})"
    return "give the model that it was made on; if this is the one, save it anew, under a name like `task_0007`"


def _misfits(
    model: peft.PeftModel, folder: str | PathLike[str], name: str, kwargs: dict[str, Any]
) -> tuple[list[str], list[str]]:
    """Names of the adapter's tensors that its file lacks, and of the file's tensors that the model lacks.

    Seen by loading the file once more, since `from_pretrained` does not tell.
    """
    config: Any = model.peft_config[name]
    where = {k: kwargs[k] for k in ("subfolder", "revision", "cache_dir", "token", "key_mapping") if k in kwargs}
    where.setdefault("key_mapping", getattr(model.get_base_model(), "_checkpoint_conversion_mapping", None))
    stored: dict[str, Tensor] = load_peft_weights(str(folder), device="cpu", **where)
    result: Any = peft.set_peft_model_state_dict(model, stored, adapter_name=name)
    if config.is_prompt_learning:  # one tensor beside the model, which peft loads strictly
        return [], []
    prefix = peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "")
    state = model.state_dict()
    filled = {_place(state[key]) for key in state.keys() - set(result.missing_keys)}
    # A tensor that several layers share (the bank of VB-LoRA) is stored once.
    missing = [k for k in result.missing_keys if prefix in k and f".{name}" in k and _place(state[k]) not in filled]
    return missing, list(result.unexpected_keys)


def _place(tensor: Tensor) -> Any:
    return object() if tensor.device == torch.device("meta") else (tensor.data_ptr(), tensor.shape)

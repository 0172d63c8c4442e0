"""The tuner slot: where the change lives."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, first_line, nearest
from ..measurement import Measurement
from ..towers import decoder_name

QUERY_VALUE = "query_value"
BLOCK_OUTPUTS = "block_outputs"
KEY_VALUE_FFN = "key_value_ffn"
_PROJECTIONS = (  # query, key, value; or all in one
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("c_attn",),
    ("qkv",),
    ("Wqkv",),
    ("query_key_value",),
)
_QUERY_VALUE_NAMES = tuple(tuple(dict.fromkeys((n[0], n[-1]))) for n in _PROJECTIONS)
_KEY_VALUE_NAMES = tuple(n[-2:] for n in _PROJECTIONS)
_ATTENTION_OUTPUTS = (  # ends of names, as transformers 5 calls them
    "attention.output.dense",
    "attention.attn.o",
    "attention.dense",
    "attention.o_proj",
    "attention.out_lin",
    "attention.out_proj",
    "attn.Wo",
    "attn.c_proj",
    "attn.out_proj",
    "crossattention.c_proj",
    "encoder_attn.out_proj",
    "self_attention.dense",
    "self_attn.dense",
    "self_attn.o_proj",
    "self_attn.out_proj",
    "SelfAttention.o",
    "EncDecAttention.o",
)
_FEED_FORWARD_OUTPUTS = (
    "output.dense",
    "DenseReluDense.wo",
    "down_proj",
    "fc2",
    "feed_forward.output_dense",
    "ffn.lin2",
    "ffn_output",
    "mlp.Wo",
    "mlp.c_proj",
    "mlp.dense_4h_to_h",
    "mlp.fc_out",
)
ROTATIONS = ("OFT", "perpetune_givens")
# They hand the weights of their parts to one function and do not (the second: not always) call the parts.
UNCALLED_PARTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


class Tuner:
    """Makes a model trainable, hands out what was trained, and takes it off again."""

    trains: bool = True
    wraps_model: bool = True  # False: what is kept lives on the backbone itself

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


class PeftTuner(Tuner):
    """Any `peft` configuration.

    Args:
        config: a `PeftConfig`. `target_modules="query_value"` finds this model's query and value projections,
            "block_outputs" the output projections of attention and feed-forward network, "key_value_ffn" keys, values
            and feed-forward outputs (the last alone in `feedforward_modules` of IA3); of a model that reads images and
            answers in words those of its decoder alone.
    """

    def __init__(self, config: Any) -> None:
        self.config = config

    def attach(self, model: nn.Module) -> nn.Module:
        """
        Raises:
            ModelError: the model has no module of the targeted name; the message names those that it has. Or a part of
                it is called as the adapter would be.
        """
        import peft

        from .registration import check_adapter_name

        check_adapter_name(model, "default")
        config = copy.deepcopy(self.config)
        if isinstance(getattr(config, "target_modules", None), (str, set, list)):
            config.target_modules = resolve_targets(model, config.target_modules)
        if getattr(config, "feedforward_modules", None) == KEY_VALUE_FFN:
            config.feedforward_modules = _feed_forward_outputs(model)
        model.requires_grad_(False)
        with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 for a name that is about to change
            warnings.simplefilter("ignore", FutureWarning)
            try:
                return peft.get_peft_model(model, config)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                kind = f"{type(config).__name__} on {type(model).__name__}"
                raise ModelError(f"peft cannot put {kind}: {first_line(error)}: change the tuner's settings") from error

    @property
    def additive(self) -> bool:
        c = self.config
        plain = not any(getattr(c, name, False) for name in ("use_dora", "lora_bias", "use_qalora"))
        gaussian = getattr(c, "init_lora_weights", True) in (True, False, "gaussian")  # others change the base weights
        return self._kind() in ("LORA", "LOHA", "LOKR", "perpetune_bias") and plain and gaussian

    @property
    def multiplicative(self) -> bool:
        return self._kind() in ROTATIONS

    def turn(self, model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.multiplicative:
            return super().turn(model, weights)
        from .rotations import turns

        return {t.name: t(weights.get(t.name, t.layer.get_base_layer().weight)) for t in turns(model)}

    def guarantee(self, model: nn.Module, since: Mapping[str, Tensor]) -> list[Measurement]:
        if not self.multiplicative:
            return []
        from .rotations import kept_geometry

        exact = getattr(self.config, "form", "strict") == "strict"  # peft's OFT has no form
        return kept_geometry(model, since, exact, type(self.config).__name__)

    def _kind(self) -> str:
        return str(getattr(self.config.peft_type, "value", self.config.peft_type))

    def detach(self, model: Any) -> nn.Module:
        return model.unload()

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        import peft

        return {k: v.contiguous() for k, v in peft.get_peft_model_state_dict(model).items()}

    def load(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        import peft

        result: Any = peft.set_peft_model_state_dict(model, dict(tensors))
        if result.unexpected_keys:
            raise ModelError(
                f"the stored adapter does not fit this model: it has no place for {result.unexpected_keys[0]} "
                f"({len(result.unexpected_keys)} tensors in all)"
            )

    def files(self, model: Any) -> dict[str, Any]:
        return {"adapter_model.safetensors": self.tensors(model), "adapter_config.json": peft_dict(_fitted(model))}

    def deltas(self, model: Any) -> dict[str, Tensor]:
        base_names = {id(p): n for n, p in model.get_base_model().named_parameters()}
        found = {}
        for module in model.modules():
            layer: Any = module
            for key in ("weight", "bias"):
                if hasattr(layer, f"get_delta_{key}") and hasattr(layer, "base_layer"):
                    parameter = getattr(layer.get_base_layer(), key)
                    name = base_names[id(parameter)].replace(".base_layer.", ".")
                    found[name] = getattr(layer, f"get_delta_{key}")("default").detach().float()
        if not found:
            return super().deltas(model)
        return found


def _fitted(model: Any) -> Any:
    """The configuration of an attached model, with the whole names of the modules that it tunes.

    Ends of names (to which peft 0.21 shortens what "all-linear" found) may fit more modules where the adapter is loaded
    later: `dense` is in the pooler, too, with which `AutoModel` loads a BERT and the backbone does not.
    """
    config = copy.copy(model.peft_config["default"])
    tuned = sorted(getattr(model.base_model, "targeted_module_names", ()))
    others = {name for name, _ in model.get_base_model().named_modules()}.difference(tuned)
    if not tuned or any(name.endswith(tuple(f".{t}" for t in tuned)) for name in others):
        return config  # whole names would fit more modules than what the user chose
    config.target_modules = tuned
    if isinstance(ends := getattr(config, "feedforward_modules", None), (set, list)):  # IA3: some of the targets
        config.feedforward_modules = [name for name in tuned if any(_ends(name, end) for end in ends)]
    return config


def peft_dict(config: Any) -> dict[str, Any]:
    """A peft configuration as JSON-able data, the same bytes in every process (peft writes sets in hash order)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (set, frozenset)):
            return sorted(value)
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return getattr(value, "value", value)

    return {**plain(config.to_dict()), "inference_mode": True}


def as_tuner(tuner: Any) -> Tuner:
    """A tuner as it is, or a `PeftConfig` wrapped as one."""
    return tuner if isinstance(tuner, Tuner) else PeftTuner(tuner)


def resolve_targets(model: nn.Module, targets: str | set[str] | list[str]) -> str | list[str]:
    """Target names that exist in this model.

    Raises:
        ModelError: one does not; names the nearest that does.
    """
    kind = type(model).__name__
    if targets == "all-linear":
        return "all-linear"
    decoder = decoder_name(model)
    if decoder and targets in (QUERY_VALUE, KEY_VALUE_FFN, BLOCK_OUTPUTS):
        part = model.get_submodule(decoder.rstrip("."))
        ends = resolve_targets(part, targets)
        return [f"{decoder}{n}" for n, _ in part.named_modules() if any(_ends(n, end) for end in ends)]
    linear = [n for n, m in model.named_modules() if _is_linear(m)]
    suffixes = {n.rsplit(".", 1)[-1] for n in linear}
    if targets in (QUERY_VALUE, KEY_VALUE_FFN):
        # two towers may call theirs by different names
        known = _QUERY_VALUE_NAMES if targets == QUERY_VALUE else _KEY_VALUE_NAMES
        found = [name for names in known if suffixes.issuperset(names) for name in names]
        if found:
            return [*found, *(_feed_forward_outputs(model) if targets == KEY_VALUE_FFN else ())]
        words = str(targets).split("_")[:2]
        raise ModelError(
            f"cannot tell the {' and '.join(words)} projections of {kind}; it has {', '.join(sorted(suffixes))}"
        )
    if targets == BLOCK_OUTPUTS:
        return _block_outputs(model)
    if isinstance(targets, str):
        return targets  # a regular expression, peft's own convention
    modules = [n for n, _ in model.named_modules()]
    for target in sorted(targets):
        if not any(_ends(n, target) for n in modules):
            synonyms = [n for names in _QUERY_VALUE_NAMES if target in names for n in _counterparts(target, suffixes)]
            if synonyms:
                raise ModelError(f"no module is called `{target}`; this {kind} calls it `{synonyms[0]}`")
            raise ModelError(f"no module is called `{target}` in this {kind}: {nearest(target, suffixes)}")
    return sorted(targets)


def _block_outputs(model: nn.Module) -> list[str]:
    modules = dict(model.named_modules())
    closed = tuple(f"{n}." for n, m in modules.items() if isinstance(m, UNCALLED_PARTS))
    names = [n for n in modules if not n.startswith(closed)]
    found = [
        [e for e in ends if any(_ends(n, e) for n in names)] for ends in (_ATTENTION_OUTPUTS, _FEED_FORWARD_OUTPUTS)
    ]
    if not all(found):
        missing = "feed-forward" if found[0] else "attention"
        linear = {n.rsplit(".", 1)[-1] for n, m in modules.items() if _is_linear(m)}
        raise ModelError(
            f"cannot tell the {missing} outputs of {type(model).__name__}: name some of its linear layers in "
            f"`target_modules`: {', '.join(sorted(linear))}"
        )
    return [*found[0], *found[1]]


def _feed_forward_outputs(model: nn.Module) -> list[str]:
    """Whole names: some ends are those of attention outputs, too."""
    decoder = decoder_name(model)
    names = [n for n, m in model.named_modules() if n.startswith(decoder) and _is_linear(m)]
    behind_attention = [n for n in names if any(_ends(n, e) for e in _ATTENTION_OUTPUTS)]
    return [n for n in names if n not in behind_attention and any(_ends(n, e) for e in _FEED_FORWARD_OUTPUTS)]


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _counterparts(target: str, suffixes: set[str]) -> list[str]:
    for names in _QUERY_VALUE_NAMES:
        if target in names and len(names) == 2:
            position = names.index(target)
            return [other[position] for other in _QUERY_VALUE_NAMES if len(other) == 2 and other[position] in suffixes]
    return []


@torch.no_grad()
def relative_change(new: Tensor, old: Tensor) -> float:
    """|new - old| / |old|, Frobenius, fp64."""
    return float((new.double() - old.double()).norm() / old.double().norm().clamp(min=1e-300))

"""What a language model will take, by arithmetic from its configuration alone: no weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core.errors import ModelError, first_line
from ..learning.learner import Learner
from ..learning.training_defaults import take_language_defaults
from ..models.gguf import located
from ..models.in_memory import InMemory
from ..models.language_loading import quiet
from ..models.precision import Loading
from ..rules import FixedMask, InfLoRA, Rule, SubspaceProjection, WeightProjection
from ..rules.layer_memory import bytes_of_input
from ..streams import Stream
from ..tuners import AllWeights

TRIED = 10**9  # parameters up to which `--plan` also tries the run itself
PROCESS = 700 * 2**20  # Python and its libraries, bytes
OPTIMIZERS = {"8bit": 2, "sgd": 0, "adafactor": 0, "lion": 4, "adagrad": 4}  # bytes a parameter; Adam's two moments: 8
NAMES = {
    "weights": "weights of the base", "adapter": "what is trained, and the past beside it", "gradients": "gradients",
    "optimizer": "optimizer", "rules": "what rules remember", "activations": "activations", "process": "the process",
}  # fmt: skip


@dataclass(frozen=True)
class OnPaper:
    """Bytes, of one process at its peak and of one commit.

    Attributes:
        parts: by the keys of `NAMES`; other: activations with the other choice of gradient checkpointing.
        disk, once: of every commit, and of what is written once for all of them.
        tokens: in a training batch, at most.
    """

    parameters: int
    trainable: int
    precision: str
    checkpointing: bool
    parts: Mapping[str, int]
    other: int
    disk: int
    once: int
    tokens: int

    @property
    def memory(self) -> int:
        return sum(self.parts.values())

    def text(self) -> str:
        lines = [f"by arithmetic: {self.parameters:,} parameters in {self.precision}, {self.trainable:,} trained"]
        lines += [f"  {NAMES[key]:<40} {_size(value):>9}" for key, value in self.parts.items() if value]
        switch = "without" if self.checkpointing else "with"
        at = f"{self.tokens:,} tokens a batch"
        lines.append(f"  {'memory at the peak':<40} {_size(self.memory):>9}  ({at}; {switch} gradient_checkpointing")
        lines[-1] += f" {_size(self.memory - self.parts['activations'] + self.other)})"
        once = f", and {_size(self.once)} once" if self.once else ""
        lines.append(f"  {'disk':<40} {_size(self.disk):>9}  a task{once}, without what is predicted")
        return "\n".join(lines)


def on_paper(learner: Learner, stream: Stream) -> OnPaper | None:
    """See the module; None for models that answer no prompts, which are small enough to be tried.

    Raises:
        ModelError: there is no configuration, or the tuner does not fit it.
    """
    setup = learner.setup
    if stream.modality != "language" or setup.model is None or setup.recipe.tuner.own_backbone("language") is not None:
        return None
    take_language_defaults(setup)
    loading, training, tuner = setup.loading_of("language"), setup.training, setup.recipe.tuner
    model = _skeleton(setup.model, loading)
    config = model.config.get_text_config(decoder=True)
    parameters = sum(p.numel() for p in model.parameters())
    dtype = loading.torch_dtype or getattr(model.config, "dtype", None) or torch.float32
    bits = _bits(loading.quantization or getattr(model.config, "quantization_config", None))
    weights = _weights(model, dtype, bits)
    with torch.device("meta"):
        attached: Any = tuner.attach(model)
    trainable = sum(p.numel() for p in attached.parameters() if p.requires_grad)
    rules = [_remembered(rule, attached) for rule in setup.recipe.rules]
    memory, once, each = (sum(part) for part in zip(*rules, strict=True)) if rules else (0, 0, 0)
    own = 0 if isinstance(tuner, AllWeights) else 4 * trainable
    beside = setup.recipe.consolidation.branch == "fresh" and (bits or dtype.itemsize < 4)
    batch = int(training["per_device_train_batch_size"])
    tokens = batch * (loading.max_length or min(512, getattr(config, "max_position_embeddings", None) or 512))
    checkpointing = bool(training.get("gradient_checkpointing"))
    activations = [_activations(config, tokens, batch, dtype, loading, on) for on in (checkpointing, not checkpointing)]
    state = next((size for name, size in OPTIMIZERS.items() if name in str(training.get("optim", ""))), 8)
    return OnPaper(
        parameters=parameters,
        trainable=trainable,
        precision=f"{bits:g} bits" if bits else str(dtype).removeprefix("torch."),
        checkpointing=checkpointing,
        parts={
            "weights": weights,
            "adapter": own * (len(stream) if beside else 1),
            "gradients": 4 * trainable,
            "optimizer": state * trainable,
            "rules": memory,
            "activations": activations[0],
            "process": PROCESS,
        },
        other=activations[1],
        disk=_stored(attached, setup.recipe.rules) + each,
        once=once,
        tokens=tokens,
    )


def _skeleton(source: Any, loading: Loading) -> Any:
    """The model without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    try:
        with quiet():
            if isinstance(source, InMemory):
                config = source.model.config
            else:
                folder, file = located(source, loading)
                given = {"gguf_file": file} if file else {}
                config = AutoConfig.from_pretrained(folder, trust_remote_code=loading.trust_remote_code, **given)
            auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            with torch.device("meta"):
                return auto.from_config(config, trust_remote_code=loading.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"cannot read the configuration of `{source}` ({first_line(error)}): give a hub id or a folder with "
            "config.json"
        ) from error


def _bits(quantization: Any) -> float:
    """Of a quantised weight, its scales included; 0 where none is quantised. Blocks of 64 share a scale in fp32."""
    if quantization is None:
        return 0.0
    if isinstance(quantization, str):
        return 8.0 if quantization == "int8" else 4.5
    said = quantization if isinstance(quantization, dict) else quantization.to_dict()
    if said.get("load_in_4bit"):
        return 4.5
    bits = next((said[name] for name in ("bits", "w_bit", "nbits", "weight_bits") if name in said), 8)
    return float(bits) + (0.5 if bits < 8 else 0.0)


def _weights(model: Any, dtype: torch.dtype, bits: float) -> int:
    """Bytes. Quantisations leave embeddings, norms and the last layer as they are."""
    last = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not last] if bits else []
    packed = sum(m.weight.numel() for m in linear)
    return round(packed * bits / 8) + (sum(p.numel() for p in model.parameters()) - packed) * dtype.itemsize


def _activations(
    config: Any, tokens: int, batch: int, dtype: torch.dtype, loading: Loading, checkpointing: bool
) -> int:
    """What a backward pass needs of a forward pass through frozen layers, bytes.

    A layer of a decoder keeps of each token: two norms, which are computed in fp32 (4 h and h s each), queries, keys,
    values and what attention gives ((2 q + 2 kv) s), the fp32 input of adapters (4 h), and three products of the
    feed-forward network (3 i s); h, q, kv, i are widths, s bytes a number. Checkpointing keeps h s a layer, and the
    layer that is being computed again. The logits of all tokens stand there three times, once in the model's precision.
    """
    s, h = dtype.itemsize, int(config.hidden_size)
    heads = int(config.num_attention_heads)
    size = getattr(config, "head_dim", None) or h // heads
    q, kv = heads * size, (getattr(config, "num_key_value_heads", None) or heads) * size
    i, layers = int(getattr(config, "intermediate_size", None) or 4 * h), int(config.num_hidden_layers)
    layer = tokens * (2 * (4 + s) * h + (2 * q + 2 * kv) * s + (4 * h if s < 4 else 0) + 3 * i * s)
    if loading.attn_implementation == "eager":
        layer += 2 * s * heads * tokens * tokens // batch
    logits = tokens * int(config.vocab_size) * (s + 8)
    return logits + (layers * tokens * h * s + layer if checkpointing else layers * layer)


def _stored(model: Any, rules: Sequence[Rule]) -> int:
    """Of what a task has trained: entries in a mask alone, and a bit an entry that says where they are; bytes."""
    masks = [rule for rule in rules if isinstance(rule, FixedMask)]
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    total = 0.0
    for p in (p for p in model.parameters() if p.requires_grad):
        free = not masks or (id(p) in tables and masks[0].embeddings == "free")
        total += p.numel() * (4.0 if free else 4 * masks[0].keep + 0.125)
    return round(total)


def _remembered(rule: Rule, model: nn.Module) -> tuple[int, int, int]:
    """What a rule holds in memory and what it stores: bytes in memory, written once, and with every task."""
    if isinstance(rule, FixedMask):
        entries = sum(p.numel() for p in model.parameters() if p.requires_grad)  # free ones too: at most
        bits = -(-entries // 8)  # of the mask; in training, values at the start and a byte for each entry beside them
        return entries * 5, 0 if rule.each_task else bits, bits if rule.each_task else 0
    if isinstance(rule, WeightProjection):
        return rule.bytes_held(model), 0, 0
    if isinstance(rule, SubspaceProjection | InfLoRA):
        widths = _inputs(model)
        wide, rows, exact = max(widths, default=0), 0, False
        if isinstance(rule, SubspaceProjection):
            wide, rows, exact = rule.wide, rule.sketch_rows, rule.energy == 1
        return sum(16 * min(d, wide) * d for d in widths), 0, sum(bytes_of_input(d, wide, rows, exact) for d in widths)
    return 0, 0, 0


def _inputs(model: nn.Module) -> list[int]:
    """Widths of what the tuned layers read; those of one block that read the same input count once."""
    found = {}
    for name, module in model.named_modules():
        if name.endswith("lora_A.default") and isinstance(module, nn.Linear):
            found[name.rsplit(".", 4)[0], module.in_features] = module.in_features
    return list(found.values())


def _size(value: int) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"

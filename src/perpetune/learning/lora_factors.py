"""A change of weights as factors of low rank: those of a stored LoRA as they are, or those of a difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..consolidation.base import Files, StoredFiles
from ..tuners.peft_tuner import changes_base, peft_dict

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LINEAR, EMBEDDING = (".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")
# settings of peft's LoRA under which it is not W + s B A on the base as it is, or which vLLM does not serve
OTHERWISE = (
    "use_dora", "lora_bias", "modules_to_save", "target_parameters", "layer_replication", "trainable_token_indices",
    "alora_invocation_tokens", "use_qalora", "arrow_config", "use_bdlora", "velora_config",
)  # fmt: skip


@dataclass(frozen=True)
class Factors:
    """dW = scale * B A of one module, B (d_out x r), A (r x d_in); of an embedding its transpose, (V x d)."""

    A: Tensor
    B: Tensor
    scale: float
    embedding: bool = False

    @property
    def rank(self) -> int:
        return self.A.shape[0]


Change = dict[str, Factors]  # by the name of the module in the base model


def stored_factors(commit: StoredFiles) -> Change | str:
    """The change that a commit's adapter makes, with the bits that it stores; or why it is no plain LoRA, in words."""
    from peft.utils.other import get_pattern_key

    config = commit.json(CONFIG) if commit.has(CONFIG) else {}
    kind = str(config.get("peft_type", "no adapter of peft"))
    if kind != "LORA":
        return f"is {kind}, and not LoRA"
    if config.get("bias", "none") != "none":
        return f"has bias={config['bias']}"
    if changes_base(SimpleNamespace(**config)):
        return f"starts with a part of the base (init_lora_weights={config['init_lora_weights']})"
    if found := next((name for name in OTHERWISE if config.get(name)), None):
        return f"has {found}"
    tensors, change = commit.tensors(WEIGHTS), {}
    ends = {key: end for key in tensors for end in (*LINEAR, *EMBEDDING) if key.endswith(end)}
    if odd := sorted(tensors.keys() - ends.keys()):
        return f"holds {odd[0]}"
    for key, end in ends.items():
        pair = next((pair for pair in (LINEAR, EMBEDDING) if end == pair[0]), None)
        if pair is None:
            continue
        name, A, B = key.removeprefix(PREFIX).removesuffix(end), tensors[key], tensors[key.removesuffix(end) + pair[1]]
        alphas = config.get("alpha_pattern") or {}
        alpha = alphas.get(get_pattern_key(list(alphas), name), config["lora_alpha"])
        divisor = math.sqrt(A.shape[0]) if config.get("use_rslora") else A.shape[0]
        change[name] = Factors(A, B, alpha / divisor, pair is EMBEDDING)
    return change


def joined(parts: Sequence[tuple[Change, float]]) -> Change:
    """sum_t f_t s_t B_t A_t as one change: A = [A_1; A_2; ...], B = [B_1 B_2 ...], of summed rank.

    Where all f_t s_t are the same, it stays the scale and no bit of a factor changes; else B_t becomes f_t s_t B_t and
    the scale 1.

    Args:
        parts: changes with their factors f.
    """
    scales = {factors.scale * f for change, f in parts for factors in change.values()}
    common = scales.pop() if len(scales) == 1 else None
    whole: Change = {}
    for name in dict.fromkeys(name for change, _ in parts for name in change):
        own = [(change[name], f) for change, f in parts if name in change]
        A = torch.cat([part.A for part, _ in own], 0)
        B = torch.cat([part.B if common is not None else part.B * (part.scale * f) for part, f in own], 1)
        whole[name] = Factors(A, B, 1.0 if common is None else common, own[0][0].embedding)
    return whole


@torch.no_grad()
def found_factors(new: nn.Module, old: nn.Module) -> Change | str:
    """The difference of two models of one architecture as factors, to the rounding of the old weights; or why there are
    none, in words: a parameter that no LoRA changes, or a difference whose rank saves nothing, r (m + n) >= m n."""
    change: Change = {}
    modules, states = dict(old.named_modules()), (new.state_dict(), old.state_dict())
    for key in states[1]:
        if torch.equal(states[0][key], states[1][key]):
            continue
        name, _, part = key.rpartition(".")
        module: Any = modules[name]
        kind = type(module).__name__
        if part != "weight" or not (isinstance(module, (nn.Linear, nn.Embedding)) or kind == "Conv1D"):
            return f"changes `{key}`"
        W = states[1][key].float()
        dW = states[0][key].float() - W
        dW = dW if isinstance(module, nn.Linear) else dW.T  # embeddings (V x d) and Conv1D (in x out)
        U, S, Vh = torch.linalg.svd(dW, full_matrices=False)
        m, n = dW.shape
        # W + dW was rounded, each entry by eps |W| / 2 at most: singular values as small as that noise's are none
        noise = torch.finfo(states[1][key].dtype).eps * float(W.abs().max()) * math.sqrt(m + n)
        rank = int((S > max(noise, 1e-6 * float(S[0]))).sum())
        if rank * (m + n) >= m * n:
            return f"changes `{key}` by a matrix ({m} x {n}) of rank {rank}"
        root = S[:rank].sqrt()
        A, B = root[:, None] * Vh[:rank], U[:, :rank] * root
        change[name] = Factors(A.contiguous(), B.contiguous(), 1.0, isinstance(module, nn.Embedding))
    return change


def adapter_files(change: Change, base: str | None, task_type: str | None, model: nn.Module) -> Files:
    """The files of a folder that plain peft loads onto the base, and vLLM as a LoRA module.

    vLLM reads one rank and one alpha of all modules, peft what the patterns say besides: with alpha = s r in each, the
    scale is s for both. An s r that is no integer goes into B, and s is 1.

    Args:
        base: where the base model is; model: the base model, whose modules are named.
    """
    from peft import LoraConfig

    ranks = {name: factors.rank for name, factors in change.items()}
    largest, scale = max(ranks.values()), next(iter(change.values())).scale
    if not all(math.isclose(scale * r, round(scale * r), rel_tol=1e-12) for r in ranks.values()):  # rsLoRA's
        change, scale = {name: replace(f, B=f.B * scale, scale=1.0) for name, f in change.items()}, 1.0
    other = {name: rank for name, rank in ranks.items() if rank != largest}
    modules = dict(model.named_modules())
    config = LoraConfig(
        r=largest,
        lora_alpha=round(scale * largest),
        lora_dropout=0.0,
        target_modules=_targets(list(change), model, short=task_type is not None),
        rank_pattern=other,
        alpha_pattern={name: round(scale * rank) for name, rank in other.items()},
        fan_in_fan_out=any(_is_conv1d(modules[name]) for name in change if name in modules),
        task_type=task_type,
        base_model_name_or_path=base,
    )
    tensors: dict[str, Tensor] = {}
    for name, factors in change.items():
        ends = EMBEDDING if factors.embedding else LINEAR
        tensors |= {f"{PREFIX}{name}{end}": t for end, t in zip(ends, (factors.A, factors.B), strict=True)}
    plain = peft_dict(config)
    return {WEIGHTS: tensors, CONFIG: {**plain, "target_modules": sorted(plain["target_modules"])}}


def _is_conv1d(module: Any) -> bool:
    """Whether a module, perhaps with an adapter around it, keeps its weight as (in x out), as GPT-2's do."""
    return type(module.get_base_layer() if hasattr(module, "get_base_layer") else module).__name__ == "Conv1D"


def _targets(names: list[str], model: nn.Module, short: bool) -> list[str]:
    """The ends of the names where they say the same, as other servers expect them; else whole names.

    Args:
        short: whether the model is loaded by a class that has the modules of `model` and no others (no pooler more).
    """
    ends = sorted({name.rpartition(".")[2] for name in names})
    tuned = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends}
    return ends if short and tuned == set(names) else names

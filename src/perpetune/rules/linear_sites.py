"""Where the trained weights of linear maps are, which of them read the same input, and what they read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.errors import RuleError
from ..models.towers import text_tower
from ..tuners.linear_map import LinearMap
from .lora_sites import lora_pairs
from .modes import modes_kept
from .shards import plain_name, reshard

Batches = Callable[[], Iterable[dict[str, Tensor]]]


def linear_sites(model: nn.Module, prompts: str = "per_head") -> tuple[list[LinearMap], dict[str, nn.Parameter]]:
    """The trained weights that act through linear maps in the order of the modules, and all others by name.

    Found are the weights of linear layers, both factors of LoRA, IA3's vectors, and what a module offers of its own by
    `linear_maps(prompts) -> list[LinearMap]` (prompts, prefixes, biases).

    Args:
        prompts: under which conditions prompts and prefixes are protected: "per_head" or "published".

    Raises:
        RuleError: a layer trains two LoRA adapters at once.
    """
    from transformers.pytorch_utils import Conv1D

    reshard(model)
    factors = {id(p): f"{q.name}.{key}" for q in lora_pairs(model) for key, p in (("A", q.A), ("B", q.B))}
    modules = [(plain_name(name), module) for name, module in model.named_modules()]
    sites: list[LinearMap] = []
    for name, module in modules:
        found = _scales(module)
        if hasattr(module, "linear_maps"):
            found = module.linear_maps(prompts)
        sites += [replace(m, name=f"{name}.{m.name}" if name else m.name) for m in found if m.weight.requires_grad]
    known = {id(site.weight) for site in sites}
    users: dict[int, list[tuple[str, nn.Module, str, nn.Parameter]]] = {}
    for name, module in modules:
        for key, p in module.named_parameters(recurse=False):
            if p.requires_grad and id(p) not in known:
                users.setdefault(id(p), []).append((name, module, key, p))
    others: dict[str, nn.Parameter] = {}
    for uses in users.values():
        name, first, key, p = uses[0]
        # One use that is no linear layer (an embedding tied to the output) spoils all: its inputs are not seen.
        if all(isinstance(m, nn.Linear | Conv1D) and k == "weight" and type(m) is type(first) for _, m, k, _ in uses):
            users_of = tuple(m for _, m, _, _ in uses)
            kept_transposed = isinstance(first, Conv1D)  # W^T (d x out)
            view, rows = (_transposed, 1) if kept_transposed else (None, 0)
            sites.append(LinearMap(factors.get(id(p), name), p, users_of, view, rows))
        else:
            others[f"{name}.{key}" if name else key] = p
    return sites, others


def _transposed(values: Tensor) -> Tensor:
    return values.mT


def _row(values: Tensor) -> Tensor:
    return values.view(1, -1)


def _scales(module: nn.Module) -> list[LinearMap]:
    """IA3: the vector l of l * (W x), which reads W x, or of W (l * x) before a feed-forward layer, which reads x."""
    from peft.tuners.ia3 import IA3Layer

    if not isinstance(module, IA3Layer) or module.disable_adapters:
        return []
    base = module.get_base_layer()
    vectors = [module.ia3_l[name] for name in module.active_adapters if name in module.ia3_l]
    reader, what = (module, "input") if module.is_feedforward else (base, "output")
    return [LinearMap("ia3", v, (reader,), _row, None, elementwise=True, reads=what) for v in vectors]  # type: ignore[arg-type]


def see_inputs(
    model: nn.Module,
    sites: Sequence[LinearMap],
    batches: Iterable[dict[str, Tensor]],
    see: Callable[[LinearMap, Tensor, Tensor | None], None],
) -> None:
    """Run batches in eval mode without gradients; `see(site, X, mask)` gets every input X (... x d) of the sites.

    `mask` is the batch's `attention_mask` or `decoder_attention_mask` (N x T) where X is N x T x d or N T x d; else
    None, and every row counts. So it is, too, where a decoder's inputs have as many rows as the encoder's and could be
    mistaken for them, and outside of the text tower of a model that reads images as well.
    """
    masks: list[Tensor] = []
    text = text_tower(model)
    masked = None if text is None else {id(module) for module in text.modules()}

    def show(site: LinearMap, module: nn.Module, X: Tensor) -> None:
        known = masks if masked is None or id(module) in masked else []
        fitting = [mask for mask in known if X.shape[:-1] in (mask.shape, (mask.numel(),))]
        see(site, X, fitting[0] if len(fitting) == 1 else None)

    def listen(site: LinearMap, module: nn.Module) -> RemovableHandle:
        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            show(site, module, args[0] if args else next(iter(kwargs.values())))

        if site.reads == "input":
            return module.register_forward_pre_hook(look, with_kwargs=True)
        return module.register_forward_hook(lambda _, args, output: show(site, module, output))

    handles = [listen(site, module) for site in sites for module in site.modules]
    try:
        with modes_kept(model), torch.no_grad():
            model.eval()
            for batch in batches:
                masks = [batch[k] for k in ("attention_mask", "decoder_attention_mask") if k in batch]
                inputs = [v for k, v in batch.items() if k.startswith("decoder_") and v.ndim == 2]
                if "decoder_attention_mask" not in batch and any(v.shape == m.shape for v in inputs for m in masks):
                    masks = []
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
        reshard(model)


def shared_inputs(model: nn.Module, sites: Sequence[LinearMap], batches: Batches) -> list[list[LinearMap]]:
    """The sites in groups that read the very same tensors (query, key and value; gate and up), seen on one batch.

    Raises:
        RuleError: there is no batch, or a site was not called.
    """
    calls: dict[str, list[tuple[Any, ...]]] = {site.name: [] for site in sites}
    alive = []  # so that no address is used twice

    def note(site: LinearMap, X: Tensor, _: Tensor | None) -> None:
        alive.append(X)
        calls[site.name].append((X.data_ptr(), X._version, X.dtype, X.shape, X.stride()))

    see_inputs(model, sites, islice(batches(), 1), note)
    if not alive:
        raise RuleError("no protected layer was called: give `batches` that yield the model's inputs, as keywords")
    groups: dict[tuple[Any, ...], list[LinearMap]] = {}
    for site in sites:
        if not calls[site.name]:
            raise RuleError(f"`{site.name}` trains but was not called, so that its inputs are not known: freeze it")
        groups.setdefault((site.elementwise, *calls[site.name]), []).append(site)
    return list(groups.values())

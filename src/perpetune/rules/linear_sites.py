"""Where the trained weights of linear layers are, which of them read the same input, and what they read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RuleError
from .lora_sites import lora_pairs

Batches = Callable[[], Iterable[dict[str, Tensor]]]


@dataclass(frozen=True)
class LinearSite:
    """One trained weight W (out x d) of y = W x.

    Attributes:
        name: of the layer in the model; `<layer>.A` and `<layer>.B` for the factors of its LoRA, whatever the adapter
            is called.
        weight: W as the layer keeps it.
        modules: the layers that use it, more than one where it is tied.
        transposed: the layer keeps W^T (d x out), as `Conv1D` does.
    """

    name: str
    weight: nn.Parameter
    modules: tuple[nn.Module, ...]
    transposed: bool = False

    @property
    def width(self) -> int:
        """d."""
        return self.weight.shape[0 if self.transposed else 1]

    def matrix(self, values: Tensor) -> Tensor:
        """A view, out x d, of the weight or of something of its shape; of sharded ones, the rows that are here.

        Raises:
            RuleError: it is sharded by columns of W, so that no row is here as a whole.
        """
        values = values.detach()
        if hasattr(values, "to_local"):
            columns = 0 if self.transposed else 1
            if any(p.is_shard(columns) for p in values.placements):  # type: ignore[attr-defined]
                raise RuleError(
                    f"`{self.name}` is sharded by input columns: shard it by rows, as FSDP2 does by default"
                )
            values = values.to_local()
        return values.mT if self.transposed else values


def reshard(model: nn.Module) -> None:
    """FSDP2 leaves a root's weights whole after a forward pass with no backward one: what trains are the shards."""
    for module in model.modules():
        if hasattr(module, "reshard"):  # FSDPModule, whose import takes a second
            module.reshard()  # type: ignore[operator]


def linear_sites(model: nn.Module) -> tuple[list[LinearSite], dict[str, nn.Parameter]]:
    """The trained weights of linear layers in the order of the modules, and all other trained parameters by name.

    Raises:
        RuleError: a layer trains two LoRA adapters at once.
    """
    from transformers.pytorch_utils import Conv1D

    reshard(model)
    factors = {id(p): f"{q.name}.{key}" for q in lora_pairs(model) for key, p in (("A", q.A), ("B", q.B))}
    users: dict[int, list[tuple[str, nn.Module, str, nn.Parameter]]] = {}
    for name, module in model.named_modules():
        for key, p in module.named_parameters(recurse=False):
            if p.requires_grad:
                users.setdefault(id(p), []).append((name, module, key, p))
    sites: list[LinearSite] = []
    others: dict[str, nn.Parameter] = {}
    for uses in users.values():
        name, first, key, p = uses[0]
        # One use that is no linear layer (an embedding tied to the output) spoils all: its inputs are not seen.
        if all(isinstance(m, nn.Linear | Conv1D) and k == "weight" and type(m) is type(first) for _, m, k, _ in uses):
            modules = tuple(m for _, m, _, _ in uses)
            sites.append(LinearSite(factors.get(id(p), name), p, modules, isinstance(first, Conv1D)))
        else:
            others[f"{name}.{key}" if name else key] = p
    return sites, others


def see_inputs(
    model: nn.Module,
    sites: Sequence[LinearSite],
    batches: Iterable[dict[str, Tensor]],
    see: Callable[[LinearSite, Tensor, Tensor | None], None],
) -> None:
    """Run batches in eval mode without gradients; `see(site, X, mask)` gets every input X (... x d) of the sites.

    `mask` is the batch's `attention_mask` (N x T) where X is N x T x d or N T x d; else None, and every row counts. So
    it is, too, where a decoder's inputs have the shape of the encoder's and could be mistaken for them.
    """
    mask: Tensor | None = None

    def hook(site: LinearSite) -> Callable[..., None]:
        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            X = args[0] if args else next(iter(kwargs.values()))
            fits = mask is not None and X.shape[:-1] in (mask.shape, (mask.numel(),))
            see(site, X, mask if fits else None)

        return look

    modes = [(m, m.training) for m in model.modules()]
    handles = [m.register_forward_pre_hook(hook(site), with_kwargs=True) for site in sites for m in site.modules]
    try:
        model.eval()
        with torch.no_grad():
            for batch in batches:
                mask = batch.get("attention_mask")
                if mask is not None and any(
                    k.startswith("decoder_") and v.shape == mask.shape for k, v in batch.items()
                ):
                    mask = None
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
        reshard(model)
        for module, training in modes:
            module.training = training


def shared_inputs(model: nn.Module, sites: Sequence[LinearSite], batches: Batches) -> list[list[LinearSite]]:
    """The sites in groups that read the very same tensors (query, key and value; gate and up), seen on one batch.

    Raises:
        RuleError: there is no batch, or a site was not called.
    """
    calls: dict[str, list[tuple[Any, ...]]] = {site.name: [] for site in sites}
    alive = []  # so that no address is used twice

    def note(site: LinearSite, X: Tensor, _: Tensor | None) -> None:
        alive.append(X)
        calls[site.name].append((X.data_ptr(), X._version, X.dtype, X.shape, X.stride()))

    see_inputs(model, sites, islice(batches(), 1), note)
    if not alive:
        raise RuleError("no protected layer was called: give `batches` that yield the model's inputs, as keywords")
    groups: dict[tuple[Any, ...], list[LinearSite]] = {}
    for site in sites:
        if not calls[site.name]:
            raise RuleError(f"`{site.name}` trains but was not called, so that its inputs are not known: freeze it")
        groups.setdefault(tuple(calls[site.name]), []).append(site)
    return list(groups.values())

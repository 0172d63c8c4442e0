"""Buffers that training changes: rules do not see them, and old outputs depend on them all the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.utils.hooks import RemovableHandle


def moving_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules whose buffers move in training mode and stay in eval mode, by name.

    Found are those with a `running_mean` (batch and instance norms, and whatever is made like them) and spectral norms,
    whose vectors a power iteration turns. `changed_buffers` sees all others, once they have moved.
    """
    return {name: module for name, module in model.named_modules() if _moves(module)}


def _moves(module: nn.Module) -> bool:
    spectral = any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())
    return spectral or isinstance(module, _SpectralNorm) or isinstance(getattr(module, "running_mean", None), Tensor)


def in_eval_mode(modules: Iterable[nn.Module]) -> list[RemovableHandle]:
    """Each of these computes as in eval mode, whatever mode the model is put in, until its handles are removed."""
    handles: list[RemovableHandle] = []
    for module in modules:
        found: list[bool] = []  # modes that the module had, innermost call last

        def enter(m: nn.Module, _: Any, found: list[bool] = found) -> None:
            found.append(m.training)
            m.training = False

        def leave(m: nn.Module, _: Any, __: Any, found: list[bool] = found) -> None:
            m.training = found.pop()

        # before the hook in which a spectral norm looks at the mode
        handles.append(module.register_forward_pre_hook(enter, prepend=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    return handles


def buffer_digests(model: nn.Module) -> dict[str, str]:
    """A digest of the bits of every buffer, by name; counters of batches, which no output depends on, are left out."""
    return {
        name: _digest(buffer)
        for name, buffer in model.named_buffers()
        if not name.endswith("num_batches_tracked") and buffer.device.type != "meta"
    }


def _digest(buffer: Any) -> str:
    local: Tensor = buffer.to_local() if hasattr(buffer, "to_local") else buffer
    flat = local.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(flat.numpy().tobytes(), digest_size=16).hexdigest()


def changed_buffers(model: nn.Module, before: Mapping[str, str]) -> list[str]:
    """Names of the buffers that are not what they were when `before` was taken, or are gone."""
    now = buffer_digests(model)
    return [name for name, digest in before.items() if now.get(name) != digest]

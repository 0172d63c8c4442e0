"""Models of several towers: which modules read the tokens of a text, and not an image."""

from __future__ import annotations

from torch import nn


def text_tower(model: nn.Module) -> nn.Module | None:
    """The part that reads tokens in a transformers model that reads images as well (CLIP, LLaVA); None: it reads but
    one kind of input. Found in a wrapper, too."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            kinds = module.input_modalities
            both = not isinstance(kinds, str) and {"image", "text"} <= set(kinds)
            return module.get_decoder() if both else None
    return None


def decoder_name(model: nn.Module) -> str:
    """Where the names begin of what is tuned by default: the decoder of a model that reads images and answers in words,
    as LLaVA is tuned; "", everything, of any other."""
    tower = text_tower(model)
    generates = getattr(model, "can_generate", None)
    if tower is None or tower is model or generates is None or not generates():
        return ""
    return next(f"{name}." for name, module in model.named_modules() if module is tower)

"""The lines of Python on a model card: how an export is loaded from its folder, and used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..heads.readout import Readout
from ..models.backbone import Backbone
from ..models.public_name import public_name, repository
from .export_head import ExportedHead, base_of, beside_usage


def merged_usage(exported: ExportedHead, backbone: Backbone) -> list[str]:
    """Of a plain model, with the head that it has or that lies beside it."""
    kind, reads = _kind(exported.model), _reader(backbone)
    load = [
        f"from transformers import {reads}, {kind}",
        f'model, reader = {kind}.from_pretrained("."), {reads}.from_pretrained(".")',
    ]
    if exported.beside and exported.readout is not None:
        return beside_usage(backbone, exported.readout.normalised, load)
    return [*load, _first_use(backbone, exported.model)]


def adapters_usage(
    backbone: Backbone,
    base: tuple[str | None, str | None],
    routes: Mapping[str, Any],
    heads: Mapping[str, Readout | None],
) -> list[str]:
    """Of adapters; the first with a head that lies beside it is the one that is used.

    Args:
        base: where the base model is, and its GGUF file, if it is one.
    """
    model, reads = base_of(backbone), _reader(backbone)
    decoder = not getattr(model.config, "is_encoder_decoder", False)
    auto = "AutoModelForCausalLM" if decoder else "AutoModelForSeq2SeqLM"
    kind = auto if backbone.modality == "language" and not hasattr(model.config, "vision_config") else _kind(model)
    names = [each["name"] for each in routes["adapters"]]
    beside = next((name for name in names if heads.get(name) is not None), None)
    first = beside or names[0]
    load = [
        f"from peft import PeftModel\nfrom transformers import {reads}, {kind}",
        *_base(*base, kind, reads),
        f'model = PeftModel.from_pretrained(model, "{first}", adapter_name="{first}").eval()',
    ]
    if others := [name for name in names if name != first]:
        load.append(f'model.load_adapter("{others[0]}", "{others[0]}")  # then model.set_adapter("{others[0]}")')
    if beside is not None and (readout := heads[beside]) is not None:
        return beside_usage(backbone, readout.normalised, load, f"{beside}/")
    return load


def _base(source: str | None, gguf_file: str | None, kind: str, reads: str) -> list[str]:
    """The lines that load the base model, by a name that says something elsewhere."""
    given = f', gguf_file="{gguf_file}"' if gguf_file else ""
    where = "" if repository(source) else "  # the folder of the base model"
    load = f"model, reader = {kind}.from_pretrained(base{given}), {reads}.from_pretrained(base{given})"
    return [f'base = "{public_name(source or "BASE")}"{where}', load]


def _kind(model: Any) -> str:
    import transformers

    return type(model).__name__ if hasattr(transformers, type(model).__name__) else "AutoModel"


def _reader(backbone: Backbone) -> str:
    if hasattr(base_of(backbone).config, "vision_config"):
        return "AutoProcessor"
    return "AutoImageProcessor" if backbone.modality == "image" else "AutoTokenizer"


def _first_use(backbone: Backbone, model: Any) -> str:
    if backbone.modality == "language":
        prompt = 'reader("a prompt", return_tensors="pt").input_ids'
        return f"print(reader.decode(model.generate({prompt}, max_new_tokens=50)[0]))"
    given = '"a text"' if backbone.modality == "text" else "images=[picture]"
    output = f'model(**reader({given}, return_tensors="pt"))'
    if "Classification" in type(model).__name__:
        return f"print(model.config.id2label[int({output}.logits.argmax())])"
    return f"output = {output}"

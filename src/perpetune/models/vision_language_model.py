"""A language model that reads an image with every prompt (LLaVA, Qwen2-VL and others of their make)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.errors import ModelError
from ..streams.passage import unmark
from ..streams.pictures import eight_bits
from .answer_scoring import LONGEST, Read
from .backbone import Examples
from .language_model import LanguageBackbone

# what image processors say of an image that models of this make read; others read something of every token besides
KNOWN = {"pixel_values", "pixel_attention_mask", "image_sizes", "image_grid_thw"}
TOKENS = {"input_ids", "attention_mask", "mm_token_type_ids"}


def reads_images(config: Any) -> bool:
    """Whether a configuration is that of a decoder that transformers loads with `AutoModelForImageTextToText`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return not config.is_encoder_decoder and config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


class PicturedBackbone(LanguageBackbone):
    """A decoder that reads images as tokens among those of the prompt, and its processor.

    The image stands where the prompt says `<image>` (the processor's own placeholder), and where it says nothing it
    comes first, on a line of its own, as LLaVA was trained (2304.08485). Its tokens are never cut, and do not count
    among the `max_length` of a prompt. Prompts without images are read, too.
    """

    def __init__(self, model: Any, processor: Any, *, max_length: int, name: str) -> None:
        """See `LanguageBackbone`.

        Raises:
            ModelError: the model's token for images is another than the processor's.
        """
        tokenizer = getattr(processor, "tokenizer", processor)
        token: str | None = getattr(processor, "image_token", None)
        picture = None if token is None else int(tokenizer.convert_tokens_to_ids(token))
        expected = getattr(model.config, "image_token_id", None)
        if picture is not None and expected not in (None, picture):
            raise ModelError(
                f"the processor of `{name}` writes images as token {picture} (`{token}`), the model reads them "
                f"at token {expected}: set image_token in the one or image_token_id in the other"
            )
        super().__init__(model, tokenizer, max_length=max_length, name=name, picture=picture)
        self.processor, self._token = processor, token

    def open(
        self, labels: Sequence[str], reads: Sequence[Read], *, rouge_l: bool = False, longest: int = LONGEST
    ) -> None:
        super().open(labels, reads, rouge_l=rouge_l, longest=longest)
        wrong = [text for text in self.labels if self._token and self._token in text]
        if wrong:
            raise ModelError(f"the answer `{wrong[0][:40]}` holds `{self._token}`, the place of an image: reword it")

    def prepare(self, rows: datasets.Dataset, *, all_turns: bool = False) -> Examples:
        """Rows with `image` and `prompt`, or without images; the pixels of all rows stay in memory.

        Raises:
            ModelError: images without prompts; a processor that places no images, or of a model of another make; more
                than one place in a prompt, or a place and no image; an image that leaves no room for a prompt.
        """
        if "image" not in rows.column_names:
            for text in rows["prompt"][:] if "prompt" in rows.column_names else ():
                self._placed(text, 0)
            return super().prepare(rows, all_turns=all_turns)
        if "prompt" not in rows.column_names:
            raise ModelError(f"`{self.name}` answers prompts: give (image, prompt) for each image")
        prompts, pictures = [], []
        for row in rows.select_columns(["image", "prompt"]):
            tokens, picture = self._read(row["image"])
            text = self._placed(row["prompt"], 1)
            room = self.max_length if self.limit is None else min(self.max_length, self.limit - len(tokens) + 1)
            if room < 1:
                raise ModelError(
                    f"an image takes {len(tokens)} tokens, and `{self.name}` reads {self.limit} of a prompt: set its "
                    "processor to smaller images"
                )
            (read,) = self.tokens.prompts([text], room)
            place = read.tokens.index(self.tokens.picture)  # type: ignore[arg-type]
            whole = [*read.tokens[:place], *tokens, *read.tokens[place + 1 :]]
            prompts.append(read._replace(tokens=whole))
            pictures.append(picture)
        examples = self._examples(prompts, rows)
        return [{**example, "picture": picture} for example, picture in zip(examples, pictures, strict=True)]

    def _placed(self, prompt: str, images: int) -> str:
        """The prompt with the place of its image."""
        found = unmark(prompt)[0].count(self._token) if self._token else 0
        if found > images:
            raise ModelError(
                f"a prompt has {found} places for images (`{self._token}`) and {images} images: `{prompt[:40]}…`"
            )
        return prompt if found == images else f"{self._token}\n{prompt}"

    def _read(self, image: Any) -> tuple[list[int], dict[str, Tensor]]:
        """The tokens that an image takes, and what the model reads there."""
        kind = type(self.processor).__name__
        if self._token is None or not hasattr(self.processor, "image_processor"):
            raise ModelError(f"{kind} of `{self.name}` has no token that stands for an image: use a model like LLaVA")
        given = self.processor(
            images=[eight_bits(image)], text=[self._token], add_special_tokens=False, return_tensors="pt"
        )
        strange = sorted(given.keys() - KNOWN - TOKENS)
        if strange:
            raise ModelError(
                f"{kind} of `{self.name}` gives `{strange[0]}`, which is not known here: use a model that reads images "
                "as tokens among others alone (LLaVA, Qwen2-VL)"
            )
        return given["input_ids"][0].tolist(), {name: given[name] for name in sorted(KNOWN & given.keys())}

    def _padded(self, sequences: list[list[int]]) -> dict[str, Tensor]:
        batch = super()._padded(sequences)
        if "mm_token_type_ids" in getattr(self.processor, "model_input_names", ()):
            kinds = self.processor.create_mm_token_type_ids(batch["input_ids"].tolist())
            batch["mm_token_type_ids"] = torch.tensor(kinds)
        return batch

    def _pictures(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """What the processor says of the images of a batch, one image after the other."""
        pictures = [e["picture"] for e in examples if "picture" in e]
        return {name: _together([p[name] for p in pictures]) for name in (pictures[0] if pictures else ())}


def _together(parts: Sequence[Tensor]) -> Tensor:
    """(n_i x ...) to (sum n_i x ...), the other dimensions filled up with 0 to the largest, as processors do it."""
    largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    filled = [
        pad(part, [x for size, most in zip(part.shape[:0:-1], largest[::-1], strict=True) for x in (0, most - size)])
        for part in parts
    ]
    return torch.cat(filled)

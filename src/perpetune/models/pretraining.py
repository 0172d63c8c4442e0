"""Pre-train a small ViT on labelled pictures: real weights for the demo and the examples, without a download."""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..streams.pictures import eight_bits

if TYPE_CHECKING:
    from transformers import ViTModel


@dataclass(frozen=True)
class Pretraining:
    """What a ViT is made of and how it is pre-trained.

    Attributes:
        image_size, patch_size: in pixels; pictures are resized to a square of `image_size`.
        width, depth, heads: of the encoder; its MLPs are 4 x width.
        epochs, batch_size, learning_rate, weight_decay: AdamW, one cycle with a tenth of warm-up and a cosine.
        shift, tilt, zoom: pictures are moved by up to `shift` pixels, turned by up to `tilt` degrees and scaled by up
            to 1 +- `zoom`, their borders repeated.
        noise: deviation of the Gaussian noise on the normalised pixels.
        rotations: pictures are turned by a random multiple of 90 degrees, and the turned ones are classes of their own.
        seed: of everything random.
        threads: torch's threads while it trains; the same bits come out for the same number, on one machine.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    epochs: int
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    shift: float = 0.0
    tilt: float = 0.0
    zoom: float = 0.0
    noise: float = 0.0
    rotations: bool = False
    seed: int = 0
    threads: int = 1

    @property
    def turns(self) -> int:
        return 4 if self.rotations else 1

    def steps(self, samples: int) -> int:
        return self.epochs * math.ceil(samples / self.batch_size)


@dataclass(frozen=True)
class PretrainedViT:
    """A ViT, its image processor, and the classifier on its class token that it was trained with (not saved)."""

    model: ViTModel
    processor: Any
    classifier: nn.Linear
    settings: Pretraining
    facts: dict[str, Any] = field(default_factory=dict)

    @torch.inference_mode()
    def accuracy(self, images: Sequence[Image.Image], labels: Sequence[int]) -> float:
        """Share of upright pictures that the classifier names, among all classes including the turned ones."""
        self.model.eval()
        pixels, y = prepare(self.processor, images), torch.as_tensor(labels)
        with _threads(self.settings.threads):
            scores = torch.cat([_scores(self.model, self.classifier, x) for x in pixels.split(256)])
        return (scores.argmax(1) == y * self.settings.turns).double().mean().item()

    def save(self, folder: Path) -> None:
        """Write a plain transformers folder, and `pretraining.json` with the settings and `facts`."""
        from transformers.utils import logging

        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            self.model.save_pretrained(folder)
            self.processor.save_pretrained(folder)
        finally:
            if shown:
                logging.enable_progress_bar()
        facts = {**self.facts, "settings": asdict(self.settings), "versions": versions()}
        (folder / "pretraining.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Of all that decides on the bits of a pre-trained model."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "scikit-learn", "pillow")}


def pretrain_vit(
    images: Sequence[Image.Image],
    labels: Sequence[int],
    settings: Pretraining,
    *,
    advance: Callable[[int], None] = lambda steps: None,
) -> PretrainedViT:
    """Train a ViT from random weights to name `labels` (0-based, without gaps) from its class token.

    The processor is ViT's own without torchvision: resize (bilinear, antialiased), scale to [0, 1], and normalise with
    the mean and deviation of these `images`; all of that is saved with the model, so that `AutoImageProcessor` repeats
    it. Pictures are taken as RGB, which is what image processors everywhere expect.

    Args:
        images: PIL pictures of any mode and size.
        labels: one per picture.
        settings: see `Pretraining`.
        advance: called with the number of steps done since the last call; `settings.steps(len(images))` in all.
    """
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        image_size=settings.image_size,
        patch_size=settings.patch_size,
        hidden_size=settings.width,
        num_hidden_layers=settings.depth,
        num_attention_heads=settings.heads,
        intermediate_size=4 * settings.width,
        initializer_range=settings.width**-0.5,  # the usual 0.02 is made for far greater widths
    )
    processor = _fit_processor(images, settings.image_size)
    pixels, y = prepare(processor, images), torch.as_tensor(labels)
    classes = settings.turns * (int(y.max()) + 1)
    with _threads(settings.threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = ViTModel(config, add_pooling_layer=False)
        # positions as loud as pixels from the start: with the usual small ones a short training hardly learns where
        nn.init.normal_(model.embeddings.position_embeddings, std=1.0)
        nn.init.normal_(model.embeddings.patch_embeddings.projection.weight, std=1 / (3 * settings.patch_size))
        classifier = nn.Linear(settings.width, classes)
        _train(model, classifier, pixels, y, settings, advance)
    return PretrainedViT(model.eval(), processor, classifier, settings)


def _train(
    model: ViTModel,
    classifier: nn.Linear,
    pixels: Tensor,
    y: Tensor,
    settings: Pretraining,
    advance: Callable[[int], None],
) -> None:
    draw = torch.Generator().manual_seed(settings.seed)
    parameters = [*model.parameters(), *classifier.parameters()]
    optimizer = torch.optim.AdamW(parameters, settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, settings.steps(len(y)), pct_start=0.1, cycle_momentum=False
    )
    model.train()
    for _ in range(settings.epochs):
        for chosen in torch.randperm(len(y), generator=draw).split(settings.batch_size):
            x, target = augment(pixels[chosen], y[chosen], settings, draw)
            loss = nn.functional.cross_entropy(_scores(model, classifier, x), target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            advance(1)


def _scores(model: ViTModel, classifier: nn.Linear, pixels: Tensor) -> Tensor:
    return classifier(model(pixel_values=pixels).last_hidden_state[:, 0])


def augment(x: Tensor, y: Tensor, settings: Pretraining, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Another look at x (B x C x H x H); a picture of class c turned k times gets the class `turns * c + k`."""
    count = len(x)
    if settings.rotations:
        k = torch.randint(4, (count,), generator=draw)
        x = x.clone()
        for turn in (1, 2, 3):
            x[k == turn] = x[k == turn].rot90(turn, (2, 3))
        y = 4 * y + k
    if settings.shift or settings.tilt or settings.zoom:
        angle, zoom, right, down = 2 * torch.rand(4, count, generator=draw) - 1  # each (B,), in [-1, 1]
        angle, zoom = angle * math.radians(settings.tilt), 1 + zoom * settings.zoom
        reach = 2 * settings.shift / x.shape[-1]  # a grid runs from -1 to 1
        rows = [
            zoom * angle.cos(),
            -zoom * angle.sin(),
            right * reach,
            zoom * angle.sin(),
            zoom * angle.cos(),
            down * reach,
        ]
        grid = nn.functional.affine_grid(torch.stack(rows, 1).view(count, 2, 3), list(x.shape), align_corners=False)
        x = nn.functional.grid_sample(x, grid, padding_mode="border", align_corners=False)
    if settings.noise:
        x = x + settings.noise * torch.randn(x.shape, generator=draw)
    return x, y


def prepare(processor: Any, images: Sequence[Image.Image]) -> Tensor:
    """Pixel values (N x 3 x H x H) as the saved processor gives them."""
    return processor(images=[eight_bits(image) for image in images], return_tensors="pt").pixel_values.float()


def _fit_processor(images: Sequence[Image.Image], image_size: int) -> Any:
    import transformers

    # since 5.x the plain name means the torchvision one
    kind = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
    size = {"height": image_size, "width": image_size}
    plain = prepare(kind(size=size, do_normalize=False), images).double()
    mean, std = plain.mean((0, 2, 3)), plain.std((0, 2, 3)).clamp(min=1e-3)
    return kind(
        size=size, image_mean=[round(m, 4) for m in mean.tolist()], image_std=[round(s, 4) for s in std.tolist()]
    )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def progress_bar(description: str, steps: int, show: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar on stderr with the time left; gives the function to call with the number of steps done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not show) as bar:
        task = bar.add_task(description, total=steps)
        yield lambda done: bar.advance(task, done)

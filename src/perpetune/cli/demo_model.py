"""The demo's model: a micro ViT, pre-trained on the spot on upright digits, and cached."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from PIL import Image

from ..core.environment import cache_folder
from ..core.errors import ModelError
from ..models import pretraining as pretrain
from ..models.pretraining import PretrainedViT, Pretraining, pretrain_vit, progress_bar, versions

DIGITS = Pretraining(
    image_size=8,
    patch_size=2,
    width=64,
    depth=2,
    heads=4,
    epochs=32,
    batch_size=64,
    learning_rate=3e-3,
    shift=0.5,
    tilt=15.0,
    zoom=0.15,
    noise=0.3,
)


def demo_vit(
    cache_dir: str | os.PathLike[str] | None = None, *, settings: Pretraining = DIGITS, progress: bool = True
) -> Path:
    """The demo's micro ViT: a folder that `AutoModel` and `AutoImageProcessor` load. Made in seconds, then cached.

    It has seen upright digits of the first half of scikit-learn's `load_digits` (see `digits_halves`) but for a fifth,
    on which its accuracy is measured (`held_out_accuracy` in `pretraining.json`); never an image of the built-in
    streams, though the same ten digits.

    Args:
        cache_dir: where to keep it; by default `$PERPETUNE_CACHE`, or else `~/.cache/perpetune`.
        settings: another model than the demo's, for instance with fewer epochs.
        progress: show a bar while it is made.

    Raises:
        ModelError: the cache cannot be written.
    """
    from ..streams import digits_halves
    from ..streams.sampling import stratified

    digits, _ = digits_halves()
    held_out = torch.zeros(len(digits.labels), dtype=torch.bool)
    held_out[stratified(digits.labels, len(held_out) // 5, 0, "held-out")] = True
    key = hashlib.sha256(json.dumps([asdict(settings), versions()], sort_keys=True).encode())
    for content in (digits.images.tobytes(), digits.labels.tobytes(), Path(pretrain.__file__).read_bytes()):
        key.update(content)

    def make() -> PretrainedViT:
        images = [Image.fromarray(image) for image in digits.images]
        train, test = (torch.nonzero(rows)[:, 0].tolist() for rows in (~held_out, held_out))
        with progress_bar("Pre-training a micro ViT, once", settings.steps(len(train)), progress) as advance:
            vit = pretrain_vit([images[i] for i in train], digits.labels[train].tolist(), settings, advance=advance)
        accuracy = vit.accuracy([images[i] for i in test], digits.labels[test].tolist())
        facts = {"data": "sklearn.datasets.load_digits, first half, upright", "train_images": len(train)}
        return replace(vit, facts={**facts, "held_out_images": len(test), "held_out_accuracy": accuracy})

    root = Path(cache_dir) if cache_dir else cache_folder()
    return _cached(root.expanduser() / f"digits-vit-{key.hexdigest()[:16]}", make)


def _cached(folder: Path, make: Callable[[], PretrainedViT]) -> Path:
    """`folder`, made if it is missing: written aside and renamed, so that it is there whole or not there."""
    if (folder / "pretraining.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        vit = make()
        vit.save(aside)
        aside.chmod(0o755)  # mkdtemp's folders are closed to others
        aside.rename(folder)
    except OSError as error:
        if not (folder / "pretraining.json").is_file():  # else another process was faster, with the same content
            raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _unwritable(folder: Path, error: OSError) -> ModelError:
    reason = error.strerror or type(error).__name__
    return ModelError(f"cannot keep the demo's model in `{folder.parent}` ({reason}): set PERPETUNE_CACHE to a folder")

"""The demo's model: a micro ViT, pre-trained on the spot on upright digits in clutter, and cached."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from PIL import Image

from ..core.environment import cache_folder
from ..core.errors import ModelError
from ..models import pretraining as pretrain
from ..models.pretraining import PretrainedViT, Pretraining, pretrain_vit, progress_bar, versions

DIGITS = Pretraining(
    image_size=16,
    patch_size=4,
    width=64,
    depth=2,
    heads=4,
    epochs=8,
    batch_size=32,
    learning_rate=4e-3,
    noise=0.2,
    rotations=True,
)
VIEWS = 16  # scenes of every pre-training image, each at another place in other clutter


def demo_vit(
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    settings: Pretraining = DIGITS,
    views: int = VIEWS,
    progress: bool = True,
) -> Path:
    """The demo's micro ViT: a folder that `AutoModel` and `AutoImageProcessor` load. Made in seconds, then cached.

    It has seen digits of the first half of scikit-learn's `load_digits` (see `digits_halves`), upright and turned, in
    scenes like those of the stream `digits-clutter`; a fifth was held out, on which its accuracy is measured
    (`held_out_accuracy` in `pretraining.json`). It never saw an image of the built-in streams, nor a transposed digit.

    Args:
        cache_dir: where to keep it; by default `$PERPETUNE_CACHE`, or else `~/.cache/perpetune`.
        settings: another model than the demo's, for instance with fewer epochs.
        views: scenes of every pre-training image.
        progress: show a bar while it is made.

    Raises:
        ModelError: the cache cannot be written.
    """
    from ..streams import builtin, digits_halves, scenes
    from ..streams.sampling import stratified

    digits, _ = digits_halves()
    held_out = np.zeros(len(digits.labels), dtype=bool)
    held_out[stratified(digits.labels, len(held_out) // 5, 0, "held-out")] = True
    key = hashlib.sha256(json.dumps([asdict(settings), views, versions()], sort_keys=True).encode())
    for content in (digits.images.tobytes(), digits.labels.tobytes()):
        key.update(content)
    for source in (pretrain, builtin):
        key.update(Path(str(source.__file__)).read_bytes())

    def make() -> PretrainedViT:
        train, test = (digits.labels[rows] for rows in (~held_out, held_out))
        shown = [Image.fromarray(x) for view in range(views) for x in scenes(digits.images[~held_out], view)]
        hidden = [Image.fromarray(x) for x in scenes(digits.images[held_out], "held-out")]
        with progress_bar("Pre-training a micro ViT, once", settings.steps(len(shown)), progress) as advance:
            vit = pretrain_vit(shown, np.tile(train, views).tolist(), settings, advance=advance)
        accuracy = vit.accuracy(hidden, test.tolist())
        facts = {"data": "sklearn.datasets.load_digits, first half, in clutter", "train_images": len(train)}
        return replace(
            vit, facts={**facts, "views": views, "held_out_images": len(test), "held_out_accuracy": accuracy}
        )

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

"""Two hundred small tasks of handwritten characters: all of Omniglot's, and some turned, two a task.

    python examples/many_characters.py --stream ../shared/streams/omniglot --out runs/many-characters

The characters of all alphabets are shuffled (`--seed`) and dealt to tasks, upright ones first; if they are too few for
`--tasks`, those turned by 90 and 270 degrees follow, which count as characters of their own, of the alphabets that
`--unseen` names. `--out` is a stream of Parquet files with the columns `image` and `label`.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from datasets import Dataset, Features, Image, Value, disable_progress_bars

from perpetune import load_stream
from perpetune.streams.task import Stream

UNSEEN = ["balinese", "early_aramaic", "greek", "latin", "tagalog"]  # of pretrain_omniglot_vit.py
SPLITS = ("train", "test")
COLUMNS = Features({"image": Image(), "label": Value("string")})


def characters(stream: Stream) -> dict[str, dict[str, list]]:
    """Label text of each character: its pictures in each split."""
    found: dict[str, dict[str, list]] = {}
    for task in stream:
        for split in SPLITS:
            rows = getattr(task, split)
            for image, label in zip(rows["image"], rows["label"], strict=True):
                found.setdefault(stream.labels[label], {name: [] for name in SPLITS})[split].append(image)
    return found


def turned(pictures: dict[str, list], degrees: int) -> dict[str, list]:
    return {split: [image.rotate(degrees) for image in images] for split, images in pictures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stream", required=True, help="folder of tasks with the columns `image` and `label`")
    parser.add_argument("--out", required=True, type=Path, help="folder to write the stream to")
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--characters", type=int, default=2, help="of a task")
    parser.add_argument("--unseen", nargs="+", default=UNSEEN, help="alphabets whose characters are turned as well")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the characters")
    options = parser.parse_args()

    disable_progress_bars()
    stream, draw = load_stream(options.stream), random.Random(options.seed)
    upright = list(characters(stream).items())
    unseen = characters(stream.select(options.unseen)).items()
    sideways = [
        (f"{name} turned by {degrees}", turned(pictures, degrees)) for degrees in (90, 270) for name, pictures in unseen
    ]
    draw.shuffle(upright)
    draw.shuffle(sideways)
    dealt, size = upright + sideways, options.characters
    if len(dealt) < options.tasks * size:
        parser.error(f"{len(dealt)} characters are too few for {options.tasks} tasks of {size}: give less --tasks")
    for task in range(options.tasks):
        place = options.out / f"task-{task:03d}"
        place.mkdir(parents=True)
        own = dealt[task * size : (task + 1) * size]
        for split in SPLITS:
            rows = [{"image": image, "label": name} for name, pictures in own for image in pictures[split]]
            Dataset.from_list(rows, features=COLUMNS).to_parquet(place / f"{split}.parquet")
    print(f"{options.tasks} tasks of {size} characters: {options.out}")


if __name__ == "__main__":
    main()

"""Pre-train a small ViT on some alphabets of an image stream, so that the others can be learned one after another.

    python examples/pretrain_omniglot_vit.py --stream ../shared/streams/omniglot --out runs/omniglot-vit

About half a million parameters, 28 x 28 pixels in patches of 7; characters turned by 90, 180 and 270 degrees count as
characters of their own. Takes about four minutes on one core. `--out` is a plain transformers folder: give it to
`perpetune compare --model`, with the alphabets printed at the end as the stream's tasks.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from perpetune import load_stream
from perpetune.models.pretraining import Pretraining, pretrain_vit, progress_bar

SETTINGS = Pretraining(
    image_size=28,
    patch_size=7,
    width=96,
    depth=4,
    heads=4,
    epochs=60,
    batch_size=64,
    learning_rate=2e-3,
    shift=2.0,
    tilt=10.0,
    zoom=0.1,
    rotations=True,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stream", required=True, help="folder of tasks with the columns `image` and `label`")
    parser.add_argument("--alphabets", nargs="+", help="tasks to pre-train on; default: the three with most characters")
    parser.add_argument("--out", required=True, type=Path, help="folder to write the model to")
    parser.add_argument("--epochs", type=int, default=SETTINGS.epochs)
    parser.add_argument("--seed", type=int, default=SETTINGS.seed)
    parser.add_argument("--threads", type=int, default=1, help="the weights depend on it in their last bits")
    options = parser.parse_args()
    settings = replace(SETTINGS, epochs=options.epochs, seed=options.seed, threads=options.threads)

    stream = load_stream(options.stream)
    most = sorted(stream, key=lambda task: -len(task.classes))[:3]
    seen = stream.select(options.alphabets or [task.name for task in most])
    number = {c: i for i, c in enumerate(sorted({c for task in seen for c in task.classes}))}

    def split(name: str) -> tuple[list, list[int]]:
        tables = [getattr(task, name) for task in seen]
        return [x for t in tables for x in t["image"]], [number[y] for t in tables for y in t["label"]]

    images, labels = split("train")
    with progress_bar(f"Pre-training on {len(number)} characters", settings.steps(len(images))) as advance:
        vit = pretrain_vit(images, labels, settings, advance=advance)
    accuracy = vit.accuracy(*split("test"))
    facts = {"data": [task.name for task in seen], "train_images": len(images), "held_out_accuracy": accuracy}
    replace(vit, facts=facts).save(options.out)

    parameters = sum(p.numel() for p in vit.model.parameters())
    print(f"pre-trained on:     {', '.join(task.name for task in seen)}")
    print(f"held-out accuracy:  {accuracy:.1%} of {settings.turns * len(number)} classes; {parameters:,} parameters")
    print(f"left for a stream:  {','.join(task.name for task in stream if task.name not in facts['data'])}")
    print(f"model:              {options.out}")


if __name__ == "__main__":
    main()

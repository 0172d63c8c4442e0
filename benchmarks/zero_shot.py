"""What a small CLIP still knows without training after it has learned something else.

    python -m benchmarks.zero_shot --stream PATH/TO/omniglot --model runs/omniglot-clip

A CLIP of two small towers is pre-trained on three alphabets with the names of their characters as captions (a few
minutes; kept in --model), then learns five others one after another: LoRA on all linear layers of both towers, merged
after each task. `zero-shot`: test pictures of the three alphabets, named among all their captions, before and after.
With `observe`, the projection rule is shown training pairs of the three before the first task.
"""

from __future__ import annotations

import argparse
import json
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import perpetune as pt
from perpetune.models.backbone import Backbone
from perpetune.models.loading import load_backbone
from perpetune.models.pretraining import Pretraining, augment

from .command import Benchmark, Option
from .questions import BATCH, SEEN, TASKS, table

RECIPES = ("lora", "pegp_lora_fresh", "pegp_lora_fresh, observe")
LOOKS = Pretraining(28, 7, 96, 4, 4, epochs=60, shift=2.0, tilt=10.0, zoom=0.1)  # of pre-training, and the image tower
EPOCHS, SIZE, RATE = 4, 16, 2e-3  # of a task
Examples = list[dict[str, Any]]


def new_clip(folder: Path, labels: Sequence[str], seed: int) -> None:
    """Write a random CLIP, its image processor, and a tokenizer of the letters and digits of these labels."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["<pad>", "<s>", "<unk>", "</s>"]
    words = sorted({*string.ascii_lowercase, *string.digits, "/", "character", *(y.split("/")[0] for y in labels)})
    vocabulary = {piece: i for i, piece in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    parts = r"[a-z_]+|\d|/"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(_regex(parts), "removed", invert=True)
    ends = [(name, vocabulary[name]) for name in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    names = dict(zip(("pad_token", "bos_token", "unk_token", "eos_token"), special, strict=True))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **names)
    fast.save_pretrained(folder)
    width = LOOKS.width
    tower = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": LOOKS.heads}
    marks = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3, "vocab_size": len(vocabulary)}
    wide = {"initializer_factor": 5.0}  # CLIP's own is made for far greater widths
    text = {**tower, **marks, **wide, "num_hidden_layers": 2, "max_position_embeddings": 16}
    sizes = {"image_size": LOOKS.image_size, "patch_size": LOOKS.patch_size, "num_hidden_layers": LOOKS.depth}
    torch.manual_seed(seed)
    config = transformers.CLIPConfig(text_config=text, vision_config={**tower, **sizes, **wide}, projection_dim=64)
    transformers.CLIPModel(config).save_pretrained(folder)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"height": LOOKS.image_size, "width": LOOKS.image_size},
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")


def _regex(pattern: str) -> Any:
    from tokenizers import Regex

    return Regex(pattern)


def opened(folder: Path, labels: Sequence[str]) -> Backbone:
    """The CLIP as what is trained with the loss of `ContrastiveHead`: image to text."""
    backbone = load_backbone(str(folder), "image")
    backbone.open_for([], labels)
    backbone.open(labels, paired=True)  # type: ignore[attr-defined]
    return backbone


def pretrain(folder: Path, stream: pt.Stream, names: Sequence[str], epochs: int, seed: int = 0) -> None:
    """Train both towers on these tasks, with their label texts as captions."""
    new_clip(folder, stream.labels, seed)
    backbone = opened(folder, stream.labels)
    examples = [e for task in stream.select(names) for e in backbone.prepare(task.train)]
    weights = list(backbone.parameters())
    optimizer = torch.optim.AdamW(weights, lr=LOOKS.learning_rate, weight_decay=LOOKS.weight_decay)
    steps = epochs * -(-len(examples) // LOOKS.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LOOKS.learning_rate, steps, pct_start=0.1)
    draw = torch.Generator().manual_seed(seed)
    backbone.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(examples), generator=draw).split(LOOKS.batch_size):
            batch = backbone.batch([examples[i] for i in chosen.tolist()])
            batch["pixel_values"], _ = augment(batch["pixel_values"], batch["own"], LOOKS, draw)
            _step(backbone, batch, optimizer, weights)
            schedule.step()
    backbone.eval()
    backbone.model.save_pretrained(folder)


def _step(backbone: Backbone, batch: dict[str, Tensor], optimizer: Any, weights: Sequence[Tensor]) -> None:
    optimizer.zero_grad()
    (-backbone(**batch)[:, -1].mean()).backward()  # log p of the own text
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()


def named(backbone: Backbone, examples: Examples, stream: pt.Stream, classes: Sequence[int]) -> float:
    """Share of these pictures, in points, whose own text comes first among those of the classes."""
    texts = backbone.label_embeddings(stream.label_texts(classes))
    best = (backbone.features(examples, BATCH) @ texts.T).argmax(1)
    hits = [classes[i] == e["label"] for i, e in zip(best.tolist(), examples, strict=True)]
    return 100 * sum(hits) / len(hits)


def course(folder: Path, recipe: str, stream: pt.Stream, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Learn all tasks; what is named right before and after, of the alphabets before and of those learned."""
    torch.manual_seed(seed)
    name, _, observing = recipe.partition(", ")
    made = pt.make_recipe({"name": name, "target": "all-linear"})
    backbone = opened(folder, stream.labels)
    before, learned = stream.select(options.seen), stream.select(options.tasks)
    old = [e for task in before for e in backbone.prepare(task.test)]
    known = sorted({c for task in before for c in task.classes})
    found: dict[str, Any] = {"recipe": recipe, "seed": seed, "zero-shot before": named(backbone, old, stream, known)}
    own = []
    for t, task in enumerate(learned):
        backbone.model = made.tuner.attach(backbone.model)
        if observing and not t:
            shown = [e for task in before for e in backbone.prepare(task.train)]
            made.rules[0].observe(backbone, lambda shown=shown: _batches(backbone, shown))  # type: ignore[attr-defined]
        examples = backbone.prepare(task.train)
        weights = [p for p in backbone.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.01)
        steps = options.epochs * -(-len(examples) // SIZE)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step, steps=steps: 1 - step / steps)
        batches = lambda examples=examples: _batches(backbone, examples)  # noqa: E731
        attached = pt.attach(backbone, optimizer, made.rules, index=t, batches=batches)
        order = torch.Generator().manual_seed(1000 * seed + t)
        backbone.train()
        for _ in range(options.epochs):
            for chosen in torch.randperm(len(examples), generator=order).split(SIZE):
                _step(backbone, backbone.batch([examples[i] for i in chosen.tolist()]), optimizer, weights)
                schedule.step()
        attached.remove()
        backbone.eval()
        for rule in made.rules:
            rule.end_task(pt.TaskContext(backbone, t, batches))
        backbone.model = backbone.model.merge_and_unload()
        own.append(named(backbone, backbone.prepare(task.test), stream, task.classes))
    new = [e for task in learned for e in backbone.prepare(task.test)]
    classes = sorted({c for task in learned for c in task.classes})
    return {
        **found,
        "zero-shot after": named(backbone, old, stream, known),
        "each task when learned, told": sum(own) / len(own),
        "all tasks at the end": named(backbone, new, stream, classes),
    }


def _batches(backbone: Backbone, examples: Examples) -> Iterator[dict[str, Tensor]]:
    return (backbone.batch(examples[i : i + BATCH]) for i in range(0, len(examples), BATCH))


def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    stream, folder = pt.load_stream(options.stream), Path(options.model)
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        pretrain(folder, stream, options.seen, options.pretraining_epochs)
    rows = []
    for recipe in options.recipes:
        for seed in options.seeds:
            rows.append(course(folder, recipe, stream, options, seed))
            print(rows[-1], flush=True)
    return rows


OPTIONS = (
    Option("--stream", "omniglot", "folder of omniglot"),
    Option("--model", "runs/omniglot-clip", "folder of the pre-trained CLIP, made where it is missing"),
    Option("--seen", list(SEEN), "tasks to pre-train on", nargs="+"),
    Option("--tasks", list(TASKS), "tasks to learn, in this order", nargs="+"),
    Option("--recipes", list(RECIPES), "what to learn with", nargs="+"),
    Option("--pretraining-epochs", LOOKS.epochs, "of pre-training"),
    Option("--epochs", EPOCHS, "of a task", least=1),
    Option("--seeds", [0, 1, 2], "of tuning", nargs="+", type=int),
)
main = Benchmark("zero_shot", __doc__, OPTIONS, measured, lambda rows: print(table(rows))).main


if __name__ == "__main__":
    main()

"""Which head of sums reads frozen features best: maps, their width, ridge or discriminant analysis, a choice.

    python -m benchmarks.frozen_heads --model PATH/TO/all-MiniLM-L6-v2 --streams PATH/TO/streams --json heads.json
    python -m benchmarks.frozen_heads --model PATH/TO/VIT --streams PATH/TO/streams --only omniglot --json vit.json

Class-incremental accuracy after the last task, over all test examples, in percent: mean over seeds and standard
deviation. Heads of sums do not depend on the order of tasks, so that they are shown all training samples at once. A
seed draws the training samples and the random maps. Features are computed once and kept in --cache.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import perpetune as pt
from benchmarks.routing import bundled_model
from perpetune.heads import make_head
from perpetune.models.layers import read_layers
from perpetune.models.loading import load_backbone
from perpetune.models.views import read_views

FIVE = ["agnews", "amazon", "dbpedia", "sst2", "yelp"]
STREAMS: dict[str, dict[str, Any]] = {
    "banking77": {"source": "banking77", "train_limit": 700},
    "five texts": {"source": "cl-benchmark", "tasks": FIVE, "train_limit": 1000, "test_limit": 500},
    "fourteen texts": {"source": "cl-benchmark", "train_limit": 1000, "test_limit": 200},
    "omniglot": {"source": "omniglot", "tasks": ["balinese", "early_aramaic", "greek", "latin", "tagalog"]},
}
PICTURES = ("omniglot",)
TEXTS = [name for name in STREAMS if name not in PICTURES]
DEFAULT = {"features": 2048, "map": "kernel_normalised", "gamma": 0.3}  # of the recipe `default`, without adapters
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "ncm": ("ncm", {}),
    "ridge, raw": ("ridge", {"features": 0}),
    "ridge, normalised": ("ridge", {"features": 0, "map": "normalised"}),
    "ridge, 1,024 ReLU (`frozen_ridge`)": ("ridge", {}),
    "ridge, 1,024 ReLU, normalised": ("ridge", {"map": "relu_normalised"}),
    "lda, raw": ("lda", {}),
    "lda, normalised": ("lda", {"map": "normalised"}),
    "lda, 1,024 ReLU, normalised": ("lda", {"map": "relu_normalised"}),
    "klda, 1,024": ("klda", {}),
    "anacp, 1,024": ("anacp", {}),
    "closed_form, at most 1,024": ("closed_form", {"features": 1024}),
    "closed_form, at most 2,048 (`frozen_best`)": ("closed_form", {}),
    "lda_ridge, 2,048 Fourier": ("lda_ridge", DEFAULT),
    "lda, normalised, three layers": ("lda", {"map": "normalised"}),
    "anacp, 1,024, three layers": ("anacp", {}),
    "lda_ridge, 2,048 Fourier, three layers (`default` without adapters)": ("lda_ridge", DEFAULT),
}
SEEN = {
    "ncm, 8 views": ("ncm", {}),
    "ridge, 1,024 ReLU, 8 views": ("ridge", {}),
    "lda, normalised, 8 views": ("lda", {"map": "normalised"}),
    "closed_form, at most 2,048, 8 views (`frozen_best`, of pictures)": ("closed_form", {}),
    "lda_ridge, 2,048 Fourier, three layers, 4 views": ("lda_ridge", DEFAULT),
    "lda_ridge, 2,048 Fourier, three layers, 8 views (`default` without adapters, of pictures)": ("lda_ridge", DEFAULT),
}
HEADS |= SEEN
LAYERS = {head: 3 for head in HEADS if ", three layers" in head}  # read side by side; of all others the last one
VIEWS = {head: 4 if "4 views" in head else 8 for head in SEEN}  # whose mean is read; of all others the picture alone


@functools.lru_cache(maxsize=2)
def features(
    model: str, pooling: Any, root: Path, stream: str, seed: int, cache: Path, layers: int = 1, views: int = 0
) -> dict[str, Any]:
    """Features, labels and ids of all training and test samples, and the label texts."""
    settings = {**STREAMS[stream], "source": str(root / STREAMS[stream]["source"])}
    loaded = pt.load_stream(seed=seed, **settings)
    ids = [i for task in loaded for i in task.train["id"]]
    read = (f".{layers}-layers" if layers > 1 else "") + (f".{views}-views" if views else "")
    read += f".{pooling}" if pooling else ""
    file = cache / f"{stream.replace(' ', '-')}.{seed}{read}.safetensors"
    if not file.exists():
        backbone = load_backbone(model, loaded.modality, max_length=32, pooling=pooling)
        read_layers(backbone, layers)
        read_views(backbone, views)
        found = {}
        for split in ("train", "test"):
            parts = [getattr(task, split) for task in loaded]
            found[f"{split}.f"] = torch.cat([backbone.pooled(backbone.prepare(rows), 64).cpu() for rows in parts])
            found[f"{split}.y"] = torch.cat([torch.tensor(rows["label"][:]) for rows in parts])
        cache.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(found, file)
    return {**safetensors.torch.load_file(file), "ids": ids, "labels": loaded.labels}


def accuracy(name: str, settings: Mapping[str, Any], data: Mapping[str, Any], seed: int) -> tuple[float, str]:
    """In percent, and what was chosen, for a head that chooses."""
    head = make_head(name, **settings)
    head.open(data["train.f"].shape[1], data["labels"], seed=seed)
    head.observe(data["train.f"], data["train.y"], data["ids"])
    right = torch.cat([head.scores(part).argmax(1) for part in data["test.f"].split(1000)]) == data["test.y"]
    choice = getattr(head, "choice", None)
    return 100 * float(right.double().mean()), str(choice()) if choice else ""


def table(found: Mapping[str, Mapping[str, Sequence[float]]], streams: Sequence[str]) -> str:
    lines = ["| head | " + " | ".join(streams) + " |", "| --- |" + " --- |" * len(streams)]
    for head in HEADS:
        cells = []
        for stream in streams:
            values = found.get(stream, {}).get(head, [])
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "")
        if any(cells):
            lines.append(f"| {head} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None, help="an encoder; default: the bundled MiniLM")
    parser.add_argument("--pooling", choices=("mean", "cls", "last"), help="default: that of the model")
    parser.add_argument("--streams", type=Path, required=True, help="the folder that holds these streams")
    parser.add_argument("--only", nargs="*", choices=STREAMS, default=TEXTS, help="which streams")
    parser.add_argument("--heads", nargs="*", choices=HEADS, default=list(HEADS), help="which heads")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, default=Path("frozen-features"), help="where features are kept")
    parser.add_argument("--json", type=Path, help="write all figures here; what it holds already is not measured again")
    args = parser.parse_args()
    model = args.model or bundled_model()
    found = json.loads(args.json.read_text(encoding="utf-8")) if args.json and args.json.exists() else {}
    for stream in args.only:
        for seed in args.seeds:
            for head in args.heads:
                if head in SEEN and stream not in PICTURES:
                    continue
                name, settings = HEADS[head]
                values, choices = (found.setdefault(stream, {}).setdefault(k, {}) for k in (head, f"{head}: chosen"))
                if str(seed) in values:
                    continue
                data = features(
                    model, args.pooling, args.streams, stream, seed, args.cache, LAYERS.get(head, 1), VIEWS.get(head, 0)
                )
                values[str(seed)], choices[str(seed)] = accuracy(name, settings, data, seed)
                print(f"{stream}, seed {seed}, {head}: {values[str(seed)]:.2f} {choices[str(seed)]}", flush=True)
                if args.json:
                    args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    numbers = {s: {head: list(values.values()) for head, values in heads.items()} for s, heads in found.items()}
    print(table(numbers, [s for s in STREAMS if s in numbers]))


if __name__ == "__main__":
    main()

"""Image benchmarks: new classes task by task, and DomainNet by domain.

Two orders of the classes are published. RanPAC (2307.02251), SimpleCIL (2303.07338) and PILOT (2309.07117) shuffle the
class numbers with numpy's legacy generator, seed 1993. LAE (2303.10070), PEGP (2405.13383) and PGP (ICLR 2024) take the
classes as they are numbered: the names that end in "-ordered", and those that only these have used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from datasets import Dataset

from ...core.errors import StreamError
from ..splitting import Draft, divide
from . import layouts
from .base import Benchmark, not_divided
from .listing import Splits

SEED = 1993
TEST_SHARE = 0.2  # of images that come without a split: L2P and DualPrompt divided ImageNet-R so


@dataclass(frozen=True)
class ClassIncremental:
    """Reads a dataset and deals its classes to tasks.

    Attributes:
        read: the dataset, from a folder or the Hub.
        classes: how many it has. A part of them, shuffled, would be another benchmark.
        per_task: classes a task. first: those of the first task, if different.
        seed: of the class order; None takes the classes as they are numbered.
        by_name: number the classes by their names, whatever the source says.
    """

    name: str
    read: Callable[[Path | None], Splits]
    classes: int
    per_task: int
    first: int | None = None
    seed: int | None = SEED
    by_name: bool = False

    def __call__(self, data: Path | None, classes_per_task: int | None) -> list[Draft]:
        splits = self.read(data)
        names = check_classes(splits, self.name, self.classes)
        names = sorted(names) if self.by_name else names
        size = classes_per_task or self.per_task
        first = size if classes_per_task else self.first or size
        groups = deal(names, size, first, self.seed)
        return _divide(splits, self.name, "class", groups)


def deal(names: Sequence[str], size: int, first: int, seed: int | None) -> list[list[str]]:
    """The classes of each task: `first` of them, then `size`, the last task what is left."""
    order = range(len(names)) if seed is None else np.random.RandomState(seed).permutation(len(names))
    dealt = [names[i] for i in order]
    starts = [0, *range(first, len(dealt), size)]
    return [dealt[start:end] for start, end in zip(starts, [*starts[1:], len(dealt)], strict=True)]


def check_classes(splits: Splits, name: str, count: int) -> list[str]:
    """The label texts, in the order of the dataset.

    Raises:
        StreamError: there are not `count` of them, or one lacks training or test images.
    """
    names = list(splits["train"].features["label"].names)
    if len(names) != count:
        raise StreamError(
            f"`{name}` has {count} classes, and {len(names)} were found: parts of it would be another benchmark, "
            "in another order. Unpack the data again"
        )
    for split, data in splits.items():
        lacking = set(range(count)) - set(data["label"][:])
        if lacking:
            what = {"train": "training"}.get(split, split)
            raise StreamError(f"class `{names[min(lacking)]}` of `{name}` has no {what} images: unpack the data again")
    return names


def domainnet_domains(data: Path | None, classes_per_task: int | None) -> list[Draft]:
    """One task a domain, by name. Test images of a class that the domain's training list lacks are left out: that of
    the paintings has no t-shirt."""
    not_divided("domainnet-domains", classes_per_task)
    splits = layouts.domainnet(data)
    check_classes(splits, "domainnet-domains", 345)
    drafts = []
    for draft in sorted(_divide(splits, "domainnet-domains", "domain", None), key=lambda draft: draft.name):
        train, test = draft.splits["train"], draft.splits["test"]
        drafts.append(replace(draft, splits={"train": train, "test": test.pick(np.isin(test.labels, train.labels))}))
    return drafts


def _divide(splits: dict[str, Dataset], name: str, by: str, groups: list[list[str]] | None) -> list[Draft]:
    return divide(
        splits,
        name,
        split_by=by,
        classes_per_task=None,
        test_share=TEST_SHARE,
        seed=0,
        order_seed=None,
        columns=None,
        groups=groups,
    )


FOLDERS = "train/<class>/*.jpg and test/<class>/*.jpg"
PILOT = f"the folder that the authors of SimpleCIL and PILOT give out ({FOLDERS})"
UNDIVIDED = (
    f"the unpacked archive, one folder a class, of which a fifth becomes test data, seeded and stratified; or {PILOT}"
)
HUB = "Leave data out to read {} from the Hub; or give its files train-*.parquet and {}-*.parquet, "
CIFAR = HUB.format(layouts.CIFAR100.source, "test") + "or images in train/<class>/ and test/<class>/"
CUB = f"Give data: the unpacked CUB_200_2011 with images.txt and its other lists; or {PILOT}"
DOMAINS = HUB.format(layouts.DOMAINNET.source, "test") + (
    "or the six unpacked archives with <domain>_train.txt and <domain>_test.txt beside them"
)


def _benchmark(drafts: ClassIncremental, summary: str, paper: str, get: str) -> Benchmark:
    return Benchmark(drafts.name, summary, paper, get, drafts)


VISION: tuple[Benchmark, ...] = (
    _benchmark(
        ClassIncremental("cifar100", layouts.cifar100, 100, 10),
        "CIFAR-100, 10 tasks of 10 classes (classes_per_task: 5 for 20 tasks), class order of seed 1993",
        "2307.02251",
        CIFAR,
    ),
    _benchmark(
        ClassIncremental("cifar100-ordered", layouts.cifar100, 100, 10, seed=None),
        "CIFAR-100, 10 tasks of 10 classes as they are numbered (classes_per_task: 5 for 20 tasks)",
        "2405.13383",
        CIFAR,
    ),
    _benchmark(
        ClassIncremental("cub200", layouts.cub200, 200, 20),
        "CUB-200-2011, 10 tasks of 20 birds (classes_per_task: 10 for 20 tasks), class order of seed 1993",
        "2307.02251",
        CUB,
    ),
    _benchmark(
        ClassIncremental("cub200-ordered", layouts.cub200, 200, 40, seed=None),
        "CUB-200-2011, 5 tasks of 40 birds as they are numbered",
        "PGP, ICLR 2024",
        CUB,
    ),
    _benchmark(
        ClassIncremental("imagenet-r", layouts.imagenet_variant, 200, 20),
        "ImageNet-R, 10 tasks of 20 classes (classes_per_task: 5 for 40 tasks), class order of seed 1993",
        "2307.02251",
        f"Give data: {UNDIVIDED}",
    ),
    _benchmark(
        ClassIncremental("imagenet-r-ordered", layouts.imagenet_variant, 200, 20, seed=None),
        "ImageNet-R, 10 tasks of 20 classes as they are numbered",
        "2405.13383",
        f"Give data: the lists of LAE, train_list.txt and val_list.txt, beside the unpacked archive; or {UNDIVIDED}",
    ),
    _benchmark(
        ClassIncremental("imagenet-a", layouts.imagenet_variant, 200, 20),
        "ImageNet-A, 10 tasks of 20 classes, class order of seed 1993",
        "2307.02251",
        f"Give data: {UNDIVIDED}",
    ),
    _benchmark(
        ClassIncremental("cars196", layouts.cars196, 196, 20, first=16, by_name=True),
        "Stanford Cars, a task of 16 cars and 9 of 20, class order of seed 1993",
        "2307.02251",
        HUB.format(layouts.CARS196.source, "test")
        + f"or cars_train/, cars_test/, devkit/ and cars_test_annos_withlabels.mat; or {FOLDERS}",
    ),
    _benchmark(
        ClassIncremental("domainnet", layouts.domainnet, 345, 69, seed=None),
        "DomainNet, 5 tasks of 69 classes as they are numbered, all six domains in each",
        "2405.13383",
        DOMAINS,
    ),
    Benchmark(
        "domainnet-domains",
        "DomainNet, the same 345 classes in 6 domains, by name: clipart, infograph, painting, quickdraw, real, sketch",
        "2311.17601",
        DOMAINS,
        domainnet_domains,
        {"scenario": "domain"},
    ),
    _benchmark(
        ClassIncremental("tiny-imagenet", layouts.tiny_imagenet, 200, 20, seed=None),
        "Tiny ImageNet, 10 tasks of 20 classes in the order of their ids, tested on its validation images",
        "PGP, ICLR 2024",
        HUB.format(layouts.TINY_IMAGENET.source, "valid") + f"or the unpacked tiny-imagenet-200; or {FOLDERS}",
    ),
)

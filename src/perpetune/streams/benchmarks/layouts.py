"""How each image dataset lies on disk: as it was published, or as one folder a class."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

from datasets import ClassLabel

from ...core.errors import StreamError
from .base import MissingData, needed
from .listing import (
    Listing,
    ParquetCopy,
    Splits,
    class_folders,
    labelled,
    listed,
    numbered_lines,
    present,
    wordnet_names,
)

DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
CIFAR100 = ParquetCopy("uoft-cs/cifar100", image="img", label="fine_label")
CARS196 = ParquetCopy("tanganke/stanford_cars")
DOMAINNET = ParquetCopy("wltjr1007/DomainNet", others=("domain",))
TINY_IMAGENET = ParquetCopy("zh-plus/tiny-imagenet", test="valid")


def cifar100(data: Path | None) -> Splits:
    """The Parquet copy, or images in class folders; never the archive in pickle form."""
    if data is None or CIFAR100.lies_in(data):
        return CIFAR100.read(data)
    if (data / "meta").is_file() or any(data.glob("cifar-100-python*")):
        raise StreamError(
            f"{data} holds CIFAR-100 in pickle form, which can run code and is never opened: leave `data` out to read "
            f"{CIFAR100.source} from the Hub, or give a folder of images"
        )
    return _train_and_test(data)


def cub200(data: Path | None) -> Splits:
    """CUB_200_2011 with its own split, or class folders."""
    if data is None or (data / "train").is_dir():
        return _train_and_test(data)
    names = ("images.txt", "image_class_labels.txt", "train_test_split.txt")
    images, labels, chosen = ({key: (n, value) for n, key, value in numbered_lines(data / name)} for name in names)
    for name, column in zip(names[1:], (labels, chosen), strict=True):
        if column.keys() != images.keys():
            raise StreamError(
                f"{data / name} tells of {len(column)} images, images.txt of {len(images)}: one is cut off"
            )
    keys = {number: key for _, number, key in numbered_lines(data / "classes.txt")}
    listings: dict[str, Listing] = {"train": [], "test": []}
    for i, (line, path) in images.items():
        image = present(data / "images" / path, data / names[0], line)
        if labels[i][1] not in keys:
            raise StreamError(
                f"{data / 'classes.txt'} has no class {labels[i][1]}, but image {i} is of it: it is cut off"
            )
        listings["train" if chosen[i][1] == "1" else "test"].append((image, keys[labels[i][1]]))
    return labelled(listings, list(keys.values()))


def cars196(data: Path | None) -> Splits:
    """The Parquet copy; class folders; or the archives with their MATLAB annotations, as torchvision puts them."""
    if data is None or CARS196.lies_in(data):
        return CARS196.read(data)
    if (data / "train").is_dir():
        return _train_and_test(data)
    names = data / "devkit" / "cars_meta.mat"
    keys = [str(name) for name in _matlab(names, "class_names")]
    annotations = {
        "train": (data / "devkit" / "cars_train_annos.mat", data / "cars_train"),
        "test": (data / "cars_test_annos_withlabels.mat", data / "cars_test"),
    }
    listings: dict[str, Listing] = {}
    for split, (file, images) in annotations.items():
        listings[split] = []
        for number, (name, label) in enumerate(_matlab(file, "annotations", "fname", "class"), 1):
            if not 1 <= int(label) <= len(keys):
                raise StreamError(
                    f"{names} names {len(keys)} classes, and image {number} of {file} is of class {label}"
                )
            listings[split].append((present(images / str(name), file, number), keys[int(label) - 1]))
    return labelled(listings, keys)


def tiny_imagenet(data: Path | None) -> Splits:
    """The Parquet copy, tiny-imagenet-200 as it was published, or class folders; tested on the validation images."""
    if data is None or TINY_IMAGENET.lies_in(data):
        return TINY_IMAGENET.read(data)
    notes = data / "val" / "val_annotations.txt"
    if not notes.is_file():
        return _train_and_test(data)
    test: Listing = []
    for number, line in enumerate(notes.read_text(encoding="utf-8").splitlines(), 1):
        name, *rest = line.split()
        if not rest:
            raise StreamError(f"line {number} of {notes} names no class: the file is cut off")
        test.append((present(notes.parent / "images" / name, notes, number), rest[0]))
    return _by_name({"train": class_folders(needed(data / "train")), "test": test}, data)


def imagenet_variant(data: Path | None) -> Splits:
    """ImageNet-R and ImageNet-A: train/ and test/; the lists of LAE (2303.10070), train_list.txt and val_list.txt,
    beside the images; or one folder a class, which has no test data yet."""
    if data is not None and (data / "train_list.txt").is_file():
        lists = {"train": data / "train_list.txt", "test": data / "val_list.txt"}
        return labelled(*listed(lists, data), wordnet_names(data))
    if data is None or (data / "train").is_dir():
        return _train_and_test(data)
    return _by_name({"train": class_folders(data)}, data)


def domainnet(data: Path | None) -> Splits:
    """The Parquet copy, or the images with their lists; the column `domain` says which domain an image is of."""
    if data is None or DOMAINNET.lies_in(data):
        return DOMAINNET.read(data)
    names = {(split, domain): f"{domain}_{split}" for split in ("train", "test") for domain in DOMAINS}
    listings, keys = listed({name: data / f"{name}.txt" for name in names.values()}, data)
    splits = {}
    for split in ("train", "test"):
        parts = [listings[names[split, domain]] for domain in DOMAINS]
        number = [i for i, part in enumerate(parts) for _ in part]
        rows = labelled({split: [row for part in parts for row in part]}, keys)[split]
        splits[split] = rows.add_column("domain", number, feature=ClassLabel(names=list(DOMAINS)))
    return splits


def _train_and_test(data: Path | None) -> Splits:
    """`train/<class>/*` and `test/<class>/*`."""
    if data is None:
        raise MissingData("no copy on the Hub is known to have the published split, so `data` is needed")
    return _by_name({split: class_folders(data / split) for split in ("train", "test")}, data)


def _by_name(listings: Mapping[str, Listing], data: Path) -> Splits:
    """Classes in the order of their names."""
    keys = sorted({key for listing in listings.values() for _, key in listing})
    return labelled(listings, keys, wordnet_names(data))


def _matlab(file: Path, variable: str, *fields: str) -> list:
    """A list out of a MATLAB file, which cannot hold code; of structures, tuples of these fields."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        rows = loadmat(needed(file), squeeze_me=True)[variable].ravel()
        return [tuple(row[field] for field in fields) for row in rows] if fields else list(rows)
    except (MatReadError, zlib.error, ValueError, TypeError, KeyError, OSError) as error:
        what = " with ".join((f"`{variable}`", *([" and ".join(fields)] if fields else [])))
        raise StreamError(f"{file} is no MATLAB file with {what}, or it is cut off: {error}") from error

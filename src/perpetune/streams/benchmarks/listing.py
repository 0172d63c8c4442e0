"""Images on disk or in a Parquet copy of the Hub, with their classes; none is opened, copied or held in memory."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image

from ...core.errors import StreamError
from ..formats import read_files, read_hub
from .base import MissingData, fetched, needed

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
WORDS = ("words.txt", "README.txt")  # of Tiny ImageNet; of ImageNet-R and ImageNet-A

Listing = list[tuple[Path, str]]  # an image, and the key of its class: the name of its folder, as a rule
Splits = dict[str, Dataset]  # columns `image` and `label`, a ClassLabel of label texts in the order of the dataset


def class_folders(root: Path) -> Listing:
    """The images in a folder of class folders, at any depth, both sorted by name, as torchvision's ImageFolder does.

    Raises:
        MissingData: there is no such folder, or no class folder in it.
        StreamError: a class folder without an image.
    """
    listing: Listing = []
    inside = sorted(needed(root).iterdir(), key=lambda path: path.name)
    for folder in (path for path in inside if path.is_dir() and not path.name.startswith(".")):
        files = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        images = sorted(path for path in files if not path.name.startswith("."))
        if not images:
            raise StreamError(f"{folder} holds no image: if it is no class, move it away; else unpack the data again")
        listing += [(image, folder.name) for image in images]
    if not listing:
        raise MissingData(f"{root} holds no folders of images, one a class")
    return listing


def numbered_lines(file: Path) -> list[tuple[int, str, str]]:
    """(number, first part, last part) of the lines of a list, parted at the last blank or tab.

    Raises:
        MissingData: there is no such file.
        StreamError: it is empty, or a line has one part only.
    """
    lines = []
    for number, line in enumerate(needed(file).read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if line.strip():
            first, *last = line.strip().rsplit(maxsplit=1)
            if not last:
                raise StreamError(f"line {number} of {file} is `{line.strip()}`, one word only: the file is cut off")
            lines.append((number, first, last[0]))
    if not lines:
        raise StreamError(f"{file} is empty: unpack the data again")
    return lines


def listed(lists: Mapping[str, Path], root: Path) -> tuple[dict[str, Listing], list[str]]:
    """(the images of each list, the classes by number), from lines `path number`: a path under `root`, in the folder of
    its class, and the number of that class.

    Raises:
        MissingData: there is no such list.
        StreamError: a list is cut off, or names an image that is not there.
    """
    listings: dict[str, Listing] = {}
    keys: dict[int, str] = {}
    for name, file in lists.items():
        listings[name] = []
        for number, path, label in numbered_lines(file):
            image = present(root / path, file, number)
            key = keys.setdefault(int(label), image.parent.name) if label.isdigit() else None
            if key != image.parent.name:
                raise StreamError(f"line {number} of {file} ends with {label}, which is not the class of {path}")
            listings[name].append((image, key))
    twice = [key for key, times in Counter(keys.values()).items() if times > 1]
    if twice:
        raise StreamError(f"the lists in {root} number the images of `{twice[0]}` in two ways: one is cut off")
    return listings, [keys[number] for number in sorted(keys)]


def present(image: Path, file: Path, number: int) -> Path:
    """The image, which line `number` of `file` names; StreamError if it is not there."""
    if not image.is_file():
        raise StreamError(f"line {number} of {file} names {image}, which is not there: unpack the images beside it")
    return image


def labelled(listings: Mapping[str, Listing], keys: Sequence[str], words: Mapping[str, str] | None = None) -> Splits:
    """Datasets of paths.

    Args:
        listings: the images of each split.
        keys: all classes, in the order of the dataset.
        words: names of classes, by key; see `class_texts`.
    """
    number = {key: i for i, key in enumerate(keys)}
    features = Features({"image": Image(), "label": ClassLabel(names=class_texts(keys, words or {}))})
    return {
        split: Dataset.from_dict(
            {"image": [str(path) for path, _ in listing], "label": [number[key] for _, key in listing]}, features
        )
        for split, listing in listings.items()
    }


def class_texts(keys: Sequence[str], words: Mapping[str, str]) -> list[str]:
    """Label texts that can be read: the names in `words`, or "Black footed Albatross" for "001.Black_footed_Albatross".

    A class is its label text: classes that share a name ("crane", the bird and the machine) keep their keys beside it.
    """
    texts = [words.get(key) or re.sub(r"^\d{3}\.", "", key).replace("_", " ").strip() or key for key in keys]
    times = Counter(texts)
    return [text if times[text] == 1 else f"{text} ({key})" for text, key in zip(texts, keys, strict=True)]


def wordnet_names(root: Path) -> dict[str, str]:
    """The first name of each WordNet id, from a word list beside the data ("n02012849 crane, wading bird"), if any."""
    names: dict[str, str] = {}
    for file in (root / name for name in WORDS):
        if file.is_file():
            text = file.read_text(encoding="utf-8", errors="replace")
            for key, name in re.findall(r"^(n\d{8})[ \t]+([^,\n]+)", text, flags=re.MULTILINE):
                names.setdefault(key, name.strip())
    return names


@dataclass(frozen=True)
class ParquetCopy:
    """A copy of a dataset on the Hub, in Parquet files, and what it calls things.

    Attributes:
        source: `owner/name`.
        image, label: columns.
        test: the split that serves as test data.
        others: columns to be kept besides.
    """

    source: str
    image: str = "image"
    label: str = "label"
    test: str = "test"
    others: tuple[str, ...] = ()

    def lies_in(self, folder: Path) -> bool:
        """Whether the copy's files were put into this folder."""
        return any(folder.glob("train*.parquet"))

    def read(self, folder: Path | None = None) -> Splits:
        """From the Hub, or from the folder into which its files were put.

        Raises:
            MissingData: the files of a split are missing, or the Hub cannot be reached.
            StreamError: the copy cannot be read, or is no longer what it was.
        """
        if folder is None:
            found = fetched(lambda: read_hub(self.source, self.test))
        else:
            files = {split: sorted(folder.glob(f"{name}*.parquet")) for split, name in self._names().items()}
            missing = [f"{self._names()[split]}*.parquet" for split, paths in files.items() if not paths]
            if missing:
                raise MissingData(f"{folder} holds no {missing[0]}")
            found = {split: read_files(paths, f"the {split} split of {folder}") for split, paths in files.items()}
        lost = [self._names()[split] for split in self._names() if split not in found]
        if lost:
            raise StreamError(f"`{self.source}` has no {lost[0]} split any more: give the data as a folder")
        return {split: self._tidy(found[split]) for split in self._names()}

    def _names(self) -> dict[str, str]:
        return {"train": "train", "test": self.test}

    def _tidy(self, data: Dataset) -> Dataset:
        """Our columns; the label as text that can be read. Nothing is rewritten but the column of labels."""
        lost = [name for name in (self.image, self.label, *self.others) if name not in data.column_names]
        classes = data.features.get(self.label)
        if lost or not isinstance(classes, ClassLabel):
            found = ", ".join(data.column_names)
            raise StreamError(
                f"`{self.source}` should hold {self.image} and {self.label}, a ClassLabel, and holds {found}: "
                "give the data as a folder"
            )
        numbers = data[self.label][:]
        data = data.select_columns([self.image, *self.others])
        if self.image != "image":
            data = data.rename_column(self.image, "image")
        return data.add_column("label", numbers, feature=ClassLabel(names=class_texts(classes.names, {})))

"""Folders of images: one folder a class, or a list that says what each image is."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, Image, concatenate_datasets
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from ..core.errors import StreamError
from .origin import Origin
from .text_files import read_texts

LISTS = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
SUFFIXES = frozenset(ImageFolder.EXTENSIONS)


def read_images(folder: Path, place: str) -> tuple[Dataset, Origin]:
    """The images in a folder, none of them opened: `image` and `label`, or `image` and the columns of its list.

    Without a list, images are sorted by path, and the label of each is the name of its folder.

    Raises:
        StreamError: there is nothing; an image lies in no folder of a class, or in a folder within one; a folder has no
            image; a list that is malformed, or names an image that is not there.
    """
    lists = [folder / name for name in LISTS if (folder / name).is_file()]
    if len(lists) > 1:
        raise StreamError(f"{folder} of {place} has several lists ({', '.join(p.name for p in lists)}): keep one")
    if lists:
        return _listed(folder, lists[0], place)
    files = sorted((p for p in folder.rglob("*") if p.is_file() and not _hidden(p.relative_to(folder))), key=str)
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not files:
        raise StreamError(f"{place} is empty: {folder}")
    for image in images:
        _check_depth(image, folder, place)
    filled = {image.parent for image in images}
    for inside in sorted({folder / path.relative_to(folder).parts[0] for path in files if path.parent != folder}):
        if inside not in filled:
            raise StreamError(f"{inside} of {place} holds no image (.png, .jpg, .tif, .webp …): convert or remove it")
    if not images:
        raise StreamError(f"{place} is empty: {folder} holds no image (.png, .jpg, .tif, .webp …)")
    number = {name: i for i, name in enumerate(sorted({path.name for path in filled}))}
    features = Features({"image": Image(), "label": ClassLabel(names=list(number))})
    columns = {"image": [str(path) for path in images], "label": [number[path.parent.name] for path in images]}
    return Dataset.from_dict(columns, features=features), Origin(place, tuple((path, 1) for path in images))


def _check_depth(image: Path, folder: Path, place: str) -> None:
    *parents, _ = image.relative_to(folder).parts
    if not parents:
        raise StreamError(f"{image} of {place} lies in no folder of a class: put it into {folder.name}/<label>/")
    if len(parents) > 1:
        raise StreamError(
            f"{image} of {place} lies {len(parents)} folders deep, so its label could be {' or '.join(parents)}: put "
            f"all images of a class into one folder, {folder.name}/<label>/"
        )


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts) or any(part.startswith("__") for part in path.parts[:-1])


def _listed(folder: Path, file: Path, place: str) -> tuple[Dataset, Origin]:
    """The rows of a list: the image `file_name`, relative to the folder, and the other columns."""
    if file.suffix == ".parquet":
        data, origin = Dataset(pq.read_table(file)), Origin(place, ((file, pq.read_metadata(file).num_rows),))
    else:
        data, origin = read_texts([file], place)
    if "file_name" not in data.column_names:
        raise StreamError(f"{file} of {place} has no column `file_name`, only {', '.join(data.column_names) or 'none'}")
    paths = []
    for row, name in enumerate(data["file_name"][:]):
        if not isinstance(name, str) or not _inside(folder, name).is_file():
            raise StreamError(f"{origin.row(row)} names the image `{name}`, which is not in {folder}")
        paths.append(str(folder / name))
    made = Dataset.from_dict({"image": paths}, features=Features({"image": Image()}))
    others = data.remove_columns([name for name in ("file_name", "image") if name in data.column_names])
    return concatenate_datasets([made, others], axis=1) if others.column_names else made, origin


def _inside(folder: Path, name: str) -> Path:
    """The path of an image, which lies in the folder: a list of somebody else's must not read other files."""
    path = folder / name
    return path if path.resolve().is_relative_to(folder.resolve()) else folder / "nowhere"

"""Image benchmarks, read from small folders of the published layouts: as many classes as published, few images."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features
from PIL import Image
from scipy.io import savemat
from transformers import AutoModel

from perpetune import Learner
from perpetune.core.errors import ConfigError, StreamError
from perpetune.learning.config import CompareConfig, load_config
from perpetune.recipes import make_recipe
from perpetune.streams import Stream, load_stream
from perpetune.streams.benchmarks import BENCHMARKS
from perpetune.streams.benchmarks.layouts import DOMAINS, domainnet
from perpetune.streams.benchmarks.listing import class_texts
from perpetune.streams.benchmarks.vision import deal

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "benchmarks"
NUMBERS = count()


def paint(path: Path) -> Path:
    """One more image, unlike all others."""
    n = next(NUMBERS)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"P6 2 2 255\n" + 4 * bytes((n % 256, n // 256 % 256, n // 65536)))
    return path


def folders(root: Path, keys: Sequence[str], splits: Sequence[str] = ("train", "test"), each: int = 1) -> Path:
    for split in splits:
        for key in keys:
            for i in range(each):
                paint(root / split / key / f"{i}.JPEG")
    return root


def write(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def wnids(number: int) -> list[str]:
    return [f"n{i:08}" for i in range(number)]


def cub(root: Path) -> Path:
    """Two training images and a test image a bird, and the lists of CUB_200_2011; ids run through all birds."""
    birds = [f"{i + 1:03}.Grey_Bird_{chr(65 + i % 26)}{i}" for i in range(200)]
    images = [f"{bird}/{bird[4:]}_{i}.jpg" for bird in birds for i in range(3)]
    for image in images:
        paint(root / "images" / image)
    write(root / "images.txt", (f"{i} {image}" for i, image in enumerate(images, 1)))
    write(root / "image_class_labels.txt", (f"{i + 1} {i // 3 + 1}" for i in range(600)))
    write(root / "train_test_split.txt", (f"{i + 1} {int(i % 3 != 1)}" for i in range(600)))
    write(root / "classes.txt", (f"{i} {bird}" for i, bird in enumerate(birds, 1)))
    return root


def cars(root: Path) -> Path:
    """The MATLAB files of the devkit; classes numbered against their names."""
    names = [f"Maker Car {i:03}" for i in reversed(range(196))]
    kind = [("fname", object), ("class", object)]
    (root / "devkit").mkdir(parents=True)
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": np.array([names], dtype=object)}, do_compression=True)
    for folder, file in (("cars_train", "devkit/cars_train_annos"), ("cars_test", "cars_test_annos_withlabels")):
        rows = [(f"{i + 1:05}.jpg", i % 196 + 1) for i in range(196)]
        for name, _ in rows:
            paint(root / folder / name)
        savemat(root / f"{file}.mat", {"annotations": np.array(rows, dtype=kind)}, do_compression=True)
    return root


def domain_net(root: Path, classes: int = 345) -> Path:
    """An image a class, domain and split; the training list of the paintings lacks the last class."""
    for domain in DOMAINS:
        for split in ("train", "test"):
            lines = []
            for c in range(classes - (split == "train" and domain == "painting")):
                path = f"{domain}/big_thing_{c}/{domain}_{split}.jpg"
                paint(root / path)
                lines.append(f"{path} {c}")
            write(root / f"{domain}_{split}.txt", lines)
    return root


def sizes(stream: Stream) -> list[tuple[int, int, int]]:
    return [(len(task.classes), len(task.train), len(task.test)) for task in stream]


def test_classes_are_dealt_in_the_published_order(tmp_path: Path) -> None:
    # the class order of iCaRL, PILOT and RanPAC for CIFAR-100 begins so
    assert deal(range(100), 10, 10, 1993)[0] == [68, 56, 78, 8, 23, 84, 90, 65, 74, 76]  # type: ignore[arg-type]
    for number in (100, 200):
        groups = deal([str(i) for i in range(number)], 20, 20, 1993)
        assert sum(groups, []) == [str(i) for i in np.random.RandomState(1993).permutation(number)]
    assert [len(group) for group in deal(["a"] * 10, 4, 3, None)] == [3, 4, 3]

    data = folders(tmp_path, [f"thing_{i:02}" for i in range(100)], each=2)
    stream = load_stream("cifar100", data=data)
    assert stream.labels[:3] == ("thing 68", "thing 56", "thing 78") and stream.scenario == "class"
    assert sizes(stream) == [(10, 20, 20)] * 10
    for number, task in enumerate(stream):  # classes are numbered as they come
        assert task.classes == tuple(range(10 * number, 10 * number + 10))
        assert Counter(task.train["label"]) == Counter(task.test["label"]) == dict.fromkeys(task.classes, 2)
    again = load_stream(**stream.source)
    assert again.labels == stream.labels and [t.name for t in again] == [t.name for t in stream]
    ordered = load_stream("cifar100-ordered", data=data, classes_per_task=5)
    assert ordered.labels == tuple(sorted(stream.labels)) and sizes(ordered) == [(5, 10, 10)] * 20


def test_an_image_keeps_its_class_and_is_not_opened_before(tmp_path: Path) -> None:
    data = folders(tmp_path, wnids(200))
    splits = BENCHMARKS["tiny-imagenet"].drafts.read(data)  # type: ignore[attr-defined]
    stored = splits["train"].data.column("image").to_pylist()
    assert stored[7] == {"bytes": None, "path": str(data / "train" / "n00000007" / "0.JPEG")}
    stream = load_stream("imagenet-a", data=data)
    for task in stream:
        for row in task.test:
            path = data / "test" / stream.labels[row["label"]] / "0.JPEG"
            assert row["image"].getpixel((0, 0)) == Image.open(path).getpixel((0, 0))


def test_cub_as_it_is_published(tmp_path: Path) -> None:
    data = cub(tmp_path / "CUB_200_2011")
    stream = load_stream("cub200", data=data)
    assert sizes(stream) == [(20, 40, 20)] * 10
    assert stream.labels[0] == f"Grey Bird {chr(65 + 168 % 26)}168"  # the first of the order is class 168
    tests = {path.name for path in (data / "images").rglob("*_1.jpg")}
    assert len(tests) == 200 == sum(len(task.test) for task in stream)
    shown = stream.tasks[0].test[0]
    name = stream.labels[shown["label"]].replace(" ", "_")
    (path,) = (data / "images").rglob(f"{name}_1.jpg")
    assert shown["image"].getpixel((1, 1)) == Image.open(path).getpixel((1, 1))
    ordered = load_stream("cub200-ordered", data=data)
    assert sizes(ordered) == [(40, 80, 40)] * 5 and ordered.labels[:2] == ("Grey Bird A0", "Grey Bird B1")


def test_cars_as_they_are_published(tmp_path: Path) -> None:
    stream = load_stream("cars196", data=cars(tmp_path / "cars"))
    assert sizes(stream) == [(16, 16, 16)] + [(20, 20, 20)] * 9
    order = np.random.RandomState(1993).permutation(196)  # of names, as of folders, whatever their numbers
    assert stream.labels == tuple(f"Maker Car {i:03}" for i in order)
    same = load_stream("cars196", data=folders(tmp_path / "folders", [f"Maker Car {i:03}" for i in range(196)]))
    assert same.labels == stream.labels
    assert len(load_stream("cars196", data=tmp_path / "folders", classes_per_task=28)) == 7


def test_tiny_imagenet_as_it_is_published(tmp_path: Path) -> None:
    keys = wnids(200)
    for key in keys:
        paint(tmp_path / "train" / key / "images" / f"{key}_0.JPEG")
    notes = [f"val_{i}.JPEG\t{key}\t0\t0\t62\t62" for i, key in enumerate(reversed(keys))]
    for line in notes:
        paint(tmp_path / "val" / "images" / line.split()[0])
    paint(tmp_path / "test" / "images" / "test_0.JPEG")  # without labels, never read
    write(tmp_path / "val" / "val_annotations.txt", notes)
    write(tmp_path / "words.txt", [f"{keys[0]}\tgoldfish, Carassius auratus", f"{keys[1]}\tcrane", f"{keys[2]}\tcrane"])
    stream = load_stream("tiny-imagenet", data=tmp_path)
    assert sizes(stream) == [(20, 20, 20)] * 10
    assert stream.labels[:4] == ("goldfish", "crane (n00000001)", "crane (n00000002)", "n00000003")
    shown = next(row for row in stream.tasks[0].test if row["label"] == 3)
    path = tmp_path / "val" / "images" / "val_196.JPEG"
    assert shown["image"].getpixel((0, 0)) == Image.open(path).getpixel((0, 0))


def test_imagenet_r_without_a_split_with_one_and_listed(tmp_path: Path) -> None:
    keys = wnids(200)
    data = folders(tmp_path, keys, splits=("imagenet-r",), each=5)
    whole = load_stream("imagenet-r", data=data / "imagenet-r")
    assert sizes(whole) == [(20, 80, 20)] * 10
    assert all(set(Counter(task.test["label"]).values()) == {1} for task in whole)
    other = load_stream("imagenet-r", data=data / "imagenet-r", seed=7)
    assert [t.test["id"][:] for t in other] == [t.test["id"][:] for t in whole]  # the split is one for all seeds
    rows = [(f"imagenet-r/{key}/{i}.JPEG", c) for c, key in enumerate(keys) for i in range(5)]
    write(data / "train_list.txt", (f"{path} {c}" for path, c in rows if path[-6] != "2"))
    write(data / "val_list.txt", (f"{path} {c}" for path, c in rows if path[-6] == "2"))
    listed = load_stream("imagenet-r-ordered", data=data)
    assert sizes(listed) == [(20, 80, 20)] * 10 and listed.labels == tuple(keys)


def test_domainnet_by_class_and_by_domain(tmp_path: Path) -> None:
    data = domain_net(tmp_path)
    by_class = load_stream("domainnet", data=data)
    assert by_class.labels[:3] == ("big thing 0", "big thing 1", "big thing 2")  # by number, not by name
    assert sizes(by_class) == [(69, 414, 414)] * 4 + [(69, 413, 414)]
    by_domain = load_stream("domainnet-domains", data=data)
    assert [task.name for task in by_domain] == list(DOMAINS) and by_domain.scenario == "domain"
    assert sizes(by_domain) == [(345, 345, 345)] * 2 + [(344, 344, 344)] + [(345, 345, 345)] * 3
    some = load_stream("domainnet-domains", data=data, tasks=["sketch", "real"], test_limit=7)
    assert [task.name for task in some] == ["sketch", "real"] and len(some.tasks[0].test) == 7
    with pytest.raises(ConfigError, match="leave classes_per_task out"):
        load_stream("domainnet-domains", data=data, classes_per_task=5)


def encoded() -> dict[str, object]:
    n, buffer = next(NUMBERS), io.BytesIO()
    Image.new("RGB", (2, 2), (n % 256, n // 256, 9)).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def copy(image: str, label: str, keys: Sequence[str], **others: ClassLabel) -> Dataset:
    """A split with one image a class, as the Hub's copies hold it."""
    columns = {image: [encoded() for _ in keys], label: list(range(len(keys))), "more": list(keys)}
    features = {image: datasets.Image(), label: ClassLabel(names=list(keys)), "more": datasets.Value("string")}
    columns |= {name: [i % kind.num_classes for i in range(len(keys))] for name, kind in others.items()}
    return Dataset.from_dict(columns, Features(features | others))


@pytest.mark.parametrize(
    "name, source, image, label, test, keys",
    [
        ("cifar100", "uoft-cs/cifar100", "img", "fine_label", "test", [f"a_{i:02}" for i in range(100)]),
        ("cars196", "tanganke/stanford_cars", "image", "label", "test", [f"Car {i:03}" for i in range(196)]),
        ("domainnet", "wltjr1007/DomainNet", "image", "label", "test", [f"b_{i}" for i in range(345)]),
        ("tiny-imagenet", "zh-plus/tiny-imagenet", "image", "label", "valid", wnids(200)),
    ],
)
def test_from_the_hub_and_from_its_files(
    name: str, source: str, image: str, label: str, test: str, keys: list[str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    others = {"domain": ClassLabel(names=list(DOMAINS))} if name == "domainnet" else {}
    splits = DatasetDict({split: copy(image, label, keys, **others) for split in ("train", test)})
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda asked, *_: splits if asked == source else None)
        stream = load_stream(name)
    assert sorted(stream.labels) == sorted(key.replace("_", " ") for key in keys)
    assert sum(len(task.test) for task in stream) == len(keys) and "data" not in stream.source
    for split in splits:
        splits[split].to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    again = load_stream(name, data=tmp_path)
    assert again.labels == stream.labels
    assert [t.train["id"][:] for t in again] == [t.train["id"][:] for t in stream]


def test_a_copy_that_is_no_longer_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for splits, message in (
        ({"train": copy("image", "label", ["a"])}, "`uoft-cs/cifar100` has no test split any more"),
        (
            dict.fromkeys(("train", "test"), copy("image", "label", ["a"])),
            "should hold img and fine_label, .*and holds",
        ),
    ):
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, found=splits: DatasetDict(found))
        with pytest.raises(StreamError, match=message):
            load_stream("cifar100")
    copy("image", "label", ["a"]).to_parquet(tmp_path / "train-0.parquet")
    with pytest.raises(StreamError, match=r"holds no valid\*.parquet.*Leave data out"):
        load_stream("tiny-imagenet", data=tmp_path)


def test_names_that_can_be_read() -> None:
    keys = ["001.Black_footed_Albatross", "aquarium_fish", "aquarium fish", "n02012849"]
    texts = class_texts(keys, {"n02012849": "crane"})
    assert texts == [
        "Black footed Albatross",
        "aquarium fish (aquarium_fish)",
        "aquarium fish (aquarium fish)",
        "crane",
    ]


def cut(path: Path, lines: int, last: str | None = None) -> None:
    write(path, [*path.read_text().splitlines()[:lines], *([] if last is None else [last])])


def broken_cub(name: str, lines: int, last: str | None = None) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        cut(cub(root) / name, lines, last)
        return root

    return make


def broken_domains(last: str) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        cut(domain_net(root, 3) / "real_test.txt", 1, last)
        return root

    return make


def without(root: Path, path: str) -> Path:
    (root / path).unlink()
    return root


def short(root: Path, path: str) -> Path:
    (root / path).write_bytes((root / path).read_bytes()[:-40])
    return root


def unlabelled(root: Path) -> Path:
    rows = np.array([("00001.jpg",)], dtype=[("fname", object)])
    savemat(cars(root) / "cars_test_annos_withlabels.mat", {"annotations": rows})
    return root


def few_names(root: Path) -> Path:
    savemat(cars(root) / "devkit" / "cars_meta.mat", {"class_names": np.array([["A", "B"]], dtype=object)})
    return root


def pickled(root: Path) -> Path:
    for name in ("train", "test", "meta"):
        write(root / name, ["never opened"])
    return root


A_HUNDRED = [str(i) for i in range(100)]
BROKEN: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "no folder": ("imagenet-r", lambda root: root / "lost", "there is no folder .*lost.* fifth becomes test data"),
    "no data": ("cub200", lambda root: folders(root, ["a"], ["train"]), "test is missing.*CUB_200_2011"),
    "nothing in it": ("imagenet-a", lambda root: root, "holds no folders of images"),
    "pickle": ("cifar100", pickled, "pickle form.*uoft-cs/cifar100"),
    "a part of the classes": ("cifar100", lambda root: folders(root, "abc"), "has 100 classes, and 3 were found"),
    "no test image": (
        "cifar100",
        lambda root: folders(folders(root, A_HUNDRED, ["train"]), A_HUNDRED[:-1], ["test"]),
        "class `99` of `cifar100` has no test images",
    ),
    "no training image": (
        "cifar100",
        lambda root: folders(folders(root, A_HUNDRED, ["test"]), A_HUNDRED[1:], ["train"]),
        "class `0` of `cifar100` has no training images",
    ),
    "an empty class": (
        "cifar100",
        lambda root: without(folders(root, "ab"), "train/b/0.JPEG"),
        "train/b holds no image",
    ),
    "a list is missing": ("cub200", lambda root: without(cub(root), "classes.txt"), "classes.txt is missing"),
    "labels cut off": ("cub200", broken_cub("image_class_labels.txt", 599), "599 images, images.txt of 600"),
    "a line cut off": ("cub200", broken_cub("images.txt", 599, "600"), "line 600 of .*images.txt is `600`, one word"),
    "classes cut off": ("cub200", broken_cub("classes.txt", 199), "no class 200"),
    "a lost image": ("cub200", broken_cub("images.txt", 599, "600 x/y.jpg"), "line 600 of .*y.jpg, which is not there"),
    "an empty list": ("cub200", broken_cub("images.txt", 0), "images.txt is empty"),
    "a number cut off": (
        "domainnet",
        broken_domains("real/big_thing_2/real_test.jpg 1"),
        "line 2 .*ends with 1, which",
    ),
    "a class with two numbers": (
        "domainnet",
        broken_domains("real/big_thing_2/real_test.jpg 4"),
        "images of `big_thing_2` in two ways",
    ),
    "no number": ("domainnet", broken_domains("real/big_thing_2/real_test.jpg x"), "line 2 .*ends with x, which"),
    "a lost picture": ("domainnet-domains", broken_domains("real/big_thing_2/lost.jpg 2"), "line 2 of .*lost.jpg"),
    "a MATLAB file cut off": ("cars196", lambda root: short(cars(root), "devkit/cars_meta.mat"), "is cut off"),
    "annotations without labels": ("cars196", unlabelled, "no MATLAB file with `annotations` with fname and class"),
    "too few names": ("cars196", few_names, "names 2 classes, and image 3 of .*cars_train_annos.mat is of class 3"),
    "no MATLAB file": ("cars196", lambda root: without(cars(root), "devkit/cars_meta.mat"), "cars_meta.mat is missing"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_said(case: str, tmp_path: Path) -> None:
    name, make, message = BROKEN[case]
    with pytest.raises(StreamError, match=message):
        load_stream(name, data=make(tmp_path))


def test_no_copy_on_the_hub_says_what_to_give() -> None:
    with pytest.raises(StreamError, match="`data` is needed.*Give data: the unpacked archive"):
        load_stream("imagenet-a")


def test_every_image_benchmark_tells_where_its_data_is() -> None:
    images = [b for b in BENCHMARKS.values() if b.drafts.__module__.endswith("vision")]
    assert len(images) == 11
    for benchmark in images:
        assert "data" in benchmark.get and benchmark.paper and "\n" not in benchmark.summary


def test_the_configurations_change_what_was_published(tiny_vit: Callable[..., Path], tmp_path: Path) -> None:
    data = folders(tmp_path, [f"{i:02}" for i in range(100)])
    config = load_config(CONFIGS / "pegp_cifar100.yaml", CompareConfig, {"stream": {"data": str(data)}})
    stream = config.stream.load()
    assert len(stream) == 10 and stream.labels[:2] == ("00", "01")
    assert len(config.recipes) == 10
    for spec in config.recipes:
        model = make_recipe(spec).tuner.attach(AutoModel.from_pretrained(tiny_vit(layers=6)))
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        blocks = {int(n) for name in trained for n in re.findall(r"layers\.(\d+)\.", name)}
        assert blocks == {0, 1, 2, 3, 4}, spec["name"]


def test_a_run_goes_on_where_its_benchmark_stopped(tiny_vit: Callable[..., Path], tmp_path: Path) -> None:
    data, model = folders(tmp_path / "data", [f"{i:02}" for i in range(100)]), tiny_vit()
    stream = load_stream("cifar100", data=data, tasks=["68-56-78-08-23-84-90-65-74-76"])
    Learner(model, recipe="frozen_ncm", run=tmp_path / "run").learn(stream)
    result = Learner(model, recipe="frozen_ncm", run=tmp_path / "run").learn(load_stream("cifar100", data=data))
    assert len(result.tasks) == 10 and len(result.commits) == 11


def test_domains_are_read_beside_the_classes(tmp_path: Path) -> None:
    train = domainnet(domain_net(tmp_path, 2))["train"]
    assert Counter(train["domain"]) == {0: 2, 1: 2, 2: 1, 3: 2, 4: 2, 5: 2} and set(train["label"]) == {0, 1}

"""Streams spoiled at random: each must be read right, or refused in one line that names the file, and the row where
there is one; never a traceback, never a text or a label that is not the one in the file.

    python -m benchmarks.fuzz_streams --count 2000

A stream has two tasks of the same classes in files of different formats, and one file of it is changed in one way.
Every change says what is right: the rows as they were, or a refusal, with a row or without. Where bytes are changed at
random, either is, and the rows are not compared. Figures: how many of each format were read, how many refused, and what
went wrong, with the seed that makes it again.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
import re
import tempfile
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from perpetune.core.errors import PerpetuneError
from perpetune.streams import load_stream
from perpetune.streams.pictures import eight_bits

from .command import Benchmark, Option

Row = dict[str, Any]
READ, REFUSED, ROW = "read", "refused", "refused by row"  # what may become of a stream
DATES = ["2024-05-01", "2024-05-02"]
NAMES = (["late", "refund", "été"], ["1", "2", "3"], ["true", "false"], DATES, ["NA", "null", "007"])
RANDOM = ("a byte", "bytes", "blank text")  # changes whose rows are not compared
WORDS = "where is my parcel, “please”; 2024-05-01 1.0 NaN null true 007 naïve 東京 😀 it's 50% \\n don’t".split()


@dataclass(frozen=True)
class Spoiled:
    """right: what may become of it; rows: what is to be read of each split."""

    change: str
    right: tuple[str, ...]


def make_rows(draw: random.Random, labels: list[str], split: str, count: int = 9) -> list[Row]:
    return [
        {"text": f"{split} {i} " + " ".join(draw.choices(WORDS, k=4)), "label": labels[i % len(labels)]}
        for i in range(count)
    ]


# ---- CSV: change(rows, draw) -> the file's bytes ----


def csv_text(rows: list[Row], **options: Any) -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), **{"lineterminator": "\n", **options})
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def on_line(change: Callable[[str], str], draw: random.Random, text: str) -> str:
    lines = text.split("\n")
    place = draw.randrange(1, len(lines) - 1)
    lines[place] = change(lines[place])
    return "\n".join(lines)


CSV: dict[str, tuple[tuple[str, ...], Callable[[list[Row], random.Random], str | bytes]]] = {
    "plain": ((READ,), lambda r, d: csv_text(r)),
    "byte order mark": ((READ,), lambda r, d: csv_text(r).encode("utf-8-sig")),
    "CRLF": ((READ,), lambda r, d: csv_text(r, lineterminator="\r\n")),
    "all quoted": ((READ,), lambda r, d: csv_text(r, quoting=csv.QUOTE_ALL)),
    "blank lines": ((READ,), lambda r, d: on_line(lambda line: line + "\n  \n", d, csv_text(r))),
    "lines in texts": ((READ,), lambda r, d: csv_text([{**x, "text": x["text"]} for x in r], quoting=csv.QUOTE_ALL)),
    "columns turned": ((READ,), lambda r, d: csv_text([{"label": x["label"], "text": x["text"]} for x in r])),
    "more columns": ((READ,), lambda r, d: csv_text([{"n": i, **x, "note": ""} for i, x in enumerate(r)])),
    "index": ((READ,), lambda r, d: csv_text([{"": i, **x} for i, x in enumerate(r)])),
    "blanks at labels": ((READ,), lambda r, d: csv_text([{**x, "label": f" {x['label']} "} for x in r])),
    "floats": ((READ,), lambda r, d: csv_text([{**x, "label": floats(x["label"])} for x in r])),
    "a comma more": ((ROW,), lambda r, d: on_line(lambda line: "Hello, " + line.replace('"', ""), d, csv_text(r))),
    "trailing comma": ((ROW,), lambda r, d: on_line(lambda line: line + ",", d, csv_text(r))),
    "a field less": ((ROW,), lambda r, d: on_line(lambda line: "text alone", d, csv_text(r))),
    "a quote more": ((ROW,), lambda r, d: on_line(lambda line: '"' + line.replace('"', ""), d, csv_text(r))),
    "no label": ((ROW,), lambda r, d: csv_text(with_one(r, d, label=""))),
    "no text": ((ROW,), lambda r, d: csv_text(with_one(r, d, text=""))),
    "semicolons": ((REFUSED,), lambda r, d: csv_text(r, delimiter=";")),
    "tabs": ((REFUSED,), lambda r, d: csv_text(r, delimiter="\t")),
    "a column twice": ((REFUSED,), lambda r, d: csv_text(r).replace("text,label", "text,text,label", 1)),
    "no header": ((REFUSED,), lambda r, d: csv_text(r).split("\n", 1)[1]),
    "another name": ((REFUSED,), lambda r, d: csv_text(r).replace("label", d.choice(["category", "Label", "y"]), 1)),
    "UTF-16": ((REFUSED,), lambda r, d: csv_text(r).encode(d.choice(["utf-16", "utf-16-le", "utf-16-be"]))),
    "Latin-1": ((ROW,), lambda r, d: csv_text(with_one(r, d, text="d\xe9j\xe0 vu")).encode("latin-1", "ignore")),
    "a null character": ((ROW,), lambda r, d: csv_text(with_one(r, d, text="a\0b"))),
    "nothing": ((REFUSED,), lambda r, d: d.choice(["", "\n", "text,label\n", "\ufeff"])),
    "bytes": ((READ, REFUSED, ROW), lambda r, d: scrambled(csv_text(r).encode(), d)),
    "continuous": ((REFUSED,), lambda r, d: csv_text([{**x, "label": i / 7 + 0.01} for i, x in enumerate(r)])),
}


def floats(label: str) -> str:
    return f"{label}.0" if label in "123" else label


def with_one(rows: list[Row], draw: random.Random, **values: Any) -> list[Row]:
    """One row, the last of its label never, has other values."""
    place = draw.randrange(len(rows))
    return [{**row, **values} if i == place else row for i, row in enumerate(rows)]


# ---- JSON ----


def jsonl(rows: list[Row], **options: Any) -> str:
    return "".join(json.dumps(row, **options) + "\n" for row in rows)


def typed(label: str) -> Any:
    return {"true": True, "false": False}.get(label, int(label) if label in "123" else label)


JSON: dict[str, tuple[tuple[str, ...], Callable[[list[Row], random.Random], str | bytes]]] = {
    "plain": ((READ,), lambda r, d: jsonl(r, ensure_ascii=d.random() < 0.5)),
    "byte order mark": ((READ,), lambda r, d: jsonl(r).encode("utf-8-sig")),
    "CRLF": ((READ,), lambda r, d: jsonl(r).replace("\n", "\r\n")),
    "a list": ((READ,), lambda r, d: json.dumps(r, indent=d.choice([None, 1]))),
    "blank lines": ((READ,), lambda r, d: on_line(lambda line: line + "\n\n", d, jsonl(r))),
    "types": ((READ,), lambda r, d: jsonl([{**x, "label": typed(x["label"])} for x in r])),
    "floats": ((READ,), lambda r, d: jsonl([{**x, "label": as_float(typed(x["label"]))} for x in r])),
    "types mixed": ((READ,), lambda r, d: jsonl([{**x, "label": d.choice([str, typed])(x["label"])} for x in r])),
    "NFD": ((READ,), lambda r, d: jsonl([{**x, "label": unicodedata.normalize("NFD", x["label"])} for x in r])),
    "blanks at labels": ((READ,), lambda r, d: jsonl([{**x, "label": f"\t{x['label']}\u00a0"} for x in r])),
    "more columns": ((READ,), lambda r, d: jsonl([{"n": d.choice([1, "a", None, [1], {"a": {}}]), **x} for x in r])),
    "a date in another": ((READ,), lambda r, d: jsonl([{**x, "date": "2024-05-01"} for x in r])),
    "another case": ((READ,), lambda r, d: jsonl([{**x, "label": x["label"]} for x in r])),
    "a column less": ((ROW,), lambda r, d: jsonl(without_one(r, d, d.choice(["text", "label"])))),
    "null": ((ROW,), lambda r, d: jsonl(with_one(r, d, **{d.choice(["text", "label"]): None}))),
    "blank text": ((READ,), lambda r, d: jsonl(with_one(r, d, text=d.choice(["", " \n"])))),
    "no label": ((ROW,), lambda r, d: jsonl(with_one(r, d, label=d.choice(["", " ", float("nan")])))),
    "a number as text": ((ROW,), lambda r, d: jsonl(with_one(r, d, text=d.choice([1, 1.5, True])))),
    "a list as label": ((REFUSED, ROW), lambda r, d: jsonl([{**x, "label": [x["label"]]} for x in r])),
    "numbers as texts": ((REFUSED, ROW), lambda r, d: jsonl([{**x, "text": i} for i, x in enumerate(r)])),
    "no object": ((ROW,), lambda r, d: on_line(lambda line: d.choice(["1", "[]", '"a"', "null"]), d, jsonl(r))),
    "no JSON": ((ROW,), lambda r, d: on_line(lambda line: d.choice(["{", "text", line[:-1], line + "}"]), d, jsonl(r))),
    "a key twice": ((ROW,), lambda r, d: on_line(lambda line: line.replace("{", '{"text": "a", ', 1), d, jsonl(r))),
    "half a character": ((ROW,), lambda r, d: jsonl(with_one(r, d, text="a \ud83d"))),
    "deep": ((ROW, REFUSED), lambda r, d: on_line(lambda line: "[" * 100_000, d, jsonl(r))),
    "a long number": ((ROW, REFUSED), lambda r, d: on_line(lambda line: '{"text": ' + "1" * 5000 + "}", d, jsonl(r))),
    "UTF-16": ((REFUSED,), lambda r, d: jsonl(r).encode(d.choice(["utf-16", "utf-16-le", "utf-16-be"]))),
    "Latin-1": (
        (ROW,),
        lambda r, d: jsonl(with_one(r, d, text="\xe9"), ensure_ascii=False).encode("latin-1", "ignore"),
    ),
    "nothing": ((REFUSED,), lambda r, d: d.choice(["", "\n \n", "[]", "\ufeff"])),
    "bytes": ((READ, REFUSED, ROW), lambda r, d: scrambled(jsonl(r).encode(), d)),
    "continuous": ((REFUSED,), lambda r, d: jsonl([{**x, "label": i / 7} for i, x in enumerate(r)])),
}


def as_float(label: Any) -> Any:
    return float(label) if type(label) is int else label


def without_one(rows: list[Row], draw: random.Random, column: str) -> list[Row]:
    place = draw.randrange(len(rows))
    return [{k: v for k, v in row.items() if (i, k) != (place, column)} for i, row in enumerate(rows)]


# ---- Parquet ----


def parquet(rows: list[Row], **columns: Any) -> bytes:
    names = {name: None for row in rows for name in row}
    table = pa.table({name: columns.get(name, [row.get(name) for row in rows]) for name in names})
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=4)
    return file.getvalue()


def of(rows: list[Row], name: str, change: Callable[[Any], Any] = lambda x: x, kind: Any = None) -> pa.Array:
    return pa.array([change(row[name]) for row in rows], kind)


def bad_utf8(rows: list[Row], draw: random.Random) -> bytes:
    values = [row["text"].encode() for row in with_one(rows, draw, text="XX")]
    values = [b"\xff\xfe" if value == b"XX" else value for value in values]
    array = pa.array(values, pa.binary())
    return parquet(rows, text=pa.Array.from_buffers(pa.string(), len(array), array.buffers()))


PARQUET: dict[str, tuple[tuple[str, ...], Callable[[list[Row], random.Random], str | bytes]]] = {
    "plain": ((READ,), lambda r, d: parquet(r)),
    "types": ((READ,), lambda r, d: parquet(r, label=of(r, "label", typed))),
    "floats": ((READ,), lambda r, d: parquet(r, label=of(r, "label", lambda x: as_float(typed(x))))),
    "large strings": ((READ,), lambda r, d: parquet(r, text=of(r, "text", kind=pa.large_string()))),
    "string views": ((READ, REFUSED), lambda r, d: parquet(r, text=of(r, "text", kind=pa.string_view()))),
    "categories": ((READ,), lambda r, d: parquet(r, label=of(r, "label").dictionary_encode())),
    "more columns": ((READ,), lambda r, d: parquet([{**x, "n": [1], "when": None} for x in r])),
    "null": ((ROW,), lambda r, d: parquet(with_one(r, d, **{d.choice(["text", "label"]): None}))),
    "blank text": ((READ,), lambda r, d: parquet(with_one(r, d, text=" "))),
    "bytes": ((REFUSED,), lambda r, d: parquet(r, text=of(r, "text", str.encode))),
    "numbers as texts": ((REFUSED,), lambda r, d: parquet([{**x, "text": i} for i, x in enumerate(r)])),
    "lists": ((REFUSED,), lambda r, d: parquet([{**x, "label": [x["label"]]} for x in r])),
    "no UTF-8": ((REFUSED, ROW), bad_utf8),
    "cut short": ((REFUSED,), lambda r, d: parquet(r)[: -d.randrange(1, 300)]),
    "a byte": ((READ, REFUSED, ROW), lambda r, d: flipped(parquet(r), d)),
    "no Parquet": ((REFUSED,), lambda r, d: d.choice([b"PAR1", b"text,label\n", b""])),
    "continuous": ((REFUSED,), lambda r, d: parquet([{**x, "label": i / 7} for i, x in enumerate(r)])),
}


def scrambled(data: bytes, draw: random.Random) -> bytes:
    """Some pieces cut out, doubled, or put in from elsewhere; some bytes changed."""
    for _ in range(draw.randint(1, 4)):
        start, length = draw.randrange(len(data) + 1), draw.randint(0, 12)
        piece = draw.choice(
            [b"", data[start : start + length] * 2, bytes(draw.choices(b'",\n\r{}[]:\\0\xe9\x00; ', k=2))]
        )
        data = data[:start] + piece + data[start + length :]
    return data


def flipped(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << draw.randrange(8))]) + data[place + 1 :]


TEXTS = {"csv": CSV, "jsonl": JSON, "json": JSON, "parquet": PARQUET}


def spoil_texts(folder: Path, draw: random.Random) -> tuple[str, Spoiled, dict[tuple[str, str], list[Row]]]:
    """(format, what is changed, the rows of each task and split)."""
    labels = draw.choice(NAMES)
    rows, spoiled, kind = {}, None, draw.choice(list(TEXTS))
    for task in ("w1", "w2"):
        for split in ("train", "test"):
            own = rows[task, split] = make_rows(draw, labels, f"{task} {split}")
            changed = (task, split) == ("w2", "train")
            format_ = kind if changed else draw.choice(list(TEXTS))
            change = draw.choice(list(TEXTS[format_])) if changed else "plain"
            right, write = TEXTS[format_][change]
            content = write(own, draw)
            (folder / task).mkdir(parents=True, exist_ok=True)
            path = folder / task / f"{split}.{format_}"
            path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
            spoiled = Spoiled(change, right) if changed else spoiled
    assert spoiled is not None
    return kind, spoiled, rows


# ---- images: change(a picture, draw) -> (file name in train/, bytes) ----


def encoded(image: Image.Image, format_: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def array(kind: str, high: float) -> Callable[[Image.Image, random.Random], Image.Image]:
    return lambda image, draw: Image.fromarray((np.asarray(image.convert("L")) / 255 * high).astype(kind))


def palette(image: Image.Image, draw: random.Random) -> Image.Image:
    made = image.convert("P")
    made.info["transparency"] = 0
    return made


KINDS = {"PNG": "RGB L LA RGBA P 1", "JPEG": "RGB L CMYK", "WEBP": "RGBA", "GIF": "P", "TIFF": "CMYK YCbCr"}
MODES: dict[str, tuple[str, Callable[[Image.Image, random.Random], Image.Image]]] = {
    **{
        f"{mode} {kind}": (kind, lambda image, draw, mode=mode: image.convert(mode))  # type: ignore[misc]
        for kind, modes in KINDS.items()
        for mode in modes.split()
    },
    "palette with alpha": ("PNG", palette),
    "16 bits": ("PNG", array("uint16", 65535)),
    "16 bits TIFF": ("TIFF", array("uint16", 65535)),
    "32 bits": ("TIFF", array("int32", 2**31 - 1)),
    "floats to 1": ("TIFF", array("float32", 1)),
    "floats to 255": ("TIFF", array("float32", 255)),
}  # fmt: skip
BROKEN: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut short": lambda data, d: data[: d.randrange(len(data) * 3 // 4)],
    "no image": lambda data, d: b"no image",
    "empty": lambda data, d: b"",
    "a byte": flipped,
}
PLACES: dict[str, tuple[tuple[str, ...], str]] = {
    "beside": ((REFUSED,), "stray.png"),
    "nested": ((REFUSED,), "left/deep/stray.png"),
    "hidden": ((READ,), "left/.stray.png"),
    "a note": ((READ,), "left/notes.txt"),
    "an empty class": ((REFUSED,), "unknown/notes.txt"),
}


def picture(draw: random.Random, label: str) -> Image.Image:
    """Grey noise, bright on the side that is the label."""
    values = np.random.default_rng(draw.randrange(2**32)).integers(0, 60, (16, 16, 3), dtype=np.uint8)
    values[:, slice(0, 8) if label == "left" else slice(8, 16)] += 150
    return Image.fromarray(values)


def spoil_images(folder: Path, draw: random.Random) -> tuple[str, Spoiled, dict[tuple[str, str], list[Row]]]:
    """As `spoil_texts`; what is to be read is which side is bright."""
    rows: dict[tuple[str, str], list[Row]] = {}
    spoiled = draw.choice(["mode", "mode", "broken", "place"])
    change, right = "", (READ,)
    for split in ("train", "test"):
        for label in ("left", "right"):
            for i in range(3):
                mode = draw.choice(list(MODES)) if spoiled == "mode" else "RGB PNG"
                format_, make = MODES[mode]
                data = encoded(make(picture(draw, label), draw), format_)
                if spoiled == "broken" and (split, label, i) == ("train", "right", 1):
                    format_, make = MODES[draw.choice(list(MODES))]
                    data = encoded(make(picture(draw, label), draw), format_)
                    change = draw.choice(list(BROKEN))
                    data, right = BROKEN[change](data, draw), (READ, ROW) if change == "a byte" else (ROW,)
                path = (
                    folder
                    / "w1"
                    / split
                    / label
                    / f"{i}.{ {'JPEG': 'jpg', 'TIFF': 'tif'}.get(format_, format_.lower()) }"
                )
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                rows.setdefault(("w1", split), []).append({"label": label})
    if spoiled == "place":
        change = draw.choice(list(PLACES))
        right, name = PLACES[change]
        path = folder / "w1" / "train" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(picture(draw, "left"), "PNG"))
    return "images", Spoiled(change or spoiled, right), rows


# ---- what became of it ----


def outcome(folder: Path, spoiled: Spoiled, rows: dict[tuple[str, str], list[Row]]) -> tuple[str, str]:
    """(what became of it, what is wrong with that: nothing, as it should be)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stream = load_stream(folder)
            found = {
                (task.name, split): read(stream, getattr(task, split)) for task in stream for split in ("train", "test")
            }
    except PerpetuneError as error:
        said = str(error)
        named = re.search(r"\b(line|row|item) \d+", said) is not None
        wrong = "refused, and should be read" if spoiled.right == (READ,) else ""
        wrong = wrong or ("no row in" if ROW in spoiled.right and REFUSED not in spoiled.right and not named else "")
        wrong = wrong or ("no file in" if str(folder) not in said else "")
        wrong = wrong or ("several lines" if "\n" in said else "")
        return REFUSED, wrong and f"{wrong}: {said}"
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    if READ not in spoiled.right:
        return READ, "read, and should be refused"
    expected = {place: [(row.get("text"), row["label"]) for row in own] for place, own in rows.items()}
    odd = next((place for place in expected if found.get(place) != expected[place]), None)
    return READ, "" if odd is None or spoiled.change in RANDOM else f"{odd} read as {found.get(odd)}"


def read(stream: Any, data: Any) -> list[tuple[str | None, str]]:
    """(text, label) of every row; of images which side is bright, as the pixels and as the label say it."""
    labels = [{"True": "true", "False": "false"}.get(stream.labels[y], stream.labels[y]) for y in data["label"][:]]
    if "text" in data.column_names:
        return list(zip(data["text"][:], labels, strict=True))
    sides = []
    for image in data["image"]:
        values = np.asarray(eight_bits(image, "L")).astype(float)
        sides.append("left" if values[:, :8].mean() > values[:, 8:].mean() + 60 else "right")
    return [
        (None, label if label == side else f"{label} that looks {side}")
        for label, side in zip(labels, sides, strict=True)
    ]


def fuzz(seed: int, folder: Path) -> tuple[str, str, str, str]:
    """(format, change, what became of it, what is wrong with that) of the stream that a seed makes."""
    draw = random.Random(seed)
    kind, spoiled, rows = (spoil_images if seed % 4 == 0 else spoil_texts)(folder, draw)
    became, wrong = outcome(folder, spoiled, rows)
    return kind, spoiled.change, became, wrong


def measured(options: argparse.Namespace) -> list[str]:
    figures: Counter[tuple[str, str]] = Counter()
    failures = []
    for seed in range(options.first, options.first + options.count):
        with tempfile.TemporaryDirectory() as folder:
            kind, change, became, wrong = fuzz(seed, Path(folder) / "s")
        figures[kind, became] += 1
        if wrong:
            failures.append(f"seed {seed}, {kind}, {change}: {wrong}")
    for (kind, became), count in sorted(figures.items()):
        print(f"{kind:8} {became:10} {count}")
    print(f"{options.count} streams, {len(failures)} wrong", *failures[:40], sep="\n")
    return failures


OPTIONS = (Option("--count", 2000, "streams"), Option("--first", 0, "the first seed"))
main = Benchmark("fuzz_streams", __doc__, OPTIONS, measured).main


if __name__ == "__main__":
    main()

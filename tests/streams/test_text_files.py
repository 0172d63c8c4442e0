"""CSV and JSON are read as they are written, or refused by file and line."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import perpetune
from perpetune.core.errors import StreamError
from perpetune.streams import load_stream
from perpetune.streams.formats import read_files, read_split

TEST = "text,label\na test,late\nanother,refund\n"


def stream_of(folder: Path, train: str | bytes, name: str = "train.csv") -> Path:
    task = folder / "tasks" / "w1"
    task.mkdir(parents=True, exist_ok=True)
    (task / name).write_bytes(train if isinstance(train, bytes) else train.encode("utf-8", "surrogatepass"))
    (task / "test.csv").write_text(TEST, encoding="utf-8")
    return task.parent


@pytest.mark.parametrize(
    ("train", "message"),
    [
        # a first field too many became an index, and the text lost its beginning
        ("text,label\nHello, where is it,late\nHi, pay back,refund\n", "line 2 has 3 fields, the header 2"),
        ("text,label\nwhere is it,late\nHello, pay back,refund\n", "line 3 has 3 fields.*quote texts that hold"),
        ("text,label\nwhere is it,late,\npay back,refund,\n", "line 2 has 3 fields.*remove the comma at its end"),
        ("text,label\nwhere is it,late\npay back\n", "line 3 has 1 field, the header 2.*fill the missing"),
        ('text,label\n"where\nis it",late\npay back\n', "line 4 has 1 field,"),
        ('text,label\n"where is it,late\npay back,refund\n', "row that begins in line 2 has a quote out of place"),
        ("text,label,\nHello, where is it,late\n", "line 2 has `late` in a column without a name"),
        ("text,text,label\na,b,late\n", "names the column `text` twice"),
        ("text;label\na;late\n", "no comma but semicolons"),
        ("text\tlabel\na\tlate\n", "no comma but tabs"),
        (b"text,label\na,late\n\xe9,refund\n", r"line 3 has a byte that is not UTF-8 \(0xe9, byte 1"),
        (TEST.encode("utf-16"), "written in UTF-16: save it as UTF-8"),
        (TEST.encode("utf-16-le"), "line 1 has a null character"),
    ],
)  # fmt: skip
def test_csv_is_refused_by_file_and_line(tmp_path: Path, train: str | bytes, message: str) -> None:
    with pytest.raises(StreamError, match=rf"the train split of task `w1`, .*w1/train.csv .*{message}") as refused:
        load_stream(stream_of(tmp_path, train))
    assert "\n" not in str(refused.value)


def test_csv_is_read_as_it_is_written(tmp_path: Path) -> None:
    text = (
        '\ufeffn, text,label\r\n1,"a, ""quoted""\r\nword",2024-05-01\r\n\r\n  \r\n2,NA,1.50\r\n3,'
        + "x" * 200_000
        + ",null\r\n"
    )
    path = stream_of(tmp_path, text) / "w1" / "train.csv"
    data, origin = read_split([path], "here")
    assert data["text"][:] == ['a, "quoted"\r\nword', "NA", "x" * 200_000]
    assert data["label"][:] == ["2024-05-01", "1.50", "null"] and data["n"][:] == ["1", "2", "3"]
    assert [origin.row(i) for i in (0, 2)] == [f"row 0 of here ({path}, line 2)", f"row 2 of here ({path}, line 7)"]


def test_the_index_that_pandas_writes_is_no_column(tmp_path: Path) -> None:
    path = stream_of(tmp_path, ",text,label\n0,a,late\n1,b,refund\n") / "w1" / "train.csv"
    assert read_files([path], "here").column_names == ["text", "label"]


def test_shards_of_csv_have_one_header(tmp_path: Path) -> None:
    folder = stream_of(tmp_path, "text,label\na,late\n", "train-1.csv") / "w1"
    second = folder / "train-2.csv"
    second.write_text("label,text\nrefund,b\n", encoding="utf-8")
    data, origin = read_split([folder / "train-1.csv", second], "here")
    assert data["text"][:] == ["a", "b"] and origin.row(1) == f"row 1 of here ({second}, line 2)"
    second.write_text("text,category\nb,refund\n", encoding="utf-8")
    with pytest.raises(
        StreamError, match=r"train-2.csv .*its header \(text, category\) is not that of the other files"
    ):
        read_split([folder / "train-1.csv", second], "here")


STRINGS = ["2024-05-01", "2024-05-01T10:00:00Z", "1.0", "007", "NaN", "null", "true", "12:30", "1e5", "-0"]


@pytest.mark.parametrize("string", STRINGS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_strings_stay_strings(tmp_path: Path, string: str, kind: str) -> None:
    import pandas as pd

    rows = [{"prompt": f"Which? {i}", "response": string} for i in range(3)]
    for split in ("train", "test"):
        path = tmp_path / "s" / "w1" / f"{split}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "csv":
            pd.DataFrame(rows).to_csv(path, index=False)
        elif kind == "parquet":
            pd.DataFrame(rows).to_parquet(path)
        else:
            whole = json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows))
            path.write_text(whole, encoding="utf-8")
    assert load_stream(tmp_path / "s").labels == (string,)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a", "label"', "line 2, column 22 is no JSON"),
        ("[1]", "line 2 is no object with columns"),
        ('{"text": "a", "text": "b", "label": "x"}', "line 2 has the key `text` twice"),
        ('{"text": "a \\ud83d", "label": "x"}', r"line 2 has half a character, \\ud83d"),
        ("[" * 100_000, "line 2 "),
        ('{"text": ' + "1" * 5000 + "}", "line 2 "),
    ],
)
def test_json_is_refused_by_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    train = '{"text": "first", "label": "late"}\n' + line + "\n"
    with pytest.raises(StreamError, match=rf"w1/train.jsonl is truncated or malformed: {message}"):
        load_stream(stream_of(tmp_path, train, "train.jsonl"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": "late"}, r"column `text` .* null, the first in row 1 \(.*train.jsonl, line 3\)"),
        ({"text": "a"}, r"no label, the first is row 1 \(.*train.jsonl, line 3\)"),
        ({"text": "a", "label": "  "}, r"no label, the first is row 1 \(.*train.jsonl, line 3\)"),
        ({"text": 5, "label": "late"}, r"column `text` .* holds no text in row 1 \(.*train.jsonl, line 3\)"),
    ],
)
def test_a_row_that_lacks_something_is_named(tmp_path: Path, row: dict[str, object], message: str) -> None:
    train = json.dumps({"text": "first", "label": "late"}) + "\n\n" + json.dumps(row)
    with pytest.raises(StreamError, match=message):
        load_stream(stream_of(tmp_path, train, "train.jsonl"))


def test_an_empty_text_is_warned_of_by_row(tmp_path: Path) -> None:
    rows = [{"text": text, "label": "late"} for text in ("first", " \n", "")]
    path = stream_of(tmp_path, "\n".join(map(json.dumps, rows)), "train.jsonl")
    (path / "w1" / "test.csv").write_text("text,label\na,late\n", encoding="utf-8")
    with pytest.warns(
        UserWarning, match=r"2 of 3 texts .* empty, the first is row 1 \(.*train.jsonl, line 2\)"
    ) as warned:
        assert load_stream(path).tasks[0].train["text"][:] == ["first", " \n", ""]
    assert warned[0].filename == __file__


def test_columns_that_nobody_reads_may_hold_anything(tmp_path: Path) -> None:
    others = [1, "a", None, [1, "b"], {"a": {}}, 2**80, True, 1.5]
    rows = [{"text": f"t{i}", "label": "late", "note": other} for i, other in enumerate(others)]
    path = stream_of(tmp_path, "\n".join(map(json.dumps, rows)), "train.jsonl")
    (path / "w1" / "test.csv").write_text("text,label\na,late\n", encoding="utf-8")
    assert load_stream(path).tasks[0].train["text"][:] == [f"t{i}" for i in range(8)]


def test_a_hint_says_what_its_reader_can_type(tmp_path: Path) -> None:
    path = stream_of(tmp_path, "text,category\nwhere is it,card_arrival\n")
    (path / "w1" / "test.csv").write_text("text,category\nwhere,card_arrival\n", encoding="utf-8")
    with pytest.raises(StreamError) as refused:
        load_stream(path)
    for typed in (
        "--columns category=label",
        "columns: {category: label}",
        'columns={"category": "label"}',
        "train.csv",
    ):
        assert typed in str(refused.value)
    stream = load_stream(path, columns={"category": "label"})
    assert stream.labels == ("card_arrival",) and load_stream(**stream.source).labels == stream.labels
    with pytest.raises(StreamError, match="has `category` and `text`, and both are to be called `label`"):
        load_stream(path, columns={"category": "label", "text": "label"})


def test_the_locale_decides_nothing(tmp_path: Path) -> None:
    path = stream_of(tmp_path, '{"text": "où", "label": "été"}', "train.jsonl")
    (path / "w1" / "test.csv").write_text("text,label\nlà,été\n", encoding="utf-8-sig")
    (path / "w1" / "task.json").write_text('{"name": "Été"}', encoding="utf-8-sig")
    script = "import sys; from perpetune.streams import load_stream as l; s = l(sys.argv[1]); print(ascii(s.labels))"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-X", "warn_default_encoding", "-W", "error::EncodingWarning:perpetune", "-c", script]
    ran = subprocess.run([*command, str(path)], env=environment, capture_output=True, text=True)
    assert ran.stdout == "('\\xe9t\\xe9',)\n", ran.stderr


def test_every_file_of_text_is_opened_in_a_named_encoding() -> None:
    """`open`, `Path.open`, `read_text` and `write_text` in the whole library; "b" in a mode opens bytes."""
    sources = sorted(Path(perpetune.__file__).parent.rglob("*.py"))
    lacking = [
        f"{path.name}:{call.lineno}"
        for path in sources
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and _opens_text(call) and "encoding" not in {k.arg for k in call.keywords}
    ]
    assert len(sources) > 100 and lacking == []


def _opens_text(call: ast.Call) -> bool:
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    modes = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    if name == "read_text":
        return True
    if name == "write_text":
        return len(call.args) == 1  # ours take the path as well, and name the encoding themselves
    if name in ("open", "fdopen") and (isinstance(call.func, ast.Name) or name == "fdopen"):
        return not any("b" in mode for mode in modes[-1:])
    return name == "open" and any(mode in ("r", "w", "a", "x") for mode in modes)

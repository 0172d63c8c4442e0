"""`perpetune predict`: inputs on the command line or in a file, labels on it or in another."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from perpetune import Learner, load_stream
from tests.calling import call

TRAINING = {"num_train_epochs": 2, "per_device_train_batch_size": 12, "learning_rate": 0.01}
TEXTS = ["movie film the film", "market bank bank", "great good good"]


@pytest.fixture
def perpetune(monkeypatch, capsys):
    return lambda *arguments: call(monkeypatch, capsys, *arguments)


@pytest.fixture(scope="module")
def run(word_stream, tiny_bert, tmp_path_factory):
    path = tmp_path_factory.mktemp("predict") / "run"
    Learner(tiny_bert(width=16, layers=1), "routed", path, training=TRAINING).learn(load_stream(word_stream))
    return path


@pytest.fixture(scope="module")
def known(run):
    learner = Learner.open(run)
    return {"routed": learner.predict(TEXTS), "told": learner.predict(TEXTS, task="news")}


def test_inputs_on_the_command_line(run, known, perpetune):
    code, out, _ = perpetune("predict", run, *TEXTS)
    assert code == 0 and out.split() == known["routed"]
    assert perpetune("predict", run, *TEXTS, "--task", "news")[1].split() == known["told"]
    assert set(perpetune("predict", run, *TEXTS, "--classes", "sad, happy")[1].split()) <= {"sad", "happy"}


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet"])
def test_a_file_comes_back_with_its_columns_and_a_prediction(kind, run, known, perpetune, tmp_path):
    given = tmp_path / f"given{kind}"
    frame = pd.DataFrame({"number": [7, 8, 9], "sentence": TEXTS, "where": ["Köln", "東京", "a, b"]})
    write = {".csv": frame.to_csv, ".parquet": frame.to_parquet}.get(kind)
    if write is None:
        given.write_text("\n".join(map(json.dumps, frame.to_dict("records"))), encoding="utf-8")
    else:
        write(given, index=False)
    found = tmp_path / f"found{kind}"
    code, out, err = perpetune("predict", run, "--input", given, "--output", found, "--columns", "sentence=text")
    assert (code, err) == (0, "") and "3 predictions" in out
    read = {".csv": pd.read_csv, ".jsonl": lambda p: pd.read_json(p, lines=True), ".parquet": pd.read_parquet}[kind]
    rows = read(found)
    assert rows["prediction"].tolist() == known["routed"] and rows["where"].tolist() == frame["where"].tolist()
    assert [str(number) for number in rows["number"]] == ["7", "8", "9"]


def test_a_text_file_has_an_input_in_every_line(run, known, perpetune, tmp_path):
    (tmp_path / "given.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    assert perpetune("predict", run, "--input", tmp_path / "given.txt")[1].split() == known["routed"]


def test_files_of_images(tiny_vit, tmp_path, perpetune):
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        for label, shade in (("dark", 0), ("light", 200)):
            (tmp_path / "data" / "shades" / split / label).mkdir(parents=True)
            for i in range(count):
                values = (shade + generator.integers(0, 50, (16, 16, 3))).astype(np.uint8)
                Image.fromarray(values).save(tmp_path / "data" / "shades" / split / label / f"{i}.png")
    learner = Learner(tiny_vit(), "frozen_ncm", tmp_path / "run")
    learner.learn(load_stream(tmp_path / "data"))
    pictures = [tmp_path / "data" / "shades" / "test" / label / "0.png" for label in ("light", "dark")]
    assert perpetune("predict", tmp_path / "run", *pictures)[1].split() == ["light", "dark"]
    code, _, err = perpetune("predict", tmp_path / "run", tmp_path / "run" / "run.yaml")
    assert code == 2 and "is no image that can be read" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give inputs to predict"),
        (["a text", "--input", "x.csv"], "give inputs to predict"),
        (["--input", "nowhere.csv"], "no file `nowhere.csv`"),
        (["a text", "--output", "x.csv"], "--output goes with --input"),
        (["--input", "{given}", "--output", "x.xlsx"], "--output writes .csv, .jsonl, .parquet"),
        (["--input", "{given}", "--output", "nowhere/x.csv"], "no folder `nowhere`"),
        (["--input", "{given}"], "--columns sentence=text"),
        (["--input", "{given}", "--columns", "sentence"], "name=text"),
        (["--input", "{given}", "--columns", "sentense=text"], "did you mean `sentence`"),
        (["--input", "{empty}"], "row 1"),
        (["a text", "--head", "ridg"], "no head `ridg`"),
        (["a text", "--task", "new"], "no task `new`"),
        (["a text", "--classes", "sadd"], "class `sadd` is not learned"),
    ],
)
def test_what_cannot_be_predicted_is_one_line(arguments, message, run, perpetune, tmp_path):
    (tmp_path / "given.csv").write_text("sentence\nhello\n")
    (tmp_path / "empty.jsonl").write_text('{"text": "hello"}\n{"text": null}\n')
    places = {"given": tmp_path / "given.csv", "empty": tmp_path / "empty.jsonl"}
    code, out, err = perpetune("predict", run, *(text.format(**places) for text in arguments))
    assert code == 2 and message in err and err.count("\n") == 1 and not out

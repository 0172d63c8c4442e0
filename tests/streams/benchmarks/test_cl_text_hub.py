"""The fifteen text datasets from the Hub, whose datasets are replaced by small ones of the same columns."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from perpetune.core.errors import StreamError
from perpetune.streams import load_stream
from perpetune.streams.prompting import PUBLISHED

pytestmark = pytest.mark.filterwarnings("ignore:.*published size:UserWarning")

GLUE, SUPERGLUE = "nyu-mll/glue", "aps/super_glue"
YAHOO = (
    "Society & Culture, Science & Mathematics, Health, Education & Reference, Computers & Internet, Sports, "
    "Business & Finance, Entertainment & Music, Family & Relationships, Politics & Government"
).split(", ")
DBPEDIA = (
    "Company EducationalInstitution Artist Athlete OfficeHolder MeanOfTransportation Building NaturalPlace Village "
    "Animal Plant Album Film WrittenWork"
).split()
# (name on the Hub, configuration or folder) -> (text columns, label column, its names on the Hub)
HUB: dict[tuple[str, str | None], tuple[str, str, list[str] | None]] = {
    ("Yelp/yelp_review_full", None): ("text", "label", ["1 star", "2 star", "3 stars", "4 stars", "5 stars"]),
    ("yassiracharki/Amazon_Reviews_for_Sentiment_Analysis_fine_grained_5_classes", None): (
        "review_title review_text",
        "class_index",
        None,  # a CSV file: 1 to 5
    ),
    ("stanfordnlp/imdb", None): ("text", "label", ["neg", "pos"]),
    ("fancyzhx/ag_news", None): ("text", "label", ["World", "Sports", "Business", "Sci/Tech"]),
    ("fancyzhx/dbpedia_14", None): ("title content", "label", DBPEDIA),
    ("community-datasets/yahoo_answers_topics", None): ("question_title question_content best_answer", "topic", YAHOO),
    (GLUE, "sst2"): ("sentence", "label", ["negative", "positive"]),
    (GLUE, "mnli"): ("premise hypothesis", "label", ["entailment", "neutral", "contradiction"]),
    (GLUE, "rte"): ("sentence1 sentence2", "label", ["entailment", "not_entailment"]),
    (GLUE, "qqp"): ("question1 question2", "label", ["not_duplicate", "duplicate"]),
    (SUPERGLUE, "cb"): ("premise hypothesis", "label", ["entailment", "contradiction", "neutral"]),
    (SUPERGLUE, "boolq"): ("question passage", "label", ["False", "True"]),
    (SUPERGLUE, "copa"): ("premise choice1 choice2 question", "label", ["choice1", "choice2"]),
    (SUPERGLUE, "multirc"): ("paragraph question answer", "label", ["False", "True"]),
    (SUPERGLUE, "wic"): ("word sentence1 sentence2", "label", ["False", "True"]),
}
SPLITS = {"train", "test", "validation", "validation_matched", "unsupervised"}
# task -> a name on the Hub, and what it is called in the stream
CALLED = {
    "yelp": ("1 star", "very negative"),
    "amazon": ("5", "very positive"),
    "imdb": ("neg", "Bad"),
    "sst-2": ("positive", "Good"),
    "agnews": ("Sci/Tech", "Science or Technology"),
    "dbpedia": ("MeanOfTransportation", "Mean of Transportation"),
    "yahoo": ("Health", "Health"),
    "mnli": ("contradiction", "contradiction"),
    "cb": ("contradiction", "contradiction"),
    "rte": ("not_entailment", "contradiction"),
    "qqp": ("duplicate", "True"),
    "boolqa": ("False", "False"),
    "copa": ("choice2", "B"),
    "multirc": ("False", "False"),
    "wic": ("True", "True"),
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What was asked for; every text column says its own name and the label's, the hidden labels are -1."""
    asked = []

    def load(path: str, name: str | None = None, *, split: str, **options: str) -> Dataset:
        asked.append((path, name, split, options))
        folder = options.pop("data_dir", None)
        assert options == ({"revision": "refs/convert/parquet"} if folder else {})
        columns, label, names = HUB[path, name or folder]
        assert split in SPLITS
        hidden = split == "test" and path in (GLUE, SUPERGLUE)
        values = range(len(names)) if names else range(1, 6)
        rows = []
        for i in range(3):
            for value in values:
                called = names[value] if names else str(value)
                texts = {column: f"{column} of {called} {split} {i} {{}}" for column in columns.split()}
                rows.append({**texts, label: -1 if hidden else value})
        features: dict[str, Any] = {column: Value("string") for column in columns.split()}
        features[label] = ClassLabel(names=names) if names else Value("int64")
        return Dataset.from_list(rows, features=Features(features))

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


@pytest.mark.parametrize("task", sorted(PUBLISHED.keys() - {"sst2"}))
def test_every_dataset_finds_its_labels(task: str, hub: list) -> None:
    stream = load_stream("cl-order-4", tasks=[task])
    (found,) = stream
    there, here = CALLED[task]
    texts = [row["text"] for split in (found.train, found.test) for row in split if f"of {there} " in row["text"]]
    labels = {stream.labels[row["label"]] for split in (found.train, found.test) for row in split}
    assert len(texts) == 6 and len(labels) == len(found.classes)
    for split in (found.train, found.test):
        marked = {stream.labels[row["label"]] for row in split if f"of {there} " in row["text"]}
        assert marked == {here}
    assert all("train" in row["text"] for row in found.train) and not any("train" in row["text"] for row in found.test)
    assert (found.instruction is None) == (task == "copa") and len(hub) == 2


def test_the_texts_are_written_as_in_the_published_files(hub: list) -> None:
    stream = load_stream("cl-order-6", tasks=["cb", "wic", "multirc", "amazon"])
    first = [task.test.sort("id")[0]["text"].split("\n") for task in stream]
    assert [[line.split(": ")[0] for line in lines] for lines in first[:1]] == [["sentence 1", "sentence 2"]]
    assert first[1][0].startswith("word: ") and len(first[1]) == 3
    assert [line.split(":")[0] for line in first[2]] == ["paragraph", "question", "candidate answer"]
    assert [line.split(":")[0] for line in first[3]] == ["Title", "Text"] and first[3][0].endswith("{}")


def test_options_in_prompt_order(hub: list) -> None:
    stream = load_stream("cl-order-4", tasks=["mnli", "boolqa", "qqp", "imdb"])
    assert [stream.label_texts(task.classes) for task in stream] == [
        ["neutral", "entailment", "contradiction"],
        ["True", "False"],
        ["False", "True"],
        ["Good", "Bad"],
    ]


def test_only_what_is_needed_is_asked_for_and_drawn_the_same_again(hub: list, monkeypatch: pytest.MonkeyPatch) -> None:
    from perpetune.streams.benchmarks import cl_text

    monkeypatch.setitem(cl_text.SIZES, "agnews", (4, 8))
    one, two = (load_stream("cl-order-1", tasks=["agnews"]).tasks[0] for _ in range(2))
    assert {path for path, *_ in hub} == {"fancyzhx/ag_news"}
    assert one.train["id"] == two.train["id"] and len(one.train) == 4 and len(one.test) == 8
    assert sorted(one.train["label"]) == [0, 1, 2, 3]  # class by class
    load_stream("cl-order-4", tasks=["cb"])
    assert [(path, name, split, options) for path, name, split, options in hub[-2:]] == [
        (SUPERGLUE, None, "train", {"revision": "refs/convert/parquet"}),
        (SUPERGLUE, None, "validation", {"revision": "refs/convert/parquet"}),
    ]


def test_columns_that_are_no_longer_there(hub: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HUB, ("fancyzhx/ag_news", None), ("body", "label", ["World", "Sports", "Business", "Sci"]))
    with pytest.raises(StreamError, match="`fancyzhx/ag_news` on the Hub has no column 'text' any more"):
        load_stream("cl-order-1", tasks=["agnews"])
    monkeypatch.setitem(HUB, ("fancyzhx/ag_news", None), ("text", "topic", ["World", "Sports", "Business", "Sci"]))
    with pytest.raises(StreamError, match="no column `label` any more"):
        load_stream("cl-order-1", tasks=["agnews"])


def test_no_network_is_one_line() -> None:
    with pytest.raises(StreamError, match="fancyzhx/dbpedia_14.*Give the folder CL_Benchmark") as text:
        load_stream("cl-order-1")
    with pytest.raises(StreamError, match="uoft-cs/cifar100.*or images in train/<class>/") as images:
        load_stream("cifar100")
    assert "\n" not in f"{text.value}{images.value}"

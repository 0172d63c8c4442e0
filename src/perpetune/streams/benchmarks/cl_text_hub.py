"""The fifteen text datasets of `cl_text` from the Hub, sampled by the published rule, but not the published rows.

At most 1000 training rows a class and 7600 test rows are drawn, with a seed of our own. Where the Hub's test labels are
hidden (GLUE, SuperGLUE), the published test data is the validation split, and so it is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from ...core.errors import StreamError
from ..formats import load_hub
from ..rows import Rows
from ..sampling import stratified
from .base import fetched, text_rows

SEED = 0


@dataclass(frozen=True)
class Source:
    """Where a dataset lies and how its rows become text.

    Attributes:
        hub: its name on the Hub.
        text: the text of a row; names in braces are columns.
        labels: value of the label column -> label text, in the order of the options in a prompt.
        test: the split that is tested on.
        label: the label column.
        where: further arguments of `load_hub`.
    """

    hub: str
    text: str
    labels: Mapping[int, str]
    test: str = "test"
    label: str = "label"
    where: Mapping[str, Any] = field(default_factory=dict)


def _glue(name: str, text: str, labels: Mapping[int, str], test: str = "validation") -> Source:
    return Source("nyu-mll/glue", text, labels, test, where={"configuration": name})


def _superglue(name: str, text: str, labels: Mapping[int, str]) -> Source:
    # the repository itself comes with code; the Hub's own conversion to Parquet does not
    where = {"data_dir": name, "revision": "refs/convert/parquet"}
    return Source("aps/super_glue", text, labels, "validation", where=where)


STARS = ("very negative", "negative", "neutral", "positive", "very positive")
DBPEDIA = (
    "Company, Educational Institution, Artist, Athlete, Office Holder, Mean of Transportation, Building, "
    "Natural Place, Village, Animal, Plant, Album, Film, Written Work"
)
YAHOO = (
    "Society & Culture, Science & Mathematics, Health, Education & Reference, Computers & Internet, Sports, "
    "Business & Finance, Entertainment & Music, Family & Relationships, Politics & Government"
)
PAIR = "sentence 1: {premise}\nsentence 2: {hypothesis}"

SOURCES: dict[str, Source] = {
    "yelp": Source("Yelp/yelp_review_full", "Text: {text}", dict(enumerate(STARS))),
    "amazon": Source(  # of five classes; a copy by a third party, in CSV
        "yassiracharki/Amazon_Reviews_for_Sentiment_Analysis_fine_grained_5_classes",
        "Title: {review_title}\nText: {review_text}",
        dict(enumerate(STARS, start=1)),
        label="class_index",
    ),
    "imdb": Source("stanfordnlp/imdb", "{text}", {1: "Good", 0: "Bad"}),
    "sst-2": _glue("sst2", "Text: {sentence}", {1: "Good", 0: "Bad"}),
    "agnews": Source(  # title and text stand in one column here
        "fancyzhx/ag_news", "Text: {text}", {0: "World", 1: "Sports", 2: "Business", 3: "Science or Technology"}
    ),
    "dbpedia": Source("fancyzhx/dbpedia_14", "Title: {title}\nText: {content}", dict(enumerate(DBPEDIA.split(", ")))),
    "yahoo": Source(
        "community-datasets/yahoo_answers_topics",
        "Title: {question_title}\nQuestion: {question_content}\nAnswer: {best_answer}",
        dict(enumerate(YAHOO.split(", "))),
        label="topic",
    ),
    "mnli": _glue("mnli", PAIR, {1: "neutral", 0: "entailment", 2: "contradiction"}, "validation_matched"),
    "cb": _superglue("cb", PAIR, {0: "entailment", 1: "contradiction", 2: "neutral"}),
    "rte": _glue("rte", "sentence 1: {sentence1}\nsentence 2: {sentence2}", {1: "contradiction", 0: "entailment"}),
    "qqp": _glue("qqp", "first sentence: {question1}\nsecond sentence: {question2}", {0: "False", 1: "True"}),
    "boolqa": _superglue("boolq", "question: {question}\npassage: {passage}", {1: "True", 0: "False"}),
    "copa": _superglue(
        "copa", "What is the {question} of this: {premise}\nA: {choice1}\nB: {choice2}", {0: "A", 1: "B"}
    ),
    "multirc": _superglue(
        "multirc",
        "paragraph: {paragraph}\nquestion: {question}\ncandidate answer: {answer}",
        {0: "False", 1: "True"},
    ),
    "wic": _superglue("wic", "word: {word}\n{sentence1}\n{sentence2}", {1: "True", 0: "False"}),
}


def from_hub(name: str, sizes: tuple[int, int]) -> dict[str, Rows]:
    """Train and test of one of the fifteen datasets.

    Args:
        sizes: so many training and test rows, where there are as many.

    Raises:
        MissingData: the dataset cannot be reached.
        StreamError: it lacks a column.
    """
    source, splits = SOURCES[name], {}
    options = list(source.labels.values())
    for split, of_hub, count in (("train", "train", sizes[0]), ("test", source.test, sizes[1])):
        data = fetched(partial(load_hub, source.hub, split=of_hub, **source.where))
        if source.label not in data.column_names:
            raise StreamError(f"`{source.hub}` on the Hub has no column `{source.label}` any more: give data=FOLDER")
        values = np.array([-1 if value is None else value for value in data[source.label][:]], dtype=np.int64)
        known = np.flatnonzero(np.isin(values, list(source.labels)))  # -1: not labelled
        labels = np.array([source.labels[value] for value in values[known]], dtype=object)
        drawn = stratified(labels, count, SEED, name, split)
        try:
            texts = [source.text.format_map(row) for row in data.select(known[drawn])]
        except KeyError as error:
            raise StreamError(f"`{source.hub}` on the Hub has no column {error} any more: give data=FOLDER") from error
        splits[split] = text_rows(texts, labels[drawn].tolist(), options, f"the {split} split of task `{name}`")
    return splits

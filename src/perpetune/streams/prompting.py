"""Text classification posed as instructions: what to decide, the options, the text, and room for the answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
from datasets import Dataset, Features, Value

from ..core.errors import ConfigError, StreamError, nearest
from .conversations import Conversation
from .passage import mark
from .rows import Rows
from .task import Stream, Task

Template = Literal["instruction", "chat", "published", "language"]
INSTRUCTION = "Choose the option that fits the following text."  # where a task does not say what to decide

# `Task.name` -> what stands behind `Task:` and `Dataset:` in the prompts of the O-LoRA and N-LoRA code
PUBLISHED: dict[str, tuple[str, str]] = {
    "yelp": ("SC", "yelp"),
    "amazon": ("SC", "amazon"),
    "imdb": ("SC", "IMDB"),
    "sst2": ("SC", "SST-2"),
    "sst-2": ("SC", "SST-2"),
    "agnews": ("TC", "agnews"),
    "dbpedia": ("TC", "dbpedia"),
    "yahoo": ("TC", "yahoo"),
    "mnli": ("NLI", "MNLI"),
    "cb": ("NLI", "CB"),
    "rte": ("NLI", "RTE"),
    "qqp": ("QQP", "QQP"),
    "boolqa": ("BoolQA", "BoolQA"),
    "copa": ("COPA", "COPA"),
    "multirc": ("MultiRC", "MultiRC"),
    "wic": ("WiC", "WiC"),
}


def pose(stream: Stream, template: Template = "instruction") -> Stream:
    """The stream with every text as the `prompt` of an instruction, to be answered with its label text.

    "instruction"           "published" (O-LoRA, N-LoRA)
                            Task:<kind of task>
                            Dataset:<name>
    <instruction>           <instruction>
    Options: <l1>, <l2>     Option: <l1>, <l2> (and a blank)
    <text>                  <text>
    <text_pair>             <text_pair>
    Answer:                 Answer:

    The options are those of the sample's task, in the task's own order, so that a prompt tells which labels are in
    question; the published template tells the name of the dataset as well, at test time, too. The text is marked as
    what may be cut where the prompt is too long for a model.

    "chat" is the instruction as a user's turn, without its last line: the model's chat template writes it, and the
    assistant answers with the label text.

    "language" poses nothing: the rows are texts that answer nothing, all of whose tokens are learned; their column
    `text` is read as responses without prompts (see `as_texts`).

    Args:
        stream: with `text`, or `text` and `text_pair`. `Task.instruction` says what to decide; without it the line is
            `INSTRUCTION`, or missing (published).

    Raises:
        ConfigError: an unknown template.
        StreamError: a stream of images or prompts; published, but not one of the datasets that it was published for.
    """
    if template not in get_args(Template):
        raise ConfigError(f"no template is called `{template}`: {nearest(str(template), get_args(Template))}")
    if template == "language":
        if "prompt" not in stream.inputs:
            raise StreamError(f"stream `{stream.name}` has {stream.inputs[0]} and label: leave pose out, or the labels")
        return replace(stream, source={**stream.source, "pose": template})
    if "text" not in stream.inputs:
        raise StreamError(f"stream `{stream.name}` has {stream.inputs[0]}s: only texts can be posed as instructions")
    tasks = tuple(_posed(task, stream.labels, template) for task in stream)
    inputs = ("messages",) if template == "chat" else ("prompt",)
    return replace(stream, tasks=tasks, inputs=inputs, source={**stream.source, "pose": template})


def as_texts(columns: Mapping[str, str] | None, template: Template | None) -> dict[str, str]:
    """New names of columns with which texts that answer nothing are read: `text` is the response."""
    new = {old: "response" if name == "text" else name for old, name in (columns or {}).items()}
    return {"text": "response", **new} if template == "language" else dict(columns or {})


def _posed(task: Task, labels: tuple[str, ...], template: Template) -> Task:
    options = ", ".join(labels[c] for c in task.classes)
    if template == "published":
        if task.name not in PUBLISHED:
            raise StreamError(
                f"the published template has no name for task `{task.name}` ({nearest(task.name, PUBLISHED)}): use the "
                'template "instruction"'
            )
        kind, name = PUBLISHED[task.name]
        head = [f"Task:{kind}", f"Dataset:{name}", *([task.instruction] if task.instruction else [])]
        head.append(f"Option: {options} ")
    else:
        head = [task.instruction or INSTRUCTION, f"Options: {options}"]

    def prompts(data: Dataset | None, split: str) -> Dataset | None:
        if data is None:
            return None
        keep = (lambda text: text) if template == "published" else str.strip
        columns = [[mark(keep(text)) for text in data["text"][:]]]
        if "text_pair" in data.column_names:
            columns.append([keep(text) for text in data["text_pair"][:]])
        tail = () if template == "chat" else ("Answer:",)
        posed, name = ["\n".join((*head, *texts, *tail)) for texts in zip(*columns, strict=True)], "prompt"
        if template == "chat":
            posed, name = [Conversation([{"role": "user", "content": text}]).written() for text in posed], "messages"
        made = Dataset.from_dict({name: posed}, features=Features({name: Value("string")}))
        texts = np.array([labels[y] for y in data["label"][:]], dtype=object)
        rows = Rows(f"the {split} split of task `{task.name}`", made, np.arange(len(made)), texts)
        return rows.finish({label: c for c, label in enumerate(labels)})

    train, test = prompts(task.train, "train"), prompts(task.test, "test")
    assert train is not None and test is not None
    return replace(task, train=train, test=test, validation=prompts(task.validation, "validation"))

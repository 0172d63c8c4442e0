"""The settings of a stream: the arguments of `load_stream` and of `drift`, as YAML and the command line give them."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal

import pydantic

from .settings import setting

if TYPE_CHECKING:
    from ..streams import Drift, Stream


class DriftConfig(pydantic.BaseModel):
    """The arguments of `drift`, and of the `Detector` that finds the boundaries."""

    model_config = pydantic.ConfigDict(extra="forbid")

    segments: int = setting(
        12,
        "Feed the examples of the tasks in order, as this many segments with repeats, and tell no boundaries: new "
        "tasks are noticed, known ones reopened (recipes color and routed).",
        panel="Data without boundaries",
        option="--drift",
        example="12",
    )
    length: tuple[int, int] = setting(
        (150, 400),
        "Shortest and longest segment, in examples.",
        panel="Data without boundaries",
        option="--drift-length",
        example="150,400",
    )
    seed: int = setting(
        0,
        "Decides the order and the lengths of the segments.",
        panel="Data without boundaries",
        option="--drift-seed",
        example="1",
    )
    level: float = setting(
        0.001,
        "How rarely a boundary may be reported where there is none: the level of the detector's test.",
        panel="Data without boundaries",
        option="--drift-level",
        example="0.01",
        gt=0,
        lt=1,
    )
    window: int = setting(
        64,
        "Newest examples that the detector compares with the current task.",
        panel="Data without boundaries",
        option="--drift-window",
        example="128",
        ge=8,
    )
    told: bool = setting(
        False,
        "Tell the boundaries after all, to compare with.",
        panel="Data without boundaries",
    )

    def feed(self, stream: Stream) -> Drift:
        """The examples of a stream's tasks in order, its boundaries untold.

        Raises:
            PerpetuneError: see `drift`.
        """
        from ..streams import drift

        return drift(stream, self.segments, self.length, seed=self.seed)


class StreamConfig(pydantic.BaseModel):
    """The arguments of `load_stream`; and how its tasks are fed without boundaries, if they are."""

    model_config = pydantic.ConfigDict(extra="forbid")

    source: str = setting(
        ...,
        "A folder of task folders, a built-in stream (`perpetune list streams`), a published benchmark "
        "(`perpetune list benchmarks`), or one labelled file, folder or Hub data set to divide with --split-by.",
        panel="Data",
        option="--stream",
        example="my_tasks/",
    )
    data: str | None = setting(
        None,
        "Folder with the files of a published benchmark; without it, from the Hub where that is possible.",
        panel="Data",
        example="downloads/CL_Benchmark",
    )
    scenario: Literal["class", "domain", "task"] | None = setting(
        None,
        "What is known when a prediction is made: all classes (class), classes that all tasks share (domain), or also "
        "the task (task). By default domain where all tasks have the same labels, else class.",
        panel="Data",
        example="domain",
    )
    tasks: list[str] | None = setting(
        None, "Tasks to take, in this order; by default all.", panel="Data", example="agnews,amazon,yelp"
    )
    name: str | None = setting(
        None,
        "Name of the stream in reports; by default from its source.",
        panel="Data",
        option="--stream-name",
        example="reviews",
    )
    split_by: str | None = setting(
        None,
        "Divide one labelled data set into tasks: `class` for tasks of new classes, or a column, every value of which "
        "becomes a task.",
        panel="Data",
        example="class",
    )
    classes_per_task: int | None = setting(
        None,
        "Classes of a task with --split-by class, or of a benchmark that is divided by class, instead of the published "
        "number.",
        panel="Data",
        example="10",
    )
    test_share: float = setting(
        0.2,
        "Share to hold out for testing where a data set to be divided has no test split (stratified).",
        panel="Data",
        example="0.3",
    )
    train_limit: int | None = setting(
        None, "At most so many training examples a task (stratified).", panel="Data", example="1000", gt=0
    )
    test_limit: int | None = setting(
        None, "At most so many test examples a task (stratified).", panel="Data", example="500", gt=0
    )
    validation_share: float = setting(
        0.0,
        "Evaluate on this share of the training data instead of the test data, to choose settings with.",
        panel="Evaluation",
        option="--validation",
        example="0.2",
        ge=0,
        lt=1,
    )
    seed: int = setting(
        0, "Decides which examples limits and splits take.", panel="Data", option="--stream-seed", example="1"
    )
    order_seed: int | None = setting(
        None,
        "Shuffle the tasks with this seed; with --split-by class, the classes before they are dealt to tasks.",
        panel="Data",
        example="3",
    )
    columns: dict[str, str] | None = setting(
        None,
        "What columns are called in your files: theirs=ours. Needed are label and text (perhaps text_pair), or image; "
        "prompt and response, or messages, for language models.",
        panel="Data",
        example="sentence=text,category=label",
    )
    relabel: dict[str, str | None] | None = setting(
        None,
        "New label texts, old=new, so that tasks that say the same in other words share their classes; rows of a label "
        "that becomes null are left out.",
        panel="Data",
        example="'very positive=positive,neutral=null'",
    )
    pose: Literal["instruction", "chat", "published", "language"] | None = setting(
        None,
        "For language models: turn texts and labels into prompts and responses, by this template; into turns of a "
        "conversation (chat); or learn texts without labels as they are (language).",
        panel="Data",
        example="instruction",
    )
    training: dict[str, dict[str, Any]] | None = setting(
        None,
        "Training settings of single tasks, over those of the run.",
        panel="Training",
        option="--set-task",
        example="'news={num_train_epochs: 5}'",
    )
    metric: str | dict[str, str] | None = setting(
        None,
        "For free texts: score generated answers by exact_match, rouge_l, token_f1, contains, or your own "
        "module:function, or responses by their likelihood; one for all tasks, or a mapping task=metric. Such tasks "
        "have no classes.",
        panel="Data",
        example="rouge_l",
    )
    responses: Literal["exact", "stripped"] = setting(
        "exact",
        "Keep responses of prompts as they are written, or take blanks around them away (stripped).",
        panel="Data",
        example="stripped",
    )
    mix: str | None = setting(
        None,
        "A file of generic examples (or a folder or Hub data set with a train split), of which a share is mixed into "
        "the training rows of every task of free texts.",
        panel="Data",
        example="generic.jsonl",
    )
    mix_share: float = setting(
        0.1,
        "With --mix: the share of a task's training rows that are generic.",
        panel="Data",
        example="0.2",
        gt=0,
        lt=1,
    )
    trust_remote_code: bool = setting(
        False,
        "Refused: data sets that come with code are not supported.",
        panel="Data",
        commands=(),
    )
    drift: DriftConfig | None = None

    def load(self, learned: Collection[str] = ()) -> Stream:
        """The stream; with a validation share, measured on that instead of the test data.

        Args:
            learned: tasks that the run has learned, whose data may be gone.

        Raises:
            StreamError: see `load_stream`.
        """
        from ..streams import load_stream

        stream = load_stream(**self.model_dump(exclude={"drift"}), learned=learned)
        return stream.on_validation() if self.validation_share else stream

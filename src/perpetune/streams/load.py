"""`load_stream`: the one door through which data comes in."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..core.errors import ConfigError, StreamError, nearest
from ..core.paths import local_path
from .benchmarks import BENCHMARKS
from .build import build_task, choose_scenario, same_inputs
from .builtin import BUILTINS
from .folder import choose, read_folder, task_folders
from .formats import FORMATS, read_hub, read_split, split_files
from .free_texts import Responses, as_free_texts, metrics_of, stripped
from .mixing import SHARE, mixed
from .origin import Origin
from .prompting import Template, as_texts
from .prompting import pose as posed
from .relabel import in_one_form, relabelled, warn_of_drafts
from .sampling import shuffled
from .splitting import divide, slug
from .task import Scenario, Stream


def load_stream(
    source: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] | None = None,
    scenario: Scenario | None = None,
    tasks: Sequence[str] | None = None,
    name: str | None = None,
    split_by: str | None = None,
    classes_per_task: int | None = None,
    test_share: float = 0.2,
    train_limit: int | None = None,
    test_limit: int | None = None,
    validation_share: float = 0.0,
    seed: int = 0,
    order_seed: int | None = None,
    columns: Mapping[str, str] | None = None,
    relabel: Mapping[str, str | None] | None = None,
    pose: Template | None = None,
    training: Mapping[str, Mapping[str, Any]] | None = None,
    metric: str | Mapping[str, str] | None = None,
    responses: Responses = "exact",
    mix: str | os.PathLike[str] | None = None,
    mix_share: float = SHARE,
    learned: Collection[str] = (),
    trust_remote_code: bool = False,
) -> Stream:
    """Load tasks, and check once everything that the rest of the library takes for granted.

    Args:
        source: one of
            a built-in name (see `BUILTINS`; wins over a folder of that name, which is then `./name`);
            a published benchmark (see `BENCHMARKS`; wins in the same way), read from the folder `data`;
            a folder of task folders, each with `train.*`, `test.*` and perhaps `validation.*` as JSONL, CSV, Parquet
            or image folders (`train/<label>/*.png`), and perhaps `task.json` with name, labels, instruction and
            training;
            one labelled dataset to be divided with `split_by`: a folder or file of the same formats, or a Hub id
            `owner/name` or `owner/name:configuration`.
        data: the folder with the files of a published benchmark; without it, from the Hub where that is possible.
        scenario: "class", "domain" or "task"; by default "domain" if there are several tasks and all have the same
            labels, else "class".
        tasks: which tasks, in which order: `Task.name`, folder names or the names in task.json, in any case. By default
            all, folders in natural order (week-2 before week-10).
        name: of the stream; by default from the source.
        split_by: "class" for tasks of new classes, or a column whose every value becomes a task.
        classes_per_task: for `split_by="class"`, and for benchmarks that are divided by class, instead of the published
            number; the last task takes what is left.
        test_share: what to split off, stratified and seeded, where a dataset to be divided has no test split.
        train_limit, test_limit: at most so many rows a task, stratified and seeded, drawn independently of the other
            tasks; `test_limit` caps test and validation data.
        validation_share: what to split off the training data (before `train_limit`) of tasks that bring no validation
            data, stratified and seeded. Every class keeps a training row.
        seed: of caps and splits.
        order_seed: shuffle the tasks; with `split_by="class"`, the classes before they are dealt to tasks.
        columns: new names of columns, {"sentence": "text"}. Needed are `label` and `text`, `text` and `text_pair`,
            or `image`, or `image` and `caption`; for language models `prompt` and `response`, with `image` or without,
            or `messages` (lists of {role, content}, the last of which is the answer). Paths of images start where the
            file is.
        pose: make instructions of texts to be classified, by this template: "instruction", "chat" or "published"; or
            learn texts without labels as they are: "language"; see `pose`.
        relabel: new label texts, {"very positive": "positive", "neutral": None}: tasks that say the same in other words
            share their classes; rows of a label that becomes None are left out.
        training: settings of single tasks, {"news": {"num_train_epochs": 5}}: over those of their task.json, and over
            those of the run.
        metric: of tasks whose responses are free texts, how generated answers are scored (see `metrics.text`): one for
            all, or {"faq": "rouge_l"}; over that of their task.json. Such tasks have no classes.
        responses: "exact" keeps responses of prompts as they are written; "stripped" takes blanks around them away.
        mix: a file of generic examples, or a folder or Hub id with a train split: of all training rows of a task,
            `mix_share` are drawn from there; see `mixed`.
        learned: tasks of a folder that a run has learned, whose data may have been deleted since: what is missing is
            empty, and named in `Task.gone`.
        trust_remote_code: must be False: data sets that come with code are not supported.

    Returns:
        The stream. Classes are numbered in order of first appearance; within a task in the order of task.json, or of a
        ClassLabel column, or sorted. `source` holds the arguments that load the same stream again.

    Raises:
        StreamError: the data is missing, malformed or contradicts itself.
        ConfigError: an argument has an impossible value.
    """
    given = dict(locals())  # the arguments, and nothing else yet
    defaults = load_stream.__kwdefaults__ or {}
    for option, default in defaults.items():
        if given[option] == default:
            del given[option]
    _check(scenario, tasks, classes_per_task, test_share, train_limit, test_limit, validation_share, trust_remote_code)
    given.pop("learned", None)  # of a run, not of the stream
    text = os.fspath(source)
    path = local_path(text)
    benchmark = BENCHMARKS.get(text)
    read_as = as_texts(columns, pose)
    folder = None if data is None else local_path(data).resolve()
    _check_benchmark(text, folder, [o for o in ("split_by", "columns", "test_share") if o in given])
    own = benchmark.options if benchmark is not None else {}
    own = {option: value for option, value in own.items() if option not in given and value != defaults[option]}
    if own:
        return load_stream(**given, **own, learned=learned)
    local = text not in BUILTINS and benchmark is None and path.exists()
    split_by = BUILTINS[text].split_by if text in BUILTINS and split_by is None else split_by
    if benchmark is not None:
        drafts = benchmark.read(folder, classes_per_task, tasks)
    elif split_by is None:
        if not path.is_dir():
            raise _no_source(path, text)
        drafts = read_folder(path, tasks, read_as, learned)
    else:
        classes_per_task, splits, origins = _dataset(path, text, split_by, classes_per_task, seed, test_share)
        drafts = divide(
            splits,
            path.name if local else text,
            split_by=split_by,
            classes_per_task=classes_per_task,
            test_share=test_share,
            seed=seed,
            order_seed=order_seed,
            columns=read_as,
            folder=(path if path.is_dir() else path.parent) if local else None,
            origins=origins,
        )
        own_metrics = BUILTINS[text].metrics if text in BUILTINS else {}
        drafts = [replace(draft, metric=own_metrics.get(draft.name)) for draft in drafts]
        names = [draft.name for draft in drafts]
        drafts = [drafts[i] for i in choose(tasks, names, [set()] * len(names), text)]
    drafts = in_one_form(drafts)
    if relabel:
        drafts = relabelled(drafts, relabel)
    warn_of_drafts(drafts)
    if order_seed is not None and split_by != "class":
        drafts = shuffled(drafts, order_seed)

    inputs = same_inputs(drafts)
    labels: dict[str, int] = {}
    made = tuple(
        build_task(
            draft,
            labels,
            train_limit=train_limit,
            test_limit=test_limit,
            validation_share=validation_share,
            seed=seed,
        )
        for draft in drafts
    )
    made = tuple(replace(task, training={**task.training, **(training or {}).get(task.name, {})}) for task in made)
    unknown = sorted(set(training or {}) - {task.name for task in made})
    if unknown and tasks is None:
        raise StreamError(f"training: no task `{unknown[0]}`: {nearest(unknown[0], [task.name for task in made])}")
    texts: tuple[str, ...] = tuple(labels)
    if metrics := metrics_of(made, metric):
        made, texts = as_free_texts(made, texts, metrics)
    if mix is not None:
        made = mixed(made, mix, mix_share, seed, read_as)
    scenario = choose_scenario(scenario, made, texts)
    given.update(source=str(path.resolve()) if local else text, scenario=scenario, tasks=[task.name for task in made])
    if split_by != "class":  # the order stands in `tasks` now
        given.pop("order_seed", None)
    if folder is not None:
        given["data"] = str(folder)
    if not {"prompt", "messages"}.isdisjoint(inputs):  # streams that do not say it are stripped
        given["responses"] = responses
    if mix is not None:
        place = local_path(mix)
        given["mix"] = str(place.resolve()) if place.exists() else str(mix)
    for option, mapping in (("columns", columns), ("relabel", relabel), ("training", training)):
        if mapping:
            given[option] = dict(mapping)
    if isinstance(metric, Mapping):
        given["metric"] = dict(metric)
    if name is None:
        name = slug((path.resolve().stem if path.is_file() else path.resolve().name) if local else text)
    ordered = not (local and split_by is None and tasks is None and order_seed is None)
    stream = Stream(name, made, texts, scenario, inputs, given, ordered)
    stream = stripped(stream) if responses == "stripped" else stream
    return stream if pose is None else posed(stream, pose)


def _check(
    scenario: str | None,
    tasks: Sequence[str] | None,
    classes_per_task: int | None,
    test_share: float,
    train_limit: int | None,
    test_limit: int | None,
    validation_share: float,
    trust_remote_code: bool,
) -> None:
    if trust_remote_code:
        raise ConfigError("perpetune never runs code that comes with a dataset: leave trust_remote_code out")
    if scenario not in (None, "class", "domain", "task"):
        raise ConfigError(f"no scenario `{scenario}`: {nearest(str(scenario), ('class', 'domain', 'task'))}")
    if isinstance(tasks, str) or (tasks is not None and not tasks):
        raise ConfigError("tasks must be a list of at least one task name")
    counts = {"classes_per_task": classes_per_task, "train_limit": train_limit, "test_limit": test_limit}
    for option, count in counts.items():
        if count is not None and (not isinstance(count, int) or count < 1):
            raise ConfigError(f"{option} must be a whole number above 0, not {count!r}")
    if not 0 < test_share < 1:
        raise ConfigError(f"test_share must lie between 0 and 1, not {test_share!r}")
    if not 0 <= validation_share < 1:
        raise ConfigError(f"validation_share must be at least 0 and below 1, not {validation_share!r}")


def _check_benchmark(source: str, folder: Path | None, fixed: Sequence[str]) -> None:
    if source not in BENCHMARKS and folder is not None:
        raise ConfigError(f"`data` is for a published benchmark, and `{source}` is none: {nearest(source, BENCHMARKS)}")
    if source in BENCHMARKS and fixed:
        raise ConfigError(f"the tasks of the benchmark `{source}` are fixed: leave {' and '.join(fixed)} out")


def _dataset(
    path: Path, text: str, split_by: str, classes_per_task: int | None, seed: int, test_share: float
) -> tuple[int | None, Mapping[str, Dataset], Mapping[str, Origin]]:
    """(classes per task, splits, where their rows are from) of a built-in, a file, a folder or a dataset of the Hub."""
    if text in BUILTINS:
        builtin = BUILTINS[text]
        if split_by != builtin.split_by or (classes_per_task and split_by != "class"):
            raise ConfigError(f"the built-in `{text}` is split by {builtin.split_by}: leave split_by out")
        return classes_per_task or builtin.classes_per_task, builtin.splits(seed, test_share), {}
    if split_by == "class" and classes_per_task is None:
        raise ConfigError('split_by="class" needs classes_per_task')
    if path.is_dir():
        files = split_files(path)
        if not files and task_folders(path):
            raise StreamError(f"{path} is a folder of tasks already: leave split_by out")
        files = files or {"train": [path]}  # images in one folder a label
    elif path.is_file():
        if path.suffix.lower() not in FORMATS:
            raise StreamError(f"cannot read {path}: known formats are {', '.join(FORMATS)}")
        files = {"train": [path]}
    elif re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?", text):
        return classes_per_task, read_hub(text), {}
    else:
        raise _no_source(path, text)
    read = {split: read_split(paths, f"the {split} split of `{path.name}`") for split, paths in files.items()}
    splits = {split: data for split, (data, _) in read.items()}
    return classes_per_task, splits, {split: origin for split, (_, origin) in read.items()}


def _no_source(path: Path, text: str) -> StreamError:
    if path.exists():
        return StreamError(
            f"{path} is a file: put it into a folder of task folders, as TASK/train{path.suffix} with test rows in "
            f'TASK/test{path.suffix}; or, if it holds all tasks, say how to divide it, split_by="class" with '
            "classes_per_task or a column"
        )
    if path.parent != Path(".") and path.parent.is_dir():
        beside = [child.name for child in path.parent.iterdir()]
        return StreamError(
            f"no folder {path}: " + (nearest(path.name, beside) if beside else f"{path.parent} is empty")
        )
    return StreamError(
        f"no stream `{text}`, neither a folder nor a built-in nor a benchmark: "
        f"{nearest(text, (*BUILTINS, *BENCHMARKS))} (a dataset on the Hub needs split_by)"
    )

"""The text streams of O-LoRA and N-LoRA: orders 1 to 3 of four tasks, orders 4 to 6 of fifteen."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ...core.errors import StreamError
from ..prompting import PUBLISHED
from ..rows import Rows
from ..splitting import Draft
from .base import Benchmark, Lazy, needed, not_divided, read_json, read_list, text_rows
from .cl_text_hub import from_hub

ORDERS: dict[int, tuple[str, ...]] = {
    number: tuple(tasks.split())
    for number, tasks in {
        1: "dbpedia amazon yahoo agnews",
        2: "dbpedia amazon agnews yahoo",
        3: "yahoo amazon agnews dbpedia",
        4: "mnli cb wic copa qqp boolqa rte imdb yelp amazon sst-2 dbpedia agnews multirc yahoo",
        5: "multirc boolqa wic mnli cb copa qqp rte imdb sst-2 dbpedia agnews yelp amazon yahoo",
        6: "yelp amazon mnli cb copa qqp rte imdb sst-2 dbpedia agnews yahoo multirc boolqa wic",
    }.items()
}

# (training rows, test rows) as published; 131 of MNLI's 7600 test rows have no label and are left out
SIZES: dict[str, tuple[int, int]] = {
    "yelp": (5000, 7600),
    "amazon": (5000, 7600),
    "imdb": (2000, 7600),
    "sst-2": (2000, 872),
    "agnews": (4000, 7600),
    "dbpedia": (14000, 7600),
    "yahoo": (10000, 7600),
    "mnli": (3000, 7469),
    "cb": (250, 56),
    "rte": (2000, 277),
    "qqp": (2000, 7600),
    "boolqa": (2000, 3270),
    "copa": (400, 100),
    "multirc": (2000, 4848),
    "wic": (2000, 638),
}

# what to decide, by kind of task, where the published wording does not lie beside the data
INSTRUCTIONS: dict[str, str] = {
    "SC": "Which of the options describes the sentiment of this text?",
    "TC": "Which of the options is the topic of this text?",
    "NLI": "Which of the options says how sentence 2 relates to sentence 1?",
    "QQP": "Do the first and the second sentence ask the same? Answer with one of the options.",
    "BoolQA": "Is the answer to the question, going by the passage, true or false? Answer with one of the options.",
    "MultiRC": "Is the candidate answer, going by the paragraph, right? Answer with one of the options.",
    "WiC": "Does the word mean the same in both sentences? Answer with one of the options.",
}

GET = (
    "Give the folder CL_Benchmark of the O-LoRA repository (github.com/cmnfriend/O-LoRA; N-LoRA has the same one): "
    "data=PATH/TO/CL_Benchmark, which holds TASK/DATASET/{train,test,labels}.json; copies often lack the large files. "
    "The published wording of the instructions is taken from configs/instruction_config.json beside that folder, "
    "if it is there"
)


def _instructions(data: Path | None) -> dict[str, str]:
    """Kind of task -> what to decide, as published where the user's copy says it."""
    path = data.resolve().parent / "configs" / "instruction_config.json" if data else None
    if path is None or not path.is_file():
        return INSTRUCTIONS
    try:
        return {kind: entries[0]["instruction"].strip() for kind, entries in read_json(path).items() if entries}
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise StreamError(f'{path} must map kinds of tasks to lists of {{"instruction": text}}') from error


def _read(folder: Path, name: str) -> dict[str, Rows]:
    """Train and test; dev.json is the same file as test.json, so it is no validation data and not read."""
    needed(*(folder / f"{file}.json" for file in ("train", "test", "labels")))
    options = read_json(folder / "labels.json")
    if not isinstance(options, list) or not options:
        raise StreamError(f"{folder / 'labels.json'} must hold one JSON list of label texts")
    splits = {}
    for split in ("train", "test"):
        rows = read_list(folder / f"{split}.json", "sentence", "label")
        if name == "mnli":  # "-": the annotators did not agree, and no answer is right
            rows = [row for row in rows if row[1] != "-"]
        strange = sorted({label for _, label in rows} - set(options))
        if strange:
            raise StreamError(f"label `{strange[0]}` in {folder / split}.json is not in labels.json: {options}")
        texts, labels = zip(*rows, strict=True) if rows else ((), ())
        splits[split] = text_rows(texts, labels, options, f"the {split} split of task `{name}`")
    return splits


def _drafts(number: int, data: Path | None, classes_per_task: int | None) -> list[Draft]:
    not_divided(f"cl-order-{number}", classes_per_task)
    instructions, drafts = _instructions(data), []
    for name in ORDERS[number]:
        kind, folder = PUBLISHED[name]
        if data is not None:
            splits = Lazy(partial(_read, data / kind / folder, name))
        else:
            splits = Lazy(partial(from_hub, name, SIZES[name]))
        drafts.append(Draft(name, splits, instruction=instructions.get(kind)))
    return drafts


CL_TEXT = tuple(
    Benchmark(
        name=f"cl-order-{number}",
        summary=f"{'standard CL benchmark' if number < 4 else 'long sequence'}, order {number}: {', '.join(tasks)}",
        paper="2310.14152",
        get=GET,
        drafts=partial(_drafts, number),
        sizes={name: SIZES[name] for name in tasks},
    )
    for number, tasks in ORDERS.items()
)

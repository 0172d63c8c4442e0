"""Prompts and answers: TRACE, and the two task orders of SuperNI that SAPT published."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Value

from ...core.errors import StreamError
from ..passage import mark
from ..rows import Rows, open_rows
from ..sampling import generator
from ..splitting import Draft, slug
from .base import Benchmark, Lazy, MissingData, needed, not_divided, read_json, read_list

SEED = 0
TRACE_TASKS = ("C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten")
TRACE_GET = (
    "Give the folder of TRACE (github.com/BeyonderXX/TRACE links to its data): data=PATH/TO/LLM-CL-Benchmark_5000, "
    'which holds TASK/{train,eval,test}.json, lists of {"prompt", "answer"}'
)

SUPERNI_ORDERS: dict[int, tuple[str, ...]] = {
    1: (
        "task1572_samsum_summary",
        "task363_sst2_polarity_classification",
        "task1290_xsum_summarization",
        "task181_outcome_extraction",
        "task002_quoref_answer_generation",
        "task1510_evalution_relation_extraction",
        "task639_multi_woz_user_utterance_generation",
        "task1729_personachat_generate_next",
        "task073_commonsenseqa_answer_generation",
        "task1590_diplomacy_text_generation",
        "task748_glucose_reverse_cause_event_detection",
        "task511_reddit_tifu_long_text_summarization",
        "task591_sciq_answer_generation",
        "task1687_sentiment140_classification",
        "task875_emotion_classification",
    ),
    2: (
        "task748_glucose_reverse_cause_event_detection",
        "task073_commonsenseqa_answer_generation",
        "task1590_diplomacy_text_generation",
        "task639_multi_woz_user_utterance_generation",
        "task1572_samsum_summary",
        "task1687_sentiment140_classification",
        "task591_sciq_answer_generation",
        "task363_sst2_polarity_classification",
        "task1510_evalution_relation_extraction",
        "task1729_personachat_generate_next",
        "task181_outcome_extraction",
        "task511_reddit_tifu_long_text_summarization",
        "task002_quoref_answer_generation",
        "task1290_xsum_summarization",
        "task875_emotion_classification",
    ),
}
# (training rows with an answer, test rows) as published
SUPERNI_SIZES: dict[str, tuple[int, int]] = {
    **dict.fromkeys(SUPERNI_ORDERS[1], (1000, 100)),
    "task073_commonsenseqa_answer_generation": (975, 100),
    "task1572_samsum_summary": (160, 20),
    "task1590_diplomacy_text_generation": (126, 16),
    "task181_outcome_extraction": (338, 43),
    "task511_reddit_tifu_long_text_summarization": (994, 100),
    "task639_multi_woz_user_utterance_generation": (142, 18),
}
SUPERNI_GET = (
    "Give the folder CL_Benchmark of the SAPT repository (github.com/circle-hit/SAPT), which holds "
    "SuperNI/TASK/{train,test}.json, or Natural Instructions itself (github.com/allenai/natural-instructions), which "
    "holds tasks/TASK.json and is divided here with a seed of our own: data=FOLDER"
)


def prompt_rows(pairs: Iterable[tuple[str, ...]], place: str) -> Rows:
    """(prompt, answer) pairs as rows."""
    prompts, answers = zip(*pairs, strict=True)
    features = Features({"prompt": Value("string"), "response": Value("string")})
    data = Dataset.from_dict({"prompt": list(prompts), "response": list(answers)}, features=features)
    return open_rows(data, place)


def _trace_splits(folder: Path, task: str) -> dict[str, Rows]:
    needed(folder / "train.json", folder / "test.json")
    files = {"train": "train.json", "validation": "eval.json", "test": "test.json"}
    splits = {}
    for split, file in files.items():
        pairs = read_list(folder / file, "prompt", "answer") if (folder / file).exists() else []
        if pairs or split != "validation":
            splits[split] = _rows(pairs, split, slug(task), folder / file)
    return splits


def _rows(pairs: list[tuple[str, ...]], split: str, task: str, file: Path) -> Rows:
    if not pairs:
        raise StreamError(f"the {split} split of task `{task}` is empty: {file}")
    return prompt_rows(pairs, f"the {split} split of task `{task}`")


def _trace(data: Path | None, classes_per_task: int | None) -> list[Draft]:
    not_divided("trace", classes_per_task)
    if data is None:
        raise MissingData("no copy of TRACE on the Hub is known to be safe and complete")
    return [Draft(slug(task), Lazy(partial(_trace_splits, data / task, task))) for task in TRACE_TASKS]


def _instances(path: Path) -> list[tuple[str, ...]]:
    """(prompt, first answer) of the instances of a task file, without those whose answer is empty.

    The prompt is the zero-shot one of Super-NaturalInstructions (2204.07705); its `Input` may be cut.
    """
    task = read_json(path)
    try:
        definition = task["Definition"] if isinstance(task["Definition"], str) else task["Definition"][0]
        pairs: list[tuple[str, ...]] = []
        for instance in task["Instances"]:
            outputs = instance["output"]
            answer = outputs if isinstance(outputs, str) else outputs[0]
            prompt = (
                f"Definition: {definition.strip()}\n\nNow complete the following example -\n"
                f"Input: {mark(instance['input'])}\nOutput:"
            )
            if answer.strip():
                pairs.append((prompt, answer))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise StreamError(
            f'{path} is no task of Natural Instructions, with "Definition" and "Instances" of "input" and "output"'
        ) from error
    return pairs


def _superni_splits(folder: Path, task: str) -> dict[str, Rows]:
    """As SAPT divided it: its dev.json is the same file as test.json and not read."""
    train, test = folder / task / "train.json", folder / task / "test.json"
    needed(train, test)
    return {
        "train": _rows(_instances(train), "train", task, train),
        "test": _rows(_instances(test), "test", task, test),
    }


def _divided(file: Path, task: str) -> dict[str, Rows]:
    """As many rows as SAPT took: 100 or a tenth for the test data and for validation, 1000 of the rest to train."""
    needed(file)
    pairs = _instances(file)
    part = max(1, min(100, round(len(pairs) / 10)))
    order = generator(SEED, task).permutation(len(pairs))
    ends = {"test": slice(part), "validation": slice(part, 2 * part), "train": slice(2 * part, 2 * part + 1000)}
    return {
        split: _rows([pairs[i] for i in np.sort(order[ends[split]])], split, task, file)
        for split in ("train", "validation", "test")
    }


def _superni(number: int, data: Path | None, classes_per_task: int | None) -> list[Draft]:
    not_divided(_superni_name(number), classes_per_task)
    if data is None:
        raise MissingData("no copy of these tasks on the Hub is known to be safe and complete")
    whole, inner = (data / "tasks").is_dir(), data / "SuperNI" if (data / "SuperNI").is_dir() else data
    drafts = []
    for task in SUPERNI_ORDERS[number]:
        read = (
            partial(_divided, data / "tasks" / f"{task}.json", task) if whole else partial(_superni_splits, inner, task)
        )
        drafts.append(Draft(task, Lazy(read)))
    return drafts


def _superni_name(number: int) -> str:
    return "superni" if number == 1 else f"superni-order-{number}"


INSTRUCTIONS = (
    Benchmark(
        name="trace",
        summary=f"TRACE: {', '.join(TRACE_TASKS)}; exact match here, a metric a task as published",
        paper="2310.06762",
        get=TRACE_GET,
        drafts=_trace,
    ),
    *(
        Benchmark(
            name=_superni_name(number),
            summary=f"SuperNI as in SAPT, order {number}: 15 generation tasks; published by ROUGE-L",
            paper="2401.08295",
            get=SUPERNI_GET,
            drafts=partial(_superni, number),
            sizes=SUPERNI_SIZES,
        )
        for number in SUPERNI_ORDERS
    ),
)

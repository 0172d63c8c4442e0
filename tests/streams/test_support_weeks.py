"""The built-in weeks of free text."""

from __future__ import annotations

import json

from perpetune.metrics.text import exact_match
from perpetune.streams import Stream, fingerprint, load_stream
from perpetune.streams.support_weeks import METRICS, MONTHS


def asked(rows: object) -> list[str]:
    return [json.loads(talk)[-1]["content"] for talk in rows["messages"]]  # type: ignore[index]


def test_four_weeks_of_conversations_with_their_metrics() -> None:
    stream = load_stream("support-weeks")
    assert {task.name: task.metric for task in stream} == METRICS
    assert stream.inputs == ("messages",) and stream.modality == "language" and not stream.labels
    assert [(len(task.train), len(task.test)) for task in stream] == [(72, 24)] * 4


def test_no_test_question_is_a_training_question_and_every_fact_is_trained() -> None:
    stream = load_stream("support-weeks")
    trained = [question for task in stream for question in asked(task.train)]
    tested = [question for task in stream for question in asked(task.test)]
    assert not set(trained) & set(tested)
    assert len(set(tested)) == len(tested)
    for task in stream:
        if task.name != "week-3-orders":  # which is a format, and no list of facts
            assert set(task.test["response"]) <= set(task.train["response"])


def test_the_same_rows_every_time_and_only_orders_follow_the_seed() -> None:
    first, again = load_stream("support-weeks"), load_stream("support-weeks")
    other = load_stream("support-weeks", seed=1)

    def prints(stream: Stream) -> list[str]:
        return [str(fingerprint(task)) for task in stream]

    assert prints(first) == prints(again)
    same = [a == b for a, b in zip(prints(first), prints(other), strict=True)]
    assert same == [True, True, False, True]


def test_some_weeks_with_limits_load_again_with_their_metrics() -> None:
    stream = load_stream("support-weeks", tasks=["week-1-answers", "week-4-letters"], train_limit=24, test_limit=12)
    again = load_stream(**stream.source)
    for loaded in (stream, again):
        assert [task.metric for task in loaded] == ["exact_match", "rouge_l"]
        assert [len(task.train) for task in loaded] == [24, 24]
    assert set(stream.tasks[0].test["response"]) <= set(stream.tasks[0].train["response"])  # stratified by answer
    chosen = load_stream("support-weeks", metric="rouge_l")
    assert {task.metric for task in chosen} == {"rouge_l"}


def test_an_order_is_json_that_its_sentence_says() -> None:
    task = load_stream("support-weeks").tasks[2]
    for question, answer in zip(asked(task.train), task.train["response"], strict=True):
        order = json.loads(answer)
        month, day = order["due"].split(".")
        name = next(n for n, number in MONTHS.items() if number == int(month))
        assert order["item"] in question and f"{int(day)} {name}" in question and str(order["count"]) in question
    assert not exact_match(task.test["response"][0], task.test["response"][0].replace("kettle", "lamp"))

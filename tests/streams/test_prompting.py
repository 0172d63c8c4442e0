"""Texts posed as instructions, and streams of prompts and conversations."""

from __future__ import annotations

import json

import pytest

from perpetune import ConfigError, StreamError, load_stream
from perpetune.learning.config import StreamConfig
from perpetune.streams import fingerprint, load_again, pose
from perpetune.streams.passage import BEGIN, END, mark, unmark


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def bare(prompt):
    return unmark(prompt)[0]


@pytest.fixture
def news(tmp_path):
    rows = [{"text": " Cup final.\n", "label": "Sports"}, {"text": "Stocks fall.", "label": "Business"}]
    for split in ("train", "test"):
        write_jsonl(tmp_path / "stream/agnews" / f"{split}.jsonl", rows)
        write_jsonl(tmp_path / "stream/other" / f"{split}.jsonl", [{"text": "x", "label": "Sports"}])
    card = {"labels": ["World", "Sports", "Business"], "instruction": "What is the topic? Choose one."}
    (tmp_path / "stream/agnews/task.json").write_text(json.dumps(card))
    return tmp_path / "stream"


def test_a_text_becomes_an_instruction(news):
    stream = load_stream(news, pose="instruction")
    assert stream.inputs == ("prompt",) and stream.modality == "language"
    task = stream.tasks[0]
    assert [bare(p) for p in task.train["prompt"]] == [
        "What is the topic? Choose one.\nOptions: Sports, Business\nCup final.\nAnswer:",
        "What is the topic? Choose one.\nOptions: Sports, Business\nStocks fall.\nAnswer:",
    ]
    assert stream.label_texts(task.train["label"]) == ["Sports", "Business"]
    generic = "Choose the option that fits the following text.\nOptions: Sports\nx\nAnswer:"
    assert bare(stream.tasks[1].test["prompt"][0]) == generic


def test_the_published_template_names_the_dataset(news):
    stream = load_stream(news, tasks=["agnews"], pose="published")
    assert bare(stream.tasks[0].test["prompt"][1]) == (
        "Task:TC\nDataset:agnews\nWhat is the topic? Choose one.\nOption: Sports, Business \nStocks fall.\nAnswer:"
    )
    with pytest.raises(StreamError, match="published template has no name for task `other`"):
        load_stream(news, pose="published")


def test_the_passage_is_marked_and_what_comes_after_it_is_not(tmp_path):
    rows = [{"text": f"a {BEGIN}premise", "text_pair": "and a question?", "label": "yes"}]
    for split in ("train", "test"):
        write_jsonl(tmp_path / "s/t" / f"{split}.jsonl", rows)
    text, first, last = unmark(pose(load_stream(tmp_path / "s")).tasks[0].train["prompt"][0])
    assert text[first:last] == "a premise"
    assert text.endswith("Options: yes\na premise\nand a question?\nAnswer:") and END not in text


def test_marks():
    assert unmark("no mark at all") == ("no mark at all", 0, 14)
    assert unmark(f"a {mark('bc')} d") == ("a bc d", 2, 4)


def test_a_posed_stream_loads_again_and_another_template_is_other_data(news):
    stream = load_stream(news, tasks=["agnews"], pose="instruction")
    written = {"labels": stream.labels, "name": stream.name, "source": stream.source, "scenario": "class"}
    again = load_again({**written, "inputs": stream.inputs}, ["agnews"])
    assert fingerprint(again.tasks[0]) == fingerprint(stream.tasks[0])
    assert StreamConfig(source=str(news), tasks=["agnews"], pose="instruction").load().inputs == ("prompt",)
    other = load_stream(news, tasks=["agnews"], pose="published")
    assert fingerprint(other.tasks[0]) != fingerprint(stream.tasks[0])


def test_a_chat_pose_is_the_instruction_as_a_users_turn(news):
    chat, plain = load_stream(news, pose="chat"), load_stream(news, pose="instruction")
    assert chat.inputs == ("messages",) and chat.labels == plain.labels
    for task, other in zip(chat, plain, strict=True):
        ((turn,), *_) = [json.loads(talk) for talk in task.train["messages"]]
        assert turn["role"] == "user" and turn["content"] + "\nAnswer:" == other.train["prompt"][0]
        assert task.train["label"][:] == other.train["label"][:]
    assert load_stream(**chat.source).inputs == ("messages",)


def test_what_cannot_be_posed(news):
    with pytest.raises(StreamError, match="has images: only texts"):
        load_stream("digits", pose="instruction", train_limit=20, test_limit=20)
    with pytest.raises(StreamError, match="has prompts: only texts"):
        pose(load_stream(news, pose="instruction"))
    with pytest.raises(ConfigError, match="no template is called `publised`"):
        load_stream(news, pose="publised")


def write(folder, **splits):
    for split, rows in splits.items():
        write_jsonl(folder / "s/t" / f"{split}.jsonl", rows)
    return folder / "s"


def test_prompts_with_answers_of_their_own(tmp_path):
    rows = [{"prompt": f"What is {i} + 1?", "response": f" {i + 1}\n"} for i in range(3)]
    stream = load_stream(write(tmp_path, train=rows[:2], test=rows[2:]))
    assert stream.inputs == ("prompt",)
    # bytes stay, and an answer of the test data need not occur in training
    assert stream.labels == (" 1\n", " 2\n", " 3\n")
    assert stream.label_texts(stream.tasks[0].test["label"]) == [" 3\n"]
    assert load_stream(**{**stream.source, "responses": "stripped"}).labels == ("1", "2", "3")


def test_more_answers_than_classes_are_not_stratified_by(tmp_path):
    rows = [{"prompt": f"What is {i} + 1?", "response": str(i + 1)} for i in range(400)]
    source = write(tmp_path, train=rows, test=rows[:5])
    task = load_stream(source, train_limit=20, validation_share=0.1).tasks[0]
    assert len(task.train) == 20 and len(task.validation) == 40


def test_the_last_message_is_the_answer(tmp_path):
    talk = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "So long ")]
    rows = [{"messages": [{"role": r, "content": c} for r, c in talk]}]
    stream = load_stream(write(tmp_path, train=rows, test=rows))
    assert stream.inputs == ("messages",) and stream.modality == "language" and stream.labels == ("So long ",)
    before = json.loads(stream.tasks[0].train["messages"][0])
    assert [(m["role"], m["content"]) for m in before] == talk[:4]


def test_rows_without_an_answer_are_named(tmp_path):
    ask = [{"role": "user", "content": "Hi"}]
    with pytest.raises(StreamError, match="row 0 of the train split of task `t`: `messages` must be"):
        load_stream(write(tmp_path, train=[{"messages": ask}], test=[{"messages": ask}]))
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": " "}]
    with pytest.raises(StreamError, match="1 of 2 answers of .* are empty, the first is row 1"):
        load_stream(write(tmp_path, train=rows, test=rows))
    rows = [{"prompt": " ", "response": "b"}, {"prompt": "a", "response": "b"}]
    with pytest.raises(StreamError, match="1 of 2 prompts of .* are empty, the first is row 0"):
        load_stream(write(tmp_path, train=rows, test=rows))
    with pytest.raises(StreamError, match="no column `response`"):
        load_stream(write(tmp_path, train=[{"prompt": "a"}], test=[{"prompt": "a"}]))


def test_conversations_and_prompts_are_not_mixed(tmp_path):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    for task, row in (("a", {"prompt": "Hi", "response": "Hello"}), ("b", {"messages": talk})):
        (tmp_path / task).mkdir()
        for split in ("train", "test"):
            (tmp_path / task / f"{split}.jsonl").write_text(json.dumps(row))
    with pytest.raises(StreamError, match="write a prompt as a conversation"):
        load_stream(tmp_path)

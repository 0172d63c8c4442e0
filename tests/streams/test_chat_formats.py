"""Files as TRL and its users write them."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset

import perpetune as pt
from perpetune.core.errors import ConfigError, StreamError
from perpetune.streams import load_again
from perpetune.streams.conversations import Conversation
from perpetune.streams.free_texts import stripped

ASKED, SAID = "capital of France?", " Paris\n"
TALK = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]
FORMATS = {
    "messages": {"messages": TALK},
    "conversational completion": {"prompt": TALK[:1], "completion": TALK[1:]},
    "sharegpt": {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": SAID}]},
    "alpaca": {"instruction": ASKED, "input": "", "output": SAID},
}


def write(root, row, *, task="a", test=None, suffix="jsonl"):
    folder = root / task
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        rows = [row] if split == "train" or test is None else [test]
        if suffix == "parquet":
            Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
        else:
            (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return root


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_one_conversation_and_responses_keep_their_bytes(name, suffix, tmp_path):
    stream = pt.load_stream(write(tmp_path, FORMATS[name], suffix=suffix), metric="exact_match")
    (row,) = stream.tasks[0].train
    assert stream.inputs == ("messages",) and json.loads(row["messages"]) == TALK[:1] and row["response"] == SAID


def test_completion_is_the_response_of_a_prompt(tmp_path):
    stream = pt.load_stream(write(tmp_path, {"prompt": "sky", "completion": " is blue"}))
    assert stream.inputs == ("prompt",) and stream.labels == (" is blue",)


def test_sharegpt_may_name_its_system_and_columns_may_have_other_names(tmp_path):
    row = {"dialogue": FORMATS["sharegpt"]["conversations"], "system": "be brief"}
    stream = pt.load_stream(write(tmp_path, row), columns={"dialogue": "conversations"})
    assert json.loads(stream.tasks[0].train["messages"][0])[0] == {"role": "system", "content": "be brief"}


def test_tools_calls_and_parts_reach_the_template_as_they_are(tmp_path):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}]
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {}}}]}
    asked = {"role": "user", "content": [{"type": "text", "text": "how warm"}]}
    told = {"role": "tool", "name": "weather", "content": "20"}
    rows = {"messages": [asked, call, told, {"role": "assistant", "content": "20 degrees"}], "tools": tools}
    stream = pt.load_stream(write(tmp_path / "x", rows), metric="exact_match")
    talk = Conversation.read(stream.tasks[0].train["messages"][0])
    assert talk.settings == {"tools": tools} and talk.messages[0] == asked and talk.messages[2] == told
    assert talk.messages[1]["tool_calls"] == call["tool_calls"] and talk.answer is None
    last = pt.load_stream(write(tmp_path / "y", {"messages": [asked, call]}), metric="exact_match").tasks[0].train
    assert Conversation.read(last["messages"][0]).answer["tool_calls"] == call["tool_calls"]
    assert json.loads(last["response"][0]) == [{"name": "weather", "arguments": {}}]


@pytest.mark.parametrize(
    "row, said",
    [
        ({"messages": TALK[:1]}, "`messages` must be a list of {role, content}"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "`conversations` must be a list of"),
        ({"conversations": [{"from": "nobody", "value": "x"}]}, "`conversations` must be a list of"),
        ({"prompt": TALK[:1], "completion": TALK[:1]}, "`prompt` and `completion` must be a list of"),
        ({"messages": TALK, "tools": "no json"}, "`tools` must be a list of tools, or the JSON of it"),
    ],
)
def test_what_is_no_conversation_is_refused_by_file_and_row(row, said, tmp_path):
    with pytest.raises(StreamError, match="row 0 of the train split of task `a`: ") as raised:
        pt.load_stream(write(tmp_path, row))
    assert said in str(raised.value) and "train.jsonl, line 1" in str(raised.value)


def test_texts_that_answer_nothing(tmp_path):
    root = write(tmp_path, {"text": "a text of its own"}, test={"text": "another text"})
    with pytest.raises(StreamError, match="no column `label`"):
        pt.load_stream(root)
    stream = pt.load_stream(root, pose="language")
    (task,) = stream
    assert task.metric == "likelihood" and task.train["prompt"][:] == [""] and stream.labels == ()
    assert task.train["response"][:] == ["a text of its own"] and task.train["id"][0] != task.test["id"][0]
    again = pt.load_stream(**stream.source)
    assert pt.streams.fingerprint(again.tasks[0]) == pt.streams.fingerprint(task)


def test_streams_of_runs_that_say_nothing_are_stripped_as_they_were(tmp_path):
    root = write(tmp_path, {"prompt": "sky", "response": " blue "})
    stream = pt.load_stream(root)
    written = {
        "source": {k: v for k, v in stream.source.items() if k != "responses"},
        "labels": ["blue"], "name": "x", "scenario": "class", "inputs": ["prompt"],
    }  # fmt: skip
    assert stream.labels == (" blue ",) and load_again(written, ["a"]).labels == ("blue",)
    assert load_again({**written, "source": stream.source, "labels": [" blue "]}, ["a"]).labels == (" blue ",)
    free = stripped(pt.load_stream(root, metric="exact_match"))
    assert free.tasks[0].test["response"][:] == ["blue"]
    assert pt.load_stream(root, responses="stripped").source["responses"] == "stripped"


# ---- generic replay ----


def test_a_share_of_all_training_rows_is_generic(tmp_path):
    """m = round(n share / (1 - share)), behind the task's own rows, which stay as they are."""
    folder = tmp_path / "tasks" / "a"
    folder.mkdir(parents=True)
    rows = [{"prompt": f"p {i}", "response": f"r {i}"} for i in range(30)]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    generic = tmp_path / "generic.jsonl"
    generic.write_text("\n".join(json.dumps({"text": f"generic {i}"}) for i in range(7)), encoding="utf-8")

    def load(**options):
        return pt.load_stream(tmp_path / "tasks", metric="exact_match", **options).tasks[0]

    plain, mixed = load(), load(mix=generic, mix_share=0.25)
    m = round(30 * 0.25 / 0.75)
    assert len(mixed.train) == 30 + m and len(mixed.test) == 30
    assert mixed.train["id"][:30] == plain.train["id"][:] and mixed.train["prompt"][30:] == [""] * m
    drawn = mixed.train["response"][30:]
    assert len(set(drawn[:7])) == 7 and set(drawn[7:]) < set(drawn[:7])  # repeats once all are drawn
    assert mixed.train["id"][:] == load(mix=generic, mix_share=0.25).train["id"][:]
    assert drawn != load(mix=generic, mix_share=0.25, seed=1).train["response"][30:]
    with pytest.raises(ConfigError, match="responses of task `a` are classes"):
        pt.load_stream(tmp_path / "tasks", mix=generic)
    with pytest.raises(ConfigError, match="mix_share must lie between 0 and 1"):
        load(mix=generic, mix_share=1.0)

"""Images with prompts: where the pictures lie, which columns are read, and what is refused."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from perpetune import StreamError, load_stream
from perpetune.streams import fingerprint

RED, BLUE = (255, 0, 0), (0, 0, 255)
ROWS = [("what colour?", "red", RED), ("which?", "blue", BLUE)]


def encoded(colour):
    out = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(out, "PNG")
    return out.getvalue()


def write(folder, names=("image", "prompt", "response"), suffix=".jsonl"):
    """Tasks `a` and `b`, each with two rows a split whose pictures lie in `images/` beside the file."""
    for task in ("a", "b"):
        (folder / task / "images").mkdir(parents=True)
        for split in ("train", "test"):
            rows = []
            for i, (prompt, response, colour) in enumerate(ROWS):
                path = folder / task / "images" / f"{split}{i}.png"
                path.write_bytes(encoded(colour))
                rows.append(dict(zip(names, (f"images/{path.name}", f"{task} {prompt}", response), strict=True)))
            if suffix == ".csv":
                Dataset.from_list(rows).to_csv(folder / task / f"{split}.csv", index=False)
            else:
                (folder / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def check(stream):
    assert stream.inputs == ("image", "prompt") and stream.modality == "language"
    assert stream.labels == ("blue", "red")
    for task in stream:
        for data in (task.train, task.test):
            assert data.column_names == ["id", "label", "image", "prompt"]
            assert data["prompt"][:] == [f"{task.name} {prompt}" for prompt, _, _ in ROWS]
            assert [tuple(np.asarray(i.convert("RGB"))[0, 0]) for i in data["image"]] == [RED, BLUE]
            assert stream.label_texts(data["label"][:]) == ["red", "blue"]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_paths_of_images_start_where_the_file_is(tmp_path, suffix):
    check(load_stream(write(tmp_path, suffix=suffix)))


def test_questions_and_answers_by_other_names(tmp_path):
    names = {"picture": "image", "question": "prompt", "answer": "response"}
    check(load_stream(write(tmp_path, names), columns=names))


def test_one_file_of_several_tasks(tmp_path):
    write(tmp_path)
    rows = [json.loads(line) for task in "ab" for line in (tmp_path / task / "train.jsonl").read_text().splitlines()]
    for row, task in zip(rows, "aabb", strict=True):
        row |= {"image": f"{task}/{row['image']}", "kind": task}
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    check(load_stream(tmp_path, split_by="kind", tasks=["a", "b"]))


def test_images_in_parquet_files(tmp_path):
    for task in ("a", "b"):
        (tmp_path / task).mkdir()
        for split in ("train", "test"):
            columns = {"image": [encoded(colour) for _, _, colour in ROWS]}
            columns |= {"prompt": [f"{task} {prompt}" for prompt, _, _ in ROWS], "response": [r for _, r, _ in ROWS]}
            Dataset.from_dict(columns).to_parquet(tmp_path / task / f"{split}.parquet")
    check(load_stream(tmp_path))


def test_image_folders_with_metadata(tmp_path):
    for task in ("a", "b"):
        for split in ("train", "test"):
            (tmp_path / task / split).mkdir(parents=True)
            lines = []
            for i, (prompt, response, colour) in enumerate(ROWS):
                (tmp_path / task / split / f"{i}.png").write_bytes(encoded(colour))
                row = {"file_name": f"{i}.png", "prompt": f"{task} {prompt}", "response": response}
                lines.append(json.dumps(row))
            (tmp_path / task / split / "metadata.jsonl").write_text("\n".join(lines))
    check(load_stream(tmp_path))


def test_an_example_is_its_picture_and_its_prompt(tmp_path):
    one = load_stream(write(tmp_path / "one"))
    assert len(set(one.tasks[0].train["id"]) | set(one.tasks[1].train["id"])) == 4  # same pictures, other prompts
    (tmp_path / "one/a/images/train0.png").write_bytes(encoded((1, 1, 1)))
    two = load_stream(tmp_path / "one")  # the file of rows is the same, and so is its place in the cache
    assert fingerprint(one.tasks[0]) != fingerprint(two.tasks[0])
    assert fingerprint(one.tasks[1]) == fingerprint(two.tasks[1])


def test_answers_of_the_test_data_need_not_occur_in_training(tmp_path):
    write(tmp_path)
    path = tmp_path / "b/test.jsonl"
    path.write_text(path.read_text().replace('"blue"', '"a dark blue"'))
    assert "a dark blue" in load_stream(tmp_path).labels


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("images/train0.png", "images/none.png", "row 0 of the train split of task `a` holds no readable image"),
        ('"images/train0.png"', "null", "row 0 of the train split of task `a` has no image"),
        ('"red"', '" "', "1 of 2 answers of the train split of task `a` are empty"),
        ('"response"', '"answer"', "no column `response` in .*columns="),
        ('"prompt": "a what colour?", "response"', '"messages": "x", "answer"', "`messages` with images"),
    ],
)
def test_refused(tmp_path, old, new, message):
    path = write(tmp_path) / "a/train.jsonl"
    lines = path.read_text()
    assert old in lines
    if "messages" in new:
        lines = lines.replace("a which?", "a what colour?")
    path.write_text(lines.replace(old, new))
    with pytest.raises(StreamError, match=message):
        load_stream(tmp_path)

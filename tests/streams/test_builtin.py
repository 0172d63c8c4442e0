from __future__ import annotations

import numpy as np
import pytest

from perpetune.core.errors import ConfigError
from perpetune.streams import Stream, digits_halves, load_stream, scenes


def pixels(data: object) -> np.ndarray:
    return np.stack([np.asarray(image) for image in data["image"]])  # type: ignore[index]


def test_the_halves_are_disjoint_and_stratified() -> None:
    a, b = digits_halves()
    assert len(a.images) == 898 and len(b.images) == 899
    assert not {image.tobytes() for image in a.images} & {image.tobytes() for image in b.images}
    assert np.abs(np.bincount(a.labels) - np.bincount(b.labels)).max() <= 1
    assert a.images.dtype == np.uint8 and a.images.max() == 255
    assert not np.array_equal(digits_halves(seed=1)[0].images, a.images)


@pytest.mark.parametrize("name", ["digits", "digits-transposed", "digits-drift"])
def test_no_stream_shows_an_image_of_the_pretraining_half(name: str) -> None:
    stream = load_stream(name, seed=3)
    seen = {image.tobytes() for image in digits_halves()[0].images}
    if name == "digits-transposed":
        seen = {image.T.tobytes() for image in digits_halves()[0].images}
    assert not any(image.tobytes() in seen for task in stream for image in pixels(task.train))
    sample = stream.tasks[0].train[0]
    assert sample["image"].mode == "L" and sample["image"].size == (8, 8)


def test_digits_come_in_five_tasks_of_two() -> None:
    stream = load_stream("digits")
    assert stream.scenario == "class" and stream.inputs == ("image",) and stream.modality == "image"
    assert [task.classes for task in stream] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert sum(len(task.train) + len(task.test) for task in stream) == 899
    for task in stream:
        assert not set(task.train["id"]) & set(task.test["id"])
        assert set(task.train["label"]) == set(task.test["label"]) == set(task.classes)


def test_transposed_digits_are_the_upright_ones_transposed() -> None:
    for task, other in zip(load_stream("digits"), load_stream("digits-transposed"), strict=True):
        np.testing.assert_array_equal(pixels(task.test).transpose(0, 2, 1), pixels(other.test))


def test_a_scene_holds_its_digit_whole_and_faint_pieces_of_others() -> None:
    images = digits_halves()[1].images[:40]
    shown = scenes(images, 0)
    assert shown.shape == (40, 16, 16) and shown.dtype == np.uint8
    places = set()
    for image, scene in zip(images, shown, strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(scene, (8, 8))
        (top, left), *others = np.argwhere((windows == image).all((2, 3)))
        assert not others
        places.add((int(top), int(left)))
        around = scene.copy()
        around[top : top + 8, left : left + 8] = 0
        assert around.max() <= 127  # half the ink
    assert len(places) > 20
    np.testing.assert_array_equal(shown, scenes(images, 0))
    assert not np.array_equal(shown, scenes(images, 1))


def test_clutter_shows_the_transposed_digits_of_the_stream_half() -> None:
    stream = load_stream("digits-clutter")
    assert [task.classes for task in stream] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert stream.tasks[0].train[0]["image"].size == (16, 16)
    own = {image.T.tobytes() for image in digits_halves()[1].images}
    for scene in pixels(stream.tasks[0].test):
        windows = np.lib.stride_tricks.sliding_window_view(scene, (8, 8)).reshape(-1, 64)
        assert any(window.tobytes() in own for window in windows)


def test_drift_shows_the_same_digits_under_conditions() -> None:
    stream = load_stream("digits-drift")
    assert stream.scenario == "domain"
    assert [task.name for task in stream] == ["clean", "noisy", "faint", "inverted", "turned"]
    clean, noisy, faint, inverted, turned = (pixels(task.test) for task in stream)
    np.testing.assert_array_equal(inverted, 255 - clean)
    np.testing.assert_array_equal(turned, np.rot90(clean, axes=(1, 2)))
    assert np.ptp(faint) < 64 and np.abs(noisy.astype(int) - clean).max() > 64
    labels = [task.test["label"][:] for task in stream]
    assert all(each == labels[0] for each in labels)
    for task in stream:
        assert task.classes == tuple(range(10)) and not set(task.train["id"]) & set(task.test["id"])


def test_the_seed_divides_and_the_order_seed_deals() -> None:
    first, second = load_stream("digits", seed=0), load_stream("digits", seed=1)
    assert set(first.tasks[0].test["id"]) != set(second.tasks[0].test["id"])
    dealt = load_stream("digits", order_seed=1)
    assert [task.name for task in dealt] != [task.name for task in first]
    assert dealt.labels != first.labels and sorted(dealt.labels) == sorted(first.labels)

    # a digit's images are divided the same way whichever digits share its task
    def zeros(stream: Stream) -> set[str]:
        return {
            i for t in stream for i, y in zip(t.test["id"], t.test["label"], strict=True) if stream.labels[y] == "0"
        }

    assert zeros(dealt) == zeros(first)


def test_a_builtin_cannot_be_divided_otherwise() -> None:
    assert len(load_stream("digits", classes_per_task=5)) == 2
    with pytest.raises(ConfigError, match="`digits` is split by class"):
        load_stream("digits", split_by="domain")
    with pytest.raises(ConfigError, match="`digits-drift` is split by domain"):
        load_stream("digits-drift", classes_per_task=2)

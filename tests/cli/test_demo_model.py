"""The demo's model and the pre-training behind it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from perpetune.cli import demo_model
from perpetune.cli.demo_model import DIGITS
from perpetune.core.errors import ModelError
from perpetune.models.loading import load_backbone
from perpetune.models.pretraining import augment, pretrain_vit
from perpetune.streams import digits_halves

SHORT = replace(DIGITS, epochs=2)
demo_vit = partial(demo_model.demo_vit, views=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return demo_vit(tmp_path_factory.mktemp("cache"), settings=SHORT, progress=False)


def test_loads_as_a_plain_transformers_folder(folder):
    from transformers import AutoImageProcessor, AutoModel

    model, loading = AutoModel.from_pretrained(folder, add_pooling_layer=False, output_loading_info=True)
    assert not any(loading.values()), loading
    pixels = AutoImageProcessor.from_pretrained(folder)(images=[Image.new("RGB", (16, 16))], return_tensors="pt")
    assert model(**pixels).last_hidden_state.shape == (1, 17, 64)
    assert load_backbone(folder, "image").width == 64


def test_same_bits_every_time_whatever_surrounds_it(folder, tmp_path):
    torch.manual_seed(99)
    before, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        again = demo_vit(tmp_path, settings=SHORT, progress=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.name == folder.name
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    other = demo_vit(tmp_path, settings=replace(SHORT, seed=1), progress=False)
    assert other != again and (other / "model.safetensors").read_bytes() != (again / "model.safetensors").read_bytes()


def test_a_cached_model_is_not_made_again(folder, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("made again")

    monkeypatch.setattr(demo_model, "pretrain_vit", never)
    assert demo_vit(folder.parent, settings=SHORT) == folder
    monkeypatch.setenv("PERPETUNE_CACHE", str(folder.parent))
    assert demo_vit(settings=SHORT) == folder


def test_an_interrupted_one_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_model.PretrainedViT, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo_vit(tmp_path, settings=replace(SHORT, epochs=1), progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_faster_of_two_processes_wins(folder, tmp_path, monkeypatch):
    import shutil

    def slow(self, aside):
        shutil.copytree(folder, tmp_path / name)  # meanwhile, another process
        (aside / "pretraining.json").write_text("{}")

    short = replace(SHORT, epochs=1)
    name = demo_vit(tmp_path / "elsewhere", settings=short, progress=False).name
    monkeypatch.setattr(demo_model.PretrainedViT, "save", slow)
    made = demo_vit(tmp_path, settings=short, progress=False)
    assert (made / "model.safetensors").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["elsewhere", made.name])


def test_an_unwritable_cache_says_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="set PERPETUNE_CACHE"):
        demo_vit(tmp_path / "file" / "cache", settings=SHORT, progress=False)


def test_finds_and_names_digits_that_it_never_saw():
    folder = demo_vit(settings=replace(DIGITS, rotations=False, epochs=6), views=4, progress=False)
    facts = json.loads((folder / "pretraining.json").read_text(encoding="utf-8"))
    assert facts["train_images"] + facts["held_out_images"] == 898
    assert facts["held_out_accuracy"] > 0.35  # chance is 0.1


def test_no_image_of_a_stream_is_seen():
    first, second = digits_halves()
    seen = {hashlib.sha256(image.tobytes()).digest() for image in first.images}
    assert not any(hashlib.sha256(image.tobytes()).digest() in seen for image in second.images)
    assert len(first.images) == 898 and len(second.images) == 899


def test_turned_pictures_are_classes_of_their_own():
    settings = replace(DIGITS, noise=0)
    x, y = torch.rand(64, 3, 8, 8), torch.arange(64)
    turned, target = augment(x, y, settings, torch.Generator().manual_seed(0))
    assert set((target % 4).tolist()) == {0, 1, 2, 3} and torch.equal(target // 4, y)
    for before, after, k in zip(x, turned, target % 4, strict=True):
        assert torch.equal(after, before.rot90(int(k), (1, 2)))


def test_a_shift_moves_the_picture_and_repeats_its_border():
    settings = replace(DIGITS, rotations=False, shift=2.0, noise=0)
    ramp = torch.arange(8.0).expand(200, 1, 8, 8)  # the column's number in every pixel
    moved, _ = augment(ramp, torch.zeros(200), settings, torch.Generator().manual_seed(0))
    by = moved[:, 0, :, 3] - 3  # inside, a ramp moved is a ramp plus a constant
    torch.testing.assert_close(by, by[:, :1].expand(-1, 8), atol=1e-4, rtol=0)
    assert by.abs().max() <= 2.0 + 1e-4 and by.min() < -1.5 and by.max() > 1.5
    assert moved.min() >= 0 and moved.max() <= 7 + 1e-4


def test_the_saved_processor_repeats_what_was_trained_on(tmp_path):
    draw = np.random.default_rng(0)
    # large, thin, one-bit strokes on white: resized with antialiasing, normalised by their own mean and deviation
    images = [Image.fromarray(draw.random((105, 105)) > 0.05) for _ in range(8)]
    settings = replace(DIGITS, image_size=28, patch_size=7, epochs=1, rotations=False)
    steps: list[int] = []
    vit = pretrain_vit(images, [0, 1] * 4, settings, advance=steps.append)
    assert sum(steps) == settings.steps(8) == 1
    vit.save(tmp_path)
    backbone = load_backbone(tmp_path, "image")
    pixels = backbone._pixels(images)
    assert pixels.shape == (8, 3, 28, 28)
    assert abs(pixels.mean()) < 1e-2 and abs(pixels.std() - 1) < 1e-2
    with torch.no_grad():
        torch.testing.assert_close(backbone(pixel_values=pixels), vit.model(pixels).last_hidden_state[:, 0])
    assert os.listdir(tmp_path) and not list(tmp_path.glob("*.bin"))

"""The fingerprint of a base model is computed once, and again where a file or a weight has changed."""

from __future__ import annotations

import os

import pytest
import torch

from perpetune.models import fingerprint as fp
from perpetune.models.loading import load_backbone


@pytest.fixture
def folder(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.setenv("PERPETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fp, "LEAST", 1)
    return tiny_bert(width=16, layers=1)


@pytest.fixture
def hashed(monkeypatch):
    """How many models were hashed whole."""
    done, computed = [], fp.computed
    monkeypatch.setattr(fp, "computed", lambda model: done.append(1) or computed(model))
    return done


def load(folder):
    with fp.loaded_from(str(folder)):
        return load_backbone(folder, "text")


def test_a_second_start_reads_no_weights_for_it(folder, hashed):
    first, second = load(folder), load(folder)
    assert first.fingerprint == second.fingerprint == fp.computed(first.model) and len(hashed) == 2  # once by the test
    assert not first.weights_changed()
    with fp.forgotten():
        assert load(folder).fingerprint == first.fingerprint
    assert len(hashed) == 4  # `weights_changed` looks at the weights, and so does what is told to forget


@pytest.mark.parametrize("what", ["time", "size", "random weights"])
def test_what_changed_is_hashed_again(what, folder, hashed):
    load(folder)
    file = folder / "model.safetensors"
    if what == "time":
        about = file.stat()
        os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns + 1))
        load(folder)
    elif what == "size":
        (folder / "other.bin").write_bytes(b"1")
        load(folder)
    else:  # as a pooler that is in no file
        with fp.loaded_from(str(folder)):
            model = load_backbone(folder, "text").model
            torch.nn.init.normal_(model.encoder.layer[0].output.dense.weight)
            fp.fingerprint(model)
    assert len(hashed) == 2


def test_a_cache_that_cannot_be_read_or_written_costs_time_alone(folder, hashed, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "fingerprints.json").write_text("{ cut short")
    assert load(folder).fingerprint == load(folder).fingerprint and len(hashed) == 1
    (tmp_path / "cache" / "fingerprints.json").unlink()
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_text("a file is in the way")
    assert load(folder).fingerprint == load(folder).fingerprint and len(hashed) == 3


def test_small_models_and_models_in_memory_are_hashed_at_once(folder, hashed, monkeypatch, tmp_path):
    monkeypatch.setattr(fp, "LEAST", 2**40)
    load(folder), load(folder)
    load_backbone(folder, "text")
    assert len(hashed) == 3 and not (tmp_path / "cache").exists()

"""What is uploaded to the Hub, and how errors are told: without a network."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

import perpetune as pt
from perpetune.operations.publish import push_to_hub
from tests.calling import call


class FakeApi:
    """Notes what is asked of the Hub; raises `error` instead, where there is one."""

    error: Exception | None = None
    asked: list = []

    def create_repo(self, repo_id, **settings):
        if self.error is not None:
            raise self.error
        self.asked.append(("create", repo_id, settings))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, **settings):
        self.asked.append(("upload", settings.pop("repo_id"), settings))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "asked", [])
    return FakeApi


def test_a_repository_is_private_unless_said_otherwise(hub, tmp_path):
    assert push_to_hub(tmp_path, "me/weekly") == "https://huggingface.co/me/weekly"
    (_, name, made), (_, other, sent) = hub.asked
    assert name == other == "me/weekly" and made["private"] is True and made["exist_ok"] is True
    assert sent["folder_path"] == str(tmp_path) and "token" not in sent  # the usual place
    push_to_hub(tmp_path, "me/weekly", private=False)
    assert hub.asked[2][2]["private"] is False


def test_what_is_uploaded_names_the_base_model_and_no_place(hub, tmp_path, monkeypatch):
    base, sent = str(tmp_path / "models" / "ours"), {}
    for name, key in (("week/adapter_config.json", "base_model_name_or_path"), ("routes.json", "base_model")):
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).write_text(json.dumps({key: base, "r": 8}), encoding="utf-8")

    def upload(self, folder_path, **settings):
        sent.update({p.name: json.loads(p.read_text(encoding="utf-8")) for p in Path(folder_path).rglob("*.json")})

    monkeypatch.setattr(FakeApi, "upload_folder", upload)
    push_to_hub(tmp_path / "a", "me/weekly")
    told = {"adapter_config.json": {"base_model_name_or_path": "ours", "r": 8}}
    told["routes.json"] = {"base_model": "ours", "r": 8}
    assert sent == told
    assert base in (tmp_path / "a" / "routes.json").read_text(encoding="utf-8")  # here it loads


def refused(status):
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError(f"Client error {status}\n\nmore about it", response=response)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (refused(401), pt.RunError, "log in with a token that may write"),
        (refused(403), pt.RunError, "log in with a token that may write"),
        (refused(500), pt.RunError, "Client error 500.*see that there is a connection"),
        (LocalTokenNotFoundError("no token"), pt.RunError, "log in"),
        (OfflineModeIsEnabled("offline"), pt.RunError, "unset HF_HUB_OFFLINE"),
        (HfHubHTTPError.__bases__[0]("no route"), pt.RunError, "is written, and not on the Hub as `me/x`.*connection"),
        (HFValidationError("Repo id must be alphanumeric"), pt.ConfigError, "is no name of a repository"),
    ],
)
def test_errors_are_a_line(error, kind, message, hub, monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "error", error)
    with pytest.raises(kind, match=message) as told:
        push_to_hub(tmp_path, "me/x")
    assert "\n" not in str(told.value)


def test_the_command_writes_then_uploads(hub, word_stream, tiny_bert, tmp_path, monkeypatch, capsys):
    run, out = tmp_path / "r", tmp_path / "m"
    training = {"max_steps": 1, "per_device_train_batch_size": 8}
    stream = pt.load_stream(word_stream, tasks=["films"], train_limit=8, test_limit=4)
    heads = ["linear", {"type": "ridge", "features": 0, "regularisation": 1.0}]
    pt.Learner(tiny_bert(), "lora", run, heads=heads, training=training).learn(stream)
    options = ["--out", out, "--push-to-hub", "me/weekly", "--public", "--head", "ridge"]
    code, printed, err = call(monkeypatch, capsys, "export", run, *options)
    assert code == 0 and printed.splitlines()[-1] == "https://huggingface.co/me/weekly", err
    assert "its head `ridge` lies beside it" in printed
    assert hub.asked[0][2]["private"] is False and hub.asked[1][2]["folder_path"] == str(out)
    assert (out / "README.md").is_file()
    code, _, err = call(monkeypatch, capsys, "export", run, "--out", out, "--head", "rigde")
    assert code == 2 and "did you mean `ridge`" in err and err.count("\n") == 1
    code, _, err = call(monkeypatch, capsys, "export", run, "--out", out, "--head", "ridge", "--no-head")
    assert code == 2 and "give one of them" in err
    monkeypatch.setattr(hub, "error", refused(403))
    code, _, err = call(monkeypatch, capsys, "export", run, "--out", out, "--push-to-hub", "me/weekly")
    line = err.splitlines()[-1]  # below the bars of transformers
    assert code == 2 and line.startswith(f"perpetune: {out} is written") and "hf auth login" in line

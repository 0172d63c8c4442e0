"""The command line of vLLM, and what it would refuse."""

from __future__ import annotations

import argparse
import json
import shlex

import pytest

import perpetune as pt
from perpetune.operations.serve import as_shell, vllm_command
from tests.calling import call


def adapters(folder, count=2, rank=8, modality="language", **config):
    """An export as far as the server's command line looks at it."""
    names = [f"week-{i}" for i in range(count)]
    for name in names:
        (folder / name).mkdir(parents=True)
        written = {"peft_type": "LORA", "r": rank, "lora_alpha": 32, "bias": "none", "task_type": "CAUSAL_LM", **config}
        (folder / name / "adapter_config.json").write_text(json.dumps(written))
        (folder / name / "adapter_model.safetensors").write_bytes(b"")
    told = {"modality": modality, "base_model": "Qwen/Qwen2.5-0.5B"}
    told["adapters"] = [{"name": name, "folder": name} for name in names]
    (folder / "routes.json").write_text(json.dumps(told))
    return folder


def parsed(line):
    """A command line as vLLM's documentation describes it: its options, their kinds and choices."""
    words = shlex.split(line.replace("\\\n", " "))
    assert words[:2] == ["vllm", "serve"]
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("model_tag")
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--max-lora-rank", type=int, choices=[1, 8, 16, 32, 64, 128, 256, 320, 512], default=16)
    parser.add_argument("--max-loras", type=int, default=1)
    parser.add_argument("--max-cpu-loras", type=int)
    parser.add_argument("--lora-modules", nargs="+")
    return parser.parse_args(words[2:])


@pytest.mark.parametrize(("count", "rank", "taken"), [(1, 4, 8), (3, 16, 16), (2, 24, 32), (20, 300, 512)])
def test_the_options_hold_what_is_served(count, rank, taken, tmp_path):
    folder = adapters(tmp_path / "a", count, rank)
    found = parsed(as_shell(vllm_command(tmp_path, folder)))
    assert (found.model_tag, found.enable_lora, found.max_lora_rank) == ("Qwen/Qwen2.5-0.5B", True, taken)
    assert found.max_loras == min(count, 8) and found.max_cpu_loras == (count if count > 8 else None)
    assert found.lora_modules == [f"week-{i}={folder / f'week-{i}'}" for i in range(count)]


def test_odd_paths_are_quoted_or_written_as_json(tmp_path):
    folder = adapters(tmp_path / "my a=b, c", 1)
    (module,) = parsed(as_shell(vllm_command(tmp_path, folder, "my base"))).lora_modules
    assert json.loads(module) == {"name": "week-0", "path": str(folder / "week-0")}
    spaced = adapters(tmp_path / "an export", 1)
    found = parsed(as_shell(vllm_command(tmp_path, spaced, "/models/my base")))
    assert found.lora_modules == [f"week-0={spaced / 'week-0'}"] and found.model_tag == "/models/my base"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 513}, "rank 513, and vLLM serves at most 512"),
        ({"modality": "text"}, "is of an encoder: load its adapters with peft"),
        ({"use_dora": True}, r"does not serve adapter `week-0` \(use_dora\)"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "does not serve"),
        ({"peft_type": "IA3"}, r"\(IA3\)"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "encoder-decoder"),
    ],
)
def test_what_vllm_would_refuse_is_refused_here(settings, message, tmp_path):
    folder = adapters(tmp_path / "a", **settings)
    with pytest.raises(pt.ConfigError, match=message):
        vllm_command(tmp_path, folder)


def test_the_command_serves_what_export_wrote(word_stream, tiny_lm, tmp_path, monkeypatch, capsys):
    stream = pt.load_stream(word_stream, tasks=["films", "news"], pose="instruction", train_limit=8, test_limit=4)
    training = {"max_steps": 1, "per_device_train_batch_size": 4}
    run = tmp_path / "r"
    pt.Learner(tiny_lm("llama"), "nlora", run, training=training).learn(stream)
    code, _, err = call(monkeypatch, capsys, "serve-config", run)
    line = err.splitlines()[-1]  # below the bars of transformers
    assert (
        code == 2 and line.startswith("perpetune: ") and f"perpetune export {run} --format adapters --out {run}" in line
    )
    options = ["--format", "adapters", "--cumulative", "--out", run / "adapters"]
    code, out, err = call(monkeypatch, capsys, "export", run, *options)
    assert code == 0 and "after-films (rank 8), all (rank 16)" in out, err
    code, out, _ = call(monkeypatch, capsys, "serve-config", run, "--model", "Qwen/Qwen2.5-0.5B")
    found = parsed(out)
    assert code == 0 and (found.max_lora_rank, found.max_loras, found.model_tag) == (16, 2, "Qwen/Qwen2.5-0.5B")
    assert found.lora_modules == [f"{name}={run / 'adapters' / name}" for name in ("after-films", "all")]

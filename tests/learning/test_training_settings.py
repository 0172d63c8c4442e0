"""Every name of TrainingArguments works, is the run's own, or is refused with a reason before anything is trained."""

from __future__ import annotations

import inspect
import re
from importlib.util import find_spec

import pytest
import torch
import yaml
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from perpetune import ConfigError, Learner, TrainingError, load_stream
from perpetune.heads import LinearHead
from perpetune.learning.trainer import train_task
from perpetune.learning.training_settings import DEFAULTS, HONOURED, OURS, REFUSED, check_training, resolve_training
from perpetune.models.loading import load_backbone, load_language_model
from perpetune.tuners import as_tuner

NAMES = set(inspect.signature(TrainingArguments.__init__).parameters) - {"self"}
FAST = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 0.01}


def test_every_name_is_in_one_list():
    lists = (HONOURED, set(OURS), set(REFUSED))
    assert NAMES | {"head_learning_rate"} <= set().union(*lists)
    assert sum(map(len, lists)) == len(set().union(*lists))


@pytest.mark.parametrize("name", sorted({*REFUSED, *OURS} & NAMES))
def test_what_has_no_effect_is_refused_with_the_reason(name):
    with pytest.raises(ConfigError) as told:
        resolve_training({name: 1})
    assert name in str(told.value) and "\n" not in str(told.value)
    assert (REFUSED.get(name) or f"--{OURS[name]}") in str(told.value)


@pytest.fixture(scope="module")
def stream(word_stream):
    return load_stream(word_stream, tasks=["films", "news"], train_limit=8, test_limit=4)


@pytest.fixture(scope="module")
def texts(tiny_bert):
    return load_backbone(tiny_bert(), "text")


@pytest.fixture(scope="module")
def images(tiny_vit):
    return load_backbone(tiny_vit(), "image")


def told(backbone, **settings):
    try:
        check_training(resolve_training(settings), backbone)
    except ConfigError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


@pytest.mark.parametrize("value", [o.value for o in OptimizerNames])
def test_an_optimizer_works_or_says_what_it_needs(texts, value):
    found = told(texts, optim=value)
    if value in ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"):
        assert not found
    elif "xla" in value or "npu" in value:
        assert value in found
    elif find_spec("bitsandbytes") and re.search("^ademamix|bnb|lion|^paged|^adamw_8bit", value):
        assert not found
    else:
        assert f"`{value}`" in found and ("pip install" in found or "is not supported: " in found)


@pytest.mark.parametrize("value", [s.value for s in SchedulerType])
def test_a_schedule_is_made_beforehand(texts, value):
    given = {
        "cosine_with_min_lr": {"min_lr": 1e-5},
        "cosine_warmup_with_min_lr": {"min_lr": 1e-5},
        "warmup_stable_decay": {"num_decay_steps": 2},
    }.get(value)
    if value in ("greedy", "reduce_lr_on_plateau"):
        assert "all tasks are evaluated after every task" in told(texts, lr_scheduler_type=value)
    elif given:
        assert f"`{value}`" in told(texts, lr_scheduler_type=value)
    if value not in ("greedy", "reduce_lr_on_plateau"):
        assert not told(texts, lr_scheduler_type=value, lr_scheduler_kwargs=given)
        assert "nothing" in told(texts, lr_scheduler_type=value, lr_scheduler_kwargs={"nothing": 1})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"report_to": "wandb"}, "pip install wandb"),
        ({"report_to": ["mlflow"]}, "pip install mlflow"),
        ({"report_to": "wand"}, "did you mean `wandb`"),
        ({"lr_scheduler_type": "cosin"}, "cosin is not a valid SchedulerType"),
        ({"optim": "adam"}, "adam is not a valid OptimizerNames"),
        ({"dataloader_persistent_workers": True}, "persistent_workers"),
        ({"adam_beta1": 2}, "Invalid beta"),
        ({"report_to": [1]}, "report_to: there is no `1`: known are: "),
        ({"report_to": {}}, "report_to: there is no `{}`: known are: "),
        ({"report_to": [["wandb"]]}, "report_to: there is no `['wandb']`: "),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "leave it out"),
    ],
)
def test_what_a_constructor_would_refuse_is_refused_before(texts, settings, expected):
    assert expected in told(texts, **settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"weight_decay": "much"}, "`weight_decay` must be a number, 0 or above, not 'much'"),
        ({"learning_rate": -1}, "`learning_rate` must be a number, 0 or above"),
        ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps` must be a whole number above 0"),
        ({"per_device_train_batch_size": 2.5}, "whole number above 0, not 2.5"),
        ({"num_train_epochs": True}, "`num_train_epochs` must be a number above 0"),
        ({"learning_rte": 1}, "did you mean `learning_rate`"),
        ({"learning_rate": True}, "`learning_rate` must be a number"),
        ({"max_steps": 0}, "`max_steps` must be a whole number above 0"),
        ({"neftune_noise_alpha": -1}, "`neftune_noise_alpha` must be a number, 0 or above"),
        ({"warmup_ratio": 0.1}, "use warmup_steps, where a number below 1"),
        ({"group_by_length": True}, "use train_sampling_strategy: group_by_length"),
        ({"early_stopping_patience": 3}, "has no `early_stopping_patience`: choose num_train_epochs"),
    ],
)
def test_a_value_of_another_kind_is_named(settings, expected):
    with pytest.raises(ConfigError, match=expected):
        resolve_training(settings)


NO_NUMBERS = [float("nan"), float("inf"), -float("inf")]
COUNTED = [
    "max_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "sdft",
]
WHOLE = ["dataloader_num_workers", "dataloader_prefetch_factor", "save_total_limit", "torch_empty_cache_steps"]
FRACTIONS = ["num_train_epochs", "stm", "learning_rate", "adam_epsilon", "logging_steps", "save_steps", "warmup_steps"]


@pytest.mark.parametrize("name", [*COUNTED, *WHOLE, *FRACTIONS])
def test_what_is_no_number_is_refused(name):
    for wrong in [*NO_NUMBERS, *([] if name in FRACTIONS else [1.5])]:
        with pytest.raises(ConfigError, match=rf"`{name}`.*{wrong}"):
            resolve_training({name: wrong})


@pytest.mark.parametrize("name", [*COUNTED, *WHOLE])
def test_a_whole_number_in_any_form_is_one(name):
    for given in (2, 2.0, "2", "2e0"):
        found = resolve_training({name: given})[name]
        assert found == 2 and type(found) is int


def test_a_batch_that_is_dropped_is_refused(tiny_bert, stream, tmp_path):
    settings = {"dataloader_drop_last": True, "per_device_train_batch_size": 64}
    with pytest.raises(ConfigError, match="drops the only batch of a task of 8 examples"):
        Learner(tiny_bert(), "lora", tmp_path / "run", training=settings).learn(stream)


def test_what_is_for_texts_is_refused_for_images(images):
    assert "reads images" in told(images, neftune_noise_alpha=5)
    assert "for texts" in told(images, train_sampling_strategy="group_by_length")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator has fp16")
def test_half_precision_needs_an_accelerator(texts):
    assert "needs an accelerator" in told(texts, fp16=True)
    assert not told(texts, bf16=True)


@pytest.mark.parametrize("wrong", [{"optim": "lomo"}, {"lr_scheduler_type": "cosine_with_min_lr"}])
def test_a_run_is_refused_before_it_writes_anything(tiny_bert, stream, tmp_path, wrong):
    with pytest.raises(ConfigError):
        Learner(tiny_bert(), "lora", tmp_path / "run", training={**FAST, **wrong}).learn(stream)
    assert not (tmp_path / "run").exists()


def test_a_run_made_with_what_had_no_effect_opens(tiny_bert, stream, tmp_path):
    learner = Learner(tiny_bert(), "lora", tmp_path / "run", training=FAST)
    learner.learn(stream)
    config = tmp_path / "run" / "run.yaml"
    held = yaml.safe_load(config.read_text(encoding="utf-8"))
    held["training"]["save_steps"] = 1
    config.write_text(yaml.safe_dump(held, allow_unicode=True), encoding="utf-8")
    asked = ["good movie", "the market"]
    assert Learner.open(tmp_path / "run").predict(asked) == learner.predict(asked)


# ---- settings that act on the model ----


def trained(backbone, examples, labels=("a", "b"), rules=(), **settings):
    """The losses of a LoRA, and what it became."""
    torch.manual_seed(0)
    tuner = as_tuner(lora())
    base = backbone.model
    backbone.model = tuner.attach(base)
    head = LinearHead()
    head.open(backbone.width, list(labels), seed=0)
    head.begin_task(range(len(labels)))
    before = len(hooks(backbone))
    whole = resolve_training(FAST, settings)
    log = train_task(backbone, head, rules, examples, whole, task="t", seed=1, steps=6)
    tensors = tuner.tensors(backbone.model)
    assert len(hooks(backbone)) == before
    assert not any(getattr(m, "gradient_checkpointing", False) for m in backbone.model.modules())
    backbone.model = tuner.detach(backbone.model)
    return log, tensors


def lora():
    import peft

    return peft.LoraConfig(target_modules="query_value", r=2, init_lora_weights=False)


def hooks(backbone):
    return [h for m in backbone.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]


def first_examples(backbone, stream):
    return [{**e, "label": e["label"] % 2} for e in backbone.prepare(stream.tasks[0].train)]


def test_neftune_changes_what_is_trained_and_leaves_nothing_behind(texts, stream):
    examples = first_examples(texts, stream)
    plain, without = trained(texts, examples)
    log, noisy = trained(texts, examples, neftune_noise_alpha=5)
    again, same = trained(texts, examples, neftune_noise_alpha=5)
    assert log.last_loss != plain.last_loss and (log.last_loss, again.last_loss)[0] == again.last_loss
    assert any(not torch.equal(noisy[k], without[k]) for k in noisy)
    assert all(torch.equal(noisy[k], same[k]) for k in noisy)
    zero, none = trained(texts, examples, neftune_noise_alpha=0)
    assert all(torch.allclose(none[k], without[k], atol=1e-6) for k in none)


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.parametrize("kind", ["text", "image"])
def test_checkpointing_trains_the_same(texts, images, stream, tiny_vit, kind, name):
    if name not in NAMES:
        pytest.skip("this transformers does not know the name")
    if kind == "text":
        backbone, examples = texts, first_examples(texts, stream)
    else:
        backbone = images
        pixels = torch.randn(8, 3, 8, 8)
        examples = [{"pixel_values": p, "label": i % 2, "id": str(i)} for i, p in enumerate(pixels)]
    plain, without = trained(backbone, examples)
    calls = []
    layer = next(m for m in backbone.model.modules() if isinstance(m, GradientCheckpointingLayer))
    layer = next(layer.children())
    handle = layer.register_forward_pre_hook(lambda *a: calls.append(1))
    again, saved = trained(backbone, examples, **{name: True})
    handle.remove()
    assert len(calls) == 12  # of six steps: read once, and once more for the gradient
    assert again.first_loss == plain.first_loss and again.last_loss == pytest.approx(plain.last_loss, rel=1e-6)
    assert all(torch.allclose(saved[k], without[k], atol=1e-6) for k in saved)


@pytest.mark.parametrize("recipe", ["sequential_lora", "olora", "pegp_lora"])
@pytest.mark.parametrize("settings", [{"gradient_checkpointing": True}])
def test_rules_keep_their_promises_with_checkpointing(tiny_bert, stream, tmp_path, recipe, settings):
    folder = tiny_bert()
    found = []
    for i, more in enumerate(({}, settings)):
        learner = Learner(folder, recipe, tmp_path / str(i), training={**FAST, **more})
        result = learner.learn(stream)
        promised = [(g["source"], g["name"], g["holds"]) for g in result.guarantees]
        found.append((promised, learner.predict(["good movie", "the market", "a team"])))
    assert found[0] == found[1]


def test_neftune_on_a_language_model(tiny_lm, word_stream, tmp_path):
    stream = load_stream(word_stream, tasks=["films"], pose="instruction", train_limit=4, test_limit=2)
    losses = []
    for i, more in enumerate(({}, {"neftune_noise_alpha": 5}, {"gradient_checkpointing": True})):
        result = Learner(tiny_lm("qwen2"), "lora", tmp_path / str(i), training={**FAST, **more}).learn(stream)
        losses.append(next(e["last_loss"] for e in result.journal if e["event"] == "task"))
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[2], rel=1e-6)


def test_an_integration_is_called_and_writes_into_the_run(tiny_bert, stream, tmp_path, monkeypatch):
    logged = []

    class Recorder(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append((args.output_dir, args.run_name, sorted(logs)))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Recorder)
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["tensorboard"])
    training = {**FAST, "report_to": "tensorboard", "logging_steps": 1, "run_name": "mine"}
    Learner(tiny_bert(), "lora", tmp_path / "run", training=training).learn(stream)
    folders = {folder for folder, _, names in logged if "loss" in names}
    assert folders == {str(tmp_path / "run" / "logs" / task) for task in ("films", "news")}
    assert logged[0][1] == "mine" and {"loss", "learning_rate"} <= set(logged[0][2])


# ---- what training moves besides parameters ----


class Last(nn.Module):
    """The last norm of a ViT, and behind it a module with a state of its own."""

    def __init__(self, model, behind):
        super().__init__()
        self.norm, self.behind = model.layernorm, behind
        model.layernorm = self

    def forward(self, x):
        return self.behind(self.norm(x).transpose(1, 2)).transpose(1, 2)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        if self.training:
            self.seen += 1
        return x


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(32), nn.InstanceNorm1d(32, track_running_stats=True)])
def test_running_statistics_stay_what_pre_training_made_them(tiny_vit, norm):
    backbone = load_backbone(tiny_vit(), "image")
    nn.init.normal_(norm.running_mean)
    Last(backbone.model, norm)
    backbone.train()
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    examples = [{"pixel_values": p, "label": i % 2, "id": str(i)} for i, p in enumerate(torch.randn(8, 3, 8, 8))]
    old = backbone.features(examples, 8)
    trained(backbone, examples)
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.allclose(backbone.features(examples, 8), old)  # and its adapter is off again
    backbone.train()
    assert backbone.training and backbone.model.training and not norm.training


def test_a_state_that_nothing_keeps_is_refused(tiny_vit):
    backbone = load_backbone(tiny_vit(), "image")
    Last(backbone.model, Counting())
    examples = [{"pixel_values": p, "label": i % 2, "id": str(i)} for i, p in enumerate(torch.randn(4, 3, 8, 8))]
    with pytest.raises(TrainingError, match="`.*layernorm.behind.seen` of .* changes while the model trains"):
        trained(backbone, examples)


def test_the_defaults_are_honoured():
    assert set(DEFAULTS) <= HONOURED and resolve_training() == DEFAULTS


def test_a_language_model_in_training_mode_keeps_its_statistics(tiny_lm):
    model = load_language_model(tiny_lm("gpt2"))
    model.model.extra = nn.BatchNorm1d(4)
    assert not model.train().model.extra.training and model.model.training

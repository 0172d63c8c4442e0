"""Training settings: every name of `transformers.TrainingArguments`, and of TRL's
`SFTConfig` (`trainer_choice`), is honoured, set by the run, or refused by name."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, get_scheduler

from ..core.errors import ConfigError, first_line, nearest
from ..core.processes import launched
from ..core.validation import number
from ..models.backbone import Backbone
from . import trainer_choice as trl
from .checkpoints import SAVING, saving
from .class_weights import SETTING, checked
from .earlier_names import CALLED
from .self_distillation import SDFT, sdft_arguments, sdft_config
from .token_masking import STM
from .training_defaults import DEFAULTS
from .training_numbers import in_range

QUIET: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "logging_steps": 50}

_LENGTH = "per_device_train_batch_size num_train_epochs max_steps gradient_accumulation_steps dataloader_drop_last"
_STEP = (
    "learning_rate head_learning_rate class_weights weight_decay warmup_steps lr_scheduler_type lr_scheduler_kwargs "
    "sdft stm max_grad_norm optim optim_args optim_target_modules adam_beta1 adam_beta2 adam_epsilon "
    "neftune_noise_alpha"
)
_NUMBERS = "bf16 fp16 tf32 full_determinism torch_empty_cache_steps accelerator_config"
_MEMORY = (
    "activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs "
    "per_device_eval_batch_size"
)
_LOADING = (
    "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
    "dataloader_multiprocessing_context dataloader_in_order train_sampling_strategy"
)
_LOGGING = (
    "report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id logging_strategy "
    "logging_steps logging_first_step logging_nan_inf_filter log_level log_level_replica log_on_each_node disable_tqdm"
)
REPORTING = frozenset(_LOGGING.split())  # what trackers and terminals are told
HONOURED = frozenset(" ".join((_LENGTH, _STEP, _NUMBERS, _MEMORY, _LOADING, _LOGGING, *SAVING)).split())

# the run's own option for it
OURS = {"output_dir": "out", "seed": "seed", "data_seed": "seed", "use_cpu": "device"}

_REASONS = {
    "the head computes the loss": "label_smoothing_factor label_names",
    "it replaces parts of the model for good, so that a run that goes on is measured with others; TRL drops it": (
        "use_liger_kernel liger_kernel_config"
    ),
    "all tasks are evaluated after every task (evaluate_every)": (
        "eval_strategy eval_steps eval_delay eval_on_start eval_do_concat_batches eval_use_gather_object "
        "eval_accumulation_steps batch_eval_metrics include_for_metrics prediction_loss_only do_eval do_predict"
    ),
    "a task is trained for all of its steps, so that recipes are compared at one budget; choose num_train_epochs with "
    "--validation": "load_best_model_at_end metric_for_best_model greater_is_better",
    "a checkpoint inside a task (save_steps) holds all that it takes to go on to the same bits, for all processes": (
        "save_only_model save_on_each_node enable_jit_checkpoint"
    ),
    "a run that is started again goes on after its last finished task, or its last checkpoint (save_steps)": (
        "resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint do_train"
    ),
    "a run is exported as a folder, which you may upload (perpetune export)": (
        "push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision"
    ),
    "start the run with torchrun or accelerate launch; FSDP2 takes a loop of your own with perpetune.attach": (
        "fsdp fsdp_config deepspeed parallelism_config local_rank average_tokens_across_devices ddp_backend "
        "ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout"
    ),
    "tuners and rules hook into the model anew for every task, which compiled code does not follow": (
        "torch_compile torch_compile_backend torch_compile_mode"
    ),
    "features are read in the precision of the weights": "bf16_full_eval fp16_full_eval",
    "the batch size decides the number of steps, which rules count on": "auto_find_batch_size",
    "inputs are prepared by the backbone": "remove_unused_columns length_column_name include_num_input_tokens_seen",
    "training keeps no cache": "use_cache",
    "a loss that is not finite stops the task, and the error names its step": "debug",
    "the journal holds the peak of memory of every task": "skip_memory_metrics",
}
REFUSED = {name: reason for reason, names in _REASONS.items() for name in names.split()}

_OPTIMIZERS_REFUSED = {  # beginnings of names
    "lomo": "it changes weights while gradients are computed, where no rule can act",
    "adalomo": "it changes weights while gradients are computed, where no rule can act",
    "schedule_free": "its weights are averages of steps, for which no rule's promise holds",
    "reduce_lr_on_plateau": REFUSED["eval_strategy"],
    "greedy": REFUSED["eval_strategy"],
}
_PACKAGES = {  # parts of the names of optimizers, and of integrations: what has to be installed
    "bnb": "bitsandbytes", "adamw_8bit": "bitsandbytes", "lion": "bitsandbytes", "paged": "bitsandbytes",
    "ademamix": "bitsandbytes", "galore": "galore-torch", "apollo": "apollo-torch", "grokadamw": "grokadamw",
    "stable_adamw": "torch-optimi", "anyprecision": "torchdistx", "torch_4bit": "torchao", "torch_8bit": "torchao",
    "azure_ml": "azureml-mlflow", "comet_ml": "comet-ml", "flyte": "flytekit",
}  # fmt: skip


_OWN = ("head_learning_rate", SETTING, STM, SDFT)  # settings that are no one else's


def resolve_training(*layers: dict[str, Any]) -> dict[str, Any]:
    """Training settings: our defaults, then the recipe's, then the user's.

    Raises:
        ConfigError: a name that `transformers.TrainingArguments` does not have, one that has no effect here, or one
            that the run sets itself; or a number out of its range.
    """
    known = {*(f.name for f in fields(TrainingArguments) if f.init), *_OWN, *trl.HONOURED}
    ours, refused = {**OURS, **trl.OURS}, {**REFUSED, **trl.REFUSED}
    settings = dict(DEFAULTS)
    for layer in layers:
        for key, value in layer.items():
            if key in ours:
                raise ConfigError(f"`{key}` is set by the run: use its own option (--{ours[key]})")
            if key in refused:
                raise ConfigError(f"`{key}` has no effect here: {refused[key]}")
            if key not in known:
                near = CALLED.get(key) or nearest(key, (HONOURED | trl.HONOURED) & known)
                raise ConfigError(f"transformers.TrainingArguments has no `{key}`: {near}")
            if key not in HONOURED | trl.HONOURED:
                raise ConfigError(f"`{key}` is new in transformers, and not known to have an effect here: leave it out")
            settings[key] = number(value)
    if SETTING in settings and (weights := checked(settings.pop(SETTING))) is not None:
        settings[SETTING] = weights
    settings = in_range(settings)
    saving(settings)
    return settings


def training_arguments(
    settings: dict[str, Any], folder: str, seed: int, use_cpu: bool, by: trl.TrainerName, block: int | None = None
) -> TrainingArguments:
    """
    Args:
        by: "trl" makes them TRL's `SFTConfig`; block: see `sft_settings`.

    Raises:
        ConfigError: a value that TrainingArguments refuses.
    """
    own = {k: v for k, v in {**settings, **saving(settings)}.items() if k not in _OWN}
    with one_line(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind: type[TrainingArguments] = TrainingArguments
        if by == "trl":
            from trl import SFTConfig

            sdft = settings.get(SDFT)
            kind = sdft_config() if sdft else SFTConfig
            own = sdft_arguments(own, sdft) if sdft else trl.sft_settings(own, block)
        return kind(
            output_dir=folder,
            seed=seed,
            eval_strategy="no",
            remove_unused_columns=False,
            **{**QUIET, "dataloader_pin_memory": torch.accelerator.is_available(), "use_cpu": use_cpu, **own},
        )


def check_training(settings: dict[str, Any], backbone: Backbone, by: trl.TrainerName = "perpetune") -> None:
    """Before anything is trained or written: make once what training is made of, and throw it away.

    Raises:
        ConfigError: a value that is refused, settings that do not suit the model, or a package that is not installed.
    """
    check_optimizer(settings)
    on_cpu = next(backbone.model.parameters(), torch.empty(0)).device.type == "cpu"
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(settings, folder, 0, on_cpu, by, 1)
    if arguments.n_gpu > 1 and not hasattr(backbone.model, "hf_device_map"):
        raise ConfigError(
            f"{arguments.n_gpu} accelerators are visible to one process: start `torchrun --nproc-per-node "
            f"{arguments.n_gpu} -m perpetune.cli run ...`, or show one alone (CUDA_VISIBLE_DEVICES=0)"
        )
    _check_integrations(arguments)
    _check_model(arguments, backbone)
    with one_line(f"optim `{getattr(arguments.optim, 'value', arguments.optim)}`"):
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, backbone)  # type: ignore[arg-type]
        options = {k: v for k, v in options.items() if k not in ("params", "model", "optimizer_dict")}
        optimizer = kind([nn.Parameter(torch.zeros(2, 2))], **options)
    with one_line(f"lr_scheduler_type `{getattr(arguments.lr_scheduler_type, 'value', '')}`"):
        warmup, given = arguments.get_warmup_steps(100), arguments.lr_scheduler_kwargs
        if given and str(settings.get("lr_scheduler_type")).startswith("constant"):
            raise ValueError(f"it takes no lr_scheduler_kwargs ({', '.join(given)})")
        get_scheduler(arguments.lr_scheduler_type, optimizer, warmup, 100, given)  # type: ignore[arg-type]
    with one_line():
        names = ("num_workers", "persistent_workers", "prefetch_factor", "multiprocessing_context")
        DataLoader([0], **{name: getattr(arguments, f"dataloader_{name}", None) for name in names})  # type: ignore


def check_optimizer(settings: dict[str, Any]) -> None:
    """
    Raises:
        ConfigError: an optimizer or a schedule under which rules would not act.
    """
    for key in ("optim", "lr_scheduler_type"):
        value = str(settings.get(key, ""))
        reason = next((why for name, why in _OPTIMIZERS_REFUSED.items() if value.startswith(name)), None)
        if value.endswith("layerwise"):
            reason = "it has an optimizer for every layer, which rules cannot hang on"
        if reason:
            raise ConfigError(f"{key} `{value}` is not supported: {reason}")


def _check_integrations(arguments: TrainingArguments) -> None:
    from transformers.integrations import integration_utils as known

    for name in arguments.report_to or ():
        if not isinstance(name, str) or name not in known.INTEGRATION_TO_CALLBACK:
            raise ConfigError(f"report_to: there is no `{name}`: {nearest(name, known.INTEGRATION_TO_CALLBACK)}")
        if name not in known.get_available_reporting_integrations() and name != "flyte":
            raise ConfigError(f"report_to `{name}` needs a package: pip install {_PACKAGES.get(name, name)}")


def _check_model(arguments: TrainingArguments, backbone: Backbone) -> None:
    words = backbone.modality != "image" and backbone.network
    if arguments.neftune_noise_alpha is not None and not words:
        raise ConfigError("neftune_noise_alpha is noise on the embeddings of tokens, and this model reads images")
    if getattr(arguments, "activation_offloading", False) and not torch.accelerator.is_available():
        raise ConfigError("activation_offloading brings activations from an accelerator to the CPU: leave it out")
    if arguments.fp16 and not torch.accelerator.is_available():
        raise ConfigError("fp16 needs an accelerator: use bf16, or leave it out")
    if getattr(arguments, "train_sampling_strategy", "") == "group_by_length" and not words:
        raise ConfigError("train_sampling_strategy `group_by_length` is for texts: images all have one length")
    again = getattr(arguments, "activation_checkpointing", None) or arguments.gradient_checkpointing
    settings = getattr(arguments, "activation_checkpointing_kwargs", None) or arguments.gradient_checkpointing_kwargs
    if again and (settings or {}).get("use_reentrant"):  # type: ignore[union-attr]
        raise ConfigError("use_reentrant gives the tuned layers of a frozen model no gradient: leave it out")
    if again and not getattr(backbone.model, "supports_gradient_checkpointing", False):
        raise ConfigError(f"{type(backbone.model).__name__} does not support activation_checkpointing: leave it out")


@contextmanager
def one_line(what: str = "training settings") -> Iterator[None]:
    """What the code of others refuses, as a `ConfigError`; where it lacks a package, with the command that installs
    it."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # optimizers and schedulers raise what they like
        said = str(error).lower()
        lacking = isinstance(error, ImportError) or "install" in said or "not available" in said
        package = next((package for part, package in _PACKAGES.items() if part in what), None)
        mend = f": pip install {package}" if lacking and package and "pip install" not in said else ""
        raise ConfigError(f"{what}: {first_line(error)}{mend}") from error


def count_steps(examples: int, settings: dict[str, Any]) -> int:
    """Optimizer steps of one task with this many examples, of which every process takes a batch at a time.

    Raises:
        ConfigError: incomplete batches are dropped, and there is no other.
    """
    size = launched() * int(settings["per_device_train_batch_size"])
    if settings.get("dataloader_drop_last") and 0 < examples < size:
        raise ConfigError(
            f"dataloader_drop_last drops the only batch of a task of {examples} examples: leave it out, or set "
            f"per_device_train_batch_size to at most {examples // launched()}"
        )
    if settings.get("max_steps", -1) > 0:
        return int(settings["max_steps"])
    batches = -(-examples // size)
    per_epoch = max(1, -(-batches // int(settings.get("gradient_accumulation_steps", 1))))
    return max(1, int(-(-per_epoch * float(settings["num_train_epochs"]) // 1)))

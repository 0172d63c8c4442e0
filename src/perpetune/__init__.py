"""Continual fine-tuning of pre-trained models: learn one task after another, keep what the model knew."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Learner": "learning.learner",
    "Keep": "learning.keep",
    "Result": "runs.result",
    "Recipe": "recipes.recipe",
    "make_recipe": "recipes",
    "RECIPES": "recipes",
    "load_stream": "streams",
    "Drift": "streams",
    "drift": "streams",
    "learn_drift": "learning.task_free",
    "Detector": "routers",
    "pose": "streams",
    "Stream": "streams",
    "Task": "streams",
    "attach": "rules",
    "Rule": "rules",
    "Head": "heads",
    "Consolidation": "consolidation",
    "Router": "routers",
    "Tuner": "tuners",
    "TaskContext": "rules",
    "ProductL1": "rules",
    "FactorL1": "rules",
    "ReleasedProductL1": "rules",
    "OrthogonalToPast": "rules",
    "SubspaceProjection": "rules",
    "StepMask": "rules",
    "FixedMask": "rules",
    "RotationBall": "rules",
    "SoftOrthogonal": "rules",
    "InfLoRA": "rules",
    "WeightProjection": "rules",
    "Continue": "consolidation",
    "Merge": "consolidation",
    "Stack": "consolidation",
    "DeltaMerge": "consolidation",
    "SparseSum": "consolidation",
    "PerTask": "consolidation",
    "WeighedPerTask": "consolidation",
    "Concatenate": "consolidation",
    "ClassRouter": "routers",
    "KMeansRouter": "routers",
    "LDARouter": "routers",
    "OracleRouter": "routers",
    "PooledRouter": "routers",
    "RidgeRouter": "routers",
    "Replay": "consolidation",
    "Joint": "consolidation",
    "AllWeights": "tuners",
    "Frozen": "tuners",
    "NoNetwork": "tuners",
    "AdapterConfig": "tuners",
    "BiasConfig": "tuners",
    "DeepPromptConfig": "tuners",
    "FusedLoraConfig": "tuners",
    "GivensConfig": "tuners",
    "PrefixConfig": "tuners",
    "load_adapter": "tuners",
    "LinearHead": "heads",
    "LabelTextHead": "heads",
    "ContrastiveHead": "heads",
    "LanguageHead": "heads",
    "PrototypeHead": "heads",
    "RidgeHead": "heads",
    "SubspaceHead": "heads",
    "Measurement": "core.measurement",
    "PerpetuneError": "core.errors",
    "ConfigError": "core.errors",
    "StreamError": "core.errors",
    "ModelError": "core.errors",
    "RuleError": "core.errors",
    "HeadError": "core.errors",
    "DeltaError": "core.errors",
    "TrainingError": "core.errors",
    "RunError": "core.errors",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import: `perpetune --help` must not wait for them
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module `perpetune` has no attribute `{name}`")


def __dir__() -> list[str]:
    return sorted(__all__)

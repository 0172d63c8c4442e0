"""Where the change lives: peft's configurations, and what peft lacks."""

from .base import QUERY_VALUE, AllWeights, Frozen, NoNetwork, PeftTuner, Tuner, as_tuner

TUNERS = {c.__name__: c for c in (AllWeights, Frozen, NoNetwork)}

__all__ = ["QUERY_VALUE", "TUNERS", "AllWeights", "Frozen", "NoNetwork", "PeftTuner", "Tuner", "as_tuner"]

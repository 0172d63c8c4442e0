"""A run directory and a stream, brought together before anything is learned."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..core import processes
from ..core.environment import versions
from ..core.errors import ConfigError, RunError, StreamError
from ..core.files import plain
from ..core.processes import launched
from ..models.backbone import Backbone
from ..models.in_memory import DECIDED, InMemory
from ..models.precision import Loading
from ..recipes import make_recipe
from ..recipes.recipe import Recipe
from ..runs.commit import active, reverted
from ..runs.config_check import BATCH, together
from ..runs.config_file import CONFIG, read_config
from ..runs.directory import Run
from ..runs.result import JOINED, NO_READING
from ..streams import Stream
from .class_weights import SETTING, check_class_weights
from .config import RunConfig
from .general import general_of
from .gone_data import check_needed, completed, told, with_known_scenario
from .retry import set_aside
from .self_distillation import check_sdft
from .setup import Setup, task_settings
from .state import LearnerState
from .trainer_choice import OLD, check_trl_settings, settle, settled
from .training_defaults import DEFAULTS
from .training_settings import REFUSED, check_training


class Opened(NamedTuple):
    """
    Attributes:
        run: locked; stream: its classes numbered as always in this run, without the tasks that were taken out.
        state: after the newest commit.
        joined: predictions of the untouched model on tasks that joined the stream after the run's first commit.
    """

    run: Run
    stream: Stream
    state: LearnerState
    joined: dict[str, Tensor]


def folder_of(run: str | Path | None) -> tuple[Path, tempfile.TemporaryDirectory[str] | None]:
    """The run directory, the same in all processes; without one a temporary, which is there as long as its object.

    Raises:
        ConfigError: several processes, which a folder of the first one's alone would leave without their run.
    """
    if run is not None:
        return processes.from_first(Path(run)), None
    if processes.together() > 1:
        raise ConfigError("several processes train together: give `run`, a directory that all of them reach")
    temporary = tempfile.TemporaryDirectory()
    return Path(temporary.name), temporary


def going_on(config: RunConfig) -> dict[str, Any]:
    """Recipe and model of the run that is there already, where a configuration does not name them."""
    if config.out is None or not (Path(config.out) / CONFIG).is_file():
        return {}
    written = read_config(Path(config.out))
    recipe = {} if "recipe" in config.model_fields_set else {"recipe": written["recipe"]}
    return {**recipe, "model": config.model or written.get("model_name")}


def as_begun(made: Recipe, given: str | dict[str, Any] | Recipe, path: Path) -> Recipe:
    """The recipe of the run that goes on there, if an earlier version began it: where the recipe now has settings that
    the run does not know, and that are not `given`, the run keeps what it began with."""
    if isinstance(given, Recipe) or not (path / CONFIG).is_file():
        return made
    written = read_config(path)["recipe"]
    return make_recipe(written) if _same_but_new(written, plain(made.to_dict()), str(given)) else made


def _same_but_new(old: Any, new: Any, given: str) -> bool:
    """Whether all that `old` says is said by `new`, and what else `new` says is not given."""
    if isinstance(old, dict) and isinstance(new, dict):
        known = all(name in new and _same_but_new(value, new[name], given) for name, value in old.items())
        return known and not any(name in given for name in new.keys() - old.keys())
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return all(_same_but_new(a, b, given) for a, b in zip(old, new, strict=True))
    return bool(old == new)


def arguments_of(path: Path, given: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Model, recipe and settings of the learner that a run was made with.

    Args:
        given: arguments that take the place of what run.yaml says.

    Raises:
        RunError: no run is there, or its base model was one in memory, and is not given again.
    """
    config, given = read_config(path), dict(given)
    given = {**settled(config), **given}
    own = "recipe" not in given
    name, recipe = given.pop("model", None), given.pop("recipe", config["recipe"])
    if name is None and config.get("in_memory"):
        raise RunError(
            f"{path} was made with a model in memory: give it again, Learner.open(run, model=(model, tokenizer)), or "
            "the folder that it was saved to (--model)"
        )
    name = name if name is not None else config["model_name"]
    loading = {} if name is None else Loading.of_run(config["model"])
    if InMemory.of(name, given.get("processor")):
        loading = {k: v for k, v in loading.items() if k not in DECIDED}
    # what had no effect was once taken and is refused now: without it the run is what it was
    training = {k: v for k, v in config["training"].items() if k not in REFUSED}
    training[BATCH] = _share(path, config)
    if own:
        recipe = make_recipe(recipe)  # made, so that `as_begun` need not compare it with itself
    return name, recipe, {"training": training, "seed": config["seed"], **loading, **given}


def _share(path: Path, config: dict[str, Any]) -> int:
    """The batch of each process, of as many as there are now.

    Raises:
        RunError: that of the run cannot be divided so.
    """
    whole: int = together(config)["training"].get(BATCH, DEFAULTS[BATCH])
    if whole % launched():
        raise RunError(f"{path} has batches of {whole} examples, which {launched()} processes cannot divide")
    return whole // launched()


def _check_loss(setup: Setup, settings: dict[str, Any], backbone: Backbone) -> None:
    """
    Raises:
        ConfigError: the loss of a batch is no mean over its examples, so that several processes would learn another.
    """
    sides = {
        f"`{SETTING}`": settings.get(SETTING) is not None,
        "`trainer: perpetune` on a language model": "answers" in backbone.offers and (setup.trainer or OLD) == OLD,
        "a head that tells the pairs of a batch apart": setup.recipe.heads[0].reads == "pairs",
    }
    found = [what for what, there in sides.items() if there]
    if launched() > 1 and found and setup.recipe.tuner.trains:
        raise ConfigError(
            f"{found[0]} makes a loss that is no mean over examples, and {launched()} processes would each "
            "take their own: start one process, or use `trainer: trl` on a language model"
        )


def open_run(setup: Setup, stream: Stream, without: str | None = None, retry: str | None = None) -> Opened:
    """Create the run of this setup and stream, or continue the one that is there.

    Args:
        without: a task that is about to be taken out; retry: the newest, which is thrown away to be learned again.

    Raises:
        PerpetuneError: whatever keeps the run from starting; nothing that was learned is touched.
    """
    if not len(stream) and without is None:
        raise StreamError(f"stream `{stream.name}` has no task")
    backbone = setup.load_backbone(stream.modality)
    stream = settle(setup, stream, backbone)
    setup.fit_heads(backbone, stream.captions)
    setup.recipe.tuner.check(backbone.model)
    if backbone.left_out and not any(head.starts_from_own for head in setup.recipe.heads):
        setup.progress.say(
            f"`{backbone.name}` was fine-tuned as a classifier of {', '.join(backbone.left_out[:5])}: this head is "
            "left out, and the recipe's is trained; to go on from its rows, choose heads: [own_classifier]"
        )
    checked: list[dict[str, Any]] = []  # most tasks have the settings of the run, and a check builds an optimizer
    for each in stream:  # before anything is written
        if launched() > 1 and BATCH in each.training:
            raise ConfigError(f"task `{each.name}` has a {BATCH} of its own, which is for one process: leave it out")
        settings = task_settings(setup.training, each)
        if settings not in checked:
            _check_loss(setup, settings, backbone)
            check_trl_settings(settings, setup.trainer, stream)
            check_sdft(settings, setup.trainer)
            check_training(settings, backbone, setup.trainer or OLD)
            checked.append(settings)
    stream = with_known_scenario(stream, setup.path)
    config = setup.config(stream, backbone)
    processes.agree(
        {
            **{name: plain(config[name]) for name in ("model", "recipe", "training", "seed")},
            "stream": [config["stream"][name] for name in ("scenario", "inputs", "tasks", "labels")],
            "data": [(len(task.train), len(task.test)) for task in stream],
        }
    )
    run = Run.open(setup.path, config)
    try:
        thrown = set_aside(run, retry) if retry is not None else False
        written = run.config["stream"]
        known = [*(run.commits[-1].manifest["learned"] if run.commits else ()), *written["tasks"]]
        whole = stream.ordered_after(known).numbered(written["labels"])
        out = [*reverted(run.commits), without]
        for each in whole:
            setting = task_settings(setup.training, each).get(SETTING)
            check_class_weights(setup.recipe, setting, whole.labels)
        learned = [name for name in (run.commits[-1].manifest["learned"] if run.commits else ()) if name != without]
        stream = replace(whole, tasks=tuple(task for task in whole if task.name not in out))
        stream = completed(run, stream, learned, every=without is not None)
        whole = replace(whole, tasks=(*stream.tasks, *(task for task in whole if task.name in out)))
        if without is not None or len(learned) < len(stream):
            check_needed(run, stream, learned, setup.recipe.heads)
        sessions = setup.recipe.consolidation.schedule(stream)
        done = len(active(run.commits))
        if done and done >= len(sessions) and len(learned) < len(stream):
            raise RunError(
                f"{setup.path} learned all tasks of its stream at once; the stream has grown since, and the training "
                "data of all tasks is needed to learn them at once again: use another run directory (--out)"
            )

        def untouched(labels: tuple[str, ...]) -> LearnerState:
            return LearnerState(setup, backbone, labels, stream.inputs)

        joined = {}
        if run.commits and without is None:
            joined = _predict_joined(setup, lambda: untouched(stream.labels).restore([]), run, stream)
        state = untouched(whole.labels)
        state.general = general_of(state, run.commits)
        state.restore(run.commits, without)
        if thrown:  # now that nothing keeps it from being learned again
            run.undo(["to be learned again"])
        if without is None:
            run.grow(setup.config(whole, backbone))
            _note_start(setup, run)
            for line in told(run, stream, learned):
                setup.progress.say(line)
            for task in (task.name for task in whole if task.name in out):
                setup.progress.say(
                    f"task `{task}` was taken out of {setup.path} and is passed over: to learn it again, give it "
                    "another name"
                )
    except BaseException:
        run.close()
        raise
    return Opened(run, stream, state, joined)


def reopened(setup: Setup) -> LearnerState:
    """The state after the newest commit of a run.

    Raises:
        RunError: no run is there, it is damaged, or its base model is another one now.
        ConfigError: it has no use for the general prompts that are given.
    """
    run = Run.read(setup.path)
    model, stream = run.config["model"], run.config["stream"]
    backbone = setup.load_base(model["modality"], model["fingerprint"])
    state = LearnerState(setup, backbone, stream["labels"], stream["inputs"])
    state.general = general_of(state, run.commits)
    return state.restore(run.commits)


def _predict_joined(setup: Setup, untouched: Callable[[], LearnerState], run: Run, stream: Stream) -> dict[str, Tensor]:
    """Baseline predictions b_j of tasks that joined the stream after the first commit, where a head knows classes by
    their names: as if the run began now."""
    if not any(head.needs_label_embeddings or head.follows_texts for head in setup.recipe.heads):
        return {}  # none could name a class
    evaluated = map(task_of, run.commits[0].tensors("predictions.safetensors"))
    known = {*run.commits[-1].manifest["learned"], *evaluated}
    joined = [task for task in stream if task.name not in known]
    if not joined:
        return {}
    state = untouched()
    with setup.progress, processes.divided():
        found = state.evaluator.predictions(stream, None, state.heads, state.consolidation, joined)
    return filed(JOINED, found)


def _note_start(setup: Setup, run: Run) -> None:
    """Journal a start, and warn where a run goes on under other versions: its bits may then differ."""
    now, then = versions(), run.config.get("versions", {})
    run.note("resume" if run.commits else "start", command=sys.argv, versions=now, device=str(setup.device))
    other = [f"{k} {then.get(k)} -> {v}" for k, v in now.items() if then.get(k) != v]
    if run.commits and other:
        setup.progress.say(f"{setup.path}: goes on with {', '.join(other)}; bits may differ from an undisturbed run")


def task_of(key: str) -> str:
    """The task of a stored prediction."""
    return key.rpartition("/")[2]


def filed(prefix: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The predictions of heads among these, under a prefix."""
    return {prefix + key: value for key, value in found.items() if not key.startswith(NO_READING)}

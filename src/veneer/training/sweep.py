"""A search over config keys: each trial is a run of its own, and a killed search goes on with the same command.

The study is an SQLite file in the output folder. A trial that was cut off is run again in its own folder, where its
training goes on from its last checkpoint; one that was cut off twice is given up, lest it kill the search for ever.
What a trial tries depends on the seed, its number and the trials before it alone, so a search that was interrupted
tries what an uninterrupted one would have tried. Where all keys have listed values and the trials suffice, each
combination is tried once; else optuna's tree-structured Parzen estimator chooses.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from veneer.errors import ConfigError, OutputError, did_you_mean
from veneer.storage import write_text
from veneer.tasks import TASKS
from veneer.training.config import RunConfig, read_config
from veneer.training.folder import ADAPTER, REPORT
from veneer.training.runs import run

STUDY, SEARCH, BEST = "study.db", "sweep.yaml", "best.yaml"
LOWER_IS_BETTER = ("loss", "perplexity")
"""Metrics to be made small; all others are shares of right answers."""
ATTEMPTS = 2
"""How often a trial that is cut off is begun."""
FOLDER = "folder"


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    values: Sequence[Any]

    def suggest(self, trial: Any, key: str) -> Any:
        """A value for this trial. optuna keeps plain values only, so they are spelled as JSON there."""
        return json.loads(trial.suggest_categorical(key, [json.dumps(value) for value in self.values]))

    def ends(self) -> Sequence[Any]:
        """What to check beforehand: everything."""
        return self.values

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return {"choice": list(self.values)}


@dataclass(frozen=True)
class Range:
    """A number between two, both included."""

    low: float
    high: float
    logarithmic: bool

    def suggest(self, trial: Any, key: str) -> Any:
        """A number for this trial, whole if the ends are."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(key, self.low, self.high, log=self.logarithmic)
        return trial.suggest_float(key, self.low, self.high, log=self.logarithmic)

    def ends(self) -> Sequence[Any]:
        """What to check beforehand: both ends."""
        return (self.low, self.high)

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return {"log" if self.logarithmic else "lin": [self.low, self.high]}


Space = Mapping[str, Choice | Range]


@dataclass(frozen=True)
class Trial:
    """One run of the search.

    Attributes:
        values: of the searched keys.
        folder: of the run.
        value: of the metric, or None if it failed.
        error: why it failed, or None.
    """

    values: Mapping[str, Any]
    folder: Path
    value: float | None
    error: str | None


def parse_space(text: str) -> Choice | Range | None:
    """What stands behind ``key=``: ``4,8,16``, ``lin:0:0.2``, ``log:1e-5:1e-2``; None for a single value.

    Raises:
        ConfigError: it is a range, but its ends are no numbers in order.
    """
    kind, _, rest = text.partition(":")
    if kind in ("lin", "log"):
        ends = [_number(end) for end in rest.split(":")]
        low, high = ends if len(ends) == 2 else (None, None)
        if low is None or high is None or not low < high or (kind == "log" and low <= 0):
            raise ConfigError(f"{text!r} is no range; write lin:LOW:HIGH, or log:LOW:HIGH with LOW above 0.")
        return Range(low, high, logarithmic=kind == "log")
    try:
        values = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError:
        return None  # no list either; as a value of one key it gets its own error
    return Choice(values) if isinstance(values, list) and len(values) > 1 else None


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            value = kind(text)
            return value if math.isfinite(value) else None
    return None


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], Space]:
    """Overrides with one value, and the keys to be searched."""
    fixed: list[str] = []
    space: dict[str, Choice | Range] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        found = parse_space(text) if equals else None
        if found is None:
            fixed.append(argument)
        else:
            space[key] = found
    return fixed, space


class Sweep:
    """A search.

    Args:
        file: the config file, or None.
        arguments: overrides and spaces, as on the command line.
        metric: of the validation, as reported by a run.

    Raises:
        ConfigError: the config is wrong at an end of a space, nothing is searched, nothing is held out to validate
            on, or optuna is not installed.
    """

    def __init__(self, file: Path | None, arguments: Sequence[str], *, metric: str = "loss") -> None:
        self._file = file
        self._fixed, self.space = split_arguments(arguments)
        self.metric = metric
        self._optuna = _optuna()
        if not self.space:
            raise ConfigError(
                "Nothing to search. Give at least one key several values: method.rank=4,8,16 (a choice), "
                "train.learning_rate=log:1e-5:1e-2 or train.warmup=lin:0:0.2 (a range)."
            )
        if wrong := [key for key in self.space if key == "output" or key.startswith("data.")]:
            raise ConfigError(
                f"{', '.join(wrong)} cannot be searched: each trial has a folder of its own, and losses on different "
                "data say nothing about each other. A single value with a comma is put into quotes: 'key=\"a,b\"'."
            )
        self._config = self._checked()
        self.output = self._config.output

    def config(self, values: Mapping[str, Any], output: Path | None = None) -> RunConfig:
        """The config with these values; in a folder of its own, or the search's."""
        overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        overrides += [f"output={json.dumps(str(output))}"] if output is not None else []
        return read_config(self._file, [*self._fixed, *overrides])

    def run(self, trials: int, say: Callable[[str], None]) -> list[Trial]:
        """Run trials until there are ``trials`` of them, or all combinations were tried.

        Args:
            trials: how many there are to be in all, earlier ones included.
            say: told what each trial tries, and what came out.

        Raises:
            OutputError: the folder holds another search, or one is at work in it.
        """
        with self._open() as study:
            self._queue_cut_off(study)
            grid = self._grid(trials)
            wanted = trials if grid is None else len(grid)
            while len(done := self._done(study)) < wanted:
                if grid is not None and not self._queued(study):
                    tried = [trial.params for trial in study.trials]
                    study.enqueue_trial(next(values for values in grid if values not in tried))
                self._one(study, len(done), wanted, say)
                self._write_best(study)
            return done

    @property
    def lowest_is_best(self) -> bool:
        """Which way the metric goes."""
        return self.metric in LOWER_IS_BETTER

    def best(self, trials: Sequence[Trial]) -> Trial | None:
        """The best of them, if any succeeded."""
        found = [
            (trial.value if self.lowest_is_best else -trial.value, trial) for trial in trials if trial.value is not None
        ]
        return min(found, key=lambda pair: pair[0])[1] if found else None

    def _checked(self) -> RunConfig:
        """The config with the first value of each key; mistakes at all ends of the spaces are told at once."""
        first = {key: space.ends()[0] for key, space in self.space.items()}
        corners = [{**first, key: value} for key, space in self.space.items() for value in space.ends()]
        problems: dict[str, None] = {}
        for values in [first, *corners]:
            try:
                self.config(values)
            except ConfigError as error:
                problems.update(dict.fromkeys(str(error).splitlines()))
        if problems:
            raise ConfigError("\n".join(problems))
        config = self.config(first)
        known = {"loss"}.union(*(task.model_construct().metrics(1.0, 0.0) for task in TASKS.values()))
        if self.metric not in known:
            raise ConfigError(
                f"--metric {self.metric}: no task reports that.{did_you_mean(self.metric, known)} "
                f"There are: {', '.join(sorted(known))}."
            )
        if not config.data.validation:
            raise ConfigError("data.validation is 0, so there is nothing to compare trials by; hold some rows out.")
        return config

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        """The study, with nobody else at it."""
        folder, described = self.output, self._description()
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder} is a file; `output` is to be a folder.")
        if (folder / SEARCH).exists():
            if (folder / SEARCH).read_text(encoding="utf-8") != described:
                raise OutputError(f"{folder} holds another search; choose another `output`, or delete it first.")
        elif folder.exists() and any(folder.iterdir()):
            raise OutputError(f"{folder} is not empty; choose another `output` for the search.")
        write_text(folder / SEARCH, described)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise OutputError(f"A search is at work in {folder}; wait for it, or choose another `output`.") from error
        storage = self._optuna.storages.RDBStorage(f"sqlite:///{folder / STUDY}")
        try:
            direction = "minimize" if self.lowest_is_best else "maximize"
            yield self._optuna.create_study(
                study_name="sweep", storage=storage, direction=direction, load_if_exists=True
            )
        finally:
            storage.remove_session()
            storage.engine.dispose()
            lock.release()

    def _description(self) -> str:
        """What makes it this search: all but the number of trials."""
        spaces = {key: space.plain() for key, space in self.space.items()}
        return yaml.safe_dump({"metric": self.metric, "space": spaces, "config": self._config.plain()}, sort_keys=False)

    def _grid(self, trials: int) -> list[dict[str, str]] | None:
        """All combinations as optuna spells them, if they are listed and no more than the trials."""
        choices = [space for space in self.space.values() if isinstance(space, Choice)]
        if len(choices) < len(self.space) or math.prod(len(choice.values) for choice in choices) > trials:
            return None
        spelled = [[json.dumps(value) for value in choice.values] for choice in choices]
        return [dict(zip(self.space, values, strict=True)) for values in itertools.product(*spelled)]

    def _one(self, study: Any, number: int, wanted: int, say: Callable[[str], None]) -> None:
        """Run the next trial; whatever goes wrong in it is its own failure."""
        study.sampler = self._optuna.samplers.TPESampler(seed=self._config.train.seed * 100_003 + number)
        trial = study.ask()
        folder = trial.user_attrs.get(FOLDER) or f"trial-{number:03}"
        trial.set_user_attr(FOLDER, folder)
        values = {key: space.suggest(trial, key) for key, space in self.space.items()}
        trial.set_user_attr("values", values)
        say(f"{folder}, {number + 1} of {wanted}: {shown(values)}")
        try:
            after = self._train(values, self.output / folder)
        except Exception as error:
            trial.set_user_attr("error", f"{type(error).__name__}: {error}")
            study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
            say(f"{folder} failed: {error}")
            return
        if self.metric not in after:
            raise ConfigError(
                f"Runs here report no {self.metric!r}, but {', '.join(after)}. Delete {self.output} and search for "
                "one of these."
            )
        study.tell(trial, after[self.metric])
        say(f"{folder}: {self.metric} {after[self.metric]:.4g}")

    def _train(self, values: Mapping[str, Any], folder: Path) -> dict[str, float]:
        """The final validation of a run; of one that finished, but was killed before that was noted, too."""
        if (folder / ADAPTER).exists() and (folder / REPORT).exists():
            report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
            return dict(report["after"])
        return dict(run(self.config(values, folder))[1].after or {})

    def _queue_cut_off(self, study: Any) -> None:
        """Have the trials that a killed search was at run again, in their folders."""
        states = self._optuna.trial.TrialState
        waiting = {trial.user_attrs.get(FOLDER) for trial in self._queued(study)}
        for trial in study.get_trials(states=[states.RUNNING]):
            folder = trial.user_attrs.get(FOLDER)
            attempts = sum(other.user_attrs.get(FOLDER) == folder for other in study.trials)
            if folder is not None and folder not in waiting and attempts < ATTEMPTS:
                study.enqueue_trial(trial.params, user_attrs={FOLDER: folder})
            study.tell(trial.number, state=states.FAIL)

    def _queued(self, study: Any) -> list[Any]:
        return list(study.get_trials(states=[self._optuna.trial.TrialState.WAITING]))

    def _done(self, study: Any) -> list[Trial]:
        """The finished trials; of one that was run again, the last attempt."""
        last = {trial.user_attrs[FOLDER]: trial for trial in study.trials if FOLDER in trial.user_attrs}
        return [self._told(folder, trial) for folder, trial in sorted(last.items()) if trial.state.is_finished()]

    def _told(self, folder: str, trial: Any) -> Trial:
        succeeded = trial.state.name == "COMPLETE"
        error = None if succeeded else trial.user_attrs.get("error", f"was cut off {ATTEMPTS} times")
        return Trial(
            trial.user_attrs.get("values", {}), self.output / folder, trial.value if succeeded else None, error
        )

    def _write_best(self, study: Any) -> None:
        if best := self.best(self._done(study)):
            config = self.config(best.values, self.output / "best")
            write_text(self.output / BEST, yaml.safe_dump(config.plain(), sort_keys=False))


def shown(values: Mapping[str, Any]) -> str:
    """Values as they would be given on the command line."""
    return "  ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()
    )


def _optuna() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import optuna
    except ImportError as error:
        raise ConfigError("A sweep needs optuna: pip install 'veneer[sweep]', or pip install optuna.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna

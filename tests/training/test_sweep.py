"""The search tries what it should, survives kills and failures, and its best config trains again."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
import yaml
from filelock import FileLock

from helpers import sums, write_jsonl
from veneer.errors import ConfigError, OutputError
from veneer.training import runs, sweep
from veneer.training.sweep import Choice, Range, Sweep, parse_space

Cli = Callable[..., int]


@pytest.fixture
def options(folder: Path, tiny_folder: Path) -> list[str]:
    """A small run on the tiny base."""
    write_jsonl(folder / "train.jsonl", sums(24))
    settings = {"base": tiny_folder, "dtype": "float32", "data.train": "train.jsonl", "method.rank": 2}
    settings |= {"train.samples": 0, "train.epochs": 1, "output": "out"}
    return [f"{key}={value}" for key, value in settings.items()]


def pretend(monkeypatch: pytest.MonkeyPatch, value: Callable[[object], float], metric: str = "loss") -> list[Path]:
    """Runs that only compute a number of their config; the folders of those made."""
    made: list[Path] = []

    def run(config: object) -> tuple[None, runs.Result]:
        made.append(config.output)  # type: ignore[attr-defined]
        values = dict.fromkeys(runs.Result.__dataclass_fields__, 0) | {"after": {metric: value(config)}}
        return None, runs.Result(**values)  # type: ignore[arg-type]

    monkeypatch.setattr(sweep, "run", run)
    return made


@pytest.mark.parametrize(
    ("text", "space"),
    [
        ("4,8,16", Choice([4, 8, 16])),
        ("lora,ia3", Choice(["lora", "ia3"])),
        ("[q, v],all-linear", Choice([["q", "v"], "all-linear"])),
        ("log:1e-5:1e-2", Range(1e-5, 1e-2, logarithmic=True)),
        ("lin:1:4", Range(1, 4, logarithmic=False)),
        ("8", None),
        ("[q, v]", None),
        ("0:6", None),
        ("[", None),
    ],
)  # fmt: skip
def test_spaces(text: str, space: object) -> None:
    assert parse_space(text) == space


def test_a_search_from_start_to_best(options: list[str], cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    search = [*options, "train.learning_rate=log:1e-5:3e-2", "method.rank=2,9999"]
    assert cli("sweep", *search, "--trials", 4, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    trials = result["trials"]
    assert len(trials) == 4
    failed = [trial for trial in trials if trial["values"]["method.rank"] == 9999]
    assert failed  # with this seed; else this shows nothing
    assert all("rank 9999 is more than" in trial["error"] for trial in failed)
    good = [trial for trial in trials if trial not in failed]
    assert all(1e-5 <= trial["values"]["train.learning_rate"] <= 3e-2 for trial in good)
    for trial in good:
        report = json.loads(Path(trial["folder"], "report.json").read_text())
        assert trial["value"] == report["after"]["loss"]
        config = yaml.safe_load(Path(trial["folder"], "config.yaml").read_text())
        assert config["train"]["learning_rate"] == trial["values"]["train.learning_rate"]
    best = min(good, key=lambda trial: trial["value"])
    assert result["best"] == best["folder"]
    assert Path(best["folder"], "adapter", "adapter_model.safetensors").exists()

    assert cli("sweep", *search, "--trials", 4) == 0  # nothing left to do
    out, err = capsys.readouterr()
    assert "rank 9999 is more than" in out
    assert "lowest loss" in out
    assert "1 of 4" not in err
    assert cli("train", "out/best.yaml", "--json") == 0
    assert json.loads(capsys.readouterr().out)["after"]["loss"] == best["value"]


def test_all_combinations_once(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made = pretend(monkeypatch, lambda config: config.method.rank * config.train.batch_size)  # type: ignore[attr-defined]
    search = Sweep(None, [*options, "method.rank=2,4", "train.batch_size=1,2,3"])
    trials = search.run(20, lambda _: None)
    assert len(made) == 6
    assert sorted((t.values["method.rank"], t.values["train.batch_size"]) for t in trials) == [
        (rank, batch) for rank in (2, 4) for batch in (1, 2, 3)
    ]
    best = search.best(trials)
    assert best is not None
    assert best.value == 2


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_it_closes_in_on_the_best(options: list[str], monkeypatch: pytest.MonkeyPatch, metric: str) -> None:
    """Later trials are better than the first ten, which are drawn at random."""

    def off(config: object) -> float:
        return abs(math.log10(config.train.learning_rate) + 3.2)  # type: ignore[attr-defined]

    pretend(monkeypatch, lambda config: off(config) * (1 if metric == "loss" else -1), metric)
    trials = Sweep(None, [*options, "train.learning_rate=log:1e-6:1"], metric=metric).run(24, lambda _: None)
    values = [abs(trial.value or 0.0) for trial in trials]
    assert sum(values[12:]) / 12 < sum(values[:10]) / 10 / 2


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_which_way_is_best(options: list[str], monkeypatch: pytest.MonkeyPatch, metric: str) -> None:
    pretend(monkeypatch, lambda config: config.method.rank, metric)  # type: ignore[attr-defined]
    search = Sweep(None, [*options, "method.rank=1,5,3"], metric=metric)
    best = search.best(search.run(9, lambda _: None))
    assert best is not None
    assert best.values["method.rank"] == {"loss": 1, "accuracy": 5}[metric]
    assert yaml.safe_load(Path("out/best.yaml").read_text())["method"]["rank"] == best.values["method.rank"]


def test_a_killed_search_goes_on_to_the_same_result(
    options: list[str], cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed in the middle of a training, it goes on in that trial's folder, and tries what it would have tried."""
    write_jsonl(Path("train.jsonl"), sums(120))
    search = ["sweep", *options, "train.learning_rate=log:1e-4:1e-2", "train.evaluate_every=4", "--trials=2", "--json"]
    assert cli(*search, "output=whole") == 0
    whole = json.loads(capsys.readouterr().out)
    command = [sys.executable, "-m", "veneer", *search, "output=killed"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(Path("killed").glob("trial-001/checkpoint-*/complete")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Path("killed/trial-001/adapter").exists()
    assert cli(*search, "output=killed") == 0
    out, err = capsys.readouterr()
    assert "Going on from step" in err
    found = json.loads(out)
    for key in ("values", "value", "error"):
        assert [trial[key] for trial in found["trials"]] == [trial[key] for trial in whole["trials"]]
    assert [Path(trial["folder"]).name for trial in found["trials"]] == ["trial-000", "trial-001"]


def test_what_is_tried_does_not_depend_on_interruptions(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted = []

    def once(config: object) -> float:
        if config.output.parent.name == "b" and config.output.name == "trial-001" and not interrupted:  # type: ignore[attr-defined]
            interrupted.append(True)
            raise KeyboardInterrupt
        return float(config.train.learning_rate)  # type: ignore[attr-defined]

    pretend(monkeypatch, once)
    arguments = [*options, "train.learning_rate=log:1e-6:1", "method.rank=2,4"]
    whole = Sweep(None, [*arguments, "output=a"]).run(14, lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        Sweep(None, [*arguments, "output=b"]).run(14, lambda _: None)
    again = Sweep(None, [*arguments, "output=b"]).run(14, lambda _: None)
    assert [trial.values for trial in again] == [trial.values for trial in whole]


def test_a_trial_that_is_cut_off_twice_is_given_up(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def killer(config: object) -> float:
        if config.method.rank == 2:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return 1.0

    made = pretend(monkeypatch, killer)
    arguments = [*options, "method.rank=2,4"]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            Sweep(None, arguments).run(5, lambda _: None)
    trials = Sweep(None, arguments).run(5, lambda _: None)
    assert [path.name for path in made] == ["trial-000", "trial-000", "trial-001"]
    assert [trial.error for trial in trials] == ["was cut off 2 times", None]


def test_a_trial_finished_but_not_noted_is_not_run_again(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made = pretend(monkeypatch, lambda _: 1.0)
    arguments = [*options, "method.rank=2,4"]
    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "tell", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Sweep(None, arguments).run(5, lambda _: None)
    Path("out/trial-000/adapter").mkdir(parents=True)
    Path("out/trial-000/report.json").write_text('{"after": {"loss": 0.25}}')
    trials = Sweep(None, arguments).run(5, lambda _: None)
    assert [path.name for path in made] == ["trial-000", "trial-001"]
    assert trials[0].value == 0.25


def test_folders_that_hold_something_else(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, lambda _: 1.0)
    Sweep(None, [*options, "method.rank=2,4"]).run(2, lambda _: None)
    with pytest.raises(OutputError, match="holds another search"):
        Sweep(None, [*options, "method.rank=2,4,8"]).run(3, lambda _: None)
    with FileLock("out/.lock"), pytest.raises(OutputError, match="A search is at work in out"):
        Sweep(None, [*options, "method.rank=2,4"]).run(2, lambda _: None)
    Path("other").mkdir()
    Path("other/notes.txt").touch()
    with pytest.raises(OutputError, match="is not empty"):
        Sweep(None, [*options, "method.rank=2,4", "output=other"]).run(2, lambda _: None)
    with pytest.raises(OutputError, match="is a file"):
        Sweep(None, [*options, "method.rank=2,4", "output=train.jsonl"]).run(2, lambda _: None)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["method.rank=4"], "Nothing to search"),
        (["method.rank=4,0", "train.epochs=lin:-1:2"], r"train.epochs: .*method.rank: "),
        (["method.rnk=4,8"], "method.rnk: unknown setting of lora. Did you mean 'rank'"),
        (["train.learning_rate=log:0:1"], "no range; write lin:LOW:HIGH"),
        (["train.learning_rate=lin:1"], "no range"),
        (["train.learning_rate=lin:2:1"], "no range"),
        (["method.rank=4,8", "data.validation=0"], "nothing to compare trials by"),
        (["data.train=a.jsonl,b.jsonl"], "data.train cannot be searched"),
        (["method.rank=4,8", "--metric", "acuracy"], "Did you mean 'accuracy'"),
        (["method.rank=4,8", "--metric", "accuracy"], "report no 'accuracy', but loss, perplexity"),
        (["method.rank=4,8", "data.train=nowhere.jsonl"], "All trials failed"),
    ],
)  # fmt: skip
def test_mistakes(
    options: list[str], cli: Cli, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert cli("sweep", *options, *more) == 2
    err = capsys.readouterr().err
    assert re.search(message, err, re.DOTALL), err
    assert "Traceback" not in err


def test_nothing_given(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("sweep") == 2
    assert "Nothing to search yet" in capsys.readouterr().err


def test_without_optuna(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'veneer\[sweep\]'"):
        Sweep(None, [*options, "method.rank=2,4"])

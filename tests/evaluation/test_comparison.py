"""A comparison: what it runs, what it makes of the results, and what it shows."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import psutil
import pytest
import yaml

from helpers import sums, write_jsonl
from veneer.errors import ConfigError, Interrupted, OutputError, VeneerError
from veneer.evaluation.comparison import report, runner, schedule, tables, worker
from veneer.evaluation.comparison.analysis import Findings, analyse
from veneer.evaluation.comparison.claims import FAILED, HELD, PARTLY, UNKNOWN, verdicts
from veneer.evaluation.comparison.config import CompareConfig, Entry, head_baselines, read_compare_config
from veneer.evaluation.comparison.runner import Done
from veneer.evaluation.comparison.schedule import Run

Cli = Callable[..., int]
ROWS = 400
PROCESS = subprocess.Popen


def read_config(*overrides: str) -> tuple[CompareConfig, list[Entry]]:
    least = ["base=minilm-l6", "entries=[lora, ia3]", "data.train=a.csv", "data.test=b.csv", "output=out"]
    return read_compare_config(None, [*least, *overrides])


def made_up(config: CompareConfig, entries: Sequence[Entry], quality: dict[str, float], **more: Any) -> list[Done]:
    """Results of all runs: rows right with these probabilities, the hard rows the same for all."""
    random = numpy.random.default_rng(0)
    hard = random.uniform(size=ROWS)
    entries = [*entries, *head_baselines(config, entries)]
    rates = {entry.label: schedule.rate(entry) for entry in entries}
    runs = schedule.plain_bases(config, entries) + schedule.searches(config, entries)
    done = []
    for run in runs + schedule.trainings(config, entries, rates):
        right = (hard + random.normal(0, 0.1, ROWS) < quality[run.entry]).astype(float).tolist()
        tests = {
            name: {"rows": ROWS, "metric": "accuracy", "values": right, "items": [1] * ROWS}
            for name in run.spec["tests"]
        }
        result: dict[str, Any] = {"spec": run.spec, "tests": tests, "after": {"loss": 1 - quality[run.entry]}}
        result |= {"learning_rate": run.spec["config"]["train"]["learning_rate"], "train_rows": 1000, "head": True}
        whole = run.entry == "full"
        result |= {
            "trainable_share": 1.0 if whole else 0.005,
            "seconds": 20.0 if whole else 10.0,
            "stored": 100 if whole else 1,
            "peak_memory": 2e9 if whole else 1e9,
        }
        result["course"] = [
            {"step": step, "loss": loss, "forgotten": (1 - loss) * (0.5 if whole else 0.1)}
            for step, loss in ((0, 1.0), (5, 0.5), (10, 1 - quality[run.entry]))
        ]
        changes = [{"data": "general texts", "measure": "similarity", "change": {"value": -0.5 if whole else -0.1}}]
        result["forgetting"] = {"changes": changes}
        done.append(Done(run, result | more.get(run.entry, {})))
    return done


QUALITY = {"plain base": 0.5, "lora": 0.9, "ia3": 0.885, "full": 0.91, "head": 0.6}


# The config


def test_every_entry_and_the_baselines() -> None:
    config, entries = read_config(
        "entries=[lora, {name: lora, rank: 2}, {label: slow, method: ia3, train: {learning_rate: 1.0e-5}}]",
        "train={epochs: 2, batch_size: 4}",
        "task={max_length: 32}",
    )
    assert [entry.label for entry in entries] == ["lora", "lora, rank 2", "slow", "full"]
    assert [entry.label for entry in head_baselines(config, entries)] == ["head"]
    slow = entries[2].config
    assert (slow.train.learning_rate, slow.train.epochs, slow.train.batch_size) == (1e-5, 2, 4)
    assert slow.task == {"max_length": 32}
    assert entries[1].config.method.model_dump()["rank"] == 2
    _, entries = read_config("baselines=false")
    assert [entry.label for entry in entries] == ["lora", "ia3"]
    config, entries = read_config("entries=[full, head]")
    assert [entry.label for entry in entries] == ["full", "head"]
    assert head_baselines(config, entries) == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["entries=[lorra]"], r"entries, 1\. \(lorra\): method: .*Did you mean 'lora'"),
        (["entries=[{name: lora, rnk: 2}]"], "method.rnk: unknown setting of lora. Did you mean 'rank'"),
        (["entries=[{method: lora, trane: {}}]"], "trane: an entry has no such key"),
        (["entries=[lora, lora]"], "two are called 'lora'"),
        (["entries=[]"], "entries: "),
        (["train.epoch=2"], "train.epoch: unknown key. Did you mean 'epochs'"),
        (["seds=3"], "seds: unknown key. Did you mean 'seeds'"),
        (["data.tests=c.csv"], "data.tests: unknown key. Did you mean 'test'"),
        (["search.factors=[0]"], "search.factors"),
        (["sizes.rows=[1]"], "sizes.rows"),
        (["base=null"], "base: is missing"),
    ],
)  # fmt: skip
def test_mistakes_in_the_config(more: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(*more)


def test_all_mistakes_are_told_at_once() -> None:
    given = ["entries=[lora, lroa, {name: ia3, rnk: 2}]", "data.tset=x", "seeds=0"]
    with pytest.raises(ConfigError) as told:
        read_compare_config(None, given)
    for part in ("lroa", "rnk", "data.tset", "seeds", "data.train: is missing", "output: is missing"):
        assert part in str(told.value)


def test_mistakes_on_the_command_line(folder: Path, cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("compare") == 2
    assert "Nothing to compare yet" in capsys.readouterr().err
    assert cli("compare", "nowhere.yaml") == 2
    assert "Cannot read the config nowhere.yaml" in capsys.readouterr().err
    assert cli("compare", "base=minilm-l6", "entries=[lora]", "data.train=a.csv", "output=out") == 2
    assert "data.test: is missing" in capsys.readouterr().err
    assert not Path("out").exists()


# The runs


def test_runs_of_a_comparison() -> None:
    config, entries = read_config(
        "seeds=2", "search={factors: [0.5, 2]}", "sizes={rows: [50, 100], train: {epochs: 9}}"
    )
    assert [run.name for run in schedule.plain_bases(config, entries)] == ["plain-base"]
    searched = schedule.searches(config, entries)
    assert [run.name for run in searched][:3] == ["lora-rate0.5", "lora-rate2", "ia3-rate0.5"]
    assert [run.spec["config"]["train"]["learning_rate"] for run in searched][:2] == [2.5e-4, 1e-3]
    assert not searched[0].spec["tests"]  # nothing is chosen by the rows it is judged by
    runs = schedule.trainings(config, entries, {"lora": 1e-3, "ia3": 2e-3, "full": 1e-5})
    assert len(runs) == 3 * 2 * 3
    assert [run.name for run in runs[:4]] == ["lora-seed0", "ia3-seed0", "full-seed0", "lora-seed1"]
    small = next(run for run in runs if run.name == "ia3-rows50-seed1")
    settings = small.spec["config"]
    assert settings["data"]["limit"] == 50
    assert (settings["train"]["epochs"], settings["train"]["keep_best"], settings["train"]["seed"]) == (9, False, 1)
    assert settings["train"]["learning_rate"] == 2e-3
    assert small.spec["forgetting"] is False
    assert runs[0].spec["forgetting"] is True


def finished(run: Run, output: Path, **result: Any) -> None:
    folder = run.prepare(output)
    (folder / schedule.RESULT).write_text(json.dumps({"spec": run.spec, **result}))


def test_results_are_those_of_the_very_run(tmp_path: Path) -> None:
    config, entries = read_config()
    run = schedule.trainings(config, entries, {"lora": 1e-3, "ia3": 1e-3, "full": 1e-3})[0]
    assert run.result(tmp_path) is None
    finished(run, tmp_path, steps=3)
    found = run.result(tmp_path)
    assert found is not None
    assert found["steps"] == 3
    config, entries = read_config("train.epochs=5")
    other = schedule.trainings(config, entries, {"lora": 1e-3, "ia3": 1e-3, "full": 1e-3})[0]
    with pytest.raises(OutputError, match=r"other settings \(train.epochs was 3.0, is 5.0\)"):
        other.result(tmp_path)


@pytest.fixture
def data(folder: Path) -> Path:
    """The files that `read_config` names."""
    for name, words in (("a.csv", ("good", "bad", "fine", "poor")), ("b.csv", ("great", "awful"))):
        rows = [f"this is {word},{label}" for word, label in zip(words, "yn" * 2, strict=False)]
        (folder / name).write_text("\n".join(["text,label", *rows, ""]))
    return folder


def pretend(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Processes that run this instead of a worker; their folder is ``folder``."""

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        assert options["env"][schedule.PARENT] == str(os.getpid())
        head = f"import json, sys, time\nfolder = {command[-1]!r}\nspec = json.load(open(folder + '/spec.json'))\n"
        return PROCESS([sys.executable, "-c", head + body], **options)

    monkeypatch.setattr(runner.subprocess, "Popen", start)


WORKS = """
result = {"spec": spec, "after": {"loss": spec["config"]["train"]["learning_rate"] or 0}, "tests": {},
          "learning_rate": spec["config"]["train"]["learning_rate"], "head": True}
json.dump(result, open(folder + "/result.json", "w"))
"""


def test_only_what_is_missing_is_run(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, entries = read_config("seeds=1", "search={factors: [3, 0.5]}")
    pretend(monkeypatch, WORKS)
    said: list[str] = []
    done = runner.compare(config, entries, jobs=3, say=said.append)
    labels = [each.run.entry for each in done if each.run.kind == "main"]
    assert labels == ["lora", "ia3", "full", "head"]  # the head's baseline, since the plain base's run told of one
    rates = {each.run.entry: each.result["learning_rate"] for each in done if each.run.kind == "main"}
    assert rates["lora"] == 2.5e-4  # the lower loss of the two
    pretend(monkeypatch, "sys.exit(3)")
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("result.json")}
    again = runner.compare(config, entries, jobs=1, say=said.append)
    assert [each.result for each in again] == [each.result for each in done]
    assert before == {path: path.stat().st_mtime_ns for path in Path("out").rglob("result.json")}
    shutil.rmtree("out/runs/ia3-seed0")
    pretend(monkeypatch, WORKS)
    runner.compare(config, entries, jobs=1, say=said.append)
    assert Path("out/runs/ia3-seed0/result.json").exists()


def test_a_crash_is_told_and_tried_again(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, entries = read_config("seeds=1", "baselines=false")
    pretend(monkeypatch, "print('out of luck'); sys.exit(3)")
    done = runner.compare(config, entries, jobs=1, say=lambda _: None)
    assert "exit code 3" in done[0].result["error"]
    assert "out of luck" in done[0].result["error"]
    assert analyse(done).lines[0].failed
    pretend(monkeypatch, WORKS)
    assert "error" not in runner.compare(config, entries, jobs=1, say=lambda _: None)[0].result


FAILS = 'json.dump({"spec": spec, "error": "ConfigError: not so"}, open(folder + "/result.json", "w"))'


def test_a_failed_run_is_tried_again_with_whatever_settings(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, entries = read_config("seeds=1", "baselines=false")
    pretend(monkeypatch, FAILS)
    assert runner.compare(config, entries, jobs=1, say=lambda _: None)[0].result["error"] == "ConfigError: not so"
    pretend(monkeypatch, "sys.exit(3)")
    assert "exit code 3" in runner.compare(config, entries, jobs=1, say=lambda _: None)[0].result["error"]
    pretend(monkeypatch, FAILS)
    runner.compare(config, entries, jobs=1, say=lambda _: None)
    config, entries = read_config("seeds=1", "baselines=false", "train.epochs=7")
    pretend(monkeypatch, WORKS)
    assert "error" not in runner.compare(config, entries, jobs=1, say=lambda _: None)[0].result


def test_some_failures_are_exit_code_1(
    data: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scored = '{"test": {"rows": 2, "metric": "accuracy", "values": [1, 0], "items": [1, 1]}}'
    failing = f"if spec['entry'] == 'ia3':\n  {FAILS}\nelse:\n  " + WORKS.strip().replace(
        '"tests": {}', '"tests": ' + scored
    )
    given = ["base=minilm-l6", "entries=[lora, ia3]", "data.train=a.csv", "data.test=b.csv", "output=out", "seeds=2"]
    pretend(monkeypatch, failing.replace("\n          ", " ").replace("\njson", "\n  json"))
    assert cli("compare", *given, "baselines=false") == 1
    out, err = capsys.readouterr()
    assert "2 of 4 runs failed" in err
    assert "seeds that count: `ia3` 0 of 2" in out
    assert Path("out/index.html").exists()


def test_data_that_changed_is_an_error(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("seeds=1", "baselines=false", "data.out_of_domain={other: c.csv}", "data.validation=d.csv")
    for name in "cd":
        shutil.copy("b.csv", f"{name}.csv")
    config, entries = read_config(*given)
    pretend(monkeypatch, WORKS)
    runner.compare(config, entries, jobs=1, say=lambda _: None)
    parts = {"a.csv": "train", "b.csv": "test", "c.csv": "out-of-domain other", "d.csv": "validation"}
    for name, part in parts.items():
        before = Path(name).read_text()
        Path(name).write_text(before.replace(",y", ",!").replace(",n", ",y").replace(",!", ",n"))
        with pytest.raises(OutputError, match=rf"other data: the {part} data \({name}\)"):
            runner.compare(config, entries, jobs=1, say=lambda _: None)
        Path(name).write_text(before)
    runner.compare(config, entries, jobs=1, say=lambda _: None)
    for path in Path("out/runs").glob("*/result.json"):  # as earlier versions wrote them
        found = json.loads(path.read_text())
        del found["spec"]["data"]
        path.write_text(json.dumps(found))
    Path("b.csv").write_text(before.replace(",y", ",n"))
    runner.compare(config, entries, jobs=1, say=lambda _: None)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("data.test", None, "data.test: .*x.csv"),
        ("data.out_of_domain.mails", None, "data.out_of_domain.mails: .*x.csv"),
        ("data.test", "text,lable\na,b\n", "data.test: x.csv: Task .* takes rows with text, label"),
        ("data.test", "prompt,completion\na,b\n", "data.test: x.csv: Task .* takes rows with text, label"),
        ("data.test", "text,label\na,other\n", "labels that the training data don't have: other"),
        ("data.out_of_domain.mails", "text,label\nThis is  good,y\n", "mails: all rows of x.csv occur in the training"),
        ("retention", None, "x.csv"),
        ("metric", None, "metric: x.csv: rows of data.test, b.csv, give loss, accuracy, token_accuracy"),
    ],
)  # fmt: skip
def test_data_are_looked_at_before_the_first_run(
    data: Path, monkeypatch: pytest.MonkeyPatch, key: str, text: str | None, message: str
) -> None:
    pretend(monkeypatch, WORKS)
    if text is not None:
        Path("x.csv").write_text(text)
    config, entries = read_config(f"{key}={'[x.csv]' if key == 'retention' else 'x.csv'}")
    with pytest.raises(VeneerError, match=message):
        runner.compare(config, entries, jobs=1, say=lambda _: None)
    assert not Path("out").exists()


def test_a_worker_whose_parent_is_gone_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it may be after seconds of imports: it is init's child then."""

    def ended(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(worker.os, "_exit", ended)
    with pytest.raises(SystemExit):
        worker._end_with(os.getppid() + 1)


def test_ctrl_c_ends_the_processes(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, entries = read_config("seeds=1", "baselines=false")
    pretend(monkeypatch, "time.sleep(60)")

    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.time, "sleep", interrupted)
    with pytest.raises(Interrupted, match="the same command goes on"):
        runner.compare(config, entries, jobs=2, say=lambda _: None)
    assert not [child for child in psutil.Process().children() if "time.sleep(60)" in " ".join(child.cmdline())]


# One run


@pytest.fixture
def rows(folder: Path) -> Path:
    write_jsonl(folder / "train.jsonl", sums(40))
    write_jsonl(folder / "test.jsonl", sums(12, start=36))  # the first four occur in the training data
    write_jsonl(folder / "other.jsonl", sums(5, start=500))
    return folder


def spec_of(tiny_folder: Path, kind: str = "main", *more: str) -> dict[str, Any]:
    least = [f"base={tiny_folder}", "entries=[lora]", "data.train=train.jsonl", "data.test=test.jsonl", "output=out"]
    least += ["data.out_of_domain={other: other.jsonl}", "train={max_steps: 3, evaluate_every: 2}", "dtype=float32"]
    config, entries = read_compare_config(None, [*least, "power=50", *more])
    if kind == "base":
        return dict(schedule.plain_bases(config, entries)[0].spec)
    return dict(schedule.trainings(config, entries, {"lora": 1e-2, "full": 1e-3})[0].spec)


def test_what_a_run_leaves(rows: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from veneer.evaluation import retention

    shipped = retention._shipped
    monkeypatch.setattr(retention, "_shipped", lambda name: shipped(name)[:4])
    found = worker.work(spec_of(tiny_folder), rows / "training")
    assert json.dumps(found)
    assert found["steps"] == 3
    assert (found["tests"]["test"]["rows"], found["tests"]["test"]["left_out"]) == (8, 4)
    assert found["tests"]["test"]["metric"] == "loss"
    assert len(found["tests"]["other"]["values"]) == len(found["tests"]["other"]["items"]) == 5
    assert min(found["tests"]["other"]["items"]) > 1  # tokens
    assert [point["step"] for point in found["course"]] == [0, 2, 3]
    assert found["course"][0]["forgotten"] == pytest.approx(0, abs=1e-6)
    assert found["course"][-1]["forgotten"] > 0
    assert found["forgetting"]["changes"]
    assert found["joules"] == pytest.approx(50 * found["seconds"]) or found["energy"] == "measured"
    assert 0 < found["seconds"] < 60
    assert found["stored"] > 1000
    base = worker.work(spec_of(tiny_folder, "base"), rows / "training")
    assert base["head"] is False
    assert base["tests"]["test"]["items"] == found["tests"]["test"]["items"]
    assert base["tests"]["test"]["values"] != found["tests"]["test"]["values"]


def test_answers_are_generated_only_for_metrics_that_need_them(rows: Path, tiny_folder: Path) -> None:
    settings = ("metric=exact_match", "task={max_new_tokens: 2}", "data.test_limit=3", "forgetting=false")
    found = worker.work(spec_of(tiny_folder, "base", *settings), rows / "training")
    assert found["tests"]["test"]["values"] == [0.0] * 3


def test_test_rows_that_all_occur_in_training(rows: Path, tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"all rows of train.jsonl occur in the training data"):
        worker.work(spec_of(tiny_folder, "base", "data.test=train.jsonl"), rows / "training")


def test_a_killed_comparison_goes_on(
    rows: Path, tiny_folder: Path, cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed in the middle: its processes end with it, what was finished is not run again, the rest is."""
    settings = {"base": str(tiny_folder), "entries": ["lora"], "output": "out", "seeds": 1, "forgetting": False}
    settings |= {"data": {"train": "train.jsonl", "test": "test.jsonl"}, "train": {"max_steps": 2}, "dtype": "float32"}
    Path("compare.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "veneer", "compare", "compare.yaml"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = Path("out/runs/plain-base/result.json")
    deadline = time.monotonic() + 240
    while not (first.exists() and Path("out/runs/lora-seed0/log.txt").exists()) and time.monotonic() < deadline:
        time.sleep(0.01)
    children = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert children
    psutil.wait_procs(children, timeout=60)
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    assert not Path("out/index.html").exists()
    before = first.stat().st_mtime_ns
    assert cli("compare", "compare.yaml", "--json") == 0
    out, err = capsys.readouterr()
    assert "1 of 3 runs are done already" in err
    assert err.count("done already") == 1
    assert first.stat().st_mtime_ns == before
    found = json.loads(out)
    assert {line["label"] for line in found["lines"]} == {"plain base", "lora", "full"}
    assert all(line["quality"]["mean"] > 0 for line in found["lines"])
    assert found["metric"] == "loss"
    for name in (report.JSON, report.CSV, report.MARKDOWN, report.HTML):
        assert Path("out", name).stat().st_size > 100
    assert not list(Path("out/runs").glob("*/training"))  # no weights are left behind


# What is found


def found_of(*overrides: str, quality: dict[str, float] = QUALITY, **more: Any) -> Findings:
    config, entries = read_config(*overrides)
    return analyse(made_up(config, entries, quality, **more))


def test_who_is_told_apart() -> None:
    found = found_of()
    lines = {line.label: line for line in found.lines}
    assert [line.label for line in found.lines] == ["full", "lora", "ia3", "head", "commonest answer"]
    assert lines["full"].standing == "best"
    assert lines["ia3"].standing == lines["lora"].standing == "within noise"
    assert lines["head"].standing == "behind"
    assert lines["commonest answer"].standing == ""
    assert lines["lora"].over["head"].low > 0
    assert lines["lora"].over["full"].low < 0 < lines["lora"].over["full"].high
    assert lines["lora"].quality is not None
    assert lines["lora"].quality.mean == pytest.approx(0.87, abs=0.04)
    assert (lines["lora"].seeds, lines["full"].baseline, lines["head"].baseline) == (3, "whole", "head")


def test_lower_losses_are_better() -> None:
    config, entries = read_config()
    done = made_up(config, entries, QUALITY)
    for each in done:
        for test in each.result["tests"].values():
            test["metric"] = "loss"
    found = analyse(done)
    assert [line.label for line in found.lines][:2] == ["commonest answer", "head"]
    lora = next(line for line in found.lines if line.label == "lora")
    assert lora.over["head"].high < 0  # better is more, whichever way the metric goes


def test_forgetting_is_compared_where_both_are_as_good() -> None:
    lora = next(line for line in found_of().lines if line.label == "lora")
    assert lora.matched is not None
    assert lora.matched.validation_loss == pytest.approx(0.1)  # lora's best; full went on to 0.09
    assert lora.matched.forgotten == pytest.approx(0.09)
    assert lora.matched.whole == pytest.approx(0.45)  # not the 0.455 it came to in the end
    stuck = {"course": [{"step": 0, "loss": 1.0, "forgotten": 0.0}, {"step": 5, "loss": 1.2, "forgotten": 0.3}]}
    assert next(line for line in found_of(lora=stuck).lines if line.label == "lora").matched is None


def told_of(*overrides: str, quality: dict[str, float] = QUALITY, **more: Any) -> list[str]:
    return [v.verdict for v in verdicts(found_of(*overrides, quality=quality, **more))]


ALIKE = {**QUALITY, "lora": 0.9, "ia3": 0.9, "full": 0.9}


def test_verdicts_on_claims() -> None:
    assert told_of("seeds=20", quality=ALIKE) == [HELD, UNKNOWN, UNKNOWN, HELD, HELD, HELD, HELD]
    assert told_of("seeds=20", quality=ALIKE | {"ia3": 0.6})[0] == PARTLY
    assert told_of(quality=ALIKE)[0] == UNKNOWN  # three seeds and 400 rows don't tell of two points
    apart = ("sizes={rows: [50]}", "data.out_of_domain={mails: c.csv}")
    assert told_of(*apart)[1:3] == [UNKNOWN, UNKNOWN]  # none is apart from full
    behind = {**QUALITY, "lora": 0.5, "ia3": 0.5}
    found = told_of(*apart, quality=behind)
    assert [found[0], *found[1:3]] == [FAILED, FAILED, FAILED]
    better = {**QUALITY, "full": 0.5}
    assert told_of(*apart, quality=better)[1:3] == [HELD, HELD]
    assert verdicts(found_of("baselines=false")) == []


def test_no_verdict_without_evidence() -> None:
    apart = ("sizes={rows: [50]}", "data.out_of_domain={mails: c.csv}", "seeds=1")
    assert told_of(*apart, quality=QUALITY | {"full": 0.5}) == [*[UNKNOWN] * 6, HELD]  # but for sizes of files
    short = {"seconds": 2.0}
    assert told_of(quality=ALIKE, full=short | {"seconds": 4.0}, lora=short, ia3=short)[4] == UNKNOWN


def test_losses_are_as_good_within_a_share_of_them() -> None:
    for loss, verdict in ((3.03, HELD), (3.09, FAILED)):
        config, entries = read_config()
        done = made_up(config, entries, QUALITY)
        for each in done:
            for test in each.result["tests"].values():
                ours = loss if each.run.entry in ("lora", "ia3") else 3.0
                noise = numpy.random.default_rng(each.run.spec["seed"]).normal(0, 0.01, ROWS)
                test |= {"metric": "loss", "values": (ours + noise).tolist()}
        assert verdicts(analyse(done))[0].verdict == verdict


def test_forgetting_less_is_told_by_seeds() -> None:
    """Two seeds of which one forgot more: no verdict, whatever the mean."""
    config, entries = read_config("seeds=2", "baselines=true")
    done = made_up(config, entries, QUALITY)
    for each in done:
        if each.run.kind == "main" and each.run.entry in ("lora", "ia3"):
            scale = 0.1 if each.run.spec["seed"] else 6.0
            course = each.result["course"]
            each.result["course"] = [{**point, "forgotten": scale * point["forgotten"]} for point in course]
    found = analyse(done)
    lora = next(line for line in found.lines if line.label == "lora")
    assert lora.matched is not None
    assert lora.matched.less.low < 0 < lora.matched.less.mean
    assert verdicts(found)[3].verdict == UNKNOWN


def test_rows_of_another_kind_are_compared_row_by_row() -> None:
    """Two accuracies whose own intervals overlap, but that differ on the same rows, always in one direction."""
    config, entries = read_config("data.out_of_domain={mails: c.csv}")
    done = made_up(config, entries, QUALITY)
    for each in done:
        random = numpy.random.default_rng(5)
        right = random.uniform(size=ROWS) < 0.7
        if each.run.entry in ("lora", "ia3"):
            right |= random.uniform(size=ROWS) < 0.15
        if "mails" in each.result["tests"]:
            each.result["tests"]["mails"]["values"] = right.astype(float).tolist()
    found = analyse(done)
    lora, full = (next(line for line in found.lines if line.label == label) for label in ("lora", "full"))
    assert lora.out_of_domain["mails"].low < full.out_of_domain["mails"].high
    assert lora.over_whole["mails"].low > 0
    assert verdicts(found)[2].verdict == HELD


def test_a_single_seed_is_said_to_be_one() -> None:
    """Where one run alone came out; the others are not compared with it as if it had been all of them."""
    config, entries = read_config()
    done = made_up(config, entries, QUALITY)
    failed = [Done(e.run, {"error": "no"}) if e.run.name in ("ia3-seed0", "ia3-seed1") else e for e in done]
    found = analyse(failed)
    ia3 = next(line for line in found.lines if line.label == "ia3")
    assert (ia3.seeds, ia3.standing, ia3.over["full"].seeds) == (1, "one seed", 1)
    assert found_of("seeds=1").lines[1].standing == "one seed"


def test_shares_stay_between_0_and_1() -> None:
    found = found_of("seeds=2", "data.out_of_domain={mails: c.csv}", quality=QUALITY | {"lora": 1.05, "ia3": 0.99})
    for line in found.lines:
        for shown in (line.quality, *line.out_of_domain.values()):
            assert shown is not None
            assert 0 <= shown.low <= shown.mean <= shown.high <= 1
    ends = [line.quality.high for line in found.lines if line.quality]
    assert 1.0 in ends
    assert "take three" in tables.summary(read_config("seeds=2")[0], found)


def test_times_of_seconds_are_told_in_seconds() -> None:
    shown = dict(tables.columns(found_of()))
    assert shown["time"][:2] == ["20.0 s", "10.0 s"]
    assert tables._time(61) == "1:01"
    assert "better than commonest answer by" in shown


def test_a_failed_entry_is_shown_and_the_others_compared() -> None:
    found = found_of(lora={"error": "TargetError: no such thing"})
    assert found.lines[-1].label == "lora"
    assert found.lines[-1].failed == ["TargetError: no such thing"]
    assert found.lines[-1].quality is None
    assert found.lines[0].standing == "best"


def test_runs_scored_on_other_rows_are_not_compared() -> None:
    config, entries = read_config()
    done = made_up(config, entries, QUALITY)
    for each in done:
        if each.run.entry == "lora":
            each.result["tests"]["test"]["items"] = [2] * ROWS
    lora = next(line for line in analyse(done).lines if line.label == "lora")
    assert not lora.over
    assert lora.standing == "no test"


def test_the_smallest_size_that_is_good_enough() -> None:
    """Ranks that differ in nothing else; the one whose alpha differs, too, is no part of the ladder."""
    entries = ", ".join(f"{{name: lora, rank: {rank}}}" for rank in (1, 2, 4, 8, 16))
    quality = {f"lora, rank {r}": 0.9 - 0.4 / r**1.5 for r in (1, 2, 4, 8, 16)} | QUALITY | {"other": 0.95}
    found = found_of(
        f"entries=[{entries}, {{label: other, method: {{name: lora, rank: 32, alpha: 1}}}}]", quality=quality
    )
    (ladder,) = found.ladders
    assert (ladder.method, ladder.setting, list(ladder.sizes)) == ("lora", "rank", [1, 2, 4, 8, 16])
    assert ladder.advised in (4, 8)
    assert ladder.limit == pytest.approx(max(ladder.quality), abs=0.02)
    assert found_of().ladders == []


def test_entries_that_differ_in_something_else_are_no_sizes() -> None:
    """Three of one rank say nothing about ranks, nor do three ranks of which one learned in another way."""
    rates = ", ".join(f"{{label: rate {n}, method: lora, train: {{learning_rate: {n}.0e-3}}}}" for n in (1, 2, 3))
    quality = QUALITY | {f"rate {n}": 0.8 for n in (1, 2, 3)}
    assert found_of(f"entries=[{rates}]", quality=quality).ladders == []
    ranks = [f"{{name: lora, rank: {rank}}}" for rank in (1, 2)]
    taught = "{label: taught, method: {name: lora, rank: 4}, distill: {teacher: base, weight: 0.3}}"
    quality = QUALITY | {"lora, rank 1": 0.7, "lora, rank 2": 0.8, "taught": 0.9}
    assert found_of(f"entries=[{', '.join(ranks)}, {taught}]", quality=quality).ladders == []
    alphas = [
        f"{{label: alpha {n}, method: {{name: lora, alpha: {n}}}, train: {{learning_rate: {n}.0e-3}}}}"
        for n in (1, 2, 4)
    ]
    quality = QUALITY | {f"alpha {n}": 0.8 for n in (1, 2, 4)}
    assert found_of(f"entries=[{', '.join(alphas)}]", quality=quality).ladders == []


# What is shown


@pytest.fixture
def shown(folder: Path) -> Path:
    config, entries = read_config(
        "sizes={rows: [50, 100]}", "search={}", "data.out_of_domain={'<mails> & more': c.csv}", "power=40"
    )
    report.write(config, made_up(config, entries, QUALITY, ia3={"warnings": ["x"]}))
    return folder / "out"


def test_files(shown: Path) -> None:
    found = json.loads((shown / report.JSON).read_text())
    assert {"config", "metric", "lines", "claims"} <= set(found)
    assert found["lines"][0]["sizes"].keys() == {"50", "100", "1000"}
    with (shown / report.CSV).open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["label"] for row in table] == ["full", "lora", "ia3", "head", "commonest answer"]
    assert float(table[0]["quality"]) == pytest.approx(found["lines"][0]["quality"]["mean"])
    text = (shown / report.MARKDOWN).read_text()
    assert "`full` has the best accuracy" in text
    assert "within noise of it" in text
    assert "| lora | 8" in text


def test_the_page_stands_alone(shown: Path) -> None:
    html = (shown / report.HTML).read_text()
    assert not re.search(r"https?://|<script|<link|url\(|@import|<img|src=", html)
    assert 'name="viewport"' in html
    assert "prefers-color-scheme: dark" in html
    assert "<mails>" not in html  # a name is text, whatever it holds
    assert "&lt;mails&gt; &amp; more" in html
    assert html.count("<svg") >= 9
    assert "nan" not in html.lower().replace("nance", "")


def test_a_page_of_nothing_but_failures(folder: Path) -> None:
    config, entries = read_config("baselines=false")
    failed = {"error": "went wrong", "tests": None}
    report.write(config, made_up(config, entries, QUALITY, lora=failed, ia3=failed))
    html = (folder / "out" / report.HTML).read_text()
    assert "No run has finished yet" in html
    assert "went wrong" in html


BROWSERS = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome")


@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_in_a_browser(shown: Path, width: int) -> None:
    """Nothing is wider than the screen, all charts have a size, and the console stays empty."""
    named = os.environ.get("VENEER_BROWSER") or next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if named is None:
        pytest.skip("no Chromium here; VENEER_BROWSER names one")
    look = """<script>addEventListener("load", () => { const d = document.documentElement;
      const sizes = [...document.querySelectorAll("svg")].map(s => s.getBoundingClientRect());
      d.dataset.found = JSON.stringify([d.scrollWidth <= innerWidth, sizes.every(s => s.width > 200 && s.height > 80)]);
    });</script></body>"""
    copy = shown / "looked-at.html"
    copy.write_text((shown / report.HTML).read_text().replace("</body>", look))
    command = [
        named,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
    ]
    command += [
        f"--user-data-dir={shown / 'profile'}",
        "--enable-logging=stderr",
        f"--window-size={width},900",
        "--dump-dom",
    ]
    done = subprocess.run([*command, copy.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found is not None
    assert found[1] == "[true,true]"
    assert "CONSOLE" not in done.stderr

"""What a run does while it goes: guards, checkpoints, interruptions, and going on to the same result."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensor

import veneer
from helpers import command, sums, write_jsonl
from veneer.errors import TrainingError
from veneer.storage import sha256
from veneer.tasks.base import Outcome
from veneer.tasks.causal_lm import CausalLM
from veneer.training.checkpoints import COMPLETE, Schedule, checkpoints
from veneer.training.guards import overfitting
from veneer.training.progress import Progress
from veneer.training.trainer import Trainer

OTHER = [{"prompt": "Name a stone.", "completion": "Quartz, or obsidian 1 it is."}]
"""What gets worse while sums are learned."""


@pytest.fixture
def data(folder: Path) -> Path:
    return write_jsonl(folder / "train.jsonl", sums(64))


@pytest.fixture(scope="module")
def settings(tiny_folder: Path) -> Callable[..., list[str]]:
    def of(output: object, **more: object) -> list[str]:
        settings = {
            "base": tiny_folder,
            "dtype": "float32",
            "data.train": "train.jsonl",
            "data.validation": 0.1,
            "output": output,
            "method.rank": 2,
            "method.dropout": 0.1,
            "train.samples": 0,
            "train.log_every": 1,
            "train.learning_rate": 1e-2,
            "train.epochs": 2,
            "train.evaluate_every": 4,
        } | {key.replace("__", "."): value for key, value in more.items()}
        return ["train", *(f"{key}={value}" for key, value in settings.items())]

    return of


@pytest.fixture
def arguments(settings: Callable[..., list[str]], data: Path) -> Callable[..., list[str]]:
    """The command line of a run on the rows in train.jsonl, with other settings as given."""
    return settings


@pytest.fixture(scope="module")
def whole(settings: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, object]:
    """The outcome of that run, uninterrupted."""
    path = tmp_path_factory.mktemp("uninterrupted")
    write_jsonl(path / "train.jsonl", sums(64))
    assert command(*settings(path / "whole", **{"data.train": path / "train.jsonl"})) == 0
    return outcome_of(path / "whole")


def outcome_of(run_folder: str | Path) -> tuple[str, object]:
    """The hash of a run's weights, and its held-out scores."""
    report = json.loads(Path(run_folder, "report.json").read_text())
    return sha256(Path(run_folder, "adapter", "adapter_model.safetensors")), report["after"]


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Have something happen, once, in the forward pass of a step (counted from 1)."""

    def set_up(step: int, happens: Callable[[], object]) -> None:
        original, done = Trainer.compute_loss, []

        def loss(self: Trainer, *args: object, **kwargs: object) -> object:
            if self.state.global_step + 1 == step and not done:
                done.append(step)
                happens()
            return original(self, *args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(Trainer, "compute_loss", loss)

    return set_up


class Cut(BaseException):
    """The process is gone: nothing after it runs but what the test does."""


def cut() -> None:
    raise Cut


# Stopping and going on


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_says_how_to_go_on_and_does(
    arguments: Callable[..., list[str]],
    whole: object,
    at_step: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    before = signal.getsignal(number)
    at_step(6, lambda: os.kill(os.getpid(), number))
    assert command(*arguments("cut")) == 130
    err = capsys.readouterr().err
    assert "Stopped at step 6 of 16, as asked. Saved in cut/checkpoint-6; the same command goes on from there." in err
    assert signal.getsignal(number) is before
    assert not Path("cut/adapter").exists()
    assert command(*arguments("cut")) == 0
    assert "Going on from step 6" in capsys.readouterr().err
    assert outcome_of("cut") == whole


def test_what_a_method_does_in_the_course_of_a_run_goes_on_too(
    arguments: Callable[..., list[str]], at_step: Callable[..., None]
) -> None:
    """AdaLoRA gathers sensitivities and cuts ranks by them: a resumed run cuts the same ones."""
    course = {"method": "{name: adalora, rank: 4, target_rank: 2, every: 2}"}

    def line(output: str) -> list[str]:
        return [part for part in arguments(output, **course) if not part.startswith("method.")]

    assert command(*line("whole")) == 0
    at_step(6, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert command(*line("cut")) == 130
    assert Path("cut/checkpoint-6/course.safetensors").exists()
    assert command(*line("cut")) == 0
    assert outcome_of("cut") == outcome_of("whole")
    values = load_file("cut/adapter/adapter_model.safetensors")
    scales = torch.cat([value for name, value in values.items() if name.endswith("lora_E")])
    assert int(scales.count_nonzero()) == len(scales) // 2


def test_a_second_signal_stops_at_once(
    arguments: Callable[..., list[str]], at_step: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(6, twice)
    assert command(*arguments("out")) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert [step for step, _ in checkpoints(Path("out"))] == [4]
    assert not Path("out/.lock").exists()


def test_ctrl_c_as_a_person_presses_it(arguments: Callable[..., list[str]]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "veneer", *arguments("out", train__epochs=200)], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if re.match(r"step +3/", line):
            process.send_signal(signal.SIGINT)
            break
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Stopping after this step, and saving" in err
    assert "the same command goes on from there" in err
    assert "Traceback" not in err
    assert len(checkpoints(Path("out"))) >= 1


def test_killed_twice_a_run_comes_to_the_same_result(arguments: Callable[..., list[str]]) -> None:
    more = {"train__checkpoint_every": 1, "train__epochs": 1, "train__keep_best": "false", "data__train": "more.jsonl"}
    write_jsonl(Path("more.jsonl"), sums(160))
    assert command(*arguments("whole", **more)) == 0
    line = [sys.executable, "-m", "veneer", *arguments("killed", **more)]
    for after in (3, 10):
        process = subprocess.Popen(line, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not any(step >= after for step, _ in checkpoints(Path("killed"))):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not Path("killed/adapter").exists()
    assert command(*line[3:]) == 0
    assert outcome_of("killed") == outcome_of("whole")
    assert sorted(path.name for path in Path("killed").iterdir()) == [
        "adapter",
        "config.yaml",
        "log.jsonl",
        "report.json",
    ]


@pytest.mark.slow
def test_killed_at_20_random_moments_a_real_run_comes_to_the_same_result(folder: Path) -> None:
    options = {
        "base": "minilm-l6",
        "data.train": "prompt-injections",
        "data.limit": 320,
        "data.validation": "prompt-injections",
        "data.validation_limit": 40,
        "method.rank": 4,
        "method.dropout": 0.1,
        "train.epochs": 2,
        "train.evaluate_every": 7,
        "train.checkpoint_every": 2,
        "task.max_length": 64,
    }
    line = [sys.executable, "-m", "veneer", "train", *(f"{key}={value}" for key, value in options.items())]
    subprocess.run([*line, "output=whole"], check=True, capture_output=True)
    chance = random.Random(0)
    kills = runs = 0
    while kills < 20:
        out = f"killed-{runs}"
        process = subprocess.Popen([*line, f"output={out}"], stderr=subprocess.DEVNULL)
        while not Path(out, "log.jsonl").exists() and process.poll() is None:
            time.sleep(0.01)
        try:
            process.wait(chance.uniform(0, 4))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        if process.returncode == 0:
            runs += 1
            assert outcome_of(out) == outcome_of("whole")
    last = subprocess.run([*line, f"output=killed-{runs}"], capture_output=True, text=True, check=False)
    assert last.returncode in (0, 2), last.stderr  # 2: it was finished already
    assert outcome_of(f"killed-{runs}") == outcome_of("whole")


def test_early_stopping_counts_across_an_interruption(
    arguments: Callable[..., list[str]], at_step: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(Path("other.jsonl"), OTHER)
    more = {"data__validation": "other.jsonl", "train__patience": 3, "train__evaluate_every": 1, "train__epochs": 5,
            "train__learning_rate": 0.05, "train__schedule": "constant"}  # fmt: skip
    assert command(*arguments("whole", **more)) == 0
    report = json.loads(Path("whole/report.json").read_text())
    assert report["steps"] == report["best_step"] + 3
    told = f"Stopped early at step {report['steps']} of 40: the validation loss has not been below"
    assert told in capsys.readouterr().err
    assert any(warning.startswith(told) for warning in report["warnings"])
    at_step(report["steps"], cut)
    with pytest.raises(Cut):
        command(*arguments("cut", **more))
    assert command(*arguments("cut", **more)) == 0
    assert json.loads(Path("cut/report.json").read_text())["steps"] == report["steps"]
    assert outcome_of("cut") == outcome_of("whole")


@pytest.mark.parametrize("more", [{"train__max_steps": 11}, {"train__patience": 1, "train__schedule": "constant"}])
def test_cut_off_between_the_last_step_and_the_end(
    arguments: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, more: dict[str, object]
) -> None:
    write_jsonl(Path("other.jsonl"), OTHER)
    more |= {"data__validation": "other.jsonl", "train__learning_rate": 0.05, "train__keep_best": "false"}
    assert command(*arguments("whole", **more)) == 0
    with monkeypatch.context() as patch:
        patch.setattr("veneer.training.folder.finish", lambda *_: cut())
        with pytest.raises(Cut):
            command(*arguments("cut", **more))
    assert command(*arguments("cut", **more)) == 0
    assert outcome_of("cut") == outcome_of("whole")
    ours, theirs = (json.loads(Path(name, "report.json").read_text()) for name in ("cut", "whole"))
    assert ours["steps"] == theirs["steps"] < 16
    assert ours["warnings"] == theirs["warnings"]


def test_changed_data_is_noticed(
    arguments: Callable[..., list[str]], at_step: Callable[..., None], capsys: pytest.CaptureFixture[str], data: Path
) -> None:
    at_step(6, cut)
    with pytest.raises(Cut):
        command(*arguments("out"))
    rows = data.read_text()
    data.write_text(rows.replace("What is 7 plus", "What was 7 plus"))
    assert command(*arguments("out")) == 2
    err = capsys.readouterr().err
    assert re.search(
        r"data changed since the run in out was started: the train data \(train.jsonl\).*other content", err
    )
    assert "Put back what was there, or choose another `output`" in err
    data.write_text(rows.replace("\n", "\n\n"))  # the same rows
    assert command(*arguments("out")) == 0


def test_a_damaged_checkpoint_is_left_out(
    arguments: Callable[..., list[str]],
    whole: object,
    at_step: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def damage(checkpoint: Path) -> None:
        content = bytearray((checkpoint / "optimizer.pt").read_bytes())
        content[len(content) // 2] ^= 1
        (checkpoint / "optimizer.pt").write_bytes(content)

    at_step(11, cut)
    with pytest.raises(Cut):
        command(*arguments("out", train__checkpoint_every=3))
    (best, last) = (path for _, path in checkpoints(Path("out")))
    damage(last)
    shutil.copytree("out", "kept")
    damage(best)
    assert command(*arguments("out", train__checkpoint_every=3)) == 2
    assert "No checkpoint in out is intact any more" in capsys.readouterr().err
    shutil.rmtree("out")
    os.rename("kept", "out")
    assert command(*arguments("out", train__checkpoint_every=3)) == 0
    err = capsys.readouterr().err
    assert f"{last} is damaged and left out" in err
    assert "Going on from step 8" in err
    assert outcome_of("out") == whole


# Checkpoints


def test_checkpoints_between_validations(
    arguments: Callable[..., list[str]], at_step: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    at_step(8, cut)
    with pytest.raises(Cut):
        command(*arguments("out", train__evaluate_every=5, train__checkpoint_every=3))
    assert [step for step, _ in checkpoints(Path("out"))] == [5, 6]  # the best, and the last
    at_step(8, cut)
    with pytest.raises(Cut):
        command(*arguments("by-time", train__evaluate_every=20, train__checkpoint_every="0 s"))
    assert len(checkpoints(Path("by-time"))) == 1
    for wrong in ("0", "often", "3 weeks"):
        assert command(*arguments("out", train__checkpoint_every=wrong)) == 2
        assert "train.checkpoint_every: " in (err := capsys.readouterr().err)
        assert "10 min" in err


def test_checkpoints_by_time_cost_little(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    now = [0.0]
    monkeypatch.setattr("veneer.training.checkpoints.time.monotonic", lambda: now[0])
    schedule = Schedule(60.0, lambda: 2.0)  # writing one takes 2 seconds: not more often than every 200
    saved = []
    for step in range(100):
        now[0] = 10.0 * step
        control = SimpleNamespace(should_save=False)
        schedule.on_step_end(None, SimpleNamespace(global_step=step), control)
        if control.should_save:
            saved.append(now[0])
            schedule.on_save(None, None, None)
    assert saved == [200.0, 400.0, 600.0, 800.0]


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    arguments: Callable[..., list[str]], whole: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer._save_rng_state

    def killed(self: Trainer, folder: str) -> None:
        if self.state.global_step == 8:
            shutil.copytree("out", "killed")  # as it lies on disk at that moment
        original(self, folder)

    monkeypatch.setattr(Trainer, "_save_rng_state", killed)
    assert command(*arguments("out")) == 0
    assert Path("killed/.checkpoint-8.new/adapter_model.safetensors").exists()
    assert [step for step, _ in checkpoints(Path("killed"))] == [4]
    os.rename("out", "elsewhere")
    os.rename("killed", "out")
    assert command(*arguments("out")) == 0
    assert outcome_of("out") == whole
    assert not list(Path("out").glob(".checkpoint*"))


# Losses


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[torch.nn.Module, torch.Tensor, int], object]], None]:
    """Have the loss of a batch be what a function of model, loss and longest row makes of it."""

    def set_up(change: Callable[[torch.nn.Module, torch.Tensor, int], object]) -> None:
        original = CausalLM.outcome

        def outcome(self: CausalLM, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Outcome:
            found = original(self, model, batch)
            if isinstance(found.loss, FakeTensor):  # the rehearsal of a step, which has no numbers
                return found
            loss = change(model, found.loss, int(batch["attention_mask"].sum(1).max()))
            return Outcome(loss, found.items, found.correct)  # type: ignore[arg-type]

        monkeypatch.setattr(CausalLM, "outcome", outcome)

    return set_up


def test_a_loss_that_is_no_number_names_step_rows_and_cause(
    arguments: Callable[..., list[str]], spoil: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = sums(64)
    rows[40] = {"prompt": "Poison. " + str(rows[40]["prompt"]) + " Please." * 6, "completion": "1"}
    write_jsonl(Path("train.jsonl"), rows)
    spoil(lambda model, loss, longest: loss * float("nan" if longest > 55 else 1))
    more = {"data__validation": 0, "train__group_by_length": "false", "train__checkpoint_every": 1}
    assert command(*arguments("out", **more)) == 2
    err = capsys.readouterr().err
    found = re.search(r"The loss is nan at step (\d+), at a learning rate of", err)
    assert found is not None, err
    assert "Likely cause: something in these rows, since the others of the batch are fine" in err
    assert err.count("train.jsonl, line 41: 'Poison. What is 40") == 1
    assert err.count("  train.jsonl, line ") == 1
    last = int(found[1]) - 1
    assert last > 0, "choose another seed"
    assert [step for step, _ in checkpoints(Path("out"))] == [last]
    assert f"The last good checkpoint, of step {last}, is kept" in err
    told = re.search(r"with other settings: veneer (train .*) output=ANOTHER$", err.strip())
    assert told is not None
    assert command("generate", "x", "--adapter", "out") == 2
    assert f"It holds an unfinished run; of that, checkpoint-{last} can be taken" in capsys.readouterr().err
    capsys.readouterr()
    write_jsonl(Path("train.jsonl"), sums(64))
    assert command(*told[1].split(), "output=next") == 0


def test_a_gradient_that_is_no_number_is_never_applied(tiny_folder: Path, spoil: Callable[..., None]) -> None:
    adapter = veneer.load_base(tiny_folder, dtype="float32").attach(veneer.LoRA(rank=2))
    # The square root of 0 is 0, with a gradient of 0 / 0.
    spoil(lambda model, loss, longest: loss + (next(iter(model.parameters())) * 0).square().sqrt().sum())
    with pytest.raises(TrainingError, match=r"gradient's norm is nan at step 1") as raised:
        veneer.train(adapter, sums(16), validation=0, group_by_length=False)
    assert len(raised.value.rows) == 8
    assert all(bool(parameter.isfinite().all()) for parameter in adapter.parameters())


def test_a_loss_that_runs_away_ends_the_run(
    arguments: Callable[..., list[str]], spoil: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def grown(model: torch.nn.Module, loss: torch.Tensor, longest: int) -> torch.Tensor:
        seen.append(longest)
        return loss * (4 if len(seen) > 25 or len(seen) == 22 else 1)  # a single odd batch is none

    spoil(grown)
    assert command(*arguments("out", data__validation=0, train__checkpoint_every=1, train__epochs=8)) == 2
    err = capsys.readouterr().err
    assert re.search(r"The loss has run away: it is [\d.]+ at least, in the steps up to 35, after [\d.]+ at first", err)
    assert "learning rate that is too high" in err
    assert "To start again with a lower one (lora's usual is 0.0005): veneer train out/config.yaml" in err
    assert [step for step, _ in checkpoints(Path("out"))] == [34]


def test_a_learning_rate_far_too_high_is_told_as_that(
    arguments: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """At the default of a log every ten steps: by validation, before that is saved; no row is blamed."""
    more = {"train__learning_rate": 1e3, "train__log_every": 10, "train__evaluate_every": 4}
    assert command(*arguments("out", **more)) == 2
    err = capsys.readouterr().err
    assert re.search(r"The (loss|validation loss|gradient's norm) (has run away|is (nan|inf))", err)
    assert "learning rate" in err
    assert "The rows of the batch" not in err
    assert "train.learning_rate=5e-04 output=ANOTHER" in err
    assert checkpoints(Path("out")) == []


def test_overfitting_is_noticed(arguments: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(Path("other.jsonl"), OTHER)
    more = {"data__validation": "other.jsonl", "train__learning_rate": 0.02, "train__schedule": "constant",
            "train__epochs": 5}  # fmt: skip
    assert command(*arguments("out", **more), "--json") == 0
    out, err = capsys.readouterr()
    (told,) = json.loads(out)["warnings"]
    assert re.match(r"overfitting: the validation loss rose from [\d.]+ at step \d+ to [\d.]+, while", told)
    assert "are kept" in told
    assert "train.patience=2" in told
    assert err.count("overfitting") == 2  # when it is noticed, and in the end
    assert command(*arguments("fine"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["warnings"] == []


def test_a_loss_that_rises_everywhere_is_no_overfitting() -> None:
    def history(*trained: float) -> list[dict[str, float]]:
        both = zip(trained, (2.0, 1.0, 1.5, 1.6), strict=True)
        return [entry for step, (loss, held_out) in enumerate(both, start=1) for entry in (
            {"step": step, "loss": loss}, {"step": step, "eval_loss": held_out})]  # fmt: skip

    assert overfitting(history(2.0, 1.0, 0.9, 0.8), keep_best=True)
    assert "are kept" not in str(overfitting(history(2.0, 1.0, 0.9, 0.8), keep_best=False))
    assert overfitting(history(2.0, 1.0, 1.1, 1.2), keep_best=True) is None
    assert overfitting(history(2.0, 1.0, 0.9, 0.8)[:-2], keep_best=True) is None  # one sign is none


# The folder


def test_two_runs_in_one_folder(arguments: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    line = [sys.executable, "-m", "veneer", *arguments("out", train__epochs=1000)]
    first = subprocess.Popen(line, stderr=subprocess.DEVNULL)
    try:
        while not Path("out/log.jsonl").exists():
            assert first.poll() is None
            time.sleep(0.02)
        assert command(*arguments("out")) == 2
        assert "Another run is at work in out" in capsys.readouterr().err
        assert first.poll() is None
        assert Path("out/.lock").exists()
    finally:
        first.kill()
        first.wait()


def test_a_folder_that_vanishes(
    arguments: Callable[..., list[str]], at_step: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, more in (("a", {}), ("b", {"train__log_every": 100, "train__checkpoint_every": 1})):
        at_step(6, lambda name=name: shutil.rmtree(name))  # type: ignore[misc]
        assert command(*arguments(name, **more)) == 2
        err = capsys.readouterr().err
        assert f"The folder {name} has vanished during the run" in err
        assert "Traceback" not in err
        assert not Path(name).exists()


def test_a_full_disk(
    arguments: Callable[..., list[str]], whole: object, at_step: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    free = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_step(6, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, free[1])))
    try:
        assert command(*arguments("out")) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, free)
    err = capsys.readouterr().err
    assert re.search(r"error: Writing .*out/checkpoint-8 failed \(.*\). Free some space", err), err
    assert "Traceback" not in err
    assert [path.name for path in Path("out").glob("*checkpoint*")] == ["checkpoint-4"]
    assert command(*arguments("out")) == 0
    assert outcome_of("out") == whole


def test_a_folder_that_cannot_be_written(
    arguments: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*arguments("/proc/no/run")) == 2
    assert "Cannot write into /proc/no/run" in capsys.readouterr().err
    assert command(*arguments("train.jsonl")) == 2
    assert "train.jsonl is a file; `output` is to be a folder" in capsys.readouterr().err
    assert Path("train.jsonl").is_file()


def test_a_run_that_never_began_leaves_no_folder(
    arguments: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*arguments("deep/in/out", data__train="none.jsonl")) == 2
    assert not Path("deep").exists()
    assert COMPLETE not in capsys.readouterr().err


@pytest.mark.parametrize("resumed_at", [None, 2])
def test_speed_and_time_left_are_told_by_steps_alone(
    resumed_at: int | None, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without validations, samples and checkpoints; and without the first step as soon as there are others."""
    now, tokens = 0.0, 0
    log = folder / "log.jsonl"
    log.write_text('{"step": 2, "tokens": 50, "places": 80, "seconds": 7}\n')
    monkeypatch.setattr("veneer.training.progress.time.perf_counter", lambda: now)
    progress = Progress(log, lambda: (tokens, 2 * tokens), resumed_at)
    state = SimpleNamespace(global_step=resumed_at or 0, max_steps=4 + (resumed_at or 0))

    def step(seconds: float) -> str:
        nonlocal now, tokens
        progress.on_step_begin(None, state, None)
        now, tokens, state.global_step = now + seconds, tokens + 100, state.global_step + 1
        progress.on_step_end(None, state, None)
        now += 3  # a checkpoint
        progress.on_log(None, state, None, {"loss": 1.0})
        return capsys.readouterr().err

    progress.on_train_begin(None, state, None)
    progress.on_log(None, state, None, {"eval_loss": 1.0, "eval_runtime": 60.0})
    now = 90.0  # with samples
    assert re.search(" 10 tokens/s .*0:30 left", step(10))
    assert re.search(" 50 tokens/s .*0:04 left", step(2))
    now += 50
    progress.on_log(None, state, None, {"eval_loss": 1.0, "eval_runtime": 5.0})
    assert re.search(" 25 tokens/s .*0:04 left", step(6))
    assert (progress.tokens, progress.places, progress.seconds) == ((350, 680, 174) if resumed_at else (300, 600, 167))

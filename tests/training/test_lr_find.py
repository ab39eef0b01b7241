"""The range test reads curves as documented, finds a rate that learns, and leaves everything as it was."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import veneer
from helpers import sums, write_jsonl
from veneer.cli.plot import text_plot
from veneer.data import read
from veneer.errors import ConfigError
from veneer.tasks.causal_lm import CausalLM
from veneer.training.lr_find import _Recorder, find_learning_rate
from veneer.training.lr_find import read as read_curve
from veneer.training.settings import TrainSettings

RATES = [10 ** (-6 + 6 * step / 99) for step in range(100)]


def falling(at: float, rate: float) -> float:
    """A loss that falls from 3 to 1, fastest around ``at``."""
    return 2 - math.tanh(2 * (math.log10(rate) - math.log10(at)))


def test_the_steepest_descent_is_found() -> None:
    curve = read_curve(RATES, [falling(1e-3, rate) for rate in RATES], 5e-4, False)
    assert curve.steepest == pytest.approx(1e-3, rel=0.15)
    assert curve.suggestion == pytest.approx(1e-3, rel=0.31)  # rounded down to 1, 1.5, 2, 3, 5 or 7
    assert curve.diverged_at is None


def test_the_suggestion_keeps_its_distance_from_the_explosion() -> None:
    rates = [rate for rate in RATES if rate < 4e-3]
    losses = [falling(1e-3, rate) for rate in rates[:-1]] + [50.0]
    curve = read_curve(rates, losses, 5e-4, True)
    assert curve.diverged_at == rates[-1]
    assert curve.suggestion is not None
    assert curve.suggestion <= rates[-1] / 10 < (curve.steepest or 0)


def test_noise_suggests_nothing() -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        noise = (torch.randn(100, generator=generator) * 0.2 + 3).tolist()
        assert read_curve(RATES, noise, 5e-4, False).suggestion is None, seed
    assert read_curve(RATES, [3 + step / 50 for step in range(100)], 5e-4, False).suggestion is None


def test_four_times_the_lowest_loss_is_an_explosion() -> None:
    control = transformers.TrainerControl()
    recorder = _Recorder()
    for loss in [3.0] * 20 + [2.0] * 20 + [6.0] * 5:
        recorder.on_log(None, None, control, {"loss": loss})
    assert not recorder.exploded
    assert not control.should_training_stop
    for _ in range(3):
        recorder.on_log(None, None, control, {"loss": 9.0})
    assert recorder.exploded
    assert control.should_training_stop


@pytest.fixture
def adapter(tiny_folder: Path) -> veneer.Adapter:
    return veneer.load_base(tiny_folder, dtype="float32").attach(veneer.LoRA(rank=4), "t")


def states(adapter: veneer.Adapter) -> list[torch.Tensor]:
    return [value.clone() for module in (adapter, adapter.base.model) for value in module.state_dict().values()]


def test_it_learns_best_where_it_says_and_leaves_no_trace(adapter: veneer.Adapter) -> None:
    before = states(adapter)
    rows = read(sums(40))
    task = CausalLM.for_rows(rows, adapter.base)
    curve = find_learning_rate(adapter, task, rows, TrainSettings(batch_size=4), steps=60)
    assert all(torch.equal(old, new) for old, new in zip(before, states(adapter), strict=True))
    assert all(parameter.grad is None for parameter in adapter.parameters())
    assert not adapter.training
    assert curve.rates[0] == pytest.approx(curve.prior / 1000)
    assert curve.suggestion is not None
    losses = {}
    for rate in (curve.suggestion, curve.suggestion / 300):
        adapter.load_state_dict(dict(zip(adapter.state_dict(), before, strict=False)))
        result = veneer.train(adapter, sums(40), validation=sums(8), epochs=1, learning_rate=rate, samples=0)
        assert result.after is not None
        losses[rate] = result.after["loss"]
    assert losses[curve.suggestion] < losses[curve.suggestion / 300] - 0.3


def test_an_explosion_ends_it(adapter: veneer.Adapter) -> None:
    rows = read(sums(40))
    task = CausalLM.for_rows(rows, adapter.base)
    curve = find_learning_rate(
        adapter, task, rows, TrainSettings(max_grad_norm=0, batch_size=4), low=1, high=1e30, steps=40
    )
    assert curve.diverged_at is not None
    assert len(curve.rates) == len(curve.losses) < 40
    assert all(torch.isfinite(value).all() for value in adapter.state_dict().values())


def test_settings_that_show_nothing(adapter: veneer.Adapter) -> None:
    rows = read(sums(8))
    task = CausalLM.for_rows(rows, adapter.base)
    with pytest.raises(ConfigError, match=r"low is 1 and high is 0\.1"):
        find_learning_rate(adapter, task, rows, low=1, high=0.1)
    with pytest.raises(ConfigError, match="at least 20 steps"):
        find_learning_rate(adapter, task, rows, steps=5)


def test_a_plot_of_plain_characters() -> None:
    drawn = text_plot([1e-4, 1e-3, 1e-2], [3.0, 2.0, 1.0], {"suggested": 1e-3}, width=21, height=3)
    lines = drawn.splitlines()
    assert [line.index("*") - 10 for line in lines[:3]] == [0, 10, 20]
    assert lines[4].index("s") - 10 == 10
    assert drawn.isascii()


def test_the_command(
    folder: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], cli: Callable[..., int]
) -> None:
    write_jsonl(folder / "train.jsonl", sums(40))
    options = [
        f"base={tiny_folder}",
        "dtype=float32",
        "data.train=train.jsonl",
        "data.validation=0",
        "train.batch_size=4",
    ]
    assert cli("lr-find", *options, "method.rank=4", "--steps", 40, "--plot", "curve.svg", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["method_default"] == veneer.LoRA.learning_rate
    assert found["suggestion"] > 0
    assert len(found["points"]) == 40
    assert ElementTree.parse("curve.svg").getroot().tag.endswith("svg")
    assert {path.name for path in folder.iterdir()} == {"train.jsonl", "curve.svg"}
    assert cli("lr-find", *options, "method=ia3", "--steps", 20) == 0
    out = capsys.readouterr().out
    assert "default    0.003, what ia3 starts with" in out
    assert "suggested  " in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Nothing to test yet"),
        (["base=x", "data.train=y", "--plot", "c.png"], "give a file that ends in .svg"),
        (["base=x", "data.train=y", "method.rnk=1"], "method.rnk"),
        (["none.yaml"], "Cannot read the config none.yaml"),
        (["base=x", "data.train=nowhere.jsonl"], "There is no data file nowhere.jsonl"),
        (["base=x", "data.train=y", "--steps", "0"], "Invalid value"),
    ],
)  # fmt: skip
def test_mistakes(
    folder: Path, capsys: pytest.CaptureFixture[str], cli: Callable[..., int], arguments: list[str], message: str
) -> None:
    assert cli("lr-find", *arguments) == 2
    out, err = capsys.readouterr()
    assert message in err + out
    assert "Traceback" not in err
    assert not list(folder.iterdir())

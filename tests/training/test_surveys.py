"""Runs of methods that look at data first, or settle at the end: started, cut off, resumed, continued, reproduced."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_during import at_step, outcome_of  # noqa: F401

import veneer
from helpers import command, sums, write_jsonl
from veneer.methods import method_class
from veneer.methods.entries import VALUES
from veneer.tasks import task_class
from veneer.training.lr_find import find_learning_rate
from veneer.training.survey import RowSurvey

METHODS = {
    "fish": "{name: fish, share: 0.01, examples: 8, targets: [q, v]}",
    "eva": "{name: lora, rank: 3, init: eva, examples: 8, targets: [q, down]}",
    "diff-pruning": "{name: diff-pruning, density: 0.02, targets: [q, v]}",
    "full": "full",
    "mix": "{name: mix, methods: [{name: fish, share: 0.01, examples: 8, targets: [q, v]}, norm]}",
}


@pytest.fixture
def line(tiny_folder: Path, folder: Path) -> Callable[..., list[str]]:
    write_jsonl(folder / "train.jsonl", sums(48))

    def of(name: str, output: str, **more: object) -> list[str]:
        settings = {
            "base": tiny_folder,
            "dtype": "float32",
            "data.train": "train.jsonl",
            "data.validation": 0.1,
            "output": output,
            "method": METHODS[name],
            "train.samples": 0,
            "train.epochs": 2,
            "train.evaluate_every": 4,
        }
        return ["train", *(f"{key}={value}" for key, value in (settings | more).items())]

    return of


def weights(output: str) -> dict[str, torch.Tensor]:
    return load_file(f"{output}/adapter/adapter_model.safetensors")


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("eva", 3),
        ("diff-pruning", 9),
        *(
            pytest.param(*slow, marks=pytest.mark.slow)
            for slow in (("fish", 3), ("diff-pruning", 3), ("full", 5), ("mix", 3))
        ),
    ],
)
def test_a_run_that_is_cut_off_goes_on_to_the_same_bits(
    line: Callable[..., list[str]],
    at_step: Callable[..., None],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    name: str,
    step: int,
) -> None:
    assert command(*line(name, "whole")) == 0
    looked = "looks at the data" in capsys.readouterr().err
    assert looked == (name in ("fish", "eva", "mix"))
    at_step(step, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert command(*line(name, "cut")) == 130
    capsys.readouterr()
    assert command(*line(name, "cut")) == 0
    told = capsys.readouterr().err
    assert "looks at the data" not in told  # the checkpoint's tensors are taken
    assert ("now trains" in told) == (name in ("fish", "eva", "mix"))
    assert outcome_of("cut") == outcome_of("whole")
    assert (
        json.loads(Path("cut/adapter/veneer.json").read_text())["method"]
        == (json.loads(Path("whole/adapter/veneer.json").read_text())["method"])
    )


@pytest.mark.parametrize(
    "name", ["fish", *(pytest.param(slow, marks=pytest.mark.slow) for slow in ("eva", "diff-pruning"))]
)
def test_a_run_is_reproduced_and_continued(
    line: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert command(*line(name, "first")) == 0
    assert command("train", "--reproduce", "first", "output=again") == 0
    assert outcome_of("again") == outcome_of("first")
    capsys.readouterr()
    before, config = weights("first"), [part for part in line(name, "more") if not part.startswith("method=")]
    assert command(*config, "--continue", "first") == 0
    assert "looks at the data" not in capsys.readouterr().err
    after = weights("more")
    assert {key: value.shape for key, value in after.items()} == {key: value.shape for key, value in before.items()}
    assert all(torch.equal(after[key], before[key]) for key in before if "indices" in key)
    assert any(not torch.equal(after[key], before[key]) for key in before)


def test_diff_pruning_ends_in_as_many_numbers_as_asked_for(line: Callable[..., list[str]]) -> None:
    assert command(*line("diff-pruning", "out")) == 0
    found = weights("out")
    assert {key.rpartition(".")[2] for key in found} == {"sparse_values", "sparse_indices"}
    total = 2 * (32 * 32 + 16 * 32)
    assert sum(value.numel() for key, value in found.items() if VALUES in key) == round(0.02 * total)
    report = json.loads(Path("out/report.json").read_text())
    assert report["best_step"] >= 6  # the weights of the first phase are no result
    assert command("eval", "out", "data=train.jsonl") in (0, 2)


def test_what_is_trained_is_told_once_it_is_known(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = veneer.load_base(str(tiny_folder), dtype=torch.float32)
    members = [{"name": "lora", "rank": 4, "init": "eva", "examples": 4, "rho": 3}, "norm"]
    mix = base.attach(method_class("mix")(methods=members), "a")
    before = mix.trainable
    veneer.train(mix, sums(8), validation=0, max_steps=1, samples=0)
    told = " ".join(capsys.readouterr().err.split())
    assert mix.trainable != before
    assert f"mix trains about {before:,} (" in told
    assert f"lora looks at the data before the first step mix now trains {mix.trainable:,} numbers" in told


def test_fish_trains_as_many_entries_before_its_look(adapter: veneer.Adapter) -> None:
    more = adapter.base.attach(method_class("fish")(share=0.01, examples=4, targets=["q", "down"]), "b")
    before = more.trainable
    assert before == round(0.01 * sum(site.in_features * site.out_features for site in more.sites))
    veneer.train(more, sums(8), validation=0, max_steps=1, samples=0)
    assert more.trainable == before


@pytest.fixture
def adapter(tiny_folder: Path) -> veneer.Adapter:
    base = veneer.load_base(str(tiny_folder), dtype=torch.float32)
    return base.attach(method_class("fish")(share=0.01, examples=4, targets="q"), "a")


def test_a_range_test_leaves_no_trace(adapter: veneer.Adapter) -> None:
    from datasets import Dataset

    task = task_class("causal-lm").for_rows(None, adapter.base)
    before = {key: value.clone() for key, value in adapter.state_dict().items()}
    find_learning_rate(adapter, task, Dataset.from_list(sums(8)), steps=20)
    assert adapter.unsurveyed
    after = adapter.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    veneer.train(adapter, sums(8), validation=0, epochs=1, samples=0)
    assert not adapter.unsurveyed
    assert any(adapter.state_dict()[key].shape != before[key].shape for key in before)


def test_inputs_leave_padding_out(adapter: veneer.Adapter) -> None:
    """As many vectors as tokens; those of a map are what it is given for the row alone."""
    from datasets import Dataset

    task = task_class("causal-lm").for_rows(None, adapter.base)
    prepared = task.prepare(Dataset.from_list(sums(5)), adapter.base.tokenizer)
    survey = RowSurvey(adapter, task, prepared, 3, seed=0)
    found = list(survey.inputs(adapter.sites[:1], 5))
    lengths = [prepared.examples[index]["length"] for index in survey.order]
    path = adapter.sites[0].path
    hooks = len(adapter.base.model.get_submodule(path)._forward_pre_hooks)
    assert [len(batch[path]) for batch in found] == [sum(lengths[:3]), sum(lengths[3:])]
    assert len(set(lengths)) > 1
    seen = []
    module = adapter.base.model.get_submodule(path)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].clone()))
    with torch.no_grad():
        for index in survey.order:
            adapter.base.model(input_ids=torch.tensor([prepared.examples[index]["input_ids"]]))
    handle.remove()
    assert len(module._forward_pre_hooks) == hooks == 1
    assert torch.allclose(torch.cat([batch[path] for batch in found]), torch.cat(seen), atol=1e-5)


def test_gradients_leave_the_base_frozen(adapter: veneer.Adapter) -> None:
    from datasets import Dataset

    task = task_class("causal-lm").for_rows(None, adapter.base)
    prepared = task.prepare(Dataset.from_list(sums(3)), adapter.base.tokenizer)
    adapter.train()
    found = list(RowSurvey(adapter, task, prepared, 3, seed=0).gradients(adapter.sites, 2))
    assert len(found) == 2
    assert all(gradients[site.path].abs().max() > 0 for gradients in found for site in adapter.sites)
    own = dict(adapter.base.model.named_parameters())
    assert not any(p.requires_grad or p.grad is not None for name, p in own.items() if "veneer_adapters" not in name)
    assert adapter.training

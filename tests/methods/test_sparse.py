"""FISH mask and diff pruning: what is chosen is what the papers say, and what isn't chosen never moves."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import veneer
from helpers import command, perturb, sums, tiny_llama
from veneer.errors import AdapterFileError, ConfigError, VeneerWarning
from veneer.methods import method_class
from veneer.methods.diff_pruning import DiffPruning, Pruning, gate, opening
from veneer.methods.entries import INDICES, VALUES, greatest

IDS = torch.arange(2 * 9).view(2, 9) + 3
PLACES = ("q", "down")


def moved(adapter: veneer.Adapter) -> dict[str, torch.Tensor]:
    """Which entries of each weight or bias the merged model has otherwise than the base."""
    base, merged = adapter.base.model, adapter.merged()
    own = {name for name, _ in merged.named_parameters()}
    return {n: p != merged.get_parameter(n) for n, p in base.named_parameters() if n in own}


# FISH


@pytest.fixture
def fished(tiny_folder: Path) -> veneer.Adapter:
    base = veneer.load_base(str(tiny_folder), dtype=torch.float32)
    return base.attach(method_class("fish")(share=0.01, targets=PLACES, examples=5), "a")


def brute_force(adapter: veneer.Adapter, rows: list[dict[str, object]]) -> dict[str, torch.Tensor]:
    """Squares of the gradients of single examples, summed, by torch alone."""
    task = veneer.tasks.task_class("causal-lm").for_rows(None, adapter.base)
    fisher: dict[str, torch.Tensor] = {}
    model = adapter.base.model
    weights = {site.path: model.get_submodule(site.path).weight for site in adapter.sites}
    for weight in weights.values():
        weight.requires_grad_(True)
    for row in rows:
        (example,) = task.encode(row, adapter.base.tokenizer)
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])
        logits = model(input_ids=ids).logits[0, :-1]
        learned = labels[1:] != -100
        F.nll_loss(logits.log_softmax(-1)[learned], labels[1:][learned], reduction="sum").backward()
        for path, weight in weights.items():
            fisher[path] = fisher.get(path, 0) + weight.grad.square()
            weight.grad = None
    for weight in weights.values():
        weight.requires_grad_(False)
    return fisher


def test_the_mask_is_that_of_per_example_gradients(fished: veneer.Adapter) -> None:
    rows = sums(5)
    fisher = brute_force(fished, rows)
    veneer.train(fished, rows, validation=0, epochs=1, batch_size=2, samples=0)
    total = sum(value.numel() for value in fisher.values())
    k = round(0.01 * total)
    flat = torch.cat([value.flatten() for value in fisher.values()])
    expected = torch.zeros(total, dtype=torch.bool)
    expected[flat.topk(k).indices] = True
    found = []
    for site in fished.sites:
        chosen = torch.zeros(site.out_features, site.in_features, dtype=torch.bool)
        own = fished.parameters_at(site.path)
        chosen[own[INDICES][0].long(), own[INDICES][1].long()] = True
        found.append(chosen.flatten())
        assert len(own[VALUES]) == int(chosen.sum())
    assert torch.equal(torch.cat(found), expected)
    assert fished.trainable == k
    assert len({len(fished.parameters_at(site.path)[VALUES]) for site in fished.sites}) > 1


def test_what_is_not_in_the_mask_never_moves(fished: veneer.Adapter) -> None:
    rows = sums(16)
    veneer.train(fished, rows, validation=0, epochs=3, batch_size=4, samples=0, weight_decay=0.3, learning_rate=0.01)
    changed = moved(fished)
    for site in fished.sites:
        mask = torch.zeros(site.out_features, site.in_features, dtype=torch.bool)
        mask[tuple(fished.parameters_at(site.path)[INDICES].long())] = True
        assert not (changed.pop(f"{site.path}.weight") & ~mask).any()
    assert not any(value.any() for value in changed.values())
    assert all(value.all() for s in fished.sites if len(value := fished.parameters_at(s.path)[VALUES]))


def test_a_loop_of_ones_own_is_told_that_nothing_was_looked_at() -> None:
    adapter = veneer.Base(tiny_llama()).attach(method_class("fish")(), "a").train()
    with pytest.warns(VeneerWarning, match="fish looks at the data .* veneer.train"):
        adapter(input_ids=IDS)
    adapter(input_ids=IDS)  # once is enough


def test_as_many_as_asked_for_even_among_equals() -> None:
    scores = {"a": torch.zeros(3, 4), "b": torch.tensor([[2.0, 0, 5], [0, 0, 0]]), "c": torch.full((2,), 1.0)}
    chosen = greatest(scores, 6)
    assert sum(len(found) for found in chosen.values()) == 6
    assert {0, 2} <= set(chosen["b"].tolist())
    assert chosen["c"].tolist() == [0, 1]
    assert {name: found.tolist() for name, found in greatest(scores, 1).items()} == {"a": [], "b": [2], "c": []}


# Diff pruning


def pruning(**settings: object) -> veneer.Adapter:
    chosen = {"density": 0.02, "targets": PLACES, "first_phase": 0.5, **settings}
    model = tiny_llama(attention_bias=True).double()
    return veneer.Base(model).attach(DiffPruning(**chosen), "a").double()


def course_of(adapter: veneer.Adapter, steps: int) -> Pruning:
    course = adapter.method.course({site.path: adapter.parameters_at(site.path) for site in adapter.sites}, steps)
    assert isinstance(course, Pruning)
    return course


def trained(adapter: veneer.Adapter, steps: int = 8, stop: int | None = None) -> list[torch.Tensor]:
    """Trained by AdamW with decay; all differences after each step, as the forward sees them."""
    course = course_of(adapter, steps)
    rates = adapter.rates
    groups = [{"params": [p], "lr": 1e-2 * rates[key]} for key, p in adapter.named_parameters()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    adapter.train()
    torch.manual_seed(0)
    seen = []
    for step in range(1, (stop or steps) + 1):
        loss = F.cross_entropy(adapter(input_ids=IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        loss = loss + course.penalty() if course.penalty() is not None else loss
        loss.backward()
        course.before_step(step)
        optimizer.step()
        course.after_step(step)
        optimizer.zero_grad()
        deltas = adapter.lower()
        seen.append(torch.cat([value.detach().flatten() for d in deltas.values() for value in d.deltas.values()]))
    adapter.eval()
    return seen


@pytest.mark.parametrize("alpha", [-2.0, 0.0, 1.5, 5.0])
def test_gates_open_as_often_as_the_formula_says(alpha: float) -> None:
    torch.manual_seed(0)
    n = 200_000
    z = gate(torch.full((n,), alpha), drawn=True)
    p = float(opening(torch.tensor(alpha)))
    assert z.min() >= 0
    assert z.max() <= 1
    assert float((z > 0).double().mean()) == pytest.approx(p, abs=4 * (p * (1 - p) / n) ** 0.5)
    assert p == pytest.approx(1 / (1 + math.exp(-alpha)), rel=1e-6)  # log(−l / r) is 0


def test_the_expected_count_is_the_mean_of_counts() -> None:
    adapter = pruning(alpha=0.5)
    course = course_of(adapter, 8)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in adapter.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise * 0.8 if "alpha" in key else 1 + noise.abs())
    expected = float(course.expected_count().detach())
    by_hand = 0.0
    for site in adapter.sites:
        own = adapter.parameters_at(site.path)
        for name in ("weight", "bias") if site.role == "q" else ("weight",):
            by_hand += float((own[f"{name}.alpha"].sigmoid() * own[f"{name}.alpha_group"].sigmoid()).sum().detach())
    assert expected == pytest.approx(by_hand, rel=1e-12)
    adapter.train()
    torch.manual_seed(0)
    with torch.no_grad():
        counts = torch.tensor(
            [
                sum(float(v.count_nonzero()) for d in adapter.lower().values() for v in d.deltas.values())
                for _ in range(400)
            ]
        )
    assert expected == pytest.approx(float(counts.mean()), abs=4 * float(counts.std()) / 20)
    assert float(course.penalty().detach()) == pytest.approx(1.25e-7 * expected)  # type: ignore[union-attr]


def test_it_starts_as_the_base_while_gates_are_drawn() -> None:
    adapter = pruning(alpha=0.0).train()
    with torch.no_grad():
        assert torch.equal(adapter(input_ids=IDS).logits, adapter.base.model(input_ids=IDS).logits)


@pytest.mark.parametrize("structured", [True, False])
def test_what_is_kept_is_the_greatest_and_the_rest_stays_zero(structured: bool) -> None:
    adapter = pruning(structured=structured)
    seen = trained(adapter)
    total = len(seen[0])
    k = round(0.02 * total)
    assert seen[2].count_nonzero() > 0.5 * total
    first, *later = seen[3:]
    assert all(int(deltas.count_nonzero()) == k for deltas in seen[3:])
    assert all(torch.equal(deltas != 0, first != 0) for deltas in later)
    assert not torch.equal(first, later[-1])
    with torch.no_grad():
        before = adapter(input_ids=IDS).logits
        plain = adapter.base.model(input_ids=IDS).logits
        adapter.settle()
        after = adapter(input_ids=IDS).logits
    assert adapter.method == DiffPruning(density=0.02, targets=PLACES, structured=structured, pruned=True)
    assert adapter.trainable == k
    assert (before - plain).abs().max() > 1e-3
    assert torch.equal(after, before)
    assert sum(int(changed.sum()) for changed in moved(adapter).values()) == k


def test_the_greatest_are_kept() -> None:
    adapter = pruning(alpha=50)  # all gates open, so that w decides
    course = course_of(adapter, 8)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in adapter.named_parameters():
            if "alpha" not in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    everything = torch.cat([v.flatten() for d in adapter.lower().values() for v in d.deltas.values()]).detach().abs()
    torch.manual_seed(0)
    course.after_step(4)
    kept = torch.cat([v.flatten() for d in adapter.lower().values() for v in d.deltas.values()]).detach().abs()
    k = round(0.02 * len(everything))
    assert int(kept.count_nonzero()) == k
    assert torch.equal(kept > 0, everything >= everything.topk(k).values[-1])


def test_a_training_that_ended_early_is_pruned_all_the_same() -> None:
    adapter = pruning()
    total = len(trained(adapter, stop=2)[0])
    adapter.settle()
    assert adapter.trainable == round(0.02 * total)


def test_what_is_pruned_is_saved_and_trained_on(tmp_path: Path) -> None:
    adapter = pruning()
    trained(adapter)
    adapter.settle()
    adapter.float().save(tmp_path / "a")
    again = adapter.base.load(tmp_path / "a", "again").double()
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, adapter.double()(input_ids=IDS).logits)
    before = moved(again)
    assert again.method.course({}, 5) is None
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-2, weight_decay=0.1)
    again(input_ids=IDS).logits.square().mean().backward()
    optimizer.step()
    after = moved(again)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values, indices: (values, indices + 1000), "indices go up to 10.., beyond"),
        (lambda values, indices: (values, -indices - 1), "or below zero"),
        (lambda values, indices: (values[1:], indices), "as many indices as values"),
        (lambda values, indices: (values, indices[:1]), "rows and columns are needed"),
        (lambda values, indices: (values[None], indices), "as many indices as values"),
    ],
)
@pytest.mark.parametrize("name", ["fish", "diff-pruning", "shira"])
def test_a_file_with_entries_that_are_not_there(
    name: str, change: Callable[..., Any], message: str, tmp_path: Path
) -> None:
    if name == "diff-pruning":
        adapter = pruning().float()
        trained(adapter, 4)
        adapter.settle()
    else:
        adapter = veneer.Base(tiny_llama()).attach(method_class(name)(targets=PLACES), "a")
    adapter.save(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    state = load_file(file)
    indices = next(key for key in state if key.endswith("indices") and "bias" not in key and state[key].numel() > 9)
    values = indices.replace("sparse_indices", "sparse_values").replace("shira_indices", "shira_weight")
    state[values], state[indices] = (part.contiguous() for part in change(state[values], state[indices]))
    save_file(state, file)
    (tmp_path / "a" / "veneer.json").write_text(
        re.sub('"sha256": {[^}]*}', '"sha256": {}', (tmp_path / "a" / "veneer.json").read_text())
    )
    expected = message if name != "shira" or "indices go" in message or "zero" in message else "does not fit"
    with pytest.raises(AdapterFileError, match=expected):
        adapter.base.load(tmp_path / "a", "again")
    assert list(adapter.base.adapters) == ["a"]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("fish", {"share": 0}, "method.share: .*greater than 0"),
        ("fish", {"share": 1.5}, "method.share: .*less than or equal to 1"),
        ("fish", {"examples": 0}, "method.examples"),
        ("diff-pruning", {"density": 2}, "method.density"),
        ("diff-pruning", {"first_phase": 1}, "method.first_phase: .*less than 1"),
        ("diff-pruning", {"alpha_rate": 0}, "method.alpha_rate"),
        ("diff-pruning", {"sparsity": 0.1}, "unknown setting of diff-pruning"),
    ],
)
def test_mistakes(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method_class(name)(**settings)


# What both are told of


@pytest.mark.parametrize("name", ["fish", "shira", "diff-pruning"])
def test_the_size_told_is_that_of_the_file(name: str, tmp_path: Path) -> None:
    """Where entries are counts as much as what they are."""
    adapter = veneer.Base(tiny_llama().requires_grad_(False)).attach(method_class(name)(), "a")
    adapter.unsurveyed = False
    adapter.settle()
    adapter.save(tmp_path / "a")
    found = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert adapter.nbytes == sum(value.nbytes for value in found.values())
    assert adapter.nbytes == pytest.approx(adapter.trainable * 4 * 3, rel=0.01)  # value, row, column


def test_pruned_is_no_setting_of_a_new_run(folder: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    says = "method.pruned: only the training of diff-pruning sets it"
    base = veneer.Base(tiny_llama().requires_grad_(False))
    for method in (DiffPruning(pruned=True), method_class("mix")(methods=[{"name": "diff-pruning", "pruned": True}])):
        with pytest.raises(ConfigError, match=says):
            base.attach(method, "a")
    assert (
        command(
            "train",
            f"base={tiny_folder}",
            "data.train=nowhere.jsonl",
            "output=o",
            "method={name: diff-pruning, pruned: true}",
        )
        == 2
    )
    assert says in " ".join(capsys.readouterr().err.split())
    for flags in ((), ("--json",)):
        assert command("methods", "diff-pruning", *flags) == 0
        told = capsys.readouterr().out
        assert "first_phase" in told
        assert "pruned" not in told.partition("first_phase")[2]
    adapter = base.attach(DiffPruning(targets=PLACES), "a")
    perturb(adapter)
    adapter.settle()
    adapter.save("a")
    assert veneer.Base(tiny_llama().requires_grad_(False)).load("a").method.pruned  # type: ignore[attr-defined]

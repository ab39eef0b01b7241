"""Conditional adapters: what a condition does, row by row, and learning by the data's task column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, run

import veneer
from helpers import command, perturb, tiny_llama, write_jsonl
from veneer.errors import AdapterError, ConfigError
from veneer.methods import method_class
from veneer.tasks.conditions import conditioned
from veneer.training import runs

MODES = ("film", "hyper")


def attached(mode: str, family: str = "llama", **settings: Any) -> veneer.Adapter:
    base = veneer.Base(FAMILIES[family].model().requires_grad_(False))
    settings = {"bottleneck": 3, "size": 4, "tasks": ["a", "b"], "mode": mode} | settings
    adapter = base.attach(method_class("conditional")(**settings), "x").double().eval()
    perturb(adapter, std=0.4)
    return adapter


def under(adapter: veneer.Adapter, condition: Any, family: str = "llama") -> torch.Tensor:
    with torch.no_grad(), adapter.conditioned(condition):
        return run(adapter, FAMILIES[family].inputs)


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "xlnet", "deberta-v3", "opt"])
@pytest.mark.parametrize("mode", MODES)
def test_rows_of_several_tasks_equal_each_task_alone(mode: str, family: str) -> None:
    adapter = attached(mode, family)
    mixed, a, b = under(adapter, ["a", "b"], family), under(adapter, "a", family), under(adapter, "b", family)
    assert (a - b).abs().max() > 1e-3
    assert (mixed[0] - a[0]).abs().max() < 1e-9
    assert (mixed[1] - b[1]).abs().max() < 1e-9


@pytest.mark.parametrize("mode", MODES)
def test_a_task_is_the_vector_learned_for_it(mode: str) -> None:
    adapter = attached(mode)
    vectors = (
        adapter.get_buffer("conditions") if "conditions" in adapter._buffers else adapter._parameters["conditions"]
    )
    a, b = (vector.tolist() for vector in vectors.detach())
    assert torch.allclose(under(adapter, "a"), under(adapter, a), atol=1e-12)
    assert torch.allclose(under(adapter, ["a", "b"]), under(adapter, torch.tensor([a, b]).double()), atol=1e-12)
    assert torch.allclose(under(adapter, None), under(adapter, vectors.detach().mean(0)), atol=1e-12)


def test_for_one_condition_it_folds_to_a_plain_adapter() -> None:
    """W_u' = W_u diag(1 + Γ z), b_u' = b_u + W_u B z."""
    adapter = attached("film")
    plain = adapter.base.attach(method_class("houlsby")(bottleneck=3), "plain").double().eval()
    z = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64)
    with torch.no_grad():
        for site in adapter.sites:
            own, new = adapter.parameters_at(site.path), plain.parameters_at(site.path)
            new["adapter_down.weight"].copy_(own["adapter_down.weight"])
            new["adapter_down.bias"].copy_(own["adapter_down.bias"])
            new["adapter_up.weight"].copy_(own["adapter_up.weight"] @ torch.diag(1 + own["adapter_gain"] @ z))
            new["adapter_up.bias"].copy_(own["adapter_up.bias"] + own["adapter_up.weight"] @ own["adapter_shift"] @ z)
        assert torch.allclose(under(adapter, z), run(plain, FAMILIES["llama"].inputs), atol=1e-12)


def test_published_count() -> None:
    """2 d m + m + d + 2 m |z| a place, and |z| a task."""
    adapter = attached("film", size=5, tasks=["a", "b", "c"])
    d, m, z = 32, 3, 5
    assert adapter.trainable == len(adapter.sites) * (2 * d * m + m + d + 2 * m * z) + 3 * z


def test_a_vector_of_the_users_carries_gradients() -> None:
    adapter = attached("film")
    z = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    with adapter.conditioned(z):
        run(adapter, FAMILIES["llama"].inputs).square().mean().backward()
    assert (z.grad.abs().sum(1) > 0).all()


def test_rows_under_several_adapters_and_conditions() -> None:
    base = veneer.Base(tiny_llama().requires_grad_(False))
    adapter = base.attach(method_class("conditional")(tasks=["a", "b"], bottleneck=3), "x")
    other = base.attach(method_class("lora")(), "y")
    perturb(adapter, std=0.4)
    perturb(other, std=0.4)
    ids = torch.arange(20).view(4, 5)
    with torch.no_grad():
        with base.rows(["x", "y", None, "x"], conditions=["a", None, None, "b"]):
            mixed = base.model(input_ids=ids).logits
        with adapter.conditioned("b"):
            assert torch.allclose(adapter(input_ids=ids[3:]).logits, mixed[3:], atol=1e-4)
            generated = adapter.generate(ids, max_new_tokens=4, num_beams=2, do_sample=False)
        with adapter.conditioned(["b"] * 4):
            assert torch.equal(adapter.generate(ids, max_new_tokens=4, num_beams=2, do_sample=False), generated)
    with pytest.raises(AdapterError, match="2 conditions"), base.rows(["x"], conditions=["a", "b"]):
        pass


def test_bad_conditions() -> None:
    adapter = attached("film")
    with pytest.raises(AdapterError, match="no task 'c'"):
        under(adapter, "c")
    with pytest.raises(AdapterError, match="4 numbers"):
        under(adapter, [1.0, 2.0])
    plain = adapter.base.attach(method_class("lora")(), "plain")
    with pytest.raises(AdapterError, match="takes no condition"), plain.conditioned("a"):
        pass


COLOURS, FRUITS = ("red", "green", "yellow", "brown"), ("apple", "pear", "banana", "kiwi")


def both_ways() -> list[dict[str, object]]:
    """The same text has one label for each task: only the task tells which."""
    texts = [(colour, fruit) for colour in COLOURS for fruit in FRUITS]
    return [
        {"text": f"a {colour} {fruit}", "label": label, "task": task}
        for _ in range(4)
        for colour, fruit in texts
        for task, label in (("colour", colour), ("fruit", fruit))
    ]


@pytest.mark.slow
def test_it_learns_by_the_task_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On MiniLM: half is the most that one can get without knowing the task."""
    data = write_jsonl(tmp_path / "both.jsonl", both_ways())
    common = [
        f"data.train={data}",
        f"data.validation={data}",
        "base=minilm-l6",
        "train.epochs=12",
    ]
    scores = {}
    for name in ("conditional", "houlsby"):
        output = tmp_path / name
        assert command("train", *common, f"method.name={name}", f"output={output}") == 0
        scores[name] = json.loads((output / "adapter" / "veneer.json").read_text())["training"]["result"]["after"]
    assert scores["conditional"]["accuracy"] > 0.95
    assert scores["houlsby"]["accuracy"] <= 0.55


def by_number(names: tuple[object, ...]) -> list[dict[str, object]]:
    return [{"prompt": f"{n} red apples", "completion": str(name), "task": name} for n in range(6) for name in names]


@pytest.mark.parametrize("names", [(0, 1), ("a", 7)])
def test_tasks_may_be_numbers(folder: Path, tiny_folder: Path, names: tuple[object, ...]) -> None:
    """They are names, by their text: in training, in validation, in answers, in scores of each."""
    data = write_jsonl(folder / "rows.jsonl", by_number(names))
    common = (f"base={tiny_folder}", "dtype=float32", f"data.train={data}", "train.samples=0", "task.max_new_tokens=3")
    settings = "method={name: conditional, bottleneck: 3, size: 4}"
    assert command("train", *common, settings, "output=run", "train.max_steps=3", "train.batch_size=3") == 0
    adapter = veneer.load_adapter("run")
    assert adapter.method.tasks == tuple(sorted(str(name) for name in names))
    perturb(adapter, std=0.4)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        with adapter.conditioned(str(names[1])):
            told = adapter(ids).logits
        for condition in (names[1], [str(names[1])]):
            with adapter.conditioned(condition):
                assert torch.allclose(adapter(ids).logits, told, atol=1e-5)
        with conditioned(adapter, [{"task": names[0]}]):  # a batch of task 0 alone is told so
            first = adapter(ids).logits
        with adapter.conditioned(str(names[0])):
            assert torch.allclose(adapter(ids).logits, first, atol=1e-5)
            assert not torch.allclose(adapter(ids).logits, adapter.base.model(ids).logits, atol=1e-3)
    assert (first - told).abs().max() > 1e-3
    report = veneer.evaluate(adapter, data, forgetting=False, base=False)
    assert set(report.by_task) == {str(name) for name in names}
    assert len(list(veneer.predict(adapter, by_number(names)))) == 12
    with pytest.raises(AdapterError, match="no task '9'"):
        list(veneer.predict(adapter, by_number((9,))))


def test_a_task_column_that_says_nothing(folder: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_jsonl(folder / "rows.jsonl", by_number((None,)))
    assert command("train", f"base={tiny_folder}", f"data.train={data}", "method=conditional", "output=run") == 2
    assert "no `task` column" in " ".join(capsys.readouterr().err.split())


def test_inside_another_method(folder: Path) -> None:
    """`mix` and `fusion` hand on what rows are told; a task that a method of theirs doesn't know is an error."""
    base = veneer.Base(tiny_llama().requires_grad_(False))
    Conditional = method_class("conditional")
    ids = torch.arange(12).view(2, 6)
    perturb(base.attach(Conditional(tasks=["a", "b"], bottleneck=3), "one"), std=0.4)
    perturb(base.attach(method_class("pfeiffer")(bottleneck=3), "two"), std=0.4)
    fusion = method_class("fusion")(adapters=["one", "two"])
    mix = method_class("mix")(methods=[{"name": "conditional", "bottleneck": 3}, "lora"]).for_tasks(["a", "b"])
    for method in (fusion, mix):
        adapter = base.attach(method, method.name)
        if method is mix:
            perturb(adapter, std=0.4)
        assert adapter.method.conditioned
        with torch.no_grad():
            with adapter.conditioned(["a", "b"]):
                both = adapter(input_ids=ids).logits
            with adapter.conditioned("b"):
                other = adapter(input_ids=ids).logits
        assert (both[0] - other[0]).abs().max() > 1e-3
        assert torch.allclose(both[1], other[1], atol=1e-4)
        with pytest.raises(AdapterError, match="no task 'c'"), adapter.conditioned("c"):
            adapter(input_ids=ids)
        with pytest.raises(ConfigError, match="of task c"):
            adapter.method.for_tasks(["a", "c"])
        assert "acts by a row's task" in str(adapter.method.asks)


def test_a_run_of_a_mix_learns_the_tasks_of_its_rows(
    folder: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_jsonl(folder / "rows.jsonl", by_number(("a", "b")))
    common = (f"base={tiny_folder}", "dtype=float32", "train.samples=0", "train.max_steps=3")
    settings = "method={name: mix, methods: [{name: conditional, bottleneck: 3, size: 4}]}"
    assert command("train", *common, f"data.train={data}", settings, "output=run") == 0
    adapter = veneer.load_adapter("run")
    assert [method.tasks for method in adapter.method.members()] == [("a", "b")]
    with pytest.raises(AdapterError, match="no task 'c'"):
        list(veneer.predict(adapter, by_number(("c",))))
    capsys.readouterr()
    new = write_jsonl(folder / "new.jsonl", by_number(("c",)))
    base = veneer.load_base(tiny_folder, dtype="float32")
    perturb(base.attach(method_class("conditional")(bottleneck=3, tasks=["a", "b"]), "one"))
    perturb(base.attach(method_class("pfeiffer")(bottleneck=3), "two"))
    base["one"].save("one")
    base["two"].save("two")
    capsys.readouterr()
    fusion = "method={name: fusion, adapters: [one, two]}"
    assert command("train", *common, f"data.train={new}", "output=fused", fusion) == 2
    assert "of task c" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr(runs, "load_base", None)  # it is told before the base is loaded
    assert command("train", *common, f"data.train={new}", "output=more", "--continue", "run") == 2
    assert "takes no new tasks once it is made" in " ".join(capsys.readouterr().err.split())


def test_a_conditional_teacher_is_told_the_tasks(folder: Path, tiny_folder: Path) -> None:
    """Its divergence from a student that is a copy of it is zero; from one told nothing it isn't."""
    base = veneer.load_base(tiny_folder, dtype="float32")
    method = method_class("conditional")(tasks=["a", "b"], bottleneck=3, size=4)
    teacher = base.attach(method, "t")
    perturb(teacher, std=0.4)
    teacher.save("teacher")
    base.detach("t")
    student = base.load("teacher", "s")
    how = {"teacher": "teacher", "weight": 1.0}
    rows = by_number(("a", "b"))
    result = veneer.train(student, rows, distill=how, max_steps=1, samples=0, learning_rate=1e-9)
    assert result.before is not None
    assert abs(result.before["divergence"]) < 1e-6
    plain = base.attach(veneer.LoRA(rank=2), "l")
    with pytest.raises(ConfigError, match=r"distill\.teacher: teacher is told .* of task c"):
        veneer.train(plain, by_number(("a", "c")), distill=how, max_steps=1)
    with pytest.raises(ConfigError, match=r"distill\.teacher: teacher is told .* no `task` column"):
        veneer.train(plain, [{"prompt": "a", "completion": "b"}] * 20, distill=how, max_steps=1)
    assert set(base.adapters) == {"s", "l"}

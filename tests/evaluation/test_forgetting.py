"""What was forgotten: nothing where nothing changed, more where more did, and not defined where it has no meaning."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import veneer
from helpers import perturb, write_jsonl
from veneer.adapters import card
from veneer.data import read
from veneer.errors import DataError
from veneer.evaluation import Change, forgetting, retention
from veneer.evaluation.by_row import beside_base, by_row
from veneer.evaluation.forgetting import ACCURACY, KL, LOSS, RETRIEVAL, SIMILARITY
from veneer.evaluation.intervals import of_ratio
from veneer.evaluation.retention import PROMPTS, QUESTIONS, TEXTS, questions
from veneer.methods import method_class
from veneer.tasks import Task
from veneer.tasks.causal_lm import CausalLM
from veneer.tasks.measuring import measure
from veneer.tasks.sequence_classification import SequenceClassification


@pytest.fixture
def adapter(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> veneer.Adapter:
    """On a tiny base with the vocabulary of a large one; six rows of each shipped set are enough here."""
    shipped = retention._shipped
    monkeypatch.setattr(retention, "_shipped", lambda name: shipped(name)[:6])
    base = veneer.load_base(tiny_folder, dtype="float32")
    base.model.config.max_position_embeddings = 512  # rotary: any length will do
    return base.attach(veneer.LoRA(rank=2), "t", task=CausalLM(max_new_tokens=4).describe())


@pytest.fixture
def classifier(minilm: veneer.Base) -> veneer.Adapter:
    task = SequenceClassification(labels=("a", "b"), max_length=32)
    modules = task.head(minilm, seed=0)
    return minilm.attach(veneer.LoRA(rank=2), "t", modules=modules, task=task.describe())


def of(adapter: veneer.Adapter, **options: object) -> dict[tuple[str, str], Change]:
    found = forgetting(adapter, **options)  # type: ignore[arg-type]
    assert found.undefined is None
    return {(change.measure, change.data): change for change in found.changes}


def test_nothing_is_forgotten_where_nothing_changed(adapter: veneer.Adapter) -> None:
    found = of(adapter)
    assert next(iter(found)) == (KL, TEXTS)
    assert set(found) == {(m, d) for m in (KL, LOSS) for d in (TEXTS, PROMPTS)} | {(ACCURACY, QUESTIONS)}
    assert all(change.change.value == pytest.approx(0, abs=1e-6) for change in found.values())
    assert found[LOSS, TEXTS].base > 5  # random weights
    assert json.dumps(forgetting(adapter).plain())


def test_the_further_from_the_base_the_more(adapter: veneer.Adapter) -> None:
    perturb(adapter, std=0.05)
    little = of(adapter)
    perturb(adapter, std=0.3)
    much = of(adapter)
    for data in (TEXTS, PROMPTS):
        near, far = little[KL, data].change, much[KL, data].change
        assert 0 < near.value < far.value
        assert near.low < near.value < near.high  # type: ignore[operator]
    assert forgetting(adapter, brief=True).changes == (much[KL, TEXTS],)


def test_divergence_and_losses_are_those_of_the_definition(adapter: veneer.Adapter) -> None:
    """KL(base ‖ adapter) from the softmax of both; row by row as for all rows at once."""
    perturb(adapter, std=0.3)
    task = CausalLM(template="plain", max_length=64)
    rows = [{"text": "The river bends."}, {"text": "A much longer text about bread, salt and winter."}]
    prepared = task.prepare(read(rows), adapter.base.tokenizer)
    plain, ours, apart = beside_base(task, adapter, prepared, 2, batch_size=2)
    for number, row in enumerate(rows):
        ids = torch.tensor([task.encode(row, adapter.base.tokenizer)[0]["input_ids"]])
        with torch.no_grad():
            p = adapter.base.model(ids).logits[0, :-1].double().log_softmax(-1)
            q = adapter(ids).logits[0, :-1].double().log_softmax(-1)
        assert apart[number] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)
        wanted = ids[0, 1:, None]
        assert plain.loss[number] == pytest.approx(float(-p.gather(-1, wanted).sum()), rel=1e-4)
        assert ours.loss[number] == pytest.approx(float(-q.gather(-1, wanted).sum()), rel=1e-4)
    whole = measure(task, adapter, adapter.base, prepared, 2)
    assert ours.loss.sum() / ours.items.sum() == pytest.approx(whole["loss"], rel=1e-5)
    assert ours.correct.sum() / ours.items.sum() == pytest.approx(whole["token_accuracy"])


def test_a_row_of_several_examples_and_one_that_nothing_is_left_of(adapter: veneer.Adapter) -> None:
    task: Task = CausalLM(template="plain", max_length=6)
    rows = [{"text": "one two three four five six seven eight nine ten eleven"}, {"text": "a"}, {"text": "to be"}]
    prepared = task.prepare(read(rows), adapter.base.tokenizer)
    assert len(prepared.examples) > 3  # the long one is cut into pieces
    found = by_row(task, adapter, adapter.base, prepared, 3)
    alone = [by_row(task, adapter, adapter.base, task.prepare(read([row]), adapter.base.tokenizer), 1) for row in rows]
    assert found.loss.tolist() == pytest.approx([each.loss[0] for each in alone], rel=1e-5)
    assert found.items.tolist() == [each.items[0] for each in alone]


def test_sets_of_ones_own(adapter: veneer.Adapter, folder: Path) -> None:
    perturb(adapter, std=0.3)
    write_jsonl(folder / "manuals.jsonl", [{"text": f"Turn the knob {n} times to the left."} for n in range(5)])
    found = of(adapter, own=["manuals.jsonl"])
    assert found[KL, "manuals"].rows == 5
    assert found[KL, "manuals"].change.value > 0
    write_jsonl(folder / "general texts.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match="Two retention sets are called 'general texts'"):
        forgetting(adapter, own=["general texts.jsonl"])


def test_tasks_with_little_room_still_see_whole_texts(adapter: veneer.Adapter) -> None:
    adapter.task = CausalLM(max_length=8).describe()
    assert (ACCURACY, QUESTIONS) in of(adapter)
    adapter.base.model.config.max_position_embeddings = 8
    assert set(of(adapter)) == {(m, TEXTS) for m in (KL, LOSS)}  # prompts and questions no longer fit


def test_features_of_a_classifier(classifier: veneer.Adapter) -> None:
    found = of(classifier)
    assert list(found) == [(SIMILARITY, TEXTS), (RETRIEVAL, TEXTS)]
    assert found[SIMILARITY, TEXTS].adapter == pytest.approx(1, abs=1e-5)
    assert found[RETRIEVAL, TEXTS].base == found[RETRIEVAL, TEXTS].adapter > 0.6  # MiniLM knows what texts are about
    perturb(classifier, std=0.01)
    little = of(classifier)[SIMILARITY, TEXTS]
    perturb(classifier, std=0.2)
    much = of(classifier)
    assert 1 > little.adapter > much[SIMILARITY, TEXTS].adapter
    assert much[RETRIEVAL, TEXTS].change.value < -0.3
    assert much[RETRIEVAL, TEXTS].forgotten.value == -much[RETRIEVAL, TEXTS].change.value
    low, high = much[RETRIEVAL, TEXTS].forgotten.low, much[RETRIEVAL, TEXTS].forgotten.high
    assert low is not None
    assert high is not None
    assert low < high


def test_virtual_tokens_are_left_out_of_features(classifier: veneer.Adapter) -> None:
    """Tokens before a text that change nothing of it leave its features nearly as they were."""
    task = SequenceClassification(labels=("a", "b"), max_length=32)
    base = classifier.base
    one = base.attach(method_class("prompt")(length=1), "p", modules=task.head(base, seed=0), task=task.describe())
    assert of(one)[SIMILARITY, TEXTS].adapter > 0.8


def test_texts_without_halves_are_not_retrieved(classifier: veneer.Adapter, folder: Path) -> None:
    write_jsonl(folder / "words.jsonl", [{"text": "bread"}, {"text": "rain"}, {"text": "two words"}])
    changes = forgetting(classifier, own=["words.jsonl"]).changes
    assert [change.measure for change in changes if change.data == "words"] == [SIMILARITY]
    write_jsonl(folder / "words.jsonl", [{"text": "bread"}, {"text": "much rain"}, {"text": "two words"}])
    retrieval = forgetting(classifier, own=["words.jsonl"]).changes[-1]
    assert (retrieval.data, retrieval.measure, retrieval.rows) == ("words", RETRIEVAL, 2)


def test_the_card_says_which_texts_are_ones_own() -> None:
    change = {"measure": "kl", "rows": 3, "base": 0.0, "adapter": 0.1, "change": {"value": 0.1}}
    told = card._forgotten({"changes": [{**change, "data": TEXTS}, {**change, "data": "manuals"}]})[0]
    assert "manuals: texts of your own, whatever it saw of them" in told
    assert "your own" not in card._forgotten({"changes": [{**change, "data": TEXTS}]})[0]


def test_classifiers_take_texts_only(classifier: veneer.Adapter, folder: Path) -> None:
    write_jsonl(folder / "asked.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(DataError, match="'asked' has prompt, completion; for sequence-classification it takes `text`"):
        forgetting(classifier, own=["asked.jsonl"])


def test_not_defined_for_adapters_that_ask_for_a_task(tiny_folder: Path) -> None:
    base = veneer.load_base(tiny_folder, dtype="float32")
    method = method_class("conditional")(tasks=("a", "b"))
    adapter = base.attach(method, "c", task=CausalLM(max_new_tokens=4).describe())
    found = forgetting(adapter)
    assert not found.changes
    assert "acts by a row's task" in str(found.undefined)


def test_not_defined_for_slots(tiny_folder: Path, folder: Path) -> None:
    """Scores are told all the same."""
    base = veneer.load_base(tiny_folder, dtype="float32")
    method = method_class("ptuning")(length=3, slots=(2,), marker="<repo_name>")
    task = CausalLM(max_new_tokens=4).describe()
    adapter = base.attach(method, "p", task=task)
    rows = [{"prompt": "a <repo_name> b", "completion": "c"}] * 3
    report = veneer.evaluate(adapter, rows)
    assert report.adapter["loss"].value > 0
    assert report.forgetting is not None
    assert "stands at markers <repo_name>" in str(report.forgetting.undefined)
    mix = base.attach(method_class("mix")(methods=[method, "lora"]), "m", task=task)
    assert "holds ptuning, which stands at markers" in str(forgetting(mix).undefined)


def test_questions_have_four_answers() -> None:
    assert all(len(set(q.choices)) == 4 and q.answer == 0 for q in questions())


def test_interval_of_a_ratio() -> None:
    """Rows of equal weight: that of a mean. Doubling the weight of a row counts it twice."""
    values = [1.0, 2.0, 6.0, 3.0]
    mean, low, high = of_ratio(values, [1, 1, 1, 1])
    assert mean == 3
    assert (high - low) / 2 == pytest.approx(1.959964 * 2.160247 / 2, rel=1e-5)
    assert of_ratio([2.0, 1.0], [2, 1])[0] == 1.0
    assert of_ratio([1.0, 5.0], [1, 0]) == (1.0, 1.0, 1.0)


def test_eval_tells_it(
    adapter: veneer.Adapter, folder: Path, cli: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    perturb(adapter, std=0.3)
    adapter.save(folder / "a")
    write_jsonl(folder / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 2)
    write_jsonl(folder / "own.jsonl", [{"text": "some words of ours"}])
    assert cli("eval", "a", "rows.jsonl", "--retention", "own.jsonl", "--json") == 0
    changes = json.loads(capsys.readouterr().out)["forgetting"]["changes"]
    assert {"own", TEXTS} < {change["data"] for change in changes}
    assert cli("eval", "a", "rows.jsonl") == 0
    assert "what was forgotten" in capsys.readouterr().out
    weights = Path("a/adapter_model.safetensors").read_bytes()
    assert cli("eval", "a", "rows.jsonl", "--record") == 0
    card = Path("a/README.md").read_text()
    assert "2 rows of rows.jsonl" in card
    assert "## Forgetting" in card
    assert "| kl on 6 general texts | 0 |" in card
    assert Path("a/adapter_model.safetensors").read_bytes() == weights
    assert cli("adapters", "verify", "a") == 0
    Path("a/README.md").write_text("mine")
    assert cli("eval", "a", "rows.jsonl", "--record", "--no-forgetting") == 0
    assert Path("a/README.md").read_text() == "mine"
    capsys.readouterr()
    assert cli("eval", "a", "rows.jsonl", "--no-forgetting", "--json") == 0
    assert json.loads(capsys.readouterr().out)["forgetting"] is None
    assert cli("eval", "a", "rows.jsonl", "--retention", "nowhere.jsonl") == 2
    err = capsys.readouterr().err
    assert "nowhere.jsonl" in err
    assert "evaluating" not in err  # not after minutes of it
    assert cli("eval", "a", "rows.jsonl", "--retention", "own.jsonl", "--no-forgetting") == 2
    assert "leave out --no-forgetting" in capsys.readouterr().err
    Path("a/veneer.json").unlink()
    assert cli("eval", "a", "rows.jsonl", "--record", "--no-forgetting") == 2
    assert "no record to keep an evaluation in" in capsys.readouterr().err


@pytest.mark.slow
def test_overtraining_forgets_more_than_a_gentle_run(smollm: veneer.Base) -> None:
    rows = [{"prompt": f"Order {n}", "completion": '{"ok": true}'} for n in range(32)]
    found = {}
    for name, rate, epochs in (("gentle", 1e-4, 1), ("overtrained", 5e-3, 8)):
        adapter = smollm.attach(veneer.LoRA(rank=4), name)
        veneer.train(adapter, rows, validation=0, learning_rate=rate, epochs=epochs, samples=0)
        found[name] = of(adapter)
    gentle, over = (found[name][KL, TEXTS].change for name in ("gentle", "overtrained"))
    assert gentle.high < over.low  # type: ignore[operator]
    assert over.value > 5 * gentle.value
    rise = found["overtrained"][LOSS, TEXTS].change
    assert rise.low > 0  # type: ignore[operator]

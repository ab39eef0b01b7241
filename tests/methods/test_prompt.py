"""What prompt tuning starts from, on a real base with its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import FAMILIES
from test_contract import off

import veneer
from helpers import perturb
from veneer.errors import AdapterError, ConfigError
from veneer.methods import method_class

Prompt = method_class("prompt")
TEXT = "Is this an attack?"


@pytest.fixture
def base() -> veneer.Base:
    return veneer.load_base("minilm-l6", task="sequence-classification")


def table(base: veneer.Base, task: dict[str, Any] | None = None, **settings: Any) -> torch.Tensor:
    adapter = base.attach(Prompt(**settings), task=task)
    values = adapter.get_parameter("prompt_embeddings").detach().clone()
    base.detach("default")
    return values


def words(base: veneer.Base, text: str) -> torch.Tensor:
    """Embeddings of a text's tokens."""
    ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    return base.model.get_input_embeddings().weight.detach()[ids]  # type: ignore[operator]


def test_a_text_is_repeated_or_cut(base: veneer.Base) -> None:
    text = words(base, TEXT)
    assert len(text) == 5
    assert torch.equal(table(base, init="text", text=TEXT, length=12), torch.cat([text, text, text[:2]]))
    assert torch.equal(table(base, init="text", text=TEXT, length=3), text[:3])


def test_labels_come_first_and_are_means_of_their_tokens(base: veneer.Base) -> None:
    labels = ["safe", "unsafeguarded injection"]
    means = torch.stack([words(base, label).mean(0) for label in labels])
    assert len(words(base, labels[1])) > 1
    given = table(base, init="class-labels", labels=labels, length=4)
    assert torch.equal(given[:2], means)
    vocabulary = base.model.get_input_embeddings().weight  # type: ignore[operator]
    assert all((vocabulary == row).all(1).any() for row in given[2:])  # drawn
    assert torch.equal(table(base, {"labels": labels}, init="class-labels", length=2), means)
    assert torch.equal(table(base, {"labels": ["x", "y"]}, init="class-labels", labels=labels, length=2), means)


def test_an_adapter_in_use_is_not_mistaken_for_the_base(base: veneer.Base) -> None:
    plain = table(base, init="text", text=TEXT)
    other = base.attach(veneer.LoRA(rank=2, targets="word_embeddings"), "other")
    perturb(other)
    base.activate("other")
    assert torch.equal(table(base, init="text", text=TEXT), plain)


def test_tables_that_scale_their_rows() -> None:
    """BART may multiply embeddings by √d: what the model computes on is what a virtual token starts from."""
    import transformers as T

    model: Any = FAMILIES["bart"].model(torch.float32)
    config = T.BartConfig(**{**model.config.to_dict(), "scale_embedding": True})
    base = veneer.Base(T.BartForConditionalGeneration(config))
    embedding: Any = base.model.get_encoder().get_input_embeddings()  # type: ignore[operator]
    drawn = base.attach(Prompt(length=3)).get_parameter("prompt_embeddings").detach()
    rows = embedding(torch.arange(99)).detach()
    assert all((rows == row).all(1).any() for row in drawn)
    assert not any((embedding.weight == row).all(1).any() for row in drawn)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"init": "text"}, ConfigError, "method: init: text and the text itself go together, give both or neither$"),
        (
            {"init": "text", "text": "  "},
            ConfigError,
            "method: init: text and the text itself go together, give both or neither$",
        ),
        ({"text": TEXT}, ConfigError, "method: init: text and the text itself go together, give both or neither$"),
        ({"labels": ["a"]}, ConfigError, "labels are for init: class-labels"),
        ({"init": "words"}, ConfigError, "method.init"),
        ({"init": "class-labels"}, AdapterError, r"needs labels.*method.labels=\[spam, ham\]"),
        ({"init": "class-labels", "labels": ["a", ""]}, AdapterError, "'' has no tokens"),
    ],
)
def test_mistakes(base: veneer.Base, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        base.attach(Prompt(**settings))
    assert not base.adapters


def test_words_need_a_tokenizer_but_what_was_saved_needs_none(base: veneer.Base, tmp_path: Path) -> None:
    adapter = base.attach(Prompt(init="text", text=TEXT), "a")
    adapter.save(tmp_path)
    base.tokenizer = None
    with pytest.raises(AdapterError, match="init: text needs a tokenizer"):
        base.attach(Prompt(init="text", text=TEXT), "b")
    again = base.load(tmp_path, "c")
    assert again.method == adapter.method
    assert torch.equal(again.get_parameter("prompt_embeddings"), adapter.get_parameter("prompt_embeddings"))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_what_peft_started_from_a_text(base: veneer.Base, tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(
        task_type="SEQ_CLS",
        num_virtual_tokens=4,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=TEXT,
        tokenizer_name_or_path=str(base.folder),
    )
    method = veneer.from_peft(config)  # before peft adds to it
    fresh = veneer.load_base("minilm-l6", task="sequence-classification")
    theirs = peft.get_peft_model(fresh.model, config).eval()
    theirs.save_pretrained(tmp_path)
    ours = base.load(tmp_path, "a")
    assert ours.method == method == Prompt(length=4, init="text", text=TEXT)
    batch = base.tokenizer("Tell me your rules.", return_tensors="pt")
    with torch.no_grad():
        expected, plain = theirs(**batch).logits, base.model(**batch).logits
        assert off(ours(**batch).logits, expected) < 1e-5
        assert off(plain, expected) > 1e-3


def test_more_labels_than_tokens() -> None:
    with pytest.raises(ConfigError, match="3 labels don't fit into a length of 2"):
        method_class("prompt")(length=2, init="class-labels", labels=["a", "b", "c"])
    base = veneer.load_base("minilm-l6")
    with pytest.raises(AdapterError, match="3 labels don't fit into a length of 2"):
        base.attach(method_class("prompt")(length=2, init="class-labels"), "a", task={"labels": ["a", "b", "c"]})

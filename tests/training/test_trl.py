"""TRL's trainers take an adapter for the model, as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import veneer
from helpers import perturb, tiny_llama
from veneer.errors import AdapterError
from veneer.methods import method_class

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # TRL's own

ASKED = [{"prompt": "one plus one is", "completion": " two", "chosen": " two", "rejected": " five"}] * 8


@pytest.fixture
def base() -> veneer.Base:
    words = ["<pad>", "<s>", "</s>", "<unk>", "one", "two", "three", "four", "five", "plus", "is"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return veneer.Base(tiny_llama(), transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special))


def copies(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(before: dict[str, torch.Tensor], module: torch.nn.Module) -> bool:
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def common(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 6,
        "learning_rate": 2e-2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }


def losses(trainer: transformers.Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", ["lora", "houlsby", "prefix"])
def test_sft(base: veneer.Base, tmp_path: Path, name: str) -> None:
    adapter = base.attach(method_class(name)())
    rows = Dataset.from_list([{"prompt": row["prompt"], "completion": row["completion"]} for row in ASKED])
    before, untrained = copies(base.model), copies(adapter)
    trainer = SFTTrainer(adapter, SFTConfig(**common(tmp_path)), train_dataset=rows, processing_class=base.tokenizer)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.3
    assert not same(untrained, adapter)
    assert same(before, base.model)
    assert base.checkpointing  # TRL's default; an adapter knows how
    base.disable_checkpointing()
    ids = base.tokenizer("one plus one is", return_tensors="pt")["input_ids"]
    adapter.eval()
    two = base.tokenizer.convert_tokens_to_ids("two")
    gain = adapter(ids).logits[0, -1].log_softmax(-1)[two] - base.model(ids).logits[0, -1].log_softmax(-1)[two]
    assert gain > 0.3  # what was trained is what runs


@pytest.mark.parametrize("reference", ["plain base", "computed beforehand"])
def test_dpo_against_the_plain_base(base: veneer.Base, tmp_path: Path, reference: str) -> None:
    adapter = base.attach(veneer.LoRA(rank=2))
    rows = Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in ASKED])
    before = copies(base.model)
    beforehand = reference == "computed beforehand"
    trainer = DPOTrainer(
        adapter,
        ref_model=None if beforehand else base.model,
        args=DPOConfig(**common(tmp_path), precompute_ref_log_probs=beforehand),
        train_dataset=rows,
        processing_class=base.tokenizer,
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-4)  # as yet, adapter and reference agree
    assert log[0]["rewards/margins"] == 0
    assert log[-1]["rewards/margins"] > 0.5  # the reference stays what it was
    assert same(before, base.model)


def test_virtual_tokens_are_refused(base: veneer.Base, tmp_path: Path) -> None:
    """TRL calls the backbone, which they are not part of: nothing would be trained."""
    adapter = base.attach(method_class("prompt")())
    rows = Dataset.from_list([{"prompt": row["prompt"], "completion": row["completion"]} for row in ASKED])
    trainer = SFTTrainer(adapter, SFTConfig(**common(tmp_path)), train_dataset=rows, processing_class=base.tokenizer)
    with pytest.raises(AdapterError, match="virtual tokens"):
        trainer.train()


def test_what_trainers_ask_of_a_model(base: veneer.Base) -> None:
    adapter = base.attach(veneer.LoRA(rank=2))
    assert adapter.generation_config is base.model.generation_config
    ids = torch.tensor([[4, 9, 4, 10]])
    perturb(adapter)
    with torch.no_grad():
        plain, adapted = base.backbone(ids).last_hidden_state, adapter.base_model(ids).last_hidden_state
        torch.testing.assert_close(adapter.get_output_embeddings()(adapted), adapter(ids).logits)
    assert (plain - adapted).abs().max() > 1e-3
    with pytest.raises(AttributeError, match="no attribute 'generation_confg'"):
        _ = adapter.generation_confg
    adapter.gradient_checkpointing_enable()
    assert adapter.is_activation_checkpointing
    adapter.gradient_checkpointing_disable()
    assert not adapter.is_gradient_checkpointing
    with pytest.raises(AdapterError, match="without offloading"):
        adapter.activation_checkpointing_enable(offload=True)

"""peft reads what we write and we read what it writes: equal outputs and gradients."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers

import veneer
from helpers import perturb, tiny_bert, tiny_llama
from veneer.errors import AdapterFileError

# peft 0.21 calls names that transformers 5 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

IDS = torch.arange(2 * 9).view(2, 9) + 3


def outputs_and_gradients(
    model: torch.nn.Module, ids: torch.Tensor = IDS
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logits = model(input_ids=ids).logits
    logits.double().square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), grads


def peft_over(model: transformers.PreTrainedModel, **changes: object) -> peft.PeftModel:
    task = "SEQ_CLS" if "Classification" in type(model).__name__ else "CAUSAL_LM"
    settings: dict[str, object] = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear", "task_type": task}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings | changes))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(len(name))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return wrapped.eval()


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).abs().max() / theirs.abs().max())


def peft_names(grads: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name.replace(".default.", ".").replace("modules_to_save.", "").replace("original_module.", ""): grad
        for name, grad in grads.items()
    }


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert], ids=["llama", "bert"])
@pytest.mark.parametrize(
    "changes", [{}, {"use_rslora": True}, {"target_modules": ["k_proj", "v_proj", "query", "value"]}]
)
def test_peft_writes_and_we_read(make: object, changes: dict[str, object], tmp_path: Path) -> None:
    theirs = peft_over(make().double(), **changes).double()  # type: ignore[operator]
    theirs.save_pretrained(tmp_path)
    ours = veneer.Base(make().double()).load(tmp_path, "theirs").double()  # type: ignore[operator]
    expected, expected_grads = outputs_and_gradients(theirs)
    got, grads = outputs_and_gradients(ours)
    assert error(ours.base.model(input_ids=IDS).logits, expected) > 1e-3
    assert error(got, expected) < 1e-10
    assert set(grads) == set(peft_names(expected_grads))
    for name, grad in peft_names(expected_grads).items():
        assert error(grads[name], grad) < 1e-10, name


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert], ids=["llama", "bert"])
@pytest.mark.parametrize(
    "targets", ["all-linear", ("q", "v"), "mlp", ("layer.1.attention.self.query", "layers.1.mlp.up_proj")]
)
def test_we_write_and_peft_reads(make: object, targets: object, tmp_path: Path) -> None:
    model = make().double()  # type: ignore[operator]
    base = veneer.Base(model)
    if isinstance(targets, tuple) and "." in targets[0]:
        targets = targets[0] if hasattr(model, "bert") else targets[1]
    head = {"classifier": {"weight": torch.randn(3, 32), "bias": torch.randn(3)}} if hasattr(model, "bert") else None
    task = {"name": "x", "peft_task_type": "SEQ_CLS" if head else "CAUSAL_LM"}
    ours = base.attach(veneer.LoRA(rank=3, alpha=7, targets=targets), modules=head, task=task).double()
    perturb(ours)
    ours.save(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft warns about missing and unexpected keys
        theirs = peft.PeftModel.from_pretrained(make().double(), tmp_path / "ours", is_trainable=True).double().eval()  # type: ignore[operator]
    expected, expected_grads = outputs_and_gradients(theirs)
    got, grads = outputs_and_gradients(ours)
    assert error(base.model(input_ids=IDS).logits, expected) > 1e-3
    assert error(got, expected) < 1e-10
    assert set(grads) == set(peft_names(expected_grads))
    for name, grad in peft_names(expected_grads).items():
        assert error(grads[name], grad) < 1e-10, name


def test_what_we_do_not_read_is_refused_by_name(tmp_path: Path) -> None:
    peft_over(tiny_llama(), bias="lora_only").save_pretrained(tmp_path / "biases")
    with pytest.raises(AdapterFileError, match="bias"):
        veneer.Base(tiny_llama()).load(tmp_path / "biases")
    wrapped = peft.get_peft_model(tiny_llama(), peft.FourierFTConfig(n_frequency=5, target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path / "fourier")
    with pytest.raises(AdapterFileError, match="FOURIERFT"):
        veneer.Base(tiny_llama()).load(tmp_path / "fourier")

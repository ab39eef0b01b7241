"""Rounding on a real model: the errors of float32 and bf16 against float64, at most 2 and 1.5 times peft's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from contracts import CONTRACTS
from test_contract import EXACT, off

import veneer
from veneer.methods import method_class

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

SETTINGS: dict[str, dict[str, Any]] = {
    "ia3": {},
    "lokr": {"rank": 4, "alpha": 6},
    "lora": {"rank": 8, "alpha": 20},
    "oft": {"block_size": 16},
    "prefix": {"length": 8},
    "prompt": {"length": 8},
    "shira": {"rank": 4},
}
TEXTS = (
    "The quick brown fox jumps over the lazy dog, and then",
    "def main():\n    return 1\n\n\ndef other():\n    return 2\n",
    "It was the best of times, it was the worst of times, it was the age of wisdom",
    "Water boils at 100 degrees Celsius at sea level; on mountains it boils earlier.",
)
"""Several: errors of one short text differ by up to twice with what happens to be rounded up or down."""
BOUNDS = {torch.float32: 2.0, torch.bfloat16: 1.5}


def computed(model: torch.nn.Module, texts: list[torch.Tensor], skip: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of all texts, without those of virtual tokens, and all gradients of their losses; in float64."""
    found = [of_one(model, ids, skip) for ids in texts]
    logits, gradients = (torch.cat(column) for column in zip(*found, strict=True))
    return logits, gradients


def of_one(model: torch.nn.Module, ids: torch.Tensor, skip: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one text, in one vector each."""
    logits = model(input_ids=ids).logits[:, skip:]
    torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).backward()
    grads = {name.replace(".default", ""): p.grad for name, p in model.named_parameters() if p.grad is not None}
    names = sorted(grads)
    model.zero_grad()
    return logits.detach().double().flatten(), torch.cat([grads[name].double().flatten() for name in names])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("lora", "prefix") else pytest.mark.slow) for name in SETTINGS]
)
def test_rounding_is_no_worse_than_pefts(name: str, tmp_path: Path) -> None:
    assert name in CONTRACTS
    base = veneer.load_base("smollm2-135m-instruct", dtype=torch.float32)
    ids = [base.tokenizer(text, return_tensors="pt")["input_ids"] for text in TEXTS]
    adapter = base.attach(method_class(name)(**SETTINGS[name]), "a")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    adapter.task = {"peft_task_type": "CAUSAL_LM"}
    adapter.save(tmp_path / "a")
    results = {}
    for dtype in (torch.float64, *BOUNDS):
        base = veneer.load_base("smollm2-135m-instruct", dtype=dtype)
        ours = base.load(tmp_path / "a")
        mine = computed(ours.double() if dtype == torch.float64 else ours, ids)
        with torch.no_grad():
            plain = torch.cat([base.model(input_ids=each).logits.double().flatten() for each in ids])
        assert off(mine[0], plain) > 1e-3
        base.detach("a")
        prompting = name in ("prefix", "prompt")
        theirs = peft.PeftModel.from_pretrained(base.model, tmp_path / "a", is_trainable=not prompting).eval()
        if prompting:  # which peft loads for inference only
            theirs.prompt_encoder["default"].embedding.weight.requires_grad_(True)
        theirs = theirs.double() if dtype == torch.float64 else theirs
        results[dtype] = mine, computed(theirs, ids, skip=8 if name == "prompt" else 0)
    truth, reference = results[torch.float64]
    assert off(truth[0], reference[0]) < EXACT
    assert off(truth[1], reference[1]) < 10 * EXACT  # the loss above is in float32
    for dtype, factor in BOUNDS.items():
        ours, peft_ = results[dtype]  # type: ignore[assignment]
        for mine, other, exact, what in zip(ours, peft_, truth, ("outputs", "gradients"), strict=True):  # type: ignore[arg-type]
            errors = float((mine - exact).norm()), float((other - exact).norm())
            print(f"{name} {dtype} {what}: {errors[0]:.3g} ours, {errors[1]:.3g} peft's")
            assert errors[0] <= factor * errors[1], (dtype, what)

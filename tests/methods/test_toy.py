"""A new method is one class in one file, known nowhere else: it trains, mixes, merges, saves and loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

import veneer
from helpers import sums, tiny_llama
from veneer.bases import Site
from veneer.deltas import Delta, Scale
from veneer.methods.base import BaseWeights, Lowering
from veneer.methods.targeted import Targeted


class Gain(Targeted):
    """y ← (1 + g) · y, one learned factor for each map."""

    name: ClassVar[str] = "gain"
    summary: ClassVar[str] = "one learned factor for each linear map"
    learning_rate: ClassVar[float] = 3e-2
    peft_type: ClassVar[str] = "TOY_GAIN"

    def parameters(self, site: Site, generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        return {"gain": torch.zeros(1)}

    def lower(self, site: Site, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        return Scale((1 + parameters["gain"]).expand(site.out_features))


def test_a_toy_method(tmp_path: Path, smollm: veneer.Base) -> None:
    base = veneer.Base(tiny_llama(vocab_size=len(smollm.tokenizer)), smollm.tokenizer)
    adapter = base.attach(Gain(targets="mlp"), "toy")
    ids = torch.arange(10).view(1, 10)
    with torch.no_grad():
        plain = base.model(ids).logits
        assert torch.equal(adapter(ids).logits, plain)
    veneer.train(adapter, sums(16), validation=0, epochs=2, batch_size=4, samples=0)
    with torch.no_grad():
        trained = adapter(ids).logits
        assert float((trained - plain).abs().max()) > 1e-3
        torch.testing.assert_close(adapter.merged()(ids).logits, trained)
        with base.rows(["toy", None]):
            mixed = base.model(ids.expand(2, -1)).logits
        torch.testing.assert_close(mixed, torch.cat([trained, plain]))
        adapter.save(tmp_path / "toy")
        assert torch.equal(base.load(tmp_path / "toy", "again")(ids).logits, trained)

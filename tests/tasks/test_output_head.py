"""The loss from the output projection's input: the model's own loss and gradients, wherever that can be, and else too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

import veneer
from helpers import perturb, tiny_llama
from veneer.methods import method_class
from veneer.tasks import output_head
from veneer.tasks.causal_lm import IGNORED, CausalLM

IDS = torch.randint(3, 90, (3, 11), generator=torch.Generator().manual_seed(0))
LABELS = torch.where((torch.arange(11) < 4) | (torch.arange(3)[:, None] + torch.arange(11) > 11), IGNORED, IDS)
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": LABELS}
TARGETS = LABELS[:, 1:]
CASES: dict[str, dict[str, Any]] = {
    "lora": {"dropout": 0.0},
    "prompt": {"length": 3},
    "prefix": {"length": 3},
    "ptuning": {"length": 3, "encoder": "mlp"},
    "bitfit": {},
    "full": {},
    "tokens": {"tokens": [5, 6]},
}


def capped() -> torch.nn.Module:
    """A model that does something to its projection's output."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=1.0, initializer_range=0.5, pad_token_id=0,
    )  # fmt: skip
    return transformers.Gemma2ForCausalLM(config)


def compared(adapter: veneer.Adapter) -> None:
    """Loss, hits and gradients against those of all logits."""
    adapter.eval()
    found = []
    for ours in (True, False):
        adapter.zero_grad()
        if ours:
            outcome = CausalLM().outcome(adapter, BATCH)
            loss, hits = outcome.loss, outcome.correct
            assert int(outcome.items) == int((TARGETS != IGNORED).sum())
        else:
            logits = adapter(input_ids=IDS, attention_mask=BATCH["attention_mask"]).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten(), ignore_index=IGNORED, reduction="sum")
            hits = ((logits.argmax(-1) == TARGETS) & (TARGETS != IGNORED)).sum()
        loss.backward()
        gradients = [p.grad.flatten() for p in adapter.parameters() if p.grad is not None]
        found.append((loss.detach(), hits, torch.cat(gradients)))
    (loss, hits, gradient), (their_loss, their_hits, theirs) = found
    assert torch.allclose(loss, their_loss)
    assert int(hits) == int(their_hits)
    assert theirs.norm() > 0
    assert (gradient - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.parametrize("name", CASES)
def test_the_models_own_loss_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = veneer.Base(tiny_llama(vocab_size=99))
    adapter = base.attach(method_class(name)(**CASES[name]), "a")
    perturb(adapter, std=0.1)
    used: list[int] = []
    own = output_head.cross_entropy_sum
    monkeypatch.setattr(output_head, "cross_entropy_sum", lambda h, *rest: used.append(len(h)) or own(h, *rest))
    compared(adapter)
    assert used == [int((TARGETS != IGNORED).sum())]


def test_an_adapter_at_the_projection_takes_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_head, "cross_entropy_sum", lambda *_: pytest.fail("not what the model computes"))
    base = veneer.Base(tiny_llama(vocab_size=99, tie_word_embeddings=True))
    adapter = base.attach(method_class("tokens")(tokens=(5, 6)), "a")
    assert "lm_head" in adapter.places
    perturb(adapter, std=0.1)
    compared(adapter)


def test_logits_that_are_capped_are_noticed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    base = veneer.Base(capped())
    adapter = base.attach(veneer.LoRA(dropout=0.5), "a")
    perturb(adapter, std=0.1)
    tries: list[int] = []
    own = output_head.cross_entropy_sum
    monkeypatch.setattr(output_head, "cross_entropy_sum", lambda *given: tries.append(1) or own(*given))
    compared(adapter)
    compared(adapter)
    assert tries == [1]


class ByItself(transformers.LlamaForCausalLM):
    """A model that multiplies by its projection's weight without calling it."""

    def forward(self, input_ids: Any, attention_mask: Any = None, use_cache: Any = None) -> Any:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
        return transformers.modeling_outputs.CausalLMOutput(logits=F.linear(hidden, self.lm_head.weight))


def test_a_projection_that_is_not_called() -> None:
    model = tiny_llama(vocab_size=99)
    model.__class__ = ByItself
    adapter = veneer.Base(model).attach(veneer.LoRA(), "a")
    perturb(adapter, std=0.1)
    compared(adapter)
    runs: list[int] = []
    model.register_forward_hook(lambda *_: runs.append(1))
    CausalLM().outcome(adapter, BATCH)
    assert runs == [1]  # that is remembered


def test_trying_leaves_the_random_state_alone() -> None:
    base = veneer.Base(capped())
    adapter = base.attach(veneer.LoRA(dropout=0.5), "a")
    perturb(adapter, std=0.5)
    adapter.train()
    losses = []
    for _ in range(2):  # the first of them tries
        torch.manual_seed(1)
        losses.append(float(CausalLM().outcome(adapter, BATCH).loss.detach()))
    assert losses[0] == losses[1]
    torch.manual_seed(2)
    assert float(CausalLM().outcome(adapter, BATCH).loss.detach()) != losses[0]

"""Distillation: the loss is the formula's, whole or in parts; only the student learns; teachers that can't are told."""

from __future__ import annotations

import math

import pytest
import torch

import veneer
from helpers import perturb, tiny_bert, tiny_llama
from veneer.tasks.causal_lm import CausalLM
from veneer.tasks.sequence_classification import SequenceClassification
from veneer.training.distillation import Distillation, divergence
from veneer.training.settings import DistillSettings

TASK = CausalLM(template="plain")
LABELS = ("a", "b", "c")


def batch() -> dict[str, torch.Tensor]:
    """Two rows of other lengths, a prompt before what is learned."""
    ids = torch.arange(24).view(2, 12) + 3
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def pair(model: torch.nn.Module | None = None) -> tuple[veneer.Adapter, veneer.Adapter]:
    """A student and another adapter over one base, both doing something."""
    base = veneer.Base((model or tiny_llama()).double())
    both = [base.attach(veneer.LoRA(rank=3, alpha=5), name).double() for name in ("student", "other")]
    for seed, adapter in enumerate(both):
        perturb(adapter, std=0.3, seed=seed)
    return both[0], both[1]


def settings(**changes: object) -> DistillSettings:
    return DistillSettings(**{"teacher": "base", "weight": 0.3, "temperature": 2.5, **changes})


def naive(student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, how: DistillSettings) -> torch.Tensor:
    """The formula, with probabilities."""
    s, t = (torch.softmax(logits / how.temperature, -1) for logits in (student, teacher))
    m = (s + t) / 2

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (p * (p / q).log()).sum()

    apart = {"forward": kl(t, s), "reverse": kl(s, t), "jsd": (kl(t, m) + kl(s, m)) / 2}[how.divergence]
    cross = -torch.log_softmax(student, -1)[torch.arange(len(targets)), targets].sum()
    return (1 - how.weight) * cross + how.weight * how.temperature**2 * apart


def gradients(adapter: veneer.Adapter, loss: torch.Tensor) -> torch.Tensor:
    adapter.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None])


@pytest.fixture(autouse=True)
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are taken to float32 for the loss; the proofs here are in float64."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("numbers", [1 << 24, 128 * 3, 1])
def test_it_is_the_formula_at_the_labelled_tokens(kind: str, numbers: int) -> None:
    """Value and gradients; shifted by one, prompts and padding left out; whole or some tokens at a time."""
    student, other = pair()
    inputs, how = batch(), settings(divergence=kind)
    for teacher in (other, student.base.model):
        found = Distillation(TASK, how, teacher, student.base, numbers).outcome(student, inputs)
        with torch.no_grad():
            wanted = teacher(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        got = student(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        targets = inputs["labels"][:, 1:]
        kept = targets != -100
        expected = naive(got[:, :-1][kept], wanted[:, :-1][kept], targets[kept], how)
        assert int(found.items) == 8 + 4
        assert found.loss.item() == pytest.approx(expected.item(), rel=1e-12)
        assert int(found.correct) == int((got[:, :-1][kept].argmax(-1) == targets[kept]).sum())
        mine, theirs = gradients(student, found.loss), gradients(student, expected)
        assert mine.abs().max() > 1e-3
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-11)
        assert all(p.grad is None for p in other.parameters())
        assert all(p.grad is None for n, p in student.base.model.named_parameters() if "veneer" not in n)


def test_logits_are_never_there_as_a_whole() -> None:
    student, _ = pair()
    seen: list[int] = []
    head = student.base.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, y: seen.append(y.shape[:-1].numel()))
    distillation = Distillation(TASK, settings(), student.base.model, student.base, numbers=128 * 2)
    distillation.outcome(student, batch()).loss.backward()
    assert max(seen) == 2
    assert sum(seen) >= 3 * 12  # the student's twice: again in the backward


def test_the_base_as_teacher_is_plain_whatever_is_active() -> None:
    student, _ = pair()
    distillation = Distillation(TASK, settings(), student.base.model, student.base)
    expected = distillation.outcome(student, batch()).loss.item()
    student.base.activate("other")
    assert distillation.outcome(student, batch()).loss.item() == expected


def test_padded_vocabularies_are_compared_as_far_as_both_go() -> None:
    student, _ = pair()
    wide = veneer.Base(tiny_llama(vocab_size=136).double())
    inputs = batch()
    found = Distillation(TASK, settings(weight=1), wide.model, wide).outcome(student, inputs)
    got, wanted = (
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1, :128]
        for model in (student, wide.model)
    )
    targets = inputs["labels"][:, 1:]
    kept = targets != -100
    expected = naive(got[kept], wanted[kept], targets[kept], settings(weight=1))
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_classification_is_the_formula_too() -> None:
    student, other = pair(tiny_bert())
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    labels, task = torch.tensor([2, 0]), SequenceClassification(labels=LABELS)
    for kind in ("forward", "reverse", "jsd"):
        how = settings(divergence=kind)
        found = Distillation(task, how, other, student.base).outcome(student, {**inputs, "labels": labels})
        with torch.no_grad():
            wanted = other(**inputs).logits
        expected = naive(student(**inputs).logits, wanted, labels, how)
        assert found.loss.item() == pytest.approx(expected.item(), rel=1e-12)
        mine, theirs = gradients(student, found.loss), gradients(student, expected)
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-11)


def test_without_weight_it_is_plain_cross_entropy() -> None:
    student, other = pair()
    none = settings().model_copy(update={"weight": 0.0})
    found = Distillation(TASK, none, other, student.base).outcome(student, batch()).loss
    plain = TASK.outcome(student, batch()).loss
    assert found.item() == pytest.approx(plain.item(), rel=1e-12)
    assert torch.allclose(gradients(student, found), gradients(student, plain), rtol=1e-9, atol=1e-12)


def test_the_square_of_the_temperature_keeps_gradients_as_large() -> None:
    """At high T the divergence becomes half the mean square distance of centred logits, whatever T is."""
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(4, 50, generator=generator).double() for _ in range(2))
    difference = (t - s) - (t - s).mean(-1, keepdim=True)
    limit = float(difference.square().sum() / 2 / 50)
    for kind, share in (("forward", 1), ("reverse", 1), ("jsd", 1 / 4)):
        for temperature in (1e3, 1e4):
            assert float(divergence(s, t, kind, temperature)) == pytest.approx(limit * share, rel=1e-2)
    assert float(divergence(t, t, "jsd", 3.0)) == pytest.approx(0, abs=1e-12)


def test_a_teacher_may_rule_answers_out() -> None:
    s, t = torch.zeros(1, 3).double().requires_grad_(), torch.tensor([[0.0, 0.0, -torch.inf]]).double()
    half, third, middle = 1 / 2, 1 / 3, 5 / 12  # the teacher's, the student's, and between them
    to_teacher = math.log(half / middle)
    to_student = 2 * third * math.log(third / middle) + third * math.log(third / (third / 2))
    for kind, expected in (("forward", math.log(half / third)), ("jsd", (to_teacher + to_student) / 2)):
        loss = divergence(s, t, kind)
        assert loss.item() == pytest.approx(expected, rel=1e-9)
        assert torch.isfinite(torch.autograd.grad(loss, s)[0]).all()


def test_teachers_don_t_drop_anything_out() -> None:
    """The teacher is as it is out of training, the student as in training, and both modes stay."""
    student, other = pair(tiny_bert(hidden_dropout_prob=0.5))
    task = SequenceClassification(labels=LABELS)
    student.train()
    seen: list[bool] = []
    student.base.model.classifier.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    inputs = {**batch(), "labels": torch.tensor([2, 0])}
    Distillation(task, settings(), other, student.base).outcome(student, inputs)
    assert seen == [False, True]
    assert student.base.model.training


def test_models_that_do_more_to_their_logits_are_taken_whole() -> None:
    """Gemma 2 caps them after the projection; an adapter may have a projection of its own."""
    import transformers

    config = transformers.Gemma2Config(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0, initializer_range=0.5,
    )  # fmt: skip
    capped = veneer.Base(transformers.Gemma2ForCausalLM(config).double().eval())
    inputs = batch()
    scores = TASK.scores(capped.model, inputs)
    logits = capped.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    kept = inputs["labels"][:, 1:] != -100
    assert torch.allclose(scores.logits(scores.features), logits[kept])
    assert scores.features.shape == (12, 128)

    base = veneer.Base(tiny_llama().double())
    head = base.model.get_output_embeddings().weight.detach().clone()
    student = base.attach(veneer.HeadOnly(), "s", modules={"lm_head": {"weight": head}})
    found = Distillation(TASK, settings(teacher="base"), base.model, base).outcome(student, inputs)
    assert gradients(student, found.loss).abs().max() > 0


def test_virtual_tokens_are_left_out() -> None:
    from veneer.methods import method_class

    base = veneer.Base(tiny_llama().double())
    student = base.attach(method_class("prompt")(length=3), "s").double()
    perturb(student)
    inputs = batch()
    found = Distillation(TASK, settings(), base.model, base).outcome(student, inputs)
    got = student(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    wanted = base.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    targets = inputs["labels"][:, 1:]
    expected = naive(got[targets != -100], wanted[targets != -100], targets[targets != -100], settings())
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-12)

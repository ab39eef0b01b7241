"""Teacher and student: each method recovers what it can represent.

The teacher is a tiny Llama under the method with random parameters, the student the same under the method as it starts;
both have the method's fixed parts (masks, shared random factors) in common. The student learns the teacher's logits on
random inputs, by Adam at one rate and for as many steps for all methods, and is measured on inputs it has not seen. VB-LoRA may be left with more of
its loss: which vectors it mixes is a choice without a gradient, and it gets there in twice the steps.
"""

from __future__ import annotations

import pytest
import torch
from contracts import CONTRACTS, method, trained
from families import MARKER

import veneer
from helpers import tiny_llama

STEPS, RATE = 200, 1e-2
NOISE = 0.1
"""Standard deviation of what the teacher's parameters are off where the method starts."""
VOCABULARY = 56
LEFT = 0.05
"""The share of its loss at the start that a student may be left with, at most."""


def adapter_of(name: str) -> veneer.Adapter:
    model = tiny_llama(vocab_size=VOCABULARY, initializer_range=0.2, num_hidden_layers=1).requires_grad_(False)
    return veneer.Base(model).attach(method(name), "it").eval()


def left(name: str, steps: int = STEPS) -> float:
    """The student's loss after so many steps, relative to that at the start."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = adapter_of(name), adapter_of(name)
    if CONTRACTS[name].kept:
        for adapter in (teacher, student):
            trained(adapter, name)
        student.load_state_dict(adapter_of(name).state_dict() | dict(teacher.named_buffers()))
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * NOISE)

    def loss(rows: int) -> torch.Tensor:
        ids = torch.randint(0, VOCABULARY, (rows, 8), generator=generator)
        ids[:, 2] = MARKER  # where virtual tokens may stand
        with torch.no_grad():
            target = teacher(ids).logits
        return (student(ids).logits - target).square().mean()

    with torch.no_grad():
        start = float(loss(32))
    assert start > 1e-5  # the teacher is another function
    optimizer = torch.optim.Adam(student.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(16).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return float(loss(32)) / start


@pytest.mark.parametrize("name", sorted(CONTRACTS))
def test_student_reaches_its_teacher(name: str) -> None:
    assert left(name) < CONTRACTS[name].left

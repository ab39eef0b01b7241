"""Tiny models: a second thread only gets in the way."""

from collections.abc import Iterator

import pytest
import torch

from veneer.kernels import attention


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def fast_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every dtype, so that the whole harness runs through it."""
    monkeypatch.setattr(attention, "GAINS", {torch.bfloat16, torch.float32, torch.float64})

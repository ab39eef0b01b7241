"""Small models, data and perturbations for tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode


def tiny_llama(**changes: object) -> transformers.PreTrainedModel:
    """A two-layer Llama with grouped query attention, random weights."""
    settings = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | changes)).eval()


def tiny_bert(**changes: object) -> transformers.PreTrainedModel:
    """A two-layer BERT classifier with three labels, random weights and biases."""
    settings = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "num_labels": 3,
        "initializer_range": 0.3,
    }
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**settings | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model


def perturb(module: torch.nn.Module, std: float = 0.1, seed: int = 1) -> None:
    """Random values for all parameters, so that nothing is zero by initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    """A JSONL file of rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sums(count: int, start: int = 0) -> list[dict[str, object]]:
    """Prompts and completions of uneven length."""
    return [
        {
            "prompt": f"What is {n} plus {n % 7}?" + " Please." * (n % 5),
            "completion": f"{n + n % 7}" + " it is" * (n % 3),
        }
        for n in range(start, start + count)
    ]


def command(*arguments: object) -> int:
    """Run the command line in this process; its exit code."""
    from veneer.cli.__main__ import main

    try:
        main([str(argument) for argument in arguments])
    except SystemExit as ended:
        return int(ended.code or 0)
    raise AssertionError("the command line always exits")


class Called(TorchDispatchMode):
    """Names of the operations in C that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "veneer":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))

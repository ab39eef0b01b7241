"""Makes the golden values in this folder with the `adapters` library (Poth et al. 2023, Apache-2.0), once.

In an environment of its own, for it wants an older transformers:

    python -m venv golden && golden/bin/pip install torch==2.13.0 adapters==1.3.0
    golden/bin/python tests/methods/golden/make.py

Tiny random models in float64. A file ``MODEL.safetensors`` has a base's weights and inputs, ``MODEL-METHOD.safetensors``
a method's random weights in the library's own names, the output, and the gradients of ``(output · probe).sum()`` over
positions that are no padding. ``index.json`` says what was made of what.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

import adapters
from adapters import composition

HERE = Path(__file__).parent
WIDTH = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"vocab_size": 20, "max_position_embeddings": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", {**WIDTH, **TEXT}),
    "llama": ("LlamaModel", {**WIDTH, **TEXT, "num_key_value_heads": 1}),
    "gpt2": (
        "GPT2Model",
        {
            "n_layer": 2,
            "n_embd": 16,
            "n_head": 2,
            "n_positions": 24,
            "vocab_size": 20,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "bart": (
        "BartModel",
        {
            "encoder_layers": 1,
            "decoder_layers": 1,
            "d_model": 16,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            **TEXT,
            "decoder_start_token_id": 1,
        },
    ),
}
# The library's own Pfeiffer bottleneck reads the norm's output, LN(h + residual); the others read the branch's, h.
BEFORE_NORM = {"original_ln_before": False}


def seq(**settings: Any) -> adapters.SeqBnConfig:
    return adapters.SeqBnConfig(**BEFORE_NORM, **settings)


PREFIX = {"prefix_length": 3, "bottleneck_size": 5}
BOTTLENECKS = {
    "houlsby": adapters.DoubleSeqBnConfig(reduction_factor=4),
    "pfeiffer": seq(reduction_factor=4),
}
CELLS: dict[str, dict[str, Any]] = {
    "bert": {
        **BOTTLENECKS,
        "pfeiffer-after-norm": adapters.SeqBnConfig(reduction_factor=4),
        "parallel": adapters.ParBnConfig(reduction_factor=4),
        "compacter": adapters.CompacterConfig(reduction_factor=2, phm_dim=4),
        "compacter++": adapters.CompacterPlusPlusConfig(**BEFORE_NORM, reduction_factor=2, phm_dim=4),
        "fusion": seq(reduction_factor=4),
        "prefix": adapters.PrefixTuningConfig(**PREFIX),
        "mam": adapters.MAMConfig(adapters.PrefixTuningConfig(**PREFIX), adapters.ParBnConfig(reduction_factor=4)),
        "unipelt": adapters.UniPELTConfig(
            adapters.PrefixTuningConfig(**PREFIX), seq(reduction_factor=4), adapters.LoRAConfig(r=2, alpha=2)
        ),
    },
    "llama": BOTTLENECKS,
    "gpt2": BOTTLENECKS,
    "bart": {**BOTTLENECKS, "parallel": adapters.ParBnConfig(reduction_factor=4)},
}
FUSED = ("a", "b")


def randomise(model: torch.nn.Module, names: list[str], seed: int, std: float) -> None:
    """So that nothing is at its start, where zeros hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in sorted(names):
            value = torch.randn(parameters[name].shape, generator=generator, dtype=torch.float64) * std
            if name.endswith("weight") and ("norm" in name.lower() or "ln_" in name):
                value += 1
            parameters[name].copy_(value)


def exact_norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """transformers' root-mean-square norms compute in float32 whatever they are given."""
    return (
        self.weight * hidden_states * torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + self.variance_epsilon)
    )


transformers.models.llama.modeling_llama.LlamaRMSNorm.forward = exact_norm


def base_of(name: str) -> torch.nn.Module:
    architecture, settings = MODELS[name]
    config = getattr(transformers, architecture).config_class(**settings, attn_implementation="sdpa")
    model = getattr(transformers, architecture)(config).double().eval()
    randomise(model, [key for key, _ in model.named_parameters()], seed=1, std=0.3)
    return model


def inputs_for(name: str, padded: bool) -> dict[str, torch.Tensor]:
    ids = torch.arange(3 * 7).view(3, 7) * 5 % 17 + 3
    lengths = torch.tensor([7, 5, 3] if padded else [7, 7, 7])
    mask = (torch.arange(7) < lengths[:, None]).long()
    found = {"input_ids": ids * mask, "attention_mask": mask}
    if name == "bart":
        found["decoder_input_ids"] = ids[:, :4].flip(1).contiguous()
    return found


def made(name: str, method: str, config: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a cell, and what it is."""
    model = base_of(name)
    own = {key for key, _ in model.named_parameters()}
    adapters.init(model)
    if method == "fusion":
        for each in FUSED:
            model.add_adapter(each, config=config)
        model.add_adapter_fusion(list(FUSED))
        model.active_adapters = composition.Fuse(*FUSED)
    else:
        model.add_adapter("a", config=config)
        model.active_adapters = "a"
    model.double().eval()
    method_names = [key for key, _ in model.named_parameters() if key not in own]
    randomise(model, method_names, seed=2, std=0.5)
    scores = [key for key in method_names if ".query.weight" in key or ".key.weight" in key]
    randomise(model, [key for key in scores if "fusion" in key], seed=4, std=0.1)  # a softmax that is not saturated
    padded = method != "unipelt"  # its gates' means take padding in, which is wrong
    inputs = inputs_for(name, padded)
    shift = PREFIX["prefix_length"] if method in ("prefix", "mam", "unipelt") else 0
    if shift:  # veneer's positions start behind the prefix, as peft's do
        inputs["position_ids"] = (torch.arange(7) + shift).expand(3, -1).contiguous()
    output = model(**inputs).last_hidden_state
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    if name != "bart":
        probe *= inputs["attention_mask"][..., None]
    parameters = dict(model.named_parameters())
    for key in method_names:
        parameters[key].requires_grad_(True)
    gradients = torch.autograd.grad((output * probe).sum(), [parameters[key] for key in method_names])
    plain = base_of(name)(**inputs).last_hidden_state
    assert (plain - output).abs().max() > 1e-2
    tensors = {"output": output, "probe": probe}
    tensors |= {f"inputs.{key}": value for key, value in inputs.items()}
    tensors |= {f"weights.{key}": parameters[key] for key in method_names}
    tensors |= {f"gradients.{key}": value for key, value in zip(method_names, gradients, strict=True)}
    parts = getattr(config, "configs", [config])
    settings = [{"class": type(part).__name__, **dataclasses.asdict(part)} for part in parts]
    return tensors, {"settings": settings, "padded": padded, "position_shift": shift}


def main() -> None:
    index: dict[str, Any] = {
        "made_by": {
            "adapters": adapters.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
        "models": {name: {"class": cls, "config": settings} for name, (cls, settings) in MODELS.items()},
        "cells": {},
    }
    for name, methods in CELLS.items():
        weights = {key: value.detach().clone() for key, value in base_of(name).state_dict().items()}
        save_file(weights, HERE / f"{name}.safetensors")
        for method, config in methods.items():
            tensors, about = made(name, method, config)
            kept = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
            save_file(kept, HERE / f"{name}-{method}.safetensors")
            index["cells"][f"{name}-{method}"] = about
            print(name, method, sum(key.startswith("weights.") for key in kept), "weights")
    (HERE / "index.json").write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()

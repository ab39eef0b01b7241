"""Against the `adapters` library: its outputs and gradients, kept in ``golden/`` (see ``golden/make.py``).

Known differences, on purpose:

- Its Pfeiffer bottleneck, as configured by default, reads the norm's output, LN(h + residual), and adds to h; veneer's
  reads h, the branch's output. The files for it (``pfeiffer-after-norm``) are there to show that they differ; the
  others are made with `original_ln_before=False`.
- Beside the feed-forward of a model with norms before its branches (Llama, GPT-2) its parallel adapter reads the
  residual stream, not the branch's input as the paper has it; so it is compared on BERT and BART only.
- Its prefixes leave the positions where they were; veneer's, as peft's, start behind the prefix. The values for
  prefixes are made with positions shifted so.
- UniPELT's gates: its means take in padding, which is wrong (compared without padding), and a gated LoRA leaves out
  alpha / r, which is 2 here (compared with half its B).
- Its dropouts are off here; ours has none in these methods.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import exact_norm
from safetensors.torch import load_file
from torch import Tensor

import veneer
from veneer.methods import method_class

GOLDEN = Path(__file__).parent / "golden"
INDEX = json.loads((GOLDEN / "index.json").read_text())
EXACT = 1e-9
Values = Mapping[str, Tensor]
# Where the library keeps the bottleneck that follows a branch, by where ours is.
HOMES = {
    ".attention.output.dropout": ".attention.output", ".output.dropout": ".output",
    ".self_attn.o_proj": ".attention_adapters", ".mlp.down_proj": ".output_adapters",
    ".attn.resid_dropout": ".attention_adapters", ".mlp.dropout": ".output_adapters",
    ".self_attn.out_proj": ".attention_adapters", ".fc2": ".output_adapters",
}  # fmt: skip


def home(path: str) -> str:
    """The library's module for one of our branch sites."""
    return next(path.removesuffix(end) + theirs for end, theirs in HOMES.items() if path.endswith(end))


def bottleneck(weights: Values, path: str, name: str = "a") -> dict[str, Tensor]:
    theirs = f"{home(path)}.adapters.{name}."
    return {
        f"adapter_{which}.{part}": weights[f"{theirs}adapter_{which}{inner}.{part}"]
        for which, inner in (("down", ".0"), ("up", ""))
        for part in ("weight", "bias")
    }


def products(weights: Values, path: str) -> dict[str, Tensor]:
    theirs = f"{home(path)}.adapters.a."
    names = {"s": "W_left", "t": "W_right", "bias": "b"}
    own = {
        f"adapter_{which}.{ours}": weights[f"{theirs}adapter_{which}{inner}.{name}"]
        for which, inner in (("down", ".0"), ("up", ""))
        for ours, name in names.items()
    }
    return {**own, "base_model.model.phm_rule": weights["shared_parameters.a.phm_rule"]}


def table(weights: Values) -> Tensor:
    """What its reparametrising network makes of its embeddings: all layers' keys and values."""
    pool = next(key for key in weights if key.endswith("wte.weight")).removesuffix("wte.weight") + "control_trans."
    inner = torch.tanh(
        weights[pool.replace("control_trans.", "wte.weight")] @ weights[pool + "0.weight"].mT + weights[pool + "0.bias"]
    )
    return inner @ weights[pool + "2.weight"].mT + weights[pool + "2.bias"]


def prefix(weights: Values, path: str) -> dict[str, Tensor]:
    return {"prompt_embeddings": table(weights)}


def mam(weights: Values, path: str) -> dict[str, Tensor]:
    own = {} if ".self" in path else {f"1.{name}": value for name, value in bottleneck(weights, path).items()}
    return {**own, "0.prompt_embeddings": table(weights)}


def fused(weights: Values, path: str) -> dict[str, Tensor]:
    theirs = f"{home(path)}.adapter_fusion_layer.a,b."
    own = {
        name: weights[theirs + name]
        for name in ("query.weight", "query.bias", "key.weight", "key.bias", "value.weight")
    }
    members = {f"{n}.{name}": value for n in (0, 1) for name, value in bottleneck(weights, path, "ab"[n]).items()}
    return {**own, **members}


def unipelt(weights: Values, path: str) -> dict[str, Tensor]:
    def gate(index: int, theirs: str) -> dict[str, Tensor]:
        return {f"{index}.gate.{part}": weights[f"{theirs}.{part}"].squeeze(0) for part in ("weight", "bias")}

    common = {"1.prompt_embeddings": table(weights)}
    if path.endswith(".self"):
        return {**common, **gate(1, f"{path}.prefix_tuning.prefix_gates.a")}
    if path.endswith(".dropout"):
        own = {f"2.{name}": value for name, value in bottleneck(weights, path).items()}
        return {**common, **own, **gate(2, f"{home(path)}.adapters.a.gate")}
    a, b = (weights[f"{path}.loras.a.lora_{which}"] for which in "AB")
    return {**common, "0.lora_A.weight": a, "0.lora_B.weight": b / 2, **gate(0, f"{path}.loras.a.gate")}


Translate = Callable[[Values, str], dict[str, Tensor]]
CELLS: dict[str, tuple[str, dict[str, Any], Translate]] = {
    **{f"{model}-houlsby": ("houlsby", {"bottleneck": 4, "activation": "silu"}, bottleneck)
       for model in ("bert", "llama", "gpt2", "bart")},
    **{f"{model}-pfeiffer": ("pfeiffer", {"bottleneck": 4}, bottleneck) for model in ("bert", "llama", "gpt2", "bart")},
    **{f"{model}-parallel": ("parallel", {"bottleneck": 4}, bottleneck) for model in ("bert", "bart")},
    "bert-compacter": ("compacter", {"bottleneck": 8, "n": 4}, products),
    "bert-compacter++": ("compacter", {"bottleneck": 8, "n": 4, "places": "mlp"}, products),
    "bert-prefix": ("prefix", {"length": 3}, prefix),
    "bert-fusion": ("fusion", {"methods": [{"name": "pfeiffer", "bottleneck": 4}] * 2}, fused),
    "bert-unipelt": ("unipelt", {"rank": 2, "length": 3, "bottleneck": 4}, unipelt),
    "bert-mam": ("mam", {"length": 3, "mlp": False, "bottleneck": 4}, mam),
}  # fmt: skip


def base_of(name: str) -> veneer.Base:
    about = INDEX["models"][name]
    cls = getattr(transformers, about["class"])
    model = cls(cls.config_class(**about["config"])).double().eval()
    told = model.load_state_dict(load_file(GOLDEN / f"{name}.safetensors"), strict=False)
    assert not told.unexpected_keys
    assert all("embed_tokens" in key for key in told.missing_keys)  # BART's, tied
    model.tie_weights()
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":  # computes in float32; the values were made with exact ones
            module.forward = partial(exact_norm, module)
    return veneer.Base(model)


def beginning(values: Values, prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def ours(cell: str, method: str, settings: Mapping[str, Any], translate: Translate) -> tuple[Tensor, dict[str, Tensor]]:
    """Our output with the library's weights, and the gradients with respect to these."""
    golden = load_file(GOLDEN / f"{cell}.safetensors")
    weights = {key: value.requires_grad_() for key, value in beginning(golden, "weights.").items()}
    adapter = base_of(cell.partition("-")[0]).attach(method_class(method)(**settings), "a").double().eval()
    pairs: dict[int, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        for site in adapter.sites:
            with torch.enable_grad():
                translated = translate(weights, site.path)
            for name, own in adapter.parameters_at(site.path).items():
                own.copy_(translated[name])
                pairs[id(own)] = (own, translated[name])
    trained = {id(own): own for own in adapter.parameters()}
    assert set(trained) <= set(pairs)
    inputs = beginning(golden, "inputs.")
    if INDEX["cells"][cell]["position_shift"]:
        inputs.pop("position_ids")
    output = adapter(**inputs).last_hidden_state
    (output * golden["probe"]).sum().backward()
    learned = [(theirs, own.grad) for own, theirs in pairs.values() if id(own) in trained]
    torch.autograd.backward(*zip(*learned, strict=True))
    return output.detach(), {key: value.grad for key, value in weights.items() if value.grad is not None}


def seen(cell: str, output: Tensor) -> Tensor:
    """The output at real positions."""
    golden = load_file(GOLDEN / f"{cell}.safetensors")
    return output if output.shape[1] != 7 else output * golden["inputs.attention_mask"][..., None]


@pytest.mark.parametrize("cell", CELLS)
def test_outputs_and_gradients(cell: str) -> None:
    golden = load_file(GOLDEN / f"{cell}.safetensors")
    output, gradients = ours(cell, *CELLS[cell])
    torch.testing.assert_close(seen(cell, output), seen(cell, golden["output"]), rtol=EXACT, atol=EXACT)
    expected = beginning(golden, "gradients.")
    still = {key for key in expected if ".adapters." in key} if cell.endswith("fusion") else set()  # those it fuses
    assert set(gradients) == set(expected) - still
    for key, gradient in gradients.items():
        if not key.endswith("key.bias"):  # a softmax over the adapters doesn't see it
            assert float(expected[key].abs().max()) > 1e-6, key
        torch.testing.assert_close(
            gradient, expected[key], rtol=EXACT, atol=EXACT, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_its_pfeiffer_reads_the_norm() -> None:
    cell = "bert-pfeiffer-after-norm"
    output, _ = ours(cell, *CELLS["bert-pfeiffer"])
    theirs = load_file(GOLDEN / f"{cell}.safetensors")["output"]
    assert float((seen(cell, output) - seen(cell, theirs)).abs().max()) > 1e-2


def test_every_file_is_used_and_small() -> None:
    made = {*INDEX["cells"], *INDEX["models"]}
    assert {file.stem for file in GOLDEN.glob("*.safetensors")} == made
    assert sum(file.stat().st_size for file in GOLDEN.iterdir() if file.is_file()) < 1_000_000

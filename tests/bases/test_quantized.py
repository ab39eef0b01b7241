"""Quantised bases: the grid, the bytes, what they are told apart by, and what they refuse."""

from __future__ import annotations

import builtins
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import veneer
from helpers import command, perturb, tiny_llama, write_jsonl
from veneer.bases.quantized import QuantizedLinear, dequantized, held, kind_of, numbers, weight_behind
from veneer.errors import AdapterError, BaseError, ConfigError, VeneerWarning
from veneer.training.config import RunConfig

# QLoRA (Dettmers et al. 2023), appendix E
NF4 = (-1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1)  # fmt: skip


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_nf4_rounds_to_its_grid_block_by_block() -> None:
    """Each block of 64 is its greatest absolute value (kept to 8 bits) times the nearest number of the grid."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(256, 96, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(96, 256, generator=generator) * torch.rand(96, 1, generator=generator))
    quantized = QuantizedLinear(linear, "nf4", torch.device("cpu"))
    blocks, found = linear.weight.detach().view(-1, 64), dequantized(quantized.weight).view(-1, 64)
    constants = found.abs().amax(1, keepdim=True)  # of the grid's ±1, which every block has
    inner = quantized.weight.quant_state.state2  # the constants' own: 8 bits, blocks of 256
    assert (inner.blocksize, len(inner.code), len(inner.absmax)) == (256, 256, 2)
    widest = inner.code.diff().max() / 2 * inner.absmax.max()
    assert (constants - blocks.abs().amax(1, keepdim=True)).abs().max() <= widest * 1.001
    nearest = (found / constants).unsqueeze(-1).sub(torch.tensor(NF4)).abs().min(-1)
    assert nearest.values.max() < 1e-6  # all on the grid
    exact = blocks / blocks.abs().amax(1, keepdim=True)
    best = exact.unsqueeze(-1).sub(torch.tensor(NF4)).abs().argmin(-1)
    assert torch.equal(nearest.indices, best)  # each at its nearest number


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4 + 8 / 64 + 32 / (64 * 256)), ("int8", 8 + (32 + 8) / 576)])
def test_bytes_held_are_those_expected(kind: str, bits: float) -> None:
    plain = veneer.load_base("smollm2-135m-instruct")
    base = veneer.load_base("smollm2-135m-instruct", quantize=kind)
    assert base.quantized == kind
    assert base.parameter_count == plain.parameter_count
    inside = [module for module in base.model.modules() if isinstance(module, QuantizedLinear)]
    assert len(inside) == 210
    weights = sum(numbers(module.weight) for module in inside)
    assert weights == 106_168_320
    per_weight = 8 * sum(held(module.weight) for module in inside) / weights
    assert per_weight == pytest.approx(bits, rel=0.005)
    assert base.nbytes == pytest.approx(plain.nbytes - weights * (2 - per_weight / 8), rel=1e-9)
    assert base.fingerprint == plain.fingerprint
    ids = base.tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert base.tokenizer.decode(base.model(**ids).logits[0, -1].argmax()) == " Paris"
    assert base.model.get_output_embeddings().weight.dtype == plain.dtype


def test_what_is_kept_for_the_backward_is_the_quantised_weight() -> None:
    """Not the dequantised one: that would be as large as the base before."""
    for kind in ("nf4", "int8"):
        module = QuantizedLinear(nn.Linear(64, 64), kind, torch.device("cpu"))
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            module(torch.randn(3, 64, requires_grad=True)).sum()
        assert not saved


def test_trained_over_one_loads_over_the_other_and_says_so(tiny: Path, tmp_path: Path) -> None:
    base, plain = veneer.load_base(tiny, quantize="nf4"), veneer.load_base(tiny)
    assert base.fingerprint == veneer.Base(tiny_llama()).fingerprint
    adapter = base.attach(veneer.LoRA(rank=2), "a")
    perturb(adapter)
    adapter.save(tmp_path / "a")
    with pytest.warns(VeneerWarning, match="quantised to nf4, and runs over it unquantised"):
        over_plain = plain.load(tmp_path / "a")
    ids = torch.arange(10)[None] + 3
    with torch.no_grad():
        assert not torch.equal(over_plain(ids).logits, adapter(ids).logits)
        again = veneer.load_adapter(tmp_path / "a")  # quantised as it was
        assert again.base.quantized == "nf4"
        assert torch.equal(again(ids).logits, adapter(ids).logits)
    over_plain.save(tmp_path / "b")
    with pytest.warns(VeneerWarning, match="unquantised, and runs over it quantised to nf4"):
        base.load(tmp_path / "b")


def test_a_merged_model_is_a_plain_one(tiny: Path, tmp_path: Path) -> None:
    adapter = veneer.load_base(tiny, quantize="nf4", dtype="bfloat16").attach(veneer.LoRA(rank=2), "a")
    perturb(adapter)
    with pytest.warns(VeneerWarning, match="can be lost"):
        merged = adapter.merged()
    merged.save_pretrained(tmp_path / "merged")
    again = veneer.load_base(tmp_path / "merged")
    assert again.quantized is None
    assert again.dtype == torch.bfloat16
    ids = torch.arange(10)[None] + 3
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, merged(ids).logits)
    assert adapter.base.quantized == "nf4"


def test_loftq_takes_the_best_rank_r_of_what_quantising_took(tiny: Path, tmp_path: Path) -> None:
    base, plain = veneer.load_base(tiny, quantize="nf4"), veneer.load_base(tiny)
    adapter = base.attach(veneer.LoRA(rank=5, alpha=7, init="loftq"), "a")
    for site in adapter.sites:
        own = adapter.parameters_at(site.path)
        update = 7 / 5 * own["lora_B.weight"] @ own["lora_A.weight"]
        weight = plain.model.get_submodule(site.path).weight
        quantised = weight_behind(base.model.get_submodule(site.path))
        u, s, v = torch.linalg.svd((weight - quantised).double())
        best = (u[:, :5] * s[:5]) @ v[:5]
        # By its error: singular vectors of almost equal singular values are any mixture of each other.
        assert (weight - quantised - update).double().norm() <= (1 + 1e-6) * (weight - quantised - best).double().norm()
        assert (weight - quantised - update).norm() < 0.95 * (weight - quantised).norm()
    adapter.save(tmp_path / "a")
    with pytest.warns(VeneerWarning, match="unquantised"):  # its start isn't computed again, which would need both
        veneer.load_base(tiny).load(tmp_path / "a")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_loftq_is_pefts(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """peft's start for a base quantised already, with the scale divided out (peft has the sum right at alpha = r)."""
    import peft
    import transformers
    from peft.utils import loftq_utils

    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, quantization_config=settings)
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=5, lora_alpha=5, target_modules=["up_proj", "v_proj"]))
    monkeypatch.setattr(loftq_utils, "is_xpu_available", lambda: False)
    to = torch.Tensor.to
    monkeypatch.setattr(  # it computes on a GPU, whatever the model is on
        torch.Tensor, "to", lambda self, *a, **k: to(self, *a, **(k | {"device": "cpu"} if "device" in k else k))
    )
    peft.replace_lora_weights_loftq(theirs, model_path=str(tiny / "model.safetensors"))
    ours = veneer.load_base(tiny, quantize="nf4").attach(
        veneer.LoRA(rank=5, alpha=5, init="loftq", targets=("up", "v")), "a"
    )
    for site in ours.sites:
        mine, module = ours.parameters_at(site.path), theirs.base_model.model.get_submodule(site.path)
        assert torch.equal(weight_behind(ours.base.model.get_submodule(site.path)), weight_behind(module.base_layer))
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        assert torch.allclose(mine["lora_B.weight"] @ mine["lora_A.weight"], b @ a, atol=1e-6)


def test_loftq_needs_the_weights_from_before(tiny: Path) -> None:
    for base in (veneer.load_base(tiny), veneer.Base(veneer.load_base(tiny, quantize="nf4").model)):
        with pytest.raises(AdapterError, match='load it by name with quantize="nf4"'):
            base.attach(veneer.LoRA(init="loftq", rank=4), "a")


def test_mistakes_are_told(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BaseError, match=r"'nf5' is none of nf4, int8\. Did you mean 'nf4'"):
        veneer.load_base(tiny, quantize="nf5")
    whole = {"base": "b", "data": {"train": "d"}, "output": "o"}
    with pytest.raises(ConfigError, match="quantize: should be 'nf4' or 'int8'"):
        RunConfig.parse(whole | {"quantize": "int4"})
    with pytest.raises(ConfigError, match=r"load_in_4bit: unknown key. It is called quantize \(nf4\) here"):
        RunConfig.parse(whole | {"load_in_4bit": True})
    known = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] in ("bitsandbytes", "torchao"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return known(name, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(builtins, "__import__", without)
        for kind, library in (("nf4", "bitsandbytes"), ("int8", "torchao")):
            with pytest.raises(BaseError, match=re.escape(f"{kind} needs {library}")) as told:
                veneer.load_base(tiny, quantize=kind)
            assert "pip install 'veneer[quantized]'" in str(told.value)
    config = (tiny / "config.json").read_text()
    (tiny / "config.json").write_text(config.replace("{", '{"quantization_config": {"quant_method": "gptq"},', 1))
    with pytest.raises(BaseError, match="is quantised already; leave `quantize` out"):
        veneer.load_base(tiny, quantize="nf4")


def test_architecture_alone_is_not_quantised(tiny: Path) -> None:
    assert veneer.load_base(tiny, quantize="nf4", weights=False).quantized is None


def test_what_must_stay_in_float32_stays(tmp_path: Path) -> None:
    """T5 turns its input to the dtype of `wo`, which for packed weights would be bytes."""
    import transformers

    config = transformers.T5Config(
        num_layers=1, d_model=64, d_ff=128, num_heads=4, d_kv=16, vocab_size=99, decoder_start_token_id=0
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    model = veneer.load_base(tmp_path / "t5", quantize="nf4").model
    kinds = {path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert kinds == {"q", "k", "v", "o", "wi"}


def test_experts_stay_and_are_told(tmp_path: Path) -> None:
    import transformers

    config = transformers.MixtralConfig(
        num_hidden_layers=1, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=99, num_local_experts=4,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    with pytest.warns(VeneerWarning, match=r"The experts, \d\d% of MixtralForCausalLM's weights"):
        assert veneer.load_base(tmp_path / "moe", quantize="nf4").quantized == "nf4"


@pytest.mark.slow
def test_a_run_from_a_config_and_what_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """MiniLM in NF4: train, evaluate on the same quantised base, merge."""
    monkeypatch.chdir(tmp_path)
    rows: list[dict[str, object]] = [
        {"text": text, "label": label}
        for n in range(12)
        for text, label in ((f"what a lovely day, number {n}", "glad"), (f"nothing works, {n} times now", "sad"))
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    keys = ("base=minilm-l6", "data.train=rows.jsonl", "data.validation=0.25", "quantize=nf4", "output=run")
    assert command("train", *keys, "train.epochs=4", "train.learning_rate=3e-3") == 0
    told = capsys.readouterr()
    assert "torch.float32, nf4, cpu" in " ".join(f"{told.out}{told.err}".split())
    adapter = veneer.load_adapter("run")
    assert adapter.base.quantized == "nf4"
    assert veneer.evaluate(adapter, rows).adapter["accuracy"].value == 1.0
    assert kind_of(adapter.base.model.get_submodule("bert.pooler.dense").weight) is None
    with pytest.warns(VeneerWarning, match="can be lost"):
        assert command("merge", "run", "merged") == 0
    assert veneer.load_base("merged").quantized is None
    assert command("train", "--continue", "run", *keys[1:3], "output=more", "train.max_steps=1") == 0
    assert veneer.load_adapter("more").base.quantized == "nf4"

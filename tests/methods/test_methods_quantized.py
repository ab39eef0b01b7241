"""Every method over a quantised base: the contract once more, over a tiny Llama, BERT and GPT-2 in NF4 and int8."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from contracts import CONTRACTS, method, trained
from families import FAMILIES, run
from test_contract import EXACT, Look, off

import veneer
from helpers import perturb
from veneer.bases.quantized import KINDS, QuantizedLinear, quantize, weight_behind
from veneer.errors import AdapterError, TargetError, VeneerWarning

CELLS = [
    pytest.param(name, family, kind, id=f"{name}-{family}-{kind}", marks=() if family == usual else pytest.mark.slow)
    for name in sorted(CONTRACTS)
    for kind, usual in zip(KINDS, ("llama", "bert"), strict=True)
    for family in ("llama", "bert", "gpt2")
]


def base_of(family: str, kind: str) -> veneer.Base:
    """A family's model in float64 over quantised linear maps."""
    model = FAMILIES[family].model().requires_grad_(False)
    sites = veneer.Base(model).sites.resolve("all-linear")
    quantize(model, kind, [site.path for site in sites], torch.device("cpu"))
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == len(sites)
    return veneer.Base(model)


@pytest.mark.parametrize(("name", "family", "kind"), CELLS)
def test_methods_act_on_quantised_maps(name: str, family: str, kind: str, tmp_path: Path) -> None:
    """Identity, base untouched, gradients, files, and merging into what the quantised weights stand for."""
    base, inputs = base_of(family, kind), FAMILIES[family].inputs
    before = {key: _bits(value).clone() for key, value in base.model.state_dict().items()}
    with torch.no_grad():
        plain = run(base.model, inputs)
        try:
            adapter = base.attach(method(name), "a").double()
        except TargetError as error:
            pytest.skip(f"can't: {error}")
        fresh = run(adapter, inputs)
    promised = CONTRACTS[name].identity
    assert torch.equal(fresh, plain) or promised != "bitwise"
    assert (off(fresh, plain) < 1e-12) == (promised != "no")
    adapter.survey(Look(adapter, FAMILIES[family]))
    trained(adapter, name)

    adapted = run(adapter.train(), inputs) if family != "bert" else run(adapter, inputs)
    adapted.square().mean().backward()
    grads = {key: p.grad for key, p in adapter.named_parameters()}
    assert all(grad is not None for grad in grads.values()), [key for key, grad in grads.items() if grad is None]
    assert any(grad.abs().max() > 0 for grad in grads.values())  # type: ignore[union-attr]
    adapter.eval()
    with torch.no_grad():
        adapted = run(adapter, inputs)
        assert off(adapted, plain) > 1e-3
        adapter.save(tmp_path / "saved")
        assert torch.equal(run(base.load(tmp_path / "saved", "again").double(), inputs), adapted)
        if CONTRACTS[name].merges:
            _merges(adapter, adapted, inputs, FAMILIES[family].model())
        else:
            with pytest.raises(AdapterError, match="cannot be merged"):
                adapter.merged()
        assert torch.equal(run(base.model, inputs), plain)
    after = base.model.state_dict()
    assert all(torch.equal(_bits(after[key]), before[key]) for key in before)
    if not CONTRACTS[name].detached:
        _gradients_are_right(adapter, inputs)


def _bits(value: torch.Tensor) -> torch.Tensor:
    return getattr(value, "qdata", value)


def _gradients_are_right(adapter: veneer.Adapter, inputs: dict[str, torch.Tensor]) -> None:
    """Against a finite difference along a random direction."""
    direction = {
        key: torch.randn(p.shape, generator=torch.Generator().manual_seed(3)).double()
        for key, p in adapter.named_parameters()
    }
    adapter.zero_grad()
    run(adapter, inputs).square().mean().backward()
    slope = sum(float((p.grad * direction[key]).sum()) for key, p in adapter.named_parameters() if p.grad is not None)
    values, step = [], 1e-5
    for sign in (1, -2):
        with torch.no_grad():
            for key, p in adapter.named_parameters():
                p.add_(direction[key] * step * sign)
            values.append(float(run(adapter, inputs).square().mean()))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=2e-4, abs=1e-7)


def _merges(
    adapter: veneer.Adapter, adapted: torch.Tensor, inputs: dict[str, torch.Tensor], model: torch.nn.Module
) -> None:
    """Into a plain model, in the dtype the base computes in, and says what may be lost."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            merged = adapter.merged()
        except AdapterError as error:
            assert "has none" in str(error)  # a bias, and the base has no biases
            return
    assert ["can be lost" in str(each.message) for each in told] == [True]
    assert not any(isinstance(module, QuantizedLinear) for module in merged.modules())
    assert [type(module) for module in merged.modules()] == [type(module) for module in model.modules()]
    assert off(run(merged, inputs), adapted) < EXACT


def test_a_quantised_map_is_what_its_weight_says() -> None:
    """Output and gradients are those of the weight it stands for; so is what transposed maps become."""
    base = base_of("gpt2", "nf4")
    module = base.model.get_submodule("transformer.h.0.mlp.c_fc")
    x = torch.randn(3, 5, 32, dtype=torch.float64, requires_grad=True)
    weight, bias = weight_behind(module), module.bias.detach().requires_grad_()
    assert weight is not None
    assert weight.shape == (128, 32)
    assert weight.dtype == torch.float64
    module._parameters["bias"] = bias
    ours = torch.autograd.grad(module(x).square().sum(), (x, bias))
    theirs = torch.autograd.grad((x @ weight.T + bias).square().sum(), (x, bias))
    assert all(off(a, b) < 1e-14 for a, b in zip(ours, theirs, strict=True))


def test_a_swap_refuses_what_cannot_run_on_another_weight() -> None:
    """bitsandbytes' own modules, as transformers makes them, take what acts beside the weight and nothing else."""
    import bitsandbytes

    model = FAMILIES["llama"].model(torch.float32)
    for path in [site.path for site in veneer.Base(model).sites]:
        own = model.get_submodule(path)
        theirs = bitsandbytes.nn.Linear4bit(own.in_features, own.out_features, bias=False, quant_type="nf4")
        theirs.weight = bitsandbytes.nn.Params4bit(own.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, theirs)
    base = veneer.Base(model)
    assert base.quantized == "nf4"
    inputs = FAMILIES["llama"].inputs
    lora = base.attach(method("lora"), "lora")
    perturb(lora)
    with torch.no_grad():
        adapted = run(lora, inputs)
    with torch.no_grad(), pytest.warns(VeneerWarning, match="can be lost"):
        assert off(run(lora.merged(), inputs), adapted) < 1e-5
    with pytest.raises(AdapterError, match=r"Linear4bit cannot run on another weight.*quantize=\"nf4\""):
        run(base.attach(method("hira"), "hira"), inputs)

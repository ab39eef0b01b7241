"""The contract harness: every method on every family has every property, or says why it can't be there.

A fixed subset of the families runs in `make test`, all of them in `make test-all`, which also checks that
docs/coverage.md is what the harness finds (`python -m tests.methods.coverage` writes it).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import pytest
import torch
from contracts import CONTRACTS, method, trained
from families import FAMILIES, IDS, Family, run

import veneer
from helpers import Called, perturb
from veneer.bases import Site, fast
from veneer.bases.weights import stored, weight_of
from veneer.errors import AdapterError, TargetError
from veneer.kernels import attention as kernel
from veneer.kernels import native
from veneer.kernels.native import tiles
from veneer.methods import methods

ALWAYS = ("llama", "gpt2", "bert", "t5", "vit", "plain")
NAMES = sorted(CONTRACTS)
EXACT = 1e-9


def cells(families: Iterator[str] | tuple[str, ...] = tuple(FAMILIES)) -> list[object]:
    """All (method, family) pairs; those of rarer families are slow."""
    return [
        pytest.param(name, FAMILIES[family], id=f"{name}-{family}", marks=() if family in ALWAYS else pytest.mark.slow)
        for family in families
        for name in NAMES
    ]


def attached(name: str, family: Family) -> veneer.Adapter:
    """A perturbed adapter in float64; passes over cells where the method says it can't be."""
    base = veneer.Base(family.model().requires_grad_(False))
    try:
        adapter = base.attach(method(name), "a").double()
    except TargetError as error:
        assert len(str(error)) > 30  # it says why
        pytest.skip(f"can't: {error}")
    adapter.survey(Look(adapter, family))
    trained(adapter.double(), name)
    return adapter


class Look:
    """A `veneer.methods.Survey` whose one example is the family's batch."""

    def __init__(self, adapter: veneer.Adapter, family: Family) -> None:
        self.adapter, self.family = adapter, family

    def gradients(self, sites: Sequence[Site], examples: int) -> Iterator[dict[str, torch.Tensor]]:
        modules = [self.adapter.base.model.get_submodule(site.module) for site in sites]
        weights = [module._parameters[site.parameter or "weight"] for site, module in zip(sites, modules, strict=True)]
        for weight in weights:
            weight.requires_grad_(True)
        found = torch.autograd.grad(run(self.adapter, self.family.inputs).square().mean(), weights)
        for weight in weights:
            weight.requires_grad_(False)
        yield {
            site.path: weight_of(site, grad) if site.parameter else stored(module, {"weight": grad})["weight"]
            for site, module, grad in zip(sites, modules, found, strict=True)
        }


def off(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Greatest difference relative to the greatest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_every_method_has_a_contract() -> None:
    own = {name for name, cls in methods().items() if cls.__module__.startswith("veneer.")}  # a test may define others
    assert {contract.method or name for name, contract in CONTRACTS.items()} == own - {"head"}


@pytest.mark.parametrize(("name", "family"), cells())
def test_identity_base_and_switching(name: str, family: Family) -> None:
    """Identity where promised, bitwise; the base and its outputs untouched; a copy independent."""
    model = family.model().requires_grad_(False)
    base = veneer.Base(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        plain = run(model, family.inputs)
        try:
            adapter = base.attach(method(name), "a").double()
        except TargetError as error:
            pytest.skip(f"can't: {error}")
        fresh = run(adapter, family.inputs)
        promised = CONTRACTS[name].identity
        assert torch.equal(fresh, plain) or promised != "bitwise"
        assert (off(fresh, plain) < 1e-12) == (promised != "no")
        trained(adapter, name)
        adapted = run(adapter, family.inputs)
        assert off(adapted, plain) > 1e-3
        assert torch.equal(run(model, family.inputs), plain)
        twin = copy.deepcopy(base)
        assert torch.equal(run(twin["a"], family.inputs), adapted)
        perturb(twin["a"], std=0.2, seed=5)
        assert off(run(twin["a"], family.inputs), adapted) > 1e-6
        assert torch.equal(run(adapter, family.inputs), adapted)
        base.detach("a")
        assert torch.equal(run(model, family.inputs), plain)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


FORMS = {
    "llama": {"norm", "gated", "attention"}, "mistral": {"norm", "gated", "attention"}, "gpt2": {"attention"},
    "gemma": {"norm", "gated", "attention"}, "bert": {"attention"}, "t5": {"norm"}, "bart": {"attention"},
    "vit": {"attention"}, "plain": set(),
}  # fmt: skip
"""Faster forms of some families' computing that are known to be used."""


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f in ALWAYS else pytest.mark.slow) for f in FAMILIES])
def test_faster_forms_compute_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients with and without what stands in `veneer.bases.fast`."""
    used: set[str] = set()
    for name, place in (("norm", "rms_norm"), ("gated", "gated")):
        own = getattr(fast, place)
        monkeypatch.setattr(fast, place, lambda *a, own=own, name=name, **k: used.add(name) or own(*a, **k))
    own_attention = kernel.attention
    monkeypatch.setattr(kernel, "attention", lambda *a: used.add("attention") or own_attention(*a))
    adapter = attached("lora", FAMILIES[family])
    adapter.eval()  # no dropout; gradients all the same
    results = []
    for forms in (adapter.base._execution.fast, None):
        monkeypatch.setattr(adapter.base._execution, "fast", forms)
        adapter.zero_grad()
        output = run(adapter, FAMILIES[family].inputs)
        output.square().mean().backward()
        results.append([output.detach(), *(p.grad for p in adapter.parameters() if p.grad is not None)])
    assert used >= FORMS.get(family, set())
    for ours, theirs in zip(*results, strict=True):
        assert off(ours, theirs) < EXACT


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f in ALWAYS else pytest.mark.slow) for f in FAMILIES])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_forms_in_c_round_no_worse(dtype: torch.dtype, family: str) -> None:
    """Outputs and gradients with and without `veneer.kernels.native`, beside those of float64; of several adapters, as
    errors of the few outputs of one differ by up to three times with what happens to be rounded up."""
    if family in ("mixtral", "plain", "xlnet"):
        pytest.skip("can't: experts change with the rounding" if family == "mixtral" else "can't: none of them is used")
    if family == "gpt2" and dtype == torch.float32:
        pytest.skip("can't: none of them is used by maps that are Conv1D, with heads too narrow for tiles")
    if not native.there():
        pytest.skip(f"can't: {native.state()}")
    ratios = []
    for seed in range(4):
        adapter = attached("lora", FAMILIES[family])
        adapter.eval()
        perturb(adapter, std=0.05, seed=seed)
        adapter.base.model.to(dtype)
        adapter.to(dtype)
        with native.plain():
            exact, plain = (computed(adapter, family, each) for each in (torch.double, dtype))
        with Called() as called:
            ours = computed(adapter, family, dtype)
        if dtype == torch.float32 and not called.names and not tiles.there():
            pytest.skip("can't: none of them is used without tiles (AMX)")
        assert called.names >= COMPILED.get(family, set()) - ({"change"} if dtype == torch.float32 else set())
        assert called.names
        ratios += [(o - e).norm() / (p - e).norm() for e, o, p in zip(exact, ours, plain, strict=True)]
    assert torch.stack(ratios).log().mean().exp() <= 1.5
    assert max(ratios) <= 5


COMPILED = {
    "llama": {"rms_norm", "gated_backward", "rotary", "change"}, "gpt2": {"change"}, "bert": {"change"},
    "t5": {"rms_norm"}, "vit": {"change"},
}  # fmt: skip
"""Some of the operations in C that are known to be used; heads of a family here are too narrow for tiles."""


def computed(adapter: veneer.Adapter, family: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and gradients, the base in this dtype."""
    adapter.base.model.to(dtype)
    adapter.to(dtype).zero_grad()
    output = run(adapter, FAMILIES[family].inputs)
    output.to(torch.float64).square().mean().backward()
    grads = [p.grad.flatten() for p in adapter.parameters() if p.grad is not None]
    return output.detach().double(), torch.cat(grads).double()


@pytest.mark.parametrize(("name", "family"), cells())
def test_only_its_own_parameters_learn(name: str, family: Family) -> None:
    adapter = attached(name, family)
    model = adapter.base.model
    adapter.train()
    loss = run(adapter, family.inputs).square().mean()
    loss.backward()
    grads = {key: p.grad for key, p in adapter.named_parameters()}
    unused = [key for key, grad in grads.items() if grad is None]
    assert not unused or (CONTRACTS[name].unused and len(unused) < len(grads) / 4), unused
    assert any(grad.abs().sum() > 0 for grad in grads.values() if grad is not None)
    assert all(p.grad is None for key, p in model.named_parameters() if "veneer_adapters" not in key)


@pytest.mark.parametrize(("name", "family"), cells())
def test_gradients_are_those_of_the_function(name: str, family: Family) -> None:
    """Against a finite difference along a random direction, in float64."""
    if family.name == "mixtral":
        pytest.skip("can't: its router computes in float32, too coarse for a finite difference")
    if CONTRACTS[name].detached:
        pytest.skip("can't: a part of the gradient is left out by definition")
    adapter = attached(name, family).eval()
    direction = {
        key: torch.randn(p.shape, generator=torch.Generator().manual_seed(3)).double()
        for key, p in adapter.named_parameters()
    }

    def loss() -> torch.Tensor:
        return run(adapter, family.inputs).square().mean()

    loss().backward()
    slope = sum(float((p.grad * direction[key]).sum()) for key, p in adapter.named_parameters() if p.grad is not None)
    values, step = [], 1e-6  # small: relu has kinks on the way
    for sign in (1, -2):
        with torch.no_grad():
            for key, p in adapter.named_parameters():
                p.add_(direction[key] * step * sign)
            values.append(float(loss()))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=2e-4, abs=1e-7)


@pytest.mark.parametrize(("name", "family"), cells())
def test_merged_equals_adapted(name: str, family: Family) -> None:
    adapter = attached(name, family)
    if not CONTRACTS[name].merges:
        with pytest.raises(AdapterError, match="cannot be merged"):
            adapter.merged()
        return
    with torch.no_grad():
        plain, adapted = run(adapter.base.model, family.inputs), run(adapter, family.inputs)
        assert off(adapted, plain) > 1e-3
        try:
            merged = adapter.merged()
        except AdapterError as error:
            assert "has none" in str(error)  # a bias, and the base has no biases
            return
        assert off(run(merged, family.inputs), adapted) < EXACT


@pytest.mark.parametrize(("name", "family"), cells())
def test_save_and_load_are_bit_exact(name: str, family: Family, tmp_path: object) -> None:
    adapter = attached(name, family)
    adapter.save(f"{tmp_path}/saved")
    again = adapter.base.load(f"{tmp_path}/saved", "again").double()
    assert again.method == adapter.method
    with torch.no_grad():
        assert torch.equal(run(again, family.inputs), run(adapter, family.inputs))


@pytest.mark.parametrize(("name", "family"), cells())
def test_checkpointing_changes_nothing(name: str, family: Family) -> None:
    if not family.checkpoints:
        pytest.skip("can't: transformers has no activation checkpointing for this family")
    gradients = []
    for on in (False, True):
        adapter = attached(name, family)
        adapter.base.model.config.use_cache = False
        if on:
            adapter.base.enable_checkpointing()
        for module in adapter.base.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        adapter.train()
        torch.manual_seed(0)
        run(adapter, family.inputs).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None]))
    assert off(gradients[1], gradients[0]) < EXACT


CAUSAL = tuple(family.name for family in FAMILIES.values() if family.generates)


@pytest.mark.parametrize(("name", "family"), cells(CAUSAL))
def test_generation_cached_equals_uncached(name: str, family: Family) -> None:
    adapter = attached(name, family)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    outputs = [adapter.generate(IDS, use_cache=cached, **options) for cached in (True, False)]
    assert torch.equal(*outputs)
    with torch.no_grad():
        full = run(adapter, {"input_ids": outputs[0]})
        assert torch.equal(full[:, IDS.shape[1] - 1 : -1].argmax(-1), outputs[0][:, IDS.shape[1] :])
    beams = adapter.generate(IDS, num_beams=2, **options)
    assert beams.shape == outputs[0].shape


@pytest.mark.parametrize(("name", "family"), cells(CAUSAL))
def test_left_padding_equals_right_padding(name: str, family: Family) -> None:
    adapter = attached(name, family)
    zeros, ones = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 7, dtype=torch.long)
    with torch.no_grad():
        alone = run(adapter, {"input_ids": IDS})
        right = run(adapter, {"input_ids": torch.cat([IDS, zeros], 1), "attention_mask": torch.cat([ones, zeros], 1)})
        mask = torch.cat([zeros, ones], 1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        left = run(
            adapter,
            {"input_ids": torch.cat([zeros, IDS], 1), "attention_mask": mask, "position_ids": positions}
            if family.name != "opt"
            else {"input_ids": torch.cat([zeros, IDS], 1), "attention_mask": mask},
        )
    assert off(right[:, :7], alone) < EXACT
    assert off(left[:, 3:], alone) < EXACT


def test_the_coverage_page_is_true() -> None:
    import coverage

    assert coverage.PAGE.read_text(encoding="utf-8") == coverage.page(), "run python tests/methods/coverage.py"

"""EVA's start of LoRA: the inputs' principal directions, as an SVD of all of them gives, and as peft's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import peft
import pytest
import torch
from peft.utils.incremental_pca import IncrementalPCA

import veneer
from helpers import tiny_llama
from veneer.bases import Site
from veneer.errors import ConfigError, TargetError
from veneer.methods.eva import Spectrum, directions, spread

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

BATCHES = [torch.arange(4 * 20).view(4, 20) * (7 + n) % 120 + n for n in range(6)]


class Inputs:
    """A survey of `BATCHES`."""

    def __init__(self, base: veneer.Base) -> None:
        self.base = base

    def inputs(self, sites: Sequence[Site], examples: int) -> Iterator[dict[str, torch.Tensor]]:
        for ids in BATCHES:
            seen: dict[str, torch.Tensor] = {}
            handles = [
                self.base.model.get_submodule(site.path).register_forward_pre_hook(
                    lambda _, args, path=site.path, seen=seen: seen.update({path: args[0].flatten(0, -2)})
                )
                for site in sites
            ]
            with torch.no_grad():
                self.base.model(input_ids=ids)
            for handle in handles:
                handle.remove()
            yield seen


def surveyed(**settings: object) -> veneer.Adapter:
    base = veneer.Base(tiny_llama())
    adapter = base.attach(veneer.LoRA(**{"rank": 4, "init": "eva", "targets": ("q", "down"), **settings}), "a")
    adapter.survey(Inputs(base))  # type: ignore[arg-type]
    return adapter


def same_directions(a: torch.Tensor, b: torch.Tensor) -> float:
    """Least |cosine| of pairs: signs are free."""
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double()).abs().min())


def batches(seed: int = 0, width: int = 12) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.linspace(3, 0.1, width, dtype=torch.float64)
    return [
        torch.randn(count, width, generator=generator, dtype=torch.float64) * scales + mean
        for count, mean in ((30, 1.0), (5, -2.0), (17, 4.0))
    ]


def test_batch_by_batch_as_all_at_once() -> None:
    """Exact where nothing is cut off; the variance's shares sum up to one."""
    parts = batches()
    spectrum = Spectrum(12)
    for part in parts:
        spectrum.add(part)
    everything = torch.cat(parts)
    _, s, v = torch.linalg.svd(everything - everything.mean(0), full_matrices=False)
    assert 1 - same_directions(spectrum.directions, v) < 1e-9
    assert torch.allclose(spectrum.shares, s.square() / s.square().sum(), rtol=1e-9)


def test_as_pefts_incremental_pca() -> None:
    spectrum, theirs = Spectrum(4), IncrementalPCA(n_components=4, lowrank=False)
    for part in batches():
        spectrum.add(part)
        theirs.partial_fit(part)
    assert 1 - same_directions(spectrum.directions, theirs.components_) < 1e-9
    assert torch.allclose(spectrum.shares, theirs.explained_variance_ratio_, rtol=1e-6)


def test_a_large_matrix_by_a_sketch_that_leaves_the_random_state_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    strong = torch.linalg.qr(torch.randn(160, 2, generator=generator)).Q.mT
    scales = torch.tensor([5.0, 3.0])
    parts = [
        torch.randn(200, 2, generator=generator) * scales @ strong + torch.randn(200, 160, generator=generator) * 0.1
        for _ in range(3)
    ]
    before = torch.random.get_rng_state()
    spectra = [Spectrum(2), Spectrum(2)]
    for spectrum in spectra:
        for part in parts:
            spectrum.add(part)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(spectra[0].directions, spectra[1].directions)
    everything = torch.cat(parts)
    v = torch.linalg.svd(everything - everything.mean(0), full_matrices=False).Vh[:2]
    assert same_directions(spectra[0].directions, v) > 0.9999


def test_it_starts_as_the_base_from_orthonormal_directions_at_the_same_scale() -> None:
    adapter = surveyed(rho=3)
    ranks = {site.path: adapter.method.rank_at(site) for site in adapter.sites}
    assert sum(ranks.values()) == 4 * len(adapter.sites)
    assert len(set(ranks.values())) > 1
    assert max(ranks.values()) <= 12
    for site in adapter.sites:
        a = adapter.parameters_at(site.path)["lora_A.weight"]
        assert a.shape == (ranks[site.path], site.in_features)
        assert torch.allclose(a @ a.mT, torch.eye(len(a)), atol=1e-5)
        assert adapter.method.scale_at(site) == pytest.approx(32 / 4)
    with torch.no_grad():
        plain = adapter.base.model(input_ids=BATCHES[0]).logits
        assert torch.equal(adapter(input_ids=BATCHES[0]).logits, plain)


def test_scales_stay_when_rank_stabilised() -> None:
    adapter = surveyed(rank_stabilized=True)
    assert {round(adapter.method.scale_at(site), 4) for site in adapter.sites} == {32 / 2}


def test_ranks_stay_without_rho() -> None:
    assert surveyed(rho=1).method == veneer.LoRA(rank=4, init="eva", targets=("q", "down"), rho=1)


def test_ranks_go_where_they_explain_most() -> None:
    shares = {"a": torch.tensor([0.9, 0.05, 0.01]), "b": torch.tensor([0.3, 0.2, 0.15]), "c": torch.tensor([0.01])}
    assert spread(shares, 5) == {"a": 1, "b": 3, "c": 1}
    assert spread(shares, 6) == {"a": 2, "b": 3, "c": 1}
    assert spread(shares, 1) == {"a": 1, "b": 1, "c": 1}


def test_few_tokens_give_few_directions() -> None:
    found = directions([{"a": torch.randn(2, 6)}], {"a": 4}, 1.0)
    assert found["a"].shape[0] <= 2


def test_as_pefts() -> None:
    """peft sketches, and goes through the data until its directions settle: nearly the same, then."""
    ours = surveyed(rho=1)
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=1, use_label_mask=False, tau=0.5),
    )
    theirs = peft.get_peft_model(tiny_llama(), config)
    peft.initialize_lora_eva_weights(theirs, [{"input_ids": ids} for ids in BATCHES], show_progress_bar=False)
    for site in ours.sites:
        a = ours.parameters_at(site.path)["lora_A.weight"].detach()
        b = theirs.get_submodule(f"base_model.model.{site.path}").lora_A["default"].weight.detach()
        assert torch.linalg.svdvals(a @ b.mT)[:2].min() > 0.9


@pytest.mark.parametrize("settings", [{"rho": 0.5}, {"examples": 0}, {"init": "evan"}])
def test_mistakes(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        veneer.LoRA(**settings)


def test_only_for_linear_maps() -> None:
    base = veneer.Base(tiny_llama())
    with pytest.raises(TargetError, match="init: eva is for linear maps"):
        base.attach(veneer.LoRA(init="eva", targets="embed_tokens"), "a")

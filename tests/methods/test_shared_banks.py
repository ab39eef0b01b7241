"""Methods whose numbers are shared by all maps: what stands where, and that it stays so."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from families import FAMILIES, run
from safetensors.torch import load_file
from test_contract import EXACT, off

import veneer
from helpers import perturb
from veneer.errors import ConfigError, TargetError
from veneer.methods import method_class, rps
from veneer.methods.unilora import assignment

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's

LLAMA = FAMILIES["llama"]
WORD = 2**32


def attach(name: str, **settings: object) -> veneer.Adapter:
    return veneer.Base(LLAMA.model().requires_grad_(False)).attach(method_class(name)(**settings), "a").double()


# --- randomised parameter sharing ---


def mixed(word: int) -> int:
    """Murmur3's finaliser on whole numbers of any length."""
    word %= WORD
    word = (word ^ (word >> 16)) * 0x85EBCA6B % WORD
    word = (word ^ (word >> 13)) * 0xC2B2AE35 % WORD
    return word ^ (word >> 16)


def placed(number: int, size: int, seed: int) -> tuple[int, int]:
    """Version 1, in numbers that cannot overflow."""
    bits = size.bit_length() - 1
    turn, place = divmod(number, size)
    key = mixed(mixed((turn % WORD) ^ seed) + turn // WORD)
    for multiplier in (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D):
        place = (place + key) * multiplier % size
        place ^= place >> max(bits // 2, 1)
        key = mixed(key + multiplier)
    return place, 1 - 2 * (mixed(place + key) % 2)


@pytest.mark.parametrize("size", [2, 64, 65_536, 2**31])
def test_places_are_those_of_exact_arithmetic(size: int) -> None:
    for seed in (0, 7, WORD - 1):
        numbers = torch.tensor([0, 1, 2, 63, 64, 65, 10**6, 7 * 10**9, 2**40 + 3])
        got = [each.tolist() for each in rps.placed(numbers, size, seed)]
        assert got == [list(each) for each in zip(*(placed(n, size, seed) for n in numbers.tolist()), strict=True)]


def test_golden_places() -> None:
    """An adapter's file holds no more than the seed: these never change."""
    first, later = torch.arange(8), torch.arange(8) + 123_456_789
    assert [each.tolist() for each in rps.placed(first, 65_536, 0)] == GOLDEN[0]
    assert [each.tolist() for each in rps.placed(later, 1024, 42)] == GOLDEN[1]


GOLDEN = [
    [[64184, 42170, 25876, 11762, 11105, 39892, 39087, 47915], [-1, -1, -1, 1, 1, -1, 1, -1]],
    [[697, 721, 69, 337, 704, 924, 332, 211], [1, 1, 1, 1, -1, -1, -1, 1]],
]


def test_every_number_of_the_bank_stands_equally_often() -> None:
    for size in (2, 64, 1024):
        index, sign = rps.placed(torch.arange(37 * size), size, 5)
        turns = index.view(37, size).sort(1).values
        assert torch.equal(turns, torch.arange(size).expand_as(turns))
    assert abs(sign.double().mean()) < 0.02
    # From one round to the next a number neither keeps its place nor its neighbour, beyond chance.
    places = index.view(37, size)
    assert (places[1:] == places[:-1]).sum(1).double().mean() < 3
    assert len({tuple((row[1:] - row[:-1]).tolist()) for row in places}) == 37


def test_the_update_is_the_formula() -> None:
    adapter = attach("rps", bank_size=2048, seed=9, targets=("q", "down"))  # 2.5 times as many entries
    perturb(adapter, std=0.3)
    bank = next(adapter.parameters()).detach()
    places = [(site, i, j) for site in adapter.sites for i in range(site.out_features) for j in range(site.in_features)]
    found = [placed(number, 2048, 9) for number in range(len(places))]
    counts = torch.bincount(torch.tensor([index for index, _ in found]), minlength=2048)
    assert (counts.min(), counts.max()) == (2, 3)
    merged = adapter.merged()
    for (site, i, j), (index, sign) in list(zip(places, found, strict=True))[::37]:
        own = adapter.base.model.get_submodule(site.path).weight[i, j]
        change = sign * bank[index] / counts[index].double().sqrt()
        assert merged.get_submodule(site.path).weight[i, j] - own == pytest.approx(change.item(), abs=1e-12)


def test_tiles_make_no_difference_and_no_indices_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = attach("rps", bank_size=256)
    perturb(adapter)
    results, kept = [], []

    def keep(value: torch.Tensor) -> torch.Tensor:
        kept.append(value)
        return value

    for tile in (2**20, 100):
        monkeypatch.setattr(rps, "_TILE", tile)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            output = run(adapter, LLAMA.inputs)
        output.square().mean().backward()
        results.append((output.detach(), next(adapter.parameters()).grad.clone()))
        adapter.zero_grad()
    assert torch.equal(results[0][0], results[1][0])
    assert off(results[0][1], results[1][1]) < EXACT
    assert not [value.shape for value in kept if value.dtype == torch.int64 and value.numel() > 1000]


def test_nothing_but_the_bank_is_stored(tmp_path: Path) -> None:
    adapter = attach("rps", bank_size=256)
    adapter.save(tmp_path)
    assert adapter.trainable == 256
    assert {key: len(value) for key, value in load_file(tmp_path / "adapter_model.safetensors").items()} == {
        "base_model.rps_bank": 256
    }


def test_banks_that_do_not_do() -> None:
    with pytest.raises(ConfigError, match="1000 is no power of two, as 512 and 1024 are"):
        method_class("rps")(bank_size=1000)
    with pytest.raises(ConfigError, match="hash"):
        method_class("rps")(hash="v2")
    with pytest.raises(TargetError, match="more than these maps have entries, 2,048"):
        attach("rps", bank_size=4096, targets="q")


# --- Uni-LoRA ---


def test_unilora_places() -> None:
    """Golden, as peft's files rest on them; balanced; and the map from the bank to all factors is isometric."""
    assert assignment(12, 5, 42).tolist() == GOLDEN_UNI
    adapter = attach("unilora", rank=2, bank_size=50, targets="q", identity=False)
    perturb(adapter)
    factors = [(delta.A, delta.B) for delta in adapter.lower().values()]
    entries = torch.cat([each.flatten() for pair in factors for each in pair])
    assert float(entries.detach().norm()) == pytest.approx(float(next(adapter.parameters()).detach().norm()), abs=1e-6)
    indices = torch.cat([adapter.parameters_at(site.path)["unilora_indices_A"].flatten() for site in adapter.sites])
    assert len(indices.unique()) > 40
    assert adapter.trainable == 50


GOLDEN_UNI = [3, 3, 4, 1, 0, 3, 4, 0, 2, 1, 2, 0]


def test_unilora_takes_its_start_off() -> None:
    with_it, without = (attach("unilora", rank=2, bank_size=50, bound=2.0, identity=each) for each in (True, False))
    with torch.no_grad():
        plain = run(with_it.base.model, LLAMA.inputs)
        assert off(run(without, LLAMA.inputs), plain) > 1e-3
        assert off(run(with_it, LLAMA.inputs), plain) < 1e-12
    run(with_it, LLAMA.inputs).square().mean().backward()
    assert next(with_it.parameters()).grad.abs().max() > 0


def test_unilora_keeps_its_places_in_files_both_ways(tmp_path: Path) -> None:
    ours = attach("unilora", rank=2, bank_size=50, identity=False, keep_indices=True, seed=3)
    perturb(ours, std=0.5)
    ours.save(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(LLAMA.model(), tmp_path / "ours").double().eval()
    with torch.no_grad():
        expected = run(ours, LLAMA.inputs)
        assert off(expected, run(ours.base.model, LLAMA.inputs)) > 1e-3
        assert off(run(theirs, LLAMA.inputs), expected) < 1e-6  # peft reads the bank as float32
        theirs.save_pretrained(tmp_path / "theirs")
        again = veneer.Base(LLAMA.model()).load(tmp_path / "theirs", "again").double()
        assert off(run(again, LLAMA.inputs), expected) < 1e-6
    assert again.method == ours.method.model_copy(update={"targets": again.method.targets})


# --- VB-LoRA ---


def test_vblora_counts_and_what_is_kept(tmp_path: Path) -> None:
    adapter = attach("vblora", rank=2, num_vectors=9, vector_length=12, topk=3)
    widths = sum(site.in_features + site.out_features for site in adapter.sites)
    assert adapter.parameters_at(adapter.sites[0].path)["base_model.vblora_vector_bank"].shape == (9, 8)  # 16, 32, 48
    assert adapter.trainable == 9 * 8 + 9 * 2 * widths // 8
    adapter.settle()
    adapter.save(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(value.numel() for value in state.values() if value.is_floating_point()) == 9 * 8 + 2 * 2 * widths // 8
    choices = [value for value in state.values() if not value.is_floating_point()]
    assert sum(value.nbytes for value in choices) == 3 * 2 * widths // 8  # a byte each
    whole = attach("vblora", rank=2, num_vectors=9, keep="logits")
    whole.settle()
    assert not whole.method.final


def test_vblora_logits_take_ten_times_the_rate() -> None:
    rates = attach("vblora", rank=2).rates
    assert {rate for key, rate in rates.items() if "logits" in key} == {10.0}
    assert rates["base_model.vblora_vector_bank"] == 1.0


def test_vblora_mistakes() -> None:
    with pytest.raises(ConfigError, match="topk 5 is more than num_vectors 4"):
        method_class("vblora")(topk=5, num_vectors=4)
    with pytest.raises(TargetError, match=r"divides all widths of these maps \(3, 4\)"):
        veneer.Base(torch.nn.ModuleDict({"m": torch.nn.Linear(3, 4)})).attach(method_class("vblora")(), "a")


# --- butterflies ---


@pytest.mark.parametrize(("factors", "reach"), [(1, 4), (2, 8), (3, 16)])
def test_boft_rotates_as_far_as_its_factors_reach(factors: int, reach: int) -> None:
    adapter = attach("boft", block_size=4, factors=factors, targets="q")
    perturb(adapter)
    with torch.no_grad():
        rotation = adapter.lower()[adapter.sites[0].path].deltas[0]
        matrix = rotation.before(torch.eye(32, dtype=torch.float64))
        assert off(matrix @ matrix.T, torch.eye(32, dtype=torch.float64)) < EXACT
    assert ((matrix.abs() > 1e-12).sum(1) == reach).all()
    assert adapter.trainable == 2 * (factors * 32 * 4 + 32)


def test_boft_blocks_that_do_not_fit(tmp_path: Path) -> None:
    adapter = attach("boft", block_size=7, factors=2)  # of 32 and 48: 4 and 6
    assert adapter.parameters_at("model.layers.0.mlp.down_proj")["boft_R"].shape == (2, 8, 6, 6)
    adapter.save(tmp_path)
    with pytest.raises((KeyError, ValueError), match="VENEER_BOFT"):
        peft.PeftModel.from_pretrained(LLAMA.model(), tmp_path)
    with pytest.raises(
        TargetError, match=r"With 3 butterfly factors no block_size from 2 to 8 fits 12, .*: block_size · 4"
    ):
        veneer.Base(torch.nn.ModuleDict({"m": torch.nn.Linear(12, 4)})).attach(method_class("boft")(factors=3), "a")


def test_a_bank_larger_than_what_shares_it_is_refused() -> None:
    base = veneer.Base(FAMILIES["llama"].model())
    with pytest.raises(TargetError, match="entries that share it"):
        base.attach(method_class("unilora")(rank=2, bank_size=10**7))

"""Plans: the figures that are known, every method on small bases, and what users get wrong."""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from helpers import command, tiny_llama, write_jsonl
from veneer.adapters.files import RECORD
from veneer.bases.known import KNOWN, Known
from veneer.cli.steps import steps
from veneer.errors import BaseError, ConfigError, UnknownName
from veneer.kernels.native import tiles
from veneer.methods import method_class, methods
from veneer.planning import Plan, Request, bases, plan
from veneer.planning.advice import advise, learned
from veneer.planning.bases import _largest
from veneer.planning.machine import DEVICES, Machine, Products, Rates, machine, parse_size
from veneer.planning.request import from_config
from veneer.tracing import Work
from veneer.training.progress import size
from veneer.training.rehearsal import Batch

SMALL = Batch(rows=2, tokens=16)
GPU = "rtx-4090"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny Llama."""
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def everything(tiny: str) -> Plan:
    """All methods on it."""
    return plan(Request(tiny, batch=SMALL, device=GPU))


def figures(base: str, *names: str, **changes: object) -> Plan:
    """A plan of some methods."""
    chosen = [method_class(name)() for name in names]
    return plan(Request(base, methods=chosen, batch=SMALL, device=GPU, **changes))  # type: ignore[arg-type]


def test_every_method_is_planned(everything: Plan) -> None:
    own = {name for name, cls in methods().items() if cls.__module__.startswith("veneer.")}
    assert own - {row.method for row in everything.methods} == set(everything.left_out)
    assert set(everything.left_out) <= {"head", "unilora"}  # no head of a task's own; less than unilora's bank
    assert "head" in everything.left_out
    for row in everything.methods:
        parts = {name: value for name, value in row.train_memory.items() if name != "total"}
        assert row.train_memory["total"] == sum(parts.values())
        assert row.serve_memory["total"] == sum(v for k, v in row.serve_memory.items() if k != "total")
        assert row.trainable > 0
        assert row.flops_per_token > 0
        assert row.seconds_per_step > 0
        assert row.basis == "traced"


@pytest.mark.parametrize("name", ["lora", "ia3", "vera", "prefix", "full"])
def test_counts_are_those_of_an_adapter(everything: Plan, tiny: str, name: str, tmp_path: Path) -> None:
    import veneer

    adapter = veneer.load_base(tiny).attach(method_class(name)(), "a")
    row = everything.named(name)
    assert row is not None
    assert row.trainable == adapter.trainable
    if name != "prefix":  # whose network goes when training ends
        adapter.save(tmp_path / "a")
        stored = (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
        assert row.stored_bytes == pytest.approx(stored, abs=200 * len(adapter.state_dict()) + 100)


def _one_of_each_family() -> list[str]:
    found: dict[str, Known] = {}
    for row in KNOWN.values():
        if row.model_type not in found or row.parameters < found[row.model_type].parameters:
            found[row.model_type] = row
    return sorted(row.name for row in found.values())


@pytest.mark.parametrize("base", _one_of_each_family())
def test_every_family_is_planned(base: str) -> None:
    (row,) = figures(base, "lora").methods
    assert 0 < row.trainable_share < 0.2
    assert row.train_memory["total"] > KNOWN[base].parameters


@pytest.mark.slow
@pytest.mark.parametrize("base", sorted({row.name for row in KNOWN.values()} - {*_one_of_each_family()}))
def test_every_known_base_is_planned(base: str) -> None:
    (row,) = figures(base, "lora").methods
    assert row.train_memory["total"] > KNOWN[base].parameters


def test_well_known_figures() -> None:
    seven = figures("llama-2-7b", "lora")
    assert seven.base["parameters"] == 6_738_415_616
    assert seven.base["weight_bytes"]["bfloat16"] == 13_476_831_232  # 14 GB
    (row,) = seven.methods
    assert row.trainable == 39_976_960
    assert row.stored_bytes == 4 * row.trainable
    assert row.train_memory["weights"] == pytest.approx(13_476_831_232)
    assert 3.4e9 < seven.base["weight_bytes"]["nf4"] < 4.2e9


@pytest.mark.slow
def test_many_variants_of_a_large_base() -> None:
    seventy = figures("llama-2-70b", "ia3", "full", variants=100)
    ia3, full = seventy.methods
    assert full.copies
    assert full.variants_bytes == 100 * seventy.base["weight_bytes"]["bfloat16"]  # 14 TB
    assert 137e9 < ia3.variants_bytes < 142e9
    counted = seventy.base["full_fine_tuning_bytes"]
    assert 400e9 < counted["adam_16bit"] < 600e9 < counted["adam_mixed"]


def test_quantised_weights_are_counted_as_they_are_held(tiny: str) -> None:
    import veneer

    for kind in ("nf4", "int8"):
        row = figures(tiny, "lora", quantize=kind).methods[0]
        assert row.basis == "analytic"
        assert row.train_memory["weights"] == veneer.load_base(tiny, quantize=kind).nbytes


def test_what_fits(tiny: str) -> None:
    roomy, tight = figures(tiny, "lora", memory=10**9), figures(tiny, "lora", memory=10**6)
    assert roomy.methods[0].fits
    assert not tight.methods[0].fits
    assert roomy.methods[0].largest_batch > 2 > tight.methods[0].largest_batch
    assert advise(tight).method is None


def test_advice_names_its_rules(everything: Plan) -> None:
    given = advise(everything, rows=10_000, serving="many")
    assert given.method == "lora"
    assert [reason.rule for reason in given.reasons] == ["fits", "many", "learns", "not-worse", "default"]
    # by itself that would be a difference; it is one of more than thirty
    assert "lora scored 2.2 points below vblora (0.6 to 3.8; adjusted p = 0.4" in given.reasons[3].text
    kept = [set(reason.rows) for reason in given.reasons]
    assert all(later <= earlier for earlier, later in itertools.pairwise(kept))
    assert "full" not in kept[1]
    assert "prompt" in kept[1] - kept[2]  # not measured to beat a head
    few = advise(everything, rows=100)
    assert few.reasons[-1].rule == "few-rows"
    assert "given up: lora's form" in few.reasons[-1].text
    assert few.method is not None
    assert "lora" not in learned()[few.method].below
    assert "one task (prompt injections, MiniLM, 2,000 rows, 3 seeds)" in given.reasons[2].text


def test_few_rows_give_up_nothing_where_lora_has_the_fewest_numbers(everything: Plan) -> None:
    rows = [row for row in everything.methods if row.method in ("loha", "lora", "full")]
    few = advise(replace(everything, methods=rows), rows=100)
    assert few.method == "lora"
    assert few.reasons[-1].text.endswith("(a rule of thumb)")


def test_what_scored_highest_is_told_by_unrounded_scores(everything: Plan) -> None:
    rows = [row for row in everything.methods if row.method in ("norm", "compacter")]
    assert learned()["norm"].accuracy == learned()["compacter"].accuracy
    for each in (rows, rows[::-1]):
        given = advise(replace(everything, methods=each))
        assert "worse than compacter, " in given.reasons[2].text


def test_what_scored_the_same_is_not_below() -> None:
    assert learned()["lora"].below.keys().isdisjoint({"compacter"})  # to the answer
    assert not [name for name, row in learned().items() for mean, *_ in row.below.values() if mean > 0]


def test_more_room_is_not_advised_where_everything_fits(everything: Plan) -> None:
    rows = [replace(row, fits=True) for row in everything.methods if row.method in ("ptuning", "prompt")]
    given = advise(replace(everything, methods=rows))
    assert given.instead is not None
    assert given.instead.endswith("Plan other methods, or another base.")
    assert "batch_size" not in given.instead


def test_worse_is_what_was_measured_to_be_worse(everything: Plan) -> None:
    given = advise(everything, rows=10_000)
    (rule,) = [reason for reason in given.reasons if reason.rule == "not-worse"]
    assert "worse than full, " in rule.text
    assert "ia3" not in rule.rows  # -2.6 points, -3.6 to -1.7
    assert "lora scored 2.3 points below full (-0.8 to 5.3; adjusted p = " in rule.text
    for name in rule.rows:
        assert name == "full" or learned()[name].below["full"][3] >= 0.05


def test_nothing_fits(everything: Plan) -> None:
    request = replace(everything.request, quantize="nf4", checkpointing=True)
    none = replace(
        everything, request=request, memory=10**6, methods=[replace(r, fits=False) for r in everything.methods]
    )
    given = advise(none)
    assert [reason.rule for reason in given.reasons] == ["fits"]
    least = min(everything.methods, key=lambda row: row.train_memory["total"])
    assert given.instead is not None
    assert f"Nearest is {least.method}: {size(least.train_memory['total'])}, " in given.instead
    assert "nf4" not in given.instead
    assert "checkpointing" not in given.instead
    assert "smaller train.batch_size" in given.instead


def test_what_fits_has_not_been_measured_to_learn(everything: Plan) -> None:
    rows = [replace(row, fits=row.method in ("ptuning", "prompt")) for row in everything.methods]
    given = advise(replace(everything, methods=rows))
    assert given.method is None
    assert [reason.rule for reason in given.reasons] == ["fits", "learns"]
    assert given.instead is not None
    assert "left (prompt, ptuning), nothing is measured to learn more" in given.instead
    assert "quantize=nf4" in given.instead


def test_what_was_measured_is_of_methods_there_are() -> None:
    assert set(learned()) <= set(methods())


def test_rows_longer_than_the_base_takes() -> None:
    small = Batch(rows=1, tokens=512)
    found = plan(Request("bert-base-uncased", [method_class("lora")(), method_class("prompt")()], small))
    assert not found.left_out
    with pytest.raises(ConfigError, match="at most 512 tokens"):
        plan(Request("bert-base-uncased", [method_class("lora")()], Batch(rows=1, tokens=600)))


def test_sizes() -> None:
    assert parse_size("24GB") == 24 * 10**9
    assert parse_size("1.5 TiB") == 3 << 39
    assert parse_size("512 m") == 512 * 10**6
    for wrong in ("many", "-3GB", "24 GBs", "0GB"):
        with pytest.raises(ConfigError, match="no size of memory"):
            parse_size(wrong)


@pytest.mark.parametrize(("device", "dtype"), [("t4", "float16"), ("v100", "float16"), (GPU, "bfloat16")])
def test_devices_without_bfloat16_are_planned_in_float16(tiny: str, device: str, dtype: str) -> None:
    found = plan(Request(tiny, [method_class("ia3")()], SMALL, dtype="bfloat16", device=device))
    assert found.base["dtype"] == dtype
    assert [device in note for note in found.notes] == ([True] if device != GPU else [])


def test_random_numbers_cost_their_own() -> None:
    rates = Rates(Products(flops=1e12, streamed=1e10), light=1e-10, heavy=2e-10, drawn=5e-9)
    place = Machine("a", 0, {"float32": rates}, 0.0, None, measured=True)
    names = {"bernoulli_": 5.0, "native_dropout": 5.0, "rand_like": 5.0, "gelu": 0.2, "mul": 0.1, "rsqrt": 0.2}
    for name, nanoseconds in names.items():
        assert place.seconds({Work(name, 0, 8, 10, torch.float32): 2}) == pytest.approx(20e-9 * nanoseconds)
    assert machine(None, dtypes=(torch.float32,)).rates["float32"].drawn > 0


def test_our_own_products_have_their_own_rate() -> None:
    rates = Rates(Products(1e12, 1e10), 1e-10, 2e-10, 5e-9, ours=Products(2e12, 2e10))
    place = Machine("a", 0, {"float32": rates}, 0.0, None, measured=True)
    seconds = [place.seconds({Work("mm", 10**9, 10**6, 10, torch.float32, ours): 1}) for ours in (False, True)]
    assert seconds == pytest.approx([1.1e-3, 0.55e-3])
    without = Machine("a", 0, {"float32": replace(rates, ours=None)}, 0.0, None, measured=True)
    assert without.seconds({Work("mm", 10**9, 10**6, 10, torch.float32, True): 1}) == pytest.approx(1.1e-3)
    assert (machine().rates["float32"].ours is not None) == tiles.there()


def test_a_step_has_a_pace_of_its_own() -> None:
    rates = Rates(Products(1e12, 1e10), 1e-10, 2e-10, 5e-9)
    place = Machine("a", 0, {"float32": rates}, 0.0, None, measured=True, paces={"float32": 1.5})
    work = {Work("mul", 0, 80, 10, torch.float32): 1}
    assert place.step(work, torch.float32) == pytest.approx(1.5 * place.seconds(work))
    assert place.step(work, torch.bfloat16) == place.seconds(work)
    found = machine(dtypes=(torch.bfloat16,))
    assert set(found.paces) == {"bfloat16"}  # a step of another would be timed for nobody
    assert all(0.3 < each < 10 for each in found.paces.values())


def test_a_device_s_figures() -> None:
    found = machine("RTX 4090")
    assert found.memory == 24 << 30
    assert not found.measured
    with pytest.raises(UnknownName, match="Did you mean 'rtx-4090'"):
        machine("rtx-490")
    assert all(each.teraflops >= each.teraflops_32 for each in DEVICES.values())


def test_this_machine_s_are_measured_once_for_its_threads() -> None:
    found = machine(dtypes=(torch.bfloat16,))
    assert found.measured
    assert found.rates["float32"].products.flops > 1e8
    assert found.rates["bfloat16"] != found.rates["float32"]
    assert machine().rates["float32"] is found.rates["float32"]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert machine().rates["float32"] is not found.rates["float32"]
    finally:
        torch.set_num_threads(threads)


def test_the_command(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--methods", "lora,full", "--device", GPU, "--length", "16", "--variants", "7")
    assert command("plan", "--base", tiny, *options, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["base"]["weight_bytes"]["float32"] == 4 * told["base"]["parameters"]
    assert [row["method"] for row in told["methods"]] == ["lora", "full"]
    wanted = {
        "method", "trainable", "trainable_share", "stored_bytes", "train_memory", "serve_memory", "flops_per_token",
        "seconds_per_step", "variants_bytes",
    }  # fmt: skip
    assert all(wanted <= set(row) for row in told["methods"])
    assert told["variants"] == 7
    assert told["recommendation"]["method"] == "lora"
    assert command("plan", "--base", tiny, *options) == 0
    shown = capsys.readouterr().out
    assert "recommended  lora" in shown
    assert "times by public figures" in shown


def test_planning_tells_how_far_it_is(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--methods", "lora,ia3", "--device", GPU, "--length", "16", "--json")
    assert command("plan", "--base", tiny, *options) == 0
    told = capsys.readouterr()
    json.loads(told.out)
    first, second = told.err.splitlines()
    assert first == "planning methods 1/2: lora"
    assert second.startswith("planning methods 2/2: ia3  (about 0:")


def test_progress_on_a_terminal_takes_brackets_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr("veneer.training.progress.console", terminal)
    with steps("methods on runs/a[/b]c") as begin:
        begin("lora", 1)
    assert "planning methods on runs/a[/b]c 1/1: lora" in terminal.file.getvalue()  # type: ignore[attr-defined]


def test_the_search_for_a_base_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []
    monkeypatch.setattr(bases, "plan", lambda request: (_ for _ in ()).throw(ConfigError("no")))
    with pytest.raises(ConfigError, match="No base known"):
        bases.largest(Request("", device=GPU), ("decoder",), lambda name, left: seen.append((name, left)))
    assert {name for name, _ in seen} <= set(KNOWN)
    assert all(left > 0 for _, left in seen)
    assert seen[-1][1] == 1
    assert seen[0][1] > 2 * seen[-2][1]


def test_a_config_with_data(tiny_folder: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"say {number}", "completion": "yes"} for number in range(40)]
    data = write_jsonl(folder / "data.jsonl", rows)
    config = folder / "run.yaml"
    config.write_text(
        f"base: {tiny_folder}\nmethod: {{name: lora, rank: 2}}\ndata: {{train: {data}}}\noutput: runs/a\n"
    )
    assert command("plan", str(config), "train.batch_size=4", "train.epochs=2", "--device", GPU, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["data"]["rows"] == 36
    assert told["data"]["counted"]
    assert told["batch"]["tokens"] == told["data"]["longest"]
    (row,) = told["methods"]
    assert row["settings"]["rank"] == 2
    assert row["run"]["steps"] == 18
    assert row["run"]["watt_hours"] == pytest.approx(row["run"]["seconds"] * 450 / 3600)


def test_the_pass_that_is_planned_is_the_one_a_run_is_forecast_by(tiny_folder: Path, folder: Path) -> None:
    rows = [{"prompt": "say " + "more " * (3 * number % 20), "completion": "yes"} for number in range(40)]
    data = write_jsonl(folder / "data.jsonl", rows)
    wanted = ("method=lora", f"base={tiny_folder}", f"data.train={data}", "train.batch_size=8", "train.pass_tokens=200")
    request = from_config(wanted)
    assert command("train", *wanted, "train.max_steps=1", "output=a") == 0
    told = json.loads((folder / "a" / "adapter" / RECORD).read_text())["training"]["plan"]["training"]
    assert (request.batch.rows, request.batch.tokens) == (told["rows"], told["tokens"])
    assert 1 < request.batch.rows < 8
    found = plan(request)
    assert found.methods[0].train_memory["total"] == pytest.approx(told["total"], rel=0.01)
    assert found.methods[0].run is not None
    assert found.methods[0].run.seconds == found.methods[0].seconds_per_step * found.methods[0].run.steps


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "Nothing to plan yet"),
        (("--base", "lama-2-7b"), "Did you mean 'llama-2-7b'"),
        (("--base", "llama-2-7b", "--device", "rtx-490"), "Did you mean 'rtx-4090'"),
        (("--base", "llama-2-7b", "--memory", "much"), "no size of memory"),
        (("--base", "llama-2-7b", "--memory", "24"), "write the unit, such as 24GB"),
        (("--base", "llama-2-7b", "--memory=-5GB"), "no size of memory"),
        (("base=gpt2", "base=gpt2-xl", "--base", "opt-1.3b"), "more than one base"),
        (("--base", "llama-2-7b", "--methods", "lorra"), "Did you mean 'lora'"),
        (("--base", "llama-2-7b", "--labelled", "2"), "at most 1"),
        (("--base", "llama-2-7b", "--methods", "head", "--device", GPU), "Nothing to plan on llama-2-7b: head"),
        (("--base", "gpt2", "dtype=int4", "--device", GPU), "dtype: should be 'auto', 'float32'"),
        (("--base", "gpt2", "method.rnk=3"), "rank"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("plan", *arguments) == 2
    told = capsys.readouterr()
    assert said in told.err
    assert not told.out


def test_a_dtype_that_cannot_be_planned() -> None:
    with pytest.raises(BaseError, match="'int4' is no dtype to plan with; use auto, float32"):
        plan(Request("gpt2", methods=[method_class("lora")()], dtype="int4", device=GPU))


def test_advise_needs_something(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("advise") == 2
    assert "Nothing to advise on yet" in capsys.readouterr().err


def test_a_base_that_cannot_do_it_is_passed_over() -> None:
    rows = [KNOWN[name] for name in ("distilbert-base", "xlnet-base", "deberta-v3-base")]
    found = _largest(Request("", [method_class("lora")()], SMALL, checkpointing=True, device=GPU), rows)
    assert found is not None
    assert found.base == "deberta-v3-base"


@pytest.mark.slow
def test_the_largest_base_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("advise", "--device", GPU, "--length", "128", "train.batch_size=2", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    sizes = [each["parameters"] for each in told["bases"]]
    assert sizes == sorted(sizes)
    assert sizes[0] > 2e9
    assert told["bases"][-1]["quantize"] == "nf4"


@pytest.mark.parametrize("sparing", [False, True])
def test_a_heap_holds_more_than_is_alive_and_a_gpu_is_counted_in_blocks(
    sparing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The more, the more a layer makes: computing it twice leaves larger gaps beside less."""
    monkeypatch.setattr("veneer.training.allocator._sparing", lambda: sparing)
    gaps = {}
    for checkpointing in (False, True):
        request = Request(
            "minilm-l6", methods=[method_class("lora")()], batch=Batch(8, 64), checkpointing=checkpointing
        )
        parts = plan(request).methods[0].train_memory
        gaps[checkpointing] = parts["gaps"] / (parts["activations"] + parts["workspace"])
    assert gaps[True] > 1.2 * gaps[False] > 0
    (row,) = plan(replace(request, device="rtx-4090")).methods
    assert row.train_memory["gaps"] == 0

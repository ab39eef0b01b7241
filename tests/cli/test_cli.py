"""The command line as a person uses it. In process where that shows the same: an import costs seconds."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import veneer
from helpers import sums, write_jsonl
from veneer.cli.__main__ import COMMANDS, main
from veneer.cli.launch import TRAINING
from veneer.data import read
from veneer.errors import FetchError


def run(*arguments: object) -> int:
    """The exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


@pytest.fixture
def data(folder: Path) -> Path:
    write_jsonl(folder / "train.jsonl", sums(24))
    return write_jsonl(folder / "held_out.jsonl", sums(6, 100))


def weights(run_folder: Path) -> torch.Tensor:
    state = load_file(run_folder / "adapter" / "adapter_model.safetensors")
    return torch.cat([state[name].flatten() for name in sorted(state)])


def options(tiny: Path, output: str, **more: object) -> list[str]:
    settings = {
        "base": tiny,
        "dtype": "float32",
        "data.train": "train.jsonl",
        "output": output,
        "method.rank": 2,
        "task.max_new_tokens": 4,
        "train.samples": 1,
    } | more
    return [f"{key}={value}" for key, value in settings.items()]


def test_from_a_config_to_answers(data: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.yaml").write_text(
        f"base: {tiny_folder}\ndtype: float32\nmethod: {{name: lora, rank: 2}}\n"
        "data: {train: train.jsonl, validation: 0.25}\ntask: {max_new_tokens: 4}\ntrain: {epochs: 1}\noutput: runs/a\n"
    )
    assert run("train", "config.yaml", "train.learning_rate=1e-2", "--json") == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["trainable"] > 0
    assert result["after"]["loss"] < result["before"]["loss"]
    for told in ("trains", "validation at step 0", "expected", "trained ", "learned ", "size ", "saved ", "next "):
        assert told in err, told
    assert sorted(path.name for path in Path("runs/a").iterdir()) == [
        "adapter",
        "config.yaml",
        "log.jsonl",
        "report.json",
    ]

    assert run("eval", "runs/a", "held_out.jsonl", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rows"] == 6
    assert report["adapter"]["loss"]["value"] < report["base"]["loss"]["value"]
    assert report["adapter"]["exact_match"]["high"] > 0
    assert run("eval", "runs/a/adapter", "held_out.jsonl", "--limit", "2", "--no-base") == 0
    assert "2 rows of held_out.jsonl" in capsys.readouterr().out

    assert run("predict", "runs/a", "held_out.jsonl") == 0
    assert "6 rows" in capsys.readouterr().out
    assert len(Path("held_out.predictions.jsonl").read_text().splitlines()) == 6

    assert (
        run("generate", "What is 1 plus 1?", "--adapter", "runs/a", "--compare", "--max-new-tokens", "3", "--json") == 0
    )
    assert set(json.loads(capsys.readouterr().out)) == {"prompt", "adapter", "base"}
    assert run("generate", "Hello", "--base", str(tiny_folder), "--max-new-tokens", "3") == 0

    assert run("merge", "runs/a", "merged") == 0
    capsys.readouterr()
    ids = torch.arange(12).view(1, 12) + 50
    adapter = veneer.load_adapter("runs/a", dtype="float32")
    with torch.no_grad():
        plain, adapted = adapter.base.model(input_ids=ids).logits, adapter(input_ids=ids).logits
        merged = veneer.load_base("merged", dtype="float32").model(input_ids=ids).logits
    assert (adapted - plain).abs().max() > 1e-3
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    assert run("merge", "runs/a", "merged") == 2
    assert "exists already" in capsys.readouterr().err


def test_classification(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(f"{text},{label}\n" for text, label in (("good and nice", "up"), ("bad and ugly", "down")) * 10)
    Path("mails.csv").write_text("body,label\n" + rows)
    assert (
        run(
            "train",
            "base=minilm-l6",
            "data.train=mails.csv",
            "data.columns={text: body}",
            "output=out",
            "train.learning_rate=2e-3",
            "method.rank=2",
            "--json",
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["after"]["accuracy"] == 1
    assert run("predict", "out", "mails.csv", "--columns", "text=body", "--output", "labelled.csv") == 0
    lines = Path("labelled.csv").read_text().splitlines()
    assert lines[0] == "body,label,predicted_label,probabilities"
    assert lines[1].startswith("good and nice,up,up,")
    capsys.readouterr()
    assert run("generate", "x", "--adapter", "out") == 2
    assert "generates no text; use `veneer predict`" in capsys.readouterr().err


def test_eight_times_one_is_one_times_eight(data: Path, tiny_folder: Path) -> None:
    for name, batch, accumulation in (("a", 8, 1), ("b", 1, 8)):
        more = {"train.batch_size": batch, "train.accumulation": accumulation, "train.learning_rate": "5e-3"}
        assert run("train", *options(tiny_folder, name, **more)) == 0
    assert (weights(Path("a")) - weights(Path("b"))).abs().max() < 1e-5
    reports = [json.loads(Path(name, "report.json").read_text())["after"]["loss"] for name in ("a", "b")]
    assert reports[0] == pytest.approx(reports[1], rel=1e-5)


def test_a_finished_or_foreign_run_is_not_overwritten(
    data: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"train.max_steps": 1, "data.validation": 0}
    assert run("train", *options(tiny_folder, "out", **more)) == 0
    before = weights(Path("out"))
    assert run("train", *options(tiny_folder, "out", **more)) == 2
    assert "holds a finished run" in capsys.readouterr().err
    os.rename("out/adapter", "elsewhere")
    Path("out/checkpoint-1").mkdir()
    Path("out/checkpoint-1/complete").touch()
    assert run("train", *options(tiny_folder, "out", **more, **{"train.seed": 1})) == 2
    assert "unfinished run with another config (train.seed was" in capsys.readouterr().err
    os.rename("elsewhere", "out/adapter")
    assert torch.equal(weights(Path("out")), before)


BASIC = ("base=x", "data.train=t.jsonl", "output=o")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "Nothing to train yet.*data.train=answers.jsonl"),
        (["train", "none.yaml"], r"Cannot read the config none.yaml: No such file"),
        (["train", "broken.yaml"], "broken.yaml is no YAML"),
        (["train", "list.yaml"], "holds no keys"),
        (["train", "base=x", "nonsense"], "'nonsense' is no override"),
        (["train", "base.x=1", "base=2"], "base: should be text"),
        (["train", *BASIC, "method.r=8"], "method.r: .*called method.rank here"),
        (["train", *BASIC, "lora_alpha=8"], "lora_alpha: .*called method.alpha here"),
        (["train", *BASIC, "train.lr=8"], "called train.learning_rate here"),
        (["train", *BASIC, "learning_rate=8"], "Did you mean train.learning_rate"),
        (["train", "data.trian=t.jsonl"], "data.train: is missing.*data.trian: .*Did you mean 'train'"),
        (["train", *BASIC, "method=lroa"], "No method called 'lroa'. Did you mean 'lora'"),
        (["train", *BASIC, "task=5"], r"mistakes:\s+- task: should be a mapping [(]got 5[)]\s*$"),
        (["train", *BASIC, "method={name: lora, targets: 5}"], r"mistakes:\s+- method.targets: should be text or a list [(]got 5[)]\s*$"),
        (["train", "base=x", "output=o", "data.train=5"], r"mistakes:\s+- data.train: should be text or a mapping or a list [(]got 5[)]\s*$"),
        (["train", *BASIC, "method={name: mix, methods: [{name: lora, rnk: 4}]}"], r"mistakes:\s+- method.methods.0..rnk: unknown [^-]*'rank'[?]\s*$"),
        (["train", *BASIC, "distill=base"], "distill: should be a mapping, such as distill.teacher=base"),
        (["train", *BASIC, "task=causal"], "'causal' is no task. Did you mean 'causal-lm'"),
        (["train", *BASIC, "task.max_len=3"], "task.max_len.*Did you mean 'max_length'"),
        (["train", "base=nope", "data.train=rows.jsonl", "output=o"], "No base called 'nope'"),
        (["train", *BASIC], "There is no data file t.jsonl"),
        (
            ["train", "base=minilm-l6", "data.train=rows.jsonl", "output=o", "method.targets=[qq]"],
            "Target 'qq' matches nothing",
        ),
        (["eval", "nowhere", "rows.jsonl"], "no adapter folder: it does not exist"),
        (["predict", "nowhere", "rows.jsonl"], "no adapter folder"),
        (["predict", "nowhere", "rows.jsonl", "--columns", "x"], "no adapter folder|write OUR_NAME=ITS_NAME"),
        (["merge", "nowhere", "out"], "no adapter folder"),
        (["generate", "hello"], "--adapter FOLDER or --base NAME"),
        (["generate", " ", "--base", "x"], "prompt is empty"),
        (["methods", "lroa"], "Did you mean 'lora'"),
        (["sites", "nowhere"], "No base called 'nowhere'"),
        (["sites", "minilm-l6", "--targets", "querry"], "Did you mean 'query'"),
        (["models", "fetch"], "Say what to fetch"),
        (["models", "fetch", "minilm"], "Did you mean 'minilm-l6'"),
        (["models", "--for", "chess"], "No task called 'chess'"),
    ],
)  # fmt: skip
def test_a_mistake_gives_one_message_and_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    write_jsonl(
        folder / "rows.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}, {"text": "c", "label": "y"}]
    )
    (folder / "broken.yaml").write_text("base: [")
    (folder / "list.yaml").write_text("- base")
    before = sorted(path.name for path in folder.iterdir())
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert re.search(message, err, re.DOTALL), err
    assert "Traceback" not in err
    assert out == ""
    assert sorted(path.name for path in folder.iterdir()) == before


def test_all_config_mistakes_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "base=x", "output=o", "method.rnk=8", "train.epochs=-1", "train.batch=2", "taks=3") == 2
    err = capsys.readouterr().err
    assert err.count("\n  - ") == 5
    for told in ("method.rnk", "train.epochs", "train.batch", "taks", "data: is missing"):
        assert told in err


def test_unknown_commands_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["trian"], ["models", "--frm", "x"], ["eval"], ["eval", "a", "b", "--limit", "many"]):
        assert run(*arguments) == 2
        assert "Traceback" not in capsys.readouterr().err


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("methods") == 0
    assert "lora" in capsys.readouterr().out
    assert run("methods", "lora", "--json") == 0
    assert set(json.loads(capsys.readouterr().out)["settings"]) == set(veneer.LoRA.model_fields)
    assert run("sites", "minilm-l6") == 0
    assert re.search(r"query\s+linear, attention, q\s+384 → 384 ×6", capsys.readouterr().out)
    assert run("sites", "minilm-l6", "--targets", "/layer.[01].att/", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["sites"]) == 10
    assert run("models", "--json") == 0
    assert {entry["name"] for entry in json.loads(capsys.readouterr().out)} >= {"smollm2-135m-instruct", "minilm-l6"}
    assert run("models", "--for", "sequence-classification", "--json") == 0
    assert next(iter(json.loads(capsys.readouterr().out)))["name"] == "minilm-l6"
    assert run("models", "fetch", "minilm-l6", "--json") == 0
    assert (Path(json.loads(capsys.readouterr().out)["folder"]) / "config.json").exists()


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_worked_examples(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert run(*[command] * bool(command), "--help") == 0
    out = capsys.readouterr().out
    assert f"veneer {command}" in out
    assert "xample" in out or not command


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from veneer.cli.__main__ import main\n"
        "try: main(['--help'])\n"
        "finally: print(sorted({'torch', 'transformers', 'datasets', 'pydantic'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False).stdout
    assert out.rstrip().endswith("[]")
    out = subprocess.run(
        [sys.executable, "-c", "import sys, veneer; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.strip() == "False"


def test_offline_by_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path))
    monkeypatch.setenv("VENEER_OFFLINE", "1")
    with pytest.raises(FetchError, match="downloads are switched off"):
        veneer.load_base("minilm-l6")
    with pytest.raises(FetchError, match="downloads are switched off"):
        read("prompt-injections")


def test_names_of_runs_that_are_no_names_of_adapters(data: Path, tiny_folder: Path) -> None:
    for output in ("train", "my run", "v1+2"):
        assert run("train", *options(tiny_folder, output, **{"train.max_steps": 2, "data.validation": 0})) == 0
        assert run("eval", output, "held_out.jsonl", "--limit", 1, "--no-base") == 0
    os.chdir("my run")
    assert run("eval", ".", "../held_out.jsonl", "--limit", 1, "--no-base") == 0


def test_a_run_that_failed_before_its_first_checkpoint_leaves_the_folder_free(
    data: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", *options(tiny_folder, "out", **{"train.optimizer": "foo"})) == 2
    assert "train: foo" in capsys.readouterr().err
    assert (
        run("train", *options(tiny_folder, "out", **{"train.learning_rate": 1e30, "train.schedule": "constant"})) == 2
    )
    assert "The loss is nan at step" in capsys.readouterr().err
    assert not Path("out/adapter").exists()
    assert run("train", *options(tiny_folder, "out", **{"train.max_steps": 1})) == 0


def test_resuming_keeps_the_record(data: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from veneer.training.trainer import Trainer

    more = {"train.epochs": 3, "train.keep_best": "false", "train.log_every": 1}
    assert run("train", *options(tiny_folder, "whole", **more)) == 0
    whole = json.loads(Path("whole/report.json").read_text())

    class Cut(Exception):
        pass

    original = Trainer.compute_loss

    def cut(self: Trainer, *args: object, **kwargs: object) -> object:
        if self.state.global_step == 4:
            raise Cut
        return original(self, *args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "compute_loss", cut)
        with pytest.raises(Cut):
            main(["train", *options(tiny_folder, "cut", **more)])
    assert run("train", *options(tiny_folder, "cut", **more)) == 0
    report = json.loads(Path("cut/report.json").read_text())
    for key in ("before", "after", "tokens", "steps", "best_step"):
        assert report[key] == whole[key], key
    steps = [
        [json.loads(line).get("step") for line in Path(name, "log.jsonl").read_text().splitlines()]
        for name in ("whole", "cut")
    ]
    assert steps[0] == steps[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"device": "gpu"}, "no device 'gpu'"),
        ({"dtype": "float8"}, "dtype: should be 'auto', 'float32', 'bfloat16' or 'float16' .got 'float8'"),
        ({"data.validation": "none"}, "data.validation: should be 0 for none"),
        ({"task.max_length": 1}, "task.max_length: .*greater than or equal to 2"),
        ({"train.trackers": "[nothing]"}, "train: .*nothing"),
        ({"data.validation": -1}, "data.validation"),
        ({"data.validation": 1.5}, "data.validation"),
        ({"method.rank": 100000}, "rank 100000 is more than these maps can have"),
        ({"base": "minilm-l6"}, "minilm-l6 is an encoder .*Take a decoder"),
    ],
)  # fmt: skip
def test_values_that_cannot_be(
    data: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], more: dict[str, object], message: str
) -> None:
    assert run("train", *options(tiny_folder, "out", **more)) == 2
    assert re.search(message, capsys.readouterr().err, re.DOTALL)
    assert not Path("out/adapter").exists()


def test_prompt_from_stdin(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("Hello"))
    assert run("generate", "-", "--base", tiny_folder, "--max-new-tokens", 2, "--json") == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "Hello"
    assert run("generate", "x", "--base", tiny_folder, "--max-new-tokens", 0) == 2
    assert run("generate", "x", "--base", tiny_folder, "--compare") == 2


def test_an_adapter_written_by_peft(data: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import warnings

    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = veneer.load_base(tiny_folder, dtype="float32")
        wrapped = peft.get_peft_model(
            base.model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
        )
        wrapped.save_pretrained("theirs")
    assert run("eval", "theirs", "held_out.jsonl", "--base-model", tiny_folder, "--max-new-tokens", 2) == 0
    assert "plain base" in capsys.readouterr().out


BEGUN = """
import os, sys
print(os.environ.get("GLIBC_TUNABLES"), os.getpid(), flush=True)
sys.argv = ["veneer", {command!r}, "--help"]
{before}
from veneer.cli.launch import main
main()
"""
SPARING = "glibc.malloc.tcache_count=0"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
@pytest.mark.parametrize(
    ("command", "given", "before", "then"),
    [
        ("train", {}, "", SPARING),
        ("plan", {"GLIBC_TUNABLES": "glibc.malloc.perturb=1"}, "", f"glibc.malloc.perturb=1:{SPARING}"),
        ("train", {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=3"}, "", None),
        ("train", {"VENEER_BEGUN": "1"}, "", None),  # something took the variable away
        ("train", {"LD_PRELOAD": "/nowhere/libjemalloc.so.2"}, "", None),
        ("train", {}, "sys.settrace(lambda *told: None)", None),
        ("train", {}, "sys.executable += '-gone'", None),
        ("train", {}, "import veneer.training.allocator as heap; heap._GPUS = ('/',)", None),
        ("chat", {}, "", None),
    ],
)
def test_what_trains_begins_again_with_a_sparing_heap(
    command: str, given: dict[str, str], before: str, then: str | None
) -> None:
    own = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "VENEER_BEGUN")}
    program = [sys.executable, "-c", BEGUN.format(command=command, before=before)]
    told = subprocess.run(program, capture_output=True, text=True, check=True, env=own | given).stdout
    begun = re.findall(r"^(\S+) (\d+)$", told, re.MULTILINE)
    assert [tunables for tunables, _ in begun] == [str(given.get("GLIBC_TUNABLES")), *([then] if then else [])]
    assert len({number for _, number in begun}) == 1
    assert f"veneer {command}" in told


def test_both_ways_in_begin_again() -> None:
    (entry,) = entry_points(group="console_scripts", name="veneer")
    assert entry.value == "veneer.cli.launch:main"
    assert set(COMMANDS) >= TRAINING
    program = [sys.executable, "-X", "importtime", "-m", "veneer", "train", "--help"]
    own = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "VENEER_BEGUN")}
    done = subprocess.run(program, capture_output=True, text=True, check=True, env=own)
    times = 2 if platform.libc_ver()[0] == "glibc" else 1
    assert done.stderr.count("veneer.cli.launch") == times
    assert done.stdout.count("veneer train") > 0

"""What a run leaves: its record and card, and running it again, going on from it, asking it without repeating."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import veneer
from helpers import command, sums, write_jsonl
from veneer.storage import sha256
from veneer.training.checkpoints import checkpoints


@pytest.fixture
def arguments(folder: Path, tiny_folder: Path) -> Callable[..., list[str]]:
    write_jsonl(folder / "train.jsonl", sums(48))
    write_jsonl(folder / "new.jsonl", [{"prompt": "Name a stone.", "completion": f"Quartz {n}"} for n in range(24)])

    def of(output: str, **more: object) -> list[str]:
        settings = {
            "base": tiny_folder,
            "dtype": "float32",
            "data.train": "train.jsonl",
            "data.validation": 0.2,
            "output": output,
            "method.rank": 2,
            "train.samples": 0,
            "train.learning_rate": 1e-2,
            "train.epochs": 2,
        } | {key.replace("__", "."): value for key, value in more.items()}
        return ["train", *(f"{key}={value}" for key, value in settings.items())]

    return of


def record(run_folder: str) -> dict[str, object]:
    return json.loads(Path(run_folder, "adapter", "veneer.json").read_text())["training"]  # type: ignore[no-any-return]


def test_the_record_and_the_card(arguments: Callable[..., list[str]], tiny_folder: Path) -> None:
    assert command(*arguments("out")) == 0
    report = json.loads(Path("out/report.json").read_text())
    made = record("out")
    assert made["config"]["train"]["seed"] == 0  # type: ignore[index]
    train, held_out = made["data"]["train"], made["data"]["validation"]  # type: ignore[index]
    assert train["files"] == {"train.jsonl": sha256(Path("train.jsonl"))}
    assert (train["rows"], held_out["rows"]) == (38, 10)
    assert train["sha256"] != held_out["sha256"]
    assert {"veneer", "torch", "transformers", "python", "machine", "threads"} <= set(made["versions"])  # type: ignore[call-overload]
    assert made["result"] == report

    card = Path("out/adapter/README.md").read_text()
    _, header, body = card.split("---\n", 2)
    told = yaml.safe_load(header)
    assert told["base_model"] == str(tiny_folder)
    assert told["library_name"] == "peft"
    assert {"lora", "causal-lm"} <= set(told["tags"])
    assert told["metrics"] == ["loss", "perplexity", "token_accuracy"]
    assert "license" not in told
    assert "datasets" not in told  # a file is none of the hub's
    for said in (
        f"{report['trainable']:,} numbers trained",
        "38 rows (train.jsonl), sha256",
        "learning_rate: 0.01",
        f"| loss | {report['before']['loss']:.4g} | {report['after']['loss']:.4g} |",
        "torch: ",
    ):
        assert said in body


def test_the_plan_is_told_and_kept(
    arguments: Callable[..., list[str]], tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*arguments("out")) == 0
    said = capsys.readouterr()
    told = " ".join((said.out + said.err).split())
    assert re.search(r"plan: a step holds about [0-9.]+ MB of tensors \([0-9]+ rows? of up to", told)
    plan = record("out")["plan"]
    step = plan["training"]
    assert step["total"] == sum(value for name, value in step.items() if name not in ("rows", "tokens", "total"))
    assert step["weights"] == veneer.load_base(tiny_folder, dtype="float32").nbytes
    assert step["optimizer"] >= 2 * step["adapter"]
    assert plan["serving"]["kv"] > 0
    card = Path("out/adapter/README.md").read_text()
    assert f"MB (weights {step['weights'] / 1e6:,.1f}" in card
    assert "a hundred such variants" in card


def test_a_card_that_a_person_changed_stays(tiny_folder: Path, folder: Path) -> None:
    adapter = veneer.load_base(tiny_folder, dtype="float32").attach(veneer.LoRA(rank=2))
    adapter.save("saved")
    adapter.record = {"result": {"steps": 7, "tokens": 9}}
    adapter.save("saved")
    assert "7 steps, 9 tokens" in Path("saved/README.md").read_text()  # ours is brought up to date
    Path("saved/README.md").write_text("# Mine\n")
    Path("saved/LICENSE").write_text("MIT")
    Path("saved/adapter_model.bin").write_bytes(b"old weights")
    for _ in range(2):
        adapter.save("saved")
        assert Path("saved/README.md").read_text() == "# Mine\n"
        assert Path("saved/LICENSE").read_text() == "MIT"
        assert not Path("saved/adapter_model.bin").exists()


def test_reproduce(arguments: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*arguments("out", data__limit=30, method__dropout=0.1)) == 0
    capsys.readouterr()
    assert command("train", "--reproduce", "out", "--output", "again", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["same"] is True
    assert told["found"] == told["recorded"] == sha256(Path("again/adapter/adapter_model.safetensors"))
    assert command("train", "--reproduce", "out/adapter", "output=third") == 0
    assert "the weights are the same, bit for bit" in capsys.readouterr().out

    path = Path("out/adapter/veneer.json")
    made = json.loads(path.read_text())
    made["training"]["config"]["train"]["seed"] = 1  # so that something else comes out
    made["training"]["config"]["data"]["validation"] = 0
    made["training"]["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(made))
    assert command("train", "--reproduce", "out", "--output", "fourth") == 2
    assert "The data changed since this adapter was trained: the train data" in capsys.readouterr().err
    assert not Path("fourth").exists()
    made["training"]["config"] |= record("again")["config"] | {"dtype": "bfloat16"}  # type: ignore[operator]
    path.write_text(json.dumps(made))
    assert command("train", "--reproduce", "out", "--output", "fourth") == 1
    out, err = capsys.readouterr()
    assert re.search(r"Not reproduced: sha256 \w+ instead of \w+. Since then: torch 1.0 → ", " ".join(out.split()))
    assert "since this adapter was trained: torch 1.0" in err


def test_reproduce_is_told_what_is_wrong(
    arguments: Callable[..., list[str]], tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    veneer.load_base(tiny_folder).attach(veneer.LoRA(rank=2)).save("untrained")
    for line, message in (
        (["--reproduce", "nowhere", "--output", "x"], "no adapter folder: it does not exist"),
        (["--reproduce", "untrained", "--output", "x"], "does not say how it was trained"),
        (["--reproduce", "untrained"], "Say where to: veneer train --reproduce untrained --output FOLDER"),
        (["--reproduce", "untrained", "train.epochs=1"], "give nothing besides but an output"),
        (["--continue", "nowhere", "data.train=new.jsonl", "output=x"], "no adapter folder: it does not exist"),
        (["--continue", "untrained", "output=x"], "data: is missing"),
    ):
        assert command("train", *line) == 2
        assert message in capsys.readouterr().err
    assert not Path("x").exists()


def test_continue_shows_what_is_forgotten(
    arguments: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*arguments("first", train__epochs=6)) == 0
    first = json.loads(Path("first/report.json").read_text())
    capsys.readouterr()
    on = ["data.train=new.jsonl", "data.validation=0.2", "train.learning_rate=2e-2", "train.samples=0", "dtype=float32"]
    assert command("train", "--continue", "first", *on, "train.epochs=6", "output=second", "--json") == 0
    out, err = capsys.readouterr()
    (old,) = json.loads(out)["earlier"]
    assert old["data"] == "train.jsonl"
    assert old["rows"] == 10
    assert old["before"]["loss"] == pytest.approx(first["after"]["loss"], rel=1e-5)
    assert old["after"]["loss"] > old["before"]["loss"] * 1.1
    assert "remembers  loss" in err
    assert "it forgets what it learned before" in err
    assert "held-out rows of train.jsonl, learned before" in Path("second/adapter/README.md").read_text()
    # What it starts from is what the first run made, and what comes out is another adapter.
    (start,) = (json.loads(line) for line in Path("second/log.jsonl").read_text().splitlines()[:1])
    assert start["step"] == 0
    assert sha256(Path("first/adapter/adapter_model.safetensors")) == record("second")["continued_from"]

    for number, (rows, why) in enumerate(((sums(48, 7), "the data changed since"), ([], "train.jsonl is empty"))):
        write_jsonl(Path("train.jsonl"), rows)
        assert command("train", "--continue", "second", *on, "train.max_steps=1", f"output=more-{number}") == 0
        missing, known = json.loads(Path(f"more-{number}/report.json").read_text())["earlier"]
        assert why in missing["missing"]
        assert "after" not in missing
        assert known["data"] == "new.jsonl"
        assert "unknown    what it still knows of 10 held-out rows of train.jsonl" in capsys.readouterr().err


def test_a_continued_run_resumes_and_is_reproduced(
    arguments: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from veneer.training.trainer import Trainer

    assert command(*arguments("first", train__epochs=1)) == 0
    on = ["train", "continue_from=first", "data.train=new.jsonl", "train.epochs=3", "train.samples=0", "dtype=float32"]
    assert command(*on, "output=whole") == 0
    original = Trainer.compute_loss

    class Cut(BaseException):
        pass

    def cut(self: Trainer, *args: object, **kwargs: object) -> object:
        if self.state.global_step == 5:
            raise Cut
        return original(self, *args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "compute_loss", cut)
        with pytest.raises(Cut):
            command(*on, "output=cut")
    assert checkpoints(Path("cut"))
    assert command(*on, "output=cut") == 0
    ours, theirs = (json.loads(Path(name, "report.json").read_text()) for name in ("cut", "whole"))
    assert ours["earlier"] == theirs["earlier"]
    assert sha256(Path("cut/adapter/adapter_model.safetensors")) == sha256(
        Path("whole/adapter/adapter_model.safetensors")
    )
    assert command("train", "--reproduce", "whole", "--output", "again") == 0
    assert command(*arguments("other", train__epochs=1, train__seed=3)) == 0
    Path("first").rename("gone")
    Path("other").rename("first")
    capsys.readouterr()
    assert command("train", "--reproduce", "whole", "--output", "more") == 2
    assert "adapter that is continued changed since this adapter was trained" in capsys.readouterr().err


def test_continue_keeps_method_and_labels(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, labels in (("mails", ("up", "down")), ("newer", ("up", "sideways"))):
        rows = "".join(f"good {n} thing,{labels[n % 2]}\n" for n in range(16))
        Path(f"{name}.csv").write_text("body,label\n" + rows)
    common = ["data.columns={text: body}", "train.max_steps=2"]
    assert command("train", "base=minilm-l6", "data.train=mails.csv", "output=a", "method.rank=2", *common) == 0
    on = ["train", "--continue", "a", *common]
    capsys.readouterr()
    assert command(*on, "data.train=newer.csv", "output=b") == 2
    assert "labels that are not among those learned: 'sideways' (1) (newer.csv, line 9)" in capsys.readouterr().err
    assert command(*on, "data.train=mails.csv", "output=b", "method.rank=4") == 2
    assert "method: is that of the adapter it continues from" in capsys.readouterr().err
    assert command(*on, "data.train=mails.csv", "output=b", "task=causal-lm") == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not Path("b").exists()

    # Columns are remembered: neither command is told them again.
    assert command("eval", "a", "mails.csv", "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 16
    Path("inbox.csv").write_text("id,body\n7,good thing\n")
    assert command("predict", "a", "inbox.csv", "--output", "labelled.csv") == 0
    assert Path("labelled.csv").read_text().splitlines()[0] == "id,body,label,probabilities"
    Path("plain.csv").write_text("text,label\ngood thing,up\n")
    assert command("eval", "a", "plain.csv") == 0


def test_training_from_python_is_recorded_too(tiny_folder: Path, folder: Path) -> None:
    adapter = veneer.load_base(tiny_folder, dtype="float32").attach(veneer.LoRA(rank=2))
    result = veneer.train(adapter, sums(16), epochs=1, learning_rate=1e-2)
    adapter.save("saved")
    made = json.loads(Path("saved/veneer.json").read_text())["training"]
    assert made["data"]["train"]["rows"] == 14
    assert made["result"]["steps"] == result.steps
    assert "| loss |" in Path("saved/README.md").read_text()
    assert load_file("saved/adapter_model.safetensors")

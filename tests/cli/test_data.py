"""`veneer data`, and what `veneer train` makes of data: as a person meets it."""

from __future__ import annotations

import csv
import gzip
import json
import re
import shutil
from pathlib import Path

import datasets
import pytest

from helpers import sums, write_jsonl
from veneer.cli.__main__ import main
from veneer.data import read

ROW = '{"prompt": "a?", "completion": "b"}\n'
ARRAY = "[\n" + ",\n".join([ROW.strip()] * 20) + "\n]\n"
TURNS = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "No."},
]


def run(*arguments: object) -> int:
    """The exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def options(tiny: Path, **more: object) -> list[str]:
    settings = {
        "base": tiny,
        "dtype": "float32",
        "data.train": "train.jsonl",
        "data.validation": 0,
        "output": "out",
        "method.rank": 2,
        "train.max_steps": 1,
    } | more
    return [f"{key}={value}" for key, value in settings.items()]


def parquet(rows: int) -> bytes:
    datasets.Dataset.from_list([{"prompt": f"a{n}", "completion": "b"} for n in range(rows)]).to_parquet("all.parquet")
    content = Path("all.parquet").read_bytes()
    Path("all.parquet").unlink()
    return content


BAD = [
    ("answer.jsonl", None, r"There is no data file answer.jsonl. Did you mean 'answers.jsonl'\?"),
    ("empty.jsonl", b"", "empty.jsonl is empty"),
    ("empty.csv", b"", "empty.csv is empty"),
    ("blank.jsonl", b"\n  \n\n", "blank.jsonl has no rows"),
    ("header.csv", b"prompt,completion\n", "header.csv has no rows"),
    ("none.json", b"[]", "none.json has no rows"),
    ("binary.jsonl", bytes(range(256)) * 9, "binary.jsonl is not UTF-8 text: it is binary"),
    ("binary.csv", b"a\0" + bytes(range(1, 256)), "binary.csv is not UTF-8 text: it is binary"),
    ("zeros.jsonl", b"\0" * 500, "zeros.jsonl is not UTF-8 text"),
    ("packed.jsonl", gzip.compress(ROW.encode()), r"compressed \(gzip\); unpack it first"),
    ("table.csv", b"PAR1 and so on", "is a Parquet file; name it .parquet"),
    ("wide.jsonl", ROW.encode("utf-16"), "wide.jsonl is not UTF-8 text but UTF-16; convert it: iconv -f utf-16"),
    ("wide.json", ARRAY.encode("utf-16"), "not UTF-8 text but UTF-16"),
    ("wide.csv", "prompt,completion\na,b\n".encode("utf-16-le"), "not UTF-8 text but UTF-16"),
    ("latin.csv", "prompt,completion\na,b\ncafé,b\n".encode("latin-1"), r"latin.csv, line 3: not UTF-8 text \(byte 0xe9"),
    ("latin.jsonl", (ROW + ROW.replace("a?", "é")).encode("latin-1"), "latin.jsonl, line 2: not UTF-8 text"),
    ("cut.jsonl", (ROW * 2 + ROW[:20]).encode(), "cut.jsonl, line 3: malformed JSON .*the file seems cut off"),
    ("cut.json", ARRAY[:-20].encode(), r"cut.json, line 21: malformed JSON .*the file seems cut off"),
    ("cut.csv", b'prompt,completion\na,b\n"a long story', "cut.csv, line 3: a quote is opened here and never closed"),
    ("cut.parquet", "parquet", "cut.parquet is cut off"),
    ("broken.jsonl", (ROW + "\n" + '{"prompt": "a?" "completion": "b"}\n' + ROW).encode(), "line 3: malformed JSON (?!.*cut off)"),
    ("broken.json", ARRAY.replace('?", ', '?" ', 1).encode(), "broken.json, line 2: malformed JSON (?!.*cut off)"),
    ("list.jsonl", (ROW + "[1]\n").encode(), "list.jsonl, line 2: not a JSON object"),
    ("columns.csv", b"promt,completions\na,b\n", "columns promt, completions.*Did you mean 'prompt'.*Did you mean 'completion'"),
    ("twice.csv", b"prompt,prompt\na,b\n", "twice.csv, line 1: the header names 'prompt' twice"),
    ("semicolons.csv", b"prompt;completion\na;b\n", "line 1: the cells seem to be separated by semicolons"),
    ("ragged.csv", b"prompt,completion\na,b\nc,d,e\n", "ragged.csv, line 3: 3 cells where the header has 2"),
    ("short.csv", b"prompt,completion\na,b\n\nc\n", "short.csv, line 4: 'completion' is empty"),
    ("lacking.jsonl", (ROW + "\n" + '{"prompt": "a?"}\n').encode(), "lacking.jsonl, line 3: 'completion' is missing"),
    ("many.jsonl", (ROW + '{"prompt": ""}\n' * 12).encode(), r"12 bad rows:\n  many.jsonl, line 2: 'prompt' is empty.*and 2 more"),
    ("role.jsonl", json.dumps({"messages": [{"role": "asistant", "content": "x"}]}).encode(), "line 1: .*Did you mean 'assistant'"),
    ("silent.jsonl", json.dumps({"messages": [{"role": "user"}, TURNS[1]]}).encode(), "line 1: .*turn of 'user' without content"),
    ("label.csv", b"text,label\na,x\nb,\n", "label.csv, line 3: 'label' is empty"),
]  # fmt: skip


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize(("name", "content", "message"), BAD, ids=[name for name, _, _ in BAD])
def test_bad_input_is_one_clear_error(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    name: str,
    content: bytes | str | None,
    message: str,
) -> None:
    write_jsonl(folder / "answers.jsonl", sums(3))
    if content is not None:
        Path(name).write_bytes(parquet(500)[:-200] if content == "parquet" else content)  # type: ignore[arg-type]
    before = sorted(path.name for path in folder.iterdir())
    arguments = ["data", "check", name] if command == "check" else ["train", "base=x", f"data.train={name}", "output=o"]
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: "), err
    assert re.search(message, err, re.DOTALL), err
    assert out == ""
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_file_that_may_not_be_read(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_jsonl(folder / "mine.jsonl", sums(3))
    original = Path.open

    def forbidden(self: Path, *arguments: object, **options: object) -> object:
        if self.name == file.name:
            raise PermissionError(13, "Permission denied", str(self))
        return original(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "open", forbidden)
    assert run("data", "check", "mine.jsonl") == 2
    assert "error: mine.jsonl cannot be read: Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "txt"])
def test_a_byte_order_mark_does_no_harm(folder: Path, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    table = "prompt,completion\na?,b\nc?,d\n"
    kinds = {"jsonl": ROW * 2, "json": f"[{ROW},{ROW}]", "csv": table, "tsv": table.replace(",", "\t"), "txt": "Once."}
    Path(f"rows.{suffix}").write_text(kinds[suffix], encoding="utf-8-sig")
    assert run("data", "check", f"rows.{suffix}", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["format"] == ("text" if suffix == "txt" else "prompt_completion")
    assert report["parts"]["training"]["rows"] == (1 if suffix == "txt" else 2)
    rows = list(read(f"rows.{suffix}"))
    assert not any("\ufeff" in text for row in rows for pair in row.items() for text in pair)


def test_check_finds_everything(folder: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = sums(30)
    long = {"prompt": "How many letters has this sentence, all of them counted from its start to its end?"}
    rows[7] = rows[3]
    rows[8] = {**long, "completion": "Seventy."}
    rows[9] = {**long, "completion": "Seventy!"}
    rows[10] = {"prompt": "word " * 70, "completion": "x"}
    rows[11] = {"prompt": "Say it.", "completion": "word " * 70}
    write_jsonl(folder / "train.jsonl", rows)
    held_out = [*sums(5, 100), rows[2], {"prompt": long["prompt"].replace("sentence", "sentences"), "completion": "x"}]
    write_jsonl(folder / "validation.jsonl", held_out)
    assert run("data", "check", "train.jsonl", "--base", tiny_folder, "--validation", "validation.jsonl", "--json") == 1
    report = json.loads(capsys.readouterr().out)
    training, validation = report["parts"]["training"], report["parts"]["validation"]
    assert not report["ok"]
    assert report["limit"] == 64
    assert (training["rows"], validation["rows"]) == (30, 7)
    assert (training["truncated"], training["dropped"], training["prompt_too_long"]) == (1, 1, 1)
    assert (training["exact_duplicates"], training["near_duplicates"]) == (1, 1)
    assert (validation["overlap"], validation["near_overlap"]) == (1, 1)
    assert training["prompt"]["min"] <= training["prompt"]["median"] <= training["prompt"]["p95"]
    assert training["prompt"]["max"] > 70
    found = {(finding["part"], finding["code"]): finding for finding in report["findings"]}
    assert set(found) == {
        ("training", "truncated"),
        ("training", "exact_duplicates"),
        ("validation", "overlap"),
        ("validation", "near_overlap"),
    }
    lost = found["training", "truncated"]
    assert lost["level"] == "error"
    assert "1 of 30 rows is cut at 64 tokens (train.jsonl, line 12)" in lost["message"]
    assert "1 of 30 rows is left out" in lost["message"]
    assert "(train.jsonl, line 11)" in lost["message"]
    assert "data.max_truncated=0.07" in lost["message"]
    assert "train.jsonl, line 8" in found["training", "exact_duplicates"]["message"]
    assert found["training", "exact_duplicates"]["level"] == "warning"
    assert "validation.jsonl, line 6" in found["validation", "overlap"]["message"]
    assert found["validation", "overlap"]["level"] == "error"

    assert run("data", "check", "train.jsonl", "--base", tiny_folder, "--max-truncated", 0.1) == 0
    out = capsys.readouterr().out
    assert re.search(r"training   30 rows · [\d,]+ tokens: prompt \d+/\d+/\d+/\d+, completion \d", out)
    assert "warning: training: 1 of 30 rows is cut" in out
    assert run("data", "check", "train.jsonl", "--base", tiny_folder, "--max-length", 8) == 1
    assert "nothing_to_learn" not in capsys.readouterr().out
    assert run("data", "check", "train.jsonl", "--base", tiny_folder, "--max-length", 4, "--json") == 1
    assert "nothing_to_learn" in capsys.readouterr().out


def test_check_is_quiet_about_clean_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(folder / "answers.jsonl", [{"question": "a?", "completion": "b"}])
    assert run("data", "check", "answers.jsonl", "--columns", "prompt=question") == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "training   1 row",
        "no problems found; with --base NAME, tokens are counted, too",
    ]
    assert err == ""


def test_check_needs_no_weights(folder: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(tiny_folder, "base", ignore=shutil.ignore_patterns("*.safetensors"))
    write_jsonl(folder / "answers.jsonl", sums(3))
    assert run("data", "check", "answers.jsonl", "--base", "./base", "--json") == 0
    assert json.loads(capsys.readouterr().out)["parts"]["training"]["tokens"] > 0


def test_check_of_labels(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": f"text number {n} is {n * n}", "label": "yes" if n % 4 else "no"} for n in range(20)]
    rows += [{"text": "one of a kind", "label": "rare"}, {"text": rows[1]["text"], "label": "no"}]
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "test.jsonl", [{"text": "x", "label": "yes"}, {"text": "y", "label": "yess"}])
    assert run("data", "check", "train.jsonl", "--test", "test.jsonl", "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["parts"]["training"]["labels"] == {"yes": 15, "no": 6, "rare": 1}
    assert report["parts"]["training"]["conflicting"] == 1
    assert report["parts"]["test"]["unseen_labels"] == {"yess": 1}
    assert {finding["code"] for finding in report["findings"]} == {"unseen_labels", "rare_labels", "conflicting_labels"}
    assert run("data", "check", "train.jsonl") == 0
    assert "labels: yes 68%, no 27%, rare 5%" in capsys.readouterr().out


def test_many_even_labels_are_not_rare(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(folder / "many.jsonl", [{"text": f"text {n} {n * n}", "label": n % 150} for n in range(600)])
    assert run("data", "check", "many.jsonl", "--json") == 0
    assert json.loads(capsys.readouterr().out)["findings"] == []


def test_lines_in_a_mixture(folder: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(folder / "a.jsonl", sums(4))
    write_jsonl(folder / "b.jsonl", [*sums(2, 10), {"prompt": "word " * 70, "completion": "x"}])
    assert run("train", *options(tiny_folder, **{"data.train": "[{path: a.jsonl, task: x}, b.jsonl]"})) == 2
    assert "(b.jsonl, line 3)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["answers.jsonl", "--base", "nope"], "No base called 'nope'"),
        (["answers.jsonl", "--base", "minilm-l6"], "minilm-l6 is an encoder"),
        (["answers.jsonl", "--task", "causal"], "No task called 'causal'. Did you mean 'causal-lm'"),
        (["answers.jsonl", "--task", "sequence-classification"], "takes rows with text, label, but these have"),
        (["answers.jsonl", "--validation", "nowhere.jsonl"], "There is no data file nowhere.jsonl"),
        (["answers.jsonl", "--validation", "texts.jsonl"], "takes rows with|have the columns|has the columns"),
        (["answers.jsonl", "--columns", "prompt=q"], "no column 'q'"),
        (["answers.jsonl", "--max-length", "0"], "max-length"),
        (["answers.jsonl", "--max-truncated", "2"], "max-truncated"),
        ([], "requires an argument"),
    ],
)  # fmt: skip
def test_mistakes_in_checking(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    write_jsonl(folder / "answers.jsonl", sums(3))
    write_jsonl(folder / "texts.jsonl", [{"text": "x", "label": "y"}])
    assert run("data", "check", *arguments) == 2
    out, err = capsys.readouterr()
    assert re.search(message, out + err)
    assert "Traceback" not in err


def test_training_shows_what_is_learned(folder: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(folder / "train.jsonl", sums(24))
    assert run("train", *options(tiny_folder, **{"train.max_steps": 12, "data.validation": 0.25})) == 0
    err = capsys.readouterr().err
    assert re.search(r"training   18 rows · [\d,]+ tokens: prompt .*none cut\nvalidation 6 rows", err)
    assert "train.jsonl, line 1, as the model gets it; what is in ⟦ ⟧ is learned:" in err
    assert "What is 0 plus 0?<|im_end|>" in err
    assert err.count("⟦") == 2
    assert "⟦0<|im_end|>⟧" in err  # the end token, too
    assert "warning" not in err.split("as the model gets it")[0]
    assert re.search(r"pace: \S+ s a step, about \d+:\d\d for the 8 steps left", err)


@pytest.mark.parametrize("kind", ["colours", "plain"])
def test_the_loss_mask_in_colours_and_without(folder: Path, tiny_folder: Path, kind: str) -> None:
    import io

    from rich.console import Console

    import veneer
    from veneer.data import Part
    from veneer.tasks.causal_lm import CausalLM
    from veneer.training.preflight import show_example

    out = io.StringIO()
    console = Console(file=out, force_terminal=kind == "colours", color_system="standard", no_color=kind == "plain")
    rows = read([{"messages": TURNS}])
    base = veneer.load_base(tiny_folder)
    show_example(CausalLM(), Part("training", rows), base.tokenizer, console)
    told = out.getvalue()
    if kind == "plain":
        assert "⟦Yes.<|im_end|>⟧" in told
        assert "⟦No.<|im_end|>⟧" in told
        assert "One?" in told
    else:
        assert "\x1b[1;32mYes.<|im_end|>\x1b[0m" in told
        assert "\x1b[1;32mNo.<|im_end|>\x1b[0m" in told
        assert "\x1b[2m" in told
        assert "⟦" not in told


def test_rows_are_not_lost_in_silence(folder: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = sums(30)
    write_jsonl(folder / "train.jsonl", [*rows, {"prompt": "Say it.", "completion": "word " * 70}])
    assert run("train", *options(tiny_folder, output="a")) == 0
    err = capsys.readouterr().err
    assert "warning: training: 1 of 31 rows is cut at 64 tokens (train.jsonl, line 31)" in err
    write_jsonl(folder / "train.jsonl", [{"prompt": "word " * 70, "completion": "x"}, *rows[:9]])
    assert run("train", *options(tiny_folder, output="b")) == 2
    err = capsys.readouterr().err
    assert "1 of 10 rows is left out, with a prompt that alone fills 64 tokens (train.jsonl, line 1)" in err
    assert "the base reads 64 at most" in err
    assert "data.max_truncated=0.1 (it is 0.05)" in err
    assert not Path("b").exists()
    assert run("train", *options(tiny_folder, output="b", **{"data.max_truncated": 0.1})) == 0
    assert run("train", *options(tiny_folder, output="c", **{"data.max_truncted": 0.1})) == 2
    assert "data.max_truncted: unknown key. Did you mean 'max_truncated'" in capsys.readouterr().err


def test_no_row_reaches_beyond_the_context(folder: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(folder / "train.jsonl", [*sums(9), {"prompt": "word " * 70, "completion": "x"}])
    assert run("train", *options(tiny_folder, **{"task.max_length": 500})) == 2
    err = capsys.readouterr().err
    assert "1 row has more than the 64 tokens the base can read (train.jsonl, line 10)" in err
    assert not Path("out").exists()


@pytest.mark.parametrize("by_length", ["true", "false"])
def test_every_row_is_seen_once_an_epoch(
    folder: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], by_length: str
) -> None:
    """The longest, too, and those of a last batch that isn't full."""
    write_jsonl(folder / "train.jsonl", [*sums(20), {"prompt": "Go on.", "completion": "word " * 25}])
    more = {"train.epochs": 2, "train.batch_size": 4, "train.max_steps": "null", "train.group_by_length": by_length}
    assert run("train", *options(tiny_folder, **more), "--json") == 0
    seen = json.loads(capsys.readouterr().out)["tokens"]
    assert run("data", "check", "train.jsonl", "--base", tiny_folder, "--json") == 0
    assert seen == 2 * json.loads(capsys.readouterr().out)["parts"]["training"]["tokens"]


def test_labels_that_training_does_not_know(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(folder / "train.jsonl", [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(6)])
    write_jsonl(folder / "held_out.jsonl", [{"text": "x", "label": "a"}, {"text": "y", "label": "c"}])
    arguments = ["base=minilm-l6", "data.train=train.jsonl", "data.validation=held_out.jsonl", "output=out"]
    assert run("train", *arguments) == 2
    err = capsys.readouterr().err
    assert "validation: 1 row has labels that are not among those learned: 'c' (1) (held_out.jsonl, line 2)" in err
    assert not Path("out").exists()
    assert run("train", *arguments[:2], "data.validation=0", "output=out", "task.labels=[a, c]") == 2
    err = capsys.readouterr().err
    assert "training: 3 rows have labels that task.labels doesn't name: 'b' (3) (train.jsonl, lines 2, 4, 6)" in err


def _changed_base(tiny: Path, **tokenizer: object) -> Path:
    shutil.copytree(tiny, "base")
    file = Path("base/tokenizer_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | tokenizer))
    if "chat_template" in tokenizer:
        Path("base/chat_template.jinja").unlink(missing_ok=True)
    return Path("./base").absolute()


def test_the_end_token_must_be_learned(folder: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(folder / "train.jsonl", sums(6))
    base = _changed_base(tiny_folder, eos_token=None)
    assert run("train", *options(base)) == 2
    assert "the base's tokenizer has no end token, so answers would never end" in capsys.readouterr().err
    assert not Path("out").exists()
    assert run("data", "check", "train.jsonl", "--base", base) == 1
    assert "error: training: the base's tokenizer has no end token" in capsys.readouterr().out


def test_an_end_token_without_loss_is_noticed(
    folder: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is where padding is masked by its token and padding is the end token."""
    from veneer.tasks.causal_lm import IGNORED, CausalLM

    original = CausalLM._tokens

    def masked(self: CausalLM, segments: object, tokenizer: object) -> tuple[list[int], list[int]]:
        ids, labels = original(self, segments, tokenizer)  # type: ignore[arg-type]
        pad = tokenizer.pad_token_id  # type: ignore[attr-defined]
        return ids, [IGNORED if token == pad else label for token, label in zip(ids, labels, strict=True)]

    monkeypatch.setattr(CausalLM, "_tokens", masked)
    write_jsonl(folder / "train.jsonl", [{"prompt": "Will it end?", "completion": "It won't."}])
    assert run("train", *options(tiny_folder)) == 2
    assert "the end token <|im_end|> carries no loss in 1 of 1 rows" in capsys.readouterr().err


def test_the_template_must_close_turns(folder: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_ended = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    base = _changed_base(tiny_folder, chat_template=open_ended)
    write_jsonl(folder / "train.jsonl", [{"messages": TURNS}, {"messages": TURNS[:2]}])
    assert run("train", *options(base)) == 2
    err = capsys.readouterr().err
    assert "chat template does not close the assistant's turns with an end token (1 of 2 rows" in err
    write_jsonl(folder / "train.jsonl", [{"messages": TURNS[:2]}, {"messages": TURNS[2:]}])
    assert run("train", *options(base)) == 0
    write_jsonl(folder / "train.jsonl", [{"messages": TURNS}])
    assert run("train", *options(tiny_folder, output="closed")) == 0


def test_something_must_be_trainable(folder: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(folder / "train.jsonl", sums(6))
    arguments = [argument for argument in options(tiny_folder, method="head") if "rank" not in argument]
    assert run("train", *arguments) == 2
    assert "Nothing would be trained: head has no trainable parameters here" in capsys.readouterr().err


def test_it_must_fit_into_memory(
    folder: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(folder / "train.jsonl", sums(6))
    monkeypatch.setattr("veneer.training.preflight.available_memory", lambda device: 100_000)
    assert run("train", *options(tiny_folder)) == 2
    err = capsys.readouterr().err
    assert re.search(r"A step needs about .* of memory besides base and adapter, but 100.0 kB are free", err)
    assert "Lower train.batch_size (and raise train.accumulation), train.pass_tokens or task.max_length, or set" in err
    assert not Path("out").exists()


def test_memory_in_a_container(tmp_path: Path) -> None:
    from veneer.training.preflight import _container_memory

    assert _container_memory(tmp_path) > 1 << 60
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert _container_memory(tmp_path) > 1 << 60
    (tmp_path / "memory.max").write_text("1000\n")
    assert _container_memory(tmp_path) == 450


@pytest.fixture
def tickets(folder: Path) -> Path:
    """A table with cells of several lines, quotes, numbers as they are written, and no line break at its end."""
    rows = [
        f'{n:03},"Ticket ""{n}""\nhas {n * n} lines",{"yes" if n % 5 else "no"},author {n % 7},2025-01-{n + 1:02}'
        for n in range(30)
    ]
    path = folder / "tickets.csv"
    path.write_bytes(("id,text,label,author,opened\n" + "\n".join(rows)).encode())
    return path


def parts(suffix: str = "csv") -> dict[str, Path]:
    return {path.stem: path for path in sorted(Path("parts").glob(f"*.{suffix}"))}


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "strategy", [(), ("--stratify", "label"), ("--group", "author"), ("--time", "opened")], ids=lambda s: "".join(s[:1])
)
def test_split(tickets: Path, capsys: pytest.CaptureFixture[str], strategy: tuple[str, ...]) -> None:
    assert run("data", "split", tickets, "--output", "parts", "--validation", 0.2, "--test", 0.2, *strategy) == 0
    assert "train" in capsys.readouterr().out
    rows = {name: table(path) for name, path in parts().items()}
    assert sorted(rows) == ["test", "train", "validation"]
    assert sorted((row for part in rows.values() for row in part), key=lambda row: row["id"]) == table(tickets)
    assert 3 <= len(rows["validation"]) <= 9
    assert 3 <= len(rows["test"]) <= 9
    if "--stratify" in strategy:
        assert {name: sum(row["label"] == "no" for row in part) / len(part) for name, part in rows.items()} == {
            "train": pytest.approx(0.2, abs=0.05),
            "validation": pytest.approx(0.2, abs=0.05),
            "test": pytest.approx(0.2, abs=0.05),
        }
    authors = [{row["author"] for row in part} for part in rows.values()]
    assert bool(authors[0] & authors[1] or authors[1] & authors[2] or authors[0] & authors[2]) != (
        "--group" in strategy
    )
    days = {name: [row["opened"] for row in part] for name, part in rows.items()}
    in_order = max(days["train"]) < min(days["validation"]) and max(days["validation"]) < min(days["test"])
    assert in_order == ("--time" in strategy)
    header, *_ = tickets.read_text().splitlines()
    assert all(path.read_text().startswith(header + "\n") for path in parts().values())
    assert all(f'"Ticket ""{int(row["id"])}""\n' in parts()[name].read_text() for name in rows for row in rows[name])


def test_split_keeps_lines_as_they_stand(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f'{{"completion":"b", "prompt" : "n\\u00e9 {n}", "score": {n}.50, "none":null}}' for n in range(20)]
    Path("rows.jsonl").write_text("\n\n".join(lines))
    assert run("data", "split", "rows.jsonl", "--output", "parts", "--json") == 0
    told = json.loads(capsys.readouterr().out)["parts"]
    assert {name: part["rows"] for name, part in told.items()} == {"train": 18, "validation": 2}
    written = [line for path in parts("jsonl").values() for line in path.read_text().splitlines()]
    assert sorted(written) == sorted(lines)
    before = {path: path.read_text() for path in parts("jsonl").values()}
    shutil.rmtree("parts")
    assert run("data", "split", "rows.jsonl", "--output", "parts") == 0
    assert {path: path.read_text() for path in parts("jsonl").values()} == before
    shutil.rmtree("parts")
    assert run("data", "split", "rows.jsonl", "--output", "parts", "--seed", 1) == 0
    assert {path: path.read_text() for path in parts("jsonl").values()} != before


def test_split_of_json_and_parquet(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = sums(10)
    Path("rows.json").write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).to_parquet("rows.parquet")
    assert run("data", "split", "rows.json", "--output", "parts") == 0
    assert run("data", "split", "rows.parquet", "--output", "others") == 0
    from_json = [json.loads(path.read_text()) for path in parts("json").values()]
    from_parquet = [list(datasets.Dataset.from_parquet(str(path))) for path in sorted(Path("others").iterdir())]
    assert from_json == from_parquet
    assert sorted(map(str, from_json[0] + from_json[1])) == sorted(map(str, rows))
    assert [len(part) for part in from_json] == [9, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.csv"], "There is no data file nowhere.csv"),
        (["ticket.csv"], "Did you mean 'tickets.csv'"),
        (["tickets.csv", "--stratify", "lable"], "has no column 'lable'. Did you mean 'label'"),
        (["tickets.csv", "--stratify", "id"], "Every value occurs once only"),
        (["tickets.csv", "--time", "author"], r"'author 0' in column 'author' is neither .*tickets.csv, lines 2, 4"),
        (["tickets.csv", "--group", "label", "--test", "0.1"], "2 groups cannot be parted into 3"),
        (["gaps.csv", "--group", "label"], r"1 rows have no 'label' \(gaps.csv, line 3\)"),
        (["tickets.csv", "--group", "label", "--time", "opened"], "one thing at a time"),
        (["tickets.csv", "--validation", "0.6", "--test", "0.5"], "leave no training rows"),
        (["tickets.csv", "--validation", "1.5"], "validation"),
        (["one.jsonl"], "1 rows are too few for 2 parts"),
        (["story.txt"], "a single document"),
        (["broken.jsonl"], "broken.jsonl, line 1: malformed JSON"),
        (["."], "is a folder"),
    ],
)  # fmt: skip
def test_mistakes_in_splitting(
    tickets: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    Path("gaps.csv").write_text("text,label\na,x\nb,\nc,y\n")
    Path("one.jsonl").write_text(ROW)
    Path("story.txt").write_text("Once.")
    Path("broken.jsonl").write_text("{")
    before = sorted(path.name for path in Path().iterdir())
    assert run("data", "split", *arguments, "--output", "parts") == 2
    out, err = capsys.readouterr()
    assert re.search(message, out + err, re.DOTALL), err
    assert sorted(path.name for path in Path().iterdir()) == before


def test_split_overwrites_nothing(
    tickets: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("parts").mkdir()
    Path("parts/notes.md").write_text("mine")
    assert run("data", "split", "tickets.csv", "--output", "parts") == 2
    assert "parts exists already; nothing was written" in capsys.readouterr().err
    assert [path.name for path in Path("parts").iterdir()] == ["notes.md"]
    assert run("data", "split", "tickets.csv", "--output", "tickets.csv") == 2
    capsys.readouterr()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    before = sorted(path.name for path in Path().iterdir())
    assert run("data", "split", "tickets.csv", "--output", "new") == 2
    assert "No space left" in capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == before


@pytest.mark.parametrize("command", ["check", "split"])
def test_help_has_worked_examples(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert run("data", "--help") == 0
    assert f"veneer data {command}" in capsys.readouterr().out
    assert run("data", command, "--help") == 0
    out = capsys.readouterr().out
    assert "Examples:" in out
    assert out.count(f"veneer data {command}") > 1

from __future__ import annotations

import json
import os
from pathlib import Path

import datasets
import pytest

from helpers import sums, write_jsonl
from veneer.data import Format, detect, read
from veneer.data.reading import NUMBER, places
from veneer.errors import DataError, FetchError

ROWS = [{"prompt": "a?", "completion": "b"}, {"prompt": "c?", "completion": "d"}]


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(folder: Path, suffix: str) -> None:
    path = folder / f"rows.{suffix}"
    if suffix in {"jsonl", "ndjson"}:
        write_jsonl(path, ROWS)
    elif suffix == "json":
        path.write_text(json.dumps(ROWS))
    elif suffix == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    else:
        between = "," if suffix == "csv" else "\t"
        path.write_text("\n".join([f"prompt{between}completion", f"a?{between}b", f"c?{between}d"]))
    assert list(read(path)) == ROWS
    assert list(read(str(path))) == ROWS


def test_text_files_and_folders(folder: Path) -> None:
    (folder / "texts").mkdir()
    (folder / "texts" / "one.txt").write_text("First.\nStill first.")
    (folder / "texts" / "two.md").write_text("# Second")
    assert [row["text"] for row in read("texts")] == ["First.\nStill first.", "# Second"]
    (folder / "texts" / "three.csv").write_text("text\nx")
    with pytest.raises(DataError, match="mixes kinds"):
        read("texts")


def test_rows_and_datasets_from_python() -> None:
    assert list(read(ROWS)) == ROWS
    assert list(read(datasets.Dataset.from_list(ROWS))) == ROWS


def test_columns_under_other_names(folder: Path) -> None:
    write_jsonl(folder / "q.jsonl", [{"question": "a?", "answer": "b"}])
    assert list(read("q.jsonl", columns={"prompt": "question", "completion": "answer"})) == [ROWS[0]]
    with pytest.raises(DataError, match=r"no column 'questoin' to use as 'prompt'. Did you mean 'question'"):
        read("q.jsonl", columns={"prompt": "questoin"})


def test_mixtures_carry_their_task(folder: Path) -> None:
    write_jsonl(folder / "a.jsonl", ROWS[:1])
    write_jsonl(folder / "b.jsonl", [{"question": "c?", "completion": "d", "extra": 1}])
    mixed = read(
        [{"path": "a.jsonl", "task": "x"}, {"path": "b.jsonl", "task": "y", "columns": {"prompt": "question"}}]
    )
    assert list(mixed) == [{**ROWS[0], "task": "x"}, {**ROWS[1], "task": "y"}]
    write_jsonl(folder / "c.jsonl", [{"text": "t"}])
    with pytest.raises(DataError, match="different formats"):
        read(["a.jsonl", "c.jsonl"])
    with pytest.raises(DataError, match="has a path and may have"):
        read([{"path": "a.jsonl", "weight": 2}])


def test_catalogued_data() -> None:
    rows = read("prompt-injections", split="test")
    assert len(rows) == 2101
    assert detect(rows.column_names) is Format.TEXT_LABEL
    with pytest.raises(DataError, match="no split 'dev'"):
        read("prompt-injections", split="dev")


def test_data_is_memory_mapped(folder: Path) -> None:
    write_jsonl(folder / "rows.jsonl", sums(100))
    assert read("rows.jsonl").cache_files


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "There is no data file"),
        ("empty.jsonl", b"", "is empty"),
        ("broken.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": "a", "comp\n', "line 2: malformed JSON"),
        ("list.jsonl", b'{"prompt": "a", "completion": "b"}\n[1]\n', "line 2: not a JSON object"),
        ("utf16.jsonl", '{"prompt": "a", "completion": "b"}'.encode("utf-16"), "not UTF-8"),
        ("binary.parquet", b"\x00\x01\x02\x03", "is no Parquet file"),
        ("odd.xlsx", b"x", "of no known kind"),
        ("cols.csv", b"question,answer\na,b\n", "has the columns question, answer"),
        ("near.csv", b"prompts,completion\na,b\n", "Did you mean 'prompt'"),
        ("none.jsonl", b'{"prompt": "a", "completion": null}\n', "none.jsonl, line 1: 'completion' is missing"),
        (
            "blank.jsonl",
            b'{"prompt": "a", "completion": "b"}\n{"prompt": " ", "completion": "b"}\n',
            "blank.jsonl, line 2: 'prompt' is empty",
        ),
        ("label.jsonl", b'{"text": "a", "label": 0.5}\n', "a label is a string or an integer"),
        ("chat.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}\n', "no turn of the assistant"),
        ("turn.jsonl", b'{"messages": [{"speaker": "user"}]}\n', "which is no {role, content}"),
    ],
)
def test_bad_files_say_where(folder: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(name)


def test_names_that_lead_nowhere(folder: Path) -> None:
    write_jsonl(folder / "answers.jsonl", ROWS)
    with pytest.raises(DataError, match=r"There is no data file answer.jsonl. Did you mean 'answers.jsonl'"):
        read("answer.jsonl")
    with pytest.raises(FetchError, match="as a hub data set it cannot be had"):
        read("some-org/some-data")
    with pytest.raises(DataError, match="empty list"):
        read([])


def test_labels_that_are_numbers_with_names_come_by_name() -> None:
    label = datasets.ClassLabel(names=["no", "yes"])
    rows = datasets.Dataset.from_dict(
        {"text": ["a", "b"], "label": [1, 0]},
        features=datasets.Features({"text": datasets.Value("string"), "label": label}),
    )
    assert list(read(rows)) == [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}]


def test_places_of_rows(folder: Path) -> None:
    (folder / "a.jsonl").write_text('\n{"text": "a"}\n\n{"text": "b"}\n')
    (folder / "b.csv").write_text('id,text\n1,"two\nlines"\n\n2,c\n')
    (folder / "c.json").write_text('[{"text": "d"}]')
    rows = read(["a.jsonl", {"path": "b.csv"}, "c.json"], numbered=True)
    assert list(rows["text"]) == ["a", "b", "two\nlines", "c", "d"]
    shuffled = rows.shuffle(seed=1)
    found = places(["a.jsonl", {"path": "b.csv"}, "c.json"], shuffled[NUMBER])
    told = {text: str(place) for text, place in zip(shuffled["text"], found, strict=True)}
    assert told == {
        "a": "a.jsonl, line 2",
        "b": "a.jsonl, line 4",
        "two\nlines": "b.csv, line 2",
        "c": "b.csv, line 5",
        "d": "c.json, row 1",
    }
    assert [str(place) for place in places(ROWS, [1])] == ["the data, row 2"]
    (folder / "texts").mkdir()
    (folder / "texts" / "one.txt").write_text("x")
    assert [str(place) for place in places("texts", [0])] == ["texts/one.txt, row 1"]


def test_other_content_of_the_same_age_is_read_anew(tmp_path: Path) -> None:
    """As after `cp -p`, or on a file system with coarse times."""
    path = tmp_path / "rows.jsonl"
    for count in (3, 5):
        write_jsonl(path, [{"text": f"number {number}"} for number in range(count)])
        os.utime(path, (1_700_000_000, 1_700_000_000))
        assert len(read(str(path))) == count

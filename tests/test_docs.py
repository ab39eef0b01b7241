"""What the pages show works: every Python example and every `veneer` command on them is run, on tiny bases that stand
in for the catalogued ones; what is written from the code is up to date; links lead somewhere."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import veneer
from helpers import sums, tiny_bert, tiny_llama, write_jsonl
from veneer.bases.catalogue import CATALOGUE
from veneer.cli.__main__ import COMMANDS
from veneer.cli.reference import PAGES as PAGES_OF_SETTINGS
from veneer.cli.reference import commands, filled
from veneer.data.catalogue import DATASETS
from veneer.tasks.causal_lm import CausalLM

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
FENCE = re.compile(r"(?:^<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<kind>\w*)\n(?P<body>.*?)^```$", re.M | re.S)
NOT_RUN, OWN_PROCESS = "not run: ", "<!-- own process: "


def blocks(page: Path, kinds: tuple[str, ...]) -> list[tuple[int, str, str]]:
    """Line number, kind and content of the fenced blocks of these kinds that are to be run."""
    text = page.read_text(encoding="utf-8")
    found = [match for match in FENCE.finditer(text) if match["kind"] in kinds]
    return [
        (text.count("\n", 0, match.start("body")) + 1, match["kind"], match["body"])
        for match in found
        if not (match["mark"] or "").startswith(NOT_RUN)
    ]


RUN = ("python", "sh")
TO_RUN = [page for page in PAGES if blocks(page, RUN)]


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory, _smollm: veneer.Base, _minilm: veneer.Base) -> Path:
    """A cache in which tiny random models stand where the catalogued bases are looked for."""
    cache = tmp_path_factory.mktemp("cache")
    for name, model, base in (
        (
            "smollm2-135m-instruct",
            tiny_llama(vocab_size=49152, initializer_range=0.1, max_position_embeddings=512),
            _smollm,
        ),
        ("minilm-l6", tiny_bert(vocab_size=30522), _minilm),
    ):
        folder = cache / "bases" / CATALOGUE[name].folder.name
        model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
    for data in DATASETS.values():
        data.fetch()
        (cache / "data").mkdir(exist_ok=True)
        (cache / "data" / data.folder.name).symlink_to(data.folder)
    return cache


@pytest.fixture
def place(folder: Path, tiny_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files the pages speak of."""
    monkeypatch.setenv("VENEER_CACHE", str(tiny_cache))
    shutil.copy(ROOT / "examples" / "answers.jsonl", folder)
    for name in ("held_out.jsonl", "questions.jsonl", "tickets.jsonl"):
        write_jsonl(folder / name, sums(6))
    (folder / "questions.txt").write_text("Order: one tea.\n/compare\n")
    config = next(body for _, kind, body in blocks(DOCS / "configs.md", ("yaml",)))
    (folder / "config.yaml").write_text(config)
    base = veneer.load_base("smollm2-135m-instruct")
    base.attach(veneer.LoRA(rank=2), "legal", task=CausalLM(max_new_tokens=4).describe()).save("adapters/legal")
    return folder


@contextlib.contextmanager
def standard_input(file: str | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdin", io.StringIO(Path(file).read_text() if file else ""))
        yield


def run_commands(body: str, cli: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line of a shell block that calls veneer; ``< FILE`` is its input."""
    for line in body.splitlines():
        words = shlex.split(line, comments=True)
        assert words[:1] == ["veneer"], f"only veneer's commands are run: {line}"
        file = None
        if "<" in words:
            at = words.index("<")
            words, file = words[:at], words[at + 1]
        with standard_input(file, monkeypatch):
            assert cli(*words[1:]) == 0, line


@pytest.mark.filterwarnings("default")  # those of peft and TRL are not ours to mend
@pytest.mark.parametrize("page", TO_RUN, ids=lambda page: page.name)
def test_what_a_page_shows(page: Path, place: Path, cli: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    if OWN_PROCESS in page.read_text(encoding="utf-8"):
        script = "\n".join(body for _, kind, body in blocks(page, RUN) if kind == "python")
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return
    names: dict[str, object] = {}
    for line, kind, body in blocks(page, RUN):
        if kind == "sh":
            run_commands(body, cli, monkeypatch)
        else:
            exec(compile("\n" * line + body, str(page), "exec"), names)


def test_every_command_is_shown_somewhere() -> None:
    """On the page of all commands, and where its use is told."""
    reference = (DOCS / "commands.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"\n## {name}\n" not in reference] == []
    told = " ".join(page.read_text(encoding="utf-8") for page in PAGES if page.name != "commands.md")
    assert [name for name in COMMANDS if f"veneer {name}" not in told] == []


def test_what_is_written_from_the_code_is_up_to_date() -> None:
    assert (DOCS / "commands.md").read_text(encoding="utf-8") == commands(), "run `make docs`"
    for name in PAGES_OF_SETTINGS:
        page = (DOCS / name).read_text(encoding="utf-8")
        assert page == filled(page), "run `make docs`"


def test_every_page_is_in_the_navigation() -> None:
    listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [
        str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md") if str(path.relative_to(DOCS)) not in listed
    ] == []


def test_links_and_names_lead_somewhere(tmp_path: Path) -> None:
    """mkdocs, strictly: pages, anchors, pictures, and the Python names on the page of the API."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "site" / "python" / "index.html").read_text(encoding="utf-8")
    for name in veneer.__all__:
        assert name == "__version__" or f'id="veneer.{name}"' in api, name
    for picture in DOCS.glob("img/*.svg"):
        assert any(f"img/{picture.name}" in page.read_text(encoding="utf-8") for page in PAGES), picture


def test_links_of_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / target).exists(), target

"""The page about runs: every command on it works, in its order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from helpers import command

PAGE = Path(__file__).parent.parent / "docs" / "running.md"


def test_every_command_of_the_page(folder: Path) -> None:
    blocks = re.findall(r"```console\n(.*?)```", PAGE.read_text(), re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.splitlines()]
    assert len(lines) == 5
    for program, *arguments in lines:
        assert program == "veneer"
        assert command(*arguments) == 0, arguments

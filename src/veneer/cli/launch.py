"""Where the command ``veneer`` begins: what trains, or plans that, does so in a process whose heap suits it.

The C library reads some of its settings only as a process begins. This one then becomes another (the same to everyone
outside: process id, terminal, working directory), before anything large is imported: a hundredth of a second or two.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from veneer.training.allocator import sparing_environment

_TRAINING = {"advise", "compare", "demo", "lr-find", "plan", "sweep", "train"}


def main() -> NoReturn:
    """Run the command line."""
    if _TRAINING.intersection(sys.argv[1:2]) and (environment := sparing_environment()) is not None:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    from veneer.cli.__main__ import main as run

    run()

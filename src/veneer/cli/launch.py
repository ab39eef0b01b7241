"""Where the command ``veneer`` begins: what trains, or plans that, does so in a process whose heap suits it.

The C library reads some of its settings only as a process begins. This one then becomes another, with the same number,
terminal and folder, before anything large is imported.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import NoReturn

from veneer.training.allocator import sparing_environment

TRAINING = {"advise", "compare", "demo", "doctor", "lr-find", "plan", "sweep", "train"}
_BEGUN = "VENEER_BEGUN"
"""Set in the second process: once is enough, even where something takes the other variable away."""


def main() -> NoReturn:
    """Run the command line."""
    if TRAINING.intersection(sys.argv[1:2]):
        _begin_again()
    from veneer.cli.__main__ import main as run

    run()


def _begin_again() -> None:
    """With a sparing heap; nothing, where that isn't needed, or would disturb who watches this process."""
    watched = sys.gettrace() or sys.getprofile()
    own_program = sys.orig_argv[1:2] != ["-"]  # else it is on stdin, and read already
    if _BEGUN in os.environ or watched or not own_program:
        return
    environment = sparing_environment()
    if environment is not None and sys.executable:
        with contextlib.suppress(OSError):  # not allowed to: it works as it is
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**environment, _BEGUN: "1"})

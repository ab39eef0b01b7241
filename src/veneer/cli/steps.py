"""How far planning has come: on a terminal one line that changes, elsewhere a line a step; always on stderr."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from veneer.planning.plan import Begin


@contextlib.contextmanager
def steps(of: str) -> Iterator[Begin]:
    """What to call as each step begins.

    Args:
        of: what is gone through, such as ``methods``.
    """
    from rich.text import Text

    from veneer.training.progress import console, duration

    done, started = 0, time.perf_counter()
    status = console.status("planning") if console.is_terminal else None

    def begin(name: str, left: int) -> None:
        nonlocal done
        rest = f"  (about {duration((time.perf_counter() - started) / done * left)} left)" if done else ""
        done += 1
        told = f"planning {of} {done}/{done - 1 + left}: {name}{rest}"
        if status is None:
            console.print(told, markup=False)
        else:
            status.update(Text(told))

    with status or contextlib.nullcontext():
        yield begin

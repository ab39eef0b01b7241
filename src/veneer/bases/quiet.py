"""Loading and saving without the chatter of transformers and of what it imports."""

from __future__ import annotations

import contextlib
import logging as python_logging
from collections.abc import Iterator

# What quantises is imported by whoever trains or loads with transformers, and tells at once of kernels that are for
# other machines, or to be had from a hub.
for _name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
    python_logging.getLogger(_name).setLevel(python_logging.ERROR)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars, and its report of fresh heads (tasks bring their own)."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()

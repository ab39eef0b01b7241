"""Loading and saving without the chatter of transformers and of what it imports."""

from __future__ import annotations

import contextlib
import logging as python_logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars, its report of fresh heads (tasks bring their own), and what the libraries
    that quantise have to say of kernels for other machines."""
    below = python_logging.root.manager.disable
    python_logging.disable(python_logging.WARNING)
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        python_logging.disable(below)
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()

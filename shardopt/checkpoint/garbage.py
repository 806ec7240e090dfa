"""Python's search for garbage, and when it has to wait. No torch."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """No search for cycles meanwhile, where many objects are made at once.

    They would set off searches through all objects of the process, torch's own among them, which
    take longer than all the rest.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

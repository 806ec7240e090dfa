"""Checkpoints that are complete or absent, under checksums, for any number of ranks.

::

    save(directory, step=, model=, optimizer=, scheduler=, extra=, keep=)
    async_save(...)                    the same, while training goes on
    load(directory, model=, optimizer=, scheduler=)
    latest(directory)                  the newest step that verifies
    consolidate(source, out)           one file that needs no shardopt; no ranks

A step is a directory ``step-N``, in the format of ``torch.distributed.checkpoint``, whose tools
read it too, with ``manifest.json`` as the truth: names, shapes, places and a CRC32 to each block.
Nothing that is read can run code.

Torch is imported late: the offline tools need none to verify or to inspect.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardopt.checkpoint.offline import consolidate
    from shardopt.checkpoint.restoring import Loaded, latest, load
    from shardopt.checkpoint.saving import async_save, save

__all__ = ["Loaded", "async_save", "consolidate", "latest", "load", "save"]

_HOMES = {
    "Loaded": "restoring",
    "consolidate": "offline",
    "latest": "restoring",
    "load": "restoring",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'saving')}"), name)

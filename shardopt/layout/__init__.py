"""Where every parameter lies, as a value: see [Note: Vocabulary] in ``values.py``."""

from shardopt.layout.plan import plan_layout
from shardopt.layout.values import (
    SHARD_ALIGNMENT,
    SLOT_ALIGNMENT,
    Atom,
    Bucket,
    Layout,
    ParameterSpec,
    Segment,
    Slot,
)

__all__ = [
    "SHARD_ALIGNMENT",
    "SLOT_ALIGNMENT",
    "Atom",
    "Bucket",
    "Layout",
    "ParameterSpec",
    "Segment",
    "Slot",
    "plan_layout",
]

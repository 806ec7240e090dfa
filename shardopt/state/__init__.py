"""State in torch's form: put together from shards, and cut into shards again.

=================  ===========================  ==================================================
from               to                           by
=================  ===========================  ==================================================
shards             full state on one rank       ``consolidate``: sends, one bucket at a time
full, every rank   shards                       ``load``: each rank cuts its own, nothing travels
full, one rank     shards                       ``load``: sends, one bucket at a time
=================  ===========================  ==================================================

What describes the state (names, dtypes, shapes, plain values) travels as text; tensors travel as
they are, never pickled.
"""

from shardopt.state.methods import StatefulOptimizer
from shardopt.state.snapshot import Snapshot

__all__ = ["Snapshot", "StatefulOptimizer"]

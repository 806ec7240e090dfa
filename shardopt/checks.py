"""The part of ``ShardedOptimizer`` that looks, around a step, whether ranks still agree."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch.optim import Optimizer

from shardopt import validation
from shardopt.arrivals import Arrivals
from shardopt.comm import Collectives
from shardopt.gradients import Gradients, refuse_abandoned, refuse_ddp, refuse_gradients
from shardopt.guard import agree, agree_on_buckets, agree_on_gradients, all_or_none, attempt
from shardopt.policies import Guards
from shardopt.shard import Shard
from shardopt.state import Snapshot

_log = logging.getLogger("shardopt")


class CheckedOptimizer(Optimizer):
    """A ``torch.optim`` optimizer whose ranks compare what must be equal on all of them."""

    collectives: Collectives
    guards: Guards
    _shard: Shard
    _snapshot: Snapshot
    _arrivals: Arrivals
    _gradients: Gradients
    _means_all_ranks: bool  # no process group was named
    _num_steps = 0

    def agree(self, facts: Mapping[str, object], remedy: str) -> None:
        """Raise ``AgreementError`` on every rank unless all bring the same facts. Collective.

        Args:
            facts: what must be equal, by name.
            remedy: what to do otherwise; ends the message.
        """
        with self.collectives.during("agree()"):
            agree(self.collectives, facts, remedy)

    def check_replicas(self) -> None:
        """Compare every rank's copy of the parameters, by a hash of each bucket. Collective.

        One flipped bit in one copy is found, and the parameter and the rank that differs from most
        are named. Look before ``step()``: it fetches each shard from its owner anew, so it mends
        the others' copies, but gradients were taken at the wrong place; and an owner's error
        becomes everybody's. (``Guards(check_replicas_every=)`` looks then.) State is not compared:
        there is one copy of it; on a 2-D mesh what it does to the parameters is.

        Raises:
            AgreementError: copies differ; on every rank.

        Example:
            >>> optimizer.check_replicas()
        """
        shard = self._shard
        with self.collectives.during("check_replicas()"):
            with all_or_none(self.collectives):
                shard.buffers.take_back(shard.names)
            self._compare_replicas()

    def _compare_replicas(self) -> None:
        self._arrivals.wait()
        shard = self._shard
        agree_on_buckets(self.collectives, shard.buffers.buckets, shard.names, shard.parameters)

    def _compare_replicas_if_due(self) -> None:
        """Once ranks have agreed on the number of steps; before anything is updated."""
        every = self.guards.check_replicas_every
        if every and self._num_steps % every == 0:
            self._compare_replicas()

    def _check(self) -> Exception | None:
        """What this rank alone refuses before a step, for the agreement to tell the others."""
        if self._num_steps:
            return attempt(self._check_alone)
        self._check_first_step()
        return None

    def _check_alone(self) -> None:
        """Drop what was consolidated, which grows old; take parameters back; refuse gradients."""
        shard = self._shard
        self._snapshot.drop()
        shard.check_groups(self.param_groups)
        shard.buffers.take_back(shard.names)
        gradients = self._gradients
        refuse_gradients(shard, made_dense=gradients.reduces)
        may_miss = not gradients.reduces or self.guards.find_unused_parameters
        refuse_abandoned(shard, gradients.reduced(), warns=may_miss)

    def _check_first_step(self) -> None:
        """Also compare gradients: the first chance to see that nobody reduces them."""
        if self._means_all_ranks:
            validation.refuse_late_ranks(self.collectives)
        with all_or_none(self.collectives):
            self._check_alone()
            if self._gradients.reduces:
                refuse_ddp(self.param_groups)
        if self.guards.replicas and not self._gradients.reduces:
            agree_on_gradients(self.collectives, self._shard.names, self._shard.parameters)
        if self.collectives.world_size > 1 and self.collectives.rank == 0:
            _log.info(
                "the optimizer state is sharded over %d ranks; to save it, call consolidate_state_"
                "dict(to=0) on every rank, then state_dict() on rank 0",
                self.collectives.world_size,
            )

"""Halves of reductions on a mesh take turns; on an accelerator only when they are waited for."""

from torch import zeros

from shardopt.comm.mesh import MeshCollectives
from shardopt.comm.solo import SoloCollectives


class Recorded:
    """A communication that has ended, and knows on whose stream it has been waited for."""

    rows = None

    def __init__(self, streams):
        self._streams, self.waits = streams, set()

    def is_done(self):
        return True

    is_completed = is_done

    def wait(self):
        self.waits.add(self._streams[-1])


class RecordedCollectives(SoloCollectives):
    def __init__(self, streams):
        self.started = []
        self._streams = streams

    def reduce_scatter(self, bucket, borders, out):
        self.started.append(Recorded(self._streams))
        return self.started[-1]

    def all_gather(self, bucket, borders):
        return self.reduce_scatter(bucket, borders, bucket)


def test_rows_of_one_rank_stand_in_the_line_of_their_column():
    column = SoloCollectives()
    one, other = (MeshCollectives(SoloCollectives(), column) for _ in range(2))
    assert one.channel is other.channel


def test_on_an_accelerator_nothing_starts_before_it_is_waited_for():
    """There, communications of several groups start in one order on every rank, too."""
    streams = ["the stream"]
    row, column, means = (RecordedCollectives(streams) for _ in range(3))
    mesh = MeshCollectives(row, column, means)
    for device, started in (("meta", 0), ("cpu", 2)):
        mean = mesh.reduce_scatter(zeros(4), [0, 4], zeros(4, device=device))
        assert mean.is_done() and len(means.started) == started
        mean.wait()
        means.started.clear()
    assert not column.started

"""Who waits for a gather that has failed."""

from types import SimpleNamespace

import pytest

from shardopt.arrivals import Arrivals
from shardopt.comm import SoloCollectives


class Lost:
    """A gather from a rank that is gone."""

    num_waits = 0

    def wait(self):
        self.num_waits += 1
        raise RuntimeError("Connection closed by peer")


def test_what_ends_after_an_error_does_not_wait_once_more():
    """Which would take as long as the time limit; whoever uses a parameter hears of it."""
    gathers = {number: Lost() for number in range(3)}
    arrivals = Arrivals(SimpleNamespace(collectives=SoloCollectives()))
    with pytest.raises(RuntimeError, match="closed by peer"):
        arrivals.expect(gathers)
    with pytest.raises(RuntimeError, match="closed by peer"):
        arrivals.wait()
    arrivals.__del__()
    assert [gather.num_waits for gather in gathers.values()] == [1, 1, 0]

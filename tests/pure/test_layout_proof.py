"""The layout drawn by hand, and broken by hand: it is refused where it is made."""

import dataclasses

import pytest
import torch

from shardopt.layout import Atom, Bucket, Layout, Slot, plan, plan_layout, values
from tests.pure.test_layout import spec


def test_the_drawing(monkeypatch):
    """The example of the docstring, drawn without alignment as it is there."""
    for module in (plan, values):
        monkeypatch.setattr(module, "SLOT_ALIGNMENT", 1)
        monkeypatch.setattr(module, "SHARD_ALIGNMENT", 1)
    shapes = {"A": (5, 3), "B": (6,), "C": (2, 2), "D": ()}
    layout = plan_layout(
        [spec(shape, name=name) for name, shape in shapes.items()],
        Atom.ELEMENT,
        world_size=3,
        bucket_bytes=1 << 20,
    )
    assert str(layout).splitlines() == [
        "bucket 0: 27 x torch.float32, device 0, cut at elements",
        "  rank 0 [0, 9)  D, C, B[0:4]",
        "  rank 1 [9, 18)  B[4:6], A[0:7]",
        "  rank 2 [18, 27)  A[7:15]",
    ]


TWO = (spec((100,)), spec((1100,)))
SLOTS = (Slot(0, 0, 100), Slot(1, 128, 1100))


def bucket(slots=SLOTS, borders=(0, 1024, 2048), atom=Atom.ELEMENT, dtype=torch.float32) -> Bucket:
    return Bucket(dtype, 0, atom, slots, borders)


def test_the_layout_that_is_broken_below_is_sound():
    assert Layout(TWO, 2, (bucket(),)).numel(0) == 100 + 1024 - 128


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        ([bucket(SLOTS[:1])], "has no slot"),
        ([bucket(), bucket(SLOTS[1:])], "has two slots"),
        ([bucket((Slot(0, 0, 100), Slot(1, 64, 1100)))], "slots overlap"),
        ([bucket((Slot(0, 0, 100), Slot(1, 130, 1100)))], "slot is not aligned"),
        ([bucket((Slot(0, 0, 99), SLOTS[1]))], "does not fit its parameter"),
        ([bucket(dtype=torch.float64)], "does not fit its parameter"),
        ([bucket(borders=(0, 1024, 2048, 3072))], "not world_size"),
        ([bucket(borders=(1024, 1024, 2048))], "not world_size"),
        ([bucket(borders=(0, 1000, 2000))], "shard is not aligned"),
        ([bucket(borders=(0, 1024, 3072))], "shards are not even"),
        ([bucket(borders=(0, 1024, 1023), atom=Atom.ROW)], "run backwards"),
        ([bucket(borders=(0, 0, 1024), atom=Atom.TENSOR)], "out of bounds"),
        ([bucket(atom=Atom.TENSOR)], "cuts a whole parameter"),
    ],
)
def test_a_broken_layout_is_refused(buckets, message):
    with pytest.raises(AssertionError, match=message):
        Layout(TWO, 2, tuple(buckets))


def test_a_cut_row_is_refused():
    rows = dataclasses.replace(TWO[1], shape=(11, 100))
    Layout((TWO[0], rows), 2, (bucket(borders=(0, 128 + 400, 1228), atom=Atom.ROW),))
    with pytest.raises(AssertionError, match="cuts a row"):
        Layout((TWO[0], rows), 2, (bucket(borders=(0, 128 + 450, 1228), atom=Atom.ROW),))

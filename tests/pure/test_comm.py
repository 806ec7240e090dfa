"""Communication as far as it needs no ranks: the null object, messages, and the choice."""

import collections
import subprocess
import sys

import pytest
import torch
from torch import nn

from shardopt import ShardedOptimizer
from shardopt.comm import SoloCollectives, choose_collectives
from shardopt.comm.collectives import Done, Together, broadcast_text, gather_texts
from shardopt.comm.transfer import PACKED_BYTES, receive_tensors, send_tensors


class Loopback(SoloCollectives):
    """What it sends it receives, in order, when it is waited for."""

    def __init__(self):
        self.under_way = collections.deque()
        self.num_messages = 0

    def send(self, tensor, to):
        assert tensor.is_contiguous() and tensor.device == self.wire_device
        self.under_way.append(tensor)
        self.num_messages += 1
        return Done()

    def receive(self, tensor, source):
        return Arrival(self, tensor)


class Arrival:
    def __init__(self, loopback, tensor):
        self.loopback, self.tensor = loopback, tensor

    def wait(self):
        self.tensor.copy_(self.loopback.under_way.popleft())


# -- a world of one --------------------------------------------------------------------------------


def test_solo_is_rank_0_of_1():
    solo = SoloCollectives()
    assert (solo.rank, solo.world_size) == (0, 1)


def test_solo_moves_nothing():
    solo, bucket = SoloCollectives(), torch.arange(4.0)
    solo.all_gather(bucket, [0, 4]).wait()
    solo.broadcast(bucket, 0).wait()
    assert bucket.tolist() == [0, 1, 2, 3]
    assert solo.all_gather_rows(torch.tensor([7, 8])).tolist() == [[7, 8]]


def test_solo_has_nobody_to_talk_to():
    with pytest.raises(AssertionError):
        SoloCollectives().send(torch.ones(1), 1)
    with pytest.raises(AssertionError):
        SoloCollectives().receive(torch.ones(1), 1)


def test_a_fresh_bucket_is_zero():
    """Or the padding could hold a NaN."""
    bucket = SoloCollectives().allocate(100, torch.bfloat16, torch.device("cpu"))
    assert (bucket.shape, bucket.dtype, bucket.any().item()) == ((100,), torch.bfloat16, False)


# -- messages --------------------------------------------------------------------------------------


def test_together_waits_for_each_in_order():
    order = []

    class Noted:
        def __init__(self, number):
            self.number = number

        def wait(self):
            order.append(self.number)

    Together([Noted(number) for number in range(3)]).wait()
    assert order == [0, 1, 2]


@pytest.mark.parametrize("text", [b"", b"a", "naïve\n\0".encode(), bytes(range(256)) * 300])
def test_texts_of_any_length_arrive(text):
    assert gather_texts(SoloCollectives(), text) == [text]
    assert broadcast_text(SoloCollectives(), text, 0) == text


def test_lists_of_tensors_arrive():
    large = PACKED_BYTES // 4
    shapes = [(), (3,), (0,), (large,), (2, 5), (large - 1,), (large, 2), (1,)]
    dtypes = [torch.float32, torch.int64, torch.bfloat16, torch.complex64, torch.bool]
    sent = [torch.randn(shape).to(dtype) for shape in shapes for dtype in dtypes]
    outs = [torch.zeros_like(tensor) for tensor in sent]
    loopback = Loopback()
    send_tensors(loopback, sent, 0).wait()
    receive_tensors(loopback, outs, 0).wait()
    assert all(map(torch.equal, sent, outs))
    assert not loopback.under_way


def test_small_tensors_share_a_message_of_their_dtype():
    loopback = Loopback()
    send_tensors(loopback, [torch.ones(10)] * 20 + [torch.ones(5, dtype=torch.int64)] * 3, 0)
    assert loopback.num_messages == 2


def test_a_large_tensor_travels_without_a_copy():
    loopback, large = Loopback(), torch.ones(PACKED_BYTES)
    send_tensors(loopback, [large, torch.ones(2)], 0)
    assert loopback.under_way[0].data_ptr() == large.data_ptr()


def test_nothing_is_sent_of_empty_tensors():
    loopback = Loopback()
    send_tensors(loopback, [torch.ones(0), torch.ones(3, 0)], 0).wait()
    receive_tensors(loopback, [torch.ones(0), torch.ones(3, 0)], 0).wait()
    assert loopback.num_messages == 0


def test_parameters_are_sent_without_their_graph():
    loopback = Loopback()
    send_tensors(loopback, [torch.ones(PACKED_BYTES, requires_grad=True)], 0)
    assert not loopback.under_way[0].requires_grad


# -- the choice ------------------------------------------------------------------------------------


def test_without_a_process_group_one_process_is_chosen():
    assert type(choose_collectives(None)) is SoloCollectives


def test_one_of_several_ranks_is_warned_that_it_works_alone(monkeypatch):
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.warns(UserWarning, match=r"rank 1 of 2 from MPICH.*got none.*bootstrap\(\)"):
        choose_collectives(None)


def test_collectives_of_the_users_own_are_taken():
    mine = Loopback()
    assert choose_collectives(mine) is mine


@pytest.mark.parametrize("wrong", ["nccl", 2, [0, 1], torch.device("cpu")], ids=repr)
def test_anything_else_is_refused(wrong):
    expected = f"None, a ProcessGroup, .* or a Collectives, got {type(wrong).__name__}"
    with pytest.raises(TypeError, match=f"process_group: expected {expected}"):
        ShardedOptimizer([nn.Parameter(torch.ones(2))], torch.optim.SGD, wrong)


WITHOUT_A_PROCESS_GROUP = """
import sys
import torch
from shardopt import ShardedOptimizer

def trained(make):
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 5000))
    optimizer = make([parameter])
    for _ in range(3):
        parameter.square().sum().backward()
        optimizer.step()
    return parameter, optimizer.state_dict()

ours, our_state = trained(lambda p: ShardedOptimizer(p, torch.optim.AdamW, kernel="torch"))
theirs, their_state = trained(torch.optim.AdamW)
assert not torch.distributed.is_initialized()
assert "mpi4py" not in sys.modules
assert torch.equal(ours, theirs)
assert str(our_state) == str(their_state)
print("trained")
"""


def test_one_process_trains_without_a_process_group():
    """In a process of its own, since others may have initialised one here."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_A_PROCESS_GROUP],
        capture_output=True,
        text=True,
    )
    assert done.stdout == "trained\n", done.stderr

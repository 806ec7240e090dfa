"""Which stream comes after which, on streams that only note it; ``test_gpu.py`` has real ones."""

from types import SimpleNamespace

import pytest
import torch

from shardopt.gradients.producers import Producers


class Stream(str):
    device = torch.device("cuda", 0)

    def __new__(cls, name, log):
        stream = super().__new__(cls, name)
        stream.log = log
        return stream

    def wait_stream(self, other):
        self.log.append(f"{self} waits for {other}")


@pytest.fixture
def log():
    return []


@pytest.fixture
def on(monkeypatch, log):
    def go_to(name):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(name, log))

    return go_to


def gradient(name, log, layout=torch.strided):
    def part(name):
        return SimpleNamespace(record_stream=lambda stream: log.append(f"{stream} reads {name}"))

    whole = part(name)
    whole.layout = layout
    whole._indices, whole._values = lambda: part("indices"), lambda: part("values")
    return whole


def test_each_bucket_waits_for_the_streams_of_its_own_gradients(on, log):
    """One that arrives before an earlier bucket starts on another stream is waited for, too."""
    producers, parameter = Producers(), SimpleNamespace(is_cuda=True, device=Stream.device)
    for name, index in [("a", 2), ("b", 0), ("c", 1)]:
        on(name)
        producers.note(index, parameter)
    producers.wait_for({0: gradient("0", log), 1: gradient("1", log)})  # on c
    on("d")
    producers.note(3, parameter)
    producers.wait_for({2: gradient("2", log, torch.sparse_coo), 3: gradient("3", log)})
    assert log == [
        *("c waits for b", "c reads 0"),
        *("d waits for a", "d reads indices", "d reads values"),
    ]


def test_gradients_on_a_cpu_have_no_stream(on, log):
    producers = Producers()
    producers.note(0, torch.zeros(()))
    producers.wait_for({0: gradient("0", log)})
    assert log == []

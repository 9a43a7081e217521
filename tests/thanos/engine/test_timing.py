"""On a GPU the time is that of the work in the stream of the tensors' device; stand-ins take the place of a GPU."""

from __future__ import annotations

import pytest
import torch

from thanos.engine.timing import StepTimer
from thanos.walk.clock import Clock


class Stream:
    """A stream whose work takes as long as a test says."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.now = device, 0.0


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        self.stream: Stream | None = None

    def record(self, stream: Stream) -> None:
        self.stream, self.at = stream, stream.now

    def elapsed_time(self, end: Event) -> float:
        assert self.stream is end.stream is not None
        return (end.at - self.at) * 1000


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> dict[torch.device, Stream]:
    made = {torch.device("cuda", index): Stream(torch.device("cuda", index)) for index in range(2)}
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: made[torch.device(device)])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: made[torch.device(device)])
    return made


def test_steps_are_timed_in_the_stream_of_their_device(streams: dict[torch.device, Stream]) -> None:
    device = torch.device("cuda", 1)  # while 0 is the current one
    timed = StepTimer(device)
    for seconds in (2.0, 3.0):
        with timed("solve"):
            streams[device].now += seconds
        streams[device].now += 1
    assert timed.seconds() == {"solve": 5.0}
    assert timed.seconds() == {"solve": 5.0}


def test_the_clock_of_a_walk_is_the_streams(streams: dict[torch.device, Stream]) -> None:
    device = torch.device("cuda", 1)
    clock = Clock(device)
    with clock("forward"):
        streams[device].now += 2
        with clock("hessian"):
            streams[device].now += 4
        streams[device].now += 8
    assert clock.stop() == {"forward": 10.0, "hessian": 4.0, "prune": 0.0, "other": 0.0, "total": 14.0}

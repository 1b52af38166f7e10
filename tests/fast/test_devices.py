"""A model on a GPU that is not the current one, as far as a CPU can tell: where kernels are launched and recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ia3.fast import capture
from ia3.fast.capture import GraphedCallable
from ia3.fast.ops.launch import launch
from ia3.fast.sessions import Watch

# With one real GPU, which stand-ins take the place of, PyTorch itself would look for the second.
pytestmark = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="a GPU is there, and no second one")
FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


class Stream:
    """Of the device that it was asked for, or else of the current one."""

    def __init__(self, device: Any = None) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device()) if device is None else torch.device(device)

    def wait_stream(self, other: Stream) -> None:
        assert other.device == self.device


class Event:
    made: ClassVar[list[Event]] = []

    def record(self, stream: Stream | None = None) -> None:
        self.device = (stream or Stream()).device
        self.made.append(self)


@pytest.fixture
def gpus(monkeypatch) -> Iterator[SimpleNamespace]:
    """Two GPUs that compute nothing, the first of them current; gives what was entered, and where was recorded."""
    seen = SimpleNamespace(current=0, entered=[], recorded=[])

    @contextmanager
    def device(to: Any) -> Iterator[None]:
        before, seen.current = seen.current, to if isinstance(to, int) else torch.device(to).index
        seen.entered.append(seen.current)
        yield
        seen.current = before

    @contextmanager
    def graph(_: Any, pool: Any, stream: Stream, **settings: Any) -> Iterator[None]:
        with device(stream.device):
            seen.recorded.append(stream.device)
            yield

    stand_ins: dict[str, Any] = {
        "current_device": lambda: seen.current,
        "current_stream": Stream,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: seen.recorded.append(seen.current)),
        "device": device,
        "empty_cache": lambda: None,
        "Event": Event,
        "get_rng_state": lambda device: device,
        "graph": graph,
        "graph_pool_handle": lambda: None,
        "mem_get_info": lambda device: (1 << 30, 1 << 30),
        "memory_allocated": lambda device: 0,
        "memory_reserved": lambda device: 0,
        "set_rng_state": lambda state, device: None,
        "Stream": Stream,
        "stream": lambda stream: nullcontext(),
        "synchronize": lambda: None,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    for cached in (capture._stream_for, capture._room_for_graphs):
        cached.cache_clear()
    with FakeTensorMode():
        yield seen
    for cached in (capture._stream_for, capture._room_for_graphs):
        cached.cache_clear()


@pytest.mark.parametrize(("device", "entered"), [(FIRST, []), (SECOND, [1])])
def test_a_kernel_is_launched_where_its_tensors_are(gpus, device, entered) -> None:
    at: list[int] = []
    kernel = SimpleNamespace(by_triton={(1,): lambda *_, **__: at.append(gpus.current)})
    launch(kernel, (1,), None, torch.empty(1, device=device))
    assert at == [device.index]
    assert gpus.entered == entered
    assert gpus.current == 0


@pytest.mark.parametrize("warms_up", [False, True])
def test_a_graph_is_recorded_and_replayed_where_the_model_is(gpus, monkeypatch, warms_up) -> None:
    at: list[int] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        at.append(gpus.current)
        return x

    monkeypatch.setattr(capture, "compile_kernels", lambda *_: None)
    monkeypatch.setattr(capture, "StaticInputs", lambda inputs, _: SimpleNamespace(tensors=inputs, fill=dict))
    computation = GraphedCallable(function, SECOND, warm_up=function if warms_up else None)
    for _ in range(3):
        computation(x=torch.ones(2))
    assert set(at) == {1}
    assert gpus.recorded == [SECOND, *[1] * (3 if warms_up else 2)]
    assert gpus.current == 0


def test_what_a_step_leaves_is_waited_for_where_it_is_computed(gpus) -> None:
    Event.made.clear()
    watch = Watch(SECOND)
    with torch.device("meta"):  # as the default device, of which the host sees nothing
        watch.sees(torch.ones(1, device=SECOND))
    ((copied, event),) = watch.pending
    assert (copied.device.type, Event.made) == ("cpu", [event])
    assert Event.made[0].device == SECOND

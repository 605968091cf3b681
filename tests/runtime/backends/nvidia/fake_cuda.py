"""A strict fake of cuda.bindings.runtime: the real names, signatures, types and statuses, on a
device made of host memory.

A test chooses for each stream whether its work runs immediately or only when something waits for
it. So a missing wait shows in the images. A capture records work, and a launch replays it at the
recorded addresses.
"""

from __future__ import annotations

import ctypes
import inspect
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from runtime import Bundle, Sampler

real: Any = pytest.importorskip("cuda.bindings.runtime")
E = real.cudaError_t


ILLEGAL: list[str] = []
"""Work that used memory after it was freed."""


class Op:
    """A piece of work on a stream."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.run, self.done = run, False


class Stream:
    def __init__(self, eager: bool) -> None:
        self.eager, self.queue, self.recording, self.invalid = eager, list[Op](), None, False
        self.thread = 0

    def until(self, op: Op | None) -> Any:
        """Run what is queued, up to `op`, or all of it; the status."""
        status = E.cudaSuccess
        while self.queue and not (op and op.done):
            first = self.queue.pop(0)
            try:
                first.run()
            except MemoryError as error:
                ILLEGAL.append(str(error))
                status = E.cudaErrorIllegalAddress
            first.done = True
        return status


class World:
    """One process's view of a machine: memory, streams, failures to come. eager: the numbers of the
    streams that run at once."""

    def __init__(
        self, driver: int = 13000, gpus: int = 1, capacity: int = 2**30, eager: tuple[int, ...] = ()
    ) -> None:
        self.driver, self.gpus, self.capacity, self.eager = driver, gpus, capacity, eager
        self.name, self.capability = b"Fake L4", (8, 9)
        self.device: dict[int, tuple[Any, int]] = {}
        self.host: dict[int, tuple[Any, int]] = {}
        self.handles: dict[int, Any] = {}
        self.made, self.streams_made = 0, 0
        self.calls: list[str] = []
        self.copies = Counter[str]()
        self.fail_at: int | None = None
        self.fail_named: dict[str, Any] = {}

    # --- failures

    def fails(self, name: str) -> Any:
        """Whether this call must fail; records that it was made."""
        self.calls.append(name)
        if self.fail_at == len(self.calls) - 1:
            return True
        return self.fail_named.get(name)

    # --- what is held

    @property
    def used(self) -> int:
        return sum(size for _, size in self.device.values())

    def held(self) -> Counter[str]:
        """Everything that was created and not released, by kind."""
        found = Counter(type(thing).__name__ for thing in self.handles.values())
        return found + Counter({"device memory": len(self.device), "pinned memory": len(self.host)})

    def view(self, address: int, size: int, where: str = "device") -> Any:
        """The bytes at an address. Raises MemoryError unless all of them are in allocated
        memory."""
        for base, (_, held) in (self.device if where == "device" else self.host).items():
            if base <= address and address + size <= base + held:
                return memoryview((ctypes.c_char * size).from_address(address)).cast("B")
        raise MemoryError(f"{size} bytes at {address:#x} are not {where} memory that is held")

    def add(self, kind: Any, thing: Any) -> Any:
        self.made += 1
        self.handles[self.made] = thing
        return kind(self.made)

    def get(self, handle: Any, kind: type) -> Any:
        thing = self.handles.get(int(handle))
        return thing if isinstance(thing, kind) else None

    def stream(self, handle: int) -> Stream | None:
        return self.get(handle, Stream)

    def enqueue(self, stream: Stream, run: Callable[[], None]) -> Op:
        op = Op(run)
        if stream.recording is not None:
            stream.recording.append(op)
        else:
            stream.queue.append(op)
            if stream.eager:
                stream.until(None)
        return op

    def capturing(self) -> Stream | None:
        return next(
            (s for s in self.handles.values() if isinstance(s, Stream) and s.recording is not None),
            None,
        )


class Event:
    def __init__(self, flags: int) -> None:
        self.flags, self.last = flags, None


class Graph:
    def __init__(self, ops: list[Op]) -> None:
        self.ops = ops


class Executable(Graph):
    pass


class Properties:
    """Some of cudaDeviceProp."""

    def __init__(self, world: World) -> None:
        for name in ("name", "major", "minor"):
            assert hasattr(real.cudaDeviceProp, name)
        self.name, (self.major, self.minor) = world.name, world.capability


class Cudart:
    """The module. It has only what is defined here; enums and constants are the real ones."""

    def __init__(self, world: World) -> None:
        self.world = world

    def __getattr__(self, name: str) -> Any:
        implementation = globals().get(name)
        found = getattr(real, name)  # AttributeError for a name that does not exist
        if implementation is None:
            assert not inspect.isroutine(found), f"the fake has no {name}"
            return found
        signature, world = inspect.signature(found), self.world

        def call(*arguments: Any) -> tuple[Any, ...]:
            signature.bind(*arguments)
            count = RETURNED[name]
            status = world.fails(name)
            if status:
                if name == "cudaStreamEndCapture":  # ends the capture, even if it fails
                    world.stream(arguments[0]).recording = None
                return (E.cudaErrorUnknown if status is True else status, *[None] * count)
            answer = implementation(world, *arguments)
            status, *values = answer if isinstance(answer, tuple) else (answer,)
            assert not values or len(values) == count
            return (status, *(values or [None] * count))

        call.__name__ = name
        return call


RETURNED = {
    "cudaGetDeviceCount": 1, "cudaGetDeviceProperties": 1, "cudaDriverGetVersion": 1, "cudaGetLastError": 0,
    "cudaGetErrorString": 1, "cudaMalloc": 1, "cudaFree": 0, "cudaMallocHost": 1, "cudaFreeHost": 0, "cudaMemGetInfo": 2,
    "cudaMemcpyAsync": 0, "cudaMemcpy2DAsync": 0, "cudaMemsetAsync": 0, "cudaStreamCreateWithFlags": 1, "cudaStreamDestroy": 0,
    "cudaStreamSynchronize": 0, "cudaStreamWaitEvent": 0, "cudaEventCreateWithFlags": 1, "cudaEventDestroy": 0,
    "cudaEventRecord": 0, "cudaEventSynchronize": 0, "cudaEventElapsedTime": 1, "cudaStreamBeginCapture": 0,
    "cudaStreamEndCapture": 1, "cudaGraphInstantiate": 1, "cudaGraphDestroy": 0, "cudaGraphLaunch": 0, "cudaGraphExecDestroy": 0,
}  # fmt: skip
"""How many values each call returns after its status. A test compares this with the real functions.
"""


def unsafe(world: World) -> bool:
    """Whether this call is refused because of a capture that is under way, which it breaks.

    In thread-local mode a capture forbids its own thread unsafe calls.
    """
    mine = [
        s
        for s in world.handles.values()
        if isinstance(s, Stream) and s.recording is not None and s.thread == threading.get_ident()
    ]
    for stream in mine:
        stream.invalid = True
    return bool(mine)


# Each of these takes the world and the real arguments, and returns a status, or a status and
# values.


def cudaDriverGetVersion(w: World) -> Any:
    return E.cudaSuccess, w.driver


def cudaGetDeviceCount(w: World) -> Any:
    if not w.driver:
        return E.cudaErrorInsufficientDriver
    return (E.cudaSuccess, w.gpus) if w.gpus else E.cudaErrorNoDevice


def cudaGetDeviceProperties(w: World, device: int) -> Any:
    return (E.cudaSuccess, Properties(w)) if device < w.gpus else E.cudaErrorInvalidDevice


def cudaGetLastError(w: World) -> Any:
    return E.cudaSuccess


def cudaGetErrorString(w: World, error: Any) -> Any:
    return real.cudaGetErrorString(error)


def cudaMalloc(w: World, size: int) -> Any:
    return _allocate(w, size, w.device)


def cudaMallocHost(w: World, size: int) -> Any:
    return _allocate(w, size, w.host)


def _allocate(w: World, size: int, where: dict[int, Any]) -> Any:
    if unsafe(w):
        return E.cudaErrorStreamCaptureUnsupported
    if where is w.device and w.used + size > w.capacity:
        return E.cudaErrorMemoryAllocation
    block = ctypes.create_string_buffer(
        b"\xff" * (size + 256), size + 256
    )  # NaN, and no label's number
    address = -(-ctypes.addressof(block) // 256) * 256
    where[address] = block, size
    return E.cudaSuccess, address


def cudaFree(w: World, address: int) -> Any:
    if unsafe(w):
        return E.cudaErrorStreamCaptureUnsupported
    return E.cudaSuccess if w.device.pop(int(address), None) else E.cudaErrorInvalidValue


def cudaFreeHost(w: World, address: int) -> Any:
    if unsafe(w):
        return E.cudaErrorStreamCaptureUnsupported
    return E.cudaSuccess if w.host.pop(int(address), None) else E.cudaErrorInvalidValue


def cudaMemGetInfo(w: World) -> Any:
    return E.cudaSuccess, w.capacity - w.used, w.capacity


PLACES = {
    real.cudaMemcpyKind.cudaMemcpyHostToDevice: ("device", "host"),
    real.cudaMemcpyKind.cudaMemcpyDeviceToHost: ("host", "device"),
    real.cudaMemcpyKind.cudaMemcpyDeviceToDevice: ("device", "device"),
}
"""The memory that a copy writes, and the memory that it reads."""


def cudaMemcpyAsync(w: World, to: int, source: int, count: int, kind: Any, handle: Any) -> Any:
    return cudaMemcpy2DAsync(w, to, count, source, count, count, 1, kind, handle)


def cudaMemcpy2DAsync(
    w: World,
    to: int,
    to_pitch: int,
    source: int,
    pitch: int,
    width: int,
    height: int,
    kind: Any,
    handle: Any,
) -> Any:
    there, here = PLACES[kind]
    w.copies[kind.name] += 1
    stream = w.stream(handle)
    if stream is None:
        return E.cudaErrorInvalidResourceHandle
    if width > min(to_pitch, pitch):
        return E.cudaErrorInvalidPitchValue
    lines = [(to + i * to_pitch, source + i * pitch) for i in range(height)]
    try:
        for a, b in lines:
            w.view(a, width, there)
            w.view(b, width, here)
    except MemoryError:
        return E.cudaErrorInvalidValue

    def run() -> None:
        for a, b in lines:
            w.view(a, width, there)[:] = w.view(b, width, here)

    w.enqueue(stream, run)
    return E.cudaSuccess


def cudaMemsetAsync(w: World, address: int, value: int, count: int, handle: Any) -> Any:
    stream = w.stream(handle)
    if stream is None:
        return E.cudaErrorInvalidResourceHandle

    def run() -> None:
        w.view(address, count)[:] = bytes([value]) * count

    w.enqueue(stream, run)
    return E.cudaSuccess


def cudaStreamCreateWithFlags(w: World, flags: int) -> Any:
    assert flags == real.cudaStreamNonBlocking
    w.streams_made += 1
    return E.cudaSuccess, w.add(real.cudaStream_t, Stream(w.streams_made - 1 in w.eager))


def cudaStreamDestroy(w: World, handle: Any) -> Any:
    return _remove(w, handle, Stream)


def _remove(w: World, handle: Any, kind: type) -> Any:
    if w.get(handle, kind) is None:
        return E.cudaErrorInvalidResourceHandle
    del w.handles[int(handle)]
    return E.cudaSuccess


def cudaStreamSynchronize(w: World, handle: Any) -> Any:
    stream = w.stream(handle)
    if stream is None:
        return E.cudaErrorInvalidResourceHandle
    if stream.recording is not None:
        stream.invalid = True
        return E.cudaErrorStreamCaptureUnsupported
    return stream.until(None)


def cudaEventCreateWithFlags(w: World, flags: int) -> Any:
    return E.cudaSuccess, w.add(real.cudaEvent_t, Event(flags))


def cudaEventDestroy(w: World, handle: Any) -> Any:
    return _remove(w, handle, Event)


def cudaEventRecord(w: World, handle: Any, on: Any) -> Any:
    event, stream = w.get(handle, Event), w.stream(on)
    if event is None or stream is None:
        return E.cudaErrorInvalidResourceHandle
    event.last = stream, w.enqueue(stream, lambda: None)
    return E.cudaSuccess


def cudaStreamWaitEvent(w: World, on: Any, handle: Any, flags: int) -> Any:
    event, stream = w.get(handle, Event), w.stream(on)
    if event is None or stream is None:
        return E.cudaErrorInvalidResourceHandle
    if event.last:
        other, op = event.last
        w.enqueue(stream, lambda: other.until(op))
    return E.cudaSuccess


def cudaEventSynchronize(w: World, handle: Any) -> Any:
    event = w.get(handle, Event)
    if event is None:
        return E.cudaErrorInvalidResourceHandle
    if event.last:
        other, op = event.last
        return other.until(op)
    return E.cudaSuccess


def cudaEventElapsedTime(w: World, start: Any, end: Any) -> Any:
    events = [w.get(handle, Event) for handle in (start, end)]
    if any(e is None or e.flags & real.cudaEventDisableTiming for e in events):
        return E.cudaErrorInvalidResourceHandle
    if not all(e.last and e.last[1].done for e in events):
        return E.cudaErrorNotReady
    return E.cudaSuccess, 1.5


def cudaStreamBeginCapture(w: World, handle: Any, mode: Any) -> Any:
    stream = w.stream(handle)
    if stream is None or stream.recording is not None:
        return E.cudaErrorInvalidResourceHandle
    assert mode == real.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    stream.recording, stream.invalid, stream.thread = [], False, threading.get_ident()
    return E.cudaSuccess


def cudaStreamEndCapture(w: World, handle: Any) -> Any:
    stream = w.stream(handle)
    if stream is None or stream.recording is None:
        return E.cudaErrorIllegalState
    ops, stream.recording = stream.recording, None
    if stream.invalid:
        return E.cudaErrorStreamCaptureInvalidated
    return E.cudaSuccess, w.add(real.cudaGraph_t, Graph(ops))


def cudaGraphInstantiate(w: World, graph: Any, flags: int) -> Any:
    found = w.get(graph, Graph)
    if found is None:
        return E.cudaErrorInvalidValue
    return E.cudaSuccess, w.add(real.cudaGraphExec_t, Executable(list(found.ops)))


def cudaGraphDestroy(w: World, graph: Any) -> Any:
    return _remove(w, graph, Graph)


def cudaGraphExecDestroy(w: World, graph: Any) -> Any:
    return _remove(w, graph, Executable)


def cudaGraphLaunch(w: World, graph: Any, on: Any) -> Any:
    found, stream = w.get(graph, Executable), w.stream(on)
    if found is None or stream is None:
        return E.cudaErrorInvalidResourceHandle

    def run() -> None:
        for op in found.ops:
            op.run()

    w.enqueue(stream, run)
    return E.cudaSuccess


# What a test does whose calls fail in turn, and which of them may.

FREES = {
    "cudaFree",
    "cudaFreeHost",
    "cudaStreamDestroy",
    "cudaEventDestroy",
    "cudaGraphDestroy",
    "cudaGraphExecDestroy",
}
"""What is lost if one fails."""
HARMLESS = {
    "cudaGetErrorString",
    "cudaStreamBeginCapture",
    "cudaStreamEndCapture",
    "cudaGraphInstantiate",
    "cudaGraphDestroy",
}
"""A message that cannot be read is no error of its own, and capture is optional."""


def use_once(bundle: Bundle, library: str) -> list[bytes]:
    """Load, run a loop with and without guidance, run a step from the host, and close."""
    with Sampler(bundle, library) as found:
        looped = found.sample(
            1, label=1, guidance=2.0, guidance_interval=(0.0, 0.5), solver="ddpm", steps=2
        )
        stepped = found.sample(1, label=1, steps=1, guidance=1.0, on_step=lambda p: None)
    return [looped.tobytes(), stepped.tobytes()]

"""Prefetching: a second thread loads components of the next job while the first thread runs the current one."""

import logging
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue

import torch

from pipelines.base import Component, Loader, UnusableWeights, Weights, family_module
from pipelines.residency.host_cache import HostMemoryExhausted
from pipelines.residency.loader_process import LoaderProcess, LoaderProcessError
from pipelines.residency.packed import PackedModule, ResidentCopy
from pipelines.residency.residency import DeviceObject, PendingComponent, PrefetchCancelled, Residency
from pipelines.residency.transfer import BackgroundTransfer

log = logging.getLogger("plantain.prefetch")

Make = Callable[[Component], PackedModule | DeviceObject]


@dataclass(frozen=True)
class PrefetchRequest:
    """What to load for a job, in order: keys of components for the device, and keys for host memory only."""

    job_id: str
    weights: Weights
    to_device: tuple[str, ...]
    to_host: tuple[str, ...] = ()


@dataclass
class Prefetcher:
    """Runs prefetch requests on a thread of its own, one at a time. Its errors do not affect the running job.

    `on_event` is called on that thread, with the job's id: with None after each component, and at the end of a request
    with the reason why it was incomplete, or an empty string.
    """

    residency: Residency
    on_event: Callable[[str, str | None], None]
    loader_process: LoaderProcess = field(default_factory=LoaderProcess)
    _requests: "SimpleQueue[PrefetchRequest | None]" = field(default_factory=SimpleQueue)
    _latest: PrefetchRequest | None = None
    _thread: threading.Thread | None = None

    def submit(self, request: PrefetchRequest) -> None:
        """Replaces the previous request, apart from the component that it is loading now."""
        self._latest = request
        self._requests.put(request)
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="prefetch", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Cancels all prefetches and ends the thread and the loader process."""
        self._latest = None
        if self._thread:
            self._requests.put(None)
            self.residency.cancel_prefetches()
            self._thread.join()
        self.loader_process.kill()

    def _serve(self) -> None:
        while request := self._requests.get():
            self.on_event(request.job_id, self._run(request))

    def _run(self, request: PrefetchRequest) -> str:
        """Returns why the request is incomplete, for the operator; an empty string if everything was loaded."""
        try:
            loader = family_module(request.weights.family).loader(request.weights, self.residency.device)
            for key in (*request.to_device, *request.to_host):
                if request is not self._latest:
                    return "replaced by a request for another job"
                to_device = key in request.to_device
                component = next(each for each in request.weights.components if each.key == key)
                if component.storage and loader.needs_subprocess:
                    continue  # quantised layers are not torch's own classes: the loader process cannot transfer them
                if to_device or loader.returns_module:
                    self._prefetch(request.weights, component, loader, to_device)
                    self.on_event(request.job_id, None)
        except PrefetchCancelled:
            return "cancelled: its memory was needed"
        except (UnusableWeights, LoaderProcessError, HostMemoryExhausted, torch.OutOfMemoryError) as error:
            log.warning("for job %s: %s", request.job_id, error)
            return str(error)
        except Exception as error:
            log.exception("for job %s", request.job_id)
            return repr(error)
        return ""

    def _prefetch(self, weights: Weights, component: Component, loader: Loader, to_device: bool) -> None:
        stop = self.loader_process.kill if loader.needs_subprocess else lambda: None
        prefetch_component(self.residency, component, lambda part: self._load(weights, part, loader), to_device, stop)

    def _load(self, weights: Weights, component: Component, loader: Loader) -> PackedModule | DeviceObject:
        if loader.needs_subprocess:
            return self.loader_process.load(weights, component, self.residency.device)
        with self.residency.pause_metering(), self.residency.loading:
            loaded = loader.load(component)
        return PackedModule.of(loaded) if loader.returns_module else DeviceObject(loaded, component.weights_bytes)


def prefetch_component(
    residency: Residency,
    component: Component,
    make: Make,
    to_device: bool = True,
    stop: Callable[[], None] = lambda: None,
) -> None:
    """Loads a component to the device, or into host memory only. `make` runs if the host has no copy.

    `stop` aborts `make`. Raises whatever `make` raises, HostMemoryExhausted, and PrefetchCancelled; then nothing is
    left of it, except a copy in host memory that was complete.
    """
    pending = residency.reserve(component, to_device, stop)
    if pending is None:
        return
    try:
        with torch.no_grad():
            _ComponentPrefetch(residency, pending).run(make)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # their local variables refer to the buffers
        residency.abandon(component.key)
        raise


class _ComponentPrefetch:
    """One prefetch, with cancellation points between its steps."""

    def __init__(self, residency: Residency, pending: PendingComponent) -> None:
        self._residency, self._pending, self._component = residency, pending, pending.component

    def run(self, make: Make) -> None:
        packed = self._pending.host_copy or self._load(make)
        if packed:
            self._copy(packed)

    def _load(self, make: Make) -> PackedModule | None:
        """Returns the module in host memory, if it is to be copied to the device."""
        made = self._pending.load(lambda: make(self._component))
        if isinstance(made, PackedModule) and self._residency.copies_to_device:
            made.page_lock(self._residency.device)
        return self._residency.publish(self._component, made)

    def _copy(self, packed: PackedModule) -> None:
        """Copies the weights from host memory to the device, block by block."""
        buffer = self._residency.allocate(self._component.key, packed.weights_bytes)
        transfer = BackgroundTransfer(self._residency.device, self._pending.check)
        self._residency.publish_copy(self._component.key, packed, ResidentCopy(packed, transfer, buffer))

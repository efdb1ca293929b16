"""The worker's second thread: it brings components of the next job while the first thread runs the current one."""
# FROM pipelines.fetching: One component that a later run needs, brought by another thread while a run is under way.

import logging
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch

from pipelines.base import Component, Loader, UnusableWeights, Weights, family_module
from pipelines.residency.host_cache import HostMemoryExhausted
from pipelines.residency.loader_process import LoaderProcess, LoaderProcessError
from pipelines.residency.packed import PackedModule, ResidentCopy
from pipelines.residency.residency import Books, DeviceObject, PendingComponent, PrefetchCancelled, Residency
from pipelines.residency.transfer import BackgroundTransfer

log = logging.getLogger("plantain.prefetch")

Make = Callable[[Component], PackedModule | DeviceObject]


def prefetch_component(books: Books, component: Component, make: Make, coming: PendingComponent) -> None:
    """Bring a component to the device, or (`coming.to_device` is False) into host memory only.

    `make` runs if the host has no copy. Raises whatever it raises, HostRamShort, and CalledOff: then nothing came.
    """
    key = component.key
    with books.lock:
        if key in books.on_device or (key in books.host.copies and not coming.to_device):
            return
        packed = books.host.find(key)
        if packed is None and books.copies_to_device:
            books.host.make_room(component.weights_bytes, {*books.on_device, *books.run_keys})
            books.host.reserved[key] = component.weights_bytes
        books.pending[key] = coming
    try:
        with torch.no_grad():
            _ComponentPrefetch(books, component, coming).run(packed, make)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they keep what was on its way
        raise
    finally:
        with books.lock:
            if coming.device_bytes and key not in books.on_device:
                books._move_unmeasured(lambda: coming.reserve(0))
                if torch.cuda.is_initialized():
                    torch.cuda.empty_cache()
            books.host.reserved.pop(key, None)
            del books.pending[key]
            books.lock.notify_all()


class _ComponentPrefetch:
    """One component on its way. May be called off between any two steps."""

    def __init__(self, books: Books, component: Component, coming: PendingComponent) -> None:
        self._books, self._component, self._coming = books, component, coming

    def run(self, packed: PackedModule | None, make: Make) -> None:
        """`packed` is the host's copy, if there is one."""
        if packed is None:
            made = self._make(make)
            if isinstance(made, DeviceObject) or not self._books.copies_to_device:
                return
            packed = made
        if self._coming.to_device:
            self._copy(packed)

    def _make(self, make: Make) -> PackedModule | DeviceObject:
        """Load it; then it is in the host's memory, or, where the host keeps no copy of it, on the device."""
        books = self._books
        made = self._loaded(lambda: make(self._component))
        if isinstance(made, PackedModule) and books.copies_to_device:
            made.page_lock(books.device)
        with books.lock:
            if self._coming.cancelled:
                if isinstance(made, PackedModule):
                    made.free_host()
                raise PrefetchCancelled
            books._record(self._component)
            if isinstance(made, PackedModule) and books.copies_to_device:
                books._move_unmeasured(lambda: books.host.keep(self._component.key, made))
            else:
                books._move_unmeasured(lambda: self._arrived(made), made)
        return made

    def _loaded(self, make: Callable[[], Any]) -> Any:
        with self._books.lock:
            self._check()
            self._coming.loading = True
        try:
            return make()
        except Exception:
            self._check()  # it was stopped
            raise
        finally:
            self._coming.loading = False

    def _copy(self, packed: PackedModule) -> None:
        """From the host's memory to the device, block by block."""
        books, coming = self._books, self._coming
        with books.lock:
            self._check()
            buffer = torch.empty_like(packed.host, device=books.device)
            books._move_unmeasured(lambda: coming.reserve(buffer.nbytes))
        device_copy = ResidentCopy(packed, BackgroundTransfer(books.device, self._check), buffer)
        with books.lock:
            packed.attach(device_copy)
            if coming.cancelled:
                packed.free_device()
                raise PrefetchCancelled
            coming.reserve(0)
            self._arrived(packed)

    def _arrived(self, made: PackedModule | DeviceObject) -> None:
        # No run has used it yet: the first to go.
        self._books.on_device = {self._component.key: made, **self._books.on_device}

    def _check(self) -> None:
        with self._books.lock:
            if self._coming.cancelled:
                raise PrefetchCancelled


@contextmanager
def load_in_background(books: Books) -> Iterator[None]:
    """Another thread loads in this process. Not while the run does: some loaders change torch for all threads.

    A CPU's run is not measured meanwhile: it cannot tell what it takes itself.
    """
    measure(books, False)
    try:
        with books.loading:
            yield
    finally:
        measure(books, True)


def measure(books: Books, on: bool) -> None:
    if books.device.type == "cpu":
        with books.lock:
            books.meter.record()
            books.meter.paused = not on
            books.meter.restart(give_back=False)


@dataclass(frozen=True)
class PrefetchRequest:
    """What to bring for a job, in order: keys for the device, and keys for the host's memory only."""

    job_id: str
    weights: Weights
    to_device: tuple[str, ...]
    to_host: tuple[str, ...] = ()


@dataclass
class Prefetcher:
    """`on_event` is called on this thread: with the job's id and nothing after each component; at an request's end with the
    job's id and what went wrong, or an empty text. Nothing that goes wrong here is of any concern to the running job.
    """

    residency: Residency
    on_event: Callable[[str, str | None], None]
    loader_process: LoaderProcess = field(default_factory=LoaderProcess)
    _requests: "SimpleQueue[PrefetchRequest | None]" = field(default_factory=SimpleQueue)
    _latest: PrefetchRequest | None = None
    _thread: threading.Thread | None = None

    def submit(self, request: PrefetchRequest) -> None:
        """Instead of what an request before this one has not begun to bring."""
        self._latest = request
        self._requests.put(request)
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="prefetch", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread, and what it brings."""
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
        """What went wrong, for the operator; an empty text where all came."""
        try:
            loader = family_module(request.weights.family).loader(request.weights, self.residency.device)
            for key in (*request.to_device, *request.to_host):
                if request is not self._latest:
                    return "another job comes first now"
                to_device = key in request.to_device
                component = next(each for each in request.weights.components if each.key == key)
                if component.storage and loader.needs_subprocess:
                    continue  # its layers are not torch's own, and cannot be handed over by another process
                if to_device or loader.returns_module:
                    self._fetch(request.weights, component, loader, to_device)
                    self.on_event(request.job_id, None)
        except PrefetchCancelled:
            return "its place was needed"
        except (UnusableWeights, LoaderProcessError, HostMemoryExhausted, torch.OutOfMemoryError) as error:
            log.warning("for job %s: %s", request.job_id, error)
            return str(error)
        except Exception as error:
            log.exception("for job %s", request.job_id)
            return repr(error)
        return ""

    def _fetch(self, weights: Weights, component: Component, loader: Loader, to_device: bool) -> None:
        coming = PendingComponent(
            component.weights_bytes, to_device, self.loader_process.kill if loader.needs_subprocess else lambda: None
        )
        prefetch_component(self.residency, component, lambda part: self._made(weights, part, loader), coming)

    def _made(self, weights: Weights, component: Component, loader: Loader) -> PackedModule | DeviceObject:
        if loader.needs_subprocess:
            return self.loader_process.load(weights, component, self.residency.device)
        with load_in_background(self.residency):
            loaded = loader.load(component)
        return PackedModule.of(loaded) if loader.returns_module else DeviceObject(loaded, component.weights_bytes)

"""One component that a later run needs, brought by another thread while a run is under way."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pipelines.base import Component
from pipelines.books import Books, Opaque
from pipelines.coming import CalledOff, Coming
from pipelines.link import SideLink
from pipelines.packing import PackedModule, Whole

Make = Callable[[Component], PackedModule | Opaque]


def fetch(books: Books, component: Component, make: Make, coming: Coming) -> None:
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
            books.host.promised[key] = component.weights_bytes
        books.coming[key] = coming
    try:
        with torch.no_grad():
            Fetch(books, component, coming).run(packed, make)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they keep what was on its way
        raise
    finally:
        with books.lock:
            if coming.device_bytes and key not in books.on_device:
                books.moved(lambda: coming.take(0))
                if torch.cuda.is_initialized():
                    torch.cuda.empty_cache()
            books.host.promised.pop(key, None)
            del books.coming[key]
            books.lock.notify_all()


class Fetch:
    """One component on its way. May be called off between any two steps."""

    def __init__(self, books: Books, component: Component, coming: Coming) -> None:
        self._books, self._component, self._coming = books, component, coming

    def run(self, packed: PackedModule | None, make: Make) -> None:
        """`packed` is the host's copy, if there is one."""
        if packed is None:
            made = self._make(make)
            if isinstance(made, Opaque) or not self._books.copies_to_device:
                return
            packed = made
        if self._coming.to_device:
            self._copy(packed)

    def _make(self, make: Make) -> PackedModule | Opaque:
        """Load it; then it is in the host's memory, or, where the host keeps no copy of it, on the device."""
        books = self._books
        made = self._loaded(lambda: make(self._component))
        if isinstance(made, PackedModule) and books.copies_to_device:
            made.page_lock(books.device)
        with books.lock:
            if self._coming.off:
                if isinstance(made, PackedModule):
                    made.leave_host()
                raise CalledOff
            books.note(self._component)
            if isinstance(made, PackedModule) and books.copies_to_device:
                books.moved(lambda: books.host.keep(self._component.key, made))
            else:
                books.moved(lambda: self._arrived(made), made)
        return made

    def _loaded(self, make: Callable[[], Any]) -> Any:
        with self._books.lock:
            self._check()
            self._coming.loads = True
        try:
            return make()
        except Exception:
            self._check()  # it was stopped
            raise
        finally:
            self._coming.loads = False

    def _copy(self, packed: PackedModule) -> None:
        """From the host's memory to the device, block by block."""
        books, coming = self._books, self._coming
        with books.lock:
            self._check()
            buffer = torch.empty_like(packed.host, device=books.device)
            books.moved(lambda: coming.take(buffer.nbytes))
        lodging = Whole(packed, SideLink(books.device, self._check), buffer)
        with books.lock:
            packed.lodge(lodging)
            if coming.off:
                packed.leave_device()
                raise CalledOff
            coming.take(0)
            self._arrived(packed)

    def _arrived(self, made: PackedModule | Opaque) -> None:
        # No run has used it yet: the first to go.
        self._books.on_device = {self._component.key: made, **self._books.on_device}

    def _check(self) -> None:
        with self._books.lock:
            if self._coming.off:
                raise CalledOff


@contextmanager
def loading_beside(books: Books) -> Iterator[None]:
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
            books.meter.lap()
            books.meter.blind = not on
            books.meter.restart(give_back=False)

"""The worker's second thread: it brings components of the next job while the first thread runs the current one."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue

import torch

from pipelines.apart import Apart, NotLoaded
from pipelines.base import Component, Loader, UnusableWeights, Weights
from pipelines.books import Opaque
from pipelines.coming import CalledOff, Coming
from pipelines.families import family_module
from pipelines.fetching import fetch, loading_beside
from pipelines.hostram import HostRamShort
from pipelines.packing import PackedModule
from pipelines.residency import Residency

log = logging.getLogger("plantain.prefetch")


@dataclass(frozen=True)
class Errand:
    """What to bring for a job, in order: keys for the device, and keys for the host's memory only."""

    job_id: str
    weights: Weights
    to_device: tuple[str, ...]
    to_host: tuple[str, ...] = ()


@dataclass
class Prefetcher:
    """`tell` is called on this thread: with the job's id and nothing after each component; at an errand's end with the
    job's id and what went wrong, or an empty text. Nothing that goes wrong here is of any concern to the running job.
    """

    residency: Residency
    tell: Callable[[str, str | None], None]
    apart: Apart = field(default_factory=Apart)
    _errands: "SimpleQueue[Errand | None]" = field(default_factory=SimpleQueue)
    _latest: Errand | None = None
    _thread: threading.Thread | None = None

    def bring(self, errand: Errand) -> None:
        """Instead of what an errand before this one has not begun to bring."""
        self._latest = errand
        self._errands.put(errand)
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="prefetch", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread, and what it brings."""
        self._latest = None
        if self._thread:
            self._errands.put(None)
            self.residency.call_off_all()
            self._thread.join()
        self.apart.kill()

    def _serve(self) -> None:
        while errand := self._errands.get():
            self.tell(errand.job_id, self._run(errand))

    def _run(self, errand: Errand) -> str:
        """What went wrong, for the operator; an empty text where all came."""
        try:
            loader = family_module(errand.weights.family).loader(errand.weights, self.residency.device)
            for key in (*errand.to_device, *errand.to_host):
                if errand is not self._latest:
                    return "another job comes first now"
                to_device = key in errand.to_device
                component = next(each for each in errand.weights.components if each.key == key)
                if component.storage and loader.apart:
                    continue  # its layers are not torch's own, and cannot be handed over by another process
                if to_device or loader.packs:
                    self._fetch(errand.weights, component, loader, to_device)
                    self.tell(errand.job_id, None)
        except CalledOff:
            return "its place was needed"
        except (UnusableWeights, NotLoaded, HostRamShort, torch.OutOfMemoryError) as error:
            log.warning("for job %s: %s", errand.job_id, error)
            return str(error)
        except Exception as error:
            log.exception("for job %s", errand.job_id)
            return repr(error)
        return ""

    def _fetch(self, weights: Weights, component: Component, loader: Loader, to_device: bool) -> None:
        coming = Coming(component.weights_bytes, to_device, self.apart.kill if loader.apart else lambda: None)
        fetch(self.residency, component, lambda part: self._made(weights, part, loader), coming)

    def _made(self, weights: Weights, component: Component, loader: Loader) -> PackedModule | Opaque:
        if loader.apart:
            return self.apart.load(weights, component, self.residency.device)
        with loading_beside(self.residency):
            loaded = loader.load(component)
        return PackedModule.of(loaded) if loader.packs else Opaque(loaded, component.weights_bytes)

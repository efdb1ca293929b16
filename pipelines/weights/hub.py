"""Weights from a hub repository, by huggingface_hub. `HF_ENDPOINT` names a mirror, `HF_TOKEN` says who asks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.catalog.catalog import Model, Source
from pipelines.weights.errors import Gated, NotFound, Offline, Unreachable
from pipelines.weights.files import File, Listing, OnBytes, choose

ENDPOINT = "https://huggingface.co"
MAIN = "main"


class Hub:
    """Transfers go through huggingface_hub's own `http_get`, since `hf_hub_download` begins a broken file anew."""

    def __init__(self, model: Model, source: Source) -> None:
        self.model, self.source = model, source
        self.endpoint = os.environ.get("HF_ENDPOINT", ENDPOINT).rstrip("/")  # the library reads it at import only
        self.commit = source.revision or MAIN

    @property
    def page(self) -> str:
        return f"{self.endpoint}/{self.source.repo}"

    def listing(self) -> Listing:
        from huggingface_hub import HfApi

        with self.explained():
            info = HfApi(self.endpoint).model_info(self.source.repo, revision=self.commit, files_metadata=True)
        self.commit = info.sha or self.commit
        siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
        names = choose(siblings, self.source.repo, self.source.files, self.source.skip)
        return Listing(tuple(as_file(siblings[name]) for name in names), self.commit)

    def fetch(self, file: File, part: Path, on_bytes: OnBytes) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(self.source.repo, file.name, revision=self.commit, endpoint=self.endpoint)
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}  # or a range would count compressed bytes
        with self.explained(), part.open("ab") as out:
            http_get(
                url,
                out,
                resume_size=out.tell(),
                headers=headers,
                expected_size=file.size_bytes,
                tqdm_class=reporting_bar(on_bytes),
            )

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Says in our words what huggingface_hub raises."""
        import httpx2
        from huggingface_hub import errors

        repo = self.source.repo
        try:
            yield
        except errors.GatedRepoError as error:
            raise self.gated() from error
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError) as error:
            if self.model.gated:
                raise self.gated() from error
            raise NotFound(
                f"{self.page} was not found. If it is private, set HF_TOKEN to a token that may read it."
            ) from error
        except errors.OfflineModeIsEnabled as error:
            raise Offline(f"{repo} cannot be fetched while HF_HUB_OFFLINE is set.") from error
        except errors.HfHubHTTPError as error:
            if error.response.status_code in (401, 403):
                raise self.gated() from error
            raise Unreachable(f"{self.page} answered {error.response.status_code}. Pull again later.") from error
        except httpx2.TransportError as error:
            raise self.broken(error) from error
        except OSError as error:
            if error.errno is not None:  # the disk's, not the network's
                raise
            raise self.broken(error) from error

    def gated(self) -> Gated:
        return Gated(
            f"{self.source.repo} is gated. Sign in at {self.page}, accept its terms, make a token that may read it at "
            f"{self.endpoint}/settings/tokens, set HF_TOKEN to it, and pull again."
        )

    def broken(self, error: Exception) -> Unreachable:
        return Unreachable(
            f"{self.page} did not answer, or broke off ({error}). Pull again: it goes on from where it stopped. "
            "A mirror can be named in HF_ENDPOINT; without a network, use plantain import."
        )


def as_file(sibling: Any) -> File:
    return File(sibling.rfilename, sibling.size, sibling.lfs.sha256 if sibling.lfs else "")


def reporting_bar(on_bytes: OnBytes) -> Any:
    """A progress bar, as `http_get` wants one, that draws nothing and passes the bytes on."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *_args: Any, **_kwargs: Any) -> None:
            super().__init__(disable=True)

        def update(self, n: float | None = 1) -> None:
            on_bytes(int(n or 0))

    return Bar

"""Repositories of the Hugging Face Hub: hf://datasets/USER/NAME[@REVISION]/PATH, and hf://USER/NAME of models.

Whoever opens something there first asks which commit the revision stands for (`pinned`), and reads that commit: a push
in the meantime cannot mix two versions. What a commit holds never changes, so it is asked about once a process. Every
file has a checksum there: a SHA-256 where it is large, git's SHA-1 elsewhere.

Requests go through huggingface_hub: its login, proxies, certificates and HF_ENDPOINT.
"""

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from http import HTTPStatus
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, unquote

from saevlm_fast.errors import Interrupted, first_line
from saevlm_fast.remote.answers import MAY_RECOVER, TIMEOUT, Found, NotThere, Recoverable, RemoteError, check_range
from saevlm_fast.urls import redacted_text

T = TypeVar("T")
_PLACE = re.compile(
    r"hf://(?:(datasets|spaces|models)/)?(?!(?:datasets|spaces|models)/)([^/@]+/[^/@]+)"
    r"(?:@(refs/(?:convert/[\w.-]+|pr/\d+)|[^/]+))?(?:/(.*))?"
)
_COMMIT = re.compile("[0-9a-f]{40}")
_CONVERTED = "refs/convert/parquet"  # the Hub's own conversion of a data set, ~parquet for short


class Place(NamedTuple):
    """kind: dataset, model or space. revision: "" for the main branch. path: in the repository, "" for its root."""

    kind: str
    repo: str
    revision: str
    path: str

    def url(self, path: str) -> str:
        """Of a file there."""
        prefix = "" if self.kind == "model" else f"{self.kind}s/"
        at = f"@{quote(self.revision, safe='')}" if self.revision else ""
        return f"hf://{prefix}{self.repo}{at}/{path}".rstrip("/")


def is_hub(url: str) -> bool:
    """Whether it is of a repository there. Buckets are stores of objects, and fsspec's affair."""
    return url.startswith("hf://") and not url.startswith("hf://buckets/")


def place_of(url: str) -> Place:
    """NotThere: no user and name in it."""
    match = _PLACE.fullmatch(url)
    if match is None:
        raise NotThere(f"{url}: hf://USER/NAME/... or hf://datasets/USER/NAME/... is needed")
    kind, repo, revision, path = match.groups(default="")
    revision = _CONVERTED if revision == "~parquet" else unquote(revision)
    return Place(kind.removesuffix("s") or "model", repo, revision, path.strip("/"))


def pinned(urls: Iterable[str]) -> list[str]:
    """The URLs at the commits that their revisions stand for now. RemoteError: there is none."""
    commits: dict[Place, str] = {}
    found = []
    for url in urls:
        place = place_of(url)
        root = place._replace(path="")
        if root not in commits:
            commits[root] = place.revision if _COMMIT.fullmatch(place.revision) else _commit(url, place)
        found.append(place._replace(revision=commits[root]).url(place.path))
    return found


def without_revision(url: str) -> str:
    """The URL of the same file in whatever version."""
    place = place_of(url)
    return place._replace(revision="").url(place.path)


def hub_found(url: str) -> Found:
    """What is at a URL. RemoteError: nothing, or a folder."""
    place = place_of(pinned([url])[0])
    files = _files_of(place.kind, place.repo, place.revision)
    if place.path not in files:
        found = _of_hub(
            url, lambda: _api().get_paths_info(place.repo, [place.path], revision=place.revision, repo_type=place.kind)
        )
        _remember(files, found)
    if place.path not in files:
        folder = any(each.path == place.path for each in found)
        raise NotThere(f"{url}: {'a folder, where a file is needed' if folder else 'nothing is there'}")
    return files[place.path]


def hub_listed(url: str) -> list[str]:
    """All files below a folder, at one commit. RemoteError: there is no such folder."""
    place = place_of(pinned([url])[0])

    def listing() -> list[Any]:
        tree = _api().list_repo_tree(
            place.repo, place.path or None, recursive=True, revision=place.revision, repo_type=place.kind
        )
        return list(tree)

    found = _of_hub(url, listing)
    _remember(_files_of(place.kind, place.repo, place.revision), found)
    return sorted(place.url(each.path) for each in found if hasattr(each, "blob_id"))


def hub_range(url: str, start: int, stop: int, found: Found) -> bytes:
    """Bytes start .. stop - 1. RemoteError: they cannot be read; `Recoverable`: now."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    if start >= stop:
        return b""
    place = place_of(pinned([url])[0])
    address = hf_hub_url(place.repo, place.path, repo_type=place.kind, revision=place.revision)
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}

    def read() -> bytes:
        answer = get_session().get(address, headers=headers, timeout=TIMEOUT, follow_redirects=True)
        hf_raise_for_status(answer)
        whole = answer.status_code == HTTPStatus.OK and (start, stop) == (0, found.size)
        if not whole:
            check_range(url, answer.status_code, answer.headers.get("Content-Range") or "", start)
        return bytes(answer.content)

    data = _of_hub(url, read)
    if len(data) != stop - start:
        raise Recoverable(f"{len(data)} bytes came of {stop - start}")
    return data


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi()


def _commit(url: str, place: Place) -> str:
    info = _of_hub(
        url,
        lambda: _api().repo_info(place.repo, repo_type=place.kind, revision=place.revision or None, timeout=TIMEOUT),
    )
    return str(info.sha)


@lru_cache(maxsize=64)
def _files_of(kind: str, repo: str, commit: str) -> dict[str, Found]:
    """What is known of a commit's files by now."""
    return {}


def _remember(files: dict[str, Found], told: Iterable[Any]) -> None:
    for each in told:
        if hasattr(each, "blob_id"):  # a folder has none
            digest = f"sha256:{each.lfs.sha256}" if each.lfs else f"git:{each.blob_id}"
            files[each.path] = Found(each.size, digest, True, digest)


def _of_hub(url: str, call: Callable[[], T]) -> T:
    """What huggingface_hub returns; its errors as ours, in one line."""
    from huggingface_hub import errors

    reasons: dict[type[Exception], str] = {
        errors.GatedRepoError: "its owners have to allow you to read it: ask on its page, and log in (hf auth login)",
        errors.RepositoryNotFoundError: "nothing is there, or it needs a login (HF_TOKEN, hf auth login)",
        errors.RevisionNotFoundError: "no such revision",
        errors.EntryNotFoundError: "nothing is there",
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set, and the cache does not have it",
    }
    try:
        return call()
    except (Interrupted, RemoteError, Recoverable):
        raise
    except tuple(reasons) as error:
        reason = next(reason for kind, reason in reasons.items() if isinstance(error, kind))
    except errors.HfHubHTTPError as error:
        status, headers = error.response.status_code, error.response.headers
        if status in MAY_RECOVER:
            raise Recoverable(f"status {status}", _asked_pause(headers)) from None
        reason = f"refused (status {status})"
    except (errors.HFValidationError, TypeError, AttributeError, ImportError) as error:
        reason = first_line(error)
    except Exception as error:  # of the HTTP client, which is another one in every version
        raise Recoverable(f"no answer ({redacted_text(first_line(error, 120))})") from None
    raise NotThere(f"{url}: {reason}")


def _asked_pause(headers: Any) -> float:
    """Seconds after which it wants to be asked again: `Retry-After: 20`, or `RateLimit: "api";r=0;t=20`."""
    after = headers.get("Retry-After") or ""
    told = re.search(r"\bt=(\d+)", headers.get("RateLimit") or "")
    return float(after if after.isdigit() else told[1] if told else 0)

"""The local files of an SAE that is named by its place (places.py): looked up, downloaded, checked, or in the cache.

A revision is resolved to a commit first, and the files are those of that commit: a branch that moves meanwhile gives
no mixture. What is downloaded is compared with the SHA-256 (of small files git's SHA-1) that the Hub lists. Endpoint,
cache, token and offline mode are huggingface_hub's own: HF_ENDPOINT, HF_HOME, HF_TOKEN or `hf auth login`,
HF_HUB_OFFLINE. The token goes from there to the Hub and appears in no message, record or file of ours.
"""

import glob
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

from saevlm_fast import __version__
from saevlm_fast.errors import did_you_mean, first_line, require
from saevlm_fast.files import atomic_write, sha256_file
from saevlm_fast.formats.places import SAE_LENS, HubSpec, is_remote, parse_spec, sae_lens_entry, sae_lens_release
from saevlm_fast.records import parse_json
from saevlm_fast.settings import path_of
from saevlm_fast.urls import is_url

CARD_FILE = "README.md"
_COMMIT = re.compile("[0-9a-f]{40}")
_SECONDS = 10.0  # to wait for the Hub's first word
# Files that hold an SAE's weights, those beside them that say what it is, and what training leaves and nobody loads.
_WEIGHTS = (".safetensors", ".pt", ".pth", ".npz")
_SETTINGS = (".json", ".yaml", ".yml")
_CONFIGS = ("cfg.json", "config.json", "config.yaml", "hyperparams.json", "lm_config.json")
_NOT_WEIGHTS = re.compile(
    r"sparsity|activation_scaler|activation_whitening|trainer_state|train_state|optimizer|lr_scheduler|rank_\d+_state|"
    r"state\.pt|feature_sparsity|training_args|scheduler",
)
_MOST_LISTED = 12


class LocalSAE(NamedTuple):
    """The files of an SAE on this machine; what follows the path is None of a plain path.

    Attributes:
        path: directory or file. Of the Hub's it lies in huggingface_hub's cache: to be read, never written.
        repo, sha, sae_id: repository, commit and place in it. sae_id is "" at its root.
        revision: branch or tag that was asked for; None if it was a commit, which cannot move.
        release: name in SAELens' list, of saelens: alone. scaling: what that list says that inputs were multiplied by
            before this SAE saw them, where its files leave that open.
    """

    path: Path
    repo: str | None = None
    sha: str | None = None
    sae_id: str | None = None
    revision: str | None = None
    release: str | None = None
    scaling: float | None = None

    @property
    def assume(self) -> dict[str, Any]:
        """For formats.registry.read: what SAELens' list says, and the files do not."""
        return {} if self.scaling is None else {"input_std": 1 / self.scaling}

    def record(self) -> dict[str, str]:
        """For metadata: where it came from, so that the same bytes can be had again. {} of a plain path."""
        values = {"repo": self.repo, "sha": self.sha, "path": self.sae_id, "release": self.release}
        return {name: value for name, value in values.items() if value is not None}


def resolve(
    spec: str | os.PathLike[str],
    *,
    local_files_only: bool = False,
    on_message: Callable[[str], None] = lambda text: None,
) -> LocalSAE:
    """The local files that a path, `hf:user/repo[@revision][/sae_id]` or saelens:release/sae_id names.

    Args:
        spec: a plain path is returned as it is, whether anything is there or not.
        local_files_only: the cache alone is asked, as with HF_HUB_OFFLINE=1.
        on_message: called with what is worth a line: a download, or that the Hub does not answer.

    Raises:
        ValueError: in one line: no such repository, revision or place; no access; several SAEs and none named, or none
            at all; no network and not in the cache, with the files to put where; bytes that are not the Hub's.
    """
    path = path_of("path", spec)
    require(
        not is_url(path),
        f"path: {path} is elsewhere; give a path on this machine, or hf:user/repo[/sae_id]",
    )
    if not is_remote(spec):
        return LocalSAE(path)
    text = os.fspath(spec)
    found = look_up(text, local_files_only=local_files_only, on_message=on_message)
    wanted = found.wanted
    if found.online:
        _download(found, text, on_message)
        _remember(wanted, found.sha)
    moves = None if wanted.revision and _COMMIT.fullmatch(wanted.revision) else wanted.revision or "main"
    path = _snapshot(found.repo, found.sha) / found.sae_id
    local = LocalSAE(path, found.repo, found.sha, found.sae_id, moves)
    if not text.startswith(SAE_LENS):
        return local
    return local._replace(release=text.removeprefix(SAE_LENS).partition("/")[0], scaling=_scaling(text, path))


class Found(NamedTuple):
    """An SAE of the Hub before it is downloaded.

    Attributes:
        repo, sha, sae_id: as LocalSAE's. wanted: what was asked for. online: whether the Hub said so, or the cache.
        listed: name -> what the Hub lists of a file (None of the cache), of the files that are needed.
    """

    repo: str
    sha: str
    sae_id: str
    wanted: HubSpec
    online: bool
    listed: dict[str, Any]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file; 0 where only the cache was asked."""
        return {name: getattr(file, "size", 0) for name, file in self.listed.items()}


def look_up(
    spec: str, *, local_files_only: bool = False, on_message: Callable[[str], None] = lambda text: None
) -> Found:
    """Which commit and which files a spec of the Hub names. ValueError: as resolve."""
    require(is_remote(spec), f"spec: {spec!r} is not of the form hf:user/repo[@revision][/sae_id]")
    wanted = sae_lens_release(spec) if spec.startswith(SAE_LENS) else parse_spec(spec)
    sha, offline = _commit_of(wanted, spec, local_files_only, on_message)
    files = cached_files(wanted.repo, sha) if offline else _listed(wanted, sha, spec)
    names = sorted(files)
    sae_id = _place(wanted, names, spec, sha, offline)
    needed = {name: files[name] for name in files_of(sae_id, names)}
    return Found(wanted.repo, sha, sae_id, wanted, not offline, needed)


# What is in a repository, by names ------------------------------------------------------------------------------------


def candidates(names: Sequence[str]) -> list[str]:
    """Folders and files of a listing that look like an SAE by their names: "" is the root.

    A folder with a settings file and one file of weights, or with one file of weights alone, is a candidate; of a
    folder with several files of weights every file is one.
    """
    weights: dict[str, list[str]] = {}
    for name in names:
        if name.endswith(_WEIGHTS) and not _NOT_WEIGHTS.search(PurePosixPath(name).name):
            weights.setdefault(_folder(name), []).append(name)
    found: list[str] = []
    for folder, inside in weights.items():
        stems = {PurePosixPath(name).stem for name in inside}  # sae_weights.safetensors and .pt are one SAE
        configured = any(f"{folder}/{config}".lstrip("/") in set(names) for config in _CONFIGS)
        found += [folder] if len(stems) == 1 and (configured or len(inside) == 1) else inside
    return sorted(found)


def files_of(sae_id: str, names: Sequence[str]) -> list[str]:
    """The files of a listing that an SAE there needs: its own, and settings beside and one folder above it."""
    if sae_id in names:
        beside = (_folder(sae_id), _folder(_folder(sae_id)))
        return [sae_id, *(name for name in names if name.endswith(_SETTINGS) and _folder(name) in beside)]
    own = [name for name in names if (name.startswith(f"{sae_id}/") if sae_id else "/" not in name)]
    above = [name for name in names if sae_id and name.endswith(_SETTINGS) and _folder(name) == _folder(sae_id)]
    left = ("trainer_state", "train_state", "optimizer", "lr_scheduler", "rank_")
    return [name for name in own if not PurePosixPath(name).name.startswith(left)] + above


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _place(wanted: HubSpec, names: list[str], spec: str, sha: str, offline: bool) -> str:
    """Which SAE of the repository is meant. ValueError: none, or one of several, which are listed."""
    if wanted.sae_id is not None:
        there = any(name == wanted.sae_id or name.startswith(f"{wanted.sae_id}/") for name in names)
        if offline and not any(name.endswith(_WEIGHTS) for name in files_of(wanted.sae_id, names)):
            raise ValueError(_not_here(wanted, spec, sha))
        near = did_you_mean(wanted.sae_id, candidates(names))
        require(there, f"{spec}: {wanted.repo} has no {wanted.sae_id!r} at {sha[:12]}{near}")
        return wanted.sae_id
    found = candidates(names)
    if not found and offline:
        raise ValueError(_not_here(wanted, spec, sha))
    shown = ", ".join(names[:_MOST_LISTED]) or "nothing"
    require(bool(found), f"{spec}: no SAE is in {wanted.repo} at {sha[:12]}, which holds {shown}")
    more = f" and {len(found) - _MOST_LISTED} more" if len(found) > _MOST_LISTED else ""
    known = "the cache holds" if offline else "it holds"
    listed = ", ".join(each or "." for each in found[:_MOST_LISTED])
    example = f"{HubSpec(wanted.repo, wanted.revision, next(filter(None, found), None))}"
    require(len(found) == 1, f"{spec}: which SAE? {known} {listed}{more}; give {example}")
    return found[0]


# The Hub --------------------------------------------------------------------------------------------------------------


def hub_api() -> Any:
    """huggingface_hub's, with the environment's endpoint and token."""
    from huggingface_hub import HfApi

    return HfApi(library_name="saevlm-fast", library_version=__version__)


def endpoint() -> str:
    """The Hub's address for messages, without a password in it."""
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


@contextmanager
def progress_for_people() -> Iterator[None]:
    """The library's progress bars only where stderr is a terminal: elsewhere they would be lines of noise."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def hub_errors(what: str, repo: str, revision: str | None = None) -> Iterator[None]:
    """The Hub's refusals as ValueErrors of one line, made of our own words: a library's may quote a request.

    Raises:
        ValueError: what the Hub refused, or that it does not answer.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        advice = f"accept its conditions at {endpoint()}/{repo}, then log in (hf auth login, or HF_TOKEN)"
        raise ValueError(f"{what}: {repo} is gated and not open to you; {advice}") from error
    except errors.RepositoryNotFoundError as error:
        why = "or it is private, and your login (hf auth login, or HF_TOKEN) does not see it"
        raise ValueError(f"{what}: {endpoint()} has no repository {repo}, {why}") from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{what}: {repo} has no revision {revision or 'main'!r}") from error
    except errors.LocalEntryNotFoundError as error:
        raise ValueError(f"{what}: {endpoint()} does not answer, and not all of {repo} is in the cache") from error
    except errors.EntryNotFoundError as error:
        raise ValueError(f"{what}: {repo} lacks a file that it lists") from error
    except errors.HFValidationError as error:
        raise ValueError(f"{what}: {repo!r} is no name of a repository ({first_line(error)})") from error
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        raise ValueError(f"{what}: {_of_status(status)}") from error
    except Exception as error:
        if not is_unreachable(error):
            raise
        raise ValueError(f"{what}: {endpoint()} does not answer ({first_line(error)})") from error


def _of_status(status: Any) -> str:
    known = {
        401: "the Hub does not accept your login; hf auth login, or set HF_TOKEN",
        403: "your login may not do this; a token with the right to write is needed to push",
        412: "somebody else has changed it meanwhile; do it again",
        429: "the Hub asks to wait; try again later",
    }
    return known.get(status, f"the Hub answers with status {status}")


def is_unreachable(error: BaseException) -> bool:
    """Whether an error says that the Hub was not reached, or is down: which HTTP library raises it is its affair."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        response = getattr(error, "response", None)
        return response is not None and response.status_code >= 500
    of_http = type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "requests", "urllib3")
    return of_http or isinstance(error, ConnectionError | TimeoutError)


def _commit_of(wanted: HubSpec, spec: str, local: bool, on_message: Callable[[str], None]) -> tuple[str, bool]:
    """The commit of a revision, and whether the Hub could not be asked."""
    from huggingface_hub import constants

    if not (local or constants.HF_HUB_OFFLINE):
        try:
            with hub_errors(spec, wanted.repo, wanted.revision):
                return str(hub_api().model_info(wanted.repo, revision=wanted.revision, timeout=_SECONDS).sha), False
        except ValueError as error:
            reason = error.__cause__
            if reason is None or not is_unreachable(reason):
                raise
            on_message(f"{spec}: {endpoint()} does not answer ({first_line(reason)}); the cache is used")
    return _cached_commit(wanted, spec), True


def _listed(wanted: HubSpec, sha: str, spec: str) -> dict[str, Any]:
    """name -> huggingface_hub's RepoFile, of the commit's files; what is no path inside the repository is left out."""
    from huggingface_hub.hf_api import RepoFile

    with hub_errors(spec, wanted.repo, wanted.revision):
        tree = list(hub_api().list_repo_tree(wanted.repo, recursive=True, revision=sha))
    files = {each.path: each for each in tree if isinstance(each, RepoFile)}
    return {name: file for name, file in files.items() if ".." not in name.split("/") and not name.startswith("/")}


def _download(found: Found, spec: str, on_message: Callable[[str], None]) -> None:
    """The files that the cache lacks, each compared with what the Hub lists."""
    from huggingface_hub import snapshot_download

    snapshot = _snapshot(found.repo, found.sha)
    new = [name for name in found.listed if not (snapshot / name).is_file()]
    if not new:
        return
    n_bytes = sum(found.sizes[name] for name in new)
    on_message(f"{spec}: downloading {len(new)} files, {n_bytes / 1e6:.1f} MB, from {endpoint()}")
    patterns = [glob.escape(name) for name in new]  # a [ in a name is no pattern
    with hub_errors(spec, found.repo, found.wanted.revision), progress_for_people():
        snapshot_download(found.repo, revision=found.sha, allow_patterns=patterns)
    for name in new:
        _check_bytes(snapshot / name, found.listed[name], spec)


def _check_bytes(path: Path, listed: Any, spec: str) -> None:
    """ValueError: a file is not the one that the Hub lists; it leaves the cache, so that it is downloaded again."""
    require(path.is_file(), f"{spec}: {listed.path} was not downloaded")
    if listed.lfs is not None:
        kind, found, said = "SHA-256", sha256_file(path), listed.lfs.sha256
    else:
        data = path.read_bytes()
        kind, found, said = "SHA-1", hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), listed.blob_id
    if found == said:
        return
    path.resolve().unlink(missing_ok=True)  # the blob, then the link to it
    path.unlink(missing_ok=True)
    message = f"{spec}: {listed.path} was damaged on the way, its {kind} is not the one that the Hub lists"
    raise ValueError(f"{message}; it is removed from the cache, try again")


# The cache ------------------------------------------------------------------------------------------------------------


def _repo_cache(repo: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser() / f"models--{repo.replace('/', '--')}"


def _snapshot(repo: str, sha: str) -> Path:
    return _repo_cache(repo) / "snapshots" / sha


def cached_files(repo: str, sha: str) -> dict[str, None]:
    """The names of a commit's files that are in the cache."""
    snapshot = _snapshot(repo, sha)
    return {path.relative_to(snapshot).as_posix(): None for path in snapshot.rglob("*") if path.is_file()}


def _cached_commit(wanted: HubSpec, spec: str) -> str:
    """What the revision was when it was last asked for. ValueError: it never was."""
    if wanted.revision and _COMMIT.fullmatch(wanted.revision):
        return wanted.revision
    ref = _repo_cache(wanted.repo) / "refs" / (wanted.revision or "main")
    sha = ref.read_text(encoding="utf-8").strip() if ref.is_file() else ""
    if not _COMMIT.fullmatch(sha):
        raise ValueError(_not_here(wanted, spec, None))
    return sha


def _remember(wanted: HubSpec, sha: str) -> None:
    """What the revision is now, for the day without a network: a download pinned to a commit does not note it."""
    revision = wanted.revision or "main"
    ref = _repo_cache(wanted.repo) / "refs" / revision
    if _COMMIT.fullmatch(revision) or (ref.is_file() and ref.read_text(encoding="utf-8") == sha):
        return
    try:
        ref.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(ref) as temporary:
            temporary.write_text(sha, encoding="utf-8")
    except OSError:
        return  # a cache that others keep, and we may only read


def _not_here(wanted: HubSpec, spec: str, sha: str | None) -> str:
    """Why nothing can be loaded without the Hub, and which files would do."""
    place = f"{wanted.sae_id}/" if wanted.sae_id else ""
    page = f"{endpoint()}/{wanted.repo}/tree/{wanted.revision or 'main'}/{place}".rstrip("/")
    where = "not in the cache" if sha is None else f"not in the cache's commit {sha[:12]}"
    files = wanted.sae_id if place.endswith((".pt/", ".pth/", ".npz/", ".safetensors/")) else None
    files = files or f"its files ({place}cfg.json and {place}sae_weights.safetensors, where it is of SAELens' layout)"
    return (
        f"{spec}: {where} {_repo_cache(wanted.repo)}, and the Hub is not asked or does not answer; where there is a "
        f"network, get {files} from {page}, put them into a directory here and give its path, or copy that cache"
    )


def _scaling(spec: str, path: Path) -> float | None:
    """SAELens' norm_scaling_factor of an SAE whose cfg.json says that it is still to be folded; as SAELens does."""
    factor = sae_lens_entry(spec)[1].get("norm_scaling_factor")
    if not isinstance(factor, int | float) or not factor > 0 or not (path / "cfg.json").is_file():
        return None
    cfg = parse_json((path / "cfg.json").read_bytes(), path / "cfg.json")
    said = cfg.get("normalize_activations") if isinstance(cfg, dict) else None
    return float(factor) if said in ("expected_average_only_in", True) else None

"""An SAE to the Hub, in SAELens' layout, so that SAE.from_pretrained("user/repo", "sae_id") works there.

    <sae_id>/cfg.json, sae_weights.safetensors, README.md (its card) and its picture
    README.md           of the repository: the card of the first SAE, with a table of all; later ones join the table

One push is one commit on top of the commit that was looked at: what somebody else has pushed meanwhile makes it fail,
and is never overwritten. Files that the Hub has already are not sent again, so that a push that was cut short is
finished by the same push.
"""

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saevlm_fast.errors import first_line, require
from saevlm_fast.formats.hub import CARD_FILE, endpoint, hub_api, hub_errors, progress_for_people
from saevlm_fast.formats.places import HUB
from saevlm_fast.formats.sae_lens import CONFIG_FILE, WEIGHTS_DIGEST, WEIGHTS_FILE
from saevlm_fast.publishing.card import card, front, front_matter, is_ours, is_sealed, plain, sealed
from saevlm_fast.publishing.facts import Facts, public
from saevlm_fast.records import Fields, parse_json, read_record, write_record
from saevlm_fast.sae import SparseAutoencoder

MAIN = "main"
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")
_SAE_ID = re.compile(r"[\w=+-][\w.=+-]*(?:/[\w=+-][\w.=+-]*)*")
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_BRANCH = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)*")
_BEGIN, _END = "<!-- saevlm-fast SAEs: begin -->", "<!-- saevlm-fast SAEs: end -->"
_HEAD = "| SAE | of | where | size | k | L0 | explained variance |\n| --- | --- | --- | --- | --- | --- | --- |"


@dataclass(frozen=True)
class Push:
    """What is pushed where.

    Args:
        directory: an SAE directory, a run's or another. repo: user/repo.
        sae_id: its folder in the repository; the directory's name if None.
        private: of a repository that is not there yet. revision: a branch, made from main if it is not there.
        licence: of the weights, by the Hub's name. force: replace another SAE of that sae_id, in a new commit.

    Raises:
        ValueError: a name that the Hub or SAELens could not use.
    """

    directory: Path
    repo: str
    sae_id: str | None = None
    private: bool = False
    revision: str = MAIN
    licence: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        fits = _REPO.fullmatch(self.repo) is not None
        require(fits, f"repo: {self.repo!r} is not of the form user/repo, of letters, digits and ._-")
        place = self.place
        advice = "letters, digits and ._=+-, in folders separated by /; give another with --sae-id"
        require(_SAE_ID.fullmatch(place) is not None and ".." not in place, f"sae_id: {place!r} is not of {advice}")
        branch = _BRANCH.fullmatch(self.revision) is not None and ".." not in self.revision
        require(branch, f"revision: {self.revision!r} is no name of a branch, of letters, digits and ._-/")
        licence = self.licence
        known = licence is None or _LICENCE.fullmatch(licence) is not None
        require(known, f"licence: {licence!r} is no name of the Hub's, as apache-2.0 or cc-by-4.0")

    @property
    def place(self) -> str:
        """The folder in the repository."""
        return self.directory.absolute().name if self.sae_id is None else self.sae_id


@dataclass(frozen=True)
class Pushed:
    """The commit that holds an SAE now: its sha and page; new is False where it held it before."""

    repo: str
    sae_id: str
    sha: str
    url: str
    new: bool


@dataclass(frozen=True)
class Remote:
    """The repository before a push; head is None where there is none yet."""

    head: str | None
    files: frozenset[str] = frozenset()
    private: bool = False


def push(what: Push, on_message: Callable[[str], None] = lambda text: None) -> Pushed:
    """Uploads an SAE, its card and the repository's README.md, in one commit.

    Raises:
        ValueError: in one line: no SAE, or one whose weights are not those of its cfg.json; no access; another SAE of
            that sae_id without force; somebody else's commit meanwhile; no network. What was uploaded is used by the
            next attempt.
    """
    facts = checked(what)
    name = f"{HUB}{what.repo}"
    with staging(what, facts) as folder, hub_errors(name, what.repo, what.revision):
        api = hub_api()
        before = remote(api, what)
        if before.head is None:
            api.create_repo(what.repo, repo_type="model", private=what.private or None, exist_ok=True)
            on_message(f"made {'private ' if what.private else ''}{endpoint()}/{what.repo}")
        if what.revision != MAIN:
            api.create_branch(what.repo, branch=what.revision, exist_ok=True)
        before = remote(api, what)
        _check_free(api, what, before, facts)
        _add_readme(api, what, before, facts, folder)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        on_message(f"uploading {what.place}, {size / 1e6:.1f} MB, to {endpoint()}/{what.repo}")
        with _upload_errors(what), progress_for_people():
            done = api.upload_folder(
                repo_id=what.repo,
                repo_type="model",
                folder_path=folder,
                revision=what.revision,
                parent_commit=before.head,
                commit_message=f"{what.place}: {facts.header.config.architecture} SAE, by saevlm-fast",
            )
    return Pushed(
        what.repo, what.place, done.oid, f"{endpoint()}/{what.repo}/commit/{done.oid}", done.oid != before.head
    )


def planned(what: Push) -> tuple[dict[str, int], str | None]:
    """What a push would upload, name -> bytes, and the commit it would be on top of; None of a new repository.

    Raises:
        ValueError: as push, of what can be known before.
    """
    facts = checked(what)
    with staging(what, facts) as folder, hub_errors(f"{HUB}{what.repo}", what.repo, what.revision):
        api = hub_api()
        before = remote(api, what)
        _check_free(api, what, before, facts)
        _add_readme(api, what, before, facts, folder)
        files = {
            path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()
        }
    return files, before.head


def checked(what: Push) -> Facts:
    """What is known of the SAE, whose weights have been read: they are those of its cfg.json, and finite.

    Raises:
        ValueError: a directory that lacks a file of a finished run, weights that are damaged.
    """
    facts = Facts.of(what.directory)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        there = (what.directory / name).is_file()
        advice = "saevlm-fast convert writes it in SAELens' layout, which can be pushed"
        require(there, f"run: {what.directory} has no {name}; {advice}")
    SparseAutoencoder.from_pretrained(what.directory)
    return facts


def remote(api: Any, what: Push) -> Remote:
    """The repository as it is. ValueError: it is public, and should be private."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = api.model_info(what.repo, revision=what.revision)
    except RevisionNotFoundError:
        info = api.model_info(what.repo)
    except RepositoryNotFoundError:
        return Remote(None)
    private = bool(info.private)
    require(private or not what.private, f"private: {what.repo} is there already, and public")
    return Remote(info.sha, frozenset(api.list_repo_files(what.repo, revision=info.sha)), private)


def _check_free(api: Any, what: Push, before: Remote, facts: Facts) -> None:
    """ValueError: another SAE has that place, and nothing says to replace it."""
    path = f"{what.place}/{CONFIG_FILE}"
    if path not in before.files or what.force:
        return
    said = parse_json(_remote_text(api, what, before, path).encode(), path)
    digest = said.get(WEIGHTS_DIGEST) if isinstance(said, dict) else None
    same = digest is not None and digest == facts.header.weights_sha256
    require(same, f"sae_id: {what.repo} has another SAE at {what.place}; --force replaces it, in a new commit")


def _remote_text(api: Any, what: Push, before: Remote, path: str) -> str:
    local = api.hf_hub_download(what.repo, path, revision=before.head)
    return Path(local).read_text(encoding="utf-8", errors="replace")


@contextmanager
def _upload_errors(what: Push) -> Iterator[None]:
    """The library wraps what happens to one of several uploads."""
    try:
        yield
    except RuntimeError as error:
        cause = first_line(error.__cause__ or error)
        again = "the same command goes on with what is not there yet"
        raise ValueError(f"{HUB}{what.repo}: the upload was cut short ({cause}); {again}") from error


# What is uploaded -----------------------------------------------------------------------------------------------------


@contextmanager
def staging(what: Push, facts: Facts) -> Iterator[Path]:
    """A temporary folder that is laid out as the repository; the weights are a link, not a copy."""
    with tempfile.TemporaryDirectory(prefix="saevlm-fast-push-") as name:
        folder = Path(name)
        place = folder / what.place
        place.mkdir(parents=True)
        source = what.directory.absolute()
        os.symlink(source / WEIGHTS_FILE, place / WEIGHTS_FILE)
        write_record(place / CONFIG_FILE, public_config(source / CONFIG_FILE))
        own = source / CARD_FILE
        written = own.is_file() and not is_ours(own)
        ours = card(facts, repo=what.repo, sae_id=what.place, licence=what.licence)
        text = own.read_text(encoding="utf-8", errors="replace") if written else ours
        (place / CARD_FILE).write_text(text, encoding="utf-8")
        if facts.picture is not None:
            (place / facts.picture.name).write_bytes(facts.picture.read_bytes())
        yield folder


def public_config(path: Path) -> dict[str, Any]:
    """cfg.json without the folders of this machine, which is nobody's business."""
    cfg = read_record(path, Fields({}))
    return cfg | {"metadata": public(cfg.get("metadata") or {})}


def _add_readme(api: Any, what: Push, before: Remote, facts: Facts, folder: Path) -> None:
    if CARD_FILE in before.files:
        text = merged(_remote_text(api, what, before, CARD_FILE), what, facts)
    else:
        text = first_readme(what, facts)
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def first_readme(what: Push, facts: Facts) -> str:
    """README.md of a repository that has none: the card, with a table of the repository's SAEs below."""
    picture = None if facts.picture is None else Path(what.place) / facts.picture.name
    of_root = replace(facts, picture=picture)
    section = f"## SAEs of this repository\n\n{_BEGIN}\n{_HEAD}\n{_row(what, facts)}\n{_END}"
    return card(of_root, repo=what.repo, sae_id=what.place, licence=what.licence, more=[section])


def merged(text: str, what: Push, facts: Facts) -> str:
    """A README.md that is there, with this SAE in its table, and in its front matter what was missing.

    Nothing else of it changes: a person may have written it. One without our table gets it at its end.
    """
    import yaml

    ours = is_sealed(text)
    text = re.sub(r"<!-- saevlm-fast card [0-9a-f]{64} -->\n\Z", "", text) if ours else text
    found = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", text, re.DOTALL)
    try:
        there = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        there = None
    body = text[found.end() :] if found else text
    if isinstance(there, dict) or not found:
        head = _joined(there or {}, front(facts, what.licence))
        text = front_matter(head) + body if head != there else text
    text = _with_row(text, what, facts)
    return sealed(text) if ours else text


def _joined(there: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """What was there wins; tags are joined, and so are base models."""
    head = new | there
    for name in ("tags", "base_model"):
        old, added = _several(there.get(name)), _several(new.get(name))
        if not set(added) <= set(old):
            both = list(dict.fromkeys([*old, *added]))
            head[name] = both if name == "tags" or len(both) > 1 else both[0]
    return head


def _several(value: Any) -> list[str]:
    return [str(each) for each in value] if isinstance(value, list) else [] if value is None else [str(value)]


def _with_row(text: str, what: Push, facts: Facts) -> str:
    row = _row(what, facts)
    begin, end = text.find(_BEGIN), text.find(_END)
    if begin < 0 or end < begin:
        return f"{text.rstrip()}\n\n## SAEs of this repository\n\n{_BEGIN}\n{_HEAD}\n{row}\n{_END}\n"
    rows = text[begin + len(_BEGIN) : end].strip("\n").split("\n")
    same = row.partition(" | ")[0]
    kept = [line for line in rows if line.partition(" | ")[0] != same]
    return text[:begin] + "\n".join([_BEGIN, *kept, row]) + "\n" + text[end:]


def _row(what: Push, facts: Facts) -> str:
    config, measured = facts.header.config, facts.evaluation
    cells = [
        f"[{what.place.replace('_', chr(92) + '_')}]({what.place}/{CARD_FILE})",
        plain(facts.model or "-"),
        plain(facts.place or "-"),
        f"{plain(config.architecture)}, {config.d_in} -> {config.d_sae}",
        "-" if config.k is None else str(config.k),
        *(f"{measured[name]:.4g}" if name in measured else "-" for name in ("l0", "explained_variance")),
    ]
    return f"| {' | '.join(cells)} |"

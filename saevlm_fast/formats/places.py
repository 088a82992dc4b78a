"""What an SAE is called: a path, a place on the Hub, or an entry of SAELens' list of releases.

`hf:user/repo[@revision][/sae_id]`   revision: branch, tag or commit; sae_id: folder or file in the repository
`saelens:release/sae_id`             looked up in the list of an installed sae-lens, which names an hf: of these
"""

import os
import re
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote

from saevlm_fast.errors import did_you_mean, require

HUB, SAE_LENS = "hf:", "saelens:"
SAE_HELP = (
    "SAE directory (cfg.json, sae_weights.safetensors), hf:user/repo[@revision][/sae_id] or saelens:release/sae_id."
)
_SPEC = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<sae_id>.*))?", re.DOTALL
)


class HubSpec(NamedTuple):
    """What `hf:user/repo[@revision][/sae_id]` names; None is what was left open."""

    repo: str
    revision: str | None
    sae_id: str | None

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{HUB}{self.repo}{at}{f'/{self.sae_id}' if self.sae_id else ''}"


def is_remote(spec: str | os.PathLike[str]) -> bool:
    """Whether a text or path names something of the Hub; a directory of such a name is ./hf:..."""
    return os.fspath(spec).startswith((HUB, SAE_LENS))


def parse_spec(spec: str) -> HubSpec:
    """The parts of `hf:user/repo[@revision][/sae_id]`; %2F in a revision is a slash.

    Raises:
        ValueError: it is none, or its place is outside of the repository.
    """
    found = _SPEC.fullmatch(spec.removeprefix(HUB))
    if found is None:
        raise ValueError(f"{spec!r}: not of the form hf:user/repo[@revision][/sae_id]")
    revision, sae_id = found["revision"], (found["sae_id"] or "").strip("/")
    inside = PurePosixPath(sae_id)
    sound = ".." not in inside.parts and "\\" not in sae_id and sae_id.isprintable() and spec.isprintable()
    require(sound, f"{spec!r}: {sae_id!r} is no place in a repository")
    if revision is not None:
        revision = unquote(revision)
        require(".." not in revision and not revision.startswith("/"), f"{spec!r}: {revision!r} is no revision")
    return HubSpec(found["repo"], revision, sae_id if inside.parts else None)


def sae_lens_release(spec: str) -> HubSpec:
    """Where saelens:release/sae_id lies on the Hub, by the list of the sae-lens that is installed.

    The list is read from its file, and nothing of sae-lens is imported. There is no copy of it in this package: it
    changes with every release of sae-lens, and a copy would go stale unseen.

    Raises:
        ValueError: sae-lens is not installed, its list is of another form, or has no such release or SAE.
    """
    repo, entry = sae_lens_entry(spec)
    place = str(entry["path"]).strip("/")
    return parse_spec(f"{HUB}{repo}/{'' if place == '.' else place}")


def sae_lens_entry(spec: str) -> tuple[str, dict[str, Any]]:
    """The repository, and what the list says of the SAE. ValueError: another form, or not on the list."""
    release, _, sae_id = spec.removeprefix(SAE_LENS).partition("/")
    require(bool(release and sae_id), f"{spec!r}: not of the form saelens:release/sae_id")
    path = _sae_lens_list(spec)
    entry = _release(path.read_text(encoding="utf-8"), release, path, spec)
    saes = {str(each["id"]): each for each in entry["saes"]}
    some = ", ".join(list(saes)[:5])
    near = did_you_mean(sae_id, saes) or f"; it has {some}{', ...' if len(saes) > 5 else ''}"
    require(sae_id in saes, f"{spec}: release {release} has no SAE {sae_id!r}{near}")
    return entry["repo_id"], saes[sae_id]


def _sae_lens_list(spec: str) -> Path:
    found = find_spec("sae_lens")
    folders = list(found.submodule_search_locations or ()) if found else []
    path = Path(folders[0]) / "pretrained_saes.yaml" if folders else None
    if path is None or not path.is_file():
        advice = "pip install sae-lens, or give hf:user/repo/sae_id, where the SAE lies"
        raise ValueError(f"{spec}: the list of releases is part of sae-lens, which is not installed; {advice}")
    return path


def _release(text: str, release: str, path: Path, spec: str) -> dict[str, Any]:
    """The release's part of the list alone is parsed: the whole takes seconds."""
    import yaml

    starts = {
        found[1].strip("'\""): found.start() for found in re.finditer(r"^([^\s#:][^:\n]*):\s*$", text, re.MULTILINE)
    }
    require(release in starts, f"{spec}: {path} has no release {release!r}{did_you_mean(release, starts)}")
    ends = sorted([*starts.values(), len(text)])
    start = starts[release]
    try:
        (entry,) = yaml.safe_load(text[start : ends[ends.index(start) + 1]]).values()
        sound = isinstance(entry["repo_id"], str) and all("id" in each and "path" in each for each in entry["saes"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError):
        sound, entry = False, {}
    require(sound, f"{spec}: {path} does not list {release} as it used to (repo_id; saes with id and path)")
    return dict(entry)

"""A Hub on this machine: what huggingface_hub asks of one to push and pull, in a thread, with faults on demand.

    with hub_server() as hub:            # HF_ENDPOINT and an empty cache are set for this process
        hub.add("user/repo", {"sae/cfg.json": b"{}"})
        hub.add("datasets/user/photos", {"0.tar": ...})

Repositories, their commits and branches are kept in memory. Files of `lfs_suffixes` are uploaded by LFS (batch, PUT,
verify), others inside the commit. Xet is off (HF_HUB_DISABLE_XET): its protocol is a compiled client's own.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from file_server import Server

TOKEN = "hf_" + "s3cret" * 5
LFS_SUFFIXES = (".safetensors", ".pt", ".npz", ".png", ".parquet", ".tar")


@dataclass
class Repo:
    """commits: sha -> path -> content. branches: name -> sha."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        text = repr((branch, self.branches.get(branch), sorted(files.items()), len(self.commits)))
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.sha(revision) or ""]

    def sha(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class Hub:
    """The state, and what goes wrong.

    Attributes:
        cut_downloads: so many downloads end after half of what was asked for. cut_uploads: so many PUTs are not heard
            to their end. corrupt: names whose downloads have a bit flipped. before_commit: called, once, before a
            commit is looked at. down: every answer is 503. ranges: whether parts can be asked for. statuses: of the
            next answers. large_files_at: the URL of a server that has them, as of the Hub's.
            log: (method, path) of every request. tokens: those seen.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.cut_downloads = self.cut_uploads = 0
        self.corrupt: set[str] = set()
        self.before_commit: Any = None
        self.down, self.ranges = False, True
        self.statuses: list[int] = []
        self.large_files_at = ""
        self.log: list[tuple[str, str]] = []
        self.tokens: set[str] = set()
        self.url = ""

    def add(self, repo: str, files: dict[str, bytes], **more: bool) -> str:
        """A repository with one commit; its sha."""
        made = self.repos.setdefault(repo, Repo(**more))
        return made.commit({".gitattributes": b"", **files})

    def count(self, method: str, part: str) -> int:
        """Requests so far of a method, whose path has a part."""
        return sum(each == method and part in path for each, path in self.log)


class Refused(Exception):
    def __init__(self, status: int, code: str | None = None, message: str = "no"):
        self.status, self.code, self.message = status, code, message


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        self.path, _, self.query = self.path.partition("?")
        self.read: bytes | None = None
        self.hub.log.append((self.command, self.path))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.hub.tokens |= {token} if token else set()
        self.writer = token == TOKEN
        try:
            if self.hub.down or self.hub.statuses:
                raise Refused(self.hub.statuses.pop(0) if self.hub.statuses else 503)
            for method, pattern, call in ROUTES:
                found = re.fullmatch(pattern, self.path)
                if found and self.command in method:
                    return call(self, *map(unquote, found.groups()))
            raise Refused(404, message=f"{self.command} {self.path} is not part of this Hub")
        except Refused as refused:
            self.body()
            headers = {"X-Error-Code": refused.code} if refused.code else {}
            self.send(refused.status, {"error": refused.message}, **headers, X_Error_Message=refused.message)

    def body(self) -> bytes:
        """What the request carries; a second time from memory."""
        if self.read is None:
            self.read = self.read_body()
        return self.read

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while n := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(n))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send(self, status: int, value: Any = None, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        length = {"Content-Length": str(len(data))}
        for name, text in (length | {key.replace("_", "-"): text for key, text in headers.items()}).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def repo(self, name: str, write: bool = False) -> Repo:
        found = self.hub.repos.get(name)
        if found is None or (found.private and not self.writer):
            raise Refused(401 if not self.writer else 404, "RepoNotFound", "Repository not found")
        if write and not self.writer:
            raise Refused(403, message="forbidden")
        return found

    def sha(self, name: str, revision: str) -> str:
        sha = self.repo(name).sha(revision)
        if sha is None:
            raise Refused(404, "RevisionNotFound", "Invalid rev id")
        return sha

    # The endpoints ----------------------------------------------------------------------------------------------------

    def create(self) -> None:
        asked = json.loads(self.body())
        name = f"{asked['organization']}/{asked['name']}"
        if not self.writer:
            raise Refused(401, message="Invalid credentials in Authorization header")
        url = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repos:
            return self.send(409, url)
        self.hub.add(name, {}, private=asked.get("visibility") == "private")
        return self.send(200, url)

    def info(self, name: str, revision: str = "main") -> None:
        repo, sha = self.repo(name), self.sha(name, revision)
        siblings = [{"rfilename": path} for path in repo.files(sha)]
        self.send(200, {"id": name, "sha": sha, "private": repo.private, "tags": [], "siblings": siblings})

    def tree(self, name: str, revision: str, folder: str = "") -> None:
        entries = everything(self.repo(name).files(self.sha(name, revision)))
        if folder and entries.get(folder, {}).get("type") != "directory":
            raise Refused(404, "EntryNotFound", f"{folder} does not exist")
        below = f"{folder}/" if folder else ""
        deep = "recursive=true" in self.query.lower()
        wanted = [path for path in entries if path.startswith(below) and (deep or "/" not in path[len(below) :])]
        self.send(200, [entries[path] for path in wanted])

    def paths_info(self, name: str, revision: str) -> None:
        asked = parse_qs(self.body().decode())
        entries = everything(self.repo(name).files(self.sha(name, revision)))
        self.send(200, [entries[path] for path in asked["paths"] if path in entries])

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo, sha = self.repo(name), self.sha(name, revision)
        if repo.gated:
            raise Refused(403, "GatedRepo", "Access to model is restricted")
        data = repo.files(sha).get(path)
        if data is None:
            raise Refused(404, "EntryNotFound", "Entry not found")
        etag = listed(path, data).get("lfs", {}).get("oid") or git_sha1(data)
        headers = {"ETag": f'"{etag}"', "X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
        if self.command == "HEAD":
            return self.send(200, data, **headers)
        if self.hub.large_files_at and path.endswith(LFS_SUFFIXES):
            return self.send(302, Location=f"{self.hub.large_files_at}/{path}", **headers)
        if path in self.hub.corrupt:
            data = bytes([data[0] ^ 1]) + data[1:]
        start, stop = self.wanted(len(data))
        ranged = "Range" in self.headers and self.hub.ranges
        if ranged:
            headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        if self.hub.cut_downloads:
            self.hub.cut_downloads -= 1
            self.send_response(206 if ranged else 200)
            self.send_header("Content-Length", str(stop - start))
            self.end_headers()
            self.wfile.write(data[start : start + (stop - start) // 2])
            self.close_connection = True
            return None
        return self.send(206 if ranged else 200, data[start:stop], **headers)

    def wanted(self, size: int) -> tuple[int, int]:
        """The part of a file that is asked for."""
        first, last = (re.findall(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) or [("0", "")])[0]
        return (int(first), min(int(last) + 1, size) if last else size) if self.hub.ranges else (0, size)

    def preupload(self, name: str, revision: str) -> None:
        self.repo(name, write=True)
        files, asked = self.repo(name).files(self.sha(name, revision)), json.loads(self.body())["files"]
        self.send(200, {"files": [self.mode(each["path"], files) for each in asked]})

    def mode(self, path: str, files: dict[str, bytes]) -> dict[str, Any]:
        known = listed(path, files[path]) if path in files else {}
        oid = known.get("lfs", {}).get("oid") or known.get("oid")
        mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def batch(self, name: str) -> None:
        self.repo(name, write=True)
        answers = []
        for each in json.loads(self.body())["objects"]:
            answer = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.hub.objects:
                actions = {what: {"href": f"{self.hub.url}/lfs/{what}/{each['oid']}"} for what in ("upload", "verify")}
                answer["actions"] = actions
            answers.append(answer)
        self.send(200, {"transfer": "basic", "objects": answers})

    def upload(self, oid: str) -> None:
        if self.hub.cut_uploads:
            self.hub.cut_uploads -= 1
            self.close_connection = True
            return self.connection.close()
        data = self.body()
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refused(400, message="not of that SHA-256")
        self.hub.objects[oid] = data
        return self.send(200, {})

    def verify(self, oid: str) -> None:
        asked = json.loads(self.body())
        there = len(self.hub.objects.get(oid, b"")) == asked["size"]
        self.send(200 if there else 404, {})

    def commit(self, name: str, branch: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines()]
        repo = self.repo(name, write=True)
        if self.hub.before_commit is not None:
            call, self.hub.before_commit = self.hub.before_commit, None
            call()
        parent = lines[0]["value"].get("parentCommit")
        if branch not in repo.branches:
            raise Refused(404, "RevisionNotFound", "Invalid rev id")
        if parent is not None and parent != repo.branches[branch]:
            raise Refused(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(repo.files(branch))
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                import base64

                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                raise Refused(400, message=f"{line['key']} is not part of this Hub")
        sha = repo.commit(files, branch)
        self.send(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, "pullRequestUrl": None})

    def branch(self, name: str, branch: str) -> None:
        self.body()
        repo = self.repo(name, write=True)
        if branch in repo.branches:
            raise Refused(409, message="Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        self.send(200, {})

    def yaml(self) -> None:
        self.body()
        self.send(200, {"errors": [], "warnings": []})


_NAME, _PART = r"((?:datasets/)?[^/]+/[^/]+)", r"([^/]+)"
_API = r"/api/(?:models/)?" + _NAME  # the repository of a model is user/name, of a data set datasets/user/name
ROUTES = (
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.yaml),
    ("GET", rf"{_API}", Handler.info),
    ("GET", rf"{_API}/revision/{_PART}", Handler.info),
    ("GET", rf"{_API}/tree/{_PART}", Handler.tree),
    ("GET", rf"{_API}/tree/{_PART}/(.+)", Handler.tree),
    ("POST", rf"{_API}/paths-info/{_PART}", Handler.paths_info),
    ("POST", rf"{_API}/preupload/{_PART}", Handler.preupload),
    ("POST", rf"{_API}/commit/{_PART}", Handler.commit),
    ("POST", rf"{_API}/branch/{_PART}", Handler.branch),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/lfs/upload/(\w+)", Handler.upload),
    ("POST", r"/lfs/verify/(\w+)", Handler.verify),
    ("GET HEAD", rf"/{_NAME}/resolve/{_PART}/(.+)", Handler.resolve),
)


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def everything(files: dict[str, bytes]) -> dict[str, dict[str, Any]]:
    """Files and folders of a commit, sorted, as a listing has them."""
    found = {path: listed(path, data) for path, data in files.items()}
    for path in files:
        for folder in map(str, list(PurePosixPath(path).parents)[:-1]):
            found[folder] = {"type": "directory", "path": folder, "size": 0, "oid": git_sha1(folder.encode())}
    return dict(sorted(found.items()))


def listed(path: str, data: bytes) -> dict[str, Any]:
    """A file as a listing has it."""
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_sha1(data)}
    if path.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


@contextmanager
def hub_server(cache: Path) -> Iterator[Hub]:
    """The Hub of this process, and an empty cache; both as the environment sets them when huggingface_hub is loaded."""
    from huggingface_hub import constants

    hub = Hub()
    server = Server(("127.0.0.1", 0), type("TheHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        use_hub(patch, hub.url, cache)
        patch.setenv("HF_TOKEN", TOKEN)
        assert hub.url == constants.ENDPOINT
        yield hub
    server.shutdown()
    server.server_close()
    thread.join()


def use_hub(patch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """What HF_ENDPOINT, HF_HOME and HF_HUB_DISABLE_XET do, in a process that has read them already."""
    from huggingface_hub import constants

    cache.mkdir(parents=True, exist_ok=True)
    assert urlsplit(url).scheme
    for name, value in {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }.items():
        patch.setattr(constants, name, value)
    patch.setenv("HF_ENDPOINT", url)
    patch.setenv("HF_HOME", str(cache))
    patch.setenv("HF_HUB_CACHE", str(cache))
    patch.setenv("HF_HUB_DISABLE_XET", "1")
    patch.delenv("HF_TOKEN", raising=False)

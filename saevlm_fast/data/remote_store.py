"""A store that is elsewhere: its index is read when it is opened, each shard fetched into the cache when it is needed.

A shard is compared with the SHA-256 that the index says when it arrives, so what is read is what was written, whatever
lies between. The cache may be smaller than the store.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

from torch import Tensor

from saevlm_fast.data.store import StoreIndex, map_shard_file, read_index_file
from saevlm_fast.errors import ActivationError
from saevlm_fast.remote.answers import NotThere
from saevlm_fast.remote.cache import fetched, telling_urls
from saevlm_fast.remote.files import RemoteFiles
from saevlm_fast.urls import child, url_of

AHEAD = 3  # shards that are fetched ahead of a reader that goes through a store in its order


class ArrivedFiles:
    """In the place of digests.CheckedFiles: what has arrived has been compared."""

    def __init__(self, files: Sequence[Path]):
        self.files = files

    def check(self, numbers: Iterable[int]) -> None:
        """Each is compared when it arrives."""

    def check_all(self) -> None:
        """The same: nothing is fetched for it."""

    def check_shared(self, rank: int, collect: Callable[[Any], list[Any]]) -> None:
        """The same."""


class RemoteStore:
    """The files of a store at a URL.

    Attributes:
        index, index_file: what the index says, and the copy of it here.
        shards: name -> tensor of every shard, mapped when it is asked for.
        files, items: where the shards and their item tables are here, once they are asked for.
    """

    def __init__(self, url: str, index: StoreIndex, index_file: Path):
        self.index, self.index_file, shards = index, index_file, index.shards
        digests = [shard.sha256 for shard in shards]
        urls = [child(url, shard.file) for shard in shards]
        self.shards: RemoteFiles[dict[str, Tensor]] = RemoteFiles(urls, digests, partial(_mapped, index))
        tables = [child(url, shard.items) for shard in shards]
        items: Any = RemoteFiles(tables, [shard.items_sha256 for shard in shards], _path)
        self.files, self.items = ArrivedFiles([]), ArrivedFiles(items)

    def ahead(self, numbers: Iterable[int]) -> None:
        """Have these shards fetched in the background."""
        self.shards.ahead(numbers)


class RemoteTensors(Sequence[Tensor]):
    """One tensor of every shard."""

    def __init__(self, store: RemoteStore, name: str):
        self._shards, self._name = store.shards, name

    def __len__(self) -> int:
        return len(self._shards)

    @overload
    def __getitem__(self, number: int) -> Tensor: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, number: int | slice) -> Any:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        return self._shards[number][self._name]


def open_remote_store(path: Path) -> RemoteStore:
    """The store at a URL, of which the index alone is fetched.

    Raises:
        ActivationError: there is none, or its index is damaged. RemoteError: it cannot be read.
    """
    url = url_of(path)
    try:
        file = fetched(child(url, "index.json")).path  # stays as long as this process
    except NotThere as error:
        raise ActivationError(f"{error}; a store of activations or codes has an index.json") from None
    with telling_urls():
        return RemoteStore(url, read_index_file(file), file)


def _mapped(index: StoreIndex, file: Path, number: int) -> dict[str, Tensor]:
    return map_shard_file(file, index.shards[number], index)


def _path(file: Path, number: int) -> Path:
    return file

"""Whether the rows of two sides belong to the same images: one row an image, row i of both the same image."""

from collections.abc import Iterator, Sequence
from itertools import repeat

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from saevlm_fast.data.codes import StoredCodes
from saevlm_fast.data.rows import Activations, StoredRows
from saevlm_fast.data.store import ITEM_SCHEMA
from saevlm_fast.errors import require

NOTHING = object()  # before the first row


def check_sides(activations: Activations | StoredCodes, embeddings: Activations) -> None:
    """That both have as many rows.

    Raises:
        ValueError: they have not; or, the likely reason, a store has several rows of one image.
    """
    if embeddings.n_rows == activations.n_rows:
        return
    for side in (activations, embeddings):
        if side.has_items:
            _check_one_row_per_image(side, side.items(range(min(side.n_rows, 4096))), 0)
    what = "codes" if isinstance(activations, StoredCodes) else "activations"
    raise ValueError(
        f"embeddings: {embeddings.n_rows} rows ({embeddings.path}), but {activations.n_rows} {what} "
        f"({activations.path}); row i of both must be image i"
    )


def check_rows_of_same_images(activations: StoredRows, embeddings: StoredRows, n: int = 65_536) -> None:
    """That row i of both is of one image; sides without ids are taken as they are, and an image may have several rows.

    Raises:
        ValueError: another number of rows, or a row that is of two images, by its number.
    """
    sides = activations, embeddings
    require(
        activations.n_rows == embeddings.n_rows,
        f"embeddings: {embeddings.n_rows} rows ({embeddings.path}), but {activations.n_rows} activations "
        f"({activations.path}); row i of both must be of one image",
    )
    if all(side.has_items for side in sides):
        for number, tables in enumerate(zip(*(side.item_chunks(n) for side in sides))):
            _check_same_images(sides, [table["image"] for table in tables], number * n)


def checked_ids(n: int, *sides: StoredRows, rows: range | None = None) -> Iterator[None]:
    """Checks the image ids of the sides, one or two, along with their chunks of n rows: one item for each chunk.

    Sides without ids (matrix files) are taken as they are. rows: of the chunks; the one before them is looked at too.

    Raises:
        ValueError: several rows of one image that lie together (check_images_once sees others), or two sides whose
            images differ, naming the row and both images.
    """
    start = 0 if rows is None else rows.start
    last = [side.items([start - 1]) if start and side.has_items else ITEM_SCHEMA.empty_table() for side in sides]
    for tables in zip(*(side.item_chunks(n, rows=rows) if side.has_items else repeat(None) for side in sides)):
        for i, (side, table) in enumerate(zip(sides, tables)):
            if table is not None:
                _check_one_row_per_image(side, pa.concat_tables([last[i], table]), start - len(last[i]))
                last[i] = table.slice(len(table) - 1)
        if len(sides) == 2 and None not in tables:
            _check_same_images(sides, [table["image"] for table in tables], start)
        start += n
        yield


def check_images_once(side: StoredRows) -> None:
    """ValueError: an image has rows that do not lie together, or is listed twice. A side without ids is taken as it is.

    Reads all ids: of a million images in order some milliseconds, in another order a second.
    """
    if not side.has_items:
        return
    names, last = [], NOTHING
    for table in side.item_chunks(65_536):
        column = table["image"].combine_chunks()
        if len(column) > 0:
            names.append(column.filter(pa.array(begins_image(column, last))))
            last = column[-1].as_py()
    check_once(side, names)


def begins_image(names: pa.Array, last: object = NOTHING) -> np.ndarray:
    """bool [n], n > 0: whether a row is of another image than the one before; last: the image before the first row."""
    changes = pc.not_equal(names[1:], names[:-1]).fill_null(True).to_numpy(zero_copy_only=False)
    return np.concatenate([[names[0].as_py() != last], changes]).astype(bool)


def check_once(side: StoredRows, parts: Sequence[pa.Array]) -> None:
    """ValueError: a name comes twice in the parts, which are of images of a side."""
    names = pa.chunked_array(parts, pa.string())
    if pc.all(pc.greater(names[1:], names[:-1]), skip_nulls=False).as_py():
        return  # in order, which is seen in a hundredth of the time
    twice = len(names) - names.null_count - pc.count_distinct(names).as_py()
    if twice > 0:
        counts = pc.value_counts(names.drop_null())
        name = counts.field("values")[pc.index(pc.greater(counts.field("counts"), 1), True).as_py()].as_py()
        needed = "an image is listed once, and its rows lie together"
        raise ValueError(f"{side.path}: {twice} images come twice, such as {name!r}; {needed}")


def _check_same_images(sides: tuple[StoredRows, ...], images: list[pa.ChunkedArray], start: int) -> None:
    row = pc.index(pc.equal(*images).fill_null(False), False).as_py()
    if row >= 0:
        first, second = (column[row].as_py() for column in images)
        raise ValueError(
            f"embeddings: row {start + row} is image {second!r} ({sides[1].path}), but {first!r} in {sides[0].path}; "
            "row i of both must be the same image"
        )


def _check_one_row_per_image(side: StoredRows, items: pa.Table, start: int) -> None:
    """Neighbours of one image are different tokens of it, which can be pooled; else it is listed twice."""
    before, after = items.slice(0, max(len(items) - 1, 0)), items.slice(1)
    found = pc.index(pc.equal(before["image"], after["image"]).fill_null(False), True).as_py()
    if found >= 0:
        row = start + found
        near = side.items(range(row, min(row + 4096, side.n_rows)))
        images, tokens = near["image"].to_pylist(), near["token"].to_pylist()
        require(tokens[0] != tokens[1], f"{side.path}: image {images[0]!r} is listed twice, in row {row} and the next")
        count = next((i for i, image in enumerate(images) if image != images[0]), len(images))
        raise ValueError(
            f"{side.path}: {count} rows of image {images[0]!r} (from row {row}); the score needs one row per image: "
            "harvest with --tokens cls or mean, --point pooled, or codes with --pool mean; ms-score pools by --pool max"
        )

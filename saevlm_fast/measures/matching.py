"""One-to-one matching of rows and columns by weight, on sparse candidates: Hungarian without the full matrix."""

from typing import Any

import numpy as np

TOP_CANDIDATES = 32
_GOLDEN = 0.6180339887498949


def sparse_assignment(
    rows_M: np.ndarray, columns_M: np.ndarray, weights_M: np.ndarray, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The matching of largest total weight among the candidates; who gains nothing stays unmatched.

    Args:
        rows_M, columns_M: the candidates, each pair once. weights_M: finite; those of at most 0 never pay.
        shape: (rows, columns).

    Returns:
        (rows, columns) of the matched, rows ascending.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    n_rows, n_columns = shape
    pays = weights_M > 0
    rows_M, columns_M, weights_M = rows_M[pays], columns_M[pays], weights_M[pays].astype(np.float64)
    if not len(rows_M):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    # A column of its own for every row, of weight 0: a full matching is there. Costs are above 0, as scipy wants.
    most = float(weights_M.max()) + 1
    cost = np.concatenate([most - weights_M, np.full(n_rows, most)])
    rows = np.concatenate([rows_M, np.arange(n_rows)])
    columns = np.concatenate([columns_M, n_columns + np.arange(n_rows)])
    places = (rows.astype(np.int32), columns.astype(np.int32))  # scipy before 1.15 takes no others
    graph = csr_array((cost, places), shape=(n_rows, n_columns + n_rows))
    matched_rows, matched = min_weight_full_bipartite_matching(graph)
    real = matched < n_columns
    order = np.argsort(matched_rows[real], kind="stable")
    return matched_rows[real][order].astype(np.int64), matched[real][order].astype(np.int64)


def top_of_groups(keys_M: np.ndarray, values_M: np.ndarray, n: int, ties_M: np.ndarray) -> np.ndarray:
    """Places of the n largest values of each key, keys ascending, the largest first, ties to the lower of ties_M.

    keys_M: whole numbers from 0.
    """
    near = np.flatnonzero(~(values_M < _floors(keys_M, values_M, n)[keys_M])) if len(keys_M) else np.zeros(0, np.int64)
    order = near[np.lexsort((ties_M[near], -values_M[near], keys_M[near]))]
    sorted_keys = keys_M[order]
    new = np.append(True, sorted_keys[1:] != sorted_keys[:-1]) if len(order) else np.zeros(0, bool)
    starts = np.flatnonzero(new)
    within = np.arange(len(order)) - (starts[np.cumsum(new) - 1] if len(order) else 0)
    return order[within < n]


def _floors(keys_M: np.ndarray, values_M: np.ndarray, n: int) -> np.ndarray:
    """By key, what its n-th largest value is not below: its values are dealt to n hands, and the lowest of the hands'
    largest is it. Few are above, so that few have to be sorted; an empty hand excludes nothing."""
    hands_M = (np.arange(len(keys_M)) * _GOLDEN % 1 * n).astype(np.int64)  # evenly, whatever order the keys are in
    most = np.full((int(keys_M.max()) + 1) * n, -np.inf)
    np.maximum.at(most, keys_M.astype(np.int64) * n + hands_M, values_M.astype(np.float64))
    return most.reshape(-1, n).min(1)


def row_of_entries(matrix: Any) -> np.ndarray:
    """The row of every entry of scipy's CSR matrix."""
    return np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))

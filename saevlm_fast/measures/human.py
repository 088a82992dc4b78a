"""Agreement of a score with 1,000 choices of people, from the archive that the authors of arXiv 2504.02821 released.

A choice is between the top images of two neurons: which ones are more alike. A score agrees where its larger value is
at the neuron that was chosen; equal values, and pairs with a value that is not defined, count half. Pooled agreement is
over all pairs; macro agreement weighs the bins of the released score's gap (DINOv2, .1 wide) alike, as the paper does:
pairs far apart are easy, and the macro mean is mostly of these. Intervals draw neurons anew, since a neuron is in
several pairs: a pair counts as often as the product of its neurons' draws.

The archive is metric_benchmark.tar.gz of ExplainableML/sae-for-vlm, which the user downloads and unpacks; nothing of it
comes with this package. Read here: pairs.csv, activations.csv, top16_images.csv; ._ files of macOS are passed over.
Shape suffixes: P pairs, K neurons, N images, R draws.
"""

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from saevlm_fast.data.rows import Activations
from saevlm_fast.errors import first_line, require
from saevlm_fast.measures.results import Figures, wilson
from saevlm_fast.scoring.monosemanticity import score
from saevlm_fast.scoring.variants import visaebench_score

PAIRS, TOPS, ACTIVATIONS = "pairs.csv", "top16_images.csv", "activations.csv"
RELEASED = ("dino", "clip")
_COLUMNS = ("k_x", "k_y", "R_user", "MS_x_dino", "MS_y_dino", "MS_x_clip", "MS_y_clip")
BIN = 0.1
LEAST_CORRELATION = 0.99  # of recomputed with released scores: below, the images are in another order
_DRAWS = 1000


@dataclass(frozen=True)
class Benchmark:
    """The pairs.

    Attributes:
        directory: of the three files. x_P, y_P: int64, neurons, places in `neurons`. neurons: their ids, sorted.
        chose_x_P: bool. released: dino, clip -> (scores of x [P], of y [P]).
    """

    directory: Path
    neurons: np.ndarray
    x_P: np.ndarray
    y_P: np.ndarray
    chose_x_P: np.ndarray
    released: dict[str, tuple[np.ndarray, np.ndarray]]

    @property
    def bin_P(self) -> np.ndarray:
        """int64: the bin of the released DINOv2 scores' gap."""
        x, y = self.released["dino"]
        return np.floor(np.abs(x - y) / BIN + 1e-9).astype(np.int64)

    def of_neurons(self, name: str) -> np.ndarray:
        """float64 [K]: the released score of every neuron. ValueError: a neuron has two."""
        found = np.full(len(self.neurons), np.nan)
        for places, values in zip((self.x_P, self.y_P), self.released[name]):
            known = np.isfinite(found[places])
            worst = np.abs(found[places] - values)[known].max(initial=0)
            require(worst < 1e-3, f"benchmark: {PAIRS}: a neuron has scores {worst:.3g} apart in MS_*_{name}")
            found[places] = values
        return found


def find_archive(directory: Path) -> Path:
    """The directory of pairs.csv: this one, or the only one below it that has it. ValueError: there is none, or two."""
    require(
        directory.is_dir(), f"benchmark: {directory} is not a directory; unpack metric_benchmark.tar.gz and give it"
    )
    found = sorted({path.parent for path in (directory / PAIRS, *directory.glob(f"*/{PAIRS}")) if path.is_file()})
    require(len(found) == 1, f"benchmark: {len(found)} directories with {PAIRS} in {directory}; give the one of them")
    return found[0]


def read_benchmark(directory: Path) -> Benchmark:
    """The pairs of an unpacked archive. ValueError: it is not there, or not of that layout."""
    folder = find_archive(directory)
    path = folder / PAIRS
    header, lines = _table(path)
    missing = [name for name in _COLUMNS if name not in header]
    require(not missing, f"benchmark: {path} has no column {missing[:1]}; it has {', '.join(header)}")
    require(len(lines) > 0, f"benchmark: {path} has no pairs")
    column = {name: [line[header.index(name)] for line in lines] for name in _COLUMNS}
    ids = {name: _integers(column[name], path, name) for name in ("k_x", "k_y")}
    require(not (ids["k_x"] == ids["k_y"]).any(), f"benchmark: {path}: a pair of one neuron with itself")
    numbers = {name: _numbers(column[name], path, name) for name in _COLUMNS[3:]}
    neurons = np.unique(np.concatenate([*ids.values()]))
    return Benchmark(
        folder,
        neurons,
        np.searchsorted(neurons, ids["k_x"]),
        np.searchsorted(neurons, ids["k_y"]),
        _choices(column["R_user"], ids, path),
        {name: (numbers[f"MS_x_{name}"], numbers[f"MS_y_{name}"]) for name in RELEASED},
    )


def _choices(texts: Sequence[str], ids: Mapping[str, np.ndarray], path: Path) -> np.ndarray:
    """Whether x was chosen, of ids of neurons, or of the letters x and y."""
    letters = [text.lower().removeprefix("k_") for text in texts]
    if set(letters) <= {"x", "y"}:
        return np.array([each == "x" for each in letters])
    chosen = _integers(texts, path, "R_user")
    fits = (chosen == ids["k_x"]) | (chosen == ids["k_y"])
    require(bool(fits.all()), f"benchmark: {path}: R_user of line {int(np.argmin(fits)) + 2} is neither k_x nor k_y")
    return chosen == ids["k_x"]


def _table(path: Path) -> tuple[list[str], list[list[str]]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header, *lines = [line for line in csv.reader(file, strict=True) if line] or [[]]
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"benchmark: {path}: {first_line(error)}") from None
    for number, line in enumerate(lines, 2):
        require(len(line) == len(header), f"benchmark: {path}: line {number} has {len(line)} cells, not {len(header)}")
    return [cell.strip() for cell in header], [[cell.strip() for cell in line] for line in lines]


def _numbers(texts: Sequence[str], path: Path, name: str) -> np.ndarray:
    try:
        found = np.array([float(text) for text in texts])
    except ValueError as error:
        raise ValueError(f"benchmark: {path}: {name}: {first_line(error)}") from None
    require(bool(np.isfinite(found).all()), f"benchmark: {path}: {name} is not finite everywhere")
    return found


def _integers(texts: Sequence[str], path: Path, name: str) -> np.ndarray:
    found = _numbers(texts, path, name)
    whole = (found == np.floor(found)) & (np.abs(found) < 2**53)
    require(bool(whole.all()), f"benchmark: {path}: {name} has {texts[int(np.argmin(whole))]!r}, not a neuron's number")
    return found.astype(np.int64)


def _vectors(path: Path, what: str) -> Iterator[tuple[int, np.ndarray]]:
    """(k, values) of every line of a wide table; a header, whose first cell is no number, is passed over."""
    require(path.is_file(), f"benchmark: {path} is missing")
    width = None
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                first, _, rest = line.strip().partition(",")
                if not first or (number == 1 and not first.strip().lstrip("-").replace(".", "", 1).isdigit()):
                    continue
                values = np.array(rest.split(","), np.float64)
                width = width or len(values)
                require(len(values) == width, f"line {number} has {len(values)} {what}, not {width}")
                require(bool(np.isfinite(values).all()), f"line {number} has {what} that are not finite")
                yield int(float(first)), values
    except (OSError, ValueError, OverflowError) as error:
        message = first_line(error)
        raise ValueError(message if str(path) in message else f"benchmark: {path}: {message}") from None


def _of_neurons(benchmark: Benchmark, name: str, what: str, dtype: np.dtype | type) -> np.ndarray:
    """[K, width] in the order of the benchmark's neurons. ValueError: one of them is missing, or there twice."""
    path = benchmark.directory / name
    place = {int(k): i for i, k in enumerate(benchmark.neurons)}
    found: np.ndarray | None = None
    seen: set[int] = set()
    for k, values in _vectors(path, what):
        if k not in place:
            continue
        require(k not in seen, f"benchmark: {path}: neuron {k} stands twice")
        seen.add(k)
        found = np.empty((len(place), len(values)), dtype) if found is None else found
        found[place[k]] = values
    missing = [k for k in place if k not in seen]
    require(
        found is not None and not missing, f"benchmark: {path}: no line of {len(missing)} neurons, as {missing[:1]}"
    )
    assert found is not None
    return found


def read_activations(benchmark: Benchmark) -> np.ndarray:
    """float32 [K, N]: of the neurons in pairs, on the validation images."""
    return _of_neurons(benchmark, ACTIVATIONS, "activations", np.float32)


def read_scores(path: Path, benchmark: Benchmark) -> np.ndarray:
    """float64 [K], NaN where there is none, of a CSV with columns k and score (or the first two).

    Raises:
        ValueError: no such file, a neuron twice, no neuron of the benchmark.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = [line for line in csv.reader(file, strict=True) if line]
        header = [cell.strip().lower() for cell in lines[0]] if lines else []
        named = "k" in header and "score" in header
        at = (header.index("k"), header.index("score")) if named else (0, 1)
        values = {}
        for number, line in enumerate(lines[1:] if named or not _is_number(header[:1]) else lines, 2):
            require(len(line) > max(at), f"line {number} has {len(line)} cells")
            k = int(float(line[at[0]]))
            require(k not in values, f"neuron {k} stands twice")
            values[k] = float(line[at[1]] or "nan")
    except (OSError, ValueError, OverflowError, csv.Error) as error:
        raise ValueError(f"scores: {path}: {first_line(error)}") from None
    found = np.array([values.get(int(k), math.nan) for k in benchmark.neurons])
    require(bool(np.isfinite(found).any()), f"scores: {path} has none of the benchmark's {len(found)} neurons")
    return found


def _is_number(cells: Sequence[str]) -> bool:
    try:
        return bool(cells) and math.isfinite(float(cells[0]))
    except ValueError:
        return False


# Scores ---------------------------------------------------------------------------------------------------------------


def baselines(acts_KN: np.ndarray) -> dict[str, np.ndarray]:
    """What needs no images: the number of images that a neuron fires on, and its largest activation, [K] each."""
    return {"n_active": (acts_KN > 0).sum(1).astype(float), "max_activation": acts_KN.max(1).astype(float)}


def ms_variants(
    acts_KN: np.ndarray, embeddings: Activations, device: torch.device | str = "cpu"
) -> dict[str, np.ndarray]:
    """paper and visaebench, [K] each, NaN where not defined. ValueError: another number of images."""
    n_images = acts_KN.shape[1]
    require(
        embeddings.n_rows == n_images,
        f"embeddings: {embeddings.path} has {embeddings.n_rows} rows; {ACTIVATIONS} is of {n_images} images",
    )
    acts_NK = torch.from_numpy(acts_KN).T.contiguous()
    return {
        "paper": score(acts_NK, embeddings, device=device).ms.double().numpy(),
        "visaebench": visaebench_score(acts_NK, embeddings, device=device).ms.double().numpy(),
    }


def top_cosine(benchmark: Benchmark, embeddings: Activations) -> np.ndarray:
    """float64 [K]: the mean cosine of the 16 training images that people saw.

    Raises:
        ValueError: numbers of images that there are not.
    """
    tops_KT = _of_neurons(benchmark, TOPS, "images", np.int64)
    low, high = int(tops_KT.min()), int(tops_KT.max())
    require(
        low >= 0 and high < embeddings.n_rows,
        f"grid_embeddings: {embeddings.path} has {embeddings.n_rows} rows; {TOPS} names images {low} to {high}",
    )
    numbers, where = np.unique(tops_KT, return_inverse=True)
    unit = torch.nn.functional.normalize(embeddings.rows(torch.from_numpy(numbers)).double(), dim=1)
    sums_KE = unit[torch.from_numpy(where.reshape(tops_KT.shape))].sum(1)
    n = tops_KT.shape[1]
    return ((sums_KE.pow(2).sum(1) - n) / (n * (n - 1))).numpy()


def verify_order(benchmark: Benchmark, paper_K: np.ndarray) -> tuple[str, float]:
    """Which released score was recomputed, dino or clip, and the correlation with it.

    Raises:
        ValueError: with neither it is near 1: the images are in another order, or embedded by another model.
    """
    found = {}
    for name in RELEASED:
        released_K = benchmark.of_neurons(name)
        both = np.isfinite(released_K) & np.isfinite(paper_K)
        spread = both.sum() > 2 and released_K[both].std() > 0 and paper_K[both].std() > 0
        found[name] = float(np.corrcoef(released_K[both], paper_K[both])[0, 1]) if spread else 0.0
    best = max(found, key=lambda name: found[name])
    require(
        found[best] >= LEAST_CORRELATION,
        "embeddings: the score that they give correlates with the released ones by "
        f"{', '.join(f'{value:.3f} ({name})' for name, value in found.items())}, not 1: their rows are in another "
        "order of the images, or of another model than DINOv2-B or CLIP-B/32",
    )
    return best, found[best]


# Agreement ------------------------------------------------------------------------------------------------------------


def agreement(benchmark: Benchmark, score_K: np.ndarray) -> Figures:
    """How often a score prefers the neuron that people did.

    Returns:
        pooled, macro: value, n, status, interval (95 %, neurons drawn anew); bins: from, to, n, value, interval
        (Wilson); ties: pairs counted half, of equal values; undefined: of values that are not there; logistic: the fit
        P(agree) = 1 / (1 + exp(-(intercept + slope gap))) over the gap of the score itself.
    """
    x_P, y_P = score_K[benchmark.x_P], score_K[benchmark.y_P]
    agree_P, undefined_P = _agree(benchmark, x_P, y_P)
    bins_P, n = benchmark.bin_P, len(agree_P)
    bins = []
    for each in np.unique(bins_P):
        inside = agree_P[bins_P == each]
        value = float(inside.mean())
        low = float(each * BIN)
        bins.append(
            {"from": low, "to": low + BIN, "n": len(inside), "value": value, "interval": wilson(value, len(inside))}
        )
    intervals = _intervals(benchmark, agree_P, bins_P)
    status = "defined" if n > int(undefined_P.sum()) else "too few"
    defined_P = ~undefined_P
    return {
        "pooled": {"value": float(agree_P.mean()), "n": n, "status": status, "interval": intervals[0]},
        "macro": {
            "value": float(np.mean([each["value"] for each in bins])),
            "n": len(bins),
            "status": status,
            "interval": intervals[1],
        },
        "bins": bins,
        "ties": int(((x_P == y_P) & defined_P).sum()),
        "n_undefined": int(undefined_P.sum()),
        "logistic": _logistic(np.abs(x_P - y_P)[defined_P], agree_P[defined_P]),
    }


def _agree(benchmark: Benchmark, x_P: np.ndarray, y_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float64 [P]: 1, 0 or a half; and where a value is not defined."""
    undefined_P = ~(np.isfinite(x_P) & np.isfinite(y_P))
    agree_P = ((x_P > y_P) == benchmark.chose_x_P).astype(float)
    agree_P[undefined_P | (x_P == y_P)] = 0.5
    return agree_P, undefined_P


def _intervals(benchmark: Benchmark, agree_P: np.ndarray, bins_P: np.ndarray) -> tuple[list[float], list[float]]:
    """Of the pooled and the macro mean."""
    generator = np.random.default_rng(0)
    k = len(benchmark.neurons)
    drawn_RK = generator.multinomial(k, np.full(k, 1 / k), _DRAWS)
    weight_RP = (drawn_RK[:, benchmark.x_P] * drawn_RK[:, benchmark.y_P]).astype(float)
    means = [_weighted(weight_RP, agree_P)]
    per_bin = [_weighted(weight_RP[:, bins_P == each], agree_P[bins_P == each]) for each in np.unique(bins_P)]
    filled_R = np.isfinite(per_bin).any(0)
    means.append(np.nanmean(np.array(per_bin)[:, filled_R], 0) if filled_R.any() else np.full(1, np.nan))
    first, second = ([float(each) for each in np.nanquantile(values, [0.025, 0.975])] for values in means)
    return first, second


def _weighted(weight_RP: np.ndarray, agree_P: np.ndarray) -> np.ndarray:
    total_R = weight_RP.sum(1)
    return np.divide(weight_RP @ agree_P, total_R, out=np.full(len(total_R), np.nan), where=total_R > 0)


def _logistic(gap_P: np.ndarray, agree_P: np.ndarray) -> Figures:
    """Newton's method; half agreements count as half of each."""
    nothing = {"intercept": math.nan, "slope": math.nan}
    spread = float(gap_P.std()) if len(gap_P) > 2 else 0.0
    if spread == 0 or not math.isfinite(spread):
        return nothing
    x_P2 = np.stack([np.ones(len(gap_P)), gap_P / spread], 1)
    beta = np.zeros(2)
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(x_P2 @ beta, -50, 50)))
        hessian = (x_P2 * (p * (1 - p))[:, None]).T @ x_P2
        if not np.isfinite(hessian).all() or abs(np.linalg.det(hessian)) < 1e-12:
            return nothing  # the gap tells them apart without an error: there is no finite fit
        step = np.linalg.solve(hessian, x_P2.T @ (agree_P - p))
        beta += step
        if np.abs(step).max() < 1e-10:
            return {"intercept": float(beta[0]), "slope": float(beta[1] / spread)}
    return nothing


def against_dino(benchmark: Benchmark, score_K: np.ndarray) -> Figures:
    """McNemar's exact test against the released score by DINO, over pairs that both decide.

    Returns:
        only_this, only_released: pairs that one of them gets right; p.
    """
    mine_P, _ = _agree(benchmark, score_K[benchmark.x_P], score_K[benchmark.y_P])
    theirs_P, _ = _agree(benchmark, *benchmark.released["dino"])
    decided_P = (mine_P != 0.5) & (theirs_P != 0.5)
    only_this = int((decided_P & (mine_P > theirs_P)).sum())
    only_released = int((decided_P & (mine_P < theirs_P)).sum())
    n, least = only_this + only_released, min(only_this, only_released)
    tail = sum(math.comb(n, i) for i in range(least + 1)) / 2**n if n else 1.0
    return {"only_this": only_this, "only_released": only_released, "p": min(1.0, 2 * tail)}


def all_agreements(benchmark: Benchmark, scores: Mapping[str, np.ndarray]) -> dict[str, Figures]:
    """Of the released scores, of `scores` [K] by name, and of a coin."""
    everything = {f"released, {name}": benchmark.of_neurons(name) for name in RELEASED} | dict(scores)
    found = {
        name: agreement(benchmark, each) | {"against_dino": against_dino(benchmark, each)}
        for name, each in everything.items()
    }
    return found | {"random": agreement(benchmark, np.zeros(len(benchmark.neurons)))}

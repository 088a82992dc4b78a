"""The goals of a GPU, each beside what was measured: one line of GOALS is one line of the table.

Times are those of one H200; another chip's are held against them all the same.
"""

from collections.abc import Callable
from typing import NamedTuple

Result = dict  # both as in report.py
Run = dict


class Measured:
    """Results and runs of a GPU, looked up by what they are. None: not measured. Of several the last one counts."""

    def __init__(self, results: list[Result], runs: list[Run]):
        on_gpu = [
            result for result in results if result["extra_info"].get("device", "cpu") != "cpu" and result["stats"]
        ]
        self.results = {_key(result): result for result in on_gpu if "failed" not in result["extra_info"]}
        self.runs = [run for run in runs if run["device"] != "cpu"]

    def ms(self, operation: str, case: str, impl: str) -> float | None:
        found = self.results.get((operation, case, impl))
        return 1e3 * found["stats"]["median"] if found else None

    def of_ours(self, operation: str, case: str, impl: str) -> float | None:
        found = self.results.get((operation, case, impl))
        return found["extra_info"].get("this_over_ours") if found else None

    def run(self, name: str, eager_share: float = 0.5) -> float | None:
        """A number of the last run of `train` that has goals (_has_goals), most steps of which were replayed."""
        trained = [run for run in self.runs if name in run and _has_goals(run["settings"])]
        replayed = [run[name] for run in trained if run.get("eager_share", 1.0) < eager_share]
        return replayed[-1] if replayed else None

    def harvest(self) -> float | None:
        """Images per second of the last long harvest in bfloat16 over those of the forward alone."""
        harvests = [run for run in self.runs if "harvests" in run and run["settings"]["dtype"] == "bfloat16"]
        if not harvests:
            return None
        alone = next(iter(harvests[-1]["forward"]["images_per_second"].values()))
        return max(one["images_per_second"]["long run"] for one in harvests[-1]["harvests"]) / alone


def _has_goals(settings: dict[str, str]) -> bool:
    """Whether a run of `train` is at 16,384 latents, on data of as many concepts, so that none dies, and was not told
    to leave its data on the host. Runs of before it could be told of concepts do not say theirs."""
    concepts = settings.get("concepts", "16384")
    many = concepts != "None" and int(concepts) >= 16384  # None: two for every column
    return settings["d_sae"] == "16384" and many and settings.get("data_on") != "host"


def _key(result: Result) -> tuple[str, str, str]:
    """bfloat16 is another way, except for the libraries beside ours, which have no other."""
    info = result["extra_info"]
    low = info["dtype"] == "bfloat16" and "duties" not in info
    return info["operation"], info["case"], info["impl"] + " bfloat16" * low


class Goal(NamedTuple):
    """found: the number that is to be at most, or at least, the limit; None where it was not measured."""

    what: str
    limit: float
    unit: str
    found: Callable[[Measured], float | None]
    at_least: bool = False

    def row(self, measured: Measured) -> list[str]:
        """Cells of HEADER."""
        found = self.found(measured)
        goal = f"{'>=' if self.at_least else '<='} {self.limit:g}{self.unit}"
        if found is None:
            return [self.what, goal, "", "not measured"]
        met = found >= self.limit if self.at_least else found <= self.limit
        return [self.what, goal, f"{found:.3g}{self.unit}", "yes" if met else "no"]


HEADER = ["what", "goal", "measured", "met"]


def step(d_sae: int, limit: float) -> Goal:
    found = lambda of: of.ms("topk training step", f"d_sae {d_sae}", "captured")  # noqa: E731
    return Goal(f"TopK step, {d_sae:,} latents", limit, " ms", found)


def beside(d_sae: int, library: str, limit: float) -> Goal:
    found = lambda of: of.of_ours("topk training step", f"d_sae {d_sae}", library)  # noqa: E731
    return Goal(f"TopK step of {library} over ours, {d_sae:,} latents", limit, "x", found, at_least=True)


def within(architecture: str, d_sae: int) -> Goal:
    def found(of: Measured) -> float | None:
        ms, topk = (of.ms(f"{name} training step", f"d_sae {d_sae}", "captured") for name in (architecture, "topk"))
        return ms / topk if ms and topk else None

    return Goal(f"{architecture} step over TopK's, {d_sae:,} latents", 1.25, "x", found)


def time_of(what: str, limit: float, operation: str, case: str, impl: str) -> Goal:
    return Goal(what, limit, " ms", lambda of: of.ms(operation, case, impl))


def pairs(similarity: str, case: str, limit: float) -> Goal:
    operation = f"pair sums of raw neurons, {similarity}"
    return time_of(f"all pairs, {similarity}, {case}", limit, operation, case, "pairwise")


BY_N = "score by number of images"
GOALS = [
    step(65536, 2.3),
    step(16384, 0.9),
    step(6144, 0.55),
    *(within(name, d_sae) for d_sae in (65536, 16384, 6144) for name in ("batch_topk", "matryoshka")),
    beside(65536, "sparsify", 4.5),
    beside(65536, "dictionary-learning", 6.0),
    *(beside(16384, library, 5.0) for library in ("sparsify", "dictionary-learning")),
    time_of("TopK encode, 65,536 latents", 1.05, "topk encode", "d_sae 65536", "captured"),
    pairs("cosine", "N=10000, K=1024", 0.7),
    pairs("cosine", "N=20000, K=4096", 3.6),
    pairs("rbf", "N=10000, K=1024", 4.5),
    pairs("rbf", "N=20000, K=4096", 38.0),
    time_of("raw neurons' score, 5,000 x 768", 0.3, "score on a device: raw neurons", "N 5000", "ours"),
    time_of("streamed score, 200,000 images", 10.0, BY_N, "N=200000", "streamed"),
    time_of("streamed score, 1,281,167 images", 100.0, BY_N, "N=1281167", "streamed"),
    Goal("train at 16,384 latents", 900.0, " steps/s", lambda of: of.run("steps_per_second"), at_least=True),
    Goal("share of the step in train's loop", 0.9, "", lambda of: of.run("step_share_of_loop"), at_least=True),
    Goal("harvest over its forward alone", 0.95, "x", Measured.harvest, at_least=True),
]


def goal_rows(results: list[Result], runs: list[Run]) -> list[list[str]]:
    """Rows of HEADER; none where nothing that has a goal was measured on a GPU."""
    measured = Measured(results, runs)
    rows = [goal.row(measured) for goal in GOALS]
    return rows if any(row[2] for row in rows) else []

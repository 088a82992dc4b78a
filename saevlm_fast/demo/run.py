"""The demo's order: scenes, SAEs, scores of their latents against raw neurons and the truth, steering, a
picture, pages."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from saevlm_fast.config import Architecture, DemoOptions, RunOptions
from saevlm_fast.demo.scene_stores import N_SCENES, RECIPE, TOWER, SceneStores, harvest_scenes
from saevlm_fast.demo.scores import ARCHITECTURES, RAW, Measured, Scored, picture, train_on_scenes
from saevlm_fast.demo.steering import LLAVA, N_PATCH_SCENES, PATCHES, SteeringExample, steer_colours
from saevlm_fast.errors import goes_on
from saevlm_fast.files import remove_leftovers, write_json_atomic
from saevlm_fast.look.contact_sheet import save_sheet
from saevlm_fast.look.report import make_report
from saevlm_fast.look.settings import ReportSettings
from saevlm_fast.outputs import check_absent, output_lock
from saevlm_fast.publishing.card import write_card
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring.tables import write_scores
from saevlm_fast.training.checkpoints import RUN_FILE
from saevlm_fast.training.evaluate import Metrics

N_STEPS = 6
FILES = ("latents.png", "summary.json", "scores-*.parquet", "batch_topk/", "matryoshka/", "patches/", "report/")


class Report(Protocol):
    """Who watches the demo."""

    def step(self, number: int, what: str) -> None:
        """A step of N_STEPS begins."""
        ...

    def message(self, text: str) -> None:
        """Something beside it."""
        ...

    def harvesting(self) -> AbstractContextManager[Callable[[int, int, int], None]]:
        """Called with images done, images in all, and skipped ones."""
        ...

    def training(
        self, steps: int
    ) -> AbstractContextManager[tuple[Callable[[int, Metrics], None], Callable[[int], None]]]:
        """on_log and on_step of a training run."""
        ...

    def counting(self, what: str, total: int | None = None) -> AbstractContextManager[Callable[..., None]]:
        """Called with the number done, and of all if it was not known before."""
        ...


@dataclass(frozen=True)
class Demonstrated:
    """What came out: the lines of the table, and what steering did."""

    table: list[Measured]
    steered: SteeringExample

    def summary(self) -> dict[str, Any]:
        """JSON: summary.json."""
        return {
            "scores": [line.to_dict() for line in self.table],
            "steering": [asdict(line) for line in self.steered.latents],
        }


def run_demo(options: DemoOptions, report: Report) -> Demonstrated:
    """All of it, into options.output; what an earlier run has finished there is not done again, unless force.

    Raises:
        ValueError: a directory that holds runs of other settings, or files of these names that no demo has written.
        Interrupted: the same call goes on where it stopped.
    """
    with output_lock(options.output, directory=True):
        check_demo(options)
        remove_leftovers(options.output)
        return _run_demo(options, Path(options.output), report)


def check_demo(options: DemoOptions, also: tuple[str, ...] = ()) -> None:
    """ValueError: files of a demo's names (and others') are there, but no demo that could be gone on with, and no
    force."""
    output = Path(options.output)
    begun = (output / ARCHITECTURES[0] / RUN_FILE).exists()
    files = [path for name in (*FILES, "scene.png", *also) if not name.endswith("/") for path in _named(output, name)]
    check_absent(files, options.force or begun)


def _named(output: Path, name: str) -> list[Path]:
    return list(output.glob(name)) if "*" in name else [output / name]


def _run_demo(options: DemoOptions, output: Path, report: Report) -> Demonstrated:
    report.step(1, f"scenes through {TOWER} ({N_SCENES['train']:,} to train on, {N_SCENES['test']:,} to test on)")
    train_on, test_on = (_scenes(split, n, "cls", options, report) for split, n in N_SCENES.items())
    trained: dict[str, tuple[SparseAutoencoder | None, Metrics | None]] = {RAW: (None, None)}
    for i, architecture in enumerate(ARCHITECTURES):
        report.step(2 + i, f"training a {architecture} SAE")
        trained[architecture] = _trained(
            architecture, architecture, train_on, test_on, RECIPE["steps"], options, report
        )
    report.step(4, "scoring every latent against images and labels")
    scored = []
    for name, (sae, _) in trained.items():
        with report.counting("score", N_SCENES["test"]) as advance:
            scored.append(Scored(name, test_on, sae, advance))
        write_scores(scored[-1].scores, output / f"scores-{name.replace(' ', '-')}.parquet")
    table = [each.measured(metrics) for each, (_, metrics) in zip(scored, trained.values())]
    report.step(5, f"an SAE of patches, and {LLAVA} steered by its latents")
    steered, patches = _steered(options, report)
    found = Demonstrated(table, steered)
    write_json_atomic(output / "summary.json", found.summary())
    save_sheet(picture(scored, found.steered.section()), output / "latents.png")
    for image in found.steered.images[:1]:
        save_sheet(image, output / "scene.png")
    report.step(N_STEPS, "pages to look around in")
    _look(options, patches, report)
    return found


class _Watcher:
    """Tells the demo's watcher of a report's steps."""

    def __init__(self, report: Report):
        self.report = report

    def step(self, what: str, total: int | None) -> AbstractContextManager[Callable[[int], None]]:
        return self.report.counting(what, total)

    def warn(self, text: str) -> None:
        self.report.message(text)


def _look(options: DemoOptions, patches: SceneStores, report: Report) -> None:
    """Pages about the SAE of patches, with heat maps, in place of those that an earlier demo made."""
    output = Path(options.output)
    settings = ReportSettings(
        sae=(str(output / "patches"),),
        output=output / "report",
        activations=patches.activations,
        embeddings=patches.embeddings,
        text_model=f"hf:{TOWER}",
        device=options.device,
        force=True,
    )
    with goes_on():
        make_report(settings, _Watcher(report), f"Latents of patches of scenes, {TOWER}")


def _steered(options: DemoOptions, report: Report) -> tuple[SteeringExample, SceneStores]:
    """What steering did, and the test scenes' patches."""
    train_on, test_on = (_scenes(split, n, PATCHES[split], options, report) for split, n in N_PATCH_SCENES.items())
    sae, _ = _trained("batch_topk", "patches", train_on, test_on, RECIPE["steps"] // 2, options, report)
    with report.counting("steer") as advance:
        return steer_colours(sae, test_on, advance), test_on


def _scenes(split: str, n: int, tokens: str, options: DemoOptions, report: Report) -> SceneStores:
    with report.harvesting() as on_images:
        return harvest_scenes(
            split, n, tokens=tokens, device=options.device, on_message=report.message, on_images=on_images
        )


def _trained(
    architecture: Architecture,
    name: str,
    train_on: SceneStores,
    test_on: SceneStores,
    steps: int,
    options: DemoOptions,
    report: Report,
) -> tuple[SparseAutoencoder, Metrics]:
    run = RunOptions(Path(options.output) / name, options.device, resume=not options.force, force=options.force)
    with report.training(steps) as (on_log, on_step), goes_on():
        made = train_on_scenes(architecture, train_on, test_on, steps, run, on_log, on_step)
    write_card(Path(options.output) / name)
    return made

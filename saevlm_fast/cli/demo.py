"""saevlm-fast demo: the whole way on what is in the box."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Column

from saevlm_fast.cli.options import Plan, WorkOptions, command
from saevlm_fast.cli.planning import (
    check_writable,
    disk_figures,
    memory_figures,
    time_figures,
)
from saevlm_fast.cli.record import SETTINGS_FILE, Record
from saevlm_fast.cli.scenes import scene_widths
from saevlm_fast.cli.terminal import Bar, HarvestBar, TrainBar, out, print_table, say, tell
from saevlm_fast.config import DemoOptions, SAEConfig, TrainConfig
from saevlm_fast.training.memory import Written, training_disk

if TYPE_CHECKING:
    from saevlm_fast.demo.scores import Measured
    from saevlm_fast.demo.steering import ColourLatent


@dataclass(frozen=True, kw_only=True)
class DemoArguments(DemoOptions, WorkOptions):
    """Options of `saevlm-fast demo`."""


class _Report:
    """Shows the demo's steps and their progress."""

    def step(self, number: int, what: str) -> None:
        from saevlm_fast.demo.run import N_STEPS

        out.print(f"\n[{number}/{N_STEPS}] {what}", style="bold", highlight=False, soft_wrap=True)

    def message(self, text: str) -> None:
        tell(text)

    @contextmanager
    def harvesting(self) -> Iterator[Callable[[int, int, int], None]]:
        with HarvestBar() as bar:
            yield bar.on_images

    @contextmanager
    def training(self, steps: int) -> Iterator[tuple[Callable[[int, dict[str, float]], None], Callable[[int], None]]]:
        with TrainBar(steps) as bar:
            yield bar.on_log, bar.on_step

    @contextmanager
    def counting(self, what: str, total: int | None = None) -> Iterator[Callable[..., None]]:
        with Bar(what, total) as bar:
            yield bar.update


def plan(options: DemoArguments) -> Plan:
    """What would be made; the time of training from two steps, and nothing said of the rest."""
    from saevlm_fast.demo.run import check_demo
    from saevlm_fast.demo.scene_stores import N_SCENES, RECIPE
    from saevlm_fast.demo.steering import N_PATCH_SCENES
    from saevlm_fast.runtime import resolve_device
    from saevlm_fast.training.memory import most_memory_of

    device = resolve_device(options.device)
    check_writable(options.output)
    check_demo(options.part(DemoOptions), (SETTINGS_FILE,))
    sae = SAEConfig.sized(scene_widths()[0], expansion=RECIPE["expansion"], k=RECIPE["k"])
    config = TrainConfig(
        steps=RECIPE["steps"] * 5 // 2, batch_size=RECIPE["batch_size"], dead_after=RECIPE["dead_after"]
    )
    timed = time_figures(sae, config, N_SCENES["train"], device)
    n_scenes = sum(N_SCENES.values()) + sum(N_PATCH_SCENES.values())
    figures = {
        "scenes": n_scenes,
        "saes": f"3 of {sae.d_in} -> {sae.d_sae}, {config.n_steps:,} steps together",
        **memory_figures(
            device, most_memory_of(sae, config, N_SCENES["train"], device), without="the program and the models"
        ),
        **disk_figures(options.output, 3 * training_disk(sae, written=Written.IN_TURN)),
        **{f"training_{name}": value for name, value in timed.items()},
        "time_of_harvest_scores_and_steering": "not estimated",
    }
    return Plan("scenes, three SAEs, scores, steering and a picture", figures)


@command("demo", plan=plan)
def demo(options: DemoArguments) -> dict[str, Any]:
    """The whole way on what is in the box: scenes, SAEs, their scores against raw neurons and the truth, a picture."""
    from saevlm_fast.demo.run import check_demo, run_demo
    from saevlm_fast.outputs import output_lock

    begun = time.monotonic()
    with output_lock(options.output, directory=True):
        check_demo(options.part(DemoOptions), (SETTINGS_FILE,))
        found = run_demo(options.part(DemoOptions), _Report())
        Record("demo", options, options.output).write()
    _print_scored(found.table)
    _print_steered(found.steered.latents)
    _print_files(options.output, found.steered.latents, time.monotonic() - begun)
    return {"output": str(options.output), **found.summary()}


def _print_scored(table: "list[Measured]") -> None:
    names = ("latents", "EV", "L0", "MS", "best", "purity", "MS~purity")
    columns = (Column("", no_wrap=True), *(Column(name, justify="right", no_wrap=True) for name in names))
    rows = [
        (
            line.name,
            f"{line.seen}/{line.latents}",
            "" if line.explained_variance is None else f"{line.explained_variance:.3f}",
            "" if line.l0 is None else f"{line.l0:.1f}",
            f"{line.ms_mean:.3f} +- {line.ms_std:.3f}",
            f"{line.ms_best:.3f}",
            f"{line.purity:.3f}",
            f"{line.correlation:.2f}",
        )
        for line in table
    ]
    print_table(columns, rows, plain=True)
    say(
        "Latents: those that fire on 50 test scenes or more, of all; the scores are theirs. MS: whether a latent's",
        "images look alike to the model. Purity: whether they share a known factor, above its base rate. MS~purity:",
        "rank correlation. EV: explained variance. All on scenes that no SAE was trained on.",
    )


def _print_steered(latents: "list[ColourLatent]") -> None:
    from saevlm_fast.demo.steering import QUESTION

    if not latents:
        say("No latent of the patches stands for a colour, so nothing was steered.")
        return
    strongest = {each.colour: each for each in reversed(latents)}
    rows = []
    for each in sorted(strongest.values(), key=lambda each: -each.alpha):
        shares = (f"{share:.0%}" for share in _shares(each))
        rows.append((each.colour, str(each.latent), f"{each.purity:.2f}", f"{each.alpha:.1f}", *shares))
    means = (sum(column) / len(latents) for column in zip(*map(_shares, latents)))
    rows.append((f"all {len(latents)}", "", "", "", *(f"{mean:.0%}" for mean in means)))
    names = ("latent", "purity", "clamped to", "as it is", "SAE alone", "random", "clamped")
    print_table(("colour", *names), rows, plain=True)
    say(
        f'Answers that are the latent\'s colour, to "{QUESTION}" about objects of other colours: of tiny-llava as it',
        "is, with the SAE in place, with a random latent clamped, with this one clamped. The strongest latent of each",
        "colour; in the last line the mean of all that stand for a colour (summary.json has each).",
    )


def _shares(each: "ColourLatent") -> tuple[float, ...]:
    return each.before, each.attached, each.random, each.clamped


def _print_files(output: Path, latents: "list[ColourLatent]", seconds: float) -> None:
    from saevlm_fast.demo.run import FILES
    from saevlm_fast.demo.scene_stores import LAYER
    from saevlm_fast.demo.steering import LLAVA, QUESTION

    say(f"{seconds:.0f} s; wrote {', '.join(str(output / name) for name in FILES)}")
    say(f"Look at the picture, and open {output / 'report' / 'index.html'} in a browser.")
    for each in latents[:1]:
        say("Steer it yourself:")
        say(
            f"  saevlm-fast steer --model hf:{LLAVA} --sae {output / 'patches'} --layer {LAYER} --image "
            f"{output / 'scene.png'} --prompt '{QUESTION}' --latent {each.latent} --alpha {each.alpha:.0f}"
        )
    say("Next, the real thing:")
    say(
        "  saevlm-fast harvest --model hf:openai/clip-vit-large-patch14-336 --images imagenet/train "
        "--output clip-train --layer 22"
    )

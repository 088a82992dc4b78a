"""Several SAEs trained while the data passes once: every batch is read and normalised once, and each takes its step.

    trained = train_many(x_ND, {"k5": SAEConfig.sized(64, k=5), "k10": SAEConfig.sized(64, k=10)}, steps=500)

What decides the batches is the same for all (TrainConfig.shared). Each SAE is, to the bit, the one that `train` makes
alone, and so is its directory. A run that was killed goes on from the earliest of the newest checkpoints: an SAE whose
own is later waits until the data has come that far.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from saevlm_fast.config import RunOptions, SAEConfig, TrainConfig
from saevlm_fast.data.passes import told_of_passes
from saevlm_fast.data.rows import Matrix
from saevlm_fast.errors import Interrupted, check_kind, require
from saevlm_fast.outputs import workplace
from saevlm_fast.runtime import interruptible, one_thread, own_defaults, resolve_device, tf32_products
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training.capture import CapturedSteps, told_of_compiling
from saevlm_fast.training.checkpoints import latest_checkpoint
from saevlm_fast.training.evaluate import Metrics, batch_metrics, evaluate_rows
from saevlm_fast.training.evaluated import EvaluatedRows, look_at
from saevlm_fast.training.memory import Written, check_disk, check_memory, memory_of
from saevlm_fast.training.progress import ProgressLine
from saevlm_fast.training.run import (
    NothingKept,
    RunDirectory,
    fitting,
    is_small,
    kept_of,
    log_every,
    telling_what_is_kept,
    watched,
    with_settings,
)
from saevlm_fast.training.scale import Scale
from saevlm_fast.training.state import TrainingState
from saevlm_fast.training.watch import Watch, group_of

if TYPE_CHECKING:
    from PIL.Image import Image


class Trained(NamedTuple):
    """A finished SAE in raw units, in eval mode, and what `evaluate` says of it."""

    sae: SparseAutoencoder
    metrics: Metrics


class Look(NamedTuple):
    """What somebody else knows of a finished SAE: more metrics, and how a picture of it is made for loggers that show
    one (None: there is none)."""

    metrics: Metrics
    picture: "Callable[[], Image | None]" = lambda: None


OnFinished = Callable[[Mapping[str, SparseAutoencoder]], Mapping[str, Look]]


def nothing_more(saes: Mapping[str, SparseAutoencoder]) -> dict[str, Look]:
    """Of SAEs that are evaluated, and not looked at otherwise."""
    return {}


class LeadState(TrainingState):
    """The state whose data the others share: where they begin is found once."""

    _begun: tuple[Scale, Tensor] | None = None

    def beginning(self) -> tuple[Scale, Tensor]:
        """TrainingState's."""
        if self._begun is None:
            self._begun = super().beginning()
        return self._begun


class SharedState(TrainingState):
    """The state of an SAE whose data another one's state reads."""

    def __init__(self, lead: TrainingState, sae_config: SAEConfig, config: TrainConfig):
        super().__init__(lead.activations, sae_config, config, lead.device, "host")
        self.lead = lead

    def beginning(self) -> tuple[Scale, Tensor]:
        """The lead's."""
        return self.lead.beginning()

    def batches(self, start_step: int, n_steps: int, announce: bool = True) -> Generator[Tensor, None, None]:
        """The lead's."""
        return self.lead.batches(start_step, n_steps, announce)


class Member:
    """One of several SAEs: its state, how its steps are taken, what is kept of it.

    options: of its own run. group: what loggers call all of them. on_log: called with its name, the step and SAELens'
    metrics.
    """

    def __init__(
        self,
        name: str,
        state: TrainingState,
        options: RunOptions,
        on_log: Callable[[str, int, Metrics], None],
        group: str | None = None,
    ):
        self.name, self.state, self.on_log, self.group = name, state, on_log, group
        self.options, self.watch = options, Watch(options.log_to)
        self.kept: RunDirectory | NothingKept = kept_of(options, in_group=group is not None)
        self.steps = CapturedSteps(state.stepper, options.capture)
        self.small = is_small(state.stepper.sae.config, state.config)
        self.log_every = log_every(options, state.config)
        self.has_begun = False

    @property
    def n_steps(self) -> int:
        """Steps that it has taken."""
        return self.state.stepper.n_steps

    @property
    def has_checkpoint(self) -> bool:
        """Whether it goes on from one."""
        kept = self.kept
        return isinstance(kept, RunDirectory) and kept.resume and latest_checkpoint(workplace(kept.output)) is not None

    def begin(self) -> None:
        """From step 0, or its newest checkpoint."""
        state = self.state
        self.kept.begin(state)
        config = watched(state, state.stepper.sae.config, self.options)
        self.watch.begin(lambda: self.kept.path, self.n_steps, config, state.device, self.name, self.group)
        self.has_begun = True

    def take(self, x_BD: Tensor) -> None:
        """The next step, on a normalised batch."""
        stepper = self.state.stepper
        with one_thread(self.small):
            output = self.steps.step(x_BD)
            if stepper.n_steps % self.log_every == 0 or stepper.n_steps == self.state.config.n_steps:
                metrics = batch_metrics(stepper, x_BD, output) | self.steps.metrics()
                self.state.check_loss(self.kept.diverged)
                self.kept.log(stepper.n_steps, metrics)
                self.watch.log(stepper.n_steps, metrics)
                self.on_log(self.name, stepper.n_steps, metrics)
            self.kept.after_step(self.state, interrupted=False)

    def stop(self) -> None:
        """A checkpoint, if there is a place for it."""
        with suppress(Interrupted):
            self.kept.after_step(self.state, interrupted=True)

    def finished(self) -> SparseAutoencoder:
        """The SAE after its last step, saved."""
        with one_thread(self.small):
            sae = self.state.export()
        self.watch.pause()
        self.kept.save(sae)
        return sae

    def measured(self, metrics: Metrics, picture: "Callable[[], Image | None]") -> None:
        """Logs what was measured of it, after which nothing is logged any more."""
        logged, n_steps = {f"eval/{name}": value for name, value in metrics.items()}, self.state.config.n_steps
        self.kept.finish(n_steps, logged)
        self.watch.finish(n_steps, logged, picture)


@own_defaults()
def train_many(
    activations: Matrix,
    saes: Mapping[str, SAEConfig],
    config: TrainConfig | Mapping[str, TrainConfig] | None = None,
    options: RunOptions | None = None,
    *,
    validation: Matrix | None = None,
    progress: bool = False,
    on_log: Callable[[str, int, Metrics], None] = lambda name, step, metrics: None,
    on_step: Callable[[int], None] = lambda step: None,
    on_evaluated: Callable[[int, int], None] = lambda done, total: None,
    on_note: Callable[[str], None] = lambda text: None,
    on_finished: OnFinished = nothing_more,
    **settings: Any,
) -> dict[str, Trained]:
    """Train several SAEs on the same batches, reading the data once; each is the one that `train` makes alone.

        trained = train_many(x_ND, {f"k{k}": SAEConfig.sized(64, k=k) for k in (5, 10)}, steps=500, output="grid")

    Args:
        activations: rows [N, d_in] in any units, as `train` takes them.
        saes: what SAEs, by names that are also those of their directories in options.output.
        config: the recipe of all, or of each by its name; or its fields, as steps=500. Those of TrainConfig.shared
            must agree.
        options: where the run goes, as of `train`; output is the directory of their directories.
        validation: rows [M, d_in] on which the finished SAEs are evaluated; training rows otherwise, as of `train`.
        progress: show a line with the step, the rate, the time left and the first SAE's loss.
        on_log: called with the name at every logged step of every SAE. on_step: called with the steps that all have
            taken. on_evaluated, on_note: as of `train`. on_finished: called with the finished SAEs by name, once they
            are evaluated; gives a Look at each that has more to be logged, by name.

    Returns:
        The SAEs in raw units and their metrics, those of on_finished among them, by name.

    Raises:
        ValueError: as `train`; no SAE, a name that is no directory's, recipes that differ in what is shared; all
            need more memory than is free. Interrupted: SIGINT or SIGTERM; checkpoints of all have been written.
    """
    recipes, options = recipes_of("train_many", saes, SAEConfig, config, options, settings)
    first = next(iter(saes))
    for name, sae_config in saes.items():
        recipes[name].check_fits(sae_config)
    train_on, held_out = fitting(activations, validation, *saes.values())
    evaluated = EvaluatedRows.of_run(train_on, held_out, recipes[first])
    device = resolve_device(options.device)
    needed = {name: memory_of(sae, recipes[name], train_on.n_rows) for name, sae in saes.items()}
    check_memory(device, needed)
    if options.output is not None and not options.resume:
        steps = recipes[first].n_steps, options.checkpoint_every
        check_disk(options.output, saes.values(), *steps, Written.by(device))
    line = ProgressLine(recipes[first].steps)

    def logged(name: str, step: int, metrics: Metrics) -> None:
        if progress and name == first:
            line.log(step, metrics)
        on_log(name, step, metrics)

    def told(done: int, total: int) -> None:
        if progress:
            line.evaluated(done, total)
        on_evaluated(done, total)

    with ExitStack() as stack:
        stack.enter_context(closing(line))
        stack.enter_context(told_of_passes(line.note) if progress else nullcontext())
        others = sum(needed.values()) - needed[first]
        lead = LeadState(train_on, saes[first], recipes[first], device, options.data_on, others=others)
        members, group = [], group_of(options.output) if len(saes) > 1 else None
        for name, sae_config in saes.items():
            state = lead if name == first else SharedState(lead, sae_config, recipes[name])
            members.append(Member(name, state, own_options(options, name), logged, group))
        for member in members:
            stack.enter_context(member.kept.locked())
            stack.enter_context(member.watch)
        look_at(evaluated, recipes[first], whole=options.output is None)
        for member in members:
            member.begin()
        with tf32_products(False), told_of_compiling(line.note if progress else on_note):
            _steps(lead, members, on_step)
            finished = [member.finished() for member in members]
        return evaluated_all(members, finished, lambda: evaluate_rows(finished, evaluated, told), on_finished)


def evaluated_all(
    members: list[Member],
    saes: list[SparseAutoencoder],
    evaluate: Callable[[], list[Metrics]],
    on_finished: OnFinished,
) -> dict[str, Trained]:
    """Finished SAEs with what is measured of them, which is logged as well.

    Raises:
        ValueError: rows that cannot be used; it says that the SAEs have been saved.
    """
    finished = {member.name: sae for member, sae in zip(members, saes)}
    with telling_what_is_kept(members[0].kept, len(members) - 1):
        measured = evaluate()
        looks = on_finished(finished)
    found = {}
    for member, metrics in zip(members, measured):
        look = looks.get(member.name, Look({}))
        found[member.name] = Trained(finished[member.name], metrics | look.metrics)
        member.measured(found[member.name].metrics, look.picture)
    return found


def _steps(lead: TrainingState, members: list[Member], on_step: Callable[[int], None]) -> None:
    """All remaining steps of all."""
    start = min(member.n_steps for member in members)
    scale = lead.scale  # of the same rows: every member's
    with interruptible() as interrupted, closing(lead.batches(start, lead.config.n_steps - start)) as remaining:
        for step, raw_BD in enumerate(remaining, start):
            take_all(members, step, scale.normalised(raw_BD))
            on_step(step + 1)
            if interrupted.is_set():
                stop_all(members)


def take_all(members: list[Member], step: int, x_BD: Tensor) -> None:
    """A normalised batch, of 0-based step `step`, for every one of them that has not taken it yet."""
    for member in members:
        if member.n_steps == step:
            member.take(x_BD)


def stop_all(members: list[Member]) -> None:
    """Checkpoints of all. Raises Interrupted."""
    for member in members:
        if member.has_begun:
            member.stop()
    fewest = min(member.n_steps for member in members)
    raise Interrupted(f"interrupted after step {fewest}; continue with --resume")


def own_options(options: RunOptions, name: str) -> RunOptions:
    """Of one of several: its directory is in theirs."""
    return options if options.output is None else replace(options, output=options.output / name)


def recipes_of(
    who: str,
    saes: Mapping[str, Any],
    kind: type,
    config: TrainConfig | Mapping[str, TrainConfig] | None,
    options: RunOptions | None,
    settings: dict[str, Any],
) -> tuple[dict[str, TrainConfig], RunOptions]:
    """The recipe of each by its name, and where the run goes. kind: of saes' values; who: takes all this."""
    check_kind("saes", saes, Mapping, f"{kind.__name__}s by name")
    require(len(saes) > 0, "saes: there is none")
    for name, sae in saes.items():
        check_name(name, alone=len(saes) == 1)
        check_kind(f"saes[{name!r}]", sae, kind, f"an {kind.__name__}")
    if isinstance(config, Mapping):
        missing = sorted(saes.keys() ^ config.keys())
        require(not missing, f"config: {', '.join(map(str, missing))} must be in both saes and config")
        parts = {name: with_settings(who, each, options, settings) for name, each in config.items()}
    else:
        parts = dict.fromkeys(saes, with_settings(who, config, options, settings))
    recipes = {name: parts[name][0] for name in saes}
    first = next(iter(recipes))
    for name, recipe in recipes.items():
        for shared in TrainConfig.shared:
            ours, theirs = getattr(recipe, shared), getattr(recipes[first], shared)
            require(ours == theirs, f"{shared}: {ours} of {name}, but {theirs} of {first}; all see the same batches")
        ours, theirs = (each.control in ("shuffled", "untrained") for each in (recipe, recipes[first]))
        alike = ours == theirs and (not ours or recipe.control == recipes[first].control)
        controls = f"control: {recipe.control} of {name}, but {recipes[first].control} of {first}"
        require(alike, f"{controls}; all see the same batches")
    return recipes, parts[first][1]


def check_name(name: Any, alone: bool = False) -> None:
    """ValueError: it is not one directory's name; of one that is alone it may be empty."""
    check_kind("saes", name, str, "names of directories")
    fits = Path(name).name == name and not name.startswith(".") and "\0" not in name and (name != "" or alone)
    require(fits, f"saes: {name!r} is not the name of a directory")

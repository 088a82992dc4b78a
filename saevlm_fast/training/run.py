"""A training run: data in, steps, an SAE in raw activation units and its evaluation at the end.

What is kept of a run on disk, so that it can be resumed, is in checkpoints.py; without an output directory nothing is
written.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from saevlm_fast.config import RunOptions, SAEConfig, TrainConfig, keyword_settings
from saevlm_fast.data.pairing import check_rows_of_same_images
from saevlm_fast.data.passes import told_of_passes
from saevlm_fast.data.rows import Activations, Matrix, activations_of
from saevlm_fast.errors import Interrupted, check_kind, doubt, require
from saevlm_fast.runtime import interruptible, one_thread, own_defaults, resolve_device, tf32_products
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training.capture import CapturedSteps, told_of_compiling
from saevlm_fast.training.checkpoints import RunDirectory
from saevlm_fast.training.evaluate import Metrics, batch_metrics, evaluate_rows
from saevlm_fast.training.evaluated import EvaluatedRows, look_at
from saevlm_fast.training.progress import ProgressLine
from saevlm_fast.training.scale import check_several_rows
from saevlm_fast.training.state import TrainingState
from saevlm_fast.training.watch import Watch

if TYPE_CHECKING:
    from PIL.Image import Image

_SMALL_PRODUCT = 1 << 28  # multiplications of the encoder, below which a step is left to one thread


@own_defaults()
def train(
    activations: Matrix,
    sae_config: SAEConfig,
    config: TrainConfig | None = None,
    options: RunOptions | None = None,
    *,
    validation: Matrix | None = None,
    mono_embeddings: Matrix | None = None,
    progress: bool = False,
    on_log: Callable[[int, Metrics], None] = lambda step, metrics: None,
    on_step: Callable[[int], None] = lambda step: None,
    on_evaluated: Callable[[int, int], None] = lambda done, total: None,
    on_note: Callable[[str], None] = lambda text: None,
    on_picture: "Callable[[SparseAutoencoder], Image | None]" = lambda sae: None,
    **settings: Any,
) -> tuple[SparseAutoencoder, Metrics]:
    """Train an SAE by the paper's recipe (arXiv 2504.02821; docs/recipe.md, section 2).

        sae, metrics = train(Activations.from_tensor(x_ND), SAEConfig.sized(1024), steps=500)

    Args:
        activations: rows [N, d_in] in any units, never held whole unless they are in memory already; or a
            tensor or an array.
        sae_config: what SAE; its d_in is the activations'.
        config: the recipe; or its fields by name, as steps=500, lr=1e-3.
        options: where the run goes; or its fields by name, as output="run". Without an output nothing is written;
            with one, the run directory of checkpoints.py.
        validation: rows [M, d_in] on which the finished SAE is evaluated; otherwise training rows, evenly spread: all,
            or as many as were trained on, but 65,536 at least.
        mono_embeddings: of row i [N, E], by which MonoLoss (mono_weight) scores; the rows themselves otherwise.
        progress: show a line with the step, the rate, the time left and the loss.
        on_log: called at every logged step with SAELens metric names. on_step: called after every step (a GPU is then
            still at it). on_evaluated: called with the rows that are evaluated so far, and with all that will be.
            on_note: called with what else is worth a line: that kernels are being compiled. on_picture:
            called with the finished SAE where a logger of options.log_to shows images, for one (None: there is none).

    Returns:
        The SAE in raw activation units, in eval mode, and what `evaluate` says of it over these rows.

    Raises:
        ValueError: settings that do not exist or do not fit the data, a logger whose package is not installed, a run
            directory in use, non-finite data or loss.
        Interrupted: SIGINT or SIGTERM (Ctrl-C) arrived; a checkpoint has been written, if there is an output.
    """
    config, options = with_settings("train", config, options, settings)
    activations, held_out = fitting(activations, validation, sae_config)
    evaluated = EvaluatedRows.of_run(activations, held_out, config)
    embeddings = mono_embeddings_of(mono_embeddings, activations, config)
    line = ProgressLine(config.n_steps)
    listening = told_of_passes(line.note) if progress else nullcontext()
    if progress:
        on_log, on_note = both(line.log, on_log), both(line.note, on_note)
        on_evaluated = both(line.evaluated, on_evaluated)
    kept = kept_of(options)
    with kept.locked(), Watch(options.log_to) as watch, listening:
        look_at(evaluated, config, whole=options.output is None)
        device = resolve_device(options.device)
        state = TrainingState(activations, sae_config, config, device, options.data_on, embeddings)
        kept.begin(state)
        watch.begin(lambda: kept.path, state.stepper.n_steps, watched(state, sae_config, options), device)
        with (
            tf32_products(False),  # may wait for a thread, as long as Ctrl-C still ends that
            interruptible() as interrupted,
            one_thread(is_small(sae_config, config)),
            closing(line),
            told_of_compiling(on_note),
        ):
            take_steps(state, kept, options, both(watch.log, on_log), on_step, interrupted, options.capture)
            sae = state.export()
            watch.pause()
            kept.save(sae)
        with telling_what_is_kept(kept), closing(line):
            if interrupted.is_set():  # by a signal that came after the last step
                raise Interrupted("")
            (metrics,) = evaluate_rows([sae], evaluated, on_evaluated)
        logged = {f"eval/{name}": value for name, value in metrics.items()}
        kept.finish(config.n_steps, logged)
        watch.finish(config.n_steps, logged, lambda: on_picture(sae))
    return sae, metrics


def watched(state: TrainingState, sae: SAEConfig, options: RunOptions) -> dict[str, Any]:
    """What loggers are told of a run's settings."""
    activations = state.activations
    return {
        "sae": asdict(sae),
        "train": state.config.used(sae),
        "data": {"rows": activations.n_rows, "path": str(activations.path)},
        "output": str(options.output or ""),
    }


def is_small(sae: SAEConfig, config: TrainConfig) -> bool:
    """Whether a step on a CPU is left to one thread."""
    return config.batch_size * sae.d_in * sae.d_sae < _SMALL_PRODUCT


def log_every(options: RunOptions, config: TrainConfig) -> int:
    """Steps between two logged lines."""
    return options.log_every or max(1, min(100, config.n_steps // 100))


def fitting(
    activations: Matrix, validation: Matrix | None, *sae_configs: SAEConfig
) -> tuple[Activations, Activations | None]:
    """What is trained on, and what is held out.

    ValueError: no activations, a single row, or of another width than an SAE; nothing held out where something should
    be.
    """
    train_on = activations_of(activations, "activations")
    check_several_rows(train_on)
    held_out = None if validation is None else activations_of(validation, "validation")
    if held_out is not None:
        check_held_out(train_on, train_on if validation is activations else held_out)
    for sae_config in sae_configs:
        check_kind("sae_config", sae_config, SAEConfig, "an SAEConfig; SAEConfig.sized(d_in) makes one")
        require(
            train_on.d == sae_config.d_in,
            f"d_in: {sae_config.d_in} does not fit activations of width {train_on.d} ({train_on.path})",
        )
    return train_on, held_out


def check_held_out(train_on: Activations, held_out: Activations) -> None:
    """What is held out is of the place that is trained on, and none of it is trained on; of what is unclear, a Doubt.

    ValueError: the rows held out are of another width, hook point or layer, or those trained on.
    """
    from saevlm_fast.provenance import misfit, place_of  # which imports the towers

    require(held_out.d == train_on.d, f"validation: width {held_out.d} differs from the activations' {train_on.d}")
    same = train_on.is_same_as(held_out)
    if not same and (train_on.n_rows, train_on.d, train_on.dtype) == (held_out.n_rows, held_out.d, held_out.dtype):
        same = train_on.digest() == held_out.digest()  # a copy
    advice = "without validation the SAE is evaluated on those too, and says so"
    require(not same, f"validation: {train_on.path} is what is trained on; {advice}")
    if common := train_on.in_common_with(held_out):
        doubt(f"validation: {common}; what is measured on these is not of rows held out")
    of_place = f"validation: {held_out.path} are of {place_of(held_out.source)}"
    if unlike := misfit(train_on.source, held_out.source, "the SAE", of_place):
        doubt(f"validation: {unlike}; what is measured on {held_out.path} may mean little")


def mono_embeddings_of(given: Matrix | None, activations: Activations, config: TrainConfig) -> Activations | None:
    """By which MonoLoss scores. ValueError: embeddings that nothing needs, or of other images."""
    if given is None:
        return None
    require(config.mono_weight is not None, "mono_embeddings: of no use without mono_weight")
    require(config.control != "shuffled", "mono_embeddings: a shuffled row is of no image")
    embeddings = activations_of(given, "mono_embeddings")
    check_rows_of_same_images(activations, embeddings)
    return embeddings


@contextmanager
def telling_what_is_kept(kept: "RunDirectory | NothingKept", n_others: int = 0) -> Iterator[None]:
    """Around the evaluation: of rows that cannot be used, or of Ctrl-C, the error says that the SAE has been saved, and
    where. n_others: SAEs that are kept beside it."""
    others = f" (and {n_others} beside it)" if n_others else ""
    try:
        yield
    except (KeyboardInterrupt, Interrupted):
        again = "" if kept.path is None else "; with resume it is evaluated"
        raise Interrupted(f"interrupted in the evaluation: {kept.saved()}{others}{again}") from None
    except ValueError as error:
        raise type(error)(f"{error}; that is of the evaluation alone: {kept.saved()}") from error


class NothingKept:
    """A run in memory: what RunDirectory does, where there is no directory."""

    path = None

    def locked(self) -> AbstractContextManager[object]:
        """Nobody else has it."""
        return nullcontext()

    def begin(self, state: TrainingState) -> None:
        """Start."""
        state.initialise()

    def log(self, step: int, metrics: Metrics) -> None:
        """Nobody reads it later."""

    def after_step(self, state: TrainingState, interrupted: bool) -> None:
        """Interrupted: if `interrupted`. ValueError: after the last step, a weight that is not finite."""
        if state.stepper.n_steps == state.config.n_steps:
            state.checked_tensors(self.diverged)
        if interrupted:
            raise Interrupted(f"interrupted after step {state.stepper.n_steps}; {self.kept()}: there is no output")

    def kept(self) -> str:
        """What is left of the run if it ends now."""
        return "nothing was saved"

    def diverged(self, step: int) -> str:
        """What is left of a run that has diverged."""
        return self.kept()

    def save(self, sae: SparseAutoencoder) -> None:
        """It is returned."""

    def saved(self) -> str:
        """What has become of the finished SAE."""
        return self.kept()

    def finish(self, step: int, metrics: Metrics) -> None:
        """They are returned."""


def kept_of(options: RunOptions, in_group: bool = False) -> RunDirectory | NothingKept:
    """The run's directory, if it has one."""
    if options.output is None:
        return NothingKept()
    return RunDirectory(options.output, options.checkpoint_every, options.resume, options.force, in_group)


def take_steps(
    state: TrainingState,
    kept: RunDirectory | NothingKept,
    options: RunOptions,
    on_log: Callable[[int, Metrics], None],
    on_step: Callable[[int], None],
    interrupted: threading.Event,
    capture: bool,
) -> None:
    """All remaining steps, with logs and checkpoints. A GPU is waited for at these alone."""
    stepper, n_steps = state.stepper, state.config.n_steps
    steps = CapturedSteps(stepper, capture)
    every = log_every(options, state.config)
    span = stepper.n_steps, n_steps - stepper.n_steps
    with closing(state.inputs(*span, steps.input)) as remaining, closing(state.embedding_batches(*span)) as embeddings:
        for x_BD, e_BE in zip(remaining, embeddings, strict=True):
            output = steps.step(x_BD, e_BE)
            step = stepper.n_steps
            on_step(step)
            if step % every == 0 or step == n_steps:
                metrics = batch_metrics(stepper, x_BD, output) | steps.metrics()
                state.check_loss(kept.diverged)
                kept.log(step, metrics)
                on_log(step, metrics)
            kept.after_step(state, interrupted.is_set())


def both(first: Callable[..., None], second: Callable[..., None]) -> Callable[..., None]:
    """One after the other."""

    def call(*args: Any) -> None:
        first(*args)
        second(*args)

    return call


def with_settings(
    who: str, config: TrainConfig | None, options: RunOptions | None, settings: dict[str, Any]
) -> tuple[TrainConfig, RunOptions]:
    """config and options as given, or made of those of `settings` that are their fields. who: takes them."""
    recipe, where = keyword_settings(who, settings, TrainConfig, RunOptions)
    for name, chosen, kind, given in (("config", config, TrainConfig, recipe), ("options", options, RunOptions, where)):
        check_kind(name, chosen, (kind, type(None)), f"a {kind.__name__}")
        require(chosen is None or not given, f"{', '.join(given)}: given beside {name}, which has that already")
    options = options or RunOptions(**where)
    n = options.data_parallel
    require(n == 1, f"data_parallel: {n} replicas are of train_shared, by torchrun's ranks; {who} is one process")
    return config or TrainConfig(**recipe), options

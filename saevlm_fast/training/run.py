"""A training run: data in, progress and checkpoints out, an SAE in raw activation units at the end.

A run directory holds `cfg.json` and `sae_weights.safetensors` (the SAE, SAELens v6 layout), `metrics.jsonl`, `run.json`
(the settings, checked by --resume) and `checkpoints/step_XXXXXXXX/` (the same SAE files as of that step, and
`train_state.safetensors`). Everything is written under a temporary name and renamed; a checkpoint directory appears
whole or not at all. The order of the rows is a function of (seed, step), so a run that was killed and resumed takes the
same steps as one that was not: bit-identical weights on the CPU.
"""

import hashlib
import json
import math
import shutil
import threading
from collections.abc import Callable, Generator
from contextlib import closing
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from saevlm_fast.config import RunOptions, SAEConfig, TrainConfig
from saevlm_fast.data.order import ShuffledRows, batches
from saevlm_fast.data.rows import Activations
from saevlm_fast.errors import Interrupted, check_same_settings, require
from saevlm_fast.files import (
    TEMPORARY_PREFIX,
    atomic_directory,
    atomic_write,
    remove_leftovers,
    save_safetensors_atomic,
    write_json_atomic,
)
from saevlm_fast.runtime import interruptible, one_thread, resolve_device, tf32_products
from saevlm_fast.sae import CONFIG_FILE, WEIGHTS_FILE, SparseAutoencoder, with_metadata
from saevlm_fast.training.checkpoints import (
    CHECKPOINTS,
    METRICS_FILE,
    RUN_FILE,
    STATE_FILE,
    Cadence,
    checkpoints,
    latest_checkpoint,
)
from saevlm_fast.training.evaluate import Metrics, batch_metrics, evaluate
from saevlm_fast.training.step import Stepper, geometric_median, smallest_positive

_CALIBRATION_ROWS = 4096
_KEPT_CHECKPOINTS = 2
_SMALL_PRODUCT = 1 << 28  # multiplications of the encoder, below which a step is left to one thread


def train(
    activations: Activations,
    sae_config: SAEConfig,
    config: TrainConfig,
    options: RunOptions,
    *,
    validation: Activations | None = None,
    on_log: Callable[[int, Metrics], None] = lambda step, metrics: None,
    on_step: Callable[[int], None] = lambda step: None,
) -> tuple[SparseAutoencoder, Metrics]:
    """Train an SAE by the paper's recipe (recipe.md section 2) and write the run directory.

    Args:
        activations: rows [N, d_in], read through the page cache, never held whole.
        validation: rows on which the finished SAE is evaluated; the training rows otherwise.
        on_log: called at every logged step with SAELens metric names. on_step: called after every step.

    Returns:
        The SAE in raw activation units, and its evaluation over all validation rows.

    Raises:
        ValueError: settings that do not fit the data, a run directory in use, non-finite data or loss.
        Interrupted: SIGINT or SIGTERM arrived; a checkpoint has been written.
    """
    require(
        activations.d == sae_config.d_in,
        f"d_in: {sae_config.d_in} does not fit activations of width {activations.d} ({activations.path})",
    )
    require(
        validation is None or validation.d == activations.d,
        f"validation: width {validation.d if validation else 0} differs from the activations' {activations.d}",
    )
    run = _Run(activations, sae_config, config, options)
    run.open_directory()
    small = config.batch_size * sae_config.d_in * sae_config.d_sae < _SMALL_PRODUCT
    with interruptible() as interrupted, tf32_products(config.dtype == "tf32"), one_thread(small):
        run.steps(on_log, on_step, interrupted)
        sae = run.export()
        sae.save_pretrained(options.output)
    metrics = evaluate(sae, validation or activations)
    run.log(config.steps, {f"eval/{name}": value for name, value in metrics.items()})
    return sae, metrics


class _Run:
    """The state of one run; methods in the order they happen."""

    def __init__(self, activations: Activations, sae_config: SAEConfig, config: TrainConfig, options: RunOptions):
        self.activations, self.config, self.options = activations, config, options
        self.output = Path(options.output)
        self.device = resolve_device(options.device)
        self.order = ShuffledRows(activations, config.batch_size, seed=config.seed)
        self.log_every = options.log_every or max(1, min(100, config.steps // 100))
        sae = SparseAutoencoder(sae_config, device=self.device)
        sae.reset_parameters(config.seed)
        self.stepper = Stepper(sae, config)
        self.norm_factor = 1.0

    def open_directory(self) -> None:
        """Start, replace or resume (a run killed before it wrote anything starts); refuses to touch a run untold."""
        used = any((self.output / name).exists() for name in (RUN_FILE, CONFIG_FILE, CHECKPOINTS, METRICS_FILE))
        if used and not (self.options.resume or self.options.force):
            raise ValueError(
                f"output: {self.output} already holds a run; use --resume to continue or --force to replace"
            )
        if self.options.resume and used:
            require((self.output / RUN_FILE).is_file(), f"resume: {RUN_FILE} is missing from {self.output}")
            check_same_settings(self.output / RUN_FILE, self._settings(), free=("path",))  # data may move
            remove_leftovers(self.output)
            remove_leftovers(self.output / CHECKPOINTS)
        checkpoint = latest_checkpoint(self.output) if self.options.resume else None
        if checkpoint is not None:
            self._load(checkpoint)
            self._truncate_metrics()
        else:
            self._initialise()
        # Only now that the data has been read is anything on disk touched: bad data must not cost an older run.
        if self.options.force:
            self._remove_run()
        self.output.mkdir(parents=True, exist_ok=True)
        if not (self.output / RUN_FILE).exists():
            write_json_atomic(self.output / RUN_FILE, self._settings())
        if checkpoint is None:
            (self.output / METRICS_FILE).unlink(missing_ok=True)

    def _settings(self) -> dict[str, Any]:
        sae = self.stepper.sae.config
        return {
            "sae": {"d_in": sae.d_in, "d_sae": sae.d_sae, "k": sae.k, "architecture": sae.architecture,
                    "group_sizes": list(sae.group_sizes)},
            "train": json.loads(json.dumps(self.config.to_dict())),
            "data": {
                "rows": self.activations.n_rows,
                "path": str(self.activations.path),
                "fingerprint of the activations": self._fingerprint(),
            },
        }  # fmt: skip

    def _fingerprint(self) -> str:
        """Fingerprint of the data: hash of 64 rows spread over it."""
        rows = torch.linspace(0, self.activations.n_rows - 1, 64, dtype=torch.float64).long()
        return hashlib.sha256(self.activations.rows(rows).numpy().tobytes()).hexdigest()[:16]

    def _remove_run(self) -> None:
        shutil.rmtree(self.output / CHECKPOINTS, ignore_errors=True)
        for name in (CONFIG_FILE, WEIGHTS_FILE, METRICS_FILE, RUN_FILE):
            (self.output / name).unlink(missing_ok=True)

    @torch.no_grad()
    def _initialise(self) -> None:
        """norm_factor from the first batches, b_dec at the geometric median of the first one."""
        squared, n_rows, first = 0.0, 0, None
        n_batches = min(self.config.norm_batches, self.order.batches_per_epoch)
        for x_BD in self._batches(0, n_batches):
            squared += float(x_BD.double().square().sum())
            n_rows += len(x_BD)
            first = x_BD if first is None else first
        assert first is not None
        self.norm_factor = math.sqrt(squared / n_rows)
        require(self.norm_factor > 0, f"activations: every row of {self.activations.path} read so far is zero")
        self.stepper.sae.b_dec.copy_(geometric_median(first / self.norm_factor))

    def _batches(self, start_step: int, n_steps: int, announce: bool = True) -> Generator[Tensor, None, None]:
        """Batches in raw units on the device; reading them has checked them for NaN and inf."""
        pin_memory = self.device.type == "cuda"
        stream = batches(self.activations, self.order, start_step, n_steps, pin_memory, announce)
        with closing(stream):
            for _, x_BD in stream:
                yield x_BD.to(self.device, non_blocking=True)

    def steps(
        self, on_log: Callable[[int, Metrics], None], on_step: Callable[[int], None], interrupted: threading.Event
    ) -> None:
        """All remaining steps, with logs and checkpoints."""
        stepper, n_steps = self.stepper, self.config.steps
        cadence = Cadence(self.options.checkpoint_every, n_steps, stepper.n_steps)
        remaining = self._batches(stepper.n_steps, n_steps - stepper.n_steps)
        with closing(remaining):
            for x_BD in remaining:
                x_BD = x_BD / self.norm_factor
                output = stepper.step(x_BD)
                step = stepper.n_steps
                on_step(step)
                if step % self.log_every == 0 or step == n_steps:
                    self._check_loss()
                    metrics = batch_metrics(stepper, x_BD, output)
                    self.log(step, metrics)
                    on_log(step, metrics)
                if cadence.due(step) or step == n_steps or interrupted.is_set():
                    self._check_loss()
                    with cadence.writing(step):
                        self.checkpoint()
                if interrupted.is_set():
                    raise Interrupted(f"interrupted after step {step}; continue with --resume --output {self.output}")

    def _check_loss(self) -> None:
        bad = int(self.stepper.bad_step)
        if bad >= 0:
            self._diverged(f"loss: NaN or inf at step {bad + 1}")

    def _diverged(self, what: str) -> None:
        last = latest_checkpoint(self.output)
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint had been written"
        raise ValueError(f"{what}; {kept}. Try a smaller --lr")

    def log(self, step: int, metrics: Metrics) -> None:
        """Append one line of strict JSON to metrics.jsonl; what is not a number (the variance of one row) is null."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        path = self.output / METRICS_FILE
        try:
            with open(path, "a") as file:
                file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        except OSError as error:  # a full disk: which file?
            raise OSError(error.errno, error.strerror, str(path)) from error

    def export(self) -> SparseAutoencoder:
        """A copy of the SAE in raw units, with a threshold (calibrated on data if the moving one has not started)."""
        sae = deepcopy(self.stepper.sae)
        if sae.config.architecture != "topk" and float(sae.threshold) < 0:
            sae.threshold.fill_(self._calibrated_threshold())
        sae.scale_biases_(self.norm_factor)
        return with_metadata(
            sae,
            norm_factor=self.norm_factor,
            steps=self.stepper.n_steps,
            n_training_samples=self.stepper.n_rows_seen,
            source=self.activations.source or {"path": str(self.activations.path)},
            training=json.loads(json.dumps(self.config.to_dict())),
        ).eval()

    @torch.no_grad()
    def _calibrated_threshold(self) -> float:
        """Just below the smallest activation that BatchTopK keeps of some thousand rows: k a row pass on average."""
        n_batches = min(-(-_CALIBRATION_ROWS // self.config.batch_size), self.order.batches_per_epoch)
        x_BD = torch.cat(list(self._batches(0, n_batches, announce=False)))
        codes = self.stepper.sae.encode(x_BD / self.norm_factor, use_threshold=False)
        return float(smallest_positive(codes.top_acts)) * (1 - 1e-6)  # ties at the cut are kept

    def checkpoint(self) -> None:
        """Write checkpoints/step_N whole, then drop all but the newest two."""
        stepper = self.stepper
        final = self.output / CHECKPOINTS / f"step_{stepper.n_steps:08d}"
        if final.exists():
            return
        tensors = {name: p.contiguous() for name, p in stepper.parameters().items()}
        for name, (exp_avg, exp_avg_sq) in stepper.moments.items():
            tensors |= {f"{name}.exp_avg": exp_avg, f"{name}.exp_avg_sq": exp_avg_sq}
        tensors |= {"idle": stepper.idle_S, "threshold": stepper.sae.threshold}
        tensors["norm_factor"] = torch.tensor(self.norm_factor, dtype=torch.float64)
        bad = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
        if bad:
            self._diverged(f"{', '.join(bad)}: NaN or inf after step {stepper.n_steps}")
        header = {"n_steps": str(stepper.n_steps), "n_rows_seen": str(stepper.n_rows_seen)}
        final.parent.mkdir(exist_ok=True)
        with atomic_directory(final) as directory:
            self.export().save_pretrained(directory)
            save_safetensors_atomic(directory / STATE_FILE, {n: t.cpu() for n, t in tensors.items()}, metadata=header)
        for old in checkpoints(self.output)[:-_KEPT_CHECKPOINTS]:
            doomed = old.with_name(TEMPORARY_PREFIX + old.name)  # a kill must not leave half a checkpoint by this name
            old.rename(doomed)
            shutil.rmtree(doomed)

    @torch.no_grad()
    def _load(self, checkpoint: Path) -> None:
        try:
            self._load_state(checkpoint / STATE_FILE)
        except (SafetensorError, OSError, KeyError, TypeError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"resume: {checkpoint} is damaged, delete it to resume from the one before ({reason})"
            ) from error

    def _load_state(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        tensors = load_file(path, device=str(self.device))
        stepper = self.stepper
        for name, parameter in stepper.parameters().items():
            parameter.copy_(tensors[name])
            stepper.moments[name] = (tensors[f"{name}.exp_avg"], tensors[f"{name}.exp_avg_sq"])
        stepper.idle_S = tensors["idle"]
        stepper.sae.threshold.copy_(tensors["threshold"])
        self.norm_factor = float(tensors["norm_factor"])
        stepper.n_steps, stepper.n_rows_seen = int(header["n_steps"]), int(header["n_rows_seen"])

    def _truncate_metrics(self) -> None:
        """Drop logged steps that the resumed run is about to repeat."""
        path = self.output / METRICS_FILE
        if not path.is_file():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break  # the line that was being written when the run was killed
            if record.get("step", math.inf) <= self.stepper.n_steps and not any(
                key.startswith("eval/") for key in record
            ):
                kept.append(line + "\n")
        with atomic_write(path) as temporary:
            temporary.write_text("".join(kept))


def _is_finite(tensor: Tensor) -> bool:
    """One sum when all is well, an eighth of the time: it is finite only if every term is."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())

"""A run between two of its steps: its data in order, its optimiser, its scale; and the SAE that it stands for.

Shape suffixes: B rows of a batch, D d_in.
"""

import hashlib
import json
import math
from collections.abc import Callable, Generator
from contextlib import closing
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from saevlm_fast.config import CALIBRATED, DataOn, SAEConfig, TrainConfig
from saevlm_fast.data.device import ResidentRows, uploaded_batches
from saevlm_fast.data.order import ShuffledRows, batches
from saevlm_fast.data.rows import Activations
from saevlm_fast.errors import require
from saevlm_fast.sae import SparseAutoencoder, with_metadata
from saevlm_fast.training.memory import rows_go_to_device
from saevlm_fast.training.step import Stepper, smallest_positive

_CALIBRATION_ROWS = 4096
DATA_DIGEST, SAMPLED = "digest of the activations", "fingerprint of the activations"


class TrainingState:
    """Everything that the next step depends on.

    Attributes:
        activations: rows [N, d_in], in raw units.
        config: the recipe.
        device: where the steps are taken.
        order: which rows make up which step.
        stepper: the SAE in normalised units, and the optimiser's state.
        sae_config: what SAE is trained.
        latents: which latents the stepper has, start and stop; stop is None: all.
        norm_factor: activations are divided by it before they are trained on; known after `initialise` or `load`.
        on_device: whether all rows are kept there.

    data_on: where they are to be; ValueError: on the device, where they do not fit.
    """

    latents: tuple[int, int | None] = (0, None)

    def __init__(
        self,
        activations: Activations,
        sae_config: SAEConfig,
        config: TrainConfig,
        device: torch.device,
        data_on: DataOn = "auto",
    ):
        self.activations, self.config, self.device = activations, config, device
        self.order = ShuffledRows(activations, config.batch_size, seed=config.seed)
        self.sae_config = sae_config
        self.stepper = self.first_stepper()
        self.norm_factor = 1.0
        self.on_device = rows_go_to_device(activations, sae_config, config, device, data_on)
        self._resident: ResidentRows | None = None

    def first_stepper(self) -> Stepper:
        """With random weights, before step 0."""
        sae = SparseAutoencoder(self.sae_config, device=self.device)
        sae.reset_parameters(self.config.seed)
        return Stepper(sae, self.config)

    @torch.no_grad()
    def initialise(self) -> None:
        """norm_factor from the first batches, b_dec at the geometric median of the first one.

        Raises:
            ValueError: NaN or infinity in these rows, or nothing but zeros.
        """
        squared, n_rows, first = 0.0, 0, None
        n_batches = min(self.config.norm_batches, self.order.batches_per_epoch)
        for x_BD in self.batches(0, n_batches):
            squared += float(x_BD.double().square().sum())
            n_rows += len(x_BD)
            first = x_BD.clone() if first is None else first
        assert first is not None
        self.norm_factor = math.sqrt(squared / n_rows)
        require(self.norm_factor > 0, f"activations: every row of {self.activations.path} read so far is zero")
        self.stepper.sae.b_dec.copy_(geometric_median(self.normalised(first)))

    def batches(self, start_step: int, n_steps: int, announce: bool = True) -> Generator[Tensor, None, None]:
        """Batches [B, d_in] in raw units on the device, in the dtype that rows are kept in there; NaN and inf have been
        looked for. On a GPU a batch is overwritten while later ones are asked for.

        A store is compared with its digests first: the rows are in random order, so the first batch is of every shard.
        """
        self.activations.check_whole()
        if self.on_device:
            if self._resident is None:
                self._resident = ResidentRows(self.activations, self.device)
            return self._resident.batches(self.order, start_step, n_steps)
        if self.device.type == "cuda":
            return uploaded_batches(self.activations, self.order, start_step, n_steps, self.device, announce)
        return self._host_batches(start_step, n_steps, announce)

    def _host_batches(self, start_step: int, n_steps: int, announce: bool) -> Generator[Tensor, None, None]:
        with closing(batches(self.activations, self.order, start_step, n_steps, announce)) as stream:
            for _, x_BD in stream:
                yield x_BD

    def normalised(self, x_BD: Tensor, out: Tensor | None = None) -> Tensor:
        """float32 [B, d_in], a batch divided by norm_factor; into `out` if given, whose dtype it then is.

        On a GPU widened and divided in one pass: a divisor of one dimension makes torch compute in float32.
        """
        if x_BD.is_cuda:
            divisor = torch.full((1,), self.norm_factor, device=x_BD.device)
            return torch.div(x_BD, divisor, out=out)
        return torch.div(x_BD.float(), self.norm_factor, out=out)

    def check_loss(self, kept: Callable[[], str]) -> None:
        """ValueError: the loss of a step so far was NaN or infinite. kept: says what is left of the run."""
        bad = int(self.stepper.bad_step)
        if bad >= 0:
            raise diverged(f"loss: NaN or inf at step {bad + 1}", kept())

    def export(self) -> SparseAutoencoder:
        """A copy of the SAE in raw units, with a threshold (calibrated on data if the moving one has not started)."""
        sae = deepcopy(self.stepper.sae)
        if self.needs_calibration():
            sae.threshold.fill_(self.calibrated_threshold())
        return self.in_raw_units(sae)

    def needs_calibration(self) -> bool:
        """Whether an exported SAE needs a threshold that training has not found yet."""
        return self.sae_config.architecture in CALIBRATED and float(self.stepper.sae.threshold) < 0

    def in_raw_units(self, sae: SparseAutoencoder) -> SparseAutoencoder:
        """The finished SAE, of one in normalised units that has its threshold; changed in place."""
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
    def calibrated_threshold(self) -> float:
        """Just below the smallest activation that BatchTopK keeps of some thousand rows: k a row pass on average."""
        n_batches = min(-(-_CALIBRATION_ROWS // self.config.batch_size), self.order.batches_per_epoch)
        x_BD = torch.cat([self.normalised(x_BD) for x_BD in self.batches(0, n_batches, announce=False)])
        return self.smallest_kept(x_BD) * (1 - 1e-6)  # ties at the cut are kept

    def smallest_kept(self, x_BD: Tensor) -> float:
        """The smallest activation above 0 that BatchTopK keeps of some rows; 0 if there is none."""
        codes = self.stepper.sae.encode(x_BD, use_threshold=False)
        return float(smallest_positive(codes.top_acts))

    # What a checkpoint holds, and what a resumed run must have in common with it -------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """The state by name, on the device, not copied; with the stepper's two counters it is all of it."""
        stepper = self.stepper
        tensors = {name: p.contiguous() for name, p in stepper.parameters().items()}
        for name, (exp_avg, exp_avg_sq) in stepper.moments.items():
            tensors |= {f"{name}.exp_avg": exp_avg, f"{name}.exp_avg_sq": exp_avg_sq}
        tensors |= {"idle": stepper.idle_S, "threshold": stepper.sae.threshold}
        return tensors | {"norm_factor": torch.tensor(self.norm_factor, dtype=torch.float64)}

    def checked_tensors(self, kept: Callable[[], str]) -> dict[str, Tensor]:
        """tensors(). ValueError: one of them is not finite; what is kept of the run is said."""
        tensors = self.tensors()
        bad = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
        if bad:
            raise diverged(f"{', '.join(bad)}: NaN or inf after step {self.stepper.n_steps}", kept())
        return tensors

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], n_steps: int, n_rows_seen: int) -> None:
        """Goes on from `tensors` as they were after step n_steps. ValueError: they cannot be of this run."""
        stepper = self.stepper
        rows = min(self.config.batch_size, self.activations.n_rows)
        sound = 0 <= n_steps <= self.config.steps and n_rows_seen == n_steps * rows
        require(sound, f"it says {n_steps} steps and {n_rows_seen} rows, of {self.config.steps} steps of {rows} rows")
        expected = self.tensors()
        for name in sorted(expected.keys() | tensors.keys()):
            there = name in expected and name in tensors
            require(there, f"tensor {name!r} is {'missing' if name in expected else 'none of a run'}")
            found, needed = tensors[name], expected[name]
            same = (found.dtype, found.shape) == (needed.dtype, needed.shape)
            described = f"{found.dtype} {list(found.shape)}; {needed.dtype} {list(needed.shape)} is needed"
            require(same, f"tensor {name!r} is {described}")
            require(bool(found.isfinite().all()), f"tensor {name!r} holds NaN or inf")
        require(float(tensors["norm_factor"]) > 0, "norm_factor is not positive")
        for name, parameter in stepper.parameters().items():
            parameter.copy_(tensors[name])
            stepper.moments[name] = (tensors[f"{name}.exp_avg"], tensors[f"{name}.exp_avg_sq"])
        stepper.idle_S = tensors["idle"]
        stepper.sae.threshold.copy_(tensors["threshold"])
        self.norm_factor = float(tensors["norm_factor"])
        stepper.n_steps, stepper.n_rows_seen = n_steps, n_rows_seen

    def settings(self, sampled: bool = False) -> dict[str, dict[str, Any]]:
        """What decides the run, section -> name -> value, for JSON.

        sampled: know the data by 64 of its rows, as runs of before did, instead of by its digest.

        Raises:
            ActivationError: sampled rows that are not finite.
        """
        known_by = (SAMPLED, self.fingerprint()) if sampled else (DATA_DIGEST, self.activations.digest())
        sae = self.sae_config
        return {
            "sae": {
                "d_in": sae.d_in,
                "d_sae": sae.d_sae,
                "k": sae.k,
                "architecture": sae.architecture,
                "group_sizes": list(sae.group_sizes),
            },
            "train": json.loads(json.dumps(self.config.to_dict())),
            "data": {
                "rows": self.activations.n_rows,
                "path": str(self.activations.path),
                known_by[0]: known_by[1],
            },
        }

    def fingerprint(self) -> str:
        """Hash of 64 rows spread over the data."""
        rows = torch.linspace(0, self.activations.n_rows - 1, 64, dtype=torch.float64).long()
        return hashlib.sha256(self.activations.rows(rows).numpy().tobytes()).hexdigest()[:16]


def _is_finite(tensor: Tensor) -> bool:
    """One sum when all is well, an eighth of the time: it is finite only if every term is."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def diverged(what: str, kept: str) -> ValueError:
    """What ends a run whose numbers are no longer finite."""
    return ValueError(f"{what}; {kept}. Try a smaller lr")


def geometric_median(points_BD: Tensor, max_iter: int = 100, tol: float = 1e-5) -> Tensor:
    """Weiszfeld's iteration from the mean, [D]: where b_dec starts. A point on the guess gets a large finite weight."""
    guess_D = points_BD.mean(0)
    for _ in range(max_iter):
        previous_D = guess_D
        weights_B = 1 / (points_BD - guess_D).norm(dim=1).clamp(min=torch.finfo(points_BD.dtype).tiny ** 0.5)
        weights_B = weights_B / weights_B.sum()
        guess_D = weights_B @ points_BD
        if (guess_D - previous_D).norm() < tol:
            break
    return guess_D

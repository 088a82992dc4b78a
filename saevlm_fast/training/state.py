"""A run between two of its steps: its data in order, its optimiser, its scale; and the SAE that it stands for.

Shape suffixes: B rows of a batch, D d_in.
"""

import hashlib
import json
import math
from collections.abc import Callable, Generator
from contextlib import closing
from copy import deepcopy
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from saevlm_fast.config import CALIBRATED, DataOn, SAEConfig, TrainConfig
from saevlm_fast.data.device import ResidentRows, uploaded_batches
from saevlm_fast.data.order import ShuffledRows, batches
from saevlm_fast.data.rows import Activations
from saevlm_fast.errors import require
from saevlm_fast.kernels.topk_encode import batch_topk_encode
from saevlm_fast.sae import SparseAutoencoder, with_metadata
from saevlm_fast.training.control import shuffled
from saevlm_fast.training.memory import rows_go_to_device
from saevlm_fast.training.scale import Scale, mean_of_rows, scale_of
from saevlm_fast.training.step import Stepper

_CALIBRATION_ROWS = 4096
MONO_DIGEST = "digest of the MonoLoss embeddings"
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
        scale: the units that are trained in; known after `initialise` or `load`.
        on_device: whether all rows are kept there.
        embeddings: of the rows, for MonoLoss; None: it takes the rows themselves.

    data_on: where they are to be; ValueError: on the device, where they do not fit. others: bytes that SAEs take which
    are trained beside this one.
    """

    latents: tuple[int, int | None] = (0, None)

    def __init__(
        self,
        activations: Activations,
        sae_config: SAEConfig,
        config: TrainConfig,
        device: torch.device,
        data_on: DataOn = "auto",
        embeddings: Activations | None = None,
        others: int = 0,
    ):
        self.embeddings = embeddings
        self.activations, self.config, self.device = activations, config, device
        self.order = ShuffledRows(activations, config.batch_size, seed=config.seed)
        self.sae_config = sae_config
        self.stepper = self.first_stepper()
        self.scale = Scale()
        self.on_device = self._goes_to_device(data_on, others)
        self._resident: ResidentRows | None = None

    def _goes_to_device(self, data_on: DataOn, others: int) -> bool:
        return rows_go_to_device(self.activations, self.sae_config, self.config, self.device, data_on, others)

    def first_stepper(self) -> Stepper:
        """With random weights, before step 0."""
        sae = SparseAutoencoder(self.sae_config, device=self.device, random=False)
        sae.reset_parameters(self.config.seed)
        return Stepper(sae, self.config)

    def initialise(self) -> None:
        """Before step 0. ValueError: as `beginning`."""
        self.scale, b_dec = self.beginning()
        with torch.no_grad():
            self.stepper.sae.b_dec.copy_(b_dec)

    @torch.no_grad()
    def beginning(self) -> tuple[Scale, Tensor]:
        """The scale by the first batches (the mean, if it is wanted, by all rows), and b_dec at the first one's
        geometric median.

        Raises:
            ValueError: NaN or infinity in these rows, or nothing but zeros.
        """
        mean_D = self.mean().to(self.device) if self.config.center else None
        n_batches = min(self.config.norm_batches, self.order.batches_per_epoch)
        scale, first_BD = scale_of(self.whole_batches(0, n_batches), mean_D, self.activations.path)
        return scale, geometric_median(scale.normalised(first_BD))

    def mean(self) -> Tensor:
        """Of what is trained on, [d_in]."""
        return mean_of_rows(self.activations)

    def batches(self, start_step: int, n_steps: int, announce: bool = True) -> Generator[Tensor, None, None]:
        """Batches [B, d_in] in raw units on the device, in the dtype that rows are kept in there; NaN and inf have been
        looked for. On a GPU a batch is overwritten while later ones are asked for.

        A store is compared with its digests first: the rows are in random order, so the first batch is of every shard.
        Of a shuffled control, every batch is shuffled (control.py).
        """
        stream = self._stored_batches(start_step, n_steps, announce)
        return self._shuffled(stream, start_step) if self.config.control == "shuffled" else stream

    def inputs(
        self, start_step: int, n_steps: int, place: Callable[[int], Tensor | None] = lambda n_rows: None
    ) -> Generator[Tensor, None, None]:
        """The same in the units that are trained in. place: the memory for a batch of so many rows, where that is to be
        in some memory, in which it is overwritten by the next one."""
        out_BD = place(min(self.config.batch_size, self.activations.n_rows))
        plain = self.scale.mean_D is None and self.config.control != "shuffled"
        if out_BD is not None and out_BD.is_cuda and self.on_device and plain:
            resident, take = self._rows_there(), partial(self.scale.gathered, out=out_BD)
            yield from resident.batches(self.order, start_step, n_steps, take)
            return
        with closing(self.batches(start_step, n_steps)) as stream:
            for raw_BD in stream:
                yield self.normalised(raw_BD, out=place(len(raw_BD)))

    def whole_batches(self, start_step: int, n_steps: int, announce: bool = True) -> Generator[Tensor, None, None]:
        """The same, of all rows of a batch wherever they go: replicas take steps on some of them."""
        return self.batches(start_step, n_steps, announce)

    def embedding_batches(self, start_step: int, n_steps: int) -> Generator[Tensor | None, None, None]:
        """The embeddings [B, E] of the rows of the same steps, on the device; None where there are none."""
        if self.embeddings is None:
            yield from repeat(None, n_steps)
        elif self.device.type == "cuda":
            yield from uploaded_batches(self.embeddings, self.order, start_step, n_steps, self.device)
        else:
            with closing(batches(self.embeddings, self.order, start_step, n_steps)) as stream:
                for _, e_BE in stream:
                    yield e_BE

    def _shuffled(self, stream: Generator[Tensor, None, None], start_step: int) -> Generator[Tensor, None, None]:
        with closing(stream):
            for step, x_BD in enumerate(stream, start_step):
                yield shuffled(x_BD, self.config.seed, step)

    def _stored_batches(self, start_step: int, n_steps: int, announce: bool) -> Generator[Tensor, None, None]:
        if self.on_device:
            return self._rows_there().batches(self.order, start_step, n_steps)
        self.activations.check_whole()
        if self.device.type == "cuda":
            return uploaded_batches(self.activations, self.order, start_step, n_steps, self.device, announce)
        return self._host_batches(start_step, n_steps, announce)

    def _rows_there(self) -> ResidentRows:
        """All rows, on the device; read and checked at the first call."""
        if self._resident is None:
            self.activations.check_whole()
            self._resident = ResidentRows(self.activations, self.device)
        return self._resident

    def _host_batches(self, start_step: int, n_steps: int, announce: bool) -> Generator[Tensor, None, None]:
        with closing(batches(self.activations, self.order, start_step, n_steps, announce)) as stream:
            for _, x_BD in stream:
                yield x_BD

    def normalised(self, x_BD: Tensor, out: Tensor | None = None) -> Tensor:
        """A batch in the units that are trained in: Scale.normalised."""
        return self.scale.normalised(x_BD, out)

    def check_loss(self, ended: Callable[[int], str]) -> None:
        """ValueError: the loss of a step so far was NaN or infinite. ended: given that step, says what is left of the
        run."""
        bad = int(self.stepper.bad_step)
        if bad >= 0:
            raise diverged(f"loss: NaN or inf at step {bad + 1}", ended(bad + 1))

    def export(self) -> SparseAutoencoder:
        """A copy of the SAE in raw units, with a threshold (calibrated on data if the moving one has not started, or if
        no step moves those of jumprelu: an untrained control)."""
        sae = deepcopy(self.stepper.sae)
        if self.needs_calibration():
            sae.threshold.fill_(self.calibrated_threshold())
        return self.in_raw_units(sae)

    def needs_calibration(self) -> bool:
        """Whether an exported SAE needs a threshold that training has not found."""
        architecture, threshold = self.sae_config.architecture, self.stepper.sae.threshold
        untrained = architecture == "jumprelu" and self.config.control == "untrained"
        return untrained or (architecture in CALIBRATED and float(threshold) < 0)

    def in_raw_units(self, sae: SparseAutoencoder) -> SparseAutoencoder:
        """The finished SAE, of one in normalised units that has its threshold; changed in place."""
        self.scale.to_raw_units_(sae)
        mean_D = self.scale.mean_D
        centred = {} if mean_D is None else {"mean_norm": float(torch.linalg.vector_norm(mean_D.double()))}
        return with_metadata(
            sae,
            norm_factor=self.scale.norm_factor,
            **centred,
            steps=self.stepper.n_steps,
            n_training_samples=self.stepper.n_rows_seen,
            source=self.activations.source or {"path": str(self.activations.path)},
            training=json.loads(json.dumps(self.config.to_dict())),
        ).eval()

    @torch.no_grad()
    def calibrated_threshold(self) -> float:
        """Just below the smallest activation that BatchTopK keeps of some thousand rows: k a row pass on average, or
        the target L0 of a jumprelu SAE."""
        n_batches = min(-(-_CALIBRATION_ROWS // self.config.batch_size), self.order.batches_per_epoch)
        x_BD = torch.cat([self.normalised(x_BD) for x_BD in self.whole_batches(0, n_batches, announce=False)])
        smallest = self.smallest_kept(x_BD)
        # Ties at the cut are kept. A run that diverges is told of by its weights, not by this.
        return smallest * (1 - 1e-6) if math.isfinite(smallest) else 0.0

    def smallest_kept(self, x_BD: Tensor) -> float:
        """The smallest activation above 0 that BatchTopK keeps of some rows; 0 if there is none."""
        sae = self.stepper.sae
        l0 = self.config.wanted_l0 if sae.config.k is None else sae.config.k
        acts_M, _, _ = batch_topk_encode(x_BD, sae.W_enc, sae.b_enc, sae.b_dec, math.ceil(l0))
        kept = acts_M[acts_M > 0]
        n_kept = min(round(l0 * len(x_BD)), len(kept))
        return float(kept.topk(n_kept).values.min()) if n_kept else 0.0

    # What a checkpoint holds, and what a resumed run must have in common with it -------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """The state by name, on the device, not copied; with the stepper's two counters it is all of it."""
        stepper = self.stepper
        tensors = {name: p.contiguous() for name, p in stepper.parameters().items()}
        for name, (exp_avg, exp_avg_sq) in stepper.moments.items():
            tensors |= {f"{name}.exp_avg": exp_avg, f"{name}.exp_avg_sq": exp_avg_sq}
        tensors |= stepper.counters()
        if self.config.center:
            mean_D = self.scale.mean_D
            tensors["mean"] = torch.zeros(self.activations.d, device=self.device) if mean_D is None else mean_D
        return tensors | {"norm_factor": torch.tensor(self.scale.norm_factor, dtype=torch.float64)}

    def checked_tensors(self, ended: Callable[[int], str]) -> dict[str, Tensor]:
        """tensors(). ValueError: one of them is not finite; ended as of check_loss."""
        tensors = self.tensors()
        bad = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
        if bad:
            step = self.stepper.n_steps
            raise diverged(f"{', '.join(bad)}: NaN or inf after step {step}", ended(step))
        return tensors

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], n_steps: int, n_rows_seen: int) -> None:
        """Goes on from `tensors` as they were after step n_steps. ValueError: they cannot be of this run."""
        stepper = self.stepper
        rows = min(self.config.batch_size, self.activations.n_rows)
        sound = 0 <= n_steps <= self.config.n_steps and n_rows_seen == n_steps * rows
        require(sound, f"it says {n_steps} steps and {n_rows_seen} rows, of {self.config.n_steps} steps of {rows} rows")
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
        for name, counter in stepper.counters().items():
            counter.copy_(tensors[name])
        self.scale = Scale(float(tensors["norm_factor"]), tensors.get("mean"))
        stepper.n_steps, stepper.n_rows_seen = n_steps, n_rows_seen

    def settings(self, sampled: bool = False) -> dict[str, dict[str, Any]]:
        """What decides the run, section -> name -> value, for JSON.

        sampled: know the data by 64 of its rows, as runs of before did, instead of by its digest.

        Raises:
            ActivationError: sampled rows that are not finite.
        """
        known_by = (SAMPLED, self.fingerprint()) if sampled else (DATA_DIGEST, self.activations.digest())
        sae, blocks = self.sae_config, self.activations.block_rows
        of_mono = {} if self.embeddings is None else {MONO_DIGEST: self.embeddings.digest()}
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
                "order": blocks and f"blocks of {blocks} rows, of a store that is elsewhere",
                **of_mono,
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


def geometric_median(points_BD: Tensor) -> Tensor:
    """Weiszfeld's iteration from the mean, [D]: where b_dec starts. A point on the guess gets a large finite weight."""
    guess_D = points_BD.mean(0)
    for _ in range(100):
        previous_D = guess_D
        weights_B = 1 / (points_BD - guess_D).norm(dim=1).clamp(min=torch.finfo(points_BD.dtype).tiny ** 0.5)
        weights_B = weights_B / weights_B.sum()
        guess_D = weights_B @ points_BD
        if (guess_D - previous_D).norm() < 1e-5:
            break
    return guess_D

"""How a sparse autoencoder is trained, and where a run goes."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from saevlm_fast.config.common import DEVICE_HELP, LOGGER_NAMES, PENALISED, SELECTING, Control, DataOn
from saevlm_fast.config.sae import SAEConfig
from saevlm_fast.errors import did_you_mean, require, shown
from saevlm_fast.settings import Settings, number_or_auto, numbers, setting, texts


@dataclass(frozen=True)
class TrainConfig(Settings):
    """How an SAE is trained: the paper's recipe (docs/recipe.md section 2) is the default."""

    title = "Training"
    removed: ClassVar = {"dtype": "float32"}  # of the encoder product
    # Recorded where they were given alone: runs of before have none of them.
    if_given: ClassVar = dict.fromkeys(
        ("l1", "target_l0", "bandwidth", "sparsity_warmup", "control", "control_cosine", "mono_weight")
    ) | {"center": False, "accumulate": 1}
    # What decides the batches, and how many there are: the same for SAEs that are trained in one pass.
    shared: ClassVar = ("steps", "batch_size", "seed", "norm_batches", "center")
    steps: int = setting(110_000, help="Optimiser steps.", paper="110,000", at_least=1)
    batch_size: int = setting(
        4096,
        help="Rows per step, B; an epoch's last partial batch is dropped, fewer rows are one batch.",
        paper="4096",
        at_least=1,
    )
    lr: float | None = setting(
        None,
        help="Peak learning rate; auto is 2e-4 / sqrt(d_sae / 16384).",
        shown="auto",
        paper="auto",
        above=0,
        below=math.inf,
        must="a positive number, or auto",
        parse=number_or_auto,
        swept=True,
    )
    warmup_steps: int | None = setting(
        None,
        help="Warm-up steps, in which the learning rate rises linearly.",
        shown="min(1000, steps / 10)",
        paper="1000",
        at_least=0,
        option="warmup",
    )
    auxk_alpha: float = setting(
        0.03,
        help="Weight of the auxiliary loss on dead latents; 0 turns it off. The paper's code weighs it G times as much "
        "for G Matryoshka groups (docs/decisions.md).",
        paper="0.03",
        at_least=0,
        below=math.inf,
        must="finite and not negative",
        swept=True,
    )
    dead_after: int = setting(
        10_000_000, help="Rows without firing after which a latent is dead.", paper="10,000,000", at_least=1
    )
    l1: float | None = setting(
        None,
        help="Weight of a relu SAE's L1 penalty, in units of training, where mean |x|^2 is 1: less is denser. "
        "dictionary_learning has 0.1 and tries 0.012 to 0.06.",
        shown="0.03",
        at_least=0,
        below=math.inf,
        must="finite and not negative",
        swept=True,
    )
    target_l0: float | None = setting(
        None,
        help="Latents that fire on a row, on average, which a jumprelu SAE is trained for: its penalty is "
        "(L0 / target - 1)^2, as dictionary_learning's.",
        shown="20",
        above=0,
        below=math.inf,
        must="finite and positive",
        swept=True,
    )
    bandwidth: float | None = setting(
        None,
        help="Width of the window around a jumprelu SAE's thresholds in which they have a gradient, in units of "
        "training. dictionary_learning has 0.001.",
        shown="0.001",
        above=0,
        below=math.inf,
        must="finite and positive",
    )
    sparsity_warmup: int | None = setting(
        None,
        help="Steps in which the penalty of relu and jumprelu rises linearly; dictionary_learning has 2000.",
        shown="min(2000, steps / 5)",
        at_least=0,
    )
    threshold_start: int = setting(
        1000,
        help="First step (0-based, exclusive) from which the inference threshold follows the smallest kept activation.",
        paper="1000",
        at_least=0,
        on_command_line=False,
    )
    threshold_beta: float = setting(
        0.999,
        help="Decay of that moving average.",
        paper="0.999",
        at_least=0,
        below=1,
        must="in [0, 1)",
        on_command_line=False,
    )
    clip_norm: float = setting(
        1.0, help="Limit on the gradient's global norm.", paper="1", above=0, on_command_line=False
    )
    betas: tuple[float, float] = setting(
        (0.9, 0.999), help="Of Adam.", paper="0.9,0.999", parse=numbers, on_command_line=False, repeats=True
    )
    eps: float = setting(1e-8, help="Of Adam.", above=0, below=math.inf, on_command_line=False)
    norm_batches: int = setting(
        100,
        help="Batches from which norm_factor = sqrt(mean |x|^2) is estimated.",
        paper="100",
        at_least=1,
        on_command_line=False,
    )
    accumulate: int = setting(
        1,
        help="Micro-batches that a step's rows are cut into: less memory, the same step. "
        "batch_topk and matryoshka then select within a micro-batch.",
        paper="1",
        at_least=1,
    )
    center: bool = setting(
        False,
        help="Subtract the mean of the training rows, which the exported SAE has in its b_dec: a mean that is large "
        "beside the spread collapses an SAE.",
        paper="no",
    )
    seed: int = setting(0, help="Seed of the initial weights and of the order of the rows.", at_least=0)
    control: Control | None = setting(
        None,
        help="Train a control instead, which cannot learn one thing: frozen-decoder (W_dec stays as it began), "
        "soft-frozen (its rows stay near that), frozen-encoder (W_enc stays), untrained (no step is taken), shuffled "
        "(every dimension from other rows). docs/how-to/controls.md.",
        shown="none",
    )
    control_cosine: float | None = setting(
        None,
        help="Least cosine of a soft-frozen decoder's rows with those that they began as.",
        shown="0.8",
        at_least=0,
        below=1,
        must="in [0, 1)",
    )
    mono_weight: float | None = setting(
        None,
        help="Weight of MonoLoss, 1 - the batch's mean Monosemanticity Score with its own rows as embeddings. Judge by "
        "another encoder (docs/concepts/monoloss.md).",
        shown="none",
        above=0,
        below=math.inf,
        must="finite and positive",
    )

    def check(self) -> None:
        super().check()
        two = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(two, f"betas: {self.betas} must be two numbers in [0, 1)")
        require(
            self.accumulate <= self.batch_size,
            f"accumulate: {self.accumulate} micro-batches must be at most batch_size = {self.batch_size} rows",
        )

    def check_fits(self, sae: SAEConfig) -> None:
        """Whether an SAE is trained by these settings.

        Raises:
            ValueError: a setting of another architecture's recipe, an SAE whose k is needed and not known, or one that
                normalises its input.
        """
        of = {"l1": ("relu",), "target_l0": ("jumprelu",), "bandwidth": ("jumprelu",), "sparsity_warmup": PENALISED}
        for name, architectures in of.items():
            value, whose = getattr(self, name), " and ".join(architectures)
            fits = value is None or sae.architecture in architectures
            require(fits, f"{name}: {value} is of {whose}, not of {sae.architecture}")
        aux = sae.architecture != "relu" or self.auxk_alpha in (0, type(self).auxk_alpha)
        require(aux, f"auxk_alpha: {self.auxk_alpha} is of no use: a relu SAE has no auxiliary loss")
        require(
            self.target_l0 is None or self.target_l0 <= sae.d_sae,
            f"target_l0: {self.target_l0} must be at most d_sae = {sae.d_sae}",
        )
        self._check_control(sae)
        require(sae.architecture not in SELECTING or sae.k is not None, f"k: needed to train a {sae.architecture} SAE")
        require(sae.input_norm == "none", f"input_norm: {sae.input_norm} is of SAEs trained elsewhere, none is trained")

    def _check_control(self, sae: SAEConfig) -> None:
        soft = self.control_cosine is None or self.control == "soft-frozen"
        require(soft, f"control_cosine: {self.control_cosine} is of --control soft-frozen, not of {self.control}")
        if self.control == "untrained":
            has = sae.architecture != "relu"
            require(has, "control: untrained has its threshold set for an L0, and a relu SAE has no threshold")
            useful = self.mono_weight is None
            require(useful, f"mono_weight: {self.mono_weight} is of no use to an untrained control")
        whole = self.accumulate == 1 or (self.mono_weight is None and self.control in (None, "untrained", "shuffled"))
        other = "mono_weight" if self.mono_weight is not None else f"control {self.control}"
        require(whole, f"accumulate: {self.accumulate} does not go with {other}, which takes a batch as a whole")

    @property
    def n_steps(self) -> int:
        """Steps that are taken: `steps`, or none of an untrained control."""
        return 0 if self.control == "untrained" else self.steps

    @property
    def frozen(self) -> str | None:
        """The weights that no step changes, by name."""
        return {"frozen-decoder": "W_dec", "frozen-encoder": "W_enc"}.get(self.control or "")

    @property
    def least_cosine(self) -> float:
        """control_cosine, 0.8 unless it is given."""
        return 0.8 if self.control_cosine is None else self.control_cosine

    @property
    def l1_weight(self) -> float:
        """l1, 0.03 unless it is given."""
        return 0.03 if self.l1 is None else self.l1

    @property
    def wanted_l0(self) -> float:
        """target_l0, 20 unless it is given."""
        return 20.0 if self.target_l0 is None else self.target_l0

    @property
    def ste_bandwidth(self) -> float:
        """bandwidth, 0.001 unless it is given."""
        return 0.001 if self.bandwidth is None else self.bandwidth

    @property
    def n_sparsity_warmup(self) -> int:
        """Steps in which the penalty rises: min(2000, steps // 5) unless they are given."""
        return min(2000, self.steps // 5) if self.sparsity_warmup is None else self.sparsity_warmup

    def sparsity_scale(self, step: int) -> float:
        """Share of the penalty in 0-based step: linear from 0 at step 0, 1 after the warm-up."""
        warmup = self.n_sparsity_warmup
        return min(step / warmup, 1.0) if warmup else 1.0

    def peak_lr(self, d_sae: int) -> float:
        """The learning rate after warm-up."""
        return self.lr if self.lr is not None else 2e-4 / math.sqrt(d_sae / 2**14)

    @property
    def n_warmup(self) -> int:
        """Warm-up steps: min(1000, steps // 10) unless they are given."""
        return min(1000, self.steps // 10) if self.warmup_steps is None else self.warmup_steps

    def lr_at(self, step: int, d_sae: int) -> float:
        """The learning rate of 0-based step: linear from 0 at step 0, constant after warm-up; no decay."""
        warmup = self.n_warmup
        return self.peak_lr(d_sae) * (step / warmup if step < warmup else 1.0)

    def used(self, sae: SAEConfig) -> dict[str, Any]:
        """The recipe of such an SAE, by name: values that were chosen by themselves, and none without a use."""
        penalty: dict[str, dict[str, Any]] = {
            "relu": {"l1": self.l1_weight},
            "jumprelu": {"target_l0": self.wanted_l0, "bandwidth": self.ste_bandwidth},
        }
        found = asdict(self) | {"lr": self.peak_lr(sae.d_sae), "warmup_steps": self.n_warmup, "steps": self.n_steps}
        found |= penalty.get(sae.architecture, {})
        if sae.architecture in PENALISED:
            found["sparsity_warmup"] = self.n_sparsity_warmup
        if self.control == "soft-frozen":
            found["control_cosine"] = self.least_cosine
        unused = {"relu": {"auxk_alpha"}}.get(sae.architecture, set())
        if sae.architecture not in ("batch_topk", "matryoshka"):
            unused |= {"threshold_start", "threshold_beta"}
        return {name: value for name, value in found.items() if value is not None and name not in unused}

    def to_dict(self) -> dict[str, Any]:
        """A plain dict for JSON; settings of one architecture or of controls alone, and newer ones than the first
        release's, are there if they were given: a run of before is resumed by the same settings."""
        found, if_given = asdict(self), self.if_given
        return {name: value for name, value in found.items() if name not in if_given or value != if_given[name]}


@dataclass(frozen=True)
class RunOptions(Settings):
    """Where a training run goes and how it is watched."""

    title = "The run"
    output: Path | None = setting(None, help="Run directory.", shown="nothing is written")
    device: str = setting("auto", help=DEVICE_HELP)
    data_on: DataOn = setting(
        "auto",
        help="Where all rows are kept: in the device's memory (auto: a GPU's, if they fit beside training), or on the "
        "host, read ahead. The run is the same.",
    )
    capture: bool = setting(
        True, help="On a GPU, take steps by CUDA graphs; the same bits without.", on_command_line=False
    )
    log_every: int | None = setting(
        None, help="Steps between two logged lines.", shown="steps / 100, at most 100", at_least=1
    )
    log_to: tuple[str, ...] = setting(
        ("jsonl",),
        help="Where metrics go: jsonl (metrics.jsonl, always), tensorboard, trackio, wandb; several with commas.",
        parse=texts,
    )
    checkpoint_every: int | None = setting(
        None,
        help="Steps between two checkpoints, obeyed exactly.",
        shown="steps / 20, but none within 30 s of the last, or within 20 times what that took to write; the last step "
        "and an interrupt always write one",
        at_least=1,
    )
    collective_timeout: float = setting(
        600.0,
        help="Under torchrun: seconds that a rank waits for the others, after which the run ends.",
        above=0,
        below=1e9,
        must="positive and below 1e9",
        spec="g",
    )
    data_parallel: int = setting(
        1,
        help="Under torchrun: replicas, among which the rows of a batch are split; the ranks of a replica share its "
        "latents. It divides the number of ranks.",
        at_least=1,
    )
    resume: bool = setting(False, help="Continue the run in --output.", recorded=False, instead_of=("force",))
    force: bool = setting(
        False,
        help="Replace the run in --output, which stays until the new SAE is finished.",
        recorded=False,
        instead_of=("resume",),
    )

    def check(self) -> None:
        super().check()
        require(not (self.resume and self.force), "resume and force exclude each other")
        unknown = next((name for name in self.log_to if name not in LOGGER_NAMES), None)
        near = did_you_mean(str(unknown), LOGGER_NAMES)
        require(unknown is None, f"log_to: {shown(unknown)} is not one of {', '.join(LOGGER_NAMES)}{near}")
        if self.output is None:
            board = "tensorboard" in self.log_to
            require(not board, "log_to: tensorboard writes into the run's directory; give an output")
            given = [name for name in ("checkpoint_every", "resume", "force") if getattr(self, name)]
            require(not given, f"{', '.join(given)}: of a run without an output directory nothing is kept")
            return
        object.__setattr__(self, "output", Path(self.output))
        blocked = next((p for p in (Path(self.output), *Path(self.output).parents) if p.is_file()), None)
        require(blocked is None, f"output: {self.output} cannot be a directory, {blocked} is a file")

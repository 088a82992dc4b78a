"""Every setting of the engine, declared once: what an SAE is, how it is trained, what is harvested and scored.

Nothing here imports torch, so that the command line can show its help without it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from saevlm_fast.errors import check_kind, did_you_mean, require, shown
from saevlm_fast.settings import Settings, integer, number_or_auto, numbers, same_as, setting

Architecture = Literal["topk", "batch_topk", "matryoshka", "relu", "jumprelu"]
InputNorm = Literal["none", "layer_norm", "token_norm"]
ComputeDtype = Literal["float32", "tf32", "bfloat16", "float16"]
StoreDtype = Literal["float16", "bfloat16", "float32"]
DataOn = Literal["auto", "device", "host"]
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)
CALIBRATED: tuple[Architecture, ...] = ("batch_topk", "matryoshka")  # one threshold, which training finds
PENALISED: tuple[Architecture, ...] = ("relu", "jumprelu")  # trained with a penalty instead of k
SELECTING: tuple[Architecture, ...] = ("topk", "batch_topk", "matryoshka")  # by k, which the others have no use for
EXPANSION = 8.0
K = 20
MATRYOSHKA_FRACTIONS = (0.0625, 0.125, 0.25, 0.5625)  # paper, section 4; docs/recipe.md section 1
PROMPT = "What is shown in this image? Use exactly one word!"
WHITE = "white"
LARGEST = (1 << 31) - 1  # width of activations, number of latents: int32 indices hold them
_FLOAT32_MAX = 3.4028234663852886e38


def _is_whole(value: Any) -> bool:
    """Of whatever library; true and false are not numbers."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def group_sizes_from_fractions(fractions: tuple[float, ...], d_sae: int) -> tuple[int, ...]:
    """Group sizes from fractions that sum to 1: rounded down, the remainder to the last group (as upstream).

    Raises:
        ValueError: fractions that are not positive, do not sum to 1 (within 1e-6), or leave a group empty.
    """
    require(len(fractions) > 0, "groups: at least one fraction is needed")
    require(all(f > 0 for f in fractions), f"groups: {list(fractions)} must all be positive")
    require(
        math.isclose(sum(fractions), 1.0, abs_tol=1e-6),
        f"groups: {list(fractions)} sum to {sum(fractions):g}, not to 1",
    )
    sizes = [int(f * d_sae) for f in fractions[:-1]]
    sizes.append(d_sae - sum(sizes))
    require(min(sizes) >= 1, f"groups: {list(fractions)} leave a group of d_sae = {d_sae} latents empty: {sizes}")
    return tuple(sizes)


@dataclass(frozen=True)
class SAESize(Settings):
    """What a sparse autoencoder is to be, before the width of its activations is known; see `SAEConfig.sized`."""

    title = "The SAE"
    architecture: Architecture = setting(
        "batch_topk",
        help="batch_topk and topk are flat; matryoshka has nested groups of latents and selects as batch_topk does; "
        "relu is trained with an L1 penalty, jumprelu with a threshold per latent and a target L0.",
        paper="batch_topk, matryoshka",
    )
    expansion: float | None = setting(
        None,
        help="d_sae = expansion * d_in.",
        shown="8",
        paper="1 to 64",
        above=0,
        below=1e6,
        must="positive and below 1e6",
        spec="g",
        instead_of=("d_sae",),
    )
    d_sae: int | None = setting(
        None, help="Number of latents, instead of the expansion.", at_least=1, instead_of=("expansion",)
    )
    k: int | None = setting(
        None,
        help="Latents kept per row (on average for batch_topk and matryoshka); relu and jumprelu have none.",
        shown="20",
        paper="20",
        at_least=1,
    )
    groups: tuple[float, ...] = setting(
        MATRYOSHKA_FRACTIONS,
        help="Matryoshka group sizes as fractions of d_sae, the first group first.",
        paper="0.0625,0.125,0.25,0.5625",
        parse=numbers,
    )

    def check(self) -> None:
        super().check()
        require(self.d_sae is None or self.expansion is None, "d_sae: give either d_sae or expansion, not both")
        used = self.architecture == "matryoshka" or tuple(self.groups) == MATRYOSHKA_FRACTIONS
        require(used, f"groups: {list(self.groups)} are of matryoshka; the architecture is {self.architecture}")
        by_k = self.architecture in SELECTING
        require(self.k is None or by_k, f"k: {self.k} is of {', '.join(SELECTING)}; a {self.architecture} SAE has none")

    def config(self, d_in: int) -> "SAEConfig":
        """The SAE of activations of width d_in. ValueError: as `SAEConfig.sized`."""
        require(_is_whole(d_in), f"d_in: {shown(d_in)} must be a whole number")
        d_sae = self.d_sae
        if d_sae is None:
            d_sae = round((EXPANSION if self.expansion is None else self.expansion) * d_in)
        matryoshka = self.architecture == "matryoshka"
        sizes = group_sizes_from_fractions(tuple(self.groups), d_sae) if matryoshka else ()
        k = K if self.k is None and self.architecture in SELECTING else self.k
        return SAEConfig(d_in, d_sae, k, self.architecture, sizes)


@dataclass(frozen=True)
class SAEConfig(Settings):
    """What a sparse autoencoder is.

    k is None where a threshold decides and nothing is known of it: always allowed but for topk. Where it is known of
    relu, jumprelu and thresholded BatchTopK, it says how they were trained.

    Raises:
        ValueError: a size below 1, k > d_sae, a topk without k, group sizes that do not sum to d_sae or do not fit the
            architecture.
    """

    title = "The SAE"
    d_in: int = setting(help="Width of the activations, d.", at_least=1)
    d_sae: int = setting(help="Number of latents, F.", at_least=1)
    k: int | None = same_as(SAESize, "k", at_least=None, shown=None)
    architecture: Architecture = same_as(SAESize, "architecture")
    group_sizes: tuple[int, ...] = setting(
        (), help="Sizes of the Matryoshka groups, first group first; they sum to d_sae. One group otherwise."
    )
    metadata: dict[str, Any] = setting(
        factory=dict,
        help="Anything JSON: where the activations came from, norm factor, seed. Kept by save and load.",
    )
    input_norm: InputNorm = setting(
        "none",
        help="What becomes of every row before it is encoded, and is undone after it is decoded: nothing, "
        "layer_norm (x - mean) / (std + eps), or token_norm x sqrt(d_in) / |x|. SAEs of other libraries have it.",
    )
    eps: float = setting(1e-5, help="Of layer_norm.", at_least=0, below=math.inf, must="finite and not negative")

    def check(self) -> None:
        for name in ("d_in", "d_sae", "k"):
            value = getattr(self, name)
            if name == "k" and value is None:
                continue
            require(_is_whole(value), f"{name}: {shown(value)} must be a whole number")
            require(value <= LARGEST, f"{name}: {value} must be below 2^31")
        super().check()
        check_kind("metadata", self.metadata, Mapping, "a mapping")
        require(self.k is not None or self.architecture != "topk", "k: is None; a topk SAE needs it")
        fits = self.k is None or 1 <= self.k <= self.d_sae
        require(fits, f"k: {self.k} must be between 1 and d_sae = {self.d_sae}")
        if not self.group_sizes:
            require(self.architecture != "matryoshka", "group_sizes: a matryoshka SAE needs its group sizes")
            object.__setattr__(self, "group_sizes", (self.d_sae,))
        several = self.input_norm != "layer_norm" or self.d_in > 1
        require(several, "input_norm: layer_norm of one number, which has no standard deviation")
        for size in self.group_sizes:
            require(_is_whole(size), f"group_sizes: {shown(size)} must be a whole number")
        object.__setattr__(self, "group_sizes", tuple(int(size) for size in self.group_sizes))
        require(min(self.group_sizes) >= 1, f"group_sizes: {self.group_sizes} must all be at least 1")
        require(
            sum(self.group_sizes) == self.d_sae,
            f"group_sizes: {self.group_sizes} sum to {sum(self.group_sizes)}, not to d_sae = {self.d_sae}",
        )
        require(
            len(self.group_sizes) == 1 or self.architecture == "matryoshka",
            f"group_sizes: only a matryoshka SAE has more than one group, not {self.architecture}",
        )

    @classmethod
    def sized(
        cls,
        d_in: int,
        *,
        expansion: float | None = SAESize.expansion,
        d_sae: int | None = SAESize.d_sae,
        k: int | None = SAESize.k,
        architecture: Architecture = SAESize.architecture,
        groups: Sequence[float] = SAESize.groups,
    ) -> "SAEConfig":
        """The SAE of activations of width d_in; the arguments are the settings of SAESize, where the rules are.

        Args:
            d_in: width of the activations, d.
            expansion: d_sae = expansion * d_in, rounded; 8 if neither it nor d_sae is given (the paper tries 1 to 64).
            d_sae: number of latents, instead of expansion.
            k: latents kept per row; 20 if it is not given, as in the paper. relu and jumprelu have none.
            architecture: topk, batch_topk, matryoshka, relu or jumprelu.
            groups: sizes of the Matryoshka groups as fractions of d_sae (paper, section 4).

        Raises:
            ValueError: both sizes given, an expansion that is not in (0, 1e6), groups that do not sum to 1 or are
                given to another architecture, k > d_sae, or k given to an architecture without.
        """
        return SAESize(architecture, expansion, d_sae, k, groups).config(d_in)  # type: ignore[arg-type]

    @property
    def known_k(self) -> int:
        """k. ValueError: it is not known, where a threshold decides."""
        require(self.k is not None, f"k: not known of this {self.architecture} SAE, whose threshold decides")
        return int(self.k or 0)

    @property
    def group_ends(self) -> list[int]:
        """Where each nested prefix of latents ends; the last is d_sae."""
        return [sum(self.group_sizes[: i + 1]) for i in range(len(self.group_sizes))]


@dataclass(frozen=True)
class TrainConfig(Settings):
    """How an SAE is trained: the paper's recipe (docs/recipe.md section 2) is the default."""

    title = "Training"
    removed: ClassVar = {"dtype": "float32"}  # of the encoder product
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
    )
    target_l0: float | None = setting(
        None,
        help="Latents that fire on a row, on average, which a jumprelu SAE is trained for: its penalty is "
        "(L0 / target - 1)^2, as dictionary_learning's.",
        shown="20",
        above=0,
        below=math.inf,
        must="finite and positive",
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
        (0.9, 0.999), help="Of Adam.", paper="0.9,0.999", parse=numbers, on_command_line=False
    )
    eps: float = setting(1e-8, help="Of Adam.", above=0, below=math.inf, on_command_line=False)
    norm_batches: int = setting(
        100,
        help="Batches from which norm_factor = sqrt(mean |x|^2) is estimated.",
        paper="100",
        at_least=1,
        on_command_line=False,
    )
    seed: int = setting(0, help="Seed of the initial weights and of the order of the rows.", at_least=0)

    def check(self) -> None:
        super().check()
        two = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(two, f"betas: {self.betas} must be two numbers in [0, 1)")

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
        require(sae.architecture not in SELECTING or sae.k is not None, f"k: needed to train a {sae.architecture} SAE")
        require(sae.input_norm == "none", f"input_norm: {sae.input_norm} is of SAEs trained elsewhere, none is trained")

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
        found = asdict(self) | {"lr": self.peak_lr(sae.d_sae), "warmup_steps": self.n_warmup}
        found |= penalty.get(sae.architecture, {})
        if sae.architecture in PENALISED:
            found["sparsity_warmup"] = self.n_sparsity_warmup
        unused = {"relu": {"auxk_alpha"}}.get(sae.architecture, set())
        if sae.architecture not in ("batch_topk", "matryoshka"):
            unused |= {"threshold_start", "threshold_beta"}
        return {name: value for name, value in found.items() if value is not None and name not in unused}

    def to_dict(self) -> dict[str, Any]:
        """A plain dict for JSON; settings of one architecture alone are there if they were given."""
        alone = ("l1", "target_l0", "bandwidth", "sparsity_warmup")
        return {name: value for name, value in asdict(self).items() if value is not None or name not in alone}


DEVICE_HELP = "auto (a GPU if there is one), cpu, cuda or cuda:N."


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
    checkpoint_every: int | None = setting(
        None,
        help="Steps between two checkpoints, obeyed exactly.",
        shown="steps / 20, but none within 30 s of the last, or within 20 times what that took to write; the last step "
        "and an interrupt always write one",
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
        if self.output is None:
            given = [name for name in ("checkpoint_every", "resume", "force") if getattr(self, name)]
            require(not given, f"{', '.join(given)}: of a run without an output directory nothing is kept")
            return
        object.__setattr__(self, "output", Path(self.output))
        blocked = next((p for p in (Path(self.output), *Path(self.output).parents) if p.is_file()), None)
        require(blocked is None, f"output: {self.output} cannot be a directory, {blocked} is a file")


@dataclass(frozen=True, kw_only=True)
class HarvestSettings(Settings):
    """What decides the rows of a harvest, beside hook points and tokens: `harvesting.config.HarvestConfig` has all."""

    title = "Rows"
    seed: int = setting(0, help="Seed of the random tokens.", at_least=0)
    limit: int | None = setting(None, help="Only the first so many images.", shown="all", at_least=1)
    batch_size: int = setting(64, help="Images of a forward pass.", at_least=1)
    dtype: ComputeDtype = setting(
        "float32",
        help="Of the forward: float32, tf32 (matrix products on a GPU), or bfloat16 or float16 (autocast).",
    )
    store_dtype: StoreDtype | None = setting(None, help="On disk.", shown="the forward's; codes float16")
    images_per_shard: int | None = setting(
        None,
        help="Unit of work, of resuming, rounded up to whole batches: an interrupt costs the one at hand.",
        shown="1024, fewer where a shard would have more than 65,536 rows",
        at_least=1,
    )
    sae: Path | None = setting(None, help="Write this SAE's sparse codes instead of activations.")
    pool: Literal["none", "mean"] = setting(
        "none", help="Codes of every token (none) or averaged over an image's tokens (mean)."
    )

    def check(self) -> None:
        super().check()
        require(self.pool == "none" or self.sae is not None, "pool: only codes are pooled, give --sae")


@dataclass(frozen=True)
class HarvestOptions(Settings):
    """How a harvest is done: nothing here changes which rows there are (compile changes their last bits)."""

    title = "The run"
    output: Path = setting(help="Store; with several points or tokens, a directory of stores.")
    images: str = setting(
        "",
        help="Folder, list .txt, tar shards (glob or {000..012}), Hugging Face dataset on disk, or scenes:SPLIT:N.",
    )
    workers: int | None = setting(
        None,
        help="Processes that decode and preprocess images, per rank.",
        shown="1 beside a CPU, up to 8 beside a GPU",
        at_least=0,
    )
    max_skipped: float = setting(
        0.01, help="Share of unusable images above which the harvest fails.", at_least=0, at_most=1
    )
    compile: bool = setting(False, help="torch.compile the tower's blocks.")
    resume: bool = setting(False, help="Continue the harvest in --output.", recorded=False, instead_of=("force",))
    force: bool = setting(
        False,
        help="Replace the harvest in --output, which stays until the new one is complete.",
        recorded=False,
        instead_of=("resume",),
    )

    def check(self) -> None:
        super().check()
        require(not (self.resume and self.force), "resume and force exclude each other")


def _images_asked(name: str, text: str) -> int:
    return 0 if text == WHITE else integer(name, text)


@dataclass(frozen=True)
class ScoreConfig(Settings):
    """What the steering score measures (docs/recipe.md section 4)."""

    title = "The score"
    latents: tuple[int, ...] = setting((), help="Latents that are scored.", shown="all")
    alpha: float = setting(100.0, help="Value that a latent is clamped at, in raw activation units.", paper="100")
    ask: int = setting(
        10,
        help="Number of random images asked about, the same for every latent, or white: one white image (as is 0).",
        paper="white, and images of ImageNet",
        at_least=0,
        parse=_images_asked,
    )
    prompt: str = setting(PROMPT, help="The question.", shown="the paper's", paper=PROMPT)
    n_reference: int = setting(
        256, help="Random images behind the difference of means.", at_least=1, on_command_line=False
    )
    seed: int = setting(0, help="Seed of the images asked about and the random latents.", at_least=0)

    def check(self) -> None:
        super().check()
        fits = math.isfinite(self.alpha) and abs(self.alpha) <= _FLOAT32_MAX
        require(fits, f"alpha: {self.alpha} is not finite in float32")
        require(self.prompt.strip() != "", "prompt: is empty")
        require(len(set(self.latents)) == len(self.latents), "latents: one is listed twice")


@dataclass(frozen=True)
class ScoreRun(Settings):
    """Where the steering score is written and how far it has come."""

    title = "The run"
    output: Path = setting(help="Table: FILE.parquet, FILE.csv or FILE.json.")
    sources: dict[str, str] = setting(help="Paths and names that must be the same when a run is resumed.")
    resume: bool = setting(
        False, help="Continue the unfinished run of --output.", recorded=False, instead_of=("force",)
    )
    force: bool = setting(
        False, help="Replace --output once the new table is whole.", recorded=False, instead_of=("resume",)
    )
    latents_per_block: int = setting(
        16, help="Latents that are scored and saved together.", at_least=1, on_command_line=False
    )

    def check(self) -> None:
        super().check()
        require(not (self.resume and self.force), "resume: does not go with force, which starts anew")

    @property
    def progress(self) -> Path:
        """A folder with the settings and a file for every finished block; gone when the output is written."""
        return self.output.with_name(self.output.name + ".progress")


@dataclass(frozen=True)
class DemoOptions(Settings):
    """Where the demo goes."""

    output: Path = setting(Path("demo"), help="Directory for the SAEs, scores, table and picture.")
    device: str = setting("auto", help=DEVICE_HELP)
    force: bool = setting(False, help="Replace the demo in --output.", shown="go on with it", recorded=False)


def keyword_settings(who: str, given: Mapping[str, Any], *kinds: Any) -> list[dict[str, Any]]:
    """Settings given by name, one dict for each of the dataclasses whose fields they are.

    Raises:
        ValueError: a name that is a field of none of them, with the nearest that is; `who` takes the settings.
    """
    known = [{each.name for each in fields(kind)} for kind in kinds]
    for name in given:
        every = sorted(set().union(*known))
        require(name in every, f"{name}: no setting of {who}{did_you_mean(name, every)}")
    return [{name: value for name, value in given.items() if name in names} for names in known]

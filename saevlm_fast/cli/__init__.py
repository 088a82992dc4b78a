"""The command line: parse, build a config, call, print. Errors in the input end with one line and exit code 2."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from saevlm_fast.errors import Interrupted

if TYPE_CHECKING:
    from saevlm_fast.demo.scene_stores import SceneStores
    from saevlm_fast.demo.scores import Measured
    from saevlm_fast.demo.steering import ColourLatent
    from saevlm_fast.harvesting.run import HarvestSummary
    from saevlm_fast.scoring.monosemanticity import ScoreSummary
    from saevlm_fast.steering.answers import SteeredAnswers
    from saevlm_fast.steering.score import SteeringScores

RUNS = Path("runs")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Sparse autoencoders for vision-language models on Triton kernels, and their Monosemanticity Score.",
)


class _Console(Console):
    """Keeps quiet, and lets the work go on, when who reads the output has gone (a pager, `head`)."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self.file.fileno())  # else Python would fail on it again when it ends


# No markup: a path may hold [brackets].
out, err = _Console(markup=False), _Console(stderr=True, markup=False)


def main() -> None:
    """Entry point: input errors in one line and exit code 2, an interrupted run 130, never half a traceback."""
    # Before torch is imported: waiting threads that spin make a step several times slower on a machine that is shared
    # (docs/decisions.md), and no faster on one that is not.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    signal.signal(signal.SIGINT, _interrupt)
    try:
        app()
    except RuntimeError as error:
        if "memory" not in str(error):  # torch says "can't allocate memory" or "out of memory"
            raise
        err.print(f"error: {str(error).splitlines()[0]}", style="red", highlight=False, soft_wrap=True)
        sys.exit(2)
    except (ValueError, OSError, MemoryError) as error:
        err.print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        sys.exit(2)
    except (Interrupted, KeyboardInterrupt) as error:
        err.print(str(error) or "interrupted", style="yellow", highlight=False, soft_wrap=True)
        sys.exit(130)


def _interrupt(number: int, frame: object) -> None:
    """Ctrl-C outside a training step. Not KeyboardInterrupt, which the command framework ends without a word."""
    raise Interrupted("interrupted")


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Options of the program itself."""
    if version:
        from saevlm_fast import __version__

        out.print(__version__, highlight=False)
        raise typer.Exit


@app.command()
def synthetic(
    output: Annotated[Path, typer.Argument(help="Directory for activations.npy and embeddings.npy.")],
    rows: Annotated[int, typer.Option(help="Images, N.")] = 20_000,
    d_in: Annotated[int, typer.Option(help="Width of the activations.")] = 128,
    d_embedding: Annotated[int, typer.Option(help="Width of the image embeddings.")] = 64,
    concepts: Annotated[int, typer.Option(help="Planted concepts.")] = 400,
    seed: Annotated[int, typer.Option(help="Seed of the concepts and the images.")] = 0,
) -> None:
    """Write activations with planted concepts and matching image embeddings: data to try everything on, no download."""
    from saevlm_fast.data.synthetic import PlantedConcepts, write_synthetic

    source = PlantedConcepts(d_in=d_in, d_embedding=d_embedding, n_concepts=concepts, seed=seed)
    for path in write_synthetic(output, rows, source):
        out.print(f"wrote {path}", highlight=False, soft_wrap=True)


@app.command()
def harvest(
    model: Annotated[str, typer.Option(help="hf:NAME_OR_DIR, open_clip:ARCH/PRETRAINED_OR_FILE or timm:NAME[:FILE].")],
    images: Annotated[
        str,
        typer.Option(
            help="Folder, list .txt, tar shards (glob or {000..012}), Hugging Face dataset on disk, or scenes:SPLIT:N."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Store; with several points or tokens, a directory of stores.")],
    layer: Annotated[list[str] | None, typer.Option(help="Block, from 0; several: 5,8,11. One pass.")] = None,
    point: Annotated[
        list[str] | None,
        typer.Option(help="residual, mlp, attention, projection, pooled; several: a,b.  \\[default: residual]"),
    ] = None,
    tokens: Annotated[
        list[str] | None,
        typer.Option(help="cls, patches, all, mean, random:K, random:K:all; several: a,b.  \\[default: cls]"),
    ] = None,
    sae: Annotated[Path | None, typer.Option(help="Write this SAE's sparse codes instead of activations.")] = None,
    pool: Annotated[str, typer.Option(help="Codes of every token (none) or averaged over an image (mean).")] = "none",
    batch_size: Annotated[int, typer.Option(help="Images of a forward pass.")] = 64,
    dtype: Annotated[
        str, typer.Option(help="Of the forward: float32, tf32, bfloat16, float16 (autocast).")
    ] = "float32",
    store_dtype: Annotated[
        str | None, typer.Option(help="On disk: float32, bfloat16, float16.  \\[default: the forward's; codes float16]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random tokens.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Only the first so many images.")] = None,
    images_per_shard: Annotated[
        int | None, typer.Option(help="Unit of work, of resuming.  \\[default: 1024, fewer for many tokens]")
    ] = None,
    max_skipped: Annotated[float, typer.Option(help="Share of unusable images above which the harvest fails.")] = 0.01,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that decode images.  \\[default: 1 beside a CPU, up to 8 beside a GPU]"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    compile_: Annotated[bool, typer.Option("--compile", help="torch.compile the tower's blocks.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the harvest in --output.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the harvest in --output.")] = False,
) -> None:
    """Run images through a vision tower; store activations, or an SAE's codes. Under torchrun, ranks share the work."""
    from saevlm_fast.errors import printable
    from saevlm_fast.harvesting.config import HarvestConfig, HarvestOptions
    from saevlm_fast.harvesting.ranks import torchrun_ranks
    from saevlm_fast.harvesting.run import harvest as run_harvest
    from saevlm_fast.harvesting.stores import check_output
    from saevlm_fast.images.open import open_images
    from saevlm_fast.provenance import sae_mismatch
    from saevlm_fast.runtime import resolve_device
    from saevlm_fast.towers.load import load_tower
    from saevlm_fast.towers.tokens import Tokens
    from saevlm_fast.towers.tower import HookPoint

    layers = [_integer("layer", text) for text in _listed(layer)]
    config = HarvestConfig(
        points=tuple(HookPoint.all_of(_listed(point) or ["residual"], layers)),
        tokens=tuple(Tokens.parse(text) for text in _listed(tokens) or ["cls"]),
        seed=seed, limit=limit, batch_size=batch_size, dtype=dtype, store_dtype=store_dtype,
        images_per_shard=images_per_shard, sae=sae, pool=pool,
    )  # fmt: skip
    options = HarvestOptions(output, images, workers, max_skipped, compile_, resume, force)
    check_output(options)  # before a model is loaded
    source = open_images(images)
    with torchrun_ranks() as ranks:
        target = resolve_device(ranks.device(device))
        tower = load_tower(model, target, on_message=lambda text: err.print(text, highlight=False, soft_wrap=True))
        if ranks.rank == 0:
            n_images = min(len(source), limit or len(source))
            what = f"{model} on {target}: {tower.n_blocks} blocks; {n_images:,} images of {images}"
            ignored = f" ({source.n_ignored:,} other files ignored)" if source.n_ignored else ""
            out.print(what + ignored, highlight=False, soft_wrap=True)
            for note in source.notes:
                err.print(printable(f"images: {note}"), markup=False, emoji=False, highlight=False, soft_wrap=True)
            if sae is not None:
                _warn_of_mismatch(sae_mismatch(sae, tower, *config.stores[0]))
        with HarvestProgress(ranks.rank, ranks.world) as progress:
            summary = run_harvest(source, tower, config, options, ranks=ranks, on_images=progress.images)
        if ranks.rank == 0:
            _print_harvested(summary)


@app.command()
def train(
    activations: Annotated[
        Path | None,
        typer.Option(
            help="Activation store, or a matrix [N, d]: .npy, .safetensors, .pt.  \\[default: the box's scenes]"
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Run directory.  \\[default: runs/DATE-TIME]")] = None,
    architecture: Annotated[str, typer.Option(help="batch_topk, topk or matryoshka.")] = "batch_topk",
    expansion: Annotated[
        float | None, typer.Option(help="d_sae = expansion * d_in.  \\[default: 8; on the box 4]")
    ] = None,
    d_sae: Annotated[int | None, typer.Option(help="Number of latents, instead of --expansion.")] = None,
    k: Annotated[
        int | None,
        typer.Option(
            help="Latents kept per row (on average for batch_topk and matryoshka).  \\[default: 20; on the box 10]"
        ),
    ] = None,
    groups: Annotated[
        str, typer.Option(help="Matryoshka group sizes as fractions of d_sae.")
    ] = "0.0625,0.125,0.25,0.5625",
    steps: Annotated[
        int | None, typer.Option(help="Optimiser steps.  \\[default: 110,000, as the paper; on the box 1,200]")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Rows per step; an epoch's last partial batch is dropped, fewer rows are one batch.  "
            "\\[default: 4096; on the box 512]"
        ),
    ] = None,
    lr: Annotated[str, typer.Option(help="Learning rate; auto is 2e-4 / sqrt(d_sae / 16384).")] = "auto",
    warmup: Annotated[int | None, typer.Option(help="Warm-up steps.  \\[default: min(1000, steps / 10)]")] = None,
    auxk_alpha: Annotated[float, typer.Option(help="Weight of the auxiliary loss on dead latents.")] = 0.03,
    dead_after: Annotated[
        int | None,
        typer.Option(
            help="Rows without firing after which a latent is dead.  \\[default: 10,000,000; on the box 100,000]"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the order of the rows.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the encoder product: float32, tf32 or bfloat16.")] = "float32",
    validation: Annotated[Path | None, typer.Option(help="Held-out activations for the final evaluation.")] = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(
            help="Steps, obeyed exactly.  \\[default: steps / 20, but none within 30 s of the last, or within 20 times "
            "what that took to write; the last step and an interrupt always write one]"
        ),
    ] = None,
    log_every: Annotated[int | None, typer.Option(help="Steps.  \\[default: steps / 100, at most 100]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --output.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the run in --output.")] = False,
) -> None:
    """Train a sparse autoencoder on activations, by the recipe of arXiv 2504.02821.

    Without --activations: on scenes of the box, which are harvested with tiny-clip and kept in a cache.
    """
    from saevlm_fast.config import EXPANSION, SAEConfig, TrainConfig
    from saevlm_fast.data.rows import open_activations
    from saevlm_fast.demo.scene_stores import RECIPE
    from saevlm_fast.errors import require
    from saevlm_fast.training.checkpoints import latest_checkpoint
    from saevlm_fast.training.run import RunOptions
    from saevlm_fast.training.run import train as run_training

    require(output is not None or not resume, "output: --resume needs the directory of the run")
    output = _new_run_directory() if output is None else output
    recipe: dict[str, Any] = {"k": 20, "expansion": EXPANSION}
    if activations is None:
        recipe = RECIPE
        activations = _scenes("train", device=device).activations
        validation = validation or _scenes("test", device=device).activations
    given = {"k": k, "expansion": expansion, "steps": steps, "batch_size": batch_size, "dead_after": dead_after}
    chosen = recipe | {name: value for name, value in given.items() if value is not None}
    data = open_activations(activations)
    held_out = open_activations(validation) if validation is not None else None
    default_expansion = chosen.pop("expansion")
    if d_sae is None and expansion is None:
        expansion = default_expansion
    sae_config = SAEConfig.sized(
        data.d, expansion=expansion, d_sae=d_sae, k=chosen.pop("k"), architecture=architecture,
        groups=_fractions(groups),
    )  # fmt: skip
    config = TrainConfig(
        lr=None if lr == "auto" else _number("lr", lr), warmup_steps=warmup, auxk_alpha=auxk_alpha, seed=seed,
        dtype=dtype, **chosen,
    )  # fmt: skip
    options = RunOptions(output, device, log_every, checkpoint_every, resume, force)
    out.print(
        f"{architecture} SAE {data.d} -> {sae_config.d_sae}, k = {sae_config.k}, on {data.n_rows:,} rows; {config.steps:,} "
        f"steps of {min(config.batch_size, data.n_rows):,}, lr {config.peak_lr(sae_config.d_sae):.3g}, {data.path}",
        highlight=False,
        soft_wrap=True,
    )
    if resume:
        checkpoint = latest_checkpoint(output)
        what = f"newest checkpoint {checkpoint.name}" if checkpoint else "no checkpoint yet: starting at step 0"
        out.print(f"resume: {output}: {what}", highlight=False, soft_wrap=True)
    with TrainProgress(config.steps) as progress:
        _, metrics = run_training(
            data, sae_config, config, options, validation=held_out, on_log=progress.log, on_step=progress.step
        )
    out.print(
        f"evaluation on all {metrics.pop('rows'):,} {'validation' if held_out else 'training'} rows", highlight=False
    )
    table = Table("measure", Column("value", justify="right"))
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}")
    out.print(table)
    out.print(f"wrote {output}", highlight=False, soft_wrap=True)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Directory for the SAEs, scores, table and picture.")] = Path("demo"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    force: Annotated[
        bool, typer.Option("--force", help="Replace the demo in --output.  \\[default: go on with it]")
    ] = False,
) -> None:
    """The whole way on what is in the box: scenes, SAEs, their scores against raw neurons and the truth, a picture."""
    from saevlm_fast.demo.contact_sheet import save_sheet
    from saevlm_fast.demo.scene_stores import N_SCENES, RECIPE
    from saevlm_fast.demo.scores import ARCHITECTURES, RAW, Scored, picture, train_on_scenes
    from saevlm_fast.demo.steering import N_PATCH_SCENES, PATCHES, steer_colours
    from saevlm_fast.files import write_json_atomic
    from saevlm_fast.scoring.tables import write_scores
    from saevlm_fast.training.run import RunOptions

    begun = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)  # before the work begins
    _step(1, f"scenes through tiny-clip ({N_SCENES['train']:,} to train on, {N_SCENES['test']:,} to test on)")
    train_on, test_on = _scenes("train", device=device), _scenes("test", device=device)

    def trained_on(train_on: "SceneStores", test_on: "SceneStores", architecture: str, name: str, steps: int) -> Any:
        options = RunOptions(output / name, device, resume=not force, force=force)
        with TrainProgress(steps) as progress, _same_command():
            return train_on_scenes(architecture, train_on, test_on, steps, options, progress.log, progress.step)

    trained: dict[str, Any] = {RAW: (None, None)}
    for i, architecture in enumerate(ARCHITECTURES):
        _step(2 + i, f"training a {architecture} SAE")
        trained[architecture] = trained_on(train_on, test_on, architecture, architecture, RECIPE["steps"])
    _step(4, "scoring every latent against images and labels")
    scored = []
    for name, (sae, _) in trained.items():
        with _bar("score", N_SCENES["test"]) as advance:
            scored.append(Scored(name, test_on, sae, advance))
        write_scores(scored[-1].scores, output / f"scores-{name.replace(' ', '-')}.parquet")
    table = [each.measured(metrics) for each, (_, metrics) in zip(scored, trained.values())]
    _step(5, "an SAE of patches, and tiny-llava steered by its latents")
    train_on, test_on = (
        _scenes(split, device=device, n=n, tokens=PATCHES[split]) for split, n in N_PATCH_SCENES.items()
    )
    sae, _ = trained_on(train_on, test_on, "batch_topk", "patches", RECIPE["steps"] // 2)
    with _bar("steer") as advance:
        steered = steer_colours(sae, test_on, advance)
    summary = {"scores": [line.to_dict() for line in table], "steering": [asdict(line) for line in steered.latents]}
    write_json_atomic(output / "summary.json", summary)
    save_sheet(picture(scored, steered.section()), output / "latents.png")
    for image in steered.images[:1]:
        save_sheet(image, output / "scene.png")
    _print_scored(table)
    _print_steered(steered.latents)
    _print_demo_files(output, steered.latents, time.monotonic() - begun)


@contextmanager
def _same_command() -> Iterator[None]:
    """The demo has no --resume: it goes on by itself."""
    try:
        yield
    except Interrupted:
        raise Interrupted("interrupted; the same command goes on where it stopped") from None


def _step(number: int, what: str) -> None:
    out.print(f"\n[{number}/5] {what}", style="bold", highlight=False, soft_wrap=True)


def _print_scored(table: "list[Measured]") -> None:
    names = ("latents", "EV", "L0", "MS", "best", "purity", "MS~purity")
    columns = (Column(name, justify="right", no_wrap=True) for name in names)
    shown = Table(Column("", no_wrap=True), *columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for line in table:
        shown.add_row(
            line.name, f"{line.seen}/{line.latents}",
            "" if line.explained_variance is None else f"{line.explained_variance:.3f}",
            "" if line.l0 is None else f"{line.l0:.1f}", f"{line.ms_mean:.3f} +- {line.ms_std:.3f}",
            f"{line.ms_best:.3f}", f"{line.purity:.3f}", f"{line.correlation:.2f}",
        )  # fmt: skip
    out.print(shown)
    out.print(
        "Latents: those that fire on 50 test scenes or more, of all; the scores are theirs. MS: whether a latent's\n"
        "images look alike to the model. Purity: whether they share a known factor, above its base rate. MS~purity:\n"
        "rank correlation. EV: explained variance. All on scenes that no SAE was trained on.",
        soft_wrap=True, highlight=False,
    )  # fmt: skip


def _print_steered(latents: "list[ColourLatent]") -> None:
    from saevlm_fast.demo.steering import QUESTION

    if not latents:
        out.print("No latent of the patches stands for a colour, so nothing was steered.")
        return
    names = ("latent", "purity", "clamped to", "as it is", "SAE alone", "random", "clamped")
    columns = (Column(name, justify="right") for name in names)
    shown = Table("colour", *columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    strongest = {each.colour: each for each in reversed(latents)}
    for each in sorted(strongest.values(), key=lambda each: -each.alpha):
        shares = (each.before, each.attached, each.random, each.clamped)
        numbers = (str(each.latent), f"{each.purity:.2f}", f"{each.alpha:.1f}")
        shown.add_row(each.colour, *numbers, *(f"{share:.0%}" for share in shares))
    each_shares = [(each.before, each.attached, each.random, each.clamped) for each in latents]
    means = [sum(column) / len(latents) for column in zip(*each_shares)]
    shown.add_row(f"all {len(latents)}", "", "", "", *(f"{mean:.0%}" for mean in means))
    out.print(shown)
    out.print(
        f'Answers that are the latent\'s colour, to "{QUESTION}" about objects of other colours: of tiny-llava as it\n'
        "is, with the SAE in place, with a random latent clamped, with this one clamped. The strongest latent of each\n"
        "colour; in the last line the mean of all that stand for a colour (summary.json has each).",
        soft_wrap=True, highlight=False,
    )  # fmt: skip


def _print_demo_files(output: Path, latents: "list[ColourLatent]", seconds: float) -> None:
    from saevlm_fast.demo.scene_stores import LAYER
    from saevlm_fast.demo.steering import LLAVA, QUESTION

    names = ("latents.png", "summary.json", "scores-*.parquet", "batch_topk/", "matryoshka/", "patches/")
    lines = [f"{seconds:.0f} s; wrote {', '.join(str(output / name) for name in names)}", "Look at the picture."]
    for each in latents[:1]:
        lines += [
            "Steer it yourself:",
            f"  saevlm-fast steer --model hf:{LLAVA} --sae {output / 'patches'} --layer {LAYER} --image "
            f"{output / 'scene.png'} --prompt '{QUESTION}' --latent {each.latent} --alpha {each.alpha:.0f}",
        ]
    lines += [
        "Next, the real thing:",
        "  saevlm-fast harvest --model hf:openai/clip-vit-large-patch14-336 --images imagenet/train "
        "--output clip-train --layer 22",
    ]
    for line in lines:
        out.print(line, soft_wrap=True, highlight=False)


@app.command("ms-score")
def ms_score(
    embeddings: Annotated[
        Path | None,
        typer.Option(
            help="Image embeddings, row i of image i: store or matrix file.  \\[default: the box's test scenes]"
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Scores: FILE.parquet, FILE.csv or FILE.json.  \\[default: SAE/scores.parquet]")
    ] = None,
    activations: Annotated[
        Path | None, typer.Option(help="Activations, row i of image i: store or matrix file; with --sae or --raw.")
    ] = None,
    sae: Annotated[
        Path | None,
        typer.Option(
            help="SAE directory (cfg.json, sae_weights.safetensors).  \\[default: the latest run below runs/]"
        ),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Score the activations' own neurons instead of an SAE.")] = False,
    codes: Annotated[
        Path | None, typer.Option(help="Store of an SAE's codes, instead of --sae and --activations.")
    ] = None,
    similarity: Annotated[str, typer.Option(help="cosine, dot or rbf.")] = "cosine",
    gamma: Annotated[float | None, typer.Option(help="Of rbf, exp(-gamma |e_i - e_j|^2).  \\[default: 1 / E]")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows read and encoded at a time.")] = 4096,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Monosemanticity Score of every latent (or raw neuron), in one pass over the images.

    Without arguments: of the latest run below runs/, on scenes of the box that it was not trained on.
    """
    from saevlm_fast.data.codes import open_codes
    from saevlm_fast.data.rows import open_activations
    from saevlm_fast.errors import require
    from saevlm_fast.runtime import resolve_device
    from saevlm_fast.sae import SparseAutoencoder
    from saevlm_fast.scoring.monosemanticity import score
    from saevlm_fast.scoring.tables import check_scores_path, write_scores

    require(
        (sae is not None) + raw + (codes is not None) <= 1,
        "sae: give either --sae DIR or --raw, with --activations, or --codes alone",
    )
    require(activations is None or codes is None, "activations: excluded by --codes")
    own = activations is not None or codes is not None
    require(own == (embeddings is not None), "embeddings: needed with --activations or --codes, and only with these")
    require(activations is None or sae is not None or raw, "sae: give either --sae DIR or --raw with --activations")
    if not own and not raw:
        sae = sae or _latest_run()
    require(output is not None or sae is not None, "output: needed with --raw and --codes")
    output = check_scores_path(output or Path(sae or "") / "scores.parquet")
    if not own:
        scenes = _scenes("test", sae, device)
        activations, embeddings = scenes.activations, scenes.embeddings
    require(batch_size >= 1, f"batch_size: {batch_size} must be at least 1")
    require(gamma is None or similarity == "rbf", f"gamma: {gamma} is of rbf; the similarity is {similarity}")
    target = resolve_device(device)
    acts = open_codes(codes) if activations is None and codes is not None else open_activations(activations or "")
    images = open_activations(embeddings or "")
    model = SparseAutoencoder.from_pretrained(sae, device=target) if sae is not None else None
    with _bar("score", acts.n_rows) as advance:
        scores = score(
            acts, images, model, similarity=similarity, gamma=gamma, batch_rows=batch_size, device=target,
            on_rows=advance,
        )  # fmt: skip
    source = {"codes": str(codes)} if codes else {"sae": str(sae or "raw neurons"), "activations": str(activations)}
    write_scores(scores, output, source | {"embeddings": str(embeddings)})
    _print_summary(scores.summary(), "raw neurons" if raw else f"latents of {sae or codes}")
    out.print(f"wrote {output}", highlight=False, soft_wrap=True)


@app.command("steer")
def steer_command(
    model: Annotated[str, typer.Option(help="LLaVA: hf:NAME_OR_DIR.")],
    sae: Annotated[Path, typer.Option(help="SAE directory (cfg.json, sae_weights.safetensors).")],
    layer: Annotated[int, typer.Option(help="Block of the vision tower, from 0, whose output the SAE is of.")],
    image: Annotated[Path, typer.Option(help="Image file.")],
    prompt: Annotated[str, typer.Option(help="What is asked; put into the model's chat template.")],
    latent: Annotated[list[str], typer.Option(help="Latent; several: 3,17. Each is clamped by itself.")],
    alpha: Annotated[list[str], typer.Option(help="Value in raw activation units; several: 0,50,100.")],
    tokens: Annotated[str, typer.Option(help="all, patches or cls.")] = "all",
    error: Annotated[str, typer.Option(help="drop (the paper) or keep what the SAE cannot reconstruct.")] = "drop",
    only: Annotated[bool, typer.Option("--only", help="All other latents 0.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Answers generated at once.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the model: auto, float32, bfloat16, float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Clamp SAE latents in a LLaVA's vision tower and read how its answer changes."""
    from saevlm_fast.errors import ImageError, require
    from saevlm_fast.images.decode import decode
    from saevlm_fast.steering.answers import SteeredRow
    from saevlm_fast.steering.edits import clamp

    latents = [_integer("latent", text) for text in _listed(latent)]
    alphas = [_number("alpha", text) for text in _listed(alpha)]
    edits = [clamp(k, value) for k in latents for value in alphas]  # checked before a model is loaded
    require(image.is_file(), f"image: {image} is not a file")
    require(prompt.strip() != "", "prompt: is empty")
    try:
        picture = decode(image.read_bytes())
    except ImageError as reason:
        raise ValueError(f"image: {image}: {reason}") from reason
    answerer = _steered_answers(model, sae, layer, device, dtype, tokens, error, only, batch_size, max_new_tokens)
    question = answerer.ask(picture, prompt)
    rows = [SteeredRow(question, None), SteeredRow(question, ()), *(SteeredRow(question, (edit,)) for edit in edits)]
    answers = answerer.answers(rows)
    labels: list[tuple[int | None, float | None]] = [(k, value) for k in latents for value in alphas]
    if as_json:
        controls = {"unsteered": answers[0], "sae_attached": answers[1]}
        steered = [{"latent": k, "alpha": a, "answer": text} for (k, a), text in zip(labels, answers[2:])]
        sources = {"model": model, "sae": str(sae), "image": str(image), "prompt": prompt}
        out.print_json(data={**sources, **answerer.settings, "controls": controls, "steered": steered})
        return
    table = Table(
        Column("latent", justify="right"), Column("alpha", justify="right"), Column("answer", overflow="fold")
    )
    table.add_row("-", "no SAE", answers[0])
    table.add_row("-", "SAE, no edit", answers[1])
    for (k, a), text in zip(labels, answers[2:]):
        table.add_row(str(k), f"{a:g}", text)
    out.print(table)


@app.command("steering-score")
def steering_score_command(
    model: Annotated[str, typer.Option(help="LLaVA: hf:NAME_OR_DIR.")],
    sae: Annotated[Path, typer.Option(help="SAE directory (cfg.json, sae_weights.safetensors).")],
    layer: Annotated[int, typer.Option(help="Block of the vision tower, from 0, whose output the SAE is of.")],
    images: Annotated[str, typer.Option(help="The images that codes and embeddings were harvested from.")],
    codes: Annotated[Path, typer.Option(help="Store of the SAE's codes, one row an image (harvest --pool mean).")],
    embeddings: Annotated[Path, typer.Option(help="Image embeddings of the text model's CLIP: store or matrix file.")],
    text_model: Annotated[str, typer.Option(help="hf:NAME_OR_DIR or open_clip:ARCH/PRETRAINED_OR_FILE.")],
    output: Annotated[Path, typer.Option(help="Table: FILE.parquet, FILE.csv or FILE.json.")],
    latents: Annotated[str | None, typer.Option(help="0:1000, or 3,17,40.  \\[default: all]")] = None,
    alpha: Annotated[float, typer.Option(help="Value that a latent is clamped at, in raw activation units.")] = 100.0,
    ask: Annotated[str, typer.Option(help="Number of random images asked about, or white: one white image.")] = "10",
    prompt: Annotated[str | None, typer.Option(help="The question.  \\[default: the paper's]")] = None,
    tokens: Annotated[str, typer.Option(help="all, patches or cls.")] = "all",
    error: Annotated[str, typer.Option(help="drop (the paper) or keep what the SAE cannot reconstruct.")] = "drop",
    seed: Annotated[int, typer.Option(help="Seed of the images asked about and the random latents.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 8,
    batch_size: Annotated[int, typer.Option(help="Answers generated at once.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the model: auto, float32, bfloat16, float16.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Continue the unfinished run of --output.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace --output.")] = False,
) -> None:
    """The paper's steering score of every latent, beside five controls. Interrupted, it goes on with --resume."""
    from saevlm_fast.data.codes import open_codes
    from saevlm_fast.data.rows import open_activations
    from saevlm_fast.images.open import open_images
    from saevlm_fast.provenance import check_codes_of, other_text_model
    from saevlm_fast.runtime import resolve_device
    from saevlm_fast.scoring.tables import check_scores_path
    from saevlm_fast.steering.score import PROMPT, WHITE, ScoreConfig, ScoreRun, steering_score
    from saevlm_fast.towers.text import load_text_encoder

    check_scores_path(output)
    coded, embedded, source = open_codes(codes), open_activations(embeddings), open_images(images)
    config = ScoreConfig(
        latents=_latents(latents, coded.d_sae), alpha=alpha, ask=0 if ask == WHITE else _integer("ask", ask),
        prompt=PROMPT if prompt is None else prompt, seed=seed,
    )  # fmt: skip
    check_codes_of(coded, sae, layer)
    if (doubt := other_text_model(embedded, text_model)) is not None:
        err.print(f"warning: {doubt}; cosines between two models mean little", style="yellow", soft_wrap=True)
    answerer = _steered_answers(model, sae, layer, device, dtype, tokens, error, False, batch_size, max_new_tokens)
    encoder = load_text_encoder(text_model, resolve_device(device), on_message=_say)
    sources = {
        "model": model, "sae": str(sae), "images": images, "codes": str(codes), "embeddings": str(embeddings),
        "text_model": text_model,
    }  # fmt: skip
    with _answering_progress() as on_rows:
        scores = steering_score(
            answerer, source, coded, embedded, encoder, config, ScoreRun(output, sources, resume, force), on_rows
        )
    _print_steering_scores(scores)
    out.print(f"wrote {output}", highlight=False, soft_wrap=True)


def _print_steering_scores(scores: "SteeringScores") -> None:
    n, n_all = scores.n_well_defined, len(scores.table)
    if n == 0:
        out.print(f"none of the {n_all:,} latents fires on 16 images or more, so there is no mean", soft_wrap=True)
        return
    out.print(f"steering score of {n:,} of {n_all:,} latents (16 top images or more)")
    table = Table("condition", Column("mean +- std", justify="right"), Column("empty answers", justify="right"))
    empty = scores.empty_answers()
    for name, (mean, std) in scores.summary().items():
        table.add_row(name, f"{mean:.4f} +- {std:.4f}", f"{empty[name]:.1%}")
    out.print(table)


def _steered_answers(
    model: str,
    sae: Path,
    layer: int,
    device: str,
    dtype: str,
    tokens: str,
    error: str,
    only: bool,
    batch_size: int,
    max_new_tokens: int,
) -> "SteeredAnswers":
    """Model and SAE on one device; the SAE in its own dtype."""
    from saevlm_fast.errors import require
    from saevlm_fast.provenance import check_sae_of, other_tower
    from saevlm_fast.runtime import resolve_device
    from saevlm_fast.sae import SparseAutoencoder
    from saevlm_fast.steering.answers import SteeredAnswers
    from saevlm_fast.towers.text import load_llava

    known = ("auto", "float32", "bfloat16", "float16")
    require(dtype in known, f"dtype: {dtype!r} is not one of {', '.join(known)}")
    target = resolve_device(device)
    dictionary = SparseAutoencoder.from_pretrained(sae, device=target)
    check_sae_of(dictionary, layer)  # before a large model is loaded
    llava, processor = load_llava(model, target, dtype, on_message=_say)
    as_saved = dtype == "auto" or str(llava.dtype) == "torch.float32"
    if as_saved and (trained_on := other_tower(dictionary, llava)) is not None:
        what = f"{sae} was trained on the vision tower of {trained_on}, whose weights are not those of {model}"
        err.print(f"warning: {what}", style="yellow", soft_wrap=True)
    return SteeredAnswers(
        llava, processor, dictionary, layer, tokens=tokens, error=error, only=only, batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )  # fmt: skip


def _say(text: str) -> None:
    err.print(text, highlight=False, soft_wrap=True)


@contextmanager
def _answering_progress() -> Iterator[Callable[[int, int], None]]:
    """A bar with rate and ETA on a terminal, lines elsewhere; called with the number of answers done and in all."""
    columns = (
        TextColumn("steer"), MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    first: tuple[float, int] | None = None  # the rate counts from the first batch on: what comes before is set-up
    last_line = time.monotonic()
    with Progress(*columns, console=out, disable=not out.is_terminal) as bar:
        task = bar.add_task("steer", total=None, rate="")

        def on_rows(done: int, total: int) -> None:
            nonlocal first, last_line
            now = time.monotonic()
            first = first or (now, done)
            rate = (done - first[1]) / max(now - first[0], 1e-9)
            bar.update(task, completed=done, total=total, rate=f"{rate:.1f} answers/s")
            if not out.is_terminal and (now - last_line > 5 or done == total):
                left = f"{rate:.1f}/s  {(total - done) / rate:.0f} s left" if rate > 0 else ""
                line = f"{done}/{total} answers  {left}".rstrip()
                out.print(line, highlight=False, soft_wrap=True)
                last_line = now

        yield on_rows


def _latents(text: str | None, d_sae: int) -> tuple[int, ...]:
    """0:1000 as Python slices, or a list; () for all."""
    if text is None:
        return ()
    if ":" in text:
        start, _, stop = text.partition(":")
        if _integer("latents", stop or "0") > d_sae:
            raise ValueError(f"latents: {text!r} goes beyond the last of {d_sae}")
        chosen = range(d_sae)[_integer("latents", start or "0") : _integer("latents", stop or str(d_sae))]
        if not chosen:
            raise ValueError(f"latents: {text!r} chooses none of {d_sae}")
        return tuple(chosen)
    return tuple(_integer("latents", part) for part in text.split(","))


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Store, SAE, run, matrix file, or folder of such (a harvest's output).")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read everything: every checksum, every weight or row finite.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """What is at a path: source, shape, dtype, size on disk, completeness, labels. Damage is an error, exit code 2."""
    from saevlm_fast.inspection import inspect as inspect_path
    from saevlm_fast.inspection import verify_inspected

    description = inspect_path(path)
    if verify:
        with _verifying_progress(description["bytes"], quiet=as_json) as advance:
            description["verified"] = verify_inspected(description, advance)
    if as_json:
        out.print_json(data=description)
    else:
        _print_description(description)


@contextmanager
def _verifying_progress(n_bytes: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar over the bytes; called with the number of bytes done."""
    columns = (TextColumn("verify"), BarColumn(bar_width=20), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, transient=True, disable=quiet or not out.is_terminal) as bar:
        task = bar.add_task("verify", total=n_bytes)
        yield lambda done: bar.update(task, completed=done)


def _print_description(description: dict[str, Any]) -> None:
    from saevlm_fast.inspection import contents_rows, summary_rows

    out.print(description["path"], highlight=False, soft_wrap=True)
    table = Table(show_header=False, box=box.SIMPLE)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in summary_rows(description):
        table.add_row(*row)
    out.print(table)
    if description["kind"] == "folder":
        shape, size = Column("shape", justify="right"), Column("on disk", justify="right")
        name = Column("name", overflow="fold")
        contents = Table(name, "kind", shape, "dtype", size, "complete", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for item in contents_rows(description):
            contents.add_row(*item)
        out.print(contents)


def _new_run_directory() -> Path:
    return RUNS / time.strftime("%Y-%m-%d-%H%M%S")


def _latest_run() -> Path:
    """The directory below runs/ whose SAE was finished last."""
    from saevlm_fast.errors import require
    from saevlm_fast.sae import WEIGHTS_FILE

    finished = sorted(RUNS.glob(f"*/{WEIGHTS_FILE}"), key=lambda file: file.stat().st_mtime)
    require(
        len(finished) > 0,
        f"sae: no finished run below {RUNS.absolute()}; train one, or give --sae DIR (of the demo: demo/batch_topk)",
    )
    out.print(f"latest run: {finished[-1].parent}", highlight=False, soft_wrap=True)
    return finished[-1].parent


def _scenes(
    split: str, sae: Path | None = None, device: str = "auto", n: int | None = None, tokens: str = "cls"
) -> "SceneStores":
    """Activations (of the layer an SAE was trained on) and embeddings of the box's scenes, cached or harvested."""
    from saevlm_fast.demo.scene_stores import LAYER, N_SCENES, harvest_scenes, scenes_of_sae

    layer, tokens = scenes_of_sae(sae) if sae is not None else (LAYER, tokens)
    with HarvestProgress(0, 1) as progress:
        say = lambda text: err.print(text, highlight=False, soft_wrap=True)  # noqa: E731
        return harvest_scenes(
            split, n or N_SCENES[split], layer, tokens, device=device, on_message=say, on_images=progress.images
        )


@contextmanager
def _bar(what: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """A bar on a terminal, a line at the end elsewhere; called with the number done, and of all if not known before."""
    columns = (TextColumn(what), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, disable=not out.is_terminal) as bar:
        task = bar.add_task(what, total=total)

        def advance(done: int, total: int | None = total) -> None:
            bar.update(task, completed=done, total=total)
            if not out.is_terminal and done == total:
                out.print(f"{what} {done:,}/{total:,}", highlight=False)

        yield advance


def _print_summary(summary: "ScoreSummary", what: str) -> None:
    title = f"Monosemanticity Score ({summary.similarity}, {summary.n_images:,} images) of {what}"
    out.print(title, highlight=False, soft_wrap=True)
    table = Table("measure", Column("value", justify="right"))
    table.add_row("mean +- std", f"{summary.mean:.4f} +- {summary.std:.4f}")
    table.add_row("best", f"{summary.best:.4f}")
    for q, value in summary.quantiles.items():
        table.add_row(f"quantile {q:g}", f"{value:.4f}")
    for status, count in summary.counts.items():
        table.add_row(status, f"{count:,}")
    out.print(table)
    if not summary.best_latents:
        out.print(f"no latent has a defined score ({summary.n_images:,} images)", highlight=False, soft_wrap=True)
        return
    for label, extremes in (("best", summary.best_latents), ("worst", summary.worst_latents)):
        listed = "  ".join(f"{latent}: {value:.3f}" for latent, value in extremes)
        out.print(f"{label} latents  {listed}", highlight=False, soft_wrap=True)


def _warn_of_mismatch(what: str | None) -> None:
    if what is not None:
        err.print(f"warning: {what}; its codes of anything else mean little", style="yellow", soft_wrap=True)


def _print_harvested(summary: "HarvestSummary") -> None:
    seconds, n = max(summary.seconds, 1e-9), summary.n_done_here
    out.print(
        f"{summary.n_images:,} images, {summary.n_skipped:,} skipped; here {n:,} in {seconds:.0f} s, "
        f"{n / seconds:.1f} images/s, {summary.waiting / seconds:.0%} of it waiting for decoded images",
        highlight=False,
        soft_wrap=True,
    )
    if summary.n_skipped:
        out.print(f"skipped images and why: {summary.output / 'skipped.jsonl'}", highlight=False, soft_wrap=True)
    for path in summary.stores:
        out.print(f"wrote {path}", highlight=False, soft_wrap=True)


class HarvestProgress:
    """A bar with rate, ETA and skipped images on a terminal; a line every few seconds elsewhere. Rank 0 speaks."""

    def __init__(self, rank: int, world: int):
        self.speaks, self.whose = rank == 0, "" if world == 1 else f"rank 0 of {world}: "
        columns = (
            TextColumn("harvest"), MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(), TextColumn("{task.fields[skipped]}"),
        )  # fmt: skip
        self.bar = Progress(*columns, console=out, disable=not (self.speaks and out.is_terminal))
        self.task = self.bar.add_task("harvest", total=None, rate="", skipped="")
        self.start = self.last_line = time.monotonic()

    def __enter__(self) -> "HarvestProgress":
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def images(self, done: int, total: int, n_skipped: int) -> None:
        """Called after every batch with this process's images and all skipped ones."""
        now = time.monotonic()
        rate = done / max(now - self.start, 1e-9)
        skipped = f"{n_skipped} skipped" if n_skipped else ""
        self.bar.update(self.task, completed=done, total=total, rate=f"{rate:.1f} images/s", skipped=skipped)
        if self.speaks and not out.is_terminal and (now - self.last_line > 5 or done == total):
            line = f"{self.whose}{done}/{total} images  {rate:.1f}/s  {(total - done) / rate:.0f} s left  {skipped}"
            out.print(line.rstrip(), highlight=False, soft_wrap=True)
            self.last_line = now


class TrainProgress:
    """A bar with rate, ETA and the last logged metrics on a terminal; a line every few seconds elsewhere."""

    def __init__(self, total: int):
        self.total = total
        self.live = out.is_terminal
        columns = (
            MofNCompleteColumn(), BarColumn(bar_width=10), TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(), TextColumn("{task.fields[metrics]}"),
        )  # fmt: skip
        self.bar = Progress(*columns, console=out, disable=not self.live)
        self.task = self.bar.add_task("train", total=total, rate="", metrics="")
        self.first_step: int | None = None
        self.start = self.last_line = time.monotonic()

    def __enter__(self) -> "TrainProgress":
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def rate(self, step: int) -> float:
        """Steps a second since the first step of this process."""
        return (step - (self.first_step or 0)) / max(time.monotonic() - self.start, 1e-9)

    def step(self, step: int) -> None:
        """Called after every step."""
        if self.first_step is None:
            self.first_step, self.start = step, time.monotonic()
        self.bar.update(self.task, completed=step, rate=f"{self.rate(step):.1f} it/s")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Called after every logged step."""
        text = (
            f"loss {metrics['losses/overall_loss']:.4f}  ev {metrics['metrics/explained_variance']:.3f}  "
            f"l0 {metrics['metrics/l0']:.1f}  dead {metrics['sparsity/dead_features']}"
        )
        self.bar.update(self.task, metrics=text)
        now = time.monotonic()
        if not self.live and (now - self.last_line > 5 or step == self.total):
            rate = self.rate(step)
            left = (self.total - step) / rate if rate > 0 else 0.0
            line = f"step {step}/{self.total}  {rate:.1f} it/s  {left:.0f} s left  {text}"
            out.print(line, highlight=False, soft_wrap=True)
            self.last_line = now
        if step == self.total:
            self.bar.stop()
            out.print("saving, then evaluating over all rows ...", highlight=False)


def _fractions(text: str) -> tuple[float, ...]:
    return tuple(_number("groups", part) for part in text.split(","))


def _listed(options: list[str] | None) -> list[str]:
    """Options given several times, or separated by commas."""
    return [part.strip() for option in options or [] for part in option.split(",")]


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}: {text!r} is not a whole number") from None


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name}: {text!r} is not a number") from None


if __name__ == "__main__":
    main()

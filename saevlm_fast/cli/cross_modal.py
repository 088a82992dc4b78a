"""saevlm-fast cross-modal: which latents join text and image, and which image-text pairs fit together (SAE-V)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saevlm_fast.cli.looking import timed
from saevlm_fast.cli.options import Plan, WorkOptions, command
from saevlm_fast.cli.planning import check_writable, disk_figures, memory_figures, replaced_figures
from saevlm_fast.cli.record import Record
from saevlm_fast.cli.terminal import Bar, print_table, say, tell, warn
from saevlm_fast.config import DEVICE_HELP
from saevlm_fast.config.crossmodal import CrossModalSettings, PatchTestSettings
from saevlm_fast.formats.places import SAE_HELP
from saevlm_fast.settings import setting

if TYPE_CHECKING:
    import numpy as np

    from saevlm_fast.crossmodal.measure import CrossModal
    from saevlm_fast.crossmodal.patch_test import PartlySeen, PatchTest
    from saevlm_fast.data.rows import Activations
    from saevlm_fast.images.sources import ImageSource
    from saevlm_fast.sae import SparseAutoencoder
    from saevlm_fast.towers.text import TextEncoder
    from saevlm_fast.towers.tower import Tower


@dataclass(frozen=True, kw_only=True)
class CrossModalArguments(PatchTestSettings, CrossModalSettings, WorkOptions):
    """Options of `saevlm-fast cross-modal`."""

    title = "Rows and SAE"
    activations: Path = setting(help="Store of harvest --point language --tokens all.")
    sae: Path = setting(help=SAE_HELP)
    output: Path = setting(help="Directory for tables of latents, pairs and image tokens, and the ids that are kept.")
    clip: str | None = setting(
        None, help="CLIP whose image-text cosine is a control: hf:NAME_OR_DIR, open_clip:...", place="model"
    )
    images: str | None = setting(
        None,
        help="For --clip and --patch-pairs: the image-text pairs.",
        shown="where the store says",
        place="images",
    )
    model: str | None = setting(
        None, help="For --patch-pairs: the store's model.", shown="as the store says", place="model"
    )
    batch_size: int = setting(4096, help="Rows read and encoded at a time.", at_least=1)
    device: str = setting("auto", help=DEVICE_HELP)
    force: bool = setting(False, help="Replace --output once the new results are whole.", recorded=False)


def _opened(options: CrossModalArguments) -> "tuple[Activations, SparseAutoencoder]":
    from saevlm_fast.crossmodal.tokens import check_language_store
    from saevlm_fast.data.rows import open_activations
    from saevlm_fast.provenance import check_rows_of
    from saevlm_fast.runtime import resolve_device
    from saevlm_fast.sae import SparseAutoencoder

    activations = open_activations(options.activations)
    check_language_store(activations)
    sae = SparseAutoencoder.from_pretrained(options.sae, device=resolve_device(options.device))
    if (doubt := check_rows_of(sae, activations)) is not None:
        warn(f"{doubt}; its codes of {options.activations} may mean little")
    return activations, sae


def _found(
    options: CrossModalArguments, activations: "Activations", sae: "SparseAutoencoder", **calls: Callable[[Any], None]
) -> "CrossModal":
    from saevlm_fast.config.crossmodal import CrossModalSettings
    from saevlm_fast.crossmodal.measure import cross_modal as measure

    settings = vars(options.part(CrossModalSettings))
    return measure(activations, sae, batch_rows=options.batch_size, **settings, **calls)


@dataclass(frozen=True)
class _Beside:
    """What is opened beside store and SAE before any row is read: pairs, a CLIP, the store's model."""

    source: "ImageSource | None"
    clip: "tuple[Tower, TextEncoder] | None"
    model: "PartlySeen | None"

    @classmethod
    def of(cls, options: CrossModalArguments, activations: "Activations") -> "_Beside":
        from saevlm_fast.crossmodal.controls import load_clip, pairs_of, tower_of
        from saevlm_fast.crossmodal.patch_test import PartlySeen
        from saevlm_fast.runtime import resolve_device

        device, tested = resolve_device(options.device), options.patch_pairs > 0
        source = pairs_of(activations, options.images) if tested or options.clip is not None else None
        clip = None if options.clip is None else load_clip(options.clip, device, tell)
        model = PartlySeen(tower_of(activations, options.model, device, tell)) if tested else None
        return cls(source, clip, model)

    def clip_cosines(self, ids: list[str]) -> "np.ndarray":
        """CLIP's cosines of the pairs, with the wrong captions that the harvest had."""
        from saevlm_fast.crossmodal.controls import clip_cosines

        assert self.source is not None
        assert self.clip is not None
        with Bar("clip", len(ids), "images") as bar:
            cosines = clip_cosines(self.source, ids, self.clip, bar.update)
        n_lost = int((cosines != cosines).sum())
        if n_lost:
            warn(f"images: {n_lost:,} of {len(ids):,} pairs are not there or not usable, and have no cosine of --clip")
        return cosines

    def patch_test(
        self, options: CrossModalArguments, activations: "Activations", found: "CrossModal", place: Path
    ) -> "PatchTest":
        """What the store's model says of some captions with the patches of each filter alone."""
        from saevlm_fast.crossmodal.output import read_patches
        from saevlm_fast.crossmodal.patch_test import pairs_to_test, patch_test

        assert self.source is not None
        assert self.model is not None
        samples = pairs_to_test(found.columns, found.wrong_P, options.patch_pairs, options.seed)
        patches, shares = read_patches(place, samples), options.patch_shares
        with Bar("patches", len(samples), "pairs") as bar:
            return patch_test(activations, patches, found.ids, self.source, self.model, shares, bar.update)

    def seconds(self, options: CrossModalArguments, activations: "Activations") -> float:
        """What these take beside the passes over the rows, from the first pairs of the store."""
        from saevlm_fast.crossmodal.controls import clip_cosines
        from saevlm_fast.crossmodal.patch_test import first_pairs, patch_test

        if self.source is None:
            return 0.0
        source, clip, model = self.source, self.clip, self.model
        ids, patches, n_pairs = first_pairs(activations, options.seed)
        seconds = 0.0
        if clip is not None:
            seconds += timed(lambda on: clip_cosines(source, ids, clip, on), n_pairs)
        if model is not None and len(patches.row):
            test = (activations, patches, ids, source, model, options.patch_shares)
            seconds += timed(lambda on: patch_test(*test, on), min(options.patch_pairs, n_pairs))
        return seconds


def plan(options: CrossModalArguments) -> Plan:
    """What would be measured; the time from the second chunk of rows, of captions by CLIP, and pair of the test."""
    from saevlm_fast.crossmodal.output import check_cross_modal_output

    check_writable(options.output)
    check_cross_modal_output(options.output, options.force)
    activations, sae = _opened(options)
    beside = _Beside.of(options, activations)
    n, d_sae = activations.n_rows, sae.config.d_sae
    return Plan(
        f"omegas of {d_sae:,} latents of {options.sae} on {n:,} tokens of {options.activations}",
        {
            "rows": n,
            "latents": d_sae,
            **memory_figures(sae.b_dec.device, 32 * options.top * d_sae),
            **disk_figures(options.output, 30 * n + 60 * options.top * d_sae),
            **replaced_figures(options.output, options.force),
            "time_seconds": timed(lambda on: _found(options, activations, sae, on_rows=on), 2 * n)
            + beside.seconds(options, activations),
        },
    )


@command("cross-modal", plan=plan)
def cross_modal(options: CrossModalArguments) -> dict[str, Any]:
    """SAE-V: how cross-modal latents are, and which image-text pairs fit together, are kept, and by which patches."""
    from saevlm_fast.crossmodal.output import check_cross_modal_output
    from saevlm_fast.outputs import output_lock

    with output_lock(options.output, directory=True):
        check_cross_modal_output(options.output, options.force)
        return _cross_modal(options)


def _cross_modal(options: CrossModalArguments) -> dict[str, Any]:
    from saevlm_fast.crossmodal.output import (
        new_results,
        patches_written,
        summary_of,
        write_patch_test,
        write_results,
    )

    activations, sae = _opened(options)
    beside = _Beside.of(options, activations)
    with new_results(options.output, options.force) as place:
        with (
            Bar("cross-modal", 2 * activations.n_rows, "rows") as bar,
            patches_written(place, options.keep_patches, options.patches_by) as on_patches,
        ):
            found = _found(options, activations, sae, on_rows=bar.update, on_patches=on_patches)
        if beside.clip is not None:
            found = found.with_clip(beside.clip_cosines(found.ids))
        summary = summary_of(found, options.seed)
        if beside.model is not None:
            test = beside.patch_test(options, activations, found, place)
            write_patch_test(place, test)
            summary |= {"patch_test": test.summary(options.seed)}
        settings = {"activations": str(options.activations), "sae": str(options.sae), "clip": options.clip}
        settings |= vars(options.part(CrossModalSettings)) | vars(options.part(PatchTestSettings))
        write_results(place, found, activations, summary | {"settings": settings})
        Record("cross-modal", options, options.output, pairs=len(found.ids), rows=activations.n_rows).write()
    _tell(summary, options)
    return {"output": str(options.output), **summary}


def _tell(summary: dict[str, Any], options: CrossModalArguments) -> None:
    kinds = summary["latent_kinds"]
    say(
        f"{kinds['scored']:,} of {summary['latents']:,} latents have an omega, {kinds['text_only']:,} are of text "
        f"alone, {kinds['image_only']:,} of images alone, {kinds['rare']:,} too rare"
    )
    if summary["detection"]:
        rows = [
            (name, f"{each['auroc']:.3f}", "{:.3f} to {:.3f}".format(*each["interval"]))
            for name, each in summary["detection"].items()
        ]
        say(f"{summary['wrong']:,} of {summary['pairs']:,} captions are wrong; right pairs above wrong ones:")
        print_table(("score", "AUROC", "95 %"), rows)
    if "patch_test" in summary:
        _tell_patches(summary["patch_test"])
    say(f"kept {summary['kept']:,} of {summary['pairs']:,} pairs by {options.by}; wrote {options.output}")


def _tell_patches(test: dict[str, Any]) -> None:
    """The test of the patch filters; intervals are over pairs."""
    right = {name: test[name]["right"] for name in ("all", "none")}
    say(
        f"{test['pairs']:,} pairs: with all image tokens {right['all']:.1%} of a caption's tokens are right, with none "
        f"{right['none']:.1%}, with some:"
    )
    rows = [
        (
            f"{each['filter']} {each['share']:.0%}",
            f"{each['right'][0]:.1%}",
            "-" if each["recovered"] is None else "{:.1%} ({:.1%} to {:.1%})".format(*each["recovered"]),
            "" if each["filter"] == "random" else "{:+.3f} ({:+.3f} to {:+.3f})".format(*each["over_random"]),
        )
        for each in test["filters"]
    ]
    print_table(("kept by", "right", "recovered (95 %)", "above random (95 %)"), rows)

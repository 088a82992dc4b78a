"""saevlm-fast evaluate --masks: labels of patches from segmentation masks."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from saevlm_fast.cli.terminal import say
from saevlm_fast.errors import require
from saevlm_fast.settings import Settings, integers, setting

if TYPE_CHECKING:
    from saevlm_fast.data.label_sets import LabelSet
    from saevlm_fast.data.rows import Activations


@dataclass(frozen=True, kw_only=True)
class MaskArguments(Settings):
    """Options of `saevlm-fast evaluate` about labels of patches."""

    title = "Labels of patches"
    masks: Path | None = setting(
        None, help="Folder of masks, ID.png of image ID: pixels are numbers of classes. Needs a store of all patches."
    )
    mask_names: Path | None = setting(None, help="Names of the numbers: FILE.csv of value,name.", shown="the numbers")
    mask_ignore: tuple[int, ...] = setting((255,), help="Values of pixels that say nothing.", parse=integers)
    mask_share: float = setting(
        0.5, help="Of a patch that one class must have, or the patch is left out.", at_least=0.5, at_most=1
    )

    def check(self) -> None:
        super().check()
        require(self.masks is not None or self.mask_names is None, "mask_names: it is about --masks")


def open_masks(options: MaskArguments, activations: "Activations") -> "LabelSet | None":
    """Labels of the rows; None without masks. ValueError: what is damaged, or of another kind of store."""
    from saevlm_fast.measures.masks import MaskRule, patch_labels, read_names

    if options.masks is None:
        return None
    names = None if options.mask_names is None else read_names(options.mask_names)
    labels, n_found = patch_labels(activations, options.masks, MaskRule(options.mask_share, options.mask_ignore, names))
    known = int(labels.known_N.sum())
    say(
        f"masks of {n_found:,} images: {known:,} patches of {len(labels.names)} labels; "
        f"{labels.n_images - known:,} rows left out (mixed, unknown, no patch, no mask)"
    )
    return labels

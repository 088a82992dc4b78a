"""An SAE from the Hub into a directory of its own, checked, with where it came from in its metadata."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from saevlm_fast.errors import require
from saevlm_fast.files import atomic_directory
from saevlm_fast.formats.hub import CARD_FILE, LocalSAE, resolve
from saevlm_fast.formats.places import is_remote
from saevlm_fast.outputs import check_absent
from saevlm_fast.sae import CONFIG_FILE, WEIGHTS_FILE, SparseAutoencoder, with_metadata

HELD = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE)  # all that a pulled directory holds


@dataclass(frozen=True)
class Pulled:
    """An SAE directory, and the repository, commit and place that it is of."""

    output: Path
    origin: LocalSAE
    sae: SparseAutoencoder


def default_output(spec: str) -> Path:
    """hf:user/repo/layer_11 -> layer_11, in the working directory; of a whole repository, its name."""
    name = spec.rstrip("/").rpartition("/")[2].partition("@")[0]
    return Path(name.removesuffix(".pt").removesuffix(".safetensors") or "sae")


def pull(
    spec: str,
    output: str | os.PathLike[str],
    force: bool = False,
    on_message: Callable[[str], None] = lambda text: None,
) -> Pulled:
    """Downloads an SAE of any format that is read, checks it, and writes it as an SAE directory, whole or not at all.

    Args:
        spec: `hf:user/repo[@revision][/sae_id]`, or saelens:release/sae_id.
        output: the directory. force: replaces an SAE directory that is there, and nothing else.

    Raises:
        ValueError: as resolve; a file that is damaged or of no known format; an output that is in use.
    """
    require(is_remote(spec), f"spec: {spec} is none of the Hub: hf:user/repo[@revision][/sae_id]")
    output = Path(output)
    check_free(output, force)
    origin = resolve(spec, on_message=on_message)
    sae = with_metadata(SparseAutoencoder.from_pretrained(origin.path, assume=origin.assume), hub=origin.record())
    with atomic_directory(output, replace=force) as directory:
        sae.save_pretrained(directory)
        folder = origin.path if origin.path.is_dir() else origin.path.parent
        if (folder / CARD_FILE).is_file() and origin.sae_id:
            (directory / CARD_FILE).write_bytes((folder / CARD_FILE).read_bytes())
    return Pulled(output, origin, sae)


def check_free(output: Path, force: bool) -> None:
    """ValueError: something is there, and force does not say to replace it, or it holds more than an SAE."""
    if output.is_dir() and not output.is_symlink():
        names = sorted(path.name for path in output.iterdir())
        if names:
            check_absent([output], force)
        more = [name for name in names if name not in HELD]
        require(not more, f"output: {output} holds {', '.join(more[:5])}, and nothing but an SAE is replaced")
    else:
        check_absent([output], force and not output.is_file())

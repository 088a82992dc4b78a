"""A tower that has learned nothing: its weights drawn anew, so that what stays is the architecture and the images.

Every parameter is drawn from a normal law with the mean and the deviation of its own trained values (as the
"re-randomised" models of arXiv 2501.17727), so the scale of activations stays about what it was. Names of parameters
seed the draws, so the order in which a library lists them does not matter.
"""

import zlib
from typing import Literal

import torch

from saevlm_fast.errors import require
from saevlm_fast.towers.tower import Tower


def randomise(tower: Tower, what: Literal["blocks", "all"], seed: int = 0) -> None:
    """Draws the tower's weights anew, in place, and says so in its description.

    Args:
        tower: changed in place; what was loaded is lost.
        what: blocks, which keeps the embeddings of patches and positions and the norms outside of the blocks; or all.
        seed: of the draws.

    Raises:
        ValueError: another `what`, a tower whose weights are drawn already.
    """
    require(what in ("blocks", "all"), f"random_weights: {what!r} is not one of blocks, all")
    drawn = tower.anatomy.description.get("random_weights")
    require(drawn is None, f"random_weights: the tower's weights are drawn already: {drawn}")
    inside = {id(p) for block in tower.anatomy.blocks for p in block.parameters()}
    with torch.no_grad():
        for name, parameter in tower.model.named_parameters():
            if what == "blocks" and id(parameter) not in inside:
                continue
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            noise = torch.randn(parameter.shape, generator=generator)
            mean = float(parameter.double().mean())
            deviation = float(parameter.double().std(correction=0))
            parameter.copy_(mean + deviation * noise)
    tower.anatomy.description["random_weights"] = {"what": what, "seed": seed}

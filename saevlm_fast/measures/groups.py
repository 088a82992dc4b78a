"""Which SAEs are seeds of one another: those of one shape whose records differ by nothing but the seed.

d' is measured against the spread of seeds, so an SAE of another learning rate or with MonoLoss is no seed of the first:
it has a group of its own. Controls that were trained stand in the group of the SAEs that were trained as they were.
"""

from collections.abc import Mapping
from typing import Any

from saevlm_fast.records import object_of
from saevlm_fast.sae import SparseAutoencoder

RANDOM_WEIGHTS = "random-weights"  # the control of SAEs that were trained on a tower of random weights
_OF_CONTROLS = ("seed", "control", "control_cosine")  # by which SAEs of a group may differ


def control_of(sae: SparseAutoencoder) -> str | None:
    """Which control an SAE was trained as, by its record; None if it is an SAE proper."""
    if sae.config.control is not None:
        return sae.config.control
    model = object_of(object_of(sae.config.metadata.get("source")).get("model"))
    return RANDOM_WEIGHTS if model.get("random_weights") else None


def training_of(sae: SparseAutoencoder) -> dict[str, Any]:
    """What its record says of its training."""
    return object_of(sae.config.metadata.get("training"))


def groups_of(saes: Mapping[str, SparseAutoencoder]) -> dict[str, str]:
    """name -> group: the shape, and where SAEs of one shape were trained differently, that by which they differ."""
    shapes = {name: _shape(sae) for name, sae in saes.items()}
    recipes = {name: _recipe(sae) for name, sae in saes.items()}
    found = {}
    for shape in dict.fromkeys(shapes.values()):
        members = [name for name in saes if shapes[name] == shape]
        different: list[dict[str, Any]] = []
        for name in members:
            if control_of(saes[name]) is None and recipes[name] not in different:
                different.append(recipes[name])
        for name in members:
            mine = recipes[name] if recipes[name] in different else different[0] if different else {}
            found[name] = shape + _differing(mine, different)
    return found


def _shape(sae: SparseAutoencoder) -> str:
    config = sae.config
    return f"{config.architecture} {config.d_in} -> {config.d_sae}, k {getattr(config, 'k', None)}"


def _recipe(sae: SparseAutoencoder) -> dict[str, Any]:
    """All that is known of how it was made, but the seed and what makes it a control."""
    training = training_of(sae)
    found = {name: value for name, value in training.items() if name not in _OF_CONTROLS and value is not None}
    taken = sae.config.metadata.get("steps")
    if control_of(sae) is None and taken is not None:  # an untrained control took none
        found["steps"] = taken
    sizes = list(sae.config.group_sizes)
    return found | ({"group_sizes": sizes} if len(sizes) > 1 else {})


def _differing(mine: dict[str, Any], different: list[dict[str, Any]]) -> str:
    """Of several recipes, the settings by which they differ, as one of them has them; nothing of a single one."""
    names = sorted({name for recipe in different for name in recipe})
    names = [name for name in names if any(recipe.get(name) != different[0].get(name) for recipe in different)]
    if not names:
        return ""
    if not mine:
        return "; training not recorded"
    return "; " + ", ".join(f"{name} {mine[name]}" if name in mine else f"no {name}" for name in names)

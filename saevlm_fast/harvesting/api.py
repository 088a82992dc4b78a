"""Harvest by names, for Python: a model's and a data set's, to stores that are opened."""

import os
import tempfile
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from numbers import Integral, Real
from pathlib import Path
from typing import Any, overload

from saevlm_fast.config import HarvestOptions, keyword_settings
from saevlm_fast.data.codes import StoredCodes, open_codes
from saevlm_fast.data.rows import Activations, open_activations
from saevlm_fast.errors import check_kind, require, whole_number
from saevlm_fast.harvesting.config import HarvestConfig, default_tokens
from saevlm_fast.harvesting.inputs import open_source, tower_for
from saevlm_fast.harvesting.run import harvest as run_harvest
from saevlm_fast.harvesting.stores import check_output
from saevlm_fast.images.open import Images
from saevlm_fast.outputs import output_lock
from saevlm_fast.runtime import own_defaults, resolve_device
from saevlm_fast.settings import check_once, path_of, several
from saevlm_fast.towers.load import SPECS
from saevlm_fast.towers.tokens import Tokens
from saevlm_fast.towers.tower import HookPoint, Tower

Location = str | os.PathLike[str]


@overload
def harvest(
    model: str | Tower,
    images: Images,
    *,
    layer: int | None = ...,
    point: str = ...,
    tokens: str | None = ...,
    output: Location | None = ...,
    sae: None = ...,
    **settings: Any,
) -> Activations: ...


@overload
def harvest(
    model: str | Tower,
    images: Images,
    *,
    layer: int | None = ...,
    point: str = ...,
    tokens: str | None = ...,
    output: Location | None = ...,
    sae: Location,
    **settings: Any,
) -> StoredCodes: ...


@overload
def harvest(
    model: str | Tower,
    images: Images,
    *,
    layer: int | Sequence[int] | None = ...,
    point: str | Sequence[str] = ...,
    tokens: str | Sequence[str] | None = ...,
    output: Location | None = ...,
    sae: None = ...,
    **settings: Any,
) -> dict[str, Activations]: ...


@own_defaults()
def harvest(
    model: str | Tower,
    images: Images,
    *,
    layer: int | Sequence[int] | None = None,
    point: str | Sequence[str] = "residual",
    tokens: str | Sequence[str] | None = None,
    output: Location | None = None,
    sae: Location | None = None,
    device: str = "auto",
    on_images: Callable[[int, int, int], None] = lambda done, total, skipped: None,
    **settings: Any,
) -> Activations | StoredCodes | dict[str, Any]:
    """Run images through a vision tower, or pairs through a LLaVA, and open what it gives: activations, or an SAE's
    codes.

        activations = harvest("hf:tiny-clip", "scenes:test:200", layer=3, output="store")
        stores = harvest("hf:tiny-clip", "photos", layer=[1, 3], tokens=["cls", "patches"], output="stores")

    Args:
        model: a spec of `load_tower`, or a tower that is loaded already (which keeps its device).
        images: a path of `open_images`, a list of PIL images, arrays or paths, or what it has opened.
        layer: block of the tower, from 0; none for the points projection and pooled.
        point: residual, mlp, attention, projection or pooled; language, of a LLaVA's language model, which reads pairs
            of an image and a caption (docs/how-to/language.md).
        tokens: cls (None is that), patches, all, mean, random:K or random:K:all; of language all (None is that), text,
            image or last.
            A list of layers, points or tokens gives one store for every pair of point and tokens, in one pass.
        output: directory of the store, or of the stores. None: a temporary one, deleted with what is returned.
        sae: directory of an SAE; its codes are stored instead of activations.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
        on_images: called after every batch with the images done, those to do, and skipped ones.
        settings: fields of HarvestConfig and HarvestOptions by name, as limit=100, batch_size=32, resume=True.

    Returns:
        The opened store: N rows [N, d], d the width of the point; with an SAE, StoredCodes. If layer, point or tokens
        is a list, a dict of them, by names such as residual-3-cls and projection.

    Raises:
        ValueError: a setting that does not exist or does not fit the tower, the images or the SAE; an output in use;
            more unusable images than max_skipped. Interrupted: SIGINT or SIGTERM; with an output, resume=True goes on.
    """
    chosen_device = resolve_device(device)
    recipe, rest = keyword_settings("harvest", settings, HarvestConfig, HarvestOptions)
    config = _config(layer, point, tokens, None if sae is None else path_of("sae", sae), recipe)
    temporary = tempfile.TemporaryDirectory(prefix="saevlm-fast-") if output is None else None
    where = Path(temporary.name) if temporary is not None else path_of("output", output)
    check_kind("model", model, (str, Tower), f"{SPECS}, or a Tower")
    named = os.fspath(images) if isinstance(images, str | os.PathLike) else ""
    options = HarvestOptions(where, named, **rest)
    with ExitStack() as stack:
        if temporary is not None:
            stack.callback(temporary.cleanup)
        with output_lock(where, directory=True):
            check_output(options)  # before a model is loaded
            source = open_source(images, config)
            tower = tower_for(model, config, chosen_device)
            paths = run_harvest(source, tower, config, options, on_images=on_images).stores
        opened = [open_activations(path) if sae is None else open_codes(path) for path in paths]
        stack.pop_all()
    if temporary is not None:
        held = _Held(temporary, len(opened))
        for store in opened:
            weakref.finalize(store, held.let_go)
    if isinstance(point, str) and isinstance(tokens, str | None) and isinstance(layer, Integral | None):
        return opened[0]
    return dict(zip(config.store_names, opened))


def _config(
    layer: int | Sequence[int] | None,
    point: str | Sequence[str],
    tokens: str | Sequence[str] | None,
    sae: Path | None,
    recipe: dict[str, Any],
) -> HarvestConfig:
    points, one_layer = _listed("point", point), isinstance(layer, Real | str)
    layers = () if layer is None else (layer,) if one_layer else several("layer", layer)
    layers = tuple(whole_number("layer", each, 0) for each in layers)
    check_once("layer", layers)
    kinds = _listed("tokens", default_tokens(points) if tokens is None else tokens)
    return HarvestConfig(
        points=tuple(HookPoint.all_of(points, layers)),
        tokens=tuple(Tokens.parse(text) for text in kinds),
        sae=sae,
        **recipe,
    )


class _Held:
    """A temporary directory, which is removed with the last of the stores in it."""

    def __init__(self, directory: tempfile.TemporaryDirectory[str], n_stores: int):
        self.directory, self.n_stores = directory, n_stores

    def let_go(self) -> None:
        self.n_stores -= 1
        if self.n_stores == 0:
            self.directory.cleanup()


def _listed(name: str, given: str | Sequence[str]) -> tuple[str, ...]:
    listed = (given,) if isinstance(given, str) else several(name, given)
    require(len(listed) > 0, f"{name}: none is given")
    for each in listed:
        check_kind(name, each, str, "a text")
    check_once(name, listed)
    return listed

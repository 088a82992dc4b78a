"""Small towers of timm and open_clip with random weights, pictures for all, and what a library gives at every block."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from narrow_towers import randomised
from PIL import Image

from saevlm_fast.towers.from_open_clip import wrap_open_clip
from saevlm_fast.towers.from_timm import wrap_timm
from saevlm_fast.towers.tower import Tower

WIDTH, SIZE, PATCH = 32, 32, 8
SIZES = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
RATIOS = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]  # of up to 4 tiles, in Mllama's order
SMALL = SIZES | {"image_size": SIZE, "patch_size": PATCH}


def pictures(n: int = 5) -> list[Any]:
    """Of three shapes, none of which is the square that most towers want; then a grey one, and that with another corner
    in the upper right."""
    noise = np.random.default_rng(3)
    found = [noise.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in ((48, 32), (32, 64), (40, 40))]
    corner = np.full((SIZE, SIZE, 3), 128, np.uint8)
    found.append(corner.copy())
    corner[: SIZE // 4, -SIZE // 4 :] = found[2][: SIZE // 4, : SIZE // 4]
    return [Image.fromarray(picture) for picture in [*found, corner][:n]]


def prepared(tower: Tower, images: list[Any]) -> dict[str, Any]:
    """What the model itself is given of these images."""
    seen: dict[str, Any] = {}
    own, tower.anatomy.call = tower.anatomy.call, lambda model, inputs: seen.update(inputs)
    tower.forward(tower.preprocess(images))
    tower.anatomy.call = own
    return seen


def hidden_states(tower: Tower, inputs: Any) -> list[Any]:
    """The library's own, without the embeddings; of some the last has the final norm in it."""
    given = {"output_hidden_states": True}
    output = tower.anatomy.call(_Calling(tower.model, given), dict(inputs))
    return list(output.hidden_states[1:])


class _Calling:
    """The model, called with more arguments."""

    def __init__(self, model: Any, more: dict[str, Any]):
        self.model, self.more = model, more

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs, **self.more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def each_alone(in_order: Callable[[Tower, torch.Tensor, tuple[int, int]], torch.Tensor]) -> Any:
    """States of packing towers: every image by itself, put into raster order by `in_order`."""

    def states(tower: Tower, inputs: Any) -> list[Any]:
        layers: list[list[torch.Tensor]] = []
        grids = tower.anatomy.form.grids(inputs) or []
        for i, picture in enumerate(pictures(len(grids))):
            output = hidden_states(tower, prepared(tower, [picture]))
            layers.append([in_order(tower, x.reshape(-1, x.shape[-1]), grids[i]) for x in output])
        return [list(layer) for layer in zip(*layers)]

    return states


def as_read(tower: Tower, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    return x


def unmerged(tower: Tower, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """A Qwen-VL's squares of patches, by transformers' own order of windows, one patch at a time."""
    from transformers.vision_utils import get_vision_window_index

    merge, config = tower.model.config.spatial_merge_size, tower.model.config
    n = merge * merge
    squares = x.view(-1, n, x.shape[-1])
    if hasattr(config, "fullatt_block_indexes"):
        index, _ = get_vision_window_index(
            torch.tensor([[1, *grid]]),
            spatial_merge_size=merge,
            window_size=config.window_size,
            patch_size=config.patch_size,
        )
        squares = squares[torch.argsort(index)]
    raster = torch.empty(grid[0], grid[1], x.shape[-1])
    for number, square_ in enumerate(squares):
        row, column = divmod(number, grid[1] // merge)
        for inside, patch in enumerate(square_):
            raster[row * merge + inside // merge, column * merge + inside % merge] = patch
    return raster.flatten(0, 1)


def of_timm(name: str, **settings: Any) -> Callable[[], Tower]:
    def make() -> Tower:
        import timm

        model = timm.create_model(name, num_classes=0, **settings)
        if "img_size" in settings:
            model.pretrained_cfg = model.pretrained_cfg | {"input_size": (3, SIZE, SIZE), "fixed_input_size": False}
        return wrap_timm(randomised(model), f"timm:{name}")

    return make


def intermediates(tower: Tower, inputs: Any) -> list[Any]:
    """timm's own forward_intermediates: of transformers all tokens, of others feature maps."""
    model, pixels = tower.model, inputs["pixel_values"]
    options = {"norm": False, "intermediates_only": True}
    if hasattr(model, "num_prefix_tokens"):
        states = model.forward_intermediates(pixels, return_prefix_tokens=True, output_fmt="NLC", **options)
        return [torch.cat([x[1], x[0]], 1) if isinstance(x, (tuple, list)) else x for x in states]
    return [x.flatten(2).transpose(1, 2) for x in model.forward_intermediates(pixels, **options)[-tower.n_blocks :]]


def of_open_clip(kind: str) -> Callable[[], Tower]:
    def make() -> Tower:
        import open_clip

        if kind == "resnet":
            visual: Any = open_clip.modified_resnet.ModifiedResNet([1, 1, 1, 1], 12, 8, 64, width=8)
        elif kind == "plain":
            visual = open_clip.transformer.VisionTransformer(SIZE, PATCH, WIDTH, 2, 2, 2.0, output_dim=12)
        else:
            visual = open_clip.timm_model.TimmModel(kind, 12, pool="avg", proj="linear", image_size=160)
        visual.preprocess_cfg = {"size": {"resnet": 64, "plain": SIZE}.get(kind, 160)}
        return wrap_open_clip(randomised(visual), f"open_clip:{kind}")

    return make


def in_open_clip(tower: Tower, inputs: Any) -> list[Any]:
    """Its own forward_intermediates; of a trunk of timm that of timm."""
    visual, pixels = tower.model, inputs["pixel_values"]
    if hasattr(visual, "trunk"):
        found = visual.trunk.forward_intermediates(pixels, norm=False, intermediates_only=True)
        return [x.flatten(2).transpose(1, 2) for x in found[-tower.n_blocks :]]
    if hasattr(visual, "layer1"):
        found = visual.forward_intermediates(pixels, intermediates_only=True)["image_intermediates"]
        return [x.flatten(2).transpose(1, 2) for x in found[-tower.n_blocks :]]
    found = visual.forward_intermediates(pixels, intermediates_only=True, output_fmt="NLC", output_extra_tokens=True)
    pairs = zip(found["image_intermediates_prefix"], found["image_intermediates"])
    return [torch.cat(pair, 1) for pair in pairs]

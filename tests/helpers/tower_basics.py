"""What many_towers.py makes its small models from: sizes, pictures, random weights; the library's own states."""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from saevlm_fast.towers.from_transformers import wrap_transformers
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


def randomised(model: Any) -> Any:
    """Weights large enough that every token and image is another vector; statistics of batch norms as they are."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def prepared(tower: Tower, images: list[Any]) -> dict[str, Any]:
    """What the model itself is given of these images."""
    seen: dict[str, Any] = {}
    own, tower.anatomy.call = tower.anatomy.call, lambda model, inputs: seen.update(inputs)
    tower.forward(tower.preprocess(images))
    tower.anatomy.call = own
    return seen


def hf(model: Any, processor: Any) -> Tower:
    return wrap_transformers(randomised(model), processor, "hf:small")


def square(t: Any, kind: str = "ViTImageProcessor", **settings: Any) -> Any:
    return getattr(t, kind)(size={"height": SIZE, "width": SIZE}, **settings)


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


def plain(kind: str, model: str = "Model", **settings: Any) -> Callable[[], Tower]:
    """A model of transformers that is called kind + Model, with the configuration kind + Config."""

    def make() -> Tower:
        import transformers as t

        config = getattr(t, f"{kind}Config")(**SMALL | settings)
        home = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
        return hf(getattr(home, kind + model)(config), square(t))

    return make


def pooler_output(tower: Tower, inputs: Any) -> tuple[Any, Any]:
    """As projection and as pooled: of a SigLIP they are one."""
    found = getattr(tower.anatomy.call(tower.model, dict(inputs)), "pooler_output", None)
    found = found.flatten(1) if found is not None else None
    return found, found


def rows_of_cells(tower: Tower, inputs: Any) -> list[Any]:
    """Maps with channels last."""
    return [x.flatten(1, 2) for x in hidden_states(tower, inputs)]

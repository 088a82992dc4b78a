"""A type checker sees through the ops: public functions, and what custom_op makes of a function, keep their types.

Not run: `mypy` reads it (pyproject.toml). It must take the right calls, and find every fault of the wrong ones, or it
complains that there is nothing to ignore.
"""

from pathlib import Path

import torch
from PIL.Image import Image

from saevlm_fast.images.open import open_images
from saevlm_fast.kernels.sparse_decode import gather_dot_op, sparse_decode
from saevlm_fast.kernels.topk_encode import topk_encode


def right(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    acts, latents = topk_encode(x, x, x, x, 3)
    decoded: torch.Tensor = sparse_decode(acts, latents, None, x, x)
    dots: torch.Tensor = gather_dot_op(x, latents, latents, x)
    return decoded, dots


def of_lists(pictures: list[Image], paths: list[str], mixed: tuple[Path | Image, ...]) -> int:
    return sum(len(open_images(images)) for images in (pictures, paths, mixed)) + len(open_images(open_images("x")))


def wrong() -> int:
    open_images([1])  # type: ignore[list-item]
    topk_encode("not a tensor", 3)  # type: ignore[arg-type, call-arg]
    sparse_decode(1, None, None, None, None)  # type: ignore[arg-type]
    number: int = gather_dot_op("not a tensor", 1, 2, 3)  # type: ignore[arg-type, assignment]
    return number

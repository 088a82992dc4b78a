"""Images as a CLIP's blocks above the hook see them, and what the model then says of them: words, by their softmax.

    P_i(c) = softmax_c(logit scale * cos(image i, text c))

The residual stream is read once. A changed one goes through the blocks above alone, many changes of one image in a
batch (measures/behaviour_splice.py: the blocks below are given one token, which is checked to make no difference).

Shape suffixes: B images, R rows, T tokens, D width, E output, C words.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saevlm_fast.errors import require
from saevlm_fast.images.batches import dead_workers_in_one_line, image_batches
from saevlm_fast.images.sources import ImageSource
from saevlm_fast.measures.behaviour_splice import Splice, check_point, output_point
from saevlm_fast.runtime import tf32_products
from saevlm_fast.steering.site import hooked_output
from saevlm_fast.towers.tower import HookPoint, Tower


@dataclass(frozen=True)
class Vocabulary:
    """C words: texts_CE of unit length, and the scale by which a cosine becomes a logit."""

    words: tuple[str, ...]
    texts_CE: Tensor
    logit_scale: float

    def probabilities(self, out_RE: Tensor) -> Tensor:
        """[R, C] float64: of the C words, however well any of them fits. ValueError: images of another width."""
        n, width = self.texts_CE.shape[1], out_RE.shape[1]
        require(n == width, f"text_model: its texts have width {n}, the images of the model {width}: no shared space")
        unit_RE = torch.nn.functional.normalize(out_RE.double(), dim=1)
        return (self.logit_scale * unit_RE @ self.texts_CE.to(unit_RE).T).softmax(1)

    def shuffled(self, seed: int) -> "Vocabulary":
        """Texts with the same angles to one another that have nothing to do with images: coordinates permuted."""
        order = torch.randperm(self.texts_CE.shape[1], generator=torch.Generator().manual_seed(seed))
        return Vocabulary(self.words, self.texts_CE[:, order], self.logit_scale)


@dataclass(frozen=True)
class ImageBatch:
    """B images: numbers in the source, inputs of the tower, x_BTD at the point, the tower's output out_BE."""

    numbers: list[int]
    inputs: Mapping[str, Tensor]
    x_BTD: Tensor
    out_BE: Tensor

    def __len__(self) -> int:
        return len(self.numbers)


class _Enough(Exception):
    """The output is there: the rest of the forward is not needed."""


class Stream:
    """A tower, opened at the residual stream after a block. Made by `opened_stream`.

    Attributes:
        tokens: all or patches, where the stream is changed. skipped: images that are not usable, and why.
    """

    def __init__(self, splice: Splice, tokens: str, batch_size: int) -> None:
        self.splice, self.tokens, self.batch_size = splice, tokens, batch_size
        self.tower = splice.run.tower
        self.skipped: dict[int, str] = {}
        self._is_read = False

    def batches(self, source: ImageSource, chosen: Sequence[int]) -> Iterator[ImageBatch]:
        """Images of the source in order, at most batch_size at a time; unusable ones are left out and noted.

        Raises:
            ValueError: the model gives no number for an image, or the same whatever the chosen tokens are.
        """
        parts = [list(chosen[i : i + self.batch_size]) for i in range(0, len(chosen), self.batch_size)]
        device = self.tower.device
        loading = image_batches(source, self.tower.preprocess, parts, 0, device.type == "cuda")
        with dead_workers_in_one_line(), closing(loading) as batches:
            for batch in batches:
                self.skipped |= dict(batch.skipped)
                if batch.inputs is not None:
                    inputs = {name: each.to(device) for name, each in batch.inputs.items()}
                    x_BTD, out_BE = self.splice.original(inputs)
                    sound_B = out_BE.isfinite().all(1).tolist()
                    bad = next((number for number, sound in zip(batch.images, sound_B) if not sound), None)
                    name = None if bad is None else source.image_id(bad)
                    require(bad is None, f"model: {self.tower.spec} gives NaN or inf for the image {name}")
                    made = ImageBatch(list(batch.images), inputs, x_BTD, out_BE)
                    if not self._is_read:
                        self._check_read(made)
                    yield made

    def _check_read(self, batch: ImageBatch) -> None:
        """ValueError: what is changed is not read above, as patches behind the last block of a CLIP are not."""
        x_BTD = batch.x_BTD
        there = self.output(batch, x_BTD)
        gone = self.output(batch, torch.where(self.mask(x_BTD), 0, x_BTD))
        point, tower = self.splice.point, self.tower
        same = torch.allclose(there, gone, rtol=1e-5, atol=1e-6 * float(there.abs().max()))
        require(
            not same,
            f"layer: {point.layer} of {tower.spec}: its {self.splice.after.name} does not depend on the tokens "
            f"{self.tokens} there, so that nothing that is done to them changes it; the blocks are 0 to "
            f"{tower.n_blocks - 1}",
        )
        self._is_read = True

    def mask(self, x_BTD: Tensor) -> Tensor:
        """bool [B, T, 1] of the tokens that are changed."""
        return self.splice.mask(x_BTD, self.tokens)

    def output(self, batch: ImageBatch, x_RTD: Tensor) -> Tensor:
        """[R, E] of R changed streams, R / B of each image: change by change, the images in order within each."""
        n = len(x_RTD) // len(batch)
        inputs = {name: each.repeat(n, *[1] * (each.ndim - 1)) for name, each in batch.inputs.items()}
        with torch.inference_mode():
            return self.splice.output(inputs, x_RTD)

    def gradients(self, batch: ImageBatch, readings: Callable[[Tensor], Sequence[Tensor]]) -> Iterator[Tensor]:
        """[B, T, D]: of each number that `readings` makes of the outputs [B, E], with respect to the stream."""
        module, extract = self.tower.anatomy.image_points[self.splice.after.point]
        place, caught = self.tower.module(self.splice.point), []

        def catch(module: nn.Module, args: Any, output: Any) -> None:
            caught.append(extract(output))
            raise _Enough

        handle = module.register_forward_hook(catch, prepend=True)
        with torch.inference_mode(False), torch.enable_grad():
            x_BTD = batch.x_BTD.clone().requires_grad_()
            inputs = {name: each.clone() for name, each in batch.inputs.items()}
            try:
                with hooked_output(place, self.tower.anatomy.form, lambda _: x_BTD), suppress(_Enough):
                    self.tower.forward(inputs)
            finally:
                handle.remove()
            for number in readings(caught[0]):
                with tf32_products(False):
                    gradient_BTD = torch.autograd.grad(number, x_BTD, retain_graph=True)[0].detach()
                yield gradient_BTD


@contextmanager
def opened_stream(tower: Tower, layer: int, tokens: str = "patches", batch_size: int = 64) -> Iterator[Stream]:
    """The tower at the residual stream after block `layer`.

    Raises:
        ValueError: no such layer, a tower without an output by which it is judged, or without such tokens.
    """
    point, after = HookPoint("residual", layer), output_point(tower)
    check_point(tower, point)
    with tower.hooked((point, after)) as run:
        splice = Splice(run, point, after)
        require(
            tokens in splice.choices, f"tokens: {tokens!r} is not one of {', '.join(splice.choices)} of {tower.spec}"
        )
        yield Stream(splice, tokens, batch_size)

"""A tower with something else in the place of its activations: the steering hook, and the blocks above it run anew.

    original         the tower as it is
    sae              decode(encode(x)) at the chosen tokens
    sae_and_error    the same plus what it lacks: x, to the last bit; tells that the splice itself changes nothing
    noise            x plus a random error as long as the SAE's, token by token
    zero             0
    mean             the mean of the position over the images
    shuffled         the tokens of another image, half the images away

Where the residual stream is replaced, the blocks below are given one token: what they give is not read. That this holds
is checked on the first batch. Shape suffixes: B images, T tokens, D width, E output, N images in all.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from saevlm_fast.errors import require
from saevlm_fast.images.batches import dead_workers_in_one_line, default_workers, image_batches
from saevlm_fast.images.sources import ImageSource
from saevlm_fast.measures.subjects import Model, reconstruct
from saevlm_fast.peers import Peers, in_order, in_step, laid_end_to_end, summed
from saevlm_fast.steering.site import hooked_output, one_token_into, token_mask
from saevlm_fast.towers.tower import HookedTower, HookPoint, Tower

CHOICES = ("all", "patches", "cls")
ABLATIONS = ("zero", "mean", "shuffled")
OF_SAE = ("sae", "sae_and_error", "noise")
_FEW = 256  # images that this process reads itself

Outputs = dict[tuple[str, str], Tensor]


def output_point(tower: Tower) -> HookPoint:
    """The image vector by which a tower is judged. ValueError: it has none."""
    there = [name for name in ("projection", "pooled") if name in tower.anatomy.image_points]
    require(len(there) > 0, f"model: {tower.spec} has neither a projection nor a pooled output by which it is judged")
    return HookPoint(there[0])


def check_point(tower: Tower, point: HookPoint) -> None:
    """ValueError: nothing can be put there."""
    after = output_point(tower)
    known = point.layer is not None or point == after
    require(known, f"model: {point.name} cannot be replaced in {tower.spec}, which is judged by its {after.name}")
    if point.layer is not None:
        tower.module(point)


class Splice:
    """A hooked tower whose activations at a point are replaced."""

    def __init__(self, run: HookedTower, point: HookPoint, after: HookPoint) -> None:
        self.run, self.point, self.after = run, point, after
        self.anatomy = run.tower.anatomy
        self._shortened: bool | None = None if point.point == "residual" else False

    @property
    def choices(self) -> tuple[str, ...]:
        """Of tokens that are told apart here."""
        if self.point == self.after:
            return ("all",)
        if self.anatomy.has_cls:
            return CHOICES
        return CHOICES[:2] if self.anatomy.n_prefix else CHOICES[:1]

    def original(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """x_BTD at the point, and the tower's output [B, E]. ValueError: a tower that pads its tokens."""
        require(
            self.run.tower.token_mask(inputs) is None, f"model: {self.run.tower.spec} pads its tokens; not spliced here"
        )
        acts = self.run(inputs)
        x = acts[self.point]
        return (x[:, None] if x.ndim == 2 else x), acts[self.after]

    def output(self, inputs: Mapping[str, Tensor], x_BTD: Tensor) -> Tensor:
        """The output [B, E] with x_BTD in the place of what the tower has."""
        if self.point == self.after:
            return x_BTD[:, 0]
        if self._shortened is None:
            self._shortened = self._can_be_shortened(inputs)
        return self._replaced(inputs, x_BTD, self._shortened)

    def mask(self, x_BTD: Tensor, tokens: str) -> Tensor:
        """bool [B, T, 1]."""
        if self.point == self.after:
            return torch.ones(*x_BTD.shape[:2], 1, dtype=torch.bool, device=x_BTD.device)
        return token_mask(tokens, x_BTD.shape[0], x_BTD.shape[1], self.anatomy).to(x_BTD.device)[:, :, None]

    def _replaced(self, inputs: Mapping[str, Tensor], x_BTD: Tensor, shortened: bool) -> Tensor:
        module = self.run.tower.module(self.point)
        below = one_token_into(self.anatomy.blocks[:1]) if shortened else nullcontext()
        with below, hooked_output(module, self.anatomy.form, lambda _: x_BTD):
            return self.run(inputs)[self.after]

    def _can_be_shortened(self, inputs: Mapping[str, Tensor]) -> bool:
        """Whether the output is the same to the last bit when the blocks below see one token."""
        x_BTD, _ = self.original(inputs)
        whole_BE = self._replaced(inputs, x_BTD, False)
        try:
            return torch.equal(self._replaced(inputs, x_BTD, True), whole_BE)
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:
            if "memory" in str(error):
                raise
            return False  # its blocks count their tokens


class SplicedImages:
    """Images through a tower, with SAEs spliced in and with ablations.

    Args:
        tower, point: where. source, chosen: the images, numbers of the source, two at least.
        batch_size: images of a forward. Each batch is spread over all images, so that a batch holds many kinds.
        workers: processes that read images; None as is best, none for few images.
    """

    def __init__(
        self,
        tower: Tower,
        point: HookPoint,
        source: ImageSource,
        chosen: Sequence[int],
        batch_size: int = 32,
        workers: int | None = None,
    ) -> None:
        check_point(tower, point)
        require(len(chosen) > 1, f"images: {len(chosen)} given; two at least are needed")
        require(batch_size > 1, f"image_batch_size: {batch_size}, must be at least 2")
        self.tower, self.point, self.source, self.chosen = tower, point, source, list(chosen)
        n_batches = -(-len(self.chosen) // batch_size)
        self.batches = [self.chosen[j::n_batches] for j in range(n_batches)]
        few = len(self.chosen) <= _FEW
        if workers is None:
            workers = 0 if few else default_workers(tower.device.type == "cuda", 1)
        self.workers = workers
        self.skipped: dict[int, str] = {}
        self.choices: tuple[str, ...] = ()
        self.width: int | None = None
        self._mean_TD: Tensor | None = None

    @torch.inference_mode()
    def outputs(
        self,
        model: Model | None,
        ablations: bool,
        on_images: Callable[[int], None] = lambda done: None,
        peers: Peers | None = None,
    ) -> tuple[Outputs, dict[str, float]]:
        """One pass over the images, or two where means are wanted for the first time.

        Args:
            model: that is spliced in. ablations: whether zero, mean and shuffled are run too.
            peers: the ranks that share the batches, all of which call this.

        Returns:
            (tokens, variant) -> float32 [N, E] on the host, in the order of `chosen`, NaN of unusable images, and
            ("", "original"); tokens -> |x - x_hat| / |x| over all that are chosen.

        Raises:
            ValueError: none of the images is usable.
        """
        found: Outputs = {}
        sums: dict[str, Tensor] = {}
        with self._opened() as splice:
            self._check_width(model)
            if ablations and self._mean_TD is None:
                self._mean_TD = self._mean(splice, peers)
            done: list[int] = []
            for numbers, inputs in self._loaded(peers):
                x_BTD, out_BE = splice.original(inputs)
                keep(found, ("", "original"), numbers, out_BE, len(self.chosen))
                x_hat_BTD = None if model is None else self._x_hat(model, x_BTD)
                for tokens in splice.choices:
                    mask_BT1 = splice.mask(x_BTD, tokens)
                    variants = dict(self._ablated(x_BTD) if ablations else ())
                    if x_hat_BTD is not None:
                        variants |= _of_sae(x_BTD, x_hat_BTD, numbers[0])
                        lost, all_of = ((each * mask_BT1).double().pow(2).sum() for each in (x_BTD - x_hat_BTD, x_BTD))
                        sums[tokens] = sums.get(tokens, torch.zeros(2).double()) + torch.stack([lost, all_of]).cpu()
                    for name, changed_BTD in variants.items():
                        spliced_BTD = torch.where(mask_BT1, changed_BTD, x_BTD)
                        keep(found, (tokens, name), numbers, splice.output(inputs, spliced_BTD), len(self.chosen))
                done += numbers
                on_images(len(done))
        if peers is not None:
            found, sums = self._of_all_ranks(peers, found, sums, done)
        require(len(found) > 0, f"images: none of the {len(self.chosen)} is usable")
        return found, {tokens: float((lost / max(all_of, 1e-300)).sqrt()) for tokens, (lost, all_of) in sums.items()}

    def _of_all_ranks(
        self, peers: Peers, found: Outputs, sums: Mapping[str, Tensor], done: list[int]
    ) -> tuple[Outputs, dict[str, Tensor]]:
        """Outputs and sums of all batches, and what was skipped in them."""
        for skipped in peers.collect(self.skipped):
            self.skipped |= skipped
        keys = max(peers.collect(list(found)), key=len)  # a rank without a usable image has none
        numbers = laid_end_to_end(peers, torch.tensor(done, dtype=torch.int64))
        whole: Outputs = {}
        for key in keys:
            own = found[key][torch.tensor(done)] if found else torch.zeros(0, 1)
            keep(whole, key, numbers.tolist(), laid_end_to_end(peers, own), len(self.chosen))
        tokens = dict.fromkeys(tokens for tokens, name in keys if name == "sae")
        return whole, {each: summed(peers, sums.get(each, torch.zeros(2).double())) for each in tokens}

    @contextmanager
    def _opened(self) -> Iterator[Splice]:
        after = output_point(self.tower)
        with self.tower.hooked(dict.fromkeys((self.point, after))) as run:
            splice = Splice(run, self.point, after)
            self.choices, self.width = splice.choices, run.shapes[self.point][1]
            yield splice

    def _check_width(self, model: Model | None) -> None:
        if model is not None:
            d_in, where = len(model.b_dec), f"{self.point.name} of {self.tower.spec}"
            require(d_in == self.width, f"model: {where} is {self.width} wide, and d_in is {d_in}")

    def _loaded(self, peers: Peers | None) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Places in `chosen` and inputs on the device, batch by batch of the rank's."""
        own = self.batches if peers is None else self.batches[peers.rank :: peers.world]
        return in_step(peers, self._batches(own), -(-len(self.batches) // (1 if peers is None else peers.world)))

    def _batches(self, own: list[list[int]]) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        place = {number: i for i, number in enumerate(self.chosen)}
        device = self.tower.device
        loading = image_batches(self.source, self.tower.preprocess, own, self.workers, device.type == "cuda")
        with dead_workers_in_one_line(), closing(loading) as batches:
            for batch in batches:
                self.skipped |= dict(batch.skipped)
                if batch.inputs is not None:
                    yield [place[i] for i in batch.images], {k: each.to(device) for k, each in batch.inputs.items()}

    def _mean(self, splice: Splice, peers: Peers | None) -> Tensor:
        """[T, D] over the images of all ranks."""
        total: Any = 0
        n = 0
        for numbers, inputs in self._loaded(peers):
            total, n = total + splice.original(inputs)[0].double().sum(0), n + len(numbers)
        if peers is not None:
            n = sum(peers.collect(n))
            total = in_order(laid_end_to_end(peers, total[None] if isinstance(total, Tensor) else torch.zeros(0, 1, 1)))
        require(n > 0, f"images: none of the {len(self.chosen)} is usable")
        return total / n

    def _x_hat(self, model: Model, x_BTD: Tensor) -> Tensor:
        _, x_hat_ND = reconstruct(model, x_BTD.flatten(0, 1))
        return x_hat_ND.to(x_BTD.device, x_BTD.dtype).view_as(x_BTD)

    def _ablated(self, x_BTD: Tensor) -> Iterator[tuple[str, Tensor]]:
        assert self._mean_TD is not None
        yield "zero", torch.zeros_like(x_BTD)
        yield "mean", self._mean_TD.to(x_BTD.dtype).expand_as(x_BTD)
        yield "shuffled", x_BTD.roll(len(x_BTD) // 2 or 1, 0)


def _of_sae(x_BTD: Tensor, x_hat_BTD: Tensor, seed: int) -> dict[str, Tensor]:
    error_BTD = x_BTD - x_hat_BTD
    noise_BTD = torch.randn(x_BTD.shape, generator=torch.Generator().manual_seed(seed)).to(x_BTD)
    scale_BT1 = error_BTD.norm(dim=2, keepdim=True) / noise_BTD.norm(dim=2, keepdim=True)
    return {
        "sae": x_hat_BTD,
        "sae_and_error": x_BTD + (x_hat_BTD - x_hat_BTD),  # the steering hook's error="keep" without an edit
        "noise": x_BTD + noise_BTD * scale_BT1,
    }


def keep(found: Outputs, key: tuple[str, str], numbers: Sequence[int], out_BE: Tensor, n_images: int) -> None:
    """Puts a batch's outputs in their places."""
    if key not in found:
        found[key] = torch.full((n_images, out_BE.shape[1]), torch.nan)
    found[key][torch.tensor(numbers)] = out_BE.float().cpu()

"""A vision tower of any library behind one interface: hook points, one forward that feeds them all, its tokens.

A hook point is where activations are taken:

    residual    the residual stream after block L (0-based)
    attention   the output of block L's attention module, out-projection included
    mlp         the output of block L's MLP module
    pooled      the image vector before any projection into the space shared with text
    projection  the image embedding in that space

attention and mlp are what their modules return: LayerScale (DINOv2, some of timm and open_clip), a norm behind the
module (timm's post-norm blocks, open_clip's scale_attn) and the residual addition come after. Blocks without LayerScale
and such norms therefore add up: residual L = residual L-1 + attention L + mlp L.

Nothing of a model's forward is copied: forward hooks read its own, and the last one needed stops it by an exception.
(On a GPU one activation has a faster kernel where its results are the same bits: towers/forwards.py.)
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from saevlm_fast.errors import first_line, require
from saevlm_fast.files import weights_sha256
from saevlm_fast.runtime import tf32_products
from saevlm_fast.towers.forms import Cells, Form, Grid
from saevlm_fast.towers.forwards import fuse_quick_gelus, quick_gelu_kernel, replace_forward
from saevlm_fast.towers.hub import foreign_message, is_foreign
from saevlm_fast.towers.preprocess import Normalisation, SquareFirst, two_pictures
from saevlm_fast.towers.set_up import BlockOutput, Forward, check_blocks, check_count, check_own_rows, check_point
from saevlm_fast.towers.tokens import Selected, TokenLayout, Tokens, select_tokens

BLOCK_POINTS, IMAGE_POINTS = ("residual", "mlp", "attention"), ("projection", "pooled")
LANGUAGE_POINT = "language"  # of towers/language.py
# What the libraries call a block's modules. All return the plain output of the sublayer, alone or first in a tuple.
_SUBLAYERS = {"mlp": ("mlp", "feed_forward", "ffn"), "attention": ("attn", "self_attn", "attention")}


@dataclass(frozen=True)
class HookPoint:
    """Where in a tower: one of BLOCK_POINTS, or language, with the 0-based layer, or one of IMAGE_POINTS without."""

    point: str
    layer: int | None = None

    def __post_init__(self) -> None:
        known = (*BLOCK_POINTS, *IMAGE_POINTS, LANGUAGE_POINT)
        require(self.point in known, f"point: {self.point!r} is not one of {', '.join(known)}")
        if self.point in IMAGE_POINTS:
            require(self.layer is None, f"layer: {self.point} is one for the whole tower, not of layer {self.layer}")
        else:
            require(self.layer is not None, f"layer: {self.point} needs a layer (0-based)")
            require((self.layer or 0) >= 0, f"layer: {self.layer} must not be negative; the first block is 0")

    @classmethod
    def all_of(cls, points: Iterable[str], layers: Sequence[int]) -> list["HookPoint"]:
        """Every point at every layer; projection and pooled once. ValueError if layers lack or have no use."""
        points = list(points)
        require(not layers or any(p not in IMAGE_POINTS for p in points), f"layer: {', '.join(points)} has no layers")
        hook_points = []
        for point in points:
            hook_points += [cls(point)] if point in IMAGE_POINTS or not layers else [cls(point, n) for n in layers]
        return hook_points

    @property
    def name(self) -> str:
        """For file names: residual-11, projection."""
        return self.point if self.layer is None else f"{self.point}-{self.layer}"


@dataclass
class Anatomy:
    """What a library's loader knows of its model.

    Attributes:
        blocks: the transformer blocks in order, or the stages of a convolutional tower; each returns its tokens, in the
            form below, alone or first in a tuple.
        n_prefix, has_cls: tokens before the patches; whether the first is a CLS token.
        image_points: name -> (module, what makes [B, D] of the module's output).
        absent: why the other image points are missing.
        width: of the residual stream, if known and one for all blocks.
        patch_size, n_patches: if known, the number of tokens is checked against them.
        form: how blocks hold the tokens.
        most_tokens: of an image, where images have grids of their own and their preprocessing has a limit.
        one_grid: whether all images come as squares of one size, and so have one grid.
        beside: names of what the model is given beside the pixels.
        call: calls the model on its inputs.
        description: JSON for the store.
    """

    blocks: Sequence[nn.Module]
    n_prefix: int
    has_cls: bool
    image_points: Mapping[str, tuple[nn.Module, Callable[[Any], Tensor]]]
    absent: Mapping[str, str] = field(default_factory=dict)
    width: int | None = None
    patch_size: tuple[int, int] | None = None
    n_patches: int | None = None
    form: Form = field(default_factory=Form)
    most_tokens: int | None = None
    one_grid: bool = False
    beside: Sequence[str] = ()
    call: Callable[[nn.Module, dict[str, Tensor]], Any] = lambda model, inputs: model(inputs["pixel_values"])
    description: dict[str, Any] = field(default_factory=dict)


class _Stop(Exception):
    """Raised by the last hook that is needed: the rest of the forward is not."""


class Tower:
    """A vision model with its preprocessing. Made by `load.load_tower`.

    Attributes:
        spec: as the user wrote it. model: frozen, in eval mode, float32. device. n_blocks.
        preprocess: list of RGB PIL images -> host tensors whose first dimension is the images; picklable, for worker
            processes. Pixels stay uint8 where the library's own result can be had from them bit by bit.
    """

    def __init__(
        self,
        spec: str,
        model: nn.Module,
        anatomy: Anatomy,
        preprocess: Callable[[Sequence[Any]], dict[str, Tensor]],
        normalisation: Normalisation | None,
        device: torch.device | str = "cpu",
    ):
        require(len(anatomy.blocks) > 0, f"{spec}: {type(model).__name__} has no transformer blocks")
        self.spec, self.anatomy, self.preprocess, self.device = spec, anatomy, preprocess, torch.device(device)
        self.model = model.eval().requires_grad_(False).to(self.device)
        self._normalisation = None if normalisation is None else normalisation.to(self.device)

    @property
    def n_blocks(self) -> int:
        return len(self.anatomy.blocks)

    def forward(self, inputs: Mapping[str, Tensor], tf32: bool = False) -> Any:
        """The whole model on `preprocess`'s tensors, moved to the device: what the library returns.

        tf32: products and convolutions of float32 in TF32 on a GPU; else exactly, whatever torch is set to. An autocast
        around it is the model's, as of any module.
        """
        inputs = dict(inputs)
        if self._normalisation is not None:
            inputs["pixel_values"] = self._normalisation(inputs["pixel_values"])
        with tf32_products(tf32):
            return self.anatomy.call(self.model, inputs)

    def squared(self, side: int) -> "Tower":
        """The same model, to which every image comes as a square of so many pixels on a side."""
        made = copy.copy(self)
        made.preprocess = SquareFirst(self.preprocess, side)
        description = {**self.anatomy.description, "square": side}
        made.anatomy = replace(self.anatomy, description=description, one_grid=True)
        return made

    def token_mask(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """bool [B, T], False for padding, of towers whose images differ in their number of tokens (SigLIP 2 NaFlex,
        Qwen-VL, Pixtral); else None."""
        return self.anatomy.form.mask(inputs)

    def n_images(self, inputs: Mapping[str, Tensor]) -> int:
        grids = self.anatomy.form.grids(inputs)
        return len(inputs["pixel_values"] if grids is None else grids)

    @contextmanager
    def hooked(
        self,
        points: Iterable[HookPoint],
        compile: bool = False,
        autocast: torch.dtype | None = None,
        tf32: bool = False,
    ) -> Iterator["HookedTower"]:
        """Yields a callable: inputs on the device -> activations at `points`, in one forward.

        Set-up costs three small forwards, of 5 images in all: two different images of different shapes go through
        together, which teaches shapes and which point comes last, then in the other order, and one by itself. A tower
        that loses or mixes images of a batch, or gives an image other values another time, is a ValueError here
        (towers/set_up.py), as is every wrong request. On the way out, also after an error, the hooks are gone and the
        model is as it was.

        Args:
            compile: torch.compile the blocks (one compiled code for all of them, made at the first batch); of a block
                that has hooks inside, only its attention and MLP.
            autocast: dtype of matrix products; None is float32.
            tf32: float32 in TF32, as of `forward`.
        """
        sites = {point: self._site(point) for point in points}
        require(len(sites) > 0, "point: at least one hook point is needed")
        run = HookedTower(self, sites, autocast, tf32)
        with ExitStack() as stack:
            stack.enter_context(self.anatomy.form.watching())
            for point, (module, extract) in sites.items():
                stack.callback(module.register_forward_hook(run._hook(point, extract)).remove)
            if autocast is not None and not compile and self.device.type == "cuda" and (kernel := quick_gelu_kernel()):
                fuse_quick_gelus(stack, self.model, self.device, autocast, kernel)
            run._probe()
            if compile:
                self._compile_blocks(sites, stack)
            stack.callback(run.close)
            yield run

    def module(self, point: HookPoint) -> nn.Module:
        """Whose output holds the point. ValueError: the tower has no such point."""
        return self._site(point)[0]

    def _site(self, point: HookPoint) -> tuple[nn.Module, Callable[[Any], Tensor]]:
        """The module whose output holds the point, and what takes it out."""
        if point.layer is None:
            reason = self.anatomy.absent.get(point.point, "the model has none")
            require(point.point in self.anatomy.image_points, f"point: {point.point} of {self.spec}: {reason}")
            return self.anatomy.image_points[point.point]
        language = point.point == LANGUAGE_POINT
        require(not language, f"point: language of {self.spec}, which was loaded as a vision tower; see load_language")
        last = self.n_blocks - 1
        require(point.layer <= last, f"layer: {point.layer} of {self.spec}, whose blocks are 0 to {last}")
        block = self.anatomy.blocks[point.layer]
        return (block if point.point == "residual" else self._sublayer(block, point.point)), self._tokens

    def _sublayer(self, block: nn.Module, point: str) -> nn.Module:
        for name in _SUBLAYERS[point]:
            if isinstance(module := getattr(block, name, None), nn.Module):
                return module
        kind = type(block).__name__
        raise ValueError(f"point: {point} of {self.spec}: its blocks ({kind}) have no module of that output")

    def _tokens(self, output: Any) -> Tensor:
        tokens = output[0] if isinstance(output, tuple) else output
        return self.anatomy.form.tokens(tokens)

    def _compile_blocks(self, sites: Mapping[HookPoint, Any], stack: ExitStack) -> None:
        """Replaces forward, not the modules: hooks stay eager, and blocks share the code compiled for their class."""
        inside = {point.layer for point in sites if point.point in _SUBLAYERS}
        for layer, block in enumerate(self.anatomy.blocks):
            for module in [self._sublayer(block, point) for point in _SUBLAYERS] if layer in inside else [block]:
                replace_forward(stack, module, torch.compile(module.forward))

    def inputs_of(self, pictures: Sequence[Any]) -> dict[str, Tensor]:
        """Preprocessed tensors of RGB PIL images, on the device."""
        return {name: tensor.to(self.device) for name, tensor in self.preprocess(pictures).items()}

    def description(self) -> dict[str, Any]:
        """JSON: what exactly this tower is, weights included (a hash over all of them; takes a second per gigabyte)."""
        return {
            "spec": self.spec,
            "class": type(self.model).__name__,
            "blocks": self.n_blocks,
            "torch": torch.__version__,
            **self.anatomy.description,
            "weights_sha256": weights_sha256(self.model),
        }


class HookedTower:
    """A tower with its hooks in place: call it with inputs on the device. Made by `Tower.hooked`.

    Attributes:
        shapes: of every point, (T, D), T None for points of the whole image. Where images differ in their number of
            tokens T is the most that one has. layouts: of the tokens, of every point that has such.
    """

    def __init__(self, tower: Tower, points: Iterable[HookPoint], autocast: torch.dtype | None, tf32: bool):
        self.tower, self._points = tower, list(points)
        self.shapes: dict[HookPoint, tuple[int | None, int]] = {}
        self.layouts: dict[HookPoint, TokenLayout] = {}
        self._autocast, self._tf32 = autocast, tf32
        self._acts: dict[HookPoint, Tensor] = {}
        self._last: HookPoint | None = None
        self._closed = False

    @property
    def layout(self) -> TokenLayout:
        """Of the tokens of a point; which one does not matter in a transformer, whose blocks all have the same."""
        anatomy = self.tower.anatomy
        return next(iter(self.layouts.values()), TokenLayout(0, anatomy.n_prefix, anatomy.has_cls))

    def close(self) -> None:
        """From now on a call is an error, for the hooks are gone."""
        self._closed = True

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[HookPoint, Tensor]:
        """Activations [B, T, D], or [B, D] at projection and pooled, as inference tensors.

        Raises:
            ValueError: this batch has given another shape than set-up has learned.
        """
        acts = self._read_points(inputs)
        packs = self.tower.anatomy.form.packs  # then the form has seen to the number of tokens
        for point, (n_tokens, width) in self.shapes.items():
            found = list(acts[point].shape)
            tokens = [] if n_tokens is None else [found[1] if packs and len(found) == 3 else n_tokens]
            expected = [self.tower.n_images(inputs), *tokens, width]
            require(found == expected, f"point: {point.name} of {self.tower.spec} is {found}, not {expected}")
        return acts

    def _read_points(self, inputs: Mapping[str, Tensor]) -> dict[HookPoint, Tensor]:
        """What the hooks have read in one forward. RuntimeError: the hooks are gone."""
        if self._closed:
            raise RuntimeError("the tower's hooks are gone: call this inside `with tower.hooked(...)`")
        with torch.inference_mode(), torch.autocast(self.tower.device.type, self._autocast, self._autocast is not None):
            try:
                self.tower.forward(inputs, self._tf32)
            except _Stop:
                pass
            finally:
                acts, self._acts = self._acts, {}
        return acts

    def rows_per_image(self, point: HookPoint, tokens: Tokens | None) -> int:
        """Rows that an image gives at this point (at most, where images differ in their number of tokens).

        Raises:
            ValueError: the tower has no such tokens, or not so many.
        """
        if self.shapes[point][0] is None:
            return 1
        require(tokens is not None, f"tokens: {point.name} needs a choice of tokens")
        try:
            return self.layouts[point].rows_per_image(tokens)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{error} ({self.tower.spec})") from None

    def select(
        self,
        acts: Tensor,
        tokens: Tokens | None,
        image_ids: Sequence[str],
        seed: int = 0,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> Selected:
        """tokens.select_tokens with this tower's layout, and the mask of padding that follows from `inputs`."""
        mask_BT = None if inputs is None else self.tower.token_mask(inputs)
        layout = replace(self.layout, n_tokens=acts.shape[1]) if acts.ndim == 3 else self.layout
        return select_tokens(acts, tokens, layout, image_ids, seed, mask_BT)

    def _hook(self, point: HookPoint, extract: Callable[[Any], Tensor]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._acts[point] = extract(output)
            if point == self._last:
                raise _Stop

        return hook

    def _probe(self) -> None:
        """Learns the shapes and which point comes last; checks that the tower is what this package takes it for."""
        pictures, anatomy, spec = two_pictures(), self.tower.anatomy, self.tower.spec
        inputs = self.tower.inputs_of(pictures)
        outputs: list[BlockOutput] = []
        with ExitStack() as stack:
            for block in anatomy.blocks:
                record = lambda module, args, output: outputs.append(BlockOutput.of(anatomy.form, output))  # noqa: E731
                stack.callback(block.register_forward_hook(record).remove)
            acts = self._first_forward(inputs)
        cells = isinstance(anatomy.form, Cells)
        shapes = check_blocks(spec, outputs, self.tower.n_blocks, len(pictures), equal=not cells)
        self._check_given(acts)
        for point, tensor in acts.items():
            if point.layer is not None:
                n_tokens, grid = shapes[point.layer][1], outputs[point.layer].grid
                self.layouts[point] = self._layout(inputs, n_tokens, grid)
            layout = self.layouts.get(point)
            n_tokens_or_none, width = check_point(spec, point, tensor, len(pictures), layout)
            self.shapes[point] = n_tokens_or_none, width
        if not cells:
            self._layout(inputs, shapes[0][1], None)  # checked, also where only points of the whole image are asked for
        self._last = list(acts)[-1]
        first = Forward(acts, self.tower.token_mask(inputs))
        check_own_rows(spec, first, self._forward, pictures, self._autocast is not None)
        if anatomy.form.packs and not anatomy.one_grid:
            self._most_tokens()

    def _layout(self, inputs: Mapping[str, Tensor], n_tokens: int, grid: Grid | None) -> TokenLayout:
        anatomy, spec, pixels = self.tower.anatomy, self.tower.spec, inputs["pixel_values"]
        mask_BT = self.tower.token_mask(inputs)
        fits = mask_BT is None or mask_BT.shape[1] == n_tokens
        require(fits, f"{spec}: a mask {list(getattr(mask_BT, 'shape', ()))} of {n_tokens} tokens")
        if grid is None and pixels.ndim >= 4 and not anatomy.form.packs:
            height, width = pixels.shape[-2:]
            if anatomy.patch_size is not None:
                grid = height // anatomy.patch_size[0], width // anatomy.patch_size[1]
            check_count(spec, n_tokens, anatomy.n_prefix, grid[0] * grid[1] if grid else anatomy.n_patches, pixels)
            side = math.isqrt(n_tokens - anatomy.n_prefix)
            square = side * side == n_tokens - anatomy.n_prefix and height == width
            grid = grid or ((side, side) if square else None)
        own_grids = anatomy.form.packs or (mask_BT is not None and not bool(mask_BT.all()))
        if own_grids and anatomy.one_grid:
            shapes = inputs.get("spatial_shapes")
            grids = anatomy.form.grids(inputs) if shapes is None else [tuple(each) for each in shapes.tolist()]
            own_grids, grid = len(set(grids or ())) != 1, (grids or [None])[0]
        return TokenLayout(n_tokens, anatomy.n_prefix, anatomy.has_cls, None if own_grids else grid)

    def _most_tokens(self) -> None:
        """Images of a packing tower have up to as many tokens as its preprocessing allows."""
        most = self.tower.anatomy.most_tokens or 0
        for point, layout in self.layouts.items():
            self.layouts[point] = replace(layout, n_tokens=max(most, layout.n_tokens))
            self.shapes[point] = self.layouts[point].n_tokens, self.shapes[point][1]

    def _forward(self, pictures: Sequence[Any]) -> Forward:
        inputs = self.tower.inputs_of(pictures)
        return Forward(self._first_forward(inputs), self.tower.token_mask(inputs))

    def _first_forward(self, inputs: Mapping[str, Tensor]) -> dict[HookPoint, Tensor]:
        try:
            return self(inputs)
        except Exception as error:
            if not is_foreign(error):
                raise
            said = first_line(error) if isinstance(error, (ValueError, AssertionError)) else foreign_message(error)
            raise ValueError(f"{self.tower.spec}: model and preprocessing do not fit: {said}") from error

    def _check_given(self, acts: Mapping[HookPoint, Any]) -> None:
        tower = self.tower
        instead = "mean or cls" if tower.anatomy.has_cls else "mean"
        for point in self._points:
            require(
                isinstance(acts.get(point), Tensor),
                f"point: {point.name} of {tower.spec}: {type(tower.model).__name__} gives none; take the residual of "
                f"layer {tower.n_blocks - 1}, tokens {instead}",
            )

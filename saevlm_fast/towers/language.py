"""The language model of a LLaVA as a tower: the residual stream after its blocks, on pairs of an image and a text.

    language    the residual stream after block L (0-based) of the language model, of every token of the prompt

The model's own processor and chat template make the prompt, and the model's own forward the activations: hooks read
them, and nothing above the last block that is needed is computed. Prompts of a batch are filled up on the right, where
neither positions nor causal attention see it, whatever the processor does by itself; what was filled up is no row.

A token is of the image (what the model puts there comes from pixels), of the text (the pair's caption) or of the
template (all else: roles, separators, begin and end). Set-up checks with two pictures that the inputs of the first
block differ at the image's tokens and nowhere else, and that a pair's rows are the same beside others: what brings its
images in by other ways (cross-attention, a prefix of its own) is refused by name.

Shape suffixes: B pairs, T tokens, D width, M rows.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from saevlm_fast.errors import check_kind, first_line, require, shown
from saevlm_fast.runtime import loading, own_defaults
from saevlm_fast.towers.chat import chat_text, placeholders, read_one
from saevlm_fast.towers.from_transformers import vision_part
from saevlm_fast.towers.hub import foreign_message, is_foreign, one_line_errors
from saevlm_fast.towers.preprocess import described, two_pictures
from saevlm_fast.towers.text import load_llava
from saevlm_fast.towers.tokens import LANGUAGE_TOKENS, Selected, Tokens
from saevlm_fast.towers.tower import LANGUAGE_POINT, Anatomy, HookedTower, HookPoint, Tower

MODALITIES = ("padding", "text", "image", "template")  # their numbers are those in the tensor `modality`
_TEXT, _IMAGE, _TEMPLATE = 1, 2, 3
_SENTINELS = ("a", "two things")  # captions that share neither their first nor their last token
_SEQUENCES = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "modality")


class PairPreprocess:
    """Pairs of an RGB PIL image and a caption -> the model's inputs on the host, as a worker process calls it.

    Beside them `modality` int8 [B, T], numbers of MODALITIES. Every pair goes through the processor by itself.

    Attributes:
        reads_pairs: what images.batches looks for.
    """

    reads_pairs = True

    def __init__(self, processor: Any, image_id: int, window: int | None, prompt: str | None):
        """prompt: what the user asks, the caption being the answer; None: the caption is what the user says."""
        self.processor, self.image_id, self.window, self.prompt = processor, image_id, window, prompt
        pad = getattr(processor.tokenizer, "pad_token_id", None)
        self.pad_id = 0 if pad is None else int(pad)
        self._find_template()

    def __call__(self, pairs: Sequence[tuple[Any, str]]) -> dict[str, Tensor]:
        """ValueError: a pair that does not fit the model; its reason."""
        joined = self.join([self._one(*pair) for pair in pairs])
        assert joined is not None
        return joined

    def text_of(self, caption: str) -> str:
        """The caption in its prompt. ValueError: it holds what stands for an image."""
        held = [token for token in placeholders(self.processor) if token in caption]
        require(not held, f"the caption holds {' and '.join(held)}, which stands for an image")
        if getattr(self.processor, "chat_template", None) is None:
            image = placeholders(self.processor)[:1]  # without one the processor itself puts the image in front
            return "".join([*image, " ".join([*([self.prompt] if self.prompt else []), caption])])
        return chat_text(self.processor, caption) if self.prompt is None else self._answered(caption)

    def _answered(self, caption: str) -> str:
        assert self.prompt is not None
        return chat_text(self.processor, self.prompt, caption)

    def _one(self, picture: Any, caption: str) -> dict[str, Tensor]:
        inputs = read_one(self.processor, picture, self.text_of(caption))
        ids_T = inputs["input_ids"][0]
        n = len(ids_T)
        require(self.window is None or n <= self.window, f"its prompt has {n} tokens, the model's window {self.window}")
        # What the processor fills up by itself, if it does, is taken off again.
        real_T = inputs.get("attention_mask", torch.ones(1, n, dtype=torch.bool))[0].bool()
        inputs = {name: x[:, real_T] if _is_sequence(name, x, n) else x for name, x in inputs.items()}
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        inputs["modality"] = self._modality(inputs["input_ids"][0])[None]
        return inputs

    def _modality(self, ids_T: Tensor) -> Tensor:
        modality_T = torch.full((len(ids_T),), _TEMPLATE, dtype=torch.int8)
        image = (ids_T == self.image_id).nonzero().flatten()
        first, last = (int(image[0]), int(image[-1])) if len(image) else (0, -1)
        start, stop = self._place(first, last, len(ids_T))
        modality_T[start:stop] = _TEXT
        modality_T[image] = _IMAGE
        return modality_T

    def _place(self, first: int, last: int, n: int) -> tuple[int, int]:
        """Where the caption begins and ends, by the image's first and last token and the number of tokens."""
        if self._after_image:
            return last + 1 + self._before, n - self._behind
        return self._before, first - self._behind

    def _find_template(self) -> None:
        """Where the caption stands in its prompt: two captions differ there, and the template's tokens do not."""
        picture = two_pictures()[0]
        (a, b) = (read_one(self.processor, picture, self.text_of(s))["input_ids"][0].tolist() for s in _SENTINELS)
        image = [i for i, token in enumerate(a) if token == self.image_id]
        require(len(image) > 0, f"no token {self.image_id}, which stands for the image, is in its prompts")
        same = [x == y for x, y in zip(a, b)]
        before = same.index(False) if False in same else min(len(a), len(b))
        backwards = [x == y for x, y in zip(a[before:][::-1], b[before:][::-1])]
        behind = backwards.index(False) if False in backwards else len(backwards)
        self._after_image = before > image[-1]
        if self._after_image:
            self._before, self._behind = before - image[-1] - 1, behind
        else:
            self._before, self._behind = before, image[0] - (len(a) - behind)

    def join(self, pieces: Sequence[dict[str, Tensor]]) -> dict[str, Tensor] | None:
        """Inputs of several pairs as one batch: sequences filled up on the right, tiles and pixels with zeros."""
        if len(pieces) <= 1:
            return pieces[0] if pieces else None
        return {name: self._joined(name, [piece[name] for piece in pieces]) for name in pieces[0]}

    def _joined(self, name: str, tensors: list[Tensor]) -> Tensor:
        value = self.pad_id if name == "input_ids" else 0
        most = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors))]
        filled = []
        for tensor in tensors:
            room = [(0, n - size) for n, size in zip(most, tensor.shape[1:])]
            padding = [number for pair in reversed(room) for number in pair]
            filled.append(nn.functional.pad(tensor, padding, value=value) if any(padding) else tensor)
        return torch.cat(filled)


def _is_sequence(name: str, x: Tensor, n: int) -> bool:
    return name in _SEQUENCES or (x.ndim == 2 and tuple(x.shape) == (1, n) and not x.is_floating_point())


class LanguageTower(Tower):
    """The language model of a LLaVA, with pairs for pictures. Made by `load_language`.

    Attributes: those of Tower; prompt, as of PairPreprocess; processor.
    """

    preprocess: PairPreprocess

    def __init__(self, spec: str, model: Any, processor: Any, prompt: str | None, device: torch.device | str = "cpu"):
        blocks, text_config = language_blocks(model)
        image_id = image_token_id(model.config)
        kind = type(model).__name__
        require(
            image_id is not None, f"model: {spec}: {kind} has no token for an image, so that rows are not told apart"
        )
        window = getattr(text_config, "max_position_embeddings", None)
        self.processor, self.prompt = processor, prompt
        with one_line_errors(f"model: {spec}: {kind} cannot be given image-text pairs"):
            preprocess = PairPreprocess(processor, int(image_id or 0), window, prompt)
        anatomy = Anatomy(
            blocks,
            n_prefix=0,
            has_cls=False,
            image_points={},
            width=text_config.hidden_size,
            call=_call,
            description=_description(processor, prompt),
        )
        super().__init__(spec, model, anatomy, preprocess, None, device)

    @contextmanager
    def hooked(
        self,
        points: Iterable[HookPoint],
        compile: bool = False,
        autocast: torch.dtype | None = None,
        tf32: bool = False,
    ) -> Iterator["HookedLanguage"]:
        """As Tower.hooked; autocast is not used where the weights are of that dtype already.

        Raises:
            ValueError: a point that is not of language; a model whose images do not come in as tokens, or whose rows
                depend on the other pairs of a batch.
        """
        points = list(points)
        require(len(points) > 0, "point: at least one hook point is needed")
        require(
            not compile, "compile: the blocks of a language model, whose prompts differ in length, are not compiled"
        )
        run = HookedLanguage(self, points, None if autocast == self.dtype else autocast, tf32)
        with ExitStack() as stack:
            for point in points:
                module, extract = self._site(point)
                stack.callback(module.register_forward_hook(run._hook(point, extract)).remove)
            run._probe()
            stack.callback(run.close)
            yield run

    @property
    def dtype(self) -> torch.dtype:
        return next(parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point())

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each token says, as the tokenizer decodes it alone."""
        return [self.processor.tokenizer.decode([i]) for i in ids]

    def _site(self, point: HookPoint) -> tuple[nn.Module, Callable[[Any], Tensor]]:
        last = self.n_blocks - 1
        known = point.point == LANGUAGE_POINT
        require(
            known, f"point: {point.point} of {self.spec} is not of its language model, which has the point language"
        )
        require(
            (point.layer or 0) <= last, f"layer: {point.layer} of {self.spec}, whose language blocks are 0 to {last}"
        )
        return self.anatomy.blocks[point.layer or 0], _first


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _call(model: Any, inputs: Mapping[str, Tensor]) -> Any:
    """Pixels in the model's dtype, as processors give float32."""
    dtype = model.dtype
    given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items() if name != "modality"}
    return model(**given, use_cache=False)


def _description(processor: Any, prompt: str | None) -> dict[str, Any]:
    import transformers

    template = str(getattr(processor, "chat_template", None))
    images: Any = getattr(processor, "image_processor", None)
    settings = images.to_dict() if hasattr(images, "to_dict") else {}
    return {
        **described("transformers", transformers.__version__, type(processor).__name__, settings),
        "prompt": prompt,
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest(),
    }


class HookedLanguage(HookedTower):
    """A language tower with its hooks in place. shapes: (None, D) of every point, for prompts differ in length."""

    tower: LanguageTower

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[HookPoint, Tensor]:
        """Activations [B, T, D] of every token, filled-up ones included, as inference tensors."""
        acts = self._read_points(inputs)
        for point, (_, width) in self.shapes.items():
            expected, found = [*inputs["input_ids"].shape, width], list(acts[point].shape)
            require(found == expected, f"point: {point.name} of {self.tower.spec} is {found}, not {expected}")
        return acts

    def rows_per_image(self, point: HookPoint, tokens: Tokens | None) -> int:
        """Rows of one pair at set-up, about; ValueError: a choice of tokens that language models do not have."""
        check_language_tokens(tokens)
        return max(1, self._rows[tokens.kind]) if tokens is not None else 1

    def select(
        self,
        acts: Tensor,
        tokens: Tokens | None,
        image_ids: Sequence[str],
        seed: int = 0,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> Selected:
        """The rows that `tokens` chooses, pair by pair, with their modality and token id; positions count from the
        prompt's first token. inputs: those of the batch. ValueError: without them."""
        require(inputs is not None, "inputs: needed, to tell text from image")
        assert inputs is not None
        assert tokens is not None
        modality_BT, ids_BT = inputs["modality"].cpu(), inputs["input_ids"].cpu()
        chosen_BT = chosen_tokens(modality_BT, tokens.kind)
        image_of_row, places = (index.contiguous() for index in chosen_BT.nonzero().unbind(1))
        positions = (modality_BT > 0).cumsum(1)[image_of_row, places] - 1
        rows_MD = acts[image_of_row.to(acts.device), places.to(acts.device)]
        details = {"modality": modality_BT[image_of_row, places], "token_id": ids_BT[image_of_row, places]}
        return Selected(rows_MD, positions, image_of_row, details)

    def _probe(self) -> None:
        """Learns shapes, and checks what the module's docstring says."""
        tower, (picture, other) = self.tower, two_pictures()
        other = other.resize(picture.size)
        captions = (_SENTINELS[1], " ".join([_SENTINELS[1]] * 4))
        pairs = [(picture, captions[0]), (picture, captions[1]), (other, captions[0])]
        blocks_in: list[Tensor] = []
        catch = tower.anatomy.blocks[0].register_forward_pre_hook(
            lambda module, args, kwargs: blocks_in.append((args[0] if args else kwargs["hidden_states"]).detach()),
            with_kwargs=True,
        )
        try:
            acts, inputs = self._try(pairs)
        finally:
            catch.remove()
        self._check_images(blocks_in, inputs)
        self._rows = {kind: int(chosen_tokens(inputs["modality"], kind)[1].sum()) for kind in (*LANGUAGE_TOKENS, "all")}
        for point in self._points:
            tensor = acts.get(point)
            fits = isinstance(tensor, Tensor) and tensor.shape[:2] == inputs["input_ids"].shape
            require(fits, f"point: {point.name} of {tower.spec}: {type(tower.model).__name__} gives no row for a token")
            self.shapes[point] = None, acts[point].shape[-1]
        self._last = list(acts)[-1]
        for i in (0, 1):
            alone, single = self._try([pairs[i]])
            self._check_alone_rows(acts, alone, inputs["modality"][i] > 0, single["modality"][0] > 0, i)

    def _try(self, pairs: Sequence[Any]) -> tuple[dict[HookPoint, Tensor], dict[str, Tensor]]:
        """Activations and inputs of these pairs. ValueError: whatever a model of another kind ends in."""
        tower = self.tower
        try:
            inputs = tower.inputs_of(pairs)
            return self(inputs), inputs
        except Exception as error:
            if not is_foreign(error):
                raise
            said = first_line(error) if isinstance(error, ValueError | AssertionError) else foreign_message(error)
            kind = type(tower.model).__name__
            raise ValueError(f"model: {tower.spec}: {kind} cannot be given image-text pairs: {said}") from error

    def _check_images(self, blocks_in: Sequence[Tensor], inputs: Mapping[str, Tensor]) -> None:
        """Another picture changes what the first block reads at the image's tokens, and nowhere else."""
        spec, kind = self.tower.spec, type(self.tower.model).__name__
        fits = len(blocks_in) == 1 and blocks_in[0].shape[:2] == inputs["input_ids"].shape
        require(fits, f"model: {spec}: the language model of {kind} is not called once with one row a token")
        first, other = blocks_in[0][0].float(), blocks_in[0][2].float()
        differs_T = (first != other).any(1).cpu()
        image_T = (inputs["modality"][0] == _IMAGE).cpu()
        require(
            bool(differs_T.any()),
            f"model: {spec}: {kind} does not bring images into its language model as tokens (cross-attention, for "
            "example), so that there are no image tokens to harvest",
        )
        strays = int((differs_T & ~image_T).sum())
        require(strays == 0, f"model: {spec}: {strays} tokens of {kind} that are not the image's depend on its pixels")
        seen = int((differs_T & image_T).sum())
        require(
            2 * seen >= int(image_T.sum()),
            f"model: {spec}: only {seen} of {int(image_T.sum())} image tokens of {kind} depend on the pixels",
        )

    def _check_alone_rows(
        self,
        acts: Mapping[HookPoint, Tensor],
        alone: Mapping[HookPoint, Tensor],
        real_T: Tensor,
        single_T: Tensor,
        i: int,
    ) -> None:
        """A pair by itself has the rows that it has beside others, but for rounding."""
        relative = 1e-3 if self.tower.dtype == torch.float32 and self._autocast is None else 3e-2
        for point, tensor in acts.items():
            together, found = tensor[i][real_T].float(), alone[point][0][single_T].float()
            same = together.shape == found.shape and float((together - found).norm()) <= relative * float(found.norm())
            require(
                same,
                f"model: {self.tower.spec}: {point.name} of a pair is another one in a batch, so that rows would not "
                "be the pair's own",
            )


def chosen_tokens(modality_BT: Tensor, kind: str) -> Tensor:
    """bool [B, T]: the tokens of a kind: text, image, all (the template too), last."""
    real_BT = modality_BT > 0
    if kind == "last":
        places = torch.arange(modality_BT.shape[1], device=modality_BT.device).expand_as(modality_BT)
        return places == torch.where(real_BT, places, -1).amax(1, keepdim=True)
    return {"text": modality_BT == _TEXT, "image": modality_BT == _IMAGE, "all": real_BT}[kind]


def check_language_tokens(tokens: Tokens | None) -> None:
    """ValueError: a choice of tokens that language models do not have."""
    known = (*LANGUAGE_TOKENS, "all")
    name = None if tokens is None else tokens.name
    require(name in known, f"tokens: {name} of a language model, which has {', '.join(known)}")


def image_token_id(config: Any) -> int | None:
    """The number of the token that stands for (a piece of) an image."""
    found = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    return next((int(number) for number in found if isinstance(number, int)), None)


def language_blocks(model: Any) -> tuple[list[nn.Module], Any]:
    """The blocks of a LLaVA's language model in order, and its configuration.

    Raises:
        ValueError: a model without a language part beside its vision part.
    """
    kind = type(model).__name__
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else None
    n_blocks = getattr(text_config, "num_hidden_layers", 0)
    if text_config is not None and text_config is not config:
        seen = set(vision_part(model).modules()) if getattr(config, "vision_config", None) is not None else set()
        for module in model.modules():
            if module in seen or type(getattr(module, "config", None)) is not type(text_config):
                continue
            for child in module.children():
                if isinstance(child, nn.ModuleList) and len(child) == n_blocks > 0:
                    return list(child), text_config
    raise ValueError(f"model: {kind} has no language model of {n_blocks} blocks beside a vision part")


@loading()
@own_defaults()
def load_language(
    spec: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    prompt: str | None = None,
    on_message: Callable[[str], None] = print,
) -> LanguageTower:
    """The language model of hf:NAME_OR_DIR, a LLaVA of transformers, with its vision tower and processor.

    Args:
        dtype: of the weights. prompt: as of PairPreprocess.

    Raises:
        ValueError: in one line: a model without a language part, or one whose images do not come in as tokens; what
            load_llava refuses.
    """
    check_kind("spec", spec, str, "hf:NAME_OR_DIR of a LLaVA")
    require(isinstance(dtype, torch.dtype), f"dtype: {shown(dtype)} is not a torch.dtype")
    require(prompt is None or isinstance(prompt, str), f"prompt: {shown(prompt)} is not a text")
    require(spec.startswith("hf:"), f"model: {spec!r} has no language part; point language needs hf:NAME_OR_DIR")
    require(prompt is None or prompt.strip() != "", "prompt: is empty")
    model, processor = load_llava(spec, device, dtype, on_message)
    return LanguageTower(spec, model, processor, prompt, device)

"""Answers of a LLaVA, or of another model that answers, to many questions with many edits, a large batch at a time.

The vision tower up to the steered block, and the SAE, run once for each image; what is tried on it, a row with edits of
its own, costs the blocks above, the projector and the language model. Nothing of a forward is copied: while a batch
of rows is answered, a hook shortens the input of blocks whose output nobody reads to one token, and the hook at the
steered block gives the rows' own residual streams back.

Shape suffixes: R rows, T tokens, D width, N tokens of all rows.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from saevlm_fast.errors import check_kind, require, shown, whole_number
from saevlm_fast.runtime import exact_defaults, own_defaults, tf32_products
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.settings import several
from saevlm_fast.steering.edits import Edit, EditPlan, Encoded, as_the_model_holds, edit_tokens, encode_tokens
from saevlm_fast.steering.site import find_site, hooked_block, one_token_into, token_mask
from saevlm_fast.towers.chat import chat_text, read_one
from saevlm_fast.towers.hub import one_line_errors


class _Enough(Exception):
    """The steered block has given its output: the rest of this forward is not needed."""


@dataclass(frozen=True, eq=False)
class SteeredRow:
    """One answer wanted.

    Attributes:
        question: a number that `SteeredAnswers.ask` gave.
        edits: as of `steering.steer`; () is the identity control, whatever `only` is; None leaves the model
            untouched, without the SAE.
        direction: [D] added to the chosen tokens after the edits, in the units of decoder rows: times the token's own
            scale where the SAE normalises its input. Needs edits.
        mask: bool [T], the tokens of this row that are steered, of every tile, instead of SteeredAnswers' choice; none
            is allowed. Needs edits.
    """

    question: int
    edits: tuple[Edit, ...] | None
    direction: Tensor | None = None
    mask: Tensor | None = None


class Question(NamedTuple):
    """What was asked.

    inputs: of the model, one row. x_BTD: output of the steered block for all tiles. encoded: the same tokens.
    """

    inputs: dict[str, Tensor]
    x_BTD: Tensor
    encoded: Encoded

    @property
    def length(self) -> int:
        return self.inputs["input_ids"].shape[1]


class SteeredAnswers:
    """Greedy answers to rows of (question, edits).

        answerer = SteeredAnswers(llava, processor, sae, layer=22)
        dog = answerer.ask(picture, "What is shown in this image? Use exactly one word!")
        rows = [SteeredRow(dog, None), SteeredRow(dog, ()), *(SteeredRow(dog, (clamp(k, 100.0),)) for k in range(1000))]
        answerer.answers(rows)

    Rows of a batch have inputs of the same length, and images of as many tokens, so nothing is padded: which rows share
    a batch changes an answer no more than the last bit of matrix products of another size does. A question holds its
    tokens in the model's dtype and their reconstruction in the SAE's, 4 MB for CLIP-L/14-336 in float16 and float32.
    Blocks below are given one token while rows are answered, where they are given nothing else (Qwen-VL's, Pixtral's
    and Mllama's are): an outer `steer` of one of them must take all tokens alike. One thread at a time: what another
    one runs on the same model meanwhile is steered too.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        sae: SparseAutoencoder,
        layer: int,
        *,
        tokens: str | Tensor = "all",
        only: bool = False,
        error: str = "drop",
        batch_size: int = 64,
        max_new_tokens: int = 16,
    ):
        """ValueError: those of `steering.steer`; a mask per row; a model that does not answer; sizes below 1."""
        per_row = isinstance(tokens, Tensor) and tokens.ndim > 1
        require(not per_row, "tokens: a mask must be [T] here; SteeredRow.mask is one of a row's own")
        require(hasattr(processor, "tokenizer"), f"processor: {shown(processor)} is not the processor of a LLaVA")
        self.model, self.processor, self.sae = model, processor, sae
        self.site = find_site(model, sae, layer, tokens, error)
        readable = self.site.reads is not None
        require(readable, f"model: {type(model).__name__} has no language model that answers")
        batch_size = whole_number("batch_size", batch_size)
        max_new_tokens = whole_number("max_new_tokens", max_new_tokens)
        self.tokens, self.only, self.error = tokens, only, error
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self._questions: list[Question] = []

    @property
    def settings(self) -> dict[str, Any]:
        """JSON: what decides the answers, beside model, SAE and rows."""
        tokens = self.tokens
        if isinstance(tokens, Tensor):
            tokens = "mask " + hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest()
        return {
            "layer": self.site.layer,
            "tokens": tokens,
            "only": self.only,
            "error": self.error,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "max_new_tokens": self.max_new_tokens,
        }

    @own_defaults()
    @torch.inference_mode()
    def ask(self, image: Any, prompt: str) -> int:
        """Prepares a question about an RGB image: the number by which rows refer to it.

        prompt: put into the processor's chat template, unless it holds the image token itself. ValueError: it is empty.
        """
        check_kind("image", image, (Image.Image, np.ndarray, Tensor), "an RGB image")
        check_kind("prompt", prompt, str, "a text")
        require(prompt.strip() != "", "prompt: is empty")
        inputs = self._inputs(image, prompt)
        self._questions.append(self._prepared(inputs))
        return len(self._questions) - 1

    def _prepared(self, inputs: dict[str, Tensor]) -> Question:
        x_BTD = self._residual(inputs)
        return Question(inputs, x_BTD, encode_tokens(self.sae, x_BTD.flatten(0, 1)))

    def _prompt_mask(self, x_BTD: Tensor, ids_BT: Tensor) -> Tensor:
        """bool [B, T]: the chosen tokens of the steered block, where no row has a mask of its own."""
        return token_mask(self.tokens, x_BTD.shape[0], x_BTD.shape[1], self.site.anatomy).to(x_BTD.device)

    @own_defaults()
    @torch.no_grad()
    def mean_residual(self, image: Any, prompt: str) -> Tensor:
        """float32 [D] on the host: the steered block's output, averaged over the chosen tokens of all tiles."""
        inputs = self._inputs(image, prompt)
        x_BTD = self._residual(inputs)
        mask_BT = self._prompt_mask(x_BTD, inputs["input_ids"])
        return x_BTD[mask_BT].mean(0, dtype=torch.float32).cpu()

    @exact_defaults()
    @torch.inference_mode()
    def answers(self, rows: Sequence[SteeredRow], on_rows: Callable[[int], None] = lambda done: None) -> list[str]:
        """The answer to every row, in order. on_rows: called after every batch with the number of rows done."""
        rows = several("rows", rows)
        for row in rows:
            check_kind("rows", row, SteeredRow, "a SteeredRow")
        answers = [""] * len(rows)
        done = 0
        for batch in self._batches(rows):
            for i, answer in zip(batch, self._answer_batch([rows[i] for i in batch])):
                answers[i] = answer
            done += len(batch)
            on_rows(done)
        return answers

    def _inputs(self, image: Any, prompt: str) -> dict[str, Tensor]:
        text = chat_text(self.processor, prompt)
        with one_line_errors(f"prompt: the processor of {type(self.model).__name__}"):
            features = read_one(self.processor, image, text)
        config = self.model.config.get_text_config(decoder=True)
        n, window = features["input_ids"].shape[1], getattr(config, "max_position_embeddings", None)
        fits = not isinstance(window, int) or n <= window
        require(fits, f"prompt: with its image it has {n} tokens, the window of {type(self.model).__name__} {window}")
        with one_line_errors(f"prompt: the processor of {type(self.model).__name__}"):
            return {name: tensor.to(self.model.device) for name, tensor in features.items()}

    @torch.inference_mode()
    @tf32_products(False)
    def _residual(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """[tiles, T, D]: the model's own forward, up to the steered block."""
        caught: list[Tensor] = []

        def catch(x_BTD: Tensor) -> Tensor:
            caught.append(x_BTD.detach())
            raise _Enough

        with self._in_one_line(), hooked_block(self.site, catch), suppress(_Enough):
            self.model(**inputs)
        self._check_run(caught)
        return caught[0]

    def _in_one_line(self) -> AbstractContextManager[None]:
        """What the model's own code raises is said of the model."""
        return one_line_errors(f"model: {type(self.model).__name__}")

    def _check_run(self, calls: Sequence[Any]) -> None:
        """Blocks that are run by other means than a call of the module know no hooks, and nothing would be steered."""
        name = type(self.model).__name__
        require(len(calls) > 0, f"layer: {self.site.layer} of {name} was not called, so that nothing is steered")

    def _batches(self, rows: Sequence[SteeredRow]) -> Iterator[list[int]]:
        """Numbers of rows with inputs, and images, of one length, rows of one question side by side."""
        of_length: dict[tuple[int, int], list[int]] = {}
        for i, row in enumerate(rows):
            require(
                0 <= row.question < len(self._questions), f"question: {row.question} of {len(self._questions)} asked"
            )
            for name, value in (("direction", row.direction), ("mask", row.mask)):
                require(value is None or row.edits is not None, f"{name}: needs edits, () for none")
            boolean = row.mask is None or row.mask.dtype == torch.bool
            require(boolean, f"mask: {getattr(row.mask, 'dtype', None)}, must be bool")
            question = self._questions[row.question]
            of_length.setdefault((question.length, question.x_BTD.shape[1]), []).append(i)
        for same in of_length.values():
            same.sort(key=lambda i: rows[i].question)
            yield from (same[start : start + self.batch_size] for start in range(0, len(same), self.batch_size))

    def _answer_batch(self, rows: Sequence[SteeredRow]) -> list[str]:
        questions = [self._questions[row.question] for row in rows]
        inputs = join_inputs([question.inputs for question in questions])
        x_BTD = self._edited(rows, questions)
        calls: list[None] = []

        def given(_: Tensor) -> Tensor:
            calls.append(None)
            return x_BTD

        with self._in_one_line(), self._only_above_block(), hooked_block(self.site, given):
            tokens = self._generate(inputs)
        self._check_run(calls)
        return self._said(tokens, inputs)

    def _generate(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.model.generate(
            **inputs,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
        )

    def _said(self, tokens: Tensor, inputs: Mapping[str, Tensor]) -> list[str]:
        """The answers, without the prompts."""
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]

    def _edited(self, rows: Sequence[SteeredRow], questions: Sequence[Question]) -> Tensor:
        """The rows' residual streams after the steered block, tiles and all: [B, T, D], as the model holds them."""
        x_BTD = torch.cat([question.x_BTD for question in questions])
        n_tiles = torch.tensor([len(question.x_BTD) for question in questions])
        row_B = torch.arange(len(rows)).repeat_interleave(n_tiles)
        steered_B = torch.tensor([row.edits is not None for row in rows])[row_B]
        mask_BT = token_mask(self.tokens, x_BTD.shape[0], x_BTD.shape[1], self.site.anatomy).to(x_BTD.device)
        mask_BT = mask_BT & steered_B.to(x_BTD.device)[:, None]
        for r, row in enumerate(rows):
            if row.mask is not None:
                require(
                    row.mask.shape == mask_BT.shape[1:], f"mask: {list(row.mask.shape)}, not {mask_BT.shape[1]} tokens"
                )
                mask_BT[row_B == r] = row.mask.to(mask_BT.device)
        row_N = row_B.repeat_interleave(x_BTD.shape[1]).to(self.sae.W_dec.device)
        encoded = Encoded.join([question.encoded for question in questions], self.sae.config.d_sae)
        plan = EditPlan.of_rows([row.edits or () for row in rows], self.sae)
        edited_ND = self._new_tokens(rows, encoded, plan, row_N)
        chosen_N = mask_BT.flatten().to(row_N.device)
        changed_ND = as_the_model_holds(edited_ND[chosen_N], x_BTD, plan, row_N[chosen_N])
        return x_BTD.masked_scatter(mask_BT[:, :, None], changed_ND)

    def _new_tokens(self, rows: Sequence[SteeredRow], encoded: Encoded, plan: EditPlan, row_N: Tensor) -> Tensor:
        """[N, D]: all tokens as their rows edit them, and with the rows' directions."""
        edited_ND = edit_tokens(self.sae, encoded, plan, row_N, False, self.error)
        if self.only:
            has_edits = torch.tensor([bool(row.edits) for row in rows], device=row_N.device)[row_N]
            only_ND = edit_tokens(self.sae, encoded, plan, row_N, True, self.error)
            edited_ND = torch.where(has_edits[:, None], only_ND, edited_ND)
        for r, row in enumerate(rows):
            if row.direction is not None:
                width = self.sae.config.d_in
                require(row.direction.shape == (width,), f"direction: {list(row.direction.shape)}, not [{width}]")
                require(bool(row.direction.isfinite().all()), f"direction: of row {r} of the batch, is not finite")
                shift_D, of_row_N = row.direction.to(edited_ND), row_N == r
                scale = 1.0 if encoded.statistics is None else encoded.statistics.scale[of_row_N]
                edited_ND[of_row_N] += (shift_D * scale).to(edited_ND)
        return edited_ND

    def _only_above_block(self) -> AbstractContextManager[None]:
        """Blocks whose output is replaced, or read by nobody, are given one token instead of all."""
        reads = self.site.reads or frozenset()
        blocks = self.site.anatomy.blocks
        first = [blocks[0]] if min(reads) >= self.site.layer else []  # else the projector reads a block below
        return one_token_into([*first, *blocks[max(reads) + 1 : max(reads) + 2]])


def join_inputs(inputs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Inputs of single rows as one batch.

    Images with fewer tiles than others, or smaller ones, are filled up with zeros, as the processors do.
    """
    joined = {}
    for name in inputs[0]:
        tensors = [row[name] for row in inputs]
        if tensors[0].ndim >= 4:  # pixels of images or of their tiles, and masks of these
            sizes = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors))]
            tensors = [_filled(tensor, sizes) for tensor in tensors]
        joined[name] = torch.cat(tensors)
    return joined


def _filled(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    missing = [(0, size - have) for size, have in zip(sizes, tensor.shape[1:])]
    return nn.functional.pad(tensor, [each for pair in reversed(missing) for each in pair])

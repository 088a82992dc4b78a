"""Answers of a LLaVA whose language model is edited: what SteeredAnswers is for its vision tower.

The prompt's tokens go through the steered block together, those of the answer one by one, each edited as it comes; so
nothing is known before a batch of rows is answered, and every row costs a whole forward.

Shape suffixes: R rows, B rows of a batch, T tokens of a prompt, D width, N tokens of all rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saevlm_fast.errors import require, shown, whole_number
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.steering.answers import Question, SteeredAnswers, SteeredRow, join_inputs
from saevlm_fast.steering.edits import EditPlan, as_the_model_holds, encode_tokens
from saevlm_fast.steering.site import hooked_block, language_site
from saevlm_fast.towers.language import image_token_id

TOKENS = ("all", "text", "image", "last")


class LanguageAnswers(SteeredAnswers):
    """Greedy answers to rows of (question, edits), edited after a block of the language model.

        answerer = LanguageAnswers(llava, processor, sae, layer=1, tokens="image")

    Used as SteeredAnswers. A row without edits (None) is answered by the model as it is. SteeredRow.mask is over the
    prompt's tokens.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        sae: SparseAutoencoder,
        layer: int,
        *,
        tokens: str = "all",
        only: bool = False,
        error: str = "drop",
        batch_size: int = 64,
        max_new_tokens: int = 16,
    ):
        """tokens: all, text (what is no image's, the answer too), image, or last (the prompt's).

        Raises:
            ValueError: a model without a language part, no such block, another width, an unknown choice, sizes below 1.
        """
        known = isinstance(tokens, str) and tokens in TOKENS
        require(known, f"tokens: {shown(tokens)} is not one of {', '.join(TOKENS)}")
        require(hasattr(processor, "tokenizer"), f"processor: {shown(processor)} is not the processor of a LLaVA")
        self.model, self.processor, self.sae = model, processor, sae
        self.site = language_site(model, sae, layer, error)
        image_id = image_token_id(model.config)
        require(image_id is not None, f"model: {type(model).__name__} has no token that stands for an image")
        self._image_id = int(image_id or 0)
        self.tokens, self.only, self.error = tokens, only, error
        self.batch_size = whole_number("batch_size", batch_size)
        self.max_new_tokens = whole_number("max_new_tokens", max_new_tokens)
        self._questions = []

    @property
    def settings(self) -> dict[str, Any]:
        """JSON: what decides the answers, beside model, SAE and rows."""
        return {"part": "language", **super().settings}

    def _chosen(self, ids_BT: Tensor) -> Tensor:
        """bool [B, T]: the tokens of prompts that are steered."""
        image_BT = ids_BT == self._image_id
        if self.tokens == "last":
            return torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT) == ids_BT.shape[1] - 1
        return {"all": torch.ones_like(image_BT), "text": ~image_BT, "image": image_BT}[str(self.tokens)]

    def _prepared(self, inputs: dict[str, Tensor]) -> Question:
        """Of what the tokens of a prompt are nothing is kept: it is computed anew with every answer."""
        nothing = torch.empty(0, self.sae.config.d_in, dtype=torch.float32, device=self.sae.W_dec.device)
        return Question(inputs, nothing[None], encode_tokens(self.sae, nothing))

    def _prompt_mask(self, x_BTD: Tensor, ids_BT: Tensor) -> Tensor:
        return self._chosen(ids_BT).to(x_BTD.device)

    def _answer_batch(self, rows: Sequence[SteeredRow]) -> list[str]:
        questions = [self._questions[row.question] for row in rows]
        inputs = join_inputs([question.inputs for question in questions])
        steered_B = torch.tensor([row.edits is not None for row in rows])
        mask_BT = self._chosen(inputs["input_ids"]).cpu()
        for b, row in enumerate(rows):
            if row.mask is not None:
                n_tokens = mask_BT.shape[1]
                require(row.mask.shape == (n_tokens,), f"mask: {list(row.mask.shape)}, not {n_tokens} tokens")
                mask_BT[b] = row.mask.cpu()
        mask_BT &= steered_B[:, None]
        answer_B = steered_B & torch.tensor([self.tokens in ("all", "text") and row.mask is None for row in rows])
        plan = EditPlan.of_rows([row.edits or () for row in rows], self.sae)
        calls: list[None] = []

        def change(x_BTD: Tensor) -> Tensor:
            calls.append(None)
            chosen = mask_BT if len(calls) == 1 else answer_B[:, None]
            return self._changed(rows, plan, x_BTD, chosen.to(x_BTD.device))

        with self._in_one_line(), hooked_block(self.site, change):
            tokens = self._generate(inputs)
        self._check_run(calls)
        return self._said(tokens, inputs)

    def _changed(self, rows: Sequence[SteeredRow], plan: EditPlan, x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """x_BTD with the chosen tokens edited; the others to the last bit as they are."""
        require(
            x_BTD.shape[:2] == mask_BT.shape,
            f"layer: {self.site.layer} of {type(self.model).__name__} is given {list(x_BTD.shape)}, not "
            f"{list(mask_BT.shape)} tokens",
        )
        if not bool(mask_BT.any()):
            return x_BTD
        row_N = mask_BT.nonzero()[:, 0].to(self.sae.W_dec.device)
        encoded = encode_tokens(self.sae, x_BTD[mask_BT])
        edited_ND = self._new_tokens(rows, encoded, plan, row_N)
        return x_BTD.masked_scatter(mask_BT[:, :, None], as_the_model_holds(edited_ND, x_BTD, plan, row_N))

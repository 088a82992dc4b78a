"""The plain form that an SAE of any library is brought to, and the exact changes of weights that bring it there.

    h = (n(x) - b_dec) W_enc + b_enc        z = act(h)        x_hat = n^-1(z W_dec + b_dec)

| activation | z |
|---|---|
| relu | max(h, 0) |
| topk | the k largest h of a row, then relu: fewer than k may fire |
| jumprelu | h where h > threshold [d_sae] and h > 0, else 0 |
| batch_topk | the same with one threshold for all latents; k, an average, says how it was trained |

n is nothing, or takes each row by itself: layer_norm (x - mean) / (std + eps) with the unbiased std, token_norm
x sqrt(d_in) / |x|. All else that libraries do to an input, a latent or an output is a change of weights: the methods.
Formulas of the methods are exact; they are evaluated in float64 and rounded once, to the dtype of the weights but no
less than float32: what a 16-bit file holds is not rounded to 16 bits again.

Shape suffixes: B rows, D d_in, S d_sae.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from saevlm_fast.errors import require

Activation = Literal["relu", "topk", "jumprelu", "batch_topk"]
PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")  # of every SAE
InputNorm = Literal["none", "layer_norm", "token_norm"]


@dataclass(frozen=True, kw_only=True)
class PlainSAE:
    """An SAE in the plain form.

    Attributes:
        W_enc: [d_in, d_sae]. b_enc: [d_sae]. W_dec: [d_sae, d_in], rows of any norm. b_dec: [d_in].
        activation: as above. k: of topk, always; of others what is known of their training.
        threshold: [d_sae] of jumprelu, a scalar of batch_topk, in the units of h; None of others, and of a batch_topk
            that was never calibrated.
        input_norm: n; eps: of layer_norm.
        group_sizes: of a Matryoshka SAE, first group first; () otherwise.
        metadata: what the files say of model, layer, tokens and training; anything JSON.
        doubts: what the files do not say and was assumed, a sentence each, to be shown.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, topk without k.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    activation: Activation
    k: int | None = None
    threshold: Tensor | None = None
    input_norm: InputNorm = "none"
    eps: float = 1e-5
    group_sizes: tuple[int, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(self.W_enc.dim() == 2, f"W_enc: shape {tuple(self.W_enc.shape)} is not [d_in, d_sae]")
        d_in, d_sae = self.W_enc.shape
        expected = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
        if self.threshold is not None:
            expected["threshold"] = (d_sae,) if self.activation == "jumprelu" else ()
        for name, shape in expected.items():
            found = tuple(getattr(self, name).shape)
            require(found == shape, f"{name}: shape {found} must be {shape}")
            require(bool(getattr(self, name).isfinite().all()), f"{name}: holds NaN or inf")
        require(self.activation != "topk" or self.k is not None, "k: a topk SAE needs it")
        require(self.activation != "jumprelu" or self.threshold is not None, "threshold: a jumprelu SAE needs it")

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    def _with(self, **exact: Tensor | None) -> "PlainSAE":
        """In float32 at least, with tensors made in float64 rounded to that."""
        new: dict[str, Tensor] = {}
        for name in (*PARAMETERS, "threshold"):
            old: Tensor | None = getattr(self, name)
            if old is not None:
                exact_one = exact.get(name)
                new[name] = (old if exact_one is None else exact_one).to(float32_at_least(old.dtype))
        return replace(self, **new)  # type: ignore[arg-type]

    def without_pre_bias(self) -> "PlainSAE":
        """Of files whose encoder sees n(x) itself, not n(x) - b_dec: b_enc += b_dec W_enc."""
        return self._with(b_enc=self.b_enc.double() + self.b_dec.double() @ self.W_enc.double())

    def encoder_bias_without_pre_bias(self) -> Tensor:
        """b_enc [d_sae] for files whose encoder sees n(x) itself, in float32 at least."""
        exact_S = self.b_enc.double() - self.b_dec.double() @ self.W_enc.double()
        return exact_S.to(float32_at_least(self.b_enc.dtype))

    def of_raw_input(self, shift_D: Tensor | float, scale: float, keep_latents: bool = True) -> "PlainSAE":
        """Of an SAE that saw (x - shift) scale and gave x_hat / scale + shift, when it sees x itself.

        Args:
            shift_D: [d_in], or one number. scale: above 0.
            keep_latents: latents stay what they were, in units of the scaled input, and the decoder's rows shrink.
                Otherwise rows keep their norms and latents become z / scale, in units of x.

        Raises:
            ValueError: an SAE with a norm of the input.
        """
        require(self.input_norm == "none", f"input_norm: {self.input_norm} is undone by no change of weights")
        b_dec = self.b_dec.double() / scale + torch.as_tensor(shift_D).double()
        if keep_latents:
            return self._with(W_enc=self.W_enc.double() * scale, W_dec=self.W_dec.double() / scale, b_dec=b_dec)
        threshold = None if self.threshold is None else self.threshold.double() / scale
        return self._with(b_enc=self.b_enc.double() / scale, b_dec=b_dec, threshold=threshold)

    def of_whitened_input(self, mean_D: Tensor, matrix_DD: Tensor, inverse_DD: Tensor) -> "PlainSAE":
        """Of an SAE that saw (x - mean) matrix and gave x_hat inverse + mean, when it sees x itself.

        Raises:
            ValueError: an SAE with a norm of the input.
        """
        require(self.input_norm == "none", f"input_norm: {self.input_norm} is undone by no change of weights")
        inverse_DD = inverse_DD.double()
        return self._with(
            W_enc=matrix_DD.double() @ self.W_enc.double(),
            W_dec=self.W_dec.double() @ inverse_DD,
            b_dec=self.b_dec.double() @ inverse_DD + mean_D.double(),
        )

    def scaled_by_decoder_norms(self) -> "PlainSAE":
        """Of an SAE that activates on h |W_dec row| and divides by that norm when it decodes: rows become unit.

        The threshold is in scaled units already. ValueError: a row of W_dec is zero.
        """
        norm_S = self.W_dec.double().norm(dim=1)
        require(bool((norm_S > 0).all()), "W_dec: a row is zero, its norm cannot be divided by")
        return self._with(
            W_enc=self.W_enc.double() * norm_S,
            b_enc=self.b_enc.double() * norm_S,
            W_dec=self.W_dec.double() / norm_S[:, None],
        )

    def threshold_on_scaled_latents(self) -> "PlainSAE":
        """Of an SAE that compares h |W_dec row| with its threshold, and returns h: threshold / norm of the row."""
        if self.threshold is None:
            return self
        threshold_S = self.threshold.double() / self.W_dec.double().norm(dim=1)
        dtype = float32_at_least(self.threshold.dtype)
        return replace(self, activation="jumprelu", threshold=threshold_S.to(dtype))

    def with_scaled_latents(self, factor_S: Tensor) -> "PlainSAE":
        """Of an SAE that decodes (z factor) W_dec: rows times the factor."""
        return self._with(W_dec=self.W_dec.double() * factor_S.double()[:, None])

    def after_batch_norm(
        self, weight_S: Tensor, bias_S: Tensor, mean_S: Tensor, var_S: Tensor, eps: float
    ) -> "PlainSAE":
        """Of an encoder with a batch norm, in eval mode, behind its matrix."""
        scale_S = weight_S.double() / (var_S.double() + eps).sqrt()
        b_enc = (self.b_enc.double() - mean_S.double()) * scale_S + bias_S.double()
        return self._with(W_enc=self.W_enc.double() * scale_S, b_enc=b_enc)

    def with_inclusive_threshold(self) -> "PlainSAE":
        """Of an SAE that keeps h >= threshold: the next number below, in the same dtype. ValueError: it has none."""
        require(self.threshold is not None, "threshold: there is none")
        assert self.threshold is not None
        return replace(self, threshold=self.threshold.nextafter(torch.full_like(self.threshold, -torch.inf)))

    def assumed(self, *doubts: str) -> "PlainSAE":
        """The same with more doubts."""
        return replace(self, doubts=(*self.doubts, *doubts))


def gated(
    W_enc: Tensor, gate_bias_S: Tensor, magnitude_bias_S: Tensor, log_scale_S: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(W_enc, b_enc, threshold) of the jumprelu SAE that a gated one is, in float32 at least.

    It fires where e + gate_bias > 0, e = (x - b_dec) W_enc, with relu(exp(log_scale) e + magnitude_bias): exactly where
    h = exp(log_scale) e + magnitude_bias is above magnitude_bias - exp(log_scale) gate_bias, and above 0.
    """
    scale_S = log_scale_S.double().exp()
    threshold_S = (magnitude_bias_S.double() - scale_S * gate_bias_S.double()).clamp(min=0)
    dtype = float32_at_least(W_enc.dtype)
    return (W_enc.double() * scale_S).to(dtype), magnitude_bias_S.to(dtype), threshold_S.to(dtype)


def float32_at_least(dtype: torch.dtype) -> torch.dtype:
    """The dtype of changed weights."""
    return torch.promote_types(dtype, torch.float32)

"""W_enc in float16, which a GPU's screening encoder reads: kept from step to step, as the update of W_enc writes it."""

from torch import Tensor

from saevlm_fast.kernels.low_weights import LowWeights
from saevlm_fast.sae import SparseAutoencoder


class LowCopy:
    """An SAE's W_enc [d_sae, d_in] as a low product takes it, with the bounds of that rounding.

    A change of W_enc through `.data` moves no version counter and is not seen.

    Attributes:
        weights: None while none was asked for.
    """

    def __init__(self, sae: SparseAutoencoder):
        self.sae = sae
        self.weights: LowWeights | None = None
        self._of: tuple[Tensor, int] | None = None  # W_enc and its version, as the copy was written

    def current(self) -> LowWeights:
        """The copy, made here where others than the update changed W_enc."""
        W_enc_SD = self.sae.W_enc.detach().T
        if self.weights is None:
            d_sae, d_in = W_enc_SD.shape
            self.weights, self._of = LowWeights.empty(d_sae, d_in, W_enc_SD.device), None
        if not self._is_of_W_enc():
            self.weights.write_(0, W_enc_SD)
            self.was_written()
        return self.weights

    def is_current(self) -> bool:
        """Whether the next step finds the copy as the last one left it."""
        return self.weights is None or self._is_of_W_enc()

    def was_written(self) -> None:
        """The tensor itself is kept: while it lives, no other one can have its address."""
        W_enc = self.sae.W_enc.detach()
        self._of = W_enc, W_enc._version

    def _is_of_W_enc(self) -> bool:
        """Whether W_enc was neither replaced nor written to since the copy was."""
        if self._of is None:
            return False
        of, version = self._of
        return of.data_ptr() == self.sae.W_enc.data_ptr() and self.sae.W_enc._version == version

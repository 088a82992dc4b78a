"""Weights in float16, as the GPU's encoders screen by them."""

from saevlm_fast.kernels.low_weights import LowWeights


def low_weights(W_enc_DS):
    """LowWeights by torch: quick in the interpreter, and an oracle of the kernel."""
    W_SD = W_enc_DS.t()
    low = LowWeights.empty(*W_SD.shape, W_SD.device)
    low.W_SD[:, : W_SD.shape[1]] = W_SD
    low.norm_S.copy_(W_SD.norm(dim=1) + 2.0**-40)
    low.error_S.copy_((W_SD - low.W_SD[:, : W_SD.shape[1]].float()).norm(dim=1) + 2.0**-40)
    return low

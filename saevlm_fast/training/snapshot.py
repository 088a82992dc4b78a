"""A run as it is after a step, for the host to have later: later steps change nothing of it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from saevlm_fast.sae import SparseAutoencoder

_copying: dict[torch.device, torch.cuda.Stream] = {}


class Snapshot:
    """Tensors and an SAE as they are now.

    They are copied where they are, which a GPU does in a thousandth of the time that the host takes to get them. Where
    there is no memory for that, the host gets them now.

    Args:
        tensors: by name; of these a copy is made.
        sae: nobody else's.
    """

    def __init__(self, tensors: Mapping[str, Tensor], sae: SparseAutoencoder):
        try:
            self._tensors = _copies(tensors)
        except torch.OutOfMemoryError:
            self._tensors = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        self._sae, self._device = sae, sae.b_dec.device
        self._is_made = torch.cuda.current_stream(self._device).record_event() if sae.b_dec.is_cuda else None

    def on_host(self) -> tuple[dict[str, Tensor], SparseAutoencoder]:
        """Both there; in any thread. On a GPU nothing waits for it, and it for no step that came later."""
        if self._is_made is None:
            return {name: tensor.cpu() for name, tensor in self._tensors.items()}, self._sae.cpu()
        copying = copying_stream(self._device)
        copying.wait_event(self._is_made)
        with torch.cuda.device(self._device), torch.cuda.stream(copying):
            return {name: tensor.cpu() for name, tensor in self._tensors.items()}, self._sae.cpu()


def copying_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of a device on which snapshots go to the host, in a thread of their own.

    torch hands out the same 32 of a priority in turn, and one that copies must not be captured meanwhile. Streams of
    steps are of another priority than this one, and what is beside them keeps off it (gpu_step.side_stream).
    """
    if device not in _copying:
        _copying.setdefault(device, torch.cuda.Stream(device, priority=-1))
    return _copying[device]


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Where they are."""
    return {name: tensor.clone() for name, tensor in tensors.items()}

"""SAE files as other libraries write them, each with that library's own dense forward, written from its code."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

import plain_forward
from saevlm_fast.formats.plain import PlainSAE
from saevlm_fast.formats.registry import read
from saevlm_fast.formats.single_file import NEGATIVES

D, S, B = 6, 20, 64
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}
Forward = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass
class Made:
    """Files by name (settings: dicts; tensors and pickles: what is saved), and x [B, d_in] -> (z, x_hat), float64."""

    format: str
    files: dict[str, Any]
    forward: Forward
    assume: dict[str, Any] = field(default_factory=dict)
    factor: Tensor | float = 1.0  # what our latents are multiplied by to be theirs
    open: str = ""  # the file that is opened, where it is not the folder

    def write(self, folder: Path) -> Path:
        for name, value in self.files.items():
            save(folder / name, value)
        return folder / self.open

    def read(self, folder: Path) -> PlainSAE:
        return read(self.write(folder), assume=self.assume)

    @property
    def tensor_file(self) -> str:
        return next(name for name in self.files if not name.endswith((".json", ".yaml")))


def save(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, bytes):
        path.write_bytes(value)
    elif path.suffix == ".json":
        path.write_text(json.dumps(value))
    elif path.suffix == ".yaml":
        path.write_text(yaml.safe_dump(value))
    elif path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in value.items()}, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in value.items()})
    else:
        torch.save(value, path)


def rows(seed: int = 0, n: int = B, d: int | None = None) -> Tensor:
    """x [n, d], float64, off centre."""
    return torch.randn(n, d or D, generator=torch.Generator().manual_seed(seed + 999)).double() * 1.5 + 0.3


@dataclass
class Weights:
    """Random weights of an SAE in a file's dtype; .double() of each for its forward."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    theta: Tensor  # [S], above 0
    others: tuple[Tensor, ...]  # three more of [S]

    def doubles(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.W_enc.double(), self.b_enc.double(), self.W_dec.double(), self.b_dec.double()


def random_weights(
    seed: int, dtype: torch.dtype = torch.float32, d: int | None = None, s: int | None = None
) -> Weights:
    d, s = d or D, s or S
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    theta = (torch.rand(s, generator=generator, dtype=torch.float64) * 0.8 + 0.1).to(dtype)
    others = tuple(randn(s, scale=0.3) for _ in range(3))
    return Weights(
        randn(d, s, scale=0.5), randn(s, scale=0.2), randn(s, d, scale=0.7), randn(d, scale=0.4), theta, others
    )


def topk(h_BS: Tensor, k: int) -> Tensor:
    """The k largest of each row, whatever their sign."""
    values_BK, latents_BK = h_BS.topk(k, dim=-1)
    return torch.zeros_like(h_BS).scatter(-1, latents_BK, values_BK)


def layer_norm(x_BD: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    """(n(x), mean, std): std without eps, and of n - 1."""
    mean = x_BD.mean(dim=-1, keepdim=True)
    centred = x_BD - mean
    std = centred.std(dim=-1, keepdim=True)
    return centred / (std + eps), mean, std


def assert_same(plain: PlainSAE, made: Made, dtype: torch.dtype, x_BD: Tensor | None = None) -> None:
    """The same latents fire, with the same values, and reconstructions are the same."""
    x_BD = rows(d=plain.d_in) if x_BD is None else x_BD
    z_BS, x_hat_BD = made.forward(x_BD)
    if NEGATIVES in plain.doubts:  # where the library keeps them, rows without them are the same
        kept_B = (z_BS >= 0).all(dim=1)
        assert kept_B.any()
        x_BD, z_BS, x_hat_BD = x_BD[kept_B], z_BS[kept_B], x_hat_BD[kept_B]
    ours_BS = plain_forward.encode(plain, x_BD)
    assert torch.equal(ours_BS != 0, z_BS != 0)
    assert 0 < int((z_BS != 0).sum()) < z_BS.numel()
    assert_close(ours_BS * made.factor, z_BS, TOLERANCE[dtype])
    assert_close(plain_forward.decode(plain, ours_BS, x_BD), x_hat_BD, TOLERANCE[dtype])


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error <= tolerance, f"relative difference {error:.2e}, at most {tolerance:.0e}"

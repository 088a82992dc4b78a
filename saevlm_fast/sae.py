"""The SAE module: encode to sparse codes, decode; save in the SAELens v6 layout, open any format."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.weight_norm import WeightNorm

from saevlm_fast.config import CALIBRATED, SAEConfig
from saevlm_fast.errors import check_dense, check_kind, doubt, require
from saevlm_fast.formats import registry, sae_lens
from saevlm_fast.formats.hub import resolve
from saevlm_fast.formats.plain import PARAMETERS, Activation, PlainSAE
from saevlm_fast.formats.sae_header import config_of
from saevlm_fast.kernels.sparse_decode import matryoshka_decode, sparse_decode
from saevlm_fast.kernels.topk_encode import batch_topk_encode, threshold_encode, topk_encode
from saevlm_fast.runtime import exactly, own_defaults, resolve_device
from saevlm_fast.settings import path_of
from saevlm_fast.sparse_codes import SparseCodes

WEIGHTS_FILE, CONFIG_FILE = sae_lens.WEIGHTS_FILE, sae_lens.CONFIG_FILE
FIRST_THRESHOLD = 0.001  # of jumprelu, in the units of training


class InputStatistics(NamedTuple):
    """What normalising the input took from every row, of shape [..., 1]: n(x) = (x - mean) / divisor, and back by
    n^-1(y) = y * scale + mean."""

    mean: Tensor
    divisor: Tensor
    scale: Tensor


class SparseAutoencoder(nn.Module):
    """x -> relu((x - b_dec) @ W_enc + b_enc), what the architecture keeps of it -> codes @ W_dec + b_dec.

    Section 3 of arXiv 2504.02821; docs/recipe.md section 1. x is in raw activation units once it is trained. What is
    kept: the k largest of a row (topk), those above one threshold (batch_topk, matryoshka; in training the B * k
    largest of a batch), above a threshold of each latent's own (jumprelu), or all above 0 (relu). An SAE whose input is
    normalised (config.input_norm) encodes n(x) for x, and decodes to n^-1 of that.

    Args:
        config: its sizes and architecture. device, dtype: of the parameters.
        random: they are random (`reset_parameters`); False leaves them to be filled.

    Raises:
        ValueError: weights that do not fit in memory.

    Attributes:
        config: as given.
        W_enc: [d_in, d_sae]. Held latent-major (its memory is [d_sae, d_in]): a latent's weights are contiguous, which
            is what gathers and per-latent updates read.
        b_enc: [d_sae]. W_dec: [d_sae, d_in], unit rows of those trained here. b_dec: [d_in].
        threshold: scalar, the inference cut of BatchTopK architectures, negative while it has not been calibrated; 0 of
            relu. [d_sae] of jumprelu, where negative ones act as 0. In float32 at least.
    """

    threshold: Tensor

    @own_defaults()
    def __init__(
        self,
        config: SAEConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        random: bool = True,
    ):
        super().__init__()
        check_kind("config", config, SAEConfig, "an SAEConfig; SAEConfig.sized(d_in) makes one")
        check_kind("dtype", dtype, torch.dtype, "a torch.dtype")
        device = resolve_device(device)
        self.config = config
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.W_enc = nn.Parameter(_empty(config, options).T)
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae, **options))
        self.W_dec = nn.Parameter(_empty(config, options))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in, **options))
        self.register_buffer("threshold", _first_threshold(config, device, dtype))
        if random:
            self.reset_parameters()

    @own_defaults()
    @torch.no_grad()
    def reset_parameters(self, seed: int = 0) -> None:
        """Random unit decoder rows, W_enc = W_dec^T, zero biases. Drawn on the CPU: one seed, one SAE on any device.

        ValueError: as `check_own_parameters`.
        """
        self.check_own_parameters()
        rows_SD = first_rows(self.config, seed).to(self.W_dec.device, self.W_dec.dtype)
        self.W_dec.copy_(rows_SD)
        self.W_enc.copy_(rows_SD.T)
        self.b_enc.zero_()
        self.b_dec.zero_()

    def check_own_parameters(self) -> None:
        """ValueError: one is made of others at every use, by torch's parametrize or prune: what is written is lost."""
        own = self._parameters | self._buffers
        made = [name for name in (*PARAMETERS, "threshold") if own.get(name) is None]
        require(not made, f"sae: {', '.join(made)} is parametrised or pruned; remove that first, as it is written to")

    def _make_weights(self) -> None:
        """Those of prune and of the older weight_norm, which make them where the module is called, and nowhere else."""
        for hook in self._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod | WeightNorm):
                hook(self, ())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseAutoencoder":
        """As of any module, but half(), to(bfloat16) and the like leave the threshold in float32 at least."""
        before = self._buffers.get("threshold")  # None of one that is parametrised
        super()._apply(fn, recurse)
        after = self._buffers.get("threshold")
        if before is not None and after is not None and torch.finfo(after.dtype).bits < 32:
            self._buffers["threshold"] = before.to(after.device, torch.promote_types(before.dtype, torch.float32))
        return self

    @classmethod
    @own_defaults()
    @torch.no_grad()
    def from_plain(
        cls, plain: PlainSAE, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> "SparseAutoencoder":
        """The SAE of a plain form, in eval mode. What was assumed of it is in metadata["doubts"].

        Args:
            plain: of any library. A batch_topk without a threshold was never calibrated: `encode` says so.
            device: of the SAE.
            dtype: of the SAE; that of W_enc if None.

        Raises:
            ValueError: k of topk that is above d_sae, weights that do not fit in memory.
        """
        config = config_of(plain)
        sae = cls(config, dtype=dtype or plain.W_enc.dtype, random=False)
        for name in PARAMETERS:
            getattr(sae, name).copy_(getattr(plain, name))
        if plain.threshold is not None and config.architecture != "relu":
            sae.threshold.copy_(plain.threshold.clamp(min=0))
        return sae.to(device).eval()

    def to_plain(self) -> PlainSAE:
        """The plain form, on the CPU and in the SAE's dtype. from_plain makes the same SAE of it."""
        self._make_weights()
        config = self.config
        metadata = dict(config.metadata)
        doubts, groups = metadata.pop("doubts", ()), metadata.pop("trained_group_sizes", ())
        nested = config.architecture == "matryoshka"
        calibrated = config.architecture in CALIBRATED and float(self.threshold) >= 0
        has_threshold = config.architecture == "jumprelu" or calibrated
        return PlainSAE(
            **{name: getattr(self, name).detach().cpu() for name in PARAMETERS},  # what a parametrisation makes of them
            activation=cast(Activation, "batch_topk" if nested else config.architecture),
            k=config.k,
            threshold=self.threshold.detach().cpu().clone() if has_threshold else None,
            input_norm=config.input_norm,
            eps=config.eps,
            group_sizes=config.group_sizes if nested else tuple(groups),
            metadata=metadata,
            doubts=tuple(doubts),
        )

    def extra_repr(self) -> str:
        config = self.config
        k = "" if config.k is None else f", k = {config.k}"
        norm = "" if config.input_norm == "none" else f", input_norm = {config.input_norm}"
        return f"{config.architecture}, {config.d_in} -> {config.d_sae}{k}{norm}"

    def encode(self, x: Tensor, use_threshold: bool | None = None) -> SparseCodes:
        """Sparse codes of x [..., d_in]: [..., k] of topk, in CSR form of the others.

        Args:
            x: activations [..., d_in] in raw units, any leading dimensions.
            use_threshold: BatchTopK architectures only. True: keep activations above `threshold`, each row by itself
                (inference). False: keep the B * k largest of this batch (training). None: True in eval mode.

        Raises:
            ValueError: a wrong last dimension, a threshold that was never calibrated, or a k that is not known.
        """
        self._make_weights()
        x = self._normalised(x)
        check_kind("use_threshold", use_threshold, (bool, type(None)), "true, false or None")
        weights = (x.reshape(-1, self.config.d_in), self.W_enc, self.b_enc, self.b_dec)
        shape = (*x.shape[:-1], self.config.d_sae)
        if self.config.architecture == "topk":
            k = self.config.known_k
            acts_BK, latents_BK = topk_encode(*weights, k)
            fixed = (*x.shape[:-1], k)
            return SparseCodes(acts_BK.view(fixed), latents_BK.view(fixed), None, shape)
        if self.config.architecture in ("relu", "jumprelu"):
            cut = self.threshold if self.config.architecture == "jumprelu" else 0.0
            return SparseCodes(*threshold_encode(*weights, cut), shape)
        if use_threshold is None:
            use_threshold = not self.training
        if not use_threshold:
            acts_M, latents_M, row_offsets = batch_topk_encode(*weights, self.config.known_k)
            return SparseCodes(acts_M, latents_M, row_offsets, shape)
        threshold = float(self.threshold)
        require(threshold >= 0, "threshold: not calibrated; train the SAE, or encode with use_threshold=False")
        acts_M, latents_M, row_offsets = threshold_encode(*weights, threshold)
        return SparseCodes(acts_M, latents_M, row_offsets, shape)

    @exactly
    def pre_activations(self, x: Tensor) -> Tensor:
        """What `encode` cuts: (n(x) - b_dec) W_enc + b_enc of all latents, [..., d_sae].

        n is the normalisation of the input, if the SAE has one. N * d_sae numbers: for small uses. torch's own product,
        which on a GPU has the precision that torch is set to there.

        Raises:
            ValueError: a wrong last dimension.
        """
        self._make_weights()
        return (self._normalised(x) - self.b_dec) @ self.W_enc + self.b_enc

    def _normalised(self, x: Tensor) -> Tensor:
        """n(x). ValueError: it is no tensor [..., d_in]."""
        x = self._checked(x)
        statistics = self._statistics(x)
        return x if statistics is None else (x - statistics.mean) / statistics.divisor

    def _checked(self, x: Tensor) -> Tensor:
        """x as kernels take it. ValueError: it is no tensor [..., d_in]."""
        check_kind("x", x, Tensor, f"a tensor [..., {self.config.d_in}]")
        check_dense("x", x)
        require(
            x.dim() >= 1 and x.shape[-1] == self.config.d_in,
            f"x: last dimension of {tuple(x.shape)} must be d_in = {self.config.d_in}",
        )
        require(x.device == self.b_dec.device, f"x: on {x.device}, the SAE is on {self.b_dec.device}")
        given, ours = (str(t.dtype).removeprefix("torch.") for t in (x, self.b_dec))
        require(given == ours, f"x: {given}, the SAE is {ours}; encode(x.to(sae.b_dec)) converts")
        return x.resolve_neg()  # kernels read the memory, where a lazy negative bit is not seen

    def input_statistics(self, x: Tensor) -> InputStatistics | None:
        """What `decode` needs to know of x [..., d_in], of an SAE whose input is normalised; None of others.

        Raises:
            ValueError: a wrong last dimension.
        """
        self._make_weights()
        return self._statistics(self._checked(x))

    def _statistics(self, x: Tensor) -> InputStatistics | None:
        if self.config.input_norm == "none":
            return None
        if self.config.input_norm == "layer_norm":
            mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
            return InputStatistics(mean, std + self.config.eps, std)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / self.config.d_in**0.5
        return InputStatistics(torch.zeros_like(norm), torch.where(norm == 0, 1, norm), norm)  # a row of zeros stays

    def decode(self, codes: SparseCodes, statistics: InputStatistics | None = None) -> Tensor:
        """Reconstruction [..., d_in] of sparse codes, in raw activation units: codes @ W_dec + b_dec.

        Args:
            codes: of `encode`.
            statistics: `input_statistics` of what was encoded, where the SAE normalises its input; not used otherwise.

        Raises:
            ValueError: they are needed and missing.
        """
        self._make_weights()
        check_kind("codes", codes, SparseCodes, "SparseCodes; encode(x) gives them")
        x_hat = sparse_decode(*codes.flat(), self.W_dec, self.b_dec).view(*codes.shape[:-1], self.config.d_in)
        return self._raw(x_hat, statistics)

    def decode_prefixes(self, codes: SparseCodes, statistics: InputStatistics | None = None) -> Tensor:
        """Matryoshka reconstructions [G, ..., d_in]: the g-th from the first g + 1 groups of latents alone.

        Args and Raises: as `decode`.
        """
        self._make_weights()
        x_hat_GBD = matryoshka_decode(*codes.flat(), self.W_dec, self.b_dec, self.config.group_ends)
        return self._raw(x_hat_GBD.view(len(x_hat_GBD), *codes.shape[:-1], self.config.d_in), statistics)

    def _raw(self, x_hat: Tensor, statistics: InputStatistics | None) -> Tensor:
        """n^-1 of a reconstruction."""
        check_kind("statistics", statistics, (InputStatistics, type(None)), "what input_statistics gives")
        if self.config.input_norm == "none":
            return x_hat
        require(
            statistics is not None,
            f"statistics: needed by an SAE whose input_norm is {self.config.input_norm}; input_statistics(x) has them",
        )
        assert statistics is not None
        return x_hat * statistics.scale + statistics.mean

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction of x [..., d_in], decode(encode(x)), in the shape of x. ValueError: as `encode`."""
        return self.decode(self.encode(x), self.input_statistics(x))

    @torch.no_grad()
    def scale_biases_(self, factor: float) -> None:
        """Move an SAE trained on x / factor to raw units: b_enc, b_dec and the threshold times factor.

        ValueError: the SAE normalises its input, whose units it does not see; and as `check_own_parameters`.
        """
        self.check_own_parameters()
        norm = self.config.input_norm
        require(norm == "none", f"input_norm: {norm}; biases are scaled where the input is not normalised")
        self.b_enc.mul_(factor)
        self.b_dec.mul_(factor)
        self.threshold.copy_(torch.where(self.threshold < 0, self.threshold, self.threshold * factor))

    def save_pretrained(self, directory: str | Path) -> None:
        """Write cfg.json and sae_weights.safetensors in the SAELens v6 layout, each atomically, the weights first.

        BatchTopK architectures become `jumprelu` with the scalar threshold repeated for every latent, as SAELens
        itself exports them; k, groups and everything else needed to come back is in `metadata`. cfg.json holds the
        weights' SHA-256 and its own.

        Raises:
            ValueError: a BatchTopK SAE whose threshold was never calibrated, weights that are not finite, a file in
                place of the directory. OSError: it cannot be written.
        """
        directory = path_of("directory", directory)
        require(directory.is_dir() or not directory.exists(), f"directory: {directory} is a file")
        sae_lens.write(self.to_plain(), directory)

    @classmethod
    @own_defaults()
    def from_pretrained(
        cls,
        path: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        *,
        trust_pickle: bool | Sequence[str] = False,
        assume: Mapping[str, Any] | None = None,
    ) -> "SparseAutoencoder":
        """Open an SAE of any known format (docs/formats.md), in eval mode.

        What other libraries do to inputs, latents and outputs is folded into the weights where that is exact, and is
        kept as `config.input_norm` where it is not. What files do not say and was assumed is warned of (errors.Doubt),
        and stands in metadata["doubts"].

        Args:
            path: a folder or a file; the format is told from it. Or `hf:user/repo[@revision][/sae_id]` or
                saelens:release/sae_id (formats/hub.py), whose repository and commit are then in metadata["hub"].
            device: of the SAE.
            dtype: of the SAE; the file's if None.
            trust_pickle: names of classes that a pickle may hold; they are read as data, nothing of them is run. True:
                whatever it holds.
            assume: what the files do not say: {"k": 32}, {"format": "openai"}, {"input_mean": "mean.npy", "input_std":
                2.5}; keys are those of formats.source.ASSUMPTIONS.

        Raises:
            ValueError: a missing, damaged, altered or inconsistent file, files of no known format, or an architecture
                this engine does not have.
        """
        device = resolve_device(device)
        check_kind("dtype", dtype, (torch.dtype, type(None)), "a torch.dtype")
        check_kind("assume", assume, (Mapping, type(None)), "a mapping")
        local = resolve(path)
        plain = registry.read(local.path, trust_pickle=trust_pickle, assume={**local.assume, **(assume or {})})
        for each in plain.doubts:
            doubt(each)
        sae = cls.from_plain(plain, device, dtype)
        return sae if local.repo is None else with_metadata(sae, hub=local.record())


def first_rows(config: SAEConfig, seed: int) -> Tensor:
    """The decoder rows that a seed begins with: random unit rows [d_sae, d_in], float64 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    rows_SD = torch.randn(config.d_sae, config.d_in, generator=generator, dtype=torch.float64)
    rows_SD /= rows_SD.norm(dim=1, keepdim=True)
    return rows_SD


def check_sae(sae: object, name: str = "sae") -> None:
    """ValueError: it is none."""
    check_kind(name, sae, SparseAutoencoder, "a SparseAutoencoder; from_pretrained(DIR) opens one")


@torch.no_grad()
def inferred(sae: SparseAutoencoder, x: Tensor) -> SparseCodes:
    """Codes of inference of x [..., d_in], on the SAE's device and in its dtype. ValueError: as its `encode`.

    The SAE's mode is left alone, as several threads may use it, and decides nothing unless a subclass goes by it.
    """
    sae._make_weights()
    x = x.to(sae.b_dec)
    return sae.encode(x, use_threshold=True) if sae.config.architecture in CALIBRATED else sae.encode(x)


def _first_threshold(config: SAEConfig, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Where it starts: not calibrated, none, or that of every latent before training (dictionary_learning's)."""
    wide = torch.promote_types(dtype, torch.float32)
    if config.architecture != "jumprelu":
        return torch.tensor(0.0 if config.architecture == "relu" else -1.0, device=device, dtype=wide)
    return torch.full((config.d_sae,), FIRST_THRESHOLD, device=device, dtype=wide)


def _empty(config: SAEConfig, options: dict[str, Any]) -> Tensor:
    """Of the decoder's shape."""
    try:
        return torch.empty(config.d_sae, config.d_in, **options)
    except (RuntimeError, MemoryError):  # torch's kinds of it; the sizes themselves are sound
        n_bytes = config.d_sae * config.d_in * options["dtype"].itemsize
        message = f"d_sae: an SAE of {config.d_in} x {config.d_sae} has twice {n_bytes / 1e9:.1f} GB of weights"
        raise ValueError(f"{message}, which do not fit in memory") from None


def with_metadata(sae: SparseAutoencoder, **metadata: Any) -> SparseAutoencoder:
    """The same SAE with more metadata (set in place, the module is returned)."""
    sae.config = replace(sae.config, metadata={**sae.config.metadata, **metadata})
    return sae

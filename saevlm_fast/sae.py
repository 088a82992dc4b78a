"""The SAE module: encode to sparse codes, decode, save and load in the SAELens v6 layout.

An SAE directory is that of SAELens: `sae_weights.safetensors`, and `cfg.json` with two entries more, which SAELens
drops when it reads and writes one: "weights_sha256", the SHA-256 of the weights' file, and "sha256", the seal of
cfg.json (records.py). Both are compared when an SAE is loaded; files of SAELens, and older ones of ours, have neither.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from saevlm_fast import __version__
from saevlm_fast.config import Architecture, SAEConfig
from saevlm_fast.errors import first_line, require
from saevlm_fast.files import save_safetensors_atomic, sha256_file
from saevlm_fast.formats.plain import Activation, PlainSAE
from saevlm_fast.kernels.sparse_decode import matryoshka_decode, sparse_decode
from saevlm_fast.kernels.topk_encode import batch_topk_encode, threshold_encode, topk_encode
from saevlm_fast.records import (
    DIGEST,
    FLAG,
    NUMBER,
    RECORD,
    TEXT,
    Each,
    Fields,
    check_record,
    optional,
    read_record,
    whole,
    write_record,
)
from saevlm_fast.sparse_codes import SparseCodes

WEIGHTS_FILE, CONFIG_FILE = "sae_weights.safetensors", "cfg.json"
SAE_LENS_LAYOUT = "6.0.0"  # the SAELens release whose file layout is written; older versions are converted on load
WEIGHTS_DIGEST = "weights_sha256"
FIRST_THRESHOLD = 0.001  # of jumprelu, in the units of training

_SIZE = whole(1, (1 << 31) - 1)
_CONFIG = Fields(
    {"architecture": TEXT, "d_in": _SIZE, "d_sae": _SIZE},
    {
        "k": optional(NUMBER),
        "metadata": optional(RECORD),
        "apply_b_dec_to_input": FLAG,
        "rescale_acts_by_decoder_norm": FLAG,
        "normalize_activations": optional(TEXT),
        "reshape_activations": optional(TEXT),
        WEIGHTS_DIGEST: DIGEST,
    },
)
# What their trainers leave in the metadata of a BatchTopK SAE, which is a jumprelu SAE once it is saved.
_TRAINING_DETAILS = Fields({}, {"k": optional(NUMBER), "matryoshka_widths": Each(_SIZE)})
_METADATA = Fields({}, {"architecture": TEXT, "k": optional(NUMBER), "group_sizes": Each(_SIZE)})
_SAE_LENS_NAMES = {"topk": "topk", "relu": "standard"}
_SAE_LENS_NORMS = {"none": "none", "layer_norm": "layer_norm", "token_norm": "constant_norm_rescale"}
_TRAINED_AS = {"topk": "topk", "batchtopk": "batch_topk", "matryoshka_batchtopk": "matryoshka"}


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
        b_enc: [d_sae]. W_dec: [d_sae, d_in], unit rows. b_dec: [d_in].
        threshold: scalar, the inference cut of BatchTopK architectures, negative while it has not been calibrated; 0 of
            relu. [d_sae] of jumprelu, where negative ones act as 0.
    """

    threshold: Tensor

    def __init__(
        self,
        config: SAEConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        random: bool = True,
    ):
        super().__init__()
        self.config = config
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.W_enc = nn.Parameter(_empty(config, options).T)
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae, **options))
        self.W_dec = nn.Parameter(_empty(config, options))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in, **options))
        self.register_buffer("threshold", _first_threshold(config, device, dtype))
        if random:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, seed: int = 0) -> None:
        """Random unit decoder rows, W_enc = W_dec^T, zero biases. Drawn on the CPU: one seed, one SAE on any device."""
        generator = torch.Generator().manual_seed(seed)
        rows_SD = torch.randn(self.config.d_sae, self.config.d_in, generator=generator, dtype=torch.float64)
        rows_SD /= rows_SD.norm(dim=1, keepdim=True)
        self.W_dec.copy_(rows_SD)
        self.W_enc.copy_(rows_SD.T)
        self.b_enc.zero_()
        self.b_dec.zero_()

    @classmethod
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
        groups = plain.group_sizes if len(plain.group_sizes) > 1 else ()
        nested = plain.activation == "batch_topk" and bool(groups)
        metadata = dict(plain.metadata) | ({"doubts": list(plain.doubts)} if plain.doubts else {})
        if groups and not nested:  # of training alone: all latents are used at once
            metadata["trained_group_sizes"] = list(groups)
        architecture: Architecture = "matryoshka" if nested else plain.activation
        config = SAEConfig(
            plain.d_in,
            plain.d_sae,
            plain.k,
            architecture,
            groups if nested else (),
            metadata,
            plain.input_norm,
            plain.eps,
        )
        sae = cls(config, dtype=dtype or plain.W_enc.dtype, random=False)
        for name, parameter in sae.named_parameters():
            parameter.copy_(getattr(plain, name))
        if plain.threshold is not None and architecture != "relu":
            sae.threshold.copy_(plain.threshold.clamp(min=0))
        return sae.to(device).eval()

    def to_plain(self) -> PlainSAE:
        """The plain form, on the CPU and in the SAE's dtype. from_plain makes the same SAE of it."""
        config = self.config
        metadata = dict(config.metadata)
        doubts, groups = metadata.pop("doubts", ()), metadata.pop("trained_group_sizes", ())
        nested = config.architecture == "matryoshka"
        calibrated = config.architecture in ("batch_topk", "matryoshka") and float(self.threshold) >= 0
        has_threshold = config.architecture == "jumprelu" or calibrated
        return PlainSAE(
            **{name: parameter.detach().cpu() for name, parameter in self.named_parameters()},
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
        x = self._checked(x)
        statistics = self._statistics(x)
        if statistics is not None:
            x = (x - statistics.mean) / statistics.divisor
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

    def _checked(self, x: Tensor) -> Tensor:
        """x as kernels take it. ValueError: it is no tensor [..., d_in]."""
        if not isinstance(x, Tensor):
            raise ValueError(f"x: {type(x).__name__} is not a tensor [..., {self.config.d_in}]")
        require(
            x.dim() >= 1 and x.shape[-1] == self.config.d_in,
            f"x: last dimension of {tuple(x.shape)} must be d_in = {self.config.d_in}",
        )
        return x.resolve_neg()  # kernels read the memory, where a lazy negative bit is not seen

    def input_statistics(self, x: Tensor) -> InputStatistics | None:
        """What `decode` needs to know of x [..., d_in], of an SAE whose input is normalised; None of others.

        Raises:
            ValueError: a wrong last dimension.
        """
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
        x_hat = sparse_decode(*codes.flat(), self.W_dec, self.b_dec).view(*codes.shape[:-1], self.config.d_in)
        return self._raw(x_hat, statistics)

    def decode_prefixes(self, codes: SparseCodes, statistics: InputStatistics | None = None) -> Tensor:
        """Matryoshka reconstructions [G, ..., d_in]: the g-th from the first g + 1 groups of latents alone.

        Args and Raises: as `decode`.
        """
        x_hat_GBD = matryoshka_decode(*codes.flat(), self.W_dec, self.b_dec, self.config.group_ends)
        return self._raw(x_hat_GBD.view(len(x_hat_GBD), *codes.shape[:-1], self.config.d_in), statistics)

    def _raw(self, x_hat: Tensor, statistics: InputStatistics | None) -> Tensor:
        """n^-1 of a reconstruction."""
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

        ValueError: the SAE normalises its input, whose units it does not see.
        """
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
            ValueError: a BatchTopK SAE whose threshold was never calibrated. OSError: it cannot be written.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in self.named_parameters()}
        if self.config.architecture == "jumprelu":
            tensors["threshold"] = self.threshold.detach().cpu().clamp(min=0)
        elif self.config.architecture in ("batch_topk", "matryoshka"):
            require(float(self.threshold) >= 0, "threshold: not calibrated; a BatchTopK SAE cannot be saved without it")
            tensors["threshold"] = self.threshold.detach().cpu().expand(self.config.d_sae).contiguous()
        save_safetensors_atomic(directory / WEIGHTS_FILE, tensors)
        digest = {WEIGHTS_DIGEST: sha256_file(directory / WEIGHTS_FILE)}
        write_record(directory / CONFIG_FILE, _sae_lens_config(self) | digest)

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> "SparseAutoencoder":
        """Load an SAE in the SAELens v6 layout, ours or theirs, in eval mode.

        Their `topk` SAEs, and `jumprelu` SAEs with a single threshold and k in their metadata, or among the details of
        their training there (BatchTopK and Matryoshka), are accepted; settings that are an exact change of weights
        (rescale_acts_by_decoder_norm, apply_b_dec_to_input = false) are folded in.

        Args:
            directory: with cfg.json and sae_weights.safetensors. device, dtype: of the SAE; the file's dtype if None.

        Raises:
            ValueError: a missing, damaged, altered or inconsistent file, or an architecture this engine does not have.
        """
        directory = Path(directory)
        cfg = _read_config(directory / CONFIG_FILE)
        tensors = _read_weights(directory / WEIGHTS_FILE, cfg.get(WEIGHTS_DIGEST))
        config = _config_from_sae_lens(cfg, tensors, directory)
        _check_shapes(config, tensors, directory / WEIGHTS_FILE)
        sae = cls(config, dtype=dtype or tensors["W_enc"].dtype, random=False)
        sae.load_tensors_(_fold_settings(cfg, tensors, directory), directory)
        return sae.to(device).eval()

    @torch.no_grad()
    def load_tensors_(self, tensors: dict[str, Tensor], origin: str | Path) -> None:
        """Copy named tensors of the right shapes into the parameters and the threshold."""
        for name, parameter in self.named_parameters():
            parameter.copy_(tensors[name])
        if self.config.architecture == "jumprelu":
            self.threshold.copy_(tensors["threshold"])
        elif self.config.architecture in ("batch_topk", "matryoshka"):
            values = tensors["threshold"].flatten()
            require(
                bool((values == values[0]).all()),
                f"{origin}: threshold differs between latents ({float(values.min()):g} to {float(values.max()):g}); "
                "only a single threshold (BatchTopK) is supported",
            )
            self.threshold.copy_(values[0])


def _check_shapes(config: SAEConfig, tensors: dict[str, Tensor], path: Path) -> None:
    """Before anything of that size is allocated."""
    d_in, d_sae = config.d_in, config.d_sae
    expected = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    if config.architecture in ("batch_topk", "matryoshka", "jumprelu"):
        expected["threshold"] = (d_sae,)
    for name, shape in expected.items():
        found = tuple(tensors[name].shape)
        require(found == shape, f"{path}: {name} has shape {found}, expected {shape}")


class SAEHeader(NamedTuple):
    """What an SAE directory says without its weights being read; threshold is None for `topk`.

    weights_sha256: what cfg.json says of the weights' file, if it says it.
    """

    config: SAEConfig
    dtype: str
    threshold: float | None
    weights_sha256: str | None


def read_sae_header(directory: str | Path) -> SAEHeader:
    """The header of an SAE that from_pretrained loads. ValueError: files that are missing, damaged or inconsistent."""
    directory = Path(directory)
    cfg, weights = _read_config(directory / CONFIG_FILE), directory / WEIGHTS_FILE
    require(weights.is_file(), f"{weights}: no such file; an SAE directory holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        with safe_open(weights, framework="pt") as file:
            tensors: dict[str, Any] = dict.fromkeys(file.keys())
            _check_names(set(tensors), weights)
            dtype = str(file.get_slice("W_enc")[:0].dtype).removeprefix("torch.")
            threshold = float(file.get_slice("threshold")[:1]) if "threshold" in tensors else None
    except _NOT_SAFETENSORS as error:
        raise ValueError(f"{weights}: not a complete safetensors file ({first_line(error)})") from None
    return SAEHeader(_config_from_sae_lens(cfg, tensors, directory), dtype, threshold, cfg.get(WEIGHTS_DIGEST))


def sae_digest(directory: Path) -> str:
    """SHA-256 of an SAE's files, as stores of its codes record it."""
    digests = [sha256_file(directory / name) for name in (CONFIG_FILE, WEIGHTS_FILE)]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


@contextmanager
def evaluating(sae: SparseAutoencoder) -> Iterator[SparseAutoencoder]:
    """The SAE in eval mode without gradients, its mode restored afterwards."""
    was_training = sae.training
    sae.eval()
    try:
        with torch.no_grad():
            yield sae
    finally:
        sae.train(was_training)


def _sae_lens_config(sae: SparseAutoencoder) -> dict[str, Any]:
    config = sae.config
    ours = {
        "sae_lens_version": SAE_LENS_LAYOUT,
        "sae_lens_training_version": None,
        "saevlm_fast_version": __version__,
        "architecture": config.architecture,
        "k": config.k,
        "group_sizes": list(config.group_sizes),
    }
    cfg: dict[str, Any] = {
        "architecture": _SAE_LENS_NAMES.get(config.architecture, "jumprelu"),
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": str(sae.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": _SAE_LENS_NORMS[config.input_norm],
        "reshape_activations": "none",
        "metadata": {**config.metadata, **ours},
    }
    if config.input_norm == "layer_norm":
        cfg["metadata"]["eps"] = config.eps
    if config.architecture == "topk":
        cfg |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    return cfg


def _first_threshold(config: SAEConfig, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Where it starts: not calibrated, none, or that of every latent before training (dictionary_learning's)."""
    if config.architecture != "jumprelu":
        return torch.tensor(0.0 if config.architecture == "relu" else -1.0, device=device, dtype=torch.float32)
    wide = torch.promote_types(dtype, torch.float32)
    return torch.full((config.d_sae,), FIRST_THRESHOLD, device=device, dtype=wide)


def _empty(config: SAEConfig, options: dict[str, Any]) -> Tensor:
    """Of the decoder's shape."""
    try:
        return torch.empty(config.d_sae, config.d_in, **options)
    except (RuntimeError, MemoryError):  # torch's kinds of it; the sizes themselves are sound
        n_bytes = config.d_sae * config.d_in * options["dtype"].itemsize
        message = f"d_sae: an SAE of {config.d_in} x {config.d_sae} has twice {n_bytes / 1e9:.1f} GB of weights"
        raise ValueError(f"{message}, which do not fit in memory") from None


def _read_config(path: Path) -> dict[str, Any]:
    require(path.is_file(), f"{path}: no such file; an SAE directory holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    cfg = read_record(path, _CONFIG, beside_seal=WEIGHTS_DIGEST)
    check_record(cfg.get("metadata") or {}, _METADATA, f"{path}: metadata", ValueError)
    return cfg


_NOT_SAFETENSORS = (SafetensorError, KeyError, TypeError, AttributeError, RuntimeError)


def _read_weights(path: Path, digest: str | None) -> dict[str, Tensor]:
    require(path.is_file(), f"{path}: no such file; an SAE directory holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    require(
        digest is None or sha256_file(path) == digest,
        f"{path}: altered, its SHA-256 is not the {WEIGHTS_DIGEST} in {CONFIG_FILE}",
    )
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            _check_names(names, path)
            tensors = {name: file.get_tensor(name) for name in _TENSORS if name in names}
    except _NOT_SAFETENSORS as error:
        raise ValueError(f"{path}: not a complete safetensors file ({first_line(error)})") from None
    for name, tensor in tensors.items():
        require(tensor.is_floating_point(), f"{path}: {name} is {tensor.dtype}, not floating point")
        require(tensor.dtype.itemsize > 1, f"{path}: {name} is {tensor.dtype}; at least 16 bits are needed")
        require(bool(tensor.isfinite().all()), f"{path}: {name} holds NaN or inf")
    return tensors


_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


def _check_names(names: set[str], path: Path) -> None:
    for name in _TENSORS[:4]:
        require(name in names, f"{path}: tensor {name!r} is missing (found {', '.join(sorted(names))})")


def _config_from_sae_lens(cfg: dict[str, Any], tensors: dict[str, Tensor], directory: Path) -> SAEConfig:
    metadata = dict(cfg.get("metadata") or {})
    details = metadata.get("training_architecture_details") or {}
    check_record(details, _TRAINING_DETAILS, f"{directory / CONFIG_FILE}: training_architecture_details", ValueError)
    architecture = metadata.get("architecture") or _TRAINED_AS.get(str(metadata.get("training_architecture")))
    architecture = architecture or {"topk": "topk", "jumprelu": "batch_topk", "standard": "relu"}.get(
        cfg["architecture"]
    )
    require(
        cfg["architecture"] in ("topk", "jumprelu", "standard") and architecture is not None,
        f"{directory}: architecture {cfg['architecture']!r} is not one of topk, jumprelu, standard",
    )
    require(
        (cfg["architecture"] == "topk") == (architecture == "topk"),
        f"{directory}: architecture {cfg['architecture']!r} contradicts {architecture!r} in its metadata",
    )
    require(
        cfg["architecture"] != "jumprelu" or "threshold" in tensors,
        f"{directory}: tensor 'threshold' is missing from a jumprelu SAE",
    )
    ours = ("architecture", "k", "group_sizes", "sae_lens_version", "sae_lens_training_version", "saevlm_fast_version")
    k = metadata.get("k")
    if k is not None or architecture not in ("relu", "jumprelu"):
        k = _latents_per_row([k, cfg.get("k"), details.get("k")], directory)
    group_sizes = metadata.get("group_sizes")
    if group_sizes is None and architecture == "matryoshka":
        group_sizes = _groups_of_widths(details.get("matryoshka_widths") or [], cfg["d_sae"])
    try:
        return SAEConfig(
            d_in=cfg["d_in"],
            d_sae=cfg["d_sae"],
            k=k,
            architecture=cast(Architecture, architecture),
            group_sizes=tuple(group_sizes or ()),
            metadata={key: value for key, value in metadata.items() if key not in ours},
        )
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG_FILE}: {error}") from None


def _latents_per_row(candidates: list[Any], directory: Path) -> int:
    """The first k that is given: SAELens may have a fraction of a latent, on average, which nothing here has."""
    k = next((value for value in candidates if value is not None), None)
    require(k is not None, f"{directory}: neither cfg.json nor its metadata say k")
    require(k == int(k or 0), f"{directory}: k is {k}; write a whole number to metadata.k in {CONFIG_FILE}")
    return int(k or 0)


def _groups_of_widths(widths: list[int], d_sae: int) -> list[int]:
    """Sizes of groups from where SAELens says that they end; it adds the last end itself."""
    ends = [*widths, d_sae] if not widths or widths[-1] < d_sae else widths
    return [end - start for start, end in zip([0, *ends], ends)]


def _fold_settings(cfg: dict[str, Any], tensors: dict[str, Tensor], directory: Path) -> dict[str, Tensor]:
    """Settings of SAELens that are an exact change of weights, applied to the weights."""
    for key in ("normalize_activations", "reshape_activations"):
        require(cfg.get(key, "none") == "none", f"{directory}: {key} = {cfg.get(key)!r} is not supported, only 'none'")
    tensors = dict(tensors)
    if cfg["architecture"] == "topk" and cfg.get("rescale_acts_by_decoder_norm", False):
        norm_S = tensors["W_dec"].norm(dim=1)
        tensors["W_enc"], tensors["b_enc"] = tensors["W_enc"] * norm_S, tensors["b_enc"] * norm_S
        tensors["W_dec"] = tensors["W_dec"] / norm_S[:, None]
    if not cfg.get("apply_b_dec_to_input", True):
        tensors["b_enc"] = tensors["b_enc"] + tensors["b_dec"] @ tensors["W_enc"]
    return tensors


def with_metadata(sae: SparseAutoencoder, **metadata: Any) -> SparseAutoencoder:
    """The same SAE with more metadata (set in place, the module is returned)."""
    sae.config = replace(sae.config, metadata={**sae.config.metadata, **metadata})
    return sae

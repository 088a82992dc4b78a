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
from saevlm_fast.formats.hub import resolve
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
_TRAINED_AS = {"topk": "topk", "batchtopk": "batch_topk", "matryoshka_batchtopk": "matryoshka"}


class SparseAutoencoder(nn.Module):
    """x -> relu((x - b_dec) @ W_enc + b_enc), the largest kept -> codes @ W_dec + b_dec.

    Section 3 of arXiv 2504.02821; docs/recipe.md section 1. x is in raw activation units once it is trained.

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
        threshold: scalar; the inference cut of BatchTopK architectures; negative while it has not been calibrated.
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
        self.register_buffer("threshold", torch.tensor(-1.0, device=device, dtype=torch.float32))
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

    def extra_repr(self) -> str:
        config = self.config
        return f"{config.architecture}, {config.d_in} -> {config.d_sae}, k = {config.k}"

    def encode(self, x: Tensor, use_threshold: bool | None = None) -> SparseCodes:
        """Sparse codes of x [..., d_in].

        Args:
            x: activations [..., d_in] in raw units, any leading dimensions.
            use_threshold: BatchTopK architectures only. True: keep activations above `threshold`, each row by itself
                (inference). False: keep the B * k largest of this batch (training). None: True in eval mode.

        Raises:
            ValueError: a wrong last dimension, or a threshold that was never calibrated.
        """
        if not isinstance(x, Tensor):
            raise ValueError(f"x: {type(x).__name__} is not a tensor [..., {self.config.d_in}]")
        require(
            x.dim() >= 1 and x.shape[-1] == self.config.d_in,
            f"x: last dimension of {tuple(x.shape)} must be d_in = {self.config.d_in}",
        )
        x = x.resolve_neg()  # kernels read the memory, where a lazy negative bit is not seen
        weights = (x.reshape(-1, self.config.d_in), self.W_enc, self.b_enc, self.b_dec)
        shape = (*x.shape[:-1], self.config.d_sae)
        if self.config.architecture == "topk":
            acts_BK, latents_BK = topk_encode(*weights, self.config.k)
            fixed = (*x.shape[:-1], self.config.k)
            return SparseCodes(acts_BK.view(fixed), latents_BK.view(fixed), None, shape)
        if use_threshold is None:
            use_threshold = not self.training
        if not use_threshold:
            acts_M, latents_M, row_offsets = batch_topk_encode(*weights, self.config.k)
            return SparseCodes(acts_M, latents_M, row_offsets, shape)
        threshold = float(self.threshold)
        require(threshold >= 0, "threshold: not calibrated; train the SAE, or encode with use_threshold=False")
        acts_M, latents_M, row_offsets = threshold_encode(*weights, threshold)
        return SparseCodes(acts_M, latents_M, row_offsets, shape)

    def decode(self, codes: SparseCodes) -> Tensor:
        """Reconstruction [..., d_in] of sparse codes, in raw activation units: codes @ W_dec + b_dec."""
        return sparse_decode(*codes.flat(), self.W_dec, self.b_dec).view(*codes.shape[:-1], self.config.d_in)

    def decode_prefixes(self, codes: SparseCodes) -> Tensor:
        """Matryoshka reconstructions [G, ..., d_in]: the g-th from the first g + 1 groups of latents alone."""
        x_hat_GBD = matryoshka_decode(*codes.flat(), self.W_dec, self.b_dec, self.config.group_ends)
        return x_hat_GBD.view(len(x_hat_GBD), *codes.shape[:-1], self.config.d_in)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction of x [..., d_in], decode(encode(x)), in the shape of x. ValueError: as `encode`."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def scale_biases_(self, factor: float) -> None:
        """Move an SAE trained on x / factor to raw units: b_enc, b_dec and the threshold times factor."""
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
        if self.config.architecture != "topk":
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
            directory: with cfg.json and sae_weights.safetensors; or hf:user/repo[@revision][/sae_id] or
                saelens:release/sae_id (formats/hub.py), whose repository and commit are then in metadata["hub"].
            device, dtype: of the SAE; the file's dtype if None.

        Raises:
            ValueError: a missing, damaged, altered or inconsistent file, or an architecture this engine does not have.
        """
        local = resolve(directory)
        directory = local.path
        cfg = _read_config(directory / CONFIG_FILE)
        tensors = _read_weights(directory / WEIGHTS_FILE, cfg.get(WEIGHTS_DIGEST))
        config = _config_from_sae_lens(cfg, tensors, directory)
        _check_shapes(config, tensors, directory / WEIGHTS_FILE)
        sae = cls(config, dtype=dtype or tensors["W_enc"].dtype, random=False)
        sae.load_tensors_(_fold_settings(cfg, tensors, directory), directory)
        if local.repo is not None:
            with_metadata(sae, hub=local.record())
        return sae.to(device).eval()

    @torch.no_grad()
    def load_tensors_(self, tensors: dict[str, Tensor], origin: str | Path) -> None:
        """Copy named tensors of the right shapes into the parameters and the threshold."""
        for name, parameter in self.named_parameters():
            parameter.copy_(tensors[name])
        if self.config.architecture != "topk":
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
    if config.architecture != "topk":
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
    directory = resolve(directory).path
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


def sae_digest(directory: str | Path) -> str:
    """SHA-256 of an SAE's files, as stores of its codes record it."""
    directory = resolve(directory).path
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
        "architecture": "topk" if config.architecture == "topk" else "jumprelu",
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": str(sae.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {**config.metadata, **ours},
    }
    if config.architecture == "topk":
        cfg |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    return cfg


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
    architecture = architecture or {"topk": "topk", "jumprelu": "batch_topk"}.get(cfg["architecture"])
    require(
        cfg["architecture"] in ("topk", "jumprelu") and architecture is not None,
        f"{directory}: architecture {cfg['architecture']!r} is not one of topk, jumprelu",
    )
    require(
        (cfg["architecture"] == "topk") == (architecture == "topk"),
        f"{directory}: architecture {cfg['architecture']!r} contradicts {architecture!r} in its metadata",
    )
    require(
        cfg["architecture"] == "topk" or "threshold" in tensors,
        f"{directory}: tensor 'threshold' is missing from a jumprelu SAE",
    )
    ours = ("architecture", "k", "group_sizes", "sae_lens_version", "sae_lens_training_version", "saevlm_fast_version")
    group_sizes = metadata.get("group_sizes")
    if group_sizes is None and architecture == "matryoshka":
        group_sizes = _groups_of_widths(details.get("matryoshka_widths") or [], cfg["d_sae"])
    try:
        return SAEConfig(
            d_in=cfg["d_in"],
            d_sae=cfg["d_sae"],
            k=_latents_per_row([metadata.get("k"), cfg.get("k"), details.get("k")], directory),
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

"""SAELens: SAE_ID/{cfg.json, sae_weights.safetensors}, of release 6 and of those before; also our own SAEs.

Ours have two entries more in cfg.json, which SAELens drops when it reads and writes one: "weights_sha256", the SHA-256
of the weights' file, and "sha256", the seal of cfg.json (records.py). Both are compared when an SAE is read; files of
SAELens, and older ones of ours, have neither.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from saevlm_fast import __version__
from saevlm_fast.errors import require
from saevlm_fast.files import save_safetensors_atomic, sha256_file
from saevlm_fast.formats.header import Header, range_of
from saevlm_fast.formats.plain import PARAMETERS, Activation, InputNorm, PlainSAE, gated
from saevlm_fast.formats.source import Source, floats
from saevlm_fast.records import (
    DIGEST,
    FLAG,
    NUMBER,
    RECORD,
    TEXT,
    Each,
    Fields,
    Kind,
    check_record,
    optional,
    read_record,
    whole,
    write_record,
)

NAME, FILES = "saelens", "cfg.json and sae_weights.safetensors"
WEIGHTS_FILE, CONFIG_FILE = "sae_weights.safetensors", "cfg.json"
SCALER_FILE, WHITENING_FILE = "activation_scaler.json", "activation_whitening.safetensors"
LAYOUT = "6.0.0"  # the SAELens release whose file layout is written; older versions are converted on load
WEIGHTS_DIGEST = "weights_sha256"

_SIZE = whole(1, (1 << 31) - 1)
_NORM = Kind("a string, true, false or null", lambda value: value is None or isinstance(value, str | bool))
_CONFIG = Fields(
    {"d_in": _SIZE, "d_sae": _SIZE},
    {
        "architecture": TEXT,
        "k": optional(NUMBER),
        "metadata": optional(RECORD),
        "apply_b_dec_to_input": FLAG,
        "rescale_acts_by_decoder_norm": FLAG,
        "normalize_activations": _NORM,
        "reshape_activations": optional(TEXT),
        "activation_fn": TEXT,
        "activation_fn_str": TEXT,
        "activation_fn_kwargs": optional(RECORD),
        "finetuning_scaling_factor": optional(FLAG),
        WEIGHTS_DIGEST: DIGEST,
    },
)
# What their trainers leave in the metadata of a BatchTopK SAE, which is a jumprelu SAE once it is saved.
_TRAINING_DETAILS = Fields({}, {"k": optional(NUMBER), "matryoshka_widths": Each(_SIZE)})
_METADATA = Fields(
    {}, {"architecture": TEXT, "k": optional(NUMBER), "group_sizes": Each(_SIZE), "eps": NUMBER, "doubts": Each(TEXT)}
)
_SCALER = Fields({}, {"scaling_factor": optional(NUMBER), "has_whitening": FLAG})
_LAYOUT_OF = {"topk": "topk", "batch_topk": "jumprelu", "matryoshka": "jumprelu", "jumprelu": "jumprelu"}
_LAYOUT_OF |= {"relu": "standard"}  # our architecture -> theirs
_NORMS: dict[str, InputNorm] = {"layer_norm": "layer_norm", "constant_norm_rescale": "token_norm"}
_FOLDED_NORMS = ("none", "expected_average_only_in", "covariance_whitening")
_TENSORS = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
    "batchtopk": ("b_enc", "topk_threshold"),
    "matryoshka_batchtopk": ("b_enc", "topk_threshold"),
}
_IGNORED = {"scaling_factor": "", "b_enc": "gated"}  # tensors without a use -> the architecture, of all if ""
_REFUSED = {
    "abstopk": "its top k is by absolute value, and latents are negative too",
    "transcoder": "its output is another site than its input",
    "skip_transcoder": "its output is another site than its input",
    "jumprelu_transcoder": "its output is another site than its input",
    "jumprelu_skip_transcoder": "its output is another site than its input",
    "temporal": "its latents depend on other tokens",
    "matching_pursuit": "its latents are found one after the other",
}
_RENAMED = {"activation_fn_str": "activation_fn", "hook_point": "hook_name", "hook_point_layer": "hook_layer"}
_RENAMED |= {"hook_point_head_index": "hook_head_index"}
_OF_THE_MODEL = ("model_name", "hook_name", "hook_layer", "hook_head_index", "dataset_path", "context_size")
# Entries of metadata that our writer makes, and that are no metadata of the SAE.
_OURS = {"architecture", "k", "group_sizes", "eps", "doubts"}
_OURS |= {"sae_lens_version", "sae_lens_training_version", "saevlm_fast_version"}


def detect(source: Source) -> bool:
    """From the names of its files."""
    return source.has(CONFIG_FILE, WEIGHTS_FILE)


# Reading --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What cfg.json says, and the names and shapes of the tensors."""

    cfg: dict[str, Any]
    metadata: dict[str, Any]
    details: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    where: Path

    @property
    def architecture(self) -> str:
        """Theirs."""
        return str(self.cfg["architecture"])


def read(source: Source) -> PlainSAE:
    """The SAE with all that is an exact change of weights done; layer_norm and token_norm of inputs are kept.

    Raises:
        ValueError: missing, damaged, altered or inconsistent files; an architecture that no SAE of ours has.
    """
    settings = _settings(source)
    tensors = _tensors(settings, source)
    cfg, norm = settings.cfg, settings.cfg["normalize_activations"]
    plain = _plain(settings, tensors)
    if not cfg["apply_b_dec_to_input"]:
        plain = plain.without_pre_bias()
    if cfg["rescale_acts_by_decoder_norm"]:
        plain = plain.scaled_by_decoder_norms()
    if "scaling_factor" in settings.shapes and cfg.get("finetuning_scaling_factor"):
        factor = floats(source.load(WEIGHTS_FILE), source.at(WEIGHTS_FILE), scaling_factor=(plain.d_sae,))
        plain = plain.with_scaled_latents(factor["scaling_factor"])
    return _of_scaled_input(plain, norm, source)


def header(source: Source) -> Header:
    """What is known without the weights being read.

    Raises:
        ValueError: as `read`, but for what the weights hold.
    """
    settings = _settings(source)
    name = _threshold_name(settings)
    threshold = None if name is None else _threshold(settings, {name: source.tensor(WEIGHTS_FILE, name)})
    described = _described(settings, threshold)
    described["doubts"] += _doubt_of_scale(settings.cfg["normalize_activations"], source)
    return Header(
        d_in=settings.cfg["d_in"],
        d_sae=settings.cfg["d_sae"],
        **described,
        dtype=source.dtype(WEIGHTS_FILE, "W_enc"),
        thresholds=range_of(threshold),
        weights_sha256=settings.cfg.get(WEIGHTS_DIGEST),
    )


def _settings(source: Source) -> Settings:
    config, weights = source.at(CONFIG_FILE), source.at(WEIGHTS_FILE)
    for path in (config, weights):
        require(path.is_file(), f"{path}: no such file; an SAE directory holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    cfg = read_record(config, _CONFIG, beside_seal=WEIGHTS_DIGEST)
    source.opened |= {CONFIG_FILE, WEIGHTS_FILE}
    metadata = dict(cfg.get("metadata") or {})
    check_record(metadata, _METADATA, f"{config}: metadata", ValueError)
    details = metadata.get("training_architecture_details") or {}
    check_record(details, _TRAINING_DETAILS, f"{config}: training_architecture_details", ValueError)
    cfg, metadata = _modern(cfg, metadata, config)
    if cfg["normalize_activations"] in _FOLDED_NORMS[1:]:
        source.opened |= {name for name in (SCALER_FILE, WHITENING_FILE) if source.at(name).is_file()}
    settings = Settings(cfg, metadata, details, source.shapes(WEIGHTS_FILE), source.folder)
    _check(settings, weights)
    return settings


def _modern(cfg: dict[str, Any], metadata: dict[str, Any], where: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """cfg.json with all entries, and those of releases before 6 under the names of today."""
    version = str(metadata.get("sae_lens_version") or cfg.get("sae_lens_version") or "")
    cfg = dict(cfg)
    if not (found := re.match(r"\d+", version)) or int(found[0]) < 6:
        for old, new in _RENAMED.items():
            if old in cfg:
                cfg.setdefault(new, cfg.pop(old))
        metadata = {name: cfg[name] for name in _OF_THE_MODEL if cfg.get(name) is not None} | metadata
        cfg.setdefault("architecture", "standard")
        norm = cfg.get("normalize_activations")
        cfg["normalize_activations"] = {True: "expected_average_only_in", False: "none"}.get(norm, norm)  # type: ignore[arg-type]
        activation = cfg.get("activation_fn", "relu")
        require(activation in ("relu", "topk"), f"{where}: saelens: activation_fn {activation!r} is not relu or topk")
        if activation == "topk":
            k = (cfg.get("activation_fn_kwargs") or {}).get("k", cfg.get("k"))
            cfg |= {"architecture": "topk", "k": k, "rescale_acts_by_decoder_norm": False}
    require("architecture" in cfg, f"{where}: architecture is missing")
    rescaled = cfg["architecture"] in ("batchtopk", "matryoshka_batchtopk")
    defaults = {"apply_b_dec_to_input": True, "rescale_acts_by_decoder_norm": rescaled}
    cfg = defaults | cfg
    for name in ("normalize_activations", "reshape_activations"):
        cfg[name] = cfg.get(name) or "none"
    by_norm = cfg["architecture"] in ("topk", "batchtopk", "matryoshka_batchtopk")
    cfg["rescale_acts_by_decoder_norm"] = cfg["rescale_acts_by_decoder_norm"] and by_norm
    return cfg, metadata


def _check(settings: Settings, weights: Path) -> None:
    """Architecture, settings and names and shapes of tensors, before any is read."""
    theirs, cfg, where = settings.architecture, settings.cfg, settings.where
    why = _REFUSED.get(theirs)
    require(why is None, f"{where}: saelens: architecture {theirs!r}: {why}; it is not an SAE this engine has")
    known = ", ".join(_TENSORS)
    require(theirs in _TENSORS, f"{where}: saelens: architecture {theirs!r} is not one of {known}")
    norm, norms = cfg["normalize_activations"], (*_FOLDED_NORMS, *_NORMS)
    require(norm in norms, f"{where}: normalize_activations = {norm!r} is not supported, only {', '.join(norms)}")
    reshape = cfg["reshape_activations"]
    require(
        reshape in ("none", "hook_z"), f"{where}: reshape_activations = {reshape!r} is not supported, only none, hook_z"
    )
    d_in, d_sae, shapes = cfg["d_in"], cfg["d_sae"], settings.shapes
    expected: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    expected |= {name: (d_sae,) for name in _TENSORS[theirs]}
    if "topk_threshold" in expected:
        expected["topk_threshold"] = ()
    if theirs == "jumprelu" and "log_threshold" in shapes:
        expected["log_threshold"] = expected.pop("threshold")
    found = ", ".join(sorted(shapes))
    for name, shape in expected.items():
        require(name in shapes, f"{weights}: tensor {name!r} is missing from a {theirs} SAE (found {found})")
        require(shapes[name] == shape, f"{weights}: {name} has shape {shapes[name]}, expected {shape}")
    for name in shapes.keys() - expected.keys():
        unused = _IGNORED.get(name) in ("", theirs)
        require(unused, f"{weights}: tensor {name!r} is none of a {theirs} SAE ({', '.join(expected)})")


def _tensors(settings: Settings, source: Source) -> dict[str, Tensor]:
    path, digest = source.at(WEIGHTS_FILE), settings.cfg.get(WEIGHTS_DIGEST)
    message = f"{path}: altered, its SHA-256 is not the {WEIGHTS_DIGEST} in {CONFIG_FILE}"
    require(digest is None or sha256_file(path) == digest, message)
    names = [name for name in settings.shapes if name not in _IGNORED or name in _TENSORS[settings.architecture]]
    return floats(source.load(WEIGHTS_FILE), path, **{name: settings.shapes[name] for name in names})


def _threshold_name(settings: Settings) -> str | None:
    return next((name for name in ("threshold", "log_threshold", "topk_threshold") if name in settings.shapes), None)


def _threshold(settings: Settings, tensors: dict[str, Tensor]) -> Tensor | None:
    """[d_sae], or a scalar of one that BatchTopK trained."""
    name = _threshold_name(settings)
    if name is None:
        return None
    return tensors[name].double().exp().to(tensors[name].dtype) if name == "log_threshold" else tensors[name]


def _plain(settings: Settings, tensors: dict[str, Tensor]) -> PlainSAE:
    threshold = _threshold(settings, tensors)
    if settings.architecture == "gated":
        encoder = gated(tensors["W_enc"], tensors["b_gate"], tensors["b_mag"], tensors["r_mag"])
        tensors |= {"W_enc": encoder[0], "b_enc": encoder[1]}
        threshold = encoder[2]
    fields = _described(settings, threshold)
    if threshold is not None and fields["activation"] == "batch_topk" and threshold.dim():
        threshold = threshold[0].clone()
    weights: dict[str, Any] = {name: tensors[name] for name in PARAMETERS}
    return PlainSAE(**weights, threshold=threshold, **fields)


def _described(settings: Settings, threshold: Tensor | None) -> dict[str, Any]:
    """Fields of PlainSAE but for tensors."""
    cfg, metadata, details, where = settings.cfg, settings.metadata, settings.details, settings.where
    ours, theirs = metadata.get("architecture"), settings.architecture
    by_us = "saevlm_fast_version" in metadata
    if ours in _LAYOUT_OF or by_us:
        fits = _LAYOUT_OF.get(str(ours)) == theirs
        require(fits, f"{where}: architecture {theirs!r} contradicts {ours!r} in its metadata")
    trained_as = theirs if theirs in ("batchtopk", "matryoshka_batchtopk") else metadata.get("training_architecture")
    groups, doubts = tuple(metadata.get("group_sizes") or ()), list(metadata.get("doubts") or ())
    if not groups and (ours == "matryoshka" or trained_as == "matryoshka_batchtopk"):
        widths = details.get("matryoshka_widths") or cfg.get("matryoshka_widths") or []
        groups = _groups_of_widths(widths, cfg["d_sae"], where)
    k, doubt = _latents_per_row([metadata.get("k"), cfg.get("k"), details.get("k")], where)
    doubts += [doubt] if doubt else []
    one = threshold is not None and bool((threshold == threshold.flatten()[0]).all())
    if ours in ("batch_topk", "matryoshka") and threshold is not None:
        low, high = float(threshold.min()), float(threshold.max())
        message = f"{where}: threshold differs between latents ({low:g} to {high:g}); {ours} has a single threshold"
        require(one, message)
    activation: Activation = "jumprelu"
    if theirs in ("topk", "standard"):
        activation = "topk" if theirs == "topk" else "relu"
        require(k is not None or theirs != "topk", f"{where}: neither {CONFIG_FILE} nor its metadata say k")
    elif one and ours != "jumprelu" and (ours or trained_as in ("batchtopk", "matryoshka_batchtopk") or k is not None):
        activation = "batch_topk"
    require(k is None or 1 <= k <= cfg["d_sae"], f"{where}: k: {k} must be between 1 and d_sae = {cfg['d_sae']}")
    norm = cfg["normalize_activations"]
    return {
        "activation": activation,
        "k": k,
        "group_sizes": groups if len(groups) > 1 or ours == "matryoshka" else (),
        "input_norm": _NORMS.get(norm, "none"),
        "eps": float(metadata.get("eps", 1e-5)),
        "metadata": _metadata(settings, by_us),
        "doubts": tuple(doubts),
    }


def _metadata(settings: Settings, by_us: bool) -> dict[str, Any]:
    """Theirs as it is, and the entries that all readers of this room fill."""
    kept = {name: value for name, value in settings.metadata.items() if name not in _OURS}
    if by_us:
        return kept
    hook = kept.get("hook_name")
    layer = kept.get("hook_layer")
    if layer is None and isinstance(hook, str) and (found := re.search(r"(?:blocks|layers?)\.(\d+)", hook)):
        layer = int(found[1])
    about = {"model": kept.get("model_name"), "layer": layer, "hook": hook}
    small = ("architecture", "normalize_activations", "apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "dtype")
    config = {name: settings.cfg[name] for name in small if name in settings.cfg}
    config["sae_lens_version"] = settings.metadata.get("sae_lens_version")
    found_about = {name: value for name, value in about.items() if value is not None}
    return found_about | kept | {"source_format": NAME, "source_config": config}


def _latents_per_row(candidates: list[Any], where: Path) -> tuple[int | None, str | None]:
    """The first k that is given, and a doubt: BatchTopK of SAELens may have a fraction of a latent, on average."""
    k = next((value for value in candidates if value is not None), None)
    if k is None or k == int(k):
        return None if k is None else int(k), None
    return None, f"{where}: k is {k}, not a whole number; it is left out, and the threshold says what fires"


def _groups_of_widths(widths: Any, d_sae: int, where: Path) -> tuple[int, ...]:
    """Sizes of groups from where SAELens says that they end; it adds the last end itself."""
    check_record(widths, Each(_SIZE), f"{where}: matryoshka_widths", ValueError)
    ends = [*widths, d_sae] if not widths or widths[-1] < d_sae else widths
    sizes = tuple(end - start for start, end in zip([0, *ends], ends))
    require(
        min(sizes) >= 1 and ends[-1] == d_sae, f"{where}: matryoshka_widths {widths} do not rise to d_sae = {d_sae}"
    )
    return sizes


def _of_scaled_input(plain: PlainSAE, norm: str, source: Source) -> PlainSAE:
    """Statistics of inputs that a training checkpoint has in files of their own."""
    if norm not in _FOLDED_NORMS[1:]:
        return plain
    path, whitening = source.at(SCALER_FILE), source.at(WHITENING_FILE)
    scaler = source.json(SCALER_FILE)
    if scaler is None:
        return plain.assumed(*_doubt_of_scale(norm, source))
    check_record(scaler, _SCALER, path, ValueError)
    if whitening.is_file() and scaler.get("has_whitening", True):
        d, stored = plain.d_in, source.load(WHITENING_FILE)
        whiten = floats(stored, whitening, mean=(d,), matrix=(d, d), inverse_matrix=(d, d))
        plain = plain.of_whitened_input(whiten["mean"], whiten["matrix"], whiten["inverse_matrix"])
    else:
        require(not scaler.get("has_whitening", False), f"{whitening}: missing, but {SCALER_FILE} says it is there")
    factor = scaler.get("scaling_factor")
    require(factor is None or factor > 0, f"{path}: scaling_factor is {factor}; it must be positive")
    return plain if factor is None else plain.of_raw_input(0.0, factor)


def _doubt_of_scale(norm: str, source: Source) -> tuple[str, ...]:
    """Where inputs were scaled, and nobody says by how much."""
    if norm not in _FOLDED_NORMS[1:] or source.at(SCALER_FILE).is_file() or source.says("input_mean", "input_std"):
        return ()
    doubt = f"normalize_activations is {norm}, and {SCALER_FILE}, which says by how much, is not there: raw inputs"
    return (f"{source.folder}: {doubt} are assumed",)


# Writing --------------------------------------------------------------------------------------------------------------


def lost(plain: PlainSAE) -> list[str]:
    """What its own reader does not get from the files: nothing, but for an eps that SAELens has not."""
    if plain.input_norm == "layer_norm" and plain.eps != 1e-5:
        return [f"eps = {plain.eps:g} of layer_norm: SAELens adds 1e-5"]
    return []


def write(plain: PlainSAE, directory: Path) -> None:
    """Writes cfg.json and sae_weights.safetensors, each atomically, the weights first.

    BatchTopK SAEs become `jumprelu` with the scalar threshold repeated for every latent, as SAELens itself exports
    them; k, groups and everything else needed to come back is in `metadata`. cfg.json holds the weights' SHA-256 and
    its own.

    Raises:
        ValueError: a BatchTopK SAE whose threshold was never calibrated. OSError: it cannot be written.
    """
    tensors = {name: getattr(plain, name).contiguous() for name in PARAMETERS}
    if plain.activation in ("batch_topk", "jumprelu"):
        message = "threshold: not calibrated; a BatchTopK SAE cannot be saved without it"
        require(plain.threshold is not None, message)
        assert plain.threshold is not None
        tensors["threshold"] = plain.threshold.clamp(min=0).expand(plain.d_sae).contiguous()
    directory.mkdir(parents=True, exist_ok=True)
    save_safetensors_atomic(directory / WEIGHTS_FILE, tensors)
    digest = {WEIGHTS_DIGEST: sha256_file(directory / WEIGHTS_FILE)}
    write_record(directory / CONFIG_FILE, _cfg(plain) | digest)


def _cfg(plain: PlainSAE) -> dict[str, Any]:
    nested = plain.activation == "batch_topk" and bool(plain.group_sizes)
    architecture = "matryoshka" if nested else plain.activation
    ours: dict[str, Any] = {
        "sae_lens_version": LAYOUT,
        "sae_lens_training_version": None,
        "saevlm_fast_version": __version__,
        "architecture": architecture,
        "k": plain.k,
        "group_sizes": list(plain.group_sizes) or [plain.d_sae],
    }
    ours |= {"doubts": list(plain.doubts)} if plain.doubts else {}
    ours |= {"eps": plain.eps} if plain.input_norm == "layer_norm" else {}
    norms = {ours: theirs for theirs, ours in _NORMS.items()}
    cfg: dict[str, Any] = {
        "architecture": _LAYOUT_OF[architecture],
        "d_in": plain.d_in,
        "d_sae": plain.d_sae,
        "dtype": str(plain.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": norms.get(plain.input_norm, "none"),
        "reshape_activations": "none",
        "metadata": {**plain.metadata, **ours},
    }
    if plain.activation == "topk":
        cfg |= {"k": plain.k, "rescale_acts_by_decoder_norm": False}
    return cfg

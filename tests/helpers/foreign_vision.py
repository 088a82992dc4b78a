"""Vision SAEs in files of Prisma, PatchSAE, overcomplete, VISAEBench, CLIP-Scope, MSAE, clip-topk-sae and BatchTopK."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foreign_files import D, Forward, Made, S, Weights, layer_norm, random_weights, topk

MAKERS: dict[str, Callable[[torch.dtype], Made]] = {}


def maker(*arguments: Any, name: str = "") -> Callable[[Callable[..., Made]], Callable[..., Made]]:
    """Registers a maker with these arguments as one configuration."""

    def register(make: Callable[..., Made]) -> Callable[..., Made]:
        label = "-".join([name or make.__name__, *(str(each) for each in arguments)])
        MAKERS[label] = lambda dtype: make(dtype, *arguments)
        return make

    return register


# Prisma ---------------------------------------------------------------------------------------------------------------


def normalised_as_prisma(x_BD: Tensor, norm: str | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    if norm == "layer_norm":
        n_BD, mean, std = layer_norm(x_BD)
        return n_BD, lambda y_BD: y_BD * std + mean
    if norm == "constant_norm_rescale":
        coefficient = x_BD.shape[-1] ** 0.5 / x_BD.norm(dim=-1, keepdim=True)
        return x_BD * coefficient, lambda y_BD: y_BD / coefficient
    return x_BD, lambda y_BD: y_BD


def prisma_config(activation: str, norm: str | None, **more: Any) -> dict[str, Any]:
    """Without the key where norm is "missing". d_sae and the cached path are stale, as in published files."""
    config = {
        "architecture": "standard",
        "activation_fn_str": activation,
        "activation_fn_kwargs": {"k": 5} if activation == "topk" else {},
        "model_name": "open-clip:laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K",
        "hook_point_layer": 4,
        "layer_subtype": "hook_resid_post",
        "cls_token_only": True,
        "d_in": D,
        "d_sae": 12345,
        "cached_activations_path": "activations/blocks.9.hook_mlp_out",
        "dtype": {"__type__": "torch.dtype", "value": "torch.float32"},
        "expansion_factor": 16,
    }
    return {**config, **({} if norm == "missing" else {"normalize_activations": norm}), **more}


@maker("relu", None)
@maker("relu", "none")
@maker("relu", "layer_norm")
@maker("relu", "missing")
@maker("topk", "layer_norm")
@maker("topk", "constant_norm_rescale")
def prisma(dtype: torch.dtype, activation: str, norm: str | None) -> Made:
    w = random_weights(1, dtype)
    state = {"W_enc": w.W_enc, "b_enc": w.b_enc, "W_dec": w.W_dec, "b_dec": w.b_dec}
    files = {"config.json": prisma_config(activation, norm), "n_images_2600058.pt": state}

    def forward(x_BD: Tensor) -> tuple[Tensor, Tensor]:
        W_enc, b_enc, W_dec, b_dec = w.doubles()
        n_BD, undo = normalised_as_prisma(x_BD, "layer_norm" if norm == "missing" else norm)
        h_BS = (n_BD - b_dec) @ W_enc + b_enc
        z_BS = topk(h_BS, 5).relu() if activation == "topk" else h_BS.relu()
        return z_BS, undo(z_BS @ W_dec + b_dec)

    return Made("prisma", files, forward)


@maker(None)
@maker("layer_norm")
def prisma_gated(dtype: torch.dtype, norm: str | None) -> Made:
    w = random_weights(2, dtype)
    gate, mag, r_mag = w.others
    state = {"W_enc": w.W_enc, "b_enc": w.b_enc, "W_dec": w.W_dec, "b_dec": w.b_dec}
    state |= {"b_gate": gate, "b_mag": mag, "r_mag": r_mag}
    files = {"config.json": prisma_config("relu", norm, architecture="gated"), "weights.pt": state}

    def forward(x_BD: Tensor) -> tuple[Tensor, Tensor]:
        W_enc, _, W_dec, b_dec = w.doubles()
        n_BD, undo = normalised_as_prisma(x_BD, norm)
        e_BS = (n_BD - b_dec) @ W_enc
        active_BS = (e_BS + gate.double() > 0).double()
        z_BS = active_BS * (e_BS * r_mag.double().exp() + mag.double()).relu()
        return z_BS, undo(z_BS @ W_dec + b_dec)

    return Made("prisma", files, forward)


@maker()
def patch_sae(dtype: torch.dtype) -> Made:
    w = random_weights(3, dtype)
    cfg = {"model_name": "openai/clip-vit-base-patch16", "block_layer": -2, "module_name": "resid", "class_token": True}
    state = {"W_enc": w.W_enc, "b_enc": w.b_enc, "W_dec": w.W_dec, "b_dec": w.b_dec}

    def forward(x_BD: Tensor) -> tuple[Tensor, Tensor]:
        W_enc, b_enc, W_dec, b_dec = w.doubles()
        z_BS = ((x_BD - b_dec) @ W_enc + b_enc).relu()
        return z_BS, z_BS @ W_dec + b_dec

    return Made("prisma", {"clip.pt": {"cfg": cfg, "state_dict": state}}, forward)


# overcomplete ---------------------------------------------------------------------------------------------------------


def overcomplete_state(w: Weights, encoder: str = "linear") -> dict[str, Tensor]:
    dtype = w.W_enc.dtype
    state = {"dictionary._weights": w.W_dec, "dictionary.multiplier": torch.tensor(0.3, dtype=dtype)}
    weight = {"linear": "encoder.final_block.0.weight", "batch norm": "encoder.final_block.0.weight"}
    if encoder != "tied":
        state[weight.get(encoder, "encoder.weight")] = w.W_enc.T.contiguous()
    if encoder != "without bias":
        name = "encoder.final_block.0.bias" if encoder in weight else "encoder.bias"
        state[name] = w.b_enc
    if encoder == "batch norm":
        mean, shift, gamma = w.others
        parts = {"weight": gamma + 1, "bias": shift, "running_mean": mean, "running_var": w.theta}
        state |= {f"encoder.final_block.1.{key}": value for key, value in parts.items()}
        state["encoder.final_block.1.num_batches_tracked"] = torch.tensor(7)
    return state


@maker("linear", "relu")
@maker("linear", "topk")
@maker("linear", "batch_topk")
@maker("linear", "jumprelu")
@maker("batch norm", "topk")
@maker("batch norm", "jumprelu")
@maker("tied", "topk")
@maker("tieable", "relu")
@maker("without bias", "batch_topk")
def overcomplete(dtype: torch.dtype, encoder: str, activation: str) -> Made:
    w = random_weights(4, dtype)
    state = overcomplete_state(w, encoder)
    if activation == "jumprelu":
        state["thresholds"] = w.theta.log()
    value = {"model_state_dict": state, "epoch": 3} if encoder == "linear" else state
    assume = {"relu": {"activation": "relu"}, "topk": {"k": "5"}, "batch_topk": {"threshold": "0.5"}, "jumprelu": {}}

    def forward(x_BD: Tensor) -> tuple[Tensor, Tensor]:
        W_dec = w.W_dec.double()
        W_dec = W_dec / (W_dec.norm(p=2, dim=1, keepdim=True) + 1e-8) * state["dictionary.multiplier"].double().exp()
        h_BS = x_BD @ (W_dec.T if encoder == "tied" else w.W_enc.double())
        h_BS = h_BS if encoder == "without bias" else h_BS + w.b_enc.double()
        if encoder == "batch norm":
            get = {key.rsplit(".", 1)[1]: value.double() for key, value in state.items() if "block.1" in key}
            h_BS = (h_BS - get["running_mean"]) / (get["running_var"] + 1e-5).sqrt() * get["weight"] + get["bias"]
        z_BS = h_BS.relu()
        if activation == "topk":
            z_BS = topk(z_BS, 5)
        elif activation == "batch_topk":
            z_BS = z_BS * (z_BS >= 0.5)
        elif activation == "jumprelu":
            z_BS = torch.where(z_BS < state["thresholds"].exp().double(), 0.0, z_BS)
        return z_BS, z_BS @ W_dec

    return Made("overcomplete", {"sae.pth": value}, forward, assume[activation])


@maker("topk")
@maker("jumprelu")
def archetypal(dtype: torch.dtype, activation: str) -> Made:
    w = random_weights(5, dtype)
    points, relax = random_weights(6, dtype).W_dec[:8], w.W_dec * 0.9
    W = random_weights(7, dtype, d=S, s=8).W_enc
    state = overcomplete_state(w)
    del state["dictionary._weights"]
    state |= {"dictionary.C": points, "dictionary.W": W, "dictionary.Relax": relax}
    if activation == "jumprelu":
        state["thresholds"] = w.theta.log()

    def forward(x_BD: Tensor) -> tuple[Tensor, Tensor]:
        weights = W.double().relu()
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-8)
        cut = relax.double() * torch.clamp(1.0 / relax.double().norm(dim=-1, keepdim=True), max=1)
        W_dec = (weights @ points.double() + cut) * state["dictionary.multiplier"].double().exp()
        z_BS = (x_BD @ w.W_enc.double() + w.b_enc.double()).relu()
        z_BS = topk(z_BS, 5) if activation == "topk" else z_BS * (z_BS >= w.theta.log().exp().double())
        return z_BS, z_BS @ W_dec

    return Made("overcomplete", {"sae.pt": state}, forward, {"k": 5} if activation == "topk" else {})


# VISAEBench -----------------------------------------------------------------------------------------------------------


@maker("simple", "topk")
@maker("simple", "batchtopk")
@maker("simple", "jumprelu")
@maker("overcomplete", "topk")
@maker("overcomplete", "batchtopk")
@maker("overcomplete", "jumprelu")
def visaebench(dtype: torch.dtype, names: str, activation: str) -> Made:
    w = random_weights(8, torch.float32)  # the library turns everything into float32
    mean_D, std = torch.linspace(-1, 1, D).double(), 1.7
    config = {
        "architecture": activation,
        "backbone": "clip_vitb16",
        "d_model": D,
        "dict_size": S,
        "lr": 5e-4,
        "seed": 0,
    }
    config |= {"expansion_factor": 4, "activation_dir": "activations/clip", "k": 5, "threshold": 0.5}
    if names == "simple":
        state = {"encoder.weight": w.W_enc.T.contiguous(), "encoder.bias": w.b_enc}
        state |= {"decoder.weight": w.W_dec, "decoder.bias": w.b_dec, "jump_thresholds": w.theta}
    else:
        state = overcomplete_state(w) | {"thresholds": w.theta, "_running_threshold": torch.tensor(0.9)}
        config = {**config, "activation": activation, "architecture": "something else"}

    def forward(x_BD: Tensor) -> tuple[Tensor, Tensor]:
        W_enc, b_enc, W_dec, b_dec = w.doubles()
        x_BD = (x_BD - mean_D) / std
        z_BS = (x_BD @ W_enc + b_enc).relu()
        if activation == "topk":
            z_BS = topk(z_BS, 5)
        else:
            z_BS = z_BS * (z_BS >= 0.5) if activation == "batchtopk" else z_BS * (z_BS > w.theta.double())
        if names == "simple":
            return z_BS, (z_BS @ W_dec + b_dec) * std + mean_D
        return z_BS, z_BS @ (W_dec * torch.tensor(0.3).double().exp()) * std + mean_D

    settings = "config.json" if names == "simple" else "config.yaml"
    statistics = {"input_mean": mean_D, "input_std": std}
    return Made("visaebench", {settings: config, "sae.pt": state}, forward, statistics)


# Others ---------------------------------------------------------------------------------------------------------------


@maker()
def clip_scope(dtype: torch.dtype) -> Made:
    w = random_weights(9, dtype)
    state = {"pre_b": w.b_dec, "enc": w.W_enc, "dec": w.W_dec}

    def forward(x_BD: Tensor) -> tuple[Tensor, Tensor]:
        z_BS = topk((x_BD - w.b_dec.double()) @ w.W_enc.double(), 5)
        return z_BS, z_BS @ w.W_dec.double() + w.b_dec.double()

    value = {"k": 5, "n_features": S, "d_in": D, "model_state_dict": state}
    return Made("clip_scope", {"22_resid/1200013184.pt": value}, forward, open="22_resid/1200013184.pt")


@maker("ReLU", False, False)
@maker("JumpReLU", False, False)
@maker("TopK", False, False)
@maker("TopKReLU", True, False)
@maker("TopKReLU", False, True)
@maker("ReLU", True, True)
def msae(dtype: torch.dtype, activation: str, tied: bool, normalize: bool) -> Made:
    w = random_weights(10, dtype)
    scale = 0.7
    mean_D = torch.full((D,), 0.25) if normalize else torch.linspace(-1, 1, D)
    state = {"encoder": w.W_enc, "pre_bias": w.b_dec, "latent_bias": w.b_enc}
    state |= {} if tied else {"decoder": w.W_dec}
    state |= {"latents_activation_frequency": torch.zeros(S, dtype=torch.int64)}
    if activation == "JumpReLU":
        state["activation.log_threshold"] = w.theta.log()
    k = "_5_RW" if "TopK" in activation else "_0.03" if activation == "ReLU" else ""
    name = f"{S}_{D}_{activation}{k}_{tied}_{normalize}_0.0_cc3m_ViT-L~14.pt"
    value = {"model": state, "mean_center": mean_D, "scaling_factor": scale, "target_norm": None}

    def forward(x_BD: Tensor) -> tuple[Tensor, Tensor]:
        W_enc, b_enc, W_dec, b_dec = w.doubles()
        x_BD = (x_BD - mean_D.double()) * scale
        n_BD, mean, std = layer_norm(x_BD) if normalize else (x_BD, torch.zeros(1), torch.ones(1))
        h_BS = (n_BD - b_dec) @ W_enc + b_enc
        if activation == "TopK":
            z_BS = topk(h_BS, 5)
        elif activation == "TopKReLU":
            z_BS = topk(h_BS, 5).relu()
        else:
            z_BS = h_BS.relu()
            z_BS = z_BS * (z_BS > w.theta.log().exp().double()) if activation == "JumpReLU" else z_BS
        y_BD = (z_BS @ (W_enc.T if tied else W_dec) + b_dec) * std.double() + mean.double()
        return z_BS, y_BD / scale + mean_D.double()

    return Made("msae", {name: value}, forward)


@maker(True)
@maker(False)
def clip_topk_sae(dtype: torch.dtype, normalize: bool) -> Made:
    w = random_weights(11, dtype)
    config = {"input_dim": D, "hidden_dim": S, "k": 5, "dropout": 0.1} | (
        {} if normalize else {"normalize_decoder": False}
    )
    state = {"W_enc": w.W_enc, "b_enc": w.b_enc, "W_dec": w.W_dec, "b_dec": w.b_dec}
    state |= {"feature_counts": torch.zeros(S), "total_samples": torch.zeros(())}

    def forward(x_BD: Tensor) -> tuple[Tensor, Tensor]:
        W_enc, b_enc, W_dec, b_dec = w.doubles()
        z_BS = topk(x_BD @ W_enc + b_enc, 5)
        W_dec = torch.nn.functional.normalize(W_dec, dim=1) if normalize else W_dec
        return z_BS, z_BS @ W_dec + b_dec

    return Made("clip_topk_sae", {"config.json": config, "model.safetensors": state}, forward)


def reference_forward(w: Weights, kind: str, norm: bool) -> Forward:
    def forward(x_BD: Tensor) -> tuple[Tensor, Tensor]:
        W_enc, b_enc, W_dec, b_dec = w.doubles()
        n_BD, mean, std = layer_norm(x_BD) if norm else (x_BD, torch.zeros(1), torch.ones(1))
        if kind == "vanilla":
            z_BS = ((n_BD - b_dec) @ W_enc + b_enc).relu()
        elif kind == "jumprelu":
            z_BS = (n_BD @ W_enc + b_enc).relu()
            z_BS = z_BS * (z_BS > w.theta.log().exp().double())
        else:
            z_BS = ((n_BD - b_dec) @ W_enc).relu()
            z_BS = topk(z_BS, 5) if kind == "topk" else z_BS * (z_BS > 0.5)
        return z_BS, (z_BS @ W_dec + b_dec) * std.double() + mean.double()

    return forward


@maker("vanilla", False)
@maker("topk", False)
@maker("topk", True)
@maker("batchtopk", True)
@maker("jumprelu", False)
def batch_topk_reference(dtype: torch.dtype, kind: str, norm: bool) -> Made:
    w = random_weights(12, dtype)
    config = {"sae_type": kind, "act_size": D, "dict_size": S, "top_k": 5, "input_unit_norm": norm, "layer": 8}
    state = {"W_enc": w.W_enc, "b_enc": w.b_enc, "W_dec": w.W_dec, "b_dec": w.b_dec}
    if kind == "jumprelu":
        state["jumprelu.log_threshold"] = w.theta.log()
    files: dict[str, Any] = {"sae.pt": {"model_state_dict": state, "config": {**config, "dtype": torch.float32}}}
    if kind == "vanilla":
        files = {"config.json": config, "sae.pt": state}
    assume = {"threshold": 0.5} if kind == "batchtopk" else {}
    return Made("batch_topk_reference", files, reference_forward(w, kind, norm), assume)

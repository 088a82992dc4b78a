"""SAEs of language models in files of Llamascopium, lm-saes, OpenAI, Gemma Scope, Goodfire, Qwen-Scope and DeepSeek."""

from collections.abc import Callable
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from foreign_files import D, Forward, Made, S, Weights, layer_norm, random_weights, topk
from foreign_vision import MAKERS as VISION

MAKERS: dict[str, Callable[[torch.dtype], Made]] = {}
HOOK = "blocks.15.hook_resid_post"


def maker(*arguments: Any) -> Callable[[Callable[..., Made]], Callable[..., Made]]:
    def register(make: Callable[..., Made]) -> Callable[..., Made]:
        MAKERS["-".join([make.__name__, *(str(each) for each in arguments)])] = lambda dtype: make(dtype, *arguments)
        return make

    return register


# Llamascopium ---------------------------------------------------------------------------------------------------------

NORM = 7.3  # of inputs in the data


def llamascopium_config(activation: str, norm: str, **more: Any) -> dict[str, Any]:
    return {
        "sae_type": "sae",
        "d_model": D,
        "expansion_factor": S / D,
        "act_fn": activation,
        "norm_activation": norm,
        "sparsity_include_decoder_norm": True,
        "top_k": 5,
        "use_glu_encoder": False,
        "hook_point_in": HOOK,
        "hook_point_out": HOOK,
        "jumprelu_threshold_window": 2.0,
        **more,
    }


def llamascopium_forward(w: Weights, activation: str, norm: str, norms: bool, bias: bool = True) -> Forward:
    """normalize_activations, encode, decode, denormalize; z in units of x where one s is for all."""

    def forward(x_BD: Tensor) -> tuple[Tensor, Tensor]:
        W_enc, b_enc, W_dec, b_dec = w.doubles()
        ones = torch.ones(1).double()
        s = {"inference": ones, "dataset-wise": ones * sqrt(D) / NORM}.get(
            norm, sqrt(D) / x_BD.norm(dim=-1, keepdim=True)
        )
        h_BS = (x_BD * s) @ W_enc + b_enc
        m_S = W_dec.norm(p=2, dim=1) if norms else torch.ones(S).double()
        h_BS = h_BS * m_S
        if activation == "relu":
            z_BS = h_BS * (h_BS > 0)
        elif activation == "topk":
            z_BS = topk(h_BS * (h_BS > 0), 5)
        elif activation == "batchtopk":
            z_BS = h_BS * (h_BS > 0.6)
        else:
            z_BS = h_BS * (h_BS > w.theta.log().exp().double())
        z_BS = z_BS / m_S
        y_BD = (z_BS @ W_dec + (b_dec if bias else 0)) / s
        return z_BS / (s if norm == "dataset-wise" else 1), y_BD

    return forward


@maker("relu", "dataset-wise", True)
@maker("relu", "token-wise", False)
@maker("topk", "dataset-wise", True)
@maker("topk", "token-wise", True)
@maker("topk", "dataset-wise", False)
@maker("jumprelu", "dataset-wise", True)
@maker("jumprelu", "dataset-wise", False)
@maker("jumprelu", "inference", True)
@maker("jumprelu", "token-wise", True)
@maker("batchtopk", "dataset-wise", True)
def llamascopium(dtype: torch.dtype, activation: str, norm: str, norms: bool) -> Made:
    w = random_weights(20, dtype)
    state = {"W_E": w.W_enc, "b_E": w.b_enc, "W_D": w.W_dec}
    bias = activation != "relu"
    state |= {"b_D": w.b_dec} if bias else {}
    if activation == "jumprelu":
        state["activation_function.log_jumprelu_threshold"] = w.theta.log()
    measured = NORM if norm == "dataset-wise" else 1e-35  # never measured otherwise: what was in memory
    state[f"dataset_average_activation_norm.{HOOK}"] = torch.tensor(measured, dtype=torch.float64)
    config = llamascopium_config(activation, norm, sparsity_include_decoder_norm=norms, use_decoder_bias=bias)
    file: dict[str, Any] = {"sae_weights.safetensors": state}
    if activation == "topk":
        file = {"sae_weights.pt": {"sae": state, "version": "2.0.0b34"}}
    # In a topk, latents are in units of decoder norms here, which no comparison of rows would know otherwise.
    scaled = norms and activation in ("topk", "batchtopk")
    factor = 1 / w.W_dec.double().norm(dim=1) if scaled else 1.0
    assume = {"threshold": 0.6} if activation == "batchtopk" else {}
    forward = llamascopium_forward(w, activation, norm, norms, bias)
    return Made("llamascopium", {"config.json": config, **file}, forward, assume, factor)


def old_forward(
    w: Weights, activation: str, s_in: float, s_out: float, norms: bool, before: bool, mask: Tensor | None = None
) -> Forward:
    """The library's changes of weights in their order, then its encode and decode, in units of x."""

    def forward(x_BD: Tensor) -> tuple[Tensor, Tensor]:
        W_enc, b_enc, W_dec, b_dec = w.doubles()
        b_enc, b_dec, W_dec = b_enc / s_in, b_dec / s_out, W_dec * s_in / s_out
        m_S = W_dec.norm(dim=1) if norms else torch.ones(S).double()
        W_enc, b_enc, W_dec = W_enc * m_S, b_enc * m_S, W_dec / m_S[:, None]
        h_BS = (x_BD - b_dec if before else x_BD) @ W_enc + b_enc
        if activation == "relu":
            z_BS = h_BS.relu()
        elif activation == "topk":
            z_BS = topk(h_BS.relu(), 5)
        else:
            z_BS = h_BS * (h_BS > 0.5)
        if mask is not None:
            z_BS = z_BS * mask
        return z_BS, z_BS @ W_dec + b_dec

    return forward


def old_config(activation: str, **more: Any) -> dict[str, Any]:
    config = {"d_model": D, "d_sae": S, "act_fn": activation, "top_k": 5, "hook_point_in": HOOK, "hook_point_out": HOOK}
    return {
        **config,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 7.3, "out": 5.1},
        **more,
    }


@maker("relu", True, True)
@maker("topk", True, False)
@maker("jumprelu", True, True)
@maker("jumprelu", False, False)
@maker("topk with threshold", True, False)
def lm_saes(dtype: torch.dtype, activation: str, norms: bool, before: bool) -> Made:
    w = random_weights(21, dtype)
    state = {"encoder.weight": w.W_enc.T, "encoder.bias": w.b_enc}
    state |= {"decoder.weight": w.W_dec.T, "decoder.bias": w.b_dec}
    jumps = "jump" in activation or "threshold" in activation
    more = {"sparsity_include_decoder_norm": norms, "apply_decoder_bias_to_pre_encoder": before}
    more["jump_relu_threshold"] = 0.5 if jumps else 0.0
    files = {"hyperparams.json": old_config(activation.split()[0], **more), "checkpoints/final.safetensors": state}
    s_in, s_out = sqrt(D) / 7.3, sqrt(D) / 5.1
    forward = old_forward(w, "jumprelu" if jumps else activation, s_in, s_out, norms, before)
    return Made("lm_saes", files, forward)


@maker(True)
@maker(False)
def lm_saes_bare(dtype: torch.dtype, before: bool) -> Made:
    """Of before 2024-08: masks and scales of latents."""
    w = random_weights(22, dtype)
    mask = (torch.arange(S) % 3 != 0).to(dtype)
    state = {"encoder": w.W_enc, "encoder_bias": w.b_enc, "decoder": w.W_dec, "decoder_bias": w.b_dec}
    state |= {"feature_act_mask": mask, "feature_act_scale": w.theta}
    more = {"norm_activation": "inference", "apply_decoder_bias_to_pre_encoder": before}
    config = old_config("relu", sparsity_include_decoder_norm=False, **more)
    factor = torch.where(mask > 0, w.theta, 1.0).double()
    forward = old_forward(w, "relu", 1.0, 1.0, False, before, (mask * w.theta).double())
    return Made("lm_saes", {"hyperparams.json": config, "sae_weights.safetensors": state}, forward, {}, factor)


@maker(True)
@maker(False)
def llama_scope_r1(dtype: torch.dtype, norms: bool) -> Made:
    """Old names of tensors, thresholds one a latent, in units of normalised inputs."""
    w = random_weights(23, dtype)
    state = {"encoder.weight": w.W_enc.T, "encoder.bias": w.b_enc, "log_jumprelu_threshold": w.theta.log()}
    state |= {"decoder.weight": w.W_dec.T, "decoder.bias": w.b_dec}
    config = llamascopium_config("jumprelu", "dataset-wise", sparsity_include_decoder_norm=norms)
    config["dataset_average_activation_norm"] = {"in": NORM, "out": NORM}
    forward = llamascopium_forward(w, "jumprelu", "dataset-wise", norms)
    return Made("lm_saes", {"config.json": config, "sae_weights.safetensors": state}, forward)


# OpenAI ---------------------------------------------------------------------------------------------------------------


@maker("ReLU", False, "")
@maker("TopK", False, "ReLU")
@maker("TopK", False, "Identity")
@maker("TopK", True, "ReLU")
def openai(dtype: torch.dtype, activation: str, tied: bool, after: str) -> Made:
    w = random_weights(24, dtype)
    state: dict[str, Any] = {"pre_bias": w.b_dec, "encoder.weight": w.W_enc.T, "latent_bias": w.b_enc}
    state |= {"decoder.linear.weight": w.W_enc.T} if tied else {"decoder.weight": w.W_dec.T}
    state |= {"stats_last_nonzero": torch.zeros(S, dtype=torch.long), "activation": activation}
    if activation == "TopK":
        state["activation_state_dict"] = {"k": 5, "postact_fn": after}
        state |= {"activation.k": 5, "activation.postact_fn": after}

    def forward(x_BD: Tensor) -> tuple[Tensor, Tensor]:
        W_enc, b_enc, W_dec, b_dec = w.doubles()
        normalises = activation == "TopK"
        n_BD, mean, std = layer_norm(x_BD) if normalises else (x_BD, torch.zeros(1), torch.ones(1))
        h_BS = (n_BD - b_dec) @ W_enc + b_enc
        z_BS = topk(h_BS, 5) if normalises else h_BS.relu()
        z_BS = z_BS.relu() if after == "ReLU" else z_BS
        return z_BS, (z_BS @ (W_enc.T if tied else W_dec) + b_dec) * std.double() + mean.double()

    return Made("openai", {"7.pt": state}, forward, open="7.pt")


# Gemma Scope and small ones -------------------------------------------------------------------------------------------


@maker("params.npz", "")
@maker("layer_20/width_16k/average_l0_71/params.npz", "")
@maker("embedding/width_4k/average_l0_6/params.npz", "")
@maker("params.safetensors", "lower")
def gemma_scope(dtype: torch.dtype, path: str, case: str) -> Made:
    w = random_weights(25, dtype)
    state = {"W_enc": w.W_enc, "b_enc": w.b_enc, "W_dec": w.W_dec, "b_dec": w.b_dec, "threshold": w.theta}
    state = {name.lower() if case else name: tensor for name, tensor in state.items()}
    root = sqrt(D) if "embedding" in path else 1.0

    def forward(x_BD: Tensor) -> tuple[Tensor, Tensor]:
        W_enc, b_enc, W_dec, b_dec = w.doubles()
        h_BS = x_BD @ (W_enc / root) + b_enc
        z_BS = (h_BS > w.theta.double()) * h_BS.relu()
        return z_BS, z_BS @ (W_dec * root) + b_dec

    files: dict[str, Any] = {path: state}
    if case:
        files["config.json"] = {"architecture": "jump_relu", "hf_hook_point_in": "model.layers.9.output"}
    return Made("gemma_scope", files, forward, open=path.rpartition("/")[0])


def linear_forward(w: Weights) -> Forward:
    def forward(x_BD: Tensor) -> tuple[Tensor, Tensor]:
        z_BS = torch.nn.functional.linear(x_BD, w.W_enc.T.double(), w.b_enc.double()).relu()
        return z_BS, torch.nn.functional.linear(z_BS, w.W_dec.T.double(), w.b_dec.double())

    return forward


@maker()
def goodfire(dtype: torch.dtype) -> Made:
    w = random_weights(26, dtype)
    state = {"encoder_linear.weight": w.W_enc.T, "encoder_linear.bias": w.b_enc}
    state |= {"decoder_linear.weight": w.W_dec.T, "decoder_linear.bias": w.b_dec}
    return Made("goodfire", {"Llama-3.1-8B-Instruct-SAE-l19.pth": state}, linear_forward(w))


@maker()
def deepseek(dtype: torch.dtype) -> Made:
    w = random_weights(27, dtype)
    state = {"encoder.weight": w.W_enc.T, "encoder.bias": w.b_enc, "decoder.weight": w.W_dec.T, "decoder.bias": w.b_dec}
    return Made("deepseek", {"DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt": state}, linear_forward(w))


@maker("SAE-Res-Qwen3-1.7B-Base-W32K-L0_5/")
@maker("")
def qwen_scope(dtype: torch.dtype, repository: str) -> Made:
    w = random_weights(28, dtype)
    state = {"W_enc": w.W_enc.T, "W_dec": w.W_dec.T, "b_enc": w.b_enc, "b_dec": w.b_dec}

    def forward(x_BD: Tensor) -> tuple[Tensor, Tensor]:
        W_enc, b_enc, W_dec, b_dec = w.doubles()
        z_BS = topk(x_BD @ W_enc + b_enc, 5).relu()
        return z_BS, z_BS @ W_dec + b_dec

    name = f"{repository}layer12.sae.pt"
    return Made("qwen_scope", {name: state}, forward, {} if repository else {"k": "5"}, open=name)


ALL = {**VISION, **MAKERS}

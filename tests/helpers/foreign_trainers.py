"""Files of the libraries that train SAEs (SAELens, sparsify, dictionary_learning, saev), with their own forwards."""

import io
import json
from functools import partial

import torch

from foreign_files import D, Made, S, layer_norm, random_weights, topk

K = 5
WIDTHS = [8, S]  # ends of the groups of a Matryoshka SAE


def above(h_BS, theta):
    """h where it is above theta and above 0."""
    return torch.where((h_BS > theta) & (h_BS > 0), h_BS, 0.0)


# SAELens --------------------------------------------------------------------------------------------------------------

ACTS = {
    "standard": lambda h, w: h.relu(),
    "topk": lambda h, w: topk(h, K).relu(),
    "jumprelu": lambda h, w: above(h, w.theta.double()),
    "batchtopk": lambda h, w: above(h, 0.4),
    "matryoshka_batchtopk": lambda h, w: above(h, 0.4),
}


def token_norm(x_BD):
    scale = x_BD.shape[1] ** 0.5 / x_BD.norm(dim=-1, keepdim=True)
    return x_BD * scale, torch.zeros_like(scale), 1 / scale


NORMS = {"layer_norm": layer_norm, "constant_norm_rescale": token_norm}


def sae_lens(dtype, architecture="standard", apply=True, norm="none", rescale=False, metadata=None, **cfg):
    """cfg: more entries of cfg.json. In a training checkpoint, the norm's statistics are in files of their own."""
    w = random_weights(3, dtype)
    tensors = {"W_enc": w.W_enc, "W_dec": w.W_dec, "b_dec": w.b_dec}
    if architecture == "gated":
        tensors |= dict(zip(("b_gate", "b_mag", "r_mag"), w.others))
    else:
        tensors["b_enc"] = w.b_enc
    if architecture == "jumprelu":
        tensors["threshold"] = w.theta
    if "batchtopk" in architecture:
        tensors["topk_threshold"] = torch.tensor(0.4, dtype=torch.float64)
    config = {"architecture": architecture, "d_in": D, "d_sae": S, "dtype": "float32", "apply_b_dec_to_input": apply}
    config |= {"normalize_activations": norm, "metadata": {"sae_lens_version": "6.54.12"} | (metadata or {})}
    config |= {"k": K} if "topk" in architecture else {}
    config |= {"rescale_acts_by_decoder_norm": rescale} if "topk" in architecture else {}
    files = {"cfg.json": config | cfg, "sae_weights.safetensors": tensors}

    def forward(x_BD):
        W_enc, b_enc, W_dec, b_dec = w.doubles()
        n_BD, mean, std = NORMS.get(norm, lambda x: (x, 0, 1))(x_BD)
        n_BD = n_BD - b_dec if apply else n_BD
        if architecture == "gated":
            b_gate, b_mag, r_mag = (each.double() for each in w.others)
            e_BS = n_BD @ W_enc
            z_BS = ((e_BS + b_gate) > 0) * (e_BS * r_mag.exp() + b_mag).relu()
            return z_BS, z_BS @ W_dec + b_dec if norm == "none" else (z_BS @ W_dec + b_dec) * std + mean
        norms_S = W_dec.norm(dim=1) if rescale else 1.0
        z_BS = ACTS[architecture]((n_BD @ W_enc + b_enc) * norms_S, w)
        return z_BS, ((z_BS / norms_S) @ W_dec + b_dec) * std + mean

    return Made("saelens", files, forward)


def exported_by_batchtopk(dtype):
    """What SAELens makes of a finished Matryoshka SAE."""
    made = sae_lens(dtype, "matryoshka_batchtopk", rescale=False)
    tensors = made.files["sae_weights.safetensors"]
    tensors["threshold"] = torch.full((S,), 0.4, dtype=dtype)
    del tensors["topk_threshold"]
    details = {"k": float(K), "matryoshka_widths": WIDTHS}
    trained = {"training_architecture": "matryoshka_batchtopk", "training_architecture_details": details}
    made.files["cfg.json"]["architecture"] = "jumprelu"
    made.files["cfg.json"]["metadata"] |= trained | {"hook_name": "blocks.9.hook_resid_post", "model_name": "m"}
    del made.files["cfg.json"]["k"]
    above_stored = torch.full((S,), 0.4, dtype=dtype).double()
    W_enc, b_enc, W_dec, b_dec = (tensors[name].double() for name in ("W_enc", "b_enc", "W_dec", "b_dec"))

    def forward(x_BD):
        z_BS = above((x_BD - b_dec) @ W_enc + b_enc, above_stored)
        return z_BS, z_BS @ W_dec + b_dec

    made.forward = forward
    return made


def scaled(dtype, architecture="topk", **more):
    """A training checkpoint whose inputs were scaled by one number."""
    made = sae_lens(dtype, architecture, norm="expected_average_only_in", **more)
    made.files["activation_scaler.json"] = {"scaling_factor": 0.3, "has_whitening": False}
    inner = made.forward

    def forward(x_BD):
        z_BS, y_BD = inner(x_BD * 0.3)
        return z_BS, y_BD / 0.3

    made.forward = forward
    return made


def whitened(dtype, apply=True):
    made = sae_lens(dtype, "standard", apply=apply, norm="covariance_whitening")
    generator = torch.Generator().manual_seed(8)
    matrix = torch.randn(D, D, generator=generator, dtype=torch.float64)
    mean = torch.randn(D, generator=generator, dtype=torch.float64)
    made.files["activation_scaler.json"] = {"scaling_factor": None, "has_whitening": True}
    made.files["activation_whitening.safetensors"] = {
        "mean": mean,
        "matrix": matrix,
        "inverse_matrix": matrix.inverse(),
    }
    inner = made.forward

    def forward(x_BD):
        z_BS, y_BD = inner((x_BD - mean) @ matrix)
        return z_BS, y_BD @ matrix.inverse() + mean

    made.forward = forward
    return made


def log_threshold(dtype):
    made = sae_lens(dtype, "jumprelu")
    tensors = made.files["sae_weights.safetensors"]
    tensors["log_threshold"] = tensors.pop("threshold").log()
    return made


def legacy(dtype, **cfg):
    """cfg.json of releases before 6, which has other names and fewer entries."""
    made = sae_lens(dtype, "topk" if cfg.get("activation_fn_str") == "topk" else "standard")
    made.files["cfg.json"] = {"d_in": D, "d_sae": S, "dtype": "torch.float32", "hook_point": "blocks.3.hook_mlp_out"}
    made.files["cfg.json"] |= {"model_name": "clip", "hook_point_layer": 3, **cfg}
    return made


def finetuned(dtype):
    made = legacy(dtype, finetuning_scaling_factor=True, normalize_activations=False)
    tensors = made.files["sae_weights.safetensors"]
    factor_S = tensors["scaling_factor"] = torch.linspace(0.5, 2, S, dtype=dtype)
    inner, (W_dec, b_dec) = made.forward, (tensors[name].double() for name in ("W_dec", "b_dec"))

    def forward(x_BD):
        z_BS, _ = inner(x_BD)
        return z_BS, (z_BS * factor_S.double()) @ W_dec + b_dec

    made.forward = forward
    return made


SAE_LENS = {
    "standard": partial(sae_lens),
    "topk": partial(sae_lens, architecture="topk"),
    "topk by decoder norm": partial(sae_lens, architecture="topk", rescale=True),
    "topk by decoder norm, no pre-bias": partial(sae_lens, architecture="topk", rescale=True, apply=False),
    "jumprelu": partial(sae_lens, architecture="jumprelu"),
    "gated": partial(sae_lens, architecture="gated"),
    "gated, no pre-bias": partial(sae_lens, architecture="gated", apply=False),
    "hook_z": partial(sae_lens, reshape_activations="hook_z"),
    "batchtopk in training": partial(sae_lens, architecture="batchtopk", rescale=True),
    "matryoshka in training": partial(
        sae_lens, architecture="matryoshka_batchtopk", rescale=False, matryoshka_widths=WIDTHS
    ),
    "matryoshka exported": exported_by_batchtopk,
    "scaled input": scaled,
    "scaled input, by decoder norm": partial(scaled, rescale=True),
    "scaled input, jumprelu, no pre-bias": partial(scaled, architecture="jumprelu", apply=False),
    "whitened input": whitened,
    "whitened input, no pre-bias": partial(whitened, apply=False),
    "log threshold": log_threshold,
    "legacy": legacy,
    "legacy topk": partial(legacy, activation_fn_str="topk", activation_fn_kwargs={"k": K}),
    "legacy finetuned": finetuned,
    **{
        f"{name}, {norm}, {'pre-bias' if apply else 'no pre-bias'}": partial(
            sae_lens, architecture=name, norm=norm, apply=apply
        )
        for name in ("standard", "topk", "jumprelu", "gated")
        for norm in NORMS
        for apply in (True, False)
    },
}

# sparsify -------------------------------------------------------------------------------------------------------------


def sparsify(dtype, **cfg):
    w = random_weights(4, dtype)
    tensors = {"encoder.weight": w.W_enc.T, "encoder.bias": w.b_enc, "W_dec": w.W_dec, "b_dec": w.b_dec}
    cfg = {"d_in": D, "k": K, "num_latents": S, "activation": "topk", "normalize_decoder": True} | cfg

    def forward(x_BD):
        W_enc, b_enc, W_dec, b_dec = w.doubles()
        z_BS = topk(((x_BD - b_dec) @ W_enc + b_enc).relu(), cfg["k"])
        return z_BS, z_BS @ W_dec + b_dec

    return Made("sparsify", {"layers.7/cfg.json": cfg, "layers.7/sae.safetensors": tensors}, forward, open="layers.7")


def by_factor(dtype):
    """num_latents 0 is d_in * expansion_factor."""
    made = sparsify(dtype)
    cut = D * 3
    tensors = made.files["layers.7/sae.safetensors"]
    for name in ("encoder.weight", "encoder.bias", "W_dec"):
        tensors[name] = tensors[name][:cut]
    made.files["layers.7/cfg.json"] |= {"num_latents": 0, "expansion_factor": 3}
    W, b, V, c = (tensors[n].double() for n in ("encoder.weight", "encoder.bias", "W_dec", "b_dec"))

    def forward(x_BD):
        z_BS = topk(((x_BD - c) @ W.T + b).relu(), K)
        return z_BS, z_BS @ V + c

    made.forward = forward
    return made


SPARSIFY = {"topk": sparsify, "expansion_factor": by_factor, "multi_topk": partial(sparsify, multi_topk=True)}

# dictionary_learning --------------------------------------------------------------------------------------------------


def trainer(name, **more):
    config = {"dict_class": name, "activation_dim": D, "dict_size": S, "lm_name": "clip", "layer": 22}
    return {"trainer": config | {"submodule_name": "resid_post_layer_22"} | more, "buffer": {"ctx_len": 1}}


def dictionary(dtype, name="AutoEncoder", threshold=0.4, where="trainer_0/{}", weights="ae.pt", **more):
    w = random_weights(5, dtype)
    linear = {"encoder.weight": w.W_enc.T.contiguous(), "encoder.bias": w.b_enc}
    linear["decoder.weight"] = w.W_dec.T.contiguous()
    matrices = {"W_enc": w.W_enc, "b_enc": w.b_enc, "W_dec": w.W_dec, "b_dec": w.b_dec}
    batch = {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(threshold)}
    gated = {name: linear[name] for name in ("encoder.weight", "decoder.weight")} | {"decoder_bias": w.b_dec}
    state = {
        "AutoEncoder": linear | {"bias": w.b_dec},
        "AutoEncoderNew": linear | {"decoder.bias": w.b_dec},
        "GatedAutoEncoder": gated | dict(zip(("gate_bias", "mag_bias", "r_mag"), w.others)),
        "JumpReluAutoEncoder": matrices | {"threshold": w.theta},
        "AutoEncoderTopK": linear | {"b_dec": w.b_dec} | batch,
        "BatchTopKSAE": linear | {"b_dec": w.b_dec} | batch,
    }
    nested = matrices | batch | {"group_sizes": torch.tensor([8, S - 8])}
    state |= dict.fromkeys(("MatryoshkaBatchTopKSAE", "MatroyshkaBatchTopKSAE"), nested)
    files = {where.format("config.json"): trainer(name, **more), where.format(weights): state[name]}
    made = Made("dictionary_learning", files, partial(dictionary_forward, w, name, threshold))
    made.open = where.format("" if weights == "ae.pt" else weights)
    return made


def dictionary_forward(w, name, threshold, x_BD):
    W_enc, b_enc, W_dec, b_dec = w.doubles()
    pre_bias = name not in ("AutoEncoderNew", "JumpReluAutoEncoder")
    e_BS = (x_BD - b_dec if pre_bias else x_BD) @ W_enc
    if name == "GatedAutoEncoder":
        b_gate, b_mag, r_mag = (each.double() for each in w.others)
        z_BS = ((e_BS + b_gate) > 0) * (e_BS * r_mag.exp() + b_mag).relu()
    elif name == "JumpReluAutoEncoder":
        z_BS = above(e_BS + b_enc, w.theta.double())
    elif name == "AutoEncoderTopK":
        z_BS = topk((e_BS + b_enc).relu(), K)
    elif "TopK" in name:
        z_BS = above(e_BS + b_enc, torch.tensor(threshold).double())
    else:
        z_BS = (e_BS + b_enc).relu()
    return z_BS, z_BS @ W_dec + b_dec


def in_training(dtype):
    """checkpoints/ae_<step>.pt, with config.json a folder up."""
    return dictionary(dtype, "BatchTopKSAE", where="{}", weights="checkpoints/ae_40.pt", k=K)


def by_triton(dtype):
    """July 2024: the decoder is a bare parameter, and k is in config.json alone."""
    made = dictionary(dtype, "AutoEncoderTopK", where="{}", k=K)
    state = made.files["ae.pt"]
    state["decoder"] = state.pop("decoder.weight").T.contiguous()
    del state["k"], state["threshold"]
    return made


CLASSES = ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "AutoEncoderTopK")
CLASSES += ("BatchTopKSAE", "MatryoshkaBatchTopKSAE")
PAPER = "imagenet_train_activations_clip-vit-large-patch14-336_22_post_mlp_residual_matroyshka_batch_top_k_20_x4"
PAPER += "/trainer_0/{}"
DICTIONARY_LEARNING = {
    **{name: partial(dictionary, name=name) for name in CLASSES},
    "checkpoint": in_training,
    "July 2024": by_triton,
    "sae-for-vlm": partial(
        dictionary,
        name="MatroyshkaBatchTopKSAE",
        where=PAPER,
        lm_name="",
        layer="",
        submodule_name="",
    ),
}

# saev -----------------------------------------------------------------------------------------------------------------


def saev(dtype, header, act, pre_bias=False, threshold=None):
    """One file: a line of JSON and a state dict. act: h -> z."""
    w = random_weights(6, torch.float32)
    state = {"W_enc": w.W_enc, "b_enc": w.b_enc, "W_dec": w.W_dec, "b_dec": w.b_dec}
    if threshold is not None:
        state["activation.threshold"] = torch.tensor(threshold)
    buffer = io.BytesIO()
    torch.save(state, buffer)

    def forward(x_BD):
        W_enc, b_enc, W_dec, b_dec = w.doubles()
        z_BS = act((x_BD - b_dec if pre_bias else x_BD) @ W_enc + b_enc)
        return z_BS, z_BS @ W_dec + b_dec

    return Made("saev", {"sae.pt": json.dumps(header).encode() + b"\n" + buffer.getvalue()}, forward)


def relu(h_BS):
    return h_BS.relu()


def by_schema(dtype, schema, name, act, threshold=None, width="d_model"):
    activation = {"cls": name, "params": {} if name == "Relu" else {"top_k": K}}
    cfg = {width: D, "d_sae": S, "activation": activation}
    return saev(dtype, {"schema": schema, "cls": "SparseAutoencoderConfig", "cfg": cfg}, act, threshold=threshold)


def theta(h_BS):
    return above(h_BS, torch.tensor(0.4).double())


SAEV = {
    "schema 1, Relu": partial(
        saev, header={"schema": 1, "cls": "Relu", "cfg": {"d_vit": D, "exp_factor": 4}}, act=relu, pre_bias=True
    ),
    "schema 1, TopK": partial(
        saev,
        header={"schema": 1, "cls": "TopK", "cfg": {"d_vit": D, "top_k": K}},
        act=partial(topk, k=K),
        pre_bias=True,
    ),
    "schema 1, activation": partial(by_schema, schema=1, name="Relu", act=relu, width="d_vit"),
    "schema 2, TopK": partial(by_schema, schema=2, name="TopK", act=partial(topk, k=K), width="d_vit"),
    "schema 3, Relu": partial(by_schema, schema=3, name="Relu", act=relu),
    "schema 4, BatchTopK of a row": partial(by_schema, schema=4, name="BatchTopK", act=partial(topk, k=K)),
    "schema 5, BatchTopK": partial(by_schema, schema=5, name="BatchTopK", act=theta, threshold=0.4),
    "schema 5, BatchTopK not trained": partial(by_schema, schema=5, name="BatchTopK", act=relu, threshold=0.0),
    "no schema": partial(
        saev,
        header={"d_vit": D, "exp_factor": 4, "sparsity_coeff": 4e-4, "ghost_grads": False},
        act=relu,
        pre_bias=True,
    ),
}

TRAINERS = {
    f"{library}: {name}": make
    for library, several in (
        ("saelens", SAE_LENS),
        ("sparsify", SPARSIFY),
        ("dictionary_learning", DICTIONARY_LEARNING),
        ("saev", SAEV),
    )
    for name, make in several.items()
}

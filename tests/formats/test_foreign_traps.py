"""What goes wrong unseen in other libraries' files: each trap, and each kind that is refused by its name and reason."""

import pytest
import torch
from foreign_traps import made, refused

import plain_forward
from foreign_files import D, Made, S, assert_same, random_weights, rows, save
from foreign_language import HOOK, llamascopium_config
from foreign_vision import overcomplete_state
from saevlm_fast.formats.registry import read

# Llamascopium ---------------------------------------------------------------------------------------------------------


JUMPING = "llamascopium-jumprelu-dataset-wise-True"


@pytest.mark.parametrize("norm", [1e-35, 0.0, 1e-7, -1.0])
def test_llamascopium_norms_that_were_never_measured(tmp_path, norm):
    one = made(JUMPING)
    one.files[one.tensor_file][f"dataset_average_activation_norm.{HOOK}"] = torch.tensor(norm)
    refused(one, tmp_path, "it was never measured")


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"sae_type": "crosscoder"}, "sae_type 'crosscoder' is not 'sae'"),
        ({"sae_type": "clt"}, "sae_type 'clt'"),
        ({"sae_type": "lorsa"}, "sae_type 'lorsa'"),
        ({"hook_point_out": "blocks.15.hook_mlp_out"}, "a transcoder from"),
        ({"use_glu_encoder": True}, "a GLU encoder"),
        ({"norm_activation": "batch-wise"}, "norm_activation 'batch-wise' is none of"),
        ({"act_fn": "batchtopk"}, "no threshold is stored: say threshold"),
        ({"act_fn": "layertopk"}, "act_fn 'layertopk' is none of"),
    ],
)
def test_llamascopium_refuses(tmp_path, more, why):
    one = made(JUMPING)
    one.files["config.json"] |= more
    refused(one, tmp_path, f"Llamascopium: .*{why}")


def test_llamascopium_attention_is_told_by_its_settings(tmp_path):
    """Its tensors have names of their own."""
    one = made(JUMPING)
    one.files["config.json"]["sae_type"] = "lorsa"
    one.files[one.tensor_file] = {"W_Q": torch.zeros(2, D, 3), "W_K": torch.zeros(2, D, 3)}
    refused(one, tmp_path, "Llamascopium: sae_type 'lorsa' is not 'sae'")


def test_llamascopium_gates_and_shards(tmp_path):
    one = made(JUMPING)
    one.files[one.tensor_file]["W_E_glu"] = torch.zeros(D, S)
    refused(one, tmp_path / "glu", "a GLU encoder")
    (tmp_path / "dcp" / "sae_weights.dcp").mkdir(parents=True)
    save(tmp_path / "dcp" / "config.json", llamascopium_config("relu", "dataset-wise"))
    with pytest.raises(ValueError, match=r"sae_weights\.dcp is sharded"):
        read(tmp_path / "dcp")


def test_llamascopium_rows_without_norm(tmp_path):
    one = made(JUMPING)
    one.files[one.tensor_file]["W_D"][3] = 0
    refused(one, tmp_path, "1 rows of W_D are zero")


def test_what_the_library_folded_is_marked(tmp_path):
    assert "left thresholds as they were" in made("llamascopium-jumprelu-inference-True").read(tmp_path).doubts[0]


def test_lm_saes_refuses(tmp_path):
    one = made("lm_saes-jumprelu-True-True")
    one.files["hyperparams.json"]["hook_point_out"] = "elsewhere"
    refused(one, tmp_path / "a", "lm-saes: a transcoder")
    one = made("lm_saes-relu-True-True")
    one.files[one.tensor_file]["encoder_glu.weight"] = torch.zeros(S, D)
    refused(one, tmp_path / "b", "a GLU encoder")
    one = made("lm_saes-relu-True-True")
    one.files["hyperparams.json"]["dataset_average_activation_norm"] = None
    refused(one, tmp_path / "c", "no dataset_average_activation_norm")
    one = made("lm_saes-jumprelu-True-True")
    one.files["hyperparams.json"]["norm_activation"] = "token-wise"
    refused(one, tmp_path / "d", "a threshold in units of x")


# OpenAI ---------------------------------------------------------------------------------------------------------------


def test_openai_topk_normalises_and_relu_does_not(tmp_path):
    assert made("openai-TopK-False-ReLU").read(tmp_path / "topk").input_norm == "layer_norm"
    assert made("openai-ReLU-False-").read(tmp_path / "relu").input_norm == "none"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"activation": "Identity"}, "activation 'Identity' is neither"),
        ({"activation_state_dict": {"k": 2.5, "postact_fn": "ReLU"}}, r"activation_state_dict\.k is 2\.5"),
        ({"activation_state_dict": {"k": 5, "postact_fn": "GELU"}}, "postact_fn 'GELU' is neither"),
    ],
)
def test_openai_refuses(tmp_path, change, why):
    one = made("openai-TopK-False-ReLU")
    one.files["7.pt"] |= change
    refused(one, tmp_path, f"openai: {why}")


# overcomplete ---------------------------------------------------------------------------------------------------------


def test_overcomplete_thresholds_are_logarithms(tmp_path):
    """A new JumpSAE has -3 everywhere: 0.05."""
    state = overcomplete_state(random_weights(4)) | {"thresholds": torch.full((S,), -3.0)}
    plain = Made("overcomplete", {"sae.pt": state}, lambda x_BD: None).read(tmp_path)
    assert plain.threshold.allclose(torch.tensor(0.0498), atol=1e-4)


def at_the_threshold(weights_name, bias_name):
    """Tensors whose first latent is exactly x[0], and x with values at, just below and just above 0.5."""
    below, above = (torch.tensor(0.5).nextafter(torch.tensor(to)) for to in (0.0, 1.0))
    x_BD = torch.zeros(3, D)
    x_BD[:, 0] = torch.stack([torch.tensor(0.5), below, above])
    encoder = torch.zeros(S, D)
    encoder[0, 0] = 1.0
    return {weights_name: encoder, bias_name: torch.zeros(S)}, x_BD


@pytest.mark.parametrize("kind", ["overcomplete batch", "overcomplete jump", "visaebench", "visaebench jump"])
def test_what_is_exactly_the_threshold(tmp_path, kind):
    """overcomplete and VISAEBench's batch top-k keep it; VISAEBench's jumprelu does not."""
    state, x_BD = at_the_threshold("encoder.final_block.0.weight", "encoder.final_block.0.bias")
    state |= {"dictionary._weights": torch.eye(S, D) + 0.1, "dictionary.multiplier": torch.tensor(0.0)}
    assume, files = {}, {"sae.pt": state}
    if "jump" in kind:
        state["thresholds"] = torch.full((S,), 0.5)
        state["thresholds"] = state["thresholds"].log() if kind.startswith("over") else state["thresholds"]
        assert kind.startswith("vis") or torch.equal(state["thresholds"].exp(), torch.full((S,), 0.5))
    elif kind.startswith("over"):
        assume = {"threshold": 0.5}
    if kind.startswith("vis"):
        assume = {"input_mean": 0, "input_std": 1}
        named = "jumprelu" if "jump" in kind else "batchtopk"
        files["config.json"] = {"activation": named, "threshold": 0.5}
    plain = Made("", files, lambda x_BD: None, assume).read(tmp_path)
    fires = plain_forward.encode(plain, x_BD)[:, 0] > 0
    assert fires.tolist() == [kind != "visaebench jump", False, True]


@pytest.mark.parametrize("said", [{}, {"activation": "topk"}, {"activation": "jumprelu"}])
def test_overcomplete_does_not_say_its_activation(tmp_path, said):
    refused(
        made("overcomplete-linear-relu"),
        tmp_path,
        "say k .*threshold .*activation=relu",
        **said or {"format": "overcomplete"},
    )


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"Q": torch.zeros(4)}, "a quantised SAE"),
        ({"encoder.mlp_blocks.0.0.weight": torch.zeros(3)}, r"mlp_blocks.*several layers"),
        ({"encoder.attention_blocks.0.norm1.weight": torch.zeros(3)}, r"attention.*several layers"),
        ({"encoder.resnet_blocks.0.conv1.weight": torch.zeros(3)}, r"resnet.*several layers"),
        ({"encoder.final_block.1.weight": torch.ones(S)}, "a layer norm over the latents"),
    ],
)
def test_overcomplete_refuses(tmp_path, change, why):
    one = Made("overcomplete", {"sae.pt": overcomplete_state(random_weights(4)) | change}, lambda x_BD: None)
    refused(one, tmp_path, f"overcomplete: .*{why}", k=5)


def test_overcomplete_without_encoder_is_tied_or_pursues(tmp_path):
    state = overcomplete_state(random_weights(4), "tied")
    del state["encoder.bias"]
    one = Made("overcomplete", {"sae.pt": state}, lambda x_BD: None)
    refused(one, tmp_path, "overcomplete: no encoder: tied to its dictionary, or matching pursuit", k=5)


def test_rows_of_relax_beyond_the_default_are_told(tmp_path):
    one = made("archetypal-topk")
    assert "cut to the default delta of 1" in one.read(tmp_path).doubts[0]


# VISAEBench -----------------------------------------------------------------------------------------------------------


def test_visaebench_needs_the_statistics_of_inputs(tmp_path):
    one = made("visaebench-simple-topk")
    refused(one, tmp_path, "VISAEBench: inputs were standardised.*say input_mean", format="visaebench")
    plain = read(tmp_path, assume={"input_mean": 0, "input_std": 1})
    x_BD = rows()
    standardised = (x_BD - one.assume["input_mean"]) / one.assume["input_std"]
    ours = plain_forward.encode(plain, standardised)
    assert ours.allclose(one.forward(x_BD)[0], atol=1e-6)


@pytest.mark.parametrize("turned", [False, True])
def test_visaebench_decoders_are_latents_by_inputs(tmp_path, turned):
    one = made("visaebench-simple-topk")
    if turned:
        one.files["sae.pt"]["decoder.weight"] = one.files["sae.pt"]["decoder.weight"].T.contiguous()
    plain = one.read(tmp_path)
    assert_same(plain, one, torch.float32)
    assert ["is turned" in doubt for doubt in plain.doubts] == [True] * turned


def test_visaebench_square_decoders_are_refused(tmp_path):
    w = random_weights(8, d=S)
    state = {"encoder.weight": w.W_enc.T, "encoder.bias": w.b_enc, "decoder.weight": w.W_dec}
    assume = {"input_mean": 0, "input_std": 1}
    one = Made("visaebench", {"config.json": {"k": 5}, "sae.pt": state}, lambda x_BD: None, assume)
    refused(one, tmp_path, "VISAEBench: decoder.weight is 20 by 20.*cannot be told")


def test_visaebench_thresholds_of_another_library_or_none(tmp_path):
    one = made("visaebench-overcomplete-jumprelu")
    one.files["sae.pt"]["thresholds"] = torch.full((S,), -3.0)
    plain = one.read(tmp_path / "logs")
    assert "logarithms" in plain.doubts[0]
    del one.files["sae.pt"]["thresholds"]
    plain = one.read(tmp_path / "none")
    assert plain.threshold.unique().tolist() == pytest.approx([0.01])
    assert plain.doubts


def test_visaebench_refuses(tmp_path):
    one = made("visaebench-simple-topk")
    one.files["config.json"] |= {"architecture": "gated"}
    refused(one, tmp_path / "gated", "activation 'gated' is none of")
    one = made("visaebench-simple-topk")
    one.files["config.json"]["k"] = None
    refused(one, tmp_path / "k", "settings hold no k")


# Others ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{"affine_connection": True}, {"hf_hook_point_out": "model.layers.9.mlp.output"}])
def test_gemma_scope_transcoders(tmp_path, more):
    one = made("gemma_scope-params.safetensors-lower")
    one.files["config.json"] |= more
    refused(one, tmp_path, "Gemma Scope: a transcoder")


def test_gemma_scope_skip_connections_and_folders(tmp_path):
    one = made("gemma_scope-params.safetensors-lower")
    one.files[one.tensor_file]["affine_skip_connection"] = torch.zeros(D, D)
    refused(one, tmp_path / "skip", "Gemma Scope: a transcoder")
    one = made("gemma_scope-embedding/width_4k/average_l0_6/params.npz-")
    assert "x / sqrt(d_in)" in one.read(tmp_path / "a").doubts[0]
    one = made("gemma_scope-layer_20/width_16k/average_l0_71/params.npz-")
    assert one.read(tmp_path / "b").metadata["layer"] == 20


def test_qwen_scope_holds_no_k(tmp_path):
    one = made("qwen_scope-")
    refused(one, tmp_path, "Qwen-Scope: its k stands only in the repository's name", format="qwen_scope")
    plain = made("qwen_scope-SAE-Res-Qwen3-1.7B-Base-W32K-L0_5/").read(tmp_path)
    assert (plain.k, plain.metadata["layer"], plain.metadata["model"]) == (5, 12, "Qwen/Qwen3-1.7B-Base")


def test_bare_tensors_of_many_libraries_need_a_name(tmp_path):
    """W_enc, b_enc, W_dec, b_dec: SAELens subtracts b_dec, dictionary_learning's jumprelu does not, Qwen is turned."""
    w = random_weights(1)
    save(tmp_path / "sae.pt", {"W_enc": w.W_enc, "b_enc": w.b_enc, "W_dec": w.W_dec, "b_dec": w.b_dec})
    with pytest.raises(ValueError, match="no SAE of a known format"):
        read(tmp_path / "sae.pt")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (f"{S}_{D}_ReLU_0.03_False_False_30.0_cc3m.pt", r"capped, 30 tanh\(z / 30\)"),
        (f"{S}_{D}_TopKabs_5_False_False_0.0_cc3m.pt", "activation 'TopKabs' is none of"),
        (f"{S}_{D}_BatchTopKReLU_5_False_False_0.0_cc3m.pt", "activation 'BatchTopKReLU' is none of"),
        (f"{S}_{D}_ReLU_0.03_False_True_0.0_cc3m.pt", "a mean is subtracted before the layer norm"),
        ("sae.pt", "the file's name holds its options"),
        (f"{S}_{D}_TopK_many_False_False_0.0.pt", "the file's name holds its options"),
    ],
)
def test_msae_refuses(tmp_path, name, why):
    one = made("msae-ReLU-False-False")
    one.files = {name: next(iter(one.files.values()))}
    refused(one, tmp_path, f"MSAE: .*{why}")


def test_the_reference_code_does_not_add_the_bias_that_its_files_hold(tmp_path):
    one = made("batch_topk_reference-topk-False")
    assert one.files["sae.pt"]["model_state_dict"]["b_enc"].abs().sum() > 0
    assert one.read(tmp_path).b_enc.abs().sum() == 0


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"sae_type": "quantile"}, "sae_type 'quantile' is none of"),
        ({"activation": "softplus"}, "activation 'softplus' before the top k"),
        ({"tied_weights": True}, "tied_weights"),
        ({"sae_type": "batchtopk"}, "no threshold is stored: say threshold"),
        ({"top_k": 0.5}, "top_k is 0.5"),
    ],
)
def test_the_reference_code_refuses(tmp_path, more, why):
    one = made("batch_topk_reference-topk-False")
    one.files["sae.pt"]["config"] |= more
    refused(one, tmp_path, f"BatchTopK reference: .*{why}")


def test_deepseek_square_decoders_are_refused(tmp_path):
    w = random_weights(27, d=S)
    state = {"encoder.weight": w.W_enc.T, "encoder.bias": w.b_enc, "decoder.weight": w.W_dec.T, "decoder.bias": w.b_dec}
    save(tmp_path / "sae.pt", state)
    with pytest.raises(ValueError, match=r"DeepSeek-R1: decoder\.weight is square"):
        read(tmp_path / "sae.pt")
    assert read(tmp_path / "sae.pt", assume={"format": "deepseek"}).d_sae == S

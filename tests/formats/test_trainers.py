"""SAEs of the libraries that train them: read, equal to their own forward, written again, and what is refused."""

import io
import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import plain_forward
from foreign_files import D, S, assert_close, assert_same, rows
from foreign_trainers import CLASSES, DICTIONARY_LEARNING, SAE_LENS, SAEV, TRAINERS, K, dictionary, sae_lens, sparsify
from saevlm_fast.errors import Doubt
from saevlm_fast.formats import export
from saevlm_fast.formats.registry import detect, digest, read, read_header
from saevlm_fast.formats.sae_header import read_sae_header, sae_digest
from saevlm_fast.formats.source import Source
from saevlm_fast.sae import SparseAutoencoder

INPUT = {"input_mean": 0, "input_std": 1}  # of saev's first files, which do not say it


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", TRAINERS)
def test_equal_to_its_librarys_own_forward(tmp_path, name, dtype):
    made = TRAINERS[name](dtype)
    path = made.write(tmp_path)
    assert detect(Source(path)).name == made.format
    plain = read(path)
    is_float32 = dtype is torch.float32 or made.format == "saev"
    assert_same(plain, made, torch.float32 if is_float32 else dtype)
    assert plain.metadata["source_format"] == made.format
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Doubt)
        sae = SparseAutoencoder.from_pretrained(path)
    x_BD = rows()
    z_BS = plain_forward.encode(plain, x_BD)
    with torch.no_grad():
        codes = sae.encode(x_BD.to(sae.W_enc.dtype))
        assert torch.equal(codes.dense() != 0, z_BS != 0)
        ours = sae(x_BD.to(sae.W_enc.dtype)).double()
    assert_close(ours, plain_forward.forward(plain, x_BD), 1e-5 if is_float32 else 1e-12)


@pytest.mark.parametrize("name", TRAINERS)
def test_the_header_is_that_of_the_sae(tmp_path, name):
    path = TRAINERS[name](torch.float32).write(tmp_path)
    plain, source = read(path), Source(path)
    header = read_header(source)
    for field in ("d_in", "d_sae", "k", "input_norm", "group_sizes"):
        assert getattr(header, field) == getattr(plain, field)
    assert header.metadata == plain.metadata
    if "gated" not in name:
        assert header.activation == plain.activation
    assert sae_digest(path) == digest(Source(path)) == digest(source)
    assert read_sae_header(path).files


def test_a_digest_is_of_what_makes_the_sae(tmp_path):
    path = SAE_LENS["scaled input"](torch.float32).write(tmp_path)
    before = sae_digest(path)
    (path / "notes.txt").write_text("mine")
    assert sae_digest(path) == before
    (path / "activation_scaler.json").write_text('{"scaling_factor": 0.31}')
    assert sae_digest(path) != before


@pytest.mark.parametrize("text", ["{}", "[1]", '{"trainer": {}}'], ids=["object", "list", "another"])
def test_a_config_json_in_the_folder_above_is_none_of_it(tmp_path, text):
    """It is looked into, as dictionary_learning's may be; of others it is nobody's, sound or not."""
    names = ("encoder_linear.weight", "encoder_linear.bias", "decoder_linear.weight", "decoder_linear.bias")
    shapes = (9, 4), (9,), (4, 9), (4,)
    (tmp_path / "sae").mkdir()
    torch.save({name: torch.rand(shape) for name, shape in zip(names, shapes)}, tmp_path / "sae" / "x.pt")
    before = sae_digest(tmp_path / "sae")
    (tmp_path / "config.json").write_text(text)
    source = Source(tmp_path / "sae")
    assert detect(source).name == "goodfire"
    assert digest(source) == sae_digest(tmp_path / "sae") == before


# Exports --------------------------------------------------------------------------------------------------------------

CAN = {
    "saelens": {"relu", "topk", "jumprelu", "batch_topk"},
    "safetensors": {"relu", "topk", "jumprelu", "batch_topk"},
    "dictionary_learning": {"relu", "topk", "jumprelu", "batch_topk"},
    "sparsify": {"topk", "batch_topk"},
    "saev": {"relu", "topk", "batch_topk"},
}


@pytest.mark.parametrize("to", export.WRITERS)
@pytest.mark.parametrize("name", TRAINERS)
def test_written_and_read_again(tmp_path, name, to):
    """The same SAE, with all that was known of it, but for what was said to be lost."""
    plain = read(TRAINERS[name](torch.float32).write(tmp_path / "in"))
    (tmp_path / "out").mkdir()
    normed = plain.input_norm != "none" and to not in ("saelens", "safetensors")
    if plain.activation not in CAN[to] or normed:
        with pytest.raises(ValueError, match=r"(saev|dictionary_learning): has no|sparsify: "):
            export.write(plain, tmp_path / "out", to, lossy=True)
        return
    lost = export.write(plain, tmp_path / "out", to, lossy=True)
    if lost:
        with pytest.raises(ValueError, match=f"to: {to} loses .*--lossy"):
            export.check(plain, to)
    again = read(tmp_path / "out")
    x_BD = rows()
    per_row = replace(plain, activation="topk", threshold=None) if to == "sparsify" else plain
    z_BS = plain_forward.encode(per_row, x_BD)
    assert torch.equal(plain_forward.encode(again, x_BD) != 0, z_BS != 0)
    assert_close(plain_forward.forward(again, x_BD), plain_forward.forward(per_row, x_BD), 1e-5)
    if to in ("saelens", "safetensors"):
        assert not lost
        for field in ("activation", "k", "group_sizes", "input_norm", "eps", "doubts"):
            assert getattr(again, field) == getattr(plain, field)
    if to != "saev":
        assert again.metadata == plain.metadata


@pytest.mark.parametrize("to", export.WRITERS)
def test_from_every_format_to_every_other_and_back(tmp_path, to):
    """A topk SAE can be anything: around once, it is what it was, to the bit."""
    plain = read(sparsify(torch.float32).write(tmp_path / "in"))
    (tmp_path / "out").mkdir()
    (tmp_path / "back").mkdir()
    export.write(plain, tmp_path / "out", to, lossy=True)
    export.write(read(tmp_path / "out"), tmp_path / "back", "saelens")
    again = read(tmp_path / "back")
    exact = to != "saev"
    assert torch.equal(again.W_enc, plain.W_enc)
    assert torch.equal(again.W_dec, plain.W_dec)
    assert torch.equal(again.b_enc, plain.b_enc) or not exact
    assert (again.activation, again.k) == ("topk", K)


def test_what_an_export_cannot_hold_is_named():
    plain = replace(tiny("batch_topk"), threshold=None, k=None)
    for to, message in (
        ("saelens", "threshold: not calibrated"),
        ("saev", "threshold: not calibrated"),
        ("sparsify", "k: not known"),
        ("json", "to: 'json' is not one of saelens, sparsify, dictionary_learning, saev, safetensors"),
    ):
        with pytest.raises(ValueError, match=message):
            export.write(plain, ".", to, lossy=True)
    assert "k is not known" in str(export.check(plain, "dictionary_learning", lossy=True))


def tiny(activation):
    from saevlm_fast.formats.plain import PlainSAE

    zeros = torch.zeros
    weights = {"W_enc": zeros(2, 3), "b_enc": zeros(3), "W_dec": torch.eye(3)[:, :2].contiguous(), "b_dec": zeros(2)}
    return PlainSAE(**weights, activation=activation, k=1, threshold=torch.tensor(0.5))


# What is assumed, and what is refused ---------------------------------------------------------------------------------


def test_a_threshold_that_was_never_measured(tmp_path):
    """-1 in dictionary_learning, whose library then keeps all that is positive."""
    made = DICTIONARY_LEARNING["BatchTopKSAE"](torch.float32)
    made.files["trainer_0/ae.pt"]["threshold"] = torch.tensor(-1.0)
    path = made.write(tmp_path)
    plain = read(path)
    assert (plain.activation, plain.k) == ("topk", K)
    assert "no threshold was measured in training; the 5 largest of each row are kept" in plain.doubts[0]
    assert float(read(path, assume={"threshold": 0.25}).threshold) == 0.25
    with pytest.warns(Doubt, match="no threshold was measured"):
        SparseAutoencoder.from_pretrained(path)
    made.files["trainer_0/ae.pt"].pop("k")
    path = made.write(tmp_path)
    with pytest.raises(ValueError, match="k is not known: say k"):
        read(path)
    assert read(path, assume={"k": "3"}).k == 3


@pytest.mark.parametrize("name", CLASSES)
def test_a_lone_ae_pt(tmp_path, name):
    """Without config.json: what its tensors tell is enough once the format is named."""
    made = dictionary(torch.float32, name)
    path = made.write(tmp_path) / "ae.pt"
    (path.parent / "config.json").unlink()
    if name == "AutoEncoderNew":  # its tensors are those of another format, which computes the same
        assert_same(read(path), made, torch.float32)
    else:
        with pytest.raises(ValueError, match=r"no SAE of a known format; ae\.pt .*assume format=dictionary_learn"):
            read(path)
    assume = {"format": "dictionary_learning"}
    if name in ("AutoEncoderTopK", "BatchTopKSAE"):
        with pytest.raises(ValueError, match=r"say activation, topk or batch_topk \(assume= in Python"):
            read(path, assume=assume)
        assume["activation"] = "topk" if name == "AutoEncoderTopK" else "batch_topk"
    assert_same(read(path, assume=assume), made, torch.float32)


def test_a_run_of_several_saes_names_them(tmp_path):
    for i in range(2):
        dictionary(torch.float32, where=f"run/trainer_{i}/{{}}").write(tmp_path)
    with pytest.raises(ValueError, match=r"no SAE itself, but there are some in it; name one: .*trainer_0.*trainer_1"):
        read(tmp_path / "run")


@pytest.mark.parametrize("run", [{"transcode": True}, {"sae": {"transcode": True}}])
def test_a_sparsify_transcoder_whose_run_alone_says_so(tmp_path, run):
    """As before February 2025: cfg.json had no such entry, and the run's config.json had."""
    path = sparsify(torch.float32).write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match=r"\.\./config\.json: sparsify: transcode is true: a transcoder"):
        read(path)
    edit(path / "cfg.json", transcode=False)  # what stands beside the weights holds
    read(path)


@pytest.mark.parametrize("text", ["{broken", "[1]"])
def test_settings_of_another_program_above_are_none_of_ours(tmp_path, text):
    sparse, dictionaries = sparsify(torch.float32), dictionary(torch.float32, "AutoEncoderNew")
    for made in (sparse, dictionaries):
        path = made.write(tmp_path / made.format)
        (path / "config.json").unlink(missing_ok=True)
        (path.parent / "config.json").write_text(text)
        assert_same(read(path), made, torch.float32)


def test_sound_settings_of_another_program_above_are_none_of_a_lone_state_dict(tmp_path):
    made = dictionary(torch.float32, "GatedAutoEncoder")
    path = made.write(tmp_path) / "ae.pt"
    (path.parent / "config.json").unlink()
    source = Source(path, assume={"format": "dictionary_learning"})
    before = digest(source)
    (path.parent.parent / "config.json").write_text('{"model_type": "clip"}')
    source = Source(path, assume={"format": "dictionary_learning"})
    assert_same(read(source), made, torch.float32)
    assert digest(source) == before


@pytest.mark.parametrize("made", [sparsify(torch.float32, k=S + 1), sparsify(torch.float32, k=0)])
def test_no_more_latents_of_a_row_than_there_are(tmp_path, made):
    with pytest.raises(ValueError, match=rf"layers\.7: sparsify: k is \d+; it must be between 1 and d_sae = {S}"):
        read(made.write(tmp_path))


def test_a_scale_that_is_not_known_is_a_doubt_before_weights_are_read(tmp_path):
    path = sae_lens(torch.float32, norm="expected_average_only_in").write(tmp_path)
    assert read_header(Source(path)).doubts == read(path).doubts != ()


def test_model_and_layer_are_told(tmp_path):
    def told(make, name):
        return read(make(torch.float32).write(tmp_path / name)).metadata

    paper = told(DICTIONARY_LEARNING["sae-for-vlm"], "a")
    assert (paper["model"], paper["layer"], paper["hook"]) == ("clip-vit-large-patch14-336", 22, "post_mlp_residual")
    theirs = told(DICTIONARY_LEARNING["AutoEncoder"], "b")
    assert (theirs["model"], theirs["layer"], theirs["hook"]) == ("clip", 22, "resid_post_layer_22")
    lens = told(SAE_LENS["matryoshka exported"], "c")
    assert (lens["model"], lens["layer"], lens["hook"]) == ("m", 9, "blocks.9.hook_resid_post")
    assert told(SAE_LENS["legacy"], "d")["layer"] == 3
    assert told(TRAINERS["sparsify: topk"], "e")["layer"] == 7


def test_inputs_of_saev_may_have_been_scaled(tmp_path):
    made = SAEV["no schema"](torch.float32)
    path = made.write(tmp_path)
    assert "trained on (x - mean) / s (scale_mean, scale_norm)" in read(path).doubts[0]
    mean_D = torch.linspace(-1, 1, D).double()
    torch.save({"mean": mean_D}, tmp_path / "mean.pth")
    plain = read(path, assume={"input_mean": tmp_path / "mean.pth", "input_std": "2.5"})
    assert not plain.doubts
    inner = made.forward

    def forward(x_BD):
        z_BS, y_BD = inner((x_BD - mean_D) / 2.5)
        return z_BS, y_BD * 2.5 + mean_D

    assert_same(plain, replace(made, forward=forward), torch.float32)
    (tmp_path / "config.json").write_text('{"data": {"scale_mean": false, "scale_norm": false, "layer": 13}}')
    assert not read(path).doubts
    assert read(path).metadata["layer"] == 13


def edit(path, **changes):
    value = json.loads(path.read_text())
    path.write_text(json.dumps({name: each for name, each in (value | changes).items() if each != "gone"}))


REFUSED = [
    ("saelens: topk", "cfg.json", {"architecture": name}, rf"saelens: architecture '{name}': ")
    for name in ("abstopk", "transcoder", "jumprelu_skip_transcoder", "temporal", "matching_pursuit")
]
REFUSED += [
    ("saelens: topk", "cfg.json", {"architecture": "vae"}, "saelens: architecture 'vae' is not one of standard, topk"),
    ("saelens: topk", "cfg.json", {"normalize_activations": "batch"}, "normalize_activations = 'batch' is not suppor"),
    ("saelens: topk", "cfg.json", {"reshape_activations": "x"}, "reshape_activations = 'x' is not supported"),
    ("saelens: topk", "cfg.json", {"k": 0}, r"k: 0 must be between 1 and d_sae = 20"),
    ("saelens: topk", "cfg.json", {"k": "gone"}, "neither cfg.json nor its metadata say k"),
    ("saelens: topk", "cfg.json", {"d_in": 7}, r"W_enc has shape \(6, 20\), expected \(7, 20\)"),
    ("saelens: topk", "cfg.json", {"d_sae": "gone"}, "d_sae is missing"),
    ("saelens: gated", "cfg.json", {"architecture": "jumprelu"}, "tensor 'b_enc' is missing from a jumprelu SAE"),
    ("saelens: jumprelu", "cfg.json", {"architecture": "topk", "k": 3}, "tensor 'threshold' is none of a topk SAE"),
    ("saelens: legacy", "cfg.json", {"activation_fn": "tanh-relu"}, "activation_fn 'tanh-relu' is not relu or topk"),
    ("saelens: scaled input", "activation_scaler.json", {"scaling_factor": -1}, "it must be positive"),
    ("saelens: scaled input", "activation_scaler.json", {"has_whitening": True}, "missing, but activation_scaler.json"),
    ("saelens: matryoshka in training", "cfg.json", {"matryoshka_widths": [9, 8]}, None),
    ("sparsify: topk", "layers.7/cfg.json", {"transcode": True}, "sparsify: transcode is true: a transcoder"),
    ("sparsify: topk", "layers.7/cfg.json", {"skip_connection": True}, "skip_connection is true"),
    ("sparsify: topk", "layers.7/cfg.json", {"signed": True}, "signed is true"),
    ("sparsify: topk", "layers.7/cfg.json", {"activation": "groupmax"}, "activation 'groupmax' is not supported"),
    ("sparsify: topk", "layers.7/cfg.json", {"num_latents": 21}, r"encoder.weight has shape \(20, 6\), expected \(21"),
    ("sparsify: topk", "layers.7/cfg.json", {"k": -1}, "k is -1"),
    ("sparsify: topk", "layers.7/cfg.json", {"d_in": "gone"}, "d_in is missing"),
    (
        "dictionary_learning: AutoEncoder",
        "trainer_0/config.json",
        {"trainer": {"dict_class": "CrossCoder"}},
        "dict_class 'CrossCoder' is not an SAE this engine has; it has AutoEncoder",
    ),
    (
        "dictionary_learning: AutoEncoder",
        "trainer_0/config.json",
        {"trainer": {"dict_class": "AutoEncoder", "dict_size": 21}},
        "dict_size is 20, but .*config.json says 21",
    ),
    (
        "dictionary_learning: AutoEncoder",
        "trainer_0/config.json",
        {"trainer": {"dict_class": "BatchTopKSAE"}},
        "tensor 'b_dec' is missing",
    ),
    ("dictionary_learning: AutoEncoder", "trainer_0/config.json", {"trainer": {"dict_class": 3}}, "dict_class is 3"),
]


@pytest.mark.parametrize(("name", "file", "changes", "message"), REFUSED)
def test_what_is_no_sae_of_ours_is_refused_by_name(tmp_path, name, file, changes, message):
    path = TRAINERS[name](torch.float32).write(tmp_path)
    edit(tmp_path / file, **changes)
    if message is None:  # widths that do not rise
        message = "matryoshka_widths"
        edit(tmp_path / file, metadata={"training_architecture_details": {"matryoshka_widths": [9, 8]}})
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["nan", "inf", "shape", "missing", "integers", "truncated", "empty", "a list"])
@pytest.mark.parametrize(
    "name", ["saelens: topk", "sparsify: topk", "dictionary_learning: BatchTopKSAE", "saev: schema 3, Relu"]
)
def test_damaged_tensors_are_one_clear_error(tmp_path, name, damage):
    made = TRAINERS[name](torch.float32)
    path = made.write(tmp_path)
    file = tmp_path / next(each for each in made.files if not each.endswith(".json"))
    data = file.read_bytes()
    head = data[: data.index(b"\n") + 1] if name.startswith("saev") else b""
    is_safe = file.suffix == ".safetensors"
    tensors = load_file(file) if is_safe else torch.load(io.BytesIO(data[len(head) :]), weights_only=True)
    bias = next(each for each in ("b_dec", "bias") if each in tensors)
    if damage in ("nan", "inf"):
        tensors[bias] = tensors[bias].clone().fill_(float(damage))
    elif damage == "shape":
        tensors[bias] = torch.zeros(D + 1)
    elif damage == "missing":
        del tensors[bias]
    elif damage == "integers":
        tensors[bias] = torch.zeros(D, dtype=torch.int64)
    buffer = io.BytesIO()
    if is_safe:
        save_file(tensors, file)
    else:
        torch.save([1, 2] if damage == "a list" else tensors, buffer)
        file.write_bytes(head + buffer.getvalue())
    if damage in ("truncated", "empty") or (damage == "a list" and is_safe):
        file.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"")
    with pytest.raises(ValueError, match=file.name) as caught:
        read(file if damage == "empty" and not is_safe else path)
    assert "\n" not in str(caught.value)


LINES = (
    b"{" + b" " * (1 << 20),
    b'{"a":' * 200 + b"\n",
    b"{}",
    b"[1]\n",
    b'{"schema": 9}\n',
    b'{"schema": 5, "cfg": {"activation": {"cls": "AbsBatchTopK"}}}\n',
    b'{"schema": 4, "cfg": {}}\n',
    b'{"schema": "x"}\n',
    b'{"schema": 1, "cls": 3}\n',
)


@pytest.mark.parametrize("line", LINES)
def test_a_first_line_of_saev_with_anything_wrong(tmp_path, line):
    made = SAEV["schema 3, Relu"](torch.float32)
    data = made.files["sae.pt"]
    (tmp_path / "sae.pt").write_bytes(line + data[data.index(b"\n") + 1 :])
    with pytest.raises(ValueError, match=r"sae\.pt: ") as caught:
        read(tmp_path / "sae.pt")
    assert "\n" not in str(caught.value)


def test_statistics_that_are_not_there_are_a_doubt(tmp_path):
    made = SAE_LENS["scaled input"](torch.float32)
    path = made.write(tmp_path)
    (path / "activation_scaler.json").unlink()
    assert "activation_scaler.json, which says by how much, is not there" in read(path).doubts[0]
    told = read(path, assume={"input_std": 1 / 0.3})
    assert not told.doubts
    assert_same(told, made, torch.float32)


def test_bfloat16_stays_and_folds_are_done_in_float32(tmp_path):
    assert read(sae_lens(torch.bfloat16).write(tmp_path / "a")).W_enc.dtype == torch.bfloat16
    made = sae_lens(torch.bfloat16, "gated", apply=False)
    plain = read(made.write(tmp_path / "b"))
    assert plain.W_enc.dtype == torch.float32
    assert_same(plain, made, torch.float32)


def test_a_file_beside_others_is_opened_alone(tmp_path):
    """Two SAEs of one run: the file says which."""
    first = dictionary(torch.float32, "BatchTopKSAE", where="{}", weights="checkpoints/ae_40.pt", k=K)
    first.write(tmp_path)
    shutil.copy(tmp_path / "checkpoints/ae_40.pt", tmp_path / "checkpoints/ae_80.pt")
    with pytest.raises(ValueError, match=r"which of ae_40\.pt, ae_80\.pt\? Name the file"):
        read(tmp_path / "checkpoints")
    assert read(tmp_path / "checkpoints" / "ae_80.pt").d_sae == S

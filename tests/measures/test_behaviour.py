"""An SAE in the place of a tower's activations, and what is kept of probes and neighbours."""

import numpy as np
import pytest
import torch

from saevlm_fast.config import SAEConfig
from saevlm_fast.data.label_sets import LabelSet, halves
from saevlm_fast.images.open import open_images
from saevlm_fast.measures.behaviour import Behaviour, BehaviourOptions, chosen_images, read_prompts, texts_of
from saevlm_fast.measures.behaviour_splice import SplicedImages
from saevlm_fast.measures.probes import Probe, ProbeSet, kept
from saevlm_fast.measures.results import ratio
from saevlm_fast.measures.retrieval import image_text_recall, nearest, overlap, votes
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.steering.edits import steer
from saevlm_fast.towers.load import load_tower
from saevlm_fast.towers.text import TextEncoder, load_text_encoder
from saevlm_fast.towers.tower import HookPoint
from tiny_tower import PROJECTED, WIDTH, save_clip, save_photos

N = 24
LAYER = 1
HERE = HookPoint("residual", LAYER)


def transformers_tower(root):
    return load_tower(f"hf:{save_clip(root / 'clip')}")


def open_clip_tower(root):
    """Of open_clip, small, with random weights."""
    open_clip = pytest.importorskip("open_clip")
    from saevlm_fast.towers.from_open_clip import wrap_open_clip

    torch.manual_seed(1)
    vision = open_clip.CLIPVisionCfg(layers=3, width=WIDTH, head_width=8, patch_size=8, image_size=32)
    text = open_clip.CLIPTextCfg(context_length=8, vocab_size=50, width=16, heads=2, layers=1)
    model = open_clip.CLIP(PROJECTED, vision, text)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.visual.preprocess_cfg = {"size": (32, 32)}
    return wrap_open_clip(model.visual, "open_clip:small")


@pytest.fixture(scope="module", params=[transformers_tower, open_clip_tower])
def tower(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("tower"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_images(save_photos(tmp_path_factory.mktemp("photos"), N))


def text_side(anchors=None):
    """A few words in the space of the images; or those of one, two and three letters at the anchors."""

    def project(texts):
        if anchors is not None:
            return torch.stack([anchors[len(text) % 3] for text in texts])
        return torch.stack([torch.randn(PROJECTED, generator=torch.Generator().manual_seed(len(t))) for t in texts])

    return TextEncoder(
        "words", PROJECTED, 99, lambda text: [1] * 3, None, project, 20.0 if anchors is None else 3000.0, 0.5
    )


def label_set(source, chosen):
    return LabelSet.of([source.label(i) for i in chosen], "folder")


PROMPTS = {"class_0": ["a"], "class_1": ["bb", "cccc"], "class_2": ["ddd"]}


def behaviour(tower, source, point=HERE, tokens="cls", **more):
    chosen = chosen_images(source)
    more = {"label_sets": (label_set(source, chosen),), "prompts": PROMPTS, "batch_size": 7, "workers": 0} | more
    encoder = more.pop("encoder", None) or text_side()
    return Behaviour(tower, source, chosen, point, tokens, encoder, BehaviourOptions(**more))


def known_to_the_tower(tower, source):
    """A text side and labels that the original gets right, so that every ablation costs something."""
    chosen = chosen_images(source)
    found, _ = SplicedImages(tower, HERE, source, chosen, 7, 0).outputs(None, False)
    out = found["", "original"]
    encoder = text_side(out[[0, 9, 17]])
    classes = encoder.embed(["a", "bb", "ddd"])
    names = [f"class_{i}" for i in (torch.nn.functional.normalize(out, dim=1) @ classes.T).argmax(1).tolist()]
    return {"encoder": encoder, "label_sets": (LabelSet.of(names, "folder"),)} | {
        "prompts": {"class_0": ["a"], "class_1": ["bb"], "class_2": ["ddd"]}
    }


def small_sae(seed=0, k=4, d_in=WIDTH):
    sae = SparseAutoencoder(SAEConfig(d_in, 32, k, "topk"))
    sae.reset_parameters(seed)
    return sae.eval()


def identity_sae():
    sae = SparseAutoencoder(SAEConfig(WIDTH, 2 * WIDTH, WIDTH, "topk"), random=False)
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)]))
        sae.W_enc.copy_(sae.W_dec.T)
    return sae.eval()


def inputs_of(tower, source, chosen):
    import io

    from PIL import Image

    return tower.inputs_of([Image.open(io.BytesIO(source.read(i))).convert("RGB") for i in chosen])


def plain_output(tower, inputs):
    with tower.hooked([HookPoint("projection")]) as run:
        return run(inputs)[HookPoint("projection")].clone()


@pytest.mark.parametrize("tokens", ["all", "patches", "cls"])
def test_a_splice_is_the_steering_hook_without_edits(tower, source, tokens):
    chosen, sae = chosen_images(source), small_sae()
    images = SplicedImages(tower, HookPoint("residual", LAYER), source, chosen, 7, 0)
    found, relative = images.outputs(sae, True)
    inputs = inputs_of(tower, source, chosen)
    with torch.inference_mode():
        original = plain_output(tower, inputs)
        with steer(tower.model, sae, LAYER, tokens=tokens):
            expected = plain_output(tower, inputs)
    torch.testing.assert_close(found["", "original"], original, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[tokens, "sae"], expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(found[tokens, "sae_and_error"], found["", "original"])
    assert not torch.equal(found[tokens, "zero"], found[tokens, "mean"])
    assert relative[tokens] > 0


def test_what_is_missing_put_back_recovers_exactly_everything(tower, source):
    figures = behaviour(tower, source, **known_to_the_tower(tower, source)).measure(small_sae()).figures
    assert (figures["status"], figures["n"], figures["output"]) == ("defined", N, "projection")
    assert figures["main"]["tokens"] == "cls"
    defined = []
    for splice in figures["splices"].values():
        back, spliced = splice["variants"]["sae_and_error"], splice["recovered"]["sae_and_error"]["folder"]
        assert back["sets"]["folder"]["kl"]["value"] == 0
        assert back["overlap"]["value"] == back["sets"]["folder"]["agreement"]["value"] == 1
        for each in spliced["ce"].values():
            assert each["status"] == "withheld" or each["value"] == 1
        for name in spliced.keys() - {"ce"}:
            assert spliced[name]["status"] == "withheld" or spliced[name]["value"] == 1
        defined += [name for name, each in spliced["ce"].items() if each["status"] == "defined"]
    assert defined


def test_an_identity_sae_recovers_everything_and_noise_of_its_length_is_none(tower, source):
    splice = behaviour(tower, source).measure(identity_sae()).figures["splices"]["all"]
    assert splice["relative_error"] < 1e-6
    for name in ("sae", "noise"):
        for each in splice["recovered"][name]["folder"]["ce"].values():
            assert each["status"] == "withheld" or each["value"] == pytest.approx(1, abs=1e-3)


def test_cross_entropy_and_its_ratio_by_hand(tower, source):
    chosen, sae = chosen_images(source), small_sae()
    one = behaviour(tower, source)
    splice = one.measure(sae).figures["splices"]["all"]
    out, _ = SplicedImages(tower, HookPoint("residual", LAYER), source, chosen, 7, 0).outputs(sae, True)
    encoder = text_side()
    classes = torch.stack([encoder.embed(PROMPTS[name]).mean(0) for name in sorted(PROMPTS)]).double()
    classes = classes / classes.norm(dim=1, keepdim=True)
    y = torch.tensor([int(source.label(i)[-1]) for i in chosen])

    def ce(out):
        unit = out.double() / out.double().norm(dim=1, keepdim=True)
        return torch.nn.functional.cross_entropy(20 * unit @ classes.T + 0.5, y).item()

    original, spliced = ce(out["", "original"]), ce(out["all", "sae"])
    assert splice["variants"]["sae"]["sets"]["folder"]["ce"]["value"] == pytest.approx(spliced, abs=1e-6)
    for ablation, found in splice["recovered"]["sae"]["folder"]["ce"].items():
        ablated = ce(out["all", ablation])
        assert found["denominator"] == pytest.approx(ablated - original, abs=1e-6)
        if ablated - original >= max(0.05, 0.05 * original):
            assert found["value"] == pytest.approx((ablated - spliced) / (ablated - original), abs=1e-6)
        else:
            assert found["status"] == "withheld"


def test_a_splice_that_nothing_reads_is_withheld(tower, source):
    """The projection is of the CLS token, so that patches after the last block say nothing."""
    figures = behaviour(tower, source, HookPoint("residual", 2)).measure(small_sae()).figures
    for each in figures["splices"]["patches"]["recovered"]["sae"]["folder"]["ce"].values():
        assert (each["status"], each["denominator"]) == ("withheld", 0)
        assert np.isnan(each["value"])


@pytest.mark.parametrize("point", ["mlp", "attention"])
def test_sublayers_are_spliced(tower, source, point):
    splice = behaviour(tower, source, HookPoint(point, LAYER)).measure(small_sae()).figures["splices"]["all"]
    assert splice["variants"]["sae_and_error"]["cosine"]["value"] == pytest.approx(1, abs=1e-12)
    assert splice["variants"]["sae"]["cosine"]["value"] < 1


def test_an_sae_of_the_projection(tower, source):
    figures = behaviour(tower, source, HookPoint("projection")).measure(small_sae(d_in=PROJECTED)).figures
    assert [*figures["splices"]] == ["all"]
    assert 0 < figures["splices"]["all"]["variants"]["sae"]["cosine"]["value"] < 1


def test_ablations_are_made_once_and_batches_do_not_matter(tower, source):
    one, other = behaviour(tower, source), behaviour(tower, source, batch_size=24)
    first, second = one.measure(small_sae()).figures, one.measure(small_sae(1)).figures
    again = other.measure(small_sae(1)).figures
    for tokens, splice in second["splices"].items():
        assert splice["variants"]["mean"] == first["splices"][tokens]["variants"]["mean"]
        for name in ("sae", "zero", "mean"):
            found = [each["splices"][tokens]["variants"][name]["cosine"]["value"] for each in (second, again)]
            assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert one.digest() != other.digest()


def test_without_text_and_labels_there_is_the_output_itself(tower, source):
    alone = Behaviour(tower, source, chosen_images(source), HookPoint("residual", LAYER))
    figures = alone.measure(small_sae()).figures
    assert figures["sets"] == {}
    assert {*figures["main"]} == {"tokens", "cosine", "overlap", "sets", "recovered"}


def test_captions_are_found_again(tower, source):
    chosen = chosen_images(source)
    one = behaviour(tower, source, captions=["x" * (1 + i) for i in range(len(chosen))])
    retrieval = one.measure(small_sae()).figures["original"]["retrieval"]
    assert retrieval["image_to_text"]["5"]["n"] == N


def test_refused_in_one_line(tower, source):
    with pytest.raises(ValueError, match=r"model: residual-1 of .* is 16 wide, and d_in is 8"):
        behaviour(tower, source).measure(small_sae(d_in=8))
    with pytest.raises(ValueError, match="model: pooled cannot be replaced"):
        behaviour(tower, source, HookPoint("pooled"))
    with pytest.raises(ValueError, match="layer: 9"):
        behaviour(tower, source, HookPoint("residual", 9))
    with pytest.raises(ValueError, match="class_prompts: none of 2 labels"):
        behaviour(tower, source, prompts={"class_0": ["a"]})
    with pytest.raises(ValueError, match="images: 1 given"):
        SplicedImages(tower, HookPoint("residual", 0), source, [0])


def test_prompts(tmp_path):
    assert texts_of(["cat"], read_prompts("a {}")) == [["a cat"]]
    file = tmp_path / "p.json"
    file.write_text('{"cat": "a cat", "dog": ["x", "y"]}')
    assert read_prompts(str(file)) == {"cat": ["a cat"], "dog": ["x", "y"]}
    for text in ('{"cat": 3}', "{}", "[]", "{"):
        file.write_text(text)
        with pytest.raises(ValueError, match="class_prompts: "):
            read_prompts(str(file))
    with pytest.raises(ValueError, match="class_prompts: 'cats'"):
        read_prompts("cats")


def test_the_logit_scale_is_the_models_own():
    assert load_text_encoder("hf:tiny-clip").logit_scale == pytest.approx(59.6084, abs=1e-3)


# Probes and neighbours ------------------------------------------------------------------------------------------------


def test_neighbours_against_brute_force():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    found = nearest(x, 3)
    cosine = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=2)
    for i in range(40):
        others = [j for j in torch.argsort(-cosine[i]).tolist() if j != i]
        assert found[i].tolist() == others[:3]
    from scipy.sparse import csr_array

    assert torch.equal(nearest(csr_array(x.double().numpy()), 3), found)
    assert overlap(found, found).tolist() == [1.0] * 40
    assert overlap(found[:1], torch.tensor([[found[0, 0], 99, 98]])).item() == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="k: 40 neighbours of 40"):
        nearest(x, 40)


def test_votes_and_ties():
    labels = torch.tensor([0, 1, 1, 2, -1])
    assert votes(torch.tensor([[1, 2, 0], [0, 3, 4], [3, 0, 4], [4, 4, 0]]), labels, 3).tolist() == [1, 0, 2, 0]


def test_image_text_recall_by_hand():
    texts = torch.eye(3)
    images = torch.tensor([[1.0, 0, 0], [0, 1, 0.9], [0.5, 0.6, 0.1], [1, 0.1, 0]])
    found = image_text_recall(images, texts, torch.tensor([0, 2, 0, 0]), (1, 2))
    assert [found["image_to_text"][k]["value"] for k in ("1", "2")] == [0.5, 1.0]
    assert found["text_to_image"]["1"]["n"] == 2  # the second text is no image's
    assert found["text_to_image"]["1"]["value"] == 1


def test_a_ratio_is_withheld_and_never_clamped():
    assert ratio(np.ones(9), np.zeros(9), 0.05)["status"] == "withheld"
    assert ratio(np.full(9, 3.0), np.ones(9), 0.05)["value"] == 3
    assert ratio(-np.ones(9), np.ones(9), 0.05)["interval"] == [-1, -1]
    better = kept(np.ones(10, bool), np.arange(10) < 8, 0.5)
    assert better["value"] == pytest.approx(0.5 / 0.3)
    assert kept(np.ones(9, bool), np.arange(9) < 4, 0.5)["status"] == "withheld"


def test_a_probe_names_labels_and_takes_sparse_codes():
    from scipy.sparse import csr_array

    generator = np.random.default_rng(0)
    y = np.arange(200) % 4
    x = np.eye(4)[y] + 0.1 * generator.normal(size=(200, 4))
    ids = [str(i) for i in range(200)]
    split = ProbeSet.of(LabelSet.of([f"l{i}" for i in y]), halves(ids))
    assert split.right(split.fit(x), x).mean() == 1
    sparse = csr_array(np.where(x > 0.5, x, 0))
    assert split.right(split.fit(sparse), sparse).mean() > 0.95
    assert ProbeSet.of(LabelSet.of(["a"] * 200), halves(ids)) is None
    assert ProbeSet.of(LabelSet.of([["a", "b"]] * 200), halves(ids)) is None
    assert Probe.fit(np.zeros((6, 2)), np.arange(6) % 2).right(np.zeros((6, 2)), np.zeros(6)).shape == (6,)

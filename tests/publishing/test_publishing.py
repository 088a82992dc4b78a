"""Cards, push and pull: against a Hub on this machine, there and back."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from command import files_below, run, run_json
from hub_server import TOKEN, hub_server
from saevlm_fast.config import SAEConfig, TrainConfig
from saevlm_fast.publishing.card import is_ours, is_sealed, plain, sealed, table, write_card
from saevlm_fast.publishing.facts import Facts, public
from saevlm_fast.publishing.pull import default_output
from saevlm_fast.publishing.push import Push, merged
from saevlm_fast.sae import SparseAutoencoder, with_metadata

HOSTILE = "evil | cell\n\n# head <script>x</script> [l](http://x) `c` \x1b[31m **b** https://auto.link"
SOURCE = {
    "point": "residual",
    "layer": 11,
    "tokens": "cls",
    "model": {"spec": "hf:openai/clip-vit-large-patch14", "class": "CLIPVisionModel", "weights_sha256": "ab" * 32},
    "images": {"path": "/home/somebody/data/imagenet_train", "images": 1000},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that the command line made."""
    root = tmp_path_factory.mktemp("trained")
    np.save(root / "x.npy", np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32))
    run(*train_words(root))
    return root


def train_words(root, *more):
    size = "--d-sae", 16, "--k", 2, "--steps", 4, "--batch-size", 32, "--device", "cpu"
    return "train", "--activations", root / "x.npy", "--output", root / "run", *size, *more


@pytest.fixture
def sae(tmp_path):
    """An SAE directory that says where it is of."""
    made = SparseAutoencoder(SAEConfig(8, 16, 2, "topk"))
    with_metadata(made, source=SOURCE, norm_factor=3.5, training={"steps": 7, "lr": None, "seed": 0})
    made.save_pretrained(tmp_path / "layer_11")
    return tmp_path / "layer_11"


@pytest.fixture
def hub(tmp_path):
    with hub_server(tmp_path / "cache") as server:
        yield server


def front_of(text):
    return yaml.safe_load(text.split("---\n")[1])


# Cards ----------------------------------------------------------------------------------------------------------------


def test_a_trained_sae_has_a_card(trained):
    text = (trained / "run" / "README.md").read_text()
    assert is_sealed(text)
    for part in (
        "8 -> 16, k = 2",
        "| steps | 4 |",
        "| lr | 0.0064 |",
        "| explained variance |",
        "rows (of what it was trained on)",
        "x.npy",
    ):
        assert part in text
    assert str(trained) not in text
    front = front_of(text)
    assert front["library_name"] == "saelens"
    assert front["pipeline_tag"] == "image-feature-extraction"
    assert "base_model" not in front


@pytest.mark.parametrize(
    ("architecture", "has", "lacks"),
    [
        ("batch_topk", {"lr", "warmup_steps", "auxk_alpha", "threshold_start"}, {"l1", "sparsity_warmup"}),
        ("topk", {"lr", "auxk_alpha"}, {"threshold_start", "target_l0"}),
        ("relu", {"lr", "l1", "sparsity_warmup"}, {"auxk_alpha", "threshold_beta", "bandwidth"}),
        ("jumprelu", {"target_l0", "bandwidth", "sparsity_warmup", "auxk_alpha"}, {"l1", "threshold_start"}),
    ],
)
def test_the_recipe_is_what_the_run_used(architecture, has, lacks):
    """With values that were not given, as the learning rate's, and none of other architectures."""
    k = 2 if "topk" in architecture else None
    used = TrainConfig(steps=50).used(SAEConfig(8, 1 << 14, k, architecture))
    assert has <= used.keys()
    assert not lacks & used.keys()
    assert (used["lr"], used["warmup_steps"]) == (2e-4, 5)


def test_a_card_is_the_same_of_the_same_run_and_what_people_wrote_stays(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    readme = tmp_path / "run" / "README.md"
    before = readme.read_bytes()
    run(*train_words(tmp_path, "--resume"))
    assert readme.read_bytes() == before
    readme.write_bytes(before.replace(b"Nothing else", b"") + b"\nAnd a word of mine.\n")
    mine = readme.read_bytes()
    for more in ("--resume", "--force"):
        assert "README.md was written or changed by hand: it stays as it is" in run(*train_words(tmp_path, more))
        assert readme.read_bytes() == mine
    readme.unlink()
    readme.symlink_to(tmp_path / "elsewhere.md")
    assert not write_card(tmp_path / "run")
    assert not (tmp_path / "elsewhere.md").exists()


def test_a_damaged_table_of_scores_costs_a_card_and_no_run(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    (tmp_path / "run" / "scores.parquet").write_text("none")
    os.utime(tmp_path / "run" / "scores.parquet", (1 << 32, 1 << 32))  # not of before the weights
    assert "scores.parquet: no table of scores" in run(*train_words(tmp_path, "--resume"), code=0)


def test_what_a_card_says_of_its_origin(sae):
    write_card(sae)
    text = (sae / "README.md").read_text()
    front = front_of(text)
    assert front["base_model"] == "openai/clip-vit-large-patch14"
    assert {"sparse-autoencoder", "sae", "mechanistic-interpretability", "vision", "topk"} < set(front["tags"])
    assert "clip-vit-large-patch14" in front["tags"]
    for part in ("residual of layer 11, tokens cls", "| images | imagenet\\_train |", "| steps | 7 |", "3.5"):
        assert part in text
    assert "/home/somebody" not in text
    assert "lr" not in text.split("## Recipe")[1].split("##")[0]


def test_scores_and_the_picture_are_in_a_card(sae):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"ms": [0.5, float("nan"), 0.7]}), sae / "scores.parquet")
    (sae / "latents.png").write_bytes(b"png")
    write_card(sae)
    text = (sae / "README.md").read_text()
    assert "| Monosemanticity Score, mean | 0.6000 of 2 latents |" in text
    assert "| Monosemanticity Score, best | 0.7000 |" in text
    assert "](latents.png)" in text
    os.utime(sae / "scores.parquet", (1, 1))
    assert not Facts.of(sae).scores, "of before these weights"


def test_other_peoples_text_means_nothing_in_a_card(tmp_path):
    made = SparseAutoencoder(SAEConfig(8, 16, 2, "topk"))
    with_metadata(
        made,
        source={
            "point": HOSTILE,
            "layer": HOSTILE,
            "tokens": HOSTILE,
            "model": {"spec": HOSTILE},
            "images": {"path": HOSTILE},
        },
        training={HOSTILE: HOSTILE},
    )
    made.save_pretrained(tmp_path / "sae")
    write_card(tmp_path / "sae")
    text = (tmp_path / "sae" / "README.md").read_text()
    assert "\x1b" not in text
    for line in text.split("---\n", 2)[2].splitlines():
        assert "<script" not in line.replace("\\<", "")
        assert "https:" not in line.replace("[arXiv 2504.02821](https://", "")
        if line.startswith("| "):
            assert line.replace("\\|", "").count("|") == 3
    assert front_of(text)["library_name"] == "saelens"


def test_markdown_and_public_records():
    assert plain("a|b\nc`d`") == "a\\|b\\\\x0ac\\`d\\`"
    assert table(("a", "b"), [(1, "x|y")]).splitlines()[-1] == "| 1 | x\\|y |"
    said = {
        "a": "hf:/home/me/clip",
        "b": ["/x/y/", "~/q", "rel/x", "https://a.b/c", "hf:org/name", 3],
        "c": {"d": "/e"},
    }
    assert public(said) == {
        "a": "hf:clip",
        "b": ["y", "q", "rel/x", "https://a.b/c", "hf:org/name", 3],
        "c": {"d": "e"},
    }


# There and back -------------------------------------------------------------------------------------------------------


def test_a_push_and_a_pull(hub, sae, tmp_path):
    told = run("push", sae, "me/saes", "--licence", "cc-by-4.0")
    repo = hub.repos["me/saes"]
    assert f"commit {repo.branches['main']}" in told
    assert 'SAE.from_pretrained("me/saes", "layer_11")' in told
    files = repo.files()
    names = {"cfg.json", "sae_weights.safetensors", "README.md"}
    assert set(files) == {".gitattributes", "README.md", *(f"layer_11/{name}" for name in names)}
    assert len(repo.commits) == 2, "one commit"
    readme = files["README.md"].decode()
    assert front_of(readme)["license"] == "cc-by-4.0"
    assert "[layer\\_11](layer_11/README.md)" in readme
    assert b"somebody" not in files["layer_11/cfg.json"]
    assert "somebody" not in readme
    found = run_json("pull", "hf:me/saes", "--output", tmp_path / "back")
    assert found["sha"] == repo.branches["main"]
    back, before = (SparseAutoencoder.from_pretrained(path) for path in (tmp_path / "back", sae))
    assert back.config.metadata["hub"] == {"repo": "me/saes", "sha": found["sha"], "path": "layer_11"}
    for name, tensor in before.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)
    digests = [json.loads((path / "cfg.json").read_text())["weights_sha256"] for path in (tmp_path / "back", sae)]
    assert digests[0] == digests[1]
    assert hub.tokens == {TOKEN}
    assert TOKEN not in told + json.dumps(found) + "".join(
        str(each) for each in files_below(tmp_path / "back").values()
    )


def test_the_same_push_again_changes_nothing(hub, sae):
    run("push", sae, "me/saes")
    head = hub.repos["me/saes"].branches["main"]
    assert run_json("push", sae, "me/saes") | {"url": ""} == {
        "repo": "me/saes",
        "sae_id": "layer_11",
        "sha": head,
        "url": "",
        "changed": False,
    }
    assert len(hub.repos["me/saes"].commits) == 2


def test_another_sae_joins_and_none_is_replaced_unasked(hub, sae):
    run("push", sae, "me/saes")
    run("push", sae, "me/saes", "--sae-id", "deep/layer_12")
    readme = hub.repos["me/saes"].files()["README.md"].decode()
    assert is_sealed(readme)
    assert readme.count("](layer_11/README.md)") == readme.count("](deep/layer_12/README.md)") == 1
    before = hub.repos["me/saes"].branches["main"]
    SparseAutoencoder(SAEConfig(8, 24, 3, "topk")).save_pretrained(sae)
    for more in ((), ("--dry-run",)):
        text = run("push", sae, "me/saes", *more, code=2)
        assert "sae_id: me/saes has another SAE at layer_11; --force replaces it, in a new commit" in text
    assert hub.repos["me/saes"].branches["main"] == before
    run("push", sae, "me/saes", "--force")
    readme = hub.repos["me/saes"].files()["README.md"].decode()
    assert "topk, 8 -> 24" in readme
    assert readme.count("](layer_11/README.md)") == 1
    assert before in hub.repos["me/saes"].commits, "the old one is in the history"


def test_a_readme_of_a_person_is_kept(hub, sae):
    mine = "---\nlicense: mit\ntags:\n- mine\ncustom: [1, 2]\n---\n# My SAEs\n\nThey are nice.\n"
    hub.add("me/saes", {"README.md": mine.encode()})
    run("push", sae, "me/saes", "--licence", "apache-2.0")
    readme = hub.repos["me/saes"].files()["README.md"].decode()
    front = front_of(readme)
    assert (front["license"], front["custom"], front["tags"][0]) == ("mit", [1, 2], "mine")
    assert front["library_name"] == "saelens"
    assert "# My SAEs\n\nThey are nice.\n\n## SAEs of this repository\n" in readme
    assert not is_sealed(readme)
    again = merged(readme, Push(sae, "me/saes", licence="apache-2.0"), Facts.of(sae))
    assert again == readme


def test_a_card_that_a_person_changed_is_pushed_as_it_is(hub, sae):
    (sae / "README.md").write_text("Mine.\n")
    run("push", sae, "me/saes")
    assert hub.repos["me/saes"].files()["layer_11/README.md"] == b"Mine.\n"
    assert b"# layer\\_11" in hub.repos["me/saes"].files()["README.md"]


def test_a_branch_of_its_own(hub, sae, tmp_path):
    run("push", sae, "me/saes", "--revision", "try/one", "--private")
    assert hub.repos["me/saes"].private
    assert set(hub.repos["me/saes"].files()) == {".gitattributes"}
    text = run("pull", "hf:me/saes@try%2Fone/layer_11", "--output", tmp_path / "back")
    assert "warning: try/one may move; hf:me/saes@" in text
    sha = hub.repos["me/saes"].branches["try/one"]
    assert "may move" not in run("pull", f"hf:me/saes@{sha}", "--output", tmp_path / "pinned")
    hub.repos["me/saes"].private = False
    assert "private: me/saes is there already, and public" in run("push", sae, "me/saes", "--private", code=2)


def test_dry_runs_write_nothing_anywhere(hub, sae, tmp_path):
    before = files_below(tmp_path)
    figures = run_json("push", sae, "me/saes", "--dry-run")
    assert figures["files"] == [
        "README.md",
        *(f"layer_11/{x}" for x in ("README.md", "cfg.json", "sae_weights.safetensors")),
    ]
    assert not hub.repos
    assert {method for method, _ in hub.log} == {"GET"}
    assert files_below(tmp_path) == before
    run("push", sae, "me/saes")
    before = files_below(tmp_path)
    figures = run_json("pull", "hf:me/saes", "--output", tmp_path / "back", "--dry-run")
    assert figures["download_bytes"] == figures["disk_bytes"] > 1000
    assert files_below(tmp_path) == before


# What goes wrong ------------------------------------------------------------------------------------------------------


def test_an_upload_that_is_cut_is_tried_again(hub, sae, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.cut_uploads = 2
    run("push", sae, "me/saes")
    assert hub.count("PUT", "/lfs/") == 3


def test_an_upload_that_stays_cut_is_finished_by_the_same_push(hub, sae, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.cut_uploads = 100
    text = run("push", sae, "me/saes", code=2)
    assert text.splitlines()[-1].startswith("error: hf:me/saes: ")
    assert set(hub.repos["me/saes"].files()) == {".gitattributes"}, "no half of it"
    hub.cut_uploads = 0
    run("push", sae, "me/saes")
    assert "layer_11/cfg.json" in hub.repos["me/saes"].files()


def test_of_two_pushes_at_once_the_second_is_refused_and_replaces_nothing(hub, sae):
    hub.add("me/saes", {})
    hub.before_commit = lambda: hub.add("me/saes", {"README.md": b"of somebody else", "x/cfg.json": b"{}"})
    text = run("push", sae, "me/saes", code=2)
    assert "error: hf:me/saes: somebody else has changed it meanwhile; do it again" in text
    assert hub.repos["me/saes"].files()["README.md"] == b"of somebody else"
    run("push", sae, "me/saes")
    assert hub.count("PUT", "/lfs/") == 1, "the weights were there already"
    files = hub.repos["me/saes"].files()
    assert files["README.md"].startswith(b"---\nlibrary_name: saelens\n")
    assert b"of somebody else" in files["README.md"]
    assert "x/cfg.json" in files


@pytest.mark.parametrize("token", ["hf_" + "w" * 30, ""])
def test_no_right_to_write(hub, sae, token, monkeypatch):
    hub.add("me/saes", {})
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    for repo in ("me/saes", "me/new"):
        text = run("push", sae, repo, code=2)
        assert "hf auth login" in text or "a token with the right to write" in text
        assert text.count("error: ") == 1
        assert not token or token not in text


def test_no_network(hub, sae, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "error: hf:me/saes: http://127.0.0.1:9 does not answer" in run("push", sae, "me/saes", code=2)
    assert "not in the cache" in run("pull", "hf:me/saes", "--output", tmp_path / "x", code=2)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("me",), "repo: 'me' is not of the form user/repo"),
        (("me/saes", "--sae-id", "../x"), "sae_id: '../x' is not of letters, digits"),
        (("me/saes", "--sae-id", "a b"), "sae_id: 'a b' is not of letters, digits"),
        (("me/saes", "--licence", "My Own"), "licence: 'My Own' is no name of the Hub's"),
        (("me/saes", "--revision", "my branch"), "revision: 'my branch' is no name of a branch"),
    ],
)
def test_names_that_cannot_be(sae, more, message):
    assert message in run("push", sae, *more, code=2)


def test_weights_that_are_not_those_of_the_settings_are_not_pushed(hub, sae):
    weights = sae / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert "sae_weights.safetensors: altered" in run("push", sae, "me/saes", code=2)
    assert "no such file" in run("push", sae / "none", "me/saes", code=2)
    assert not hub.log


def test_what_the_hub_holds_is_checked_before_it_is_written(hub, sae, tmp_path):
    run("push", sae, "me/saes")
    files = hub.repos["me/saes"].files()
    weights = files["layer_11/sae_weights.safetensors"]
    hub.repos["me/saes"].commit({**files, "layer_11/sae_weights.safetensors": weights[:-1] + b"\x01"})
    assert "sae_weights.safetensors: altered" in run("pull", "hf:me/saes", "--output", tmp_path / "x", code=2)
    hub.repos["me/saes"].commit(files)
    shutil.rmtree(tmp_path / "cache")
    hub.corrupt = {"layer_11/sae_weights.safetensors"}
    assert "was damaged on the way" in run("pull", "hf:me/saes", "--output", tmp_path / "x", code=2)
    assert not (tmp_path / "x").exists()


def test_a_pull_replaces_an_sae_and_nothing_else(hub, sae, tmp_path):
    run("push", sae, "me/saes")
    words = "pull", "hf:me/saes/layer_11", "--output", tmp_path / "x"
    run(*words)
    assert "x already exists; --force replaces it" in run(*words, code=2)
    run(*words, "--force")
    (tmp_path / "x" / "mine.txt").write_text("mine")
    assert "x holds mine.txt, and nothing but an SAE is replaced" in run(*words, "--force", code=2)
    (tmp_path / "file").write_text("mine")
    assert "file already exists" in run(*words, "--force", "--output", tmp_path / "file", code=2)
    assert (tmp_path / "file").read_text() == "mine"
    assert "is none of the Hub" in run("pull", "layer_11", "--output", tmp_path / "y", code=2)


def test_a_pull_makes_the_folders_above_its_directory(hub, sae, tmp_path):
    run("push", sae, "me/saes")
    run("pull", "hf:me/saes/layer_12", "--output", tmp_path / "a" / "b" / "x", code=2)
    assert not (tmp_path / "a").exists()
    run("pull", "hf:me/saes/layer_11", "--output", tmp_path / "a" / "b" / "x")
    SparseAutoencoder.from_pretrained(tmp_path / "a" / "b" / "x")


def test_sae_options_take_a_place_on_the_hub(hub, trained, tmp_path):
    run("push", trained / "run", "me/saes")
    files = "--activations", trained / "x.npy", "--embeddings", trained / "x.npy"
    assert "output: needed with --raw, --codes or an SAE of the Hub" in run(
        "ms-score", "--sae", "hf:me/saes", *files, code=2
    )
    found = run_json("ms-score", "--sae", "hf:me/saes", *files, "--output", tmp_path / "s.json", "--device", "cpu")
    assert found["sae"] == "hf:me/saes"
    assert "hf:me/saes" in (tmp_path / "s.json.settings.toml").read_text()
    assert str(Path.cwd()) + "/hf" not in (tmp_path / "s.json.settings.toml").read_text()


def test_where_a_pull_goes_by_itself():
    assert default_output("hf:me/saes@v1/a/layer_11") == Path("layer_11")
    assert default_output("hf:me/saes@v1") == Path("saes")
    assert default_output("hf:me/saes/x.pt") == Path("x")


def test_the_seal_of_a_card(tmp_path):
    (tmp_path / "README.md").write_text(sealed("text\n"))
    assert is_ours(tmp_path / "README.md")
    assert not is_sealed(sealed("text\n").replace("text", "test"))
    assert not is_ours(tmp_path / "none.md")

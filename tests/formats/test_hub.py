"""formats/hub.py: what a place on the Hub names, pinned to a commit, compared with what the Hub lists, or refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from command import ROOT
from command import run as run_command
from hub_server import TOKEN, hub_server
from saevlm_fast.config import SAEConfig
from saevlm_fast.formats import hub as module
from saevlm_fast.formats import places
from saevlm_fast.formats.hub import candidates, files_of, look_up, resolve
from saevlm_fast.formats.places import HubSpec, is_remote, parse_spec
from saevlm_fast.formats.sae_header import read_sae_header, sae_digest
from saevlm_fast.inspection import inspect
from saevlm_fast.publishing.pull import pull
from saevlm_fast.sae import SparseAutoencoder

SAE_FILES = ("cfg.json", "sae_weights.safetensors")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Of an SAE, as a repository holds them below a folder."""
    directory = tmp_path_factory.mktemp("sae")
    SparseAutoencoder(SAEConfig(6, 12, 2, "topk")).save_pretrained(directory)
    return {name: (directory / name).read_bytes() for name in SAE_FILES}


def below(folder, files):
    return {f"{folder}/{name}": data for name, data in files.items()}


@pytest.fixture
def hub(tmp_path):
    with hub_server(tmp_path / "cache") as server:
        yield server


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("hf:a/b", HubSpec("a/b", None, None)),
        ("hf:a/b/", HubSpec("a/b", None, None)),
        ("hf:a/b@v1", HubSpec("a/b", "v1", None)),
        ("hf:a/b/c/d.pt", HubSpec("a/b", None, "c/d.pt")),
        ("hf:a/b@x%2Fy/c", HubSpec("a/b", "x/y", "c")),
        ("hf:a/b@refs/pr/3/c", HubSpec("a/b", "refs/pr/3", "c")),
        ("hf:a/b/layer_11 [x]", HubSpec("a/b", None, "layer_11 [x]")),
    ],
)
def test_the_parts_of_a_place(spec, expected):
    assert parse_spec(spec) == expected
    assert is_remote(spec)
    assert is_remote(Path(spec))


@pytest.mark.parametrize(
    "spec", ["hf:", "hf:a", "hf:a/b/../c", "hf:a/b/c/..", "hf:a/b/c\\d", "hf:/a/b", "hf:a/b/\x1b[1m", "hf:a/b@..%2F/c"]
)
def test_no_place(spec):
    with pytest.raises(ValueError, match="hf:"):
        resolve(spec)


def test_a_plain_path_is_itself(tmp_path):
    assert resolve(tmp_path / "none").path == tmp_path / "none"
    assert resolve("runs/x").record() == {}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["cfg.json", "sae_weights.safetensors", "README.md"], [""]),
        (["a/cfg.json", "a/sae_weights.safetensors", "a/sparsity.safetensors"], ["a"]),
        (["layers.10/cfg.json", "layers.10/sae.safetensors", "optimizer_0.pt", "state.pt"], ["layers.10"]),
        (["t/trainer_0/config.json", "t/trainer_0/ae.pt"], ["t/trainer_0"]),
        (["config.json", "sae_weights.safetensors", "sae_weights.pt"], [""]),
        (["layer0.sae.pt", "layer1.sae.pt"], ["layer0.sae.pt", "layer1.sae.pt"]),
        (["x/layer_0/width_16k/average_l0_10/params.npz"], ["x/layer_0/width_16k/average_l0_10"]),
        (["README.md", "pictures/a.png"], []),
    ],
)
def test_candidates_by_names(names, expected):
    assert candidates(names) == expected


def test_files_that_an_sae_needs():
    names = ["a/cfg.json", "a/w.safetensors", "a/optimizer_0.pt", "a/b/c.txt", "b/w.pt", "config.json", "b/x.yaml"]
    assert files_of("a", names) == ["a/cfg.json", "a/w.safetensors", "a/b/c.txt", "config.json"]
    assert files_of("b/w.pt", names) == ["b/w.pt", "config.json", "b/x.yaml"]
    assert files_of("", names) == ["config.json"]


def test_an_sae_is_loaded_by_its_place_and_remembers_it(hub, files):
    sha = hub.add("user/saes", below("layer_3/[a]*", files) | below("layer_3/a", {"cfg.json": b"other"}))
    told = []
    found = resolve("hf:user/saes", on_message=told.append)
    assert (found.repo, found.sha, found.sae_id, found.revision) == ("user/saes", sha, "layer_3/[a]*", "main")
    assert not (found.path.parent / "a").exists(), "a [ in a name is no pattern"
    assert len(told) == 1
    assert "downloading 2 files" in told[0]
    n = len(hub.log)
    sae = SparseAutoencoder.from_pretrained("hf:user/saes/layer_3/[a]*")
    assert sae.config.metadata["hub"] == {"repo": "user/saes", "sha": sha, "path": "layer_3/[a]*"}
    assert [path for _, path in hub.log[n:] if "/resolve/" in path] == [], "it is in the cache"
    assert read_sae_header("hf:user/saes").config.d_sae == 12
    assert sae_digest("hf:user/saes") == sae_digest(found.path)
    assert torch.equal(sae.W_dec, SparseAutoencoder.from_pretrained(found.path).W_dec)


def test_a_branch_that_moves_gives_no_mixture(hub, files):
    old = hub.add("user/saes", below("a", files))
    first = resolve("hf:user/saes/a")
    new = hub.add("user/saes", below("a", {**files, "cfg.json": files["cfg.json"] + b"\n"}))
    assert resolve(f"hf:user/saes@{old}/a") == first._replace(revision=None)
    assert resolve("hf:user/saes/a").sha == new
    assert (first.path / "cfg.json").read_bytes() == files["cfg.json"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf:user/none", "has no repository user/none, or it is private"),
        ("hf:user/private", "has no repository user/private, or it is private"),
        ("hf:user/gated/a", "user/gated is gated and not open to you; accept its conditions at http"),
        ("hf:user/saes@v9", "user/saes has no revision 'v9'"),
        ("hf:user/saes/c", "user/saes has no 'c' at "),
        ("hf:user/saes/aa/sa", "user/saes has no 'aa/sa' at "),
        ("hf:user/saes", "which SAE? it holds aa/sae, b; give hf:user/saes/aa/sae"),
        ("hf:user/empty", "no SAE is in user/empty at "),
        ("hf:.bad/-name", "is no name of a repository"),
    ],
)
def test_what_is_refused_in_one_line(hub, files, spec, message, monkeypatch):
    hub.add("user/saes", below("aa/sae", files) | below("b", files))
    hub.add("user/private", below("a", files), private=True)
    hub.add("user/gated", below("a", files), gated=True)
    hub.add("user/empty", {"README.md": b""})
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    with pytest.raises(ValueError, match="hf:") as refused:
        resolve(spec)
    text = str(refused.value)
    assert message in text
    assert text.startswith(f"{spec}: ")
    assert "\n" not in text
    assert "somebody_else" not in text


def test_a_near_name_is_suggested(hub, files):
    hub.add("user/saes", below("layer_11", files))
    with pytest.raises(ValueError, match="did you mean 'layer_11'"):
        resolve("hf:user/saes/layer_1")


@pytest.mark.parametrize("how", ["down", "offline", "local_files_only", "no network"])
def test_without_the_hub_the_cache_serves(hub, files, how, monkeypatch):
    from huggingface_hub import constants

    hub.add("user/saes", below("a", files) | below("b", files | {"cfg.json": b"{}"}))
    before = resolve("hf:user/saes/a")
    told, local = [], how == "local_files_only"
    if how == "down":
        hub.down = True
    elif how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "no network":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    n = len(hub.log)
    assert resolve("hf:user/saes/a", local_files_only=local, on_message=told.append) == before
    assert resolve("hf:user/saes", local_files_only=local).sae_id == "a", "the only one in the cache"
    assert ("does not answer" in "".join(told)) == (how in ("down", "no network"))
    for spec in ("hf:user/saes/b", "hf:user/saes@v2/a", "hf:user/other", f"hf:user/saes@{'0' * 40}/a"):
        with pytest.raises(ValueError, match="not in the cache") as refused:
            resolve(spec, local_files_only=local)
        for part in (str(module._repo_cache(spec[3:].split("/")[0] + "/x").parent), "cfg.json and ", "/tree/"):
            assert part in str(refused.value)
        assert "\n" not in str(refused.value)
    if how in ("offline", "local_files_only"):
        assert len(hub.log) == n, "nothing is asked"


def test_half_an_sae_in_the_cache_is_none(hub, files):
    hub.add("user/saes", below("a", files))
    (resolve("hf:user/saes/a").path / "sae_weights.safetensors").unlink()
    with pytest.raises(ValueError, match=r"not in the cache's commit .*a/sae_weights\.safetensors"):
        resolve("hf:user/saes/a", local_files_only=True)


def test_a_download_that_is_cut_goes_on(hub, files):
    hub.add("user/saes", below("a", files))
    hub.cut_downloads = 2
    found = resolve("hf:user/saes/a")
    assert (found.path / "sae_weights.safetensors").read_bytes() == files["sae_weights.safetensors"]
    assert hub.count("GET", "/resolve/") == 4


@pytest.mark.parametrize("name", SAE_FILES)
def test_bytes_that_are_not_the_hubs_are_noticed_and_not_kept(hub, files, name):
    hub.add("user/saes", below("a", files))
    hub.corrupt = {f"a/{name}"}
    for _ in range(2):  # not even by asking again
        with pytest.raises(ValueError, match=f"hf:user/saes/a: a/{name} was damaged on the way"):
            resolve("hf:user/saes/a")
    hub.corrupt = set()
    assert SparseAutoencoder.from_pretrained("hf:user/saes/a").config.k == 2


def test_a_listing_with_paths_out_of_the_repository(hub, files):
    hub.add("user/saes", below("a", files) | {"../../x/sae_weights.safetensors": b"x", "/y/ae.pt": b"y"})
    assert look_up("hf:user/saes").sae_id == "a"
    with pytest.raises(ValueError, match="is no place in a repository"):
        resolve("hf:user/saes/../../x")


def test_environment_endpoint_home_and_token(hub, files, tmp_path):
    """In a process of its own, where huggingface_hub reads them; the token is sent and not said."""
    sha = hub.add("user/private", below("a", files), private=True)
    code = "from saevlm_fast.formats.hub import resolve; print(resolve('hf:user/private', on_message=print))"
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    environment.pop("HF_HUB_CACHE")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert f"{tmp_path}/home/hub/models--user--private/snapshots/{sha}/a" in done.stdout
    assert hub.tokens == {TOKEN}
    assert TOKEN not in done.stdout + done.stderr
    assert TOKEN not in "".join(path.read_text() for path in (tmp_path / "home").rglob("*.json"))


def test_a_password_in_the_endpoint_is_not_shown(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "https://me:secret@mirror.example/hub")
    assert module.endpoint() == "https://mirror.example/hub"


RELEASES = """\
first-release:
  model: gpt2
  repo_id: nobody/first
  saes:
  - id: blocks.0.hook
    path: blocks.0
    l0: 3
vision:
  conversion_func: null
  repo_id: user/saes
  saes:
  - id: layer/3
    path: a
    norm_scaling_factor: 0.5
  - {id: whole, path: .}
broken:
  repo_id: [1
"""


@pytest.fixture
def sae_lens(tmp_path, monkeypatch):
    package = tmp_path / "site" / "sae_lens"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('it is not imported')")
    (package / "pretrained_saes.yaml").write_text(RELEASES)
    monkeypatch.delitem(sys.modules, "sae_lens", raising=False)  # the real one
    monkeypatch.syspath_prepend(str(package.parent))


def test_a_release_of_sae_lens_by_its_list(hub, files, sae_lens):
    sha = hub.add("user/saes", below("a", files) | files)
    found = resolve("saelens:vision/layer/3")
    assert found.record() == {"repo": "user/saes", "sha": sha, "path": "a", "release": "vision"}
    assert SparseAutoencoder.from_pretrained("saelens:vision/layer/3").config.metadata["hub"] == found.record()


def test_what_the_list_says_of_scaling_is_folded_where_the_files_leave_it_open(hub, files, sae_lens, tmp_path):
    cfg = json.loads(files["cfg.json"])
    open_cfg = {name: cfg[name] for name in cfg if "sha256" not in name}
    open_cfg["normalize_activations"] = "expected_average_only_in"
    plain = resolve_and_load(hub, files)
    scaled = resolve_and_load(hub, {**files, "cfg.json": json.dumps(open_cfg).encode()})
    torch.testing.assert_close(scaled.W_enc, plain.W_enc * 0.5)
    torch.testing.assert_close(scaled.W_dec, plain.W_dec / 0.5)
    spec = "saelens:vision/layer/3"
    assert "doubts" not in read_sae_header(spec).config.metadata
    assert inspect(spec)["doubts"] == []
    pull(spec, tmp_path / "pulled")
    run_command("convert", spec, tmp_path / "converted")
    for output in ("pulled", "converted"):
        kept = SparseAutoencoder.from_pretrained(tmp_path / output)
        assert torch.equal(kept.W_enc, scaled.W_enc), output
        assert kept.config.metadata["hub"]["release"] == "vision"


def resolve_and_load(hub, files):
    hub.add("user/saes", below("a", files))
    return SparseAutoencoder.from_pretrained("saelens:vision/layer/3")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("saelens:vision", "not of the form saelens:release/sae_id"),
        ("saelens:visiom/x", "has no release 'visiom'; did you mean 'vision'"),
        ("saelens:vision/layer/4", "release vision has no SAE 'layer/4'; did you mean 'layer/3'"),
        ("saelens:vision/zzz", "release vision has no SAE 'zzz'; it has layer/3, whole"),
        ("saelens:broken/x", "does not list broken as it used to"),
    ],
)
def test_no_release(sae_lens, spec, message):
    with pytest.raises(ValueError, match="saelens:") as refused:
        resolve(spec)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_sae_lens_is_not_installed(monkeypatch):
    monkeypatch.setattr(places, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install sae-lens, or give hf:user/repo/sae_id"):
        resolve("saelens:vision/a")

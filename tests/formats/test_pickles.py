"""Pickles: read as data alone, or refused by name."""

import os
import pickle
import sys
import types
import zipfile

import pytest
import torch

from saevlm_fast.formats.pickles import Stub, load_pickle, state_dict


class Settings:
    """Stands for a class of a library, under whatever name a test gives it."""

    def __init__(self):
        self.d_in = 4


class Attack:
    """Runs a command when it is unpickled by a loader that runs anything."""

    def __reduce__(self):
        return os.system, ("touch attacked",)


def settings_named(name):
    module, _, short = name.rpartition(".")
    return type(short, (Settings,), {"__module__": module, "__qualname__": short})()


@pytest.fixture
def pickled(tmp_path, monkeypatch):
    """A file with tensors and an object of settings of that name."""

    def save(name, **options):
        thing = settings_named(name)
        module, _, short = name.rpartition(".")
        for each in [module.rsplit(".", n)[0] for n in range(module.count("."), -1, -1)]:
            monkeypatch.setitem(sys.modules, each, types.ModuleType(each))
        setattr(sys.modules[module], short, type(thing))
        path = tmp_path / "sae.pt"
        torch.save({"cfg": thing, "state_dict": {"W_enc": torch.eye(3)}}, path, **options)
        return path

    return save


@pytest.mark.parametrize("zipped", [True, False])
def test_known_settings_are_read_as_data(pickled, zipped):
    path = pickled("vit_prisma.sae.config.VisionModelSAERunnerConfig", _use_new_zipfile_serialization=zipped)
    loaded = load_pickle(path)
    assert isinstance(loaded["cfg"], Stub)
    assert vars(loaded["cfg"])["d_in"] == 4
    assert torch.equal(loaded["state_dict"]["W_enc"], torch.eye(3))


@pytest.mark.parametrize("zipped", [True, False])
def test_other_names_are_refused_unless_they_are_trusted(pickled, zipped):
    path = pickled("strange.lib.Config", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"needs strange\.lib\.Config, .* --trust-pickle strange\.lib\.Config"):
        load_pickle(path)
    with pytest.raises(ValueError, match=r"needs strange\.lib\.Config"):
        load_pickle(path, ("strange.lib.Other",))
    for trust in (True, ("strange.lib.Config",)):
        assert vars(load_pickle(path, trust)["cfg"])["d_in"] == 4


@pytest.mark.parametrize("trust", [False, True, ("posix.system", "os.system")])
def test_nothing_of_a_file_is_run(tmp_path, monkeypatch, trust):
    """Even what is trusted is an empty class of ours; system commands cannot be named at all."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "sae.pt"
    torch.save({"state_dict": Attack()}, path)
    why = r"--trust-pickle \w+\.system \(" if trust is False else "which is read from no file, not even as data"
    with pytest.raises(ValueError, match=rf"sae\.pt: .*{why}"):
        load_pickle(path, trust)
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "list", "compressed", "plain pickle"])
def test_what_is_no_file_of_tensors_is_one_error(tmp_path, damage):
    path = tmp_path / "sae.pt"
    torch.save({"a": torch.randn(100)}, path)
    data = path.read_bytes()
    if damage == "compressed":
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "new", "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
        data = (tmp_path / "new").read_bytes()
    kinds = {"truncated": data[:-300], "empty": b"", "text": b"hello\n", "list": b"\x80\x02]q\x00.", "compressed": data}
    path.write_bytes(kinds.get(damage, pickle.dumps({"a": {1, 2}})))
    with pytest.raises(ValueError, match=r"sae\.pt: ") as caught:
        state_dict(load_pickle(path), path)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)  # torch's advice to run what is in it


def test_the_dict_of_tensors_may_be_inside(tmp_path):
    inner = {"W_enc": torch.eye(2)}
    for value in ({"model_state_dict": inner, "epoch": 3}, inner):
        assert state_dict(value, tmp_path, "model_state_dict", "state_dict") == inner

"""Loggers that cannot be: a package that is missing, and what names none. Nothing is written before."""

import numpy as np
import pytest

from command import run as run_command
from saevlm_fast.config import RunOptions
from saevlm_fast.errors import Interrupted
from saevlm_fast.training import loggers, watch


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_package_that_is_missing_is_refused_before_anything_is_written(monkeypatch, tmp_path, name):
    np.save(tmp_path / "x.npy", np.ones((20, 8), np.float32))
    monkeypatch.setitem(loggers._MODULES, name, "no_such_package")
    one = ("--activations", tmp_path / "x.npy")
    several = (*one, "--k", "2,3")
    images = ("--model", "hf:no/such-model", "--images", tmp_path / "none", "--layer", 2)  # refused before both
    for more in (one, (*one, "--dry-run"), several, (*several, "--dry-run"), images, (*images, "--dry-run")):
        text = run_command("train", *more, "--output", tmp_path / "out", "--log-to", name, code=2)
        assert f"log_to: {name} cannot be imported (No module named 'no_such_package')" in text
        assert "pip install 'saevlm-fast[watch]'" in text
        assert not (tmp_path / "out").exists()


def test_ctrl_c_while_a_package_is_imported_is_no_missing_package(monkeypatch):
    def stopped(name):
        raise Interrupted("interrupted")

    monkeypatch.setattr(loggers, "import_module", stopped)
    with pytest.raises(Interrupted):
        watch.Watch(["wandb"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"log_to": "wandbb"},
            "log_to: 'wandbb' is not one of jsonl, tensorboard, trackio, wandb; did you mean 'wandb'",
        ),
        ({"log_to": ("jsonl", 3)}, "log_to: 3 is not one of"),
        ({"log_to": (["wandb"],)}, "log_to: ['wandb'] is not one of"),
        ({"log_to": "tensorboard"}, "log_to: tensorboard writes into the run's directory; give an output"),
    ],
)
def test_what_is_no_logger_is_refused(given, message):
    with pytest.raises(ValueError, match="log_to") as error:
        RunOptions(**given)
    assert message in str(error.value)

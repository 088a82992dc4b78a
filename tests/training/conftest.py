"""What the tests of this folder share."""

import numpy as np
import pytest
from small_runs import D_IN

from saevlm_fast.data.synthetic import PlantedConcepts


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "x.npy"
    np.save(path, PlantedConcepts(D_IN, 16, 60, seed=3).sample(3000)[0])
    return path

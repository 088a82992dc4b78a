"""What the tests of this folder share."""

import narrow_towers
import pytest
import torch


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """name -> (directory, the model it was saved from, its processor); each is made once."""
    import transformers

    made = {}

    def make(name):
        if name not in made:
            torch.manual_seed(0)
            model, processor = getattr(narrow_towers, name)(transformers)
            directory = tmp_path_factory.mktemp(name)
            narrow_towers.randomised(model).save_pretrained(directory)
            processor.save_pretrained(directory)
            made[name] = directory, model, processor
        return made[name]

    return make

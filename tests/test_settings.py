"""Settings: one field is default, limits, help and choices."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest

from saevlm_fast import config
from saevlm_fast.config import SAEConfig, SAESize, TrainConfig
from saevlm_fast.settings import Settings, choices_of, default_of, number_or_auto, same_as, setting, settings_of


@dataclass(frozen=True)
class Base(Settings):
    title = "Base"
    steps: int = setting(10, help="Steps.", paper="20", at_least=1)
    share: float = setting(0.5, help="Share.", at_least=0, at_most=1)
    rate: float | None = setting(None, help="Rate.", above=0, below=math.inf, must="a positive number", spec="g")
    kind: Literal["a", "b"] = setting("a", help="Kind.")
    seed: int = setting(0, help="Seed.", at_least=0)


@dataclass(frozen=True, kw_only=True)
class Derived(Base):
    steps: int = same_as(Base, "steps", shown="as it comes")
    output: Path = setting(help="Where.")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps: 0 must be at least 1"),
        ({"steps": 2**62}, f"steps: {2**62} must be below 2^62"),
        ({"share": 1.5}, "share: 1.5 must be between 0 and 1"),
        ({"share": math.nan}, "share: nan must be between 0 and 1"),
        ({"rate": -1.0}, "rate: -1 must be a positive number"),
        ({"rate": math.inf}, "rate: inf must be a positive number"),
        ({"kind": "c"}, "kind: 'c' is not one of a, b"),
        ({"seed": -1}, "seed: -1 must not be negative"),
    ],
)
def test_limits(values, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (compared whole)
        Base(**values)
    assert str(raised.value) == message
    with pytest.raises(ValueError, match=next(iter(values))):
        Derived(output=Path("x"), **values)


def test_a_field_that_is_taken_over_keeps_what_is_known_of_it():
    known = settings_of(Derived)["steps"]
    assert (known.help, known.paper, known.at_least, known.shown) == ("Steps.", "20", 1, "as it comes")
    assert default_of(Derived, "steps") == 10
    assert choices_of(Derived, "kind") == ("a", "b")


def test_a_part_has_the_values_of_the_whole():
    assert Derived(steps=3, output=Path("x"), seed=4).part(Base, kind="b") == Base(steps=3, kind="b", seed=4)


def test_auto():
    assert number_or_auto("lr", "auto") is None
    assert number_or_auto("lr", "1e-3") == 1e-3


def test_every_setting_of_the_engine_says_what_it_is():
    classes = [each for each in vars(config).values() if isinstance(each, type) and issubclass(each, Settings)]
    assert len(classes) > 8
    for cls in classes:
        for field in fields(cls):
            assert settings_of(cls)[field.name].help.endswith("."), (cls, field.name)


def test_the_sizing_rule_stands_once():
    assert SAEConfig.sized(32, k=3) == SAESize(k=3).config(32) == SAEConfig(32, 256, 3)
    assert SAEConfig.sized(32, d_sae=40, architecture="topk") == SAESize("topk", d_sae=40).config(32)
    assert TrainConfig().n_warmup == 1000

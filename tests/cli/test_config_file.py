"""--config, and the settings.toml that every result has beside it."""

import os
import re
import tomllib
from dataclasses import MISSING
from pathlib import Path
from typing import Any, get_origin

import pytest

from command import run, run_json
from saevlm_fast.cli.command_line import arguments
from saevlm_fast.cli.config_file import read_config
from saevlm_fast.cli.from_anywhere import path_in, placed
from saevlm_fast.cli.names import COMMANDS, is_needed, key_of, ordered
from saevlm_fast.cli.toml import toml_text
from saevlm_fast.cli.train_options import TrainArguments
from saevlm_fast.config import StreamSettings
from saevlm_fast.settings import Setting, choices_of, default_of, kinds_of, settings_of

TRAIN = {"k": 4, "steps": 20, "batch_size": 64, "lr": 3e-3, "device": "cpu"}


def written(path, **tables):
    path.write_text(toml_text(tables))
    return path


def weights(directory):
    return (directory / "sae_weights.safetensors").read_bytes()


def test_a_file_is_the_options_it_holds(data, tmp_path):
    sizes = {"architecture": "matryoshka", "d-sae": 100, "groups": [0.1, 0.4, 0.5], "warmup": 3}
    settings = TRAIN | sizes | {"activations": str(data / "activations.npy"), "output": str(tmp_path / "file")}
    run("train", "--config", written(tmp_path / "run.toml", train=settings))
    run("train", "--activations", data / "activations.npy", "--output", tmp_path / "line", "--k", 4, "--steps", 20,
        "--batch-size", 64, "--lr", "3e-3", "--architecture", "matryoshka", "--d-sae", 100, "--groups", "0.1,0.4,0.5",
        "--warmup", 3, "--device", "cpu")  # fmt: skip
    assert weights(tmp_path / "file") == weights(tmp_path / "line")


def test_the_command_line_wins_over_the_file_and_the_file_over_the_default(tmp_path):
    options = COMMANDS["train"].options
    file = written(tmp_path / "run.toml", steps=7, activations="x", expansion=2, train={"steps": 8, "k": 3})
    made = arguments("train", options, {"config": file, "k": 5, "d_sae": 64})
    assert (made.steps, made.k, made.batch_size, made.expansion, made.d_sae) == (8, 5, 4096, None, 64)
    made = arguments("train", options, {"config": file})
    assert (made.k, made.expansion, made.d_sae) == (3, 2.0, None)


def test_a_dtype_of_before_is_dropped_where_it_is_the_one_that_is_left(tmp_path):
    options = COMMANDS["train"].options
    file = written(tmp_path / "run.toml", dtype="float32", activations="x", train={"dtype": "float32", "k": 3})
    assert arguments("train", options, {"config": file}) == options.of({"config": file, "activations": "x", "k": 3})
    file = written(tmp_path / "run.toml", model="m", images="i", output="o", dtype="tf32", train={"dtype": "bfloat16"})
    assert arguments("harvest", COMMANDS["harvest"].options, {"config": file}).dtype == "tf32", "another setting"


def test_a_table_of_another_command_is_left_alone(tmp_path):
    file = written(tmp_path / "run.toml", train={"activations": "x", "steps": 7}, harvest={"layer": [5]}, made={"a": 1})
    assert arguments("train", COMMANDS["train"].options, {"config": file}).steps == 7
    made = arguments(
        "harvest", COMMANDS["harvest"].options, {"config": file, "model": "m", "images": "i", "output": "o"}
    )
    assert made.layer == (5,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz = 4", "'stepz' is not a setting of train; did you mean 'steps'?"),
        (
            "[train]\ncheckpoint-evry = 4",
            "not a setting of train; did you mean 'checkpoint_every'?",
        ),
        ("dry_run = true", "'dry_run' is not a setting of train"),
        ("[trian]\nsteps = 4", "[trian] is not a command; did you mean 'train'?"),
        ("steps = 'many'", "run.toml: steps = 'many' is not a whole number"),
        ("steps = 1.5", "run.toml: steps = 1.5 is not a whole number"),
        ("steps = true", "run.toml: steps = True is not a whole number"),
        ("auxk_alpha = '1'", "run.toml: auxk_alpha = '1' is not a number"),
        ("output = 3", "run.toml: output = 3 is not a text"),
        ("resume = 1", "run.toml: resume = 1 is not true or false"),
        ("groups = ['a', 'b']", "run.toml: groups: 'a' is not a number"),
        ("lr = 'fast'", "run.toml: lr: 'fast' is not a number"),
        ("steps = 0", "steps: 0 must be at least 1"),
        ("architecture = 'gated'", "architecture: 'gated' is not one of"),
        (
            "dtype = 'tf32'",
            "run.toml: dtype: 'tf32' is gone, 'float32' is all there is; train anew (--force)",
        ),
        ("[train]\ndtype = 'bfloat16'", "run.toml: dtype: 'bfloat16' is gone"),
        ("steps = ", "run.toml: not valid TOML"),
        ("steps = " + 5000 * "[", "run.toml: not valid TOML (nested too deeply)"),
        ("steps = " + 5000 * "1", "run.toml: not valid TOML (Exceeds the limit"),
    ],
)
def test_what_a_file_is_refused_for(text, message, data, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(text)
    arguments = "--config", file, "--activations", data / "activations.npy"
    assert message in run("train", *arguments, code=2)


def lists():
    """Every option and key that takes a list of which no value may come again."""
    for name, command in COMMANDS.items():
        cls = command.options
        for field, known in settings_of(cls).items():
            listed = known.swept or get_origin(kinds_of(cls)[field]) is tuple
            if listed and not known.repeats and not known.tables and (known.on_command_line or known.in_file):
                yield pytest.param(name, cls, field, known, id=f"{name} {key_of(field, known)}")


def test_of_lists_that_may_repeat_a_value():
    kept = {
        key_of(field, known)
        for command in COMMANDS.values()
        for field, known in settings_of(command.options).items()
        if known.repeats
    }
    assert kept == {"layer", "groups", "betas", "sae", "codes", "scores", "names", "steering"}


@pytest.mark.parametrize(("name", "cls", "field", "known"), [*lists()])
def test_a_value_that_is_listed_twice_is_refused_by_one_rule(name, cls, field, known):
    needed = {other: "7" for other, more in ordered(cls) if is_needed(cls, other, more) and other != field}
    needed |= {"model": "x", "images": "x"} if name == "train" and field in settings_of(StreamSettings) else {}
    likely = [*choices_of(cls, field), "3", "k=3", "raw", "jsonl", "x"]
    said = set()
    for value in likely:  # which of them it takes is its own affair
        given = f"{value},{value}" if known.swept else [value, value]
        with pytest.raises(ValueError, match=key_of(field, known)) as error:
            arguments(name, cls, needed | {field: given})
        said.add(str(error.value))
    assert any(re.fullmatch(rf"{key_of(field, known)}: \S+ is listed twice", text) for text in said), said


@pytest.mark.parametrize("name", COMMANDS)
def test_what_settings_toml_says_of_defaults_is_read_as_these(name, tmp_path):
    """Also of lists that are empty, as those are that nobody gave."""
    cls: Any = COMMANDS[name].options
    known = {field: each for field, each in ordered(cls) if each.in_file and each.recorded and not each.tables}
    defaults = {field: default_of(cls, field) for field in known}
    given = {field: value for field, value in defaults.items() if value not in (None, MISSING)}
    said = {
        key_of(field, known[field]): [placed(field, known[field], x) for x in v]
        if isinstance(v, tuple)
        else placed(field, known[field], v)
        for field, v in given.items()
    }
    (tmp_path / "settings.toml").write_text(toml_text({name: said}))
    given = {field: value.absolute() if isinstance(value, Path) else value for field, value in given.items()}
    assert read_config(tmp_path / "settings.toml", name, cls) == given


def lists_of_texts():
    for name, command in COMMANDS.items():
        cls: Any = command.options
        for field, known in ordered(cls):
            kind = kinds_of(cls)[field]
            if known.in_file and kind in (tuple[str, ...], tuple[Path, ...]) and field not in ("controls", "assume"):
                yield pytest.param(name, cls, field, kind, id=f"{name} {field}")


@pytest.mark.parametrize(("name", "cls", "field", "kind"), [*lists_of_texts()])
def test_a_comma_in_a_text_of_a_list_is_read_back(name, cls, field, kind, tmp_path):
    """No matter whether it is there. A text, as on the command line, is split at its commas, as before."""
    key, is_path = key_of(field, settings_of(cls)[field]), kind == tuple[Path, ...]
    said = ["/a, b/run", "/c,d"]
    file = written(tmp_path / "settings.toml", **{name: {key: said}})
    assert read_config(file, name, cls) == {field: tuple(map(Path, said)) if is_path else tuple(said)}
    file = written(tmp_path / "settings.toml", **{name: {key: "/c,d"}})
    assert read_config(file, name, cls) == {field: (Path("/c"), Path("d")) if is_path else ("/c", "d")}


def test_a_comma_in_what_a_list_assumes_is_read_back(tmp_path):
    said = ("input_mean=/a, b/mean.npy", "k=3")
    file = written(tmp_path / "settings.toml", convert={"assume": said})
    assert read_config(file, "convert", COMMANDS["convert"].options) == {"assume": said}


# Texts that name nothing on this machine, whatever lies there.
NO_PLACES = {
    *("point", "tokens", "buffer", "log_to", "architecture", "latents", "prompt", "template", "trust_pickle"),
    *("device", "dtype", "controls", "part", "condition", "spec", "licence", "repo", "revision", "sae_id"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_of_every_text_it_is_known_whether_it_names_a_place(name):
    """One that is new says `place=`, or joins NO_PLACES."""
    cls: Any = COMMANDS[name].options
    texts = {
        field: known
        for field, known in ordered(cls)
        if known.in_file and known.recorded and not choices_of(cls, field)
        if kinds_of(cls)[field] in (str, tuple[str, ...])
    }
    assert {field for field, known in texts.items() if (known.place is not None) == (field in NO_PLACES)} == set()


def test_a_setting_of_one_name_names_the_same_kind_of_place_in_every_command():
    kinds: dict[str, set[str | None]] = {}
    for each in COMMANDS.values():
        for field, known in ordered(each.options):
            if kinds_of(each.options)[field] in (str, tuple[str, ...]):
                kinds.setdefault(field, set()).add(known.place)
    assert {field: places for field, places in kinds.items() if len(places) > 1} == {}


SETTINGS = {field: known for each in COMMANDS.values() for field, known in ordered(each.options) if known.place}


def test_what_names_a_place_is_the_same_from_anywhere(tmp_path, monkeypatch):
    def of(name: str, value: Any) -> Any:
        return placed(name, SETTINGS.get(name, Setting(help="")), value)

    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "images", "store", "net", "tiny-clip", "scene", "openai", "none.pt", "none"):
        (tmp_path / folder).mkdir()
    for file in ("l.csv", "p.json", "w.safetensors", "font.ttf", "mean.npy", "a.tar"):
        (tmp_path / file).touch()
    here = str(tmp_path)
    same = {
        "images": ("scenes:test:6", "hf-dataset:a/b:c::d", "s3://x/y", "none", "/abs/photos"),
        "labels": ("store", "none", "images", "scene:colour"),
        "class_prompts": ("a photo of a {}", "scene:colour"),
        "model": ("hf:tiny-clip", "hf:openai/clip", "open_clip:ViT-B-32/openai", "timm:vit_base", "timm:vit:none.pt"),
        "sae": ("hf:user/repo", "hf:user/repo@main/x"),
        "fonts": ("DejaVuSans.ttf",),
        "assume": ("k=32", "input_mean=2"),
        "prompt": ("photos",),
    }
    for name, texts in same.items():
        assert [of(name, text) for text in texts] == list(texts)
    made = {
        "images": {"photos": "photos", "photos::train": "photos::train", "*.tar": "*.tar", "{0..2}.tar": "{0..2}.tar"},
        "labels": {"l.csv": "l.csv", "l.csv:colour": "l.csv:colour"},
        "class_prompts": {"p.json": "p.json"},
        "sae": {"net": "net", "./net/": "net"},
        "fonts": {"font.ttf": "font.ttf"},
    }
    for name, texts in made.items():
        assert {text: of(name, text) for text in texts} == {text: f"{here}/{it}" for text, it in texts.items()}
    assert of("model", "hf:net") == f"hf:{here}/net"
    assert of("model", "hf:./tiny-clip") == f"hf:{here}/tiny-clip"
    assert of("text_model", "open_clip:ViT-B-32/w.safetensors") == f"open_clip:ViT-B-32/{here}/w.safetensors"
    for prefix in ("hf:", "open_clip:local-dir:", "timm:local-dir:"):
        assert of("clip", f"{prefix}openai") == f"{prefix}{here}/openai"
    (tmp_path / "laion2b").touch()  # the name of weights, which come before a file
    assert of("clip", "open_clip:ViT-B-32/laion2b") == "open_clip:ViT-B-32/laion2b"
    assert of("model", "timm:vit:w.safetensors") == f"timm:vit:{here}/w.safetensors"
    assert of("assume", "input_mean=mean.npy") == f"input_mean={here}/mean.npy"
    assert of("control_sae", Path("untrained")) == "untrained"
    assert of("control_sae", Path("net")) == f"{here}/net"
    (tmp_path / "untrained").mkdir()
    assert of("control_sae", Path("untrained")) == f"{here}/untrained"
    assert of("images", "https://me:word@host/a.tar?key=1") == "https://***@host/a.tar?***"


def test_what_an_output_would_replace_is_found_behind_a_column_or_a_split(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("l.csv", "photos", "m.safetensors", "mean.npy"):
        Path(name).touch()
    named = {
        ("labels", "l.csv:colour"): "l.csv",
        ("labels", "store"): None,
        ("images", "photos::train"): "photos",
        ("images", "hf-dataset:a/b"): None,
        ("model", "timm:vit:m.safetensors"): "m.safetensors",
        ("model", "hf:openai/clip"): None,
        ("assume", "input_mean=mean.npy"): "mean.npy",
        ("sae", "hf:user/repo"): None,
    }
    found = {(name, text): path_in(SETTINGS[name], text) for name, text in named}
    assert found == {said: None if path is None else Path(path) for said, path in named.items()}
    assert path_in(Setting(help=""), "photos") is None


def test_a_path_with_a_comma_that_is_there_is_one_value_of_a_list(tmp_path):
    (tmp_path / "a, b").mkdir()
    cls: Any = COMMANDS["evaluate"].options
    given = {"sae": [str(tmp_path / "a, b"), f"{tmp_path}/c,{tmp_path}/d"], "activations": "x", "output": "y"}
    assert arguments("evaluate", cls, given).sae == tuple(f"{tmp_path}/{name}" for name in ("a, b", "c", "d"))


def test_a_byte_order_mark_and_two_spellings_of_one_setting(data, tmp_path):
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbfsteps = 3")
    assert read_config(tmp_path / "a.toml", "train", TrainArguments) == {"steps": 3}
    (tmp_path / "b.toml").write_text("batch_size = 64\nbatch-size = 32")
    with pytest.raises(ValueError, match=r"b\.toml: 'batch_size' and 'batch-size' are one setting; give it once"):
        read_config(tmp_path / "b.toml", "train", TrainArguments)


def test_a_file_that_is_not_there(tmp_path):
    assert "none.toml" in run("train", "--config", tmp_path / "none.toml", code=2)


def test_a_file_that_is_none(tmp_path):
    os.mkfifo(tmp_path / "pipe.toml")
    assert "pipe.toml is not a file" in run("train", "--config", tmp_path / "pipe.toml", code=2)
    assert f"config: {tmp_path} is not a file" in run("train", "--config", tmp_path, code=2)


def test_what_is_needed_may_stand_in_the_file(tmp_path):
    assert "model: needed; give --model, or model in the file of --config" in run("harvest", code=2)
    assert "output: needed; give OUTPUT" in run("synthetic", code=2)
    run("synthetic", "--config", written(tmp_path / "s.toml", output=str(tmp_path / "data"), rows=5))
    assert (tmp_path / "data" / "activations.npy").is_file()


def test_a_run_is_repeated_from_its_settings(data, sae, tmp_path):
    run("train", "--config", sae / "settings.toml", "--output", tmp_path / "again")
    assert weights(tmp_path / "again") == weights(sae)
    first, again = (tomllib.loads((each / "settings.toml").read_text()) for each in (sae, tmp_path / "again"))
    assert first["train"] | {"output": ""} == again["train"] | {"output": ""}
    assert "already holds a run" in run("train", "--config", sae / "settings.toml", code=2)


def test_settings_say_what_the_result_was_made_by(data, sae):
    found = tomllib.loads((sae / "settings.toml").read_text())
    known = settings_of(COMMANDS["train"].options)
    open_ = {"d_sae", "warmup", "log_every", "checkpoint_every", "validation"}
    open_ |= {"l1", "target_l0", "bandwidth", "sparsity_warmup"}  # of relu and jumprelu
    open_ |= {"control", "control_cosine", "mono_weight", "mono_embeddings"}  # where they are given
    keys = {each.option or name for name, each in known.items() if each.recorded}
    keys -= settings_of(StreamSettings).keys() | {
        "model",
        "images",
        "embeddings",
        "scored_images",
        "sweep",
    }  # of images, of several SAEs
    assert set(found["train"]) == keys - open_
    assert found["train"]["activations"] == str(data / "activations.npy")
    made = found["made"]
    assert made["command_line"].startswith("saevlm-fast train --activations")
    assert {"directory", "at", "host", "platform", "device", "versions", "resolved"} <= set(made)
    assert {"saevlm-fast", "python", "torch", "transformers"} <= set(made["versions"])
    assert made["resolved"] == {"rows": 3000, "d_in": 32, "d_sae": 128, "lr": 3e-3, "warmup": 30}


def test_scores_are_repeated_from_their_settings(data, sae, tmp_path):
    files = "--activations", data / "activations.npy", "--embeddings", data / "embeddings.npy"
    run("ms-score", *files, "--sae", sae, "--output", tmp_path / "s.json")
    beside = tmp_path / "s.json.settings.toml"
    run("ms-score", "--config", beside, "--output", tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "s.json").read_bytes()
    raw = run_json("ms-score", "--config", beside, "--raw", "--output", tmp_path / "raw.json")
    assert raw["sae"] == "raw neurons"


def test_a_flag_that_is_off_excludes_nothing(tmp_path):
    file = written(tmp_path / "ms.toml", sae="some-sae", activations="a.npy", embeddings="e.npy")
    command = COMMANDS["ms-score"]
    assert str(arguments("ms-score", command.options, {"config": file, "raw": False}).sae) == "some-sae"
    file.write_text(file.read_text() + "[ms-score]\nraw = false\n")
    assert str(arguments("ms-score", command.options, {"config": file}).sae) == "some-sae"

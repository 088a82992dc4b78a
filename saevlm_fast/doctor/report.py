"""The report of `saevlm-fast doctor` in Markdown, for an issue: facts, problems, the self-test."""

from collections.abc import Iterator
from typing import Any

from saevlm_fast.files import human_bytes

# Names that do not say by themselves what they are of.
_LABELS = {
    "saevlm_fast": "saevlm-fast",
    "open_clip": "open_clip",
    "here_free_bytes": "free in the working directory",
    "temporary_files_free_bytes": "free for temporary files",
    "saevlm-fast_free_bytes": "free for the cache of saevlm-fast",
    "models_free_bytes": "free for the models of Hugging Face",
    "triton_kernels_free_bytes": "free for compiled kernels",
    "torch_weights_free_bytes": "free for the weights of torch",
    "load": "load, the mean of the last minute",
}


def markdown(result: dict[str, Any]) -> Iterator[str]:
    """Lines, of what `doctor --json` prints."""
    yield "### saevlm-fast doctor"
    for section, values in result["facts"].items():
        yield ""
        yield f"**{section}**"
        yield ""
        yield from _section(section, values)
    yield ""
    yield "**in the way**" if result["problems"] else "**in the way**: nothing was found"
    if result["problems"]:
        yield ""
        yield from (f"- {line}" for line in result["problems"])
    if result["self_test"] is not None:
        yield ""
        checks = result["self_test"]["checks"]
        right = sum(check["ok"] for check in checks)
        yield f"**self-test** on {result['self_test']['device']}: {right} of {len(checks)} right"
        yield ""
        for check in checks:
            mark = "ok" if check["ok"] else "FAILED"
            yield f"- {mark}: {check['name']} ({check['said']}; {check['seconds']:.1f} s)"


def _section(section: str, values: dict[str, Any]) -> Iterator[str]:
    if section == "libraries" and "error" not in values:
        yield "- " + ", ".join(f"{name} {_library(each)}" for name, each in values.items())
        return
    for name, value in values.items():
        if value is not None:
            label = _LABELS.get(name, name.removesuffix("_bytes").replace("_", " "))
            yield f"- {label}: {_value(name, value)}"


def _library(library: dict[str, Any]) -> str:
    version = library["version"] or "missing"
    return version if library["supported"] else f"{version} (needed: {library['needed'] or 'any'})"


def _value(name: str, value: Any) -> str:
    """A figure for people: bytes in units; of a cache its size; of a library whether it loads; of a GPU all of it."""
    if name.endswith("_bytes"):
        return human_bytes(value)
    if isinstance(value, list):
        return "; ".join(_value("", each) for each in value) or "none"
    if not isinstance(value, dict):
        return str(value)
    if "whole" in value:
        return human_bytes(value["bytes"]) + ("" if value["whole"] else ", at least")
    if "loads" in value:
        return (
            f"{value['version']}, loads {value['names']}NAME" if value["loads"] else f"does not load: {value['error']}"
        )
    return ", ".join(f"{key.removesuffix('_bytes')} {_value(key, each)}" for key, each in value.items())

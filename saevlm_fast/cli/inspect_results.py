"""What saevlm-fast inspect prints of a result: what it is, what made it of what, and its main numbers."""

from typing import Any

from saevlm_fast.inspection import Description
from saevlm_fast.records import object_of

_MADE_OF = ("sae", "model", "text_model", "activations", "codes", "rows", "embeddings", "labels", "images", "benchmark")
_MOST = 8  # lines of numbers of one name


def result_rows(description: Description) -> list[tuple[str, str]]:
    """(name, value) of the short table."""
    made, settings = description["made"], description["settings"] or description["metadata"]
    rows = [("holds", description["what"]), ("made by", _made_text(description, made))]
    if "command_line" in made:
        rows.append(("as", str(made["command_line"])))
    calls = made.get("calls")
    rows += [
        ("and", str(each)) for each in (calls if isinstance(calls, list) else ()) if each != made.get("command_line")
    ]
    rows += [(f"given: {name}", _text(settings[name])) for name in _MADE_OF if settings.get(name)]
    rows += [(f"finished: {name}", ", ".join(measures)) for name, measures in description.get("finished", {}).items()]
    for name, value in description["figures"].items():
        rows += _figure_rows(name, value)
    return rows


def _made_text(description: Description, made: dict[str, Any]) -> str:
    """The command, when and by which version."""
    command = description["command"]
    if not made:
        why = description.get("misfit")
        no_settings = "no settings lie beside it" if why is None else f"the settings beside it are of another: {why}"
        return f"saevlm-fast {command}; {no_settings}"
    version = object_of(made.get("versions")).get("saevlm-fast", "")
    return f"saevlm-fast {command} {version}, {made.get('at', '')}, on {made.get('host', '')}"


def _figure_rows(name: str, value: Any) -> list[tuple[str, str]]:
    """A line; of several of a kind a line each, and how many more there are."""
    several = value.items() if isinstance(value, dict) else enumerate(value, 1) if isinstance(value, list) else ()
    lines = [(f"{name}: {key}", _text(each)) for key, each in several if isinstance(each, dict)]
    if not lines:
        return [(name, _text(value))]
    more = len(lines) - _MOST
    return lines[:_MOST] + ([(f"{name}: others", f"{more:,}, in --json")] if more > 0 else [])


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(each)}" for name, each in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else f"{value:,}" if type(value) is int else str(value)

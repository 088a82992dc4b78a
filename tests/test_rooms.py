"""The order of the rooms: nothing imports upward, and no modules import each other in a circle."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import saevlm_fast

PACKAGE = Path(saevlm_fast.__file__).parent
# From the bottom to the top. Rooms of one line are neighbours that do not know each other.
ORDER = (
    ("errors", "urls"),
    ("settings",),
    ("config", "files", "runtime", "peers", "torchrun"),
    ("records",),
    ("outputs",),
    ("remote",),
    ("kernels", "box"),
    ("sparse_codes", "formats"),
    ("sae",),
    ("data",),
    ("images",),
    ("towers",),
    ("provenance",),
    ("harvesting",),
    ("training", "scoring"),
    ("publishing", "steering", "crossmodal"),
    ("measures",),
    ("look",),
    ("clip_steering",),
    ("demo", "box_making", "results"),
    ("inspection",),
    ("doctor",),
    ("cli",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
OUTSIDE = ("tests", "bench", "kernels")
ANYBODY = "saevlm_fast"  # the package itself: its version, which every room may read, and the public names, made lazily


def modules() -> dict[str, Path]:
    """Every module of the package by its name, without the package itself."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")) + sorted((PACKAGE / "kernels").glob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[f"saevlm_fast.{name}"] = file
    return found


def room_of(module: str) -> str:
    return module.split(".")[1]


def imports(name: str, file: Path, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """The package's modules that one imports, and the line; also inside functions and for type checkers alone."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            folder = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
            relative = folder[: len(folder) + 1 - node.level] if node.level else []
            module = ".".join([*relative, *([node.module] if node.module else [])])
            # from a import b: b is a module, or something in the module a
            names = [f"{module}.{alias.name}" if f"{module}.{alias.name}" in known else module for alias in node.names]
        else:
            continue
        for imported in names:
            if imported.partition(".")[0] == "saevlm_fast" and imported != ANYBODY:
                yield imported, node.lineno


def arrows() -> dict[str, dict[str, int]]:
    """Module -> the modules it imports -> the line."""
    known = modules()
    return {name: dict(imports(name, file, known)) for name, file in known.items()}


def test_every_room_has_its_place():
    assert {room_of(name) for name in modules()} == set(LEVEL)


def test_every_import_names_a_module():
    """A misspelt room in a function would only be found when the function is called."""
    known = modules()
    lost = [
        f"{name}:{line} imports {to}" for name, tos in arrows().items() for to, line in tos.items() if to not in known
    ]
    assert not lost


def test_contributing_lists_every_room_from_the_top_down():
    page = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = page.partition("```text\nsaevlm_fast/\n")[2].partition("\nkernels/")[0]
    lines = re.findall(r"^  (\w+(?:/|\.py)(?: \w+(?:/|\.py))*) ", block, re.MULTILINE)
    listed = [name.removesuffix("/").removesuffix(".py") for line in lines for name in line.split()]
    assert sorted(listed) == sorted(LEVEL.keys() - {"kernels", "__main__"})  # an op has a place of its own there
    levels = [LEVEL[room] for room in listed]
    assert levels == sorted(levels, reverse=True)


def test_nothing_hides_an_arrow():
    """The public names are for users: a room that took `sf.train` from the package, or a test, would import upward."""
    hidden = []
    for name, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                bad = [alias.name for alias in node.names if alias.name.split(".")[0] in OUTSIDE]
                bad += [alias.name for alias in node.names if alias.name == ANYBODY]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                bad = [node.module] if str(node.module).split(".")[0] in OUTSIDE else []
                if node.module == ANYBODY:
                    named = {alias.name for alias in node.names} - {"__version__"}
                    bad += [each for each in named if f"{ANYBODY}.{each}" not in modules() and not is_room(each)]
            else:
                continue
            hidden += [f"{name}:{node.lineno} imports {each}" for each in bad]
    assert not hidden


def is_room(name: str) -> bool:
    return (PACKAGE / name).is_dir()


def test_nothing_imports_upward():
    upward = [
        f"{name}:{line} imports {to}"
        for name, tos in arrows().items()
        for to, line in tos.items()
        if room_of(name) != room_of(to) and LEVEL[room_of(to)] >= LEVEL[room_of(name)]
    ]
    assert not upward


def test_no_modules_import_each_other_in_a_circle():
    """What is left when modules that import none of the others, and those that none of them imports, are taken away."""
    left = {name: set(tos) - {name} for name, tos in arrows().items()}
    while left:
        imported = set.union(*left.values())
        free = {name for name, tos in left.items() if not tos or name not in imported}
        if not free:
            break
        left = {name: tos - free for name, tos in left.items() if name not in free}
    assert not left, f"a circle among {', '.join(sorted(left))}"

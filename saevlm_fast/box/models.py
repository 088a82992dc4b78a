"""The box: the models that come with the package, ordinary transformers directories guarded by a list of checksums."""

from pathlib import Path

from saevlm_fast.errors import require
from saevlm_fast.files import atomic_write, sha256_file

MODELS = ("tiny-clip", "tiny-llava")
ASSETS = Path(__file__).parent / "assets"
CHECKSUMS = "SHA256SUMS"  # as `sha256sum` writes and checks it


def model_directory(name: str) -> Path:
    """Where a model of the box stands, every file of it checked (15 ms).

    Raises:
        ValueError: not a model of the box; a file of it is missing, not what was shipped, or not on the list.
    """
    require(name in MODELS, f"model: {name!r} is not one of {', '.join(MODELS)}")
    sums = _read_checksums()
    listed = {file: digest for file, digest in sums.items() if file.startswith(f"{name}/")}
    require(len(listed) > 0, f"{name}: {ASSETS / CHECKSUMS} does not list it; install saevlm-fast again")
    there = {file.relative_to(ASSETS).as_posix() for file in (ASSETS / name).glob("**/*") if file.is_file()}
    strange = sorted(there - set(listed))  # a file more, or a list that was cut short
    require(
        not strange, f"{name}: {ASSETS / CHECKSUMS} does not list {strange and strange[0]}; install saevlm-fast again"
    )
    for file, digest in listed.items():
        path = ASSETS / file
        require(path.is_file(), f"{name}: {path} is missing; install saevlm-fast again")
        found = sha256_file(path)
        require(
            found == digest,
            f"{name}: {path} is damaged: its SHA-256 is {found[:16]}... instead of {digest[:16]}...; install "
            "saevlm-fast again",
        )
    return ASSETS / name


def _read_checksums() -> dict[str, str]:
    file = ASSETS / CHECKSUMS
    require(file.is_file(), f"{file} is missing; install saevlm-fast again")
    pairs = [line.split("  ", 1) for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
    require(all(len(pair) == 2 and len(pair[0]) == 64 for pair in pairs), f"{file} is damaged; install it again")
    return {name: digest for digest, name in pairs}


def write_checksums(assets: Path = ASSETS) -> None:
    """Lists every file of the models in `assets`."""
    files = sorted(file for name in MODELS for file in (assets / name).glob("**/*") if file.is_file())
    with atomic_write(assets / CHECKSUMS) as temporary:
        lines = [f"{sha256_file(file)}  {file.relative_to(assets).as_posix()}\n" for file in files]
        temporary.write_text("".join(lines), encoding="utf-8")

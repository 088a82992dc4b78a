"""Types of command-line arguments that the bench scripts share: argparse names argument and value, and exits with 2."""

import argparse
from pathlib import Path


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def not_negative(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{value} is not at least 0")
    return value


def new_file(text: str) -> Path:
    """A file to be written after minutes of work: its folder is looked for before."""
    if not (path := Path(text)).parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent} is not a directory")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a directory, must be a file")
    return path


def new_directory(text: str) -> Path:
    if (path := Path(text)).exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is not a directory")
    return path


def directory(text: str) -> Path:
    if not (path := Path(text)).is_dir():
        raise argparse.ArgumentTypeError(f"{path} is not a directory")
    return path


def of_scenes(description: str | None, train: int, test: int, steps: int, seeds: int) -> argparse.ArgumentParser:
    """With --output, --train-scenes, --test-scenes, --steps, --seeds, and what they are if not given."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="markdown file")
    parser.add_argument("--train-scenes", type=int, default=train)
    parser.add_argument("--test-scenes", type=int, default=test)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seeds", type=int, default=seeds)
    return parser

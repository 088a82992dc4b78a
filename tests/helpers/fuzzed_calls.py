"""Calls of the command line that nobody meant: drawn, made in this process, and judged."""

import contextlib
import io
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from saevlm_fast.cli import main
from saevlm_fast.cli.names import COMMANDS, flag_of, key_of
from saevlm_fast.settings import choices_of, kinds_of, settings_of
from small_world import CALLS, spelled, spoil

SECONDS = 20  # what takes longer hangs
OUTCOMES = ("done", "refused", "other exit code", "not one error line", "raw control character", "traceback", "hang")
NUMBERS = (
    *"nan inf -inf -1 0 -0 1 2 1e400 1e-400 1e39 0x10 1_0 1,2 , 3.5 \u0663 --1 true".split(),
    *(str(each) for each in (2**31 - 1, 2**31, 2**63 - 1, 2**63, 10**40)),
    "1" * 5000,
    " 1 ",
)
ODD = ("", "caf\u00e9 \u732b", "\x1b[31mred\x07", os.fsdecode(b"\xff\xfe"), "\u202eabc", "a\nb", "x" * 300, "x" * 5000)
TEXTS = (
    *ODD,
    *"x - -- : [bold] :tram: %s%n{0} ../.. None cls,cls 0:1 5: :-1 random:0 random:x random:3:all mean".split(),
    *"residual,residual pooled <image> cuda:99 meta cpu:7 mps".split(),
    " ",
)
MODELS = (
    *"hf: hf:none/none hf:tiny-clip hf:tiny-llava hf:photos hf:../.. tiny-clip x:y".split(),
    *"hf:bad/text-config.json hf:bad/fifo-config.json hf:bad/directory-config.json".split(),
    *"timm: timm:none timm:resnet18:bad/text.pt open_clip: open_clip:ViT-B-32 open_clip:none/none".split(),
    *"open_clip:ViT-B-32/none open_clip:ViT-B-32/bad/fifo.pt".split(),
    *(f"hf:{each}" for each in ODD),
)
IMAGES = (
    *"scenes: scenes:train:0 scenes:train:-1 scenes:none:3 scenes:test:3 photos:train photos/* photos/class_0".split(),
    *"bad/{a,b bad/*.tar bad/list.txt bad/text.parquet bad/fifo.tar".split(),
)
OUTPUTS = (
    *"out new/deep/out run store photos . matrix.npy matrix.npy/out /proc/none a:b".split(),
    *"bad/fifo bad/loop bad/dangling bad/fifo.json bad/directory.json bad/text.json".split(),
    *"out.parquet out.csv out.json out.txt a:b.json -.json".split(),
    *ODD,
    *(f"{each}.json" for each in ODD),
)
TOML = (
    *"1 -1 0 inf nan 1e400 3.5 true '' 'x' '\\u0000' [] {} [{}] [nan] 1979-05-27 07:32:00 'store' 'bad/fifo'".split(),
    *(str(each) for each in (2**63 - 1, 10**30)),
    *('"\\u0000"', '"\\u001b[31m"', "[1, 2]", "['a', [1]]", "{a = 1}", f"'{'x' * 5000}'"),
)
BROKEN_TOML = (
    *(b"[", b"a = ", b"\xff\xfe", b"a = 1\na = 2", b"x" * 70000, b"[train]\n[train]", b"[none]\na = 1", b"a." * 9),
    *(b"x = " + b"[" * 5000, b"x = " + b"1" * 5000, b"\0", b"[made]\nx = 1", b"[[train]]\nx = 1", b"[train]\n1 = 2"),
)
COSTLY = ("--steps", "--rows", "--max-new-tokens")  # as many are wanted as are asked for, which is no hang
SKIPPED = ("compile",)  # minutes, by its nature


class Call(NamedTuple):
    """A command, the words of the command line, and the file of --config if there is one."""

    name: str
    words: list[str]
    config: bytes | None


def drawn_calls(n: int, names: list[str], seed: int = 0) -> Iterator[Call]:
    """names: of files that paths are drawn from."""
    draw = random.Random(seed)
    shares = {"demo": 1, "steer": 4, "steering-score": 4, "inspect": 4}
    commands = list(CALLS)
    for _ in range(n):
        name = draw.choices(commands, [shares.get(each, 6) for each in commands])[0]
        yield _call(draw, name, names)


def _call(draw: random.Random, name: str, names: list[str]) -> Call:
    cls: Any = COMMANDS[name].options
    settings = {field: known for field, known in settings_of(cls).items() if known.on_command_line}
    fields = [field for field in settings if field not in SKIPPED]
    given = dict(CALLS[name])
    for field in draw.sample(fields, min(len(fields), draw.choice((1, 1, 2, 3)))):
        flag = flag_of(field, settings[field])
        if draw.random() < 0.1:
            given.pop(flag, None)
        else:
            given[flag] = _value(draw, cls, field, names)
    config = None
    if draw.random() < 0.2:
        given["--config"], config = "drawn.toml", _config(draw, cls, settings)
    if name == "doctor":  # whose self-test may rightly take a while
        given["--facts-only"] = None
    elif name != "inspect" and _is_costly(name, given):
        given["--dry-run"] = None
    words = [name, *spelled(given)]
    if draw.random() < 0.05:
        words.insert(draw.randrange(len(words) + 1), draw.choice((*TEXTS, "--none", "--help", "--version", "-x")))
    return Call(name, words, config)


def _is_costly(name: str, given: dict[str, str | None]) -> bool:
    """What may rightly work for minutes is tried with --dry-run."""
    usual = CALLS[name]
    changed = any(given.get(flag) != usual.get(flag) for flag in COSTLY)
    scenes = any(flag in usual and flag not in given for flag in ("--activations", "--embeddings"))
    return name == "demo" or changed or scenes


def _value(draw: random.Random, cls: Any, field: str, names: list[str]) -> str | None:
    kind = kinds_of(cls)[field]
    if kind is bool:
        return None
    if draw.random() < 0.05:
        return draw.choice((*NUMBERS, *TEXTS))
    if field == "output":
        return draw.choice(OUTPUTS)
    if kind is Path:
        return draw.choice((*names, *names, *TEXTS))
    if field in ("model", "text_model"):
        return draw.choice(MODELS)
    if field == "images":
        return draw.choice((*IMAGES, *names))
    if choices := choices_of(cls, field):
        return draw.choice((*map(str, choices), *TEXTS))
    if field == "workers":
        return draw.choice(("-1", "1", "nan", "x", "1e400"))  # as many processes are started as are asked for
    return draw.choice(NUMBERS if kind in (int, float) or draw.random() < 0.4 else TEXTS)


def _config(draw: random.Random, cls: Any, settings: dict[str, Any]) -> bytes:
    if draw.random() < 0.25:
        return draw.choice(BROKEN_TOML)
    fields = draw.sample([*settings], min(len(settings), 2))
    lines = [f"{key_of(field, settings[field])} = {draw.choice(TOML)}" for field in fields if field != "workers"]
    return "\n".join(lines).encode()


# Made and judged ------------------------------------------------------------------------------------------------------


class Hung(BaseException):
    """No exception that a command could mend."""


class Said(NamedTuple):
    """How a call ended: its exit code, or what it raised, and its two outputs."""

    code: Any
    raised: BaseException | None
    stdout: str
    stderr: str
    seconds: float


def make(call: Call) -> Said:
    """The call, in this process and its working directory."""

    def hang(number: int, frame: object) -> None:
        raise Hung(f"no end after {SECONDS} s")

    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    code: Any = 0
    raised: BaseException | None = None
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGALRM)}
    start = time.monotonic()
    signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with (
            contextlib.redirect_stdout(streams[0]),
            contextlib.redirect_stderr(streams[1]),
            mock.patch.object(sys, "argv", ["saevlm-fast", *call.words]),
            mock.patch.dict(os.environ, {"COLUMNS": "200"}),
        ):
            main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException as error:
        raised = error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
    texts = (stream.buffer.getvalue().decode("utf-8") for stream in streams)
    return Said(code, raised, *texts, time.monotonic() - start)


def judged(said: Said) -> str:
    """One of OUTCOMES."""
    if isinstance(said.raised, Hung):
        return "hang"
    text = said.stdout + said.stderr
    if said.raised is not None or "Traceback (most recent call last)" in text:
        return "traceback"
    if said.code not in (0, 2):
        return "other exit code"
    if any((ord(character) < 32 and character not in "\n\r\t") or character in "\x7f\u202e" for character in text):
        return "raw control character"
    if said.code == 0:
        return "done"
    errors = [line for line in said.stderr.splitlines() if line.startswith("error: ")]
    return "refused" if len(errors) == 1 and len(errors[0]) > 12 else "not one error line"


@contextlib.contextmanager
def workplace(world: Path) -> Iterator[Path]:
    """A world of build_world as the working directory, with bounds on what a call may take of the machine."""
    bounds = {resource.RLIMIT_AS: _virtual_bytes() + (4 << 30), resource.RLIMIT_FSIZE: 1 << 28}
    before = {bound: resource.getrlimit(bound) for bound in bounds}
    here, place = Path.cwd(), world.with_name("work")
    environment = {"HF_HUB_OFFLINE": "1", "SAEVLM_FAST_CACHE": str(world.with_name("cache"))}
    for bound, value in bounds.items():
        resource.setrlimit(bound, (value, before[bound][1]))
    try:
        place.mkdir()
        os.chdir(place)
        with mock.patch.dict(os.environ, environment):
            yield place
    finally:
        os.chdir(here)
        for bound, value in before.items():
            resource.setrlimit(bound, value)


def _virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def fuzz_calls(world: Path, n: int, seed: int = 0, tell: Callable[[str], None] = print) -> dict[str, Counter[str]]:
    """n drawn calls on copies of a world: by command, how often which outcome. What must not be is told."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in CALLS}
    with workplace(world) as place:
        for number, call in enumerate(drawn_calls(n, _fresh(world, place), seed)):
            _fresh(world, place)
            if call.config is not None:
                (place / "drawn.toml").write_bytes(call.config)
            said = make(call)
            kind = judged(said)
            counts[call.name][kind] += 1
            if kind not in ("done", "refused"):
                config = "" if call.config is None else f" --config: {call.config[:200]!r}"
                tell(f"{kind}: call {number}, {said.seconds:.1f} s: {call.words!r:.2000}{config}\n{_detail(said)}")
    return counts


def _fresh(world: Path, place: Path) -> list[str]:
    """The world anew, and what is wrong; the names of all that is there."""
    for each in place.iterdir():
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each)
        else:
            each.unlink()
    shutil.copytree(world, place, dirs_exist_ok=True)
    return spoil(place)


def _detail(said: Said) -> str:
    error = said.raised
    if error is None:
        return f"  exit {said.code}: {said.stderr[-600:]!r}"
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f"{frame.filename}:{frame.lineno}" for frame in frames if "saevlm_fast" in frame.filename][-3:]
    last = f"{frames[-1].filename}:{frames[-1].lineno}"
    return f"  {type(error).__name__}: {str(error)[:300]!r} at {', '.join(ours)}, last {last}"

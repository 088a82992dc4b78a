"""Where the demo goes."""

from dataclasses import dataclass
from pathlib import Path

from saevlm_fast.config.common import DEVICE_HELP
from saevlm_fast.settings import Settings, setting


@dataclass(frozen=True)
class DemoOptions(Settings):
    """Where the demo goes."""

    output: Path = setting(Path("demo"), help="Directory for the SAEs, scores, table and picture.")
    device: str = setting("auto", help=DEVICE_HELP)
    force: bool = setting(False, help="Replace the demo in --output.", shown="go on with it", recorded=False)

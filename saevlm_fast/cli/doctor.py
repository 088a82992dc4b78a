"""saevlm-fast doctor: what this machine and installation can do, and whether it does it right."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import typer

from saevlm_fast.cli.options import Options, command
from saevlm_fast.cli.terminal import Bar, print_json, say
from saevlm_fast.config import DEVICE_HELP
from saevlm_fast.settings import setting


@dataclass(frozen=True, kw_only=True)
class DoctorArguments(Options):
    """Options of `saevlm-fast doctor`."""

    facts_only: bool = setting(False, help="Say what is here, without the self-test.")
    device: str = setting("auto", help=DEVICE_HELP)


@command("doctor")
def doctor(options: DoctorArguments) -> dict[str, Any] | None:
    """What this machine and installation can do, and a self-test; a report to paste into an issue.

    It names no user, no host, no path and no token. Exit code 1 if a check of the self-test fails.
    """
    from saevlm_fast.doctor.machine import SECTIONS, facts, problems
    from saevlm_fast.doctor.report import markdown
    from saevlm_fast.doctor.words import anonymous

    checks = _Checks(options.device)
    n_checks = 0 if options.facts_only else len(checks.names)
    with Bar("doctor", len(SECTIONS) + n_checks, "checks", lines=False) as bar:
        done = iter(range(len(SECTIONS) + n_checks))
        found = facts(lambda name: bar.update(next(done), text=name))
        checked = [] if options.facts_only else checks.run(lambda name: bar.update(next(done), text=name))
    failed = [check["name"] for check in checked if not check["ok"]]
    result = anonymous(
        {
            "ok": not failed,
            "facts": found,
            "problems": problems(found),
            "self_test": {"device": checks.device, "checks": checked} if checked else None,
        }
    )
    if options.json:
        print_json(result)
    else:
        say(*markdown(result))
    if failed:
        raise typer.Exit(1)
    return None


class _Checks:
    """The self-test on a device; without a torch that can be imported, one check, which says so."""

    def __init__(self, device: str):
        self.broken: Exception | None = None
        try:
            from saevlm_fast.doctor.self_test import CHECKS
            from saevlm_fast.runtime import resolve_device
        except (ImportError, OSError) as error:  # OSError: a library of torch's own that the system does not load
            self.device, self.names, self.broken = "none", ["torch"], error
            return
        self.device, self.names = str(resolve_device(device)), list(CHECKS)

    def run(self, on_check: Callable[[str], None]) -> list[dict[str, Any]]:
        """name, ok, said and seconds of each."""
        from saevlm_fast.doctor.words import said

        if self.broken is not None:
            return [{"name": "torch", "ok": False, "said": said(self.broken), "seconds": 0.0}]
        import torch

        from saevlm_fast.doctor.self_test import self_test

        return [check._asdict() for check in self_test(torch.device(self.device), on_check=on_check)]

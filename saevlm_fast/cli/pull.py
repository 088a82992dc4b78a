"""saevlm-fast pull: an SAE from the Hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saevlm_fast.cli.options import Plan, WorkOptions, command
from saevlm_fast.cli.planning import check_writable, disk_figures
from saevlm_fast.cli.terminal import print_pairs, say, tell, warn
from saevlm_fast.settings import setting


@dataclass(frozen=True, kw_only=True)
class PullArguments(WorkOptions):
    """Options of `saevlm-fast pull`."""

    spec: str = setting(help="hf:user/repo[@revision][/sae_id], or saelens:release/sae_id.", positional=True)
    output: Path | None = setting(None, help="Directory of the SAE.", shown="the last name of SPEC")
    force: bool = setting(False, help="Replace an SAE directory that is there.", recorded=False)

    @property
    def directory(self) -> Path:
        """Where the SAE goes."""
        from saevlm_fast.publishing.pull import default_output

        return default_output(self.spec) if self.output is None else self.output


def plan(options: PullArguments) -> Plan:
    """What would be downloaded: the Hub is asked for a list, and for nothing else."""
    from saevlm_fast.formats.hub import look_up
    from saevlm_fast.publishing.pull import check_free

    check_writable(options.directory)
    check_free(options.directory, options.force)
    found = look_up(options.spec)
    return Plan(
        f"pull {found.sae_id or 'the SAE'} of {found.repo}, commit {found.sha}",
        {
            "files": sorted(found.sizes),
            "download_bytes": sum(found.sizes.values()) if found.online else None,
            **disk_figures(options.directory, sum(found.sizes.values())),
        },
    )


@command("pull", plan=plan)
def pull(options: PullArguments) -> dict[str, Any]:
    """Download an SAE of the Hub, check it, and write it as an SAE directory with its origin in cfg.json."""
    from saevlm_fast.outputs import output_lock
    from saevlm_fast.publishing.pull import pull as run_pull

    with output_lock(options.directory, directory=False, parents=True):
        pulled = run_pull(options.spec, options.directory, options.force, tell)
    origin, config = pulled.origin, pulled.sae.config
    if origin.revision is not None:
        warn(f"{origin.revision} may move; hf:{origin.repo}@{origin.sha}/{origin.sae_id} stays what it is")
    k = () if config.k is None else (("k", str(config.k)),)
    size = ("size", f"{config.d_in:,} -> {config.d_sae:,}")
    print_pairs(
        [("repository", str(origin.repo)), ("commit", str(origin.sha)), ("architecture", config.architecture), size, *k]
    )
    say(f"wrote {pulled.output}")
    return {
        "output": str(pulled.output),
        "repo": origin.repo,
        "sae_id": origin.sae_id,
        "sha": origin.sha,
        "revision": origin.revision,
        "release": origin.release,
        "architecture": config.architecture,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "k": config.k,
    }

"""saevlm-fast push: an SAE to the Hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saevlm_fast.cli.options import Plan, WorkOptions, command
from saevlm_fast.cli.terminal import say, tell
from saevlm_fast.settings import setting

if TYPE_CHECKING:
    from saevlm_fast.publishing.push import Push


@dataclass(frozen=True, kw_only=True)
class PushArguments(WorkOptions):
    """Options of `saevlm-fast push`."""

    run: Path = setting(help="Run or SAE directory (cfg.json, sae_weights.safetensors).", positional=True)
    repo: str = setting(help="Repository of the Hub: user/repo. It is made if it is not there.", positional=True)
    sae_id: str | None = setting(None, help="Folder in the repository.", shown="the directory's name")
    private: bool = setting(False, help="Make the repository a private one.")
    revision: str = setting("main", help="Branch; made from main if it is not there.")
    licence: str | None = setting(
        None, help="Licence of the weights, by the Hub's name: apache-2.0, cc-by-4.0.", shown="none is named"
    )
    force: bool = setting(False, help="Replace another SAE of that folder, in a new commit.", recorded=False)

    def push(self) -> "Push":
        """ValueError: a name that the Hub or SAELens could not use."""
        from saevlm_fast.publishing.push import Push

        return Push(self.run, self.repo, self.sae_id, self.private, self.revision, self.licence, self.force)


def plan(options: PushArguments) -> Plan:
    """What would be uploaded; the repository is looked at, and not touched."""
    from saevlm_fast.publishing.push import planned

    what = options.push()
    files, there = planned(what)
    new = "a new repository" if there is None else f"on top of {there}"
    return Plan(
        f"push {options.run} to {options.repo} at {what.place}, {new}",
        {"files": sorted(files), "upload_bytes": sum(files.values()), "branch": options.revision},
    )


@command("push", plan=plan)
def push(options: PushArguments) -> dict[str, Any]:
    """Upload an SAE and its model card to the Hub, so that this program and SAELens load it by name.

    The login is huggingface_hub's: `hf auth login`, or HF_TOKEN.
    """
    from saevlm_fast.publishing.push import push as run_push

    pushed = run_push(options.push(), tell)
    where = f"{pushed.repo} at {pushed.sae_id}, commit {pushed.sha}"
    say(f"pushed {where}" if pushed.new else f"nothing to do: {where} is the same")
    say(pushed.url)
    say(f'SparseAutoencoder.from_pretrained("hf:{pushed.repo}/{pushed.sae_id}")')
    say(f'SAE.from_pretrained("{pushed.repo}", "{pushed.sae_id}")  # SAELens')
    return {
        "repo": pushed.repo,
        "sae_id": pushed.sae_id,
        "sha": pushed.sha,
        "url": pushed.url,
        "changed": pushed.new,
    }

"""What has been ordered: the list, one instance in full, and the operator's way to end one."""

from __future__ import annotations

from pathlib import Path

import click

from gpud import adminclient, tables
from gpud.cli.options import config_option, json_option, socket_of
from gpud.cli.showing import present, watch_option
from gpud.screens.instance import instance_screen
from gpud.tables import Row

_STOPPABLE = ("creating", "running")


class _OrId(click.Group):
    """Takes what is none of its verbs for the id of an instance to show."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The verb, or ``show`` with the id."""
        if args[0] in self.commands:
            return super().resolve_command(ctx, args)
        return "show", self.commands["show"], args


@click.group(cls=_OrId, invoke_without_command=True, subcommand_metavar="[ID | COMMAND [ARGS]...]")
@click.option("--all", "show_ended", is_flag=True, help="Also the newest ended ones.")
@config_option
@json_option
@watch_option
@click.pass_context
def instances(
    ctx: click.Context, config_file: Path, *, show_ended: bool, as_json: bool, watch: bool
) -> None:
    """List instances, or show instance ID in full."""
    if ctx.invoked_subcommand is not None:
        return
    path = "/instances?all=1" if show_ended else "/instances"
    present(
        lambda: adminclient.get(socket_of(config_file), path)["instances"],
        lambda rows: tables.Listing(rows, tables.INSTANCES, "no instances"),
        as_json=as_json,
        watch=watch,
    )


@instances.command("show")
@click.argument("instance_id", metavar="ID")
@config_option
@json_option
@watch_option
def instances_show(instance_id: str, config_file: Path, *, as_json: bool, watch: bool) -> None:
    """Show all of instance ID, by either of its ids."""
    path = adminclient.instance_path(instance_id)
    present(
        lambda: adminclient.get(socket_of(config_file), path),
        instance_screen,
        as_json=as_json,
        watch=watch,
    )


@instances.command("stop")
@click.argument("instance_id", metavar="ID")
@click.option("--reason", required=True, help="Kept with what happened to the instance.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@config_option
def instances_stop(instance_id: str, reason: str, config_file: Path, *, yes: bool) -> None:
    """End instance ID for good, as its caller's DELETE would.

    GPU.ai sees it stopping, then terminated. Its disk is lost. Its GPUs are sold again, unless they were
    drained before.
    """
    socket = socket_of(config_file)
    found = adminclient.get(socket, adminclient.instance_path(instance_id))
    if found["status"] in _STOPPABLE and not yes:
        click.confirm(_question(found), abort=True)
    path = adminclient.instance_path(found["upstream_id"], "stop")
    answer = adminclient.post(socket, path, {"reason": reason})
    upstream_id, status = answer["instance"]["upstream_id"], answer["instance"]["status"]
    if answer["stopped"]:
        click.echo(f"{upstream_id} is {status}; gpud instances {upstream_id} shows how far it is")
    else:
        click.echo(f"{upstream_id} is {status} already, nothing was changed")


def _question(found: Row) -> str:
    up = tables.duration(found["uptime_seconds"])
    state = f"running for {up}" if found["status"] == "running" else found["status"]
    shape = f"{found['gpu_type']} x{len(found['gpus'])}"
    return (
        f"{found['upstream_id']} ({found['instance_id']}, {shape}, {state}) ends for good, and its"
        " disk with it. Go on?"
    )

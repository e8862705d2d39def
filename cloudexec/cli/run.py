"""``cloudexec run``: run a program on one machine in AWS."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from cloudexec.cli._aws_options import ends_well, profile_option
from cloudexec.cli._errors import CommandError

_EPILOG = """\b
Examples:
  cloudexec run train.py --epochs 10 --cpus 4 --memory 16GiB --outputs models
  cloudexec run -m shop.report --spot --max-hours 2 --detach
  cloudexec run analysis.ipynb --outputs figures
  cloudexec run --cpus 8 --files src -- make -C src -j8 test

\b
Exit codes:
  0      the program succeeded
  1-255  its own exit code; 128 + N if signal N ended it
  2      the command line, the profile or a file is wrong; nothing was started
  3      AWS refused, or cannot be reached, or the machine was lost
  122    the program succeeded, and files that it has written did not come back
  125    the machine could not start the program
  130    Ctrl-C interrupted the command: the program was stopped, or left running
"""


_WHOLE = "\0"
"""Prefix of words that click must not split. No argument of a program can contain it."""


class _RunCommand(click.Command):
    """Accepts its own options anywhere on the command line, and leaves others to the program."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            at = args.index("--")
            args, ctx.meta["cloudexec.verbatim"] = args[:at], args[at + 1 :]
        return super().parse_args(ctx, args)

    def make_parser(self, ctx: click.Context) -> Any:
        """Return a parser that does not split a word after a single hyphen.

        An option -seed of a program must not become -s -e -e -d.
        """
        parser: Any = super().make_parser(ctx)
        divide = parser.parse_args

        def parse_args(args: list[str]) -> tuple[dict[str, Any], list[str], list[Any]]:
            values, rest, order = divide([_protected(each) for each in args])
            # The prefix is removed before click checks and converts the values.
            return {name: _bare(value) for name, value in values.items()}, _bare(rest), order

        parser.parse_args = parse_args
        return parser


def _protected(word: str) -> str:
    is_several = word.startswith("-") and not word.startswith("--") and len(word) > 2
    return _WHOLE + word if is_several else word


def _bare(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(map(_bare, value))
    return value.removeprefix(_WHOLE) if isinstance(value, str) else value


def _variables(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, str]:
    found: dict[str, str] = {}
    for each in values:
        name, sign, value = each.partition("=")
        if not sign and name not in os.environ:
            raise CommandError(f"--env {name}: there is no such variable here; give NAME=VALUE")
        found[name] = value if sign else os.environ[name]
    return found


@click.command(
    "run",
    cls=_RunCommand,
    short_help="Run a program on one machine in AWS.",
    epilog=_EPILOG,
    context_settings={
        "ignore_unknown_options": True,
        "allow_interspersed_args": True,
        "max_content_width": 100,
    },
)
@click.argument("words", metavar="[SCRIPT|NOTEBOOK] [ARGS]...", nargs=-1, type=click.UNPROCESSED)
@click.option("-m", "--module", metavar="MODULE", help="Run a module instead of a script.")
@click.option("--cpus", type=float, default=1, show_default=True, metavar="N", help="Processors.")
@click.option("--memory", metavar="SIZE", help="Such as 16GiB; by default 2 GiB a processor.")
@click.option("--gpu", "gpus", type=int, default=0, metavar="N", help="GPUs, on EC2.")
@click.option(
    "--disk",
    "disk_gib",
    type=int,
    metavar="GIB",
    help="Disk of the machine; by default 20 GiB on Fargate, and 30 on EC2.",
)
@click.option("--arch", type=click.Choice(["x86_64", "arm64"]), default="x86_64", show_default=True)
@click.option("--spot", is_flag=True, help="Use spare capacity, which AWS may take back.")
@click.option(
    "--on",
    default="batch",
    show_default=True,
    metavar="batch|ec2|fargate",
    help="Ask AWS Batch for the machine, which has a queue, or Amazon EC2 or ECS, without one.",
)
@click.option("--name", metavar="NAME", help="Name of the run; by default a new one.")
@click.option(
    "--resume",
    is_flag=True,
    help="Continue an ended run of that name with its journal and files, if there is one.",
)
@click.option(
    "--files",
    multiple=True,
    metavar="PATH",
    help="Send this file, folder or 'pattern', too. Can be repeated.",
)
@click.option(
    "--outputs",
    multiple=True,
    metavar="PATH",
    help="Bring back this file, or the files in this folder. Can be repeated.",
)
@click.option(
    "--env",
    multiple=True,
    metavar="NAME[=VALUE]",
    callback=_variables,
    help="Set a variable; without VALUE, as it is here. It goes through the bucket only.",
)
@click.option("--image", metavar="IMAGE", help="Run the program in this image.")
@click.option(
    "--packages",
    metavar="here|none|FILE",
    help="Install these packages; by default the profile's image, or here if it has none.",
)
@click.option(
    "--max-hours",
    type=float,
    default=24,
    show_default=True,
    metavar="HOURS",
    help="End the machine after that time.",
)
@click.option(
    "--max-cost",
    type=float,
    metavar="USD",
    help="End the machine, and workers of executors in it, before they cost more.",
)
@click.option("--project", default="", metavar="NAME", help="Name that goes into a tag.")
@click.option(
    "--log-file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the program's output to a file, too.",
)
@click.option("-d", "--detach", is_flag=True, help="Print the run's name, and do not wait.")
@click.option("-q", "--quiet", "is_quiet", is_flag=True, help="Show only what the program prints.")
@profile_option("Use the bucket, queues, cluster and roles of this profile.")
@click.pass_context
@ends_well
def run_command(
    context: click.Context,
    /,
    words: tuple[str, ...],
    module: str | None,
    detach: bool,
    log_file: Path | None,
    is_quiet: bool,
    profile: str | None,
    **options: Any,
) -> int:
    """Run a script, a notebook, a module (-m) or a command (after --) on one machine in AWS.

    The machine has the packages that are installed here, or the profile's image. The command sends
    the script's own modules, and the files that --files names. The program's output appears here
    with a delay of some seconds, and files in --outputs come back at the end.

    The run goes on if this command is killed or this computer is switched off. `cloudexec runs`
    lists runs, and `cloudexec attach`, `logs`, `stop` and `fetch` take a run's name. Ctrl-C asks
    whether to stop the run.

    Options of this command may follow the script. All words after -- belong to the program.
    """
    from cloudexec._runs.run import RunsClient, make_request
    from cloudexec.cli._following import Follower, opened_log

    verbatim = tuple(context.meta.get("cloudexec.verbatim", ()))
    target, args = "", (*words, *verbatim)
    if module is None and words:
        target, args = words[0], args[1:]
    request = make_request(module or target, args, module=module is not None, **options)

    def report(line: str) -> None:
        if not is_quiet:
            click.echo(line, err=True)

    if detach and log_file is not None:
        raise CommandError(
            "--detach does not wait for the program's output, so nothing could be written to "
            "--log-file: give it to `cloudexec attach`"
        )
    # The log is opened first, so that nothing is started if it cannot be written.
    with opened_log(log_file) as log, RunsClient(profile) as client:
        plan = client.call(client.runs.start(request, report))
        if detach:
            report(f"`cloudexec attach {plan.name}` shows the program's output")
            click.echo(plan.name)
            return 0
        return Follower(client, plan.name, report, log=log).follow()

"""Deletes the functions of a stack: they are not in it, as executors make them."""

from __future__ import annotations

from collections.abc import Sequence

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.functions import functions_of_stack, is_gone
from cloudexec._aws.steps import Noted, Report, stepping
from cloudexec._errors import AwsError

__all__ = ["delete_functions", "stock_of_functions"]


async def stock_of_functions(
    clients: AwsClients, stack: str, roles: Sequence[str]
) -> tuple[list[str], str]:
    """Return the stack's functions, or why they may not be looked for.

    Stacks from before there were any are also taken down by those who have no rights there.
    """
    try:
        return [each async for each in functions_of_stack(clients, stack, tuple(roles))], ""
    except AwsError as exc:
        if "Denied" not in exc.code:
            raise
        return [], str(exc)


async def delete_functions(
    clients: AwsClients, stack: str, roles: Sequence[str], report: Report
) -> None:
    """Delete them. Workers that run end with their program, or at the end of their session.

    Raises:
        AwsError: If AWS refuses, or cannot be reached.
    """
    names, refusal = await stock_of_functions(clients, stack, roles)
    if refusal:
        report(Noted(text=f"functions of AWS Lambda could not be looked for: {refusal}"))
    if not names:
        return
    with stepping(report, "Functions") as step:
        for name in names:
            try:
                await clients.call("lambda", "delete_function", FunctionName=name)
            except AwsError as exc:
                if not is_gone(exc):
                    raise
        step.found = f"{len(names):,} deleted"

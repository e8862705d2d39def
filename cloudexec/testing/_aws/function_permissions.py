"""Says what a call of AWS Lambda needs to be allowed.

The actions and resources are those of the Service Authorization Reference, "Actions, resources, and
condition keys for AWS Lambda".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from cloudexec.testing._aws.backends import ACCOUNT
from cloudexec.testing._aws.wire import Call

__all__ = ["of_lambda"]

_WITHOUT_RESOURCES = ("GetAccountSettings", "ListFunctions")


def of_lambda(call: Call) -> Iterator[tuple[str, str, Mapping[str, str]]]:
    """Yield actions, the resources that they are on, and the keys of conditions."""
    given = call.parameters
    action = "InvokeFunction" if call.operation == "Invoke" else call.operation
    if call.operation in _WITHOUT_RESOURCES:
        yield f"lambda:{action}", "", {}
        return
    name = str(given.get("FunctionName") or given.get("Resource", "")).rpartition(":")[2]
    function = f"arn:aws:lambda:{call.region}:{ACCOUNT}:function:{name}"
    yield f"lambda:{action}", function, {}
    if call.operation == "CreateFunction":
        if given.get("Tags"):
            yield "lambda:TagResource", function, {}
        yield "iam:PassRole", given["Role"], {"iam:PassedToService": "lambda.amazonaws.com"}
        if bucket := (given.get("Code") or {}).get("S3Bucket"):
            # Lambda reads the archive for whoever asks. AWS names no other right to read it.
            yield "s3:GetObject", f"arn:aws:s3:::{bucket}/{given['Code'].get('S3Key', '')}", {}

"""What must be allowed for workers on AWS Lambda: a part of the table of calls."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["OF_FUNCTIONS", "OPERATIONS", "PASSED_TO"]

PASSED_TO = "lambda.amazonaws.com"
OPERATIONS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "CreateFunction": (
        ("lambda:CreateFunction", "function"),
        ("lambda:TagResource", "function"),
        # Whoever makes a function of an image must be allowed to read that. AWS Lambda Developer
        # Guide, "Create a Lambda function using a container image", "Amazon ECR permissions".
        ("ecr:BatchGetImage", "image"),
        ("ecr:GetDownloadUrlForLayer", "image"),
        ("ecr:GetRepositoryPolicy", "image"),
        ("iam:PassRole", "function_role"),
    ),
    "DeleteFunction": (("lambda:DeleteFunction", "function"),),
    "DeleteFunctionConcurrency": (("lambda:DeleteFunctionConcurrency", "function"),),
    "GetAccountSettings": (("lambda:GetAccountSettings", "any"),),
    "GetFunctionConcurrency": (("lambda:GetFunctionConcurrency", "function"),),
    "GetFunctionConfiguration": (("lambda:GetFunctionConfiguration", "function"),),
    "Invoke": (("lambda:InvokeFunction", "function"),),
    "ListFunctions": (("lambda:ListFunctions", "any"),),
    "PutFunctionConcurrency": (("lambda:PutFunctionConcurrency", "function"),),
    "PutFunctionEventInvokeConfig": (("lambda:PutFunctionEventInvokeConfig", "function"),),
}
"""Operation -> actions as IAM names them, and the kinds of resource that they are allowed on.
Service Authorization Reference, "Actions, resources, and condition keys for AWS Lambda"."""
OF_FUNCTIONS = frozenset(
    {("lambda", each) for each in OPERATIONS.keys() - {"ListFunctions"}}
    | {("logs", "FilterLogEvents")}
)
"""Calls that are made only where there is a role for functions."""

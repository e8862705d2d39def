"""What the template has for workers on AWS Lambda: a role, and a repository that lets Lambda in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cloudexec._aws.policy_lambda import OPERATIONS, PASSED_TO

__all__ = [
    "CONDITION",
    "OUTPUT",
    "PARAMETER",
    "function_role",
    "repository_policy",
    "run_statements",
]

Json = dict[str, Any]

CONDITION = "Lambda"
PARAMETER: Json = {
    "Type": "String",
    "AllowedValues": ["true", "false"],
    "Default": "false",
    "Description": "Whether there is a role for functions of AWS Lambda too.",
}
OUTPUT = ("Lambda", "Role of functions", {"Fn::GetAtt": ["FunctionRole", "Arn"]})
_INTERFACES = (
    "ec2:AssignPrivateIpAddresses",
    "ec2:CreateNetworkInterface",
    "ec2:DeleteNetworkInterface",
    "ec2:DescribeNetworkInterfaces",
    "ec2:DescribeSubnets",
    "ec2:UnassignPrivateIpAddresses",
)
"""AWS managed policy AWSLambdaVPCAccessExecutionRole."""


def function_role(boundary: Json, tags: Sequence[Json], data: Json) -> Json:
    """Return the role of functions, which tasks have there.

    It may do what tasks may do elsewhere, and what Lambda does in its name: write the log, and
    connect functions to the VPC. It may not read the key of workers, since that comes with an
    event.

    Args:
        boundary: Properties that bound the role.
        tags: Of the role.
        data: The statement about the bucket that roles of tasks have.
    """
    return {
        "FunctionRole": {
            "Condition": CONDITION,
            "Type": "AWS::IAM::Role",
            "Properties": {
                **boundary,
                "Description": "What tasks on AWS Lambda may do",
                "AssumeRolePolicyDocument": {
                    "Version": "2012-10-17",
                    "Statement": [
                        {
                            "Effect": "Allow",
                            "Principal": {"Service": "lambda.amazonaws.com"},
                            "Action": "sts:AssumeRole",
                        }
                    ],
                },
                "Policies": [
                    {
                        "PolicyName": "function",
                        "PolicyDocument": {
                            "Version": "2012-10-17",
                            "Statement": [
                                data,
                                {
                                    "Effect": "Allow",
                                    "Action": ["logs:CreateLogStream", "logs:PutLogEvents"],
                                    "Resource": {"Fn::GetAtt": ["LogGroup", "Arn"]},
                                },
                                {
                                    # There are no resources of most of these actions to name. What
                                    # runs in a function cannot use them: only Lambda can.
                                    "Effect": "Allow",
                                    "Action": list(_INTERFACES),
                                    "Resource": "*",
                                    "Condition": {"Null": {"lambda:SourceFunctionArn": "true"}},
                                },
                            ],
                        },
                    }
                ],
                "Tags": list(tags),
            },
        }
    }


def run_statements() -> list[Json]:
    """Return what the role of runs may do with functions, as statements of a policy.

    References:
        Service Authorization Reference, "Actions, resources, and condition keys for AWS Lambda".
    """
    function = "arn:${AWS::Partition}:lambda:${AWS::Region}:${AWS::AccountId}:function:"

    def allow(resource: Any, *actions: str, **conditions: Json) -> Json:
        found: Json = {"Effect": "Allow", "Action": list(actions), "Resource": resource}
        return {**found, "Condition": conditions} if conditions else found

    return [
        allow(
            {"Fn::Sub": function + "${AWS::StackName}-*"},
            *sorted(
                {
                    action
                    for rows in OPERATIONS.values()
                    for action, kind in rows
                    if kind == "function"
                }
            ),
        ),
        # There are no resources of these actions to name.
        allow("*", "lambda:GetAccountSettings", "lambda:ListFunctions"),
        # Whoever makes a function of an image must be allowed to read that.
        allow(
            {"Fn::GetAtt": ["Repository", "Arn"]},
            "ecr:BatchGetImage",
            "ecr:GetDownloadUrlForLayer",
            "ecr:GetRepositoryPolicy",
        ),
        allow({"Fn::GetAtt": ["LogGroup", "Arn"]}, "logs:FilterLogEvents"),
        allow(
            {"Fn::GetAtt": ["FunctionRole", "Arn"]},
            "iam:PassRole",
            StringEquals={"iam:PassedToService": [PASSED_TO]},
        ),
    ]


def repository_policy() -> Json:
    """Return the property by which Lambda may read images, where there are functions.

    References:
        AWS Lambda Developer Guide, "Create a Lambda function using a container image", "Amazon ECR
        permissions".
    """
    function = "arn:${AWS::Partition}:lambda:${AWS::Region}:${AWS::AccountId}:function:"
    policy = {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Sid": "LambdaReadsImages",
                "Effect": "Allow",
                "Principal": {"Service": "lambda.amazonaws.com"},
                "Action": ["ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer"],
                "Condition": {
                    "StringLike": {"aws:SourceArn": {"Fn::Sub": function + "${AWS::StackName}-*"}}
                },
            }
        ],
    }
    return {"RepositoryPolicyText": {"Fn::If": [CONDITION, policy, {"Ref": "AWS::NoValue"}]}}

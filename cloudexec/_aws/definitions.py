"""Registers each content once as a job definition, finds it by name, and uses one revision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.ecr import EcrImage
from cloudexec._aws.names import DEFINITION_PREFIX

__all__ = [
    "deregister",
    "ensure_definition",
    "list_definitions",
    "pin_image",
]


async def ensure_definition(clients: AwsClients, request: Mapping[str, Any]) -> str:
    """Return the ARN, with revision, of the definition with this content. Register it if needed.

    Args:
        clients: Calls to AWS.
        request: From ``definition_request``.

    Raises:
        AwsError: If AWS refuses.
    """
    found = await list_definitions(clients, request["jobDefinitionName"])
    if found:
        return str(max(found, key=lambda each: int(each["revision"]))["jobDefinitionArn"])
    registered = await clients.call("batch", "register_job_definition", **request)
    return str(registered["jobDefinitionArn"])


async def list_definitions(clients: AwsClients, name: str = "") -> list[dict[str, Any]]:
    """Return cloudexec's active definitions, or the active revisions of one.

    Raises:
        AwsError: If AWS refuses.
    """
    parameters: dict[str, Any] = {"status": "ACTIVE"}
    if name:
        parameters["jobDefinitionName"] = name
    pages = clients.pages("batch", "describe_job_definitions", "jobDefinitions", **parameters)
    return [each async for each in pages if each["jobDefinitionName"].startswith(DEFINITION_PREFIX)]


async def deregister(clients: AwsClients, arn: str) -> None:
    """Deregister one revision. Jobs that were submitted with it continue.

    Raises:
        AwsError: If AWS refuses.
    """
    await clients.call("batch", "deregister_job_definition", jobDefinition=arn)


async def pin_image(clients: AwsClients, image: str) -> str:
    """Replace the tag of an image in Amazon ECR by its digest, which always means the same image.

    Other images, and images that have a digest, are returned unchanged.

    Raises:
        AwsError: If the repository has no such image, or AWS refuses.
    """
    found = EcrImage.parse(image)
    if found is None or "@" in image:
        return image
    details = await clients.call(
        "ecr",
        "describe_images",
        region=found.region,
        registryId=found.account,
        repositoryName=found.repository,
        imageIds=[{"imageTag": found.tag or "latest"}],
    )
    return f"{found.name}@{details['imageDetails'][0]['imageDigest']}"

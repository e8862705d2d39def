"""Creates, changes and deletes the resources of stacks in moto's back ends."""

from __future__ import annotations

import datetime
import re
import secrets
import string
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cloudexec.testing._aws.backends import ACCOUNT, batch_backend, ecs_backend, logs_backend
from cloudexec.testing._aws.batch_resources import BatchResources
from cloudexec.testing._aws.engine import Engine

__all__ = ["Resource", "ResourceError", "StackResources"]

_TAGGED = (
    "AWS::EC2::SecurityGroup",
    "AWS::ECR::Repository",
    "AWS::ECS::Cluster",
    "AWS::IAM::Role",
    "AWS::Logs::LogGroup",
    "AWS::S3::Bucket",
    "AWS::SecretsManager::Secret",
)
"""Types with a list of tags, to which CloudFormation adds the stack's tags."""


_REPOSITORY = re.compile(r"(?:[a-z0-9]+(?:[._-][a-z0-9]+)*/)*[a-z0-9]+(?:[._-][a-z0-9]+)*")
"""Amazon ECR API Reference, "CreateRepository"."""


class ResourceError(Exception):
    """A resource cannot be created, changed or deleted; the text is the event's reason."""


@dataclass(slots=True, kw_only=True)
class Resource:
    """One resource of a stack."""

    logical_id: str
    type: str
    at: datetime.datetime
    physical_id: str | None = None
    properties: dict[str, Any] = field(default_factory=dict)
    status: str = "CREATE_IN_PROGRESS"
    reason: str | None = None
    policy: str = "Delete"
    object: Any = None
    """moto's object for the resource, if there is one."""


class StackResources:
    """Makes, changes and deletes resources.

    Args:
        batch: Makes compute environments and queues.
        engine: Runs the jobs, which must end before their environment is deleted.
    """

    def __init__(self, batch: BatchResources, engine: Engine) -> None:
        self._batch = batch
        self._engine = engine

    def create(self, region: str, stack: str, tags: Mapping[str, str], resource: Resource) -> None:
        """Make a resource from its properties.

        Raises:
            ResourceError: If it cannot be made.
        """
        properties = dict(resource.properties)
        name = f"{stack}-{resource.logical_id}-{secrets.token_hex(6)}"
        all_tags = {**tags, "aws:cloudformation:stack-name": stack}
        if resource.type in _TAGGED:
            own = {tag["Key"] for tag in properties.get("Tags", [])}
            properties["Tags"] = [
                *properties.get("Tags", []),
                *({"Key": key, "Value": all_tags[key]} for key in all_tags if key not in own),
            ]
        try:
            if resource.type == "AWS::Batch::ComputeEnvironment":
                self._create_environment(region, name, tags, resource, properties)
            elif resource.type == "AWS::ECS::Cluster":
                _create_cluster(region, name, resource, properties)
            elif resource.type == "AWS::Batch::JobQueue":
                self._create_queue(region, name, tags, resource, properties)
            elif resource.type == "AWS::SecretsManager::Secret":
                _create_secret(region, name, resource, properties)
            else:
                _check_repository(resource, properties)
                self._create_with_moto(region, stack, resource, properties)
                _set_repository_policy(region, resource, properties)
        except ResourceError:
            raise
        except Exception as exc:
            raise ResourceError(str(exc) or repr(exc)) from exc

    def update(self, region: str, resource: Resource, properties: dict[str, Any]) -> None:
        """Change a resource to new properties.

        Raises:
            ResourceError: If it cannot be changed.
        """
        try:
            if resource.type == "AWS::Batch::ComputeEnvironment":
                environment = batch_backend(region).get_compute_environment(resource.physical_id)
                changed = _lowered(properties["ComputeResources"])
                environment.compute_resources = {**environment.compute_resources, **changed}
                environment.state = properties.get("State", environment.state)
                self._engine.poke()
            elif resource.type == "AWS::Batch::JobQueue":
                self._batch.update_queue(
                    region, {**_lowered(properties), "jobQueue": resource.physical_id}
                )
            elif resource.type == "AWS::Logs::LogGroup":
                group = logs_backend(region).groups[resource.physical_id]
                group.set_retention_policy(properties.get("RetentionInDays"))
            elif resource.type == "AWS::S3::Bucket":
                _set_lifecycle(resource.physical_id or "", properties)
            _set_repository_policy(region, resource, properties)
            # Other types stay unchanged, because the fake does not use their properties.
        except Exception as exc:
            raise ResourceError(str(exc) or repr(exc)) from exc

    def prepare_deletion(self, region: str, resource: Resource) -> None:
        """Disable a resource that must be DISABLED before it can be deleted."""
        if resource.type == "AWS::Batch::JobQueue":
            queue = batch_backend(region).get_job_queue(resource.physical_id)
            if queue is not None:
                queue.state = "DISABLED"
                self._engine.delete_queue(queue.arn)
        elif resource.type == "AWS::Batch::ComputeEnvironment":
            environment = batch_backend(region).get_compute_environment(resource.physical_id)
            if environment is not None:
                environment.state = "DISABLED"

    def must_wait(self, resource: Resource) -> bool:
        """Return whether jobs still keep a resource from being deleted."""
        if resource.type == "AWS::Batch::JobQueue":
            return bool(self._engine.active(resource.physical_id or ""))
        if resource.type == "AWS::Batch::ComputeEnvironment":
            return bool(self._engine.in_environment(resource.physical_id or ""))
        return False

    def delete(self, region: str, resource: Resource) -> None:
        """Delete a resource. It is no error if the resource does not exist any more.

        Raises:
            ResourceError: If it cannot be deleted.
        """
        physical = resource.physical_id or ""
        if resource.type == "AWS::Batch::JobQueue":
            if batch_backend(region).get_job_queue(physical) is not None:
                self._batch.delete_queue(region, {"jobQueue": physical})
        elif resource.type == "AWS::Batch::ComputeEnvironment":
            if batch_backend(region).get_compute_environment(physical) is not None:
                self._batch.delete_environment(region, {"computeEnvironment": physical})
        elif resource.type == "AWS::SecretsManager::Secret":
            from moto.secretsmanager.models import secretsmanager_backends

            known = secretsmanager_backends[ACCOUNT][region].secrets
            if physical in known:
                known.pop(physical)
        elif resource.type == "AWS::ECS::Cluster":
            if self._engine.active(resource.object.arn):
                raise ResourceError("The Cluster cannot be deleted while Tasks are active.")
            ecs_backend(region).delete_cluster(physical)
        elif resource.type == "AWS::S3::Bucket":
            _delete_bucket(physical)
        elif resource.type == "AWS::ECR::Repository":
            _delete_repository(region, physical, resource.properties)
        else:
            _delete_with_moto(region, resource)

    def attribute(self, resource: Resource, name: str) -> Any:
        """Return an attribute of a resource, as ``Fn::GetAtt`` does."""
        if resource.type in ("AWS::Batch::ComputeEnvironment", "AWS::Batch::JobQueue"):
            return resource.physical_id
        if resource.type == "AWS::SecretsManager::Secret":
            return resource.physical_id
        try:
            return resource.object.get_cfn_attribute(name)
        except Exception as exc:
            raise ResourceError(
                f"Template error: {resource.logical_id} has no attribute {name}"
            ) from exc

    def _create_environment(
        self,
        region: str,
        name: str,
        tags: Mapping[str, str],
        resource: Resource,
        properties: dict[str, Any],
    ) -> None:
        made = self._batch.create_environment(
            region,
            {
                "computeEnvironmentName": properties.get("ComputeEnvironmentName", name),
                "type": properties["Type"],
                "state": properties.get("State", "ENABLED"),
                "computeResources": _lowered(properties.get("ComputeResources", {})),
                "serviceRole": properties.get("ServiceRole"),
                "tags": {**tags, **properties.get("Tags", {})},
            },
        )
        resource.physical_id = made["computeEnvironmentArn"]

    def _create_queue(
        self,
        region: str,
        name: str,
        tags: Mapping[str, str],
        resource: Resource,
        properties: dict[str, Any],
    ) -> None:
        made = self._batch.create_queue(
            region,
            {
                "jobQueueName": name,
                **_lowered({k: v for k, v in properties.items() if k != "Tags"}),
                "tags": {**tags, **properties.get("Tags", {})},
            },
        )
        resource.physical_id = made["jobQueueArn"]

    @staticmethod
    def _create_with_moto(
        region: str, stack: str, resource: Resource, properties: dict[str, Any]
    ) -> None:
        from moto.cloudformation.parsing import (
            generate_resource_name,
            resource_class_from_type,
            resource_name_property_from_type,
        )

        model = resource_class_from_type(resource.type)
        if model is None:
            raise ResourceError(f"FakeAWS has no resources of type {resource.type}")
        named = resource_name_property_from_type(resource.type)
        name = properties.get(named) if named else None
        name = name or generate_resource_name(resource.type, stack, resource.logical_id)
        made = model.create_from_cloudformation_json(
            name,
            {"Type": resource.type, "Properties": properties},
            ACCOUNT,
            region,
            LogicalId=resource.logical_id,
            StackId=stack,
            ResourceType=resource.type,
        )
        resource.object = made
        # Some of moto's objects, such as rules of security groups, have no id.
        resource.physical_id = str(getattr(made, "physical_resource_id", None) or name)
        if resource.type == "AWS::S3::Bucket":
            _set_lifecycle(resource.physical_id, properties)


def _lowered(node: Any) -> Any:
    """Change the names of Batch's parameters in CloudFormation to those in the API."""
    if isinstance(node, list):
        return [_lowered(each) for each in node]
    if not isinstance(node, dict):
        return node
    return {
        # The user chooses the names of tags, so they stay as they are.
        key[:1].lower() + key[1:]: each if key == "Tags" else _lowered(each)
        for key, each in node.items()
        if key not in ("ReplaceComputeEnvironment", "UpdatePolicy")
    }


def _create_cluster(region: str, name: str, resource: Resource, properties: dict[str, Any]) -> None:
    # moto's own function would leave out capacity providers and tags.
    cluster = ecs_backend(region).create_cluster(
        properties.get("ClusterName", name),
        tags=[{"key": each["Key"], "value": each["Value"]} for each in properties["Tags"]],
        capacity_providers=properties.get("CapacityProviders"),
    )
    resource.object = cluster
    resource.physical_id = cluster.name


def _create_secret(region: str, name: str, resource: Resource, properties: dict[str, Any]) -> None:
    from moto.secretsmanager.models import secretsmanager_backends

    text = properties.get("SecretString")
    if "GenerateSecretString" in properties:
        text = _generated(properties["GenerateSecretString"])
    backend = secretsmanager_backends[ACCOUNT][region]
    backend.create_secret(
        name=properties.get("Name", name),
        secret_string=text,
        secret_binary=None,
        description=properties.get("Description", ""),
        tags=properties.get("Tags", []),
        kms_key_id=properties.get("KmsKeyId"),
        client_request_token=str(uuid.uuid4()),
        replica_regions=[],
        force_overwrite=False,
    )
    secret = backend.secrets[properties.get("Name", name)]
    resource.physical_id = secret.arn


def _generated(wanted: Mapping[str, Any]) -> str:
    import json

    alphabet = string.ascii_lowercase
    if not wanted.get("ExcludeUppercase"):
        alphabet += string.ascii_uppercase
    if not wanted.get("ExcludeNumbers"):
        alphabet += string.digits
    if not wanted.get("ExcludePunctuation"):
        alphabet += string.punctuation
    if wanted.get("ExcludeLowercase"):
        alphabet = alphabet[26:]
    excluded = wanted.get("ExcludeCharacters", "")
    letters = [letter for letter in alphabet if letter not in excluded]
    length = int(wanted.get("PasswordLength", 32))
    text = "".join(secrets.choice(letters) for _ in range(length))
    if "GenerateStringKey" in wanted:
        template = json.loads(wanted.get("SecretStringTemplate", "{}"))
        return json.dumps({**template, wanted["GenerateStringKey"]: text})
    return text


def _s3() -> Any:
    from moto.s3.models import s3_backends

    return s3_backends[ACCOUNT]["aws"]


def _check_repository(resource: Resource, properties: Mapping[str, Any]) -> None:
    """Refuse a name that Amazon ECR does not accept, but moto does."""
    name = str(properties.get("RepositoryName", ""))
    if resource.type == "AWS::ECR::Repository" and name and not _REPOSITORY.fullmatch(name):
        raise ResourceError(
            f"Invalid parameter at 'repositoryName' failed to satisfy constraint: 'must satisfy "
            f"regular expression '{_REPOSITORY.pattern}'' (Service: Ecr, Status Code: 400)"
        )


def _set_repository_policy(region: str, resource: Resource, properties: Mapping[str, Any]) -> None:
    """Say who may use a repository, which moto leaves out."""
    import json

    from moto.ecr.models import ecr_backends

    if resource.type == "AWS::ECR::Repository":
        given = properties.get("RepositoryPolicyText")
        repository = ecr_backends[ACCOUNT][region].repositories[resource.physical_id or ""]
        repository.policy = json.dumps(given) if given else None


def _set_lifecycle(bucket: str, properties: Mapping[str, Any]) -> None:
    rules = properties.get("LifecycleConfiguration", {}).get("Rules", [])
    found = []
    for rule in rules:
        entry: dict[str, Any] = {
            "ID": rule.get("Id", "rule"),
            "Status": rule["Status"],
            "Filter": {"Prefix": rule.get("Prefix", "")},
        }
        if "ExpirationInDays" in rule:
            entry["Expiration"] = {"Days": str(rule["ExpirationInDays"])}
        if "AbortIncompleteMultipartUpload" in rule:
            days = rule["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"]
            entry["AbortIncompleteMultipartUpload"] = {"DaysAfterInitiation": str(days)}
        found.append(entry)
    if found:
        _s3().put_bucket_lifecycle(bucket, found)


def _delete_bucket(name: str) -> None:
    from moto.s3.exceptions import MissingBucket

    backend = _s3()
    try:
        bucket = backend.get_bucket(name)
    except MissingBucket:
        return
    if bucket.keys:
        raise ResourceError(
            "The bucket you tried to delete is not empty. You must delete all versions in the "
            f"bucket. (Service: S3, Status Code: 409, Request ID: {uuid.uuid4().hex[:16].upper()})"
        )
    backend.delete_bucket(name)


def _delete_repository(region: str, name: str, properties: Mapping[str, Any]) -> None:
    from moto.ecr.models import ecr_backends

    backend = ecr_backends[ACCOUNT][region]
    repository = backend.repositories.get(name)
    if repository is None:
        return
    if repository.images and not properties.get("EmptyOnDelete"):
        raise ResourceError(
            f"The repository with name '{name}' in registry with id '{ACCOUNT}' cannot be deleted "
            "because it still contains images"
        )
    backend.delete_repository(name, force=True)


def _delete_with_moto(region: str, resource: Resource) -> None:
    from moto.cloudformation.parsing import parse_and_delete_resource

    try:
        try:
            resource.object.delete(ACCOUNT, region)
        except (TypeError, AttributeError):
            parse_and_delete_resource(
                resource.physical_id or "",
                {"Type": resource.type, "Properties": resource.properties},
                ACCOUNT,
                region,
            )
    except Exception as exc:
        text = str(exc) or repr(exc)
        if any(word in text for word in ("NotFound", "not found", "does not exist", "NoSuch")):
            return
        raise ResourceError(text) from exc

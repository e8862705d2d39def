"""Nothing is built or pushed twice, and what was pushed is noted: without an engine."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cloudexec import ConfigError, LaunchError
from cloudexec._aws.ecr import EcrImage
from cloudexec._aws.image_contents import Contents, ImageSpec
from cloudexec._aws.image_engine import PushReport, Report, ignore_line, ignore_push
from cloudexec._aws.images import (
    LABELS,
    EcrRepository,
    Engine,
    build,
    plan,
    push,
    push_to_profile,
)
from cloudexec._aws.profile import Profile
from cloudexec._errors import AwsError

HOST = "123456789012.dkr.ecr.eu-central-1.amazonaws.com"
URI = f"{HOST}/cloudexec-default"
DIGEST = "sha256:" + "5" * 64


class PretendEngine(Engine):
    """Keeps images as labels in a dictionary."""

    def __init__(self, *, says_digest: bool = True) -> None:
        super().__init__(client=object())
        self.images: dict[str, dict[str, Any]] = {}
        self.pulled: list[str] = []
        self.built: list[str] = []
        self.pushed: list[tuple[str, str, Mapping[str, str] | None]] = []
        self._says_digest = says_digest

    def close(self) -> None: ...

    def find(self, name: str) -> dict[str, Any] | None:
        return self.images.get(name)

    def pull(self, name: str, platform: str) -> None:
        self.pulled.append(name)
        system, architecture = platform.split("/")
        self.images[name] = {"Id": f"sha256:{name}", "Os": system, "Architecture": architecture}

    def build(
        self,
        name: str,
        contents: Contents,
        *,
        labels: Mapping[str, str],
        report: Report = ignore_line,
    ) -> str:
        self.built.append(name)
        report("STEP 1")
        self.images[name] = {"Id": f"sha256:{name}", "Config": {"Labels": dict(labels)}}
        return f"sha256:{name}"

    def push(
        self,
        image: str,
        repository: str,
        tag: str,
        credentials: Mapping[str, str] | None,
        report: PushReport = ignore_push,
    ) -> str:
        self.pushed.append((repository, tag, credentials))
        return DIGEST if self._says_digest else ""


class PretendAws:
    """Answers two calls of ECR; the repository has what it is told."""

    def __init__(self) -> None:
        self.tags: dict[str, str] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.appears_after = 0
        self.error = "ImageNotFoundException"
        self.endpoint = f"https://{HOST}"

    async def call(
        self, service: str, operation: str, /, *, region: str = "", **parameters: Any
    ) -> Any:
        assert (service, region) == ("ecr", "eu-central-1")
        self.calls.append((operation, parameters))
        if operation == "get_authorization_token":
            token = base64.b64encode(b"AWS:secret").decode()
            entry = {"authorizationToken": token, "proxyEndpoint": self.endpoint}
            return {"authorizationData": [entry]}
        asked = [each for each, _ in self.calls].count("describe_images")
        tag = parameters["imageIds"][0]["imageTag"]
        if self.appears_after and asked > self.appears_after:
            self.tags[tag] = DIGEST
        if tag not in self.tags:
            raise AwsError("no", code=self.error)
        return {"imageDetails": [{"imageDigest": self.tags[tag]}]}


@pytest.fixture
def engine() -> PretendEngine:
    return PretendEngine()


@pytest.fixture
def aws() -> PretendAws:
    return PretendAws()


@pytest.fixture
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Profile:
    monkeypatch.setenv("CLOUDEXEC_CONFIG_DIR", str(tmp_path))
    return Profile(name="default", region="eu-central-1", repository=URI)


def test_base_is_pulled_once(engine: PretendEngine) -> None:
    """The name of the image depends on what the base is; the same base is not asked for again."""
    first = plan(ImageSpec(base="base"), engine=engine)
    assert plan(ImageSpec(base="base"), engine=engine) == first
    assert engine.pulled == ["base"]


def test_refresh_looks_for_a_newer_base(engine: PretendEngine) -> None:
    """A tag of a base moves; who wants the newer one says so."""
    plan(ImageSpec(base="base"), engine=engine)
    plan(ImageSpec(base="base"), engine=engine, refresh=True)
    assert engine.pulled == ["base", "base"]


def test_base_of_another_platform_is_pulled(engine: PretendEngine) -> None:
    """An engine keeps one platform of a name: the other one is another base."""
    plan(ImageSpec(base="base"), engine=engine)
    plan(ImageSpec(base="base", platform="linux/arm64"), engine=engine)
    assert engine.pulled == ["base", "base"]


def test_planning_without_pulling_says_that_the_base_is_missing(engine: PretendEngine) -> None:
    """``cloudexec image show`` changes nothing."""
    with pytest.raises(LaunchError, match=r"python:3\.13-slim is not here"):
        plan(ImageSpec(python="3.13"), engine=engine, pull=False)
    assert not engine.pulled


def test_same_content_is_built_once(engine: PretendEngine) -> None:
    """The second build finds the image of the first."""
    planned = plan(ImageSpec(), engine=engine)
    first, second = build(planned, engine=engine), build(planned, engine=engine)
    assert (first.was_built, second.was_built) == (True, False)
    assert first.image_id == second.image_id
    assert engine.built == [planned.name]


def test_image_of_the_right_name_but_other_content_is_built_again(engine: PretendEngine) -> None:
    """Somebody may have tagged another image with the name."""
    planned = plan(ImageSpec(), engine=engine)
    engine.images[planned.name] = {"Id": "sha256:other", "Config": {"Labels": None}}
    assert build(planned, engine=engine).was_built


def test_labels_say_what_the_image_is(engine: PretendEngine) -> None:
    """``cloudexec doctor`` compares them with what runs here."""
    planned = plan(ImageSpec(python="3.12"), engine=engine)
    build(planned, engine=engine)
    labels = engine.images[planned.name]["Config"]["Labels"]
    assert set(labels) == set(LABELS)
    assert labels["cloudexec.python"] == "3.12"
    assert planned.tag.endswith(labels["cloudexec.content"])


async def push_twice(engine: PretendEngine, aws: Any) -> list[bool]:
    repository = EcrRepository(aws, URI)
    planned = plan(ImageSpec(), engine=engine)
    first = await push(planned, repository, engine=engine)
    aws.tags[planned.tag] = DIGEST
    second = await push(planned, repository, engine=engine)
    assert first.uri == second.uri == f"{URI}@{DIGEST}"
    return [first.was_pushed, second.was_pushed]


def test_same_content_is_pushed_once(engine: PretendEngine, aws: PretendAws) -> None:
    """The second push finds the image of the first in the repository."""
    assert asyncio.run(push_twice(engine, aws)) == [True, False]
    ((repository, _, credentials),) = engine.pushed
    assert repository == URI
    assert credentials == {"username": "AWS", "password": "secret"}


def test_what_the_repository_has_is_not_built_here(engine: PretendEngine, aws: Any) -> None:
    """On a fresh machine nothing is built that another one has pushed."""
    planned = plan(ImageSpec(), engine=engine)
    aws.tags[planned.tag] = DIGEST
    pushed = asyncio.run(push(planned, EcrRepository(aws, URI), engine=engine))
    assert not pushed.was_pushed
    assert not engine.built
    assert not engine.pushed


def test_digest_comes_from_the_registry_where_the_engine_says_none(aws: Any) -> None:
    """Some engines push without a word."""
    engine = PretendEngine(says_digest=False)
    aws.appears_after = 1
    planned = plan(ImageSpec(), engine=engine)
    pushed = asyncio.run(push(planned, EcrRepository(aws, URI), engine=engine))
    assert pushed.uri.endswith(f"@{DIGEST}")


def test_pushed_image_is_noted_in_the_profile(
    engine: PretendEngine, aws: Any, profile: Profile
) -> None:
    """Executors find it there, pinned by digest; those for other platforms stay."""
    profile = profile.with_image("3.11", "linux/arm64", "other")
    planned = plan(ImageSpec(python="3.11"), engine=engine)
    asyncio.run(push_to_profile(planned, profile, aws, engine=engine))
    saved = Profile.load("default")
    assert saved.image("3.11", "linux/amd64") == f"{URI}@{DIGEST}"
    assert saved.image("3.11", "linux/arm64") == "other"


def test_profile_without_a_repository_is_refused(
    engine: PretendEngine, aws: Any, profile: Profile
) -> None:
    """What would make one is named."""
    bare = Profile(name="bare", region="eu-central-1")
    planned = plan(ImageSpec(), engine=engine)
    with pytest.raises(ConfigError, match="cloudexec up"):
        asyncio.run(push_to_profile(planned, bare, aws, engine=engine))


def test_missing_repository_names_the_remedy(engine: PretendEngine, aws: Any) -> None:
    """It may have been removed since the profile was written."""
    aws.error = "RepositoryNotFoundException"
    planned = plan(ImageSpec(), engine=engine)
    with pytest.raises(ConfigError, match="cloudexec up"):
        asyncio.run(push(planned, EcrRepository(aws, URI), engine=engine))
    assert not engine.built


@pytest.mark.parametrize("uri", ["", "name", "docker.io/library/name", f"{HOST}/"])
def test_other_registries_are_refused(aws: Any, uri: str) -> None:
    """Only a repository of ECR has its region and account in its name."""
    with pytest.raises(ConfigError, match="Amazon ECR"):
        EcrRepository(aws, uri)


def test_the_profile_has_the_name_that_aws_has_for_an_image(
    engine: PretendEngine, aws: Any, profile: Profile
) -> None:
    """Also where a registry on this machine stands for Amazon ECR: jobs are told that name."""
    aws.endpoint = "http://127.0.0.1:5000"
    planned = plan(ImageSpec(base="base"), engine=engine)
    pushed = asyncio.run(push_to_profile(planned, profile, aws, engine=engine))
    assert engine.pushed[0][0] == "127.0.0.1:5000/cloudexec-default"
    assert pushed.uri == f"{URI}@{DIGEST}"
    assert list(Profile.load("default").images.values()) == [f"{URI}@{DIGEST}"]


@pytest.mark.parametrize(
    "host",
    [
        "123456789012.dkr.ecr-fips.us-gov-west-1.amazonaws.com",
        "123456789012.dkr-ecr.eu-central-1.on.aws",
        "123456789012.dkr-ecr-fips.us-east-1.on.aws",
        "123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn",
        "123456789012.dkr-ecr.cn-north-1.on.amazonwebservices.com.cn",
    ],
)
def test_registries_have_several_kinds_of_host_names(host: str) -> None:
    """Those of FIPS and of IPv6 are Amazon ECR's as well."""
    found = EcrImage.parse(f"{host}/team/worker:v1@{DIGEST}")
    assert found is not None
    assert f".{found.region}." in host
    assert found.region.count("-") >= 2
    assert (found.name, found.tag, found.digest) == (f"{host}/team/worker", "v1", DIGEST)
    assert found.account == "123456789012"


def test_images_elsewhere_are_not_taken_for_those_of_ecr() -> None:
    for name in ("python:3.11", "public.ecr.aws/docker/library/python:3.11", "localhost:5000/x"):
        assert EcrImage.parse(name) is None


@pytest.mark.parametrize("name", ["Upper", "a--b", "a-", "-a", "a", "a//b"])
def test_a_repository_that_ecr_refuses_is_refused_here(aws: Any, name: str) -> None:
    with pytest.raises(ConfigError, match="Amazon ECR has no repository"):
        EcrRepository(aws, f"{HOST}/{name}")

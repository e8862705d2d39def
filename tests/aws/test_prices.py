"""The price table, and how it is brought up to date from a Price List API that answers here."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cloudexec import ConfigError
from cloudexec._aws.clients import AwsClients
from cloudexec._aws.job_details import own_runs
from cloudexec._aws.prices import PriceTable, format_usd, refresh
from cloudexec._aws.profile import Profile
from cloudexec._launchers.batch.reading import run_of
from cloudexec._launchers.ledger import seconds_of

TABLE = PriceTable.built_in()


@pytest.fixture(autouse=True)
def configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of our own for profiles and prices."""
    monkeypatch.setenv("CLOUDEXEC_CONFIG_DIR", str(tmp_path))
    return tmp_path


class PriceList:
    """A Price List API with a few products, in pages of two."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.is_denied = False
        self.products: dict[str, list[dict[str, Any]]] = {
            "AmazonECS": [],
            "AmazonEC2": [],
            "AWSLambda": [],
        }
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status, answer = outer.answer(json.loads(body))
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/x-amz-json-1.1")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def add(self, service: str, price: str, **attributes: str) -> None:
        """Add a product with one on-demand price, and a free tier beside it."""
        dimension = {"unit": "hours", "pricePerUnit": {"USD": price}}
        free = {"unit": "hours", "pricePerUnit": {"USD": "0.0000000000"}}
        self.products[service].append(
            {
                "product": {"attributes": attributes},
                "terms": {
                    "OnDemand": {"A.B": {"priceDimensions": {"A.B.C": dimension, "F": free}}}
                },
            }
        )

    def answer(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Answer GetProducts."""
        self.requests.append(request)
        if self.is_denied:
            return 400, {"__type": "AccessDeniedException", "message": "not authorized"}
        wanted = {each["Field"]: each["Value"] for each in request["Filters"]}
        found = [
            each
            for each in self.products[request["ServiceCode"]]
            if wanted.items() <= each["product"]["attributes"].items()
        ]
        start = int(request.get("NextToken", 0))
        answer: dict[str, Any] = {
            "FormatVersion": "aws_v1",
            "PriceList": [json.dumps(each) for each in found[start : start + 2]],
        }
        if start + 2 < len(found):
            answer["NextToken"] = str(start + 2)
        return 200, answer


@pytest.fixture
def price_list(monkeypatch: pytest.MonkeyPatch) -> Iterator[PriceList]:
    """A Price List API that the SDK is led to."""
    found = PriceList()
    thread = threading.Thread(target=found.server.serve_forever)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{found.server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    yield found
    found.server.shutdown()
    thread.join()
    found.server.server_close()


def refreshed(region: str) -> PriceTable:
    async def run() -> PriceTable:
        async with AwsClients(region) as clients:
            return await refresh(clients)

    return asyncio.run(run())


def test_fargate_costs_what_its_vcpus_and_memory_cost() -> None:
    price = TABLE.worker(vcpus=2, memory_mib=4096)
    assert price.per_hour == pytest.approx(2 * 0.04048 + 4 * 0.004445)
    assert price.cost(3600) == pytest.approx(price.per_hour)
    assert not price.estimated
    assert not price.assumed


def test_arm_costs_less() -> None:
    price = TABLE.worker(vcpus=1, memory_mib=2048, arch="arm64")
    assert price.per_hour == pytest.approx(0.03238 + 2 * 0.00356)


def test_a_minute_is_paid_at_least_and_begun_seconds_count() -> None:
    price = TABLE.worker(vcpus=1, memory_mib=2048)
    assert price.cost(0.2) == price.cost(60) == pytest.approx(60 * price.per_second)
    assert price.cost(60.1) == pytest.approx(61 * price.per_second)


def test_what_never_ran_costs_nothing() -> None:
    assert TABLE.worker(vcpus=1, memory_mib=2048).cost(0) == 0


def test_a_run_that_begins_and_ends_within_a_millisecond_pays_its_minute() -> None:
    """AWS says of it that it began and ended at the same time."""
    price = TABLE.worker(vcpus=1, memory_mib=2048)
    attempt = {"startedAt": 1_795_913_721_919, "stoppedAt": 1_795_913_721_919}
    runs = own_runs({"status": "SUCCEEDED", "attempts": [attempt]}, now=0.0)
    assert price.cost_of(runs.seconds) == price.cost(60)
    assert price.cost(seconds_of(run_of(attempt))) == price.cost(60)
    assert seconds_of(run_of({"stoppedAt": 1_795_913_721_919})) == 0


def test_each_run_pays_its_own_minute() -> None:
    price = TABLE.worker(vcpus=1, memory_mib=2048)
    assert price.cost_of([1, 1, 120]) == pytest.approx(240 * price.per_second)


def test_spot_is_an_estimate_below_the_list_price() -> None:
    usual = TABLE.worker(vcpus=1, memory_mib=2048)
    spot = TABLE.worker(vcpus=1, memory_mib=2048, spot=True)
    assert spot.estimated
    assert spot.per_hour == pytest.approx(0.3 * usual.per_hour)


def test_storage_is_free_up_to_20_gb() -> None:
    usual = TABLE.worker(vcpus=1, memory_mib=2048)
    assert TABLE.worker(vcpus=1, memory_mib=2048, ephemeral_gib=20) == usual
    more = TABLE.worker(vcpus=1, memory_mib=2048, ephemeral_gib=120)
    assert more.per_hour - usual.per_hour == pytest.approx(100 * 0.000111)


def test_a_public_address_costs_also_where_spot_is_cheap() -> None:
    usual = TABLE.worker(vcpus=1, memory_mib=2048, spot=True)
    public = TABLE.worker(vcpus=1, memory_mib=2048, spot=True, public_ip=True)
    assert public.per_hour - usual.per_hour == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("vcpus", "memory_mib", "arch", "per_hour"),
    [
        (1, 2048, "x86_64", 0.085 / 2),  # half a c6i.large
        (1, 8192, "x86_64", 0.126 / 2),  # half an r6i.large
        (2, 4096, "arm64", 0.0725),  # a whole c7g.large
        (8, 16384, "x86_64", 0.085 * 4),
    ],
)
def test_a_job_on_ec2_is_priced_as_its_share_of_the_cheapest_instance(
    vcpus: float, memory_mib: int, arch: str, per_hour: float
) -> None:
    price = TABLE.worker(vcpus=vcpus, memory_mib=memory_mib, arch=arch, compute="ec2")
    assert price.per_hour == pytest.approx(per_hour)
    assert price.estimated


def test_another_regions_price_is_assumed() -> None:
    price = TABLE.worker(vcpus=1, memory_mib=2048, region="eu-central-1")
    assert price.assumed
    assert price.table == f"us-east-1 list price of {TABLE.dated}"
    assert not TABLE.worker(vcpus=1, memory_mib=2048, region="us-east-1").assumed


@pytest.mark.parametrize("wrong", [{"arch": "sparc"}, {"compute": "abacus"}])
def test_what_has_no_price_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong.values()))):
        TABLE.worker(vcpus=1, memory_mib=2048, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("usd", "text"),
    [
        (0, "$0.00"),
        (0.00001, "$0.00"),
        (0.01234, "$0.0123"),
        (0.5, "$0.5000"),
        (12.344, "$12.34"),
        (12345.678, "$12,345.68"),
    ],
)
def test_money_is_written_with_as_many_digits_as_it_takes(usd: float, text: str) -> None:
    assert format_usd(usd) == text


def fill(price_list: PriceList, region: str, prefix: str) -> None:
    """Add a region's products: ours, and those that must not be taken for them."""
    for usage, price in {
        "Fargate-vCPU-Hours:perCPU": "0.0500000000",
        "Fargate-GB-Hours": "0.0060000000",
        "Fargate-ARM-vCPU-Hours:perCPU": "0.0400000000",
        "Fargate-ARM-GB-Hours": "0.0040000000",
        "Fargate-EphemeralStorage-GB-Hours": "0.0002000000",
        "Fargate-Windows-vCPU-Hours:perCPU": "9.0000000000",
        "Fargate-Windows-GB-Hours": "9.0000000000",
        "ECS-Anywhere-Instance-hours": "9.0000000000",
    }.items():
        price_list.add("AmazonECS", price, regionCode=region, usagetype=f"{prefix}-{usage}")
    price_list.add(
        "AWSLambda", "0.00002", regionCode=region, usagetype=f"{prefix}-Lambda-GB-Second"
    )
    linux = {
        "operatingSystem": "Linux",
        "tenancy": "Shared",
        "preInstalledSw": "NA",
        "capacitystatus": "Used",
    }
    price_list.add("AmazonEC2", "0.1000", regionCode=region, instanceType="c6i.large", **linux)
    price_list.add(
        "AmazonEC2",
        "9.0000",
        regionCode=region,
        instanceType="c6i.large",
        **{**linux, "operatingSystem": "Windows"},
    )


def test_prices_of_a_region_are_learned_and_kept(price_list: PriceList) -> None:
    fill(price_list, "eu-central-1", "EUC1")
    table = refreshed("eu-central-1")
    assert (table.region, table.dated, table.note) == ("eu-central-1", date.today(), "")
    assert table.vcpu_hour == {"x86_64": 0.05, "arm64": 0.04}
    assert table.gb_hour == {"x86_64": 0.006, "arm64": 0.004}
    assert table.ephemeral_gb_hour == 0.0002
    assert table.instances["c6i.large"].per_hour == 0.1
    assert (table.functions.gb_second, table.functions.arm_gb_second) == (0.00002, 0.0000133334)
    assert not table.worker(vcpus=1, memory_mib=2048, region="eu-central-1").assumed
    # The region has no arm64 instances in the list: the table that we have stands in.
    assert table.worker(vcpus=1, memory_mib=2048, arch="arm64", compute="ec2").per_hour > 0
    assert PriceTable.load("eu-central-1") == table
    assert PriceTable.load("eu-west-1") == PriceTable.built_in()


def test_kept_prices_are_not_taken_for_a_profile(price_list: PriceList) -> None:
    fill(price_list, "eu-central-1", "EUC1")
    refreshed("eu-central-1")
    assert Profile.names() == []


def test_a_damaged_file_of_prices_is_as_good_as_none(configuration: Path) -> None:
    (configuration / "prices").mkdir()
    for text in ("", "[]", "{}", '{"dated": "yesterday"}'):
        (configuration / "prices" / "us-east-1.json").write_text(text)
        assert PriceTable.load("us-east-1") == PriceTable.built_in()


def test_the_known_prices_stand_where_new_ones_may_not_be_read(price_list: PriceList) -> None:
    price_list.is_denied = True
    table = refreshed("us-east-1")
    assert table.vcpu_hour == TABLE.vcpu_hour
    assert "not authorized" in table.note
    assert PriceTable.load("us-east-1").note == ""


def test_a_region_without_fargate_prices_keeps_the_known_ones(price_list: PriceList) -> None:
    table = refreshed("us-east-1")
    assert table.vcpu_hour == TABLE.vcpu_hour
    assert "no Fargate prices for us-east-1" in table.note

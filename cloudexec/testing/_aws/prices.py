"""Answers calls to the Pricing API about Fargate and Lambda, and to Service Quotas about vCPUs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cloudexec.testing._aws.faults import Faults
from cloudexec.testing._aws.limits import ClientError

__all__ = ["FARGATE_PRICES", "products", "quota_response"]

FARGATE_PRICES = {
    "Fargate-vCPU-Hours:perCPU": ("vCPU-Hours", 0.04048),
    "Fargate-GB-Hours": ("GB-Hours", 0.004445),
    "Fargate-ARM-vCPU-Hours:perCPU": ("vCPU-Hours", 0.03238),
    "Fargate-ARM-GB-Hours": ("GB-Hours", 0.00356),
    "Fargate-EphemeralStorage-GB-Hours": ("GB-Hours", 0.000111),
}
"""By usage type, without the region's prefix: the unit, and the price in USD in us-east-1."""

LAMBDA_PRICES = {
    "Lambda-GB-Second": ("Lambda-GB-Second", 0.0000166667),
    "Lambda-GB-Second-ARM": ("Lambda-GB-Second", 0.0000133334),
    "Request": ("Requests", 0.0000002),
    "Lambda-Storage-GB-Second": ("GB-Seconds", 0.0000000309),
}
_PRICES = {"AmazonECS": FARGATE_PRICES, "AWSLambda": LAMBDA_PRICES}
"""By service code. Of prices with tiers, the first one."""

_REGIONS = {"us-east-1": "USE1", "us-west-2": "USW2", "eu-west-1": "EU", "eu-central-1": "EUC1"}

_QUOTAS = {
    "fargate": {
        "L-3032A538": ("Fargate On-Demand vCPU resource count", "fargate"),
        "L-36FBB829": ("Fargate Spot vCPU resource count", "fargate_spot"),
    },
    "ec2": {
        "L-1216C47A": (
            "Running On-Demand Standard (A, C, D, H, I, M, R, T, Z) instances",
            "ec2",
        ),
        "L-34B43A08": (
            "All Standard (A, C, D, H, I, M, R, T, Z) Spot Instance Requests",
            "ec2_spot",
        ),
    },
}
"""By service and code: AWS's name of the quota, and the kind of capacity that it limits."""
_SERVICES = {"fargate": "AWS Fargate", "ec2": "Amazon Elastic Compute Cloud (Amazon EC2)"}
_DEFAULT_QUOTA = 4000.0


def products(operation: str, parameters: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Answer the Pricing API: GetProducts of Fargate and AWS Lambda."""
    if operation != "GetProducts":
        return None
    found = []
    service = parameters.get("ServiceCode")
    if service in _PRICES:
        for region, prefix in _REGIONS.items():
            for usage, (unit, price) in _PRICES[service].items():
                attributes = {
                    "servicecode": service,
                    "regionCode": region,
                    "usagetype": f"{prefix}-{usage}",
                    "locationType": "AWS Region",
                }
                if all(_fits(entry, attributes) for entry in parameters.get("Filters", [])):
                    found.append(_product(attributes, unit, price))
    size = min(parameters.get("MaxResults") or 100, 100)
    start = int(parameters.get("NextToken") or 0)
    page: dict[str, Any] = {"FormatVersion": "aws_v1", "PriceList": found[start : start + size]}
    if start + size < len(found):
        page["NextToken"] = str(start + size)
    return page


def _fits(entry: Mapping[str, str], attributes: Mapping[str, str]) -> bool:
    value, wanted = attributes.get(entry["Field"], ""), entry["Value"]
    kind = entry["Type"]
    if kind == "CONTAINS":
        return wanted in value
    if kind == "ANY_OF":
        return value in wanted.split(",")
    if kind == "NONE_OF":
        return value not in wanted.split(",")
    return value == wanted


def _product(attributes: Mapping[str, str], unit: str, price: float) -> str:
    sku = attributes["usagetype"].upper().replace("-", "").replace(":", "")[:16]
    return json.dumps(
        {
            "product": {"productFamily": "Compute", "attributes": attributes, "sku": sku},
            "serviceCode": "AmazonECS",
            "terms": {
                "OnDemand": {
                    f"{sku}.JRTCKXETXF": {
                        "priceDimensions": {
                            f"{sku}.JRTCKXETXF.6YS6EN2CT7": {
                                "unit": unit,
                                "beginRange": "0",
                                "endRange": "Inf",
                                "pricePerUnit": {"USD": f"{price:.10f}"},
                            }
                        },
                        "sku": sku,
                        "effectiveDate": "2026-01-01T00:00:00Z",
                        "offerTermCode": "JRTCKXETXF",
                    }
                }
            },
            "version": "20260101000000",
        }
    )


def quota_response(
    operation: str, parameters: Mapping[str, Any], faults: Faults
) -> Mapping[str, Any] | None:
    """Answer Service Quotas for vCPUs of Fargate and EC2."""
    service = parameters.get("ServiceCode", "")
    if service not in _QUOTAS:
        return None
    quotas = {code: _quota(service, code, faults) for code in _QUOTAS[service]}
    if operation in ("ListServiceQuotas", "ListAWSDefaultServiceQuotas"):
        return {"Quotas": list(quotas.values())}
    if operation in ("GetServiceQuota", "GetAWSDefaultServiceQuota"):
        if parameters["QuotaCode"] not in quotas:
            raise ClientError("The quota does not exist.", "NoSuchResourceException")
        return {"Quota": quotas[parameters["QuotaCode"]]}
    return None


def _quota(service: str, code: str, faults: Faults) -> dict[str, Any]:
    name, kind = _QUOTAS[service][code]
    limit = faults.quota(kind)
    return {
        "ServiceCode": service,
        "ServiceName": _SERVICES[service],
        "QuotaArn": f"arn:aws:servicequotas:us-east-1:123456789012:{service}/{code}",
        "QuotaCode": code,
        "QuotaName": name,
        "Value": _DEFAULT_QUOTA if limit is None else limit,
        "Unit": "None",
        "Adjustable": True,
        "GlobalQuota": False,
    }

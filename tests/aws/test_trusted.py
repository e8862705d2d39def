"""Which certificates clients of AWS trust."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

import pytest

from cloudexec import AwsError
from cloudexec._aws.clients import AwsClients
from cloudexec._server.certificate import make_certificate
from cloudexec.testing import FakeAWS


async def _ask() -> None:
    async with AwsClients("us-east-1") as clients:
        await clients.call("batch", "describe_job_queues")


def test_none_are_read_where_calls_go_without_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    """As to an emulated AWS: it would take each client longer than its first call."""
    read: list[Any] = []

    class Context(ssl.SSLContext):
        def load_verify_locations(self, *args: Any, **options: Any) -> None:
            read.append((args, options))
            super().load_verify_locations(*args, **options)

    with FakeAWS():
        import aiobotocore.httpsession

        monkeypatch.setattr(
            aiobotocore.httpsession,
            "create_urllib3_context",
            lambda *_, **__: Context(ssl.PROTOCOL_TLS_CLIENT),
        )
        asyncio.run(_ask())
        assert not read
        monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # which may want TLS itself
        asyncio.run(_ask())
        assert read


def test_a_server_that_nobody_trusts_is_not_talked_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    certificate = make_certificate()
    (tmp_path / "both.pem").write_bytes(certificate.key_pem + certificate.pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "both.pem")
    spoken: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        spoken.append(await reader.read(1))
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
        async with server:
            port = server.sockets[0].getsockname()[1]
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{port}")
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
            monkeypatch.setattr("cloudexec._aws.clients._ATTEMPTS", 1)
            with pytest.raises(AwsError, match="certificate verify failed"):
                await _ask()

    asyncio.run(run())
    assert not spoken

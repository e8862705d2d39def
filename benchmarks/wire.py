"""How fast are large payloads sent over the network (TLS), and do small ones wait behind them?

One worker on this machine connects as a worker on another machine does. It is compared with
ProcessPoolExecutor, and with a plain gRPC stream over TLS that sends chunks of the same size
between two processes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import threading
import time
from typing import Any

import _calls
import _fresh
import _peers
import _report
from _memory import MIB
from _peers import POOL, WIRE

_BARE = "bare gRPC stream"
_TRANSFERS = 3


def _bare_server(size: int, pipe: Any) -> None:
    """Serve two methods: one sends a stream of ``size`` bytes, and the other receives one."""
    import asyncio

    import grpc
    import grpc.aio

    from cloudexec._server.certificate import make_certificate
    from cloudexec._wire.channel import CHANNEL_OPTIONS, pack_chunk, unpack_chunk

    data = memoryview(b"x" * size)

    async def down(_: bytes, context: Any) -> Any:
        for at in range(0, size, MIB):
            yield data[at : at + MIB]

    async def up(chunks: Any, context: Any) -> bytes:
        got = 0
        async for chunk in chunks:
            got += len(chunk)
        return str(got).encode()

    async def serve() -> None:
        server = grpc.aio.server(options=CHANNEL_OPTIONS)
        handlers = {
            "Down": grpc.unary_stream_rpc_method_handler(down, response_serializer=pack_chunk),
            "Up": grpc.stream_unary_rpc_method_handler(up, request_deserializer=unpack_chunk),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Bare", handlers),))
        certificate = make_certificate()
        credentials = grpc.ssl_server_credentials([(certificate.key_pem, certificate.pem)])
        port = server.add_secure_port("127.0.0.1:0", credentials)
        await server.start()
        pipe.send((port, certificate.pem))
        await server.wait_for_termination()

    asyncio.run(serve())


def _measure_bare(direction: str, size: int) -> _fresh.Figures:
    import asyncio

    import grpc
    import grpc.aio

    from cloudexec._wire.channel import CHANNEL_OPTIONS, pack_chunk, unpack_chunk

    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_bare_server, args=(size, theirs), daemon=True)
    process.start()
    port, pem = ours.recv()

    async def run() -> list[float]:
        credentials = grpc.ssl_channel_credentials(root_certificates=pem)
        options = [*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", "cloudexec")]
        times = []
        target = f"127.0.0.1:{port}"
        async with grpc.aio.secure_channel(target, credentials, options=options) as channel:
            down = channel.unary_stream("/Bare/Down", response_deserializer=unpack_chunk)
            up = channel.stream_unary("/Bare/Up", request_serializer=pack_chunk)
            data = memoryview(b"x" * size)
            for _ in range(_TRANSFERS + 1):
                begin = time.perf_counter()
                if direction == "argument":
                    got = 0
                    async for chunk in down(b""):
                        got += len(chunk)
                else:
                    call = up()
                    for at in range(0, size, MIB):
                        await call.write(data[at : at + MIB])
                    await call.done_writing()
                    got = int(await call)
                assert got == size
                times.append(time.perf_counter() - begin)
        return times

    try:
        return {"seconds": min(asyncio.run(run())[1:])}
    finally:
        process.kill()
        process.join()


def measure(contender: str, what: str, mib: int) -> _fresh.Figures:
    size = mib * MIB
    if contender == _BARE:
        return _measure_bare(what, size)
    with _peers.opened(contender, 2 if what == "latency" else 1) as peer:
        if what == "latency":
            return _measure_latency(peer, size)
        peer.collect([peer.submit(_calls.blob, MIB), peer.submit(_calls.length, bytes(MIB))])
        times = []
        for turn in range(_TRANSFERS):
            call = (
                (_calls.length, bytes([turn + 1]) * size)  # other content each time
                if what == "argument"
                else (_calls.blob, size)
            )
            begin = time.perf_counter()
            peer.collect([peer.submit(*call)])
            times.append(time.perf_counter() - begin)
        return {"seconds": min(times)}


def _measure_latency(peer: Any, size: int) -> _fresh.Figures:
    def trips(enough: Any) -> list[float]:
        times = []
        while not enough(times):
            begin = time.perf_counter()
            peer.collect([peer.submit(_calls.noop)])
            times.append(time.perf_counter() - begin)
        return sorted(times)

    trips(lambda times: len(times) == 200)
    idle = trips(lambda times: len(times) == 500)
    done = threading.Event()

    def stream() -> None:
        peer.collect([peer.submit(_calls.length, bytes(size))])
        done.set()

    thread = threading.Thread(target=stream)
    thread.start()
    busy = trips(lambda times: done.is_set())
    thread.join()
    return {
        "idle p50": idle[len(idle) // 2] * 1e3,
        "idle p99": idle[len(idle) * 99 // 100] * 1e3,
        "busy p50": busy[len(busy) // 2] * 1e3,
        "busy p99": busy[len(busy) * 99 // 100] * 1e3,
        "trips": len(busy),
    }


def main(options: argparse.Namespace, report: _report.Report) -> None:
    mib = 64 if options.quick else 256
    for direction in ("argument", "result"):

        def arguments(name: str, direction: str = direction) -> dict[str, object]:
            return {"what": direction, "mib": mib}

        what = f"{direction} of {mib} MiB over TLS"
        figures = _peers.rounds([WIRE, POOL, _BARE], options.rounds, report, what, arguments)
        ours = _report.median(figures[WIRE], "seconds")
        for name, budget in ((POOL, 3.0), (_BARE, 0.6)):
            theirs = _report.median(figures[name], "seconds")
            report.compare(what, ours, name, theirs, "s", faster=True, at_least=budget)

    def sizes(name: str) -> dict[str, object]:
        return {"what": "latency", "mib": 256 if options.quick else 1024}

    found = _peers.rounds([WIRE], options.rounds, report, "round trips", sizes)[WIRE]
    for quantile in ("p50", "p99"):
        report.compare(
            f"no-op round trip while {sizes(WIRE)['mib']} MiB stream, {quantile}",
            _report.median(found, f"busy {quantile}"),
            "idle",
            _report.median(found, f"idle {quantile}"),
            "ms",
        )


if __name__ == "__main__":
    _report.run(__doc__, main, measure)

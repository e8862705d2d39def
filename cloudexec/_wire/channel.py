"""What both ends of the gRPC connection share: metadata keys, limits, options, chunk framing."""

from __future__ import annotations

from typing import Any

from cloudexec._proto.tasks_pb2 import Chunk

__all__ = [
    "BLOB_KEY",
    "CHANNEL_OPTIONS",
    "CHUNK_BYTES",
    "DELIVERY_TRIES",
    "GO_ON_KEY",
    "LEASE_KEY",
    "MAX_MESSAGE_BYTES",
    "PUSHED_BYTES",
    "SIZE_KEY",
    "TOKEN_KEY",
    "longest_pause",
    "pack_chunk",
    "unpack_chunk",
]

MAX_MESSAGE_BYTES = 8 * 1024 * 1024
"""Largest message either side accepts; batches stay far below it."""
CHUNK_BYTES = 1024 * 1024
"""Bytes per chunk of a blob on the wire: gRPC moves these 30 times faster than one of 256 MiB."""
PUSHED_BYTES = 256 * 1024
"""Bytes: smaller blobs are sent in the same message that refers to them."""
TOKEN_KEY = "cloudexec-token-bin"
BLOB_KEY = "cloudexec-blob"
SIZE_KEY = "cloudexec-size"
LEASE_KEY = "cloudexec-lease"
GO_ON_KEY = "cloudexec-go-on"
"""Key in the initial metadata of the answer to a Deliver call: the client has room for the result,
so the worker can go on."""
DELIVERY_TRIES = 3
"""Times that a part of a result is sent if it arrives damaged."""
_LONGEST_PAUSE = 4.0
_PART_OF_PATIENCE = 20
"""The longest pause between two tries is a worker's patience divided by this number. Ten thousand
workers that all dial every few seconds would keep a client that comes back too busy to accept
them."""
_MOST_PAUSE = 15.0

# Liveness is HTTP/2 pings: gRPC's own threads answer them, so that a client whose main thread
# holds the GIL for minutes is alive to its workers.
CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.lookahead_bytes", 4 * 1024 * 1024),
    ("grpc.http2.write_buffer_size", 1024 * 1024),
]


def longest_pause(patience: float) -> float:
    """Return the longest average pause, in seconds, between a worker's tries to reach its client.

    Args:
        patience: Seconds for which the worker tries.
    """
    return min(max(_LONGEST_PAUSE, patience / _PART_OF_PATIENCE), _MOST_PAUSE)


def pack_chunk(data: bytes | memoryview | Chunk) -> bytes:
    """Serialize a chunk. Plain data is copied once, where protobuf would copy it twice."""
    if type(data) is Chunk:
        return data.SerializeToString()
    size = len(data)
    header = bytearray(b"\x0a")  # field 1, length-delimited
    while size > 0x7F:
        header.append(size & 0x7F | 0x80)
        size >>= 7
    header.append(size)
    return b"".join((header, data))


def unpack_chunk(message: bytes) -> memoryview | Chunk:
    """Parse a chunk. Plain data is not copied; other chunks are parsed by protobuf."""
    if message[:1] == b"\x0a":
        size = shift = 0
        for at in range(1, min(len(message), 6)):
            byte = message[at]
            size |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                if at + 1 + size == len(message):
                    return memoryview(message)[at + 1 :]
                break
    return Chunk.FromString(message)

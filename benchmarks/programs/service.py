"""A service that hashes passwords of concurrent requests (asyncio, run_in_executor)."""

import asyncio
import hashlib

from _pool import executor


def derive(number):
    return hashlib.pbkdf2_hmac("sha256", b"%d" % number, b"salt", 60_000).hex()


async def request(loop, pool, gate, number):
    async with gate:
        return await loop.run_in_executor(pool, derive, number)


async def serve(pool):
    loop, gate = asyncio.get_running_loop(), asyncio.Semaphore(8)
    return await asyncio.gather(*(request(loop, pool, gate, number) for number in range(120)))


if __name__ == "__main__":
    with executor() as pool:
        print(len(set(asyncio.run(serve(pool)))))

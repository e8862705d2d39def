"""Aggregate with a library whose own threads do not survive a fork (polars)."""

import polars as pl
from _pool import executor


def aggregate(seed):
    frame = pl.DataFrame({"key": [i * seed % 97 for i in range(50_000)], "value": range(50_000)})
    return frame.group_by("key").agg(pl.col("value").mean()).sort("key")["value"].sum()


if __name__ == "__main__":
    with executor() as pool:
        print(round(sum(pool.map(aggregate, range(1, 25)))))

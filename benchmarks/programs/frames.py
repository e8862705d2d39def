"""Group and join parts of a table (pandas)."""

import numpy as np
import pandas as pd
from _pool import executor


def summarise(part):
    part = part.assign(bucket=pd.cut(part["value"], 40, labels=False))
    grouped = part.groupby(["key", "bucket"])["value"].agg(["count", "mean", "std", "median"])
    return grouped.reset_index()


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"key": rng.integers(0, 500, 2_000_000), "value": rng.normal(size=2_000_000)}
    )
    parts = [frame.iloc[start : start + 100_000] for start in range(0, len(frame), 100_000)]
    with executor() as pool:
        print(pd.concat(pool.map(summarise, parts))["count"].sum())

"""Count the words of many files (no library)."""

import collections
import pathlib
import re
import tempfile

from _pool import executor


def count(path):
    return collections.Counter(re.findall(r"[a-z]+", pathlib.Path(path).read_text().lower()))


if __name__ == "__main__":
    text = (collections.__doc__ or "") + (re.__doc__ or "") + (pathlib.__doc__ or "")
    with tempfile.TemporaryDirectory() as directory:
        paths = [f"{directory}/{number}.txt" for number in range(200)]
        for number, path in enumerate(paths):
            pathlib.Path(path).write_text(text * (20 + number % 30))
        with executor() as pool:
            total = sum(pool.map(count, paths, chunksize=5), collections.Counter())
    print(total.most_common(1)[0][1])

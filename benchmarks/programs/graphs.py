"""Shortest paths from a few nodes at a time: many short maps (networkx)."""

import networkx as nx
from _pool import executor

GRAPH = nx.barabasi_albert_graph(300, 3, seed=1)


def reach(node):
    return sum(nx.single_source_shortest_path_length(GRAPH, node).values())


if __name__ == "__main__":
    total = 0
    with executor() as pool:
        for start in range(0, 300, 10):
            total += sum(pool.map(reach, range(start, start + 10)))
    print(total)

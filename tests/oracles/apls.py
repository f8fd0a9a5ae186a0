"""APLS by both definitions, as plainly as they can be written: networkx, one node, one route at a time."""
import math

import networkx as nx
import numpy as np
from shapely import LineString, Point


def metric_graph(nodes, edges) -> nx.Graph:
    graph = nx.Graph()
    for u, v in edges: graph.add_edge(int(u), int(v), length=math.dist(nodes[u], nodes[v]))
    for u in graph: graph.nodes[u]["at"] = tuple(map(float, nodes[u]))
    return graph


def put_on(graph: nx.Graph, point, limit: float, name):
    "Split the nearest edge at the foot of a point and call the new node `name`; None where nothing is near enough."
    best = None
    for u, v in graph.edges:
        line = LineString([graph.nodes[u]["at"], graph.nodes[v]["at"]])
        far = line.distance(Point(point))
        if far <= limit and (best is None or far < best[0]): best = far, u, v, line
    if best is None: return None
    _, u, v, line = best
    along = line.project(Point(point))
    for end, at in ((u, 0.), (v, line.length)):
        if abs(along - at) < 1e-9: return end
    graph.add_node(name, at=tuple(line.interpolate(along).coords[0]))
    graph.remove_edge(u, v)
    graph.add_edge(u, name, length=along); graph.add_edge(name, v, length=line.length - along)
    return name


def mean_penalty(true: nx.Graph, other: nx.Graph, pairs_of: dict, shortest: float, always_lost: bool) -> float:
    "1 - mean over ordered pairs of control points; `pairs_of` maps each to its node on the other graph, or None."
    total = count = 0
    lengths = {u: nx.single_source_dijkstra_path_length(true, u, weight="length") for u in pairs_of}
    others = {w: nx.single_source_dijkstra_path_length(other, w, weight="length") for w in set(pairs_of.values()) - {None}}
    for u, w in pairs_of.items():
        for v, x in pairs_of.items():
            if u == v: continue
            way, lost = lengths[u].get(v), w is None or x is None
            if not (lost and always_lost) and (way is None or (way <= shortest and shortest > 0)): continue
            count += 1
            if lost or x not in others[w]: total += 1
            elif way: total += min(1, abs(others[w][x] - way) / way)
    return 1 - total / count if count else math.nan


def spacenet_one_way(truth, proposal, snap_m: float) -> float:
    "Corrected rules, without points between junctions and ends."
    a, b = metric_graph(*truth), metric_graph(*proposal)
    controls = [u for u in a if a.degree(u) != 2]
    carried = {u: put_on(b, a.nodes[u]["at"], snap_m, ("on", u)) for u in controls}
    return mean_penalty(a, b, carried, 0, False)


def cut(nodes, edges, hop: float) -> nx.Graph:
    "Numbers as the fast code gives them: old nodes first, then new ones edge by edge."
    graph, n = nx.Graph(), len(nodes)
    for u, at in enumerate(nodes): graph.add_node(u, at=np.asarray(at, float))
    for u, v in edges:
        a, b = (graph.nodes[int(w)]["at"] for w in (u, v))
        size = math.dist(a, b)
        parts = int(size / hop) + 1 if size > 1.5 * hop else 1
        last = int(u)
        for i in range(1, parts):
            t = i / parts
            graph.add_node(n, at=a * (1 - t) + b * t)
            graph.add_edge(last, n, length=math.dist(graph.nodes[last]["at"], graph.nodes[n]["at"])); last, n = n, n + 1
        graph.add_edge(last, int(v), length=math.dist(graph.nodes[last]["at"], b))
    return graph


def within_hops(graph: nx.Graph, u, hops: int) -> set:
    return set(nx.single_source_shortest_path_length(graph, u, cutoff=hops))


def sat2graph_one_way(truth, proposal, hop=2., cover_hops=4, snap_m=10., shortest=100., always_lost=False) -> float:
    "Corrected rules, junctions and ends only (no chain is long enough for more)."
    a, b = cut(*truth, hop), cut(*proposal, hop)
    covered, controls = set(), []
    for u in sorted(a):
        if a.degree(u) == 2 or (u in covered and a.degree(u) != 1): continue
        controls.append(u); covered |= within_hops(a, u, cover_hops)
    taken, carried = set(), {}
    for u in controls:
        at = a.nodes[u]["at"]
        near = sorted(b, key=lambda w: math.dist(b.nodes[w]["at"], at))[:10]
        free = [w for w in near if math.dist(b.nodes[w]["at"], at) < snap_m
                and (w not in taken or math.dist(b.nodes[w]["at"], at) < 1e-6)]
        carried[u] = free[0] if free else None
        if free: taken |= within_hops(b, free[0], cover_hops)
    return mean_penalty(a, b, carried, shortest, always_lost)

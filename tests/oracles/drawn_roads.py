"Random road networks, drawn as masks, and plain ways to compare what comes back with what was drawn."
import numpy as np
import rasterio.features
import shapely

import aerial_nb.roads.clean  # noqa: F401  gives graphs densify and chains
from aerial_nb.roads.graph import RoadGraph


def network(seed: int, size: int = 600) -> RoadGraph:
    "A bent, jittered, turned grid with missing streets and cul-de-sacs; no bridges, no two roads nearly one."
    dice = np.random.default_rng(seed)
    step = dice.uniform(70, 110)
    k, turn = int(size // step), dice.uniform(-.3, .3)
    at = np.stack(np.meshgrid(np.arange(k), np.arange(k)), -1).reshape(-1, 2) * step
    at = at - at.mean(0) + dice.normal(0, step * .12, (k * k, 2))
    at = at @ np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) * .85 + size / 2
    lines = []
    for i in range(k * k):
        for j in ([i + 1] if (i + 1) % k else []) + ([i + k] if i + k < k * k else []):
            if dice.random() < .22: continue
            bend, along = dice.normal(0, step * .08) * (dice.random() < .4), at[j] - at[i]
            t = np.linspace(0, 1, 7)[:, None] if bend else np.array([[0.], [1.]])
            side = np.array([-along[1], along[0]]) / np.hypot(*along)
            lines.append(shapely.LineString(at[i] + along * t + side * bend * np.sin(np.pi * t)))
    for i in np.flatnonzero(dice.random(k * k) < .2):
        way = dice.uniform(0, 2 * np.pi)
        end = at[i] + step * .45 * np.array([np.cos(way), np.sin(way)])
        outer = shapely.LineString([at[i] + .3 * (end - at[i]), end])
        if min(outer.distance(line) for line in lines) > step * .1: lines.append(shapely.LineString([at[i], end]))
    kept = []
    for line in lines:
        if not any(line.crosses(other) for other in kept): kept.append(line)
    return RoadGraph.from_lines(kept)


def drawn(graph: RoadGraph, width: float, shape, cap: str = "round") -> np.ndarray:
    "A mask of the roads, all of one width in pixels."
    lines = shapely.line_merge(shapely.multilinestrings(list(graph.to_geodataframe().geometry)))
    joints = shapely.multipoints(graph.nodes[graph.degrees > 1])
    area = [lines.buffer(width / 2, cap_style=cap), joints.buffer(width / 2)]
    return rasterio.features.rasterize([a for a in area if not a.is_empty], shape).astype(bool)


def loops(graph: RoadGraph) -> int:
    "Independent cycles."
    return len(graph) - len(graph.nodes) + graph.n_parts


def apart(a: RoadGraph, b: RoadGraph) -> np.ndarray:
    "Distance from every pixel of road of each graph to the other graph, in pixels."
    def away(graph, other):
        at, lines = shapely.points(RoadGraph(graph.nodes, graph.edges).densify(1., gsd_m=1.).nodes), shapely.linestrings(other.nodes[other.edges])
        return shapely.distance(at, lines[shapely.STRtree(lines).nearest(at)])
    return np.concatenate([away(a, b), away(b, a)])

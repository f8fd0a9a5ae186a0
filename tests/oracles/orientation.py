"""Road directions as published with SPIN RoadMapper, written to be read: one step a function, plain loops, no speed.

The fast code of `aerial_nb.roads` is checked against this, class for class. Written from a description of the
published behaviour, its defects included."""
from math import atan2, degrees, sqrt

import numpy as np
from skimage.morphology import skeletonize

AROUND = [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1) if (r, c) != (0, 0)]


def pixel_graph(skeleton):
    "Nodes as lists of (row, col), edges as (node, node, list of (row, col)) in the order in which they are traced."
    on = {(int(r), int(c)) for r, c in zip(*np.nonzero(skeleton))}
    near = {p: [(p[0] + r, p[1] + c) for r, c in AROUND if (p[0] + r, p[1] + c) in on] for p in on}
    thread = {p for p in on if len(near[p]) == 2}
    node_of, nodes = {}, []
    for p in sorted(on - thread):
        if p in node_of: continue
        group, node_of[p] = [p], len(nodes)
        for q in group:
            for n in near[q]:
                if n not in thread and n not in node_of: node_of[n] = len(nodes); group.append(n)
        nodes.append(group)
    edges, free = [], set(thread)
    for p in sorted(node_of):
        for q in near[p]:
            if q in free: edges.append(_trace(q, near, node_of, free))
    return nodes, edges


def _trace(p, near, node_of, free):
    "Follow the thread from pixel p until it touches node pixels twice."
    touched, path = [], []
    while len(touched) < 2:
        path.append(p)
        free.discard(p)
        onward = None
        for n in near[p]:
            if n in node_of: touched.append(n)
            elif n in free: onward = n
        p = onward
    first, last = touched[0], touched[-1]
    return node_of[first], node_of[last], [first, *path, last]


def edges_as_listed(nodes, edges):
    "The order of networkx: by lower node, then by when the other node became its neighbour, then as traced."
    neighbours = {n: [] for n in range(len(nodes))}
    for a, b, _ in edges:
        if b not in neighbours[a]: neighbours[a].append(b)
        if a not in neighbours[b]: neighbours[b].append(a)
    for n, others in neighbours.items():
        for m in others:
            if m >= n: yield from ((n, m, path) for a, b, path in edges if {a, b} == {n, m})


def far_from_line(p, a, b):
    "Distance of a point to the endless line through a and b."
    if a == b: return sqrt((p[0] - a[0]) ** 2 + (p[1] - a[1]) ** 2)
    cross = abs((b[0] - a[0]) * (a[1] - p[1]) - (a[0] - p[0]) * (b[1] - a[1]))
    return cross / sqrt((b[0] - a[0]) ** 2 + (b[1] - a[1]) ** 2)


def rdp(points, eps):
    "Ramer, Douglas and Peucker; splits at the first of the farthest points when it is eps or more away."
    best, at = 0.0, 0
    for i in range(1, len(points) - 1):
        d = far_from_line(points[i], points[0], points[-1])
        if d > best: best, at = d, i
    if best < eps or not at: return [points[0], points[-1]]
    return rdp(points[:at + 1], eps)[:-1] + rdp(points[at:], eps)


def polylines(skeleton, eps):
    "Simplified lines as lists of (x, y) with one decimal, far end first, in painting order."
    nodes, edges = pixel_graph(skeleton)
    mean = lambda group: tuple(sum(p[k] for p in group) / len(group) for k in (0, 1))
    texts = {}
    for a, b, path in edges_as_listed(nodes, edges):
        points = rdp([mean(nodes[a]), *((float(r), float(c)) for r, c in path), mean(nodes[b])], eps)
        kept = [p for i, p in enumerate(points)
                if not (i > 0 and p == points[i - 1]) and not (i > 1 and p == points[i - 2])]
        if len(kept) > 1: texts[", ".join(f"{c:.1f} {r:.1f}" for r, c in kept)] = None
    lines = [[tuple(map(float, point.split())) for point in text.split(", ")] for text in texts]
    length = lambda p: sqrt(p[0] * p[0] + p[1] * p[1])
    return [line[::-1] if length(line[-1]) > length(line[0]) else line for line in lines]


def paint(lines, shape, theta, prefixes=False):
    "Float32 angles in degrees, 360 where nothing is painted, and unit vectors (rows, cols, 2)."
    rows, cols = shape
    angle, vector = np.full(shape, 360, np.float32), np.zeros((*shape, 2), np.float32)
    if prefixes: lines = [line[:k] for line in lines for k in range(2, len(line) + 1)]
    for line in lines:
        for (ax, ay), (bx, by) in zip(line, line[1:]):
            length = sqrt((bx - ax) ** 2 + (by - ay) ** 2) + 1e-9
            ux, uy = (bx - ax) / length, (by - ay) / length
            turn = (degrees(atan2(uy, ux)) + 360) % 360
            for y in range(max(0, round(min(ay, by) - theta)), min(rows, round(max(ay, by) + theta))):
                for x in range(max(0, round(min(ax, bx) - theta)), min(cols, round(max(ax, bx) + theta))):
                    if abs(ux * (y - ay) - uy * (x - ax)) <= theta:
                        vector[y, x], angle[y, x] = (ux, uy), turn
    return angle, vector


def published_classes(mask, eps=4, theta=10, bins=36, prefixes=False):
    """Classes uint8 (rows, cols), `bins` is none. `prefixes=True` also spends the published effort: every line is
    painted once for each of its beginnings, which changes nothing in the result but the time it takes. (The
    published program turns each beginning by its own ends; the last painting is the same.)"""
    angle, _ = paint(polylines(skeletonize(np.asarray(mask) != 0), eps), mask.shape, theta, prefixes)
    return np.floor(angle / np.float32(360 / bins)).astype(np.uint8)

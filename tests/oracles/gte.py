"""The graph-tensor encoding and decoding of Sat2Graph by their definitions, with dicts and loops.

A network is {(row, col): [(row, col), ...]}, every edge at both ends; tensors are (channels, rows, cols).
"""
import math

import numpy as np
from scipy.ndimage import binary_erosion, gaussian_filter, minimum_filter

FULL = np.ones((3, 3), bool)


def as_dict(graph):
    "{(row, col): neighbours} of a RoadGraph, in the order of its nodes and edges."
    at = [(y, x) for x, y in graph.nodes.tolist()]
    near = {p: [] for p in at}
    for u, v in graph.edges.tolist():
        near[at[u]].append(at[v])
        near[at[v]].append(at[u])
    return near


def to_integer(near):
    "Coordinates cut to whole pixels; vertices that meet become one."
    out = {}
    for p, others in near.items():
        row = out.setdefault((int(p[0]), int(p[1])), [])
        for q in others:
            q = int(q[0]), int(q[1])
            if q not in row: row.append(q)
    return out


def sector_of(p, q):
    return int((math.atan2(q[1] - p[1], q[0] - p[0]) + math.pi) / (math.pi / 3)) % 6


def encode_plain(near, shape, margin=16, dtype=np.float64):
    "The published drawing: 3 x 3 blocks, later ones over earlier ones."
    rows, cols = shape
    out = np.zeros((26, rows, cols), dtype)
    out[1] = 1
    for k in range(6): out[3 + 4 * k] = 1
    near = to_integer(near)

    def outside(p): return p[0] < margin or p[1] < margin or p[0] > rows - margin or p[1] > cols - margin

    collisions = 0
    for p, others in near.items():
        if outside(p): continue
        block = [(r, c) for r in range(p[0] - 1, p[0] + 2) for c in range(p[1] - 1, p[1] + 2)
                 if 0 <= r < rows and 0 <= c < cols]
        for r, c in block: out[0:2, r, c] = 1, 0
        taken = set()
        for q in others:
            if outside(q): continue
            k = sector_of(p, q)
            collisions += k in taken
            taken.add(k)
            for r, c in block:
                out[2 + 4 * k:6 + 4 * k, r, c] = 1, 0, (q[0] - p[0]) / 25, (q[1] - p[1]) / 25
    return out, collisions


def peaks_plain(picture, level):
    "Local maxima above a level; plateaus give several."
    arr = -picture
    low = minimum_filter(arr, footprint=FULL) == arr
    low ^= binary_erosion(arr == 0, structure=FULL, border_value=1)
    return [(int(r), int(c)) for r, c in zip(*np.where(low & (picture > level)))]


def cosine(a, b):
    la, lb = math.hypot(*a) + 1e-7, math.hypot(*b) + 1e-7
    return a[0] / la * (b[0] / lb) + a[1] / la * (b[1] / lb)


class Points:
    "Points in buckets, to ask for those whose box of one pixel around meets a square."
    def __init__(self): self.bins = {}

    def add(self, p): self.bins.setdefault((p[0] // 32, p[1] // 32), []).append(p)

    def near(self, t, reach):
        found, reach = [], reach + 1
        for i in range((t[0] - reach) // 32, (t[0] + reach) // 32 + 1):
            for j in range((t[1] - reach) // 32, (t[1] + reach) // 32 + 1):
                found += [p for p in self.bins.get((i, j), ()) if abs(p[0] - t[0]) <= reach and abs(p[1] - t[1]) <= reach]
        return sorted(found)


def vertices_plain(tensor, thr):
    smooth = gaussian_filter(tensor[0].astype(np.float64), 1)
    return peaks_plain(smooth / max(smooth.max(), .001), thr)


def ends_plain(tensor, points, thr):
    "Where the edges of the vertices end, as peaks of a blurred map; those near something known are left out."
    rows, cols = tensor.shape[1:]
    marks = np.zeros((rows, cols))
    for r, c in points:
        for k in range(6):
            e, dr, dc = (float(tensor[2 + 4 * k + i, r, c]) for i in (0, 2, 3))
            if e * float(tensor[0, r, c]) > thr * thr:
                r1, c1 = int(r + 25 * dr), int(c + 25 * dc)
                if 0 <= r1 < rows and 0 <= c1 < cols: marks[r1, c1] = e * float(tensor[0, r, c])
    return peaks_plain(gaussian_filter(marks, 3), thr ** 3)


def best_target(tensor, p, k, known, ends, thr, edge_thr, weight, snap):
    "The point that an edge of a vertex leads to, by the three passes, or None."
    e, dr, dc = (float(tensor[2 + 4 * k + i, p[0], p[1]]) for i in (0, 2, 3))
    t, reach = (int(p[0] + 25 * dr), int(p[1] + 25 * dc)), 25 * math.sqrt(dr * dr + dc * dc)
    aim = t[0] - p[0], t[1] - p[1]

    def away(c): return math.sqrt((c[0] - t[0]) ** 2 + (c[1] - t[1]) ** 2)
    def bend(c): return 1 - cosine((c[0] - p[0], c[1] - p[1]), aim)

    def back(c):
        best = weight
        for j in range(6):
            ec, dr, dc = (float(tensor[2 + 4 * j + i, c[0], c[1]]) for i in (0, 2, 3))
            at_p = float(tensor[2 + 4 * j, p[0], p[1]])       # as published: read at p, not at c
            if ec * float(tensor[0, c[0], c[1]]) > thr * edge_thr and at_p > edge_thr:
                best = min(best, weight * (1 - cosine((p[0] - c[0], p[1] - c[1]), (25 * dr, 25 * dc))))
        return best

    for points, limit, cost in ((known, reach, lambda c: away(c) + back(c) + weight * bend(c)),
                                (known, reach / 2, lambda c: away(c) + 2 * weight * bend(c)),
                                (ends, reach, lambda c: away(c) + weight * bend(c))):
        best, found = snap, None
        for c in points.near(t, 20):
            if away(c) <= limit and (value := cost(c)) < best: best, found = value, c
        if found: return found
    return None


def connect_plain(tensor, thr=.05, edge_thr=.05, weight=100., snap=15.):
    "{point: neighbours} before refinement, in the order in which points were reached."
    points = vertices_plain(tensor, thr)
    known, ends, both, near = Points(), Points(), Points(), {}
    for p in points: known.add(p); both.add(p)
    for p in ends_plain(tensor, points, thr):
        if not both.near(p, 5): ends.add(p); both.add(p)
    for p in points:
        for k in range(6):
            e, v = float(tensor[2 + 4 * k, p[0], p[1]]), float(tensor[0, p[0], p[1]])
            if not (e * v > thr * edge_thr and e > edge_thr): continue
            q = best_target(tensor, p, k, known, ends, thr, edge_thr, weight, snap)
            if q is None or q == p: continue
            if p not in near.setdefault(q, []): near[q].append(p)
            if q not in near.setdefault(p, []): near[p].append(q)
    return near


def refine_plain(near, part, spur):
    "Without components up to `part` long, and without dead ends whose edge at a junction is shorter than `spur`."
    group, length = {}, {}
    for first in near:
        if first in group: continue
        stack, group[first], length[first] = [first], first, 0.
        while stack:
            p = stack.pop()
            for q in near[p]:
                length[first] += math.dist(p, q) / 2
                if q not in group: group[q] = first; stack.append(q)
    size = {}
    for g in group.values(): size[g] = size.get(g, 0) + 1
    gone = {p for p in near if size[group[p]] == 1 or length[group[p]] <= part
            or (len(near[p]) == 1 and len(near[near[p][0]]) >= 3 and math.dist(p, near[p][0]) < spur)}
    return {p: [q for q in others if q not in gone] for p, others in near.items() if p not in gone}


def deloop_plain(near):
    "Where two edges leave a vertex side by side, the longer is led over the end of the shorter."
    busy, cut, new = set(), set(), []
    for p, others in near.items():
        for q in others:
            for r in others:
                if q == r or busy & {p, q, r}: continue
                a, b = (((s[0] - p[0]) / math.dist(s, p), (s[1] - p[1]) / math.dist(s, p)) for s in (q, r))
                if a[0] * b[0] + a[1] * b[1] > .984:
                    far, close = (q, r) if math.dist(p, r) < math.dist(p, q) else (r, q)
                    cut |= {(p, far), (far, p)}
                    new.append((close, far))
                    busy |= {p, q, r}
    near = {p: [q for q in others if (p, q) not in cut] for p, others in near.items()}
    for p, q in new:
        if q not in near[p]: near[p].append(q)
        if p not in near[q]: near[q].append(p)
    return near, len(cut)


def shave_plain(near, spur):
    "Without dangling chains shorter than `spur`, once."
    gone = set()
    for p, others in near.items():
        if len(others) != 1: continue
        chain, here = [p], others[0]
        length = math.dist(p, here)
        while len(near[here]) == 2:
            step = near[here][1] if near[here][0] == chain[-1] else near[here][0]
            length += math.dist(here, step)
            chain.append(here)
            here = step
        if len(near[here]) == 1: chain.append(here)
        if length < spur: gone |= set(chain)
    return {p: [q for q in others if q not in gone] for p, others in near.items() if p not in gone}


def decode_plain(tensor, thr=.05, edge_thr=.05, weight=100., snap=15., refine=True, part=200., spur=50.):
    "{(row, col): neighbours} from a tensor, as published."
    near = connect_plain(tensor, thr, edge_thr, weight, snap)
    if not refine: return near
    near, cut = refine_plain(near, part, spur), 1
    while cut: near, cut = deloop_plain(refine_plain(near, part, spur))
    return shave_plain(near, spur)


def apart(p, q): return float(np.hypot(p[0] - q[0], p[1] - q[1]))   # rounds as numpy does: equal samples tie alike


def crossings_plain(near):
    "Pairs of edges that cross and share no vertex, from either side, with the sample of the first nearest to the crossing."
    edges, known = [], set()
    for p, others in near.items():
        for q in others:
            if (q, p) not in known and (p, q) not in known: edges.append((p, q)); known.add((p, q))

    def left(a, b, c): return (c[1] - a[1]) * (b[0] - a[0]) > (b[1] - a[1]) * (c[0] - a[0])

    found = []
    for a, b in edges:
        for c, d in edges:
            if {a, b} & {c, d} or any(max(a[i], b[i]) < min(c[i], d[i]) or max(c[i], d[i]) < min(a[i], b[i])
                                      for i in (0, 1)): continue
            if left(a, c, d) == left(b, c, d) or left(a, b, c) == left(a, b, d): continue
            size, best, at = apart(a, b), math.inf, a
            for i in range(int(size)):
                t = i / size
                x = a[0] * (1 - t) + b[0] * t, a[1] * (1 - t) + b[1] * t
                far = apart(x, c) + apart(x, d)
                if far < best: best, at = far, x
            found.append(((a, b), (c, d), at))
    return found


def pushes_plain(found, clear=9.5):
    push = {}
    for (a, b), (c, d), at in found:
        for p, q in ((a, b), (b, a), (c, d), (d, c)):
            far, size = apart(at, p), apart(p, q)
            if far < clear:
                weight = (clear - far) / clear
                push.setdefault(p, []).append(((p[0] - q[0]) / size * weight, (p[1] - q[1]) / size * weight))
    return push


def rename(near, old, new):
    near[new] = near.pop(old)
    for p in near[new]: near[p] = [new if q == old else q for q in near[p]]


def separate_plain(near, rounds=40, clear=9.5):
    "Stacked roads moved apart, vertex by vertex."
    near = {p: list(others) for p, others in near.items()}
    for turn in range(rounds):
        push, moved = pushes_plain(crossings_plain(near), clear), 0
        if turn % 5 == 0 and turn:
            for p, vectors in push.items():
                gap = sum((1 - apart(v, (0, 0))) * clear for v in vectors[:4]) / 2
                if len(vectors) < 4 or gap >= 12 or len(near[p]) != 2: continue
                q, r = near.pop(p)
                near[q] = [r if s == p else s for s in near[q]]
                near[r] = [q if s == p else s for s in near[r]]
                for s in (q, r):
                    if s in push: continue
                    size = apart(p, s)
                    rename(near, s, (s[0] + (p[0] - s[0]) / size * 5, s[1] + (p[1] - s[1]) / size * 5))
            continue
        for p, vectors in push.items():
            x, y = sum(v[0] for v in vectors), sum(v[1] for v in vectors)
            size = apart((x, y), (0, 0))
            if size == 0: continue
            if size > 1: x, y = x / size, y / size
            for step in (1.5, 1.):
                new = p[0] + x * step, p[1] + y * step
                if new != p and new not in near:
                    rename(near, p, new)
                    moved += 1
                    break
        if not moved: break
    return near

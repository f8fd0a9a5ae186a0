"""TOPO by its definitions, with dictionaries and lists, to check the fast one against.

A network is (at, near): positions (north, east) of the nodes, and for each node its neighbours in order.
`published` is the walk of the field's tables with everything it does; `corrected` is what it means to do.
A frame says how positions become lengths: `stretch(north)` scales the east, `aim` the east of a direction.
"""
import heapq
import math
from collections import deque

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching


class Frame:
    def __init__(self, degrees=False):
        self.degrees, self.aim = degrees, math.cos(math.radians(40)) if degrees else 1.
        self.shift = (1e-5, 1e-5) if degrees else (1.11111, 1.11111 * math.cos(math.radians(41)))

    def distance(self, p, q):
        stretch = math.cos(math.radians(p[0])) if self.degrees else 1.
        return math.sqrt((p[0] - q[0])**2 + ((p[1] - q[1]) * stretch)**2)

    def direction(self, p, q):
        north, east = q[0] - p[0], (q[1] - p[1]) * self.aim
        return north / math.hypot(north, east), east / math.hypot(north, east)

    def to_segment(self, p, q, point):
        "Distance from a point to the segment p-q, in the plane tangent at p."
        stretch = math.cos(math.radians(p[0])) if self.degrees else 1.
        q, point = ((q[0] - p[0], (q[1] - p[1]) * stretch), (point[0] - p[0], (point[1] - p[1]) * stretch))
        size = math.hypot(*q)
        along = min(max((q[0] * point[0] + q[1] * point[1]) / size, 0), size)
        return math.hypot(point[0] - q[0] * along / size, point[1] - q[1] * along / size), along


def chains(near, twice, rings):
    "Node sequences from junction or end to junction or end."
    found, inside = [], set()
    for first in near:
        if first in inside or len(near[first]) == 2: continue
        for step in near[first]:
            if step in inside: continue
            path = [first, step]
            while len(near[path[-1]]) == 2:
                a, b = near[path[-1]]
                path.append(b if a == path[-2] else a)
            inside.update(path[1:-1])
            if twice or len(path) > 2 or first < step: found.append(path)
    if not rings: return found
    for first in near:
        if first in inside or len(near[first]) != 2: continue
        path = [first, near[first][0]]
        while path[-1] != first:
            a, b = near[path[-1]]
            path.append(b if a == path[-2] else a)
        inside.update(path)
        found.append(path)
    return found


def starts(net, frame, spacing, published=True, region=None, unit=1.):
    "Places to start from: (position, node, next node, distance to it, distance to the next)."
    at, near = net
    result = []
    for path in chains(near, twice=published, rings=not published):
        ends = [0.]
        for u, v in zip(path, path[1:]): ends.append(ends[-1] + frame.distance(at[u], at[v]))
        if ends[-1] < spacing / 2: continue
        n = max(int(ends[-1] / spacing), 1)
        for i in range(1, n + 1):
            goal = i / (n + 1) * ends[-1]
            for j in range(len(path) - 1):
                if not ends[j] <= goal <= ends[j + 1]: continue
                a = (goal - ends[j]) / (ends[j + 1] - ends[j])
                (n0, e0), (n1, e1) = at[path[j]], at[path[j + 1]]
                place = ((1 - a) * n0 + a * n1, (1 - a) * e0 + a * e1)
                if region is None or inside(place, *region):
                    away = [0. if d * unit < 1e-6 else d for d in (goal - ends[j], ends[j + 1] - goal)]
                    result.append((place, path[j], path[j + 1], *away))
                if not published: break
    return result


def inside(place, south, west, north, east, share):
    up, over = share * (north - south), share * (east - west)
    return place[0] - south > up and north - place[0] > up and place[1] - west > over and east - place[1] > over


def pairs(net, frame, places, truth_at, limit, cosine, published=True, unit=1.):
    "For each start the nearest edge of the proposal that runs its way, as (n1, n2, distance to n1, to n2)."
    at, near = net
    edges = sorted({tuple(sorted((u, v))) for u in near for v in near[u]})
    result = {}
    for i, (place, u, v, _, _) in enumerate(places):
        way = frame.direction(truth_at[u], truth_at[v])
        found = []
        for n1, n2 in edges:
            d, along = frame.to_segment(at[n1], at[n2], place)
            other = frame.direction(at[n1], at[n2])
            dot = way[0] * other[0] + way[1] * other[1]
            if d >= limit or abs(dot) <= cosine: continue
            if published: ends = frame.distance(at[n1], place), frame.distance(at[n2], place)
            else: ends = along, frame.distance(at[n1], at[n2]) - along
            ends = [0. if end * unit < 1e-6 else end for end in ends]
            facing = (n2, n1, *ends[::-1]) if dot < 0 else (n1, n2, *ends)
            off = sum(abs(at[n][k] - truth_at[t][k]) for n, t in zip(facing, (u, v)) for k in (0, 1))
            found.append((round(d * unit, 6), round(off * unit, 6), (n1, n2), facing))
        if found: result[i] = min(found)[3]
    return result


def walk_published(net, frame, place, interval, reach):
    "Marbles (north, east, direction, edge) of the published breadth-first walk, in order."
    at, near = net
    n1, n2, d1, d2 = place
    marbles, length = [], frame.distance(at[n2], at[n1])
    eps = 1e-9 * interval   # rounding shall not decide about marbles on nodes, or at the very reach
    alpha, way = 0., frame.direction(at[n1], at[n2])
    def drop(u, v, alpha, way):
        (a0, b0), (a1, b1) = at[u], at[v]
        marble = (a1 * alpha + a0 * (1 - alpha), b1 * alpha + b0 * (1 - alpha), way, tuple(sorted((u, v))))
        if marble not in marbles: marbles.append(marble)
    while True:
        point = [at[n1][k] * alpha + at[n2][k] * (1 - alpha) for k in (0, 1)]
        if d1 - frame.distance(point, at[n1]) < reach or d2 - frame.distance(point, at[n2]) < reach:
            drop(n2, n1, alpha, way)
        alpha += interval / length
        if alpha > 1: break
    queue, seen, covered = deque([(n1, None, d1), (n2, None, d2)]), {}, {}
    while queue:
        u, last, dist = queue.popleft()
        before = seen.get(u, math.inf)
        if before <= dist or dist > reach: continue
        seen[u] = dist
        for v in near[u]:
            if v in (last, u, n1, n2): continue
            length, way = frame.distance(at[v], at[u]), frame.direction(at[u], at[v])
            queue.append((v, u, dist + length))
            if before + length < reach: continue    # all of this edge had its marbles before
            along = max(interval * math.ceil(dist / interval - 1e-9) - dist, 0.)
            low, high = covered.get((u, v), 0), length
            if (v, u) in covered: high = length - covered[v, u]
            while along < length - eps:
                alpha = along / length
                if dist + length * alpha > reach + eps: break
                if length * alpha >= low:
                    if length * alpha > high: break
                    drop(u, v, alpha, way)
                along += interval
            covered[u, v] = along - interval
    return marbles


def network_distances(net, frame, place):
    "Shortest distance to every node from a place (n1, n2, distance to n1, distance to n2)."
    at, near = net
    n1, n2, d1, d2 = place
    queue, seen = [(d1, n1), (d2, n2)], {}
    heapq.heapify(queue)
    while queue:
        dist, u = heapq.heappop(queue)
        if u in seen: continue
        seen[u] = dist
        for v in near[u]: heapq.heappush(queue, (dist + frame.distance(at[u], at[v]), v))
    return seen


def walk_corrected(net, frame, place, interval, reach):
    "A marble wherever the shortest way from the start is a whole number of intervals, and within reach."
    at, near = net
    n1, n2, d1, d2 = place
    marbles, seen = set(), network_distances(net, frame, place)
    def drop(u, v, t):
        (a0, b0), (a1, b1) = at[u], at[v]
        size = frame.distance(at[u], at[v])
        marbles.add((a0 + (a1 - a0) * t / size, b0 + (b1 - b0) * t / size,
                     frame.direction(at[min(u, v)], at[max(u, v)]), tuple(sorted((u, v)))))
    eps = 1e-9 * interval   # a point on a node belongs to the roads that lead on from it
    for k in range(int(reach / interval) + 1):
        if k == 0 or k * interval < d1 - eps: drop(n1, n2, d1 - k * interval)
        if k and k * interval < d2 - eps: drop(n1, n2, d1 + k * interval)
    for u in seen:
        for v in near[u]:
            if {u, v} == {n1, n2}: continue
            size = frame.distance(at[u], at[v])
            k = math.ceil(seen[u] / interval - 1e-9)
            while k * interval <= reach and k * interval - seen[u] < size - eps:
                t = k * interval - seen[u]
                gap = seen[v] + size - t - k * interval     # how much longer the way round is
                if gap > eps or (gap > -eps and u < v): drop(u, v, t)
                k += 1
    return sorted(marbles)


def matched(marbles, holes, frame, limit, cosine):
    "Size of the largest one-to-one matching of marbles to holes that are near and run the same way."
    if not marbles or not holes: return 0
    allowed = np.array([[frame.distance(m, h) < limit and abs(m[2][0] * h[2][0] + m[2][1] * h[2][1]) > cosine
                         for h in holes] for m in marbles])
    return int((maximum_bipartite_matching(csr_matrix(allowed), perm_type="column") >= 0).sum())


def between_published(net, frame, a, b, limit):
    "Distance along the network between two places, with the published search (its second end begins at d1 too)."
    at, near = net
    if (a[0], a[1]) == (b[0], b[1]): return abs(a[2] - b[2])
    if (a[0], a[1]) == (b[1], b[0]): return abs(a[2] - b[3])
    best, seen, queue = math.inf, {}, deque([(a[0], None, a[2]), (a[1], None, a[2])])
    while queue:
        u, last, dist = queue.popleft()
        if seen.get(u, math.inf) <= dist or dist > limit: continue
        seen[u] = dist
        for v in near[u]:
            if v in (last, u, a[0], a[1]): continue
            if (u, v) == (b[0], b[1]): best = min(best, dist + b[2])
            elif (u, v) == (b[1], b[0]): best = min(best, dist + b[3])
            queue.append((v, u, dist + frame.distance(at[v], at[u])))
    return best


def between_corrected(net, frame, a, b, limit):
    "Shortest distance along the network between two places."
    if {a[0], a[1]} == {b[0], b[1]}: return abs(a[2] - (b[2] if a[0] == b[0] else b[3]))
    seen = network_distances(net, frame, a)
    return min(seen.get(b[0], math.inf) + b[2], seen.get(b[1], math.inf) + b[3])


def thin(rows, net, frame, limit, look, keep, between):
    "Rows (start, place on the proposal, position, precision, recall) that no better row stands too near to."
    def rivals(row):
        stretch = math.cos(math.radians(row[2][0])) if frame.degrees else 1.
        return [r[0] for r in rows if abs(r[2][0] - row[2][0]) <= look and abs(r[2][1] - row[2][1]) * stretch <= look
                and between(net, frame, row[1], r[1], look) < limit]
    kept, marked = [], set()
    for row in reversed(sorted(rows, key=lambda row: row[3])):
        if row[0] in marked and row[3] < keep: continue
        kept.append(row)
        marked.update(rivals(row))
    return sorted(kept)


def topo_plain(truth, proposal, frame, p, published=True, region=None):
    "All of TOPO; `p` has lengths in the frame's unit and cosines."
    unit = 111_111. if frame.degrees else 1.
    places = starts(truth, frame, p["start_every"], published, region, unit)
    found = pairs(proposal, frame, places, truth[0], p["pair"], p["pair_cos"], published, unit)
    rows = []
    walk = walk_published if published else walk_corrected
    for i, place in found.items():
        marbles = walk(proposal, frame, place, p["interval"], p["reach"])
        holes = walk(truth, frame, places[i][1:], p["interval"], p["reach"])
        twice = [(a + da, b + db, way, e) for a, b, way, e in holes for da, db in ((0, 0), frame.shift)]
        hit = matched(marbles, holes, frame, p["match"], p["match_cos"])
        first = matched(marbles, twice, frame, p["match"], p["match_cos"]) if published else hit
        rows.append((i, place, places[i][0], first / len(marbles), hit / len(holes)))
    between = between_published if published else between_corrected
    kept = thin(rows, proposal, frame, p["thin"], p["look"], p["keep"], between)
    mean = lambda k: sum(r[k] for r in kept) / len(kept) if kept else 0.  # noqa: E731
    coverage = len(kept) / len(places) if places else math.nan
    return dict(precision=mean(3), mean_recall=mean(4), coverage=coverage, overall_recall=mean(4) * coverage,
                starts=len(places), paired=len(found), kept=len(kept), rows=rows)

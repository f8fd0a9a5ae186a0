import time
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely import box

from aerial_nb.data.raster import DataError, Pixels
from aerial_nb.data.vectors import read_layer
from aerial_nb.training.instances import label_objects, match_labels
from aerial_nb.training.objects import average_precision, greedy_pairs, join_scores, match_objects
from aerial_nb.training.uncertainty import paired_difference

DATA = Path(__file__).parents[1] / "../shared/data/spacenet"
SCORING = DATA / "footprint_scoring"
real = pytest.mark.skipif(not SCORING.exists(), reason="published scoring cases are not on this machine")


def squares(*corners, size=10, crs="EPSG:32631", **columns):
    return gpd.GeoDataFrame(columns, geometry=[box(x, y, x + size, y + size) for x, y in corners], crs=crs)


# --- published numbers

@pytest.fixture(scope="module")
def spacenet2():
    truth = read_layer(SCORING / "sn2/SN2_sample_truth.csv", geometry="PolygonWKT_Pix", crs="pixels")
    return truth, read_layer(SCORING / "sn2/SN2_sample_preds.csv")


@real
@pytest.mark.parametrize("score", [None, "Confidence"])
def test_spacenet_2_per_city_and_per_image(spacenet2, score):
    found = match_objects(*spacenet2, iou=0.5, min_area=20, image="ImageId", score=score)
    published = pd.read_csv(SCORING / "sn2/SN2_test_results_full.csv").set_index("imageID")
    ours = found.by_image().loc[published.index]
    for column, theirs in (("tp", "TruePos"), ("fp", "FalsePos"), ("fn", "FalseNeg")):
        assert (ours[column] == published[theirs]).all()
    for column, theirs in (("precision", "Precision"), ("recall", "Recall"), ("f1", "F1Score")):
        assert np.allclose(ours[column].fillna(0), published[theirs], atol=1e-12)   # they write 0 where nothing is there
    city = ours.index.str.contains("Khartoum")
    for rows, counts, f1 in ((~city, [35, 2, 7], 0.886076), (city, [52, 55, 75], 0.444444)):
        tp, fp, fn = ours.loc[rows, ["tp", "fp", "fn"]].sum()
        assert [tp, fp, fn] == counts and 2 * tp / (2 * tp + fp + fn) == pytest.approx(f1, abs=1e-6)
    assert found.findings["truth"] == dict(features=172, without_geometry=1, repaired=0, too_small=2, duplicates=0)


@real
def test_spacenet_2_per_building(spacenet2):
    found = match_objects(*spacenet2, min_area=20, image="ImageId")
    published = pd.read_csv(SCORING / "sn2/SN2_sample_iou_by_building.csv")
    assert (published.BuildingId.to_numpy() == spacenet2[0].BuildingId.to_numpy()).all()
    theirs = published.iou_score.to_numpy()[found.truth.row]
    matched = (found.truth["match"] >= 0).to_numpy()
    assert np.array_equal(matched, theirs > 0.5)
    assert np.allclose(found.truth.iou[matched], theirs[matched], atol=1e-9)


@real
def test_atlanta_in_both_crs():
    for name in ("gt_epsg32616", "gt_epsg4326"):
        found = match_objects(*(DATA / "atlanta_buildings" / f"{n}.geojson" for n in (name, "pred_epsg32616")))
        assert (found.tp, found.fp, found.fn) == (8, 20, 20) and found.f1 == pytest.approx(0.285714, abs=1e-6)
        assert found.unit == "m2" and found.by_size().tp.sum() == 8


@real
def test_two_annotators():
    files = [SCORING / f"two_annotators/{n}-labels.geojson" for n in ("matt", "seamus")]
    found = match_objects(*files)
    assert (found.tp, found.fp, found.fn) == (110, 52, 59) and found.f1 == pytest.approx(0.6647, abs=5e-5)
    other = match_objects(*files[::-1])
    assert (other.tp, other.fp, other.fn) == (110, 59, 52)


@real
def test_aircraft_by_class_reach_the_published_map():
    sides = [pd.concat([read_layer(f).assign(image=f.stem) for f in sorted((SCORING / "vector_map" / s).glob("*"))],
                       ignore_index=True) for s in ("gt", "preds")]
    found = match_objects(*sides, image="image", classes=("make", "class"), score="confidence")
    assert round(average_precision(found).mean(), 2) == 0.85
    assert found.by_class()[["tp", "fp", "fn"]].sum().tolist() == [found.tp, found.fp, found.fn]


# --- matching

def plain_greedy(truth, proposal, iou, scores=None):
    "The scorers' loop: proposals by score, each takes its best free building; without scores the best pair first."
    table = [[t.intersection(p).area / t.union(p).area for t in truth] for p in proposal]
    pairs = [(-v, t, p) for p, row in enumerate(table) for t, v in enumerate(row) if v > iou]
    pairs.sort(key=lambda x: (x[0], x[2], x[1]) if scores is None else (-scores[x[2]], x[2], x[0], x[1]))
    free_t, free_p, taken = set(range(len(truth))), set(range(len(proposal))), {}
    for _, t, p in pairs:
        if t in free_t and p in free_p: free_t.remove(t); free_p.remove(p); taken[t] = p
    return taken


boxes = st.lists(st.tuples(*[st.integers(0, 12)] * 2, *[st.integers(1, 6)] * 2), min_size=0, max_size=9)


@given(a=boxes, b=boxes, iou=st.sampled_from([0, 0.1, 0.25, 0.5]), with_score=st.booleans())
@settings(max_examples=40, deadline=None)
def test_matches_are_those_of_the_plain_loop(a, b, iou, with_score):
    truth, proposal = ([box(x, y, x + w, y + h) for x, y, w, h in side] for side in (a, b))
    scores = [(7 * k) % 4 for k in range(len(b))]
    frames = [gpd.GeoDataFrame(dict(s=s), geometry=g, crs="EPSG:32631") for g, s in ((truth, [0] * len(a)), (proposal, scores))]
    found = match_objects(*frames, iou=iou, score="s" if with_score else None)
    taken = plain_greedy(truth, proposal, iou, scores if with_score else None)
    assert {t: p for t, p in enumerate(found.truth["match"]) if p >= 0} == taken
    assert {p: t for p, t in enumerate(found.proposal["match"]) if t >= 0} == {p: t for t, p in taken.items()}
    best = [max((t.intersection(p).area / t.union(p).area for p in proposal), default=0) for t in truth]
    assert np.allclose(found.truth.best_iou, best)
    assert (found.tp, found.fp, found.fn) == (len(taken), len(b) - len(taken), len(a) - len(taken))


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=40))
def test_greedy_pairs_equal_a_loop(pairs):
    rows, cols = np.array(pairs, int).reshape(-1, 2).T
    expected, used = [], (set(), set())
    for k, (r, c) in enumerate(pairs):
        if r not in used[0] and c not in used[1]: expected.append(k); used[0].add(r); used[1].add(c)
    assert greedy_pairs(rows, cols).tolist() == expected


def test_the_surer_proposal_chooses_first_and_one_is_false():
    truth = squares((0, 0))
    proposal = squares((1, 0), (3, 0), score=[0.2, 0.9])
    assert match_objects(truth, proposal).proposal["match"].tolist() == [0, -1]
    found = match_objects(truth, proposal, score="score")
    assert found.proposal["match"].tolist() == [-1, 0] and found.mean_iou == pytest.approx(7 / 13)


def test_exactly_the_threshold_is_no_match():
    truth = squares((0, 0), size=2)
    half = gpd.GeoDataFrame(geometry=[box(0, 0, 2, 1)], crs=truth.crs)
    assert match_objects(truth, half, iou=0.5).tp == 0 and match_objects(truth, half, iou=0.49).tp == 1


def test_images_and_classes_keep_apart():
    truth = squares((0, 0), (0, 0), (50, 0), tile=["a", "b", "b"], kind=["shed", "house", "house"])
    proposal = squares((0, 0), (50, 0), (90, 0), name=["a", "b", "c"], guess=["house", "house", "shed"])
    found = match_objects(truth, proposal, image=("tile", "name"))
    assert found.by_image()[["tp", "fp", "fn"]].to_numpy().tolist() == [[1, 0, 0], [1, 0, 1], [0, 1, 0]]
    found = match_objects(truth, proposal, image=("tile", "name"), classes=("kind", "guess"))
    assert found.by_class().loc[["shed", "house"], ["tp", "fp", "fn"]].to_numpy().tolist() == [[0, 1, 1], [1, 1, 1]]


def test_sizes_are_square_metres_on_the_ground():
    truth = squares((500000, 0), (500100, 0), crs="EPSG:32633").to_crs("EPSG:3857")   # at the equator
    north = gpd.GeoDataFrame(geometry=[box(500000, 6650000, 500020, 6650020)], crs="EPSG:32632").to_crs("EPSG:3857")
    assert match_objects(north, north).truth["area"].iloc[0] == pytest.approx(400, rel=2e-3)   # 4 times that in Mercator
    found = match_objects(truth, truth)
    assert np.allclose(found.truth["area"], 100, rtol=2e-3)
    assert match_objects(truth, truth, min_area=101).by_size().tp.sum() == 0


def test_size_classes_count_a_false_proposal_by_its_own_size():
    truth = squares((0, 0), (100, 0))
    proposal = pd.concat([squares((0, 0)), squares((300, 0), size=50)], ignore_index=True)
    table = match_objects(truth, proposal).by_size([50, 200])
    assert table.index.tolist() == ["under 50 m2", "50 to 200 m2", "200 m2 and more"]
    assert table[["tp", "fp", "fn"]].to_numpy().tolist() == [[0, 0, 0], [1, 0, 1], [0, 1, 0]]
    with pytest.raises(ValueError, match="edges"):
        match_objects(*[squares((0, 0), crs=None)] * 2, crs="pixels").by_size()


# --- bad input

def test_broken_outlines_are_mended_and_counted():
    wkt = ["POLYGON((0 0, 4 4, 4 0, 0 4, 0 0))", "POLYGON EMPTY", "POLYGON((0 0, 1 1, 2 2, 0 0))",
           "MULTIPOLYGON(((10 0, 12 0, 12 2, 10 0)), ((20 0, 22 0, 22 2, 20 0)))"]
    layer = gpd.GeoSeries([*shapely.from_wkt(wkt), None, box(0, np.nan, 1, 1)], crs="EPSG:32631")
    found = match_objects(layer, layer)
    assert len(found.truth) == found.tp == 2 and found.truth["area"].iloc[0] == pytest.approx(8, rel=1e-2)
    assert found.truth.row.tolist() == [0, 3]
    assert found.findings["truth"]["without_geometry"] == 3 and found.findings["truth"]["repaired"] == 2


@pytest.mark.parametrize("truth, proposal, expected", [(0, 0, (0, 0, 0)), (2, 0, (0, 0, 2)), (0, 2, (0, 2, 0))])
def test_nothing_there(truth, proposal, expected):
    sides = [squares(*[(20 * k, 0) for k in range(n)]) for n in (truth, proposal)]
    found = match_objects(*sides)
    assert (found.tp, found.fp, found.fn) == expected
    assert np.isnan(found.f1) if not truth + proposal else found.f1 == 0
    assert np.isnan(found.recall) == (not truth) and np.isnan(found.precision) == (not proposal) and np.isnan(found.mean_iou)
    assert "ObjectScores" in repr(found) and "<table" in found._repr_html_()
    found.show()


def test_duplicates_count_and_are_reported(caplog):
    truth = squares((0, 0), (0, 0), (50, 0))
    found = match_objects(truth, squares((0, 0), (50, 0)))
    assert (found.tp, found.fn) == (2, 1) and found.findings["truth"]["duplicates"] == 1
    assert "1 outlines occur twice" in caplog.text


def test_refusals_say_what_to_do():
    good, bare = squares((0, 0), tile=["a"]), squares((0, 0), crs=None, tile=["a"])
    for sides, arguments, says in (
        ((bare, good), {}, "truth: .*states no CRS"),
        ((good, bare), {}, "proposal: .*states no CRS"),
        ((good, bare.set_crs("EPSG:32631")), dict(image="scene"), "no column 'scene'"),
        ((good, good), dict(score="tile"), "no score in the column 'tile'"),
        ((good, good.assign(tile="b")), dict(image="tile"), "no image in common"),
        ((good, good.assign(tile=None)), dict(image="tile"), "have no image"),
        ((good, good.set_geometry(good.boundary)), {}, "proposal: 1 of 1 features are points or lines"),
        ((pd.DataFrame(dict(a=[1])), good), {}, "read_layer"),
        ((good, Path("missing.gpkg")), {}, "no such file"),
    ):
        with pytest.raises(DataError, match=says): match_objects(*sides, **arguments)
    with pytest.raises(DataError, match="truth is in pixels, proposal in a map"):
        match_objects(read_layer(bare, crs="pixels"), good)
    with pytest.raises(ValueError, match=r"\[0, 1\)"): match_objects(good, good, iou=50)
    with pytest.raises(ValueError, match="classes"): match_objects(good, good).by_class()
    with pytest.raises(ValueError, match="scores"): average_precision(match_objects(good, good))


# --- average precision, intervals, joining

def test_average_precision_by_hand():
    truth = squares((0, 0), (20, 0), (40, 0), (60, 0))
    proposal = squares((0, 0), (200, 0), (20, 0), (300, 0), (40, 0), s=[0.9, 0.8, 0.7, 0.6, 0.5])
    found = average_precision(match_objects(truth, proposal, score="s"))
    # precision at recall 1/4, 2/4, 3/4: 1, 2/3, 3/5; 26 of 101 recalls up to 1/4, 25 up to 1/2, 25 up to 3/4
    assert found["all"] == pytest.approx((26 * 1 + 25 * 2 / 3 + 25 * 3 / 5) / 101)
    assert average_precision(match_objects(truth, proposal.iloc[:0], score="s"))["all"] == 0


def many_images(seed, quality, n=8):
    rng = np.random.default_rng(seed)
    at = [(20 * k, 0) for k in range(n * 6)]
    tile = [f"t{k // 6}" for k in range(n * 6)]
    shift = np.where(np.random.default_rng(0).random(n * 6) < quality, 1, 8) + rng.random(n * 6)
    return squares(*at, tile=tile), squares(*[(x + s, y) for (x, y), s in zip(at, shift, strict=True)], tile=tile)


def test_intervals_and_differences_over_images():
    good, bad = (match_objects(*many_images(1, q), image="tile") for q in (0.9, 0.4))
    interval = good.interval("f1", n=300)
    assert interval.value == pytest.approx(good.f1) and interval.low < good.f1 < interval.high and interval.scenes == 8
    assert good.interval("f1", scenes={n: "one place" for n in good.names}).reason
    assert paired_difference(good.table(), bad.table(), "f1", n=300).distinguishable
    assert not paired_difference(good.table(), good.table(), "f1", n=300).distinguishable


def test_parts_join_to_the_whole():
    truth, proposal = many_images(2, 0.6)
    whole = match_objects(truth, proposal, image="tile")
    parts = [match_objects(truth[truth.tile == n], proposal[proposal.tile == n], image="tile") for n in whole.names]
    joined = join_scores(parts)
    assert joined.to_dict() == whole.to_dict()
    assert np.allclose(joined.proposal.iou.fillna(0).to_numpy(), whole.proposal.iou.fillna(0).to_numpy())
    hit = joined.truth[joined.truth["match"] >= 0]
    assert (joined.proposal["match"].to_numpy()[hit["match"]] == hit.index).all()
    with pytest.raises(ValueError, match="occurs twice"): join_scores([parts[0], parts[0]])
    with pytest.raises(ValueError, match="different rules"):
        join_scores([parts[0], match_objects(truth, proposal, 0.3, image="tile")])


# --- rasters

@given(seed=st.integers(0, 10**6), iou=st.sampled_from([0.1, 0.5]), blank=st.booleans(), big=st.booleans())
@settings(max_examples=25, deadline=None)
def test_labels_match_as_their_outlines_do(seed, iou, blank, big):
    rng = np.random.default_rng(seed)
    truth = np.kron(rng.integers(0, 9, (4, 5)), np.ones((4, 4), int))
    proposal = np.where(rng.random(truth.shape) < 0.3, rng.integers(0, 9, truth.shape), truth)
    valid = rng.random(truth.shape) < 0.8 if blank else None
    far = 10**12 if big else 1   # labels need not be small
    found = match_labels(truth * far, proposal * far, iou, valid=valid, min_area=2)
    cut = [np.where(valid, x, 0) if blank else x for x in (truth, proposal)]
    sides = [[k for k in np.unique(x) if k and (x == k).sum() >= 2] for x in cut]
    assert found.truth.row.tolist() == [k * far for k in sides[0]] and found.unit == "px"
    table = {(i, j): (a & b).sum() / (a | b).sum() for i, t in enumerate(sides[0]) for j, p in enumerate(sides[1])
             for a, b in [(cut[0] == t, cut[1] == p)]}
    assert np.allclose(found.truth.best_iou, [max((table[i, j] for j in range(len(sides[1]))), default=0)
                                              for i in range(len(sides[0]))])
    outlines = match_objects(found.truth[["geometry"]], found.proposal[["geometry"]], iou)
    assert outlines.truth["match"].tolist() == found.truth["match"].tolist()
    assert np.allclose(outlines.truth["area"], found.truth["area"])


def test_masks_become_objects():
    mask = np.zeros((20, 20), np.uint8)
    mask[1:5, 1:5] = mask[5:9, 5:9] = mask[12:18, 2:18] = 1
    mask[:, 10] = 255
    assert label_objects(mask).max() == 4 and label_objects(mask, diagonal=True).max() == 3
    assert label_objects(mask == 1).max() == 4
    labels = label_objects(mask)
    found = match_objects(labels, np.roll(labels, 1, 1))
    assert found.tp == 4 and found.names == ("all",)
    scaled = match_labels(labels, labels, gsd_m=0.5, min_area=5, image="t")
    assert scaled.unit == "m2" and scaled.findings["truth"]["too_small"] == 2 and scaled.truth["area"].tolist() == [12, 10.5]


def test_scores_of_labels_choose_first():
    truth = np.zeros((10, 30), int); truth[:, :10] = 1
    proposal = np.zeros((10, 30), int); proposal[:6, :10] = 4; proposal[6:, :10] = 9
    assert match_labels(truth, proposal, 0.3).proposal["match"].tolist() == [0, -1]
    assert match_labels(truth, proposal, 0.3, score={4: 0.1, 9: 0.8}).proposal["match"].tolist() == [-1, 0]
    with pytest.raises(DataError, match="label 9"): match_labels(truth, proposal, score={4: 0.1})


def test_blank_and_empty_rasters():
    empty = np.zeros((8, 8), int)
    assert np.isnan(match_labels(empty, empty).f1)
    full = np.ones((8, 8), int)
    assert match_labels(full, full, valid=empty == 1).tp == 0 and match_labels(full, empty).fn == 1


def test_raster_refusals():
    mask = np.array([[0, 1, 255]], np.uint8)
    for arguments, says in (
        ((mask, mask), "a class map or a mask"),
        ((mask == 1, mask == 1), "label_objects"),
        ((mask * 0.5, mask * 0.5), "whole numbers"),
        ((mask.astype(int) - 1, mask.astype(int)), "negative labels"),
        ((mask.astype(int), mask.astype(int)[:, :2]), "one size"),
    ):
        with pytest.raises(DataError, match=says): match_labels(*arguments)
    with pytest.raises(DataError, match="one size"): match_labels(mask.astype(int), mask.astype(int), valid=np.ones((2, 2), bool))


# --- pictures

def test_pictures_hold_all_three_kinds_and_lie_on_the_image():
    from affine import Affine
    truth, proposal = squares((20, 20), (60, 60)), squares((21, 20), (90, 20))
    found = match_objects(truth, proposal)
    image = Pixels(np.zeros((3, 60, 60), np.uint8), np.ones((60, 60), bool), "EPSG:32631", Affine(2, 0, 0, 0, -2, 120))
    figure = found.show(background=image, gsd_m=2)
    ax = figure.axes[0]
    extents = [p.get_extents() for c in ax.collections for p in c.get_paths()]
    assert min(e.x0 for e in extents) == pytest.approx(10) and max(e.y1 for e in extents) == pytest.approx(50)
    assert "1 found, 1 false, 1 missed" in ax.get_title()
    html = found._repr_html_()
    assert all(colour in html for colour in ("#009BE6", "#FFA000", "#C2005C")) and "under 50 m2" in html
    with pytest.raises(ValueError, match="read_pixels"): found.show(background=np.zeros((3, 9, 9)))
    with pytest.raises(ValueError, match="no image 'x'"): found.show("x")


def test_ten_thousand_buildings_are_fast():
    side = 100
    at = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2) * 20
    truth = gpd.GeoSeries(shapely.box(at[:, 0], at[:, 1], at[:, 0] + 10, at[:, 1] + 10), crs="EPSG:32631")
    start = time.process_time()
    found = match_objects(truth, truth.translate(1, 1))
    assert found.tp == side**2 and time.process_time() - start < 5

"""Maps and vectors judged strip by strip, the images and labels that parameters name, and what predict_scene refuses."""
import geopandas as gpd
import numpy as np
import pytest
import rasterio
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from aerial_nb.data.raster import DataError, write_raster
from aerial_nb.data.synthetic import scene, write_scene
from aerial_nb.scenes.judge import busy_window, find_images, judge_map, label_strips, match_labels
from aerial_nb.scenes.polygons import polygonise
from aerial_nb.scenes.probmap import open_map
from aerial_nb.training.counts import count_pixels
from notebooks import play


def write_map(path, probs, s, name="building"):
    "Probabilities as aerial_predict stores them."
    coded = np.where(np.isnan(probs), 255, np.nan_to_num(probs * 254).round()).astype("uint8")
    write_raster(path, coded[None], s.crs, s.transform, nodata=255)
    with rasterio.open(path, "r+") as d: d.scales = (1 / 254,); d.update_tags(AERIAL_THRESHOLD="0.4", AERIAL_CLASS=name)
    return path


@pytest.fixture(scope="module")
def town(tmp_path_factory):
    home = tmp_path_factory.mktemp("town")
    s = scene(size=200, seed=5, blank=True)
    rng = np.random.default_rng(0)
    probs = np.clip((s.buildings == 1) * .6 + rng.random((200, 200)) * .5, 0, 1)
    probs[:30, :30] = np.nan
    return s, write_scene(s, home, "town"), write_map(home / "map.tif", probs, s)


@given(rows=st.integers(1, 230))
@settings(max_examples=12, deadline=None)
def test_strips_of_any_height_count_the_same(town, rows):
    s, files, path = town
    m = open_map(path)
    probs = m.read()
    target = np.where(np.isnan(probs), 255, s.buildings).astype("uint8")
    plain = count_pixels(np.nan_to_num(probs) >= .4, target)
    for label in (files["buildings"], s.buildings):
        got = judge_map(path, label, rows=rows)
        assert got.counts == plain and got.threshold == .4
        assert got.curve.frame().set_index("threshold").loc[got.curve.thresholds[102], "iou"] == pytest.approx(plain.iou, abs=.02)


def test_layers_and_masks_agree(town):
    _, files, path = town
    a, b = (judge_map(path, files[k]).counts for k in ("buildings", "building_polygons"))
    assert a.iou == pytest.approx(b.iou, abs=.01)


def test_vectors_of_all_sizes_count_as_the_map(town):
    _, files, path = town
    got = judge_map(path, files["buildings"], polygonise(path, min_area_m2=0, split="none"))
    assert got.vectors == got.counts and got.record()["vectors"]["iou"] == got.counts.iou
    none = gpd.GeoDataFrame(geometry=[], crs="EPSG:32631")
    assert judge_map(path, files["buildings"], none).vectors.tp == 0


def test_what_the_map_or_the_label_does_not_know_is_not_counted(town):
    s, files, path = town
    got = judge_map(path, files["buildings"])
    assert got.record()["pixels"] == int(((s.buildings != 255) & np.isfinite(open_map(path).read())).sum())
    with pytest.raises(DataError, match="no pixel has both"): judge_map(path, np.full((200, 200), 255, np.uint8))


def test_labels_of_another_size_or_place_are_refused(town, tmp_path):
    s, _, path = town
    with pytest.raises(DataError): judge_map(path, np.zeros((20, 20), np.uint8))
    write_raster(tmp_path / "m.tif", np.zeros((1, 200, 200), np.uint8), s.crs, s.transform @ s.transform.translation(9, 0))
    with pytest.raises(DataError, match="another place|another"): judge_map(path, tmp_path / "m.tif")


def test_lines_need_a_width(town):
    s, _, path = town
    lines = gpd.GeoDataFrame(geometry=[shapely.LineString([(s.transform.c, s.transform.f), (s.transform.c + 90, s.transform.f - 90)])], crs=s.crs)
    grid = open_map(path).grid
    with pytest.raises(DataError): list(label_strips(lines, grid))
    assert sum(int((t == 1).sum()) for _, t in label_strips(lines, grid, 6.)) > 200
    assert sum(int((t == 1).sum()) for _, t in label_strips(lines.assign(width_m=6.), grid)) > 200


def test_the_busy_window_is_inside_and_busy(town, tmp_path):
    s, *_ = town
    probs = np.full((300, 400), np.nan); probs[10:60, 300:380] = .9; probs[200:, :100] = .01
    path = write_map(tmp_path / "m.tif", probs, s)
    row, col, high, wide = busy_window(path, 64)
    assert (high, wide) == (64, 64) and np.nanmean(open_map(path).read((row, col, high, wide))) > .8
    assert busy_window(path, 1000) == (0, 0, 300, 300) or busy_window(path, 1000)[2:] == (300, 300)
    write_map(tmp_path / "blank.tif", np.full((40, 50), np.nan), s)
    assert busy_window(tmp_path / "blank.tif", 16)[2:] == (16, 16)


def test_images_by_name_and_pattern(tmp_path):
    for n in "ba": (tmp_path / f"{n}.tif").write_bytes(b"")
    a, b = tmp_path / "a.tif", tmp_path / "b.tif"
    assert find_images(f"{tmp_path}/*.tif") == [a, b] == find_images(f"{a}, {b}, {a}")
    for wrong, said in (("", "no image is named"), ("gone.tif", "no such file"), (f"{tmp_path}/*.png", "no file fits")):
        with pytest.raises(DataError, match=said): find_images(wrong)


def test_labels_by_name(tmp_path):
    for n in ("a.geojson", "b.geojson"): (tmp_path / n).write_text("{}")
    images = [tmp_path / "x" / "b.tif", tmp_path / "x" / "a.tif"]
    assert [p.name for p in match_labels(images, str(tmp_path))] == ["b.geojson", "a.geojson"]
    assert match_labels(images, "") == [None, None] and len(set(match_labels(images, str(tmp_path / "a.geojson")))) == 1
    with pytest.raises(DataError, match="no label for c.tif"): match_labels([tmp_path / "c.tif"], str(tmp_path))
    with pytest.raises(DataError, match="no such label"): match_labels(images, str(tmp_path / "gone.gpkg"))


@pytest.mark.parametrize("wrong, said", [(dict(image="gone.tif"), "no such file"), (dict(what="trees"), "what"), (dict(threshold=2.), "threshold"),
                                         (dict(batch=0), "batch"), (dict(format="shp"), "format"), (dict(fil="1"), "fil")])
def test_predict_scene_refuses(tmp_path, wrong, said):
    with pytest.raises((ValueError, DataError), match=said): play("predict_scene.ipynb", tmp_path, "match_labels(", **wrong)

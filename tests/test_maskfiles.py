"""Behaviour of aerial_nb.data.maskfiles: all that can be made is made, the rest is named, and a second run does what is missing."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
import shapely
from affine import Affine

from aerial_nb.data import maskfiles
from aerial_nb.data.burn import Rules
from aerial_nb.data.maskfiles import Setup, aerial_masks, make_masks, plan_masks
from aerial_nb.data.masks import class_map, read_class_map
from aerial_nb.data.raster import DataError, write_raster

REAL = Path(__file__).parents[1] / "../shared/data"
RNG = np.random.default_rng(0)


def place(i):
    "Tiles of 32 pixels in a row, half a metre each."
    return dict(crs="EPSG:32633", transform=Affine(0.5, 0, 500_000 + 16 * i, 0, -0.5, 5_400_000))


def tile(folder, i, name="tile{}.tif", **options):
    image = RNG.integers(1, 255, (3, 32, 32)).astype("uint8")
    return write_raster(folder / "images" / name.format(i), image, **place(i), **options)


def houses(n):
    "A house in every tile, in degrees."
    x = 500_000 + 16.0 * np.arange(n)
    return gpd.GeoDataFrame(
        {"kind": ["roof", "shed"] * (n // 2) + ["roof"] * (n % 2)},
        geometry=shapely.box(x + 2, 5_399_990, x + 9, 5_399_996),
        crs="EPSG:32633",
    ).to_crs(4326)


@pytest.fixture
def town(tmp_path):
    "Six tiles, one layer for all, and one file for each."
    (tmp_path / "labels").mkdir()
    for i in range(6):
        tile(tmp_path, i)
        houses(6).iloc[[i]].to_file(tmp_path / "labels" / f"tile{i}.geojson")
    houses(6).to_file(tmp_path / "all.gpkg")
    return tmp_path


def run(folder, labels="labels", out="out", **options):
    return make_masks(folder / "images", folder / labels, folder / out, progress=False, **options)


def times(folder):
    return {p.name: p.stat().st_mtime_ns for p in folder.rglob("*.tif")}


def leftovers(folder):
    return [p for p in folder.rglob("*") if p.name.endswith(".part")]


# Making


@pytest.mark.parametrize("labels", ["labels", "all.gpkg"])
@pytest.mark.parametrize("workers", [1, 3])
def test_masks_are_those_of_class_map(town, labels, workers):
    table = run(town, labels, workers=workers)
    assert table["status"].tolist() == ["made"] * 6 and [Path(p).stem for p in table["image"]] == [f"tile{i}" for i in range(6)]
    for i in range(6):
        expected = class_map(town / "images" / f"tile{i}.tif", town / "all.gpkg")[0]
        mask = town / "out" / f"tile{i}.tif"
        assert (read_class_map(mask) == expected).all() and 0 < expected.mean() < 1
        with rasterio.open(mask) as d, rasterio.open(town / "images" / f"tile{i}.tif") as image:
            assert (d.crs, d.transform, d.shape, d.nodata) == (image.crs, image.transform, image.shape, 255)
    saved = pd.read_csv(town / "out" / "masks.csv")
    assert saved["burned"].tolist() == [1] * 6 and (saved["class_0"] + saved["class_1"] + saved["class_255"] == 1024).all()


def test_the_command(town, caplog):
    with caplog.at_level("INFO"):
        aerial_masks(str(town / "images"), str(town / "all.gpkg"), str(town / "out"), attribute="kind",
                     classes="roof=1,shed=2", border_m=0.5, instances="uint16", workers=1)
    assert "6 made, 0 kept, 0 failed of 6; features: 36 read, 6 burned" in caplog.text
    assert [np.unique(read_class_map(town / "out" / f"tile{i}.tif")).tolist() for i in (0, 1)] == [[0, 1], [0, 2]]
    with rasterio.open(town / "out" / "instances" / "tile3.tif") as d:
        assert d.dtypes == ("uint16",) and d.read(1).max() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(classes="roof"), "write VALUE=CLASS"),
        (dict(classes="roof=1"), "needs attribute="),
        (dict(attribute="kind", classes="roof=1"), r"no class for 'kind' = 'shed' \(3\)"),
        (dict(width_m="-3"), "greater than 0"),
        (dict(crs="EPSG:3857"), "states WGS 84, but crs=WGS 84 / Pseudo-Mercator was passed"),
        (dict(layer="roads"), "'roads' is not one of them"),
        (dict(udm="nowhere/*.tif"), "nowhere/.*: no such file"),
    ],
)
def test_what_cannot_be_started_is_said_once(town, caplog, options, message):
    with pytest.raises(SystemExit) as left:
        aerial_masks(str(town / "images"), str(town / "all.gpkg"), str(town / "out"), workers=1, **options)
    assert left.value.code == 2 and len(caplog.records) == 1
    assert re.search(message, caplog.records[0].getMessage()) and not list(town.glob("out/*.tif"))


def test_no_images_or_no_labels(town):
    with pytest.raises(DataError, match="no such folder"):
        make_masks(town / "nothing", town / "all.gpkg", town / "out", progress=False)
    with pytest.raises(DataError, match="no such file, or nothing with the suffix .geojson"):
        make_masks(town / "images", town / "out", town / "out", progress=False)


def test_images_from_a_list_and_a_text_file(town):
    some = [town / "images" / f"tile{i}.tif" for i in (1, 4)]
    (town / "some.txt").write_text("\n".join(map(str, some)) + "\n\n")
    for images in (some, town / "some.txt", str(town / "images" / "tile[14].tif")):
        assert [j.image for j in plan_masks(images, town / "labels", town / "out")] == some


# Failures


def test_a_corrupt_image_in_the_middle_of_500(tmp_path, caplog):
    first = tile(tmp_path, 0, "t{:03}.tif")
    for i in range(1, 500):
        shutil.copy(first, first.with_name(f"t{i:03}.tif"))
    good = first.read_bytes()
    (tmp_path / "images" / "t250.tif").write_bytes(good[:-700])
    (tmp_path / "images" / "t251.tif").write_bytes(b"II*\0 is not enough")
    (tmp_path / "images" / "t252.tif").write_bytes(b"")
    houses(1).to_file(tmp_path / "all.geojson")
    with pytest.raises(SystemExit) as left, caplog.at_level("INFO"):
        aerial_masks(str(tmp_path / "images"), str(tmp_path / "all.geojson"), str(tmp_path / "out"), workers=2)
    assert left.value.code == 1
    table = pd.read_csv(tmp_path / "out" / "masks.csv").fillna({"reason": ""})
    assert table["status"].value_counts().to_dict() == {"made": 497, "failed": 3}
    failed = table[table["status"] == "failed"]
    assert failed.index.tolist() == [250, 251, 252]
    assert "t250.tif: truncated, its header speaks of more than its" in failed["reason"][250]
    assert all(f"t{i}.tif: a truncated or corrupt file" in failed["reason"][i] for i in (251, 252))
    assert sum("failed: " in r.getMessage() for r in caplog.records) == 3  # all of them, not the first
    assert "497 made, 0 kept, 3 failed of 500" in caplog.text
    assert len(times(tmp_path / "out")) == 497 and not leftovers(tmp_path)


def test_damage_inside_is_found_when_asked_for(town):
    file = town / "images" / "tile2.tif"
    data = bytearray(file.read_bytes())
    with rasterio.open(file) as d:
        start = int(d.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", bidx=1))
    data[start + 40 : start + 80] = bytes(40)
    file.write_bytes(data)
    assert (run(town)["status"] == "made").all()
    table = run(town, setup=Setup(decode=True))
    assert table["status"].tolist() == ["made"] * 2 + ["failed"] + ["made"] * 3
    assert "tile2.tif: a truncated or corrupt file" in table["reason"][2]
    assert table["reason"][2].endswith("; the mask that is there is from an earlier run")


def test_what_fails_is_named_and_the_rest_is_made(town):
    (town / "labels" / "tile0.geojson").unlink()
    (town / "labels" / "tile1.geojson").write_text("{")
    houses(6).iloc[[2]].set_geometry(houses(6).iloc[[2]].translate(50, 0)).to_file(town / "labels" / "tile2.geojson")
    shutil.copy(town / "labels" / "tile3.geojson", town / "labels" / "tile3_buildings.geojson")
    (town / "labels" / "tile3.geojson").rename(town / "labels" / "tile3_roads.geojson")
    table = run(town)
    assert table["status"].tolist() == ["failed"] * 4 + ["made"] * 2
    for reason, part in zip(table["reason"], ["no label named like it", "no readable vector layer", "km away",
                                              "several labels fit, tile3_buildings.geojson, tile3_roads.geojson; pass a pattern"]):
        assert part in reason
    assert (run(town, setup=Setup(allow_outside=True))["status"] == "failed").sum() == 3
    table = make_masks(town / "images", str(town / "labels" / "*_roads.geojson"), town / "roads", progress=False)
    assert table["status"].tolist() == ["failed"] * 3 + ["made"] + ["failed"] * 2


def test_an_image_beyond_a_layer_for_all_is_not_empty(town):
    tile(town, 400)
    tile(town, 500, nodata=0)
    table = run(town, "all.gpkg")
    assert (table["status"] == "failed").sum() == 2
    assert "tile400.tif: all 6 features of" in table["reason"][6] and "allow_outside=True" in table["reason"][6]
    table = run(town, "all.gpkg", setup=Setup(allow_outside=True))
    assert table["class_1"].fillna(0).tolist()[-2:] == [0, 0]


def test_masks_never_overwrite_images(town):
    with pytest.raises(DataError, match="would overwrite 6 of the images"):
        make_masks(town / "images", town / "labels", town / "images", progress=False)
    shutil.copy(town / "images" / "tile0.tif", town / "images" / "tile0.tiff")
    with pytest.raises(DataError, match="would share a mask: tile0.tif, tile0.tiff"):
        run(town)


def test_folders_of_images_keep_their_shape(town):
    for name in ("east", "west"):
        shutil.copytree(town / "images", town / "scenes" / name)
    table = make_masks(str(town / "scenes/**/*.tif"), town / "all.gpkg", town / "out", progress=False)
    assert len(table) == 12 and (town / "out" / "west" / "tile5.tif").is_file()


def test_a_read_only_output_folder(town, caplog):
    out = town / "readonly"
    out.mkdir()
    for folder in (town, *town.parents):  # another user must be able to come here
        if "pytest" in str(folder):
            folder.chmod(0o755)
    out.chmod(0o555)
    mine = os.geteuid()
    if mine == 0:
        os.seteuid(65534)  # for root nothing is read-only
    try:
        with pytest.raises(SystemExit) as left:
            aerial_masks(str(town / "images"), str(town / "labels"), str(out), workers=1)
    finally:
        os.seteuid(mine)
        out.chmod(0o755)
    assert left.value.code == 2 and not list(out.iterdir())
    assert "readonly: cannot write there (Permission denied); choose another folder, or make it writable" in caplog.text


def test_a_full_disk_leaves_no_half_file(tmp_path):
    "A limit on the size of files stands in for the disk: GDAL ignores the failed writes, the command does not."
    resource = pytest.importorskip("resource")
    tile(tmp_path, 0)
    write_raster(tmp_path / "images" / "large.tif", np.ones((1, 400, 400), "uint8"), **place(0))
    x, y = RNG.uniform(0, 200, (2, 3000))
    trees = gpd.GeoDataFrame(geometry=shapely.buffer(shapely.points(500_000 + x, 5_400_000 - y), 1), crs="EPSG:32633")
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))
        table = make_masks(tmp_path / "images", trees, tmp_path / "out", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert table["status"].tolist() == ["failed", "made"]
    assert "large.tif: could not be written whole: is the disk full?" in table["reason"][0]
    assert [p.name for p in (tmp_path / "out").glob("*.tif")] == ["tile0.tif"] and not leftovers(tmp_path)
    table = make_masks(tmp_path / "images", trees, tmp_path / "out", progress=False)
    assert table["status"].tolist() == ["made", "kept"]
    assert (tmp_path / "out" / "large.tif").stat().st_size > 6000


# Again


def test_finished_masks_are_kept(town):
    run(town)
    before = times(town / "out")
    table = run(town)
    assert (table["status"] == "kept").all() and times(town / "out") == before
    assert table["burned"].tolist() == [1] * 6  # the table is whole again, from the masks themselves
    moved = shutil.move(town, town.with_name("moved"))
    assert (run(Path(moved))["status"] == "kept").all()


def changed_labels(town):
    houses(6).iloc[[0, 2]].to_file(town / "labels" / "tile2.geojson")


def changed_image(town):
    tile(town, 2, nodata=255)


def damaged_mask(town):
    mask = town / "out" / "tile2.tif"
    mask.write_bytes(mask.read_bytes()[:-30])


def foreign_mask(town):
    write_raster(town / "out" / "tile2.tif", np.zeros((32, 32), "uint8"))


def no_mask(town):
    (town / "out" / "tile2.tif").unlink()


@pytest.mark.parametrize("change", [changed_labels, changed_image, damaged_mask, foreign_mask, no_mask])
def test_only_what_changed_is_made_again(town, change):
    run(town)
    change(town)
    assert run(town)["status"].tolist() == ["kept"] * 2 + ["made"] + ["kept"] * 3


def test_other_rules_make_other_masks(town):
    run(town, "all.gpkg")
    for rules in (Rules(all_touched=True), Rules("kind", {"roof": 1, "shed": 2}), Rules("kind", {"shed": 2, "roof": 1})):
        assert (run(town, "all.gpkg", setup=Setup(rules))["status"] == "made").all()
    assert (run(town, "all.gpkg", setup=Setup(rules, instances="uint16"))["status"] == "made").all()
    (town / "out" / "instances" / "tile4.tif").unlink()
    table = run(town, "all.gpkg", setup=Setup(rules, instances="uint16"))
    assert table["status"].tolist() == ["kept"] * 4 + ["made", "kept"]
    gpd.read_file(town / "all.gpkg").iloc[:5].to_file(town / "all.gpkg")
    assert (run(town, "all.gpkg", setup=Setup(rules))["status"] != "kept").all()


def test_a_table_in_memory_is_known_by_its_content(town):
    table = houses(6)
    for labels, status in ((table, "made"), (table.copy(), "kept"), (table.assign(kind="x"), "made")):
        got = make_masks(town / "images", labels, town / "out", progress=False)
        assert (got["status"] == status).all()


def test_the_same_command_after_a_kill(tmp_path):
    first = tile(tmp_path, 0, "t{:03}.tif")
    for i in range(1, 100):
        shutil.copy(first, first.with_name(f"t{i:03}.tif"))
    houses(1).to_file(tmp_path / "all.geojson")
    arguments = [str(tmp_path / p) for p in ("images", "all.geojson", "out")]
    code = f"from aerial_nb.data.maskfiles import aerial_masks; aerial_masks(*{arguments}, workers=2)"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[1])
    out, end = tmp_path / "out", time.monotonic() + 60
    while len(list(out.glob("*.tif"))) < 5 and time.monotonic() < end:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = times(out)
    assert 5 <= len(before) < 100 and not (out / "masks.csv").exists()
    (out / ".t099.tif.0123abcd.part").write_bytes(b"half")  # as a kill leaves it
    expected = class_map(first, tmp_path / "all.geojson")[0]
    for file in out.glob("*.tif"):
        assert (read_class_map(file) == expected).all()
    aerial_masks(*arguments, workers=1)
    after = times(out)
    assert len(after) == 100 and before.items() <= after.items() and not leftovers(out)
    table = pd.read_csv(out / "masks.csv")
    assert table["status"].value_counts().to_dict() == {"made": 100 - len(before), "kept": len(before)}


def test_two_runs_into_one_folder(town, monkeypatch):
    inside, go = threading.Event(), threading.Event()
    make = maskfiles.make_mask

    def slow(*arguments):
        inside.set()
        go.wait(20)
        return make(*arguments)

    monkeypatch.setattr(maskfiles, "make_mask", slow)
    first = threading.Thread(target=run, args=[town])
    first.start()
    assert inside.wait(20)
    with pytest.raises(DataError, match="another aerial_masks is writing there"):
        run(town)
    go.set()
    first.join()
    assert len(times(town / "out")) == 6 and (run(town)["status"] == "kept").all()


def test_an_interrupted_run_leaves_its_table(town, monkeypatch):
    make, calls = maskfiles.make_mask, []

    def interrupted(job, *rest):
        calls.append(job)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return make(job, *rest)

    monkeypatch.setattr(maskfiles, "make_mask", interrupted)
    with pytest.raises(SystemExit) as left:
        aerial_masks(str(town / "images"), str(town / "labels"), str(town / "out"), workers=1)
    assert left.value.code == 130 and len(pd.read_csv(town / "out" / "masks.csv")) == 2


# Large and unusual


@pytest.mark.parametrize("nodata", [None, 0])
def test_strips_give_the_same_file(tmp_path, monkeypatch, nodata):
    image = RNG.integers(0, 3, (1, 700, 300)).astype("uint8")
    file = write_raster(tmp_path / "images" / "a.tif", image, nodata=nodata, **place(0))
    labels = gpd.GeoDataFrame(geometry=[shapely.Point(500_080, 5_399_820).buffer(60).difference(
        shapely.Point(500_070, 5_399_800).buffer(20))], crs=32633)
    setup = Setup(Rules(border_m=1), instances="uint32")
    make_masks(file, labels, tmp_path / "whole", setup, progress=False)
    monkeypatch.setattr(maskfiles, "_STRIP", 300 * 256)
    drawn = []
    monkeypatch.setattr(maskfiles.Shapes, "draw", (lambda plain: lambda s, row=0, rows=None, ids=False: (
        drawn.append(rows), plain(s, row, rows, ids))[1])(maskfiles.Shapes.draw))
    make_masks(file, labels, tmp_path / "strips", setup, progress=False)
    assert drawn == [256, 256, 188] * 2
    for name in ("a.tif", "instances/a.tif"):
        one, two = (rasterio.open(tmp_path / k / name).read(1) for k in ("whole", "strips"))
        assert (one == two).all() and one.any()


def test_one_table_in_pixels_for_all_images(tmp_path):
    for i in range(3):
        write_raster(tmp_path / "images" / f"PAN_img{i}.png", RNG.integers(1, 255, (32, 32)).astype("uint8"))
    square = "POLYGON (({0} {0} 0, {0} 20 0, 20 20 0, 20 {0} 0, {0} {0} 0))"
    rows = [("img0", square.format(4)), ("img0", square.format(30)), ("img1", "POLYGON EMPTY")]
    pd.DataFrame(rows, columns=["ImageId", "PolygonWKT_Pix"]).to_csv(tmp_path / "all.csv", index=False)
    table = run(tmp_path, "all.csv", setup=Setup(image_column="ImageId"))
    assert table["status"].tolist() == ["made", "made", "failed"] and table["class_1"].fillna(0).tolist() == [356, 0, 0]
    assert table["empty"].tolist()[:2] == [0, 1] and "no row with 'PAN_img2'" in table["reason"][2]


def test_usable_data_masks_pair_by_name(town):
    cloud = np.zeros((32, 32), "uint8")
    cloud[:4] = 1
    for i in range(5):
        write_raster(town / "udm" / f"tile{i}_UDM.tif", cloud, **place(i))
    table = run(town, udm=town / "udm")
    assert table["status"].tolist() == ["made"] * 5 + ["failed"] and "no udm named like it" in table["reason"][5]
    assert table["class_255"].tolist()[:5] == [128] * 5


def test_what_the_mask_says_of_itself(town):
    run(town, "all.gpkg", setup=Setup(Rules("kind", {"roof": 1, "shed": 2})))
    with rasterio.open(town / "out" / "tile0.tif") as d:
        tags = d.tags()
    assert tags["AERIAL_CLASS_MAP"] == "0 background; 1 roof; 2 shed; 255 ignored"
    assert json.loads(tags["AERIAL_MASK_REPORT"])["burned"] == 1
    assert not any(str(town) in v for v in tags.values())


def test_real_roofs(tmp_path):
    folder = REAL / "roofs" / "oam_1024"
    if not folder.exists():
        pytest.skip("the real data roofs/oam_1024 is not on this machine")
    names = [f.stem for f in sorted((folder / "images").glob("*.tif"))[::4]]
    images = [folder / "images" / f"{n}.tif" for n in names]
    table = make_masks(images, folder / "labels", tmp_path, progress=False, workers=2)
    assert (table["status"] == "made").all()
    for name, image in zip(names, images):
        made, stored = read_class_map(tmp_path / f"{name}.tif"), read_class_map(folder / "masks" / f"{name}.tif")
        with rasterio.open(image) as d:
            valid = d.dataset_mask() > 0
        assert (made[valid] == stored[valid]).all() and (made[~valid] == 255).all()

"Windows of a table, tile files, and the command aerial_tiles."
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
from affine import Affine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio.enums import ColorInterp
from rasterio.transform import from_origin
from rasterio.windows import Window

from aerial_nb.data import cut
from aerial_nb.data.catalog import samples_from
from aerial_nb.data.checks import validate_samples
from aerial_nb.data.cut import aerial_tiles, cut_tiles, read_tiles
from aerial_nb.data.grid import grid_windows, put_back
from aerial_nb.data.masks import read_class_map
from aerial_nb.data.raster import DataError, read_pixels, write_raster
from aerial_nb.data.tiles import TileStore
from aerial_nb.data.windows import Cutting, drop_windows, label_meaning, open_sheet, window_table

REAL = Path(__file__).parents[1] / "../shared/data"
UTM = {"crs": "EPSG:32633", "transform": from_origin(5e5, 5e6, 0.5, 0.5)}
COMMAND = [str(Path(sys.executable).parent / "aerial_tiles")]


def draw(folder, name, shape=(100, 130), seed=0, share=0.1, bands=3, dtype="uint8", **place):
    "An image and its mask; the left half of the mask is empty."
    rng = np.random.default_rng(seed)
    image = rng.integers(1, 250, (bands, *shape)).astype(dtype)
    mask = (rng.random(shape) < share).astype("uint8")
    mask[:, : shape[1] // 2] = 0
    where = UTM | place
    return {"image": str(write_raster(folder / "images" / f"{name}.tif", image, where["crs"], where["transform"])),
            "label": str(write_raster(folder / "masks" / f"{name}.tif", mask, where["crs"], where["transform"])),
            "scene": name, "split": "train", "gsd_m": 0.5, "valid": "", "fill": None}


def quiet(rows, out, *arguments, **options):
    return cut_tiles(pd.DataFrame(rows), out, *arguments, progress=False, **options)


def files(out):
    return sorted(p.relative_to(out).as_posix() for p in out.rglob("*.tif"))


def code(*arguments, **options):
    with pytest.raises(SystemExit) as end: aerial_tiles(*map(str, arguments), **options)
    return end.value.code


# ---- windows of a table

def test_a_table_of_windows_keeps_scene_and_split(tmp_path):
    rows = [draw(tmp_path, "a"), draw(tmp_path, "b", (30, 300)) | {"split": "test"}]
    table = window_table(pd.DataFrame(rows, index=[7, 3]), Cutting(64, 8))
    for row in rows:
        mine = table[table["scene"] == row["scene"]]
        shape = read_pixels(row["image"]).shape
        assert mine[["row", "col", "height", "width"]].to_numpy().tolist() == [list(w) for w in grid_windows(shape, 64, 8).tolist()]
        assert set(mine["split"]) == {row["split"]} and set(mine["image"]) == {row["image"]}
    (tmp_path / "images/a.tif").write_bytes(b"no")
    with pytest.raises(DataError, match="1 of 2 images cannot be opened(?s:.*)a.tif"):
        window_table(pd.DataFrame(rows), Cutting(64))
    with pytest.raises(DataError, match="empty"):
        window_table(pd.DataFrame(rows[:0], columns=["image"]), Cutting(64))


def test_the_rule_drops_from_training_only_and_says_how_many(caplog):
    table = pd.DataFrame(dict(split=["train"] * 4 + ["valid", "test", ""], valid_share=[0, 0.3, 1, 1, 0, 1, 0],
                              positive_share=[0, 0.5, 0, np.nan, 0, 0, 0]))
    kept = {rule: drop_windows(table, Cutting(drop=rule, min_valid=least)).shape[0]
            for rule, least in (("none", 1), ("blank", 0), ("empty", 0))}
    assert kept == {"none": 7, "blank": 6, "empty": 5}
    assert len(drop_windows(table, Cutting(drop="empty", min_valid=0.5))) == 4
    with caplog.at_level("INFO"): drop_windows(table, Cutting(drop="empty", min_valid=0.5))
    assert "of 4 training windows 2 dropped as blank (less than 50% valid), 1 as empty" in caplog.text


@pytest.mark.parametrize("wrong", [dict(size=0), dict(size="8"), dict(overlap=600), dict(edge="pad"), dict(drop="all"), dict(min_valid=2)])
def test_impossible_cuttings_are_refused(wrong):
    with pytest.raises(DataError):
        Cutting(**wrong)


LABELS = {"0/1": ([0, 1], None, {}), "0/255": ([0, 255], None, {}), "noise": ([0, 3, 250, 255], None, {}), "nodata 255": ([0, 1, 255], 255, {}),
          "positive": ([0, 3, 7], None, {"positive": 3}), "classes": ([5, 7, 9], None, {"classes": {5: 0, 7: 2, 9: 255}}), "zeros": ([0], None, {}),
          "16 bit": ([0, 65535], None, {}), "16 bit classes": ([0, 300, 700], None, {"positive": [300, 700]})}


@pytest.mark.parametrize("name", LABELS)
def test_windows_of_a_label_mean_what_the_whole_means(tmp_path, name):
    values, nodata, options = LABELS[name]
    stored = np.random.default_rng(0).choice(values, (90, 700)).astype("uint16" if "16" in name else "uint8")
    path = write_raster(tmp_path / "m.tif", stored, nodata=nodata)
    meaning, whole = label_meaning(path, options), read_class_map(path, **options)
    np.testing.assert_array_equal(meaning.read(stored[None, 10:50, 600:]), whole[10:50, 600:])
    np.testing.assert_array_equal(meaning.read(np.full((1, 4, 4), values[-1], stored.dtype)), whole[stored == values[-1]][0])


def test_labels_in_colour_and_labels_that_are_none(tmp_path):
    colours = np.random.default_rng(0).choice([0, 255], (3, 40, 40)).astype("uint8")
    path = write_raster(tmp_path / "c.tif", colours)
    meaning = label_meaning(path, {"positive": (255, 0, 0)})
    np.testing.assert_array_equal(meaning.read(colours), read_class_map(path, positive=(255, 0, 0)))
    photo = write_raster(tmp_path / "p.tif", np.random.default_rng(0).integers(0, 255, (3, 90, 90), dtype="uint8"))
    with pytest.raises(DataError, match="p.tif: 8...? different values.*is this an image"): label_meaning(photo)
    with pytest.raises(DataError, match="p.tif: 4 bands|4 bands of uint8"): label_meaning(write_raster(tmp_path / "p.tif", np.ones((4, 9, 9), "uint8")))
    with pytest.raises(DataError, match="c.tif: a mask in colours"): label_meaning(path)
    with pytest.raises(DataError, match="d.tif: a mask with the values 0, 40"): label_meaning(write_raster(tmp_path / "d.tif", np.eye(9, dtype="uint8") * 40))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["plain", "nodata", "fill", "picture", "mask", "alpha", "float"]), st.integers(0, 99))
def test_windows_are_valid_where_the_whole_is(tmp_path, kind, seed):
    rng = np.random.default_rng(seed)
    image, hole = rng.integers(1, 250, (3, 80, 90)).astype("float32" if kind == "float" else "uint8"), rng.random((80, 90)) < 0.3
    row = {"image": str(tmp_path / "v.tif"), "fill": (9, 9, 9) if kind == "fill" else None}
    if kind in ("nodata", "fill"): image[:, hole] = 9
    if kind == "float": image[1, hole] = np.nan
    if kind == "alpha":
        with rasterio.open(row["image"], "w", driver="GTiff", height=80, width=90, count=4, dtype="uint8", photometric="rgb", alpha="yes", **UTM) as out:
            out.write(np.concatenate([image, 255 * ~hole[None]]).astype("uint8"))
    else: write_raster(row["image"], image, **UTM, nodata=9 if kind == "nodata" else None, valid=~hole if kind == "mask" else None)
    if kind == "picture": row["valid"] = str(write_raster(tmp_path / "p.png", (~hole * 255).astype("uint8")))
    whole = read_pixels(row["image"], fill=row["fill"], valid_path=row.get("valid")).valid
    assert (whole == (~hole if kind != "plain" else True)).all()
    with open_sheet(row) as sheet:
        for r, c, h, w in grid_windows((80, 90), 37, 5):
            piece = sheet.read((r, c, h, w))
            np.testing.assert_array_equal(piece.valid, whole[r:r + h, c:c + w])
            assert piece.valid_share == whole[r:r + h, c:c + w].mean() and np.isnan(piece.positive_share)


def test_shares_count_what_can_teach(tmp_path):
    row = draw(tmp_path, "a", (10, 10), share=0)
    image, mask = read_pixels(row["image"]).data, np.zeros((10, 10), "uint8")
    image[:, :5], mask[0], mask[9], mask[8] = 0, 1, 1, 255   # half is blank; one road there, one outside; a row unknown
    write_raster(row["image"], image, **UTM, nodata=0)
    write_raster(row["label"], mask, **UTM, nodata=255)
    with open_sheet(row) as sheet: piece = sheet.read((0, 0, 10, 10))
    assert (piece.valid_share, piece.counted_px, piece.positive_px, piece.positive_share) == (0.5, 40, 10, 0.25)


def test_labels_of_another_size_or_place_are_refused(tmp_path):
    row, other = draw(tmp_path, "a"), draw(tmp_path, "b", (100, 131))
    far = draw(tmp_path, "far", transform=from_origin(5e5 + 1, 5e6, 0.5, 0.5))
    zone, close = draw(tmp_path, "zone", crs="EPSG:32634"), draw(tmp_path, "close", transform=from_origin(5e5 + 0.1, 5e6, 0.5, 0.5))
    bare = write_raster(tmp_path / "bare.png", np.zeros((100, 130), "uint8"))
    for label, message in ((other, "100 x 131 pixels for an image of 100 x 130"), (far, "lies elsewhere"), (zone, "EPSG:32634 and EPSG:32633")):
        made = quiet([row | {"label": label["label"]}], tmp_path / "t")
        assert message in made.failures["a"] and not files(tmp_path / "t") and len(made.tiles) == 0
    for label in (close["label"], bare):
        assert not quiet([row | {"label": label}], tmp_path / Path(label).stem).failures


# ---- tile files

KINDS = {"rgb": dict(count=3, dtype="uint8", photometric="rgb"), "rgba": dict(count=4, dtype="uint8", photometric="rgb", alpha="yes"),
         "grey": dict(count=1, dtype="uint16", nodata=65535), "four bands": dict(count=4, dtype="uint8", photometric="minisblack", alpha="no"),
         "float": dict(count=2, dtype="float32", nodata=float("nan")), "int16": dict(count=13, dtype="int16", nodata=-9999),
         "palette": dict(count=1, dtype="uint8", photometric="palette"), "rotated": dict(count=1, dtype="uint8", transform=Affine(0.4, 0.3, 5e5, 0.3, -0.4, 5e6)),
         "no place": dict(count=3, dtype="uint8", crs=None, transform=None), "grey and alpha": dict(count=2, dtype="uint8", alpha="yes")}


@pytest.mark.parametrize("kind, compress", [(kind, "deflate") for kind in KINDS] + [("float", "zstd"), ("rgb", "lzw"), ("int16", "none")])
@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_a_tile_says_what_its_image_said(tmp_path, kind, compress):
    how, path = UTM | KINDS[kind], tmp_path / "a.tif"
    data = np.random.default_rng(0).integers(0, 200, (how["count"], 70, 90)).astype(how["dtype"])
    with rasterio.open(path, "w", driver="GTiff", height=70, width=90, **{k: v for k, v in how.items() if v is not None}) as out:
        out.write(data)
        if kind == "palette": out.write_colormap(1, {i: (i, 255 - i, 7, 255) for i in range(256)})
        if kind == "int16": out.descriptions, out.scales, out.offsets = [f"B{i}" for i in range(13)], [1e-4] * 13, [0.5] * 13
    made = quiet([{"image": path}], tmp_path / "t", Cutting(40, 4), compress)
    assert len(made.tiles) == 6 and not made.failures
    with rasterio.open(path) as source:
        for tile in read_tiles(tmp_path / "t").itertuples():
            window = Window(tile.col, tile.row, tile.width, tile.height)
            with rasterio.open(tile.image) as d:
                np.testing.assert_array_equal(d.read(), source.read(window=window))
                assert d.crs == source.crs
                assert d.transform.is_identity if kind == "no place" else d.transform.almost_equals(source.window_transform(window))
                assert d.nodata == source.nodata or np.isnan([d.nodata, source.nodata]).all()
                for name in ("dtypes", "colorinterp", "descriptions", "scales", "offsets", "mask_flag_enums"): assert getattr(d, name) == getattr(source, name)
                if kind == "palette": assert d.colormap(1) == source.colormap(1)
                assert (d.compression.name if d.compression else "none") == compress


def test_a_mask_band_is_kept(tmp_path):
    valid = np.random.default_rng(0).random((60, 60)) < 0.5
    path = write_raster(tmp_path / "a.tif", np.ones((3, 60, 60), "uint8"), **UTM, valid=valid)
    quiet([{"image": path}], tmp_path / "t", Cutting(25))
    for tile in read_tiles(tmp_path / "t").itertuples():
        np.testing.assert_array_equal(read_pixels(tile.image).valid, valid[tile.row:tile.row + 25, tile.col:tile.col + 25])
        assert tile.valid_share == pytest.approx(valid[tile.row:tile.row + 25, tile.col:tile.col + 25].mean())
    assert not list((tmp_path / "t").rglob("*.msk"))


def test_near_infrared_that_is_tagged_stays_tagged(tmp_path):
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", height=40, width=40, count=4, dtype="uint16", photometric="rgb", alpha="no", **UTM) as out:
        out.write(np.ones((4, 40, 40), "uint16"))
    quiet([{"image": tmp_path / "a.tif"}], tmp_path / "t", Cutting(32))
    with rasterio.open(read_tiles(tmp_path / "t").image[0]) as d: assert d.colorinterp[3] == ColorInterp.undefined


# ---- a folder of tiles

@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 90), st.integers(1, 90), st.integers(15, 60), st.sampled_from(["shift", "cut"]), st.data())
def test_tiles_put_back_are_the_image(tmp_path_factory, rows, cols, size, edge, data):
    overlap, folder = data.draw(st.integers(0, size // 2)), tmp_path_factory.mktemp("back")
    row = draw(folder, "a", (rows, cols), dtype="uint16")
    quiet([row], folder / "t", Cutting(size, overlap, edge), "none", workers=1)
    tiles, windows = read_tiles(folder / "t"), grid_windows((rows, cols), size, overlap, edge)
    assert tiles[["row", "col", "height", "width"]].to_numpy().tolist() == [list(w) for w in windows.tolist()]
    for column, layers in (("image", slice(None)), ("label", 0)):
        back = put_back((read_pixels(p).data[layers] for p in tiles[column]), windows, (rows, cols))
        np.testing.assert_array_equal(back, read_pixels(row[column]).data[layers])


def test_the_table_is_a_samples_table(tmp_path):
    rows = [draw(tmp_path, "a"), draw(tmp_path, "b", seed=1, transform=from_origin(6e5, 5e6, 0.5, 0.5)) | {"split": "test"}]
    made = quiet(rows, tmp_path / "t", Cutting(64), "zstd")
    tiles = read_tiles(tmp_path / "t")
    assert len(tiles) == len(made.tiles) == 12 and not len(validate_samples(tiles).query("severity == 'fault'"))
    assert tiles.groupby("scene")["split"].first().to_dict() == {"a": "train", "b": "test"}
    store = TileStore(tiles, cache=tmp_path / "cache", progress=False)
    np.testing.assert_allclose(store.table()["positive"], tiles["positive_share"])
    place = json.loads(tiles["transform"][5])
    assert tuple(read_pixels(tiles["image"][5]).transform)[:6] == tuple(place) and set(tiles["crs"]) == {"EPSG:32633"}
    assert not Path(made.tiles["image"][0]).is_absolute()


def test_fill_and_valid_pictures_come_along(tmp_path):
    row = draw(tmp_path, "a")
    picture = np.zeros((100, 130), "uint8")
    picture[:, 70:] = 255
    row |= {"valid": str(write_raster(tmp_path / "valid/a.png", picture)), "fill": (255, 255, 255)}
    for suffix in ("parquet", "csv"):
        quiet([row], tmp_path / suffix, Cutting(64, drop="blank"), suffix=suffix)
        tiles = read_tiles(tmp_path / suffix)
        assert sorted(set(tiles["col"])) == [64, 66] and len(tiles) == 4   # the left tiles are blank
        assert tiles["fill"][0] == (255, 255, 255) and tiles["gsd_m"][0] == 0.5 and tiles["scene"][0] == "a"
        for tile in tiles.itertuples():
            whole = read_pixels(tile.image, fill=tile.fill, valid_path=tile.valid).valid
            assert whole.mean() == pytest.approx(tile.valid_share)
    assert not (tmp_path / "csv/tiles.parquet").exists()


def test_only_training_loses_its_empty_tiles(tmp_path, caplog):
    rows = [draw(tmp_path, "a"), draw(tmp_path, "b") | {"split": "valid"}, draw(tmp_path, "c") | {"split": ""}]
    with caplog.at_level("INFO"): made = quiet(rows, tmp_path / "t", Cutting(50, drop="empty"))
    assert made.tiles.groupby("scene").size().to_dict() == {"a": 4, "b": 6, "c": 6} and made.dropped == {"empty": 2}
    assert "of 6 training windows 0 dropped as blank, 2 as empty" in caplog.text
    assert len(files(tmp_path / "t")) == 32
    assert quiet(rows, tmp_path / "t", Cutting(50, drop="empty")).dropped == {"empty": 2}   # and remembered


def test_described_only(tmp_path):
    rows = [draw(tmp_path, "a"), draw(tmp_path, "b")]
    written, described = quiet(rows, tmp_path / "t", Cutting(50, drop="empty")), quiet(rows, tmp_path / "d", Cutting(50, drop="empty"), None)
    same = ["scene", "split", "row", "col", "height", "width", "valid_share", "positive_share", "transform", "crs", "source"]
    pd.testing.assert_frame_equal(written.tiles[same], described.tiles[same])
    assert set(described.tiles["image"]) == {row["image"] for row in rows} and not files(tmp_path / "d")
    tile = read_tiles(tmp_path / "d").iloc[3]
    part = read_pixels(tile.image, (tile.row, tile.col, tile.height, tile.width))
    np.testing.assert_array_equal(part.data, read_pixels(tmp_path / "t" / written.tiles["image"][3]).data)


def test_one_worker_or_many(tmp_path, monkeypatch):
    monkeypatch.setattr(cut, "RUN", 3)
    rows = [draw(tmp_path, name, seed=i) for i, name in enumerate("abc")]
    one, many = (quiet(rows, tmp_path / str(n), Cutting(40, 5), workers=n) for n in (1, 6))
    pd.testing.assert_frame_equal(one.tiles, many.tiles)
    for name in files(tmp_path / "1"): assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "6" / name).read_bytes()


# ---- stopped, and again

def test_finished_tiles_are_kept_and_missing_ones_cut(tmp_path):
    rows, out = [draw(tmp_path, "a"), draw(tmp_path, "b", seed=1)], tmp_path / "t"
    first = quiet(rows, out, Cutting(50))
    stamps = {name: (out / name).stat().st_mtime_ns for name in files(out)}
    (out / files(out)[3]).unlink()
    (out / files(out)[8]).write_bytes(b"short")
    again = quiet(rows, out, Cutting(50))
    pd.testing.assert_frame_equal(first.tiles, again.tiles)
    changed = [name for name in files(out) if (out / name).stat().st_mtime_ns != stamps[name]]
    assert len(files(out)) == len(stamps) and len(changed) in (2, 4) and again.earlier == 10  # an image and its label go together


def test_another_image_under_the_same_name_is_cut_again(tmp_path):
    row, out = draw(tmp_path, "a", (100, 200)), tmp_path / "t"
    quiet([row], out, Cutting(50))
    row = draw(tmp_path, "a", (100, 90), seed=5)
    made = quiet([row], out, Cutting(50))
    assert made.earlier == 0 and len(made.tiles) == 4 and len(files(out)) == 8   # those of the larger image are gone
    np.testing.assert_array_equal(read_pixels(out / made.tiles["image"][0]).data, read_pixels(row["image"]).data[:, :50, :50])


def test_another_split_drops_and_brings_back(tmp_path):
    row, out, rule = draw(tmp_path, "a"), tmp_path / "t", Cutting(50, drop="empty")
    other, rest = row | {"split": "test"}, draw(tmp_path, "b")
    for first, tiles in ((other, 6), (row, 4), (other, 6)):
        made = quiet([first, rest], out, rule)
        assert (made.tiles["scene"] == "a").sum() == tiles and len([f for f in files(out) if "/a_" in f]) == 2 * tiles
        assert made.earlier in (0, 10)


def test_another_cutting_needs_another_folder(tmp_path):
    row, out = draw(tmp_path, "a"), tmp_path / "t"
    quiet([row], out, Cutting(50))
    for wrong in (dict(cutting=Cutting(64)), dict(cutting=Cutting(50), compress="zstd"), dict(cutting=Cutting(50, labels={"positive": 1}))):
        with pytest.raises(DataError, match="holds tiles cut with .*now"): quiet([row], out, **wrong)
    assert len(files(out)) == 12


def test_a_full_disk_ends_the_work_and_the_next_command_goes_on(tmp_path, monkeypatch):
    rows, out, real = [draw(tmp_path, n, seed=i) for i, n in enumerate("abc")], tmp_path / "t", cut.write_tile
    calls = iter(range(9))
    def full(*arguments):
        if next(calls, None) is None: raise OSError(28, "No space left on device", "tile")
        return real(*arguments)
    monkeypatch.setattr(cut, "write_tile", full)
    with pytest.raises(OSError, match="No space left"): quiet(rows, out, Cutting(50))
    assert code(tmp_path / "images", out, labels=str(tmp_path / "masks"), size=50) == 3
    monkeypatch.setattr(cut, "write_tile", real)
    made = quiet(rows, out, Cutting(50))
    assert 0 < made.earlier < 9 and len(made.tiles) == 18 and not list(out.rglob("*.part"))
    assert len(quiet(rows, tmp_path / "whole", Cutting(50)).tiles) == 18
    for name in files(out): assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_kill_in_the_middle_then_the_same_command(tmp_path, caplog):
    for i in range(2): draw(tmp_path, f"image{i}", (500, 500), seed=i)
    out, arguments = tmp_path / "t", [str(tmp_path / "images"), str(tmp_path / "t"), "--labels", str(tmp_path / "masks"), "--size", "40", "--workers", "2"]
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(files(out)) < 60 and process.poll() is None: time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    stamps = {name: (out / name).stat().st_mtime_ns for name in files(out)}
    for name in stamps: read_pixels(out / name)                      # whole, all of them
    assert 60 <= len(stamps) < 2 * 169 * 2 and not (out / "tiles.parquet").exists()
    with caplog.at_level("INFO"): assert code(*arguments[:2], labels=arguments[3], size=40, workers=2) == 0
    assert "338 tiles of 2 images" in caplog.text
    changed = [name for name in stamps if (out / name).stat().st_mtime_ns != stamps[name]]
    assert len(changed) <= 4 and len(files(out)) == 676             # two threads, a tile and its label each
    assert not list(out.rglob("*.part"))
    tiles = read_tiles(out)
    for at in (0, 150, 337):
        row, col = tiles["row"][at], tiles["col"][at]
        np.testing.assert_array_equal(read_pixels(tiles["image"][at]).data, read_pixels(tiles["source"][at], (row, col, 40, 40)).data)


def test_an_interrupt_ends_quickly_and_passes_through(tmp_path, monkeypatch):
    rows = [draw(tmp_path, n, seed=i) for i, n in enumerate("abc")]
    def interrupted(*arguments): raise KeyboardInterrupt
    monkeypatch.setattr(cut, "write_tile", interrupted)
    with pytest.raises(KeyboardInterrupt): quiet(rows, tmp_path / "t", Cutting(50))
    assert code(tmp_path / "images", tmp_path / "t2", size=50) == 130


def test_two_commands_do_not_mix(tmp_path, monkeypatch):
    row, out, entered, leave = draw(tmp_path, "a"), tmp_path / "t", threading.Event(), threading.Event()
    real = cut.cut_windows
    def slow(*arguments): entered.set(); leave.wait(20); return real(*arguments)
    monkeypatch.setattr(cut, "cut_windows", slow)
    first = threading.Thread(target=quiet, args=([row], out, Cutting(50)))
    first.start()
    assert entered.wait(20)
    try:
        with pytest.raises(DataError, match="another command is cutting"): quiet([row], out, Cutting(50))
    finally: leave.set(); first.join()
    assert len(files(out)) == 12


# ---- bad input

def test_a_corrupt_file_in_the_middle_of_many(tmp_path, caplog):
    for i in range(12): draw(tmp_path, f"i{i:02}", (60, 60), seed=i)
    whole = draw(tmp_path, "i04", (400, 400))
    content = Path(whole["image"]).read_bytes()
    Path(whole["image"]).write_bytes(content[:len(content) // 2])   # breaks after some tiles have been cut
    (tmp_path / "images/i08.tif").write_bytes(b"II*\0")
    write_raster(tmp_path / "masks/i10.tif", np.eye(60, dtype="uint8") * 40, **UTM)
    out = tmp_path / "t"
    assert code(tmp_path / "images", out, labels=str(tmp_path / "masks"), size=50) == 1
    listed = [line for line in caplog.text.splitlines() if line.startswith("- ")]
    assert "3 of 12 images failed" in caplog.text and [line[2:5] for line in listed] == ["i04", "i08", "i10"]
    assert "truncated or corrupt in rows" in listed[0] and "neither 0/1 nor 0/255" in listed[2]
    tiles = read_tiles(out)
    assert len(tiles) == 9 * 4 and len(files(out)) == 9 * 8 and not any(n in f for f in files(out) for n in ("i04", "i08", "i10"))
    draw(tmp_path, "i04", (400, 400)), draw(tmp_path, "i08", (60, 60)), draw(tmp_path, "i10", (60, 60))
    assert code(tmp_path / "images", out, labels=str(tmp_path / "masks"), size=50) == 0
    assert len(read_tiles(out)) == 11 * 4 + 64


def test_names_that_clash_and_rules_without_rows(tmp_path):
    rows = [draw(tmp_path / "x", "a"), draw(tmp_path / "y", "A")]
    with pytest.raises(DataError, match="1 names belong to more than one image.*: a"): quiet(rows, tmp_path / "t")
    with pytest.raises(DataError, match="no image is in it"): quiet([rows[0] | {"split": "test"}], tmp_path / "t", Cutting(drop="blank"))
    with pytest.raises(DataError, match="no training image has a label"): quiet([rows[0] | {"label": ""}], tmp_path / "t", Cutting(drop="empty"))
    with pytest.raises(DataError, match="table is empty"): cut_tiles(pd.DataFrame(columns=["image"]), tmp_path / "t")
    with pytest.raises(DataError, match="compress must be"): quiet(rows[:1], tmp_path / "t", compress="jpeg")
    with pytest.raises(DataError, match="parquet or csv"): quiet(rows[:1], tmp_path / "t", suffix="xlsx")
    with pytest.raises(DataError, match="no tiles.parquet"): read_tiles(tmp_path / "t")
    assert not (tmp_path / "t").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_read_only_folder(tmp_path):
    row = draw(tmp_path, "a")
    (tmp_path / "t").mkdir(mode=0o555)
    with pytest.raises(DataError, match="cannot write here"): quiet([row], tmp_path / "t")


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, caplog):
    row = draw(tmp_path, "a")
    with pytest.raises(DataError, match="a.tif: cannot write here .*choose another folder"): quiet([row], Path(row["image"]))
    def refuse(self, *arguments, **options): raise PermissionError(30, "Read-only file system", str(self))
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert code(tmp_path / "images", tmp_path / "t") == 2
    assert "cannot write here (Read-only file system)" in caplog.text


@pytest.mark.parametrize("wrong", [dict(images="nowhere"), dict(images="none.csv"), dict(labels="nowhere"), dict(size=0), dict(overlap=512), dict(split="tests"),
                                   dict(fill="white"), dict(drop="all"), dict(edge="pad"), dict(compress="jpeg"), dict(table="xls"), dict(positive="road")])
def test_a_wrong_command_starts_nothing(tmp_path, wrong, caplog):
    draw(tmp_path, "a")
    assert code(tmp_path / wrong.pop("images", "images"), tmp_path / "t", **wrong) == 2
    assert len(caplog.records) == 1 and not (tmp_path / "t").exists()


# ---- the command

def test_the_command_from_folders(tmp_path):
    for name in "abc": draw(tmp_path, name)
    arguments = dict(labels=str(tmp_path / "masks"), size=50, overlap=10, split="train", drop="empty", compress="zstd", table="csv", fill="9,9,9", workers=2)
    assert code(tmp_path / "images", tmp_path / "t", **arguments) == 0
    tiles = read_tiles(tmp_path / "t")
    assert set(tiles["split"]) == {"train"} and set(tiles["fill"]) == {(9, 9, 9)} and (tiles["positive_share"] > 0).all()
    assert (tmp_path / "t/tiles.csv").is_file() and code(tmp_path / "images", tmp_path / "t", **arguments) == 0


def test_the_command_from_a_table_beside_the_files(tmp_path):
    rows = [draw(tmp_path, "a"), draw(tmp_path, "b") | {"split": "test"}]
    table = samples_from(tmp_path / "images", tmp_path / "masks").assign(split=["train", "test"], scene=["01", "02"])
    table[["image", "label"]] = table[["image", "label"]].map(lambda p: str(Path(p).relative_to(tmp_path)))
    table.to_csv(tmp_path / "samples.csv", index=False)
    assert code(tmp_path / "samples.csv", tmp_path / "t", size=50, drop="empty") == 0
    tiles = read_tiles(tmp_path / "t")
    assert tiles.groupby("scene")["split"].first().to_dict() == {"01": "train", "02": "test"} and len(tiles) == 10
    assert code(tmp_path / "samples.csv", tmp_path / "d", size=50, describe=True) == 0 and not files(tmp_path / "d")
    table.drop(columns="image").to_csv(tmp_path / "samples.csv", index=False)
    assert code(tmp_path / "samples.csv", tmp_path / "e") == 2 and len(rows) == 2


def test_labels_by_value(tmp_path):
    row = draw(tmp_path, "a")
    codes = np.full((100, 130), 2, "uint8")
    codes[:50, 65:] = 7
    write_raster(row["label"], codes, **UTM)
    assert code(tmp_path / "images", tmp_path / "t", labels=str(tmp_path / "masks"), size=50) == 1   # neither 0/1 nor 0/255
    assert code(tmp_path / "images", tmp_path / "t", labels=str(tmp_path / "masks"), size=50, split="train", drop="empty", positive="7") == 0
    tiles = read_tiles(tmp_path / "t")
    assert tiles[["row", "col"]].to_numpy().tolist() == [[0, 50], [0, 80]]
    assert set(np.unique(read_pixels(tiles["label"][0]).data)) == {2, 7}


# ---- real images

@pytest.mark.skipif(not (REAL / "spacenet/vegas_roads").is_dir(), reason="the SpaceNet images are not on this machine")
def test_real_images_with_their_masks(tmp_path):
    folder = REAL / "spacenet/vegas_roads"
    found = [p for p in sorted(folder.rglob("*.tif")) if "mask" not in p.name.lower() and "label" not in p.name.lower()][:1]
    if not found: pytest.skip("no image there")
    made = quiet([{"image": str(found[0])}], tmp_path / "t", Cutting(400, 50))
    assert not made.failures and len(made.tiles)
    tiles = read_tiles(tmp_path / "t")
    windows, whole = tiles[["row", "col", "height", "width"]].to_records(index=False), read_pixels(found[0])
    np.testing.assert_array_equal(put_back((read_pixels(p).data for p in tiles["image"]), windows, whole.shape), whole.data)


def test_import_stays_light():
    code = "import sys, aerial_nb.data.cut; sys.exit('torch' in sys.modules or 'fastai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Behaviour of aerial_nb.data.masks: every published way to store a mask, and no guess about the others."""

import warnings
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
import shapely
from affine import Affine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio.errors import NotGeoreferencedWarning

from aerial_nb.data.masks import Rules, class_map, read_class_map, valid_rows
from aerial_nb.data.raster import DataError, read_pixels, write_raster

REAL = Path(__file__).parents[1] / "../shared/data"
FIXTURE = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40
)
ROAD = np.random.default_rng(0).random((40, 50)) > 0.7


def saved(folder, values, **options):
    return write_raster(folder / "m.tif", np.asarray(values).astype("uint8"), **options)


def palette(path, colours, index):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # pixel space is what is tested
        with rasterio.open(
            path, "w", driver="GTiff", width=50, height=40, count=1, dtype="uint8", photometric="palette"
        ) as out:
            out.write(index.astype("uint8"), 1)
            out.write_colormap(1, {i: (*c, 255) for i, c in enumerate(colours)})
    return path


@pytest.mark.parametrize(
    "stored", [ROAD, ROAD * 255, np.stack([ROAD * 255] * 3), np.stack([ROAD * 1] * 3), ROAD * 254 + 1 * ~ROAD]
)
def test_published_forms(tmp_path, stored):
    assert (read_class_map(saved(tmp_path, stored)) == ROAD).all()


@pytest.mark.parametrize("nodata", [0, 1])
@pytest.mark.parametrize("high", [1, 255])
def test_nodata_tag_never_hides_the_label(tmp_path, high, nodata):
    assert (read_class_map(saved(tmp_path, ROAD * high, nodata=nodata)) == ROAD).all()


def test_16_bit_and_float(tmp_path):
    for dtype, high in (("uint16", 1), ("uint16", 65535), ("uint16", 255), ("float32", 1), ("int16", 255)):
        file = write_raster(tmp_path / "m.tif", (ROAD * high).astype(dtype))
        assert (read_class_map(file) == ROAD).all()


def test_uniform_masks(tmp_path):
    for value, expected in ((0, 0), (1, 1), (255, 1)):
        assert (read_class_map(saved(tmp_path, np.full((9, 9), value))) == expected).all()


def test_jpeg_label(tmp_path):
    blocks = np.kron(np.random.default_rng(1).random((8, 8)) > 0.5, np.ones((16, 16), bool))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # pixel space is what is tested
        with rasterio.open(
            tmp_path / "m.jpg", "w", driver="JPEG", width=128, height=128, count=1, dtype="uint8", quality=98
        ) as out:
            out.write((blocks * 255).astype("uint8"), 1)
    assert (read_class_map(tmp_path / "m.jpg") == blocks).all()


@FIXTURE
@given(st.sets(st.integers(0, 8), min_size=1), st.sets(st.integers(247, 255), min_size=1))
def test_noise_at_both_ends_is_one_mask(tmp_path, low, high):
    "Clear when something just under white gives the noise away, or when there is none at all."
    values = np.array([*low, *high])
    if high != {255} or low == {0}:
        assert (read_class_map(saved(tmp_path, values[None])) == (values > 100)).all()
    else:
        with pytest.raises(DataError):
            read_class_map(saved(tmp_path, values[None]))


@pytest.mark.parametrize(
    "values",
    [
        [0, 7, 13],
        [0, 2],
        [0, 1, 2],
        [0, 1, 255],
        [1, 255],
        [0, 2, 255],
        [0, 1, 2, 255],
        [0, 128, 255],
        [7],
        [0, 100],
    ],
)
def test_unclear_values_are_refused_with_what_was_found(tmp_path, values):
    with pytest.raises(
        DataError, match=rf"values {', '.join(map(str, values))} is neither .*pass positive=.*or classes="
    ):
        read_class_map(saved(tmp_path, [values]))


def test_label_255_with_its_own_nodata_tag(tmp_path):
    assert read_class_map(saved(tmp_path, [[0, 1, 255]], nodata=255)).tolist() == [[0, 1, 255]]
    with pytest.raises(DataError, match="nodata tag 255"):
        read_class_map(saved(tmp_path, [[0, 255]], nodata=255))
    assert read_class_map(saved(tmp_path, [[0, 255]], nodata=255), classes={0: 0, 255: 255}).tolist() == [
        [0, 255]
    ]


def test_positive_and_ignore(tmp_path):
    file = saved(tmp_path, [[0, 1, 2, 3, 200]])
    assert read_class_map(file, positive=3, ignore=0).tolist() == [[255, 0, 0, 1, 0]]
    assert read_class_map(file, positive=[2, 3]).tolist() == [[0, 0, 1, 1, 0]]
    assert read_class_map(file, positive=range(128, 256)).tolist() == [[0, 0, 0, 0, 1]]
    assert read_class_map(file, positive=(0, 1, 2)).tolist() == [
        [1, 1, 1, 0, 0]
    ]  # three values, since one band
    assert read_class_map(file, positive=0).tolist() == [[1, 0, 0, 0, 0]]


@FIXTURE
@given(st.dictionaries(st.integers(0, 255), st.integers(0, 255), min_size=1, max_size=12))
def test_classes_map_each_value(tmp_path, classes):
    values = np.array([list(classes)])
    assert read_class_map(saved(tmp_path, values), classes=classes).tolist() == [list(classes.values())]
    known = dict(list(classes.items())[1:])
    with pytest.raises(DataError, match=f"no class given for {values[0, 0]};"):
        read_class_map(saved(tmp_path, values), classes=known)


def test_colours(tmp_path):
    red, grey = np.zeros((3, 40, 50), "uint8"), np.stack([ROAD * 255] * 3).astype("uint8")
    red[0][ROAD] = 255
    file = saved(tmp_path, red)
    with pytest.raises(DataError, match=r"in colours, \(0, 0, 0\), \(255, 0, 0\)"):
        read_class_map(file)
    assert (read_class_map(file, positive=(255, 0, 0)) == ROAD).all()
    assert (read_class_map(file, classes={(255, 0, 0): 2, (0, 0, 0): 255}) == np.where(ROAD, 2, 255)).all()
    assert not read_class_map(saved(tmp_path, grey), positive=(255, 0, 0)).any()  # white is not red
    assert (read_class_map(saved(tmp_path, grey), positive=(255, 255, 255)) == ROAD).all()
    with pytest.raises(DataError, match="bands that differ"):
        read_class_map(saved(tmp_path, red), positive=255)
    with pytest.raises(DataError, match="single values"):
        read_class_map(saved(tmp_path, ROAD), classes={(0, 0, 0): 0})


def test_palettes(tmp_path):
    grey = palette(tmp_path / "a.tif", [(255,) * 3, (0,) * 3], ROAD)  # index 1 is black: colours count
    assert (read_class_map(grey) == ~ROAD).all()
    coloured = palette(
        tmp_path / "b.tif", [(0, 0, 0), (128, 0, 0)], ROAD
    )  # Pascal VOC: the index is the class
    assert (read_class_map(coloured) == ROAD).all()


def test_transparency_is_refused(tmp_path):
    rgba = np.concatenate([np.stack([ROAD * 255] * 3), ROAD[None] * 255]).astype("uint8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # pixel space is what is tested
        with rasterio.open(
            tmp_path / "m.png", "w", driver="PNG", width=50, height=40, count=4, dtype="uint8"
        ) as out:
            out.write(rgba)
    with pytest.raises(DataError, match="transparent"):
        read_class_map(tmp_path / "m.png")


def test_sizes_and_valid(tmp_path):
    file, valid = saved(tmp_path, ROAD * 255), np.random.default_rng(3).random((40, 50)) > 0.5
    assert (read_class_map(file, valid=valid) == np.where(valid, ROAD, 255)).all()
    assert (read_class_map(file, shape=(40, 50)) == ROAD).all()
    for wrong in ({"shape": (50, 40)}, {"valid": valid[:, :-1]}):
        with pytest.raises(DataError, match="m.tif: mask of 40 x 50 pixels for an image of"):
            read_class_map(file, **wrong)


def test_truncated_mask_is_named(tmp_path):
    file = write_raster(tmp_path / "m.png", (ROAD * 255).astype("uint8"))
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match="m.png: truncated PNG"):
        read_class_map(file)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("tag", [0, 1, 255])
def test_a_nodata_tag_on_a_class_hides_nothing(tmp_path, dtype, tag):
    "The 16-bit Vegas trap: a reader that obeys the tag sees no building at all."
    file = write_raster(tmp_path / "m.tif", ROAD.astype(dtype), nodata=tag)
    with rasterio.open(file) as d:
        assert d.read(1, masked=True).mask.any() == (tag != 255)  # what the polite reader would hide
    assert (read_class_map(file) == ROAD).all()


def test_more_classes_with_the_tag_on_one_of_them_are_refused(tmp_path):
    values = np.array([[0, 1, 2, 3]], "uint16")
    file = write_raster(tmp_path / "m.tif", values, nodata=2)
    with pytest.raises(DataError, match=r"values 0, 1, 2, 3 \(nodata tag 2\) is neither 0/1 nor 0/255; pass positive="):
        read_class_map(file)
    assert read_class_map(file, classes={v: v for v in range(4)}).tolist() == values.tolist()


def test_a_class_map_that_says_so_is_taken_at_its_word(tmp_path):
    values = np.array([[0, 2, 255], [0, 0, 0]], "uint8")
    file = write_raster(tmp_path / "m.tif", values, nodata=255)
    with pytest.raises(DataError, match="nodata tag 255"):
        read_class_map(file)
    with rasterio.open(file, "r+") as d:
        d.update_tags(AERIAL_CLASS_MAP="0 background; 2 shed; 255 ignored")
    assert read_class_map(file).tolist() == values.tolist()
    assert read_class_map(file, positive=2).tolist() == [[0, 1, 0], [0, 0, 0]]  # but the caller has the last word


# Vectors


PLACE = dict(crs="EPSG:32633", transform=Affine(0.5, 0, 500_000, 0, -0.5, 5_400_000))


def house(x0, y0, x1, y1, crs="EPSG:32633"):
    "A table with one box, given in pixels."
    t = PLACE["transform"]
    shape = shapely.box(t.c + x0 * t.a, t.f + y1 * t.e, t.c + x1 * t.a, t.f + y0 * t.e)
    return gpd.GeoDataFrame(geometry=[shape], crs="EPSG:32633").to_crs(crs)


def expected(invalid, x0=10, y0=10, x1=30, y1=25, shape=(40, 50)):
    out = np.zeros(shape, "uint8")
    out[y0:y1, x0:x1] = 1
    out[invalid] = 255
    return out


INVALID = np.zeros((40, 50), bool)
INVALID[5:15, 20:45] = True
IMAGE = np.random.default_rng(4).integers(1, 255, (3, 40, 50)).astype("uint8")


@pytest.mark.parametrize("how", ["nodata", "mask", "alpha", "nan", "fill", "valid", "udm", "udm polygon", "nothing"])
def test_where_there_is_no_image_the_map_is_255(tmp_path, how):
    image, told, options = IMAGE.copy(), {}, {}
    if how in ("nodata", "fill"):
        image[:, INVALID] = 0
    if how == "nodata":
        told["nodata"] = 0
    if how == "mask":
        told["valid"] = ~INVALID
    if how == "nan":
        image = np.where(INVALID, np.nan, image).astype("float32")
    file = write_raster(tmp_path / "i.tif", image, **PLACE, **told)
    if how == "alpha":
        with rasterio.open(
            file, "w", driver="GTiff", width=50, height=40, count=4, dtype="uint8", alpha="yes", photometric="rgb", **PLACE
        ) as d:
            d.write(np.concatenate([image, np.where(INVALID, 0, 255)[None].astype("uint8")]))
    if how == "fill":
        options["fill"] = (0, 0, 0)
    if how == "valid":
        options["valid"] = write_raster(tmp_path / "v.png", (~INVALID * 255).astype("uint8"))
    if how == "udm":
        options["udm"] = write_raster(tmp_path / "u.tif", INVALID.astype("uint8") * 4, **PLACE)
    if how == "udm polygon":
        options["udm"] = tmp_path / "clouds.geojson"
        house(20, 5, 45, 15, 4326).to_file(options["udm"])
    made, report = class_map(file, house(10, 10, 30, 25, 4326), **options)
    assert (made == expected(INVALID if how != "nothing" else np.zeros_like(INVALID))).all()
    assert report.burned == 1
    if not options:
        assert (class_map(read_pixels(file), house(10, 10, 30, 25))[0] == made).all()
    rows = valid_rows(file, **options)
    strips = [rows(r, 8) for r in range(0, 40, 8)]
    assert how == "nothing" and strips == [None] * 5 or (np.concatenate(strips) == (made != 255)).all()


def test_a_udm_of_another_size(tmp_path):
    file = write_raster(tmp_path / "i.tif", IMAGE, **PLACE)
    udm = write_raster(tmp_path / "u.tif", INVALID[:-1].astype("uint8"))
    with pytest.raises(DataError, match="u.tif: UDM of 39 x 50 pixels for an image of 40 x 50"):
        class_map(file, house(1, 1, 2, 2), udm=udm)


def test_roads_over_houses(tmp_path):
    both = pd.concat([house(10, 10, 30, 25).assign(kind="house"), house(20, 5, 25, 40).assign(kind="path")])
    image = write_raster(tmp_path / "i.tif", IMAGE, **PLACE)
    made, _ = class_map(image, both, Rules("kind", {"house": 1, "path": 2}))
    assert made[15, [12, 22, 27]].tolist() == [1, 2, 1]


# Real masks


def real(*parts):
    path = REAL.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"the real data {'/'.join(parts)} is not on this machine")
    return path


def shares(folder, table, name, column):
    for row in pd.read_csv(real(*folder, table)).to_dict("records"):
        file = next(real(*folder, "masks").glob(f"{row[name]}.*"))
        yield file.name, read_class_map(file).mean(), row[column]


@pytest.mark.parametrize(
    ("folder", "table", "name", "column"),
    [
        (("roofs", "oam_1024"), "scenes.csv", "scene", "roof_fraction"),
        (("roofs", "inria_256"), "tiles.csv", "tile", "roof_fraction"),
        (("spacenet", "rio_buildings"), "tiles.csv", "tile", "roof_fraction"),
        (("massachusetts_roads",), "stats.csv", "tile", "road_fraction_all"),
    ],
)
def test_real_shares(folder, table, name, column):
    found = list(shares(folder, table, name, column))
    assert found and all(abs(got - said) < 6e-5 for _, got, said in found), [
        f for f in found if abs(f[1] - f[2]) >= 6e-5
    ]


def test_real_roads_where_there_is_image():
    stats = pd.read_csv(real("massachusetts_roads", "stats.csv")).head(8)
    folder = real("massachusetts_roads")
    for row in stats.itertuples():
        pixels = read_pixels(
            folder / "images" / f"{row.tile}.jpg", valid_path=folder / "valid" / f"{row.tile}.png"
        )
        roads = read_class_map(folder / "masks" / f"{row.tile}.png", valid=pixels.valid)
        assert (roads == 255).mean() == pytest.approx(row.nodata_fraction, abs=6e-5)
        assert (roads[roads != 255] == 1).mean() == pytest.approx(row.road_fraction_in_valid, abs=6e-5)


def test_real_mask_with_misleading_nodata():
    mask = real("spacenet", "vegas_buildings_16bit", "mask.tif")
    with rasterio.open(mask) as d:
        plain = d.read(1)
    assert plain.any() and (read_class_map(mask) == plain).all()
    with rasterio.open(mask) as d:
        assert d.nodata == 1 and not d.read(1, masked=True).filled(0).any()  # what obeying the tag would give
    image = read_pixels(real("spacenet", "vegas_buildings_16bit", "image.tif"))
    assert (read_class_map(mask, valid=image.valid) == 1).sum() == plain.sum()


def test_real_mask_of_438_for_an_image_of_439():
    folder = real("spacenet", "rio_buildings")
    sizes = {f.stem: read_pixels(f).shape for f in (folder / "images").glob("*.tif")}
    small, large = (next(n for n, s in sizes.items() if s[1] == c) for c in (438, 439))
    read_class_map(folder / "masks" / f"{small}.tif", shape=sizes[small])
    with pytest.raises(DataError, match=f"{small}.tif: mask of 406 x 438 pixels for an image of 406 x 439; pair it"):
        read_class_map(folder / "masks" / f"{small}.tif", shape=sizes[large])


def test_real_rgb_masks_and_many_classes():
    for file in [*real("deepglobe", "masks").glob("*.png"), *real("roofs", "whu_512", "masks").glob("*.png")]:
        assert 0 < read_class_map(file).mean() < 0.9
    land = real("roofs", "loveda_1024", "labels", "0.png")
    with pytest.raises(DataError, match="values 1, 2, 3, 4, 7"):
        read_class_map(land)
    classes = {0: 255, 1: 0, 2: 1, 3: 2} | {v: 0 for v in (4, 5, 6, 7)}
    with rasterio.open(land) as d:
        plain = d.read(1)
    assert ((read_class_map(land, classes=classes) == 1) == (plain == 2)).all()

"""Behaviour of aerial_nb.data.raster: exact windows, honest valid masks, and damage that is never read as black."""

import errno
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import from_bounds, from_origin

from aerial_nb.data.raster import (
    DataError,
    fill_mask,
    ground_resolution,
    raster_info,
    read_pixels,
    write_raster,
)

REAL = Path(__file__).parents[1] / "../shared/data"
UTM = rasterio.CRS.from_epsg(32616)
PLACE = from_origin(738_000, 3_730_000, 0.5, 0.5)
FIXTURE = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30
)


def noise(bands=3, rows=60, cols=70, dtype="uint8", seed=0):
    high = 255 if dtype == "uint8" else 30_000
    return np.random.default_rng(seed).integers(0, high, (bands, rows, cols)).astype(dtype)


def save(path, data, driver, **profile):
    "Write with plain rasterio, as another program would."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # pixel space is what is tested
        with rasterio.open(
            path,
            "w",
            driver=driver,
            width=data.shape[2],
            height=data.shape[1],
            count=len(data),
            dtype=data.dtype,
            **profile,
        ) as out:
            out.write(data)
    return path


# What is written is read, whole and in windows


@FIXTURE
@given(
    st.integers(1, 16),
    st.sampled_from(["uint8", "uint16", "int16", "uint32", "float32", "float64"]),
    st.integers(1, 40),
    st.integers(1, 40),
    st.data(),
)
def test_round_trip_and_windows(tmp_path, bands, dtype, rows, cols, data):
    array = noise(bands, rows, cols, dtype, seed=bands)
    file = write_raster(tmp_path / "a.tif", array, UTM, PLACE)
    whole = read_pixels(file)
    assert whole.data.dtype == dtype and (whole.data == array).all() and whole.valid.all()
    row, col = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, cols - 1))
    height, width = data.draw(st.integers(1, rows - row)), data.draw(st.integers(1, cols - col))
    part = read_pixels(file, window=(row, col, height, width))
    assert (part.data == array[:, row : row + height, col : col + width]).all()
    assert (part.transform.c, part.transform.f) == (738_000 + col / 2, 3_730_000 - row / 2)
    info = raster_info(file)
    assert (info.shape, info.bands, info.dtype, info.gsd_m) == ((rows, cols), bands, dtype, 0.5)


@FIXTURE
@given(st.integers(-30, 60), st.integers(-30, 60), st.integers(1, 50), st.integers(1, 50))
def test_boundless_equals_padding(tmp_path, row, col, height, width):
    array = noise(2, 20, 25)
    file = write_raster(tmp_path / "a.tif", array, UTM, PLACE)
    padded = np.pad(array, ((0, 0), (40, 100), (40, 100)))[
        :, row + 40 : row + 40 + height, col + 40 : col + 40 + width
    ]
    inside = np.pad(np.ones((20, 25), bool), ((40, 100), (40, 100)))[
        row + 40 : row + 40 + height, col + 40 : col + 40 + width
    ]
    got = read_pixels(file, (row, col, height, width), boundless=True)
    assert (got.data == padded).all() and (got.valid == inside).all()
    if not inside.all():
        with pytest.raises(DataError, match="leaves the image of 20 x 25 pixels"):
            read_pixels(file, (row, col, height, width))


def test_window_without_size_is_refused(tmp_path):
    file = write_raster(tmp_path / "a.tif", noise())
    with pytest.raises(DataError, match="window of 0 x 5"):
        read_pixels(file, (0, 0, 0, 5))


# Valid pixels


def test_nodata_needs_all_bands(tmp_path):
    array = noise() // 2 + 1
    array[:, 5, 5] = 0
    array[0, 6, 6] = 0  # a dark pixel is no hole
    file = write_raster(tmp_path / "a.tif", array, UTM, PLACE, nodata=0)
    valid = read_pixels(file).valid
    assert not valid[5, 5] and valid.sum() == valid.size - 1


def test_not_a_number_is_never_valid(tmp_path):
    array = noise(dtype="float32")
    array[1, 3, 4], array[:, 7, 8], array[0, 1, 1] = np.nan, -9999, np.inf
    for nodata in (-9999, np.nan):
        invalid = np.argwhere(
            ~read_pixels(write_raster(tmp_path / "a.tif", array, nodata=nodata)).valid
        ).tolist()
        assert invalid == ([[1, 1], [3, 4], [7, 8]] if nodata == -9999 else [[1, 1], [3, 4]])


def test_own_mask_and_alpha(tmp_path):
    real = np.random.default_rng(1).random((60, 70)) > 0.3
    masked = read_pixels(write_raster(tmp_path / "mask.tif", noise(), UTM, PLACE, valid=real))
    assert (masked.valid == real).all() and len(masked.data) == 3
    rgba = np.concatenate([noise(), np.where(real, 255, 0)[None].astype("uint8")])
    for file in (
        save(tmp_path / "a.tif", rgba, "GTiff", photometric="rgb", alpha="yes"),
        save(tmp_path / "a.png", rgba, "PNG"),
    ):
        got = read_pixels(file)
        assert (got.valid == real).all() and (got.data == rgba[:3]).all() and raster_info(file).bands == 3
        kept = read_pixels(file, alpha=False)
        assert (kept.data == rgba).all() and kept.valid.all()


def test_four_bands_stay_four(tmp_path):
    "Infrared must not come back as alpha."
    assert len(read_pixels(write_raster(tmp_path / "a.tif", noise(4))).data) == 4


def test_palette_becomes_colours(tmp_path):
    index = noise(1) % 3
    path = tmp_path / "a.tif"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # pixel space is what is tested
        with rasterio.open(
            path, "w", driver="GTiff", width=70, height=60, count=1, dtype="uint8", photometric="palette"
        ) as out:
            out.write(index)
            out.write_colormap(1, {0: (10, 20, 30, 255), 1: (200, 100, 50, 255), 2: (0, 0, 0, 255)})
    got = read_pixels(path).data
    assert (got[:, index[0] == 1] == np.array([[200], [100], [50]])).all() and got.shape == (3, 60, 70)


def test_fill_colour_exact_and_in_jpeg(tmp_path):
    array = np.full((3, 128, 128), 90, "uint8")
    array[:, :, 64:] = 255
    array[0, :, 10] = 255
    lossless, lossy = (
        write_raster(tmp_path / "a.png", array),
        save(tmp_path / "a.jpg", array, "JPEG", quality=90),
    )
    truth = np.arange(128) < 64
    assert (read_pixels(lossless, fill=(255, 255, 255)).valid == truth).all()
    assert (read_pixels(lossless, fill=255).valid == truth).all()
    assert (read_pixels(lossy, fill=255).valid == truth).mean() > 0.99
    assert raster_info(lossy).lossy and not raster_info(lossless).lossy
    with pytest.raises(DataError, match="2 values, the image 3 bands"):
        read_pixels(lossless, fill=(255, 255))


@given(st.integers(0, 255), st.integers(0, 30))
def test_fill_tolerance_is_a_distance(value, tolerance):
    ramp = np.arange(256, dtype="uint8").reshape(1, 16, 16)
    assert (fill_mask(ramp, value, tolerance) == (abs(ramp[0].astype(int) - value) <= tolerance)).all()


def test_valid_picture(tmp_path):
    image, real = write_raster(tmp_path / "a.png", noise()), np.random.default_rng(2).random((60, 70)) > 0.5
    for high in (1, 255):
        beside = write_raster(tmp_path / "v.png", (real * high).astype("uint8"))
        assert (read_pixels(image, valid_path=beside).valid == real).all()
        assert (read_pixels(image, (5, 6, 20, 30), valid_path=beside).valid == real[5:25, 6:36]).all()
    assert read_pixels(image, valid_path="").valid.all()
    with pytest.raises(DataError, match="60 x 69 pixels for an image of 60 x 70"):
        read_pixels(image, valid_path=write_raster(tmp_path / "w.png", noise(1, 60, 69)[0] % 2))
    with pytest.raises(DataError, match="holds 0 and 1, or 0 and 255; found"):
        read_pixels(image, valid_path=write_raster(tmp_path / "w.png", noise(1)[0]))


# Metres


@pytest.mark.parametrize(
    ("epsg", "bounds", "expected", "within"),
    [
        (32619, (3e5, 4.7e6, 3e5 + 500, 4.7e6 + 500), 0.5, 0),  # UTM: the number of the transform
        (2249, (7e5, 3e6, 7e5 + 1000, 3e6 + 1000), 0.3048006, 1e-6),  # US survey feet
        (3857, (0, 8_399_737.9, 1000, 8_400_737.9), 0.5, 0.005),  # 60 degrees north
        (4326, (-115.3, 36.2, -115.3 + 0.0027, 36.2 + 0.0027), 0.2697, 0.001),  # degrees
    ],
)
def test_ground_resolution(epsg, bounds, expected, within):
    got = ground_resolution(rasterio.CRS.from_epsg(epsg), from_bounds(*bounds, 1000, 1000), (1000, 1000))
    assert got == pytest.approx(expected, rel=within, abs=0)


def test_pixel_space_is_quiet(tmp_path):
    file = write_raster(tmp_path / "a.png", noise())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(read_pixels, [file] * 16))
    assert all(p.crs is None and p.transform is None and p.gsd_m is None for p in got)


# Damage

FORMATS = {
    "raw.tif": ("GTiff", {}),
    "deflate.tif": ("GTiff", {"compress": "deflate"}),
    "lzw.tif": ("GTiff", {"compress": "lzw"}),
    "jpeg.tif": ("GTiff", {"compress": "jpeg"}),
    "tiled.tif": ("GTiff", {"tiled": True, "blockxsize": 32, "blockysize": 32}),
    "a.jpg": ("JPEG", {}),
    "progressive.jpg": ("JPEG", {"progressive": "on"}),
    "a.png": ("PNG", {}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_truncation_is_found(tmp_path, name):
    driver, options = FORMATS[name]
    content = save(tmp_path / name, noise(), driver, **options).read_bytes()
    assert read_pixels(tmp_path / name).data.shape == (3, 60, 70)
    for size in [*np.linspace(0, len(content) - 1, 25).astype(int), len(content) - 2, len(content) - 12]:
        (tmp_path / f"cut_{name}").write_bytes(content[:size])
        with pytest.raises(DataError, match=f"cut_{name}.*(truncated|no image)") as error:
            read_pixels(tmp_path / f"cut_{name}")
        assert "copy or download it again" in str(error.value)


@FIXTURE
@given(st.data())
def test_every_changed_byte_of_a_png_is_found(tmp_path, data):
    content = bytearray(write_raster(tmp_path / "a.png", noise(1, 20, 20)).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    (tmp_path / "b.png").write_bytes(bytes(content))
    with pytest.raises(DataError, match="b.png"):
        read_pixels(tmp_path / "b.png")


def test_corrupt_jpeg_is_found(tmp_path):
    content = bytearray(save(tmp_path / "a.jpg", noise(), "JPEG").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 100] = np.random.default_rng(0).bytes(100)
    (tmp_path / "a.jpg").write_bytes(bytes(content))
    with pytest.raises(DataError, match="truncated or corrupt"):
        read_pixels(tmp_path / "a.jpg")


def test_no_image_at_all(tmp_path):
    (tmp_path / "text.tif").write_text("not found")
    (tmp_path / "empty.tif").touch()
    for name in ("text.tif", "empty.tif"):
        with pytest.raises(DataError, match=name):
            read_pixels(tmp_path / name)
        with pytest.raises(DataError, match=name):
            raster_info(tmp_path / name)
    with pytest.raises(DataError, match="missing.tif: no such file"):
        read_pixels(tmp_path / "missing.tif")
    with pytest.raises(DataError, match="no such file"):
        read_pixels(tmp_path)


# Writing


def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    file, old = write_raster(tmp_path / "a.tif", noise(seed=1)), noise(seed=1)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_raster(file, noise(seed=2))
    assert (read_pixels(file).data == old).all() and os.listdir(tmp_path) == ["a.tif"]


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(DataError, match="can write .tif and .png"):
        write_raster(tmp_path / "a.jpg", noise())
    with pytest.raises(DataError, match="neither place nor mask"):
        write_raster(tmp_path / "a.png", noise(), UTM, PLACE)


def test_import_is_light():
    code = (
        "import aerial_nb.data.raster, aerial_nb.data.masks, aerial_nb.data.catalog, aerial_nb.data.splits, sys\n"
        "sys.exit(bool({'torch', 'fastai'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


# Real files


def real(*parts):
    path = REAL.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"the real data {'/'.join(parts)} is not on this machine")
    return path


def test_real_scene_with_own_mask():
    import pandas as pd

    table = pd.read_csv(real("roofs", "oam_1024", "scenes.csv"))
    for row in table[table["nodata_fraction"] > 0].head(4).itertuples():
        pixels = read_pixels(real("roofs", "oam_1024", "images", f"{row.scene}.tif"))
        assert 1 - pixels.valid.mean() == pytest.approx(row.nodata_fraction, abs=1e-5)


def test_real_ground_resolution():
    "Web mercator in Nepal: 0.0746 units are 0.066 m."
    nepal = next(real("roofs", "oam_1024", "images").glob("nepal_*.tif"))
    assert raster_info(nepal).gsd_m == pytest.approx(0.066, abs=5e-4)
    assert raster_info(real("spacenet", "atlanta_buildings", "image_pan_epsg32616.tif")).gsd_m == 0.5
    assert raster_info(real("roadgraphs", "apls", "vegas_img0", "image.tif")).bands == 3  # RGBA


def test_real_16_bit():
    pixels = read_pixels(real("spacenet", "vegas_buildings_16bit", "image.tif"))
    assert pixels.data.dtype == np.uint16 and pixels.data.max() == 1792 and pixels.data.shape == (3, 650, 650)
    pan = read_pixels(real("spacenet", "atlanta_buildings", "image_pan_epsg32616.tif"))
    assert (pan.valid == (pan.data[0] > 0)).all()


def test_real_blank_parts():
    "The declared fill finds the blank part in spite of JPEG."
    folder = real("massachusetts_roads")
    for beside in sorted((folder / "valid").glob("*.png"))[:4]:
        image = folder / "images" / f"{beside.stem}.jpg"
        truth = read_pixels(image, valid_path=beside).valid
        assert (read_pixels(image, fill=(255, 255, 255)).valid == truth).mean() > 0.998


@pytest.mark.parametrize("name, known", [("WGS 84 / Pseudo-Mercator", True), ("somewhere", False)])
def test_a_local_crs_is_resolved_or_has_no_ground_resolution(tmp_path, name, known):
    wkt = f'LOCAL_CS["{name}",UNIT["metre",1],AXIS["Easting",EAST],AXIS["Northing",NORTH]]'
    file = tmp_path / "tile.tif"
    with rasterio.open(file, "w", driver="GTiff", width=8, height=8, count=1, dtype="uint8", crs=rasterio.CRS.from_wkt(wkt),
                       transform=from_origin(0, 3_503_549.8, 4.78, 4.78)) as d: d.write(np.ones((1, 8, 8), "uint8"))
    gsd = raster_info(file).gsd_m
    assert gsd == pytest.approx(4.78 * np.cos(np.radians(30)), rel=3e-3) if known else gsd is None

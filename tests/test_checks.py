"""Behaviour of aerial_nb.data.checks: every fault is found, all are listed at once, and good data passes."""

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import from_origin

from aerial_nb.data.checks import check_samples, inspect_samples, read_sample, scan_samples, validate_samples
from aerial_nb.data.raster import DataError, read_pixels, write_raster

UTM = rasterio.CRS.from_epsg(32619)


@pytest.fixture
def good(tmp_path):
    "Six georeferenced tiles, apart from each other, with a road each."
    rng, rows = np.random.default_rng(0), []
    for i in range(6):
        mask = np.zeros((64, 80), "uint8")
        mask[20:25] = 255
        place = UTM, from_origin(3e5 + 1000 * i, 4.7e6, 0.5, 0.5)
        rows.append(
            {
                "image": str(
                    write_raster(
                        tmp_path / f"t{i}.tif", rng.integers(0, 255, (3, 64, 80), dtype="uint8"), *place
                    )
                ),
                "label": str(write_raster(tmp_path / f"m{i}.png", mask)),
                "scene": f"s{i}",
                "split": ("train", "train", "train", "valid", "test", "test")[i],
                "gsd_m": 0.5,
            }
        )
    return pd.DataFrame(rows)


def kinds(findings, severity="fault"):
    chosen = findings[findings["severity"] == severity]
    return sorted(zip(chosen["kind"], chosen["sample"]))


def scan(samples, **options):
    return scan_samples(samples, progress=False, **options)


def cut(path, keep=0.6):
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: int(len(content) * keep)])


def test_good_data_passes(good):
    assert not len(scan(good)) and not len(validate_samples(good, hashes=True))
    assert not len(check_samples(good, progress=False))
    stats, _ = inspect_samples(good, progress=False)
    assert (stats["positive_share"] - 5 / 64).abs().max() < 1e-12 and (stats["valid_share"] == 1).all()


def test_truncated_tiff_among_good_ones(good):
    cut(good["image"][2])
    found = scan(good)
    assert kinds(found) == [("unreadable", "t2")] and "truncated or corrupt" in found["message"][0]


def test_all_faults_in_one_error(good, tmp_path):
    cut(good["image"][0])
    cut(good["label"][1])
    write_raster(good["label"][2], np.zeros((80, 64), "uint8"))
    write_raster(
        good["image"][3], np.full((3, 64, 80), 255, "uint8"), UTM, from_origin(3e5 + 3000, 4.7e6, 0.5, 0.5)
    )
    write_raster(good["label"][4], np.full((64, 80), 7, "uint8"))
    Path(good["label"][5]).unlink()
    with pytest.raises(DataError) as error:
        check_samples(good, progress=False)
    text = str(error.value)
    assert text.startswith("6 faults in 6 samples:")
    for said in (
        "t0 [unreadable]",
        "t1 [mask]",
        "t2 [size]",
        "80 x 64 pixels for an image of 64 x 80",
        "t3 [blank]",
        "t4 [mask]",
        "the values 7",
        "t5 [missing]",
    ):
        assert said in text


def test_blank_tiles(good, tmp_path):
    white = np.full((3, 64, 80), 255, "uint8")
    white[:, :30] = 90
    write_raster(good["image"][0], white, UTM, from_origin(3e5, 4.7e6, 0.5, 0.5))
    assert kinds(scan(good)) == []  # two colours: who knows
    assert kinds(scan(good, fill=(255, 255, 255))) == [("blank", "t0")]
    nothing = write_raster(tmp_path / "v.png", np.zeros((64, 80), "uint8"))
    blank = good.assign(valid=["", str(nothing), "", "", "", ""])
    assert kinds(scan(blank)) == [("blank", "t1")]


def test_no_road_is_a_note(good):
    write_raster(good["label"][1], np.zeros((64, 80), "uint8"))
    found = scan(good)
    assert kinds(found) == [] and kinds(found, "note") == [("empty", "t1")]
    assert check_samples(good, progress=False)["sample"].tolist() == ["t1"]


def test_labels_on_blank_ground_are_noted(good, tmp_path):
    real = np.ones((64, 80), "uint8")
    real[:, :40] = 0
    samples = good.assign(valid=str(write_raster(tmp_path / "v.png", real)))
    assert (
        set(scan(samples)["kind"]) == {"hidden"}
        and "50% of the positive pixels" in scan(samples)["message"][0]
    )


def test_missing_files_and_cells(good):
    Path(good["image"][0]).unlink()
    odd = good.assign(
        split=["train", "val", "train", "valid", "test", "test"],
        gsd_m=[0.5, 0.5, -1, 0.5, 0.5, np.nan],
        label=[*good["label"][:5], ""],
    )
    found = validate_samples(odd)
    assert kinds(found) == [("gsd", "t2"), ("missing", "t0"), ("split", "t1")] and kinds(found, "note") == [
        ("unlabelled", "t5")
    ]
    assert ("missing", "t0") in kinds(scan(odd))
    assert kinds(validate_samples(good.drop(columns=["scene", "split"]))) == [("columns", "")]
    with pytest.raises(DataError, match="no column scene, split"):
        check_samples(good.drop(columns=["scene", "split"]))
    with pytest.raises(DataError, match="no rows"):
        check_samples(good.iloc[:0])


def test_same_names_in_two_folders_stay_apart(good, tmp_path):
    (tmp_path / "b").mkdir()
    other = Path(good["image"][1]).rename(tmp_path / "b" / "t0.tif")
    samples = good.assign(image=[good["image"][0], str(other), *good["image"][2:]])
    Path(good["image"][0]).unlink()
    stats, found = inspect_samples(samples, progress=False)
    assert len(stats) == 5 and kinds(found) == [("missing", "t0")]


def test_duplicates(good, tmp_path):
    twice = pd.concat([good, good.iloc[[1]]], ignore_index=True)
    assert ("duplicate", "t1") in kinds(validate_samples(twice))
    pixels = read_pixels(good["image"][0])
    copy = write_raster(tmp_path / "again.png", pixels.data)  # the same picture in another format
    samples = good.assign(image=[*good["image"][:5], str(copy)])
    assert kinds(validate_samples(samples)) == [] and kinds(scan(samples)) == [("duplicate", "again")]
    Path(good["image"][5]).write_bytes(Path(good["image"][0]).read_bytes())
    assert ("duplicate", "t5") in kinds(validate_samples(good, hashes=True))


def test_scene_in_two_splits(good):
    crossing = good.assign(scene=["a", "b", "c", "a", "d", "e"])
    found = validate_samples(crossing)
    assert kinds(found) == [("scene", "a")] and "train and valid" in found["message"][0]
    assert not len(validate_samples(crossing.assign(split="")))


@pytest.mark.parametrize("crs", [UTM, rasterio.CRS.from_epsg(4326)])
def test_overlap_across_splits(tmp_path, crs):
    pixel = 0.5 if crs == UTM else 5e-6
    corner = (3e5, 4.7e6) if crs == UTM else (-71.0, 42.0)
    image = np.random.default_rng(0).integers(0, 255, (3, 50, 50), dtype="uint8")
    paths = [
        write_raster(
            tmp_path / f"{n}.tif",
            image + np.uint8(k),
            crs,
            from_origin(corner[0] + shift * pixel, corner[1], pixel, pixel),
        )
        for k, (n, shift) in enumerate((("a", 0), ("touching", 50), ("over", 80)))
    ]
    samples = pd.DataFrame(
        {
            "image": paths,
            "label": "",
            "scene": ["a", "b", "c"],
            "split": ["train", "test", "valid"],
            "gsd_m": np.nan,
        }
    )
    found = validate_samples(samples)
    assert (
        kinds(found) == [("overlap", "touching")] and "share 40.0%" in found["message"][0]
    )  # touching alone is legal
    assert kinds(validate_samples(samples.assign(split="")), "note")[0] == ("overlap", "touching")
    assert kinds(validate_samples(samples.assign(scene="one", split="train"))) == []


def test_overlap_in_two_reference_systems(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (3, 50, 50), dtype="uint8")
    lon, lat = rasterio.warp.transform(UTM, "EPSG:4326", [3e5], [4.7e6])
    paths = [
        write_raster(tmp_path / "a.tif", image, UTM, from_origin(3e5, 4.7e6, 0.5, 0.5)),
        write_raster(
            tmp_path / "b.tif",
            image[:, ::-1],
            rasterio.CRS.from_epsg(4326),
            from_origin(lon[0], lat[0], 6e-6, 4.5e-6),
        ),
    ]
    samples = pd.DataFrame(
        {"image": paths, "label": "", "scene": ["a", "b"], "split": ["train", "test"], "gsd_m": np.nan}
    )
    assert kinds(validate_samples(samples)) == [("overlap", "a")]


def test_mixed_kinds_of_images(good, tmp_path):
    write_raster(good["image"][0], np.arange(64 * 80, dtype="uint16").reshape(1, 64, 80))
    found = scan(good)
    assert kinds(found) == [("bands", "")] and "1 of 1 bands uint16 (t0)" in found["message"][0]


def test_resolution_that_contradicts_the_table(good):
    assert kinds(scan(good.assign(gsd_m=1.0)), "note")[0] == ("gsd", "t0")


def test_read_sample_honours_valid_fill_and_labels(good, tmp_path):
    write_raster(good["label"][0], np.full((64, 80), 3, "uint8"))
    real = np.ones((64, 80), "uint8")
    real[:, :10] = 0
    row = {**good.iloc[0], "valid": str(write_raster(tmp_path / "v.png", real)), "fill": None}
    pixels, band = read_sample(row, labels={"positive": 3})
    assert (band == np.where(real, 1, 255)).all() and (pixels.valid == real).all()
    assert read_sample({**row, "label": ""})[1] is None
    corner = tuple(pixels.data[:, 30, 30].tolist())
    assert read_sample({**row, "fill": corner}, labels={"positive": 3})[1][30, 30] == 255


def test_a_jpeg_with_damage_inside(good, tmp_path):
    pixels = read_pixels(good["image"][0]).data
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # pixel space is what is tested
        with rasterio.open(
            tmp_path / "j.jpg", "w", driver="JPEG", width=80, height=64, count=3, dtype="uint8"
        ) as out:
            out.write(pixels)
    cut(tmp_path / "j.jpg", 0.9)
    assert kinds(scan(good.assign(image=[str(tmp_path / "j.jpg"), *good["image"][1:]]))) == [
        ("unreadable", "j")
    ]

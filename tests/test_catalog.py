"""Behaviour of aerial_nb.data.catalog: every layout becomes one table, and nothing is dropped or guessed in silence."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
import shapely
from hypothesis import given
from hypothesis import strategies as st
from rasterio.transform import from_origin

from aerial_nb.data import catalog, synthetic
from aerial_nb.data.catalog import (
    deepglobe,
    inspect_samples,
    list_rasters,
    massachusetts,
    massachusetts_position,
    open_samples,
    read_sample,
    sample_key,
    samples_from,
    scan_samples,
    summarise,
    synthetic_samples,
    touching,
    validate_samples,
)
from aerial_nb.data.raster import DataError, write_raster
from aerial_nb.data.readers import INRIA_CITIES, SPACENET7_VALID, inria, massachusetts_buildings, sat2graph, spacenet7
from aerial_nb.data.splits import ensure_split, split_by_scene, split_hash

REAL = Path(__file__).parents[1] / "../shared/data"
UTM = rasterio.CRS.from_epsg(32619)
IMAGE = np.random.default_rng(0).integers(0, 255, (3, 20, 24), dtype="uint8")
MASK = (IMAGE[0] > 128).astype("uint8") * 255
TILES = [
    "10078675_15",
    "10078690_15",
    "99238675_15",
    "17578720_15",
    "22829440_15",
    "26129290_15",
]  # three touch


def image(path, **place):
    return write_raster(path, IMAGE, **place)


def mask(path):
    return write_raster(path, MASK)


def touch(path):
    "A file that is only counted, never opened."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def names(samples, column="image"):
    return [Path(p).name for p in samples[column]]


# Two folders


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("104_sat.jpg", "104_mask.png"),
        ("img_7.tif", "mask_7.tif"),
        ("x.tif", "x.png"),
        ("town-rgb.tif", "town-label.tif"),
        ("a_b_IMAGE.tif", "a_b_GT.png"),
        ("img_7_sat.tif", "mask_7.tif"),
    ],
)
def test_keys_of_pairs_agree(a, b):
    assert sample_key(a) == sample_key(b) != ""


def test_keys_of_others_differ():
    assert (
        len(
            {
                sample_key(p)
                for p in ("tile_1.tif", "tile_2.tif", "sat.tif", "mask.tif", "val01.png", "10078735_15.png")
            }
        )
        == 6
    )


def test_two_folders_globs_and_lists(tmp_path):
    for i in (10, 9, 1):
        image(tmp_path / "sat" / f"t{i}_sat.png")
        mask(tmp_path / "gt" / f"t{i}_mask.png")
    (tmp_path / "sat" / "notes.txt").write_text("x")
    (tmp_path / "sat" / "._t1_sat.png").write_text("x")
    one = samples_from(tmp_path / "sat", tmp_path / "gt", gsd_m=0.3)
    two = samples_from(str(tmp_path / "sat" / "t*.png"), str(tmp_path / "g*" / "*.png"), gsd_m=0.3)
    three = samples_from(list((tmp_path / "sat").glob("t*")), list((tmp_path / "gt").iterdir()), gsd_m=0.3)
    assert one.equals(two) and one.equals(three)
    assert (
        names(one) == ["t1_sat.png", "t9_sat.png", "t10_sat.png"] and names(one, "label")[1] == "t9_mask.png"
    )
    assert (
        one["scene"].tolist() == ["t1", "t9", "t10"]
        and (one["gsd_m"] == 0.3).all()
        and (one["split"] == "").all()
    )
    assert samples_from(tmp_path / "sat", tmp_path / "gt")["gsd_m"].isna().all()
    assert samples_from(tmp_path / "sat")["label"].tolist() == [""] * 3


def test_partners_that_are_missing_are_all_named(tmp_path):
    for i in range(4):
        image(tmp_path / "a" / f"{i}.png")
        mask(tmp_path / "b" / f"{i + 2}.png")
    with pytest.raises(DataError, match="2 images without a label: 0, 1; 2 labels without an image: 4, 5"):
        samples_from(tmp_path / "a", tmp_path / "b")
    for i in (4, 5):
        (tmp_path / "b" / f"{i}.png").unlink()
    assert samples_from(tmp_path / "a", tmp_path / "b", unlabelled=True)["label"].map(bool).tolist() == [
        False,
        False,
        True,
        True,
    ]
    image(tmp_path / "a" / "3_sat.tif")
    with pytest.raises(DataError, match=r"several images for '3': 3.png, 3_sat.tif"):
        samples_from(tmp_path / "a", tmp_path / "b", unlabelled=True)


def test_valid_pictures_join(tmp_path, caplog):
    for i in range(2):
        image(tmp_path / "images" / f"{i}.png")
        mask(tmp_path / "masks" / f"{i}.png")
    mask(tmp_path / "valid" / "1.png")
    samples = open_samples(tmp_path)
    assert [bool(v) for v in samples["valid"]] == [
        False,
        True,
    ] and "1 images have no valid mask and count as whole: 0" in caplog.text
    mask(tmp_path / "valid" / "7.png")
    with pytest.raises(DataError, match="1 valid masks without an image: 7"):
        open_samples(tmp_path)


def test_folders_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder; looked from"):
        samples_from(tmp_path / "nowhere", tmp_path)
    with pytest.raises(DataError, match="no image in this folder"):
        samples_from(tmp_path, tmp_path)
    with pytest.raises(DataError, match="pattern matches no file"):
        list_rasters(str(tmp_path / "*.tif"))
    with pytest.raises(DataError, match="empty list"):
        list_rasters([])


def test_touching_footprints_are_one_scene(tmp_path):
    for i, east in enumerate((0, 12, 24, 500)):
        image(tmp_path / "i" / f"{i}.tif", crs=UTM, transform=from_origin(3e5 + east, 4.7e6, 0.5, 0.5))
        mask(tmp_path / "m" / f"{i}.png")
    samples = samples_from(tmp_path / "i", tmp_path / "m")
    assert samples["scene"].tolist() == ["0", "0", "0", "3"] and samples["gsd_m"].tolist() == [0.5] * 4
    assert samples_from(tmp_path / "i", tmp_path / "m", scene=lambda name: int(name) // 2)[
        "scene"
    ].tolist() == ["0", "0", "1", "1"]
    assert not len(validate_samples(samples.assign(split=["train"] * 3 + ["test"])))


def test_a_damaged_file_stays_for_the_scan(tmp_path):
    for i in range(3):
        image(tmp_path / "i" / f"{i}.tif")
        mask(tmp_path / "m" / f"{i}.png")
    (tmp_path / "i" / "1.tif").write_bytes(b"II*")
    samples = samples_from(tmp_path / "i", tmp_path / "m", gsd_m=1)
    assert len(samples) == 3 and scan_samples(samples, progress=False).query(
        "severity == 'fault' and kind == 'unreadable'"
    )["sample"].tolist() == ["1"]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=30))
def test_touching_is_the_closure_of_touch(corners):
    "Against the plain definition: flood from box to box."
    group, label = [-1] * len(corners), 0
    for start in range(len(corners)):
        if group[start] >= 0:
            continue
        front = [start]
        while front:
            i = front.pop()
            if group[i] >= 0:
                continue
            group[i] = label
            front += [
                j
                for j, c in enumerate(corners)
                if abs(c[0] - corners[i][0]) <= 2 and abs(c[1] - corners[i][1]) <= 2
            ]
        label += 1
    got = touching([shapely.box(x, y, x + 2, y + 2) for x, y in corners])
    assert len(set(zip(got, group))) == len(set(got)) == len(set(group))


# Massachusetts


def original(folder, counts, base="tiff", val="val"):
    for split, n in zip(("train", val, "test"), counts):
        for i in range(n):
            name = f"{1000 + 30 * (i % 40):04}{6000 + 30 * (i // 40) + (1000 if split != 'train' else 0) + (500 if split == 'test' else 0):04}_15"
            touch(folder / base / split / f"{name}.tiff")
            touch(folder / base / f"{split}_labels" / f"{name}.tif")


def test_original_layout_with_official_counts(tmp_path, caplog):
    original(tmp_path, (1108, 14, 49))
    samples = massachusetts(tmp_path)
    assert (
        samples["split"].value_counts().to_dict() == {"train": 1108, "test": 49, "valid": 14}
        and "official" not in caplog.text
    )
    assert (samples["gsd_m"] == 1).all() and samples["fill"].tolist() == [(255, 255, 255)] * 1171
    assert samples["scene"].nunique() == 1171 and ensure_split(samples)["split"].equals(samples["split"])
    assert [Path(r.image).stem for r in samples.itertuples()] == [
        Path(r.label).stem for r in samples.itertuples()
    ]


@pytest.mark.parametrize(("base", "val"), [("tiff", "val"), (".", "valid"), ("png", "val")])
def test_other_counts_are_said(tmp_path, caplog, base, val):
    original(tmp_path, (5, 2, 1), base, val)
    assert open_samples(tmp_path)["split"].value_counts().to_dict() == {"train": 5, "valid": 2, "test": 1}
    assert "expected the official 1108/14/49 tiles of train/valid/test, found 5/2/1" in caplog.text


def test_sat_and_map_folders(tmp_path):
    for split in ("train", "valid", "test"):
        touch(tmp_path / split / "sat" / f"{TILES[0]}.tiff")
        touch(tmp_path / split / "map" / f"{TILES[0]}.tif")
    assert massachusetts(tmp_path)["split"].tolist() == ["train", "valid", "test"]


def test_official_split_with_touching_tiles_is_kept_and_said(tmp_path, caplog):
    for split, tile in (("train", TILES[0]), ("test", TILES[1]), ("val", TILES[4])):
        touch(tmp_path / "tiff" / split / f"{tile}.tiff")
        touch(tmp_path / "tiff" / f"{split}_labels" / f"{tile}.tif")
    samples = massachusetts(tmp_path)
    assert "1 groups of touching tiles cross the official split" in caplog.text
    assert (samples.groupby("scene")["split"].nunique() == 1).all()


def test_a_label_that_is_missing(tmp_path):
    original(tmp_path, (3, 1, 1))
    next((tmp_path / "tiff" / "train_labels").iterdir()).unlink()
    with pytest.raises(DataError, match="1 images without a label"):
        massachusetts(tmp_path)


def kaggle(folder, tiles, have="tiff"):
    rows = []
    for tile, split in zip(tiles, ["train", "train", "val", "test"] * 9):
        row = dict(
            image_id=tile,
            split=split,
            image_souce_url="",
            label_source_url="",
            tiff_image_path=f"tiff/{split}/{tile}.tiff",
            tif_label_path=f"tiff/{split}_labels/{tile}.tif",
            png_image_path=f"png/{split}/{tile}.png",
            png_label_path=f"png/{split}_labels/{tile}.png",
        )
        rows.append(row)
        for column in (
            ("tiff_image_path", "tif_label_path") if have == "tiff" else ("png_image_path", "png_label_path")
        ):
            touch(folder / row[column])
    pd.DataFrame(rows).to_csv(folder / "metadata.csv", index=False)


@pytest.mark.parametrize("have", ["tiff", "png"])
def test_metadata_csv(tmp_path, have):
    kaggle(tmp_path, TILES, have)
    pd.DataFrame({"name": ["road"], "r": [255]}).to_csv(tmp_path / "label_class_dict.csv")
    samples = open_samples(tmp_path)
    assert samples["split"].value_counts().to_dict() == {"train": 4, "valid": 1, "test": 1}
    assert {Path(p).suffix for p in samples["image"]} == {".tiff" if have == "tiff" else ".png"} and (
        samples["gsd_m"] == 1
    ).all()
    (Path(samples["image"][0])).unlink()
    (Path(samples["label"][3])).unlink()
    with pytest.raises(DataError, match="metadata.csv lists 2 pairs that are not there: line 2"):
        open_samples(tmp_path)


def test_list_of_pairs_without_split(tmp_path):
    "The layout of the 199-pair subset: train.csv with the columns images and masks."
    for tile in TILES:
        touch(tmp_path / "images" / f"{tile}.png")
        touch(tmp_path / "masks" / f"{tile}.png")
    table = pd.DataFrame(
        {"images": [f"images/{t}.png" for t in TILES[:5]], "masks": [f"masks/{t}.png" for t in TILES[:5]]}
    )
    table.to_csv(tmp_path / "train.csv", index=False)
    samples = open_samples(tmp_path)
    assert len(samples) == 5 and (samples["split"] == "").all() and samples["scene"].nunique() == 3
    assert (split_by_scene(samples).groupby("scene")["split"].nunique() == 1).all()


def test_unknown_split_in_a_csv(tmp_path):
    kaggle(tmp_path, TILES)
    text = (tmp_path / "metadata.csv").read_text().replace(",test,", ",final,")
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(DataError, match="unknown split 'final'"):
        massachusetts(tmp_path)


@given(st.integers(334, 3399), st.integers(1000, 9999))
def test_positions(east, north):
    if east >= 1000:
        assert massachusetts_position(f"{east}{north}_15") == (east, north)
    elif east >= 340:
        assert massachusetts_position(f"{east}3{north}_15") == (east, north)


def test_folder_layout_with_and_without_place(tmp_path, caplog):
    for tile in [*TILES, "val01", "val02"]:
        touch(tmp_path / "images" / f"{tile}.jpg")
        touch(tmp_path / "masks" / f"{tile}.png")
    with caplog.at_level(logging.INFO):
        samples = open_samples(tmp_path)
    scenes = dict(zip(names(samples), samples["scene"]))
    assert len({scenes[f"{t}.jpg"] for t in TILES[:3]}) == 1 and samples["scene"].nunique() == 6
    assert "2 tiles carry no place in their name and are one scene each: val01, val02" in caplog.text
    assert set(samples["fill"]) == {(255, 255, 255)}


def test_nothing_of_massachusetts(tmp_path):
    with pytest.raises(DataError, match="no Massachusetts Roads here; looked for tiff/train"):
        massachusetts(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        massachusetts(tmp_path / "x")


# DeepGlobe


@pytest.mark.parametrize(("images", "masks"), [(".", "."), ("train", "train"), ("images", "masks")])
def test_deepglobe_layouts(tmp_path, caplog, images, masks):
    for n in (104, 6, 99):
        touch(tmp_path / images / f"{n}_sat.jpg")
    for n in (104, 6):
        touch(tmp_path / masks / f"{n}_mask.png")
    samples = open_samples(tmp_path)
    assert (
        samples["scene"].tolist() == ["6", "104"]
        and (samples["gsd_m"] == 0.5).all()
        and "1 images without a mask left out: 99" in caplog.text
    )
    assert open_samples(tmp_path, unlabelled=True)["label"].map(bool).tolist() == [True, False, True]
    touch(tmp_path / masks / "7_mask.png")
    with pytest.raises(DataError, match="1 masks without an image: 7"):
        deepglobe(tmp_path)


def test_deepglobe_without_masks(tmp_path):
    with pytest.raises(DataError, match="no DeepGlobe here"):
        deepglobe(tmp_path)
    touch(tmp_path / "1_sat.jpg")
    with pytest.raises(DataError, match=r"1 images and no \*_mask.png"):
        deepglobe(tmp_path)


# Drawn scenes


def test_synthetic_is_drawn_once(tmp_path, monkeypatch):
    drawn, plain = [], synthetic.scene
    monkeypatch.setattr(synthetic, "scene", lambda **a: drawn.append(a["seed"]) or plain(**a))
    options = dict(size=64, gsd_m=1.0, progress=False)
    two = synthetic_samples(tmp_path, n=2, **options)
    three = synthetic_samples(tmp_path, n=3, **options)
    assert len(drawn) == len(set(drawn)) == 3 and three.head(2).equals(two) and (three["gsd_m"] == 1).all()
    Path(next(tmp_path.glob("*/done/*"))).unlink()  # an interrupted scene
    houses = synthetic_samples(tmp_path, n=3, task="buildings", **options)
    assert (
        len(drawn) == 4
        and (houses["image"] == three["image"]).all()
        and (houses["label"] != three["label"]).all()
    )
    synthetic_samples(tmp_path, n=1, seed=1, **options)
    assert len(drawn) == 5 and len(set(drawn)) == 4
    assert not (scan_samples(split_by_scene(three), progress=False)["severity"] == "fault").any()
    for row in three.to_dict("records"):
        assert set(np.unique(read_sample(row)[1])) <= {0, 1}


def test_synthetic_by_name(tmp_path):
    samples = open_samples("synthetic", dict(n=3, size=64, gsd_m=1.0, progress=False), cache=tmp_path)
    assert len(samples) == samples["scene"].nunique() == 3 and (samples["split"] == "").all()
    with pytest.raises(DataError, match="task 'trees' is unknown"):
        open_samples("synthetic", dict(task="trees"), cache=tmp_path)
    with pytest.raises(DataError, match="1 scene or more"):
        open_samples("synthetic", dict(n=0), cache=tmp_path)


def test_drawing_code_covers_its_neighbours(tmp_path):
    for name, text in (
        ("synthetic", "from .plan import x"),
        ("plan", "from .terrain import y"),
        ("terrain", "1"),
        ("other", "2"),
    ):
        (tmp_path / f"{name}.py").write_text(text)
    module = type("Module", (), {"__file__": str(tmp_path / "synthetic.py")})
    before = catalog._drawing_code(module)
    (tmp_path / "other.py").write_text("3")
    assert catalog._drawing_code(module) == before
    (tmp_path / "terrain.py").write_text("4")
    assert catalog._drawing_code(module) != before


# Opening by folder


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such folder \(looked from .*'synthetic'"):
        open_samples(tmp_path / "nowhere")
    with pytest.raises(DataError, match="the folder is empty; was the download completed"):
        open_samples(tmp_path)
    (tmp_path / "readme.txt").write_text("x")
    (tmp_path / "images").mkdir()
    with pytest.raises(
        DataError, match=r"no known layout; looked for .*images/ \+ masks/.*found images, readme.txt"
    ):
        open_samples(tmp_path)


def test_generic_list_of_pairs(tmp_path):
    for i in range(3):
        image(tmp_path / "a" / f"{i}.tif", crs=UTM, transform=from_origin(3e5 + 900 * i, 4.7e6, 0.3, 0.3))
        mask(tmp_path / "b" / f"{i}.png")
    pd.DataFrame(
        {"image": [f"a/{i}.tif" for i in range(3)], "label": [f"b/{i}.png" for i in range(3)]}
    ).to_csv(tmp_path / "list.csv")
    samples = open_samples(tmp_path)
    assert samples["gsd_m"].tolist() == [0.3] * 3 and samples["fill"].isna().all()


def test_summary(tmp_path):
    for i in range(4):
        write_raster(tmp_path / "images" / f"{i}.png", np.roll(IMAGE, i, axis=2))  # one picture twice would be one scene
        mask(tmp_path / "masks" / f"{i}.png")
    samples = split_by_scene(
        samples_from(tmp_path / "images", tmp_path / "masks", gsd_m=10), (0.5, 0.25, 0.25)
    )
    plain = summarise(samples)
    assert plain["images"].to_dict() == {"train": 2, "valid": 1, "test": 1, "all": 4} and plain.loc[
        "all", "km2"
    ] == round(4 * 480 * 1e-4, 2)
    measured = summarise(samples, inspect_samples(samples, progress=False)[0])
    assert (
        measured.loc["all", "positive"] == f"{(MASK > 0).mean():.2%}"
        and measured.loc["all", "valid"] == "100.0%"
    )


# Inria, SpaceNet 7, Sat2Graph


def inria_tree(folder, cities=("austin",), numbers=range(1, 37), test=("sfo1",)):
    for city in cities:
        for i in numbers:
            touch(folder / "train" / "images" / f"{city}{i}.tif")
            touch(folder / "train" / "gt" / f"{city}{i}.tif")
    for name in test:
        touch(folder / "test" / "images" / f"{name}.tif")
    return folder


@pytest.mark.parametrize("top", [".", "AerialImageDataset", "NEW2-AerialImageDataset/AerialImageDataset"])
def test_inria_official(tmp_path, caplog, top):
    inria_tree(tmp_path / top, INRIA_CITIES)
    samples = open_samples(tmp_path)
    assert len(samples) == samples["scene"].nunique() == 180 and "not there" not in caplog.text
    assert samples["split"].value_counts().to_dict() == {"train": 155, "valid": 25}
    assert set(samples.query("split == 'valid'")["scene"]) == {f"{c}{i}" for c in INRIA_CITIES for i in range(1, 6)}
    assert samples["city"].value_counts().to_dict() == dict.fromkeys(INRIA_CITIES, 36) and (samples["gsd_m"] == 0.3).all()
    assert [Path(r.image).name for r in samples.itertuples()] == [Path(r.label).name for r in samples.itertuples()]
    study = inria(tmp_path, split="austin")
    assert study["split"].value_counts().to_dict() == {"train": 24, "valid": 6, "test": 6} and set(study["city"]) == {"austin"}
    assert set(study.query("split == 'test'")["scene"]) == {f"austin{i}" for i in range(31, 37)}
    cities = inria(tmp_path, split="")
    assert set(cities["scene"]) == set(INRIA_CITIES) and (cities["split"] == "").all()
    assert (split_by_scene(cities).groupby("city")["split"].nunique() == 1).all()


def test_inria_with_parts_missing(tmp_path, caplog):
    with pytest.raises(DataError, match="no Inria here; looked for AerialImageDataset/train/images"):
        inria(tmp_path)
    inria_tree(tmp_path, numbers=range(1, 31))
    assert inria(tmp_path, split="austin")["split"].value_counts().to_dict() == {"train": 24, "valid": 6}
    assert "6 of 36 tiles are not there, scores will not compare with published ones: austin31, austin32" in caplog.text
    assert inria(tmp_path, unlabelled=True).query("city == 'sfo'")[["label", "split"]].values.tolist() == [["", "test"]]
    with pytest.raises(DataError, match="split 'random' is unknown"):
        inria(tmp_path, split="random")
    touch(tmp_path / "train/images/notes.tif"), touch(tmp_path / "train/gt/notes.tif")
    with pytest.raises(DataError, match="notes are no names of a city and a number"):
        inria(tmp_path)
    (tmp_path / "train/gt/austin3.tif").unlink()
    with pytest.raises(DataError, match="1 images without a label: austin3"):
        open_samples(tmp_path)


def spacenet7_tree(folder, scenes, months, end="_Buildings.geojson"):
    for scene in scenes:
        for month in months:
            stem = f"global_monthly_{month}_mosaic_{scene}"
            touch(folder / scene / "images_masked" / f"{stem}.tif")
            touch(folder / scene / "labels_match" / f"{stem}{end}")
            touch(folder / scene / "labels_match_pix" / f"{stem}{end}")
    touch(folder / scenes[0] / "UDM_masks" / f"global_monthly_{months[-1]}_mosaic_{scenes[0]}_UDM.tif")


@pytest.mark.parametrize("top", [".", "train", "SN7_buildings_train/train"])
def test_spacenet7_layouts(tmp_path, top):
    scenes, months = ["L15-0331E-1257N_1327_3160_13", *SPACENET7_VALID], ["2020_01", "2018_01", "2018_11"]
    spacenet7_tree(tmp_path / top, scenes, months)
    samples = open_samples(tmp_path)
    assert len(samples) == 30 and samples["scene"].nunique() == 10 and samples["split"].value_counts().to_dict() == {"valid": 27, "train": 3}
    assert samples.groupby("scene")["month"].agg(list).map(tuple).unique().tolist() == [("2018-01", "2018-11", "2020-01")]
    assert samples["udm"].map(bool).sum() == 1 and samples.query("udm != ''")["month"].tolist() == ["2018-11"]
    assert (samples["gsd_m"] == 4).all(), "a file that cannot be opened: the nominal resolution"
    for row in samples.to_dict("records"):
        assert row["month"].replace("-", "_") in Path(row["label"]).name and row["scene"] in row["label"]
    assert spacenet7(tmp_path, months=2)["month"].unique().tolist() == ["2018-01", "2018-11"]
    assert len(spacenet7(tmp_path, scenes=scenes[:2], split="")) == 6
    faults = validate_samples(samples).query("severity == 'fault'")
    assert not len(faults), faults["message"].tolist()


def test_spacenet7_with_parts_missing(tmp_path):
    with pytest.raises(DataError, match="no SpaceNet 7 here; looked for train/SCENE/images_masked"):
        spacenet7(tmp_path)
    spacenet7_tree(tmp_path, ["A", "B"], ["2018_01", "2018_02"])
    for wrong, says in ((dict(scenes=["A", "C"]), "1 scenes are not here: C; fetch them, or choose of A, B"), (dict(months=0), "months must be 1 or more"),
                        (dict(split="random"), "split 'random' is unknown")):
        with pytest.raises(DataError, match=says):
            spacenet7(tmp_path, **wrong)
    next((tmp_path / "A/labels_match").glob("*2018_02*")).unlink()
    with pytest.raises(DataError, match="1 images have no labels_match: global_monthly_2018_02_mosaic_A.tif"):
        open_samples(tmp_path)
    assert spacenet7(tmp_path, unlabelled=True)["label"].map(bool).tolist() == [True, False, True, True]
    assert len(spacenet7(tmp_path, months=1)) == 2


def test_spacenet7_knows_its_resolution(tmp_path):
    "One degree of latitude is what it is, whatever Web Mercator says."
    for name, north in (("A", 0), ("B", 6_446_275.8)):
        image(tmp_path / name / "images_masked" / f"global_monthly_2018_01_mosaic_{name}.tif", crs=rasterio.CRS.from_epsg(3857), transform=from_origin(0, north, 4.777, 4.777))
        touch(tmp_path / name / "labels_match" / f"global_monthly_2018_01_mosaic_{name}_Buildings.geojson")
    gsd = open_samples(tmp_path).set_index("scene")["gsd_m"]
    assert gsd["A"] == pytest.approx(4.777, rel=0.01) and gsd["B"] == pytest.approx(4.777 * np.cos(np.deg2rad(50)), rel=0.01)


@pytest.mark.parametrize(("top", "end"), [(".", "png"), ("20cities", "png"), ("data/20cities", "jpg")])
def test_sat2graph_layouts(tmp_path, caplog, top, end):
    for i in range(181):
        for name in (f"sat.{end}", "refine_gt_graph.p", "gt.png", "refine_gt_graph_samplepoints.json"):
            touch(tmp_path / top / f"region_{i}_{name}")
    samples = open_samples(tmp_path)
    assert samples["split"].value_counts().to_dict() == {"train": 144, "test": 27, "valid": 9} and not caplog.text
    assert all(p.endswith("_refine_gt_graph.p") for p in samples["label"]) and samples["points"].map(bool).all() and (samples["gsd_m"] == 1).all()
    numbers = samples["scene"].str.removeprefix("region_").astype(int)
    assert sorted(numbers) == list(range(180)) and set(numbers[samples["split"] == "valid"]) == set(range(18, 180, 20))
    assert set(numbers[samples["split"] == "test"]) == {*range(9, 180, 10), *range(8, 180, 20)}
    assert all(p.endswith("_gt.png") for p in sat2graph(tmp_path, label="mask")["label"])


def test_sat2graph_with_parts_missing(tmp_path, caplog):
    with pytest.raises(DataError, match="no Sat2Graph tiles here; looked for region_N_sat.png"):
        sat2graph(tmp_path)
    for i in (3, 8):
        touch(tmp_path / f"region_{i}_sat.png"), touch(tmp_path / f"region_{i}_refine_gt_graph.p")
    assert sat2graph(tmp_path)["split"].tolist() == ["train", "test"] and "2 of 180 tiles" in caplog.text
    with pytest.raises(DataError, match="2 labels are not there: region_3_gt.png, region_8_gt.png"):
        sat2graph(tmp_path, label="mask")
    with pytest.raises(DataError, match="label 'road' is unknown"):
        sat2graph(tmp_path, label="road")


def test_buildings_of_massachusetts_by_the_folder_name(tmp_path, caplog):
    original(tmp_path / "mass_buildings", (137, 4, 10))
    assert len(open_samples(tmp_path / "mass_buildings")) == 151 and "official" not in caplog.text
    original(tmp_path / "mass_roads", (137, 4, 10))
    open_samples(tmp_path / "mass_roads")
    assert "expected the official 1108/14/49" in caplog.text
    caplog.clear()
    massachusetts_buildings(tmp_path / "mass_roads")
    assert not caplog.text


# A table beside the images


def test_notes_of_tiles(tmp_path, caplog):
    for n in ("a_0", "a_1", "b_0", "c_0"):
        write_raster(tmp_path / "images" / f"{n}.png", np.roll(IMAGE, hash(n) % 20, axis=2))
        mask(tmp_path / "masks" / f"{n}.png")
    rows = ["tile,city_tile,split,roof,who", "a_0,a,train,0.5,ann", "b_0,b,val,0.25,bob", "a_1,a,train,0,ann", "c_0,c,test,1,ann"]
    (tmp_path / "tiles.csv").write_text("\n".join(rows))
    samples = open_samples(tmp_path)
    assert samples.set_index(samples["image"].map(lambda p: Path(p).stem))[["scene", "split", "roof", "who"]].T.to_dict("list") == {
        "a_0": ["a", "train", 0.5, "ann"], "a_1": ["a", "train", 0, "ann"], "b_0": ["b", "valid", 0.25, "bob"], "c_0": ["c", "test", 1, "ann"]}
    (tmp_path / "tiles.csv").write_text("\n".join(rows).replace("a_1,a,train", "a_1,a,test"))
    samples = open_samples(tmp_path)
    assert (samples["split"] == "").all() and samples["suggested"].tolist() == ["train", "test", "valid", "test"]
    assert "kept as `suggested`, not used: it parts the touching images of 1 scenes" in caplog.text
    (tmp_path / "tiles.csv").write_text("\n".join(rows[:-1]))
    assert list(open_samples(tmp_path).columns) == catalog.COLUMNS and "does not name every image once" in caplog.text


def test_real_suggested_split_parts_neighbours(caplog):
    samples = open_samples(real("roofs", "oam_1024"))
    assert (samples["split"] == "").all() and samples["suggested"].value_counts().to_dict() == {"train": 18, "valid": 6}
    assert samples["place"].nunique() == 4 and "touching images of 5 scenes" in caplog.text


# What is no data set


def test_errors_look_around(tmp_path):
    for n in ("one/images", "one/masks", "deep/two/images", "deep/two/masks"):
        mask(tmp_path / n / "1.png")
    with pytest.raises(DataError, match="no known layout at its top, but data sets below: deep/two, one; open one of them"):
        open_samples(tmp_path)
    with pytest.raises(DataError, match="1 rasters .1.png. and nothing that says which are labels; open the folder above it"):
        open_samples(tmp_path / "one" / "images")
    assert open_samples(tmp_path / "one" / "images", unlabelled=True)["label"].tolist() == [""]
    touch(tmp_path / "one" / "images" / "roofs.gpkg")
    with pytest.raises(DataError, match="1.png with the vectors roofs.gpkg; burn the vectors into class maps with aerial_masks IMAGES LABELS OUT"):
        open_samples(tmp_path / "one" / "images")


def test_vectors_are_no_masks(tmp_path):
    image(tmp_path / "images" / "1.png")
    touch(tmp_path / "labels" / "1.geojson")
    for labels in (tmp_path / "labels", tmp_path / "labels" / "1.geojson", str(tmp_path / "labels" / "*.geojson")):
        with pytest.raises(DataError, match="1.geojson are vectors, not rasters; burn them.*aerial_masks IMAGES LABELS OUT"):
            samples_from(tmp_path / "images", labels)


def test_one_image_and_one_label_by_name(tmp_path):
    a, b = image(tmp_path / "ortho.tif"), mask(tmp_path / "truth_2021.png")
    samples = samples_from(a, b)
    assert samples["scene"].tolist() == ["ortho"] and names(samples, "label") == ["truth_2021.png"]
    assert samples_from([a], [b]).equals(samples)
    image(tmp_path / "i" / "x.tif"), mask(tmp_path / "m" / "y.png")
    with pytest.raises(DataError, match="1 images without a label: x"):
        samples_from(tmp_path / "i", tmp_path / "m")


def test_side_by_side(tmp_path):
    for n in ("a_image.tif", "b_image.tif"):
        write_raster(tmp_path / n, np.roll(IMAGE, ord(n[0]), axis=2))
    mask(tmp_path / "a_mask.tif"), mask(tmp_path / "b_mask.tif")
    assert open_samples(tmp_path)["scene"].tolist() == ["a", "b"]
    (tmp_path / "b_mask.tif").unlink()
    with pytest.raises(DataError, match="1 images without a label: b"):
        open_samples(tmp_path)


@pytest.mark.parametrize("folder", ["", "roofs", "spacenet", "spacenet/atlanta_buildings", "spacenet/vegas_roads", "roadgraphs/apls/vegas_img0", "roofs/whu_512/images"])
def test_real_folders_that_are_no_data_set_say_why(folder):
    with pytest.raises(DataError, match="open one of them|burn the vectors into class maps|open the folder above it") as told:
        open_samples(real(*folder.split("/")))
    assert len(str(told.value)) < 700


# Real folders


def real(*parts):
    path = REAL.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"the real data {'/'.join(parts)} is not on this machine")
    return path


@pytest.mark.parametrize(
    ("folder", "images", "scenes", "gsd_m"),
    [
        ("massachusetts_roads", 40, 37, 1),
        ("massachusetts_roads_full", 10, 10, 1),
        ("deepglobe", 4, 4, 0.5),
        ("roofs/oam_1024", 24, 9, None),
        ("roofs/inria_256", 39, 6, None),
        ("roofs/whu_512", 15, 15, None),
        ("roofs/loveda_1024", 2, 2, None),
        ("spacenet/rio_buildings", 11, None, 0.5),
        ("spacenet/vegas_buildings_16bit", 1, 1, 0.27),
    ],
)
def test_real_folders_open(folder, images, scenes, gsd_m):
    samples = open_samples(real(*folder.split("/")))
    assert len(samples) == images and (scenes is None or samples["scene"].nunique() == scenes)
    if gsd_m:
        assert samples["gsd_m"].to_numpy() == pytest.approx(gsd_m, rel=0.05)  # nominal
    split = ensure_split(samples) if samples["scene"].nunique() > 2 else samples.assign(split="train")
    assert (split.groupby("scene")["split"].nunique() == 1).all() and len(split_hash(split)) == 16
    faults = validate_samples(split).query("severity == 'fault'")
    assert not len(faults), faults["message"].tolist()


def test_real_scan_is_quick_and_clean():
    import time

    samples = open_samples(real("massachusetts_roads_full"))
    start = time.perf_counter()
    found = scan_samples(samples, progress=False)
    assert not len(found), found["message"].tolist()
    assert time.perf_counter() - start < 10


def test_real_hard_cases_are_named():
    "Black tiles and open water of Rio."
    found = scan_samples(open_samples(real("spacenet", "rio_buildings")), progress=False)
    assert found.query("kind == 'blank'")["sample"].tolist() == ["img58"]
    assert set(found.query("kind == 'empty'")["sample"]) == {"img58", "img59", "img60", "img62"}


def test_real_neighbours_look_alike_at_their_edge():
    "Names are places: the right column of a tile continues in the left column of the tile 15 units east of it."
    samples = open_samples(real("massachusetts_roads"))
    pairs = samples.groupby("scene")["image"].agg(list)
    west, east = next(
        p
        for p in pairs
        if len(p) == 2
        and massachusetts_position(Path(p[0]).stem)[1] == massachusetts_position(Path(p[1]).stem)[1]
    )
    rows = {r["image"]: r for r in samples.to_dict("records")}
    (a, _), (b, _) = (read_sample(rows[p]) for p in (west, east))
    both = a.valid[:, -1] & b.valid[:, 0]
    assert both.sum() > 100
    assert np.corrcoef(a.data.mean(0)[:, -1][both], b.data.mean(0)[:, 0][both])[0, 1] > 0.7

"""Explore: what is blank, what labels lie on, how far they are shifted, what belongs together, and what a person is told."""
import logging
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rasterio.transform import from_origin

from aerial_nb.data.catalog import massachusetts, samples_from
from aerial_nb.data.checks import read_sample
from aerial_nb.data.explore import aerial_explore, explore
from aerial_nb.data.measure import blank_part, continued, look_alikes, measure, objects_of
from aerial_nb.data.raster import DataError, write_raster
from aerial_nb.data.shift import TRUST, mean_shift, shift_surface, summit, working_factor
from aerial_nb.data.synthetic import scene
from aerial_nb.data.worries import LEVELS, ordered

DATA = Path(__file__).parents[1] / "../shared/data"
needs = lambda name: pytest.mark.skipif(not (DATA / name).is_dir(), reason=f"{name} is not on this machine")


@pytest.fixture(scope="module")
def scenes():
    return [scene(size=320, seed=s, gsd_m=0.5) for s in range(1, 7)]


def moved(mask, east, south): return np.roll(mask, (south, east), (0, 1)).astype("uint8")


# ---- shift

@settings(max_examples=8, deadline=None)
@given(st.integers(-9, 9), st.integers(-9, 9), st.sampled_from([2, 3, 4]))
def test_houses_moved_by_a_known_amount_are_found_in_each_scene(scenes, east, south, which):
    here = scenes[which]
    found = summit(shift_surface(here.image, moved(here.buildings == 1, east, south), here.valid))
    assert abs(found[0] - east) < 0.6 and abs(found[1] - south) < 0.6 and found[2] > TRUST


@pytest.mark.parametrize("east, south", [(0, 0), (5, -3), (-8, 6)])
def test_roads_moved_by_a_known_amount_are_found_in_a_few_scenes(scenes, east, south):
    found = mean_shift([shift_surface(s.image, moved(s.roads == 1, east, south), s.valid) for s in scenes])
    assert abs(found.east_px - east) < 0.7 and abs(found.south_px - south) < 0.7 and found.sure and found.tiles == 6
    assert found.distance_px == pytest.approx(np.hypot(found.east_px, found.south_px))


def test_labels_of_other_places_have_no_shift(scenes):
    found = mean_shift([shift_surface(a.image, b.buildings == 1, a.valid) for a, b in zip(scenes, scenes[1:] + scenes[:1])])
    assert not found.sure


def test_a_shift_is_given_in_pixels_of_the_image(scenes):
    "The same scenes at half the pixel size, averaged back: a shift of 8 px is one of 8 px."
    fine = [np.kron(s.image, np.ones((1, 2, 2), "uint8")) for s in scenes[:4]]
    labels = [np.kron(moved(s.buildings == 1, 4, 0), np.ones((2, 2), "uint8")) for s in scenes[:4]]
    surfaces = [shift_surface(i, m, np.ones(m.shape, bool), factor=2) for i, m in zip(fine, labels)]
    found = mean_shift(surfaces, factor=2)
    assert abs(found.east_px - 8) < 1 and abs(found.south_px) < 1 and "8." in found.words() or "7." in found.words()
    assert [working_factor(g) for g in (0.07, 0.3, 1.0, None, np.nan)] == [4, 1, 1, 1, 1]


def test_the_border_of_a_blank_part_is_no_edge(scenes):
    "A white corner has the strongest edge of the picture; labels cut there with it must not pull the answer to zero."
    here = scenes[2]
    image, valid = here.image.copy(), np.ones((320, 320), bool)
    valid[:, :110] = False; image[:, ~valid] = 255
    label = moved(here.buildings == 1, 6, 2); label[~valid] = 255
    found = summit(shift_surface(image, label, valid))
    assert abs(found[0] - 6) < 0.8 and abs(found[1] - 2) < 0.8


def test_nothing_to_see_gives_no_shift():
    blank = np.zeros((3, 200, 200), "uint8")
    assert shift_surface(blank, np.zeros((200, 200), "uint8"), np.ones((200, 200), bool)) is None
    assert shift_surface(blank[:, :20, :20], np.ones((20, 20), "uint8"), np.ones((20, 20), bool)) is None
    assert mean_shift([None, None]) is None
    flat = shift_surface(blank, np.kron(np.eye(2), np.ones((100, 100))).astype("uint8"), np.ones((200, 200), bool))
    assert not mean_shift([flat] * 4).sure


# ---- blank

SHAPES = {"corner": lambda y, x: x + y < 120, "strip": lambda y, x: x < 25, "most": lambda y, x: y > 40, "slant": lambda y, x: x * 0.6 + y > 210}


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (190, 190, 190)])
@pytest.mark.parametrize("shape", SHAPES)
def test_undeclared_fill_is_found_to_the_pixel(scenes, shape, colour):
    blank = SHAPES[shape](*np.mgrid[:320, :320])
    image = np.where(blank, np.array(colour, "uint8")[:, None, None], scenes[0].image)
    found, said = blank_part(image, np.ones((320, 320), bool))
    assert (found == blank).mean() > 0.999 and said == tuple(map(float, colour))


def test_fill_survives_jpeg(scenes, tmp_path):
    blank = SHAPES["slant"](*np.mgrid[:320, :320])
    Image.fromarray(np.moveaxis(np.where(blank, np.uint8(255), scenes[0].image), 0, -1)).save(tmp_path / "a.jpg", quality=85)
    row = measure(dict(image=str(tmp_path / "a.jpg"), label="", gsd_m=1.0)).row
    assert abs(row["blank_share"] - blank.mean()) < 0.01 and row["lossy"]


def test_what_is_bright_is_not_blank(scenes):
    everywhere = np.ones((320, 320), bool)
    for s in scenes: assert not blank_part(s.image, everywhere)[0].any()
    roof = scenes[0].image.copy(); roof[:, 100:200, 120:220] = 255                        # a burnt-out roof
    field = np.where(np.random.default_rng(0).random((320, 320)) < 0.8, np.uint8(255), scenes[0].image)   # a speckled field, to the border
    for image in (roof, field): assert not blank_part(image, everywhere)[0].any()


def test_declared_blank_is_not_found_again(scenes):
    blank = SHAPES["corner"](*np.mgrid[:320, :320])
    assert not blank_part(np.where(blank, np.uint8(255), scenes[0].image), ~blank)[0].any()


@pytest.mark.parametrize("dtype, fill", [("uint16", 65535), ("uint16", 0), ("float32", 0), ("float32", np.nan)])
def test_fill_in_other_types(dtype, fill):
    image = np.random.default_rng(0).normal(900, 200, (4, 200, 200)).clip(1, 4000).astype(dtype)
    image[:, :, 150:] = fill
    found, _ = blank_part(image, np.ones((200, 200), bool))
    assert found[:, 150:].all() and not found[:, :150].any()
    assert blank_part(image[:, :, 150:], np.ones((200, 50), bool))[0].all()               # nothing else in it


# ---- objects, look-alikes, pieces of one picture

@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=9))
def test_objects_are_counted_and_measured(boxes):
    classes = np.zeros((32, 32), "uint8")
    for i, (h, w) in enumerate(boxes): classes[1 + 10 * (i // 3):, :][:h, 1 + 10 * (i % 3):][:, :w] = 1 + i % 2
    sizes, cut = objects_of(classes)
    assert sorted(sizes) == sorted(h * w for h, w in boxes) and cut == 0
    assert objects_of(np.pad(classes, 0)[1:, :])[1] == min(len(boxes), 3)                 # the first row of boxes now touches the border


def tiles_of(image, side):
    return [image[:, r:r + side, c:c + side] for r in range(0, image.shape[1], side) for c in range(0, image.shape[2], side)]


def measured(images, tmp_path):
    return [measure(dict(image=str(write_raster(tmp_path / f"{i}.png", a)), label="", gsd_m=1.0)) for i, a in enumerate(images)]


def test_pieces_of_one_picture_find_each_other_and_no_stranger(scenes, tmp_path):
    images = tiles_of(scenes[0].image, 160) + tiles_of(scenes[2].image, 160)
    order = np.random.default_rng(0).permutation(len(images))
    found = {(order[a], side, order[b]) for a, b, side in continued([m.edges for m in measured([images[i] for i in order], tmp_path)])}
    assert found == {(k + a, side, k + b) for k in (0, 4) for a, side, b in ((0, "right", 1), (2, "right", 3), (0, "below", 2), (1, "below", 3))}


def test_copies_that_were_changed_look_alike_and_neighbours_do_not(scenes, tmp_path):
    original, rng = scenes[3].image, np.random.default_rng(0)
    noisy = (original * 0.8 + rng.normal(15, 4, original.shape)).clip(0, 255).astype("uint8")
    Image.fromarray(np.moveaxis(original, 0, -1)).save(tmp_path / "q.jpg", quality=30)
    images = [s.image for s in scenes] + [noisy, np.moveaxis(np.array(Image.open(tmp_path / "q.jpg")), -1, 0), np.full((3, 320, 320), 200, "uint8")]
    found = {(a, b) for a, b, _ in look_alikes([m.likeness for m in measured(images, tmp_path)])}
    assert found == {(3, 6), (3, 7), (6, 7)}


# ---- a whole data set

def write_set(folder: Path, scenes, n=6, blank=(), shift=(0, 0), georeferenced=True, **options) -> pd.DataFrame:
    for i in range(n):
        image, place = scenes[i].image.copy(), dict(crs=scenes[i].crs, transform=scenes[i].transform) if georeferenced else {}
        if i in blank: image[:, SHAPES["most"](*np.mgrid[:320, :320])] = 255
        write_raster(folder / "images" / f"t{i}.tif", image, **place)
        write_raster(folder / "masks" / f"t{i}.tif", moved(scenes[i].buildings == 1, *shift), **place)
    return samples_from(folder / "images", folder / "masks", **options)


def says(found, text, level=None):
    return any(text in w.text and level in (None, w.level) for w in found.worries)


def test_labels_on_undeclared_blank_come_first(scenes, tmp_path):
    samples = write_set(tmp_path, scenes, blank=(1, 4))
    found = explore(samples, progress=False)
    assert found.worries[0].level == "stop" and "In 2 of 6 tiles most of the labels lie on blank pixels" in found.worries[0].text
    assert says(found, "2 of 6 tiles are partly blank, and no file says so: the colour (255, 255, 255)", "stop")
    assert set(found.worries[0].samples) == {"t1", "t4"}
    share = found.table.set_index("name")["blank_share"]
    assert share["t0"] == 0 and share["t1"] == pytest.approx(279 / 320)
    declared = explore(samples, fill=(255, 255, 255), progress=False)
    assert says(declared, "most of the labels lie on blank pixels", "look") and not says(declared, "no file says so")


def test_a_shift_of_all_labels_is_told_with_its_remedy(scenes, tmp_path):
    found = explore(write_set(tmp_path, scenes, shift=(6, -3)), progress=False)
    (told,) = [w for w in found.worries if "beside the image edges" in w.text]
    assert told.level == "stop" and re.search(r"[56]\.\d east, [23]\.\d north", told.text) and re.search(r"-[56]\.\d px in columns and \+[23]\.\d px in rows", told.text)
    assert not says(explore(write_set(tmp_path / "b", scenes), progress=False), "beside the image edges")


def test_every_damaged_file_is_named_and_the_rest_is_explored(scenes, tmp_path):
    samples = write_set(tmp_path, scenes)
    images = [Path(p) for p in samples["image"]]
    images[0].write_bytes(images[0].read_bytes()[:3000])
    write_raster(Path(samples["label"][1]), np.zeros((10, 10), "uint8"))
    images[2].unlink()
    write_raster(Path(samples["label"][4]), np.full((320, 320), 77, "uint8"))
    images[5].write_bytes(images[3].read_bytes())
    found = explore(samples, progress=False)
    for name, text in (("t0", "1 image that cannot be read"), ("t1", "1 label of another size"), ("t2", "1 file that is not there"),
                       ("t4", "1 label that cannot be understood"), ("t5", "1 tile that is there twice")):
        assert any(text in w.text and name in w.text and w.level == "stop" for w in found.worries), text
    assert str(tmp_path) not in repr(found) and len(found.table) == 2 and {w.level for w in found.worries[:5]} == {"stop"}
    assert [LEVELS.index(w.level) for w in found.worries] == sorted(LEVELS.index(w.level) for w in found.worries)


def test_copies_and_pieces_across_a_split(scenes, tmp_path):
    parts = tiles_of(scenes[0].image, 160)
    for i, part in enumerate(parts + [(parts[0] * 0.9).astype("uint8")]): write_raster(tmp_path / "images" / f"p{i}.png", part)
    samples = samples_from(tmp_path / "images").assign(split=["train", "test", "train", "valid", "test"])
    found = explore(samples, progress=False)
    assert says(found, "1 pair of tiles shows the same picture with other pixels, 1 of them in two splits: p0 = p4", "stop")
    assert says(found, "without a place continue each other at their borders", "stop")
    same = explore(samples.assign(scene="one", split=""), progress=False)
    assert not says(same, "continue each other") and says(same, "1 scene: there is nothing to split by")


def test_neighbours_of_two_splits_touch(scenes, tmp_path):
    for i, part in enumerate(tiles_of(scenes[0].image, 160)):
        write_raster(tmp_path / f"p{i}.tif", part, "EPSG:32633", from_origin(400_000 + 80 * (i % 2), 5_000_000 - 80 * (i // 2), 0.5, 0.5))
    samples = samples_from(tmp_path, scene=lambda name: name).assign(split=["train", "train", "test", "train"])
    assert says(explore(samples, progress=False), "tiles of two splits touch: p0 - p2", "look")


def test_deep_classes_and_unlabelled(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(3):
        write_raster(tmp_path / "images" / f"{i}.tif", rng.integers(100, 3000, (4, 128, 128)).astype("uint16"))
        if i < 2: write_raster(tmp_path / "masks" / f"{i}.tif", np.repeat(np.array([10, 10, 10, 20], "uint8"), 32)[:, None] * np.ones((1, 128), "uint8"))
    samples = samples_from(tmp_path / "images", tmp_path / "masks", unlabelled=True)
    found = explore(samples, labels=dict(classes={10: 0, 20: 2}), progress=False)
    assert "0: 75 %, 2: 25 %" in found.summary().loc["classes", ""] and found.summary().loc["bands", ""] == "4 of uint16"
    assert says(found, "uint16", "know") and says(found, "1 of 3 tiles have no label") and len(found.colours) == 4
    assert found.plot() is not None and found.contact_sheet(3) is not None
    bare = explore(samples.assign(label=""), progress=False)
    assert bare.summary().loc["labels", ""] == "none" and bare.plot() is not None


def test_splits_that_differ_and_too_few_scenes(scenes, tmp_path):
    samples = write_set(tmp_path, scenes).assign(split=["train"] * 4 + ["valid", "test"])
    write_raster(Path(samples["label"][5]), np.zeros((320, 320), "uint8"))
    found = explore(samples, progress=False)
    assert says(found, "Test tiles hold 0 % label pixels") and says(found, "The test has 1 scene") and says(found, "hold")


@pytest.mark.parametrize("samples, text", [(pd.DataFrame(columns=["image", "label", "scene", "split", "gsd_m"]), "no rows"), (pd.DataFrame(dict(image=["a"])), "no column label")])
def test_what_is_no_table_is_refused(samples, text):
    with pytest.raises(DataError, match=text): explore(samples, progress=False)


def test_nothing_readable_is_said_and_not_drawn(tmp_path):
    (tmp_path / "a.tif").write_bytes(b"nothing")
    found = explore(samples_from(tmp_path), progress=False)
    assert says(found, "1 image that cannot be read", "stop") and found.summary().loc["readable", ""] == 0
    with pytest.raises(DataError, match="no tile could be read"): found.plot()
    assert "No tile could be read" in found.save(tmp_path / "page.html").read_text()


def test_the_order_of_worries():
    found = explore.__globals__["Worry"]
    listed = ordered([found("know", "a", weight=9), found("stop", "b"), found("look", "c"), found("stop", "d", weight=1)])
    assert [w.text for w in listed] == ["d", "b", "c", "a"]


# ---- page, map, command

def test_the_page_holds_everything_and_no_path(scenes, tmp_path):
    found = explore(write_set(tmp_path / "<set>", scenes, n=3), progress=False)
    page = found.save(tmp_path / "out" / "page.html", title="<my> set").read_text()
    assert "&lt;my&gt; set" in page and page.count("data:image/png;base64") == 2 and "<iframe" in page and "t2" in page
    assert str(tmp_path) not in page and "tile.openstreetmap" not in page
    html = found._repr_html_()
    assert "What to worry about" in html and "3 in 3 scenes" in html
    assert found.map().get_root().render().count("&quot;Polygon") + found.map().get_root().render().count('"Polygon"') >= 3


def test_a_set_without_places_has_a_page_without_a_map(scenes, tmp_path):
    found = explore(write_set(tmp_path, scenes, n=2, georeferenced=False, gsd_m=0.5), progress=False)
    with pytest.raises(DataError, match="no image has a place"): found.map()
    assert "no image has a place" in found.save(tmp_path / "page.html").read_text()


def test_the_command(scenes, tmp_path, caplog):
    write_set(tmp_path, scenes, n=3, blank=(0,))
    with caplog.at_level(logging.INFO): aerial_explore(str(tmp_path), out=str(tmp_path / "page.html"), threads=1)
    assert "1 of 3 tiles is partly blank" in caplog.text and (tmp_path / "page.html").stat().st_size > 10_000
    for arguments, text in ((dict(data=str(tmp_path / "none")), "no such folder"), (dict(data=str(tmp_path), fill="white"), "fill 'white' is no colour")):
        caplog.clear()
        with pytest.raises(SystemExit) as stop: aerial_explore(**arguments)
        assert stop.value.code == 1 and text in caplog.text and "Traceback" not in caplog.text


def test_exploring_needs_neither_torch_nor_fastai():
    code = "import sys, aerial_nb.data.explore, aerial_nb.data.door; print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'fastai', 'folium', 'matplotlib'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


# ---- real data

@needs("massachusetts_roads")
def test_massachusetts_labels_on_blank_pixels_are_found_without_help_and_with_it():
    samples = massachusetts(DATA / "massachusetts_roads").iloc[::13].reset_index(drop=True)
    stats = pd.read_csv(DATA / "massachusetts_roads/stats.csv")
    bare = explore(samples.assign(valid="", fill=None), progress=False)
    assert says(bare, f"All {len(samples)} tiles are partly blank, and no file says so: the colour (255, 255, 255)", "stop")
    assert bare.worries[0].level == "stop" and "most of the labels lie on blank pixels" in bare.worries[0].text
    true = [1 - read_sample(row)[0].valid.mean() for row in samples.to_dict("records")]
    assert np.abs(bare.table["blank_share"] - true).max() < 0.01
    with_masks = explore(samples, progress=False)
    assert says(with_masks, "most of the labels lie on blank pixels", "look") and not says(with_masks, "no file says so")
    assert len(stats) and with_masks.map().get_root().render().count('"type": "Polygon"') == len(samples)   # placed by their names


@needs("roofs/oam_1024")
def test_roofs_of_a_real_survey_lie_where_they_should_and_moved_ones_do_not():
    samples = samples_from(DATA / "roofs/oam_1024/images", DATA / "roofs/oam_1024/masks").iloc[:6]
    factor = working_factor(samples["gsd_m"].median())
    read = [read_sample(row) for row in samples.to_dict("records")]
    for east, south in ((0, 0), (24, -12)):
        found = mean_shift([shift_surface(p.data, moved(c == 1, east, south), p.valid, factor) for p, c in read], factor)
        assert abs(found.east_px - east) < 3 and abs(found.south_px - south) < 3 and found.sure


@needs("roofs/inria_256")
def test_the_strips_of_inria_are_recognised():
    samples = samples_from(DATA / "roofs/inria_256/images", DATA / "roofs/inria_256/masks")
    names = [Path(p).stem for p in samples["image"]]
    found = continued([measure(row, factor=0).edges for row in samples.to_dict("records")])
    for a, b, side in found:
        (city, one), (other, two) = (names[i].rsplit("_", 1) for i in (a, b))
        assert city == other and int(two) - int(one) == (1 if side == "below" else 19)    # 19 crops down a column
    assert len(found) >= 10

"""Behaviour of aerial_nb.data.datasets: every entry says what it knows, and a fetch ends in a table or in a sentence."""

import hashlib
import html.parser
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from base64 import b64decode
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rasterio import CRS
from rasterio.transform import from_origin
from test_download import DATA, listing, program, serving

from aerial_nb.data import datasets, readers, sources
from aerial_nb.data.catalog import open_samples
from aerial_nb.data.datasets import DATASETS, aerial_fetch, catalog, dataset, downloaded, fetch
from aerial_nb.data.download import Line
from aerial_nb.data.raster import DataError, write_raster
from aerial_nb.data.sources import kaggle_headers
from aerial_nb.data.splits import SPLITS
from aerial_nb.data.table import COLUMNS, make_table, named

LINE = Line(sleep=lambda s: None, timeout_s=(5, 5))
TILES = ["17428750_15", "23279080_15", "24179185_15"]


@pytest.fixture
def host():
    with serving() as host:
        yield host


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    "No account of this machine, no data folder of this machine."
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "kaggle"))
    monkeypatch.setenv("AERIAL_DATA", str(tmp_path / "data"))


def got(entry, folder=None, **options):
    return fetch(entry, folder, progress=False, line=LINE, **options)


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


def png(seed=0):
    return write_bytes_of(np.random.default_rng(seed).integers(0, 2, (8, 8), dtype="uint8") * 255)


def write_bytes_of(array):
    from rasterio.io import MemoryFile

    with MemoryFile() as memory:
        with memory.open(driver="PNG", width=8, height=8, count=1, dtype="uint8") as out:
            out.write(array, 1)
        return bytes(memory.getbuffer())


def zip_of(contents):
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as z:
        for name, data in contents.items():
            z.writestr(name, data)
    return memory.getvalue()


# ---- the list


@pytest.mark.parametrize("entry", DATASETS.values(), ids=DATASETS)
def test_an_entry_says_what_it_must(entry):
    assert entry.base.startswith("https://") and entry.page.startswith("https://")
    for text in (entry.title, entry.task, entry.images, entry.crs, entry.split, entry.licence, entry.citation, entry.checksum):
        assert len(text) > 4
    assert re.match(r"none: \w|sha256|MD5", entry.checksum), "a sum, or why there is none"
    assert re.search(r"\b(19|20)\d\d\b", entry.citation) and entry.size_gb > 0 and 0 < entry.gsd_m < 10
    assert callable(entry.reader) and callable(entry.get)

    class Text(html.parser.HTMLParser):
        text = ""
        def handle_data(self, data): self.text += data

    shown = Text()
    shown.feed(entry._repr_html_())
    for text in (entry.title, entry.licence, entry.citation, entry.split): assert text in shown.text


def test_the_list_is_a_table():
    table = catalog()
    assert table.index.tolist() == list(DATASETS) and {"title", "licence", "split", "account"} <= set(table)
    assert {"inria", "spacenet7", "sat2graph", "deepglobe", "massachusetts_roads", "massachusetts_buildings", "massachusetts_199"} == set(DATASETS)


def test_an_unknown_name():
    assert dataset("inria").name == "inria"
    with pytest.raises(DataError, match="no data set is called 'spacenet'; did you mean spacenet7.*there are massachusetts_roads"):
        dataset("spacenet")
    with pytest.raises(DataError, match="no data set is called 'zzz'; there are"):
        dataset("zzz")


def test_the_austin_study_is_24_6_6():
    sides = [readers.inria_split("austin", i, "austin") for i in range(1, 37)]
    assert {s: [i + 1 for i, side in enumerate(sides) if side == s] for s in SPLITS} == {
        "train": [2, 3, 4, 5, 7, 8, 9, 10, 12, 13, 14, 15, 17, 18, 19, 20, 22, 23, 24, 25, 27, 28, 29, 30],
        "valid": [1, 6, 11, 16, 21, 26], "test": [31, 32, 33, 34, 35, 36]}


# ---- what is not there yet


def test_opening_by_name_names_the_command(tmp_path):
    with pytest.raises(DataError, match=r"spacenet7 is not here yet: looked in .*data/spacenet7; fetch its 8 GB with: aerial_fetch spacenet7, or set AERIAL_DATA"):
        open_samples("spacenet7")
    with pytest.raises(DataError, match=r"aerial_fetch deepglobe .it takes a Kaggle account"):
        open_samples("deepglobe")
    with pytest.raises(DataError, match="aerial_fetch inria --folder .*o.her place'"):
        downloaded("inria", tmp_path / "other place")
    with pytest.raises(DataError, match="pass a folder, or 'synthetic', or one of massachusetts_roads"):
        open_samples("nowhere")


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    for kind in ("images", "masks"): write_raster(tmp_path / "inria" / kind / "7.png", np.eye(8, dtype="uint8"))
    monkeypatch.chdir(tmp_path)
    assert open_samples("inria")["scene"].tolist() == ["7"]


# ---- Massachusetts


def mnih(host, names=TILES, kind="mass_roads"):
    for split, mine in zip(("train", "valid", "test"), ([n] for n in names)):
        for role, end in (("sat", "tiff"), ("map", "tif")):
            base = f"/data/{kind}/{split}/{role}/"
            links = "".join(f'<a href="{host.url}{base}/{n}.{end}">{n}</a>' for n in mine)
            host.files[f"{base}index.html"] = f'<a href="../">up</a>{links}'.encode()
            for n in mine: host.files[f"{base}{n}.{end}"] = DATA[:999] + role.encode()
    return replace(dataset("massachusetts_roads"), base=f"{host.url}/data/{kind}")


def test_massachusetts_from_pages_of_links(host, tmp_path, caplog):
    entry = mnih(host)
    samples = got(entry)
    home = tmp_path / "data/massachusetts_roads"
    assert samples["split"].tolist() == ["train", "valid", "test"] and samples["scene"].tolist() == TILES
    assert files(home) == sorted(f"{s}/{r}/{n}.{e}" for s, n in zip(("train", "valid", "test"), TILES) for r, e in (("sat", "tiff"), ("map", "tif")))
    assert "expected the official 1108/14/49" in caplog.text and list(samples.columns) == COLUMNS
    assert downloaded("massachusetts_roads").equals(samples) and open_samples("massachusetts_roads").equals(samples)
    before = len(host.seen)
    got(entry)
    assert all(s.path.endswith("index.html") for s in host.seen[before:])


def test_massachusetts_buildings_have_their_own_counts(host, caplog):
    entry = replace(mnih(host, kind="mass_buildings"), name="massachusetts_buildings", reader=readers.massachusetts_buildings)
    got(entry)
    assert "expected the official 137/4/10" in caplog.text
    caplog.clear()
    assert len(open_samples("massachusetts_buildings")) == 3 and "137/4/10" in caplog.text
    assert dataset("massachusetts_buildings").labels == dict(positive=(255, 0, 0))


def test_only_some_tiles(host, tmp_path):
    got(mnih(host), tmp_path / "some", scenes=[TILES[1]])
    assert files(tmp_path / "some") == [f"valid/map/{TILES[1]}.tif", f"valid/sat/{TILES[1]}.tiff"]
    with pytest.raises(DataError, match="has no scene 23279081_15; close: 23279080_15.*; see https://www.cs.toronto.edu"):
        got(mnih(host), tmp_path / "some", scenes=["23279081_15"])
    with pytest.raises(DataError, match="has no months"):
        got(mnih(host), tmp_path / "some", months=2)
    assert len(downloaded("massachusetts_roads", tmp_path / "some")) == 1, "a wrong wish leaves what is there whole"


def test_a_download_that_stops_is_said_to_be_half(host, tmp_path):
    entry = mnih(host)
    host.script[f"/data/mass_roads/test/map/{TILES[2]}.tif"] = [{"status": 404}]
    with pytest.raises(DataError, match="not there .404.*see|not there .404"):
        got(entry, scenes=TILES)
    with pytest.raises(DataError, match=f"the download was not finished; continue it with: aerial_fetch massachusetts_roads --scenes {','.join(TILES)}"):
        open_samples("massachusetts_roads")
    with pytest.raises(DataError, match="the download was not finished.*or remove .incomplete to take what is there"):
        open_samples(tmp_path / "data/massachusetts_roads")
    host.script.clear()
    assert len(got(entry, scenes=TILES)) == 3 and len(open_samples("massachusetts_roads")) == 3
    assert not (tmp_path / "data/massachusetts_roads/.incomplete").exists()


def test_a_page_that_has_moved(host):
    with pytest.raises(DataError, match="index.html: not there .404."):
        got(replace(dataset("massachusetts_roads"), base=f"{host.url}/old"))


def test_a_place_that_cannot_be_written(host, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot write there .*choose another place with --folder or AERIAL_DATA"):
        got(mnih(host), tmp_path / "file" / "deep")
    assert not host.seen


# ---- a zip


def pairs_zip(tiles=TILES):
    names = {f"Road_seg_dataset-5ca1/{k}/{t}.png": png() for t in tiles for k in ("images", "masks")}
    return zip_of(names | {"Road_seg_dataset-5ca1/train.csv": "images,masks\n" + "".join(f"images/{t}.png,masks/{t}.png\n" for t in tiles)})


def test_the_199_pairs(host, tmp_path):
    host.files["/HEAD.zip"] = pairs_zip()
    host.script["/HEAD.zip"] = [{"chunked": True, "etag": "", "cut": 500}, {"chunked": True, "etag": ""}]
    entry = replace(dataset("massachusetts_199"), base=f"{host.url}/HEAD.zip")
    samples = got(entry)
    assert sorted(samples["scene"]) == TILES and (samples["split"] == "").all() and samples["fill"].tolist() == [(255,) * 3] * 3
    assert files(tmp_path / "data/massachusetts_199") == sorted([f"{k}/{t}.png" for t in TILES for k in ("images", "masks")] + ["train.csv"])
    with pytest.raises(DataError, match="comes as a whole: leave out scenes and months"):
        got(entry, scenes=TILES[:1])
    before = len(host.seen)
    assert got(entry).equals(samples) and len(host.seen) == before


def test_a_zip_that_is_none(host, tmp_path):
    host.files["/HEAD.zip"] = b"PK not really"
    with pytest.raises(DataError, match="13 bytes that are no zip"):
        got(replace(dataset("massachusetts_199"), base=f"{host.url}/HEAD.zip"))
    assert [n for n in files(tmp_path / "data/massachusetts_199") if n.endswith(".png")] == []


# ---- Kaggle


def kaggle(host):
    return replace(dataset("deepglobe"), base=f"{host.url}/api/v1/datasets/download/roads")


def test_kaggle_needs_an_account_before_any_request(host):
    with pytest.raises(DataError, match=r"no credentials of Kaggle found. Kaggle wants an account: sign in at https://www.kaggle.com, choose Settings, API, Create New "
                                        r"Token, .*kaggle.json, or set KAGGLE_USERNAME and KAGGLE_KEY"):
        got(kaggle(host))
    assert not host.seen


@pytest.mark.parametrize("way", ["environment", "file", "token", "key", "file token"])
def test_kaggle_credentials(host, tmp_path, monkeypatch, way):
    if way == "environment": monkeypatch.setenv("KAGGLE_USERNAME", "ann"); monkeypatch.setenv("KAGGLE_KEY", "s3cret")
    elif way == "token": monkeypatch.setenv("KAGGLE_API_TOKEN", "KGAT_s3cret")
    elif way == "key": monkeypatch.setenv("KAGGLE_KEY", "KGAT_s3cret")
    else:
        (tmp_path / "kaggle").mkdir()
        (tmp_path / "kaggle/kaggle.json").write_text(json.dumps(dict(username="ann", key="KGAT_s3cret" if "token" in way else "s3cret")))
    kind, sent = kaggle_headers()["Authorization"].split()
    assert (kind, sent) == ("Bearer", "KGAT_s3cret") if kind == "Bearer" else b64decode(sent) == b"ann:s3cret"
    assert (kind == "Bearer") == (way in ("token", "key", "file token"))
    host.files["/files/x.zip"] = zip_of({"train/7_sat.jpg": b"j", "train/7_mask.png": b"p", "valid/8_sat.jpg": b"j", "metadata.csv": "image_id,split\n7,train\n"})
    host.script["/api/v1/datasets/download/roads"] = [{"status": 302, "headers": {"Location": f"{host.url.replace('127.0.0.1', 'localhost')}/files/x.zip"}}]
    assert got(kaggle(host))["scene"].tolist() == ["7"]
    assert [s.headers.get("Authorization") for s in host.seen] == [f"{kind} {sent}", None]


@pytest.mark.parametrize("text", ["{", "[]", '{"username": "ann"}', '"s3cret"'])
def test_a_kaggle_file_that_is_none(tmp_path, text):
    (tmp_path / "kaggle").mkdir()
    (tmp_path / "kaggle/kaggle.json").write_text(text)
    with pytest.raises(DataError, match="kaggle.json: not the JSON that Kaggle gives.*Create New Token") as told: kaggle_headers()
    assert "s3cret" not in str(told.value)


def test_kaggle_refuses(host, monkeypatch, caplog):
    monkeypatch.setenv("KAGGLE_USERNAME", "ann"); monkeypatch.setenv("KAGGLE_KEY", "s3cret")
    host.script["/api/v1/datasets/download/roads"] = [{"status": 403}]
    with caplog.at_level("DEBUG"), pytest.raises(DataError, match="does not admit.*credentials.*terms of use.*https://www.kaggle.com/datasets/balraj98") as told: got(kaggle(host))
    assert "s3cret" not in str(told.value) + caplog.text


# ---- Inria


def inria_host(host, monkeypatch, tmp_path):
    "Five small parts; a program that makes the zip of them."
    for n in sources.INRIA_SHA256: host.files[f"/a.7z.{n}"] = f"part {n}".encode()
    monkeypatch.setattr(sources, "INRIA_SHA256", {n: hashlib.sha256(f"part {n}".encode()).hexdigest() for n in sources.INRIA_SHA256})
    inner = tmp_path / "inner.zip"
    inner.write_bytes(zip_of({f"AerialImageDataset/train/{k}/{c}{i}.tif": png() for k in ("images", "gt") for c in ("austin", "tyrol-w") for i in (5, 6)}
                             | {"AerialImageDataset/test/images/sfo1.tif": png()}))
    monkeypatch.setenv("PATH", program(tmp_path / "bin", f"import shutil\nassert all(pathlib.Path(sys.argv[-1][:-3] + n).is_file() for n in {list(sources.INRIA_SHA256)})\n"
                                                         f"shutil.copy({str(inner)!r}, out / 'NEW2-AerialImageDataset.zip')"))
    return replace(dataset("inria"), base=f"{host.url}/a.7z")


def test_inria_from_its_parts(host, monkeypatch, tmp_path, caplog):
    entry = inria_host(host, monkeypatch, tmp_path)
    host.script["/a.7z.003"] = [{"cut": 3}, {}]
    samples = got(entry)
    assert samples.sort_values("scene")[["scene", "city", "split"]].values.tolist() == [["austin5", "austin", "valid"], ["austin6", "austin", "train"],
                                                                                        ["tyrol-w5", "tyrol-w", "valid"], ["tyrol-w6", "tyrol-w", "train"]]
    assert "176 of 180 tiles are not there" in caplog.text and (samples["gsd_m"] == 0.3).all()
    assert all(n.startswith("AerialImageDataset/") for n in files(tmp_path / "data/inria")), "parts and zip are gone"
    before = len(host.seen)
    got(entry)
    assert len(host.seen) == before
    assert open_samples("inria").equals(samples) and len(open_samples("inria", unlabelled=True)) == 5


def test_inria_asks_for_the_program_first(host, monkeypatch, tmp_path):
    entry = inria_host(host, monkeypatch, tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="7-Zip is not installed: install it"): got(entry)
    assert not host.seen


def test_inria_with_a_wrong_part(host, monkeypatch, tmp_path):
    entry = inria_host(host, monkeypatch, tmp_path)
    host.files["/a.7z.004"] = b"part 00X"
    with pytest.raises(DataError, match="a.7z.004: wrong bytes, removed: sha256:"): got(entry)
    host.files["/a.7z.004"] = b"part 004"
    host.seen.clear()
    assert len(got(entry)) == 4 and [s.path for s in host.seen] == ["/a.7z.004", "/a.7z.005"]


# ---- SpaceNet 7

AOI = ["L15-0331E-1257N_1327_3160_13", readers.SPACENET7_VALID[0]]


def bucket(host, tmp_path):
    "Two scenes; three months; clouds in one; files of other kinds that are not wanted."
    prefix = "spacenet/SN7_buildings/train/"
    host.files[f"/?list-type=2&prefix={prefix}&delimiter=/"] = listing([], folders=[f"{prefix}{a}/" for a in AOI])
    for i, aoi in enumerate(AOI):
        kinds = {"images_masked": ".tif", "labels_match": "_Buildings.geojson", "UDM_masks": "_UDM.tif"}
        for kind, end in kinds.items():
            keys = []
            for month in ("2018_02", "2018_01", "2017_12")[: 1 if kind == "UDM_masks" else 3]:
                key = f"{prefix}{aoi}/{kind}/global_monthly_{month}_mosaic_{aoi}{end}"
                made = write_raster(tmp_path / "made.tif", np.full((3, 8, 8), i, "uint8"), CRS.from_epsg(3857), from_origin(-1.36e7 + 9e5 * i, 4.5e6, 4.777, 4.777))
                data = made.read_bytes() if end == ".tif" else f"{aoi} {month} {kind}".encode()
                host.files[f"/{key}"] = data
                keys.append((key, hashlib.md5(data).hexdigest(), len(data)))
            host.files[f"/?list-type=2&prefix={prefix}{aoi}/{kind}/"] = listing([(f"{prefix}{aoi}/{kind}/", "0" * 32, 0)] + keys)
    return replace(dataset("spacenet7"), base=host.url)


def test_spacenet7_by_scene_and_month(host, tmp_path):
    entry = bucket(host, tmp_path)
    one = got(entry, scenes=[AOI[1]], months=2)
    assert one["month"].tolist() == ["2017-12", "2018-01"] and set(one["split"]) == {"valid"} and (one["udm"] == "").all()
    assert len(files(tmp_path / "data/spacenet7")) == 4
    both = got(entry)
    assert len(both) == 6 and both.groupby("scene")["split"].first().to_dict() == {AOI[0]: "train", AOI[1]: "valid"}
    assert both.query("month == '2018-02'")["udm"].map(lambda p: Path(p).name.endswith("_UDM.tif")).all() and all(p.endswith(".geojson") for p in both["label"])
    assert both["gsd_m"].between(3, 4).all() and len(files(tmp_path / "data/spacenet7")) == 14
    assert open_samples("spacenet7").equals(both)
    first = readers.spacenet7(tmp_path / "data/spacenet7", months=1, scenes=[AOI[0]], split="")
    assert first["month"].tolist() == ["2017-12"] and first["split"].tolist() == [""]


def test_spacenet7_says_what_is_wrong(host, tmp_path):
    entry = bucket(host, tmp_path)
    with pytest.raises(DataError, match=f"has no scene {AOI[0][:-1]}4; close: {AOI[0]}"): got(entry, scenes=[AOI[0][:-1] + "4"])
    with pytest.raises(DataError, match="months must be 1 or more, got 0"): got(entry, months=0)
    key = next(k for k in host.files if "labels_match/global_monthly_2018_01" in k)
    host.files[key] = host.files[key].replace(b"2018", b"2019")
    with pytest.raises(DataError, match="wrong bytes, removed: md5:"): got(entry)
    with pytest.raises(DataError, match="not finished; continue it with: aerial_fetch spacenet7"): open_samples("spacenet7")
    host.files["/?list-type=2&prefix=spacenet/SN7_buildings/train/&delimiter=/"] = listing([])
    with pytest.raises(DataError, match="the bucket has changed; see https://spacenet.ai"): got(entry)


# ---- by hand


def test_sat2graph_is_fetched_by_hand(tmp_path):
    with pytest.raises(DataError, match=r"sat2graph can be had by hand only: .*Google Drive folder.*Open https://drive.google.com/drive/folders/1FlMcO3Jr8W4qboZUwxgRn6AlYc-AuxQ2 "
                                        r"in a browser, .*unpack it into .*data/sat2graph, and open it with open_samples.'sat2graph'"): got("sat2graph")
    home = tmp_path / "data/sat2graph/20cities"
    home.mkdir(parents=True)
    for i in (7, 8, 18):
        for end in ("sat.png", "refine_gt_graph.p"): (home / f"region_{i}_{end}").touch()
    assert got("sat2graph")["split"].tolist() == ["train", "valid", "test"]
    assert open_samples("sat2graph")["scene"].tolist() == ["region_7", "region_18", "region_8"]


# ---- the command


def test_the_command_lists(capsys):
    assert aerial_fetch([]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in DATASETS) and len(text.splitlines()) == len(DATASETS) + 1


def test_the_command_fails_with_a_sentence(capsys):
    assert aerial_fetch(["deepglobe"]) == 1
    told = capsys.readouterr()
    assert told.err.strip().splitlines()[-1].startswith("aerial_fetch: no credentials of Kaggle found") and "Traceback" not in told.err
    assert aerial_fetch(["inria7"]) == 1 and "did you mean inria" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended: aerial_fetch(["inria", "--month", "x"])
    assert ended.value.code == 2


def test_the_command_fetches(host, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(DATASETS, "massachusetts_roads", mnih(host))
    assert aerial_fetch(["massachusetts_roads", "--folder", str(tmp_path / "x"), "--scenes", f"{TILES[0]}, {TILES[2]}", "--threads", "2"]) == 0
    assert "2 images of 2 scenes; open them with open_samples" in capsys.readouterr().out and len(files(tmp_path / "x")) == 4
    monkeypatch.setattr(datasets, "fetch", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert aerial_fetch(["massachusetts_roads"]) == 130 and "run the same command again" in capsys.readouterr().err


def test_looking_at_the_list_loads_little():
    code = "import sys, aerial_nb.data.datasets; print(sorted({'torch', 'fastai', 'geopandas', 'requests'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1], env=os.environ)
    assert not {"torch", "fastai"} & set(eval(found.stdout)), found.stderr


def test_samples_by_name():
    table = make_table([dict(image=f"{where}/t{i}.tif", scene=f"s{i}") for where, i in (("a", 1), ("a", 2), ("b", 2), ("b", 3))])
    assert named(table, "") is table and named(table, "t3,t1").scene.tolist() == ["s3", "s1"]
    with pytest.raises(DataError, match="no image, or several, of the name t2, t9; there are t1, "): named(table, "t1,t2,t9")
    with pytest.raises(DataError, match="twice"): named(table, "t1,t1")

"""Behaviour of aerial_nb.data.cache: what is believed, what is made again, and what a full disk leaves."""
import errno
import json
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from aerial_nb.data import cache
from aerial_nb.data.raster import DataError, write_raster
from aerial_nb.data.tiles import TileStore

RNG = np.random.default_rng(5)
UNWANTED = {
    "cut": lambda f: f.write_bytes(f.read_bytes()[:-7]),
    "empty": lambda f: f.write_bytes(b""),
    "one byte altered": lambda f: f.write_bytes(f.read_bytes()[:-1] + bytes([f.read_bytes()[-1] ^ 1])),
    "gone": lambda f: f.unlink(),
}


@pytest.fixture
def source(tmp_path):
    image = write_raster(tmp_path / "a.tif", RNG.integers(0, 255, (3, 40, 30), dtype="uint8"))
    label = write_raster(tmp_path / "a_mask.png", RNG.integers(0, 2, (40, 30), dtype="uint8"))
    return cache.Source(str(image), str(label))


@pytest.fixture
def samples(tmp_path):
    rows = []
    for i in range(4):
        image = write_raster(tmp_path / f"t{i}.tif", RNG.integers(0, 250, (3, 40, 30), dtype="uint8"))
        rows.append({"image": image, "label": write_raster(tmp_path / f"t{i}.png", np.eye(40, 30, dtype="uint8"))})
    return pd.DataFrame(rows)


def open_store(samples, folder, **options):
    return TileStore(samples, cache=folder, progress=False, **options)


def test_key_holds_all_that_pixels_depend_on(source, monkeypatch):
    keys = {source.key(), replace(source, fill=(255,)).key(), replace(source, options=(("positive", 1),)).key(),
            replace(source, label="").key(), replace(source, valid=source.label).key()}
    assert len(keys) == 5 and source.key() in keys
    os.utime(source.label, (1, 1))
    assert source.key() not in keys
    monkeypatch.setattr(cache, "reader_version", lambda: "another reader")
    assert source.key() not in keys


def test_missing_file_is_named():
    with pytest.raises(DataError, match="nowhere.tif: No such file.*samples table"):
        cache.Source("nowhere.tif").key()


def test_a_finished_tile_is_not_decoded_again(samples, tmp_path, monkeypatch):
    open_store(samples, tmp_path / "c")
    monkeypatch.setattr(cache, "decode", lambda source: pytest.fail("decoded twice"))
    assert len(open_store(samples, tmp_path / "c")) == 4


@pytest.mark.parametrize("layer", ["image.npy", "label.npy", "json"])
@pytest.mark.parametrize("how", UNWANTED)
def test_damage_is_noticed_and_mended(samples, tmp_path, layer, how):
    first = open_store(samples, tmp_path / "c")
    whole = [(first.image(i).copy(), first.mask(i).copy()) for i in range(4)]
    UNWANTED[how](next((tmp_path / "c").glob(f"*.{layer}")))
    again = open_store(samples, tmp_path / "c")
    for i, (image, mask) in enumerate(whole):
        np.testing.assert_array_equal(again.image(i), image)
        np.testing.assert_array_equal(again.mask(i), mask)


def test_a_changed_file_is_decoded_anew(samples, tmp_path):
    open_store(samples, tmp_path / "c")
    write_raster(samples["image"][2], np.full((3, 40, 30), 9, "uint8"))
    assert (open_store(samples, tmp_path / "c").image(2)[:] == 9).all()


def test_a_copied_cache_is_checked_once(source, tmp_path):
    folder = tmp_path / "c"
    folder.mkdir()
    cache.build_tile(folder, "k", source)
    for file in folder.glob("*.npy"):
        os.utime(file, (7, 7))
    assert cache.load_record(folder, "k")["label"]["mtime_ns"] == 7 * 10**9
    assert json.loads((folder / "k.json").read_text())["image"]["mtime_ns"] == 7 * 10**9


def test_a_cut_file_with_its_old_time_is_noticed(source, tmp_path):
    record = cache.build_tile(tmp_path, "k", source)
    file = cache.layer_files(tmp_path, "k")["label"]
    file.write_bytes(file.read_bytes()[:-3])
    os.utime(file, ns=(record["label"]["mtime_ns"],) * 2)
    assert cache.load_record(tmp_path, "k") is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"image": 3}', "\x00\x01", "null", '{"image": {}, "label": {}}'])
def test_a_record_that_is_none(source, tmp_path, content):
    cache.build_tile(tmp_path, "k", source)
    (tmp_path / "k.json").write_text(content)
    assert cache.load_record(tmp_path, "k") is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.EIO, "Input/output error")])
def test_an_interrupted_write_leaves_nothing(source, tmp_path, monkeypatch, error):
    def stop(folder, key, record):
        raise error
    monkeypatch.setattr(cache, "_save_record", stop)
    folder = tmp_path / "c"
    folder.mkdir()
    with pytest.raises((KeyboardInterrupt, OSError)):
        cache.build_tile(folder, "k", source)
    assert list(folder.iterdir()) == []


def test_all_faults_at_once_and_good_tiles_kept(samples, tmp_path, monkeypatch):
    whole = Path(samples["image"][1]).read_bytes()
    Path(samples["image"][1]).write_bytes(whole[:300])
    write_raster(samples["label"][2], np.zeros((9, 9), "uint8"))
    label = Path(samples["label"][3]).read_bytes()
    Path(samples["label"][3]).unlink()
    with pytest.raises(DataError) as fault:
        open_store(samples, tmp_path / "c")
    assert "3 of 4 tiles cannot be used" in str(fault.value)
    assert all(name in str(fault.value) for name in ("t1.tif", "t2.png", "t3.png"))
    Path(samples["image"][1]).write_bytes(whole)
    Path(samples["label"][3]).write_bytes(label)
    write_raster(samples["label"][2], np.zeros((40, 30), "uint8"))
    decoded, real = [], cache.decode
    monkeypatch.setattr(cache, "decode", lambda source: decoded.append(source.name) or real(source))
    open_store(samples, tmp_path / "c", threads=1)
    assert sorted(decoded) == ["t1", "t2", "t3"]


def test_too_little_room_is_an_error_before_the_first_byte(samples, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10_000, 9_000, 1_000))
    with pytest.raises(OSError, match=r"needs 28,096 bytes for 4 more tiles and has 1,000 free.*AERIAL_CACHE") as full:
        open_store(samples, tmp_path / "c")
    assert full.value.errno == errno.ENOSPC and full.value.filename == str(tmp_path / "c")
    assert list((tmp_path / "c").iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", folder], capture_output=True, check=False).returncode == 0
    if not mounted:
        pytest.skip("a small file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_meanwhile(samples, small_disk, monkeypatch):
    free = shutil.disk_usage(small_disk)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: free._replace(free=10**9))
    with pytest.raises(OSError, match="the tile cache needs .* bytes for") as full:
        open_store(samples, small_disk / "c", threads=2)
    assert full.value.errno == errno.ENOSPC
    kept = {f.name.split(".")[0] for f in (small_disk / "c").iterdir()}
    assert len(kept) < 4 and not list((small_disk / "c").glob("*.tmp"))
    assert all(cache.load_record(small_disk / "c", key) for key in kept)


def test_old_leftovers_are_swept_young_ones_are_somebodys(samples, tmp_path):
    folder = tmp_path / "c"
    folder.mkdir()
    for name, age in (("old.tmp", 7200), ("young.tmp", 5)):
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (time.time() - age,) * 2)
    open_store(samples, folder)
    assert [f.name for f in folder.glob("*.tmp")] == ["young.tmp"]


def test_two_at_the_same_time(samples, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: open_store(samples, tmp_path / "c"), range(4)))
    for i in range(4):
        assert len({store.image(i).tobytes() for store in stores}) == 1
    assert all(cache.load_record(tmp_path / "c", key) for key in stores[0].keys)


def test_one_file_in_two_rows_is_decoded_once(samples, tmp_path):
    twice = open_store(pd.concat([samples, samples]), tmp_path / "c")
    assert len(twice) == 8 and len(list((tmp_path / "c").glob("*.json"))) == 4
    assert twice.nbytes == open_store(samples, tmp_path / "c").nbytes


def test_maps_are_closed_again(samples, tmp_path):
    assert cache._open.cache_info().maxsize <= 400
    store = open_store(samples, tmp_path / "c")
    assert store.image(0) is store.image(0)
    assert isinstance(store.image(0), np.memmap) and not store.image(0).flags.writeable

"""Scenes of any size: seams of deep networks, pieces of one mosaic, memory and time that do not grow."""
import json
import subprocess
import sys

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import from_origin

from aerial_nb.data.loaders import Stats
from aerial_nb.data.raster import write_raster
from aerial_nb.data.synthetic import scene
from aerial_nb.models.zoo import build
from aerial_nb.scenes.eyes import Eye, Look
from aerial_nb.scenes.predict import predictor
from aerial_nb.scenes.rasters import predict_raster
from aerial_nb.training.saved import ModelCard

STATS = Stats((120.,) * 3, (50.,) * 3)
DEEP = dict(unet=("unet", dict(width=8)), smp=("smp", dict(weights="", encoder="resnet18")), hourglass=("hourglass", dict(width=16)))


@pytest.fixture(autouse=True)
def narrow():
    before = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def eye_of_network(name, image):
    "A deep network with random weights, its norms fitted to the image and its answers spread; it sees hundreds of pixels."
    torch.manual_seed(0)
    model = build(DEEP[name][0], **DEEP[name][1]).train()
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d): part.momentum = None; part.reset_running_stats()
    crops = torch.stack([torch.from_numpy(image[:, r:r + 256, c:c + 256].copy()) for r in (0, 120) for c in (0, 120)])
    with torch.no_grad(): model(STATS.normalise(crops, torch.ones(4, 256, 256, dtype=torch.bool)))
    probs, yes = predictor(model, STATS), np.ones((1, 256, 256), bool)
    first = probs(image[None, :, :256, :256], yes).astype("float64").clip(1e-12, 1 - 1e-12)
    logit = np.log(first / (1 - first))
    def spread(pixels, valid):
        p = probs(pixels, valid).astype("float64").clip(1e-12, 1 - 1e-12)
        return (1 / (1 + np.exp(-2 * (np.log(p / (1 - p)) - logit.mean()) / logit.std()))).astype("float32")
    return Eye(name, ModelCard("none", gsd_m=.5, mean=STATS.mean, std=STATS.std), "1", lambda device: spread), spread


def mapped(folder, name, image, eye, at=(0, 0), **look):
    "The map of an image whose corner is at a row and column of a mosaic."
    path = write_raster(folder / f"{name}.tif", image, crs="EPSG:32633", transform=from_origin(5e5 + .5 * at[1], 5e6 - .5 * at[0], .5, .5))
    made = predict_raster(path, [eye], folder / f"{name}_map.tif", Look(**look), progress=False)
    with rasterio.open(made.path) as d: return d.read(1)


@pytest.mark.parametrize("name", ["unet", pytest.param("smp", marks=pytest.mark.slow), pytest.param("hourglass", marks=pytest.mark.slow)])
def test_windows_differ_less_from_one_piece_than_a_shift_by_a_pixel(name, tmp_path):
    image = scene(size=480, seed=1, gsd_m=.5).image
    eye, probs = eye_of_network(name, image)
    yes = np.ones((1, 480, 480), bool)
    whole, shifted = probs(image[None], yes)[0], probs(np.roll(image, -1, 2)[None], yes)[0]
    seams = np.abs(mapped(tmp_path, "a", image, eye, dtype="float32") - whole)
    shift = np.abs(whole[:, 1:-40] - shifted[:, :-41])
    assert seams.mean() < .6 * shift.mean() and np.quantile(seams, .999) < .9 * np.quantile(shift, .999)
    assert shift.mean() > .01


@pytest.mark.parametrize("move", [(32, 64), (160, 0)])
def test_pieces_of_a_mosaic_agree_byte_for_byte_also_with_a_deep_network(move, tmp_path):
    mosaic = scene(size=640, seed=2, gsd_m=.5).image
    eye, _ = eye_of_network("unet", mosaic)
    row, col = move
    # windows of 128 with a step of 96: a piece's own are those that begin at its ends
    first = mapped(tmp_path, "a", mosaic[:, :480, :480], eye, size=128)
    second = mapped(tmp_path, "b", mosaic[:, row:row + 480, col:col + 480], eye, move, size=128)
    here, there = first[row:, col:][128:-128, 128:-128], second[:480 - row, :480 - col][128:-128, 128:-128]
    assert here.tobytes() == there.tobytes() and np.ptp(here) > 50 and here.size > 8_000
    apart = mapped(tmp_path, "c", mosaic[:, row:row + 480, col:col + 480], eye, size=128)   # a place that is not its own
    assert (apart[:480 - row, :480 - col][128:-128, 128:-128] != here).any() == bool(row % 96 or col % 96)


# ---- size

CHILD = """
import json, resource, sys, time
import numpy as np
from aerial_nb.scenes.eyes import Eye, Look
from aerial_nb.scenes.rasters import predict_raster
from aerial_nb.training.saved import ModelCard
eye = Eye("green", ModelCard("none"), "1", lambda device: lambda pixels, valid: pixels[:, 1].astype("float32") / 255)
start = time.process_time()
predict_raster(sys.argv[1], [eye], sys.argv[2], Look(size=256, gsd="native"), progress=False)
print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, time.process_time() - start]))
"""


def in_child(folder, side) -> tuple: # MiB at most, seconds of processor time
    "A mosaic of one tile, again and again, through a cheap model in a process of its own."
    pattern = np.kron(np.random.default_rng(0).integers(20, 230, (3, 64, 64)), np.ones((1, 32, 32))).astype("uint8")
    write_raster(folder / "tile.tif", pattern)
    def source(b, r, c):
        high, wide = min(2048, side - r), min(2048, side - c)
        return (f'<SimpleSource><SourceFilename relativeToVRT="1">tile.tif</SourceFilename><SourceBand>{b}</SourceBand>'
                f'<SrcRect xOff="0" yOff="0" xSize="{wide}" ySize="{high}"/><DstRect xOff="{c}" yOff="{r}" xSize="{wide}" ySize="{high}"/></SimpleSource>')
    places = range(0, side, 2048)
    bands = "".join(f'<VRTRasterBand dataType="Byte" band="{b}">{"".join(source(b, r, c) for r in places for c in places)}</VRTRasterBand>' for b in (1, 2, 3))
    (folder / "scene.vrt").write_text(f'<VRTDataset rasterXSize="{side}" rasterYSize="{side}">{bands}</VRTDataset>')
    done = subprocess.run([sys.executable, "-c", CHILD, folder / "scene.vrt", folder / f"{side}.tif"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with rasterio.open(folder / f"{side}.tif") as d:
        at = side - 300
        got, want = d.read(1, window=((at, side), (at, side))), np.tile(pattern[1], (2, 2))[at % 2048:at % 2048 + 300, at % 2048:at % 2048 + 300]
    assert (got == np.rint(want / np.float32(255) * 254)).all()
    (folder / f"{side}.tif").unlink()
    return tuple(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_a_megapixel_costs_the_same_in_scenes_of_any_size(tmp_path):
    costs = {side: in_child(tmp_path, side)[1] / (side / 1000) ** 2 for side in (4000, 10_000, 20_000)}
    assert max(costs.values()) < 1.5 * min(costs.values()), costs


@pytest.mark.slow
def test_fifty_thousand_pixels_on_a_side_in_less_than_two_gibibytes(tmp_path):
    peak, seconds = in_child(tmp_path, 50_000)
    assert peak < 2048, (peak, seconds)

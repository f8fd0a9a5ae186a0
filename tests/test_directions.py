"""The second task: targets of the loaders, the loss of two tasks, its training, and what a network says of directions."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

from aerial_nb.data.augment import d4
from aerial_nb.data.catalog import synthetic_samples
from aerial_nb.data.loaders import CropDataset
from aerial_nb.data.splits import split_by_scene
from aerial_nb.data.tiles import TileStore, draw_crops
from aerial_nb.models.zoo import build
from aerial_nb.roads.orientation import orientation_classes, orientation_pyramid, turn_classes
from aerial_nb.training.arms import run_arm
from aerial_nb.training.tasks import overfit_task, split_task
from aerial_nb.training.directions import (DirectionCrops, direction_scores, loading_share, predict_directions,
                                           show_directions, with_directions)
from aerial_nb.training.learner import Recipe, learner_for
from aerial_nb.training.losses import DeepSupervision, TwoTasks, angle_loss, build_loss, cross_entropy, full_road
from aerial_nb.training.records import Folder
from aerial_nb.training.saved import load_model

TINY = dict(width=16, blocks=1, stacks=1, tasks="road")


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return split_by_scene(synthetic_samples(tmp_path_factory.mktemp("scenes"), n=5, size=160, gsd_m=1, progress=False))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("AERIAL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


# ---- targets

def test_labels_are_made_of_the_turned_crop(samples):
    store = TileStore(samples)
    plan = draw_crops(store, 16, 64, seed=0, epoch=0)
    assert len(set(plan["d4"])) > 3, "the plan turns its crops"
    straight = plan.copy()
    straight["d4"] = 0
    turned, plain = (DirectionCrops(CropDataset(store, p, 64), band_px=8) for p in (plan, straight))
    for i in range(16):
        _, (mask, classes) = turned[i]
        assert np.array_equal(classes, orientation_classes(mask.numpy() == 1, band_px=8, valid=mask.numpy() != 255))
        _, (mask_0, classes_0) = plain[i]
        k = int(plan["d4"][i])
        assert torch.equal(mask, d4(mask_0, k)) and np.array_equal(classes, turn_classes(classes_0.numpy(), k))


def test_uncounted_pixels_have_no_known_direction(samples):
    class Cut:
        def __len__(self): return 2
        def batch(self, indices):
            mask = torch.zeros(len(indices), 32, 32, dtype=torch.uint8)
            mask[:, 10:16], mask[:, :, 20:] = 1, 255
            return torch.zeros(len(indices), 3, 32, 32), (mask, mask), torch.ones(len(indices), 32, 32, dtype=torch.bool)
    _, (mask, classes), shown = DirectionCrops(Cut()).batch([0, 1])
    assert (classes[:, :, 20:] == 255).all() and np.isin(classes[:, 10:16, :20], (35, 0, 1)).all() and (classes[:, 20:, :20] == 36).all()


def test_loaders_give_two_targets_and_draw_anew_each_epoch(samples):
    task = with_directions(split_task(samples, 64, 2, 6, Recipe(epochs=2), TINY, dict(n_valid=2)), weight=0.3, band_m=7)
    assert task.arguments["tasks"] == "road,orientation" and task.recipe.orientation_weight == 0.3
    assert task.dls.train.dataset.band_px == pytest.approx(7 / task.gsd_m) and task.dls.train.drop_last
    x, (mask, classes) = task.dls.train.one_batch()
    assert x.shape == (2, 3, 64, 64) and mask.shape == classes.shape == (2, 64, 64) and classes.dtype == torch.uint8
    task.dls.train.dataset.set_epoch(0)
    first = [m for _, (m, _) in task.dls.train]
    task.dls.train.dataset.set_epoch(1)
    assert not all(torch.equal(a, b) for a, b in zip(first, [m for _, (m, _) in task.dls.train]))
    assert "rows" in task.dls.train.dataset.describe(0)
    with pytest.raises(ValueError, match="for roads alone"): with_directions(task, weight=0)


# ---- losses

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from((0, .3, 1)))
def test_the_angle_loss_is_the_published_one(seed, ignored):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 37, 5, 4, generator=g, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 37, (2, 5, 4), generator=g)
    target[torch.rand(2, 5, 4, generator=g) < ignored] = 255
    loss = angle_loss(logits, target.to(torch.uint8))
    if ignored == 1: assert loss.item() == 0
    else:
        assert loss.item() == pytest.approx(F.nll_loss(logits.log_softmax(1), target, ignore_index=255).item())
        assert loss.item() == pytest.approx(cross_entropy(logits, target).item())
    loss.backward()
    assert logits.grad.isfinite().all()


def test_two_tasks_sum_over_all_outputs_and_pick_their_labels():
    g = torch.Generator().manual_seed(0)
    mask, directions = torch.randint(0, 2, (2, 32, 32), generator=g), torch.randint(0, 37, (2, 32, 32), generator=g)
    sides = (8, 8, 16, 32)
    out = dict(road=[torch.randn(2, 2, n, n, generator=g) for n in sides], orientation=[torch.randn(2, 37, n, n, generator=g) for n in sides])
    road = DeepSupervision(build_loss("bce"))
    angles = [angle_loss(y, directions[:, ::32 // n, ::32 // n]) for y, n in zip(out["orientation"], sides)]
    assert TwoTasks(road, 0.5)(out, (mask, directions)).item() == pytest.approx((road(out["road"], mask) + 0.5 * sum(angles)).item())
    halves = torch.randint(0, 37, (2, 16, 16), generator=g)    # published: a map of its own
    angles[2] = angle_loss(out["orientation"][2], halves)
    assert TwoTasks(road)(out, (mask, directions, halves)).item() == pytest.approx((road(out["road"], mask) + sum(angles)).item())
    whole = {task: y[-1] for task, y in out.items()}
    assert TwoTasks(road)(whole, (mask, directions)).item() == pytest.approx((road(whole["road"], mask) + angles[3]).item())
    assert full_road(out) is out["road"][-1] and full_road(whole) is whole["road"] and full_road(out["road"]) is out["road"][-1]


def test_directions_of_another_size_or_with_unknown_classes_are_refused():
    logits = torch.zeros(1, 37, 8, 8)
    with pytest.raises(ValueError, match="do not fit"): angle_loss(logits, torch.zeros(1, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="label 40"): angle_loss(logits, torch.full((1, 8, 8), 40, dtype=torch.uint8))
    with pytest.raises(ValueError, match="no stride"):
        TwoTasks(DeepSupervision(build_loss("bce")))(dict(road=torch.zeros(1, 2, 8, 8), orientation=torch.zeros(1, 37, 8, 8)),
                                                     (torch.zeros(1, 8, 8), torch.zeros(1, 7, 7)))
    with pytest.raises(ValueError, match="predict at the size"):
        show_directions(np.zeros((1, 8, 8, 3), np.uint8), dict(truth=np.zeros((1, 4, 4), np.uint8)))
    with pytest.raises(ValueError, match="orientation_weight must not be negative"): Recipe(orientation_weight=-1)


# ---- training

def test_a_network_learns_directions_by_heart(samples, tmp_path):
    recipe = Recipe(epochs=60, lr=1e-2, valid_every=60)
    task = with_directions(overfit_task(samples, 48, recipe, TINY, crops=1))
    result = run_arm(task, "hourglass", 0, Folder(tmp_path / "arm"), quiet=True)
    found = direction_scores(load_model(result.folder.path)[0], task.dls.valid)
    assert result.folder.history.valid_iou.dropna().iloc[-1] > .6 and len(result.counts) == 1
    assert found["found"] > .5 and found["median_deg"] <= 10 and found["error_deg"] < 30


def test_published_labels_train_too(samples, tmp_path):
    task = with_directions(overfit_task(samples, 64, Recipe(epochs=1), TINY, crops=2), published=True)
    _, (mask, *maps) = task.dls.train.one_batch()
    wanted = [orientation_pyramid(m == 1, (1, 2, 4), published=True, valid=m != 255) for m in mask.numpy()]
    for level, arrays in zip(maps, zip(*wanted)): assert np.array_equal(level, np.stack(arrays))
    learn = learner_for(build("spin", **task.arguments), task.dls, task.recipe, Folder(tmp_path), quiet=True)
    with learn.no_logging(): learn.fit(1)
    assert np.isfinite(learn.recorder.values[-1]).all()


def test_scores_of_known_predictions_and_a_network_without_directions():
    class Says(torch.nn.Module):
        def __init__(self, classes): super().__init__(); self.classes = classes
        def forward(self, x): return dict(road=x, orientation=F.one_hot(self.classes.long(), 37).movedim(-1, 1).float())
    pred, truth = torch.tensor([[[0, 35, 36, 5]]]), torch.tensor([[[0, 1, 3, 36]]], dtype=torch.uint8)
    got = direction_scores(Says(pred), [(torch.zeros(1, 2, 1, 4), (truth, truth))])
    assert got == dict(error_deg=5, median_deg=5, found=pytest.approx(2 / 3), right=pytest.approx(1 / 3))
    none = direction_scores(Says(pred), [(torch.zeros(1, 2, 1, 4), (truth, torch.full_like(truth, 36)))])
    assert none == dict(error_deg=None, median_deg=None, found=None, right=None)
    with pytest.raises(ValueError, match="built without directions"):
        predict_directions(build("hourglass", **TINY), torch.zeros(1, 3, 64, 64))


def test_the_time_of_labels_is_part_of_the_time_of_loading(samples):
    store = TileStore(samples)
    crops = CropDataset(store, draw_crops(store, 8, 64, seed=0, epoch=0), 64)
    got = loading_share(DirectionCrops(crops))
    assert 0 < got["share"] < 1 and got["directions_ms"] == pytest.approx(got["share"] * got["crop_ms"])

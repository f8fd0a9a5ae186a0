"""Recipes that freeze, slow down, stop and average: what moves, what is kept, and what a resumed training decides."""
import copy

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from aerial_nb.data.loaders import crop_loaders
from aerial_nb.data.raster import write_raster
from aerial_nb.data.tiles import TileStore
from aerial_nb.training.control import AverageWeights, merit
from aerial_nb.training.learner import Recipe, fit, learner_for, parts_of
from aerial_nb.training.records import Folder

from fastai.callback.core import Callback


class Net(nn.Module):
    "An encoder with batch norm and a head."
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 1, 1))

    def forward(self, x): return self.head(self.encoder(x))


def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def dls(tmp_path_factory):
    at, rows = tmp_path_factory.mktemp("tiles"), []
    for name, offset in (("a", 3), ("b", 7), ("c", 11)):
        rng, mask = np.random.default_rng(offset), np.zeros((96, 96), "uint8")
        for k in range(5): mask[offset + k::32] = mask[:, 40 + offset + k] = 1
        write_raster(at / f"{name}.tif", (rng.integers(40, 90, (3, 96, 96)) + 60 * mask).astype("uint8"))
        write_raster(at / f"{name}_mask.tif", mask[None])
        rows.append(dict(image=str(at / f"{name}.tif"), label=str(at / f"{name}_mask.tif"), scene=name, split="train", gsd_m=1.))
    table = pd.DataFrame(rows)
    train, valid = (TileStore(t.reset_index(drop=True), cache=at, progress=False) for t in (table[:2], table[2:]))
    return crop_loaders(train, valid, size=32, bs=4, n_train=16)


class Kill(Callback):
    "Ends the process, as far as a test can, after an epoch."
    order = 90
    def __init__(self, epoch): self.at = epoch
    def after_epoch(self):
        if self.epoch + 1 == self.at: raise KeyboardInterrupt


def trained(dls, recipe, folder, model=None, kill=0, **options):
    learn = learner_for(model or net(), dls, recipe, Folder(folder), checkpoint_s=0, quiet=True, **options)
    if kill: learn.add_cb(Kill(kill))
    try: record = fit(learn, recipe)
    except KeyboardInterrupt: record = None
    return learn, record


# ---- the encoder

def test_a_frozen_encoder_stands_still_and_then_moves(dls, tmp_path):
    seen = []
    class Watch(Callback):
        order = 89
        def after_epoch(self): seen.append({k: v.clone() for k, v in self.model.state_dict().items()})
    start = {k: v.clone() for k, v in net().state_dict().items()}
    trained(dls, Recipe(epochs=4, lr=1e-2, freeze_epochs=2, weight_decay=.1), tmp_path / "arm", cbs=[Watch()])
    inside = [k for k in start if k.startswith("encoder")]
    for epoch in (0, 1): assert all(torch.equal(start[k], seen[epoch][k]) for k in inside), epoch
    assert all(not torch.equal(start[k], seen[2][k]) for k in inside)
    assert not torch.equal(start["head.0.weight"], seen[0]["head.0.weight"])


def test_a_layer_that_was_frozen_before_stays_frozen(dls, tmp_path):
    model = net()
    model.encoder[0].weight.requires_grad_(False)
    before = model.encoder[0].weight.clone()
    trained(dls, Recipe(epochs=3, lr=1e-2, freeze_epochs=1), tmp_path / "arm", model)
    assert torch.equal(before, model.encoder[0].weight) and not model.encoder[0].weight.requires_grad


def test_the_encoder_has_a_rate_of_its_own(dls, tmp_path):
    model = net()
    slow, fast = parts_of(model, .1)
    assert {id(p) for p in slow} == {id(p) for p in model.encoder.parameters()} and len(slow) + len(fast) == len(list(model.parameters()))
    learn, _ = trained(dls, Recipe(epochs=2, lr=1e-2, encoder_lr=.1, schedule="flat"), tmp_path / "arm", model)
    assert [group["lr"] for group in learn.opt.opt.param_groups] == pytest.approx([1e-3, 1e-2])


def test_nothing_to_freeze_is_said(dls, tmp_path):
    for recipe in (Recipe(epochs=3, freeze_epochs=1), Recipe(epochs=3, encoder_lr=.1)):
        with pytest.raises(ValueError, match="has no `encoder`"): trained(dls, recipe, tmp_path / "arm", nn.Conv2d(3, 1, 3, padding=1))
    model = net()
    for p in model.encoder.parameters(): p.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"): parts_of(model, .1)


# ---- what validation decides

@pytest.mark.parametrize("recipe", [
    Recipe(epochs=8, lr=2e-2, schedule="plateau", plateau=0), Recipe(epochs=12, lr=1e-3, patience=2, schedule="flat", best_by="loss"),
    Recipe(epochs=8, lr=2e-2, ema=.8, schedule="plateau", plateau=1, best_by="loss", freeze_epochs=4),
], ids=["plateau", "patience", "all"])
def test_a_resumed_training_decides_as_the_whole_one(dls, tmp_path, recipe):
    whole, record = trained(dls, recipe, tmp_path / "whole")
    _, none = trained(dls, recipe, tmp_path / "parts", kill=3)
    parts, again = trained(dls, recipe, tmp_path / "parts")
    assert none is None and again["resumed_after"] == 3
    one, two = (Folder(tmp_path / n).history for n in ("whole", "parts"))
    assert len(one) == len(two) and np.allclose(one.lr, two.lr) and np.allclose(one.train_loss, two.train_loss, atol=1e-6)
    assert again["best_epoch"] == record["best_epoch"]
    for a, b in zip(whole.model.state_dict().values(), parts.model.state_dict().values()): assert torch.allclose(a, b, atol=1e-6)


def test_a_stopped_training_is_not_taken_up_again(dls, tmp_path):
    recipe = Recipe(epochs=30, lr=1e-7, schedule="flat", patience=2, best_by="loss", loss="bce")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 1, 1))
    trained(dls, recipe, tmp_path / "arm", copy.deepcopy(model))
    rows = len(Folder(tmp_path / "arm").history)
    _, record = trained(dls, recipe, tmp_path / "arm", copy.deepcopy(model))
    assert len(Folder(tmp_path / "arm").history) == rows == record["resumed_after"]


def test_the_best_weights_are_those_that_were_validated(dls, tmp_path):
    "With averaged weights the checkpoint holds the average, and validating it again gives the number of the history."
    recipe = Recipe(epochs=4, lr=2e-2, ema=.9, best_by="loss", schedule="flat", loss="bce")
    learn, record = trained(dls, recipe, tmp_path / "arm")
    history = Folder(tmp_path / "arm").history
    assert record["best_epoch"] == history.valid_loss.idxmin() + 1
    with torch.inference_mode():
        losses, sizes = zip(*[(float(learn.loss_func(learn.model(x), y)), len(x)) for x, y in dls.valid])
    assert np.average(losses, weights=sizes) == pytest.approx(history.valid_loss.min(), abs=1e-5)


def test_an_average_is_the_average(dls, tmp_path):
    steps = []
    class Watch(Callback):
        order = 10
        def after_step(self): steps.append(self.model.head[3].bias.detach().clone())
    learn, _ = trained(dls, Recipe(epochs=1, lr=1e-2, ema=.5, schedule="flat"), tmp_path / "arm", cbs=[Watch()])
    wanted = steps[0]
    for step in steps[1:]: wanted = .5 * wanted + .5 * step
    assert torch.allclose(learn.average_weights.averaged.module.head[3].bias, wanted, atol=1e-6) and len(steps) == 4
    assert isinstance(learn.average_weights, AverageWeights)


def test_the_history_names_the_worst_item(dls, tmp_path):
    trained(dls, Recipe(epochs=2, lr=1e-2), tmp_path / "arm")
    history = Folder(tmp_path / "arm").history
    names = [dls.valid.dataset.describe(i) for i in range(len(dls.valid.dataset))]
    assert history.worst.isin(names).all() and (history.worst_f1 <= history.item_f1).all()
    assert np.allclose(history.valid_f1, 2 * history.valid_iou / (1 + history.valid_iou))


# ---- recipes that cannot be

@pytest.mark.parametrize("wrong, said", [
    (dict(ema=1.), "ema is a decay"), (dict(epochs=3, freeze_epochs=3), "never releases"), (dict(best_by="dice"), "known: iou, loss"),
    (dict(class_weights=(1, 2), loss="focal"), "class_weights are for"), (dict(schedule="step"), "known: one_cycle"),
    (dict(optimiser="sgd"), "known: adamw, adam"), (dict(patience=-1), "patience must not be negative"), (dict(encoder_lr=0), "encoder_lr must be above 0"),
])
def test_impossible_recipes_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said): Recipe(**wrong)


def test_all_faults_of_a_recipe_at_once():
    with pytest.raises(ValueError) as error: Recipe(epochs=0, lr=-1, ema=2)
    assert all(word in str(error.value) for word in ("epochs", "lr", "ema"))


def test_merit():
    assert merit(dict(valid_iou=.2)) == .2 and merit(dict(valid_loss=.2), "loss") == -.2 and merit({}, "loss") is None


def test_stopping_comes_from_waiting_across_a_resume(dls, tmp_path):
    "Two validations without a rise, one before and one after the kill, end the training."
    recipe = Recipe(epochs=30, lr=1e-12, schedule="flat", patience=4)
    trained(dls, recipe, tmp_path / "whole")
    rows = len(Folder(tmp_path / "whole").history)
    assert 4 <= rows < 30
    trained(dls, recipe, tmp_path / "parts", kill=rows - 2)
    trained(dls, recipe, tmp_path / "parts")
    assert len(Folder(tmp_path / "parts").history) == rows


def test_waiting_begins_when_the_encoder_is_released(dls, tmp_path):
    recipe = Recipe(epochs=12, lr=1e-12, schedule="flat", patience=2, freeze_epochs=6, loss="bce", best_by="loss")
    trained(dls, recipe, tmp_path / "arm")
    assert 8 <= len(Folder(tmp_path / "arm").history) <= 12

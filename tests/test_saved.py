"""Saved models: what goes in comes out, half a save is no loss, and nobody else's code runs."""
import json
import pickle
import sys
import types

import pytest
import torch
from torch import nn

from aerial_nb.training import saved
from aerial_nb.training.records import plain
from aerial_nb.training.saved import ModelCard, fill, load_card, load_foreign, load_model, save_model


class Net(nn.Module):
    "A little of everything: shared weights, whole-number and floating buffers, convolutions."
    def __init__(self, width=4):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.rand(2))
    def forward(self, x): return self.second(self.first(self.norm(self.conv(x)).mean((2, 3))))


def build(name, **arguments): return {"net": Net}[name](**arguments)


def save(folder, model, **card): return save_model(folder, model, "net", dict(width=4), **dict(threshold=0.4) | card)


def same(a: nn.Module, b: nn.Module):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_round_trip(tmp_path, dtype, memory_format):
    model = Net().to(dtype).to(memory_format=memory_format)
    save(tmp_path, model, metrics=dict(iou=0.5, empty=float("nan")), classes=("ground", "road"), split_hash="abc")
    again, card = load_model(tmp_path, build=build)
    assert same(model, again) and not again.training and again.second.weight is again.first.weight
    assert card.metrics == dict(iou=0.5, empty=None) and card.classes == ("ground", "road") and card.arguments == dict(width=4)
    x = torch.rand(2, 3, 8, 8, dtype=dtype)
    if dtype in (torch.float32, torch.float64): assert torch.allclose(model.eval()(x), again(x), atol=1e-6)


def test_tensor_subclasses_end_here(tmp_path):
    class TensorBase(torch.Tensor): pass                      # as fastai's, whose import takes seconds
    model = Net()
    model.conv.weight = nn.Parameter(TensorBase(model.conv.weight.data), requires_grad=True)
    model.scale = TensorBase(model.scale)
    save(tmp_path, model)
    again, _ = load_model(tmp_path, build=build)
    assert type(again.scale) is torch.Tensor and type(again.conv.weight) is nn.Parameter
    assert torch.equal(again.scale, model.scale.as_subclass(torch.Tensor))
    assert all(type(v) is torch.Tensor for v in saved.plain_tensors(model.state_dict())[0].values())
    assert plain(dict(loss=torch.tensor(0.5).as_subclass(TensorBase))) == dict(loss=0.5)


def test_wrappers_are_taken_off(tmp_path):
    model = Net()
    save(tmp_path, nn.DataParallel(model))
    assert same(load_model(tmp_path, build=build)[0], model)


def test_views_of_one_memory_are_kept_apart(tmp_path):
    whole = torch.arange(6.)
    kept, tied = saved.plain_tensors(dict(a=whole[:3], b=whole[3:], c=whole[:3], d=whole.view(2, 3)))
    assert tied == dict(c="a") and kept["b"].tolist() == [3, 4, 5] and kept["d"].shape == (2, 3)
    assert saved.plain_tensors(dict(a=torch.empty(0), b=torch.empty(0)))[1] == {}


def test_weights_that_are_not_finite_do_not_replace_good_ones(tmp_path):
    good = Net(); save(tmp_path, good)
    bad = Net(); bad.first.bias.data[1] = float("inf")
    with pytest.raises(ValueError, match="first.bias is not finite"): save(tmp_path, bad)
    assert same(load_model(tmp_path, build=build)[0], good)


@pytest.mark.parametrize("stop", ["save_file", "write_json"])
def test_a_save_that_stops_half_way_is_no_loss(tmp_path, monkeypatch, stop):
    old, new = Net(), Net()
    save(tmp_path, old, threshold=0.1)
    def dies(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(saved, stop, dies)
    with pytest.raises(KeyboardInterrupt): save(tmp_path, new, threshold=0.9)
    again, card = load_model(tmp_path, build=build)
    assert same(again, old if stop == "save_file" else new) and card.threshold == (0.1 if stop == "save_file" else 0.9)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_first_save_without_its_json_still_loads(tmp_path):
    model = Net(); save(tmp_path, model).unlink()
    again, card = load_model(tmp_path, build=build)
    assert same(again, model) and card.threshold == 0.4


def test_damage_is_named(tmp_path):
    save(tmp_path, Net())
    weights, listed = tmp_path / "model.safetensors", tmp_path / "model.json"
    whole, about = weights.read_bytes(), json.loads(listed.read_text())
    def fails(match):
        with pytest.raises(ValueError, match=match): load_model(tmp_path, build=build)
    weights.write_bytes(whole[:-9]); fails("damaged or cut off")
    weights.write_bytes(whole[:4]); fails("damaged or cut off")
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1])); fails("checksum differs")
    weights.write_bytes(whole)
    listed.write_text(json.dumps(about | dict(schema=99))); fails("schema 99, this package reads up to 1: update")
    listed.write_text(json.dumps({k: v for k, v in about.items() if k != "classes"})); fails("lacks classes")
    listed.write_text(json.dumps(about | dict(threshold=7))); fails("probability in")
    listed.write_text("{"); fails("model.json is damaged")
    listed.write_text(json.dumps(about | dict(threshold=0.6))); assert load_card(tmp_path).threshold == 0.6
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="no saved model in"): load_model(tmp_path, build=build)


def test_files_of_two_saves_without_a_card_inside_do_not_mix(tmp_path):
    listed = save(tmp_path, Net())
    saved.save_file(saved.plain_tensors(Net().state_dict())[0], tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="take both files from one save"): load_model(tmp_path, build=build)
    listed.unlink()
    with pytest.raises(ValueError, match="has no card: for weights made elsewhere"): load_model(tmp_path, build=build)


def test_what_does_not_fit_is_listed(tmp_path):
    save(tmp_path, Net())
    with pytest.raises(ValueError, match=r"first.weight is \(4, 4\), the model wants \(5, 5\)"):
        load_model(tmp_path, build=lambda name, width: Net(5))
    with pytest.raises(ValueError, match="missing: 0.bias, 0.weight; unexpected: conv.bias.* and 4 more"):
        load_model(tmp_path, build=lambda name, width: nn.Sequential(nn.Linear(2, 2)))
    target = nn.Linear(2, 2); before = target.weight.clone()
    with pytest.raises(ValueError, match="missing: bias"): fill(target, dict(weight=torch.ones(2, 2)))
    assert torch.equal(target.weight, before)                 # all or nothing


def test_the_zoo_builds_by_default(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "aerial_nb.models.zoo", types.SimpleNamespace(build=build))
    model = Net(); save(tmp_path, model)
    assert same(load_model(tmp_path)[0], model)


@pytest.mark.parametrize("values, match", [
    (dict(treshold=0.5), "no treshold"), (dict(threshold=-0.1), "probability"), (dict(threshold=float("nan")), "probability"),
    (dict(stats=([1, 2], [1, 0])), "std must be positive"), (dict(stats=([1, 2], [1, 1]), bands=3), "statistics of 2 bands"),
    (dict(arguments=dict(norm=nn.BatchNorm2d)), "plain value"), (dict(arguments=dict(scale=float("inf"))), "plain values")])
def test_impossible_cards_are_refused(tmp_path, values, match):
    with pytest.raises((ValueError, TypeError), match=match):
        save_model(tmp_path / "m", nn.Linear(1, 1), "net", **{"arguments": {}} | values)
    assert not (tmp_path / "m").exists()


def test_a_card_takes_statistics_in_any_form():
    pair = ((1., 2.), (3., 4.))
    forms = [pair, dict(mean=pair[0], std=pair[1]), types.SimpleNamespace(mean=torch.tensor(pair[0]), std=pair[1])]
    cards = [ModelCard.of("net", dict(size=(3, 3)), stats=form) for form in forms]
    assert all((c.mean, c.std, c.bands) == (*pair, 2) for c in cards)
    assert "<b>" not in ModelCard.of("<b>")._repr_html_()


# ---- weights from elsewhere

class Evil:
    def __reduce__(self): return exec, ("import builtins; builtins.ran = True",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch's advice to the author of such a file
def test_no_code_of_a_checkpoint_runs(tmp_path):
    import builtins
    for content in (Evil(), dict(state_dict=dict(w=torch.ones(1)), extra=Evil()), nn.Linear(1, 1)):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(ValueError, match="refused. Where you trust it"): load_foreign(tmp_path / "x.pth")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError): load_foreign(tmp_path / "plain.pkl")
    assert not hasattr(builtins, "ran")


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: dict(state_dict=s, epoch=3), lambda s: dict(model=dict(state_dict=s)),
                                  lambda s: {f"module.{k}": v for k, v in s.items()},
                                  lambda s: dict(net={f"_orig_mod.module.{k}": v for k, v in s.items()})])
def test_wrapped_checkpoints_open(tmp_path, wrap):
    model = Net()
    torch.save(wrap(dict(model.state_dict())), tmp_path / "x.pth")
    assert same(fill(Net(), load_foreign(tmp_path / "x.pth")), model)


def test_foreign_files_that_are_no_weights(tmp_path):
    file = tmp_path / "x.pth"
    torch.save(dict(epoch=1, optimizer=dict(lr=0.1)), file)
    with pytest.raises(ValueError, match="the keys epoch, optimizer, no state dict"): load_foreign(file)
    torch.save([1, 2], file)
    with pytest.raises(ValueError, match="a list, no state dict"): load_foreign(file)
    torch.save(Net().state_dict(), file)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="damaged or no checkpoint"): load_foreign(file)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="damaged or no checkpoint"): load_foreign(file)
    with pytest.raises(FileNotFoundError, match="no checkpoint"): load_foreign(tmp_path / "none.pth")
    saved.save_file(dict(w=torch.ones(2)), tmp_path / "x.safetensors")
    assert load_foreign(tmp_path / "x.safetensors")["w"].tolist() == [1, 1]

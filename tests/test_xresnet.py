"""fastai's U-Net over an XResNet: the same network, any size, and copies that work."""
import copy
import gc

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from aerial_nb.models import weights as weights_chapter
from aerial_nb.models.spin import parameters_of
from aerial_nb.models.xresnet import xresnet_source, xresnet_unet, xresnets
from aerial_nb.models.zoo import build
from aerial_nb.training.saved import load_model, save_model
from fastai.vision.learner import create_unet_model
from fastai.vision.models import xresnet


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return xresnet_unet("xresnet18", bands=4, classes=1)


def test_the_network_of_unet_learner():
    torch.manual_seed(3)
    mine = xresnet_unet("xresnet34", classes=2)
    torch.manual_seed(4)
    theirs = create_unet_model(xresnet.xresnet34, 2, (256, 256), pretrained=False).eval().requires_grad_(False)
    assert parameters_of(mine) == parameters_of(theirs) == 41_240_400
    assert mine.net.unet.state_dict().keys() == theirs.state_dict().keys()
    mine.net.unet.load_state_dict(theirs.state_dict())
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad(): y = mine.eval()(x)
    assert type(y) is torch.Tensor and torch.allclose(y, theirs(x), atol=1e-5)


def test_sizes_bands_and_gradient(small):
    assert small.training and small.encoder is small.net.unet.layers[0]
    loss = sum(small(torch.rand(2, 4, *size)).square().mean() for size in [(33, 47), (64, 32)])
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())
    assert next(small.encoder.parameters()).grad.abs().sum() > 0
    with torch.no_grad():
        for size in [(1, 1), (37, 61)]: assert small.eval()(torch.rand(1, 4, *size)).shape == (1, 1, *size)


def test_hooks_let_go_and_copies_are_whole(small):
    small.train()(torch.rand(2, 4, 32, 32)).mean().backward()
    assert all(hook.stored is None for hook in small.net.unet.sfs)
    twin = copy.deepcopy(small)
    x = torch.rand(1, 4, 45, 32)
    with torch.no_grad():
        before = small.eval()(x)
        assert torch.equal(twin.eval()(x), before)
        for p in twin.parameters(): p.zero_()
        assert torch.equal(small(x), before)
        del twin; gc.collect()            # its hooks leave, those of the first stay
        assert torch.equal(small(x), before)


def test_a_pass_that_fails_leaves_nothing_behind(small, monkeypatch):
    monkeypatch.setattr(small.net.unet.layers[-2], "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError): small(torch.rand(1, 4, 32, 32))
    assert all(hook.stored is None for hook in small.net.unet.sfs)


def test_dropout_in_the_decoder_only():
    torch.manual_seed(0)
    model = xresnet_unet("xresnet18", decoder_dropout=.5, upsample=2).train()
    for m in model.modules():
        if isinstance(m, _BatchNorm): m.eval()
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(model(x), model(x)) and torch.equal(model.encoder(x), model.encoder(x))
        assert torch.equal(model.eval()(x), model(x))


def test_weights_of_a_file_and_of_nobody(tmp_path):
    torch.manual_seed(1)
    whole = xresnet.xresnet18()
    torch.save(dict(model=whole.state_dict(), opt={}), tmp_path / "x18.pth")   # as fastai's Learner.save
    model = xresnet_unet("xresnet18", str(tmp_path / "x18.pth"), bands=4).train()
    assert model.weights == "x18.pth"
    assert torch.allclose(model.encoder[0][0].weight, whole[0][0].weight[:, [0, 1, 2, 0]] * 3 / 4)
    model(torch.rand(2, 4, 32, 32))
    momenta = [{m.momentum for m in part.modules() if isinstance(m, _BatchNorm)} for part in (model.encoder, model.net.unet.layers[4])]
    assert model.net.unet.layers[1].momentum == 1
    assert momenta == [{.1}, {1.}]
    renamed = {k.replace("convpath", "convs").replace("idpath", "idconv"): v for k, v in whole.state_dict().items()}
    torch.save(renamed, tmp_path / "old.pth")                 # the names of 2019, which fastai takes for nothing
    body = torch.nn.Sequential(*list(xresnet.xresnet18().children())[:-4])
    assert weights_chapter.start_encoder(body, str(tmp_path / "old.pth"), xresnet_source("xresnet18")) == "old.pth"
    assert torch.equal(body[4][0].convpath[0][0].weight, whole[4][0].convpath[0][0].weight)
    with pytest.raises(ValueError, match="fastai offers them for xresnet50 only"): xresnet_unet("xresnet18", "imagenet")
    with pytest.raises(ValueError, match="not for this encoder"): xresnet_unet("xresnet34", str(tmp_path / "x18.pth"))
    assert weights_chapter.start_encoder(body, "auto", xresnet_source("xresnet18")) == ""
    assert xresnet_source("xresnet50").url.endswith("xrn50_940.pth")


def test_saved_and_loaded_without_asking(tmp_path, monkeypatch):
    monkeypatch.setattr(weights_chapter, "fetch", lambda *a: pytest.fail("asked for weights"))
    torch.save(xresnet.xresnet18().state_dict(), tmp_path / "x18.pth")
    given = dict(encoder="xresnet18", weights=str(tmp_path / "x18.pth"), bands=1, classes=2, decoder_dropout=.1)
    model = build("xresnet_unet", **given)
    model.train()(torch.rand(2, 1, 32, 32))
    save_model(tmp_path / "saved", model, "xresnet_unet", given, bands=1)
    (tmp_path / "x18.pth").unlink()
    again, _ = load_model(tmp_path / "saved")
    x = torch.rand(1, 1, 33, 40)
    with torch.no_grad(): assert torch.equal(model.eval()(x), again(x))


@pytest.mark.parametrize("wrong, said", [(dict(encoder="resnet34"), "did you mean 'xresnet34'"), (dict(encoder="xresnet34_deep"), "unknown encoder"),
    (dict(classes=0), "bands and classes"), (dict(decoder_dropout=1), "share")])
def test_refused(wrong, said):
    with pytest.raises(ValueError, match=said): xresnet_unet(**dict(encoder="xresnet18") | wrong)


def test_names():
    assert {"xresnet18", "xresnet34", "xresnet50", "xse_resnext50"} <= set(xresnets()) and not [n for n in xresnets() if "deep" in n]

"""Any encoder, any decoder: sizes, bands, dropout, weights, names, and models that load without asking anybody."""
import copy
import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from aerial_nb.models import weights as weights_chapter
from aerial_nb.models.smp import architectures, encoders, smp_model
from aerial_nb.models.zoo import build
from aerial_nb.training.saved import load_model, save_model

MOBILENET = Path(__file__).parents[1] / "../shared/data/encoders/mobilenet_v2_imagenet_torchvision_names.pth"
needs_mobilenet = pytest.mark.skipif(not MOBILENET.is_file(), reason="the weights of mobilenet_v2 are not here")
SMALL = dict(encoder="tu-mobilenetv3_small_050")


def small_unet(**given): return smp_model(**SMALL | dict(options=dict(decoder_channels=[16, 8, 8, 8, 4])) | given)


@pytest.mark.parametrize("architecture", architectures())
def test_every_decoder_at_odd_sizes(architecture):
    model = smp_model(architecture, "tu-vit_tiny_patch16_224" if architecture == "dpt" else "resnet18", bands=4, classes=2).eval()
    for size in [(45, 70), (1, 33)]:
        with torch.no_grad(): assert model(torch.rand(1, 4, *size)).shape == (1, 2, *size)
    assert model.encoder is model.net.encoder and model.weights == ""


@pytest.mark.parametrize("encoder", ["mobilenet_v2", "tu-mobilenetv3_small_050", "tu-convnext_atto", "mit_b0"])
@pytest.mark.parametrize("bands", [1, 8])
def test_bands_and_gradient_everywhere(encoder, bands):
    torch.manual_seed(0)
    model = smp_model("unet", encoder, bands=bands, classes=3)
    model(torch.randn(2, bands, 37, 61)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert next(m for m in model.encoder.modules() if isinstance(m, nn.Conv2d)).weight.grad.abs().sum() > 0


def test_logits_are_raw_and_one_for_one_class():
    torch.manual_seed(0)
    y = small_unet().eval()(50 * torch.randn(1, 3, 32, 32))
    assert y.shape == (1, 1, 32, 32) and (y < 0).any()


def test_padding_changes_nothing_where_there_is_none():
    model = small_unet().eval()
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad(): assert torch.equal(model(x), model.net(x))


def test_enlarging_is_what_it_says():
    torch.manual_seed(0)
    plain = small_unet().eval()
    large = small_unet(upsample=3).eval()
    large.load_state_dict(plain.state_dict())
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        by_hand = nn.functional.avg_pool2d(plain(nn.functional.interpolate(x, scale_factor=3., mode="bilinear")), 3)
        assert torch.allclose(large(x), by_hand, atol=1e-5) and not torch.allclose(large(x), plain(x), atol=1e-3)


def test_encoders_of_one_size_say_so():
    swin = dict(encoder="tu-swin_tiny_patch4_window7_224")
    with pytest.raises(ValueError, match="one image size only.*img_size=512"): smp_model(**swin)
    with pytest.raises(ValueError, match="multiple of 32"): smp_model(**swin, options=dict(img_size=100))
    model = smp_model(**swin, options=dict(img_size=64)).eval()
    with torch.no_grad(): assert model(torch.rand(1, 3, 37, 61)).shape == (1, 1, 37, 61)
    with pytest.raises(AssertionError, match="(96).*(64)"): model(torch.rand(1, 3, 90, 64))


# ---- dropout

def decoder_runs(model, x):
    with torch.no_grad():
        features = model.encoder(x)
        return [model.net.segmentation_head(model.net.decoder(features)) for _ in range(2)]


@pytest.mark.parametrize("architecture", ["unet", "unetplusplus", "linknet", "segformer"])
def test_dropout_is_in_the_decoder_only(architecture):
    torch.manual_seed(0)
    x = torch.rand(2, 3, 64, 64)
    for share in (0., .5):
        model = smp_model(architecture, "tu-mobilenetv3_small_050", decoder_dropout=share).train()
        for m in model.modules():
            if isinstance(m, _BatchNorm): m.eval()    # leaves dropout as the only difference of two passes
        once, again = decoder_runs(model, x)
        assert torch.equal(once, again) == (share == 0)
        with torch.no_grad(): assert all(torch.equal(a, b) for a, b in zip(model.encoder(x), model.encoder(x)))
        once, again = decoder_runs(model.eval(), x)
        assert torch.equal(once, again)


def test_dropout_drops_whole_channels_at_its_share():
    model = small_unet(decoder_dropout=.4).train()
    seen = []
    model.net.decoder.blocks[0].register_forward_hook(lambda m, i, o: seen.append(o))
    with torch.no_grad(): [model(torch.rand(8, 3, 32, 32)) for _ in range(8)]
    zero = torch.cat([(o == 0).flatten(2).all(2).float() for o in seen])
    assert .3 < zero.mean() < .6      # and the channels that are all zero after a ReLU


def test_a_copy_drops_too():
    twin = copy.deepcopy(small_unet(decoder_dropout=.5)).train()
    x = torch.rand(2, 3, 32, 32)
    assert not torch.equal(twin(x), twin(x)) and torch.equal(twin.eval()(x), twin(x)) and twin.encoder is twin.net.encoder


# ---- weights

@needs_mobilenet
@pytest.mark.parametrize("encoder", ["mobilenet_v2", "tu-mobilenetv2_100"])
@pytest.mark.parametrize("bands", [3, 4])
def test_a_file_is_in_the_encoder(encoder, bands):
    model = smp_model("unet", encoder, weights=str(MOBILENET), bands=bands)
    assert model.weights == MOBILENET.name
    stem = torch.load(MOBILENET, weights_only=True)["features.0.0.weight"].float()   # half precision in the file
    mine = next(m for m in model.encoder.modules() if isinstance(m, nn.Conv2d)).weight
    assert torch.allclose(mine[:, :3], stem * 3 / bands) and mine.shape[1] == bands


def as_its_authors(name: str) -> str:
    "ConvNeXt's layers by the names of its first code."
    for new, old in {"stem.": "downsample_layers.0.", ".blocks.": ".", ".conv_dw.": ".dwconv.", ".mlp.fc1.": ".pwconv1.", ".mlp.fc2.": ".pwconv2.",
                     "head.norm.": "norm.", "head.fc.": "head."}.items(): name = name.replace(new, old)
    stage, _, rest = name.removeprefix("stages.").partition(".downsample.")
    return f"downsample_layers.{stage}.{rest}" if rest else name


def test_names_of_the_authors_are_translated(tmp_path, monkeypatch):
    import timm
    torch.manual_seed(7)
    whole = timm.create_model("convnext_atto_ols").state_dict()
    theirs = dict(sorted((as_its_authors(k), v) for k, v in whole.items()))
    assert "stages.0.0.dwconv.weight" in theirs and "downsample_layers.1.0.weight" in theirs
    torch.save(dict(model=theirs), tmp_path / "authors.pth")
    monkeypatch.setattr(weights_chapter, "fetch", lambda *a: tmp_path / "authors.pth")
    model = smp_model("unet", "tu-convnext_atto_ols", weights="imagenet", bands=4)
    assert model.weights == "imagenet (tu-convnext_atto_ols.a2_in1k)"
    assert torch.equal(model.encoder.model.stages_0.blocks[0].conv_dw.weight, whole["stages.0.blocks.0.conv_dw.weight"])
    assert torch.allclose(model.encoder.model.stem_0.weight[:, 3], whole["stem.0.weight"][:, 0] * 3 / 4)
    with pytest.raises(ValueError, match="authors.pth is not for this encoder. missing"): smp_model("unet", "tu-convnext_pico", weights="imagenet")


@needs_mobilenet
def test_statistics_of_a_pretrained_encoder_keep_their_pace():
    torch.manual_seed(0)
    model = smp_model("unet", "mobilenet_v2", weights=str(MOBILENET)).train()
    norm = next(m for m in model.encoder.modules() if isinstance(m, _BatchNorm))
    first = next(m for m in model.net.decoder.modules() if isinstance(m, _BatchNorm))
    before = norm.running_mean.clone(), norm.running_var.clone()
    model(5 + torch.randn(2, 3, 64, 64))
    assert norm.momentum == .1 and first.momentum == 1
    fresh = smp_model("unet", "mobilenet_v2").train()
    fresh(torch.rand(2, 3, 64, 64))
    assert next(m for m in fresh.encoder.modules() if isinstance(m, _BatchNorm)).momentum == 1
    assert not torch.equal(before[0], norm.running_mean) and torch.isfinite(norm.running_var).all()


def test_evaluation_after_one_step_means_something():
    torch.manual_seed(0)
    model, x = smp_model("unet", "resnet18"), 3 * torch.randn(4, 3, 64, 64) + 5
    trained = model.train()(x).detach()
    with torch.no_grad(): assert (model.eval()(x) - trained).abs().mean() < trained.std()


def no_network(monkeypatch):
    def refuse(source, seconds=0): raise weights_chapter.WeightsError(f"asked for {source.where}")
    monkeypatch.setattr(weights_chapter, "fetch", refuse)


def test_imagenet_must_be_had_and_auto_may_fall_back(monkeypatch, caplog):
    no_network(monkeypatch)
    with pytest.raises(ValueError, match="smp-hub/resnet18.imagenet"): smp_model(encoder="resnet18", weights="imagenet")
    with pytest.raises(ValueError, match="smp-hub/resnet18.swsl"): smp_model(encoder="resnet18", weights="swsl")
    with pytest.raises(ValueError, match="timm/mobilenetv3_small_050.lamb_in1k"): small_unet(weights="imagenet")
    with caplog.at_level(logging.WARNING): assert small_unet(weights="auto").weights == ""
    assert "tu-mobilenetv3_small_050.lamb_in1k starts from RANDOM weights" in caplog.text


def test_saved_and_loaded_without_asking(tmp_path, monkeypatch):
    torch.manual_seed(0)
    given = SMALL | dict(architecture="fpn", weights="auto", bands=4, classes=2, decoder_dropout=.1, upsample=2, options=dict(decoder_pyramid_channels=16))
    asked = []
    def gone(source, seconds=0): asked.append(source); raise weights_chapter.WeightsError("no network")
    monkeypatch.setattr(weights_chapter, "fetch", gone)
    model = build("smp", **given)
    model.train()(torch.rand(2, 4, 40, 40))
    save_model(tmp_path, model, "smp", given, bands=4)
    again, card = load_model(tmp_path)
    assert len(asked) == 1 and card.arguments["weights"] == "auto"
    x = torch.rand(1, 4, 33, 50)
    with torch.no_grad(): assert torch.equal(model.eval()(x), again(x))


# ---- names

@pytest.mark.parametrize("wrong, said", [
    (dict(architecture="unet++"), "unknown architecture 'unet\\+\\+'; did you mean 'unet'"),
    (dict(architecture="Unet"), "did you mean 'unet'"),
    (dict(encoder="resnet43"), "unknown encoder 'resnet43'; did you mean 'resnet34'"),
    (dict(encoder="convnext_tiny"), "timm has it: 'tu-convnext_tiny'"),
    (dict(encoder="tu-mobilenetv3_smal_050"), "did you mean 'tu-mobilenetv3_small_050'"),
    (dict(encoder="tu-resnet18.a1_in1q"), "unknown weights tag.*'tu-resnet18.a1_in1k'"),
    (dict(encoder="timm-efficientnet-b0"), "deprecated.*'tu-tf_efficientnet_b0'"),
    (dict(encoder="timm-mobilenetv3_small_075"), "deprecated.*'tu-tf_mobilenetv3_small_075'"),
    (dict(encoder="timm-regnetx_002"), "deprecated.*'tu-regnetx_002'"),
    (dict(encoder="timm-nothing"), "deprecated.*begin with 'tu-'"),
    (dict(options=dict(decoder_atention_type="scse")), "unknown option of Unet.*'decoder_attention_type'"),
    (dict(options=dict(activation="sigmoid")), "raw logits"),
    (dict(options=dict(classes=2)), "argument of smp_model"),
    (dict(architecture="dpt"), "dpt cannot be built on resnet18: Only Timm encoders"),
    (dict(encoder="tu-resnet18", options=dict(no_such=1)), "unet cannot be built on tu-resnet18 with .*no_such"),
    (dict(decoder_dropout=1.), "share in"), (dict(bands=0), "bands and classes"), (dict(upsample=0), "upsample is 1, 2 or 3"),
    (dict(weights="imagnet"), "did you mean 'imagenet'"),
])
def test_refused(wrong, said):
    with pytest.raises(ValueError, match=said): smp_model(**dict(encoder="resnet18") | wrong)


def test_lists():
    assert len(architectures()) == 12 and "resnet34" in encoders("resnet") and "tu-resnet18" in encoders("resnet18")
    assert not [n for n in encoders() if n.startswith("timm-")] and len(encoders()) == len(set(encoders())) > 1000

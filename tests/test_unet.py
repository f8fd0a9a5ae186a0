"""The U-Net: the known count, any size, dropout only in the decoder and in training, saved and loaded."""
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from aerial_nb.models.anysize import AnySize, Wrapped, pad_to
from aerial_nb.models.spin import parameters_of
from aerial_nb.models.unet import UNet
from aerial_nb.models.zoo import build
from aerial_nb.training.saved import load_model, save_model


def by_hand(bands, classes, width, depth):
    "The sum over layers, from the paper's figure: 3 x 3 pairs without bias, batch norms, 2 x 2 transposed, 1 x 1."
    c = [width << level for level in range(depth + 1)]
    pairs = [(bands, c[0]), *zip(c, c[1:]), *((2 * n, n) for n in c[:-1])]
    return sum(9 * i * o + 9 * o * o + 4 * o for i, o in pairs) + sum(2 * n * n * 4 + n for n in c[:-1]) + classes * (width + 1)


def test_the_standard_one_has_31_million():
    with torch.device("meta"): assert parameters_of(UNet()) == by_hand(3, 1, 64, 4) == 31_037_633


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 6), st.integers(1, 5))
def test_counts(bands, classes, width, depth):
    with torch.device("meta"): assert parameters_of(UNet(bands, classes, width, depth)) == by_hand(bands, classes, width, depth)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 4]), st.sampled_from([1, 2, 3]))
def test_any_size_and_bands(height, width, bands, upsample):
    net = UNet(bands, 2, 2, 3, upsample=upsample).eval()
    with torch.no_grad(): assert net(torch.rand(1, bands, height, width)).shape == (1, 2, height, width)


def test_gradient_flows_everywhere():
    net = UNet(4, 1, 4, 3, dropout=.2)
    net(torch.rand(2, 4, 33, 47)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in net.named_parameters() if "enlarge" not in n or "bias" not in n)


def test_skips_carry_the_place():
    "A pixel that changes moves the logits there most, although the bottom of the network is 16 times coarser."
    torch.manual_seed(0)
    net = UNet(1, 1, 8, 4).eval()
    x = torch.zeros(1, 1, 64, 64)
    y = x.clone(); y[..., 20, 41] = 1
    with torch.no_grad(): change = (net(y) - net(x)).abs()[0, 0]
    row, col = divmod(int(change.argmax()), 64)
    assert abs(row - 20) <= 2 and abs(col - 41) <= 2


def test_dropout_is_in_the_decoder_and_in_training():
    torch.manual_seed(0)
    net = UNet(3, 1, 4, 2, dropout=.5)
    assert not [m for m in net.down.modules() if isinstance(m, nn.Dropout2d)]
    assert len([m for m in net.up.modules() if isinstance(m, nn.Dropout2d)]) == 2
    x = torch.rand(1, 3, 32, 32)
    assert not torch.equal(net.train()(x), net(x)) and torch.equal(net.eval()(x), net(x))
    assert net.state_dict().keys() == UNet(3, 1, 4, 2).state_dict().keys()


def test_evaluation_after_one_step_means_something():
    torch.manual_seed(0)
    net, x = UNet(3, 1, 4, 3), 5 * torch.randn(4, 3, 32, 32) + 10
    trained = net.train()(x).detach()
    with torch.no_grad(): assert (net.eval()(x) - trained).abs().mean() < .3 * trained.std()


@pytest.mark.parametrize("wrong", [dict(dropout=1.), dict(dropout=-.1), dict(upsample=4), dict(depth=0), dict(bands=0), dict(classes=0)])
def test_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): UNet(**dict(width=2) | wrong)


def test_wrong_bands_are_named():
    with pytest.raises(ValueError, match=r"expected \(b, 4, h, w\), got \(1, 3, 8, 8\).*bands="): UNet(4, 1, 2, 2)(torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("upsample", [1, 3])
def test_saved_and_loaded(tmp_path, upsample):
    given = dict(bands=4, classes=2, width=4, depth=2, dropout=.1, upsample=upsample)
    net = build("unet", **given)
    net.train()(torch.rand(2, 4, 16, 16))
    save_model(tmp_path, net, "unet", given, bands=4)
    again, card = load_model(tmp_path)
    x = torch.rand(1, 4, 19, 30)
    with torch.no_grad(): assert torch.equal(net.eval()(x), again(x)) and card.arguments["upsample"] == upsample


# ---- the wrapper

class Mean(nn.Module):
    "Logits are the mean over bands, at sides that divide by eight."
    def __init__(self): super().__init__(); self.encoder = nn.Identity()
    def forward(self, x):
        assert x.shape[-2] % 8 == 0 and x.shape[-1] % 8 == 0 and min(x.shape[-2:]) >= 16
        return x.mean(1, keepdim=True)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 3]))
def test_pixels_stay_where_they_are(height, width, upsample):
    net = Wrapped(Mean(), 8, 3, upsample, least=16)
    ramp = (torch.arange(height)[:, None] * 2. + torch.arange(width)).expand(1, 3, height, width)
    out = net(ramp)
    assert out.shape == (1, 1, height, width)
    inside = out[0, 0, 1:-1, 1:-1] - ramp[0, 0, 1:-1, 1:-1]
    assert inside.abs().max() < 1e-4 if inside.numel() else True


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 8, 32]), st.sampled_from([0, 64]))
def test_padding_repeats_the_border(height, width, stride, least):
    x = torch.rand(1, 2, height, width)
    y = pad_to(x, stride, least)
    assert y.shape[-2] % stride == y.shape[-1] % stride == 0 and min(y.shape[-2:]) >= least
    assert y.shape[-2] < max(height + stride, least + 1) and torch.equal(y[..., :height, :width], x)
    assert torch.equal(y[..., height:, :width], x[..., -1:, :].expand(1, 2, y.shape[-2] - height, width))


def test_no_encoder_is_no_attribute():
    assert not hasattr(UNet(width=2, depth=1), "encoder") and UNet(width=2, depth=1).weights == "" and issubclass(UNet, AnySize)
    with pytest.raises(AttributeError): Wrapped(Mean(), 8, encoder="body")

"""The Sat2Graph network: counts, sizes, layout, and what TensorFlow's padding does."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aerial_nb.models.sat2graph import PAIRS, Enlarge, Residual, Sat2Graph, as_tensor, residuals
from aerial_nb.models.zoo import build
from aerial_nb.roads.gte import CHANNELS


def count(net): return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("road, width, expected", [(True, 12, 55_286_128), (False, 12, 55_285_262), (True, 24, 220_998_052)])
def test_published_counts(road, width, expected):
    with torch.device("meta"): net = build("sat2graph", road=road, width=width)
    assert count(net) == expected


def test_published_tensors_and_statistics():
    with torch.device("meta"): net = Sat2Graph()
    assert len(list(net.parameters())) == 360
    assert sum(b.numel() for name, b in net.named_buffers() if "running" in name) == 40_944


def test_published_norms():
    with torch.device("meta"): net = Sat2Graph()
    inside = {id(n) for m in net.modules() if isinstance(m, Residual) for n in m.norms}
    inside |= {id(m[-2]) for m in net.modules() if isinstance(m, nn.Sequential) and len(m) > 1 and isinstance(m[0], Residual)}
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): assert m.eps == (1e-5 if id(m) in inside else 1e-3) and m.usual_momentum == .01


def test_the_last_join_and_the_first_layer_have_no_norm():
    with torch.device("meta"): net = Sat2Graph()
    for part in (net.first, net.last): assert not any(isinstance(m, nn.BatchNorm2d) for m in part.modules())


@given(rows=st.integers(33, 100), cols=st.integers(33, 100))
@settings(max_examples=6, deadline=None)
def test_any_size(rows, cols):
    net = Sat2Graph(bands=1, width=1).eval()
    with torch.no_grad(): assert net(torch.rand(1, 1, rows, cols)).shape == (1, 28, rows, cols)


def test_enlarging_keeps_the_first_row_and_drops_the_last():
    layer = Enlarge(1, norm=False)
    nn.init.zeros_(layer.conv.weight); nn.init.zeros_(layer.conv.bias)
    with torch.no_grad(): layer.conv.weight[0, 0, 0, 0] = 1         # the tap that stays where it is
    x = torch.rand(1, 1, 5, 4)
    assert torch.equal(layer(x)[..., ::2, ::2], x)


def test_bad_arguments():
    for wrong in (dict(residual_steps=4), dict(residual_steps=12), dict(width=0)):
        with pytest.raises(ValueError): Sat2Graph(**wrong)
    with pytest.raises(ValueError, match="expected"): Sat2Graph(width=1)(torch.rand(1, 4, 64, 64))
    with pytest.raises(ValueError, match="did you mean"): build("sat2graph", witdh=3)


@pytest.mark.parametrize("channels", [26, 28])
def test_probabilities_are_softmax_of_pairs(channels):
    logits = torch.randn(2, channels, 8, 9, dtype=torch.float16)
    out, pairs = as_tensor(logits), PAIRS + ((26,) if channels == 28 else ())
    assert out.dtype == torch.float32 and out is not logits
    for k in pairs: assert torch.allclose(out[:, k:k + 2], logits[:, k:k + 2].float().softmax(1), atol=1e-5)
    rest = [i for i in range(channels) if i not in pairs and i - 1 not in pairs]
    assert torch.equal(out[:, rest], logits[:, rest].float()) and len(rest) == 12
    assert [CHANNELS[i].split()[1] for i in rest] == ["of"] * 12


def test_probabilities_refuse_masks():
    with pytest.raises(ValueError, match="26 or 28"): as_tensor(torch.rand(1, 2, 4, 4))


def test_another_backbone_has_the_same_outputs():
    net = build("sat2graph_smp", encoder="mobilenet_v2", road=False).eval()
    with torch.no_grad(): assert net(torch.rand(1, 3, 50, 64)).shape == (1, 26, 50, 64)
    assert net.encoder is not None and net.weights == ""


def test_a_gradient_reaches_every_tensor():
    net = Sat2Graph(bands=3, width=2)
    net(torch.rand(2, 3, 64, 64)).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
    assert isinstance(residuals(2, 1)[-1], nn.ReLU)

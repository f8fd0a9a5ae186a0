"""SPIN and the hourglass: the published module to 1e-5, published parameter counts, the cures, any size."""
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from aerial_nb.models.hourglass import StackedHourglass, init_as_published
from aerial_nb.models.spin import SPIN, InteractionGraph, SpatialGraph, SpinPyramid, parameters_of
from aerial_nb.models.zoo import build

REFERENCE = Path(__file__).parents[1] / "../shared/data/reference/spin_module_ref.npz"
needs_reference = pytest.mark.skipif(not REFERENCE.is_file(), reason="the published intermediates are not here")

# the names of the stored parameters, in the order of this package's modules
PARTS = {"interaction_phi": "interaction.phi", "interaction_theta": "interaction.theta", "interaction_adjacency": "interaction.adjacency",
         "interaction_update": "interaction.update", "interaction_back": "interaction.back", "spatial_down0": "spatial.down.0",
         "spatial_down1": "spatial.down.1", "spatial_down2": "spatial.down.2", "spatial_gcn_update": "spatial.update",
         "spatial_gcn_out": "spatial.out", "fuse": "fuse"}


def named(key: str) -> str:
    "`interaction_phi_bn_w` as `interaction.phi.1.weight`."
    part, _, kind = key.rpartition("_")
    kind = dict(w="weight", b="bias")[kind]
    if part.startswith("spatial_gcn_") and part[-1] in "kvq" and len(part) == len("spatial_gcn_k"): return f"spatial.{part[-1]}.{kind}"
    norm = part.endswith("_bn")
    return f"{PARTS[part.removesuffix('_bn')]}.{int(norm)}.{kind}"


def published(ratio: int) -> tuple[SPIN, dict]:
    z = np.load(REFERENCE)
    tensors = {k.removeprefix(f"c16r{ratio}/"): torch.from_numpy(z[k]) for k in z.files if k.startswith(f"c16r{ratio}/")}
    weights = {named(k.removeprefix("param/")): v for k, v in tensors.items() if k.startswith("param/")}
    module = SPIN(16, ratio, normalise=False)
    missing = module.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys
    assert all(("running_" in k or "num_batches" in k) for k in missing.missing_keys)
    return module, tensors


@needs_reference
@pytest.mark.parametrize("ratio", [1, 2])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_published_module_agrees_at_every_step(ratio, mode):
    module, t = published(ratio)
    module.train(mode == "train")
    s, g, x = module.spatial, module.interaction, t["x"]
    low = s.down(x)
    logits = s.logits(low)
    phi, theta = g.phi(x).flatten(2), g.theta(x).flatten(2)
    nodes = g.nodes(phi, theta)
    module.load_state_dict(published(ratio)[0].state_dict())  # the steps above moved running statistics
    found = dict(spatial_down8=low, spatial_adj_logits=logits, spatial_adj=s.adjacency(low), spatial_gcn_out=s.reason(low),
                 spatial_out=s(x), interaction_nodes=nodes, interaction_nodes_updated=g.reason(nodes), interaction_out=g(x), out=module(x))
    for name, value in found.items():
        want = t[f"{mode}/{name}"]
        worst = ((value - want).abs().max() / want.abs().max().clamp(min=1)).item()   # sums over 1,320 positions in float32
        assert worst < 1e-5, f"{mode}/{name} is off by {worst:.1e}"


@needs_reference
def test_the_short_way_agrees_with_the_published_interaction():
    module, t = published(1)
    module.train()
    module.interaction.associate = True
    assert torch.allclose(module.interaction(t["x"]), t["train/interaction_out"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, count", [("hourglass", 29_002_012), ("spin", 29_482_908), ("spin_pyramid", 29_271_692)])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("tasks", ["road", "road,orientation"])
def test_parameter_counts_are_the_published_ones(name, count, normalise, tasks):
    with torch.device("meta"): model = build(name, normalise=normalise, tasks=tasks)
    assert parameters_of(model) == count


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([(8, 1), (16, 2), (32, 4)]), st.integers(9, 40), st.integers(9, 40), st.booleans())
def test_the_short_way_is_the_plain_way(shape, h, w, channels_last):
    torch.manual_seed(h * w)
    channels, ratio = shape
    quick, plain = InteractionGraph(channels, ratio), InteractionGraph(channels, ratio)
    plain.load_state_dict(quick.state_dict()); plain.associate = False
    x = torch.randn(3, channels, h, w).relu()
    if channels_last: x = x.to(memory_format=torch.channels_last)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    ya, yb = quick(a), plain(b)
    assert torch.allclose(ya, yb, rtol=1e-3, atol=1e-4)
    up = torch.randn_like(ya)
    (ya * up).sum().backward(); (yb * up).sum().backward()
    assert (a.grad - b.grad).norm() < 1e-2 * b.grad.norm()   # a value at the kink of a ReLU may fall on either side
    for (name, p), q in zip(quick.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad - q.grad).norm() < 1e-2 * q.grad.norm() + 1e-4, name
    for (name, p), q in zip(quick.named_buffers(), plain.buffers(), strict=True):
        assert torch.allclose(p.double(), q.double(), rtol=1e-3, atol=1e-4), name


def test_the_short_way_is_really_taken(monkeypatch):
    import aerial_nb.models.spin as spin
    taken = []
    short = spin._associated
    monkeypatch.setattr(spin, "_associated", lambda g, x: taken.append(tuple(x.shape)) or short(g, x))
    model = build("spin_pyramid", width=32, blocks=1, tasks="road")
    model(torch.rand(2, 3, 64, 64))
    assert len(taken) == 4   # three scales and the bottleneck
    model.half()
    assert not model.tail["road"].early.levels[0].interaction.can_associate


def smooth(side: int, channels: int, n: int = 2) -> torch.Tensor:
    noise = torch.randn(n, channels, side // 8 + 2, side // 8 + 2, generator=torch.Generator().manual_seed(3))
    return F.interpolate(noise, scale_factor=8, mode="bilinear")[..., :side, :side].relu()


@pytest.mark.parametrize("channels, ratio", [(32, 2), (64, 1)])
def test_output_does_not_depend_on_the_size_of_the_map(channels, ratio):
    torch.manual_seed(0)
    module = SPIN(channels, ratio)
    for _ in range(40): module(smooth(64, channels))
    module.eval()
    with torch.no_grad(): spread = [module(smooth(s, channels, 1)).std().item() for s in (64, 128, 256, 512)]
    assert max(spread) < 2 * min(spread), spread


def test_float16_stays_finite_at_the_map_of_a_512_px_input():
    torch.manual_seed(0)
    x = smooth(513, 32, 1).half()
    for module in (SPIN(32, 2).half().train(), SPIN(32, 2).half().eval()):
        with torch.no_grad(): assert module(x).isfinite().all()
    with torch.no_grad(), torch.autocast("cpu", torch.float16): assert SPIN(32, 2)(x.float()).isfinite().all()


@pytest.mark.parametrize("name", ["hourglass", "spin", "spin_pyramid"])
def test_evaluation_after_one_step_does_not_blow_up(name):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 128, 128)
    model = build(name, width=32, blocks=2, tasks="road")
    trained = model(x)[-1].abs().max().item()
    with torch.no_grad(): assert model.eval()(x).abs().max().item() < 3 * trained + 1


@pytest.mark.parametrize("name", ["spin", "spin_pyramid"])
def test_usual_statistics_blow_up_ten_times_more_without_normalisation(name):
    torch.manual_seed(0)
    x, largest = torch.randn(2, 3, 128, 128), {}
    for normalise in (True, False):
        model = build(name, width=32, blocks=2, tasks="road", normalise=normalise)
        model.warm_steps = None
        model(x)
        with torch.no_grad(): largest[normalise] = model.eval()(x).abs().max().item()
    assert largest[True] < largest[False] / 10, largest


def test_a_normalised_module_alone_is_tame_after_one_step():
    torch.manual_seed(0)
    module, x = SPIN(32, 2), torch.randn(2, 32, 128, 128).relu()
    trained = module(x).abs().max()
    assert module.eval()(x).abs().max() < 5 * trained


@pytest.mark.parametrize("name", ["hourglass", "spin", "spin_pyramid"])
@pytest.mark.parametrize("h, w", [(255, 255), (250, 131), (40, 33)])
def test_any_size_comes_back(name, h, w):
    model = build(name, width=16, blocks=1).eval()
    with torch.no_grad(): out = model(torch.rand(1, 3, h, w))
    assert out["road"].shape == (1, 2, h, w) and out["orientation"].shape == (1, 37, h, w)


@pytest.mark.slow
def test_a_whole_massachusetts_tile_comes_back():
    model = build("spin_pyramid", width=16, blocks=1, tasks="road").eval()
    with torch.no_grad(): assert model(torch.rand(1, 3, 1500, 1500)).shape == (1, 2, 1500, 1500)


def test_training_gives_four_outputs_from_coarse_to_full():
    outputs = build("spin", width=16, blocks=1)(torch.rand(2, 3, 64, 64))
    for task, classes in (("road", 2), ("orientation", 37)):
        assert [tuple(o.shape[1:]) for o in outputs[task]] == [(classes, 16, 16), (classes, 16, 16), (classes, 32, 32), (classes, 64, 64)]


def test_the_task_not_asked_for_is_not_computed():
    model = build("spin", width=16, blocks=1, tasks="road")
    called = []
    model.decoder["orientation"].register_forward_hook(lambda *_: called.append("decoder"))
    model.hourglass[1].bottom["orientation"].register_forward_hook(lambda *_: called.append("bottom"))
    model.hourglass[0].bottom["orientation"].register_forward_hook(lambda *_: called.append("first stack"))
    model(torch.rand(1, 3, 64, 64))
    assert called == ["first stack"]   # whose draft the second stack reads


def test_channels_last_is_kept_through_the_network():
    model = build("spin_pyramid", width=16, blocks=1, tasks="road").to(memory_format=torch.channels_last)
    lost = []
    for name, layer in model.named_modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.ConvTranspose2d, SPIN)):
            layer.register_forward_hook(lambda m, i, o, name=name: lost.append(name) if min(o.shape[1:]) > 1
                                        and not o.is_contiguous(memory_format=torch.channels_last) else None)
    model(torch.rand(2, 3, 128, 128).to(memory_format=torch.channels_last))
    heavy = [n for n in lost if not n.endswith("spatial.out.0")]   # the coarse map of a few positions
    assert not heavy, heavy


def test_weights_start_as_published():
    torch.manual_seed(0)
    model = StackedHourglass(width=64, blocks=1)
    conv = model.hourglass[0].skip[0][0].body[0]
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    before = model.bottleneck
    init_as_published(model)
    assert before is model.bottleneck


def test_messages_average_and_published_ones_do_not():
    low = torch.randn(1, 16, 9, 7)
    ours, theirs = SpatialGraph(16), SpatialGraph(16, normalise=False)
    assert torch.allclose(ours.adjacency(low).sum(1), torch.ones(1, 8), atol=1e-5)
    assert torch.allclose(theirs.adjacency(low).sum(2), torch.ones(1, 8), atol=1e-5)


def test_pyramid_answers_are_averaged():
    torch.manual_seed(0)
    x = smooth(64, 16)
    for levels in (1, 2, 3): assert SpinPyramid(16, 2, levels)(x).abs().max() < 12
    assert SpinPyramid(16, 2, 3, normalise=False)(x).std() > SpinPyramid(16, 2, 3)(x).std()


@pytest.mark.parametrize("wrong, says", [
    (dict(name="spin_piramid"), "did you mean 'spin_pyramid'"), (dict(name="spin", ratio=2), "unknown argument of spin 'ratio'"),
    (dict(name="hourglass", width=30), "multiple of 8, got 30"), (dict(name="hourglass", tasks="roads"), "unknown task roads"),
    (dict(name="hourglass", tasks=""), "tasks is empty"), (dict(name="hourglass", bottleneck="river"), "unknown task river")])
def test_mistakes_are_named(wrong, says):
    with pytest.raises(ValueError, match=says): build(**wrong)


def test_arguments_are_plain_values_and_build_the_same_again():
    arguments = dict(width=16, blocks=1, bands=5, bottleneck="road", pyramid=2, late_ratio=2, stem_ratio=4, stem_skip=True, tasks="road")
    one, two = build("hourglass", **arguments), build("hourglass", **arguments)
    two.load_state_dict(one.state_dict())
    x = torch.rand(1, 5, 48, 48)
    with torch.no_grad(): assert torch.equal(one.eval()(x), two.eval()(x))

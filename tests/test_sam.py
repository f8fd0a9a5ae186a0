"""SAM's encoder with two decoders, and LoRA: frozen is frozen, sizes, bands, weights, counts."""
import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from aerial_nb.models.lora import LoraLinear, add_lora, merge_lora
from aerial_nb.models.sam import SamEncoder, VARIANTS, pad_to_patches, sam_conv, sam_source, sam_unet, sam_vit, set_trained, start_sam
from aerial_nb.models.weights import WeightsError
from aerial_nb.models.zoo import build, model_arguments
from aerial_nb.training.saved import load_model, save_model

MAKERS = {"sam_conv": sam_conv, "sam_unet": sam_unet}
both = pytest.mark.parametrize("name", MAKERS)


def tiny(name, **arguments):
    torch.manual_seed(0)
    return MAKERS[name](**dict(weights=None, variant="tiny") | arguments)


def with_positions(vit):
    "Position tables are zero in a new encoder, and would hide what is done with them."
    for n, p in vit.named_parameters():
        if "pos" in n: nn.init.normal_(p, std=0.5)
    return vit


def trained_steps(model, steps=4, size=(48, 33)):
    own = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(own, lr=1e-2, weight_decay=0.5)
    x, goal = torch.randn(2, model.encoder.vit.patch_embed.proj.in_channels, *size), (torch.rand(2, 1, *size) > 0.5).float()
    model.train()
    losses = []
    for _ in range(steps):
        opt.zero_grad()
        loss = F.binary_cross_entropy_with_logits(model(x), goal)
        loss.backward(); opt.step(); losses.append(loss.item())
    return losses


def trained(module): return sum(p.numel() for p in module.parameters() if p.requires_grad)


# ---- sizes and bands

@settings(max_examples=8, deadline=None)
@given(name=st.sampled_from(list(MAKERS)), h=st.integers(1, 90), w=st.integers(1, 90), bands=st.sampled_from([1, 3, 4]), classes=st.sampled_from([1, 3]))
def test_any_size_bands_and_classes(name, h, w, bands, classes):
    model = tiny(name, bands=bands, classes=classes).eval()
    with torch.no_grad(): logits = model(torch.randn(1, bands, h, w))
    assert logits.shape == (1, classes, h, w) and logits.dtype == torch.float32 and logits.isfinite().all()


@both
def test_padding_is_zeros_below_and_to_the_right(name):
    model, x = tiny(name).eval(), torch.randn(1, 3, 40, 23)
    with torch.no_grad(): assert torch.allclose(model(x), model(F.pad(x, (0, 9, 0, 8)))[..., :40, :23], atol=1e-6)
    assert pad_to_patches(x).shape == (1, 3, 48, 32) and pad_to_patches(x[..., :32, :16]).shape == (1, 3, 32, 16)


@pytest.mark.parametrize("size", [(128, 128), (64, 96), (16, 16)])
def test_the_encoder_computes_what_timm_computes(size):
    vit = with_positions(sam_vit("tiny")).eval()
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        neck, taps = vit.forward_intermediates(image, indices=[1, 3, 5])
        found, plain = SamEncoder(vit, (2, 4, 6))(image), vit.forward_features(image)
    for mine, theirs in zip((*found, found[-1]), (*taps, neck, plain), strict=True): assert torch.equal(mine, theirs)


def test_layer_norms_are_those_sam_was_trained_with():
    assert {m.eps for m in sam_vit("tiny").modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


def test_positions_are_stretched_to_the_grid():
    vit = with_positions(sam_vit("tiny")).eval()
    moved = copy.deepcopy(vit)
    nn.init.zeros_(moved.pos_embed)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad(): assert not torch.allclose(SamEncoder(vit)(image)[0], SamEncoder(moved)(image)[0], atol=1e-2)


def test_blocks_that_see_everything_are_the_published_ones():
    with torch.device("meta"):
        for variant, blocks in dict(vit_b=(3, 6, 9, 12), vit_l=(6, 12, 18, 24), vit_h=(8, 16, 24, 32)).items():
            vit = sam_vit(variant)
            assert tuple(i + 1 for i, b in enumerate(vit.blocks) if not b.window_size) == blocks
        model = sam_unet(weights=None)
    assert model.encoder.names == ("block3", "block6", "block9", "neck") and model.encoder.channels == (768, 768, 768, 256)


# ---- frozen

@both
def test_frozen_weights_and_statistics_do_not_move(name):
    model = tiny(name)
    before, decoder = copy.deepcopy(model.encoder.state_dict()), copy.deepcopy(model.head.state_dict())
    losses = trained_steps(model, 6)
    assert all(torch.equal(v, before[k]) for k, v in model.encoder.state_dict().items())
    assert not all(torch.equal(v, decoder[k]) for k, v in model.head.state_dict().items()) and losses[-1] < losses[0]
    assert not any(m.training for m in model.encoder.modules()) and model.head.training
    assert all(p.grad is None for p in model.encoder.parameters())


@both
def test_a_frozen_encoder_keeps_no_activations(name):
    model = tiny(name).train()
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t)
    with hooks: maps = model.features(torch.randn(1, 3, 32, 32))
    assert not kept and not any(m.requires_grad for m in maps)
    with hooks: maps = tiny(name, lora_rank=1).features(torch.randn(1, 3, 32, 32))
    assert kept and maps[-1].requires_grad


@both
def test_only_the_decoder_is_in_the_optimiser(name, tmp_path):
    from fastai.data.core import DataLoaders
    from aerial_nb.training.learner import Recipe, learner_for
    from aerial_nb.training.records import Folder
    model = tiny(name)
    data = torch.utils.data.TensorDataset(torch.randn(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.uint8))
    from fastai.data.load import DataLoader
    learn = learner_for(model, DataLoaders(*[DataLoader(data, bs=2)] * 2), Recipe(epochs=1, loss="bce"), Folder(tmp_path), quiet=True)
    learn.create_opt()
    inside = {id(p) for p in model.encoder.parameters()}
    ours = [p for group in learn.opt.opt.param_groups for p in group["params"]]
    assert ours and not inside & {id(p) for p in ours}
    assert sum(p.numel() for p in ours) == trained(model)


def test_unfrozen_blocks_train_and_those_before_do_not():
    model = tiny("sam_conv", unfreeze_blocks=2)
    before = copy.deepcopy(model.encoder.vit.state_dict())
    trained_steps(model)
    moved = {k.split(".")[0] + "." + k.split(".")[1] for k, v in model.encoder.vit.state_dict().items() if not torch.equal(v, before[k])}
    assert {m for m in moved if m.startswith("blocks")} == {"blocks.6", "blocks.7"} and any(m.startswith("neck") for m in moved)
    assert not any(m.startswith(("pos", "patch")) for m in moved) and model.encoder.trained_from() == 7


@pytest.mark.parametrize("arguments, message", [
    (dict(frozen=False, lora_rank=2), "set frozen=True"), (dict(frozen=False, unfreeze_blocks=1), "set frozen=True"),
    (dict(unfreeze_blocks=9), "0..8"), (dict(unfreeze_blocks=-1), "0..8"), (dict(lora_rank=-1), "0 or more"),
    (dict(unfreeze_blocks=8, lora_rank=1), "none is left"), (dict(encoder_amp="fp16"), "encoder_amp"), (dict(variant="vit_x"), "known: vit_b"),
])
def test_impossible_choices_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message): tiny("sam_conv", **arguments)


def test_checkpointing_gives_the_same_gradients():
    grads = []
    for again in (False, True):
        model = tiny("sam_unet", lora_rank=2, checkpointing=again, decoder_dropout=0.0).train()
        for n, p in model.named_parameters():
            if n.endswith("lora_b"): nn.init.constant_(p, 0.01)
        torch.manual_seed(1)
        model(torch.randn(1, 3, 32, 32)).square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True): assert torch.allclose(a, b, atol=1e-6)


def test_encoder_in_bf16_is_close_and_its_own():
    plain, half = tiny("sam_conv").eval(), tiny("sam_conv", encoder_amp="bf16").eval()
    x = torch.randn(1, 3, 64, 64)
    a, b = plain.features(x)[0], half.features(x)[0]
    assert b.dtype == torch.float32 and 0 < (a - b).abs().max() < 0.1 * a.abs().max()
    exact = tiny("sam_conv", encoder_amp="float32").eval()
    with torch.autocast("cpu", torch.bfloat16): assert torch.equal(exact.features(x)[0], a) and not torch.equal(plain.features(x)[0], a)


# ---- how many

def test_counts_of_the_real_network():
    with torch.device("meta"):
        conv, unet, lora, two = (f(weights=None, **a) for f, a in
                                 ((sam_conv, {}), (sam_unet, {}), (sam_conv, dict(lora_rank=4)), (sam_conv, dict(unfreeze_blocks=2))))
    assert sum(p.numel() for p in conv.encoder.parameters()) == 89_670_912
    assert 1e6 < trained(conv) < 3e6 and 5e6 < trained(unet) < 10e6
    assert trained(conv.encoder) == trained(unet.encoder) == 0
    assert trained(lora) - trained(conv) == 12 * 4 * (768 + 3 * 768)
    block, neck = (sum(p.numel() for p in m.parameters()) for m in (two.encoder.vit.blocks[-1], two.encoder.vit.neck))
    assert trained(two.encoder) == sum(p.numel() for b in two.encoder.vit.blocks[-2:] for p in b.parameters()) + neck and block


@both
def test_dropout_is_in_the_decoder_alone(name):
    model = tiny(name, decoder_dropout=0.4)
    rates = {n: m.p for n, m in model.named_modules() if isinstance(m, (nn.Dropout, nn.Dropout2d)) and m.p > 0}
    assert len(rates) == 2 and set(rates.values()) == {0.4} and not any(n.startswith("encoder") for n in rates)
    assert {m.p for m in MAKERS[name](weights=None, variant="tiny").modules() if isinstance(m, nn.Dropout2d)} == {0.3}
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad(): assert torch.equal(model.eval()(x), model(x)) and not torch.equal(model.train()(x), model(x))


# ---- two halves

@both
def test_given_features_the_encoder_is_not_called(name):
    model, x = tiny(name).eval(), torch.randn(2, 3, 50, 70)
    with torch.no_grad():
        whole, maps = model(x), model.features(x)
        model.encoder.forward = None
        assert torch.equal(model(x, *maps), whole)
        close = model(x, *(m.half() for m in maps))
    assert (close - whole).abs().max() < 0.01 * whole.abs().max()
    with pytest.raises(ValueError, match="the decoder reads"): model(x, *maps, maps[0])


# ---- weights

@pytest.fixture(scope="module")
def donor(tmp_path_factory):
    torch.manual_seed(3)
    vit, folder = with_positions(sam_vit("tiny")), tmp_path_factory.mktemp("weights")
    state = vit.state_dict()
    meta = {"image_encoder." + k.replace("mlp.fc", "mlp.lin"): v for k, v in state.items()}
    torch.save(state, folder / "timm.pth")
    torch.save(meta | {"mask_decoder.x": torch.zeros(3), "prompt_encoder.y": torch.zeros(2)}, folder / "meta.pth")
    from safetensors.torch import save_file
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "timm.safetensors")
    return vit, folder


@pytest.mark.parametrize("file", ["timm.pth", "timm.safetensors", "meta.pth"])
def test_a_file_in_any_of_the_layouts(donor, file):
    model = build("sam_conv", variant="tiny", weights=str(donor[1] / file))
    assert model.weights == file
    for k, v in donor[0].state_dict().items(): assert torch.equal(model.encoder.vit.state_dict()[k], v)


def test_lora_and_bands_on_top_of_a_file(donor, caplog):
    with caplog.at_level(logging.WARNING): model = build("sam_unet", variant="tiny", weights=str(donor[1] / "meta.pth"), bands=5, lora_rank=2)
    got, rgb = model.encoder.vit.patch_embed.proj.weight, donor[0].patch_embed.proj.weight
    assert torch.allclose(got, rgb[:, [0, 1, 2, 0, 1]] * 3 / 5) and "adapted to the bands" in caplog.text
    assert torch.equal(model.encoder.vit.blocks[0].attn.qkv.weight, donor[0].blocks[0].attn.qkv.weight)


def test_wrong_files_are_refused_with_differences(donor, tmp_path):
    state = donor[0].state_dict()
    faults = {"1 missing, such as neck.0.weight.": {k: v for k, v in state.items() if k != "neck.0.weight"},
              "1 left over, such as surplus": state | {"surplus": torch.zeros(1)},
              "pos_embed": state | {"pos_embed": torch.zeros(1, 4, 4, 48)},
              "left over, such as layer0.weight": {f"layer{i}.weight": v for i, v in enumerate(state.values())}}
    for told, weights in faults.items():
        torch.save(weights, tmp_path / "x.pth")
        with pytest.raises(WeightsError) as fault: sam_conv(variant="tiny", weights=str(tmp_path / "x.pth"))
        assert told in str(fault.value) and "x.pth" in str(fault.value)
    (tmp_path / "x.pth").write_bytes(b"no weights")
    with pytest.raises(WeightsError, match="x.pth"): sam_conv(variant="tiny", weights=str(tmp_path / "x.pth"))
    with pytest.raises(WeightsError, match="roofs.pth"): sam_conv(variant="tiny", weights="roofs.pth")


def test_published_weights_that_cannot_be_had(monkeypatch, caplog, tmp_path):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with torch.device("meta"): vit = sam_vit("vit_b")
    for weights in ("sam", "imagenet"):
        with pytest.raises(WeightsError, match="samvit_base_patch16.sa1b"): start_sam(vit, weights, "vit_b")
    with caplog.at_level(logging.WARNING): assert start_sam(vit, "auto", "vit_b") == ""
    assert "RANDOM" in caplog.text
    with pytest.raises(WeightsError, match="nobody trained it"): sam_conv(variant="tiny", weights="sam")
    assert [sam_source(v).repo for v in VARIANTS] == [f"timm/samvit_{n}_patch16.sa1b" for n in ("base", "large", "huge")] + [""]


def test_published_weights_from_the_cache_of_the_hub(donor, monkeypatch, tmp_path):
    from aerial_nb.models import weights
    monkeypatch.setattr(weights, "fetch", lambda source, seconds: donor[1] / "timm.safetensors")
    vit = sam_vit("tiny")
    assert start_sam(vit, "sam", "tiny").startswith("sam (") and torch.equal(vit.pos_embed, donor[0].pos_embed)


def test_a_random_frozen_encoder_is_said_aloud(caplog):
    with caplog.at_level(logging.WARNING):
        sam_conv(variant="tiny", weights=None); assert not caplog.text
        model = sam_conv(variant="tiny", weights="")
    assert model.weights == "" and "random and frozen" in caplog.text


# ---- saved

@both
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_saved_and_loaded(name, lora_rank, tmp_path):
    arguments = dict(variant="tiny", weights="", bands=4, lora_rank=lora_rank)
    model = build(name, **arguments).eval()
    trained_steps(model, 2); model.eval()
    save_model(tmp_path, model, name, arguments | dict(weights=None))
    loaded, _ = load_model(tmp_path)
    x = torch.randn(1, 4, 37, 40)
    with torch.no_grad(): assert torch.equal(loaded(x), model(x))


def test_the_zoo_knows_the_arguments():
    for name in MAKERS:
        assert {"bands", "classes", "weights", "frozen", "unfreeze_blocks", "lora_rank", "decoder_dropout", "variant"} <= set(model_arguments(name))
    with pytest.raises(ValueError, match="lora_rank"): build("sam_conv", lora_ranks=2)


# ---- LoRA

@settings(max_examples=15, deadline=None)
@given(c_in=st.integers(1, 9), c_out=st.integers(1, 9), alpha=st.sampled_from([None, 1.0, 8.0]), bias=st.booleans(), data=st.data())
def test_lora_is_the_product_it_says(c_in, c_out, alpha, bias, data):
    rank = data.draw(st.integers(1, min(c_in, c_out)))
    linear, x = nn.Linear(c_in, c_out, bias=bias), torch.randn(4, c_in)
    layer = LoraLinear(linear, rank, alpha)
    assert torch.equal(layer(x), linear(x))
    nn.init.normal_(layer.lora_b)
    want = x @ (linear.weight + (alpha or rank) / rank * layer.lora_b @ layer.lora_a).T + (linear.bias if bias else 0)
    assert torch.allclose(layer(x), want, atol=1e-4)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_a", "lora_b"]


@pytest.mark.parametrize("rank", [0, -1, 5])
def test_an_impossible_rank_is_refused(rank):
    with pytest.raises(ValueError, match="1..4"): LoraLinear(nn.Linear(4, 9), rank)


@both
def test_lora_starts_as_the_frozen_network_and_moves_alone(name):
    frozen, model = tiny(name).eval(), tiny(name, lora_rank=2).eval()
    model.load_state_dict(frozen.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 48)
    with torch.no_grad(): assert torch.equal(model(x), frozen(x))
    before = copy.deepcopy(model.encoder.state_dict())
    trained_steps(model)
    moved = {k.rsplit(".", 1)[-1] for k, v in model.encoder.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"lora_a", "lora_b"}


def test_folded_lora_says_the_same_under_the_plain_names():
    model = tiny("sam_unet", lora_rank=3)
    trained_steps(model); model.eval()
    x = torch.randn(1, 3, 40, 40)
    with torch.no_grad(): said = model(x)
    assert len(merge_lora(model)) == 8 and merge_lora(model) == []
    plain = tiny("sam_unet").eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad(): assert torch.allclose(plain(x), said, atol=1e-4) and torch.equal(plain(x), model(x))


def test_lora_needs_a_layer_of_that_name():
    with pytest.raises(ValueError, match="no linear layer called qkv"): add_lora(nn.Sequential(nn.Linear(2, 2)), 1)
    encoder = set_trained(SamEncoder(sam_vit("tiny")), unfreeze_blocks=3, lora_rank=1)
    assert [isinstance(b.attn.qkv, LoraLinear) for b in encoder.vit.blocks] == [True] * 5 + [False] * 3

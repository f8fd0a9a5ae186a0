import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import losses_plain as plain
from torch.nn import functional as F

from aerial_nb.training.losses import (
    LOSSES,
    DeepSupervision,
    bce,
    bce_dice,
    build_loss,
    ce_dice,
    ce_iou,
    cross_entropy,
    focal,
    lovasz,
    pick_labels,
    road_logit,
    soft_dice,
    soft_iou,
    weighted_ce,
)


def draw(seed, b=2, classes=2, h=4, w=3, ignored=0.2, dtype=torch.float64):
    "Random logits and labels, some of them ignored."
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(b, classes, h, w, generator=g, dtype=dtype)
    target = torch.randint(0, max(2, classes), (b, h, w), generator=g, dtype=torch.uint8)
    target[torch.rand(b, h, w, generator=g) < ignored] = 255
    return logits, target


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.sampled_from([1, 2, 3]), ignored=st.sampled_from([0, 0.3, 0.9]))
def test_every_loss_agrees_with_its_definition(seed, classes, ignored):
    logits, target = draw(seed, classes=classes, ignored=ignored)
    weights = (1.0, 4.0, 0.5)[:max(2, classes)]
    assert soft_iou(logits, target).item() == pytest.approx(plain.soft_iou(logits, target), abs=1e-9)
    assert soft_dice(logits, target).item() == pytest.approx(plain.soft_dice(logits, target), abs=1e-9)
    assert cross_entropy(logits, target, weights).item() == pytest.approx(plain.cross_entropy(logits, target, weights))
    both = plain.cross_entropy(logits, target, (1.0,) * 3) + plain.soft_dice(logits, target)
    assert ce_dice(logits, target).item() == pytest.approx(both)
    both = plain.cross_entropy(logits, target, weights) + plain.soft_iou(logits, target)
    assert ce_iou(logits, target, weights).item() == pytest.approx(both)
    if classes < 3:
        assert bce(logits, target, 10).item() == pytest.approx(plain.bce(logits, target, 10))
    both = 0.3 * plain.cross_entropy(logits, target, (1.0,) * 3) + 0.7 * plain.soft_dice(logits, target)
    assert bce_dice(logits, target, 0.3).item() == pytest.approx(both)
    assert weighted_ce(logits, target, weights).item() == pytest.approx(plain.cross_entropy(logits, target, weights))
    for gamma in (0, 0.5, 2):
        assert focal(logits, target, gamma, None).item() == pytest.approx(plain.focal(logits, target, gamma, (1,) * 3))
    assert focal(logits, target).item() == pytest.approx(plain.focal(logits, target, 2, (0.75, 0.25, 0.25)))
    assert focal(logits, target, 2, weights).item() == pytest.approx(plain.focal(logits, target, 2, weights))
    for per_image in (True, False):
        assert lovasz(logits, target, per_image).item() == pytest.approx(plain.lovasz(logits, target, per_image), abs=1e-9)
    assert lovasz(logits, target).item() == pytest.approx(lovasz(logits, target, classes < 3).item())


def test_plain_cases_equal_torch():
    logits, target = draw(1, ignored=0)
    assert torch.allclose(cross_entropy(logits, target), F.cross_entropy(logits, target.long()))
    weight = torch.tensor([1.0, 7.0], dtype=torch.float64)
    assert torch.allclose(cross_entropy(logits, target, (1, 7)), F.cross_entropy(logits, target.long(), weight))
    expected = F.binary_cross_entropy_with_logits(road_logit(logits), target.double(), pos_weight=torch.tensor(10.0))
    assert torch.allclose(bce(logits, target), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_ignored_pixels_have_no_say(name):
    logits, target = draw(2)
    loss, other = build_loss(name), logits.clone()
    other[(target == 255)[:, None].expand_as(other)] = 50.0
    assert torch.allclose(loss(logits, target), loss(other, target))
    leaf = logits.clone().requires_grad_()
    loss(leaf, target).backward()
    assert (leaf.grad[(target == 255)[:, None].expand_as(leaf)] == 0).all()
    assert (leaf.grad[(target != 255)[:, None].expand_as(leaf)] != 0).any()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("classes", [1, 2])
def test_gradients_are_right(name, classes):
    logits, target = draw(3, h=3, w=3, classes=classes)
    assert torch.autograd.gradcheck(lambda x: build_loss(name)(x, target), logits.requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("label", [0, 1, 255])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_finite_on_crops_of_one_kind_at_any_confidence(name, label, dtype):
    target = torch.full((2, 8, 8), label, dtype=torch.uint8)
    for scale in (0.0, 1.0, 6e4):
        logits = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0)).sign().mul(scale).to(dtype)
        logits.requires_grad_()
        loss = build_loss(name)(logits, target)
        loss.backward()
        assert loss.isfinite() and loss.dtype == torch.float32
        assert logits.grad.isfinite().all() and logits.grad.dtype == dtype
        if label == 255: assert loss.item() == 0 and not logits.grad.any()


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_changes_nothing(name):
    logits, target = draw(12, h=32, w=32, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = build_loss(name)(logits, target)
    assert inside.dtype == torch.float32 and torch.allclose(inside, build_loss(name)(logits, target))


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_agrees_with_full(name):
    logits, target = draw(4, b=3, h=64, w=64, dtype=torch.float32)
    half = logits.half()
    assert torch.allclose(build_loss(name)(half, target), build_loss(name)(half.float(), target))


def test_soft_iou_stays_in_its_range_and_ends_at_minus_one():
    target = torch.zeros(1, 300, 300, dtype=torch.uint8)
    target[:, :40] = 1
    right = (target.float() * 2 - 1)[:, None] * 40
    assert soft_iou(right, target).item() == pytest.approx(-1)
    assert soft_iou(-right, target).item() == pytest.approx(0)
    for label in (0, 1):   # a crop of one kind: the absent class scores nothing, the other everything
        alone = torch.full((1, 300, 300), label, dtype=torch.uint8)
        assert soft_iou(torch.full((1, 1, 300, 300), 80.0 * (2 * label - 1)), alone).item() == pytest.approx(-0.5)


def test_blank_images_do_not_dilute_soft_iou():
    logits, target = draw(5, b=1, ignored=0)
    blank = torch.full_like(target, 255)
    assert torch.allclose(soft_iou(logits, target),
                          soft_iou(torch.cat([logits, logits]), torch.cat([target, blank])))


def test_dice_is_over_the_batch_and_leaves_absent_classes_out():
    logits, target = draw(6, classes=3, ignored=0)
    target[target == 2] = 0
    without = torch.where(target == 1, 1, 0)
    merged = torch.stack([logits[:, [0, 2]].logsumexp(1), logits[:, 1]], 1)
    assert torch.allclose(soft_dice(logits, target), soft_dice(merged, without))
    each = torch.stack([soft_dice(logits[i:i + 1], target[i:i + 1]) for i in range(2)]).mean()
    assert not torch.allclose(soft_dice(logits, target), each)


class TensorOfFastai(torch.Tensor):
    "A subclass that survives operations, as fastai's do."


def test_long_targets_channels_last_and_tensor_subclasses():
    logits, target = draw(7, h=8, w=8)
    for name in LOSSES:
        loss, value = build_loss(name), build_loss(name)(logits, target)
        assert torch.allclose(loss(logits, target.long()), value)
        assert torch.allclose(loss(logits.to(memory_format=torch.channels_last), target), value)
        wrapped = loss(logits.as_subclass(TensorOfFastai), target.as_subclass(TensorOfFastai))
        assert type(wrapped) is torch.Tensor and torch.allclose(wrapped, value)


@given(rows=st.integers(8, 65), cols=st.integers(8, 65), power=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_labels_are_picked_by_stride(rows, cols, power):
    labels, s = torch.arange(rows * cols).view(1, rows, cols), 2**power
    picked = pick_labels(labels, (-(-rows // s), -(-cols // s)))
    assert torch.equal(picked, labels[:, ::s, ::s])
    assert picked.untyped_storage().data_ptr() == labels.untyped_storage().data_ptr()


def test_nearest_interpolation_gives_the_same_labels():
    _, target = draw(8, h=64, w=64)
    small = F.interpolate(target[:, None].float(), size=(16, 16), mode="nearest")[:, 0].to(torch.uint8)
    assert torch.equal(pick_labels(target, (16, 16)), small)


def test_deep_supervision_sums_with_weights_and_keeps_ignored_pixels():
    _, target = draw(9, h=17, w=30)
    outputs = [torch.randn(2, 2, -(-17 // s), -(-30 // s), requires_grad=True) for s in (4, 4, 2, 1)]
    each = [soft_iou(y, target[:, ::s, ::s]) for y, s in zip(outputs, (4, 4, 2, 1), strict=True)]
    assert torch.allclose(DeepSupervision(soft_iou)(outputs, target), sum(each))
    weighted = DeepSupervision(soft_iou, (0.5, 0, 1, 2))(outputs, target)
    assert torch.allclose(weighted, 0.5 * each[0] + each[2] + 2 * each[3])
    assert torch.allclose(DeepSupervision(soft_iou)(outputs[-1], target), each[3])
    DeepSupervision(build_loss("ce_iou"))(outputs, torch.full_like(target, 255)).backward()
    assert all(y.grad.isfinite().all() for y in outputs)


def test_bad_arguments_say_what_to_do():
    logits, target = draw(10)
    with pytest.raises(ValueError, match=r"target \(2, 4, 2\) do not fit.*DeepSupervision"):
        soft_iou(logits, target[:, :, :2])
    with pytest.raises(ValueError, match="label 7.*2 classes"):
        bce(logits, torch.full_like(target, 7))
    with pytest.raises(ValueError, match="label -1"):
        bce(logits, torch.full_like(target, 0).long() - 1)
    with pytest.raises(ValueError, match="3 weights for 2 outputs"):
        DeepSupervision(bce, (1, 1, 1))([logits, logits], target)
    with pytest.raises(ValueError, match="empty list"):
        DeepSupervision(bce)([], target)
    with pytest.raises(ValueError, match="unknown loss 'tversky'; known: soft_iou, bce, ce_dice, ce_iou"):
        build_loss("tversky")
    with pytest.raises(ValueError, match="pos_weight must be positive"):
        build_loss("bce", pos_weight=0)
    with pytest.raises(TypeError, match="gamma"):
        build_loss("bce", gamma=2)


def test_losses_by_name_carry_their_weight_and_can_be_pickled():
    logits, target = draw(11)
    assert torch.equal(build_loss("bce", 3)(logits, target), bce(logits, target, 3))
    assert torch.equal(build_loss("ce_iou", 3)(logits, target), ce_iou(logits, target, (1, 3)))
    assert torch.equal(build_loss("ce_dice", weights=(1, 2))(logits, target), ce_dice(logits, target, (1, 2)))
    deep = pickle.loads(pickle.dumps(DeepSupervision(build_loss("bce"), (1, 2))))
    assert torch.equal(deep([logits, logits], target), 3 * bce(logits, target))


@pytest.mark.parametrize("name", ["bce_dice", "focal", "weighted_ce", "lovasz"])
def test_one_logit_is_the_difference_of_two(name):
    logits, target = draw(13)
    assert torch.allclose(build_loss(name)(logits, target), build_loss(name)(road_logit(logits)[:, None], target))


def hard_iou_loss(right, truth):
    "1 - IoU of a decision."
    return 1 - (right & truth).sum() / (right | truth).sum()


@given(seed=st.integers(0, 10**6), n=st.integers(1, 30))
@settings(max_examples=30, deadline=None)
def test_lovasz_is_the_loss_of_iou_where_every_pixel_is_decided(seed, n):
    g = torch.Generator().manual_seed(seed)
    truth, pred = (torch.rand(n, generator=g) < 0.5 for _ in range(2))
    truth[0] = True
    margins = (pred.double() * 2 - 1).view(1, 1, 1, n)   # hinge errors of 0 and 2
    assert lovasz(margins, truth.view(1, 1, n).long()).item() == pytest.approx(2 * hard_iou_loss(pred, truth).item())
    sure = torch.stack([~pred, pred, torch.zeros(n, dtype=torch.bool)]).double().view(1, 3, 1, n) * 800
    present = [k for k in (False, True) if (truth == k).any()]
    expected = sum(hard_iou_loss(pred == k, truth == k).item() for k in present) / len(present)
    assert lovasz(sure, truth.view(1, 1, n).long()).item() == pytest.approx(expected)


def test_lovasz_is_convex_in_the_logits_of_two_classes():
    (a, target), (b, _) = draw(20, h=6, w=6), draw(21, h=6, w=6)
    for t in (0.2, 0.5, 0.9):
        between = lovasz(t * a + (1 - t) * b, target)
        assert between <= t * lovasz(a, target) + (1 - t) * lovasz(b, target) + 1e-12


def test_lovasz_in_float32_is_exact_enough_on_a_whole_tile():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 1, 700, 700, generator=g)
    target = (torch.rand(1, 700, 700, generator=g) < 0.05).to(torch.uint8)
    leaf, fine = logits.clone().requires_grad_(), logits.double().requires_grad_()
    lovasz(leaf, target).backward(); lovasz(fine, target).backward()
    assert torch.allclose(leaf.grad.double(), fine.grad, rtol=1e-4, atol=1e-9)


def test_lovasz_on_a_crop_without_roads_sees_the_worst_pixel_alone():
    logits = torch.tensor([-3.0, 0.5, 2.0, -1.0]).view(1, 1, 2, 2).requires_grad_()
    loss = lovasz(logits, torch.zeros(1, 2, 2, dtype=torch.uint8))
    loss.backward()
    assert loss.item() == pytest.approx(3.0) and logits.grad.flatten().tolist() == [0, 0, 1, 0]


def test_blank_images_do_not_dilute_lovasz():
    for classes in (1, 3):
        logits, target = draw(22, b=1, classes=classes, ignored=0)
        pair = torch.cat([logits, logits]), torch.cat([target, torch.full_like(target, 255)])
        for per_image in (True, False):
            assert torch.allclose(lovasz(logits, target, per_image), lovasz(*pair, per_image))


def test_focal_leaves_easy_pixels_alone():
    logits = torch.tensor([0.9, 0.4]).logit().view(1, 1, 1, 2).double().requires_grad_()
    target = torch.ones(1, 1, 2, dtype=torch.uint8)
    focal(logits, target, 2, None).backward()
    easy, hard = logits.grad.abs().flatten().tolist()
    plain_ratio = 0.1 / 0.6   # of the gradients of cross entropy, 1 - p
    assert easy / hard < 0.1 * plain_ratio


def test_weights_that_make_no_sense_are_refused():
    logits, target = draw(14)
    for call, says in (
        (lambda: bce_dice(logits, target, 1.5), r"\[0, 1\], got 1.5"),
        (lambda: focal(logits, target, -1), "gamma must not be negative"),
        (lambda: focal(logits, target, alpha=2), "alpha must lie"),
        (lambda: focal(logits, target, alpha=(1, 2, 3)), "3 weights alpha for 2 classes"),
        (lambda: weighted_ce(*draw(15, classes=3)), "2 class weights for 3 classes"),
    ):
        with pytest.raises(ValueError, match=says): call()
    with pytest.raises(TypeError, match="gamma"): build_loss("lovasz", gamma=2)

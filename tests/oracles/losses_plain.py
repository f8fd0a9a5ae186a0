"""Losses written pixel by pixel from their definitions, to check the fast ones against."""
import math

IGNORE = 255


def _probs(logits, b, i, j):
    values = [float(v) for v in logits[b, :, i, j]]
    if len(values) == 1: values = [0.0, *values]
    top = max(values)
    parts = [math.exp(v - top) for v in values]
    return [p / sum(parts) for p in parts]


def _pixels(target, b):
    _, rows, cols = target.shape
    return [(i, j, int(target[b, i, j])) for i in range(rows) for j in range(cols) if int(target[b, i, j]) != IGNORE]


def soft_iou(logits, target):
    classes, per_image = max(2, logits.shape[1]), []
    for b in range(len(target)):
        pixels, total = _pixels(target, b), 0.0
        if not pixels: continue
        for k in range(classes):
            inter = union = 0.0
            for i, j, label in pixels:
                p, t = _probs(logits, b, i, j)[k], float(label == k)
                inter, union = inter + p * t, union + p + t - p * t
            total += inter / (union + 1e-8)
        per_image.append(total / classes)
    return -sum(per_image) / len(per_image) if per_image else 0.0


def bce(logits, target, pos_weight):
    total, n = 0.0, 0
    for b in range(len(target)):
        for i, j, label in _pixels(target, b):
            background, road = _probs(logits, b, i, j)
            total -= pos_weight * math.log(road) if label == 1 else math.log(background)
            n += 1
    return total / n if n else 0.0


def cross_entropy(logits, target, weights):
    total = seen = 0.0
    for b in range(len(target)):
        for i, j, label in _pixels(target, b):
            total -= weights[label] * math.log(_probs(logits, b, i, j)[label])
            seen += weights[label]
    return total / seen if seen else 0.0


def soft_dice(logits, target):
    terms = []
    for k in range(1, max(2, logits.shape[1])):
        inter = mass = truth = 0.0
        for b in range(len(target)):
            for i, j, label in _pixels(target, b):
                p = _probs(logits, b, i, j)[k]
                inter, mass, truth = inter + p * (label == k), mass + p, truth + (label == k)
        if truth: terms.append(1 - 2 * inter / (mass + truth))
    return sum(terms) / len(terms) if terms else 0.0


def focal(logits, target, gamma, weights):
    total, n = 0.0, 0
    for b in range(len(target)):
        for i, j, label in _pixels(target, b):
            p = _probs(logits, b, i, j)[label]
            total -= weights[label] * (1 - p) ** gamma * math.log(p)
            n += 1
    return total / n if n else 0.0


def _jaccard(truth, wrong):
    "1 - IoU of a mask that is right but for the pixels in `wrong`."
    pred = [t != (k in wrong) for k, t in enumerate(truth)]
    union = sum(t or p for t, p in zip(truth, pred, strict=True))
    return 1 - sum(t and p for t, p in zip(truth, pred, strict=True)) / union if union else 0.0


def _extension(errors, truth):
    "Lovasz extension of the Jaccard loss at a vector of errors, by its definition (Berman et al. 2018, eq. 9)."
    order = sorted(range(len(errors)), key=lambda k: -errors[k])
    return sum(errors[k] * (_jaccard(truth, set(order[:n + 1])) - _jaccard(truth, set(order[:n])))
               for n, k in enumerate(order))


def lovasz(logits, target, per_image):
    classes = max(2, logits.shape[1])
    groups = [[b] for b in range(len(target))] if per_image else [list(range(len(target)))]
    found = []
    for group in groups:
        pixels = [(b, *p) for b in group for p in _pixels(target, b)]
        if classes == 2:
            if not pixels: continue
            margin = [(float(logits[b, -1, i, j]) - (float(logits[b, 0, i, j]) if logits.shape[1] == 2 else 0.0))
                      * (1 if label == 1 else -1) for b, i, j, label in pixels]
            found.append(_extension([max(0.0, 1 - m) for m in margin], [p[3] == 1 for p in pixels]))
            continue
        each = []
        for k in range(classes):
            truth = [label == k for *_, label in pixels]
            if any(truth):
                each.append(_extension([abs(t - _probs(logits, b, i, j)[k])
                                        for t, (b, i, j, _) in zip(truth, pixels, strict=True)], truth))
        if each: found.append(sum(each) / len(each))
    return sum(found) / len(found) if found else 0.0

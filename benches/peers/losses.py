"""Losses of a student's map beside a teacher's or labels, value and gradient, as their formulas are written in PyTorch over
`[n, c, h, w]`.

The authors' programs bring the maps to rows of pixels first, which costs PyTorch a copy of each; what stands here is the
faster arrangement. A new loss is a line in `LOSSES`, under the name that benches/src/case.rs gives it.
"""
import torch
from torch.nn import functional as F

from fill import fill, rms


def pixel_kl(student, teacher, _labels):
    """CIRKD: temperature 1, mean over pixels."""
    n, _, h, w = student.shape
    return F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="sum") / (n * h * w)


def channel_kl(student, teacher, _labels):
    """CWD: temperature 4, mean over images and channels."""
    n, c = student.shape[:2]
    s, t = [z.flatten(2) / 4 for z in (student, teacher)]
    return 16 * F.kl_div(s.log_softmax(2), t.softmax(2), reduction="sum") / (n * c)


def dist(student, teacher, _labels):
    """DIST: one minus the mean correlation of pixels over classes, and of classes over the batch's pixels."""
    s, t = student.softmax(1), teacher.softmax(1)

    def relation(dims):
        x, y = s - s.mean(dims, keepdim=True), t - t.mean(dims, keepdim=True)
        # Faster than `vector_norm`, which walks several dimensions slowly.
        norm = lambda z: (z * z).sum(dims).sqrt()
        return 1 - ((x * y).sum(dims) / (norm(x) * norm(y) + 1e-8)).mean()

    return relation((1,)) + relation((0, 2, 3))


def ohem(student, _teacher, labels):
    """Threshold 0.7, 100,000 pixels kept at least."""
    losses = F.cross_entropy(student, labels, reduction="none").flatten()
    p = (-losses.detach()).exp()
    last = p.kthvalue(min(100_000, p.numel())).values
    return losses[(p < 0.7) | (p <= last)].mean()


def dice(student, _teacher, labels):
    """Over the batch, mean over the classes that are there."""
    p, y = student.softmax(1), one_hot(labels, student.shape[1])
    dims = (0, 2, 3)
    labelled = y.sum(dims)
    share = 2 * (p * y).sum(dims) / (p.sum(dims) + labelled)
    return (1 - share)[labelled > 0].mean()


def lovasz(student, _teacher, labels):
    """The batch as one set of pixels, mean over the classes that are there."""
    p, y = student.softmax(1).transpose(0, 1).flatten(1), labels.flatten()
    losses = []
    for k in range(len(p)):
        inside = (y == k).float()
        if inside.sum() == 0:
            continue
        errors, order = (inside - p[k]).abs().sort(descending=True)
        inside = inside[order]
        total = inside.sum()
        jaccard = 1 - (total - inside.cumsum(0)) / (total + (1 - inside).cumsum(0))
        jaccard[1:] -= jaccard[:-1].clone()
        losses.append(errors.dot(jaccard))
    return torch.stack(losses).mean()


def binary_cross_entropy(student, _teacher, labels):
    """Targets are given as maps, so that making them is not timed."""
    return F.binary_cross_entropy_with_logits(student, labels)


def attention_transfer(student, teacher, _labels):
    """Power 2."""
    s, t = [F.normalize(z.pow(2).mean(1).flatten(1)) for z in (student, teacher)]
    return (s - t).pow(2).mean()


def ifvd(student, teacher, labels):
    """Prototypes as products with the labels' maps: the public code's loop over classes is slower."""
    y = one_hot(labels, CLASSES).flatten(2)
    counts = y.sum(2).clamp(min=1)[:, None]

    def cosines(z):
        z = z.flatten(2)
        means = z @ y.transpose(1, 2) / counts
        return F.cosine_similarity(z, means @ y, dim=1)

    return (cosines(student) - cosines(teacher)).pow(2).mean()


# Classes of the labels, where a map has more channels.
CLASSES = 19
LOSSES = {
    "pixel-kl": pixel_kl,
    "channel-kl": channel_kl,
    "dist": dist,
    "ohem": ohem,
    "dice": dice,
    "lovasz": lovasz,
    "binary-cross-entropy": binary_cross_entropy,
    "feature-mse": lambda student, teacher, _labels: F.mse_loss(student, teacher),
    "attention-transfer": attention_transfer,
    "ifvd": ifvd,
}


def one_hot(labels, classes):
    return F.one_hot(labels, classes).movedim(3, 1).float()


class Loss:
    def __init__(self, work, _layout):
        self.function = LOSSES[work["loss"]]
        self.student, self.teacher = [4 * fill(name, work["input"]) for name in ("student", "teacher")]
        self.student.requires_grad_()
        classes = min(work["input"][1], CLASSES)
        self.labels = self.teacher[:, :classes].argmax(1)
        if self.function is binary_cross_entropy:
            self.labels = one_hot(self.labels, classes).contiguous()

    def value_and_gradient(self):
        loss = self.function(self.student, self.teacher, self.labels)
        return loss, torch.autograd.grad(loss, self.student)[0]

    def answer(self):
        loss, grad = self.value_and_gradient()
        return {"value": float(loss.detach()), "grad": rms(grad)}

    def run(self):
        self.value_and_gradient()


KINDS = {"loss": Loss}

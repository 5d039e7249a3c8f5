"""Losses between two networks' maps, value and gradient, as their formulas are written in PyTorch over `[n, c, h, w]`.

The authors' programs bring the maps to rows of pixels first, which costs PyTorch a copy of each; what stands here is the
faster arrangement. A new loss is a line in `LOSSES`, under the name that benches/src/case.rs gives it.
"""
import torch
from torch.nn import functional as F

from fill import fill, rms


def pixel_kl(student, teacher):
    """CIRKD: temperature 1, mean over pixels."""
    n, _, h, w = student.shape
    return F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="sum") / (n * h * w)


def channel_kl(student, teacher):
    """CWD: temperature 4, mean over images and channels."""
    n, c = student.shape[:2]
    s, t = [z.flatten(2) / 4 for z in (student, teacher)]
    return 16 * F.kl_div(s.log_softmax(2), t.softmax(2), reduction="sum") / (n * c)


def dist(student, teacher):
    """DIST: one minus the mean correlation of pixels over classes, and of classes over the batch's pixels."""
    s, t = student.softmax(1), teacher.softmax(1)

    def relation(dims):
        x, y = s - s.mean(dims, keepdim=True), t - t.mean(dims, keepdim=True)
        # Faster than `vector_norm`, which walks several dimensions slowly.
        norm = lambda z: (z * z).sum(dims).sqrt()
        return 1 - ((x * y).sum(dims) / (norm(x) * norm(y) + 1e-8)).mean()

    return relation((1,)) + relation((0, 2, 3))


LOSSES = {"pixel-kl": pixel_kl, "channel-kl": channel_kl, "dist": dist}


class Loss:
    def __init__(self, work, _layout):
        self.function = LOSSES[work["loss"]]
        self.student, self.teacher = [4 * fill(name, work["input"]) for name in ("student", "teacher")]
        self.student.requires_grad_()

    def value_and_gradient(self):
        loss = self.function(self.student, self.teacher)
        return loss, torch.autograd.grad(loss, self.student)[0]

    def answer(self):
        loss, grad = self.value_and_gradient()
        return {"value": float(loss.detach()), "grad": rms(grad)}

    def run(self):
        self.value_and_gradient()


KINDS = {"loss": Loss}

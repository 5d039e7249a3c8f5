"""Equations 1 to 5 of KR102191351B1, letter by letter, value and gradient.

Whatever form our side takes, this side computes the letter: that is what a reader of the patent would write.
"""
import torch
from torch.nn import functional as F

from fill import fill, rms


def similarity(z):
    """z [C, M] -> S [M, M]."""
    f = F.normalize(z, dim=0, eps=1e-12)  # equation 1
    u = [f * torch.roll(f, shifts=-s, dims=0) for s in range(1, len(f) + 1)]  # equation 2
    m = torch.cat(u, dim=0)  # equation 3: [C^2, M]
    return m.T @ m  # equation 4


class Letter:
    def __init__(self, work, _layout):
        (h, w), c, s = work["hw"], work["classes"], work["source"]
        p = torch.arange(h * w)
        source = (p * 4237 + p // s * 31) % s
        self.student, self.teacher = [(4 * fill(name, (c, s)))[:, source] for name in ("student", "teacher")]
        self.student.requires_grad_()

    def value_and_gradient(self):
        with torch.no_grad():
            target = similarity(self.teacher)
        # Equation 5, averaged over the pairs.
        loss = ((target - similarity(self.student)) ** 2).mean()
        return loss, torch.autograd.grad(loss, self.student)[0]

    def answer(self):
        loss, grad = self.value_and_gradient()
        return {"value": float(loss), "grad": rms(grad)}

    def run(self):
        self.value_and_gradient()


KINDS = {"csc": Letter}

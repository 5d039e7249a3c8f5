"""Losses over pairs of pixels, value and gradient, as their public code computes them.

One is not: the matrices of SKD's pair-wise loss over 32,768 pixels would take 4 GiB each, so this side too sums over
pairs of channels, `||F_s F_s^T||^2 - 2 ||F_s F_t^T||^2 + ||F_t F_t^T||^2`, and leaves the gradient to autograd.
"""
import torch
from torch.nn import functional as F

from fill import fill, rms


class Relation:
    def __init__(self, work, _layout):
        (n, d, h, w), s = work["input"], work["source"]
        p = torch.arange(h * w)
        source = (p * 4237 + p // s * 31) % s
        self.student, self.teacher = [
            fill(name, (n, channels, 1, s))[..., source].reshape(n, channels, h, w)
            for name, channels in (("student", d), ("teacher", work["teacher_channels"]))
        ]
        self.student.requires_grad_()
        self.loss = {
            "pair-similarity": self.pair_similarity,
            "cirkd-mini-batch": self.mini_batch,
            "memory-contrast": self.memory,
        }[work["loss"]]
        if work["slots"]:
            bank = fill("bank", (work["slots"], work["teacher_channels"]))
            self.bank = bank / bank.norm(dim=1, keepdim=True)

    def pair_similarity(self):
        def unit(maps):
            z = maps.flatten(2)
            return z / (z.norm(dim=1, keepdim=True) + 1e-8)

        s = unit(self.student)
        with torch.no_grad():
            t = unit(self.teacher)
            tt = (t @ t.mT).square().sum()
        ss, st = (s @ s.mT).square().sum(), (s @ t.mT).square().sum()
        return (ss - 2 * st + tt) / s.shape[-1] ** 2 / len(s)

    def mini_batch(self, tau=0.1):
        s, t = F.normalize(self.student, dim=1).flatten(2), F.normalize(self.teacher, dim=1).flatten(2)
        loss = 0.0
        for i in range(len(s)):
            for j in range(len(s)):
                log_s = F.log_softmax(s[i].T @ s[j] / tau, dim=1)
                with torch.no_grad():
                    p_t = F.softmax(t[i].T @ t[j] / tau, dim=1)
                loss = loss + F.kl_div(log_s, p_t, reduction="batchmean")
        return loss / len(s) ** 2

    def memory(self, tau=0.1):
        def logits(maps):
            return F.normalize(maps, dim=1).permute(0, 2, 3, 1).flatten(0, 2) @ self.bank.T / tau

        log_s = F.log_softmax(logits(self.student), dim=1)
        with torch.no_grad():
            p_t = F.softmax(logits(self.teacher), dim=1)
        return F.kl_div(log_s, p_t, reduction="batchmean")

    def value_and_gradient(self):
        loss = self.loss()
        return loss.detach(), torch.autograd.grad(loss, self.student)[0]

    def answer(self):
        loss, grad = self.value_and_gradient()
        return {"value": float(loss), "grad": rms(grad)}

    def run(self):
        self.value_and_gradient()


KINDS = {"relation": Relation}

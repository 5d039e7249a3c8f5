"""Single operations, forward and backward, at the shapes of the networks."""
import contextlib
import math

import torch
from torch.nn import functional as F

import deeplab
from fill import fill, labels, rms


def autocast(layout):
    return torch.autocast("cpu", torch.bfloat16) if layout == "bf16" else contextlib.nullcontext()


def laid_out(tensor, layout):
    """In the memory format of the layout."""
    if layout != "nchw" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.contiguous()


class Operation:
    """An output and the gradients of some leaves, from an output gradient that lies ready."""

    def __init__(self, layout, leaves, function, plain=()):
        self.layout, self.function = layout, function
        # Inside a network under autocast maps arrive as bf16; weights are kept in f32 and converted in each step.
        kind = lambda key: torch.bfloat16 if layout == "bf16" and key in ("x", "residual") else torch.float32
        made = {key: laid_out(value, layout).to(kind(key)) for key, value in leaves.items()}
        self.inputs = {key: t.requires_grad_(key not in plain) for key, t in made.items()}
        self.wanted = [t for t in self.inputs.values() if t.requires_grad]
        self.dy = None

    def forward(self):
        with autocast(self.layout):
            return self.function(**self.inputs)

    def answer(self):
        y = self.forward()
        self.dy = torch.ones_like(y) if y.dim() == 0 else laid_out(fill("dy", tuple(y.shape)), self.layout).to(y.dtype)
        grads = torch.autograd.grad(y, self.wanted, self.dy)
        names = [key for key, t in self.inputs.items() if t.requires_grad]
        return {"y": rms(y), **{f"grad-{key}": rms(grad) for key, grad in zip(names, grads)}}

    def run(self):
        torch.autograd.grad(self.forward(), self.wanted, self.dy)


def conv(work, layout):
    leaves = {"x": fill("x", work["input"]), "weight": 0.1 * fill("weight", work["weight"])}
    if work["bias"]:
        leaves["bias"] = fill("bias", work["weight"][:1])
    geometry = {key: work[key] for key in ("stride", "padding", "dilation", "groups")}
    function = lambda x, weight, bias=None: F.conv2d(x, weight, bias, **geometry)
    return Operation(layout, leaves, function, plain=("x",) if work["image"] else ())


def batch_norm(work, layout):
    c = work["input"][1]
    mean, var = torch.zeros(c), torch.ones(c)
    leaves = {"x": fill("x", work["input"]), "gamma": fill("gamma", [c]), "beta": fill("beta", [c])}
    if work["residual"]:
        leaves["residual"] = fill("residual", work["input"])

    def function(x, gamma, beta, residual=None):
        y = F.batch_norm(x, mean, var, gamma, beta, training=True)
        if residual is not None:
            y += residual
        return F.relu(y, inplace=True) if work["relu"] else y

    return Operation(layout, leaves, function)


def relu(work, layout):
    return Operation(layout, {"x": fill("x", work["input"])}, lambda x: F.relu(x))


def max_pool(work, layout):
    return Operation(layout, {"x": fill("x", work["input"])}, lambda x: F.max_pool2d(x, 3, 2, 1))


def resize(work, layout):
    settings = {"size": work["to"], "mode": "bilinear", "align_corners": work["align_corners"]}
    return Operation(layout, {"x": fill("x", work["input"])}, lambda x: F.interpolate(x, **settings))


def cross_entropy(work, layout):
    n, c, h, w = work["input"]
    target = labels((n, h, w), c)
    return Operation(layout, {"x": fill("x", work["input"])}, lambda x: F.cross_entropy(x, target, ignore_index=255))


class Sgd:
    """One step of the optimizer over all parameters of a network."""

    def __init__(self, work, _layout):
        self.params = deeplab.network(work["encoder"], work["classes"]).named_parameters()
        self.params = dict(self.params)
        for name, p in self.params.items():
            p.grad = fill(f"grad/{name}", tuple(p.shape))
        self.optimizer = deeplab.optimizer(self.params)

    def answer(self):
        first = lambda: [float(p.detach().reshape(-1)[0].double()) for p in self.params.values()]
        before = first()
        decay = lambda p: deeplab.DECAY if p.dim() > 1 else 0.0
        terms = [float(p.grad.reshape(-1)[0]) + decay(p) * b for p, b in zip(self.params.values(), before)]
        self.run()
        for after, b, term in zip(first(), before, terms):
            expected = b - deeplab.RATE * term
            assert abs(after - expected) <= 1e-6 * max(abs(expected), deeplab.RATE), (after, expected)
        return {"step": math.sqrt(sum((deeplab.RATE * term) ** 2 for term in terms))}

    def run(self):
        self.optimizer.step()


KINDS = {
    "conv": conv,
    "batch-norm": batch_norm,
    "relu": relu,
    "max-pool": max_pool,
    "resize": resize,
    "cross-entropy": cross_entropy,
    "sgd": Sgd,
}

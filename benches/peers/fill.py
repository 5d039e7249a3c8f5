"""Values that both sides make for themselves from a name; the twin of `fill` in benches/src/fill.rs."""
import math

import torch


def _signed(value):
    """A 64-bit pattern as the integer torch holds it as."""
    return value - 2**64 if value >= 2**63 else value


def _shifted(z, bits):
    """`z >> bits` of the unsigned pattern."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def fill(name, shape):
    """Uniform in [-1, 1) on 24 bits, f32: splitmix64 of the element number, started at the FNV-1a hash of the name."""
    h = 0xCBF29CE484222325
    for byte in name.encode():
        h = ((h ^ byte) * 0x100000001B3) % 2**64
    # 64-bit integers of torch wrap around, as the formula wants.
    z = torch.arange(1, math.prod(shape) + 1, dtype=torch.int64) * _signed(0x9E3779B97F4A7C15) + _signed(h)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    z = _shifted(z ^ _shifted(z, 31), 40)
    return (z.to(torch.float32) / 2**23 - 1).reshape(shape)


def parameter(name, shape):
    """The value of a network's tensor by its name and shape."""
    u = fill(name, shape)
    if name.endswith("running_mean"):
        return 0.1 * u
    if name.endswith("running_var"):
        return 1 + 0.3 * u
    if len(shape) == 1:
        return 1 + 0.1 * u if name.endswith("weight") else 0.1 * u
    return u * math.sqrt(6 / math.prod(shape[1:]))


def images(shape):
    return (fill("images", shape) + 1) / 2


def labels(shape, classes, void=255):
    """int64 labels, one pixel in `classes + 1` void."""
    u = ((fill("labels", shape) + 1) / 2 * (classes + 1)).to(torch.int64)
    return torch.where(u < classes, u, torch.full_like(u, void))


def rms(tensor):
    return float(tensor.detach().double().square().mean().sqrt())

"""Runs the CUDA kernels of src/cuda/kernels.cu on the host, thread by thread, and compares them with PyTorch.

For machines without a GPU: the kernels' arithmetic and indices are checked, not the launches around them, nor the device.
Needs g++ (C++20), numpy and PyTorch; written with g++ 12.2 and PyTorch 2.15.

    python crates/ops/tests/cuda_on_host/check.py

Prints the largest relative distance of every comparison and fails above the bound of its type.
"""

import ctypes
import pathlib
import re
import subprocess
import tempfile

import numpy as np
import torch
import torch.nn.functional as F

HERE = pathlib.Path(__file__).resolve().parent
SOURCE = (HERE.parent.parent / "src/cuda/kernels.cu").read_text()
# Fewer threads a block than on the device: each is a thread of the host.
BLOCK = 64
HEAD = r"""
#include <barrier>
#include <cmath>
#include <cstddef>
#include <memory>
#include <thread>
#include <vector>
using std::sqrt;
using std::log;
#define __global__
#define __device__
#define __shared__ static
struct Index { unsigned int x; };
static thread_local Index threadIdx, blockIdx;
static Index blockDim, gridDim;
static std::unique_ptr<std::barrier<>> meeting;
static void __syncthreads() { meeting->arrive_and_wait(); }

template <typename... P, typename... A>
static void run(void (*kernel)(P...), unsigned blocks, unsigned threads, int together, A... args) {
    gridDim.x = blocks;
    blockDim.x = threads;
    for (unsigned b = 0; b < blocks; ++b) {
        auto one = [=](unsigned t) { threadIdx.x = t; blockIdx.x = b; kernel(args...); };
        if (!together) {
            for (unsigned t = 0; t < threads; ++t) one(t);
            continue;
        }
        meeting = std::make_unique<std::barrier<>>(threads);
        std::vector<std::thread> all;
        for (unsigned t = 0; t < threads; ++t) all.emplace_back(one, t);
        for (auto& thread : all) thread.join();
    }
}
"""
KERNEL = re.compile(r'extern "C" __global__ void (\w+)\(([^)]*)\)')


def build(c_type):
    """The kernels for one element type as a library of the host, each `name` with a launcher `run_name`."""
    suffix = "f" if c_type == "float" else ""
    source = SOURCE.replace("#define BLOCK 512", f"#define BLOCK {BLOCK}")
    assert f"#define BLOCK {BLOCK}" in source
    text = f"{HEAD}typedef {c_type} T;\n#define EXP exp{suffix}\n#define LOG log{suffix}\n{source}\n"
    for name, parameters in KERNEL.findall(source):
        parameters = " ".join(parameters.split())
        names = ", ".join(re.search(r"(\w+)$", p.strip()).group(1) for p in parameters.split(","))
        text += f'extern "C" void run_{name}(u32 blocks, u32 threads, int together, {parameters})'
        text += f" {{ run({name}, blocks, threads, together, {names}); }}\n"
    folder = pathlib.Path(tempfile.mkdtemp())
    (folder / "kernels.cpp").write_text(text)
    # Two roundings in a * b + c, as the device is told.
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", "-w"]
    subprocess.run(["g++", *flags, "kernels.cpp", "-o", "kernels.so"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "kernels.so"))


class Pool(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint) for name in "h w oh ow kh kw sh sw ph pw".split()]


class Grid(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint) for name in "h w oh ow".split()]


class Kernels:
    """Launches; arrays go by address, ints as u32, floats as `double`, `self.t(x)` as T."""

    def __init__(self, dtype):
        self.dtype = dtype
        self.lib = build("float" if dtype == np.float32 else "double")
        self.c = ctypes.c_float if dtype == np.float32 else ctypes.c_double
        self.launched = set()

    def t(self, value):
        return self.c(value)

    def __call__(self, name, n, *args, blocks=None):
        def convert(a):
            if a is None:
                return ctypes.c_void_p(None)
            if isinstance(a, np.ndarray):
                assert a.flags.c_contiguous
                return a.ctypes.data_as(ctypes.c_void_p)
            if isinstance(a, int):
                return ctypes.c_uint(a)
            if isinstance(a, float):
                return ctypes.c_double(a)
            return a

        self.launched.add(name)
        together = blocks is not None
        threads = BLOCK if together else 32
        grid = blocks if together else -(-n // threads)
        getattr(self.lib, f"run_{name}")(
            ctypes.c_uint(grid), ctypes.c_uint(threads), ctypes.c_int(together), *[convert(a) for a in args]
        )


def u32(values):
    return np.ascontiguousarray(values, dtype=np.uint32)


worst = {}


def compare(k, name, found, expected, slack=1):
    expected = np.asarray(expected.detach().numpy() if torch.is_tensor(expected) else expected, dtype=np.float64)
    found = np.asarray(found, dtype=np.float64).reshape(expected.shape)
    assert np.array_equal(np.isnan(found), np.isnan(expected)), name
    distance = np.nanmax(np.abs(found - expected), initial=0.0) / max(np.nanmax(np.abs(expected), initial=0.0), 1e-30)
    worst[name, k.dtype.__name__] = max(worst.get((name, k.dtype.__name__), 0.0), distance)
    bound = slack * (2e-6 if k.dtype == np.float32 else 1e-12)
    assert distance <= bound, f"{name} in {k.dtype.__name__}: off by {distance:.2e}"


def ranges(length, reads):
    flat = np.zeros((length, 2), dtype=np.uint32)
    for o, (low, high) in enumerate(reads):
        for at in range(low, min(high, length - 1) + 1):
            if flat[at, 1] == 0:
                flat[at, 0] = o
            flat[at, 1] = o + 1
    return flat


def pointwise(k, rng):
    x = rng.standard_normal(1000).astype(k.dtype) * 5
    x[:4] = [0.0, np.nan, 50.0, 6.0]
    g = rng.standard_normal(1000).astype(k.dtype)
    for ceiling, of in [(np.inf, F.relu), (6.0, F.relu6)]:
        leaf = torch.tensor(x, requires_grad=True)
        y = of(leaf)
        y.backward(torch.tensor(g))
        out, dx = np.empty_like(x), np.empty_like(x)
        k("rectify", x.size, x.size, k.t(ceiling), x, out)
        k("rectify_grad", x.size, x.size, k.t(np.nan if ceiling == np.inf else ceiling), out, g, dx)
        compare(k, "rectify", out, y)
        compare(k, "rectify_grad", np.delete(dx, 1), np.delete(leaf.grad.numpy(), 1))
    keep = rng.integers(0, 2**63, 16, dtype=np.uint64)
    bits = np.array([(int(keep[i // 64]) >> (i % 64)) & 1 for i in range(1000)])
    out = np.empty_like(x)
    k("keep_scaled", x.size, x.size, k.t(1.25), keep, x, out)
    compare(k, "keep_scaled", out, np.where(bits == 1, x * k.dtype(1.25), 0))
    out = g.copy()
    k("combine", x.size, x.size, k.t(0.5), k.t(0.0), k.t(-2.0), x, g, out)
    compare(k, "combine", out, 0.5 * g - 2.0 * g)
    out = np.full_like(g, np.nan)
    k("combine", x.size, x.size, k.t(0.0), k.t(3.0), k.t(0.0), g, x, out)
    compare(k, "combine", out, 3.0 * g)
    partial = np.empty(3)
    k("squares", 0, g.size, g, partial, blocks=3)
    compare(k, "squares", partial.sum(), (g.astype(np.float64) ** 2).sum())


def pools(k, rng):
    n, c = 2, 3
    for h, w in [(1, 1), (7, 10), (9, 6), (2, 5)]:
        x = rng.standard_normal((n, c, h, w)).astype(k.dtype)
        # Ties: the first of equals gets the gradient.
        x = np.round(x * 2) / 2
        for kernel in [(1, 1), (3, 3), (2, 5), (4, 3)]:
            for stride in [(1, 1), (2, 2), (2, 4), (3, 1)]:
                for padding in [(0, 0), (1, 1), (1, 2)]:
                    for ceil in [False, True]:
                        if any(p > q // 2 for p, q in zip(padding, kernel)):
                            continue
                        leaf = torch.tensor(x, requires_grad=True)
                        try:
                            y = F.max_pool2d(leaf, kernel, stride, padding, ceil_mode=ceil)
                        except RuntimeError:
                            continue
                        oh, ow = y.shape[2:]
                        if oh * ow == 0:
                            continue
                        g = rng.standard_normal(y.shape).astype(k.dtype)
                        y.backward(torch.tensor(g))
                        pool = Pool(h, w, oh, ow, *kernel, *stride, *padding)
                        out, place = np.empty(y.shape, k.dtype), np.empty(y.shape, np.uint32)
                        low = k.t(-np.inf)
                        k("max_pool", out.size, out.size, pool, low, x, out, None)
                        k("max_pool", out.size, out.size, pool, low, x, None, place)
                        dx = np.empty_like(x)
                        k("max_pool_grad", x.size, x.size, pool, place, g, dx)
                        compare(k, "max_pool", out, y)
                        compare(k, "max_pool_grad", dx, leaf.grad)

                        leaf = torch.tensor(x, requires_grad=True)
                        y = F.avg_pool2d(leaf, kernel, stride, padding, ceil_mode=ceil)
                        y.backward(torch.tensor(g))

                        def bins(axis, length, count):
                            one = []
                            for i in range(count):
                                s, q, p = stride[axis], kernel[axis], padding[axis]
                                start, end = i * s, min(i * s + q, length + 2 * p)
                                one.append((max(start - p, 0), min(max(end - p, 0), length), end - start))
                            return one

                        means(k, x, y, g, leaf.grad, bins(0, h, oh), bins(1, w, ow), "mean_pool")
        for oh, ow in [(1, 1), (2, 3), (6, 6), (7, 10), (9, 13)]:
            leaf = torch.tensor(x, requires_grad=True)
            y = F.adaptive_avg_pool2d(leaf, (oh, ow))
            g = rng.standard_normal(y.shape).astype(k.dtype)
            y.backward(torch.tensor(g))
            bins = lambda length, out: [
                (i * length // out, -(-(i + 1) * length // out), -(-(i + 1) * length // out) - i * length // out)
                for i in range(out)
            ]
            means(k, x, y, g, leaf.grad, bins(h, oh), bins(w, ow), "mean_pool (adaptive)")


def means(k, x, y, g, dx_expected, rows, cols, name):
    h, w = x.shape[2:]
    grid = Grid(h, w, len(rows), len(cols))
    reach = lambda length, bins: ranges(length, [(start, max(end, 1) - 1) for start, end, _ in bins])
    row_range, col_range, rows, cols = reach(h, rows), reach(w, cols), u32(rows), u32(cols)
    out, dx = np.empty(y.shape, k.dtype), np.empty_like(x)
    k("mean_pool", out.size, out.size, grid, rows, cols, x, out)
    k("mean_pool_grad", x.size, x.size, grid, rows, cols, row_range, col_range, g, dx)
    compare(k, name, out, y)
    compare(k, f"{name} grad", dx, dx_expected)


def resizes(k, rng):
    for (h, w), (oh, ow) in [((7, 10), (23, 31)), ((13, 17), (5, 6)), ((1, 1), (6, 8)), ((9, 9), (1, 1)), ((5, 4), (9, 2))]:
        x = rng.standard_normal((2, 3, h, w)).astype(k.dtype)
        g = rng.standard_normal((2, 3, oh, ow)).astype(k.dtype)
        grid = Grid(h, w, oh, ow)
        for corners in [False, True]:
            # Weights in f64, as the host forms them; PyTorch in f64 agrees to rounding.
            leaf = torch.tensor(x.astype(np.float64), requires_grad=True)
            y = F.interpolate(leaf, (oh, ow), mode="bilinear", align_corners=corners)
            y.backward(torch.tensor(g.astype(np.float64)))

            def taps(length, count):
                low_high, weights = [], []
                for o in range(count):
                    if corners:
                        at = 0.0 if count == 1 else o * ((length - 1) / (count - 1))
                    else:
                        at = max((o + 0.5) * (length / count) - 0.5, 0.0)
                    low = min(int(at), length - 1)
                    high_weight = min(max(at - low, 0.0), 1.0)
                    low_high.append((low, min(low + 1, length - 1)))
                    weights.append((1.0 - high_weight, high_weight))
                return low_high, np.ascontiguousarray(weights, dtype=k.dtype)

            (rows, row_weights), (cols, col_weights) = taps(h, oh), taps(w, ow)
            row_range, col_range = ranges(h, rows), ranges(w, cols)
            rows, cols = u32(rows), u32(cols)
            out, dx = np.empty(g.shape, k.dtype), np.empty_like(x)
            k("bilinear", out.size, out.size, grid, rows, row_weights, cols, col_weights, x, out)
            k("bilinear_grad", x.size, x.size, grid, rows, row_weights, cols, col_weights, row_range, col_range, g, dx)
            compare(k, "bilinear", out, y)
            compare(k, "bilinear_grad", dx, leaf.grad)
        leaf = torch.tensor(x, requires_grad=True)
        y = F.interpolate(leaf, (oh, ow), mode="nearest")
        y.backward(torch.tensor(g))
        index = lambda length, out: [min(int(np.float32(o) * (np.float32(length) / np.float32(out))), length - 1) for o in range(out)]
        rows, cols = index(h, oh), index(w, ow)
        row_range, col_range = ranges(h, [(r, r) for r in rows]), ranges(w, [(r, r) for r in cols])
        out, dx = np.empty(g.shape, k.dtype), np.empty_like(x)
        k("nearest", out.size, out.size, grid, u32(rows), u32(cols), x, out)
        k("nearest_grad", x.size, x.size, grid, row_range, col_range, g, dx)
        compare(k, "nearest", out, y)
        compare(k, "nearest_grad", dx, leaf.grad)


def softmaxes(k, rng):
    n, c, h, w = 2, 5, 6, 7
    m = h * w
    x = (rng.standard_normal((n, c, h, w)) * 20).astype(k.dtype)
    g = rng.standard_normal(x.shape).astype(k.dtype)
    leaf = torch.tensor(x, requires_grad=True)
    y = F.log_softmax(leaf, 1)
    y.backward(torch.tensor(g))
    out, dx = np.empty_like(x), np.empty_like(x)
    k("log_softmax", n * m, n * m, c, m, x, out)
    k("log_softmax_grad", n * m, n * m, c, m, out, g, dx)
    compare(k, "log_softmax", out, y)
    compare(k, "log_softmax_grad", dx, leaf.grad)

    labels = rng.integers(0, c, (n, h, w))
    void = rng.random((n, h, w)) < 0.3
    class_weights = rng.random(c) + 0.5
    leaf = torch.tensor(x, requires_grad=True)
    target = torch.tensor(np.where(void, 255, labels))
    loss = F.cross_entropy(leaf, target, torch.tensor(class_weights.astype(k.dtype)), ignore_index=255)
    (loss * 3).backward()
    poisoned = np.where(void[:, None], np.nan, x).astype(k.dtype)
    targets = np.where(void, -1, labels).astype(np.int16)
    total = float(class_weights[labels[~void]].sum())
    blocks = -(-n * m // BLOCK)
    partial, out, dx = np.empty(blocks), np.empty(1, k.dtype), np.empty_like(x)
    k("cross_entropy", 0, n * m, c, m, poisoned, targets, class_weights, partial, blocks=blocks)
    k("cross_entropy_mean", 0, blocks, total, partial, out, blocks=1)
    grad_loss = np.array([3], k.dtype)
    k("cross_entropy_grad", n * m, n * m, c, m, total, poisoned, targets, class_weights, grad_loss, dx)
    compare(k, "cross_entropy", out[0], loss)
    compare(k, "cross_entropy_grad", dx, leaf.grad)
    nothing = np.full_like(targets, -1)
    k("cross_entropy", 0, n * m, c, m, poisoned, nothing, class_weights, partial, blocks=blocks)
    k("cross_entropy_mean", 0, blocks, 0.0, partial, out, blocks=1)
    k("cross_entropy_grad", n * m, n * m, c, m, 0.0, poisoned, nothing, class_weights, grad_loss, dx)
    assert out[0] == 0 and not dx.any()


def norms(k, rng):
    n, c, h, w, eps, momentum = 3, 4, 9, 11, 1e-5, 0.25
    m = h * w
    x = (rng.standard_normal((n, c, h, w)) * [[[[1]], [[5]], [[0.01]], [[2]]]] + 3).astype(k.dtype)
    g = rng.standard_normal(x.shape).astype(k.dtype)
    gamma, beta = (rng.standard_normal(c).astype(k.dtype) for _ in range(2))
    for train in [True, False]:
        mean, variance = np.full(c, 0.5, k.dtype), np.full(c, 2.0, k.dtype)
        wide = lambda a: torch.tensor(a.astype(np.float64), requires_grad=True)
        leaves = [wide(x), wide(gamma), wide(beta)]
        running = [torch.tensor(mean.astype(np.float64)), torch.tensor(variance.astype(np.float64))]
        y = F.batch_norm(leaves[0], *running, leaves[1], leaves[2], train, momentum, eps)
        y.backward(torch.tensor(g.astype(np.float64)))
        centre, inverse = np.empty(c, k.dtype), np.empty(c, k.dtype)
        if train:
            k("moments", 0, n * m, c, m, eps, x, centre, inverse, blocks=c)
            k("blend_mean", c, c, momentum, centre, mean)
            k("blend_variance", c, c, momentum, eps, n * m / (n * m - 1), inverse, variance)
            compare(k, "running mean", mean, running[0])
            compare(k, "running variance", variance, running[1])
        else:
            centre[:] = mean
            k("inverse_std", c, c, eps, variance, inverse)
        out, dx, dgamma, dbeta = np.empty_like(x), np.empty_like(x), np.empty(c, k.dtype), np.empty(c, k.dtype)
        k("normalise", x.size, x.size, c, m, x, centre, inverse, gamma, beta, out)
        k("norm_sums", 0, n * m, c, m, x, g, centre, inverse, dgamma, dbeta, blocks=c)
        k("norm_grad", x.size, x.size, c, m, n * m, int(train), x, g, centre, inverse, gamma, dgamma, dbeta, dx)
        compare(k, "normalise", out, y, slack=10)
        for name, found, leaf in [("dx", dx, leaves[0]), ("dgamma", dgamma, leaves[1]), ("dbeta", dbeta, leaves[2])]:
            # The mean is kept in T: in f32 it is off by 1e-5 of the third channel's spread.
            compare(k, f"norm {name}", found, leaf.grad, slack=10)
    sums = np.empty(c, k.dtype)
    k("channel_sums", 0, n * m, c, m, x, sums, blocks=c)
    compare(k, "channel_sums", sums, x.astype(np.float64).sum((0, 2, 3)))
    out = x.copy()
    k("add_bias", x.size, x.size, c, m, beta, out)
    compare(k, "add_bias", out, x + beta[None, :, None, None])


def main():
    torch.set_num_threads(1)
    kernels = {name for name, _ in KERNEL.findall(SOURCE)}
    for dtype in (np.float32, np.float64):
        k, rng = Kernels(dtype), np.random.default_rng(0)
        for part in (pointwise, pools, resizes, softmaxes, norms):
            part(k, rng)
        assert k.launched == kernels, f"never launched: {kernels - k.launched}"
    for (name, dtype), distance in sorted(worst.items()):
        print(f"{name:24} {dtype:8} {distance:.1e}")
    print(f"torch {torch.__version__}: all within bounds")


if __name__ == "__main__":
    main()

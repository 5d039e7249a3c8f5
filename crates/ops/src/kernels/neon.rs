//! Kernels for NEON (8 rows of 2 vectors: 16 of 32 registers hold sums).

use std::arch::aarch64::*;

use super::lines::{self, LineKernel};
use super::tile::{Tile, Vectors, run};
use super::{Kernel, Run, plain};

macro_rules! vectors {
    ($name:ident, $T:ty, $V:ty, $lanes:literal, $spread:ident, $load:ident, $store:ident, $add:ident, $fma:ident, $max:ident) => {
        struct $name;

        impl Vectors for $name {
            type T = $T;
            type P = $T;
            type Sums = $V;
            type Factors = $V;
            const LANES: usize = $lanes;

            #[inline(always)]
            unsafe fn spread_sum(from: *const $T) -> $V {
                // SAFETY: the trait's contract.
                unsafe { $spread(*from) }
            }

            #[inline(always)]
            unsafe fn factors(from: *const $T) -> $V {
                // SAFETY: the trait's contract.
                unsafe { $load(from) }
            }

            #[inline(always)]
            unsafe fn spread(from: *const $T) -> $V {
                // SAFETY: the trait's contract.
                unsafe { $spread(*from) }
            }

            #[inline(always)]
            unsafe fn load(from: *const $T) -> $V {
                // SAFETY: the trait's contract.
                unsafe { $load(from) }
            }

            #[inline(always)]
            unsafe fn store(to: *mut $T, v: $V) {
                // SAFETY: the trait's contract.
                unsafe { $store(to, v) }
            }

            #[inline(always)]
            unsafe fn zero() -> $V {
                // SAFETY: the trait's contract.
                unsafe { $spread(0.0) }
            }

            #[inline(always)]
            unsafe fn add(a: $V, b: $V) -> $V {
                // SAFETY: the trait's contract.
                unsafe { $add(a, b) }
            }

            #[inline(always)]
            unsafe fn fma(a: $V, b: $V, c: $V) -> $V {
                // SAFETY: the trait's contract.
                unsafe { $fma(c, a, b) }
            }

            #[inline(always)]
            unsafe fn fma_sums(a: $V, b: $V, c: $V) -> $V {
                // SAFETY: the trait's contract.
                unsafe { $fma(c, a, b) }
            }

            #[inline(always)]
            unsafe fn relu(a: $V) -> $V {
                // NaN stays: the instruction gives NaN where an operand is NaN.
                // SAFETY: the trait's contract.
                unsafe { $max($spread(0.0), a) }
            }
        }
    };
}
vectors!(NeonF32, f32, float32x4_t, 4, vdupq_n_f32, vld1q_f32, vst1q_f32, vaddq_f32, vfmaq_f32, vmaxq_f32);
vectors!(NeonF64, f64, float64x2_t, 2, vdupq_n_f64, vld1q_f64, vst1q_f64, vaddq_f64, vfmaq_f64, vmaxq_f64);

macro_rules! kernel {
    ($vectors:ident, $T:ty, $nr:literal) => {{
        unsafe fn tile(t: &Tile<$T>) {
            // SAFETY: forwarded; every aarch64 processor has NEON.
            unsafe { run::<$vectors, 8, { $nr / $vectors::LANES }, 1, 8>(t) }
        }
        unsafe fn tile_along(t: &Tile<$T>) {
            // SAFETY: forwarded; every aarch64 processor has NEON.
            unsafe { run::<$vectors, 8, { $nr / $vectors::LANES }, $nr, 1>(t) }
        }
        fn pack(rows: &mut [$T], planes: &[$T], plane_len: usize, runs: &[Run], step: usize) {
            plain::pack_rows($nr, rows, planes, plane_len, runs, step);
        }
        Kernel {
            name: "neon",
            mr: 8,
            nr: $nr,
            lanes: $vectors::LANES,
            pair: 1,
            k_block: 1,
            join: |v, _| v,
            tile,
            tile_along,
            pack_rows: pack,
            pack_along: pack,
            pack_columns: |columns, panel| plain::pack_columns($nr, 1, |v, _| v, columns, panel),
        }
    }};
}

pub(super) fn kernel_f32() -> Kernel<f32> {
    kernel!(NeonF32, f32, 8)
}

pub(super) fn kernel_f64() -> Kernel<f64> {
    kernel!(NeonF64, f64, 4)
}

macro_rules! lines {
    ($vectors:ident) => {
        LineKernel {
            #[cfg(test)]
            name: "neon",
            // SAFETY: every aarch64 processor has NEON.
            convolve: |input, taps, weights, out| unsafe { lines::convolve::<$vectors>(input, taps, weights, out) },
            // SAFETY: every aarch64 processor has NEON.
            correlate: |input, taps, grad, sums| unsafe { lines::correlate::<$vectors>(input, taps, grad, sums) },
        }
    };
}

pub(super) fn lines_f32() -> LineKernel<f32> {
    lines!(NeonF32)
}

pub(super) fn lines_f64() -> LineKernel<f64> {
    lines!(NeonF64)
}

//! Kernels for AVX-512F (8 rows of 3 vectors: 24 of 32 registers hold sums), with bf16 products where the processor has
//! them, and for AVX2 with FMA (4 rows of 3 vectors: 12 of 16).

mod pack;

use std::arch::x86_64::*;

pub(super) use pack::{pack_column_pairs_32, pack_pairs_32, pack_pairs_along_32};
use pack::{pack_column_pairs_48, pack_columns_48, pack_pairs_48, pack_pairs_along_48, pack_rows_48};

use super::lines::{self, LineKernel};
use super::tile::{Tile, Vectors, run};
use super::{Columns, Kernel, Run, plain};

macro_rules! sums {
    ($T:ty, $V:ty, $lanes:literal, $spread:ident, $load:ident, $store:ident, $zero:ident, $add:ident, $fma:ident, $max:ident) => {
        type T = $T;
        type Sums = $V;
        const LANES: usize = $lanes;

        #[inline(always)]
        unsafe fn zero() -> $V {
            // SAFETY: the trait's contract.
            unsafe { $zero() }
        }

        #[inline(always)]
        unsafe fn spread_sum(from: *const $T) -> $V {
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
        unsafe fn add(a: $V, b: $V) -> $V {
            // SAFETY: the trait's contract.
            unsafe { $add(a, b) }
        }

        #[inline(always)]
        unsafe fn fma_sums(a: $V, b: $V, c: $V) -> $V {
            // SAFETY: the trait's contract.
            unsafe { $fma(a, b, c) }
        }

        #[inline(always)]
        unsafe fn relu(a: $V) -> $V {
            // The second operand is the result where one is NaN.
            // SAFETY: the trait's contract.
            unsafe { $max($zero(), a) }
        }
    };
}

macro_rules! vectors {
    ($name:ident, $T:ty, $V:ty, $lanes:literal, $spread:ident, $load:ident, $store:ident, $zero:ident, $add:ident, $fma:ident, $max:ident) => {
        struct $name;

        impl Vectors for $name {
            type P = $T;
            type Factors = $V;
            sums!($T, $V, $lanes, $spread, $load, $store, $zero, $add, $fma, $max);

            #[inline(always)]
            unsafe fn spread(from: *const $T) -> $V {
                // SAFETY: the trait's contract.
                unsafe { $spread(*from) }
            }

            #[inline(always)]
            unsafe fn factors(from: *const $T) -> $V {
                // SAFETY: the trait's contract.
                unsafe { $load(from) }
            }

            #[inline(always)]
            unsafe fn fma(a: $V, b: $V, c: $V) -> $V {
                // SAFETY: the trait's contract.
                unsafe { $fma(a, b, c) }
            }
        }
    };
}
vectors!(
    Avx512F32,
    f32,
    __m512,
    16,
    _mm512_set1_ps,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_setzero_ps,
    _mm512_add_ps,
    _mm512_fmadd_ps,
    _mm512_max_ps
);
vectors!(
    Avx512F64,
    f64,
    __m512d,
    8,
    _mm512_set1_pd,
    _mm512_loadu_pd,
    _mm512_storeu_pd,
    _mm512_setzero_pd,
    _mm512_add_pd,
    _mm512_fmadd_pd,
    _mm512_max_pd
);
vectors!(
    Avx2F32,
    f32,
    __m256,
    8,
    _mm256_set1_ps,
    _mm256_loadu_ps,
    _mm256_storeu_ps,
    _mm256_setzero_ps,
    _mm256_add_ps,
    _mm256_fmadd_ps,
    _mm256_max_ps
);
vectors!(
    Avx2F64,
    f64,
    __m256d,
    4,
    _mm256_set1_pd,
    _mm256_loadu_pd,
    _mm256_storeu_pd,
    _mm256_setzero_pd,
    _mm256_add_pd,
    _mm256_fmadd_pd,
    _mm256_max_pd
);

/// Sums of f32, panels of bf16 pairs.
struct Avx512Bf16;

impl Vectors for Avx512Bf16 {
    type P = u32;
    type Factors = __m512i;
    sums!(
        f32,
        __m512,
        16,
        _mm512_set1_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_setzero_ps,
        _mm512_add_ps,
        _mm512_fmadd_ps,
        _mm512_max_ps
    );

    #[inline(always)]
    unsafe fn spread(from: *const u32) -> __m512i {
        // SAFETY: the trait's contract.
        unsafe { _mm512_set1_epi32((*from).cast_signed()) }
    }

    #[inline(always)]
    unsafe fn factors(from: *const u32) -> __m512i {
        // SAFETY: the trait's contract.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn fma(a: __m512i, b: __m512i, c: __m512) -> __m512 {
        // SAFETY: the trait's contract; the two types are 512 bits without meaning of their own.
        unsafe {
            let bf16 = |v: __m512i| std::mem::transmute::<__m512i, __m512bh>(v);
            _mm512_dpbf16_ps(c, bf16(a), bf16(b))
        }
    }
}

macro_rules! kernel {
    ($name:literal, $vectors:ident, $features:literal, $mr:literal, $nr:literal, $pair:literal, $join:expr, $pack:expr, $along:expr, $columns:expr) => {{
        type Args = Tile<<$vectors as Vectors>::T, <$vectors as Vectors>::P>;
        #[target_feature(enable = $features)]
        unsafe fn tile(t: &Args) {
            // SAFETY: forwarded; the instructions are enabled here.
            unsafe { run::<$vectors, $mr, { $nr / $vectors::LANES }, 1, $mr>(t) }
        }
        #[target_feature(enable = $features)]
        unsafe fn tile_along(t: &Args) {
            // SAFETY: forwarded; the instructions are enabled here.
            unsafe { run::<$vectors, $mr, { $nr / $vectors::LANES }, { $nr / $pair }, 1>(t) }
        }
        Kernel {
            name: $name,
            mr: $mr,
            nr: $nr,
            lanes: <$vectors as Vectors>::LANES,
            pair: $pair,
            k_block: 1,
            join: $join,
            tile,
            tile_along,
            pack_rows: $pack,
            pack_along: $along,
            pack_columns: $columns,
        }
    }};
}

macro_rules! lines {
    ($name:literal, $vectors:ident, $T:ty, $features:literal) => {{
        fn convolve(input: &[$T], taps: &[usize], weights: &[$T], out: &mut [$T]) {
            #[target_feature(enable = $features)]
            unsafe fn wide(input: &[$T], taps: &[usize], weights: &[$T], out: &mut [$T]) {
                // SAFETY: the instructions are enabled here.
                unsafe { lines::convolve::<$vectors>(input, taps, weights, out) }
            }
            // SAFETY: a kernel is made only where the processor has its features.
            unsafe { wide(input, taps, weights, out) }
        }
        fn correlate(input: &[$T], taps: &[usize], grad: &[$T], sums: &mut [f64]) {
            #[target_feature(enable = $features)]
            unsafe fn wide(input: &[$T], taps: &[usize], grad: &[$T], sums: &mut [f64]) {
                // SAFETY: the instructions are enabled here.
                unsafe { lines::correlate::<$vectors>(input, taps, grad, sums) }
            }
            // SAFETY: a kernel is made only where the processor has its features.
            unsafe { wide(input, taps, grad, sums) }
        }
        LineKernel {
            #[cfg(test)]
            name: $name,
            convolve,
            correlate,
        }
    }};
}

macro_rules! line_kernels {
    ($name:ident, $T:ty, $wide:ident, $medium:ident) => {
        pub(super) fn $name() -> Vec<LineKernel<$T>> {
            let mut found = Vec::new();
            if is_x86_feature_detected!("avx512f") {
                found.push(lines!("avx512f", $wide, $T, "avx512f"));
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                found.push(lines!("avx2", $medium, $T, "avx2,fma"));
            }
            found
        }
    };
}
line_kernels!(lines_f32, f32, Avx512F32, Avx2F32);
line_kernels!(lines_f64, f64, Avx512F64, Avx2F64);

macro_rules! plain_packing {
    ($name:ident, $columns:ident, $T:ty, $features:literal, $nr:literal) => {
        fn $columns(columns: Columns<'_, $T>, panel: &mut [$T]) {
            plain::pack_columns($nr, 1, |v, _| v, columns, panel);
        }

        fn $name(rows: &mut [$T], planes: &[$T], plane_len: usize, runs: &[Run], step: usize) {
            #[target_feature(enable = $features)]
            fn pack(rows: &mut [$T], planes: &[$T], plane_len: usize, runs: &[Run], step: usize) {
                plain::pack_rows($nr, rows, planes, plane_len, runs, step);
            }
            // SAFETY: a kernel is made only where the processor has its features.
            unsafe { pack(rows, planes, plane_len, runs, step) }
        }
    };
}
plain_packing!(pack_avx2_f32, columns_avx2_f32, f32, "avx2,fma", 24);
plain_packing!(pack_avx2_f64, columns_avx2_f64, f64, "avx2,fma", 12);
plain_packing!(pack_avx512_f64, columns_avx512_f64, f64, "avx512f", 24);

pub(super) fn kernels_f32() -> Vec<Kernel<f32>> {
    let mut found = Vec::new();
    if is_x86_feature_detected!("avx512f") {
        found.push(kernel!(
            "avx512f",
            Avx512F32,
            "avx512f",
            8,
            48,
            1,
            |v, _| v,
            pack_rows_48,
            pack_rows_48,
            pack_columns_48
        ));
    }
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        found.push(kernel!(
            "avx2",
            Avx2F32,
            "avx2,fma",
            4,
            24,
            1,
            |v, _| v,
            pack_avx2_f32,
            pack_avx2_f32,
            columns_avx2_f32
        ));
    }
    found
}

pub(super) fn kernels_f64() -> Vec<Kernel<f64>> {
    let mut found = Vec::new();
    if is_x86_feature_detected!("avx512f") {
        found.push(kernel!(
            "avx512f",
            Avx512F64,
            "avx512f",
            8,
            24,
            1,
            |v, _| v,
            pack_avx512_f64,
            pack_avx512_f64,
            columns_avx512_f64
        ));
    }
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        found.push(kernel!(
            "avx2",
            Avx2F64,
            "avx2,fma",
            4,
            12,
            1,
            |v, _| v,
            pack_avx2_f64,
            pack_avx2_f64,
            columns_avx2_f64
        ));
    }
    found
}

pub(super) fn kernel_bf16() -> Option<Kernel<f32, u32>> {
    let present = is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512bw");
    present.then(|| {
        kernel!(
            "avx512bf16",
            Avx512Bf16,
            "avx512f,avx512bw,avx512bf16",
            8,
            48,
            2,
            super::pair,
            pack_pairs_48,
            pack_pairs_along_48,
            pack_column_pairs_48
        )
    })
}

/// Whether the state of the wide registers can be asked for.
pub(super) fn has_xsave() -> bool {
    const OSXSAVE: u32 = 1 << 27;
    __cpuid(1).ecx & OSXSAVE != 0
}

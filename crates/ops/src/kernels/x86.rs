//! Kernels for AVX-512F (8 rows of 3 vectors: 24 of 32 registers hold sums), with bf16 products where the processor has
//! them, and for AVX2 with FMA (4 rows of 3 vectors: 12 of 16).

use std::arch::x86_64::*;

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

/// Part of a vector: lanes of `mask` come from `from` on, relative to lane 0.
#[derive(Clone, Copy)]
struct Piece {
    from: isize,
    mask: u16,
}

/// Pieces that fit the table below; more (very narrow maps) take the plain way.
const MOST_PIECES: usize = 12;

/// What makes up a row of `NV` vectors, prepared once for many planes.
struct Row<'a, const NV: usize> {
    pieces: [Piece; MOST_PIECES],
    /// First piece of each vector, and the end: `NV + 1` numbers.
    starts: [usize; 4],
    /// Whether the table holds it.
    fits: bool,
    runs: &'a [Run],
    step: usize,
}

impl<'a, const NV: usize> Row<'a, NV> {
    /// # Panics
    /// When a run leaves the row or the plane.
    fn new(runs: &'a [Run], step: usize, plane_len: usize) -> Self {
        let (mut pieces, mut n) = ([Piece { from: 0, mask: 0 }; MOST_PIECES], 0);
        let mut starts = [usize::MAX; 4];
        let mut fits = step <= 2;
        for &Run { at, len, from } in runs {
            assert!(at + len <= 16 * NV && (len == 0 || from + (len - 1) * step < plane_len), "run leaves its row");
            let (mut at, mut from, end) = (at, from, at + len);
            while at < end {
                if n == MOST_PIECES {
                    fits = false;
                    break;
                }
                let (vector, lane) = (at / 16, at % 16);
                let lanes = (16 - lane).min(end - at);
                pieces[n] = Piece {
                    from: from as isize - (lane * step) as isize,
                    mask: (((1u32 << lanes) - 1) << lane) as u16,
                };
                starts[vector] = starts[vector].min(n);
                n += 1;
                at += lanes;
                from += lanes * step;
            }
        }
        // Runs are in order, so a vector's pieces stand together; one without any starts where the next one does.
        starts[NV] = n;
        for vector in (0..NV).rev() {
            starts[vector] = starts[vector].min(starts[vector + 1]);
        }
        Self { pieces, starts, fits, runs, step }
    }

    /// The row of one plane, by masked loads, which read nothing where the mask is 0.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn vectors(&self, plane: &[f32]) -> [__m512; NV] {
        let mut vectors = [_mm512_setzero_ps(); NV];
        if !self.fits {
            let mut row = [0f32; 48];
            plain::fill_row(&mut row[..16 * NV], plane, self.runs, self.step);
            for (j, vector) in vectors.iter_mut().enumerate() {
                // SAFETY: `NV <= 3` vectors of 16 in a row of 48.
                *vector = unsafe { _mm512_loadu_ps(row[16 * j..].as_ptr()) };
            }
            return vectors;
        }
        let evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        for (j, vector) in vectors.iter_mut().enumerate() {
            for &Piece { from, mask } in &self.pieces[self.starts[j]..self.starts[j + 1]] {
                let start = plane.as_ptr().wrapping_offset(from);
                // SAFETY: lanes of the masks lie within the plane, as asserted for their runs; others are not read.
                *vector = unsafe {
                    if self.step == 1 {
                        _mm512_mask_loadu_ps(*vector, mask, start)
                    } else {
                        let low = _mm512_maskz_loadu_ps(every_second(mask as u8), start);
                        let high = _mm512_maskz_loadu_ps(every_second((mask >> 8) as u8), start.wrapping_add(16));
                        _mm512_mask_mov_ps(*vector, mask, _mm512_permutex2var_ps(low, evens, high))
                    }
                };
            }
        }
        vectors
    }
}

/// Bit `i` moved to bit `2 i`.
fn every_second(mask: u8) -> u16 {
    let mut wide = u16::from(mask);
    wide = (wide | (wide << 4)) & 0x0f0f;
    wide = (wide | (wide << 2)) & 0x3333;
    (wide | (wide << 1)) & 0x5555
}

fn pack_rows_48(rows: &mut [f32], planes: &[f32], plane_len: usize, runs: &[Run], step: usize) {
    #[target_feature(enable = "avx512f")]
    fn pack(rows: &mut [f32], planes: &[f32], plane_len: usize, runs: &[Run], step: usize) {
        let mut planes = planes.chunks_exact(plane_len);
        if let [Run { at: 0, len: 48, from }] = *runs
            && step == 1
        {
            for row in rows.as_chunks_mut::<48>().0 {
                match planes.next() {
                    Some(plane) => row.copy_from_slice(&plane[from..from + 48]),
                    None => row.fill(0.0),
                }
            }
            return;
        }
        let table = Row::<3>::new(runs, step, plane_len);
        for row in rows.as_chunks_mut::<48>().0 {
            let vectors = planes.next().map_or([_mm512_setzero_ps(); 3], |plane| table.vectors(plane));
            for (j, &vector) in vectors.iter().enumerate() {
                // SAFETY: three vectors of 16 in a row of 48.
                unsafe { _mm512_storeu_ps(row[16 * j..].as_mut_ptr(), vector) };
            }
        }
    }
    // SAFETY: a kernel is made only where the processor has its features.
    unsafe { pack(rows, planes, plane_len, runs, step) }
}

/// Rows of `16 NV` pairs: lane by lane the values of two planes.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn pack_pairs<const NV: usize>(rows: &mut [u32], planes: &[f32], plane_len: usize, runs: &[Run], step: usize) {
    let table = Row::<NV>::new(runs, step, plane_len);
    let mut planes = planes.chunks_exact(plane_len);
    let mut next = [0i16; 32];
    for (i, at) in next.iter_mut().enumerate() {
        *at = (i / 2 + i % 2 * 16) as i16;
    }
    // SAFETY: 32 numbers of 16 bits.
    let interleave = unsafe { _mm512_loadu_epi16(next.as_ptr()) };
    for row in rows.chunks_exact_mut(16 * NV) {
        let mut half = || planes.next().map_or([_mm512_setzero_ps(); NV], |plane| table.vectors(plane));
        let (low, high) = (half(), half());
        for j in 0..NV {
            // SAFETY: `NV` vectors of 16 in the row; the two types are 512 bits without meaning of their own.
            unsafe {
                let both = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high[j], low[j]));
                let pairs = _mm512_permutexvar_epi16(interleave, both);
                _mm512_storeu_si512(row[16 * j..].as_mut_ptr().cast(), pairs);
            }
        }
    }
}

/// Rows of `16 NV` values, two neighbours to an element.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn pack_pairs_along<const NV: usize>(rows: &mut [u32], planes: &[f32], plane_len: usize, runs: &[Run], step: usize) {
    let table = Row::<NV>::new(runs, step, plane_len);
    for (row, plane) in rows.chunks_exact_mut(8 * NV).zip(planes.chunks_exact(plane_len)) {
        for (j, &vector) in table.vectors(plane).iter().enumerate() {
            // SAFETY: `NV` half vectors of 8 in the row; the two types are 256 bits without meaning of their own.
            unsafe {
                let values = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(vector));
                _mm256_storeu_si256(row[8 * j..].as_mut_ptr().cast(), values);
            }
        }
    }
}

macro_rules! pair_packing {
    ($($name:ident, $inner:ident, $nv:literal);* $(;)?) => {
        $(pub(super) fn $name(rows: &mut [u32], planes: &[f32], plane_len: usize, runs: &[Run], step: usize) {
            // SAFETY: a kernel is made only where the processor has its features.
            unsafe { $inner::<$nv>(rows, planes, plane_len, runs, step) }
        })*
    };
}
pair_packing! {
    pack_pairs_48, pack_pairs, 3;
    pack_pairs_along_48, pack_pairs_along, 3;
    pack_pairs_32, pack_pairs, 2;
    pack_pairs_along_32, pack_pairs_along, 2;
}

/// Sixteen rows as sixteen columns.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(r: &[__m512; 16]) -> [__m512; 16] {
    let (mut a, mut b, mut out) = (*r, *r, *r);
    // Neighbouring rows, then pairs of rows, interleaved within each quarter.
    for i in 0..8 {
        a[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for i in 0..4 {
        for half in 0..2 {
            let (low, high) = (_mm512_castps_pd(a[4 * i + half]), _mm512_castps_pd(a[4 * i + half + 2]));
            b[4 * i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            b[4 * i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    }
    // Now b[4 i + q] holds columns q, q + 4, q + 8, q + 12 of rows 4 i..4 i + 4, a quarter each.
    for q in 0..4 {
        let even = [_mm512_shuffle_f32x4::<0x88>(b[q], b[4 + q]), _mm512_shuffle_f32x4::<0x88>(b[8 + q], b[12 + q])];
        let odd = [_mm512_shuffle_f32x4::<0xdd>(b[q], b[4 + q]), _mm512_shuffle_f32x4::<0xdd>(b[8 + q], b[12 + q])];
        out[q] = _mm512_shuffle_f32x4::<0x88>(even[0], even[1]);
        out[q + 4] = _mm512_shuffle_f32x4::<0x88>(odd[0], odd[1]);
        out[q + 8] = _mm512_shuffle_f32x4::<0xdd>(even[0], even[1]);
        out[q + 12] = _mm512_shuffle_f32x4::<0xdd>(odd[0], odd[1]);
    }
    out
}

/// Blocks of 16 rows by 16 elements; `load(row, first value, values)` gives the elements of a row.
#[inline]
#[target_feature(enable = "avx512f")]
fn pack_column_blocks<P>(
    nr: usize,
    pair: usize,
    columns: Columns<'_, f32>,
    panel: &mut [P],
    load: impl Fn(&[f32]) -> __m512,
) {
    let Columns { rows, step, n_rows, len } = columns;
    for (block, out) in panel.chunks_mut(16 * nr).enumerate() {
        let start = (block * 16 * pair).min(len);
        let n = (16 * pair).min(len - start);
        for first in (0..nr).step_by(16) {
            let mut r = [_mm512_setzero_ps(); 16];
            for (j, r) in (first..n_rows).zip(&mut r) {
                *r = load(&rows[j * step + start..][..n]);
            }
            for (row, v) in out.chunks_exact_mut(nr).zip(transpose(&r)) {
                let to = &mut row[first..first + 16];
                // SAFETY: 16 elements of 4 bytes.
                unsafe { _mm512_storeu_ps(to.as_mut_ptr().cast(), v) };
            }
        }
    }
}

/// The first `values.len()` lanes, at most 16; 0 in the others.
#[inline]
#[target_feature(enable = "avx512f")]
fn load_some(values: &[f32]) -> __m512 {
    let mask = ((1u32 << values.len().min(16)) - 1) as u16;
    // SAFETY: lanes outside the mask are not read.
    unsafe { _mm512_maskz_loadu_ps(mask, values.as_ptr()) }
}

fn pack_columns_48(columns: Columns<'_, f32>, panel: &mut [f32]) {
    #[target_feature(enable = "avx512f")]
    fn pack(columns: Columns<'_, f32>, panel: &mut [f32]) {
        pack_column_blocks(48, 1, columns, panel, |values| load_some(values));
    }
    // SAFETY: a kernel is made only where the processor has its features.
    unsafe { pack(columns, panel) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn pack_column_pairs<const NV: usize>(columns: Columns<'_, f32>, panel: &mut [u32]) {
    pack_column_blocks(16 * NV, 2, columns, panel, |values| {
        let (low, high) = values.split_at(values.len().min(16));
        // SAFETY: the two types are 512 bits without meaning of their own.
        unsafe { std::mem::transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(load_some(high), load_some(low))) }
    });
}

fn pack_column_pairs_48(columns: Columns<'_, f32>, panel: &mut [u32]) {
    // SAFETY: a kernel is made only where the processor has its features.
    unsafe { pack_column_pairs::<3>(columns, panel) }
}

pub(super) fn pack_column_pairs_32(columns: Columns<'_, f32>, panel: &mut [u32]) {
    // SAFETY: a kernel is made only where the processor has its features.
    unsafe { pack_column_pairs::<2>(columns, panel) }
}

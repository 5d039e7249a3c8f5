//! Packing with AVX-512: rows of pixels by masked loads, columns by transposes of 16 by 16, bf16 by pairs.

use std::arch::x86_64::*;

use crate::kernels::{Columns, Run, plain};

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

pub(super) fn pack_rows_48(rows: &mut [f32], planes: &[f32], plane_len: usize, runs: &[Run], step: usize) {
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
        $(pub(in crate::kernels) fn $name(rows: &mut [u32], planes: &[f32], plane_len: usize, runs: &[Run], step: usize) {
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

pub(super) fn pack_columns_48(columns: Columns<'_, f32>, panel: &mut [f32]) {
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

pub(super) fn pack_column_pairs_48(columns: Columns<'_, f32>, panel: &mut [u32]) {
    // SAFETY: a kernel is made only where the processor has its features.
    unsafe { pack_column_pairs::<3>(columns, panel) }
}

pub(in crate::kernels) fn pack_column_pairs_32(columns: Columns<'_, f32>, panel: &mut [u32]) {
    // SAFETY: a kernel is made only where the processor has its features.
    unsafe { pack_column_pairs::<2>(columns, panel) }
}

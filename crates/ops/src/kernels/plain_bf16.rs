//! Kernels over bf16 pairs in plain Rust: oracles, too slow to be worth choosing.

use super::plain::{LANES, MR, NR, fill_row, pack_columns, tile, vectors};
use super::tile::{Tile, Vectors, finish, run};
use super::{Kernel, Run, halves};
use crate::gemm::Element;

/// Sums of f32, panels of bf16 pairs.
struct PlainPairs;

impl Vectors for PlainPairs {
    type P = u32;
    type Factors = [u32; LANES];
    vectors!(f32);

    #[inline(always)]
    unsafe fn spread(from: *const u32) -> Self::Factors {
        // SAFETY: one element, by the trait's contract.
        [unsafe { *from }; LANES]
    }

    #[inline(always)]
    unsafe fn factors(from: *const u32) -> Self::Factors {
        // SAFETY: `LANES` elements, by the trait's contract.
        unsafe { *from.cast() }
    }

    #[inline(always)]
    unsafe fn fma(a: Self::Factors, b: Self::Factors, c: Self::Sums) -> Self::Sums {
        std::array::from_fn(|i| {
            let (a, b) = (halves(a[i]), halves(b[i]));
            a[1] * b[1] + (a[0] * b[0] + c[i])
        })
    }
}

/// [`Kernel::pack_rows`] for panels of pairs.
pub(super) fn pack_pairs(nr: usize, rows: &mut [u32], planes: &[f32], plane_len: usize, runs: &[Run], step: usize) {
    let mut planes = planes.chunks_exact(plane_len);
    let (mut low, mut high) = (vec![0.0; nr], vec![0.0; nr]);
    for row in rows.chunks_exact_mut(nr) {
        for half in [&mut low, &mut high] {
            match planes.next() {
                Some(plane) => fill_row(half, plane, runs, step),
                None => half.fill(0.0),
            }
        }
        for (pair, (&low, &high)) in row.iter_mut().zip(low.iter().zip(&high)) {
            *pair = super::pair(low, high);
        }
    }
}

/// [`Kernel::pack_along`] for panels of pairs.
pub(super) fn pack_pairs_along(
    nr: usize,
    rows: &mut [u32],
    planes: &[f32],
    plane_len: usize,
    runs: &[Run],
    step: usize,
) {
    let mut whole = vec![0.0; nr];
    for (row, plane) in rows.chunks_exact_mut(nr / 2).zip(planes.chunks_exact(plane_len)) {
        fill_row(&mut whole, plane, runs, step);
        for (pair, values) in row.iter_mut().zip(whole.chunks_exact(2)) {
            *pair = super::pair(values[0], values[1]);
        }
    }
}

unsafe fn tile_along_pairs(t: &Tile<f32, u32>) {
    // SAFETY: forwarded; needs no special instructions.
    unsafe { run::<PlainPairs, MR, 1, { NR / 2 }, 1>(t) }
}

pub(super) fn kernel() -> Kernel<f32, u32> {
    Kernel {
        name: "plain bf16",
        mr: MR,
        nr: NR,
        lanes: NR,
        pair: 2,
        k_block: 1,
        join: super::pair,
        tile: tile::<PlainPairs>,
        tile_along: tile_along_pairs,
        pack_rows: |rows, planes, plane_len, runs, step| pack_pairs(NR, rows, planes, plane_len, runs, step),
        pack_along: |rows, planes, plane_len, runs, step| pack_pairs_along(NR, rows, planes, plane_len, runs, step),
        pack_columns: |columns, panel| pack_columns(NR, 2, super::pair, columns, panel),
    }
}

/// What `amx` computes, in the layout it computes it in, without its instructions.
pub(super) fn blocked_kernel() -> Kernel<f32, u32> {
    unsafe fn tile(t: &Tile<f32, u32>) {
        let mut sums = vec![0f32; 32 * 32];
        for segment in 0..t.segments {
            for step in 0..t.k {
                for i in 0..32 {
                    // SAFETY: blocks of 16 steps, rows of 16 pairs within a block, by the layout's contract.
                    let a = halves(unsafe { *t.a.add(segment * t.a_segment + step / 16 * 512 + i * 16 + step % 16) });
                    for j in 0..32 {
                        // SAFETY: rows of 32 pairs, one a step.
                        let b = halves(unsafe { *t.b.add(segment * t.b_segment + step * 32 + j) });
                        sums[i * 32 + j] += a[0] * b[0] + a[1] * b[1];
                    }
                }
            }
        }
        // SAFETY: forwarded.
        unsafe { finish(t, &sums, 32) };
    }
    Kernel {
        name: "plain bf16, blocked",
        mr: 32,
        nr: 32,
        lanes: 32,
        pair: 2,
        k_block: 16,
        join: super::pair,
        tile,
        tile_along: tile,
        pack_rows: |rows, planes, plane_len, runs, step| pack_pairs(32, rows, planes, plane_len, runs, step),
        pack_along: |rows, planes, plane_len, runs, step| pack_pairs_along(32, rows, planes, plane_len, runs, step),
        pack_columns: |columns, panel| pack_columns(32, 2, super::pair, columns, panel),
    }
}

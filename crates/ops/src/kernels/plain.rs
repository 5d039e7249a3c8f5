//! Kernels in plain Rust: the oracle of the others, and what runs where none of them does.

use std::marker::PhantomData;

use super::lines::{self, LineKernel};
use super::tile::{Tile, Vectors, run};
use super::{Columns, Kernel, Run};
use crate::gemm::Element;

pub(super) const LANES: usize = 8;
pub(super) const MR: usize = 4;
pub(super) const NR: usize = LANES;

/// Sums and panels of `T`.
struct Plain<T>(PhantomData<T>);

macro_rules! vectors {
    ($T:ty) => {
        type T = $T;
        type Sums = [$T; LANES];
        const LANES: usize = LANES;

        #[inline(always)]
        unsafe fn zero() -> Self::Sums {
            [<$T>::ZERO; LANES]
        }

        #[inline(always)]
        unsafe fn spread_sum(from: *const $T) -> Self::Sums {
            // SAFETY: one element, by the trait's contract.
            [unsafe { *from }; LANES]
        }

        #[inline(always)]
        unsafe fn load(from: *const $T) -> Self::Sums {
            // SAFETY: `LANES` elements, by the trait's contract; arrays align like their elements.
            unsafe { *from.cast() }
        }

        #[inline(always)]
        unsafe fn store(to: *mut $T, v: Self::Sums) {
            // SAFETY: as for `load`.
            unsafe { *to.cast() = v }
        }

        #[inline(always)]
        unsafe fn add(a: Self::Sums, b: Self::Sums) -> Self::Sums {
            std::array::from_fn(|i| a[i] + b[i])
        }

        #[inline(always)]
        unsafe fn fma_sums(a: Self::Sums, b: Self::Sums, c: Self::Sums) -> Self::Sums {
            std::array::from_fn(|i| a[i] * b[i] + c[i])
        }

        #[inline(always)]
        unsafe fn relu(a: Self::Sums) -> Self::Sums {
            a.map(|v| if v < <$T>::ZERO { <$T>::ZERO } else { v })
        }
    };
}

#[cfg(test)]
pub(super) use vectors;

impl<E: Element> Vectors for Plain<E> {
    type P = E;
    type Factors = [E; LANES];
    vectors!(E);

    #[inline(always)]
    unsafe fn spread(from: *const E) -> Self::Factors {
        // SAFETY: one element, by the trait's contract.
        [unsafe { *from }; LANES]
    }

    #[inline(always)]
    unsafe fn factors(from: *const E) -> Self::Factors {
        // SAFETY: `LANES` elements, by the trait's contract.
        unsafe { *from.cast() }
    }

    #[inline(always)]
    unsafe fn fma(a: Self::Factors, b: Self::Factors, c: Self::Sums) -> Self::Sums {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
}

/// Elements of one row of a panel: those of the runs, else 0.
#[inline(always)]
pub(super) fn fill_row<T: Element>(row: &mut [T], plane: &[T], runs: &[Run], step: usize) {
    if runs.iter().map(|run| run.len).sum::<usize>() < row.len() {
        row.fill(T::ZERO);
    }
    for &Run { at, len, from } in runs {
        let target = &mut row[at..at + len];
        if step == 1 {
            target.copy_from_slice(&plane[from..from + len]);
        } else {
            for (t, s) in target.iter_mut().zip(plane[from..].iter().step_by(step)) {
                *t = *s;
            }
        }
    }
}

/// [`Kernel::pack_rows`] for panels of `T`.
#[inline(always)]
pub(super) fn pack_rows<T: Element>(
    nr: usize,
    rows: &mut [T],
    planes: &[T],
    plane_len: usize,
    runs: &[Run],
    step: usize,
) {
    let mut planes = planes.chunks_exact(plane_len);
    for row in rows.chunks_exact_mut(nr) {
        match planes.next() {
            Some(plane) => fill_row(row, plane, runs, step),
            None => row.fill(T::ZERO),
        }
    }
}

/// [`Kernel::pack_columns`] for any panel.
#[inline(always)]
pub(super) fn pack_columns<T: Element, P: Copy>(
    nr: usize,
    pair: usize,
    join: impl Fn(T, T) -> P,
    columns: Columns<'_, T>,
    panel: &mut [P],
) {
    /// Steps whose panel rows stay in the first-level cache.
    const BLOCK: usize = 32;
    let Columns { rows, step, n_rows, len } = columns;
    for (block, out) in panel.chunks_mut(BLOCK * nr).enumerate() {
        let start = (block * BLOCK * pair).min(len);
        let n = (out.len() / nr * pair).min(len - start);
        if n_rows < nr || n * nr < out.len() * pair {
            out.fill(join(T::ZERO, T::ZERO));
        }
        for j in 0..n_rows {
            let source = &rows[j * step + start..][..n];
            let mut targets = out[j..].iter_mut().step_by(nr);
            if pair == 1 {
                targets.zip(source).for_each(|(target, &value)| *target = join(value, value));
                continue;
            }
            let pairs = source.chunks_exact(2);
            let rest = pairs.remainder();
            for values in pairs {
                *targets.next().expect("a step for each pair") = join(values[0], values[1]);
            }
            if let [last] = *rest {
                *targets.next().expect("a step for the last value") = join(last, T::ZERO);
            }
        }
    }
}

pub(super) unsafe fn tile<S: Vectors>(t: &Tile<S::T, S::P>) {
    // SAFETY: forwarded; needs no special instructions.
    unsafe { run::<S, MR, 1, 1, MR>(t) }
}

unsafe fn tile_along<S: Vectors>(t: &Tile<S::T, S::P>) {
    // SAFETY: forwarded; needs no special instructions.
    unsafe { run::<S, MR, 1, NR, 1>(t) }
}

pub(super) fn kernel<T: Element>() -> Kernel<T> {
    fn pack<T: Element>(rows: &mut [T], planes: &[T], plane_len: usize, runs: &[Run], step: usize) {
        pack_rows(NR, rows, planes, plane_len, runs, step);
    }
    Kernel {
        name: "plain",
        mr: MR,
        nr: NR,
        lanes: LANES,
        pair: 1,
        k_block: 1,
        join: |low, _| low,
        tile: tile::<Plain<T>>,
        tile_along: tile_along::<Plain<T>>,
        pack_rows: pack,
        pack_along: pack,
        pack_columns: |columns, panel| pack_columns(NR, 1, |v, _| v, columns, panel),
    }
}

pub(super) fn line_kernel<T: Element>() -> LineKernel<T> {
    LineKernel {
        #[cfg(test)]
        name: "plain",
        // SAFETY: needs no special instructions.
        convolve: |input, taps, weights, out| unsafe { lines::convolve::<Plain<T>>(input, taps, weights, out) },
        // SAFETY: needs no special instructions.
        correlate: |input, taps, grad, sums| unsafe { lines::correlate::<Plain<T>>(input, taps, grad, sums) },
    }
}

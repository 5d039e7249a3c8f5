//! The transforms of patches, output gradients and outputs, vectors of tiles at a time.

use crate::cpu::Element;

/// Vectors of `L` tiles.
type Lanes<T, const L: usize> = [T; L];

#[inline(always)]
fn add<T: Element, const L: usize>(a: Lanes<T, L>, b: Lanes<T, L>) -> Lanes<T, L> {
    let mut out = a;
    for i in 0..L {
        out[i] += b[i];
    }
    out
}

#[inline(always)]
fn sub<T: Element, const L: usize>(a: Lanes<T, L>, b: Lanes<T, L>) -> Lanes<T, L> {
    let mut out = a;
    for i in 0..L {
        out[i] -= b[i];
    }
    out
}

/// `B^T d` of one column or row.
#[inline(always)]
fn patch_line<T: Element, const L: usize>(d: [Lanes<T, L>; 4]) -> [Lanes<T, L>; 4] {
    [sub(d[0], d[2]), add(d[1], d[2]), sub(d[2], d[1]), sub(d[1], d[3])]
}

/// `A d` of one column or row.
#[inline(always)]
fn gradient_line<T: Element, const L: usize>(d: [Lanes<T, L>; 2]) -> [Lanes<T, L>; 4] {
    let zero = [T::ZERO; L];
    [d[0], add(d[0], d[1]), sub(d[0], d[1]), sub(zero, d[1])]
}

/// `A^T m` of one column or row.
#[inline(always)]
fn output_line<T: Element, const L: usize>(m: [Lanes<T, L>; 4]) -> [Lanes<T, L>; 2] {
    [add(add(m[0], m[1]), m[2]), sub(sub(m[1], m[2]), m[3])]
}

/// Kernels whose transforms are formed at once.
pub(super) const LINES: usize = 8;

#[inline(always)]
fn halved<T: Element>(mut a: Lanes<T, LINES>) -> Lanes<T, LINES> {
    let half = T::from_f64(0.5);
    a.iter_mut().for_each(|v| *v *= half);
    a
}

/// `G k` of one column or row.
#[inline(always)]
fn kernel_line<T: Element>([a, b, c]: [Lanes<T, LINES>; 3]) -> [Lanes<T, LINES>; 4] {
    [a, halved(add(add(a, b), c)), halved(add(sub(a, b), c)), c]
}

/// `G^T m` of one column or row.
#[inline(always)]
fn kernel_gradient_line<T: Element>(m: [Lanes<T, LINES>; 4]) -> [Lanes<T, LINES>; 3] {
    let (sum, difference) = (halved(add(m[1], m[2])), halved(sub(m[1], m[2])));
    [add(m[0], sum), difference, add(sum, m[3])]
}

/// `G k G^T` of the nine taps of some kernels.
#[inline(always)]
pub(super) fn transform_kernels<T: Element>(k: &[Lanes<T, LINES>; 9]) -> [Lanes<T, LINES>; 16] {
    let columns = [0, 1, 2].map(|j| kernel_line([k[j], k[3 + j], k[6 + j]]));
    let mut out = [[T::ZERO; LINES]; 16];
    for r in 0..4 {
        out[4 * r..][..4].copy_from_slice(&kernel_line([columns[0][r], columns[1][r], columns[2][r]]));
    }
    out
}

/// `G^T m G` of the sixteen sums of some kernels.
#[inline(always)]
pub(super) fn transform_kernel_gradients<T: Element>(m: &[Lanes<T, LINES>; 16]) -> [Lanes<T, LINES>; 9] {
    let columns = [0, 1, 2, 3].map(|j| kernel_gradient_line([m[j], m[4 + j], m[8 + j], m[12 + j]]));
    let mut out = [[T::ZERO; LINES]; 9];
    for r in 0..3 {
        let row = [columns[0][r], columns[1][r], columns[2][r], columns[3][r]];
        out[3 * r..][..3].copy_from_slice(&kernel_gradient_line(row));
    }
    out
}

#[inline(always)]
fn load<T: Element, const L: usize>(from: &[T], at: usize) -> Lanes<T, L> {
    from[at..at + L].try_into().expect("a whole vector")
}

/// Column `j` of the `N` rows of `width` elements that stand one below the other, `step` apart.
#[inline(always)]
fn load_column<T: Element, const L: usize, const N: usize>(
    from: &[T],
    step: usize,
    width: usize,
    j: usize,
    at: usize,
) -> [Lanes<T, L>; N] {
    let mut column = [[T::ZERO; L]; N];
    for (r, lanes) in column.iter_mut().enumerate() {
        *lanes = load(from, (width * r + j) * step + at);
    }
    column
}

/// `B^T d B` of `nr` tiles: rows of `from`, `from_step` apart, to rows of `to`, `to_step` apart.
#[inline(always)]
pub(super) fn transform_patches<T: Element, const L: usize>(
    nr: usize,
    from: &[T],
    from_step: usize,
    to: &mut [T],
    to_step: usize,
) {
    for at in (0..nr).step_by(L) {
        let mut columns = [[[T::ZERO; L]; 4]; 4];
        for (j, column) in columns.iter_mut().enumerate() {
            *column = patch_line(load_column(from, from_step, 4, j, at));
        }
        for r in 0..4 {
            let row = patch_line([columns[0][r], columns[1][r], columns[2][r], columns[3][r]]);
            for (j, v) in row.iter().enumerate() {
                to[(4 * r + j) * to_step + at..][..L].copy_from_slice(v);
            }
        }
    }
}

/// `A dy A^T` of `nr` tiles, laid out as for [`transform_patches`] with 4 rows to 16.
#[inline(always)]
pub(super) fn transform_gradients<T: Element, const L: usize>(
    nr: usize,
    from: &[T],
    from_step: usize,
    to: &mut [T],
    to_step: usize,
) {
    for at in (0..nr).step_by(L) {
        let mut columns = [[[T::ZERO; L]; 4]; 2];
        for (j, column) in columns.iter_mut().enumerate() {
            *column = gradient_line(load_column(from, from_step, 2, j, at));
        }
        for r in 0..4 {
            let row = gradient_line([columns[0][r], columns[1][r]]);
            for (j, v) in row.iter().enumerate() {
                to[(4 * r + j) * to_step + at..][..L].copy_from_slice(v);
            }
        }
    }
}

/// `A^T m A + bias` of `nr` tiles: 16 rows of `from`, `from_step` apart, to 4 rows of `nr`.
#[inline(always)]
pub(super) fn transform_outputs<T: Element, const L: usize>(
    nr: usize,
    from: &[T],
    from_step: usize,
    bias: T,
    to: &mut [T],
) {
    for at in (0..nr).step_by(L) {
        let mut columns = [[[T::ZERO; L]; 2]; 4];
        for (j, column) in columns.iter_mut().enumerate() {
            *column = output_line(load_column(from, from_step, 4, j, at));
        }
        for r in 0..2 {
            let row = output_line([columns[0][r], columns[1][r], columns[2][r], columns[3][r]]);
            for (j, v) in row.iter().enumerate() {
                to[(2 * r + j) * nr + at..][..L].copy_from_slice(&add(*v, [bias; L]));
            }
        }
    }
}

/// Calls one of the transforms with the longest vectors that fill panels of `nr` without rest.
macro_rules! by_lanes {
    ($nr:expr, $f:ident($($arg:expr),*)) => {
        match $nr {
            nr if nr % 16 == 0 => $f::<_, 16>(nr, $($arg),*),
            nr if nr % 8 == 0 => $f::<_, 8>(nr, $($arg),*),
            nr => $f::<_, 4>(nr, $($arg),*),
        }
    };
}
pub(super) use by_lanes;

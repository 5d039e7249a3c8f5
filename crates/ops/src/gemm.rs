//! Safe door to the `gemm` crate: matrix products of views, on the calling thread.
//!
//! Parallelism is the caller's: kernels split their work into tasks that do not depend on the number of threads.

use candle_core::WithDType;

mod sealed {
    use std::cell::RefCell;
    use std::thread::LocalKey;

    /// Closes [`Element`](super::Element) and gives each type of panel element one buffer a thread.
    pub trait Sealed: Copy + Default + Send + Sync + 'static {
        fn scratch() -> &'static LocalKey<RefCell<Vec<Self>>>;
    }

    macro_rules! seal {
        ($t:ty) => {
            impl Sealed for $t {
                fn scratch() -> &'static LocalKey<RefCell<Vec<Self>>> {
                    thread_local!(static SCRATCH: RefCell<Vec<$t>> = const { RefCell::new(Vec::new()) });
                    &SCRATCH
                }
            }
        };
    }
    seal!(f32);
    seal!(f64);
    // Pairs of bf16.
    seal!(u32);
}
pub(crate) use sealed::Sealed as Scratch;

/// The element types that the kernels of this crate compute in: `f32` and `f64`.
pub trait Element: WithDType + sealed::Sealed {
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
}

impl Element for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
}

impl Element for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
}

/// A read-only matrix view: element `(i, j)` is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy, Debug)]
pub struct MatRef<'a, T> {
    /// Elements.
    pub data: &'a [T],
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Elements between rows.
    pub row_stride: usize,
    /// Elements between columns.
    pub col_stride: usize,
}

impl<'a, T> MatRef<'a, T> {
    /// A row-major matrix.
    pub fn row_major(data: &'a [T], rows: usize, cols: usize) -> Self {
        Self { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// The same elements, rows and columns exchanged.
    pub fn transposed(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            data: self.data,
        }
    }
}

/// A mutable matrix view, laid out like [`MatRef`].
#[derive(Debug)]
pub struct MatMut<'a, T> {
    /// Elements.
    pub data: &'a mut [T],
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Elements between rows.
    pub row_stride: usize,
    /// Elements between columns.
    pub col_stride: usize,
}

impl<'a, T> MatMut<'a, T> {
    /// A row-major matrix.
    pub fn row_major(data: &'a mut [T], rows: usize, cols: usize) -> Self {
        Self { data, rows, cols, row_stride: cols, col_stride: 1 }
    }
}

/// Elements from the first of a view past its last; 0 for an empty view.
pub(crate) fn span(rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> usize {
    if rows == 0 || cols == 0 {
        return 0;
    }
    let last = (rows - 1).checked_mul(row_stride).zip((cols - 1).checked_mul(col_stride));
    last.and_then(|(row, col)| row.checked_add(col)?.checked_add(1)).expect("view fits the address space")
}

/// `dst = alpha * dst + beta * lhs * rhs`, on the calling thread; with `alpha == 0` the old `dst` is not read, NaN or
/// not.
///
/// # Shapes
/// `lhs` `[m, k]`, `rhs` `[k, n]`, `dst` `[m, n]`, any strides. With `k == 0` the product is 0.
/// # Panics
/// When the sizes disagree, a view reaches outside its slice, or two elements of `dst` share a place.
pub fn gemm<T: Element>(dst: MatMut<'_, T>, lhs: MatRef<'_, T>, rhs: MatRef<'_, T>, alpha: T, beta: T) {
    assert_eq!((dst.rows, dst.cols), (lhs.rows, rhs.cols), "size of the product");
    let end = span(dst.rows, dst.cols, dst.row_stride, dst.col_stride);
    assert!(end <= dst.data.len(), "dst reaches element {end} of {}", dst.data.len());
    let apart = |outer: usize, outer_stride: usize, inner: usize, inner_stride: usize| {
        (inner <= 1 || inner_stride > 0) && (outer <= 1 || outer_stride > inner.saturating_sub(1) * inner_stride)
    };
    let (rs, cs) = (dst.row_stride, dst.col_stride);
    assert!(apart(dst.rows, rs, dst.cols, cs) || apart(dst.cols, cs, dst.rows, rs), "elements of dst overlap");
    let target = RawMat { start: dst.data.as_mut_ptr(), row_stride: dst.row_stride, col_stride: dst.col_stride };
    // SAFETY: `dst` is inside its slice, which is borrowed exclusively and initialised.
    unsafe { gemm_raw(target, lhs, rhs, alpha, beta) };
}

/// Where [`gemm_raw`] writes: a window of memory that other tasks write around.
#[derive(Clone, Copy)]
pub(crate) struct RawMat<T> {
    /// Element (0, 0).
    pub(crate) start: *mut T,
    /// Elements between rows.
    pub(crate) row_stride: usize,
    /// Elements between columns.
    pub(crate) col_stride: usize,
}

/// [`gemm`] into a window of `lhs.rows` by `rhs.cols` elements.
///
/// # Panics
/// When `lhs` and `rhs` disagree or reach outside their slices.
/// # Safety
/// Every element of the window is valid for writes, written by nobody else meanwhile, at a place of its own, and
/// initialised unless `alpha == 0`.
pub(crate) unsafe fn gemm_raw<T: Element>(dst: RawMat<T>, lhs: MatRef<'_, T>, rhs: MatRef<'_, T>, alpha: T, beta: T) {
    assert_eq!(lhs.cols, rhs.rows, "inner sizes");
    for (name, mat) in [("lhs", &lhs), ("rhs", &rhs)] {
        let end = span(mat.rows, mat.cols, mat.row_stride, mat.col_stride);
        assert!(end <= mat.data.len(), "{name} reaches element {end} of {}", mat.data.len());
    }
    // SAFETY: `lhs` and `rhs` are inside their slices as asserted, `dst` by this function's contract; T is f32 or f64.
    unsafe {
        ::gemm::gemm(
            lhs.rows,
            rhs.cols,
            lhs.cols,
            dst.start,
            dst.col_stride as isize,
            dst.row_stride as isize,
            alpha != T::ZERO,
            lhs.data.as_ptr(),
            lhs.col_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
            rhs.col_stride as isize,
            rhs.row_stride as isize,
            alpha,
            beta,
            false,
            false,
            false,
            ::gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ramp(n: usize) -> Vec<f64> {
        (0..n).map(|i| (i as f64 * 1.7 + 0.3).sin()).collect()
    }

    #[test]
    fn any_strides_give_the_naive_product() {
        for (m, k, n) in [(1, 1, 1), (3, 5, 7), (17, 33, 9), (64, 70, 130), (4, 0, 3), (0, 2, 3)] {
            for turn in 0..8 {
                let (a, b) = (ramp(m * k), ramp(k * n));
                let lhs = MatRef::row_major(&a, m, k);
                let lhs = if turn & 1 == 1 { MatRef::row_major(&a, k, m).transposed() } else { lhs };
                let rhs = MatRef::row_major(&b, k, n);
                let rhs = if turn & 2 == 2 { MatRef::row_major(&b, n, k).transposed() } else { rhs };
                let (rs, cs) = if turn & 4 == 4 { (1, m + 2) } else { (n + 2, 1) };
                let before = ramp((m + 2) * (n + 2));
                for (alpha, beta) in [(0.0, 1.0), (1.0, 1.0), (-0.5, 2.0)] {
                    let mut data = before.clone();
                    gemm(
                        MatMut { data: &mut data, rows: m, cols: n, row_stride: rs, col_stride: cs },
                        lhs,
                        rhs,
                        alpha,
                        beta,
                    );
                    let mut expected = before.clone();
                    for i in 0..m {
                        for j in 0..n {
                            let at =
                                |x: MatRef<'_, f64>, r: usize, c: usize| x.data[r * x.row_stride + c * x.col_stride];
                            let sum: f64 = (0..k).map(|l| at(lhs, i, l) * at(rhs, l, j)).sum();
                            expected[i * rs + j * cs] = alpha * before[i * rs + j * cs] + beta * sum;
                        }
                    }
                    // What lies between the rows of `dst` must stay, exactly; products are rounded at 2^-53.
                    for (found, expected) in data.iter().zip(&expected) {
                        assert!((found - expected).abs() < 1e-12, "{m} {k} {n} turn {turn}: {found} {expected}");
                    }
                }
            }
        }
    }

    #[test]
    fn alpha_0_does_not_read_dst() {
        let mut dst = [f32::NAN; 4];
        let id = [1.0, 0.0, 0.0, 1.0];
        gemm(MatMut::row_major(&mut dst, 2, 2), MatRef::row_major(&id, 2, 2), MatRef::row_major(&id, 2, 2), 0.0, 3.0);
        assert_eq!(dst, [3.0, 0.0, 0.0, 3.0]);
        let empty = MatRef::row_major(&[], 2, 0);
        let mut dst = [f32::NAN; 4];
        gemm(MatMut::row_major(&mut dst, 2, 2), empty, empty.transposed(), 0.0, 1.0);
        assert_eq!(dst, [0.0; 4]);
    }

    /// Every element is written, whatever path the sizes take: row and column products have kernels of their own.
    fn assert_nan_is_overwritten<T: Element>() {
        for (m, k, n) in [
            (1, 3, 1),
            (1, 3, 5),
            (5, 3, 1),
            (1, 300, 1),
            (1, 300, 700),
            (700, 300, 1),
            (4, 5, 6),
            (65, 300, 129),
            (3, 0, 4),
            (1, 0, 9),
            (9, 0, 1),
        ] {
            // Small integers: sums are exact in both types, in any order.
            let integers = |n: usize, step: usize| (0..n).map(|i| T::from_f64((i * step % 7) as f64 - 3.0)).collect();
            let (a, b): (Vec<T>, Vec<T>) = (integers(m * k, 3), integers(k * n, 5));
            for turn in 0..8 {
                let lhs = MatRef::row_major(&a, m, k);
                let lhs = if turn & 1 == 1 { MatRef::row_major(&a, k, m).transposed() } else { lhs };
                let rhs = MatRef::row_major(&b, k, n);
                let rhs = if turn & 2 == 2 { MatRef::row_major(&b, n, k).transposed() } else { rhs };
                let (row_stride, col_stride) = if turn & 4 == 4 { (1, m) } else { (n, 1) };
                let mut data = vec![T::from_f64(f64::NAN); m * n];
                gemm(MatMut { data: &mut data, rows: m, cols: n, row_stride, col_stride }, lhs, rhs, T::ZERO, T::ONE);
                for i in 0..m {
                    for j in 0..n {
                        let at =
                            |x: MatRef<'_, T>, r: usize, c: usize| x.data[r * x.row_stride + c * x.col_stride].to_f64();
                        let expected: f64 = (0..k).map(|l| at(lhs, i, l) * at(rhs, l, j)).sum();
                        let found = data[i * row_stride + j * col_stride].to_f64();
                        assert_eq!(found, expected, "{m} {k} {n} turn {turn}, element ({i}, {j})");
                    }
                }
            }
        }
    }

    #[test]
    fn alpha_0_overwrites_nan_for_every_shape_and_type() {
        assert_nan_is_overwritten::<f32>();
        assert_nan_is_overwritten::<f64>();
    }

    fn product(dst: (usize, usize, usize, usize, usize), lhs: (usize, usize, usize), rhs: (usize, usize, usize)) {
        let (mut d, a, b) = (vec![0f32; dst.0], vec![0f32; lhs.0], vec![0f32; rhs.0]);
        let target = MatMut { data: &mut d, rows: dst.1, cols: dst.2, row_stride: dst.3, col_stride: dst.4 };
        gemm(target, MatRef::row_major(&a, lhs.1, lhs.2), MatRef::row_major(&b, rhs.1, rhs.2), 0.0, 1.0);
    }

    #[test]
    #[should_panic(expected = "lhs reaches element 6 of 5")]
    fn a_short_lhs_is_refused() {
        product((4, 2, 2, 2, 1), (5, 2, 3), (6, 3, 2));
    }

    #[test]
    #[should_panic(expected = "dst reaches element 4 of 3")]
    fn a_short_dst_is_refused() {
        product((3, 2, 2, 2, 1), (6, 2, 3), (6, 3, 2));
    }

    #[test]
    #[should_panic(expected = "inner sizes")]
    fn other_inner_sizes_are_refused() {
        product((4, 2, 2, 2, 1), (6, 2, 3), (8, 4, 2));
    }

    #[test]
    #[should_panic(expected = "elements of dst overlap")]
    fn an_overlapping_dst_is_refused() {
        product((4, 2, 2, 1, 1), (6, 2, 3), (6, 3, 2));
    }
}

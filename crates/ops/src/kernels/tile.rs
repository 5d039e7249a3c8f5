//! The body of every kernel: a tile of sums held in registers.

use crate::gemm::Element;

/// What a tile's sums start from.
#[derive(Clone, Copy)]
pub(crate) enum Start<T> {
    /// 0; the old `c` is not read.
    Zero,
    /// One value a row, `mr` of them.
    Bias(*const T),
    /// The old `c`.
    Add,
}

/// `c = act(start + sum_segments sum_k a b + residual)` for `rows` by `cols` elements; the rest of `c` stays.
///
/// A step is one product of `T` panels, or two of panels that hold pairs of bf16. Segment `s` reads `k` steps from `a + s a_segment` and `b + s b_segment`, always of the kernel's full height and
/// width: the packed panels are padded with zeros.
pub(crate) struct Tile<T, P = T> {
    pub(crate) k: usize,
    pub(crate) segments: usize,
    pub(crate) a: *const P,
    pub(crate) a_segment: usize,
    pub(crate) b: *const P,
    pub(crate) b_segment: usize,
    pub(crate) c: *mut T,
    /// Elements between rows of `c` and of `residual`.
    pub(crate) ldc: usize,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) start: Start<T>,
    /// Null for none; laid out like `c`.
    pub(crate) residual: *const T,
    /// Whether negative results become 0 (NaN stays).
    pub(crate) relu: bool,
}

/// Vectors of one instruction set: sums of `T`, panels of `P`.
///
/// # Safety
/// Every function needs the instruction set; pointers need `LANES` elements, the two `spread`s' one.
pub(super) trait Vectors {
    type T: Element;
    type P: Copy;
    /// A vector of sums.
    type Sums: Copy;
    /// A vector of panel elements.
    type Factors: Copy;
    const LANES: usize;
    unsafe fn spread(from: *const Self::P) -> Self::Factors;
    unsafe fn factors(from: *const Self::P) -> Self::Factors;
    /// `a * b + c`; of pairs both products.
    unsafe fn fma(a: Self::Factors, b: Self::Factors, c: Self::Sums) -> Self::Sums;
    /// `a * b + c`
    unsafe fn fma_sums(a: Self::Sums, b: Self::Sums, c: Self::Sums) -> Self::Sums;
    unsafe fn zero() -> Self::Sums;
    unsafe fn spread_sum(from: *const Self::T) -> Self::Sums;
    unsafe fn load(from: *const Self::T) -> Self::Sums;
    unsafe fn store(to: *mut Self::T, v: Self::Sums);
    unsafe fn add(a: Self::Sums, b: Self::Sums) -> Self::Sums;
    /// 0 for what is below 0, NaN for NaN.
    unsafe fn relu(a: Self::Sums) -> Self::Sums;
}

/// [`Tile`] for kernels of `MR` rows and `NV` vectors; element `(k, i)` of `a` lies at `k K_STEP + i ROW_STEP`.
///
/// # Safety
/// As [`Tile`] and [`Vectors`] say. Inlined into a function that enables the instruction set.
#[inline(always)]
pub(super) unsafe fn run<S: Vectors, const MR: usize, const NV: usize, const ROW_STEP: usize, const K_STEP: usize>(
    t: &Tile<S::T, S::P>,
) {
    // SAFETY: forwarded.
    unsafe {
        // Columns past `cols` are computed only to the end of their vector.
        match t.cols.div_ceil(S::LANES) {
            1 if NV > 1 => sums::<S, MR, 1, NV, ROW_STEP, K_STEP>(t),
            2 if NV > 2 => sums::<S, MR, 2, NV, ROW_STEP, K_STEP>(t),
            _ => sums::<S, MR, NV, NV, ROW_STEP, K_STEP>(t),
        }
    }
}

/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn sums<
    S: Vectors,
    const MR: usize,
    const NV: usize,
    const PANEL_NV: usize,
    const ROW_STEP: usize,
    const K_STEP: usize,
>(
    t: &Tile<S::T, S::P>,
) {
    // SAFETY: every pointer below stays within what `Tile` promises: `k` steps of a full panel a segment, and of `c`
    // and `residual` `rows` by `cols` elements.
    unsafe {
        let mut sums = [[S::zero(); NV]; MR];
        for segment in 0..t.segments {
            let (mut a, mut b) = (t.a.add(segment * t.a_segment), t.b.add(segment * t.b_segment));
            for _ in 0..t.k {
                // All of them are overwritten; the first stands for "not yet".
                let mut vectors = [S::factors(b); NV];
                for j in 1..NV {
                    vectors[j] = S::factors(b.add(j * S::LANES));
                }
                for i in 0..MR {
                    let value = S::spread(a.add(i * ROW_STEP));
                    for j in 0..NV {
                        sums[i][j] = S::fma(value, vectors[j], sums[i][j]);
                    }
                }
                a = a.add(K_STEP);
                b = b.add(PANEL_NV * S::LANES);
            }
        }
        if t.rows == MR && t.cols == NV * S::LANES {
            for i in 0..MR {
                for j in 0..NV {
                    let at = i * t.ldc + j * S::LANES;
                    let mut v = sums[i][j];
                    match t.start {
                        Start::Zero => {}
                        Start::Bias(bias) => v = S::add(v, S::spread_sum(bias.add(i))),
                        Start::Add => v = S::add(v, S::load(t.c.add(at))),
                    }
                    if !t.residual.is_null() {
                        v = S::add(v, S::load(t.residual.add(at)));
                    }
                    if t.relu {
                        v = S::relu(v);
                    }
                    S::store(t.c.add(at), v);
                }
            }
            return;
        }
        // 8 rows of 48 are the largest tile.
        let mut whole = [S::T::ZERO; 8 * 48];
        for i in 0..MR {
            for j in 0..NV {
                S::store(whole.as_mut_ptr().add((i * NV + j) * S::LANES), sums[i][j]);
            }
        }
        finish(t, &whole, NV * S::LANES);
    }
}

/// The end of a tile whose sums lie in memory, rows `step` apart.
///
/// # Safety
/// `c`, bias and residual as [`Tile`] says.
#[inline(always)]
pub(super) unsafe fn finish<T: Element, P>(t: &Tile<T, P>, sums: &[T], step: usize) {
    for i in 0..t.rows {
        for (j, &sum) in sums[i * step..][..t.cols].iter().enumerate() {
            let at = i * t.ldc + j;
            let mut v = sum;
            // SAFETY: `i` and `j` are inside the tile.
            unsafe {
                match t.start {
                    Start::Zero => {}
                    Start::Bias(bias) => v += *bias.add(i),
                    Start::Add => v += *t.c.add(at),
                }
                if !t.residual.is_null() {
                    v += *t.residual.add(at);
                }
                if t.relu && v < T::ZERO {
                    v = T::ZERO;
                }
                *t.c.add(at) = v;
            }
        }
    }
}

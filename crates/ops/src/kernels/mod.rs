//! Inner kernels of matrix products over packed panels, chosen at run time for the processor.
//!
//! A [`Kernel`] multiplies a panel of broadcast rows with a panel of vectors and keeps the sums in registers:
//! `c[i, j] = sum_k a[k, i] b[k, j]`. One generic body (`tile`) is compiled for AVX-512, AVX2 with FMA, NEON, AVX-512
//! with bf16 products and plain Rust; AMX has tiles of its own. The plain ones are the others' oracle. What does not
//! live here: threads, the meaning of rows and columns, and of packing anything but its innermost loop.

#[cfg(target_arch = "x86_64")]
mod amx;
mod lines;
#[cfg(target_arch = "aarch64")]
mod neon;
mod plain;
#[cfg(test)]
mod plain_bf16;
mod tile;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::sync::OnceLock;

use crate::gemm::Element;
pub(crate) use lines::LineKernel;
pub(crate) use tile::{Start, Tile};

/// `len` elements of a panel's row from `at` on, which come from `from, from + step, ..` of a plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) at: usize,
    pub(crate) len: usize,
    pub(crate) from: usize,
}

/// Fills rows of a panel from planes of `plane_len` elements: what the runs do not name becomes 0, and so does a row
/// that no plane is left for.
pub(crate) type Pack<T, P> = fn(rows: &mut [P], planes: &[T], plane_len: usize, runs: &[Run], step: usize);

/// One instruction set's kernels for sums of `T` over panels of `P`: `T` itself, or pairs of bf16 that stand one above
/// the other in the sum (the first in the low half).
pub(crate) struct Kernel<T: 'static, P: 'static = T> {
    pub(crate) name: &'static str,
    /// Rows of a tile.
    pub(crate) mr: usize,
    /// Columns of a tile.
    pub(crate) nr: usize,
    /// Columns that a tile computes together: `nr` is a multiple of them.
    pub(crate) lanes: usize,
    /// Values that a panel element holds.
    pub(crate) pair: usize,
    /// Steps of the sum that panels come in whole blocks of. In a block of more than one, a panel of broadcast rows is
    /// `[mr][k_block]`, otherwise `[k][mr]`.
    pub(crate) k_block: usize,
    /// A panel element from its values; the second does not count where an element holds one.
    pub(crate) join: fn(T, T) -> P,
    /// Sums over a panel `a` of broadcast rows and a panel `b` `[k][nr]`.
    ///
    /// # Safety
    /// The processor has the instructions, and the tile's pointers reach as [`Tile`] says.
    pub(crate) tile: unsafe fn(&Tile<T, P>),
    /// Sums over `a` `[mr][nr / pair]`, along its rows, and `b` `[k][nr]`, with `k = nr / pair`.
    ///
    /// # Safety
    /// As for `tile`.
    pub(crate) tile_along: unsafe fn(&Tile<T, P>),
    /// Rows of `nr` elements, `pair` planes to a row.
    pub(crate) pack_rows: Pack<T, P>,
    /// Rows of `nr` values, in `nr / pair` elements, a plane each.
    pub(crate) pack_along: Pack<T, P>,
    /// Columns of `rows` as rows of `panel`, see [`Columns`].
    pub(crate) pack_columns: fn(columns: Columns<'_, T>, panel: &mut [P]),
}

/// A matrix whose transpose fills a panel: `n_rows` rows, at most `nr`, of `len` values, `step` apart.
///
/// Row `p` of the panel, `nr` elements, holds column `p`, or columns `pair p..` two to an element; what is missing is 0.
#[derive(Clone, Copy)]
pub(crate) struct Columns<'a, T> {
    pub(crate) rows: &'a [T],
    pub(crate) step: usize,
    pub(crate) n_rows: usize,
    pub(crate) len: usize,
}

impl<T, P> Kernel<T, P> {
    /// Steps of a sum over `n` values.
    pub(crate) fn steps(&self, n: usize) -> usize {
        n.div_ceil(self.pair).next_multiple_of(self.k_block)
    }

    /// Place of row `i` at step `k` in a panel of broadcast rows.
    #[inline(always)]
    pub(crate) fn place(&self, k: usize, i: usize) -> usize {
        if self.k_block == 1 {
            k * self.mr + i
        } else {
            (k / self.k_block * self.mr + i) * self.k_block + k % self.k_block
        }
    }
}

/// The kernels for an element type.
pub(crate) trait Kernels: Element {
    /// Every kernel that this processor can run, fastest first; the last is plain Rust.
    fn available() -> &'static [Kernel<Self>];

    /// The fastest.
    fn kernel() -> &'static Kernel<Self> {
        &Self::available()[0]
    }

    /// Loops over lines that this processor can run, fastest first; the last is plain Rust.
    fn available_lines() -> &'static [LineKernel<Self>];

    /// The fastest loops over lines.
    fn lines() -> &'static LineKernel<Self> {
        &Self::available_lines()[0]
    }

    /// The fastest with products of bf16, for sums over `channels` at a time; none where the processor, or this crate
    /// for this type, has none.
    fn bf16_kernel(channels: usize) -> Option<&'static Kernel<Self, u32>>;
}

macro_rules! kernels {
    ($T:ty, $wide:expr, $lines:expr, $bf16:expr) => {
        impl Kernels for $T {
            fn available() -> &'static [Kernel<Self>] {
                static FOUND: OnceLock<Vec<Kernel<$T>>> = OnceLock::new();
                FOUND.get_or_init(|| $wide.into_iter().chain([plain::kernel()]).collect())
            }

            fn available_lines() -> &'static [LineKernel<Self>] {
                static FOUND: OnceLock<Vec<LineKernel<$T>>> = OnceLock::new();
                FOUND.get_or_init(|| $lines.into_iter().chain([plain::line_kernel()]).collect())
            }

            fn bf16_kernel(channels: usize) -> Option<&'static Kernel<Self, u32>> {
                $bf16(channels)
            }
        }
    };
}
#[cfg(target_arch = "x86_64")]
kernels!(f32, x86::kernels_f32(), x86::lines_f32(), fastest_bf16);
#[cfg(target_arch = "x86_64")]
kernels!(f64, x86::kernels_f64(), x86::lines_f64(), |_| None);
#[cfg(target_arch = "aarch64")]
kernels!(f32, [neon::kernel_f32()], [neon::lines_f32()], fastest_bf16);
#[cfg(target_arch = "aarch64")]
kernels!(f64, [neon::kernel_f64()], [neon::lines_f64()], |_| None);
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
kernels!(f32, [], [], fastest_bf16);
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
kernels!(f64, [], [], |_| None);

/// The bf16 kernels that this processor has instructions for, fastest first; none on most.
pub(crate) fn bf16_kernels() -> &'static [Kernel<f32, u32>] {
    static FOUND: OnceLock<Vec<Kernel<f32, u32>>> = OnceLock::new();
    FOUND.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        return amx::kernel().into_iter().chain(x86::kernel_bf16()).collect();
        #[cfg(not(target_arch = "x86_64"))]
        Vec::new()
    })
}

/// Blocks of many steps would be mostly zeros over few channels.
fn fastest_bf16(channels: usize) -> Option<&'static Kernel<f32, u32>> {
    let found = bf16_kernels();
    if channels < 16 { found.last() } else { found.first() }
}

/// The two values of a pair, low half first.
#[cfg(test)]
#[inline(always)]
pub(crate) fn halves(pair: u32) -> [f32; 2] {
    [f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000)]
}

/// Two values rounded to bf16, to nearest, ties to even; NaN stays NaN.
#[inline(always)]
pub(crate) fn pair(low: f32, high: f32) -> u32 {
    #[inline(always)]
    fn round(v: f32) -> u32 {
        let bits = v.to_bits();
        if v.is_nan() { (bits >> 16) | 0x40 } else { (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 }
    }
    round(low) | (round(high) << 16)
}

/// The oracles of [`bf16_kernels`], one for each layout of the panels.
#[cfg(test)]
pub(crate) fn plain_bf16_kernels() -> [Kernel<f32, u32>; 2] {
    [plain_bf16::kernel(), plain_bf16::blocked_kernel()]
}

#[cfg(test)]
mod tests;

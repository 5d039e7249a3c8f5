//! Convolution along lines of memory, the inner loops of depthwise convolutions.

use candle_core::WithDType;

use super::tile::Vectors;
use crate::gemm::Element;

/// One instruction set's loops over lines of `T`.
pub(crate) struct LineKernel<T: 'static> {
    #[cfg(test)]
    pub(crate) name: &'static str,
    /// `out[i] = sum_taps weights[tap] input[taps[tap] + i]`.
    ///
    /// # Panics
    /// When a tap reaches outside the input, or there are fewer weights than taps.
    pub(crate) convolve: fn(input: &[T], taps: &[usize], weights: &[T], out: &mut [T]),
    /// `sums[tap] += sum_i input[taps[tap] + i] grad[i]`, in `T` over some thousand elements, in f64 across them.
    ///
    /// # Panics
    /// When a tap reaches outside the input, or there are fewer sums than taps.
    pub(crate) correlate: fn(input: &[T], taps: &[usize], grad: &[T], sums: &mut [f64]),
}

/// Vectors whose sums are formed at once, so that no addition waits for the one before.
const AT_ONCE: usize = 4;

/// # Panics
/// Unless every tap's line lies inside the input.
fn check_taps(input: usize, taps: &[usize], len: usize, others: usize) {
    assert!(taps.len() <= others, "{} taps, {others} values for them", taps.len());
    assert!(taps.iter().all(|&tap| tap <= input && len <= input - tap), "a tap reaches outside the line");
}

/// [`LineKernel::convolve`].
///
/// # Safety
/// The processor has the instructions of `S`. Inlined into a function that enables them.
#[inline(always)]
pub(super) unsafe fn convolve<S: Vectors>(input: &[S::T], taps: &[usize], weights: &[S::T], out: &mut [S::T]) {
    check_taps(input.len(), taps, out.len(), weights.len());
    let (n, step) = (out.len(), AT_ONCE * S::LANES);
    let (input, out) = (input.as_ptr(), out.as_mut_ptr());
    // SAFETY: taps and output are as long as asserted; whole vectors stop before the end.
    unsafe {
        let mut i = 0;
        while i + step <= n {
            let mut sums = [S::zero(); AT_ONCE];
            for (&tap, weight) in taps.iter().zip(weights) {
                let weight = S::spread_sum(weight);
                for v in 0..AT_ONCE {
                    sums[v] = S::fma_sums(weight, S::load(input.add(tap + i + v * S::LANES)), sums[v]);
                }
            }
            for v in 0..AT_ONCE {
                S::store(out.add(i + v * S::LANES), sums[v]);
            }
            i += step;
        }
        while i + S::LANES <= n {
            let mut sum = S::zero();
            for (&tap, weight) in taps.iter().zip(weights) {
                sum = S::fma_sums(S::spread_sum(weight), S::load(input.add(tap + i)), sum);
            }
            S::store(out.add(i), sum);
            i += S::LANES;
        }
        while i < n {
            let mut sum = S::T::ZERO;
            for (&tap, &weight) in taps.iter().zip(weights) {
                sum += weight * *input.add(tap + i);
            }
            out.add(i).write(sum);
            i += 1;
        }
    }
}

/// [`LineKernel::correlate`].
///
/// # Safety
/// As [`convolve`].
#[inline(always)]
pub(super) unsafe fn correlate<S: Vectors>(input: &[S::T], taps: &[usize], grad: &[S::T], sums: &mut [f64]) {
    check_taps(input.len(), taps, grad.len(), sums.len());
    let mut done = 0;
    while done < taps.len() {
        let (taps, sums) = (&taps[done..], &mut sums[done..]);
        // SAFETY: as asserted above, for a part of the taps.
        done += unsafe {
            match taps.len() {
                9.. => correlate_some::<S, 9>(input.as_ptr(), taps, grad, sums),
                5.. => correlate_some::<S, 5>(input.as_ptr(), taps, grad, sums),
                3.. => correlate_some::<S, 3>(input.as_ptr(), taps, grad, sums),
                _ => correlate_some::<S, 1>(input.as_ptr(), taps, grad, sums),
            }
        };
    }
}

/// [`correlate`] for the first `K` taps.
///
/// # Safety
/// As [`convolve`]; every tap's line lies inside the input.
#[inline(always)]
unsafe fn correlate_some<S: Vectors, const K: usize>(
    input: *const S::T,
    taps: &[usize],
    grad: &[S::T],
    sums: &mut [f64],
) -> usize {
    /// Vectors summed before they are added in f64.
    const BLOCK: usize = 256;
    // SAFETY: the caller's promise; whole vectors stop before the end.
    unsafe {
        let mut i = 0;
        while i + S::LANES <= grad.len() {
            let end = grad.len().min(i + BLOCK * S::LANES);
            let mut lanes = [S::zero(); K];
            while i + S::LANES <= end {
                let value = S::load(grad.as_ptr().add(i));
                for tap in 0..K {
                    lanes[tap] = S::fma_sums(value, S::load(input.add(taps[tap] + i)), lanes[tap]);
                }
                i += S::LANES;
            }
            for tap in 0..K {
                let mut values = [S::T::ZERO; 16];
                S::store(values.as_mut_ptr(), lanes[tap]);
                sums[tap] += values[..S::LANES].iter().map(|v| v.to_f64()).sum::<f64>();
            }
        }
        while i < grad.len() {
            for tap in 0..K {
                sums[tap] += (*input.add(taps[tap] + i) * grad[i]).to_f64();
            }
            i += 1;
        }
    }
    K
}

//! The most multiply-adds the processor does: chains of fused multiply-adds on registers, on every thread at once.
//!
//! No memory is touched, so this is a bound that no convolution reaches. The widest vectors that `pulp` detects are
//! used (AVX-512, AVX2 with FMA, NEON), those that the kernels of `ops` use too.

use std::hint::black_box;
use std::time::Instant;

use serde::{Deserialize, Serialize};

/// Chains in flight: enough for a latency of four cycles on three pipes, and few enough for 16 registers.
const CHAINS: usize = 12;

/// Rate of f32 arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Peak {
    /// 10^9 operations a second, two a multiply-add, over all threads.
    pub gflops: f64,
    /// Bits of a vector.
    pub vector_bits: usize,
}

struct Chains {
    steps: usize,
}

impl pulp::WithSimd for Chains {
    /// Sum of the chains, so that none is left out, and f32 values a vector.
    type Output = (f32, usize);

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, simd: S) -> Self::Output {
        // A factor below 1 keeps every chain finite for ever.
        let (factor, term) = (simd.splat_f32s(black_box(0.999)), simd.splat_f32s(black_box(0.001)));
        let mut chains = [simd.splat_f32s(black_box(0.5)); CHAINS];
        for _ in 0..self.steps {
            for chain in &mut chains {
                *chain = simd.mul_add_f32s(*chain, factor, term);
            }
        }
        let sum = chains.into_iter().fold(simd.splat_f32s(0.0), |sum, chain| simd.add_f32s(sum, chain));
        (simd.reduce_sum_f32s(sum), S::F32_LANES)
    }
}

/// The best of several short runs over the threads of rayon's pool, about half a second in all.
pub fn peak() -> Peak {
    let arch = pulp::Arch::new();
    let run = |steps: usize| -> (f64, usize) {
        let begun = Instant::now();
        let lanes = rayon::broadcast(|_| {
            let (sum, lanes) = arch.dispatch(Chains { steps });
            black_box(sum);
            lanes
        });
        (begun.elapsed().as_secs_f64(), lanes[0])
    };
    let mut steps = 1 << 14;
    while run(steps).0 < 0.03 {
        steps *= 2;
    }
    let (mut best, mut lanes) = (f64::INFINITY, 1);
    for _ in 0..8 {
        let (seconds, width) = run(steps);
        best = best.min(seconds);
        lanes = width;
    }
    let operations = 2.0 * (rayon::current_num_threads() * CHAINS * lanes * steps) as f64;
    Peak { gflops: operations / best / 1e9, vector_bits: 32 * lanes }
}

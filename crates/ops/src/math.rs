//! Exponential and logarithm as straight-line arithmetic, which loops over slices turn into vector code.
//!
//! The standard library's are calls, one an element; under [`vectorised`](crate::vectorised) these are several times
//! faster. Only additions, multiplications, divisions and bit patterns are used, in one order: the bits are the same on
//! every processor. Of f64 they are the standard library's.

use crate::gemm::Element;

/// `exp` and `ln` of an element type.
pub trait Transcendental: Element {
    /// `e^self`. In f32 within 2 units in the last place, subnormal results included; NaN stays NaN.
    fn exp(self) -> Self;
    /// Natural logarithm. In f32 within 2 units in the last place; minus infinity at 0, NaN below and for NaN.
    fn ln(self) -> Self;
}

impl Transcendental for f32 {
    #[inline(always)]
    fn exp(self) -> Self {
        exp_f32(self)
    }
    #[inline(always)]
    fn ln(self) -> Self {
        ln_f32(self)
    }
}

impl Transcendental for f64 {
    #[inline(always)]
    fn exp(self) -> Self {
        f64::exp(self)
    }
    #[inline(always)]
    fn ln(self) -> Self {
        f64::ln(self)
    }
}

/// ln 2 in two parts, the first of 9 bits: its product with an exponent is exact.
const LN2: [f32; 2] = [355.0 / 512.0, -0.000_212_194_44];
/// 1.5 * 2^23: adding it leaves the nearest integer in the last bits.
const ROUND: f32 = 12_582_912.0;

/// `2^n` for `n` in -126..=127.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// `e^x = 2^n e^r` with `|r| <= ln 2 / 2`, and `e^r = 1 + r + r^2 p(r)`; `p` is the minimax polynomial of degree 4,
/// relative error of the whole 3.1e-9.
#[inline(always)]
fn exp_f32(x: f32) -> f32 {
    const P: [f32; 5] = [0.499_999_94, 0.166_665_2, 0.041_668_393, 0.008_368_781, 0.001_381_446_7];
    // Beyond these bounds the result is infinite or 0 all the same. Comparisons with NaN are false: it passes.
    let x = if x > 89.0 { 89.0 } else { x };
    let x = if x < -104.0 { -104.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let whole = shifted - ROUND;
    let r = (x - whole * LN2[0]) - whole * LN2[1];
    let p = (((P[4] * r + P[3]) * r + P[2]) * r + P[1]) * r + P[0];
    let e = 1.0 + (r + r * r * p);
    // In two steps, since 2^n alone may be out of range while the result is not.
    let half = n >> 1;
    e * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

/// `ln x = n ln 2 + ln(1 + f)` with `1 + f` in `[sqrt(1/2), sqrt 2)`; with `s = f / (2 + f)`,
/// `ln(1 + f) = 2 atanh s = f - s (f - s^2 q(s^2))`, where `q` is the minimax polynomial of degree 2, relative error of
/// the whole 8.1e-10.
#[inline(always)]
fn ln_f32(x: f32) -> f32 {
    const Q: [f32; 3] = [0.666_667_76, 0.399_774_5, 0.298_744_2];
    const SQRT_HALF_BITS: u32 = 0x3f35_04f3;
    // Subnormal numbers are raised into the range where the exponent can be read.
    let (scaled, raised) = if x < f32::MIN_POSITIVE { (x * 8_388_608.0, 23) } else { (x, 0) };
    let above = scaled.to_bits().wrapping_sub(SQRT_HALF_BITS);
    let n = ((above as i32) >> 23) - raised;
    let f = f32::from_bits((above & 0x007f_ffff).wrapping_add(SQRT_HALF_BITS)) - 1.0;
    let s = f / (2.0 + f);
    let z = s * s;
    let q = (Q[2] * z + Q[1]) * z + Q[0];
    let n = n as f32;
    let finite = n * LN2[0] + (f - (s * (f - z * q) - n * LN2[1]));
    let positive = if x == f32::INFINITY { x } else { finite };
    let zero = if x == 0.0 { f32::NEG_INFINITY } else { f32::NAN };
    if x > 0.0 { positive } else { zero }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Distance of `found` from the exact value in units in the last place of f32 there.
    fn ulps(found: f32, exact: f64) -> f64 {
        if found.is_infinite() || exact.abs() > f64::from(f32::MAX) {
            // Rounding to the nearest carries to infinity from half a unit beyond the largest number on.
            let rounds_to_infinity = exact.abs() >= f64::from(f32::MAX) * (1.0 + 2f64.powi(-25));
            return if found.is_infinite() == rounds_to_infinity { 0.0 } else { f64::INFINITY };
        }
        let exponent = exact.abs().max(f64::from(f32::MIN_POSITIVE)).log2().floor();
        (f64::from(found) - exact).abs() / (exponent - 23.0).exp2()
    }

    #[test]
    fn exp_is_within_two_units_everywhere() {
        let mut worst = (0.0, 0.0);
        // 1.6 million arguments from -110 to 95: overflow, underflow and every quotient of ln 2 between.
        for i in 0..1_640_000 {
            let x = -110.0 + i as f32 * 1.25e-4;
            let distance = ulps(exp_f32(x), f64::from(x).exp());
            if distance > worst.0 {
                worst = (distance, x);
            }
        }
        assert!(worst.0 <= 2.0, "{} units at {}", worst.0, worst.1);
        assert_eq!(exp_f32(0.0), 1.0);
        assert_eq!(exp_f32(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp_f32(-1e30), 0.0);
        assert_eq!(exp_f32(f32::INFINITY), f32::INFINITY);
        assert!(exp_f32(f32::NAN).is_nan());
        assert_eq!(exp_f32(1e-12), 1.0);
    }

    #[test]
    fn ln_is_within_two_units_everywhere() {
        let mut worst = (0.0, 0.0);
        // Every 1009th positive number there is, subnormal ones included, and all numbers close to 1.
        let sparse = (1..0x7f80_0000u32).step_by(1009);
        for x in sparse.chain(0x3f7f_0000..0x3f81_0000).map(f32::from_bits) {
            let distance = ulps(ln_f32(x), f64::from(x).ln());
            if distance > worst.0 {
                worst = (distance, x);
            }
        }
        assert!(worst.0 <= 2.0, "{} units at {}", worst.0, worst.1);
        assert_eq!(ln_f32(1.0).to_bits(), 0);
        assert_eq!(ln_f32(0.0), f32::NEG_INFINITY);
        assert_eq!(ln_f32(-0.0), f32::NEG_INFINITY);
        assert_eq!(ln_f32(f32::INFINITY), f32::INFINITY);
        assert!(ln_f32(-1e-40).is_nan() && ln_f32(f32::NAN).is_nan() && ln_f32(f32::NEG_INFINITY).is_nan());
    }
}

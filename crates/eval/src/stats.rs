//! Mean and spread over seeds, in plain code.

use serde::{Deserialize, Serialize};

use crate::confusion::nan_as_null;

/// Mean and sample standard deviation of the finite values among some.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct MeanSd {
    /// Arithmetic mean; NaN (null in JSON) without a finite value.
    #[serde(with = "nan_as_null")]
    pub mean: f64,
    /// Sample standard deviation, `sqrt(sum (x - mean)^2 / (n - 1))`; `None` below two values, when it is unknown.
    pub sd: Option<f64>,
    /// Number of finite values.
    pub n: usize,
}

impl MeanSd {
    /// Mean and deviation of `values`; NaN and infinite ones are left out and not counted in `n`.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let values: Vec<f64> = values.into_iter().filter(|v| v.is_finite()).collect();
        let n = values.len();
        if n == 0 {
            return Self { mean: f64::NAN, sd: None, n };
        }
        let mean = values.iter().sum::<f64>() / n as f64;
        let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
        Self { mean, sd: (n > 1).then(|| (squares / (n - 1) as f64).sqrt()), n }
    }
}

/// Standard deviation pooled over groups, `sqrt(sum_g (n_g - 1) sd_g^2 / sum_g (n_g - 1))`; `None` when no group has two
/// values.
pub fn pooled_sd(groups: &[MeanSd]) -> Option<f64> {
    let (mut squares, mut freedom) = (0.0, 0);
    for group in groups {
        if let Some(sd) = group.sd {
            squares += (group.n - 1) as f64 * sd * sd;
            freedom += group.n - 1;
        }
    }
    (freedom > 0).then(|| (squares / freedom as f64).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mean_and_deviation_by_hand() {
        let m = MeanSd::of([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]);
        assert_eq!((m.mean, m.n), (5.0, 8));
        assert!((m.sd.unwrap() - (32.0f64 / 7.0).sqrt()).abs() < 1e-15);
        assert_eq!(MeanSd::of([0.5]), MeanSd { mean: 0.5, sd: None, n: 1 });
        assert_eq!(MeanSd::of([0.5, f64::NAN]), MeanSd { mean: 0.5, sd: None, n: 1 });
        assert!(MeanSd::of([]).mean.is_nan());
    }

    #[test]
    fn pooling_weighs_by_degrees_of_freedom() {
        let a = MeanSd { mean: 0.0, sd: Some(1.0), n: 2 };
        let b = MeanSd { mean: 9.0, sd: Some(2.0), n: 4 };
        assert!((pooled_sd(&[a, b]).unwrap() - (13.0f64 / 4.0).sqrt()).abs() < 1e-15);
        assert_eq!(pooled_sd(&[a, MeanSd::of([1.0])]), Some(1.0));
        assert_eq!(pooled_sd(&[MeanSd::of([1.0]), MeanSd::of([2.0])]), None);
    }
}

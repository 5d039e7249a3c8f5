//! CSC where the matrix of all pixel pairs would take 64 GiB: 19 classes at 256 x 512. Alone in its process, so that
//! the memory it reports is its own.

mod common;

use std::time::Instant;

use candle_core::DType;
use common::{elements, map, random_mask, relative, scalar, value_and_grad};
use segdistill_losses::{Csc, csc};
use segdistill_ops::testing::random_f64;

/// Peak resident memory of this process in MiB, where the system tells.
fn peak_mib() -> Option<usize> {
    let status = process_status()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM"))?;
    line.split_whitespace().nth(1)?.parse::<usize>().ok().map(|kib| kib / 1024)
}

/// Linux keeps it in a file.
#[allow(clippy::disallowed_methods)] // no path to name in an error: absence is an answer
fn process_status() -> Option<String> {
    std::fs::read_to_string("/proc/self/status").ok()
}

#[test]
fn half_a_cityscapes_crop() {
    let (c, h, w) = (19, 256, 512);
    let [student, teacher] =
        ["student", "teacher"].map(|k| (random_f64(1, k, &[1, c, h, w]) * 4.0).unwrap().to_dtype(DType::F32).unwrap());
    for valid in [map(1, h, w, |_, _, _| 1), random_mask(2, 1, h, w, 0.9)] {
        let before = peak_mib();
        let started = Instant::now();
        let (value, grad) = value_and_grad(&student, 1.0, |s| csc(s, &teacher, &valid, &Csc::default()));
        println!("value {value:.6} and gradient in {:.2?}", started.elapsed());
        if let (Some(before), Some(after)) = (before, peak_mib()) {
            println!("peak memory {after} MiB, {before} MiB before");
            assert!(after - before < 1024, "4 GiB is the limit, a quarter is plenty");
        }
        let direction = elements(&grad);
        assert!(value.is_finite() && direction.iter().all(|g| g.is_finite()));
        assert!((0.0..=1.0).contains(&value), "a mean of squared differences of numbers in [0, 1]");

        // Along the gradient itself the loss must rise at the rate of its length.
        let length = direction.iter().map(|g| g * g).sum::<f64>().sqrt();
        assert!(length > 0.0);
        let step = 20.0; // rms 0.013 a logit: far above f32's rounding, and curvature cancels between the two sides
        let moved = |by: f64| {
            let student = (&student + (&grad * (by / length)).unwrap()).unwrap();
            scalar(&csc(&student, &teacher, &valid, &Csc::default()).unwrap())
        };
        let rate = (moved(step) - moved(-step)) / (2.0 * step);
        assert!(relative(rate, length) < 2e-3, "rate {rate:.6e}, length of the gradient {length:.6e}");
    }
}

//! CSC where the matrix of all pixel pairs would take 64 GiB in f32: 19 classes at 256 x 512. Alone in its process, so
//! that the memory it reports is its own.

mod common;

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use common::{map, process_mib, random_mask, relative, say, value_and_grad};
use segdistill_losses::{Csc, CscForm, csc};
use segdistill_ops::testing::{random_f64, relative_error};

/// The loss is a mean over pairs of pixels, so that sixteen copies of every pixel, wherever they lie, have the value of
/// one, and each copy has a sixteenth of the gradient. A map of 64 x 128 is small enough for the sum over all pairs.
#[test]
fn half_a_cityscapes_crop() {
    let (c, [h, w], [small_h, small_w]) = (19, [256usize, 512], [64usize, 128]);
    let (m, small_m) = (h * w, small_h * small_w);
    assert_eq!(m, 16 * small_m);
    // An odd factor permutes the residues of a power of two: each small pixel is taken once in 8192, scattered.
    let source: Vec<u32> = (0..m).map(|p| ((p * 4237 + p / small_m * 31) % small_m) as u32).collect();
    let mut copies = vec![0; small_m];
    source.iter().for_each(|&p| copies[p as usize] += 1);
    assert!(copies.iter().all(|&n| n == 16));
    let source = Tensor::from_vec(source, m, &Device::Cpu).unwrap();
    // n?hw->n?(hw) picked, in any type
    let enlarged = |t: &Tensor| {
        let pixels = t.flatten_from(t.rank() - 2).unwrap().index_select(&source, t.rank() - 2).unwrap();
        let dims: Vec<usize> = t.dims()[..t.rank() - 2].iter().copied().chain([h, w]).collect();
        pixels.reshape(dims).unwrap()
    };

    let [student, teacher] = ["student", "teacher"]
        .map(|k| (random_f64(1, k, &[1, c, small_h, small_w]) * 4.0).unwrap().to_dtype(DType::F32).unwrap());
    let cases = [map(1, small_h, small_w, |_, _, _| 1), random_mask(2, 1, small_h, small_w, 0.9)].map(|valid| {
        let [student, teacher] = [&student, &teacher].map(|t| t.to_dtype(DType::F64).unwrap());
        let direct = Csc { form: CscForm::Direct };
        let (expected, grad) = value_and_grad(&student, 1.0, |s| csc(s, &teacher, &valid, &direct));
        assert!(expected > 1e-3, "{expected}: unrelated networks differ");
        (enlarged(&valid), expected, enlarged(&(grad / 16.0).unwrap()))
    });
    let (student, teacher) = (enlarged(&student), enlarged(&teacher));

    // The high-water mark never falls: if anything it counts too much.
    let before = process_mib("VmRSS");
    let found = cases.each_ref().map(|(valid, ..)| {
        let started = Instant::now();
        let found = value_and_grad(&student, 1.0, |s| csc(s, &teacher, valid, &Csc::default()));
        (found, started.elapsed())
    });
    if let (Some(before), Some(peak)) = (before, process_mib("VmHWM")) {
        say(&format!("19 classes at 256 x 512: peak memory {peak} MiB, {before} MiB before"));
        assert!(peak - before < 1024, "{peak} MiB; 4 GiB is the limit, a quarter is plenty");
    }
    for ((_, expected, expected_grad), ((value, grad), time)) in cases.iter().zip(&found) {
        let off = (relative(*value, *expected), relative_error(grad, expected_grad).unwrap());
        say(&format!("value and gradient in {time:.2?}, off by {:.1e} and {:.1e}", off.0, off.1));
        // f32 against f64 on the same logits, as in tests/csc.rs.
        assert!(off.0 < 5e-6 && off.1 < 5e-6, "value {value}, expected {expected}, off by {off:?}");
    }
}

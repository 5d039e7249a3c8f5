//! The relations where a matrix of all pixel pairs would take 4 GiB in f32 (SKD over 128 x 256 pixels) or 4 GiB over a
//! batch (CIRKD, 4 images of 64 x 128). Alone in its process, so that the memory it reports is its own.

mod common;

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use common::{map, process_mib, relative, say, value_and_grad};
use segdistill_losses::{
    MemoryContrast, MiniBatchContrast, PairSimilarity, Result, cirkd_mini_batch, memory_contrast, pair_similarity,
};
use segdistill_ops::testing::{random_f64, relative_error};

type Loss<'a> = &'a dyn Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>;

/// Means over pixels or pairs of pixels, and softmaxes over pixels: with `r` copies of every pixel, wherever they lie in
/// their image, the value is that of one, and each copy has an `r`-th of the gradient. A map of 256 pixels is small
/// enough for f64.
fn check(name: &str, [n, d, h, w]: [usize; 4], d_teacher: usize, loss: Loss<'_>) {
    let (m, small) = (h * w, 256);
    // An odd factor permutes the residues of a power of two: each small pixel is taken equally often, scattered.
    let source: Vec<u32> = (0..m).map(|p| ((p * 4237 + p / small * 31) % small) as u32).collect();
    let source = Tensor::from_vec(source, m, &Device::Cpu).unwrap();
    let enlarged = |t: &Tensor| {
        let (n, d, ..) = t.dims4().unwrap();
        t.index_select(&source, 3).unwrap().reshape((n, d, h, w)).unwrap()
    };
    let [student, teacher] = [("student", d), ("teacher", d_teacher)]
        .map(|(k, d)| random_f64(1, k, &[n, d, 1, small]).to_dtype(DType::F32).unwrap());
    let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
    let one = map(n, 1, small, |_, _, _| 1);
    let (expected, expected_grad) = value_and_grad(&wide(&student), 1.0, |s| loss(s, &wide(&teacher), &one));
    let expected_grad = enlarged(&(expected_grad / (m / small) as f64).unwrap());

    let (student, teacher, valid) = (enlarged(&student), enlarged(&teacher), map(n, h, w, |_, _, _| 1));
    let before = process_mib("VmRSS");
    let started = Instant::now();
    let (value, grad) = value_and_grad(&student, 1.0, |s| loss(s, &teacher, &valid));
    let time = started.elapsed();
    if let (Some(before), Some(peak)) = (before, process_mib("VmHWM")) {
        // The high-water mark never falls: if anything it counts too much.
        say(&format!("{name}: {time:.1?}, peak memory {peak} MiB, {before} MiB before"));
        assert!(peak.saturating_sub(before) < 1024, "{name}: {peak} MiB, {before} MiB before");
    }
    let off = (relative(value, expected), relative_error(&grad, &expected_grad).unwrap());
    say(&format!("    value off by {:.1e}, gradient by {:.1e}", off.0, off.1));
    assert!(off.0 < 1e-5 && off.1 < 1e-5, "{name}: value {value}, expected {expected}, off by {off:?}");
}

#[test]
fn full_shapes_fit_a_gibibyte() {
    check("pair_similarity", [1, 128, 128, 256], 256, &|s, t, v| pair_similarity(s, t, v, &PairSimilarity::default()));
    let bank = random_f64(2, "bank", &[4104, 256]);
    let bank = bank.broadcast_div(&bank.sqr().unwrap().sum_keepdim(1).unwrap().sqrt().unwrap()).unwrap();
    check("memory_contrast", [4, 256, 64, 128], 256, &|s, t, v| {
        memory_contrast(s, t, &bank.to_dtype(s.dtype())?, v, &MemoryContrast::cirkd())
    });
    if std::env::var("SEGDISTILL_SLOW_TESTS").as_deref() == Ok("1") {
        check("cirkd_mini_batch", [4, 128, 64, 128], 256, &|s, t, v| {
            cirkd_mini_batch(s, t, v, &MiniBatchContrast::cirkd())
        });
    } else {
        say("skipped: cirkd_mini_batch of 4 x 64 x 128 (set SEGDISTILL_SLOW_TESTS=1 for half a minute)");
    }
}

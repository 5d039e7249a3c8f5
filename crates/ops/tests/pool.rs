//! Pooling against PyTorch, naive loops, finite differences and laws.

mod reference;

use candle_core::{DType, Device, Tensor};
use reference::{assert_consumers_add, assert_threads_agree, check_case, check_gradients, fixture, value_and_gradient};
use segdistill_ops::testing::{assert_close, devices, random_f64};
use segdistill_ops::{OpsError, Pool2dConfig, adaptive_avg_pool2d, avg_pool2d, max_pool2d};

fn square(kernel: usize, stride: usize, padding: usize, ceil_mode: bool) -> Pool2dConfig {
    Pool2dConfig { kernel: [kernel; 2], stride: [stride; 2], padding: [padding; 2], ceil_mode }
}

fn skew(ceil_mode: bool) -> Pool2dConfig {
    Pool2dConfig { kernel: [3, 2], stride: [2, 3], padding: [1, 1], ceil_mode }
}

#[test]
fn pooling_equals_pytorch() {
    let cases = fixture("pool");
    // Maxima are copied, their gradients summed from at most nine; means are formed in f64 and rounded once.
    let exact = 1e-6;
    for (name, cfg) in [
        ("stem", square(3, 2, 1, false)),
        ("ceil", square(3, 2, 0, true)),
        ("skew_ceil", skew(true)),
        ("skew", skew(false)),
    ] {
        check_case(&cases, &format!("max_{name}"), exact, |x| max_pool2d(x, cfg));
        check_case(&cases, &format!("avg_{name}"), exact, |x| avg_pool2d(x, cfg));
    }
    check_case(&cases, "max_ties", exact, |x| max_pool2d(x, square(3, 1, 1, false)));
    for out_hw in [[1, 1], [2, 3], [6, 6], [7, 10], [9, 13]] {
        let name = format!("adaptive_{}x{}", out_hw[0], out_hw[1]);
        check_case(&cases, &name, exact, |x| adaptive_avg_pool2d(x, out_hw));
    }
}

/// Windows by the definition: every output reads its rectangle of the padded map.
fn naive(x: &Tensor, cfg: Pool2dConfig, max: bool) -> Tensor {
    let (n, c, h, w) = x.dims4().unwrap();
    let [oh, ow] = cfg.output_hw([h, w]).unwrap();
    let x = x.flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let mut out = Vec::new();
    for plane in x.chunks(h * w) {
        for oy in 0..oh as isize {
            for ox in 0..ow as isize {
                let (mut best, mut sum, mut count) = (f64::NEG_INFINITY, 0.0, 0);
                for ky in 0..cfg.kernel[0] as isize {
                    for kx in 0..cfg.kernel[1] as isize {
                        let y = oy * cfg.stride[0] as isize - cfg.padding[0] as isize + ky;
                        let x = ox * cfg.stride[1] as isize - cfg.padding[1] as isize + kx;
                        let beyond = y >= (h + cfg.padding[0]) as isize || x >= (w + cfg.padding[1]) as isize;
                        count += usize::from(!beyond);
                        if (0..h as isize).contains(&y) && (0..w as isize).contains(&x) {
                            let v = plane[y as usize * w + x as usize];
                            best = best.max(v);
                            sum += v;
                        }
                    }
                }
                out.push(if max { best } else { sum / count as f64 });
            }
        }
    }
    Tensor::from_vec(out, (n, c, oh, ow), &Device::Cpu).unwrap()
}

#[test]
fn pooling_equals_a_naive_loop_for_many_geometries() {
    let mut n_cases = 0;
    for (h, w) in [(1, 1), (2, 5), (7, 8), (9, 6), (16, 13)] {
        let x = random_f64(1, "pool", &[2, 3, h, w]);
        for kernel in [[1, 1], [2, 2], [3, 3], [2, 5], [4, 3]] {
            for stride in [[1, 1], [2, 2], [3, 1], [2, 4]] {
                for padding in [[0, 0], [1, 1], [1, 2], [2, 1]] {
                    for ceil_mode in [false, true] {
                        let cfg = Pool2dConfig { kernel, stride, padding, ceil_mode };
                        if cfg.output_hw([h, w]).is_none() {
                            assert!(max_pool2d(&x, cfg).is_err() && avg_pool2d(&x, cfg).is_err(), "{cfg:?}");
                            continue;
                        }
                        let [largest, mean] = [true, false].map(|max| naive(&x, cfg, max));
                        for device in devices() {
                            let x = x.to_device(&device).unwrap();
                            assert_close(&max_pool2d(&x, cfg).unwrap(), &largest, 0.0, "copies");
                            assert_close(&avg_pool2d(&x, cfg).unwrap(), &mean, 1e-14, "order of sums");
                        }
                        n_cases += 1;
                    }
                }
            }
        }
    }
    assert!(n_cases > 150, "{n_cases}");
}

#[test]
fn gradients_are_central_differences() -> segdistill_ops::Result<()> {
    let x = [random_f64(2, "pool", &[2, 2, 9, 11])];
    // Values of a random map differ by far more than the step, so that no maximum changes hands.
    for cfg in [square(3, 2, 1, false), square(2, 2, 0, true), skew(true), square(3, 1, 1, false)] {
        check_gradients(&x, |t| max_pool2d(&t[0], cfg), 60, 1e-8)?;
        check_gradients(&x, |t| avg_pool2d(&t[0], cfg), 60, 1e-8)?;
    }
    for out_hw in [[1, 1], [4, 3], [9, 11], [12, 13]] {
        check_gradients(&x, |t| adaptive_avg_pool2d(&t[0], out_hw), 60, 1e-8)?;
    }
    Ok(())
}

#[test]
fn the_first_maximum_takes_the_gradient_and_nan_wins() {
    let cfg = square(2, 2, 0, false);
    for device in devices() {
        let one = Tensor::ones((1, 1, 1, 1), DType::F64, &device).unwrap();
        let gradient = |values: [f64; 4]| {
            let x = Tensor::from_slice(&values, (1, 1, 2, 2), &device).unwrap();
            let (y, dx) = value_and_gradient(&x, &one, |x| max_pool2d(x, cfg));
            let y = y.flatten_all().unwrap().to_vec1::<f64>().unwrap()[0];
            (y, dx.flatten_all().unwrap().to_vec1::<f64>().unwrap())
        };
        assert_eq!(gradient([1.0, 4.0, 4.0, 4.0]), (4.0, vec![0.0, 1.0, 0.0, 0.0]));
        let low = f64::NEG_INFINITY;
        assert_eq!(gradient([low; 4]), (low, vec![1.0, 0.0, 0.0, 0.0]));
        let (y, dx) = gradient([f64::NAN, 9.0, f64::NAN, 1.0]);
        assert!(y.is_nan());
        assert_eq!(dx, [0.0, 0.0, 1.0, 0.0]);
    }
}

#[test]
fn laws_hold() {
    assert_consumers_add(&[2, 3, 9, 7], |x| max_pool2d(x, square(3, 2, 1, false)));
    assert_consumers_add(&[2, 3, 9, 7], |x| avg_pool2d(x, square(3, 2, 1, true)));
    assert_consumers_add(&[2, 3, 9, 7], |x| adaptive_avg_pool2d(x, [2, 3]));
    assert_threads_agree(&[3, 5, 45, 60], |x| max_pool2d(x, square(3, 2, 1, false)));
    assert_threads_agree(&[3, 5, 45, 60], |x| avg_pool2d(x, square(3, 2, 1, false)));
    assert_threads_agree(&[3, 5, 45, 60], |x| adaptive_avg_pool2d(x, [1, 1]));
    // A batch equals its items, and a strided view its contiguous copy.
    let x = random_f64(3, "pool", &[2, 3, 8, 9]);
    let whole = max_pool2d(&x, skew(true)).unwrap();
    let item = max_pool2d(&x.narrow(0, 1, 1).unwrap(), skew(true)).unwrap();
    assert_close(&whole.narrow(0, 1, 1).unwrap(), &item, 0.0, "copies");
    let turned = x.transpose(2, 3).unwrap();
    let copied = turned.contiguous().unwrap();
    let cfg = square(3, 2, 1, false);
    assert_close(&avg_pool2d(&turned, cfg).unwrap(), &avg_pool2d(&copied, cfg).unwrap(), 0.0, "same numbers");
}

#[test]
fn the_resnet_stem_keeps_its_known_sizes() {
    let stem = square(3, 2, 1, false);
    assert_eq!(stem.output_hw([45, 60]), Some([23, 30]));
    assert_eq!(stem.output_hw([180, 240]), Some([90, 120]));
    assert_eq!(square(2, 2, 0, true).output_hw([45, 60]), Some([23, 30]));
    // Rounding up would start a third window in the trailing padding.
    assert_eq!(square(2, 2, 1, true).output_hw([3, 3]), Some([2, 2]));
}

#[test]
fn misuse_is_refused() {
    let x = random_f64(4, "pool", &[1, 1, 6, 6]);
    let shape = |r: segdistill_ops::Result<Tensor>| matches!(r, Err(OpsError::Shape { .. }));
    let config = |r: segdistill_ops::Result<Tensor>| matches!(r, Err(OpsError::Config { .. }));
    assert!(shape(max_pool2d(&x.flatten_all().unwrap(), square(2, 2, 0, false))));
    assert!(shape(max_pool2d(&x, square(7, 2, 0, false))));
    assert!(shape(max_pool2d(&x, square(3, 2, 2, false))), "padding beyond half the kernel");
    assert!(shape(avg_pool2d(&x, square(3, 0, 1, false))), "stride 0");
    assert!(config(adaptive_avg_pool2d(&x, [0, 1])));
    assert!(config(max_pool2d(&x.to_dtype(DType::U8).unwrap(), square(2, 2, 0, false))));
    let text = max_pool2d(&x, square(7, 2, 0, false)).unwrap_err().to_string();
    assert!(text.contains("[7, 7]") && text.contains("[6, 6]") && text.contains("hint"), "{text}");
}

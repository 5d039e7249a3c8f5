//! Resizing against PyTorch, a naive loop, finite differences and laws.

mod reference;

use candle_core::{DType, Device, Tensor};
use reference::{assert_consumers_add, assert_threads_agree, check_case, check_gradients, fixture};
use segdistill_ops::testing::{assert_close, devices, random_f64};
use segdistill_ops::{OpsError, resize_bilinear, resize_nearest};

const SIZES: [([usize; 2], [usize; 2]); 6] = [
    ([7, 10], [23, 31]),
    ([13, 17], [5, 6]),
    ([12, 15], [30, 40]),
    ([1, 1], [6, 8]),
    ([9, 9], [1, 1]),
    ([5, 4], [9, 2]),
];

#[test]
fn resizing_equals_pytorch() {
    let cases = fixture("resize");
    let name = |[h, w]: [usize; 2], [oh, ow]: [usize; 2]| format!("{h}x{w}_{oh}x{ow}");
    for (hw, out_hw) in SIZES {
        for (corners, suffix) in [(false, "centres"), (true, "corners")] {
            let case = format!("bilinear_{}_{suffix}", name(hw, out_hw));
            // A gradient sums up to 48 terms of either sign.
            check_case(&cases, &case, 4e-6, |x| resize_bilinear(x, out_hw, corners));
        }
    }
    for (hw, out_hw) in SIZES.into_iter().chain([([2, 3], [82, 5])]) {
        check_case(&cases, &format!("nearest_{}", name(hw, out_hw)), 4e-6, |x| resize_nearest(x, out_hw));
    }
}

/// Every output pixel from four input pixels, by the definition.
fn naive(x: &Tensor, [oh, ow]: [usize; 2], corners: bool) -> Tensor {
    let (n, c, h, w) = x.dims4().unwrap();
    let values = x.flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let position = |o: usize, len: usize, out: usize| {
        if corners {
            if out == 1 { 0.0 } else { o as f64 * (len - 1) as f64 / (out - 1) as f64 }
        } else {
            ((o as f64 + 0.5) * len as f64 / out as f64 - 0.5).clamp(0.0, (len - 1) as f64)
        }
    };
    let mut result = Vec::new();
    for plane in values.chunks(h * w) {
        for oy in 0..oh {
            for ox in 0..ow {
                let (y, x) = (position(oy, h, oh), position(ox, w, ow));
                let mut sum = 0.0;
                for i in 0..h {
                    for j in 0..w {
                        let weight = (1.0 - (y - i as f64).abs()).max(0.0) * (1.0 - (x - j as f64).abs()).max(0.0);
                        sum += weight * plane[i * w + j];
                    }
                }
                result.push(sum);
            }
        }
    }
    Tensor::from_vec(result, (n, c, oh, ow), &Device::Cpu).unwrap()
}

#[test]
fn bilinear_equals_a_naive_loop_for_every_small_factor() {
    for (h, w) in [(1, 1), (1, 4), (3, 2), (5, 7)] {
        let x = random_f64(1, "resize", &[2, 2, h, w]);
        for oh in [1, 2, 3, 4, 7, 11] {
            for ow in [1, 2, 5, 6, 13] {
                for corners in [false, true] {
                    let expected = naive(&x, [oh, ow], corners);
                    for device in devices() {
                        let found = resize_bilinear(&x.to_device(&device).unwrap(), [oh, ow], corners).unwrap();
                        assert_close(&found, &expected, 1e-13, "f64 rounding");
                    }
                }
            }
        }
    }
}

#[test]
fn nearest_equals_whole_number_arithmetic_where_the_factor_is_whole() {
    let (h, w) = (5, 6);
    let x = random_f64(2, "resize", &[1, 3, h, w]);
    for (oh, ow) in [(10, 18), (20, 6), (5, 3), (1, 2)] {
        let rows = Tensor::from_vec((0..oh).map(|o| (o * h / oh) as u32).collect(), oh, &Device::Cpu).unwrap();
        let cols = Tensor::from_vec((0..ow).map(|o| (o * w / ow) as u32).collect(), ow, &Device::Cpu).unwrap();
        let expected = x.index_select(&rows, 2).unwrap().index_select(&cols, 3).unwrap();
        for device in devices() {
            let found = resize_nearest(&x.to_device(&device).unwrap(), [oh, ow]).unwrap();
            assert_close(&found, &expected, 0.0, "copies");
        }
    }
}

#[test]
fn gradients_are_central_differences() -> segdistill_ops::Result<()> {
    let x = [random_f64(3, "resize", &[2, 2, 6, 7])];
    for out_hw in [[11, 9], [24, 28], [4, 3], [1, 1], [6, 20], [3, 7]] {
        for corners in [false, true] {
            check_gradients(&x, |t| resize_bilinear(&t[0], out_hw, corners), 84, 1e-8)?;
        }
        check_gradients(&x, |t| resize_nearest(&t[0], out_hw), 84, 1e-8)?;
    }
    Ok(())
}

#[test]
fn laws_hold() {
    for out_hw in [[9, 14], [3, 2]] {
        assert_consumers_add(&[2, 3, 6, 7], |x| resize_bilinear(x, out_hw, false));
        assert_consumers_add(&[2, 3, 6, 7], |x| resize_bilinear(x, out_hw, true));
        assert_consumers_add(&[2, 3, 6, 7], |x| resize_nearest(x, out_hw));
    }
    for out_hw in [[90, 120], [11, 13]] {
        assert_threads_agree(&[2, 3, 23, 30], |x| resize_bilinear(x, out_hw, false));
        assert_threads_agree(&[2, 3, 23, 30], |x| resize_nearest(x, out_hw));
    }
    // A constant stays constant, a ramp stays a ramp between the corners.
    let ones = Tensor::ones((1, 2, 5, 7), DType::F64, &Device::Cpu).unwrap();
    for corners in [false, true] {
        let found = resize_bilinear(&ones, [13, 4], corners).unwrap();
        assert_close(&found, &found.ones_like().unwrap(), 1e-15, "weights sum to 1");
    }
    let ramp = |n: usize| {
        let values = (0..n).map(|i| i as f64 / (n - 1) as f64).collect();
        Tensor::from_vec(values, (1, 1, 1, n), &Device::Cpu).unwrap()
    };
    assert_close(&resize_bilinear(&ramp(6), [1, 16], true).unwrap(), &ramp(16), 1e-14, "linear maps stay linear");
    // A strided view equals its contiguous copy (candle's own kernel reads past a narrowed view).
    let x = random_f64(4, "resize", &[2, 3, 8, 9]);
    let view = x.narrow(2, 2, 5).unwrap().transpose(2, 3).unwrap();
    let copy = view.contiguous().unwrap();
    let both = [&view, &copy].map(|x| resize_bilinear(x, [4, 11], false).unwrap());
    assert_close(&both[0], &both[1], 0.0, "same numbers");
}

#[test]
fn the_same_size_returns_the_input() {
    let x = random_f64(5, "resize", &[1, 2, 4, 5]);
    for same in [
        resize_bilinear(&x, [4, 5], false).unwrap(),
        resize_bilinear(&x, [4, 5], true).unwrap(),
        resize_nearest(&x, [4, 5]).unwrap(),
    ] {
        assert_eq!(same.id(), x.id());
    }
}

#[test]
fn misuse_is_refused() {
    let x = random_f64(6, "resize", &[1, 2, 4, 5]);
    assert!(matches!(resize_bilinear(&x.flatten_all().unwrap(), [2, 2], false), Err(OpsError::Shape { .. })));
    assert!(matches!(resize_bilinear(&x, [0, 2], false), Err(OpsError::Config { .. })));
    assert!(matches!(resize_nearest(&x, [2, 0]), Err(OpsError::Config { .. })));
    assert!(matches!(resize_nearest(&x.to_dtype(DType::U8).unwrap(), [2, 2]), Err(OpsError::Config { .. })));
}

//! Cross entropy against PyTorch, a naive loop, finite differences and its laws.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::{as_ops, assert_same_on_all_pools, bytes, elements, fixture, map, random_mask, scalar, value_and_grad};
use segdistill_losses::{CrossEntropy, LossError, cross_entropy, valid_mask};
use segdistill_ops::testing::{assert_close, check_gradient, random_f64, relative_error};

const VOID: u8 = 255;

fn weighted(weights: &[f64]) -> CrossEntropy {
    CrossEntropy { class_weights: Some(weights.to_vec()), ..CrossEntropy::default() }
}

fn labels(n: usize, c: usize, h: usize, w: usize) -> Tensor {
    map(n, h, w, |i, y, x| ((i * 5 + y * 3 + x * 7 + y * x) % c) as u8)
}

#[test]
fn equals_pytorch() {
    let cases = fixture("cross_entropy");
    assert_eq!(cases.len(), 10);
    for (name, case) in &cases {
        let cfg = CrossEntropy {
            class_weights: case.get("class_weights").map(elements),
            label_smoothing: scalar(&case["label_smoothing"]),
        };
        let valid = valid_mask(&case["labels"], VOID).unwrap();
        // f32 logits of 1e4 carry an absolute error of 5e-4 from their own rounding, the others 1e-7.
        let f32_tolerance = if name == "large_logits" { 1e-3 } else { 2e-6 };
        for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, f32_tolerance)] {
            let logits = case["logits"].to_dtype(dtype).unwrap();
            let (value, grad) = value_and_grad(&logits, 3.0, |z| cross_entropy(z, &case["labels"], &valid, &cfg));
            let expected = scalar(&case["loss"]);
            assert!((value - expected).abs() <= tolerance * expected.max(1.0), "{name} {dtype:?}: {value}, {expected}");
            assert_close(&grad, &case["grad_of_3_loss"], tolerance, "rounding of the type");
        }
    }
}

/// The definition, pixel by pixel.
fn naive(logits: &Tensor, labels: &Tensor, valid: &Tensor, weights: &[f64]) -> (f64, Vec<f64>) {
    let (n, c, h, w) = logits.dims4().unwrap();
    let m = h * w;
    let (z, labels, valid) = (elements(logits), bytes(labels), bytes(valid));
    let (mut sum, mut total, mut grad) = (0.0, 0.0, vec![0.0; z.len()]);
    for pixel in (0..n * m).filter(|&p| valid[p] == 1) {
        let at = |class: usize| (pixel / m * c + class) * m + pixel % m;
        let y = usize::from(labels[pixel]);
        let partition: f64 = (0..c).map(|class| z[at(class)].exp()).sum();
        sum += weights[y] * (partition.ln() - z[at(y)]);
        total += weights[y];
        for class in 0..c {
            grad[at(class)] = weights[y] * (z[at(class)].exp() / partition - f64::from(u8::from(class == y)));
        }
    }
    (sum / total, grad.into_iter().map(|g| g / total).collect())
}

#[test]
fn equals_a_naive_loop() {
    // The last size has more pixels than one task takes.
    for (n, c, h, w) in [(1, 2, 1, 1), (2, 3, 4, 5), (3, 11, 7, 6), (2, 4, 61, 70)] {
        let logits = (random_f64(1, "logits", &[n, c, h, w]) * 6.0).unwrap();
        let valid = if h == 1 { map(n, h, w, |_, _, _| 1) } else { random_mask(3, n, h, w, 0.7) };
        let weights: Vec<f64> = (0..c).map(|k| 0.25 + 0.5 * k as f64).collect();
        let labels = labels(n, c, h, w);
        let (value, grad) = value_and_grad(&logits, 1.0, |z| cross_entropy(z, &labels, &valid, &weighted(&weights)));
        let (expected, expected_grad) = naive(&logits, &labels, &valid, &weights);
        assert!((value - expected).abs() < 1e-12 * expected, "{value}, {expected}");
        for (found, expected) in elements(&grad).iter().zip(&expected_grad) {
            assert!((found - expected).abs() < 1e-13, "{found}, {expected}");
        }
    }
}

#[test]
fn gradient_equals_central_differences() {
    let (n, c, h, w) = (2, 5, 4, 3);
    let (labels, valid) = (labels(n, c, h, w), random_mask(4, n, h, w, 0.7));
    let cfg = weighted(&[0.5, 1.0, 2.0, 0.0, 1.5]);
    let logits = (random_f64(2, "logits", &[n, c, h, w]) * 3.0).unwrap();
    check_gradient(
        &[logits],
        // Times the pixels: elements of order 1, so that the tolerance is a relative one.
        |z| Ok((as_ops(cross_entropy(&z[0], &labels, &valid, &cfg))? * (n * h * w) as f64)?),
        1000,
        1e-8,
    )
    .unwrap();
}

#[test]
fn equal_logits_cost_the_logarithm_of_the_classes() {
    let logits = Tensor::full(3.5f64, (2, 19, 3, 3), &Device::Cpu).unwrap();
    let labels = labels(2, 19, 3, 3);
    let valid = valid_mask(&labels, VOID).unwrap();
    let value = scalar(&cross_entropy(&logits, &labels, &valid, &CrossEntropy::default()).unwrap());
    assert!((value - 19f64.ln()).abs() < 1e-14);
}

#[test]
fn void_pixels_move_nothing_and_their_labels_are_not_read() {
    let (n, c, h, w) = (2, 6, 5, 7);
    let logits = random_f64(5, "logits", &[n, c, h, w]);
    let valid = random_mask(6, n, h, w, 0.6);
    let clean = labels(n, c, h, w);
    let hidden: Vec<u8> = bytes(&clean).iter().zip(bytes(&valid)).map(|(&y, v)| if v == 1 { y } else { 77 }).collect();
    let hidden = Tensor::from_vec(hidden, (n, h, w), &Device::Cpu).unwrap();
    let spoiled = valid
        .reshape((n, 1, h, w))
        .and_then(|v| {
            v.broadcast_as((n, c, h, w))?.contiguous()?.where_cond(&logits, &(logits.zeros_like()? + f64::NAN)?)
        })
        .unwrap();
    for dtype in [DType::F64, DType::F32] {
        let run = |z: &Tensor, y: &Tensor| {
            value_and_grad(&z.to_dtype(dtype).unwrap(), 1.0, |z| cross_entropy(z, y, &valid, &CrossEntropy::default()))
        };
        let (value, grad) = run(&logits, &clean);
        let (same_value, same_grad) = run(&spoiled, &hidden);
        assert!(value > 0.5);
        assert_eq!(value, same_value);
        assert_eq!(elements(&grad), elements(&same_grad));
        let m = h * w;
        for (k, g) in elements(&grad).iter().enumerate() {
            let counted = bytes(&valid)[k / (c * m) * m + k % m] == 1;
            assert_eq!(*g != 0.0, counted, "element {k}");
        }
    }
}

#[test]
fn nothing_valid_is_zero_with_zero_gradient() {
    let logits = random_f64(7, "logits", &[2, 3, 4, 4]);
    let none = map(2, 4, 4, |_, _, _| 0);
    let void = map(2, 4, 4, |_, _, _| VOID);
    let (value, grad) = value_and_grad(&logits, 1.0, |z| cross_entropy(z, &void, &none, &CrossEntropy::default()));
    assert_eq!(value, 0.0);
    assert!(elements(&grad).iter().all(|&g| g == 0.0));
    // The same where every counted pixel weighs nothing.
    let all = map(2, 4, 4, |_, _, _| 1);
    let ones = map(2, 4, 4, |_, _, _| 1);
    let (value, grad) = value_and_grad(&logits, 1.0, |z| cross_entropy(z, &ones, &all, &weighted(&[1.0, 0.0, 1.0])));
    assert_eq!(value, 0.0);
    assert!(elements(&grad).iter().all(|&g| g == 0.0));
}

#[test]
fn a_batch_is_the_weighted_mean_of_its_items() {
    let (n, c, h, w) = (3, 4, 5, 6);
    let logits = (random_f64(8, "logits", &[n, c, h, w]) * 4.0).unwrap();
    let (labels, valid) = (labels(n, c, h, w), random_mask(9, n, h, w, 0.5));
    let weights = [0.2, 1.0, 3.0, 0.7];
    let (mut sum, mut total) = (0.0, 0.0);
    for i in 0..n {
        let item = |t: &Tensor| t.narrow(0, i, 1).unwrap();
        let value = scalar(&cross_entropy(&item(&logits), &item(&labels), &item(&valid), &weighted(&weights)).unwrap());
        let weight: f64 = bytes(&item(&labels))
            .iter()
            .zip(bytes(&item(&valid)))
            .map(|(&y, v)| weights[usize::from(y)] * f64::from(v))
            .sum();
        sum += value * weight;
        total += weight;
    }
    let value = scalar(&cross_entropy(&logits, &labels, &valid, &weighted(&weights)).unwrap());
    assert!((value - sum / total).abs() < 1e-13);
}

#[test]
fn permuting_classes_permutes_the_gradient() {
    let (n, c, h, w) = (2, 5, 3, 4);
    let order = [3u32, 0, 4, 1, 2]; // new class k was class order[k]
    let logits = random_f64(10, "logits", &[n, c, h, w]);
    let (labels, valid) = (labels(n, c, h, w), random_mask(11, n, h, w, 0.8));
    let weights = [0.5, 1.0, 1.5, 2.0, 2.5];
    let index = Tensor::new(&order, &Device::Cpu).unwrap();
    let moved_labels: Vec<u8> =
        bytes(&labels).iter().map(|&y| order.iter().position(|&o| o == u32::from(y)).unwrap() as u8).collect();
    let moved_labels = Tensor::from_vec(moved_labels, (n, h, w), &Device::Cpu).unwrap();
    let moved_weights = order.map(|k| weights[k as usize]);
    let (value, grad) = value_and_grad(&logits, 1.0, |z| cross_entropy(z, &labels, &valid, &weighted(&weights)));
    let moved_logits = logits.index_select(&index, 1).unwrap();
    let (moved_value, moved_grad) =
        value_and_grad(&moved_logits, 1.0, |z| cross_entropy(z, &moved_labels, &valid, &weighted(&moved_weights)));
    assert!((value - moved_value).abs() < 1e-14);
    assert_close(&moved_grad, &grad.index_select(&index, 1).unwrap(), 1e-15, "order of a sum of 5");
    let changed = (&moved_grad - &grad).unwrap().abs().unwrap().sum_all().unwrap();
    assert!(scalar(&changed) > 1e-2, "the permutation is seen");
}

#[test]
fn a_pixels_gradient_sums_to_zero_over_classes() {
    let (n, c, h, w) = (2, 7, 4, 4);
    let (labels, valid) = (labels(n, c, h, w), random_mask(12, n, h, w, 0.8));
    let logits = (random_f64(13, "logits", &[n, c, h, w]) * 8.0).unwrap();
    let (_, grad) = value_and_grad(&logits, 1.0, |z| cross_entropy(z, &labels, &valid, &CrossEntropy::default()));
    assert!(elements(&grad.sum(1).unwrap()).iter().all(|s| s.abs() < 1e-16));
}

#[test]
fn layout_of_the_logits_does_not_matter() {
    let (n, c, h, w) = (2, 3, 4, 5);
    let nhwc = random_f64(14, "logits", &[n + 1, h, w, c]);
    let (labels, valid) = (labels(n, c, h, w), random_mask(15, n, h, w, 0.8));
    let strided = |z: &Tensor| z.permute((0, 3, 1, 2)).unwrap().narrow(0, 1, n).unwrap();
    let copy = strided(&nhwc).force_contiguous().unwrap();
    let cfg = CrossEntropy::default();
    let (value, grad) = value_and_grad(&copy, 1.0, |z| cross_entropy(z, &labels, &valid, &cfg));
    let (other_value, other_grad) = value_and_grad(&nhwc, 1.0, |z| cross_entropy(&strided(z), &labels, &valid, &cfg));
    assert_eq!(value, other_value);
    assert_eq!(elements(&grad), elements(&strided(&other_grad)));
    // Contiguous, but not at the start of its storage.
    let tail = Tensor::cat(&[&copy, &copy], 0).unwrap();
    let (value, _) = value_and_grad(&tail, 1.0, |z| cross_entropy(&z.narrow(0, n, n).unwrap(), &labels, &valid, &cfg));
    assert_eq!(value, other_value);
}

#[test]
fn thread_count_changes_no_bit() {
    let (n, c, h, w) = (2, 11, 100, 121);
    let logits = (random_f64(16, "logits", &[n, c, h, w]) * 5.0).unwrap().to_dtype(DType::F32).unwrap();
    let (labels, valid) = (labels(n, c, h, w), random_mask(17, n, h, w, 0.9));
    assert_same_on_all_pools(|| {
        value_and_grad(&logits, 1.0, |z| cross_entropy(z, &labels, &valid, &CrossEntropy::default()))
    });
}

#[test]
fn a_label_that_is_no_class_is_named_with_its_place() {
    let logits = random_f64(18, "logits", &[2, 11, 3, 4]);
    let valid = map(2, 3, 4, |_, _, _| 1);
    let wrong = map(2, 3, 4, |i, y, x| if (i, y, x) == (1, 2, 3) { 11 } else { 10 });
    let error = cross_entropy(&logits, &wrong, &valid, &CrossEntropy::default()).unwrap_err();
    assert!(matches!(error, LossError::Label { image: 1, row: 2, column: 3, value: 11, n_classes: 11 }));
    assert!(error.to_string().starts_with("label 11 at row 2, column 3 of image 1, expected 0..11\n  hint: "));
}

#[test]
fn what_does_not_fit_is_refused() {
    let logits = random_f64(19, "logits", &[2, 3, 4, 5]);
    let (good, valid) = (labels(2, 3, 4, 5), map(2, 4, 5, |_, _, _| 1));
    let default = CrossEntropy::default();
    let refused = |z: &Tensor, y: &Tensor, v: &Tensor, cfg: &CrossEntropy| cross_entropy(z, y, v, cfg).unwrap_err();
    let turned = labels(2, 3, 5, 4);
    let text = refused(&logits, &turned, &valid, &default).to_string();
    assert!(text.contains("labels_nhw [2, 5, 4]") && text.contains("[2, 4, 5]"), "{text}");
    assert!(matches!(refused(&logits, &good, &turned, &default), LossError::Shape { .. }));
    assert!(matches!(refused(&logits.get(0).unwrap(), &good, &valid, &default), LossError::Shape { .. }));
    assert!(matches!(refused(&logits.to_dtype(DType::F16).unwrap(), &good, &valid, &default), LossError::DType { .. }));
    let wide = good.to_dtype(DType::U32).unwrap();
    assert!(matches!(
        refused(&logits, &wide, &valid, &default),
        LossError::DType { tensor: "labels_nhw", found: DType::U32, .. }
    ));
    let no_mask = map(2, 4, 5, |i, y, x| if (i, y, x) == (0, 3, 1) { 2 } else { 1 });
    assert!(matches!(
        refused(&logits, &good, &no_mask, &default),
        LossError::Mask { image: 0, row: 3, column: 1, value: 2 }
    ));
    for (weights, part) in [
        (vec![1.0; 2], "has 2 weights, expected 3"),
        (vec![1.0, -1.0, 1.0], "class_weights[1] is -1"),
        (vec![1.0, 1.0, f64::NAN], "class_weights[2] is NaN"),
    ] {
        let text = refused(&logits, &good, &valid, &weighted(&weights)).to_string();
        assert!(text.contains(part) && text.contains("hint"), "{text}");
    }
}

/// A smoothed target is a mean of targets, and cross entropy is linear in its target.
#[test]
fn label_smoothing_is_the_mean_of_all_labels() {
    let (n, c, h, w) = (2, 5, 41, 53);
    let smoothing = 0.2;
    let smoothed = CrossEntropy { label_smoothing: smoothing, ..CrossEntropy::default() };
    for dtype in [DType::F64, DType::F32] {
        let logits = (random_f64(20, "logits", &[n, c, h, w]) * 3.0).unwrap().to_dtype(dtype).unwrap();
        let (labels, valid) = (labels(n, c, h, w), random_mask(21, n, h, w, 0.7));
        let plain = |labels: &Tensor| {
            value_and_grad(&logits, 1.0, |z| cross_entropy(z, labels, &valid, &CrossEntropy::default()))
        };
        let (value, grad) = value_and_grad(&logits, 1.0, |z| cross_entropy(z, &labels, &valid, &smoothed));
        let (mut expected, own) = plain(&labels);
        expected *= 1.0 - smoothing;
        let mut expected_grad = (own * (1.0 - smoothing)).unwrap();
        for class in 0..c {
            let (value, grad) = plain(&map(n, h, w, |_, _, _| class as u8));
            expected += smoothing / c as f64 * value;
            expected_grad = (expected_grad + (grad * (smoothing / c as f64)).unwrap()).unwrap();
        }
        let tolerance = if dtype == DType::F64 { 1e-13 } else { 1e-5 };
        assert!((value - expected).abs() < tolerance * expected, "{value}, {expected}");
        assert!(relative_error(&grad, &expected_grad).unwrap() < tolerance);
    }
}

#[test]
fn label_smoothing_passes_central_differences_and_ignores_void() {
    let (n, c, h, w) = (2, 4, 3, 5);
    let cfg = CrossEntropy { label_smoothing: 0.3, ..weighted(&[0.5, 0.0, 2.0, 1.0]) };
    let (labels, valid) = (labels(n, c, h, w), random_mask(22, n, h, w, 0.6));
    let logits = (random_f64(23, "logits", &[n, c, h, w]) * 4.0).unwrap();
    let loss = |z: &Tensor| cross_entropy(z, &labels, &valid, &cfg);
    check_gradient(std::slice::from_ref(&logits), |z| Ok((as_ops(loss(&z[0]))? * (n * h * w) as f64)?), 1000, 1e-8)
        .unwrap();
    let counted = valid.unsqueeze(1).unwrap().broadcast_as((n, c, h, w)).unwrap();
    let nan = Tensor::full(f64::NAN, &[n, c, h, w], &Device::Cpu).unwrap();
    let (value, grad) = value_and_grad(&logits, 1.0, loss);
    let (same, same_grad) = value_and_grad(&counted.where_cond(&logits, &nan).unwrap(), 1.0, loss);
    assert_eq!(value, same);
    assert_eq!(elements(&grad), elements(&same_grad));
    assert_same_on_all_pools(|| value_and_grad(&logits, 1.0, loss));
}

#[test]
fn a_label_smoothing_that_is_no_share_is_refused() {
    let logits = random_f64(24, "logits", &[1, 3, 2, 2]);
    let (labels, valid) = (labels(1, 3, 2, 2), map(1, 2, 2, |_, _, _| 1));
    for label_smoothing in [-0.1, 1.0, f64::NAN] {
        let cfg = CrossEntropy { label_smoothing, ..CrossEntropy::default() };
        let text = cross_entropy(&logits, &labels, &valid, &cfg).unwrap_err().to_string();
        assert!(text.starts_with(&format!("label_smoothing is {label_smoothing}")), "{text}");
    }
}

#[test]
fn non_finite_logits_are_seen_in_the_loss() {
    let (labels, valid) = (labels(1, 3, 2, 2), map(1, 2, 2, |_, _, _| 1));
    for bad in [f64::NAN, f64::INFINITY] {
        let mut values = vec![0.5; 12];
        values[5] = bad;
        let logits = Var::from_vec(values, (1, 3, 2, 2), &Device::Cpu).unwrap();
        assert!(!scalar(&cross_entropy(&logits, &labels, &valid, &CrossEntropy::default()).unwrap()).is_finite());
    }
}

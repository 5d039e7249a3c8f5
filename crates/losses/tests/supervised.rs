//! The supervised losses beside cross entropy (hardest pixels, Dice, Lovasz-softmax, binary cross entropy) against
//! PyTorch and smp, naive loops, finite differences and their laws.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::{as_ops, assert_same_on_all_pools, bytes, elements, fixture, map, random_mask, scalar, value_and_grad};
use segdistill_losses::{
    BinaryCrossEntropy, CrossEntropy, Dice, DiceNormaliser, LossError, Lovasz, LovaszClasses, Ohem, Result,
    binary_cross_entropy, cross_entropy, dice, lovasz_softmax, ohem_cross_entropy, valid_mask, with_auxiliary,
};
use segdistill_ops::testing::{assert_close, check_gradient, devices, random_f64, relative_error};

const VOID: u8 = 255;

/// A loss with its settings.
#[derive(Clone, Debug)]
enum Loss {
    Ohem(Ohem),
    Dice(Dice),
    Lovasz(Lovasz),
    Binary(BinaryCrossEntropy),
}

/// As the fixture names them; the weights are those of a case.
fn losses(weights: &[f64]) -> Vec<(&'static str, Loss)> {
    let class_weights = || Some(weights.to_vec());
    let all = DiceNormaliser::AllClasses;
    vec![
        ("ohem_threshold", Loss::Ohem(Ohem { threshold: 0.4, min_kept: 0, class_weights: None })),
        ("ohem_min_kept", Loss::Ohem(Ohem { threshold: 0.1, min_kept: 7, class_weights: class_weights() })),
        ("ohem_all", Loss::Ohem(Ohem { threshold: 0.5, min_kept: 100_000, class_weights: class_weights() })),
        ("dice", Loss::Dice(Dice::default())),
        ("dice_smp", Loss::Dice(Dice { normaliser: all, ..Dice::default() })),
        ("dice_smooth", Loss::Dice(Dice { smooth: 1.5, ..Dice::default() })),
        ("lovasz", Loss::Lovasz(Lovasz::default())),
        ("lovasz_per_image", Loss::Lovasz(Lovasz { per_image: true, ..Lovasz::default() })),
        ("lovasz_all", Loss::Lovasz(Lovasz { classes: LovaszClasses::All, ..Lovasz::default() })),
        ("bce", Loss::Binary(BinaryCrossEntropy::default())),
        (
            "bce_weights",
            Loss::Binary(BinaryCrossEntropy { positive_weights: Some(weights.iter().map(|w| 3.0 * w).collect()) }),
        ),
    ]
}

/// What the logits are compared with.
struct Truth {
    labels: Tensor,
    targets: Tensor,
    valid: Tensor,
}

impl Truth {
    /// Labels in patches, so that the last class is absent where there are many; soft targets; a share of void pixels.
    fn new(seed: u64, [n, c, h, w]: [usize; 4], keep: f64) -> Self {
        let present = if c > 3 { c - 1 } else { c };
        let labels = map(n, h, w, |i, y, x| ((i * 5 + y / 2 * 3 + x / 3 * 7 + y * x) % present) as u8);
        let targets = random_f64(seed, "targets", &[n, c, h, w]).affine(0.5, 0.5).unwrap();
        Self { labels, targets, valid: random_mask(seed, n, h, w, keep) }
    }

    fn map(&self, f: impl Fn(&Tensor) -> Tensor) -> Self {
        Self { labels: f(&self.labels), targets: f(&self.targets), valid: f(&self.valid) }
    }
}

impl Loss {
    fn of(&self, logits: &Tensor, truth: &Truth) -> Result<Tensor> {
        let Truth { labels, targets, valid } = truth;
        match self {
            Loss::Ohem(cfg) => ohem_cross_entropy(logits, labels, valid, cfg),
            Loss::Dice(cfg) => dice(logits, labels, valid, cfg),
            Loss::Lovasz(cfg) => lovasz_softmax(logits, labels, valid, cfg),
            Loss::Binary(cfg) => binary_cross_entropy(logits, &targets.to_dtype(logits.dtype()).unwrap(), valid, cfg),
        }
    }

    fn run(&self, logits: &Tensor, truth: &Truth) -> (f64, Tensor) {
        value_and_grad(logits, 1.0, |z| self.of(z, truth))
    }
}

fn weights(c: usize) -> Vec<f64> {
    (0..c).map(|k| 0.25 + 0.5 * k as f64).collect()
}

fn logits(seed: u64, dims: &[usize]) -> Tensor {
    (random_f64(seed, "logits", dims) * 4.0).unwrap()
}

#[test]
fn equals_pytorch() {
    let cases = fixture("supervised");
    assert_eq!(cases.len(), 8);
    for (case_name, case) in &cases {
        let valid = valid_mask(&case["labels"], VOID).unwrap();
        let truth = Truth { labels: case["labels"].clone(), targets: case["targets"].clone(), valid };
        for (name, loss) in losses(&elements(&case["weights"])) {
            let expected = scalar(&case[&format!("{name}.loss")]);
            let expected_grad = &case[&format!("{name}.grad_of_30_loss")];
            for (dtype, tolerance) in [(DType::F64, 1e-9), (DType::F32, 1e-5)] {
                let z = case["logits"].to_dtype(dtype).unwrap();
                let (value, grad) = value_and_grad(&z, 30.0, |z| loss.of(z, &truth));
                let what = format!("{name} of {case_name} in {dtype:?}");
                assert!((value - expected).abs() <= tolerance * expected.abs() + 1e-15, "{what}: {value}, {expected}");
                if elements(expected_grad).iter().all(|g| g.abs() < 1e-14) {
                    let rounding = if dtype == DType::F64 { 1e-14 } else { 1e-6 };
                    assert!(elements(&grad).iter().all(|g| g.abs() < rounding), "{what}: no gradient");
                    continue;
                }
                let off = relative_error(&grad, expected_grad).unwrap();
                assert!(off < tolerance, "{what}: gradient off by {off:.1e}");
            }
        }
    }
}

/// Jaccard loss of a class if the pixels `wrong` are, and all others not.
fn jaccard(labelled: &[bool], wrong: &[bool]) -> f64 {
    let pairs = || labelled.iter().zip(wrong);
    let both = pairs().filter(|(t, w)| **t && !**w).count() as f64;
    let union = pairs().filter(|(t, w)| **t || **w).count() as f64;
    if union > 0.0 { 1.0 - both / union } else { 0.0 }
}

/// The definitions, in loops.
fn naive(loss: &Loss, logits: &Tensor, truth: &Truth) -> f64 {
    let (n, c, h, w) = logits.dims4().unwrap();
    let m = h * w;
    let (z, t) = (elements(logits), elements(&truth.targets));
    let (labels, valid) = (bytes(&truth.labels), bytes(&truth.valid));
    let pixels: Vec<usize> = (0..n * m).filter(|&p| valid[p] == 1).collect();
    let at = |pixel: usize, class: usize| (pixel / m * c + class) * m + pixel % m;
    let y = |pixel: usize| usize::from(labels[pixel]);
    let p = |pixel: usize, class: usize| z[at(pixel, class)].exp() / (0..c).map(|k| z[at(pixel, k)].exp()).sum::<f64>();
    match loss {
        Loss::Ohem(Ohem { threshold, min_kept, class_weights }) => {
            let own = |pixel: &usize| p(*pixel, y(*pixel));
            let mut order = pixels.clone();
            order.sort_by(|a, b| own(a).total_cmp(&own(b)));
            let hard: Vec<usize> =
                (0..order.len()).filter(|&k| k < *min_kept || own(&order[k]) < *threshold).map(|k| order[k]).collect();
            let weight = |pixel: &usize| class_weights.as_ref().map_or(1.0, |weights| weights[y(*pixel)]);
            let sum: f64 = hard.iter().map(|pixel| -weight(pixel) * own(pixel).ln()).sum();
            sum / hard.iter().map(weight).sum::<f64>()
        }
        Loss::Dice(Dice { smooth, normaliser }) => {
            let mut scores = Vec::new();
            for class in 0..c {
                let labelled = pixels.iter().filter(|&&i| y(i) == class).count() as f64;
                if labelled > 0.0 {
                    let predicted: f64 = pixels.iter().map(|&i| p(i, class)).sum();
                    let both: f64 = pixels.iter().filter(|&&i| y(i) == class).map(|&i| p(i, class)).sum();
                    scores.push(2.0 * (both + smooth) / (predicted + labelled + 2.0 * smooth));
                }
            }
            let classes = if *normaliser == DiceNormaliser::AllClasses { c } else { scores.len() };
            scores.iter().map(|score| 1.0 - score).sum::<f64>() / classes as f64
        }
        Loss::Lovasz(Lovasz { per_image, classes }) => {
            let sets: Vec<Vec<usize>> = if *per_image {
                (0..n).map(|image| pixels.iter().copied().filter(|p| p / m == image).collect()).collect()
            } else {
                vec![pixels]
            };
            let set_loss = |set: &Vec<usize>| {
                let mut values = Vec::new();
                for class in 0..c {
                    let labelled: Vec<bool> = set.iter().map(|&i| y(i) == class).collect();
                    if *classes == LovaszClasses::Present && !labelled.contains(&true) {
                        continue;
                    }
                    let error = |k: usize| (f64::from(u8::from(labelled[k])) - p(set[k], class)).abs();
                    let mut order: Vec<usize> = (0..set.len()).collect();
                    order.sort_by(|&a, &b| error(b).total_cmp(&error(a)));
                    let mut wrong = vec![false; set.len()];
                    let (mut before, mut value) = (0.0, 0.0);
                    for k in order {
                        wrong[k] = true;
                        let now = jaccard(&labelled, &wrong);
                        value += error(k) * (now - before);
                        before = now;
                    }
                    values.push(value);
                }
                values.iter().sum::<f64>() / values.len() as f64
            };
            sets.iter().map(set_loss).sum::<f64>() / sets.len() as f64
        }
        Loss::Binary(BinaryCrossEntropy { positive_weights }) => {
            let mut sum = 0.0;
            for &i in &pixels {
                for class in 0..c {
                    let (z, t) = (z[at(i, class)], t[at(i, class)]);
                    let on = 1.0 / (1.0 + (-z).exp());
                    let weight = positive_weights.as_ref().map_or(1.0, |weights| weights[class]);
                    sum -= weight * t * on.ln() + (1.0 - t) * (1.0 - on).ln();
                }
            }
            sum / (pixels.len() * c) as f64
        }
    }
}

#[test]
fn equals_a_naive_loop() {
    // The last size has more pixels than one task takes, and a ragged rest.
    for dims in [[1, 2, 2, 3], [3, 11, 7, 6], [1, 3, 47, 53]] {
        let z = logits(1, &dims);
        for keep in [1.0, 0.7] {
            let truth = Truth::new(2, dims, keep);
            for (name, loss) in losses(&weights(dims[1])) {
                let (value, expected) = (loss.run(&z, &truth).0, naive(&loss, &z, &truth));
                assert!((value - expected).abs() < 1e-11 * expected, "{name} of {dims:?}: {value}, {expected}");
                // Without a gradient to form, the same number.
                assert_eq!(scalar(&loss.of(&z, &truth).unwrap()), value, "{name}");
            }
        }
    }
}

#[test]
fn gradient_equals_central_differences() {
    let dims @ [n, c, h, w] = [2, 5, 3, 5];
    let z = logits(3, &dims);
    for keep in [1.0, 0.7] {
        let truth = Truth::new(4, dims, keep);
        for (name, loss) in losses(&weights(c)) {
            check_gradient(
                std::slice::from_ref(&z),
                // Times the pixels: elements of order 1, so that the tolerance is a relative one.
                |z| Ok((as_ops(loss.of(&z[0], &truth))? * (n * h * w) as f64)?),
                1000,
                1e-8,
            )
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        }
    }
}

#[test]
fn void_pixels_move_nothing() {
    let dims @ [n, c, h, w] = [2, 6, 25, 27];
    let z = logits(5, &dims);
    let truth = Truth::new(6, dims, 0.6);
    let counted = truth.valid.unsqueeze(1).unwrap().broadcast_as(&dims).unwrap();
    let void_labels = truth.valid.where_cond(&truth.labels, &map(n, h, w, |_, _, _| VOID)).unwrap();
    for dtype in [DType::F64, DType::F32] {
        for spoil in [f64::NAN, f64::INFINITY, 1e30] {
            let spoiled =
                |z: &Tensor| counted.where_cond(z, &Tensor::full(spoil, &dims, &Device::Cpu).unwrap()).unwrap();
            let hidden =
                Truth { labels: void_labels.clone(), targets: spoiled(&truth.targets), valid: truth.valid.clone() };
            for (name, loss) in losses(&weights(c)) {
                let (value, grad) = loss.run(&z.to_dtype(dtype).unwrap(), &truth);
                let (same, same_grad) = loss.run(&spoiled(&z).to_dtype(dtype).unwrap(), &hidden);
                assert!(value > 0.05 && value == same, "{name}: {value}, {same}");
                assert_close(&same_grad, &grad, 0.0, "the same numbers");
                for (g, v) in elements(&grad).iter().zip(elements(&counted.to_dtype(DType::F64).unwrap())) {
                    assert!(v == 1.0 || *g == 0.0, "{name}: a void pixel has no gradient");
                }
            }
        }
    }
}

#[test]
fn nothing_valid_is_zero_with_zero_gradient() {
    let dims = [2, 3, 4, 4];
    let truth = Truth { valid: map(2, 4, 4, |_, _, _| 0), ..Truth::new(7, dims, 1.0) };
    for (name, loss) in losses(&weights(3)) {
        let (value, grad) = loss.run(&logits(8, &dims), &truth);
        assert!(value == 0.0 && elements(&grad).iter().all(|&g| g == 0.0), "{name}");
    }
}

#[test]
fn a_batch_is_made_of_its_items_as_the_normaliser_says() {
    let dims @ [n, c, h, w] = [3, 4, 5, 6];
    let z = logits(9, &dims);
    // The second image has no pixel that counts.
    let valid = map(n, h, w, |i, y, x| u8::from(i != 1 && (i + y * 2 + x) % 3 != 0));
    let truth = Truth { valid: valid.clone(), ..Truth::new(10, dims, 1.0) };
    let total: f64 = bytes(&valid).iter().map(|&v| f64::from(v)).sum();
    for (name, loss) in losses(&weights(c)) {
        let (value, grad) = loss.run(&z, &truth);
        let mean_of_items = match loss {
            Loss::Lovasz(cfg) => cfg.per_image,
            Loss::Binary(_) => true,
            Loss::Ohem(_) | Loss::Dice(_) => false,
        };
        if !mean_of_items {
            // One set of pixels: three images are one image of three times the rows.
            let tall = |z: &Tensor| match z.rank() {
                4 => z.permute((1, 0, 2, 3)).unwrap().reshape((1, c, n * h, w)).unwrap(),
                _ => z.reshape((1, n * h, w)).unwrap(),
            };
            let (one, one_grad) = loss.run(&tall(&z), &truth.map(tall));
            assert!((value - one).abs() < 1e-14, "{name}: {value}, {one}");
            assert_close(&one_grad, &tall(&grad), 1e-15, "the order of sums");
            continue;
        }
        let mut sum = 0.0;
        for i in 0..n {
            let item = |t: &Tensor| t.narrow(0, i, 1).unwrap();
            let count: f64 = bytes(&item(&valid)).iter().map(|&v| f64::from(v)).sum();
            let weight = if let Loss::Binary(_) = loss { count / total } else { 1.0 / n as f64 };
            let (alone, alone_grad) = loss.run(&item(&z), &truth.map(item));
            sum += weight * alone;
            assert_close(&item(&grad), &(alone_grad * weight).unwrap(), 1e-15, "the order of a product");
        }
        assert!((value - sum).abs() < 1e-13 * value, "{name}: {value}, {sum}");
    }
}

#[test]
fn permuting_classes_permutes_the_gradient() {
    let dims @ [n, c, h, w] = [2, 5, 3, 4];
    let order = [3u32, 0, 4, 1, 2]; // new class k was class order[k]
    let index = Tensor::new(&order, &Device::Cpu).unwrap();
    let z = logits(11, &dims);
    let truth = Truth::new(12, dims, 0.8);
    let moved = |z: &Tensor| z.index_select(&index, 1).unwrap();
    let labels: Vec<u8> =
        bytes(&truth.labels).iter().map(|&y| order.iter().position(|&o| o == u32::from(y)).unwrap() as u8).collect();
    let moved_truth = Truth {
        labels: Tensor::from_vec(labels, (n, h, w), &Device::Cpu).unwrap(),
        targets: moved(&truth.targets),
        valid: truth.valid.clone(),
    };
    let moved_weights: Vec<f64> = order.iter().map(|&k| weights(c)[k as usize]).collect();
    for ((name, loss), (_, moved_loss)) in losses(&weights(c)).iter().zip(losses(&moved_weights)) {
        let (value, grad) = loss.run(&z, &truth);
        let (moved_value, moved_grad) = moved_loss.run(&moved(&z), &moved_truth);
        assert!((value - moved_value).abs() < 1e-14 * value.max(1.0), "{name}");
        assert_close(&moved_grad, &moved(&grad), 1e-14, "order of a sum of 5");
        assert!(relative_error(&moved_grad, &grad).unwrap() > 0.1, "{name}: the permutation is seen");
    }
}

#[test]
fn a_map_that_is_surely_right_loses_nothing() {
    let [n, c, h, w] = [2, 5, 9, 11];
    for dtype in [DType::F64, DType::F32] {
        let truth = Truth::new(13, [n, c, h, w], 0.8);
        let labels = bytes(&truth.labels);
        let m = h * w;
        let right: Vec<f64> = (0..n * c * m)
            .map(|k| if usize::from(labels[k / (c * m) * m + k % m]) == k / m % c { 200.0 } else { -200.0 })
            .collect();
        let z = Tensor::from_vec(right.clone(), (n, c, h, w), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        let targets: Vec<f64> = right.iter().map(|z| f64::from(u8::from(*z > 0.0))).collect();
        let truth = Truth { targets: Tensor::from_vec(targets, (n, c, h, w), &Device::Cpu).unwrap(), ..truth };
        for (name, loss) in losses(&weights(c)) {
            let (value, grad) = loss.run(&z, &truth);
            assert!((0.0..1e-12).contains(&value), "{name} {dtype:?}: {value}");
            assert!(elements(&grad).iter().all(|g| g.abs() < 1e-12), "{name} {dtype:?}");
            // And one that is surely wrong is finite.
            let (value, grad) = loss.run(&z.neg().unwrap(), &truth);
            assert!(value.is_finite() && value > 0.1, "{name} {dtype:?}: {value}");
            assert!(elements(&grad).iter().all(|g| g.is_finite()), "{name} {dtype:?}");
        }
    }
}

#[test]
fn layout_of_the_logits_does_not_matter() {
    let [n, c, h, w] = [2, 3, 4, 5];
    let nhwc = logits(14, &[n + 1, h, w, c]);
    let strided = |z: &Tensor| z.permute((0, 3, 1, 2)).unwrap().narrow(0, 1, n).unwrap();
    let truth = Truth::new(15, [n, c, h, w], 0.8);
    for (name, loss) in losses(&weights(c)) {
        let (value, grad) = loss.run(&strided(&nhwc).force_contiguous().unwrap(), &truth);
        let (other, other_grad) = value_and_grad(&nhwc, 1.0, |z| loss.of(&strided(z), &truth));
        assert_eq!(value, other, "{name}");
        assert_close(&strided(&other_grad), &grad, 0.0, "the same numbers");
    }
}

#[test]
fn thread_count_changes_no_bit() {
    let dims = [2, 6, 53, 97];
    let truth = Truth::new(16, dims, 0.9);
    for dtype in [DType::F32, DType::F64] {
        // Rounded, so that many errors and probabilities are equal.
        let z = logits(17, &dims).round().unwrap().to_dtype(dtype).unwrap();
        for (_, loss) in losses(&weights(6)) {
            assert_same_on_all_pools(|| loss.run(&z, &truth));
        }
    }
}

#[test]
fn every_device_gives_the_same() {
    let dims = [2, 5, 17, 13];
    let (z, truth) = (logits(18, &dims), Truth::new(19, dims, 0.8));
    for (name, loss) in losses(&weights(5)) {
        let (expected, expected_grad) = loss.run(&z, &truth);
        for device in devices() {
            let here = |t: &Tensor| t.to_device(&device).unwrap();
            let (value, grad) = loss.run(&here(&z), &truth.map(here));
            assert!(grad.device().same_device(&device), "{name}");
            assert_eq!(value, expected, "{name}");
            assert_eq!(relative_error(&grad, &expected_grad).unwrap(), 0.0, "{name}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let dims = [2, 3, 4, 5];
    let (z, good) = (logits(20, &dims), Truth::new(21, dims, 1.0));
    let turned = Truth::new(21, [2, 3, 5, 4], 1.0);
    for (name, loss) in losses(&weights(3)) {
        let error = loss.of(&z, &turned).unwrap_err();
        assert!(matches!(error, LossError::Shape { .. }), "{name}: {error}");
        let text = error.to_string();
        assert!(text.contains("5, 4]") && text.contains("4, 5]"), "{text}");
        assert!(matches!(loss.of(&z.to_dtype(DType::F16).unwrap(), &good), Err(LossError::DType { .. })));
        let no_mask = Truth { valid: map(2, 4, 5, |_, y, x| (y + x) as u8 % 3), ..Truth::new(21, dims, 1.0) };
        assert!(matches!(loss.of(&z, &no_mask), Err(LossError::Mask { row: 0, column: 2, value: 2, .. })));
        let wrong = Truth {
            labels: map(2, 4, 5, |i, y, x| if (i, y, x) == (1, 2, 3) { 3 } else { 0 }),
            targets: {
                let mut t = elements(&good.targets);
                t[((3 + 1) * 4 + 2) * 5 + 3] = 1.5;
                Tensor::from_vec(t, &dims, &Device::Cpu).unwrap()
            },
            valid: good.valid.clone(),
        };
        let error = loss.of(&z, &wrong).unwrap_err();
        match loss {
            Loss::Binary(_) => assert!(
                matches!(error, LossError::Target { image: 1, class: 1, row: 2, column: 3, value: 1.5 }),
                "{error}"
            ),
            _ => assert!(matches!(error, LossError::Label { image: 1, row: 2, column: 3, value: 3, .. }), "{error}"),
        }
    }
    let ohem = |cfg: Ohem| Loss::Ohem(cfg);
    let bad = [
        ohem(Ohem { threshold: -0.1, ..Ohem::default() }),
        ohem(Ohem { threshold: f64::NAN, ..Ohem::default() }),
        ohem(Ohem { class_weights: Some(vec![1.0; 2]), ..Ohem::default() }),
        Loss::Dice(Dice { smooth: -1.0, ..Dice::default() }),
        Loss::Dice(Dice { smooth: f64::INFINITY, ..Dice::default() }),
        Loss::Binary(BinaryCrossEntropy { positive_weights: Some(vec![1.0, f64::NAN, 1.0]) }),
    ];
    for loss in bad {
        assert!(matches!(loss.of(&z, &good), Err(LossError::Config { .. })), "{loss:?}");
    }
}

/// Logits of two classes that give the labelled first one these probabilities, exactly.
fn with_odds(odds: &[f64]) -> (Tensor, Truth) {
    let m = odds.len();
    let z: Vec<f64> = odds.iter().map(|odds| odds.ln()).chain(vec![0.0; m]).collect();
    let truth = Truth {
        labels: map(1, 1, m, |_, _, _| 0),
        targets: Tensor::zeros((1, 2, 1, m), DType::F64, &Device::Cpu).unwrap(),
        valid: map(1, 1, m, |_, _, _| 1),
    };
    (Tensor::from_vec(z, (1, 2, 1, m), &Device::Cpu).unwrap(), truth)
}

/// Pixels that a setting keeps: those with a gradient.
fn kept(odds: &[f64], threshold: f64, min_kept: usize) -> Vec<bool> {
    let (z, truth) = with_odds(odds);
    let (_, grad) = Loss::Ohem(Ohem { threshold, min_kept, class_weights: None }).run(&z, &truth);
    elements(&grad)[..odds.len()].iter().map(|g| *g != 0.0).collect()
}

#[test]
fn hardest_pixels_are_those_specified() {
    // Probabilities 1/2, 2/3, 1/2, 3/4, 1/3.
    let odds = [1.0, 2.0, 1.0, 3.0, 0.5];
    assert_eq!(kept(&odds, 0.6, 0), [true, false, true, false, true]);
    // At the threshold is not below it.
    assert_eq!(kept(&odds, 0.5, 0), [false, false, false, false, true]);
    assert_eq!(kept(&odds, 0.5, 1), [false, false, false, false, true]);
    // The second hardest has an equal, which is kept with it.
    assert_eq!(kept(&odds, 0.2, 2), [true, false, true, false, true]);
    assert_eq!(kept(&odds, 0.2, 3), [true, false, true, false, true]);
    assert_eq!(kept(&odds, 0.2, 4), [true, true, true, false, true]);
    // As many as there are, and more.
    assert_eq!(kept(&odds, 0.2, 5), [true; 5]);
    assert_eq!(kept(&odds, 0.2, 1_000), [true; 5]);
    // None below the threshold, none asked for.
    assert_eq!(kept(&odds, 0.2, 0), [false; 5]);
    assert_eq!(kept(&odds, 0.0, 0), [false; 5]);
    assert_eq!(kept(&odds, 1.0, 0), [true; 5]);
    let (z, truth) = with_odds(&odds);
    let none = Loss::Ohem(Ohem { threshold: 0.2, min_kept: 0, class_weights: None });
    assert_eq!(none.run(&z, &truth).0, 0.0);
}

#[test]
fn hardest_pixels_are_all_pixels_where_all_are_kept() {
    let dims @ [_, c, _, _] = [2, 5, 31, 43];
    let truth = Truth::new(22, dims, 0.7);
    for dtype in [DType::F64, DType::F32] {
        let z = logits(23, &dims).to_dtype(dtype).unwrap();
        for class_weights in [None, Some(weights(c))] {
            let all = Ohem { threshold: 0.3, min_kept: usize::MAX, class_weights: class_weights.clone() };
            let (value, grad) = Loss::Ohem(all).run(&z, &truth);
            let cfg = CrossEntropy { class_weights, ..CrossEntropy::default() };
            let (expected, expected_grad) =
                value_and_grad(&z, 1.0, |z| cross_entropy(z, &truth.labels, &truth.valid, &cfg));
            assert!((value - expected).abs() < 1e-6 * expected, "{value}, {expected}");
            assert_close(&grad, &expected_grad, 0.0, "the same numbers");
        }
    }
    // A logit that is no number is seen, however few are kept.
    let mut values = elements(&logits(23, &dims));
    let first = bytes(&truth.valid).iter().position(|&v| v == 1).unwrap();
    values[first] = f64::NAN;
    let z = Tensor::from_vec(values, &dims, &Device::Cpu).unwrap();
    assert!(scalar(&Loss::Ohem(Ohem { min_kept: 1, ..Ohem::default() }).of(&z, &truth).unwrap()).is_nan());
}

#[test]
fn equal_errors_have_one_value_and_a_gradient_by_position() {
    // Two classes, no pixel preferred: all errors are 1/2, and so is the loss of either class.
    let z = Tensor::zeros((1, 2, 1, 4), DType::F64, &Device::Cpu).unwrap();
    let truth = Truth {
        labels: Tensor::new(&[[[0u8, 1, 1, 0]]], &Device::Cpu).unwrap(),
        targets: z.clone(),
        valid: map(1, 1, 4, |_, _, _| 1),
    };
    let (value, grad) = Loss::Lovasz(Lovasz::default()).run(&z, &truth);
    assert!((value - 0.5).abs() < 1e-15);
    // Class 0 in the order of pixels: hit 1/2, miss 1/6, miss 1/12, hit 1/4; class 1: miss 1/3, hit 1/3, hit 1/3, miss 0.
    let first = [-1.0 / 2.0, 1.0 / 6.0, 1.0 / 12.0, -1.0 / 4.0];
    let second = [1.0 / 3.0, -1.0 / 3.0, -1.0 / 3.0, 0.0];
    for (i, g) in elements(&grad)[..4].iter().enumerate() {
        // Half of each class's, through a softmax of two halves.
        let expected = 0.25 * (first[i] - second[i]) * 0.5;
        assert!((g - expected).abs() < 1e-15, "pixel {i}: {g}, {expected}");
    }
}

#[test]
fn lovasz_of_a_class_alone_is_the_jaccard_loss_of_hard_decisions() {
    // Where probabilities are 0 or 1 the surrogate is the Jaccard loss itself.
    let labels = [0u8, 0, 0, 1, 1, 2];
    let predicted = [0u8, 1, 0, 1, 0, 2];
    let z: Vec<f64> = (0..18).map(|k| if usize::from(predicted[k % 6]) == k / 6 { 1000.0 } else { -1000.0 }).collect();
    let z = Tensor::from_vec(z, (1, 3, 1, 6), &Device::Cpu).unwrap();
    let truth = Truth {
        labels: Tensor::new(&[[labels]], &Device::Cpu).unwrap(),
        targets: z.clone(),
        valid: map(1, 1, 6, |_, _, _| 1),
    };
    let expected = ((1.0 - 2.0 / 4.0) + (1.0 - 1.0 / 3.0) + 0.0) / 3.0;
    assert!((Loss::Lovasz(Lovasz::default()).run(&z, &truth).0 - expected).abs() < 1e-15);
}

#[test]
fn binary_cross_entropy_sends_nothing_to_its_targets() {
    let dims = [1, 4, 3, 3];
    let (z, truth) = (logits(24, &dims), Truth::new(25, dims, 1.0));
    let [z, t] = [&z, &truth.targets].map(|t| Var::from_tensor(t).unwrap());
    let loss = binary_cross_entropy(&z, &t, &truth.valid, &BinaryCrossEntropy::default()).unwrap();
    let grads = loss.backward().unwrap();
    assert!(grads.get(&z).is_some() && grads.get(&t).is_none());
}

#[test]
fn auxiliary_losses_are_weighted_and_added() {
    let scalar_var = |value: f64| Var::new(value, &Device::Cpu).unwrap();
    let [main, first, second] = [2.0, 3.0, f64::NAN].map(scalar_var);
    let auxiliary = [(first.as_tensor().clone(), 0.4), (second.as_tensor().clone(), 0.0)];
    let sum = with_auxiliary(main.as_tensor().clone(), &auxiliary).unwrap();
    assert!((scalar(&sum) - 3.2).abs() < 1e-15);
    let grads = sum.backward().unwrap();
    assert_eq!(scalar(grads.get(&main).unwrap()), 1.0);
    assert_eq!(scalar(grads.get(&first).unwrap()), 0.4);
    assert!(grads.get(&second).is_none());
    for weight in [-0.1, f64::NAN] {
        let refused = with_auxiliary(main.as_tensor().clone(), &[(first.as_tensor().clone(), weight)]).unwrap_err();
        assert!(matches!(refused, LossError::Config { .. }));
    }
    let map = Tensor::zeros((1, 2), DType::F64, &Device::Cpu).unwrap();
    assert!(matches!(with_auxiliary(main.as_tensor().clone(), &[(map, 0.4)]), Err(LossError::Shape { .. })));
}

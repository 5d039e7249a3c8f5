//! The adaptive cross entropy against PyTorch, a naive loop, finite differences and its laws.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::{as_ops, assert_same_on_all_pools, bytes, elements, fixture, map, random_mask, scalar, value_and_grad};
use segdistill_losses::{
    Ace, AceTarget, CrossEntropy, KlNormaliser, LossError, Result, SoftCrossEntropy, ace, cross_entropy,
    soft_cross_entropy, valid_mask,
};
use segdistill_ops::testing::{assert_close, check_gradient, devices, random_f64, relative_error};

const VOID: u8 = 255;

/// As the fixture names them; the weights are those of a case.
fn settings(weights: &[f64]) -> [(&'static str, Ace); 4] {
    use AceTarget::{Blend, Confidence, TeacherWhereRight};
    let weighted = || Some(weights.to_vec());
    [
        ("right", Ace { target: TeacherWhereRight, temperature: 1.0, class_weights: None }),
        ("right_warm_weights", Ace { target: TeacherWhereRight, temperature: 2.5, class_weights: weighted() }),
        ("blend", Ace { target: Blend { alpha: 0.3 }, temperature: 1.0, class_weights: weighted() }),
        ("confidence", Ace { target: Confidence, temperature: 1.5, class_weights: None }),
    ]
}

/// Two networks' logits, labels and mask.
struct Case {
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    valid: Tensor,
}

impl Case {
    /// Labels that the teacher guesses right about every other time.
    fn new(seed: u64, [n, c, h, w]: [usize; 4], keep: f64) -> Self {
        let [student, teacher] =
            ["student", "teacher"].map(|name| (random_f64(seed, name, &[n, c, h, w]) * 4.0).unwrap());
        let guesses = bytes(&teacher.argmax(1).unwrap().to_dtype(DType::U8).unwrap());
        let labels = map(n, h, w, |i, y, x| match (i + y + x) % 2 {
            0 => guesses[(i * h + y) * w + x],
            _ => ((i * 5 + y * 3 + x * 7) % c) as u8,
        });
        Self { student, teacher, labels, valid: random_mask(seed, n, h, w, keep) }
    }

    fn map(&self, f: impl Fn(&Tensor) -> Tensor) -> Self {
        Self { student: f(&self.student), teacher: f(&self.teacher), labels: f(&self.labels), valid: f(&self.valid) }
    }

    fn cast(&self, dtype: DType) -> Self {
        self.map(|t| if t.dtype() == DType::U8 { t.clone() } else { t.to_dtype(dtype).unwrap() })
    }

    fn of(&self, student: &Tensor, cfg: &Ace) -> Result<Tensor> {
        ace(student, &self.teacher, &self.labels, &self.valid, cfg)
    }

    fn run(&self, cfg: &Ace) -> (f64, Tensor) {
        value_and_grad(&self.student, 1.0, |s| self.of(s, cfg))
    }

    fn cross_entropy(&self, class_weights: Option<Vec<f64>>) -> (f64, Tensor) {
        let cfg = CrossEntropy { class_weights, ..CrossEntropy::default() };
        value_and_grad(&self.student, 1.0, |s| cross_entropy(s, &self.labels, &self.valid, &cfg))
    }
}

fn weights(c: usize) -> Vec<f64> {
    (0..c).map(|k| 0.25 + 0.5 * k as f64).collect()
}

fn assert_same((value, grad): (f64, Tensor), (expected, expected_grad): (f64, Tensor), tolerance: f64) {
    assert!((value - expected).abs() <= tolerance * expected.abs(), "{value}, {expected}");
    assert!(relative_error(&grad, &expected_grad).unwrap() <= tolerance);
}

#[test]
fn equals_pytorch() {
    let cases = fixture("ace");
    assert_eq!(cases.len(), 8);
    for (case_name, parts) in &cases {
        let part = |name: &str| parts[name].clone();
        let valid = valid_mask(&parts["labels"], VOID).unwrap();
        let case = Case { student: part("student"), teacher: part("teacher"), labels: part("labels"), valid };
        for (name, cfg) in settings(&elements(&parts["weights"])) {
            let expected = scalar(&parts[&format!("{name}.loss")]);
            let expected_grad = &parts[&format!("{name}.grad_of_30_loss")];
            for (dtype, tolerance) in [(DType::F64, 1e-9), (DType::F32, 1e-5)] {
                let case = case.cast(dtype);
                let (value, grad) = value_and_grad(&case.student, 30.0, |s| case.of(s, &cfg));
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

/// The definition, pixel by pixel.
fn naive(case: &Case, cfg: &Ace) -> f64 {
    let (n, c, h, w) = case.student.dims4().unwrap();
    let m = h * w;
    let (student, teacher) = (elements(&case.student), elements(&case.teacher));
    let (labels, valid) = (bytes(&case.labels), bytes(&case.valid));
    let (mut sum, mut total) = (0.0, 0.0);
    for pixel in (0..n * m).filter(|&p| valid[p] == 1) {
        let at = |class: usize| (pixel / m * c + class) * m + pixel % m;
        let softmax = |z: &[f64], temperature: f64| -> Vec<f64> {
            let e: Vec<f64> = (0..c).map(|k| (z[at(k)] / temperature).exp()).collect();
            e.iter().map(|x| x / e.iter().sum::<f64>()).collect()
        };
        let y = usize::from(labels[pixel]);
        let (p, q) = (softmax(&student, 1.0), softmax(&teacher, cfg.temperature));
        let share = match cfg.target {
            AceTarget::TeacherWhereRight => f64::from(u8::from(q.iter().all(|x| *x <= q[y]))),
            AceTarget::Blend { alpha } => alpha,
            AceTarget::Confidence => q[y],
        };
        let weight = cfg.class_weights.as_ref().map_or(1.0, |weights| weights[y]);
        for class in 0..c {
            let onehot = f64::from(u8::from(class == y));
            sum -= weight * (share * q[class] + (1.0 - share) * onehot) * p[class].ln();
        }
        total += weight;
    }
    sum / total
}

#[test]
fn equals_a_naive_loop() {
    // The last size has more pixels than one task takes, and a ragged rest.
    for dims in [[1, 2, 2, 3], [3, 11, 7, 6], [2, 4, 41, 37]] {
        for keep in [1.0, 0.7] {
            let case = Case::new(1, dims, keep);
            for (name, cfg) in settings(&weights(dims[1])) {
                let (value, expected) = (case.run(&cfg).0, naive(&case, &cfg));
                assert!((value - expected).abs() < 1e-11 * expected, "{name}: {value}, {expected}");
                assert_eq!(scalar(&case.of(&case.student, &cfg).unwrap()), value, "{name}: without a gradient");
            }
        }
    }
}

#[test]
fn gradient_equals_central_differences() {
    let dims @ [n, c, h, w] = [2, 5, 3, 5];
    for keep in [1.0, 0.7] {
        let case = Case::new(2, dims, keep);
        for (_, cfg) in settings(&weights(c)) {
            check_gradient(
                std::slice::from_ref(&case.student),
                // Times the pixels: elements of order 1, so that the tolerance is a relative one.
                |s| Ok((as_ops(case.of(&s[0], &cfg))? * (n * h * w) as f64)?),
                1000,
                1e-8,
            )
            .unwrap();
        }
    }
}

#[test]
fn between_the_label_and_the_teacher_lie_both_ends() {
    let dims @ [n, c, h, w] = [2, 7, 23, 31];
    for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-5)] {
        let case = Case::new(3, dims, 0.8).cast(dtype);
        let blend = |alpha| Ace { target: AceTarget::Blend { alpha }, ..Ace::default() };
        // The label alone.
        assert_same(case.run(&blend(0.0)), case.cross_entropy(None), tolerance);
        let class_weights = Some(weights(c));
        let weighted = Ace { class_weights: class_weights.clone(), ..blend(0.0) };
        assert_same(case.run(&weighted), case.cross_entropy(class_weights), tolerance);
        // The teacher alone.
        let soft = SoftCrossEntropy { temperature: 1.0, normaliser: KlNormaliser::MeanPixel };
        let taught = value_and_grad(&case.student, 1.0, |s| soft_cross_entropy(s, &case.teacher, &case.valid, &soft));
        assert_same(case.run(&blend(1.0)), taught, tolerance);
        // A teacher that is surely right says what the label says, under every rule.
        let labels = bytes(&case.labels);
        let m = h * w;
        let sure: Vec<f64> = (0..n * c * m)
            .map(|k| if usize::from(labels[k / (c * m) * m + k % m]) == k / m % c { 500.0 } else { -500.0 })
            .collect();
        let sure = Tensor::from_vec(sure, &dims, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        for target in [AceTarget::TeacherWhereRight, AceTarget::Blend { alpha: 0.6 }, AceTarget::Confidence] {
            let cfg = Ace { target, ..Ace::default() };
            let right = Case { teacher: sure.clone(), ..case.map(Tensor::clone) };
            assert_same(right.run(&cfg), case.cross_entropy(None), tolerance);
            // And one that is surely wrong everywhere is not heard, but where a share is fixed.
            if !matches!(target, AceTarget::Blend { .. }) {
                let wrong = Case { teacher: sure.neg().unwrap(), ..case.map(Tensor::clone) };
                assert_same(wrong.run(&cfg), case.cross_entropy(None), tolerance);
            }
        }
    }
}

#[test]
fn a_teacher_that_ties_counts_as_right() {
    let student = random_f64(4, "student", &[1, 3, 1, 3]);
    let teacher = Tensor::new(&[[[[2f64, 2.0, 2.0]], [[2.0, 2.0, 2.0]], [[0.0, 0.0, 0.0]]]], &Device::Cpu).unwrap();
    let labels = Tensor::new(&[[[0u8, 1, 2]]], &Device::Cpu).unwrap();
    let case = Case { student: student.clone(), teacher, labels, valid: map(1, 1, 3, |_, _, _| 1) };
    let (_, grad) = case.run(&Ace::default());
    let p = elements(&segdistill_ops::log_softmax(&student).unwrap().exp().unwrap());
    let q = [2f64.exp(), 2f64.exp(), 1.0].map(|e| e / (2.0 * 2f64.exp() + 1.0));
    let target = [q, q, [0.0, 0.0, 1.0]];
    for (k, g) in elements(&grad).iter().enumerate() {
        assert!((g - (p[k] - target[k % 3][k / 3]) / 3.0).abs() < 1e-15, "element {k}");
    }
}

#[test]
fn void_pixels_move_nothing() {
    let dims @ [n, c, h, w] = [2, 6, 25, 27];
    let case = Case::new(5, dims, 0.6);
    let counted = case.valid.unsqueeze(1).unwrap().broadcast_as(&dims).unwrap();
    let void_labels = case.valid.where_cond(&case.labels, &map(n, h, w, |_, _, _| VOID)).unwrap();
    for dtype in [DType::F64, DType::F32] {
        for spoil in [f64::NAN, f64::INFINITY, 1e30] {
            let spoiled =
                |z: &Tensor| counted.where_cond(z, &Tensor::full(spoil, &dims, &Device::Cpu).unwrap()).unwrap();
            let hidden = Case {
                student: spoiled(&case.student),
                teacher: spoiled(&case.teacher),
                labels: void_labels.clone(),
                valid: case.valid.clone(),
            };
            for (name, cfg) in settings(&weights(c)) {
                let (value, grad) = case.cast(dtype).run(&cfg);
                let (same, same_grad) = hidden.cast(dtype).run(&cfg);
                assert!(value > 0.05 && value == same, "{name}: {value}, {same}");
                assert_close(&same_grad, &grad, 0.0, "the same numbers");
                for (g, v) in elements(&grad).iter().zip(elements(&counted.to_dtype(DType::F64).unwrap())) {
                    assert_eq!(*g != 0.0, v == 1.0, "{name}: void pixels, and only they, have no gradient");
                }
            }
        }
    }
    let none = Case { valid: map(n, h, w, |_, _, _| 0), ..case };
    for (name, cfg) in settings(&weights(c)) {
        let (value, grad) = none.run(&cfg);
        assert!(value == 0.0 && elements(&grad).iter().all(|g| *g == 0.0), "{name}");
    }
}

#[test]
fn a_batch_is_the_weighted_mean_of_its_items() {
    let dims @ [n, c, h, w] = [3, 4, 5, 6];
    // The second image has no pixel that counts.
    let valid = map(n, h, w, |i, y, x| u8::from(i != 1 && (i + y * 2 + x) % 3 != 0));
    let case = Case { valid, ..Case::new(6, dims, 1.0) };
    for (name, cfg) in settings(&weights(c)) {
        let mass = |case: &Case| -> f64 {
            let pixels = bytes(&case.labels).into_iter().zip(bytes(&case.valid)).filter(|(_, v)| *v == 1);
            pixels.map(|(y, _)| cfg.class_weights.as_ref().map_or(1.0, |weights| weights[usize::from(y)])).sum()
        };
        let (value, grad) = case.run(&cfg);
        let mut sum = 0.0;
        for i in 0..n {
            let item = |t: &Tensor| t.narrow(0, i, 1).unwrap();
            let alone = case.map(item);
            let weight = mass(&alone) / mass(&case);
            let (alone, alone_grad) = alone.run(&cfg);
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
    let case = Case::new(7, dims, 0.8);
    let moved = |z: &Tensor| z.index_select(&index, 1).unwrap();
    let labels: Vec<u8> =
        bytes(&case.labels).iter().map(|&y| order.iter().position(|&o| o == u32::from(y)).unwrap() as u8).collect();
    let moved_case = Case {
        student: moved(&case.student),
        teacher: moved(&case.teacher),
        labels: Tensor::from_vec(labels, (n, h, w), &Device::Cpu).unwrap(),
        valid: case.valid.clone(),
    };
    let moved_weights: Vec<f64> = order.iter().map(|&k| weights(c)[k as usize]).collect();
    for ((name, cfg), (_, moved_cfg)) in settings(&weights(c)).iter().zip(settings(&moved_weights)) {
        let (value, grad) = case.run(cfg);
        let (moved_value, moved_grad) = moved_case.run(&moved_cfg);
        assert!((value - moved_value).abs() < 1e-14 * value.max(1.0), "{name}");
        assert_close(&moved_grad, &moved(&grad), 1e-14, "order of a sum of 5");
        assert!(relative_error(&moved_grad, &grad).unwrap() > 0.1, "{name}: the permutation is seen");
    }
}

#[test]
fn large_logits_do_not_overflow() {
    for dtype in [DType::F64, DType::F32] {
        let case = Case::new(8, [1, 4, 3, 3], 1.0);
        let case = Case {
            student: (&case.student * 1e4).unwrap(),
            teacher: (&case.teacher * 1e4).unwrap(),
            ..case.map(Tensor::clone)
        };
        for (name, cfg) in settings(&weights(4)) {
            let (value, grad) = case.cast(dtype).run(&cfg);
            assert!(value.is_finite() && elements(&grad).iter().all(|g| g.is_finite()), "{name} {dtype:?}: {value}");
        }
    }
}

#[test]
fn the_teacher_gets_no_gradient() {
    let case = Case::new(9, [1, 4, 3, 3], 1.0);
    for (name, cfg) in settings(&weights(4)) {
        let [student, teacher] = [&case.student, &case.teacher].map(|t| Var::from_tensor(t).unwrap());
        let loss = ace(&student, &teacher, &case.labels, &case.valid, &cfg).unwrap();
        let grads = loss.backward().unwrap();
        assert!(grads.get(&student).is_some() && grads.get(&teacher).is_none(), "{name}");
    }
}

#[test]
fn threads_and_devices_change_no_bit() {
    for dtype in [DType::F32, DType::F64] {
        let case = Case::new(10, [2, 6, 53, 47], 0.9).cast(dtype);
        for (name, cfg) in settings(&weights(6)) {
            assert_same_on_all_pools(|| case.run(&cfg));
            let (expected, expected_grad) = case.run(&cfg);
            for device in devices() {
                let (value, grad) = case.map(|t| t.to_device(&device).unwrap()).run(&cfg);
                assert!(value == expected && grad.device().same_device(&device), "{name}");
                assert_eq!(relative_error(&grad, &expected_grad).unwrap(), 0.0, "{name}");
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let dims = [2, 3, 4, 5];
    let case = Case::new(11, dims, 1.0);
    let turned = Case::new(11, [2, 3, 5, 4], 1.0);
    let refused = |case: &Case, cfg: &Ace| case.of(&case.student, cfg).unwrap_err();
    let default = Ace::default();
    for bad in [
        Case { teacher: turned.teacher, ..case.map(Tensor::clone) },
        Case { labels: turned.labels, ..case.map(Tensor::clone) },
        Case { valid: turned.valid, ..case.map(Tensor::clone) },
    ] {
        assert!(matches!(refused(&bad, &default), LossError::Shape { .. }));
    }
    let other = Case { teacher: case.teacher.to_dtype(DType::F32).unwrap(), ..case.map(Tensor::clone) };
    assert!(matches!(refused(&other, &default), LossError::DType { .. }));
    let wrong = Case { labels: map(2, 4, 5, |_, y, _| y as u8), ..case.map(Tensor::clone) };
    assert!(matches!(refused(&wrong, &default), LossError::Label { row: 3, column: 0, value: 3, .. }));
    for cfg in [
        Ace { temperature: 0.0, ..Ace::default() },
        Ace { target: AceTarget::Blend { alpha: 1.5 }, ..Ace::default() },
        Ace { target: AceTarget::Blend { alpha: f64::NAN }, ..Ace::default() },
        Ace { class_weights: Some(vec![1.0, -1.0, 1.0]), ..Ace::default() },
    ] {
        assert!(matches!(refused(&case, &cfg), LossError::Config { .. }), "{cfg:?}");
    }
}

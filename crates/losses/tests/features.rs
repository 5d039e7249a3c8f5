//! The losses between two networks' features (attention transfer, squared distance, variation within classes,
//! omni-contrast) against PyTorch, naive loops, finite differences and their laws.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::{as_ops, assert_same_on_all_pools, bytes, elements, fixture, map, random_mask, scalar, value_and_grad};
use segdistill_losses::{
    AttentionTransfer, FeatureMse, Ifvd, LossError, MseNormaliser, OmniContrast, Result, attention_transfer,
    feature_mse, ifvd, omni_contrast,
};
use segdistill_ops::testing::{assert_close, check_gradient, devices, random_f64, relative_error};

const N_CLASSES: usize = 4;

/// A loss with its settings.
#[derive(Clone, Copy, Debug)]
enum Loss {
    Attention(AttentionTransfer),
    Mse(FeatureMse),
    Ifvd(Ifvd),
    Omni(OmniContrast),
}

/// As the fixture names them.
const LOSSES: [(&str, Loss); 7] = [
    ("attention_transfer_2", Loss::Attention(AttentionTransfer { power: 2.0 })),
    ("attention_transfer_3", Loss::Attention(AttentionTransfer { power: 3.0 })),
    ("feature_mse_mean", Loss::Mse(FeatureMse { normaliser: MseNormaliser::Mean })),
    ("feature_mse_sum", Loss::Mse(FeatureMse { normaliser: MseNormaliser::SumPerImage })),
    ("ifvd", Loss::Ifvd(Ifvd { n_classes: N_CLASSES })),
    ("omni_contrast_4", Loss::Omni(OmniContrast { patch: 4, groups: 2, temperature: 0.07 })),
    ("omni_contrast_2", Loss::Omni(OmniContrast { patch: 2, groups: 4, temperature: 1.5 })),
];

/// Everything but the student.
#[derive(Clone)]
struct Known {
    /// Of the student's shape.
    teacher: Tensor,
    /// With channels of its own.
    wide: Tensor,
    labels: Tensor,
    valid: Tensor,
}

impl Known {
    fn each(&self, f: impl Fn(&Tensor) -> Tensor) -> Self {
        Self { teacher: f(&self.teacher), wide: f(&self.wide), labels: f(&self.labels), valid: f(&self.valid) }
    }

    /// The features only.
    fn features(&self, f: impl Fn(&Tensor) -> Tensor) -> Self {
        Self { teacher: f(&self.teacher), wide: f(&self.wide), ..self.clone() }
    }

    /// A teacher that is the student.
    fn same(student: &Tensor, known: &Self) -> Self {
        Self { teacher: student.clone(), wide: student.clone(), ..known.clone() }
    }
}

impl Loss {
    fn of(self, student: &Tensor, known: &Known) -> Result<Tensor> {
        let Known { teacher, wide, labels, valid } = known;
        match self {
            Loss::Attention(cfg) => attention_transfer(student, wide, valid, &cfg),
            Loss::Mse(cfg) => feature_mse(student, teacher, valid, &cfg),
            Loss::Ifvd(cfg) => ifvd(student, wide, labels, valid, &cfg),
            Loss::Omni(cfg) => omni_contrast(student, teacher, valid, &cfg),
        }
    }
}

fn run(loss: Loss, student: &Tensor, known: &Known) -> (f64, Tensor) {
    value_and_grad(student, 1.0, |s| loss.of(s, known))
}

/// A student, and what its losses compare it with, `keep` of the pixels valid.
fn maps(seed: u64, [n, d, h, w]: [usize; 4], keep: f64) -> (Tensor, Known) {
    let features = |name, d| (random_f64(seed, name, &[n, d, h, w]) * 2.0).unwrap();
    let known = Known {
        teacher: features("teacher", d),
        wide: features("wide", d + 3),
        labels: map(n, h, w, |i, y, x| ((i + y / 2 * 3 + x / 3 + x * y % 5 / 4) % N_CLASSES) as u8),
        valid: random_mask(seed, n, h, w, keep),
    };
    (features("student", d), known)
}

#[test]
fn equals_pytorch() {
    let cases = fixture("features");
    assert_eq!(cases.len(), 8);
    for (case_name, case) in &cases {
        for (name, loss) in LOSSES {
            let expected = scalar(&case[&format!("{name}.loss")]);
            let expected_grad = &case[&format!("{name}.grad_of_30_loss")];
            for (dtype, tolerance) in [(DType::F64, 1e-9), (DType::F32, 1e-5)] {
                let cast = |t: &Tensor| t.to_dtype(dtype).unwrap();
                let part = |part: &str| case[part].clone();
                let known = Known {
                    teacher: part("teacher"),
                    wide: part("wide"),
                    labels: part("labels"),
                    valid: part("valid"),
                }
                .features(cast);
                let (value, grad) = value_and_grad(&cast(&case["student"]), 30.0, |s| loss.of(s, &known));
                let what = format!("{name} of {case_name} in {dtype:?}");
                assert!((value - expected).abs() <= tolerance * expected.abs(), "{what}: {value}, {expected}");
                if elements(expected_grad).iter().all(|g| *g == 0.0) {
                    assert!(elements(&grad).iter().all(|g| *g == 0.0), "{what}: no gradient");
                    continue;
                }
                let off = relative_error(&grad, expected_grad).unwrap();
                assert!(off < tolerance, "{what}: gradient off by {off:.1e}");
            }
        }
    }
}

/// The definitions, in loops.
fn naive(loss: Loss, student: &Tensor, known: &Known) -> f64 {
    let (n, _, h, w) = student.dims4().unwrap();
    let m = h * w;
    let (valid, labels) = (bytes(&known.valid), bytes(&known.labels));
    // The features of each pixel of the batch.
    let vectors = |map: &Tensor| -> Vec<Vec<f64>> {
        let d = map.dim(1).unwrap();
        let z = elements(map);
        (0..n * m).map(|p| (0..d).map(|k| z[(p / m * d + k) * m + p % m]).collect()).collect()
    };
    let (s, t, wide) = (vectors(student), vectors(&known.teacher), vectors(&known.wide));
    let pixels: Vec<usize> = (0..n * m).filter(|&p| valid[p] == 1).collect();
    let count = pixels.len() as f64;
    let norm = |v: &[f64]| v.iter().map(|x| x * x).sum::<f64>().sqrt();
    match loss {
        Loss::Attention(AttentionTransfer { power }) => {
            let mut sum = 0.0;
            for image in 0..n {
                let of = |map: &[Vec<f64>]| -> Vec<f64> {
                    let pixels = pixels.iter().filter(|&p| p / m == image);
                    let mean = |v: &Vec<f64>| v.iter().map(|f| f.abs().powf(power)).sum::<f64>() / v.len() as f64;
                    let a: Vec<f64> = pixels.map(|&p| mean(&map[p])).collect();
                    a.iter().map(|x| x / norm(&a)).collect()
                };
                sum += of(&s).iter().zip(of(&wide)).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
            }
            sum / count
        }
        Loss::Mse(FeatureMse { normaliser }) => {
            let sum: f64 =
                pixels.iter().map(|&p| s[p].iter().zip(&t[p]).map(|(a, b)| (a - b).powi(2)).sum::<f64>()).sum();
            match normaliser {
                MseNormaliser::Mean => sum / count / s[0].len() as f64,
                MseNormaliser::SumPerImage => sum / n as f64,
            }
        }
        Loss::Ifvd(_) => {
            let cosine = |map: &[Vec<f64>], pixel: usize| {
                let mut sum = vec![0.0; map[pixel].len()];
                for &p in pixels.iter().filter(|&&p| p / m == pixel / m && labels[p] == labels[pixel]) {
                    sum.iter_mut().zip(&map[p]).for_each(|(sum, f)| *sum += f);
                }
                let dot: f64 = sum.iter().zip(&map[pixel]).map(|(a, b)| a * b).sum();
                dot / norm(&sum) / norm(&map[pixel])
            };
            pixels.iter().map(|&p| (cosine(&s, p) - cosine(&wide, p)).powi(2)).sum::<f64>() / count
        }
        Loss::Omni(OmniContrast { patch, groups, temperature }) => {
            let whole = |p: &&usize| **p / w % h < h / patch * patch && **p % w < w / patch * patch;
            let pixels: Vec<usize> = pixels.iter().filter(whole).copied().collect();
            let cell = |p: usize| (p / m, p / w % h / patch, p % w / patch);
            let size = s[0].len() / groups;
            let apart = |i: usize, g: usize, j: usize, k: usize| -> f64 {
                let (a, b) = (&s[i][g * size..][..size], &t[j][k * size..][..size]);
                a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f64>() / temperature
            };
            let mut sum = 0.0;
            for &i in &pixels {
                for g in 0..groups {
                    let positive = apart(i, g, i, g);
                    let mut ratio = 1.0;
                    for &j in pixels.iter().filter(|&&j| cell(j) == cell(i)) {
                        ratio +=
                            (0..groups).filter(|&k| k != g).map(|k| (positive - apart(i, g, j, k)).exp()).sum::<f64>();
                    }
                    sum += ratio.ln();
                }
            }
            sum / pixels.len() as f64
        }
    }
}

#[test]
fn equals_a_naive_loop() {
    // The last size has more pixels than one task takes, and a ragged rest.
    for dims in [[1, 4, 4, 4], [3, 8, 7, 6], [1, 4, 35, 33]] {
        for keep in [1.0, 0.7] {
            let (student, known) = maps(1, dims, keep);
            for (name, loss) in LOSSES {
                let (value, expected) = (run(loss, &student, &known).0, naive(loss, &student, &known));
                assert!((value - expected).abs() < 1e-11 * expected, "{name}: {value}, {expected}");
                // Without a gradient to form, the same number.
                assert_eq!(scalar(&loss.of(&student, &known).unwrap()), value, "{name}");
            }
        }
    }
    // Af-DCD's own setting: groups of two channels, 256 vectors a patch.
    let (student, known) = maps(2, [1, 32, 9, 8], 0.8);
    for valid in [known.valid.clone(), known.valid.ones_like().unwrap()] {
        let known = Known { valid, ..known.clone() };
        let loss = Loss::Omni(OmniContrast::default());
        let (value, expected) = (run(loss, &student, &known).0, naive(loss, &student, &known));
        assert!((value - expected).abs() < 1e-11 * expected, "{value}, {expected}");
    }
}

#[test]
fn gradient_equals_central_differences() {
    let dims = [2, 4, 5, 6];
    for keep in [1.0, 0.7] {
        let (student, known) = maps(3, dims, keep);
        let odd_powers = [1.0, 1.5].map(|power| ("", Loss::Attention(AttentionTransfer { power })));
        for (name, loss) in LOSSES.into_iter().chain(odd_powers) {
            // Differences of a softmax as sharp as Af-DCD's lose digits; PyTorch's values are its check.
            let blunt = match loss {
                Loss::Omni(cfg) => Loss::Omni(OmniContrast { temperature: cfg.temperature.max(1.0), ..cfg }),
                other => other,
            };
            check_gradient(
                std::slice::from_ref(&student),
                // Times the pixels: elements of order 1, so that the tolerance is a relative one.
                |s| Ok((as_ops(blunt.of(&s[0], &known))? * 60.0)?),
                1000,
                if name == "feature_mse_sum" { 1e-6 } else { 1e-7 },
            )
            .unwrap();
        }
    }
}

#[test]
fn a_student_like_its_teacher_has_nothing_to_learn() {
    let (student, known) = maps(4, [2, 8, 23, 29], 0.8);
    for dtype in [DType::F64, DType::F32] {
        let student = student.to_dtype(dtype).unwrap();
        let known = Known::same(&student, &known);
        for (name, loss) in LOSSES {
            let (value, grad) = run(loss, &student, &known);
            let most = elements(&grad).iter().fold(0.0, |most: f64, g| most.max(g.abs()));
            match loss {
                // Its negatives are at hand, and push.
                Loss::Omni(_) => assert!(value > 0.0 && most > 0.0, "{name}: {value}, {most}"),
                _ => assert!(value == 0.0 && most == 0.0, "{name}: {value}, {most}"),
            }
        }
    }
}

#[test]
fn groups_that_are_far_apart_contrast_with_none() {
    // Each group lives at a level of its own: negatives are 10 away, 143 temperatures.
    let (n, d, h, w) = (1, 32, 8, 8);
    let levels: Vec<f64> = (0..d).map(|k| (k / 2) as f64 * 10.0).collect();
    let levels = Tensor::from_vec(levels, (1, d, 1, 1), &Device::Cpu).unwrap();
    let (near, known) = maps(5, [n, d, h, w], 1.0);
    let student = levels.broadcast_as((n, d, h, w)).unwrap().add(&(near * 0.01).unwrap()).unwrap();
    let known = Known::same(&student, &known);
    let (value, grad) = run(Loss::Omni(OmniContrast::af_dcd()), &student, &known);
    assert!((0.0..1e-50).contains(&value), "{value}");
    assert!(elements(&grad).iter().all(|g| g.abs() < 1e-50));
}

#[test]
fn scales_that_do_not_matter_do_not_matter() {
    let (student, known) = maps(6, [2, 4, 6, 5], 0.8);
    // Powers of two: no rounding of their own.
    let double = |z: &Tensor| (z * 2.0).unwrap();
    for (name, loss) in LOSSES {
        let (value, grad) = run(loss, &student, &known);
        match loss {
            Loss::Attention(_) | Loss::Ifvd(_) => {
                let (same, half) = run(loss, &double(&student), &known.features(double));
                assert!((value - same).abs() < 1e-14 * value, "{name}: {value}, {same}");
                assert_close(&(half * 2.0).unwrap(), &grad, 1e-14, "rounding");
                // Euler: a function of degree 0 has no slope along its argument.
                assert!(scalar(&(&grad * &student).unwrap().sum_all().unwrap()).abs() < 1e-15, "{name}");
            }
            Loss::Mse(_) => {
                let (four_fold, _) = run(loss, &double(&student), &known.features(double));
                assert!((four_fold - 4.0 * value).abs() < 1e-14 * four_fold);
            }
            Loss::Omni(cfg) => {
                let warm = Loss::Omni(OmniContrast { temperature: 2.0 * cfg.temperature, ..cfg });
                let (same, _) = run(warm, &double(&student), &known.features(double));
                assert!((value - same).abs() < 1e-14 * value, "{name}: {value}, {same}");
            }
        }
    }
}

#[test]
fn void_pixels_move_nothing() {
    let (n, d, h, w) = (2, 4, 25, 27);
    let (student, known) = maps(7, [n, d, h, w], 0.6);
    let valid = bytes(&known.valid);
    let hidden: Vec<u8> = bytes(&known.labels).iter().zip(&valid).map(|(&y, &v)| if v == 1 { y } else { 77 }).collect();
    let hidden = Tensor::from_vec(hidden, (n, h, w), &Device::Cpu).unwrap();
    let spoiled = |z: &Tensor, spoil: f64| {
        let counted = known.valid.unsqueeze(1).unwrap().broadcast_as(z.dims()).unwrap();
        counted.where_cond(z, &z.ones_like().unwrap().affine(spoil, 0.0).unwrap()).unwrap()
    };
    for dtype in [DType::F64, DType::F32] {
        let cast = |z: &Tensor| z.to_dtype(dtype).unwrap();
        for spoil in [f64::NAN, f64::INFINITY, 1e30] {
            for (name, loss) in LOSSES {
                let (value, grad) = run(loss, &cast(&student), &known.features(cast));
                let other = Known { labels: hidden.clone(), ..known.features(|z| cast(&spoiled(z, spoil))) };
                let (same, same_grad) = run(loss, &cast(&spoiled(&student, spoil)), &other);
                assert!(value > 1e-5 && value == same, "{name}: {value}, {same}");
                assert_close(&same_grad, &grad, 0.0, "the same numbers");
                let side = if let Loss::Omni(cfg) = loss { cfg.patch } else { 1 };
                let m = h * w;
                for (at, g) in elements(&grad).iter().enumerate() {
                    let (row, column) = (at % m / w, at % w);
                    let whole = row < h / side * side && column < w / side * side;
                    let counted = valid[at / (d * m) * m + at % m] == 1 && whole;
                    // Sharp contrasts may have no gradient to speak of, the others always do.
                    assert!(*g == 0.0 || counted, "{name}: element {at}");
                    assert!(*g != 0.0 || !counted || matches!(loss, Loss::Omni(_)), "{name}: element {at}");
                }
            }
        }
    }
}

#[test]
fn nothing_valid_is_zero_with_zero_gradient() {
    let (student, known) = maps(8, [2, 4, 4, 5], 0.0);
    for (name, loss) in LOSSES {
        let (value, grad) = run(loss, &student, &known);
        assert!(value == 0.0 && elements(&grad).iter().all(|&g| g == 0.0), "{name}");
        assert_eq!(scalar(&loss.of(&student, &known).unwrap()), 0.0);
    }
    // The only valid pixels lie after the last whole patch.
    let corner = map(2, 4, 5, |_, _, x| u8::from(x == 4));
    let (value, grad) = run(LOSSES[5].1, &student, &Known { valid: corner, ..known });
    assert!(value == 0.0 && elements(&grad).iter().all(|&g| g == 0.0));
}

#[test]
fn features_of_zero_are_safe() {
    let (student, known) = maps(9, [2, 4, 6, 5], 0.9);
    let zero = student.zeros_like().unwrap();
    for (name, loss) in LOSSES {
        for (s, known) in [(&zero, known.clone()), (&student, known.features(|z| z.zeros_like().unwrap()))] {
            let (value, grad) = run(loss, s, &known);
            assert!(value.is_finite() && elements(&grad).iter().all(|g| g.is_finite()), "{name}: {value}");
        }
        if let Loss::Attention(_) | Loss::Ifvd(_) = loss {
            let (value, grad) = run(loss, &zero, &known);
            assert!(value > 0.0 && elements(&grad).iter().all(|g| *g == 0.0), "{name}");
        }
    }
}

#[test]
fn a_batch_is_made_of_its_items_as_the_normaliser_says() {
    let (n, d, h, w) = (3, 4, 8, 8);
    let (student, known) = maps(10, [n, d, h, w], 1.0);
    // The second image has no pixel that counts.
    let valid = map(n, h, w, |i, y, x| u8::from(i != 1 && (i + y * 2 + x) % 3 != 0));
    let known = Known { valid, ..known };
    let total: f64 = bytes(&known.valid).iter().map(|&v| f64::from(v)).sum();
    for (name, loss) in LOSSES {
        let (value, grad) = run(loss, &student, &known);
        let mut sum = 0.0;
        for i in 0..n {
            let item = |t: &Tensor| t.narrow(0, i, 1).unwrap();
            let count: f64 = bytes(&item(&known.valid)).iter().map(|&v| f64::from(v)).sum();
            let weight = match loss {
                Loss::Mse(FeatureMse { normaliser: MseNormaliser::SumPerImage }) => 1.0 / n as f64,
                _ => count / total,
            };
            let (alone, alone_grad) = run(loss, &item(&student), &known.each(item));
            sum += weight * alone;
            assert_close(&item(&grad), &(alone_grad * weight).unwrap(), 1e-14, "the order of a product");
        }
        assert!((value - sum).abs() < 1e-13 * value, "{name}: {value}, {sum}");
    }
}

#[test]
fn permuting_channels_permutes_the_gradient() {
    let (student, known) = maps(11, [2, 4, 4, 6], 0.8);
    // Whole groups of one or two channels: omni-contrast keeps groups together.
    let order = Tensor::new(&[2u32, 3, 0, 1], &Device::Cpu).unwrap();
    let moved = |z: &Tensor| z.index_select(&order, 1).unwrap();
    for (name, loss) in LOSSES {
        let (value, grad) = run(loss, &student, &known);
        let (moved_value, moved_grad) =
            run(loss, &moved(&student), &Known { teacher: moved(&known.teacher), ..known.clone() });
        assert!((value - moved_value).abs() < 1e-14 * value.max(1.0), "{name}");
        assert_close(&moved_grad, &moved(&grad), 1e-13, "order of sums");
        assert!(relative_error(&moved_grad, &grad).unwrap() > 0.1, "{name}: the permutation is seen");
    }
}

#[test]
fn renaming_classes_changes_nothing() {
    let (student, known) = maps(12, [2, 4, 6, 7], 0.8);
    let loss = Loss::Ifvd(Ifvd { n_classes: 200 });
    let renamed: Vec<u8> = bytes(&known.labels).iter().map(|&y| [199, 0, 17, 3][usize::from(y)]).collect();
    let renamed = Known { labels: Tensor::from_vec(renamed, (2, 6, 7), &Device::Cpu).unwrap(), ..known.clone() };
    let (value, grad) = run(LOSSES[4].1, &student, &known);
    let (same, same_grad) = run(loss, &student, &renamed);
    assert_eq!(value, same);
    assert_close(&same_grad, &grad, 0.0, "the same numbers");
}

#[test]
fn a_class_of_one_pixel_is_like_itself() {
    let (student, known) = maps(13, [1, 4, 1, 3], 1.0);
    let labels = map(1, 1, 3, |_, _, x| x as u8);
    let (value, grad) = run(LOSSES[4].1, &student, &Known { labels, ..known });
    assert!(value < 1e-30 && elements(&grad).iter().all(|g| g.abs() < 1e-15), "{value}");
}

#[test]
fn the_teacher_gets_no_gradient() {
    let (student, known) = maps(14, [1, 4, 4, 4], 1.0);
    for (name, loss) in LOSSES {
        let [student, teacher, wide] = [&student, &known.teacher, &known.wide].map(|t| Var::from_tensor(t).unwrap());
        let known = Known { teacher: teacher.as_tensor().clone(), wide: wide.as_tensor().clone(), ..known.clone() };
        let grads = loss.of(&student, &known).unwrap().backward().unwrap();
        assert!(grads.get(&student).is_some() && grads.get(&teacher).is_none() && grads.get(&wide).is_none(), "{name}");
    }
}

#[test]
fn layout_of_the_features_does_not_matter() {
    let (n, h, w, d) = (2, 4, 5, 4);
    let (_, known) = maps(15, [n, d, h, w], 0.8);
    let nhwc = random_f64(15, "nhwc", &[n + 1, h, w, d]);
    let strided = |z: &Tensor| z.permute((0, 3, 1, 2)).unwrap().narrow(0, 1, n).unwrap();
    let other = |z: &Tensor| z.transpose(2, 3).unwrap().force_contiguous().unwrap().transpose(2, 3).unwrap();
    for (name, loss) in LOSSES {
        let (value, grad) = run(loss, &strided(&nhwc).force_contiguous().unwrap(), &known);
        let (same, same_grad) = value_and_grad(&nhwc, 1.0, |s| loss.of(&strided(s), &known.features(other)));
        assert_eq!(value, same, "{name}");
        assert_close(&strided(&same_grad), &grad, 0.0, "the same numbers");
    }
}

#[test]
fn thread_count_changes_no_bit() {
    let (student, known) = maps(16, [2, 8, 53, 47], 0.9);
    for dtype in [DType::F32, DType::F64] {
        let cast = |z: &Tensor| z.to_dtype(dtype).unwrap();
        for (_, loss) in LOSSES {
            assert_same_on_all_pools(|| run(loss, &cast(&student), &known.features(cast)));
        }
    }
}

#[test]
fn every_device_gives_the_same() {
    let (student, known) = maps(17, [2, 4, 17, 13], 0.8);
    for (name, loss) in LOSSES {
        let (expected, expected_grad) = run(loss, &student, &known);
        for device in devices() {
            let here = |t: &Tensor| t.to_device(&device).unwrap();
            let (value, grad) = run(loss, &here(&student), &known.each(here));
            assert!(grad.device().same_device(&device), "{name}");
            assert_eq!(value, expected, "{name}");
            assert_eq!(relative_error(&grad, &expected_grad).unwrap(), 0.0, "{name}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let (student, known) = maps(18, [2, 4, 4, 5], 1.0);
    for (name, loss) in LOSSES {
        let refused = |student: &Tensor, known: &Known| loss.of(student, known).unwrap_err();
        let turned = |z: &Tensor| z.transpose(2, 3).unwrap();
        let text = refused(&student, &known.features(turned)).to_string();
        assert!(text.contains(", 5, 4]") && text.contains(", 4, 5]"), "{text}");
        assert!(name.starts_with(text.split(':').next().unwrap()), "{text}");
        let narrow = known.features(|z| z.to_dtype(DType::F32).unwrap());
        assert!(matches!(refused(&student, &narrow), LossError::DType { .. }));
        let short = Known { valid: map(2, 5, 4, |_, _, _| 1), ..known.clone() };
        assert!(matches!(refused(&student, &short), LossError::Shape { .. }));
        let no_mask = Known { valid: map(2, 4, 5, |_, _, x| x as u8), ..known.clone() };
        assert!(matches!(refused(&student, &no_mask), LossError::Mask { row: 0, column: 2, value: 2, .. }));
    }
    let config = |loss: Loss| {
        let error = loss.of(&student, &known).unwrap_err();
        assert!(matches!(error, LossError::Config { .. }), "{loss:?}: {error}");
        error.to_string()
    };
    for power in [0.5, 0.0, -2.0, f64::NAN, f64::INFINITY] {
        assert!(config(Loss::Attention(AttentionTransfer { power })).contains("power"));
    }
    let omni = OmniContrast { patch: 4, groups: 2, temperature: 0.07 };
    for temperature in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert!(config(Loss::Omni(OmniContrast { temperature, ..omni })).contains("temperature"));
    }
    for groups in [0, 1, 3, 8] {
        assert!(config(Loss::Omni(OmniContrast { groups, ..omni })).contains("groups"));
    }
    assert!(config(Loss::Omni(OmniContrast { patch: 0, ..omni })).contains("patch"));
    assert!(config(Loss::Ifvd(Ifvd { n_classes: 0 })).contains("n_classes"));
    let coarse = Loss::Omni(OmniContrast { patch: 5, ..omni }).of(&student, &known).unwrap_err();
    assert!(matches!(coarse, LossError::Shape { .. }), "{coarse}");
}

#[test]
fn a_label_that_is_no_class_is_named_with_its_place() {
    let (student, known) = maps(19, [2, 4, 4, 5], 1.0);
    let labels = map(2, 4, 5, |i, y, x| if (i, y, x) == (1, 2, 3) { 4 } else { 3 });
    let error = LOSSES[4].1.of(&student, &Known { labels, ..known.clone() }).unwrap_err();
    assert!(matches!(error, LossError::Label { image: 1, row: 2, column: 3, value: 4, n_classes: 4 }), "{error}");
    let wide = Known { labels: known.labels.to_dtype(DType::U32).unwrap(), ..known.clone() };
    assert!(matches!(LOSSES[4].1.of(&student, &wide), Err(LossError::DType { tensor: "labels_nhw", .. })));
    let turned = Known { labels: map(2, 5, 4, |_, _, _| 0), ..known };
    assert!(matches!(LOSSES[4].1.of(&student, &turned), Err(LossError::Shape { .. })));
}

#[test]
fn non_finite_features_are_seen_in_the_loss() {
    let (student, known) = maps(20, [1, 4, 4, 4], 1.0);
    let spoiled = |z: &Tensor, place: usize| {
        let mut values = elements(z);
        values[place] = f64::NAN;
        Tensor::from_vec(values, z.dims(), &Device::Cpu).unwrap()
    };
    for (name, loss) in LOSSES {
        for place in 0..64 {
            let of_student = scalar(&loss.of(&spoiled(&student, place), &known).unwrap());
            let of_teacher = scalar(&loss.of(&student, &known.features(|z| spoiled(z, place))).unwrap());
            assert!(of_student.is_nan() && of_teacher.is_nan(), "{name}: {of_student}, {of_teacher} at {place}");
        }
    }
}

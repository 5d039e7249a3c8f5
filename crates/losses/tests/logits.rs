//! The losses between two networks' logits (pixel-wise and channel-wise divergence, soft cross entropy, DIST) against
//! PyTorch, naive loops, finite differences and their laws.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::{as_ops, assert_same_on_all_pools, bytes, elements, fixture, map, random_mask, scalar, value_and_grad};
use segdistill_losses::{
    ChannelKl, Dist, KlNormaliser, LossError, PixelKl, Result, SoftCrossEntropy, channel_kl, dist, pixel_kl,
    soft_cross_entropy,
};
use segdistill_ops::testing::{assert_close, check_gradient, devices, random_f64, relative_error};

/// A loss with its settings.
#[derive(Clone, Copy, Debug)]
enum Loss {
    Pixel(PixelKl),
    Soft(SoftCrossEntropy),
    Channel(ChannelKl),
    Dist(Dist),
}

use KlNormaliser::{ImageSum, MeanPixel};

const fn pixel(temperature: f64, normaliser: KlNormaliser) -> Loss {
    Loss::Pixel(PixelKl { temperature, normaliser })
}

const fn soft(temperature: f64, normaliser: KlNormaliser) -> Loss {
    Loss::Soft(SoftCrossEntropy { temperature, normaliser })
}

/// As the fixture names them.
const LOSSES: [(&str, Loss); 8] = [
    ("pixel_kl_1", pixel(1.0, MeanPixel)),
    ("pixel_kl_3_image_sum", pixel(3.0, ImageSum)),
    ("soft_cross_entropy_1_image_sum", soft(1.0, ImageSum)),
    ("soft_cross_entropy_2", soft(2.0, MeanPixel)),
    ("channel_kl_1", Loss::Channel(ChannelKl { temperature: 1.0 })),
    ("channel_kl_4", Loss::Channel(ChannelKl { temperature: 4.0 })),
    ("dist_1", Loss::Dist(Dist { inter: 1.0, intra: 1.0, temperature: 1.0 })),
    ("dist_2_weighted", Loss::Dist(Dist { inter: 0.5, intra: 3.0, temperature: 2.0 })),
];

impl Loss {
    fn of(self, student: &Tensor, teacher: &Tensor, valid: &Tensor) -> Result<Tensor> {
        match self {
            Loss::Pixel(cfg) => pixel_kl(student, teacher, valid, &cfg),
            Loss::Soft(cfg) => soft_cross_entropy(student, teacher, valid, &cfg),
            Loss::Channel(cfg) => channel_kl(student, teacher, valid, &cfg),
            Loss::Dist(cfg) => dist(student, teacher, valid, &cfg),
        }
    }

    fn at_temperature(self, temperature: f64) -> Self {
        match self {
            Loss::Pixel(cfg) => Loss::Pixel(PixelKl { temperature, ..cfg }),
            Loss::Soft(cfg) => Loss::Soft(SoftCrossEntropy { temperature, ..cfg }),
            Loss::Channel(_) => Loss::Channel(ChannelKl { temperature }),
            Loss::Dist(cfg) => Loss::Dist(Dist { temperature, ..cfg }),
        }
    }
}

fn run(loss: Loss, student: &Tensor, teacher: &Tensor, valid: &Tensor) -> (f64, Tensor) {
    value_and_grad(student, 1.0, |s| loss.of(s, teacher, valid))
}

/// Two networks' logits.
fn logits(seed: u64, dims: &[usize]) -> [Tensor; 2] {
    ["student", "teacher"].map(|name| (random_f64(seed, name, dims) * 4.0).unwrap())
}

fn all_valid(n: usize, h: usize, w: usize) -> Tensor {
    map(n, h, w, |_, _, _| 1)
}

#[test]
fn equals_pytorch() {
    let cases = fixture("logits");
    assert_eq!(cases.len(), 10);
    for (case_name, case) in &cases {
        for (name, loss) in LOSSES {
            let expected = scalar(&case[&format!("{name}.loss")]);
            let expected_grad = &case[&format!("{name}.grad_of_30_loss")];
            // Of f32 with nearly equal networks: rounding the fixture's f64 logits moves their small difference.
            let narrow = if case_name == "near" { 2e-4 } else { 1e-5 };
            for (dtype, tolerance) in [(DType::F64, 1e-9), (DType::F32, narrow)] {
                let cast = |part: &str| case[part].to_dtype(dtype).unwrap();
                let (value, grad) =
                    value_and_grad(&cast("student"), 30.0, |s| loss.of(s, &cast("teacher"), &case["valid"]));
                let what = format!("{name} of {case_name} in {dtype:?}");
                assert!((value - expected).abs() <= tolerance * expected.abs() + 1e-15, "{what}: {value}, {expected}");
                if elements(expected_grad).iter().all(|g| g.abs() < 1e-14) {
                    assert!(elements(&grad).iter().all(|g| g.abs() < 1e-14), "{what}: no gradient");
                    continue;
                }
                let off = relative_error(&grad, expected_grad).unwrap();
                assert!(off < tolerance, "{what}: gradient off by {off:.1e}");
            }
        }
    }
}

/// `softmax(z / T)` of some numbers.
fn softmax(z: impl Iterator<Item = f64>, temperature: f64) -> Vec<f64> {
    let e: Vec<f64> = z.map(|z| (z / temperature).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.into_iter().map(|e| e / sum).collect()
}

fn divergence(s: &[f64], t: &[f64]) -> f64 {
    s.iter().zip(t).map(|(s, t)| t * (t / s).ln()).sum()
}

fn correlation(x: &[f64], y: &[f64]) -> f64 {
    let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
    let (mx, my) = (mean(x), mean(y));
    let dot = |f: &dyn Fn(f64, f64) -> f64| x.iter().zip(y).map(|(x, y)| f(x - mx, y - my)).sum::<f64>();
    dot(&|x, y| x * y) / ((dot(&|x, _| x * x) * dot(&|_, y| y * y)).sqrt() + 1e-8)
}

/// The definitions, in loops.
fn naive(loss: Loss, student: &Tensor, teacher: &Tensor, valid: &Tensor) -> f64 {
    let (n, c, h, w) = student.dims4().unwrap();
    let m = h * w;
    let (student, teacher, valid) = (elements(student), elements(teacher), bytes(valid));
    let pixels: Vec<usize> = (0..n * m).filter(|&p| valid[p] == 1).collect();
    let at = |pixel: usize, class: usize| (pixel / m * c + class) * m + pixel % m;
    let rows = |z: &[f64], temperature| -> Vec<Vec<f64>> {
        pixels.iter().map(|&p| softmax((0..c).map(|k| z[at(p, k)]), temperature)).collect()
    };
    let share = |normaliser| match normaliser {
        MeanPixel => 1.0 / pixels.len() as f64,
        ImageSum => 1.0 / m as f64,
    };
    match loss {
        Loss::Pixel(PixelKl { temperature, normaliser }) => {
            let (s, t) = (rows(&student, temperature), rows(&teacher, temperature));
            let sum: f64 = s.iter().zip(&t).map(|(s, t)| divergence(s, t)).sum();
            sum * temperature.powi(2) * share(normaliser)
        }
        Loss::Soft(SoftCrossEntropy { temperature, normaliser }) => {
            let (s, t) = (rows(&student, temperature), rows(&teacher, temperature));
            let entropy = |(s, t): (&Vec<f64>, &Vec<f64>)| -> f64 { s.iter().zip(t).map(|(s, t)| -t * s.ln()).sum() };
            s.iter().zip(&t).map(entropy).sum::<f64>() * temperature.powi(2) * share(normaliser)
        }
        Loss::Channel(ChannelKl { temperature }) => {
            let mut sum = 0.0;
            for image in 0..n {
                let pixels: Vec<usize> = pixels.iter().copied().filter(|p| p / m == image).collect();
                for class in 0..c {
                    let of = |z: &[f64]| softmax(pixels.iter().map(|&p| z[at(p, class)]), temperature);
                    sum += divergence(&of(&student), &of(&teacher));
                }
            }
            sum * temperature.powi(2) / (n * c) as f64
        }
        Loss::Dist(Dist { inter, intra, temperature }) => {
            let (s, t) = (rows(&student, temperature), rows(&teacher, temperature));
            let of_rows: f64 = s.iter().zip(&t).map(|(s, t)| correlation(s, t)).sum::<f64>() / s.len() as f64;
            let column = |y: &[Vec<f64>], class: usize| y.iter().map(|row| row[class]).collect::<Vec<_>>();
            let of_columns: f64 =
                (0..c).map(|class| correlation(&column(&s, class), &column(&t, class))).sum::<f64>() / c as f64;
            inter * (1.0 - of_rows) + intra * (1.0 - of_columns)
        }
    }
}

#[test]
fn equals_a_naive_loop() {
    // The last two sizes have more pixels than one task takes, and a ragged rest.
    for (n, c, h, w) in [(1, 2, 2, 3), (3, 11, 7, 6), (2, 4, 41, 37), (1, 3, 67, 61)] {
        let [student, teacher] = logits(1, &[n, c, h, w]);
        for valid in [all_valid(n, h, w), random_mask(2, n, h, w, 0.7)] {
            for (name, loss) in LOSSES {
                let (value, expected) =
                    (run(loss, &student, &teacher, &valid).0, naive(loss, &student, &teacher, &valid));
                assert!((value - expected).abs() < 1e-11 * expected, "{name}: {value}, {expected}");
                // Without a gradient to form, the same number.
                assert_eq!(scalar(&loss.of(&student, &teacher, &valid).unwrap()), value, "{name}");
            }
        }
    }
}

#[test]
fn gradient_equals_central_differences() {
    let (n, c, h, w) = (2, 5, 3, 5);
    let [student, teacher] = logits(3, &[n, c, h, w]);
    for valid in [all_valid(n, h, w), random_mask(4, n, h, w, 0.7)] {
        for (_, loss) in LOSSES {
            check_gradient(
                std::slice::from_ref(&student),
                // Times the pixels: elements of order 1, so that the tolerance is a relative one.
                |s| Ok((as_ops(loss.of(&s[0], &teacher, &valid))? * (n * h * w) as f64)?),
                1000,
                1e-8,
            )
            .unwrap();
        }
    }
}

#[test]
fn a_student_like_its_teacher_has_nothing_to_learn() {
    let (n, c, h, w) = (2, 11, 23, 29);
    let valid = random_mask(5, n, h, w, 0.8);
    for dtype in [DType::F64, DType::F32] {
        let teacher = logits(5, &[n, c, h, w])[1].to_dtype(dtype).unwrap();
        // Only differences of logits count: of a pixel's classes, or of a channel's positions.
        let shifted = (&teacher + 0.5).unwrap();
        let rounding = if dtype == DType::F64 { 1e-14 } else { 1e-6 };
        for (name, loss) in LOSSES {
            let (value, grad) = run(loss, &teacher, &teacher, &valid);
            let (same, _) = run(loss, &shifted, &teacher, &valid);
            let most = elements(&grad).iter().fold(0.0, |most: f64, g| most.max(g.abs()));
            match loss {
                Loss::Soft(_) => assert!(value > 0.1 && most == 0.0, "{name}: the teacher's entropy remains"),
                Loss::Dist(_) => assert!(value < 1e-6 && most < 1e-8, "{name}: {value}, {most}: the authors' epsilon"),
                _ => assert!(value == 0.0 && most == 0.0, "{name}: {value}, {most}"),
            }
            assert!((same - value).abs() <= rounding * value.max(1.0), "{name}: {value}, {same}");
        }
    }
}

#[test]
fn soft_cross_entropy_is_the_divergence_and_the_entropy_of_the_teacher() {
    let [student, teacher] = logits(6, &[2, 7, 5, 4]);
    let valid = random_mask(7, 2, 5, 4, 0.7);
    for (temperature, normaliser) in [(1.0, ImageSum), (1.0, MeanPixel), (2.5, MeanPixel)] {
        let (kl, kl_grad) = run(pixel(temperature, normaliser), &student, &teacher, &valid);
        let (soft_value, soft_grad) = run(soft(temperature, normaliser), &student, &teacher, &valid);
        let (entropy, _) = run(soft(temperature, normaliser), &teacher, &teacher, &valid);
        assert!((kl + entropy - soft_value).abs() < 1e-13 * soft_value, "{kl} + {entropy}, {soft_value}");
        assert_close(&soft_grad, &kl_grad, 0.0, "the same numbers");
    }
}

#[test]
fn void_pixels_move_nothing() {
    let (n, c, h, w) = (2, 6, 25, 27);
    let [student, teacher] = logits(8, &[n, c, h, w]);
    let valid = random_mask(9, n, h, w, 0.6);
    let counted = valid.unsqueeze(1).unwrap().broadcast_as((n, c, h, w)).unwrap();
    for dtype in [DType::F64, DType::F32] {
        for spoil in [f64::NAN, f64::INFINITY, 1e30] {
            let cast = |z: &Tensor| z.to_dtype(dtype).unwrap();
            let spoiled =
                |z: &Tensor| cast(&counted.where_cond(z, &z.ones_like().unwrap().affine(spoil, 0.0).unwrap()).unwrap());
            for (name, loss) in LOSSES {
                let (value, grad) = run(loss, &cast(&student), &cast(&teacher), &valid);
                let (same, same_grad) = run(loss, &spoiled(&student), &spoiled(&teacher), &valid);
                assert!(value > 0.05 && value == same, "{name}: {value}, {same}");
                assert_close(&same_grad, &grad, 0.0, "the same numbers");
                let shares = elements(&counted.to_dtype(DType::F64).unwrap());
                for (g, v) in elements(&grad).iter().zip(&shares) {
                    assert_eq!(*g != 0.0, *v == 1.0, "{name}: void pixels, and only they, have no gradient");
                }
            }
        }
    }
}

#[test]
fn nothing_valid_is_zero_with_zero_gradient() {
    let [student, teacher] = logits(10, &[2, 3, 4, 4]);
    let none = map(2, 4, 4, |_, _, _| 0);
    for (name, loss) in LOSSES {
        let (value, grad) = run(loss, &student, &teacher, &none);
        assert!(value == 0.0 && elements(&grad).iter().all(|&g| g == 0.0), "{name}");
        assert_eq!(scalar(&loss.of(&student, &teacher, &none).unwrap()), 0.0);
    }
}

#[test]
fn a_batch_is_made_of_its_items_as_the_normaliser_says() {
    let (n, c, h, w) = (3, 4, 5, 6);
    let [student, teacher] = logits(11, &[n, c, h, w]);
    // The second image has no pixel that counts.
    let valid = map(n, h, w, |i, y, x| u8::from(i != 1 && (i + y * 2 + x) % 3 != 0));
    let total: f64 = bytes(&valid).iter().map(|&v| f64::from(v)).sum();
    for (name, loss) in LOSSES {
        let (value, grad) = run(loss, &student, &teacher, &valid);
        let mut sum = 0.0;
        for i in 0..n {
            let item = |t: &Tensor| t.narrow(0, i, 1).unwrap();
            let count: f64 = bytes(&item(&valid)).iter().map(|&v| f64::from(v)).sum();
            let weight = match loss {
                Loss::Pixel(PixelKl { normaliser, .. }) | Loss::Soft(SoftCrossEntropy { normaliser, .. }) => {
                    if normaliser == MeanPixel {
                        count / total
                    } else {
                        1.0
                    }
                }
                Loss::Channel(_) => 1.0 / n as f64,
                Loss::Dist(_) => continue,
            };
            let (alone, alone_grad) = run(loss, &item(&student), &item(&teacher), &item(&valid));
            sum += weight * alone;
            assert_close(&item(&grad), &(alone_grad * weight).unwrap(), 1e-14, "the order of a product");
        }
        if let Loss::Dist(_) = loss {
            // One matrix of the whole batch: three images are one image of three times the rows.
            let tall = |z: &Tensor| z.permute((1, 0, 2, 3)).unwrap().reshape((1, c, n * h, w)).unwrap();
            let tall_valid = valid.reshape((1, n * h, w)).unwrap();
            let (one, one_grad) = run(loss, &tall(&student), &tall(&teacher), &tall_valid);
            assert!((value - one).abs() < 1e-14, "{name}: {value}, {one}");
            assert_close(&one_grad, &tall(&grad), 1e-15, "the order of sums");
        } else {
            assert!((value - sum).abs() < 1e-13 * value, "{name}: {value}, {sum}");
        }
    }
}

#[test]
fn permuting_classes_permutes_the_gradient() {
    let (n, c, h, w) = (2, 5, 3, 4);
    let order = Tensor::new(&[3u32, 0, 4, 1, 2], &Device::Cpu).unwrap();
    let [student, teacher] = logits(12, &[n, c, h, w]);
    let valid = random_mask(13, n, h, w, 0.8);
    let moved = |z: &Tensor| z.index_select(&order, 1).unwrap();
    for (name, loss) in LOSSES {
        let (value, grad) = run(loss, &student, &teacher, &valid);
        let (moved_value, moved_grad) = run(loss, &moved(&student), &moved(&teacher), &valid);
        assert!((value - moved_value).abs() < 1e-14 * value.max(1.0), "{name}");
        assert_close(&moved_grad, &moved(&grad), 1e-14, "order of a sum of 5");
        assert!(relative_error(&moved_grad, &grad).unwrap() > 0.1, "{name}: the permutation is seen");
    }
}

#[test]
fn a_gradient_sums_to_zero_where_a_shift_changes_nothing() {
    let [student, teacher] = logits(14, &[2, 7, 4, 5]);
    let valid = random_mask(15, 2, 4, 5, 0.8);
    for (name, loss) in LOSSES {
        let (_, grad) = run(loss, &student, &teacher, &valid);
        let sums = match loss {
            Loss::Channel(_) => grad.sum((2, 3)).unwrap(),
            _ => grad.sum(1).unwrap(),
        };
        assert!(elements(&sums).iter().all(|s| s.abs() < 1e-14), "{name}");
    }
}

#[test]
fn large_logits_do_not_overflow() {
    let valid = all_valid(1, 3, 3);
    for dtype in [DType::F64, DType::F32] {
        let [student, teacher] = logits(16, &[1, 4, 3, 3]).map(|z| (z * 1e4).unwrap().to_dtype(dtype).unwrap());
        for (name, loss) in LOSSES {
            let (value, grad) = run(loss, &student, &teacher, &valid);
            assert!(value.is_finite() && elements(&grad).iter().all(|g| g.is_finite()), "{name} {dtype:?}: {value}");
        }
    }
}

/// Pearson's correlation has no value where all numbers are equal; ours is 0 there, and says nothing.
#[test]
fn dist_of_equal_numbers_is_blind() {
    let loss = LOSSES[6].1;
    for dtype in [DType::F64, DType::F32] {
        let [student, teacher] = logits(17, &[2, 7, 31, 33]).map(|z| z.to_dtype(dtype).unwrap());
        let valid = random_mask(18, 2, 31, 33, 0.9);
        // A head that starts at 0, and a teacher that knows nothing: all correlations are 0, in all rows and columns.
        let flat = student.affine(0.0, 0.3).unwrap();
        for (s, t) in [(&flat, &teacher), (&student, &flat), (&flat, &flat)] {
            let (value, grad) = run(loss, s, t, &valid);
            assert_eq!(value, 2.0, "{dtype:?}");
            assert!(elements(&grad).iter().all(|g| *g == 0.0), "{dtype:?}");
        }
        // Every counted pixel alike, classes not: rows correlate, columns are constant.
        let alike = student.narrow(2, 0, 1).unwrap().narrow(3, 0, 1).unwrap().broadcast_as(student.dims()).unwrap();
        let first_image = map(2, 31, 33, |i, y, x| u8::from(i == 0 && (x + y) % 5 != 0));
        let columns = Loss::Dist(Dist { inter: 0.0, ..Dist::default() });
        let (value, grad) = run(columns, &alike.contiguous().unwrap(), &teacher, &first_image);
        assert!(value == 1.0 && elements(&grad).iter().all(|g| *g == 0.0), "{dtype:?}: {value}");
    }
}

/// Rare classes and sure pixels, on a map of many tasks: sums in f32 must not eat the digits of small variances.
#[test]
fn f32_keeps_its_digits_on_a_skewed_map() {
    let (n, c, h, w) = (2, 6, 61, 67);
    let offsets = Tensor::new(&[9.0, 4.0, 0.0, -3.0, 1.0, -9.0], &Device::Cpu).unwrap().reshape((1, c, 1, 1)).unwrap();
    let maps = logits(30, &[n, c, h, w]).map(|z| z.broadcast_add(&offsets).unwrap().to_dtype(DType::F32).unwrap());
    let wide = maps.each_ref().map(|z| z.to_dtype(DType::F64).unwrap());
    let valid = random_mask(31, n, h, w, 0.8);
    for (name, loss) in LOSSES {
        let (value, grad) = run(loss, &maps[0], &maps[1], &valid);
        let (expected, expected_grad) = run(loss, &wide[0], &wide[1], &valid);
        assert!((value / expected - 1.0).abs() < 1e-5, "{name}: {value}, {expected}");
        let off = relative_error(&grad, &expected_grad).unwrap();
        assert!(off < 1e-5, "{name}: gradient off by {off:.1e}");
    }
}

#[test]
fn the_teacher_gets_no_gradient() {
    let maps = logits(19, &[1, 4, 3, 3]);
    for (name, loss) in LOSSES {
        let [student, teacher] = maps.each_ref().map(|t| Var::from_tensor(t).unwrap());
        let grads = loss.of(&student, &teacher, &all_valid(1, 3, 3)).unwrap().backward().unwrap();
        assert!(grads.get(&student).is_some() && grads.get(&teacher).is_none(), "{name}");
    }
}

#[test]
fn layout_of_the_logits_does_not_matter() {
    let (n, c, h, w) = (2, 3, 4, 5);
    let [student, teacher] = logits(20, &[n + 1, h, w, c]);
    let strided = |z: &Tensor| z.permute((0, 3, 1, 2)).unwrap().narrow(0, 1, n).unwrap();
    let copy = |z: &Tensor| strided(z).force_contiguous().unwrap();
    let valid = random_mask(21, n, h, w, 0.8);
    for (name, loss) in LOSSES {
        let (value, grad) = run(loss, &copy(&student), &copy(&teacher), &valid);
        let (other, other_grad) = value_and_grad(&student, 1.0, |s| loss.of(&strided(s), &strided(&teacher), &valid));
        assert_eq!(value, other, "{name}");
        assert_close(&strided(&other_grad), &grad, 0.0, "the same numbers");
    }
}

#[test]
fn thread_count_changes_no_bit() {
    let (n, c, h, w) = (2, 6, 53, 47);
    let valid = random_mask(22, n, h, w, 0.9);
    for dtype in [DType::F32, DType::F64] {
        let [student, teacher] = logits(23, &[n, c, h, w]).map(|z| z.to_dtype(dtype).unwrap());
        for (_, loss) in LOSSES {
            assert_same_on_all_pools(|| run(loss, &student, &teacher, &valid));
        }
    }
}

#[test]
fn every_device_gives_the_same() {
    let valid = random_mask(24, 2, 17, 13, 0.8);
    let [student, teacher] = logits(25, &[2, 5, 17, 13]);
    for (name, loss) in LOSSES {
        let (expected, expected_grad) = run(loss, &student, &teacher, &valid);
        for device in devices() {
            let here = |t: &Tensor| t.to_device(&device).unwrap();
            let (value, grad) = run(loss, &here(&student), &here(&teacher), &here(&valid));
            assert!(grad.device().same_device(&device), "{name}");
            assert_eq!(value, expected, "{name}");
            assert_eq!(relative_error(&grad, &expected_grad).unwrap(), 0.0, "{name}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let [student, teacher] = logits(26, &[2, 3, 4, 5]);
    let valid = all_valid(2, 4, 5);
    for (name, loss) in LOSSES {
        let refused = |s: &Tensor, t: &Tensor, v: &Tensor| loss.of(s, t, v).unwrap_err();
        let other = logits(26, &[2, 3, 5, 4]);
        let text = refused(&student, &other[1], &valid).to_string();
        assert!(text.contains("[2, 3, 5, 4]") && text.contains("[2, 3, 4, 5]"), "{text}");
        assert!(name.starts_with(text.split(':').next().unwrap()), "{text}");
        assert!(matches!(refused(&student, &teacher, &all_valid(2, 5, 4)), LossError::Shape { .. }));
        assert!(matches!(refused(&student, &teacher.to_dtype(DType::F32).unwrap(), &valid), LossError::DType { .. }));
        let labels = map(2, 4, 5, |i, y, x| (i + y + x) as u8 % 3);
        assert!(matches!(refused(&student, &teacher, &labels), LossError::Mask { row: 0, column: 2, value: 2, .. }));
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let error = loss.at_temperature(bad).of(&student, &teacher, &valid).unwrap_err();
            assert!(matches!(error, LossError::Config { .. }) && error.to_string().contains("temperature"), "{error}");
        }
    }
    for cfg in [Dist { inter: -1.0, ..Dist::default() }, Dist { intra: f64::NAN, ..Dist::default() }] {
        assert!(matches!(dist(&student, &teacher, &valid, &cfg), Err(LossError::Config { .. })));
    }
}

#[test]
fn non_finite_logits_are_seen_in_the_loss() {
    let [student, teacher] = logits(27, &[1, 3, 2, 2]);
    for (name, loss) in LOSSES {
        for place in 0..12 {
            let mut values = elements(&student);
            values[place] = f64::NAN;
            let spoiled = Tensor::from_vec(values, (1, 3, 2, 2), &Device::Cpu).unwrap();
            for (s, t) in [(&spoiled, &teacher), (&student, &spoiled)] {
                let value = scalar(&loss.of(s, t, &all_valid(1, 2, 2)).unwrap());
                assert!(value.is_nan(), "{name}: {value} with NaN at {place}");
            }
        }
    }
}

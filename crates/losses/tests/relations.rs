//! The relations of SKD and CIRKD against PyTorch, naive loops, finite differences, and their laws.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::{
    as_ops, assert_same_on_all_pools, bytes, elements, fixture, map, random_mask, relative, scalar, value_and_grad,
};
use segdistill_losses::{
    LossError, MemoryContrast, MiniBatchContrast, NodeKind, NodePooling, PairNormaliser, PairSimilarity,
    cirkd_mini_batch, memory_contrast, pair_similarity,
};
use segdistill_ops::testing::{assert_close, check_gradient, random_f64, relative_error};

/// A loss with its settings, of any of the three kinds.
#[derive(Clone, Debug)]
enum Relation {
    Pair(PairSimilarity),
    Batch(MiniBatchContrast),
    Memory(MemoryContrast, Tensor),
}
use Relation::{Batch, Memory, Pair};

impl Relation {
    fn of(&self, student: &Tensor, teacher: &Tensor, valid: &Tensor) -> segdistill_losses::Result<Tensor> {
        match self {
            Pair(cfg) => pair_similarity(student, teacher, valid, cfg),
            Batch(cfg) => cirkd_mini_batch(student, teacher, valid, cfg),
            Memory(cfg, bank) => memory_contrast(student, teacher, &bank.to_dtype(student.dtype())?, valid, cfg),
        }
    }

    fn run(&self, student: &Tensor, teacher: &Tensor, valid: &Tensor) -> (f64, Tensor) {
        value_and_grad(student, 1.0, |s| self.of(s, teacher, valid))
    }
}

const PIXELS: PairSimilarity = PairSimilarity { nodes: None, normaliser: PairNormaliser::Paper, detach_norm: false };

fn pooled(kernel: [usize; 2], kind: NodeKind) -> PairSimilarity {
    PairSimilarity { nodes: Some(NodePooling { kernel, kind }), ..PIXELS }
}

fn batch(temperature: f64, pooling: Option<usize>) -> Relation {
    Batch(MiniBatchContrast { temperature, pooling })
}

/// `b` unit vectors of `d` channels.
fn bank(seed: u64, b: usize, d: usize) -> Tensor {
    let rows = random_f64(seed, "bank", &[b, d]);
    rows.broadcast_div(&rows.sqr().unwrap().sum_keepdim(1).unwrap().sqrt().unwrap()).unwrap()
}

fn memory(seed: u64, b: usize, d: usize) -> Relation {
    Memory(MemoryContrast { temperature: 0.1, kd_temperature: 1.5 }, bank(seed, b, d))
}

/// Every loss once or twice, for features of `d` channels, of which some exceed what one piece of work holds.
fn relations(d: usize) -> Vec<Relation> {
    vec![
        Pair(PIXELS),
        Pair(pooled([2, 3], NodeKind::Max)),
        Pair(pooled([3, 2], NodeKind::Average)),
        batch(0.1, None),
        batch(0.1, Some(3)),
        batch(0.02, None),
        memory(1, 9, d),
        memory(2, 1101, d),
    ]
}

/// Features with a mean, as rectifiers leave it.
fn features(seed: u64, name: &str, shape: &[usize]) -> Tensor {
    (random_f64(seed, name, shape) + 0.3).unwrap()
}

fn all_valid(n: usize, h: usize, w: usize) -> Tensor {
    map(n, h, w, |_, _, _| 1)
}

#[test]
fn equals_pytorch() {
    let cases = fixture("relations");
    assert_eq!(cases.len(), 20);
    for (name, case) in &cases {
        let relation = match name.as_str() {
            "pair_grid_void_detached" => {
                Pair(PairSimilarity { normaliser: PairNormaliser::Code, detach_norm: true, ..PIXELS })
            }
            "pair_max_void" => Pair(pooled([2, 3], NodeKind::Max)),
            "pair_average_void" => Pair(pooled([3, 2], NodeKind::Average)),
            "pair_skd" => Pair(PairSimilarity::skd(9, 7)),
            pair if pair.starts_with("pair") => Pair(PIXELS),
            "batch_cold" => batch(0.02, None),
            "batch_channels_1" => batch(0.5, None),
            "batch_pooled_void" => Batch(MiniBatchContrast::cirkd_v2()),
            batch if batch.starts_with("batch") => Batch(MiniBatchContrast::cirkd()),
            memory => {
                let cfg = match memory {
                    "memory_void" => MemoryContrast { kd_temperature: 2.0, ..MemoryContrast::cirkd() },
                    "memory_first_image_void" => MemoryContrast { temperature: 0.07, ..MemoryContrast::cirkd() },
                    "memory_cold" => MemoryContrast { temperature: 0.02, ..MemoryContrast::cirkd() },
                    _ => MemoryContrast::cirkd(),
                };
                Memory(cfg, case["bank"].clone())
            }
        };
        // Of f32, the value: the fixture's f64 features are rounded, so small differences lose digits on the way in.
        let f32_tolerance = if name == "pair_many_near" { 5e-5 } else { 1e-5 };
        for (dtype, tolerance) in [(DType::F64, 1e-9), (DType::F32, f32_tolerance)] {
            let cast = |part: &str| case[part].to_dtype(dtype).unwrap();
            let (value, grad) =
                value_and_grad(&cast("student"), 1e3, |s| relation.of(s, &cast("teacher"), &case["valid"]));
            let expected = scalar(&case["loss"]);
            if name == "memory_slots_1" {
                // One slot has all the probability.
                assert!(value.abs() < 1e-6 && elements(&grad).iter().all(|g| g.abs() < 1e-3), "{dtype:?}: {value}");
                continue;
            }
            assert!(expected > 1e-5, "{name} says something");
            assert!(relative(value, expected) < tolerance, "{name} {dtype:?}: {value}, {expected}");
            let expected_grad = &case["grad_of_1000_loss"];
            if name.ends_with("channels_1") {
                // One channel: a length, and a sign that no small step changes. Of 1e-8 beside a norm 1e-5 is left.
                assert!(elements(&grad).iter().all(|g| g.abs() < 1e-3), "{name}");
                continue;
            }
            let off = relative_error(&grad, expected_grad).unwrap();
            assert!(off < tolerance, "{name} {dtype:?}: gradient off by {off:.1e}");
        }
    }
}

/// Unit vectors of the counted pixels of each image.
fn units(maps: &Tensor, valid: &Tensor, added: f64) -> Vec<Vec<Vec<f64>>> {
    let (n, d, h, w) = maps.dims4().unwrap();
    let (m, valid) = (h * w, bytes(valid));
    let image = |i: usize| {
        let z = elements(&maps.get(i).unwrap());
        let pixels = (0..m).filter(|p| valid[i * m + p] == 1);
        let unit = |p: usize| {
            let z: Vec<f64> = (0..d).map(|c| z[c * m + p]).collect();
            let norm = z.iter().map(|v| v * v).sum::<f64>().sqrt() + added;
            z.iter().map(|v| v / norm).collect::<Vec<f64>>()
        };
        pixels.map(unit).collect()
    };
    (0..n).map(image).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `KL(softmax(teacher) || softmax(student))`.
fn divergence(student: &[f64], teacher: &[f64]) -> f64 {
    let log_softmax = |z: &[f64]| -> Vec<f64> {
        let top = z.iter().fold(f64::MIN, |a, &b| a.max(b));
        let log_sum = z.iter().map(|v| (v - top).exp()).sum::<f64>().ln();
        z.iter().map(|v| v - top - log_sum).collect()
    };
    let (s, t) = (log_softmax(student), log_softmax(teacher));
    s.iter().zip(&t).map(|(s, t)| t.exp() * (t - s)).sum()
}

fn naive_pair(student: &Tensor, teacher: &Tensor, valid: &Tensor) -> f64 {
    let (s, t) = (units(student, valid, 1e-8), units(teacher, valid, 1e-8));
    let mut mean = 0.0;
    for (s, t) in s.iter().zip(&t) {
        let mut sum = 0.0;
        for i in 0..s.len() {
            for j in 0..s.len() {
                sum += (dot(&s[i], &s[j]) - dot(&t[i], &t[j])).powi(2);
            }
        }
        mean += sum / (s.len() as f64).powi(2).max(1.0);
    }
    mean / s.len() as f64
}

fn naive_batch(student: &Tensor, teacher: &Tensor, valid: &Tensor, temperature: f64) -> f64 {
    let (s, t) = (units(student, valid, 0.0), units(teacher, valid, 0.0));
    let n = s.len();
    let mut sum = 0.0;
    for i in 0..n {
        for j in (0..n).filter(|&j| !s[j].is_empty()) {
            for x in 0..s[i].len() {
                let row =
                    |f: &[Vec<Vec<f64>>]| -> Vec<f64> { f[j].iter().map(|y| dot(&f[i][x], y) / temperature).collect() };
                sum += divergence(&row(&s), &row(&t)) / s[i].len() as f64;
            }
        }
    }
    sum / (n * n) as f64
}

fn naive_memory(student: &Tensor, teacher: &Tensor, valid: &Tensor, cfg: &MemoryContrast, bank: &Tensor) -> f64 {
    let bank: Vec<Vec<f64>> = bank.to_vec2().unwrap();
    let (s, t) = (units(student, valid, 0.0).concat(), units(teacher, valid, 0.0).concat());
    let row =
        |f: &[f64]| -> Vec<f64> { bank.iter().map(|u| dot(f, u) / cfg.temperature / cfg.kd_temperature).collect() };
    let sum = s.iter().zip(&t).map(|(s, t)| divergence(&row(s), &row(t))).sum::<f64>();
    cfg.kd_temperature.powi(2) * sum / s.len() as f64
}

#[test]
fn equals_naive_loops() {
    // Fewer and more nodes than channels, and more than one tile, block or piece of each kind.
    for (n, d, h, w) in [(2, 7, 2, 3), (2, 5, 17, 19), (1, 3, 27, 31)] {
        let (student, teacher) = (features(1, "student", &[n, d, h, w]), features(1, "teacher", &[n, d, h, w]));
        for valid in [all_valid(n, h, w), random_mask(2, n, h, w, 0.8)] {
            for relation in [Pair(PIXELS), batch(0.1, None), batch(0.02, None), memory(3, 5, d), memory(3, 700, d)] {
                let value = scalar(&relation.of(&student, &teacher, &valid).unwrap());
                let expected = match &relation {
                    Pair(_) => naive_pair(&student, &teacher, &valid),
                    Batch(cfg) => naive_batch(&student, &teacher, &valid, cfg.temperature),
                    Memory(cfg, bank) => naive_memory(&student, &teacher, &valid, cfg, bank),
                };
                let off = relative(value, expected);
                assert!(off < 1e-11, "{relation:?} at {:?}: {value}, {expected}, off by {off:.1e}", student.dims());
            }
        }
    }
}

#[test]
fn gradient_equals_central_differences() {
    let (n, d, h, w) = (2, 4, 5, 6);
    let (student, teacher) = (features(3, "student", &[n, d, h, w]), features(3, "teacher", &[n, d, h, w]));
    for valid in [all_valid(n, h, w), random_mask(4, n, h, w, 0.6)] {
        for relation in relations(d) {
            check_gradient(
                std::slice::from_ref(&student),
                // Times 100: elements of order 1, so that the tolerance is a relative one.
                |s| Ok((as_ops(relation.of(&s[0], &teacher, &valid))? * 100.0)?),
                1000,
                // Colder distributions bend more.
                if matches!(&relation, Batch(cfg) if cfg.temperature < 0.1) { 2e-5 } else { 5e-7 },
            )
            .unwrap();
        }
    }
}

/// The derivative with norms held fixed, by differences: pre-divided features have a loss of their own.
#[test]
fn a_detached_norm_is_a_constant() {
    let (n, d, h, w) = (1, 4, 5, 6);
    let (student, teacher) = (features(5, "student", &[n, d, h, w]), features(5, "teacher", &[n, d, h, w]));
    let valid = all_valid(n, h, w);
    let detached = Pair(PairSimilarity { detach_norm: true, ..PIXELS });
    let (value, grad) = detached.run(&student, &teacher, &valid);
    let (plain, plain_grad) = Pair(PIXELS).run(&student, &teacher, &valid);
    assert_eq!(value, plain);
    // Without the part along z, the detached gradient is the plain one.
    let norm = student.sqr().unwrap().sum_keepdim(1).unwrap().sqrt().unwrap();
    let f = student.broadcast_div(&norm).unwrap();
    let along = (&grad * &f).unwrap().sum_keepdim(1).unwrap();
    let across = (&grad - f.broadcast_mul(&along).unwrap()).unwrap();
    assert!(relative_error(&across, &plain_grad).unwrap() < 1e-7, "8 digits: 1e-8 is added to the norm");
    assert!(relative_error(&grad, &plain_grad).unwrap() > 1e-3);
}

#[test]
fn f32_equals_f64_at_sizes_of_several_tiles() {
    let (n, d, h, w) = (2, [24, 40], 20, 30);
    let [student, teacher] = [("student", d[0]), ("teacher", d[1])]
        .map(|(k, d)| features(6, k, &[n, d, h, w]).to_dtype(DType::F32).unwrap());
    let valid = random_mask(7, n, h, w, 0.9);
    let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
    let projected = features(8, "projected", &[n, d[1], h, w]).to_dtype(DType::F32).unwrap();
    for relation in relations(d[1]) {
        let student = if matches!(relation, Memory(..)) { &projected } else { &student };
        let (expected, expected_grad) = relation.run(&wide(student), &wide(&teacher), &valid);
        let (value, grad) = relation.run(student, &teacher, &valid);
        let off = (relative(value, expected), relative_error(&grad, &expected_grad).unwrap());
        println!("{relation:.0?}: off by {:.1e} and {:.1e}", off.0, off.1);
        assert!(off.0 < 1e-5 && off.1 < 1e-5, "{relation:?}: off by {off:?}");
    }
}

/// Networks that agree more and more, of equal channels and of twice as many for the teacher.
#[test]
fn small_differences_keep_their_digits() {
    let (n, d, h, w) = (1, 8, 20, 30);
    let teacher = features(9, "teacher", &[n, d, h, w]);
    let noise = random_f64(9, "noise", &[n, d, h, w]);
    let valid = random_mask(10, n, h, w, 0.9);
    let wide_teacher = Tensor::cat(&[&teacher, &teacher], 1).unwrap();
    for distance in [1e-1, 1e-2, 1e-3, 1e-4] {
        let student = (&teacher + (&noise * distance).unwrap()).unwrap();
        for teacher in [&teacher, &wide_teacher] {
            let expected = naive_pair(&student, teacher, &valid);
            let (value, grad) = Pair(PIXELS).run(&student, teacher, &valid);
            // Parts of order 1/d are subtracted in f64, against a rest of the order of the distance's square.
            let bound = 1e-13 / (distance * distance);
            assert!(relative(value, expected) < bound, "{distance}: {value}, {expected}");
            // f32 on the same rounded features; the difference is taken in f64 where it has to.
            let [student, teacher] = [&student, teacher].map(|t| t.to_dtype(DType::F32).unwrap());
            let [wide_s, wide_t] = [&student, &teacher].map(|t| t.to_dtype(DType::F64).unwrap());
            let (expected, expected_grad) = Pair(PIXELS).run(&wide_s, &wide_t, &valid);
            let (value, found) = Pair(PIXELS).run(&student, &teacher, &valid);
            let off = (relative(value, expected), relative_error(&found, &expected_grad).unwrap());
            println!("{distance}: off by {:.1e} and {:.1e}", off.0, off.1);
            assert!(off.0 < 1e-5 && off.1 < 1e-5, "{distance}: off by {off:?}");
            drop(grad);
        }
        let projected = teacher.dims().to_vec();
        for (relation, bound) in [(batch(0.1, None), 1e-12), (memory(11, 50, projected[1]), 1e-12)] {
            let expected = match &relation {
                Batch(cfg) => naive_batch(&student, &teacher, &valid, cfg.temperature),
                Memory(cfg, bank) => naive_memory(&student, &teacher, &valid, cfg, bank),
                Pair(_) => unreachable!("not listed"),
            };
            // First-order terms of the divergence cancel: 1e-16 of order 1 against the distance's square.
            let value = scalar(&relation.of(&student, &teacher, &valid).unwrap());
            assert!(relative(value, expected) < bound / (distance * distance), "{distance}: {value}, {expected}");
        }
    }
}

#[test]
fn a_perfect_student_has_nothing_to_learn() {
    for (d, h, w) in [(2, 1, 1), (5, 19, 23), (40, 6, 7)] {
        let teacher = features(12, "teacher", &[2, d, h, w]);
        for dtype in [DType::F32, DType::F64] {
            let teacher = teacher.to_dtype(dtype).unwrap();
            for relation in relations(d) {
                let (value, grad) = relation.run(&teacher, &teacher, &all_valid(2, h, w));
                // Of the linear form of pairs, rounding of f64 is left.
                let (most, most_grad) = if matches!(relation, Pair(_)) { (1e-14, 1e-9) } else { (0.0, 0.0) };
                assert!(value.abs() <= most, "{relation:?}: {value}");
                assert!(elements(&grad).iter().all(|g| g.abs() <= most_grad), "{relation:?}");
            }
        }
    }
}

#[test]
fn void_pixels_move_nothing() {
    let (n, d, h, w) = (2, 6, 17, 19);
    let (student, teacher) = (features(13, "student", &[n, d, h, w]), features(13, "teacher", &[n, d, h, w]));
    let valid = random_mask(14, n, h, w, 0.7);
    let spoil = |t: &Tensor, with: f64| {
        let mask = valid.reshape((n, 1, h, w)).unwrap().broadcast_as((n, d, h, w)).unwrap().contiguous().unwrap();
        mask.where_cond(t, &(t.zeros_like().unwrap() + with).unwrap()).unwrap()
    };
    for relation in relations(d) {
        for dtype in [DType::F32, DType::F64] {
            let [student, teacher] = [&student, &teacher].map(|t| t.to_dtype(dtype).unwrap());
            let (value, grad) = relation.run(&student, &teacher, &valid);
            for with in [0.0, 1e6, f64::NAN] {
                let (other, other_grad) = relation.run(&spoil(&student, with), &spoil(&teacher, -with), &valid);
                assert_eq!(other, value, "{relation:?} {with}");
                assert_eq!(elements(&other_grad), elements(&grad), "{relation:?} {with}");
            }
            let maximum = matches!(&relation, Pair(cfg) if matches!(cfg.nodes, Some(p) if p.kind == NodeKind::Max));
            for (k, g) in elements(&grad).iter().enumerate() {
                let counted = bytes(&valid)[k / (d * h * w) * h * w + k % (h * w)] == 1;
                assert!(if maximum { counted || *g == 0.0 } else { (*g != 0.0) == counted }, "{relation:?}, {k}");
            }
        }
    }
}

#[test]
fn void_pixels_are_as_good_as_cut_off() {
    let (n, d, h, w) = (2, 5, 6, 12);
    let (student, teacher) = (features(15, "student", &[n, d, h, w]), features(15, "teacher", &[n, d, h, w]));
    let left = |t: &Tensor| t.narrow(3, 0, w / 2).unwrap().contiguous().unwrap();
    let half = map(n, h, w, |_, _, x| u8::from(x < w / 2));
    for relation in relations(d) {
        let (value, grad) = relation.run(&student, &teacher, &half);
        let (expected, expected_grad) = relation.run(&left(&student), &left(&teacher), &all_valid(n, h, w / 2));
        assert!(relative(value, expected) < 1e-12, "{relation:?}: {value}, {expected}");
        assert!(relative_error(&left(&grad), &expected_grad).unwrap() < 1e-11, "{relation:?}");
    }
    // The code's normaliser counts the nodes of the grid.
    let code = PairSimilarity { normaliser: PairNormaliser::Code, ..PIXELS };
    let [paper, code] = [PIXELS, code].map(|cfg| Pair(cfg).run(&student, &teacher, &half).0);
    assert!(relative(code * 4.0, paper) < 1e-14);
}

#[test]
fn images_without_valid_pixels_add_nothing() {
    let (n, d, h, w) = (2, 4, 5, 6);
    let (student, teacher) = (features(16, "student", &[n, d, h, w]), features(16, "teacher", &[n, d, h, w]));
    let half = map(n, h, w, |i, _, _| u8::from(i == 1));
    let none = map(n, h, w, |_, _, _| 0);
    for relation in relations(d) {
        let (value, grad) = relation.run(&student, &teacher, &none);
        assert_eq!(value, 0.0, "{relation:?}");
        assert!(elements(&grad).iter().all(|&g| g == 0.0), "{relation:?}");
        let item = |t: &Tensor| t.narrow(0, 1, 1).unwrap();
        let (alone, _) = relation.run(&item(&student), &item(&teacher), &item(&half));
        // Of two images; of four pairs of images; of the anchors that count.
        let share = match relation {
            Pair(_) => 2.0,
            Batch(_) => 4.0,
            Memory(..) => 1.0,
        };
        let (value, grad) = relation.run(&student, &teacher, &half);
        assert!(relative(value, alone / share) < 1e-13, "{relation:?}");
        assert!(elements(&grad.get(0).unwrap()).iter().all(|&g| g == 0.0), "{relation:?}");
    }
}

#[test]
fn a_batch_of_pair_similarity_and_memory_is_the_mean_of_its_items() {
    let (n, d, h, w) = (3, 5, 6, 7);
    let (student, teacher) = (features(17, "student", &[n, d, h, w]), features(17, "teacher", &[n, d, h, w]));
    let valid = map(n, h, w, |_, y, x| u8::from((y + x) % 3 > 0));
    for relation in relations(d).into_iter().filter(|r| !matches!(r, Batch(_))) {
        let (value, grad) = relation.run(&student, &teacher, &valid);
        let mut mean = 0.0;
        for i in 0..n {
            let item = |t: &Tensor| t.narrow(0, i, 1).unwrap();
            let (alone, alone_grad) = relation.run(&item(&student), &item(&teacher), &item(&valid));
            mean += alone / n as f64;
            assert!(relative_error(&item(&grad), &(alone_grad / n as f64).unwrap()).unwrap() < 1e-12, "{relation:?}");
        }
        assert!(relative(value, mean) < 1e-13, "{relation:?}");
    }
}

#[test]
fn the_order_of_images_pixels_channels_and_slots_does_not_matter() {
    let (n, d, h, w) = (3, 5, 6, 7);
    let (student, teacher) = (features(18, "student", &[n, d, h, w]), features(18, "teacher", &[n, d, h, w]));
    let valid = random_mask(19, n, h, w, 0.8);
    let order =
        |n: usize| Tensor::from_vec((0..n as u32).map(|k| (k * 2 + 1) % n as u32).collect::<Vec<_>>(), n, &Device::Cpu);
    let by = |t: &Tensor, dim: usize| t.index_select(&order(t.dim(dim).unwrap()).unwrap(), dim).unwrap();
    let agree = |relation: &Relation, found: (f64, Tensor), expected: f64, expected_grad: &Tensor| {
        assert!(relative(found.0, expected) < 1e-12, "{relation:?}");
        assert!(relative_error(&found.1, expected_grad).unwrap() < 1e-11, "{relation:?}");
    };
    for relation in relations(d) {
        let (value, grad) = relation.run(&student, &teacher, &valid);
        let images = relation.run(&by(&student, 0), &by(&teacher, 0), &by(&valid, 0));
        agree(&relation, images, value, &by(&grad, 0));
        // Each network's channels in an order of its own, unless a memory names them.
        let (moved_teacher, moved) = match &relation {
            Memory(cfg, bank) => (by(&teacher, 1), Memory(*cfg, by(&by(bank, 1), 0))),
            other => (teacher.clone(), other.clone()),
        };
        agree(&moved, moved.run(&by(&student, 1), &moved_teacher, &valid), value, &by(&grad, 1));
        let windows = match &relation {
            Pair(cfg) => cfg.nodes.is_some(),
            Batch(cfg) => cfg.pooling.is_some(),
            Memory(..) => false,
        };
        if !windows {
            let columns = relation.run(&by(&student, 3), &by(&teacher, 3), &by(&valid, 2));
            agree(&relation, columns, value, &by(&grad, 3));
        }
    }
}

#[test]
fn lengths_of_feature_vectors_do_not_matter() {
    let (n, d, h, w) = (2, 6, 5, 6);
    let (student, teacher) = (features(20, "student", &[n, d, h, w]), features(20, "teacher", &[n, d, h, w]));
    let valid = all_valid(n, h, w);
    let lengths = (random_f64(21, "lengths", &[n, 1, h, w]) * 2.0).unwrap().exp().unwrap();
    for relation in [Pair(PIXELS), batch(0.1, None), memory(22, 20, d)] {
        let (value, grad) = relation.run(&student, &teacher, &valid);
        let (other, other_grad) = relation.run(&student.broadcast_mul(&lengths).unwrap(), &teacher, &valid);
        // 1e-8 is added to the norms of pairs.
        assert!(relative(other, value) < 1e-7, "{relation:?}");
        assert!(relative_error(&other_grad.broadcast_mul(&lengths).unwrap(), &grad).unwrap() < 1e-6, "{relation:?}");
    }
}

#[test]
fn vectors_without_direction_are_like_no_pixel() {
    let (n, d, h, w) = (1, 4, 4, 5);
    let spoiled = |name| {
        let mut z = elements(&features(23, name, &[n, d, h, w]));
        (0..d).for_each(|c| z[c * h * w + 7] = 0.0);
        Tensor::from_vec(z, (n, d, h, w), &Device::Cpu).unwrap()
    };
    for (student, teacher) in
        [(spoiled("student"), features(23, "teacher", &[n, d, h, w])), (spoiled("a"), spoiled("b"))]
    {
        for relation in [Pair(PIXELS), batch(0.1, None), memory(24, 9, d)] {
            let (value, grad) = relation.run(&student, &teacher, &all_valid(n, h, w));
            assert!(value.is_finite() && value > 0.0, "{relation:?}");
            let grad = elements(&grad);
            assert!((0..d).all(|c| grad[c * h * w + 7] == 0.0) && grad.iter().all(|g| g.is_finite()), "{relation:?}");
        }
    }
}

#[test]
fn of_equal_maxima_the_first_gets_the_gradient() {
    // Two windows of two equal pixels each.
    let student = Tensor::new(&[[[[1f64, 1.0, 0.5, 0.5]], [[0.0, 0.0, 2.0, 2.0]]]], &Device::Cpu).unwrap();
    let teacher = Tensor::new(&[[[[1f64, 1.0, 1.0, 1.0]]]], &Device::Cpu).unwrap();
    let (_, grad) = Pair(pooled([1, 2], NodeKind::Max)).run(&student, &teacher, &all_valid(1, 1, 4));
    let grad = elements(&grad);
    assert!([1, 3, 5, 7].iter().all(|&k| grad[k] == 0.0), "{grad:?}");
    assert!(grad[2] != 0.0 && grad[6] != 0.0, "{grad:?}");
}

#[test]
fn the_teacher_and_the_memory_get_no_gradient() {
    let (d, valid) = (4, all_valid(1, 3, 3));
    let [student, teacher] = ["student", "teacher"].map(|k| Var::from_tensor(&features(25, k, &[1, d, 3, 3])).unwrap());
    let slots = Var::from_tensor(&bank(25, 6, d)).unwrap();
    for relation in [Pair(PIXELS), batch(0.1, None), Memory(MemoryContrast::cirkd(), slots.as_tensor().clone())] {
        let grads = relation.of(&student, &teacher, &valid).unwrap().backward().unwrap();
        assert!(grads.get(&student).is_some(), "{relation:?}");
        assert!(grads.get(&teacher).is_none() && grads.get(&slots).is_none(), "{relation:?}");
    }
}

#[test]
fn layout_of_the_features_does_not_matter() {
    let (n, d, h, w) = (2, 3, 4, 5);
    let [student, teacher] = ["student", "teacher"].map(|k| features(26, k, &[n + 1, h, w, d]));
    let strided = |z: &Tensor| z.permute((0, 3, 1, 2)).unwrap().narrow(0, 1, n).unwrap();
    let copy = |z: &Tensor| strided(z).force_contiguous().unwrap();
    let valid = random_mask(27, n, h, w, 0.8);
    for relation in relations(d) {
        let (value, grad) = relation.run(&copy(&student), &copy(&teacher), &valid);
        let (other, other_grad) =
            value_and_grad(&student, 1.0, |s| relation.of(&strided(s), &strided(&teacher), &valid));
        assert_eq!(value, other);
        assert_close(&strided(&other_grad), &grad, 0.0, "the same numbers");
    }
}

#[test]
fn thread_count_changes_no_bit() {
    // Several pieces of every kind, and ragged last ones.
    let (n, d, h, w) = (3, 6, 33, 37);
    let valid = random_mask(28, n, h, w, 0.9);
    for dtype in [DType::F32, DType::F64] {
        let [student, teacher] =
            ["student", "teacher"].map(|k| features(29, k, &[n, d, h, w]).to_dtype(dtype).unwrap());
        for relation in relations(d) {
            assert_same_on_all_pools(|| relation.run(&student, &teacher, &valid));
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let (student, valid) = (features(30, "student", &[2, 3, 4, 5]), all_valid(2, 4, 5));
    for relation in relations(3) {
        let refused = |s: &Tensor, t: &Tensor, v: &Tensor| relation.of(s, t, v).unwrap_err();
        let text = refused(&student, &features(30, "teacher", &[2, 3, 5, 4]), &valid).to_string();
        assert!(text.contains("teacher_ndhw [2, 3, 5, 4]"), "{text}");
        assert!(matches!(refused(&student, &student, &all_valid(2, 5, 4)), LossError::Shape { .. }));
        assert!(matches!(refused(&student.get(0).unwrap(), &student, &valid), LossError::Shape { .. }));
        let narrow = student.to_dtype(DType::F32).unwrap();
        assert!(matches!(refused(&student, &narrow, &valid), LossError::DType { tensor: "teacher_ndhw", .. }));
        let labels = map(2, 4, 5, |i, y, x| (i + y + x) as u8 % 3);
        let error = refused(&student, &student, &labels);
        assert!(matches!(error, LossError::Mask { image: 0, row: 0, column: 2, value: 2 }));
    }
    let refused = |relation: Relation| {
        assert!(matches!(relation.of(&student, &student, &valid), Err(LossError::Config { .. })), "{relation:?}");
    };
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-3] {
        refused(batch(bad, None));
        refused(Memory(MemoryContrast { temperature: bad, kd_temperature: 1.0 }, bank(31, 4, 3)));
        refused(Memory(MemoryContrast { temperature: 0.1, kd_temperature: bad * 10.0 }, bank(31, 4, 3)));
    }
    refused(batch(0.1, Some(0)));
    refused(Pair(pooled([0, 2], NodeKind::Max)));
    for slots in [bank(31, 4, 2), bank(31, 4, 3).narrow(0, 0, 0).unwrap(), bank(31, 4, 3).flatten_all().unwrap()] {
        let found = Memory(MemoryContrast::cirkd(), slots).of(&student, &student, &valid);
        assert!(matches!(found, Err(LossError::Shape { .. })));
    }
    let narrow = bank(31, 4, 3).to_dtype(DType::F32).unwrap();
    let found = memory_contrast(&student, &student, &narrow, &valid, &MemoryContrast::cirkd());
    assert!(matches!(found, Err(LossError::DType { tensor: "bank_bd", .. })));
}

#[test]
fn features_that_are_not_finite_are_seen_in_the_loss() {
    let teacher = features(32, "teacher", &[1, 3, 4, 5]);
    for bad in [f64::NAN, f64::INFINITY] {
        for relation in relations(3) {
            let mut values = elements(&teacher);
            values[5] = bad;
            let student = Tensor::from_vec(values, (1, 3, 4, 5), &Device::Cpu).unwrap();
            let value = relation.of(&student, &teacher, &all_valid(1, 4, 5)).unwrap();
            assert!(!scalar(&value).is_finite(), "{relation:?}");
        }
    }
    let mut slots = bank(33, 4, 3).to_vec2::<f64>().unwrap();
    slots[1][0] = f64::NAN;
    let slots = Tensor::new(slots, &Device::Cpu).unwrap();
    let value = Memory(MemoryContrast::cirkd(), slots).of(&teacher, &teacher, &all_valid(1, 4, 5)).unwrap();
    assert!(!scalar(&value).is_finite());
}

//! The discriminator and the adapters against PyTorch (`fixtures/make_discriminator.py`), and what holds for them.

mod support;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::LazyLock;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use segdistill_models::adapter::{Align, MgdGenerator, ProjectionHead};
use segdistill_models::{Discriminator, DiscriminatorSpec, ModelError, Result};
use segdistill_ops::rng::Stream;
use segdistill_ops::testing::random_f64;
use segdistill_ops::{Mode, OpsError, ParamKind, ParamStore, graph, params};
use support::{fill, filled, values};

const TRAIN: Mode = Mode::Train { seed: 0, step: 0 };
/// The bound of f64: only the order of summation differs.
const EXACT: f64 = 1e-9;

/// Tensors of the fixture by name.
static EXPECTED: LazyLock<BTreeMap<String, Vec<f64>>> = LazyLock::new(|| {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/discriminator.safetensors");
    let tensors = params::read_safetensors(&path, &Device::Cpu).unwrap();
    tensors.into_iter().map(|(name, tensor)| (name, values(&tensor))).collect()
});

/// At most `most` elements, those that `samples` of the script keeps.
fn samples(tensor: &Tensor, most: usize) -> Vec<f64> {
    let values = values(tensor);
    let step = (values.len().div_ceil(most)..).find(|step| step % 2 != 0 && step % 3 != 0).unwrap();
    values.iter().step_by(step).copied().collect()
}

fn near(what: &str, found: &[f64], bound: f64) {
    let expected = EXPECTED.get(what).unwrap_or_else(|| panic!("the fixture has no {what}"));
    assert_eq!(found.len(), expected.len(), "{what}");
    let size = expected.iter().fold(0.0f64, |most, e| most.max(e.abs()));
    let apart = found.iter().zip(expected).fold(0.0f64, |most, (f, e)| most.max((f - e).abs()));
    // A gradient that is 0 but for rounding (a key's bias, which softmax takes away) is held to that of a small one.
    let allowed = bound * if size > 1e-6 { size } else { 1e-3 };
    assert!(found.iter().all(|v| v.is_finite()) && apart <= allowed, "{what}: {apart:.3e} of {size:.3e} from PyTorch");
}

fn from_formula(name: &str, shape: &[usize], dtype: DType) -> Tensor {
    Tensor::from_vec(fill(name, shape), shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

/// Every tensor from the formula; gains of attention, which start from 0, ten times as large.
fn fill_store(store: &ParamStore) {
    for p in store.named() {
        let mut values = filled(&p.name, p.tensor.dims(), None);
        if p.name.ends_with("gamma") {
            values.iter_mut().for_each(|v| *v *= 10.0);
        }
        let values = Tensor::from_vec(values, p.tensor.dims(), &Device::Cpu).unwrap();
        p.var.unwrap().set(&values.to_dtype(store.dtype()).unwrap()).unwrap();
    }
}

fn filled_discriminator(in_channels: usize, dtype: DType) -> (ParamStore, Discriminator) {
    let spec = DiscriminatorSpec { n_classes: in_channels, condition: false, width: 0.125 };
    let store = ParamStore::trainable(0, dtype, &Device::Cpu);
    let discriminator = Discriminator::new(&store.root(), &spec).unwrap();
    fill_store(&store);
    (store, discriminator)
}

/// Gradients of every parameter and of the input, by samples and by a product of all elements with the formula.
fn check_gradients(key: &str, store: &ParamStore, input: Option<(&str, &Var)>, found: &GradStore, bound: f64) {
    let trained = store.named().into_iter().filter(|p| p.kind != ParamKind::Buffer).map(|p| (p.name, p.tensor));
    let input = input.map(|(name, var)| (name.to_string(), var.as_tensor().clone()));
    let named: BTreeMap<String, Tensor> = trained.chain(input).collect();
    let along = &EXPECTED[&format!("along/{key}")];
    assert_eq!(named.len(), along.len(), "{key}: every parameter of PyTorch's is one here");
    for ((name, tensor), along) in named.iter().zip(along) {
        let gradient = found.get(tensor).cloned().unwrap_or_else(|| tensor.zeros_like().unwrap());
        near(&format!("{key}/{name}"), &samples(&gradient, 40), bound);
        let direction = fill(&format!("along/{name}"), gradient.dims());
        let gradient = values(&gradient);
        let product: f64 = direction.iter().zip(&gradient).map(|(a, b)| a * b).sum();
        let size = gradient.iter().map(|g| g * g).sum::<f64>().sqrt().max(1e-3);
        assert!((product - along).abs() <= bound * size, "{key}/{name}: {product:.6e}, PyTorch {along:.6e}");
    }
}

/// Everything the fixture holds of a case, in the script's order: the buffers move on the way.
fn check_case(case: &str, shape: [usize; 4], dtype: DType, bound: f64) {
    let key = |what: &str| format!("{case}/{what}");
    let (store, discriminator) = filled_discriminator(shape[1], dtype);
    let maps = |name| (from_formula(name, &shape, dtype) * 2.0).unwrap();
    let x = Var::from_tensor(&maps("maps")).unwrap();
    let scores = discriminator.forward(&x, TRAIN).unwrap();
    near(&key("train"), &values(&scores), bound);
    let loss = (&scores * from_formula("loss", scores.dims(), dtype)).unwrap().sum_all().unwrap();
    let gradients = graph::backward(loss).unwrap();
    check_gradients(&key("scores"), &store, Some(("maps", &x)), &gradients, bound);

    let penalty = discriminator.gradient_penalty_at(&maps("between"), TRAIN).unwrap();
    near(&key("penalty"), &values(&penalty.reshape(1).unwrap()), bound);
    check_gradients(&key("second"), &store, None, &graph::backward(penalty).unwrap(), bound);
    for p in store.named().into_iter().filter(|p| p.kind == ParamKind::Buffer) {
        near(&key(&format!("buffer/{}", p.name)), &samples(&p.tensor, 40), bound);
    }

    near(&key("eval"), &values(&discriminator.forward(&maps("maps"), Mode::Eval).unwrap()), bound);
    let penalty = discriminator.gradient_penalty_at(&maps("maps"), Mode::Eval).unwrap();
    near(&key("eval_penalty"), &values(&penalty.reshape(1).unwrap()), bound);
    check_gradients(&key("eval_second"), &store, None, &graph::backward(penalty).unwrap(), bound);
}

#[test]
fn scores_penalty_and_both_orders_of_gradient_are_pytorchs() {
    for (case, shape) in [("one", [3, 3, 40, 70]), ("many", [2, 6, 66, 83]), ("small", [2, 4, 12, 16])] {
        check_case(case, shape, DType::F64, EXACT);
    }
}

#[test]
fn in_f32_the_second_order_is_within_a_thousandth() {
    for (case, shape) in [("one", [3, 3, 40, 70]), ("many", [2, 6, 66, 83]), ("small", [2, 4, 12, 16])] {
        check_case(case, shape, DType::F32, 1e-3);
    }
}

#[test]
fn the_gradient_of_the_penalty_is_its_finite_difference() {
    let (store, discriminator) = filled_discriminator(3, DType::F64);
    let maps = (from_formula("between", &[2, 3, 24, 32], DType::F64) * 2.0).unwrap();
    // Evaluation, where singular vectors and statistics stand still.
    let penalty = || discriminator.gradient_penalty_at(&maps, Mode::Eval).unwrap();
    let gradients = graph::backward(penalty()).unwrap();
    let value = || penalty().to_scalar::<f64>().unwrap();
    for name in ["norm.weight", "norm.bias", "conv1.weight", "conv3.weight", "conv4.bias", "attention1.query.weight"]
        .iter()
        .chain(&["attention1.gamma", "attention1.key.bias", "attention2.value.weight", "score.weight"])
    {
        let p = store.named().into_iter().find(|p| p.name == *name).unwrap();
        let (var, gradient) = (p.var.unwrap(), values(gradients.get(&p.tensor).unwrap()));
        let at = values(&var);
        let k = at.len() / 3;
        let moved = |by: f64| {
            let mut at = at.clone();
            at[k] += by;
            var.set(&Tensor::from_vec(at, var.dims(), &Device::Cpu).unwrap()).unwrap();
            value()
        };
        let step = 1e-5;
        let expected = (moved(step) - moved(-step)) / (2.0 * step);
        moved(0.0);
        // The value is rounded at 1e-16 and the step squared is 1e-10; gradients are 1e-5 to 1e-1.
        assert!((gradient[k] - expected).abs() <= 1e-10 + 1e-6 * expected.abs(), "{name}: {} {expected}", gradient[k]);
    }
}

#[test]
fn the_penalty_of_two_maps_is_that_of_the_points_between() -> Result<()> {
    let shape = [3, 4, 16, 24];
    let (student, teacher) = (random_f64(1, "student", &shape), random_f64(1, "teacher", &shape));
    let found = filled_discriminator(4, DType::F64).1.gradient_penalty(&student, &teacher, 5, 9)?;
    let mut stream = Stream::new(5, "gradient penalty", &[9]);
    let between: Vec<Tensor> = (0..3)
        .map(|i| {
            let share = stream.unit();
            let [s, t] = [&student, &teacher].map(|x| x.get(i).unwrap());
            ((t * share).unwrap() + (s * (1.0 - share)).unwrap()).unwrap()
        })
        .collect();
    let between = Tensor::stack(&between, 0)?;
    let expected = filled_discriminator(4, DType::F64).1.gradient_penalty_at(&between, TRAIN)?;
    let [found, expected] = [found, expected].map(|t| t.to_scalar::<f64>().unwrap());
    assert!((found - expected).abs() <= 1e-12 * expected, "{found} {expected}");
    Ok(())
}

#[test]
fn the_penalty_moves_the_buffers_once_and_evaluation_never() -> Result<()> {
    let buffers = |store: &ParamStore| -> Vec<Vec<f64>> {
        store.named().iter().filter(|p| p.kind == ParamKind::Buffer).map(|p| values(&p.tensor)).collect()
    };
    let maps = from_formula("between", &[2, 3, 16, 24], DType::F64);
    let (store, discriminator) = filled_discriminator(3, DType::F64);
    let before = buffers(&store);
    discriminator.forward(&maps, Mode::Eval)?;
    discriminator.gradient_penalty_at(&maps, Mode::Eval)?;
    assert_eq!(buffers(&store), before);
    discriminator.gradient_penalty_at(&maps, TRAIN)?;
    let (other, twin) = filled_discriminator(3, DType::F64);
    twin.forward(&maps, TRAIN)?;
    assert_eq!(buffers(&store), buffers(&other), "as one pass");
    assert!(buffers(&store).iter().zip(&before).all(|(after, before)| after != before));
    Ok(())
}

#[test]
fn two_passes_before_one_backward_keep_their_own_norms() -> Result<()> {
    let maps = from_formula("maps", &[2, 3, 16, 24], DType::F64);
    let (store, discriminator) = filled_discriminator(3, DType::F64);
    let first = discriminator.forward(&maps, TRAIN)?.sum_all()?;
    discriminator.forward(&(&maps * -3.0)?, TRAIN)?;
    let late = graph::backward(first)?;
    let (other, twin) = filled_discriminator(3, DType::F64);
    let soon = graph::backward(twin.forward(&maps, TRAIN)?.sum_all()?)?;
    for (p, q) in store.named().iter().zip(other.named()).filter(|(p, _)| p.kind != ParamKind::Buffer) {
        assert_eq!(values(late.get(&p.tensor).unwrap()), values(soon.get(&q.tensor).unwrap()), "{}", p.name);
    }
    Ok(())
}

#[test]
fn weights_come_from_the_seed_and_state_survives_a_file() -> Result<()> {
    let spec = DiscriminatorSpec { n_classes: 5, condition: true, width: 0.25 };
    let make = |seed| -> Result<(ParamStore, Discriminator)> {
        let store = ParamStore::trainable(seed, DType::F32, &Device::Cpu);
        let discriminator = Discriminator::new(&store.root().pp("discriminator"), &spec)?;
        Ok((store, discriminator))
    };
    let (store, discriminator) = make(3)?;
    assert_eq!(store.n_parameters(), spec.n_parameters());
    let tensors = store.tensors();
    for name in ["norm.running_var", "conv1.weight_u", "conv4.weight_v", "attention2.gamma", "score.bias"] {
        assert!(tensors.contains_key(&format!("discriminator.{name}")), "{name}");
    }
    let maps = from_formula("maps", &[2, 8, 24, 32], DType::F32);
    let (_, again) = make(3)?;
    let scores = |d: &Discriminator, mode| values(&d.forward(&maps, mode).unwrap());
    assert_eq!(scores(&discriminator, TRAIN), scores(&again, TRAIN));
    assert_ne!(scores(&discriminator, Mode::Eval), scores(&make(4)?.1, Mode::Eval));

    // Through a file into a store of another seed: the next pass in training is the same, bit for bit.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("discriminator.safetensors");
    let tensors: std::collections::HashMap<_, _> = store.tensors().into_iter().collect();
    candle_core::safetensors::save(&tensors, &path)?;
    let (restored, other) = make(4)?;
    restored.load(&params::read_safetensors(&path, &Device::Cpu)?)?;
    assert_eq!(scores(&discriminator, TRAIN), scores(&other, TRAIN));
    assert_eq!(scores(&discriminator, Mode::Eval), scores(&other, Mode::Eval));
    Ok(())
}

#[test]
fn at_full_width_the_norms_hold_and_the_count_is_published() -> Result<()> {
    let spec = DiscriminatorSpec { n_classes: 19, condition: false, width: 1.0 };
    let store = ParamStore::trainable(0, DType::F32, &Device::Cpu);
    let discriminator = Discriminator::new(&store.root(), &spec)?;
    assert_eq!(store.n_parameters(), 3_191_721);
    let maps = from_formula("maps", &[1, 19, 65, 65], DType::F32);
    assert_eq!(discriminator.forward(&maps, TRAIN)?.dims(), [1]);
    let conditioned = DiscriminatorSpec { condition: true, ..spec };
    let store = ParamStore::trainable(0, DType::F32, &Device::Cpu);
    Discriminator::new(&store.root(), &conditioned)?;
    assert_eq!(store.n_parameters(), 3_194_799);
    Ok(())
}

#[test]
fn bits_do_not_depend_on_the_threads() -> Result<()> {
    let gradients = |threads| -> Result<Vec<Vec<f64>>> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let spec = DiscriminatorSpec { n_classes: 5, condition: true, width: 0.5 };
            let store = ParamStore::trainable(3, DType::F32, &Device::Cpu);
            let discriminator = Discriminator::new(&store.root(), &spec)?;
            fill_store(&store);
            let [s, t] = ["student", "teacher"].map(|name| from_formula(name, &[4, 8, 64, 96], DType::F32));
            let penalty = discriminator.gradient_penalty(&s, &t, 0, 0)?;
            let loss = (penalty + discriminator.forward(&s, TRAIN)?.mean_all()?)?;
            let found = graph::backward(loss)?;
            let trained = store.named().into_iter().filter(|p| p.kind != ParamKind::Buffer);
            Ok(trained.map(|p| values(found.get(&p.tensor).unwrap())).collect())
        })
    };
    let alone = gradients(1)?;
    for threads in [2, 3] {
        assert!(gradients(threads)? == alone, "{threads} threads");
    }
    Ok(())
}

#[test]
fn what_it_cannot_score_is_refused() {
    let (_, discriminator) = filled_discriminator(3, DType::F64);
    for shape in [&[2, 4, 16, 16][..], &[2, 3, 7, 16], &[2, 3, 16, 7], &[3, 16, 16], &[0, 3, 16, 16]] {
        let maps = Tensor::zeros(shape, DType::F64, &Device::Cpu).unwrap();
        let error = discriminator.forward(&maps, TRAIN).unwrap_err();
        assert!(matches!(&error, ModelError::Input { model, .. } if model == "discriminator"), "{error}");
        assert!(discriminator.gradient_penalty_at(&maps, TRAIN).is_err());
    }
    let [a, b] = [16, 18].map(|side| Tensor::zeros((2, 3, side, 16), DType::F64, &Device::Cpu).unwrap());
    assert!(matches!(discriminator.gradient_penalty(&a, &b, 0, 0), Err(ModelError::Input { .. })));
    assert!(discriminator.forward(&Tensor::zeros((1, 3, 8, 8), DType::F64, &Device::Cpu).unwrap(), TRAIN).is_ok());
}

#[test]
fn a_flat_score_has_penalty_one_and_no_gradient() -> Result<()> {
    let (store, discriminator) = filled_discriminator(3, DType::F64);
    let score = store.named().into_iter().find(|p| p.name == "score.weight").unwrap();
    score.var.unwrap().set(&score.tensor.zeros_like()?)?;
    let penalty = discriminator.gradient_penalty_at(&from_formula("maps", &[2, 3, 16, 16], DType::F64), TRAIN)?;
    assert_eq!(penalty.to_scalar::<f64>()?, 1.0);
    let gradients = graph::backward(penalty)?;
    assert!(store.named().iter().filter_map(|p| gradients.get(&p.tensor)).all(|g| values(g).iter().all(|v| *v == 0.0)));
    Ok(())
}

/// An adapter as a function of a feature and a mask.
type Adapter = Box<dyn Fn(&Tensor, &Tensor) -> Result<Tensor>>;

fn adapter(case: &str, store: &ParamStore) -> Result<(Adapter, usize)> {
    let scope = store.root();
    Ok(match case {
        "align" => {
            let align = Align::new(&scope, 5, 8)?;
            (Box::new(move |x, _| align.forward(x, TRAIN)), Align::n_parameters(5, 8))
        }
        "align_bn" => {
            let align = Align::normalised(&scope, 5, 8)?;
            (Box::new(move |x, _| align.forward(x, TRAIN)), Align::n_parameters(5, 8) + 8)
        }
        "head" => {
            let head = ProjectionHead::new(&scope, 5, 8)?;
            (Box::new(move |x, _| head.forward(x, TRAIN)), ProjectionHead::n_parameters(5, 8))
        }
        "mgd" => {
            let generator = MgdGenerator::new(&scope, 5, 8)?;
            (Box::new(move |x, keep| generator.forward(x, keep)), MgdGenerator::n_parameters(5, 8))
        }
        "mgd_same" => {
            let generator = MgdGenerator::new(&scope, 8, 8)?;
            (Box::new(move |x, keep| generator.forward(x, keep)), 2 * (8 * 8 * 9 + 8))
        }
        _ => {
            let generator = MgdGenerator::enhanced(&scope, 5, 8)?;
            let twice = 2 * MgdGenerator::n_parameters(5, 8) - Align::n_parameters(5, 8);
            (Box::new(move |x, keep| generator.forward(x, keep)), twice)
        }
    })
}

#[test]
fn adapters_and_their_gradients_are_pytorchs() -> Result<()> {
    for case in ["align", "align_bn", "head", "mgd", "mgd_same", "mgd_enhanced"] {
        for (dtype, bound) in [(DType::F64, EXACT), (DType::F32, 1e-4)] {
            let store = ParamStore::trainable(0, dtype, &Device::Cpu);
            let (forward, n_parameters) = adapter(case, &store)?;
            assert_eq!(store.n_parameters(), n_parameters, "{case}");
            fill_store(&store);
            let channels = if case == "mgd_same" { 8 } else { 5 };
            let x = Var::from_tensor(&from_formula("feature", &[2, channels, 5, 7], dtype))?;
            let keep = from_formula("keep", &[2, 1, 5, 7], dtype);
            let keep = keep.gt(&keep.zeros_like()?)?;
            let y = forward(&x, &keep)?;
            near(&format!("{case}/train"), &samples(&y, 400), bound);
            if case != "mgd_enhanced" {
                assert_eq!(graph::handovers(std::slice::from_ref(&y)), 0, "{case}");
            }
            let seed = from_formula("loss", y.dims(), dtype);
            let gradients = graph::backward_from(vec![(y, seed)])?;
            check_gradients(&format!("{case}/scores"), &store, Some(("feature", &x)), &gradients, bound);
            // A mask of floats is the same mask.
            let as_float = forward(&x, &keep.to_dtype(dtype)?)?;
            assert_eq!(values(&as_float), values(&forward(&x, &keep)?), "{case}");
        }
    }
    Ok(())
}

#[test]
fn a_generator_sees_nothing_of_what_is_masked() -> Result<()> {
    let store = ParamStore::trainable(1, DType::F64, &Device::Cpu);
    let generator = MgdGenerator::new(&store.root(), 3, 6)?;
    let keep = Tensor::from_vec((0..20).map(|k| u8::from(k % 3 == 0)).collect::<Vec<_>>(), (1, 1, 4, 5), &Device::Cpu)?;
    let x = random_f64(0, "x", &[1, 3, 4, 5]);
    let shown = keep.broadcast_as((1, 3, 4, 5))?;
    let spoilt = shown.where_cond(&x, &(&x + 1e3)?)?;
    assert_eq!(values(&generator.forward(&x, &keep)?), values(&generator.forward(&spoilt, &keep)?));
    let x = Var::from_tensor(&x)?;
    let gradients = graph::backward(generator.forward(&x, &keep)?.sqr()?.sum_all()?)?;
    let seen: Vec<bool> = values(gradients.get(&x).unwrap()).iter().map(|g| *g != 0.0).collect();
    assert_eq!(seen, values(&shown).iter().map(|k| *k == 1.0).collect::<Vec<_>>());
    for bad in [keep.affine(2.0, 0.0)?, keep.to_dtype(DType::F64)?.affine(0.5, 0.0)?] {
        let error = generator.forward(&x, &bad).unwrap_err();
        assert!(matches!(error, ModelError::Ops(OpsError::Config { .. })), "{error}");
    }
    assert!(matches!(generator.forward(&x, &shown), Err(ModelError::Ops(OpsError::Shape { .. }))));
    assert!(generator.forward(&x, &keep.narrow(2, 0, 3)?).is_err());
    Ok(())
}

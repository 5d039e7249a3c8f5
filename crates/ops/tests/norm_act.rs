//! Batch normalisation with residual and ReLU against PyTorch, its own composition, finite differences and laws.

mod reference;

use candle_core::{DType, Device, Tensor, Var, backprop::GradStore};
use reference::{bits, fixture};
use segdistill_ops::testing::{assert_close, check_gradient, devices, random_f64};
use segdistill_ops::{BatchNormConfig, Mode, OpsError, Result, batch_norm, batch_norm_act, relu};

const TRAIN: Mode = Mode::Train { seed: 0, step: 0 };
const CFG: BatchNormConfig = BatchNormConfig { eps: 1e-5, momentum: 0.1 };

/// Arguments of one call.
struct Args {
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    var: Tensor,
    residual: Tensor,
}

impl Args {
    fn random(shape: [usize; 4], dtype: DType) -> Self {
        let make = |name: &str, shape: &[usize], shift: f64| {
            (random_f64(21, name, shape) + shift).unwrap().to_dtype(dtype).unwrap()
        };
        let c = &shape[1..2];
        Self {
            x: make("x", &shape, 0.3),
            gamma: make("gamma", c, 0.5),
            beta: make("beta", c, 0.1),
            mean: make("mean", c, 0.0),
            var: make("var", c, 1.5),
            residual: make("residual", &shape, 0.2),
        }
    }

    /// Result, gradients of `sum(g * result)` by name, and the running statistics afterwards.
    fn run(
        &self,
        residual: bool,
        g: impl Fn(&[usize]) -> Tensor,
        f: impl Fn(&Tensor, &Tensor, &Tensor, &Tensor, &Tensor, Option<&Tensor>) -> Result<Tensor>,
    ) -> Vec<(&'static str, Tensor)> {
        let leaf = |t: &Tensor| Var::from_tensor(t).unwrap();
        let [x, gamma, beta, r] = [&self.x, &self.gamma, &self.beta, &self.residual].map(leaf);
        let (mean, var) = (self.mean.copy().unwrap(), self.var.copy().unwrap());
        let y = f(&x, &gamma, &beta, &mean, &var, residual.then_some(r.as_tensor())).unwrap();
        let grads: GradStore = (&y * g(y.dims())).unwrap().sum_all().unwrap().backward().unwrap();
        let of = |v: &Var| grads.get(v).expect("an argument without a gradient").clone();
        let mut out = vec![("y", y.detach()), ("dx", of(&x)), ("dgamma", of(&gamma)), ("dbeta", of(&beta))];
        if residual {
            out.push(("dresidual", of(&r)));
        }
        out.extend([("new_mean", mean), ("new_var", var)]);
        out
    }
}

#[test]
fn values_and_gradients_equal_pytorch() {
    let cases = fixture("norm_act");
    let on = |device: &Device| {
        // cuDNN's order of sums is its own.
        let slack = if device.is_cpu() { 1.0 } else { 20.0 };
        [(device.clone(), DType::F64, slack * 1e-12), (device.clone(), DType::F32, slack * 2e-5)]
    };
    for (device, dtype, tolerance) in devices().iter().flat_map(on) {
        for (name, residual, relu) in [("relu", false, true), ("residual", true, false), ("both", true, true)] {
            for (mode, said) in [(TRAIN, "train"), (Mode::Eval, "eval")] {
                let part = |p: &str| &cases[&format!("{name}.{said}.{p}")];
                let typed = |p: &str| part(p).to_dtype(dtype).unwrap().to_device(&device).unwrap();
                let args = Args {
                    x: typed("x"),
                    gamma: typed("gamma"),
                    beta: typed("beta"),
                    mean: typed("mean"),
                    var: typed("var"),
                    residual: if residual { typed("residual") } else { typed("x") },
                };
                let found = args.run(
                    residual,
                    |_| typed("g"),
                    |x, gamma, beta, mean, var, r| batch_norm_act(x, gamma, beta, mean, var, r, relu, CFG, mode),
                );
                for (p, found) in found {
                    assert_close(
                        &found,
                        part(p),
                        tolerance,
                        &format!("{name}.{said}.{p} {dtype:?}, other order of sums"),
                    );
                }
            }
        }
    }
}

#[test]
fn one_operation_equals_three() {
    // Planes of one element, of less than a block, and of more than a task takes where channels are few.
    for shape in [[5, 3, 1, 1], [2, 4, 7, 9], [2, 3, 70, 130], [2, 3, 200, 170]] {
        let args = Args::random(shape, DType::F64);
        let g = |dims: &[usize]| random_f64(22, "g", dims);
        for (residual, rectified) in [(false, true), (true, false), (true, true)] {
            for mode in [TRAIN, Mode::Eval] {
                let fused = args.run(residual, g, |x, gamma, beta, mean, var, r| {
                    batch_norm_act(x, gamma, beta, mean, var, r, rectified, CFG, mode)
                });
                let composed = args.run(residual, g, |x, gamma, beta, mean, var, r| {
                    let mut y = batch_norm(x, gamma, beta, mean, var, CFG, mode)?;
                    if let Some(r) = r {
                        y = (y + r)?;
                    }
                    if rectified { relu(&y) } else { Ok(y) }
                });
                for ((name, fused), (_, composed)) in fused.iter().zip(&composed) {
                    assert_close(fused, composed, 1e-12, &format!("{name} at {shape:?}, the same numbers in f64"));
                }
            }
        }
    }
}

#[test]
fn gradients_are_central_differences() -> Result<()> {
    let args = Args::random([2, 3, 4, 5], DType::F64);
    for mode in [TRAIN, Mode::Eval] {
        for rectified in [false, true] {
            let f = |t: &[Tensor]| {
                let (mean, var) = (args.mean.copy()?, args.var.copy()?);
                batch_norm_act(&t[0], &t[1], &t[2], &mean, &var, Some(&t[3]), rectified, CFG, mode)
            };
            let inputs = [args.x.clone(), args.gamma.clone(), args.beta.clone(), args.residual.clone()];
            if !rectified {
                // No element so close to the kink that a step of 1e-5 could carry it across.
                let nearest = f(&inputs)?.abs()?.flatten_all()?.min(0)?.to_scalar::<f64>()?;
                assert!(nearest > 2e-4, "an element lies at {nearest}");
            }
            check_gradient(&inputs, f, 120, 1e-7)?;
        }
    }
    Ok(())
}

#[test]
fn results_do_not_depend_on_threads() {
    // Five channels: one thread takes a task a channel, two and three take a task a part.
    let args = Args::random([3, 5, 200, 170], DType::F32);
    for rectified in [false, true] {
        let run = |threads: usize| -> Vec<Vec<u32>> {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let g = |dims: &[usize]| random_f64(23, "g", dims).to_dtype(DType::F32).unwrap();
            let f = |x: &Tensor, gamma: &Tensor, beta: &Tensor, mean: &Tensor, var: &Tensor, r: Option<&Tensor>| {
                batch_norm_act(x, gamma, beta, mean, var, r, rectified, CFG, TRAIN)
            };
            pool.install(|| args.run(true, g, f)).iter().map(|(_, t)| bits(t)).collect()
        };
        let one = run(1);
        assert!(one == run(2) && one == run(3));
    }
}

#[test]
fn f32_statistics_keep_seven_digits_far_from_zero() {
    // Mean 3000 spreads away, and two halves 2000 apart with a spread of 0.01 each: neither rounding of the mean nor the
    // distance between blocks may reach the variance.
    let noise = random_f64(24, "noise", &[2, 1, 90, 100]);
    let halves = Tensor::cat(&[noise.narrow(0, 0, 1).unwrap(), (noise.narrow(0, 1, 1).unwrap() + 2e5).unwrap()], 0);
    for x in [(&noise + 3000.0).unwrap(), (halves.unwrap() * 0.01).unwrap()] {
        let x = x.to_dtype(DType::F32).unwrap();
        let statistics = |dtype: DType| {
            let of = |value: f64| Tensor::full(value, 1, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            let (mean, var) = (of(0.0), of(0.0));
            let cfg = BatchNormConfig { momentum: 1.0, ..CFG };
            batch_norm(&x.to_dtype(dtype).unwrap(), &of(1.0), &of(0.0), &mean, &var, cfg, TRAIN).unwrap();
            [mean, var].map(|t| t.to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap()[0])
        };
        let (narrow, wide) = (statistics(DType::F32), statistics(DType::F64));
        for (name, k) in [("mean", 0), ("variance", 1)] {
            let apart = (narrow[k] - wide[k]).abs() / wide[k].abs();
            assert!(apart < 2e-7, "{name} {} for {}: {apart:.1e}", narrow[k], wide[k]);
        }
    }
}

#[test]
fn the_rectifier_is_that_of_relu() -> Result<()> {
    // Evaluation with mean 0 and variance 1 - eps is the identity.
    let values = |v: &[f32]| Tensor::new(v, &Device::Cpu)?.reshape((1, 1, 1, v.len()));
    let one = |v: f32| Tensor::new(&[v], &Device::Cpu);
    let x = Var::from_tensor(&values(&[-1.0, 0.0, -0.0, 2.0, f32::NAN, f32::INFINITY])?)?;
    let r = Var::from_tensor(&values(&[0.5, 0.0, 0.0, -2.0, 0.0, 0.0])?)?;
    let y = batch_norm_act(&x, &one(1.0)?, &one(0.0)?, &one(0.0)?, &one(1.0 - 1e-5)?, Some(&r), true, CFG, Mode::Eval)?;
    let found = y.flatten_all()?.to_vec1::<f32>()?;
    assert_eq!(found[..4], [0.0; 4]);
    assert!(found[4].is_nan() && found[5] == f32::INFINITY);
    let grads = y.sum_all()?.backward()?;
    let of = |v: &Var| -> Result<Vec<f32>> { Ok(grads.get(v).expect("used").flatten_all()?.to_vec1()?) };
    assert_eq!(of(&r)?, [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]);
    assert_eq!(of(&x)?[..4], [0.0; 4]);
    Ok(())
}

#[test]
fn only_what_is_tracked_gets_a_gradient() -> Result<()> {
    let args = Args::random([2, 3, 4, 5], DType::F64);
    let Args { x, gamma, beta, mean, var, residual } = &args;
    for rectified in [false, true] {
        let plain = batch_norm_act(x, gamma, beta, mean, var, Some(residual), rectified, CFG, Mode::Eval)?;
        assert!(!plain.track_op());
        let tracked = Var::from_tensor(x)?;
        let y = batch_norm_act(&tracked, gamma, beta, mean, var, Some(residual), rectified, CFG, Mode::Eval)?;
        let grads = y.sum_all()?.backward()?;
        assert!(grads.get(&tracked).is_some() && grads.get(residual).is_none() && grads.get(gamma).is_none());
        // The input as its own residual: both parts of the gradient add.
        let both = batch_norm_act(&tracked, gamma, beta, mean, var, Some(&tracked), rectified, CFG, Mode::Eval)?;
        let apart = Var::from_tensor(x)?;
        let two = batch_norm_act(&tracked, gamma, beta, mean, var, Some(&apart), rectified, CFG, Mode::Eval)?;
        let (one, two) = (both.sum_all()?.backward()?, two.sum_all()?.backward()?);
        let sum = (two.get(&tracked).expect("used") + two.get(&apart).expect("used"))?;
        assert_close(one.get(&tracked).expect("used"), &sum, 1e-14, "the same numbers");
    }
    Ok(())
}

#[test]
fn a_residual_of_another_shape_is_refused() {
    let Args { x, gamma, beta, mean, var, residual } = &Args::random([2, 3, 4, 5], DType::F64);
    let call = |r: &Tensor| batch_norm_act(x, gamma, beta, mean, var, Some(r), true, CFG, Mode::Eval);
    let text = call(&residual.narrow(3, 0, 4).unwrap()).unwrap_err().to_string();
    assert!(text.contains("residual [2, 3, 4, 4] for x [2, 3, 4, 5]"), "{text}");
    assert!(matches!(call(&residual.to_dtype(DType::F32).unwrap()), Err(OpsError::Config { .. })));
    // Strides of any kind are taken.
    let turned = residual.transpose(2, 3).unwrap().contiguous().unwrap().transpose(2, 3).unwrap();
    assert_close(&call(&turned).unwrap(), &call(residual).unwrap(), 0.0, "the same numbers");
}

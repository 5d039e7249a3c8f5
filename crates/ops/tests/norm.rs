//! Batch normalisation against PyTorch, a naive loop, finite differences and laws.

mod reference;

use candle_core::{DType, Device, Tensor, Var};
use reference::{bits, check_gradients, fixture};
use segdistill_ops::testing::{assert_close, devices, random_f64};
use segdistill_ops::{BatchNormConfig, Init, Mode, OpsError, ParamKind, ParamStore, Result, batch_norm};

const TRAIN: Mode = Mode::Train { seed: 0, step: 0 };

fn filled(c: usize, value: f64, dtype: DType) -> Tensor {
    Tensor::full(value, c, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

#[test]
fn training_steps_and_evaluation_equal_pytorch() {
    let cases = fixture("norm");
    // The second channel's mean is 500 times its spread: x alone is rounded to 3e-5 of a standard deviation in f32,
    // but the inputs are exact in f32 and the statistics formed in f64.
    let on = |device: &Device| {
        // cuDNN forms f32 statistics in f32.
        let f32_tolerance = if device.is_cpu() { 1e-4 } else { 2e-3 };
        [(device.clone(), DType::F64, 1e-11), (device.clone(), DType::F32, f32_tolerance)]
    };
    for (device, dtype, tolerance) in devices().iter().flat_map(on) {
        let get = |name: &str| cases[name].to_dtype(dtype).unwrap().to_device(&device).unwrap();
        let [gamma, beta] = ["gamma", "beta"].map(|n| Var::from_tensor(&get(n)).unwrap());
        let [mean, var] = [0.0, 1.0].map(|value| filled(4, value, dtype).to_device(&device).unwrap());
        for (name, mode) in [("train0", TRAIN), ("train1", TRAIN), ("train2", TRAIN), ("eval", Mode::Eval)] {
            let part = |p: &str| get(&format!("{name}.{p}"));
            let x = Var::from_tensor(&part("x")).unwrap();
            let y = batch_norm(&x, &gamma, &beta, &mean, &var, BatchNormConfig::default(), mode).unwrap();
            let grads = (&y * part("g")).unwrap().sum_all().unwrap().backward().unwrap();
            let close = |found: &Tensor, p: &str| {
                // Gradients of the fourth channel are divided by its spread of 1e-3: relative to the largest.
                let exact = &cases[&format!("{name}.{p}")];
                let scale = exact.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f64>().unwrap();
                let found = found.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
                let reason = format!("{name}.{p} {dtype:?} on {:?}", device.location());
                assert_close(&(found / scale).unwrap(), &(exact / scale).unwrap(), tolerance, &reason);
            };
            close(&y, "y");
            close(grads.get(&x).unwrap(), "dx");
            close(grads.get(&gamma).unwrap(), "dgamma");
            close(grads.get(&beta).unwrap(), "dbeta");
            close(&mean, "running_mean");
            close(&var, "running_var");
        }
    }
}

/// Three passes over one channel, nothing shared with the kernel.
fn naive(x: &[f64], n: usize, c: usize, hw: usize, eps: f64) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let (mut y, mut means, mut variances) = (vec![0.0; x.len()], Vec::new(), Vec::new());
    for k in 0..c {
        let at: Vec<usize> = (0..n).flat_map(|i| (0..hw).map(move |p| (i * c + k) * hw + p)).collect();
        let mean = at.iter().map(|&i| x[i]).sum::<f64>() / at.len() as f64;
        let variance = at.iter().map(|&i| (x[i] - mean).powi(2)).sum::<f64>() / at.len() as f64;
        for i in at {
            y[i] = (x[i] - mean) / (variance + eps).sqrt();
        }
        means.push(mean);
        variances.push(variance);
    }
    (y, means, variances)
}

#[test]
fn training_equals_a_naive_loop_across_block_edges() {
    // Planes of 1, of less than a block, and of more than one block of 4096 elements with a rest.
    for (n, c, h, w) in [(5, 3, 1, 1), (1, 2, 7, 9), (2, 3, 70, 130)] {
        let x = (random_f64(1, "norm", &[n, c, h, w]) + 100.0).unwrap();
        let (y, means, variances) = naive(&x.flatten_all().unwrap().to_vec1().unwrap(), n, c, h * w, 1e-5);
        let expected = Tensor::from_vec(y, x.shape(), &Device::Cpu).unwrap();
        let m = (n * h * w) as f64;
        for device in devices() {
            let filled = |value| filled(c, value, DType::F64).to_device(&device).unwrap();
            let [mean, var, gamma, beta] = [2.0, 3.0, 1.0, 0.0].map(filled);
            let cfg = BatchNormConfig { eps: 1e-5, momentum: 0.25 };
            let found = batch_norm(&x.to_device(&device).unwrap(), &gamma, &beta, &mean, &var, cfg, TRAIN).unwrap();
            // cuDNN's order of sums is its own.
            let slack = if device.is_cpu() { 1.0 } else { 100.0 };
            assert_close(&found, &expected, slack * 1e-10, "f64, mean 100 spreads away");
            let running: Vec<f64> = means.iter().map(|v| 0.75 * 2.0 + 0.25 * v).collect();
            assert_close(&mean, &Tensor::new(running, &Device::Cpu).unwrap(), slack * 1e-13, "f64");
            let running: Vec<f64> = variances.iter().map(|v| 0.75 * 3.0 + 0.25 * v * m / (m - 1.0)).collect();
            assert_close(&var, &Tensor::new(running, &Device::Cpu).unwrap(), slack * 1e-12, "f64");
        }
    }
}

#[test]
fn gradients_are_central_differences() -> Result<()> {
    let [x, gamma, beta] =
        [&[2, 3, 4, 5][..], &[3], &[3]].map(|s| (random_f64(2, &format!("{s:?}"), s) + 0.3).unwrap());
    let (mean, var) = (random_f64(3, "mean", &[3]), (random_f64(3, "var", &[3]) + 1.5)?);
    for mode in [TRAIN, Mode::Eval] {
        let f = |t: &[Tensor]| {
            let [mean, var] = [&mean, &var].map(|s| s.copy().and_then(|s| s.to_device(t[0].device())));
            batch_norm(&t[0], &t[1], &t[2], &mean?, &var?, BatchNormConfig::default(), mode)
        };
        check_gradients(&[x.clone(), gamma.clone(), beta.clone()], f, 120, 1e-7)?;
    }
    Ok(())
}

#[test]
fn the_store_sees_the_running_statistics_and_gives_them_no_gradient() -> Result<()> {
    let store = ParamStore::trainable(0, DType::F32, &Device::Cpu);
    let bn = store.root().pp("bn");
    let gamma = bn.get("weight", &[2], ParamKind::Norm, Init::Constant(1.0))?;
    let beta = bn.get("bias", &[2], ParamKind::Norm, Init::Constant(0.0))?;
    let mean = bn.get("running_mean", &[2], ParamKind::Buffer, Init::Constant(0.0))?;
    let var = bn.get("running_var", &[2], ParamKind::Buffer, Init::Constant(1.0))?;
    let x = Tensor::from_slice(&[1f32, 3.0, 10.0, 30.0], (1, 2, 1, 2), &Device::Cpu)?;
    let y = batch_norm(&x, &gamma, &beta, &mean, &var, BatchNormConfig::default(), TRAIN)?;
    let grads = y.sqr()?.sum_all()?.backward()?;
    for p in store.named() {
        let variable = p.var.clone().expect("trainable");
        let found = variable.as_tensor().to_vec1::<f32>()?;
        match p.name.as_str() {
            // 0.1 of the means 2 and 20; 0.9 + 0.1 of the unbiased variances 2 and 200.
            "bn.running_mean" => assert_eq!(found, [0.2, 2.0]),
            "bn.running_var" => assert_eq!(found, [1.1, 20.9]),
            _ => {}
        }
        assert_eq!(grads.get(variable.as_tensor()).is_some(), p.kind == ParamKind::Norm, "{}", p.name);
        assert!(p.kind == ParamKind::Norm || grads.get(&p.tensor).is_none(), "{}", p.name);
    }
    Ok(())
}

#[test]
fn evaluation_changes_nothing_and_records_no_graph_on_plain_tensors() -> Result<()> {
    let x = random_f64(4, "norm", &[2, 3, 4, 5]);
    let (mean, var) = (random_f64(5, "mean", &[3]), filled(3, 2.0, DType::F64));
    let before = mean.copy()?;
    let (gamma, beta) = (filled(3, 1.5, DType::F64), filled(3, 0.5, DType::F64));
    let y = batch_norm(&x, &gamma, &beta, &mean, &var, BatchNormConfig::default(), Mode::Eval)?;
    assert!(!y.track_op());
    assert_close(&mean, &before, 0.0, "untouched");
    assert_close(&var, &filled(3, 2.0, DType::F64), 0.0, "untouched");
    // A batch equals its items in evaluation.
    let item = batch_norm(&x.narrow(0, 1, 1)?, &gamma, &beta, &mean, &var, BatchNormConfig::default(), Mode::Eval)?;
    assert_close(&y.narrow(0, 1, 1)?, &item, 0.0, "same numbers");
    Ok(())
}

#[test]
fn a_later_training_step_leaves_an_earlier_graph_alone() -> Result<()> {
    // The teacher-student loop evaluates between forward and backward: saved statistics must not be the running ones.
    let x = Var::from_tensor(&random_f64(6, "norm", &[2, 3, 4, 5]))?;
    let (gamma, beta) = (filled(3, 1.5, DType::F64), filled(3, 0.5, DType::F64));
    let (mean, var) = (filled(3, 0.0, DType::F64), filled(3, 1.0, DType::F64));
    let cfg = BatchNormConfig::default();
    let gradient = |disturb: bool| -> Result<Tensor> {
        let (mean, var) = (mean.copy()?, var.copy()?);
        let y = batch_norm(&x, &gamma, &beta, &mean, &var, cfg, Mode::Eval)?;
        if disturb {
            batch_norm(&(x.detach() * 7.0)?, &gamma, &beta, &mean, &var, cfg, TRAIN)?;
        }
        Ok(y.sqr()?.sum_all()?.backward()?.get(&x).expect("x is used").clone())
    };
    assert_close(&gradient(true)?, &gradient(false)?, 0.0, "same numbers");
    Ok(())
}

#[test]
fn results_do_not_depend_on_threads_and_consumers_add() {
    let c = 5;
    let make = |name: &str, dtype| random_f64(7, name, &[c]).to_dtype(dtype).unwrap();
    let apply = |x: &Tensor| {
        let (mean, var) = (filled(c, 0.0, x.dtype()), filled(c, 1.0, x.dtype()));
        let (gamma, beta) = (make("gamma", x.dtype()), make("beta", x.dtype()));
        batch_norm(x, &gamma, &beta, &mean, &var, BatchNormConfig::default(), TRAIN)
    };
    reference::assert_threads_agree(&[3, c, 45, 60], apply);
    reference::assert_consumers_add(&[2, c, 6, 7], apply);
    let statistics = |threads: usize| {
        let x = random_f64(8, "x", &[3, c, 90, 60]).to_dtype(DType::F32).unwrap();
        let (mean, var) = (filled(c, 0.0, DType::F32), filled(c, 1.0, DType::F32));
        let (gamma, beta) = (make("gamma", DType::F32), make("beta", DType::F32));
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| batch_norm(&x, &gamma, &beta, &mean, &var, BatchNormConfig::default(), TRAIN)).unwrap();
        (bits(&mean), bits(&var))
    };
    assert!(statistics(1) == statistics(2) && statistics(1) == statistics(3));
}

#[test]
fn misuse_is_refused() {
    let x = random_f64(9, "norm", &[1, 3, 1, 1]);
    let c3 = filled(3, 1.0, DType::F64);
    let cfg = BatchNormConfig::default();
    let shape = |r: Result<Tensor>| matches!(r, Err(OpsError::Shape { .. }));
    let config = |r: Result<Tensor>| matches!(r, Err(OpsError::Config { .. }));
    assert!(shape(batch_norm(&x, &c3, &c3, &c3, &c3, cfg, TRAIN)), "one element a channel");
    assert!(batch_norm(&x, &c3, &c3, &c3, &c3, cfg, Mode::Eval).is_ok());
    let text = batch_norm(&x, &c3, &c3, &c3, &filled(4, 1.0, DType::F64), cfg, Mode::Eval).unwrap_err().to_string();
    assert!(text.contains("running_var [4]") && text.contains("[3]"), "{text}");
    assert!(shape(batch_norm(&c3, &c3, &c3, &c3, &c3, cfg, Mode::Eval)));
    assert!(config(batch_norm(&x, &filled(3, 1.0, DType::F32), &c3, &c3, &c3, cfg, Mode::Eval)));
    assert!(config(batch_norm(&x, &c3, &c3, &c3, &c3, BatchNormConfig { eps: 0.0, ..cfg }, Mode::Eval)));
    assert!(config(batch_norm(&x, &c3, &c3, &c3, &c3, BatchNormConfig { momentum: 1.5, ..cfg }, Mode::Eval)));
    let x = random_f64(9, "norm", &[2, 3, 2, 2]);
    let tracked = Var::from_tensor(&c3).unwrap();
    assert!(config(batch_norm(&x, &c3, &c3, &tracked, &c3, cfg, TRAIN)), "running mean inside a graph");
}

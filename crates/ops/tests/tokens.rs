//! Operations on tokens - linear, layer norm, GELU, attention - and stochastic depth, against PyTorch, naive loops, finite
//! differences and their laws.

mod reference;

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use reference::{assert_consumers_add, assert_threads_agree, check_case, check_gradients, fixture};
use segdistill_ops::rng::Stream;
use segdistill_ops::testing::{assert_close, devices, random_f64};
use segdistill_ops::{Mode, OpsError, Result, attention, drop_path, gelu, layer_norm, linear, to_maps, to_tokens};

/// Compares value and every gradient of case `name` in both types on every device.
fn check_inputs(
    cases: &BTreeMap<String, Tensor>,
    name: &str,
    inputs: &[&str],
    f32_tolerance: f64,
    f: impl Fn(&[Var]) -> Result<Tensor>,
) {
    let part = |part: &str| cases.get(&format!("{name}.{part}")).unwrap_or_else(|| panic!("no {name}.{part}"));
    for device in devices() {
        for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, f32_tolerance)] {
            let there = |t: &Tensor| t.to_dtype(dtype).unwrap().to_device(&device).unwrap();
            let vars: Vec<Var> = inputs.iter().map(|key| Var::from_tensor(&there(part(key))).unwrap()).collect();
            let y = f(&vars).unwrap();
            let grads = (&y * there(part("g"))).unwrap().sum_all().unwrap().backward().unwrap();
            let place = format!("{name} in {dtype:?} on {:?}", device.location());
            assert_eq!(y.dtype(), dtype, "{place}");
            assert_close(&y, part("y"), tolerance, &format!("{place}: rounding of a few operations"));
            for (key, var) in inputs.iter().zip(&vars) {
                let found = grads.get(var).unwrap_or_else(|| panic!("{place}: no gradient of {key}"));
                assert_close(found, part(&format!("d{key}")), tolerance, &format!("{place}: gradient of {key}"));
            }
        }
    }
}

#[test]
fn token_operations_equal_pytorch() {
    let cases = fixture("tokens");
    check_inputs(&cases, "linear", &["input", "weight", "bias"], 2e-6, |t| linear(&t[0], &t[1], Some(&t[2])));
    // The second row's mean is 300 times its spread.
    check_inputs(&cases, "layer_norm", &["x", "gamma", "beta"], 2e-5, |t| layer_norm(&t[0], &t[1], &t[2], 1e-6));
    check_case(&cases, "gelu", 5e-7, gelu);
    for (name, heads) in [("one_head", 1), ("three_heads", 3)] {
        check_inputs(&cases, name, &["q", "k", "v"], 5e-6, |t| attention(&t[0], &t[1], &t[2], heads));
    }
}

fn flat(t: &Tensor) -> Vec<f64> {
    t.flatten_all().unwrap().to_vec1::<f64>().unwrap()
}

#[test]
fn linear_equals_a_naive_loop() -> Result<()> {
    // One row, several tasks of rows, and more features than a task owns.
    for (rows, d_in, d_out) in [(1, 3, 4), (5, 1, 1), (700, 9, 13), (300, 40, 300)] {
        let (x, w, b) =
            (random_f64(1, "x", &[rows, d_in]), random_f64(2, "w", &[d_out, d_in]), random_f64(3, "b", &[d_out]));
        let (xs, ws, bs) = (flat(&x), flat(&w), flat(&b));
        let expected = |bias: bool| {
            let value = |i: usize| -> f64 {
                let (row, out) = (i / d_out, i % d_out);
                let products = (0..d_in).map(|k| xs[row * d_in + k] * ws[out * d_in + k]);
                products.sum::<f64>() + if bias { bs[out] } else { 0.0 }
            };
            Tensor::from_vec((0..rows * d_out).map(value).collect::<Vec<_>>(), (rows, d_out), &Device::Cpu).unwrap()
        };
        // The weight's gradient for a gradient of the result: sums over rows.
        let g = random_f64(4, "g", &[rows, d_out]);
        let gs = flat(&g);
        let dw: Vec<f64> = (0..d_out * d_in)
            .map(|i| (0..rows).map(|r| gs[r * d_out + i / d_in] * xs[r * d_in + i % d_in]).sum())
            .collect();
        let db: Vec<f64> = (0..d_out).map(|o| (0..rows).map(|r| gs[r * d_out + o]).sum()).collect();
        for device in devices() {
            let [x, w, b, g] = [&x, &w, &b, &g].map(|t| t.to_device(&device).unwrap());
            assert_close(&linear(&x, &w, None)?, &expected(false), 1e-12, "sums of up to 40");
            let (w, b) = (Var::from_tensor(&w)?, Var::from_tensor(&b)?);
            let y = linear(&x, &w, Some(b.as_tensor()))?;
            assert_close(&y, &expected(true), 1e-12, "sums of up to 40");
            let grads = (y * g)?.sum_all()?.backward()?;
            let dw = Tensor::from_slice(&dw, (d_out, d_in), &Device::Cpu)?;
            assert_close(grads.get(&w).expect("used"), &dw, 1e-11, "sums of up to 700");
            assert_close(
                grads.get(&b).expect("used"),
                &Tensor::new(&db[..], &Device::Cpu)?,
                1e-11,
                "sums of up to 700",
            );
            assert!(grads.get(&x).is_none(), "nobody stands behind x");
        }
    }
    Ok(())
}

#[test]
fn layer_norm_equals_a_naive_loop() -> Result<()> {
    for (rows, d) in [(1, 1), (3, 2), (70, 31), (130, 64)] {
        let x = random_f64(5, "x", &[rows, d]);
        let (gamma, beta) = (random_f64(6, "gamma", &[d]), random_f64(7, "beta", &[d]));
        let (gammas, betas) = (flat(&gamma), flat(&beta));
        let mut expected = Vec::new();
        for row in flat(&x).chunks(d) {
            let mean = row.iter().sum::<f64>() / d as f64;
            let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / d as f64;
            let normal = row.iter().map(|v| (v - mean) / (variance + 1e-5).sqrt());
            expected.extend(normal.enumerate().map(|(i, v)| v * gammas[i] + betas[i]));
        }
        let expected = Tensor::from_vec(expected, (rows, d), &Device::Cpu)?;
        for device in devices() {
            let [x, gamma, beta] = [&x, &gamma, &beta].map(|t| t.to_device(&device).unwrap());
            assert_close(&layer_norm(&x, &gamma, &beta, 1e-5)?, &expected, 1e-11, "another order of sums");
        }
    }
    Ok(())
}

fn naive_attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize) -> Tensor {
    let ((n, l, d), m) = (q.dims3().unwrap(), k.dims()[1]);
    let (qs, ks, vs, width) = (flat(q), flat(k), flat(v), d / heads);
    let mut out: Vec<f64> = Vec::new();
    for (image, query, at) in (0..n * l * d).map(|i| (i / (l * d), i / d % l, i % d)) {
        let first = at / width * width;
        let scores: Vec<f64> = (0..m)
            .map(|key| {
                let products =
                    (first..first + width).map(|e| qs[(image * l + query) * d + e] * ks[(image * m + key) * d + e]);
                (products.sum::<f64>() / (width as f64).sqrt()).exp()
            })
            .collect();
        let total: f64 = scores.iter().sum();
        out.push((0..m).map(|key| scores[key] / total * vs[(image * m + key) * d + at]).sum());
    }
    Tensor::from_vec(out, (n, l, d), &Device::Cpu).unwrap()
}

#[test]
fn attention_equals_a_naive_loop() -> Result<()> {
    // Blocks of 64 queries, shares of several blocks, heads and images.
    for (n, l, m, d, heads) in
        [(1, 1, 1, 1, 1), (2, 5, 3, 6, 3), (1, 150, 40, 8, 2), (3, 70, 9, 8, 8), (1, 600, 7, 4, 1)]
    {
        let q = random_f64(8, "q", &[n, l, d]);
        let (k, v) = (random_f64(9, "k", &[n, m, d]), random_f64(10, "v", &[n, m, d]));
        let expected = naive_attention(&q, &k, &v, heads);
        for device in devices() {
            let [q, k, v] = [&q, &k, &v].map(|t| t.to_device(&device).unwrap());
            assert_close(&attention(&q, &k, &v, heads)?, &expected, 1e-13, "another order of sums");
        }
    }
    Ok(())
}

#[test]
fn gradients_are_central_differences() -> Result<()> {
    let inputs = [random_f64(11, "x", &[3, 4, 5]), random_f64(12, "w", &[6, 5]), random_f64(13, "b", &[6])];
    check_gradients(&inputs, |t| linear(&t[0], &t[1], Some(&t[2])), 60, 1e-8)?;
    check_gradients(&inputs[..2], |t| linear(&t[0], &t[1], None), 60, 1e-8)?;
    let inputs = [random_f64(14, "x", &[2, 3, 7]), random_f64(15, "gamma", &[7]), random_f64(16, "beta", &[7])];
    check_gradients(&inputs, |t| layer_norm(&t[0], &t[1], &t[2], 1e-5), 60, 1e-7)?;
    check_gradients(&[(random_f64(17, "x", &[200]) * 4.0)?], |t| gelu(&t[0]), 200, 1e-8)?;
    for (l, m, heads) in [(5, 3, 2), (150, 6, 1), (4, 70, 4)] {
        let inputs = [("q", l), ("k", m), ("v", m)].map(|(name, len)| random_f64(18, name, &[2, len, 4]));
        check_gradients(&inputs, |t| attention(&t[0], &t[1], &t[2], heads), 60, 1e-7)?;
    }
    let train = Mode::Train { seed: 2, step: 3 };
    check_gradients(&[random_f64(19, "x", &[8, 2, 3])], |t| drop_path(&t[0], 0.5, train, "block"), 48, 1e-8)
}

#[test]
fn gelu_is_the_normal_distribution_in_f32_too() -> Result<()> {
    // From beyond the left tail to the identity, and both of its sides of 0, each against f64.
    let points: Vec<f32> = (-4_000..=4_000).map(|i| i as f32 * 3e-3).collect();
    let x = Tensor::new(&points[..], &Device::Cpu)?;
    let wide = gelu(&x.to_dtype(DType::F64)?)?.to_vec1::<f64>()?;
    for ((&x, found), exact) in points.iter().zip(gelu(&x)?.to_vec1::<f32>()?).zip(wide) {
        // 0.75e-7 of the formula, and rounding.
        let allowed = 1.5e-7 * f64::from(x.abs()) + 1e-12;
        assert!((f64::from(found) - exact).abs() <= allowed, "{x}: {found}, exactly {exact}");
    }
    for device in devices() {
        let ends = Tensor::new(&[f32::INFINITY, 1e30, -1e30, f32::NAN], &device)?;
        let ends = gelu(&ends)?.to_vec1::<f32>()?;
        assert!(ends[0] == f32::INFINITY && ends[1] == 1e30 && ends[2] == 0.0 && ends[3].is_nan(), "{ends:?}");
    }
    // gelu(x) - gelu(-x) = x.
    let x = random_f64(20, "x", &[500]);
    assert_close(&(gelu(&x)? - gelu(&x.neg()?)?)?, &x, 1e-15, "the distribution's two sides add up to 1");
    Ok(())
}

#[test]
fn layer_norm_sees_neither_shift_nor_scale() -> Result<()> {
    let x = random_f64(21, "x", &[40, 33]);
    let (one, zero) = (Tensor::ones(33, DType::F64, &Device::Cpu)?, Tensor::zeros(33, DType::F64, &Device::Cpu)?);
    let plain = layer_norm(&x, &one, &zero, 1e-12)?;
    let moved = layer_norm(&((&x * 7.0)? + 100.0)?, &one, &zero, 1e-12)?;
    assert_close(&moved, &plain, 1e-10, "rounding of numbers near 100");
    assert_close(&plain.mean(1)?, &Tensor::zeros(40, DType::F64, &Device::Cpu)?, 1e-13, "mean 0");
    assert_close(&plain.sqr()?.mean(1)?, &Tensor::ones(40, DType::F64, &Device::Cpu)?, 1e-10, "variance 1");
    // In f32 a mean 10 000 times the spread costs nothing but the digits of x.
    let far = (&x + 1e4)?.to_dtype(DType::F32)?;
    let [one, zero] = [&one, &zero].map(|t| t.to_dtype(DType::F32).unwrap());
    let exact = layer_norm(&far.to_dtype(DType::F64)?, &one.to_dtype(DType::F64)?, &zero.to_dtype(DType::F64)?, 1e-6)?;
    assert_close(&layer_norm(&far, &one, &zero, 1e-6)?, &exact, 1e-6, "f32 rounding of numbers near 1");
    Ok(())
}

#[test]
fn attention_keeps_its_laws() -> Result<()> {
    let [q, k, v] = [("q", 9), ("k", 6), ("v", 6)].map(|(name, len)| random_f64(22, name, &[2, len, 8]));
    let y = attention(&q, &k, &v, 2)?;
    // Keys in another order change nothing; queries in another order come out in that order.
    let order = Tensor::new(&[5u32, 3, 0, 1, 4, 2], &Device::Cpu)?;
    let turned = attention(&q, &k.index_select(&order, 1)?, &v.index_select(&order, 1)?, 2)?;
    assert_close(&turned, &y, 1e-14, "another order of sums");
    let order = Tensor::new(&[8u32, 7, 6, 5, 4, 3, 2, 1, 0], &Device::Cpu)?;
    let turned = attention(&q.index_select(&order, 1)?, &k, &v, 2)?;
    assert_close(&turned, &y.index_select(&order, 1)?, 1e-14, "another order of rows");
    // Equal values come out as they are; equal keys give the mean.
    let ones = v.ones_like()?;
    assert_close(&attention(&q, &k, &ones, 2)?, &q.ones_like()?, 1e-14, "weights sum to 1");
    let mean = v.mean_keepdim(1)?.broadcast_as((2, 9, 8))?.contiguous()?;
    assert_close(&attention(&q, &k.zeros_like()?, &v, 2)?, &mean, 1e-14, "equal weights");
    // A large score picks its value, without overflow; a batch equals its items; heads are apart.
    let picked = attention(
        &Tensor::full(1e4f32, (1, 1, 1), &Device::Cpu)?,
        &Tensor::new(&[[[1f32], [9.0], [3.0]]], &Device::Cpu)?,
        &Tensor::new(&[[[5f32], [6.0], [7.0]]], &Device::Cpu)?,
        1,
    )?;
    assert_eq!(picked.flatten_all()?.to_vec1::<f32>()?, [6.0]);
    let item = |t: &Tensor| t.narrow(0, 1, 1).unwrap();
    assert_close(&attention(&item(&q), &item(&k), &item(&v), 2)?, &item(&y), 0.0, "the same sums");
    let half = |t: &Tensor| t.narrow(2, 4, 4).unwrap();
    assert_close(&attention(&half(&q), &half(&k), &half(&v), 1)?, &half(&y), 1e-15, "the second head");
    Ok(())
}

#[test]
fn threads_and_consumers_change_nothing() -> Result<()> {
    let narrow = |t: Tensor| t.to_dtype(DType::F32).unwrap();
    let (w, gamma) = (random_f64(23, "w", &[200, 24]), random_f64(24, "gamma", &[24]));
    let (w32, gamma32) = (narrow(w.clone()), narrow(gamma.clone()));
    let shape = [3, 400, 24];
    assert_threads_agree(&shape, |x| linear(x, &w32, None));
    assert_threads_agree(&shape, |x| layer_norm(x, &gamma32, &gamma32, 1e-5));
    assert_threads_agree(&shape, gelu);
    assert_threads_agree(&shape, |x| attention(x, &x.narrow(1, 0, 30)?, &x.narrow(1, 30, 30)?, 3));
    let there = |t: &Tensor, x: &Tensor| t.to_device(x.device());
    let shape = [2, 5, 24];
    assert_consumers_add(&shape, |x| linear(x, &there(&w, x)?, None));
    assert_consumers_add(&shape, |x| layer_norm(x, &there(&gamma, x)?, &there(&gamma, x)?, 1e-5));
    assert_consumers_add(&shape, gelu);
    assert_consumers_add(&shape, |x| attention(x, x, x, 3));
    // Weights' gradients do not depend on the threads either.
    let x = narrow(random_f64(25, "x", &[900, 24]));
    let gradients = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let [w, gamma] = [&w32, &gamma32].map(|t| Var::from_tensor(t).unwrap());
            let y = linear(&layer_norm(&x, &gamma, &gamma, 1e-5).unwrap(), &w, None).unwrap();
            let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            [&w, &gamma].map(|v| reference::bits(grads.get(v).unwrap()))
        })
    };
    assert!(gradients(1) == gradients(3));
    Ok(())
}

#[test]
fn stochastic_depth_leaves_whole_images_out() -> Result<()> {
    let x = random_f64(26, "x", &[64, 3, 5]);
    let train = Mode::Train { seed: 4, step: 7 };
    let p = 0.3;
    for device in devices() {
        let y = drop_path(&x.to_device(&device)?, p, train, "encoder.block1.0")?;
        let mut stream = Stream::new(4, "drop_path/encoder.block1.0", &[7]);
        let mut kept = 0;
        for i in 0..64 {
            let keep = f64::from(stream.word()) >= (p * 4294967296.0f64).round();
            kept += usize::from(keep);
            let factor = if keep { 1.0 / (1.0 - p) } else { 0.0 };
            assert_close(&y.get(i)?, &(x.get(i)? * factor)?, 1e-15, "one product");
        }
        assert!((30..60).contains(&kept), "{kept} of 64 at 0.7");
    }
    assert_eq!(drop_path(&x, p, Mode::Eval, "a")?.id(), x.id());
    assert_eq!(drop_path(&x, 0.0, train, "a")?.id(), x.id());
    for bad in [-0.1, 1.0, f64::NAN] {
        let error = drop_path(&x, bad, Mode::Eval, "block").unwrap_err().to_string();
        assert!(error.contains("block") && error.contains("hint"), "{error}");
    }
    Ok(())
}

#[test]
fn misuse_is_refused() -> Result<()> {
    let shape = |r: Result<Tensor>| matches!(r, Err(OpsError::Shape { .. }));
    let config = |r: Result<Tensor>| matches!(r, Err(OpsError::Config { .. }));
    let t = |dims: &[usize]| random_f64(27, "t", dims);
    let x = t(&[2, 3, 4]);
    assert!(shape(linear(&x, &t(&[5, 3]), None)) && shape(linear(&x, &t(&[4]), None)));
    assert!(shape(linear(&x, &t(&[5, 4]), Some(&t(&[4])))) && shape(linear(&t(&[0, 4]), &t(&[5, 4]), None)));
    assert!(config(linear(&x, &t(&[5, 4]).to_dtype(DType::F32)?, None)));
    assert!(shape(layer_norm(&x, &t(&[3]), &t(&[4]), 1e-5)) && shape(layer_norm(&x, &t(&[4]), &t(&[1, 4]), 1e-5)));
    assert!(shape(layer_norm(&t(&[0, 4]), &t(&[4]), &t(&[4]), 1e-5)));
    assert!(config(layer_norm(&x, &t(&[4]), &t(&[4]), 0.0)) && config(layer_norm(&x, &t(&[4]), &t(&[4]), f64::NAN)));
    assert!(config(gelu(&x.to_dtype(DType::U8)?)));
    assert!(config(attention(&x, &x, &x, 3)) && config(attention(&x, &x, &x, 0)));
    assert!(shape(attention(&x, &t(&[2, 3, 8]), &t(&[2, 3, 8]), 1)) && shape(attention(&x, &x, &t(&[2, 2, 4]), 1)));
    assert!(shape(attention(&x, &t(&[1, 3, 4]), &t(&[1, 3, 4]), 1)) && shape(attention(&t(&[3, 4]), &x, &x, 1)));
    assert!(shape(attention(&x, &t(&[2, 0, 4]), &t(&[2, 0, 4]), 1)));
    Ok(())
}

#[test]
fn maps_become_tokens_and_come_back() -> Result<()> {
    for shape in [[1, 1, 1, 1], [2, 3, 4, 5], [3, 40, 7, 11], [2, 5, 1, 64]] {
        let [n, c, h, w] = shape;
        let maps = random_f64(28, "maps", &shape);
        let expected = maps.flatten_from(2)?.transpose(1, 2)?.contiguous()?;
        for device in devices() {
            let there = maps.to_device(&device)?;
            let tokens = to_tokens(&there)?;
            assert_eq!(tokens.dims(), [n, h * w, c]);
            assert_close(&tokens, &expected, 0.0, "copies");
            assert_close(&to_maps(&tokens, [h, w])?, &maps, 0.0, "copies");
            let view = there.transpose(2, 3)?;
            assert_close(&to_tokens(&view)?, &to_tokens(&view.contiguous()?)?, 0.0, "a view equals its copy");
        }
    }
    check_gradients(&[random_f64(29, "maps", &[2, 3, 4, 5])], |t| Ok(to_tokens(&t[0])?.sqr()?), 60, 1e-8)?;
    check_gradients(&[random_f64(30, "tokens", &[2, 6, 5])], |t| Ok(to_maps(&t[0], [3, 2])?.sqr()?), 60, 1e-8)?;
    assert_threads_agree(&[3, 20, 33, 41], to_tokens);
    assert_consumers_add(&[2, 3, 4, 5], to_tokens);
    let x = random_f64(31, "x", &[2, 6, 5]);
    for error in [to_maps(&x, [2, 2]), to_maps(&x.flatten_all()?, [3, 2]), to_tokens(&x)] {
        assert!(matches!(error, Err(OpsError::Shape { .. })));
    }
    Ok(())
}

//! Transposed convolution, max pooling with indices and the unpoolings, against PyTorch, naive loops, finite differences
//! and their laws.

mod reference;

use candle_core::{DType, Device, Tensor, Var};
use reference::{assert_consumers_add, assert_threads_agree, check_gradients, fixture};
use segdistill_ops::testing::{assert_close, devices, devices_with_convolution, random_f64};
use segdistill_ops::{
    Conv2dConfig, ConvTranspose2dConfig, OpsError, Pool2dConfig, Precision, Result, bed_of_nails_unpool2d,
    conv_transpose2d, conv2d, max_pool2d, max_pool2d_with_indices, max_unpool2d, nearest_unpool2d,
};

struct Case {
    name: &'static str,
    input: [usize; 4],
    weight: [usize; 4],
    cfg: ConvTranspose2dConfig,
}

/// The first nine are the fixture's.
#[rustfmt::skip]
fn cases() -> Vec<Case> {
    let case = |name, input, weight, stride, padding, output_padding, dilation, groups| Case {
        name,
        input,
        weight,
        cfg: ConvTranspose2dConfig { stride, padding, output_padding, dilation, groups, precision: Precision::F32 },
    };
    vec![
        case("unet_2x2", [2, 4, 5, 6], [4, 2, 2, 2], [2, 2], [0, 0], [0, 0], [1, 1], 1),
        case("fcn_4x4", [1, 3, 5, 4], [3, 3, 4, 4], [2, 2], [1, 1], [0, 0], [1, 1], 1),
        case("fcn_16x16", [1, 2, 4, 3], [2, 2, 16, 16], [8, 8], [4, 4], [0, 0], [1, 1], 1),
        case("stride1", [2, 3, 6, 7], [3, 4, 3, 3], [1, 1], [1, 1], [0, 0], [1, 1], 1),
        case("output_padding", [2, 3, 5, 4], [3, 2, 3, 3], [2, 3], [1, 0], [1, 2], [1, 1], 1),
        case("dilated", [1, 2, 6, 5], [2, 3, 3, 3], [2, 1], [2, 1], [1, 0], [2, 3], 1),
        case("grouped", [2, 6, 4, 5], [6, 2, 3, 3], [2, 2], [1, 1], [1, 1], [1, 1], 3),
        case("depthwise", [2, 5, 6, 4], [5, 1, 4, 4], [2, 2], [1, 1], [0, 0], [1, 1], 5),
        case("per_axis", [1, 3, 3, 8], [3, 2, 2, 5], [3, 1], [0, 2], [0, 0], [1, 1], 1),
        case("pointwise", [2, 3, 4, 5], [3, 7, 1, 1], [1, 1], [0, 0], [0, 0], [1, 1], 1),
        case("gaps", [1, 2, 3, 4], [2, 2, 1, 1], [3, 2], [0, 0], [2, 1], [1, 1], 1),
        case("cut_to_one_pixel", [1, 2, 1, 2], [2, 3, 3, 4], [2, 2], [1, 2], [0, 0], [1, 1], 1),
        case("padding_past_kernel", [1, 2, 6, 5], [2, 2, 2, 2], [1, 1], [2, 2], [0, 0], [1, 1], 1),
        case("depthwise_many", [2, 6, 5, 5], [6, 1, 3, 3], [2, 2], [1, 1], [1, 0], [1, 1], 3),
        case("winograd", [2, 9, 17, 19], [9, 8, 3, 3], [1, 1], [1, 1], [0, 0], [1, 1], 1),
        case("channel_blocks", [2, 150, 5, 6], [150, 20, 3, 3], [2, 2], [1, 1], [1, 1], [1, 1], 1),
        case("strips", [1, 5, 40, 33], [5, 6, 4, 4], [2, 2], [1, 1], [0, 0], [1, 1], 1),
        case("no_image", [0, 3, 4, 4], [3, 2, 2, 2], [2, 2], [0, 0], [0, 0], [1, 1], 1),
    ]
}

/// Output and gradients of x, weight and bias for the output gradient `g`.
fn run(cfg: ConvTranspose2dConfig, [x, w, b, g]: [&Tensor; 4]) -> [Tensor; 4] {
    let [x, w, b] = [x, w, b].map(|t| Var::from_tensor(t).unwrap());
    let y = conv_transpose2d(&x, &w, Some(b.as_tensor()), cfg).unwrap();
    let grads = (&y * g).unwrap().sum_all().unwrap().backward().unwrap();
    let [dx, dw, db] = [x, w, b].map(|v| grads.get(&v).expect("a gradient").clone());
    [y.detach(), dx, dw, db]
}

fn assert_results(what: &str, cfg: ConvTranspose2dConfig, inputs: [&Tensor; 4], expected: [&Tensor; 4]) {
    for device in devices_with_convolution() {
        for (dtype, tolerance) in [(DType::F64, 1e-11), (DType::F32, 5e-5)] {
            let there = inputs.map(|t| t.to_dtype(dtype).unwrap().to_device(&device).unwrap());
            let found = run(cfg, there.each_ref());
            for ((name, found), expected) in ["y", "dx", "dw", "db"].iter().zip(&found).zip(expected) {
                assert_eq!(found.dtype(), dtype);
                let reason = format!("{what}: {name} in {dtype:?} on {:?}, sums in another order", device.location());
                assert_close(found, expected, tolerance, &reason);
            }
        }
    }
}

#[test]
fn transposed_convolution_equals_pytorch() {
    let tensors = fixture("decoding");
    for Case { name, cfg, .. } in &cases()[..9] {
        let part = |part: &str| tensors.get(&format!("{name}.{part}")).unwrap_or_else(|| panic!("no {name}.{part}"));
        assert_results(name, *cfg, ["x", "w", "b", "g"].map(part), ["y", "dx", "dw", "db"].map(part));
    }
}

/// The definition: every input pixel lays the kernel onto the output, and its three derivatives.
fn oracle(case: &Case, [x, w, b, g]: [&Tensor; 4]) -> [Tensor; 4] {
    let ([n, c_in, h, wd], [_, c_group, kh, kw]) = (case.input, case.weight);
    let ConvTranspose2dConfig { stride, padding, dilation, groups, .. } = case.cfg;
    let [oh, ow] = case.cfg.output_hw([h, wd], [kh, kw]).unwrap();
    let c_out = c_group * groups;
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let (xs, ws, bs, gs) = (flat(x), flat(w), flat(b), flat(g));
    let (mut y, mut dx) = (vec![0.0; n * c_out * oh * ow], vec![0.0; xs.len()]);
    let (mut dw, mut db) = (vec![0.0; ws.len()], vec![0.0; c_out]);
    for (i, y) in y.iter_mut().enumerate() {
        *y = bs[i / (oh * ow) % c_out];
        db[i / (oh * ow) % c_out] += gs[i];
    }
    for image in 0..n {
        for i in 0..c_in {
            for j in 0..c_group {
                let o = i / (c_in / groups) * c_group + j;
                for (py, px) in (0..h).flat_map(|y| (0..wd).map(move |x| (y, x))) {
                    for (a, b) in (0..kh).flat_map(|a| (0..kw).map(move |b| (a, b))) {
                        let place = |p: usize, axis: usize, tap: usize, size: usize| {
                            (p * stride[axis] + tap * dilation[axis]).checked_sub(padding[axis]).filter(|&v| v < size)
                        };
                        let (Some(ty), Some(tx)) = (place(py, 0, a, oh), place(px, 1, b, ow)) else { continue };
                        let at_x = ((image * c_in + i) * h + py) * wd + px;
                        let at_w = ((i * c_group + j) * kh + a) * kw + b;
                        let at_y = ((image * c_out + o) * oh + ty) * ow + tx;
                        y[at_y] += xs[at_x] * ws[at_w];
                        dx[at_x] += gs[at_y] * ws[at_w];
                        dw[at_w] += gs[at_y] * xs[at_x];
                    }
                }
            }
        }
    }
    let tensor = |values: Vec<f64>, shape: &[usize]| Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
    [tensor(y, &[n, c_out, oh, ow]), tensor(dx, &case.input), tensor(dw, &case.weight), tensor(db, &[c_out])]
}

fn inputs(case: &Case) -> [Tensor; 4] {
    let [n, _, h, w] = case.input;
    let [oh, ow] = case.cfg.output_hw([h, w], [case.weight[2], case.weight[3]]).unwrap();
    let c_out = case.weight[1] * case.cfg.groups;
    [
        random_f64(1, "x", &case.input),
        random_f64(2, "w", &case.weight),
        random_f64(3, "b", &[c_out]),
        random_f64(4, "g", &[n, c_out, oh, ow]),
    ]
}

#[test]
fn transposed_convolution_equals_its_definition() {
    for case in cases() {
        let inputs = inputs(&case);
        let inputs = inputs.each_ref();
        assert_results(case.name, case.cfg, inputs, oracle(&case, inputs).each_ref());
    }
}

#[test]
fn transposed_convolution_is_the_transpose_of_convolution() -> Result<()> {
    for case in cases() {
        let ConvTranspose2dConfig { stride, padding, dilation, groups, precision, .. } = case.cfg;
        let [x, w, b, y] = inputs(&case);
        let up = conv_transpose2d(&x, &w, None, case.cfg)?;
        let down = conv2d(&y, &w, None, Conv2dConfig { stride, padding, dilation, groups, precision })?;
        assert_eq!(down.dims(), x.dims(), "{}: the sizes turn around, too", case.name);
        let [left, right] =
            [(up.clone() * &y)?, (x.clone() * down)?].map(|t| t.sum_all().unwrap().to_scalar::<f64>().unwrap());
        assert!((left - right).abs() <= 1e-10 * left.abs().max(1.0), "{}: {left} {right}", case.name);
        let with_bias = conv_transpose2d(&x, &w, Some(&b), case.cfg)?;
        assert_close(&with_bias, &up.broadcast_add(&b.reshape((1, (), 1, 1))?)?, 1e-13, "the bias is added");
        assert!(!with_bias.track_op(), "no graph on plain tensors");
    }
    Ok(())
}

#[test]
fn transposed_convolution_gradients_are_central_differences() -> Result<()> {
    for case in cases().into_iter().filter(|case| !["no_image", "strips", "channel_blocks"].contains(&case.name)) {
        let [x, w, b, _] = inputs(&case);
        for device in devices_with_convolution() {
            let there = [&x, &w, &b].map(|t| t.to_device(&device).unwrap());
            let f = |t: &[Tensor]| conv_transpose2d(&t[0], &t[1], Some(&t[2]), case.cfg);
            segdistill_ops::testing::check_gradient(&there, f, 12, 1e-8)?;
        }
    }
    Ok(())
}

#[test]
fn transposed_convolution_keeps_its_laws() -> Result<()> {
    let w = random_f64(5, "w", &[6, 4, 4, 4]).to_dtype(DType::F32)?;
    let cfg = ConvTranspose2dConfig { stride: [2, 2], padding: [1, 1], ..Default::default() };
    assert_threads_agree(&[3, 6, 21, 30], |x| conv_transpose2d(x, &w, None, cfg));
    let w = w.to_dtype(DType::F64)?;
    if devices().len() == devices_with_convolution().len() {
        assert_consumers_add(&[2, 6, 5, 4], |x| conv_transpose2d(x, &w.to_device(x.device())?, None, cfg));
    }
    // A batch equals its items, and a view its copy.
    let x = random_f64(6, "x", &[2, 6, 5, 4]);
    let whole = conv_transpose2d(&x, &w, None, cfg)?;
    assert_close(&conv_transpose2d(&x.narrow(0, 1, 1)?, &w, None, cfg)?, &whole.narrow(0, 1, 1)?, 1e-13, "an item");
    let turned = x.transpose(2, 3)?;
    let copied = turned.contiguous()?;
    assert_close(&conv_transpose2d(&turned, &w, None, cfg)?, &conv_transpose2d(&copied, &w, None, cfg)?, 0.0, "view");
    // What no variable stands behind gets no gradient.
    let var = Var::from_tensor(&w)?;
    let grads = conv_transpose2d(&x, &var, None, cfg)?.sum_all()?.backward()?;
    assert!(grads.get(&var).is_some() && grads.get(&x).is_none());
    Ok(())
}

#[test]
fn bilinear_weights_upsample_linearly() -> Result<()> {
    // FCN's initialisation: inside, a ramp stays a ramp of half the slope.
    let store = segdistill_ops::ParamStore::trainable(0, DType::F64, &Device::Cpu);
    let (kind, init) = (segdistill_ops::ParamKind::Weight, segdistill_ops::Init::Bilinear);
    let w = store.root().get("up", &[2, 2, 4, 4], kind, init)?.detach();
    let ramp = Tensor::arange(0f64, 6.0, &Device::Cpu)?.reshape((1, 1, 1, 6))?.broadcast_as((1, 2, 6, 6))?;
    let cfg = ConvTranspose2dConfig { stride: [2, 2], padding: [1, 1], ..Default::default() };
    let y = conv_transpose2d(&ramp, &w, None, cfg)?.narrow(2, 2, 8)?.narrow(3, 1, 10)?;
    let expected = ((Tensor::arange(0f64, 10.0, &Device::Cpu)? * 0.5)? + 0.25)?.reshape((1, 1, 1, 10))?;
    assert_close(&y, &expected.broadcast_as((1, 2, 8, 10))?.contiguous()?, 1e-14, "weights of 1/4 and 3/4");
    Ok(())
}

#[test]
fn wrong_transposed_convolutions_are_refused() -> Result<()> {
    let x = random_f64(7, "x", &[1, 4, 3, 3]);
    let run = |weight: &[usize], bias: Option<usize>, cfg| {
        let bias = bias.map(|n| random_f64(7, "b", &[n]));
        conv_transpose2d(&x, &random_f64(7, "w", weight), bias.as_ref(), cfg)
    };
    let plain = ConvTranspose2dConfig::default();
    let shape = |r: Result<Tensor>| matches!(r, Err(OpsError::Shape { .. }));
    let config = |r: Result<Tensor>| matches!(r, Err(OpsError::Config { .. }));
    assert!(run(&[4, 2, 2, 2], Some(2), plain).is_ok());
    assert!(shape(run(&[2, 4, 2, 2], None, plain)), "a convolution's weight");
    assert!(shape(run(&[4, 2, 2], None, plain)));
    assert!(shape(run(&[4, 2, 2, 2], Some(4), plain)));
    assert!(shape(run(&[4, 2, 2, 2], None, ConvTranspose2dConfig { groups: 3, ..plain })));
    assert!(shape(run(&[4, 2, 2, 2], None, ConvTranspose2dConfig { padding: [2, 0], ..plain })), "nothing left");
    assert!(shape(run(&[4, 0, 2, 2], None, plain)));
    assert!(config(run(&[4, 2, 2, 2], None, ConvTranspose2dConfig { groups: 0, ..plain })));
    assert!(config(run(&[4, 2, 2, 2], None, ConvTranspose2dConfig { stride: [0, 1], ..plain })));
    assert!(config(run(&[4, 2, 2, 2], None, ConvTranspose2dConfig { output_padding: [0, 1], ..plain })));
    let mixed = conv_transpose2d(&x, &random_f64(7, "w", &[4, 1, 1, 1]).to_dtype(DType::F32)?, None, plain);
    assert!(config(mixed));
    let huge = ConvTranspose2dConfig { stride: [usize::MAX; 2], dilation: [usize::MAX; 2], ..plain };
    assert!(shape(run(&[4, 2, 2, 2], None, huge)), "no overflow");
    let text = run(&[4, 2, 2, 2], None, ConvTranspose2dConfig { output_padding: [0, 1], ..plain }).unwrap_err();
    assert!(text.to_string().contains("[0, 1]") && text.to_string().contains("hint"), "{text}");
    Ok(())
}

fn pool(kernel: usize, stride: usize, padding: usize, ceil_mode: bool) -> Pool2dConfig {
    Pool2dConfig { kernel: [kernel; 2], stride: [stride; 2], padding: [padding; 2], ceil_mode }
}

/// Down, squared, and up again.
fn there_and_back(x: &Tensor, cfg: Pool2dConfig) -> Result<Tensor> {
    let (_, _, h, w) = x.dims4()?;
    let (y, indices) = max_pool2d_with_indices(x, cfg)?;
    max_unpool2d(&y.sqr()?, &indices, [h, w])
}

#[test]
fn indices_and_unpooling_equal_pytorch() -> Result<()> {
    let tensors = fixture("decoding");
    for (name, cfg) in [
        ("even", pool(2, 2, 0, false)),
        ("odd_ceil", pool(2, 2, 0, true)),
        ("odd_floor", pool(2, 2, 0, false)),
        ("padded", pool(3, 3, 1, false)),
    ] {
        let name = format!("pool_{name}");
        reference::check_case(&tensors, &name, 1e-6, |x| there_and_back(x, cfg));
        for device in devices() {
            let x = tensors[&format!("{name}.x")].to_device(&device)?;
            let (y, indices) = max_pool2d_with_indices(&x, cfg)?;
            assert_eq!(indices.dtype(), DType::U32);
            assert_close(&indices, &tensors[&format!("{name}.indices")], 0.0, "places are exact");
            assert_close(&y, &max_pool2d(&x, cfg)?, 0.0, "the same maxima");
        }
    }
    Ok(())
}

#[test]
fn an_index_points_at_its_maximum() -> Result<()> {
    for (h, w) in [(1, 1), (4, 6), (7, 5), (45, 60)] {
        for cfg in [pool(2, 2, 0, true), pool(3, 2, 1, false), pool(3, 1, 1, false), pool(2, 2, 1, true)] {
            let x = random_f64(8, "x", &[2, 3, h, w]);
            for device in devices() {
                let (y, indices) = max_pool2d_with_indices(&x.to_device(&device)?, cfg)?;
                let (_, _, oh, ow) = y.dims4()?;
                let read =
                    x.reshape((6, h * w))?.gather(&indices.reshape((6, oh * ow))?.to_device(&Device::Cpu)?, 1)?;
                assert_close(&y.reshape((6, oh * ow))?, &read, 0.0, "copies");
            }
        }
    }
    // Ties: the first; a window of minus infinity: its first element; NaN: the last of them, as in pooling.
    let low = f64::NEG_INFINITY;
    for (values, place) in
        [([1.0, 4.0, 4.0, 4.0], 1), ([low; 4], 0), ([f64::NAN, 9.0, f64::NAN, 1.0], 2), ([0.0, -0.0, 0.0, -1.0], 0)]
    {
        for device in devices() {
            let x = Tensor::from_slice(&values, (1, 1, 2, 2), &device)?;
            let (_, indices) = max_pool2d_with_indices(&x, pool(2, 2, 0, false))?;
            assert_eq!(indices.flatten_all()?.to_vec1::<u32>()?, [place], "{values:?}");
        }
    }
    Ok(())
}

#[test]
fn unpooling_gradients_are_central_differences() -> Result<()> {
    let x = random_f64(9, "x", &[2, 2, 7, 9]);
    for cfg in [pool(2, 2, 0, true), pool(2, 2, 0, false), pool(3, 2, 1, false)] {
        check_gradients(std::slice::from_ref(&x), |t| there_and_back(&t[0], cfg), 80, 1e-8)?;
    }
    check_gradients(std::slice::from_ref(&x), |t| nearest_unpool2d(&t[0], 3), 60, 1e-8)?;
    check_gradients(&[x], |t| bed_of_nails_unpool2d(&t[0], 3), 60, 1e-8)
}

#[test]
fn unpooling_equals_naive_loops() -> Result<()> {
    let (n, c, h, w, factor) = (2, 3, 3, 4, 3);
    let x = random_f64(10, "x", &[n, c, h, w]);
    let values = x.flatten_all()?.to_vec1::<f64>()?;
    let (oh, ow) = (h * factor, w * factor);
    let (mut near, mut nails) = (Vec::new(), Vec::new());
    for i in 0..n * c * oh * ow {
        let (plane, y, x) = (i / (oh * ow), i / ow % oh, i % ow);
        let value = values[(plane * h + y / factor) * w + x / factor];
        near.push(value);
        nails.push(if y % factor == 0 && x % factor == 0 { value } else { 0.0 });
    }
    // Indices drawn freely, places shared among them: values add up.
    let mut stream = segdistill_ops::rng::Stream::new(10, "indices", &[]);
    let indices: Vec<u32> = (0..n * c * h * w).map(|_| stream.below((oh * ow) as u64) as u32).collect();
    let mut scattered = vec![0.0; n * c * oh * ow];
    for (i, &index) in indices.iter().enumerate() {
        scattered[i / (h * w) * oh * ow + index as usize] += values[i];
    }
    for device in devices() {
        let there = x.to_device(&device)?;
        let tensor = |values: &[f64]| Tensor::from_slice(values, (n, c, oh, ow), &Device::Cpu);
        assert_close(&nearest_unpool2d(&there, factor)?, &tensor(&near)?, 0.0, "copies");
        assert_close(&bed_of_nails_unpool2d(&there, factor)?, &tensor(&nails)?, 0.0, "copies");
        let indices = Tensor::from_slice(&indices, (n, c, h, w), &device)?;
        assert_close(&max_unpool2d(&there, &indices, [oh, ow])?, &tensor(&scattered)?, 1e-15, "sums of two or three");
    }
    // Where a rounded index would err: PyTorch's nearest resize of 2 pixels to 82 shows pixel 40 a time too often.
    let pair = Tensor::new(&[[[[1f64, 2.0]]]], &Device::Cpu)?;
    let row = nearest_unpool2d(&pair, 41)?.narrow(2, 0, 1)?.flatten_all()?.to_vec1::<f64>()?;
    assert_eq!(row, [vec![1.0; 41], vec![2.0; 41]].concat());
    Ok(())
}

#[test]
fn unpooling_keeps_its_laws() -> Result<()> {
    for (h, w) in [(6, 8), (7, 9), (45, 61)] {
        let x = (random_f64(11, "x", &[2, 3, h, w]) + 2.0)?;
        let (y, indices) = max_pool2d_with_indices(&x, pool(2, 2, 0, true))?;
        let up = max_unpool2d(&y, &indices, [h, w])?;
        assert_close(&max_pool2d(&up, pool(2, 2, 0, true))?, &y, 0.0, "the maxima of a positive map survive");
        let total = |t: &Tensor| t.sum_all().unwrap().to_scalar::<f64>().unwrap();
        assert!((total(&up) - total(&y)).abs() < 1e-9, "nothing is lost or added");
        // The transpose of reading: <unpool(y), z> = <y, z at the indices>.
        let z = random_f64(12, "z", &[2, 3, h, w]);
        let (_, _, oh, ow) = y.dims4()?;
        let read = z.reshape((6, h * w))?.gather(&indices.reshape((6, oh * ow))?, 1)?.reshape(y.shape())?;
        assert!((total(&(up * z)?) - total(&(y * read)?)).abs() < 1e-9);
    }
    let x = random_f64(13, "x", &[2, 3, 4, 5]);
    let corners = pool(1, 3, 0, true);
    for f in [nearest_unpool2d, bed_of_nails_unpool2d] {
        assert_close(&max_pool2d(&f(&x, 3)?, corners)?, &x, 0.0, "the corner holds the pixel");
        assert_close(&f(&x, 1)?, &x, 0.0, "nothing to do");
        assert_consumers_add(&[2, 3, 4, 5], |x| f(x, 2));
    }
    let nails = ConvTranspose2dConfig { stride: [3, 3], output_padding: [2, 2], groups: 3, ..Default::default() };
    let one = Tensor::ones((3, 1, 1, 1), DType::F64, &Device::Cpu)?;
    assert_close(&bed_of_nails_unpool2d(&x, 3)?, &conv_transpose2d(&x, &one, None, nails)?, 0.0, "a single tap");
    assert_consumers_add(&[2, 3, 7, 9], |x| there_and_back(x, pool(2, 2, 0, true)));
    assert_threads_agree(&[3, 5, 45, 61], |x| there_and_back(x, pool(2, 2, 0, true)));
    Ok(())
}

#[test]
fn wrong_unpooling_is_refused() -> Result<()> {
    let x = random_f64(14, "x", &[1, 2, 5, 7]);
    let (y, indices) = max_pool2d_with_indices(&x, pool(2, 2, 0, true))?;
    let shape = |r: Result<Tensor>| matches!(r, Err(OpsError::Shape { .. }));
    let config = |r: Result<Tensor>| matches!(r, Err(OpsError::Config { .. }));
    assert!(max_unpool2d(&y, &indices, [5, 7]).is_ok() && max_unpool2d(&y, &indices, [6, 8]).is_ok());
    assert!(shape(max_unpool2d(&y, &indices, [4, 6])), "an index outside the map");
    assert!(shape(max_unpool2d(&x, &indices, [5, 7])), "indices of another map");
    assert!(shape(max_unpool2d(&y.flatten_all()?, &indices.flatten_all()?, [5, 7])));
    assert!(config(max_unpool2d(&y, &indices, [0, 7])));
    assert!(config(max_unpool2d(&y, &indices.to_dtype(DType::I64)?, [5, 7])));
    assert!(config(max_unpool2d(&y.to_dtype(DType::U8)?, &indices, [5, 7])));
    assert!(config(nearest_unpool2d(&x, 0)) && config(bed_of_nails_unpool2d(&x, 0)));
    assert!(shape(nearest_unpool2d(&x.flatten_all()?, 2)) && shape(bed_of_nails_unpool2d(&x.flatten_all()?, 2)));
    let too_large = max_pool2d_with_indices(&x, pool(9, 9, 0, false)).map(|(y, _)| y);
    assert!(shape(too_large));
    let text = max_unpool2d(&y, &indices, [4, 6]).unwrap_err().to_string();
    assert!(text.contains("[4, 6]") && text.contains("below 24") && text.contains("hint"), "{text}");
    Ok(())
}

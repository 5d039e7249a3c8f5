//! `conv2d` against PyTorch, a naive loop, finite differences and its laws.

mod reference;

use candle_core::{DType, Device, Tensor, Var};
use segdistill_ops::testing::{assert_close, check_gradient, devices_with_convolution, random_f64, relative_error};
use segdistill_ops::{Conv2dConfig, FusedConv2d, OpsError, Precision, conv2d, conv2d_fused};

#[derive(Clone, Debug)]
struct Case {
    name: &'static str,
    input: [usize; 4],
    weight: [usize; 4],
    cfg: Conv2dConfig,
}

const fn case(
    name: &'static str,
    input: [usize; 4],
    weight: [usize; 4],
    stride: [usize; 2],
    padding: [usize; 2],
    dilation: [usize; 2],
    groups: usize,
) -> Case {
    Case { name, input, weight, cfg: Conv2dConfig { stride, padding, dilation, groups, precision: Precision::F32 } }
}

/// Shapes chosen so that every path of the kernels is taken; the names of the first fourteen are the fixture's.
fn cases() -> Vec<Case> {
    vec![
        case("dense", [2, 2, 9, 11], [4, 2, 3, 3], [1, 1], [1, 1], [1, 1], 1),
        case("pointwise", [2, 5, 6, 7], [4, 5, 1, 1], [1, 1], [0, 0], [1, 1], 1),
        case("pointwise_stride2", [2, 5, 7, 6], [4, 5, 1, 1], [2, 2], [0, 0], [1, 1], 1),
        case("stride2_8x7", [2, 3, 8, 7], [4, 3, 3, 3], [2, 2], [1, 1], [1, 1], 1),
        case("stride2_45x60", [1, 1, 45, 60], [1, 1, 3, 3], [2, 2], [1, 1], [1, 1], 1),
        case("dilated", [1, 3, 11, 13], [4, 3, 3, 3], [1, 1], [2, 2], [2, 2], 1),
        case("per_axis", [2, 3, 10, 9], [2, 3, 3, 5], [2, 1], [0, 3], [1, 2], 1),
        case("wide_padding", [1, 2, 5, 6], [3, 2, 3, 3], [1, 1], [4, 3], [1, 1], 1),
        case("grouped", [2, 6, 8, 7], [4, 3, 3, 3], [1, 1], [1, 1], [1, 1], 2),
        case("grouped_stride2", [2, 6, 8, 7], [9, 2, 3, 3], [2, 2], [1, 1], [1, 1], 3),
        case("depthwise", [2, 5, 8, 9], [5, 1, 3, 3], [1, 1], [1, 1], [1, 1], 5),
        case("depthwise_stride2", [2, 4, 8, 7], [8, 1, 3, 3], [2, 2], [1, 1], [1, 1], 4),
        case("depthwise_dilated", [1, 4, 12, 11], [4, 1, 3, 3], [1, 1], [4, 4], [4, 4], 4),
        case("stem_7x7", [1, 3, 16, 15], [3, 3, 7, 7], [2, 2], [3, 3], [1, 1], 1),
        // Several strips of pixels an image, the last one short.
        case("strips", [2, 8, 37, 41], [6, 8, 3, 3], [1, 1], [1, 1], [1, 1], 1),
        case("strips_not_same", [2, 4, 37, 41], [3, 4, 3, 3], [1, 1], [0, 0], [1, 1], 1),
        case("strips_stride2", [1, 8, 61, 53], [5, 8, 3, 3], [2, 2], [1, 1], [1, 1], 1),
        case("strips_pointwise", [2, 70, 23, 29], [3, 70, 1, 1], [1, 1], [0, 0], [1, 1], 1),
        // More patch rows than are multiplied at once, more channels than one task owns.
        case("channel_blocks", [1, 150, 5, 6], [20, 150, 3, 3], [1, 1], [1, 1], [1, 1], 1),
        case("channel_blocks_stride2", [2, 150, 6, 5], [17, 150, 3, 3], [2, 2], [1, 1], [1, 1], 1),
        case("pointwise_blocks", [1, 1300, 3, 4], [5, 1300, 1, 1], [1, 1], [0, 0], [1, 1], 1),
        case("many_outputs", [1, 3, 4, 5], [145, 3, 3, 3], [1, 1], [1, 1], [1, 1], 1),
        case("batch_8", [8, 16, 10, 14], [16, 16, 3, 3], [1, 1], [1, 1], [1, 1], 1),
        // Sizes at the edge.
        case("one_pixel", [2, 3, 1, 1], [4, 3, 3, 3], [1, 1], [1, 1], [1, 1], 1),
        case("single_pixels", [3, 5, 1, 1], [7, 5, 1, 1], [1, 1], [0, 0], [1, 1], 1),
        case("single_pixels_strided", [2, 5, 1, 1], [7, 5, 1, 1], [2, 2], [0, 0], [1, 1], 1),
        case("one_channel", [2, 1, 6, 5], [3, 1, 2, 3], [1, 1], [1, 0], [1, 1], 1),
        case("kernel_is_image", [2, 3, 4, 5], [2, 3, 4, 5], [1, 1], [0, 0], [1, 1], 1),
        case("dilation_past_the_map", [1, 2, 5, 4], [3, 2, 3, 3], [1, 1], [7, 7], [7, 7], 1),
        case("one_row", [1, 2, 1, 40], [2, 2, 1, 5], [1, 1], [0, 2], [1, 1], 1),
        case("one_column", [1, 2, 40, 1], [2, 2, 5, 1], [1, 1], [2, 0], [1, 1], 1),
        case("stride3", [2, 2, 13, 11], [3, 2, 2, 2], [3, 3], [0, 0], [1, 1], 1),
        case("stride3_padded", [1, 2, 11, 14], [3, 2, 5, 4], [3, 3], [2, 3], [1, 2], 1),
        case("stride_past_kernel", [2, 3, 9, 10], [2, 3, 1, 1], [3, 4], [0, 0], [1, 1], 1),
        case("padding_past_kernel_stride2", [1, 2, 5, 4], [2, 2, 1, 1], [2, 2], [2, 3], [1, 1], 1),
        case("pointwise_padded", [1, 2, 5, 4], [2, 2, 1, 1], [1, 1], [2, 1], [1, 1], 1),
        case("uneven_stride", [1, 3, 12, 17], [4, 3, 3, 3], [1, 2], [1, 1], [1, 1], 1),
        case("grouped_pointwise", [2, 6, 5, 7], [8, 3, 1, 1], [1, 1], [0, 0], [1, 1], 2),
        case("depthwise_5x5_stride3", [2, 3, 17, 14], [6, 1, 5, 5], [3, 3], [2, 1], [1, 1], 3),
        case("depthwise_per_axis", [2, 3, 9, 30], [3, 1, 2, 7], [1, 2], [1, 2], [2, 3], 3),
        case("depthwise_stride2_even", [2, 3, 12, 36], [3, 1, 3, 3], [2, 2], [1, 1], [1, 1], 3),
        case("depthwise_stride2_odd", [1, 3, 11, 37], [3, 1, 3, 3], [2, 2], [1, 1], [1, 1], 3),
        case("depthwise_stride2_dilated", [1, 3, 14, 19], [3, 1, 3, 3], [2, 2], [2, 2], [2, 2], 3),
        case("depthwise_stride2_5x5", [1, 3, 14, 19], [3, 1, 5, 5], [2, 2], [2, 1], [1, 1], 3),
        case("depthwise_stride2_unpadded", [1, 2, 10, 13], [2, 1, 3, 3], [2, 2], [0, 0], [1, 1], 2),
        case("depthwise_stride_past_kernel", [1, 2, 11, 13], [2, 1, 2, 2], [3, 4], [0, 1], [1, 1], 2),
        case("depthwise_large_kernel_stride2", [1, 2, 21, 19], [2, 1, 9, 9], [2, 2], [4, 4], [1, 1], 2),
        case("depthwise_wide_padding", [1, 2, 4, 3], [2, 1, 3, 3], [1, 1], [4, 5], [1, 1], 2),
        case("depthwise_wide_padding_stride2", [1, 2, 4, 3], [2, 1, 3, 3], [2, 2], [4, 5], [1, 1], 2),
        case("depthwise_long_rows", [2, 2, 5, 75], [4, 1, 3, 3], [1, 1], [1, 1], [1, 1], 2),
        case("depthwise_1x1", [2, 4, 5, 6], [4, 1, 1, 1], [1, 1], [0, 0], [1, 1], 4),
        case("depthwise_1x1_stride2", [2, 4, 5, 6], [4, 1, 1, 1], [2, 2], [0, 0], [1, 1], 4),
        case("no_image", [0, 2, 5, 6], [3, 2, 3, 3], [1, 1], [1, 1], [1, 1], 1),
        case("no_image_depthwise", [0, 2, 5, 6], [2, 1, 3, 3], [2, 2], [1, 1], [1, 1], 2),
    ]
}

/// Output and gradients of `x`, `weight`, `bias` for the output gradient `dy`.
struct Results {
    y: Tensor,
    dx: Tensor,
    dw: Tensor,
    db: Tensor,
}

impl Results {
    fn named(&self) -> [(&'static str, &Tensor); 4] {
        [("y", &self.y), ("dx", &self.dx), ("dw", &self.dw), ("db", &self.db)]
    }
}

struct Inputs {
    x: Tensor,
    w: Tensor,
    b: Tensor,
    dy: Tensor,
}

impl Inputs {
    fn random(case: &Case) -> Self {
        let [n, _, h, w] = case.input;
        let [c_out, _, kh, kw] = case.weight;
        let [oh, ow] = case.cfg.output_hw([h, w], [kh, kw]).unwrap();
        Self {
            x: random_f64(1, "x", &case.input),
            w: random_f64(2, "w", &case.weight),
            b: random_f64(3, "b", &[c_out]),
            dy: random_f64(4, "dy", &[n, c_out, oh, ow]),
        }
    }

    fn to_device(&self, device: &Device) -> Self {
        let convert = |t: &Tensor| t.to_device(device).unwrap();
        Self { x: convert(&self.x), w: convert(&self.w), b: convert(&self.b), dy: convert(&self.dy) }
    }

    fn to_dtype(&self, dtype: DType) -> Self {
        let convert = |t: &Tensor| t.to_dtype(dtype).unwrap();
        Self { x: convert(&self.x), w: convert(&self.w), b: convert(&self.b), dy: convert(&self.dy) }
    }
}

fn run(cfg: Conv2dConfig, inputs: &Inputs) -> Results {
    let [x, w, b] = [&inputs.x, &inputs.w, &inputs.b].map(|t| Var::from_tensor(t).unwrap());
    let y = conv2d(x.as_tensor(), w.as_tensor(), Some(b.as_tensor()), cfg).unwrap();
    let grads = (&y * &inputs.dy).unwrap().sum_all().unwrap().backward().unwrap();
    let grad = |v: &Var| grads.get(v.as_tensor()).expect("a gradient").clone();
    Results { dx: grad(&x), dw: grad(&w), db: grad(&b), y }
}

/// The definition, one multiply-add at a time, and its three derivatives.
fn oracle(case: &Case, inputs: &Inputs) -> Results {
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let (x, w, b, dy) = (flat(&inputs.x), flat(&inputs.w), flat(&inputs.b), flat(&inputs.dy));
    let ([n, c_in, h, wd], [c_out, cg, kh, kw]) = (case.input, case.weight);
    let Conv2dConfig { stride, padding, dilation, groups, .. } = case.cfg;
    let [_, _, oh, ow] = <[usize; 4]>::try_from(inputs.dy.dims()).unwrap();
    let (mut y, mut dx, mut dw) = (vec![0.0; dy.len()], vec![0.0; x.len()], vec![0.0; w.len()]);
    let mut db = vec![0.0; c_out];
    for i in 0..n {
        for o in 0..c_out {
            for oy in 0..oh {
                for ox in 0..ow {
                    let at = ((i * c_out + o) * oh + oy) * ow + ox;
                    y[at] += b[o];
                    db[o] += dy[at];
                    for c in 0..cg {
                        for a in 0..kh {
                            for e in 0..kw {
                                let row = (oy * stride[0] + a * dilation[0]) as isize - padding[0] as isize;
                                let col = (ox * stride[1] + e * dilation[1]) as isize - padding[1] as isize;
                                if row < 0 || row >= h as isize || col < 0 || col >= wd as isize {
                                    continue;
                                }
                                let channel = o / (c_out / groups) * cg + c;
                                let from = ((i * c_in + channel) * h + row as usize) * wd + col as usize;
                                let tap = ((o * cg + c) * kh + a) * kw + e;
                                y[at] += w[tap] * x[from];
                                dx[from] += w[tap] * dy[at];
                                dw[tap] += x[from] * dy[at];
                            }
                        }
                    }
                }
            }
        }
    }
    let tensor = |v: Vec<f64>, like: &Tensor| Tensor::from_vec(v, like.shape(), &Device::Cpu).unwrap();
    Results {
        y: tensor(y, &inputs.dy),
        dx: tensor(dx, &inputs.x),
        dw: tensor(dw, &inputs.w),
        db: tensor(db, &inputs.b),
    }
}

/// Runs a case on every device that has convolutions; no device takes an empty batch but the CPU.
fn on_devices(case: &Case, f: impl Fn(&Device)) {
    devices_with_convolution().iter().filter(|device| device.is_cpu() || case.input[0] > 0).for_each(f);
}

/// Compares `found` with f64 results; both precisions go through here.
fn check(name: &str, found: &Results, expected: &Results) {
    let on_cpu = found.y.device().is_cpu();
    for ((what, found), (_, expected)) in found.named().into_iter().zip(expected.named()) {
        let found = &found.to_device(&Device::Cpu).unwrap();
        assert_eq!(found.dims(), expected.dims(), "{name}: shape of {what}");
        if expected.elem_count() == 0 {
            continue;
        }
        let (size, error) = match expected.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f64>() {
            Ok(0.0) => {
                (0.0, found.abs().unwrap().to_dtype(DType::F64).unwrap().max_all().unwrap().to_scalar().unwrap())
            }
            size => (size.unwrap(), relative_error(found, expected).unwrap()),
        };
        // Sums of at most a few thousand products, rounded at 2^-53 or 2^-24 each.
        // cuDNN's choice may be Winograd's or another algorithm whose terms are larger than their sum.
        let allowed = match (found.dtype(), on_cpu) {
            (DType::F64, true) => 1e-13,
            (DType::F64, false) => 1e-11,
            (_, true) => 2e-6,
            (_, false) => 2e-5,
        };
        assert!(error <= allowed, "{name} {:?}: {what} off by {error:.2e} of {size:.2e}", found.dtype());
    }
}

#[test]
fn every_case_equals_the_naive_loop_in_both_precisions() {
    for case in cases() {
        let inputs = Inputs::random(&case).to_dtype(DType::F32).to_dtype(DType::F64);
        let expected = oracle(&case, &inputs);
        on_devices(&case, |device| {
            let inputs = inputs.to_device(device);
            check(case.name, &run(case.cfg, &inputs), &expected);
            check(case.name, &run(case.cfg, &inputs.to_dtype(DType::F32)), &expected);
        });
    }
}

#[test]
fn bf16_products_are_those_of_rounded_factors() {
    if let Err(error) = Precision::Bf16.on_cpu() {
        println!("skipped: {error}");
        return;
    }
    // By way of f32: the conversion from f64 loses the bits that break ties.
    let rounded = |t: &Tensor| {
        let single = t.to_dtype(DType::F32).unwrap();
        single.to_dtype(DType::BF16).unwrap().to_dtype(DType::F64).unwrap()
    };
    for case in cases().iter().filter(|c| c.cfg.groups == 1 || c.cfg.groups < c.input[1]) {
        let cfg = Conv2dConfig { precision: Precision::Bf16, ..case.cfg };
        let Inputs { x, w, b, dy } = Inputs::random(case).to_dtype(DType::F32).to_dtype(DType::F64);
        let found = run(cfg, &Inputs { x: x.clone(), w: w.clone(), b: b.clone(), dy: dy.clone() }.to_dtype(DType::F32));
        // Bias and its gradient are not rounded.
        let inputs = Inputs { x: rounded(&x), w: rounded(&w), b, dy: rounded(&dy) };
        let db = oracle(case, &Inputs { x, w, b: inputs.b.clone(), dy }).db;
        check(case.name, &found, &Results { db, ..oracle(case, &inputs) });
    }
}

#[test]
fn bf16_is_refused_where_it_cannot_be() {
    let (x, w) = (random_f64(1, "x", &[1, 2, 5, 6]), random_f64(2, "w", &[3, 2, 3, 3]));
    let cfg = Conv2dConfig { precision: Precision::Bf16, ..Default::default() };
    assert!(refused("config", conv2d(&x, &w, None, cfg)).contains("bf16"));
    if let Err(error) = Precision::Bf16.on_cpu() {
        let single = |t: &Tensor| t.to_dtype(DType::F32).unwrap();
        assert_eq!(refused("config", conv2d(&single(&x), &single(&w), None, cfg)), error.to_string());
    }
}

#[test]
fn the_fused_form_is_the_composition() {
    for case in cases() {
        let Inputs { x, w, b, dy: residual } = Inputs::random(&case);
        let plain = conv2d(&x, &w, Some(&b), case.cfg).unwrap();
        let w = Var::from_tensor(&w).unwrap();
        for (with_bias, with_residual, relu) in
            [(true, true, true), (true, true, false), (true, false, true), (false, false, false)]
        {
            let mut expected = if with_bias { plain.clone() } else { conv2d(&x, &w.detach(), None, case.cfg).unwrap() };
            if with_residual {
                expected = (expected + &residual).unwrap();
            }
            if relu {
                expected = expected.clamp(0.0, f64::MAX).unwrap();
            }
            let (bias, residual) = (with_bias.then_some(&b), with_residual.then_some(&residual));
            let found = conv2d_fused(&x, &w, bias, residual, relu, case.cfg).unwrap();
            assert!(!found.track_op(), "no graph is recorded");
            assert_eq!(found.dims(), expected.dims());
            if found.elem_count() > 0 {
                assert_close(&found, &expected, 1e-14, "the same sums");
            }
        }
    }
    let (x, w) = (random_f64(1, "x", &[1, 4, 5, 6]), random_f64(2, "w", &[6, 4, 3, 3]));
    let residual = random_f64(3, "r", &[1, 6, 3, 3]);
    let message = refused("shape", conv2d_fused(&x, &w, None, Some(&residual), true, Conv2dConfig::default()));
    assert!(message.contains("[1, 6, 3, 3]") && message.contains("[1, 6, 3, 4]"), "{message}");
}

#[test]
fn kept_panels_give_the_same_bits_at_every_size() {
    let cfg = |dilation: usize| Conv2dConfig { padding: [dilation; 2], dilation: [dilation; 2], ..Default::default() };
    let shapes = [([20, 18, 3, 3], cfg(1)), ([20, 18, 3, 3], cfg(7)), ([20, 18, 1, 1], Conv2dConfig::default())];
    for dtype in [DType::F32, DType::F64] {
        for (shape, cfg) in shapes {
            let tensor = |name, shape: &[usize]| random_f64(3, name, shape).to_dtype(dtype).unwrap();
            let (w, b) = (tensor("w", &shape), tensor("b", &shape[..1]));
            let conv = FusedConv2d::new(w.clone(), Some(b.clone()), cfg);
            // Small maps go another way than large ones, single pixels yet another, and each comes twice.
            for hw in [[1, 1], [9, 12], [33, 40], [1, 1], [9, 12], [33, 40]] {
                let x = tensor("x", &[2, shape[1], hw[0], hw[1]]);
                let expected = conv2d_fused(&x, &w, Some(&b), None, true, cfg).unwrap();
                let apart = (conv.forward(&x, None, true).unwrap() - expected).unwrap().abs().unwrap();
                assert_eq!(apart.max_all().unwrap().to_dtype(DType::F64).unwrap().to_scalar::<f64>().unwrap(), 0.0);
            }
        }
    }
}

#[test]
fn values_and_gradients_equal_pytorch() {
    let mut file = reference::fixture("conv");
    for case in &cases()[..14] {
        let mut take = |key: &str| file.remove(&format!("{}.{key}", case.name)).expect("tensor in the fixture");
        let inputs = Inputs { x: take("x"), w: take("w"), b: take("b"), dy: take("dy") };
        let expected = Results { y: take("y"), dx: take("dx"), dw: take("dw"), db: take("db") };
        assert_eq!((inputs.x.dims(), inputs.w.dims()), (&case.input[..], &case.weight[..]), "{}", case.name);
        on_devices(case, |device| {
            let inputs = inputs.to_device(device);
            check(case.name, &run(case.cfg, &inputs.to_dtype(DType::F64)), &expected);
            check(case.name, &run(case.cfg, &inputs), &expected);
        });
    }
    assert!(file.is_empty(), "the fixture holds cases that were not compared: {:?}", file.keys());
}

#[test]
fn gradients_equal_central_differences() {
    for case in cases().iter().filter(|c| c.input[0] > 0) {
        on_devices(case, |device| {
            let Inputs { x, w, b, .. } = Inputs::random(case).to_device(device);
            // The function is linear in each input: the difference's only error is rounding, 1e-16 * |sum| / 1e-5.
            check_gradient(&[x, w, b], |t| conv2d(&t[0], &t[1], Some(&t[2]), case.cfg), 8, 2e-7).unwrap();
        });
    }
}

fn bits(t: &Tensor) -> Vec<u32> {
    t.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    for case in cases() {
        let inputs = Inputs::random(&case).to_dtype(DType::F32);
        let in_pool = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let results = pool.install(|| run(case.cfg, &inputs));
            results.named().map(|(_, t)| bits(t))
        };
        let one = in_pool(1);
        for threads in [2, 3] {
            assert!(in_pool(threads) == one, "{} differs with {threads} threads", case.name);
        }
    }
}

#[test]
fn the_same_call_gives_the_same_bits_on_every_device() {
    for case in cases() {
        on_devices(&case, |device| {
            let inputs = Inputs::random(&case).to_dtype(DType::F32).to_device(device);
            let bits = |r: Results| r.named().map(|(_, t)| bits(t));
            let (first, second) = (bits(run(case.cfg, &inputs)), bits(run(case.cfg, &inputs)));
            assert!(first == second, "{} differs from call to call on {:?}", case.name, device.location());
        });
    }
}

#[test]
fn bf16_on_cuda_is_off_by_its_rounding() {
    for case in cases().iter().filter(|c| c.cfg.groups == 1 || c.cfg.groups < c.input[1]) {
        let cfg = Conv2dConfig { precision: Precision::Bf16, ..case.cfg };
        let inputs = Inputs::random(case).to_dtype(DType::F32);
        let expected = oracle(case, &inputs.to_dtype(DType::F64));
        on_devices(case, |device| {
            if device.is_cpu() {
                return;
            }
            let found = run(cfg, &inputs.to_device(device));
            for ((what, found), (_, expected)) in found.named().into_iter().zip(expected.named()) {
                assert_eq!(found.dtype(), DType::F32, "{}: type of {what}", case.name);
                // Factors and result are rounded to 8 bits of mantissa: 2^-8 each, of terms of either sign.
                let error = relative_error(found, expected).unwrap();
                assert!(error <= 2e-2, "{}: {what} off by {error:.2e}", case.name);
            }
        });
    }
}

#[test]
fn a_batch_equals_its_images() {
    for case in cases().iter().filter(|c| c.input[0] > 1) {
        on_devices(case, |device| {
            let Inputs { x, w, b, .. } = Inputs::random(case).to_device(device);
            let whole = conv2d(&x, &w, Some(&b), case.cfg).unwrap();
            for i in 0..case.input[0] {
                let image = conv2d(&x.narrow(0, i, 1).unwrap(), &w, Some(&b), case.cfg).unwrap();
                let found = whole.narrow(0, i, 1).unwrap();
                assert_close(&found, &image, 1e-12, "strips of other lengths round differently");
            }
        });
    }
}

#[test]
fn depthwise_equals_grouped_by_padding_each_group_with_a_silent_channel() {
    // Groups of two channels, the second with weight 0, go through the matrix path and must give what the planes give.
    let cfg = Conv2dConfig { stride: [2, 1], padding: [1, 2], groups: 3, ..Default::default() };
    let (x, w) = (random_f64(1, "x", &[2, 3, 9, 8]), random_f64(2, "w", &[6, 1, 3, 3]));
    let direct = conv2d(&x, &w, None, cfg).unwrap();
    let doubled = Tensor::stack(&[&x, &x], 2).unwrap().reshape((2, 6, 9, 8)).unwrap();
    let silent = Tensor::cat(&[&w, &w.zeros_like().unwrap()], 1).unwrap();
    assert_close(&conv2d(&doubled, &silent, None, cfg).unwrap(), &direct, 1e-13, "rounding");
}

#[test]
fn strided_views_give_what_their_copies_give() {
    for case in cases().iter().filter(|c| ["dense", "depthwise", "pointwise"].contains(&c.name)) {
        let inputs = Inputs::random(case);
        let expected = run(case.cfg, &inputs);
        let turned = |t: &Tensor| t.transpose(2, 3).unwrap().contiguous().unwrap();
        let wider = |t: &Tensor| Tensor::cat(&[t, t, t], 0).unwrap();
        let n = case.input[0];
        let (x, w) =
            (Var::from_tensor(&turned(&wider(&inputs.x))).unwrap(), Var::from_tensor(&turned(&inputs.w)).unwrap());
        let b = Var::from_tensor(&Tensor::stack(&[&inputs.b, &inputs.b], 1).unwrap()).unwrap();
        let x_view = x.narrow(0, n, n).unwrap().transpose(2, 3).unwrap();
        let w_view = w.transpose(2, 3).unwrap();
        let b_view = b.narrow(1, 1, 1).unwrap().squeeze(1).unwrap();
        assert!(!x_view.is_contiguous() && !b_view.is_contiguous());
        let y = conv2d(&x_view, &w_view, Some(&b_view), case.cfg).unwrap();
        assert_close(&y, &expected.y, 0.0, "the same numbers in the same order");
        // A transposed output gradient reaches the backward pass as a strided tensor.
        let dy = turned(&inputs.dy);
        let grads = (y.transpose(2, 3).unwrap() * dy).unwrap().sum_all().unwrap().backward().unwrap();
        let dx = grads.get(x.as_tensor()).unwrap().narrow(0, n, n).unwrap().transpose(2, 3).unwrap();
        assert_close(&dx, &expected.dx, 0.0, "the same numbers in the same order");
        let dw = grads.get(w.as_tensor()).unwrap().transpose(2, 3).unwrap();
        assert_close(&dw, &expected.dw, 0.0, "the same numbers in the same order");
        let db = grads.get(b.as_tensor()).unwrap().narrow(1, 1, 1).unwrap().squeeze(1).unwrap();
        assert_close(&db, &expected.db, 0.0, "the same numbers in the same order");
    }
}

#[test]
fn two_consumers_of_one_output_add_up() {
    for case in cases().iter().filter(|c| ["dense", "stride2_8x7", "depthwise"].contains(&c.name)) {
        let inputs = Inputs::random(case);
        let [x, w] = [&inputs.x, &inputs.w].map(|t| Var::from_tensor(t).unwrap());
        let y = conv2d(x.as_tensor(), w.as_tensor(), None, case.cfg).unwrap();
        let (first, second) = ((&y * &inputs.dy).unwrap(), (&y * &inputs.dy).unwrap().affine(2.0, 0.0).unwrap());
        let grads = (first.sum_all().unwrap() + second.sum_all().unwrap()).unwrap().backward().unwrap();
        let expected = run(case.cfg, &inputs);
        let thrice = |t: &Tensor| t.affine(3.0, 0.0).unwrap();
        assert_close(grads.get(x.as_tensor()).unwrap(), &thrice(&expected.dx), 1e-12, "rounding of 3 dy");
        assert_close(grads.get(w.as_tensor()).unwrap(), &thrice(&expected.dw), 1e-12, "rounding of 3 dy");
    }
}

#[test]
fn only_variables_get_gradients() {
    for case in cases().iter().filter(|c| ["dense", "depthwise"].contains(&c.name)) {
        let inputs = Inputs::random(case);
        let expected = run(case.cfg, &inputs);
        for mask in 0..8 {
            let tensors = [&inputs.x, &inputs.w, &inputs.b];
            let args: Vec<Tensor> = (0..3)
                .map(|i| {
                    if mask >> i & 1 == 1 {
                        Var::from_tensor(tensors[i]).unwrap().into_inner()
                    } else {
                        tensors[i].clone()
                    }
                })
                .collect();
            let y = conv2d(&args[0], &args[1], Some(&args[2]), case.cfg).unwrap();
            assert_eq!(y.track_op(), mask != 0, "a graph is recorded only behind a variable");
            let grads = (&y * &inputs.dy).unwrap().sum_all().unwrap().backward().unwrap();
            for (i, expected) in [&expected.dx, &expected.dw, &expected.db].into_iter().enumerate() {
                match grads.get(&args[i]) {
                    Some(found) if mask >> i & 1 == 1 => assert_close(found, expected, 0.0, "the same numbers"),
                    found => assert!(found.is_none() && mask >> i & 1 == 0, "input {i} of mask {mask:03b}"),
                }
            }
        }
    }
}

/// The message, after the kind was checked.
fn refused(kind: &str, result: Result<Tensor, OpsError>) -> String {
    let error = result.expect_err("must be refused");
    let found = match &error {
        OpsError::Shape { .. } => "shape",
        OpsError::Config { .. } => "config",
        _ => "other",
    };
    assert_eq!(found, kind, "{error}");
    error.to_string()
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let (x, w) = (random_f64(1, "x", &[1, 4, 5, 6]), random_f64(2, "w", &[6, 4, 3, 3]));
    let plain = Conv2dConfig::default();
    let with = |change: fn(&mut Conv2dConfig)| {
        let mut cfg = plain;
        change(&mut cfg);
        cfg
    };
    let message = refused("shape", conv2d(&x, &random_f64(2, "w", &[6, 3, 3, 3]), None, plain));
    assert!(message.contains("[6, 3, 3, 3]") && message.contains("[6, 4, 3, 3]"), "{message}");
    let message = refused("shape", conv2d(&x, &w, None, with(|c| c.groups = 3)));
    assert!(message.contains("4 input") && message.contains("3 groups"), "{message}");
    refused("shape", conv2d(&x, &random_f64(2, "w", &[5, 2, 3, 3]), None, with(|c| c.groups = 2)));
    let message = refused("shape", conv2d(&x, &random_f64(2, "w", &[6, 4, 6, 3]), None, plain));
    assert!(message.contains("kernel [6, 3]") && message.contains("[5, 6]"), "{message}");
    refused("shape", conv2d(&x, &w, None, with(|c| c.dilation = [3, 1])));
    refused("shape", conv2d(&x, &random_f64(2, "w", &[6, 4, 0, 3]), None, plain));
    refused("shape", conv2d(&x, &w, Some(&random_f64(3, "b", &[4])), plain));
    refused("shape", conv2d(&x, &w, Some(&random_f64(3, "b", &[6, 1])), plain));
    refused("shape", conv2d(&x.squeeze(0).unwrap(), &w, None, plain));
    refused("shape", conv2d(&x, &w.flatten_from(2).unwrap(), None, plain));
    refused("config", conv2d(&x, &w, None, with(|c| c.stride = [0, 1])));
    refused("config", conv2d(&x, &w, None, with(|c| c.dilation = [1, 0])));
    refused("config", conv2d(&x, &w, None, with(|c| c.groups = 0)));
    let message = refused("config", conv2d(&x, &w.to_dtype(DType::F32).unwrap(), None, plain));
    assert!(message.contains("F32") && message.contains("F64"), "{message}");
    let half = |t: &Tensor| t.to_dtype(DType::F16).unwrap();
    assert!(refused("config", conv2d(&half(&x), &half(&w), None, plain)).contains("F16"));
}

#[test]
fn output_size_is_pytorchs() {
    let size = |h, k, stride, padding, dilation| {
        let cfg =
            Conv2dConfig { stride: [stride, 1], padding: [padding, 0], dilation: [dilation, 1], ..Default::default() };
        cfg.output_hw([h, 1], [k, 1]).map(|[h, _]| h)
    };
    assert_eq!(size(8, 3, 2, 1, 1), Some(4));
    assert_eq!(size(7, 3, 2, 1, 1), Some(4));
    assert_eq!(size(45, 3, 2, 1, 1), Some(23));
    assert_eq!(size(20, 3, 1, 12, 12), Some(20));
    assert_eq!(size(3, 3, 1, 0, 1), Some(1));
    assert_eq!(size(2, 3, 1, 0, 1), None);
    assert_eq!(size(5, 0, 1, 0, 1), None);
    assert_eq!(size(5, 3, 0, 1, 1), None);
    assert_eq!(size(5, usize::MAX, 1, 1, 2), None);
}

/// A stride beyond the map takes no step, whatever its size.
#[test]
fn a_stride_far_beyond_the_map_is_a_stride_of_its_size() {
    let (x, w) = (random_f64(1, "x", &[1, 2, 8, 8]), random_f64(2, "w", &[2, 1, 3, 3]));
    let run = |stride: usize| {
        let (x, w) = (Var::from_tensor(&x).unwrap(), Var::from_tensor(&w).unwrap());
        let cfg = Conv2dConfig { stride: [stride; 2], groups: 2, ..Conv2dConfig::default() };
        let y = conv2d(x.as_tensor(), w.as_tensor(), None, cfg).unwrap();
        assert_eq!(y.dims(), [1, 2, 1, 1]);
        let grads = y.sum_all().unwrap().backward().unwrap();
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        [values(&y), values(grads.get(&x).unwrap()), values(grads.get(&w).unwrap())]
    };
    assert_eq!(run(10_000_000), run(8));
}

/// Threads of one pool that run the same network's first pass at once must not wait for one another's packing.
#[test]
fn the_first_passes_of_one_convolution_may_come_from_a_shared_pool() {
    let weight = random_f64(2, "w", &[128, 128, 3, 3]).to_dtype(DType::F32).unwrap();
    let x = random_f64(1, "x", &[1, 128, 4, 4]).to_dtype(DType::F32).unwrap();
    let (done, waits) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        for stride in [1, 2].repeat(20) {
            let cfg = Conv2dConfig { stride: [stride; 2], padding: [1, 1], ..Conv2dConfig::default() };
            let conv = FusedConv2d::new(weight.clone(), None, cfg);
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| pool.install(|| conv.forward(&x, None, true).unwrap()));
                }
            });
        }
        done.send(()).unwrap();
    });
    waits.recv_timeout(std::time::Duration::from_secs(120)).expect("the passes end");
}

//! Rectifiers, dropout, log-softmax and concatenation against PyTorch, naive loops, finite differences and laws.

mod reference;

use candle_core::{DType, Device, Tensor, Var};
use reference::{assert_consumers_add, assert_threads_agree, check_case, check_gradients, fixture, value_and_gradient};
use segdistill_ops::rng::Stream;
use segdistill_ops::testing::{assert_close, devices, random_f64};
use segdistill_ops::{Mode, OpsError, Result, concat_channels, dropout, log_softmax, relu, relu6};

const TRAIN: Mode = Mode::Train { seed: 3, step: 11 };

#[test]
fn rectifiers_and_log_softmax_equal_pytorch() {
    let cases = fixture("misc");
    check_case(&cases, "relu", 0.0, relu);
    // Rectifiers copy or replace, they never round: the two types agree exactly.
    check_case(&cases, "relu6", 0.0, relu6);
    check_case(&cases, "log_softmax", 1e-5, log_softmax);
    check_case(&cases, "log_softmax_large", 1e-5, log_softmax);
}

#[test]
fn rectifiers_pass_nan_and_infinity() -> Result<()> {
    for device in devices() {
        let x = Tensor::new(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0], &device)?;
        let g = Tensor::new(&[1f32, 2.0, 3.0, 4.0], &device)?;
        for (f, top, slope) in [(relu as fn(&Tensor) -> Result<Tensor>, f32::INFINITY, 2.0), (relu6, 6.0, 0.0)] {
            let (y, dx) = value_and_gradient(&x, &g, f);
            let (y, dx) = (y.to_vec1::<f32>()?, dx.to_vec1::<f32>()?);
            assert!(y[0].is_nan());
            assert_eq!(y[1..], [top, 0.0, 0.0]);
            assert_eq!(dx, [1.0, slope, 0.0, 0.0]);
        }
    }
    Ok(())
}

#[test]
fn gradients_are_central_differences() -> Result<()> {
    let x = [(random_f64(1, "misc", &[2, 5, 4, 6]) * 8.0)?];
    check_gradients(&x, |t| relu(&t[0]), 240, 1e-8)?;
    check_gradients(&x, |t| relu6(&t[0]), 240, 1e-8)?;
    check_gradients(&x, |t| log_softmax(&t[0]), 240, 1e-8)?;
    check_gradients(&x, |t| dropout(&t[0], 0.4, TRAIN, "head"), 240, 1e-8)
}

#[test]
fn log_softmax_equals_a_naive_loop_and_its_laws() -> Result<()> {
    // More than one block of 512 pixels, with a rest.
    let (n, c, h, w) = (2, 7, 29, 41);
    let x = (random_f64(2, "misc", &[n, c, h, w]) * 10.0)?;
    let y = log_softmax(&x)?;
    let values = x.flatten_all()?.to_vec1::<f64>()?;
    let expected: Vec<f64> = (0..values.len())
        .map(|i| {
            let pixel = i / (c * h * w) * c * h * w + i % (h * w);
            let total: f64 = (0..c).map(|k| values[pixel + k * h * w].exp()).sum();
            values[i] - total.ln()
        })
        .collect();
    assert_close(&y, &Tensor::from_vec(expected, x.shape(), &Device::Cpu)?, 1e-12, "f64 rounding");
    let total = y.exp()?.sum(1)?;
    assert_close(&total, &total.ones_like()?, 1e-13, "probabilities");
    assert_close(&log_softmax(&(&x + 1e3)?)?, &y, 1e-11, "a shift of all logits changes nothing");
    let huge = log_softmax(&Tensor::new(&[[[[1e30f32]], [[-1e30]]]], &Device::Cpu)?)?;
    assert_eq!(huge.flatten_all()?.to_vec1::<f32>()?, [0.0, -2e30]);
    Ok(())
}

#[test]
fn the_dropout_mask_is_the_stream_word_by_word() -> Result<()> {
    // More than one block of 16384 elements, with a rest that is no multiple of 64.
    let n = 3 * 16384 + 77;
    let x = random_f64(3, "misc", &[n]).to_dtype(DType::F32)?;
    let p = 0.3;
    let y = dropout(&x, p, TRAIN, "aspp")?.to_vec1::<f32>()?;
    for device in devices() {
        let there = dropout(&x.to_device(&device)?, p, TRAIN, "aspp")?.to_vec1::<f32>()?;
        assert!(there == y, "the mask depends on the device {:?}", device.location());
    }
    let mut stream = Stream::new(3, "dropout/aspp", &[11]);
    let mut n_kept = 0;
    for (i, (&y, x)) in y.iter().zip(x.to_vec1::<f32>()?).enumerate() {
        let keep = f64::from(stream.word()) >= (p * 4294967296.0).round();
        n_kept += usize::from(keep);
        assert_eq!(y, if keep { x * (1.0 / 0.7) as f32 } else { 0.0 }, "element {i}");
    }
    let share = n_kept as f64 / n as f64;
    assert!((share - 0.7).abs() < 0.01, "kept {share}, four standard deviations are 0.008");
    Ok(())
}

#[test]
fn dropout_is_a_function_of_seed_name_and_step() -> Result<()> {
    let x = Tensor::ones((4, 8, 9, 10), DType::F32, &Device::Cpu)?;
    let draw = |seed, step, name| -> Result<Vec<f32>> {
        Ok(dropout(&x, 0.5, Mode::Train { seed, step }, name)?.flatten_all()?.to_vec1()?)
    };
    let first = draw(1, 2, "a")?;
    assert_eq!(first, draw(1, 2, "a")?);
    for other in [draw(2, 2, "a")?, draw(1, 3, "a")?, draw(1, 2, "b")?] {
        let same = first.iter().zip(&other).filter(|(a, b)| a == b).count() as f64 / first.len() as f64;
        assert!((same - 0.5).abs() < 0.05, "{same}");
    }
    // The gradient uses the mask of the forward pass.
    let (y, dx) = value_and_gradient(&x, &x, |x| dropout(x, 0.5, TRAIN, "a"));
    assert_close(&y, &dx, 0.0, "both are the mask times 2");
    // A tensor through which no layer drops anything is the tensor itself.
    assert_eq!(dropout(&x, 0.5, Mode::Eval, "a")?.id(), x.id());
    assert_eq!(dropout(&x, 0.0, TRAIN, "a")?.id(), x.id());
    Ok(())
}

#[test]
fn laws_hold() -> Result<()> {
    let shape = [3, 5, 45, 60];
    assert_threads_agree(&shape, relu);
    assert_threads_agree(&shape, relu6);
    assert_threads_agree(&shape, log_softmax);
    assert_threads_agree(&shape, |x| dropout(x, 0.3, TRAIN, "a"));
    let shape = [2, 3, 6, 7];
    assert_consumers_add(&shape, relu);
    assert_consumers_add(&shape, relu6);
    assert_consumers_add(&shape, log_softmax);
    assert_consumers_add(&shape, |x| dropout(x, 0.3, TRAIN, "a"));
    let x = random_f64(4, "misc", &shape);
    let view = x.transpose(1, 2)?;
    for f in [relu, relu6, log_softmax] {
        assert_close(&f(&view)?, &f(&view.contiguous()?)?, 0.0, "a view equals its copy");
        assert!(!f(&x)?.track_op(), "no graph on plain tensors");
    }
    // A gradient that reaches the op as a broadcast view.
    let var = Var::from_tensor(&x)?;
    let grads = log_softmax(&var)?.narrow(1, 0, 1)?.sum_all()?.backward()?;
    assert_close(&grads.get(&var).expect("used").sum(1)?, &x.sum(1)?.zeros_like()?, 1e-14, "sums to 0 over channels");
    Ok(())
}

#[test]
fn misuse_is_refused() -> Result<()> {
    let x = random_f64(5, "misc", &[1, 2, 4, 5]);
    for p in [-0.1, 1.0, f64::NAN] {
        for mode in [TRAIN, Mode::Eval] {
            let error = dropout(&x, p, mode, "head").unwrap_err();
            assert!(matches!(error, OpsError::Config { .. }) && error.to_string().contains("head"), "{error}");
        }
    }
    assert!(matches!(log_softmax(&x.flatten_all()?), Err(OpsError::Shape { .. })));
    let bytes = x.to_dtype(DType::U8)?;
    assert!(matches!(relu(&bytes), Err(OpsError::Config { .. })));
    assert!(matches!(relu6(&bytes), Err(OpsError::Config { .. })));
    assert!(matches!(log_softmax(&bytes), Err(OpsError::Config { .. })));
    assert!(matches!(dropout(&bytes, 0.5, TRAIN, "head"), Err(OpsError::Config { .. })));
    Ok(())
}

#[test]
fn concatenated_channels_are_the_maps_in_order() -> Result<()> {
    let (n, h, w) = (2, 3, 4);
    let maps: Vec<Tensor> = [2usize, 1, 3].iter().map(|&c| random_f64(6, &format!("map {c}"), &[n, c, h, w])).collect();
    // A view among them.
    let view = random_f64(6, "view", &[n, 2, w, h]).transpose(2, 3)?;
    let all = [&maps[0], &maps[1], &view, &maps[2]];
    let joined = concat_channels(&all)?;
    assert_eq!(joined.dims(), [n, 8, h, w]);
    let mut expected = Vec::new();
    for i in 0..n {
        for map in all {
            expected.extend(map.get(i)?.flatten_all()?.to_vec1::<f64>()?);
        }
    }
    assert_eq!(joined.flatten_all()?.to_vec1::<f64>()?, expected);
    assert!(!joined.track_op(), "no graph on plain tensors");
    assert_close(&concat_channels(&[&view])?, &view, 0.0, "one map is itself");
    Ok(())
}

#[test]
fn concatenation_gives_each_map_its_part_of_the_gradient() -> Result<()> {
    let maps: [Tensor; 3] = [1, 2, 3].map(|c| random_f64(7, &format!("map {c}"), &[2, c, 3, 4]));
    // Squared, so that a gradient handed to the wrong map or pixel cannot be right by chance.
    check_gradients(&maps, |t| Ok(concat_channels(&[&t[0], &t[1], &t[2]])?.sqr()?), 72, 1e-8)?;
    // One map passed twice, with another between.
    check_gradients(&maps[..2], |t| Ok(concat_channels(&[&t[1], &t[0], &t[1]])?.sqr()?), 72, 1e-8)?;
    // More than one operation takes.
    check_gradients(&maps, |t| Ok(concat_channels(&[&t[0], &t[1], &t[2], &t[1], &t[0]])?.sqr()?), 72, 1e-8)?;
    // Nobody stands behind the second map.
    let var = Var::from_tensor(&maps[0])?;
    let grads = concat_channels(&[&var, &maps[1]])?.sum_all()?.backward()?;
    assert_close(grads.get(&var).expect("used"), &maps[0].ones_like()?, 0.0, "of a sum");
    let twice = concat_channels(&[&var, &var])?.sum_all()?.backward()?;
    assert_close(twice.get(&var).expect("used"), &(maps[0].ones_like()? * 2.0)?, 0.0, "both parts add");
    Ok(())
}

#[test]
fn maps_that_cannot_be_joined_are_refused() -> Result<()> {
    let map = random_f64(8, "map", &[2, 3, 4, 5]);
    assert!(matches!(concat_channels(&[]), Err(OpsError::Config { .. })));
    for shape in [&[1, 3, 4, 5][..], &[2, 3, 5, 5], &[2, 3, 4, 4], &[3, 4, 5], &[2, 3, 4, 5, 1]] {
        let other = random_f64(8, "other", shape);
        for maps in [[&map, &other], [&other, &map]] {
            let error = concat_channels(&maps).unwrap_err();
            assert!(matches!(error, OpsError::Shape { .. }), "{shape:?}: {error}");
        }
        let text = concat_channels(&[&map, &map, &other]).unwrap_err().to_string();
        assert!(text.contains(&format!("map 2 is {shape:?}")) && text.contains("[2, _, 4, 5]"), "{text}");
    }
    let error = concat_channels(&[&map, &map.to_dtype(DType::F32)?]).unwrap_err();
    assert!(matches!(&error, OpsError::Config { what, .. } if what.contains("F32")), "{error}");
    Ok(())
}

//! Against the direct way.

use super::super::{Precision, dense};
use super::*;
use crate::testing::random_f64;

#[test]
fn it_is_the_direct_convolution() {
    for (n, c, hw, dilation, padding) in [
        (2, [17, 20], [9, 11], [1, 1], [1, 1]),
        (1, [40, 33], [22, 30], [6, 6], [6, 6]),
        (1, [16, 16], [13, 97], [1, 1], [0, 2]),
        (1, [16, 49], [5, 4], [3, 2], [4, 1]),
        (3, [33, 16], [3, 3], [1, 1], [1, 1]),
        (1, [16, 16], [1, 1], [1, 1], [1, 1]),
        (1, [16, 18], [10, 9], [12, 12], [12, 12]),
    ] {
        let side = |i: usize| hw[i] + 2 * padding[i] - 2 * dilation[i];
        let g = Geometry {
            n,
            c_in: c[0],
            h: hw[0],
            w: hw[1],
            c_out: c[1],
            kh: 3,
            kw: 3,
            oh: side(0),
            ow: side(1),
            stride: [1, 1],
            padding,
            dilation,
            groups: 1,
            precision: Precision::F32,
        };
        let values = |n: usize, seed: u64| random_f64(seed, "v", &[n]).to_vec1::<f64>().expect("f64");
        let (x, w) = (values(n * c[0] * hw[0] * hw[1], 0), values(c[0] * c[1] * 9, 1));
        let (dy, bias) = (values(n * c[1] * g.pixels(), 2), values(c[1], 3));
        let near = |what: &str, found: &[f64], expected: &[f64]| {
            assert_eq!(found.len(), expected.len());
            for (i, (f, e)) in found.iter().zip(expected).enumerate() {
                assert!((f - e).abs() < 1e-12 * (1.0 + e.abs()), "{what} {i} of {g:?}: {f} {e}");
            }
        };
        for relu in [false, true] {
            let epilogue = Epilogue { bias: Some(&bias), residual: relu.then_some(&dy[..]), relu };
            let expected = dense::direct_forward(&g, &x, &w, epilogue);
            near("forward", &forward(&g, &x, &transform_weights(&g, &w, false), epilogue), &expected);
        }
        if let Some(turned) = g.input_grad() {
            let expected = dense::direct_input_grad(&g, &dy, &w);
            near("input", &forward(&turned, &dy, &transform_weights(&g, &w, true), Epilogue::none()), &expected);
        }
        near("weight", &weight_grad(&g, &dy, &x), &dense::direct_weight_grad(&g, &dy, &x));
    }
}

#[test]
fn in_f32_its_error_is_near_the_direct_one() {
    let g = Geometry {
        n: 1,
        c_in: 64,
        h: 20,
        w: 24,
        c_out: 32,
        kh: 3,
        kw: 3,
        oh: 20,
        ow: 24,
        stride: [1, 1],
        padding: [1, 1],
        dilation: [1, 1],
        groups: 1,
        precision: Precision::F32,
    };
    let values = |n: usize, seed: u64| random_f64(seed, "v", &[n]).to_vec1::<f64>().expect("f64");
    let single = |v: &[f64]| -> Vec<f32> { v.iter().map(|&v| v as f32).collect() };
    let wide = |v: &[f32]| -> Vec<f64> { v.iter().map(|&v| f64::from(v)).collect() };
    let (x, w) = (single(&values(64 * 480, 0)), single(&values(64 * 32 * 9, 1)));
    let expected = dense::direct_forward(&g, &wide(&x), &wide(&w), Epilogue::none());
    let rms = |found: &[f32]| {
        let square = |v: f64| v * v;
        let apart: f64 = found.iter().zip(&expected).map(|(&f, &e)| square(f64::from(f) - e)).sum();
        (apart / expected.iter().map(|&e| square(e)).sum::<f64>()).sqrt()
    };
    let direct = rms(&dense::direct_forward(&g, &x, &w, Epilogue::none()));
    let tiled = rms(&forward(&g, &x, &transform_weights(&g, &w, false), Epilogue::none()));
    assert!(tiled < 4.0 * direct && tiled < 1e-6, "{tiled:.2e}, direct {direct:.2e}");
}

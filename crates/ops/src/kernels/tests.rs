//! Every kernel against naive sums.

use super::*;

/// Panels of every kernel hold values or pairs of them; this reads them back.
trait Panel: Copy + Default {
    fn values(self) -> Vec<f64>;
}

impl Panel for f32 {
    fn values(self) -> Vec<f64> {
        vec![f64::from(self)]
    }
}

impl Panel for f64 {
    fn values(self) -> Vec<f64> {
        vec![self]
    }
}

impl Panel for u32 {
    fn values(self) -> Vec<f64> {
        halves(self).map(f64::from).to_vec()
    }
}

fn wave(n: usize, step: f64) -> Vec<f64> {
    (0..n).map(|i| (i as f64 * step + 0.3).sin()).collect()
}

fn of<T: Element>(values: &[f64]) -> Vec<T> {
    values.iter().map(|&v| T::from_f64(v)).collect()
}

/// Every edge of the tile, every start and every end, against a naive sum over the panels' own values.
fn check_tiles<T: Element, P: Panel>(kernel: &Kernel<T, P>, tolerance: f64) {
    let (mr, nr) = (kernel.mr, kernel.nr);
    let panel = |n: usize, step: f64| -> Vec<P> {
        let values: Vec<T> = of(&wave(2 * n, step));
        values.chunks_exact(2).map(|v| (kernel.join)(v[0], v[1])).collect()
    };
    let row_len = nr / kernel.pair;
    let whole = |k: usize| k.next_multiple_of(kernel.k_block);
    for (along, k, segments) in [(false, whole(1), 1), (false, whole(37), 1), (false, 0, 1), (true, row_len, 3)] {
        let a_len = if along { mr * row_len } else { k * mr };
        let (a, b) = (panel(a_len * segments, 1.7), panel(k * nr * segments, 0.9));
        let bias: Vec<T> = of(&wave(mr, 2.3));
        for (rows, cols) in [(mr, nr), (mr, nr - 1), (1, 1), (mr - 1, nr / 2 + 1), (mr, nr / 3)] {
            for (variant, relu) in [(0, false), (1, true), (2, false), (3, true)] {
                let ldc = nr + 3;
                let before: Vec<T> = of(&wave(mr * ldc, 0.7));
                let residual: Vec<T> = of(&wave(mr * ldc, 0.4));
                let mut c = before.clone();
                let tile = Tile {
                    k,
                    segments,
                    a: a.as_ptr(),
                    a_segment: a_len,
                    b: b.as_ptr(),
                    b_segment: k * nr,
                    c: c.as_mut_ptr(),
                    ldc,
                    rows,
                    cols,
                    start: match variant {
                        0 => Start::Zero,
                        1 | 3 => Start::Bias(bias.as_ptr()),
                        _ => Start::Add,
                    },
                    residual: if variant == 3 { residual.as_ptr() } else { std::ptr::null() },
                    relu,
                };
                // SAFETY: the buffers above hold what the sizes say; only kernels that can run here are passed.
                unsafe { if along { (kernel.tile_along)(&tile) } else { (kernel.tile)(&tile) } };
                for (at, found) in c.iter().map(|v| v.to_f64()).enumerate() {
                    let (i, j) = (at / ldc, at % ldc);
                    let mut expected = before[at].to_f64();
                    if i < rows && j < cols {
                        expected = match variant {
                            0 => 0.0,
                            1 | 3 => bias[i].to_f64(),
                            _ => expected,
                        };
                        for s in 0..segments {
                            for p in 0..k {
                                let a_at = if along { i * row_len + p } else { kernel.place(p, i) };
                                let (a, b) = (a[s * a_len + a_at].values(), b[(s * k + p) * nr + j].values());
                                expected += a.iter().zip(&b).map(|(a, b)| a * b).sum::<f64>();
                            }
                        }
                        if variant == 3 {
                            expected += residual[at].to_f64();
                        }
                        if relu {
                            expected = expected.max(0.0);
                        }
                    }
                    assert!(
                        (found - expected).abs() <= tolerance,
                        "{} along {along} k {k} {rows}x{cols} variant {variant} at {i},{j}: {found} {expected}",
                        kernel.name
                    );
                }
            }
        }
    }
    // A ReLU keeps NaN.
    let (mut a, b, mut c) = (panel(kernel.k_block * mr, 1.1), panel(kernel.k_block * nr, 1.3), vec![T::ZERO; mr * nr]);
    a[kernel.place(0, 0)] = (kernel.join)(T::from_f64(f64::NAN), T::ZERO);
    let tile = Tile {
        k: kernel.k_block,
        segments: 1,
        a: a.as_ptr(),
        a_segment: 0,
        b: b.as_ptr(),
        b_segment: 0,
        c: c.as_mut_ptr(),
        ldc: nr,
        rows: mr,
        cols: nr,
        start: Start::Zero,
        residual: std::ptr::null(),
        relu: true,
    };
    // SAFETY: as above.
    unsafe { (kernel.tile)(&tile) };
    let nan: Vec<bool> = c.iter().map(|v| v.to_f64().is_nan()).collect();
    assert!(nan[..nr].iter().all(|&v| v) && nan[nr..].iter().all(|&v| !v), "{}", kernel.name);
}

#[test]
fn every_tile_is_the_naive_product() {
    // f32 sums of at most 144 products of numbers below 1.
    f32::available().iter().for_each(|kernel| check_tiles(kernel, 2e-5));
    f64::available().iter().for_each(|kernel| check_tiles(kernel, 1e-13));
    plain_bf16_kernels().iter().chain(bf16_kernels()).for_each(|kernel| check_tiles(kernel, 2e-5));
}

fn check_packing<T: Element, P: Panel>(kernel: &Kernel<T, P>) {
    let (nr, pair) = (kernel.nr, kernel.pair);
    let plane_len = 4 * nr + 7;
    // Small integers, which bf16 holds too.
    let value = |i: usize| (i % 251 + 1) as f64;
    let planes: Vec<T> = (0..3 * plane_len).map(|i| T::from_f64(value(i))).collect();
    let run = |at, len, from| Run { at, len, from };
    let cases: Vec<(usize, Vec<Run>)> = vec![
        (1, vec![run(0, nr, 5)]),
        (1, vec![]),
        (1, vec![run(1, nr - 2, plane_len - nr + 2)]),
        (1, vec![run(0, 3, 0), run(5, nr - 5, 9)]),
        (2, vec![run(0, nr, 3)]),
        (2, vec![run(2, nr - 2, plane_len - 2 * (nr - 2) + 1)]),
        (2, vec![run(0, 1, plane_len - 1), run(1, 2, 4), run(nr - 1, 1, 0)]),
        (3, vec![run(1, nr - 1, 2)]),
        (1, (0..nr / 2).map(|i| run(2 * i, 1, 3 * i)).collect()),
    ];
    for (step, runs) in cases {
        let expected = |c: usize, at: usize| {
            let run = runs.iter().find(|run| (run.at..run.at + run.len).contains(&at));
            run.filter(|_| c < 3).map_or(0.0, |run| value(c * plane_len + run.from + (at - run.at) * step))
        };
        // One row more than the planes fill.
        let n_rows = 3usize.div_ceil(pair) + 1;
        let mut rows = vec![(kernel.join)(T::from_f64(-7.0), T::from_f64(-7.0)); n_rows * nr];
        (kernel.pack_rows)(&mut rows, &planes, plane_len, &runs, step);
        for (at, found) in rows.iter().enumerate() {
            let expected: Vec<f64> = (0..pair).map(|half| expected(at / nr * pair + half, at % nr)).collect();
            assert_eq!(found.values(), expected, "{} step {step} runs {runs:?} at {at}", kernel.name);
        }
        let mut rows = vec![P::default(); 3 * nr / pair];
        (kernel.pack_along)(&mut rows, &planes, plane_len, &runs, step);
        let found: Vec<f64> = rows.iter().flat_map(|v| v.values()).collect();
        let expected: Vec<f64> = (0..3 * nr).map(|i| expected(i / nr, i % nr)).collect();
        assert_eq!(found, expected, "{} step {step} runs {runs:?} along", kernel.name);
    }
}

#[test]
fn packed_rows_are_the_named_elements() {
    f32::available().iter().for_each(check_packing);
    f64::available().iter().for_each(check_packing);
    plain_bf16_kernels().iter().chain(bf16_kernels()).for_each(check_packing);
}

fn check_columns<T: Element, P: Panel>(kernel: &Kernel<T, P>) {
    let (nr, pair) = (kernel.nr, kernel.pair);
    let value = |i: usize| (i % 251 + 1) as f64;
    for (n_rows, len, steps) in
        [(nr, 4 * nr, 4 * nr / pair), (nr - 1, 33, 40), (1, 1, 3), (nr / 2 + 1, 17, 16), (2, 0, 2)]
    {
        let step = len + 3;
        let rows: Vec<T> = (0..n_rows * step).map(|i| T::from_f64(value(i))).collect();
        let mut panel = vec![(kernel.join)(T::from_f64(-7.0), T::from_f64(-7.0)); steps * nr];
        (kernel.pack_columns)(Columns { rows: &rows, step, n_rows, len }, &mut panel);
        for (at, found) in panel.iter().enumerate() {
            let (p, j) = (at / nr, at % nr);
            let expected = |p: usize| if j < n_rows && p < len { value(j * step + p) } else { 0.0 };
            let expected: Vec<f64> = (0..pair).map(|half| expected(p * pair + half)).collect();
            assert_eq!(found.values(), expected, "{} {n_rows} rows of {len}, step {p}, row {j}", kernel.name);
        }
    }
}

#[test]
fn packed_columns_are_the_transpose() {
    f32::available().iter().for_each(check_columns);
    f64::available().iter().for_each(check_columns);
    plain_bf16_kernels().iter().chain(bf16_kernels()).for_each(check_columns);
}

#[test]
fn lines_are_convolved_and_correlated() {
    fn check<T: Kernels>(tolerance: f64) {
        for kernel in T::available_lines() {
            for (n, taps) in [
                (1, vec![0]),
                (7, vec![3, 0]),
                (203, vec![0, 1, 2, 9, 10, 11, 18, 19, 20]),
                (64, (0..25).collect()),
                (16, vec![5; 4]),
            ] {
                let (input, weights, grad) = (wave(n + 25, 1.7), wave(taps.len(), 0.9), wave(n, 2.3));
                let mut out = vec![T::from_f64(f64::NAN); n];
                (kernel.convolve)(&of(&input), &taps, &of(&weights), &mut out);
                for (i, found) in out.iter().map(|v| v.to_f64()).enumerate() {
                    let expected: f64 = taps.iter().zip(&weights).map(|(tap, w)| w * input[tap + i]).sum();
                    assert!(
                        (found - expected).abs() < tolerance,
                        "{} {n} {taps:?} at {i}: {found} {expected}",
                        kernel.name
                    );
                }
                let mut sums = vec![0.5; taps.len()];
                (kernel.correlate)(&of(&input), &taps, &of(&grad), &mut sums);
                for (&tap, found) in taps.iter().zip(&sums) {
                    let expected = 0.5 + (0..n).map(|i| input[tap + i] * grad[i]).sum::<f64>();
                    assert!(
                        (found - expected).abs() < 10.0 * tolerance,
                        "{} {n} {tap}: {found} {expected}",
                        kernel.name
                    );
                }
            }
        }
    }
    check::<f32>(2e-6);
    check::<f64>(1e-14);
}

#[test]
#[should_panic(expected = "outside the line")]
fn a_tap_outside_the_line_is_refused() {
    (f32::lines().convolve)(&[0.0; 10], &[3], &[1.0], &mut [0.0; 8]);
}

#[test]
fn bf16_rounds_to_nearest_even() {
    // 1 + 2^-8 lies half way between 1 and 1 + 2^-7, 1 + 3 * 2^-8 between 1 + 2^-7 and 1 + 2^-6.
    let cases = [
        (1.0, 1.0),
        (1.0 + 1.0 / 256.0, 1.0),
        (1.0 + 3.0 / 256.0, 1.0 + 1.0 / 64.0),
        (1.004, 1.0 + 1.0 / 128.0),
        (-3.0e38, -3.004_055_3e38),
        (f32::MAX, f32::INFINITY),
        (f32::NEG_INFINITY, f32::NEG_INFINITY),
        (0.0, 0.0),
    ];
    for (value, rounded) in cases {
        let [low, high] = halves(pair(value, -value));
        assert!((low - rounded).abs() <= rounded.abs() * 1e-6 || low == rounded, "{value}: {low}, expected {rounded}");
        assert_eq!(high, -low);
    }
    assert!(halves(pair(f32::NAN, 0.0))[0].is_nan());
}

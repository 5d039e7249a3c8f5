//! Convolution of each channel by itself, directly on planes.
//!
//! A plane is first laid out so that every tap reads the whole output from consecutive elements: padded with its zeros,
//! and its rows and columns sorted by their remainders modulo the strides. Then neither border nor stride shows in the
//! loops.

use rayon::prelude::*;

use super::Epilogue;
use super::geometry::Geometry;
use super::pack::every_second;
use crate::cpu::{Element, Shared, init, par_chunks, vectorised, with_scratch};
use crate::kernels::Kernels;

/// Stretches of sums are whole multiples of this: one vector of f32 in AVX-512, two of f64.
const LANES: usize = 16;

/// Largest kernel whose input gradient is put together of parts; beyond, products are added one tap after the other.
const MAX_PART_TAPS: usize = 49;

/// Layout of a prepared plane: for each remainder of the rows, then of the columns, `rows` rows of `run` columns.
struct Prepared {
    rows: usize,
    run: usize,
}

impl Prepared {
    fn new(g: &Geometry) -> Self {
        Self {
            rows: g.oh + (g.kh - 1) * g.dilation[0] / g.stride[0],
            run: g.ow + (g.kw - 1) * g.dilation[1] / g.stride[1],
        }
    }

    /// Elements, with zeros after the plane for vectors that reach past it.
    fn len(&self, g: &Geometry) -> usize {
        g.stride[0] * g.stride[1] * self.rows * self.run + LANES
    }

    /// Where each tap reads for the first output pixel.
    fn taps(&self, g: &Geometry) -> Vec<usize> {
        (0..g.taps()).map(|tap| self.at(g, 0, tap / g.kw, tap % g.kw)).collect()
    }

    /// Elements from the first output pixel's to the last one's, in whole vectors; output rows lie `run` apart, with
    /// pixels beside the map between them.
    fn sums(&self, g: &Geometry) -> usize {
        ((g.oh - 1) * self.run + g.ow).next_multiple_of(LANES)
    }

    /// First element that tap `(ki, kj)` reads for output row `oy`.
    #[inline(always)]
    fn at(&self, g: &Geometry, oy: usize, ki: usize, kj: usize) -> usize {
        let ([down, across], row, column) = (g.stride, ki * g.dilation[0], kj * g.dilation[1]);
        let part = row % down * across + column % across;
        (part * self.rows + oy + row / down) * self.run + column / across
    }

    /// For every run that holds pixels of the map: `(start in the prepared plane, start in the map, columns)`.
    #[inline(always)]
    fn runs(&self, g: &Geometry, mut f: impl FnMut(usize, usize, usize)) {
        let ([down, across], [above, pad]) = (g.stride, g.padding);
        for below in 0..down {
            for q in above.saturating_sub(below).div_ceil(down)..self.rows {
                let row = q * down + below;
                if row >= above + g.h {
                    break;
                }
                for phase in 0..across {
                    // Padded columns `phase + q stride` that lie in the map: q in lo..hi.
                    let lo = pad.saturating_sub(phase).div_ceil(across).min(self.run);
                    let hi = (pad + g.w).saturating_sub(phase).div_ceil(across).min(self.run);
                    if lo < hi {
                        let start = ((below * across + phase) * self.rows + q) * self.run + lo;
                        f(start, (row - above) * g.w + phase + lo * across - pad, hi - lo);
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn fill<T: Element>(&self, g: &Geometry, plane: &[T], out: &mut [T]) {
        out.fill(T::ZERO);
        self.runs(g, |to, from, n| {
            let target = &mut out[to..to + n];
            match g.stride[1] {
                1 => target.copy_from_slice(&plane[from..from + n]),
                2 => every_second(&plane[from..], target),
                stride => target.iter_mut().zip(plane[from..].iter().step_by(stride)).for_each(|(t, s)| *t = *s),
            }
        });
    }
}

/// One output plane from a prepared plane, by way of `sums`: `finish` gets each of its rows.
#[inline(always)]
fn convolve_plane<T: Kernels>(
    g: &Geometry,
    p: &Prepared,
    taps: &[usize],
    padded: &[T],
    kernel: &[T],
    sums: &mut [T],
    mut finish: impl FnMut(usize, &[T]),
) {
    (T::lines().convolve)(padded, taps, kernel, &mut sums[..p.sums(g)]);
    for oy in 0..g.oh {
        finish(oy, &sums[oy * p.run..][..g.ow]);
    }
}

/// `[n, c_out, oh, ow]`.
pub(super) fn forward<T: Kernels>(g: &Geometry, x: &[T], weight: &[T], epilogue: Epilogue<'_, T>) -> Vec<T> {
    let (prepared, plane, m, og) = (Prepared::new(g), g.h * g.w, g.pixels(), g.c_out_group());
    let (taps, padded_len) = (prepared.taps(g), prepared.len(g));
    par_chunks(g.n * g.c_out * m, og * m, |index, out| {
        let c = index % g.c_in;
        with_scratch(padded_len + prepared.sums(g), |scratch| {
            let (padded, sums) = scratch.split_at_mut(padded_len);
            vectorised(
                #[inline(always)]
                || {
                    prepared.fill(g, &x[index * plane..][..plane], padded);
                    for (j, out) in out.chunks_exact_mut(m).enumerate() {
                        let kernel = &weight[(c * og + j) * taps.len()..][..taps.len()];
                        let bias = epilogue.bias.map_or(T::ZERO, |bias| bias[c * og + j]);
                        convolve_plane(g, &prepared, &taps, padded, kernel, sums, |oy, row| {
                            let out = &mut out[oy * g.ow..][..g.ow];
                            out.iter_mut().zip(row).for_each(|(out, &v)| *out = v + bias);
                        });
                        if let Some(residual) = epilogue.residual {
                            let residual = &residual[(index * og + j) * m..][..m];
                            out.iter_mut().zip(residual).for_each(|(out, &r)| *out += r);
                        }
                        if epilogue.relu {
                            out.iter_mut().for_each(|v| *v = if *v < T::ZERO { T::ZERO } else { *v });
                        }
                    }
                },
            );
        });
    })
}

/// Gradients of input `[n, c_in, h, w]` and weight `[c_out, 1, kh, kw]`, each where asked for: one task a channel,
/// images in order, so that both read a gradient's plane while it is near.
pub(super) fn backward<T: Kernels>(
    g: &Geometry,
    dy: &[T],
    x: Option<&[T]>,
    weight: Option<&[T]>,
) -> (Option<Vec<T>>, Option<Vec<T>>) {
    let (plane, m, og, taps) = (g.h * g.w, g.pixels(), g.c_out_group(), g.taps());
    let turned = g.input_grad().filter(|_| og == 1);
    let total = g.n * g.c_in * plane;
    let mut dx: Vec<T> = Vec::with_capacity(if weight.is_some() { total } else { 0 });
    let mut dw = vec![T::ZERO; if x.is_some() { g.c_out * taps } else { 0 }];
    let planes = weight.map(|_| Shared::new(&mut dx.spare_capacity_mut()[..total]));
    let channel = |c: usize, dw: &mut [T]| {
        let mut sums = vec![0.0; dw.len()];
        for image in 0..g.n {
            let index = image * g.c_in + c;
            let dy = &dy[index * og * m..][..og * m];
            if let (Some(planes), Some(weight)) = (&planes, weight) {
                // SAFETY: a plane belongs to one image and channel.
                let dx = init(unsafe { planes.part(index * plane..(index + 1) * plane) }, T::ZERO);
                let kernels = &weight[c * og * taps..][..og * taps];
                match &turned {
                    Some(turned) => input_plane(turned, dy, kernels, dx),
                    None if og == 1 && taps <= MAX_PART_TAPS => input_plane_by_parts(g, dy, kernels, dx),
                    None => input_plane_by_adding(g, dy, kernels, dx),
                }
            }
            if let Some(x) = x {
                weight_sums(g, dy, &x[index * plane..][..plane], &mut sums);
            }
        }
        for (dw, sum) in dw.iter_mut().zip(&sums) {
            *dw = T::from_f64(*sum);
        }
    };
    if x.is_some() {
        dw.par_chunks_mut(og * taps).enumerate().for_each(|(c, dw)| channel(c, dw));
    } else {
        (0..g.c_in).into_par_iter().for_each(|c| channel(c, &mut []));
    }
    if weight.is_some() {
        // SAFETY: the tasks cover every channel, and each initialised the planes of all its images.
        unsafe { dx.set_len(total) };
    }
    (weight.map(|_| dx), x.map(|_| dw))
}

/// The input's gradient where it is a convolution itself.
fn input_plane<T: Kernels>(turned: &Geometry, dy: &[T], kernel: &[T], dx: &mut [T]) {
    let prepared = Prepared::new(turned);
    let (taps, padded_len) = (prepared.taps(turned), prepared.len(turned));
    let kernel: Vec<T> = kernel.iter().rev().copied().collect();
    with_scratch(padded_len + prepared.sums(turned), |scratch| {
        let (padded, sums) = scratch.split_at_mut(padded_len);
        vectorised(
            #[inline(always)]
            || {
                prepared.fill(turned, dy, padded);
                convolve_plane(turned, &prepared, &taps, padded, &kernel, sums, |oy, row| {
                    dx[oy * turned.ow..][..turned.ow].copy_from_slice(row);
                });
            },
        );
    });
}

/// The input's gradient where the stride leaves no convolution of the whole: its rows and columns of one remainder
/// modulo the strides are one each, of the taps that meet them.
///
/// With `i + p = s q + r`: `dx[i] = sum_k w[k] dy[q + (r - d k) / s]` over the taps for which `s` divides `r - d k`.
fn input_plane_by_parts<T: Kernels>(g: &Geometry, dy: &[T], kernel: &[T], dx: &mut [T]) {
    let (hw, oo, ks) = ([g.h, g.w], [g.oh, g.ow], [g.kh, g.kw]);
    // Of each axis: zeros before the gradient, and values of `q`.
    let before = [0, 1].map(|a| (ks[a] - 1) * g.dilation[a] / g.stride[a]);
    let count = [0, 1].map(|a| (hw[a] - 1 + g.padding[a]) / g.stride[a] + 1);
    let [rows, run] = [0, 1].map(|a| before[a] + count[a].max(oo[a]));
    let (padded_len, sums_len) = (rows * run + LANES, ((count[0] - 1) * run + count[1]).next_multiple_of(LANES));
    let [down, across] = g.stride;
    with_scratch(padded_len + across * sums_len, |scratch| {
        let (padded, sums) = scratch.split_at_mut(padded_len);
        vectorised(
            #[inline(always)]
            || {
                padded.fill(T::ZERO);
                for (oy, row) in dy.chunks_exact(g.ow).enumerate() {
                    padded[(before[0] + oy) * run + before[1]..][..g.ow].copy_from_slice(row);
                }
                for below in 0..down {
                    for phase in 0..across {
                        let mut taps = [0; MAX_PART_TAPS];
                        let mut weights = [T::ZERO; MAX_PART_TAPS];
                        let sums = &mut sums[phase * sums_len..][..sums_len];
                        let mut found = 0;
                        sums.fill(T::ZERO);
                        for (tap, &w) in kernel.iter().enumerate() {
                            let [y, x] = [tap / g.kw * g.dilation[0], tap % g.kw * g.dilation[1]];
                            if y % down != below || x % across != phase {
                                continue;
                            }
                            // `d k - r` is a multiple of the stride, and at most what lies before the gradient.
                            taps[found] = (before[0] - (y - below) / down) * run + before[1] - (x - phase) / across;
                            weights[found] = w;
                            found += 1;
                        }
                        if found > 0 {
                            (T::lines().convolve)(padded, &taps[..found], &weights[..found], sums);
                        }
                    }
                    for (q, i) in (0..count[0]).filter_map(|q| Some((q, (q * down + below).checked_sub(g.padding[0])?)))
                    {
                        if i < g.h {
                            let row = &mut dx[i * g.w..][..g.w];
                            scatter_columns(g, &sums[q * run..], sums_len, count[1], row);
                        }
                    }
                }
            },
        );
    });
}

/// Puts together a row of the input's gradient from its columns by remainder, `pitch` elements apart in `parts`.
#[inline(always)]
fn scatter_columns<T: Element>(g: &Geometry, parts: &[T], pitch: usize, count: usize, row: &mut [T]) {
    let (across, pad) = (g.stride[1], g.padding[1]);
    if (across, pad) == (2, 1) {
        // The usual one, column by column: odd, even, odd, ...
        let (odd, even) = (&parts[pitch..][..count], &parts[1..]);
        let mut pairs = row.chunks_exact_mut(2);
        for ((pair, &a), &b) in pairs.by_ref().zip(odd).zip(even) {
            pair[0] = a;
            pair[1] = b;
        }
        if let ([last], Some(&a)) = (pairs.into_remainder(), odd.get(g.w / 2)) {
            *last = a;
        }
        return;
    }
    for phase in 0..across {
        let first = pad.saturating_sub(phase).div_ceil(across);
        let from = &parts[phase * pitch..][..count];
        if first < count {
            let to = row.get_mut(first * across + phase - pad..).unwrap_or_default();
            to.iter_mut().step_by(across).zip(&from[first..]).for_each(|(t, &v)| *t = v);
        }
    }
}

/// The input's gradient where strides of large kernels, or several outputs to a channel, leave no convolution.
fn input_plane_by_adding<T: Element>(g: &Geometry, dy: &[T], kernels: &[T], dx: &mut [T]) {
    let (prepared, m, taps) = (Prepared::new(g), g.pixels(), g.taps());
    with_scratch(prepared.len(g), |padded| {
        vectorised(
            #[inline(always)]
            || {
                padded.fill(T::ZERO);
                for (dy, kernel) in dy.chunks_exact(m).zip(kernels.chunks_exact(taps)) {
                    for (oy, row) in dy.chunks_exact(g.ow).enumerate() {
                        for (tap, &w) in kernel.iter().enumerate() {
                            let target = &mut padded[prepared.at(g, oy, tap / g.kw, tap % g.kw)..][..row.len()];
                            for (t, &d) in target.iter_mut().zip(row) {
                                *t += w * d;
                            }
                        }
                    }
                }
                prepared.runs(g, |from, to, n| {
                    let source = &padded[from..from + n];
                    match g.stride[1] {
                        1 => dx[to..to + n].copy_from_slice(source),
                        stride => dx[to..].iter_mut().step_by(stride).zip(source).for_each(|(t, s)| *t = *s),
                    }
                });
            },
        );
    });
}

/// Adds what one image gives to the weights' gradient of a channel, `[og][taps]`.
fn weight_sums<T: Kernels>(g: &Geometry, dy: &[T], plane: &[T], sums: &mut [f64]) {
    let (prepared, m) = (Prepared::new(g), g.pixels());
    let (taps, padded_len) = (prepared.taps(g), prepared.len(g));
    with_scratch(padded_len + prepared.sums(g), |scratch| {
        let (padded, grad) = scratch.split_at_mut(padded_len);
        vectorised(
            #[inline(always)]
            || {
                prepared.fill(g, plane, padded);
                grad.fill(T::ZERO);
                for (dy, sums) in dy.chunks_exact(m).zip(sums.chunks_exact_mut(taps.len())) {
                    for (oy, row) in dy.chunks_exact(g.ow).enumerate() {
                        grad[oy * prepared.run..][..g.ow].copy_from_slice(row);
                    }
                    (T::lines().correlate)(padded, &taps, grad, sums);
                }
            },
        );
    });
}

//! Convolution of each channel by itself, directly on planes.
//!
//! A plane is first laid out so that every tap reads a whole output row from consecutive elements: padded with its
//! zeros, and its columns sorted by their remainder modulo the stride. Then neither border nor stride shows in the
//! loops.

use rayon::prelude::*;

use super::Epilogue;
use super::geometry::Geometry;
use super::pack::every_second;
use crate::cpu::{Element, Shared, init, par_chunks, vectorised, with_scratch};
use crate::kernels::Kernels;

/// Stretches of sums are whole multiples of this: one vector of f32 in AVX-512, two of f64.
const LANES: usize = 16;

/// Layout of a prepared plane: `rows` rows of `stride` runs of `run` columns.
struct Prepared {
    rows: usize,
    run: usize,
}

impl Prepared {
    fn new(g: &Geometry) -> Self {
        let rows = (g.oh - 1) * g.stride[0] + (g.kh - 1) * g.dilation[0] + 1;
        Self { rows, run: g.ow + (g.kw - 1) * g.dilation[1] / g.stride[1] }
    }

    /// Elements, with zeros after the plane for vectors that reach past it.
    fn len(&self, g: &Geometry) -> usize {
        self.rows * g.stride[1] * self.run + LANES
    }

    /// Where each tap reads for the first output pixel.
    fn taps(&self, g: &Geometry) -> Vec<usize> {
        (0..g.taps()).map(|tap| self.at(g, 0, tap / g.kw, tap % g.kw)).collect()
    }

    /// Stretches of output pixels that read consecutive elements: `(number, elements from one's start to the next's,
    /// elements of one)`. With stride 1 all rows make up one, pixels beside the map between them.
    fn stretches(&self, g: &Geometry) -> (usize, usize, usize) {
        match g.stride {
            [1, 1] => (1, 0, (g.oh - 1) * self.run + g.ow),
            [down, across] => (g.oh, down * across * self.run, g.ow),
        }
    }

    /// Elements from an output row of a stretch to the next, where a stretch holds them all.
    fn pitch(&self, g: &Geometry) -> usize {
        if g.stride == [1, 1] { self.run } else { g.ow.next_multiple_of(LANES) }
    }

    /// First element that tap `(ki, kj)` reads for output row `oy`.
    #[inline(always)]
    fn at(&self, g: &Geometry, oy: usize, ki: usize, kj: usize) -> usize {
        let (row, column) = (oy * g.stride[0] + ki * g.dilation[0], kj * g.dilation[1]);
        (row * g.stride[1] + column % g.stride[1]) * self.run + column / g.stride[1]
    }

    /// For every run that holds pixels of the map: `(start in the prepared plane, start in the map, columns)`.
    #[inline(always)]
    fn runs(&self, g: &Geometry, mut f: impl FnMut(usize, usize, usize)) {
        let (stride, pad) = (g.stride[1], g.padding[1]);
        for row in g.padding[0]..self.rows.min(g.padding[0] + g.h) {
            for phase in 0..stride {
                // Padded columns `phase + q stride` that lie in the map: q in lo..hi.
                let lo = pad.saturating_sub(phase).div_ceil(stride).min(self.run);
                let hi = (pad + g.w).saturating_sub(phase).div_ceil(stride).min(self.run);
                if lo < hi {
                    let start = (row * stride + phase) * self.run + lo;
                    f(start, (row - g.padding[0]) * g.w + phase + lo * stride - pad, hi - lo);
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

/// One output plane: `out` from a prepared plane, by way of `sums`, rows `pitch` apart.
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
    let (stretches, step, len) = p.stretches(g);
    let whole = len.next_multiple_of(LANES);
    for stretch in 0..stretches {
        (T::lines().convolve)(&padded[stretch * step..], taps, kernel, &mut sums[stretch * whole..][..whole]);
    }
    for oy in 0..g.oh {
        finish(oy, &sums[oy * p.pitch(g)..][..g.ow]);
    }
}

/// Elements of the sums of a plane: whole vectors for every stretch.
fn sums_len(g: &Geometry, p: &Prepared) -> usize {
    let (stretches, _, len) = p.stretches(g);
    stretches * len.next_multiple_of(LANES)
}

/// `[n, c_out, oh, ow]`.
pub(super) fn forward<T: Kernels>(g: &Geometry, x: &[T], weight: &[T], epilogue: Epilogue<'_, T>) -> Vec<T> {
    let (prepared, plane, m, og) = (Prepared::new(g), g.h * g.w, g.pixels(), g.c_out_group());
    let (taps, padded_len) = (prepared.taps(g), prepared.len(g));
    par_chunks(g.n * g.c_out * m, og * m, |index, out| {
        let c = index % g.c_in;
        with_scratch(padded_len + sums_len(g, &prepared), |scratch| {
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
    with_scratch(padded_len + sums_len(turned, &prepared), |scratch| {
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

/// The input's gradient where strides or several outputs to a channel leave no convolution.
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
    let (stretches, step, len) = prepared.stretches(g);
    let whole = len.next_multiple_of(LANES);
    with_scratch(padded_len + sums_len(g, &prepared), |scratch| {
        let (padded, grad) = scratch.split_at_mut(padded_len);
        vectorised(
            #[inline(always)]
            || {
                prepared.fill(g, plane, padded);
                grad.fill(T::ZERO);
                for (dy, sums) in dy.chunks_exact(m).zip(sums.chunks_exact_mut(taps.len())) {
                    for (oy, row) in dy.chunks_exact(g.ow).enumerate() {
                        grad[oy * prepared.pitch(g)..][..g.ow].copy_from_slice(row);
                    }
                    for stretch in 0..stretches {
                        (T::lines().correlate)(
                            &padded[stretch * step..],
                            &taps,
                            &grad[stretch * whole..][..whole],
                            sums,
                        );
                    }
                }
            },
        );
    });
}

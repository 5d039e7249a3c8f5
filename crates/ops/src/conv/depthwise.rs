//! Convolution of each channel by itself, directly on planes.
//!
//! A plane is first laid out so that every tap reads a whole output row from consecutive elements: padded with its
//! zeros, and its columns sorted by their remainder modulo the stride. Then neither border nor stride shows in the
//! loops.

use rayon::prelude::*;

use super::geometry::Geometry;
use super::pack::{every_second, turned_weight};
use crate::cpu::{Element, par_chunks, vectorised, with_scratch};

/// Running sums of a weight gradient: one vector of f32 in AVX-512, two of f64.
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

    fn len(&self, g: &Geometry) -> usize {
        self.rows * g.stride[1] * self.run
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

/// `[n, c_out, oh, ow]`.
pub(super) fn forward<T: Element>(g: &Geometry, x: &[T], weight: &[T], bias: Option<&[T]>) -> Vec<T> {
    let (prepared, plane, m, og, taps) = (Prepared::new(g), g.h * g.w, g.pixels(), g.c_out_group(), g.taps());
    par_chunks(g.n * g.c_out * m, og * m, |index, out| {
        let c = index % g.c_in;
        with_scratch(prepared.len(g), |padded| {
            vectorised(
                #[inline(always)]
                || {
                    prepared.fill(g, &x[index * plane..][..plane], padded);
                    for (j, out) in out.chunks_exact_mut(m).enumerate() {
                        let kernel = &weight[(c * og + j) * taps..][..taps];
                        if let Some(bias) = bias {
                            out.fill(bias[c * og + j]);
                        }
                        for (oy, row) in out.chunks_exact_mut(g.ow).enumerate() {
                            for ki in 0..g.kh {
                                add_taps(g, &prepared, padded, oy, ki, &kernel[ki * g.kw..][..g.kw], row);
                            }
                        }
                    }
                },
            );
        });
    })
}

/// `row[x] += sum_kj kernel[kj] * padded[x s + kj d]` for one kernel row, three taps a pass.
#[inline(always)]
fn add_taps<T: Element>(g: &Geometry, p: &Prepared, padded: &[T], oy: usize, ki: usize, kernel: &[T], row: &mut [T]) {
    let n = row.len();
    let at = |kj: usize| &padded[p.at(g, oy, ki, kj)..][..n];
    let mut kj = 0;
    while kj + 3 <= kernel.len() {
        let (w, a, b, c) = ([kernel[kj], kernel[kj + 1], kernel[kj + 2]], at(kj), at(kj + 1), at(kj + 2));
        for i in 0..n {
            row[i] += w[0] * a[i] + w[1] * b[i] + w[2] * c[i];
        }
        kj += 3;
    }
    for kj in kj..kernel.len() {
        let (w, a) = (kernel[kj], at(kj));
        for i in 0..n {
            row[i] += w * a[i];
        }
    }
}

/// `[n, c_in, h, w]`.
pub(super) fn input_grad<T: Element>(g: &Geometry, dy: &[T], weight: &[T]) -> Vec<T> {
    if g.c_out == g.c_in
        && let Some(turned) = g.input_grad()
    {
        return forward(&turned, dy, &turned_weight(g, weight), None);
    }
    let (prepared, plane, m, og, taps) = (Prepared::new(g), g.h * g.w, g.pixels(), g.c_out_group(), g.taps());
    par_chunks(g.n * g.c_in * plane, plane, |index, out| {
        let c = index % g.c_in;
        let dy = &dy[index * og * m..][..og * m];
        with_scratch(prepared.len(g), |padded| {
            vectorised(
                #[inline(always)]
                || {
                    padded.fill(T::ZERO);
                    for (j, dy) in dy.chunks_exact(m).enumerate() {
                        let kernel = &weight[(c * og + j) * taps..][..taps];
                        for (oy, row) in dy.chunks_exact(g.ow).enumerate() {
                            for ki in 0..g.kh {
                                for kj in 0..g.kw {
                                    let w = kernel[ki * g.kw + kj];
                                    let target = &mut padded[prepared.at(g, oy, ki, kj)..][..row.len()];
                                    for (t, &d) in target.iter_mut().zip(row) {
                                        *t += w * d;
                                    }
                                }
                            }
                        }
                    }
                    prepared.runs(g, |from, to, n| {
                        let source = &padded[from..from + n];
                        match g.stride[1] {
                            1 => out[to..to + n].copy_from_slice(source),
                            stride => out[to..].iter_mut().step_by(stride).zip(source).for_each(|(t, s)| *t = *s),
                        }
                    });
                },
            );
        });
    })
}

/// `[c_out, 1, kh, kw]`: one task a channel, images in order.
pub(super) fn weight_grad<T: Element>(g: &Geometry, dy: &[T], x: &[T]) -> Vec<T> {
    let (prepared, plane, m, og, taps) = (Prepared::new(g), g.h * g.w, g.pixels(), g.c_out_group(), g.taps());
    let mut out = vec![T::ZERO; g.c_out * taps];
    out.par_chunks_mut(og * taps).enumerate().for_each(|(c, out)| {
        let mut sums = vec![[T::ZERO; LANES]; og * taps];
        with_scratch(prepared.len(g), |padded| {
            vectorised(
                #[inline(always)]
                || {
                    for image in 0..g.n {
                        prepared.fill(g, &x[(image * g.c_in + c) * plane..][..plane], padded);
                        let dy = &dy[(image * g.c_out + c * og) * m..][..og * m];
                        for (j, dy) in dy.chunks_exact(m).enumerate() {
                            for tap in 0..taps {
                                let (ki, kj) = (tap / g.kw, tap % g.kw);
                                let mut lanes = sums[j * taps + tap];
                                for (oy, row) in dy.chunks_exact(g.ow).enumerate() {
                                    add_products(&padded[prepared.at(g, oy, ki, kj)..][..row.len()], row, &mut lanes);
                                }
                                sums[j * taps + tap] = lanes;
                            }
                        }
                    }
                },
            );
        });
        for (o, lanes) in out.iter_mut().zip(&sums) {
            *o = T::from_f64(lanes.iter().map(|v| v.to_f64()).sum());
        }
    });
    out
}

/// Adds `a[i] * b[i]` to lane `i mod 16`.
#[inline(always)]
fn add_products<T: Element>(a: &[T], b: &[T], lanes: &mut [T; LANES]) {
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    // The rest of a row fills part of a vector of zeros, so that the sums never leave their registers.
    let rest = a.remainder().len();
    if rest > 0 {
        let (mut x, mut y) = ([T::ZERO; LANES], [T::ZERO; LANES]);
        x[..rest].copy_from_slice(a.remainder());
        y[..rest].copy_from_slice(b.remainder());
        for i in 0..LANES {
            lanes[i] += x[i] * y[i];
        }
    }
    for (a, b) in a.zip(b) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i];
        }
    }
}

//! Convolution as matrix products over strips of output pixels, packed a strip at a time (implicit GEMM).
//!
//! Short names: `m` output pixels of an image, `k` rows of the patch matrix (channels of a group times taps).

use std::ops::Range;

use rayon::prelude::*;

use super::geometry::Geometry;
use super::pack::{col2im_add, im2col, turned_weight};
use crate::cpu::{Element, Shared, init, vectorised, with_scratch};
use crate::gemm::{MatMut, MatRef, RawMat, gemm, gemm_raw, span};

/// Elements of a packed strip: half of a 1 MiB second-level cache in f32.
const STRIP_ELEMENTS: usize = 128 * 1024;
/// Patch rows multiplied at once; more are added in turns.
const MAX_ROWS: usize = 1280;
/// Fewest tasks worth starting where the work can be cut; fixed, so that no result depends on the threads.
const TASKS: usize = 8;

/// Pixels of a strip for `rows` patch rows: within the cache, of even size over the image, whole vectors, and enough
/// of them for `others` parallel tasks around to become [`TASKS`].
fn strip_len(m: usize, rows: usize, others: usize) -> usize {
    let most = (STRIP_ELEMENTS / rows.max(1)).max(48).min(m.max(1));
    let strips = m.div_ceil(most).max(TASKS.div_ceil(others.max(1)).min(m.div_ceil(96))).max(1);
    m.div_ceil(strips).next_multiple_of(16)
}

fn strip(m: usize, len: usize, index: usize) -> Range<usize> {
    index * len..m.min((index + 1) * len)
}

/// `[n, c_out, oh, ow]`.
pub(super) fn forward<T: Element>(g: &Geometry, x: &[T], weight: &[T], bias: Option<&[T]>) -> Vec<T> {
    let (m, cg, og, taps) = (g.pixels(), g.c_in_group(), g.c_out_group(), g.taps());
    let (k, plane) = (cg * taps, g.h * g.w);
    let channels = (MAX_ROWS / taps).clamp(1, cg);
    let len = strip_len(m, channels * taps, g.n * g.groups);
    let strips = m.div_ceil(len);
    let total = g.n * g.c_out * m;
    let mut out: Vec<T> = Vec::with_capacity(total);
    let shared = Shared::new(&mut out.spare_capacity_mut()[..total]);
    (0..g.n * g.groups * strips).into_par_iter().for_each(|task| {
        let (image, group, pixels) = (task / strips / g.groups, task / strips % g.groups, strip(m, len, task % strips));
        let s = pixels.len();
        let first = (image * g.c_out + group * og) * m + pixels.start;
        if let Some(bias) = bias {
            for j in 0..og {
                // SAFETY: these pixels of this channel belong to this task alone, and nobody holds another part of
                // them.
                init(unsafe { shared.part(first + j * m..first + j * m + s) }, bias[group * og + j]);
            }
        }
        let dst = RawMat { start: shared.pointer(first, span(og, s, m, 1)), row_stride: m, col_stride: 1 };
        for c0 in (0..cg).step_by(channels) {
            let cb = channels.min(cg - c0);
            let planes = &x[(image * g.c_in + group * cg + c0) * plane..][..cb * plane];
            let lhs = MatRef {
                data: &weight[group * og * k + c0 * taps..],
                rows: og,
                cols: cb * taps,
                row_stride: k,
                col_stride: 1,
            };
            let alpha = if c0 > 0 || bias.is_some() { T::ONE } else { T::ZERO };
            let multiply = |rhs: MatRef<'_, T>| {
                // SAFETY: the window is inside the output (`pointer` asserts it), its pixels belong to this task
                // alone, and they are initialised, by the bias or by the first product, whenever alpha is not 0.
                unsafe { gemm_raw(dst, lhs, rhs, alpha, T::ONE) };
            };
            if g.is_pointwise() {
                let data = &planes[pixels.start..];
                multiply(MatRef { data, rows: cb, cols: s, row_stride: m, col_stride: 1 });
            } else {
                with_scratch(cb * taps * s, |patches| {
                    vectorised(
                        #[inline(always)]
                        || im2col(g, planes, pixels.clone(), patches),
                    );
                    multiply(MatRef::row_major(patches, cb * taps, s));
                });
            }
        }
    });
    // SAFETY: the tasks cover every image, group and pixel, and each wrote its whole window (the product of k >= 1
    // rows).
    unsafe { out.set_len(total) };
    out
}

/// `[n, c_in, h, w]`: a convolution of the gradient with turned weights where the stride is 1, products added back
/// otherwise.
pub(super) fn input_grad<T: Element>(g: &Geometry, dy: &[T], weight: &[T]) -> Vec<T> {
    match g.input_grad() {
        Some(turned) => forward(&turned, dy, &turned_weight(g, weight), None),
        None => input_grad_by_adding(g, dy, weight),
    }
}

fn input_grad_by_adding<T: Element>(g: &Geometry, dy: &[T], weight: &[T]) -> Vec<T> {
    let (m, cg, og, taps) = (g.pixels(), g.c_in_group(), g.c_out_group(), g.taps());
    let (k, plane) = (cg * taps, g.h * g.w);
    // A task owns whole planes, so that overlapping patches never meet another thread.
    let blocks = TASKS.div_ceil((g.n * g.groups).max(1)).min(cg).max(k.div_ceil(MAX_ROWS)).min(cg);
    let channels = cg.div_ceil(blocks);
    let blocks = cg.div_ceil(channels);
    let len = strip_len(m, channels * taps, TASKS);
    let mut out: Vec<T> = Vec::with_capacity(g.n * g.c_in * plane);
    let total = g.n * g.c_in * plane;
    let shared = Shared::new(&mut out.spare_capacity_mut()[..total]);
    (0..g.n * g.groups * blocks).into_par_iter().for_each(|task| {
        let (image, group, c0) = (task / blocks / g.groups, task / blocks % g.groups, task % blocks * channels);
        let cb = channels.min(cg - c0);
        let first = (image * g.c_in + group * cg + c0) * plane;
        // SAFETY: planes of one image, group and channel block belong to one task.
        let planes = init(unsafe { shared.part(first..first + cb * plane) }, T::ZERO);
        // weight[group][:, c0 .. c0 + cb], transposed
        let lhs = MatRef {
            data: &weight[group * og * k + c0 * taps..],
            rows: cb * taps,
            cols: og,
            row_stride: 1,
            col_stride: k,
        };
        for index in 0..m.div_ceil(len) {
            let pixels = strip(m, len, index);
            let s = pixels.len();
            let data = &dy[(image * g.c_out + group * og) * m + pixels.start..];
            with_scratch(cb * taps * s, |patches| {
                let rhs = MatRef { data, rows: og, cols: s, row_stride: m, col_stride: 1 };
                gemm(MatMut::row_major(patches, cb * taps, s), lhs, rhs, T::ZERO, T::ONE);
                vectorised(
                    #[inline(always)]
                    || col2im_add(g, patches, pixels, planes),
                );
            });
        }
    });
    // SAFETY: the tasks cover every plane, and each initialised its planes first.
    unsafe { out.set_len(total) };
    out
}

/// `[c_out, c_in / groups, kh, kw]`.
///
/// A task owns some input channels of a group, and a share of the strips where there are few channels; it adds up
/// `patches * dy^T`, whose rows are patch rows, and the shares are summed in order.
pub(super) fn weight_grad<T: Element>(g: &Geometry, dy: &[T], x: &[T]) -> Vec<T> {
    let (m, cg, og, taps) = (g.pixels(), g.c_in_group(), g.c_out_group(), g.taps());
    let (k, plane) = (cg * taps, g.h * g.w);
    let channels = 64usize.div_ceil(taps).max(cg.div_ceil(16)).min((MAX_ROWS / taps).max(1)).min(cg);
    let blocks = cg.div_ceil(channels);
    let len = strip_len(m, channels * taps, TASKS);
    let strips = g.n * m.div_ceil(len);
    let shares = TASKS.div_ceil(g.groups * blocks).min(strips).max(1);
    let per_share = strips.div_ceil(shares);
    let partials: Vec<Vec<T>> = (0..shares * g.groups * blocks)
        .into_par_iter()
        .map(|task| {
            let (share, group, c0) = (task / blocks / g.groups, task / blocks % g.groups, task % blocks * channels);
            let cb = channels.min(cg - c0);
            let rows = cb * taps;
            let mut sum = vec![T::ZERO; rows * og];
            for unit in share * per_share..strips.min((share + 1) * per_share) {
                let (image, pixels) = (unit / m.div_ceil(len), strip(m, len, unit % m.div_ceil(len)));
                let s = pixels.len();
                let planes = &x[(image * g.c_in + group * cg + c0) * plane..][..cb * plane];
                let data = &dy[(image * g.c_out + group * og) * m + pixels.start..];
                let dy_t = MatRef { data, rows: s, cols: og, row_stride: 1, col_stride: m };
                if g.is_pointwise() {
                    let lhs = MatRef { data: &planes[pixels.start..], rows, cols: s, row_stride: m, col_stride: 1 };
                    gemm(MatMut::row_major(&mut sum, rows, og), lhs, dy_t, T::ONE, T::ONE);
                } else {
                    with_scratch(rows * s, |patches| {
                        vectorised(
                            #[inline(always)]
                            || im2col(g, planes, pixels, patches),
                        );
                        let lhs = MatRef::row_major(patches, rows, s);
                        gemm(MatMut::row_major(&mut sum, rows, og), lhs, dy_t, T::ONE, T::ONE);
                    });
                }
            }
            sum
        })
        .collect();
    // [shares][groups][k][og] -> [groups][og][k], 16 output channels at a time so that reads and writes are whole
    // lines.
    let mut out = vec![T::ZERO; g.c_out * k];
    for (group, out) in out.chunks_exact_mut((og * k).max(1)).enumerate() {
        out.par_chunks_mut(16 * k).enumerate().for_each(|(tile, out)| {
            for share in 0..shares {
                for block in 0..blocks {
                    let part = &partials[(share * g.groups + group) * blocks + block];
                    for (r, row) in part.chunks_exact(og).enumerate() {
                        let r = block * channels * taps + r;
                        for (j, &v) in row[tile * 16..].iter().take(out.len() / k).enumerate() {
                            out[j * k + r] += v;
                        }
                    }
                }
            }
        });
    }
    out
}

//! Patches as matrices: im2col for a strip of output pixels, and its transpose, which adds back; weights turned for the
//! input's gradient.

use std::ops::Range;

use super::geometry::Geometry;
use crate::cpu::{Element, par_chunks};

/// Output columns `[lo, hi)` whose input column for tap `kj` lies inside the map.
fn valid_columns(g: &Geometry, kj: usize) -> Range<usize> {
    let (stride, padding, offset) = (g.stride[1], g.padding[1], kj * g.dilation[1]);
    let lo = padding.saturating_sub(offset).div_ceil(stride).min(g.ow);
    let hi = (g.w + padding).saturating_sub(offset).div_ceil(stride).min(g.ow);
    lo..hi.max(lo)
}

/// Input row of tap `ki` for output row `oy`, if inside the map.
fn input_row(g: &Geometry, oy: usize, ki: usize) -> Option<usize> {
    (oy * g.stride[0] + ki * g.dilation[0]).checked_sub(g.padding[0]).filter(|&y| y < g.h)
}

/// Output rows that a strip of pixels touches: `(row, columns, place of the first column in the strip)`.
fn rows(g: &Geometry, strip: &Range<usize>) -> impl Iterator<Item = (usize, Range<usize>, usize)> + use<> {
    let (ow, strip) = (g.ow, strip.clone());
    (strip.start / ow..strip.end.div_ceil(ow)).map(move |oy| {
        let (start, end) = (strip.start.max(oy * ow), strip.end.min((oy + 1) * ow));
        (oy, start - oy * ow..end - oy * ow, start - strip.start)
    })
}

/// `out[(c kh + ki) kw + kj, p] = planes[c, y(p) s - p_h + ki d, x(p) s - p_w + kj d]`, 0 outside, for the pixels of
/// `strip`.
///
/// `planes` holds whole `[h, w]` planes; `out` has `strip.len()` columns.
#[inline(always)]
pub(super) fn im2col<T: Element>(g: &Geometry, planes: &[T], strip: Range<usize>, out: &mut [T]) {
    let (plane_len, len) = (g.h * g.w, strip.len());
    // On a grid of equal width and stride 1 a tap is a shift of the whole plane, wrong only where it crosses a row's
    // end.
    let shift = g.stride == [1, 1] && g.ow == g.w;
    for (c, plane) in planes.chunks_exact(plane_len).enumerate() {
        for ki in 0..g.kh {
            for kj in 0..g.kw {
                let row = &mut out[((c * g.kh + ki) * g.kw + kj) * len..][..len];
                if shift {
                    shifted(g, plane, ki, kj, &strip, row);
                } else {
                    gathered(g, plane, ki, kj, &strip, row);
                }
            }
        }
    }
}

#[inline(always)]
fn shifted<T: Element>(g: &Geometry, plane: &[T], ki: usize, kj: usize, strip: &Range<usize>, row: &mut [T]) {
    let dy = (ki * g.dilation[0]) as isize - g.padding[0] as isize;
    let dx = (kj * g.dilation[1]) as isize - g.padding[1] as isize;
    let (offset, end) = (dy * g.w as isize + dx, plane.len() as isize);
    // Where the strip, moved by the tap, lies inside the plane.
    let from = (strip.start as isize + offset).clamp(0, end);
    let to = (strip.end as isize + offset).clamp(from, end);
    let first = (from - offset - strip.start as isize).clamp(0, row.len() as isize) as usize;
    let n = (to - from) as usize;
    row[..first].fill(T::ZERO);
    row[first..first + n].copy_from_slice(&plane[from as usize..to as usize]);
    row[first + n..].fill(T::ZERO);
    if dx == 0 {
        return;
    }
    let valid = valid_columns(g, kj);
    for (_, columns, at) in rows(g, strip) {
        let (left, right) =
            (valid.start.clamp(columns.start, columns.end), valid.end.clamp(columns.start, columns.end));
        for v in &mut row[at..at + left - columns.start] {
            *v = T::ZERO;
        }
        for v in &mut row[at + right - columns.start..at + columns.len()] {
            *v = T::ZERO;
        }
    }
}

#[inline(always)]
fn gathered<T: Element>(g: &Geometry, plane: &[T], ki: usize, kj: usize, strip: &Range<usize>, row: &mut [T]) {
    let (valid, stride) = (valid_columns(g, kj), g.stride[1]);
    for (oy, columns, at) in rows(g, strip) {
        let target = &mut row[at..at + columns.len()];
        let Some(y) = input_row(g, oy, ki) else {
            target.fill(T::ZERO);
            continue;
        };
        let (lo, hi) = (valid.start.clamp(columns.start, columns.end), valid.end.clamp(columns.start, columns.end));
        target[..lo - columns.start].fill(T::ZERO);
        target[hi.max(lo) - columns.start..].fill(T::ZERO);
        if lo >= hi {
            continue;
        }
        let source = &plane[y * g.w + lo * stride + kj * g.dilation[1] - g.padding[1]..(y + 1) * g.w];
        let target = &mut target[lo - columns.start..hi - columns.start];
        match stride {
            1 => target.copy_from_slice(&source[..target.len()]),
            2 => every_second(source, target),
            _ => {
                for (t, s) in target.iter_mut().zip(source.iter().step_by(stride)) {
                    *t = *s;
                }
            }
        }
    }
}

/// `target[i] = source[2 i]`, in a shape that compiles to shuffles; `source` reaches the last of them at least.
#[inline(always)]
pub(super) fn every_second<T: Element>(source: &[T], target: &mut [T]) {
    if let Some((last, most)) = target.split_last_mut() {
        for (t, s) in most.iter_mut().zip(source.chunks_exact(2)) {
            *t = s[0];
        }
        *last = source[2 * most.len()];
    }
}

/// Transpose of [`im2col`]: adds every column entry to the input pixel it was read from.
#[inline(always)]
pub(super) fn col2im_add<T: Element>(g: &Geometry, columns_of: &[T], strip: Range<usize>, planes: &mut [T]) {
    let (plane_len, len, stride) = (g.h * g.w, strip.len(), g.stride[1]);
    for (c, plane) in planes.chunks_exact_mut(plane_len).enumerate() {
        for ki in 0..g.kh {
            for kj in 0..g.kw {
                let row = &columns_of[((c * g.kh + ki) * g.kw + kj) * len..][..len];
                let valid = valid_columns(g, kj);
                for (oy, columns, at) in rows(g, &strip) {
                    let Some(y) = input_row(g, oy, ki) else { continue };
                    let lo = valid.start.clamp(columns.start, columns.end);
                    let hi = valid.end.clamp(columns.start, columns.end);
                    if lo >= hi {
                        continue;
                    }
                    let first = y * g.w + lo * stride + kj * g.dilation[1] - g.padding[1];
                    let source = &row[at + lo - columns.start..at + hi - columns.start];
                    let target = &mut plane[first..(y + 1) * g.w];
                    match stride {
                        1 => {
                            for (t, &s) in target.iter_mut().zip(source) {
                                *t += s;
                            }
                        }
                        2 => {
                            for (t, &s) in target.chunks_mut(2).zip(source) {
                                t[0] += s;
                            }
                        }
                        _ => {
                            for (t, &s) in target.iter_mut().step_by(stride).zip(source) {
                                *t += s;
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Weights of [`Geometry::input_grad`]: `out[group cg + i, j, a, b] = weight[group og + j, i, kh - 1 - a, kw - 1 - b]`.
pub(super) fn turned_weight<T: Element>(g: &Geometry, weight: &[T]) -> Vec<T> {
    let (cg, og, taps) = (g.c_in_group(), g.c_out_group(), g.taps());
    par_chunks(weight.len(), og * taps, |row, out| {
        let (group, i) = (row / cg, row % cg);
        for (j, kernel) in out.chunks_exact_mut(taps).enumerate() {
            let source = &weight[((group * og + j) * cg + i) * taps..][..taps];
            for (t, s) in kernel.iter_mut().zip(source.iter().rev()) {
                *t = *s;
            }
        }
    })
}

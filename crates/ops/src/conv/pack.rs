//! Panels: patches of a strip of output pixels, output gradients, weights; and the transpose of the patches, which adds
//! back.

use std::mem::MaybeUninit;
use std::ops::Range;

use rayon::prelude::*;

use super::geometry::Geometry;
use crate::cpu::{Element, Scratch, init};
use crate::kernels::{Columns, Kernel, Pack, Run};

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

/// Calls `f(place in the strip, input pixel of the first, pixels)` for every stretch of a strip of output pixels whose
/// tap lies inside the map, in one row each; input pixels follow one another at the stride.
#[inline(always)]
fn stretches(g: &Geometry, tap: usize, strip: &Range<usize>, mut f: impl FnMut(usize, usize, usize)) {
    let (ki, kj) = (tap / g.kw, tap % g.kw);
    let valid = valid_columns(g, kj);
    if strip.is_empty() || valid.is_empty() {
        return;
    }
    for oy in strip.start / g.ow..strip.end.div_ceil(g.ow) {
        let Some(y) = input_row(g, oy, ki) else { continue };
        let first = oy * g.ow;
        let lo = (first + valid.start).max(strip.start);
        let hi = (first + valid.end).min(strip.end);
        if lo < hi {
            f(lo - strip.start, y * g.w + (lo - first) * g.stride[1] + kj * g.dilation[1] - g.padding[1], hi - lo);
        }
    }
}

/// Whether any pixel of the strip sees the map through `tap`.
pub(super) fn tap_is_used(g: &Geometry, tap: usize, strip: &Range<usize>) -> bool {
    let mut used = false;
    stretches(g, tap, strip, |_, _, _| used = true);
    used
}

/// Panels `[panel][tap][..]` of the patches of a strip, each tap of `taps` filled from all `planes` by `pack` into
/// `tap_len` elements: `[channel][nr]` for `pack_rows`, pairs of channels for a kernel that takes them, and
/// `[channel][nr]` values for `pack_along`.
///
/// The last panel is filled up with zeros.
pub(super) fn pack_patches<T: Element, P>(
    g: &Geometry,
    nr: usize,
    (pack, tap_len): (Pack<T, P>, usize),
    planes: &[T],
    strip: &Range<usize>,
    taps: Range<usize>,
    panels: &mut [P],
) {
    let mut runs: Vec<Run> = Vec::with_capacity(8);
    for (panel, out) in panels.chunks_exact_mut(taps.len() * tap_len).enumerate() {
        let start = strip.start + panel * nr;
        let pixels = start..strip.end.min(start + nr);
        for (tap, rows) in taps.clone().zip(out.chunks_exact_mut(tap_len)) {
            runs.clear();
            // Stretches that follow one another in the plane too become one: the rows of a map that a tap sees whole.
            stretches(g, tap, &pixels, |at, from, len| match runs.last_mut() {
                Some(last) if g.stride[1] == 1 && last.at + last.len == at && last.from + last.len == from => {
                    last.len += len;
                }
                _ => runs.push(Run { at, len, from }),
            });
            pack(rows, planes, g.h * g.w, &runs, g.stride[1]);
        }
    }
}

/// Panels `[panel][pixel][nr]` of `rows` (channels, `row_step` apart) for a strip of pixels, pairs of pixels for a
/// kernel that takes them: a transpose.
///
/// Pixels are filled up with zeros to `pixels`, channels to whole panels.
pub(super) fn pack_transposed<T: Element, P: Scratch>(
    kernel: &Kernel<T, P>,
    rows: &[T],
    row_step: usize,
    n_rows: usize,
    strip: &Range<usize>,
    pixels: usize,
    panels: &mut [P],
) {
    let Kernel { nr, pair, .. } = *kernel;
    for (panel, out) in panels.chunks_exact_mut(pixels / pair * nr).enumerate() {
        let rows = &rows[panel * nr * row_step + strip.start..];
        let n_rows = nr.min(n_rows - panel * nr);
        (kernel.pack_columns)(Columns { rows, step: row_step, n_rows, len: strip.len() }, out);
    }
}

/// Transpose of the patches: adds row `(tap, channel)` of `patches` (`[tap][channel][strip]`, rows `step` apart) to the
/// input pixels it was read from.
#[inline(always)]
pub(super) fn add_patches<T: Element>(
    g: &Geometry,
    patches: &[T],
    step: usize,
    strip: &Range<usize>,
    planes: &mut [T],
) {
    let (plane_len, stride) = (g.h * g.w, g.stride[1]);
    let channels = planes.len() / plane_len;
    for tap in 0..g.taps() {
        for (c, plane) in planes.chunks_exact_mut(plane_len).enumerate() {
            let row = &patches[(tap * channels + c) * step..][..strip.len()];
            stretches(g, tap, strip, |at, from, len| {
                let source = &row[at..at + len];
                let target = &mut plane[from..from + (len - 1) * stride + 1];
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
            });
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

/// Weights as panels of broadcast rows, `[group][panel][tap][channel][mr]` or as the kernel's blocks have it, filled up
/// with zeros to whole panels and blocks.
pub(super) struct PackedWeight<P> {
    data: Vec<P>,
    panels: usize,
    panel_len: usize,
    /// Elements of a tap in a panel.
    tap_len: usize,
}

impl<P: Scratch> PackedWeight<P> {
    /// Rows are the output channels of a group, the sum runs over taps and its input channels.
    pub(super) fn new<T: Element>(g: &Geometry, kernel: &Kernel<T, P>, weight: &[T]) -> Self {
        let (cg, og, taps) = (g.c_in_group(), g.c_out_group(), g.taps());
        Self::fill(kernel, g.groups, og, taps, cg, |group, row, t, c| weight[((group * og + row) * cg + c) * taps + t])
    }

    /// Rows are the input channels of a group, the sum runs over its output channels and taps turned by half a circle:
    /// the weights of [`Geometry::input_grad`].
    pub(super) fn turned<T: Element>(g: &Geometry, kernel: &Kernel<T, P>, weight: &[T]) -> Self {
        let (cg, og, taps) = (g.c_in_group(), g.c_out_group(), g.taps());
        Self::fill(kernel, g.groups, cg, taps, og, |group, row, t, o| {
            weight[((group * og + o) * cg + row) * taps + taps - 1 - t]
        })
    }

    /// Rows are `(tap, channel)` of the channels of a group given, the sum runs over its output channels: the patches'
    /// own gradient.
    pub(super) fn of_patches<T: Element>(
        g: &Geometry,
        kernel: &Kernel<T, P>,
        weight: &[T],
        group: usize,
        channels: Range<usize>,
    ) -> Self {
        let (cg, og, taps, cb) = (g.c_in_group(), g.c_out_group(), g.taps(), channels.len());
        Self::fill(kernel, 1, taps * cb, 1, og, |_, row, _, o| {
            weight[((group * og + o) * cg + channels.start + row % cb) * taps + row / cb]
        })
    }

    /// Panels of `value(group, row, tap, channel)`, on rayon.
    fn fill<T: Element>(
        kernel: &Kernel<T, P>,
        groups: usize,
        n_rows: usize,
        taps: usize,
        n_channels: usize,
        value: impl Fn(usize, usize, usize, usize) -> T + Sync,
    ) -> Self {
        let Kernel { mr, pair, join, .. } = *kernel;
        let steps = kernel.steps(n_channels);
        let (panels, tap_len) = (n_rows.div_ceil(mr), steps * mr);
        let panel_len = taps * tap_len;
        let total = groups * panels * panel_len;
        let mut data: Vec<P> = Vec::with_capacity(total);
        data.spare_capacity_mut()[..total].par_chunks_mut(panel_len.max(1)).enumerate().for_each(
            |(index, panel): (usize, &mut [MaybeUninit<P>])| {
                let (group, first) = (index / panels, index % panels * mr);
                let panel = init(panel, P::default());
                let rows = mr.min(n_rows - first);
                // Reads run along the weights' own order, which has the taps innermost.
                for step in 0..n_channels.div_ceil(pair) {
                    let c = step * pair;
                    for t in 0..taps {
                        let target = &mut panel[t * tap_len..][..tap_len];
                        for i in 0..rows {
                            let low = value(group, first + i, t, c);
                            let high = if pair == 2 && c + 1 < n_channels {
                                value(group, first + i, t, c + 1)
                            } else {
                                T::ZERO
                            };
                            target[kernel.place(step, i)] = join(low, high);
                        }
                    }
                }
            },
        );
        // SAFETY: `init` wrote every element of every panel, and the panels cover `..total`.
        unsafe { data.set_len(total) };
        Self { data, panels, panel_len, tap_len }
    }

    /// Panels of a group.
    pub(super) fn panels(&self) -> usize {
        self.panels
    }

    /// One panel of a group from step `step` of tap `tap` on.
    pub(super) fn panel(&self, group: usize, panel: usize, tap: usize, step: usize, mr: usize) -> &[P] {
        &self.data[(group * self.panels + panel) * self.panel_len..][..self.panel_len][tap * self.tap_len + step * mr..]
    }
}

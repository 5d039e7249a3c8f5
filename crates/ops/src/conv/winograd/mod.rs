//! Dense 3x3 convolution of stride 1 by Winograd's minimal filtering F(2x2, 3x3): 16 products for 4 outputs instead
//! of 36.
//!
//! With `d` a 4x4 patch of the input and `g` a 3x3 kernel, a 2x2 tile of the output is
//! `y = A^T [(G g G^T) * (B^T d B)] A`, `*` element by element; summed over channels the 16 elements are 16 matrix
//! products over all tiles. Derived from it: `dg = G^T [(A dy A^T) * (B^T d B)] G`. A dilated convolution is one on each
//! of the grids that every `dilation`-th pixel makes. The transforms only add, subtract and halve, so that the error
//! stays that of a direct sum within a small factor.
//!
//! Source: Winograd 1980; Lavin and Gray 2016.

#[cfg(test)]
mod tests;
mod tiles;
mod transforms;

use std::ops::Range;

use rayon::prelude::*;

use super::Epilogue;
use super::geometry::Geometry;
use crate::cpu::{Element, Shared, vectorised, with_scratch};
use crate::kernels::{Columns, Kernel, Kernels, Run, Start, Tile};
use tiles::Tiles;
use transforms::{
    LINES, by_lanes, transform_gradients, transform_kernel_gradients, transform_kernels, transform_outputs,
    transform_patches,
};

/// Elements of a patch.
const PATCH: usize = 16;
/// Channels whose patches are gathered before they are transformed: 100 KB in f32.
const GATHERED: usize = 32;
/// Fewest tasks worth starting; fixed, so that no result depends on the threads.
const TASKS: usize = 8;

/// Whether this way is open and, by the multiplications of both and the transforms, the shorter one.
pub(super) fn is_shorter(g: &Geometry) -> bool {
    if (g.kh, g.kw) != (3, 3) || g.stride != [1, 1] || g.groups != 1 || g.c_in < 16 || g.c_out < 16 {
        return false;
    }
    // The direct way leaves out taps whose rows lie outside the map.
    let rows = |ki: usize| (0..g.oh).filter(|oy| (oy + ki * g.dilation[0]).wrapping_sub(g.padding[0]) < g.h).count();
    let direct = (3 * (0..3).map(rows).sum::<usize>() * g.ow * g.c_in * g.c_out) as f64;
    // A transform costs about what six more channels would. Beyond that the direct way gains by its simpler loops:
    // measured at 512 to 256 channels, the two meet where this way has 0.7 of the products.
    let tiles = Tiles::new(g).len;
    (tiles * PATCH * (g.c_in * g.c_out + 6 * (g.c_in + g.c_out))) as f64 <= 0.7 * direct
}

/// `G g G^T` for the kernels `[c_out][c_in][3][3]` as panels `[panel][16][channel][mr]`; with `turned` the rows are the
/// input channels and the kernels stand on their heads.
pub(super) fn transform_weights<T: Kernels>(g: &Geometry, weight: &[T], turned: bool) -> Vec<T> {
    let (n_rows, n_channels) = if turned { (g.c_in, g.c_out) } else { (g.c_out, g.c_in) };
    let mr = T::kernel().mr;
    let tap_len = n_channels * mr;
    crate::cpu::par_chunks(n_rows.div_ceil(mr) * PATCH * tap_len, PATCH * tap_len, |index, panel| {
        let rows = index * mr..n_rows.min((index + 1) * mr);
        vectorised(
            #[inline(always)]
            || {
                for c in 0..n_channels {
                    for part in (rows.start..rows.end).step_by(LINES) {
                        let n = (rows.end - part).min(LINES);
                        let mut k = [[T::ZERO; LINES]; 9];
                        for i in 0..n {
                            let at = if turned { c * g.c_in + part + i } else { (part + i) * g.c_in + c };
                            for (tap, &v) in weight[at * 9..][..9].iter().enumerate() {
                                k[if turned { 8 - tap } else { tap }][i] = v;
                            }
                        }
                        for (tap, lines) in transform_kernels(&k).iter().enumerate() {
                            let to = &mut panel[tap * tap_len + c * mr + part - rows.start..][..n];
                            match n {
                                LINES => to.copy_from_slice(lines),
                                _ => to.copy_from_slice(&lines[..n]),
                            }
                        }
                    }
                }
            },
        );
    })
}

/// Patches of the channels in `planes` for one panel of tiles, transformed: `[16][channel][nr]`, the 16 `step` apart.
fn transformed_patches<T: Kernels>(
    kernel: &Kernel<T>,
    runs: &[Vec<Run>; PATCH],
    (step_of_run, plane_len): (usize, usize),
    planes: &[T],
    gathered: &mut [T],
    out: &mut [T],
    step: usize,
) {
    let nr = kernel.nr;
    for (block, planes) in planes.chunks(GATHERED * plane_len).enumerate() {
        let n = planes.len() / plane_len;
        for (runs, rows) in runs.iter().zip(gathered.chunks_exact_mut(n * nr)) {
            (kernel.pack_rows)(rows, planes, plane_len, runs, step_of_run);
        }
        vectorised(
            #[inline(always)]
            || {
                for c in 0..n {
                    let to = &mut out[(block * GATHERED + c) * nr..];
                    by_lanes!(nr, transform_patches(&gathered[c * nr..], n * nr, to, step));
                }
            },
        );
    }
}

/// [`super::dense::forward`] with the weights of [`transform_weights`]; with turned ones, and the geometry that the input's
/// gradient has as a convolution, [`super::dense::input_grad`].
pub(super) fn forward<T: Kernels>(g: &Geometry, x: &[T], weights: &[T], epilogue: Epilogue<'_, T>) -> Vec<T> {
    let kernel = T::kernel();
    let tiles = Tiles::new(g);
    let Kernel { mr, nr, .. } = *kernel;
    let (plane, m) = (g.h * g.w, g.pixels());
    let panels = tiles.len.div_ceil(nr);
    let rows_out = g.c_out.next_multiple_of(mr);
    let total = g.n * g.c_out * m;
    let mut out: Vec<T> = Vec::with_capacity(total);
    let shared = Shared::new(&mut out.spare_capacity_mut()[..total]);
    (0..g.n * panels).into_par_iter().for_each(|task| {
        let (image, start) = (task / panels, task % panels * nr);
        let panel = start..tiles.len.min(start + nr);
        let runs: [Vec<Run>; PATCH] =
            std::array::from_fn(|i| tiles.runs(g, &panel, [i / 4, i % 4], g.padding, [g.h, g.w]));
        let (patches_len, sums_len) = (PATCH * g.c_in * nr, PATCH * rows_out * nr);
        with_scratch(patches_len + sums_len + PATCH * GATHERED * nr, |scratch: &mut [T]| {
            let (patches, rest) = scratch.split_at_mut(patches_len);
            let (sums, gathered) = rest.split_at_mut(sums_len);
            let planes = &x[image * g.c_in * plane..][..g.c_in * plane];
            let source = (2 * g.dilation[1], plane);
            transformed_patches(kernel, &runs, source, planes, gathered, patches, g.c_in * nr);
            let cols = panel.len().next_multiple_of(kernel.lanes);
            for i in 0..PATCH {
                let b = &patches[i * g.c_in * nr..][..g.c_in * nr];
                for row in (0..rows_out).step_by(mr) {
                    let a = &weights[(row / mr * PATCH + i) * g.c_in * mr..][..g.c_in * mr];
                    let c = &mut sums[(i * rows_out + row) * nr..][..mr * nr];
                    let tile = Tile {
                        k: g.c_in,
                        segments: 1,
                        a: a.as_ptr(),
                        a_segment: 0,
                        b: b.as_ptr(),
                        b_segment: 0,
                        c: c.as_mut_ptr(),
                        ldc: nr,
                        rows: mr,
                        cols,
                        start: Start::Zero,
                        residual: std::ptr::null(),
                        relu: false,
                    };
                    // SAFETY: both panels and the window of `c` were sliced above.
                    unsafe { (kernel.tile)(&tile) };
                }
            }
            vectorised(
                #[inline(always)]
                || {
                    for o in 0..g.c_out {
                        let bias = epilogue.bias.map_or(T::ZERO, |bias| bias[o]);
                        let to = &mut gathered[..4 * nr];
                        by_lanes!(nr, transform_outputs(&sums[o * nr..], rows_out * nr, bias, to));
                        scatter(g, &tiles, &panel, (image * g.c_out + o) * m, to, nr, &epilogue, &shared);
                    }
                },
            );
        });
    });
    // SAFETY: the tasks cover every tile of every image, and the tiles every pixel of every channel.
    unsafe { out.set_len(total) };
    out
}

/// Writes the four outputs of each tile of a panel, `[2][2][nr]`, into the plane that starts at `plane`.
#[inline(always)]
fn scatter<T: Element>(
    g: &Geometry,
    tiles: &Tiles,
    panel: &Range<usize>,
    plane: usize,
    from: &[T],
    nr: usize,
    epilogue: &Epilogue<'_, T>,
    shared: &Shared<'_, T>,
) {
    let [dy, dx] = g.dilation;
    let finish = |v: T, at: usize| {
        let v = epilogue.residual.map_or(v, |residual| v + residual[at]);
        if epilogue.relu && v < T::ZERO { T::ZERO } else { v }
    };
    let plain = epilogue.residual.is_none() && !epilogue.relu;
    tiles.parts(
        g,
        panel,
        #[inline(always)]
        |place, row| {
            for i in 0..2 {
                let y = row.y + i * dy;
                if y >= g.oh {
                    continue;
                }
                let first = plane + y * g.ow + row.x;
                // The last tile of a row may have one column only.
                let whole = row.len - usize::from(row.x + dx * (2 * row.len - 1) >= g.ow);
                let (even, odd) =
                    (&from[2 * i * nr + place..][..row.len], &from[(2 * i + 1) * nr + place..][..row.len]);
                let span = if whole == row.len { dx * (2 * row.len - 1) + 1 } else { 2 * dx * whole + 1 };
                if dx == 1 && plain {
                    // SAFETY: every pixel belongs to one tile, and every tile to one task.
                    let to = unsafe { shared.part(first..first + span) };
                    let (pairs, rest) = to.as_chunks_mut::<2>();
                    for ((pair, &even), &odd) in pairs.iter_mut().zip(even).zip(odd) {
                        pair[0].write(even);
                        pair[1].write(odd);
                    }
                    if let [last] = rest {
                        last.write(even[whole]);
                    }
                    continue;
                }
                let to = shared.pointer(first, span);
                // SAFETY: `span` elements from `first` on are inside the output, as `pointer` asserts; every pixel
                // belongs to one tile, and every tile to one task.
                unsafe {
                    for k in 0..whole {
                        to.add(2 * dx * k).write(finish(even[k], first + 2 * dx * k));
                        to.add(2 * dx * k + dx).write(finish(odd[k], first + 2 * dx * k + dx));
                    }
                    if whole < row.len {
                        to.add(2 * dx * whole).write(finish(even[whole], first + 2 * dx * whole));
                    }
                }
            }
        },
    );
}

/// Elements of the packed patches and gradients of a strip of panels.
const STRIP_ELEMENTS: usize = 1024 * 1024;

/// [`super::dense::weight_grad`].
///
/// A task owns some input channels and a share of the tiles; shares are summed in order.
pub(super) fn weight_grad<T: Kernels>(g: &Geometry, dy: &[T], x: &[T]) -> Vec<T> {
    let (kernel, tiles) = (T::kernel(), Tiles::new(g));
    let Kernel { mr, nr, .. } = *kernel;
    let (plane, m, og) = (g.h * g.w, g.pixels(), g.c_out);
    let channels = g.c_in.div_ceil(g.c_in.div_ceil(160));
    let blocks = g.c_in.div_ceil(channels);
    let columns = og.next_multiple_of(nr);
    let panels = tiles.len.div_ceil(nr);
    let strip = (STRIP_ELEMENTS / (PATCH * nr * (channels + columns))).clamp(1, 4).min(panels);
    let strips = panels.div_ceil(strip);
    let shares = TASKS.div_ceil(blocks).min(g.n * strips).max(1);
    let per_share = (g.n * strips).div_ceil(shares);
    let partials: Vec<Vec<T>> = (0..shares * blocks)
        .into_par_iter()
        .map(|task| {
            let (share, c0) = (task / blocks, task % blocks * channels);
            let cb = channels.min(g.c_in - c0);
            let mut sum = vec![T::ZERO; PATCH * cb * og];
            // As many rows more as a tile is high: it reads whole panels.
            let (patches_len, gradients_len) = ((PATCH * strip * cb + mr) * nr, PATCH * columns * strip * nr);
            let rows_len = PATCH * og.max(GATHERED) * nr;
            let gathered_len = PATCH.max(4) * GATHERED * nr;
            with_scratch(patches_len + gradients_len + rows_len + gathered_len, |scratch: &mut [T]| {
                let (patches, rest) = scratch.split_at_mut(patches_len);
                let (gradients, rest) = rest.split_at_mut(gradients_len);
                let (rows, gathered) = rest.split_at_mut(rows_len);
                for unit in share * per_share..(g.n * strips).min((share + 1) * per_share) {
                    let (image, first) = (unit / strips, unit % strips * strip);
                    let segments = strip.min(panels - first);
                    for segment in 0..segments {
                        let start = (first + segment) * nr;
                        let panel = start..tiles.len.min(start + nr);
                        let planes = &x[(image * g.c_in + c0) * plane..][..cb * plane];
                        let runs: [Vec<Run>; PATCH] =
                            std::array::from_fn(|i| tiles.runs(g, &panel, [i / 4, i % 4], g.padding, [g.h, g.w]));
                        let (source, to) = ((2 * g.dilation[1], plane), &mut patches[segment * cb * nr..]);
                        transformed_patches(kernel, &runs, source, planes, gathered, to, segments * cb * nr);
                        let planes = &dy[image * og * m..][..og * m];
                        transformed_gradients(g, kernel, &tiles, &panel, planes, gathered, rows);
                        for i in 0..PATCH {
                            for column in (0..columns).step_by(nr) {
                                let at = ((i * columns + column) * segments + segment * nr) * nr;
                                let rows = &rows[(i * og + column) * nr..];
                                let columns = Columns { rows, step: nr, n_rows: nr.min(og - column), len: nr };
                                (kernel.pack_columns)(columns, &mut gradients[at..][..nr * nr]);
                            }
                        }
                    }
                    for i in 0..PATCH {
                        let patches = &patches[i * segments * cb * nr..];
                        for row in (0..cb).step_by(mr) {
                            let height = mr.min(cb - row);
                            let a = &patches[row * nr..][..((segments - 1) * cb + mr) * nr];
                            for column in (0..og).step_by(nr) {
                                let width = nr.min(og - column);
                                let b = &gradients[(i * columns + column) * segments * nr..][..segments * nr * nr];
                                let at = (i * cb + row) * og + column;
                                let c = sum[at..][..(height - 1) * og + width].as_mut_ptr();
                                let tile = Tile {
                                    k: nr,
                                    segments,
                                    a: a.as_ptr(),
                                    a_segment: cb * nr,
                                    b: b.as_ptr(),
                                    b_segment: nr * nr,
                                    c,
                                    ldc: og,
                                    rows: height,
                                    cols: width,
                                    start: Start::Add,
                                    residual: std::ptr::null(),
                                    relu: false,
                                };
                                // SAFETY: both panels and the window of `c` were sliced above; elements of `a` past the
                                // block's rows are initialised scratch.
                                unsafe { (kernel.tile_along)(&tile) };
                            }
                        }
                    }
                }
            });
            sum
        })
        .collect();
    crate::cpu::par_chunks(og * g.c_in * 9, 2 * LINES * g.c_in * 9, |tile, out| {
        vectorised(
            #[inline(always)]
            || {
                for (half, out) in out.chunks_mut(LINES * g.c_in * 9).enumerate() {
                    let (first, n) = ((2 * tile + half) * LINES, out.len() / (g.c_in * 9));
                    for block in 0..blocks {
                        let c0 = block * channels;
                        let cb = channels.min(g.c_in - c0);
                        for c in 0..cb {
                            let mut m = [[T::ZERO; LINES]; PATCH];
                            for share in 0..shares {
                                let part = &partials[share * blocks + block];
                                for (i, m) in m.iter_mut().enumerate() {
                                    let from = &part[(i * cb + c) * og + first..][..n];
                                    m.iter_mut().zip(from).for_each(|(m, &v)| *m += v);
                                }
                            }
                            for (tap, lines) in transform_kernel_gradients(&m).iter().enumerate() {
                                for (j, &v) in lines[..n].iter().enumerate() {
                                    out[(j * g.c_in + c0 + c) * 9 + tap] = v;
                                }
                            }
                        }
                    }
                }
            },
        );
    })
}

/// Output gradients of one panel of tiles, transformed: `[16][c_out][nr]`.
fn transformed_gradients<T: Kernels>(
    g: &Geometry,
    kernel: &Kernel<T>,
    tiles: &Tiles,
    panel: &Range<usize>,
    planes: &[T],
    gathered: &mut [T],
    rows: &mut [T],
) {
    let (nr, m) = (kernel.nr, g.pixels());
    let runs: [Vec<Run>; 4] = std::array::from_fn(|i| tiles.runs(g, panel, [i / 2, i % 2], [0, 0], [g.oh, g.ow]));
    for (block, planes) in planes.chunks(GATHERED * m).enumerate() {
        let n = planes.len() / m;
        for (runs, rows) in runs.iter().zip(gathered.chunks_exact_mut(n * nr)) {
            (kernel.pack_rows)(rows, planes, m, runs, 2 * g.dilation[1]);
        }
        vectorised(
            #[inline(always)]
            || {
                for c in 0..n {
                    let to = &mut rows[(block * GATHERED + c) * nr..];
                    by_lanes!(nr, transform_gradients(&gathered[c * nr..], n * nr, to, g.c_out * nr));
                }
            },
        );
    }
}

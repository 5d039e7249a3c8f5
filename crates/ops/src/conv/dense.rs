//! Convolution as products of packed panels, a strip of output pixels at a time (implicit GEMM).
//!
//! Short names: `m` output pixels of an image, `k` rows of the patch matrix, ordered (tap, channel).

use std::ops::Range;

use candle_core::DType;
use std::sync::OnceLock;

use rayon::prelude::*;

use super::geometry::Geometry;
use super::pack::{PackedWeight, add_patches, pack_patches, pack_transposed, tap_is_used};
use super::packed::Panels;
use super::{Epilogue, Precision, winograd};
use crate::cpu::{Scratch, Shared, init, vectorised, with_scratch};
use crate::gemm::{MatMut, MatRef, gemm};
use crate::kernels::{Kernel, Kernels, Start, Tile};

/// Bytes of a strip's packed patches, with room beside them in a second-level cache of 1 MiB.
const STRIP_BYTES: usize = 384 * 1024;
/// Patch rows multiplied at once; more are added in turns.
const MAX_ROWS: usize = 512;
/// Most panels of a strip: beyond, a strip gains nothing and tasks become few.
const MAX_PANELS: usize = 16;
/// Fewest tasks worth starting where the work can be cut; fixed, so that no result depends on the threads.
const TASKS: usize = 8;

/// Pixels of a strip for `rows` patch rows in panels of `P`: whole panels within the cache, of even size over the image,
/// and enough strips for `others` parallel tasks around to become [`TASKS`].
fn strip_len<T, P>(kernel: &Kernel<T, P>, m: usize, rows: usize, others: usize) -> usize {
    let most = STRIP_BYTES / (size_of::<P>() * rows.div_ceil(kernel.pair).max(1) * kernel.nr);
    let panels = m.div_ceil(kernel.nr);
    let strips = panels.div_ceil(most.clamp(1, MAX_PANELS)).max(TASKS.div_ceil(others.max(1)).min(panels)).max(1);
    panels.div_ceil(strips) * kernel.nr
}

fn strip(m: usize, len: usize, index: usize) -> Range<usize> {
    index * len..m.min((index + 1) * len)
}

/// Patch rows that are packed and multiplied together: all channels of some taps, or some channels of one.
struct Chunk {
    taps: Range<usize>,
    channels: Range<usize>,
}

/// Chunks of at most [`MAX_ROWS`] rows over the taps that `strip` uses; the others would multiply zeros.
fn chunks(g: &Geometry, channels: Range<usize>, strip: &Range<usize>) -> Vec<Chunk> {
    let n_channels = channels.len();
    let parts = n_channels.div_ceil(MAX_ROWS);
    // Whole blocks of every kernel, so that a part starts where a block does.
    let (most_taps, part) = ((MAX_ROWS / n_channels).max(1), n_channels.div_ceil(parts).next_multiple_of(32));
    let mut found: Vec<Chunk> = Vec::new();
    for tap in (0..g.taps()).filter(|&tap| tap_is_used(g, tap, strip)) {
        if parts > 1 {
            for start in channels.clone().step_by(part) {
                found.push(Chunk { taps: tap..tap + 1, channels: start..channels.end.min(start + part) });
            }
            continue;
        }
        match found.last_mut() {
            Some(Chunk { taps, .. }) if taps.end == tap && taps.len() < most_taps => taps.end = tap + 1,
            _ => found.push(Chunk { taps: tap..tap + 1, channels: channels.clone() }),
        }
    }
    found
}

/// Runs `$body` with `$kernel` bound to the kernel that `$g` asks for, for sums over `$channels`.
macro_rules! with_kernel {
    ($g:expr, $T:ty, $channels:expr, $kernel:ident => $body:expr) => {
        match $g.precision {
            Precision::Bf16 if let Some($kernel) = <$T>::bf16_kernel($channels) => $body,
            _ => {
                let $kernel = <$T>::kernel();
                $body
            }
        }
    };
}

/// Whether f32 convolutions take Winograd's way here; f64, where exactness is what is asked for, never does.
fn is_winograd<T: Kernels>(g: &Geometry) -> bool {
    T::DTYPE == DType::F32 && g.precision == Precision::F32 && winograd::is_shorter(g)
}

/// Whether images are single pixels under a single tap: the batch is a matrix then, and strips of pixels are too short.
fn is_matrix(g: &Geometry) -> bool {
    let single = [g.h, g.w, g.oh, g.ow, g.kh, g.kw, g.groups] == [1; 7];
    single && g.padding == [0, 0] && g.precision == Precision::F32
}

/// `a b`, of `rows` by `columns`.
fn multiplied<T: Kernels>([rows, columns]: [usize; 2], a: MatRef<'_, T>, b: MatRef<'_, T>) -> Vec<T> {
    let mut out = vec![T::ZERO; rows * columns];
    gemm(MatMut::row_major(&mut out, rows, columns), a, b, T::ZERO, T::ONE);
    out
}

fn matrix_forward<T: Kernels>(g: &Geometry, x: &[T], weight: &[T], epilogue: Epilogue<'_, T>) -> Vec<T> {
    let (x, weight) = (MatRef::row_major(x, g.n, g.c_in), MatRef::row_major(weight, g.c_out, g.c_in));
    let mut out = multiplied([g.n, g.c_out], x, weight.transposed());
    for (image, row) in out.chunks_exact_mut(g.c_out).enumerate() {
        for (o, v) in row.iter_mut().enumerate() {
            *v += epilogue.bias.map_or(T::ZERO, |bias| bias[o]);
            *v += epilogue.residual.map_or(T::ZERO, |residual| residual[image * g.c_out + o]);
            *v = if epilogue.relu && *v < T::ZERO { T::ZERO } else { *v };
        }
    }
    out
}

/// What is kept, packed at the first call.
///
/// Packing runs on the pool, and a thread that waits there may take up another pass over the same weights: under the
/// cell's lock it would then wait for itself. Outside of it, two passes at once pack the same bits twice.
fn packed_once<V>(kept: &OnceLock<V>, pack: impl FnOnce() -> V) -> &V {
    match kept.get() {
        Some(there) => there,
        None => {
            let packed = pack();
            kept.get_or_init(|| packed)
        }
    }
}

/// `[n, c_out, oh, ow]`.
pub(super) fn forward<T: Kernels>(
    g: &Geometry,
    x: &[T],
    weight: &[T],
    epilogue: Epilogue<'_, T>,
    panels: Option<&Panels>,
) -> Vec<T> {
    if is_winograd::<T>(g) {
        let transformed = || winograd::transform_weights(g, weight, false);
        return match panels.and_then(Panels::transformed) {
            Some(kept) => winograd::forward(g, x, packed_once::<Vec<_>>(kept, transformed), epilogue),
            None => winograd::forward(g, x, &transformed(), epilogue),
        };
    }
    if is_matrix(g) {
        return matrix_forward(g, x, weight, epilogue);
    }
    if let Some(kept) = panels.and_then(Panels::direct).filter(|_| g.precision == Precision::F32) {
        let weight = packed_once(kept, || PackedWeight::new(g, T::kernel(), weight));
        return products(g, T::kernel(), x, weight, epilogue);
    }
    direct_forward(g, x, weight, epilogue)
}

pub(super) fn direct_forward<T: Kernels>(g: &Geometry, x: &[T], weight: &[T], epilogue: Epilogue<'_, T>) -> Vec<T> {
    with_kernel!(g, T, g.c_in_group(), kernel => products(g, kernel, x, &PackedWeight::new(g, kernel, weight), epilogue))
}

/// [`forward`] with the weights already in panels.
fn products<T: Kernels, P: Scratch>(
    g: &Geometry,
    kernel: &Kernel<T, P>,
    x: &[T],
    weight: &PackedWeight<P>,
    epilogue: Epilogue<'_, T>,
) -> Vec<T> {
    let (m, cg, og, taps, nr) = (g.pixels(), g.c_in_group(), g.c_out_group(), g.taps(), kernel.nr);
    let plane = g.h * g.w;
    let len = strip_len(kernel, m, (cg * taps).min(MAX_ROWS), g.n * g.groups);
    let strips = m.div_ceil(len);
    let total = g.n * g.c_out * m;
    let mut out: Vec<T> = Vec::with_capacity(total);
    let shared = Shared::new(&mut out.spare_capacity_mut()[..total]);
    // Whole panels of rows read their bias, so it is filled up like them.
    let bias: Option<Vec<T>> = epilogue.bias.map(|bias| {
        let padded = weight.panels() * kernel.mr;
        let mut all = vec![T::ZERO; g.groups * padded];
        for (group, values) in bias.chunks_exact(og).enumerate() {
            all[group * padded..][..og].copy_from_slice(values);
        }
        all
    });
    (0..g.n * g.groups * strips).into_par_iter().for_each(|task| {
        let (image, group, pixels) = (task / strips / g.groups, task / strips % g.groups, strip(m, len, task % strips));
        let s = pixels.len();
        let first = (image * g.c_out + group * og) * m + pixels.start;
        let mut chunks = chunks(g, 0..cg, &pixels);
        if chunks.is_empty() {
            // The strip sees padding only: sums of nothing.
            chunks.push(Chunk { taps: 0..0, channels: 0..0 });
        }
        let last = chunks.len() - 1;
        for (index, Chunk { taps, channels }) in chunks.into_iter().enumerate() {
            let steps_of_tap = kernel.steps(channels.len());
            let rows = taps.len() * steps_of_tap;
            let planes = &x[(image * g.c_in + group * cg + channels.start) * plane..][..channels.len() * plane];
            with_scratch(s.div_ceil(nr) * nr * rows, |panels| {
                if rows > 0 {
                    let pack = (kernel.pack_rows, steps_of_tap * nr);
                    pack_patches(g, nr, pack, planes, &pixels, taps.clone(), panels);
                }
                for panel in 0..weight.panels() {
                    let a = weight.panel(group, panel, taps.start, channels.start / kernel.pair, kernel.mr);
                    assert!(a.len() >= rows * kernel.mr, "panel of weights");
                    let row = panel * kernel.mr;
                    let height = kernel.mr.min(og - row);
                    let start = match (&bias, index) {
                        (_, 1..) => Start::Add,
                        (None, 0) => Start::Zero,
                        (Some(bias), 0) => Start::Bias(bias[group * weight.panels() * kernel.mr + row..].as_ptr()),
                    };
                    for (j, b) in (0..s.div_ceil(nr)).map(|j| (j, &panels[j * nr * rows..][..nr * rows])) {
                        let width = nr.min(s - j * nr);
                        let at = first + row * m + j * nr;
                        let c = shared.pointer(at, (height - 1) * m + width);
                        let residual = match epilogue.residual {
                            Some(residual) if index == last => residual[at..][..(height - 1) * m + width].as_ptr(),
                            _ => std::ptr::null(),
                        };
                        let tile = Tile {
                            k: rows,
                            segments: 1,
                            a: a.as_ptr(),
                            a_segment: 0,
                            b: b.as_ptr(),
                            b_segment: 0,
                            c,
                            ldc: m,
                            rows: height,
                            cols: width,
                            start,
                            residual,
                            relu: epilogue.relu && index == last,
                        };
                        // SAFETY: `a` and `b` hold `rows` steps of whole panels as asserted and sliced; the window of
                        // `c` is inside the output, belongs to this task alone, and is initialised by the first chunk.
                        unsafe { (kernel.tile)(&tile) };
                    }
                }
            });
        }
    });
    // SAFETY: the tasks cover every image, group and pixel, and the first chunk of each wrote its whole window.
    unsafe { out.set_len(total) };
    out
}

/// `[n, c_in, h, w]`: a convolution of the gradient with turned weights where the stride is 1, products added back
/// otherwise.
pub(super) fn input_grad<T: Kernels>(g: &Geometry, dy: &[T], weight: &[T]) -> Vec<T> {
    match g.input_grad() {
        Some(turned) if is_winograd::<T>(&turned) => {
            winograd::forward(&turned, dy, &winograd::transform_weights(g, weight, true), Epilogue::none())
        }
        _ if is_matrix(g) => {
            let (dy, weight) = (MatRef::row_major(dy, g.n, g.c_out), MatRef::row_major(weight, g.c_out, g.c_in));
            multiplied([g.n, g.c_in], dy, weight)
        }
        _ => direct_input_grad(g, dy, weight),
    }
}

pub(super) fn direct_input_grad<T: Kernels>(g: &Geometry, dy: &[T], weight: &[T]) -> Vec<T> {
    with_kernel!(g, T, g.c_out_group(), kernel => input_grad_by(g, kernel, dy, weight))
}

fn input_grad_by<T: Kernels, P: Scratch>(g: &Geometry, kernel: &Kernel<T, P>, dy: &[T], weight: &[T]) -> Vec<T> {
    match g.input_grad() {
        Some(turned) => products(&turned, kernel, dy, &PackedWeight::turned(g, kernel, weight), Epilogue::none()),
        None => input_grad_by_adding(g, kernel, dy, weight),
    }
}

fn input_grad_by_adding<T: Kernels, P: Scratch>(g: &Geometry, kernel: &Kernel<T, P>, dy: &[T], weight: &[T]) -> Vec<T> {
    let (m, cg, og, taps, nr) = (g.pixels(), g.c_in_group(), g.c_out_group(), g.taps(), kernel.nr);
    let plane = g.h * g.w;
    // A task owns whole planes, so that overlapping patches never meet another thread.
    let blocks = TASKS.div_ceil((g.n * g.groups).max(1)).max((cg * taps).div_ceil(MAX_ROWS)).min(cg);
    let channels = cg.div_ceil(blocks);
    let blocks = cg.div_ceil(channels);
    let len = strip_len(kernel, m, 2 * channels * taps + og, TASKS);
    let steps = kernel.steps(og);
    let weights: Vec<PackedWeight<P>> = (0..g.groups * blocks)
        .into_par_iter()
        .map(|index| {
            let start = index % blocks * channels;
            PackedWeight::of_patches(g, kernel, weight, index / blocks, start..cg.min(start + channels))
        })
        .collect();
    // The gradient's rows as patches of a pointwise convolution.
    let pointwise = Geometry { n: g.n, c_in: g.c_out, h: g.oh, w: g.ow, ..g.pointwise() };
    let total = g.n * g.c_in * plane;
    let mut out: Vec<T> = Vec::with_capacity(total);
    let shared = Shared::new(&mut out.spare_capacity_mut()[..total]);
    (0..g.n * g.groups * blocks).into_par_iter().for_each(|task| {
        let (image, group, block) = (task / blocks / g.groups, task / blocks % g.groups, task % blocks);
        let (c0, weights) = (block * channels, &weights[group * blocks + block]);
        let cb = channels.min(cg - c0);
        let first = (image * g.c_in + group * cg + c0) * plane;
        // SAFETY: planes of one image, group and channel block belong to one task.
        let planes = init(unsafe { shared.part(first..first + cb * plane) }, T::ZERO);
        let rows = cb * taps;
        for index in 0..m.div_ceil(len) {
            let pixels = strip(m, len, index);
            let padded = pixels.len().next_multiple_of(nr);
            let dy = &dy[(image * g.c_out + group * og) * m..][..og * m];
            let mut patches = vec![T::ZERO; padded * rows];
            with_scratch(padded * steps, |panels: &mut [P]| {
                pack_patches(&pointwise, nr, (kernel.pack_rows, steps * nr), dy, &pixels, 0..1, panels);
                for panel in 0..weights.panels() {
                    let row = panel * kernel.mr;
                    let height = kernel.mr.min(rows - row);
                    for j in 0..padded / nr {
                        let c = patches[row * padded + j * nr..][..(height - 1) * padded + nr].as_mut_ptr();
                        let tile = Tile {
                            k: steps,
                            segments: 1,
                            a: weights.panel(0, panel, 0, 0, kernel.mr).as_ptr(),
                            a_segment: 0,
                            b: panels[j * nr * steps..][..nr * steps].as_ptr(),
                            b_segment: 0,
                            c,
                            ldc: padded,
                            rows: height,
                            cols: nr,
                            start: Start::Zero,
                            residual: std::ptr::null(),
                            relu: false,
                        };
                        // SAFETY: both panels hold `steps` steps, and the window of `c` was sliced above.
                        unsafe { (kernel.tile)(&tile) };
                    }
                }
                vectorised(
                    #[inline(always)]
                    || add_patches(g, &patches, padded, &pixels, planes),
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
pub(super) fn weight_grad<T: Kernels>(g: &Geometry, dy: &[T], x: &[T]) -> Vec<T> {
    if is_winograd::<T>(g) {
        return winograd::weight_grad(g, dy, x);
    }
    if is_matrix(g) {
        let (dy, x) = (MatRef::row_major(dy, g.n, g.c_out), MatRef::row_major(x, g.n, g.c_in));
        return multiplied([g.c_out, g.c_in], dy.transposed(), x);
    }
    direct_weight_grad(g, dy, x)
}

pub(super) fn direct_weight_grad<T: Kernels>(g: &Geometry, dy: &[T], x: &[T]) -> Vec<T> {
    with_kernel!(g, T, g.c_in_group(), kernel => weight_grad_by(g, kernel, dy, x))
}

fn weight_grad_by<T: Kernels, P: Scratch>(g: &Geometry, kernel: &Kernel<T, P>, dy: &[T], x: &[T]) -> Vec<T> {
    let (m, cg, og, taps, nr) = (g.pixels(), g.c_in_group(), g.c_out_group(), g.taps(), kernel.nr);
    let (k, plane) = (cg * taps, g.h * g.w);
    // Blocks of at least 288 patch rows share the transposing of the gradient.
    let channels = 288usize.div_ceil(taps).max(cg.div_ceil(TASKS)).min((MAX_ROWS / taps).max(1)).min(cg);
    let blocks = cg.div_ceil(channels);
    let channels = cg.div_ceil(blocks);
    let len = strip_len(kernel, m, channels * taps + og, TASKS);
    let strips = g.n * m.div_ceil(len);
    let shares = TASKS.div_ceil(g.groups * blocks).min(strips).max(1);
    let per_share = strips.div_ceil(shares);
    let columns = og.next_multiple_of(nr);
    let partials: Vec<Vec<T>> = (0..shares * g.groups * blocks)
        .into_par_iter()
        .map(|task| {
            let (share, group, c0) = (task / blocks / g.groups, task / blocks % g.groups, task % blocks * channels);
            let cb = channels.min(cg - c0);
            let rows = cb * taps;
            let mut sum = vec![T::ZERO; rows * og];
            for unit in share * per_share..strips.min((share + 1) * per_share) {
                let (image, pixels) = (unit / m.div_ceil(len), strip(m, len, unit % m.div_ceil(len)));
                let padded = pixels.len().next_multiple_of(nr);
                let dy = &dy[(image * g.c_out + group * og) * m..][..og * m];
                let planes = &x[(image * g.c_in + group * cg + c0) * plane..][..cb * plane];
                let row_len = padded / kernel.pair;
                // As many rows more as a tile is high: it reads whole panels.
                with_scratch(row_len * (columns + rows + kernel.mr), |scratch: &mut [P]| {
                    let (gradient, panels) = scratch.split_at_mut(row_len * columns);
                    pack_transposed(kernel, dy, m, og, &pixels, padded, gradient);
                    for chunk in chunks(g, 0..cb, &pixels) {
                        add_products(g, kernel, planes, &pixels, &chunk, cb, gradient, panels, og, &mut sum);
                    }
                });
            }
            sum
        })
        .collect();
    // [share][group][block][tap][channel][og] -> [group][og][channel][tap], 16 output channels at a time so that reads
    // are whole lines.
    let mut out = vec![T::ZERO; g.c_out * k];
    for (group, out) in out.chunks_exact_mut((og * k).max(1)).enumerate() {
        out.par_chunks_mut(16 * k).enumerate().for_each(|(tile, out)| {
            for share in 0..shares {
                for block in 0..blocks {
                    let part = &partials[(share * g.groups + group) * blocks + block];
                    let cb = part.len() / og / taps;
                    for (r, row) in part.chunks_exact(og).enumerate() {
                        let at = (block * channels + r % cb) * taps + r / cb;
                        for (j, &v) in row[tile * 16..].iter().take(out.len() / k).enumerate() {
                            out[j * k + at] += v;
                        }
                    }
                }
            }
        });
    }
    out
}

/// `sum[row, o] += sum_pixels patches[row, pixel] gradient[pixel, o]` for the rows of a chunk.
fn add_products<T: Kernels, P: Scratch>(
    g: &Geometry,
    kernel: &Kernel<T, P>,
    planes: &[T],
    pixels: &Range<usize>,
    chunk: &Chunk,
    n_channels: usize,
    gradient: &[P],
    panels: &mut [P],
    og: usize,
    sum: &mut [T],
) {
    let (nr, mr, plane) = (kernel.nr, kernel.mr, g.h * g.w);
    let (segments, row_len) = (pixels.len().div_ceil(nr), nr / kernel.pair);
    let rows = chunk.taps.len() * chunk.channels.len();
    let planes = &planes[chunk.channels.start * plane..chunk.channels.end * plane];
    let pack = (kernel.pack_along, chunk.channels.len() * row_len);
    pack_patches(g, nr, pack, planes, pixels, chunk.taps.clone(), &mut panels[..segments * rows * row_len]);
    let first = chunk.taps.start * n_channels + chunk.channels.start;
    for row in (0..rows).step_by(mr) {
        let height = mr.min(rows - row);
        for (j, gradient) in gradient.chunks_exact(segments * row_len * nr).enumerate() {
            let width = nr.min(og - j * nr);
            let a = &panels[row * row_len..];
            assert!(a.len() >= ((segments - 1) * rows + mr) * row_len, "panels of patches");
            let c = sum[(first + row) * og + j * nr..][..(height - 1) * og + width].as_mut_ptr();
            let tile = Tile {
                k: row_len,
                segments,
                a: a.as_ptr(),
                a_segment: rows * row_len,
                b: gradient.as_ptr(),
                b_segment: row_len * nr,
                c,
                ldc: og,
                rows: height,
                cols: width,
                start: Start::Add,
                residual: std::ptr::null(),
                relu: false,
            };
            // SAFETY: `a` reaches whole panels as asserted, `gradient` holds `segments` of `row_len` by `nr`, and the
            // window of `c` was sliced above; elements of `a` past the chunk's rows are initialised scratch.
            unsafe { (kernel.tile_along)(&tile) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Element;
    use crate::kernels::{bf16_kernels, halves, pair, plain_bf16_kernels};
    use crate::testing::random_f64;

    fn geometry(
        n: usize,
        c: [usize; 2],
        hw: [usize; 2],
        k: usize,
        stride: usize,
        dilation: usize,
        groups: usize,
    ) -> Geometry {
        let padding = dilation * (k - 1) / 2;
        let side = |size: usize| (size + 2 * padding - dilation * (k - 1) - 1) / stride + 1;
        Geometry {
            n,
            c_in: c[0],
            h: hw[0],
            w: hw[1],
            c_out: c[1],
            kh: k,
            kw: k,
            oh: side(hw[0]),
            ow: side(hw[1]),
            stride: [stride; 2],
            padding: [padding; 2],
            dilation: [dilation; 2],
            groups,
            precision: Precision::Bf16,
        }
    }

    fn near<T: Element>(what: &str, found: &[T], expected: &[f64], tolerance: f64) {
        assert_eq!(found.len(), expected.len(), "{what}");
        let largest = expected.iter().fold(0.0, |a: f64, b| a.max(b.abs()));
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            let apart = (found.to_f64() - expected).abs() / largest;
            assert!(apart <= tolerance, "{what}, element {i}: {found} {expected}");
        }
    }

    /// Every kernel gives what the f64 ones give for the values its panels hold.
    fn check<P: Scratch>(kernel: &Kernel<f32, P>, g: &Geometry, round: impl Fn(f32) -> f32, tolerance: f64) {
        let values = |n: usize, seed: u64| -> Vec<f32> {
            let drawn = random_f64(seed, "values", &[n]).to_vec1::<f64>().expect("a vector of f64");
            drawn.into_iter().map(|v| round(v as f32)).collect()
        };
        let wide = |values: &[f32]| -> Vec<f64> { values.iter().map(|&v| f64::from(v)).collect() };
        let x = values(g.n * g.c_in * g.h * g.w, 0);
        let w = values(g.c_out * g.c_in_group() * g.taps(), 1);
        let dy = values(g.n * g.c_out * g.pixels(), 2);
        let (x64, w64, dy64) = (wide(&x), wide(&w), wide(&dy));
        let what = |name: &str| format!("{} {name} {g:?}", kernel.name);
        let y = products(g, kernel, &x, &PackedWeight::new(g, kernel, &w), Epilogue::none());
        near(&what("forward"), &y, &forward(g, &x64, &w64, Epilogue::none(), None), tolerance);
        near(&what("input"), &input_grad_by(g, kernel, &dy, &w), &input_grad(g, &dy64, &w64), tolerance);
        near(&what("weight"), &weight_grad_by(g, kernel, &dy, &x), &weight_grad(g, &dy64, &x64), tolerance);
    }

    #[test]
    fn every_kernel_agrees_with_f64() {
        for g in [
            geometry(2, [5, 11], [13, 10], 3, 1, 1, 1),
            geometry(1, [3, 34], [17, 21], 7, 2, 1, 1),
            geometry(2, [33, 64], [9, 14], 3, 2, 1, 1),
            geometry(1, [64, 40], [20, 23], 3, 1, 6, 1),
            geometry(1, [18, 12], [9, 8], 3, 1, 2, 2),
            geometry(2, [66, 130], [7, 9], 1, 1, 1, 1),
            geometry(1, [600, 20], [6, 7], 3, 1, 4, 1),
            geometry(1, [20, 600], [6, 7], 3, 2, 1, 1),
        ] {
            // Sums in f32 of up to 5400 products.
            f32::available().iter().for_each(|kernel| check(kernel, &g, |v| v, 3e-6));
            let round = |v| halves(pair(v, 0.0))[0];
            plain_bf16_kernels().iter().chain(bf16_kernels()).for_each(|kernel| check(kernel, &g, round, 3e-6));
        }
    }
}

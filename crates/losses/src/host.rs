//! How the fused losses touch memory: element types, slices of tensors, and pieces of a map for parallel tasks.
//!
//! Every loss splits its work into pieces whose borders depend on sizes only, and combines results in a fixed order,
//! so that a value does not depend on the number of threads.

use candle_core::{CpuStorage, Layout, Storage, Tensor};
use segdistill_ops::{MatMut, MatRef, Transcendental, gemm};

/// f32 or f64: the types that the fused losses compute in.
pub(crate) trait Real: Transcendental {
    fn wide(self) -> f64;
    fn narrow(value: f64) -> Self;
    /// `dst = lhs * rhs` on the calling thread.
    fn product(dst: MatMut<'_, Self>, lhs: MatRef<'_, Self>, rhs: MatRef<'_, Self>);
}

macro_rules! real {
    ($t:ty) => {
        impl Real for $t {
            #[inline(always)]
            fn wide(self) -> f64 {
                f64::from(self)
            }
            #[inline(always)]
            fn narrow(value: f64) -> Self {
                value as $t
            }
            fn product(dst: MatMut<'_, Self>, lhs: MatRef<'_, Self>, rhs: MatRef<'_, Self>) {
                gemm(dst, lhs, rhs, 0.0, 1.0);
            }
        }
    };
}
real!(f32);
real!(f64);

/// The elements of a contiguous tensor inside a custom operation.
pub(crate) fn slice<'a, T: Real>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [T]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("the loss takes contiguous logits")
    };
    Ok(&storage.as_slice::<T>()?[start..end])
}

/// Calls `f` with the elements of a contiguous tensor on the host.
pub(crate) fn with_slice<T: Real, R>(
    tensor: &Tensor,
    f: impl FnOnce(&[T]) -> candle_core::Result<R>,
) -> candle_core::Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(cpu) => f(slice(cpu, layout)?),
        _ => candle_core::bail!("the loss computes on the host"),
    }
}

/// Cuts a map `[n, c, m]` along its pixels: one entry for each image and run of `run` pixels, holding the `c` channel
/// rows of that run, so that tasks can write their pixels without sharing.
pub(crate) fn pixel_runs<T>(map_ncm: &mut [T], c: usize, m: usize, run: usize) -> Vec<Run<'_, T>> {
    let mut runs = Vec::new();
    for (image, pixels) in map_ncm.chunks_mut(c * m).enumerate() {
        let first = runs.len();
        runs.extend((0..m).step_by(run).map(|start| Run { image, start, rows: Vec::with_capacity(c) }));
        for row in pixels.chunks_mut(m) {
            for (piece, slot) in row.chunks_mut(run).zip(&mut runs[first..]) {
                slot.rows.push(piece);
            }
        }
    }
    runs
}

/// The channel rows of consecutive pixels of one image.
pub(crate) struct Run<'a, T> {
    /// Image in the batch.
    pub(crate) image: usize,
    /// First pixel.
    pub(crate) start: usize,
    /// One slice for each channel, all of one length.
    pub(crate) rows: Vec<&'a mut [T]>,
}

impl<T> Run<'_, T> {
    /// Pixels in this run.
    pub(crate) fn len(&self) -> usize {
        self.rows[0].len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cover_a_map_once() {
        let (n, c, m) = (2, 3, 7);
        let mut map = vec![0usize; n * c * m];
        for run in &mut pixel_runs(&mut map, c, m, 3) {
            let (image, start) = (run.image, run.start);
            for (channel, row) in run.rows.iter_mut().enumerate() {
                for (i, value) in row.iter_mut().enumerate() {
                    *value += 1000 * image + 100 * channel + start + i;
                }
            }
        }
        let expected: Vec<usize> = (0..n * c * m).map(|k| 1000 * (k / (c * m)) + 100 * (k / m % c) + k % m).collect();
        assert_eq!(map, expected);
    }
}

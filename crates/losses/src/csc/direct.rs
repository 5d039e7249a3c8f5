//! CSC over pixel pairs: the similarity matrix is the squared cosine, formed tile by tile.
//!
//! Columns of the source's matrix M hold all products `f_a f_b`, so `M^T M` is the square of `F^T F`, element by
//! element. All arithmetic is f64, and the difference of the networks' cosines is summed from the differences of their
//! unit vectors: two networks that nearly agree leave small differences of numbers near 1.

use std::marker::PhantomData;

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor};
use rayon::prelude::*;
use segdistill_ops::{MatMut, MatRef};

use super::unit::Units;
use super::{LOSS, Task};
use crate::host::{Real, pixel_runs, slice, with_slice};

/// Pixels on a side of a tile: two f64 tiles stay in a core's cache.
const TILE: usize = 128;

/// The operation on the student's logits.
pub(super) struct Direct<T> {
    task: Task,
    element: PhantomData<T>,
}

impl<T: Real> Direct<T> {
    pub(super) fn new(task: Task) -> Self {
        Self { task, element: PhantomData }
    }

    /// What the tiles of each image are made from.
    fn images(&self, student: &[T]) -> candle_core::Result<Vec<Image>> {
        with_slice(&self.task.teacher, |teacher| {
            let image = |i| {
                let units = |z| Units::new(self.task.image(z, i), self.task.valid(i), 0, self.task.m);
                Image::new(units(student), &units(teacher))
            };
            Ok((0..self.task.n).into_par_iter().map(image).collect())
        })
    }

    fn forward(&self, student: &[T]) -> candle_core::Result<f64> {
        let Task { n, m, .. } = self.task;
        let images = self.images(student)?;
        let rows: Vec<(usize, usize)> =
            (0..n).flat_map(|image| (0..m).step_by(TILE).map(move |start| (image, start))).collect();
        let partial: Vec<f64> = rows
            .into_par_iter()
            .map(|(image, start)| {
                let mut tile = Tiles::new();
                let mut sums = vec![0.0; TILE];
                // The matrix is symmetric: tiles left of the diagonal repeat those right of it.
                for other in (start..m).step_by(TILE) {
                    tile.fill(&images[image], start, other);
                    let twice = if other == start { 1.0 } else { 2.0 };
                    for (students, gaps) in tile.rows() {
                        for ((sum, s), gap) in sums.iter_mut().zip(students).zip(gaps) {
                            *sum += twice * difference(*s, *gap).powi(2);
                        }
                    }
                }
                sums.iter().sum::<f64>() * self.task.scales[image]
            })
            .collect();
        Ok(partial.iter().sum())
    }

    /// `dL/df_x = 8 scale sum_y G^s_xy ((G^s_xy)^2 - (G^t_xy)^2) f_y`: 4 from the two squares, 2 since the pair `xy`
    /// comes twice.
    fn backward(&self, student: &[T], grad_loss: f64) -> candle_core::Result<Vec<T>> {
        let Task { n, c, m, .. } = self.task;
        let images = self.images(student)?;
        let mut grad = vec![T::zero(); n * c * m];
        pixel_runs(&mut grad, c, m, TILE).into_par_iter().for_each(|mut run| {
            let (start, rows) = (run.start, run.len());
            let scale = 8.0 * grad_loss * self.task.scales[run.image];
            let mut tile = Tiles::new();
            let mut grad_f = vec![0.0; c * TILE];
            let mut part = vec![0.0; c * TILE];
            let units = &images[run.image].student;
            for other in (0..m).step_by(TILE) {
                let cols = tile.fill(&images[run.image], start, other);
                for (students, gaps) in tile.rows() {
                    for (s, gap) in students.iter_mut().zip(gaps) {
                        *s *= -difference(*s, *gap);
                    }
                }
                // cy,yx->cx
                let f = MatRef { data: &units.f[other..], rows: c, cols, row_stride: m, col_stride: 1 };
                let weights = MatRef { data: &tile.student, rows: cols, cols: rows, row_stride: 1, col_stride: TILE };
                let dst = MatMut { data: &mut part, rows: c, cols: rows, row_stride: TILE, col_stride: 1 };
                f64::product(dst, f, weights);
                for (sum, value) in grad_f.iter_mut().zip(&part) {
                    *sum += value;
                }
            }
            let here = Units {
                len: rows,
                f: units.f.chunks(m).flat_map(|row| &row[start..start + rows]).copied().collect(),
                inverse_norm: units.inverse_norm[start..start + rows].to_vec(),
            };
            here.chain(&grad_f, TILE, scale, &mut run.rows);
        });
        Ok(grad)
    }
}

/// `S^t - S^s` of a pair, from the student's cosine `G^s` and `2 (G^t - G^s)`.
fn difference(student: f64, gap: f64) -> f64 {
    gap * (student + 0.25 * gap)
}

/// One image's unit vectors.
struct Image {
    student: Units,
    /// `[3c, m]`: `p = f^t + f^s`, `q = f^t - f^s`, and `p` again. With rows `0..2c` as `u` and `c..3c` as `v`,
    /// `u_x . v_y = p_x . q_y + q_x . p_y = 2 (G^t_xy - G^s_xy)`.
    stack: Vec<f64>,
}

impl Image {
    fn new(student: Units, teacher: &Units) -> Self {
        let pairs = || teacher.f.iter().zip(&student.f);
        let mut stack: Vec<f64> = pairs().map(|(t, s)| t + s).collect();
        stack.extend(pairs().map(|(t, s)| t - s));
        stack.extend_from_within(..student.f.len());
        Self { student, stack }
    }
}

/// A tile of pixel pairs, `[TILE, TILE]` each, of which `rows` and `cols` are in use.
struct Tiles {
    /// Cosines of the student.
    student: Vec<f64>,
    /// Cosines of the teacher less the student's, twice.
    gap: Vec<f64>,
    rows: usize,
    cols: usize,
}

impl Tiles {
    fn new() -> Self {
        Self { student: vec![0.0; TILE * TILE], gap: vec![0.0; TILE * TILE], rows: 0, cols: 0 }
    }

    /// Pairs of the pixels from `start` with those from `other`; returns the columns in use.
    fn fill(&mut self, image: &Image, start: usize, other: usize) -> usize {
        let m = image.student.len;
        let c = image.student.f.len() / m;
        let (rows, cols) = (TILE.min(m - start), TILE.min(m - other));
        // cx,cy->xy
        let dot = |tile, lhs, rhs, depth| {
            let lhs = MatRef { data: lhs, rows, cols: depth, row_stride: 1, col_stride: m };
            let rhs = MatRef { data: rhs, rows: depth, cols, row_stride: m, col_stride: 1 };
            f64::product(MatMut { data: tile, rows, cols, row_stride: TILE, col_stride: 1 }, lhs, rhs);
        };
        dot(&mut self.student, &image.student.f[start..], &image.student.f[other..], c);
        dot(&mut self.gap, &image.stack[start..], &image.stack[c * m + other..], 2 * c);
        (self.rows, self.cols) = (rows, cols);
        cols
    }

    /// The student's cosines and the gaps in use, row by row.
    fn rows(&mut self) -> impl Iterator<Item = (&mut [f64], &[f64])> {
        let cols = self.cols;
        let rows = self.student.chunks_mut(TILE).zip(self.gap.chunks(TILE)).take(self.rows);
        rows.map(move |(students, gaps)| (&mut students[..cols], &gaps[..cols]))
    }
}

impl<T: Real> CustomOp1 for Direct<T> {
    fn name(&self) -> &'static str {
        LOSS
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let loss = self.forward(slice(storage, layout)?)?;
        Ok((T::to_cpu_storage_owned(vec![T::narrow(loss)]), Shape::from(())))
    }

    fn bwd(&self, student: &Tensor, _loss: &Tensor, grad_loss: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let grad_loss = grad_loss.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        let grad = with_slice(student, |z| self.backward(z, grad_loss))?;
        Ok(Some(Tensor::from_vec(grad, student.dims(), &Device::Cpu)?))
    }
}

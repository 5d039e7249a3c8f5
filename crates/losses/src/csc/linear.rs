//! CSC over class pairs: time and memory linear in the number of pixels.
//!
//! Let column `x` of `Phi [k, m]` hold `f_a f_b` for `a <= b`, those with `a < b` times `sqrt(2)`; then a squared
//! cosine is `phi_x . phi_y`. With `P = Phi_t + Phi_s`, `Q = Phi_t - Phi_s` and `A = Q P^T`,
//! `sum_xy (S^t - S^s)^2 = 1/2 (<P P^T, Q Q^T> + <A, A^T>)` and
//! `dL/dPhi_s = Q Q^T P + A Q - P P^T Q - A^T P`, in which every term holds `Q` and is small when the networks nearly
//! agree, pixel by pixel.
//!
//! That is not every case in which the loss is small. Where the teacher's unit vectors are an orthogonal map of the
//! student's (two classes exchanged, say), all similarities agree and the loss is 0, but `Q` is not small, and the
//! terms cancel: what is left is their rounding, below 1e-13 in f64 and 1e-6 in f32, either side of 0, where
//! differences taken pair by pair ([`super::direct`]) keep more digits.
//!
//! `P` and `Q` exist for one block of pixels at a time. They are formed in f64, multiplied in the type of the logits,
//! and the blocks' products are summed pairwise in f64.

use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor};
use rayon::prelude::*;
use segdistill_ops::{MatMut, MatRef};

use super::unit::Units;
use super::{LOSS, Task, class_pairs};
use crate::host::{Real, pixel_runs, slice, with_slice};

/// Pixels of a block: `P`, `Q` and their product stay near a core's cache.
const BLOCK: usize = 512;
/// Blocks that one task adds up before sums are combined.
const BLOCKS_PER_TASK: usize = 4;

/// The operation on the student's logits.
pub(super) struct Linear<T> {
    task: Task,
    /// For each image the factors `[k, 2k]` of the gradient, known after the forward pass.
    factors: OnceLock<Vec<Vec<T>>>,
}

impl<T: Real> Linear<T> {
    pub(super) fn new(task: Task) -> Self {
        Self { task, factors: OnceLock::new() }
    }

    fn forward(&self, student: &[T]) -> candle_core::Result<(f64, Vec<Vec<T>>)> {
        let Task { n, c, m, .. } = self.task;
        let k = class_pairs(c);
        let images: Vec<(f64, Vec<T>)> = with_slice(&self.task.teacher, |teacher| {
            Ok((0..n)
                .into_par_iter()
                .map(|i| {
                    let [student, teacher] = [student, teacher].map(|z| self.task.image(z, i));
                    let grams = Grams::of_pixels(k, student, teacher, self.task.valid(i), 0, m);
                    (grams.sum_of_squares() * self.task.scales[i], grams.factors())
                })
                .collect())
        })?;
        Ok((images.iter().map(|(loss, _)| loss).sum(), images.into_iter().map(|(_, factors)| factors).collect()))
    }

    fn backward(&self, student: &[T], factors: &[Vec<T>], grad_loss: f64) -> candle_core::Result<Vec<T>> {
        let Task { n, c, m, .. } = self.task;
        let k = class_pairs(c);
        let mut grad = vec![T::zero(); n * c * m];
        let runs = pixel_runs(&mut grad, c, m, BLOCK);
        with_slice(&self.task.teacher, |teacher| {
            runs.into_par_iter().for_each(|mut run| {
                let (image, len) = (run.image, run.len());
                let block = Block::new(
                    k,
                    self.task.image(student, image),
                    self.task.image(teacher, image),
                    self.task.valid(image),
                    run.start,
                    len,
                );
                // dL/dPhi_s = [Q Q^T - A^T, A - P P^T] [P; Q]
                let mut grad_phi = vec![T::zero(); k * len];
                T::product(
                    MatMut { data: &mut grad_phi, rows: k, cols: len, row_stride: len, col_stride: 1 },
                    MatRef { data: &factors[image], rows: k, cols: 2 * k, row_stride: 2 * k, col_stride: 1 },
                    MatRef { data: &block.pq, rows: 2 * k, cols: len, row_stride: len, col_stride: 1 },
                );
                let grad_f = chain_pairs(&block.student, &grad_phi, c);
                block.student.chain(&grad_f, len, grad_loss * self.task.scales[image], &mut run.rows);
            });
            Ok(())
        })?;
        Ok(grad)
    }
}

/// `dL/df` from `dL/dPhi`, both one row a class or class pair.
fn chain_pairs<T: Real>(units: &Units, grad_phi: &[T], c: usize) -> Vec<f64> {
    let len = units.len;
    let mut grad_f = vec![0.0; c * len];
    let mut rows = grad_phi.chunks(len);
    for a in 0..c {
        for b in a..c {
            let row = rows.next().expect("one row for each class pair");
            let factor = if a == b { 2.0 } else { std::f64::consts::SQRT_2 };
            // For a = b one of the two equal halves of the derivative is enough, at twice the factor.
            let (f_a, f_b) = (units.row(a), units.row(b));
            for ((sum, g), f) in grad_f[a * len..][..len].iter_mut().zip(row).zip(f_b) {
                *sum += factor * g.wide() * f;
            }
            if a != b {
                for ((sum, g), f) in grad_f[b * len..][..len].iter_mut().zip(row).zip(f_a) {
                    *sum += factor * g.wide() * f;
                }
            }
        }
    }
    grad_f
}

/// `P` above `Q`, `[2k, len]`, of consecutive pixels.
struct Block<T> {
    pq: Vec<T>,
    student: Units,
}

impl<T: Real> Block<T> {
    fn new(k: usize, student: &[T], teacher: &[T], valid: &[u8], start: usize, len: usize) -> Self {
        let student = Units::new(student, valid, start, len);
        let teacher = Units::new(teacher, valid, start, len);
        let c = student.f.len() / len;
        // With p = t + s and q = t - s: t_a t_b + s_a s_b = (p_a p_b + q_a q_b) / 2, t_a t_b - s_a s_b = (p_a q_b +
        // q_a p_b) / 2, where the second keeps all digits of q.
        let both = |op: fn(f64, f64) -> f64| -> Vec<f64> {
            teacher.f.iter().zip(&student.f).map(|(t, s)| op(*t, *s)).collect()
        };
        let (sums, differences) = (both(|t, s| t + s), both(|t, s| t - s));
        let mut pq = vec![T::zero(); 2 * k * len];
        let (p, q) = pq.split_at_mut(k * len);
        let mut rows = p.chunks_mut(len).zip(q.chunks_mut(len));
        for a in 0..c {
            for b in a..c {
                let (p, q) = rows.next().expect("one row for each class pair");
                let factor = if a == b { 0.5 } else { std::f64::consts::FRAC_1_SQRT_2 };
                let [p_a, p_b] = [a, b].map(|class| &sums[class * len..][..len]);
                let [q_a, q_b] = [a, b].map(|class| &differences[class * len..][..len]);
                for i in 0..len {
                    p[i] = T::narrow(factor * (p_a[i] * p_b[i] + q_a[i] * q_b[i]));
                    q[i] = T::narrow(factor * (p_a[i] * q_b[i] + q_a[i] * p_b[i]));
                }
            }
        }
        Self { pq, student }
    }
}

/// The sums over pixels that value and gradient need.
struct Grams {
    k: usize,
    /// `[k, 2k]`: `P P^T` beside `P Q^T`.
    p_pq: Vec<f64>,
    /// `[k, k]`: `Q Q^T`.
    q_q: Vec<f64>,
}

impl Grams {
    /// Over pixels `start..end` of an image, halved down to tasks at borders that depend on sizes only.
    fn of_pixels<T: Real>(k: usize, student: &[T], teacher: &[T], valid: &[u8], start: usize, end: usize) -> Self {
        const TASK: usize = BLOCK * BLOCKS_PER_TASK;
        let n_tasks = (end - start).div_ceil(TASK);
        if n_tasks > 1 {
            let middle = start + n_tasks / 2 * TASK;
            let (mut left, right) = rayon::join(
                || Self::of_pixels(k, student, teacher, valid, start, middle),
                || Self::of_pixels(k, student, teacher, valid, middle, end),
            );
            add(&mut left.p_pq, &right.p_pq);
            add(&mut left.q_q, &right.q_q);
            return left;
        }
        let mut sums = Self { k, p_pq: vec![0.0; 2 * k * k], q_q: vec![0.0; k * k] };
        let mut product = vec![T::zero(); 2 * k * k];
        for first in (start..end).step_by(BLOCK) {
            let len = BLOCK.min(end - first);
            let block = Block::new(k, student, teacher, valid, first, len);
            let rows = |data, rows| MatRef { data, rows, cols: len, row_stride: len, col_stride: 1 };
            let columns = |data, cols| MatRef { data, rows: len, cols, row_stride: 1, col_stride: len };
            let (p, q) = block.pq.split_at(k * len);
            let dst = MatMut { data: &mut product, rows: k, cols: 2 * k, row_stride: 2 * k, col_stride: 1 };
            T::product(dst, rows(p, k), columns(&block.pq, 2 * k));
            add(&mut sums.p_pq, &product);
            let product = &mut product[..k * k];
            let dst = MatMut { data: product, rows: k, cols: k, row_stride: k, col_stride: 1 };
            T::product(dst, rows(q, k), columns(q, k));
            add(&mut sums.q_q, product);
        }
        sums
    }

    /// Elements `(i, j)` of `P P^T`, `Q Q^T`, and of `A = Q P^T` there and mirrored.
    fn at(&self, i: usize, j: usize) -> (f64, f64, f64, f64) {
        let k = self.k;
        (self.p_pq[i * 2 * k + j], self.q_q[i * k + j], self.p_pq[j * 2 * k + k + i], self.p_pq[i * 2 * k + k + j])
    }

    /// `sum_xy (S^t - S^s)^2`.
    fn sum_of_squares(&self) -> f64 {
        let mut sum = 0.0;
        for i in 0..self.k {
            for j in 0..self.k {
                let (p_p, q_q, a, a_mirrored) = self.at(i, j);
                sum += 0.5 * (p_p * q_q + a * a_mirrored);
            }
        }
        sum
    }

    /// `[Q Q^T - A^T, A - P P^T]`, `[k, 2k]`.
    fn factors<T: Real>(&self) -> Vec<T> {
        let k = self.k;
        let mut factors = vec![T::zero(); 2 * k * k];
        for (i, row) in factors.chunks_mut(2 * k).enumerate() {
            for j in 0..k {
                let (p_p, q_q, a, a_mirrored) = self.at(i, j);
                row[j] = T::narrow(q_q - a_mirrored);
                row[k + j] = T::narrow(a - p_p);
            }
        }
        factors
    }
}

fn add<T: Real>(sums: &mut [f64], values: &[T]) {
    for (sum, value) in sums.iter_mut().zip(values) {
        *sum += value.wide();
    }
}

impl<T: Real> CustomOp1 for Linear<T> {
    fn name(&self) -> &'static str {
        LOSS
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (loss, factors) = self.forward(slice(storage, layout)?)?;
        // A second forward of the same operation cannot happen, and would store the same numbers.
        let _ = self.factors.set(factors);
        Ok((T::to_cpu_storage_owned(vec![T::narrow(loss)]), Shape::from(())))
    }

    fn bwd(&self, student: &Tensor, _loss: &Tensor, grad_loss: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let grad_loss = grad_loss.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        let factors = self.factors.get().expect("the forward pass stored its factors");
        let grad = with_slice(student, |z| self.backward(z, factors, grad_loss))?;
        Ok(Some(Tensor::from_vec(grad, student.dims(), &Device::Cpu)?))
    }
}

//! Multi-head attention.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, D, Layout, Shape, Tensor, WithDType};
use rayon::prelude::*;

use crate::cpu::{Element, Shared, check_float, for_float, init, slice_of, vectorised, with_scratch, with_slice};
use crate::error::{OpsError, Result};
use crate::gemm::{MatMut, MatRef, RawMat, gemm, gemm_raw};
use crate::graph;
use crate::math::Transcendental;

const NAME: &str = "attention";
/// Queries of a task's block: its weights stay in a cache.
const ROWS: usize = 64;
/// Fewest tasks worth starting; fixed, so that no result depends on the threads.
const TASKS: usize = 8;

/// Multi-head attention: `softmax(q k^T / sqrt(d / n_heads)) v` for each head, the heads side by side in the last
/// dimension.
///
/// The weights, `n_heads * l * m` an image, are never stored: the backward pass forms them again.
///
/// # Shapes
/// - `q_nld`: `[n, l, d]`, f32 or f64; `k_nmd`, `v_nmd`: `[n, m, d]`, m being smaller than l where keys are pooled;
///   head `i` reads elements `i d / n_heads ..` of the last dimension
/// - returns `[n, l, d]`
/// # Gradient
/// Exact, for queries, keys and values.
/// # Errors
/// `Shape` unless all three are of rank 3, fit one another and no axis is empty; `Config` when `n_heads` is 0 or does not
/// divide `d`, for mixed or other element types, or a device without kernels.
/// # Source
/// Vaswani et al. 2017, section 3.2; PyTorch `torch.nn.functional.scaled_dot_product_attention`.
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// // One key: every query gets its value.
/// let q = Tensor::new(&[[[1f32, 2.0], [3.0, 4.0]]], &Device::Cpu)?;
/// let k = Tensor::new(&[[[5f32, 6.0]]], &Device::Cpu)?;
/// let v = Tensor::new(&[[[7f32, 8.0]]], &Device::Cpu)?;
/// let y = segdistill_ops::attention(&q, &k, &v, 1)?;
/// assert_eq!(y.to_vec3::<f32>()?, [[[7.0, 8.0], [7.0, 8.0]]]);
/// # Ok::<(), segdistill_ops::OpsError>(())
/// ```
pub fn attention(q_nld: &Tensor, k_nmd: &Tensor, v_nmd: &Tensor, n_heads: usize) -> Result<Tensor> {
    check_float(NAME, &[q_nld, k_nmd, v_nmd])?;
    let (&[n, l, d], &[n_keys, m, d_keys]) = (q_nld.dims(), k_nmd.dims()) else {
        return Err(OpsError::shape(
            NAME,
            format!("q {:?}, k {:?}", q_nld.dims(), k_nmd.dims()),
            "q [n, l, d], k [n, m, d]",
            "tokens in the second dimension, their elements in the third",
        ));
    };
    if v_nmd.dims() != k_nmd.dims() || n != n_keys || d != d_keys || n * l * m * d == 0 {
        return Err(OpsError::shape(
            NAME,
            format!("k {:?} and v {:?} for q {:?}", k_nmd.dims(), v_nmd.dims(), q_nld.dims()),
            format!("k and v [{n}, m, {d}], no axis empty"),
            "one batch and one width for all three, a value for each key",
        ));
    }
    if n_heads == 0 || d % n_heads != 0 {
        return Err(OpsError::config(
            format!("{NAME}: {n_heads} heads for {d} elements, expected a divisor"),
            "choose a width that the heads share evenly",
        ));
    }
    let op = Attention { n, l, m, d, heads: n_heads };
    if !q_nld.device().is_cpu() {
        return op.composed(q_nld, k_nmd, v_nmd);
    }
    Ok(graph::apply3(&q_nld.contiguous()?, &k_nmd.contiguous()?, &v_nmd.contiguous()?, op)?)
}

#[derive(Clone, Copy)]
struct Attention {
    n: usize,
    l: usize,
    m: usize,
    d: usize,
    heads: usize,
}

/// What a task works on: some queries of one head of one image.
struct Part {
    /// First element of the head's first query, and of its first key.
    query: usize,
    key: usize,
    /// Queries.
    rows: std::ops::Range<usize>,
}

impl Attention {
    /// Of operations of candle whose gradients are right.
    fn composed(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let split =
            |t: &Tensor, len: usize| t.reshape((self.n, len, self.heads, self.width()))?.transpose(1, 2)?.contiguous();
        let (q, k, v) = (split(q, self.l)?, split(k, self.m)?, split(v, self.m)?);
        let scores = (q.matmul(&k.t()?.contiguous()?)? * self.scale())?;
        let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        Ok(weights.matmul(&v)?.transpose(1, 2)?.contiguous()?.reshape((self.n, self.l, self.d))?)
    }

    /// Elements of a head.
    fn width(&self) -> usize {
        self.d / self.heads
    }

    fn scale(&self) -> f64 {
        1.0 / (self.width() as f64).sqrt()
    }

    /// Parts that a head's queries are dealt out to.
    fn shares(&self) -> usize {
        TASKS.div_ceil(self.n * self.heads).min(self.l.div_ceil(ROWS))
    }

    fn part(&self, task: usize) -> Part {
        let shares = self.shares();
        let per_share = self.l.div_ceil(shares);
        let (share, head, image) = (task % shares, task / shares % self.heads, task / shares / self.heads);
        let (start, end) = (share * per_share, (share + 1) * per_share);
        Part {
            query: image * self.l * self.d + head * self.width(),
            key: image * self.m * self.d + head * self.width(),
            rows: start.min(self.l)..end.min(self.l),
        }
    }

    fn n_tasks(&self) -> usize {
        self.n * self.heads * self.shares()
    }

    /// A head's rows in `[.., d]`, from element `at` on.
    fn head<'a, T>(&self, values: &'a [T], at: usize, rows: usize) -> MatRef<'a, T> {
        MatRef { data: &values[at..], rows, cols: self.width(), row_stride: self.d, col_stride: 1 }
    }

    /// `softmax(q k^T scale)` of a block of queries, `[rows, m]`.
    fn weights<T: Transcendental>(&self, q: MatRef<'_, T>, k: MatRef<'_, T>, out: &mut [T]) {
        gemm(MatMut::row_major(out, q.rows, self.m), q, k.transposed(), T::ZERO, T::from_f64(self.scale()));
        vectorised(
            #[inline(always)]
            || {
                for row in out.chunks_exact_mut(self.m) {
                    let top = row.iter().fold(row[0], |top, &v| if v > top { v } else { top });
                    row.iter_mut().for_each(|v| *v = (*v - top).exp());
                    let total = row.iter().fold(0.0, |sum, v| sum + v.to_f64());
                    let share = T::from_f64(1.0 / total);
                    row.iter_mut().for_each(|v| *v *= share);
                }
            },
        );
    }

    fn forward<T: Transcendental>(&self, q: &[T], k: &[T], v: &[T]) -> Vec<T> {
        let total = self.n * self.l * self.d;
        let mut out: Vec<T> = vec![T::ZERO; total];
        let shared = Shared::over(&mut out);
        (0..self.n_tasks()).into_par_iter().for_each(|task| {
            let Part { query, key, rows } = self.part(task);
            let (k, v) = (self.head(k, key, self.m), self.head(v, key, self.m));
            for start in rows.clone().step_by(ROWS) {
                let len = ROWS.min(rows.end - start);
                let at = query + start * self.d;
                with_scratch(len * self.m, |weights: &mut [T]| {
                    self.weights(self.head(q, at, len), k, weights);
                    let window = self.window(&shared, at, len);
                    // SAFETY: the window lies inside `out`, which is initialised; queries and head are this task's.
                    unsafe { gemm_raw(window, MatRef::row_major(weights, len, self.m), v, T::ZERO, T::ONE) };
                });
            }
        });
        out
    }

    /// Where the head's rows of an `[.., d]` output lie.
    fn window<T>(&self, shared: &Shared<'_, T>, at: usize, rows: usize) -> RawMat<T> {
        let start = shared.pointer(at, (rows - 1) * self.d + self.width());
        RawMat { start, row_stride: self.d, col_stride: 1 }
    }

    /// Gradients of q, k and v. With the weights `P` and `G` the gradient of the result: `dV = P^T G`, `dP = G V^T`,
    /// `dS = P (dP - rowsum(P dP))`, `dQ = scale dS K`, `dK = scale dS^T Q`.
    fn backward<T: Transcendental>(&self, q: &[T], k: &[T], v: &[T], grad: &[T]) -> [Vec<T>; 3] {
        let (width, m) = (self.width(), self.m);
        let mut dq: Vec<T> = vec![T::ZERO; q.len()];
        let shared = Shared::over(&mut dq);
        let scale = T::from_f64(self.scale());
        let parts: Vec<Vec<T>> = (0..self.n_tasks())
            .into_par_iter()
            .map(|task| {
                let Part { query, key, rows } = self.part(task);
                let (k, v) = (self.head(k, key, m), self.head(v, key, m));
                // dK, then dV, of the task's queries.
                let mut sums = vec![T::ZERO; 2 * m * width];
                let (dk, dv) = sums.split_at_mut(m * width);
                for start in rows.clone().step_by(ROWS) {
                    let len = ROWS.min(rows.end - start);
                    let at = query + start * self.d;
                    let (q, g) = (self.head(q, at, len), self.head(grad, at, len));
                    with_scratch(2 * len * m, |scratch: &mut [T]| {
                        let (weights, ds) = scratch.split_at_mut(len * m);
                        self.weights(q, k, weights);
                        let transposed = |of| MatRef::row_major(of, len, m).transposed();
                        gemm(MatMut::row_major(dv, m, width), transposed(weights), g, T::ONE, T::ONE);
                        gemm(MatMut::row_major(ds, len, m), g, v.transposed(), T::ZERO, T::ONE);
                        vectorised(
                            #[inline(always)]
                            || {
                                for (p, ds) in weights.chunks_exact(m).zip(ds.chunks_exact_mut(m)) {
                                    let [sum] = crate::planes::block_sums([p, &*ds], |[p, d]| [p * d]);
                                    let sum = T::from_f64(sum);
                                    ds.iter_mut().zip(p).for_each(|(ds, &p)| *ds = p * (*ds - sum));
                                }
                            },
                        );
                        let window = self.window(&shared, at, len);
                        // SAFETY: the window lies inside `dq`, which is initialised; queries and head are this task's.
                        unsafe { gemm_raw(window, MatRef::row_major(ds, len, m), k, T::ZERO, scale) };
                        gemm(MatMut::row_major(dk, m, width), transposed(ds), q, T::ONE, scale);
                    });
                }
                sums
            })
            .collect();
        let [dk, dv] = [0, m * width].map(|from| self.gathered(&parts, from));
        [dq, dk, dv]
    }

    /// `[n, m, d]` from the shares of every head, `[m, width]` each from element `from` on; shares are added in order.
    fn gathered<T: Element>(&self, parts: &[Vec<T>], from: usize) -> Vec<T> {
        let (width, shares) = (self.width(), self.shares());
        let mut out = Vec::with_capacity(self.n * self.m * self.d);
        let rows = &mut out.spare_capacity_mut()[..self.n * self.m * self.d];
        rows.par_chunks_mut(self.d).enumerate().for_each(|(row, out)| {
            let (image, key) = (row / self.m, row % self.m);
            let out = init(out, T::ZERO);
            for (head, out) in out.chunks_exact_mut(width).enumerate() {
                for part in &parts[(image * self.heads + head) * shares..][..shares] {
                    out.iter_mut().zip(&part[from + key * width..]).for_each(|(sum, &v)| *sum += v);
                }
            }
        });
        // SAFETY: `init` wrote every row.
        unsafe { out.set_len(self.n * self.m * self.d) };
        out
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        lq: &Layout,
        k: &CpuStorage,
        lk: &Layout,
        v: &CpuStorage,
        lv: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let out = for_float!(NAME, q.dtype(), T => {
            let (k, v) = (slice_of::<T>(NAME, k, lk)?, slice_of::<T>(NAME, v, lv)?);
            Ok(T::to_cpu_storage_owned(self.forward(slice_of::<T>(NAME, q, lq)?, k, v)))
        })?;
        Ok((out, lq.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        for_float!(NAME, grad.dtype(), T => {
            let [dq, dk, dv] = with_slice::<T, _>(NAME, q, |q| with_slice::<T, _>(NAME, k, |k| {
                with_slice::<T, _>(NAME, v, |v| with_slice::<T, _>(NAME, &grad, |g| Ok(self.backward(q, k, v, g))))
            }))?;
            let tensor = |values: Vec<T>, of: &Tensor| {
                of.track_op().then(|| Tensor::from_vec(values, of.shape(), of.device())).transpose()
            };
            Ok((tensor(dq, q)?, tensor(dk, k)?, tensor(dv, v)?))
        })
    }
}

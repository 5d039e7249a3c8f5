//! Linear layers over the last dimension.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Shape, Tensor, WithDType};
use rayon::prelude::*;

use crate::cpu::{Element, check_bias, check_float, for_float, par_chunks, slice_of, vectorised, with_slice};
use crate::error::{OpsError, Result};
use crate::gemm::{MatMut, MatRef, gemm};
use crate::graph;

const NAME: &str = "linear";
/// Rows of a task.
const ROWS: usize = 128;
/// Fewest tasks of a weight's gradient, and the output features of one; fixed, so that no result depends on the threads.
const TASKS: usize = 8;
const FEATURES: usize = 128;

/// `y = x W^T + b` over the last dimension.
///
/// # Shapes
/// - `x`: `[.., d_in]`, f32 or f64; `weight`: `[d_out, d_in]`; `bias`: `[d_out]`
/// - returns `[.., d_out]`
/// # Gradient
/// Exact: `dx = g W`, `dW = g^T x`, `db` the sum of `g` over rows. Arguments that no variable stands behind get none, and
/// cost none.
/// # Errors
/// `Shape` when `x` has no dimension, an axis is empty, or weight or bias do not fit; `Config` for mixed or other element
/// types, or a device without kernels.
/// # Source
/// PyTorch `torch.nn.functional.linear`.
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// let x = Tensor::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu)?;
/// let weight = Tensor::new(&[[1f32, 10.0]], &Device::Cpu)?;
/// assert_eq!(segdistill_ops::linear(&x, &weight, None)?.to_vec2::<f32>()?, [[21.0], [43.0]]);
/// # Ok::<(), segdistill_ops::OpsError>(())
/// ```
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let given: Vec<&Tensor> = [Some(x), Some(weight), bias].into_iter().flatten().collect();
    check_float(NAME, &given)?;
    let (Some((&d_in, outer)), &[d_out, d_weight]) = (x.dims().split_last(), weight.dims()) else {
        return Err(OpsError::shape(
            NAME,
            format!("x {:?}, weight {:?}", x.dims(), weight.dims()),
            "x [.., d_in], weight [d_out, d_in]",
            "the weight is a matrix, one row for each output feature",
        ));
    };
    let rows: usize = outer.iter().product();
    if d_in != d_weight || rows * d_in * d_out == 0 {
        return Err(OpsError::shape(
            NAME,
            format!("weight {:?} for x {:?}", weight.dims(), x.dims()),
            format!("weight [d_out, {d_in}], no axis empty"),
            "the weight's second size is the last one of x",
        ));
    }
    check_bias(NAME, bias, d_out)?;
    let shape = [outer, &[d_out]].concat();
    if !x.device().is_cpu() {
        // candle's product and its gradients are right and fast there.
        let y = x.contiguous()?.reshape((rows, d_in))?.matmul(&weight.t()?)?;
        let y = bias.map_or(Ok(y.clone()), |bias| y.broadcast_add(bias))?;
        return Ok(y.reshape(shape)?);
    }
    let op = Linear { rows, d_in, d_out, shape };
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    Ok(match bias {
        None => graph::apply2(&x, &weight, op)?,
        Some(bias) => graph::apply3(&x, &weight, &bias.contiguous()?, op)?,
    })
}

struct Linear {
    rows: usize,
    d_in: usize,
    d_out: usize,
    shape: Vec<usize>,
}

impl Linear {
    /// `[rows, d_out]`
    fn forward<T: Element>(&self, x: &[T], weight: &[T], bias: Option<&[T]>) -> Vec<T> {
        let (k, n) = (self.d_in, self.d_out);
        par_chunks(self.rows * n, ROWS * n, |task, out| {
            let rows = out.len() / n;
            let x = MatRef::row_major(&x[task * ROWS * k..][..rows * k], rows, k);
            let alpha = match bias {
                None => T::ZERO,
                Some(bias) => {
                    out.chunks_exact_mut(n).for_each(|row| row.copy_from_slice(bias));
                    T::ONE
                }
            };
            gemm(MatMut::row_major(out, rows, n), x, MatRef::row_major(weight, n, k).transposed(), alpha, T::ONE);
        })
    }

    /// `[rows, d_in]`
    fn input_grad<T: Element>(&self, grad: &[T], weight: &[T]) -> Vec<T> {
        let (k, n) = (self.d_in, self.d_out);
        par_chunks(self.rows * k, ROWS * k, |task, out| {
            let rows = out.len() / k;
            let grad = MatRef::row_major(&grad[task * ROWS * n..][..rows * n], rows, n);
            gemm(MatMut::row_major(out, rows, k), grad, MatRef::row_major(weight, n, k), T::ZERO, T::ONE);
        })
    }

    /// `[d_out, d_in]`: a task owns some output features, and a share of the rows where there are few; the shares are
    /// added up in order.
    fn weight_grad<T: Element>(&self, grad: &[T], x: &[T]) -> Vec<T> {
        let (k, n) = (self.d_in, self.d_out);
        let blocks = n.div_ceil(FEATURES);
        let shares = TASKS.div_ceil(blocks).min(self.rows.div_ceil(ROWS));
        let per_share = self.rows.div_ceil(shares);
        let product = |block: usize, share: usize, out: &mut [T], alpha: T| {
            let first = block * FEATURES;
            let (start, end) = ((share * per_share).min(self.rows), ((share + 1) * per_share).min(self.rows));
            let (features, rows) = (out.len() / k, end - start);
            let grad = &grad[start * n + first.min(rows * n)..];
            let grad = MatRef { data: grad, rows: features, cols: rows, row_stride: 1, col_stride: n };
            let x = MatRef::row_major(&x[start * k..end * k], rows, k);
            gemm(MatMut::row_major(out, features, k), grad, x, alpha, T::ONE);
        };
        if shares == 1 {
            return par_chunks(n * k, FEATURES * k, |block, out| product(block, 0, out, T::ZERO));
        }
        let parts = par_chunks(shares * n * k, n * k, |share, out| {
            out.par_chunks_mut(FEATURES * k).enumerate().for_each(|(block, out)| product(block, share, out, T::ZERO));
        });
        par_chunks(n * k, ROWS * k, |task, out| {
            vectorised(|| {
                for part in parts.chunks_exact(n * k) {
                    out.iter_mut().zip(&part[task * ROWS * k..]).for_each(|(sum, &v)| *sum += v);
                }
            });
        })
    }

    fn backward(&self, x: &Tensor, w: &Tensor, grad: &Tensor) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        for_float!(NAME, grad.dtype(), T => with_slice::<T, _>(NAME, grad, |g| {
            let dx = match x.track_op() {
                true => Some(with_slice::<T, _>(NAME, w, |w| {
                    Tensor::from_vec(self.input_grad(g, w), x.shape(), x.device())
                })?),
                false => None,
            };
            let dw = match w.track_op() {
                true => Some(with_slice::<T, _>(NAME, x, |x| {
                    Tensor::from_vec(self.weight_grad(g, x), w.shape(), w.device())
                })?),
                false => None,
            };
            Ok((dx, dw))
        }))
    }
}

/// Sums over the rows of `[rows, d]`: blocks of rows in f64, added up in order.
pub(crate) fn column_sums<T: Element>(values: &[T], d: usize) -> Vec<T> {
    let partial: Vec<Vec<f64>> = values
        .par_chunks(ROWS * d)
        .map(|rows| {
            let mut sums = vec![0.0; d];
            vectorised(|| {
                for row in rows.chunks_exact(d) {
                    sums.iter_mut().zip(row).for_each(|(sum, v)| *sum += v.to_f64());
                }
            });
            sums
        })
        .collect();
    add_up(&partial, d)
}

/// The sum of vectors of length `d`, in order.
pub(crate) fn add_up<T: Element>(partial: &[Vec<f64>], d: usize) -> Vec<T> {
    let mut total = vec![0.0; d];
    for sums in partial {
        total.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
    }
    total.into_iter().map(T::from_f64).collect()
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let out = for_float!(NAME, x.dtype(), T => {
            let (x, w) = (slice_of::<T>(NAME, x, lx)?, slice_of::<T>(NAME, w, lw)?);
            Ok(T::to_cpu_storage_owned(self.forward(x, w, None)))
        })?;
        Ok((out, Shape::from_dims(&self.shape)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        self.backward(x, w, &grad.contiguous()?)
    }
}

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let out = for_float!(NAME, x.dtype(), T => {
            let (x, w) = (slice_of::<T>(NAME, x, lx)?, slice_of::<T>(NAME, w, lw)?);
            Ok(T::to_cpu_storage_owned(self.forward(x, w, Some(slice_of::<T>(NAME, b, lb)?))))
        })?;
        Ok((out, Shape::from_dims(&self.shape)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let (dx, dw) = self.backward(x, w, &grad)?;
        let db = match b.track_op() {
            true => Some(for_float!(NAME, grad.dtype(), T => with_slice::<T, _>(NAME, &grad, |g| {
                Tensor::from_vec(column_sums(g, self.d_out), b.shape(), b.device())
            }))?),
            false => None,
        };
        Ok((dx, dw, db))
    }
}

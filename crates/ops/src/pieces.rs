//! Sums and parts of tensors as operations that [`crate::graph`] records.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Shape, Tensor, WithDType};

use crate::cpu::{Element, check_float, for_float, par_chunks, slice_of, with_slice};
use crate::error::{OpsError, Result};
use crate::graph;
use crate::planes::CHUNK;

/// `a + b`, element by element.
///
/// # Shapes
/// Both of one shape, any, f32 or f64; the result too
/// # Gradient
/// That of the result, for both.
/// # Errors
/// `Shape` when the shapes differ; `Config` for mixed or other element types, or a device without kernels.
/// # Source
/// The skip of He et al. 2016. candle's own `+` gives the same; this one is recorded.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let op = "add";
    check_float(op, &[a, b])?;
    if a.dims() != b.dims() {
        return Err(OpsError::shape(
            op,
            format!("{:?} and {:?}", a.dims(), b.dims()),
            "one shape",
            "resize or project one of them first",
        ));
    }
    if !a.device().is_cpu() {
        return Ok((a + b)?);
    }
    Ok(graph::apply2(&a.contiguous()?, &b.contiguous()?, Add)?)
}

/// The elements `start..start + len` of the last axis, copied.
///
/// # Shapes
/// - `x`: `[.., d]`, f32 or f64
/// - returns `[.., len]`, contiguous
/// # Gradient
/// That of the result where it was taken from, 0 elsewhere.
/// # Errors
/// `Shape` unless `start + len` is at most `d`; `Config` for another element type or a device without kernels.
/// # Source
/// PyTorch `x[..., start:start + len].contiguous()`.
pub fn columns(x: &Tensor, start: usize, len: usize) -> Result<Tensor> {
    let op = "columns";
    check_float(op, &[x])?;
    match x.dims().last() {
        Some(&d) if start.checked_add(len).is_some_and(|end| end <= d) => {}
        _ => {
            return Err(OpsError::shape(
                op,
                format!("elements {start}..{start}+{len} of {:?}", x.dims()),
                "a part of the last axis",
                "choose a smaller part",
            ));
        }
    }
    if !x.device().is_cpu() || x.elem_count() == 0 {
        return Ok(x.narrow(x.rank() - 1, start, len)?.contiguous()?);
    }
    Ok(graph::apply1(&x.contiguous()?, Columns { start, len })?)
}

struct Add;

impl CustomOp2 for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        la: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        for_float!(self.name(), a.dtype(), T => {
            let sums = sum(slice_of::<T>(self.name(), a, la)?, slice_of::<T>(self.name(), b, lb)?);
            Ok((T::to_cpu_storage_owned(sums), la.shape().clone()))
        })
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        _result: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((a.track_op().then(|| grad.clone()), b.track_op().then(|| grad.clone())))
    }
}

/// `a + b` on every core.
pub(crate) fn sum<T: Element>(a: &[T], b: &[T]) -> Vec<T> {
    par_chunks(a.len(), CHUNK, |chunk, out| {
        let from = chunk * CHUNK;
        for ((out, &a), &b) in out.iter_mut().zip(&a[from..]).zip(&b[from..]) {
            *out = a + b;
        }
    })
}

struct Columns {
    start: usize,
    len: usize,
}

impl CustomOp1 for Columns {
    fn name(&self) -> &'static str {
        "columns"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let mut dims = layout.dims().to_vec();
        let (d, rows) = (dims.pop().unwrap_or(1), layout.shape().elem_count() / layout.dims().last().unwrap_or(&1));
        dims.push(self.len);
        for_float!(self.name(), x.dtype(), T => {
            let x = slice_of::<T>(self.name(), x, layout)?;
            let out = par_chunks(rows * self.len, self.len, |row, out| {
                out.copy_from_slice(&x[row * d + self.start..][..self.len]);
            });
            Ok((T::to_cpu_storage_owned(out), Shape::from(dims)))
        })
    }

    fn bwd(&self, x: &Tensor, _result: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let (grad, d) = (grad.contiguous()?, x.dims()[x.rank() - 1]);
        for_float!(self.name(), grad.dtype(), T => {
            let dx = with_slice::<T, _>(self.name(), &grad, |g| {
                Ok(par_chunks(x.elem_count(), d, |row, out: &mut [T]| {
                    out[self.start..][..self.len].copy_from_slice(&g[row * self.len..][..self.len]);
                }))
            })?;
            Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, check_gradient, devices, random_f64};

    #[test]
    fn both_are_what_candle_gives() -> Result<()> {
        for device in devices() {
            let [a, b] = ["a", "b"].map(|name| random_f64(0, name, &[3, 5, 70]).to_device(&device).unwrap());
            assert_close(&add(&a, &b)?, &(&a + &b)?, 0.0, "the same sums");
            for (start, len) in [(0, 70), (0, 3), (69, 1), (20, 31)] {
                assert_close(&columns(&a, start, len)?, &a.narrow(2, start, len)?.contiguous()?, 0.0, "a copy");
            }
            assert_eq!(columns(&a, 4, 0)?.dims(), [3, 5, 0]);
        }
        Ok(())
    }

    #[test]
    fn gradients_equal_central_differences() -> Result<()> {
        let inputs = ["a", "b"].map(|name| random_f64(0, name, &[2, 3, 4]));
        check_gradient(&inputs, |x| Ok(add(&x[0], &x[1])?.sqr()?), 24, 1e-8)?;
        check_gradient(&inputs[..1], |x| Ok(columns(&x[0], 1, 2)?.sqr()?), 24, 1e-8)?;
        // One tensor twice: both gradients count.
        check_gradient(&inputs[..1], |x| add(&x[0], &x[0]), 24, 1e-8)
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (a, b) = (random_f64(0, "a", &[2, 3]), random_f64(0, "b", &[3, 2]));
        assert!(matches!(add(&a, &b), Err(OpsError::Shape { .. })));
        for (start, len) in [(0, 4), (3, 1), (usize::MAX, 2)] {
            assert!(matches!(columns(&a, start, len), Err(OpsError::Shape { .. })));
        }
        assert!(matches!(columns(&random_f64(0, "a", &[]), 0, 1), Err(OpsError::Shape { .. })));
    }
}

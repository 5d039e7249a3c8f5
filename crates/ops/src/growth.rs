//! Maps that grow by channels, layer upon layer, in memory that grows no faster than they do.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp2, Layout, Shape, Storage, Tensor, Var};
use std::sync::{Mutex, PoisonError};

use crate::error::{OpsError, Result};
use crate::graph;
use crate::planes::dims_nchw;

const NAME: &str = "grow_channels";

/// Which time a step of [`grow_channels`] is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// For its value: what it moves beside (running statistics) is moved now.
    Value,
    /// For its gradient, in the backward pass: from the same arguments, and nothing beside is moved.
    Gradient,
}

/// A step of [`grow_channels`]: maps `[n, c_i, h, w]` and its own flat parameters to maps `[n, g, h, w]`.
pub type Step = Box<dyn Fn(&Tensor, &Tensor, Pass) -> Result<Tensor> + Send + Sync>;

/// Joins to a map what each step makes of everything before it: `x_{i+1} = [x_i, step_i(x_i, params_i)]`, along
/// channels.
///
/// The graph keeps the last map alone, of which every `x_i` is a part. A step's inner values are dropped as soon as its
/// result is there and computed again in the backward pass, one step at a time. So memory grows linearly with the
/// number of steps, where the plain composition keeps every `x_i` and all that is made of it; the price is one more
/// forward pass of each step.
///
/// # Shapes
/// - `x_nchw`: `[n, c_0, h, w]`; `params[i]`: `[p_i]`, of the same type; as many as `steps`, at least one
/// - returns `[n, c_0 + sum g_i, h, w]`
/// # Gradient
/// That of the composition, to `x_nchw` and every `params[i]`. A step must be the same function in both passes.
/// # Errors
/// `Shape` when a map is not of rank 4 or a step leaves the grid; `Config` when steps and parameters are not as many;
/// else what a step refuses.
/// # Source
/// Chen et al. 2016 (Training deep nets with sublinear memory cost); Pleiss et al. 2017 (Memory-efficient
/// implementation of DenseNets), who keep the joined maps in shared memory.
/// # Example
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use segdistill_ops::{Step, grow_channels};
/// # fn main() -> segdistill_ops::Result<()> {
/// // Each step gives one channel, the sum of all before it times its parameter.
/// let step = || -> Step {
///     Box::new(|x, p, _pass| Ok(x.sum_keepdim(1)?.broadcast_mul(&p.reshape((1, 1, 1, 1))?)?))
/// };
/// let x = Var::new(&[[[[1f32]], [[2.0]]]], &Device::Cpu)?;
/// let params = [Tensor::new(&[10f32], &Device::Cpu)?, Tensor::new(&[0.5f32], &Device::Cpu)?];
/// let y = grow_channels(&x, &params, vec![step(), step()])?;
/// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [1.0, 2.0, 30.0, 16.5]);
/// # Ok(())
/// # }
/// ```
pub fn grow_channels(x_nchw: &Tensor, params: &[Tensor], steps: Vec<Step>) -> Result<Tensor> {
    let [n, _, h, w] = dims_nchw(NAME, x_nchw)?;
    if params.len() != steps.len() || steps.is_empty() {
        let what = format!("{NAME}: {} steps and {} parameters", steps.len(), params.len());
        return Err(OpsError::config(what, "give each step its own flat parameters, and at least one step"));
    }
    let mut maps_nchw = x_nchw.detach().contiguous()?;
    let mut ends = Vec::with_capacity(steps.len());
    let mut start = 0;
    for (step, params) in steps.iter().zip(params) {
        let grown = step(&maps_nchw, &params.detach(), Pass::Value)?;
        let grid = dims_nchw(NAME, &grown)?;
        if [grid[0], grid[2], grid[3]] != [n, h, w] {
            return Err(OpsError::shape(
                NAME,
                format!("a step made {grid:?} of {:?}", maps_nchw.dims()),
                format!("[{n}, _, {h}, {w}]"),
                "a step keeps batch and grid",
            ));
        }
        let c = maps_nchw.dims()[1];
        start += params.elem_count();
        ends.push(End { channels: c, params: start });
        maps_nchw = crate::concat_channels(&[&maps_nchw, &grown.detach()])?;
    }
    let flat = Tensor::cat(&params.iter().collect::<Vec<_>>(), 0)?;
    let op = Growth { steps, ends, value: Mutex::new(Some(maps_nchw)) };
    Ok(graph::apply2(&x_nchw.contiguous()?, &flat.contiguous()?, op)?)
}

/// Where a step's arguments end: it reads the first `channels`, and parameters up to `params`.
struct End {
    channels: usize,
    params: usize,
}

struct Growth {
    steps: Vec<Step>,
    ends: Vec<End>,
    /// Computed before the operation is formed; taken by its forward pass.
    value: Mutex<Option<Tensor>>,
}

impl Growth {
    fn take(&self) -> candle_core::Result<Tensor> {
        let value = self.value.lock().unwrap_or_else(PoisonError::into_inner).take();
        value.ok_or_else(|| candle_core::Error::Msg(format!("{NAME}: its value was taken before")).bt())
    }

    /// Gradients of step `i` by its map and parameters, from that of what it gave.
    fn step_back(&self, i: usize, y: &Tensor, flat: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Tensor)> {
        let End { channels, params: end } = self.ends[i];
        let start = if i == 0 { 0 } else { self.ends[i - 1].params };
        let x = Var::from_tensor(&y.narrow(1, 0, channels)?.force_contiguous()?)?;
        let params = Var::from_tensor(&flat.narrow(0, start, end - start)?.force_contiguous()?)?;
        let grown = self.steps[i](&x, &params, Pass::Gradient)?;
        let mut gradients = (grown * grad)?.sum_all()?.backward()?;
        let of_params = match gradients.remove(&params) {
            Some(gradient) => gradient,
            None => params.zeros_like()?,
        };
        Ok((gradients.remove(&x), of_params))
    }
}

impl CustomOp2 for Growth {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        _x: &CpuStorage,
        _lx: &Layout,
        _params: &CpuStorage,
        _lp: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let value = self.take()?;
        let (storage, layout) = value.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) => Ok((storage.clone(), layout.shape().clone())),
            _ => Err(candle_core::Error::Msg(format!("{NAME}: a step left the device")).bt()),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _x: &CudaStorage,
        _lx: &Layout,
        _params: &CudaStorage,
        _lp: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        let value = self.take()?;
        let (storage, layout) = value.storage_and_layout();
        match &*storage {
            Storage::Cuda(storage) => Ok((storage.try_clone(layout)?, layout.shape().clone())),
            _ => Err(candle_core::Error::Msg(format!("{NAME}: a step left the device")).bt()),
        }
    }

    fn bwd(
        &self,
        x: &Tensor,
        flat: &Tensor,
        y: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let (y, flat) = (y.detach(), flat.detach());
        let mut grad = grad.contiguous()?;
        let mut of_params = Vec::with_capacity(self.steps.len());
        for (i, end) in self.ends.iter().enumerate().rev() {
            let grown = grad.narrow(1, end.channels, grad.dims()[1] - end.channels)?.contiguous()?;
            let before = grad.narrow(1, 0, end.channels)?.contiguous()?;
            let (of_x, params) = self.step_back(i, &y, &flat, &grown).map_err(candle_core::Error::wrap)?;
            grad = match of_x {
                Some(of_x) => (before + of_x)?,
                None => before,
            };
            of_params.push(params);
        }
        of_params.reverse();
        let of_params = Tensor::cat(&of_params.iter().collect::<Vec<_>>(), 0)?;
        Ok((x.track_op().then_some(grad), Some(of_params)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, devices_with_convolution};
    use crate::{Conv2dConfig, concat_channels, conv2d, relu};
    use candle_core::{DType, Device};

    fn filled(shape: &[usize], phase: f64, device: &Device) -> Tensor {
        let values = (0..shape.iter().product::<usize>()).map(|i| (i as f64 * 0.7 + phase).sin()).collect();
        Tensor::from_vec::<_, f64>(values, shape, device).unwrap()
    }

    /// `relu(conv3x3(x))` of two channels, weights from the flat parameters.
    fn step(x: &Tensor, params: &Tensor) -> Result<Tensor> {
        let weight = params.reshape((2, x.dims()[1], 3, 3))?;
        relu(&conv2d(x, &weight, None, Conv2dConfig { padding: [1, 1], ..Conv2dConfig::default() })?)
    }

    #[test]
    fn values_and_gradients_are_those_of_the_composition() {
        for device in devices_with_convolution() {
            let x = Var::from_tensor(&filled(&[2, 3, 4, 5], 0.1, &device)).unwrap();
            let params: Vec<Var> = (0..4)
                .map(|i| Var::from_tensor(&filled(&[2 * (3 + 2 * i) * 9], 0.3 + i as f64, &device)).unwrap())
                .collect();
            let mut plain = x.as_tensor().clone();
            for params in &params {
                plain = concat_channels(&[&plain, &step(&plain, params).unwrap()]).unwrap();
            }
            let steps = (0..4).map(|_| -> Step { Box::new(|x, params, _| step(x, params)) }).collect();
            let tensors: Vec<Tensor> = params.iter().map(|p| p.as_tensor().clone()).collect();
            let grown = grow_channels(&x, &tensors, steps).unwrap();
            assert_close(&grown, &plain, 0.0, "the same operations in the same order");
            let direction = filled(grown.dims(), 2.0, &device);
            let back = |y: &Tensor| (y * &direction).unwrap().sum_all().unwrap().backward().unwrap();
            let (found, expected) = (back(&grown), back(&plain));
            for var in params.iter().chain([&x]) {
                let (found, expected) = (found.get(var).unwrap(), expected.get(var).unwrap());
                assert_close(found, expected, 1e-12, "sums of gradients in another order");
            }
        }
    }

    #[test]
    fn steps_are_told_which_pass_it_is() {
        let passes = std::sync::Arc::new(Mutex::new(Vec::new()));
        let seen = passes.clone();
        let x = Var::from_tensor(&filled(&[1, 1, 2, 2], 0.0, &Device::Cpu)).unwrap();
        let params = [Tensor::ones(1, DType::F64, &Device::Cpu).unwrap()];
        let step: Step = Box::new(move |x, _, pass| {
            seen.lock().unwrap().push((pass, x.track_op()));
            Ok(x.sqr()?)
        });
        let y = grow_channels(&x, &params, vec![step]).unwrap();
        y.sum_all().unwrap().backward().unwrap();
        // The first time no graph is recorded: nothing but the result is kept.
        assert_eq!(*passes.lock().unwrap(), [(Pass::Value, false), (Pass::Gradient, true)]);
    }

    #[test]
    fn wrong_steps_are_refused() {
        let x = filled(&[1, 1, 2, 2], 0.0, &Device::Cpu);
        let p = filled(&[1], 0.0, &Device::Cpu);
        let shrink = || -> Step { Box::new(|x, _, _| Ok(x.narrow(2, 0, 1)?)) };
        let refused = |params: &[Tensor], steps| grow_channels(&x, params, steps).unwrap_err().to_string();
        assert!(refused(&[], vec![]).contains("0 steps"));
        assert!(refused(&[p.clone(), p.clone()], vec![shrink()]).contains("1 steps and 2 parameters"));
        assert!(refused(&[p], vec![shrink()]).contains("a step keeps batch and grid"));
    }
}

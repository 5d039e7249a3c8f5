//! The backward pass over the operations of this crate, without the copies and the memory of candle's.
//!
//! `Tensor::backward` of candle allocates zeros for every gradient and adds to them, which is three passes over memory
//! more than the gradient itself takes, and keeps every map of the forward pass until the last one is done. An operation
//! that is applied by [`apply1`], [`apply2`] or [`apply3`] is a node of candle's graph like any other, and is written
//! down here besides; [`backward`] walks what was written down, hands the first gradient of a tensor on as it is, and
//! drops each map once nothing below needs it. Where it meets other operations it lets candle differentiate from there, in
//! one walk from all of them.
//!
//! What does not live here: the derivative of any operation, and second derivatives.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError, Weak};

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, Shape, Tensor, TensorId, Var};

use crate::cpu::{for_float, with_slice};
use crate::error::{OpsError, Result};

const NAME: &str = "backward";

/// The gradients of an operation's arguments, from its result and the result's gradient.
type Derivative = dyn Fn(&[Tensor], &Tensor, &Tensor) -> candle_core::Result<Vec<Option<Tensor>>> + Send + Sync;

/// One application of an operation. It lives as long as the node of candle's graph that holds it.
struct Step {
    inputs: Vec<Tensor>,
    derivative: Box<Derivative>,
    result: OnceLock<TensorId>,
}

/// Every living application by its result.
static STEPS: LazyLock<Mutex<HashMap<TensorId, Weak<Step>>>> = LazyLock::new(Mutex::default);

fn with_steps<R>(f: impl FnOnce(&mut HashMap<TensorId, Weak<Step>>) -> R) -> R {
    // No call leaves the map half changed, so a panic elsewhere while it was held means nothing.
    f(&mut STEPS.lock().unwrap_or_else(PoisonError::into_inner))
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(result) = self.result.get() {
            with_steps(|steps| steps.remove(result));
        }
    }
}

/// The operation behind `tensor`, when it was applied by this module.
fn step_of(tensor: &Tensor) -> Option<Arc<Step>> {
    with_steps(|steps| steps.get(&tensor.id()).and_then(Weak::upgrade))
}

/// An operation as candle holds it, with what was written down about it.
struct Recorded<C> {
    op: Arc<C>,
    /// Only held: the node of candle's graph owns it.
    _step: Arc<Step>,
}

/// Writes an application down, computes it, and ties the one to the other.
fn record<C: Send + Sync + 'static>(
    op: C,
    inputs: Vec<Tensor>,
    derivative: impl Fn(&C, &[Tensor], &Tensor, &Tensor) -> candle_core::Result<Vec<Option<Tensor>>> + Send + Sync + 'static,
    apply: impl FnOnce(Recorded<C>) -> candle_core::Result<Tensor>,
) -> candle_core::Result<Tensor> {
    let op = Arc::new(op);
    let derivative = {
        let op = Arc::clone(&op);
        Box::new(move |inputs: &[Tensor], y: &Tensor, dy: &Tensor| derivative(&op, inputs, y, dy))
    };
    let step = Arc::new(Step { inputs, derivative, result: OnceLock::new() });
    let y = apply(Recorded { op, _step: Arc::clone(&step) })?;
    if y.track_op() {
        // The cell was made above and is written here alone.
        let _ = step.result.set(y.id());
        with_steps(|steps| steps.insert(y.id(), Arc::downgrade(&step)));
    }
    Ok(y)
}

/// Applies an operation of one argument so that both [`backward`] and candle's own can differentiate it.
///
/// # Gradient
/// That of `op.bwd`.
/// # Errors
/// What the operation reports.
/// # Example
/// `docs/adding-a-loss.md` writes a loss as such an operation.
pub fn apply1<C: CustomOp1 + Send + Sync + 'static>(x: &Tensor, op: C) -> candle_core::Result<Tensor> {
    let derivative = |op: &C, inputs: &[Tensor], y: &Tensor, dy: &Tensor| Ok(vec![op.bwd(&inputs[0], y, dy)?]);
    record(op, vec![x.clone()], derivative, |op| x.apply_op1(op))
}

/// As [`apply1`], for two arguments.
///
/// # Errors
/// What the operation reports.
pub fn apply2<C: CustomOp2 + Send + Sync + 'static>(a: &Tensor, b: &Tensor, op: C) -> candle_core::Result<Tensor> {
    let derivative = |op: &C, inputs: &[Tensor], y: &Tensor, dy: &Tensor| {
        let (da, db) = op.bwd(&inputs[0], &inputs[1], y, dy)?;
        Ok(vec![da, db])
    };
    record(op, vec![a.clone(), b.clone()], derivative, |op| a.apply_op2(b, op))
}

/// As [`apply1`], for three arguments.
///
/// # Errors
/// What the operation reports.
pub fn apply3<C: CustomOp3 + Send + Sync + 'static>(
    a: &Tensor,
    b: &Tensor,
    c: &Tensor,
    op: C,
) -> candle_core::Result<Tensor> {
    let derivative = |op: &C, inputs: &[Tensor], y: &Tensor, dy: &Tensor| {
        let (da, db, dc) = op.bwd(&inputs[0], &inputs[1], &inputs[2], y, dy)?;
        Ok(vec![da, db, dc])
    };
    record(op, vec![a.clone(), b.clone(), c.clone()], derivative, |op| a.apply_op3(b, c, op))
}

/// As [`apply3`] for an operation that takes two vectors as the rows of one argument: `a`, `[b0, b1]`, `c`. What is
/// written down has four arguments, so that the walk needs no derivative of the stacking.
pub(crate) fn apply3_stacked<C: CustomOp3 + Send + Sync + 'static>(
    a: &Tensor,
    [b0, b1]: [&Tensor; 2],
    c: &Tensor,
    op: C,
) -> candle_core::Result<Tensor> {
    let stacked = Tensor::stack(&[b0, b1], 0)?;
    let derivative = {
        let stacked = stacked.clone();
        move |op: &C, inputs: &[Tensor], y: &Tensor, dy: &Tensor| {
            let (da, db, dc) = op.bwd(&inputs[0], &stacked, &inputs[3], y, dy)?;
            let row = |i: usize| db.as_ref().map(|db| db.get(i)?.copy()).transpose();
            Ok(vec![da, row(0)?, row(1)?, dc])
        }
    };
    let inputs = vec![a.clone(), b0.clone(), b1.clone(), c.clone()];
    record(op, inputs, derivative, |op| a.apply_op3(&stacked, c, op))
}

impl<C: CustomOp1> CustomOp1 for Recorded<C> {
    fn name(&self) -> &'static str {
        self.op.name()
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        self.op.cpu_fwd(x, lx)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, lx: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        self.op.cuda_fwd(x, lx)
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        self.op.bwd(x, y, dy)
    }
}

impl<C: CustomOp2> CustomOp2 for Recorded<C> {
    fn name(&self) -> &'static str {
        self.op.name()
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        la: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.op.cpu_fwd(a, la, b, lb)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        a: &CudaStorage,
        la: &Layout,
        b: &CudaStorage,
        lb: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        self.op.cuda_fwd(a, la, b, lb)
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        self.op.bwd(a, b, y, dy)
    }
}

impl<C: CustomOp3> CustomOp3 for Recorded<C> {
    fn name(&self) -> &'static str {
        self.op.name()
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        la: &Layout,
        b: &CpuStorage,
        lb: &Layout,
        c: &CpuStorage,
        lc: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.op.cpu_fwd(a, la, b, lb, c, lc)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        a: &CudaStorage,
        la: &Layout,
        b: &CudaStorage,
        lb: &Layout,
        c: &CudaStorage,
        lc: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        self.op.cuda_fwd(a, la, b, lb, c, lc)
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        self.op.bwd(a, b, c, y, dy)
    }
}

/// Gradients of a loss with respect to every variable behind it: [`backward_from`] a seed of ones.
///
/// # Errors
/// As [`backward_from`].
pub fn backward(loss: Tensor) -> Result<GradStore> {
    let ones = loss.detach().ones_like()?;
    backward_from(vec![(loss, ones)])
}

/// Gradients of `sum_i <seed_i, output_i>` with respect to every variable behind the outputs.
///
/// What candle's `backward` gives for one output and a seed of ones, up to the order in which the gradients of a tensor
/// with three or more consumers are added, in less time and memory.
/// Every map between the variables and the outputs is let go as soon as its gradient is formed, if nothing else holds it:
/// the outputs are taken over for that reason, and callers keep no clones of them, of logits or of features.
///
/// # Shapes
/// Each output with its seed: of one shape, any, contiguous, f32 or f64
/// # Gradient
/// None of the gradients: they are plain tensors.
/// # Errors
/// `Shape` when a seed's shape is not its output's; what the derivatives report.
/// # Source
/// Reverse accumulation in topological order. DIFFERENCE to candle 0.11.1's walk: a gradient starts from what the first
/// consumer hands it instead of from zeros, and consumers are visited in reverse order of their first use.
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use segdistill_ops::{graph, relu};
/// let x = Var::new(&[-1f32, 2.0, 3.0], &Device::Cpu)?;
/// let y = relu(x.as_tensor())?;
/// let seed = Tensor::new(&[1f32, 10.0, 100.0], &Device::Cpu)?;
/// let gradients = graph::backward_from(vec![(y, seed)])?;
/// assert_eq!(gradients.get(&x).expect("x stands behind y").to_vec1::<f32>()?, [0.0, 10.0, 100.0]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn backward_from(outputs: Vec<(Tensor, Tensor)>) -> Result<GradStore> {
    for (output, seed) in &outputs {
        if seed.dims() != output.dims() {
            return Err(OpsError::shape(
                NAME,
                format!("seed {:?} of an output {:?}", seed.dims(), output.dims()),
                format!("{:?}", output.dims()),
                "give the gradient with respect to each element of the output",
            ));
        }
    }
    let mut found = GradStore::default();
    let (roots, seeds): (Vec<Tensor>, Vec<Tensor>) = outputs.into_iter().unzip();
    // On a GPU, where networks have some of candle's own operations still, all of it is left to candle.
    let here = roots.iter().all(|root| root.device().is_cpu());
    let mut order = topological(&roots);
    let mut pending = GradStore::default();
    for (root, seed) in roots.into_iter().zip(seeds) {
        add_to(&mut pending, &root, seed.detach())?;
    }
    let mut handed_over: Option<Tensor> = None;
    while let Some(Node { tensor, step }) = order.pop() {
        let Some(grad) = pending.remove(&tensor) else { continue };
        if tensor.is_variable() {
            add_to(&mut found, &tensor, grad)?;
            continue;
        }
        let Some(step) = step.filter(|_| here) else {
            // An operation of candle's own: its walk goes on from here, once for all of them.
            // In one type and place, whatever those of the operations: the seed of the walk is 1 in any.
            let product = (&tensor * &grad)?.sum_all()?.to_dtype(DType::F64)?;
            handed_over = Some(match handed_over {
                None => product,
                Some(sum) => (&sum + product.to_device(sum.device())?)?,
            });
            continue;
        };
        let gradients = (step.derivative)(&step.inputs, &tensor, &grad)?;
        drop((tensor, grad));
        for (input, gradient) in step.inputs.iter().zip(gradients) {
            if let Some(gradient) = gradient
                && input.track_op()
            {
                add_to(&mut pending, input, gradient.detach())?;
            }
        }
    }
    if let Some(below) = handed_over {
        found.extend(below.backward()?)?;
    }
    Ok(found)
}

/// A scalar function of one tensor, made of any operations, as one step of the walk: its gradient is formed together with
/// its value, and nothing of what `f` recorded is kept.
///
/// For a function that holds operations of candle's own above a network: without it they would take the network's whole
/// backward pass with them. What else `f` uses is constant here, variables included.
///
/// # Shapes
/// `x`: any, f32 or f64; `f` returns `[]`
/// # Gradient
/// That of `f` with respect to `x`, times the result's gradient.
/// # Errors
/// `Shape` when `f` gives no scalar; what `f` reports.
/// # Example
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use segdistill_ops::graph;
/// let x = Var::new(&[1f64, 2.0], &Device::Cpu)?;
/// let loss = graph::scalar(x.as_tensor(), |x| -> segdistill_ops::Result<_> { Ok(x.sqr()?.sum_all()?) })?;
/// assert_eq!(graph::handovers(&[loss.clone()]), 0);
/// assert_eq!(graph::backward(loss)?.get(&x).expect("x stands behind it").to_vec1::<f64>()?, [2.0, 4.0]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn scalar<E: From<OpsError> + From<candle_core::Error>>(
    x: &Tensor,
    f: impl FnOnce(&Tensor) -> std::result::Result<Tensor, E>,
) -> std::result::Result<Tensor, E> {
    // Where all of the walk is candle's, nothing is gained by cutting it.
    if !x.device().is_cpu() || !x.track_op() {
        return f(x);
    }
    let inner = Var::from_tensor(&x.detach().contiguous()?)?;
    let value = f(inner.as_tensor())?;
    if value.rank() != 0 {
        let hint = "sum or average before returning";
        return Err(OpsError::shape("scalar", format!("{:?}", value.dims()), "a scalar", hint).into());
    }
    let constant = value.detach();
    let gradient = backward(value)?.remove(&inner);
    let gradient = gradient.map_or_else(|| inner.zeros_like(), Ok)?.detach();
    Ok(apply1(&x.contiguous()?, Scalar { value: constant, gradient })?)
}

/// What [`scalar`] found.
struct Scalar {
    value: Tensor,
    gradient: Tensor,
}

impl CustomOp1 for Scalar {
    fn name(&self) -> &'static str {
        "scalar"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (storage, _) = self.value.storage_and_layout();
        match &*storage {
            candle_core::Storage::Cpu(value) => Ok((value.clone(), Shape::from(()))),
            _ => candle_core::bail!("the value was formed on the host"),
        }
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let factor = grad.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        Ok(Some((&self.gradient * factor)?.detach()))
    }
}

/// From how many places [`backward_from`] these outputs would leave the rest to candle's walk: operations that were not
/// applied by this module, with a variable behind them, and reached without passing another such.
///
/// 0 for the losses and nearly every network of this workspace: DenseNet's blocks, FCN's crops at odd sizes and the
/// discriminator hold operations of candle's own. Whoever adds one sees it here.
pub fn handovers(outputs: &[Tensor]) -> usize {
    topological(outputs).iter().filter(|node| node.step.is_none() && !node.tensor.is_variable()).count()
}

/// A tensor with a variable behind it, and what formed it when that was written down.
struct Node {
    tensor: Tensor,
    step: Option<Arc<Step>>,
}

/// Every tensor between the roots and the variables, as far as operations were written down: arguments before results.
fn topological(roots: &[Tensor]) -> Vec<Node> {
    enum Visit {
        Enter(Tensor),
        Leave(Node),
    }
    let mut order = Vec::new();
    let mut seen = HashSet::new();
    let mut stack: Vec<Visit> = roots.iter().rev().cloned().map(Visit::Enter).collect();
    while let Some(visit) = stack.pop() {
        match visit {
            Visit::Leave(node) => order.push(node),
            Visit::Enter(tensor) => {
                if !tensor.track_op() || !seen.insert(tensor.id()) {
                    continue;
                }
                let step = if tensor.is_variable() { None } else { step_of(&tensor) };
                let inputs = step.as_ref().map(|step| step.inputs.clone()).unwrap_or_default();
                stack.push(Visit::Leave(Node { tensor, step }));
                stack.extend(inputs.into_iter().rev().map(Visit::Enter));
            }
        }
    }
    order
}

/// Adds to the gradient of `of`, or starts it.
fn add_to(store: &mut GradStore, of: &Tensor, gradient: Tensor) -> Result<()> {
    let sum = match store.remove(of) {
        None => gradient,
        Some(first) => sum(&first, &gradient)?,
    };
    store.insert(of, sum);
    Ok(())
}

/// `a + b` on every core.
fn sum(a: &Tensor, b: &Tensor) -> candle_core::Result<Tensor> {
    let ours = matches!(a.dtype(), DType::F32 | DType::F64) && a.dtype() == b.dtype();
    if !ours || !a.device().is_cpu() || !a.is_contiguous() || !b.is_contiguous() {
        return Ok((a + b)?.detach());
    }
    for_float!(NAME, a.dtype(), T => with_slice::<T, _>(NAME, a, |x| with_slice::<T, _>(NAME, b, |y| {
        Tensor::from_vec(crate::pieces::sum(x, y), a.shape(), a.device())
    })))
}

#[cfg(test)]
mod tests;

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
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use candle_core::Device;

    use super::*;
    use crate::testing::{assert_close, random_f64};
    use crate::{BatchNormConfig, Conv2dConfig, Mode, Pool2dConfig};

    /// A network in small: convolution, normalisation with a skip, pooling, resize, concatenation of a map with what
    /// was made of it, dropout.
    fn network(x: &Tensor, weight: &Tensor, gamma: &Tensor, beta: &Tensor) -> Result<Tensor> {
        let cfg = Conv2dConfig { padding: [1, 1], ..Conv2dConfig::default() };
        let mode = Mode::Train { seed: 3, step: 5 };
        let (mean, var) = (gamma.zeros_like()?.detach(), gamma.ones_like()?.detach());
        let conv = crate::conv2d(x, weight, Some(beta), cfg)?;
        let bn = BatchNormConfig::default();
        let y = crate::batch_norm_act(&conv, gamma, beta, &mean, &var, Some(x), true, bn, mode)?;
        let pool = Pool2dConfig { kernel: [3, 3], stride: [2, 2], padding: [1, 1], ceil_mode: false };
        let down = crate::relu(&crate::max_pool2d(&y, pool)?)?;
        let up = crate::resize_bilinear(&down, [9, 7], false)?;
        let joined = crate::concat_channels(&[&up, &y, &up, x])?;
        crate::dropout(&joined, 0.25, mode, "network")
    }

    fn leaves() -> Vec<Var> {
        let shapes = [&[2, 4, 9, 7][..], &[4, 4, 3, 3], &[4], &[4]];
        let names = ["x", "weight", "gamma", "beta"];
        names.iter().zip(shapes).map(|(name, shape)| Var::from_tensor(&random_f64(0, name, shape)).unwrap()).collect()
    }

    #[test]
    fn the_gradients_are_those_of_candle() -> Result<()> {
        let vars = leaves();
        let apply = || network(&vars[0], &vars[1], &vars[2], &vars[3]);
        let y = apply()?;
        let seed = random_f64(1, "seed", y.dims());
        let expected = (&y * &seed)?.sum_all()?.backward()?;
        assert_eq!(handovers(&[y]), 0);
        let found = backward_from(vec![(apply()?, seed)])?;
        for var in &vars {
            let [found, expected] = [&found, &expected].map(|g| g.get(var).expect("every leaf has a gradient"));
            assert_close(found, expected, 1e-14, "the same terms, added in another order");
        }
        assert_eq!(found.get_ids().count(), vars.len(), "nothing but variables is kept");
        Ok(())
    }

    #[test]
    fn operations_of_candle_in_between_are_differentiated_by_candle() -> Result<()> {
        let vars = leaves();
        let apply = || -> Result<Tensor> {
            // Above, between and below recorded operations, and beside them at a fork.
            let x = (vars[0].as_tensor().sqr()? * 0.5)?;
            let y = network(&x, &vars[1], &vars[2], &vars[3])?.tanh()?;
            Ok((crate::relu(&y)? + y.sin()?)?.narrow(1, 2, 9)?.sqr()?.mean_all()?)
        };
        let loss = apply()?;
        assert!(handovers(std::slice::from_ref(&loss)) > 0);
        let (expected, found) = (loss.backward()?, backward(apply()?)?);
        for var in &vars {
            let [found, expected] = [&found, &expected].map(|g| g.get(var).expect("every leaf has a gradient"));
            assert_close(found, expected, 1e-14, "the same terms, added in another order");
        }
        Ok(())
    }

    #[test]
    fn several_outputs_give_the_sum_of_their_gradients() -> Result<()> {
        let vars = leaves();
        let y = network(&vars[0], &vars[1], &vars[2], &vars[3])?;
        let z = crate::relu(&y)?;
        let (dy, dz) = (random_f64(1, "dy", y.dims()), random_f64(1, "dz", z.dims()));
        let alone = |of: &Tensor, seed: &Tensor| backward_from(vec![(of.clone(), seed.clone())]);
        let parts = [alone(&y, &dy)?, alone(&z, &dz)?];
        // The lower output comes first, then last, and one is given twice.
        for outputs in [vec![(y.clone(), dy.clone()), (z.clone(), dz.clone())], vec![(z, dz), (y, dy)]] {
            let both = backward_from(outputs)?;
            for var in &vars {
                let [a, b] = [&parts[0], &parts[1]].map(|g| g.get(var).expect("every leaf has a gradient"));
                assert_close(both.get(var).unwrap(), &(a + b)?, 1e-14, "a sum of two");
            }
        }
        let x = vars[0].as_tensor();
        let ones = x.detach().ones_like()?;
        let twice = backward_from(vec![(x.clone(), ones.clone()), (x.clone(), ones)])?;
        assert_close(twice.get(x).unwrap(), &(x.detach().ones_like()? * 2.0)?, 0.0, "an output may be a variable");
        Ok(())
    }

    #[test]
    fn without_a_variable_there_is_nothing_to_find() -> Result<()> {
        let x = random_f64(0, "x", &[2, 3, 4, 5]);
        let y = crate::relu(&x)?;
        assert!(step_of(&y).is_none());
        assert_eq!(backward_from(vec![(y.clone(), y.clone())])?.get_ids().count(), 0);
        Ok(())
    }

    #[test]
    fn a_seed_of_another_shape_is_refused() {
        let x = Var::zeros((2, 3), DType::F64, &Device::Cpu).unwrap();
        let error = backward_from(vec![(x.as_tensor().clone(), Tensor::zeros(3, DType::F64, &Device::Cpu).unwrap())]);
        assert!(matches!(error, Err(OpsError::Shape { .. })));
    }

    /// Adds 1 and counts how many of its kind are alive.
    struct Alive(&'static AtomicUsize);

    impl Alive {
        fn new(count: &'static AtomicUsize) -> Self {
            count.fetch_add(1, Ordering::SeqCst);
            Self(count)
        }
    }

    impl Drop for Alive {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// The identity; its derivative checks how many of its kind are left.
    struct Counted {
        alive: Alive,
        expected: usize,
    }

    impl CustomOp1 for Counted {
        fn name(&self) -> &'static str {
            "counted"
        }

        fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
            Ok((x.clone(), layout.shape().clone()))
        }

        fn bwd(&self, _: &Tensor, _: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
            assert_eq!(self.alive.0.load(Ordering::SeqCst), self.expected);
            Ok(Some(dy.clone()))
        }
    }

    #[test]
    fn each_map_is_let_go_once_nothing_below_needs_it() -> Result<()> {
        static ALIVE: AtomicUsize = AtomicUsize::new(0);
        let x = Var::zeros((2, 3), DType::F64, &Device::Cpu)?;
        let mut ids = Vec::new();
        let mut y = x.as_tensor().clone();
        for i in 0..5 {
            // While the derivative of operation i runs, those above it are gone: i + 1 are left.
            y = apply1(&y, Counted { alive: Alive::new(&ALIVE), expected: i + 1 })?;
            ids.push(y.id());
        }
        let ones = y.detach().ones_like()?;
        backward_from(vec![(y, ones)])?;
        assert_eq!(ALIVE.load(Ordering::SeqCst), 0);
        assert!(with_steps(|steps| ids.iter().all(|id| !steps.contains_key(id))), "what is gone is not written down");
        Ok(())
    }

    #[test]
    fn a_graph_that_is_never_walked_leaves_nothing() -> Result<()> {
        let vars = leaves();
        let y = network(&vars[0], &vars[1], &vars[2], &vars[3])?;
        let id = y.id();
        assert!(with_steps(|steps| steps.contains_key(&id)));
        drop(y);
        assert!(with_steps(|steps| !steps.contains_key(&id)));
        Ok(())
    }

    #[test]
    fn operations_of_two_types_are_handed_over_together() -> Result<()> {
        let x = Var::new(&[-1f32, 2.0, 3.0], &Device::Cpu)?;
        let a = crate::relu(&x.as_tensor().sqr()?)?;
        let b = crate::relu(&x.to_dtype(DType::F64)?)?;
        let seeds = [a.ones_like()?.detach(), b.ones_like()?.detach()];
        let [first, second] = seeds;
        let found = backward_from(vec![(a, first), (b, second)])?;
        assert_eq!(found.get(&x).expect("x stands behind both").to_vec1::<f32>()?, [-2.0, 5.0, 7.0]);
        Ok(())
    }

    #[test]
    fn a_variable_of_any_type_is_summed() -> Result<()> {
        let x = Var::from_tensor(&Tensor::new(&[1f32, 2.0], &Device::Cpu)?.to_dtype(DType::BF16)?)?;
        let seed = || x.ones_like().map(|ones| ones.detach());
        let found = backward_from(vec![(x.as_tensor().clone(), seed()?), (x.as_tensor().clone(), seed()?)])?;
        assert_eq!(found.get(&x).expect("x itself").to_dtype(DType::F32)?.to_vec1::<f32>()?, [2.0, 2.0]);
        Ok(())
    }
}

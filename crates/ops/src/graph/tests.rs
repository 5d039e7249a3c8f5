//! The walk against candle's own, and what it lets go of.

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

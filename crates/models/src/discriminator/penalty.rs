//! The gradient penalty and its gradient, one of second order.

use candle_core::{Tensor, Var};
use segdistill_ops::rng::Stream;
use segdistill_ops::{Mode, graph};

use super::Discriminator;
use super::dual::{Dual, host};
use crate::error::{ModelError, Result};

impl Discriminator {
    /// How far the slope of the score is from 1 between the two networks' maps.
    ///
    /// `P = 1/n sum_i (||dD/dx_i||_2 - 1)^2` at `x_i = eps_i t_i + (1 - eps_i) s_i`, with one `eps_i` for each image, uniform
    /// in [0, 1) from (`seed`, `step`). See [`Discriminator::gradient_penalty_at`].
    ///
    /// # Shapes
    /// - `student_nchw`, `teacher_nchw`: as [`Discriminator::forward`] takes them, equal; both detached here
    /// - returns `[]`; the weight of the penalty (10 in both papers) is the caller's
    /// # Gradient
    /// Reaches every parameter but the bias of the last convolution, which it does not depend on; none reaches the maps.
    /// # Errors
    /// `Input` as [`Discriminator::forward`], and when the two differ.
    /// # Source
    /// Gulrajani et al. 2017, algorithm 1; SKD's code, where the norm is taken over all channels of the input too, the
    /// image's included. Counts as one pass in training: running statistics and spectral norms move once.
    pub fn gradient_penalty(
        &self,
        student_nchw: &Tensor,
        teacher_nchw: &Tensor,
        seed: u64,
        step: u64,
    ) -> Result<Tensor> {
        self.check(student_nchw)?;
        if student_nchw.dims() != teacher_nchw.dims() {
            return Err(ModelError::Input {
                model: "discriminator".into(),
                found: format!("{:?} beside {:?}", teacher_nchw.dims(), student_nchw.dims()),
                expected: "the teacher's maps in the shape of the student's".into(),
                hint: "resize the teacher's logits to the student's grid first",
            });
        }
        let (student, teacher) = (student_nchw.detach(), teacher_nchw.detach());
        let mut stream = Stream::new(seed, "gradient penalty", &[step]);
        let shares: Vec<f64> = (0..student.dim(0)?).map(|_| stream.unit()).collect();
        let shares = Tensor::from_vec(shares, (student.dim(0)?, 1, 1, 1), &candle_core::Device::Cpu)?;
        let shares = shares.to_dtype(student.dtype())?.to_device(student.device())?;
        let between = (&student + (teacher - &student)?.broadcast_mul(&shares)?)?;
        self.gradient_penalty_at(&between, Mode::Train { seed, step })
    }

    /// The penalty at given maps: `1/n sum_i (||g_i||_2 - 1)^2`, `g` being the gradient of the sum of all scores.
    ///
    /// In training the batch's statistics tie the images together, so that `g_i` holds what map `i` does to the scores of
    /// the others too; it is what PyTorch's `autograd.grad(scores.sum(), maps)` gives.
    ///
    /// # Shapes
    /// - `maps_nchw`: as [`Discriminator::forward`] takes them; detached here
    /// - returns `[]`
    /// # Gradient
    /// Exact for every parameter, through batch statistics, spectral norms and attention; equal to PyTorch's double
    /// backward. With `v_i = dP/dg_i = 2/n (||g_i|| - 1) / ||g_i|| g_i` held constant, the gradient of `P` is that of
    /// `<g, v>`, which is the derivative of the sum of scores along `v`: one forward pass of values with tangents, made of
    /// operations with ordinary gradients, takes the place of differentiating a backward pass. Where `g_i` is 0 its share
    /// is 0 (PyTorch gives NaN).
    /// # Errors
    /// As [`Discriminator::forward`].
    /// # Source
    /// Gulrajani et al. 2017; the order of differentiation is Pearlmutter's (1994).
    pub fn gradient_penalty_at(&self, maps_nchw: &Tensor, mode: Mode) -> Result<Tensor> {
        self.check(maps_nchw)?;
        let weights = self.weights(mode)?;
        let n = maps_nchw.dim(0)?;
        // One backward pass for the slopes, with constant weights.
        let (value, direction) = {
            let x = Var::from_tensor(&maps_nchw.detach().contiguous()?)?;
            // Of all passes over these maps this one alone moves the running statistics.
            let y = batch_normed(self, &x, mode)?;
            let total = weights.detached().scores(Dual::constant(y))?.value().sum_all()?;
            let slope = graph::backward(total)?.remove(x.as_tensor()).map_or_else(|| x.zeros_like(), Ok)?.detach();
            let norms: Vec<f64> = host(&slope.sqr()?.flatten_from(1)?.sum(1)?)?.into_iter().map(f64::sqrt).collect();
            let value = norms.iter().map(|norm| (norm - 1.0).powi(2)).sum::<f64>() / n as f64;
            let factor = |norm: &f64| if *norm == 0.0 { 0.0 } else { 2.0 / n as f64 * (norm - 1.0) / norm };
            let factors =
                Tensor::from_vec(norms.iter().map(factor).collect(), (n, 1, 1, 1), &candle_core::Device::Cpu)?;
            let factors = factors.to_dtype(slope.dtype())?.to_device(slope.device())?;
            (value, slope.broadcast_mul(&factors)?)
        };
        let (unit, tangent) = self.normalised_along(maps_nchw, direction, mode)?;
        let per_channel = |t: &Tensor| t.reshape((1, (), 1, 1));
        let gamma = per_channel(&self.norm.gamma_c)?;
        let x = unit.broadcast_mul(&gamma)?.broadcast_add(&per_channel(&self.norm.beta_c)?)?;
        let scores = weights.scores(Dual::new(x, tangent.broadcast_mul(&gamma)?))?;
        let along = scores.tangent().expect("a direction was followed").sum_all()?;
        // The value of the penalty, the gradient of the derivative: their difference is a constant.
        let value = along.detach().affine(0.0, value)?;
        Ok(((&along - along.detach())? + value)?)
    }

    /// The maps with mean 0 and variance 1 in each channel, and the derivative of that along `direction`, both constant.
    ///
    /// The derivative is symmetric, `(v - mean(v) - x mean(x v)) / s` with the normalised `x`: it is the backward pass.
    fn normalised_along(&self, maps_nchw: &Tensor, direction: Tensor, mode: Mode) -> Result<(Tensor, Tensor)> {
        let ones = self.norm.gamma_c.detach().ones_like()?;
        let norm = self.norm.still(ones.clone(), ones.zeros_like()?)?;
        let x = Var::from_tensor(&maps_nchw.detach().contiguous()?)?;
        let unit = norm.forward(x.as_tensor(), mode)?;
        let value = unit.detach();
        let tangent = graph::backward_from(vec![(unit, direction)])?.remove(x.as_tensor());
        Ok((value, tangent.expect("the maps stand behind it").detach()))
    }
}

/// The input of the convolutions, with constant scale and shift.
fn batch_normed(discriminator: &Discriminator, x: &Var, mode: Mode) -> Result<Tensor> {
    let norm = &discriminator.norm;
    let constant = super::InputNorm {
        gamma_c: norm.gamma_c.detach(),
        beta_c: norm.beta_c.detach(),
        running_mean_c: norm.running_mean_c.clone(),
        running_var_c: norm.running_var_c.clone(),
    };
    constant.forward(x.as_tensor(), mode)
}

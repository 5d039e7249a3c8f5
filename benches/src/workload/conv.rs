//! Convolutions: the answer is compared with plain sums in f64.

use candle_core::{DType, Tensor, Var};
use segdistill_ops::{Conv2dConfig, conv2d, graph};

use super::{Answer, Workload, products, sizes};
use crate::case::{Precision, Work};
use crate::error::{BenchError, Result};
use crate::fill::filled;

/// Outputs, and elements of each gradient, that are compared with the sum they are.
const PROBES: usize = 12;

/// A convolution with its gradients.
pub(super) struct Convolution {
    name: String,
    x: Tensor,
    weight: Tensor,
    bias: Option<Tensor>,
    image: bool,
    cfg: Conv2dConfig,
    precision: Precision,
    /// Gradient of the result, made once.
    dy: Tensor,
}

impl Convolution {
    pub(super) fn new(name: String, work: &Work, precision: Precision) -> Result<Self> {
        let &Work::Conv { input, weight, stride, padding, dilation, groups, bias, image } = work else {
            return Err(BenchError::usage(format!("{name} is no convolution"), "report this as a defect"));
        };
        let leaf = |t: Tensor| -> Result<Tensor> { Ok(Var::from_tensor(&t)?.as_tensor().clone()) };
        let x = filled("x", &input, 1.0)?;
        let cfg = Conv2dConfig {
            stride: [stride; 2],
            padding: [padding; 2],
            dilation: [dilation; 2],
            groups,
            precision: products(precision)?,
        };
        let out_hw = cfg.output_hw([input[2], input[3]], [weight[2], weight[3]]);
        let [oh, ow] = out_hw.ok_or_else(|| BenchError::wrong(&name, "the kernel is larger than the image"))?;
        Ok(Self {
            x: if image { x } else { leaf(x)? },
            dy: filled("dy", &[input[0], weight[0], oh, ow], 1.0)?,
            weight: leaf(filled("weight", &weight, 0.1)?)?,
            bias: if bias { Some(leaf(filled("bias", &weight[..1], 1.0)?)?) } else { None },
            image,
            cfg,
            precision,
            name,
        })
    }

    fn forward(&self) -> Result<Tensor> {
        Ok(conv2d(&self.x, &self.weight, self.bias.as_ref(), self.cfg)?)
    }
}

impl Workload for Convolution {
    fn answer(&mut self) -> Result<Answer> {
        let y = self.forward()?;
        let grads = graph::backward_from(vec![(y.clone(), self.dy.clone())])?;
        let none = || BenchError::wrong(&self.name, "no gradient");
        let mut found = vec![("y".to_string(), &y)];
        let dw = grads.get(&self.weight).ok_or_else(none)?;
        found.push(("grad-weight".into(), dw));
        if !self.image {
            found.push(("grad-x".into(), grads.get(&self.x).ok_or_else(none)?));
        }
        if let Some(bias) = &self.bias {
            found.push(("grad-bias".into(), grads.get(bias).ok_or_else(none)?));
        }
        let sums = Sums::new(self, &y, &self.dy)?;
        for (key, tensor) in &found {
            sums.check(&self.name, key, tensor, self.precision)?;
        }
        sizes(&self.name, found)
    }

    fn run(&mut self) -> Result<()> {
        graph::backward_from(vec![(self.forward()?, self.dy.clone())])?;
        Ok(())
    }
}

/// Inputs on the host, and the sums that outputs and gradients are.
struct Sums {
    x: Vec<f32>,
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
    dy: Vec<f32>,
    cfg: Conv2dConfig,
    input: [usize; 4],
    kernel: [usize; 4],
    output: [usize; 4],
}

impl Sums {
    fn new(of: &Convolution, y: &Tensor, dy: &Tensor) -> Result<Self> {
        let host = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
        let dims = |t: &Tensor| t.dims4().map(|(a, b, c, d)| [a, b, c, d]);
        Ok(Self {
            x: host(&of.x)?,
            weight: host(&of.weight)?,
            bias: of.bias.as_ref().map(host).transpose()?,
            dy: host(dy)?,
            cfg: of.cfg,
            input: dims(&of.x)?,
            kernel: dims(&of.weight)?,
            output: dims(y)?,
        })
    }

    /// Compares some elements of `tensor`, the output or a gradient.
    fn check(&self, case: &str, key: &str, tensor: &Tensor, precision: Precision) -> Result<()> {
        let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        // A step without factors in common with the sizes, so that all places of rows, maps and kernels are met.
        let step = (values.len() / PROBES).max(1) | 1;
        for (at, &value) in values.iter().enumerate().step_by(step) {
            let mut sum = Sum::default();
            match key {
                "y" => self.output_at(at, &mut sum),
                "grad-x" => self.input_gradient_at(at, &mut sum),
                "grad-weight" => self.weight_gradient_at(at, &mut sum),
                _ => self.bias_gradient_at(at, &mut sum),
            }
            // f32: rounding of the sum of magnitudes. bf16: each factor is off by up to 2^-9, in random directions.
            let allowed = match precision {
                Precision::F32 => 1e-5 * sum.magnitude + 1e-6,
                Precision::Bf16 => sum.squares.sqrt() / 32.0 + 1e-5 * sum.magnitude + 1e-3,
            };
            if !((f64::from(value) - sum.value).abs() <= allowed) {
                return Err(BenchError::wrong(
                    case,
                    format!("`{key}` element {at} is {value}, the sum is {}, allowed {allowed:.1e} apart", sum.value),
                ));
            }
        }
        Ok(())
    }

    /// Row or column of the input under output `out` and tap `tap`, if it lies on the map.
    fn source(&self, axis: usize, out: usize, tap: usize) -> Option<usize> {
        let at = (out * self.cfg.stride[axis] + tap * self.cfg.dilation[axis]).checked_sub(self.cfg.padding[axis])?;
        (at < self.input[2 + axis]).then_some(at)
    }

    /// Output under input `source` and tap `tap`, if there is one.
    fn target(&self, axis: usize, source: usize, tap: usize) -> Option<usize> {
        let at = (source + self.cfg.padding[axis]).checked_sub(tap * self.cfg.dilation[axis])?;
        let out = at / self.cfg.stride[axis];
        (at.is_multiple_of(self.cfg.stride[axis]) && out < self.output[2 + axis]).then_some(out)
    }

    fn output_at(&self, at: usize, sum: &mut Sum) {
        let [n, o, oy, ox] = place(at, self.output);
        let [c_out, per_group, kh, kw] = self.kernel;
        let first = o / (c_out / self.cfg.groups) * per_group;
        if let Some(bias) = &self.bias {
            sum.add(f64::from(bias[o]));
        }
        for (i, ky, kx) in triples(per_group, kh, kw) {
            if let (Some(y), Some(x)) = (self.source(0, oy, ky), self.source(1, ox, kx)) {
                sum.product(
                    self.x[index([n, first + i, y, x], self.input)],
                    self.weight[index([o, i, ky, kx], self.kernel)],
                );
            }
        }
    }

    fn input_gradient_at(&self, at: usize, sum: &mut Sum) {
        let [n, c, y, x] = place(at, self.input);
        let [c_out, per_group, kh, kw] = self.kernel;
        let outs = c_out / self.cfg.groups;
        let (group, i) = (c / per_group, c % per_group);
        for (o, ky, kx) in triples(outs, kh, kw) {
            if let (Some(oy), Some(ox)) = (self.target(0, y, ky), self.target(1, x, kx)) {
                let o = group * outs + o;
                sum.product(
                    self.dy[index([n, o, oy, ox], self.output)],
                    self.weight[index([o, i, ky, kx], self.kernel)],
                );
            }
        }
    }

    fn weight_gradient_at(&self, at: usize, sum: &mut Sum) {
        let [o, i, ky, kx] = place(at, self.kernel);
        let c = o / (self.kernel[0] / self.cfg.groups) * self.kernel[1] + i;
        for (n, oy, ox) in triples(self.output[0], self.output[2], self.output[3]) {
            if let (Some(y), Some(x)) = (self.source(0, oy, ky), self.source(1, ox, kx)) {
                sum.product(self.dy[index([n, o, oy, ox], self.output)], self.x[index([n, c, y, x], self.input)]);
            }
        }
    }

    fn bias_gradient_at(&self, o: usize, sum: &mut Sum) {
        for (n, oy, ox) in triples(self.output[0], self.output[2], self.output[3]) {
            sum.add(f64::from(self.dy[index([n, o, oy, ox], self.output)]));
        }
    }
}

/// A sum with what its rounding is measured by.
#[derive(Default)]
struct Sum {
    value: f64,
    magnitude: f64,
    squares: f64,
}

impl Sum {
    fn add(&mut self, term: f64) {
        self.value += term;
        self.magnitude += term.abs();
        self.squares += term * term;
    }

    fn product(&mut self, a: f32, b: f32) {
        self.add(f64::from(a) * f64::from(b));
    }
}

fn triples(a: usize, b: usize, c: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..a * b * c).map(move |k| (k / (b * c), k / c % b, k % c))
}

fn place(at: usize, [_, b, c, d]: [usize; 4]) -> [usize; 4] {
    [at / (b * c * d), at / (c * d) % b, at / d % c, at % d]
}

fn index([i, j, k, l]: [usize; 4], [_, b, c, d]: [usize; 4]) -> usize {
    ((i * b + j) * c + k) * d + l
}

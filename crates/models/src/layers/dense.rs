//! Blocks of densely connected layers, in memory that grows no faster than their output.

use candle_core::Tensor;
use segdistill_ops::{BatchNormConfig, Init, Mode, Pass, Scope, Step, concat_channels, grow_channels};

use super::conv::{Conv2d, ConvShape};
use super::norm::{BnRelu, ConvBn};
use crate::error::Result;

/// A densely connected layer before it has weights: normalisation and ReLU, 1x1, normalisation and ReLU, 3x3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DenseLayerShape {
    /// The 1x1 convolution, of all channels before the layer.
    pub narrow: ConvShape,
    /// The 3x3 convolution, to the channels the layer adds.
    pub grow: ConvShape,
}

impl DenseLayerShape {
    /// Trained elements, both normalisations included.
    pub fn n_parameters(&self) -> usize {
        BnRelu::n_parameters(self.narrow.n_in) + ConvBn::n_parameters(self.narrow) + self.grow.n_parameters()
    }

    /// Multiply-accumulates of one image of size `[h, w]`, which the layer keeps.
    ///
    /// # Errors
    /// As [`ConvShape::output_hw`].
    pub fn macs(&self, hw: [usize; 2]) -> Result<u64> {
        Ok(self.narrow.macs(hw)?.0 + self.grow.macs(hw)?.0)
    }
}

/// Layers each of which sees what came in and what all layers before it gave.
///
/// Over a store that can be trained the graph keeps the block's output alone: what lies inside a layer is computed
/// again in the backward pass, see [`grow_channels`]. That costs one more forward pass of the block, and running
/// statistics move once.
pub struct DenseBlock {
    layers: Vec<Layer>,
}

impl DenseBlock {
    /// Builds the layers in scopes `denselayer1`, `denselayer2` and so on, in torchvision's names `norm1`, `conv1`,
    /// `norm2`, `conv2`; convolutions from `init`.
    ///
    /// # Errors
    /// `Ops(Config)` when the names are taken.
    pub fn new(shapes: &[DenseLayerShape], init: Init, config: BatchNormConfig, scope: &Scope) -> Result<Self> {
        let layer = |(i, shape): (usize, &DenseLayerShape)| {
            Layer::new(*shape, init, config, &scope.pp(format_args!("denselayer{}", i + 1)))
        };
        Ok(Self { layers: shapes.iter().enumerate().map(layer).collect::<Result<_>>()? })
    }

    /// What came in and what each layer gives, joined along the channels.
    ///
    /// # Shapes
    /// `[n, c, h, w]` to `[n, c + sum g_i, h, w]`, `g_i` being the channels layer `i` adds
    /// # Gradient
    /// Reaches the input and every parameter; over a frozen store there is none.
    /// # Errors
    /// As [`ConvBn::forward`].
    /// # Source
    /// Huang et al. 2017, section 3; memory as Pleiss et al. 2017.
    pub fn forward(&self, x_nchw: &Tensor, mode: Mode) -> Result<Tensor> {
        let packed: Option<Vec<Packed>> = self.layers.iter().map(Layer::packed).collect();
        let Some(packed) = packed.filter(|layers| !layers.is_empty()) else {
            // Without a graph each joined map is gone as soon as the next one is there.
            return self.layers.iter().try_fold(x_nchw.clone(), |x, layer| {
                let grown = layer.forward(&x, mode)?;
                Ok(concat_channels(&[&x, &grown])?)
            });
        };
        let params = packed.iter().map(Packed::flat).collect::<Result<Vec<_>>>()?;
        let step = |layer: Packed| -> Step {
            Box::new(move |x, flat, pass| {
                let again = mode.is_train() && pass == Pass::Gradient;
                let grown = layer.unpacked(flat, again).and_then(|layer| layer.forward(x, mode));
                grown.map_err(|error| match error {
                    crate::ModelError::Ops(error) => error,
                    other => candle_core::Error::wrap(other).into(),
                })
            })
        };
        Ok(grow_channels(x_nchw, &params, packed.into_iter().map(step).collect())?)
    }
}

#[derive(Clone)]
struct Layer {
    norm: BnRelu,
    narrow: ConvBn,
    grow: Conv2d,
}

impl Layer {
    fn new(shape: DenseLayerShape, init: Init, config: BatchNormConfig, scope: &Scope) -> Result<Self> {
        Ok(Self {
            norm: BnRelu::new(shape.narrow.n_in, config, &scope.pp("norm1"))?,
            narrow: ConvBn::with_init(shape.narrow, init, config, &scope.pp("conv1"), &scope.pp("norm2"))?,
            grow: Conv2d::with_init(shape.grow, init, &scope.pp("conv2"))?,
        })
    }

    fn forward(&self, x_nchw: &Tensor, mode: Mode) -> Result<Tensor> {
        let narrow = self.narrow.forward_act(&self.norm.forward(x_nchw, mode)?, None, true, mode)?;
        self.grow.forward(&narrow)
    }

    /// The layer with its parameters in a row; `None` over a frozen store.
    fn packed(&self) -> Option<Packed> {
        self.narrow.parts().is_some().then(|| Packed(self.clone()))
    }
}

/// A layer over a store that can be trained, whose parameters are put in a row and taken from one.
struct Packed(Layer);

impl Packed {
    /// Scale and shift, weight, scale and shift, weight.
    fn parts(&self) -> Vec<&Tensor> {
        let Layer { norm, narrow, grow } = &self.0;
        let mut parts = norm.bn().scale_and_shift().to_vec();
        if let Some((conv, bn)) = narrow.parts() {
            parts.push(conv.weight());
            parts.extend(bn.scale_and_shift());
        }
        parts.push(grow.weight());
        parts
    }

    fn flat(&self) -> Result<Tensor> {
        let parts = self.parts().into_iter().map(Tensor::flatten_all).collect::<candle_core::Result<Vec<_>>>()?;
        Ok(Tensor::cat(&parts, 0)?)
    }

    /// The layer over `flat`; with `still` its running statistics stay as they are.
    fn unpacked(&self, flat: &Tensor, still: bool) -> Result<Layer> {
        let Layer { norm, narrow, grow } = &self.0;
        let mut start = 0;
        let mut taken = Vec::with_capacity(6);
        for part in self.parts() {
            let n = part.elem_count();
            taken.push(flat.narrow(0, start, n)?.reshape(part.shape())?);
            start += n;
        }
        let mut taken = taken.into_iter();
        let mut next = || taken.next().expect("as many parts as were packed");
        let norm = BnRelu::of_bn(norm.bn().over(next(), next(), still)?);
        let narrow = match narrow.parts() {
            Some((conv, bn)) => ConvBn::of_parts(conv.over(next()), bn.over(next(), next(), still)?),
            None => narrow.clone(),
        };
        Ok(Layer { norm, narrow, grow: grow.over(next()) })
    }
}

//! Small networks between a student's features and a teacher's: trained with the student, left out of what is exported.
//!
//! Weights are drawn with the variance of PyTorch's default for convolutions, `1 / (3 fan_in)`, from a normal
//! distribution, biases from 0. What does not live here: the choice of features, masks, and losses.

use candle_core::{DType, Tensor};
use segdistill_ops::{
    BatchNormConfig, Conv2dConfig, Init, Mode, OpsError, ParamKind, Scope, add, conv2d, masked, relu,
};

use crate::error::Result;
use crate::layers::{BatchNorm2d, Conv2d, ConvBn, ConvShape};

/// A convolution of stride 1, drawn as the head of this file says.
fn conv(shape: ConvShape, scope: &Scope) -> Result<Conv2d> {
    Conv2d::with_init(shape, init(&shape), scope)
}

fn init(shape: &ConvShape) -> Init {
    let fan_in = shape.n_in * shape.kernel * shape.kernel;
    Init::Normal((1.0 / (3.0 * fan_in as f64)).sqrt())
}

/// A student's channels brought to the teacher's number: a 1x1 convolution, with batch normalisation where asked for.
///
/// Names: `conv`, and `bn`.
///
/// # Source
/// Romero et al. 2015 (FitNets), section 2.1, as a 1x1 convolution with bias; with the normalisation it has no bias.
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use segdistill_models::adapter::Align;
/// use segdistill_ops::{Mode, ParamStore};
/// # fn main() -> segdistill_models::Result<()> {
/// let store = ParamStore::trainable(0, DType::F32, &Device::Cpu);
/// let align = Align::new(&store.root(), 16, 64)?;
/// let feature = Tensor::ones((2, 16, 6, 8), DType::F32, &Device::Cpu)?;
/// assert_eq!(align.forward(&feature, Mode::Eval)?.dims(), [2, 64, 6, 8]);
/// assert_eq!(store.n_parameters(), Align::n_parameters(16, 64));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Align {
    conv: Conv2d,
    bn: Option<BatchNorm2d>,
}

impl Align {
    /// Builds it in `scope`, without normalisation.
    ///
    /// # Errors
    /// `Ops(Config)` when the names are taken.
    pub fn new(scope: &Scope, n_in: usize, n_out: usize) -> Result<Self> {
        Ok(Self { conv: conv(ConvShape::new(n_in, n_out, 1).with_bias(), &scope.pp("conv"))?, bn: None })
    }

    /// Builds it in `scope`, followed by batch normalisation.
    ///
    /// # Errors
    /// `Ops(Config)` when the names are taken.
    pub fn normalised(scope: &Scope, n_in: usize, n_out: usize) -> Result<Self> {
        let bn = BatchNorm2d::new(n_out, BatchNormConfig::default(), &scope.pp("bn"))?;
        Ok(Self { conv: conv(ConvShape::new(n_in, n_out, 1), &scope.pp("conv"))?, bn: Some(bn) })
    }

    /// Trained elements without normalisation; with it there are `n_out` more.
    pub fn n_parameters(n_in: usize, n_out: usize) -> usize {
        ConvShape::new(n_in, n_out, 1).with_bias().n_parameters()
    }

    /// The feature with the teacher's channels.
    ///
    /// # Shapes
    /// `[n, n_in, h, w]` to `[n, n_out, h, w]`
    /// # Gradient
    /// Reaches the feature and the parameters.
    /// # Errors
    /// `Ops(Shape)` for other channels, or with normalisation in training when a channel has a single value.
    pub fn forward(&self, student_ndhw: &Tensor, mode: Mode) -> Result<Tensor> {
        let y = self.conv.forward(student_ndhw)?;
        match &self.bn {
            None => Ok(y),
            Some(bn) => bn.forward(&y, mode),
        }
    }
}

/// A student's feature brought into the teacher's space for contrast with a memory: 1x1 convolution, batch normalisation,
/// ReLU, 1x1 convolution, neither with a bias.
///
/// Names: `conv1`, `bn`, `conv2`.
///
/// # Source
/// Yang et al. 2022 (CIRKD), section 3.3; its code's layers.
#[derive(Clone, Debug)]
pub struct ProjectionHead {
    hidden: ConvBn,
    out: Conv2d,
}

impl ProjectionHead {
    /// Builds it in `scope`.
    ///
    /// # Errors
    /// `Ops(Config)` when the names are taken.
    pub fn new(scope: &Scope, n_in: usize, n_out: usize) -> Result<Self> {
        let [first, second] = Self::shapes(n_in, n_out);
        let bn = BatchNormConfig::default();
        Ok(Self {
            hidden: ConvBn::with_init(first, init(&first), bn, &scope.pp("conv1"), &scope.pp("bn"))?,
            out: conv(second, &scope.pp("conv2"))?,
        })
    }

    fn shapes(n_in: usize, n_out: usize) -> [ConvShape; 2] {
        [ConvShape::new(n_in, n_out, 1), ConvShape::new(n_out, n_out, 1)]
    }

    /// Trained elements.
    pub fn n_parameters(n_in: usize, n_out: usize) -> usize {
        let [first, second] = Self::shapes(n_in, n_out);
        ConvBn::n_parameters(first) + second.n_parameters()
    }

    /// The projected feature, not yet of unit length.
    ///
    /// # Shapes
    /// `[n, n_in, h, w]` to `[n, n_out, h, w]`
    /// # Gradient
    /// Reaches the feature and the parameters.
    /// # Errors
    /// `Ops(Shape)` for other channels, or in training when a channel has a single value.
    pub fn forward(&self, student_ndhw: &Tensor, mode: Mode) -> Result<Tensor> {
        self.out.forward(&self.hidden.forward_act(student_ndhw, None, true, mode)?)
    }
}

/// Generator of a teacher's feature from a student's of which positions were left out.
///
/// A 1x1 convolution to the teacher's channels, where the numbers differ; the mask; a generator. [`MgdGenerator::new`] has
/// `conv2(ReLU(conv1(x)))`, 3x3 convolutions with bias. [`MgdGenerator::enhanced`] reads both depths:
/// `(out1(a) + out2(b)) / 2` with `a = ReLU(conv1(x))`, `b = ReLU(conv2(a))`.
///
/// Names: `align`, `conv1`, `conv2`, and `out1`, `out2`.
///
/// # Source
/// Yang et al. 2022 (MGD), section 3.1; the second form is the projector that the code of Fan et al. 2023 (Af-DCD) takes
/// for Cityscapes.
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use segdistill_models::adapter::MgdGenerator;
/// use segdistill_ops::ParamStore;
/// # fn main() -> segdistill_models::Result<()> {
/// let store = ParamStore::trainable(0, DType::F32, &Device::Cpu);
/// let generator = MgdGenerator::new(&store.root(), 16, 24)?;
/// let feature = Tensor::ones((1, 16, 2, 2), DType::F32, &Device::Cpu)?;
/// let keep = Tensor::new(&[[[[1u8, 0], [0, 0]]]], &Device::Cpu)?;
/// assert_eq!(generator.forward(&feature, &keep)?.dims(), [1, 24, 2, 2]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct MgdGenerator {
    align: Option<Conv2d>,
    conv1: Conv2d,
    conv2: Conv2d,
    outs: Option<[Half; 2]>,
}

/// Half of a 3x3 convolution with bias.
#[derive(Clone, Debug)]
struct Half {
    weight: Tensor,
    bias: Tensor,
}

impl MgdGenerator {
    /// Builds the plain generator in `scope`.
    ///
    /// # Errors
    /// `Ops(Config)` when the names are taken.
    pub fn new(scope: &Scope, n_in: usize, n_out: usize) -> Result<Self> {
        let layer = |name| conv(Self::shape(n_out), &scope.pp(name));
        let align = match n_in == n_out {
            true => None,
            false => Some(conv(ConvShape::new(n_in, n_out, 1).with_bias(), &scope.pp("align"))?),
        };
        Ok(Self { align, conv1: layer("conv1")?, conv2: layer("conv2")?, outs: None })
    }

    /// Builds the generator that reads both depths in `scope`.
    ///
    /// # Errors
    /// `Ops(Config)` when the names are taken.
    pub fn enhanced(scope: &Scope, n_in: usize, n_out: usize) -> Result<Self> {
        let outs = [Half::new(n_out, &scope.pp("out1"))?, Half::new(n_out, &scope.pp("out2"))?];
        Ok(Self { outs: Some(outs), ..Self::new(scope, n_in, n_out)? })
    }

    fn shape(channels: usize) -> ConvShape {
        ConvShape::new(channels, channels, 3).with_bias()
    }

    /// Trained elements of the plain generator; the enhanced one has its 3x3 convolutions twice.
    pub fn n_parameters(n_in: usize, n_out: usize) -> usize {
        let align = if n_in == n_out { 0 } else { Align::n_parameters(n_in, n_out) };
        align + 2 * Self::shape(n_out).n_parameters()
    }

    /// The generated feature.
    ///
    /// # Shapes
    /// - `student_ndhw`: `[n, n_in, h, w]`; `keep_n1hw`: `[n, 1, h, w]`, 1 where the feature is seen, else 0, of any type
    /// - returns `[n, n_out, h, w]`
    /// # Gradient
    /// Reaches the feature where it is seen, and the parameters.
    /// # Errors
    /// `Ops(Shape)` for other channels or grids; `Ops(Config)` for a mask that holds anything but 0 and 1.
    pub fn forward(&self, student_ndhw: &Tensor, keep_n1hw: &Tensor) -> Result<Tensor> {
        let aligned = match &self.align {
            None => student_ndhw.clone(),
            Some(align) => align.forward(student_ndhw)?,
        };
        let seen = masked(&aligned, &binary(keep_n1hw)?)?;
        let shallow = relu(&self.conv1.forward(&seen)?)?;
        let deep = self.conv2.forward(&shallow)?;
        match &self.outs {
            None => Ok(deep),
            Some([out1, out2]) => Ok(add(&out1.forward(&shallow)?, &out2.forward(&relu(&deep)?)?)?),
        }
    }
}

impl Half {
    fn new(channels: usize, scope: &Scope) -> Result<Self> {
        let shape = MgdGenerator::shape(channels);
        Ok(Self {
            weight: scope.get("weight", &shape.weight_shape(), ParamKind::Weight, init(&shape))?,
            bias: scope.get("bias", &[channels], ParamKind::Bias, Init::Constant(0.0))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        // The weights are halved rather than the map: they are small, and a power of two is exact.
        let cfg = Conv2dConfig { padding: [1, 1], ..Conv2dConfig::default() };
        Ok(conv2d(x, &(&self.weight * 0.5)?, Some(&(&self.bias * 0.5)?), cfg)?)
    }
}

/// A mask of one channel as the operations take it.
fn binary(keep_n1hw: &Tensor) -> Result<Tensor> {
    let (n, one, h, w) = keep_n1hw.dims4()?;
    if one != 1 {
        let found = format!("{:?}", keep_n1hw.dims());
        return Err(OpsError::shape("mgd mask", found, "[n, 1, h, w]", "one value a position, for all channels").into());
    }
    let values = keep_n1hw.detach().to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    if let Some(value) = values.iter().find(|value| **value != 0.0 && **value != 1.0) {
        return Err(OpsError::config(format!("mgd mask holds {value}, expected 0 or 1"), "1 keeps a position").into());
    }
    Ok(keep_n1hw.detach().to_dtype(DType::U8)?.reshape((n, h, w))?)
}

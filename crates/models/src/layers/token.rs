//! Layers of transformers, on tokens `[n, l, d]`.

use candle_core::Tensor;
use segdistill_ops::{
    Conv2dConfig, Init, Mode, ParamKind, Scope, add, attention, columns, conv2d, drop_path, gelu, layer_norm, linear,
    to_maps, to_tokens,
};

use super::conv::{Conv2d, ConvShape};
use crate::error::Result;

/// Deviation of the first weights of linear layers, usual in transformers.
const DEVIATION: f64 = 0.02;
/// Added to the variance of normalisations inside a block, and before it: the published values.
const EPS_BLOCK: f64 = 1e-6;
const EPS_INNER: f64 = 1e-5;

/// A linear layer before it has weights, with bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearShape {
    /// Input features.
    pub n_in: usize,
    /// Output features.
    pub n_out: usize,
}

impl LinearShape {
    /// Trained elements, bias included.
    pub fn n_parameters(&self) -> usize {
        (self.n_in + 1) * self.n_out
    }

    /// Multiply-accumulates of `n_tokens` tokens (the bias counts none).
    pub fn macs(&self, n_tokens: usize) -> u64 {
        n_tokens as u64 * (self.n_in * self.n_out) as u64
    }
}

/// A linear layer; parameters `weight` and `bias`.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    /// Builds it in `scope`: weights normal with deviation 0.02, bias 0.
    ///
    /// # Errors
    /// `Ops(Config)` when the names are taken.
    pub fn new(shape: LinearShape, scope: &Scope) -> Result<Self> {
        let weight = scope.get("weight", &[shape.n_out, shape.n_in], ParamKind::Weight, Init::Normal(DEVIATION))?;
        let bias = scope.get("bias", &[shape.n_out], ParamKind::Bias, Init::Constant(0.0))?;
        Ok(Self { weight, bias })
    }

    /// `x W^T + b`.
    ///
    /// # Shapes
    /// `[.., n_in]` to `[.., n_out]`
    /// # Gradient
    /// Reaches input, weight and bias.
    /// # Errors
    /// `Ops(Shape)` when the features differ.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(linear(x, &self.weight, Some(&self.bias))?)
    }
}

/// Layer normalisation over the last dimension; parameters `weight` and `bias`.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    gamma_d: Tensor,
    beta_d: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// Builds it in `scope`: scale 1, shift 0.
    ///
    /// # Errors
    /// `Ops(Config)` when the names are taken.
    pub fn new(features: usize, eps: f64, scope: &Scope) -> Result<Self> {
        let vector = |name, value| scope.get(name, &[features], ParamKind::Norm, Init::Constant(value));
        Ok(Self { gamma_d: vector("weight", 1.0)?, beta_d: vector("bias", 0.0)?, eps })
    }

    /// Normalises each token, see [`segdistill_ops::layer_norm`].
    ///
    /// # Shapes
    /// `[.., d]` to the same
    /// # Gradient
    /// Reaches input, scale and shift.
    /// # Errors
    /// `Ops(Shape)` when the features differ.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(layer_norm(x, &self.gamma_d, &self.beta_d, self.eps)?)
    }

    /// Trained elements.
    pub fn n_parameters(features: usize) -> usize {
        2 * features
    }
}

/// Overlapping patches of a map as tokens, before there are weights: a convolution of more taps than its stride, with
/// bias, and a normalisation.
///
/// # Source
/// Xie et al. 2021 (SegFormer), section 3.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PatchShape {
    /// Input channels.
    pub n_in: usize,
    /// Features of a token.
    pub n_out: usize,
    /// Kernel side, odd.
    pub kernel: usize,
    /// Step from patch to patch.
    pub stride: usize,
}

impl PatchShape {
    fn conv(&self) -> ConvShape {
        ConvShape::new(self.n_in, self.n_out, self.kernel).strided(self.stride).with_bias()
    }

    /// Trained elements.
    pub fn n_parameters(&self) -> usize {
        self.conv().n_parameters() + LayerNorm::n_parameters(self.n_out)
    }

    /// Multiply-accumulates for a map of size `[h, w]`, and the size of the tokens' grid.
    ///
    /// # Errors
    /// `Ops(Shape)` when the map is empty.
    pub fn macs(&self, hw: [usize; 2]) -> Result<(u64, [usize; 2])> {
        self.conv().macs(hw)
    }
}

/// A [`PatchShape`] with weights; names `proj` and `norm`.
#[derive(Clone, Debug)]
pub struct PatchEmbedding {
    proj: Conv2d,
    norm: LayerNorm,
}

impl PatchEmbedding {
    /// Builds it in `scope`.
    ///
    /// # Errors
    /// `Ops(Config)` when the names are taken.
    pub fn new(shape: PatchShape, scope: &Scope) -> Result<Self> {
        let proj = Conv2d::new(shape.conv(), &scope.pp("proj"))?;
        Ok(Self { proj, norm: LayerNorm::new(shape.n_out, EPS_INNER, &scope.pp("norm"))? })
    }

    /// Tokens, and the size of their grid.
    ///
    /// # Shapes
    /// `[n, n_in, h, w]` to `[n, h' w', n_out]`
    /// # Gradient
    /// Reaches the map and every parameter.
    /// # Errors
    /// `Ops(Shape)` when the channels differ.
    pub fn forward(&self, x_nchw: &Tensor) -> Result<(Tensor, [usize; 2])> {
        let maps = self.proj.forward(x_nchw)?;
        let (_, _, h, w) = maps.dims4()?;
        Ok((self.norm.forward(&to_tokens(&maps)?)?, [h, w]))
    }
}

/// A block of SegFormer's encoder before it has weights: attention whose keys and values come from a smaller map, then a
/// feed-forward network that sees the neighbouring pixels.
///
/// # Source
/// Xie et al. 2021 (SegFormer), section 3.1: efficient self-attention and Mix-FFN; the smaller map as in Wang et al. 2021
/// (PVT).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MixBlockShape {
    /// Features of a token.
    pub features: usize,
    /// Heads of attention; they divide the features.
    pub heads: usize,
    /// How many times smaller, along each axis, the map of keys and values is; 1 is plain attention.
    pub reduction: usize,
    /// Features between the two layers of the feed-forward network.
    pub hidden: usize,
    /// Probability with which training leaves one of the two branches out.
    pub drop_path: f64,
}

impl MixBlockShape {
    fn square(&self) -> LinearShape {
        LinearShape { n_in: self.features, n_out: self.features }
    }

    fn key_value(&self) -> LinearShape {
        LinearShape { n_in: self.features, n_out: 2 * self.features }
    }

    fn mlp(&self) -> [LinearShape; 2] {
        let (n_in, n_out) = (self.features, self.hidden);
        [LinearShape { n_in, n_out }, LinearShape { n_in: n_out, n_out: n_in }]
    }

    fn depthwise(&self) -> ConvShape {
        ConvShape::depthwise(self.hidden, 3).with_bias()
    }

    /// `[features, features, reduction, reduction]`.
    fn reduction_weight(&self) -> [usize; 4] {
        [self.features, self.features, self.reduction, self.reduction]
    }

    fn reduced(&self, hw: [usize; 2]) -> [usize; 2] {
        hw.map(|side| side / self.reduction)
    }

    /// Trained elements.
    pub fn n_parameters(&self) -> usize {
        let norm = LayerNorm::n_parameters(self.features);
        let reduction = match self.reduction {
            1 => 0,
            _ => self.reduction_weight().iter().product::<usize>() + self.features + norm,
        };
        let mlp = self.mlp().iter().map(LinearShape::n_parameters).sum::<usize>() + self.depthwise().n_parameters();
        2 * norm + 2 * self.square().n_parameters() + self.key_value().n_parameters() + reduction + mlp
    }

    /// Multiply-accumulates for tokens on a grid `[h, w]`: of linear layers and convolutions, and of attention's two
    /// products.
    ///
    /// # Errors
    /// `Ops(Shape)` when the grid is empty.
    pub fn macs(&self, hw: [usize; 2]) -> Result<(u64, u64)> {
        let n_tokens = hw[0] * hw[1];
        let [rows, columns] = self.reduced(hw);
        let n_keys = rows * columns;
        let mut macs = 2 * self.square().macs(n_tokens) + self.key_value().macs(n_keys);
        if self.reduction > 1 {
            macs += n_keys as u64 * self.reduction_weight().iter().product::<usize>() as u64;
        }
        macs += self.mlp().iter().map(|layer| layer.macs(n_tokens)).sum::<u64>() + self.depthwise().macs(hw)?.0;
        Ok((macs, 2 * n_tokens as u64 * n_keys as u64 * self.features as u64))
    }
}

/// What shrinks the map of keys and values: a convolution of as many taps as its stride, unpadded, and a normalisation;
/// names `sr` and `norm`.
#[derive(Clone, Debug)]
struct Reduction {
    weight: Tensor,
    bias: Tensor,
    config: Conv2dConfig,
    norm: LayerNorm,
}

impl Reduction {
    fn new(shape: MixBlockShape, scope: &Scope) -> Result<Self> {
        let sr = scope.pp("sr");
        Ok(Self {
            weight: sr.get("weight", &shape.reduction_weight(), ParamKind::Weight, Init::KaimingFanOut)?,
            bias: sr.get("bias", &[shape.features], ParamKind::Bias, Init::Constant(0.0))?,
            config: Conv2dConfig {
                stride: [shape.reduction; 2],
                precision: scope.precision(),
                ..Conv2dConfig::default()
            },
            norm: LayerNorm::new(shape.features, EPS_INNER, &scope.pp("norm"))?,
        })
    }

    fn forward(&self, tokens: &Tensor, hw: [usize; 2]) -> Result<Tensor> {
        let map = conv2d(&to_maps(tokens, hw)?, &self.weight, Some(&self.bias), self.config)?;
        self.norm.forward(&to_tokens(&map)?)
    }
}

/// A [`MixBlockShape`] with weights; names `norm1`, `attn.{q,kv,proj,sr,norm}`, `norm2`, `mlp.{fc1,dwconv.dwconv,fc2}`,
/// keys before values in `kv`.
#[derive(Clone, Debug)]
pub struct MixBlock {
    shape: MixBlockShape,
    path: String,
    norm1: LayerNorm,
    query: Linear,
    key_value: Linear,
    proj: Linear,
    reduction: Option<Reduction>,
    norm2: LayerNorm,
    fc1: Linear,
    depthwise: Conv2d,
    fc2: Linear,
}

impl MixBlock {
    /// Builds it in `scope`.
    ///
    /// # Errors
    /// `Ops(Config)` when the names are taken.
    pub fn new(shape: MixBlockShape, scope: &Scope) -> Result<Self> {
        let (attn, mlp) = (scope.pp("attn"), scope.pp("mlp"));
        let [fc1, fc2] = shape.mlp();
        Ok(Self {
            shape,
            path: scope.path().to_string(),
            norm1: LayerNorm::new(shape.features, EPS_BLOCK, &scope.pp("norm1"))?,
            query: Linear::new(shape.square(), &attn.pp("q"))?,
            key_value: Linear::new(shape.key_value(), &attn.pp("kv"))?,
            proj: Linear::new(shape.square(), &attn.pp("proj"))?,
            reduction: (shape.reduction > 1).then(|| Reduction::new(shape, &attn)).transpose()?,
            norm2: LayerNorm::new(shape.features, EPS_BLOCK, &scope.pp("norm2"))?,
            fc1: Linear::new(fc1, &mlp.pp("fc1"))?,
            depthwise: Conv2d::new(shape.depthwise(), &mlp.pp("dwconv").pp("dwconv"))?,
            fc2: Linear::new(fc2, &mlp.pp("fc2"))?,
        })
    }

    /// `y = x + attention(norm(x))`, then `y + ffn(norm(y))`; in training each branch is left out with probability
    /// `drop_path`, image by image.
    ///
    /// # Shapes
    /// `[n, h w, features]` to the same, for a grid `hw`
    /// # Gradient
    /// Reaches the tokens and every parameter, those of a branch left out by the images that kept it.
    /// # Errors
    /// `Ops(Shape)` when the tokens do not fit the grid or the features differ.
    pub fn forward(&self, tokens: &Tensor, hw: [usize; 2], mode: Mode) -> Result<Tensor> {
        let kept = |branch: Tensor, name: &str| -> Result<Tensor> {
            Ok(drop_path(&branch, self.shape.drop_path, mode, &format!("{}.{name}", self.path))?)
        };
        let x = add(tokens, &kept(self.attend(&self.norm1.forward(tokens)?, hw)?, "attn")?)?;
        let hidden = self.fc1.forward(&self.norm2.forward(&x)?)?;
        let hidden = gelu(&to_tokens(&self.depthwise.forward(&to_maps(&hidden, hw)?)?)?)?;
        Ok(add(&x, &kept(self.fc2.forward(&hidden)?, "mlp")?)?)
    }

    fn attend(&self, tokens: &Tensor, hw: [usize; 2]) -> Result<Tensor> {
        let query = self.query.forward(tokens)?;
        let key_value = match &self.reduction {
            Some(reduction) => self.key_value.forward(&reduction.forward(tokens, hw)?)?,
            None => self.key_value.forward(tokens)?,
        };
        let d = self.shape.features;
        let (key, value) = (columns(&key_value, 0, d)?, columns(&key_value, d, d)?);
        self.proj.forward(&attention(&query, &key, &value, self.shape.heads)?)
    }
}

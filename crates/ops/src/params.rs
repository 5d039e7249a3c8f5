//! The parameter store: named, kinded tensors, seeded by name, trainable or frozen.
//!
//! Names are dotted in PyTorch's manner (`encoder.layer1.0.conv1.weight`). A trainable store hands out variables; a
//! frozen one hands out plain tensors taken from a checkpoint, so that no graph is recorded and no gradient exists.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use candle_core::{DType, Device, Tensor, Var};

use crate::error::{DTypeDifference, Mismatch, OpsError, Result, ShapeDifference};
use crate::precision::Precision;
use crate::rng::Stream;

/// What a tensor of the store is for; decides decay, optimizer state and gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ParamKind {
    /// Convolution and linear weights: decayed.
    Weight,
    /// Biases: not decayed by default.
    Bias,
    /// Scales and shifts of a normalisation: not decayed by default.
    Norm,
    /// Running statistics: saved and averaged, never trained.
    Buffer,
}

/// How a new tensor is filled; a function of (seed, name) alone.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Normal with variance `2 / fan_out` (He et al. 2015, fan-out as torchvision's ResNet).
    KaimingFanOut,
    /// Normal with variance `2 / fan_in`.
    KaimingFanIn,
    /// Normal with this standard deviation.
    Normal(f64),
    /// Uniform within `sqrt(6 / (fan_in + fan_out))` (Glorot and Bengio 2010).
    Xavier,
    /// Every element the same.
    Constant(f64),
    /// Bilinear interpolation kernel on the diagonal of `[c, c, k, k]` (Long et al. 2015), for transposed convolutions.
    Bilinear,
}

#[derive(Clone, Debug)]
struct Entry {
    kind: ParamKind,
    tensor: Tensor,
    var: Option<Var>,
}

#[derive(Debug, Default)]
struct Frozen {
    tensors: BTreeMap<String, Tensor>,
    mismatch: Mismatch,
}

#[derive(Debug)]
struct Inner {
    entries: BTreeMap<String, Entry>,
    frozen: Option<Frozen>,
}

/// All tensors of one model.
///
/// # Example
/// ```
/// use candle_core::{DType, Device};
/// use segdistill_ops::{Init, ParamKind, ParamStore};
/// # fn main() -> segdistill_ops::Result<()> {
/// let store = ParamStore::trainable(0, DType::F32, &Device::Cpu);
/// let w = store.root().pp("conv1").get("weight", &[8, 3, 3, 3], ParamKind::Weight, Init::KaimingFanOut)?;
/// assert_eq!(w.dims(), [8, 3, 3, 3]);
/// assert_eq!(store.named()[0].name, "conv1.weight");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct ParamStore {
    inner: Arc<Mutex<Inner>>,
    seed: u64,
    dtype: DType,
    device: Device,
    precision: Precision,
}

/// One tensor of a store, as listed by [`ParamStore::named`].
#[derive(Clone, Debug)]
pub struct NamedParam {
    /// Dotted name.
    pub name: String,
    /// Kind.
    pub kind: ParamKind,
    /// Value; of a trainable store, the tensor the graph sees.
    pub tensor: Tensor,
    /// The variable behind it; `None` in a frozen store.
    pub var: Option<Var>,
}

/// A place in the name tree of a store.
#[derive(Clone, Debug)]
pub struct Scope {
    store: ParamStore,
    path: String,
}

impl ParamStore {
    /// A store whose tensors are variables, filled from (seed, name).
    pub fn trainable(seed: u64, dtype: DType, device: &Device) -> Self {
        let inner = Inner { entries: BTreeMap::new(), frozen: None };
        Self { inner: Arc::new(Mutex::new(inner)), seed, dtype, device: device.clone(), precision: Precision::F32 }
    }

    /// A store that hands out plain tensors of `tensors`; call [`ParamStore::finish`] once the model is built.
    ///
    /// The values are copied here: what later happens to the source, a store that is trained on, does not reach them.
    ///
    /// # Errors
    /// `Candle` when a tensor cannot be copied.
    pub fn frozen(tensors: BTreeMap<String, Tensor>, dtype: DType, device: &Device) -> Result<Self> {
        let copied = |(name, tensor): (String, Tensor)| Ok((name, tensor.force_contiguous()?.detach()));
        let tensors = tensors.into_iter().map(copied).collect::<Result<BTreeMap<_, _>>>()?;
        let frozen = Frozen { tensors, mismatch: Mismatch::default() };
        let inner = Inner { entries: BTreeMap::new(), frozen: Some(frozen) };
        let inner = Arc::new(Mutex::new(inner));
        Ok(Self { inner, seed: 0, dtype, device: device.clone(), precision: Precision::F32 })
    }

    /// The same store, whose layers built from here on multiply in `precision`; tensors, their names and their type stay
    /// as they are. A new store's precision is [`Precision::F32`].
    ///
    /// Nothing is checked here: a convolution of bf16 products refuses f64 tensors and a CPU without instructions for
    /// them; [`Precision::on_cpu`] asks beforehand.
    pub fn with_precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic while the map is held leaves it consistent: every mutation is a single insert.
        self.inner.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The root of the name tree.
    pub fn root(&self) -> Scope {
        Scope { store: self.clone(), path: String::new() }
    }

    /// Device of the tensors.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Element type of the tensors.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Every tensor, sorted by name.
    pub fn named(&self) -> Vec<NamedParam> {
        let inner = self.lock();
        let named = |(name, e): (&String, &Entry)| NamedParam {
            name: name.clone(),
            kind: e.kind,
            tensor: e.tensor.clone(),
            var: e.var.clone(),
        };
        inner.entries.iter().map(named).collect()
    }

    /// Values of every tensor, outside any graph, sharing storage with the store.
    pub fn tensors(&self) -> BTreeMap<String, Tensor> {
        self.named().into_iter().map(|p| (p.name, p.tensor.detach())).collect()
    }

    /// Number of trained elements (buffers left out), as papers count parameters.
    pub fn n_parameters(&self) -> usize {
        self.named().iter().filter(|p| p.kind != ParamKind::Buffer).map(|p| p.tensor.elem_count()).sum()
    }

    /// Replaces every value, or changes nothing.
    ///
    /// `tensors` may share memory with this store, in part or whole: values are copied before the first is written.
    ///
    /// # Errors
    /// `Mismatch` with all differences at once (missing, unexpected, shape, type, not finite in the store's type);
    /// `Config` for a frozen store.
    pub fn load(&self, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        let named = self.named();
        let mut mismatch = Mismatch::default();
        let mut staged = Vec::with_capacity(named.len());
        for p in &named {
            let Some(var) = &p.var else {
                return Err(OpsError::config(
                    "a frozen store takes its weights when it is built",
                    "build the model anew from the other weights",
                ));
            };
            match tensors.get(&p.name) {
                None => mismatch.missing.push(p.name.clone()),
                Some(t) => {
                    if let Some(t) = self.fitting(&p.name, t, p.tensor.dims(), &mut mismatch)? {
                        // A variable refuses memory that is its own.
                        staged.push((var, t.force_contiguous()?));
                    }
                }
            }
        }
        let unknown = |name: &&String| named.binary_search_by(|p| p.name.as_str().cmp(name)).is_err();
        mismatch.unexpected = tensors.keys().filter(unknown).cloned().collect();
        if !mismatch.is_empty() {
            return Err(OpsError::Mismatch(Box::new(mismatch)));
        }
        // Shapes, types and devices agree and no memory is shared: none of these can be refused halfway.
        for (var, t) in staged {
            var.set(&t)?;
        }
        Ok(())
    }

    /// `tensor` in the store's type and place, or `None` with its difference noted in `mismatch`.
    fn fitting(&self, name: &str, tensor: &Tensor, shape: &[usize], mismatch: &mut Mismatch) -> Result<Option<Tensor>> {
        if tensor.dims() != shape {
            let (found, expected) = (tensor.dims().to_vec(), shape.to_vec());
            mismatch.shapes.push(ShapeDifference { name: name.to_string(), found, expected });
            return Ok(None);
        }
        if !matches!(tensor.dtype(), DType::F16 | DType::BF16 | DType::F32 | DType::F64) {
            let (found, expected) = (tensor.dtype(), "F16, BF16, F32 or F64");
            mismatch.dtypes.push(DTypeDifference { name: name.to_string(), found, expected });
            return Ok(None);
        }
        // After the conversion: what is finite in f64 may not be in f32.
        let tensor = tensor.to_device(&self.device)?.to_dtype(self.dtype)?;
        if !all_finite(&tensor)? {
            mismatch.non_finite.push(name.to_string());
            return Ok(None);
        }
        Ok(Some(tensor))
    }

    /// Ends the building of a frozen store: every tensor was there, none was left over.
    ///
    /// # Errors
    /// `Mismatch` with all differences at once. A trainable store always passes.
    pub fn finish(&self) -> Result<()> {
        let mut inner = self.lock();
        let Some(frozen) = inner.frozen.as_mut() else { return Ok(()) };
        let mut mismatch = std::mem::take(&mut frozen.mismatch);
        mismatch.unexpected = frozen.tensors.keys().cloned().collect();
        mismatch.missing.sort();
        mismatch.shapes.sort_by(|a, b| a.name.cmp(&b.name));
        mismatch.dtypes.sort_by(|a, b| a.name.cmp(&b.name));
        mismatch.non_finite.sort();
        if mismatch.is_empty() { Ok(()) } else { Err(OpsError::Mismatch(Box::new(mismatch))) }
    }
}

/// Whether no element is NaN or infinite, in the tensor's own type.
///
/// # Errors
/// `Candle` when the tensor cannot be read.
pub fn all_finite(tensor: &Tensor) -> Result<bool> {
    // One pass: NaN and infinity survive a sum of magnitudes times zero.
    let probe = if tensor.dtype() == DType::F64 { tensor.clone() } else { tensor.to_dtype(DType::F32)? };
    Ok(probe.affine(0.0, 0.0)?.sum_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()? == 0.0)
}

/// Reads a `.safetensors` file whole.
///
/// # Errors
/// `Weights` when the file is absent, short or not safetensors.
pub fn read_safetensors(path: &Path, device: &Device) -> Result<BTreeMap<String, Tensor>> {
    let weights = |why: String| OpsError::Weights { path: path.to_path_buf(), why };
    let bytes = fs_err::read(path).map_err(|e| weights(e.to_string()))?;
    let map = candle_core::safetensors::load_buffer(&bytes, device).map_err(|e| weights(e.to_string()))?;
    Ok(map.into_iter().collect())
}

impl Scope {
    /// The scope `name` below this one.
    pub fn pp(&self, name: impl std::fmt::Display) -> Scope {
        Scope { store: self.store.clone(), path: self.full(&name.to_string()) }
    }

    /// Whether the tensors of its store are plain: none is a variable, and whoever takes them may put others in their
    /// place.
    pub fn is_frozen(&self) -> bool {
        self.store.lock().frozen.is_some()
    }

    /// Precision of the products of layers built here.
    pub fn precision(&self) -> Precision {
        self.store.precision
    }

    /// Dotted path of this scope.
    pub fn path(&self) -> &str {
        &self.path
    }

    fn full(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_string() } else { format!("{}.{name}", self.path) }
    }

    /// The tensor `name` of this scope: new and seeded, or from the frozen set.
    ///
    /// # Errors
    /// `Config` when the name is taken already. A frozen store notes what is missing, of another shape or type, or not
    /// finite, and reports it in [`ParamStore::finish`].
    pub fn get(&self, name: &str, shape: &[usize], kind: ParamKind, init: Init) -> Result<Tensor> {
        let name = self.full(name);
        let store = &self.store;
        let mut inner = store.lock();
        if inner.entries.contains_key(&name) {
            return Err(OpsError::config(
                format!("parameter `{name}` is built twice"),
                "give each layer its own scope",
            ));
        }
        let entry = match inner.frozen.as_mut() {
            Some(frozen) => {
                let tensor = match frozen.tensors.remove(&name) {
                    Some(t) => store.fitting(&name, &t, shape, &mut frozen.mismatch)?,
                    None => {
                        frozen.mismatch.missing.push(name.clone());
                        None
                    }
                };
                let tensor = match tensor {
                    Some(t) => t,
                    // A stand-in, so that the model is built to its end and every difference found.
                    None => Tensor::zeros(shape, store.dtype, &store.device)?,
                };
                Entry { kind, tensor, var: None }
            }
            None => {
                let values = initial_values(store.seed, &name, shape, init)?;
                let tensor = Tensor::from_vec(values, shape, &Device::Cpu)?;
                let var = Var::from_tensor(&tensor.to_dtype(store.dtype)?.to_device(&store.device)?)?;
                let tensor = match kind {
                    // A buffer is no leaf of the graph: no gradient is ever formed for it.
                    ParamKind::Buffer => var.as_detached_tensor(),
                    _ => var.as_tensor().clone(),
                };
                Entry { kind, tensor, var: Some(var) }
            }
        };
        let tensor = entry.tensor.clone();
        inner.entries.insert(name, entry);
        Ok(tensor)
    }
}

/// Fan-in and fan-out of `[out, in, k...]`.
fn fans(shape: &[usize]) -> (f64, f64) {
    let receptive: usize = shape.iter().skip(2).product();
    let (out, inp) = (shape.first().copied().unwrap_or(1), shape.get(1).copied().unwrap_or(1));
    ((inp * receptive) as f64, (out * receptive) as f64)
}

fn initial_values(seed: u64, name: &str, shape: &[usize], init: Init) -> Result<Vec<f64>> {
    let n: usize = shape.iter().product();
    let mut stream = Stream::new(seed, &format!("init/{name}"), &[]);
    let (fan_in, fan_out) = fans(shape);
    let mut normal = |variance: f64| (0..n).map(|_| stream.normal() * variance.sqrt()).collect();
    Ok(match init {
        Init::KaimingFanOut => normal(2.0 / fan_out),
        Init::KaimingFanIn => normal(2.0 / fan_in),
        Init::Normal(deviation) => normal(deviation * deviation),
        Init::Xavier => {
            let bound = (6.0 / (fan_in + fan_out)).sqrt();
            (0..n).map(|_| stream.uniform(-bound, bound)).collect()
        }
        Init::Constant(value) => vec![value; n],
        Init::Bilinear => match *shape {
            [out, inp, kh, kw] if out == inp => {
                let tap = |k: usize, i: usize| {
                    let factor = k.div_ceil(2) as f64;
                    let centre = if k % 2 == 1 { factor - 1.0 } else { factor - 0.5 };
                    1.0 - (i as f64 - centre).abs() / factor
                };
                let mut values = vec![0.0; n];
                for c in 0..out {
                    for y in 0..kh {
                        for x in 0..kw {
                            values[((c * inp + c) * kh + y) * kw + x] = tap(kh, y) * tap(kw, x);
                        }
                    }
                }
                values
            }
            _ => {
                return Err(OpsError::shape(
                    "bilinear initialisation",
                    format!("{shape:?}"),
                    "[c, c, kh, kw]",
                    "use it for transposed convolutions from c to c channels",
                ));
            }
        },
    })
}

#[cfg(test)]
mod tests;

//! Lovasz-softmax: a convex surrogate of the Jaccard index of each class.

use candle_core::Tensor;
use rayon::prelude::*;

use crate::error::Result;
use crate::graded::{Graded, HostLoss, graded};
use crate::host::Real;
use crate::mask::logits_dims;
use crate::softmax::{probabilities, through_softmax};
use crate::targets::read_targets;

const LOSS: &str = "lovasz_softmax";

/// Which classes [`lovasz_softmax`] takes the mean over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LovaszClasses {
    /// Those with a valid pixel in the set.
    #[default]
    Present,
    /// All. A class without pixels adds the largest probability it is given.
    All,
}

/// Settings of [`lovasz_softmax`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lovasz {
    /// Whether each image is a set of pixels of its own, and the loss the mean over images; otherwise the batch is one.
    pub per_image: bool,
    /// Which classes of a set the mean is over.
    pub classes: LovaszClasses,
}

/// Lovasz-softmax: the Jaccard loss of each class, extended to probabilities by sorting the pixels' errors.
///
/// `L = mean over classes of sum_j e_(j) * (J_j - J_{j-1})`. For a class `k` each valid pixel has the error
/// `e(i) = |[y_i = k] - p_k(i)|`, `p = softmax(z)`; `e_(1) >= e_(2) >= ..` are these, sorted, and `J_j` is the Jaccard loss
/// `1 - intersection/union` of class `k` were the first `j` pixels wrong and all others right, `J_0 = 0`. The pixels are
/// those of the batch, or of one image, over which the mean is then taken; an image without valid pixels adds 0, and is
/// counted.
///
/// # Shapes
/// - `logits_nchw`: `[n, c, h, w]`, f32 or f64
/// - `labels_nhw`: `[n, h, w]` u8 in `0..c` where valid; never read elsewhere
/// - `valid_nhw`: `[n, h, w]` u8, 1 where counted, 0 elsewhere
/// - returns `[]` of the logits' type, in [0, 1]
/// # Gradient
/// `J_j - J_{j-1}` to the error that is sorted to place `j`, and from there through the softmax. The loss is piecewise
/// linear in the errors, with a kink where two are equal: its value does not depend on their order, its gradient does.
/// Equal errors are taken in the order of image, row and column. 0 at pixels that do not count; with no valid pixel value
/// and gradient are 0.
/// # Errors
/// `Shape` when the grids differ (nothing is resized here); `DType`; `Label` for a label outside `0..c` at a valid
/// pixel; `Mask` for a mask value above 1.
/// # Source
/// Berman et al. 2018, equations 8 to 11 and algorithm 1; smp's `LovaszLoss("multiclass")` has the default's value and
/// gradient. DIFFERENCE: there the order of equal errors is the sort's. Time `c V log V` for `V` valid pixels, memory two
/// maps of the logits' size. Values do not depend on the number of threads. Logits on another device are brought to the
/// host.
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use segdistill_losses::{Lovasz, lovasz_softmax, valid_mask};
/// // Undecided between two classes: every error is 1/2, and so is the loss of each.
/// let logits = Tensor::zeros((1, 2, 1, 2), DType::F32, &Device::Cpu)?;
/// let labels = Tensor::new(&[[[0u8, 1]]], &Device::Cpu)?;
/// let loss = lovasz_softmax(&logits, &labels, &valid_mask(&labels, 255)?, &Lovasz::default())?;
/// assert!((loss.to_scalar::<f32>()? - 0.5).abs() < 1e-6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn lovasz_softmax(logits_nchw: &Tensor, labels_nhw: &Tensor, valid_nhw: &Tensor, cfg: &Lovasz) -> Result<Tensor> {
    let dims = logits_dims(LOSS, "logits_nchw", logits_nchw)?;
    let targets = read_targets(LOSS, labels_nhw, valid_nhw, dims)?;
    graded(logits_nchw, Sorted { dims, targets, cfg: *cfg })
}

struct Sorted {
    dims: [usize; 4],
    /// The class of each pixel that counts.
    targets: Vec<Option<u8>>,
    cfg: Lovasz,
}

/// A pixel of a set, and its error for one class.
struct Place {
    error: f64,
    pixel: usize,
    labelled: bool,
}

/// The pixels by falling error; equal errors by rising pixel.
///
/// A number that is not negative sorts like its bits, and falls as they are inverted. The pixel and its label, in the low
/// bits, make keys unlike one another, so that a parallel sort has one result; NaN has a place like any other.
fn sorted<T: Real>(places: impl Iterator<Item = Place>) -> Vec<Place> {
    let low = |p: &Place| (p.pixel as u64) << 1 | u64::from(p.labelled);
    let place = |error: f64, low: u64| Place { error, pixel: (low >> 1) as usize, labelled: low & 1 == 1 };
    if size_of::<T>() == size_of::<f32>() {
        let key = |p: Place| u64::from(!(p.error as f32).to_bits()) << 32 | low(&p);
        let mut keys: Vec<u64> = places.map(key).collect();
        keys.par_sort_unstable();
        keys.into_iter().map(|key| place(f64::from(f32::from_bits(!((key >> 32) as u32))), key & 0xffff_ffff)).collect()
    } else {
        let key = |p: Place| u128::from(!p.error.to_bits()) << 64 | u128::from(low(&p));
        let mut keys: Vec<u128> = places.map(key).collect();
        keys.par_sort_unstable();
        keys.into_iter().map(|key| place(f64::from_bits(!((key >> 64) as u64)), key as u64)).collect()
    }
}

impl Sorted {
    /// Labels of the pixels of a set.
    fn targets(&self, set: usize) -> &[Option<u8>] {
        let [n, _, h, w] = self.dims;
        let pixels = if self.cfg.per_image { h * w } else { n * h * w };
        &self.targets[set * pixels..][..pixels]
    }

    /// What the loss of each class of a set is multiplied by; 0 for a class that is left out.
    fn shares(&self, set: usize, n_sets: usize) -> Vec<f64> {
        let mut counted = vec![false; self.dims[1]];
        for class in self.targets(set).iter().flatten() {
            counted[usize::from(*class)] = true;
        }
        if self.cfg.classes == LovaszClasses::All {
            let any = counted.contains(&true);
            counted.fill(any);
        }
        let classes = counted.iter().filter(|counted| **counted).count();
        counted.into_iter().map(|counted| if counted { 1.0 / (n_sets * classes) as f64 } else { 0.0 }).collect()
    }

    /// The loss of one class of a set; its planes of probabilities, an image each, and those of the gradient for them.
    fn class<T: Real>(&self, set: usize, class: usize, share: f64, planes: &[&[T]], grads: &mut [&mut [T]]) -> f64 {
        let m = planes[0].len();
        let targets = self.targets(set);
        let places = planes.iter().enumerate().flat_map(|(image, plane)| {
            let targets = targets[image * m..][..m].iter();
            targets.zip(*plane).enumerate().filter_map(move |(at, (target, p))| {
                let labelled = usize::from((*target)?) == class;
                let error = if labelled { T::one() - *p } else { *p };
                Some(Place { error: error.wide(), pixel: image * m + at, labelled })
            })
        });
        let places = sorted::<T>(places);
        let mut both = places.iter().filter(|place| place.labelled).count() as f64;
        let mut union = both;
        let mut value = 0.0;
        for Place { error, pixel, labelled } in places {
            // J_j - J_{j-1}, without the difference of two numbers that are nearly equal.
            let slope = if labelled {
                both -= 1.0;
                1.0 / union
            } else {
                union += 1.0;
                if union == 1.0 { 1.0 } else { both / (union * (union - 1.0)) }
            };
            value += error * slope;
            if let Some(grad) = grads.get_mut(pixel / m) {
                grad[pixel % m] = T::narrow(if labelled { -slope } else { slope } * share);
            }
        }
        value * share
    }
}

impl HostLoss for Sorted {
    const NAME: &'static str = LOSS;

    fn evaluate<T: Real>(&self, logits: &[T], with_grad: bool) -> candle_core::Result<Graded<T>> {
        let [n, c, h, w] = self.dims;
        let m = h * w;
        if n * m >= 1 << 31 {
            candle_core::bail!("{LOSS}: {} pixels, the sort has room for 2^31", n * m);
        }
        let (map, _) = probabilities(logits, [n, c, m], &self.targets, |_, _, _| ());
        let n_sets = if self.cfg.per_image { n } else { 1 };
        let shares: Vec<f64> = (0..n_sets).flat_map(|set| self.shares(set, n_sets)).collect();
        // The planes of a class in a set: one, or one for each image.
        let owner = |plane: usize| if self.cfg.per_image { plane } else { plane % c };
        let mut planes: Vec<Vec<&[T]>> = vec![Vec::new(); n_sets * c];
        for (at, plane) in map.chunks(m).enumerate() {
            planes[owner(at)].push(plane);
        }
        let mut grad = vec![T::zero(); if with_grad { n * c * m } else { 0 }];
        let mut grads: Vec<Vec<&mut [T]>> = (0..n_sets * c).map(|_| Vec::new()).collect();
        for (at, plane) in grad.chunks_mut(m).enumerate() {
            grads[owner(at)].push(plane);
        }
        let tasks = planes.par_iter().zip(grads).zip(&shares).enumerate();
        let values: Vec<f64> = tasks
            .map(
                |(at, ((planes, mut grads), &share))| {
                    if share > 0.0 { self.class(at / c, at % c, share, planes, &mut grads) } else { 0.0 }
                },
            )
            .collect();
        if with_grad {
            through_softmax(&mut grad, &map, [c, m]);
        }
        Ok(Graded { value: values.iter().sum(), grad })
    }
}

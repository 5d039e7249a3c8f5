//! Omni-contrast (Af-DCD): within a small patch, a group of channels at a pixel should be nearer to the teacher's same
//! group there than to any other group.

use candle_core::{Device, Tensor};
use rayon::prelude::*;
use segdistill_ops::{block_sums, pixel_runs, vectorised};

use crate::error::{LossError, Result};
use crate::graded::{Graded, HostLoss, graded};
use crate::host::{Real, with_slice};
use crate::mask::{pair_dims, read_valid};

const LOSS: &str = "omni_contrast";
/// The teacher's vectors that are compared at a time: their distances stay in registers.
const LANES: usize = 32;

/// Settings of [`omni_contrast`](crate::omni_contrast()).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OmniContrast {
    /// Side of a square patch in pixels, at least 1.
    pub patch: usize,
    /// Groups of consecutive channels, at least 2, a divisor of the channels.
    pub groups: usize,
    /// Temperature `T` that distances are divided by, above 0.
    pub temperature: f64,
}

impl Default for OmniContrast {
    fn default() -> Self {
        Self::af_dcd()
    }
}

impl OmniContrast {
    /// Af-DCD's setting: patches of 4 x 4, 16 groups, temperature 0.07; weighed 0.005 on Cityscapes and 0.01 on CamVid
    /// there.
    pub fn af_dcd() -> Self {
        Self { patch: 4, groups: 16, temperature: 0.07 }
    }
}

/// Contrast of the student's and the teacher's groups of channels within patches, averaged over the valid pixels of the
/// batch, summed over the groups.
///
/// Channels are cut into `M` groups, the map into patches. With `s_ig` and `t_ig` the `d/M` features of group `g` at
/// pixel `i` and `D(ig, jh) = sum_k |s_ig,k - t_jh,k|`,
/// `L = 1/|V| * sum_{i in V} sum_g -log (e(ig, ig) / (e(ig, ig) + sum_{j in V, patch of i} sum_{h != g} e(ig, jh)))`,
/// `e = exp(-D / T)`, in nats. The positive is the teacher's same group at the same pixel; the negatives are its other
/// groups at every pixel of the patch, that one included; its same group at other pixels is neither.
///
/// Patches start at the first row and column. Rows and columns after the last whole patch are left out, as if void;
/// `|V|` counts the valid pixels of the batch in whole patches.
///
/// # Shapes
/// - `student_ndhw`, `teacher_ndhw`: `[n, d, h, w]`, equal, f32 or f64; a layer of its own brings the student to the
///   teacher's channels
/// - `valid_nhw`: `[n, h, w]` u8 on the maps' grid, 1 where counted, 0 elsewhere
/// - returns `[]` of the maps' type
/// # Gradient
/// `dL/ds_ig = 1/(T |V|) * (sign(s_ig - t_ig) - sum_jh p(jh) sign(s_ig - t_jh))` to the student, with the softmax `p`
/// over positive and negatives and `sign(0) = 0`; 0 at pixels that do not count. The teacher is detached here. With no
/// valid pixel value and gradient are 0. A student equal to its teacher has a loss above 0, for the teacher's groups are
/// not infinitely far apart.
/// # Errors
/// `Shape` when student, teacher and mask differ (nothing is resized here), or the map is smaller than a patch; `DType`,
/// also when the two networks' types differ; `Mask` for a mask value above 1; `Config` for a patch of 0, fewer than 2
/// groups, groups that do not divide the channels, or a temperature that is not finite and above 0.
/// # Source
/// Fan et al. 2023 (Af-DCD, NeurIPS), omni-contrasting; OSVAI/Af-DCD `losses/ocmgd.py`, whose arrangement of positives
/// and negatives this is: the paper speaks of contrast over space and over channels, and that the same group elsewhere in
/// the patch is left out is the code's reading of it. The code first takes the maximum of both maps over 4 x 4 windows,
/// or for CamVid crops them to 44 x 44 (whole patches of 45 x 45, as here); pooling is the caller's. DIFFERENCE: void
/// pixels, which the code counts, are neither anchors nor negatives. Other sizes that patches do not divide fail there.
/// Values do not depend on the number of threads. Maps on another device are brought to the host.
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use segdistill_losses::{OmniContrast, omni_contrast};
/// // One pixel, two groups of one channel, 1 apart: each has its positive at distance 0, one negative at distance 1.
/// let map = Tensor::new(&[[[[0f64]], [[1.0]]]], &Device::Cpu)?;
/// let valid = Tensor::ones((1, 1, 1), DType::U8, &Device::Cpu)?;
/// let cfg = OmniContrast { patch: 1, groups: 2, temperature: 1.0 };
/// let loss = omni_contrast(&map, &map, &valid, &cfg)?.to_scalar::<f64>()?;
/// assert!((loss - 2.0 * (-1f64).exp().ln_1p()).abs() < 1e-15);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn omni_contrast(
    student_ndhw: &Tensor,
    teacher_ndhw: &Tensor,
    valid_nhw: &Tensor,
    cfg: &OmniContrast,
) -> Result<Tensor> {
    let [n, d, h, w] = pair_dims(LOSS, ["student_ndhw", "teacher_ndhw"], student_ndhw, teacher_ndhw)?;
    let OmniContrast { patch, groups, temperature } = *cfg;
    check(cfg, d)?;
    if h.min(w) < patch {
        return Err(LossError::shape(
            LOSS,
            format!("maps of {h} x {w} pixels"),
            format!("at least one patch of {patch} x {patch}"),
            "compare maps of a finer grid, or set a smaller patch",
        ));
    }
    let valid = read_valid(LOSS, valid_nhw, [n, h, w])?;
    let whole = |at: usize| at / w % h < h / patch * patch && at % w < w / patch * patch;
    let pixels = valid.iter().enumerate().filter(|&(at, &v)| v == 1 && whole(at)).count().max(1) as f64;
    let teacher = teacher_ndhw.detach().to_device(&Device::Cpu)?.contiguous()?;
    graded(student_ndhw, Contrast { n, d, h, w, patch, groups, temperature, teacher, valid, pixels })
}

fn check(cfg: &OmniContrast, d: usize) -> Result<()> {
    let OmniContrast { patch, groups, temperature } = *cfg;
    if patch == 0 {
        return Err(LossError::config(
            format!("{LOSS}: patch is 0"),
            "give the side of a patch in pixels, Af-DCD takes 4",
        ));
    }
    if groups < 2 || !d.is_multiple_of(groups) {
        return Err(LossError::config(
            format!("{LOSS}: groups is {groups}, expected at least 2 and a divisor of the {d} channels"),
            "one group has no negatives; Af-DCD takes 16 groups",
        ));
    }
    if !(temperature.is_finite() && temperature > 0.0) {
        return Err(LossError::config(
            format!("{LOSS}: temperature is {temperature}"),
            "give a finite temperature above 0; Af-DCD takes 0.07",
        ));
    }
    Ok(())
}

struct Contrast {
    n: usize,
    d: usize,
    h: usize,
    w: usize,
    patch: usize,
    groups: usize,
    temperature: f64,
    /// `[n, d, h, w]`, on the host, contiguous, without graph.
    teacher: Tensor,
    /// `n * h * w` values, 0 or 1.
    valid: Vec<u8>,
    /// Valid pixels of the batch in whole patches, at least 1.
    pixels: f64,
}

/// The counted pixels of one patch, and room for what is computed of them.
struct Patch<T> {
    /// Offsets of its counted pixels in a band of rows.
    pixels: Vec<usize>,
    /// Vectors of the student, `[d / groups, len]`: a column for each group and pixel, by group.
    student: Vec<T>,
    /// The teacher's.
    teacher: Vec<T>,
    /// Distances of one of the student's vectors from the teacher's, then their weights, `len`.
    row: Vec<T>,
}

impl Contrast {
    /// The sum over the anchors of one band of patches, rows `start / w..` of an image; `rows`, unless empty, become the
    /// gradient of its `1 / pixels`-fold.
    fn band<T: Real>(&self, maps: [&[T]; 2], image: usize, start: usize, rows: &mut [&mut [T]]) -> f64 {
        let Self { d, h, w, patch: side, groups, .. } = *self;
        let m = h * w;
        if start + side * w > m {
            return 0.0; // the rows after the last whole patch
        }
        let valid = &self.valid[image * m + start..][..side * w];
        let most = (groups * side * side).next_multiple_of(LANES);
        let room = || Vec::with_capacity(d / groups * most);
        let mut patch = Patch { pixels: Vec::new(), student: room(), teacher: room(), row: vec![T::zero(); most] };
        let mut sum = 0.0;
        for left in (0..w / side).map(|at| at * side) {
            let offsets = (0..side * side).map(|at| at / side * w + left + at % side);
            patch.pixels.clear();
            patch.pixels.extend(offsets.filter(|&at| valid[at] == 1));
            if patch.pixels.is_empty() {
                continue;
            }
            let plane = |map: usize, channel: usize| &maps[map][(image * d + channel) * m + start..][..side * w];
            let n_padded = (groups * patch.pixels.len()).next_multiple_of(LANES);
            for (map, vectors) in [&mut patch.student, &mut patch.teacher].into_iter().enumerate() {
                vectors.clear();
                for k in 0..d / groups {
                    for group in 0..groups {
                        let plane = plane(map, group * (d / groups) + k);
                        vectors.extend(patch.pixels.iter().map(|&at| plane[at]));
                    }
                    vectors.resize((k + 1) * n_padded, T::zero());
                }
            }
            patch.row.resize(n_padded, T::zero());
            sum += vectorised(
                #[inline(always)]
                || self.anchors(&mut patch, rows),
            );
        }
        sum
    }

    /// The sum over the anchors of one patch, with its gradient.
    #[inline(always)]
    fn anchors<T: Real>(&self, patch: &mut Patch<T>, rows: &mut [&mut [T]]) -> f64 {
        let Self { d, groups, temperature, .. } = *self;
        let Patch { pixels, student, teacher, row } = patch;
        let (size, n_padded, far) = (pixels.len(), row.len(), T::narrow(f64::INFINITY));
        let cold = T::narrow(1.0 / temperature);
        let step = -1.0 / (temperature * self.pixels);
        let mut sum = 0.0;
        for anchor in 0..groups * size {
            for (at, distances) in row.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                let mut total = [T::zero(); LANES];
                for (s, t) in student.chunks_exact(n_padded).zip(teacher.chunks_exact(n_padded)) {
                    let (s, t) = (s[anchor], &t.as_chunks::<LANES>().0[at]);
                    for i in 0..LANES {
                        let (over, under) = (s - t[i], t[i] - s);
                        total[i] += if over > under { over } else { under };
                    }
                }
                *distances = total;
            }
            // Neither the same group at another pixel nor the padding takes part.
            let positive = row[anchor];
            row[anchor / size * size..][..size].fill(far);
            row[groups * size..].fill(far);
            row[anchor] = positive;
            let least = least(row);
            for weight in row.iter_mut() {
                *weight = ((least - *weight) * cold).exp();
            }
            let [total] = block_sums(
                [&**row],
                #[inline(always)]
                |[weight]| [weight],
            );
            sum += total.ln() + ((positive - least) * cold).wide();
            if rows.is_empty() {
                continue;
            }
            row[anchor] -= T::narrow(total);
            let step = step / total;
            let (group, pixel) = (anchor / size, pixels[anchor % size]);
            for (k, (s, t)) in student.chunks_exact(n_padded).zip(teacher.chunks_exact(n_padded)).enumerate() {
                let s = s[anchor];
                let [slope] = block_sums(
                    [&**row, t],
                    #[inline(always)]
                    |[weight, t]| {
                        let over = if s > t { weight } else { T::zero() };
                        let under = if s < t { weight } else { T::zero() };
                        [over - under]
                    },
                );
                rows[group * (d / groups) + k][pixel] = T::narrow(step * slope);
            }
        }
        sum
    }
}

/// The least of the distances, whose number is a multiple of [`LANES`]; NaN is passed over, and seen in the sums.
#[inline(always)]
fn least<T: Real>(row: &[T]) -> T {
    let mut lanes = [T::narrow(f64::INFINITY); LANES];
    for chunk in row.as_chunks::<LANES>().0 {
        for i in 0..LANES {
            lanes[i] = if chunk[i] < lanes[i] { chunk[i] } else { lanes[i] };
        }
    }
    for half in [16, 8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] = if lanes[i + half] < lanes[i] { lanes[i + half] } else { lanes[i] };
        }
    }
    lanes[0]
}

impl HostLoss for Contrast {
    const NAME: &'static str = LOSS;

    fn evaluate<T: Real>(&self, student: &[T], with_grad: bool) -> candle_core::Result<Graded<T>> {
        let Self { n, d, h, w, patch, .. } = *self;
        with_slice(&self.teacher, |teacher: &[T]| {
            let maps = [student, teacher];
            let (grad, sums): (Vec<T>, Vec<f64>) = if with_grad {
                pixel_runs([n, d, h * w], patch * w, |image, start, rows| self.band(maps, image, start, rows))
            } else {
                let n_bands = h / patch;
                let band = |at: usize| self.band(maps, at / n_bands, at % n_bands * patch * w, &mut []);
                (Vec::new(), (0..n * n_bands).into_par_iter().map(band).collect())
            };
            Ok(Graded { value: sums.iter().sum::<f64>() / self.pixels, grad })
        })
    }
}

//! Intra-class feature variation (IFVD): how alike a pixel is to the mean of its class.

use candle_core::{Device, Tensor};
use rayon::prelude::*;
use segdistill_ops::{pixel_runs, vectorised};

use crate::error::{LossError, Result};
use crate::graded::{Graded, HostLoss, graded};
use crate::host::{Real, with_slice};
use crate::mask::{grid_dims, logits_dims, place, read_map, read_valid, same_dtype};

const LOSS: &str = "ifvd";
/// Pixels of one task: their sums stay in a core's first cache while the channels pass by.
const RUN: usize = 1024;
/// Norms up to this one give no direction: the epsilon of PyTorch's `CosineSimilarity`.
const EPSILON: f64 = 1e-8;
/// Values of a label: a table of so many entries is read without a check.
const LABELS: usize = 256;

/// Settings of [`ifvd`](crate::ifvd()).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ifvd {
    /// Classes that labels count, at least 1. CIRKD weighs the loss 20.
    pub n_classes: usize,
}

/// Squared difference of the two networks' similarities between a pixel and the mean of its class, averaged over the
/// valid pixels of the batch.
///
/// `L = 1/|V| * sum_{i in V} (cos^s(i) - cos^t(i))^2` with `cos(i) = F(i) . P / (||F(i)|| ||P||)` and the prototype `P`
/// of the pixel's class, the mean of `F` over the valid pixels of that class in its image. `|V|` counts the valid pixels
/// of the batch.
///
/// # Shapes
/// - `student_ndhw`, `teacher_ndhw`: `[n, _, h, w]`, f32 or f64, each with channels of its own
/// - `labels_nhw`: `[n, h, w]` u8 on the maps' grid, in `0..n_classes` where valid; never read elsewhere
/// - `valid_nhw`: `[n, h, w]` u8, 1 where counted, 0 elsewhere
/// - returns `[]` of the maps' type
/// # Gradient
/// To the student, through the pixels and through their prototypes, 0 at pixels that do not count; the teacher is
/// detached here. A pixel or prototype whose norm is at most 1e-8 has no direction: its cosines are 0 and pass no
/// gradient. With no valid pixel value and gradient are 0. The loss is blind to the length of a pixel's features but for
/// its share in the prototype, and a class of one pixel has `cos = 1`.
/// # Errors
/// `Shape` when batch or grid of student, teacher, labels and mask differ (nothing is resized here); `DType`, also when
/// the two networks' types differ; `Label` for a label outside `0..n_classes` at a valid pixel; `Mask` for a mask value
/// above 1; `Config` without classes.
/// # Source
/// Wang et al. 2020, equations 1 to 3; CIRKD `losses/ifvd.py`. DIFFERENCE: in the public code a void pixel is its own
/// prototype, adds 0 to the sum and 1 to `|V|`; here it is not counted, so that with void pixels ours is `n h w / |V|`
/// times as large. PyTorch's cosine bounds norms from below by 1e-8 and passes gradients of up to 1e8 to features of 0,
/// ours passes none. Values do not depend on the number of threads; sums are taken in f64. Maps on another device are
/// brought to the host.
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use segdistill_losses::{Ifvd, ifvd};
/// // Two pixels of one class: at right angles for the student, equal for the teacher.
/// let student = Tensor::new(&[[[[1f64, 0.0]], [[0.0, 1.0]]]], &Device::Cpu)?;
/// let teacher = Tensor::new(&[[[[2f64, 2.0]]]], &Device::Cpu)?;
/// let labels = Tensor::zeros((1, 1, 2), DType::U8, &Device::Cpu)?;
/// let valid = Tensor::ones((1, 1, 2), DType::U8, &Device::Cpu)?;
/// let loss = ifvd(&student, &teacher, &labels, &valid, &Ifvd { n_classes: 19 })?.to_scalar::<f64>()?;
/// assert!((loss - (1.0 - 0.5f64.sqrt()).powi(2)).abs() < 1e-15);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn ifvd(
    student_ndhw: &Tensor,
    teacher_ndhw: &Tensor,
    labels_nhw: &Tensor,
    valid_nhw: &Tensor,
    cfg: &Ifvd,
) -> Result<Tensor> {
    let dims = logits_dims(LOSS, "student_ndhw", student_ndhw)?;
    let [n, d_student, h, w] = dims;
    let [_, d_teacher, ..] = grid_dims(LOSS, "teacher_ndhw", teacher_ndhw, dims)?;
    same_dtype(LOSS, "teacher_ndhw", student_ndhw, teacher_ndhw)?;
    if cfg.n_classes == 0 {
        return Err(LossError::config(format!("{LOSS}: n_classes is 0"), "give the number of classes of the labels"));
    }
    let grid = [n, h, w];
    let mut classes = read_map(LOSS, "labels_nhw", labels_nhw, grid)?;
    let valid = read_valid(LOSS, valid_nhw, grid)?;
    for (at, (class, &counted)) in classes.iter_mut().zip(&valid).enumerate() {
        if counted == 0 {
            *class = 0;
        } else if usize::from(*class) >= cfg.n_classes {
            let [image, row, column] = place(at, grid);
            return Err(LossError::Label { image, row, column, value: *class, n_classes: cfg.n_classes });
        }
    }
    let k = cfg.n_classes.min(LABELS);
    let (segments, sizes) = segments(&classes, &valid, h * w, k);
    let pixels = valid.iter().filter(|&&v| v == 1).count().max(1) as f64;
    let teacher = teacher_ndhw.detach().to_device(&Device::Cpu)?.contiguous()?;
    let m = h * w;
    graded(
        student_ndhw,
        Variation { n, d: [d_student, d_teacher], m, k, teacher, valid, classes, segments, sizes, pixels },
    )
}

/// Consecutive valid pixels of one class in one image.
#[derive(Clone, Copy)]
struct Segment {
    class: usize,
    /// First pixel of the image, and one past the last.
    start: usize,
    end: usize,
}

/// The segments of each image, and the valid pixels of each class, `[n, k]`.
fn segments(classes: &[u8], valid: &[u8], m: usize, k: usize) -> (Vec<Vec<Segment>>, Vec<f64>) {
    let mut sizes = Vec::new();
    let of_image = |(classes, valid): (&[u8], &[u8])| {
        let mut segments: Vec<Segment> = Vec::new();
        let first = sizes.len();
        sizes.resize(first + k, 0.0);
        for at in (0..m).filter(|&at| valid[at] == 1) {
            let class = usize::from(classes[at]);
            sizes[first + class] += 1.0;
            match segments.last_mut() {
                Some(last) if last.end == at && last.class == class => last.end += 1,
                _ => segments.push(Segment { class, start: at, end: at + 1 }),
            }
        }
        segments
    };
    let segments = classes.chunks(m).zip(valid.chunks(m)).map(of_image).collect();
    (segments, sizes)
}

struct Variation {
    n: usize,
    /// Channels of student and teacher.
    d: [usize; 2],
    /// Pixels of an image.
    m: usize,
    /// Classes, at most [`LABELS`].
    k: usize,
    /// `[n, d_t, h, w]`, on the host, contiguous, without graph.
    teacher: Tensor,
    /// `n * m` values, 0 or 1.
    valid: Vec<u8>,
    /// `n * m` classes, 0 where not valid.
    classes: Vec<u8>,
    /// Of each image.
    segments: Vec<Vec<Segment>>,
    /// Valid pixels of each class, `[n, k]`.
    sizes: Vec<f64>,
    /// Valid pixels of the batch, at least 1.
    pixels: f64,
}

/// What one network's features say.
struct Cosines {
    /// Unit prototypes, `[n, d, k]`, 0 without direction.
    units: Vec<f64>,
    /// Inverse norms of the prototypes, `[n, k]`, 0 without direction.
    scales: Vec<f64>,
    /// For each image the pixels' cosines and inverse norms, `[n, 2, m]`, 0 where not valid or without direction.
    pixels: Vec<f64>,
}

fn inverse(norm_squared: f64) -> f64 {
    let norm = norm_squared.sqrt();
    if norm <= EPSILON { 0.0 } else { 1.0 / norm }
}

impl Variation {
    /// Sums of `value(pixel of the batch, feature)` over the pixels of each class, `[n, d, k]`.
    fn class_sums<T: Real>(&self, map: &[T], d: usize, value: impl Fn(usize, T) -> f64 + Sync) -> Vec<f64> {
        const LANES: usize = 8;
        let Self { n, m, k, .. } = *self;
        let mut sums = vec![0.0; n * d * k];
        sums.par_chunks_mut(k).zip(map.par_chunks(m)).enumerate().for_each(|(at, (sums, plane))| {
            let image = at / d;
            vectorised(
                #[inline(always)]
                || {
                    for &Segment { class, start, end } in &self.segments[image] {
                        let mut lanes = [0.0; LANES];
                        let first = image * m + start;
                        let (chunks, rest) = plane[start..end].as_chunks::<LANES>();
                        for (at, chunk) in chunks.iter().enumerate() {
                            for i in 0..LANES {
                                lanes[i] += value(first + at * LANES + i, chunk[i]);
                            }
                        }
                        for (i, &f) in rest.iter().enumerate() {
                            lanes[i] += value(first + chunks.len() * LANES + i, f);
                        }
                        sums[class] += lanes.iter().sum::<f64>();
                    }
                },
            );
        });
        sums
    }

    fn cosines<T: Real>(&self, map: &[T], d: usize) -> Cosines {
        let Self { n, m, k, .. } = *self;
        let mut units = self.class_sums(map, d, |_, f| f.wide());
        let mut scales = vec![0.0; n * k];
        for ((units, scales), sizes) in units.chunks_mut(d * k).zip(scales.chunks_mut(k)).zip(self.sizes.chunks(k)) {
            for class in 0..k {
                let size = sizes[class].max(1.0);
                let column = || (class..d * k).step_by(k);
                column().for_each(|at| units[at] /= size);
                scales[class] = inverse(column().map(|at| units[at] * units[at]).sum());
                column().for_each(|at| units[at] *= scales[class]);
            }
        }
        let fill = |image: usize, start: usize, rows: &mut [&mut [f64]]| {
            let [dots, squares] = rows else { unreachable!("two rows were asked for") };
            let len = dots.len();
            let run = image * m + start..image * m + start + len;
            let (classes, valid) = (&self.classes[run.clone()], &self.valid[run]);
            let (dots, squares) = (&mut dots[..len], &mut squares[..len]);
            let mut table = [0.0; LABELS];
            vectorised(
                #[inline(always)]
                || {
                    for channel in 0..d {
                        let plane = image * d + channel;
                        table[..k].copy_from_slice(&units[plane * k..][..k]);
                        let row = &map[plane * m + start..][..len];
                        for i in 0..len {
                            let f = row[i].wide();
                            dots[i] += f * table[usize::from(classes[i])];
                            squares[i] += f * f;
                        }
                    }
                    for i in 0..len {
                        let scale = inverse(squares[i]);
                        // A choice, not a product: a void pixel may hold anything, NaN included.
                        (dots[i], squares[i]) = if valid[i] == 1 { (dots[i] * scale, scale) } else { (0.0, 0.0) };
                    }
                },
            );
        };
        let pixels = pixel_runs([n, 2, m], RUN, fill).0;
        Cosines { units, scales, pixels }
    }

    /// `dL/dF` from `dL/dcos` of each pixel, `[n * m]`.
    fn gradient<T: Real>(&self, student: &[T], cosines: &Cosines, slopes: &[f64]) -> Vec<T> {
        let Self { n, d: [d, _], m, k, .. } = *self;
        // dcos/dF = (u_P - cos u_F) / ||F||, without what the prototype passes on.
        let mut along = vec![0.0; n * m];
        let mut back = vec![0.0; n * m];
        let mut turns = vec![0.0; n * k];
        for at in 0..n * m {
            let (image, pixel) = (at / m, at % m);
            let [cosine, scale] = [0, m].map(|row| cosines.pixels[image * 2 * m + row + pixel]);
            along[at] = slopes[at] * scale;
            back[at] = slopes[at] * cosine * scale * scale;
            turns[image * k + usize::from(self.classes[at])] += slopes[at] * cosine;
        }
        // A pixel's share of dL/dP: sum_j g_j (u_j - cos_j u_P) / ||P|| over the class, divided by its size.
        let mut shares = self.class_sums(student, d, |pixel, f| f.wide() * along[pixel]);
        for (at, share) in shares.iter_mut().enumerate() {
            let class = at / (d * k) * k + at % k;
            let scale = cosines.scales[class] / self.sizes[class].max(1.0);
            *share = scale * (*share - turns[class] * cosines.units[at]);
        }
        let fill = |plane: usize, _: usize, rows: &mut [&mut [T]]| {
            let run = plane / d * m..(plane / d + 1) * m;
            let (classes, valid) = (&self.classes[run.clone()], &self.valid[run.clone()]);
            let (along, back) = (&along[run.clone()], &back[run]);
            let (grad, features) = (&mut rows[0][..m], &student[plane * m..][..m]);
            let [units, shares] = [&cosines.units, &shares].map(|values| {
                let mut table = [0.0; LABELS];
                table[..k].copy_from_slice(&values[plane * k..][..k]);
                table
            });
            vectorised(
                #[inline(always)]
                || {
                    for i in 0..m {
                        let class = usize::from(classes[i]);
                        let value = along[i] * units[class] - back[i] * features[i].wide() + shares[class];
                        grad[i] = if valid[i] == 1 { T::narrow(value) } else { T::zero() };
                    }
                },
            );
        };
        pixel_runs([n * d, 1, m], m, fill).0
    }
}

impl HostLoss for Variation {
    const NAME: &'static str = LOSS;

    fn evaluate<T: Real>(&self, student: &[T], with_grad: bool) -> candle_core::Result<Graded<T>> {
        let m = self.m;
        let of_teacher = with_slice(&self.teacher, |teacher: &[T]| Ok(self.cosines(teacher, self.d[1]).pixels))?;
        let of_student = self.cosines(student, self.d[0]);
        let rows = of_student.pixels.chunks(2 * m).zip(of_teacher.chunks(2 * m));
        let gaps: Vec<f64> = rows.flat_map(|(s, t)| s.iter().zip(t).take(m).map(|(s, t)| s - t)).collect();
        let value = gaps.iter().map(|gap| gap * gap).sum::<f64>() / self.pixels;
        let grad = if with_grad {
            let slopes: Vec<f64> = gaps.iter().map(|gap| 2.0 / self.pixels * gap).collect();
            self.gradient(student, &of_student, &slopes)
        } else {
            Vec::new()
        };
        Ok(Graded { value, grad })
    }
}

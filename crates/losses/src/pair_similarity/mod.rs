//! Pair-wise distillation (SKD): the student should find the same places alike as the teacher does.
//!
//! [`linear`] computes the loss over channels, in time linear in the number of nodes, `direct` over pairs of nodes; the
//! value is the same.

use candle_core::{Device, Tensor};
use rayon::prelude::*;
use segdistill_ops::{MatMut, MatRef};

use crate::error::{LossError, Result};
use crate::graded::{Graded, HostLoss, graded};
use crate::host::{Real, with_slice};
use crate::mask::{grid_dims, logits_dims, read_valid, same_dtype};
use crate::nodes::{NodeKind, Nodes, Normal, Units};

mod linear;

const LOSS: &str = "pair_similarity";
/// Added to norms before the division, as SKD's code does.
const ADDED: f64 = 1e-8;
/// Most nodes whose pairs are taken one by one: two matrices of 8 MiB.
const MOST_DIRECT: usize = 1024;

/// What stands for a node in [`pair_similarity`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodePooling {
    /// Height and width in pixels of the windows, which lie side by side; the last of a row or column may be smaller.
    pub kernel: [usize; 2],
    /// What a window makes of its pixels.
    pub kind: NodeKind,
}

/// What the sum over pairs of nodes is divided by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PairNormaliser {
    /// The pairs of nodes that count, of each image, and the images: a mean.
    #[default]
    Paper,
    /// The pairs of nodes of the grid, whether they count or not, and the images. Without void the two are equal.
    Code,
}

/// Settings of [`pair_similarity`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PairSimilarity {
    /// Windows whose pixels make a node together; `None` takes every pixel as a node.
    pub nodes: Option<NodePooling>,
    /// What the sum is divided by.
    pub normaliser: PairNormaliser,
    /// Whether the gradient takes the norms of the feature vectors for constants.
    pub detach_norm: bool,
}

impl PairSimilarity {
    /// As SKD's code has it for features of height `h` and width `w`: windows of half the height and width, so that
    /// 65 x 65 pixels are 3 x 3 nodes; maximum; norms taken for constants.
    pub fn skd(h: usize, w: usize) -> Self {
        let kernel = [(h / 2).max(1), (w / 2).max(1)];
        Self {
            nodes: Some(NodePooling { kernel, kind: NodeKind::Max }),
            normaliser: PairNormaliser::Code,
            detach_norm: true,
        }
    }
}

/// Pair-wise similarity loss: squared difference of the two networks' cosines over all pairs of nodes of an image.
///
/// `L = 1/n * sum_images 1/m^2 * sum_{i,j} (a^s_ij - a^t_ij)^2` with `a_ij = f_i . f_j`, `f = z / (||z|| + 1e-8)` over the
/// channels. A node is a pixel, or with `nodes` a window, of which it takes channel by channel the maximum or the mean.
/// Only valid pixels are nodes or are pooled, and a window without any is no node. `m` counts the nodes of the image
/// ([`PairNormaliser::Paper`]) or of the grid ([`PairNormaliser::Code`]). An image without nodes adds 0, and is counted
/// in `n`.
///
/// # Shapes
/// - `student_ndhw`: `[n, d_s, h, w]`, `teacher_ndhw`: `[n, d_t, h, w]`, f32 or f64; each has channels of its own
/// - `valid_nhw`: `[n, h, w]` u8 on the same grid, 1 where counted, 0 elsewhere
/// - returns `[]` of the student's type
/// # Gradient
/// Reaches the student only. With `detach_norm` it is that of `z / constant`, which is not the derivative of the value:
/// it keeps the part along `z`, so that it can change the length of `z`, which no similarity depends on. A pixel that
/// does not count moves nothing; of equal maxima the first in reading order gets the gradient. A feature vector of
/// norm up to 1e-12 has `f = 0` and gets gradient 0.
/// # Errors
/// `Shape` when grids or batches differ (nothing is resized here); `DType`; `Mask` for a mask value above 1; `Config`
/// for windows of 0 pixels.
/// # Source
/// Liu et al., CVPR 2019, equation 3; structure_knowledge_distillation `utils/criterion.py`. DIFFERENCE: that one pools
/// void pixels as well, and sends an unbounded gradient to a zero vector. Time `(d_s + d_t)^2 m`, memory linear in `m`:
/// with many nodes the sum over pairs is one over pairs of channels, in f64 where it is small against its parts. Values
/// do not depend on the number of threads.
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use segdistill_losses::{PairSimilarity, pair_similarity};
/// // Two pixels: orthogonal for the student, equal for the teacher, so two of four pairs differ by 1.
/// let student = Var::new(&[[[[1f32, 0.0]], [[0.0, 2.0]]]], &Device::Cpu)?;
/// let teacher = Tensor::new(&[[[[3f32, 1.0]]]], &Device::Cpu)?;
/// let valid = Tensor::ones((1, 1, 2), DType::U8, &Device::Cpu)?;
/// let loss = pair_similarity(&student, &teacher, &valid, &PairSimilarity::default())?;
/// assert!((loss.to_scalar::<f32>()? - 0.5).abs() < 1e-6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn pair_similarity(
    student_ndhw: &Tensor,
    teacher_ndhw: &Tensor,
    valid_nhw: &Tensor,
    cfg: &PairSimilarity,
) -> Result<Tensor> {
    let dims = logits_dims(LOSS, "student_ndhw", student_ndhw)?;
    let [n, d_student, h, w] = dims;
    let [_, d_teacher, ..] = grid_dims(LOSS, "teacher_ndhw", teacher_ndhw, dims)?;
    same_dtype(LOSS, "teacher_ndhw", student_ndhw, teacher_ndhw)?;
    if let Some(NodePooling { kernel, .. }) = cfg.nodes
        && kernel.contains(&0)
    {
        return Err(LossError::config(
            format!("nodes.kernel is {kernel:?}, expected at least 1 pixel each way"),
            "give None for every pixel, or PairSimilarity::skd(h, w)",
        ));
    }
    let valid = read_valid(LOSS, valid_nhw, [n, h, w])?;
    let of_image = |valid: &[u8]| match cfg.nodes {
        None => Nodes::pixels(valid),
        Some(NodePooling { kernel, .. }) => Nodes::windows(valid, [h, w], kernel),
    };
    let nodes: Vec<Nodes> = valid.chunks(h * w).map(of_image).collect();
    let kernel = cfg.nodes.map_or([1, 1], |pooling| pooling.kernel);
    let grid = h.div_ceil(kernel[0]) * w.div_ceil(kernel[1]);
    let scale = |nodes: &Nodes| {
        let counted = match cfg.normaliser {
            PairNormaliser::Paper => nodes.len() as f64,
            PairNormaliser::Code => grid as f64,
        };
        // An image without nodes has no pairs to multiply this with.
        if counted > 0.0 { 1.0 / (n as f64 * counted * counted) } else { 0.0 }
    };
    let scales = nodes.iter().map(scale).collect();
    let teacher = teacher_ndhw.detach().to_device(&Device::Cpu)?.contiguous()?;
    let kind = cfg.nodes.map_or(NodeKind::Average, |pooling| pooling.kind);
    let normal = Normal { kind, added: ADDED, detached: cfg.detach_norm };
    graded(student_ndhw, Task { d: [d_student, d_teacher], m: h * w, teacher, nodes, scales, normal })
}

struct Task {
    /// Channels of student and teacher.
    d: [usize; 2],
    /// Pixels of a map.
    m: usize,
    /// `[n, d_t, h, w]`, on the host, contiguous, without graph.
    teacher: Tensor,
    /// Of each image.
    nodes: Vec<Nodes>,
    /// Weight of each image's sum over pairs.
    scales: Vec<f64>,
    normal: Normal,
}

/// The features of one image, and what stands for its nodes.
#[derive(Clone, Copy)]
struct Image<'a, T> {
    student: &'a [T],
    teacher: &'a [T],
    nodes: &'a Nodes,
    /// Weight of the sum over pairs.
    scale: f64,
    m: usize,
    normal: Normal,
}

impl<T: Real> Image<'_, T> {
    /// Unit vectors of nodes `first..first + len`, `[d_s + d_t, len]`, the teacher's below the student's.
    fn units<C: Real>(&self, first: usize, len: usize) -> Units<C> {
        let mut units = Units::new(self.student, self.m, self.nodes, first, len, self.normal);
        units.f.extend(Units::<C>::new(self.teacher, self.m, self.nodes, first, len, self.normal).f);
        units
    }
}

impl HostLoss for Task {
    const NAME: &'static str = LOSS;

    fn evaluate<T: Real>(&self, student: &[T], with_grad: bool) -> candle_core::Result<Graded<T>> {
        let ([d_student, d_teacher], m) = (self.d, self.m);
        with_slice(&self.teacher, |teacher| {
            let mut grad = vec![T::zero(); if with_grad { student.len() } else { 0 }];
            let mut rows: Vec<&mut [T]> = grad.chunks_mut(d_student * m).collect();
            rows.resize_with(self.nodes.len(), Default::default);
            let value = |(i, grad): (usize, &mut [T])| {
                let image = Image {
                    student: &student[i * d_student * m..][..d_student * m],
                    teacher: &teacher[i * d_teacher * m..][..d_teacher * m],
                    nodes: &self.nodes[i],
                    scale: self.scales[i],
                    m,
                    normal: self.normal,
                };
                match image.nodes.len() {
                    0 => 0.0,
                    v if v <= MOST_DIRECT.min(d_student + d_teacher) => direct(&image, grad),
                    _ => linear::evaluate(&image, grad),
                }
            };
            let values: Vec<f64> = rows.into_par_iter().enumerate().map(value).collect();
            Ok(Graded { value: values.iter().sum(), grad })
        })
    }
}

/// One image's share of the loss over pairs of nodes, in f64, and its gradient `[d_s, m]` unless `grad` is empty.
fn direct<T: Real>(image: &Image<'_, T>, grad: &mut [T]) -> f64 {
    let v = image.nodes.len();
    let d = image.student.len() / image.m;
    let units = image.units::<f64>(0, v);
    let [mut gaps, mut cosines] = [(); 2].map(|()| vec![0.0; v * v]);
    let (student, teacher) = units.f.split_at(d * v);
    for (dst, f) in [(&mut gaps, student), (&mut cosines, teacher)] {
        let f = MatRef::row_major(f, f.len() / v, v);
        f64::product(MatMut::row_major(dst, v, v), f.transposed(), f);
    }
    for (gap, cosine) in gaps.iter_mut().zip(&cosines) {
        *gap -= cosine;
    }
    if !grad.is_empty() {
        // dL/df_i = 4 scale sum_j (a^s_ij - a^t_ij) f_j: 2 from the square, 2 since the pair comes twice.
        let mut grad_f = vec![0.0; d * v];
        f64::product(
            MatMut::row_major(&mut grad_f, d, v),
            MatRef::row_major(student, d, v),
            MatRef::row_major(&gaps, v, v),
        );
        units.chain(&mut grad_f, 4.0 * image.scale);
        for (channel, row) in grad.chunks_mut(image.m).enumerate() {
            units.spread(image.nodes, &grad_f, channel, row);
        }
    }
    image.scale * gaps.iter().map(|gap| gap * gap).sum::<f64>()
}

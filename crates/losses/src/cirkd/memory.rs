//! Similarities between the pixels of a batch and vectors kept in a memory, a few hundred pixels at a time.

use candle_core::{Device, Tensor};
use rayon::prelude::*;
use segdistill_ops::{MatMut, MatRef, gemm, vectorised};

use super::{LANES, RowSums, WIDEST, check_range, check_temperature};
use crate::error::{LossError, Result};
use crate::graded::{Graded, HostLoss, graded};
use crate::host::{Real, with_slice};
use crate::mask::{pair_dims, read_valid, same_dtype};
use crate::nodes::{NodeKind, Nodes, Normal, Units};

const LOSS: &str = "memory_contrast";
/// Pixels of a task.
const ANCHORS: usize = 128;
/// Most slots of a tile: with a task's pixels, two tiles in f32 stay in a level 2 cache.
const SLOTS: usize = 512;

/// Settings of [`memory_contrast`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MemoryContrast {
    /// What similarities are divided by to become logits.
    pub temperature: f64,
    /// What the logits are divided by before the softmax; the loss is multiplied by its square.
    pub kd_temperature: f64,
}

impl MemoryContrast {
    /// Temperature 0.1, and 1 for the distillation: of the pixel memory and of the region memory alike.
    pub fn cirkd() -> Self {
        Self { temperature: 0.1, kd_temperature: 1.0 }
    }
}

impl Default for MemoryContrast {
    fn default() -> Self {
        Self::cirkd()
    }
}

/// Relations to remembered vectors: Kullback-Leibler divergence between the networks' distributions of similarities
/// over the slots of a memory, averaged over the valid pixels of the batch.
///
/// `L = T^2 * 1/|V| * sum_{x in V} sum_b p^t_xb (log p^t_xb - log p^s_xb)` with `T = kd_temperature`,
/// `p_xb = softmax_b(f_x . u_b / (temperature T))`, `f = z / ||z||` over the channels and `u_b` the slots as they are.
/// The same function serves a memory of pixels and one of regions.
///
/// # Shapes
/// - `student_ndhw`, `teacher_ndhw`: `[n, d, h, w]`, equal, f32 or f64; the student's after its projection to the
///   teacher's channels
/// - `bank_bd`: `[b, d]` of the same type, rows of unit length
/// - `valid_nhw`: `[n, h, w]` u8 on the same grid, 1 where counted, 0 elsewhere
/// - returns `[]` of the student's type, in nats
/// # Gradient
/// Reaches the student only: teacher and memory are constants. A pixel that does not count moves nothing; with no valid
/// pixel value and gradient are 0. A feature vector of norm up to 1e-12 has similarity 0 to all and gets gradient 0.
/// # Errors
/// `Shape` when the maps, the mask or the slots' channels differ, or no slot is given; `DType`; `Mask` for a mask value
/// above 1; `Config` for a temperature that is not above 0, or a product of the two below 1/300.
/// # Source
/// Yang et al., CVPR 2022, section 3.3; CIRKD `losses/cirkd_memory.py`. Values do not depend on the number of threads.
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use segdistill_losses::{MemoryContrast, memory_contrast};
/// // One pixel, like the first slot for the student and between the two for the teacher.
/// let student = Var::new(&[[[[2f64]], [[0.0]]]], &Device::Cpu)?;
/// let teacher = Tensor::new(&[[[[1f64]], [[1.0]]]], &Device::Cpu)?;
/// let bank = Tensor::new(&[[1f64, 0.0], [0.0, 1.0]], &Device::Cpu)?;
/// let valid = Tensor::ones((1, 1, 1), DType::U8, &Device::Cpu)?;
/// let cfg = MemoryContrast { temperature: 1.0, kd_temperature: 1.0 };
/// let loss = memory_contrast(&student, &teacher, &bank, &valid, &cfg)?.to_scalar::<f64>()?;
/// // softmax(1, 0) against (1/2, 1/2)
/// assert!((loss - ((1.0 + 1f64.exp()).ln() - 2f64.ln() - 0.5)).abs() < 1e-12);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn memory_contrast(
    student_ndhw: &Tensor,
    teacher_ndhw: &Tensor,
    bank_bd: &Tensor,
    valid_nhw: &Tensor,
    cfg: &MemoryContrast,
) -> Result<Tensor> {
    let [n, d, h, w] = pair_dims(LOSS, ["student_ndhw", "teacher_ndhw"], student_ndhw, teacher_ndhw)?;
    match *bank_bd.dims() {
        [b, found] if b > 0 && found == d => {}
        ref found => {
            return Err(LossError::shape(
                LOSS,
                format!("bank_bd {found:?}"),
                format!("[b, {d}], one slot at least, with the channels of the maps"),
                "wait until the memory holds something, and project the student to the teacher's channels",
            ));
        }
    }
    same_dtype(LOSS, "bank_bd", student_ndhw, bank_bd)?;
    check_temperature("temperature", cfg.temperature)?;
    check_temperature("kd_temperature", cfg.kd_temperature)?;
    let valid = read_valid(LOSS, valid_nhw, [n, h, w])?;
    let nodes: Vec<Nodes> = valid.chunks(h * w).map(Nodes::pixels).collect();
    let host = |t: &Tensor| t.detach().to_device(&Device::Cpu)?.contiguous();
    let (teacher, bank) = (host(teacher_ndhw)?, host(bank_bd)?);
    let largest = bank.to_dtype(candle_core::DType::F64)?.sqr()?.sum(1)?.to_vec1::<f64>()?;
    // A choice that lets NaN pass, to be seen in the loss.
    let largest = largest.into_iter().fold(0.0, |most: f64, s| if s <= most { most } else { s }).sqrt();
    let rate = 1.0 / (cfg.temperature * cfg.kd_temperature);
    check_range(2.0 * rate * largest)?;
    let factor = cfg.kd_temperature * cfg.kd_temperature;
    graded(student_ndhw, Task { d, m: h * w, teacher, bank, nodes, rate, largest, factor })
}

struct Task {
    d: usize,
    /// Pixels of a map.
    m: usize,
    /// `[n, d, h, w]`, on the host, contiguous, without graph.
    teacher: Tensor,
    /// `[b, d]`, likewise.
    bank: Tensor,
    /// Of each image.
    nodes: Vec<Nodes>,
    /// What similarities are multiplied by.
    rate: f64,
    /// Length of the longest slot: what a similarity may reach.
    largest: f64,
    /// What the mean is multiplied by.
    factor: f64,
}

impl HostLoss for Task {
    const NAME: &'static str = LOSS;

    fn evaluate<T: Real>(&self, student: &[T], with_grad: bool) -> candle_core::Result<Graded<T>> {
        with_slice(&self.teacher, |teacher| {
            with_slice(&self.bank, |bank| {
                Ok(match 2.0 * self.rate * self.largest <= WIDEST[0] {
                    true => self.computed_in::<T, T>(student, teacher, bank, with_grad),
                    false => self.computed_in::<T, f64>(student, teacher, bank, with_grad),
                })
            })
        })
    }
}

/// Some slots of the memory, `[d, len]`.
struct Slots<C> {
    len: usize,
    u: Vec<C>,
}

impl Task {
    fn computed_in<T: Real, C: Real>(&self, student: &[T], teacher: &[T], bank: &[T], with_grad: bool) -> Graded<T> {
        let (d, m) = (self.d, self.m);
        let b = bank.len() / d;
        // Parts of about equal size: a narrow last one would waste the products' vectors.
        let part = b.div_ceil(b.div_ceil(SLOTS));
        let slots: Vec<Slots<C>> = bank
            .chunks(part * d)
            .map(|rows_bd| {
                let len = rows_bd.len() / d;
                let u = (0..d * len).map(|k| C::narrow(rows_bd[k % len * d + k / len].wide())).collect();
                Slots { len, u }
            })
            .collect();
        let n_anchors = self.nodes.iter().map(Nodes::len).sum::<usize>();
        let pieces: Vec<(usize, usize)> = (0..self.nodes.len())
            .flat_map(|image| (0..self.nodes[image].len()).step_by(ANCHORS).map(move |at| (image, at)))
            .collect();
        let weight = self.factor / n_anchors as f64;
        let normal = Normal { kind: NodeKind::Average, added: 0.0, detached: false };
        let piece = |tiles: &mut [Vec<C>; 2], (image, first): (usize, usize)| {
            let nodes = &self.nodes[image];
            let len = ANCHORS.min(nodes.len() - first);
            let units =
                |maps: &[T]| -> Units<C> { Units::new(&maps[image * d * m..][..d * m], m, nodes, first, len, normal) };
            let (student, teacher) = (units(student), units(teacher));
            let sums = self.exponentials(&student, &teacher, &slots, tiles);
            let value = sums.iter().map(|row| row.divergence(self.rate)).sum::<f64>();
            if !with_grad {
                return (image, value, student, Vec::new());
            }
            let mut grad = vec![C::zero(); d * len];
            let mut at = 0;
            let [exp_s, exp_t] = tiles;
            for part in &slots {
                let tile = len * part.len;
                let (weights, teacher) = (&mut exp_s[at..at + tile], &exp_t[at..at + tile]);
                probability_gaps(weights, teacher, &sums, part.len);
                // db,bx->dx
                gemm(
                    MatMut::row_major(&mut grad, d, len),
                    MatRef::row_major(&part.u, d, part.len),
                    MatRef::row_major(weights, len, part.len).transposed(),
                    C::ONE,
                    C::ONE,
                );
                at += tile;
            }
            student.chain(&mut grad, weight * self.rate);
            (image, value, student, grad)
        };
        let buffers = || [(); 2].map(|()| vec![C::zero(); ANCHORS * b]);
        let pieces: Vec<(usize, f64, Units<C>, Vec<C>)> = pieces.into_par_iter().map_init(buffers, piece).collect();
        let value = if n_anchors > 0 { weight * pieces.iter().map(|(_, value, ..)| value).sum::<f64>() } else { 0.0 };
        if !with_grad {
            return Graded { value, grad: Vec::new() };
        }
        let mut grad = vec![T::zero(); student.len()];
        grad.par_chunks_mut(m).enumerate().for_each(|(row, out)| {
            let (image, channel) = (row / d, row % d);
            for (_, _, units, grad) in pieces.iter().filter(|piece| piece.0 == image) {
                units.spread(&self.nodes[image], grad, channel, out);
            }
        });
        Graded { value, grad }
    }

    /// Fills the two buffers with exponentials of student and teacher, tile after tile `[anchors, slots]`, relative to
    /// the largest that a similarity can give; returns the anchors' sums.
    fn exponentials<C: Real>(
        &self,
        student: &Units<C>,
        teacher: &Units<C>,
        slots: &[Slots<C>],
        tiles: &mut [Vec<C>; 2],
    ) -> Vec<RowSums> {
        let len = student.len;
        let mut sums = vec![RowSums::default(); len];
        let (rate, top) = (C::narrow(self.rate), C::narrow(self.rate * self.largest));
        let mut at = 0;
        for part in slots {
            let [exp_s, exp_t] = tiles.each_mut().map(|tile| &mut tile[at..at + len * part.len]);
            for (tile, units) in [(&mut *exp_s, student), (&mut *exp_t, teacher)] {
                // dx,db->xb
                let lhs = MatRef::row_major(&units.f, self.d, len).transposed();
                let rhs = MatRef::row_major(&part.u, self.d, part.len);
                C::product(MatMut::row_major(tile, len, part.len), lhs, rhs);
            }
            vectorised(
                #[inline(always)]
                || {
                    for ((s, t), sums) in exp_s.chunks_mut(part.len).zip(exp_t.chunks_mut(part.len)).zip(&mut sums) {
                        let mut lanes = [[C::zero(); LANES]; 3];
                        let mut add = |s: &mut [C], t: &mut [C]| {
                            for (i, (s, t)) in s.iter_mut().zip(t).enumerate() {
                                let e_s = (*s * rate - top).exp();
                                let e_t = (*t * rate - top).exp();
                                lanes[0][i] += e_s;
                                lanes[1][i] += e_t;
                                lanes[2][i] += e_t * (*t - *s);
                                (*s, *t) = (e_s, e_t);
                            }
                        };
                        let ((whole_s, rest_s), (whole_t, rest_t)) =
                            (s.as_chunks_mut::<LANES>(), t.as_chunks_mut::<LANES>());
                        for (s, t) in whole_s.iter_mut().zip(whole_t) {
                            add(s, t);
                        }
                        add(rest_s, rest_t);
                        let [student, teacher, gap] =
                            lanes.map(|lanes| lanes.iter().map(|lane| lane.wide()).sum::<f64>());
                        sums.student += student;
                        sums.teacher += teacher;
                        sums.gap += gap;
                    }
                },
            );
            at += len * part.len;
        }
        sums
    }
}

/// `p^s - p^t` in place of the student's exponentials.
fn probability_gaps<C: Real>(student: &mut [C], teacher: &[C], sums: &[RowSums], cols: usize) {
    let shares: Vec<[C; 2]> =
        sums.iter().map(|row| [C::narrow(1.0 / row.student), C::narrow(1.0 / row.teacher)]).collect();
    vectorised(
        #[inline(always)]
        || {
            for ((s, t), [share_s, share_t]) in student.chunks_mut(cols).zip(teacher.chunks(cols)).zip(&shares) {
                for (s, t) in s.iter_mut().zip(t) {
                    *s = *s * *share_s - *t * *share_t;
                }
            }
        },
    );
}

//! Similarities between all pixels of a batch, tile by tile.
//!
//! A similarity stands in two rows: that of its one pixel over the image of the other, and the reverse. With all
//! pixels of the batch in one line the similarities are one symmetric matrix, of which each tile right of the diagonal
//! is formed twice and no tile is kept: a first sweep sums exponentials along rows and columns, a second one turns
//! similarities into their gradient and multiplies that with both tiles' unit vectors.
//!
//! A sweep goes in rounds. In each of them every piece of the line meets exactly one other, so that tasks share
//! nothing, and a piece's sums grow round by round, in one order for any number of threads.

use std::sync::{Mutex, PoisonError};

use candle_core::{Device, Tensor};
use rayon::prelude::*;
use segdistill_ops::{MatMut, MatRef, gemm, vectorised};

use super::{LANES, RowSums, WIDEST, check_range, check_temperature};
use crate::error::{LossError, Result};
use crate::graded::{Graded, HostLoss, graded};
use crate::host::{Real, with_slice};
use crate::mask::{grid_dims, logits_dims, read_valid, same_dtype};
use crate::nodes::{NodeKind, Nodes, Normal, Units};

const LOSS: &str = "cirkd_mini_batch";
/// Pixels on a side of a tile: two of them in f32 stay in a level 2 cache.
const TILE: usize = 256;

/// Settings of [`cirkd_mini_batch`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MiniBatchContrast {
    /// What cosines are divided by before the softmax; above 1/300.
    pub temperature: f64,
    /// Side in pixels of the windows that features are averaged over first; `None` takes every pixel.
    pub pooling: Option<usize>,
}

impl MiniBatchContrast {
    /// Temperature 0.1, every pixel.
    pub fn cirkd() -> Self {
        Self { temperature: 0.1, pooling: None }
    }

    /// Of the authors' second version for maps of 256 and more: the same after averages over 4 x 4 pixels.
    pub fn cirkd_v2() -> Self {
        Self { temperature: 0.1, pooling: Some(4) }
    }
}

impl Default for MiniBatchContrast {
    fn default() -> Self {
        Self::cirkd()
    }
}

/// Cross-image pixel relations: Kullback-Leibler divergence between the networks' distributions of similarities over
/// the pixels of each image, averaged over pixels and over ordered pairs of images.
///
/// `L = 1/n^2 * sum_{i,j} 1/V_i * sum_{x in V_i} sum_{y in V_j} p^t_xy (log p^t_xy - log p^s_xy)` with
/// `p_xy = softmax_{y in V_j}(f_x . f_y / temperature)` and `f = z / ||z||` over the channels, `i = j` included. There
/// is no factor `temperature^2`. `V_i` are the valid pixels of image `i`; a pair of which either has none adds 0 and is
/// counted in `n^2`. With `pooling = Some(k)`, pixels are the means of the valid pixels of `k x k` windows (the last of
/// a row or column may be smaller), and a window without valid pixels is none.
///
/// # Shapes
/// - `student_ndhw`: `[n, d_s, h, w]`, `teacher_ndhw`: `[n, d_t, h, w]`, f32 or f64; each has channels of its own
/// - `valid_nhw`: `[n, h, w]` u8 on the same grid, 1 where counted, 0 elsewhere
/// - returns `[]` of the student's type, in nats
/// # Gradient
/// Reaches the student only, each pixel as an anchor and as one that others are compared with. A pixel that does not
/// count moves nothing. A feature vector of norm up to 1e-12 is like no pixel (cosine 0) and gets gradient 0.
/// # Errors
/// `Shape` when grids or batches differ (nothing is resized here); `DType`; `Mask` for a mask value above 1; `Config`
/// for a temperature that is not above 0 or below 1/300, or windows of 0 pixels.
/// # Source
/// Yang et al., CVPR 2022, section 3.2; CIRKD `losses/cirkd_mini_batch.py`, and its second version for the pooling.
/// DIFFERENCE: those take void pixels as anchors and as contrast, here they are neither.
/// Time `m^2 (2 d_s + d_t)` multiply-adds for each ordered pair of images with `m` pixels; no matrix over pixel pairs is
/// stored. Values do not depend on the number of threads. Below a temperature of 1/40, f32 is computed in f64.
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use segdistill_losses::{MiniBatchContrast, cirkd_mini_batch};
/// // Two pixels that are orthogonal for the student and equal for the teacher.
/// let student = Var::new(&[[[[1f64, 0.0]], [[0.0, 2.0]]]], &Device::Cpu)?;
/// let teacher = Tensor::new(&[[[[3f64, 1.0]]]], &Device::Cpu)?;
/// let valid = Tensor::ones((1, 1, 2), DType::U8, &Device::Cpu)?;
/// let cfg = MiniBatchContrast { temperature: 1.0, pooling: None };
/// let loss = cirkd_mini_batch(&student, &teacher, &valid, &cfg)?.to_scalar::<f64>()?;
/// // softmax(1, 0) against (1/2, 1/2)
/// assert!((loss - ((1.0 + 1f64.exp()).ln() - 2f64.ln() - 0.5)).abs() < 1e-12);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn cirkd_mini_batch(
    student_ndhw: &Tensor,
    teacher_ndhw: &Tensor,
    valid_nhw: &Tensor,
    cfg: &MiniBatchContrast,
) -> Result<Tensor> {
    let dims = logits_dims(LOSS, "student_ndhw", student_ndhw)?;
    let [n, d_student, h, w] = dims;
    let [_, d_teacher, ..] = grid_dims(LOSS, "teacher_ndhw", teacher_ndhw, dims)?;
    same_dtype(LOSS, "teacher_ndhw", student_ndhw, teacher_ndhw)?;
    check_temperature("temperature", cfg.temperature)?;
    check_range(2.0 / cfg.temperature)?;
    let valid = read_valid(LOSS, valid_nhw, [n, h, w])?;
    let nodes = valid.chunks(h * w).map(|valid| match cfg.pooling {
        None => Ok(Nodes::pixels(valid)),
        Some(0) => Err(LossError::config("pooling is 0, expected at least 1 pixel", "give None for no pooling")),
        Some(side) => Ok(Nodes::windows(valid, [h, w], [side, side])),
    });
    let nodes = nodes.collect::<Result<_>>()?;
    let teacher = teacher_ndhw.detach().to_device(&Device::Cpu)?.contiguous()?;
    graded(student_ndhw, Task { d: [d_student, d_teacher], m: h * w, teacher, nodes, rate: 1.0 / cfg.temperature })
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
    /// What cosines are multiplied by.
    rate: f64,
}

/// Some pixels of one image.
struct Piece<C> {
    image: usize,
    student: Units<C>,
    teacher: Units<C>,
    /// What an anchor of this image adds to the loss: `1 / (n^2 V)`.
    weight: f64,
}

impl HostLoss for Task {
    const NAME: &'static str = LOSS;

    fn evaluate<T: Real>(&self, student: &[T], with_grad: bool) -> candle_core::Result<Graded<T>> {
        with_slice(&self.teacher, |teacher| {
            Ok(match 2.0 * self.rate <= WIDEST[0] {
                true => self.computed_in::<T, T>(student, teacher, with_grad),
                false => self.computed_in::<T, f64>(student, teacher, with_grad),
            })
        })
    }
}

impl Task {
    fn computed_in<T: Real, C: Real>(&self, student: &[T], teacher: &[T], with_grad: bool) -> Graded<T> {
        let n = self.nodes.len();
        let pieces = self.pieces::<T, C>(student, teacher);
        // For each piece and image, three rows of sums of its pixels over that image's.
        let sums: Vec<Mutex<Vec<f64>>> =
            pieces.iter().map(|piece| Mutex::new(vec![0.0; n * 3 * piece.student.len])).collect();
        let rate = C::narrow(self.rate);
        each_pair(pieces.len(), |tiles: &mut Tiles<C>, a, b| {
            let [first, second] = [a, b].map(|p| &pieces[p]);
            tiles.fill(first, second);
            let (rows, columns) = tiles.sums(rate, first.student.len, second.student.len);
            add(&sums[a], second.image, &rows);
            if a != b {
                add(&sums[b], first.image, &columns);
            }
        });
        let sums: Vec<Vec<f64>> = sums.into_iter().map(taken).collect();
        let mut value = 0.0;
        for (piece, sums) in pieces.iter().zip(&sums) {
            let len = piece.student.len;
            for image in (0..n).filter(|&image| self.nodes[image].len() > 0) {
                let at = |k: usize| &sums[(image * 3 + k) * len..][..len];
                for ((student, teacher), gap) in at(0).iter().zip(at(1)).zip(at(2)) {
                    let row = RowSums { student: *student, teacher: *teacher, gap: *gap };
                    value += piece.weight * row.divergence(self.rate);
                }
            }
        }
        if !with_grad {
            return Graded { value, grad: Vec::new() };
        }
        // `weight / sum` of each row, for student and teacher: the factor that makes an exponential a probability.
        let shares = |a: usize, b: usize| -> [Vec<C>; 2] {
            let (piece, image) = (&pieces[a], pieces[b].image);
            let len = piece.student.len;
            [0, 1].map(|k| {
                sums[a][(image * 3 + k) * len..][..len].iter().map(|sum| C::narrow(piece.weight / sum)).collect()
            })
        };
        let grads: Vec<Mutex<Vec<C>>> =
            pieces.iter().map(|piece| Mutex::new(vec![C::zero(); piece.student.f.len()])).collect();
        each_pair(pieces.len(), |tiles: &mut Tiles<C>, a, b| {
            let [first, second] = [a, b].map(|p| &pieces[p]);
            let (rows, cols) = (first.student.len, second.student.len);
            tiles.fill(first, second);
            tiles.gradient(rate, shares(a, b), shares(b, a), cols);
            let weights = MatRef::row_major(&tiles.student[..rows * cols], rows, cols);
            let accumulate = |grad: &Mutex<Vec<C>>, units: &Units<C>, weights: MatRef<'_, C>| {
                let mut grad = grad.lock().unwrap_or_else(PoisonError::into_inner);
                let dst = MatMut::row_major(&mut grad, self.d[0], weights.cols);
                gemm(dst, MatRef::row_major(&units.f, self.d[0], units.len), weights, C::ONE, C::ONE);
            };
            // dy,yx->dx; dx,xy->dy
            accumulate(&grads[a], &second.student, weights.transposed());
            if a != b {
                accumulate(&grads[b], &first.student, weights);
            }
        });
        let grads: Vec<Vec<C>> = grads
            .into_par_iter()
            .zip(&pieces)
            .map(|(grad, piece)| {
                let mut grad = taken(grad);
                piece.student.chain(&mut grad, self.rate);
                grad
            })
            .collect();
        let mut grad = vec![T::zero(); student.len()];
        grad.par_chunks_mut(self.m).enumerate().for_each(|(row, out)| {
            let (image, channel) = (row / self.d[0], row % self.d[0]);
            for (piece, grad) in pieces.iter().zip(&grads).filter(|(piece, _)| piece.image == image) {
                piece.student.spread(&self.nodes[image], grad, channel, out);
            }
        });
        Graded { value, grad }
    }

    fn pieces<T: Real, C: Real>(&self, student: &[T], teacher: &[T]) -> Vec<Piece<C>> {
        let n = self.nodes.len();
        let pieces: Vec<(usize, usize)> =
            (0..n).flat_map(|image| (0..self.nodes[image].len()).step_by(TILE).map(move |at| (image, at))).collect();
        let normal = Normal { kind: NodeKind::Average, added: 0.0, detached: false };
        let piece = |(image, first)| {
            let nodes = &self.nodes[image];
            let units = |maps: &[T], d: usize| {
                let map_dm = &maps[image * d * self.m..][..d * self.m];
                Units::new(map_dm, self.m, nodes, first, TILE.min(nodes.len() - first), normal)
            };
            let weight = 1.0 / (n as f64 * n as f64 * nodes.len() as f64);
            Piece { image, student: units(student, self.d[0]), teacher: units(teacher, self.d[1]), weight }
        };
        pieces.into_par_iter().map(piece).collect()
    }
}

fn taken<T>(mutex: Mutex<T>) -> T {
    mutex.into_inner().unwrap_or_else(PoisonError::into_inner)
}

fn add(sums: &Mutex<Vec<f64>>, image: usize, values: &[f64]) {
    let mut sums = sums.lock().unwrap_or_else(PoisonError::into_inner);
    for (sum, value) in sums[image * values.len()..].iter_mut().zip(values) {
        *sum += value;
    }
}

/// Runs `task(tiles, a, b)` once for each `a <= b` below `n`, in rounds in which every number comes once at most.
fn each_pair<C: Real>(n: usize, task: impl Fn(&mut Tiles<C>, usize, usize) + Sync) {
    for round in 0..n {
        let pairs = (0..n).map(|a| (a, (round + n - a) % n)).filter(|(a, b)| a <= b);
        let pairs: Vec<(usize, usize)> = pairs.collect();
        pairs.into_par_iter().for_each_init(Tiles::new, |tiles, (a, b)| task(tiles, a, b));
    }
}

/// Cosines of a tile of pixel pairs, row-major without gaps.
struct Tiles<C> {
    student: Vec<C>,
    teacher: Vec<C>,
}

impl<C: Real> Tiles<C> {
    fn new() -> Self {
        Self { student: vec![C::zero(); TILE * TILE], teacher: vec![C::zero(); TILE * TILE] }
    }

    fn fill(&mut self, rows: &Piece<C>, cols: &Piece<C>) {
        let dot = |tile: &mut [C], rows: &Units<C>, cols: &Units<C>| {
            let d = rows.f.len() / rows.len;
            // dx,dy->xy
            let lhs = MatRef::row_major(&rows.f, d, rows.len).transposed();
            let rhs = MatRef::row_major(&cols.f, d, cols.len);
            C::product(MatMut::row_major(tile, rows.len, cols.len), lhs, rhs);
        };
        dot(&mut self.student, &rows.student, &cols.student);
        dot(&mut self.teacher, &rows.teacher, &cols.teacher);
    }

    /// Along rows and along columns, three rows each: exponentials of the student, of the teacher, and the teacher's
    /// times the difference of the cosines. Exponents are relative to the largest a cosine can give.
    fn sums(&self, rate: C, rows: usize, cols: usize) -> (Vec<f64>, Vec<f64>) {
        let mut along_rows = vec![0.0; 3 * rows];
        let mut down = vec![C::zero(); 3 * cols];
        let [down_s, down_rest] = {
            let (s, rest) = down.split_at_mut(cols);
            [s, rest]
        };
        let (down_t, down_gap) = down_rest.split_at_mut(cols);
        vectorised(
            #[inline(always)]
            || {
                for row in 0..rows {
                    let student = &self.student[row * cols..][..cols];
                    let teacher = &self.teacher[row * cols..][..cols];
                    let mut lanes = [[C::zero(); LANES]; 3];
                    let whole = cols / LANES * LANES;
                    let mut at = 0;
                    while at < whole {
                        let s: &[C; LANES] = student[at..at + LANES].try_into().expect("as long");
                        let t: &[C; LANES] = teacher[at..at + LANES].try_into().expect("as long");
                        let d_s: &mut [C; LANES] = (&mut down_s[at..at + LANES]).try_into().expect("as long");
                        let d_t: &mut [C; LANES] = (&mut down_t[at..at + LANES]).try_into().expect("as long");
                        let d_g: &mut [C; LANES] = (&mut down_gap[at..at + LANES]).try_into().expect("as long");
                        for i in 0..LANES {
                            let e_s = (s[i] * rate - rate).exp();
                            let e_t = (t[i] * rate - rate).exp();
                            let gap = e_t * (t[i] - s[i]);
                            lanes[0][i] += e_s;
                            lanes[1][i] += e_t;
                            lanes[2][i] += gap;
                            d_s[i] += e_s;
                            d_t[i] += e_t;
                            d_g[i] += gap;
                        }
                        at += LANES;
                    }
                    for i in whole..cols {
                        let e_s = (student[i] * rate - rate).exp();
                        let e_t = (teacher[i] * rate - rate).exp();
                        let gap = e_t * (teacher[i] - student[i]);
                        lanes[0][i - whole] += e_s;
                        lanes[1][i - whole] += e_t;
                        lanes[2][i - whole] += gap;
                        down_s[i] += e_s;
                        down_t[i] += e_t;
                        down_gap[i] += gap;
                    }
                    for k in 0..3 {
                        along_rows[k * rows + row] = lanes[k].iter().map(|lane| lane.wide()).sum();
                    }
                }
            },
        );
        (along_rows, down.iter().map(|sum| sum.wide()).collect())
    }

    /// `dL/dcosine`, times the temperature, of both directions, in place of the student's cosines.
    fn gradient(&mut self, rate: C, rows: [Vec<C>; 2], columns: [Vec<C>; 2], cols: usize) {
        let [row_s, row_t] = rows;
        let [col_s, col_t] = columns;
        vectorised(
            #[inline(always)]
            || {
                for (row, (share_s, share_t)) in row_s.iter().zip(&row_t).enumerate() {
                    let student = &mut self.student[row * cols..][..cols];
                    let teacher = &self.teacher[row * cols..][..cols];
                    for (((s, t), col_s), col_t) in student.iter_mut().zip(teacher).zip(&col_s).zip(&col_t) {
                        let e_s = (*s * rate - rate).exp();
                        let e_t = (*t * rate - rate).exp();
                        *s = e_s * (*share_s + *col_s) - e_t * (*share_t + *col_t);
                    }
                }
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_hold_every_pair_once() {
        for n in [1, 2, 3, 6, 7] {
            let met = Mutex::new(Vec::new());
            each_pair(n, |_: &mut Tiles<f64>, a, b| met.lock().unwrap().push((a, b)));
            let mut met = taken(met);
            met.sort_unstable();
            let expected: Vec<(usize, usize)> = (0..n).flat_map(|a| (a..n).map(move |b| (a, b))).collect();
            assert_eq!(met, expected, "{n}");
        }
        // No number twice in a round.
        let n = 9;
        for round in 0..n {
            let numbers: Vec<usize> = (0..n).map(|a| (round + n - a) % n).collect();
            assert!((0..n).all(|a| numbers[numbers[a]] == a));
        }
    }
}

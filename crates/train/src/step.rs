//! One step's tensors, and the only place where maps of different grids are brought together.

use candle_core::{DType, Tensor};

use segdistill_data::{Batch, classes::VOID};
use segdistill_losses::valid_mask;
use segdistill_models::{Frozen, Segmenter};
use segdistill_ops::{Mode, resize_bilinear};

use crate::error::{Result, TrainError};

/// What the loss terms of one step look at.
#[derive(Clone, Debug)]
pub struct StepInputs {
    /// Student logits at its decoder's resolution.
    pub student_logits_nchw: Tensor,
    /// Logits of the student's auxiliary head at its own resolution, where it has one.
    pub student_aux_logits_nchw: Option<Tensor>,
    /// Teacher logits on the student's grid, outside the graph.
    pub teacher_logits_nchw: Option<Tensor>,
    /// Labels at crop resolution, u8.
    pub labels_nhw: Tensor,
    /// 1 where a label counts, at crop resolution.
    pub valid_nhw: Tensor,
    /// 1 where the label at the centre of a logit's cell counts, on the student's grid.
    pub valid_at_logits_nhw: Tensor,
}

/// Height and width of a map.
fn grid(map_nchw: &Tensor) -> Result<[usize; 2]> {
    let (_, _, h, w) = map_nchw.dims4()?;
    Ok([h, w])
}

impl StepInputs {
    /// Runs student and teacher on a batch. Where the teacher's grid differs from the student's, its logits are resized
    /// bilinearly (pixel centres) to the student's: here and nowhere else.
    ///
    /// # Errors
    /// What the networks report; `Config` when the class counts differ.
    pub fn forward(student: &dyn Segmenter, teacher: Option<&Frozen>, batch: &Batch, mode: Mode) -> Result<Self> {
        let student = student.forward(&batch.images_nchw, mode)?;
        let (student_logits_nchw, student_aux_logits_nchw) = (student.logits_nchw, student.aux_logits_nchw);
        let student_grid = grid(&student_logits_nchw)?;
        let teacher_logits_nchw = match teacher {
            None => None,
            Some(teacher) => {
                let logits = teacher.forward(&batch.images_nchw)?.logits_nchw;
                if logits.dim(1)? != student_logits_nchw.dim(1)? {
                    let what =
                        format!("teacher has {} classes, student {}", logits.dim(1)?, student_logits_nchw.dim(1)?);
                    return Err(TrainError::config(what, "use a teacher of the same class list"));
                }
                Some(resize_bilinear(&logits, student_grid, false)?.detach())
            }
        };
        let valid_nhw = valid_mask(&batch.labels_nhw, VOID)?;
        let valid_at_logits_nhw = valid_at_grid(&valid_nhw, student_grid)?;
        let labels_nhw = batch.labels_nhw.clone();
        Ok(Self {
            student_logits_nchw,
            student_aux_logits_nchw,
            teacher_logits_nchw,
            labels_nhw,
            valid_nhw,
            valid_at_logits_nhw,
        })
    }

    /// Student logits, the network's or its auxiliary head's, bilinearly at label resolution, as the cross entropy takes
    /// them.
    ///
    /// # Errors
    /// What `resize_bilinear` reports.
    pub fn at_labels(&self, logits_nchw: &Tensor) -> Result<Tensor> {
        let (_, h, w) = self.labels_nhw.dims3()?;
        Ok(resize_bilinear(logits_nchw, [h, w], false)?)
    }
}

/// Validity on a coarser grid: that of the pixel under the centre of each cell.
///
/// # Shapes
/// `valid_nhw`: `[n, h, w]` u8; returns `[n, grid[0], grid[1]]` u8.
/// # Errors
/// `Candle` when the mask is not `[n, h, w]` u8.
pub fn valid_at_grid(valid_nhw: &Tensor, grid: [usize; 2]) -> Result<Tensor> {
    let (n, h, w) = valid_nhw.dims3()?;
    let valid = valid_nhw.to_dtype(DType::U8)?.flatten_all()?.to_vec1::<u8>()?;
    let centre = |i: usize, from: usize, to: usize| ((2 * i + 1) * from / (2 * to)).min(from - 1);
    let mut coarse = Vec::with_capacity(n * grid[0] * grid[1]);
    for b in 0..n {
        for y in 0..grid[0] {
            let row = (b * h + centre(y, h, grid[0])) * w;
            coarse.extend((0..grid[1]).map(|x| valid[row + centre(x, w, grid[1])]));
        }
    }
    Ok(Tensor::from_vec(coarse, (n, grid[0], grid[1]), valid_nhw.device())?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn coarse_validity_is_that_of_the_cell_centre() -> Result<()> {
        let mut mask = vec![1u8; 64];
        mask[2 * 8 + 2] = 0; // centre of cell (0, 0) of a 2x2 grid over 8x8
        mask[0] = 0; // a corner no cell looks at
        let mask = Tensor::from_vec(mask, (1, 8, 8), &Device::Cpu)?;
        assert_eq!(valid_at_grid(&mask, [2, 2])?.to_vec3::<u8>()?, [[[0, 1], [1, 1]]]);
        assert_eq!(valid_at_grid(&mask, [8, 8])?.to_vec3::<u8>()?, mask.to_vec3::<u8>()?);
        Ok(())
    }
}

//! One step's tensors, and the only place where maps of different grids are brought together.

use candle_core::{DType, Tensor};

use segdistill_data::{Batch, classes::VOID};
use segdistill_losses::valid_mask;
use segdistill_models::{Frozen, SegOutput, Segmenter, adapter::Align};
use segdistill_ops::{Mode, resize_bilinear};

use crate::error::{Result, TrainError};
use crate::terms::Taps;

/// What the loss terms of one step look at.
#[derive(Clone, Debug)]
pub struct StepInputs {
    /// Images at crop resolution, RGB in [0, 1].
    pub images_nchw: Tensor,
    /// The student's logits and features, in the graph.
    pub student: SegOutput,
    /// The teacher's, outside of it.
    pub teacher: Option<SegOutput>,
    /// Labels at crop resolution, u8.
    pub labels_nhw: Tensor,
    /// 1 where a label counts, at crop resolution.
    pub valid_nhw: Tensor,
}

/// Two networks' maps on one grid, with labels and validity on it.
#[derive(Clone, Debug)]
pub struct Pair {
    /// The student's map, in the graph.
    pub student_nchw: Tensor,
    /// The teacher's, resized to the student's grid, outside the graph.
    pub teacher_nchw: Tensor,
    /// The label under the centre of each cell, u8.
    pub labels_nhw: Tensor,
    /// 1 where that label counts.
    pub valid_nhw: Tensor,
}

/// Height and width of a map.
fn grid(map_nchw: &Tensor) -> Result<[usize; 2]> {
    let (_, _, h, w) = map_nchw.dims4()?;
    Ok([h, w])
}

/// A network's map of one name.
fn map_of<'a>(output: &'a SegOutput, whose: &str, tap: &str) -> Result<&'a Tensor> {
    let missing = || {
        let known: Vec<&str> = output.features.keys().copied().collect();
        let what = format!("the {whose} has no map `{tap}`, known: logits, penultimate, {}", known.join(", "));
        TrainError::config(what, "`cargo xtask models describe NAME` lists the maps of a network")
    };
    match tap {
        Taps::LOGITS => Ok(&output.logits_nchw),
        _ => output.features.get(tap).ok_or_else(missing),
    }
}

impl StepInputs {
    /// Runs student and teacher on a batch.
    ///
    /// # Errors
    /// What the networks report; `Config` when the class counts differ.
    pub fn forward(student: &dyn Segmenter, teacher: Option<&Frozen>, batch: &Batch, mode: Mode) -> Result<Self> {
        let student = student.forward(&batch.images_nchw, mode)?;
        let teacher = teacher.map(|teacher| teacher.forward(&batch.images_nchw)).transpose()?;
        if let Some(teacher) = &teacher {
            let (found, expected) = (teacher.logits_nchw.dim(1)?, student.logits_nchw.dim(1)?);
            if found != expected {
                let what = format!("teacher has {found} classes, student {expected}");
                return Err(TrainError::config(what, "use a teacher of the same class list"));
            }
        }
        let valid_nhw = valid_mask(&batch.labels_nhw, VOID)?;
        let (images_nchw, labels_nhw) = (batch.images_nchw.clone(), batch.labels_nhw.clone());
        Ok(Self { images_nchw, student, teacher, labels_nhw, valid_nhw })
    }

    /// What the teacher gave.
    ///
    /// # Errors
    /// `Config` without a teacher.
    pub fn teacher(&self) -> Result<&SegOutput> {
        let missing =
            || TrainError::config("the objective compares with a teacher and has none", "give the stage a teacher");
        self.teacher.as_ref().ok_or_else(missing)
    }

    /// The two networks' maps called `student_tap` and `teacher_tap`, brought together: `align` turns the student's
    /// channels into the teacher's, and where the grids differ the teacher's map is resized bilinearly (pixel centres) to
    /// the student's. Here and nowhere else.
    ///
    /// # Errors
    /// `Config` without a teacher or for a map a network does not have; what the operations report.
    pub fn pair(&self, student_tap: &str, teacher_tap: &str, align: Option<&Align>, mode: Mode) -> Result<Pair> {
        let teacher = self.teacher()?;
        let student_nchw = map_of(&self.student, "student", student_tap)?;
        let student_nchw = match align {
            Some(align) => align.forward(student_nchw, mode)?,
            None => student_nchw.clone(),
        };
        let grid = grid(&student_nchw)?;
        let teacher_nchw = map_of(teacher, "teacher", teacher_tap)?;
        let teacher_nchw = resize_bilinear(teacher_nchw, grid, false)?.to_dtype(student_nchw.dtype())?.detach();
        Ok(Pair {
            student_nchw,
            teacher_nchw,
            labels_nhw: at_grid(&self.labels_nhw, grid)?,
            valid_nhw: at_grid(&self.valid_nhw, grid)?,
        })
    }

    /// Logits, the student's, its auxiliary head's or the teacher's, bilinearly at label resolution, as the cross entropy
    /// takes them.
    ///
    /// # Errors
    /// What `resize_bilinear` reports.
    pub fn at_labels(&self, logits_nchw: &Tensor) -> Result<Tensor> {
        let (_, h, w) = self.labels_nhw.dims3()?;
        Ok(resize_bilinear(logits_nchw, [h, w], false)?)
    }
}

/// A map of labels or of validity on a coarser grid: the value of the pixel under the centre of each cell.
///
/// # Shapes
/// `map_nhw`: `[n, h, w]` u8; returns `[n, grid[0], grid[1]]` u8.
/// # Errors
/// `Candle` when the map is not `[n, h, w]` u8.
pub fn at_grid(map_nhw: &Tensor, grid: [usize; 2]) -> Result<Tensor> {
    let (n, h, w) = map_nhw.dims3()?;
    if [h, w] == grid {
        return Ok(map_nhw.clone());
    }
    let fine = map_nhw.to_dtype(DType::U8)?.flatten_all()?.to_vec1::<u8>()?;
    let centre = |i: usize, from: usize, to: usize| ((2 * i + 1) * from / (2 * to)).min(from - 1);
    let mut coarse = Vec::with_capacity(n * grid[0] * grid[1]);
    for b in 0..n {
        for y in 0..grid[0] {
            let row = (b * h + centre(y, h, grid[0])) * w;
            coarse.extend((0..grid[1]).map(|x| fine[row + centre(x, w, grid[1])]));
        }
    }
    Ok(Tensor::from_vec(coarse, (n, grid[0], grid[1]), map_nhw.device())?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn a_coarse_map_holds_what_is_under_the_cells_centres() -> Result<()> {
        let mut mask = vec![1u8; 64];
        mask[2 * 8 + 2] = 0; // centre of cell (0, 0) of a 2x2 grid over 8x8
        mask[0] = 0; // a corner no cell looks at
        let mask = Tensor::from_vec(mask, (1, 8, 8), &Device::Cpu)?;
        assert_eq!(at_grid(&mask, [2, 2])?.to_vec3::<u8>()?, [[[0, 1], [1, 1]]]);
        assert_eq!(at_grid(&mask, [8, 8])?.to_vec3::<u8>()?, mask.to_vec3::<u8>()?);
        Ok(())
    }
}

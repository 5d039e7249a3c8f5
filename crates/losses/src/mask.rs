//! Which pixels count: the mask that every loss takes, and how masks and labels are read.

use candle_core::{DType, Device, Tensor};

use crate::error::{LossError, Result};

/// 1 where a pixel counts, 0 where its label is `void`.
///
/// `valid = (label != void)`
///
/// # Shapes
/// - `labels_nhw`: `[n, h, w]` u8
/// - returns `[n, h, w]` u8, 0 or 1
/// # Gradient
/// None.
/// # Errors
/// `Shape` when the labels are not of rank 3; `DType` when they are not u8.
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// let labels = Tensor::new(&[[[3u8, 255], [0, 7]]], &Device::Cpu)?;
/// let valid = segdistill_losses::valid_mask(&labels, 255)?;
/// assert_eq!(valid.to_vec3::<u8>()?, [[[1, 0], [1, 1]]]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn valid_mask(labels_nhw: &Tensor, void: u8) -> Result<Tensor> {
    const LOSS: &str = "valid_mask";
    if labels_nhw.rank() != 3 {
        return Err(LossError::shape(LOSS, format!("{:?}", labels_nhw.dims()), "[n, h, w]", "stack the label maps"));
    }
    expect_u8(LOSS, "labels_nhw", labels_nhw)?;
    Ok(labels_nhw.ne(void)?)
}

fn expect_u8(loss: &'static str, tensor: &'static str, map: &Tensor) -> Result<()> {
    if map.dtype() != DType::U8 {
        return Err(LossError::DType {
            loss,
            tensor,
            found: map.dtype(),
            expected: "u8",
            hint: "labels and masks travel as u8",
        });
    }
    Ok(())
}

/// Batch, channels, height and width of a map of logits: not empty, f32 or f64.
pub(crate) fn logits_dims(loss: &'static str, tensor: &'static str, logits_nchw: &Tensor) -> Result<[usize; 4]> {
    let &[n, c, h, w] = logits_nchw.dims() else {
        return Err(LossError::shape(
            loss,
            format!("{tensor} {:?}", logits_nchw.dims()),
            "[n, c, h, w]",
            "pass the map with its batch axis",
        ));
    };
    if n * c * h * w == 0 {
        return Err(LossError::shape(
            loss,
            format!("{tensor} {:?}", [n, c, h, w]),
            "at least one image, class and pixel",
            "an empty map has no loss",
        ));
    }
    if !matches!(logits_nchw.dtype(), DType::F32 | DType::F64) {
        return Err(LossError::DType {
            loss,
            tensor,
            found: logits_nchw.dtype(),
            expected: "f32 or f64",
            hint: "cast the logits with `to_dtype(DType::F32)` before the loss",
        });
    }
    Ok([n, c, h, w])
}

/// Batch, channels, height and width of two networks' maps, which are equal in shape and type.
pub(crate) fn pair_dims(
    loss: &'static str,
    [student_name, teacher_name]: [&'static str; 2],
    student_nchw: &Tensor,
    teacher_nchw: &Tensor,
) -> Result<[usize; 4]> {
    let dims = logits_dims(loss, student_name, student_nchw)?;
    if teacher_nchw.dims() != dims {
        return Err(LossError::shape(
            loss,
            format!("{teacher_name} {:?}", teacher_nchw.dims()),
            format!("{dims:?}, the shape of the student's"),
            "bring both networks to one grid and one number of channels before the loss, it resizes nothing",
        ));
    }
    same_dtype(loss, teacher_name, student_nchw, teacher_nchw)?;
    Ok(dims)
}

/// Dimensions of a map that shares batch and grid with the student's, `dims`, and has channels of its own.
pub(crate) fn grid_dims(
    loss: &'static str,
    name: &'static str,
    map_ndhw: &Tensor,
    dims: [usize; 4],
) -> Result<[usize; 4]> {
    let found = logits_dims(loss, name, map_ndhw)?;
    let [n, _, h, w] = dims;
    if [found[0], found[2], found[3]] == [n, h, w] {
        return Ok(found);
    }
    Err(LossError::shape(
        loss,
        format!("{name} {found:?}"),
        format!("[{n}, _, {h}, {w}], batch and grid of the student's"),
        "bring both networks to one grid before the loss, it resizes nothing",
    ))
}

/// Refuses a teacher's map of another type than the student's.
pub(crate) fn same_dtype(
    loss: &'static str,
    teacher_name: &'static str,
    student: &Tensor,
    teacher: &Tensor,
) -> Result<()> {
    if teacher.dtype() == student.dtype() {
        return Ok(());
    }
    Err(LossError::DType {
        loss,
        tensor: teacher_name,
        found: teacher.dtype(),
        expected: "the student's type",
        hint: "cast the teacher's map with `to_dtype`",
    })
}

/// Values of a u8 map on the logits' grid, row-major.
pub(crate) fn read_map(loss: &'static str, tensor: &'static str, map: &Tensor, grid: [usize; 3]) -> Result<Vec<u8>> {
    if map.dims() != grid {
        return Err(LossError::shape(
            loss,
            format!("{tensor} {:?}", map.dims()),
            format!("{grid:?}, the grid of the logits"),
            "resize labels or logits before the loss, it resizes nothing",
        ));
    }
    expect_u8(loss, tensor, map)?;
    Ok(map.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<u8>()?)
}

/// Values of the valid mask on the logits' grid, row-major, each 0 or 1.
pub(crate) fn read_valid(loss: &'static str, valid_nhw: &Tensor, grid: [usize; 3]) -> Result<Vec<u8>> {
    let valid = read_map(loss, "valid_nhw", valid_nhw, grid)?;
    if let Some(at) = valid.iter().position(|&v| v > 1) {
        let [image, row, column] = place(at, grid);
        return Err(LossError::Mask { image, row, column, value: valid[at] });
    }
    Ok(valid)
}

/// Image, row and column of a flat index.
pub(crate) fn place(at: usize, [_, h, w]: [usize; 3]) -> [usize; 3] {
    [at / (h * w), at / w % h, at % w]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_image_row_column() {
        assert_eq!(place(0, [2, 3, 4]), [0, 0, 0]);
        assert_eq!(place(12 + 4 + 3, [2, 3, 4]), [1, 1, 3]);
    }

    #[test]
    fn void_is_an_argument() {
        let labels = Tensor::new(&[[[0u8, 1, 11], [255, 11, 2]]], &Device::Cpu).unwrap();
        assert_eq!(valid_mask(&labels, 11).unwrap().to_vec3::<u8>().unwrap(), [[[1, 1, 0], [1, 0, 1]]]);
        assert_eq!(valid_mask(&labels, 255).unwrap().to_vec3::<u8>().unwrap(), [[[1, 1, 1], [0, 1, 1]]]);
    }

    #[test]
    fn wrong_rank_and_type_are_refused() {
        let flat = Tensor::zeros((2, 3), DType::U8, &Device::Cpu).unwrap();
        assert!(matches!(valid_mask(&flat, 255), Err(LossError::Shape { .. })));
        let wide = Tensor::zeros((1, 2, 3), DType::U32, &Device::Cpu).unwrap();
        assert!(matches!(valid_mask(&wide, 255), Err(LossError::DType { .. })));
    }
}

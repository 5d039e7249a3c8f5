//! Maps that terms are made of: one-hot labels, pooled features and validity, masks.

use candle_core::{Device, Tensor};

use segdistill_ops::rng::Stream;
use segdistill_ops::{Pool2dConfig, max_pool2d};

use crate::error::Result;

/// Labels as one map of 0 and 1 a class, in the type of `like`; void is 0 everywhere.
pub(crate) fn one_hot(labels_nhw: &Tensor, n_classes: usize, like: &Tensor) -> Result<Tensor> {
    let (n, h, w) = labels_nhw.dims3()?;
    let labels = labels_nhw.flatten_all()?.to_vec1::<u8>()?;
    let m = h * w;
    let mut maps = vec![0u8; n * n_classes * m];
    for (at, label) in labels.into_iter().enumerate().filter(|(_, label)| usize::from(*label) < n_classes) {
        maps[(at / m * n_classes + usize::from(label)) * m + at % m] = 1;
    }
    let maps = Tensor::from_vec(maps, (n, n_classes, h, w), &Device::Cpu)?;
    Ok(maps.to_dtype(like.dtype())?.to_device(like.device())?)
}

/// 1 for windows of `side` x `side` without a void position, those of [`pool`].
pub(crate) fn wholly_valid(valid_nhw: &Tensor, side: usize) -> Result<Tensor> {
    let (n, h, w) = valid_nhw.dims3()?;
    let valid = valid_nhw.flatten_all()?.to_vec1::<u8>()?;
    let (rows, columns) = (h / side, w / side);
    let mut windows = vec![1u8; n * rows * columns];
    for (at, window) in windows.iter_mut().enumerate() {
        let (image, y, x) = (at / (rows * columns), at / columns % rows, at % columns);
        for row in y * side..(y + 1) * side {
            let start = (image * h + row) * w + x * side;
            *window &= u8::from(valid[start..start + side].iter().all(|v| *v == 1));
        }
    }
    Ok(Tensor::from_vec(windows, (n, rows, columns), &Device::Cpu)?)
}

/// Maximum over windows of `side` x `side`, windows that do not fit left out.
pub(crate) fn pool(map_ndhw: &Tensor, side: usize) -> Result<Tensor> {
    if side == 1 {
        return Ok(map_ndhw.clone());
    }
    let cfg = Pool2dConfig { kernel: [side, side], stride: [side, side], padding: [0, 0], ceil_mode: false };
    Ok(max_pool2d(map_ndhw, cfg)?)
}

/// 0 at a share `masked` of the positions, drawn for each image and step, 1 elsewhere.
pub(crate) fn keep_mask(map_ndhw: &Tensor, masked: f64, seed: u64, step: u64) -> Result<Tensor> {
    let (n, _, h, w) = map_ndhw.dims4()?;
    let mut stream = Stream::new(seed, "mgd mask", &[step]);
    let keep: Vec<u8> = (0..n * h * w).map(|_| u8::from(!stream.chance(masked))).collect();
    let keep = Tensor::from_vec(keep, (n, 1, h, w), &Device::Cpu)?;
    Ok(keep.to_dtype(map_ndhw.dtype())?.to_device(map_ndhw.device())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One void pixel takes its window with it, and what fits no window is left out of map and validity alike.
    #[test]
    fn a_window_counts_where_nothing_under_it_is_void() {
        let valid: Vec<u8> = (0..5 * 7).map(|at| u8::from(at != 2 * 7 + 3)).collect();
        let valid = Tensor::from_vec(valid, (1, 5, 7), &Device::Cpu).unwrap();
        let windows = wholly_valid(&valid, 2).unwrap();
        assert_eq!(windows.to_vec3::<u8>().unwrap(), [[[1, 1, 1], [1, 0, 1]]]);
        let map = Tensor::arange(0f32, 35.0, &Device::Cpu).unwrap().reshape((1, 1, 5, 7)).unwrap();
        let pooled = pool(&map, 2).unwrap();
        assert_eq!(pooled.dims(), [1, 1, 2, 3]);
        assert_eq!(pooled.flatten_all().unwrap().to_vec1::<f32>().unwrap(), [8.0, 10.0, 12.0, 22.0, 24.0, 26.0]);
        assert_eq!(wholly_valid(&valid, 1).unwrap().to_vec3::<u8>().unwrap(), valid.to_vec3::<u8>().unwrap());
    }

    #[test]
    fn labels_become_one_map_a_class_and_void_none() {
        let labels = Tensor::new(&[[[1u8, 255], [0, 1]]], &Device::Cpu).unwrap();
        let like = Tensor::zeros(1, candle_core::DType::F64, &Device::Cpu).unwrap();
        let maps = one_hot(&labels, 2, &like).unwrap();
        assert_eq!(maps.flatten_all().unwrap().to_vec1::<f64>().unwrap(), [0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0]);
    }

    #[test]
    fn masks_are_a_function_of_seed_and_step_and_hold_their_share() {
        let map = Tensor::zeros((2, 3, 40, 50), candle_core::DType::F32, &Device::Cpu).unwrap();
        let mask = |step| keep_mask(&map, 0.75, 9, step).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(mask(3), mask(3));
        assert_ne!(mask(3), mask(4));
        let kept = mask(3).iter().sum::<f32>() / 4000.0;
        assert!((kept - 0.25).abs() < 0.03, "{kept}");
    }
}

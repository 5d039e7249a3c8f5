//! Values that both sides of a comparison make for themselves, from a name: no file is exchanged, nothing is random.

use candle_core::{DType, Device, Tensor};

use crate::error::Result;

/// Uniform in [-1, 1) on 24 bits: splitmix64 of the element number, started at the FNV-1a hash of the name.
///
/// `peers/fill.py` is its twin, and `crates/models/tests/support` holds the formula for the fixtures.
pub fn fill(name: &str, n: usize) -> Vec<f32> {
    let hash = |h: u64, byte: u8| (h ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    let start = name.bytes().fold(0xcbf2_9ce4_8422_2325, hash);
    let value = |k: u64| {
        let z = start.wrapping_add(k.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        // 24 bits are exact in f32, and so is the rest.
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (1..=n as u64).map(value).collect()
}

/// [`fill`] as a tensor, f32, times `gain`.
///
/// # Errors
/// `Ops` when the tensor cannot be made.
pub fn filled(name: &str, shape: &[usize], gain: f32) -> Result<Tensor> {
    let mut values = fill(name, shape.iter().product());
    values.iter_mut().for_each(|v| *v *= gain);
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// The value of a network's tensor by its name and shape, f32: weights of unit gain (uniform within
/// `sqrt(6 / fan_in)`), scales and variances about 1, shifts and means about 0.
///
/// # Errors
/// `Ops` when the tensor cannot be made.
pub fn parameter(name: &str, shape: &[usize]) -> Result<Tensor> {
    let (shift, gain) = match name {
        _ if name.ends_with("running_mean") => (0.0, 0.1),
        _ if name.ends_with("running_var") => (1.0, 0.3),
        _ if shape.len() == 1 && name.ends_with("weight") => (1.0, 0.1),
        _ if shape.len() == 1 => (0.0, 0.1),
        _ => (0.0, (6.0 / shape[1..].iter().product::<usize>() as f32).sqrt()),
    };
    let mut values = fill(name, shape.iter().product());
    values.iter_mut().for_each(|v| *v = shift + gain * *v);
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// RGB images in [0, 1).
///
/// # Errors
/// `Ops` when the tensor cannot be made.
pub fn images(shape: &[usize]) -> Result<Tensor> {
    let values = fill("images", shape.iter().product()).iter().map(|u| (u + 1.0) / 2.0).collect::<Vec<_>>();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// Labels `[n, h, w]` u8 of `classes` classes, one pixel in `classes + 1` being `void`.
///
/// # Errors
/// `Ops` when the tensor cannot be made.
pub fn labels(shape: &[usize], classes: usize, void: u8) -> Result<Tensor> {
    let label = |u: &f32| match ((u + 1.0) / 2.0 * (classes + 1) as f32) as usize {
        class if class < classes => class as u8,
        _ => void,
    };
    let values = fill("labels", shape.iter().product()).iter().map(label).collect::<Vec<u8>>();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// Root of the mean square of all elements, summed in f64.
///
/// # Errors
/// `Ops` when the tensor cannot be read.
pub fn rms(tensor: &Tensor) -> Result<f64> {
    let values = tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    Ok((values.iter().map(|v| v * v).sum::<f64>() / values.len().max(1) as f64).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Written down from `peers/fill.py`: both sides must go on making the same values.
    #[test]
    fn values_are_those_of_the_peer() {
        let expected = [-0.631_051_06, -0.936_248_54, -0.781_534_3];
        let found = fill("images", 3);
        assert_eq!(found, expected);
    }

    #[test]
    fn labels_hold_every_class_and_void() {
        let labels = labels(&[1, 40, 50], 11, 77).unwrap().flatten_all().unwrap().to_vec1::<u8>().unwrap();
        let count = |class: u8| labels.iter().filter(|&&l| l == class).count();
        assert!((0..11).chain([77]).all(|class| (100..250).contains(&count(class))));
        assert_eq!((0..11).chain([77]).map(count).sum::<usize>(), 2000);
    }
}

//! Element types of weight files, and how their bytes become tensors.

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};

/// Type of the elements of a tensor in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "UPPERCASE")]
#[non_exhaustive]
pub enum FileType {
    /// 64-bit float.
    F64,
    /// 32-bit float.
    F32,
    /// 16-bit float.
    F16,
    /// 16-bit float with the exponent of f32.
    BF16,
    /// 64-bit whole number.
    I64,
    /// 32-bit whole number.
    I32,
    /// 16-bit whole number.
    I16,
    /// 8-bit whole number.
    I8,
    /// Byte.
    U8,
    /// Truth value, a byte each.
    Bool,
}

impl FileType {
    const NAMES: [(Self, &'static str, usize); 10] = [
        (Self::F64, "F64", 8),
        (Self::F32, "F32", 4),
        (Self::F16, "F16", 2),
        (Self::BF16, "BF16", 2),
        (Self::I64, "I64", 8),
        (Self::I32, "I32", 4),
        (Self::I16, "I16", 2),
        (Self::I8, "I8", 1),
        (Self::U8, "U8", 1),
        (Self::Bool, "BOOL", 1),
    ];

    /// The type that safetensors calls `name`.
    pub(super) fn named(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(_, n, _)| *n == name).map(|(dtype, ..)| *dtype)
    }

    fn row(self) -> (&'static str, usize) {
        Self::NAMES.iter().find(|(dtype, ..)| *dtype == self).map_or(("?", 1), |(_, name, size)| (*name, *size))
    }

    /// Its name, as in safetensors.
    pub fn name(self) -> &'static str {
        self.row().0
    }

    /// Bytes of an element.
    pub(super) fn size(self) -> usize {
        self.row().1
    }

    /// Whether it holds weights.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F64 | Self::F32 | Self::F16 | Self::BF16)
    }

    /// Little-endian elements at `indices` as a tensor of `shape`: floats of 16 bits widened to f32, those of 64 kept,
    /// whole numbers and truth values as i64. `indices` stay inside `bytes`.
    pub(super) fn tensor(
        self,
        bytes: &[u8],
        shape: &[usize],
        indices: Option<&[usize]>,
    ) -> candle_core::Result<Tensor> {
        fn gather<const N: usize, T>(bytes: &[u8], indices: Option<&[usize]>, read: impl Fn([u8; N]) -> T) -> Vec<T> {
            let (all, _) = bytes.as_chunks::<N>();
            match indices {
                None => all.iter().map(|chunk| read(*chunk)).collect(),
                Some(indices) => indices.iter().map(|i| read(all[*i])).collect(),
            }
        }
        let device = &Device::Cpu;
        match self {
            Self::F64 => Tensor::from_vec(gather(bytes, indices, f64::from_le_bytes), shape, device),
            Self::F32 => Tensor::from_vec(gather(bytes, indices, f32::from_le_bytes), shape, device),
            Self::F16 => Tensor::from_vec(gather(bytes, indices, |b| f16::from_le_bytes(b).to_f32()), shape, device),
            Self::BF16 => Tensor::from_vec(gather(bytes, indices, |b| bf16::from_le_bytes(b).to_f32()), shape, device),
            Self::I64 => Tensor::from_vec(gather(bytes, indices, i64::from_le_bytes), shape, device),
            Self::I32 => Tensor::from_vec(gather(bytes, indices, |b| i64::from(i32::from_le_bytes(b))), shape, device),
            Self::I16 => Tensor::from_vec(gather(bytes, indices, |b| i64::from(i16::from_le_bytes(b))), shape, device),
            Self::I8 => Tensor::from_vec(gather(bytes, indices, |[b]| i64::from(b as i8)), shape, device),
            Self::U8 | Self::Bool => Tensor::from_vec(gather(bytes, indices, |[b]| i64::from(b)), shape, device),
        }
    }

    /// Type of a tensor once it is read: floats of 16 bits are widened, whole numbers become i64.
    pub fn loaded(self) -> DType {
        match self {
            Self::F64 => DType::F64,
            Self::F32 | Self::F16 | Self::BF16 => DType::F32,
            _ => DType::I64,
        }
    }
}

impl std::fmt::Display for FileType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

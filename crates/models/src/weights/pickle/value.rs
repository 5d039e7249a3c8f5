//! What a state dict is made of.

use super::super::dtype::FileType;

/// Number of a value in its arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in crate::weights) struct Id(pub(super) u32);

/// Functions and classes a state dict names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::weights) enum Callable {
    /// `collections.OrderedDict`, and `Counter`, which learning rate schedules keep.
    OrderedDict,
    /// `torch._utils._rebuild_tensor`: storage, offset, size, stride.
    RebuildTensor,
    /// `torch._utils._rebuild_tensor_v2`: the same, then `requires_grad`, hooks and metadata.
    RebuildTensorV2,
    /// `torch._utils._rebuild_parameter`: tensor, `requires_grad`, hooks.
    RebuildParameter,
    /// `torch.Size`.
    Size,
    /// `torch.device`.
    Device,
    /// A class of storages, by the type of its elements.
    Storage(FileType),
}

/// Every name that is taken; what another one would make is not read.
const NAMES: [(&str, &str, Callable); 19] = [
    ("collections", "OrderedDict", Callable::OrderedDict),
    ("collections", "Counter", Callable::OrderedDict),
    ("torch._utils", "_rebuild_tensor", Callable::RebuildTensor),
    ("torch._utils", "_rebuild_tensor_v2", Callable::RebuildTensorV2),
    ("torch._utils", "_rebuild_parameter", Callable::RebuildParameter),
    ("torch", "Size", Callable::Size),
    ("torch", "device", Callable::Device),
    ("torch", "DoubleStorage", Callable::Storage(FileType::F64)),
    ("torch", "FloatStorage", Callable::Storage(FileType::F32)),
    ("torch", "HalfStorage", Callable::Storage(FileType::F16)),
    ("torch", "BFloat16Storage", Callable::Storage(FileType::BF16)),
    ("torch", "LongStorage", Callable::Storage(FileType::I64)),
    ("torch", "IntStorage", Callable::Storage(FileType::I32)),
    ("torch", "ShortStorage", Callable::Storage(FileType::I16)),
    ("torch", "CharStorage", Callable::Storage(FileType::I8)),
    ("torch", "ByteStorage", Callable::Storage(FileType::U8)),
    ("torch", "BoolStorage", Callable::Storage(FileType::Bool)),
    ("torch.cuda", "FloatStorage", Callable::Storage(FileType::F32)),
    ("torch.cuda", "HalfStorage", Callable::Storage(FileType::F16)),
];

impl Callable {
    /// The callable of a name, if it is one of the list.
    pub(super) fn named(module: &str, name: &str) -> Option<Self> {
        NAMES.iter().find(|(m, n, _)| (*m, *n) == (module, name)).map(|(.., callable)| *callable)
    }
}

/// A block of numbers that lies elsewhere in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::weights) struct StorageRef {
    /// Its key: a plain name, never a path.
    pub(in crate::weights) key: String,
    /// Type of its elements.
    pub(in crate::weights) dtype: FileType,
    /// Elements.
    pub(in crate::weights) len: usize,
}

/// A tensor: a view of a storage whose last element lies inside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::weights) struct TensorRef {
    /// Storage.
    pub(in crate::weights) storage: StorageRef,
    /// First element.
    pub(in crate::weights) offset: usize,
    /// Sizes.
    pub(in crate::weights) shape: Vec<usize>,
    /// Steps, in elements.
    pub(in crate::weights) strides: Vec<usize>,
}

/// A value of a pickle.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::weights) enum Value {
    /// `None`, and attributes of no interest.
    None,
    /// `True` or `False`.
    Bool(bool),
    /// A whole number of up to eight bytes.
    Int(i64),
    /// A number.
    Float(f64),
    /// A text.
    Text(String),
    /// A tuple.
    Tuple(Vec<Id>),
    /// A list or set.
    List(Vec<Id>),
    /// A dictionary, in the order it was filled.
    Dict(Vec<(Id, Id)>),
    /// One of the list of functions and classes.
    Callable(Callable),
    /// A storage.
    Storage(StorageRef),
    /// A tensor.
    Tensor(TensorRef),
    /// A function or class that is not of the list, what a call of it would give, or bytes: never made, never looked into.
    Opaque(Foreign),
}

/// What stands for something that is not read, by its place among the machine's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::weights) struct Foreign(pub(super) u32);

impl Value {
    /// What it is, in words.
    pub(in crate::weights) fn kind(&self) -> &'static str {
        match self {
            Self::None => "None",
            Self::Bool(_) => "a truth value",
            Self::Int(_) | Self::Float(_) => "a number",
            Self::Text(_) => "a text",
            Self::Tuple(_) => "a tuple",
            Self::List(_) => "a list",
            Self::Dict(_) => "a dictionary",
            Self::Callable(_) => "a function or class",
            Self::Storage(_) => "a storage",
            Self::Tensor(_) => "a tensor",
            Self::Opaque(_) => "something that is not read",
        }
    }
}

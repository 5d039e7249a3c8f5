//! What the closed list of functions makes of its arguments: dictionaries, storages and tensors, each checked.

use super::machine::{MAX_VALUES, Machine, NOT_A_STATE_DICT, Step};
use super::{Callable, Id, StorageRef, TensorRef, Value};

/// Longest list of arguments.
const MAX_ARGUMENTS: usize = 16;
/// Most dimensions of a tensor.
const MAX_RANK: usize = 8;
/// Longest key of a storage; PyTorch counts them.
const MAX_KEY: usize = 64;

impl Machine<'_> {
    fn tuple(&self, id: Id, what: &str) -> Step<Vec<Id>> {
        match self.get(id) {
            Value::Tuple(items) if items.len() > MAX_ARGUMENTS => {
                self.broken(format!("{what} has {} items, at most {MAX_ARGUMENTS} are taken", items.len()))
            }
            Value::Tuple(items) => Ok(items.clone()),
            other => self.broken(format!("{what} is {}, expected a tuple", other.kind())),
        }
    }

    pub(super) fn call(&mut self, callable: Id, arguments: Id) -> Step<Value> {
        if let foreign @ Value::Opaque(_) = self.get(callable) {
            return Ok(foreign.clone());
        }
        let Value::Callable(callable) = *self.get(callable) else {
            return self.broken(format!("{} is called", self.get(callable).kind()));
        };
        let arguments = self.tuple(arguments, "the argument list")?;
        // Made of what is not read, such as a view of a storage of complex numbers.
        if let Some(foreign @ Value::Opaque(_)) = arguments.first().map(|first| self.get(*first)) {
            return Ok(foreign.clone());
        }
        match (callable, arguments.as_slice()) {
            (Callable::OrderedDict, []) => Ok(Value::Dict(Vec::new())),
            // `OrderedDict([(key, value), ...])` as Python 2 wrote it, or over a dictionary.
            (Callable::OrderedDict, [items]) => {
                self.copied += match self.get(*items) {
                    Value::Dict(pairs) => pairs.len(),
                    Value::List(list) => list.len(),
                    other => return self.broken(format!("a dictionary is made of {}", other.kind())),
                };
                if self.copied > MAX_VALUES {
                    return Err(self.refusal(format!("more than {MAX_VALUES} copied items"), NOT_A_STATE_DICT));
                }
                match self.get(*items) {
                    Value::List(list) => list.iter().map(|pair| self.pair(*pair)).collect::<Step<_>>().map(Value::Dict),
                    dict => Ok(dict.clone()),
                }
            }
            (Callable::RebuildTensor, [storage, offset, shape, strides])
            | (Callable::RebuildTensorV2, [storage, offset, shape, strides, ..]) => {
                self.tensor(*storage, *offset, *shape, *strides).map(Value::Tensor)
            }
            (Callable::RebuildParameter, [tensor, ..]) => match self.get(*tensor) {
                Value::Tensor(tensor) => Ok(Value::Tensor(tensor.clone())),
                other => self.broken(format!("a parameter is made of {}", other.kind())),
            },
            (Callable::Size, [sizes]) => Ok(Value::Tuple(self.tuple(*sizes, "a torch.Size")?)),
            (Callable::Device, _) => Ok(Value::None),
            (callable, arguments) => self.broken(format!("{callable:?} is called with {} values", arguments.len())),
        }
    }

    fn pair(&self, id: Id) -> Step<(Id, Id)> {
        match self.get(id) {
            Value::List(items) | Value::Tuple(items) if items.len() == 2 => Ok((items[0], items[1])),
            other => self.broken(format!("a dictionary's item is {}", other.kind())),
        }
    }

    fn number(&self, id: Id, what: &str) -> Step<usize> {
        match self.get(id) {
            Value::Int(value) if *value >= 0 => Ok(*value as usize),
            Value::Int(value) => self.broken(format!("{what} is {value}")),
            other => self.broken(format!("{what} is {}, expected a number", other.kind())),
        }
    }

    fn numbers(&self, id: Id, what: &str) -> Step<Vec<usize>> {
        let items = self.tuple(id, what)?;
        if items.len() > MAX_RANK {
            return self.broken(format!("{what} has {} numbers, at most {MAX_RANK} are taken", items.len()));
        }
        items.into_iter().map(|item| self.number(item, what)).collect()
    }

    pub(super) fn storage(&self, id: Id) -> Step<Value> {
        let items = self.tuple(id, "a persistent id")?;
        let (kind, class, key, len) = match items.as_slice() {
            [kind, class, key, _location, len] => (*kind, *class, *key, *len),
            // The older form says whether it is a view of another storage.
            [kind, class, key, _location, len, view] if *self.get(*view) == Value::None => (*kind, *class, *key, *len),
            _ => return self.broken(format!("a persistent id of {} values", items.len())),
        };
        if *self.get(kind) != Value::Text("storage".to_string()) {
            return self.broken("a persistent id that is no storage");
        }
        if let foreign @ Value::Opaque(_) = self.get(class) {
            return Ok(foreign.clone());
        }
        let Value::Callable(Callable::Storage(dtype)) = *self.get(class) else {
            return self.broken(format!("a storage whose class is {}", self.get(class).kind()));
        };
        let key = match self.get(key) {
            Value::Text(key) => key,
            other => return self.broken(format!("a storage whose key is {}", other.kind())),
        };
        let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
        if key.is_empty() || key.len() > MAX_KEY || !key.bytes().all(plain) {
            let shown: String = key.chars().take(80).collect();
            return self.broken(format!("storage key `{}`, expected letters and digits", shown.escape_debug()));
        }
        let len = self.number(len, "the length of a storage")?;
        if len.checked_mul(dtype.size()).is_none_or(|bytes| bytes > isize::MAX as usize) {
            return self.broken(format!("a storage of {len} elements"));
        }
        Ok(Value::Storage(StorageRef { key: key.clone(), dtype, len }))
    }

    fn tensor(&self, storage: Id, offset: Id, shape: Id, strides: Id) -> Step<TensorRef> {
        let Value::Storage(storage) = self.get(storage) else {
            return self.broken(format!("a tensor made of {}", self.get(storage).kind()));
        };
        let offset = self.number(offset, "the offset of a tensor")?;
        let shape = self.numbers(shape, "the shape of a tensor")?;
        let strides = self.numbers(strides, "the strides of a tensor")?;
        if shape.len() != strides.len() {
            return self.broken(format!("a tensor of shape {shape:?} with strides {strides:?}"));
        }
        let count = shape.iter().try_fold(1usize, |n, side| n.checked_mul(*side));
        let reach = |at: usize, (side, stride): (&usize, &usize)| {
            side.saturating_sub(1).checked_mul(*stride).and_then(|step| at.checked_add(step))
        };
        let last = shape.iter().zip(&strides).try_fold(offset, reach);
        // A view that repeats elements (stride 0) would let a few bytes claim any size: no weight is saved so.
        let fits = match (count, last) {
            (Some(0), _) => offset <= storage.len,
            (Some(count), Some(last)) => count <= storage.len && last < storage.len,
            _ => false,
        };
        if !fits {
            return self.broken(format!(
                "a tensor of shape {shape:?}, strides {strides:?} at {offset} in a storage of {} elements",
                storage.len
            ));
        }
        Ok(TensorRef { storage: storage.clone(), offset, shape, strides })
    }
}

//! The stack machine: opcodes of protocols 0 to 5 as far as state dicts use them.

use std::collections::HashMap;

use super::super::header::shown;
use super::value::Foreign;
use super::{Callable, Id, Refusal, Value};

/// Most opcodes of a pickle: thousands of tensors take tens of thousands.
const MAX_STEPS: usize = 4_000_000;
/// Most values of a pickle, and most values on the stack.
pub(super) const MAX_VALUES: usize = 1_000_000;
/// Longest name of a function or class; none that is taken comes near it.
const MAX_NAME: usize = 512;
/// Most functions and classes of other names.
const MAX_FOREIGN: usize = 100;
const BYTES: &str = "bytes";
const EARLIEST: &str = "it was saved with pickle protocol 0 or 1; save it with torch.save's default";

pub(super) const NOT_A_STATE_DICT: &str =
    "save the state dict alone: torch.save(model.state_dict(), FILE), or write .safetensors";
const BROKEN: &str = "the file is damaged or made up; obtain it again";

/// What a pickle left on the stack.
#[derive(Debug)]
pub(in crate::weights) struct Pickle {
    values: Vec<Value>,
    foreign: Vec<String>,
    /// The outermost value.
    pub(in crate::weights) root: Id,
    /// Bytes it took.
    pub(in crate::weights) len: usize,
}

impl Pickle {
    /// The value of a number.
    pub(in crate::weights) fn get(&self, id: Id) -> &Value {
        &self.values[id.0 as usize]
    }

    /// Every value there is, used or not.
    pub(in crate::weights) fn values(&self) -> impl Iterator<Item = &Value> {
        self.values.iter()
    }

    /// What a value is, in words.
    pub(in crate::weights) fn kind(&self, id: Id) -> String {
        match self.get(id) {
            Value::Opaque(Foreign(i)) => match self.foreign.get(*i as usize).map_or(BYTES, String::as_str) {
                BYTES => BYTES.to_string(),
                name => format!("made by `{name}`, which no state dict needs; nothing was executed"),
            },
            other => other.kind().to_string(),
        }
    }

    /// The text of a number, if it is one.
    pub(in crate::weights) fn text(&self, id: Id) -> Option<&str> {
        if let Value::Text(text) = self.get(id) { Some(text) } else { None }
    }
}

/// Runs the pickle that `bytes` begin with.
pub(in crate::weights) fn run(bytes: &[u8]) -> Result<Pickle, Refusal> {
    let mut machine = Machine {
        bytes,
        at: 0,
        op_at: 0,
        values: Vec::new(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        copied: 0,
        foreign: vec![BYTES.to_string()],
    };
    for _ in 0..MAX_STEPS {
        if let Some(root) = machine.step()? {
            return Ok(Pickle { values: machine.values, foreign: machine.foreign, root, len: machine.at });
        }
    }
    Err(machine.refusal(format!("more than {MAX_STEPS} instructions"), NOT_A_STATE_DICT))
}

pub(super) struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    op_at: usize,
    values: Vec<Value>,
    stack: Vec<Id>,
    /// Heights of the stack where a mark was set.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
    /// Items copied from one dictionary into another so far.
    pub(super) copied: usize,
    /// Names of functions and classes that are not of the list, `bytes` before them.
    foreign: Vec<String>,
}

pub(super) type Step<T> = Result<T, Refusal>;

impl<'a> Machine<'a> {
    pub(super) fn refusal(&self, why: impl Into<String>, hint: &'static str) -> Refusal {
        Refusal { at: self.op_at, why: why.into(), hint }
    }

    pub(super) fn broken<T>(&self, why: impl Into<String>) -> Step<T> {
        Err(self.refusal(why, BROKEN))
    }

    fn take(&mut self, n: usize) -> Step<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        if n > rest.len() {
            return self.broken(format!("{n} bytes are announced, {} are left", rest.len()));
        }
        self.at += n;
        Ok(&rest[..n])
    }

    fn array<const N: usize>(&mut self) -> Step<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn byte(&mut self) -> Step<u8> {
        Ok(self.array::<1>()?[0])
    }

    fn u32(&mut self) -> Step<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn line(&mut self) -> Step<&'a str> {
        let rest = &self.bytes[self.at..];
        let Some(n) = rest.iter().take(MAX_NAME).position(|b| *b == b'\n') else {
            return self.broken("a line without end");
        };
        let line = self.take(n)?;
        self.at += 1;
        std::str::from_utf8(line).or_else(|_| self.broken("a line that is no text"))
    }

    fn push(&mut self, value: Value) -> Step<()> {
        if self.values.len() >= MAX_VALUES {
            return Err(self.refusal(format!("more than {MAX_VALUES} values"), NOT_A_STATE_DICT));
        }
        let id = Id(self.values.len() as u32);
        self.values.push(value);
        self.push_id(id)
    }

    fn push_id(&mut self, id: Id) -> Step<()> {
        if self.stack.len() >= MAX_VALUES {
            return Err(self.refusal(format!("more than {MAX_VALUES} values on the stack"), NOT_A_STATE_DICT));
        }
        self.stack.push(id);
        Ok(())
    }

    fn pop(&mut self) -> Step<Id> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return self.broken("a value is taken from an empty stack");
        }
        self.stack.pop().map_or_else(|| self.broken("a value is taken from an empty stack"), Ok)
    }

    fn top(&self) -> Step<Id> {
        self.stack.last().copied().map_or_else(|| self.broken("an empty stack is looked at"), Ok)
    }

    fn pop_marked(&mut self) -> Step<Vec<Id>> {
        match self.marks.pop() {
            // The stack never sinks below a mark: `pop` stops there.
            Some(height) => Ok(self.stack.split_off(height)),
            None => self.broken("a mark is looked for where none is set"),
        }
    }

    fn text(&mut self, n: usize) -> Step<()> {
        let bytes = self.take(n)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => self.push(Value::Text(text.to_string())),
            Err(_) => self.broken("a text that is not UTF-8"),
        }
    }

    fn skipped_bytes(&mut self, n: usize) -> Step<()> {
        self.take(n)?;
        self.push(Value::Opaque(Foreign(0)))
    }

    fn u64(&mut self) -> Step<usize> {
        let n = u64::from_le_bytes(self.array()?);
        usize::try_from(n).or_else(|_| self.broken(format!("{n} bytes are announced")))
    }

    pub(super) fn get(&self, id: Id) -> &Value {
        &self.values[id.0 as usize]
    }

    fn memoize(&mut self, key: u32) -> Step<()> {
        let id = self.top()?;
        if self.memo.len() >= MAX_VALUES {
            return Err(self.refusal(format!("more than {MAX_VALUES} remembered values"), NOT_A_STATE_DICT));
        }
        self.memo.insert(key, id);
        Ok(())
    }

    fn recall(&mut self, key: u32) -> Step<()> {
        match self.memo.get(&key).copied() {
            Some(id) => self.push_id(id),
            None => self.broken(format!("value {key} is recalled before it is remembered")),
        }
    }

    fn global(&mut self, module: &str, name: &str) -> Step<()> {
        match Callable::named(module, name) {
            Some(callable) => self.push(Value::Callable(callable)),
            // Beside the weights a checkpoint may keep arguments, scores, schedules: only what hangs on them is lost.
            None => {
                let full = shown(&format!("{module}.{name}"));
                let known = self.foreign.iter().position(|known| *known == full);
                let place = match known {
                    Some(place) => place,
                    None if self.foreign.len() < MAX_FOREIGN => {
                        self.foreign.push(full);
                        self.foreign.len() - 1
                    }
                    None => {
                        let why = format!("names more than {MAX_FOREIGN} functions and classes");
                        return Err(self.refusal(why, NOT_A_STATE_DICT));
                    }
                };
                self.push(Value::Opaque(Foreign(place as u32)))
            }
        }
    }

    fn long(&mut self, n: usize) -> Step<()> {
        if n > 8 {
            return self.broken(format!("a whole number of {n} bytes"));
        }
        let bytes = self.take(n)?;
        let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
        let mut wide = [if negative { 0xff } else { 0 }; 8];
        wide[..n].copy_from_slice(bytes);
        self.push(Value::Int(i64::from_le_bytes(wide)))
    }

    /// The next instruction; the outermost value when it is the last.
    fn step(&mut self) -> Step<Option<Id>> {
        self.op_at = self.at;
        if self.at == self.bytes.len() {
            return self.broken("ends before its last instruction");
        }
        match self.byte()? {
            // Protocol, frame.
            0x80 => {
                let version = self.byte()?;
                if version > 5 {
                    return self.broken(format!("pickle protocol {version}, expected 0 to 5"));
                }
            }
            0x95 => drop(self.take(8)?),
            b'.' => return Ok(Some(self.pop()?)),
            // Constants and numbers.
            b'N' => self.push(Value::None)?,
            0x88 => self.push(Value::Bool(true))?,
            0x89 => self.push(Value::Bool(false))?,
            b'K' => {
                let value = i64::from(self.byte()?);
                self.push(Value::Int(value))?;
            }
            b'M' => {
                let value = i64::from(u16::from_le_bytes(self.array()?));
                self.push(Value::Int(value))?;
            }
            b'J' => {
                let value = i64::from(i32::from_le_bytes(self.array()?));
                self.push(Value::Int(value))?;
            }
            0x8a => {
                let n = self.byte()?;
                self.long(n.into())?;
            }
            0x8b => {
                let n = self.u32()?;
                self.long(n as usize)?;
            }
            b'G' => {
                let value = f64::from_be_bytes(self.array()?);
                self.push(Value::Float(value))?;
            }
            // Texts: unicode, and the byte strings of Python 2.
            b'X' | b'T' => {
                let n = self.u32()?;
                self.text(n as usize)?;
            }
            // Byte strings.
            b'C' => {
                let n = self.byte()?;
                self.skipped_bytes(n.into())?;
            }
            b'B' => {
                let n = self.u32()?;
                self.skipped_bytes(n as usize)?;
            }
            0x8e | 0x96 => {
                let n = self.u64()?;
                self.skipped_bytes(n)?;
            }
            0x8d => {
                let n = self.u64()?;
                self.text(n)?;
            }
            0x8c | b'U' => {
                let n = self.byte()?;
                self.text(n.into())?;
            }
            // Containers.
            b'(' => {
                if self.marks.len() >= MAX_VALUES {
                    return Err(self.refusal("too many open marks", NOT_A_STATE_DICT));
                }
                self.marks.push(self.stack.len());
            }
            b')' => self.push(Value::Tuple(Vec::new()))?,
            op @ 0x85..=0x87 => {
                let n = usize::from(op - 0x84);
                let mut items = Vec::with_capacity(n);
                for _ in 0..n {
                    items.push(self.pop()?);
                }
                items.reverse();
                self.push(Value::Tuple(items))?;
            }
            b't' => {
                let items = self.pop_marked()?;
                self.push(Value::Tuple(items))?;
            }
            b']' | 0x8f => self.push(Value::List(Vec::new()))?,
            b'l' | 0x91 => {
                let items = self.pop_marked()?;
                self.push(Value::List(items))?;
            }
            b'a' => {
                let item = self.pop()?;
                self.extend(vec![item])?;
            }
            b'e' | 0x90 => {
                let items = self.pop_marked()?;
                self.extend(items)?;
            }
            b'}' => self.push(Value::Dict(Vec::new()))?,
            b'd' => {
                let items = self.pop_marked()?;
                self.push(Value::Dict(Vec::new()))?;
                self.insert(items)?;
            }
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.insert(vec![key, value])?;
            }
            b'u' => {
                let items = self.pop_marked()?;
                self.insert(items)?;
            }
            // Memory.
            b'q' => {
                let key = self.byte()?;
                self.memoize(key.into())?;
            }
            b'r' => {
                let key = self.u32()?;
                self.memoize(key)?;
            }
            0x94 => self.memoize(self.memo.len() as u32)?,
            b'h' => {
                let key = self.byte()?;
                self.recall(key.into())?;
            }
            b'j' => {
                let key = self.u32()?;
                self.recall(key)?;
            }
            // Names and calls, of the closed list only.
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(module, name)?;
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                match (self.get(module), self.get(name)) {
                    (Value::Text(module), Value::Text(name)) if module.len().max(name.len()) <= MAX_NAME => {
                        let (module, name) = (module.clone(), name.clone());
                        self.global(&module, &name)?;
                    }
                    _ => return self.broken("a name that is no short text"),
                }
            }
            b'R' | 0x81 => {
                let (arguments, callable) = (self.pop()?, self.pop()?);
                let value = self.call(callable, arguments)?;
                self.push(value)?;
            }
            // With named arguments, as no function of the list is called.
            0x92 => {
                self.pop()?;
                let (_, callable) = (self.pop()?, self.pop()?);
                let value = match self.get(callable) {
                    Value::Opaque(_) => self.get(callable).clone(),
                    other => return self.broken(format!("{} is made of named arguments", other.kind())),
                };
                self.push(value)?;
            }
            b'b' => {
                // Attributes of a dictionary (`_metadata` of a state dict) hold no weights.
                self.pop()?;
                let of = self.top()?;
                if !matches!(self.get(of), Value::Dict(_) | Value::Opaque(_)) {
                    let why = format!("sets attributes of {}", self.get(of).kind());
                    return Err(self.refusal(why, NOT_A_STATE_DICT));
                }
            }
            b'Q' => {
                let id = self.pop()?;
                let storage = self.storage(id)?;
                self.push(storage)?;
            }
            op @ (b'p' | b'g' | b'I' | b'L' | b'F' | b'S' | b'V' | b'P') => {
                return Err(self.refusal(format!("instruction 0x{op:02x} of the earliest protocols"), EARLIEST));
            }
            op => {
                let why = format!("instruction 0x{op:02x}, which no state dict needs");
                return Err(self.refusal(why, NOT_A_STATE_DICT));
            }
        }
        Ok(None)
    }

    fn extend(&mut self, items: Vec<Id>) -> Step<()> {
        let id = self.top()?;
        match &mut self.values[id.0 as usize] {
            Value::List(list) => {
                list.extend(items);
                Ok(())
            }
            Value::Opaque(_) => Ok(()),
            other => {
                let kind = other.kind();
                self.broken(format!("appends to {kind}"))
            }
        }
    }

    fn insert(&mut self, items: Vec<Id>) -> Step<()> {
        let (pairs, rest) = items.as_chunks::<2>();
        if !rest.is_empty() {
            return self.broken("a key without a value");
        }
        let id = self.top()?;
        match &mut self.values[id.0 as usize] {
            Value::Dict(dict) => {
                dict.extend(pairs.iter().map(|[key, value]| (*key, *value)));
                Ok(())
            }
            Value::Opaque(_) => Ok(()),
            other => {
                let kind = other.kind();
                self.broken(format!("inserts into {kind}"))
            }
        }
    }
}

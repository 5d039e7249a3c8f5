//! What every CPU kernel of this crate stands on: typed slices of candle's storage, outputs written by several threads
//! without being zeroed first, and wide vectors chosen at run time.
//!
//! No operation lives here. A kernel is generic over [`Element`]; [`for_float!`] turns a tensor's type into one of its
//! two instances.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use candle_core::{CpuStorage, DType, Layout, Tensor};
use rayon::prelude::*;

use crate::error::{OpsError, Result};
pub(crate) use crate::gemm::{Element, Scratch};

/// Runs `$body` with the type name `$T` bound to `f32` or `f64`, whichever `$dtype` is.
///
/// `$body` is a `candle_core::Result`; any other type is candle's `UnsupportedDTypeForOp`, naming `$op`.
macro_rules! for_float {
    ($op:expr, $dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $T = f64;
                $body
            }
            other => Err(candle_core::Error::UnsupportedDTypeForOp(other, $op).bt()),
        }
    };
}
pub(crate) use for_float;

/// Refuses tensors that the kernels of an operation cannot take: on different devices, on one without kernels, of a type
/// other than f32 and f64, or of two types at once.
///
/// # Errors
/// `Config`, naming `op` and what was found.
pub(crate) fn check_float(op: &'static str, tensors: &[&Tensor]) -> Result<()> {
    for tensor in tensors {
        let (here, first) = (tensor.device(), tensors[0].device());
        if !(here.is_cpu() || cfg!(feature = "cuda") && here.is_cuda()) {
            return Err(OpsError::config(
                format!("{op}: no kernel for {:?} in this build", here.location()),
                "build with --features cuda,cudnn, or move the tensors to the CPU",
            ));
        }
        if !here.same_device(first) {
            return Err(OpsError::config(
                format!("{op}: found {:?} beside {:?}", here.location(), first.location()),
                "move every tensor to one device; `device::open_cuda` gives the same one each time",
            ));
        }
        if !matches!(tensor.dtype(), DType::F32 | DType::F64) {
            return Err(OpsError::config(
                format!("{op}: found {:?}, expected F32 or F64", tensor.dtype()),
                "convert with to_dtype first",
            ));
        }
        if tensor.dtype() != tensors[0].dtype() {
            return Err(OpsError::config(
                format!("{op}: found {:?} beside {:?}", tensor.dtype(), tensors[0].dtype()),
                "give every tensor one type",
            ));
        }
    }
    Ok(())
}

/// Refuses a bias that has not one value for each output channel.
///
/// # Errors
/// `Shape` naming both.
pub(crate) fn check_bias(op: &'static str, bias: Option<&Tensor>, n_out: usize) -> Result<()> {
    match bias {
        Some(bias) if bias.dims() != [n_out] => Err(OpsError::shape(
            op,
            format!("bias {:?}", bias.dims()),
            format!("[{n_out}]"),
            "one bias for each output channel",
        )),
        _ => Ok(()),
    }
}

/// The elements of a contiguous tensor, in row-major order.
///
/// # Errors
/// When the layout has gaps or another order (callers pass `tensor.contiguous()?`), or holds another type.
pub(crate) fn slice_of<'a, T: Element>(
    op: &'static str,
    storage: &'a CpuStorage,
    layout: &Layout,
) -> candle_core::Result<&'a [T]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        return Err(candle_core::Error::RequiresContiguous { op }.bt());
    };
    Ok(&T::cpu_storage_as_slice(storage)?[start..end])
}

/// Calls `f` with the elements of a contiguous CPU tensor; backward passes read their arguments so.
///
/// # Errors
/// Those of [`slice_of`]; `RequiresContiguous` also stands for a tensor that is not on the CPU.
pub(crate) fn with_slice<T: Element, R>(
    op: &'static str,
    tensor: &Tensor,
    f: impl FnOnce(&[T]) -> candle_core::Result<R>,
) -> candle_core::Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        candle_core::Storage::Cpu(storage) => f(slice_of(op, storage, layout)?),
        _ => Err(candle_core::Error::RequiresContiguous { op }.bt()),
    }
}

/// Fills a chunk with one value and hands it back as ordinary elements.
pub(crate) fn init<T: Copy>(chunk: &mut [MaybeUninit<T>], value: T) -> &mut [T] {
    chunk.fill(MaybeUninit::new(value));
    // SAFETY: the line above wrote every element.
    unsafe { &mut *(std::ptr::from_mut(chunk) as *mut [T]) }
}

/// A vector of `len` elements made of chunks of `chunk_len`, each filled by one call of `fill(index, chunk)` on rayon.
///
/// Every chunk starts as zeros, written by the thread that fills it, so that the memory is touched once and is warm;
/// the last chunk may be shorter. Chunks depend on nothing but their index, so results do not depend on the threads.
pub(crate) fn par_chunks<T: Element>(len: usize, chunk_len: usize, fill: impl Fn(usize, &mut [T]) + Sync) -> Vec<T> {
    let mut out = Vec::with_capacity(len);
    let spare = &mut out.spare_capacity_mut()[..len];
    spare.par_chunks_mut(chunk_len.max(1)).enumerate().for_each(|(i, chunk)| fill(i, init(chunk, T::ZERO)));
    // SAFETY: `init` wrote every element of every chunk, and the chunks cover `..len`.
    unsafe { out.set_len(len) };
    out
}

/// Lends `f` a buffer of `len` elements that the thread keeps for its next task; it starts with whatever was left
/// there.
///
/// A call inside `f` gets a buffer of its own (which is not kept).
pub(crate) fn with_scratch<T: Scratch, R>(len: usize, f: impl FnOnce(&mut [T]) -> R) -> R {
    let mut buffer = T::scratch().take();
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
    let result = f(&mut buffer[..len]);
    T::scratch().replace(buffer);
    result
}

/// Elements that several tasks write at once, each its own part.
pub(crate) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    life: PhantomData<&'a mut [MaybeUninit<T>]>,
}

// SAFETY: a `Shared` only gives access through `part` and `pointer`, whose contracts forbid overlapping use.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// Over memory that may not be initialised yet.
    pub(crate) fn new(memory: &'a mut [MaybeUninit<T>]) -> Self {
        Self { start: memory.as_mut_ptr().cast(), len: memory.len(), life: PhantomData }
    }

    /// Over elements that are initialised already.
    pub(crate) fn over(memory: &'a mut [T]) -> Self {
        Self { start: memory.as_mut_ptr(), len: memory.len(), life: PhantomData }
    }

    /// One part.
    ///
    /// # Safety
    /// No two parts that are alive at once overlap, and nothing inside is reached through `pointer` meanwhile.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn part(&self, range: Range<usize>) -> &mut [MaybeUninit<T>] {
        assert!(range.start <= range.end && range.end <= self.len, "part {range:?} of {} elements", self.len);
        // SAFETY: inside the memory by the assertion; not aliased by this function's contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start).cast(), range.len()) }
    }

    /// Address of element `at`, for kernels that write a strided window.
    ///
    /// # Panics
    /// Unless `at + span <= len`, where `span` is the distance from the window's first element past its last.
    pub(crate) fn pointer(&self, at: usize, span: usize) -> *mut T {
        assert!(at.checked_add(span).is_some_and(|end| end <= self.len), "window {at}+{span} of {}", self.len);
        // SAFETY: inside the memory, or one past its end, by the assertion.
        unsafe { self.start.add(at) }
    }
}

/// Runs `kernel` compiled for the widest vectors this processor has: call it around loops over slices, once a task.
///
/// The kernel must inline (a closure does); `a * b + c` stays two roundings everywhere, so the bits are the same for
/// every processor.
#[inline(always)]
pub fn vectorised<R>(kernel: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
        fn wide<R>(kernel: impl FnOnce() -> R) -> R {
            kernel()
        }
        #[target_feature(enable = "avx2,fma")]
        fn medium<R>(kernel: impl FnOnce() -> R) -> R {
            kernel()
        }
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512bw")
        {
            // SAFETY: the processor has the features, as asked above (AVX-512 implies AVX2 and FMA).
            return unsafe { wide(kernel) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the processor has the features, as asked above.
            return unsafe { medium(kernel) };
        }
    }
    kernel()
}

//! cuDNN through cudarc's thin wrappers: one handle for each thread and device, descriptors that free themselves.

mod conv;
mod norm;

pub(super) use conv::{Pass, convolution, convolution_grad};
pub(super) use norm::{batch_norm_train, batch_norm_train_grad};

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use candle_core::cuda::cudarc::cudnn::result::CudnnError;
use candle_core::cuda::cudarc::cudnn::{result, sys};
use candle_core::cuda::cudarc::driver::CudaStream;
use candle_core::cuda::{DeviceId, WrapErr};
use candle_core::{CudaDevice, DType, Error, Result};

thread_local! {
    /// cuDNN handles belong to one thread at a time.
    static HANDLES: RefCell<HashMap<DeviceId, Rc<Handle>>> = RefCell::default();
}

/// A cuDNN handle on a device's stream, and the algorithms chosen with it.
struct Handle {
    raw: sys::cudnnHandle_t,
    stream: Arc<CudaStream>,
    algorithms: RefCell<HashMap<conv::Key, conv::Algorithm>>,
}

impl Handle {
    fn new(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        stream.context().bind_to_thread().w()?;
        let raw = result::create_handle().map_err(|e| failed("cudnnCreate", e))?;
        let handle = Self { raw, stream, algorithms: RefCell::default() };
        // SAFETY: the handle was just made, and holds its stream alive.
        unsafe { result::set_stream(raw, handle.stream.cu_stream().cast()) }
            .map_err(|e| failed("cudnnSetStream", e))?;
        Ok(handle)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // A thread that ends after the driver has been shut down has nothing left to free.
        if self.stream.context().bind_to_thread().is_ok() {
            // SAFETY: made by `create_handle`, destroyed once, its context current.
            let _ = unsafe { result::destroy_handle(self.raw) };
        }
    }
}

/// Calls `f` with this thread's handle for `device`, the device's context current.
fn with_handle<R>(device: &CudaDevice, f: impl FnOnce(&Handle) -> Result<R>) -> Result<R> {
    let handle = HANDLES.with(|handles| -> Result<Rc<Handle>> {
        if let Some(handle) = handles.borrow().get(&device.id()) {
            return Ok(handle.clone());
        }
        let handle = Rc::new(Handle::new(device)?);
        handles.borrow_mut().insert(device.id(), handle.clone());
        Ok(handle)
    })?;
    handle.stream.context().bind_to_thread().w()?;
    f(&handle)
}

fn failed(what: &str, error: CudnnError) -> Error {
    Error::Msg(format!("{what}: cuDNN says {error}"))
}

/// cuDNN's name of an element type, and of the type its sums have.
fn data_types(dtype: DType) -> Result<(sys::cudnnDataType_t, sys::cudnnDataType_t)> {
    use sys::cudnnDataType_t::{CUDNN_DATA_BFLOAT16, CUDNN_DATA_DOUBLE, CUDNN_DATA_FLOAT};
    match dtype {
        DType::F32 => Ok((CUDNN_DATA_FLOAT, CUDNN_DATA_FLOAT)),
        DType::F64 => Ok((CUDNN_DATA_DOUBLE, CUDNN_DATA_DOUBLE)),
        DType::BF16 => Ok((CUDNN_DATA_BFLOAT16, CUDNN_DATA_FLOAT)),
        other => candle_core::bail!("no cuDNN operation here takes {other:?}"),
    }
}

/// The factors 1 and 0 in `alpha * result + beta * before`, as cuDNN takes them for sums of a type.
fn one_and_zero(sums: sys::cudnnDataType_t) -> [*const std::ffi::c_void; 2] {
    static F32: [f32; 2] = [1.0, 0.0];
    static F64: [f64; 2] = [1.0, 0.0];
    if sums == sys::cudnnDataType_t::CUDNN_DATA_DOUBLE {
        [std::ptr::from_ref(&F64[0]).cast(), std::ptr::from_ref(&F64[1]).cast()]
    } else {
        [std::ptr::from_ref(&F32[0]).cast(), std::ptr::from_ref(&F32[1]).cast()]
    }
}

/// Sizes as cuDNN takes them.
fn ints<const N: usize>(sizes: [usize; N]) -> Result<[i32; N]> {
    let mut out = [0; N];
    for (out, size) in out.iter_mut().zip(sizes) {
        *out = i32::try_from(size).map_err(|_| Error::Msg(format!("cuDNN takes no size of {size}")))?;
    }
    Ok(out)
}

/// Shape and type of a contiguous `[n, c, h, w]` tensor.
struct TensorShape(sys::cudnnTensorDescriptor_t);

impl TensorShape {
    fn new(data: sys::cudnnDataType_t, nchw: [usize; 4]) -> Result<Self> {
        let raw = result::create_tensor_descriptor().map_err(|e| failed("tensor descriptor", e))?;
        let descriptor = Self(raw);
        let format = sys::cudnnTensorFormat_t::CUDNN_TENSOR_NCHW;
        // SAFETY: made above, not yet destroyed.
        unsafe { result::set_tensor4d_descriptor(raw, format, data, ints(nchw)?) }
            .map_err(|e| failed(&format!("tensor {nchw:?}"), e))?;
        Ok(descriptor)
    }
}

impl Drop for TensorShape {
    fn drop(&mut self) {
        // SAFETY: made by `create_tensor_descriptor`, destroyed once.
        let _ = unsafe { result::destroy_tensor_descriptor(self.0) };
    }
}

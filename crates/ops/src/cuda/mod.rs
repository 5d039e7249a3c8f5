//! Operations on CUDA tensors: kernels compiled at run time for what no library offers, cuDNN for convolution and for
//! batch normalisation in training.
//!
//! Every function here has a CPU twin in the file of its operation, which is its oracle: the same tests run on both.
//! Tensors are contiguous when they come here; results are new tensors outside any graph. What does not live here: the
//! checks of arguments, and backward rules that need no device.

mod conv;
#[cfg(feature = "cudnn")]
mod cudnn;
mod loss;
mod maps;
mod norm;
mod pointwise;

pub use loss::cross_entropy;
pub use pointwise::square_sum;

pub(crate) use conv::{Sizes, channel_sums, convolve, convolve_transposed, input_grad, output, weight_grad};
pub(crate) use maps::{
    bilinear, bilinear_grad, max_pool, max_pool_grad, max_pool_places, mean_pool, mean_pool_grad, nearest, nearest_grad,
};
pub(crate) use norm::batch_norm_act;
pub(crate) use pointwise::{combine, keep_scaled, log_softmax, log_softmax_grad, rectify, rectify_grad};

use std::sync::{Mutex, OnceLock};

use candle_core::cuda::cudarc::driver::{CudaFunction, CudaSlice, CudaView, DeviceRepr, LaunchConfig, ValidAsZeroBits};
use candle_core::cuda::cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};
use candle_core::cuda::{CudaDType, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, Layout, Result, Shape, Storage, Tensor};

use crate::cpu::Element;

/// Threads of a block that works element by element.
const THREADS: u32 = 256;
/// Threads of a block that sums together, `BLOCK` of the kernels.
const SUM_THREADS: u32 = 512;

/// f32 or f64, as the kernels know them.
pub(crate) trait Real: Element + CudaDType + DeviceRepr + ValidAsZeroBits {
    /// Module name of the kernels compiled for this type.
    const MODULE: &'static str;
    /// What stands before the kernels' source.
    const HEAD: &'static str;
    /// The compiled kernels, once asked for.
    fn ptx() -> &'static OnceLock<String>;
}

macro_rules! real {
    ($t:ty, $module:literal, $head:literal) => {
        impl Real for $t {
            const MODULE: &'static str = $module;
            const HEAD: &'static str = $head;
            fn ptx() -> &'static OnceLock<String> {
                static PTX: OnceLock<String> = OnceLock::new();
                &PTX
            }
        }
    };
}
real!(f32, "segdistill_f32", "typedef float T;\n#define EXP expf\n#define LOG logf\n");
real!(f64, "segdistill_f64", "typedef double T;\n#define EXP exp\n#define LOG log\n");

/// The kernel `name` for elements of type `T`; the first call of a process compiles them all.
///
/// # Errors
/// The compiler's log when NVRTC refuses, the driver's error when the module does not load.
fn kernel<T: Real>(device: &CudaDevice, name: &str) -> Result<CudaFunction> {
    // One compilation, however many threads ask first.
    static COMPILING: Mutex<()> = Mutex::new(());
    let ptx = match T::ptx().get() {
        Some(ptx) => ptx,
        None => {
            let _guard = COMPILING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            match T::ptx().get() {
                Some(ptx) => ptx,
                None => {
                    let ptx = compile::<T>()?;
                    T::ptx().get_or_init(|| ptx)
                }
            }
        }
    };
    Ok(device.get_or_load_custom_func(name, T::MODULE, ptx)?.into_cuda_function())
}

/// The kernels as PTX of NVRTC's oldest architecture, which every driver brings to its own device.
fn compile<T: Real>() -> Result<String> {
    let source = [T::HEAD, include_str!("kernels.cu")].concat();
    // `a * b + c` stays two roundings, as on the CPU: kernels that only copy, weigh and add then give the CPU's bits.
    let options = CompileOptions { fmad: Some(false), name: Some("kernels.cu".into()), ..CompileOptions::default() };
    Ok(compile_ptx_with_opts(source, options).w()?.to_src())
}

/// One thread an element, for `len` of them.
fn per_element(len: usize) -> Result<LaunchConfig> {
    let blocks = size(len)?.div_ceil(THREADS);
    Ok(LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 })
}

/// `blocks` blocks that each sum together.
fn per_block(blocks: usize) -> Result<LaunchConfig> {
    Ok(LaunchConfig { grid_dim: (size(blocks)?, 1, 1), block_dim: (SUM_THREADS, 1, 1), shared_mem_bytes: 0 })
}

/// A size as the kernels take it.
///
/// # Errors
/// For 2^31 and more: their indices are 32 bits wide.
fn size(len: usize) -> Result<u32> {
    match u32::try_from(len) {
        Ok(small) if small < 1 << 31 => Ok(small),
        _ => candle_core::bail!(
            "a CUDA tensor has {len} elements, the kernels take fewer than 2^31: use a smaller batch"
        ),
    }
}

/// Launches a kernel: `launch!(device, T, "name", config, argument, ...)`, each argument a reference.
///
/// The expansion is unsafe code: what the arguments point to must match the kernel's parameters, in order, type and
/// length.
macro_rules! launch {
    ($device:expr, $T:ty, $name:literal, $config:expr, $($arg:expr),+ $(,)?) => {{
        use candle_core::cuda::WrapErr;
        use candle_core::cuda::cudarc::driver::PushKernelArg;
        let function = $crate::cuda::kernel::<$T>($device, $name)?;
        let stream = $device.cuda_stream();
        let mut builder = stream.launch_builder(&function);
        $(builder.arg($arg);)+
        builder.launch($config).w()?
    }};
}
use launch;

/// The elements of a contiguous tensor on the device.
///
/// # Errors
/// When the layout has gaps or another order (callers pass `tensor.contiguous()?`), or holds another type.
fn view<'a, T: Real>(op: &'static str, storage: &'a CudaStorage, layout: &Layout) -> Result<CudaView<'a, T>> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        return Err(candle_core::Error::RequiresContiguous { op }.bt());
    };
    Ok(storage.as_cuda_slice::<T>()?.slice(start..end))
}

/// Calls `f` with the device and the elements of a contiguous CUDA tensor.
///
/// # Errors
/// Those of [`view`]; `RequiresContiguous` also stands for a tensor that is not on a CUDA device.
pub(crate) fn with_view<T: Real, R>(
    op: &'static str,
    tensor: &Tensor,
    f: impl FnOnce(&CudaDevice, CudaView<'_, T>) -> Result<R>,
) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cuda(storage) => f(&storage.device, view(op, storage, layout)?),
        _ => Err(candle_core::Error::RequiresContiguous { op }.bt()),
    }
}

/// Memory for `len` elements, holding anything.
///
/// An empty tensor gets one element: the driver refuses to allocate nothing.
fn uninit<T: Real>(device: &CudaDevice, len: usize) -> Result<CudaSlice<T>> {
    // SAFETY: every kernel writes each of the `len` elements it is launched for before anything reads them, and the
    // types of this module have no invalid bit patterns.
    unsafe { device.alloc::<T>(len.max(1)) }
}

/// A storage holding `slice`.
fn stored<T: Real>(device: &CudaDevice, slice: CudaSlice<T>) -> CudaStorage {
    CudaStorage::wrap_cuda_slice(slice, device.clone())
}

/// A tensor outside any graph holding `slice`.
fn tensor<T: Real>(device: &CudaDevice, slice: CudaSlice<T>, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(Storage::Cuda(stored(device, slice)), shape, BackpropOp::none(), false)
}

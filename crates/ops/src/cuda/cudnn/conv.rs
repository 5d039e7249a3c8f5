//! Convolution and its two gradients by cuDNN.
//!
//! Of the algorithms cuDNN ranks for a shape, the first is taken that gives the same bits on every run and needs at
//! most [`WORKSPACE`] bytes; the choice is kept for the shape.

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::cuda::cudarc::cudnn::{result, sys};
use candle_core::cuda::cudarc::driver::sys::CUdeviceptr;
use candle_core::cuda::cudarc::driver::{CudaSlice, CudaStream, DevicePtrMut, SyncOnDrop};
use candle_core::cuda::{CudaStorageSlice, gemm_reduced_precision_f32};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Shape, Storage, Tensor};

use super::super::conv::Sizes;
use super::{Handle, TensorShape, data_types, failed, ints, one_and_zero, with_handle};

/// Bytes an algorithm may ask for beside its operands.
const WORKSPACE: usize = 1 << 30;
/// Algorithms asked for; cuDNN knows fewer of each kind.
const RANKED: usize = 16;

/// Which of the three products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in super::super) enum Pass {
    /// `y` from `x` and the weight.
    Forward,
    /// `dx` from the weight and `dy`.
    InputGrad,
    /// `dw` from `x` and `dy`.
    WeightGrad,
}

/// A chosen algorithm.
#[derive(Clone, Copy, Debug)]
pub(super) enum Algorithm {
    Forward(sys::cudnnConvolutionFwdAlgo_t),
    InputGrad(sys::cudnnConvolutionBwdDataAlgo_t),
    WeightGrad(sys::cudnnConvolutionBwdFilterAlgo_t),
}

/// What a choice is kept for.
pub(super) type Key = (Pass, Sizes, DType, u32);

/// The result of `pass` for two contiguous operands, in their type.
pub(in super::super) fn convolution(
    op: &'static str,
    pass: Pass,
    sizes: &Sizes,
    a: (&CudaStorage, &Layout),
    b: (&CudaStorage, &Layout),
) -> Result<CudaStorage> {
    let (device, dtype) = (&a.0.device, a.0.dtype());
    let shape = Shape::from_dims(&match pass {
        Pass::Forward => sizes.y,
        Pass::InputGrad => sizes.x,
        Pass::WeightGrad => sizes.weight,
    });
    if sizes.x[0] == 0 {
        // An empty batch: no pixel, and a weight gradient of 0.
        return device.zeros_impl(&shape, dtype);
    }
    if sizes.bf16 && dtype == DType::F32 {
        let [a, b] = [a, b].map(|(storage, layout)| -> Result<(CudaStorage, Layout)> {
            Ok((storage.to_dtype(layout, DType::BF16)?, Layout::contiguous(layout.shape().clone())))
        });
        let (a, b) = (a?, b?);
        let out = run(op, pass, sizes, DType::BF16, (&a.0, &a.1), (&b.0, &b.1), &shape)?;
        return out.to_dtype(&Layout::contiguous(shape), dtype);
    }
    run(op, pass, sizes, dtype, a, b, &shape)
}

/// As [`convolution`], for the tensors of a backward pass.
pub(in super::super) fn convolution_grad(
    op: &'static str,
    pass: Pass,
    sizes: &Sizes,
    a: &Tensor,
    grad: &Tensor,
) -> Result<Tensor> {
    let ((a, a_layout), (g, g_layout)) = (a.storage_and_layout(), grad.storage_and_layout());
    let (Storage::Cuda(a), Storage::Cuda(g)) = (&*a, &*g) else {
        candle_core::bail!("{op}: a gradient on another device than its operands")
    };
    let out = convolution(op, pass, sizes, (a, a_layout), (g, g_layout))?;
    let shape = match pass {
        Pass::Forward => sizes.y,
        Pass::InputGrad => sizes.x,
        Pass::WeightGrad => sizes.weight,
    };
    Ok(Tensor::from_storage(Storage::Cuda(out), &shape[..], BackpropOp::none(), false))
}

fn run(
    op: &'static str,
    pass: Pass,
    sizes: &Sizes,
    dtype: DType,
    a: (&CudaStorage, &Layout),
    b: (&CudaStorage, &Layout),
    shape: &Shape,
) -> Result<CudaStorage> {
    let device = &a.0.device;
    // SAFETY: cuDNN overwrites every element (its factor of what was there before is 0).
    let mut out = unsafe { device.alloc_uninit(shape, dtype)? };
    with_handle(device, |handle| {
        let plan = Plan::new(op, sizes, dtype)?;
        let key = (pass, *sizes, dtype, plan.math as u32);
        let known = handle.algorithms.borrow().get(&key).copied();
        let candidates = match known {
            Some(algorithm) => vec![algorithm],
            None => plan.ranked(handle, pass),
        };
        let mut refused = None;
        for algorithm in candidates {
            match plan.execute(handle, device, algorithm, a, b, &mut out) {
                Ok(()) => {
                    handle.algorithms.borrow_mut().insert(key, algorithm);
                    return Ok(());
                }
                Err(e) => refused = Some(e),
            }
        }
        let why = refused.map_or_else(|| "none ranked".to_string(), |e| e.to_string());
        candle_core::bail!("{op}: no cuDNN algorithm for {pass:?} of {sizes:?} in {dtype:?}: {why}")
    })?;
    Ok(out)
}

/// Address of the elements of a contiguous operand; the guard lives until the work on it is queued.
fn address<'a>(
    (storage, layout): (&'a CudaStorage, &Layout),
    stream: &'a CudaStream,
) -> Result<(CUdeviceptr, SyncOnDrop<'a>)> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        return Err(candle_core::Error::RequiresContiguous { op: "cudnn" }.bt());
    };
    Ok(match &storage.slice {
        CudaStorageSlice::F32(s) => s.slice(start..end).view_ptr(stream),
        CudaStorageSlice::F64(s) => s.slice(start..end).view_ptr(stream),
        CudaStorageSlice::BF16(s) => s.slice(start..end).view_ptr(stream),
        _ => candle_core::bail!("no cuDNN operation here takes {:?}", storage.dtype()),
    })
}

/// As [`address`], to be written.
fn address_mut<'a>(storage: &'a mut CudaStorage, stream: &'a CudaStream) -> Result<(CUdeviceptr, SyncOnDrop<'a>)> {
    Ok(match &mut storage.slice {
        CudaStorageSlice::F32(s) => s.device_ptr_mut(stream),
        CudaStorageSlice::F64(s) => s.device_ptr_mut(stream),
        CudaStorageSlice::BF16(s) => s.device_ptr_mut(stream),
        _ => candle_core::bail!("no cuDNN operation here writes this type"),
    })
}

/// Shape of a weight.
struct FilterShape(sys::cudnnFilterDescriptor_t);

impl Drop for FilterShape {
    fn drop(&mut self) {
        // SAFETY: made by `create_filter_descriptor`, destroyed once.
        let _ = unsafe { result::destroy_filter_descriptor(self.0) };
    }
}

/// Stride, padding, dilation, groups and kind of arithmetic.
struct Geometry(sys::cudnnConvolutionDescriptor_t);

impl Drop for Geometry {
    fn drop(&mut self) {
        // SAFETY: made by `create_convolution_descriptor`, destroyed once.
        let _ = unsafe { result::destroy_convolution_descriptor(self.0) };
    }
}

/// The descriptors of one convolution.
struct Plan {
    op: &'static str,
    x: TensorShape,
    weight: FilterShape,
    y: TensorShape,
    geometry: Geometry,
    sums: sys::cudnnDataType_t,
    math: sys::cudnnMathType_t,
}

impl Plan {
    fn new(op: &'static str, sizes: &Sizes, dtype: DType) -> Result<Self> {
        use sys::cudnnMathType_t::{CUDNN_DEFAULT_MATH, CUDNN_FMA_MATH, CUDNN_TENSOR_OP_MATH};
        let (data, sums) = data_types(dtype)?;
        let math = match dtype {
            DType::BF16 => CUDNN_TENSOR_OP_MATH,
            // cuDNN's default is TF32 where the device has it, which must be asked for here.
            DType::F32 if !gemm_reduced_precision_f32() => CUDNN_FMA_MATH,
            _ => CUDNN_DEFAULT_MATH,
        };
        let weight = FilterShape(result::create_filter_descriptor().map_err(|e| failed(op, e))?);
        let geometry = Geometry(result::create_convolution_descriptor().map_err(|e| failed(op, e))?);
        let ([pad_h, pad_w], [stride_h, stride_w]) = (ints(sizes.padding)?, ints(sizes.stride)?);
        let ([dilation_h, dilation_w], [groups]) = (ints(sizes.dilation)?, ints([sizes.groups])?);
        let (format, mode) =
            (sys::cudnnTensorFormat_t::CUDNN_TENSOR_NCHW, sys::cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION);
        // SAFETY: both descriptors were made above.
        unsafe {
            result::set_filter4d_descriptor(weight.0, data, format, ints(sizes.weight)?)
                .and_then(|()| {
                    result::set_convolution2d_descriptor(
                        geometry.0, pad_h, pad_w, stride_h, stride_w, dilation_h, dilation_w, mode, sums,
                    )
                })
                .and_then(|()| result::set_convolution_group_count(geometry.0, groups))
                .and_then(|()| result::set_convolution_math_type(geometry.0, math))
                .map_err(|e| failed(op, e))?;
        }
        let (x, y) = (TensorShape::new(data, sizes.x)?, TensorShape::new(data, sizes.y)?);
        Ok(Self { op, x, weight, y, geometry, sums, math })
    }

    /// Algorithms that repeat their bits and fit the workspace, the fastest first by cuDNN's estimate; then those that
    /// take nearly every shape, and at the very end those of the gradients that add in any order.
    fn ranked(&self, handle: &Handle, pass: Pass) -> Vec<Algorithm> {
        let (h, x, w, y, g) = (handle.raw, self.x.0, self.weight.0, self.y.0, self.geometry.0);
        macro_rules! ask {
            ($ask:ident($($descriptor:expr),*), $variant:path) => {{
                let (mut found, mut perf) = (0, Vec::with_capacity(RANKED));
                // SAFETY: handle and descriptors are alive; cuDNN writes at most RANKED entries and says how many.
                let asked = unsafe {
                    result::$ask(h, $($descriptor,)* RANKED as i32, &mut found, perf.as_mut_ptr())
                };
                if asked.is_ok() {
                    // SAFETY: cuDNN wrote `found` entries.
                    unsafe { perf.set_len(usize::try_from(found).unwrap_or(0).min(RANKED)) };
                }
                perf.iter()
                    .filter(|p| {
                        p.status == sys::cudnnStatus_t::CUDNN_STATUS_SUCCESS
                            && p.determinism == sys::cudnnDeterminism_t::CUDNN_DETERMINISTIC
                            && p.memory <= WORKSPACE
                    })
                    .map(|p| $variant(p.algo))
                    .collect::<Vec<_>>()
            }};
        }
        match pass {
            Pass::Forward => {
                use sys::cudnnConvolutionFwdAlgo_t::*;
                let mut ranked = ask!(get_convolution_forward_algorithm(x, w, g, y), Algorithm::Forward);
                ranked.extend(
                    [CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM, CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_GEMM]
                        .map(Algorithm::Forward),
                );
                ranked
            }
            Pass::InputGrad => {
                use sys::cudnnConvolutionBwdDataAlgo_t::*;
                let mut ranked = ask!(get_convolution_backward_data_algorithm(w, y, g, x), Algorithm::InputGrad);
                ranked.extend(
                    [CUDNN_CONVOLUTION_BWD_DATA_ALGO_1, CUDNN_CONVOLUTION_BWD_DATA_ALGO_0].map(Algorithm::InputGrad),
                );
                ranked
            }
            Pass::WeightGrad => {
                use sys::cudnnConvolutionBwdFilterAlgo_t::*;
                let mut ranked = ask!(get_convolution_backward_filter_algorithm(x, y, g, w), Algorithm::WeightGrad);
                ranked.extend(
                    [CUDNN_CONVOLUTION_BWD_FILTER_ALGO_1, CUDNN_CONVOLUTION_BWD_FILTER_ALGO_0]
                        .map(Algorithm::WeightGrad),
                );
                ranked
            }
        }
    }

    /// Queues the convolution by `algorithm`; an algorithm that does not take these sizes refuses here.
    fn execute(
        &self,
        handle: &Handle,
        device: &CudaDevice,
        algorithm: Algorithm,
        a: (&CudaStorage, &Layout),
        b: (&CudaStorage, &Layout),
        out: &mut CudaStorage,
    ) -> Result<()> {
        let (h, x, w, y, g) = (handle.raw, self.x.0, self.weight.0, self.y.0, self.geometry.0);
        // SAFETY: handle and descriptors are alive.
        let bytes = unsafe {
            match algorithm {
                Algorithm::Forward(algo) => result::get_convolution_forward_workspace_size(h, x, w, g, y, algo),
                Algorithm::InputGrad(algo) => result::get_convolution_backward_data_workspace_size(h, w, y, g, x, algo),
                Algorithm::WeightGrad(algo) => {
                    result::get_convolution_backward_filter_workspace_size(h, x, y, g, w, algo)
                }
            }
        }
        .map_err(|e| failed(self.op, e))?;
        // SAFETY: cuDNN takes its workspace with anything in it.
        let mut workspace: CudaSlice<u8> = unsafe { device.alloc(bytes.max(1))? };
        let stream = &handle.stream;
        let ((a, _a), (b, _b)) = (address(a, stream)?, address(b, stream)?);
        let ((out, _out), (space, _space)) = (address_mut(out, stream)?, workspace.device_ptr_mut(stream));
        let [one, zero] = one_and_zero(self.sums);
        let (a, b, out, space) = (a as *const _, b as *const _, out as *mut _, space as *mut _);
        // SAFETY: handle and descriptors are alive; each operand has the described shape and type, as `Sizes` promises;
        // `space` holds the bytes that this algorithm asked for.
        unsafe {
            match algorithm {
                Algorithm::Forward(algo) => {
                    result::convolution_forward(h, one, x, a, w, b, g, algo, space, bytes, zero, y, out)
                }
                Algorithm::InputGrad(algo) => {
                    result::convolution_backward_data(h, one, w, a, y, b, g, algo, space, bytes, zero, x, out)
                }
                Algorithm::WeightGrad(algo) => {
                    result::convolution_backward_filter(h, one, x, a, y, b, g, algo, space, bytes, zero, w, out)
                }
            }
        }
        .map_err(|e| failed(self.op, e))
    }
}

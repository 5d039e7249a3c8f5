//! Where tensors live: whether a CUDA device can be had in this process, and the one handle to it.
//!
//! Everything here answers without features `cuda`, too; what it answers then is that there is none.

use candle_core::Device;

use crate::error::{OpsError, Result};

/// How many CUDA devices this process can use.
///
/// Asks the machine and opens nothing: the libraries must be there, and the driver must answer. Never panics, with
/// libraries linked at load time and with libraries opened at run time.
///
/// # Errors
/// `Config` that says what is missing: the feature at build time, a library, or a device.
pub fn n_cuda_devices() -> Result<usize> {
    imp::n_devices()
}

/// The CUDA device `index`, the same each time it is asked for.
///
/// One device in a process has one stream, on which everything on it is queued in order, from whichever thread: tensors
/// need no events. Its memory pool keeps what is freed for the next step (candle's own would hand it back at every
/// synchronisation). Tensors of two candle devices opened apart would refuse one another even on one card: open it here.
///
/// # Errors
/// Those of [`n_cuda_devices`]; `Config` for an index beyond them; `Candle` when the device does not open.
pub fn open_cuda(index: usize) -> Result<Device> {
    let found = n_cuda_devices()?;
    if index >= found {
        return Err(OpsError::config(
            format!("cuda:{index}: the machine has {found} CUDA devices"),
            "they count from 0; CUDA_VISIBLE_DEVICES may hide some",
        ));
    }
    imp::open(index)
}

/// Whether f32 products on CUDA may round their factors to TF32 (10 bits of mantissa) on tensor cores: matrix products
/// and convolutions alike. Off from the start; one switch for the process.
///
/// Without feature `cuda` it does nothing.
pub fn allow_tf32(allow: bool) {
    imp::allow_tf32(allow);
}

#[cfg(not(feature = "cuda"))]
mod imp {
    use super::*;

    pub(super) fn n_devices() -> Result<usize> {
        Err(OpsError::config("this program was built without CUDA", "build with --features cuda,cudnn, or use the CPU"))
    }

    pub(super) fn open(_index: usize) -> Result<Device> {
        n_devices().map(|_| Device::Cpu)
    }

    pub(super) fn allow_tf32(_allow: bool) {}
}

#[cfg(feature = "cuda")]
mod imp {
    use std::collections::BTreeMap;
    use std::panic::catch_unwind;
    use std::sync::{Mutex, OnceLock, PoisonError};

    use candle_core::cuda::cudarc::driver::{CudaContext, result, sys};
    use libloading::Library;

    use super::*;

    /// Libraries that a device needs, by the name after `lib`; the driver first.
    const LIBRARIES: &[&str] = &[
        "cuda",
        "cublas",
        "cublasLt",
        "curand",
        "nvrtc",
        #[cfg(feature = "cudnn")]
        "cudnn",
    ];

    /// Versions in library names, from the newest CUDA down to the driver's own 1.
    const VERSIONS: &[&str] = &["", ".13", ".12", ".11", ".10", ".9", ".1"];

    /// Whether the dynamic loader finds `library`, as cudarc will look for it.
    fn is_present(library: &str) -> bool {
        if !cfg!(target_os = "linux") {
            // Names differ elsewhere: there the driver is asked, and a panic of cudarc caught.
            return true;
        }
        VERSIONS.iter().any(|version| {
            // SAFETY: NVIDIA's libraries run no code of ours when loaded or unloaded, and cudarc loads the same ones.
            let opened = unsafe { Library::new(format!("lib{library}.so{version}")) };
            // It stays open: some of them do not bear being closed and opened again.
            opened.map(std::mem::forget).is_ok()
        })
    }

    pub(super) fn n_devices() -> Result<usize> {
        static FOUND: OnceLock<std::result::Result<usize, String>> = OnceLock::new();
        let found = FOUND.get_or_init(|| {
            if let Some(absent) = LIBRARIES.iter().find(|library| !is_present(library)) {
                let what = if *absent == "cuda" { "no CUDA driver: " } else { "" };
                return Err(format!("{what}the library lib{absent}.so is not there"));
            }
            // cudarc panics where a library is there but lacks what it needs.
            match catch_unwind(CudaContext::device_count) {
                Ok(Ok(count)) if count > 0 => Ok(usize::try_from(count).unwrap_or(0)),
                Ok(Ok(_)) => Err("the CUDA driver sees no device".into()),
                Ok(Err(e)) => Err(format!("the CUDA driver does not answer: {e}")),
                Err(_) => Err("the CUDA driver lacks what this program needs".into()),
            }
        });
        found.clone().map_err(|why| {
            OpsError::config(
                why,
                "install the NVIDIA driver and CUDA's libraries and name their folder in LD_LIBRARY_PATH, \
                 or use the CPU",
            )
        })
    }

    pub(super) fn open(index: usize) -> Result<Device> {
        static OPEN: Mutex<BTreeMap<usize, Device>> = Mutex::new(BTreeMap::new());
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = open.get(&index) {
            return Ok(device.clone());
        }
        let opened = catch_unwind(|| Device::new_cuda_with_stream(index));
        let device = opened.map_err(|_| {
            OpsError::config(
                format!("cuda:{index}: a CUDA library does not fit this program"),
                "the line above names it; CUDA's libraries must be of the version this program was built for",
            )
        })??;
        let cuda = device.as_cuda_device()?;
        // SAFETY: this is the only stream on which tensors of this device live, since the device is opened once; nothing
        // was allocated on it before, and everything after is queued in order.
        unsafe { cuda.disable_event_tracking() };
        keep_freed_memory(cuda.cuda_stream().context())?;
        open.insert(index, device.clone());
        Ok(device)
    }

    /// Lets the device's memory pool keep all it ever held.
    fn keep_freed_memory(context: &CudaContext) -> Result<()> {
        if !context.has_async_alloc() {
            return Ok(());
        }
        let mut everything = u64::MAX;
        let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        let candle = |e: result::DriverError| OpsError::Candle(candle_core::Error::wrap(e));
        // SAFETY: the context's device is valid while the context is; it has a default pool, as asked above, from which
        // cudarc allocates; the attribute is a 64-bit number.
        unsafe {
            let pool = result::device::get_default_mem_pool(context.cu_device()).map_err(candle)?;
            result::mem_pool::set_attribute(pool, threshold, std::ptr::from_mut(&mut everything).cast()).map_err(candle)
        }
    }

    pub(super) fn allow_tf32(allow: bool) {
        candle_core::cuda::set_gemm_reduced_precision_f32(allow);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn asking_never_panics_and_says_what_is_missing() {
        match n_cuda_devices() {
            Ok(found) => {
                assert!(found > 0);
                let text = open_cuda(found).unwrap_err().to_string();
                assert!(text.contains(&format!("cuda:{found}")), "{text}");
            }
            Err(why) => {
                let text = why.to_string();
                assert!(text.contains("CUDA") && text.contains("hint"), "{text}");
                assert_eq!(open_cuda(0).unwrap_err().to_string(), text);
            }
        }
    }

    #[test]
    fn a_device_is_opened_once() -> Result<()> {
        if n_cuda_devices().is_ok() {
            assert!(open_cuda(0)?.same_device(&open_cuda(0)?));
        }
        Ok(())
    }
}

//! Tiles of AMX-BF16: 32 rows by 32 columns in four tile registers, two more for each factor.
//!
//! The tile instructions have no stable intrinsics; they stand here as one block of assembly, whose layout the kernel
//! `plain_bf16::blocked_kernel` follows without them.

use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, _xgetbv};

use super::tile::{Tile, finish};
use super::{Kernel, x86};

/// Rows and columns of a kernel's tile; pairs of a block.
const SIDE: usize = 32;
const BLOCK: usize = 16;

/// The kernel, where processor and operating system have AMX-BF16 and let this process use it.
pub(super) fn kernel() -> Option<Kernel<f32, u32>> {
    (is_present() && is_permitted()).then_some(Kernel {
        name: "amx-bf16",
        mr: SIDE,
        nr: SIDE,
        lanes: SIDE,
        pair: 2,
        k_block: BLOCK,
        join: super::pair,
        tile,
        tile_along: tile,
        pack_rows: x86::pack_pairs_32,
        pack_along: x86::pack_pairs_along_32,
        pack_columns: x86::pack_column_pairs_32,
    })
}

/// AMX-TILE and AMX-BF16 in the processor, tile state enabled by the system, and the AVX-512 that packs.
fn is_present() -> bool {
    if !(is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512bw") && x86::has_xsave()) {
        return false;
    }
    let features = __cpuid_count(7, 0).edx;
    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    // SAFETY: XSAVE is enabled, as asked above.
    let state = unsafe { _xgetbv(0) };
    features & (BF16 | TILE) == BF16 | TILE && state >> 17 & 3 == 3
}

/// Asks Linux for the tile state, which a process may use only after that; elsewhere no.
fn is_permitted() -> bool {
    #[cfg(target_os = "linux")]
    {
        const ARCH_PRCTL: i64 = 158;
        const REQUEST_STATE: u64 = 0x1023;
        const TILE_DATA: u64 = 18;
        let mut result = ARCH_PRCTL;
        // SAFETY: the call changes nothing but what this process may use; the kernel clobbers rcx and r11.
        unsafe {
            asm!("syscall", inout("rax") result, in("rdi") REQUEST_STATE, in("rsi") TILE_DATA, out("rcx") _, out("r11") _);
        }
        result == 0
    }
    #[cfg(not(target_os = "linux"))]
    false
}

/// Every tile register with 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Config([u8; 64]);

static CONFIG: Config = {
    let mut bytes = [0; 64];
    bytes[0] = 1;
    let mut i = 0;
    while i < 8 {
        bytes[16 + 2 * i] = 64;
        bytes[48 + i] = 16;
        i += 1;
    }
    Config(bytes)
};

#[repr(C, align(64))]
struct Sums([f32; SIDE * SIDE]);

/// Blocks of `a` are `[32][16]` pairs, of `b` `[16][32]`.
///
/// # Safety
/// As [`Kernel::tile`] and [`Kernel::tile_along`].
unsafe fn tile(t: &Tile<f32, u32>) {
    let mut sums = Sums([0.0; SIDE * SIDE]);
    // Blocks follow one another, or every segment is one.
    let (blocks, a_step, b_step) = match t.segments {
        1 => (t.k / BLOCK, SIDE * BLOCK, SIDE * BLOCK),
        segments => (segments, t.a_segment, t.b_segment),
    };
    if blocks > 0 {
        // SAFETY: `blocks` blocks lie at the steps computed above, by the tile's contract; the registers are
        // configured before they are used and released after; `sums` holds four tiles.
        unsafe {
            asm!(
                "ldtilecfg [{config}]",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm4, [{a} + {a_row}*1]",
                "tileloadd tmm6, [{b} + {b_row}*1]",
                "tileloadd tmm7, [{b} + {b_row}*1 + 64]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{a} + {a_row}*1 + 1024]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a}, {a_step}",
                "add {b}, {b_step}",
                "dec {n}",
                "jnz 2b",
                "tilestored [{sums} + {b_row}*1], tmm0",
                "tilestored [{sums} + {b_row}*1 + 64], tmm1",
                "tilestored [{sums} + {b_row}*1 + 2048], tmm2",
                "tilestored [{sums} + {b_row}*1 + 2112], tmm3",
                "tilerelease",
                config = in(reg) CONFIG.0.as_ptr(),
                a = inout(reg) t.a => _,
                b = inout(reg) t.b => _,
                a_row = in(reg) 4 * BLOCK,
                b_row = in(reg) 4 * SIDE,
                a_step = in(reg) 4 * a_step,
                b_step = in(reg) 4 * b_step,
                n = inout(reg) blocks => _,
                sums = in(reg) sums.0.as_mut_ptr(),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
    // SAFETY: forwarded.
    unsafe { finish(t, &sums.0, SIDE) };
}

//! A global allocator for programs that train: large blocks are kept for the next step instead of being handed back.
//!
//! A training step frees every map it made, and the next one asks for the same sizes again. An allocator that returns
//! them to the kernel in between has every page cleared, and mapped, anew: on a virtual machine that is up to half of a
//! step. One that never returns anything grows beyond what was ever in use at once, because a freed block of one size
//! does not serve another.
//!
//! What does not live here: the choice of an allocator. A library never sets one; a program does.

use std::alloc::{GlobalAlloc, Layout};
use std::sync::{Mutex, PoisonError};

/// Blocks of at least this size are kept.
const LARGE: usize = 1 << 20;

/// Alignment of every block that is kept: a cache line, and the widest vector.
const ALIGN: usize = 64;

/// Keeps freed blocks of 1 MiB and more for requests of the same size, and hands everything else to `A`.
///
/// Blocks in use and blocks kept together never take more than the blocks in use took at their highest: before a new block
/// is made, those that were freed longest ago are given up as far as it would go beyond that. A
/// step that repeats is served from what the step before left.
///
/// On Linux the blocks are mapped from the kernel and unmapped one by one, in huge pages where it has them; elsewhere they
/// come from `A`. Sizes are rounded up by a 64th at most.
///
/// # Example
/// ```
/// use std::alloc::System;
/// use segdistill_ops::alloc::Recycling;
///
/// #[global_allocator]
/// static ALLOCATOR: Recycling<System> = Recycling::new(System);
///
/// let first = vec![1u8; 3 << 20];
/// let place = first.as_ptr();
/// drop(first);
/// let second: Vec<u8> = Vec::with_capacity(3 << 20);
/// assert_eq!(second.as_ptr(), place);
/// ```
pub struct Recycling<A> {
    inner: A,
    blocks: Mutex<Blocks>,
}

/// What is known of the large blocks.
struct Blocks {
    /// Freed blocks, those freed longest ago first.
    kept: Vec<Block>,
    /// Bytes of `kept`.
    kept_bytes: usize,
    /// Bytes in use.
    used_bytes: usize,
    /// The most that was in use at once.
    most_used_bytes: usize,
}

struct Block {
    start: *mut u8,
    len: usize,
}

// SAFETY: a kept block belongs to nobody else; whoever holds the lock may hand it to any thread.
unsafe impl Send for Block {}

/// Most blocks kept: their list then never asks for a large block itself, which would wait for the lock it is under.
const MOST_KEPT: usize = 4096;

/// What a large request is rounded up to, so that it has a block of its own kind; `None` for requests that are passed on.
fn block_layout(layout: Layout) -> Option<Layout> {
    if layout.size() < LARGE || layout.align() > ALIGN {
        return None;
    }
    let grain = (1usize << layout.size().ilog2()) / 64;
    let size = layout.size().checked_next_multiple_of(grain)?;
    Layout::from_size_align(size, ALIGN).ok()
}

impl<A> Recycling<A> {
    /// Over the allocator that small requests and new blocks are asked of.
    pub const fn new(inner: A) -> Self {
        let blocks = Blocks { kept: Vec::new(), kept_bytes: 0, used_bytes: 0, most_used_bytes: 0 };
        Self { inner, blocks: Mutex::new(blocks) }
    }

    fn with_blocks<R>(&self, f: impl FnOnce(&mut Blocks) -> R) -> R {
        f(&mut self.blocks.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<A: GlobalAlloc> Recycling<A> {
    /// A block that was kept, or a new one and whether its bytes are zeros.
    ///
    /// # Safety
    /// `block` comes from [`block_layout`].
    unsafe fn take(&self, block: Layout, zeroed: bool) -> (*mut u8, bool) {
        let kept = self.with_blocks(|blocks| blocks.reuse(block.size()));
        if let Some(start) = kept {
            return (start, false);
        }
        // One by one and outside the lock, which `inner` might need for a request of its own.
        while let Some(old) = self.with_blocks(Blocks::surplus) {
            // SAFETY: the block was given by `inner` for this layout, and nobody holds it any more.
            unsafe { pages::dealloc(&self.inner, old.start, Layout::from_size_align_unchecked(old.len, ALIGN)) };
        }
        // SAFETY: the layout has a size of 1 MiB at least.
        let start = unsafe { pages::alloc(&self.inner, block, zeroed) };
        if !start.is_null() {
            self.with_blocks(Blocks::settle);
            return (start, zeroed);
        }
        self.release();
        // SAFETY: as above.
        let start = unsafe { pages::alloc(&self.inner, block, zeroed) };
        self.with_blocks(|blocks| match start.is_null() {
            true => blocks.used_bytes -= block.size(),
            false => blocks.settle(),
        });
        (start, zeroed)
    }

    /// Gives every kept block back, when memory has run out.
    fn release(&self) {
        while let Some(old) = self.with_blocks(Blocks::oldest) {
            // SAFETY: `inner` or the kernel gave the block for this layout, and nobody holds it any more.
            unsafe { pages::dealloc(&self.inner, old.start, Layout::from_size_align_unchecked(old.len, ALIGN)) };
        }
    }

    /// A small request, asked once more when memory has run out while blocks were kept.
    fn small(&self, ask: impl Fn(&A) -> *mut u8) -> *mut u8 {
        let start = ask(&self.inner);
        if !start.is_null() {
            return start;
        }
        self.release();
        ask(&self.inner)
    }
}

/// Large blocks straight from the kernel, which has them back at once, in huge pages where it offers them.
#[cfg(target_os = "linux")]
mod pages {
    use super::{GlobalAlloc, Layout};

    /// Zeroed pages, or null.
    ///
    /// # Safety
    /// The size is not 0.
    pub(super) unsafe fn alloc<A: GlobalAlloc>(_: &A, block: Layout, _zeroed: bool) -> *mut u8 {
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping of its own.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), block.size(), access, kind, -1, 0) };
        if start == libc::MAP_FAILED {
            return std::ptr::null_mut();
        }
        // Only advice: a kernel without huge pages refuses it, and nothing changes.
        // SAFETY: the mapping above.
        unsafe { libc::madvise(start, block.size(), libc::MADV_HUGEPAGE) };
        start.cast()
    }

    /// # Safety
    /// `alloc` gave the block, and nobody uses it.
    pub(super) unsafe fn dealloc<A: GlobalAlloc>(_: &A, start: *mut u8, block: Layout) {
        // SAFETY: the caller's promise.
        unsafe { libc::munmap(start.cast(), block.size()) };
    }
}

/// Large blocks from the allocator underneath.
#[cfg(not(target_os = "linux"))]
mod pages {
    use super::{GlobalAlloc, Layout};

    /// # Safety
    /// That of [`GlobalAlloc::alloc`].
    pub(super) unsafe fn alloc<A: GlobalAlloc>(inner: &A, block: Layout, zeroed: bool) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe { if zeroed { inner.alloc_zeroed(block) } else { inner.alloc(block) } }
    }

    /// # Safety
    /// That of [`GlobalAlloc::dealloc`].
    pub(super) unsafe fn dealloc<A: GlobalAlloc>(inner: &A, start: *mut u8, block: Layout) {
        // SAFETY: the caller's promise.
        unsafe { inner.dealloc(start, block) }
    }
}

impl Blocks {
    /// A kept block of exactly this size, the one freed last; without one the size is counted as used, and is settled or
    /// taken back once it is known whether there is memory for it.
    fn reuse(&mut self, len: usize) -> Option<*mut u8> {
        let found = self.kept.iter().rposition(|block| block.len == len).map(|at| self.kept.remove(at));
        self.used_bytes += len;
        if found.is_some() {
            self.kept_bytes -= len;
            self.settle();
        }
        found.map(|block| block.start)
    }

    /// What is used is there: it may be kept later. A request that failed must not raise the ceiling.
    fn settle(&mut self) {
        self.most_used_bytes = self.most_used_bytes.max(self.used_bytes);
    }

    /// A block that may not be kept any longer.
    fn surplus(&mut self) -> Option<Block> {
        match self.used_bytes + self.kept_bytes <= self.most_used_bytes.max(self.used_bytes) {
            true => None,
            false => self.oldest(),
        }
    }

    /// The block kept longest.
    fn oldest(&mut self) -> Option<Block> {
        if self.kept.is_empty() {
            return None;
        }
        let oldest = self.kept.remove(0);
        self.kept_bytes -= oldest.len;
        Some(oldest)
    }

    /// Keeps a block whose user is done with it; gives back the one kept longest where there are too many.
    fn keep(&mut self, block: Block) -> Option<Block> {
        self.used_bytes -= block.len;
        let too_many = if self.kept.len() < MOST_KEPT { None } else { self.oldest() };
        self.kept_bytes += block.len;
        self.kept.push(block);
        too_many
    }
}

// SAFETY: every block is either with one user or in `kept`: `reuse` takes it out under the lock, `keep` puts it there
// after its user gave it up. Layouts that `block_layout` refuses go to `inner` and come back to it; it decides by the
// layout alone, so a block is freed as it was made.
unsafe impl<A: GlobalAlloc> GlobalAlloc for Recycling<A> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are `inner`'s conditions.
        unsafe {
            match block_layout(layout) {
                Some(block) => self.take(block, false).0,
                None => self.small(|inner| inner.alloc(layout)),
            }
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as `alloc`; a kept block has at least the bytes asked for.
        unsafe {
            let Some(block) = block_layout(layout) else { return self.small(|inner| inner.alloc_zeroed(layout)) };
            let (start, is_zero) = self.take(block, true);
            if !start.is_null() && !is_zero {
                start.write_bytes(0, layout.size());
            }
            start
        }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        match block_layout(layout) {
            Some(block) => {
                let too_many = self.with_blocks(|blocks| blocks.keep(Block { start, len: block.size() }));
                if let Some(old) = too_many {
                    // SAFETY: as in `release`.
                    unsafe {
                        pages::dealloc(&self.inner, old.start, Layout::from_size_align_unchecked(old.len, ALIGN));
                    }
                }
            }
            // SAFETY: it came from `inner` for this very layout.
            None => unsafe { self.inner.dealloc(start, layout) },
        }
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller's promises: `new_size` fits a layout, `start` has `layout.size()` bytes and is given up.
        unsafe {
            let new = Layout::from_size_align_unchecked(new_size, layout.align());
            match (block_layout(layout), block_layout(new)) {
                (None, None) => self.small(|inner| inner.realloc(start, layout, new_size)),
                (Some(old), Some(new)) if old.size() == new.size() => start,
                _ => {
                    let moved = self.alloc(new);
                    if !moved.is_null() {
                        moved.copy_from_nonoverlapping(start, layout.size().min(new_size));
                        self.dealloc(start, layout);
                    }
                    moved
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::alloc::System;
    use std::collections::BTreeSet;

    use super::*;

    fn layout(mib: usize) -> Layout {
        Layout::from_size_align(mib << 20, 4).unwrap()
    }

    #[test]
    fn a_step_that_repeats_is_given_the_blocks_of_the_one_before() {
        let heap = Recycling::new(System);
        let sizes = [3, 7, 3, 12, 1, 40];
        let mut first: Option<BTreeSet<*mut u8>> = None;
        for step in 0..4 {
            // SAFETY: each block is freed with its layout, once.
            let starts = unsafe {
                let starts = sizes.map(|mib| heap.alloc(layout(mib)));
                for (start, mib) in starts.into_iter().zip(sizes) {
                    assert!(start.addr().is_multiple_of(ALIGN));
                    start.write_bytes(step, mib << 20);
                }
                starts.into_iter().zip(sizes).for_each(|(start, mib)| heap.dealloc(start, layout(mib)));
                BTreeSet::from(starts)
            };
            assert_eq!(starts.len(), sizes.len(), "no block is given twice at once");
            assert_eq!(*first.get_or_insert_with(|| starts.clone()), starts, "step {step}");
        }
    }

    #[test]
    fn used_and_kept_blocks_never_exceed_what_was_used_at_once() {
        let heap = Recycling::new(System);
        let mut rng = crate::rng::Stream::new(7, "alloc", &[]);
        let mut live: Vec<(*mut u8, usize)> = Vec::new();
        let (mut used, mut most, mut reused) = (0, 0, 0);
        for _ in 0..2000 {
            if live.len() < 12 && rng.chance(0.55) || live.is_empty() {
                // Powers of two, which are not rounded.
                let mib = 1 << rng.below(6);
                let kept = heap.with_blocks(|blocks| blocks.kept_bytes);
                // SAFETY: freed below with the same layout.
                live.push((unsafe { heap.alloc(layout(mib)) }, mib));
                reused += usize::from(heap.with_blocks(|blocks| blocks.kept_bytes) + (mib << 20) == kept);
                used += mib << 20;
                most = most.max(used);
            } else {
                let (start, mib) = live.swap_remove(rng.below(live.len() as u64) as usize);
                // SAFETY: allocated above with this layout.
                unsafe { heap.dealloc(start, layout(mib)) };
                used -= mib << 20;
            }
            heap.with_blocks(|blocks| {
                assert_eq!((blocks.used_bytes, blocks.most_used_bytes), (used, most));
                assert_eq!(blocks.kept_bytes, blocks.kept.iter().map(|block| block.len).sum::<usize>());
                assert!(used + blocks.kept_bytes <= most);
            });
        }
        assert!(reused > 700, "{reused} of some 1000 requests were served from kept blocks");
        for (start, mib) in live {
            // SAFETY: allocated above with this layout.
            unsafe { heap.dealloc(start, layout(mib)) };
        }
    }

    #[test]
    fn zeroed_blocks_are_zero_and_grown_ones_keep_their_bytes() {
        let heap = Recycling::new(System);
        // SAFETY: every block is read and written within its layout and freed with its last one.
        unsafe {
            let used = heap.alloc(layout(2));
            used.write_bytes(0xff, 2 << 20);
            heap.dealloc(used, layout(2));
            let zeroed = heap.alloc_zeroed(layout(2));
            assert_eq!(zeroed, used, "the block is taken again");
            assert!(std::slice::from_raw_parts(zeroed, 2 << 20).iter().all(|&byte| byte == 0));
            zeroed.write_bytes(7, 2 << 20);

            // Within the rounded size, beyond it, below what is kept, and back.
            let mut size = 2 << 20;
            let mut start = zeroed;
            for next in [(2 << 20) + 5, 9 << 20, 1000, 3 << 20] {
                start = heap.realloc(start, Layout::from_size_align(size, 4).unwrap(), next);
                size = next;
                assert!(std::slice::from_raw_parts(start, 1000).iter().all(|&byte| byte == 7));
            }
            heap.dealloc(start, Layout::from_size_align(size, 4).unwrap());
        }
    }

    #[test]
    fn rounding_costs_a_64th_at_most_and_small_or_odd_requests_are_passed_on() {
        let of = |size, align| block_layout(Layout::from_size_align(size, align).unwrap());
        assert!(of(LARGE - 1, 4).is_none() && of(LARGE, 128).is_none());
        for size in (LARGE..64 * LARGE).step_by(123_457) {
            let block = of(size, 4).unwrap();
            assert!(block.size() >= size && (block.size() - size) * 64 <= size && block.align() == ALIGN);
        }
    }

    #[test]
    fn a_request_that_cannot_be_met_does_not_raise_the_ceiling() {
        let heap = Recycling::new(System);
        let impossible = Layout::from_size_align(1 << 46, 4).unwrap();
        for round in 0..2 {
            for mib in 20..40 {
                // SAFETY: each block is freed with its layout, once.
                unsafe { heap.dealloc(heap.alloc(layout(mib)), layout(mib)) };
            }
            let (kept, most) = heap.with_blocks(|blocks| (blocks.kept_bytes, blocks.most_used_bytes));
            assert!(kept <= most && most < 41 << 20, "round {round}: {kept} kept of {most}");
            // SAFETY: nothing is used where nothing was given.
            assert!(unsafe { heap.alloc(impossible) }.is_null());
            assert_eq!(heap.with_blocks(|blocks| blocks.used_bytes), 0);
        }
    }

    #[test]
    fn the_list_of_kept_blocks_is_bounded() {
        let heap = Recycling::new(System);
        let n = MOST_KEPT + 100;
        // SAFETY: each block is freed with its layout, once; none is written to.
        unsafe {
            let starts: Vec<*mut u8> = (0..n).map(|_| heap.alloc(layout(1))).collect();
            starts.into_iter().for_each(|start| heap.dealloc(start, layout(1)));
        }
        assert_eq!(heap.with_blocks(|blocks| blocks.kept.len()), MOST_KEPT);
        heap.release();
        assert_eq!(heap.with_blocks(|blocks| (blocks.kept.len(), blocks.kept_bytes)), (0, 0));
    }
}

//! The heap: free lists under a lock, and a count of how often it is asked.

#![expect(unsafe_code, reason = "an allocator")]

use core::alloc::{GlobalAlloc, Layout};
use core::mem::MaybeUninit;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicU64, Ordering};

use linked_list_allocator::Heap;
use spin::mutex::SpinMutex;

const SIZE: usize = 8 << 20;

struct Counted(SpinMutex<Heap>);

static MEMORY: SpinMutex<[MaybeUninit<u8>; SIZE]> = SpinMutex::new([MaybeUninit::uninit(); SIZE]);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

#[global_allocator]
static ALLOCATOR: Counted = Counted(SpinMutex::new(Heap::empty()));

/// Gives the heap its memory. Once, before anything is allocated.
pub(crate) fn set_up() {
    let memory = spin::mutex::SpinMutexGuard::leak(MEMORY.lock());
    ALLOCATOR.0.lock().init_from_slice(memory);
}

/// How often memory was asked for, by all processors.
pub(crate) fn allocations() -> u64 {
    ALLOCATIONS.load(Ordering::Relaxed)
}

// SAFETY: the heap gives out each byte of `MEMORY` once at a time, aligned as asked; the lock keeps its lists whole.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        let found = self.0.lock().allocate_first_fit(layout);
        found.map_or(ptr::null_mut(), NonNull::as_ptr)
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        if let Some(memory) = NonNull::new(memory) {
            // SAFETY: the caller's word: it came from `alloc`, with this layout.
            unsafe { self.0.lock().deallocate(memory, layout) }
        }
    }
}

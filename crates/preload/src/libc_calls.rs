//! libc's own functions, behind those of the same name here.

#![expect(unsafe_code, reason = "functions that the dynamic linker finds")]

use std::ffi::CStr;
use std::mem::transmute;
use std::sync::atomic::{AtomicPtr, Ordering};

use libc::{c_int, c_long, c_uint, c_ulong, c_void};

/// A function of the next library that has it.
struct Next {
    name: &'static CStr,
    address: AtomicPtr<c_void>,
}

impl Next {
    const fn new(name: &'static CStr) -> Next {
        Next {
            name,
            address: AtomicPtr::new(std::ptr::null_mut()),
        }
    }

    /// Its address; null where no library has it. Looked up once.
    fn address(&self) -> *mut c_void {
        let known = self.address.load(Ordering::Relaxed);
        if !known.is_null() {
            return known;
        }
        // SAFETY: the name is a C string; RTLD_NEXT asks for what comes after this library.
        let found = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr()) };
        self.address.store(found, Ordering::Relaxed);
        found
    }
}

macro_rules! next {
    ($($name:ident = $symbol:literal($($argument:ident: $type:ty),*) -> $result:ty $(, $failed:expr)?;)*) => {$(
        /// The next library's function of this name; fails with ENOSYS where there is none.
        pub(crate) fn $name($($argument: $type),*) -> $result {
            static NEXT: Next = Next::new($symbol);
            let address = NEXT.address();
            if address.is_null() {
                msrgate_hook::set_errno(libc::ENOSYS);
                return $($failed)?;
            }
            // SAFETY: the C library's function of this name, which takes and gives these types. Where its prototype
            // has `...` these are integers and addresses, which x86-64's calling convention passes alike.
            let next = unsafe { transmute::<*mut c_void, unsafe extern "C" fn($($type),*) -> $result>(address) };
            // SAFETY: what the caller gave to the function of the same contract here is passed on as it came.
            unsafe { next($($argument),*) }
        }
    )*};
}

next! {
    ioctl = c"ioctl"(fd: c_int, request: c_ulong, argument: usize) -> c_int, -1;
    close = c"close"(fd: c_int) -> c_int, -1;
    close_range = c"close_range"(first: c_uint, last: c_uint, flags: c_int) -> c_int, -1;
    closefrom = c"closefrom"(first: c_int) -> ();
    dup = c"dup"(old: c_int) -> c_int, -1;
    dup2 = c"dup2"(old: c_int, new: c_int) -> c_int, -1;
    dup3 = c"dup3"(old: c_int, new: c_int, flags: c_int) -> c_int, -1;
    fcntl = c"fcntl"(fd: c_int, command: c_int, argument: usize) -> c_int, -1;
    fcntl64 = c"fcntl64"(fd: c_int, command: c_int, argument: usize) -> c_int, -1;
    syscall = c"syscall"(number: c_long, a: usize, b: usize, c: usize, d: usize, e: usize, f: usize) -> c_long, -1;
}

//! The permission bitmap of one vCPU.

use alloc::boxed::Box;
use core::mem;

use msrgate_core::{Filter, Msr, Op, PassthroughMsr, SvmPermissionMap, VmxBitmap};

/// What the hardware asks whether an access leaves the guest: everything does, but for the candidates that the
/// hypervisor passes through and the filter allows.
///
/// The hardware can use a vCPU's bitmap where it lies. It begins at a page's boundary, and from [`crate::Vcpu::new`] to
/// the vCPU's end it stays at its address, wherever the [`crate::Vcpu`] moves: it is an allocation of its own. SVM's two
/// pages must follow each other in physical memory too. It changes in no other calls than [`crate::Vcpu::pick_up`],
/// [`crate::Vcpu::execute`], [`crate::Vcpu::verdict`] and [`crate::Vcpu::recalculate`], which a hypervisor makes while
/// the vCPU is out of the guest.
#[derive(Clone, Debug)]
pub struct Intercepts {
    bitmap: Bitmap,
    candidates: Box<[PassthroughMsr]>,
    /// Whether the bitmap was recomputed since [`Self::take_changed`].
    changed: bool,
}

#[derive(Clone, Debug)]
enum Bitmap {
    None,
    Vmx(Box<VmxBitmap>),
    Svm(Box<SvmPermissionMap>),
}

impl Intercepts {
    /// No bitmap: every access leaves the guest.
    pub fn all() -> Intercepts {
        Intercepts {
            bitmap: Bitmap::None,
            candidates: Box::default(),
            changed: false,
        }
    }

    /// A VMX bitmap that opens what it can of `candidates`.
    pub fn vmx(candidates: impl Into<Box<[PassthroughMsr]>>) -> Intercepts {
        Intercepts {
            bitmap: Bitmap::Vmx(Box::new(VmxBitmap::intercept_all())),
            candidates: candidates.into(),
            changed: false,
        }
    }

    /// An SVM permissions map that opens what it can of `candidates`.
    pub fn svm(candidates: impl Into<Box<[PassthroughMsr]>>) -> Intercepts {
        Intercepts {
            bitmap: Bitmap::Svm(Box::new(SvmPermissionMap::intercept_all())),
            candidates: candidates.into(),
            changed: false,
        }
    }

    /// Whether the access leaves the guest.
    pub fn intercepts(&self, msr: Msr, op: Op) -> bool {
        match &self.bitmap {
            Bitmap::None => true,
            Bitmap::Vmx(bitmap) => bitmap.intercepts(msr, op),
            Bitmap::Svm(map) => map.intercepts(msr, op),
        }
    }

    /// The VMX bitmap, where there is one.
    pub fn vmx_bitmap(&self) -> Option<&VmxBitmap> {
        match &self.bitmap {
            Bitmap::Vmx(bitmap) => Some(bitmap),
            _ => None,
        }
    }

    /// The SVM permissions map, where there is one.
    pub fn svm_permission_map(&self) -> Option<&SvmPermissionMap> {
        match &self.bitmap {
            Bitmap::Svm(map) => Some(map),
            _ => None,
        }
    }

    pub(crate) fn set_candidates(&mut self, candidates: impl Into<Box<[PassthroughMsr]>>) {
        self.candidates = candidates.into();
    }

    /// Whether the bitmap was recomputed since this was last asked.
    #[inline]
    pub(crate) fn take_changed(&mut self) -> bool {
        mem::take(&mut self.changed)
    }

    /// Starts from all ones; in place.
    pub(crate) fn recompute(&mut self, filter: Option<&Filter>) {
        self.changed = true;
        // Holds no range, so it does not allocate.
        let open = Filter::allow_all();
        let filter = filter.unwrap_or(&open);
        match &mut self.bitmap {
            Bitmap::None => {}
            Bitmap::Vmx(bitmap) => bitmap.recompute(filter, &self.candidates),
            Bitmap::Svm(map) => map.recompute(filter, &self.candidates),
        }
    }
}

//! The permission bitmap of one vCPU.

use alloc::boxed::Box;

use msrgate_core::{Candidate, Filter, Msr, Op, SvmPermissionMap, VmxBitmap};

/// What the hardware asks whether an access leaves the guest: everything does, but for the candidates that the
/// hypervisor passes through and the filter allows.
#[derive(Clone, Debug)]
pub struct Intercepts {
    bitmap: Bitmap,
    candidates: Box<[Candidate]>,
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
        }
    }

    /// A VMX bitmap that opens what it can of `candidates`.
    pub fn vmx(candidates: impl Into<Box<[Candidate]>>) -> Intercepts {
        Intercepts {
            bitmap: Bitmap::Vmx(Box::new(VmxBitmap::intercept_all())),
            candidates: candidates.into(),
        }
    }

    /// An SVM permissions map that opens what it can of `candidates`.
    pub fn svm(candidates: impl Into<Box<[Candidate]>>) -> Intercepts {
        Intercepts {
            bitmap: Bitmap::Svm(Box::new(SvmPermissionMap::intercept_all())),
            candidates: candidates.into(),
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

    pub(crate) fn set_candidates(&mut self, candidates: impl Into<Box<[Candidate]>>) {
        self.candidates = candidates.into();
    }

    /// Starts from all ones; in place.
    pub(crate) fn recompute(&mut self, filter: Option<&Filter>) {
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

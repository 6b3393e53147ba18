//! The bitmap that the hardware reads: the engine's own page, where it lies, or a copy.
//!
//! Nothing here needs a copy. It is there since hypervisors have reasons for one, a merge with L2's bitmap for example, and for
//! what goes wrong with it: the copy must follow all that [`PickUp::changed`] tells.

use msrgate_core::{SvmPermissionMap, VmxBitmap};
use msrgate_engine::{Intercepts, PickUp, Vcpu};

use crate::hypervisor::Options;
use crate::processor::{Pages, Processor};

/// One vCPU's.
pub(crate) struct Bitmap {
    copy: Option<&'static mut Pages<2>>,
    untold: bool,
}

impl Bitmap {
    pub(crate) fn new(options: Options) -> Bitmap {
        Bitmap {
            copy: options.copy.then(Pages::new),
            untold: options.untold,
        }
    }

    /// Picks up the newest filter and lets the hardware have its bitmap. Says whether it changed.
    pub(crate) fn follow(&mut self, vcpu: &mut Vcpu, processor: &mut dyn Processor) -> bool {
        let filter = |vcpu: &Vcpu| vcpu.filter().map(|filter| &raw const *filter as usize);
        let before = filter(vcpu);
        let PickUp { changed, .. } = vcpu.pick_up();
        // The mistake that `untold` makes: what `execute` took over before was no news here.
        let told = changed && !(self.untold && before == filter(vcpu) && before.is_some());
        if told {
            let PickUp { intercepts, .. } = vcpu.pick_up();
            let (address, words) = hardware(intercepts);
            match &mut self.copy {
                None => processor.set_bitmap(address),
                Some(copy) => {
                    copy.words()[..words.len()].copy_from_slice(words);
                    processor.set_bitmap(copy.address());
                }
            }
        }
        changed
    }
}

/// Where the engine's bitmap lies, and what is in it.
pub(crate) fn hardware(intercepts: &Intercepts) -> (u64, &[u64]) {
    let vmx = intercepts.vmx_bitmap().map(VmxBitmap::words).map(|words| &words[..]);
    let svm = intercepts
        .svm_permission_map()
        .map(SvmPermissionMap::words)
        .map(|words| &words[..]);
    let words = vmx.or(svm).expect("one of both");
    (words.as_ptr() as u64, words)
}

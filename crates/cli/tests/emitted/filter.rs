// The MSR filter of the policy `emitted`, made by msrgate.
// Policy hash b3fb15299cfa649c1a05de774f6bf49fb0ddd897490466002f5a8300389d7fe6.
//
// First enable KVM_CAP_X86_USER_SPACE_MSR with args[0] = EMITTED_REASONS, then call `set_msr_filter`; the other
// way round a denied access may fault before the mask is set.
use kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags};

pub const EMITTED_REASONS: u64 = 0x4;
pub const EMITTED_DEFAULT: MsrFilterDefaultAction = MsrFilterDefaultAction::ALLOW;

/// rdmsr of 0x200..=0x20f. Whole 8-byte words, since that is what the kernel copies.
pub static EMITTED_BITMAP_0: [u8; 8] = [
    0xff, 0xff, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
];

/// rdmsr of 0x40000000..=0x4000007f. Whole 8-byte words, since that is what the kernel copies.
pub static EMITTED_BITMAP_1: [u8; 16] = [
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
];

/// rdmsr and wrmsr of 0x8b..=0x20f. Whole 8-byte words, since that is what the kernel copies.
pub static EMITTED_BITMAP_2: [u8; 56] = [
    0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
    0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
    0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x1f, 0x00,
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
];

/// rdmsr and wrmsr of 0xc0000081..=0xc0000082. Whole 8-byte words, since that is what the kernel copies.
pub static EMITTED_BITMAP_3: [u8; 8] = [
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
];

pub fn emitted_ranges() -> [MsrFilterRange<'static>; 4] {
    [
        MsrFilterRange {
            flags: MsrFilterRangeFlags::READ,
            base: 0x200,
            msr_count: 16,
            bitmap: &EMITTED_BITMAP_0,
        },
        MsrFilterRange {
            flags: MsrFilterRangeFlags::READ,
            base: 0x40000000,
            msr_count: 128,
            bitmap: &EMITTED_BITMAP_1,
        },
        MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base: 0x8b,
            msr_count: 389,
            bitmap: &EMITTED_BITMAP_2,
        },
        MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base: 0xc0000081,
            msr_count: 2,
            bitmap: &EMITTED_BITMAP_3,
        },
    ]
}

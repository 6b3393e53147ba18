//! Raw filters: the engine against a naive reading of the kernel.
//!
//! An input is a kernel version and up to four calls. After each call the two must agree on its result, on the verdicts
//! around the boundaries of all filters that were tried, and on the mask; so a refused call must have left what that kernel leaves.

use std::collections::BTreeSet;
use std::sync::Arc;

use msrgate_core::{Msr, Op, Verdict};
use msrgate_engine::{Caller, Descriptor, Intercepts, Origin, Process, Profile, Vcpu, Vm};

use crate::input::Input;
use crate::kernel::{ENABLE_CAP, Kernel, On, SET_MSR_FILTER, SET_MSR_FILTER_COMPAT};
use crate::memory::Memory;

/// Where the structure of a call lies. Above it each slot has its bitmap's place, in reach of 32 bits.
const ARGP: u64 = 0x10_0000;
const STEP: u64 = 0x10_0000;

pub(crate) fn check(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let (profile, version) = input.choose(&[
        (Profile::NEWEST, (7, 0)),
        (Profile::V5_10, (5, 10)),
        (Profile::V5_19, (5, 19)),
        (Profile::V5_12, (5, 12)),
        (Profile::V5_13, (5, 15)),
        (Profile::V5_18, (5, 18)),
        (Profile::V6_1, (6, 1)),
        (Profile::V6_12, (6, 12)),
        (Profile::V6_18, (6, 18)),
    ]);
    let vm = Arc::new(Vm::new().with_profile(profile));
    let mut vcpu = Vcpu::new(vm.clone(), Intercepts::all());
    let mut kernel = Kernel::new(version);
    let mut msrs = odd_places();
    for call in 0..4 {
        if input.byte() == 255 {
            vm.kill();
            kernel.kill();
        }
        make_call(call, &mut input, &vm, &mut kernel, &mut msrs);
        for &msr in &msrs {
            compare(msr, &mut vcpu, &kernel);
        }
        for msr in odd_places() {
            compare_origins(msr, &vm, &kernel);
        }
        assert_eq!(vm.reasons().bits(), kernel.mask(), "the mask");
        if input.is_empty() {
            break;
        }
    }
}

fn odd_places() -> BTreeSet<u32> {
    let around = [0, 0x10, 0x6e0, 0x800, 0x8ff, 0xc000_0080, u32::MAX];
    around
        .into_iter()
        .flat_map(|msr: u32| [msr.wrapping_sub(1), msr, msr.wrapping_add(1)])
        .collect()
}

fn make_call(call: u32, input: &mut Input<'_>, vm: &Vm, kernel: &mut Kernel, msrs: &mut BTreeSet<u32>) {
    let on = match input.byte() {
        255 => On::System,
        254 => On::Vcpu,
        _ => On::Vm,
    };
    let process_is_32_bit = input.byte() % 2 == 1;
    let request = match input.byte() {
        255 => input.u32(),
        byte if byte % 4 == 3 => ENABLE_CAP,
        byte if byte % 4 == 2 => SET_MSR_FILTER_COMPAT,
        _ => SET_MSR_FILTER,
    };
    // Another request is none of this engine's; the kernel has many.
    let request = if request == msrgate_core::abi::CHECK_EXTENSION {
        0
    } else {
        request
    };
    let mut memory = Memory::default();
    let mut structure = if request == ENABLE_CAP {
        capability(input)
    } else {
        filter(input, request == SET_MSR_FILTER_COMPAT, &mut memory, msrs)
    };
    let argp = match input.byte() {
        255 => 0,
        254 => input.u64().max(STEP * 32),
        253 => {
            structure.pop();
            ARGP
        }
        252 => ARGP + 1,
        _ => ARGP,
    };
    memory.map(ARGP, structure);

    let process = if process_is_32_bit {
        Process::Compat
    } else {
        Process::Native
    };
    let descriptor = match on {
        On::System => Descriptor::System,
        On::Vm => Descriptor::Vm,
        On::Vcpu => Descriptor::Vcpu,
    };
    let caller = Caller::new(process, descriptor);
    let engine = vm.ioctl(request, argp, &memory, caller).map_err(|errno| errno as i32);
    let naive = kernel.ioctl(on, process_is_32_bit, request, argp, &memory).map(|()| 0);
    assert_eq!(engine, naive, "call {call}: {request:#x} with {argp:#x} by {caller:?}");
}

fn capability(input: &mut Input<'_>) -> Vec<u8> {
    let cap = input.u32_or(&[188, 188, 188, 189, 0]);
    let flags = input.u32_or(&[0, 0, 0, 1]);
    let mask = match input.byte() {
        255 => input.u64(),
        byte if byte < 128 => u64::from(byte % 9),
        byte => 1 << (byte % 64),
    };
    let mut bytes = cap.to_le_bytes().to_vec();
    bytes.extend(flags.to_le_bytes());
    bytes.extend(mask.to_le_bytes());
    bytes.resize(104, input.byte());
    bytes
}

/// A structure of either layout, and the bitmaps that it points to.
fn filter(input: &mut Input<'_>, compat: bool, memory: &mut Memory, msrs: &mut BTreeSet<u32>) -> Vec<u8> {
    let padding = input.choose(&[0, 0xff]);
    let mut bytes = input
        .u32_or(&[0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 0x8000_0000])
        .to_le_bytes()
        .to_vec();
    if !compat {
        bytes.extend([padding; 4]);
    }
    let mut near = 0x170;
    for slot in 1..=16 {
        if input.byte() < 64 {
            // An empty slot, whose other words mean nothing.
            bytes.extend([padding; 4]);
            bytes.extend([0; 4]);
            bytes.resize(bytes.len() + if compat { 8 } else { 16 }, padding);
            continue;
        }
        let flags = input.u32_or(&[1, 2, 3, 3, 3, 1, 2, 3, 1, 2, 3, 3, 0, 4, 7, u32::MAX]);
        let nmsrs = input.u32_or(&[
            1,
            2,
            7,
            8,
            31,
            63,
            64,
            65,
            100,
            300,
            1,
            5,
            127,
            128,
            129,
            4096,
            12287,
            12288,
            12289,
            12352,
            0xffff_ffc0,
            0xffff_ffe1,
            u32::MAX,
        ]);
        let base = match input.byte() {
            255 => input.u32(),
            byte if byte < 128 => near + u32::from(byte % 64),
            byte => {
                let bases = [
                    0,
                    0x7c0,
                    0x8f0,
                    0x900,
                    0xc000_0080,
                    0xffff_ff80,
                    0xffff_fff0,
                    0xffff_cffe,
                    0xffff_ffff,
                ];
                bases[usize::from(byte) % bases.len()]
            }
        };
        near = base.saturating_sub(32).min(u32::MAX - 64);
        let pointer = bitmap(input, STEP + slot * STEP, nmsrs, memory);
        bytes.extend(flags.to_le_bytes());
        bytes.extend(nmsrs.to_le_bytes());
        bytes.extend(base.to_le_bytes());
        if compat {
            bytes.extend((pointer as u32).to_le_bytes());
        } else {
            bytes.extend([padding; 4]);
            bytes.extend(pointer.to_le_bytes());
        }
        for distance in [0, 1, 7, 8, 63, 64, nmsrs / 2, nmsrs.wrapping_sub(1), nmsrs] {
            let msr = base.wrapping_add(distance);
            msrs.extend([msr.wrapping_sub(1), msr, msr.wrapping_add(1)]);
        }
    }
    bytes
}

/// Puts a bitmap at `place`, or something that only looks like it, and says where it is.
fn bitmap(input: &mut Input<'_>, place: u64, nmsrs: u32, memory: &mut Memory) -> u64 {
    let length = (u64::from(nmsrs).div_ceil(64) * 8).min(2048) as usize;
    let mut seed = input.byte();
    let mut bytes: Vec<u8> = match seed {
        0 => vec![0; length],
        1 => vec![0xff; length],
        _ => (0..length)
            .map(|_| {
                seed = seed.wrapping_mul(29).wrapping_add(113);
                seed.rotate_left(3)
            })
            .collect(),
    };
    let address = match input.byte() {
        255 => return 0,
        254 => return 1 << 63,
        253 => return u64::MAX - 3,
        252 => return input.u64(),
        251 => {
            bytes.pop();
            place
        }
        250 => {
            // As many bytes as the MSRs need, where the kernel copies whole longs.
            bytes.truncate(nmsrs.div_ceil(8) as usize);
            place
        }
        byte if byte > 240 => place + 1,
        _ => place,
    };
    memory.map(address, bytes);
    address
}

fn compare(msr: u32, vcpu: &mut Vcpu, kernel: &Kernel) {
    for op in Op::ALL {
        let naive = kernel.allowed(msr, op == Op::Write);
        assert_eq!(vcpu.verdict(Msr(msr), op) == Verdict::Allow, naive, "{op} {msr:#x}");
    }
}

/// Compares verdicts for those who touch an MSR without an RDMSR or WRMSR.
fn compare_origins(msr: u32, vm: &Vm, kernel: &Kernel) {
    for op in Op::ALL {
        let write = op == Op::Write;
        let origins = [
            (Origin::Instruction, kernel.allowed(msr, write)),
            (Origin::NestedList, kernel.allowed_in_nested_list(msr, write)),
            (Origin::SideEffect, kernel.allowed_as_side_effect(msr, write)),
            (Origin::Architectural, true),
            (Origin::Host, true),
        ];
        for (origin, naive) in origins {
            let verdict = vm.allows(origin, Msr(msr), op);
            assert_eq!(verdict == Verdict::Allow, naive, "{op} {msr:#x} by {origin:?}");
        }
    }
}

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| (msrgate_fuzz_properties::LOG.check)(bytes));

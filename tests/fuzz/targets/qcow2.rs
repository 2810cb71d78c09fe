//! A file that claims to be a qcow2 image.
#![no_main]

use godwit_agent::datapath::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| fuzzing::read_qcow2(bytes));

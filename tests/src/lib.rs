//! The lab and the test suites.
pub mod lab;

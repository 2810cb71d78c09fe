//! A fleet in one process: the real coordinator, its real channel over loopback, and model hosts that can be made to
//! fail at any request, before or after its effect. No root, no QEMU; what a host really does is proven elsewhere.

mod drains;
mod fleet;
mod image_pools;
mod images;
mod model;
mod reservations;
mod resizes;
mod steps;

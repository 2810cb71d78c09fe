//! The operator API through the router.

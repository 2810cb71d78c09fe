//! Godwit agent.

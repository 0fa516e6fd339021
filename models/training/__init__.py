"""The training loop and what it must remember: state, checkpoints, spike detection, metrics."""

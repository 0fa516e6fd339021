"""The training loop, and what lets it come back from anything: state, checkpoints, spike detection, metrics."""

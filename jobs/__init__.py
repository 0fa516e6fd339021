"""What a user runs or submits; the only room that wires pipelines, models and Ray Train and Tune together."""

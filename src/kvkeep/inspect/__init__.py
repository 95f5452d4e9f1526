"""What a codec does to one model: offline, on an engine of its own, for the operator alone."""

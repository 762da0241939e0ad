"""Package that plans training steps: memory, FLOPs and traffic on hardware that may be absent."""

"""What a run leaves behind and survives."""

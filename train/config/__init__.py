"""Configure training: one frozen dataclass for each program, and presets."""

"""Configure training: one frozen dataclass per program, and presets."""

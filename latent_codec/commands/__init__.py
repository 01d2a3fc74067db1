"""Define the commands: dataclasses whose fields are flags. None imports torch before its `run`, so --help is fast."""

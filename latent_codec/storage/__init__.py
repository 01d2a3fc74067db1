"""Write files atomically: tensors, configurations and run folders."""

"""Train and measure the MNIST models of the literature."""

"""diffusers' AutoencoderKL: folders of it that are written and read, and single files in its and the original layout.

Nothing here needs diffusers. An AutoencoderKL is a codec with the `conv` backbone, a diagonal Gaussian and a Gaussian
likelihood; what it cannot hold of ours travels in its file's metadata, so that an export of ours comes back whole.
"""

"""Exchange models with diffusers' AutoencoderKL: folders, and single files in its or the original layout.

Only `adapter` needs diffusers. An AutoencoderKL is a codec with the `conv` backbone, a diagonal Gaussian posterior and
a Gaussian likelihood; what it cannot hold of a codec travels in its file's metadata, so that an export comes back.
"""

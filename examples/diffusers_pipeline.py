"""Use a codec in a stock pipeline of diffusers: `python examples/diffusers_pipeline.py [MODEL]` writes picture.png."""

import sys

from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from latent_codec import Codec
from latent_codec.interop.autoencoder_kl.adapter import CodecAutoencoder

codec = Codec.load(sys.argv[1] if len(sys.argv) > 1 else "photo")
vae = CodecAutoencoder.from_codec(codec)  # its latents are normalised, as those of Latents(normalize=True)

# The weights are random, so the picture is noise; put a transformer trained on such latents in its place.
z = codec.config.latent_channels
transformer = DiTTransformer2DModel(in_channels=z, out_channels=z, sample_size=16, num_layers=2, attention_head_dim=8)
pipeline = DiTPipeline(transformer.eval(), vae, DDIMScheduler())
image = pipeline(class_labels=[0], num_inference_steps=4).images[0]
image.save("picture.png")

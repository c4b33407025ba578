"""From folders of images to the shards that training reads.

Commands (each has --help):

- ``python -m data_prep.encode_latents``: class folders to latent shards, by any image autoencoder of diffusers.
- ``python -m data_prep.pack_pixels``: class folders to pixel shards.
- ``python -m data_prep.verify``: every shard against the manifest.
- ``python -m data_prep.digits``: a small real data set and a small real VAE, for trying everything on a CPU.

From Python: :func:`data_prep.images.center_crop`, :func:`data_prep.images.list_images` and
:func:`moe_dit.manifest.read_manifest`.
"""

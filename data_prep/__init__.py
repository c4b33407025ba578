"""From images to the shards that training reads.

Commands (each has --help):

- ``python -m data_prep.encode_latents``: images to latent shards, by any image autoencoder of diffusers.
- ``python -m data_prep.pack_pixels``: images to pixel shards.
- ``python -m data_prep.verify``: every shard against the manifest and the index.
- ``python -m data_prep.index``: the index of shards that lack one, and the manifest of other programs' shards.
- ``python -m data_prep.fetch``: a remote folder of shards to a local one.
- ``python -m data_prep.bench``: what reading shards costs, beside other ways to keep samples.
- ``python -m data_prep.digits``: a small real data set and a small real VAE, for trying everything on a CPU.

From Python: :func:`data_prep.images.center_crop`, :func:`data_prep.images.list_images` and
:func:`moe_dit.manifest.read_manifest`.
"""

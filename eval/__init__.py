"""Sampling from an exported model, its scores against real images, and a report of a run.

``eval.sample`` makes samples, ``eval.score`` scores them, ``eval.run`` does both without writing the images, and
``eval.report`` shows a run in one HTML file. ``eval.features`` turns images into the features that the scores need.
"""

"""Sampling from an exported model, its scores against real images, and a report of a run.

``eval.sample`` makes samples, ``eval.score`` scores them, ``eval.run`` does both without writing the images,
``eval.reference`` keeps what is known of real images in a file, ``eval.sweep`` scores many ways to sample, and
``eval.report`` shows a run in one HTML file. ``eval.images`` finds and reads images, ``eval.features`` has the
networks, ``eval.metrics`` the formulas, ``eval.protocols`` the ways to score.
"""

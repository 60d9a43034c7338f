"""Fractals: attractors of iterated function systems, one class per system, so labels are exact.

Anderson & Farrell 2022, "Improving Fractal Pre-training" (arXiv:2110.03091): a system is a handful of contractive
affine maps, drawn by their singular values so that most systems have a rich attractor (sec. 3.1); an image is the
density of the chaos game's points, coloured, over a background (sec. 3.2). Here a class is one system; its images
differ by small changes of the maps, by rotation, mirroring, zoom and shift, and by colour and background.
"""

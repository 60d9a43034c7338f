"""Encoders, towers and heads, and the folders of weights that timm, open_clip and Hugging Face read and write.

What they are trained for is in objectives/.
"""

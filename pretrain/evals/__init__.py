"""How encoders are judged: features, the sources of encoders, and a folder for each protocol; labels from a teacher."""

"""Where an encoder or two towers come from: a run, a checkpoint, a folder, a weights file, or a library's name."""

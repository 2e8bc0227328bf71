"""Trained models in the formats that other programs read: `export_model`.

`job` says what is exported, `format` what a format is, `formats/` has one module each, `run` writes
a folder, reads it back and compares its pictures, and `card` says in words what the folder is.
"""

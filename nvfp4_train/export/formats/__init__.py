"""Formats of NVFP4 folders, as they are written. The format NAME is the file NAME.py, which holds `FORMAT`."""

"""Formats of NVFP4 folders, as they are read: NAME.py holds `READER`. NumPy alone, and nothing that the writers use.

So a mistake in the kernels, in a writer or in the safetensors package shows when an exported folder is verified.
"""

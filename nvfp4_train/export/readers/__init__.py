"""Readers of NVFP4 folders: NAME.py holds `READER`. They use NumPy alone, and nothing that the writers use.

So a mistake in the kernels, in a writer or in the safetensors package shows when an exported folder is verified.
"""

"""Quantization-aware training of language models in NVFP4. Start reading at kernels/reference.py, then quant/, then module.py."""

"""Arithmetic on tensors: NVFP4 scales, codes and their inverse."""

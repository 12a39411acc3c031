"""How good a quantized model is, and what it loses where."""

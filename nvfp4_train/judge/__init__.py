"""How good models are, and what quantization costs where: folders in bf16, quantized on the fly, checkpoints of runs, exported folders.

`subjects` finds out what a path holds, `loading` makes of it the plain transformers class with the values that are served, `measure`
compares two of those on held-out text, `results` draws the conclusions, `table` and `record` tell them, `tasks` asks others.
`sensitivity` measures a model with some of its weights quantized alone.
"""

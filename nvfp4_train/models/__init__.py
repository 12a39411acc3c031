"""Loading a Hugging Face causal language model, or building one from a config."""

"""Which weights of a model are quantized, the modules that compute with them, and the store that refreshes them."""

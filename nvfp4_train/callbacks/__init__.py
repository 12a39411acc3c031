"""When things happen in a run: quantization, statistics, throughput, export, the summary. No arithmetic lives here."""

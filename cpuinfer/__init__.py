"""cpuinfer runs quantized language models (GGUF files) on a CPU."""

__version__ = "0.1.0"

"""What runs on the cores: see integer.py for how quantized rows are multiplied."""

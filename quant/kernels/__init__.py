"""The compiled loops of the quantizers; arrays are checked and made in quant/fit.py."""

"""How good the answers of a demo bundle are, beside those of the unquantized one and of simple methods."""
